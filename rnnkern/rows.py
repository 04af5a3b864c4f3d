"""Which row of a scan comes before or after which: csrc/rows.h's twin for autograd.py.

All functions work on one group's columns, (T, B, H) or packed (N, H) with batch_sizes (and on
(T, B, V, H), (N, V, H) for the V members of a vmap). Before and after are meant in scan order: in a
reversed group, step t + 1 comes before step t. What is computed of batch_sizes is computed where
they are.
"""

import torch
from torch import Tensor


def columns(x: Tensor, groups: int, group: int) -> Tensor:
    """One group's H columns of (..., G*H)."""
    hidden = x.size(-1) // groups
    return x.narrow(-1, group * hidden, hidden)


def _shifted(
    a: Tensor, initial: Tensor | None, batch_sizes: Tensor | None, from_later: bool
) -> Tensor:
    """Row (t, b) is a's (t + 1, b) or (t - 1, b); `initial` (B, H) or zeros beyond the ends."""
    if a.size(0) == 0:
        return a
    if batch_sizes is None:
        start = torch.zeros_like(a[:1]) if initial is None else initial.unsqueeze(0)
        return torch.cat([a[1:], start] if from_later else [start, a[:-1]])
    # Gather from [initial; a], or from [a zero row; a].
    sizes, none = batch_sizes, batch_sizes.new_zeros(1)
    start = a.new_zeros(1, *a.shape[1:]) if initial is None else initial
    row = torch.arange(a.size(0), device=sizes.device)
    step = torch.repeat_interleave(sizes, output_size=a.size(0))
    b = row - (sizes.cumsum(0) - sizes)[step]
    if from_later:
        neighbour, exists = row + sizes[step], b < torch.cat([sizes[1:], none])[step]
    else:
        neighbour, exists = row - torch.cat([none, sizes[:-1]])[step], step > 0
    outside = torch.zeros_like(b) if initial is None else b
    index = torch.where(exists, neighbour + start.size(0), outside)
    return torch.cat([start, a]).index_select(0, index.to(a.device))


def previous(
    a: Tensor, initial: Tensor | None, batch_sizes: Tensor | None, reverse: bool
) -> Tensor:
    """Each row's predecessor, `initial` (None: zeros) for the first."""
    return _shifted(a, initial, batch_sizes, from_later=reverse)


def following(a: Tensor, batch_sizes: Tensor | None, reverse: bool) -> Tensor:
    """Each row's successor, zeros past the last."""
    return _shifted(a, None, batch_sizes, from_later=not reverse)


def _last_index(batch_sizes: Tensor, batch: int) -> Tensor:
    b = torch.arange(batch, device=batch_sizes.device)
    length = (batch_sizes.unsqueeze(1) > b).sum(0)
    return (batch_sizes.cumsum(0) - batch_sizes)[length - 1] + b


def last(a: Tensor, batch: int, batch_sizes: Tensor | None, reverse: bool) -> Tensor:
    """(B, H): each batch row's state after its last step in scan order. T must not be 0."""
    if batch_sizes is None:
        return a[0] if reverse else a[-1]
    if reverse:
        return a[:batch]
    return a.index_select(0, _last_index(batch_sizes, batch).to(a.device))


def first(a: Tensor, batch: int, batch_sizes: Tensor | None, reverse: bool) -> Tensor:
    """(B, H): each batch row at its first step in scan order. T must not be 0."""
    return last(a, batch, batch_sizes, not reverse)


def spread_last(at_last: Tensor, like: Tensor, batch_sizes: Tensor | None, reverse: bool) -> Tensor:
    """The adjoint of `last`: zeros shaped like `like`, but for at_last (B, H)."""
    batch = at_last.size(0)
    if batch_sizes is None:
        rest = like.size(0) - 1
        pad = (0, rest) if reverse else (rest, 0)
        return torch.nn.functional.pad(at_last.unsqueeze(0), (0, 0, 0, 0, *pad))
    index = torch.arange(batch) if reverse else _last_index(batch_sizes, batch)
    return torch.zeros_like(like).index_add(0, index.to(like.device), at_last)
