"""SD1.x, SD2.x and SDXL against diffusers' own pipelines, at toy size and in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from transformers import CLIPTextConfig, CLIPTextModel

from lora_scripts.device import Compute
from lora_scripts.errors import UserError
from lora_scripts.models import clip_text, latents, lora
from lora_scripts.models.family import DrawRequest, Framing, ImageFamily, Options
from lora_scripts.tasks import build
from tests import runs, toys

CPU = Compute(torch.device("cpu"), "no")
LONG = "a " * 100  # two parts


def load(base: Path, **options: Any) -> Any:
    return build.load_family(build.find_base(str(base)), CPU, Options(**options))


def drawn(family: ImageFamily, request: DrawRequest) -> torch.Tensor:
    """The latents that `draw` comes to."""
    found: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latents, "decode", lambda vae, latents_BCHW: found.append(latents_BCHW))
        family.draw(request)
    return found[0]


@pytest.mark.parametrize("negative", ["", "blurry"])
@pytest.mark.parametrize("name", toys.FAMILIES)
def test_draws_what_diffusers_draws(bases: dict[str, Path], name: str, negative: str) -> None:
    pipeline = toys.FAMILIES[name][1].from_pretrained(str(bases[name]))
    expected = pipeline(
        "a cat", negative_prompt=negative or None, width=64, height=48, num_inference_steps=3,
        guidance_scale=5.0, generator=torch.Generator().manual_seed(3), output_type="latent",
    ).images  # fmt: skip
    found = drawn(load(bases[name]), DrawRequest("a cat", negative, 5.0, 3, 64, 48, 3))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", toys.FAMILIES)
def test_a_picture_is_decoded_as_diffusers_does(bases: dict[str, Path], name: str) -> None:
    import numpy as np

    family = load(bases[name])
    latents_BCHW = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pipeline = toys.FAMILIES[name][1].from_pretrained(str(bases[name]))
    pixels = pipeline.vae.decode(latents_BCHW / pipeline.vae.config.scaling_factor).sample.detach()
    expected = np.asarray(pipeline.image_processor.postprocess(pixels)[0], np.int16)
    found = np.asarray(latents.decode(family.vae, latents_BCHW), np.int16)
    assert found.shape == (64, 64, 3) and found.std() > 1
    assert abs(found - expected).max() <= 1  # rounding


def test_an_empty_negative_prompt_is_zeros_only_where_the_model_says_so(tmp_path: Path) -> None:
    """SDXL's model_index.json tells; without it a pipeline is not asked to encode anything."""
    pipeline = StableDiffusionXLPipeline(**toys.sdxl_parts(), force_zeros_for_empty_prompt=False)
    pipeline.save_pretrained(str(tmp_path))
    expected = pipeline(
        "a cat", width=64, height=64, num_inference_steps=3, guidance_scale=5.0,
        generator=torch.Generator().manual_seed(3), output_type="latent",
    ).images  # fmt: skip
    request = DrawRequest("a cat", "", 5.0, 3, 64, 64, 3)
    torch.testing.assert_close(drawn(load(tmp_path), request), expected, rtol=1e-4, atol=1e-5)
    zeros = drawn(load(toys.save_sdxl(tmp_path / "zeros")), request)
    assert (zeros - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "clip_skip", "diffusers_skip"),
    [("sd1", 1, None), ("sd1", 2, 1), ("sd2", 2, 1), ("sdxl", 2, None), ("sdxl", 3, 1)],
)
def test_clip_skip_counts_as_in_webui(
    tmp_path: Path, name: str, clip_skip: int, diffusers_skip: int | None
) -> None:
    """Without guidance: diffusers does not skip layers for the negative prompt."""
    save, pipeline_class = toys.FAMILIES[name]
    base = deepen(save(tmp_path), name)
    pipeline = pipeline_class.from_pretrained(str(base))
    if name != "sdxl":  # diffusers 0.42 looks for a level that transformers 5 took away
        object.__setattr__(pipeline.text_encoder, "text_model", pipeline.text_encoder)
    expected = pipeline(
        "a cat", width=64, height=64, num_inference_steps=2, guidance_scale=1.0,
        clip_skip=diffusers_skip, generator=torch.Generator().manual_seed(3), output_type="latent",
    ).images  # fmt: skip
    request = DrawRequest("a cat", "", 1.0, 2, 64, 64, 3)
    found = drawn(load(base, clip_skip=clip_skip), request)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    own = load(base)
    is_own = clip_skip == (2 if name == "sdxl" else 1)
    assert torch.equal(drawn(own, request), found) == is_own


