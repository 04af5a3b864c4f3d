"""The layers, parameters and layout only: drop-ins for torch.nn's, and the notebook's model."""

import copy
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .backends import cpu
from .backends.cpu import ACTIVATIONS
from .dispatch import check_backend
from .functional import rnn_layer
from .reference import BasicRNNCell
from .reference import SimpleRNN as ReferenceSimpleRNN

# A layer's own __module__, which torch.fx goes by: it makes one node of what comes from torch.nn.
FX_LEAF = nn.RNN.__module__


class RNN(nn.RNNBase):
    """torch.nn.RNN, fused: h_t = f(x_t W_ih^T + b_ih + h_{t-1} W_hh^T + b_hh), layer by layer.

    The constructor, forward, parameter names, initialisation under a seed and state_dict are
    torch.nn.RNN's; so are the exceptions for a wrong input or hx. Beyond it: `nonlinearity` also
    takes "sigmoid", "softplus" and "identity", and `backend` names who runs the scan (see
    rnnkern.explain).

    The output is what the layer saves for its backward: where it is changed in place before that,
    backward runs the forward scan once more.

    Not a subclass of nn.RNN, because torch.compile refuses those by their type; of its base,
    nn.RNNBase.

    Shapes (L steps, N batch, D = 2 if bidirectional else 1):
        input: (L, N, input_size), (N, L, input_size) if batch_first, (L, input_size) unbatched, or
            a PackedSequence.
        hx: (D * num_layers, N, hidden_size), without N if unbatched; zeros if None.
        output: like input, with D * hidden_size features. h_n: like hx.

    >>> rnn = rnnkern.RNN(10, 20, num_layers=2)
    >>> output, h_n = rnn(torch.randn(5, 3, 10))
    >>> output.shape, h_n.shape
    (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device=None,
        dtype=None,
        *,
        backend: str = "auto",
        **unknown,
    ) -> None:
        if "proj_size" in unknown:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        if unknown:
            raise TypeError(f"RNN got an unexpected keyword argument '{next(iter(unknown))}'")
        if nonlinearity not in ACTIVATIONS:
            raise ValueError(
                f"Unknown nonlinearity '{nonlinearity}'. Select from {', '.join(ACTIVATIONS)}."
            )
        check_backend(backend)
        # The base knows two modes; it uses them to count gates, of which every nonlinearity has
        # one.
        super().__init__(
            "RNN_RELU" if nonlinearity == "relu" else "RNN_TANH",
            input_size,
            hidden_size,
            num_layers=num_layers,
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
            device=device,
            dtype=dtype,
        )
        self.nonlinearity = nonlinearity
        self.backend = backend
        self.__module__ = FX_LEAF

    def flatten_parameters(self) -> None:
        """Does nothing: no backend wants the weights in one buffer. Kept for its callers."""

    # TorchScript, in which a model may call its layer with either, compiles one for each.
    @torch._jit_internal._overload_method
    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        pass

    @torch._jit_internal._overload_method
    def forward(  # noqa: F811
        self, input: PackedSequence, hx: Tensor | None = None
    ) -> tuple[PackedSequence, Tensor]:
        pass

    # A subclass is scripted as this one is annotated: the two above are RNN's own.
    def forward(self, input: Tensor, hx: Tensor | None = None):  # noqa: F811
        """Returns output and h_n; see the class. Raises what torch.nn.RNN raises."""
        if not torch.jit.is_scripting():
            if self.num_layers == 1 and self.backend in cpu.PLAIN:
                if not torch.compiler.is_compiling():
                    done = cpu.plain_forward(
                        self._parameters,
                        self._flat_weights_names,
                        input,
                        hx,
                        self.batch_first,
                        self.bidirectional,
                        self.nonlinearity,
                    )
                    if done is not None:
                        return done
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        else:
            return self._forward_tensor(input, hx)

    def __prepare_scriptable__(self):
        """What torch.jit.script takes instead: for the bare layer, one that it can script.

        It finds no forward where that is overloaded. It asks for every module; when it asks for
        the outermost, nothing is in memo yet.
        """
        self._init_flat_weights()  # whoever replaced the parameters since
        outermost = not sys._getframe(1).f_locals.get("memo", True)
        if not outermost or type(self) is not RNN:
            return self
        scriptable = copy.copy(self)
        scriptable.__class__ = _TensorRNN
        scriptable.__dict__.pop("__overloads__", None)  # of an earlier script of a model with it
        return scriptable

    def _forward_tensor(self, input: Tensor, hx: Tensor | None) -> tuple[Tensor, Tensor]:
        if input.dim() != 2 and input.dim() != 3:
            raise ValueError(
                f"RNN: Expected input to be 2D or 3D, got {input.dim()}D tensor instead"
            )
        batched = input.dim() == 3
        if hx is not None and hx.dim() != input.dim():
            raise RuntimeError(
                f"For {input.dim()}-D input, hx should also be {input.dim()}-D "
                f"but got {hx.dim()}-D tensor"
            )
        if not batched:
            input = input.unsqueeze(1)
            hx = hx.unsqueeze(1) if hx is not None else None
        elif self.batch_first:
            input = input.transpose(0, 1)
        weights = self._weights()
        self._check(input, hx, input.size(1), weights[0])
        if input.size(0) == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        output, h_n = self._layers(input, hx, None, weights)
        if not batched:
            return output.squeeze(1), h_n.squeeze(1)
        if self.batch_first:
            output = output.transpose(0, 1)
        return output, h_n

    def _forward_packed(
        self, packed: PackedSequence, hx: Tensor | None
    ) -> tuple[PackedSequence, Tensor]:
        input, batch_sizes, sorted_indices, unsorted_indices = packed
        if input.dim() != 2:
            raise RuntimeError(f"input must have 2 dimensions, got {input.dim()}")
        weights = self._weights()
        batch = batch_sizes[0].long()  # no int, which the tracing ONNX exporter would keep
        if hx is None:
            self._check(input, None, 0, weights[0])
            states = self.num_layers * (2 if self.bidirectional else 1)
            hx = torch.zeros(
                states, batch, self.hidden_size, dtype=input.dtype, device=input.device
            )
        else:
            hx = self.permute_hidden(hx, sorted_indices)
            # While it is exported the batch has no number yet: then only the op checks it.
            unknown = False
            if not torch.jit.is_scripting():
                unknown = torch.compiler.is_compiling()
            self._check(input, hx, hx.size(1) if unknown else int(batch), weights[0])
        output, h_n = self._layers(input, hx, batch_sizes, weights)
        output = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
        return output, self.permute_hidden(h_n, unsorted_indices)

    def _check(self, input: Tensor, hx: Tensor | None, batch: int, weight: Tensor) -> None:
        """What torch.nn.RNN checks, with its exceptions."""
        if input.size(-1) != self.input_size:
            raise RuntimeError(
                "input.size(-1) must be equal to input_size. "
                f"Expected {self.input_size}, got {input.size(-1)}"
            )
        if input.device != weight.device:
            raise RuntimeError(
                f"Expected the input on the parameters' device, {weight.device}, got {input.device}"
            )
        autocast = False
        if not torch.jit.is_scripting():
            autocast = torch._C._is_any_autocast_enabled()
        if input.dtype != weight.dtype and not autocast:
            raise ValueError(
                f"RNN input dtype ({input.dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert input: input.to({weight.dtype}), "
                f"or convert model: model.to({input.dtype})"
            )
        if hx is not None:
            states = self.num_layers * (2 if self.bidirectional else 1)
            if (
                hx.dim() != 3
                or hx.size(0) != states
                or hx.size(1) != batch
                or hx.size(2) != self.hidden_size
            ):
                raise RuntimeError(
                    f"Expected hidden size {[states, batch, self.hidden_size]}, "
                    f"got {list(hx.size())}"
                )
            if hx.device != weight.device or (hx.dtype != input.dtype and not autocast):
                raise RuntimeError(
                    f"Expected hidden {input.dtype} on {weight.device}, "
                    f"got {hx.dtype} on {hx.device}"
                )

    def _weights(self) -> list[Tensor]:
        """The parameters by name, whoever replaced them: parametrizations, functional_call.

        Each is read once a forward: a parametrization computes it anew each time.
        """
        if torch.jit.is_scripting():
            return self._flat_weights
        else:
            parameters = self._parameters
            names = self._flat_weights_names
            return [parameters[n] if n in parameters else getattr(self, n) for n in names]

    def _layers(
        self, x: Tensor, hx: Tensor | None, batch_sizes: Tensor | None, weights: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """All layers over (T, B, I) or packed (N, I); the directions are one scan's groups."""
        directions = 2 if self.bidirectional else 1
        reverse = [False, True] if self.bidirectional else [False]
        each = 4 if self.bias else 2  # w_ih, w_hh and perhaps b_ih, b_hh
        finals: list[Tensor] = []
        for layer in range(self.num_layers):
            if layer > 0 and self.dropout > 0.0:
                x = F.dropout(x, self.dropout, self.training)
            first = layer * directions
            end = (first + directions) * each
            bias_ih: list[Tensor] = []
            bias_hh: list[Tensor] = []
            if self.bias:
                bias_ih = weights[first * each + 2 : end : each]
                bias_hh = weights[first * each + 3 : end : each]
            x, h_n = self._layer(
                layer,
                x,
                weights[first * each : end : each],
                weights[first * each + 1 : end : each],
                bias_ih,
                bias_hh,
                hx[first : first + directions] if hx is not None else None,
                batch_sizes,
                reverse,
            )
            finals.append(h_n)
        return x, finals[0] if self.num_layers == 1 else torch.cat(finals)

    def _layer(
        self,
        layer: int,
        x: Tensor,
        weight_ih: list[Tensor],
        weight_hh: list[Tensor],
        bias_ih: list[Tensor],
        bias_hh: list[Tensor],
        h0: Tensor | None,
        batch_sizes: Tensor | None,
        reverse: list[bool],
    ) -> tuple[Tensor, Tensor]:
        """One layer, of whose number only subclasses make something."""
        return rnn_layer(
            x,
            weight_ih,
            weight_hh,
            bias_ih,
            bias_hh,
            h0,
            batch_sizes,
            reverse,
            self.nonlinearity,
            self.backend,
        )


