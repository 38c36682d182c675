"""A checkpoint in the original layout, written by the tests' own map, loads to equal tensors."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_scripts.errors import UserError
from lora_scripts.models.header import TensorInfo, read_header
from lora_scripts.models.sd1_configs import (
    clip_tokenizer,
    packaged_config,
    text_config,
    unet_config,
    vae_config,
)
from lora_scripts.models.sd_single_file import load_single_file
from lora_scripts.models.signature import read_signature
from tests.models import ldm_facts as facts
from tests.models.ldm_facts import REAL, TOY
from tests.models.ldm_toy import Modules, ldm_tensors, schedule, toy_modules


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.fixture(scope="module")
def modules() -> Modules:
    return toy_modules()


@pytest.fixture(scope="module")
def full_file(modules: Modules, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ldm") / "toy-pruned.safetensors"
    save_file(ldm_tensors(modules), path)
    return path


@pytest.fixture(scope="module")
def tensors(full_file: Path) -> dict[str, Tensor]:
    return load_file(full_file)


@pytest.fixture
def write(tensors: dict[str, Tensor], tmp_path: Path) -> Callable[..., Path]:
    """The toy checkpoint without EMA copies, with changes; None takes a tensor away."""

    def written(**changes: Tensor | None) -> Path:
        changed = {k: v for k, v in tensors.items() if not k.startswith("model_ema.")} | changes
        path = tmp_path / "changed.safetensors"
        save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, path)
        return path

    return written


def test_the_facts_are_those_of_the_real_file() -> None:
    counts = [len(f(REAL)) for f in (facts.unet_facts, facts.vae_facts, facts.text_facts)]
    assert counts == [facts.UNET_COUNT, facts.VAE_COUNT, facts.TEXT_COUNT - 1] == [686, 248, 196]
    whole = facts.whole_file(REAL)
    ema = [name for name in whole if name.startswith("model_ema.")]
    assert (len(ema), len(whole)) == (facts.EMA_COUNT, 1831) == (688, 1831)
    assert facts.digest(whole) == facts.REAL_DIGEST
    assert set(facts.whole_file(TOY)) < set(whole)


def test_every_tensor_and_every_output_is_equal(modules: Modules, full_file: Path) -> None:
    parts = load_single_file(full_file, torch.float32)
    for part, module in modules.items():
        loaded = parts[part].state_dict()
        assert list(loaded) == list(module.state_dict())
        for name, tensor in module.state_dict().items():
            assert torch.equal(loaded[name], tensor), name
        assert not parts[part].training
    assert not any(t.is_meta for part in modules for t in parts[part].buffers())

    ids = parts["tokenizer"](["a cat"], padding="max_length", return_tensors="pt").input_ids
    states = modules["text_encoder"](ids).last_hidden_state
    assert torch.equal(parts["text_encoder"](ids).last_hidden_state, states)
    latents, pixels = torch.randn(1, 4, 8, 8), torch.rand(1, 3, 16, 16)
    time = torch.tensor([500])
    predicted = modules["unet"](latents, time, states).sample
    assert torch.equal(parts["unet"](latents, time, states).sample, predicted)
    assert torch.equal(parts["vae"].encode(pixels)[0].mean, modules["vae"].encode(pixels)[0].mean)
    assert torch.equal(parts["vae"].decode(latents)[0], modules["vae"].decode(latents)[0])


def test_an_fp16_file_and_low_precisions(modules: Modules, tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    save_file(ldm_tensors(modules, torch.float16), path)
    parts = load_single_file(path, torch.bfloat16)
    for part, module in modules.items():
        dtype = torch.bfloat16 if part == "unet" else torch.float32
        for name, tensor in module.state_dict().items():
            assert torch.equal(parts[part].state_dict()[name], tensor.half().to(dtype)), name
    assert parts["unet"].dtype == torch.bfloat16


def test_nothing_loaded_refers_to_the_file(write: Callable[..., Path]) -> None:
    path = write()
    weight = load_single_file(path, torch.float32)["unet"].conv_in.weight
    before = weight.clone()
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert torch.equal(weight, before)


def test_ema_copies_are_set_aside_and_counted(
    full_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert read_signature(full_file).ema == facts.EMA_COUNT
    with caplog.at_level(logging.INFO):
        load_single_file(full_file, torch.float32)
    assert "688 tensors set aside (EMA copies)" in caplog.text
    assert "12 tensors set aside (noise schedule)" in caplog.text
    assert "1 tensors set aside (position ids)" in caplog.text


def test_text_encoder_names_of_old_merges(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    old = {name.replace(".text_model.", "."): tensor for name, tensor in tensors.items()}
    save_file(old, tmp_path / "merge.safetensors")
    parts = load_single_file(tmp_path / "merge.safetensors", torch.float32)
    expected = tensors["cond_stage_model.transformer.text_model.final_layer_norm.weight"]
    assert torch.equal(parts["text_encoder"].final_layer_norm.weight, expected)


def test_further_tensors_that_files_are_known_to_carry(write: Callable[..., Path]) -> None:
    extra = {
        "logvar": torch.zeros(1000),
        "cond_stage_model.logit_scale": torch.tensor(4.6),
        "cond_stage_model.text_projection": torch.zeros(64, 64),
        "first_stage_model.loss.logvar": torch.tensor(0.0),
        "first_stage_model.model_ema.decay": torch.tensor(0.9999),
    }
    load_single_file(write(**extra), torch.float32)


UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT = "cond_stage_model.transformer.text_model."


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"control_model.zero.weight": torch.zeros(1)},
            r"no SD 1.x model has: control_model\.zero",
        ),
        ({"v_pred": torch.zeros(0)}, "no SD 1.x model has: v_pred"),
        ({f"{UNET}out.3.weight": torch.zeros(1)}, r"UNet2D.* 1 tensors unknown: .*out\.3\.weight"),
        ({f"{UNET}output_blocks.11.1.proj_out.bias": None}, r"missing.*attentions\.2\.proj_out"),
        ({f"{UNET}input_blocks.1.0.in_layers.2.bias": torch.zeros(3)}, r"conv1\.bias \(3,\) inst"),
        ({f"{UNET}input_blocks.1.1.norm.weight": None}, "levels are not built like SD 1.x's"),
        ({f"{UNET}input_blocks.1.0.out_layers.3.weight": None}, r"tensor .*out_layers\.3.*missing"),
        ({f"{VAE}decoder.mid.attn_1.q.weight": None}, r"AutoencoderKL.*missing.*to_q\.weight"),
        ({f"{VAE}quant_conv.scale": torch.zeros(1)}, r"unknown: first_stage_model\.quant_conv\.sc"),
        ({f"{VAE}post_quant_conv.weight": None}, r"post_quant_conv\.weight is missing"),
        ({f"{TEXT}embeddings.token_embedding.weight": torch.zeros(500, 64)}, "knows 500 tokens"),
        ({f"{TEXT}encoder.layers.1.mlp.fc2.bias": None}, r"CLIPTextModel.*missing.*1\.mlp\.fc2"),
        ({f"{TEXT}final_layer_norm.bias": torch.zeros(64).int()}, "type I32, not floats"),
        ({"alphas_cumprod": torch.linspace(1, 0, 1000)}, "noise schedule .* is not SD 1.x's"),
    ],
)
def test_what_does_not_fit_is_named(
    write: Callable[..., Path], changes: dict[str, Tensor | None], said: str
) -> None:
    path = write(**changes)
    with pytest.raises(UserError, match=said) as error:
        load_single_file(path, torch.float32)
    assert error.value.problems[0].where == str(path)


def _header(shapes: dict[str, facts.Shape]) -> dict[str, TensorInfo]:
    return {name: TensorInfo("F32", shape) for name, shape in shapes.items()}


def test_the_real_shapes_give_the_published_configs() -> None:
    path, header = Path("real.safetensors"), _header(facts.whole_file(REAL))
    assert unet_config(path, header) == packaged_config("unet")
    assert vae_config(path, header) == packaged_config("vae")
    assert text_config(path, header) == packaged_config("text_encoder")


def test_heads_of_the_text_encoder() -> None:
    heads = {}
    for width in (32, 64, 96, 128, 768):
        shapes = {f.ldm: f.shape for f in facts.text_facts(REAL)}
        shapes[f"{TEXT}embeddings.token_embedding.weight"] = (49408, width)
        config = text_config(Path("x.safetensors"), _header(shapes))
        heads[width] = config["num_attention_heads"]
    assert heads == {32: 1, 64: 1, 96: 1, 128: 2, 768: 12}


def test_scheduler_is_that_of_sd15(full_file: Path) -> None:
    scheduler = load_single_file(full_file, torch.float32)["scheduler"]
    config = scheduler.config
    assert (config.beta_start, config.beta_end, config.beta_schedule) == (
        0.00085,
        0.012,
        "scaled_linear",
    )
    assert (config.num_train_timesteps, config.steps_offset) == (1000, 1)
    assert (config.clip_sample, config.set_alpha_to_one) == (False, False)
    assert config.prediction_type == "epsilon"
    # The first and the last value of the real file's alphas_cumprod.
    assert scheduler.alphas_cumprod[0].item() == pytest.approx(0.99915, abs=1e-5)
    assert scheduler.alphas_cumprod[-1].item() == pytest.approx(0.00466, abs=1e-5)


# Ids as published with CLIP and in the tests of other programs (MLImgSynth, Bumblebee), and as the
# SimpleTokenizer of open_clip_torch 3.3.0 gave them (2026-11) for digits, Chinese, emoji, case.
IDS = {
    "a photo of a cat": [320, 1125, 539, 320, 2368],
    "a photo of a dog": [320, 1125, 539, 320, 1929],
    "A Photo of a CAT": [320, 1125, 539, 320, 2368],
    "a painting of a cat": [320, 3086, 539, 320, 2368],
    "bozuman": [647, 4091, 786],
    "   a   dog\t\tjumping\r\n": [320, 1929, 11476],
    "an illustration": [550, 6052],
    'a sign saying "Here lies Cesar"': [320, 2292, 4455, 257, 763, 3205, 28603, 257],
    "a sign saying 'Here lies Cesar'": [320, 2292, 4455, 262, 763, 3205, 28603, 262],
    "2025": [273, 271, 273, 276],
    "cyberpunk cityscape with neon lights": [36896, 40808, 593, 13919, 3073],
    "<lora:style_v1>": [283, 2179, 320, 281, 1844, 318, 341, 272, 285],
    "a photo of 猫": [320, 1125, 539, 163, 234, 360],
    "🐉🀄": [2074, 231, 558, 222, 482],
    "ÀÉÎ ŞİŁ": [36149, 3459, 127, 362, 21254, 328, 16384, 129, 480],
    "ＡＢＣ": [171, 121, 223, 171, 121, 224, 171, 121, 481],
    "A'veA'llA's": [320, 1200, 320, 1342, 320, 568],
    "": [],
    "  \t  \n": [],
    "corazón": [851, 854, 13926],
    "cat---dog-—-rabbit": [2368, 11079, 1929, 12, 6718, 268, 10274],
    "まあ、お待ちなさい。": [
        *(4813, 122, 4813, 480, 45262, 4813, 232, 161, 122, 227),
        *(4813, 94, 29104, 4813, 243, 38850, 38000),
    ],
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return clip_tokenizer()


@pytest.mark.parametrize("text", IDS)
def test_token_ids(tokenizer: Any, text: str) -> None:
    assert tokenizer(text).input_ids == [49406, *IDS[text], 49407]


def test_tokens_of_bytes_that_no_merge_covers(tokenizer: Any) -> None:
    """Every byte has a token, so nothing is unknown: the text comes back whole."""
    for text in ("赛博朋克城市", "🐉🀄", "\x7f\u0378"):
        ids = tokenizer(text).input_ids
        assert 49407 not in ids[1:-1] and ids[0] == 49406
        assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text


def test_tokenizer_limits_and_padding(tokenizer: Any) -> None:
    assert len(tokenizer) == 49408 and tokenizer.model_max_length == 77
    assert [tokenizer.convert_tokens_to_ids(t) for t in ("!", "!</w>", "i", "in")] == [
        0,
        256,
        72,
        512,
    ]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        49406,
        49407,
        49407,
    )
    long = tokenizer("cat " * 100, truncation=True).input_ids
    assert len(long) == 77 and long[-1] == 49407
    short = tokenizer("cat", padding="max_length").input_ids
    assert short == [49406, 2368, *[49407] * 75]


def test_the_parts_make_a_pipeline_that_can_be_saved(full_file: Path, tmp_path: Path) -> None:
    parts = load_single_file(full_file, torch.float32)
    extra = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionPipeline(**parts, **extra).save_pretrained(tmp_path / "toy")
    signature = read_signature(tmp_path / "toy")
    assert (signature.layout, signature.cross_attention_dim) == ("diffusers", TOY.text)
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "toy")
    text = "a photo of 猫 <lora:style_v1>"
    assert again.tokenizer(text).input_ids == parts["tokenizer"](text).input_ids
    for name, tensor in parts["text_encoder"].state_dict().items():
        assert torch.equal(again.text_encoder.state_dict()[name], tensor)


@pytest.mark.slow
def test_the_real_file_at_real_size(tmp_path: Path) -> None:
    filled = {"alphas_cumprod": schedule()["alphas_cumprod"].half().numpy().tobytes()}
    path = tmp_path / "v1-5-pruned.safetensors"
    facts.write_zeros(path, facts.whole_file(REAL), filled)
    assert len(read_header(path)) == 1831
    parts = load_single_file(path, torch.float16, torch.float16)
    assert sum(p.numel() for p in parts["unet"].parameters()) == 859_520_964
    assert sum(p.numel() for p in parts["vae"].parameters()) == 83_653_863
    assert sum(p.numel() for p in parts["text_encoder"].parameters()) == 123_060_480
