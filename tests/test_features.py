"""What torch.nn.RNN does and what it refuses: each row of README's feature table that is not shown
by another test, run on rnnkern.RNN and, to keep the table honest, on torch.nn.RNN itself.

A feature is a function of the class; it asserts right results, torch.nn.RNN's where it is plain.
Letters: T steps, B batch, I input_size, H hidden_size.
"""

import copy
import io
import os
import pickle
import re
import shutil
import subprocess
import sys
import textwrap
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.multiprocessing as mp
from cases import BACKENDS, assert_equal, needs_library
from torch import nn
from torch.export import Dim
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves, tree_map

import rnnkern

pytestmark = [needs_library, pytest.mark.filterwarnings("ignore")]

T, B, I, H = 4, 2, 3, 5  # noqa: E741
F64 = torch.float64


class Feature(NamedTuple):
    check: callable
    stock: bool | str  # whether torch.nn.RNN on the CPU has it, or how it refuses: a pattern


FEATURES: dict[str, Feature] = {}


def feature(name: str, *, stock: bool | str):
    """Adds a row; its test is test_feature[name]."""

    def add(check):
        assert name not in FEATURES
        FEATURES[name] = Feature(check, stock)
        return check

    return add


@pytest.mark.parametrize("name", FEATURES)
def test_feature(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    FEATURES[name].check(rnnkern.RNN)


@pytest.mark.parametrize("name", FEATURES)
def test_torch_nn_rnn(name, tmp_path, monkeypatch):
    """README's column of torch.nn.RNN on the CPU."""
    monkeypatch.chdir(tmp_path)
    check, stock = FEATURES[name]
    with nullcontext() if stock is True else pytest.raises(Exception, match=stock):
        check(nn.RNN)


# ---- small things ----


def draw(*size):
    return torch.randn(*size, dtype=F64)


def pair(RNN, *sizes, **options):
    """A layer of the class, and torch.nn.RNN with the same weights."""
    rnn, right = (kind(*(sizes or (I, H)), dtype=F64, **options) for kind in (RNN, nn.RNN))
    right.load_state_dict(rnn.state_dict())
    return rnn, right


def loss(outputs):
    """A scalar whose derivative depends on the outputs."""
    return sum((o * o * (0.5 + i) + o).sum() for i, o in enumerate(tree_leaves(outputs)))


def equal(got, right, tolerance=1e-11):
    got, right = ([t for t in tree_leaves(r) if t is not None] for r in (got, right))
    assert_equal(got, right, tolerance)


def stacked(results):
    """The results of separate calls as a vmap gives them."""
    return tree_map(lambda *parts: torch.stack(parts), *results)


def outputs_and_grads(module, *inputs):
    outputs = module(*inputs)
    return [*outputs, *torch.autograd.grad(loss(outputs), list(module.parameters()))]


def members(rnn, count=3):
    """The parameters of several layers, stacked."""
    return {n: torch.stack([p * (1 + k / 4) for k in range(count)]) for n, p in members_of(rnn)}


def members_of(rnn):
    return [(name, p.detach()) for name, p in rnn.named_parameters()]


def one(params, at):
    return {name: p[at] for name, p in params.items()}


# ---- derivatives ----


@feature("derivatives of order 5", stock=True)
def fifth_order(RNN):
    rnn, right = pair(RNN, 1, 2)
    x = draw(3, 1, 1).requires_grad_()
    results = []
    for module in (rnn, right):
        value, derivatives = loss(module(x)), []
        for _ in range(5):
            (value,) = torch.autograd.grad(value.sum(), x, create_graph=True)
            derivatives.append(value)
        results.append(derivatives)
    equal(*results)


@feature("torch.func: jacrev, jacfwd, hessian", stock=True)
def jacobians(RNN):
    rnn, right = pair(RNN)
    x, weight = draw(3, 2, I), rnn.weight_hh_l0.detach()
    for transform in (jacrev, jacfwd):
        equal(*(transform(module)(x) for module in (rnn, right)))
    results = []
    for module in (rnn, right):
        call = lambda w, m=module: loss(functional_call(m, {"weight_hh_l0": w}, (x,)))  # noqa: E731
        results.append([hessian(call)(weight), jacrev(jacrev(call))(weight)])
    equal(*results)


@feature("torch.func.linearize", stock="a leaf Variable that requires grad")
def linearize(RNN):
    rnn, right = pair(RNN)
    x, tangent = draw(T, B, I), draw(T, B, I)
    outputs, push_forward = torch.func.linearize(rnn, x)
    equal((outputs, push_forward(tangent)), jvp(right, (x,), (tangent,)))


@feature("torch.func.jvp of a PackedSequence", stock="Cannot access data pointer")
def jvp_packed(RNN):
    rnn, right = pair(RNN, bidirectional=True)
    packed = pack_padded_sequence(draw(T, B, I), [2, 4], enforce_sorted=False)
    x, tangent = packed.data, torch.randn_like(packed.data)

    def call(module, x):
        out, h_n = module(PackedSequence(x, *packed[1:]))
        return out.data, h_n

    outputs, tangents = jvp(lambda x: call(rnn, x), (x,), (tangent,))
    equal(outputs, call(right, x))
    step = 1e-6  # central differences: torch.nn.RNN has no forward mode here
    ends = [call(right, x + sign * step * tangent) for sign in (1, -1)]
    equal(tangents, [(a - b) / (2 * step) for a, b in zip(*ends, strict=True)], tolerance=1e-7)


@feature("is_grads_batched, vectorised jacobian and hessian", stock=True)
def batched_grads(RNN):
    rnn, right = pair(RNN, bidirectional=True)
    x = draw(3, 2, I)
    results = []
    for module in (rnn, right):
        leaf = x.clone().requires_grad_()
        out = module(leaf)[0]
        generator = torch.Generator().manual_seed(0)
        basis = torch.randn(4, *out.shape, dtype=F64, generator=generator)
        wanted = [leaf, *module.parameters()]
        batched = torch.autograd.grad(out, wanted, basis, is_grads_batched=True)
        functional = torch.autograd.functional
        by = [
            functional.jacobian(lambda x, m=module: m(x), x, vectorize=True, strategy=strategy)
            for strategy in ("reverse-mode", "forward-mode")
        ]
        second = functional.hessian(lambda x, m=module: loss(m(x)), x, vectorize=True)
        results.append([*batched, *by, second])
    equal(*results)


def test_a_vmap_of_nobody():
    """An error, where a division by the number of members would end the process."""
    u, weight = draw(0, 3, 2, 5), draw(5, 5)
    with pytest.raises(ValueError, match="expected at least one member of a vmap"):
        torch._vmap_internals._vmap(lambda u: rnnkern.linear_scan(u, u, [weight]))(u)


def test_vmap_under_autocast():
    rnn, cell = rnnkern.RNN(I, H, 2), rnnkern.RNNCell(I, H)

    def loop(x):
        h = None
        for step in x:
            h = cell(step, h)
        return h

    x = torch.randn(3, T, B, I)
    for call in (lambda x: rnn(x)[0], loop):
        with torch.autocast("cpu", torch.bfloat16):
            equal(torch.vmap(call)(x), stacked([call(e) for e in x]), tolerance=1e-2)


@feature("per-sample gradients by torch's ExpandedWeights", stock=True)
def expanded_weights(RNN):
    from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

    x = torch.randn(B, T, I)
    for options in ({}, {"num_layers": 2, "bidirectional": True, "nonlinearity": "relu"}):
        rnn = RNN(I, H, batch_first=True, **options)
        rnn.weight_hh_l0.requires_grad_("num_layers" in options)  # then no ExpandedWeight
        trained = [p for p in rnn.parameters() if p.requires_grad]
        for inputs in (x, pack_padded_sequence(x, [4, 2], batch_first=True)):
            for p in trained:
                p.grad_sample = None
            out = call_for_per_sample_grads(rnn, batch_size=B)(inputs)[0]
            (out.data if isinstance(out, PackedSequence) else out).square().sum().backward()
            got = [p.grad_sample for p in trained]
            right = []
            for b in range(B):
                steps = T if inputs is x else [4, 2][b]
                single = rnn(x[b : b + 1, :steps])[0].square().sum()
                right.append(torch.autograd.grad(single, trained))
            equal(got, stacked(right), tolerance=1e-5)


# ---- vmap ----


@feature("vmap over data", stock="Batching rule not implemented")
def vmap_data(RNN):
    rnn, right = pair(RNN, num_layers=2, bidirectional=True)
    x, hx = draw(6, T, B, I), draw(6, 4, B, H)
    equal(torch.vmap(rnn)(x), stacked([right(e) for e in x]))
    equal(torch.vmap(rnn, in_dims=(1, 2))(x.transpose(0, 1), hx.permute(1, 2, 0, 3)),
          stacked([right(e, h) for e, h in zip(x, hx, strict=True)]))  # fmt: skip
    unbatched = torch.vmap(rnn, in_dims=(None, 0))(x[0], hx)
    equal(unbatched, stacked([right(x[0], h) for h in hx]))


@feature("vmap over weights", stock="Batching rule not implemented")
def vmap_weights(RNN):
    rnn, right = pair(RNN, num_layers=2, bidirectional=True)
    x, params = draw(T, B, I), members(rnn)
    call = lambda module: lambda p, x: functional_call(module, p, (x,))  # noqa: E731
    equal(
        torch.vmap(call(rnn), in_dims=(0, None))(params, x),
        stacked([call(right)(one(params, k), x) for k in range(3)]),
    )


@feature("vmap over data and weights", stock="Batching rule not implemented")
def vmap_both(RNN):
    rnn, right = pair(RNN, bias=False, batch_first=True)
    x, params = draw(3, B, T, I), members(rnn)
    call = lambda module: lambda p, x: functional_call(module, p, (x,))  # noqa: E731
    equal(
        torch.vmap(call(rnn))(params, x),
        stacked([call(right)(one(params, k), x[k]) for k in range(3)]),
    )


@feature("nested, chunked and packed vmap", stock="Batching rule not implemented")
def vmap_more(RNN):
    rnn, right = pair(RNN)
    x = draw(3, 5, T, B, I)
    nested = torch.vmap(torch.vmap(rnn))(x)
    equal(nested, stacked([stacked([right(e) for e in row]) for row in x]))
    equal(torch.vmap(rnn, chunk_size=2)(x[0]), stacked([right(e) for e in x[0]]))
    sizes = torch.tensor([3, 2, 1])
    data, hx = draw(5, 6, I), draw(5, 1, 3, H)
    equal(torch.vmap(lambda d, h: (rnn(PackedSequence(d, sizes), h)[0].data,))(data, hx),
          stacked([(right(PackedSequence(d, sizes), h)[0].data,)
                   for d, h in zip(data, hx, strict=True)]))  # fmt: skip


@feature("per-sample gradients: vmap of grad", stock="doesn't match the broadcast shape")
def per_sample_gradients(RNN):
    rnn, right = pair(RNN, num_layers=2, bidirectional=True)
    x, params = draw(6, T, 1, I), dict(members_of(rnn))
    call = lambda module: lambda p, x: loss(functional_call(module, p, (x,)))  # noqa: E731
    got = torch.vmap(grad(call(rnn)), in_dims=(None, 0))(params, x)
    equal(got, stacked([grad(call(right))(params, e) for e in x]))
    # And the other way about: the gradient of what vmap made.
    total = lambda p: torch.vmap(call(rnn), in_dims=(None, 0))(p, x).sum()  # noqa: E731
    equal(grad(total)(params), {n: g.sum(0) for n, g in got.items()})


@feature("ensembles: stack_module_state", stock="Batching rule not implemented")
def ensemble(RNN):
    rnns = [RNN(I, H, 2, dtype=F64) for _ in range(8)]
    params, buffers = stack_module_state(rnns)
    base, x = copy.deepcopy(rnns[0]).to("meta"), draw(T, B, I)

    def call(params, buffers, x):
        return functional_call(base, (params, buffers), (x,))

    outputs = torch.vmap(call, in_dims=(0, 0, None))(params, buffers, x)
    grads = torch.autograd.grad(loss(outputs), list(params.values()))
    right = stacked([rnn(x) for rnn in rnns])
    right_grads = [torch.autograd.grad(loss(rnn(x)), list(rnn.parameters())) for rnn in rnns]
    equal([*outputs, *grads], [*right, *stacked(right_grads)])


def test_an_ensemble_is_one_scan():
    """The members are groups: one scan a layer forward, and one backward."""
    rnns = [rnnkern.RNN(I, H, 2) for _ in range(8)]
    params, buffers = stack_module_state(rnns)
    base = copy.deepcopy(rnns[0]).to("meta")
    call = lambda *state: functional_call(base, state[:2], state[2:])[0]  # noqa: E731
    with torch.profiler.profile(record_shapes=True) as profile:
        out = torch.vmap(call, in_dims=(0, 0, None))(params, buffers, torch.randn(T, B, I))
        out.sum().backward()
    for op in ("rnnkern::rnn_scan", "rnnkern::rnn_scan_backward"):
        shapes = [e.input_shapes for e in profile.events() if e.name == op]
        grouped = [s for s in shapes if [T, B, 8 * H] in s]
        assert len(grouped) == 2, shapes


# ---- torch.compile ----


@feature("compile(fullgraph=True), forward and backward", stock="Dynamo does not support RNN")
def compile_fullgraph(RNN):
    torch._dynamo.reset()
    rnn, right = pair(RNN, num_layers=2, bidirectional=True)
    x = draw(T, B, I)
    compiled = torch.compile(rnn, fullgraph=True)
    equal(outputs_and_grads(compiled, x), outputs_and_grads(right, x))


@feature(
    "compile: dynamic T and B without a recompile per length", stock="Dynamo does not support RNN"
)
def compile_dynamic(RNN):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    rnn, right = pair(RNN)
    compiled = torch.compile(rnn, backend=counter, fullgraph=True)
    for steps, batch in ((4, 2), (5, 2), (6, 3), (7, 4), (9, 5), (20, 7), (33, 7)):
        x = draw(steps, batch, I)
        equal(outputs_and_grads(compiled, x), outputs_and_grads(right, x))
    assert counter.frame_count <= 3, counter.frame_count  # static, then dynamic T, then dynamic B
    for steps, batch in ((1, 2), (5, 1), (1, 1)):  # which torch makes special cases of
        x = draw(steps, batch, I)
        equal(compiled(x), right(x))
    assert counter.frame_count <= 6, counter.frame_count


@feature("compile of a PackedSequence", stock="Dynamo does not support RNN")
def compile_packed(RNN):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    rnn, right = pair(RNN, num_layers=2, bidirectional=True)
    compiled = torch.compile(rnn, backend=counter, fullgraph=True)
    for lengths in ([4, 2], [3, 5], [6, 1, 2], [7, 7, 3, 2], [2, 9, 9, 9, 1]):
        x = draw(max(lengths), len(lengths), I)
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        results = []
        for module in (compiled, right):
            out, h_n = module(packed)
            grads = torch.autograd.grad(loss((out.data, h_n)), list(module.parameters()))
            results.append([*pad_packed_sequence(out), h_n, *grads])
        equal(*results)
    assert counter.frame_count <= 4, counter.frame_count


@feature(
    "compile of func.grad, jvp, hessian, vmap(grad), checkpoint",
    stock="Dynamo does not support RNN",
)
def compile_transforms(RNN):
    from torch.utils.checkpoint import checkpoint

    torch._dynamo.reset()
    rnn, right = pair(RNN, 2, 3)
    x, weight = draw(3, 2, 2), rnn.weight_hh_l0.detach()
    many = draw(4, 3, 2, 2)

    def call(module):
        return lambda w, x: loss(functional_call(module, {"weight_hh_l0": w}, (x,)))

    def compiled(function):
        return torch.compile(function, backend="aot_eager", fullgraph=True)

    equal(compiled(grad(call(rnn)))(weight, x), grad(call(right))(weight, x))
    equal(compiled(hessian(call(rnn)))(weight, x), hessian(call(right))(weight, x))
    tangent = lambda f: lambda w, x: jvp(lambda w: f(w, x), (w,), (w,))[1]  # noqa: E731
    equal(compiled(tangent(call(rnn)))(weight, x), tangent(call(right))(weight, x))
    per_sample = torch.vmap(grad(call(rnn)), in_dims=(None, 0))
    equal(compiled(per_sample)(weight, many), stacked([grad(call(right))(weight, e) for e in many]))
    leaf = x.clone().requires_grad_()
    again = compiled(lambda x: checkpoint(rnn, x, use_reentrant=False)[0])(leaf)
    equal(torch.autograd.grad(loss(again), leaf),
          torch.autograd.grad(loss(right(leaf)[0]), leaf))  # fmt: skip


@feature("compiled autograd", stock=True)
def compiled_autograd(RNN):
    torch._dynamo.reset()
    rnn, right = pair(RNN, num_layers=2, bidirectional=True)
    x = draw(T, B, I)
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        loss(rnn(x)).backward()
    assert torch._dynamo.utils.counters["compiled_autograd"]["captures"] == 1
    loss(right(x)).backward()
    equal([p.grad for p in rnn.parameters()], [p.grad for p in right.parameters()])


# ---- torch.export ----

DYNAMIC = ({0: Dim("T", min=2), 1: Dim("B", min=2)},)


@feature("export, strict and not, and the exported module trains", stock=True)
def export(RNN):
    rnn, right = pair(RNN, num_layers=2, bidirectional=True)
    x = draw(T, B, I)
    for strict in (True, False):
        exported = torch.export.export(rnn, (x,), strict=strict).module()
        results = []
        for module in (exported, right):
            by_name = dict(module.named_parameters())
            outputs = module(x)
            grads = torch.autograd.grad(loss(outputs), list(by_name.values()))
            named = dict(zip(by_name, grads, strict=True))
            results.append([*outputs, *(named[name] for name in sorted(named))])
        equal(*results)


@feature("export with dynamic T and B", stock="code specialized it to be a constant")
def export_dynamic(RNN):
    rnn, right = pair(RNN, num_layers=2)
    exported = torch.export.export(rnn, (draw(T, B, I),), dynamic_shapes=DYNAMIC)
    x = draw(9, 6, I)
    equal(exported.module()(x), right(x))
    equal(exported.run_decompositions().module()(x), right(x))


class FromRows(nn.Module):
    """A PackedSequence of its parts: torch.export's dynamic_shapes cannot describe one."""

    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, data, batch_sizes, hx=None):
        out, h_n = self.rnn(PackedSequence(data, batch_sizes), hx)
        return out.data, h_n


