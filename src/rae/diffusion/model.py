"""A diffusion model as people keep it: the network, its flow, and the latent space and classes it was trained on."""

import difflib
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rae.config import Config, read_json
from rae.diffusion.dit import DiTConfig, DiTDHConfig, build
from rae.diffusion.flow import Flow
from rae.folders import check_kind, checksums, find_folder, load_tensors, save_tensors, write_folder

WEIGHTS = "model.safetensors"


class DiffusionModelConfig(Config):
    """What a model is, apart from its weights.

    Attributes:
        network: a DiT or DiT-DH, told apart by its `kind`.
        flow: prediction, training times, shift.
        latent_identity: checksum of the latent space it was trained in (`RAE.latent_identity`); None if unknown.
        class_names: one per class, or None.
        drop_labels: how often the null label took a label's place in training; at 0 it was never trained, and images
            of no class cannot be had. None if unknown.
    """

    network: Annotated[DiTConfig | DiTDHConfig, pydantic.Field(discriminator="kind")]
    flow: Flow
    latent_identity: str | None = None
    class_names: tuple[str, ...] | None = None
    drop_labels: float | None = pydantic.Field(None, ge=0, le=1)

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Self:
        names, classes = self.class_names, self.network.num_classes
        if names is not None and len(names) != classes:
            raise ValueError(f"{len(names)} class names for {classes} classes; give one each, or none.")
        return self


class _SavedConfig(DiffusionModelConfig):
    """The `config.json` of a saved model; `files` is the SHA-256 of each safetensors file."""

    kind: Literal["diffusion model"]
    files: dict[str, str]


