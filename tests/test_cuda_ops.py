"""The ops on CUDA kernels, from rnnkern.functional through autograd to csrc/cuda: on a GPU where
there is one; else on the simulator.

test_simulated builds the binding, the launcher and the kernels for the simulator, and runs this
file again in a process of its own, where that library takes the place of the CPU's ops: the tests
that here are for "cuda" are for its CPU tensors.
"""

import itertools
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import (
    ACTIVATIONS,
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
from rnnkern import dispatch, functional
from rnnkern.backends import cuda as backend

ROOT = Path(__file__).parent.parent
NAN, INF = float("nan"), float("inf")
SIMULATED = os.environ.get("RNNKERN_SIMULATED_LIBRARY")
if SIMULATED:
    torch.ops.load_library(SIMULATED)
DEVICE, BACKEND = ("cpu", "cpu") if SIMULATED else ("cuda", "cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALVES = DTYPES[1:]
# H that each regime's kernels hold, also those of the simulator; of two, several blocks run a tile.
REGIMES = {"warp": 13, "block": 50, "cluster": 150, "grid": 70, "fma": 50}

pytestmark = needs_library


def on_the_device(test):
    return test if SIMULATED else pytest.mark.gpu(test)


def in_every_regime(test):
    return on_the_device(pytest.mark.parametrize("regime", REGIMES, indirect=True)(test))


of_every_kind = pytest.mark.parametrize("op", ["scan-tanh", "layer-relu", "linear"])
of_every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


@pytest.fixture(autouse=True)
def ieee():
    """float32 is IEEE's, unless a test asks for TF32."""
    before = torch.backends.cudnn.rnn.fp32_precision
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.rnn.fp32_precision = before


@pytest.fixture
def regime(request, monkeypatch):
    """All kernels are of this regime."""
    if request.param == "fma" and request.node.callspec.params.get("dtype") in HALVES:
        pytest.skip("it is float32's")
    monkeypatch.setenv("RNNKERN_CUDA_REGIME", request.param)
    return request.param


def check(op, layout, shape, dtype, without=(), poisoned=None):
    call = make_inputs(op, layout, shape).without(*without).to(dtype, DEVICE)
    if poisoned and DEVICE == "cpu":
        poisoned(*(t.nbytes for t in (*call.tensors.values(), *call.grads)))
    assert_results(call.results(BACKEND), right_results(op, layout, shape, without), call)


def plan(precision, recurrence, nonlinearity, steps, batch, hidden, groups=1):
    shape = (precision, recurrence, nonlinearity, steps, batch, hidden, groups)
    return torch.ops.rnnkern.cuda_plan(torch.device(DEVICE, 0), *shape)


# ---- values and gradients ----

# Every op in every layout, in shapes and dtypes that take turns; on a GPU all of them.
TURNS = range(1 if SIMULATED else len(SHAPES))
TABLE = [
    (op, layout, SHAPES[i % len(SHAPES)], DTYPES[(i // len(SHAPES) + i) % len(DTYPES)])
    for i, (op, layout, _) in enumerate(itertools.product(OPS, LAYOUTS, TURNS))
]


def name(value):
    return str(value).removeprefix("torch.")


@on_the_device
@pytest.mark.parametrize("op, layout, shape, dtype", TABLE, ids=name)
def test_table(op, layout, shape, dtype, poisoned):
    check(op, layout, shape, dtype, poisoned=poisoned)


@in_every_regime
@of_every_kind
@of_every_dtype
def test_regimes(regime, op, dtype, poisoned):
    """Several tiles of rows, a part of the last one, H of its own and one that nothing divides."""
    check(op, "packed-2groups", Shape(3, 19, REGIMES[regime], 3), dtype, poisoned=poisoned)
    check(op, "plain", Shape(2, 3, 16, 2), dtype)


@in_every_regime
@pytest.mark.parametrize("steps", [0, 1, 2, 9, 20])
def test_numbers_of_steps(regime, steps):
    for op in ("layer-tanh", "linear"):
        shape = Shape(steps, 2, 6, 2)
        for layout in ["2groups"] + ["packed-2groups"] * (steps > 0):
            check(op, layout, shape, torch.float32)
        half = torch.float32 if regime == "fma" else torch.float16
        check(op, "2groups", shape, half, ("h0", "s0", "bias_ih", "bias_hh"))


@in_every_regime
@of_every_dtype
@pytest.mark.parametrize("layout", ["plain", "packed-3groups"])
def test_few_features(regime, dtype, layout):
    """Of up to 16 bytes of a row, and H that needs no filling up, x is multiplied by the kernels of
    one block; else by a product before them."""
    one_block, size = regime in ("warp", "block", "fma"), dtype.itemsize
    several = [(3, 24), (4, 8), (5, 16), (8, 16), (9, 16), (3, 13)] if one_block else []
    for features, hidden in [(1, 16), *several]:
        shape = Shape(3 * features, 11, hidden, features)
        check("layer-tanh", layout, shape, dtype)
        check("layer-tanh", layout, shape, dtype, ("bias_ih", "bias_hh"))
        call = make_inputs("layer-tanh", layout, shape).without("bias_ih", "bias_hh")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            call.to(dtype, DEVICE).run(BACKEND)
        within = one_block and features * size <= 16 and hidden * size % 16 == 0
        assert any(e.name == "aten::mm" for e in profile.events()) != within, shape


@on_the_device
@pytest.mark.parametrize("hidden", [5, 8])
def test_infinite_features(hidden):
    """They reach no row but their own, and a state that is filled up not at all."""
    call = make_inputs("layer-tanh", "2groups", Shape(4, 3, hidden, 3)).to(torch.float16, DEVICE)
    call.tensors["x"][1, 1, 2] = INF
    call.tensors["x"][2, 0, 0] = NAN
    for got, right in zip(call.run(BACKEND), call.run("reference"), strict=True):
        torch.testing.assert_close(got, right, equal_nan=True, rtol=0, atol=4e-3)


@on_the_device
def test_long_packed_rows():
    """More steps than one launch writes into their table."""
    steps, hidden = 2000, 2
    sizes = torch.tensor([3] * 100 + [2] * 1100 + [1] * 800)
    x = torch.randn(int(sizes.sum()), hidden, device=DEVICE) / 4
    w, h0 = [torch.eye(hidden, device=DEVICE) / 2], torch.zeros(1, 3, hidden, device=DEVICE)
    assert len(sizes) == steps
    for reverse in (False, True):
        h, h_n = functional.rnn_scan(x, w, h0, sizes, [reverse], backend=BACKEND)
        right = functional.rnn_scan(x, w, h0, sizes, [reverse], backend="reference")
        assert_equal([h, h_n], right, tolerance=1e-5)


@on_the_device
@of_every_kind
def test_no_packed_rows(op):
    """No steps: the states pass through, and so do their gradients."""
    h0 = torch.randn(1, 3, 5, device=DEVICE).requires_grad_()
    sizes = torch.empty(0, dtype=torch.int64)
    x = torch.empty(0, 5, device=DEVICE)
    w = [torch.eye(5, device=DEVICE)]
    if op == "linear":
        assert functional.linear_scan(x, x, w, h0, sizes, backend=BACKEND).shape == (0, 5)
        return
    if op == "scan-tanh":
        h, h_n = functional.rnn_scan(x, w, h0, sizes, backend=BACKEND)
    else:
        h, h_n = functional.rnn_layer(x, w, w, [], [], h0, sizes, backend=BACKEND)
    assert h.shape == (0, 5) and torch.equal(h_n, h0)
    assert torch.equal(torch.autograd.grad(h_n.sum(), h0)[0], torch.ones_like(h0))


@on_the_device
@pytest.mark.parametrize("shape", [(0, 3, 5), (4, 0, 5), (4, 3, 0)], ids=str)
def test_nothing_to_compute(shape):
    T, B, H = shape
    w = [torch.randn(H, H, device=DEVICE) for _ in range(2)]
    x = torch.randn(T, B, 2 * H, device=DEVICE).requires_grad_()
    h, h_n = functional.rnn_scan(x, w, reverse=[False, True], backend=BACKEND)
    assert h.shape == x.shape and h_n.shape == (2, B, H) and not h_n.any()
    assert torch.autograd.grad(h.sum() + h_n.sum(), x)[0].shape == x.shape


@in_every_regime
@pytest.mark.parametrize("kind", ["mixed", "spread"])
def test_many_groups(regime, kind):
    """More than one launch takes; weights of one stack, or wherever they are."""
    groups, H = 1029 if regime == "warp" else 37, 4
    reverse = [g % 3 == 0 for g in range(groups)]
    weight = list((torch.randn(groups, H, H, device=DEVICE) / 2).unbind())
    if kind == "spread":
        weight = [w.clone() if g % 2 else w for g, w in enumerate(weight)]
    x = torch.randn(3, 2, groups * H, device=DEVICE).requires_grad_()
    h0 = torch.randn(groups, 2, H, device=DEVICE)
    results = []
    for by in (BACKEND, "reference"):
        h, h_n = functional.rnn_scan(x, weight, h0, reverse=reverse, backend=by)
        results.append([h, h_n, *torch.autograd.grad(h.sum() + h_n.square().sum(), x)])
    assert_equal(*results, tolerance=1e-5)


def shifted(t):
    """Contiguous, but not from a multiple of 16 bytes on."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


@on_the_device
@pytest.mark.parametrize("lay", [sliced, shifted, transposed, negated_lazily, expanded])
@pytest.mark.parametrize("hidden", [5, 8])
@of_every_kind
def test_any_strides(op, hidden, lay):
    for layout in ("2groups", "packed-2groups"):
        call = make_inputs(op, layout, Shape(3, 2, hidden, 3)).to(torch.float32, DEVICE)
        assert_any_strides(call, BACKEND, lay, tolerance=1e-5)


@in_every_regime
@pytest.mark.parametrize("nonlinearity", ACTIVATIONS)
def test_special_values(regime, nonlinearity):
    """NaN, infinity, and values where f must not lose its digits, as in the reference; H = 5 is
    filled up to 8, which must not be heard."""
    for dtype in (torch.float32,) if regime == "fma" else (torch.float32, torch.float16):
        x = torch.zeros(3, 9, 2 * 5, dtype=dtype, device=DEVICE)
        x[1, :, 2] = torch.tensor([NAN, INF, -INF, 300.0, -300.0, 1e-3, -1e-3, 0.25, 0.45])
        weight = [torch.eye(5, dtype=dtype) / 2 + 0.125, torch.eye(5, dtype=dtype) / 4]
        weight = [w.to(DEVICE) for w in weight]
        results = []
        for by in (BACKEND, "reference"):
            leaf = x.clone().requires_grad_()
            h, h_n = functional.rnn_scan(
                leaf, weight, reverse=[False, True], nonlinearity=nonlinearity, backend=by
            )
            results.append([h, h_n, *torch.autograd.grad(h.sum(), leaf)])
        for got, right in zip(*results, strict=True):
            assert torch.equal(got.isnan(), right.isnan())
            assert torch.equal(got.isinf(), right.isinf())
            torch.testing.assert_close(got, right, equal_nan=True)


@in_every_regime
def test_inputs_are_not_modified(regime):
    for hidden in (5, 8):
        shape = Shape(4, 3, hidden, 2)
        call = make_inputs("layer-tanh", "packed-2groups", shape).to(torch.float32, DEVICE)
        kept = {n: t.clone() for n, t in call.tensors.items()}
        call.results(BACKEND)
        assert all(torch.equal(t, kept[n]) for n, t in call.tensors.items())


@in_every_regime
@of_every_dtype
def test_the_same_bits(regime, dtype):
    call = make_inputs("layer-tanh", "packed-2groups", Shape(5, 11, 9, 2)).to(dtype, DEVICE)
    first = call.results(BACKEND)
    for _ in range(3 if DEVICE == "cuda" else 1):
        again = call.results(BACKEND)
        assert all(torch.equal(first[n], again[n]) for n in first)


@in_every_regime
def test_tf32_is_torchs(regime):
    """By torch's switch for RNNs: less exact than IEEE's, no more than TF32's rounding."""
    call = make_inputs("layer-tanh", "2groups", Shape(5, 4, 13, 3)).to(torch.float32, DEVICE)
    right = right_results("layer-tanh", "2groups", Shape(5, 4, 13, 3))
    errors = {}
    for precision in ("ieee", "tf32"):
        torch.backends.cudnn.rnn.fp32_precision = precision
        got = call.results(BACKEND)
        errors[precision] = max(relative_error(got[n], right[n]) for n in right)
    assert errors["ieee"] < 1e-5
    # One that multiplies without tensor cores has no reason to round.
    assert errors["tf32"] < 1e-5 if regime == "fma" else 1e-5 < errors["tf32"] < 2e-3


# ---- derivatives and transformations ----


@on_the_device
@of_every_kind
@pytest.mark.parametrize("layout", ["plain", "packed-2groups"])
def test_every_order(op, layout):
    """Second order by value; forward mode; forward over reverse."""
    call = make_inputs(op, layout, Shape(3, 2, 3, 2)).to(torch.float32, DEVICE)
    assert_every_order(call, BACKEND, tolerance=1e-5)


@on_the_device
@of_every_kind
def test_vmap(op):
    """Over data and over weights, values and per-sample gradients."""
    call = make_inputs(op, "2groups", Shape(3, 2, 3, 2)).to(torch.float32, DEVICE)
    assert_vmap(call, BACKEND, tolerance=1e-5)


@on_the_device
def test_a_module():
    """rnnkern.RNN, two layers in both directions of packed input, as torch.nn.RNN."""
    stock = torch.nn.RNN(3, 20, 2, bidirectional=True, device=DEVICE)
    ours = rnnkern.RNN(3, 20, 2, bidirectional=True, device=DEVICE, backend=BACKEND)
    ours.load_state_dict(stock.state_dict())
    x = torch.nn.utils.rnn.pack_padded_sequence(
        torch.randn(7, 4, 3, device=DEVICE), torch.tensor([7, 5, 5, 2])
    )
    results = []
    for module in (ours, stock):
        out, h_n = module(x)
        grads = torch.autograd.grad(out.data.square().sum() + h_n.sum(), [*module.parameters()])
        results.append([out.data, h_n, *grads])
    assert_equal(*results, tolerance=1e-5)


# ---- what only a GPU has ----


@pytest.mark.gpu
@pytest.mark.parametrize("regime", REGIMES, indirect=True)
@pytest.mark.parametrize("layout", ["2groups", "packed-2groups"])
@of_every_dtype
def test_cuda_graphs(dtype, layout, regime):
    """Forward and backward captured once, replayed on other values."""
    shape = Shape(9, 20, REGIMES[regime], 5)
    call = make_inputs("layer-tanh", layout, shape).to(dtype, "cuda")
    assert_captured(call, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("regime", REGIMES, indirect=True)
@pytest.mark.parametrize("layout", ["2groups", "packed-2groups"])
def test_nobody_waits(regime, layout):
    """No call synchronises the host with the GPU, forward or backward."""
    shape = Shape(9, 20, REGIMES[regime], 5)
    call = make_inputs("layer-tanh", layout, shape).to(torch.float32, "cuda")
    call.results("cuda")
    leaves = call.leaves()
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs = call.run("cuda", *leaves)
        torch.autograd.grad(outputs, leaves, call.grads)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("regime", REGIMES, indirect=True)
def test_always_the_same_bits(regime):
    """10,000 times a ragged batch: what a race would change now and then."""
    call = make_inputs("scan-tanh", "packed-2groups", Shape(7, 19, REGIMES[regime], 1))
    call = call.to(torch.float32 if regime == "fma" else torch.bfloat16, "cuda")
    first = call.run("cuda")
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(10_000):
        for a, b in zip(first, call.run("cuda"), strict=True):
            wrong += (a != b).sum()
    assert wrong.item() == 0


@pytest.mark.gpu
def test_several_streams():
    calls = [
        make_inputs("layer-tanh", layout, Shape(33, 40, hidden, 3)).to(torch.float32, "cuda")
        for layout in ("2groups", "packed-2groups")
        for hidden in (32, 100, 200, 600)
    ]
    assert_streams(calls, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="GPU: there is no second one")
def test_another_device_than_the_current():
    shape = Shape(9, 20, 64, 5)
    call = make_inputs("layer-tanh", "packed-2groups", shape).to(torch.float16, "cuda:1")
    results = call.results("cuda")
    assert all(t.device.index == 1 for t in results.values())
    assert_results(results, right_results("layer-tanh", "packed-2groups", shape), call)


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [64, 300, 700, 1500])
@of_every_dtype
def test_sizes(hidden, dtype):
    check("layer-tanh", "packed-2groups", Shape(9, 37, hidden, 5), dtype)


@pytest.mark.gpu
def test_what_is_tritons():
    """float64 goes to Triton's kernels, by the ops too; named, Triton runs what ours could."""
    call = make_inputs("layer-tanh", "2groups", SMALL).to(torch.float64, "cuda")
    assert dispatch.select("auto", "cuda", torch.float64, 2, 1, "tanh").__name__.endswith("triton")
    right = right_results("layer-tanh", "2groups", SMALL)
    assert_results(call.results("auto"), right, call)
    half = call.to(torch.float16, "cuda")
    assert_results(half.results("triton"), right, half)
    assert "RnnLayer" not in half.run("triton", *half.leaves())[0].grad_fn.name()


@pytest.mark.gpu
def test_auto_chooses_it():
    out, _ = rnnkern.RNN(3, 5, device="cuda")(torch.randn(4, 2, 3, device="cuda"))
    assert out.is_cuda and dispatch.select("auto", "cuda", out.dtype, 5, 1, "tanh") is backend


# ---- which kernel ----

simulated = pytest.mark.skipif(not SIMULATED, reason="of the simulator's machine")


@simulated
def test_the_cheapest_kernel_is_chosen(monkeypatch):
    for hidden, regime in [(20, "warp"), (60, "block"), (256, "cluster"), (512, "grid")]:
        assert plan("bfloat16", "forward", "tanh", 100, 16, hidden)[0] == regime
    for batch, regime in [(16, "fma"), (2000, "block")]:
        assert plan("TF32", "backward", "tanh", 100, batch, 60)[0] == regime
    monkeypatch.setenv("RNNKERN_SIMULATED_CAPABILITY", "80")  # which has no clusters
    assert plan("bfloat16", "forward", "tanh", 100, 16, 256)[0] == "grid"
    listed = torch.ops.rnnkern.cuda_kernels()
    # precisions; regimes; recurrences and activations, of kernels of one block layers' too
    # and one of float32, whose products may be TF32 or not
    assert len(listed) == 4 * (2 * 10 + 2 * 7) + 2 * 10
    assert sum("float16, backward, relu, warp" in line for line in listed) == 2


@simulated
def test_rows_are_spread(monkeypatch):
    """Over the clusters that run at once, no more rows than a kernel has."""
    monkeypatch.setenv("RNNKERN_CUDA_REGIME", "cluster")
    cluster = ("bfloat16", "forward", "tanh", 100)
    monkeypatch.setenv("RNNKERN_SIMULATED_GPU", "40")  # ten clusters of 4 blocks
    assert plan(*cluster, 16, 256) == ("cluster", 2, 4, "")
    assert plan(*cluster, 16, 256, 4) == ("cluster", 8, 4, "")
    assert plan(*cluster, 1000, 256) == ("cluster", 8, 4, "")
    assert plan(*cluster, 16, 65) == ("cluster", 1, 2, "")
    check("scan-tanh", "packed-2groups", Shape(3, 21, 70, 1), torch.bfloat16)
    monkeypatch.setenv("RNNKERN_CUDA_REGIME", "grid")  # one team of 32 blocks, and three of 11
    assert plan(*cluster, 16, 512) == ("grid", 8, 32, "")
    assert plan(*cluster, 15, 170) == ("grid", 5, 11, "")
    check("scan-tanh", "packed-2groups", Shape(3, 21, 170, 1), torch.bfloat16)


@simulated
def test_why_no_kernel_serves(monkeypatch):
    tail = "H = 1000 in bfloat16; the largest is 512"
    linear = ("bfloat16", "linear", "tanh", 9, 9)
    assert plan(*linear, 1000) == ("", 0, 0, f"it has no kernel for {tail}")
    monkeypatch.setenv("RNNKERN_SIMULATED_GPU", "20")
    assert plan(*linear, 400)[-1].endswith(
        "the largest is 512, and 256 on this GPU (20 multiprocessors)"
    )
    monkeypatch.setenv("RNNKERN_SIMULATED_CAPABILITY", "75")
    assert (
        plan(*linear, 5)[-1] == "it needs a GPU of compute capability 8.0 or more, this one has 7.5"
    )
    monkeypatch.setenv("RNNKERN_SIMULATED_CAPABILITY", "86")
    assert plan(*linear, 5)[0] == "warp"
    monkeypatch.setenv("RNNKERN_SIMULATED_SHARED", "99")  # as there
    assert plan(*linear, 200)[0] == "grid"
    monkeypatch.setenv("RNNKERN_CUDA_REGIME", "cluster")
    assert "has no kernel for H = 200" in plan(*linear, 200)[-1]
    monkeypatch.delenv("RNNKERN_SIMULATED_CAPABILITY")
    monkeypatch.setenv("RNNKERN_CUDA_REGIME", "warp")
    assert "RNNKERN_CUDA_REGIME names, warp; the largest is 32" in plan(*linear, 60)[-1]
    monkeypatch.setenv("RNNKERN_CUDA_REGIME", "heap")
    with pytest.raises(RuntimeError, match="expected RNNKERN_CUDA_REGIME to be warp, .* got heap"):
        plan(*linear, 5)
    monkeypatch.delenv("RNNKERN_CUDA_REGIME")
    for wrong, words in [
        (("int4", *linear[1:], 5), "expected the precision to be one of"),
        (("TF32", "sideways", *linear[2:], 5), "expected the recurrence to be one of"),
        ((*linear, 0), "expected at least one step, row, unit and group"),
    ]:
        with pytest.raises(ValueError, match=words):
            plan(*wrong)


@simulated
def test_where_the_others_go(monkeypatch):
    """To Triton's kernels, if they are there: what no kernel serves, or single steps serve better.
    A regime that is forced goes nowhere else."""
    many_rows = ("bfloat16", "forward", "tanh", 100, 2000, 512)
    assert plan(*many_rows)[0] == "grid"
    call = make_inputs("layer-tanh", "packed-2groups", SMALL).to(torch.float64)
    words = "no kernel serves this call. cuda: it has no kernel for Double. triton: .* not register"
    with pytest.raises(RuntimeError, match=words):
        call.run(BACKEND)
    triton = pytest.importorskip("rnnkern.backends.triton")
    seen = []

    def kernel(*arguments):
        seen.append(len(arguments))
        return rnnkern.reference.rnn_scan(*arguments)

    monkeypatch.setattr(triton, "_OPS", (triton._rnn_scan,))
    registered = triton.register_apart("CPU")
    registered.impl("rnn_scan", kernel, "CPU", allow_override=True)
    scan = make_inputs("scan-tanh", "packed-2groups", SMALL).to(torch.float64)
    outputs = scan.run(BACKEND)
    assert seen == [6] and torch.equal(outputs[0], scan.run("reference")[0])
    assert plan(*many_rows) == ("steps", 0, 0, "")
    many = torch.zeros(1, 2000, 512, dtype=torch.bfloat16)
    torch.ops.rnnkern.rnn_scan(many, None, [many[0, :512]], None, [False], "tanh")
    assert seen == [6, 6]
    monkeypatch.setenv("RNNKERN_CUDA_REGIME", "grid")
    assert plan(*many_rows)[0] == "grid"
    with pytest.raises(RuntimeError, match="rnn_scan: it has no kernel for Double"):
        scan.run(BACKEND)


# ---- arguments ----


@on_the_device
def test_the_ops_check_their_arguments():
    ops = torch.ops.rnnkern
    h, w = torch.randn(3, 2, 4, device=DEVICE), torch.randn(4, 4, device=DEVICE)
    wide = torch.randn(3, 2, 5, device=DEVICE)
    state, rows = torch.randn(1, 3, 4, device=DEVICE), torch.randn(6, 4, device=DEVICE)
    none = [False] * 5
    for call, words in [
        (lambda: ops.rnn_scan(wide, None, [w], None, [0], "tanh"), "G\\*H"),
        (lambda: ops.rnn_scan(h, state, [w], None, [0], "tanh"), "h0"),
        (lambda: ops.rnn_scan(h, None, [w], None, [0], "gelu"), "nonlinearity must be one of"),
        (lambda: ops.linear_scan(h, wide, None, [w], None, [0]), "gain"),
        (lambda: ops.rnn_layer(wide, None, [w], [w], [], [], None, [0], "tanh"), "I = 4"),
        (
            lambda: ops.rnn_scan(rows, state, [w], torch.tensor([3, 2, 2]), [0], "tanh"),
            "add up to the 6 packed rows",
        ),
        (
            lambda: ops.rnn_scan(rows, state, [w], torch.tensor([2, 3, 1]), [0], "tanh"),
            "positive and non-increasing",
        ),
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
            "expected weight_ih",
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


# ---- who may run ----


@pytest.mark.skipif(SIMULATED is not None, reason="is not about the simulator")
def test_who_may_run():
    reasons = rnnkern.explain("cuda")["cuda"]
    if not backend.COMPILED:
        assert any("CUDA kernels" in reason for reason in reasons)
    if not torch.cuda.is_available():
        assert reasons[-1] == "torch sees no CUDA GPU"
    assert rnnkern.explain("cpu")["cuda"][-1] == "it runs on CUDA GPUs, the tensors are on cpu"
    strange = rnnkern.explain("cuda", torch.complex64, nonlinearity="gelu")["cuda"]
    assert strange[-2:] == [
        "it has no kernel for torch.complex64",
        "it has no kernel for the nonlinearity 'gelu'",
    ]


@pytest.mark.skipif(SIMULATED is not None, reason="is not about the simulator")
@pytest.mark.parametrize("torch_has_cuda", [False, True])
def test_how_to_get_the_kernels(torch_has_cuda, monkeypatch):
    monkeypatch.setattr(backend, "COMPILED", False)
    monkeypatch.setattr(torch.version, "cuda", "13.0" if torch_has_cuda else None)
    reason = rnnkern.explain("cuda")["cuda"][0]
    assert ("nvcc of CUDA 13 on PATH" in reason) == torch_has_cuda
    assert ("is no CUDA build" in reason) != torch_has_cuda


@pytest.mark.skipif(SIMULATED is not None, reason="is not about the simulator")
def test_what_the_gpus_refuse(monkeypatch):
    """Beyond what every GPU holds; Triton's ops where no kernel ever serves."""

    def plan(hidden_size, precision, recurrence, index):
        most = {"TF32": 2048, "3xTF32": 1024 if recurrence == "linear" else 2048}[precision]
        refusal = "too old" if index == 2 else "too large" * (hidden_size > most)
        return backend.Plan("warp", 1, 1, refusal)

    monkeypatch.setattr(backend, "COMPILED", True)
    monkeypatch.setattr(backend, "plan", plan)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    backend._ask.cache_clear()
    call = ("cuda", torch.float32)
    assert backend.unsupported(*call, 1024, 1, "tanh") == []
    assert backend.unsupported(*call, 0, 1, "tanh") == []
    words = [f"cuda:{i}: its kernels for torch.float32 hold H up to 1024" for i in range(2)]
    assert backend.unsupported(*call, 1025, 1, None) == words
    on_a_gpu = SimpleNamespace(dtype=torch.float32, device=torch.device("cuda", 0))
    assert not backend.never_runs(on_a_gpu, 2048) and backend.never_runs(on_a_gpu, 2049)
    assert backend.never_runs(torch.zeros(1, dtype=torch.float64), 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert backend.unsupported(*call, 16, 1, None) == ["cuda:2: too old"]
    backend._ask.cache_clear()


# ---- the simulator's process ----


def compile_and_link(out: Path) -> None:
    """The library of the simulator, of which each file is compiled side by side."""
    from torch.utils import cpp_extension

    flags = ["-std=c++20", "-O1", "-g0", "-fPIC", "-fvisibility=hidden", "-DRNNKERN_SIMULATE"]
    flags += [f"-I{ROOT}/tests/cuda", "-Wno-psabi"]
    flags += [f"-isystem{path}" for path in cpp_extension.include_paths()]
    flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    jobs = [(f"csrc/{name}.cpp", []) for name in ("cuda/ops", "rows", "steps", "cuda/launch")]
    jobs.append(("tests/cuda/machine.cpp", []))
    for precision in ("kBFloat16", "kHalf", "kTf32", "kTf32x3"):
        for regime in ("kWarp", "kFma", "kBlock", "kCluster", "kGrid"):
            if regime == "kFma" and precision != "kTf32x3":
                continue
            defines = [f"-DRNNKERN_PRECISION={precision}", f"-DRNNKERN_REGIME={regime}"]
            jobs.append(("csrc/cuda/kernels.cu", [*defines, "-x", "c++"]))

    def run(*command):
        done = subprocess.run(["g++", *command], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-5000:]

    def compile_one(numbered):
        number, (source, defines) = numbered
        run(*flags, *defines, "-c", source, "-o", str(out.with_suffix(f".{number}.o")))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, enumerate(jobs)))
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    objects = map(str, out.parent.glob("*.o"))
    run("-shared", "-s", "-o", str(out), *objects, *libraries, "-ltorch", "-ltorch_cpu", "-lc10")


@pytest.mark.skipif(SIMULATED is not None, reason="this is it")
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@pytest.mark.processes
def test_simulated(tmp_path):
    """This file on the simulator."""
    built = tmp_path / "simulated.so"
    compile_and_link(built)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", __file__],
        env=os.environ | {"RNNKERN_SIMULATED_LIBRARY": str(built), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 200
