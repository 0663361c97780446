"""Metrics on features, beside the implementations that published figures come from, on the same inputs.

    python benchmarks/metrics.py                         # about three minutes on a core
    python benchmarks/metrics.py --only distance errors  # some of it
    python benchmarks/metrics.py --cpu-time              # on a machine that is busy with other work

    distance    Frechet distance from moments, beside scipy.linalg.sqrtm of the product of the covariances
    few         the same of fewer images than features: from the features, beside their covariance
    errors      the distance of 10,000 images of 2,048 features and its standard error, beside a bootstrap
    overlap     precision, recall, density and coverage with their errors, beside prdc's (pip install prdc)
    memory      peak and time of the distance with its error for 50,000 images of 2,048 features (410 MB of float32)

Ways are interleaved (ours, theirs, ours, ...); each figure is the median of its repetitions, a ratio is theirs / ours.
Features are of 32 dimensions, rectified and with noise, so that spectra fall as those of real features do.
"""

import argparse
import contextlib
import io
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import scipy.linalg
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rae.evaluation.frechet import (
    Moments,
    distance_between,
    frechet_distance,
    frechet_measured,
    normal,
    normal_of,
)
from rae.evaluation.manifold import manifold, overlap

PARTS = ("distance", "few", "errors", "overlap", "memory")
Clock = Callable[[], float]
REPLICATES = 100  # of a bootstrap, of which one is measured
ROWS = 2000  # features that are made at a time


def features(count: int, dim: int, seed: int, scale: float = 1.0) -> Tensor:
    """relu(z W) + noise [count,dim] float32, z normal of 32 dimensions, W the same for all seeds."""
    mix = 0.3 * torch.randn(32, dim, generator=torch.Generator().manual_seed(0))
    generator, x = torch.Generator().manual_seed(seed), torch.empty(count, dim)
    for part in x.split(ROWS):
        z = scale * torch.randn(len(part), 32, generator=generator)
        part.copy_((z @ mix).relu_())
        part += 0.1 * torch.randn(len(part), dim, generator=generator)
    return x


def moments_of(x: Tensor) -> tuple[Tensor, Tensor]:
    moments = Moments(x.shape[1])
    moments.update(x)
    return moments.mean, moments.covariance


def interleaved(
    ways: dict[str, Callable[[], object]], repeats: int, clock: Clock
) -> tuple[dict[str, float], dict[str, object]]:
    """Median seconds of each way, and what each of them found."""
    times, found = {name: [] for name in ways}, {}
    for _ in range(repeats):
        for name, run in ways.items():
            start = clock()
            found[name] = run()
            times[name].append(clock() - start)
    return {name: statistics.median(spent) for name, spent in times.items()}, found


def distance(table: Table, dims: list[int], repeats: int, clock: Clock) -> None:
    for dim in dims:
        a, b = (moments_of(features(2 * dim, dim, seed, scale)) for seed, scale in ((1, 1.0), (2, 0.9)))

        def root(a=a, b=b) -> float:  # as the authors of FID and ADM's evaluator have it
            middle = torch.from_numpy(scipy.linalg.sqrtm((a[1] @ b[1]).numpy()).real)
            return ((a[0] - b[0]).square().sum() + (a[1] + b[1] - 2 * middle).trace()).item()

        known = normal(*b)
        ways = {
            "ours": lambda a=a, b=b: frechet_distance(*a, *b),
            "ours, reference factored": lambda a=a, known=known: distance_between(normal(*a), known),
            "sqrtm": root,
        }
        times, found = interleaved(ways, repeats, clock)
        off = abs(found["ours"] - found["sqrtm"]) / found["sqrtm"]
        for name in list(ways)[:2]:
            row(table, f"Frechet distance, d = {dim}: {name}", times[name], times["sqrtm"], f"differ by {off:.0e}")


def few(table: Table, repeats: int, clock: Clock) -> None:
    x, reference = features(1000, 2048, 1), normal_of(features(4096, 2048, 2))
    ways = {
        "ours": lambda: distance_between(normal_of(x), reference),
        "covariance": lambda: distance_between(normal(*moments_of(x)), reference),
    }
    times, found = interleaved(ways, repeats, clock)
    off = abs(found["ours"] - found["covariance"]) / found["covariance"]
    row(table, "1,000 images, d = 2048: covariance / ours", times["ours"], times["covariance"], f"differ by {off:.0e}")


