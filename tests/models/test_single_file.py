"""A checkpoint in the original layout, written by the tests' own map, loads to equal tensors."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_scripts.device import Compute
from lora_scripts.errors import UserError
from lora_scripts.models import shapes, single_file
from lora_scripts.models.family import Options
from lora_scripts.models.header import TensorInfo, read_header
from lora_scripts.models.original_file import write_single_file
from lora_scripts.models.packaged import packaged_config
from lora_scripts.models.signature import read_signature
from lora_scripts.tasks import build
from tests.models import ldm_facts as facts
from tests.models.ldm_facts import REAL, REAL_2, REAL_XL, TOY, TOY_2, TOY_XL, Widths
from tests.models.ldm_toy import (
    Modules,
    ldm_tensors,
    read_parts,
    schedule,
    sd2_tensors,
    sdxl_tensors,
    toy_modules,
)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


def load(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    return read_parts(read_signature(path), dtype)


@pytest.fixture(scope="module")
def modules() -> Modules:
    return toy_modules()


@pytest.fixture(scope="module")
def modules_2() -> Modules:
    return toy_modules(TOY_2)


@pytest.fixture(scope="module")
def modules_xl() -> Modules:
    return toy_modules(TOY_XL)


@pytest.fixture(scope="module")
def full_file(modules: Modules, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ldm") / "toy-pruned.safetensors"
    save_file(ldm_tensors(modules), path)
    return path


@pytest.fixture(scope="module")
def file_2(modules_2: Modules, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ldm") / "toy-2-1.safetensors"
    save_file(sd2_tensors(modules_2), path)
    return path


@pytest.fixture(scope="module")
def file_xl(modules_xl: Modules, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ldm") / "toy-xl.safetensors"
    save_file(sdxl_tensors(modules_xl), path)
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
    second, xl = facts.published_2(), facts.published_xl()
    assert (len(second), facts.digest(second)) == (facts.COUNT_2, facts.DIGEST_2)
    assert (len(xl), facts.digest(xl)) == (facts.COUNT_XL, facts.DIGEST_XL)
    assert set(facts.weights(TOY_2)) < set(second) and set(facts.weights(TOY_XL)) < set(xl)


def test_every_tensor_and_every_output_is_equal(modules: Modules, full_file: Path) -> None:
    parts = load(full_file)
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


def test_sd2_every_tensor_and_output_is_equal(modules_2: Modules, file_2: Path) -> None:
    parts = load(file_2)
    _assert_equal(parts, modules_2)
    ids = parts["tokenizer"](["a cat"], padding="max_length", return_tensors="pt").input_ids
    assert ids[0].tolist() == [49406, 320, 2368, 49407, *[0] * 73]
    states = modules_2["text_encoder"](ids).last_hidden_state
    assert torch.equal(parts["text_encoder"](ids).last_hidden_state, states)
    latents, time = torch.randn(1, 4, 8, 8), torch.tensor([500])
    predicted = modules_2["unet"](latents, time, states).sample
    assert torch.equal(parts["unet"](latents, time, states).sample, predicted)
    assert parts["unet"].config.sample_size == 96 and parts["text_encoder"].config.pad_token_id == 0
    assert parts["scheduler"].config.prediction_type == "v_prediction"


def test_sdxl_every_tensor_and_output_is_equal(modules_xl: Modules, file_xl: Path) -> None:
    parts = load(file_xl)
    _assert_equal(parts, modules_xl)
    ids = [
        parts[name](["a cat"], padding="max_length", return_tensors="pt").input_ids
        for name in ("tokenizer", "tokenizer_2")
    ]
    assert [row[0, 4].item() for row in ids] == [49407, 0]
    made = parts["text_encoder_2"](ids[1], output_hidden_states=True)
    expected = modules_xl["text_encoder_2"](ids[1], output_hidden_states=True)
    assert torch.equal(made.text_embeds, expected.text_embeds)
    assert torch.equal(made.hidden_states[-2], expected.hidden_states[-2])
    first = modules_xl["text_encoder"](ids[0], output_hidden_states=True).hidden_states[-2]
    told = {
        "text_embeds": expected.text_embeds,
        "time_ids": torch.tensor([[1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]]),
    }
    states = torch.cat([first, expected.hidden_states[-2]], dim=-1)
    given = (torch.randn(1, 4, 8, 8), torch.tensor([500]), states)
    predicted = modules_xl["unet"](*given, added_cond_kwargs=told).sample
    assert torch.equal(parts["unet"](*given, added_cond_kwargs=told).sample, predicted)
    assert parts["vae"].config.scaling_factor == 0.13025
    config = parts["scheduler"].config
    assert (config.timestep_spacing, config.prediction_type) == ("leading", "epsilon")


def _assert_equal(parts: Any, modules: Modules) -> None:
    for part, module in modules.items():
        loaded = parts[part].state_dict()
        assert list(loaded) == list(module.state_dict())
        for name, tensor in module.state_dict().items():
            assert torch.equal(loaded[name], tensor), name
            assert loaded[name].is_contiguous(), name
        assert not parts[part].training
        assert not any(t.is_meta for t in parts[part].buffers())


def test_diffusers_converters_make_the_same_of_the_files(
    modules_2: Modules, modules_xl: Modules
) -> None:
    """diffusers' own maps as the referee of the tests' map, as far as they know toy sizes."""
    second, xl = sd2_tensors(modules_2), sdxl_tensors(modules_xl)
    for tensors, made in ((second, modules_2), (xl, modules_xl)):
        for part, convert in (
            ("unet", convert_ldm_unet_checkpoint),
            ("vae", convert_ldm_vae_checkpoint),
        ):
            converted = convert(dict(tensors), dict(made[part].config))
            state = made[part].state_dict()
            assert converted.keys() == state.keys()
            assert all(torch.equal(converted[name], state[name]) for name in state)
    text = modules_xl["text_encoder_2"]
    converted = convert_open_clip_checkpoint(text, xl, "conditioner.embedders.1.model.")
    assert converted.keys() == text.state_dict().keys()
    assert all(torch.equal(converted[n], tensor) for n, tensor in text.state_dict().items())


def test_an_sd2_file_that_went_through_diffusers_lacks_the_last_layer(
    modules_2: Modules, tmp_path: Path
) -> None:
    """As Waifu Diffusion 1.4's: no projection, no logit_scale, 23 layers of 24; here 2 of 3."""
    end = ("text_projection", "logit_scale")
    left = {
        name: tensor
        for name, tensor in sd2_tensors(modules_2).items()
        if not name.endswith(end) and ".resblocks.2." not in name
    }
    save_file(left, tmp_path / "wd.safetensors")
    _assert_equal(load(tmp_path / "wd.safetensors"), modules_2)


