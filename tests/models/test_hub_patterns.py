"""What is fetched of a repository of the hub: the parts once, and nothing else."""

from __future__ import annotations

from huggingface_hub.utils import filter_repo_objects

from lora_scripts.models import hub

TEXT = ["config.json", "flax_model.msgpack", "model.fp16.safetensors", "model.onnx",
        "model.onnx_data", "model.safetensors", "openvino_model.bin", "openvino_model.xml",
        "pytorch_model.bin"]  # fmt: skip
DENOISER = ["config.json", "diffusion_flax_model.msgpack", "diffusion_pytorch_model.bin",
            "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors",
            "diffusion_pytorch_model.non_ema.safetensors", "model.onnx", "model.onnx_data",
            "openvino_model.bin", "openvino_model.xml"]  # fmt: skip
TOKENIZER = ["merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json"]


def _in(folder: str, names: list[str]) -> list[str]:
    return [f"{folder}/{name}" for name in names]


# As stabilityai/stable-diffusion-xl-base-1.0 lies on the hub, with some that SD 1.x and 2.x have.
SDXL = [
    ".gitattributes", "LICENSE.md", "README.md", "pipeline.png", "model_index.json",
    "sd_xl_base_1.0.safetensors", "sd_xl_base_1.0_0.9vae.safetensors",
    "sd_xl_offset_example-lora_1.0.safetensors", "scheduler/scheduler_config.json",
    *_in("text_encoder", TEXT), *_in("text_encoder_2", TEXT), *_in("tokenizer", TOKENIZER),
    *_in("tokenizer_2", TOKENIZER), *_in("unet", DENOISER), *_in("vae", DENOISER),
    *_in("vae_1_0", DENOISER), *_in("vae_decoder", TEXT), *_in("vae_encoder", TEXT),
    *_in("safety_checker", TEXT), "feature_extractor/preprocessor_config.json",
]  # fmt: skip
VAE = [".gitattributes", "README.md", "config.json", "diffusion_pytorch_model.bin",
       "diffusion_pytorch_model.safetensors", "sdxl_vae.safetensors", "images/a.png"]  # fmt: skip


def _fetched(files: list[str], wanted: tuple[str, ...]) -> set[str]:
    return set(filter_repo_objects(files, allow_patterns=wanted, ignore_patterns=hub.UNWANTED))


def test_of_a_pipeline_each_part_once() -> None:
    weights = "diffusion_pytorch_model.safetensors"
    assert _fetched(SDXL, hub.WANTED) == {
        "model_index.json", "scheduler/scheduler_config.json",
        *_in("text_encoder", ["config.json", "model.safetensors"]),
        *_in("text_encoder_2", ["config.json", "model.safetensors"]),
        *_in("tokenizer", TOKENIZER), *_in("tokenizer_2", TOKENIZER),
        *_in("unet", ["config.json", weights]), *_in("vae", ["config.json", weights]),
    }  # fmt: skip


def test_of_a_vae_its_config_and_weights() -> None:
    weights = "diffusion_pytorch_model.safetensors"
    assert _fetched(VAE, hub.WANTED_OF_VAE) == {"config.json", weights}
    assert _fetched(SDXL, hub.WANTED_OF_VAE) == {
        "model_index.json", "vae/config.json", f"vae/{weights}",
    }  # fmt: skip
