"""Stage 2: a diffusion transformer is trained in the latents of a frozen autoencoder (arXiv 2510.11690, Sec. 4 and 5).

images --Stream--> [0,1] images [B,3,H,W] --RAE.encode--> latents [B,C,h,w] --Flow.loss--> DiT or DiT-DH
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from rae.autoencoder.rae import RAE
from rae.config import Config, ConfigError, parse
from rae.data.images import DataConfig, Images, Stream, loader, open_split, readable, to_unit
from rae.data.order import noise_draws
from rae.diffusion.dit import DIT_SIZES, HEAD_SIZE
from rae.diffusion.flow import Flow
from rae.diffusion.guidance import CFG, drop_labels
from rae.diffusion.model import WEIGHTS, DiffusionModel, DiffusionModelConfig
from rae.diffusion.sampling import generate
from rae.training.checkpoint import load_optimizers, load_weights, optimizer_tensors, save_training_state
from rae.training.display import save_sheet
from rae.training.latents import Parts, cache_latents, cached_latents, check_crop, online_latents
from rae.training.optim import Decays, OptimizerConfig, build_optimizers, ema_warning, make_ema, set_lr, update_ema
from rae.training.run import DTYPES, Run, RunConfig
from rae.training.sharding import is_sharded, shard, whole

_FIXED = 2**32  # the seed of held-out figures and sheets, the same in every run and apart from any run's own


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
    rae: str  # folder or hub id of the autoencoder
    data: DataConfig
    latents: Literal["online", "memory"] = "online"  # encode at every step, or once and keep (small sets)
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
        if self.latents == "memory":
            check_crop("latents", self.data)
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


def train_dit(recipe: DiTRecipe, folder: str | Path) -> Path:
    """Train a DiT or DiT-DH. Called again with the same arguments, it goes on where it was interrupted.

    Args:
        recipe: what to train.
        folder: the run's folder; `DiffusionModel.from_pretrained(folder)` loads its newest EMA weights.

    Returns:
        The folder.

    Raises:
        ConfigError, ImageError, TrainingError, CheckpointError: before anything is computed, with what to do; or
            TrainingError where the loss is not finite, CheckpointError where the disk is full.
        SystemExit: Ctrl-C or SIGTERM, after saving.
    """
    # --- validate -----------------------------------------------------------------------------------------------------
    images, held_out = open_split(recipe.data)
    with Run(folder, recipe, epoch=len(images)) as run:
        device = run.accelerator.device
        rae = RAE.from_pretrained(recipe.rae).to(device)
        config = _describe(recipe, rae, None if recipe.network.unconditional else images.class_names)

        # --- construct ------------------------------------------------------------------------------------------------
        torch.manual_seed(recipe.seed)
        model = DiffusionModel(config, dtype=DTYPES[recipe.run.precision])
        if recipe.network.init and not run.checkpoint:
            _start_from(model, recipe.network.init, run)
        flow = model.flow
        averages = {name: make_ema(model) for name in _folders(recipe.optim.ema)}
        ema = averages["model"]
        learning_rate = run.learning_rate("optim", recipe.optim, epoch=len(images))
        for decay in recipe.optim.ema:
            run.warn(ema_warning(decay, run.total // recipe.run.batch))

        # --- load -----------------------------------------------------------------------------------------------------
        identity = {"images": images.identity, "latents": rae.latent_identity}
        if run.checkpoint:
            run.resume(identity)
            load_weights(model.network, run.checkpoint / "train/weights.safetensors")
            for name, average in averages.items():
                load_weights(average.network, run.checkpoint / name / WEIGHTS)
        if run.finished:
            return run.conclude()
        network = _place(model, averages.values(), recipe.run, run)
        optimizers = build_optimizers(recipe.optim, model.network.parameter_groups())
        if run.checkpoint:
            load_optimizers(optimizers, run.checkpoint / "train/optimizer.safetensors")
        if recipe.run.compile:
            network = torch.compile(network)  # after the EMA was copied: it averages the weights themselves
        predict = functools.partial(network, dtype=model.dtype, recompute=recipe.run.recompute)
        batches = _latents(recipe, rae, images, run)

        def gather_models() -> Callable[[Path], None]:
            """What writes the averages, put together by all processes, into a folder."""
            models = {name: _whole(average, run) for name, average in averages.items()}

            def save_models(folder: Path) -> None:
                for name, average in models.items():
                    average.save_pretrained(folder / name)

            return save_models

        def gather() -> Callable[[Path], None]:
            """The same for a whole checkpoint."""
            save_models, state = gather_models(), run.state(identity)
            weights = whole(model.network.state_dict(), keep=run.main)
            moments = whole(optimizer_tensors(optimizers), keep=run.main)

            def save(folder: Path) -> None:
                save_models(folder)
                save_training_state(folder / "train", weights, moments, state)

            return save

        run.check_held_out(held_out, recipe.data, rae.image_size)
        run.begin()
        for parts in batches:
            # --- single training step ---------------------------------------------------------------------------------
            lr, total = learning_rate(run.step), torch.zeros(1, device=device)
            set_lr(optimizers, lr)
            for latents, labels, positions in run.accumulate(network, parts):
                noise, u = noise_draws(positions, recipe.seed, rae.latent_shape, device)
                times, dropped = flow.times(u[:, 0]).to(device), u[:, 1].to(device)
                if recipe.network.unconditional:
                    labels = torch.full_like(labels, model.null_label)
                labels = drop_labels(labels, dropped, recipe.drop_labels, model.null_label)
                losses = flow.loss(predict, latents, labels, times, noise)
                loss = losses.sum() / run.local_batch
                loss.backward()
                total += loss.detach()
            (loss,) = run.average(total)
            norm = run.clip_and_step(model.network, optimizers, recipe.optim.clip)
            for average, decay in zip(averages.values(), recipe.optim.ema):
                update_ema(average, model, decay)
            run.finish_step(loss=loss, grad_norm=norm)

            # --- once in a while: log, evaluate, save -----------------------------------------------------------------
            if run.due("log"):
                run.log(lr=lr)
            if run.due("evaluate") and (shown := _whole(ema, run)):
                shown.to(device)
                if held_out:
                    loss = _held_out_loss(shown, rae, held_out, recipe, run.leave_out)
                    run.judge(best_by="held_out_loss", held_out_loss=loss)
                _save_sheet(shown, rae, recipe.sheet, run.folder / f"samples/{run.seen:09d}.png")
            if run.due("keep"):
                run.keep(gather_models())
            if run.due("save"):
                run.save(gather())
        return run.conclude()


def _describe(recipe: DiTRecipe, rae: RAE, class_names: list[str] | None) -> DiffusionModelConfig:
    flow = Flow.for_latents(rae.latent_shape, recipe.flow.shift_base, **recipe.flow.model_dump(exclude={"shift_base"}))
    data = {
        "network": recipe.network.describe(rae.latent_shape, len(class_names or ())),
        "flow": flow.model_dump(),
        "latent_identity": rae.latent_identity,
        "class_names": class_names,
        "drop_labels": recipe.drop_labels if class_names else None,
    }
    return parse(DiffusionModelConfig, data, "the model that network and flow of the recipe describe")


def _start_from(model: DiffusionModel, source: str, run: Run) -> None:
    try:
        changes = model.start_from(DiffusionModel.from_pretrained(source))
    except ValueError as error:
        raise ConfigError(f"network.init: {error}") from error
    run.warn("; ".join([f"the model starts from {source}", *changes]))


def _place(model: DiffusionModel, averages: Iterable[DiffusionModel], config: DiTRunConfig, run: Run) -> nn.Module:
    """Bring everything to this process's device; returns the network as the step calls it, alone or with the others."""
    accelerator = run.accelerator
    if config.sharding == "full" and accelerator.num_processes > 1:
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        for each in (model, *averages):
            shard(each.network, mesh)
        return model.network
    if config.sharding == "full":
        run.warn("run.sharding: full has no others to spread anything over: there is one process")
    for each in (model, *averages):
        each.to(accelerator.device)
    return accelerator.prepare(model.network)


