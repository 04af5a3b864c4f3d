"""The definition against its own oracles: torch.nn.RNN, and the notebook's model by hand."""

import pytest
import torch
from cases import assert_equal
from torch.nn.utils.rnn import pack_padded_sequence

from rnnkern import reference

F64 = torch.float64
# Of the small SimpleRNN below, worked out with math.tanh.
EXPECTED = [[0.7913126, 1.3602459, -1.3780138], [-0.1872126, 0.3311151, 2.3672061]]


def torch_rnn(nonlinearity, bidirectional):
    """A torch.nn.RNN(3, 5) and its weights as lists over directions: w_ih, w_hh, b_ih, b_hh."""
    rnn = torch.nn.RNN(3, 5, nonlinearity=nonlinearity, bidirectional=bidirectional, dtype=F64)
    return rnn, [rnn._flat_weights[i::4] for i in range(4)]


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one-way", "two-way"])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_rnn_scan_is_torch_nn_rnn(nonlinearity, bidirectional, packed):
    rnn, (w_ih, w_hh, b_ih, b_hh) = torch_rnn(nonlinearity, bidirectional)
    x, directions = torch.randn(7, 4, 3, dtype=F64), 1 + bidirectional
    hx = torch.randn(directions, 4, 5, dtype=F64, requires_grad=True)
    sizes = None
    if packed:
        x = pack_padded_sequence(x, [2, 7, 1, 4], enforce_sorted=False)
        out, h_n = rnn(x, hx)
        out, sizes = out.data, x.batch_sizes
        h0 = hx.index_select(1, x.sorted_indices)
        x_data, back = x.data, x.unsorted_indices
    else:
        (out, h_n), h0, x_data, back = rnn(x, hx), hx, x, torch.arange(4)
    x_proj = reference.project(x_data, w_ih, b_ih, b_hh)
    reverse = [False, True][:directions]
    h, last = reference.rnn_scan(x_proj, h0, w_hh, sizes, reverse, nonlinearity)
    last = last.index_select(1, back)
    assert_equal([h, last], [out, h_n])
    grads = [torch.randn_like(h), torch.randn_like(last)]
    wanted = [hx, *rnn.parameters()]
    assert_equal(
        torch.autograd.grad([h, last], wanted, grads),
        torch.autograd.grad([out, h_n], wanted, grads),
    )


def test_linear_scan_is_the_tangent_of_torch_nn_rnn():
    """ds = linear_scan(d * dx_proj, d) with d = f'(h), by formula; here by forward mode."""
    rnn, (w_ih, w_hh, b_ih, b_hh) = torch_rnn("tanh", True)
    x, dx = torch.randn(2, 6, 4, 3, dtype=F64)
    hx, dhx = torch.randn(2, 2, 4, 5, dtype=F64)
    (h, _), (dh, _) = torch.func.jvp(rnn, (x, hx), (dx, dhx))
    d = reference.ACTIVATIONS["tanh"].df(h)
    du = d * reference.project(dx, w_ih, [], [])
    s = reference.linear_scan(du, d, dhx, w_hh, None, [False, True])
    assert_equal([s], [dh])


def test_linear_scan_by_hand():
    u = torch.tensor([[[1.0, 2.0]], [[0.5, -1.0]]])
    gain = torch.tensor([[[2.0, 0.5]], [[-1.0, 3.0]]])
    weight = torch.tensor([[1.0, 2.0], [0.0, -1.0]])
    s0 = torch.tensor([[[1.0, -2.0]]])
    # W s0 = (1 - 4, 2) = (-3, 2), so s_1 = (1 - 6, 2 + 1).
    # W s_1 = (-5 + 6, -3), so s_2 = (0.5 - 1, -1 - 9).
    s = reference.linear_scan(u, gain, s0, [weight], None, [False])
    assert s.tolist() == [[[-5.0, 3.0]], [[-0.5, -10.0]]]
    # In reverse the last step comes first: (0.5 + 3, -1 + 6), then (1 + 2 * 13.5, 2 - 2.5).
    s = reference.linear_scan(u, gain, s0, [weight], None, [True])
    assert s.tolist() == [[[28.0, -0.5]], [[3.5, 5.0]]]


@pytest.mark.parametrize("name", reference.ACTIVATIONS)
def test_activations(name):
    f, df = reference.ACTIVATIONS[name]
    torch_f = {"identity": lambda a: a, "softplus": torch.nn.functional.softplus}
    a = torch.tensor([-60.0, -3.0, -0.5, 0.25, 2.0, 19.0], dtype=F64, requires_grad=True)
    h = f(a)
    assert_equal([h], [torch_f.get(name, getattr(torch, name, None))(a)])
    assert_equal([df(h)], torch.autograd.grad(h.sum(), a))
    assert torch.autograd.gradcheck(f, a)


def test_relu_of_nan_is_nan_and_its_gradient_passes():
    a = torch.tensor([float("nan"), -1.0, 0.0, 1.0], requires_grad=True)
    h = reference.ACTIVATIONS["relu"].f(a)
    assert h.isnan().tolist() == [True, False, False, False]
    (grad,) = torch.autograd.grad(h, a, torch.ones(4))
    assert grad.tolist() == reference.ACTIVATIONS["relu"].df(h).tolist() == [1.0, 0.0, 0.0, 1.0]


def test_simple_rnn_is_the_notebooks():
    model = reference.SimpleRNN(1, 2, 1)
    names = [("W_o", (2, 1)), ("b_o", (1,)), ("rnn_cell.W_ih", (2, 1)), ("rnn_cell.b_ih", (2,))]
    names += [("rnn_cell.W_hh", (2, 2)), ("rnn_cell.b_hh", (2,))]
    assert [(n, tuple(p.shape)) for n, p in model.named_parameters()] == names
    assert all((p == 0).all() for n, p in model.named_parameters() if ".b_" in n or n == "b_o")
    values = [[[1.0], [-2.0]], [0.5], [[0.5], [-0.25]], [0.1, 0.2], [[0.3, -0.4], [0.6, 0.1]]]
    values += [[-0.3, 0.05]]
    model.load_state_dict({n: torch.tensor(v) for (n, _), v in zip(names, values, strict=True)})
    outputs, last = model(torch.tensor([[[1.0], [2.0], [-1.0]], [[0.0], [0.5], [3.0]]]))
    expected = torch.tensor(EXPECTED)
    torch.testing.assert_close(outputs.squeeze(-1), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(last, outputs[:, -1])


def test_simple_rnn_draws_as_the_notebook_did():
    """W ~ N(0, 1), in the order W_ih, W_hh, W_o."""
    torch.manual_seed(7)
    model = reference.SimpleRNN(3, 5, 2)
    torch.manual_seed(7)
    for weight in (model.rnn_cell.W_ih, model.rnn_cell.W_hh, model.W_o):
        assert torch.equal(weight, torch.randn(weight.shape))


def test_toy_data():
    torch.manual_seed(7)
    x, y = reference.toy_data(seq_len=6, batch_size=200)
    assert x.shape == y.shape == (200, 6, 1) and x.dtype == y.dtype == torch.float32
    assert torch.equal(y, x + 1)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert set(x[:, 0, 0].tolist()) == set(range(10))
    torch.manual_seed(7)
    assert torch.equal(x[:, :1], torch.randint(0, 10, (200, 1, 1)).float())
    assert reference.toy_data()[0].shape == (16, 5, 1)
