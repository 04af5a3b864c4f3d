"""The compiled ops on the CPU (csrc/): fused, with their autograd in C++."""

import torch

from .. import flops, library, vmap

ACTIVATIONS = ("tanh", "relu", "sigmoid", "softplus", "identity")  # csrc/activation.h
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def unsupported(device, dtype, hidden_size, groups, nonlinearity) -> list[str]:
    reasons = []
    if not library.loaded:
        reasons.append(f"the compiled library is not loaded: {library.reason}")
    if device not in ("cpu", "meta"):
        reasons.append(f"it runs on the CPU, the tensors are on {device}")
    if dtype not in DTYPES:
        reasons.append(f"it has no kernel for {dtype}")
    if nonlinearity is not None and nonlinearity not in ACTIVATIONS:
        reasons.append(f"it has no kernel for the nonlinearity '{nonlinearity}'")
    return reasons


def _not_plain(*_) -> None:
    """In the place of the short ways where they were not built."""


# The backends by name that these can take the place of: "auto" comes here first (dispatch.py).
PLAIN = ("auto", "cpu")
# Short ways into rnn_layer, 4 us each faster than torch.ops; None if the call is not a plain one
# (csrc/python.cpp). torch.compile cannot look into them.
plain_layer = plain_forward = _not_plain

if library.loaded:
    vmap.register()
    flops.register()
    rnn_scan = torch.ops.rnnkern.rnn_scan.default
    rnn_layer = torch.ops.rnnkern.rnn_layer.default
    linear_scan = torch.ops.rnnkern.linear_scan.default
    if library.python is not None:
        plain_layer, plain_forward = library.python.rnn_layer, library.python.rnn_forward
