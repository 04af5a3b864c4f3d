"""rnnkern on the CPU against torch.nn.RNN and every peer from PyPI: checked, then timed in turns.

    pip install --no-build-isolation -e '.[bench]'
    python bench/cpu.py [--threads N] [--rounds N] [--seconds S] [--json FILE]
                        [--shapes 1,100,1,16 64,128,512,512 ...] [--random N] [--peers NAME ...]
                        [--memory]

Every result (outputs, all gradients) is checked against torch.nn.RNN in float64 before anything of
a shape is timed. Then all of its calls are timed in one process, in a random order in each round:
microseconds are medians over the rounds, ratios medians of the ratios within a round, above 1 where
rnnkern is faster. It prints four tables:

- modules: rnnkern.RNN against torch.nn.RNN as users call them. Forward without gradients, training
  is forward, sum().backward() into x and every parameter. Peak memory is what the first two
  training steps of a process need above the module and x: code, threads and buffers that a library
  makes at its first call and keeps are in it: several MB of either module, which a measurement
  after other steps would not see. --memory: this alone.
- raw calls: rnn_layer, and its backward op without autograd, against the peers' raw calls
  (bench/peers.py says what is in a call). The best of them, whichever that is, is the bar.
- bfloat16 and weights: the forward in bfloat16; weights that stay the same between calls without
  gradients (they are kept packed) against weights packed in every call.
- bounds: the share of what the machine can do: of torch's own large sgemm for products, and for a
  recurrence of one row of the speed at which its threads read weights of that size. Both are timed
  in the same rounds.

The default is the ten shapes of the README, all peers: 4 minutes on two cores. --random adds odd
shapes. A peer that is not installed is named at the end, with the command that installs it. On
one thread (--threads 1) and on more, short steps differ: both are worth a run.
"""

import concurrent.futures
import contextlib
import ctypes
import functools
import importlib.metadata
import multiprocessing
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from peers import (
    BFLOAT16,
    ONEDNN_BFLOAT16,
    OP,
    OURS,
    OURSELVES,
    PACKAGES,
    PEERS,
    REPACKED,
    TORCH,
    Case,
    Shape,
    make,
)
from timing import REST, SECONDS, arguments, finish, host, measure

import rnnkern

SHAPES = [
    Shape(1, 100, 1, 16),
    Shape(16, 5, 1, 16),
    Shape(1, 256, 64, 64),
    Shape(16, 128, 64, 128),
    Shape(32, 256, 128, 256),
    Shape(1, 512, 512, 512),
    Shape(64, 128, 512, 512),
    Shape(64, 64, 1024, 1024),
    Shape(256, 32, 256, 256),
    Shape(1, 128, 2048, 2048),
]
TINY = Shape(2, 4, 3, 5)  # "--shapes tiny", to see that all works
RANDOM_FLOPS = 2e11  # of all random shapes' forwards together, so that they end
KEPT = 256 * 256  # elements of w_hh from which it is kept packed (csrc/cpu/packed.cpp)
SGEMM_SIZE = 2048
SGEMM, READ = "sgemm", "reading weights"
FORWARD, TRAINING = "forward", "training"


def shape_of(text: str) -> Shape:
    return TINY if text == "tiny" else Shape(*map(int, text.split(",")))


def random_shapes(count: int) -> list[Shape]:
    """Odd sizes up to B 256, T 1000, I and H 2048, the squares of uniform numbers."""
    draw, shapes = random.Random(0), []
    while len(shapes) < count:
        sizes = [int(n * draw.random() ** 2) | 1 for n in (255, 999, 2047, 2047)]
        if Shape(*sizes).forward_flops() <= RANDOM_FLOPS / count:
            shapes.append(Shape(*sizes))
    return shapes


# ---- peak memory ----


