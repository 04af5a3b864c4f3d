"""Derivatives of every order and mode, and everything that torch builds on them."""

import contextlib
import copy
import functools
import warnings
from dataclasses import replace

import pytest
import torch
from cases import (
    ACTIVATIONS,
    BACKENDS,
    LAYOUTS,
    OPS,
    SMALL,
    TOLERANCES,
    Shape,
    assert_equal,
    assert_results,
    batch_sizes_of,
    make_inputs,
    needs_library,
    relative_error,
)
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import rnnkern

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
of_every_kind = pytest.mark.parametrize("op", ["scan-tanh", "layer-tanh", "linear"])
TINY = Shape(3, 2, 2, 1)


def flat_function(call, backend):
    """The call as a function of its tensors."""
    return lambda *tensors: call.run(backend, *tensors)


def loss(outputs):
    """A scalar whose derivative depends on the outputs."""
    return sum((o * o * (0.5 + i) + o).sum() for i, o in enumerate(outputs))


# ---- gradcheck ----

# Every op in a plain, a packed and a two-group layout; every layout of tanh; every activation.
CHECKED = [(op, layout) for op in ("scan-tanh", "layer-tanh", "linear") for layout in LAYOUTS]
CHECKED += [
    (f"{op}-{f}", layout)
    for op, layout in (("scan", "packed-2groups"), ("layer", "2groups"))
    for f in ACTIVATIONS
    if f != "tanh"
]


@pytest.mark.parametrize("op, layout", CHECKED)
@on_every_backend
def test_gradcheck(backend, op, layout):
    """First order, in reverse and in forward mode, against finite differences."""
    call = make_inputs(op, layout, SMALL)
    cases = [call]
    if not LAYOUTS[layout].packed:
        cases.append(call.without("h0", "s0", "bias_ih", "bias_hh"))
    for case in cases:
        assert torch.autograd.gradcheck(
            flat_function(case, backend), case.leaves(), check_forward_ad=True, fast_mode=True
        )


@pytest.mark.parametrize("op, layout", CHECKED)
@on_every_backend
def test_gradgradcheck(backend, op, layout):
    """Second order: reverse over reverse and forward over reverse."""
    call = make_inputs(op, layout, TINY)
    assert torch.autograd.gradgradcheck(
        flat_function(call, backend),
        call.leaves(),
        check_fwd_over_rev=True,
        fast_mode=True,
        gen_non_contig_grad_outputs=True,
    )


@of_every_kind
@on_every_backend
def test_slow_gradcheck(backend, op):
    """Every entry of the Jacobians, once, where fast mode compares a random projection."""
    call = make_inputs(op, "packed-2groups", TINY)
    function = flat_function(call, backend)
    assert torch.autograd.gradcheck(function, call.leaves(), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, call.leaves(), check_fwd_over_rev=True)


@of_every_kind
@on_every_backend
def test_third_order(backend, op):
    call = make_inputs(op, "2groups", TINY)
    leaves = call.leaves()
    at = list(call.tensors).index("weight.0" if op == "linear" else "weight_hh.0")

    def gradient(*tensors):
        out = loss(call.run(backend, *tensors))
        return torch.autograd.grad(out, tensors[at], create_graph=True)

    assert torch.autograd.gradgradcheck(gradient, leaves, fast_mode=True)


@of_every_kind
@pytest.mark.parametrize("layout", ["plain", "packed-2groups"])
@on_every_backend
def test_second_order_is_the_references(backend, op, layout):
    """By value, not by finite differences: a Hessian-vector product in two ways."""
    call = make_inputs(op, layout, Shape(5, 4, 7, 3))
    results = []
    vectors = [torch.randn_like(t) for t in call.tensors.values()]
    for name in (backend, "reference"):
        leaves = call.leaves()
        grads = torch.autograd.grad(loss(call.run(name, *leaves)), leaves, create_graph=True)
        dot = sum((g * v).sum() for g, v in zip(grads, vectors, strict=True))
        results.append([*grads, *torch.autograd.grad(dot, leaves)])
    assert_equal(*results)


# ---- torch.func ----


