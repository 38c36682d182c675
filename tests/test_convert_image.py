"""LoRAs for images in other forms: each is read again, by diffusers too, and gives the same."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from lora_scripts import convert_image
from lora_scripts.adapters import Adapter
from lora_scripts.cli import main
from lora_scripts.convert_image import ConvertRequest, Form
from lora_scripts.device import Compute
from lora_scripts.errors import UserError, WorkError
from lora_scripts.export import files
from lora_scripts.models import lora_file
from lora_scripts.models.family import ImageFamily, Options
from lora_scripts.models.header import read_header, read_metadata
from lora_scripts.models.kinds import Family
from lora_scripts.models.lora import AdaptedLayer
from lora_scripts.tasks import build
from tests import lora_toys, toys
from tests.lora_toys import Layers
from tests.models.ldm_facts import TOY, TOY_2, TOY_XL
from tests.models.ldm_toy import ldm_tensors, sd2_tensors, sdxl_tensors, toy_modules

CPU = Compute(torch.device("cpu"), "no")
EPSILON = {"modelspec.prediction_type": "epsilon"}
WIDTHS = {"sd1": TOY, "sd2": TOY_2, "sdxl": TOY_XL}


def family_of(base: Path, prediction: Any = "auto") -> ImageFamily:
    options = Options(prediction_type=prediction)
    return build.load_family(build.find_base(str(base)), CPU, options)


def probe(base: Path, *loras: Adapter) -> torch.Tensor:
    family = family_of(base)
    lora_file.put_on(family, [(each.path, each.scale) for each in loras])
    with torch.no_grad():
        return family.probe()


def lora(path: Path, base: Path, preset: str = "all", *, dora: bool = False, **how: Any) -> Path:
    """A LoRA file in the WebUI's layout, of all components of a base."""
    family = family_of(base)
    layers: Layers = lora_toys.random_layers(family, preset, **how)
    if dora:
        layers = {component: [with_magnitude(family, component, layer) for layer in each]
                  for component, each in layers.items()}  # fmt: skip
    metadata = {"ss_sd_model_name": str(base), "ss_output_name": path.stem,
                "ss_network_dim": "9", **family.metadata()}  # fmt: skip
    files.write_lora(path, layers, family.webui_name, torch.float32, metadata)
    return path


def with_magnitude(family: ImageFamily, component: str, layer: AdaptedLayer) -> AdaptedLayer:
    weight = family.adapted[component].get_parameter(f"{layer.path}.weight").detach()
    magnitude = 1.1 * weight.flatten(1).norm(dim=1)
    return AdaptedLayer(layer.path, layer.down, layer.up, layer.alpha, magnitude)


def write(form: Form, *loras: Path | Adapter, **changes: Any) -> Path:
    adapters = [each if isinstance(each, Adapter) else Adapter(each, 1.0) for each in loras]
    request = ConvertRequest(form=form, loras=adapters, base=None, rank=None, output=None,
                             device="cpu")  # fmt: skip
    return convert_image.run(ConvertRequest(**{**request.__dict__, **changes}))


def by_diffusers(base: Path, pipeline_class: Any, file: Path) -> torch.Tensor:
    """The outputs of the parts of a stock pipeline that has read a LoRA file."""
    pipeline = pipeline_class.from_pretrained(str(base))
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    family: Any = family_of(base)
    family.adapted = {component: getattr(pipeline, component) for component in family.adapted}
    for component, part in family.adapted.items():
        setattr(family, component, part)
    with torch.no_grad():
        found: torch.Tensor = family.probe()
    return found