def deepen(base: Path, name: str) -> Path:
    """Give a toy's text encoders three layers."""
    torch.manual_seed(1)
    for part in ("text_encoder", "text_encoder_2") if name == "sdxl" else ("text_encoder",):
        config = CLIPTextConfig.from_pretrained(str(base / part))
        config.num_hidden_layers = 3
        config.initializer_factor = 4.0
        kind = CLIPTextModel if part == "text_encoder" else toys.CLIPTextModelWithProjection
        kind(config).save_pretrained(str(base / part))
    return base


def test_sdxls_own_last_layer_is_to_be_had(tmp_path: Path) -> None:
    """clip_skip 1: after the last layer, without the final norm; `pooled` is not touched."""
    family, own = load(toys.save_sdxl(tmp_path), clip_skip=1), load(tmp_path)
    ids = family.tokenize("a cat")
    states = family.text_encoder(ids["text_encoder"], output_hidden_states=True).hidden_states
    found = family.encode_prompt("a cat")
    torch.testing.assert_close(found["embedding"][:, : toys.WIDTH], states[-1][0])
    assert torch.equal(found["pooled"], own.encode_prompt("a cat")["pooled"])
    assert not torch.equal(found["embedding"], own.encode_prompt("a cat")["embedding"])


@pytest.mark.parametrize("name", toys.FAMILIES)
def test_a_clip_skip_past_the_first_layer_is_refused(bases: dict[str, Path], name: str) -> None:
    with pytest.raises(UserError, match=r"clip_skip: found 3, but .* has 2 layers; write a number"):
        load(bases[name], clip_skip=3)


@pytest.mark.parametrize("name", toys.FAMILIES)
def test_parts_of_a_long_prompt_are_encoded_alone_and_laid_end_to_end(
    bases: dict[str, Path], name: str
) -> None:
    long, short = load(bases[name], max_caption_tokens=150), load(bases[name])
    first, second = (short.encode_prompt("a " * count) for count in (75, 25))
    found = long.encode_prompt(LONG)
    expected = torch.cat([first["embedding"], second["embedding"]])
    torch.testing.assert_close(found["embedding"], expected)
    if name == "sdxl":
        torch.testing.assert_close(found["pooled"], first["pooled"])
    cut = short.encode_prompt(LONG)
    assert len(cut["embedding"]) == 77


@pytest.mark.parametrize("name", toys.FAMILIES)
def test_a_short_caption_beside_a_long_one_acts_as_it_does_alone(
    bases: dict[str, Path], name: str
) -> None:
    family = load(bases[name], max_caption_tokens=225)
    frame = family.frame(Framing((100, 80), (4, 0), (64, 48)))
    rows = [family.encode_prompt(text) | frame for text in ("a cat", LONG, "a " * 200)]
    together = family.collate(rows)
    assert together[clip_text.MASK].sum(1).tolist() == [77, 154, 231]
    noisy_BCHW = torch.randn(3, 4, 8, 8)
    timesteps_B = torch.tensor([1, 500, 999])
    with torch.no_grad():
        found = family.predict(noisy_BCHW, timesteps_B, together)
        for i, row in enumerate(rows):
            alone = family.collate([row])
            assert clip_text.MASK not in alone
            expected = family.predict(noisy_BCHW[i : i + 1], timesteps_B[i : i + 1], alone)
            torch.testing.assert_close(found[i : i + 1], expected, rtol=1e-5, atol=1e-6)
        unmasked = {key: value for key, value in together.items() if key != clip_text.MASK}
        without = family.predict(noisy_BCHW, timesteps_B, unmasked)
        assert (without[0] - found[0]).abs().max() > 1e-4