@feature(
    "export of a PackedSequence",
    stock="Could not guard on data-dependent|Dynamo does not support RNN",
)
def export_packed(RNN):
    rnn, right = pair(RNN, num_layers=2)
    packed = pack_padded_sequence(draw(T, B, I), [4, 2])
    rows = {0: Dim.DYNAMIC}
    for strict in (True, False):
        equal(torch.export.export(rnn, (packed,), strict=strict).module()(packed), right(packed))
        for hx in ((), (draw(2, B, H),)):
            inputs, shapes = (
                (packed.data, packed.batch_sizes, *hx),
                (rows, rows, *([None] * len(hx))),
            )
            exported = torch.export.export(
                FromRows(rnn), inputs, strict=strict, dynamic_shapes=shapes
            ).module()
            for lengths in ([4, 2], [7, 1], [3, 3]):
                data, sizes, *_ = pack_padded_sequence(draw(max(lengths), B, I), lengths)
                outputs = exported(data, sizes, *hx)
                expected = FromRows(right)(data, sizes, *hx)
                equal(outputs, expected)
                equal(
                    torch.autograd.grad(loss(outputs), exported.rnn.weight_hh_l0),
                    torch.autograd.grad(loss(expected), right.weight_hh_l0),
                )


FRESH = """
    import sys, torch
    library, what = sys.argv[1:]
    if library:
        torch.ops.load_library(library)
    x = torch.load("x")
    if what == "export":
        module = torch.export.load("module").module()
    elif what == "script":
        module = torch.jit.load("module")
    else:
        module = torch._inductor.aoti_load_package("module.pt2")
    outputs = module(x)
    results = list(outputs)
    if what != "aoti":
        named = sorted(module.named_parameters())
        value = sum((o * o * (0.5 + i) + o).sum() for i, o in enumerate(outputs))
        results += torch.autograd.grad(value, [p for _, p in named])
    assert "rnnkern" not in sys.modules
    torch.save(results, "results")
"""


