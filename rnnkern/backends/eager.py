"""Plain torch operations, on any device; the gradients in closed form (autograd.py).

What runs where no kernel does: slow, but it saves h alone and differentiates to every order.
"""

import torch

from .. import autograd
from ..checks import check_linear_scan, check_rnn_scan
from ..reference import ACTIVATIONS, project
from ..reference import linear_scan as linear_scan_kernel
from ..reference import rnn_scan as rnn_scan_kernel

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def unsupported(device, dtype, hidden_size, groups, nonlinearity) -> list[str]:
    reasons = []
    if dtype not in DTYPES:
        reasons.append(f"it computes {', '.join(map(str, DTYPES))}, not {dtype}")
    if nonlinearity is not None and nonlinearity not in ACTIVATIONS:
        reasons.append(f"there is no nonlinearity '{nonlinearity}', only {', '.join(ACTIVATIONS)}")
    return reasons


def rnn_scan_backward_kernel(*arguments):
    return autograd.rnn_scan_backward(linear_scan_kernel, *arguments)


class _Kernels:
    rnn_scan_kernel = staticmethod(rnn_scan_kernel)
    rnn_scan_backward_kernel = staticmethod(rnn_scan_backward_kernel)
    linear_scan_kernel = staticmethod(linear_scan_kernel)


def rnn_scan(x_proj, h0, weight_hh, batch_sizes, reverse, nonlinearity):
    check_rnn_scan(x_proj, h0, weight_hh, batch_sizes, reverse, nonlinearity)
    return autograd.rnn_scan(_Kernels, x_proj, h0, weight_hh, batch_sizes, reverse, nonlinearity)


def rnn_layer(x, h0, w_ih, w_hh, b_ih, b_hh, batch_sizes, reverse, nonlinearity):
    x_proj = project(x, w_ih, b_ih, b_hh)
    return rnn_scan(x_proj, h0, w_hh, batch_sizes, reverse, nonlinearity)


def linear_scan(u, gain, s0, weight, batch_sizes, reverse):
    check_linear_scan(u, gain, s0, weight, batch_sizes, reverse)
    return autograd.linear_scan(_Kernels, u, gain, s0, weight, batch_sizes, reverse)
