"""A run at work, what happens around a training loop: resuming, logging, progress, signals, the end."""

import contextlib
import functools
import importlib.util
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import PositiveInt
from rich.console import Console

from rae.config import Config, ConfigError
from rae.data.images import DataConfig, Images, Stream
from rae.data.order import batch_positions
from rae.folders import check_outside
from rae.processes import accelerator
from rae.training.checkpoint import checkpoints, keep_models, newest_checkpoint, read_state, save_checkpoint
from rae.training.display import progress, save_sheet
from rae.training.durations import Duration, best_warning, exact_images, in_images, start_warning
from rae.training.optim import OptimizerConfig, learning_rate, schedule_warning
from rae.training.run_folder import (
    TrainingError,
    check_identity,
    check_log,
    check_recipe,
    check_starts,
    claim,
    keep_recipe,
    truncate_log,
    written,
)
from rae.training.sharding import whole
from rae.training.unreadable import Unreadable

T = TypeVar("T")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class RunConfig(Config):
    """Length, batch and intervals of a run."""

    duration: Duration
    batch: PositiveInt  # images of one optimiser step, all processes together
    micro_batch: PositiveInt | None = None  # images that a process takes at a time; None = its part of the batch
    precision: Literal["fp32", "bf16"] = "fp32"  # what the trained model's matrix products compute in
    recompute: bool = False  # keep no activations inside blocks, compute them again in the backward pass: less memory
    compile: bool = False  # torch.compile the trained network: a minute at the start, faster steps
    log_every: Duration = "50st"
    evaluate_every: Duration = "10%"  # held-out loss and a sheet of pictures
    evaluate_images: PositiveInt = 256  # of the held-out ones, at most, evenly spread over them
    save_every: Duration = "10%"
    keep: PositiveInt = 2  # newest checkpoints that stay
    keep_at: tuple[Duration, ...] = ()  # moments whose models stay for good, in kept/: AutoGuidance wants an early one
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()


