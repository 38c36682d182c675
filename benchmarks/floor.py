"""The least that a step can take: its arithmetic, at the rate of this machine's matrix products.

Counted are the products of a forward pass and of a backward pass that leaves the frozen weights
out (2/3 of full training), by PyTorch's own counter; the rate is that of one large product.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

SIDE, PRODUCTS = 4096, 8


def arithmetic(step: Callable[[], object]) -> int:
    """Floating-point operations (a multiplication and an addition are two) of what `step` does."""
    import torch
    from torch.utils import flop_counter

    aten = torch.ops.aten

    def forward(q: Any, k: Any, v: Any, *others: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return int(flop_counter.sdpa_flop_count(q, k, v))

    def backward(
        grad: Any, q: Any, k: Any, v: Any, *others: Any, out_shape: Any = None, **kwargs: Any
    ) -> int:
        return int(flop_counter.sdpa_backward_flop_count(grad, q, k, v))

    mapping = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    counter = flop_counter.FlopCounterMode(display=False, custom_mapping=mapping)
    with counter:
        step()
    return int(counter.get_total_flops())


def rate() -> float:
    """Operations a second in a product of two square bfloat16 matrices; the best of some."""
    import torch

    one, other = (torch.randn(SIDE, SIDE).to(torch.bfloat16) for _ in range(2))
    least = float("inf")
    for _ in range(PRODUCTS):
        began = time.perf_counter()
        torch.mm(one, other)
        least = min(least, time.perf_counter() - began)
    return 2 * SIDE**3 / least
