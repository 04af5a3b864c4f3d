"""accelerate(): models that were written for torch.nn.RNN."""

import copy
import io
import pickle

import pytest
import torch
from cases import assert_equal, needs_library
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnkern

pytestmark = needs_library

F64 = torch.float64


class Tagger(nn.Module):
    """Layers at several depths, one in two places, one in a plain list that modules() misses."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.RNN(3, 5, 2, bidirectional=True, batch_first=True, dropout=0.3)
        self.blocks = nn.ModuleDict({"a": nn.RNN(10, 4, nonlinearity="relu", bias=False)})
        self.shared = self.blocks["a"]
        self.cells = nn.ModuleList([nn.RNNCell(4, 4), nn.RNNCell(4, 4, nonlinearity="relu")])
        self.head = nn.Linear(4, 2)
        self.elsewhere = [self.encoder]

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out, _ = self.elsewhere[0](packed)
        out, h = self.shared(pad_packed_sequence(out)[0])
        h = h[0]
        for cell in self.cells:
            h = cell(out[-1], h)
        return self.head(h)


def step(model, optimizer):
    torch.manual_seed(5)  # of the dropout
    out = model(torch.randn(2, 6, 3, dtype=F64), torch.tensor([4, 6]))
    optimizer.zero_grad()
    out.square().sum().backward()
    optimizer.step()
    return [out.detach(), *(p.detach().clone() for p in model.parameters())]


def test_a_model_goes_on_as_if_nothing_had_happened():
    """In the middle of training, with the optimiser as it is: the same weights after more steps."""
    stock = Tagger().to(F64)
    ours = copy.deepcopy(stock)
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (stock, ours)]
    assert_equal(step(ours, optimizers[1]), step(stock, optimizers[0]))
    before = [id(p) for p in ours.parameters()]
    layers = dict(ours.named_modules())
    report = rnnkern.accelerate(ours)
    assert report.swapped == ["encoder", "blocks.a", "cells.0", "cells.1"] and report.left == {}
    assert [id(p) for p in ours.parameters()] == before
    assert all(layers[name] is module for name, module in ours.named_modules())
    assert type(ours.shared) is type(ours.elsewhere[0]) is rnnkern.RNN
    assert [type(cell) for cell in ours.cells] == [rnnkern.RNNCell] * 2
    for _ in range(3):
        assert_equal(step(ours, optimizers[1]), step(stock, optimizers[0]))
    assert ours.state_dict().keys() == stock.state_dict().keys()
    assert repr(ours) == repr(stock)
    again = rnnkern.accelerate(ours)
    assert again.swapped == [] and again.left == {}


def test_hooks_modes_and_own_attributes_stay():
    rnn, seen = nn.RNN(3, 5).eval(), []
    rnn.weight_hh_l0.requires_grad_(False)
    rnn.label = "mine"
    rnn.register_forward_hook(lambda *_: seen.append("forward"))
    rnn.register_forward_pre_hook(lambda *_: seen.append("before"))
    rnn.register_full_backward_hook(lambda *_: seen.append("backward"))
    rnn._register_state_dict_hook(lambda *_: seen.append("state"))
    assert rnnkern.accelerate(rnn).swapped == [""]
    assert type(rnn) is rnnkern.RNN and rnn.label == "mine" and not rnn.training
    assert not rnn.weight_hh_l0.requires_grad
    rnn(torch.randn(2, 1, 3, requires_grad=True))[0].sum().backward()
    rnn.state_dict()
    assert seen == ["before", "forward", "backward", "state"]


@pytest.mark.parametrize("parametrize", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrizations_stay(parametrize):
    stock = nn.RNN(3, 5, dtype=F64).eval()
    getattr(parametrizations, parametrize)(stock, "weight_hh_l0")
    ours = copy.deepcopy(stock)
    assert rnnkern.accelerate(ours).swapped == [""] and isinstance(ours, rnnkern.RNN)
    x = torch.randn(4, 2, 3, dtype=F64)
    for module in (ours, copy.deepcopy(ours)):
        assert_equal(module(x), stock(x))
        results = [
            torch.autograd.grad(m(x)[0].square().sum(), list(m.parameters()))
            for m in (module, stock)
        ]
        assert_equal(*results)
    nn.utils.parametrize.remove_parametrizations(ours, "weight_hh_l0")
    assert type(ours) is rnnkern.RNN
    assert_equal(ours(x), stock(x))


class Sub(nn.RNN):
    pass


def test_what_is_left_and_why():
    patched = nn.RNN(3, 3)
    patched.forward = lambda x: x
    bare = nn.RNN(3, 3)  # its weights come from elsewhere, as a hypernetwork's
    for name in [name for name, _ in bare.named_parameters()]:
        weight = getattr(bare, name).detach()
        delattr(bare, name)
        setattr(bare, name, weight)
    model = nn.ModuleDict(
        {
            "sub": Sub(3, 3),
            "lstm": nn.LSTM(3, 3),
            "cell": nn.GRUCell(3, 3),
            "patched": patched,
            "scripted": torch.jit.script(nn.Sequential(nn.RNN(3, 3))),
            "scripted cell": torch.jit.script(nn.RNNCell(3, 3)),
            "ours": torch.jit.script(nn.Sequential(rnnkern.RNN(3, 3))),
            "bare": bare,
            "complex": nn.RNN(3, 3, dtype=torch.complex64),
            "good": nn.RNN(3, 3),
        }
    )
    report = rnnkern.accelerate(model)
    assert report.swapped == ["good"]
    expected = {
        "sub": "a subclass, test_interop.Sub",
        "lstm": "it is a torch.nn.LSTM",
        "cell": "it is a torch.nn.GRUCell",
        "patched": "its forward was replaced",
        "scripted.0": "TorchScript has compiled it",
        "scripted cell": "TorchScript has compiled it",
        "bare": "it has no parameters",
        "complex": "cpu: it has no kernel for torch.complex64",
    }
    assert report.left.keys() == expected.keys()
    for name, why in expected.items():
        assert why in report.left[name], report.left[name]
        assert f"left {name}: " in str(report)
    assert type(model["sub"]) is Sub and type(model["complex"]) is nn.RNN
    assert str(rnnkern.accelerate(nn.Linear(1, 1))) == "there is no recurrent layer in the model"


def test_a_named_backend():
    model = nn.Sequential(nn.RNN(3, 3), nn.RNNCell(3, 3, dtype=torch.complex64))
    report = rnnkern.accelerate(model, backend="eager")
    assert report.swapped == ["0", "1"]
    assert {m.backend for m in model} == {"eager"}
    with pytest.raises(ValueError, match="backend must be 'auto' or one of .*'cuda9'"):
        rnnkern.accelerate(model, backend="cuda9")


def test_copies_pickles_and_checkpoints_afterwards():
    stock = nn.Sequential(nn.RNN(3, 5, 2))
    checkpoint = copy.deepcopy(stock.state_dict())
    ours = copy.deepcopy(stock)
    rnnkern.accelerate(ours)
    ours.load_state_dict(checkpoint)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    x = torch.randn(4, 2, 3)
    for model in (
        *(copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))),
        torch.load(file, weights_only=False),
    ):
        assert type(model[0]) is rnnkern.RNN
        assert_equal(model(x), stock(x), tolerance=1e-6)
    # The other way: what was pickled before the swap.
    old = pickle.loads(pickle.dumps(stock))
    assert rnnkern.accelerate(old).swapped == ["0"]
    assert_equal(old(x), stock(x), tolerance=1e-6)


def test_the_older_weight_norm_stays():
    """A hook that computes the weight, which is then no parameter, before every forward."""
    stock = nn.RNN(3, 5, dtype=F64)
    torch.nn.utils.weight_norm(stock, "weight_hh_l0")
    ours = nn.RNN(3, 5, dtype=F64)
    torch.nn.utils.weight_norm(ours, "weight_hh_l0")
    ours.load_state_dict(stock.state_dict())
    assert rnnkern.accelerate(ours).swapped == [""]
    x = torch.randn(4, 2, 3, dtype=F64)
    for _ in range(2):
        results = []
        for module in (ours, stock):
            outputs = module(x)
            value = sum(o.square().sum() for o in outputs)
            results.append([*outputs, *torch.autograd.grad(value, list(module.parameters()))])
            with torch.no_grad():
                module.weight_hh_l0_g.mul_(1.5)
        assert_equal(*results)