class _TensorRNN(RNN):
    """What torch.jit.script makes of a bare RNN: its forward for a tensor alone."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._forward_tensor(input, hx)


class RNNCell(nn.RNNCellBase):
    """torch.nn.RNNCell: h' = f(x W_ih^T + b_ih + h W_hh^T + b_hh), one step.

    Contract, parameters and initialisation are torch.nn.RNNCell's; `nonlinearity` and `backend` as
    in RNN.

    Shapes: input (N, input_size) or (input_size,); hx (N, hidden_size) or (hidden_size,), zeros if
        None.
    Returns h', shaped like hx.

    >>> rnnkern.RNNCell(10, 20)(torch.randn(3, 10)).shape
    torch.Size([3, 20])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device=None,
        dtype=None,
        *,
        backend: str = "auto",
    ) -> None:
        check_backend(backend)
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity
        self.backend = backend
        self.__module__ = FX_LEAF

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Returns h'; see the class. Raises what torch.nn.RNNCell raises."""
        if input.dim() != 1 and input.dim() != 2:
            raise ValueError(f"RNNCell: Expected input to be 1D or 2D, got {input.dim()}D instead")
        if hx is not None and hx.dim() != 1 and hx.dim() != 2:
            raise ValueError(f"RNNCell: Expected hidden to be 1D or 2D, got {hx.dim()}D instead")
        if hx is not None and hx.dim() != input.dim():
            raise RuntimeError(
                f"RNNCell: Expected hidden to be {input.dim()}D like input, got {hx.dim()}D"
            )
        batched = input.dim() == 2
        if not batched:
            input = input.unsqueeze(0)
            hx = hx.unsqueeze(0) if hx is not None else None
        self._check(input, hx)
        h, _ = rnn_layer(
            input.unsqueeze(0),
            [self.weight_ih],
            [self.weight_hh],
            [self.bias_ih] if self.bias else [],
            [self.bias_hh] if self.bias else [],
            hx.unsqueeze(0) if hx is not None else None,
            None,
            [False],
            self.nonlinearity,
            self.backend,
        )
        return h.squeeze(0) if batched else h.squeeze(0).squeeze(0)

    def _check(self, input: Tensor, hx: Tensor | None) -> None:
        """What torch.nn.RNNCell refuses, with its exception."""
        if input.size(1) != self.input_size:
            raise RuntimeError(
                f"input has inconsistent input_size: got {input.size(1)}, "
                f"expected {self.input_size}"
            )
        if hx is not None and (hx.size(0) != input.size(0) or hx.size(1) != self.hidden_size):
            raise RuntimeError(
                f"Expected hidden {[input.size(0), self.hidden_size]}, got {list(hx.size())}"
            )
        weight = self.weight_ih
        autocast = False
        if not torch.jit.is_scripting():
            if self.nonlinearity not in ACTIVATIONS:
                raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
            autocast = torch._C._is_any_autocast_enabled()
        for tensor in [input] if hx is None else [input, hx]:
            same = tensor.dtype == weight.dtype or (autocast and tensor.is_floating_point())
            if not same or tensor.device != weight.device:
                raise RuntimeError(
                    f"Expected {weight.dtype} on {weight.device} like the weights, "
                    f"got {tensor.dtype} on {tensor.device}"
                )


