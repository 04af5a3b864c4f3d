"""rnnkern's GPU backends and their peers on one GPU: results checked, then timed.

    python bench/gpu.py [--out FILE [--resume]] [--budget SECONDS] [--backend NAME]
                        [--small | --dry-run]

Layers of T = 512 steps, in float32 with and without TF32, float16 and bfloat16, forward and in
training (forward, backward into the input and every parameter): plain, packed, in two directions
and four deep; by the CUDA kernels and by Triton's, against torch.nn.RNN (cuDNN), the notebook's
loop, the loop with a compiled step, and FlashRNN where it can be imported; and plain layers in
every regime of the CUDA kernels, to see what the launcher should have chosen. What matters most
comes first, and every figure is on disk, a line of JSON, as soon as it is known: whatever the
budget leaves out, the rest can be used. A table comes last; bench/report.py makes tables and a
picture of the file.

--resume: go on with what FILE has not yet. --backend: this one alone. --small: parity in tiny
shapes and nothing else (for compute-sanitizer, and with RNNKERN_CUDA_REGIME set, in one regime).
--dry-run: tiny shapes on the CPU, by Triton's interpreter, to find out that this script works.
"""

import argparse
import contextlib
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

if "--dry-run" in sys.argv:  # before Triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnkern
from rnnkern import parity
from rnnkern.backends import cuda
from rnnkern.parity import TOLERANCES, relative_error

# Name -> dtype, whether float32's products may be TF32.
MODES = {
    "bfloat16": (torch.bfloat16, False),
    "tf32": (torch.float32, True),
    "float16": (torch.float16, False),
    "float32": (torch.float32, False),
}
BACKENDS = ("cuda", "triton")  # in the order of "auto"
REGIMES = ("warp", "block", "cluster", "grid", "fma")
KINDS = ("plain", "packed", "2 directions", "4 layers")
WHAT = ("forward", "training")
# Of what takes long, fewer repetitions: as many as fit ENOUGH_MS, and FEW at least.
REPETITIONS, FEW, ENOUGH_MS, WARM_UPS = 15, 5, 300, 3


class Case(NamedTuple):
    """One layer and what is done with it."""

    kind: str
    what: str
    mode: str
    batch: int
    steps: int
    features: int
    hidden: int


class Bench:
    """Where it runs, how long it still may, and where figures go."""

    def __init__(self, args):
        self.device = torch.device("cpu" if args.dry_run else "cuda")
        self.timing = not args.small
        self.allowed = (args.backend,) if args.backend else BACKENDS
        self.until = time.monotonic() + args.budget
        self.records: list[dict] = []
        if args.resume:
            lines = args.out.read_text().splitlines(keepends=True)
            self.records = [json.loads(line) for line in lines if line.endswith("\n")]
        self.file = args.out.open("w") if args.out else None
        for record in self.records:
            self.file.write(json.dumps(record) + "\n")

    def left(self) -> float:
        return self.until - time.monotonic()

    def has(self, case: "Case", **which: str) -> bool:
        """Whether the case was timed before: of a section, and of a way or regime."""
        about = case._asdict() | which
        return any(about.items() <= r.items() for r in self.records if "python_us" in r)

    def put(self, **record) -> None:
        """Keep a record, on disk at once."""
        self.records.append(record)
        line = json.dumps(record)
        print(line, flush=True)
        if self.file:
            self.file.write(line + "\n")
            self.file.flush()
            os.fsync(self.file.fileno())

    @contextlib.contextmanager
    def said(self, **about) -> Iterator[None]:
        """What goes wrong is a record too, and the next thing goes on."""
        try:
            yield
        except Exception as error:
            self.put(**about, error=f"{type(error).__name__}: {error}"[:500])
            if self.device.type == "cuda":
                torch.cuda.synchronize()


# ---- cases ----