def test_what_is_set_aside_of_sd2_and_sdxl(
    file_2: Path, file_xl: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        load(file_2)
    assert "12 tensors set aside (the text encoder's last layer" in caplog.text
    assert "2 tensors set aside (CLIP's projection)" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        load(file_xl)
    assert "1 tensors set aside (CLIP's projection)" in caplog.text
    assert "1 tensors set aside (position ids)" in caplog.text


def test_marks_of_the_file_reach_the_scheduler(modules_2: Modules, tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    save_file(sd2_tensors(modules_2), path, {"modelspec.prediction_type": "epsilon"})
    parts = load(path)
    assert parts["scheduler"].config.prediction_type == "epsilon"
    assert parts["unet"].config.sample_size == 64


BIG = "conditioner.embedders.1.model."


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({f"{BIG}transformer.resblocks.1.attn.in_proj_bias": None}, r"WithProj.*missing.*1\.attn"),
        ({f"{BIG}transformer.resblocks.0.attn.in_proj_weight": torch.zeros(128, 128)},
         r"in_proj_weight \(128, 128\) for text_model.*q_proj\.weight \(128, 128\)"),
        ({f"{BIG}ln_final.scale": torch.zeros(1)}, r"unknown: .*ln_final\.scale"),
        ({"conditioner.embedders.2.weight": torch.zeros(1)}, "no SDXL model has: conditioner.emb"),
        ({f"{BIG}text_projection": None}, r"the tensor text_projection is missing"),
    ],
)  # fmt: skip
def test_what_does_not_fit_sdxl_is_named(
    modules_xl: Modules, tmp_path: Path, changes: dict[str, Tensor | None], said: str
) -> None:
    tensors = sdxl_tensors(modules_xl) | changes
    path = tmp_path / "changed.safetensors"
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    with pytest.raises(UserError, match=said):
        load(path)


