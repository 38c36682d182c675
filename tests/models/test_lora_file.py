"""LoRA files of other trainers: read with equal outputs, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_scripts.device import Compute
from lora_scripts.errors import UserError
from lora_scripts.models import lora_file
from lora_scripts.models.family import ImageFamily
from lora_scripts.tasks import build
from tests import lora_toys, toys
from tests.lora_toys import Layers

CPU = Compute(torch.device("cpu"), "no")


def family_of(base: Path) -> ImageFamily:
    return build.load_family(build.find_base(str(base)), CPU)


def probe_with(base: Path, file: Path, scale: float = 1.0) -> torch.Tensor:
    family = family_of(base)
    lora_file.put_on(family, [(file, scale)])
    with torch.no_grad():
        return family.probe()


def same(found: torch.Tensor, expected: torch.Tensor, bare: torch.Tensor) -> None:
    assert (expected - bare).abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("name", toys.FAMILIES)
def test_kohyas_names_with_diffusers_and_with_original_blocks(
    bases: dict[str, Path], tmp_path: Path, name: str, original: bool
) -> None:
    family = family_of(bases[name])
    layers = lora_toys.random_layers(family)
    file = lora_toys.kohya(tmp_path / "a.safetensors", family, layers, original=original)
    bare = family.probe().detach()
    same(probe_with(bases[name], file), lora_toys.probe_of(family, layers), bare)


@pytest.mark.parametrize("name", toys.FAMILIES)
def test_the_mixture_of_diffusers_scripts(
    bases: dict[str, Path], tmp_path: Path, name: str
) -> None:
    family = family_of(bases[name])
    layers = lora_toys.random_layers(family)
    file = lora_toys.diffusers_mixture(tmp_path / "a.safetensors", layers)
    bare = family.probe().detach()
    same(probe_with(bases[name], file), lora_toys.probe_of(family, layers), bare)


def test_pefts_directory_of_a_unet(bases: dict[str, Path], tmp_path: Path) -> None:
    family = family_of(bases["sd1"])
    layers = {"unet": lora_toys.random_layers(family)["unet"]}
    folder = lora_toys.peft(tmp_path / "a", layers)
    bare = family.probe().detach()
    same(probe_with(bases["sd1"], folder), lora_toys.probe_of(family, layers), bare)


def test_processors_of_old_diffusers_scale_by_one(bases: dict[str, Path], tmp_path: Path) -> None:
    family = family_of(bases["sd1"])
    layers = {"unet": lora_toys.random_layers(family, "attention", rank=2, alpha=2)["unet"]}
    file = lora_toys.old_diffusers(tmp_path / "a.safetensors", layers)
    bare = family.probe().detach()
    same(probe_with(bases["sd1"], file), lora_toys.probe_of(family, layers), bare)


def test_no_alpha_means_scale_one(bases: dict[str, Path], tmp_path: Path) -> None:
    family = family_of(bases["sd1"])
    layers = lora_toys.random_layers(family, rank=2, alpha=2)
    file = lora_toys.kohya(tmp_path / "a.safetensors", family, layers)
    kept = {name: tensor for name, tensor in load_file(file).items() if ".alpha" not in name}
    save_file(kept, file)
    bare = family.probe().detach()
    same(probe_with(bases["sd1"], file), lora_toys.probe_of(family, layers), bare)


def test_kernels_of_one_pixel_are_put_on_or_taken_off(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    """OneTrainer and LyCORIS write proj_in of SDXL as kernels, others those of SD1 as matrices."""
    for name in ("sd1", "sdxl"):
        family = family_of(bases[name])
        layers = lora_toys.random_layers(family)
        file = lora_toys.kohya(tmp_path / f"{name}.safetensors", family, layers)
        tensors = load_file(file)
        for key, tensor in tensors.items():
            if "proj_in" in key and not key.endswith(".alpha"):
                tensors[key] = tensor[:, :, None, None] if tensor.ndim == 2 else tensor[..., 0, 0]
        save_file({k: t.contiguous() for k, t in tensors.items()}, file)
        bare = family.probe().detach()
        same(probe_with(bases[name], file), lora_toys.probe_of(family, layers), bare)


def test_several_act_together_and_are_taken_off_again(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    family = family_of(bases["sd1"])
    bare = family.probe().detach()
    first = lora_toys.random_layers(family, "attention", seed=1)
    second = lora_toys.random_layers(family, "all", rank=3, seed=2)
    files = [lora_toys.kohya(tmp_path / f"{n}.safetensors", family, layers)
             for n, layers in enumerate((first, second))]  # fmt: skip
    lora_file.put_on(family, [(files[0], 0.5), (files[1], -0.3)])
    together = family.probe().detach()
    lora_file.put_on(family, [])
    assert torch.equal(family.probe(), bare)
    scaled: Layers = {
        component: [
            *(type(x)(x.path, x.down, x.up, 0.5 * x.alpha) for x in first[component]),
            *(type(x)(x.path, x.down, x.up, -0.3 * x.alpha) for x in second[component]),
        ]
        for component in second
    }
    same(together, lora_toys.probe_of(family, scaled), bare)


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["lora_unet_x.hada_w1_a", "lora_unet_x.alpha"], r"LoHa \(LyCORIS\): 1 tensors"),
        (["lora_unet_x.lokr_w1"], "LoKr"),
        (["lora_unet_x.lora_down.weight", "lora_unet_x.lora_mid.weight"], "Tucker"),
        (["lora_unet_x.diff", "lora_unet_x.diff_b"], r"full weights \(LyCORIS\): 2 tensors"),
        (["lora_unet_x.oft_blocks"], "OFT"),
        (["bundle_emb.me.string_to_param", "lora_te_x.lora_down.weight"], "bundled embeddings"),
        (["lora_unet_x.on_input", "lora_unet_x.weight"], r"\(IA\)³"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "is no LoRA file that is known here"),
        (["lora_unet_x.lora_down.weight"], "lacks one of the two matrices of lora_unet_x"),
        (["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
          "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"],
         r"1 layers are not in this model .*; it is for FLUX"),
    ],
)  # fmt: skip
def test_other_kinds_are_refused_by_name(
    bases: dict[str, Path], tmp_path: Path, names: list[str], what: str
) -> None:
    file = tmp_path / "a.safetensors"
    save_file({name: torch.zeros(2, 2) for name in names}, file)
    with pytest.raises(UserError, match=what):
        lora_file.read(file, family_of(bases["sd1"]))


def test_a_lora_of_another_family_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    xl = family_of(bases["sdxl"])
    layers = lora_toys.random_layers(xl, "linear")
    file = lora_toys.kohya(tmp_path / "a.safetensors", xl, layers)
    with pytest.raises(
        UserError, match=r"are not in this model \(sd_v1\): lora_te2_.*; it is for SDXL"
    ):
        lora_file.read(file, family_of(bases["sd1"]))


def test_a_real_sdxl_lora_is_named_when_the_base_is_another(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    """Names and shapes tell, without a header."""
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_9_attn2_to_k"
    tensors = {"lora_down.weight": torch.zeros(4, 2048), "lora_up.weight": torch.zeros(1280, 4)}
    file = tmp_path / "a.safetensors"
    save_file({f"{name}.{part}": tensor for part, tensor in tensors.items()}, file)
    with pytest.raises(UserError, match="it is for SDXL"):
        lora_file.read(file, family_of(bases["sd1"]))


def test_a_lora_for_texts_is_sent_to_chat(bases: dict[str, Path], tmp_path: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    file = tmp_path / "adapter_model.safetensors"
    parts = {"lora_A.weight": torch.zeros(2, 8), "lora_B.weight": torch.zeros(8, 2)}
    save_file({f"{name}.{part}": tensor for part, tensor in parts.items()}, file)
    with pytest.raises(UserError, match="is for a language model, see `lora-scripts chat`"):
        lora_file.read(tmp_path, family_of(bases["sd1"]))


def test_magnitudes_by_input_are_refused_even_of_square_layers(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    """LyCORIS's usual DoRA, shape (1, in); read by output it would give noise."""
    family = family_of(bases["sd1"])
    layers = lora_toys.random_layers(family, ["attn1.to_q"])  # type: ignore[arg-type]
    file = lora_toys.kohya(tmp_path / "a.safetensors", family, layers)
    tensors = load_file(file)
    name = next(iter(tensors)).split(".")[0]
    tensors[f"{name}.dora_scale"] = torch.ones(1, tensors[f"{name}.lora_down.weight"].shape[1])
    save_file(tensors, file)
    with pytest.raises(UserError, match="DoRA magnitudes for each input"):
        lora_file.read(file, family)