def _whole(model: DiffusionModel, run: Run) -> DiffusionModel | None:
    """The model for the main process, whose weights are whole, and None for the others; all must ask for it."""
    if not is_sharded(model.network):
        return model if run.main else None
    weights = whole(model.network.state_dict(), keep=run.main)
    return DiffusionModel.of_weights(model.config, weights, dtype=model.dtype) if run.main else None


def _folders(decays: tuple[float, ...]) -> list[str]:
    """Where a checkpoint holds the model of each decay: the first one's is what a run or checkpoint stands for."""
    return ["model", *(f"model-ema{decay}" for decay in decays[1:])]


def _latents(recipe: DiTRecipe, rae: RAE, images: Images, run: Run) -> Iterator[Parts]:
    """The coming steps' latents, in the order of the stream."""
    if recipe.latents == "memory":
        cache = cache_latents(rae, images, recipe.data, batch=run.micro_batch)
        return cached_latents(cache, run.positions(), recipe.seed, run.micro_batch, run.accelerator.device)
    stream = Stream(images, recipe.data, rae.image_size, recipe.seed)
    return online_latents(rae, run.watch_broken(stream, loader(stream, run.positions(), recipe.data)), run.micro_batch)


@torch.no_grad()
def _held_out_loss(
    model: DiffusionModel, rae: RAE, images: Images, recipe: DiTRecipe, left_out: Callable[[str], object]
) -> float:
    """Mean loss over held-out images, with the same noise and times every time and no label dropped."""
    count, losses = min(len(images), recipe.run.evaluate_images), []
    for batch in readable(images, recipe.data, rae.image_size, range(count), batch=64, left_out=left_out):
        latents = rae.encode(to_unit(batch["image"].to(model.device)))
        draws = noise_draws(batch["index"].tolist(), _FIXED, rae.latent_shape)
        noise, u = (draw.to(model.device) for draw in draws)
        labels = batch["label"].to(model.device)
        if recipe.network.unconditional:
            labels = torch.full_like(labels, model.null_label)
        losses.append(model.flow.loss(model.predict, latents, labels, model.flow.times(u[:, 0]), noise))
    return float(torch.cat(losses).mean())


def _save_sheet(model: DiffusionModel, rae: RAE, sheet: SheetConfig, path: Path) -> None:
    """Samples of the first classes, each from a seed of its own."""
    classes = model.config.network.num_classes
    labels = [i % classes for i in range(sheet.images)] if classes else None
    guided = [CFG(sheet.cfg)] if sheet.cfg is not None and classes else []
    rows = [
        torch.cat([b.images for b in generate(model, rae, labels, range(sheet.images), steps=sheet.steps, guidance=g)])
        for g in [None, *guided]
    ]
    save_sheet(rows, path)