def _status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def _training_peak(kind: type[torch.nn.RNN], shape: Shape, send) -> None:
    """Sends how many bytes the first two training steps take beyond the module and x."""

    def step(module, x):
        module(x)[0].sum().backward()

    module = kind(shape.I, shape.H)
    x = torch.randn(shape.T, shape.B, shape.I, requires_grad=True)
    Path("/proc/self/clear_refs").write_text("5")  # the peak (VmHWM) starts anew
    before = _status("VmRSS")
    for _ in range(2):
        step(module, x)
    send.send(_status("VmHWM") - before)


def training_peaks(shape: Shape) -> dict[str, int]:
    """Bytes, of both modules. The children are forks: first, before anything here has threads."""
    peaks = {}
    context = multiprocessing.get_context("fork")
    for name, kind in ((TORCH, torch.nn.RNN), (OURS, rnnkern.RNN)):
        receive, send = context.Pipe(duplex=False)
        child = context.Process(target=_training_peak, args=(kind, shape, send))
        child.start()
        send.close()
        with contextlib.suppress(EOFError):  # it failed, and said why
            peaks[name] = receive.recv()
        child.join()
    return peaks


# ---- what the machine can do ----


@functools.cache
def _reader():
    """read.cpp's function; None without a compiler."""
    source, options = Path(__file__).with_name("read.cpp"), ["-O3", "-march=native"]
    with tempfile.TemporaryDirectory() as folder:
        library = str(Path(folder, "read.so"))
        command = ["c++", *options, "-shared", "-fPIC", str(source), "-o", library]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"no reading speed: {error}", file=sys.stderr)
            return None
        read = ctypes.CDLL(library).read_weights
    read.argtypes, read.restype = (ctypes.c_void_p, ctypes.c_long, ctypes.c_long), ctypes.c_float
    return read


def sgemm() -> tuple[Callable, float]:
    """A call, and its operations."""
    a, b = torch.randn(2, SGEMM_SIZE, SGEMM_SIZE).unbind()
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2.0 * SGEMM_SIZE**3


def reading(shape: Shape, threads: int) -> tuple[Callable, float] | None:
    """A call that reads as many weights as w_hh has, each thread its share; and its bytes."""
    read = _reader()
    if read is None:
        return None
    count = max(128, shape.H**2 // threads // 128 * 128)
    times = max(1, int(1e8 / count))  # so many that the threads' start counts little
    # A vector more than its size, to start at a multiple of 64 bytes.
    shares = [torch.zeros(count + 16) for _ in range(threads)]
    starts = [share.data_ptr() + -share.data_ptr() % 64 for share in shares]
    pool = concurrent.futures.ThreadPoolExecutor(threads)

    def call():
        for done in [pool.submit(read, start, count, times) for start in starts]:
            done.result()

    call.shares = shares  # keeps the memory alive
    return call, 4.0 * count * times * threads


def bounds(shape: Shape, flops: float, bandwidth: float | None) -> dict[str, float]:
    """Seconds below which none can come, at so many operations and bytes a second."""
    recurrence = shape.product(shape.H) / flops
    if shape.B == 1 and bandwidth:
        recurrence = 4.0 * shape.H**2 * shape.T / bandwidth
    inputs, hidden = shape.product(shape.I) / flops, shape.product(shape.H) / flops
    return {
        FORWARD: inputs + recurrence,
        TRAINING: inputs + 2 * recurrence + 2 * inputs + hidden,  # dx and dw_ih, dw_hh
    }


# ---- timing ----


def summary(times: list[float]) -> dict[str, float]:
    tenths = statistics.quantiles(times, n=10) if len(times) > 1 else times * 9
    return {"us": statistics.median(times) * 1e6, "p20": tenths[1] * 1e6, "p80": tenths[7] * 1e6}


def timed(calls: dict[str, Callable], args) -> dict[str, list[float]]:
    times = measure(list(calls.values()), args.rounds, args.seconds, REST)
    return dict(zip(calls, times, strict=True))


def over(times: dict[str, list[float]], slow: str, fast: str) -> float | None:
    """The median over the rounds of slow / fast; None if one was not timed."""
    if slow not in times or fast not in times:
        return None
    return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))


