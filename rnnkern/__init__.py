"""rnnkern: the vanilla (Elman) RNN layer for PyTorch, fused. `torch.nn.RNN` -> `rnnkern.RNN`."""

from . import library
from .dispatch import explain
from .functional import linear_scan, rnn_layer, rnn_scan
from .interop import accelerate
from .modules import RNN, RNNCell, SimpleRNN
from .quantized import quantize

__version__ = "0.1.0"
__all__ = [
    "RNN",
    "RNNCell",
    "SimpleRNN",
    "accelerate",
    "explain",
    "library",
    "linear_scan",
    "quantize",
    "rnn_layer",
    "rnn_scan",
]
