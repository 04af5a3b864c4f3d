"""Autograd over kernels that Python launches: every derivative order and forward mode.

The compiled ops carry the same formulas in csrc/autograd.cpp, whose head states them. `kernels` has
rnn_scan_kernel, rnn_scan_backward_kernel and linear_scan_kernel, which know nothing of autograd.
The conj() are for complex numbers, whose gradients torch defines so; they leave real ones alone.
"""

import torch
from torch import Tensor
from torch.autograd import Function

from . import rows
from .reference import ACTIVATIONS


def rnn_scan(
    kernels, x_proj, h0, weight, batch_sizes, reverse, nonlinearity
) -> tuple[Tensor, Tensor]:
    """Differentiable rnn_scan; shapes as in reference.rnn_scan."""
    return _RnnScan.apply(kernels, nonlinearity, reverse, batch_sizes, x_proj, h0, *weight)


def linear_scan(kernels, u, gain, s0, weight, batch_sizes, reverse) -> Tensor:
    """Differentiable linear_scan; shapes as in reference.linear_scan."""
    return _LinearScan.apply(kernels, reverse, batch_sizes, u, gain, s0, *weight)


def rnn_scan_backward(
    linear_scan, grad_h, grad_h_n, h, h0, weight, batch_sizes, reverse, nonlinearity, need
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """rnn_scan's backward through linear_scan(u, gain, s0, weight, batch_sizes, reverse).

    Returns grad_x_proj, grad_h0 and grad_weight; need: of the last two, whether it is wanted (else
    it is None, as grad_h0 is without h0, or empty).
    """
    groups, empty = len(weight), h.size(0) == 0
    need_h0, need_weight = need
    grad = torch.zeros_like(h) if grad_h is None else grad_h
    if grad_h_n is not None and not empty:
        spread = [
            rows.spread_last(grad_h_n[g], rows.columns(h, groups, g), batch_sizes, reverse[g])
            for g in range(groups)
        ]
        grad = grad + torch.cat(spread, -1)
    gain = ACTIVATIONS[nonlinearity].df(h).conj()
    flipped = [not flag for flag in reverse]
    v = linear_scan(gain * grad, gain, None, [w.mH for w in weight], batch_sizes, flipped)
    grad_h0 = None
    if need_h0 and h0 is not None:
        grad_h0 = (
            grad_h_n if empty else initial_gradient(v, weight, h0.size(1), batch_sizes, reverse)
        )
        grad_h0 = torch.zeros_like(h0) if grad_h0 is None else grad_h0
    return (
        v,
        grad_h0,
        weight_gradients(v, h, h0, groups, batch_sizes, reverse) if need_weight else [],
    )


def initial_gradient(v, weight, batch, batch_sizes, reverse) -> Tensor:
    """(G, B, H): v_first conj(W) for each group."""
    groups = len(weight)
    firsts = (
        rows.first(rows.columns(v, groups, g), batch, batch_sizes, reverse[g])
        for g in range(groups)
    )
    return torch.stack([first @ w.conj() for first, w in zip(firsts, weight, strict=True)])


def weight_gradients(v, h, initial, groups, batch_sizes, reverse) -> list[Tensor]:
    """sum over rows of v^T conj(previous(h)), for each group."""
    grads = []
    for g in range(groups):
        vg, hg = rows.columns(v, groups, g), rows.columns(h, groups, g)
        start = None if initial is None else initial[g]
        if batch_sizes is not None or h.size(0) == 0:
            before = rows.previous(hg, start, batch_sizes, reverse[g])
            grads.append(vg.flatten(0, -2).t() @ before.flatten(0, -2).conj())
            continue
        # A plain batch's predecessors lie together, so two products spare a copy.
        after, before = (vg[:-1], hg[1:]) if reverse[g] else (vg[1:], hg[:-1])
        grad = after.flatten(0, -2).t() @ before.flatten(0, -2).conj()
        if start is not None:
            first = rows.first(vg, start.size(0), None, reverse[g])
            grad = torch.addmm(grad, first.t(), start.conj())
        grads.append(grad)
    return grads


def _previous_times(a, initial, weight, batch_sizes, reverse) -> Tensor:
    """previous(a) W^T, every group; a None weight counts as zeros."""
    out = []
    for g, w in enumerate(weight):
        start = None if initial is None else initial[g]
        before = rows.previous(rows.columns(a, len(weight), g), start, batch_sizes, reverse[g])
        out.append(torch.zeros_like(before) if w is None else before @ w.t())
    return torch.cat(out, -1)


def _sum(*terms: Tensor | None) -> Tensor | None:
    """The sum of the terms that are not None."""
    present = [term for term in terms if term is not None]
    return sum(present[1:], present[0]) if present else None


class _RnnScan(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(kernels, nonlinearity, reverse, batch_sizes, x_proj, h0, *weight):
        return kernels.rnn_scan_kernel(x_proj, h0, list(weight), batch_sizes, reverse, nonlinearity)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.kernels, ctx.nonlinearity, ctx.reverse, ctx.batch_sizes, _, h0, *weight = inputs
        ctx.save_for_backward(output[0], h0, *weight)
        ctx.save_for_forward(output[0], output[1], h0, *weight)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_h, grad_h_n):
        h, h0, *weight = ctx.saved_tensors
        if grad_h is None and grad_h_n is None:
            return (None,) * (6 + len(weight))
        tensors = [grad_h, grad_h_n, h, h0, *weight]
        differentiable = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in tensors
        )
        arguments = (
            *(grad_h, grad_h_n, h, h0, weight, ctx.batch_sizes, ctx.reverse, ctx.nonlinearity),
            (ctx.needs_input_grad[5], any(ctx.needs_input_grad[6:])),
        )
        if differentiable:
            v, grad_h0, grad_weight = rnn_scan_backward(
                lambda *scan: linear_scan(ctx.kernels, *scan), *arguments
            )
        else:
            v, grad_h0, grad_weight = ctx.kernels.rnn_scan_backward_kernel(*arguments)
        return (None,) * 4 + (v, grad_h0, *(grad_weight or [None] * len(weight)))

    @staticmethod
    def jvp(ctx, _kernels, _nonlinearity, _reverse, _sizes, d_x_proj, d_h0, *d_weight):
        h, h_n, h0, *weight = ctx.saved_tensors
        sizes, reverse = ctx.batch_sizes, ctx.reverse
        through_weight = None
        if any(d is not None for d in d_weight):
            through_weight = _previous_times(h, h0, d_weight, sizes, reverse)
        d_a = _sum(d_x_proj, through_weight)
        gain = ACTIVATIONS[ctx.nonlinearity].df(h)
        u = torch.zeros_like(h) if d_a is None else gain * d_a
        d_h = linear_scan(ctx.kernels, u, gain, d_h0, weight, sizes, reverse)
        if h.size(0) == 0:
            return d_h, torch.zeros_like(h_n) if d_h0 is None else d_h0.clone()
        groups = len(weight)
        lasts = [
            rows.last(rows.columns(d_h, groups, g), h_n.size(1), sizes, reverse[g])
            for g in range(groups)
        ]
        return d_h, torch.stack(lasts)


