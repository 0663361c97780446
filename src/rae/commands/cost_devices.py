"""How fast a device multiplies and what it holds: peaks of the vendors' data sheets, or a rate measured on this one."""

import difflib
import os
import time
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch

from rae.config import ConfigError
from rae.processes import is_busy

Precision = Literal["fp32", "tf32", "bf16"]  # tf32: convolutions of float32 numbers, as torch does them on GPUs
HERE = "here"


class Device(NamedTuple):
    """A GPU by its data sheet.

    Attributes:
        name: for people.
        bf16, fp32: dense matrix products, 10^12 operations per second, a multiply-add as two. tf32 is half of bf16 on
            all of these; torch leaves it off for linear layers.
        memory: GB as sold, which is what the driver has in GiB, nearly.
        sheet: the document that says so.
    """

    name: str
    bf16: float
    fp32: float
    memory: float
    sheet: str

    def peak(self, precision: Precision) -> float:
        """Operations per second."""
        return 1e12 * {"fp32": self.fp32, "tf32": self.bf16 / 2, "bf16": self.bf16}[precision]


# Sheets that print rates "with sparsity" print twice these; GeForce cards: bf16 with float32 accumulation, torch's.
# fmt: off
DEVICES = {
    "b200":      Device("NVIDIA B200",              2250,  75,  180, "HGX B200 data sheet, an eighth"),
    "h200":      Device("NVIDIA H200 SXM",           989,  67,  141, "H200 data sheet"),
    "h100":      Device("NVIDIA H100 SXM",           989,  67,   80, "H100 data sheet"),
    "h100-pcie": Device("NVIDIA H100 PCIe",          756,  51,   80, "H100 data sheet"),
    "a100":      Device("NVIDIA A100 80 GB SXM",     312, 19.5,  80, "A100 data sheet"),
    "a100-40":   Device("NVIDIA A100 40 GB",         312, 19.5,  40, "A100 data sheet"),
    "l40s":      Device("NVIDIA L40S",               362, 91.6,  48, "L40S data sheet"),
    "a10":       Device("NVIDIA A10",                125, 31.2,  24, "A10 data sheet"),
    "l4":        Device("NVIDIA L4",                 121, 30.3,  24, "L4 data sheet"),
    "5090":      Device("NVIDIA GeForce RTX 5090", 209.5, 104.8, 32, "RTX Blackwell architecture paper"),
    "4090":      Device("NVIDIA GeForce RTX 4090", 165.2, 82.6,  24, "Ada architecture paper"),
    "3090":      Device("NVIDIA GeForce RTX 3090",    71, 35.6,  24, "Ampere GA102 architecture paper"),
}
# fmt: on


def find_device(name: str) -> Device | None:
    """A row of `DEVICES`; None for "here".

    Raises:
        ConfigError: neither, with the nearest name.
    """
    if name == HERE:
        return None
    if name.lower() in DEVICES:
        return DEVICES[name.lower()]
    near = difflib.get_close_matches(name.lower(), DEVICES, n=1)
    raise ConfigError(
        f"--device {name}: not known{f'; did you mean {near[0]}?' if near else '.'} Known are {', '.join(DEVICES)} and "
        f"{HERE}, which measures this machine."
    )


def this_machine() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe_machine(device: torch.device) -> str:
    """Its name and, of a CPU, what makes the same measurement slower at another time."""
    if device.type == "cuda":
        return f"this machine's {torch.cuda.get_device_name(device)}"
    threads, load, cores = torch.get_num_threads(), os.getloadavg()[0], os.cpu_count()
    busy = f", busy with other work (load {load:.0f} on {cores} cores)" if is_busy(load, cores) else ""
    return f"this machine's CPU, {threads} thread{'s' * (threads > 1)}{busy}"


class Measurement(NamedTuple):
    """A pass over `images` at a time took `seconds`."""

    images: int
    seconds: float


def measure(run: Callable[[int], object], device: torch.device, *, most: int, patience: float = 0.5) -> Measurement:
    """The least of three times of `run(images)`, for the first power of two of images that takes `patience` seconds.

    Args:
        run: one pass over so many images.
        device: that it runs on, to wait for.
        most: images at a time.
        patience: seconds below which a pass says little.
    """
    images = 1
    run(images)  # the first pass allocates
    while (seconds := min(_seconds(run, images, device) for _ in range(3))) < patience and images < most:
        images = min(2 * images, most)
    return Measurement(images, seconds)


def _seconds(run: Callable[[int], object], images: int, device: torch.device) -> float:
    start = time.perf_counter()
    run(images)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
