"""A user's series: what is read of a CSV file, and forecasts that never saw what judges them."""

import json

import pytest
import torch

from rnnkern import training
from rnnkern.cli import main, new_config
from rnnkern.series import Forecast, read_csv, sample_path, split
from rnnkern.training import Trainer, UserError

READABLE = {
    "commas": ("year,n\n1,2\n2,3.5\n", "n", [2, 3.5], "year", [1, 2]),
    "semicolons": ("year;n\n1;2\n2;3.5\n", "n", [2, 3.5], "year", [1, 2]),
    "tabs": ("year\tn\n1\t2\n2\t3.5\n", "n", [2, 3.5], "year", [1, 2]),
    "quotes, spaces": ('"year", n\n"1", 2\n"2"," 3.5 "\n', "n", [2, 3.5], "year", [1, 2]),
    "byte order mark": ("\ufeffyear,n\r\n1,2\r\n2,3.5\r\n", "n", [2, 3.5], "year", [1, 2]),
    "blank lines": ("year,n\n\n1,2\n2,3.5\n,\n\n", "n", [2, 3.5], "year", [1, 2]),
    "one column": ("n\n2\n3.5\n", None, [2, 3.5], "row", [1, 2]),
    "column left out": ("year,n\n1,2\n2,3.5\n", None, [2, 3.5], "year", [1, 2]),
    "dates first": ("day,n\n2001-01-01,2\n2001-01-02,3.5\n", "n", [2, 3.5], "row", [1, 2]),
    "first not counting up": ("a,n\n2,2\n1,3.5\n", "n", [2, 3.5], "row", [1, 2]),
    "first column asked for": ("n,a\n2,x\n3.5,y\n", "n", [2, 3.5], "row", [1, 2]),
}


@pytest.mark.parametrize("text, column, values, name, axis", READABLE.values(), ids=READABLE)
def test_a_column_is_read(text, column, values, name, axis, tmp_path):
    (tmp_path / "s.csv").write_bytes(text.encode())
    series = read_csv(tmp_path / "s.csv", column)
    assert (series.values, series.axis_name, series.axis) == (values, name, axis)


UNREADABLE = {
    "empty file": (b"", "n", "is empty"),
    "no such column": (b"a,b\n1,2\n", "n", "no such column; {} has the columns a, b"),
    "ambiguous column": (b"n,n\n1,2\n", "n", "ambiguous"),
    "which column": (b"a,b,c\n1,2,3\n", None, "needs --column NAME; {} has the columns a, b, c"),
    "a word": (b"a,n\n1,2\n2,many\n", "n", "row at line 3: column n holds 'many', not a number"),
    "nan": (
        b"a,n\n1,2\n\n2,NaN\n",
        "n",
        "row at line 4: column n holds 'NaN', not a finite number",
    ),
    "infinity": (b"n\n-inf\n", "n", "row at line 2: column n holds '-inf', not a finite number"),
    "empty cell": (b"a,n\n1,\n", "n", "row at line 2: column n is empty"),
    "short row": (b"a,n\n1,2\n3\n", "n", "row at line 3: column n is empty"),
    "not text": (b"a,n\n\xff\xfe,1\n", "n", "is not a CSV text file"),
    "too short": (
        b"n\n" + b"1\n2\n" * 10,
        "n",
        "has 20 values; windows of --seq-len 24 need at least 38",
    ),
    "too large": (b"n\n" + b"1e300\n-1e300\n" * 40, "n", "too large to be squared"),
}