def in_a_fresh_process(what, RNN, x):
    """What a process gets out of the file "module" that has the compiled library at most."""
    torch.save(x, "x")
    library = rnnkern.library.path if RNN is rnnkern.RNN else ""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(FRESH), library, what],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return torch.load("results")


@feature(
    "export with dynamic T, loaded and trained where only the library is",
    stock="code specialized it to be a constant",
)
def export_fresh(RNN):
    rnn, right = pair(RNN)
    exported = torch.export.export(rnn, (draw(T, B, I),), dynamic_shapes=DYNAMIC)
    torch.export.save(exported, "module")
    x = draw(9, 6, I)
    named = sorted(right.named_parameters())
    outputs = right(x)
    grads = torch.autograd.grad(loss(outputs), [p for _, p in named])
    equal(in_a_fresh_process("export", RNN, x), [*outputs, *grads])


@feature(
    "AOTInductor with dynamic T, run in a fresh process",
    stock="code specialized it to be a constant",
)
def aoti(RNN):
    rnn, right = pair(RNN)
    with torch.no_grad():
        exported = torch.export.export(rnn, (draw(T, B, I),), dynamic_shapes=DYNAMIC)
        package = os.path.join(os.getcwd(), "module.pt2")
        torch._inductor.aoti_compile_and_package(exported, package_path=package)
        x = draw(9, 6, I)
        equal(in_a_fresh_process("aoti", RNN, x), right(x))


