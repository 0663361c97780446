"""This process among those that `torchrun` or `accelerate launch` started, and among whatever else keeps a CPU busy."""

import functools
import os
import warnings
from datetime import timedelta

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import GradientAccumulationPlugin, TorchDynamoPlugin, parse_flag_from_env

# How long processes wait for each other: one encodes, evaluates and writes for all of them, now and then for long.
PATIENCE = timedelta(hours=6)


class ProcessError(RuntimeError):
    """Processes that were started together do not see each other."""


class BusyMachine(UserWarning):
    """What else runs on this machine makes torch's threads wait for each other."""


def process_state() -> PartialState:
    """Rank, number and device of the processes; gloo on CPUs, NCCL on GPUs.

    Raises:
        ProcessError: the launcher started more processes than have found each other. Each would do all the work.
    """
    return _check(PartialState(cpu=_together_on_cpu(), **({"timeout": PATIENCE} if _started() > 1 else {})))


def accelerator(**settings) -> Accelerator:
    """As `process_state`, with what training needs besides.

    Precision, accumulation and compilation are the recipe's: ACCELERATE_MIXED_PRECISION,
    ACCELERATE_GRADIENT_ACCUMULATION_STEPS and ACCELERATE_DYNAMO_BACKEND, which a saved configuration of accelerate
    sets, would change the numbers in silence and are overruled.

    Args:
        settings: of `accelerate.Accelerator`.

    Raises:
        ProcessError: as `process_state`; or accelerate is to put the network into a wrapper of its own.
    """
    wrappers = (f"ACCELERATE_USE_{name}" for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"))
    if asked := [name for name in wrappers if parse_flag_from_env(name)]:
        raise ProcessError(
            f"{asked[0]} is set, as `accelerate launch` does where its saved configuration says so: the "
            "network would be put into a wrapper that the recipe does not name. Unset it, or start with torchrun; "
            "run.sharding: full spreads a large model of stage 2 over the processes."
        )
    process_state()  # which sets how long they wait
    accelerator = Accelerator(
        cpu=_together_on_cpu(),
        mixed_precision="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_plugin=TorchDynamoPlugin(backend="no"),
        **settings,
    )
    _check(accelerator.state)
    return accelerator


def on_this_machine() -> int:
    """How many of the processes share this machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def is_busy(load: float, cores: int) -> bool:
    """Whether other work leaves this process no core for itself.

    Args:
        load: processes that run or wait for a core, on average over a minute, before this one computes. Less than one
            more than there are cores is what a command that has just ended leaves behind.
        cores: of the machine.
    """
    return load >= cores + 1


def busy_machine(load: float, cores: int, threads: int) -> str | None:
    """What to say of a machine whose other work leaves no cores for `threads` of torch; None where there is nothing.

    A step of several threads ends with the slowest of them, and the others spend their time on waiting for it.

    Args:
        load, cores: as of `is_busy`.
        threads: of torch, in this process.
    """
    if threads == 1 or not is_busy(load, cores):
        return None
    return (
        f"the machine is busy with other work (load {load:.0f} on {cores} cores), and torch uses {threads} threads, "
        "which wait for each other: work that takes a minute may take a quarter of an hour. OMP_NUM_THREADS=1 before "
        "the command helps."
    )


def busy_here() -> str | None:
    """The same of this machine, as it was when this process first asked; of one whose GPU computes there is nothing."""
    load, cores = _load_before(), os.cpu_count()
    return busy_machine(load, cores, torch.get_num_threads()) if process_state().device.type == "cpu" else None


def warn_if_busy() -> None:
    """Warn of it, once in a process, when something long begins."""
    if message := busy_here():
        warnings.warn(message, BusyMachine, stacklevel=2)


@functools.cache
def _load_before() -> float:
    return os.getloadavg()[0]  # later, this process is part of it


def _started() -> int:
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started > 1 and "MASTER_ADDR" not in os.environ:
        raise ProcessError(
            f"WORLD_SIZE is {started}, but nothing says where the others are (MASTER_ADDR); start with `torchrun "
            "--nproc_per_node N -m rae.cli -- ...`, or unset WORLD_SIZE."
        )
    return started


def _together_on_cpu() -> bool:
    # accelerate joins processes without a GPU only where it is told to; otherwise each is a world of its own
    return _started() > 1 and not torch.cuda.is_available()


def _check(state):
    if _started() != state.num_processes:
        raise ProcessError(
            f"the launcher started {_started()} processes, and this one sees {state.num_processes}; start them with "
            "`torchrun --nproc_per_node N -m rae.cli -- ...`, or unset WORLD_SIZE."
        )
    return state