@of_every_kind
@pytest.mark.parametrize("layout", ["plain", "packed-2groups"])
@on_every_backend
def test_torch_func(backend, op, layout):
    """grad, vjp, jvp, linearize's two orders of nesting, against the reference."""
    call = make_inputs(op, layout, Shape(4, 3, 5, 2))
    tensors = tuple(call.tensors.values())
    tangents = tuple(torch.randn_like(t) for t in tensors)
    every = tuple(range(len(tensors)))
    results = []
    for name in (backend, "reference"):
        function = flat_function(call, name)
        scalar = lambda *t, f=function: loss(f(*t))  # noqa: E731
        gradient = torch.func.grad(scalar, argnums=every)
        outputs, d_outputs = torch.func.jvp(function, tensors, tangents)
        _, pull_back = torch.func.vjp(function, *tensors)
        _, forward_over_reverse = torch.func.jvp(gradient, tensors, tangents)
        directional = lambda *t, f=scalar: torch.func.jvp(f, t, tangents)[1]  # noqa: E731
        reverse_over_forward = torch.func.grad(directional, argnums=every)(*tensors)
        results.append(
            [*outputs, *d_outputs, *gradient(*tensors), *pull_back(call.grads)]
            + [*forward_over_reverse, *reverse_over_forward]
        )
    assert_equal(*results)


@of_every_kind
@on_every_backend
def test_hessian_vector_products_of_autograd_functional(backend, op):
    call = make_inputs(op, "plain", Shape(3, 2, 3, 2))
    tensors = tuple(call.tensors.values())
    vectors = tuple(torch.randn_like(t) for t in tensors)
    products = []
    for name in (backend, "reference"):
        scalar = lambda *t, n=name: loss(call.run(n, *t))  # noqa: E731
        _, hvp = torch.autograd.functional.hvp(scalar, tensors, vectors)
        _, vhp = torch.autograd.functional.vhp(scalar, tensors, vectors)
        hessian = torch.autograd.functional.hessian(
            lambda w, s=scalar: s(*tensors[:-1], w), tensors[-1]
        )
        products.append([*hvp, *vhp, hessian])
    assert_equal(*products)


@of_every_kind
@on_every_backend
def test_a_single_tangent(backend, op):
    """Forward mode with a tangent on one input alone, the others plain or requiring gradients."""
    call = make_inputs(op, "packed-2groups", Shape(4, 3, 5, 2))
    tensors = tuple(call.tensors.values())
    for at, name in enumerate(call.tensors):
        tangent, results = torch.randn_like(tensors[at]), []
        for run in (backend, "reference"):
            one = lambda t, n=run, i=at: call.run(n, *tensors[:i], t, *tensors[i + 1 :])  # noqa: E731
            results.append(torch.func.jvp(one, (tensors[at],), (tangent,))[1])
        for a, b in zip(*results, strict=True):
            assert relative_error(a, b) <= 1e-12, name


# ---- the graph ----


@of_every_kind
@on_every_backend
def test_each_input_alone_may_require_gradients(backend, op):
    call = make_inputs(op, "2groups", Shape(4, 3, 5, 2))
    right = call.results("reference")
    for at, name in enumerate(call.tensors):
        tensors = [t.clone() for t in call.tensors.values()]
        tensors[at].requires_grad_()
        outputs = call.run(backend, *tensors)
        (grad,) = torch.autograd.grad(outputs, tensors[at], call.grads)
        assert relative_error(grad, right[f"grad {name}"]) <= 1e-12, name
    assert not any(o.requires_grad for o in call.run(backend))
    with torch.no_grad():
        assert not any(o.requires_grad for o in call.run(backend, *call.leaves()))
    with torch.inference_mode():
        assert_equal(call.run(backend, *call.leaves()), list(right.values())[: len(call.grads)])


@pytest.mark.parametrize("layout", ["plain", "packed-2groups"])
@pytest.mark.parametrize("used", [0, 1], ids=["only h", "only h_n"])
@pytest.mark.parametrize("op", ["scan-tanh", "layer-relu"])
@on_every_backend
def test_one_output_may_be_unused(backend, op, used, layout):
    call = make_inputs(op, layout, Shape(5, 4, 3, 2))
    results = []
    for name in (backend, "reference"):
        leaves = call.leaves()
        output = call.run(name, *leaves)[used]
        first = torch.autograd.grad(output, leaves, call.grads[used], create_graph=True)
        second = torch.autograd.grad(loss(first), leaves)
        results.append([*first, *second])
    assert_equal(*results)