# ---- TorchScript, C++ ----


class Padded(nn.Module):
    """A user's model: packs, and unpacks, and calls its layer with a tensor too."""

    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x: torch.Tensor, lengths: torch.Tensor):
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        out, h_n = self.rnn(packed)
        padded, _ = pad_packed_sequence(out)
        return padded, h_n, self.rnn(x)[0]


def script(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(module)


@feature("TorchScript, of tensors and PackedSequences", stock=True)
def scripted(RNN):
    rnn, right = pair(RNN, num_layers=2, bidirectional=True)
    model, x, lengths = Padded(rnn), draw(T, B, I), torch.tensor([2, 4])
    compiled = script(model)
    for _ in range(3):  # the later runs are optimised
        equal(outputs_and_grads(compiled, x, lengths),
              outputs_and_grads(Padded(right), x, lengths))  # fmt: skip


@feature(
    "TorchScript of the bare layer, loaded and trained where only the library is",
    stock="no attribute 'forward'",
)
def scripted_fresh(RNN):
    rnn, right = pair(RNN)
    script(rnn).save("module")
    x = draw(9, 6, I)
    named = sorted(right.named_parameters())
    outputs = right(x)
    grads = torch.autograd.grad(loss(outputs), [p for _, p in named])
    equal(in_a_fresh_process("script", RNN, x), [*outputs, *grads])


CPP = r"""
    #include <dlfcn.h>
    #include <torch/script.h>
    #include <torch/torch.h>
    // Argument: the library, "" for none. Loads model.pt and x.pt, takes three steps of SGD, saves
    // the losses and the weights.
    int main(int, char** argv) {
      if (*argv[1] && !dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL)) {
        std::cerr << dlerror() << "\n";
        return 1;
      }
      auto module = torch::jit::load("model.pt");
      const auto x = torch::jit::load("x.pt").attr("x").toTensor();
      std::vector<at::Tensor> parameters, results;
      for (const auto& p : module.parameters()) parameters.push_back(p);
      torch::optim::SGD optimizer(parameters, /*lr=*/0.1);
      for (int step = 0; step < 3; ++step) {
        const auto out = module.forward({x}).toTuple()->elements()[0].toTensor();
        const auto loss = out.square().mean();
        optimizer.zero_grad();
        loss.backward();
        optimizer.step();
        results.push_back(loss.detach());
      }
      for (const auto& p : parameters) results.push_back(p.detach());
      torch::save(results, "results.pt");
    }
"""


class InASequence(nn.Module):
    """torch.nn.RNN cannot be scripted alone."""

    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x: torch.Tensor):
        return self.rnn(x)