# --- another layout -------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", toys.FAMILIES)
def test_into_diffusers_layout_and_back(
    bases: dict[Family, Path], tmp_path: Path, name: Family, dora: bool
) -> None:
    base = bases[name]
    first = lora(tmp_path / "a.safetensors", base, dora=dora)
    there = write("diffusers", first)
    assert there == tmp_path / "a-diffusers.safetensors"
    back = write("webui", there, output=tmp_path / "b.safetensors")
    expected = probe(base, Adapter(first, 1.0))
    assert (expected - probe(base)).abs().max() > 0.01
    found = by_diffusers(base, toys.FAMILIES[name][1], there)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    one, two = load_file(first), load_file(back)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    kept = read_metadata(back)
    assert kept["ss_output_name"] == "a"
    assert kept["ss_network_dim"] == "2"  # as it is, not as the header said
    assert "lora_adapter_metadata" not in kept


def test_a_real_file_needs_no_base(tmp_path: Path) -> None:
    """Names and shapes of SDXL tell where each layer is; original names become diffusers'."""
    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    tensors = {
        f"{name}.lora_down.weight": torch.randn(4, 2048).half(),
        f"{name}.lora_up.weight": torch.randn(640, 4).half(),
        f"{name}.alpha": torch.tensor(2.0),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    written = write("webui", tmp_path / "a.safetensors")
    layer = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    found = load_file(written)
    assert {key.replace(layer, name) for key in found} == tensors.keys()
    assert found[f"{layer}.lora_up.weight"].dtype == torch.float16
    assert torch.equal(found[f"{layer}.lora_up.weight"], tensors[f"{name}.lora_up.weight"])
    metadata = read_metadata(written)
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"


def test_a_scale_is_written_into_the_alphas(bases: dict[Family, Path], tmp_path: Path) -> None:
    file = lora(tmp_path / "a.safetensors", bases["sd1"], alpha=3.0)
    written = write("webui", Adapter(file, 0.5))
    alphas = {float(t) for name, t in load_file(written).items() if name.endswith(".alpha")}
    assert alphas == {1.5}
    expected = probe(bases["sd1"], Adapter(file, 0.5))
    torch.testing.assert_close(probe(bases["sd1"], Adapter(written, 1.0)), expected)


# --- another rank ---------------------------------------------------------------------------------


def test_a_lower_rank_is_the_nearest_and_its_error_is_shown(
    bases: dict[Family, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = bases["sd1"]
    file = lora(tmp_path / "a.safetensors", base, rank=4, alpha=3.0)
    before = lora_file.read(file, family_of(base))
    with caplog.at_level("INFO"):
        written = write("webui", file, rank=2)
    assert written.name == "a-rank2-webui.safetensors"
    after = lora_file.read(written, family_of(base))
    lost = whole = worst = 0.0
    for component, layers in before.items():
        for old, new in zip(layers, after[component], strict=True):
            assert (new.path, new.rank, new.alpha) == (old.path, 2, 1.5)  # the same scale
            target, found = update(old), update(new)
            values = torch.linalg.svdvals(target)
            error = (target - found).norm().item()
            assert error == pytest.approx(values[2:].norm().item(), rel=1e-3)  # Eckart & Young
            lost, whole = lost + error**2, whole + target.norm().item() ** 2
            worst = max(worst, error / target.norm().item())
    said = next(line for line in caplog.messages if line.startswith("Relative error"))
    overall = 100 * math.sqrt(lost / whole)
    assert f"{overall:.2f}% over all layers, {100 * worst:.2f}% in the worst" in said
    assert read_metadata(written)["ss_network_dim"] == "2"
    assert read_metadata(written)["ss_network_alpha"] == "1.5"


def test_a_lora_that_has_that_rank_in_truth_loses_nothing(
    bases: dict[Family, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = bases["sd1"]
    file = lora(tmp_path / "a.safetensors", base, rank=2)
    padded = {}
    for name, tensor in load_file(file).items():
        zeros = torch.zeros_like(tensor)
        axis = {"lora_down.weight": 0, "lora_up.weight": 1}.get(name.partition(".")[2])
        padded[name] = 2 * tensor if axis is None else torch.cat([tensor, zeros], axis)
    save_file(padded, tmp_path / "b.safetensors", metadata=read_metadata(file))
    with caplog.at_level("INFO"):
        written = write("diffusers", tmp_path / "b.safetensors", rank=2)
    assert any("0.00% over all layers, 0.00% in the worst" in line for line in caplog.messages)
    expected = probe(base, Adapter(file, 1.0))
    found = probe(base, Adapter(written, 1.0))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def update(layer: AdaptedLayer) -> torch.Tensor:
    return layer.alpha / layer.rank * layer.up.flatten(1) @ layer.down.flatten(1)


# --- merged ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", toys.FAMILIES)
def test_merged_it_is_a_plain_folder_for_diffusers(
    bases: dict[Family, Path], tmp_path: Path, name: Family
) -> None:
    base = bases[name]
    one = lora(tmp_path / "a.safetensors", base, "attention", seed=1)
    two = lora(tmp_path / "b.safetensors", base, "all", seed=2, dora=True)
    loras = [Adapter(one, 0.8), Adapter(two, 0.5)]
    output = write("merged", *loras)
    assert output == tmp_path / "a-merged"
    expected = probe(base, *loras)
    assert (expected - probe(base)).abs().max() > 0.01
    torch.testing.assert_close(probe(output), expected, rtol=1e-4, atol=1e-4)
    toys.FAMILIES[name][1].from_pretrained(str(output), local_files_only=True)
    names = [key for file in output.rglob("*.safetensors") for key in read_header(file)]
    assert names and not any("lora" in key or "base_layer" in key for key in names)
    assert not list(tmp_path.glob(".*"))


def checkpoint(path: Path, name: Family, metadata: Mapping[str, str] = EPSILON) -> Path:
    """A toy checkpoint in the original layout."""
    tensors = {"sd1": ldm_tensors, "sd2": sd2_tensors, "sdxl": sdxl_tensors}[name]
    save_file(tensors(toy_modules(WIDTHS[name])), path, metadata={**metadata})
    return path


@pytest.mark.parametrize("name", toys.FAMILIES)
def test_merged_it_is_one_checkpoint(tmp_path: Path, name: Family) -> None:
    base = checkpoint(tmp_path / "base.safetensors", name)
    file = lora(tmp_path / "a.safetensors", base)
    output = write("single-file", file, output=tmp_path / "out" / "my.safetensors")
    found = build.find_base(str(output))
    assert (found.family, found.layout) == (name, "ldm")
    expected = probe(base, Adapter(file, 1.0))
    assert (expected - probe(base)).abs().max() > 0.01
    torch.testing.assert_close(probe(output), expected, rtol=1e-4, atol=1e-4)
    assert read_metadata(output)["modelspec.title"] == "my"
    assert [path.name for path in output.parent.iterdir()] == ["my.safetensors"]


def test_what_a_silent_base_predicts_must_be_said_and_is_written(tmp_path: Path) -> None:
    """Random weights tell nothing on pure noise."""
    base = checkpoint(tmp_path / "base.safetensors", "sd1", {})
    family = family_of(base, "v_prediction")
    layers = lora_toys.random_layers(family)
    file = lora_toys.kohya(tmp_path / "a.safetensors", family, layers)
    with pytest.raises(UserError, match="prediction_type"):
        write("single-file", file, base=str(base))
    output = write("single-file", file, base=str(base), prediction_type="v_prediction")
    assert read_metadata(output)["modelspec.prediction_type"] == "v"
    assert "v_pred" in read_header(output)


def test_the_precision_of_the_base_is_kept(bases: dict[Family, Path], tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(str(bases["sd1"]), safety_checker=None)
    half = tmp_path / "half"
    pipeline.to(torch.float16).save_pretrained(str(half))
    file = lora(tmp_path / "a.safetensors", half)
    output = write("merged", file)
    header = read_header(next((output / "unet").glob("*.safetensors")))
    assert {info.dtype for info in header.values()} == {"F16"}


def test_a_merged_model_that_differs_is_not_kept(
    bases: dict[Family, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_scripts.models import lora as loras

    file = lora(tmp_path / "a.safetensors", bases["sd1"])
    right = loras.merge_into

    def wrong(module: torch.nn.Module) -> None:
        right(module)
        next(module.parameters()).data *= 1.1

    monkeypatch.setattr(loras, "merge_into", wrong)
    with pytest.raises(WorkError, match="merged, the model differs from base with LoRA"):
        write("merged", file)
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors"}


# --- what is refused ------------------------------------------------------------------------------


def test_nothing_is_overwritten(bases: dict[Family, Path], tmp_path: Path) -> None:
    file = lora(tmp_path / "a.safetensors", bases["sd1"])
    (tmp_path / "a-webui.safetensors").write_text("mine", encoding="utf-8")
    (tmp_path / "a-merged").mkdir()
    (tmp_path / "a-merged" / "notes").write_text("mine", encoding="utf-8")
    for form in ("webui", "merged"):
        with pytest.raises(UserError, match="is there already"):
            write(form, file)
    with pytest.raises(UserError, match=r"must be the name of a \.safetensors file"):
        write("webui", file, output=tmp_path / "b")


def test_what_cannot_be_done(bases: dict[Family, Path], tmp_path: Path) -> None:
    file = lora(tmp_path / "a.safetensors", bases["sd1"])
    with pytest.raises(UserError, match="give one; only --merge takes several"):
        write("webui", file, file)
    with pytest.raises(UserError, match="does nothing beside --merge"):
        write("merged", file, rank=2)
    save_file(load_file(file), tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="does not say which base it is for"):
        write("merged", tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="are not in this model"):
        write("merged", lora(tmp_path / "x.safetensors", bases["sdxl"]), base=str(bases["sd1"]))


def export(*arguments: str | Path) -> int:
    """The exit code of `lora-scripts export …`."""
    try:
        main(["export", *map(str, arguments)])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_as_it_is_typed(
    bases: dict[Family, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = lora(tmp_path / "a.safetensors", bases["sd1"], rank=4)
    given = ("--lora", file, "--device", "cpu")
    assert export(*given, "--rank", "2") == 0
    assert (tmp_path / "a-rank2-webui.safetensors").is_file()
    assert export(*given, "--format", "diffusers") == 0
    assert export(*given, "--merge") == 0
    assert (tmp_path / "a-merged" / "model_index.json").is_file()
    for wrong, said in (
        (("--format", "gguf"), "is for images; gguf is a form of LoRAs for texts"),
        (("--format", "zip"), "must be one of diffusers, webui, gguf, chatglm"),
        (("--merge", "--format", "webui"), "give one of --merge, --single-file"),
        ((), "give one of --merge, --single-file"),
    ):
        assert export(*given, *wrong) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "text").mkdir()
    assert export("--lora", tmp_path / "text", "--rank", "2") == 2
    assert "is no LoRA for images" in capsys.readouterr().err


def test_a_peft_folder_of_a_unet_is_one_for_images(
    bases: dict[Family, Path], tmp_path: Path
) -> None:
    family = family_of(bases["sd1"])
    layers = {"unet": lora_toys.random_layers(family)["unet"]}
    folder = lora_toys.peft(tmp_path / "a", layers)
    output = tmp_path / "b.safetensors"
    base = ("--base-model", bases["sd1"])
    assert export("--lora", folder, "--format", "webui", "--output", output, *base) == 0
    torch.testing.assert_close(
        probe(bases["sd1"], Adapter(output, 1.0)), probe(bases["sd1"], Adapter(folder, 1.0))
    )
    assert json.loads(read_metadata(output)["ss_v2"].lower()) is False


def test_a_rank_that_is_not_lower_is_refused(bases: dict[Family, Path], tmp_path: Path) -> None:
    file = lora(tmp_path / "a.safetensors", bases["sd1"], rank=4)
    with pytest.raises(UserError, match="--rank 4: must be lower than that of the file, 4"):
        write("webui", file, rank=4)
