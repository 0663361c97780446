"""The representation autoencoder: [0,1] images <=> standardised latents (arXiv 2510.11690, Sec. 3).

images [B,3,H,W] => encoder => tokens [B,N,C] => standardised => latents [B,C,h,w] => decoder => images [B,3,H',W']
"""

import hashlib
import json
from pathlib import Path
from typing import Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from rae.autoencoder.decoder import Decoder, DecoderConfig
from rae.autoencoder.encoders import Encoder, EncoderConfig, open_encoder
from rae.autoencoder.latents import EPS, LatentStats, map_to_tokens, standardise, tokens_to_map, unstandardise
from rae.config import Config, read_json
from rae.folders import check_kind, checksums, find_folder, load_tensors, save_tensors, write_folder


class RAEConfig(Config):
    """The `config.json` of a saved autoencoder; the weights lie beside it.

    Attributes:
        kind: tells this file from that of a diffusion model.
        encoder: what the encoder is and where it comes from.
        encoder_checksum: `Encoder.checksum`; other weights are refused.
        encoder_included: whether the encoder's weights are in the folder `encoder`.
        decoder: shape of the decoder, in `decoder.safetensors`.
        standardised: whether there are latent statistics, in `statistics.safetensors`.
        latent_eps: variance floor of the standardisation.
        files: SHA-256 of each safetensors file.
    """

    kind: Literal["autoencoder"]
    encoder: EncoderConfig
    encoder_checksum: str
    encoder_included: bool
    decoder: DecoderConfig
    standardised: bool
    latent_eps: PositiveFloat
    files: dict[str, str]