def test_an_fp16_file_and_low_precisions(modules: Modules, tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    save_file(ldm_tensors(modules, torch.float16), path)
    parts = load(path, torch.bfloat16)
    for part, module in modules.items():
        dtype = torch.bfloat16 if part == "unet" else torch.float32
        for name, tensor in module.state_dict().items():
            assert torch.equal(parts[part].state_dict()[name], tensor.half().to(dtype)), name
    assert parts["unet"].dtype == torch.bfloat16


def test_nothing_loaded_refers_to_the_file(write: Callable[..., Path]) -> None:
    path = write()
    weight = load(path)["unet"].conv_in.weight
    before = weight.clone()
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert torch.equal(weight, before)


def test_ema_copies_are_set_aside_and_counted(
    full_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert read_signature(full_file).ema == facts.EMA_COUNT
    with caplog.at_level(logging.INFO):
        load(full_file)
    assert "688 tensors set aside (EMA copies)" in caplog.text
    assert "12 tensors set aside (noise schedule)" in caplog.text
    assert "1 tensors set aside (position ids)" in caplog.text


def test_text_encoder_names_of_old_merges(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    old = {name.replace(".text_model.", "."): tensor for name, tensor in tensors.items()}
    save_file(old, tmp_path / "merge.safetensors")
    parts = load(tmp_path / "merge.safetensors")
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
    load(write(**extra))


UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT = "cond_stage_model.transformer.text_model."


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"control_model.zero.weight": torch.zeros(1)},
            r"no SD 1.x model has: control_model\.zero",
        ),
        ({"v_predicted": torch.zeros(0)}, "no SD 1.x model has: v_predicted"),
        ({f"{UNET}out.3.weight": torch.zeros(1)}, r"UNet2D.* 1 tensors unknown: .*out\.3\.weight"),
        (
            {f"{UNET}output_blocks.11.1.proj_out.bias": None},
            r"missing: .*blocks\.11\.1\.proj_out\.bias",
        ),
        (
            {f"{UNET}input_blocks.1.0.in_layers.2.bias": torch.zeros(3)},
            r"in_layers\.2\.bias \(3,\) for .*conv1\.bias \(32,\)",
        ),
        (
            {f"{UNET}input_blocks.1.1.norm.weight": None},
            r"missing: .*input_blocks\.1\.1\.norm\.weight",
        ),
        ({f"{UNET}input_blocks.1.0.out_layers.3.weight": None}, r"tensor .*out_layers\.3.*missing"),
        (
            {f"{VAE}decoder.mid.attn_1.q.weight": None},
            r"AutoencoderKL.*missing: .*decoder\.mid\.attn_1\.q",
        ),
        ({f"{VAE}quant_conv.scale": torch.zeros(1)}, r"unknown: first_stage_model\.quant_conv\.sc"),
        (
            {f"{VAE}post_quant_conv.weight": None},
            r"missing: first_stage_model\.post_quant_conv\.weight",
        ),
        ({f"{TEXT}embeddings.token_embedding.weight": torch.zeros(500, 64)}, "knows 500 tokens"),
        ({f"{TEXT}encoder.layers.1.mlp.fc2.bias": None}, r"CLIPTextModel.*missing.*1\.mlp\.fc2"),
        (
            {f"{TEXT}final_layer_norm.bias": torch.zeros(64).int()},
            r"a type that is no float: .*final_layer_norm\.bias I32",
        ),
        ({"alphas_cumprod": torch.linspace(1, 0, 1000)}, "noise schedule .* is not SD 1.x's"),
    ],
)
def test_what_does_not_fit_is_named(
    write: Callable[..., Path], changes: dict[str, Tensor | None], said: str
) -> None:
    path = write(**changes)
    with pytest.raises(UserError, match=said) as error:
        load(path)
    assert error.value.problems[0].where == str(path)


def _headers(w: Widths) -> dict[str, dict[str, TensorInfo]]:
    """The header of each part, without its prefix."""
    return {
        part: {
            fact.ldm.removeprefix(single_file.PREFIXES[_family(w)][part]).removeprefix(
                "text_model."
            ): TensorInfo("F32", fact.shape)
            for fact in part_facts
        }
        for part, part_facts in facts.parts(w).items()
    }


def _family(w: Widths) -> Any:
    return "sdxl" if w.told else "sd2" if w.linear else "sd1"


@pytest.mark.parametrize("w", [REAL, REAL_2, REAL_XL], ids=["sd1", "sd2", "sdxl"])
def test_the_real_shapes_give_the_published_configs(w: Widths) -> None:
    path, headers, family = Path("real.safetensors"), _headers(w), _family(w)
    unet = shapes.unet_config(path, headers["unet"], family)
    vae = packaged_config(family, "vae")
    assert shapes.vae_config(path, headers["vae"], vae) == vae
    if family == "sd2":
        config = shapes.open_clip_config(path, headers["text_encoder"], family)
    else:
        config = shapes.clip_config(path, headers["text_encoder"], family)
    assert config == packaged_config(family, "text_encoder")
    if family == "sdxl":
        config = shapes.open_clip_config(path, headers["text_encoder_2"], family)
        assert config == packaged_config(family, "text_encoder_2")
        unet |= shapes.time_embedding(unet, config["projection_dim"])
    assert unet == packaged_config(family, "unet")


