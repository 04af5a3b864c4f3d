"""The definition itself (rnnkern/reference.py), differentiated by torch. Never chosen, only named."""

from .. import reference
from ..checks import check_linear_scan, check_rnn_scan
from .eager import unsupported

__all__ = ["linear_scan", "rnn_scan", "unsupported"]


def rnn_scan(x_proj, h0, weight_hh, batch_sizes, reverse, nonlinearity):
    check_rnn_scan(x_proj, h0, weight_hh, batch_sizes, reverse, nonlinearity)
    return reference.rnn_scan(x_proj, h0, weight_hh, batch_sizes, reverse, nonlinearity)


def linear_scan(u, gain, s0, weight, batch_sizes, reverse):
    check_linear_scan(u, gain, s0, weight, batch_sizes, reverse)
    return reference.linear_scan(u, gain, s0, weight, batch_sizes, reverse)
