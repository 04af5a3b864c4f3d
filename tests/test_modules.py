"""RNN and RNNCell against torch.nn's, every option and error; SimpleRNN against the notebook's."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from cases import BACKENDS, TOLERANCES, assert_equal, needs_library, relative_error
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import rnnkern
from rnnkern import reference

I, H, T, B = 3, 5, 6, 4  # noqa: E741
F64, Tensor = torch.float64, torch.Tensor
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
CLASSES = {
    "RNN": (rnnkern.RNN, nn.RNN),
    "RNNCell": (rnnkern.RNNCell, nn.RNNCell),
}
of_both_classes = pytest.mark.parametrize("name", CLASSES)


def twins(ours, stock, *args, seed=3, **kwargs):
    """The two modules, each initialised under the same seed."""
    made = []
    for module in (ours, stock):
        torch.manual_seed(seed)
        made.append(module(*args, **kwargs))
    return made


def flat(output):
    """A module's output as tensors: PackedSequences by their parts."""
    if isinstance(output, Tensor):
        return [output]
    return [t for o in output for t in ([o] if isinstance(o, Tensor) else o) if t is not None]


def outputs_and_grads(module, *inputs):
    """The outputs, and the gradients of all inputs and parameters for a fixed loss."""
    inputs = [None if i is None else i.detach().requires_grad_() for i in inputs]
    outputs = flat(module(*inputs))
    wanted = [i for i in inputs if i is not None] + list(module.parameters())
    return [*outputs, *torch.autograd.grad(weighted(outputs), wanted)]


def weighted(outputs):
    generator = torch.Generator().manual_seed(1)
    return sum(
        (o * torch.randn(o.shape, generator=generator, dtype=F64).to(o.dtype)).sum()
        for o in outputs
        if o.is_floating_point()
    )


# ---- the option grid ----

GRID = {
    "num_layers": [1, 2, 3],
    "nonlinearity": ["tanh", "relu"],
    "bias": [True, False],
    "batch_first": [False, True],
    "bidirectional": [False, True],
}


def options_of(choice):
    return dict(zip(GRID, choice, strict=True))


def name_of(choice):
    o = options_of(choice)
    flags = [n for n in ("bias", "batch_first", "bidirectional") if o[n]]
    return "-".join([str(o["num_layers"]), o["nonlinearity"], *flags])


in_every_option = pytest.mark.parametrize(
    "choice", list(itertools.product(*GRID.values())), ids=name_of
)


@in_every_option
@on_every_backend
def test_rnn_over_the_grid(backend, choice):
    """Batched, unbatched and packed, hx given and not: outputs, h_n and every gradient."""
    options = options_of(choice)
    ours, stock = twins(rnnkern.RNN, nn.RNN, I, H, dtype=F64, **options)
    ours.backend = backend
    states = options["num_layers"] * (1 + options["bidirectional"])
    x, hx = torch.randn(T, B, I, dtype=F64), torch.randn(states, B, H, dtype=F64)
    if options["batch_first"]:
        x = x.transpose(0, 1).contiguous()
    for inputs in ((x, None), (x, hx), (x[0], None), (x[0], hx[:, 0])):
        right = outputs_and_grads(stock, *inputs)
        got = outputs_and_grads(ours, *inputs)
        assert_equal(got, right)
        assert [g.shape for g in got] == [r.shape for r in right]

    for lengths, is_sorted in (([6, 4, 4, 1], True), ([1, 6, 2, 4], False)):
        results = []
        for module in (ours, stock):
            for state in (None, hx.clone().requires_grad_()):
                leaf = x.clone().requires_grad_()
                packed = pack_padded_sequence(leaf, lengths, options["batch_first"], is_sorted)
                out, h_n = module(packed, state)
                assert isinstance(out, PackedSequence)
                wanted = [leaf, *([] if state is None else [state]), *module.parameters()]
                parts = flat([out, h_n])
                results.append([*parts, *torch.autograd.grad(weighted(parts), wanted)])
        ours_none, ours_hx, stock_none, stock_hx = results
        assert_equal(ours_none, stock_none)
        assert_equal(ours_hx, stock_hx)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@on_every_backend
