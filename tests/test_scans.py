"""Every backend against the reference: values and gradients over the table, then the edges."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import (
    ACTIVATIONS,
    BACKENDS,
    DTYPES,
    LAYOUTS,
    ONE_ROW,
    OPS,
    SHAPES,
    Layout,
    Shape,
    assert_equal,
    assert_results,
    batch_sizes_of,
    make_inputs,
    needs_library,
    right_results,
)
from conftest import NO_SUCH_CPU

from rnnkern import functional, reference

INITIAL = ("h0", "s0")
NAN, INF = float("nan"), float("inf")

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
in_every_layout = pytest.mark.parametrize("layout", LAYOUTS)
in_every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
with_every_op = pytest.mark.parametrize("op", OPS)


# ---- the table ----


@pytest.mark.parametrize("shape", [*SHAPES, ONE_ROW], ids=str)
@in_every_dtype
@in_every_layout
@with_every_op
@on_every_backend
def test_table(backend, op, layout, dtype, shape, poisoned):
    call = make_inputs(op, layout, shape, dtype)
    poisoned(*(t.nbytes for t in (*call.tensors.values(), *call.grads)))
    assert_results(call.results(backend), right_results(op, layout, shape), call)


@pytest.mark.parametrize("layout", [n for n, layout in LAYOUTS.items() if not layout.packed])
@with_every_op
@on_every_backend
def test_without_an_initial_state(backend, op, layout, poisoned):
    for shape in SHAPES:
        call = make_inputs(op, layout, shape).without(*INITIAL)
        poisoned(*(t.nbytes for t in (*call.tensors.values(), *call.grads)))
        assert_results(call.results(backend), right_results(op, layout, shape, INITIAL), call)


@pytest.mark.parametrize("layout", ["plain", "packed", "2groups"])
@on_every_backend
def test_without_biases(backend, layout):
    biases = ("bias_ih", "bias_hh")
    for shape in SHAPES:
        call = make_inputs("layer-tanh", layout, shape).without(*biases)
        right = right_results("layer-tanh", layout, shape, biases)
        assert_results(call.results(backend), right, call)


@pytest.mark.parametrize("sizes", [[1], [5], [5, 5, 5], [5, 1, 1, 1], [3, 3, 2, 1], [1, 1, 1]])
@with_every_op
@on_every_backend
def test_patterns_of_lengths(backend, op, sizes):
    """The same call packed, and each sequence alone: nobody sees another's rows."""
    shape = Shape(len(sizes), sizes[0], 7, 3)
    call = make_inputs(op, "packed-3groups", shape)
    lead = sum(sizes)
    tensors = dict(call.tensors)
    for name in ("x", "x_proj", "u", "gain"):
        if name in tensors:
            tensors[name] = torch.randn(lead, tensors[name].size(1), dtype=torch.float64)
    initial = next(n for n in INITIAL if n in tensors)
    packed = type(call)(
        call.op, call.nonlinearity, torch.tensor(sizes), call.reverse, tensors, ()
    ).run(backend)
    starts = [sum(sizes[:t]) for t in range(len(sizes))]
    for b in range(sizes[0]):
        rows = torch.tensor([s + b for s, n in zip(starts, sizes, strict=True) if b < n])
        alone = {
            name: t[rows].unsqueeze(1) if name in ("x", "x_proj", "u", "gain") else t
            for name, t in tensors.items()
        }
        alone[initial] = tensors[initial][:, b : b + 1]
        one = type(call)(call.op, call.nonlinearity, None, call.reverse, alone, ()).run(backend)
        assert_equal([packed[0][rows]], [one[0].squeeze(1)])
        assert_equal([o[:, b : b + 1] for o in packed[1:]], one[1:])


# ---- how the tensors lie in memory ----


def sliced(t):
    wide = torch.full([2 * n + 1 for n in t.shape], NAN, dtype=t.dtype)
    view = wide[tuple(slice(1, None, 2) for _ in t.shape)]
    return view.copy_(t)


def transposed(t):
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def offset(t):
    """Contiguous, but at an address that no vector type is aligned to."""
    return torch.cat([t.new_full((1,), NAN), t.flatten()])[1:].view(t.shape)


