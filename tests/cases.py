"""The table that the tests share: operations, layouts, shapes, dtypes, and a call made of them.

TOLERANCES and relative_error are those of `rnnkern check`. Letters: T steps, B batch, I input_size,
H hidden_size, G groups, N rows (the sum over t of the batch size at t).
"""

import math
import zlib
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from rnnkern import functional, library, reference
from rnnkern.parity import TOLERANCES, Layout, relative_error

__all__ = ["TOLERANCES", "relative_error"]

ACTIVATIONS = list(reference.ACTIVATIONS)
# Name -> the function and its nonlinearity.
OPS = {
    **{f"scan-{f}": ("rnn_scan", f) for f in ACTIVATIONS},
    **{f"layer-{f}": ("rnn_layer", f) for f in ACTIVATIONS},
    "linear": ("linear_scan", None),
}
DTYPES = list(TOLERANCES)

needs_library = pytest.mark.skipif(not library.loaded, reason=f"no compiled ops: {library.reason}")
BACKENDS = [pytest.param("cpu", marks=needs_library), "eager"]


class Shape(NamedTuple):
    T: int
    B: int
    H: int
    I: int  # noqa: E741

    def __str__(self) -> str:
        return f"T{self.T}B{self.B}H{self.H}I{self.I}"


# One of each; a column per row; a row per column; nothing even; the notebook's; more than one panel
# of columns and tile of rows for every instruction set.
SHAPES = [
    Shape(1, 1, 1, 1),
    Shape(7, 33, 1, 7),
    Shape(33, 1, 7, 1),
    Shape(7, 7, 33, 33),
    Shape(5, 16, 16, 1),
    Shape(3, 13, 130, 3),
]
SMALL = Shape(4, 3, 2, 2)
ONE_ROW = Shape(9, 1, 70, 3)  # through more than one panel of columns on every instruction set


LAYOUTS = {
    "plain": Layout(False, (False,)),
    "reversed": Layout(False, (True,)),
    "packed": Layout(True, (False,)),
    "packed-reversed": Layout(True, (True,)),
    "2groups": Layout(False, (False, True)),
    "packed-2groups": Layout(True, (False, True)),
    "packed-3groups": Layout(True, (True, False, True)),
}


