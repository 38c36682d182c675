"""A linear layer and its LoRA as one operation, whose input is kept once for the backward pass.

PEFT's layer casts its input to the adapter's precision and back, keeps that copy in every layer,
and adds an output and a gradient of full size together for the adapter alone. Here the matrices of
the adapter go straight into what the base layer has made. With Y = X Wᵀ + b + s (X Aᵀ) Bᵀ and
G = ∂loss/∂Y (Hu et al. 2021, arXiv 2106.09685, differentiated by hand):

    H = X Aᵀ    ∂X = G W + s (G B) A    ∂A = s (G B)ᵀ X    ∂B = s Gᵀ H

Tensor suffixes: N rows (all but the last dimension), I inputs, O outputs, R rank.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from peft.tuners.lora import Linear, LoraLayer
from torch import nn
from torch.nn import functional


class OneStepLinear(Linear):  # type: ignore[misc]
    """PEFT's LoRA layer on an `nn.Linear`; while it learns, computed as one operation.

    Where anything but one plain LoRA acts (DoRA, dropout, several adapters, one that is merged),
    and where nothing learns, it is PEFT's own.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        dtype = _dtype_of_arithmetic(x)
        if args or kwargs or dtype is None or not self._is_plain(dtype):
            result: torch.Tensor = super().forward(x, *args, **kwargs)
            return result
        (name,) = self.active_adapters
        base = self.base_layer
        found: torch.Tensor = _LowRank.apply(  # type: ignore[no-untyped-call]
            x,
            _CASTS.of(x, dtype),
            base.weight,
            base.bias,
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            self.scaling[name],
        )
        return found

    def _is_plain(self, dtype: torch.dtype) -> bool:
        """Whether Y is the formula above, and all of it may be computed in `dtype`."""
        names = self.active_adapters
        if self.disable_adapters or self.merged or len(names) != 1 or names[0] not in self.lora_A:
            return False
        name = names[0]
        dropout = self.lora_dropout[name]
        weights = (self.base_layer.weight, self.lora_A[name].weight)
        return (
            torch.is_grad_enabled()
            and weights[1].requires_grad
            and not weights[0].requires_grad
            and name not in self.lora_variant
            and not self.lora_bias[name]
            and (isinstance(dropout, nn.Identity) or not dropout.training)
            and (
                torch.is_autocast_enabled(weights[0].device.type)
                or all(weight.dtype == dtype for weight in weights)
            )
        )


def in_one_step(layer: LoraLayer) -> None:
    """Make a layer that PEFT has put on an `nn.Linear` a `OneStepLinear`; any other stays."""
    if type(layer) is Linear and type(layer.base_layer) is nn.Linear:
        layer.__class__ = OneStepLinear


def _dtype_of_arithmetic(x: torch.Tensor) -> torch.dtype | None:
    """Of a product with `x`; None if `x` has no floating-point numbers."""
    if not x.is_floating_point():
        return None
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _Casts:
    """The last tensor that was cast: layers with the same input (query, key, value) share it."""

    def __init__(self) -> None:
        self._source: weakref.ref[torch.Tensor] | None = None
        self._cast: weakref.ref[torch.Tensor] | None = None
        self._version = 0

    def of(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`x` in `dtype`, outside of the graph."""
        if x.dtype == dtype:
            return x.detach()
        cast = self._cast() if self._cast else None
        same = self._source is not None and self._source() is x and self._version == x._version
        if cast is None or not same or cast.dtype != dtype:
            cast = x.detach().to(dtype)
            self._source, self._cast = weakref.ref(x), weakref.ref(cast)
            self._version = x._version
        return cast


_CASTS = _Casts()


class _LowRank(torch.autograd.Function):
    """Y of the formula above; `W` and `b` are frozen. All arithmetic is in the dtype of `x`."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        source: torch.Tensor,
        x: torch.Tensor,
        W: torch.Tensor,
        b: torch.Tensor | None,
        A: torch.Tensor,
        B: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """`x` is `source`, to which the gradient goes, in the dtype of the arithmetic."""
        dtype = x.dtype
        with torch.autocast(x.device.type, enabled=False):
            y = functional.linear(x, W.to(dtype), None if b is None else b.to(dtype))
            hidden = functional.linear(x, A.to(dtype))
            y_NO, hidden_NR = y.view(-1, y.shape[-1]), hidden.view(-1, hidden.shape[-1])
            y_NO.addmm_(hidden_NR, B.to(dtype).T, alpha=scale)
        ctx.save_for_backward(x, hidden_NR, W, A, B)
        ctx.scale, ctx.source_dtype = scale, source.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, hidden_NR, W, A, B = ctx.saved_tensors
        dtype = x.dtype
        G_NO = gradients[0].to(dtype).reshape(-1, W.shape[0])
        x_NI = x.reshape(-1, W.shape[1])
        through_NR = (G_NO @ B.to(dtype)).mul_(ctx.scale)
        of_x = of_A = of_B = None
        if ctx.needs_input_grad[0]:
            of_x_NI = (G_NO @ W.to(dtype)).addmm_(through_NR, A.to(dtype))
            of_x = of_x_NI.view(x.shape).to(ctx.source_dtype)
        if ctx.needs_input_grad[4]:
            of_A = (through_NR.T @ x_NI).to(A.dtype)
        if ctx.needs_input_grad[5]:
            of_B = (G_NO.T @ hidden_NR).to(B.dtype).mul_(ctx.scale)
        return of_x, None, None, None, of_A, of_B, None
