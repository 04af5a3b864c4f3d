"""The definition: what every backend must compute, in plain torch.

`BasicRNNCell` and `SimpleRNN` are the notebook's, as it was written. `rnn_scan` and `linear_scan`
are the two recurrences that everything in rnnkern reduces to; torch's own autograd differentiates
them, so they are slow, right at every order, and the oracle of the tests (their own oracle is
torch.nn.RNN).

Letters: T steps, B batch, I input_size, H hidden_size, G groups, N rows (the sum over t of the
batch size at t).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class Activation(NamedTuple):
    """f, and f' in terms of the OUTPUT h = f(a), so that h is all that a layer must save."""

    f: Callable[[Tensor], Tensor]
    df: Callable[[Tensor], Tensor]


ACTIVATIONS = {
    "tanh": Activation(torch.tanh, lambda h: 1 - h * h),
    # Not `h > 0`: like torch's threshold_backward, a NaN lets its gradient through.
    "relu": Activation(torch.relu, lambda h: (~(h <= 0)).to(h.dtype)),
    "sigmoid": Activation(torch.sigmoid, lambda h: h * (1 - h)),
    # logaddexp rather than F.softplus: that one switches to the identity at 20, where f' = 1 -
    # exp(-h) is no longer its derivative.
    "softplus": Activation(
        lambda a: torch.logaddexp(a, torch.zeros_like(a)), lambda h: -torch.expm1(-h)
    ),
    "identity": Activation(lambda a: a, torch.ones_like),
}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of products and pre-activations: float32 for half types, else the dtype."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def step_sizes(x: Tensor, batch_sizes: Tensor | None) -> list[int]:
    """The batch size of every step: of a plain (T, B, ...) batch, or of packed rows (N, ...)."""
    return [x.size(1)] * x.size(0) if batch_sizes is None else batch_sizes.tolist()


def _scan(
    rows: Tensor, state: Tensor, weight: Tensor, sizes: list[int], reverse: bool, step
) -> tuple[Tensor, Tensor]:
    """One group's recurrence over rows (N, H); step(rows, product) makes those rows' next state.

    A row b takes part while b < sizes[t]. The rows that do not take part keep their state: going
    forward it is their last one, in reverse it is still their initial one.
    """
    outs: list[Tensor] = [rows[:0]] * len(sizes)
    starts = [0]
    for n in sizes:
        starts.append(starts[-1] + n)
    order = range(len(sizes))
    for t in reversed(order) if reverse else order:
        n = sizes[t]
        outs[t] = step(slice(starts[t], starts[t] + n), state[:n].to(weight.dtype) @ weight.t())
        state = torch.cat([outs[t], state[n:]])
    return (torch.cat(outs) if outs else rows), state


def _grouped(
    x: Tensor, weight: list[Tensor], initial: Tensor | None, batch_sizes, reverse, make_step
):
    """Run `_scan` for each group over its columns of x; the outputs stand side by side."""
    sizes, hidden = step_sizes(x, batch_sizes), weight[0].size(0)
    batch = sizes[0] if sizes else x.size(1)
    out, last = [], []
    for g, w in enumerate(weight):
        columns = slice(g * hidden, (g + 1) * hidden)
        rows = x[..., columns].reshape(sum(sizes), hidden)
        state = initial[g] if initial is not None else rows.new_zeros(batch, hidden)
        o, s = _scan(
            rows, state, w.to(compute_dtype(w.dtype)), sizes, reverse[g], make_step(rows, columns)
        )
        out.append(o.view(*x.shape[:-1], hidden))
        last.append(s)
    return torch.cat(out, -1), torch.stack(last)


def rnn_scan(
    x_proj: Tensor,
    h0: Tensor | None,
    weight_hh: list[Tensor],
    batch_sizes: Tensor | None,
    reverse: list[bool],
    nonlinearity: str,
) -> tuple[Tensor, Tensor]:
    """h_t = f(x_proj_t + h_{t-1} W^T) for G independent groups.

    Args:
        x_proj: (T, B, G*H), or packed (N, G*H) with batch_sizes (T,).
        h0: (G, B, H) or None for zeros. A reversed group's row starts with it at its own last step.
        weight_hh: G tensors (H, H); row i gives unit i its inputs.
        reverse: G flags, whether the group runs from the last step to the first.
    Returns:
        h, shaped like x_proj, and h_n (G, B, H), every row's state after its last step in scan
        order.
    """
    f, dtype = ACTIVATIONS[nonlinearity].f, x_proj.dtype

    def make_step(rows, _):
        return lambda at, product: f(rows[at].to(product.dtype) + product).to(dtype)

    return _grouped(x_proj, weight_hh, h0, batch_sizes, reverse, make_step)


