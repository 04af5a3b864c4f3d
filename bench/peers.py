"""The ways to run one RNN layer on the CPU that bench/cpu.py compares, each as a raw call.

A way is made for a `Case` and a number of threads, and has a call for the output alone and, if it
trains, one for the gradients of x, w_ih, w_hh and the bias. All have the same weights, tanh, one
layer, h_0 = 0, float32; a single bias (b_ih + b_hh) where they take one, and nothing to convert in
the call: their inputs are in their own arrays, oneDNN's and ONNX Runtime's weights in their own
layout. What is not installed, or does not fit a case, raises `LeftOut`.

How their threads are kept out of each other's way: torch, oneDNN and rnnkern share one OpenMP pool.
ONNX Runtime's threads spin while a call runs, which its speed needs, but not after it
(session.force_spinning_stop). JAX takes its number of threads from PJRT_NPROC when it is first
used, so there is one number for a process. Before each timing there is a rest (timing.REST).
"""

import functools
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import rnnkern
from rnnkern.parity import relative_error
from rnnkern.reference import BasicRNNCell

COMPILED_STEPS = 8  # torch.compile unrolls the loop: minutes for long ones


class LeftOut(Exception):
    """Why a way does not run here."""


class Shape(NamedTuple):
    """Batch, steps, input_size, hidden_size."""

    B: int
    T: int
    I: int  # noqa: E741
    H: int

    def __str__(self) -> str:
        return f"({self.B}, {self.T}, {self.I}, {self.H})"

    def product(self, columns: int) -> float:
        """Operations of a product of all rows (T B, H) with a matrix of so many columns."""
        return 2.0 * self.T * self.B * self.H * columns

    def forward_flops(self) -> float:
        """The input product and the recurrence; training is three times that."""
        return self.product(self.I) + self.product(self.H)


@dataclass
class Case:
    """One shape's input and weights.

    x: (T, B, I). weights: w_ih (H, I), w_hh (H, H), b_ih (H,), b_hh (H,). grad: (T, B, H), of
    out.sum(), ones.
    """

    shape: Shape
    x: Tensor = field(init=False)
    weights: list[Tensor] = field(init=False)
    grad: Tensor = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        batch, steps, inputs, hidden = self.shape
        parameters = torch.nn.RNN(inputs, hidden).parameters()
        self.weights = [p.detach().clone() for p in parameters]
        self.x = torch.randn(steps, batch, inputs)
        self.grad = torch.ones(steps, batch, hidden)

    @property
    def bias(self) -> Tensor:
        return self.weights[2] + self.weights[3]

    def leaves(self) -> list[Tensor]:
        """x and the weights, to differentiate by."""
        return [t.detach().clone().requires_grad_() for t in (self.x, *self.weights)]

    def module(self, kind: type[torch.nn.RNN]) -> torch.nn.RNN:
        """A module with these weights."""
        module = kind(self.shape.I, self.shape.H)
        names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        module.load_state_dict(dict(zip(names, self.weights, strict=True)))
        return module

    @functools.cached_property
    def right(self) -> tuple[Tensor, list[Tensor]]:
        """torch.nn.RNN's in float64: the output; the gradients of x, w_ih, w_hh and the bias."""
        module = self.module(torch.nn.RNN).double()
        x = self.x.double().requires_grad_()
        out = module(x)[0]
        return out.detach(), list(torch.autograd.grad(out.sum(), [x, *module.parameters()]))[:4]


class Way(NamedTuple):
    """forward: a call for the output (T, B, H); train: one for the four gradients, or None.

    forward is called with gradients disabled once around all calls, as a server does it.
    tolerance: of the relative errors of both against float64.
    """

    forward: Callable[[], Any]
    train: Callable[[], Any] | None = None
    tolerance: float = 1e-4

    def check(self, case: Case) -> None:
        """Both calls' results, twice, as a call may leave something for the next.

        Raises:
            AssertionError: one is wrong, so nothing is timed.
        """
        out, grads = case.right
        for _ in range(2):
            with torch.no_grad():
                pairs = [(self.forward(), out)]
            if self.train is not None:
                pairs += zip(self.train(), grads, strict=True)
            for got, right in pairs:
                error = relative_error(tensor(got).reshape(right.shape), right)
                if not error < self.tolerance:  # a NaN is wrong
                    raise AssertionError(f"{case.shape}: off by {error:.1e}: not timed")


def tensor(array) -> Tensor:
    """Any library's array as a tensor."""
    return array if isinstance(array, Tensor) else torch.from_numpy(np.array(array))