def test_rnn_cell_over_the_grid(backend, bias, nonlinearity):
    ours, stock = twins(
        rnnkern.RNNCell, nn.RNNCell, I, H, bias=bias, nonlinearity=nonlinearity, dtype=F64
    )
    ours.backend = backend
    x, hx = torch.randn(B, I, dtype=F64), torch.randn(B, H, dtype=F64)
    for inputs in ((x, None), (x, hx), (x[0], None), (x[0], hx[0]), (x[:0], hx[:0]), (x[:0], None)):
        got, right = outputs_and_grads(ours, *inputs), outputs_and_grads(stock, *inputs)
        assert_equal(got, right)
        assert [g.shape for g in got] == [r.shape for r in right]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    "name, packed",
    [("RNN", False), ("RNN", True), ("RNNCell", False)],
    ids=["RNN", "packed", "cell"],
)
@on_every_backend
def test_dtypes(backend, name, packed, dtype):
    """Within the tolerance rule: half types as near to float64 as torch's, within a factor 2."""
    kwargs = {"num_layers": 2, "bidirectional": True} if name == "RNN" else {}
    ours, stock = twins(*CLASSES[name], I, 33, dtype=dtype, **kwargs)
    ours.backend = backend
    exact = CLASSES[name][1](I, 33, dtype=F64, **kwargs)
    exact.load_state_dict({n: p.double() for n, p in stock.state_dict().items()})
    x = torch.randn(*([7, 9, I] if name == "RNN" else [9, I])).to(dtype)

    def run(module, x):
        if not packed:
            return outputs_and_grads(module, x)
        outputs = flat(module(pack_padded_sequence(x, [7, 7, 6, 5, 5, 3, 1, 1, 1])))
        return [*outputs, *torch.autograd.grad(weighted(outputs), list(module.parameters()))]

    right = run(exact, x.double())
    for a, b, r in zip(run(ours, x), run(stock, x), right, strict=True):
        assert a.dtype == b.dtype
        allowed = TOLERANCES[dtype].allowed(relative_error(b, r))
        assert relative_error(a, r) <= allowed


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one-way", "two-way"])
@on_every_backend
def test_dropout_draws_the_same_masks(backend, bidirectional):
    ours, stock = twins(
        rnnkern.RNN, nn.RNN, I, H, 3, dropout=0.4, bidirectional=bidirectional, dtype=F64
    )
    ours.backend = backend
    x = torch.randn(T, B, I, dtype=F64)
    packed = pack_padded_sequence(x, [6, 5, 3, 3])
    for training in (True, False):
        results = []
        for module in (ours, stock):
            module.train(training)
            torch.manual_seed(11)
            results.append(outputs_and_grads(module, x) + flat(module(packed)))
        assert_equal(*results)
    ours.train()
    assert not torch.equal(ours(x)[0], ours(x)[0])


# ---- parameters ----


@in_every_option
def test_same_parameters_under_the_same_seed(choice):
    ours, stock = twins(rnnkern.RNN, nn.RNN, I, H, **options_of(choice))
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in stock.named_parameters()]
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(ours.parameters(), stock.parameters(), strict=True)
    )
    assert ours.all_weights[0][0] is ours.weight_ih_l0
    torch.manual_seed(8)
    ours.reset_parameters()
    torch.manual_seed(8)
    stock.reset_parameters()
    assert all(
        torch.equal(a, b) for a, b in zip(ours.parameters(), stock.parameters(), strict=True)
    )


@of_both_classes
def test_state_dicts_load_both_ways(name):
    kwargs = {"num_layers": 2, "bidirectional": True} if name == "RNN" else {}
    ours, stock = (c(I, H, dtype=F64, **kwargs) for c in CLASSES[name])
    x = torch.randn(*([T, B, I] if name == "RNN" else [B, I]), dtype=F64)
    ours.load_state_dict(stock.state_dict())
    assert_equal(flat(ours(x)), flat(stock(x)))
    other = CLASSES[name][0](I, H, dtype=F64, **kwargs)
    stock.load_state_dict(other.state_dict())
    assert_equal(flat(other(x)), flat(stock(x)))
    with pytest.raises(RuntimeError, match="size mismatch"):
        ours.load_state_dict(CLASSES[name][1](I, H + 1, **kwargs).state_dict())


