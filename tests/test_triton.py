"""The Triton backend: on a GPU where there is one; else interpreted, and compiled for GPUs.

The interpreter must be chosen before Triton is imported, so test_interpreted runs this file again
in a process of its own, where the tests that here are for "cuda" are for the interpreter's "cpu".
The compiler needs no GPU: its results are examined as far as its assembler can tell.
"""

import contextlib
import functools
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from importlib import metadata
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from cases import (
    ACTIVATIONS,
    DTYPES,
    LAYOUTS,
    OPS,
    SHAPES,
    SMALL,
    Shape,
    assert_equal,
    assert_results,
    make_inputs,
    needs_library,
    relative_error,
    right_results,
)
from gpu_cases import (
    assert_any_strides,
    assert_captured,
    assert_every_order,
    assert_streams,
    assert_vmap,
    expanded,
    negated_lazily,
    sliced,
    transposed,
)

import rnnkern
from rnnkern import dispatch, functional, library, reference
from rnnkern.backends import cuda
from rnnkern.backends import triton as backend

NAN, INF = float("nan"), float("inf")
INTERPRETED = backend.INTERPRETED
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)
pytestmark = needs_triton
DEVICE = "cpu" if INTERPRETED else "cuda"


def version(package):
    """(major, minor) of what is installed; of nothing, (0, 0)."""
    try:
        return tuple(map(int, metadata.version(package).split(".")[:2]))
    except metadata.PackageNotFoundError:
        return (0, 0)


needs_interpreter = pytest.mark.skipif(
    version("triton") < (3, 7) and version("numpy") >= (2, 4),
    reason="the interpreter of Triton before 3.7 cannot loop with numpy 2.4",
)
on_the_device = (lambda test: test) if INTERPRETED else pytest.mark.gpu
in_every_layout = pytest.mark.parametrize("layout", LAYOUTS)
of_every_kind = pytest.mark.parametrize("op", ["scan-tanh", "layer-tanh", "linear"])
# How a call comes to the kernels: through autograd.py, and, where there is a library, its ops.
WAYS = ["functions", pytest.param("ops", marks=needs_library)]
in_every_way = pytest.mark.parametrize("way", WAYS)


@pytest.fixture(autouse=True)
def ieee():
    """float32 is IEEE's, unless a test asks for TF32."""
    before = torch.backends.cudnn.rnn.fp32_precision
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.rnn.fp32_precision = before


@pytest.fixture(scope="module")
def ops_are_ours():
    """The ops' kernels are the launches below where they would be others: in the interpreter's
    process the CPU's, so that their C++ autograd, vmap and autocast drive Triton's kernels as they
    do a GPU's; on a GPU those of a library with CUDA kernels."""
    if not library.loaded or not (INTERPRETED or cuda.COMPILED):
        yield
        return
    registered = backend.register("CPU" if INTERPRETED else "CUDA")
    yield
    registered._destroy()


@pytest.fixture
def run_by(way, ops_are_ours, monkeypatch):
    """The backend to name for a way."""
    if way == "ops" and INTERPRETED:
        return "cpu"
    names = ("rnn_scan", "rnn_layer", "linear_scan")
    functions = backend.eager.functions(backend._Kernels)
    if way == "ops":
        functions = [getattr(torch.ops.rnnkern, name).default for name in names]
    for name, function in zip(names, functions, strict=True):
        monkeypatch.setattr(backend, name, function)
    return "triton"


@pytest.fixture
def one_step_at_a_time(monkeypatch):
    """No weight fits a program."""
    monkeypatch.setattr(backend, "FUSED", {kind: {} for kind in backend.FUSED})


# ---- values and gradients ----

