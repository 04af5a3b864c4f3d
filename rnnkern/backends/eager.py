"""Plain torch operations, on any device; the gradients in closed form (autograd.py).

What runs where no kernel does: slow, but it saves h alone and differentiates to every order. Under
torch.compile and torch.export it is the definition itself, unrolled over time: of a Function with
a jvp the one makes wrong gradients of torch.func.grad, and the other none, without a word
(pytorch#193279).
"""

import functools

import torch

from .. import autograd, reference
from ..checks import check_linear_scan, check_rnn_layer, check_rnn_scan
from ..reference import ACTIVATIONS, project

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COMPLEX = (torch.complex64, torch.complex128)
NOT_COMPLEX = ("relu", "softplus")  # they compare


def unsupported(device, dtype, hidden_size, groups, nonlinearity) -> list[str]:
    reasons = []
    if dtype not in DTYPES + COMPLEX:
        reasons.append(f"it computes {', '.join(map(str, DTYPES + COMPLEX))}, not {dtype}")
    if nonlinearity is not None and nonlinearity not in ACTIVATIONS:
        reasons.append(f"there is no nonlinearity '{nonlinearity}', only {', '.join(ACTIVATIONS)}")
    elif dtype in COMPLEX and nonlinearity in NOT_COMPLEX:
        reasons.append(f"{nonlinearity} is not defined for {dtype}")
    return reasons


def rnn_scan_backward_kernel(*arguments):
    return autograd.rnn_scan_backward(reference.linear_scan, *arguments)


def lower_precision(scan):
    """Under autocast, the scan of tensors in the lower precision: csrc/autocast.cpp's twin."""

    @functools.wraps(scan)
    def cast_and_scan(*arguments):
        device = arguments[0].device.type
        # Not torch.amp.is_autocast_available: torch.compile cannot trace it in every version.
        if device == "meta" or not torch.is_autocast_enabled(device):
            return scan(*arguments)
        dtype = torch.get_autocast_dtype(device)

        def cast(value):
            if isinstance(value, (list, tuple)):
                return [cast(item) for item in value]
            eligible = isinstance(value, torch.Tensor) and value.is_floating_point()
            return value.to(dtype) if eligible and value.dtype != torch.float64 else value

        with torch.autocast(device, enabled=False):
            return scan(*map(cast, arguments))

    return cast_and_scan


class _Kernels:
    rnn_scan_kernel = staticmethod(reference.rnn_scan)
    rnn_scan_backward_kernel = staticmethod(rnn_scan_backward_kernel)
    linear_scan_kernel = staticmethod(reference.linear_scan)


def functions(kernels):
    """rnn_scan, rnn_layer and linear_scan, differentiable, over the kernels of autograd.py."""

    @lower_precision
    def rnn_scan(x_proj, h0, weight_hh, batch_sizes, reverse, nonlinearity):
        check_rnn_scan(x_proj, h0, weight_hh, batch_sizes, reverse, nonlinearity)
        if torch.compiler.is_compiling():
            return reference.rnn_scan(x_proj, h0, weight_hh, batch_sizes, reverse, nonlinearity)
        return autograd.rnn_scan(kernels, x_proj, h0, weight_hh, batch_sizes, reverse, nonlinearity)

    @lower_precision
    def rnn_layer(x, h0, w_ih, w_hh, b_ih, b_hh, batch_sizes, reverse, nonlinearity):
        check_rnn_layer(x, w_ih, w_hh, b_ih, b_hh, batch_sizes)
        x_proj = project(x, w_ih, b_ih, b_hh)
        return rnn_scan(x_proj, h0, w_hh, batch_sizes, reverse, nonlinearity)

    @lower_precision
    def linear_scan(u, gain, s0, weight, batch_sizes, reverse):
        check_linear_scan(u, gain, s0, weight, batch_sizes, reverse)
        if torch.compiler.is_compiling():
            return reference.linear_scan(u, gain, s0, weight, batch_sizes, reverse)
        return autograd.linear_scan(kernels, u, gain, s0, weight, batch_sizes, reverse)

    return rnn_scan, rnn_layer, linear_scan


rnn_scan, rnn_layer, linear_scan = functions(_Kernels)
