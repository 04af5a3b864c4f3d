"""torch.jit.script: saved, loaded where only torch and the library are, and trained there."""

import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from cases import assert_equal, needs_library
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkern

pytestmark = [needs_library, pytest.mark.filterwarnings("ignore:.torch.jit.*:DeprecationWarning")]

OPTIONS = {
    "1 layer": {},
    "2 layers": {"num_layers": 2, "dropout": 0.3},
    "two-way": {"num_layers": 2, "bidirectional": True},
    "batch first": {"batch_first": True, "nonlinearity": "relu"},
    "no bias": {"bias": False, "nonlinearity": "sigmoid"},
}


def script(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(module)


def grads(module, x, loss):
    outputs = module(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [*outputs, *torch.autograd.grad(loss(outputs), list(module.parameters()))]


def loss(outputs):
    return sum((o * o).sum() for o in outputs)


@pytest.mark.parametrize("options", OPTIONS)
def test_scripted_rnn(options):
    """With and without hx, batched and not; every gradient, twice (the second run is optimised)."""
    rnn = rnnkern.RNN(3, 5, dtype=torch.float64, **OPTIONS[options]).eval()
    scripted = script(rnn)
    states = rnn.num_layers * (1 + rnn.bidirectional)
    x, hx = (
        torch.randn(4, 4, 3, dtype=torch.float64),
        torch.randn(states, 4, 5, dtype=torch.float64),
    )
    for _ in range(2):
        assert_equal(grads(scripted, x, loss), grads(rnn, x, loss))
        assert_equal(scripted(x, hx), rnn(x, hx))
        assert_equal(scripted(x[0], hx[:, 0]), rnn(x[0], hx[:, 0]))
    for bad in (torch.zeros(4, 4, 2), torch.zeros(3), torch.zeros(4, 4, 3)):
        with pytest.raises(Exception, match="input|Expected|dtype"):
            scripted(bad)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu", "softplus"])
def test_scripted_rnn_cell(nonlinearity):
    cell = rnnkern.RNNCell(3, 5, nonlinearity=nonlinearity, dtype=torch.float64)
    scripted = script(cell)
    x, hx = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    for _ in range(2):
        assert_equal(grads(scripted, x, loss), grads(cell, x, loss))
        assert_equal([scripted(x, hx), scripted(x[0])], [cell(x, hx), cell(x[0])])


class Sub(rnnkern.RNN):
    """A user's subclass, of which anything may be overridden."""


def test_a_scripted_subclass():
    """For tensors; torch.nn.RNN's subclasses cannot be scripted at all."""
    rnn, x = Sub(3, 5), torch.randn(4, 2, 3)
    for scripted in (script(torch.nn.Sequential(rnn)), script(rnn)):
        assert_equal(scripted(x), rnn(x), tolerance=1e-6)


def test_scripted_with_the_weights_of_now():
    """Also after torch.nn.RNN's list of them has become old; and alone after in a model."""
    from torch.nn.utils import parametrizations, parametrize

    rnn, x = rnnkern.RNN(3, 5), torch.randn(4, 2, 3)
    parametrizations.weight_norm(rnn, "weight_hh_l0")
    with torch.no_grad():
        rnn.parametrizations.weight_hh_l0.original0.mul_(2)
    parametrize.remove_parametrizations(rnn, "weight_hh_l0")
    for scripted in (script(torch.nn.Sequential(rnn)), script(rnn)):
        assert_equal(scripted(x), rnn(x))


class Model(torch.nn.Module):
    """A scripted user's module: the functions, packed rows and the layer together."""

    def __init__(self):
        super().__init__()
        self.rnn = rnnkern.RNN(3, 5, dtype=torch.float64)
        self.weight = torch.nn.Parameter(torch.eye(5, dtype=torch.float64) / 2)

    def forward(self, x: torch.Tensor, h0: torch.Tensor, sizes: torch.Tensor):
        h, _ = self.rnn(x.unsqueeze(1))
        h, h_n = rnnkern.rnn_scan(h.squeeze(1), [self.weight], h0, sizes, [True])
        return rnnkern.linear_scan(h, h * h, [self.weight], None, sizes), h_n


def test_scripted_functions():
    model = Model()
    packed = pack_padded_sequence(torch.randn(4, 3, 3, dtype=torch.float64), [4, 2, 1])
    inputs = (packed.data, torch.randn(1, 3, 5, dtype=torch.float64), packed.batch_sizes)
    wanted = list(model.parameters())
    results = []
    for module in (script(model), model):
        outputs = module(*inputs)
        results.append([*outputs, *torch.autograd.grad(loss(outputs), wanted)])
    assert_equal(*results)


def test_traced_rnn_at_another_shape():
    rnn = rnnkern.RNN(3, 5, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(rnn, torch.randn(4, 2, 3))
    x = torch.randn(7, 3, 3)
    assert_equal(traced(x), rnn(x), tolerance=1e-6)


FRESH = """
    import sys, torch
    assert "rnnkern" not in sys.modules
    torch.ops.load_library(sys.argv[1])
    results = {}
    for name in sys.argv[3:]:
        module = torch.jit.load(f"{sys.argv[2]}/{name}.pt")
        x = torch.load(f"{sys.argv[2]}/{name}.input")
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for step in range(3):
            out = module(x)
            out = out if isinstance(out, tuple) else (out,)
            if step == 0:
                results[name] = [o.detach() for o in out]
            optimizer.zero_grad()
            sum((o * o).sum() for o in out).backward()
            if step == 0:
                results[name] += [p.grad.clone() for p in module.parameters()]
            optimizer.step()
        results[name] += [p.detach() for p in module.parameters()]
    assert "rnnkern" not in sys.modules
    torch.save(results, f"{sys.argv[2]}/results")
"""


@pytest.mark.processes
def test_saved_and_trained_in_a_process_without_the_package(tmp_path):
    modules = {f"rnn{i}": rnnkern.RNN(3, 5, **o) for i, o in enumerate(OPTIONS.values())}
    modules["cell"] = rnnkern.RNNCell(3, 5)
    for name, module in modules.items():
        module.double().eval()
        script(module).save(tmp_path / f"{name}.pt")
        x = torch.randn(*([4, 3] if name == "cell" else [6, 4, 3]), dtype=torch.float64)
        torch.save(x, tmp_path / f"{name}.input")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(FRESH)]
        + [rnnkern.library.path, str(tmp_path), *modules],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    results = torch.load(tmp_path / "results")
    for name, module in modules.items():
        x = torch.load(tmp_path / f"{name}.input")
        right = grads(module, x, loss)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            out = module(x)
            loss(out if isinstance(out, tuple) else (out,)).backward()
            optimizer.step()
        assert_equal(results[name], [*right, *module.parameters()])