class DiffusionModel(nn.Module):
    """Velocity of the latents: `model(x, t, y) -> v`, whatever its network predicts.

    Args:
        config: what is saved beside the weights.
        dtype: of the network's matrix products, float32 or bfloat16; parameters stay float32.
    """

    def __init__(self, config: DiffusionModelConfig, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.network = build(config.network)

    @property
    def flow(self) -> Flow:
        return self.config.flow

    @property
    def null_label(self) -> int:
        return self.network.null_label

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return (self.config.network.in_channels, *self.config.network.grid)

    @property
    def device(self) -> torch.device:
        return self.network.position.device

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Velocity at noisy latents x [B,C,h,w], shifted times t [B], labels y [B] (`null_label` for none)."""
        return self.flow.velocity(self.predict)(x, t, y)

    def predict(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The network's own output, in the flow's `prediction`: what `Flow.loss` is about."""
        return self.network(x, t, y, dtype=self.dtype)

    def label_indices(self, labels: Sequence[int] | Sequence[str]) -> Tensor:
        """Class names or indices -> indices [B]; an unknown one is an error that names the nearest.

        A name is the whole of it ("tench, Tinca tinca"); what stands between its commas is offered in the error.
        """
        names, classes = self.config.class_names, self.config.network.num_classes
        if classes == 0:
            raise ValueError("this model is unconditional: it knows no classes; give labels=None.")
        if isinstance(labels, str):
            raise ValueError(f"labels {labels!r} is one string; give a list with one class per image.")
        found = []
        for label in labels:
            if isinstance(label, str):
                if names is None:
                    raise ValueError(f"class {label!r}: this model has no class names; give indices 0..{classes - 1}.")
                if label not in names:
                    raise ValueError(f"class {label!r} is not among the {classes} of this model; {_hint(label, names)}")
                label = names.index(label)
            if not 0 <= label < classes:
                raise ValueError(f"class {label}: this model has {classes} classes, 0..{classes - 1}.")
            found.append(operator.index(label))
        return torch.tensor(found, dtype=torch.int64)

    def check_autoencoder(self, rae) -> None:
        """Raise ValueError unless `rae` has the latent space that this model was trained in."""
        if rae.latent_shape != self.latent_shape:
            raise ValueError(
                f"the autoencoder's latents are {rae.latent_shape}, the model wants {self.latent_shape} (C, h, w)."
            )
        identity = self.config.latent_identity
        if identity is not None and rae.latent_identity != identity:
            raise ValueError(
                f"the diffusion model was trained in latent space {identity[:12]}, this autoencoder's is "
                f"{rae.latent_identity[:12]}: another encoder, image size or other latent statistics. Use the "
                "autoencoder it was trained with; only the decoder may differ."
            )

    def check_classes(self, other: "DiffusionModel") -> None:
        """Raise ValueError unless a label means the same to `other`, which this model is to guide."""
        mine, theirs = self.config, other.config
        if self.null_label != other.null_label:
            raise ValueError(
                f"the guiding model has {self.null_label} classes, the guided one {other.null_label}: their labels "
                "mean different things; guide with a model trained on the same classes."
            )
        if mine.class_names and theirs.class_names and mine.class_names != theirs.class_names:
            first = next(pair for pair in zip(mine.class_names, theirs.class_names) if pair[0] != pair[1])
            raise ValueError(
                f"the guiding model's classes are not the guided one's: where it has {first[0]!r} the other has "
                f"{first[1]!r}; guide with a model trained on the same classes."
            )

    @torch.no_grad()
    def start_from(self, other: "DiffusionModel") -> list[str]:
        """Take over another model's weights, for other classes, another resolution or another latent space.

        The networks must be alike but for grid and classes. Positions are resized bicubically to this grid. A class
        takes the embedding of the class of its name; where one of the models has no names, of its number if there are
        as many. A class that the other model does not know begins as that one's null class.

        Returns:
            What was not taken over as it is, in words.

        Raises:
            ValueError: networks of another kind, size or prediction, with what to write in a recipe.
        """
        mine, theirs, said = self.config, other.config, []
        _check_alike(mine, theirs)
        state = other.network.state_dict()
        if mine.latent_identity != theirs.latent_identity:
            spaces = (str(identity)[:12] for identity in (theirs.latent_identity, mine.latent_identity))
            said.append(f"the latent space (encoder, image size, latent statistics) is another: {' -> '.join(spaces)}")
        if mine.flow.shift != theirs.flow.shift:
            said.append(f"the shift of the times is another: {theirs.flow.shift:.4g} -> {mine.flow.shift:.4g}")
        old, new = theirs.network.token_grid, mine.network.token_grid
        if old != new:
            table = state["position"].unflatten(0, old).permute(2, 0, 1)[None]  # [h w, W] -> [1,W,h,w]
            table = F.interpolate(table, new, mode="bicubic", align_corners=False)
            state["position"] = table[0].permute(1, 2, 0).flatten(0, 1)
            said.append(f"positions are resized: {old} -> {new} tokens")
        rows, how = _same_classes(mine, theirs)
        state["labels.weight"] = state["labels.weight"][rows]
        self.network.load_state_dict(state)
        return said + how

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`: aside first, then renamed.

        Args:
            folder: replaced if it is a diffusion model saved before.

        Raises:
            ValueError: the folder exists and is something else; the weights are not float32.
        """
        write_folder(folder, "diffusion model", self._write)

    def _write(self, folder: Path) -> None:
        save_tensors(self.network.state_dict(), folder / WEIGHTS)
        config = _SavedConfig(kind="diffusion model", files=checksums(folder), **dict(self.config))
        (folder / "config.json").write_text(config.model_dump_json(indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder_or_hub_id: str | Path, *, dtype: torch.dtype = torch.float32) -> "DiffusionModel":
        """Load what `save_pretrained` wrote.

        Args:
            folder_or_hub_id: such a folder; a run folder of `rae train-dit` (its newest checkpoint); or a hub id.
            dtype: see the class.

        Raises:
            ConfigError: a foreign configuration.
            SourceError: not found.
            ValueError: a file instead of a folder; a run that has saved nothing yet; weights that are damaged, not
                float32, or do not fit the configuration.
        """
        folder = find_folder(folder_or_hub_id, "a diffusion model")
        check_kind(folder, "diffusion model")
        saved = read_json(_SavedConfig, folder / "config.json")
        weights = load_tensors(folder, WEIGHTS, saved.files)
        config = DiffusionModelConfig(**{name: getattr(saved, name) for name in DiffusionModelConfig.model_fields})
        try:
            return cls.of_weights(config, weights, dtype=dtype)
        except RuntimeError as error:
            raise ValueError(f"{folder / WEIGHTS} does not fit its config.json: {error}") from error

    @classmethod
    def of_weights(
        cls, config: DiffusionModelConfig, weights: dict[str, Tensor], *, dtype: torch.dtype = torch.float32
    ) -> "DiffusionModel":
        """A frozen model whose network holds these very tensors; RuntimeError if they do not fit."""
        with torch.device("meta"):
            model = cls(config, dtype=dtype)
        model.network.load_state_dict(weights, assign=True)
        return model.requires_grad_(False)


def _hint(label: str, names: Sequence[str]) -> str:
    """The class that an unknown label may mean: one that has it as a synonym, else the most like it; and its index."""
    numbers = {part.strip(): i for i, name in enumerate(names) for part in (name, *name.split(","))}
    numbered = any(map(str.isdecimal, names))  # where names are numbers, an index is none
    if near := [label] if label in numbers else difflib.get_close_matches(label, numbers, n=1):
        number = numbers[near[0]]
        return f"did you mean {names[number]!r}{'' if numbered else f', index {number}'}?"
    known = ", ".join(map(repr, names[:10])) + ", ..." * (len(names) > 10)
    return f"it knows {known}{'' if numbered else f'; their indices 0..{len(names) - 1} are taken as well'}."


# --- starting from another model -------------------------------------------------------------------------------------


def _check_alike(mine: DiffusionModelConfig, theirs: DiffusionModelConfig) -> None:
    """Raise ValueError unless the weights of one network mean the same in the other, but for grid and classes."""
    if mine.flow.prediction != theirs.flow.prediction:
        raise ValueError(
            f"a model that predicts {mine.flow.prediction} cannot start from one that predicts "
            f"{theirs.flow.prediction}; take flow.prediction={theirs.flow.prediction}."
        )
    found = theirs.network.model_dump()
    keys = {
        **dict.fromkeys(("width", "heads", "depth"), "size=[{width},{heads},{depth}]"),
        **dict.fromkeys(("head_width", "head_heads", "head_depth"), "head=[{head_width},{head_heads},{head_depth}]"),
    }
    for name, wanted in mine.network.model_dump(exclude={"grid", "num_classes", "allow_narrow"}).items():
        if wanted != found[name]:
            remedy = "take network." + keys.get(name, f"{name}={{{name}}}").format(**found)
            if name == "in_channels":
                remedy = "take an autoencoder with as many channels, or begin anew"
            raise ValueError(f"a network of {name} {wanted} cannot start from one of {found[name]}; {remedy}.")


def _same_classes(mine: DiffusionModelConfig, theirs: DiffusionModelConfig) -> tuple[list[int], list[str]]:
    """The row of the other's label table that each of this one's begins as, the null class last; in words."""
    count, null = mine.network.num_classes, theirs.network.num_classes
    untrained = ", which was never trained" * (theirs.drop_labels == 0)
    if mine.class_names and theirs.class_names:
        numbers = {name: number for number, name in enumerate(theirs.class_names)}
        rows = [numbers.get(name, null) for name in mine.class_names]
        how = f"{count - rows.count(null)} of {count} classes are known by name"
        if null in rows:
            how += f", the others begin as its null class{untrained}"
    elif count == null:
        rows, how = list(range(count)), "classes are taken by number, since one of the models has no names for them"
    elif not count:
        rows, how = [], f"its {null} classes are left out, and its null class is taken{untrained}"
    else:
        rows, how = [null] * count, f"for its {null} classes these {count} begin as its null class{untrained}"
    return [*rows, null], [how] if count or null else []
