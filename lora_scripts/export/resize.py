"""A LoRA's update at a lower rank: the nearest matrix of that rank (Eckart & Young 1936)."""

from __future__ import annotations

from dataclasses import replace

import torch

from lora_scripts.models.lora import AdaptedLayer


def truncated(layer: AdaptedLayer, rank: int) -> tuple[AdaptedLayer, torch.Tensor]:
    """The layer with the largest `rank` singular values of up @ down; all of them, descending.

    The factors are decomposed, not the product, so that the cost is that of the rank. The scale
    alpha / rank is kept; a layer of that rank or below is returned as it is.
    """
    up_OR, down_RI = layer.up.flatten(1).double(), layer.down.flatten(1).double()
    left_OR, left_RR = torch.linalg.qr(up_OR)
    right_IR, right_RR = torch.linalg.qr(down_RI.T)
    inner_U, values_R, inner_V = torch.linalg.svd(left_RR @ right_RR.T)
    if layer.rank <= rank:
        return layer, values_R
    root = values_R[:rank].sqrt()
    up = (left_OR @ inner_U[:, :rank]) * root
    down = root[:, None] * (inner_V[:rank] @ right_IR.T)
    return (
        replace(
            layer,
            up=up.float().reshape(layer.up.shape[0], rank, *layer.up.shape[2:]),
            down=down.float().reshape(rank, *layer.down.shape[1:]),
            alpha=layer.alpha * rank / layer.rank,
        ),
        values_R,
    )
