"""LoRA files: read by their real reader, equal outputs, the names the WebUIs derive, metadata."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_scripts.errors import WorkError
from lora_scripts.export import files, keys
from lora_scripts.models import lora
from lora_scripts.models import unet as unet_layers
from lora_scripts.models.sd import StableDiffusion
from tests import runs
from tests.export import webui_facts


def header(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as stored:
        return dict(stored.metadata())


def diffusers_output(base: Path, folder: Path | None) -> torch.Tensor:
    """The UNet's output in float32, by diffusers alone, with the LoRA of a folder."""
    pipeline = StableDiffusionPipeline.from_pretrained(str(base), safety_checker=None)
    if folder is not None:
        pipeline.load_lora_weights(str(folder))
    source = torch.Generator().manual_seed(1)
    noisy_BCHW = torch.randn(2, 4, 8, 8, generator=source)
    embedding_BSD = torch.randn(2, 77, 32, generator=source)
    with torch.no_grad():
        return pipeline.unet(noisy_BCHW, torch.tensor([10, 900]), embedding_BSD).sample


@pytest.mark.parametrize(
    ("rank", "alpha", "dtype"), [(4, 4, "fp32"), (4, 8, "fp32"), (8, 1.3, "fp32"), (4, 8, "fp16")]
)
def test_diffusers_reads_the_run_as_it_was_trained(
    sd_folder: Path, pictures: Path, tmp_path: Path, rank: int, alpha: float, dtype: str
) -> None:
    """Against W + (alpha / rank) up @ down, merged by hand into the base's weights."""
    _, output = runs.run(
        sd_folder, pictures, tmp_path,
        lora_rank=rank, lora_alpha=alpha, save_dtype=dtype, epochs=1, learning_rate=0.05,
    )  # fmt: skip
    stored = load_file(output / "pytorch_lora_weights.safetensors")
    unet = UNet2DConditionModel.from_pretrained(str(sd_folder / "unet"))
    merged = 0
    for path, module in unet.named_modules():
        name = "lora_unet_" + path.replace(".", "_")
        if f"{name}.alpha" in stored:
            down, up = (stored[f"{name}.lora_{side}.weight"].float() for side in ("down", "up"))
            assert stored[f"{name}.alpha"].item() == pytest.approx(alpha)
            module.weight.data += alpha / rank * up @ down
            merged += 1
    assert merged == len(stored) // 3 > 0
    unet.save_pretrained(str(tmp_path / "merged" / "unet"))
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        (tmp_path / "merged" / part).symlink_to(sd_folder / part)
    (tmp_path / "merged" / "model_index.json").write_bytes(
        (sd_folder / "model_index.json").read_bytes()
    )
    expected = diffusers_output(tmp_path / "merged", None)
    found = diffusers_output(sd_folder, output)
    base = diffusers_output(sd_folder, None)
    assert (expected - base).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_both_names_hold_the_same_bytes(sd_folder: Path, pictures: Path, tmp_path: Path) -> None:
    _, output = runs.run(sd_folder, pictures, tmp_path, epochs=1)
    one = (output / "pytorch_lora_weights.safetensors").read_bytes()
    assert one == (output / "toy.safetensors").read_bytes()


def test_a_checkpoints_ready_file_is_in_the_final_layout(
    sd_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    _, output = runs.run(sd_folder, pictures, tmp_path, epochs=2, save_steps=3, save_dtype="fp32")
    ready = load_file(output / "checkpoints/step-000006/toy-000006.safetensors")
    final = load_file(output / "toy.safetensors")
    assert all(torch.equal(ready[key], final[key]) for key in final)
    metadata = header(output / "checkpoints/step-000003/toy-000003.safetensors")
    assert metadata["ss_output_name"] == "toy-000003"
    assert metadata["ss_steps"] == "3"


def test_metadata_is_what_the_webuis_show(sd_folder: Path, pictures: Path, tmp_path: Path) -> None:
    _, output = runs.run(sd_folder, pictures, tmp_path, lora_alpha=2, trigger_word="zwx")
    metadata = header(output / "toy.safetensors")
    assert metadata["ss_output_name"] == "toy"
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert metadata["ss_v2"] == "False"
    assert metadata["ss_network_module"] == "networks.lora"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "2.0")
    assert int(metadata["ss_training_started_at"]) > 1_700_000_000
    tags = json.loads(metadata["ss_tag_frequency"])
    assert tags == {
        "squares": {"zwx": 6, "a square": 6, **{f"number {number}": 1 for number in range(6)}}
    }
    buckets = json.loads(metadata["ss_bucket_info"])["buckets"]
    assert buckets == {"0": {"resolution": [64, 64], "count": 6}}


def test_a_file_that_differs_from_what_was_written_is_refused(tmp_path: Path) -> None:
    layer = lora.AdaptedLayer("a.to_q", torch.randn(2, 4), torch.randn(3, 2), alpha=2.0)
    expected = keys.webui({"unet": [layer]}, lambda component, path: path, torch.float32)
    path = tmp_path / "x.safetensors"
    save_file(expected, path)
    files.verify(path, expected)
    for name, change in {
        "a.to_q.alpha": torch.tensor(1.0),
        "a.to_q.lora_up.weight": expected["a.to_q.lora_up.weight"] * 1.001,
        "a.to_q.lora_down.weight": expected["a.to_q.lora_down.weight"].half(),
    }.items():
        save_file({**expected, name: change}, path)
        with pytest.raises(WorkError, match=f"{name} differs"):
            files.verify(path, expected)
    save_file({"a.to_q.alpha": expected["a.to_q.alpha"]}, path)
    with pytest.raises(WorkError, match="is missing"):
        files.verify(path, expected)


def test_values_that_do_not_fit_the_precision_are_refused(tmp_path: Path) -> None:
    layer = lora.AdaptedLayer("a", torch.full((1, 2), 1e6), torch.ones(2, 1), alpha=1.0)
    with pytest.raises(WorkError, match="not finite"):
        files.write_lora(
            tmp_path / "x.safetensors", {"unet": [layer]}, lambda c, p: p, torch.float16, {}
        )


def test_the_names_of_a_real_sd15_file_are_those_the_webuis_derive() -> None:
    """The real UNet's module tree, on the meta device: attention gives exactly these 128 names."""
    from lora_scripts.models.packaged import packaged_config

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(packaged_config("sd1", "unet"))
    lora.attach(
        unet,
        unet_layers.targets({"unet": unet}, "attention")["unet"],
        rank=4,
        alpha=4,
        dropout=0,
        seed=0,
    )
    paths = [
        path
        for path, module in unet.named_modules()
        if hasattr(module, "lora_A") and "default" in module.lora_A
    ]
    names = {StableDiffusion.webui_name(None, "unet", path) for path in paths}  # type: ignore[arg-type]
    assert names == webui_facts.unet_attention_modules()
    assert len(names) == 128


def test_text_encoder_names_get_their_text_model_level_back() -> None:
    """transformers dropped it from CLIPTextModel; the WebUIs derive their names with it."""
    names = {
        StableDiffusion.webui_name(None, "text_encoder", f"encoder.layers.{n}.self_attn.{p}")  # type: ignore[arg-type]
        for n in range(12)
        for p in ("q_proj", "k_proj", "v_proj", "out_proj")
    }
    assert names <= webui_facts.text_encoder_modules()
    assert "lora_te_text_model_encoder_layers_11_self_attn_q_proj" in names