# Every op in every layout, in shapes and dtypes that take turns: by the interpreter, one each.
TURNS = range(1 if INTERPRETED else len(SHAPES))
TABLE = [
    (op, layout, SHAPES[i % len(SHAPES)], DTYPES[(i // len(SHAPES) + i) % len(DTYPES)])
    for i, (op, layout, _) in enumerate(itertools.product(OPS, LAYOUTS, TURNS))
]
TABLE = [pytest.param("ops", *row, marks=needs_library) for row in TABLE] + [
    ("functions", *row) for row in TABLE[::3]
]


def check(run_by, op, layout, shape, dtype, without=(), poisoned=None):
    call = make_inputs(op, layout, shape).without(*without).to(dtype, DEVICE)
    if poisoned and DEVICE == "cpu":
        poisoned(*(t.nbytes for t in (*call.tensors.values(), *call.grads)))
    assert_results(call.results(run_by), right_results(op, layout, shape, without), call)


def name(value):
    return str(value).removeprefix("torch.")


@on_the_device
@pytest.mark.parametrize("way, op, layout, shape, dtype", TABLE, ids=name)
def test_table(run_by, op, layout, shape, dtype, poisoned):
    check(run_by, op, layout, shape, dtype, poisoned=poisoned)


@on_the_device
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=name)
@in_every_layout
@of_every_kind
@pytest.mark.parametrize("way", WAYS[1:])
def test_one_step_at_a_time(run_by, op, layout, dtype, one_step_at_a_time):
    check(run_by, op, layout, Shape(3, 5, 9, 2), dtype)


@on_the_device
@pytest.mark.parametrize("matmul", ["ieee", "tf32"])
@pytest.mark.parametrize("rnn", ["ieee", "tf32"])
@of_every_kind
@pytest.mark.parametrize("way", WAYS[1:])
def test_steps_by_both_switches(run_by, op, rnn, matmul, one_step_at_a_time, monkeypatch):
    """float32's product of a step is as the switch for RNNs has it, whatever that for other
    products says, by which cuBLAS may make it."""
    monkeypatch.setattr(backend, "TORCH_HIDDEN", 0)
    torch.backends.cudnn.rnn.fp32_precision = rnn
    shape = Shape(3, 5, 40, 2)
    call = make_inputs(op, "packed-2groups", shape).to(torch.float32, DEVICE)
    torch.backends.cuda.matmul.fp32_precision = matmul
    try:
        got = call.results(run_by)
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    right = right_results(op, "packed-2groups", shape)
    errors = {name: relative_error(got[name], right[name]) for name in right}
    assert max(errors.values()) < (1e-5 if rnn == matmul == "ieee" else 5e-3), errors
    if rnn == "ieee" and not op.startswith("layer"):  # whose x_proj is another product
        assert errors[next(iter(right))] < 1e-5, errors


@on_the_device
@pytest.mark.parametrize("steps", [0, 1, 2, 5, 9])
@of_every_kind
@pytest.mark.parametrize("way", WAYS[:1])
def test_numbers_of_steps(run_by, op, steps, monkeypatch):
    """Fewer than one round of the unrolled loop, and some left over; both kernels."""
    shape = Shape(steps, 2, 3, 2)
    layouts = ["2groups"] + ["packed-2groups"] * (steps > 0)
    for layout in layouts:
        check(run_by, op, layout, shape, torch.float32)
    check(run_by, op, "2groups", shape, torch.float64, ("h0", "s0", "bias_ih", "bias_hh"))
    monkeypatch.setattr(backend, "FUSED", {kind: {} for kind in backend.FUSED})
    for layout in layouts:
        check(run_by, op, layout, shape, torch.float64)
    check(run_by, op, "2groups", shape, torch.float64, ("h0", "s0", "bias_ih", "bias_hh"))


@on_the_device
@of_every_kind
@in_every_way
def test_no_packed_rows(run_by, op):
    """No steps: the states pass through, and so do their gradients."""
    h0 = torch.randn(1, 3, 5, dtype=torch.float64, device=DEVICE).requires_grad_()
    sizes = torch.empty(0, dtype=torch.int64)
    x = torch.empty(0, 5, dtype=torch.float64, device=DEVICE)
    w = [torch.eye(5, dtype=torch.float64, device=DEVICE)]
    if op == "linear":
        assert functional.linear_scan(x, x, w, h0, sizes, backend=run_by).shape == (0, 5)
        return
    if op == "scan-tanh":
        h, h_n = functional.rnn_scan(x, w, h0, sizes, backend=run_by)
    else:
        h, h_n = functional.rnn_layer(x, w, w, [], [], h0, sizes, backend=run_by)
    assert h.shape == (0, 5) and torch.equal(h_n, h0)
    assert torch.equal(torch.autograd.grad(h_n.sum(), h0)[0], torch.ones_like(h0))


@on_the_device
@pytest.mark.parametrize("shape", [(0, 3, 5), (4, 0, 5), (4, 3, 0)], ids=str)
@in_every_way
def test_nothing_to_compute(run_by, shape):
    T, B, H = shape
    w = [torch.randn(H, H, device=DEVICE) for _ in range(2)]
    x = torch.randn(T, B, 2 * H, device=DEVICE).requires_grad_()
    h, h_n = functional.rnn_scan(x, w, reverse=[False, True], backend=run_by)
    assert h.shape == x.shape and h_n.shape == (2, B, H) and not h_n.any()
    assert torch.autograd.grad(h.sum() + h_n.sum(), x)[0].shape == x.shape


@on_the_device
@pytest.mark.parametrize("hidden", [15, 16, 17, 65])
@pytest.mark.parametrize("way", WAYS[1:])
def test_block_edges(run_by, hidden):
    """As many units and rows as fill the tiles, one fewer and one more; I around FUSED_FEATURES."""
    for batch, features in ((15, 8), (17, 9)):
        for layout in ("plain", "packed-2groups"):
            shape = Shape(3, batch, hidden, features)
            check(run_by, "layer-softplus", layout, shape, torch.float64)


@on_the_device
@pytest.mark.parametrize("kind", ["mixed", "alike", "spread"])
@pytest.mark.parametrize("way", WAYS[1:])
def test_many_groups(run_by, kind):
    """More than a launch has bits for; weights of one stack, or wherever they are."""
    groups, H = backend.MIXED_GROUPS + 2, 3
    reverse = [kind != "alike" and g % 3 == 0 for g in range(groups)]
    options = {"dtype": torch.float64, "device": DEVICE}
    stack = torch.randn(groups, H, H, **options)
    weight = list(stack.unbind())
    if kind == "spread":
        weight = [w.clone() if g % 2 else w for g, w in enumerate(weight)]
    x = torch.randn(3, 2, groups * H, **options).requires_grad_()
    results = []
    for by in (run_by, "reference"):
        h, h_n = functional.rnn_scan(x, weight, reverse=reverse, backend=by)
        results.append([h, h_n, *torch.autograd.grad(h.sum() + h_n.square().sum(), x)])
    assert_equal(*results)


@on_the_device
@pytest.mark.parametrize("lay", [sliced, transposed, negated_lazily, expanded])
@of_every_kind
@in_every_way
def test_any_strides(run_by, op, lay):
    for layout in ("2groups", "packed-2groups"):
        call = make_inputs(op, layout, Shape(3, 2, 5, 3)).to(torch.float64, DEVICE)
        assert_any_strides(call, run_by, lay)


@on_the_device
@pytest.mark.parametrize("nonlinearity", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=name)
@pytest.mark.parametrize("way", WAYS[:1])
def test_special_values(run_by, nonlinearity, dtype):
    """NaN, infinity, and values where f must not lose its digits, as in the reference; H = 5 has
    units in its tile that are none, which must not be heard."""
    x = torch.zeros(3, 9, 2 * 5, dtype=dtype, device=DEVICE)
    special = [NAN, INF, -INF, 300.0, -300.0, 1e-3, -1e-3, 0.25, 0.45]
    x[1, :, 2] = torch.tensor(special)
    weight = [torch.eye(5, dtype=dtype) / 2 + 0.125, torch.eye(5, dtype=dtype) / 4]
    weight = [w.to(DEVICE) for w in weight]
    results = []
    for by in (run_by, "reference"):
        leaf = x.clone().requires_grad_()
        h, h_n = functional.rnn_scan(
            leaf, weight, reverse=[False, True], nonlinearity=nonlinearity, backend=by
        )
        results.append([h, h_n, *torch.autograd.grad(h.sum(), leaf)])
    for got, right in zip(*results, strict=True):
        assert torch.equal(got.isnan(), right.isnan()) and torch.equal(got.isinf(), right.isinf())
        torch.testing.assert_close(got, right, equal_nan=True)


@on_the_device
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=name)
@pytest.mark.parametrize("nonlinearity", ["tanh", "sigmoid", "softplus"])
@pytest.mark.parametrize("way", WAYS[:1])
def test_activations_element_by_element(run_by, nonlinearity, dtype):
    """To a few roundings wherever they are, not only where they are large."""
    a = torch.cat([10.0 ** torch.linspace(-30, 1.4, 97), torch.linspace(0.3, 0.4, 32)]).double()
    a = torch.cat([a, -a]).to(dtype)
    x = a.view(1, -1, 1).to(DEVICE).requires_grad_()
    w = [torch.zeros(1, 1, dtype=dtype, device=DEVICE)]
    h, _ = functional.rnn_scan(x, w, nonlinearity=nonlinearity, backend=run_by)
    (grad,) = torch.autograd.grad(h, x, torch.ones_like(h))
    f = reference.ACTIVATIONS[nonlinearity]
    right = f.f(a.double())
    few = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(h.flatten().cpu().double(), right, rtol=few, atol=0)
    df = f.df(h.detach().flatten().cpu().double())
    torch.testing.assert_close(grad.flatten().cpu().double(), df, rtol=few, atol=few)


@on_the_device
@in_every_way
def test_inputs_are_not_modified(run_by):
    call = make_inputs("layer-tanh", "packed-2groups", SMALL).to(torch.float32, DEVICE)
    kept = {n: t.clone() for n, t in call.tensors.items()}
    call.results(run_by)
    assert all(torch.equal(t, kept[n]) for n, t in call.tensors.items())


@on_the_device
@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETED else DTYPES, ids=name)
@pytest.mark.parametrize("layout", ["2groups", "packed-2groups"])
@pytest.mark.parametrize("way", WAYS[1:])
def test_the_same_bits(run_by, layout, dtype):
    shape = Shape(9, 37, 70, 5) if DEVICE == "cuda" else SMALL
    call = make_inputs("layer-tanh", layout, shape).to(dtype, DEVICE)
    first = call.results(run_by)
    for _ in range(3 if DEVICE == "cuda" else 1):
        again = call.results(run_by)
        assert all(torch.equal(first[n], again[n]) for n in first)