@of_both_classes
def test_repr_is_torchs(name):
    for kwargs in ({}, {"bias": False}, {"nonlinearity": "relu"}):
        ours, stock = twins(*CLASSES[name], I, H, **kwargs)
        if name == "RNNCell":
            assert repr(ours) == repr(stock)
        for word in ("RNN", f"{I}, {H}", *(f"{k}={v}" for k, v in kwargs.items() if k == "bias")):
            assert word in repr(ours), repr(ours)
    assert "num_layers=2, batch_first=True, dropout=0.5, bidirectional=True" in repr(
        rnnkern.RNN(I, H, 2, batch_first=True, dropout=0.5, bidirectional=True)
    )


@of_both_classes
def test_copies(name):
    """deepcopy, pickle, torch.save: the copy computes the same, and shares nothing."""
    module = CLASSES[name][0](I, H, nonlinearity="relu", backend="eager", dtype=F64)
    x = torch.randn(*([T, B, I] if name == "RNN" else [B, I]), dtype=F64)
    right = outputs_and_grads(module, x)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (
        copy.deepcopy(module),
        copy.copy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(file, weights_only=False),
    ):
        assert_equal(outputs_and_grads(other, x), right)
        assert (other.nonlinearity, other.backend) == ("relu", "eager")
    other = copy.deepcopy(module)
    nn.init.zeros_(next(other.parameters()))
    assert_equal(outputs_and_grads(module, x), right)


@of_both_classes
def test_moving(name):
    """to(dtype), to("meta"), half(), to_empty(): parameters that are replaced are the ones used."""
    ours, stock = twins(*CLASSES[name], I, H)
    x = torch.randn(*([T, B, I] if name == "RNN" else [B, I]))
    assert_equal(
        outputs_and_grads(ours.double(), x.double()), outputs_and_grads(stock.double(), x.double())
    )
    assert flat(ours.bfloat16()(x.bfloat16()))[0].dtype == torch.bfloat16
    on_meta = ours.float().to("meta")
    assert [o.device.type for o in flat(on_meta(x.to("meta")))] == ["meta"] * len(
        flat(stock.float()(x))
    )
    again = on_meta.to_empty(device="cpu")
    again.load_state_dict(stock.state_dict())
    assert_equal(outputs_and_grads(again, x), outputs_and_grads(stock, x), tolerance=1e-6)


def test_constructor_arguments_by_position():
    ours, stock = twins(rnnkern.RNN, nn.RNN, I, H, 2, "relu", False, True, 0.5, True)
    for name in ("num_layers", "nonlinearity", "bias", "batch_first", "dropout", "bidirectional"):
        assert getattr(ours, name) == getattr(stock, name)
    ours, stock = twins(rnnkern.RNNCell, nn.RNNCell, I, H, False, "relu")
    assert ours.nonlinearity == stock.nonlinearity and ours.bias == stock.bias
    assert rnnkern.RNN(I, H, device="meta", dtype=F64).weight_hh_l0.device.type == "meta"


def test_forward_arguments_by_name():
    ours, stock = twins(rnnkern.RNN, nn.RNN, I, H, dtype=F64)
    x, hx = torch.randn(T, B, I, dtype=F64), torch.randn(1, B, H, dtype=F64)
    assert_equal(ours(input=x, hx=hx), stock(input=x, hx=hx))
    ours, stock = twins(rnnkern.RNNCell, nn.RNNCell, I, H, dtype=F64)
    assert_equal([ours(input=x[0], hx=hx[0])], [stock(input=x[0], hx=hx[0])])


# ---- what torch does to a module's parameters ----


@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True}], ids=["1", "2x2"]
)
@on_every_backend
def test_weight_norm(backend, options):
    """A parametrised weight is used as it is now, and the gradient reaches the originals."""
    from torch.nn.utils import parametrizations

    modules = twins(rnnkern.RNN, nn.RNN, I, H, dtype=F64, **options)
    modules[0].backend = backend
    x = torch.randn(T, B, I, dtype=F64)
    for rnn in modules:
        parametrizations.weight_norm(rnn, "weight_hh_l0")
        with torch.no_grad():
            rnn.parametrizations.weight_hh_l0.original0.mul_(1.5)
    got, right = modules
    names = [n for n, _ in got.named_parameters()]
    assert any("original1" in n for n in names)
    expected = nn.RNN(I, H, dtype=F64, **options)
    weights = {n: p for n, p in right.named_parameters() if "parametrizations" not in n}
    weights["weight_hh_l0"] = torch._weight_norm(
        right.parametrizations.weight_hh_l0.original1,
        right.parametrizations.weight_hh_l0.original0,
        0,
    )
    outputs = torch.func.functional_call(expected, weights, (x,))
    wanted = [dict(right.named_parameters())[n] for n in names]
    grads = torch.autograd.grad(weighted(outputs), wanted)
    assert_equal(outputs_and_grads(got, x)[2 + 1 :], grads)
    assert_equal(got(x), outputs)


