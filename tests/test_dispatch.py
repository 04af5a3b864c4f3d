"""Which backend runs, why, and what is refused; and the package without its library."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from cases import BACKENDS, Shape, make_inputs, needs_library

import rnnkern
from rnnkern import dispatch, functional, library

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
PACKAGE = Path(rnnkern.__file__).parent


# ---- the table ----


def test_order():
    assert dispatch.BACKENDS == ("cpu", "cuda", "triton", "eager", "reference")
    assert list(rnnkern.explain()) == list(dispatch.BACKENDS)


@needs_library
def test_explain():
    reasons = rnnkern.explain()
    for name in ("cuda", "triton"):
        assert reasons.pop(name)[-1] == "it runs on CUDA GPUs, the tensors are on cpu"
    assert reasons == {"cpu": [], "eager": [], "reference": []}
    (reason,) = rnnkern.explain(device="cuda:1")["cpu"]
    assert reason == "it runs on the CPU, the tensors are on cuda"
    refused = rnnkern.explain(dtype=torch.complex32, nonlinearity="gelu")
    assert len(refused["cpu"]) == len(refused["eager"]) == 2
    assert all(len(reasons) >= 2 for reasons in refused.values())
    for reasons in refused.values():
        assert any("complex32" in r for r in reasons) and any("'gelu'" in r for r in reasons)
    assert rnnkern.explain(device=torch.device("meta"), nonlinearity=None)["cpu"] == []
    refused["cpu"].append("changed by the caller")
    assert len(rnnkern.explain(dtype=torch.complex32, nonlinearity="gelu")["cpu"]) == 2


def test_explain_agrees_with_what_happens():
    w = torch.eye(2)
    for dtype in (torch.float64, torch.float16, torch.complex32):
        for name in dispatch.BACKENDS:
            reasons = rnnkern.explain(dtype=dtype, hidden_size=2)[name]
            x = torch.zeros(3, 1, 2, dtype=dtype)
            if reasons:
                with pytest.raises(ValueError, match=re.escape(reasons[0])):
                    rnnkern.rnn_scan(x, [w.to(dtype)], backend=name)
            else:
                assert rnnkern.rnn_scan(x, [w.to(dtype)], backend=name)[0].dtype == dtype


@needs_library
@pytest.mark.parametrize("op", ["rnn_scan", "rnn_layer", "linear_scan"])
def test_auto_is_the_compiled_op(op):
    """In one node, and never the reference."""
    kind = {"rnn_scan": "scan-tanh", "rnn_layer": "layer-tanh", "linear_scan": "linear"}[op]
    call = make_inputs(kind, "plain", Shape(3, 2, 4, 2))
    outputs = call.run("auto", *call.leaves())
    assert outputs[0].grad_fn.name().startswith(("RnnScan", "RnnLayer", "LinearScan"))
    assert dispatch.select("auto", "cpu", torch.float32, 4, 1, "tanh").__name__.endswith(".cpu")


def test_auto_never_takes_the_reference(monkeypatch):
    for module in ("cpu", "cuda", "triton", "eager"):
        monkeypatch.setattr(dispatch._MODULES[module], "unsupported", lambda *_: ["not today"])
    words = "cpu: not today; cuda: not today; triton: not today; eager: not today"
    with pytest.raises(ValueError, match=words):
        dispatch.select("auto", "cpu", torch.float32, 3, 1, "tanh")


def test_auto_warns_when_it_is_slow(monkeypatch):
    monkeypatch.setattr(dispatch._MODULES["cpu"], "unsupported", lambda *_: ["not today"])
    with pytest.warns(RuntimeWarning, match="slow 'eager' backend. cpu: not today"):
        chosen = dispatch.select("auto", "cpu", torch.float32, 3, 1, "tanh")
    assert chosen.__name__ == "rnnkern.backends.eager"


def test_a_named_backend_never_falls_back():
    for name in ("gpu", "", "Eager", "AUTO"):
        with pytest.raises(ValueError, match="backend must be 'auto' or one of"):
            rnnkern.rnn_scan(torch.zeros(2, 1, 3), [torch.eye(3)], backend=name)
    with pytest.raises(ValueError, match="no backend can run this call. eager: .*complex32"):
        c = torch.complex32
        w = torch.zeros(3, 3, dtype=c)
        rnnkern.rnn_scan(torch.zeros(2, 1, 3, dtype=c), [w], backend="eager")


# ---- bad arguments ----


def scan(**changes):
    """A good rnn_scan call, changed."""
    good = {"x_proj": torch.zeros(4, 3, 10), "weight_hh": [torch.eye(5), torch.eye(5)]}
    good |= {"h0": torch.zeros(2, 3, 5), "reverse": [False, True]}
    return "rnn_scan", good | changes


def packed(**changes):
    return scan(**{"x_proj": torch.zeros(6, 10), "batch_sizes": torch.tensor([3, 2, 1])} | changes)


def layer(**changes):
    good = {"x": torch.zeros(4, 3, 2), "weight_ih": [torch.zeros(5, 2)] * 2}
    good |= {"bias_ih": [torch.zeros(5)] * 2, "bias_hh": [torch.zeros(5)] * 2}
    return "rnn_layer", {n: v for n, v in scan()[1].items() if n != "x_proj"} | good | changes


def packed_layer(**changes):
    return layer(**{"x": torch.zeros(6, 2), "batch_sizes": torch.tensor([3, 2, 1])} | changes)


def linear(**changes):
    good = {"u": torch.zeros(4, 3, 5), "gain": torch.ones(4, 3, 5), "weight": [torch.eye(5)]}
    return "linear_scan", good | {"s0": torch.zeros(1, 3, 5)} | changes


def packed_linear(**changes):
    rows = {"u": torch.zeros(6, 5), "gain": torch.zeros(6, 5)}
    return linear(**rows | {"batch_sizes": torch.tensor([3, 2, 1])} | changes)


z = torch.zeros
META_SIZES = torch.zeros(3, dtype=torch.int64, device="meta")
SIZES = {
    "increasing sizes": ([2, 3, 1], "non-increasing"),
    "a zero size": ([3, 3, 0], "positive"),
    "a negative size": ([3, 3, -1], "positive"),
    "sizes that add up to less": ([3, 2], "add up"),
    "sizes that add up to more": ([3, 2, 2], "add up"),
    "sizes of nothing": ([], ""),
    "enormous sizes": ([2**62, 2**62, 2**62, 2**62], ""),
    "overflowing sizes": ([2**63 - 1, 2**63 - 1, 8], ""),
    "float sizes": ([3.0, 2.0, 1.0], "int64"),
}
BAD_SIZES = {
    f"{name}: {what}": (ValueError, call(batch_sizes=torch.tensor(sizes)), words)
    for name, (sizes, words) in SIZES.items()
    for what, call in (("scan", packed), ("layer", packed_layer), ("linear", packed_linear))
}
BAD = BAD_SIZES | {
    "int32 sizes": (ValueError, packed(batch_sizes=torch.tensor([3, 2, 1]).int()), "int64"),
    "2-D sizes": (ValueError, packed(batch_sizes=torch.tensor([[3, 2, 1]])), "(T,)"),
    "0-D sizes": (ValueError, packed(batch_sizes=torch.tensor(6)), "(T,)"),
    "sizes on meta": (
        ValueError,
        packed(batch_sizes=META_SIZES),
        "CPU",
    ),
    "sizes on meta: layer": (
        ValueError,
        packed_layer(batch_sizes=META_SIZES),
        "CPU",
    ),
    "3-D packed rows": (ValueError, packed(x_proj=z(6, 1, 10)), "(N, G*H)"),
    "packed without h0": (ValueError, packed(h0=None), "h0"),
    "packed without h0: layer": (ValueError, packed_layer(h0=None), "h0"),
    "packed h0 batch": (ValueError, packed(h0=z(2, 4, 5)), "4"),
    "packed h0 batch: layer": (ValueError, packed_layer(h0=z(2, 4, 5)), "4"),
    "packed s0 batch": (ValueError, packed_linear(s0=z(1, 2, 5)), "2"),
    "2-D plain rows": (ValueError, scan(x_proj=z(4, 10)), "(T, B, G*H)"),
    "1-D rows": (ValueError, scan(x_proj=z(10)), "(T, B, G*H)"),
    "0-D rows": (ValueError, scan(x_proj=z(())), "(T, B, G*H)"),
    "0-D packed rows": (ValueError, packed(x_proj=z(())), "(N, G*H)"),
    "columns": (ValueError, scan(x_proj=z(4, 3, 9)), "9"),
    "no columns": (ValueError, scan(x_proj=z(4, 3, 0)), "0"),
    "no weights": (ValueError, scan(weight_hh=[]), "empty"),
    "no weights: linear": (ValueError, linear(weight=[]), "empty"),
    "no weights: layer": (ValueError, layer(weight_hh=[]), "empty"),
    "one weight": (ValueError, scan(weight_hh=[torch.eye(5)]), "2"),
    "oblong weight": (ValueError, scan(weight_hh=[z(5, 4), z(5, 5)]), "[5, 4]"),
    "second weight": (ValueError, scan(weight_hh=[z(5, 5), z(4, 4)]), "[4, 4]"),
    "1-D weight": (ValueError, scan(weight_hh=[z(5), z(5)]), "(H, H)"),
    "3-D weight": (ValueError, scan(weight_hh=[z(1, 5, 5), z(5, 5)]), ""),
    "0-D weight": (ValueError, scan(weight_hh=[z(()), z(())]), ""),
    "weight of other dtype": (TypeError, scan(weight_hh=[torch.eye(5).double()] * 2), "dtype"),
    "second weight of other dtype": (
        TypeError,
        scan(weight_hh=[torch.eye(5), torch.eye(5).half()]),
        "dtype",
    ),
    "weight on meta": (ValueError, scan(weight_hh=[z(5, 5, device="meta")] * 2), "meta"),
    "second weight on meta": (
        ValueError,
        scan(weight_hh=[z(5, 5), z(5, 5, device="meta")]),
        "meta",
    ),
    "h0 groups": (ValueError, scan(h0=z(1, 3, 5)), "[1, 3, 5]"),
    "h0 batch": (ValueError, scan(h0=z(2, 4, 5)), "[2, 4, 5]"),
    "h0 batch of one": (ValueError, scan(h0=z(2, 1, 5)), "[2, 1, 5]"),
    "h0 hidden": (ValueError, scan(h0=z(2, 3, 4)), "[2, 3, 4]"),
    "h0 2-D": (ValueError, scan(h0=z(3, 5)), "[3, 5]"),
    "h0 dtype": (TypeError, scan(h0=z(2, 3, 5).double()), "h0"),
    "h0 on meta": (ValueError, scan(h0=z(2, 3, 5, device="meta")), "meta"),
    "too few flags": (ValueError, scan(reverse=[False]), "2"),
    "too many flags": (ValueError, scan(reverse=[False] * 3), "3"),
    "no flags": (ValueError, scan(reverse=[]), "0"),
    "nonlinearity": (ValueError, scan(nonlinearity="gelu"), "gelu"),
    "nonlinearity empty": (ValueError, scan(nonlinearity=""), "''"),
    "nonlinearity with a zero byte": (ValueError, scan(nonlinearity="tanh\0x"), "tanh"),
    "nonlinearity: layer": (ValueError, layer(nonlinearity="Tanh"), "Tanh"),
    "gain shape": (ValueError, linear(gain=z(4, 3, 1)), "[4, 3, 1]"),
    "gain of one step": (ValueError, linear(gain=z(1, 3, 5)), "[1, 3, 5]"),
    "gain dtype": (TypeError, linear(gain=torch.ones(4, 3, 5).double()), "gain"),
    "gain on meta": (ValueError, linear(gain=z(4, 3, 5, device="meta")), "meta"),
    "s0 shape": (ValueError, linear(s0=z(1, 2, 5)), "[1, 2, 5]"),
    "x features": (ValueError, layer(x=z(4, 3, 3)), "3"),
    "x 2-D": (ValueError, layer(x=z(12, 2)), "(T, B, I)"),
    "x 0-D": (ValueError, layer(x=z(())), "(T, B, I)"),
    "x dtype": (TypeError, layer(x=z(4, 3, 2).double()), "dtype"),
    "x on meta": (ValueError, layer(x=z(4, 3, 2, device="meta")), "meta"),
    "w_ih too few": (ValueError, layer(weight_ih=[z(5, 2)]), "1"),
    "w_ih none": (ValueError, layer(weight_ih=[]), "0"),
    "w_ih rows": (ValueError, layer(weight_ih=[z(4, 2)] * 2), "4"),
    "w_ih second": (ValueError, layer(weight_ih=[z(5, 2), z(5, 3)]), "[5, 3]"),
    "w_ih 1-D": (ValueError, layer(weight_ih=[z(5)] * 2), "[5]"),
    "w_ih dtype": (TypeError, layer(weight_ih=[z(5, 2).half()] * 2), "weight_ih"),
    "w_ih on meta": (ValueError, layer(weight_ih=[z(5, 2), z(5, 2, device="meta")]), "meta"),
    "one bias": (ValueError, layer(bias_ih=[z(5)]), "1"),
    "bias_ih alone": (ValueError, layer(bias_hh=[]), "0"),
    "bias_hh alone": (ValueError, layer(bias_ih=[]), "0"),
    "bias too long": (ValueError, layer(bias_ih=[z(6)] * 2), "[6]"),
    "bias of one": (ValueError, layer(bias_hh=[z(1)] * 2), "[1]"),
    "bias 2-D": (ValueError, layer(bias_hh=[z(1, 5)] * 2), "[1, 5]"),
    "bias dtype": (TypeError, layer(bias_ih=[z(5).double()] * 2), "dtype"),
    "bias on meta": (ValueError, layer(bias_hh=[z(5), z(5, device="meta")]), "meta"),
}
INTEGERS = {
    "int rows": scan(x_proj=z(4, 3, 10).long(), weight_hh=[torch.eye(5).long()] * 2, h0=None),
    "bool rows": scan(x_proj=z(4, 3, 10).bool(), weight_hh=[torch.eye(5).bool()] * 2, h0=None),
    "int rows: linear": linear(u=z(4, 3, 5).int()),
    "int x": layer(x=z(4, 3, 2).long()),
    "float8 rows": scan(x_proj=z(4, 3, 10).to(torch.float8_e5m2)),
}


@pytest.mark.parametrize("case", BAD)
@on_every_backend
def test_bad_arguments(backend, case):
    """ValueError or TypeError, alike on every backend, that says what came."""
    expected, (op, arguments), words = BAD[case]

    def leaf(value):
        if isinstance(value, list):
            return [leaf(v) for v in value]
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.clone().requires_grad_() if floating and value.device.type == "cpu" else value

    for change in (lambda value: value, leaf):
        changed = {n: v if n == "batch_sizes" else change(v) for n, v in arguments.items()}
        with pytest.raises(expected) as caught:
            getattr(functional, op)(**changed, backend=backend)
        message = str(caught.value)
        assert words in message, message
        assert any(w in message for w in ("expected", "must be one of", "it has no", "there is no"))


@pytest.mark.parametrize("case", INTEGERS)
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_dtypes_that_no_backend_has(backend, case):
    op, arguments = INTEGERS[case]
    with pytest.raises((ValueError, TypeError), match="int|bool|float8"):
        getattr(functional, op)(**arguments, backend=backend)


WRONG_TYPES = {
    "rows None": scan(x_proj=None),
    "rows a list": scan(x_proj=[1.0]),
    "a weight None": scan(weight_hh=[None, None]),
    "a bare weight": scan(weight_hh=torch.eye(5)),
    "sizes a list": packed(batch_sizes=[3, 2, 1]),
    "h0 a number": scan(h0=0.0),
    "nonlinearity None": scan(nonlinearity=None),
}


@pytest.mark.parametrize("case", WRONG_TYPES)
@on_every_backend
def test_arguments_of_the_wrong_type(backend, case):
    """Some exception, and the process goes on."""
    op, arguments = WRONG_TYPES[case]
    with pytest.raises(Exception) as caught:  # noqa: B017, PT011
        getattr(functional, op)(**arguments, backend=backend)
    assert str(caught.value)


@needs_library
@pytest.mark.parametrize("case", {**BAD, **{n: (None, c, "") for n, c in INTEGERS.items()}})
def test_the_compiled_ops_check_for_themselves(case):
    """Called through torch.ops, as a scripted module or a C++ program does."""
    _, (op, arguments), _ = BAD.get(case, (None, INTEGERS.get(case), ""))
    schema = getattr(torch.ops.rnnkern, op).default._schema.arguments
    defaults = {"nonlinearity": "tanh", "reverse": [False]}
    ordered = [arguments.get(a.name, defaults.get(a.name)) for a in schema]
    with pytest.raises((ValueError, TypeError)):
        getattr(torch.ops.rnnkern, op)(*ordered)


@needs_library
@pytest.mark.parametrize("kind", ["sparse", "sparse weight", "quantized"])
def test_tensors_without_plain_memory(kind):
    """Refused by torch or by the op: never read."""
    x, w = torch.randn(3, 2, 4), torch.randn(4, 4)
    if kind == "sparse":
        x = x.to_sparse()
    elif kind == "sparse weight":
        w = w.to_sparse()
    else:
        x = torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)
    with pytest.raises((RuntimeError, ValueError, TypeError, NotImplementedError)):
        torch.ops.rnnkern.rnn_scan(x, None, [w], None, [False], "tanh")


# Batch sizes whose sum wraps round to the 6 rows that there are.
WRAPPED = """
    import torch
    sizes = torch.tensor([2**62 + 3] + [2**62 + 1] * 3)
    rows, weight = torch.ones(6, 1), [torch.eye(1)]
    huge = torch.zeros(1, 1, 1).expand(1, 2**62 + 3, 1)
    ops = torch.ops
    ops.load_library({path!r})
    ops = ops.rnnkern
    for call in (
        lambda: ops.linear_scan(rows, rows, None, weight, sizes, [False]),
        lambda: ops.linear_scan(rows, rows, huge, weight, sizes, [True]),
        lambda: ops.rnn_scan(rows, huge, weight, sizes, [False], "tanh"),
        lambda: ops.rnn_layer(rows, huge, weight, weight, [], [], sizes, [False], "tanh"),
        lambda: ops.rnn_scan_backward(
            rows, None, rows, None, weight, sizes, [False], "tanh", [False] * 2
        ),
    ):
        try:
            call()
            raise SystemExit("accepted")
        except ValueError as error:
            assert "batch_sizes" in str(error), error
    print("refused")