# ---- derivatives and transformations ----


@on_the_device
@of_every_kind
@pytest.mark.parametrize("layout", ["plain", "packed-2groups"])
@in_every_way
def test_every_order(run_by, op, layout):
    """Second order by value; forward mode; forward over reverse."""
    call = make_inputs(op, layout, Shape(3, 2, 3, 2)).to(torch.float64, DEVICE)
    assert_every_order(call, run_by)


@on_the_device
@of_every_kind
@in_every_way
def test_vmap(run_by, op):
    """Over data and over weights, values and per-sample gradients."""
    call = make_inputs(op, "2groups", Shape(3, 2, 3, 2)).to(torch.float64, DEVICE)
    assert_vmap(call, run_by)


@on_the_device
@of_every_kind
@pytest.mark.parametrize("way", WAYS[1:])
def test_batched_gradients(run_by, op):
    """is_grads_batched: torch.autograd's own vmap, which autograd.py has not."""
    call = make_inputs(op, "packed-2groups", Shape(3, 2, 3, 2)).to(torch.float64, DEVICE)
    results = []
    for by in (run_by, "reference"):
        leaves = call.leaves()
        outputs = call.run(by, *leaves)
        grads = [torch.stack([g, 2 * g]) for g in call.grads]
        results.append(torch.autograd.grad(outputs, leaves, grads, is_grads_batched=True))
    assert_equal(*results)