class _LinearScan(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(kernels, reverse, batch_sizes, u, gain, s0, *weight):
        return kernels.linear_scan_kernel(u, gain, s0, list(weight), batch_sizes, reverse)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.kernels, ctx.reverse, ctx.batch_sizes, _, gain, s0, *weight = inputs
        ctx.save_for_backward(output, gain, s0, *weight)
        ctx.save_for_forward(output, gain, s0, *weight)

    @staticmethod
    def backward(ctx, grad_s):
        s, gain, s0, *weight = ctx.saved_tensors
        sizes, reverse, groups = ctx.batch_sizes, ctx.reverse, len(weight)
        _, _, _, need_u, need_gain, need_s0, *need_weight = ctx.needs_input_grad
        adjoint, flipped = [w.mH for w in weight], [not flag for flag in reverse]
        d = gain.conj()
        v = linear_scan(ctx.kernels, d * grad_s, d, None, adjoint, sizes, flipped)
        grad_u = grad_gain = grad_s0 = None
        if need_u or need_gain:
            reach = [
                rows.following(rows.columns(v, groups, g), sizes, reverse[g]) @ weight[g].conj()
                for g in range(groups)
            ]
            grad_u = grad_s + torch.cat(reach, -1)
        if need_gain:
            grad_gain = grad_u * _previous_times(s, s0, weight, sizes, reverse).conj()
        if need_s0:
            empty = s.size(0) == 0
            grad_s0 = (
                torch.zeros_like(s0)
                if empty
                else initial_gradient(v, weight, s0.size(1), sizes, reverse)
            )
        grad_weight: list[Tensor | None] = [None] * groups
        if any(need_weight):
            grad_weight = [*weight_gradients(v, s, s0, groups, sizes, reverse)]
        return None, None, None, grad_u, grad_gain, grad_s0, *grad_weight

    @staticmethod
    def jvp(ctx, _kernels, _reverse, _sizes, d_u, d_gain, d_s0, *d_weight):
        s, gain, s0, *weight = ctx.saved_tensors
        sizes, reverse = ctx.batch_sizes, ctx.reverse
        through_gain = through_weight = None
        if d_gain is not None:
            through_gain = d_gain * _previous_times(s, s0, weight, sizes, reverse)
        if any(d is not None for d in d_weight):
            through_weight = gain * _previous_times(s, s0, d_weight, sizes, reverse)
        d = _sum(d_u, through_gain, through_weight)
        d = torch.zeros_like(s) if d is None else d
        return linear_scan(ctx.kernels, d, gain, d_s0, weight, sizes, reverse)