@pytest.mark.parametrize("text, column, message", UNREADABLE.values(), ids=UNREADABLE)
def test_what_cannot_be_read_is_exit_code_2(text, column, message, tmp_path, capsys):
    path = tmp_path / "s.csv"
    path.write_bytes(text)
    argv = ["--column", column] if column else []
    assert main(["train", "--csv", str(path), "--out", str(tmp_path / "out"), *argv]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message.format(path) in lines[0], lines
    assert not (tmp_path / "out").exists()


def write(path, values) -> str:
    path.write_text("\n".join(["n", *(repr(float(v)) for v in values)]))
    return str(path)


@pytest.mark.parametrize("length", [1, 5, 24])
def test_the_shortest_series_that_is_enough(length, tmp_path):
    need = next(n for n in range(1000) if length < split(n)[0] < split(n)[1] < n)
    argv = ["train", "--epochs", "1", "--seq-len", str(length), "--csv"]
    wave = torch.arange(need).sin()
    assert main([*argv, write(tmp_path / "enough.csv", wave)]) == 0
    assert main([*argv, write(tmp_path / "short.csv", wave[:-1])]) == 2


def forecast(path, **flags) -> Trainer:
    trainer = Trainer(new_config({"csv": path, "epochs": 5, **flags}), Forecast)
    training.fit(trainer, lambda: False, lambda: None, lambda: None)
    return trainer


def test_the_held_out_part_has_no_influence_on_training(tmp_path):
    values = torch.arange(100).sin() * 7 + 3
    other = values.clone()
    other[split(100)[1] :] = 1000
    a, b = (forecast(write(tmp_path / f"{i}.csv", v)) for i, v in enumerate((values, other)))
    assert (a.losses, a.scores) == (b.losses, b.scores)
    for name, tensor in a.model.state_dict().items():
        assert torch.equal(tensor, b.model.state_dict()[name]), name


def test_the_part_that_stops_has_no_influence_on_the_gradients(tmp_path):
    """Normalisation sees the whole training part; so the two series have one mean and deviation."""
    values = torch.arange(100).sin() * 7 + 3
    other = values.clone()
    fit, train = split(100)
    other[fit:train] = values[fit:train].flip(0)
    a, b = (forecast(write(tmp_path / f"{i}.csv", v)) for i, v in enumerate((values, other)))
    assert a.scores != b.scores
    assert a.losses == pytest.approx(b.losses, rel=1e-6)


class Persistence(torch.nn.Module):
    """Says that the last value comes again."""

    def forward(self, x):
        return x, x[:, -1]


def test_forecasts_are_aligned_with_the_values_they_are_of(tmp_path):
    values = torch.arange(60.0) ** 2
    task = Forecast(new_config({"csv": write(tmp_path / "s.csv", values), "dtype": "float64"}))
    assert task.forecast(Persistence()).tolist() == pytest.approx(values[47:59].tolist())
    assert task.next_value(Persistence()) == pytest.approx(59**2)
    found = task.errors(Persistence())
    assert found["model"] == pytest.approx(found["naive"])
    steps = values[48:] - values[47:59]
    assert found["naive"]["mae"] == pytest.approx(steps.mean().item())
    assert found["naive"]["rmse"] == pytest.approx(steps.square().mean().sqrt().item())
    x, y = next(iter(task.batches(0)))
    assert torch.equal(x[:, 1:], y[:, :-1])


def test_every_window_is_trained_on_once_an_epoch_in_another_order():
    task = Forecast(new_config({"csv": "sunspots"}))
    epochs = [torch.cat([y[:, -1, 0] for _, y in task.batches(e)]) for e in (0, 1, 0)]
    assert len(epochs[0]) == split(309)[0] - 24
    assert torch.equal(epochs[0], epochs[2]) and not torch.equal(epochs[0], epochs[1])
    assert torch.equal(epochs[0].sort().values, epochs[1].sort().values)


def test_a_constant_series_is_not_divided_by_zero(tmp_path, capsys):
    assert main(["train", "--epochs", "2", "--csv", write(tmp_path / "s.csv", [5.0] * 60)]) == 0
    assert "the naive forecast is the better one here" in capsys.readouterr().out


def test_another_file_is_not_resumed(tmp_path, capsys):
    path = tmp_path / "s.csv"
    argv = [
        "train",
        "--epochs",
        "2",
        "--csv",
        write(path, range(60)),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(argv) == 0
    write(path, range(1, 61))
    assert main([*argv, "--resume"]) == 2
    assert "was trained on other data" in capsys.readouterr().err


def test_the_sample_is_the_yearly_sunspot_numbers():
    series = read_csv(sample_path("sunspots"), "SUNACTIVITY")
    assert series.axis == list(range(1700, 2009)) and series.axis_name == "YEAR"
    assert (series.values[0], max(series.values), series.values[-1]) == (5, 190.2, 2.9)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_default_flags_beat_the_naive_forecast_of_the_sunspots(seed, tmp_path, capsys):
    argv = ["--csv", str(sample_path("sunspots")), "--seed", str(seed), "--out", str(tmp_path)]
    assert main(["train", *argv]) == 0
    held_out = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["held_out"]
    assert held_out["naive"]["rmse"] == pytest.approx(33.28, abs=0.01)
    for measure in ("rmse", "mae"):
        assert held_out["model"][measure] < 0.75 * held_out["naive"][measure]
    assert "held out 1947..2008 (62 values)" in capsys.readouterr().out


def test_unknown_names_are_paths():
    with pytest.raises(UserError, match="cannot read moonspots"):
        read_csv(sample_path("moonspots"), None)