@on_the_device
@in_every_way
def test_autocast(run_by):
    """In the lower precision, and gradients in that of the leaves."""
    call = make_inputs("layer-tanh", "2groups", SMALL).to(torch.float32, DEVICE)
    leaves = call.leaves()
    with torch.autocast(DEVICE, torch.bfloat16):
        out, h_n = call.run(run_by, *leaves)
    assert out.dtype == h_n.dtype == torch.bfloat16
    grads = torch.autograd.grad(out.sum(), leaves)
    assert {g.dtype for g in grads} == {torch.float32}
    right = right_results("layer-tanh", "2groups", SMALL)["out"]
    assert (out.cpu().double() - right).abs().max() < 0.02


@on_the_device
@pytest.mark.compiles
@of_every_kind
@in_every_way
def test_compile(run_by, op):
    call = make_inputs(op, "2groups", SMALL).to(torch.float32, DEVICE)
    leaves = call.leaves()
    compiled = torch.compile(lambda *t: call.run(run_by, *t), fullgraph=True, backend="aot_eager")
    right = call.results("reference")
    outputs = compiled(*leaves)
    grads = torch.autograd.grad(outputs, leaves, call.grads)
    assert_equal([*outputs, *grads], list(right.values()), tolerance=1e-5)


@on_the_device
def test_warmup(monkeypatch):
    """It launches what training launches: afterwards nothing is new but sizes."""
    torch.backends.cudnn.rnn.fp32_precision = "tf32"
    seen = []
    original = backend._launch
    monkeypatch.setattr(
        backend, "_launch", lambda scan, *rest: (seen.append(scan), original(scan, *rest))
    )
    backend.warmup(3, torch.float32, input_size=2, groups=2, device=DEVICE)
    kinds = {(s.mode, s.initial is None, s.entry is None, s.input is None) for s in seen}
    assert kinds == {
        ("LAYER", True, True, False),
        ("LAYER", False, True, False),
        ("BACKWARD", True, True, False),
        ("BACKWARD", True, False, True),
        ("BACKWARD", True, False, False),
    }


@on_the_device
def test_infinite_weights_meet_zeros(one_step_at_a_time):
    """Where there is no initial state: inf times 0 is NaN, as in torch.nn.RNN."""
    x_proj, weight = torch.zeros(2, 3, 20, device=DEVICE), torch.eye(20, device=DEVICE)
    weight[3, 5] = INF
    h, _ = functional.rnn_scan(x_proj, [weight], backend="triton")
    right, _ = functional.rnn_scan(x_proj, [weight], backend="reference")
    assert torch.equal(h.isnan(), right.isnan()) and h[0, 0, 3].isnan()


# ---- what only a GPU has ----


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [64, 300])
@pytest.mark.parametrize("layout", ["2groups", "packed-2groups"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_cuda_graphs(dtype, layout, hidden):
    """Forward and backward captured once, replayed on other values."""
    call = make_inputs("layer-tanh", layout, Shape(9, 20, hidden, 5)).to(dtype, "cuda")
    assert_captured(call, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["2groups", "packed-2groups"])
def test_nobody_waits(layout):
    """No call synchronises the host with the GPU, forward or backward."""
    call = make_inputs("layer-tanh", layout, Shape(9, 20, 64, 5)).to(torch.float32, "cuda")
    call.results("triton")  # compiles
    leaves = call.leaves()
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs = call.run("triton", *leaves)
        torch.autograd.grad(outputs, leaves, call.grads)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_several_streams():
    calls = [
        make_inputs("layer-tanh", layout, Shape(33, 40, hidden, 3)).to(torch.float32, "cuda")
        for layout in ("2groups", "packed-2groups")
        for hidden in (32, 200)
    ]
    assert_streams(calls, "triton")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="GPU: there is no second one")
def test_another_device_than_the_current():
    call = make_inputs("layer-tanh", "packed-2groups", Shape(9, 20, 64, 5))
    results = call.to(torch.float64, "cuda:1").results("triton")
    assert all(t.device.index == 1 for t in results.values())
    assert_results(
        results, right_results("layer-tanh", "packed-2groups", Shape(9, 20, 64, 5)), call
    )


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [33, 64, 130, 512])
def test_tf32_is_torchs(hidden):
    """By torch's switch for RNNs: at most twice the error of cuDNN's, and more than IEEE's."""
    x = torch.randn(20, 16, 64, device="cuda")
    stock, exact = (torch.nn.RNN(64, hidden, device="cuda") for _ in range(2))
    ours = rnnkern.RNN(64, hidden, device="cuda", backend="triton")
    for module in (ours, exact):
        module.load_state_dict(stock.state_dict())
    right = exact.double()(x.double())[0]
    errors = {}
    for precision in ("ieee", "tf32"):
        torch.backends.cudnn.rnn.fp32_precision = precision
        errors[precision] = [relative_error(m(x)[0], right) for m in (ours, stock)]
    assert errors["ieee"][0] < 1e-5 < errors["tf32"][0]
    assert errors["tf32"][0] <= 2 * errors["tf32"][1] + 1e-3