def errors(table: Table, repeats: int, clock: Clock) -> None:
    x, reference = features(10_000, 2048, 1), normal_of(features(4096, 2048, 2, 0.9))
    drawn = torch.randint(len(x), (len(x),), generator=torch.Generator().manual_seed(0))
    ways = {
        "distance": lambda: distance_between(normal_of(x), reference),
        "with error": lambda: frechet_measured(x, reference),
        "replicate": lambda: distance_between(normal_of(x[drawn]), reference),
    }
    times, _ = interleaved(ways, repeats, clock)
    bootstrap = times["distance"] + REPLICATES * times["replicate"]
    row(table, "10,000 images, d = 2048: distance", times["distance"])
    row(table, f"... and error: {REPLICATES} replicates / ours", times["with error"], bootstrap, "one was measured")


def beside_prdc(table: Table, count: int, repeats: int, clock: Clock) -> None:
    try:
        from prdc import compute_prdc
    except ImportError:
        sys.exit("`overlap` is measured beside prdc: pip install prdc, or leave it out with --only.")
    x, y = (features(count, 2048, seed, scale) for seed, scale in ((1, 0.9), (2, 1.0)))

    def theirs() -> dict:
        with contextlib.redirect_stdout(io.StringIO()):
            return compute_prdc(y.numpy(), x.numpy(), nearest_k=3)

    ways = {"ours": lambda: overlap(manifold(x, k=3), manifold(y, k=3), k=3), "prdc": theirs}
    times, found = interleaved(ways, repeats, clock)
    off = max(abs(getattr(found["ours"], name).value - value) for name, value in found["prdc"].items())
    said = f"differ by {off:.0e}"
    row(table, f"precision ... coverage, {count:,} of 2048: prdc / ours", times["ours"], times["prdc"], said)


def memory(table: Table, clock: Clock) -> None:
    command = [sys.executable, __file__, "--peak", *(["--cpu-time"] if clock is time.process_time else [])]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    before, peak, seconds = (float(number) for number in lines)
    row(table, "50,000 images, d = 2048: distance and error", seconds, note=f"{peak:.2f} GB at most")
    row(table, "... imports, features and reference alone", note=f"{before:.2f} GB at most")


def peak(clock: Clock) -> None:
    """GB before and after, and seconds, of the distance with its error; in a process of its own."""
    reference = normal_of(features(4096, 2048, 2, 0.9))
    x = features(50_000, 2048, 1)
    before, start = _peak(), clock()
    frechet_measured(x, reference)
    print(before, _peak(), clock() - start)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # KiB on Linux


def row(table: Table, what: str, seconds: float | None = None, theirs: float | None = None, note: str = "") -> None:
    ratio = "" if theirs is None else f"{theirs / seconds:.2f}"
    table.add_row(what, "" if seconds is None else f"{seconds:.2f}", f"{theirs:.2f}" if theirs else "", ratio, note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--dims", type=int, nargs="+", default=[768, 2048], help="of `distance`  [768 2048]")
    parser.add_argument("--images", type=int, default=5000, help="of `overlap`  [5000]")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="seconds of all threads together, not of the clock")
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    if arguments.peak:
        peak(clock)
        return
    title = f"torch {torch.__version__}, scipy {scipy.__version__}, {platform.machine()}, "
    table = Table(title=title + f"{torch.get_num_threads()} of {os.cpu_count()} cores, {clock.__name__}")
    for header in ("", "seconds", "theirs", "ratio", ""):
        table.add_column(header, justify="right" if header else "left")
    measured = {
        "distance": lambda: distance(table, arguments.dims, arguments.repeats, clock),
        "few": lambda: few(table, arguments.repeats, clock),
        "errors": lambda: errors(table, arguments.repeats, clock),
        "overlap": lambda: beside_prdc(table, arguments.images, arguments.repeats, clock),
        "memory": lambda: memory(table, clock),
    }
    for name in arguments.only:
        measured[name]()
        print(f"{name}: measured", file=sys.stderr, flush=True)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