def compare(shape: Shape, args) -> dict:
    """All figures of a shape but the memory."""
    case = Case(shape)
    names = [name for name in OURSELVES if name != REPACKED or shape.H**2 >= KEPT]
    ways, left_out = make(case, args.threads, [*names, *args.peers])
    forward = {name: way.forward for name, way in ways.items()}
    training = {name: way.train for name, way in ways.items() if way.train is not None}
    product, operations = sgemm()
    forward[SGEMM] = product
    read = reading(shape, args.threads) if shape.B == 1 else None
    if read is not None:
        forward[READ] = read[0]
    with torch.no_grad():
        times = {FORWARD: timed(forward, args)}
    times[TRAINING] = timed(training, args)

    limits = bounds(
        shape,
        operations / statistics.median(times[FORWARD][SGEMM]),
        read[1] / statistics.median(times[FORWARD][READ]) if read is not None else None,
    )
    row: dict = {"shape": tuple(shape), "left_out": left_out}
    for what, of in times.items():
        # Those that compute the same: in float32, not ours.
        rivals = [name for name in of if name in PEERS or name == TORCH]
        rivals = [name for name in rivals if name != ONEDNN_BFLOAT16]
        best = min(rivals, key=lambda name, of=of: statistics.median(of[name]))
        row[what] = {
            "calls": {name: summary(each) for name, each in of.items()},
            "module_ratio": over(of, TORCH, OURS),
            "best_peer": best,
            "op_ratio": over(of, best, OP),
            "of_bound": limits[what] / statistics.median(of[OP]),
        }
    of = times[FORWARD]
    row["bfloat16"] = {
        "x_float32": over(of, OURS, BFLOAT16),
        "x_onednn": over(of, ONEDNN_BFLOAT16, BFLOAT16),
    }
    row["weights"] = {
        "repacked_ratio": over(of, TORCH, REPACKED),
        "kept_ratio": over(of, TORCH, OURS),
    }
    row["machine"] = {
        "sgemm_gflops": operations / statistics.median(of[SGEMM]) * 1e-9,
        "read_gbs": read[1] / statistics.median(of[READ]) * 1e-9 if read is not None else None,
    }
    return row


# ---- tables ----


Cells = list[tuple[str, str]]  # column titles and texts


def cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def us(row: dict, what: str, name: str) -> str:
    call = row[what]["calls"].get(name)
    # Two digits are not enough of a call of a few microseconds.
    return "-" if call is None else f"{call['us']:.{0 if call['us'] >= 100 else 1}f}"


def ratio_cell(value: float | None) -> str:
    """Losses stand out."""
    if value is None:
        return "-"
    return f"{value:.2f}" if value >= 1 else f"**{value:.2f} (slower)**"


def module_cells(row: dict) -> Cells:
    cells: Cells = []
    for what in (FORWARD, TRAINING):
        cells += [
            (f"{what}: torch us", us(row, what, TORCH)),
            ("rnnkern us", us(row, what, OURS)),
            ("ratio", ratio_cell(row[what]["module_ratio"])),
        ]
    return cells + memory_cells(row)


def memory_cells(row: dict) -> Cells:
    cells: Cells = []
    for name, title in ((TORCH, "peak of training: torch MB"), (OURS, "rnnkern MB")):
        peak = row["training_peak"].get(name)
        cells.append((title, cell(None if peak is None else peak / 1e6, 1)))
    return cells


def raw_cells(what: str, names: list[str]) -> Callable[[dict], Cells]:
    def cells(row: dict) -> Cells:
        best = row[what]["best_peer"]
        return [
            *((f"{name} us", us(row, what, name)) for name in (TORCH, *names)),
            ("rnnkern op us", us(row, what, OP)),
            ("best peer", f"{best} {us(row, what, best)}"),
            ("best peer / op", ratio_cell(row[what]["op_ratio"])),
        ]

    return cells