def of_module(module: torch.nn.RNN, case: Case) -> Way:
    """As a user calls it, who trains by backward()."""
    x = case.x.to(module.weight_ih_l0.dtype)
    leaf = x.clone().requires_grad_()
    inputs = [leaf, *module.parameters()]

    def forward():
        return module(x)[0]

    def train():
        for each in inputs:
            each.grad = None
        module(leaf)[0].sum().backward()
        return [each.grad for each in inputs[:4]]

    return Way(forward, train)


def of_loop(loop: Callable, case: Case) -> Way:
    """loop(x, w_ih, w_hh, b_ih, b_hh), differentiated by autograd."""
    leaves = case.leaves()

    def forward():
        return loop(case.x, *case.weights)

    def train():
        return torch.autograd.grad(loop(*leaves), leaves, case.grad)[:4]

    return Way(forward, train)


def torch_rnn(case: Case, threads: int) -> Way:
    return of_module(case.module(torch.nn.RNN), case)


def rnnkern_rnn(case: Case, threads: int) -> Way:
    return of_module(case.module(rnnkern.RNN), case)


def rnnkern_op(case: Case, threads: int) -> Way:
    """rnn_layer, and its backward op without autograd."""
    x, (w_ih, w_hh, b_ih, b_hh) = case.x, case.weights
    lists = [w_ih], [w_hh], [b_ih], [b_hh]
    ops = torch.ops.rnnkern
    op, backward = ops.rnn_layer.default, ops.rnn_layer_backward.default
    needs = [True] * 5

    def forward():
        return rnnkern.rnn_layer(x, *lists)[0]

    def train():
        # Not under no_grad, where weights that do not change are kept packed: in training they do.
        h, _ = op(x, None, *lists, None, [0], "tanh")
        grad_x, _, grad_w_ih, grad_w_hh, grad_bias = backward(
            case.grad, None, h, x, None, [w_ih], [w_hh], None, [0], "tanh", needs
        )
        return grad_x, grad_w_ih[0], grad_w_hh[0], grad_bias[0]

    return Way(forward, train)


def rnnkern_repacked(case: Case, threads: int) -> Way:
    """The module with weights that change between calls: it packs them in each."""
    module = case.module(rnnkern.RNN).requires_grad_(False)
    # Weights are kept packed only where gradients are disabled.
    return Way(torch.enable_grad()(lambda: module(case.x)[0]))


def rnnkern_bfloat16(case: Case, threads: int) -> Way:
    forward = of_module(case.module(rnnkern.RNN).bfloat16(), case).forward
    return Way(forward, tolerance=3e-2)


def notebook_loop(case: Case, threads: int) -> Way:
    """The notebook's cell, step by step."""
    cell = BasicRNNCell(case.shape.I, case.shape.H)
    names = ("W_ih", "W_hh", "b_ih", "b_hh")
    cell.load_state_dict(dict(zip(names, case.weights, strict=True)))
    leaf = case.x.clone().requires_grad_()
    leaves = [leaf, *(getattr(cell, name) for name in names)]

    def loop(x):
        h, out = x.new_zeros(case.shape.B, case.shape.H), []
        for x_t in x:
            h = cell(x_t, h)
            out.append(h)
        return torch.stack(out)

    def train():
        return torch.autograd.grad(loop(leaf), leaves, case.grad)[:4]

    return Way(lambda: loop(case.x), train)


