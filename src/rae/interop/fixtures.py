"""Reference cases on disk: what a case is, and the models that its own files describe.

    case.json              "case" (what it is), "hyperparameters", "tensors" (name -> role, ...), "tolerance"
    tensors.safetensors    inputs and expected outputs
    weights*.safetensors   weights under the published key names, where there are any

Everything comes from these files, so that cases of other sizes and seeds work as well.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rae.autoencoder.decoder import Decoder, DecoderConfig
from rae.autoencoder.encoders import Encoder, EncoderConfig, load_encoder
from rae.autoencoder.rae import RAE
from rae.diffusion.flow import Flow, shift_factor
from rae.diffusion.model import DiffusionModel
from rae.evaluation.pretrained import dino_keys, write_dino
from rae.interop.official import convert_decoder, convert_discriminator, convert_stage2
from rae.training.discriminator import Discriminator


class FixtureError(ValueError):
    """A folder that is not one of fixtures, or a case that cannot be read."""


@dataclass(frozen=True)
class Case:
    """One case.

    Attributes:
        kind: "case" of its case.json, such as "ditdh_qknorm".
        folder: where it lies.
        hyper: its "hyperparameters".
        inputs, expected: its tensors by role.
        default_limit, limits: largest error allowed, for all outputs and for single ones.
    """

    kind: str
    folder: Path
    hyper: dict
    inputs: dict[str, Tensor]
    expected: dict[str, Tensor]
    default_limit: float
    limits: dict[str, float]

    @classmethod
    def read(cls, folder: Path) -> "Case":
        """Raises FixtureError if a file or an entry of case.json is missing or damaged."""
        try:
            content = json.loads((folder / "case.json").read_text())
            tensors = load_file(folder / "tensors.safetensors")
            roles = {name: entry["role"] for name, entry in content["tensors"].items()}
            case = cls(
                kind=content["case"],
                folder=folder,
                hyper=content["hyperparameters"],
                inputs={name: tensors[name] for name, role in roles.items() if role == "input"},
                expected={name: tensors[name] for name, role in roles.items() if role == "output"},
                default_limit=float(content["tolerance"]["default"]),
                limits={name: float(limit) for name, limit in content["tolerance"].get("per_tensor", {}).items()},
            )
        except (OSError, SafetensorError, KeyError, ValueError, AttributeError, TypeError) as error:
            raise FixtureError(f"{folder} is not a complete case: {type(error).__name__} {error}.") from error
        if not case.expected:
            raise FixtureError(f"{folder}: case.json names no tensor of role 'output', so there is nothing to check.")
        return case

    @property
    def latent_statistics(self) -> tuple[Tensor, Tensor]:
        return self.inputs["latent_mean"], self.inputs["latent_var"]

    @property
    def shift(self) -> float:
        return shift_factor(self.hyper["time_shift"]["dim"], self.hyper["time_shift"]["base"])

    def encoder(self, images: Tensor) -> Encoder:
        """The encoder, for images of this size, from a folder like those that transformers writes."""
        hyper = self.hyper
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(hyper["encoder_config"]))
            weights = load_file(self.folder / "weights.safetensors")
            save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})
            return load_encoder(
                folder,
                image_size=tuple(images.shape[2:]),
                input_size=hyper["encoder_input_size"],
                mean=hyper["image_mean"],
                std=hyper["image_std"],
            )

    def decoder(self) -> Decoder:
        return convert_decoder(
            self.folder / "weights.safetensors",
            heads=self.hyper["decoder_num_attention_heads"],
            norm_eps=self.hyper["layer_norm_eps"],
        )

    def weights(self) -> dict[str, Tensor]:
        return load_file(self.folder / "weights.safetensors")

    def discriminator(self) -> Discriminator:
        """With the case's heads, on the case's DINO."""
        hyper, side = self.hyper, self.hyper["internal_size"]
        dino = dino_keys(load_file(self.folder / "weights_dino.safetensors"))
        with tempfile.TemporaryDirectory() as folder:
            write_dino(dino, Path(folder), heads=hyper["num_heads"], norm_eps=hyper["norm_eps"])
            network = load_encoder(folder, image_size=side)
        model = Discriminator(network, depths=hyper["key_depths"], kernel=hyper["kernel_size"])
        convert_discriminator(model, self.weights())
        return model

    def autoencoder(
        self, encoder: Encoder, decoder: Decoder | None = None, stats: tuple[Tensor, Tensor] | None = None
    ) -> RAE:
        """With an untrained decoder if none is given: encoding does not use it."""
        if decoder is None:
            shape = {"width": 4, "depth": 1, "heads": 1, "mlp_width": 4, "patch_size": 1}
            decoder = Decoder(DecoderConfig(latent_channels=encoder.width, grid=encoder.grid, **shape))
        return RAE(encoder, decoder, stats, latent_eps=self.hyper["latent_normalization_eps"])

    def diffusion_model(self, hyper: dict, flow: Flow, weights: str = "weights") -> DiffusionModel:
        """The DiT or DiT-DH with these of the case's hyperparameters."""
        return convert_stage2(
            self.folder / f"{weights}.safetensors",
            flow=flow,
            head_depth=hyper["depth"][1] if isinstance(hyper["depth"], list) else None,
            mlp_ratio=hyper["mlp_ratio"],
        )


def untrained_encoder(latent_shape: tuple[int, int, int], mean: list[float], std: list[float]) -> Encoder:
    """An encoder with random weights, for decoding: of an encoder, that needs the image's mean and std alone."""
    width, *grid = latent_shape
    settings = {"num_hidden_layers": 1, "num_attention_heads": 1, "image_size": grid[0], "patch_size": 1}
    network = transformers.Dinov2Model(transformers.Dinov2Config(hidden_size=width, **settings))
    config = EncoderConfig(
        name="untrained",
        source="none",
        family="dinov2",
        width=width,
        depth=1,
        heads=1,
        patch_size=1,
        prefix_tokens=1,
        norm_eps=1e-6,
        mean=mean,
        std=std,
        image_size=grid,
        input_size=grid,
    )
    return Encoder(network, config)