def batch_sizes_of(steps: int, batch: int) -> Tensor:
    """Every row at the first step, fewer and fewer later; some steps lose none and some several."""
    return torch.tensor([max(1, batch - batch * t // steps) for t in range(steps)])


@dataclass(frozen=True)
class Call:
    """A call of an op of rnnkern.functional, and the gradients that come in for its outputs.

    tensors: the arguments that carry gradients, under their names; "weight_hh.1" is in a list.
    """

    op: str
    nonlinearity: str | None
    batch_sizes: Tensor | None
    reverse: list[bool]
    tensors: dict[str, Tensor]
    grads: tuple[Tensor, ...]

    def to(self, dtype: torch.dtype, device: str = "cpu") -> "Call":
        return replace(
            self,
            tensors={name: t.to(device, dtype) for name, t in self.tensors.items()},
            grads=tuple(g.to(device, dtype) for g in self.grads),
        )

    def without(self, *names: str) -> "Call":
        """The call with some optional arguments left out."""
        rest = {name: t for name, t in self.tensors.items() if name.split(".")[0] not in names}
        return replace(self, tensors=rest)

    def arguments(self, tensors: dict[str, Tensor] | None = None) -> dict:
        """The keyword arguments of rnnkern.functional's function, all but the backend."""
        lists = ("weight", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
        arguments = {"rnn_scan": ["weight_hh"], "linear_scan": ["weight"], "rnn_layer": lists[1:]}
        named: dict = {name: [] for name in arguments[self.op]}
        for name, tensor in (self.tensors if tensors is None else tensors).items():
            if "." in name:
                named[name.split(".")[0]].append(tensor)
            else:
                named[name] = tensor
        if self.nonlinearity is not None:
            named["nonlinearity"] = self.nonlinearity
        return named | {"batch_sizes": self.batch_sizes, "reverse": self.reverse}

    def run(self, backend: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The outputs; of `tensors`, if given, in the place of self.tensors."""
        named = dict(zip(self.tensors, tensors, strict=True)) if tensors else None
        out = getattr(functional, self.op)(**self.arguments(named), backend=backend)
        return out if isinstance(out, tuple) else (out,)

    def leaves(self) -> list[Tensor]:
        """Copies of the tensors that require gradients."""
        return [t.detach().clone().requires_grad_() for t in self.tensors.values()]

    def results(self, backend: str) -> dict[str, Tensor]:
        """The outputs and the gradient of every tensor, by name."""
        leaves = self.leaves()
        outputs = self.run(backend, *leaves)
        # Without steps the reference's h_n may depend on nothing.
        live = [(o, g) for o, g in zip(outputs, self.grads, strict=True) if o.requires_grad]
        grads = torch.autograd.grad(
            [o for o, _ in live], leaves, [g for _, g in live], materialize_grads=True
        )
        named = dict(zip(["out", "h_n"], outputs, strict=False))
        return named | {f"grad {n}": g for n, g in zip(self.tensors, grads, strict=True)}

    def torch_results(self) -> dict[str, Tensor]:
        """What torch's own operations make of the call, every intermediate in the call's dtype."""
        with mock.patch.object(reference, "compute_dtype", lambda dtype: dtype):
            return self.results("reference")


def make_inputs(
    op: str, layout: str | Layout, shape: Shape, dtype: torch.dtype = torch.float64
) -> Call:
    """A call of OPS[op] in a layout, or one of LAYOUTS.

    Its values every dtype holds exactly: one result is right for all.
    They are well conditioned, so that an error is the kernel's and not the case's. The weights are
    of torch.nn.RNN's initial size, so the recurrence does not expand; the rest is mostly positive,
    so a gradient that is one number is no sum that cancels. Under relu every pre-activation lies at
    least 0.5 from the kink, where rounding would flip f'.
    """
    function, nonlinearity = OPS[op]
    packed, reverse = LAYOUTS[layout] if isinstance(layout, str) else layout
    generator = torch.Generator().manual_seed(zlib.crc32(f"{op} {layout} {shape}".encode()))
    T, B, H, features = shape
    groups, relu = len(reverse), nonlinearity == "relu"

    def draw(*size: int, bound: float = 1.0, negative: float = 0.2) -> Tensor:
        # Multiples of 2^-7 below 1 fit bfloat16; times a power of two they still do.
        scale = 2.0 ** math.floor(math.log2(bound))
        sign = 1 - 2 * (torch.rand(size, generator=generator) < negative).double()
        return torch.randint(1, 128, size, generator=generator) * sign / 128 * scale

    def away_from_zero(t: Tensor) -> Tensor:
        return t + 2 * t.sign()

    sizes = batch_sizes_of(T, B) if packed else None
    lead = (int(sizes.sum()),) if packed else (T, B)
    rows, state = (*lead, groups * H), (groups, B, H)
    small = 1 / (2 * max(H, 1)) if relu else (H + 1) ** -0.5
    square = [draw(H, H, bound=small, negative=0.5) for _ in range(groups)]
    tensors: dict[str, Tensor]
    if function == "linear_scan":
        tensors = {"u": draw(*rows), "gain": draw(*rows)}
        tensors |= {"s0": draw(*state)}
        tensors |= {f"weight.{g}": w for g, w in enumerate(square)}
    else:
        if function == "rnn_scan":
            x_proj = draw(*rows)
            tensors = {"x_proj": away_from_zero(x_proj) if relu else x_proj}
            tensors |= {"h0": draw(*state)}
        else:
            tensors = {"x": draw(*lead, features), "h0": draw(*state)}
            width = max(features, 1)
            bound = 1 / (2 * width) if relu else width**-0.5
            tensors |= {f"weight_ih.{g}": draw(H, features, bound=bound) for g in range(groups)}
        tensors |= {f"weight_hh.{g}": w for g, w in enumerate(square)}
        if function == "rnn_layer":
            bias = [draw(H, bound=0.5) for _ in range(2 * groups)]
            if relu:
                bias[:groups] = [away_from_zero(b) for b in bias[:groups]]
            tensors |= {f"bias_ih.{g}": b for g, b in enumerate(bias[:groups])}
            tensors |= {f"bias_hh.{g}": b for g, b in enumerate(bias[groups:])}
    outputs = [rows] if function == "linear_scan" else [rows, state]
    grads = tuple(draw(*size) for size in outputs)
    return Call(function, nonlinearity, sizes, list(reverse), tensors, grads).to(dtype)


@cache
def right_results(
    op: str, layout: str, shape: Shape, without: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """The reference's results in float64."""
    return make_inputs(op, layout, shape).without(*without).results("reference")


def assert_results(got: dict[str, Tensor], right: dict[str, Tensor], call: Call) -> None:
    """Every result within the tolerance of the call's dtype: the rule of rnnkern/parity.py."""
    dtype = next(iter(call.tensors.values())).dtype
    tolerance = TOLERANCES[dtype]
    peer = call.torch_results() if tolerance.times_peer else {}
    wrong = []
    for name, expected in right.items():
        assert got[name].dtype == dtype, f"{name} is {got[name].dtype}"
        error = relative_error(got[name], expected)
        allowed = tolerance.allowed(relative_error(peer[name], expected) if peer else 0.0)
        if not error <= allowed:  # a NaN is wrong
            wrong.append(f"{name}: relative error {error:.2e}, allowed {allowed:.2e}")
    assert not wrong, "; ".join(wrong)


def assert_equal(got, right, tolerance: float = 1e-12) -> None:
    """Pairs of tensors agree by ||a - b|| / ||b||."""
    got, right = list(got), list(right)
    assert len(got) == len(right)
    for i, (a, b) in enumerate(zip(got, right, strict=True)):
        assert a.dtype == b.dtype, f"result {i}: {a.dtype} is not {b.dtype}"
        assert relative_error(a, b) <= tolerance, f"result {i} is off by {relative_error(a, b):.2e}"
