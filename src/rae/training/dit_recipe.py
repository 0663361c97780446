"""What a run of stage 2 is a function of: the recipe of `rae train-dit`."""

from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from rae.autoencoder.baselines import Autoencoder, is_baseline
from rae.config import Config, parse
from rae.data.images import DataConfig
from rae.diffusion.dit import DIT_SIZES, HEAD_SIZE
from rae.diffusion.flow import Flow
from rae.diffusion.model import DiffusionModelConfig
from rae.training.latents import check_crop
from rae.training.optim import Decays, OptimizerConfig
from rae.training.run import RunConfig


class EncodingConfig(Config):
    """How images become latents, by the encoder of the autoencoder that is named."""

    precision: Literal["fp32", "bf16"] = "fp32"  # what it computes in; its latents are float32 all the same


class NetworkConfig(Config):
    """Which network; its channels, grid and classes come from the autoencoder and the images."""

    kind: Literal["dit", "dit-dh"]
    size: Literal[tuple(DIT_SIZES)] | tuple[PositiveInt, PositiveInt, PositiveInt]  # Table 13, or [width, heads, depth]
    head: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None  # dit-dh's, the same three; None = the paper's
    patch_size: PositiveInt = 1
    mlp_ratio: float = Field(4.0, gt=0)
    qk_norm: bool = False
    unconditional: bool = False  # leave the classes of the images alone
    allow_narrow: bool = False  # narrower than the latents have channels, against Theorem 1
    init: str | None = None  # model (folder or hub id) whose weights this one starts from; None = begin anew

    def describe(self, shape: tuple[int, int, int], num_classes: int) -> dict[str, Any]:
        """The `DiTConfig` or `DiTDHConfig` for latents (C, h, w), as data."""
        width, heads, depth = DIT_SIZES[self.size] if isinstance(self.size, str) else self.size
        settings = self.model_dump(include={"kind", "patch_size", "mlp_ratio", "qk_norm", "allow_narrow"})
        settings |= {"in_channels": shape[0], "grid": shape[1:], "num_classes": num_classes}
        settings |= {"width": width, "heads": heads, "depth": depth}
        if self.kind == "dit-dh":
            settings |= dict(zip(("head_width", "head_heads", "head_depth"), self.head or HEAD_SIZE))
        return settings


class FlowConfig(Config):
    """The flow; its shift is sqrt(C h w / shift_base) of the latents (Sec. 4.2)."""

    prediction: Literal["v", "x", "eps"] = "v"
    time_law: Literal["uniform", "logit-normal"] = "uniform"
    logit_mean: float = 0.0
    logit_std: float = Field(1.0, gt=0)
    shift_base: PositiveInt = 4096


class DiTOptimConfig(OptimizerConfig):
    """Those of stage 2, which may average the weights in several ways at once."""

    ema: Decays  # decay of the weights' moving average; or several, of which the first one's is the model


class SheetConfig(Config):
    """Sheets of samples: a row for the first classes, a second one guided."""

    images: PositiveInt = 10
    steps: int = Field(50, ge=2)
    cfg: NonNegativeFloat | None = None  # scale of the second row; None = no second row


class DiTRunConfig(RunConfig):
    """That of stage 2, whose networks may be too large for a card."""

    sharding: Literal["none", "full"] = "none"  # full: weights, averages, moments spread over the processes (FSDP2)


class DiTRecipe(Config):
    """Everything that stage 2 is a function of."""

    seed: int = Field(0, ge=0, lt=2**63)
    rae: str  # folder or hub id of the autoencoder, or pixels@SIZE, sd-vae:WEIGHTS@SIZE
    encoder: EncodingConfig = EncodingConfig()
    data: DataConfig
    latents: str = "online"  # online: encode at every step; memory: once (small sets); else a folder of `rae cache`
    network: NetworkConfig
    flow: FlowConfig = FlowConfig()
    drop_labels: float = Field(0.1, ge=0, le=1)  # how often the null label takes a label's place
    optim: DiTOptimConfig
    sheet: SheetConfig = SheetConfig()
    run: DiTRunConfig

    @model_validator(mode="before")
    @classmethod
    def _of_this_stage(cls, data: Any) -> Any:
        if isinstance(data, dict) and "decoder" in data:
            raise ValueError("this is a recipe of stage 1; `rae train-decoder` takes it")
        return data

    @model_validator(mode="after")
    def _consistent(self) -> "DiTRecipe":
        if self.latents != "online":
            check_crop("latents", self.data, self.latents)
        if self.encoder.precision != "fp32" and is_baseline(self.rae):
            raise ValueError(f"encoder.precision {self.encoder.precision} is an RAE's; {self.rae} computes in fp32")
        if self.encoder.precision != "fp32" and self.latents not in ("online", "memory"):
            raise ValueError(
                f"encoder.precision {self.encoder.precision} is of latents that the run encodes itself, and "
                f"{self.latents} holds those of `rae cache`, which encodes in fp32; take encoder.precision=fp32"
            )
        if self.network.kind == "dit" and self.network.head:
            raise ValueError(f"network.head {self.network.head} belongs to dit-dh, network.kind is dit; change either")
        if self.sheet.cfg is not None and self.network.unconditional:
            raise ValueError(f"sheet.cfg {self.sheet.cfg} guides by classes, which network.unconditional ignores")
        if self.sheet.cfg is not None and self.drop_labels == 0:
            raise ValueError(f"sheet.cfg {self.sheet.cfg} needs the null label, which drop_labels 0 never trains")
        if self.run.sharding == "full" and self.optim.name == "muon":
            raise ValueError(
                "optim.name muon computes with whole matrices, of which run.sharding full leaves each process a part; "
                "take optim.name=adamw, or run.sharding=none"
            )
        return self


def describe_model(recipe: DiTRecipe, rae: Autoencoder, class_names: list[str] | None) -> DiffusionModelConfig:
    """The model that a recipe asks for, in the latents of an autoencoder, for these classes (None: no classes).

    Raises:
        ConfigError: one that cannot be, such as one narrower than its latents (Theorem 1).
    """
    flow = Flow.for_latents(rae.latent_shape, recipe.flow.shift_base, **recipe.flow.model_dump(exclude={"shift_base"}))
    data = {
        "network": recipe.network.describe(rae.latent_shape, len(class_names or ())),
        "flow": flow.model_dump(),
        "latent_identity": rae.latent_identity,
        "class_names": class_names,
        "drop_labels": recipe.drop_labels if class_names else None,
    }
    return parse(DiffusionModelConfig, data, "the model that network and flow of the recipe describe")
