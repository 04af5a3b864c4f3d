"""torch.vmap of the compiled ops: their batching rules. (Those of a layer are in csrc/vmap.cpp.)

The V members of a vmap become one scan. Where the weights are the same for all, they are V times
as many rows of the batch; where they differ, V times as many groups. The members' dimension lies
just before the columns, so either way only neighbours are merged:

    rows     (T, B, V, G*H), packed (N, V, G*H)    as rows (b, v), or as groups (v, g)
    state    (G, B, V, H) as rows, (V, G, B, H) as groups
"""

import torch
from torch import Tensor

from . import rows


class _Members:
    """How the tensors of one op are laid into one scan, and its results taken out again."""

    def __init__(self, size: int, weight_dims: list[int | None]):
        self.size = size
        self.as_groups = any(dim is not None for dim in weight_dims)
        self.weight_dims = weight_dims
        self.state_dim = 0 if self.as_groups else 2

    def at(self, t: Tensor | None, dim: int | None, to: int) -> Tensor | None:
        """t with the members' dimension at `to`, expanded there if it has none."""
        if t is None:
            return None
        if dim is not None:
            return t.movedim(dim, to)
        t = t.unsqueeze(to)
        return t.expand(*(self.size if i == to % t.dim() else -1 for i in range(t.dim())))

    def rows(self, t: Tensor | None, dim: int | None) -> Tensor | None:
        t = self.at(t, dim, -2)
        if t is None:
            return None
        return t.flatten(-2, -1) if self.as_groups else t.flatten(-3, -2)

    def state(self, t: Tensor | None, dim: int | None) -> Tensor | None:
        t = self.at(t, dim, self.state_dim)
        if t is None:
            return None
        return t.flatten(0, 1) if self.as_groups else t.flatten(1, 2)

    def weight(self, weight: list[Tensor]) -> list[Tensor]:
        if not self.as_groups:
            return weight
        each = [
            self.at(w, dim, 0).unbind() for w, dim in zip(weight, self.weight_dims, strict=True)
        ]
        return [w for member in zip(*each, strict=True) for w in member]

    def sizes(self, batch_sizes: Tensor | None, dim: int | None) -> Tensor | None:
        if dim is not None:
            raise ValueError(
                "rnnkern: expected batch_sizes that all members of a vmap share, "
                "got different ones for each"
            )
        return batch_sizes if self.as_groups or batch_sizes is None else batch_sizes * self.size

    def flags(self, reverse: list[int]) -> list[int]:
        return list(reverse) * (self.size if self.as_groups else 1)

    def rows_out(self, t: Tensor) -> tuple[Tensor, int]:
        if self.as_groups:
            t = t.unflatten(-1, (self.size, t.size(-1) // self.size))
        else:
            t = t.unflatten(-2, (t.size(-2) // self.size, self.size))
        return t, t.dim() - 2

    def state_out(self, t: Tensor) -> tuple[Tensor, int]:
        if self.as_groups:
            return t.unflatten(0, (self.size, t.size(0) // self.size)), 0
        return t.unflatten(1, (t.size(1) // self.size, self.size)), 2

    def weight_out(self, grads: list[Tensor]) -> list[Tensor]:
        groups = len(self.weight_dims)
        return [torch.stack(grads[g::groups]) for g in range(groups)] if grads else []


def _rnn_scan(info, in_dims, x_proj, h0, weight, batch_sizes, reverse, nonlinearity):
    members = _Members(info.batch_size, in_dims[2])
    h, h_n = torch.ops.rnnkern.rnn_scan(
        members.rows(x_proj, in_dims[0]),
        members.state(h0, in_dims[1]),
        members.weight(weight),
        members.sizes(batch_sizes, in_dims[3]),
        members.flags(reverse),
        nonlinearity,
    )
    (h, h_dim), (h_n, h_n_dim) = members.rows_out(h), members.state_out(h_n)
    return (h, h_n), (h_dim, h_n_dim)


def _linear_scan(info, in_dims, u, gain, s0, weight, batch_sizes, reverse):
    members = _Members(info.batch_size, in_dims[3])
    return members.rows_out(
        torch.ops.rnnkern.linear_scan(
            members.rows(u, in_dims[0]),
            members.rows(gain, in_dims[1]),
            members.state(s0, in_dims[2]),
            members.weight(weight),
            members.sizes(batch_sizes, in_dims[4]),
            members.flags(reverse),
        )
    )


def _rnn_scan_backward(info, in_dims, *arguments):
    grad_h, grad_h_n, h, h0, weight, batch_sizes, reverse, nonlinearity, need = arguments
    need_h0, need_weight = need
    members = _Members(info.batch_size, in_dims[4])
    # As rows, the scan's own product would sum the weights' gradients over the members.
    fused = need_weight and members.as_groups
    v, grad_h0, grads = torch.ops.rnnkern.rnn_scan_backward(
        members.rows(grad_h, in_dims[0]),
        members.state(grad_h_n, in_dims[1]),
        members.rows(h, in_dims[2]),
        members.state(h0, in_dims[3]),
        members.weight(weight),
        members.sizes(batch_sizes, in_dims[5]),
        members.flags(reverse),
        nonlinearity,
        [need_h0, fused],
    )
    v, v_dim = members.rows_out(v)
    has_h0 = need_h0 and h0 is not None
    grad_h0, h0_dim = members.state_out(grad_h0) if has_h0 else (grad_h0, None)
    grads = members.weight_out(grads)
    if need_weight and not fused:
        h, h0 = members.at(h, in_dims[2], -2), members.at(h0, in_dims[3], 2)
        grads = _weight_gradients(v, h, h0, len(weight), batch_sizes, reverse)
    return (v, grad_h0, grads), (v_dim, h0_dim, [0] * len(grads))


def _weight_gradients(v, h, h0, groups, batch_sizes, reverse) -> list[Tensor]:
    """autograd.weight_gradients of every member: rows (T, B, V, G*H) and state (G, B, V, H)."""
    grads = []
    for g in range(groups):
        start = None if h0 is None else h0[g]
        before = rows.previous(rows.columns(h, groups, g), start, batch_sizes, reverse[g])
        after, before = (
            t.movedim(-2, 0).flatten(1, -2) for t in (rows.columns(v, groups, g), before)
        )
        grads.append(after.mT @ before)
    return grads


def register() -> None:
    """Give the compiled ops their rules; once in a process."""
    for rule in (_rnn_scan, _linear_scan, _rnn_scan_backward):
        torch.library.register_vmap(f"rnnkern::{rule.__name__[1:]}", rule)