@feature("a C++ program without Python loads it and trains it", stock=True)
def libtorch(RNN):
    from torch.utils import cpp_extension

    if not shutil.which("g++"):
        pytest.skip("needs g++")
    rnn, right = pair(RNN)
    x = draw(T, B, I)
    script(InASequence(rnn)).save("model.pt")
    holder = nn.Module()
    holder.register_buffer("x", x)
    script(holder).save("x.pt")
    source = io.StringIO(textwrap.dedent(CPP)).read()
    libraries = cpp_extension.library_paths()[0]
    command = ["g++", "-std=c++17", "-O0", "-x", "c++", "-", "-o", "program"]
    command += [f"-I{path}" for path in cpp_extension.include_paths()]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    command += [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-Wl,--no-as-needed"]
    command += ["-ltorch", "-ltorch_cpu", "-lc10", "-ldl"]
    built = subprocess.run(command, input=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    library = rnnkern.library.path if RNN is rnnkern.RNN else ""
    run = subprocess.run(["./program", library], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    got = list(torch.jit.load("results.pt").parameters())
    optimizer, losses = torch.optim.SGD(right.parameters(), lr=0.1), []
    for _ in range(3):
        value = right(x)[0].square().mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.detach())
    equal(got, [*losses, *right.parameters()])


# ---- ONNX, torch.fx ----


def onnx_outputs(model, *inputs):
    import onnxruntime

    session = onnxruntime.InferenceSession(model)
    named = zip(session.get_inputs(), inputs, strict=True)
    return [torch.from_numpy(o) for o in session.run(None, {i.name: t.numpy() for i, t in named})]


def nodes(model):
    import onnx

    return [node.op_type for node in onnx.load_from_string(model).graph.node]


ONNX_OPTIONS = {
    "tanh": {},
    "relu": {"nonlinearity": "relu", "bias": False, "batch_first": True},
    "two-way": {"num_layers": 2, "bidirectional": True},
}


def onnx_case(RNN, name, hx):
    """The layer, inputs of two sizes, and which of their dimensions vary."""
    rnn = RNN(I, H, **ONNX_OPTIONS.get(name, {"nonlinearity": name})).eval()
    states = rnn.num_layers * (1 + rnn.bidirectional)

    def inputs(steps, batch):
        x = torch.randn(*((batch, steps) if rnn.batch_first else (steps, batch)), I)
        return (x, torch.randn(states, batch, H)) if hx else (x,)

    shapes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, {1: Dim.DYNAMIC})[: 1 + hx]
    return rnn, inputs(T, B), inputs(9, 6), shapes


@feature(
    "ONNX (dynamo) with dynamic T and B, one RNN node a layer", stock="Failed to export the model"
)
def onnx_dynamo(RNN, names=tuple(ONNX_OPTIONS)):
    for name in names:
        for hx in (False, True):
            rnn, example, others, shapes = onnx_case(RNN, name, hx)
            program = torch.onnx.export(
                rnn, example, dynamo=True, dynamic_shapes=shapes, verbose=False
            )
            model = program.model_proto.SerializeToString()
            assert nodes(model).count("RNN") == rnn.num_layers
            equal(onnx_outputs(model, *others), rnn(*others), tolerance=1e-5)


def test_onnx_of_the_other_nonlinearities():
    onnx_dynamo(rnnkern.RNN, ["sigmoid", "softplus", "identity"])


def test_onnx_of_cells_and_of_the_notebooks_model():
    for model, example, other in (
        (rnnkern.RNNCell(I, H), (B, I), (7, I)),
        (rnnkern.SimpleRNN(1, H, 1), (B, T, 1), (6, 9, 1)),
    ):
        shapes = ({i: Dim.DYNAMIC for i in range(len(example) - 1)},)
        program = torch.onnx.export(
            model, (torch.randn(example),), dynamo=True, dynamic_shapes=shapes, verbose=False
        )
        x = torch.randn(other)
        got = onnx_outputs(program.model_proto.SerializeToString(), x)
        right = model(x)
        equal(got, right if isinstance(right, tuple) else [right], tolerance=1e-5)


def test_onnx_says_what_it_cannot():
    packed = pack_padded_sequence(torch.randn(T, B, I), [4, 2])
    # The exporter tries in other ways what was refused in the first, and reports the last.
    with pytest.raises(Exception, match="rnnkern.rnn_layer"):
        torch.onnx.export(rnnkern.RNN(I, H), (packed,), dynamo=True, verbose=False)
    with pytest.raises(NotImplementedError, match="expected tanh or relu.*got sigmoid"):
        rnn, x = rnnkern.RNN(I, H, nonlinearity="sigmoid"), torch.randn(T, B, I)
        torch.onnx.export(rnn, (x,), io.BytesIO(), dynamo=False)


@feature("ONNX (legacy exporter) with dynamic T and B, PackedSequence too", stock=True)
def onnx_legacy(RNN):
    for name in ONNX_OPTIONS:
        for hx in (False, True):
            rnn, example, others, _ = onnx_case(RNN, name, hx)
            file = io.BytesIO()
            axes = {"x": {0: "T", 1: "B"}, "hx": {1: "B"}}
            torch.onnx.export(
                *(rnn, example, file),
                dynamo=False,
                input_names=["x", "hx"][: 1 + hx],
                dynamic_axes={n: a for n, a in axes.items() if n == "x" or hx},
            )
            assert nodes(file.getvalue()).count("RNN") == rnn.num_layers
            equal(onnx_outputs(file.getvalue(), *others), rnn(*others), tolerance=1e-5)

    class Sorted(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = RNN(I, H, bidirectional=True)

        def forward(self, x, lengths):
            out, h_n = self.rnn(pack_padded_sequence(x, lengths))
            return pad_packed_sequence(out)[0], h_n

    model, file = Sorted().eval(), io.BytesIO()
    torch.onnx.export(
        *(model, (torch.randn(T, B, I), torch.tensor([4, 2])), file),
        dynamo=False,
        input_names=["x", "lengths"],
        dynamic_axes={"x": {0: "T", 1: "B"}, "lengths": {0: "B"}},
    )
    x, lengths = torch.randn(7, 3, I), torch.tensor([7, 3, 1])
    equal(onnx_outputs(file.getvalue(), x, lengths), model(x, lengths), tolerance=1e-5)


@feature("torch.fx.symbolic_trace of a model with it", stock=True)
def fx(RNN):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = RNN(I, H, dtype=F64), nn.Linear(H, 1, dtype=F64)

        def forward(self, x, hx=None):
            out, h_n = self.rnn(x, hx)
            return self.head(out[-1]), h_n

    model = Model()
    traced, x, hx = torch.fx.symbolic_trace(model), draw(T, B, I), draw(1, B, H)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["rnn", "head"]
    equal((traced(x), traced(x, hx)), (model(x), model(x, hx)))
    assert isinstance(traced.rnn, RNN)


class Shifted(rnnkern.RNN):
    """A user's subclass."""

    def forward(self, input, hx=None):
        out, h_n = super().forward(input, hx)
        return out + 1, h_n


def test_fx_of_cells_hooks_subclasses_and_accelerated_layers():
    """Each is one node, however it is called and whatever is around its forward."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = rnnkern.RNNCell(I, H)
            self.hooked, self.sub, self.stock = rnnkern.RNN(H, H), Shifted(H, H), nn.RNN(H, H)
            self.hooked.register_forward_hook(lambda module, inputs, out: (out[0] * 2, out[1]))
            self.hooked.register_forward_pre_hook(
                lambda module, inputs: (inputs[0] * 3, *inputs[1:])
            )
            self.start = nn.Parameter(torch.randn(T, B, H))

        def forward(self, x):
            h = self.cell(x, self.cell(x)).unsqueeze(0)
            out, h = self.hooked(self.start, hx=h)
            out, h = self.sub(out, h)
            return self.stock(out, h)

    model, x = Model(), torch.randn(B, I)
    assert rnnkern.accelerate(model).swapped == ["stock"]
    traced = torch.fx.symbolic_trace(model)
    called = [n.target for n in traced.graph.nodes if n.op == "call_module"]
    assert called == ["cell", "cell", "hooked", "sub", "stock"]
    assert all(torch.equal(a, b) for a, b in zip(traced(x), model(x), strict=True))


# ---- processes, threads, copies ----


def distributed(rank, RNN, port, directory):
    """One of two ranks: DDP's and FSDP2's gradients are those of the whole batch."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    rnn, right = pair(RNN, I, 8)
    x = draw(T, 4, I)
    right(x)[0].square().mean().backward()
    share = x[:, 2 * rank : 2 * rank + 2]
    ddp = DistributedDataParallel(copy.deepcopy(rnn))
    ddp(share)[0].square().mean().backward()
    equal([p.grad for p in ddp.parameters()], [p.grad for p in right.parameters()])
    fully_shard(rnn, mesh=init_device_mesh("cpu", (2,)))
    rnn(share)[0].square().mean().backward()
    got = [p.grad.full_tensor() for p in rnn.parameters()]
    equal(got, [p.grad for p in right.parameters()])
    torch.distributed.destroy_process_group()
    # Not through the interpreter's end, where torch's own threads have been seen to abort.
    os._exit(0)


@feature("DDP and FSDP2", stock=True)
def ddp_and_fsdp2(RNN):
    mp.spawn(distributed, (RNN, 0, os.getcwd()), nprocs=2)


def in_a_child(module, x, queue):
    torch.set_num_threads(2)
    outputs = outputs_and_grads(module, x)
    queue.put([o.detach().numpy() for o in outputs])


def in_a_fork(module, x, queue):
    """Forked from here, where no test has used threads: GCC's OpenMP hangs in a fork of another."""
    torch.set_num_threads(1)
    outputs_and_grads(module, x)  # what a fork inherits has already run
    child = mp.get_context("fork").Process(target=in_a_child, args=(module, x, queue))
    child.start()
    child.join(60)
    sys.exit(child.exitcode != 0)


@feature("multiprocessing by spawn and by fork", stock=True)
def processes(RNN):
    rnn, right = pair(RNN, I, 64)
    x = draw(T, 32, I)
    context = mp.get_context("spawn")
    for target in (in_a_child, in_a_fork):
        queue = context.Queue()
        child = context.Process(target=target, args=(rnn, x, queue))
        child.start()
        got = queue.get(timeout=120)
        child.join(60)
        assert child.exitcode == 0
        equal([torch.from_numpy(o) for o in got], [o.detach() for o in outputs_and_grads(right, x)])


@feature("threads: forward and backward of one layer in several", stock=True)
def threads(RNN):
    rnn, right = pair(RNN, num_layers=2, bidirectional=True)
    inputs = [draw(T, B, I) for _ in range(16)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda x: outputs_and_grads(rnn, x), inputs))
    equal(got, [outputs_and_grads(right, x) for x in inputs])


@feature("deepcopy, pickle, torch.save", stock=True)
def copies(RNN):
    rnn, right = pair(RNN, num_layers=2)
    x, file = draw(T, B, I), io.BytesIO()
    torch.save(rnn, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn)), loaded):
        equal(outputs_and_grads(other, x), outputs_and_grads(right, x))


