"""The loss on the tokens to learn, without the logits of all of them at once.

A vocabulary is a hundred times as wide as a model: logits of a batch take 12 bytes each (the
arithmetic's 16 bits, float32 for the softmax, the gradients of both). Where the head is a plain
linear layer, frozen as in LoRA, logits are made for some tokens at a time; their part of the loss
and its gradient for the hidden states are formed at once, and they are gone. (The idea is Apple's
cut cross-entropy, arXiv 2411.09009, and Liger-Kernel's, arXiv 2410.10989; no kernel is needed
here, as no gradient of the head itself is.)

Tensor suffixes: B batch, T tokens of a row (packed: of all rows), C columns with a token to learn,
N tokens to learn, D width of the model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lora_scripts.models import sharding

LOGITS_AT_ONCE = 2**23  # numbers; 32 MiB in float32
PROBE_LENGTH = 5  # tokens
TOLERANCE, LOW_PRECISION_TOLERANCE = 1e-4, 1e-2  # of the largest logit: rounding only
_CHANGED_BY = (  # settings with which a model changes what its head gives, by their neutral values
    ("final_logit_softcapping", None),
    ("logit_scale", 1.0),
    ("logits_scaling", 1.0),
    ("lm_head_multiplier", 1.0),
)


@dataclass(frozen=True)
class Learned:
    """Where the tokens to learn are predicted, and which they are.

    Attributes:
        columns_C: The columns of the batch in which some row predicts one.
        row_N: For each token to learn, the row of the batch that predicts it.
        column_N: And the place in `columns_C`.
        targets_N: The tokens.
    """

    columns_C: torch.Tensor
    row_N: torch.Tensor
    column_N: torch.Tensor
    targets_N: torch.Tensor


def loss(
    model: Any, inputs: Mapping[str, Any], learned: Learned, *, in_parts: bool
) -> torch.Tensor:
    """Cross entropy of the tokens to learn, summed, float32.

    Args:
        model: A PreTrainedModel with a language-model head.
        inputs: What it is called with: `input_ids` (B, T), positions, a mask.
        in_parts: Whether `may_come_in_parts` said so of this model.
    """
    if not in_parts:
        logits_BCV = model(use_cache=False, logits_to_keep=learned.columns_C, **inputs).logits
        logits_NV = logits_BCV[learned.row_N, learned.column_N].float()
        return functional.cross_entropy(logits_NV, learned.targets_N, reduction="sum")
    hidden_BTD = model.get_decoder()(use_cache=False, **inputs).last_hidden_state
    hidden_ND = hidden_BTD[learned.row_N, learned.columns_C[learned.column_N]]
    head = model.get_output_embeddings()
    kind = hidden_ND.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_ND.dtype
    with sharding.gathered(head):
        total: torch.Tensor = _InParts.apply(  # type: ignore[no-untyped-call]
            hidden_ND.to(dtype),
            head.weight.to(dtype),
            None if head.bias is None else head.bias.to(dtype),
            learned.targets_N,
        )
    return total


def may_come_in_parts(model: Any) -> bool:
    """Whether the logits are a frozen linear layer's on what the decoder gives: tried out."""
    if not looks_plain(model):
        return False
    with torch.no_grad():
        vocabulary = model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        ids_BT = torch.randint(3, vocabulary, (1, PROBE_LENGTH), generator=generator)
        given = {"input_ids": ids_BT.to(model.device), "use_cache": False}
        expected = model(**given).logits.float()
        hidden_BTD = model.get_decoder()(**given).last_hidden_state
        found = model.get_output_embeddings()(hidden_BTD).float()
    tolerance = TOLERANCE if model.dtype == torch.float32 else LOW_PRECISION_TOLERANCE
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


def looks_plain(model: Any) -> bool:
    """The same as far as classes and settings tell; the weights need not be there."""
    head, decoder = model.get_output_embeddings(), model.get_decoder()
    if not isinstance(head, nn.Linear) or head.weight.requires_grad or decoder in (None, model):
        return False
    settings = model.config.get_text_config()
    return all(getattr(settings, name, None) in (None, plain) for name, plain in _CHANGED_BY)


def alive_at_once(model: Any, learned: int) -> int:
    """Of so many tokens to learn, how many have logits at the same time."""
    vocabulary: int = model.config.get_text_config().vocab_size
    return min(learned, _part(vocabulary)) if looks_plain(model) else learned


def _part(vocabulary: int) -> int:
    """Tokens whose logits are made at once."""
    return max(1, LOGITS_AT_ONCE // vocabulary)


class _InParts(torch.autograd.Function):
    """Σ cross entropy(h Wᵀ + b, target); the gradient of h is made with it, W and b are frozen."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_N: torch.Tensor,
    ) -> torch.Tensor:
        learns = ctx.needs_input_grad[0]
        gradient_ND = torch.empty_like(hidden_ND) if learns else None
        total = torch.zeros((), device=hidden_ND.device)
        size = _part(weight_VD.shape[0])
        for start in range(0, len(targets_N), size):
            part = slice(start, start + size)
            target_N1 = targets_N[part, None]
            logits_NV = functional.linear(hidden_ND[part], weight_VD, bias_V).float()
            logits_NV -= logits_NV.logsumexp(dim=-1, keepdim=True)
            total -= logits_NV.gather(1, target_N1).sum()
            if gradient_ND is not None:
                error_NV = logits_NV.exp_()
                minus_N1 = error_NV.new_full(target_N1.shape, -1.0)
                error_NV.scatter_add_(1, target_N1, minus_N1)
                torch.matmul(error_NV.to(weight_VD.dtype), weight_VD, out=gradient_ND[part])
            del logits_NV
        if learns:
            ctx.save_for_backward(gradient_ND)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient_ND,) = ctx.saved_tensors
        return (gradient_ND * gradients[0].to(gradient_ND.dtype), None, None, None)