class Run:
    """One run folder at work. Entered with `with`; only the first process writes.

    Attributes:
        folder, config: of the run.
        accelerator: placement of models and, with several processes, the talk between them.
        total: images of the whole run; `every[...]` are the intervals in images, and parts of one.
        local_batch: images of this process in one step; `micro_batch` of them at a time.
        checkpoint: the one to go on from, or None.
        seen: images seen.
        stop: the signal by which all processes agreed to end after this step, or None.
    """

    def __init__(self, folder: str | Path, recipe: Config, epoch: int) -> None:
        """Open a new or interrupted run.

        Args:
            folder: made if it does not exist.
            recipe: with a section `run` (RunConfig).
            epoch: images in an epoch, for durations given in epochs.

        Raises:
            ConfigError: a length or batch that cannot be.
            TrainingError: a tracker that is not installed.
        """
        self.folder, self.recipe, self.config = Path(folder), recipe, recipe.run
        config, batch = self.config, self.config.batch
        _check_trackers(config.trackers)
        self.total = in_images(config.duration, batch=batch, epoch=epoch)
        if self.total == 0:
            raise ConfigError(f"run.duration {config.duration} is less than one batch of {batch} images.")
        convert = {"batch": batch, "epoch": epoch, "total": self.total}
        self.every = {
            name: max(exact_images(getattr(config, f"{name}_every"), **convert), Fraction(batch))
            for name in ("log", "evaluate", "save")
        }
        self._keep = {in_images(moment, **convert): moment for moment in config.keep_at}
        if 0 in self._keep:
            raise ConfigError(f"run.keep_at {self._keep[0]} is less than one batch of {batch} images.")
        self.accelerator = accelerator(log_with=list(config.trackers) or None, project_dir=folder)
        if batch % self.accelerator.num_processes:
            raise ConfigError(f"run.batch {batch} cannot be shared by {self.accelerator.num_processes} processes.")
        self.local_batch = batch // self.accelerator.num_processes
        self.micro_batch = config.micro_batch or self.local_batch
        self.main = self.accelerator.is_main_process
        self.console = Console(stderr=True, quiet=not self.main)
        self.seen, self.stop, self._asked, self._window, self._begun = 0, None, None, {}, False
        self._best, self._best_at = math.inf, None  # of the figure that `judge` compares, and where it was
        self._judged_by = None  # the images of that figure
        self._starts: dict[str, int] = {}
        self._schedules, self._optims = {}, {}
        self._unreadable = Unreadable(self.warn, self.record)
        self._epoch, self._told = epoch, set()

    def __enter__(self) -> "Run":
        """Claim the folder, compare the recipe with the one it was begun with, find the checkpoint to go on from.

        Raises:
            ConfigError: another recipe.
            CheckpointError: the newest checkpoint is damaged.
            TrainingError: not a run folder, in use by another process, or its log is damaged.
            ValueError: a new run inside the folder of its images.
        """
        if self.main and not (self.folder / "recipe.yaml").exists():  # others may see a folder that it has begun
            for source in (self.recipe.data.source, self.recipe.data.held_out):
                if isinstance(source, str):
                    check_outside(self.folder, source)  # sheets of pictures would be taken for images of it
        with contextlib.ExitStack() as stack:
            if self.main:
                stack.enter_context(claim(self.folder))
                self.warn(check_recipe(self.folder, self.recipe))
                check_log(self.folder)
                if not checkpoints(self.folder):
                    keep_recipe(self.folder, self.recipe)
                newest_checkpoint(self.folder)
            self.accelerator.wait_for_everyone()
            self.checkpoint = (checkpoints(self.folder) or [None])[-1]
            stack.enter_context(self._signals())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)  # with the error, by which `claim` knows that the run was refused

    @property
    def finished(self) -> bool:
        return self.seen >= self.total

    @property
    def step(self) -> int:
        """Optimiser steps made."""
        return self.seen // self.config.batch

    def learning_rate(
        self, section: str, config: OptimizerConfig, *, epoch: int, start: int = 0
    ) -> Callable[[int], float]:
        """step of the run -> learning rate, by the recipe's section of that name. To be asked for before `resume`.

        Args:
            section: dotted, for messages.
            config: that section.
            epoch: images in an epoch.
            start: step of the run where this optimiser's first one is made, and its warm-up begins.
        """
        warmup, decay_end = (
            in_images(duration, batch=self.config.batch, epoch=epoch, total=self.total) // self.config.batch
            for duration in (config.warmup, config.decay_end)
        )
        self._schedules[section] = [start, warmup, decay_end]
        self._optims[section] = config
        return functools.partial(learning_rate, config, start, warmup, decay_end)

    def warmup(self, section: str) -> int:
        """Steps of the warm-up, once `learning_rate` was asked for."""
        return self._schedules[section][1]

    def starts_at(self, key: str, duration: Duration, *, epoch: int) -> int:
        """Images after which a part of the training begins. To be asked for before `resume`, which compares it.

        Args:
            key: of the recipe.
            duration: its value.
            epoch: images in an epoch.
        """
        start = self._starts[key] = in_images(duration, batch=self.config.batch, epoch=epoch, total=self.total)
        if start >= self.total:
            self.warn(start_warning(key, duration, self.config.duration))
        return start

    def positions(self) -> Iterator[range]:
        """The stream positions of this process in each coming step."""
        accelerator = self.accelerator
        rank, world = accelerator.process_index, accelerator.num_processes
        return batch_positions(self.seen, self.total, self.config.batch, rank=rank, world=world)

    def accumulate(self, network: torch.nn.Module, parts: Iterable[T]) -> Iterator[T]:
        """The micro-batches of a step; processes exchange gradients with the last one only."""
        count = math.ceil(self.local_batch / self.micro_batch)
        for number, part in enumerate(parts, start=1):
            with self.accelerator.no_sync(network) if number < count else contextlib.nullcontext():
                yield part

    def clip_and_step(
        self, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], clip: float | None
    ) -> float:
        """Clip the gradients, step, clear them; returns their norm before clipping.

        Raises:
            TrainingError: the norm is not finite.
        """
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf if clip is None else clip)
        norm = whole({"norm": norm}, keep=True)["norm"].item()
        self._require_finite("gradient's norm", norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return norm

    def resume(self, identity: dict[str, str]) -> None:
        """Go on from the checkpoint's state, provided that images and latents are still the same."""
        state = read_state(self.checkpoint / "train")
        check_identity(self.folder, state, identity, self._epoch)
        check_starts(state, self._starts, self.config.batch)
        self.seen, self._window, self._best = state["images"], state["window"], state["best"]
        self._judged_by = state.get("judged_by")  # which, like the device, checkpoints of earlier versions have not
        if self.seen > self.total:
            self._say(
                f"{self.step:,} steps are made already, more than the {self.total // self.config.batch:,} asked for"
            )
            return
        self._say(f"resumed at {self.seen:,} of {self.total:,} images")
        if (begun := state.get("device", self.accelerator.device.type)) != self.accelerator.device.type:
            self.warn(
                f"the run was on {begun} and goes on on {self.accelerator.device.type}: from here on its noise is "
                "another than it would have been, as good as that."
            )
        for section, steps in self._schedules.items():
            begun = state["schedules"][section]
            self.warn(schedule_warning(section, self._optims[section], begun, steps, self.step))

    def state(self, identity: dict[str, str]) -> dict[str, Any]:
        """What `resume` needs."""
        state = {"images": self.seen, "identity": identity, "window": self._window}
        state |= {"schedules": self._schedules, "starts": self._starts, "best": self._best}
        return state | {"epoch": self._epoch, "judged_by": self._judged_by, "device": self.accelerator.device.type}

    def begin(self, title: str | None = None) -> None:
        """Say `title`, open progress, log and trackers: everything is loaded and the loop starts."""
        if title:
            self._say(title)
        if self.main:
            keep_recipe(self.folder, self.recipe)  # not before: what is refused leaves the run as it was
        # Without a checkpoint it begins anew, perhaps by another recipe: nothing that was said of it before holds.
        kept = truncate_log(self.folder / "log.jsonl", self.seen if self.checkpoint else -1) if self.main else []
        self._unreadable.remember(kept)
        self._told |= {line["about"] for line in kept if "about" in line}
        if self.config.trackers:
            self.accelerator.init_trackers(self.folder.resolve().name)
            for tracker in self.accelerator.trackers:  # `end_training` would part the processes as well
                self._stack.callback(tracker.finish)
        for images, moment in sorted(self._keep.items()):
            if images > self.total:
                self.warn(f"run.keep_at: {moment} is after the end of the run ({self.config.duration})")
            elif images <= self.seen and not (self.folder / f"kept/{images:09d}").exists():
                self.warn(f"run.keep_at: {moment} was step {images // self.config.batch:,}, which is past and not kept")
        if self._judged_by:
            self._say_where_best_is_found()
        self._clock, self._clock_seen = time.monotonic(), self.seen
        self._advance = self._stack.enter_context(
            progress("training", self.total, start=self.seen, console=self.console)
        )
        self._begun = True

    def finish_step(self, **figures: float) -> None:
        """Count one step; `figures`, among them `loss`, are averaged until the next line of the log."""
        self.seen += self.config.batch
        for name, value in figures.items():
            self._window.setdefault(name, []).append(value)
        self._advance(self.seen, f"loss {figures['loss']:.4f}")

    def due(self, what: Literal["log", "evaluate", "keep", "save"]) -> bool:
        if what == "keep":
            return self.seen in self._keep
        # The first step at or past a multiple: so those of 1ep are among those of 0.25ep, whatever the batch.
        passed = self.seen // self.every[what] > (self.seen - self.config.batch) // self.every[what]
        return passed or self.finished or (what == "save" and self.stop is not None)

    def log(self, **figures: float) -> dict[str, float]:
        """All processes call it: log.jsonl and trackers get the averages since the last line, and `figures`."""
        self._unreadable.tell()
        now = time.monotonic()
        rate = (self.seen - self._clock_seen) / (now - self._clock)
        self._clock, self._clock_seen = now, self.seen
        means = {name: sum(values) / len(values) for name, values in self._window.items()}
        self._window = {}
        self.record(**means, **figures, images_per_second=round(rate, 2))
        return means

    def record(self, **figures: Any) -> None:
        if self.main:
            line = {"images": self.seen, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **figures}
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
        if self.config.trackers:
            self.accelerator.log(figures, step=self.seen)

    def average(self, losses: torch.Tensor) -> list[float]:
        """Mean over all processes of a step's losses. Also makes them agree on whether to stop after this step.

        Raises:
            TrainingError: one is not finite.
        """
        mine = torch.cat([losses, losses.new_tensor([self._asked or 0])])
        everyone = self.accelerator.gather(mine[None])
        values, self.stop = everyone[:, :-1].mean(0).tolist(), int(everyone[:, -1].max()) or None
        for value in values:
            self._require_finite("loss", value)
        return values

    def _require_finite(self, name: str, value: float) -> None:
        if math.isfinite(value):
            return
        kept = [path.name for path in checkpoints(self.folder)]
        last = (
            f"checkpoint {kept[-1]} was written before (of {', '.join(kept)}); if the loss had risen by then, remove it"
            if kept
            else "there is no checkpoint yet"
        )
        message = (
            f"the {name} is {value} in step {self.step} (images {self.seen:,} to {self.seen + self.config.batch:,}). "
            f"Nothing of it is saved; {last}. In a new folder, lower optim.lr, lengthen optim.warmup, or set "
            "run.precision: fp32."
        )
        self.record(stopped=message)
        raise TrainingError(message)

    def keep(self, write: Callable[[Path], None]) -> None:
        """Write the models of this step to `kept/`, before its checkpoint."""
        if self.main:
            keep_models(self.folder, self.seen, write)
        self.accelerator.wait_for_everyone()

    def save(self, write: Callable[[Path], None]) -> None:
        """All processes call it: write a checkpoint; where a signal asked for the end, end with its exit status."""
        self._unreadable.tell()  # which a run that goes on from here would not meet again
        if self.main:
            best = self._best_at == self.seen
            save_checkpoint(self.folder, self.seen, write, keep=self.config.keep, best=best)
        self.accelerator.wait_for_everyone()
        if self.stop is not None and not self.finished:
            self._say(
                f"stopped by {signal.Signals(self.stop).name} at {self.seen:,} of {self.total:,} images; all is saved "
                f"in {self.folder}. Run the same command again to go on."
            )
            raise SystemExit(128 + self.stop)

    def watch_broken(self, stream: Stream, batches: Iterable[dict[str, torch.Tensor]]) -> Iterator[dict]:
        """Pass batches of the stream on; `log` says once of every unreadable image that another took its place."""
        return self._unreadable.watch(stream, batches)

    def leave_out(self, name: str) -> None:
        """Say once that a held-out image cannot be read and is left out."""
        self._unreadable.leave_out(name)

    def check_held_out(self, images: Images | None, data: DataConfig, size: tuple[int, int], *, by: str = "") -> None:
        """Read the held-out images once, so that one that cannot be read ends the run now and not hours later.

        Figures of other images than before the run was resumed, of more, or by another network do not compare: the
        best one is forgotten.

        Args:
            images, data, size: those that judge, how they are read, and (H, W) of their crops.
            by: identity of what judges them, where the run's own networks do not.

        Raises:
            ImageError: one cannot be read, or, where they may be left out, none can.
        """
        if not images:
            return
        judged_by = f"{len(images)} of {images.identity}{by and f' by {by}'}"
        if self._judged_by not in (None, judged_by):
            self._best = math.inf
            self.warn("held-out images, or what judges them, are not those of before: `best` is found anew")
        self._judged_by = judged_by
        if self.main:
            self._unreadable.check_held_out(images, data, size)

    def judge(self, *, best_by: str, **figures: float) -> None:
        """Record figures of held-out images; a checkpoint of this step becomes the `best` if none had a lower one."""
        self.record(**figures)
        if best_by in figures and self.due("save") and figures[best_by] < self._best:
            self._best, self._best_at = figures[best_by], self.seen

    def _say_where_best_is_found(self) -> None:
        """`best` names a checkpoint, so a step that is judged and not saved cannot become it."""
        intervals = self.config.evaluate_every, self.config.save_every
        message, both = best_warning(*intervals, batch=self.config.batch, epoch=self._epoch, total=self.total)
        if both:
            self.warn(message)
        else:
            self.tell(best=message)

    def show(self, rows: list[torch.Tensor]) -> None:
        """Save a sheet of pictures, rows of [0,1] images [B,3,h,w], and hand it to the trackers."""
        path = self.folder / f"samples/{self.seen:09d}.png"
        sheet = save_sheet(rows, path)
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({"samples": sheet[None]}, step=self.seen, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({"samples": sheet[None]}, step=self.seen)
            else:
                import trackio

                tracker.log({"samples": trackio.Image(path)}, step=self.seen)

    def tell(self, **messages: str | None) -> None:
        """Warn of what goes wrong, of each name once in a run, and write it to the log."""
        for about, message in messages.items():
            if message and about not in self._told:
                self._told.add(about)
                self.warn(message)
                self.record(about=about, warning=message)

    def note(self, about: str, **figures: Any) -> None:
        """Write figures that hold for the whole run to its log, once."""
        if about not in self._told:
            self._told.add(about)
            self.record(about=about, **figures)

    def warn(self, message: str | None) -> None:
        if message:
            self._say(message, style="yellow")

    def conclude(self) -> Path:
        """The table of what the run wrote."""
        self._say(f"{self.folder}: finished, {self.seen:,} images seen")
        self.console.print(written(self.folder))
        if self.stop is not None:  # a signal in the last step: what comes after training shall not begin
            raise SystemExit(128 + self.stop)
        return self.folder

    def _say(self, text: str, style: str | None = None) -> None:
        self.console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM ends the run after its step, a second one, or one before all steps, at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def receive(number: int, _: object) -> None:
            if not self._begun:  # statistics, latents: minutes, of which nothing could be saved
                self._say(f"{signal.Signals(number).name}: ended before the first step. Run the same command again.")
                raise SystemExit(128 + number)
            self._asked = number
            signal.signal(number, before[number])
            self._say(f"{signal.Signals(number).name}: finishing the step and saving; once more to end at once")

        before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


# ----------------------------------------------------------------------------------------------------------------------


def _check_trackers(trackers: tuple[str, ...]) -> None:
    for name in trackers:
        if importlib.util.find_spec(name) is None:
            raise TrainingError(f"run.trackers names {name}, which is not installed: pip install {name}")