@pytest.mark.gpu
@pytest.mark.compiles
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@needs_library
def test_compiled_training(mode):
    """torch.compile's own kernels and CUDA graphs around ours: the same losses."""
    losses = []
    for compile_it in (False, True):
        torch.manual_seed(0)
        rnn = rnnkern.RNN(5, 40, 2, bidirectional=True, device="cuda")
        head = torch.nn.Linear(80, 1, device="cuda")
        optimizer = torch.optim.Adam([*rnn.parameters(), *head.parameters()])
        x = torch.randn(11, 8, 5, device="cuda")

        def loss_of(x, rnn=rnn, head=head):
            return head(rnn(x)[0]).square().mean()

        run = torch.compile(loss_of, mode=mode, fullgraph=True) if compile_it else loss_of
        losses.append([])
        for _ in range(5):
            optimizer.zero_grad()
            loss = run(x)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.gpu
def test_auto_chooses_it():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        options = {"device": "cuda", "dtype": torch.float64}
        out, _ = rnnkern.RNN(3, 5, **options)(torch.randn(4, 2, 3, **options))
    assert out.is_cuda and dispatch.select("auto", "cuda", out.dtype, 5, 1, "tanh") is backend


# ---- arguments ----


@on_the_device
@needs_library
def test_the_ops_check_their_arguments(ops_are_ours):
    ops = torch.ops.rnnkern
    h, w = torch.randn(3, 2, 4, device=DEVICE), torch.randn(4, 4, device=DEVICE)
    wide = torch.randn(3, 2, 5, device=DEVICE)
    state = torch.randn(1, 3, 4, device=DEVICE)
    none = [False] * 5
    for call, words in [
        (lambda: ops.rnn_scan(wide, None, [w], None, [0], "tanh"), "G\\*H"),
        (lambda: ops.rnn_scan(h, state, [w], None, [0], "tanh"), "h0"),
        (lambda: ops.rnn_scan(h, None, [w], None, [0], "gelu"), "nonlinearity must be one of"),
        (lambda: ops.linear_scan(h, wide, None, [w], None, [0]), "gain"),
        (lambda: ops.rnn_layer(wide, None, [w], [w], [], [], None, [0], "tanh"), "I = 4"),
        (
            lambda: ops.rnn_scan_backward(wide, None, h, None, [w], None, [0], "tanh", [True] * 2),
            "expected grad_h",
        ),
        (
            lambda: ops.rnn_scan_backward(None, state, h, None, [w], None, [0], "tanh", [True] * 2),
            "expected grad_h_n",
        ),
        (
            lambda: ops.rnn_layer_backward(
                None, None, h, wide, None, [w], [w], None, [0], "tanh", none
            ),
            "I = 4",
        ),
        (
            lambda: ops.rnn_layer_backward(
                None, None, h, h[:2], None, [w], [w], None, [0], "tanh", none
            ),
            "expected x with the rows of h",
        ),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="expected grad_h"):
        ops.rnn_scan_backward(h.double(), None, h, None, [w], None, [0], "tanh", [True] * 2)
    v, grad_h0, grads = ops.rnn_scan_backward(
        None, None, h, None, [w], None, [0], "tanh", [True] * 2
    )
    assert not v.any() and grad_h0.numel() == 0 and not grads[0].any()


def test_who_may_run():
    reasons = rnnkern.explain("cuda")["triton"]
    if INTERPRETED:
        assert reasons == ["under TRITON_INTERPRET=1 it runs on the CPU, not on cuda"]
        assert rnnkern.explain("cpu")["triton"] == []
        assert "triton" not in dispatch.AUTO
        return
    if not torch.cuda.is_available():
        assert reasons == ["torch sees no CUDA GPU"]
    assert rnnkern.explain("cpu")["triton"] == ["it runs on CUDA GPUs, the tensors are on cpu"]
    assert dispatch.AUTO == ("cpu", "cuda", "triton", "eager")
    strange = rnnkern.explain("cuda", torch.complex64, nonlinearity="gelu")["triton"]
    assert strange[-2:] == [
        "it has no kernel for torch.complex64",
        "it has no kernel for the nonlinearity 'gelu'",
    ]


