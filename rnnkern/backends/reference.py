"""The definition itself (rnnkern/reference.py), differentiated by torch. Only ever named."""

from .. import reference
from ..checks import check_linear_scan, check_rnn_layer, check_rnn_scan
from ..reference import project
from .eager import lower_precision, unsupported

__all__ = ["linear_scan", "rnn_layer", "rnn_scan", "unsupported"]


@lower_precision
def rnn_scan(x_proj, h0, weight_hh, batch_sizes, reverse, nonlinearity):
    check_rnn_scan(x_proj, h0, weight_hh, batch_sizes, reverse, nonlinearity)
    return reference.rnn_scan(x_proj, h0, weight_hh, batch_sizes, reverse, nonlinearity)


@lower_precision
def rnn_layer(x, h0, w_ih, w_hh, b_ih, b_hh, batch_sizes, reverse, nonlinearity):
    check_rnn_layer(x, w_ih, w_hh, b_ih, b_hh, batch_sizes)
    x_proj = project(x, w_ih, b_ih, b_hh)
    return rnn_scan(x_proj, h0, w_hh, batch_sizes, reverse, nonlinearity)


@lower_precision
def linear_scan(u, gain, s0, weight, batch_sizes, reverse):
    check_linear_scan(u, gain, s0, weight, batch_sizes, reverse)
    return reference.linear_scan(u, gain, s0, weight, batch_sizes, reverse)