def project(
    x: Tensor, weight_ih: list[Tensor], bias_ih: list[Tensor], bias_hh: list[Tensor]
) -> Tensor:
    """x W_ih^T + b_ih + b_hh of G groups: (..., I) -> (..., G*H). The biases may be []."""
    bias = [b + c for b, c in zip(bias_ih, bias_hh, strict=True)] or [None] * len(weight_ih)
    columns = [F.linear(x, w, b) for w, b in zip(weight_ih, bias, strict=True)]
    return columns[0] if len(columns) == 1 else torch.cat(columns, -1)


def linear_scan(
    u: Tensor,
    gain: Tensor,
    s0: Tensor | None,
    weight: list[Tensor],
    batch_sizes: Tensor | None,
    reverse: list[bool],
) -> Tensor:
    """s_t = u_t + gain_t * (s_{t-1} W^T), * elementwise; shapes as in rnn_scan, s like u."""

    def make_step(rows, columns):
        gains = gain[..., columns].reshape(rows.shape)
        return lambda at, product: (rows[at] + gains[at] * product).to(rows.dtype)

    return _grouped(u, weight, s0, batch_sizes, reverse, make_step)[0]


class BasicRNNCell(nn.Module):
    """The notebook's cell: h' = tanh(x W_ih^T + b_ih + h W_hh^T + b_hh), W ~ N(0, 1), b = 0."""

    def __init__(self, input_size, hidden_size):
        super().__init__()
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.W_ih = nn.Parameter(torch.randn(hidden_size, input_size))
        self.b_ih = nn.Parameter(torch.zeros(hidden_size))
        self.W_hh = nn.Parameter(torch.randn(hidden_size, hidden_size))
        self.b_hh = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x, h_prev):  # (B, I), (B, H) -> (B, H)
        hx = torch.matmul(x, self.W_ih.T) + self.b_ih
        hh = torch.matmul(h_prev, self.W_hh.T) + self.b_hh
        opt_add = hx + hh
        h_new = torch.tanh(opt_add)
        return h_new


class SimpleRNN(nn.Module):
    """The notebook's model: the cell looped over time, and a linear read-out of every state."""

    def __init__(self, input_size, hidden_size, output_size):
        super().__init__()
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.output_size = output_size
        self.rnn_cell = BasicRNNCell(input_size, hidden_size)
        self.W_o = nn.Parameter(torch.randn(self.hidden_size, self.output_size))
        self.b_o = nn.Parameter(torch.zeros(self.output_size))

    def forward(self, input_seq):  # (B, T, I) -> all outputs (B, T, O), the last one (B, O)
        outputs = []
        self.batch_size = input_seq.size(0)
        self.seq_length = input_seq.size(1)
        h_prev = torch.zeros(self.batch_size, self.hidden_size).to(input_seq.device)
        for t in range(0, self.seq_length):
            x = input_seq[:, t, :]
            h_prev = self.rnn_cell(x, h_prev)
            y = h_prev @ self.W_o + self.b_o
            outputs.append(y.unsqueeze(1))
        return torch.cat(outputs, axis=1), y


def toy_data(seq_len: int = 5, batch_size: int = 16) -> tuple[Tensor, Tensor]:
    """The notebook's task: sequences that count up from random starts in 0..9, the next as target.

    Returns x and y, both (batch_size, seq_len, 1) float32, y = x + 1. Draws from torch's global
    generator.
    """
    starts = torch.randint(0, 10, (batch_size, 1, 1), dtype=torch.float)
    offsets = torch.arange(seq_len, dtype=torch.float).view(1, seq_len, 1)
    x = starts + offsets
    return x, x + 1
