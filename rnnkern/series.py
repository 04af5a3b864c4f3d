"""A user's own time series: reading a column of a CSV file, and the task of forecasting its next
value.

The series is split by time: the last fifth is held out and only ever predicted; normalisation,
training and the choice of the best epoch (on the last 15 % of the training part) see nothing of it.

Letters: T steps (`seq_len`), B batch, n values in the series.
"""

import csv
import dataclasses
import importlib.resources
import itertools
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from .training import Config, UserError, fingerprint

SAMPLES = {"sunspots": "sunspots.csv"}


@dataclasses.dataclass(frozen=True)
class Series:
    """One column of a CSV file; the axis is the first column if it counts up, else row numbers."""

    path: Path
    column: str
    values: list[float]
    axis_name: str
    axis: list[float]


def sample_path(name: str) -> Path:
    """The file behind `name`: a path, or a sample that ships with the package ("sunspots")."""
    if name in SAMPLES and not Path(name).exists():
        return Path(str(importlib.resources.files(__package__) / "data" / SAMPLES[name]))
    return Path(name)


def absolute(name: str) -> str:
    """`name` as a checkpoint keeps it: the same file when resumed in another directory."""
    return name if sample_path(name) != Path(name) else os.path.abspath(name)


def read_csv(path: Path, column: str | None) -> Series:
    """Read `column` of a comma, semicolon or tab separated file whose first line names the columns.

    `column` may be None where the file leaves no choice: one column, or one beside an axis.

    Raises:
        UserError: no such file or column; a cell that is missing, not a number or not finite.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            # Not csv.Sniffer: it guesses letters as delimiters in a file of one column.
            reader = csv.reader(file, delimiter=max(",;\t", key=first.count))
            header = [name.strip() for name in next(reader, [])]
            rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV text file: {error}") from None
    if not any(header):
        raise UserError(f"{path} is empty: its first line must name the columns")
    has = f"{path} has the columns {', '.join(header)}"
    if column is None:
        if len(header) > 2:
            raise UserError(f"--csv needs --column NAME; {has}")
        column = header[-1]
    if header.count(column) != 1:
        raise UserError(
            f"--column {column}: {'ambiguous' if column in header else 'no such column'}; {has}"
        )
    index = header.index(column)
    values = [
        _number(path, line, column, row[index] if index < len(row) else "") for line, row in rows
    ]
    axis_name, axis = "row", [float(i) for i in range(1, len(values) + 1)]
    if index != 0:
        try:
            first_column = [float(row[0]) for _, row in rows]
            if all(a < b for a, b in itertools.pairwise(first_column)):
                axis_name, axis = header[0], first_column
        except ValueError:
            pass  # dates, names: the row number stays the axis
    return Series(path, column, values, axis_name, axis)


def _number(path: Path, line: int, column: str, cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        what = f"holds {cell!r}, not a number" if cell.strip() else "is empty"
    else:
        if math.isfinite(value):
            return value
        what = f"holds {cell.strip()!r}, not a finite number"
    raise UserError(f"{path}, row at line {line}: column {column} {what}")


def split(n: int) -> tuple[int, int]:
    """How many values, from the first, the weights are fitted on, and the training part has."""
    train = n * 4 // 5
    return train * 17 // 20, train


def errors(predicted: Tensor, actual: Tensor) -> dict[str, float]:
    """Root mean square and mean absolute error, in the units of the arguments."""
    difference = predicted - actual
    return {"rmse": difference.square().mean().sqrt().item(), "mae": difference.abs().mean().item()}


class Forecast:
    """Predict the next value at every step of windows of `seq_len`, in shuffled mini-batches."""

    log_every = 10

    def __init__(self, config: Config):
        self.series = read_csv(sample_path(config.csv), config.column)
        values = torch.tensor(self.series.values, dtype=torch.float64)
        n, length = len(values), config.seq_len
        fit, self.train = split(n)
        if not length < fit < self.train < n:
            need = next(m for m in itertools.count(n) if length < split(m)[0] < split(m)[1] < m)
            raise UserError(
                f"column {self.series.column} has {n} values; "
                f"windows of --seq-len {length} need at least {need}"
            )
        self.values, self.length = values, length
        self.mean, self.std = values[: self.train].mean(), values[: self.train].std()
        if not torch.isfinite(self.std):
            raise UserError(
                f"the values of column {self.series.column} are too large to be squared"
            )
        if self.std == 0:  # a constant: nothing to scale
            self.std = torch.ones(())
        self.fingerprint = fingerprint(values)
        scaled = ((values - self.mean) / self.std).to(**config.to())
        self._windows = scaled.unfold(
            0, length + 1, 1
        )  # (n - T, T + 1), a view: window i ends with value i + T
        self._fit = self._windows[: fit - length]
        self._stop = self._windows[fit - length : self.train - length]
        self._scaled, self._seed, self._batch = scaled, config.seed, config.batch

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The (x, y) pairs of an epoch, each (B, T, 1), the last batch maybe smaller."""
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + epoch) % 2**63)
        for index in torch.randperm(len(self._fit), generator=generator).split(self._batch):
            window = self._fit[index.to(self._fit.device)]
            yield window[:, :-1, None], window[:, 1:, None]

    def score(self, model: nn.Module) -> float:
        """The normalised mean square error on the windows that choose the best epoch."""
        predicted = self._next(model, self._stop[:, :-1])
        return nn.functional.mse_loss(predicted, self._stop[:, -1]).item()

    def forecast(self, model: nn.Module) -> Tensor:
        """Predict each held-out value from the true ones before it: float64, the column's units."""
        return self._units(self._next(model, self._windows[self.train - self.length :, :-1]))

    def next_value(self, model: nn.Module) -> float:
        """The prediction of the value that follows the series."""
        return self._units(self._next(model, self._scaled[None, -self.length :])).item()

    def errors(self, model: nn.Module) -> dict[str, dict[str, float]]:
        """Errors on the held-out values: the model's, and those of saying that nothing changes."""
        actual = self.values[self.train :]
        return {
            "model": errors(self.forecast(model), actual),
            "naive": errors(self.values[self.train - 1 : -1], actual),
        }

    def _next(self, model: nn.Module, windows: Tensor) -> Tensor:
        with torch.no_grad():  # in slices, so that a long series' states do not all exist at once
            return torch.cat([model(w[..., None])[1][:, 0] for w in windows.split(4096)])

    def _units(self, scaled: Tensor) -> Tensor:
        return scaled.to("cpu", torch.float64) * self.std + self.mean