def negated_lazily(t):
    return torch.complex(torch.zeros_like(t), -t).conj().imag


@pytest.mark.parametrize("lay", [sliced, transposed, offset, negated_lazily])
@pytest.mark.parametrize("op", ["scan-tanh", "layer-tanh", "linear"])
@on_every_backend
def test_any_strides(backend, op, lay):
    for layout in ("2groups", "packed-2groups"):
        shape = Shape(5, 3, 17, 9)
        call = make_inputs(op, layout, shape)
        moved = type(call)(
            call.op,
            call.nonlinearity,
            call.batch_sizes,
            call.reverse,
            {name: lay(t) for name, t in call.tensors.items()},
            tuple(lay(g) for g in call.grads),
        )
        assert all(torch.equal(a, call.tensors[n]) for n, a in moved.tensors.items())
        leaves = [t.detach().requires_grad_() for t in moved.tensors.values()]
        outputs = moved.run(backend, *leaves)
        got = [*outputs, *torch.autograd.grad(outputs, leaves, moved.grads)]
        assert_equal(got, right_results(op, layout, shape).values())


@pytest.mark.parametrize("op", ["scan-tanh", "layer-tanh", "linear"])
@on_every_backend
def test_expanded_inputs_and_gradients(backend, op):
    """Stride 0 wherever it can be: one row for all, one number for a matrix."""
    call = make_inputs(op, "2groups", Shape(5, 3, 7, 4))
    narrow = {name: t.flatten()[:1].view([1] * t.dim()) for name, t in call.tensors.items()}
    full = {name: narrow[name].expand(t.shape) for name, t in call.tensors.items()}
    results = []
    for lay in (lambda t: t, lambda t: t.contiguous()):
        leaves = [lay(t).requires_grad_() for t in full.values()]
        outputs = call.run(backend, *leaves)
        ones = [lay(torch.ones((), dtype=torch.float64).expand(o.shape)) for o in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, ones)])
    assert_equal(*results, tolerance=1e-14)


@with_every_op
@on_every_backend
def test_inputs_are_not_modified(backend, op):
    call = make_inputs(op, "packed-2groups", Shape(5, 6, 9, 3))
    leaves = call.leaves()
    versions = [t._version for t in leaves]
    grads = [g.clone() for g in call.grads]
    outputs = call.run(backend, *leaves)
    kept = [o.detach().clone() for o in outputs]
    torch.autograd.grad(outputs, leaves, grads)
    assert [t._version for t in leaves] == versions
    for now, before in [
        *zip(leaves, call.tensors.values(), strict=True),
        *zip(grads, call.grads, strict=True),
        *zip(outputs, kept, strict=True),
    ]:
        assert torch.equal(now, before)


@on_every_backend
def test_outputs_share_no_memory(backend):
    """Also where h_n is h0 itself, or a part of h."""
    for shape in (Shape(1, 3, 4, 2), Shape(0, 3, 4, 2)):
        call = make_inputs("scan-tanh", "plain", Shape(1, 3, 4, 2))
        x_proj = call.tensors["x_proj"][: shape.T]
        leaves = [x_proj, *list(call.tensors.values())[1:]]
        outputs = call.run(backend, *leaves)
        pointers = {t.untyped_storage().data_ptr() for t in [*leaves, *outputs] if t.numel()}
        assert len(pointers) == sum(t.numel() > 0 for t in [*leaves, *outputs])


# ---- sizes at the edge ----


def empty_call(op, T, B, H=5, features=3, packed=False):
    """A call with no rows."""
    function, nonlinearity = OPS[op]
    call = make_inputs(op, "packed-2groups" if packed else "2groups", Shape(1, 1, H, features))
    lead = (0,) if packed else (T, B)
    tensors = {}
    for name, t in call.tensors.items():
        if name in ("x", "x_proj", "u", "gain"):
            t = torch.randn(*lead, t.size(-1), dtype=torch.float64)
        elif name in INITIAL:
            t = torch.randn(2, B, H, dtype=torch.float64)
        tensors[name] = t
    sizes = torch.empty(0, dtype=torch.int64) if packed else None
    rows = (*lead, 2 * H)
    grads = [torch.randn(rows, dtype=torch.float64)]
    if function != "linear_scan":
        grads.append(torch.randn(2, B, H, dtype=torch.float64))
    return type(call)(function, nonlinearity, sizes, call.reverse, tensors, tuple(grads))