"""


@needs_library
@pytest.mark.processes
def test_batch_sizes_whose_sum_overflows():
    """In a process of its own, which a kernel that believed them would take down."""
    script = textwrap.dedent(WRAPPED).replace("{path!r}", repr(library.path))
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "refused\n"), run.stderr[-2000:]


# ---- without the library ----

USE_IT = """
    import warnings
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import rnnkern, torch
        from rnnkern import library, modules  # nor again
    (warning,) = [w for w in caught if "rnnkern" in str(w.message)]
    assert warning.category is RuntimeWarning
    assert "without its compiled library" in str(warning.message)
    assert "pip install --no-build-isolation -e ." in str(warning.message)
    assert {reason!r} in str(warning.message), warning.message
    assert not library.loaded and library.capability() == ""
    table = rnnkern.explain()
    assert {reason!r} in table["cpu"][0] and table["eager"] == []
    try:
        rnnkern.RNN(3, 5, backend="cpu")(torch.zeros(2, 1, 3))
        raise SystemExit("the cpu backend ran without its library")
    except ValueError as error:
        assert "the compiled library is not loaded" in str(error)

    torch.manual_seed(0)
    ours = rnnkern.RNN(3, 5, 2, bidirectional=True, dtype=torch.float64)
    stock = torch.nn.RNN(3, 5, 2, bidirectional=True, dtype=torch.float64)
    stock.load_state_dict(ours.state_dict())
    x = torch.randn(6, 4, 3, dtype=torch.float64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for rnn in (ours, stock):
            optimizer = torch.optim.SGD(rnn.parameters(), lr=0.1)
            for _ in range(2):
                optimizer.zero_grad()
                out, h_n = rnn(x)
                (out.sum() + h_n.square().sum()).backward()
                optimizer.step()
    slow = [w for w in caught if "slow 'eager' backend" in str(w.message)]
    assert slow and {reason!r} in str(slow[0].message)
    for a, b in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    print("it works")
"""


@pytest.mark.processes
@pytest.mark.parametrize("state", ["missing", "corrupt", "of another torch"])
def test_without_the_library(state, tmp_path):
    """The package imports, warns once how to build, explains, and trains like torch.nn.RNN."""
    copy = tmp_path / "rnnkern"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("_C*.so", "__pycache__"))
    reason = "_C.so does not exist"
    if state == "corrupt":
        (copy / "_C.so").write_bytes(b"\x7fELF this is none")
        reason = "does not load into torch"
    elif state == "of another torch":
        if not library.loaded or not shutil.which("c++"):
            pytest.skip("needs a C++ compiler to link a library with an unknown symbol")
        source = (
            "extern void no_such_torch_symbol(); struct S { S() { no_such_torch_symbol(); } } s;"
        )
        subprocess.run(
            ["c++", "-shared", "-fPIC", "-x", "c++", "-", "-o", copy / "_C.so"],
            input=source.encode(),
            check=True,
        )
        reason = "no_such_torch_symbol"
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(USE_IT).replace("{reason!r}", repr(reason))],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and run.stdout == "it works\n", run.stderr[-3000:]


@needs_library
@pytest.mark.processes
def test_an_unknown_instruction_set_is_an_error():
    """RNNKERN_CPU_CAPABILITY names what runs here, and what was asked for."""
    code = "import rnnkern, torch; rnnkern.RNN(2, 2)(torch.zeros(1, 1, 2))"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=os.environ | {"RNNKERN_CPU_CAPABILITY": "avx9"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    message = run.stderr.strip().splitlines()[-1]
    assert message.startswith("ValueError: RNNKERN_CPU_CAPABILITY: expected one of")
    assert "default" in message and message.endswith("got avx9")