@pytest.mark.parametrize("name", toys.FAMILIES)
def test_cached_and_live_prompts_are_the_same(bases: dict[str, Path], name: str) -> None:
    family = load(bases[name], max_caption_tokens=150)
    prompts = ["a cat", LONG, ""]
    cached = family.collate([family.encode_prompt(prompt) for prompt in prompts])
    with torch.no_grad():
        live = family.encode_tokens([family.tokenize(prompt) for prompt in prompts])
    assert cached.keys() == live.keys()
    for key in cached:
        torch.testing.assert_close(live[key], cached[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", toys.FAMILIES)
def test_long_prompts_are_drawn_with_the_negative_filled_up(
    bases: dict[str, Path], name: str
) -> None:
    family = load(bases[name], max_caption_tokens=150)
    wanted = family.encode_prompt(LONG)
    one, empty = family.encode_prompt("blurry"), family.encode_prompt("")
    filled = torch.cat([one["embedding"], empty["embedding"]])
    given = {"prompt_embeds": wanted["embedding"][None], "negative_prompt_embeds": filled[None]}
    if name == "sdxl":
        given["pooled_prompt_embeds"] = wanted["pooled"][None]
        given["negative_pooled_prompt_embeds"] = one["pooled"][None]
    expected = toys.FAMILIES[name][1].from_pretrained(str(bases[name]))(
        **given, width=64, height=64, num_inference_steps=2, guidance_scale=4.0,
        generator=torch.Generator().manual_seed(1), output_type="latent",
    ).images  # fmt: skip
    found = drawn(family, DrawRequest(LONG, "blurry", 4.0, 2, 64, 64, 1))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_sdxl_is_told_of_size_and_cut_in_diffusers_order(bases: dict[str, Path]) -> None:
    family = load(bases["sdxl"])
    framing = Framing(original=(1500, 1000), corner=(37, 5), target=(1216, 832))
    found = family.frame(framing)["time_ids"]
    assert found.tolist() == [1000, 1500, 5, 37, 832, 1216]
    row = family.encode_prompt("a cat")
    noisy_BCHW, timesteps_B = torch.randn(1, 4, 8, 8), torch.tensor([500])
    with torch.no_grad():
        here, elsewhere = (
            family.predict(noisy_BCHW, timesteps_B, family.collate([row | family.frame(cut)]))
            for cut in (framing, Framing((1500, 1000), (0, 0), (1216, 832)))
        )
    assert (here - elsewhere).abs().max() > 1e-4
    assert load(bases["sd1"]).frame(framing) == {}


def test_header_fields_name_the_family(bases: dict[str, Path]) -> None:
    found = {name: load(bases[name]).metadata() for name in toys.FAMILIES}
    fields = ("ss_base_model_version", "ss_v2", "modelspec.architecture")
    assert {name: [values[field] for field in fields] for name, values in found.items()} == {
        "sd1": ["sd_v1", "False", "stable-diffusion-v1/lora"],
        "sd2": ["sd_v2", "True", "stable-diffusion-v2-512/lora"],
        "sdxl": ["sdxl_base_v1-0", "False", "stable-diffusion-xl-v1-base/lora"],
    }
    v2 = load(bases["sd2"], prediction_type="v_prediction").metadata()
    assert v2["ss_base_model_version"] == "sd_v2_v"
    assert v2["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"


@pytest.mark.parametrize(
    ("name", "component", "expected"),
    [
        ("sd1", "text_encoder", "lora_te_text_model_encoder_layers_0_self_attn_q_proj"),
        ("sd2", "text_encoder", "lora_te_text_model_encoder_layers_0_self_attn_q_proj"),
        ("sdxl", "text_encoder", "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"),
        ("sdxl", "text_encoder_2", "lora_te2_text_model_encoder_layers_0_self_attn_q_proj"),
    ],
)
def test_text_encoders_have_the_level_text_model_once(
    bases: dict[str, Path], name: str, component: str, expected: str
) -> None:
    family = load(bases[name])
    names = [family.webui_name(component, p) for p in family.targets("attention")[component]]
    assert expected in names
    assert all(found.count("text_model_") == 1 for found in names)


@pytest.mark.parametrize("name", toys.FAMILIES)
def test_checkpointing_gives_the_same_gradients_to_every_adapter(
    bases: dict[str, Path], name: str
) -> None:
    plain = gradients(load(bases[name]))
    family = load(bases[name])
    family.checkpoint_gradients()
    checkpointed = gradients(family)
    assert plain.keys() == checkpointed.keys()
    assert len({key.split(".")[0] for key in plain}) == (3 if name == "sdxl" else 2)
    for key, gradient in plain.items():
        torch.testing.assert_close(checkpointed[key], gradient, rtol=1e-4, atol=1e-7)
        assert gradient.abs().max() > 0, key


def gradients(family: Any) -> dict[str, torch.Tensor]:
    """Of the `up` matrices that matter, at one step that goes through the text encoders.

    The last layer of SDXL's first text encoder does not: the states before it are read.
    """
    for component, paths in family.targets("attention").items():
        lora.attach(family.adapted[component], list(paths), rank=2, alpha=2, dropout=0.0, seed=1)
        family.adapted[component].train()
    conditioning = dict(family.encode_tokens([family.tokenize("a cat")]))
    frame = family.frame(Framing((64, 64), (0, 0), (64, 64)))
    conditioning |= {key: value[None] for key, value in frame.items()}
    noisy_BCHW = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    family.predict(noisy_BCHW, torch.tensor([500]), conditioning).square().mean().backward()
    return {
        f"{component}.{path}": parameter.grad
        for component, module in family.adapted.items()
        for path, parameter in lora.trainable(module).items()
        if "lora_B" in path and parameter.grad is not None
    }


@pytest.mark.parametrize("name", toys.FAMILIES)
def test_hashes_depend_on_how_prompts_are_read(bases: dict[str, Path], name: str) -> None:
    plain = load(bases[name])
    ids = [
        load(bases[name], **options).text_encoder_id
        for options in ({"clip_skip": 1}, {"clip_skip": 2}, {"max_caption_tokens": 150})
    ]
    assert len({plain.text_encoder_id, *ids}) == 4
    assert load(bases[name]).text_encoder_id == plain.text_encoder_id


@pytest.mark.parametrize("name", toys.FAMILIES)
def test_another_vae_encodes_and_draws(bases: dict[str, Path], tmp_path: Path, name: str) -> None:
    torch.manual_seed(9)
    other: Any = toys.FAMILIES[name][1].from_pretrained(str(bases[name])).vae
    for parameter in other.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    other.save_pretrained(str(tmp_path / "vae"))
    own, family = load(bases[name]), load(bases[name], vae=str(tmp_path / "vae"))
    pixels_CHW = torch.rand(3, 64, 64) * 2 - 1
    mean_CHW, std_CHW = family.encode_image(pixels_CHW)
    with torch.no_grad():
        expected = other.encode(pixels_CHW[None]).latent_dist
    scale = own.vae.config.scaling_factor
    torch.testing.assert_close(mean_CHW, expected.mean[0] * scale)
    torch.testing.assert_close(std_CHW, expected.std[0] * scale)
    assert family.image_encoder_id != own.image_encoder_id
    assert (family.denoiser_id, family.text_encoder_id) == (own.denoiser_id, own.text_encoder_id)
    request = DrawRequest("a cat", "", 4.0, 2, 64, 64, 1)
    assert family.draw(request).tobytes() != own.draw(request).tobytes()


@pytest.mark.parametrize("name", toys.FAMILIES)
def test_in_bf16_the_encoders_stay_float32_and_all_is_computed(
    bases: dict[str, Path], name: str
) -> None:
    """Also a step that trains the text encoders, under autocast and with checkpointing."""
    compute = Compute(torch.device("cpu"), "bf16")
    family: Any = build.load_family(build.find_base(str(bases[name])), compute)
    assert family.unet.dtype == torch.bfloat16
    assert family.vae.dtype == family.text_encoder.dtype == torch.float32
    request = DrawRequest("a cat", "blurry", 4.0, 2, 64, 64, 1)
    exact = drawn(load(bases[name]), request)
    assert (drawn(family, request).float() - exact).abs().mean() < 0.1 * exact.abs().mean()
    family.checkpoint_gradients()
    with compute.autocast():
        found = gradients(family)
    assert {key.split(".")[0] for key in found} == set(family.adapted)
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    assert all(gradient.abs().max() > 0 for gradient in found.values())


def test_the_keys_of_a_config_reach_the_model(
    bases: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    task, _, _ = runs.task(
        bases["sd2"], pictures, tmp_path, clip_skip=2, max_caption_tokens=225,
        prediction_type="v_prediction", zero_terminal_snr=True, vae=str(bases["sd1"] / "vae"),
    )  # fmt: skip
    family: Any = task.family
    assert family.prediction == "v_prediction"
    assert family.alphas_cumprod_T[-1].item() == 0
    assert len(family.tokenize(LONG)["text_encoder"]) == 2
    plain = load(bases["sd2"])
    assert family.text_encoder_id != plain.text_encoder_id
    assert family.image_encoder_id != plain.image_encoder_id


def test_an_encoder_that_is_kept_on_the_device_stays_there(bases: dict[str, Path]) -> None:
    """Seen by the meta device, which any module can be sent to."""
    family = load(bases["sdxl"])
    family.encoders.device = torch.device("meta")
    family.keep_on_device("text")
    assert family.text_encoder.device.type == family.text_encoder_2.device.type == "meta"
    assert family.vae.device.type == "cpu"
    with family.visiting("text"):
        pass
    assert family.text_encoder_2.device.type == "meta"