@needs_library
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("size", [3, 70, 256])
@pytest.mark.parametrize("layout", ["plain", "packed", "2groups"])
def test_a_gradient_of_x_in_the_place_of_the_scans(layout, size, dtype):
    """Of many rows of H features; who sent a gradient keeps it. Ones come in expanded."""
    call = make_inputs("layer-tanh", layout, Shape(67, 9, size, size), dtype)
    sent = [g.clone() for g in call.grads]
    ones = replace(call, grads=[torch.ones((), dtype=dtype).expand_as(g) for g in call.grads])
    for one in (call, ones):
        assert_results(one.results("cpu"), one.to(torch.float64).results("reference"), one)
    assert all(map(torch.equal, call.grads, sent))


@of_every_kind
@on_every_backend
def test_retained_graphs_and_second_backwards(backend, op):
    call = make_inputs(op, "plain", Shape(4, 3, 5, 2))
    leaves = call.leaves()
    outputs = call.run(backend, *leaves)
    first = torch.autograd.grad(outputs, leaves, call.grads, retain_graph=True)
    second = torch.autograd.grad(outputs, leaves, call.grads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(outputs, leaves, call.grads)


@of_every_kind
@on_every_backend
def test_accumulated_gradients_are_separate(backend, op):
    """Each parameter's .grad is its own memory: changing one in place leaves the others alone."""
    call = make_inputs(op, "2groups", Shape(4, 3, 5, 2))
    leaves = call.leaves()
    for times in (1, 2):
        torch.autograd.backward(call.run(backend, *leaves), call.grads)
        right = list(call.results("reference").values())[len(call.grads) :]
        assert_equal([leaf.grad for leaf in leaves], [times * r for r in right])
    for i, leaf in enumerate(leaves):
        before = [other.grad.clone() for other in leaves]
        leaf.grad.fill_(7.0)
        changed = [not torch.equal(o.grad, b) for o, b in zip(leaves, before, strict=True)]
        assert changed == [j == i for j in range(len(leaves))]


@of_every_kind
@on_every_backend
def test_one_tensor_in_two_places(backend, op):
    """The same weight for both groups, and a loss on it besides: the gradients add up."""
    call = make_inputs(op, "2groups", Shape(4, 3, 5, 2))
    grads = []
    for name in (backend, "reference"):
        leaves = dict(zip(call.tensors, call.leaves(), strict=True))
        weight = "weight" if op == "linear" else "weight_hh"
        leaves[f"{weight}.1"] = leaves[f"{weight}.0"]
        out = loss(call.run(name, *leaves.values())) + leaves[f"{weight}.0"].sum()
        grads.append(torch.autograd.grad(out, list(leaves.values())))
    assert_equal(*grads)


@of_every_kind
@on_every_backend
def test_changing_a_saved_tensor_is_detected(backend, op):
    call = make_inputs(op, "2groups", Shape(4, 3, 5, 2))
    saved = {"scan-tanh": ["h0", "weight_hh.0", "weight_hh.1", "output"]}
    saved["layer-tanh"] = ["x", "weight_ih.1", *saved["scan-tanh"]]
    if backend == "cpu":  # which makes a layer's output once more: see the next test
        saved["layer-tanh"].remove("output")
    saved["linear"] = ["gain", "s0", "weight.0", "weight.1", "output"]
    for name in saved[op]:
        leaves = dict(zip(call.tensors, call.leaves(), strict=True))
        outputs = call.run(backend, *leaves.values())
        with torch.no_grad():
            (outputs[0] if name == "output" else leaves[name]).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(outputs, list(leaves.values()), call.grads)


@needs_library
@pytest.mark.parametrize("hook", [False, True], ids=["plain", "saved-tensor hooks"])
@pytest.mark.parametrize(
    "layout, without",
    [("plain", ()), ("plain", ("h0", "bias_ih", "bias_hh")), ("packed-2groups", ())],
    ids=["plain", "plain without h0 and bias", "packed-2groups"],
)
def test_a_layers_output_may_be_changed_in_place(layout, without, hook):
    """As torch.nn.RNN's on the CPU: `out.relu_()` right behind the layer, twice differentiated."""
    call = make_inputs("layer-tanh", layout, Shape(4, 3, 5, 2)).without(*without)
    results = []
    for backend in ("cpu", "reference"):
        leaves = call.leaves()
        with torch.autograd.graph.saved_tensors_hooks(
            *((torch.clone, torch.clone) if hook else (lambda t: t, lambda t: t))
        ):
            out, h_n = call.run(backend, *leaves)
        out.sub_(0.2).relu_()
        first = torch.autograd.grad(loss((out, h_n)), leaves, create_graph=True)
        results.append([out, *first, *torch.autograd.grad(loss(first), leaves)])
    assert_equal(*results)


@needs_library
def test_a_changed_output_and_a_backward_under_autocast():
    """What is made once more is made as it was, not in the lower precision of now."""
    call = make_inputs("layer-tanh", "plain", Shape(4, 3, 5, 2)).to(torch.float32)
    results = []
    for context in (contextlib.nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        leaves = call.leaves()
        out, h_n = call.run("cpu", *leaves)
        total = out.relu_().sum() + h_n.sum()
        with context:
            results.append(torch.autograd.grad(total, leaves))
    assert_equal(*results)


@of_every_kind
@on_every_backend
def test_outputs_may_be_changed_in_place(backend, op):
    """As torch.nn.RNN's: h_n, which no derivative needs, also before backward; all after it."""
    call = make_inputs(op, "2groups", Shape(4, 3, 5, 2))
    leaves = call.leaves()
    outputs = [o.clone() if i == 0 else o for i, o in enumerate(call.run(backend, *leaves))]
    outputs[-1].mul_(3)
    results = [torch.autograd.grad(outputs, leaves, call.grads)]
    leaves = call.leaves()
    outputs = list(call.run("reference", *leaves))
    outputs[-1] = outputs[-1] * 3
    results.append(torch.autograd.grad(outputs, leaves, call.grads))
    assert_equal(*results)
    for output in call.run(backend, *call.leaves()):
        output.add_(1)  # nobody differentiates it any more
    for output in call.run(backend):
        output.add_(1)


@of_every_kind
@on_every_backend
def test_saved_tensor_hooks(backend, op):
    """Everything that is saved goes through the hooks, and comes back from them."""
    call = make_inputs(op, "2groups", Shape(4, 3, 5, 2))
    packed = []

    def pack(t):
        packed.append(tuple(t.shape))
        return t.detach().to(torch.float64).numpy().copy()

    leaves = call.leaves()
    with torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy):
        outputs = call.run(backend, *leaves)
    grads = torch.autograd.grad(outputs, leaves, call.grads)
    assert tuple(outputs[0].shape) in packed
    assert_equal([*outputs, *grads], call.results("reference").values())


@needs_library
def test_a_layer_saves_its_output_and_inputs_only():
    """Nothing of the size of the sequence but x, h and what torch.nn.RNN would hold anyway."""
    call = make_inputs("layer-tanh", "2groups", Shape(6, 5, 8, 3))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        outputs = call.run("cpu", *call.leaves())
    large = [tuple(t.shape) for t in saved if t.numel() >= 6 * 5 * 3]
    assert sorted(large) == [(6, 5, 3), tuple(outputs[0].shape)]


@of_every_kind
@on_every_backend
def test_tensor_and_module_hooks(backend, op):
    call = make_inputs(op, "plain", Shape(4, 3, 5, 2))
    leaves = call.leaves()
    seen = []
    leaves[0].register_hook(lambda g: seen.append("leaf") or 2 * g)
    outputs = call.run(backend, *leaves)
    outputs[0].register_hook(lambda g: seen.append("output") or g)
    outputs[0].grad_fn.register_hook(lambda into, out: seen.append("node"))
    torch.autograd.backward(outputs, call.grads)
    assert seen == ["output", "node", "leaf"]
    first = next(n for n in call.tensors)
    assert_equal([leaves[0].grad], [2 * call.results("reference")[f"grad {first}"]])


@on_every_backend
def test_backward_through_two_scans_in_threads(backend):
    """One graph differentiated from several threads at once."""
    from concurrent.futures import ThreadPoolExecutor

    call = make_inputs("layer-tanh", "2groups", Shape(5, 4, 6, 3))
    leaves = call.leaves()
    outputs = call.run(backend, *leaves)
    grad = lambda _: torch.autograd.grad(outputs, leaves, call.grads, retain_graph=True)  # noqa: E731
    right = grad(0)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(grad, range(16)):
            assert all(torch.equal(a, b) for a, b in zip(got, right, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
@on_every_backend
def test_checkpoint(backend, reentrant):
    rnn = rnnkern.RNN(3, 5, num_layers=2, dtype=torch.float64, backend=backend)
    x = torch.randn(6, 4, 3, dtype=torch.float64, requires_grad=True)
    wanted = [x, *rnn.parameters()]
    right = torch.autograd.grad(loss(rnn(x)), wanted)
    loss(checkpoint(rnn, x, use_reentrant=reentrant)).backward()
    assert_equal([w.grad for w in wanted], right)


# ---- autocast ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@on_every_backend
def test_autocast_is_torch_nn_rnns(backend, dtype):
    """torch.nn.RNN's output dtypes; float32 gradients within the half type's tolerance."""
    ours = rnnkern.RNN(3, 5, num_layers=2, bidirectional=True, backend=backend)
    stock = torch.nn.RNN(3, 5, num_layers=2, bidirectional=True)
    stock.load_state_dict(ours.state_dict())
    exact = copy.deepcopy(stock).double()
    x, hx = torch.randn(6, 4, 3), torch.randn(4, 4, 5)
    results = {}
    for name, rnn in (("ours", ours), ("stock", stock)):
        with torch.autocast("cpu", dtype=dtype):
            out, h_n = rnn(x, hx)
        grads = torch.autograd.grad(loss((out.float(), h_n.float())), list(rnn.parameters()))
        results[name] = [out, h_n, *grads]
    right = [*exact(x.double(), hx.double())]
    right += torch.autograd.grad(loss(right), list(exact.parameters()))
    for a, b, r in zip(results["ours"], results["stock"], right, strict=True):
        assert a.dtype == b.dtype
        allowed = TOLERANCES[dtype].allowed(relative_error(b, r))
        assert relative_error(a, r) <= allowed
    with torch.autocast("cpu", dtype=dtype):
        cell = rnnkern.RNNCell(3, 5, backend=backend)
        assert cell(x[0]).dtype == torch.nn.RNNCell(3, 5)(x[0]).dtype


# ---- without data, and through the compiler ----


@needs_library
@pytest.mark.parametrize("layout", ["plain", "packed-2groups"])
@pytest.mark.parametrize("op", OPS)
def test_shapes_on_the_meta_device_and_fake(op, layout):
    from torch._subclasses import FakeTensorMode

    call = make_inputs(op, layout, Shape(4, 3, 5, 2)).to(torch.float16)
    right = call.results("cpu")

    def described(results):
        return [(tuple(r.shape), r.dtype, r.stride()) for r in results]

    def run(tensors, grads):
        outputs = call.run("cpu", *tensors)
        return [*outputs, *torch.autograd.grad(outputs, tensors, grads)]

    leaves = [t.detach().to("meta").requires_grad_() for t in call.tensors.values()]
    on_meta = run(leaves, [g.to("meta") for g in call.grads])
    assert all(r.device.type == "meta" for r in on_meta)
    assert described(on_meta) == described(right.values())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        leaves = [mode.from_tensor(t.detach()).requires_grad_() for t in call.tensors.values()]
        fake = run(leaves, [mode.from_tensor(g) for g in call.grads])
    assert all(r.device.type == "cpu" for r in fake)
    assert described(fake) == described(right.values())


@needs_library
@pytest.mark.compiles
@pytest.mark.parametrize("layout", ["plain", "packed-2groups"])
@of_every_kind
def test_opcheck(op, layout):
    """Schema, autograd registration, fake tensors and AOTAutograd with symbolic shapes."""
    for dtype in (torch.float32, torch.bfloat16):
        call = make_inputs(op, layout, Shape(4, 3, 5, 2)).to(dtype)
        leaves = dict(zip(call.tensors, call.leaves(), strict=True))
        arguments = call.arguments(leaves)
        schema = getattr(torch.ops.rnnkern, call.op).default._schema.arguments
        ordered = [arguments.get(a.name) for a in schema]
        torch.library.opcheck(getattr(torch.ops.rnnkern, call.op).default, ordered)


@needs_library
@pytest.mark.compiles
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True}], ids=["1", "2x2"]
)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_compile(options, packed):
    """fullgraph, forward and backward: equal to eager, also at other shapes."""
    torch._dynamo.reset()
    rnn = rnnkern.RNN(3, 5, dtype=torch.float64, **options)
    compiled = torch.compile(rnn, fullgraph=True, backend="aot_eager")
    for steps, batch in ((4, 3), (6, 2), (5, 4)):
        x = torch.randn(steps, batch, 3, dtype=torch.float64, requires_grad=True)
        lengths = torch.arange(batch, 0, -1) + steps - batch
        results = []
        for module in (compiled, rnn):
            out, h_n = module(pack_padded_sequence(x, lengths) if packed else x)
            out = out.data if packed else out
            grads = torch.autograd.grad(loss((out, h_n)), [x, *rnn.parameters()])
            results.append([out, h_n, *grads])
        assert_equal(*results)