def test_a_layer_under_two_names_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    family = family_of(bases["sd1"])
    layers = {"unet": lora_toys.random_layers(family, "attention")["unet"][:1]}
    one = load_file(lora_toys.kohya(tmp_path / "a.safetensors", family, layers))
    two = load_file(lora_toys.kohya(tmp_path / "b.safetensors", family, layers, original=True))
    save_file(one | two, tmp_path / "c.safetensors")
    with pytest.raises(UserError, match="twice, under two names"):
        lora_file.read(tmp_path / "c.safetensors", family)


def test_other_spellings_of_the_same_names(bases: dict[str, Path], tmp_path: Path) -> None:
    """diffusers' converter writes lora_te1_ for SD 1, SimpleTuner's LyCORIS lycoris_."""
    family = family_of(bases["sd1"])
    layers = lora_toys.random_layers(family, "linear")
    file = lora_toys.kohya(tmp_path / "a.safetensors", family, layers)
    tensors = {
        key.replace("lora_te_", "lora_te1_").replace("lora_unet_", "lycoris_"): tensor
        for key, tensor in load_file(file).items()
    }
    save_file(tensors, file)
    bare = family.probe().detach()
    same(probe_with(bases["sd1"], file), lora_toys.probe_of(family, layers), bare)


def test_peft_settings_with_patterns_and_rslora(bases: dict[str, Path], tmp_path: Path) -> None:
    """Scales out of the header: rank and alpha by layer, rsLoRA's α/√r."""
    family = family_of(bases["sd1"])
    layers = {"unet": lora_toys.random_layers(family, "attention", rank=4, alpha=3)["unet"]}
    first, *others = layers["unet"]
    settings = {"unet.r": 4, "unet.lora_alpha": 3, "unet.use_rslora": True,
                "unet.alpha_pattern": {first.path: 5}}  # fmt: skip
    tensors = {}
    for layer in layers["unet"]:
        tensors[f"unet.{layer.path}.lora_A.weight"] = layer.down
        tensors[f"unet.{layer.path}.lora_B.weight"] = layer.up
    file = tmp_path / "a.safetensors"
    save_file(tensors, file, metadata={"lora_adapter_metadata": json.dumps(settings)})
    alphas = {layer.path: layer.alpha for layer in lora_file.read(file, family)["unet"]}
    assert alphas == {first.path: 10.0, **{layer.path: 6.0 for layer in others}}  # alpha × √4
    save_file(tensors, file, metadata={"lora_adapter_metadata": "[1"})
    with pytest.raises(UserError, match="is no JSON object"):
        lora_file.read(file, family)


def test_matrices_of_another_width_are_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    family = family_of(bases["sd1"])
    layers = lora_toys.random_layers(family, "attention")
    layer = layers["unet"][0]
    wrong = type(layer)(layer.path, torch.zeros(2, 7), layer.up, 2)
    file = lora_toys.kohya(tmp_path / "a.safetensors", family, {"unet": [wrong]})
    with pytest.raises(UserError, match=r"is for a layer of \[\d+, 7\], this model's is"):
        lora_file.read(file, family)


def test_what_is_not_there(tmp_path: Path, bases: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="no such LoRA file"):
        lora_file.locate(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="no pytorch_lora_weights"):
        lora_file.locate(tmp_path)