def grid(device: torch.device) -> list[Case]:
    """All cases, what matters most first."""
    if device.type == "cpu":
        shapes = [(2, 4, 3, 16), (17, 5, 9, 20)]
        order = [0] * len(shapes)
    else:
        sizes = [64, 256, 128, 512, 1024, 16, 32, 768, 2048, 4096]
        batches = [16, 64, 1, 256]
        pairs = list(itertools.product(sizes, batches))
        shapes = [(b, 512, min(h, 256), h) for h, b in pairs]
        # The distance from the middle of what people run.
        order = [sizes.index(h) + 2 * batches.index(b) for h, b in pairs]
    ranked = []
    for (shape, distance), mode in itertools.product(
        zip(shapes, order, strict=True), enumerate(MODES)
    ):
        for (k, kind), what in itertools.product(enumerate(KINDS), WHAT):
            if k and device.type == "cuda" and shape[3] not in (16, 64, 256, 1024):
                continue
            rank = distance + mode[0] + (6 + k if k else 0)
            ranked.append((rank, Case(kind, what, mode[1], *shape)))
    return [case for _, case in sorted(ranked, key=lambda pair: pair[0])]


def set_mode(mode: str) -> torch.dtype:
    """torch's switches, those of the recurrence and of other products; the dtype."""
    dtype, tf32 = MODES[mode]
    precision = "tf32" if tf32 else "ieee"
    torch.backends.cudnn.rnn.fp32_precision = precision
    torch.backends.cuda.matmul.fp32_precision = precision
    return dtype


def layer(make, case: Case, device, dtype, **options) -> nn.Module:
    return make(
        case.features,
        case.hidden,
        num_layers=4 if case.kind == "4 layers" else 1,
        bidirectional=case.kind == "2 directions",
        device=device,
        dtype=dtype,
        **options,
    )


def backends(bench: "Bench", case: Case) -> list[str]:
    """Those that run a case: the first is what "auto" takes, others are timed at one batch."""
    reasons = rnnkern.explain(bench.device, MODES[case.mode][0], case.hidden)
    running = [name for name in bench.allowed if not reasons[name]]
    return running if case.batch == 16 or bench.device.type == "cpu" else running[:1]


def twins(case: Case, device, dtype, backend: str) -> tuple[nn.Module, nn.Module]:
    """torch.nn.RNN and rnnkern.RNN of the same weights."""
    torch.manual_seed(0)
    stock = layer(nn.RNN, case, device, dtype)
    ours = layer(rnnkern.RNN, case, device, dtype, backend=backend)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def data(case: Case, device, dtype, steps: int | None = None) -> Tensor | PackedSequence:
    """Inputs of a case; packed: of lengths that fall off as texts' do."""
    steps = steps or case.steps
    x = torch.randn(steps, case.batch, case.features, device=device, dtype=dtype)
    if case.kind != "packed":
        return x
    lengths = (steps / 4 * (0.8 * torch.randn(case.batch)).exp()).long().clamp(1, steps)
    lengths[0] = steps
    return pack_padded_sequence(x, lengths, enforce_sorted=False)


def forward(module: nn.Module, x) -> list[Tensor]:
    with torch.no_grad():
        out, h_n = module(x)
    return [out.data if isinstance(out, PackedSequence) else out, h_n]


def train(module: nn.Module, x) -> list[Tensor]:
    """The gradients of every parameter and, of a plain batch, of the input."""
    wanted = [*module.parameters()]
    if isinstance(x, Tensor):
        x = x.detach().requires_grad_()
        wanted.append(x)
    out = module(x)[0]
    out = out.data if isinstance(out, PackedSequence) else out
    return list(torch.autograd.grad(out, wanted, torch.ones_like(out)))


def poison(device: torch.device) -> None:
    """Fill memory with NaN and free it: what a kernel leaves unwritten may show."""
    blocks = [torch.full((1 << n,), float("nan"), device=device) for n in range(8, 24)]
    del blocks