# ---- what is done to parameters ----


@feature("parametrizations: weight norm, spectral norm, orthogonal", stock=True)
def parametrized(RNN):
    from torch.nn.utils import parametrizations

    x = draw(T, B, I)
    for parametrize in ("weight_norm", "spectral_norm", "orthogonal"):
        modules = pair(RNN)
        results = []
        for module in modules:
            torch.manual_seed(0)
            getattr(parametrizations, parametrize)(module, "weight_hh_l0")
            # In training mode, spectral_norm takes a power iteration whenever the weight is read,
            # and torch.nn.RNN reads it four times a forward.
            module.eval()
            optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
            for _ in range(2):  # the second step is of what the first changed
                outputs = module(x)
                optimizer.zero_grad()
                loss(outputs).backward()
                optimizer.step()
            results.append([*outputs, *(p.grad for p in module.parameters())])
        assert all(g.abs().sum() > 0 for g in results[0][2:])
        equal(*results)


class WeightDrop(nn.Module):
    """DropConnect on weight_hh as AWD-LSTM wrote it: the attribute is another tensor each time."""

    def __init__(self, rnn, p=0.5):
        super().__init__()
        self.rnn, self.p = rnn, p
        raw = rnn.weight_hh_l0
        del rnn._parameters["weight_hh_l0"]
        rnn.register_parameter("weight_hh_l0_raw", nn.Parameter(raw.data))

    def forward(self, x):
        raw = self.rnn.weight_hh_l0_raw
        self.rnn.weight_hh_l0 = nn.functional.dropout(raw, self.p, self.training)
        return self.rnn(x)


