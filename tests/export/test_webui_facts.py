"""The lists of the WebUIs' names agree with the modules of the real SD 1.5 checkpoint."""

from __future__ import annotations

from tests.export.webui_facts import (
    a1111_target,
    text_encoder_modules,
    unet_all_modules,
    unet_attention_modules,
)
from tests.models.ldm_facts import REAL, Fact, text_facts, unet_facts


def _layers(facts: list[Fact]) -> dict[str, str]:
    """Linear layers and convolutions: those with a weight of two sizes or more. LDM -> module."""
    return {
        fact.ldm.removesuffix(".weight"): fact.module.removesuffix(".weight")
        for fact in facts
        if len(fact.shape) > 1 and "embedding.weight" not in fact.ldm
    }


def test_the_sets_have_their_sizes_and_hold_each_other() -> None:
    attention, everything, text = (
        unet_attention_modules(),
        unet_all_modules(),
        text_encoder_modules(),
    )
    assert (len(attention), len(everything), len(text)) == (128, 282, 72)
    assert attention < everything
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q" in attention
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0" in attention
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj" in text


def test_they_are_the_layers_of_the_real_model() -> None:
    unet = {f"lora_unet_{name.replace('.', '_')}" for name in _layers(unet_facts(REAL)).values()}
    assert unet == unet_all_modules()
    text = {
        f"lora_te_text_model_{name.replace('.', '_')}"
        for name in _layers(text_facts(REAL)).values()
    }
    assert text == text_encoder_modules()


def test_a1111_finds_the_ldm_module_of_each() -> None:
    unet = {
        f"lora_unet_{module.replace('.', '_')}": ldm.removeprefix("model.").replace(".", "_")
        for ldm, module in _layers(unet_facts(REAL)).items()
    }
    assert {key: a1111_target(key) for key in unet_all_modules()} == unet
    text = {
        name.removeprefix("cond_stage_model.").replace(".", "_")
        for name in _layers(text_facts(REAL))
    }
    assert {a1111_target(key) for key in text_encoder_modules()} == text


def test_a1111_takes_ldm_names_and_no_others() -> None:
    key = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
    assert a1111_target(key) == key.replace("lora_unet", "diffusion_model")
    # What diffusers alone reads finds nothing (INTEROP.md section 1).
    assert a1111_target("unet") is None
    assert a1111_target("lora_te_encoder_layers_0_self_attn_q_proj") is None