@pytest.mark.skipif(INTERPRETED, reason="pretends there is a GPU")
def test_old_gpus_and_no_triton(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backend, "_capability", lambda: (7, 5))
    assert rnnkern.explain("cuda")["triton"] == [
        "it needs GPUs of compute capability 8.0, there is one of 7.5"
    ]
    monkeypatch.setattr(backend, "_capability", lambda: (9, 0))
    assert rnnkern.explain("cuda")["triton"] == []
    assert dispatch.select("auto", "cuda", torch.float64, 16, 1, "tanh") is backend
    monkeypatch.setattr(backend, "INSTALLED", False)
    assert rnnkern.explain("cuda")["triton"] == ["the package triton is not installed"]


@pytest.mark.skipif(INTERPRETED, reason="of a process as users have it")
@pytest.mark.processes
def test_the_package_needs_no_triton():
    """It imports no kernel before one is launched (torch may well import Triton itself)."""
    script = (
        "import sys; sys.modules['triton'] = None; import rnnkern; rnnkern.explain('cuda');"
        "assert 'rnnkern.backends.triton_kernels' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parent.parent)


# ---- what the compiler makes of it ----

# Bytes of shared memory that a program can have.
GPUS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


class Compiled(NamedTuple):
    """What is known of a kernel compiled for a GPU that is not there."""

    registers: int
    spills: int  # instructions, in loops
    shared: int  # bytes
    ptx: str


class PretendedGpu:
    """A driver, for Triton's own JIT, of a GPU that is not there: kernels are compiled for it and,
    in the place of being launched, kept."""

    def __init__(self, gpu):
        self.gpu, self.utils = gpu, self
        self.launches = []  # (grid, arguments)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.gpu, 32)

    def get_device_properties(self, device):
        return {"max_shared_mem": GPUS[self.gpu]}

    def load_binary(self, name, binary, shared, device):
        return "module", "function", 0, 0, 1024  # threads of a program

    def launcher_cls(self, source, metadata):
        # stream, function, metadata and hooks come between
        return lambda *call: self.launches.append((call[:3], call[9:]))

    def compiled(self):
        """Both kernels' variants."""
        from rnnkern.backends import triton_kernels as kernels

        caches = (kernel.device_caches for kernel in (kernels.scan_kernel, kernels.step_kernel))
        return [variant for cache in caches if cache for variant in cache[0][0].values()]


@contextlib.contextmanager
def pretended(gpu):
    """Launches go to a PretendedGpu, which knows no kernel yet."""
    from triton.runtime import driver

    from rnnkern.backends import triton_kernels as kernels

    caches = [kernel.device_caches for kernel in (kernels.scan_kernel, kernels.step_kernel)]
    # Not set_active(): where there is no GPU, there is no driver to go back to.
    with mock.patch.object(driver, "_active", PretendedGpu(gpu)):
        try:
            for cache in caches:
                cache.clear()
            yield driver.active
        finally:
            for cache in caches:
                cache.clear()


def examine(compiled) -> Compiled:
    import triton

    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "kernel.cubin")
        file.write_bytes(compiled.asm["cubin"])
        run = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
        cuobjdump = triton.knobs.nvidia.cuobjdump.path
        registers = run([cuobjdump, "--dump-resource-usage", file]).stdout
        code = run([cuobjdump, "--dump-sass", file]).stdout
    return Compiled(
        int(re.search(r"\bREG:(\d+)", registers)[1]),
        spills_in_loops(code),
        compiled.metadata.shared,
        compiled.asm["ptx"],
    )


