"""8-bit weights: the op against the same integers in plain torch, the layers against float32."""

import copy

import pytest
import torch
from cases import needs_library
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkern
from rnnkern.parity import relative_error
from rnnkern.quantized import QuantizedRNN, quantize_weight
from rnnkern.reference import ACTIVATIONS, step_sizes

pytestmark = needs_library


def integers_in_torch(x_proj, h0, weight, scale, batch_sizes, reverse, nonlinearity):
    """rnn_scan_int8 by its definition; float64 holds every sum of products of bytes exactly."""
    sizes = step_sizes(x_proj, batch_sizes)
    starts = [sum(sizes[:t]) for t in range(len(sizes))]
    rows = x_proj.reshape(-1, x_proj.size(-1))
    out, hidden = torch.empty_like(rows), weight[0].size(0)
    for g, backwards in enumerate(reverse):
        columns, h = slice(g * hidden, (g + 1) * hidden), h0[g].clone()
        for t in reversed(range(len(sizes))) if backwards else range(len(sizes)):
            at = slice(starts[t], starts[t] + sizes[t])
            product = (h[: sizes[t]] * 127).round().double() @ weight[g].double().T
            a = rows[at, columns] + product.float() * (scale[g] / 127)
            h[: sizes[t]] = out[at, columns] = ACTIVATIONS[nonlinearity].f(a)
    return out.view(x_proj.shape)