@feature("DropConnect on weight_hh", stock=True)
def drop_connect(RNN):
    rnn, right = pair(RNN)
    x, results = draw(T, B, I), []
    for module in (WeightDrop(rnn), WeightDrop(right)):
        torch.manual_seed(1)
        for _ in range(2):
            outputs = module(x)
            grads = torch.autograd.grad(loss(outputs), list(module.parameters()))
            results.append([*outputs, *grads])
    equal(results[:2], results[2:])


@feature("pruning", stock=True)
def pruned(RNN):
    from torch.nn.utils import prune

    rnn, right = pair(RNN)
    mask = (draw(H, H) > 0).to(F64)
    x, results = draw(T, B, I), []
    for module in (rnn, right):
        prune.custom_from_mask(module, "weight_hh_l0", mask)
        outputs = module(x)
        results.append([*outputs, torch.autograd.grad(loss(outputs), module.weight_hh_l0_orig)])
        prune.remove(module, "weight_hh_l0")
        results[-1].append(module(x))
    equal(*results)


# ---- tensors of other kinds ----


@feature("tensor subclasses and function modes", stock=True)
def subclasses(RNN):
    from torch.overrides import TorchFunctionMode
    from torch.testing._internal.two_tensor import TwoTensor

    rnn, right = pair(RNN)
    x = draw(T, B, I)
    double = {n: TwoTensor(p, 2 * p).requires_grad_() for n, p in members_of(rnn)}
    outputs = functional_call(rnn, double, (TwoTensor(x, x),))
    grads = torch.autograd.grad(loss(outputs), list(double.values()))
    for name, times in (("a", 1), ("b", 2)):
        params = {n: (times * p).requires_grad_() for n, p in members_of(right)}
        expected = functional_call(right, params, (x,))
        expected = [*expected, *torch.autograd.grad(loss(expected), list(params.values()))]
        equal([getattr(t, name) for t in (*outputs, *grads)], expected)

    seen = []

    class Spy(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Spy():
        equal(rnn(x), right(x))
    assert any("rnn" in name for name in seen)


@feature("complex numbers", stock=True)
def complex_numbers(RNN):
    rnn = RNN(I, H, 2, bidirectional=True, dtype=torch.complex128)
    right = nn.RNN(I, H, 2, bidirectional=True, dtype=torch.complex128)
    right.load_state_dict(rnn.state_dict())
    x = torch.randn(T, B, I, dtype=torch.complex128, requires_grad=True)
    results = []
    for module in (rnn, right):
        out, h_n = module(x)
        wanted = [x, *module.parameters()]
        value = (out * out.conj()).real.sum() + h_n.abs().sum()
        first = torch.autograd.grad(value, wanted, create_graph=True)
        second = torch.autograd.grad(sum(g.abs().square().sum() for g in first), wanted)
        results.append([out, h_n, *first, *second])
    equal(*results)


# ---- modes, counters, limits ----


@contextmanager
def counted():
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        yield counter


@feature("FLOP counter", stock=True)
def flops(RNN):
    rnn, right = pair(RNN, num_layers=2, bidirectional=True)
    x, state = draw(T, B, I).requires_grad_(), draw(4, B, H).requires_grad_()
    for hx in (state, None):
        counts = []
        for module in (rnn, right):
            with counted() as forward:
                outputs = module(x, hx)
            with counted() as backward:
                loss(outputs).backward()
            counts.append((forward.get_total_flops(), backward.get_total_flops()))
        rows = 2 * T * B * 2  # of two directions, times a multiply and an add
        products = rows * (I * H + H * H) + rows * (2 * H * H + H * H)
        of_h0 = 0 if hx is state else 2 * B * 4 * H * H
        assert counts == [(products, 2 * products - of_h0)] * 2


@feature("selective checkpoint policies, activations offloaded", stock=True)
def policies(RNN):
    from functools import partial

    from torch.utils import checkpoint as torch_checkpoint

    rnn, right = pair(RNN)
    x = draw(T, B, I).requires_grad_()
    seen = []

    def policy(context, op, *args, **kwargs):
        seen.append(str(op))
        kinds = torch_checkpoint.CheckpointPolicy
        return kinds.MUST_SAVE if "rnn_layer" in str(op) else kinds.PREFER_RECOMPUTE

    contexts = partial(torch_checkpoint.create_selective_checkpoint_contexts, policy)
    outputs = torch_checkpoint.checkpoint(rnn, x, use_reentrant=False, context_fn=contexts)
    grads = torch.autograd.grad(loss(outputs), [x, *rnn.parameters()])
    assert ("aten.tanh.default" if RNN is nn.RNN else "rnnkern.rnn_layer.default") in seen
    with torch.autograd.graph.save_on_cpu():
        offloaded = rnn(x)
    more = torch.autograd.grad(loss(offloaded), [x, *rnn.parameters()])
    expected = torch.autograd.grad(loss(right(x)), [x, *right.parameters()])
    equal([grads, more], [expected, expected])


@feature("backward in eval mode", stock=True)
def eval_backward(RNN):
    rnn, right = (module.eval() for module in pair(RNN, num_layers=2))
    x = draw(T, B, I)
    equal(outputs_and_grads(rnn, x), outputs_and_grads(right, x))


@feature("more than 65,535 steps", stock=True)
def long(RNN):
    rnn, right = pair(RNN, 1, 2)
    x = draw(66_000, 1, 1)
    with torch.no_grad():
        equal(rnn(x), right(x))
    # The gradient of the last step's state reaches a few steps back: a short run has it all.
    out = rnn(x)[0]
    grads = torch.autograd.grad(out[-1].sum(), list(rnn.parameters()))
    start = out[-201:-200].detach()
    near = torch.autograd.grad(right(x[-200:], start)[0][-1].sum(), list(right.parameters()))
    equal(grads, near)


@feature("output changed in place before backward", stock=True)
def in_place(RNN):
    rnn, right = pair(RNN, num_layers=2)
    x = draw(T, B, I)
    results = []
    for module in (rnn, right):
        out, h_n = module(x)
        out.relu_()
        results.append(torch.autograd.grad(loss((out, h_n)), list(module.parameters())))
    equal(*results)


# ---- failures that other ways of wiring an op have, and say nothing ----

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)


