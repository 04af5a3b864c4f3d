"""Parity: what every backend computes on this machine against the definition in float64, values and
gradients.

`TOLERANCES` is the rule that the tests use too. Letters: T steps, B batch, H hidden_size, G groups.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch, functional, reference


class Tolerance(NamedTuple):
    """The relative error allowed: `floor + times_peer * (the error of torch's own arithmetic)`."""

    floor: float
    times_peer: float = 0.0

    def allowed(self, peer_error: float = 0.0) -> float:
        return self.floor + self.times_peer * peer_error


# A state is T dot products of length H deep, and the inputs keep the recurrence from expanding, so
# rounding errors add up to at most about T sqrt(H) u: at T = H = 33 that is 1.1e-5 in float32
# (u = 6e-8) and 2e-14 in float64. A wrong formula is off by 1e-2 and more.
# In the half types what is right is what torch does, so at most twice its error. The floor is two
# roundings (2 u = eps), the state's and the result's: they show even where torch happens to be
# lucky, as it can be with a gradient that is a single number.
TOLERANCES = {
    torch.float64: Tolerance(1e-12),
    torch.float32: Tolerance(1e-5),
    torch.bfloat16: Tolerance(torch.finfo(torch.bfloat16).eps, times_peer=2.0),
    torch.float16: Tolerance(torch.finfo(torch.float16).eps, times_peer=2.0),
}

SEED = 0
SHAPES = [(1, 1, 1), (7, 33, 1), (33, 1, 7), (33, 7, 33)]  # (T, B, H)
LINEAR = "linear_scan"
LAYER = "rnn_layer"  # of tanh


class Layout(NamedTuple):
    """How the rows lie and the groups run."""

    packed: bool
    reverse: tuple[bool, ...]


LAYOUTS = {
    "plain": Layout(False, (False,)),
    "reversed": Layout(False, (True,)),
    "packed": Layout(True, (False,)),
    "2 groups": Layout(False, (False, True)),
    "packed 2 groups": Layout(True, (False, True)),
}


class Case(NamedTuple):
    """One call: rnn_scan of an activation (or `LINEAR`, or `LAYER`), a layout and a shape."""

    op: str
    layout: str
    shape: tuple[int, int, int]

    @property
    def nonlinearity(self) -> str | None:
        return {LINEAR: None, LAYER: "tanh"}.get(self.op, self.op)

    def __str__(self) -> str:
        return f"{self.op}, {self.layout}, T B H = {self.shape}"


class Outcome(NamedTuple):
    """A backend's error in a case, or why it did not run it."""

    backend: str
    dtype: torch.dtype
    case: Case
    error: float = 0.0
    allowed: float = 0.0
    worst: str = ""
    refused: str = ""

    @property
    def failed(self) -> bool:
        return not self.refused and not self.error <= self.allowed  # so that a NaN fails


class Inputs(NamedTuple):
    """The tensors of a call, float64, and the gradients that come in from above."""

    rows: list[Tensor]  # x_proj, or u and gain: (T, B, G*H) or (N, G*H)
    initial: Tensor  # (G, B, H)
    weight: list[Tensor]  # G x (H, H)
    batch_sizes: Tensor | None  # (T,)
    grads: list[Tensor]  # of h and h_n, or of s

    def to(self, device: torch.device, dtype: torch.dtype) -> "Inputs":
        def leaf(x: Tensor) -> Tensor:
            return x.to(device, dtype).requires_grad_()

        return Inputs(
            [leaf(x) for x in self.rows],
            leaf(self.initial),
            [leaf(w) for w in self.weight],
            self.batch_sizes,
            [g.to(device, dtype) for g in self.grads],
        )


