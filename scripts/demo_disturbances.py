"""Draw the demo's drawings again in other hands, so that a captioner learns things, not styles.

Used by `build_demo_captioner.py`. Everything here draws random numbers from torch's global
generator; with the same seed the same pictures come out.

Ink is 1 - brightness: 0 where the paper is white. Shapes: B batch, C colours, H W height and width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

SIDE = 64  # of a drawing


def disturb(pixels_BCHW: Tensor) -> Tensor:
    """Bytes to pictures in [-2, 0], each moved and drawn in another manner, on white, which is 0.

    The work is done on ink, 0 where the paper is white and 1 at most. The batch must be in random
    order: a picture's manner goes by its place.
    """
    ink_BCHW = moved(1 - pixels_BCHW.float() / 255)
    manners = (coloured, coloured, grey, inked, inked, inked, inked)
    parts = [manner(ink_BCHW[i :: len(manners)]) for i, manner in enumerate(manners)]
    ink_BCHW = torch.cat(parts).clamp(0, 1)
    return -2 * erased(worn(ink_BCHW[restored_order(len(ink_BCHW), len(manners))]))


def restored_order(count: int, parts: int) -> Tensor:
    """Indices that undo the concatenation of the slices [i::parts], (count,)."""
    return torch.cat([torch.arange(count)[i::parts] for i in range(parts)]).argsort()


def uniform(count: int, low: float, high: float) -> Tensor:
    """One number for each picture, (B, 1, 1, 1)."""
    return low + (high - low) * torch.rand(count, 1, 1, 1)


def moved(ink_BCHW: Tensor) -> Tensor:
    """Each picture mirrored, turned, stretched and shifted a little."""
    count = len(ink_BCHW)
    angle_B = 0.25 * torch.randn(count).clamp(-2, 2)
    width_B, height_B = (0.85 + 0.4 * torch.rand(count, 1) + 0.12 * torch.randn(count, 2)).unbind(1)
    mirror_B = torch.where(torch.rand(count) < 0.5, -1.0, 1.0)
    shift_B2 = 0.24 * torch.rand(count, 2) - 0.12
    rows = (
        torch.stack(
            [angle_B.cos() * width_B * mirror_B, -angle_B.sin() * width_B, shift_B2[:, 0]], 1
        ),
        torch.stack(
            [angle_B.sin() * height_B * mirror_B, angle_B.cos() * height_B, shift_B2[:, 1]], 1
        ),
    )
    grid = F.affine_grid(torch.stack(rows, 1), list(ink_BCHW.shape), align_corners=False)
    return F.grid_sample(ink_BCHW, grid, align_corners=False)


def coloured(ink_BCHW: Tensor) -> Tensor:
    """Other contrast and other colours: the channels in another order, each of another strength."""
    count = len(ink_BCHW)
    order_BC = torch.rand(count, 3).argsort(1)
    keep_B = torch.rand(count) < 0.5
    order_BC[keep_B] = torch.arange(3)
    ink_BCHW = ink_BCHW.gather(1, order_BC[:, :, None, None].expand_as(ink_BCHW))
    return ink_BCHW * (0.7 + 0.5 * torch.rand(count, 3, 1, 1))


def grey(ink_BCHW: Tensor) -> Tensor:
    """One random mixture of the channels, in other contrast, sometimes dark for light."""
    count = len(ink_BCHW)
    share_BC = torch.rand(count, 3, 1, 1)
    grey_B1HW = (ink_BCHW * share_BC / share_BC.sum(1, keepdim=True)).sum(1, keepdim=True)
    grey_B1HW = grey_B1HW.pow(uniform(count, 0.4, 1.8)) * uniform(count, 0.7, 1.3)
    negative_B1HW = silhouette(ink_BCHW) * (1 - grey_B1HW.clamp(0, 1)) + outline(ink_BCHW)
    return torch.where(torch.rand(count, 1, 1, 1) < 0.3, negative_B1HW, grey_B1HW).expand_as(
        ink_BCHW
    )


def inked(ink_BCHW: Tensor) -> Tensor:
    """In black and white: some areas filled, with lines between areas.

    An area is filled by its colour, at random; or none is, or all are. Lines on white are black;
    those within what is filled are white or not drawn.
    """
    count = len(ink_BCHW)
    whole_B1HW = silhouette(ink_BCHW)
    fill = torch.rand(count, 1, 1, 1)
    filled_B1HW = torch.where(
        fill < 0.25, 0.0, torch.where(fill < 0.4, 1.0, areas(ink_BCHW, whole_B1HW))
    )
    filled_B1HW = filled_B1HW * whole_B1HW
    lines_B1HW = torch.where(
        torch.rand(count, 1, 1, 1) < 0.5, lines(ink_BCHW, 3), lines(ink_BCHW, 5)
    )
    black_B1HW = torch.maximum(filled_B1HW, lines_B1HW)
    crossed_B1HW = filled_B1HW + lines_B1HW - 2 * filled_B1HW * lines_B1HW
    crossed_B1HW = torch.maximum(crossed_B1HW, outline(ink_BCHW))
    crossed = (torch.rand(count, 1, 1, 1) < 0.6) | ((fill >= 0.25) & (fill < 0.4))
    return torch.where(crossed, crossed_B1HW, black_B1HW).expand_as(ink_BCHW)


def silhouette(ink_BCHW: Tensor) -> Tensor:
    """1 where anything is drawn, (B, 1, H, W)."""
    return ((ink_BCHW.amax(1, keepdim=True) - 0.06) * 16).clamp(0, 1)


def areas(ink_BCHW: Tensor, whole_B1HW: Tensor) -> Tensor:
    """1 on one side of a random plane through the colours of each picture, (B, 1, H, W)."""
    count = len(ink_BCHW)
    value_B1HW = (ink_BCHW * F.normalize(torch.randn(count, 3, 1, 1), dim=1)).sum(1, keepdim=True)
    weight_B = whole_B1HW.sum((1, 2, 3), keepdim=True) + 1
    mean_B = (value_B1HW * whole_B1HW).sum((1, 2, 3), keepdim=True) / weight_B
    spread_B1HW = (value_B1HW - mean_B) * whole_B1HW
    deviation_B = (spread_B1HW.square().sum((1, 2, 3), keepdim=True) / weight_B).sqrt() + 0.02
    return (spread_B1HW / deviation_B * 4 + 4 * torch.randn(count, 1, 1, 1) + 0.5).clamp(0, 1)


def lines(ink_BCHW: Tensor, width: int) -> Tensor:
    """1 where a colour changes, `width` (an odd number of) pixels wide, (B, 1, H, W)."""
    most_BCHW, least_BCHW = ink_BCHW, ink_BCHW
    for _ in range(width // 2):
        most_BCHW, least_BCHW = grown(most_BCHW), shrunk(least_BCHW)
    return ((most_BCHW - least_BCHW).amax(1, keepdim=True) * 5 - 0.5).clamp(0, 1)


def grown(ink_BCHW: Tensor) -> Tensor:
    """The most ink among each pixel and its eight neighbours (much faster than max_pool2d)."""
    for sides in ((1, 1, 0, 0), (0, 0, 1, 1)):
        padded_BCHW, dim = F.pad(ink_BCHW, sides), 3 if sides[0] else 2
        parts = [padded_BCHW.narrow(dim, start, SIDE) for start in (0, 2)]
        ink_BCHW = torch.maximum(torch.maximum(*parts), ink_BCHW)
    return ink_BCHW


def shrunk(ink_BCHW: Tensor) -> Tensor:
    """The least ink among each pixel and its eight neighbours, white around the picture."""
    for sides in ((1, 1, 0, 0), (0, 0, 1, 1)):
        padded_BCHW, dim = F.pad(ink_BCHW, sides), 3 if sides[0] else 2
        parts = [padded_BCHW.narrow(dim, start, SIDE) for start in (0, 2)]
        ink_BCHW = torch.minimum(torch.minimum(*parts), ink_BCHW)
    return ink_BCHW


def outline(ink_BCHW: Tensor) -> Tensor:
    """1 along the inner edge of the silhouette, (B, 1, H, W)."""
    whole_B1HW = silhouette(ink_BCHW)
    return whole_B1HW - shrunk(whole_B1HW)


def worn(ink_BCHW: Tensor) -> Tensor:
    """Some pictures with fatter strokes, some with finer ones, some blurred."""
    draw_B = torch.rand(len(ink_BCHW))
    ink_BCHW = ink_BCHW.clone()
    for low, high, manner in ((0.0, 0.2, grown), (0.2, 0.3, shrunk), (0.3, 0.45, blurred)):
        chosen_B = (low <= draw_B) & (draw_B < high)
        ink_BCHW[chosen_B] = manner(ink_BCHW[chosen_B])
    return ink_BCHW


def blurred(ink_BCHW: Tensor) -> Tensor:
    """The mean of each pixel and its eight neighbours."""
    return F.avg_pool2d(ink_BCHW, 3, 1, 1)


def erased(ink_BCHW: Tensor) -> Tensor:
    """A third of the pictures with a rectangle rubbed out."""
    count, place = len(ink_BCHW), torch.arange(SIDE)
    start_2B1, length_2B1 = torch.rand(2, count, 1) * SIDE, 8 + torch.rand(2, count, 1) * 20
    inside_2BS = (place >= start_2B1) & (place < start_2B1 + length_2B1)
    inside_BHW = inside_2BS[0][:, :, None] & inside_2BS[1][:, None, :]
    inside_BHW &= (torch.rand(count) < 0.33)[:, None, None]
    return ink_BCHW.masked_fill(inside_BHW[:, None], 0.0)
