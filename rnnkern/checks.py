"""What the scans ask of their arguments where no compiled op does: csrc/checks.h's twin."""

from itertools import pairwise

import torch
from torch import Tensor

from .reference import ACTIVATIONS


def check_like(op: str, name: str, a: Tensor, x: Tensor) -> None:
    """A tensor beside x: same dtype (TypeError), same device (ValueError)."""
    if a.dtype != x.dtype:
        raise TypeError(f"{op}: expected {name} to have the dtype {x.dtype}, got {a.dtype}")
    if a.device != x.device:
        raise ValueError(f"{op}: expected {name} on the device {x.device}, got {a.device}")


def check_scan(
    op: str,
    x: Tensor,
    initial: Tensor | None,
    weight: list[Tensor],
    batch_sizes: Tensor | None,
    reverse: list[bool],
    names: tuple[str, str],
) -> None:
    """The arguments that all scans share; names are those of x and of initial."""
    x_name, initial_name = names
    groups = len(weight)
    if not (x.is_floating_point() or x.is_complex()):
        raise TypeError(f"{op}: expected {x_name} of a floating dtype, got {x.dtype}")
    if groups == 0:
        raise ValueError(f"{op}: expected at least one weight, got an empty list")
    if len(reverse) != groups:
        raise ValueError(
            f"{op}: expected one reverse flag for each of the {groups} weights, got {len(reverse)}"
        )
    hidden = weight[0].size(0) if weight[0].dim() == 2 else 0
    for w in weight:
        check_like(op, "weight", w, x)
        if w.shape != (hidden, hidden):
            raise ValueError(
                f"{op}: expected every weight to be square (H, H) of one H, got {list(w.shape)}"
            )
    packed = batch_sizes is not None
    if packed and not (
        batch_sizes.dim() == 1
        and batch_sizes.dtype == torch.int64
        and batch_sizes.device.type == "cpu"
    ):
        raise ValueError(
            f"{op}: expected batch_sizes (T,) int64 on the CPU, got "
            f"{list(batch_sizes.shape)} {batch_sizes.dtype} on {batch_sizes.device}"
        )
    if x.dim() != (2 if packed else 3) or x.size(-1) != groups * hidden:
        shape = "(N, G*H)" if packed else "(T, B, G*H)"
        raise ValueError(
            f"{op}: expected {x_name} {shape} with G*H = {groups}*{hidden}, got {list(x.shape)}"
        )
    if packed:
        sizes = batch_sizes.tolist()
        if any(n < 1 for n in sizes) or any(n < m for n, m in pairwise(sizes)):
            raise ValueError(
                f"rnnkern: expected batch_sizes to be positive and non-increasing, got {sizes}"
            )
        if sum(sizes) != x.size(0):
            raise ValueError(
                f"rnnkern: expected batch_sizes to add up to the {x.size(0)} packed rows, "
                f"got {sum(sizes)}"
            )
    _check_state(op, initial, initial_name, x, weight, batch_sizes)


def _check_state(
    op: str,
    state: Tensor | None,
    name: str,
    x: Tensor,
    weight: list[Tensor],
    batch_sizes: Tensor | None,
) -> None:
    """The (G, B, H) states, if any, beside the main sequence and its weights."""
    if state is None:
        return
    check_like(op, name, state, x)
    rows = x.size(1)
    if batch_sizes is not None:
        any_number = state.size(1) if state.dim() == 3 else 0
        rows = int(batch_sizes[0]) if len(batch_sizes) else any_number
    shape = (len(weight), rows, weight[0].size(0))
    if state.shape != shape:
        raise ValueError(f"{op}: expected {name} (G, B, H) = {shape}, got {list(state.shape)}")


def check_rnn_scan(x_proj, h0, weight, batch_sizes, reverse, nonlinearity) -> None:
    """The arguments of rnn_scan: ValueError, or TypeError for a dtype."""
    names = ("x_proj", "h0")
    check_scan("rnn_scan", x_proj, h0, weight, batch_sizes, reverse, names)
    if batch_sizes is not None and h0 is None:
        raise ValueError("rnn_scan: expected h0 (G, B, H) beside batch_sizes, got None")
    check_nonlinearity(nonlinearity)