def weight_cells(row: dict) -> Cells:
    return [
        ("float32 us", us(row, FORWARD, OURS)),
        ("bf16 us", us(row, FORWARD, BFLOAT16)),
        ("float32 / bf16", ratio_cell(row["bfloat16"]["x_float32"])),
        ("oneDNN bf16 us", us(row, FORWARD, ONEDNN_BFLOAT16)),
        ("oneDNN bf16 / bf16", ratio_cell(row["bfloat16"]["x_onednn"])),
        ("repacked us", us(row, FORWARD, REPACKED)),
        ("torch / repacked", ratio_cell(row["weights"]["repacked_ratio"])),
        ("torch / kept", ratio_cell(row["weights"]["kept_ratio"])),
    ]


def bound_cells(row: dict) -> Cells:
    shape, machine = Shape(*row["shape"]), row["machine"]
    cells: Cells = [
        ("sgemm GFLOP/s", cell(machine["sgemm_gflops"], 0)),
        ("reading GB/s", cell(machine["read_gbs"], 0)),
    ]
    for what, factor in ((FORWARD, 1), (TRAINING, 3)):
        gflops = factor * shape.forward_flops() / row[what]["calls"][OP]["us"] * 1e-3
        cells += [
            (f"{what}: op GFLOP/s", cell(gflops, 1)),
            (f"{what}: of the bound", f"{row[what]['of_bound']:.1%}"),
        ]
    return cells


def print_table(title: str, rows: list[dict], cells_of: Callable[[dict], Cells]) -> None:
    print(f"\n{title}\n")
    for i, row in enumerate(rows):
        cells = [("(B, T, I, H)", str(Shape(*row["shape"]))), *cells_of(row)]
        if i == 0:
            print(f"| {' | '.join(name for name, _ in cells)} |")
            print("| --- " * len(cells) + "|")
        print(f"| {' | '.join(value for _, value in cells)} |")


def report(rows: list[dict], peers: list[str]) -> None:
    """All tables, and who is missing from them."""
    print_table("Modules, float32", rows, module_cells)
    for what in (FORWARD, TRAINING):
        named = [n for n in peers if any(n in row[what]["calls"] for row in rows)]
        named = [n for n in named if n != ONEDNN_BFLOAT16]
        print_table(f"Raw calls, {what}, float32", rows, raw_cells(what, named))
    print_table("Forward in bfloat16, and of weights that change", rows, weight_cells)
    print_table("Share of the machine's bound", rows, bound_cells)
    missing: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, reason in row["left_out"].items():
            missing.setdefault((name, reason), []).append(str(Shape(*row["shape"])))
    for (name, reason), shapes in missing.items():
        where = "everywhere" if len(shapes) == len(rows) else f"at {', '.join(shapes)}"
        print(f"\nleft out {where}: {name}: {reason}")


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(rounds=7)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of one timing")
    parser.add_argument("--shapes", nargs="*", type=shape_of, default=SHAPES, metavar="B,T,I,H")
    parser.add_argument("--random", type=int, default=0, metavar="N", help="N further shapes")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), metavar="NAME")
    parser.add_argument("--memory", action="store_true", help="peak memory alone, nothing timed")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    torch.set_num_threads(args.threads)
    about = host(args) | {"versions": versions()}
    print(", ".join(f"{name} {version}" for name, version in about["versions"].items()))
    shapes = [*args.shapes, *random_shapes(args.random)]
    peaks = [training_peaks(shape) for shape in shapes]
    if args.memory:
        rows = [
            {"shape": shape, "training_peak": peak}
            for shape, peak in zip(shapes, peaks, strict=True)
        ]
        finish(args, about, rows)
        print_table("Peak memory of training", rows, memory_cells)
        return
    rows: list[dict] = []
    for shape, peak in zip(shapes, peaks, strict=True):
        start = time.perf_counter()
        rows.append(compare(shape, args) | {"training_peak": peak})
        finish(args, about, rows)  # what is there stays, should the next fail
        took = time.perf_counter() - start
        ratios = [rows[-1][what]["module_ratio"] for what in (FORWARD, TRAINING)]
        print(f"{shape}: x {ratios[0]:.2f}, {ratios[1]:.2f}; {took:.0f} s", file=sys.stderr)
    report(rows, args.peers)


if __name__ == "__main__":
    main()
