"""Stage 2: a diffusion transformer is trained in the latents of a frozen autoencoder (arXiv 2510.11690, Sec. 4 and 5).

images --Stream--> [0,1] images [B,3,H,W] --RAE.encode--> latents [B,C,h,w] --Flow.loss--> DiT or DiT-DH
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from rae.autoencoder.baselines import Autoencoder, open_autoencoder
from rae.autoencoder.rae import RAE
from rae.config import ConfigError
from rae.data.image_set import digest
from rae.data.images import Images, Stream, loader, open_split, readable, to_unit
from rae.data.latent_cache import StoredLatents
from rae.data.order import noise_draws
from rae.diffusion.guidance import CFG, drop_labels
from rae.diffusion.model import WEIGHTS, DiffusionModel
from rae.diffusion.sampling import generate
from rae.evaluation.flow_loss import Batch, latent_moments, loss_by_time
from rae.training.checkpoint import load_optimizers, load_weights, optimizer_tensors, save_training_state
from rae.training.diagnosis import LOOK, Health, check_settings
from rae.training.dit_recipe import DiTRecipe, DiTRunConfig, SheetConfig, describe_model
from rae.training.held_out import spread
from rae.training.latents import Parts, cache_latents, cached_latents, latent_error, online_latents, stored_latents
from rae.training.optim import build_optimizers, ema_warning, make_ema, set_lr, update_ema
from rae.training.run import DTYPES, Run
from rae.training.sharding import compiled, is_sharded, shard, whole

_FIXED = 2**32  # the seed of held-out figures and sheets, the same in every run and apart from any run's own


def train_dit(recipe: DiTRecipe, folder: str | Path) -> Path:
    """Train a DiT or DiT-DH. Called again with the same arguments, it goes on where it was interrupted.

    Args:
        recipe: what to train.
        folder: the run's folder; `DiffusionModel.from_pretrained(folder)` loads its newest EMA weights.

    Returns:
        The folder.

    Raises:
        ConfigError, ImageError, CacheError, TrainingError, CheckpointError: before anything is computed, with what to
            do; or TrainingError where the loss is not finite, CheckpointError where the disk is full.
        SystemExit: Ctrl-C or SIGTERM, after saving.
    """
    # --- validate -----------------------------------------------------------------------------------------------------
    images, held_out = open_split(recipe.data)
    judges = held_out and spread(held_out, recipe.run.evaluate_images)
    with Run(folder, recipe, epoch=len(images)) as run:
        device = run.accelerator.device
        rae = open_autoencoder(recipe.rae).to(device)
        on_disk = recipe.latents not in ("online", "memory")
        stored = stored_latents(recipe.latents, rae, images, recipe.data) if on_disk else None
        config = describe_model(recipe, rae, None if recipe.network.unconditional else images.class_names)

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
        identity["class names"] = digest(config.class_names or ())
        identity["cache"] = stored.config.identity if stored else recipe.latents
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
            network = compiled(network)  # after the EMA was copied: it averages the weights themselves
        predict = functools.partial(network, dtype=model.dtype, recompute=recipe.run.recompute)

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

        def evaluate() -> None:
            """Figures and a sheet, by the main process; of models that are spread, by all, each of which has a part."""
            if not run.main and not is_sharded(ema.network):
                return
            if judges:
                kept_back = _encoded(recipe, rae, judges, run.leave_out)
                found = loss_by_time(ema, kept_back, count=len(judges), seed=_FIXED, online=model)
                run.judge(best_by="held_out_loss", **found.figures(config, moments))
                run.tell(ema=health.of_average(found, run.step))
            sheet = _samples(ema, rae, recipe.sheet)
            if run.main:
                run.show(sheet)

        run.check_held_out(judges, recipe.data, rae.image_size)
        first, rounding = _first_latents(recipe, rae, held_out or images), {}
        if recipe.encoder.precision != "fp32":
            rae.encoder.to(DTYPES[recipe.encoder.precision])
            exact, first = first, _first_latents(recipe, rae, held_out or images)
            rounding = {"precision": recipe.encoder.precision} | latent_error(exact, first)
        moments = latent_moments(first, recipe.network.patch_size)
        batches = _latents(recipe, rae, images, stored, run)
        standardised = rae.latent_mean is not None if isinstance(rae, RAE) else None
        schedule = {"steps": run.total // recipe.run.batch, "warmup": run.warmup("optim")}
        health = Health.of(config, recipe.optim, moments, **schedule)
        doubts = check_settings(config, recipe.optim, moments, len(first), standardised=standardised, **schedule)
        run.begin(_describe_rounding(**rounding) if rounding else None)
        if rounding:
            run.note("encoder", **rounding)
        run.tell(**doubts)
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
                run.tell(loss=health.of_loss(run.log(lr=lr)["loss"], run.step))
            if run.due("evaluate"):
                evaluate()
            if run.due("keep"):
                run.keep(gather_models())
            if run.due("save"):
                run.save(gather())
        return run.conclude()


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


def _latents(
    recipe: DiTRecipe, rae: Autoencoder, images: Images, stored: StoredLatents | None, run: Run
) -> Iterator[Parts]:
    """The coming steps' latents, in the order of the stream."""
    if recipe.latents != "online":
        cache = stored or cache_latents(rae, images, recipe.data, batch=run.micro_batch)
        return cached_latents(cache, run.positions(), recipe.seed, run.micro_batch, run.accelerator.device)
    stream = Stream(images, recipe.data, rae.image_size, recipe.seed)
    return online_latents(rae, run.watch_broken(stream, loader(stream, run.positions(), recipe.data)), run.micro_batch)


def _encoded(recipe: DiTRecipe, rae: Autoencoder, images: Images, left_out: Callable[[str], object]) -> Iterator[Batch]:
    """Latents, labels and numbers of these images, no label dropped."""
    device = next(rae.decoder.parameters()).device
    every = range(len(images))
    for batch in readable(images, recipe.data, rae.image_size, every, batch=64, left_out=left_out):
        labels = batch["label"].to(device)
        if recipe.network.unconditional:
            labels = torch.zeros_like(labels)  # the null label of a model without classes
        yield rae.encode(to_unit(batch["image"].to(device))), labels, batch["index"].tolist()


def _first_latents(recipe: DiTRecipe, rae: Autoencoder, images: Images) -> torch.Tensor:
    """Some latents of images: settings and losses are judged by them."""
    latents, _, _ = next(_encoded(recipe, rae, spread(images, LOOK), lambda _: None))
    return latents


def _describe_rounding(precision: str, latent_error: float, latent_snr: float) -> str:
    return (
        f"the encoder computes in {precision}: its latents differ from those of fp32 by {latent_error:.2g} per element "
        f"(mean square), {latent_snr:.1f} dB below them"
    )


def _samples(model: DiffusionModel, rae: Autoencoder, sheet: SheetConfig) -> list[torch.Tensor]:
    """Rows of samples of the first classes, each from a seed of its own."""
    classes = model.config.network.num_classes
    labels = [i % classes for i in range(sheet.images)] if classes else None
    guided = [CFG(sheet.cfg)] if sheet.cfg is not None and classes else []
    return [
        torch.cat([b.images for b in generate(model, rae, labels, range(sheet.images), steps=sheet.steps, guidance=g)])
        for g in [None, *guided]
    ]
