"""rnnkern.RNN against torch.nn.RNN as users call them: results checked, then timed in turns.

    python bench/modules.py [--threads N] [--rounds N] [--json FILE]

Each row is one shape in float32: the medians of both modules' microseconds, for a forward without
gradients and for a training step (forward, backward into x and every parameter), and the median
over the rounds of the ratio torch.nn.RNN / rnnkern.RNN, above 1 where rnnkern is faster.
"""

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import rnnkern
from rnnkern.check import relative_error

SHAPES = [  # (B, T, I, H)
    (1, 100, 1, 16),
    (16, 5, 1, 16),
    (1, 256, 64, 64),
    (16, 128, 64, 128),
    (32, 256, 128, 256),
    (1, 512, 512, 512),
    (64, 128, 512, 512),
    (64, 64, 1024, 1024),
    (256, 32, 256, 256),
    (1, 128, 2048, 2048),
]
SECONDS = 0.02  # of repetitions that one timing averages over


def forward(module, x):
    with torch.no_grad():
        return module(x)


def train(module, x):
    inputs = [x, *module.parameters()]
    for tensor in inputs:
        tensor.grad = None
    module(x)[0].sum().backward()
    return [tensor.grad for tensor in inputs]


def check(modules, x) -> None:
    """Outputs and gradients agree, by norm, to what float32 sums over this many terms can.

    Raises:
        AssertionError: they do not, so nothing is timed.
    """
    for of in (forward, train):
        for a, b in zip(*(of(module, x) for module in modules), strict=True):
            error = relative_error(a, b)
            if not error < 1e-4:
                raise AssertionError(f"results differ by {error:.1e}: not timed")


def seconds(call, repetitions: int) -> float:
    start = time.perf_counter()
    for _ in range(repetitions):
        call()
    return (time.perf_counter() - start) / repetitions


def measure(calls: list[Callable], rounds: int) -> list[list[float]]:
    """Each call's seconds in every round, the calls in a random order."""
    repetitions = [max(1, int(SECONDS / max(seconds(call, 2), 1e-7))) for call in calls]
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for i in random.sample(range(len(calls)), len(calls)):
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


def host(args) -> dict:
    """What the figures were measured on; printed."""
    about = {
        "processor": platform.processor() or platform.machine(),
        "instruction_set": rnnkern.library.capability(),
        "threads": args.threads,
        "torch": torch.__version__,
        "rnnkern": rnnkern.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    return about


def finish(args, about: dict, rows: list[dict]) -> None:
    """Keep the figures."""
    if args.json:
        args.json.write_text(json.dumps({"host": about, "rows": rows}, indent=1) + "\n")


def main() -> None:
    args = arguments(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    about = host(args)
    figures = ["torch us", "rnnkern us", "ratio"]
    titles = [
        "(B, T, I, H)",
        *(f"{name}: {f}" for name in ("forward", "training") for f in figures),
    ]
    print(f"| {' | '.join(titles)} |")
    print("| --- " * len(titles) + "|")
    records = []
    for b, t, i, h in SHAPES:
        torch.manual_seed(0)
        modules = torch.nn.RNN(i, h), rnnkern.RNN(i, h)
        modules[1].load_state_dict(modules[0].state_dict())
        x = torch.randn(t, b, i, requires_grad=True)
        check(modules, x)
        row = {"shape": (b, t, i, h)}
        cells = [str((b, t, i, h))]
        for name, of in (("forward", forward), ("training", train)):
            times = measure([lambda m=m, of=of, x=x: of(m, x) for m in modules], args.rounds)
            torch_us, ours_us = (statistics.median(t) * 1e6 for t in times)
            row[name] = {"torch_us": torch_us, "rnnkern_us": ours_us, "ratio": ratio(*times)}
            cells += [f"{torch_us:.0f}", f"{ours_us:.0f}", f"{row[name]['ratio']:.2f}"]
        records.append(row)
        print(f"| {' | '.join(cells)} |", flush=True)
    finish(args, about, records)


if __name__ == "__main__":
    main()