def spills_in_loops(code) -> int:
    """How often a loop of the machine code goes to local memory, which is where registers spill."""
    instructions = [
        (int(address, 16), text)
        for address, text in re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", code, re.MULTILINE)
    ]
    back = [
        (int(to, 16), at)
        for at, text in instructions
        for to in re.findall(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if int(to, 16) < at
    ]
    assert back, "no loop found"
    spills = [at for at, text in instructions if re.search(r"\b(LDL|STL)\b", text)]
    return sum(any(begin <= at <= end for begin, end in back) for at in spills)


def compile_for(gpu, mode, dtype, hidden, packed=False, batch=8, features=1):
    """What a scan in the middle of training launches on a GPU: the arguments and the kernel."""
    options = {"dtype": dtype}
    sizes = torch.tensor([batch, batch, 1]) if packed else None
    lead = (int(sizes.sum()),) if packed else (3, batch)
    x, state = torch.zeros(*lead, hidden, **options), torch.zeros(1, batch, hidden, **options)
    w = [torch.zeros(hidden, hidden, **options)]
    rest = (w, sizes, [packed], "tanh")
    tile = min if batch <= 8 else max
    step_rows = mock.patch.object(backend, "_step_rows", lambda kind, *_: tile(backend.STEPS[kind]))
    with step_rows, pretended(gpu) as driver:
        if mode == "FORWARD":
            backend.rnn_scan_kernel(x, state, *rest)
        elif mode == "LAYER":
            few = torch.zeros(*lead, features, **options)
            w_ih, bias = (
                [torch.zeros(hidden, features, **options)],
                [torch.zeros(hidden, **options)],
            )
            backend._rnn_layer(few, state, w_ih, w, bias, bias, *rest[1:])
        elif mode == "BACKWARD":
            backend._backward_scan(x, state, x, state, *rest)
        else:
            backend.linear_scan_kernel(x, x, state, *rest[:-1])
        # (Without a state to start with, the first of several launches has a kernel of its own.)
        return driver.launches[-1][1], driver.compiled()[-1]


HALF, FLOAT, DOUBLE = torch.bfloat16, torch.float32, torch.float64
# dtype, whether in TF32, and H: every row of backend.FUSED, and where they end.
VARIANTS = [(HALF, False, H) for H in (16, 20, 32, 64, 100, 128, 192, 200, 256, 1024)]
VARIANTS += [(torch.float16, False, H) for H in (16, 256)]
VARIANTS += [(FLOAT, True, H) for H in (1, 16, 32, 64, 100, 128, 512)]
VARIANTS += [(FLOAT, False, H) for H in (16, 32, 50, 64, 100)]
VARIANTS += [(DOUBLE, False, H) for H in (16, 32, 50, 64, 256)]
MODES = list(itertools.product(["FORWARD", "LAYER", "BACKWARD", "LINEAR"], [False, True]))
COMPILED = list(itertools.product(GPUS, VARIANTS, MODES))
if os.environ.get("RNNKERN_FUZZ") != "long":
    few = [(HALF, False, 16), (HALF, False, 256), (HALF, False, 1024), (FLOAT, False, 64)]
    few += [(FLOAT, True, 128), (DOUBLE, False, 64)]
    more = [(HALF, False, 64), (HALF, False, 100), (torch.float16, False, 256), (FLOAT, True, 16)]
    more += [(FLOAT, True, 1), (FLOAT, True, 512), (FLOAT, False, 100)]
    COMPILED = [
        (gpu, variant, mode)
        for gpu, variant, mode in COMPILED
        if (gpu == 90 and variant in few + more and mode in MODES[0::3] + MODES[5:7:2])
        or (variant in few and mode in (MODES[0], MODES[5]))
    ]


def multiplies_by(gpu, dtype, tf32, units, warps):
    """The instruction that a product should be made of, and none of the others."""
    if dtype == torch.float32 and not tf32:  # no tensor core has IEEE's
        return r"fma\.rn\.f32"
    if dtype == torch.float64:  # sm_100's compiler leaves the tensor cores alone
        return r"fma\.rn\.f64" if gpu == 100 else r"mma\.sync[\w.]*\.f64"
    if gpu == 90 and units >= 64:
        return r"wgmma\.mma_async"
    if gpu == 100 and units >= 64 and warps <= 8:
        return r"tcgen05\.mma"
    of = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "tf32"}[dtype]
    return rf"mma\.sync[\w.]*\.{of}"


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("gpu, variant, mode", COMPILED, ids=name)
def test_compiled(gpu, variant, mode, monkeypatch):
    """At most 255 registers, none spilt in a loop, shared memory that there is, and the right
    products. (On sm_100 the assembler spills here and there; nobody has tuned for it yet.)"""
    (dtype, tf32, hidden), (op, packed) = variant, mode
    torch.backends.cudnn.rnn.fp32_precision = "tf32" if tf32 else "ieee"
    monkeypatch.setattr(backend, "_by_torch", lambda kind, hidden: False)
    arguments, compiled = compile_for(gpu, op, dtype, hidden, packed, 17 if packed else 8)
    found = examine(compiled)
    assert found.registers <= 255
    assert found.spills == 0 or gpu == 100
    assert found.shared <= GPUS[gpu]
    at = dict(zip(compiled.src.fn.arg_names, arguments, strict=True))
    units = at.get("BLOCK_H") or at["BLOCK_N"]
    fits = hidden <= max(backend.FUSED[KIND[variant[:2]]]) and (hidden <= 128 or hidden % 16 == 0)
    assert compiled.metadata.name == ("scan_kernel" if fits else "step_kernel")
    wanted = multiplies_by(gpu, dtype, tf32, units, compiled.metadata.num_warps)
    assert re.search(wanted, found.ptx)
    for other in (r"wgmma\.mma_async", r"tcgen05\.mma", r"mma\.sync"):
        assert wanted.startswith(other) or not re.search(other, found.ptx), other


KIND = {(HALF, False): "half", (torch.float16, False): "half", (DOUBLE, False): "float64"}
KIND |= {(FLOAT, True): "tf32", (FLOAT, False): "ieee"}