def loop(x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Tensor:
    """The best loop of torch operations: one input product, then a step an addmm and a tanh."""
    x_proj = F.linear(x, w_ih, b_ih + b_hh)
    h = torch.zeros_like(x_proj[0])
    out = []
    for t in range(x.size(0)):
        h = torch.tanh(torch.addmm(x_proj[t], h, w_hh.t()))
        out.append(h)
    return torch.stack(out)


def torchscript_loop(case: Case, threads: int) -> Way:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        way = of_loop(torch.jit.script(loop), case)
    for _ in range(3):  # it optimises in its second call or later
        with torch.no_grad():
            way.forward()
        way.train()
    return way


def compiled_loop(case: Case, threads: int) -> Way:
    if case.shape.T > COMPILED_STEPS:
        raise LeftOut(f"more than {COMPILED_STEPS} steps, which it unrolls: minutes to compile")
    return of_loop(torch.compile(loop, dynamic=False), case)


def onednn(case: Case, threads: int) -> Way:
    layer = _onednn(case, case.x)
    return Way(layer.forward, layer.make_train(case.grad))


def onednn_one_thread(case: Case, threads: int) -> Way:
    """Where a step is short its threads cost it more than they bring."""
    if threads == 1:
        raise LeftOut("all have one thread")
    from onednn import on_one_thread

    # A primitive keeps the number of threads that it was made with; reorders ask for it anew.
    way = on_one_thread(lambda: onednn(case, 1), threads)()
    return Way(*(on_one_thread(call, threads) for call in (way.forward, way.train)))


def onednn_bfloat16(case: Case, threads: int) -> Way:
    return Way(_onednn(case, case.x.bfloat16()).forward, tolerance=3e-2)


def _onednn(case: Case, x: Tensor):
    import onednn as library

    try:
        return library.VanillaRNN(x, *case.weights[:2], case.bias)
    except ImportError as error:
        raise LeftOut(f"not installed: pip install {library.WHEEL}") from error
    except NotImplementedError as error:
        raise LeftOut(str(error)) from error


@functools.cache
def _jax(threads: int):
    """JAX, its forward and its gradients."""
    os.environ["PJRT_NPROC"] = str(threads)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if threads == 1:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false"
    try:
        import jax
    except ImportError as error:
        raise LeftOut("not installed: pip install jax") from error

    def forward(x, w_ih, w_hh, bias):
        def step(h, x_proj):
            h = jax.numpy.tanh(x_proj + h @ w_hh.T)
            return h, h

        x_proj = x @ w_ih.T + bias
        return jax.lax.scan(step, jax.numpy.zeros_like(x_proj[0]), x_proj)[1]

    def train(grad, *arguments):
        return jax.vjp(forward, *arguments)[1](grad)

    return jax, jax.jit(forward), jax.jit(train)


def jax_scan(case: Case, threads: int) -> Way:
    """lax.scan, compiled; all gradients by vjp."""
    jax, forward, train = _jax(threads)
    arrays = [
        jax.numpy.asarray(t.numpy()) for t in (case.grad, case.x, *case.weights[:2], case.bias)
    ]
    return Way(
        lambda: jax.block_until_ready(forward(*arrays[1:])),
        lambda: jax.block_until_ready(train(*arrays)),
    )


def onnx_runtime(case: Case, threads: int) -> Way:
    """ONNX's RNN; inference."""
    try:
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper
    except ImportError as error:
        raise LeftOut("not installed: pip install onnx onnxruntime") from error
    batch, steps, inputs, hidden = case.shape
    w_ih, w_hh, b_ih, b_hh = (w.numpy() for w in case.weights)
    constants = {"W": w_ih[None], "R": w_hh[None], "B": np.concatenate([b_ih, b_hh])[None]}
    graph = helper.make_graph(
        [helper.make_node("RNN", ["X", *constants], ["Y"], hidden_size=hidden)],
        "rnn",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, [steps, batch, inputs])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, [steps, 1, batch, hidden])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = {"X": case.x.numpy()}
    return Way(lambda: session.run(None, feed)[0])


TORCH, OURS, OP = "torch.nn.RNN", "rnnkern.RNN", "rnnkern op"
REPACKED, BFLOAT16, ONEDNN_BFLOAT16 = "rnnkern.RNN repacked", "rnnkern.RNN bf16", "oneDNN bf16"
OURSELVES = {
    TORCH: torch_rnn,
    OURS: rnnkern_rnn,
    OP: rnnkern_op,
    REPACKED: rnnkern_repacked,
    BFLOAT16: rnnkern_bfloat16,
}
PEERS = {
    "notebook loop": notebook_loop,
    "TorchScript loop": torchscript_loop,
    "torch.compile loop": compiled_loop,
    "oneDNN": onednn,
    "oneDNN 1 thread": onednn_one_thread,
    ONEDNN_BFLOAT16: onednn_bfloat16,
    "JAX scan": jax_scan,
    "ONNX Runtime": onnx_runtime,
}
PACKAGES = ("onednn-cpu-gomp", "jax", "jaxlib", "onnxruntime")  # whose versions matter


def make(case: Case, threads: int, names: list[str]) -> tuple[dict[str, Way], dict[str, str]]:
    """The ways with these names, their results checked; and those left out, with the reason."""
    ways, left_out = {}, {}
    for name in names:
        try:
            way = (OURSELVES | PEERS)[name](case, threads)
        except LeftOut as reason:
            left_out[name] = str(reason)
            continue
        try:
            way.check(case)
        except AssertionError as error:
            raise AssertionError(f"{name}, {error}") from error
        ways[name] = way
    return ways, left_out
