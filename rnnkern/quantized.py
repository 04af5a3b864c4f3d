"""Inference with recurrent weights of 8 bits: quantize() makes such layers of a model's, in place.

A unit's weights are 8-bit numbers times one scale: W[i] ~ scale[i] * q[i], |q| <= 127. A state
is a byte too, h rounded to 1/127, which is why f must be bounded. Their products are exact
integers. Everything else is float32: x_proj, f, and the states that come out.
A byte holds no NaN: one in the input comes out at its own step, and no later step knows of it.
"""

import dataclasses

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.rnn import PackedSequence

from . import library
from .modules import RNN, nonlinearity_of

BOUNDED = ("tanh", "sigmoid")  # f whose values are in [-1, 1]


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """q (H, H) int8 and scale (H,) with weight ~ scale[:, None] * q, to half a scale.

    A row's scale is its largest magnitude / 127.
    """
    scale = weight.abs().amax(1) / 127
    q = torch.round(weight / torch.where(scale > 0, scale, 1)[:, None])
    return q.to(torch.int8), scale


class QuantizedRNN(RNN):
    """An rnnkern.RNN for inference, with recurrent weights of 8 bits: what quantize() makes.

    forward is RNN's, without gradients; hx must lie in [-1, 1]. In the state_dict, weight_hh_* are
    int8, and each has a weight_hh_*_scale (H,) float32 beside it.
    """

    def forward(self, input: Tensor | PackedSequence, hx: Tensor | None = None):
        """Returns output and h_n as RNN does.

        Raises:
            RuntimeError: a derivative is wanted; and what RNN raises.
            ValueError: an hx outside [-1, 1].
        """
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        return self._forward_tensor(input, hx)

    def _layer(
        self, layer, x, weight_ih, weight_hh, bias_ih, bias_hh, h0, batch_sizes, reverse
    ) -> tuple[Tensor, Tensor]:
        bias = torch.cat(bias_ih) + torch.cat(bias_hh) if bias_ih else None
        x_proj = F.linear(x, torch.cat(weight_ih), bias)
        directions = ["", "_reverse"][: len(reverse)]
        scale = [getattr(self, f"weight_hh_l{layer}{way}_scale") for way in directions]
        flags = [int(flag) for flag in reverse]
        return torch.ops.rnnkern.rnn_scan_int8(
            x_proj, h0, weight_hh, scale, batch_sizes, flags, self.nonlinearity
        )


@dataclasses.dataclass(frozen=True)
class Quantization:
    """What quantize() did, under the names of model.named_modules(); the model itself is ""."""

    swapped: dict[str, float]  # name -> ||W - scale q|| / ||W||, the worst of its weights
    left: dict[str, str]  # name -> reason

    def __str__(self) -> str:
        lines = [
            f"quantized {name or 'the model itself'}: weights within {error:.2%}"
            for name, error in self.swapped.items()
        ]
        lines += [f"left {name or 'the model itself'}: {why}" for name, why in self.left.items()]
        return "\n".join(lines) or "there is no rnnkern.RNN or torch.nn.RNN in the model"


def quantize(model: nn.Module) -> Quantization:
    """Give every rnnkern.RNN and torch.nn.RNN in a model recurrent weights of 8 bits, in place.

    For inference on a CPU: a quarter of the memory to read at every step, and products of bytes
    where the processor has them (VNNI, AMX). A layer stays the object that it was, with its hooks;
    it becomes a QuantizedRNN and cannot be trained any more. Keep the model that was trained.

    Args:
        model: any module, in float32 on the CPU.
    Returns:
        The names of what was quantized with the relative error of its weights, and of what was left
        with the reason. Print it; and compare the model's outputs before and after on your data.

    >>> model = torch.nn.Sequential(rnnkern.RNN(10, 20), torch.nn.RNN(20, 20, nonlinearity="relu"))
    >>> print(rnnkern.quantize(model))
    quantized 0: weights within ...%
    left 1: its states have no bound: relu
    """
    swapped, left = {}, {}
    for name, module in model.named_modules():
        if not isinstance(module, (RNN, nn.RNN)) or isinstance(module, QuantizedRNN):
            continue
        reason = _reason_to_leave(module)
        if reason:
            left[name] = reason
        else:
            swapped[name] = _swap(module)
    return Quantization(swapped, left)


def _reason_to_leave(module: nn.Module) -> str:
    """Why quantize() cannot have a layer; "" if it can."""
    if not library.loaded:
        return f"the compiled library is not loaded: {library.reason}"
    if is_parametrized(module):
        return "its weights are parametrized: remove_parametrizations first"
    if type(module) not in (RNN, nn.RNN):
        return f"it is a subclass, {type(module).__qualname__}"
    if nonlinearity_of(module) not in BOUNDED:
        return f"its states have no bound: {nonlinearity_of(module)}"
    weights = [getattr(module, name) for name in module._flat_weights_names]
    if any(w.dtype != torch.float32 or w.device.type != "cpu" for w in weights):
        return f"expected float32 on the CPU, got {weights[0].dtype} on {weights[0].device}"
    if not all(bool(w.isfinite().all()) for w in weights):
        return "its weights are not finite"
    return ""


def _swap(module: nn.Module) -> float:
    """Makes a QuantizedRNN of a layer; the worst relative error of its weights."""
    module.nonlinearity, module.backend = nonlinearity_of(module), "cpu"
    module.__class__ = QuantizedRNN
    worst = 0.0
    for name in module._flat_weights_names:
        weight = getattr(module, name).detach()
        delattr(module, name)
        if not name.startswith("weight_hh"):
            module.register_buffer(name, weight)
            continue
        q, scale = quantize_weight(weight)
        module.register_buffer(name, q)
        module.register_buffer(f"{name}_scale", scale)
        if weight.numel() and weight.any():
            error = (weight - scale[:, None] * q).norm() / weight.norm()
            worst = max(worst, float(error))
    module._init_flat_weights()
    return worst
