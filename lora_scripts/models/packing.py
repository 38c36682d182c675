"""Rows laid end to end in one sequence, each attending to itself alone.

transformers passes what `model(**kwargs)` is given on to the attention function, which can be one's
own (transformers' AttentionInterface). Ours makes one causal call for every row, where a block mask
would have all scores computed and most of them thrown away. Positions begin at 0 with every row.

Tensor suffixes: B batch (always 1), H heads, T tokens of all rows, D width of a head, L of one row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional

NAME = "lora_scripts_segments"
PLAIN_LENGTH = 256  # up to which PyTorch's fused attention is slower on CPUs than a plain one
_ATTENDING = {"full_attention", "sliding_attention", "chunked_attention"}
LEAK_TOLERANCE = 1e-3  # of the largest logit; another row's influence must be rounding only …
LOW_PRECISION_TOLERANCE = 2e-2  # … which is coarser in 16 bits (experts see other batch shapes)
ALONE_TOLERANCE = 0.1  # of the largest logit; a row packed and alone may differ by rounding only


def register() -> None:
    """Make `set_attn_implementation(NAME)` known to transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, segment_attention)


def layout(lengths: Sequence[int]) -> dict[str, Any]:
    """What a model must be given beside the tokens of rows of these lengths.

    The rows' ends have transformers' name for them, but stay plain numbers: they are read in
    Python, and a tensor on a GPU would have to be waited for in every layer.
    """
    positions_T = torch.cat([torch.arange(length) for length in lengths])
    return {"position_ids": positions_T[None], "cu_seq_lens_q": (0, *accumulate(lengths))}


def segment_attention(
    module: nn.Module,
    query_BHTD: torch.Tensor,
    key_BHTD: torch.Tensor,
    value_BHTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: Sequence[int],
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row; heads of keys and values are shared as the model says.

    Returns the output as BTHD, as transformers expects it.
    """
    if s_aux is not None:
        raise TypeError("attention sinks")
    groups = query_BHTD.shape[1] // key_BHTD.shape[1]
    key_BHTD = key_BHTD.repeat_interleave(groups, dim=1)
    value_BHTD = value_BHTD.repeat_interleave(groups, dim=1)
    outputs = [
        _attend(
            query_BHTD[:, :, start:end],
            key_BHTD[:, :, start:end],
            value_BHTD[:, :, start:end],
            scaling,
            sliding_window,
            softcap,
        )
        for start, end in pairwise(cu_seq_lens_q)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _attend(
    query_BHLD: torch.Tensor,
    key_BHLD: torch.Tensor,
    value_BHLD: torch.Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """One row, with a fused kernel where there is one and where it is faster."""
    length = query_BHLD.shape[2]
    window = None if window is None or length <= window else window
    short = query_BHLD.device.type == "cpu" and length <= PLAIN_LENGTH
    if softcap is not None or short:
        seen_LL = _seen(length, window, query_BHLD.device)
        scale = query_BHLD.shape[-1] ** -0.5 if scaling is None else scaling
        return _plain(query_BHLD, key_BHLD, value_BHLD, seen_LL, scale, softcap)
    if window is None:
        return functional.scaled_dot_product_attention(
            query_BHLD, key_BHLD, value_BHLD, is_causal=True, scale=scaling
        )
    seen_LL = _seen(length, window, query_BHLD.device)
    return functional.scaled_dot_product_attention(
        query_BHLD, key_BHLD, value_BHLD, attn_mask=seen_LL, scale=scaling
    )


def _plain(
    query_BHLD: torch.Tensor,
    key_BHLD: torch.Tensor,
    value_BHLD: torch.Tensor,
    seen_LL: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attention written out: softmax(q k / √D) v, scores soft-capped if the model does so (Gemma 2,
    arXiv 2408.00118). Autocast is off, as it would turn the softmax to float32 and back.
    """
    with torch.autocast(query_BHLD.device.type, enabled=False):
        scores_BHLL = (query_BHLD * scale) @ key_BHLD.transpose(2, 3)
        if softcap is not None:
            scores_BHLL = softcap * torch.tanh(scores_BHLL / softcap)
        scores_BHLL = scores_BHLL.masked_fill(~seen_LL, torch.finfo(scores_BHLL.dtype).min)
        return scores_BHLL.softmax(dim=-1) @ value_BHLD


@lru_cache(maxsize=256)
def _seen(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Which token (column) each token (row) may look at: itself and those before, in the window."""
    steps_L = torch.arange(length, device=device)
    back_LL = steps_L[:, None] - steps_L[None, :]
    return (back_LL >= 0) & (back_LL < (window or length))


def forget_masks() -> None:
    """Make masks anew: those made while tensors were imagined only are of no use afterwards."""
    _seen.cache_clear()


@contextmanager
def attention(model: Any, name: str) -> Iterator[None]:
    """The model with the attention of this name within this context."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def why_not(model: Any) -> str | None:
    """Why rows must not be laid end to end in this model; None if they may.

    Every token mixer must be attention: linear attention and convolutions carry a state over from
    row to row whatever the mask says. Told from the config, then tried out on the model itself.
    """
    text_config = model.config.get_text_config()
    kinds = set(getattr(text_config, "layer_types", None) or ()) - _ATTENDING
    if kinds:
        return f"its {', '.join(sorted(kinds))} layers would carry a state from row to row"
    if not model._supports_attention_backend:
        return f"transformers gives its attention ({text_config.model_type}) no such way"
    return _leak(model)


@torch.no_grad()
def _leak(model: Any) -> str | None:
    """Try: does a row's output depend on the row before it, or differ from the row alone?

    Alone it is computed with the model's own attention, so that ours is compared with it, too.
    """
    register()
    model.eval()
    generator = torch.Generator().manual_seed(0)
    first, other, second = (
        torch.randint(3, model.config.get_text_config().vocab_size, (length,), generator=generator)
        for length in (9, 9, 7)
    )
    alone = model(input_ids=second[None].to(model.device), use_cache=False).logits[0].float()
    try:
        with attention(model, NAME):
            logits = [_packed_logits(model, [row, second])[-7:] for row in (first, other)]
    except TypeError as error:
        return f"its attention does not take rows of several lengths ({error})"
    scale = alone.abs().max()
    tolerance = LEAK_TOLERANCE if model.dtype == torch.float32 else LOW_PRECISION_TOLERANCE
    if (logits[0] - logits[1]).abs().max() > tolerance * scale:
        return "a row was seen to change the one after it"
    if (logits[0] - alone).abs().max() > ALONE_TOLERANCE * scale:
        return "a row among others was seen to differ from the row alone"
    return None


def _packed_logits(model: Any, rows: Sequence[torch.Tensor]) -> torch.Tensor:
    inputs = layout([len(row) for row in rows])
    ids_BT = torch.cat(list(rows))[None].to(model.device)
    positions = inputs["position_ids"].to(model.device)
    output = model(
        input_ids=ids_BT,
        position_ids=positions,
        cu_seq_lens_q=inputs["cu_seq_lens_q"],
        use_cache=False,
    )
    logits: torch.Tensor = output.logits[0].float()
    return logits