@needs_library
@pytest.mark.compiles
def test_compile_of_cells_losses_and_autocast():
    torch._dynamo.reset()
    cell, x = rnnkern.RNNCell(3, 5), torch.randn(4, 3)
    assert_equal(
        [torch.compile(cell, fullgraph=True, backend="aot_eager")(x)], [cell(x)], tolerance=1e-6
    )
    rnn, x = rnnkern.RNN(3, 5), torch.randn(6, 4, 3)

    def step(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss(rnn(x))

    results = []
    for run in (torch.compile(step, fullgraph=True, backend="aot_eager"), step):
        value = run(x)
        results.append([value, *torch.autograd.grad(value, list(rnn.parameters()))])
    assert_equal(*results, tolerance=1e-6)


@needs_library
@pytest.mark.compiles
def test_compile_of_torch_func_grad():
    torch._dynamo.reset()
    call = make_inputs("layer-tanh", "plain", Shape(4, 3, 5, 2))
    tensors = tuple(call.tensors.values())
    gradient = torch.func.grad(lambda *t: loss(call.run("cpu", *t)), argnums=(0, 3))
    compiled = torch.compile(lambda *t: gradient(*t), backend="aot_eager", fullgraph=True)
    assert_equal(compiled(*tensors), gradient(*tensors))


@needs_library
@pytest.mark.compiles
@of_every_kind
@pytest.mark.parametrize("layout", ["plain", "packed-2groups"])
def test_compiled_autograd(op, layout):
    """The backward pass itself compiled, of a graph that was made eagerly."""
    torch._dynamo.reset()
    call = make_inputs(op, layout, Shape(4, 3, 5, 2))
    leaves = call.leaves()
    outputs = call.run("cpu", *leaves)
    compiler = torch.compile(backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch._dynamo.compiled_autograd._enable(compiler):
            torch.autograd.backward(outputs, call.grads)
    right = list(call.results("reference").values())[len(call.grads) :]
    assert_equal([leaf.grad for leaf in leaves], right)


@needs_library
@pytest.mark.compiles
def test_compiled_autograd_of_an_output_changed_in_place():
    """The compiled backward of a graph makes the output again, that of its twin does not."""
    torch._dynamo.reset()
    call = make_inputs("layer-tanh", "packed-2groups", Shape(4, 3, 5, 2))
    results = []
    compiler = torch.compile(backend="aot_eager")
    compiled = functools.partial(torch._dynamo.compiled_autograd._enable, compiler)
    for backward in (contextlib.nullcontext, compiled):
        for change in (torch.clone, torch.relu_, torch.clone):
            leaves = call.leaves()
            out, h_n = call.run("cpu", *leaves)
            outputs = change(out), h_n
            with warnings.catch_warnings(), backward():
                warnings.simplefilter("ignore")
                torch.autograd.backward(outputs, call.grads)
            results.append([leaf.grad for leaf in leaves])
    for right, got in zip(results[:3], results[3:], strict=True):
        assert_equal(got, right)
    assert not torch.equal(results[0][0], results[1][0])


@needs_library
@pytest.mark.parametrize("given", [False, True], ids=["no h0", "h0 that needs none"])
def test_no_gradient_of_h0_that_nobody_wants(given):
    """Packed rows always have an h0; the rows that it meets are not looked for."""
    call = make_inputs("layer-tanh", "packed-2groups", Shape(4, 8, 5, 2))
    rnn = rnnkern.RNN(2, 5, bidirectional=True, dtype=torch.float64)
    packed = PackedSequence(call.tensors["x"], batch_sizes_of(4, 8))
    hx = call.tensors["h0"]
    names = []
    for wants in (False, True):
        out = rnn(packed, hx.detach().requires_grad_(wants) if given or wants else None)[0].data
        with torch.profiler.profile() as profile:
            out.sum().backward()
        names.append({event.name for event in profile.events()})
    assert "aten::index_select" not in names[0] and "aten::index_select" in names[1]
