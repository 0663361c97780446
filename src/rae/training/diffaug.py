"""Differentiable augmentation of what a discriminator sees: translation, colour, cutout (arXiv 2006.10738)."""

import torch
from torch import Tensor

DRAWS = 7  # uniform numbers for each image
_REACH = 0.125  # of a translation, in units of the image's side


def diffaug(
    images: Tensor, draws: Tensor, *, cutout: float = 0.0, gates: tuple[bool, bool, bool] = (True, True, True)
) -> Tensor:
    """Augment; linear in the image up to its own means, nothing is clamped.

    Args:
        images: [B,3,H,W] in [-1,1]; grey is 0, and what is moved in or cut out is grey.
        draws: [7,B], uniform in [0,1): shift in y and x; brightness, saturation, contrast; place of the cutout in y, x.
        cutout: side of the square that is cut out, in units of the image's side; 0 = none.
        gates: which of translation, colour and cutout are done, for the whole batch.
    """
    shift_y, shift_x, brightness, saturation, contrast, hole_y, hole_x = draws
    if gates[0]:
        images = _translate(images, shift_y, shift_x)
    if gates[1]:
        brightness, saturation, contrast = (r.view(-1, 1, 1, 1) for r in (brightness, saturation, contrast))
        images = images + (brightness - 0.5)
        grey = images.mean(1, keepdim=True)
        images = (images - grey) * (2 * saturation) + grey
        mean = images.mean((1, 2, 3), keepdim=True)
        images = (images - mean) * (contrast + 0.5) + mean
    if gates[2] and cutout:
        images = images * _holes(images.shape[2:], hole_y, hole_x, cutout)[:, None]
    return images


def _translate(images: Tensor, *draws: Tensor) -> Tensor:
    """out[y,x] = in[y + dy, x + dx], 0 outside; dy uniform in -d..d with d = round(H / 8), dx likewise."""
    for axis, r in zip((2, 3), draws):
        side = images.shape[axis]
        reach = round(side * _REACH)
        offset = (r * (2 * reach + 1)).floor().long() - reach  # [B]
        source = torch.arange(side, device=images.device) + offset[:, None]  # [B,side]
        shape = [len(images), 1, 1, 1]
        shape[axis] = side
        inside = ((source >= 0) & (source < side)).view(shape)
        index = source.clamp(0, side - 1).view(shape).expand(images.shape)
        images = images.gather(axis, index) * inside
    return images


def _holes(size: tuple[int, int], hole_y: Tensor, hole_x: Tensor, cutout: float) -> Tensor:
    """[B,H,W], 0 in a rectangle of `cutout` times the sides around a random place, 1 elsewhere."""
    inside = []
    for side, r in zip(size, (hole_y, hole_x)):
        length = round(side * cutout)
        start = (r * (side + 1 - length % 2)).floor().long()[:, None] - length // 2
        at = torch.arange(side, device=r.device)
        # the last pixel that it covers is clamped into the image, as is the first
        inside.append((at >= start.clamp(0, side - 1)) & (at <= (start + length - 1).clamp(0, side - 1)) & (length > 0))
    return 1.0 - (inside[0][:, :, None] & inside[1][:, None, :]).float()