def plan(bench: Bench, case: Case) -> str:
    """What the CUDA kernels' launcher makes of a case's forward scan."""
    dtype, tf32 = MODES[case.mode]
    single = "TF32" if tf32 else "3xTF32"
    precision = single if dtype == torch.float32 else str(dtype).removeprefix("torch.")
    how = cuda.plan(
        *(case.hidden, case.batch, case.steps, 2 if case.kind == "2 directions" else 1, precision),
        index=torch.cuda.current_device(),
    )
    return how.refusal or f"{how.regime}, {how.tile_rows} rows, {how.blocks} blocks"


def check_results(bench: Bench, case: Case, backend: str) -> float:
    """The largest relative error of a few steps against float64.

    Raises:
        AssertionError: it is more than twice torch.nn.RNN's and rnnkern/parity.py's floor (TF32's
            is its rounding), so nothing is timed.
    """
    dtype, tf32 = MODES[case.mode]
    stock, ours = twins(case, bench.device, dtype, backend)
    x = data(case, bench.device, dtype, steps=min(case.steps, 8))
    exact, x64 = layer(nn.RNN, case, bench.device, torch.float64), x.to(torch.float64)
    exact.load_state_dict(stock.state_dict())
    worst = 0.0
    for of in (forward, train):
        right, peer = of(exact, x64), of(stock, x)
        poison(bench.device)
        for a, b, c in zip(of(ours, x), right, peer, strict=True):
            error, stocks = relative_error(a, b), relative_error(c, b)
            allowed = 2 * stocks + (2e-3 if tf32 else TOLERANCES[dtype].floor)
            if not error <= allowed:
                raise AssertionError(f"off by {error:.1e}, allowed {allowed:.1e}: not timed")
            worst = max(worst, error)
    return worst


# ---- timing ----


