"""Speed and memory on this CPU, beside the authors' modules where their code is at hand.

    python benchmarks/cpu.py                                    # this package alone
    python benchmarks/cpu.py --reference ../RAE/src             # and the authors', same weights, same inputs
    python benchmarks/cpu.py --reference ../RAE/src --json results.jsonl

DiT-DH-S on 16x16x384 latents, DINOv2-S and a ViT-B decoder at 256 px. Repetitions are interleaved (ours, theirs, ours,
theirs, ...), so that a noisy machine is noisy for both; the peak memory of every case is that of a process of its own.
Memory is read from /proc, so this runs on Linux.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import reference
import torch
from models import Inputs, Ours, save_encoder
from rich.console import Console
from rich.table import Table

SAMPLED = 2  # images per sampling call


class Case(NamedTuple):
    name: str
    run: Callable  # (side, batch) -> output
    passes: int = 0  # forward passes that it is worth, where the share of the matmul rate is of interest
    dtype: torch.dtype = torch.float32
    sampled: bool = False


def _cases() -> list[Case]:
    cases = []
    for dtype, label in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        cases += [
            Case(f"forward {label}", lambda side, batch, d=dtype: side.forward(batch, d), 1, dtype),
            Case(f"forward+backward {label}", lambda side, batch, d=dtype: side.forward_backward(batch, d), 3, dtype),
        ]
    for guidance in ("unguided", "CFG", "AutoGuidance"):
        cases.append(Case(f"Euler {guidance}", lambda side, batch, g=guidance: side.sample(batch, g), sampled=True))
    return [*cases, Case("encode", lambda s, b: s.encode(b)), Case("decode", lambda s, b: s.decode(b))]


CASES = {case.name: case for case in _cases()}


# --- measuring -------------------------------------------------------------------------------------------------------


def seconds(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    run()
    return clock() - start


def matmul_rate(dtype: torch.dtype, clock: Callable[[], float], n: int = 2048) -> float:
    """The best rate of a square matrix product, GFLOP/s."""
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    return 2 * n**3 / min(seconds(lambda: torch.mm(a, b), clock) for _ in range(10)) / 1e9


def measure(case: Case, sides: dict, batch: Inputs, repeats: int, clock: Callable[[], float]) -> dict:
    """Times of every side, interleaved after one run to warm up, and how far their outputs are apart."""
    outputs = {name: case.run(side, batch) for name, side in sides.items()}
    times = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            times[name].append(seconds(lambda side=side: case.run(side, batch), clock))
    result = {"case": case.name, "images": len(batch.x), "seconds": times}
    if "theirs" in sides:
        ratios = [theirs / ours for ours, theirs in zip(times["ours"], times["theirs"])]
        result["ratio"] = statistics.median(times["theirs"]) / statistics.median(times["ours"])
        result["ratio_spread"] = [min(ratios), max(ratios)]
        difference = (outputs["ours"] - outputs["theirs"]).abs().max() / outputs["theirs"].std()
        result["largest_difference"] = difference.item()
    return result


def status(field: str) -> float:
    """Memory of this process now (VmRSS) or at most so far (VmHWM), MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def peak(case: Case, make: Callable, batch: Inputs) -> float:
    """Peak memory of one run with its model, MiB above what the imports take."""
    before = status("VmRSS")
    case.run(make(weights=False), batch)
    return status("VmHWM") - before


def peak_elsewhere(case: str, side: str, folder: Path, arguments: argparse.Namespace) -> float:
    command = [sys.executable, __file__, "--batch", str(arguments.batch), "--peak", case, side, str(folder)]
    if arguments.reference:
        command += ["--reference", str(arguments.reference)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def help_seconds() -> float:
    """The best of five starts of `rae --help`."""
    command = [Path(sys.executable).parent / "rae", "--help"]
    return min(seconds(lambda: subprocess.run(command, capture_output=True, check=True)) for _ in range(5))


# --- reporting -------------------------------------------------------------------------------------------------------


def table(results: list[dict], rates: dict[str, float], clock: str) -> Table:
    view = Table(title=f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads, {clock}")
    for column in ("case", "images/s", "of matmul", "peak MiB", "theirs", "peak", "ratio", "spread", "difference"):
        view.add_column(column, justify="left" if column == "case" else "right")
    for row in results:
        rate = {name: row["images"] / statistics.median(times) for name, times in row["seconds"].items()}
        cells = [
            f"{rate['ours']:.2f}",
            f"{row['share']:.0%}" if "share" in row else "",
            f"{row['peak_mib']['ours']:.0f}",
        ]
        if "theirs" in rate:
            low, high = row["ratio_spread"]
            cells += [f"{rate['theirs']:.2f}", f"{row['peak_mib']['theirs']:.0f}"]
            cells += [f"{row['ratio']:.2f}", f"{low:.2f}-{high:.2f}", f"{row['largest_difference']:.0e}"]
        view.add_row(row["case"], *cells)
    view.caption = ", ".join(f"matmul {name} {rate:.0f} GFLOP/s" for name, rate in rates.items())
    return view


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, help="the folder `src` of a checkout of github.com/bytetriper/RAE")
    parser.add_argument("--batch", type=int, default=4, help="images per call (sampling takes 2)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--json", type=Path, help="write one JSON object per case to this file")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--cpu-time", action="store_true", help="one thread, in processor time: for a busy machine")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    if arguments.cpu_time:
        torch.set_num_threads(1)
    batch = Inputs.draw(arguments.batch)
    if arguments.reference:
        reference.open_checkout(arguments.reference)
    if arguments.peak:
        name, side, folder = arguments.peak
        make = partial(Ours if side == "ours" else reference.Theirs, Path(folder))
        if side == "theirs":
            make = partial(make, arguments.reference)
        print(peak(CASES[name], make, batch[:SAMPLED] if CASES[name].sampled else batch))
        return

    results = []
    with tempfile.TemporaryDirectory() as temporary, contextlib.suppress(KeyboardInterrupt):
        folder = Path(temporary)
        save_encoder(folder / "encoder")
        sides = {"ours": Ours(folder, weights=bool(arguments.reference))}
        if arguments.reference:
            reference.save_weights(folder, arguments.reference)
            sides["theirs"] = reference.Theirs(folder, arguments.reference, weights=True)
        rates = {"fp32": matmul_rate(torch.float32, clock), "bf16": matmul_rate(torch.bfloat16, clock)}
        flops = sides["ours"].flops(batch)
        for name in arguments.only:
            case = CASES[name]
            row = measure(case, sides, batch[:SAMPLED] if case.sampled else batch, arguments.repeats, clock)
            if case.passes:
                rate = rates["fp32" if case.dtype == torch.float32 else "bf16"]
                row["gflops"] = case.passes * flops / statistics.median(row["seconds"]["ours"]) / 1e9
                row["share"] = row["gflops"] / rate
            row["peak_mib"] = {side: peak_elsewhere(name, side, folder, arguments) for side in sides}
            results.append(row)
            print(name, *(f"{s}: {statistics.median(times):.2f} s" for s, times in row["seconds"].items()), flush=True)
    Console(width=120).print(table(results, rates, clock.__name__))
    start_up = help_seconds()
    print(f"rae --help: {start_up:.2f} s (best of 5)")
    if arguments.json:
        about = {"cpus": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        about |= {"clock": clock.__name__, "matmul_gflops": rates, "help_seconds": start_up, "load": os.getloadavg()}
        lines = [json.dumps(about), *(json.dumps(row) for row in results)]
        arguments.json.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