def test_pruning_spectral_norm_and_old_weight_norm():
    from torch.nn.utils import prune

    x = torch.randn(T, B, I, dtype=F64)
    ours, stock = twins(rnnkern.RNN, nn.RNN, I, H, dtype=F64)
    mask = (torch.rand(H, H) > 0.4).to(F64)
    prune.custom_from_mask(ours, "weight_hh_l0", mask)
    with torch.no_grad():
        stock.weight_hh_l0.mul_(mask)
    assert_equal(ours(x), stock(x))
    (grad,) = torch.autograd.grad(ours(x)[0].sum(), ours.weight_hh_l0_orig)
    (right,) = torch.autograd.grad(stock(x)[0].sum(), stock.weight_hh_l0)
    assert_equal([grad], [right * mask])
    prune.remove(ours, "weight_hh_l0")
    assert_equal(ours(x), stock(x))


@of_both_classes
def test_functional_call(name):
    ours, stock = (c(I, H, dtype=F64) for c in CLASSES[name])
    x = torch.randn(*([T, B, I] if name == "RNN" else [B, I]), dtype=F64)
    weights = {n: torch.randn_like(p) for n, p in stock.named_parameters()}

    def call(module, weights):
        return weighted(flat(torch.func.functional_call(module, weights, (x,))))

    results = [torch.func.grad(lambda w, m=m: call(m, w))(weights) for m in (ours, stock)]
    assert_equal(results[0].values(), results[1].values())


@of_both_classes
def test_skip_init_and_a_replaced_parameter(name):
    ours = nn.utils.skip_init(CLASSES[name][0], I, H)
    stock = CLASSES[name][1](I, H)
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(*([T, B, I] if name == "RNN" else [B, I]))
    assert_equal(flat(ours(x)), flat(stock(x)), tolerance=1e-6)
    which = "weight_hh_l0" if name == "RNN" else "weight_hh"
    for module in (ours, stock):
        setattr(module, which, nn.Parameter(torch.eye(H) / 2))
    assert_equal(flat(ours(x)), flat(stock(x)), tolerance=1e-6)


def test_make_fx():
    from torch.fx.experimental.proxy_tensor import make_fx

    rnn, x = rnnkern.RNN(I, H, 2), torch.randn(T, B, I)
    assert_equal(make_fx(rnn)(x)(x), rnn(x))


def test_jacobians_by_rows_and_by_columns_agree():
    """Reverse-mode Jacobians row by row and forward-mode ones column by column."""
    rnn, x = rnnkern.RNN(2, 3, dtype=F64), torch.randn(3, 1, 2, dtype=F64)
    function = lambda x: rnn(x)[0]  # noqa: E731
    by_rows = torch.autograd.functional.jacobian(function, x)
    columns = [
        torch.func.jvp(function, (x,), (e.view(x.shape),))[1] for e in torch.eye(6, dtype=F64)
    ]
    assert_equal([by_rows.reshape(9, 6)], [torch.stack([c.flatten() for c in columns], 1)])


# ---- what is refused ----


def raised(function):
    """The exception, or None."""
    try:
        function()
    except Exception as error:
        return error
    return None


def same_type(ours, stock):
    """Both fail, with the same type of exception."""
    got, right = raised(ours), raised(stock)
    assert right is not None, "torch raises nothing here: the case belongs elsewhere"
    assert type(got) is type(right), f"{got!r}\nis not torch's\n{right!r}"
    assert str(got)