@on_every_backend
def test_tangents_are_never_silently_zero(backend):
    """As under torch.library.register_autograd: forward mode without a word gives zeros."""
    rnn, right = pair(rnnkern.RNN, num_layers=2)
    rnn.backend = backend
    x, tangent = draw(T, B, I), draw(T, B, I)
    got = jvp(rnn, (x,), (tangent,))
    assert all(t.abs().sum() > 0 for t in got[1])
    equal(got, jvp(right, (x,), (tangent,)))


@on_every_backend
@pytest.mark.parametrize("fullgraph", [True, False], ids=["fullgraph", "graph breaks"])
def test_compiled_func_grad_and_jvp_are_never_silently_wrong(backend, fullgraph):
    """As of an autograd.Function with a jvp under torch.compile (pytorch#193279, #192985)."""
    torch._dynamo.reset()
    rnn, right = pair(rnnkern.RNN, 2, 3)
    rnn.backend = backend
    x, weight = draw(3, 2, 2), rnn.weight_hh_l0.detach()

    def call(module):
        return lambda w: loss(functional_call(module, {"weight_hh_l0": w}, (x,)))

    results = []
    for module in (rnn, right):
        derivatives = (grad(call(module)), lambda w, m=module: jvp(call(m), (w,), (w,))[1])
        if module is rnn:
            derivatives = [
                torch.compile(d, backend="aot_eager", fullgraph=fullgraph) for d in derivatives
            ]
        results.append([derivative(weight) for derivative in derivatives])
    equal(*results)


@on_every_backend
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
def test_gradients_are_never_silently_lost_in_export(backend, strict):
    """As of an autograd.Function, which torch.export drops, and its backward with it."""
    rnn, right = pair(rnnkern.RNN)
    rnn.backend = backend
    x = draw(T, B, I)
    exported = torch.export.export(rnn, (x,), strict=strict).module()
    named = [sorted(module.named_parameters()) for module in (exported, right)]
    results = [
        torch.autograd.grad(loss(module(x)), [p for _, p in of])
        for module, of in zip((exported, right), named, strict=True)
    ]
    assert all(g.abs().sum() > 0 for g in results[0])
    equal(*results)


# ---- README's table ----

README = Path(__file__).parent.parent / "README.md"


def table_rows():
    """Feature, torch.nn.RNN on the CPU, cuDNN, rnnkern: the cells of README's feature table."""
    lines = iter(README.read_text().splitlines())
    for line in lines:
        if line.startswith("| feature |"):
            next(lines)
            break
    for line in lines:
        if not line.startswith("|"):
            return
        yield [cell.strip() for cell in line.strip("|").split("|")]


def test_readmes_table_names_tests_that_exist():
    rows = list(table_rows())
    assert len(rows) > 20
    text = {file.stem: file.read_text() for file in Path(__file__).parent.glob("test_*.py")}
    for name, stock, _cudnn, ours in rows:
        if name in FEATURES:
            assert ours == "yes: `test_features`", f"{name}: {ours}"
            assert re.match(r"\w+", stock)[0] == (
                "yes" if FEATURES[name].stock is True else "no"
            ), name
            continue
        file, test = re.fullmatch(r"yes: `(test_\w+)::(test_\w+)`", ours).groups()
        assert f"def {test}(" in text[file], f"{name}: {ours}"
    missing = FEATURES.keys() - {row[0] for row in rows}
    assert not missing, missing
