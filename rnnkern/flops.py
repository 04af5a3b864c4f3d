"""What torch.utils.flop_counter counts for the compiled ops: the products.

A product of (N, I) with (I, H) counts 2 N I H. The sum is that of torch.nn.RNN's own products: one
step's is left out where nobody wants the gradient of h0. The formulas get shapes in the place of
tensors.
"""

from math import prod

import torch
from torch.utils.flop_counter import register_flop_formula


def _products(rows, weights) -> int:
    """Of all the rows with every group's matrix: 2 N H K each."""
    return sum(2 * prod(rows[:-1]) * prod(weight) for weight in weights)


def _rnn_scan(x_proj, h0, weight_hh, *_, **__) -> int:
    return _products(x_proj, weight_hh)


def _rnn_layer(x, h0, weight_ih, weight_hh, *_, **__) -> int:
    return _products(x, weight_ih) + _products(x, weight_hh)


def _linear_scan(u, gain, s0, weight, *_, **__) -> int:
    return _products(u, weight)


def _scan_backward(h, h0, weight_hh, need) -> int:
    need_h0, need_weight = need
    batch = h0[1] if h0 else h[1]
    first_step = 0 if need_h0 else min(_products([batch, 1], weight_hh), _products(h, weight_hh))
    return _products(h, weight_hh) * (1 + need_weight) - first_step


def _rnn_scan_backward(grad_h, grad_h_n, h, h0, weight_hh, *rest, **_) -> int:
    return _scan_backward(h, h0, weight_hh, rest[-1])


def _rnn_layer_backward(grad_h, grad_h_n, h, x, h0, weight_ih, weight_hh, *rest, **_) -> int:
    need_x, need_h0, need_weight_ih, need_weight_hh, _bias = rest[-1]
    input_products = _products(x, weight_ih) * (need_x + need_weight_ih)
    return input_products + _scan_backward(h, h0, weight_hh, (need_h0, need_weight_hh))


def register() -> None:
    """Give the compiled ops their formulas; once in a process."""
    for formula in (_rnn_scan, _rnn_layer, _linear_scan, _rnn_scan_backward, _rnn_layer_backward):
        register_flop_formula(getattr(torch.ops.rnnkern, formula.__name__[1:]))(formula)
