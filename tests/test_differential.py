"""RNN and RNNCell against torch.nn's in cases drawn at random: options, sizes, strides, gradients.

`RNNKERN_FUZZ=long pytest -s tests/test_differential.py` draws new cases in every run, 2,000 for
each backend, and prints how many of each kind it compared. A failure prints its Case, which is the
whole reproduction: `compare(Case(...), "cpu")`.
"""

import math
import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from cases import BACKENDS, TOLERANCES, relative_error
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnkern
from rnnkern import functional, modules

# The short profile draws the same cases every time, the long one others in every run. It draws more
# than it must compare: torch refuses a case without steps, and one drawn before does not count.
settings.register_profile("short", max_examples=150, derandomize=True)
settings.register_profile("long", max_examples=2200, derandomize=False)
PROFILE = os.environ.get("RNNKERN_FUZZ", "short")
LONG_COMPARES = 2000

STRIDES = ["contiguous", "transposed", "sliced", "offset", "expanded", "overlapping"]
CHOICES = {
    # "packed rows" is a PackedSequence made by hand, of rows in any strides.
    "form": ["batched", "unbatched", "packed sorted", "packed unsorted", "packed rows"]
    + ["cell", "unbatched cell"],
    "dtype": list(TOLERANCES),
    "nonlinearity": ["tanh", "relu"],
    "num_layers": [1, 2, 3],
    "bias": [True, False],
    "batch_first": [False, True],
    "bidirectional": [False, True],
    "dropout": [0.0, 0.25, 0.5, 1.0],
    "training": [True, False],
    # The strides of the input, of hx, of the parameters and of the incoming gradients.
    "x": STRIDES,
    "hx": [None, *STRIDES],
    "weights": STRIDES[:4],
    "grads": STRIDES,
    "loss": [("output", "h_n"), ("output",), ("h_n",)],
    "backward": ["grad", "backward"],  # the function of torch.autograd
}


