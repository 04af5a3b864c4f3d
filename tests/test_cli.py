"""The command line as a user meets it: exit codes, one-line errors, info, check, Ctrl-C."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import rnnkern
from rnnkern import cli, parity, training
from rnnkern.cli import main

RNNKERN = [sys.executable, "-m", "rnnkern"]


def error_line(capsys) -> str:
    """The one line on stderr."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


BAD = {
    "no command": ([], "COMMAND"),
    "unknown flag": (["train", "--no-such-flag"], "--no-such-flag"),
    "zero hidden": (["train", "--hidden", "0"], "--hidden must be at least 1, got 0"),
    "negative batch": (["train", "--batch", "-3"], "--batch must be at least 1, got -3"),
    "zero epochs": (["train", "--epochs", "0"], "--epochs must be at least 1"),
    "word for a number": (["train", "--layers", "two"], "'two'"),
    "lr nan": (["train", "--lr", "nan"], "--lr must be a positive number"),
    "negative seed": (["train", "--seed", "-1"], "--seed must be in"),
    "absurd size": (["train", "--hidden", str(10**30)], "cannot be made"),
    "unknown device": (["train", "--device", "abacus"], "unknown --device 'abacus'"),
    "absent device": (["train", "--device", "cuda:99"], "--device cuda:99 is not available"),
    "absent device, check": (["check", "--device", "cuda:99"], "--device cuda:99 is not available"),
    "unknown backend": (["train", "--backend", "magic"], "'magic'"),
    "unknown dtype": (["train", "--dtype", "int8"], "'int8'"),
    "unknown nonlinearity": (["train", "--nonlinearity", "sine"], "'sine'"),
    "backend of the reference": (
        ["train", "--cell", "reference", "--backend", "eager"],
        "has none",
    ),
    "column without csv": (["train", "--column", "x"], "--column needs --csv"),
    "resume without out": (["train", "--resume"], "--resume needs --out"),
    "overwrite without out": (["train", "--overwrite"], "--overwrite needs --out"),
    "resume and overwrite": (["train", "--resume", "--overwrite"], "not allowed with"),
    "resume from nothing": (["train", "--resume", "--out", "OUT"], "there is no checkpoint"),
    "compare and out": (["train", "--compare", "--out", "OUT"], "drop --out"),
    "compare and cell": (["train", "--compare", "--cell", "fused"], "drop --cell"),
    "out is a file": (["train", "--out", "FILE"], "cannot write to"),
    "out below a file": (["train", "--out", "FILE/x"], "cannot write to"),
    "missing csv": (["train", "--csv", "no.csv"], "cannot read"),
}


