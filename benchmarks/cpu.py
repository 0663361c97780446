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
    random: bool = False  # each side draws for itself, so that outputs cannot be compared


def _cases() -> list[Case]:
    cases = []
    for dtype, label in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        cases += [
            Case(f"forward {label}", lambda side, batch, d=dtype: side.forward(batch, d), 1, dtype),
            Case(f"forward+backward {label}", lambda side, batch, d=dtype: side.forward_backward(batch, d), 3, dtype),
            Case(f"training step {label}", lambda side, batch, d=dtype: side.train(batch, d), 3, dtype, random=True),
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


def measure(case: Case, sides: dict, batch: Inputs, repeats: int, clock: Callable[[], float]) -> dict:
    """Times of every side, interleaved after one run to warm up, and how far their outputs are apart."""
    outputs = {name: case.run(side, batch) for name, side in sides.items()}
    times, products, square = {name: [] for name in sides}, [], torch.randn(2048, 2048).to(case.dtype)
    for _ in range(repeats):
        for name, side in sides.items():
            times[name].append(seconds(lambda side=side: case.run(side, batch), clock))
        products += [seconds(lambda: torch.mm(square, square), clock) for _ in range(3)]
    result = {"case": case.name, "images": len(batch.x), "seconds": times}
    if case.passes:
        result["matmul_gflops"] = 2 * len(square) ** 3 / statistics.median(products) / 1e9
        flops = case.passes * sides["ours"].flops(batch)
        for name in sides:
            result[f"{name}_gflops"] = flops / statistics.median(times[name]) / 1e9
    if "theirs" in sides:
        ratios = [theirs / ours for ours, theirs in zip(times["ours"], times["theirs"])]
        result["ratio"] = statistics.median(times["theirs"]) / statistics.median(times["ours"])
        result["ratio_spread"] = [min(ratios), max(ratios)]
        if not case.random:
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


def table(results: list[dict], clock: str) -> Table:
    """images/s, share of the rate of a 2048 x 2048 matrix product, peak memory: ours, then theirs; theirs / ours."""
    view = Table(title=f"torch {torch.__version__} on {platform.machine()}, {torch.get_num_threads()} threads, {clock}")
    sides = ["ours", "theirs"] if "ratio" in results[0] else ["ours"]
    columns = [f"{side} {column}" for side in sides for column in ("images/s", "matmul", "MiB")]
    for column in ("case", *columns, *(["ratio", "spread", "difference"] if len(sides) == 2 else [])):
        view.add_column(column, justify="left" if column == "case" else "right")
    for row in results:
        cells = []
        for side in sides:
            share = f"{row[f'{side}_gflops'] / row['matmul_gflops']:.0%}" if "matmul_gflops" in row else ""
            rate = row["images"] / statistics.median(row["seconds"][side])
            cells += [f"{rate:.2f}", share, f"{row['peak_mib'][side]:.0f}"]
        if len(sides) == 2:
            low, high = row["ratio_spread"]
            difference = f"{row['largest_difference']:.0e}" if "largest_difference" in row else ""
            cells += [f"{row['ratio']:.2f}", f"{low:.2f}-{high:.2f}", difference]
        view.add_row(row["case"], *cells)
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
        for name in arguments.only:
            case = CASES[name]
            row = measure(case, sides, batch[:SAMPLED] if case.sampled else batch, arguments.repeats, clock)
            row["peak_mib"] = {side: peak_elsewhere(name, side, folder, arguments) for side in sides}
            results.append(row)
            print(name, *(f"{s}: {statistics.median(times):.2f} s" for s, times in row["seconds"].items()), flush=True)
    Console(width=160).print(table(results, clock.__name__))
    start_up = help_seconds()
    print(f"rae --help: {start_up:.2f} s (best of 5)")
    if arguments.json:
        about = {"cpus": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        about |= {"clock": clock.__name__, "help_seconds": start_up, "load": os.getloadavg()}
        lines = [json.dumps(about), *(json.dumps(row) for row in results)]
        arguments.json.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
