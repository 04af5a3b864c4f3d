"""Training: what is learned (`Config`, `Counting`), and the loop that learns it (`Trainer`, `fit`).

A task is anything with `log_every`, `fingerprint`, `batches(epoch)` and `score(model)`: `Counting`
here is the notebook's, `series.Forecast` is a user's own time series. Everything random is a
function of (seed, epoch): a resumed run equals the uninterrupted one without a generator's state.

Letters: T steps, B batch.
"""

import contextlib
import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from . import dispatch, parity, reference
from .modules import SimpleRNN

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
CELLS = ("fused", "reference")


class UserError(Exception):
    """What was asked for cannot be done: one line for the user, exit code 2."""


class Diverged(Exception):
    """The loss stopped being a finite number: exit code 1."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides a run's result; the flags of `rnnkern train`, under their names.

    Raises:
        UserError: a value that no run can have, or of another type than the field's.
    """

    csv: str | None = None
    column: str | None = None
    cell: str = "fused"
    backend: str = "auto"
    hidden: int = 16
    layers: int = 1
    nonlinearity: str = "tanh"
    seq_len: int = 5
    batch: int = 16
    epochs: int = 2000
    lr: float = 0.01
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            # bool is an int to isinstance, and a checkpoint's JSON may hold anything.
            if not isinstance(value, field.type) or isinstance(value, bool):
                raise UserError(f"{flag(field.name)} must be {field.type}, got {value!r}")
        for name in ("hidden", "layers", "seq_len", "batch", "epochs"):
            if getattr(self, name) < 1:
                raise UserError(f"{flag(name)} must be at least 1, got {getattr(self, name)}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise UserError(f"--lr must be a positive number, got {self.lr}")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed must be in [0, 2^63), got {self.seed}")
        choices = {
            "cell": CELLS,
            "backend": ("auto", *dispatch.BACKENDS),
            "nonlinearity": tuple(reference.ACTIVATIONS),
            "dtype": tuple(DTYPES),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UserError(
                    f"unknown {flag(name)} {getattr(self, name)!r}: choose from {', '.join(known)}"
                )
        if self.cell == "reference" and self.backend != "auto":
            raise UserError("--backend chooses the fused cell's backend; --cell reference has none")

    def to(self) -> dict:
        """The device and dtype, as `Tensor.to` takes them."""
        return {"device": find_device(self.device), "dtype": DTYPES[self.dtype]}


def flag(name: str) -> str:
    """The command line's spelling of a `Config` field."""
    return "--" + name.replace("_", "-")


def find_device(name: str) -> torch.device:
    """The torch device called `name`, proved to be there.

    Raises:
        UserError: no such device, or not on this machine.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown --device {name!r}: cpu, cuda, cuda:0, ...") from None
    try:
        # meta tensors can be made but hold no numbers, so the proof is to read one back.
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"--device {name} is not available here: {str(error).splitlines()[0]}"
        ) from None
    return device


def check_backend(config: Config) -> None:
    """Refuse, before anything is trained or written, a named backend that cannot run this model."""
    if config.backend == "auto":
        return
    to = config.to()
    reasons = dispatch.explain(
        device=str(to["device"]),
        dtype=to["dtype"],
        hidden_size=config.hidden,
        nonlinearity=config.nonlinearity,
    )[config.backend]
    if reasons:
        raise UserError(f"--backend {config.backend} cannot run this: {'; '.join(reasons)}")


@contextlib.contextmanager
def few_threads(config: Config) -> Iterator[None]:
    """One thread where a step is too small to share: waking a second costs more than it does.

    At the notebook's sizes (4096 multiplications a step) an epoch on two threads takes twice as
    long as on one, and many times that when another program has the second core.
    """
    small = config.batch * config.hidden**2 < 2**20
    with parity.threads(1 if small else torch.get_num_threads()):
        yield


def build_model(config: Config) -> nn.Module:
    """The configured cell on its device, with the same weights on every device and in every dtype.

    A series starts from torch.nn.RNN's uniform(+-1/sqrt(hidden)): the notebook's N(0, 1) weights
    saturate every unit, which counting survives but a noisy series does not.
    """
    sizes = (1, config.hidden, 1)  # drawn on the CPU in float32
    if config.cell == "fused":
        model = SimpleRNN(*sizes, config.layers, config.nonlinearity, backend=config.backend)
    elif (config.layers, config.nonlinearity, config.dtype) == (1, "tanh", "float32"):
        model = reference.SimpleRNN(*sizes)
    else:  # what the notebook's class cannot be, the definition of the scan can
        model = SimpleRNN(*sizes, config.layers, config.nonlinearity, backend="reference")
    if config.csv:
        bound = config.hidden**-0.5
        for parameter in model.parameters():
            nn.init.uniform_(parameter, -bound, bound)
    return model.to(**config.to())


class FlatAdam:
    """torch's Adam over one vector, which all parameters and gradients become views of.

    The functional form (torch.optim.adam.adam) with torch.optim.Adam's defaults. At the notebook's
    sizes an epoch is a handful of small calls: with torch.optim.Adam the step is a third of it,
    55 us, nearly all of it bookkeeping for each of six parameters; this one takes 20.
    """

    def __init__(self, model: nn.Module, lr: float):
        parameters = list(model.parameters())
        sizes = [parameter.numel() for parameter in parameters]
        self.values = torch.cat([parameter.detach().flatten() for parameter in parameters])
        self.grad = torch.zeros_like(self.values)
        views = zip(parameters, self.values.split(sizes), self.grad.split(sizes), strict=True)
        for parameter, value, grad in views:
            parameter.data, parameter.grad = value.view_as(parameter), grad.view_as(parameter)
        self.lr = lr
        self.state = {
            "step": torch.zeros((), device=self.values.device),
            "exp_avg": torch.zeros_like(self.values),
            "exp_avg_sq": torch.zeros_like(self.values),
        }
        try:  # one kernel, where the device has one
            torch.optim.Adam([self.values], fused=True)
            self._fused = True
        except RuntimeError:
            self._fused = False

    def zero_grad(self) -> None:
        """Zero the gradients in place; they stay views."""
        self.grad.zero_()

    @torch.no_grad()
    def step(self) -> None:
        """One step of Adam."""
        adam(
            [self.values],
            [self.grad],
            [self.state["exp_avg"]],
            [self.state["exp_avg_sq"]],
            [],
            [self.state["step"]],
            fused=self._fused,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=self.lr,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )


def fingerprint(data: Tensor) -> str:
    """A digest of the training data: a checkpoint is only resumed on the data it was made with."""
    return hashlib.sha256(data.to("cpu", torch.float64).contiguous().numpy().tobytes()).hexdigest()


class Counting:
    """The notebook's task: from random starts in 0..9, predict the next number at every step.

    One full batch, drawn from torch's global generator.
    """

    log_every = 100

    def __init__(self, config: Config):
        x, y = reference.toy_data(config.seq_len, config.batch)
        self.starts = sorted({int(start) for start in x[:, 0, 0]})
        self.fingerprint = fingerprint(x)
        self._to = config.to()
        self._batches = [(x.to(**self._to), y.to(**self._to))]
        self.inputs = list(range(config.seq_len))

    def batches(self, epoch: int) -> list[tuple[Tensor, Tensor]]:
        """The (x, y) pairs of an epoch, each (B, T, 1)."""
        return self._batches

    def score(self, model: nn.Module) -> None:
        """No data is held back: the notebook judges this task by its training loss."""
        return None

    def predict(self, model: nn.Module) -> list[float]:
        """What follows each of 0, 1, ..., T-1, read as one sequence."""
        with torch.no_grad():
            outputs, _ = model(torch.tensor(self.inputs, **self._to).view(1, -1, 1))
        return outputs.flatten().tolist()


class Trainer:
    """A model being trained: its weights, Adam's moments, and the losses of every epoch so far.

    Raises:
        UserError: data or sizes that no model can be made for.
    """

    def __init__(self, config: Config, make_task: Callable[[Config], object]):
        self.config = config
        # Once, then the data, then the weights: the notebook's order.
        torch.manual_seed(config.seed)
        try:
            self.task = make_task(config)
            self.model = build_model(config)
        except (RuntimeError, TypeError, MemoryError) as error:  # how torch refuses absurd sizes
            reason = str(error).splitlines()[0]
            raise UserError(f"a model of these sizes cannot be made: {reason}") from None
        self.optimizer = FlatAdam(self.model, config.lr)
        self.epoch = 0
        self.seconds = 0.0
        self.losses: list[float] = []
        self.scores: list[float] = []
        self.best_score = math.inf
        self.best: dict[str, Tensor] = {}
        self._unread: list[Tensor] = []

    def advance(self) -> None:
        """Train one epoch. Losses stay on the device until `read`: reading waits for the device."""
        model, optimizer, losses = self.model, self.optimizer, []
        for x, y in self.task.batches(self.epoch):
            optimizer.zero_grad()
            losses.append(self._backward(x, y))
            optimizer.step()
        self._unread.append(losses[0] if len(losses) == 1 else torch.stack(losses).mean())
        score = self.task.score(model)
        if score is not None:
            if score < self.best_score:
                self.best_score = score
                self.best = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            self.scores.append(score)
        self.epoch += 1

    def _backward(self, x: Tensor, y: Tensor) -> Tensor:
        """Add a batch's gradient; returns its loss."""
        outputs, _ = self.model(x)
        loss = nn.functional.mse_loss(outputs, y)
        loss.backward()
        return loss.detach()

    def last_loss(self) -> float:
        """The latest epoch's loss, read from the device."""
        return self._unread[-1].item() if self._unread else self.losses[-1]

    def read(self) -> None:
        """Bring the losses up to date.

        Raises:
            Diverged: one of them is not finite.
        """
        if not self._unread:
            return
        first = len(self.losses)
        self.losses += torch.stack(self._unread).double().tolist()
        self._unread.clear()
        for epoch, loss in enumerate(self.losses[first:], first):
            if not math.isfinite(loss):
                raise Diverged(
                    f"the loss became {loss} at epoch {epoch}; "
                    f"a smaller --lr than {self.config.lr} may help"
                )

    def use_best(self) -> None:
        """Load the weights with the best score, where the task keeps one."""
        if self.best:
            self.model.load_state_dict(self.best)


def fit(
    trainer: Trainer,
    stopped: Callable[[], bool],
    on_log: Callable[[], None],
    on_tick: Callable[[], None],
    tick_seconds: float = 0.1,
) -> None:
    """Train up to the configured epoch, or to the end of the epoch in which `stopped()` turns true.

    `on_log` follows epochs 0, log_every, 2 log_every, ...; `on_tick` runs at most every
    `tick_seconds`.

    Raises:
        Diverged: a loss is not finite. Noticed when the losses are read, not in the epoch itself.
    """
    begun, next_tick = time.perf_counter() - trainer.seconds, 0.0
    while trainer.epoch < trainer.config.epochs and not stopped():
        trainer.advance()
        now = time.perf_counter()
        trainer.seconds = now - begun
        if (trainer.epoch - 1) % trainer.task.log_every == 0:
            trainer.read()
            on_log()
        if now >= next_tick:
            on_tick()
            next_tick = time.perf_counter() + tick_seconds
    trainer.read()


@dataclasses.dataclass
class Comparison:
    """Two cells trained side by side: their losses, and each block's microseconds per epoch."""

    losses: dict[str, list[float]]
    block_us: dict[str, list[float]]

    def loss_error(self, epochs: int = 100) -> float:
        """The largest relative difference of the losses over the first epochs."""
        pairs = zip(self.losses["fused"][:epochs], self.losses["reference"][:epochs], strict=True)
        return max(abs(a - b) / max(abs(b), 1e-300) for a, b in pairs)


def compare(config: Config, make_task: Callable[[Config], object], block: int = 20) -> Comparison:
    """Train both cells from the same weights on the same data, in turns of `block` epochs.

    In turns, and each block led by the other cell than the last: what else the machine does then
    falls on both alike.
    """
    trainers = {cell: Trainer(c, make_task) for cell, c in _both_cells(config).items()}
    trainers["reference"].model.load_state_dict(trainers["fused"].model.state_dict())
    for trainer in trainers.values():  # the first call pays for lazy loading; no step is taken
        for x, y in list(trainer.task.batches(0))[:1] * 3:
            nn.functional.mse_loss(trainer.model(x)[0], y).backward()
        trainer.optimizer.zero_grad()
    times: dict[str, list[float]] = {cell: [] for cell in CELLS}
    order = list(CELLS)
    while trainers["fused"].epoch < config.epochs:
        count = min(block, config.epochs - trainers["fused"].epoch)
        for cell in order:
            start = time.perf_counter()
            for _ in range(count):
                trainers[cell].advance()
            trainers[cell].last_loss()  # waits for the device
            times[cell].append((time.perf_counter() - start) / count * 1e6)
            trainers[cell].read()
        order.reverse()
    return Comparison({cell: t.losses for cell, t in trainers.items()}, times)


def _both_cells(config: Config) -> dict[str, Config]:
    return {
        "fused": dataclasses.replace(config, cell="fused"),
        "reference": dataclasses.replace(config, cell="reference", backend="auto"),
    }