def z(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(*shape, dtype=dtype, device=device)


X, HX = z(T, B, I), z(1, B, H)
PACKED = pack_padded_sequence(X, [6, 5, 3, 3])
RNN_CALLS = {
    "1-D input": lambda m: m(z(I)),
    "0-D input": lambda m: m(z()),
    "4-D input": lambda m: m(z(2, T, B, I)),
    "input size": lambda m: m(z(T, B, I + 1)),
    "unbatched input size": lambda m: m(z(T, I + 1)),
    "no features": lambda m: m(z(T, B, 0)),
    "no steps": lambda m: m(z(0, B, I)),
    "no steps, hx": lambda m: m(z(0, B, I), HX),
    "no steps unbatched": lambda m: m(z(0, I)),
    "no steps no batch": lambda m: m(z(0, 0, I)),
    "float64 input": lambda m: m(X.double()),
    "half input": lambda m: m(X.half()),
    "int input": lambda m: m(X.long()),
    "bool input": lambda m: m(X.bool()),
    "complex input": lambda m: m(X.to(torch.complex64)),
    "meta input": lambda m: m(X.to("meta")),
    "float64 hx": lambda m: m(X, HX.double()),
    "int hx": lambda m: m(X, HX.long()),
    "meta hx": lambda m: m(X, HX.to("meta")),
    "hx layers": lambda m: m(X, z(2, B, H)),
    "hx batch": lambda m: m(X, z(1, B + 1, H)),
    "hx batch of 1": lambda m: m(X, z(1, 1, H)),
    "hx hidden": lambda m: m(X, z(1, B, H + 1)),
    "2-D hx": lambda m: m(X, z(1, H)),
    "4-D hx": lambda m: m(X, z(1, 1, B, H)),
    "3-D hx unbatched": lambda m: m(X[:, 0], HX),
    "1-D hx unbatched": lambda m: m(X[:, 0], z(H)),
    "hx hidden unbatched": lambda m: m(X[:, 0], z(1, H + 1)),
    "None": lambda m: m(None),
    "no arguments": lambda m: m(),
    "a list": lambda m: m([X]),
    "hx a tuple": lambda m: m(X, (HX, HX)),
    "hx a number": lambda m: m(X, 1.0),
    "packed input size": lambda m: m(pack_sequence([z(3, I + 1)])),
    "packed float64": lambda m: m(pack_sequence([z(3, I).double()])),
    "packed hx batch": lambda m: m(PACKED, z(1, B + 1, H)),
    "packed hx layers": lambda m: m(PACKED, z(2, B, H)),
    "packed hx hidden": lambda m: m(PACKED, z(1, B, H + 1)),
    "packed 2-D hx": lambda m: m(PACKED, z(B, H)),
    "packed float64 hx": lambda m: m(PACKED, HX.double()),
    "packed 3-D data": lambda m: m(PackedSequence(z(4, 2, I), torch.tensor([2, 2]))),
    "packed 1-D data": lambda m: m(PackedSequence(z(4), torch.tensor([2, 2]))),
}


@pytest.mark.parametrize("case", RNN_CALLS)
@on_every_backend
def test_rnn_refuses_as_torch_does(backend, case):
    ours, stock = twins(rnnkern.RNN, nn.RNN, I, H)
    ours.backend = backend
    same_type(lambda: RNN_CALLS[case](ours), lambda: RNN_CALLS[case](stock))


@pytest.mark.parametrize("hx", [None, z(1, 2, H)], ids=["no hx", "hx"])
@pytest.mark.parametrize("rows, sizes", [(5, [2, 2]), (5, [2, 3]), (4, [2.0, 2.0]), (4, [4, 0])])
@on_every_backend
def test_a_packed_sequence_that_is_none(backend, rows, sizes, hx):
    """Made by hand, and wrong: torch stumbles over it somewhere; here a ValueError says so."""
    rnn, sizes = rnnkern.RNN(I, H, backend=backend), torch.tensor(sizes)
    if sizes[0] != 2 and hx is not None:
        hx = z(1, 4, H)
    with pytest.raises(ValueError, match="expected batch_sizes"):
        rnn(PackedSequence(z(rows, I), sizes), hx)


def test_a_packed_sequence_of_nothing():
    for make in (rnnkern.RNN, nn.RNN):
        with pytest.raises((RuntimeError, IndexError)):
            make(I, H)(PackedSequence(z(0, I), torch.tensor([], dtype=torch.int64)))


CX, CH = z(B, I), z(B, H)
CELL_CALLS = {
    "0-D input": lambda m: m(z()),
    "3-D input": lambda m: m(z(1, B, I)),
    "input size": lambda m: m(z(B, I + 1)),
    "unbatched input size": lambda m: m(z(I + 1)),
    "0-D hx": lambda m: m(CX, z()),
    "3-D hx": lambda m: m(CX, z(1, B, H)),
    "hx batch": lambda m: m(CX, z(B + 1, H)),
    "hx batch of 1": lambda m: m(CX, z(1, H)),
    "hx hidden": lambda m: m(CX, z(B, H + 1)),
    "1-D hx": lambda m: m(CX, z(H)),
    "2-D hx unbatched": lambda m: m(CX[0], CH),
    "2-D hx of one row unbatched": lambda m: m(CX[0], CH[:1]),
    "float64 input": lambda m: m(CX.double()),
    "half input": lambda m: m(CX.half()),
    "int input": lambda m: m(CX.long()),
    "float64 hx": lambda m: m(CX, CH.double()),
    "int hx": lambda m: m(CX, CH.long()),
    "meta input": lambda m: m(CX.to("meta"), CH),
    "meta hx": lambda m: m(CX, CH.to("meta")),
    "None": lambda m: m(None),
    "no arguments": lambda m: m(),
    "a list": lambda m: m([CX]),
    "a packed sequence": lambda m: m(PACKED),
}


@pytest.mark.parametrize("case", CELL_CALLS)
@on_every_backend
def test_rnn_cell_refuses_as_torch_does(backend, case):
    ours, stock = twins(rnnkern.RNNCell, nn.RNNCell, I, H)
    ours.backend = backend
    same_type(lambda: CELL_CALLS[case](ours), lambda: CELL_CALLS[case](stock))


CONSTRUCTIONS = {
    "hidden 0": lambda c: c(I, 0),
    "hidden negative": lambda c: c(I, -1),
    "hidden float": lambda c: c(I, 5.0),
    "hidden str": lambda c: c(I, "5"),
    "layers 0": lambda c: c(I, H, 0),
    "layers negative": lambda c: c(I, H, num_layers=-2),
    "dropout 2": lambda c: c(I, H, 2, dropout=2.0),
    "dropout negative": lambda c: c(I, H, 2, dropout=-0.1),
    "dropout str": lambda c: c(I, H, 2, dropout="0.5"),
    "dropout bool": lambda c: c(I, H, 2, dropout=True),
    "nonlinearity": lambda c: c(I, H, nonlinearity="gelu"),
    "nonlinearity by position": lambda c: c(I, H, 1, "gelu"),
    "nonlinearity None": lambda c: c(I, H, nonlinearity=None),
    "proj_size": lambda c: c(I, H, proj_size=2),
    "proj_size 0": lambda c: c(I, H, proj_size=0),
    "unknown argument": lambda c: c(I, H, layers=2),
    "no arguments": lambda c: c(),
    "input alone": lambda c: c(I),
    "mode": lambda c: c(I, H, mode="RNN_TANH"),
    "twice": lambda c: c(I, H, 2, num_layers=2),
    "too many": lambda c: c(I, H, 1, "tanh", True, False, 0.0, False, None, None, None),
    "int dtype": lambda c: c(I, H, dtype=torch.int64),
    "device": lambda c: c(I, H, device="nowhere"),
    "input negative": lambda c: c(-1, H),
    "input str": lambda c: c("3", H),
}


@pytest.mark.parametrize("case", CONSTRUCTIONS)
def test_rnn_constructor_refuses_as_torchs_does(case):
    make = CONSTRUCTIONS[case]
    same_type(lambda: make(rnnkern.RNN), lambda: make(nn.RNN))


CELL_CONSTRUCTIONS = {
    "hidden negative": lambda c: c(I, -1),
    "hidden str": lambda c: c(I, "5"),
    "nonlinearity": lambda c: c(I, H, nonlinearity="gelu")(CX),
    "proj_size": lambda c: c(I, H, proj_size=2),
    "num_layers": lambda c: c(I, H, num_layers=2),
    "no arguments": lambda c: c(),
    "twice": lambda c: c(I, H, True, bias=True),
    "int dtype": lambda c: c(I, H, dtype=torch.int64),
    "device": lambda c: c(I, H, device="nowhere"),
}


@pytest.mark.parametrize("case", CELL_CONSTRUCTIONS)
def test_rnn_cell_constructor_refuses_as_torchs_does(case):
    make = CELL_CONSTRUCTIONS[case]
    same_type(lambda: make(rnnkern.RNNCell), lambda: make(nn.RNNCell))


ACCEPTED = {
    "no rows": lambda m: m(z(T, 0, I)),
    "no rows, hx": lambda m: m(z(T, 0, I), z(1, 0, H)),
    "one step": lambda m: m(z(1, B, I)),
    "one row": lambda m: m(z(T, 1, I)),
    "one step unbatched": lambda m: m(z(1, I)),
    "expanded": lambda m: m(z(1, 1, I).expand(T, B, I)),
    "transposed": lambda m: m(z(B, T, I).transpose(0, 1)),
}


@pytest.mark.parametrize("case", ACCEPTED)
@on_every_backend
def test_rnn_accepts_as_torch_does(backend, case):
    ours, stock = twins(rnnkern.RNN, nn.RNN, I, H)
    ours.backend = backend
    got, right = ACCEPTED[case](ours), ACCEPTED[case](stock)
    assert_equal(got, right, tolerance=1e-6)
    assert [g.shape for g in got] == [r.shape for r in right]


def test_dropout_on_one_layer_warns_as_torchs_does():
    for rnn in (rnnkern.RNN, nn.RNN):
        with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
            rnn(I, H, dropout=0.5)


# ---- beyond torch ----


@pytest.mark.parametrize("nonlinearity", reference.ACTIVATIONS)
@on_every_backend
def test_every_nonlinearity(backend, nonlinearity):
    """Against the layer written out, two layers in two directions."""
    f = reference.ACTIVATIONS[nonlinearity].f
    rnn = rnnkern.RNN(I, H, 2, nonlinearity, bidirectional=True, dtype=F64, backend=backend)
    x = torch.randn(T, B, I, dtype=F64)
    layer, finals = x, []
    for number in range(2):
        sides = []
        for suffix in ("", "_reverse"):
            w_ih, w_hh, b_ih, b_hh = (
                getattr(rnn, f"{name}_l{number}{suffix}")
                for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            h, out = torch.zeros(B, H, dtype=F64), []
            for x_t in layer.flip(0) if suffix else layer:
                h = f(x_t @ w_ih.t() + b_ih + h @ w_hh.t() + b_hh)
                out.append(h)
            finals.append(h)
            sides.append(torch.stack(out[::-1] if suffix else out))
        layer = torch.cat(sides, -1)
    right = [layer, torch.stack(finals)]
    grads = torch.autograd.grad(weighted(right), list(rnn.parameters()))
    got = list(rnn(x))
    assert_equal(got, right)
    assert_equal(torch.autograd.grad(weighted(got), list(rnn.parameters())), grads)
    cell = rnnkern.RNNCell(I, H, nonlinearity=nonlinearity, dtype=F64, backend=backend)
    assert_equal([cell(x[0])], [f(x[0] @ cell.weight_ih.t() + cell.bias_ih + cell.bias_hh)])


@of_both_classes
def test_every_backend_gives_the_same(name):
    x = torch.randn(*([T, B, I] if name == "RNN" else [B, I]), dtype=F64)
    results = []
    for backend in ("auto", "eager", "reference"):
        torch.manual_seed(5)
        module = CLASSES[name][0](I, H, backend=backend, dtype=F64)
        results.append(outputs_and_grads(module, x))
    assert_equal(results[0], results[2])
    assert_equal(results[1], results[2])


@of_both_classes
def test_a_backend_that_refuses_says_why(name):
    x = torch.randn(*([T, B, I] if name == "RNN" else [B, I]))
    module = CLASSES[name][0]
    with pytest.raises(ValueError, match="backend must be 'auto' or one of .*'cuda9'"):
        module(I, H, backend="cuda9")
    complex_relu = module(I, H, dtype=torch.complex64, nonlinearity="relu", backend="eager")
    with pytest.raises(ValueError, match="eager: relu is not defined for torch.complex64"):
        complex_relu(x.to(torch.complex64))


@needs_library
def test_the_cpu_backend_says_why_it_refuses():
    rnn = rnnkern.RNN(I, H, dtype=torch.complex64, backend="cpu")
    with pytest.raises(ValueError, match="cpu: it has no kernel for torch.complex64"):
        rnn(X.to(torch.complex64))


# ---- SimpleRNN ----


@on_every_backend
def test_simple_rnn_is_the_references(backend):
    """Same initialisation under a seed, state_dicts both ways, outputs and gradients."""
    made = []
    for module in (rnnkern.SimpleRNN, reference.SimpleRNN):
        torch.manual_seed(3)
        made.append(module(2, 7, 3))
    ours, right = made
    ours.backend = backend
    assert list(ours.state_dict()) == list(right.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(ours.parameters(), right.parameters(), strict=True)
    )
    x = torch.randn(B, T, 2)
    assert_equal(outputs_and_grads(ours, x), outputs_and_grads(right, x), tolerance=1e-5)
    other = reference.SimpleRNN(2, 7, 3)
    ours.load_state_dict(other.state_dict())
    assert_equal(ours(x), other(x), tolerance=1e-5)
    new = rnnkern.SimpleRNN(2, 7, 3)
    right.load_state_dict(new.state_dict())
    assert_equal(new(x), right(x), tolerance=1e-5)
    outputs, last = ours(x)
    assert outputs.shape == (B, T, 3) and last.shape == (B, 3)
    assert torch.equal(last, outputs[:, -1])


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@on_every_backend
def test_simple_rnn_of_two_layers(backend, nonlinearity):
    model = rnnkern.SimpleRNN(2, 7, 3, num_layers=2, nonlinearity=nonlinearity, backend=backend)
    model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.3)
    x = torch.randn(B, T, 2, dtype=F64)
    f = getattr(torch, nonlinearity)
    h = [torch.zeros(B, 7, dtype=F64)] * 2
    outputs = []
    for t in range(T):
        below = x[:, t]
        for layer, cell in enumerate([model.rnn_cell, model.upper_cells[0]]):
            h[layer] = f(below @ cell.W_ih.T + cell.b_ih + h[layer] @ cell.W_hh.T + cell.b_hh)
            below = h[layer]
        outputs.append(below @ model.W_o + model.b_o)
    right = [torch.stack(outputs, 1), outputs[-1]]
    assert_equal(model(x), right)
    wanted = list(model.parameters())
    assert_equal(
        torch.autograd.grad(weighted(model(x)), wanted),
        torch.autograd.grad(weighted(right), wanted),
    )
    with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
        rnnkern.SimpleRNN(2, 7, 3, num_layers=0)


# ---- packed weights that are kept ----


def written_through_data(rnn, weight):
    weight.data.mul_(0.5)


def written_in_place(rnn, weight):
    with torch.no_grad():
        weight.add_(0.1)


def swapped_storage(rnn, weight):
    weight.data = weight.data.flip(0)


def signs_changed(rnn, weight):
    """Of an even number of elements, which a plain sum of the words may miss."""
    weight.data[:, ::2] = -weight.data[:, ::2]


def another_parameter(rnn, weight):
    rnn.weight_hh_l0 = torch.nn.Parameter(weight.detach() * 2)


CHANGES = [written_through_data, written_in_place, swapped_storage, signs_changed]


@needs_library
@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", [*CHANGES, another_parameter])
@pytest.mark.parametrize("directions", [1, 2])
def test_a_frozen_weight_is_packed_once_and_never_stale(directions, change, grad_mode):
    """From the second call without gradients on; whoever changes it how, the next call knows.

    Of two directions, threads side by side make the products.
    """
    torch.set_num_threads(directions)
    with grad_mode():  # the parameters are inference tensors then, which have no version
        options = dict(bidirectional=directions == 2)
        rnn, right = (kind(260, 260, **options) for kind in (rnnkern.RNN, torch.nn.RNN))
        x = torch.randn(3 * directions, 2, 260)
    for name in ("weight_hh_l0", "weight_ih_l0"):
        for _ in range(2):
            with grad_mode():
                right.load_state_dict(rnn.state_dict())
                outputs = [rnn(x)[0] for _ in range(3)]
                assert all(torch.equal(outputs[0], other) for other in outputs)
                assert relative_error(outputs[0], right(x)[0]) < 1e-5
                change(
                    rnn, getattr(rnn, name if change is not another_parameter else "weight_hh_l0")
                )
