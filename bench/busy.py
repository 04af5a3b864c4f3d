"""rnnkern.RNN against torch.nn.RNN on a machine that has no core to spare: checked, timed in turns.

    python bench/busy.py [--rounds N] [--json FILE] [--shapes 1,100,1,16 64,128,512,512 ...]

Two loads: four times as many threads as there are cores, and another process that spins on one of
the cores. Float32; the medians of microseconds, their 80th percentiles, and the medians of the
ratios of a round, above 1 where rnnkern is faster. Training is forward and sum().backward().
"""

import os
import subprocess
import sys
from contextlib import contextmanager

import torch
from cpu import FORWARD, TRAINING, ratio_cell, shape_of, summary
from peers import OURS, TORCH, Case, Shape, make
from timing import arguments, finish, host, measure, ratio

SHAPES = [
    Shape(1, 100, 1, 16),
    Shape(16, 5, 1, 16),
    Shape(1, 256, 64, 64),
    Shape(16, 128, 64, 128),
    Shape(1, 512, 512, 512),
    Shape(64, 128, 512, 512),
    Shape(1, 128, 2048, 2048),
]


@contextmanager
def many_threads(cores: list[int]):
    torch.set_num_threads(4 * len(cores))
    yield
    torch.set_num_threads(len(cores))


@contextmanager
def busy_core(cores: list[int]):
    spin = f"import os; os.sched_setaffinity(0, [{cores[-1]}])\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", spin]) as process:
        try:
            yield
        finally:
            process.kill()


def compare(shape: Shape, threads: int, rounds: int) -> dict:
    """Medians and ratios of both directions, under whatever load there is."""
    ways, _ = make(Case(shape), threads, [TORCH, OURS])
    row: dict = {}
    for what in (FORWARD, TRAINING):
        calls = [ways[n].forward if what == FORWARD else ways[n].train for n in (TORCH, OURS)]
        with torch.set_grad_enabled(what == TRAINING):
            torch_times, our_times = measure(calls, rounds)
        row[what] = {
            TORCH: summary(torch_times),
            OURS: summary(our_times),
            "ratio": ratio(torch_times, our_times),
        }
    return row


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shapes", nargs="*", type=shape_of, default=SHAPES, metavar="B,T,I,H")
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    loads = {
        f"{4 * len(cores)} threads on {len(cores)} cores": many_threads,
        "a busy core": busy_core,
    }
    about = host(args)
    titles = ["load", "(B, T, I, H)"]
    for what in (FORWARD, TRAINING):
        titles += [f"{what}: torch us (p80)", "rnnkern us (p80)", "ratio"]
    print(f"| {' | '.join(titles)} |\n{'| --- ' * len(titles)}|")
    rows = []
    for name, load in loads.items():
        for shape in args.shapes:
            with load(cores):
                row = compare(shape, torch.get_num_threads(), args.rounds)
            rows.append({"load": name, "shape": tuple(shape)} | row)
            cells = [name, str(shape)]
            for what in (FORWARD, TRAINING):
                for way in (TORCH, OURS):
                    cells.append("{us:.0f} ({p80:.0f})".format(**row[what][way]))
                cells.append(ratio_cell(row[what]["ratio"]))
            print(f"| {' | '.join(cells)} |", flush=True)
            finish(args, about, rows)


if __name__ == "__main__":
    main()