@dataclass(frozen=True)
class Case:
    """A module, what it is called with and which gradients are wanted; the seed gives the numbers.

    Lengths are those of the rows, all the same unless packed: a batch of none has no lengths.
    """

    form: str
    dtype: torch.dtype
    nonlinearity: str
    num_layers: int
    bias: bool
    batch_first: bool
    bidirectional: bool
    dropout: float
    training: bool
    x: str
    hx: str | None
    weights: str
    grads: str
    loss: tuple[str, ...]
    backward: str
    input_size: int
    hidden_size: int
    steps: int
    lengths: tuple[int, ...]
    trained: tuple[str, ...]
    seed: int

    def module(self, library) -> nn.Module:
        """The module as torch.nn or rnnkern makes it."""
        sizes = (self.input_size, self.hidden_size)
        if "cell" in self.form:
            return library.RNNCell(*sizes, self.bias, self.nonlinearity)
        return library.RNN(
            *sizes,
            self.num_layers,
            self.nonlinearity,
            self.bias,
            self.batch_first,
            self.dropout,
            self.bidirectional,
        )

    @property
    def few(self) -> bool:
        """Whether a gradient may have few numbers; what cancels in one number leaves any error."""
        return min(self.hidden_size, math.prod(self.input_shapes()["x"])) < 8

    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of x and hx."""
        steps, batch = self.steps, len(self.lengths)
        states = self.num_layers * (2 if self.bidirectional else 1)
        x, hx = {
            "unbatched": ((steps,), (states,)),
            "packed rows": ((sum(self.lengths),), (states, batch)),
            "cell": ((batch,), (batch,)),
            "unbatched cell": ((), ()),
        }.get(self.form, ((batch, steps) if self.batch_first else (steps, batch), (states, batch)))
        return {"x": (*x, self.input_size), "hx": (*hx, self.hidden_size)}

    def pack(self, x: Tensor) -> Tensor | PackedSequence:
        """x as the module takes it."""
        if not self.form.startswith("packed"):
            return x
        if self.form == "packed rows":
            padded = torch.zeros(self.steps, len(self.lengths), 1)
            return PackedSequence(x, *pack_padded_sequence(padded, self.lengths, False, False)[1:])
        in_order = self.form == "packed sorted"
        return pack_padded_sequence(x, self.lengths, self.batch_first, in_order)


# What else there is to meet, beside every value of every choice.
MARKS = {
    "no rows": lambda c: not c.lengths,
    "no features": lambda c: c.input_size == 0,
    "no units": lambda c: c.hidden_size == 0,
    "1 unit": lambda c: c.hidden_size == 1,
    "an odd number of units": lambda c: c.hidden_size % 2 == 1,
    "more than 64 units": lambda c: c.hidden_size > 64,
    "1 step": lambda c: c.steps == 1,
    "lengths out of order": lambda c: list(c.lengths) != sorted(c.lengths, reverse=True),
    "dropout while training": lambda c: c.dropout > 0 and c.training,
    "nothing trained": lambda c: not c.trained,
    "x alone trained": lambda c: c.trained == ("x",),
    "hx alone trained": lambda c: c.trained == ("hx",),
    "a parameter alone trained": lambda c: len(c.trained) == 1 and "_" in c.trained[0],
    "x not trained": lambda c: c.trained and "x" not in c.trained,
    "hx not trained": lambda c: c.trained and c.hx and "hx" not in c.trained,
}
KINDS = ["compared", "refused by both"]
KINDS += [f"{name}={v}" for name, values in CHOICES.items() for v in values] + list(MARKS)


def kinds(case: Case) -> list[str]:
    """What a case counts as."""
    chosen = [f"{name}={getattr(case, name)}" for name in CHOICES]
    return ["compared", *chosen] + [mark for mark, holds in MARKS.items() if holds(case)]


@st.composite
def any_case(draw) -> Case:
    # No two lists to draw from are alike, and lengths and the like come of the seed: Hypothesis
    # copies draws that are made in the same way over one another, in five of six cases.
    def one_of(*values):
        return draw(st.sampled_from(values))

    chosen = {n: one_of(*[(n, value) for value in values])[1] for n, values in CHOICES.items()}
    chosen |= {"seed": draw(st.integers(0, 2**32 - 1))}
    chance = random.Random(chosen["seed"])
    cell, packed = "cell" in chosen["form"], chosen["form"].startswith("packed")
    if cell:
        chosen |= {"num_layers": 1, "batch_first": False, "bidirectional": False}
        chosen |= {"loss": ("output",)}
    if chosen["num_layers"] == 1:
        chosen |= {"dropout": 0.0}  # more is a warning
    # torch.nn.RNN refuses sizes of 0, pack_padded_sequence lengths of 0 and empty batches.
    chosen["input_size"] = one_of(1, 2, 3, 5, 7, 8, 16, 17, 33, 65, 100, *[0] * cell)
    chosen["hidden_size"] = one_of(1, 2, 3, 5, 7, 8, 16, 17, 33, 65, 100, 130, *[0] * cell)
    empty = [] if packed else [0]
    batch = 1 if "unbatched" in chosen["form"] else one_of(1, 2, 3, 5, 8, 17, 33, *empty)
    steps = 1 if cell else one_of(1, 2, 3, 4, 5, 7, 8, 12, 16, *empty)
    lengths = [steps] * batch
    if packed:
        lengths = chance.choices(range(1, steps + 1), k=batch)
        lengths = sorted(lengths, reverse=True) if chosen["form"] == "packed sorted" else lengths
        steps = max(lengths)
    chosen |= {"steps": steps, "lengths": tuple(lengths)}
    case = Case(**chosen, trained=())
    inputs = ["x", "hx"] if case.hx else ["x"]
    parameters = [name for name, _ in case.module(nn).named_parameters()]
    trained = {
        "all": inputs + parameters,
        "some": [name for name in inputs + parameters if chance.random() < 0.5],
        "one": [one_of(*inputs, one_of(*parameters))],
        "none": [],
    }[one_of("all", "some", "one", "none")]
    return replace(case, trained=tuple(trained))


# ---- numbers and strides ----


@dataclass(frozen=True)
class Array:
    """Numbers that every dtype holds exactly, and the strides and shape of the tensor of them."""

    numbers: Tensor  # float64
    strides: str
    shape: tuple[int, ...]

    def to(self, dtype: torch.dtype) -> Tensor:
        """The tensor. What lies around it in memory is NaN: who reads that shows it."""
        numbers, axes = self.numbers.to(dtype, copy=True), range(len(self.shape))
        if self.strides == "transposed":
            backwards = tuple(reversed(axes))
            return numbers.permute(backwards).contiguous().permute(backwards)
        if self.strides == "sliced":
            room = numbers.new_full([2 * n + 1 for n in self.shape], math.nan)
            return room[tuple(slice(1, None, 2) for _ in axes)].copy_(numbers)
        if self.strides == "offset":
            room = numbers.new_full((numbers.numel() + 6,), math.nan)
            return room[3:-3].view(self.shape).copy_(numbers)
        if self.strides == "expanded":
            return numbers.expand(self.shape)
        if self.strides == "overlapping":  # as the windows on a series are
            return numbers.as_strided(self.shape, [1] * len(self.shape))
        return numbers


class Numbers:
    """Draws Arrays. Most numbers, or all of them, are positive, so few sums of them cancel."""

    def __init__(self, seed: int, positive: bool) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.negative = 0.0 if positive else 0.2

    def signs(self, *shape: int, negative: float) -> Tensor:
        return 1.0 - 2.0 * (torch.rand(shape, generator=self.generator) < negative).double()

    def sizes(self, *shape: int, bound: float = 1.0, least: int = 0) -> Tensor:
        """Odd multiples of 1/128 below 1, times a power of two: seven bits."""
        sizes = 2 * torch.randint(least, 64, shape, generator=self.generator) + 1
        return sizes.double() / 128 * 2.0 ** math.floor(math.log2(bound))

    def array(
        self, strides: str, shape: tuple[int, ...], numbers: Callable[..., Tensor] | None = None
    ) -> Array:
        """numbers: of a shape; by default between -1 and 1."""
        stored = {
            "expanded": [n and 1 for n in shape],
            "overlapping": [sum(shape) - len(shape) + 1 if all(shape) else 0],
        }.get(strides, shape)
        if numbers is None:
            signs = self.signs(*stored, negative=self.negative)
            return Array(signs * self.sizes(*stored), strides, tuple(shape))
        return Array(numbers(*stored), strides, tuple(shape))


def arrays(case: Case) -> dict[str, Array]:
    """x, hx and the parameters, well conditioned: an error is the module's and not the case's.

    tanh: the weights are of torch.nn.RNN's initial size, so the recurrence does not expand. Where
    gradients have few numbers, all is positive, and too small to saturate.

    relu: no pre-activation comes near the kink, where rounding would flip f'. The parameters of a
    unit have one sign, and what enters a layer is not negative: nothing cancels, and a
    pre-activation has the sign of its unit or is an exact zero. Only a row of x may be negative, as
    a whole: in the lowest layer |x W_ih^T| is at least 0.25, and the biases and h W_hh^T together
    are at most 0.13, so units switch on and off there.
    """
    numbers, relu = Numbers(case.seed, case.few), case.nonlinearity == "relu"

    def rows_of_one_sign(*shape: int) -> Tensor:
        return numbers.signs(*shape[:-1], 1, negative=0.4) * numbers.sizes(*shape, least=32)

    shapes = case.input_shapes()
    made = {"x": numbers.array(case.x, shapes["x"], rows_of_one_sign if relu else None)}
    if case.hx:
        made["hx"] = numbers.array(case.hx, shapes["hx"], numbers.sizes if relu else None)
    units: dict[str, Tensor] = {}
    for name, parameter in case.module(nn).named_parameters():
        kind = "_".join(name.split("_")[:2])
        layer, shape = name.removeprefix(kind), tuple(parameter.shape)
        width = max(shape[-1], 1)
        if relu:
            if layer not in units:
                units[layer] = numbers.signs(case.hidden_size, negative=0.2)
                units[layer][:1] = 1.0  # a layer of which all is zero would tell nothing
            lowest = layer in ("", "_l0", "_l0_reverse")
            small = 1 / 32 if lowest else 1 / 2
            bound = {"weight_ih": 2 / width, "weight_hh": small / width}.get(kind, small)
            least, sign = 32, units[layer].view(-1, *[1] * (len(shape) - 1))
        else:
            bound, least = width**-0.5 if "weight" in kind else 0.5, 0
            if case.few:
                bound = {"weight_ih": 1 / width, "weight_hh": 1 / (2 * width)}.get(kind, 1 / 8)
            sign = numbers.signs(*shape, negative=2 * numbers.negative)
        sizes = numbers.sizes(*shape, bound=bound, least=least)
        made[name] = Array(sign * sizes, case.weights, shape)
    return made


# ---- one case ----


def results_of_one(module: nn.Module, case: Case, dtype: torch.dtype) -> dict:
    """The outputs, whether they require a gradient, and the gradients, which may be None."""
    made = arrays(case)
    leaves = {name: array.to(dtype) for name, array in made.items()}
    for name, leaf in leaves.items():
        if name in ("x", "hx"):
            leaf.requires_grad_(name in case.trained)
        else:
            leaves[name] = nn.Parameter(leaf, name in case.trained)
            setattr(module, name, leaves[name])
    torch.manual_seed(case.seed)
    returned = module.train(case.training)(case.pack(leaves["x"]), leaves.get("hx"))
    if "cell" in case.form:
        outputs, rest = {"output": returned}, {}
    else:
        output, h_n = returned
        rest = {"type of output": type(output)}
        if isinstance(output, PackedSequence):
            output, *lists = output
            rest |= {f"packed {i}": None if t is None else t.tolist() for i, t in enumerate(lists)}
        outputs = {"output": output, "h_n": h_n}
    rest |= {f"{name} requires grad": t.requires_grad for name, t in outputs.items()}

    numbers = Numbers(-1 - case.seed, case.few)
    grads = {n: numbers.array(case.grads, o.shape).to(dtype) for n, o in outputs.items()}
    loss = [name for name in case.loss if outputs[name].requires_grad]
    top, incoming = [outputs[name] for name in loss], [grads[name] for name in loss]
    if not loss or not case.trained:
        gradients = {}
    elif case.backward == "grad":
        wanted = [leaves[name] for name in case.trained]
        found = torch.autograd.grad(top, wanted, incoming, allow_unused=True)
        gradients = dict(zip(case.trained, found, strict=True))
    else:
        # Twice: what .grad holds is added to in place, so two that share memory would show.
        for _ in range(2):
            torch.autograd.backward(top, incoming, retain_graph=True)
        gradients = {
            n: leaf.grad if leaf.grad is None else leaf.grad / 2 for n, leaf in leaves.items()
        }
    for name, array in made.items():
        assert torch.equal(leaves[name], array.to(dtype)), f"{name} was changed"
    return outputs | rest | {f"grad {name}": grad for name, grad in gradients.items()}


def results(module: nn.Module, case: Case, dtype: torch.dtype) -> dict:
    """Where torch's own error counts, and is of few numbers, the tensors are those of eight seeds.

    In one number that error may happen to be none.
    """
    count = 8 if case.few and TOLERANCES[case.dtype].times_peer else 1
    seeds = range(case.seed, case.seed + count)
    found = [results_of_one(module, replace(case, seed=seed), dtype) for seed in seeds]
    return {
        name: torch.stack([f[name] for f in found]) if isinstance(value, Tensor) else value
        for name, value in found[0].items()
    }


def attempt(*args):
    """The results, or the exception that came instead."""
    try:
        return results(*args)
    except Exception as error:
        return error


def compare(case: Case, backend: str, library=rnnkern) -> bool:
    """Whether there are results to compare, by the rule of rnnkern/parity.py; else the exceptions.

    What is right is what torch.nn's module makes of the case in float64.
    """
    stock, module = case.module(nn), case.module(library)
    module.backend = backend
    peer = attempt(stock, case, case.dtype)
    if isinstance(peer, Exception):
        got = attempt(module, case, case.dtype)
        assert type(got) is type(peer), f"{got!r}\nis not torch's\n{peer!r}"
        assert case.steps == 0, f"torch refuses what it should not: {peer!r}"
        return False
    got, right = results(module, case, case.dtype), results(stock, case, torch.float64)
    wrong = []
    for name in peer | got:
        a, b = got.get(name), peer.get(name)
        if type(a) is not type(b) or (not isinstance(a, Tensor) and a != b):
            wrong.append(f"{name} is {a}, and torch's {b}")
        elif isinstance(a, Tensor) and (a.dtype, a.shape) != (b.dtype, b.shape):
            wrong.append(f"{name} is {a.dtype} {a.shape}, and torch's {b.dtype} {b.shape}")
        elif isinstance(a, Tensor):
            error = relative_error(a, right[name])
            allowed = TOLERANCES[case.dtype].allowed(relative_error(b, right[name]))
            # Below the smallest normal number no dtype has relative accuracy.
            least = torch.finfo(case.dtype).tiny * math.sqrt(max(a.numel(), 1))
            if not (error <= allowed or (a - right[name]).norm() <= least):  # a NaN is wrong
                wrong.append(f"{name}: relative error {error:.2e}, allowed {allowed:.2e}")
    assert not wrong, "; ".join(wrong)
    return True


def fuzz(backend: str, library=rnnkern, profile: str = PROFILE, **options) -> Counter:
    """Compare the cases of a profile; how many different ones of each kind had results."""
    counted: Counter = Counter()
    done = set()

    @settings(settings.get_profile(profile), deadline=None, print_blob=True, **options)
    @given(any_case())
    def every(case):
        if case in done:
            return
        counted.update(kinds(case) if compare(case, backend, library) else ["refused by both"])
        done.add(case)

    every()
    return counted


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_case(backend):
    counted = fuzz(backend)
    assert counted["compared"] >= 100
    print(f"\n{backend}: " + ", ".join(f"{n} {kind}" for kind, n in counted.most_common()))
    if PROFILE == "long":
        missing = [kind for kind in KINDS if not counted[kind]]
        assert not missing, f"never compared: {missing}"
        assert counted["compared"] >= LONG_COMPARES


# ---- wrong modules, which must be found ----


class DropsNothing(rnnkern.RNN):
    def train(self, mode=True):
        return super().train(False)


class DoublesGradientsOfBiases(rnnkern.RNN):
    def _weights(self):
        return [2 * w - w.detach() if w.dim() == 1 else w for w in super()._weights()]


class NeverReverses(rnnkern.RNN):
    def _layers(self, *args):
        def one_way(*args):
            return functional.rnn_layer(*args[:7], [False for _ in args[7]], *args[8:])

        with mock.patch.object(modules, "rnn_layer", one_way):
            return super()._layers(*args)


class TakesInputsForContiguous(rnnkern.RNN):
    def _layers(self, x, *args):
        room = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
        if room >= x.numel():
            x = x.as_strided(x.shape, torch.empty(x.shape).stride())
        return super()._layers(x, *args)


class KeepsHxInItsOrder(rnnkern.RNN):
    def permute_hidden(self, hx, permutation):
        return hx


class DetachesHx(rnnkern.RNN):
    def forward(self, input, hx=None):
        return super().forward(input, hx if hx is None else hx.detach())


class AlwaysRequiresGrad(rnnkern.RNN):
    def forward(self, input, hx=None):
        output, h_n = super().forward(input, hx)
        return output, h_n + h_n.new_zeros((), requires_grad=True)


class RoundsItsStates(rnnkern.RNN):
    def forward(self, input, hx=None):
        output, h_n = super().forward(input, hx)
        return output, h_n.bfloat16().to(h_n.dtype)


class RaisesAnotherError(rnnkern.RNN):
    def forward(self, input, hx=None):
        try:
            return super().forward(input, hx)
        except RuntimeError as error:
            raise IndexError from error


class CellForgetsHx(rnnkern.RNNCell):
    def forward(self, input, hx=None):
        return super().forward(input, hx if hx is None else 0 * hx)


WRONG = [DropsNothing, DoublesGradientsOfBiases, NeverReverses, TakesInputsForContiguous]
WRONG += [KeepsHxInItsOrder, DetachesHx, AlwaysRequiresGrad, RoundsItsStates, RaisesAnotherError]
WRONG += [CellForgetsHx]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda c: c.__name__)
def test_a_wrong_module_is_found(wrong):
    classes = {"RNN": rnnkern.RNN, "RNNCell": rnnkern.RNNCell, wrong.__base__.__name__: wrong}
    quick = {"max_examples": 2000, "phases": [Phase.generate], "report_multiple_bugs": False}
    with pytest.raises(AssertionError, match="relative error|torch's"):
        fuzz("auto", SimpleNamespace(**classes), "short", **quick)