EMPTY = {"T0": (0, 3), "B0": (4, 0), "T0B0": (0, 0)}


@pytest.mark.parametrize("empty", EMPTY)
@with_every_op
@on_every_backend
def test_no_rows(backend, op, empty):
    call = empty_call(op, *EMPTY[empty])
    for case in (call, call.without(*INITIAL)):
        assert_equal(case.results(backend).values(), case.results("reference").values())


@with_every_op
@on_every_backend
def test_no_packed_rows(backend, op):
    """A packed batch of no steps: the states pass through, and so do their gradients."""
    call = empty_call(op, 0, 3, packed=True)
    leaves = call.leaves()
    outputs = call.run(backend, *leaves)
    assert outputs[0].shape == (0, 10)
    grads = torch.autograd.grad(outputs, leaves, call.grads)
    passed = dict(zip(call.tensors, grads, strict=True))
    if call.op == "linear_scan":
        assert not passed["s0"].any()
    else:
        assert torch.equal(outputs[1], call.tensors["h0"])
        assert torch.equal(passed["h0"], call.grads[1])
    assert not any(g.any() for name, g in passed.items() if name not in INITIAL)


@with_every_op
@on_every_backend
def test_no_units(backend, op):
    """H = 0: empty states, and a bias or weight gradient of no elements."""
    call = empty_call(op, 4, 3, H=0)
    assert [tuple(o.shape) for o in call.run(backend)] == [(4, 3, 0), (2, 3, 0)][: len(call.grads)]
    assert all(r.numel() == 0 or not r.any() for r in call.results(backend).values())


@on_every_backend
def test_no_features(backend):
    """I = 0: the layer runs on its biases alone."""
    call = empty_call("layer-tanh", 4, 3, features=0)
    assert_equal(call.results(backend).values(), call.results("reference").values())


@pytest.mark.parametrize("layout", ["plain", "packed"])
@on_every_backend
def test_many_steps(backend, layout):
    T = 70_000 if backend == "cpu" else 2_000
    u, sizes = torch.full((T, 1), 0.5, dtype=torch.float64), None
    w, s0 = torch.tensor([[0.5]], dtype=torch.float64), torch.zeros(1, 1, 1, dtype=torch.float64)
    sizes = torch.ones(T, dtype=torch.int64) if layout == "packed" else None
    rows = u if layout == "packed" else u.unsqueeze(1)
    leaf = rows.clone().requires_grad_()
    s = functional.linear_scan(leaf, torch.ones_like(rows), [w], s0, sizes, backend=backend)
    assert s.flatten()[:3].tolist() == [0.5, 0.75, 0.875] and s.flatten()[-1] == 1
    h, h_n = functional.rnn_scan(leaf, [w], s0, sizes, nonlinearity="identity", backend=backend)
    assert torch.equal(h, s) and h_n.item() == 1
    (grad,) = torch.autograd.grad(h_n.sum(), leaf)
    assert grad.flatten()[-3:].tolist() == [0.25, 0.5, 1] and grad.flatten()[0] == 0


@on_every_backend
def test_many_rows(backend):
    """More rows than threads, tiles or a cache hold, and lengths that fall by one each step."""
    batch, hidden = 300, 3
    sizes = torch.arange(batch, 0, -1)
    x = torch.randn(int(sizes.sum()), hidden, dtype=torch.float64)
    h0 = torch.randn(1, batch, hidden, dtype=torch.float64)
    w = [torch.randn(hidden, hidden, dtype=torch.float64) / 3]
    for reverse in ([False], [True]):
        got = functional.rnn_scan(x, w, h0, sizes, reverse, backend=backend)
        assert_equal(got, reference.rnn_scan(x, h0, w, sizes, reverse, "tanh"))