def nonlinearity_of(module: nn.Module) -> str:
    """A layer's, rnnkern's or torch.nn's: by nn.RNN's mode, which is what its forward goes by."""
    if isinstance(module, nn.RNN):
        return "relu" if module.mode == "RNN_RELU" else "tanh"
    return module.nonlinearity


class SimpleRNN(ReferenceSimpleRNN):
    """The notebook's SimpleRNN, fused: same parameters, initialisation, state_dict and outputs.

    Beyond it: more layers (`upper_cells`, stacked on `rnn_cell`), other nonlinearities, a named
    backend.

    Shapes: input (B, T, input_size) -> outputs (B, T, output_size) and the last one (B,
        output_size).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        backend: str = "auto",
    ) -> None:
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        check_backend(backend)
        super().__init__(input_size, hidden_size, output_size)
        self.num_layers = num_layers
        self.upper_cells = nn.ModuleList(
            BasicRNNCell(hidden_size, hidden_size) for _ in range(num_layers - 1)
        )
        self.nonlinearity = nonlinearity
        self.backend = backend

    def forward(self, input_seq: Tensor) -> tuple[Tensor, Tensor]:
        """Returns all outputs and the last one; see the class."""
        x = input_seq.transpose(0, 1)
        # Looking into an empty ModuleList is 2 us, of an epoch's 120 in the notebook's training.
        upper = self.upper_cells if self.num_layers > 1 else ()
        for cell in (self.rnn_cell, *upper):
            x, _ = rnn_layer(
                x,
                [cell.W_ih],
                [cell.W_hh],
                [cell.b_ih],
                [cell.b_hh],
                None,
                None,
                [False],
                self.nonlinearity,
                self.backend,
            )
        # x W_o + b_o as one batched product: of the ways to write it, the one of the fewest nodes.
        weight = self.W_o.expand(x.size(0), -1, -1)
        outputs = torch.baddbmm(self.b_o, x, weight).transpose(0, 1)
        return outputs, outputs.select(1, -1)
