"""Training: the notebook's result, checkpoints that resume exactly, no half-written file."""

import errno
import json
import math
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rnnkern import cli, reference, results, training
from rnnkern.cli import main
from rnnkern.training import Config, Counting, Trainer

PNG = b"\x89PNG\r\n\x1a\n"


def metrics(path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").open()]


def train(path, *argv) -> int:
    return main(["train", "--out", str(path), *map(str, argv)])


@pytest.mark.parametrize("seed", range(5))
def test_the_fused_layer_learns_to_count(seed, tmp_path, capsys):
    assert train(tmp_path, "--seed", seed) == 0
    summary = metrics(tmp_path)[-1]
    assert summary["summary"] and summary["epochs"] == 2000
    assert summary["best_loss_of_last_20"] < 5e-3
    said = capsys.readouterr().out
    assert [f"epoch: {e} - loss: " in said for e in (0, 100, 1900, 2000)] == [True] * 3 + [False]
    assert "prediction for [0, 1, 2, 3, 4]: [" in said
    assert ("note: an extrapolation" in said) == summary["extrapolation"]
    if seed == 0:
        assert summary["prediction"] == pytest.approx([1, 2, 3, 4, 5], abs=0.05)


def test_an_extrapolation_is_called_one(tmp_path, capsys):
    """With one sequence, seed 3 starts at 6 and seed 4 at 0."""
    for seed, said in ((3, True), (4, False)):
        assert main(["train", "--seed", str(seed), "--batch", "1", "--epochs", "1"]) == 0
        assert ("the training sequences start at 6, not at 0" in capsys.readouterr().out) == said


@pytest.mark.parametrize("cell", training.CELLS)
def test_it_is_the_notebooks_loop(cell):
    """The same numbers as the notebook's own code, run after torch.manual_seed."""
    torch.manual_seed(1)
    x, y = reference.toy_data()
    model = reference.SimpleRNN(1, 16, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        loss = torch.nn.functional.mse_loss(model(x)[0], y)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    trainer = Trainer(Config(seed=1, cell=cell, epochs=60), Counting)
    assert type(trainer.model) is {"reference": reference.SimpleRNN}.get(cell, training.SimpleRNN)
    training.fit(trainer, lambda: False, lambda: None, lambda: None)
    assert trainer.losses == pytest.approx(losses, rel=1e-4)


RUNS = {
    "counting": [],
    "reference cell": ["--cell", "reference"],
    "two relu layers, float64": ["--layers", 2, "--nonlinearity", "relu", "--dtype", "float64"],
    "bfloat16": ["--dtype", "bfloat16"],
    "series": ["--csv", "sunspots"],
}


@pytest.mark.parametrize("argv", RUNS.values(), ids=RUNS)
def test_a_resumed_run_equals_one_that_ran_through(argv, tmp_path):
    assert train(tmp_path / "through", "--epochs", 26, *argv) == 0
    assert train(tmp_path / "resumed", "--epochs", 13, *argv) == 0
    assert train(tmp_path / "resumed", "--epochs", 26, "--resume") == 0
    files = [tmp_path / d / "checkpoint.safetensors" for d in ("through", "resumed")]
    through, resumed = map(load_file, files)
    assert through.keys() == resumed.keys()
    for name in through:
        assert torch.equal(through[name], resumed[name]), name
    kept = [
        [{k: v for k, v in record.items() if "second" not in k} for record in metrics(file.parent)]
        for file in files
    ]
    assert kept[0] == kept[1]
    for picture in tmp_path.glob("*/*.png"):
        assert picture.read_bytes().startswith(PNG)
    wanted = {"loss.png", "forecast.png" if "--csv" in argv else "prediction.png"}
    assert {p.name for p in (tmp_path / "resumed").glob("*.png")} == wanted


def test_resuming_a_finished_run_changes_nothing_but_the_pictures_dates(tmp_path):
    assert train(tmp_path, "--epochs", 5) == 0
    before = load_file(tmp_path / "checkpoint.safetensors"), metrics(tmp_path)
    assert train(tmp_path, "--resume") == 0
    after = load_file(tmp_path / "checkpoint.safetensors"), metrics(tmp_path)
    assert before[1] == after[1]
    assert all(torch.equal(after[0][name], before[0][name]) for name in before[0])


CONFLICTS = {
    "hidden": (["--hidden", "17"], "--hidden 17 is not the checkpoint's 16"),
    "lr": (["--lr", "0.5"], "--lr 0.5 is not the checkpoint's 0.01"),
    "cell": (["--cell", "reference"], "--cell reference is not the checkpoint's fused"),
    "task": (["--csv", "sunspots"], "--csv sunspots is not the checkpoint's None"),
    "epochs": (["--epochs", "3"], "--epochs 3 is behind the checkpoint, at epoch 5"),
}


@pytest.mark.parametrize("argv, message", CONFLICTS.values(), ids=CONFLICTS)
def test_a_flag_may_not_contradict_the_checkpoint(argv, message, tmp_path, capsys):
    assert train(tmp_path, "--epochs", 5) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    assert train(tmp_path, "--resume", *argv) == 2
    assert message in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_same_flags_and_another_backend_do_not_contradict(tmp_path):
    assert train(tmp_path, "--epochs", 5) == 0
    assert train(tmp_path, "--resume", "--hidden", 16, "--backend", "eager", "--epochs", 8) == 0
    assert len(load_file(tmp_path / "checkpoint.safetensors")["losses"]) == 8


def rewrite(path, tensors=None, **header):
    """Save the checkpoint again with other tensors or header entries."""
    with safe_open(path, "pt") as file:
        saved = json.loads(file.metadata()[results.KEY])
    saved["config"] |= header.pop("config", {})
    kept = load_file(path) | (tensors or {})
    save_file(
        {name: tensor for name, tensor in kept.items() if tensor is not None},
        path,
        {results.KEY: json.dumps(saved | header)},
    )


DAMAGE = {
    "empty": (lambda p: p.write_bytes(b""), "damaged or no safetensors file"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-100]), "damaged or no safetensors file"),
    "a pickle": (lambda p: torch.save({}, p), "damaged or no safetensors file"),
    "foreign": (lambda p: save_file({"w": torch.ones(2)}, p), "is not a checkpoint of rnnkern"),
    "no json": (lambda p: save_file({}, p, {results.KEY: "{"}), "is not a checkpoint of rnnkern"),
    "later format": (lambda p: rewrite(p, format=2), "its format is 2"),
    "odd epoch": (lambda p: rewrite(p, epoch="five"), "epoch 'five'"),
    "odd config": (lambda p: rewrite(p, config={"hidden": "big"}), "--hidden must be"),
    "unknown setting": (lambda p: rewrite(p, config={"colour": 1}), "is not a checkpoint"),
    "other size": (lambda p: rewrite(p, config={"hidden": 17}), "expected float32 (358"),
    "other dtype": (lambda p: rewrite(p, config={"dtype": "float64"}), "expected float64"),
    "other data": (lambda p: rewrite(p, config={"seed": 9}), "was trained on other data"),
    "lost tensor": (lambda p: rewrite(p, {"model.b_o": None}), "model.b_o is missing"),
    "added tensor": (lambda p: rewrite(p, {"model.x": torch.ones(1)}), "model.x is float32 (1,)"),
    "lost moment": (lambda p: rewrite(p, {"adam.exp_avg": None}), "adam.exp_avg is missing"),
    "short history": (lambda p: rewrite(p, epoch=4), "losses is float64 (5,), expected float64 (4"),
}


