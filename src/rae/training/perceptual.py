"""A perceptual distance for decoder training, in the feature space of the encoder itself."""

import torch
import torch.nn.functional as F

from rae.autoencoder.encoders import Encoder


def feature_distance(encoder: Encoder, decoded: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """d(x, y) = mean over (N, C) of (E(x) - E(y))^2, with E's affine-free final norm: 2 for unrelated images.

    No other network is needed, and the tokens of the original are at hand already; LPIPS is the paper's choice.

    Args:
        encoder: frozen; the gradient goes through it to `decoded`.
        decoded: reconstructions [B,3,H,W] in the encoder's normalised units, as the decoder puts them out.
        tokens: of the originals [B,N,C], without noise.

    Returns:
        One distance for each image, [B].
    """
    if tuple(decoded.shape[2:]) != encoder.config.input_size:  # as `Encoder.preprocess` resizes the originals
        decoded = F.interpolate(decoded, encoder.config.input_size, mode="bicubic", align_corners=False)
    return (encoder.features(decoded) - tokens).square().mean(dim=(1, 2))