def test_heads_of_the_text_encoder() -> None:
    heads = {}
    for width in (32, 64, 96, 128, 768):
        header = dict(_headers(REAL)["text_encoder"])
        header["embeddings.token_embedding.weight"] = TensorInfo("F32", (49408, width))
        config = shapes.clip_config(Path("x.safetensors"), header, "sd1")
        heads[width] = config["num_attention_heads"]
    assert heads == {32: 1, 64: 1, 96: 1, 128: 2, 768: 12}


def test_scheduler_is_that_of_sd15(full_file: Path) -> None:
    scheduler = load(full_file)["scheduler"]
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


def test_the_parts_make_a_pipeline_that_can_be_saved(full_file: Path, tmp_path: Path) -> None:
    parts = load(full_file)
    extra = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionPipeline(**parts, **extra).save_pretrained(tmp_path / "toy")
    signature = read_signature(tmp_path / "toy")
    assert (signature.layout, signature.cross_attention_dim) == ("diffusers", TOY.text)
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "toy")
    text = "a photo of 猫 <lora:style_v1>"
    assert again.tokenizer(text).input_ids == parts["tokenizer"](text).input_ids
    for name, tensor in parts["text_encoder"].state_dict().items():
        assert torch.equal(again.text_encoder.state_dict()[name], tensor)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_file_and_the_folder_of_it_are_the_same_family(
    family: str, full_file: Path, file_2: Path, file_xl: Path, tmp_path: Path
) -> None:
    path = {"sd1": full_file, "sd2": file_2, "sdxl": file_xl}[family]
    parts = load(path)
    extra = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = (
        StableDiffusionXLPipeline(**parts)
        if family == "sdxl"
        else StableDiffusionPipeline(**parts, **extra)
    )
    pipeline.save_pretrained(tmp_path)
    options = Options(prediction_type="epsilon")
    of_file, of_folder = (
        build.load_family(read_signature(source), Compute(torch.device("cpu"), "no"), options)
        for source in (path, tmp_path)
    )
    assert of_file.metadata() == of_folder.metadata()
    assert of_file.text_encoder_id == of_folder.text_encoder_id
    assert of_file.image_encoder_id == of_folder.image_encoder_id
    assert of_file.denoiser_id == of_folder.denoiser_id
    # The same weights at other addresses: sums are rounded otherwise.
    torch.testing.assert_close(of_file.probe(), of_folder.probe(), rtol=0, atol=2e-5)


@pytest.mark.slow
def test_the_real_file_at_real_size(tmp_path: Path) -> None:
    filled = {"alphas_cumprod": schedule()["alphas_cumprod"].half().numpy().tobytes()}
    path = tmp_path / "v1-5-pruned.safetensors"
    facts.write_zeros(path, facts.whole_file(REAL), filled)
    assert len(read_header(path)) == 1831
    assert _sizes(read_parts(read_signature(path), torch.float16, torch.float16)) == {
        "unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480,
    }  # fmt: skip


@pytest.mark.slow
def test_sd21_at_real_size(tmp_path: Path) -> None:
    filled = {"alphas_cumprod": schedule()["alphas_cumprod"].half().numpy().tobytes()}
    path = tmp_path / "v2-1_768-ema-pruned.safetensors"
    facts.write_zeros(path, facts.published_2(), filled)
    assert _sizes(read_parts(read_signature(path), torch.float16, torch.float16)) == {
        "unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_sdxl_at_real_size_read_and_written(tmp_path: Path) -> None:
    """Zeros, but for one fused tensor: 6.9 GB in float16, read, and written as the same file."""
    shapes, name = facts.published_xl(), f"{BIG}transformer.resblocks.31.attn.in_proj_weight"
    fused = torch.randn(shapes[name]).half()
    path, written = tmp_path / "sd_xl_base_1.0.safetensors", tmp_path / "written.safetensors"
    facts.write_zeros(path, shapes, {name: fused.numpy().tobytes()})
    found = read_signature(path)
    parts = read_parts(found, torch.float16, torch.float16)
    assert _sizes(parts) == {
        "unet": 2_567_463_684, "vae": 83_653_863,
        "text_encoder": 123_060_480, "text_encoder_2": 694_659_840,
    }  # fmt: skip
    attention = parts["text_encoder_2"].text_model.encoder.layers[31].self_attn
    assert torch.equal(attention.v_proj.weight, fused[2560:])
    write_single_file(written, parts, like=found)
    assert read_header(written) == read_header(path)
    with safe_open(written, framework="pt") as file:
        assert torch.equal(file.get_tensor(name), fused)


def _sizes(parts: Any) -> dict[str, int]:
    return {
        name: sum(p.numel() for p in part.parameters())
        for name, part in parts.items()
        if isinstance(part, torch.nn.Module)
    }
