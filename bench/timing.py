"""What the benchmarks share: timing in turns, their flags, the host's description, the JSON file.

Calls that are compared are timed in one process, in a random order in every round, so that what
else happens on the machine happens to all of them; ratios are taken within a round.
"""

import argparse
import json
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

import rnnkern

SECONDS = 0.02  # of repetitions that one timing averages over
# Threads that wait for work spin a while before they sleep: those of OpenMP (torch's, oneDNN's and
# ours are the same ones) for 300,000 pauses, about 10 ms. On a machine without idle cores they
# would slow down whoever comes next.
REST = 0.02


def seconds(call: Callable, repetitions: int) -> float:
    """The mean of the repetitions."""
    start = time.perf_counter()
    for _ in range(repetitions):
        call()
    return (time.perf_counter() - start) / repetitions


def measure(
    calls: list[Callable], rounds: int, per_timing: float = SECONDS, rest: float = 0.0
) -> list[list[float]]:
    """Each call's seconds in every round, the calls in a random order.

    rest: seconds of sleep before each timing, for other libraries' threads to fall asleep.
    """
    estimates = [min(seconds(call, 1), seconds(call, 2)) for call in calls]
    repetitions = [max(1, int(per_timing / max(estimate, 1e-7))) for estimate in estimates]
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for i in random.sample(range(len(calls)), len(calls)):
            if rest:
                time.sleep(rest)
                # Wakes this call's own threads; beside a long call that costs nothing.
                for _ in range(min(2, repetitions[i] - 1)):
                    calls[i]()
            times[i].append(seconds(calls[i], repetitions[i]))
    return times


def ratio(times: list[float], others: list[float]) -> float:
    """The median over the rounds of times / others."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def arguments(doc: str) -> argparse.ArgumentParser:
    """The flags of the benchmarks."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    return parser


def processor() -> str:
    """The CPU's model, as Linux names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """The commit that is checked out, with a + if files differ from it; "" outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def host(args) -> dict:
    """What the figures were measured on; printed."""
    about = {
        "processor": processor(),
        "instruction_set": rnnkern.library.capability(),
        "threads": args.threads,
        "torch": torch.__version__,
        "rnnkern": rnnkern.__version__,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    return about


def finish(args, about: dict, rows: list[dict]) -> None:
    """Keep the figures."""
    if args.json:
        args.json.write_text(json.dumps({"host": about, "rows": rows}, indent=1) + "\n")