# ---- numbers ----


def same(a, b):
    """Equal, NaN for NaN."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@in_every_dtype
@pytest.mark.parametrize("nonlinearity", ACTIVATIONS)
@on_every_backend
def test_nan_and_inf_pass_as_in_the_reference(backend, nonlinearity, dtype):
    """One unit's special input in one sequence: nobody else's is touched; its own goes on."""
    x = torch.zeros(3, 9, 2 * 5, dtype=dtype)
    special = [NAN, INF, -INF, 300.0, -300.0, 1e-3, -1e-3, 0.0, -0.0]
    x[1, :, 2] = torch.tensor(special)
    weight = [torch.eye(5, dtype=dtype) / 2 + 0.125, torch.eye(5, dtype=dtype) / 4]
    results = []
    for run in (backend, "reference"):
        h, h_n = functional.rnn_scan(
            x, weight, reverse=[False, True], nonlinearity=nonlinearity, backend=run
        )
        results.append([h, h_n])
    for got, right in zip(*results, strict=True):
        assert torch.equal(got.isnan(), right.isnan())
        assert torch.equal(got.isinf(), right.isinf())
        torch.testing.assert_close(got, right, equal_nan=True)


@pytest.mark.parametrize("special", [NAN, INF, -INF])
@pytest.mark.parametrize("place", ["weight_hh.0", "h0", "bias_ih.0", "weight_ih.0"])
@on_every_backend
def test_special_parameters(backend, place, special):
    """0 * inf is NaN: without h0, the first step's product with a zero state counts too."""
    call = make_inputs("layer-tanh", "plain", Shape(3, 2, 5, 3))
    call.tensors[place].view(-1)[1] = special
    for case in (call, call.without("h0")):
        got, right = case.run(backend), case.run("reference")
        assert all(same(a.sign(), b.sign()) for a, b in zip(got, right, strict=True))


@pytest.mark.parametrize("special", [NAN, INF])
@on_every_backend
def test_special_gains(backend, special):
    call = make_inputs("linear", "2groups", Shape(4, 3, 5, 1))
    call.tensors["gain"][1, 2, 3] = special
    call.tensors["u"][2, 0, 7] = special
    got, right = call.run(backend), call.run("reference")
    assert all(same(a.isnan(), b.isnan()) for a, b in zip(got, right, strict=True))
    assert torch.equal(got[0].isinf(), right[0].isinf())


@on_every_backend
def test_gradient_of_relu_passes_a_nan(backend):
    x = torch.tensor([NAN, -1.0, 0.0, 2.0]).view(1, 4, 1).requires_grad_()
    h, _ = functional.rnn_scan(x, [torch.zeros(1, 1)], nonlinearity="relu", backend=backend)
    assert h.isnan().flatten().tolist() == [True, False, False, False]
    (grad,) = torch.autograd.grad(h, x, torch.ones_like(h))
    assert grad.flatten().tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize("bad", [NAN, INF])
@on_every_backend
def test_special_gradients_stay_in_their_row(backend, bad):
    call = make_inputs("layer-tanh", "packed-2groups", Shape(5, 4, 9, 3))
    call.grads[0][4, 3] = bad
    got, right = call.results(backend), call.results("reference")
    for name, expected in right.items():
        assert torch.equal(got[name].isfinite(), expected.isfinite()), name


def bits(results):
    return [r.detach().contiguous().view(-1).view(torch.uint8) for r in results]


@in_every_dtype
@in_every_layout
@pytest.mark.parametrize("op", ["scan-tanh", "layer-tanh", "linear"])
@needs_library
def test_the_same_bits(op, layout, dtype):
    """The same bits twice, and with any number of threads."""
    torch.set_num_threads(1)
    call = make_inputs(op, layout, Shape(9, 37, 70, 5), dtype)
    first = call.results("cpu")
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        again = call.results("cpu")
        for name, a, b in zip(first, bits(first.values()), bits(again.values()), strict=True):
            assert torch.equal(a, b), f"{name} differs with {threads} threads"


