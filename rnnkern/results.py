"""What a run leaves in its directory: checkpoint, metrics, pictures, each replaced whole."""

import contextlib
import dataclasses
import json
import os
from pathlib import Path

import torch
from torch import Tensor

from .training import Config, Trainer, UserError

CHECKPOINT = "checkpoint.safetensors"
METRICS = "metrics.jsonl"
FILES = (CHECKPOINT, METRICS, "loss.png", "prediction.png", "forecast.png")
FORMAT = 1
KEY = "rnnkern"  # of our JSON in the safetensors header


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, or leave it as it was: flushed beside it, then renamed over it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint: `tensors` are the weights, Adam's moments, the losses, the best weights."""

    path: Path
    config: Config
    epoch: int
    seconds: float
    fingerprint: str
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, path: Path) -> "Checkpoint":
        """Read a file that `Results.save` wrote. The format holds numbers and JSON: loading it runs
        no code.

        Raises:
            UserError: no such file, damaged, or not one of ours.
        """
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            raise UserError(f"--resume: there is no checkpoint {path}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path} is damaged or no safetensors file: {error}") from None
        try:
            saved = json.loads(metadata[KEY])
            if saved["format"] != FORMAT:
                raise UserError(
                    f"its format is {saved['format']!r}, this version of rnnkern reads {FORMAT}"
                )
            config, rest = (
                Config(**saved["config"]),
                {k: saved[k] for k in ("epoch", "seconds", "fingerprint")},
            )
        except UserError as error:
            raise UserError(f"{path} cannot be resumed: {error}") from None
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{path} is not a checkpoint of rnnkern train") from None
        if not (isinstance(rest["epoch"], int) and isinstance(rest["seconds"], float)):
            raise UserError(f"{path} is not a checkpoint of rnnkern train: epoch {rest['epoch']!r}")
        return cls(path, config, **rest, tensors=tensors)

    def restore(self, trainer: Trainer) -> None:
        """Put everything back, so that training goes on as if it had not stopped.

        Raises:
            UserError: the data has changed, or the tensors are not this model's.
        """
        if self.fingerprint != trainer.task.fingerprint:
            data = trainer.config.csv or "what this seed draws"
            raise UserError(f"{self.path} was trained on other data than {data} now")
        self._check_tensors(trainer)
        trainer.epoch, trainer.seconds = self.epoch, self.seconds
        trainer.losses = self.tensors["losses"].tolist()
        trainer.scores = self.tensors["scores"].tolist()
        trainer.best_score = min(trainer.scores, default=trainer.best_score)
        trainer.model.load_state_dict(self._under("model."))
        trainer.best = self._under("best.")
        for name, tensor in trainer.optimizer.state.items():
            tensor.copy_(self.tensors[f"adam.{name}"])

    def _check_tensors(self, trainer: Trainer) -> None:
        weights, history = trainer.model.state_dict(), torch.empty(self.epoch, dtype=torch.float64)
        wanted = {f"model.{name}": tensor for name, tensor in weights.items()}
        wanted |= {"losses": history, "scores": history if trainer.config.csv else history[:0]}
        wanted |= {f"adam.{name}": tensor for name, tensor in trainer.optimizer.state.items()}
        if self.epoch and trainer.config.csv:
            wanted |= {f"best.{name}": tensor for name, tensor in weights.items()}
        for name in sorted(wanted.keys() | self.tensors.keys()):
            want, got = (_describe(tensors.get(name)) for tensors in (wanted, self.tensors))
            if want != got:
                raise UserError(
                    f"{self.path} does not fit its configuration: {name} is {got}, expected {want}"
                )

    def _under(self, prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}


def _describe(tensor: Tensor | None) -> str:
    return (
        "missing"
        if tensor is None
        else f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
    )


class Results:
    """The directory of one run.

    Raises:
        UserError: it holds an earlier result that is neither resumed nor to be overwritten, or
        cannot be written.
    """

    def __init__(self, path: Path, resume_at: int | None = None, overwrite: bool = False):
        self.path = path
        there = [name for name in FILES if (path / name).exists()]
        if there and resume_at is None and not overwrite:
            what = ", ".join(there)
            raise UserError(f"{path} holds an earlier result ({what}): --resume or --overwrite it")
        with self._writing():
            path.mkdir(parents=True, exist_ok=True)
            # Asks the file system itself: permission bits are not the whole answer (root, read-only
            # mounts).
            write_atomic(path / METRICS, b"".join(self._metrics_before(resume_at)))
            for name in there:
                if resume_at is None and name != METRICS:
                    (path / name).unlink()

    def log(self, record: dict) -> None:
        """Append a line to the metrics."""
        with self._writing(), open(self.path / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def save(self, trainer: Trainer) -> None:
        """Replace the checkpoint by the trainer's state.

        Raises:
            Diverged: a loss is not finite; the earlier checkpoint stays.
        """
        from safetensors.torch import save

        trainer.read()
        tensors = {f"model.{name}": tensor for name, tensor in trainer.model.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in trainer.best.items()}
        tensors |= {f"adam.{name}": tensor for name, tensor in trainer.optimizer.state.items()}
        tensors |= {
            "losses": torch.tensor(trainer.losses, dtype=torch.float64),
            "scores": torch.tensor(trainer.scores, dtype=torch.float64),
        }
        header = {
            "format": FORMAT,
            "epoch": trainer.epoch,
            "seconds": trainer.seconds,
            "fingerprint": trainer.task.fingerprint,
            "config": dataclasses.asdict(trainer.config),
        }
        data = save(
            {name: tensor.clone() for name, tensor in tensors.items()},  # the weights are views
            {KEY: json.dumps(header)},
        )
        with self._writing():
            write_atomic(self.path / CHECKPOINT, data)

    def picture(self, name: str, png: bytes) -> None:
        """Replace a picture."""
        with self._writing():
            write_atomic(self.path / name, png)

    def _metrics_before(self, epoch: int | None) -> list[bytes]:
        """The lines a resumed run keeps: earlier epochs', without one that a crash cut short."""
        path, kept = self.path / METRICS, []
        if epoch is None or not path.exists():
            return kept
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                record = json.loads(line)
                if line.endswith(b"\n") and record["epoch"] < epoch:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue
        return kept

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write to {self.path}: {error.strerror or error}") from None