def sets_of(bench: Bench, case: Case, dtype) -> list:
    """Inputs enough that none is in the level 2 cache when its turn comes."""
    if bench.device.type == "cpu":
        return [data(case, bench.device, dtype)]
    each = case.batch * case.steps * (case.features + 2 * case.hidden) * dtype.itemsize
    cache = torch.cuda.get_device_properties(bench.device).L2_cache_size
    return [data(case, bench.device, dtype) for _ in range(max(2, min(6, 2 * cache // each + 1)))]


def capture(call: Callable, sets: list) -> list[Callable] | None:
    """A CUDA graph of the call for each of the inputs; None where it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            call(sets[0])
    torch.cuda.current_stream().wait_stream(stream)
    graphs = []
    try:
        for x in sets:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                graph.kept = call(x)
            graphs.append(graph)
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return [graph.replay for graph in graphs]


def milliseconds(calls: list[Callable]) -> list[float]:
    """Of up to REPETITIONS calls in turn, by events; the GPU is kept busy while they are queued."""
    for i in range(WARM_UPS):
        calls[i % len(calls)]()
    times = []
    for i in range(REPETITIONS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(20_000)
        start.record()
        calls[i % len(calls)]()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
        if len(times) >= FEW and sum(times) > ENOUGH_MS:
            break
    return times


def measure(bench: Bench, call: Callable, sets: list) -> dict[str, float]:
    """Microseconds of a call: as a CUDA graph, and as Python calls it; median and 20th and 80th."""
    if bench.device.type == "cpu":
        start = time.perf_counter()
        call(sets[0])
        return {"graph_us": (time.perf_counter() - start) * 1e6, "python_us": 0.0}
    figures = {}
    eager = [lambda x=x: call(x) for x in sets]
    for name, calls in (("python", eager), ("graph", capture(call, sets))):
        if calls is not None:
            times = sorted(1e3 * t for t in milliseconds(calls))
            figures[f"{name}_us"] = statistics.median(times)
            figures[f"{name}_us_p20"] = times[len(times) // 5]
            figures[f"{name}_us_p80"] = times[-1 - len(times) // 5]
    return figures


def floor_us(case: Case) -> float | None:
    """A bound that no kernel on an H100 or H200 can pass, forward and plain: arithmetic at full
    speed on 132 SMs, or x_proj and h to and from memory, and a step's chain of latencies."""
    if (case.kind, case.what) != ("plain", "forward"):
        return None
    dtype = MODES[case.mode][0]
    b, h, size = case.batch, case.hidden, dtype.itemsize
    flops = {"bfloat16": 990e12, "float16": 990e12, "tf32": 495e12, "float32": 67e12}[case.mode]
    seconds = max(2 * b * h * h / flops, 2 * b * h * size / 4.8e12)
    cycles = 33 + 30 + (49 if h > 48 else 0)
    weight = h * h * size
    cycles += 300 if weight > 5.3e6 else 200 if weight > 330e3 else 0
    return case.steps * (seconds + cycles / 1.9e9) * 1e6


# ---- who runs ----


def notebook_loop(stock: nn.RNN, step: Callable | None = None) -> Callable:
    """The notebook's loop over the cell, of a plain layer's weights."""
    w_ih, w_hh, b_ih, b_hh = (p.detach() for p in stock.parameters())

    def plain(x, h):
        return torch.tanh(x @ w_ih.t() + b_ih + h @ w_hh.t() + b_hh)

    step = plain if step is None else step(plain)

    def run(x):
        h, out = x.new_zeros(x.size(1), w_hh.size(0)), []
        for t in range(x.size(0)):
            h = step(x[t], h)
            out.append(h)
        return torch.stack(out)

    return torch.no_grad()(run)


def flashrnn(stock: nn.RNN, case: Case) -> Callable | None:
    """FlashRNN's fused Elman kernel on a layer's weights, its input product included; None where it
    does not serve the case. Raises ImportError where it is not installed."""
    import flashrnn
    from flashrnn import flashrnn as run

    if case.kind != "plain" or case.mode == "float32" or case.hidden % 16 or case.batch % 16:
        return None
    # Its own probe of the GPU does not build on CUDA 13, and it sleeps at random before a build.
    inner, build = (
        sys.modules["flashrnn.flashrnn.flashrnn"],
        sys.modules["flashrnn.flashrnn.cuda_init"],
    )
    properties = torch.cuda.get_device_properties(0)
    inner.get_gpu_info = lambda device_id: {
        "maxThreadsPerBlock": 1024,
        "regsPerMultiprocessor": 65536,
        "multiProcessorCount": properties.multi_processor_count,
        "sharedMemPerBlockOptin": properties.shared_memory_per_block_optin,
    }
    build.random = type("NoSleep", (), {"random": staticmethod(lambda: 0.0)})
    w_ih, w_hh, b_ih, b_hh = (p.detach() for p in stock.parameters())
    T, B, H = case.steps, case.batch, case.hidden
    name = {"bfloat16": "bfloat16", "float16": "float16", "tf32": "float32"}[case.mode]
    recurrent, bias = w_hh.view(1, 1, H, H), b_hh.view(1, 1, H)
    state = w_hh.new_zeros(1, B, 1, H)
    del flashrnn

    @torch.no_grad()
    def call(x):  # (B, T, I)
        products = nn.functional.linear(x, w_ih, b_ih).view(B, T, 1, 1, H)
        return run(
            products, recurrent, bias, states=state, function="elman",
            backend="cuda_fused", dtype=name,
        )[0][0, :, :, 0]  # fmt: skip

    return call


def check_forward(out: Tensor, stock: nn.RNN, x: Tensor) -> None:
    """Raises AssertionError where an output is far from torch.nn.RNN's."""
    error = relative_error(out, forward(stock, x)[0])
    if not error < 0.05:
        raise AssertionError(f"off by {error:.1e} from torch.nn.RNN: not timed")


def run_case(bench: Bench, case: Case) -> None:
    """Check, then time torch.nn.RNN and rnnkern.RNN by each backend."""
    about = case._asdict()
    if bench.has(case, section="layer", way="rnnkern.RNN"):
        return
    dtype, running = set_mode(case.mode), backends(bench, case)
    errors = {backend: check_results(bench, case, backend) for backend in running}
    sets, of = sets_of(bench, case, dtype), forward if case.what == "forward" else train
    for backend in [None, *running]:
        stock, ours = twins(case, bench.device, dtype, backend or "auto")
        way, extra, module = "torch.nn.RNN", {}, stock
        if backend:
            way = "rnnkern.RNN" if backend == running[0] else f"rnnkern.RNN, {backend}"
            extra, module = {"backend": backend, "relative_error": errors[backend]}, ours
        if backend == "cuda":
            extra["plan"] = plan(bench, case)
        with bench.said(section="layer", way=way, **about):
            figures = measure(bench, lambda x, m=module: of(m, x), sets)
            bench.put(
                section="layer", way=way, **about, **figures, **extra, floor_us=floor_us(case)
            )


def run_regimes(bench: Bench, case: Case) -> None:
    """The CUDA kernels of each regime that serves the case, whatever the launcher would choose."""
    dtype = set_mode(case.mode)
    sets, about = sets_of(bench, case, dtype), case._asdict()
    stock, ours = twins(case, bench.device, dtype, "cuda")
    for regime in REGIMES:
        if bench.has(case, section="regime", regime=regime):
            continue
        os.environ["RNNKERN_CUDA_REGIME"] = regime
        try:
            planned = plan(bench, case)
            if not planned.startswith(regime):
                continue
            with bench.said(section="regime", regime=regime, **about):
                check_forward(forward(ours, sets[0])[0], stock, sets[0])
                figures = measure(bench, lambda x: forward(ours, x), sets)
                bench.put(section="regime", regime=regime, plan=planned, **about, **figures)
        finally:
            del os.environ["RNNKERN_CUDA_REGIME"]


def run_peers(bench: Bench, case: Case) -> None:
    """The loop, the loop with a compiled step, and FlashRNN, forward, in a few cases."""
    about, dtype = case._asdict(), set_mode(case.mode)
    stock, _ = twins(case, bench.device, dtype, "auto")
    backend = "eager" if bench.device.type == "cpu" else "inductor"
    compiler = lambda step: torch.compile(step, backend=backend)  # noqa: E731
    ways: list[tuple[str, Callable[[], Callable | None], bool]] = [
        ("the notebook's loop", lambda: notebook_loop(stock), False),
        ("the loop, step compiled", lambda: notebook_loop(stock, compiler), False),
        ("FlashRNN cuda_fused", lambda: flashrnn(stock, case), True),
    ]
    sets = sets_of(bench, case, dtype)
    for way, make, batch_first in ways:
        if bench.has(case, section="layer", way=way):
            continue
        with bench.said(section="layer", way=way, **about):
            call = make()
            if call is None or bench.left() < 0:
                continue
            inputs = [x.transpose(0, 1).contiguous() for x in sets] if batch_first else sets
            out = call(inputs[0])
            out = out.transpose(0, 1) if batch_first else out
            check_forward(out, stock, sets[0])
            bench.put(section="layer", way=way, **about, **measure(bench, call, inputs))


def run_parity(bench: Bench) -> None:
    """rnnkern's own check of the backends on this device, in short; a failure ends the run."""
    set_mode("float32")
    shapes = [(33, 7, 33) if bench.device.type == "cuda" else (3, 2, 5)]
    layouts = ["2 groups", "packed 2 groups"]
    if not bench.timing:  # few features; tiles of several rows; several blocks to a tile
        shapes = [(3, 9, 4), (3, 2, 8), (2, 600, 20), (4, 300, 120), (3, 3, 300)]
        layouts.append("plain")
    ops = ("tanh", "softplus", parity.LINEAR, parity.LAYER)
    chosen = [parity.Case(*case) for case in itertools.product(ops, layouts, shapes)]
    outcomes = parity.run(bench.device, chosen, backends=bench.allowed)
    failed = [
        f"{o.backend}, {o.dtype}, {o.case}: {o.worst} off by {o.error:.1e}"
        for o in outcomes
        if o.failed
    ]
    refused = sorted({f"{o.backend}: {o.refused}" for o in outcomes if o.refused})
    ran = sorted({o.backend for o in outcomes if not o.refused})
    bench.put(section="parity", cases=len(outcomes), ran=ran, failed=failed, refused=refused)
    if failed or not ran:
        raise SystemExit("rnnkern: a backend is wrong, or none runs: nothing is timed")


def environment(bench: Bench, args) -> dict:
    about = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rnnkern": rnnkern.__version__,
        "library": rnnkern.library.loaded,
        **{name: rnnkern.explain(bench.device)[name] or "runs" for name in BACKENDS},
        "date": time.strftime("%Y-%m-%d"),
        "dry_run": args.dry_run,
    }
    with contextlib.suppress(ImportError):
        import triton

        about["triton"] = triton.__version__
    if bench.device.type == "cuda":
        properties = torch.cuda.get_device_properties(bench.device)
        about |= {
            "device": properties.name,
            "sms": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    else:
        about["device"] = f"{platform.machine()}, interpreted"
    return about


def table(records: list[dict]) -> list[str]:
    """Of each case that two ways were timed in: us of both, their ratio, and the floor."""
    layers = [r for r in records if r.get("section") == "layer" and "graph_us" in r]
    by: dict[tuple, dict[str, dict]] = {}
    for record in layers:
        by.setdefault(tuple(record[name] for name in Case._fields), {})[record["way"]] = record
    lines = [f"{'case':44} {'torch.nn.RNN us':>16} {'rnnkern us':>12} {'ratio':>7} {'x floor':>8}"]
    for key, ways in by.items():
        if not {"torch.nn.RNN", "rnnkern.RNN"} <= ways.keys():
            continue
        stock, ours = (ways[way]["graph_us"] for way in ("torch.nn.RNN", "rnnkern.RNN"))
        floor = ways["rnnkern.RNN"]["floor_us"]
        case = Case(*key)
        named = f"{case.kind}, {case.what}, {case.mode}, B {case.batch} H {case.hidden}"
        over = f"{ours / floor:8.1f}" if floor else " " * 8
        lines.append(f"{named:44} {stock:16.0f} {ours:12.0f} {stock / ours:7.2f} {over}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON Lines")
    parser.add_argument("--resume", action="store_true", help="go on with what is in --out")
    parser.add_argument("--budget", type=float, default=480, help="seconds; 480 by default")
    parser.add_argument("--backend", choices=BACKENDS, help="this one alone; both by default")
    parser.add_argument("--small", action="store_true", help="parity in tiny shapes alone")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, interpreted")
    args = parser.parse_args()
    if args.resume and not args.out:
        parser.error("--resume goes on with a file: --out FILE")
    bench = Bench(args)
    about = {"section": "environment"} | environment(bench, args)
    if not args.resume:
        bench.put(**about)
    elif bench.records[0] != about | {"date": bench.records[0]["date"]}:
        raise SystemExit(f"rnnkern: {args.out} is of another environment: {bench.records[0]}")
    run_parity(bench)
    if args.small:
        return
    cases = grid(bench.device)
    with_peers = [
        case
        for case in cases
        if (case.kind, case.what) == ("plain", "forward")
        and case.mode in ("bfloat16", "tf32")
        and (case.batch, case.hidden) in ((2, 16), (16, 64), (16, 256), (16, 768))
    ]
    skipped = 0
    for i, case in enumerate(cases):
        if bench.left() < args.budget / 4:  # which is the other peers' and regimes'
            skipped = len(cases) - i
            break
        with bench.said(section="layer", **case._asdict()):
            run_case(bench, case)
    for case in with_peers:
        if bench.left() > 0:
            with bench.said(section="layer", **case._asdict()):
                run_peers(bench, case)
    for case in cases:
        named = case.kind == "plain" and case.what == "forward"
        if named and "cuda" in backends(bench, case) and bench.left() > 0:
            with bench.said(section="regime", **case._asdict()):
                run_regimes(bench, case)
    bench.put(section="end", skipped=skipped, seconds_left=round(bench.left(), 1))
    print("\n".join(table(bench.records)))
    if any("error" in record and "way" not in record for record in bench.records):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