@pytest.mark.parametrize("op", ["scan-tanh", "scan-relu", "layer-tanh", "linear"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("batch", [1, 2, 7])
@needs_library
def test_the_same_bits_of_groups_side_by_side(batch, packed, op):
    """Of small matrices in float32: all groups with one thread, with two, and each alone."""
    reverse = (False, True, True, False, False, True, False, True, False)
    for H in (1, 7, 16, 17, 32, 33, 50, 64):
        call = make_inputs(op, Layout(packed, reverse), Shape(6, batch, H, 3), torch.float32)
        torch.set_num_threads(1)
        right = call.results("cpu")
        assert_results(right, call.to(torch.float64).results("reference"), call)
        torch.set_num_threads(2)
        again = call.results("cpu")
        for name, a, b in zip(right, bits(right.values()), bits(again.values()), strict=True):
            if op != "linear" or name == "out":  # else torch's own products
                assert torch.equal(a, b), f"{name} differs with 2 threads, H {H}"
        for g, flag in enumerate(reverse):
            columns, group = (..., slice(g * H, (g + 1) * H)), slice(g, g + 1)
            cut = {"x": ...} | dict.fromkeys(("x_proj", "u", "gain", "out"), columns)
            cut |= dict.fromkeys(("h0", "s0", "h_n"), group)
            tensors = {
                name: t[cut[name]] if name in cut else t
                for name, t in call.tensors.items()
                if name in cut or name.endswith(f".{g}")
            }
            grads = tuple(grad[at] for grad, at in zip(call.grads, (columns, group), strict=False))
            alone = replace(call, reverse=[flag], tensors=tensors, grads=grads).results("cpu")
            alone.pop("grad x", None)  # all groups' sum
            for name, got in alone.items():
                if op == "linear" and name != "out":
                    continue  # torch's own products
                part = right[name][cut.get(name.removeprefix("grad "), ...)]
                assert torch.equal(*bits([part, got])), f"{name} of group {g} differs, H {H}"


@in_every_layout
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@needs_library
def test_a_groups_thread_makes_its_input_product(layout, dtype):
    """Of two threads each, in rows of its own; one thread in the columns of the output."""
    call = make_inputs("layer-tanh", layout, Shape(50, 7, 70, 90), dtype)
    torch.set_num_threads(1)
    first = call.results("cpu")
    torch.set_num_threads(2)
    again = call.results("cpu")
    if dtype in (torch.bfloat16, torch.float16):  # whose products may be torch's own
        right = call.to(torch.float64).results("reference")
        assert_results(first, right, call)
        assert_results(again, right, call)
        return
    for name, a, b in zip(first, bits(first.values()), bits(again.values()), strict=True):
        assert torch.equal(a, b), f"{name} differs with 2 threads"
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    assert_equal(first.values(), call.results("reference").values(), tolerance=tolerance)


@needs_library
def test_a_large_weight_is_packed_by_several_threads():
    call = make_inputs("scan-tanh", "2groups", Shape(2, 3, 513, 1))
    torch.set_num_threads(1)
    first = call.results("cpu")
    torch.set_num_threads(3)
    assert_equal(call.results("cpu").values(), first.values(), tolerance=1e-14)
    right = call.results("reference")
    assert_equal(first.values(), right.values(), tolerance=1e-12)


@needs_library
def test_calls_from_several_threads_at_once():
    from concurrent.futures import ThreadPoolExecutor

    calls = [make_inputs("layer-tanh", "packed-2groups", shape) for shape in SHAPES] * 4
    alone = [call.results("cpu") for call in calls]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda call: call.results("cpu"), calls))
    for a, b in zip(alone, together, strict=True):
        assert_equal(a.values(), b.values(), tolerance=1e-14)


