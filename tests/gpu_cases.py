"""What the tests of both GPU backends ask of a call (test_cuda_ops.py, test_triton.py)."""

import torch
from cases import Call, assert_equal
from torch import Tensor

NAN = float("nan")

# ---- ways for a tensor to lie in memory ----


def sliced(t: Tensor) -> Tensor:
    wide = torch.full([2 * n + 1 for n in t.shape], NAN, dtype=t.dtype, device=t.device)
    return wide[tuple(slice(1, None, 2) for _ in t.shape)].copy_(t)


def transposed(t: Tensor) -> Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def negated_lazily(t: Tensor) -> Tensor:
    return torch.complex(torch.zeros_like(t), -t).conj().imag


def expanded(t: Tensor) -> Tensor:
    return t.flatten()[:1].view([1] * t.dim()).expand(t.shape)


# ---- by a backend and by the reference ----


def assert_any_strides(call: Call, backend: str, lay, tolerance: float = 1e-12) -> None:
    """Values and gradients of tensors that lie otherwise."""
    results = []
    for by in (backend, "reference"):
        leaves = [lay(t).detach().requires_grad_() for t in call.tensors.values()]
        outputs = call.run(by, *leaves)
        grads = [lay(g) for g in call.grads]
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, grads)])
    assert_equal(*results, tolerance=tolerance)


def assert_every_order(call: Call, backend: str, tolerance: float = 1e-12) -> None:
    """Second order by value; forward mode; forward over reverse."""
    tensors = tuple(call.tensors.values())
    vectors = tuple(torch.randn_like(t) for t in tensors)
    results = []
    for by in (backend, "reference"):

        def scalar(*t, by=by):
            return sum((o * o + o).sum() for o in call.run(by, *t))

        leaves = call.leaves()
        grads = torch.autograd.grad(scalar(*leaves), leaves, create_graph=True)
        dot = sum((g * v).sum() for g, v in zip(grads, vectors, strict=True))
        second = torch.autograd.grad(dot, leaves)
        _, d_outputs = torch.func.jvp(lambda *t, by=by: call.run(by, *t), tensors, vectors)
        gradient = torch.func.grad(scalar, argnums=tuple(range(len(tensors))))
        _, forward_over_reverse = torch.func.jvp(gradient, tensors, vectors)
        results.append([*grads, *second, *d_outputs, *forward_over_reverse])
    assert_equal(*results, tolerance=tolerance)


def assert_vmap(call: Call, backend: str, tolerance: float = 1e-12) -> None:
    """Over data and over weights, values and per-sample gradients."""
    tensors = tuple(torch.stack([t, t / 2]) for t in call.tensors.values())
    for dims in ((0,) * len(tensors), (0, *(None,) * (len(tensors) - 1))):
        given = tuple(t if d == 0 else t[0] for t, d in zip(tensors, dims, strict=True))
        results = []
        for by in (backend, "reference"):

            def scalar(*t, by=by):
                return sum((o * o).sum() for o in call.run(by, *t))

            run = torch.vmap(lambda *t, by=by: call.run(by, *t), dims)
            per_sample = torch.vmap(torch.func.grad(scalar, tuple(range(len(dims)))), dims)
            results.append([*run(*given), *per_sample(*given)])
        assert_equal(*results, tolerance=tolerance)


# ---- on a GPU ----


def assert_captured(call: Call, backend: str) -> None:
    """Forward and backward captured once in a CUDA graph, replayed on other values."""
    leaves = call.leaves()

    def step():
        outputs = call.run(backend, *leaves)
        return [*outputs, *torch.autograd.grad(outputs, leaves, call.grads)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for scale in (1.0, 0.5):
        with torch.no_grad():
            leaves[0].mul_(scale)
        graph.replay()
        now = step()
        assert all(torch.equal(a, b) for a, b in zip(captured, now, strict=True))


def assert_streams(calls: list[Call], backend: str) -> None:
    """Calls on a stream each give what they give alone."""
    alone = [call.results(backend) for call in calls]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in calls]
    together = []
    for call, stream in zip(calls, streams, strict=True):
        with torch.cuda.stream(stream):
            together.append(call.results(backend))
    torch.cuda.synchronize()
    for a, b in zip(alone, together, strict=True):
        assert all(torch.equal(a[n], b[n]) for n in a)