class RAE(nn.Module):
    """encode: z = (E(x) - mean) / sqrt(var + eps);  decode: x = D(z * sqrt(var + eps) + mean) * std_E + mean_E.

    Nothing in it is random and nothing depends on train() or eval(); noise augmentation belongs to decoder training.

    Args:
        encoder: frozen (`load_encoder`).
        decoder: takes the encoder's tokens.
        stats: mean and variance [C,h,w] of the tokens' maps; None: latents are the tokens themselves, not standardised.
        latent_eps: variance floor of the standardisation.

    Attributes:
        encoder, decoder: the two halves.
        latent_mean, latent_var: statistics [C,h,w], float32, or None.
        latent_identity: SHA-256 (hex) of the encoder's weights, its geometry and the statistics: what a diffusion model
            is bound to. The decoder is not in it, so another one for the same latents can be taken.

    Raises:
        ValueError: parts that do not fit each other.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder,
        stats: LatentStats | tuple[Tensor, Tensor] | None,
        *,
        latent_eps: float = EPS,
    ) -> None:
        super().__init__()
        if decoder.config.latent_channels != encoder.width:
            raise ValueError(
                f"the decoder takes tokens of {decoder.config.latent_channels} channels, the encoder "
                f"{encoder.config.name} makes {encoder.width}; set latent_channels={encoder.width}."
            )
        self.encoder = encoder
        self.decoder = decoder
        self.latent_eps = latent_eps
        mean, var = (stats.mean, stats.var) if isinstance(stats, LatentStats) else stats or (None, None)
        for name, value in (("mean", mean), ("var", var)):
            if value is not None and tuple(value.shape) != self.latent_shape:
                raise ValueError(
                    f"latent {name} of shape {list(value.shape)} given for latents of {list(self.latent_shape)}; "
                    "statistics belong to one encoder and one image size: compute them again (`rae stats`)."
                )
        self.register_buffer("latent_mean", None if mean is None else mean.float())
        self.register_buffer("latent_var", None if var is None else var.float())
        self.latent_identity = self._latent_identity()

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one latent map."""
        return self.encoder.width, *self.encoder.grid

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the images that `encode` takes."""
        return self.encoder.config.image_size

    @property
    def output_size(self) -> tuple[int, int]:
        """(H', W') of the images that `decode` gives."""
        return self.decoder.config.output_size

    def tokens(self, images: Tensor, *, resize: bool = False) -> Tensor:
        """[0,1] images [B,3,H,W] -> tokens [B,N,C], not standardised; arguments and errors of `Encoder.preprocess`."""
        return self.encoder(images, resize=resize)

    def encode(self, images: Tensor, *, resize: bool = False) -> Tensor:
        """[0,1] images [B,3,H,W] -> standardised latents [B,C,h,w]; arguments and errors of `Encoder.preprocess`."""
        z = tokens_to_map(self.tokens(images, resize=resize), self.encoder.grid)
        return z if self.latent_mean is None else standardise(z, self.latent_mean, self.latent_var, self.latent_eps)

    def decode(self, latents: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standardised latents [B,C,h,w] -> images [B,3,H',W'] around [0,1], not clamped.

        Args:
            latents: as `encode` gives them.
            dtype: what the decoder's matrix products compute in; the result is float32.

        Raises:
            ValueError: latents of another shape.
        """
        if latents.ndim != 4 or tuple(latents.shape[1:]) != self.latent_shape:
            wanted = ["B", *self.latent_shape]
            raise ValueError(f"latents of shape {list(latents.shape)} given to an autoencoder of {wanted}.")
        if self.latent_mean is not None:
            latents = unstandardise(latents, self.latent_mean, self.latent_var, self.latent_eps)
        return self.decode_tokens(map_to_tokens(latents), dtype=dtype)

    def decode_tokens(self, tokens: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """Tokens [B,N,C], not standardised -> images [B,3,H',W'], not clamped; `dtype` as in `decode`."""
        return self.encoder.denormalise(self.decoder(tokens, self.encoder.grid, dtype=dtype))

    def reconstruct(self, images: Tensor, *, resize: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
        """decode(encode(images)): [B,3,H,W] -> [B,3,H',W'], not clamped; arguments as there."""
        return self.decode(self.encode(images, resize=resize), dtype=dtype)

    def save_pretrained(self, folder: str | Path, *, include_encoder: bool = False) -> None:
        """Write `config.json`, `decoder.safetensors` and `statistics.safetensors`: aside first, then renamed.

        Args:
            folder: replaced if it is an autoencoder saved before.
            include_encoder: store the encoder's weights too, so that the folder needs no other source.

        Raises:
            ValueError: the folder exists and is something else; decoder or statistics are not float32, or the
                statistics are no longer those that it was made with.
        """
        write_folder(folder, "autoencoder", lambda aside: self._write(aside, include_encoder))

    def _write(self, folder: Path, include_encoder: bool) -> None:
        save_tensors(self.decoder.state_dict(), folder / "decoder.safetensors")
        if self.latent_mean is not None:
            save_tensors({"mean": self.latent_mean, "var": self.latent_var}, folder / "statistics.safetensors")
        if self._latent_identity() != self.latent_identity:
            raise ValueError(
                "latent_mean or latent_var have changed since this autoencoder was made (rounded by .half()?), so its "
                "latent_identity is no longer true; make it again: RAE(encoder, decoder, (mean, var))."
            )
        config = RAEConfig(
            kind="autoencoder",
            encoder=self.encoder.config,
            encoder_checksum=self.encoder.checksum(),
            encoder_included=include_encoder,
            decoder=self.decoder.config,
            standardised=self.latent_mean is not None,
            latent_eps=self.latent_eps,
            files=checksums(folder),
        )
        if include_encoder:
            self.encoder.save_pretrained(folder / "encoder")
        (folder / "config.json").write_text(config.model_dump_json(indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder_or_hub_id: str | Path, *, encoder: Encoder | None = None) -> "RAE":
        """Load what `save_pretrained` wrote.

        Args:
            folder_or_hub_id: such a folder; a run folder of `rae train-decoder` (its newest checkpoint); or a hub id.
            encoder: take this one instead of fetching it from where the folder says (a folder that has moved).

        Raises:
            ConfigError: a foreign configuration.
            SourceError: not found, or the encoder cannot be had.
            ValueError: a pickle; a run that has saved nothing yet; weights that are damaged, foreign, not float32, or
                of another encoder.
        """
        folder = find_folder(folder_or_hub_id, "an autoencoder")
        check_kind(folder, "autoencoder")
        config = read_json(RAEConfig, folder / "config.json")
        stats = _read_statistics(folder, config)
        decoder = _read_decoder(folder, config)
        if encoder is None:
            encoder = open_encoder(config.encoder, folder / "encoder" if config.encoder_included else None)
        _check_encoder(encoder, config, folder)
        return cls(encoder, decoder, stats, latent_eps=config.latent_eps).requires_grad_(False)

    def _latent_identity(self) -> str:
        stats = None if self.latent_mean is None else (self.latent_mean, self.latent_var)
        return _hash_latent_space(self.encoder.config, self.encoder.checksum(), stats, self.latent_eps)


def saved_latent_identity(folder: str | Path) -> str:
    """`RAE.latent_identity` of a saved autoencoder, from its configuration and statistics: no weights are read.

    Args:
        folder: as in `RAE.from_pretrained`.

    Raises:
        ConfigError: a foreign configuration.
        ValueError: no autoencoder, or its statistics are damaged.
    """
    folder = find_folder(folder, "an autoencoder")
    check_kind(folder, "autoencoder")
    config = read_json(RAEConfig, folder / "config.json")
    stats = _read_statistics(folder, config)
    return _hash_latent_space(config.encoder, config.encoder_checksum, stats, config.latent_eps)


def _hash_latent_space(
    encoder: EncoderConfig, checksum: str, stats: tuple[Tensor, Tensor] | None, latent_eps: float
) -> str:
    geometry = {
        "encoder": checksum,
        "image_size": encoder.image_size,
        "input_size": encoder.input_size,
        "mean": encoder.mean,
        "std": encoder.std,
        "latent_eps": latent_eps if stats else None,
    }
    digest = hashlib.sha256(json.dumps(geometry, sort_keys=True).encode())
    for statistic in stats or ():
        digest.update(statistic.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_decoder(folder_or_hub_id: str | Path) -> Decoder:
    """The decoder of a saved autoencoder, without its encoder; arguments and errors as in `RAE.from_pretrained`."""
    folder = find_folder(folder_or_hub_id, "an autoencoder")
    check_kind(folder, "autoencoder")
    return _read_decoder(folder, read_json(RAEConfig, folder / "config.json"))


def _read_statistics(folder: Path, config: RAEConfig) -> tuple[Tensor, Tensor] | None:
    if not config.standardised:
        return None
    statistics = load_tensors(folder, "statistics.safetensors", config.files)
    return statistics["mean"], statistics["var"]


def _read_decoder(folder: Path, config: RAEConfig) -> Decoder:
    weights = load_tensors(folder, "decoder.safetensors", config.files)
    with torch.device("meta"):
        decoder = Decoder(config.decoder)
    try:
        decoder.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{folder / 'decoder.safetensors'} does not fit its config.json: {error}") from error
    return decoder


def _check_encoder(encoder: Encoder, config: RAEConfig, folder: Path) -> None:
    wanted, found = (c.model_dump(exclude={"name", "source"}) for c in (config.encoder, encoder.config))
    different = [f"{key} {found[key]}, not {wanted[key]}" for key in wanted if found[key] != wanted[key]]
    if different:
        raise ValueError(f"the encoder does not fit {folder}: {'; '.join(different)}. Load it with these settings.")
    if encoder.checksum() != config.encoder_checksum:
        raise ValueError(
            f"the weights of encoder {encoder.config.name} ({encoder.config.source}) have SHA-256 "
            f"{encoder.checksum()[:12]}..., but {folder} was made with {config.encoder_checksum[:12]}...: its latents "
            "would mean something else. Pass the right one: RAE.from_pretrained(folder, encoder=load_encoder(...))."
        )