@pytest.mark.parametrize("nonlinearity", ["tanh", "sigmoid"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("batch, hidden", [(1, 1), (3, 7), (1, 130), (17, 33), (33, 66), (64, 16)])
@pytest.mark.parametrize("steps", [6, 1])
def test_quantized_scan(batch, hidden, packed, nonlinearity, steps):
    reverse = [0, 1]
    sizes = torch.tensor([max(1, batch - t * batch // steps) for t in range(steps)])
    rows = (int(sizes.sum()),) if packed else (steps, batch)
    x_proj = torch.randn(*rows, 2 * hidden)
    h0 = torch.rand(2, batch, hidden) * 2 - 1
    weight, scale = zip(
        *(quantize_weight(torch.randn(hidden, hidden) / hidden**0.5) for _ in reverse), strict=True
    )
    arguments = (x_proj, h0, list(weight), list(scale), sizes if packed else None, reverse)
    h, h_n = torch.ops.rnnkern.rnn_scan_int8(*arguments, nonlinearity)
    right = integers_in_torch(*arguments, nonlinearity)
    # Where the two round a state at the edge of two bytes differently, one weight's worth.
    assert (h - right).abs().max() <= 2 * max(float(s.max()) for s in scale)
    assert relative_error(h, right) < 2e-3
    last = h[-batch:] if not packed else None
    if last is not None:
        assert torch.equal(h_n[0], h[-1, :, :hidden]) and torch.equal(h_n[1], h[0, :, hidden:])


@pytest.mark.parametrize("hidden", [5, 300])
@pytest.mark.parametrize("steps", [6, 1])
def test_no_state_is_one_of_zeros(steps, hidden):
    """At the first call, and when a packed weight is kept."""
    weight, scale = quantize_weight(torch.randn(hidden, hidden) / hidden**0.5)
    x_proj, h0 = torch.randn(steps, 3, hidden), torch.zeros(1, 3, hidden)
    scan = torch.ops.rnnkern.rnn_scan_int8
    for _ in range(3):
        got = scan(x_proj, None, [weight], [scale], None, [0], "tanh")
        right = scan(x_proj, h0, [weight], [scale], None, [0], "tanh")
        assert torch.equal(got[0], right[0]) and torch.equal(got[1], right[1])
    assert torch.allclose(got[0][0], x_proj[0].tanh(), atol=1e-6)


def test_quantized_weights_are_within_half_a_scale():
    weight = torch.randn(33, 33) * torch.logspace(-6, 6, 33)[:, None]
    weight[3] = 0
    q, scale = quantize_weight(weight)
    assert q.dtype == torch.int8 and int(q.abs().max()) == 127 and not q[3].any()
    assert ((weight - scale[:, None] * q).abs() <= scale[:, None] * 0.5001).all()


@pytest.mark.parametrize("make", [rnnkern.RNN, nn.RNN], ids=["rnnkern", "torch"])
@pytest.mark.parametrize("options", [{}, {"bias": False, "batch_first": True}])
def test_quantized_layers_are_near_the_float_ones(make, options):
    model = make(24, 96, 2, bidirectional=True, **options)
    before, x = copy.deepcopy(model), torch.randn(20, 5, 24)
    report = rnnkern.quantize(model)
    assert list(report.swapped) == [""] and 0 < report.swapped[""] < 0.01 and not report.left
    assert "quantized the model itself: weights within" in str(report)
    assert isinstance(model, QuantizedRNN) and not list(model.parameters())
    packed = pack_padded_sequence(x, [7, 20, 1, 3, 20], enforce_sorted=False)
    with torch.no_grad():
        for given in (x, packed) if not options else (x,):
            (got, got_n), (right, right_n) = model(given), before(given)
            got, right = getattr(got, "data", got), getattr(right, "data", right)
            assert 1e-5 < relative_error(got, right) < 0.02
            assert relative_error(got_n, right_n) < 0.02
    again = make(24, 96, 2, bidirectional=True, **options)
    rnnkern.quantize(again)
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(again(x)[0], model(x)[0])


def test_quantized_models_keep_what_they_cannot():
    half, relu = rnnkern.RNN(4, 4, dtype=torch.bfloat16), nn.RNN(4, 4, nonlinearity="relu")
    bound = nn.utils.parametrizations.weight_norm(rnnkern.RNN(4, 4), "weight_hh_l0")
    wild = rnnkern.RNN(4, 4)
    with torch.no_grad():
        wild.weight_hh_l0[0, 0] = float("inf")
    model = nn.ModuleList([half, relu, bound, wild, nn.LSTM(4, 4), rnnkern.RNN(4, 4)])
    report = rnnkern.quantize(model)
    assert list(report.swapped) == ["5"] and list(report.left) == ["0", "1", "2", "3"]
    for name, word in zip("0123", ["bfloat16", "relu", "parametrized", "finite"], strict=True):
        assert word in report.left[name]
    assert rnnkern.quantize(model).swapped == {}  # it is


def test_quantized_layers_refuse():
    rnn = rnnkern.RNN(3, 5)
    rnnkern.quantize(rnn)
    with pytest.raises(RuntimeError, match="expected inference"):
        rnn(torch.randn(2, 1, 3, requires_grad=True))
    x = torch.randn(2, 1, 3)
    with pytest.raises(RuntimeError, match="has a tangent"):
        torch.func.jvp(lambda x: rnn(x)[0], (x,), (x,))
    with pytest.raises(RuntimeError, match="expected inference"):
        torch.func.grad(lambda x: rnn(x)[0].sum())(x)
    with pytest.raises(ValueError, match=r"h0 within \[-1, 1\]"):
        rnn(torch.randn(2, 1, 3), torch.full((1, 1, 5), 1.5))
    with pytest.raises(RuntimeError, match="input_size"):
        rnn(torch.randn(2, 1, 4))
    q, scale = quantize_weight(torch.randn(5, 5))
    x = torch.randn(2, 1, 5)
    scan = torch.ops.rnnkern.rnn_scan_int8
    with pytest.raises(ValueError, match="tanh or sigmoid"):
        scan(x, None, [q], [scale], None, [0], "relu")
    with pytest.raises(TypeError, match="weight of dtype Char, got Float"):
        scan(x, None, [q.float()], [scale], None, [0], "tanh")
    with pytest.raises(TypeError, match="x_proj of dtype Float"):
        scan(x.double(), None, [q], [scale], None, [0], "tanh")
    with pytest.raises(ValueError, match="every scale to be"):
        scan(x, None, [q], [scale[:2]], None, [0], "tanh")


def test_quantized_weights_that_change_are_packed_anew():
    """The packed copy of a frozen weight is kept; not past a change of the weight or its scale."""
    rnn, x = rnnkern.RNN(8, 320), torch.randn(3, 1, 8)
    rnnkern.quantize(rnn)
    with torch.no_grad():
        first = [rnn(x)[0] for _ in range(3)]
        assert torch.equal(first[0], first[1]) and torch.equal(first[0], first[2])
        rnn.weight_hh_l0_scale.mul_(2)
        doubled = rnn(x)[0]
        assert relative_error(doubled, first[0]) > 1e-3
        rnn.weight_hh_l0.neg_()
        assert relative_error(rnn(x)[0], doubled) > 1e-3
    assert torch.equal(
        rnn(x)[0],
        torch.ops.rnnkern.rnn_scan_int8(
            nn.functional.linear(x, rnn.weight_ih_l0, rnn.bias_ih_l0 + rnn.bias_hh_l0),
            *(None, [rnn.weight_hh_l0.clone()], [rnn.weight_hh_l0_scale], None, [0], "tanh"),
        )[0],
    )


def test_quantized_layers_export_and_compile_shapes():
    rnn = rnnkern.RNN(3, 5, 2)
    rnnkern.quantize(rnn)
    meta = copy.deepcopy(rnn).to("meta")
    out, h_n = meta(torch.empty(4, 2, 3, device="meta"))
    assert out.shape == (4, 2, 5) and h_n.shape == (2, 2, 5)


def test_quantized_layers_under_autocast():
    """Their states stay float32; only the input products are rounded."""
    rnn, x, hx = rnnkern.RNN(24, 96, 2), torch.randn(20, 5, 24), torch.rand(2, 5, 96)
    rnnkern.quantize(rnn)
    with torch.no_grad():
        right = rnn(x, hx)
        for given in (x, x.bfloat16()):
            with torch.autocast("cpu"):
                got = rnn(given, hx.to(given.dtype))
            for a, b in zip(got, right, strict=True):
                assert a.dtype == torch.float32 and 0 < relative_error(a, b) < 0.02
