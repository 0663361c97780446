"""PSNR and SSIM of reconstructions, per image, on [0,1] images [B,3,H,W]."""

import torch
from torch import Tensor

WINDOW = 11  # pixels per side of SSIM's Gaussian window
SIGMA = 1.5  # its standard deviation in pixels


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """-10 log10(max(mean((x - y)^2), 1e-10)), so equal images have 100 dB.

    Args:
        images, references: [B,C,H,W] in [0,1]. Published figures are of 8-bit images: quantise first to compare.

    Returns:
        decibels [B], float64.
    """
    x, y = _checked(images, references)
    error = (x - y).square().mean((1, 2, 3))
    return -10 * error.clamp(min=1e-10).log10()


def ssim(images: Tensor, references: Tensor) -> Tensor:
    """Mean over pixels and channels of (2 m_x m_y + c1)(2 s_xy + c2) / ((m_x^2 + m_y^2 + c1)(s_x^2 + s_y^2 + c2)).

    Local means m, variances s^2 and covariance s_xy are under a Gaussian window (11 pixels, sigma 1.5) that lies wholly
    inside the image; c1 = 0.01^2, c2 = 0.03^2. Wang et al. 2004, IEEE Trans. Image Process. 13(4), Sec. III-B.

    Args:
        images, references: [B,C,H,W] in [0,1], at least 11 x 11.

    Returns:
        similarity [B] in [-1,1], float64.
    """
    x, y = _checked(images, references)
    if min(x.shape[2:]) < WINDOW:
        raise ValueError(f"SSIM's window is {WINDOW} x {WINDOW} pixels, the images are {x.shape[2]} x {x.shape[3]}.")
    # all five local moments at once: [B,C,H,W] x 5 -> [5,B,C,H-10,W-10]
    mx, my, mxx, myy, mxy = _blur(torch.stack([x, y, x * x, y * y, x * y]))
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mx * my + c1) / (mx * mx + my * my + c1)
    structure = (2 * (mxy - mx * my) + c2) / ((mxx - mx * mx) + (myy - my * my) + c2)
    return (luminance * structure).mean((1, 2, 3))


def _blur(x: Tensor) -> Tensor:
    """Weighted sums of 11 shifted slices along each axis: [...,H,W] -> [...,H-10,W-10]; conv2d in float64 is slow."""
    offsets = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    weights = (-offsets.square() / (2 * SIGMA**2)).exp()
    weights = (weights / weights.sum()).tolist()
    for axis in (-2, -1):
        size = x.shape[axis] - WINDOW + 1
        total = x.narrow(axis, 0, size) * weights[0]
        for start in range(1, WINDOW):
            total.add_(x.narrow(axis, start, size), alpha=weights[start])
        x = total
    return x


def _checked(images: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    if images.ndim != 4 or images.shape != references.shape:
        raise ValueError(f"two batches [B,C,H,W] of one shape, got {list(images.shape)}, {list(references.shape)}.")
    for name, x in (("images", images), ("references", references)):
        low, high = (v.item() for v in x.aminmax())
        if not (low >= 0 and high <= 1):  # NaN lands here too
            raise ValueError(f"{name} are in [{low:.4g}, {high:.4g}], not in [0, 1]; clamp a decoder's output first.")
    # variances as differences of moments need float64, which not every device has
    device = images.device if images.device.type in ("cpu", "cuda") else "cpu"
    return images.to(device, torch.float64), references.to(device, torch.float64)
