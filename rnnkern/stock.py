"""torch.nn.RNN's own op, for the two that know it by name and could not take another.

The ONNX exporter that traces (dynamo=False) makes ONNX's RNN of it; torch's per-sample gradients
(torch.nn.utils._per_sample_grad) take it apart, with weights that are ExpandedWeights.
"""

from torch import Tensor, rnn_relu, rnn_tanh

try:
    from torch.nn.utils._expanded_weights import ExpandedWeight
except ImportError:  # torch calls it private
    ExpandedWeight = ()

OPS = {"tanh": rnn_tanh, "relu": rnn_relu}
DIRECTIONS = ([False], [False, True])


def has_expanded_weights(*lists) -> bool:
    """Whether any of the weights is an ExpandedWeight."""
    return any(isinstance(weight, ExpandedWeight) for weights in lists for weight in weights)


def rnn_layer(
    x, h0, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, reverse, nonlinearity
) -> tuple[Tensor, Tensor]:
    """functional.rnn_layer as torch's op; the arguments are a backend's.

    Raises:
        NotImplementedError: a nonlinearity or directions that torch.nn.RNN does not have.
    """
    if nonlinearity not in OPS or [bool(flag) for flag in reverse] not in DIRECTIONS:
        raise NotImplementedError(
            "rnnkern: for torch.onnx.export(dynamo=False) and torch.nn.utils._per_sample_grad, "
            "expected tanh or relu, and one forward or two directions, got "
            f"{nonlinearity} and reverse = {list(reverse)}; dynamo=True and torch.vmap take more"
        )
    if h0 is None:
        h0 = x.new_zeros(len(weight_hh), x.size(1), weight_hh[0].shape[0])
    lists = (weight_ih, weight_hh, bias_ih, bias_hh) if bias_ih else (weight_ih, weight_hh)
    flat = [tensor for direction in zip(*lists, strict=True) for tensor in direction]
    one_layer = (flat, bool(bias_ih), 1, 0.0, False, len(weight_hh) == 2)
    if batch_sizes is None:
        return OPS[nonlinearity](x, h0, *one_layer, False)
    return OPS[nonlinearity](x, batch_sizes, h0, *one_layer)
