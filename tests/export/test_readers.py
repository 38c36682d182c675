"""What `inspect` says of diffusers is what diffusers does with such files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_scripts.device import Compute
from lora_scripts.export import files, readers
from lora_scripts.models import lora_layouts
from lora_scripts.models.family import ImageFamily
from lora_scripts.models.header import read_header, read_metadata
from lora_scripts.models.kinds import Family
from lora_scripts.tasks import build
from tests import lora_toys, toys
from tests.lora_toys import Layers

CPU = Compute(torch.device("cpu"), "no")


def write_kohya(path: Path, family: ImageFamily, layers: Layers) -> Path:
    return lora_toys.kohya(path, family, layers)


def write_original(path: Path, family: ImageFamily, layers: Layers) -> Path:
    return lora_toys.kohya(path, family, layers, original=True)


def write_without_alpha(path: Path, family: ImageFamily, layers: Layers) -> Path:
    tensors = load_file(lora_toys.kohya(path, family, layers))
    save_file({name: t for name, t in tensors.items() if not name.endswith(".alpha")}, path)
    return path


def write_mixture(path: Path, family: ImageFamily, layers: Layers) -> Path:
    return lora_toys.diffusers_mixture(path, layers)


def write_diffusers(path: Path, family: ImageFamily, layers: Layers) -> Path:
    files.write_diffusers(path, layers, torch.float32, {})
    return path


def write_peft(path: Path, family: ImageFamily, layers: Layers) -> Path:
    return lora_toys.peft(path.with_suffix(""), layers) / "adapter_model.safetensors"


Writer = Callable[[Path, ImageFamily, Layers], Path]
LAYOUTS: Mapping[str, tuple[Writer, Mapping[Family, str]]] = {
    "kohya": (write_kohya, {"sd1": "yes", "sdxl": "yes"}),
    "original": (write_original, {"sd1": "no", "sdxl": "yes"}),
    "without alpha": (write_without_alpha, {"sd1": "yes", "sdxl": "yes"}),
    "mixture": (write_mixture, {"sd1": "partly", "sdxl": "partly"}),
    "diffusers": (write_diffusers, {"sd1": "yes", "sdxl": "yes"}),
    "peft": (write_peft, {"sd1": "no", "sdxl": "no"}),
}


def read_by_diffusers(pipeline_class: Any, base: Path, file: Path) -> torch.Tensor:
    """The outputs of a model whose parts come out of a stock pipeline that has read the file."""
    pipeline = pipeline_class.from_pretrained(str(base))
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    family: Any = build.load_family(build.find_base(str(base)), CPU)
    family.adapted = {component: getattr(pipeline, component) for component in family.adapted}
    for component, part in family.adapted.items():
        setattr(family, component, part)
    with torch.no_grad():
        found: torch.Tensor = family.probe()
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_diffusers_reads_what_is_said_to_be_read(
    bases: dict[Family, Path], tmp_path: Path, name: Family, layout: str
) -> None:
    family = build.load_family(build.find_base(str(bases[name])), CPU)
    write, answers = LAYOUTS[layout]
    alpha = 2 if layout == "without alpha" else 3
    layers = lora_toys.random_layers(family, "linear", rank=2, alpha=alpha)
    if layout == "peft":
        layers = {"unet": layers["unet"]}
    file = write(tmp_path / "a.safetensors", family, layers)
    header = read_header(file)
    facts = readers.Facts(name, lora_layouts.sort(header), header, read_metadata(file))
    said = readers.programs(facts)["diffusers"]
    assert said.split(";")[0].split(":")[0] == answers[name]
    expected = lora_toys.probe_of(family, layers)
    try:
        found = read_by_diffusers(toys.FAMILIES[name][1], bases[name], file)
        is_read = torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    except (ValueError, KeyError, IndexError, RuntimeError):
        is_read = False
    assert is_read == (answers[name] == "yes")


def names(*modules: str, end: str = "lora_down.weight") -> readers.Facts:
    found = lora_layouts.sort(f"{module}.{end}" for module in modules)
    return readers.Facts("sdxl", found, {}, {"ss_base_model_version": "sdxl_base_v1-0"})


def test_what_comfyui_knows_of_diffusers_names() -> None:
    attention = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    feed_forward = "unet.down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2"
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    ends = {"end": "lora_A.weight"}
    said = {
        "none": readers.programs(names(attention, **ends)),
        "some": readers.programs(names(attention, feed_forward, text, **ends)),
    }
    assert said["none"]["ComfyUI, Forge"] == "no: it knows none of these names"
    assert said["some"]["ComfyUI, Forge"] == "partly: 2 of 3 layers"
    assert said["some"]["AUTOMATIC1111"] == "no: it knows none of these names"
    old = readers.programs(names(attention.replace(".to_q", ".processor.to_q_lora"),
                                 end="down.weight"))  # fmt: skip
    assert old["ComfyUI, Forge"] == "yes"


def test_a1111_lists_files_by_their_header() -> None:
    module = "lora_unet_mid_block_attentions_0_proj_in"
    alpha = {f"{module}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")}
    for metadata, said in (
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "yes"),
        ({}, "yes"),
        ({"format": "pt"}, "yes, but lists it under sd1: its header says so"),
        ({"ss_v2": "True"}, "yes, but lists it under sd2: its header says so"),
    ):
        facts = readers.Facts("sdxl", lora_layouts.sort(alpha), {}, metadata)
        assert readers.programs(facts)["AUTOMATIC1111"] == said
    missed = readers.programs(names(readers.A1111_MISSES))["AUTOMATIC1111"]
    assert missed == f"all layers but {readers.A1111_MISSES}"