@pytest.mark.parametrize("argv, message", BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_exit_code_2(argv, message, tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    paths = {"OUT": tmp_path / "out", "FILE": tmp_path / "file", "FILE/x": tmp_path / "file" / "x"}
    assert main([str(paths.get(arg, arg)) for arg in argv]) == 2
    assert message in error_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


def test_a_backend_that_refuses_is_named_with_its_reasons(monkeypatch, capsys):
    monkeypatch.setattr(
        training.dispatch, "explain", lambda **_: {"eager": ["not today", "not here"]}
    )
    assert main(["train", "--backend", "eager"]) == 2
    assert "--backend eager cannot run this: not today; not here" in error_line(capsys)


@pytest.mark.parametrize("module", cli.EXTRA)
def test_a_missing_extra_says_what_to_install(module, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["info"]) == 2
    assert f"needs {module}: pip install 'rnnkern[cli]'" in error_line(capsys)


def test_the_package_imports_no_extra():
    code = f"import sys, rnnkern; print([m for m in {cli.EXTRA} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_info_shows_versions_and_every_backend(capsys):
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    for word in (rnnkern.__version__, torch.__version__, *rnnkern.dispatch.BACKENDS, "threads"):
        assert word in shown


# check


def test_check_passes_here(capsys):
    assert main(["check"]) == 0
    captured = capsys.readouterr()
    assert ", 0 wrong" in captured.out and captured.err == ""


def broken(how):
    """A `rnnkern.functional.rnn_scan` that is wrong in relu only."""
    right = parity.functional.rnn_scan

    def rnn_scan(*args, **kwargs):
        h, h_n = right(*args, **kwargs)
        if kwargs["nonlinearity"] != "relu":
            return h, h_n
        if how == "raises":
            raise RuntimeError("out of order")
        if how == "nan":
            return h * float("nan"), h_n
        if how == "gradient":  # right values, wrong derivative
            return h.detach() + 1.05 * (h - h.detach()), h_n
        return h * 1.05, h_n

    return rnn_scan


@pytest.mark.parametrize("how", ["value", "gradient", "nan", "raises"])
def test_check_fails_and_names_the_case(how, monkeypatch, capsys):
    monkeypatch.setattr(parity.functional, "rnn_scan", broken(how))
    monkeypatch.setattr(parity, "SHAPES", [(7, 33, 1)])
    assert main(["check"]) == 1
    captured = capsys.readouterr()
    here = [name for name, reasons in rnnkern.explain().items() if not reasons]
    cases = len(here) * len(parity.TOLERANCES) * len(parity.LAYOUTS)
    assert f"{cases} wrong" in captured.out
    assert "float64, relu, plain, T B H = (7, 33, 1): " in captured.err
    assert {"raises": "out of order", "gradient": "the gradient of x_proj"}.get(
        how, "the output"
    ) in (captured.err)


def test_check_skips_what_a_backend_refuses(monkeypatch, capsys):
    def explain(**call):
        refuse = ("eager", "cuda", "triton")
        return {name: ["too narrow"] * (name in refuse) for name in rnnkern.dispatch.BACKENDS}

    monkeypatch.setattr(parity.dispatch, "explain", explain)
    monkeypatch.setattr(parity, "SHAPES", [(1, 1, 1)])
    assert main(["check"]) == 0
    assert "eager did not run everything: too narrow" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_the_half_yardstick_takes_the_steps_of_torch_nn_rnn(nonlinearity, dtype):
    case = parity.Case(nonlinearity, "plain", (33, 7, 33))
    inputs = parity.make_inputs(case).to(torch.device("cpu"), dtype)
    ours = parity.results(inputs, parity.torch_steps(case))

    layer = torch.nn.RNN(33, 33, nonlinearity=nonlinearity, bias=False, dtype=dtype)
    with torch.no_grad():
        layer.weight_ih_l0.copy_(torch.eye(33))
        layer.weight_hh_l0.copy_(inputs.weight[0])
    outputs = layer(inputs.rows[0], inputs.initial)
    leaves = [inputs.rows[0], inputs.initial, layer.weight_hh_l0]
    theirs = [*outputs, *torch.autograd.grad(outputs, leaves, inputs.grads)]
    # Not bit for bit: the order of the sums in a product is the library's own business.
    for (name, a), b in zip(ours.items(), theirs, strict=True):
        assert parity.relative_error(a, b) <= torch.finfo(dtype).eps / 4, name


def test_relative_error():
    a, zero = torch.tensor([3.0, 4.0]), torch.zeros(2)
    assert parity.relative_error(a, a) == 0
    assert parity.relative_error(1.5 * a, a) == pytest.approx(0.5)
    assert parity.relative_error(zero, zero) == 0 and parity.relative_error(a, zero) == 5
    with pytest.raises(ValueError, match="shapes differ"):
        parity.relative_error(a, a[:1])


# train


@pytest.mark.parametrize("extra", [[], ["--csv", "sunspots"]], ids=["counting", "csv"])
def test_compare_shows_the_same_losses(extra, capsys):
    assert main(["train", "--compare", "--epochs", "25", *extra]) == 0
    shown = capsys.readouterr().out
    assert "x as fast as the reference" in shown and "over the first 25 epochs" in shown


def test_compare_fails_on_other_losses(monkeypatch, capsys):
    right = training.SimpleRNN.forward
    monkeypatch.setattr(
        training.SimpleRNN, "forward", lambda self, x: [1.001 * y for y in right(self, x)]
    )
    assert main(["train", "--compare", "--epochs", "5"]) == 1
    assert "losses differ by" in error_line(capsys)


def test_an_earlier_result_is_kept_unless_told(tmp_path, capsys):
    out = ["train", "--epochs", "3", "--out", str(tmp_path / "run")]
    assert main(out) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert main([*out, "--seed", "1"]) == 2
    assert "holds an earlier result" in error_line(capsys)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    assert main([*out, "--seed", "1", "--overwrite"]) == 0
    after = (tmp_path / "run" / "checkpoint.safetensors").read_bytes()
    assert after != before["checkpoint.safetensors"]


def test_ctrl_c_keeps_a_checkpoint_that_resumes_exactly(tmp_path):
    """Interrupt a process, resume it in another, and compare with a third that ran through."""
    out, through = tmp_path / "interrupted", tmp_path / "through"
    command = [*RNNKERN, "train", "--epochs", "1000000", "--out", str(out)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=unbuffered()
    ) as run:
        for line in run.stdout:
            if line.startswith("epoch: 100 "):
                break
        run.send_signal(signal.SIGINT)
        said, errors = run.communicate(timeout=60)
    assert run.returncode == 130, errors
    assert errors == ""
    assert f"resume with: python -m rnnkern train --resume --out {out}" in said

    stopped = len(load_file(out / "checkpoint.safetensors")["losses"])
    assert 100 < stopped < 1_000_000
    total = str(stopped + 30)
    for argv in (["--resume", "--out", str(out)], ["--out", str(through)]):
        done = subprocess.run(
            [*RNNKERN, "train", "--epochs", total, *argv], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    resumed, straight = (load_file(d / "checkpoint.safetensors") for d in (out, through))
    assert resumed.keys() == straight.keys()
    for name in straight:
        assert torch.equal(resumed[name], straight[name]), name
    logged = [
        [json.loads(line).get("epoch") for line in (d / "metrics.jsonl").open()]
        for d in (out, through)
    ]
    assert logged[0] == logged[1]


def unbuffered() -> dict:
    return {**os.environ, "PYTHONUNBUFFERED": "1"}


def test_ctrl_c_without_out_says_that_nothing_is_kept(monkeypatch, capsys):
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(cli, "make_task", interrupting(cli.make_task))
    assert main(["train", "--epochs", "50"]) == 130
    assert "stopped after 3 of 50 epochs; nothing was kept" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before


def interrupting(make_task):
    """A make_task whose task presses Ctrl-C in its third epoch."""

    def make(config):
        task = make_task(config)
        batches = task.batches

        def pressing(epoch):
            if epoch == 2:
                signal.raise_signal(signal.SIGINT)
            return batches(epoch)

        task.batches = pressing
        return task

    return make
