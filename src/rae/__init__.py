"""Representation autoencoders and the diffusion transformers in their latent space (arXiv 2510.11690).

Names are imported on first use, so that `import rae` touches neither torch nor the network.
"""

import importlib

_HOMES = {
    "RAE": "rae.autoencoder.rae",
    "Decoder": "rae.autoencoder.decoder",
    "DecoderConfig": "rae.autoencoder.decoder",
    "Encoder": "rae.autoencoder.encoders",
    "LatentStats": "rae.autoencoder.latents",
    "load_encoder": "rae.autoencoder.encoders",
    "DiT": "rae.diffusion.dit",
    "DiTConfig": "rae.diffusion.dit",
    "DiTDH": "rae.diffusion.dit",
    "DiTDHConfig": "rae.diffusion.dit",
    "DiffusionModel": "rae.diffusion.model",
    "Flow": "rae.diffusion.flow",
    "AutoGuidance": "rae.diffusion.guidance",
    "CFG": "rae.diffusion.guidance",
    "generate": "rae.diffusion.sampling",
    "load_images": "rae.data.pictures",
    "save_image": "rae.data.pictures",
}
__all__ = sorted(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'rae' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