@needs_library
def test_backward_ops_are_checked_too():
    """rnn_scan_backward, as anyone may call it through torch.ops."""
    h, w = torch.randn(3, 2, 4), torch.randn(4, 4)
    sizes = batch_sizes_of(3, 2)
    backward = torch.ops.rnnkern.rnn_scan_backward
    for arguments in [
        (torch.randn(3, 2, 5), None, h, None, [w], None),
        (None, torch.randn(1, 3, 4), h, None, [w], None),
        (None, torch.randn(2, 2, 4), h, None, [w], None),
        (h, None, h, torch.randn(1, 5, 4), [w], None),
        (h, None, h, None, [w, w], None),
        (h, None, h, None, [w], sizes),
        (None, torch.randn(1, 3, 4), h.reshape(6, 4), None, [w], torch.tensor([2, 2, 2])),
        (h.reshape(6, 4), None, h.reshape(6, 4), None, [w], torch.tensor([2, 2, 3])),
    ]:
        with pytest.raises((ValueError, TypeError), match="expected"):
            backward(*arguments, [False] * len(arguments[4]), "tanh", [True] * 2)
    with pytest.raises(TypeError, match="expected grad_h"):
        backward(h.double(), None, h, None, [w], None, [False], "tanh", [True] * 2)
    with pytest.raises(ValueError, match="nonlinearity must be one of"):
        backward(h, None, h, None, [w], None, [False], "gelu", [True] * 2)
    v, grad_h0, grad_w = backward(None, None, h, None, [w], None, [False], "tanh", [True] * 2)
    assert not v.any() and grad_h0.numel() == 0 and not grad_w[0].any()
    h0 = torch.randn(1, 2, 4)
    all_three = backward(h, None, h, h0, [w], None, [False], "tanh", [True] * 2)
    v, grad_h0, grad_w = backward(h, None, h, h0, [w], None, [False], "tanh", [False] * 2)
    assert torch.equal(v, all_three[0]) and all_three[1].shape == h0.shape
    assert grad_h0.numel() == 0 and grad_w == []


# ---- one step, whose matrices are not packed before ----


@needs_library
@pytest.mark.parametrize("initial", [True, False], ids=["h0", "no h0"])
@pytest.mark.parametrize("features", [3, 20])
@pytest.mark.parametrize("batch, hidden", [(1, 66), (1, 300), (4, 257), (5, 300), (40, 130)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_step(dtype, batch, hidden, features, initial):
    call = make_inputs("layer-tanh", "2groups", Shape(1, batch, hidden, features), dtype)
    call = call if initial else call.without("h0")
    right = call.to(torch.float64).results("reference")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert_results(call.results("cpu"), right, call)
        with torch.no_grad():  # with frozen weights, again and again
            for _ in range(3):
                out, h_n = call.run("cpu")
                assert_equal([out.double(), h_n.double()], [right["out"], right["h_n"]], 0.02)


@needs_library
@pytest.mark.parametrize("special", [NAN, INF])
@pytest.mark.parametrize("name", ["h0", "weight_hh.0", "weight_hh.1", "x"])
@pytest.mark.parametrize("initial", [True, False], ids=["h0", "no h0"])
def test_one_step_of_special_numbers(name, special, initial):
    call = make_inputs("layer-tanh", "2groups", Shape(1, 3, 260, 20))
    call = call if initial or name == "h0" else call.without("h0")
    call.tensors[name].view(-1)[7] = special
    got, right = call.results("cpu"), call.results("reference")
    for key, expected in right.items():
        assert torch.equal(got[key].isfinite(), expected.isfinite()), key


# ---- every instruction set ----


@needs_library
@pytest.mark.processes
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512", "avx512_bf16", "amx"])
def test_every_instruction_set(capability):
    """The table again, and the precision tests, on the kernels for another instruction set."""
    here = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        + ["-W", "ignore", "test_scans.py", "test_precision.py", "test_quantized.py"]
        + [
            "-m",
            "not processes",
            "-k",
            "precision or same_bits or nan or special or quantized"
            " or (table and cpu and (T7B7 or T3B13))",
        ],
        cwd=here,
        env=os.environ
        | {"RNNKERN_CPU_CAPABILITY": capability}
        | {"PYTHONPATH": os.pathsep.join([str(here.parent), *sys.path])},
        capture_output=True,
        text=True,
    )
    if run.returncode == NO_SUCH_CPU:
        pytest.skip((run.stdout + run.stderr).strip().splitlines()[-1])
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