@pytest.mark.parametrize("damage, message", DAMAGE.values(), ids=DAMAGE)
def test_a_bad_checkpoint_is_refused_and_kept(damage, message, tmp_path, capsys):
    assert train(tmp_path, "--epochs", 5) == 0
    damage(tmp_path / "checkpoint.safetensors")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    assert train(tmp_path, "--resume") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0], lines
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_failing_write_leaves_the_old_checkpoint(call, tmp_path, monkeypatch, capsys):
    assert train(tmp_path, "--epochs", 5) == 0
    old = (tmp_path / "checkpoint.safetensors").read_bytes()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    class FullFile:
        """A file that takes half of what is written to it."""

        def __init__(self, path, mode):
            self.file = open(path, mode)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            self.file.write(data[: len(data) // 2])
            full()

    write_atomic = results.write_atomic

    def fail_at_checkpoint(path, data):
        with monkeypatch.context() as patch:
            if path.name == "checkpoint.safetensors":
                if call == "write":
                    patch.setattr(results, "open", FullFile, raising=False)
                else:
                    patch.setattr(os, call, full)
            write_atomic(path, data)

    monkeypatch.setattr(results, "write_atomic", fail_at_checkpoint)
    assert train(tmp_path, "--resume", "--epochs", 9) == 2
    assert f"cannot write to {tmp_path}: No space left on device" in capsys.readouterr().err
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == old
    assert not list(tmp_path.glob(".*")), "a temporary file was left behind"

    monkeypatch.undo()
    assert train(tmp_path, "--resume", "--epochs", 9) == 0


def test_checkpoints_are_written_while_training(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(cli, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(results.Results, "save", lambda self, trainer: saved.append(trainer.epoch))
    monkeypatch.setattr(training.fit, "__defaults__", (0.0,))
    assert train(tmp_path, "--epochs", 4) == 0
    assert saved == [1, 2, 3, 4, 4]


def test_a_crash_after_the_checkpoint_is_forgotten_by_the_metrics(tmp_path):
    """Killed between two checkpoints: the lines after the first are trained again."""
    assert train(tmp_path, "--epochs", 101) == 0
    whole = [r for r in metrics(tmp_path) if "epoch" in r]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 200, "loss": 1.0}\n{"epoch": 300, "lo')
    assert train(tmp_path, "--resume", "--epochs", 102) == 0
    assert metrics(tmp_path)[:-1] == whole


def test_a_diverging_loss_is_exit_code_1_and_no_checkpoint(tmp_path, capsys):
    assert train(tmp_path, "--lr", 1e30, "--epochs", 500) == 1
    error = capsys.readouterr().err
    assert error.startswith("rnnkern: error: the loss became ") and len(error.splitlines()) == 1
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_a_checkpoint_amid_training_has_every_loss_and_none_that_is_not_finite(tmp_path):
    trainer, out = Trainer(Config(), Counting), results.Results(tmp_path)
    trainer.advance()
    trainer.advance()
    out.save(trainer)
    kept = (tmp_path / "checkpoint.safetensors").read_bytes()
    assert len(load_file(tmp_path / "checkpoint.safetensors")["losses"]) == 2
    trainer._unread = [torch.tensor(math.nan)]
    with pytest.raises(training.Diverged):
        out.save(trainer)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == kept


def test_reading_reports_the_first_loss_that_is_not_finite():
    trainer = Trainer(Config(), Counting)
    trainer._unread = [torch.tensor(v) for v in (1.0, math.nan, math.inf)]
    with pytest.raises(training.Diverged, match="became nan at epoch 1"):
        trainer.read()


def test_small_steps_run_on_one_thread_and_the_setting_is_put_back():
    before = torch.get_num_threads()
    for hidden, threads in ((16, 1), (1024, before)):
        with training.few_threads(Config(hidden=hidden)):
            assert torch.get_num_threads() == threads
        assert torch.get_num_threads() == before
