"""`lora-scripts inspect`: what a LoRA file is, told from its header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_scripts import inspect_lora
from lora_scripts.errors import UserError
from lora_scripts.models import skeleton, unet
from lora_scripts.models.kinds import Family

RANK = 2


def real_file(
    path: Path,
    family: Family,
    metadata: Mapping[str, str],
    *,
    alpha: float = 1.0,
    dora: bool = False,
) -> Path:
    """A LoRA on attention at real widths, UNet and text encoders, in the WebUI's layout."""
    model = skeleton.of(family)
    tensors = {}
    for component, paths in unet.targets(model.adapted, "attention").items():
        for layer in paths:
            name = model.webui_name(component, layer)
            weight = model.adapted[component].get_parameter(f"{layer}.weight")
            tensors[f"{name}.lora_down.weight"] = torch.zeros(RANK, weight.shape[1]).half()
            tensors[f"{name}.lora_up.weight"] = torch.zeros(weight.shape[0], RANK).half()
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
            if dora:
                tensors[f"{name}.dora_scale"] = torch.ones(weight.shape[0], 1).half()
    save_file(tensors, path, metadata={**metadata})
    return path


@pytest.mark.parametrize(
    ("family", "named", "layers"),
    [
        ("sd1", "Stable Diffusion 1.x", {"UNet": 128, "text encoder": 48}),
        ("sd2", "Stable Diffusion 2.x", {"UNet": 128, "text encoder": 92}),
        ("sdxl", "SDXL", {"UNet": 560, "second text encoder": 128, "text encoder": 48}),
    ],
)
def test_the_family_is_told_by_names_and_shapes(
    tmp_path: Path, family: Family, named: str, layers: dict[str, int]
) -> None:
    report = inspect_lora.inspect(real_file(tmp_path / "a.safetensors", family, {}))
    assert report.family == named
    assert report.layers == layers
    assert (report.kind, report.layout) == ("LoRA", "kohya")
    assert (report.ranks, report.alphas) == (
        {"2": sum(layers.values())},
        {"1": sum(layers.values())},
    )
    assert set(report.dtypes) == {"F16"}
    assert set(report.programs.values()) == {"yes"}


def test_what_a_person_sees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tags = {"a": {"1girl": 3, "sky ": 1}, "b": {"sky": 5}}
    metadata = {
        "ss_base_model_version": "sd_v1",
        "ss_tag_frequency": json.dumps(tags),
        "ss_network_args": json.dumps({"lora_type": "rslora"}),
        "ss_comment": "x" * 300,
    }
    file = real_file(tmp_path / "a.safetensors", "sd1", metadata, alpha=2.5)
    inspect_lora.run(file, as_json=False)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == str(file)
    for line in (
        "  for       Stable Diffusion 1.x",
        "  kind      rsLoRA, in the layout of kohya",
        "  layers    128 in the UNet",
        "  ranks     2",
        "  alphas    2.5",
        "  diffusers: yes",
        "  most frequent tags: sky (6), 1girl (3)",
        f"  ss_comment = {'x' * 100}…",
    ):
        assert line in said
    assert not any("ss_tag_frequency" in line for line in said)


def test_for_machines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = real_file(tmp_path / "a.safetensors", "sd1", {"ss_output_name": "名字"})
    inspect_lora.run(file, as_json=True)
    said = json.loads(capsys.readouterr().out)
    assert said["family"] == "Stable Diffusion 1.x"
    assert said["metadata"] == {"ss_output_name": "名字"}
    assert said["bytes"] == file.stat().st_size


def test_dora_is_told_and_who_applies_it_otherwise(tmp_path: Path) -> None:
    file = real_file(tmp_path / "a.safetensors", "sd1", {}, dora=True)
    report = inspect_lora.inspect(file)
    assert report.kind == "DoRA"
    assert report.programs["diffusers"] == "no: it drops .dora_scale"
    assert report.programs["AUTOMATIC1111"].startswith("reads it, but not as trained")
    assert "DoRA near to what was trained" in report.programs["ComfyUI, Forge"]


def test_kinds_that_are_not_read_are_named(tmp_path: Path) -> None:
    name = "lora_unet_mid_block_attentions_0_proj_in"
    parts = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    tensors = {f"{name}.{part}": torch.zeros(2, 2) for part in parts}
    save_file(
        tensors | {f"{name}.alpha": torch.tensor(1.0)},
        tmp_path / "a.safetensors",
        metadata={"ss_base_model_version": "sd_v1"},
    )
    report = inspect_lora.inspect(tmp_path / "a.safetensors")
    assert report.kind == "LoHa (LyCORIS)"
    assert report.not_read == {"LoHa (LyCORIS)": 4}
    assert report.family == "Stable Diffusion 1.x by its header"
    assert report.programs["lora-scripts"].startswith("no: it reads LoRA")
    assert report.programs["AUTOMATIC1111"] == "yes"


def test_a_text_loras_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    parts = {"lora_A.weight": torch.zeros(4, 8), "lora_B.weight": torch.zeros(8, 4)}
    tensors = {f"{name}.{part}": tensor for part, tensor in parts.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"r": 4, "lora_alpha": 8, "use_rslora": True, "base_model_name_or_path": "a/b"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    inspect_lora.run(tmp_path, as_json=False)
    said = capsys.readouterr().out.splitlines()
    assert "  for       a language model" in said
    assert "  kind      rsLoRA, in the layout of peft" in said
    assert "  layers    1 in the language model" in said
    assert "  alphas    16" in said  # 8 × √4, with which alpha / rank is the scale
    assert "  base model: a/b" in said


def test_another_file_is_no_lora(tmp_path: Path) -> None:
    save_file({"first_stage_model.x": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"holds no LoRA that is known here, but first_stage"):
        inspect_lora.inspect(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"\x80\x02" * 8)
    with pytest.raises(UserError, match="it is a Python pickle"):
        inspect_lora.inspect(tmp_path / "b.safetensors")
