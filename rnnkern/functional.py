"""The recurrences as functions: what modules, and other layers, can be built of."""

import torch
from torch import Tensor

from . import onnx, stock
from .backends import cpu
from .dispatch import select, select_cached


def rnn_scan(
    x_proj: Tensor,
    weight_hh: list[Tensor],
    h0: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reverse: list[bool] | None = None,
    nonlinearity: str = "tanh",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The recurrence of G independent Elman RNNs: h_t = f(x_proj_t + h_{t-1} W^T).

    Differentiable to every order, in reverse and forward mode.

    Args:
        x_proj: (T, B, G*H), the input products with their biases; or (N, G*H), the rows of a
            PackedSequence, with batch_sizes. float64, float32, bfloat16 or float16; on the eager
            backend complex64 or complex128 too.
        weight_hh: G tensors (H, H); row i of one gives unit i its inputs.
        h0: (G, B, H), zeros if None (which packed rows do not allow).
        batch_sizes: (T,) int64 on the CPU, non-increasing: PackedSequence.batch_sizes.
        reverse: G flags, whether the group runs from the last step to the first; a packed row then
            starts at its own last step. None: no group does.
        nonlinearity: "tanh", "relu", "sigmoid", "softplus" or "identity".
        backend: "auto", or a name of dispatch.BACKENDS, which then runs the call or refuses it.
    Returns:
        h, shaped like x_proj, and h_n (G, B, H), each row's state after its last step.
    Raises:
        ValueError: a shape, device, name or batch_sizes that does not fit, or a backend that
            refuses.
        TypeError: dtypes that differ.

    >>> x_proj, w = torch.randn(7, 2, 5), torch.randn(5, 5) / 5
    >>> h, h_n = rnnkern.rnn_scan(x_proj, [w])
    >>> torch.allclose(h[3], torch.tanh(x_proj[3] + h[2] @ w.T), atol=1e-6)
    True
    """
    if reverse is None:
        reverse = [False] * len(weight_hh)
    if torch.jit.is_scripting():
        flags = [int(flag) for flag in reverse]
        return torch.ops.rnnkern.rnn_scan(x_proj, h0, weight_hh, batch_sizes, flags, nonlinearity)
    else:
        chosen = _select(backend, x_proj, weight_hh, nonlinearity)
        return chosen.rnn_scan(x_proj, h0, weight_hh, batch_sizes, reverse, nonlinearity)


def rnn_layer(
    x: Tensor,
    weight_ih: list[Tensor],
    weight_hh: list[Tensor],
    bias_ih: list[Tensor],
    bias_hh: list[Tensor],
    h0: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reverse: list[bool] | None = None,
    nonlinearity: str = "tanh",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """A whole layer: rnn_scan of x_proj = x W_ih^T + b_ih + b_hh, of one x for all G groups.

    Args:
        x: (T, B, I), or packed (N, I) with batch_sizes.
        weight_ih: G tensors (H, I). bias_ih, bias_hh: G tensors (H,) each, or [].
        The others, and what is raised, are rnn_scan's.
    Returns:
        h (T, B, G*H) or (N, G*H), and h_n (G, B, H).
    """
    if reverse is None:
        reverse = [False] * len(weight_hh)
    if torch.jit.is_scripting():
        flags = [int(flag) for flag in reverse]
        return torch.ops.rnnkern.rnn_layer(
            x, h0, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, flags, nonlinearity
        )
    else:
        if backend in cpu.PLAIN and not torch.compiler.is_compiling():
            done = cpu.plain_layer(
                x, h0, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, reverse, nonlinearity
            )
            if done is not None:
                return done
        if torch.onnx.is_in_onnx_export():
            chosen = onnx
        elif stock.has_expanded_weights(weight_ih, weight_hh, bias_ih, bias_hh):
            chosen = stock
        else:
            chosen = _select(backend, x, weight_hh, nonlinearity)
        return chosen.rnn_layer(
            x, h0, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, reverse, nonlinearity
        )


def linear_scan(
    u: Tensor,
    gain: Tensor,
    weight: list[Tensor],
    s0: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reverse: list[bool] | None = None,
    backend: str = "auto",
) -> Tensor:
    """A gated linear recurrence of G groups: s_t = u_t + gain_t * (s_{t-1} W^T), * elementwise.

    What rnn_scan's derivatives of every order are made of. Arguments, errors and shapes as
    rnn_scan's, with u and gain in the place of x_proj.

    Returns:
        s, shaped like u.
    """
    if reverse is None:
        reverse = [False] * len(weight)
    if torch.jit.is_scripting():
        flags = [int(flag) for flag in reverse]
        return torch.ops.rnnkern.linear_scan(u, gain, s0, weight, batch_sizes, flags)
    else:
        chosen = _select(backend, u, weight, None)
        return chosen.linear_scan(u, gain, s0, weight, batch_sizes, reverse)


def _select(backend, x, weight, nonlinearity):
    if isinstance(weight, Tensor):
        raise TypeError(
            f"rnnkern: expected a list of (H, H) weights, got one {weight.dim()}-D tensor"
        )
    if not weight:
        raise ValueError("rnnkern: expected at least one weight, got an empty list")
    choose = select if torch.compiler.is_compiling() else select_cached
    # int: of a symbolic size too, which no cache could hold. The checks refuse a 0-D weight.
    hidden = int(weight[0].size(0)) if weight[0].dim() else 0
    return choose(backend, x.device.type, x.dtype, hidden, len(weight), nonlinearity)