def check_nonlinearity(nonlinearity) -> None:
    """A name of ACTIVATIONS; ValueError."""
    if nonlinearity not in ACTIVATIONS:
        raise ValueError(
            f"rnnkern: nonlinearity must be one of {list(ACTIVATIONS)}, got '{nonlinearity}'"
        )


def check_rnn_layer(x, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes) -> None:
    """The arguments of rnn_layer that check_rnn_scan does not see once x is projected."""
    groups = len(weight_hh)
    if len(weight_ih) != groups or not groups:
        raise ValueError(
            "rnn_layer: expected as many weight_ih as weight_hh, one at least, "
            f"got {len(weight_ih)} and {groups}"
        )
    if len(bias_ih) not in (0, groups) or len(bias_ih) != len(bias_hh):
        raise ValueError(
            f"rnn_layer: expected a bias_ih and a bias_hh for each of the {groups} weights or "
            f"none, got {len(bias_ih)} and {len(bias_hh)}"
        )
    if weight_ih[0].dim() != 2:
        raise ValueError(f"rnn_layer: expected weight_ih (H, I), got {list(weight_ih[0].shape)}")
    hidden, features = weight_hh[0].shape[:1].numel(), weight_ih[0].size(1)
    dims, shape = (3, "(T, B, I)") if batch_sizes is None else (2, "(N, I)")
    if not (x.is_floating_point() or x.is_complex()):
        raise TypeError(f"rnn_layer: expected x of a floating dtype, got {x.dtype}")
    if x.dim() != dims or x.size(-1) != features:
        raise ValueError(f"rnn_layer: expected x {shape} with I = {features}, got {list(x.shape)}")
    for w in weight_ih:
        check_like("rnn_layer", "weight_ih", w, x)
        if w.shape != (hidden, features):
            raise ValueError(
                f"rnn_layer: expected weight_ih (H, I) = {(hidden, features)}, got {list(w.shape)}"
            )
    for b in (*bias_ih, *bias_hh):
        check_like("rnn_layer", "the biases", b, x)
        if b.shape != (hidden,):
            raise ValueError(f"rnn_layer: expected biases (H,) = ({hidden},), got {list(b.shape)}")


def check_linear_scan(u, gain, s0, weight, batch_sizes, reverse) -> None:
    """The arguments of linear_scan: ValueError, or TypeError for a dtype."""
    check_scan("linear_scan", u, s0, weight, batch_sizes, reverse, ("u", "s0"))
    _check_rows("linear_scan", "gain", gain, u, "u")


def _check_rows(op: str, name: str, a: Tensor, x: Tensor, x_name: str) -> None:
    """A tensor shaped like the main sequence x."""
    check_like(op, name, a, x)
    if a.shape != x.shape:
        raise ValueError(
            f"{op}: expected {name} shaped like {x_name}, {list(x.shape)}, got {list(a.shape)}"
        )


def check_rnn_scan_backward(
    grad_h, grad_h_n, h, h0, weight, batch_sizes, reverse, nonlinearity
) -> None:
    """The arguments of the op rnn_scan_backward: ValueError, or TypeError for a dtype."""
    op = "rnn_scan_backward"
    check_scan(op, h, h0, weight, batch_sizes, reverse, ("h", "h0"))
    _check_state(op, grad_h_n, "grad_h_n", h, weight, batch_sizes)
    if grad_h is not None:
        _check_rows(op, "grad_h", grad_h, h, "h")
    check_nonlinearity(nonlinearity)


def check_rnn_layer_backward(
    grad_h, grad_h_n, h, x, h0, weight_ih, weight_hh, batch_sizes, reverse, nonlinearity
) -> None:
    """The arguments of the op rnn_layer_backward that check_rnn_scan_backward does not see."""
    check_rnn_layer(x, weight_ih, weight_hh, [], [], batch_sizes)
    check_like("rnn_layer_backward", "h", h, x)
    if x.shape[:-1] != h.shape[:-1]:
        raise ValueError(
            f"rnn_layer_backward: expected x with the rows of h, {list(h.shape)}, "
            f"got {list(x.shape)}"
        )
