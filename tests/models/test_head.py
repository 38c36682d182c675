"""The loss in parts: the same as from all logits at once, for every model that it is taken for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lora_scripts.models import head, lora
from lora_scripts.models.head import Learned
from tests import text_toys

ROWS, LENGTH = 2, 9


def batch(model: Any) -> tuple[dict[str, torch.Tensor], Learned]:
    """Some tokens of two rows, some columns learned in one row only."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids_BT = torch.randint(3, vocabulary, (ROWS, LENGTH), generator=generator)
    row_N = torch.tensor([0, 0, 1, 1, 1])
    columns_C, column_N = torch.unique(torch.tensor([2, 6, 2, 3, 7]), return_inverse=True)
    targets_N = ids_BT[row_N, columns_C[column_N] + 1]
    return {"input_ids": ids_BT}, Learned(columns_C, row_N, column_N, targets_N)


def with_lora(architecture: str, **changes: Any) -> Any:
    model = text_toys.model(architecture, **changes)
    lora.attach(model, ["q_proj", "c_attn", "query_key_value", "in_proj", "qkv_proj"], rank=2,
                alpha=2, dropout=0, seed=0)  # fmt: skip
    for parameter in lora.trainable(model).values():
        parameter.data += 0.1
    return model


def loss_and_gradients(model: Any, *, in_parts: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    trained = list(lora.trainable(model).values())
    loss = head.loss(model, *batch(model), in_parts=in_parts)
    return loss.detach(), list(torch.autograd.grad(loss, trained))


@pytest.mark.parametrize("logits_at_once", [1, 200, head.LOGITS_AT_ONCE])
@pytest.mark.parametrize("architecture", text_toys.ARCHITECTURES)
def test_the_loss_in_parts_is_the_loss(
    architecture: str, logits_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", logits_at_once)
    model = with_lora(architecture)
    if not head.may_come_in_parts(model):
        assert architecture in ("gemma2", "cohere", "granite"), "its head is as plain as any"
        return
    expected, expected_gradients = loss_and_gradients(model, in_parts=False)
    found, gradients = loss_and_gradients(model, in_parts=True)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(
            gradient, wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max())
        )


def test_only_some_logits_are_alive_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", 1)
    model = with_lora("llama")
    seen = []
    linear = torch.nn.functional.linear

    def noted(*given: torch.Tensor) -> torch.Tensor:
        result = linear(*given)
        seen.append(result.shape)
        return result

    monkeypatch.setattr(head.functional, "linear", noted)
    loss_and_gradients(model, in_parts=True)
    vocabulary = model.config.vocab_size
    assert seen.count((1, vocabulary)) == 5
    assert max(shape.numel() for shape in seen) < 5 * vocabulary


def test_without_gradients_there_is_a_loss_all_the_same() -> None:
    model = with_lora("llama")
    with torch.no_grad():
        found = head.loss(model, *batch(model), in_parts=True)
        expected = head.loss(model, *batch(model), in_parts=False)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_a_model_that_changes_its_logits_is_found_by_trying() -> None:
    """Whatever its settings are called."""
    model = text_toys.model("llama").requires_grad_(False)
    assert head.may_come_in_parts(model)
    forward = model.forward

    def halved(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits / 2
        return output

    model.forward = halved
    assert head.looks_plain(model)
    assert not head.may_come_in_parts(model)


def test_settings_that_change_the_logits_are_seen_without_weights() -> None:
    assert not head.looks_plain(text_toys.model("gemma2").requires_grad_(False))


def test_a_head_that_is_trained_is_left_alone() -> None:
    model = text_toys.model("llama")
    lora.attach(model, ["lm_head"], rank=2, alpha=2, dropout=0, seed=0)
    assert not head.may_come_in_parts(model)


def test_low_precision_gives_the_same_but_for_rounding() -> None:
    model = with_lora("llama").to(torch.bfloat16)
    expected, expected_gradients = loss_and_gradients(model, in_parts=False)
    found, gradients = loss_and_gradients(model, in_parts=True)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert (gradient - wanted).norm() < 0.05 * wanted.norm()
