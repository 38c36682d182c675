"""A base model is recognised, or refused by name, from configs and headers alone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_scripts.errors import UserError
from lora_scripts.models.header import read_header, read_metadata
from lora_scripts.models.signature import Marks, Signature, read_signature
from tests.models import ldm_facts as facts
from tests.models.ldm_facts import TOY, Shape, write_zeros

U, V, T = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
# The real names and the real text width, all else narrow: no file of these is large.
NARROW = replace(TOY, text=768, text_layers=12, vocabulary=8)
SD1 = {f.ldm: f.shape for f in (*facts.unet_facts(NARROW), *facts.vae_facts(NARROW))} | {
    f.ldm: f.shape for f in facts.text_facts(NARROW)
}
CONV_IN, TO_K = f"{U}input_blocks.0.0.weight", ".1.transformer_blocks.0.attn2.to_k.weight"


def _without(prefix: str) -> dict[str, Shape]:
    return {name: shape for name, shape in SD1.items() if not name.startswith(prefix)}


def _only(prefix: str, new: str = "") -> dict[str, Shape]:
    return {new + n.removeprefix(prefix): s for n, s in SD1.items() if n.startswith(prefix)}


SD2 = facts.weights(replace(facts.TOY_2, open_clip=1024, vocabulary=8))
SDXL = facts.weights(replace(facts.TOY_XL, text=768, open_clip=1280, vocabulary=8))


# A few tensors of each published file are enough to tell it; names and shapes are the real ones.
FILES: dict[str, tuple[dict[str, Shape], str]] = {
    "sd2 inpainting": (SD2 | {CONV_IN: (320, 9, 3, 3)}, "inpainting model (a UNet with 9 input"),
    "sd2 depth": (SD2 | {CONV_IN: (320, 5, 3, 3)}, "depth-to-image model (a UNet with 5 input"),
    "sd2 unclip": (
        SD2 | {f"{U}label_emb.0.0.weight": (1280, 2048)},
        "a Stable Diffusion unCLIP model",
    ),
    "x4 upscaler": (SD2 | {CONV_IN: (256, 7, 3, 3)}, "variant (a UNet without 4 input channels)"),
    "sdxl inpainting": (SDXL | {CONV_IN: (320, 9, 3, 3)}, "inpainting model (a UNet with 9 input"),
    "playground 2.5": (SDXL | {"edm_mean": (1, 4, 1, 1)}, "EDM's noise schedule (Playground 2.5"),
    "cosxl": (SDXL | {"edm_vpred.sigma_max": ()}, "EDM's noise schedule (Playground 2.5, CosXL)"),
    "inpainting": (SD1 | {CONV_IN: (320, 9, 3, 3)}, "inpainting model (a UNet with 9 input"),
    "pix2pix": (SD1 | {CONV_IN: (320, 8, 3, 3)}, "instruct-pix2pix model (a UNet with 8 input"),
    "7 channels": (SD1 | {CONV_IN: (256, 7, 3, 3)}, "variant (a UNet without 4 input channels)"),
    "refiner": (
        {
            CONV_IN: (384, 4, 3, 3),
            f"{U}input_blocks.4{TO_K}": (768, 1280),
            f"{U}label_emb.0.0.weight": (1536, 2560),
            "conditioner.embedders.0.model.ln_final.weight": (1280,),
        },
        "a Stable Diffusion XL refiner",
    ),
    "sd3": ({f"{U}joint_blocks.0.x_block.attn.qkv.weight": (9, 3)}, "a Stable Diffusion 3 model"),
    "flux": ({"double_blocks.0.img_attn.qkv.weight": (9, 3)}, "a FLUX model"),
    "kohya lora": (
        {"lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": (8, 4)},
        "a LoRA, n",
    ),
    "diffusers lora": ({"unet.mid_block.attentions.0.proj_in.lora_A.weight": (4, 8)}, "a LoRA, n"),
    "vae": (_only(V), "a VAE alone"),
    "vae of a checkpoint": (_only(V, V), "a VAE alone"),
    "controlnet": ({"control_model.input_hint_block.0.weight": (16, 3, 3, 3)}, "a ControlNet"),
    "ema only": ({facts.ema_name(n): s for n, s in _only(U, U).items()}, "only EMA copies"),
    "bare unet": (_only(U), "a UNet alone"),
    "diffusers unet": ({"down_blocks.0.resnets.0.conv1.weight": (8, 8, 3, 3)}, "a UNet alone"),
    "clip": (_only(T), "a text encoder alone"),
    "embedding": ({"emb_params": (4, 768)}, "a textual-inversion embedding"),
    "llm": ({"model.layers.0.self_attn.q_proj.weight": (8, 8)}, "`task_type: text-generation`"),
    "unknown": ({"backbone.0.weight": (8, 8)}, "unknown kind (it holds 1 tensors: backbone.0.w"),
    "no tensors": ({}, "unknown kind (it holds 0 tensors: no tensors at all"),
    "no text encoder": (_without(T), "no text encoder (nothing under cond_stage_model.transfo"),
    "no vae": (_without(V), "no VAE (nothing under first_stage_model.*)"),
    "sd2, no text encoder": (
        {n: shape for n, shape in SD2.items() if not n.startswith("cond_")},
        "this SD 2.x file holds no text encoder (nothing under cond_stage_model.model.*)",
    ),
    "sdxl, one text encoder": (
        {n: shape for n, shape in SDXL.items() if ".embedders.1." not in n},
        "this SDXL file holds no second text encoder (nothing under conditioner.embedders.1.mo",
    ),
    "sdxl, none": (
        {n: shape for n, shape in SDXL.items() if not n.startswith(("cond", V))},
        "no VAE (nothing under first_stage_model.*) and no text encoder (nothing under conditio",
    ),
    "unet of a checkpoint": (_only(U, U), "no text encoder (nothing under cond_stage_model.tr"),
}


def _refusal(path: Path) -> str:
    with pytest.raises(UserError) as error:
        read_signature(path)
    (problem,) = error.value.problems
    assert problem.where.startswith(str(path))
    return problem.what


def test_the_real_file_is_recognised(tmp_path: Path) -> None:
    path = write_zeros(tmp_path / "v1-5-pruned.safetensors", facts.whole_file(NARROW))
    assert read_signature(path) == Signature(path, "sd1", "ldm", 768, ema=688)


def test_real_sd2_and_sdxl_files_are_recognised(tmp_path: Path) -> None:
    second = write_zeros(tmp_path / "v2-1.safetensors", SD2)
    assert read_signature(second) == Signature(second, "sd2", "ldm", 1024)
    xl = write_zeros(tmp_path / "xl.safetensors", SDXL)
    assert read_signature(xl) == Signature(xl, "sdxl", "ldm", 2048)


V_PRED, ZTSNR = {"v_pred": (0,)}, {"ztsnr": (0,)}


@pytest.mark.parametrize(
    ("tensors", "metadata", "marks"),
    [
        ({}, {}, Marks()),
        ({}, {"modelspec.architecture": "stable-diffusion-xl-v1-base"}, Marks()),
        (V_PRED | ZTSNR, {}, Marks("v_prediction", True, "the file's tensor v_pred")),
        (V_PRED, {}, Marks("v_prediction", None, "the file's tensor v_pred")),
        (ZTSNR, {}, Marks(None, True, "the file's tensor ztsnr")),
        (
            {},
            {"modelspec.prediction_type": "epsilon"},
            Marks("epsilon", None, "modelspec.prediction_type in the file's header"),
        ),
        (
            {},
            {"modelspec.predict_key": "v"},
            Marks("v_prediction", None, "modelspec.predict_key in the file's header"),
        ),
        (
            {},
            {"modelspec.architecture": "stable-diffusion-v2-768-v"},
            Marks("v_prediction", None, "modelspec.architecture in the file's header"),
        ),
        (
            V_PRED,
            {"modelspec.prediction_type": "epsilon"},
            Marks("v_prediction", None, "the file's tensor v_pred"),
        ),
        ({}, {"modelspec.prediction_type": "sample"}, Marks()),
    ],
)
def test_what_a_file_says_of_its_predictions(
    tmp_path: Path, tensors: dict[str, Shape], metadata: dict[str, str], marks: Marks
) -> None:
    path = write_zeros(tmp_path / "x.safetensors", SDXL | tensors, metadata=metadata)
    assert read_signature(path).marks == marks
    assert read_metadata(path) == metadata


@pytest.mark.parametrize("kind", FILES)
def test_other_files_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    shapes, said = FILES[kind]
    what = _refusal(write_zeros(tmp_path / "模型.safetensors", shapes))
    assert said in what
    takes = "This version trains on Stable Diffusion 1.x, 2.x and XL: a diffusers folder"
    assert takes in what or "name the full checkpoint" in what


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt", ".pth", ".CKPT"])
def test_pickles_are_never_opened(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"PK\x03\x04")
    what = _refusal(path)
    assert "pickle" in what and "run any code" in what
    assert "StableDiffusionPipeline.from_single_file" in what and "save_pretrained" in what


def _file(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


GOOD = json.dumps({"a": {"dtype": "F16", "shape": [2, 2], "data_offsets": [0, 8]}}).encode()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the file is empty"),
        (b"abc", "this is no safetensors file"),
        (b"PK\x03\x04" + b"\0" * 100, "a zip archive, as PyTorch's pickles are"),
        (b"\x80\x02}q\x00." + b"\0" * 100, "a Python pickle"),
        (b"GGUF" + b"\0" * 100, "a GGUF file"),
        (b"<!DOCTYPE html><html>" + b" " * 100, "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (
            (2**63).to_bytes(8, "little") + b"{}" * 50,
            "promise a header of 9,223,372,036,854,775,808",
        ),
        (_file(b"{not json"), "no safetensors file, or a damaged one"),
        (_file(b"[1, 2]"), "no safetensors file, or a damaged one"),
        (_file(b'{"a": {"dtype": "F16"}}'), "no safetensors file, or a damaged one"),
        (_file(b"[" * 100_000), "no safetensors file, or a damaged one"),
        (_file(b"\xff\xfe{}"), "no safetensors file, or a damaged one"),
        (_file(GOOD, b"\0" * 7), "its header describes 80 bytes, there are 79"),
        (_file(GOOD, b"\0" * 9), "its header describes 80 bytes, there are 81"),
    ],
)
def test_damaged_files(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    assert said in _refusal(path)


def test_an_oversize_header_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(200_000_000)
    assert "promise a header of 100,000,001 bytes" in _refusal(path)


def test_a_whole_header(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(_file(GOOD, b"\0" * 8))
    (name, info), *_ = read_header(path).items()
    assert (name, info.dtype, info.shape) == ("a", "F16", (2, 2))


def test_nothing_there(tmp_path: Path) -> None:
    assert "nothing is there" in _refusal(tmp_path / "absent.safetensors")


# --- folders --------------------------------------------------------------------------------------

UNET_CONFIG = {"in_channels": 4, "cross_attention_dim": 768}


PARTS = ("unet", "vae", "text_encoder")
XL: dict[str, Any] = {"cross_attention_dim": 2048, "addition_embed_type": "text_time"}


def _folder(path: Path, name: str = "StableDiffusionPipeline", **unet: Any) -> Path:
    """A diffusers folder with the real layout and nearly no weights."""
    for part in (*PARTS, "tokenizer", "scheduler"):
        (path / part).mkdir(parents=True)
    _weights(path)
    if name.startswith("StableDiffusionXL"):
        (path / "text_encoder_2").mkdir()
        (path / "tokenizer_2").mkdir()
        _weights(path, parts=("text_encoder_2",))
    _json(path / "model_index.json", {"_class_name": name})
    _json(path / "unet" / "config.json", UNET_CONFIG | unet)
    return path


def _weights(path: Path, suffix: str = ".safetensors", parts: tuple[str, ...] = ()) -> None:
    for part in parts or PARTS:
        stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
        write_zeros(path / part / f"{stem}{suffix}", {"weight": (1,)})


def _json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def test_a_diffusers_folder(tmp_path: Path) -> None:
    path = _folder(tmp_path / "模型")
    assert read_signature(path) == Signature(path, "sd1", "diffusers", 768)


def test_sd2_and_sdxl_folders(tmp_path: Path) -> None:
    second = _folder(tmp_path / "2", cross_attention_dim=1024, use_linear_projection=True)
    assert read_signature(second) == Signature(second, "sd2", "diffusers", 1024)
    narrow = _folder(tmp_path / "toy 2", cross_attention_dim=32, use_linear_projection=True)
    assert read_signature(narrow).family == "sd2"
    xl = _folder(tmp_path / "xl", "StableDiffusionXLPipeline", **XL)
    assert read_signature(xl) == Signature(xl, "sdxl", "diffusers", 2048)
    img2img = _folder(tmp_path / "img2img", "StableDiffusionXLImg2ImgPipeline", **XL)
    assert read_signature(img2img).family == "sdxl"


def test_an_sdxl_folder_needs_both_text_encoders(tmp_path: Path) -> None:
    xl = _folder(tmp_path / "xl", "StableDiffusionXLPipeline", **XL)
    (xl / "text_encoder_2" / "model.safetensors").rename(
        xl / "text_encoder_2" / "other.safetensors"
    )
    assert "there is no .safetensors weights" in _refusal(xl)
    for file in (xl / "text_encoder_2").iterdir():
        file.unlink()
    (xl / "text_encoder_2").rmdir()
    (xl / "tokenizer_2").rmdir()
    assert "it lacks text_encoder_2, tokenizer_2; fetch it whole" in _refusal(xl)


def test_variants_of_weights(tmp_path: Path) -> None:
    path = _folder(tmp_path / "model")
    for file in path.glob("*/*model.safetensors"):
        file.unlink()
    assert "no .safetensors weights" in _refusal(path)
    _weights(path, ".fp16.safetensors")
    assert read_signature(path).variant == "fp16"
    _weights(path, ".safetensors", ("vae", "text_encoder"))
    assert read_signature(path).variant == "fp16"
    _weights(path, "-00001-of-00002.safetensors", ("unet",))
    assert read_signature(path).variant is None


def test_a_folder_of_pickles(tmp_path: Path) -> None:
    path = _folder(tmp_path / "model")
    (path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    (path / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"PK\x03\x04")
    assert "only diffusion_pytorch_model.bin, a Python pickle" in _refusal(path)


def test_a_folder_with_a_download_cut_short(tmp_path: Path) -> None:
    path = _folder(tmp_path / "model")
    file = path / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "cut short" in _refusal(path)


@pytest.mark.parametrize(
    ("name", "unet", "said"),
    [
        ("StableDiffusionDepth2ImgPipeline", {"in_channels": 5}, "depth-to-image model"),
        ("StableDiffusionXLInpaintPipeline", {"in_channels": 9}, "inpainting model"),
        ("StableDiffusionPipeline", {"in_channels": 9}, "inpainting model"),
        ("StableDiffusionPipeline", {"in_channels": 8}, "instruct-pix2pix model"),
        ("StableDiffusionInpaintPipeline", {"in_channels": 9}, "inpainting model"),
        ("StableDiffusionInstructPix2PixPipeline", {"in_channels": 8}, "instruct-pix2pix model"),
        ("StableDiffusionXLImg2ImgPipeline", {"cross_attention_dim": 1280}, "XL refiner"),
        ("StableDiffusion3Pipeline", {}, "a Stable Diffusion 3 model"),
        ("FluxPipeline", {}, "a FLUX model"),
        ("KandinskyV22Pipeline", {}, "a diffusers folder of the class KandinskyV22Pipeline"),
    ],
)
def test_other_pipelines_are_refused(
    tmp_path: Path, name: str, unet: dict[str, Any], said: str
) -> None:
    what = _refusal(_folder(tmp_path / "model", name, **unet))
    assert said in what and "This version trains on Stable Diffusion 1.x, 2.x and XL" in what


def test_an_incomplete_folder(tmp_path: Path) -> None:
    path = _folder(tmp_path / "model")
    (path / "tokenizer").rmdir()
    assert "it lacks tokenizer" in _refusal(path)
    (path / "unet" / "config.json").write_text("{", encoding="utf-8")
    assert "cannot be read as JSON" in _refusal(path)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"config.json": {"architectures": ["LlamaForCausalLM"]}}, r"language model.*LlamaForCau"),
        ({"config.json": {"model_type": "qwen3"}}, r"qwen3\); for it set `task_type: text-gener"),
        ({"config.json": {"_class_name": "AutoencoderKL"}}, r"one part of a model \(AutoencoderKL"),
        ({"adapter_config.json": {"base_model_name_or_path": "sd15"}}, "PEFT adapter.*'sd15'"),
        ({"v1-5.safetensors": {}}, r"no model_index\.json; to use a file in it, .*v1-5\.safetens"),
        ({}, r"no model_index\.json\. This version trains on"),
    ],
)
def test_other_folders_are_refused(tmp_path: Path, files: dict[str, object], said: str) -> None:
    for name, content in files.items():
        _json(tmp_path / name, content)
    assert re.search(said, _refusal(tmp_path))


def test_no_heavy_library_is_needed() -> None:
    code = (
        "import sys, lora_scripts.models.signature; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'diffusers', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