def relative_error(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b|| in float64; ||a|| where b is all zeros."""
    a, b = a.detach().to("cpu", torch.float64), b.detach().to("cpu", torch.float64)
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")
    norm = b.norm().item()
    return (a - b).norm().item() / (norm or 1.0)


def make_inputs(case: Case) -> Inputs:
    """Inputs that every dtype holds exactly: one float64 result is the yardstick for all.

    They are well conditioned, so that an error is the backend's and not the case's. The weights are
    of torch.nn.RNN's initial size, so the recurrence does not expand. The rest is mostly positive,
    so a gradient that is one number (H = 1) is no sum that cancels. relu's weights are smaller and
    its |x_proj| above 1, so no pre-activation comes near the kink, where rounding may flip f'.
    """
    (steps, batch, hidden), layout = case.shape, LAYOUTS[case.layout]
    groups, relu = len(layout.reverse), case.op == "relu"
    generator = torch.Generator().manual_seed(SEED)

    def draw(*shape: int, bound: float = 1.0, least: int = 0, negative: float = 0.25) -> Tensor:
        # Odd multiples of 1/128, scaled by a power of two: seven bits, exact in bfloat16 too.
        size = 2 * torch.randint(least, 64, shape, generator=generator) + 1
        sign = 1 - 2 * (torch.rand(shape, generator=generator) < negative).long()
        return size * sign / 128 * 2.0 ** math.floor(math.log2(bound))

    batch_sizes, lead = None, (steps, batch)
    if layout.packed:
        batch_sizes = torch.tensor([max(1, batch - batch * t // steps) for t in range(steps)])
        lead = (int(batch_sizes.sum()),)
    rows, initial = (*lead, groups * hidden), (groups, batch, hidden)
    x = draw(*rows, bound=2.0, least=32) if relu else draw(*rows)
    weight_bound = min(0.25, 0.5 / hidden) if relu else hidden**-0.5
    return Inputs(
        [x.double(), draw(*rows).double()] if case.op == LINEAR else [x.double()],
        draw(*initial).double(),
        [draw(hidden, hidden, bound=weight_bound, negative=0.5).double() for _ in range(groups)],
        batch_sizes,
        [draw(*rows).double()] + ([] if case.op == LINEAR else [draw(*initial).double()]),
    )


def results(inputs: Inputs, scan: Callable[[Inputs], tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """What a call returns and every gradient of it, by name."""
    outputs = scan(inputs)
    wanted = [*inputs.rows, inputs.initial, *inputs.weight]
    grads = torch.autograd.grad(outputs, wanted, inputs.grads)
    rows = ["u", "gain"] if len(inputs.rows) == 2 else ["x_proj"]
    names = [*rows, "the initial state", *(f"weight {g}" for g in range(len(inputs.weight)))]
    named = dict(zip(("the output", "h_n"), outputs, strict=False))
    return named | {
        f"the gradient of {name}": grad for name, grad in zip(names, grads, strict=True)
    }


def definition(case: Case) -> Callable[[Inputs], tuple[Tensor, ...]]:
    """The case as reference.py computes it."""
    reverse = list(LAYOUTS[case.layout].reverse)
    if case.op == LINEAR:
        return lambda i: (
            reference.linear_scan(*i.rows, i.initial, i.weight, i.batch_sizes, reverse),
        )
    return lambda i: reference.rnn_scan(
        *i.rows, i.initial, i.weight, i.batch_sizes, reverse, case.nonlinearity
    )


def call(case: Case, backend: str) -> Callable[[Inputs], tuple[Tensor, ...]]:
    """The case on a named backend."""
    options = {"reverse": list(LAYOUTS[case.layout].reverse), "backend": backend}
    if case.op == LINEAR:
        return lambda i: (
            functional.linear_scan(*i.rows, i.weight, i.initial, i.batch_sizes, **options),
        )
    if case.op == LAYER:

        def layer(i: Inputs) -> tuple[Tensor, ...]:
            # Each group's input weights pick its columns of x: then x is what it would project to.
            weight_ih = torch.eye(
                i.rows[0].size(-1), dtype=i.rows[0].dtype, device=i.rows[0].device
            )
            picked = list(weight_ih.chunk(len(i.weight)))
            return functional.rnn_layer(
                *i.rows, picked, i.weight, [], [], i.initial, i.batch_sizes, **options
            )

        return layer
    return lambda i: functional.rnn_scan(
        *i.rows, i.weight, i.initial, i.batch_sizes, nonlinearity=case.op, **options
    )


def torch_steps(case: Case) -> Callable[[Inputs], tuple[Tensor, ...]]:
    """The case in the steps that torch.nn.RNN takes, every intermediate rounded to the inputs'
    dtype.

    torch.nn.RNN itself has no gain, no softplus and no groups; where it can compute the case, this
    equals it.
    """
    layout = LAYOUTS[case.layout]

    def scan(i: Inputs) -> tuple[Tensor, ...]:
        sizes = reference.step_sizes(i.rows[0], i.batch_sizes)
        hidden = i.weight[0].size(0)
        parts = []
        for g, (weight, backwards) in enumerate(zip(i.weight, layout.reverse, strict=True)):
            rows = [x[..., g * hidden : (g + 1) * hidden].reshape(-1, hidden) for x in i.rows]

            def step(at: slice, product: Tensor, rows: list[Tensor] = rows) -> Tensor:
                if case.op == LINEAR:
                    return rows[0][at] + rows[1][at] * product
                return reference.ACTIVATIONS[case.nonlinearity].f(rows[0][at] + product)

            parts.append(reference._scan(rows[0], i.initial[g], weight, sizes, backwards, step))
        out = torch.cat([h for h, _ in parts], -1).view(i.rows[0].shape)
        return (out,) if case.op == LINEAR else (out, torch.stack([last for _, last in parts]))

    return scan


def errors(got: dict[str, Tensor], right: dict[str, Tensor]) -> dict[str, float]:
    """The relative error of each result."""
    return {name: relative_error(got[name], right[name]) for name in right}


def cases() -> list[Case]:
    """Every activation, the linear scan and a layer, in every layout and shape."""
    ops = [*reference.ACTIVATIONS, LINEAR, LAYER]
    return [Case(*key) for key in itertools.product(ops, LAYOUTS, SHAPES)]


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Run torch's CPU kernels on `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(
    device: torch.device,
    chosen: list[Case] | None = None,
    backends: tuple[str, ...] = dispatch.BACKENDS,
) -> list[Outcome]:
    """Check the backends in the chosen cases (None: all) and every dtype on `device`; the yardstick
    is the CPU's.

    On one thread: these sizes gain nothing from more, and where another program has the other cores
    they lose a factor of 25.
    """
    outcomes = []
    with threads(1):
        for case in cases() if chosen is None else chosen:
            inputs = make_inputs(case)
            right = results(inputs.to(torch.device("cpu"), torch.float64), definition(case))
            for dtype in TOLERANCES:
                outcomes += _outcomes(case, inputs.to(device, dtype), right, backends)
    return outcomes


def _outcomes(
    case: Case, inputs: Inputs, right: dict[str, Tensor], backends: tuple[str, ...]
) -> Iterator[Outcome]:
    """The backends' outcomes of a case, on the inputs' device and in their dtype."""
    x = inputs.rows[0]
    reasons = dispatch.explain(
        device=str(x.device),
        dtype=x.dtype,
        hidden_size=case.shape[2],
        groups=len(inputs.weight),
        nonlinearity=case.nonlinearity,
    )
    tolerance, peer = TOLERANCES[x.dtype], dict.fromkeys(right, 0.0)
    if tolerance.times_peer:
        peer = errors(results(inputs, torch_steps(case)), right)
    for backend in backends:
        outcome = Outcome(backend, x.dtype, case)
        if reasons[backend]:
            yield outcome._replace(refused="; ".join(reasons[backend]))
            continue
        try:
            found = errors(results(inputs, call(case, backend)), right)
        except Exception as error:  # to raise is as wrong as to miscompute
            message = str(error).splitlines()[0] if str(error) else type(error).__name__
            yield outcome._replace(error=math.nan, worst=f"it raised: {message}")
            continue
        allowed = {name: tolerance.allowed(peer[name]) for name in right}
        # What uses most of what it is allowed; a NaN is more than anything.
        share = {n: math.inf if math.isnan(e) else e / allowed[n] for n, e in found.items()}
        worst = max(share, key=share.__getitem__)
        yield outcome._replace(error=found[worst], allowed=allowed[worst], worst=worst)
