"""A layer under torch.onnx.export: ONNX's own RNN operator, by either exporter, without a table.

ONNX RNN (opset 14): Y_t = f(X_t W^T + H_{t-1} R^T + Wb + Rb) of 1 or 2 directions; X (T, B, I),
W (D, H, I), R (D, H, H), B (D, 2H) = [Wb, Rb], initial_h and Y_h (D, B, H), Y (T, D, B, H).
https://onnx.ai/onnx/operators/onnx__RNN.html
"""

import torch
from torch import Tensor

from . import stock

ACTIVATIONS = {
    "tanh": "Tanh",
    "relu": "Relu",
    "sigmoid": "Sigmoid",
    "softplus": "Softplus",
    "identity": "Affine",  # alpha x + beta
}
DIRECTIONS = {(0,): "forward", (1,): "reverse", (0, 1): "bidirectional"}


def rnn_layer(
    x, h0, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, reverse, nonlinearity
) -> tuple[Tensor, Tensor]:
    """functional.rnn_layer as the exporters understand it; the arguments are a backend's.

    Raises:
        NotImplementedError: what ONNX's RNN, or the exporter asked for, does not have.
    """
    if torch.jit.is_tracing():  # the older exporter, dynamo=False: it knows torch.nn.RNN's op
        return stock.rnn_layer(
            *(x, h0, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, reverse, nonlinearity)
        )
    if batch_sizes is not None:
        raise NotImplementedError(
            "rnnkern: expected a padded (T, B, I) batch for ONNX, whose RNN takes no packed rows, "
            "got a PackedSequence (dynamo=False exports it)"
        )
    directions, hidden = len(weight_hh), weight_hh[0].size(0)
    biases = None
    if bias_ih:
        biases = torch.stack([torch.cat(pair) for pair in zip(bias_ih, bias_hh, strict=True)])
    steps, batch = x.size(0), x.size(1)
    attributes = {
        "hidden_size": hidden,
        "direction": _direction(reverse),
        "activations": [ACTIVATIONS[nonlinearity]] * directions,
    }
    if nonlinearity == "identity":
        attributes["activation_alpha"] = [1.0] * directions
        attributes["activation_beta"] = [0.0] * directions
    y, h_n = torch.onnx.ops.symbolic_multi_out(
        "RNN",
        [x, torch.stack(weight_ih), torch.stack(weight_hh), biases, None, h0],
        attributes,
        dtypes=(x.dtype, x.dtype),
        shapes=((steps, directions, batch, hidden), (directions, batch, hidden)),
        version=18,
    )
    return y.transpose(1, 2).reshape(steps, batch, directions * hidden), h_n


def _direction(reverse) -> str:
    key = tuple(int(flag) for flag in reverse)
    if key not in DIRECTIONS:
        raise NotImplementedError(
            f"rnnkern: expected one direction or two for ONNX, got reverse = {list(reverse)}"
        )
    return DIRECTIONS[key]