@pytest.mark.skipif(INTERPRETED, reason="compiles")
def test_ieee_is_never_tf32():
    """The compiler makes TF32 products, unasked, of a sum of products of float32: see _advance."""
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    for op in ("LAYER", "FORWARD", "BACKWARD", "LINEAR"):
        _, compiled = compile_for(90, op, FLOAT, 32)
        assert "tf32" not in compiled.asm["ptx"]


@pytest.mark.skipif(INTERPRETED, reason="compiles")
def test_ieee_steps_by_torch():
    """What is left for step_kernel is no product."""
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    for op in ("FORWARD", "BACKWARD"):
        arguments, compiled = compile_for(90, op, FLOAT, 512)
        at = dict(zip(compiled.src.fn.arg_names, arguments, strict=True))
        assert at["sums"].shape == (1, 8, 512)
        assert not re.search(r"mma|\.local", compiled.asm["ptx"])


@pytest.mark.skipif(INTERPRETED, reason="compiles")
def test_warmup_of_steps(monkeypatch):
    """Every tile's kernels: then training compiles nothing new."""
    tile = lambda kind, hidden, batch, *_: 16 if batch <= 64 else 64  # noqa: E731
    monkeypatch.setattr(backend, "_step_rows", tile)
    with pretended(90) as driver:
        backend.warmup(300, HALF, device="cpu")
        known = len(driver.compiled())
        for batch in (3, 100):
            x, h0 = torch.zeros(5, batch, 300, dtype=HALF), torch.zeros(1, batch, 300, dtype=HALF)
            w = [torch.zeros(300, 300, dtype=HALF)]
            h, h_n = backend.rnn_scan_kernel(x, h0, w, None, [False], "tanh")
            backend._backward_scan(h, h_n, h, h0, w, None, [False], "tanh")
        assert len(driver.compiled()) == known >= 4


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("hidden", [32, 512])
def test_no_new_kernel_for_new_sizes(hidden):
    """Neither for numbers of steps, rows and groups, nor for places in memory where weights lie."""
    batches = ((1, 16, 7), (17, 99, 1000))
    with pretended(90) as driver:
        for batch in batches[0] if hidden > 128 else batches[0] + batches[1]:
            for steps, groups in ((1, 1), (5, 2), (6, 3), (2, 40)):
                w = [torch.zeros(hidden, hidden) for _ in range(groups)]
                x = torch.zeros(steps, batch, groups * hidden)
                state = torch.zeros(groups, batch, hidden)
                reverse = [g % 2 == 1 for g in range(groups)]
                backend.rnn_scan_kernel(x, state, w, None, reverse, "tanh")
        assert len(driver.compiled()) == 1


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("initial", [True, False])
def test_each_step_is_one_launch(initial):
    """The same whether Triton looks for the kernel or it is launched at once."""
    T, B, H = 7, 3, 300
    x, w, state = torch.zeros(T, B, H), [torch.zeros(H, H)], torch.zeros(1, B, H)
    with pretended(90) as driver:
        _, h_n = backend.rnn_scan_kernel(x, state if initial else None, w, None, [False], "tanh")
        names = driver.compiled()[0].src.fn.arg_names
        calls = [dict(zip(names, values, strict=True)) for _, values in driver.launches]
        assert len({grid for grid, _ in driver.launches}) == 1
    assert [call["i"] for call in calls] == list(range(T))
    assert calls[0]["state"] is state if initial else not calls[0]["state"].any()
    for call, following in itertools.pairwise(calls):
        assert following["state"] is call["next_state"]
        same = [name for name in names if name not in ("i", "state", "next_state")]
        assert all(call[name] is following[name] or call[name] == following[name] for name in same)
    assert calls[-1]["next_state"] is h_n


# ---- the benchmark ----


@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter itself")
@needs_interpreter
@pytest.mark.processes
def test_the_gpu_benchmark_runs(tmp_path):
    """From end to end, so that it does not fail in its first minute on a GPU."""
    bench, out = Path(__file__).parent.parent / "bench", tmp_path / "gpu.jsonl"
    run = functools.partial(subprocess.run, capture_output=True, text=True)
    dry = run([sys.executable, bench / "gpu.py", "--dry-run", "--out", out])
    assert dry.returncode == 0, dry.stdout[-3000:] + dry.stderr[-2000:]
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert not [r for r in records if "error" in r and r.get("way") != "FlashRNN cuda_fused"]
    assert {"torch.nn.RNN", "rnnkern.RNN", "the notebook's loop", "the loop, step compiled"} <= {
        r["way"] for r in records if "graph_us" in r
    }
    assert records[-1]["section"] == "end" and records[-1]["skipped"] == 0
    report = run([sys.executable, bench / "report.py", out, "--picture", tmp_path / "gpu.png"])
    assert report.returncode == 0, report.stderr[-2000:]
    assert "| plain, forward" in report.stdout and (tmp_path / "gpu.png").stat().st_size > 1000


# ---- the interpreter's process ----


@pytest.mark.skipif(INTERPRETED, reason="this is it")
@needs_interpreter
@pytest.mark.processes
def test_interpreted():
    """This file under Triton's interpreter."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 200
