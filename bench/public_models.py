"""rnnkern.accelerate on public models: each package trains its own, as it is and swapped, in turns.

    python bench/public_models.py [PACKAGE ...] [--threads N] [--rounds N] [--json FILE]

Nobody here wrote these models. They are built by their package, with its defaults but for what the
functions below name, and trained in float32 by its own training entry point; all that is ours is
the call of rnnkern.accelerate once the model is built, and a record of each step's loss. The loss
curves (means over each of EPOCHS) of both must agree before anything is timed.

Each row: the median over the rounds of a run's median milliseconds for a training step, all of
what the package does in it, and the median over the rounds of the ratio as it is / swapped, above
1 where the swap is faster.

A package that is not installed is skipped. All of them, beside the torch that rnnkern was built
for (torchvision and torchaudio are not needed):

    echo torch==2.13.0 > constraints.txt  # what `pip list` says of the installed torch
    pip install -c constraints.txt darts==0.48.1 neuralforecast==3.3.0 sktime==1.2.0
    pip install -c constraints.txt flair==0.15.1 deeptab==2.1.0
"""

import importlib.metadata
import logging
import os
import random
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from timing import arguments, finish, host

import rnnkern

EPOCHS = 5
TOLERANCE = 1e-3  # of the loss curves: a relu at 0 may go either way, and its gradient with it
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
SUNSPOTS = Path(rnnkern.__file__).parent / "data" / "sunspots.csv"


class Watch:
    """One training run: swaps the model if asked to, and keeps what the training reports."""

    def __init__(self, swap: bool) -> None:
        self.swap = swap
        self.swapped: list[str] = []
        self.losses: list[float] = []
        self.ends: list[float] = []

    def built(self, model: torch.nn.Module) -> None:
        if self.swap:
            self.swapped += rnnkern.accelerate(model).swapped

    def step(self, loss: float) -> None:
        self.losses.append(loss)
        self.ends.append(time.perf_counter())

    def curve(self) -> np.ndarray:
        return np.reshape(self.losses, (EPOCHS, -1)).mean(1)

    def ms(self) -> float:
        """The median step after the first epoch's."""
        first = len(self.ends) // EPOCHS
        return statistics.median(np.diff(self.ends[first:])) * 1e3


def callback(base: type, watch: Watch):
    """A Lightning callback (of the Lightning that `base` is from), before the optimizers exist."""

    class Callback(base):
        def setup(self, trainer, module, stage):
            if stage == "fit":
                watch.built(module)

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            watch.step(float(outputs["loss"]))

        def __deepcopy__(self, memo):
            return self

    return Callback()


def sunspots():
    from darts import TimeSeries

    values = np.loadtxt(SUNSPOTS, delimiter=",", skiprows=1, dtype=np.float32)[:, 1]
    return TimeSeries.from_values(values / values.max())


def darts_rnn(watch: Watch) -> None:
    from darts.models import RNNModel
    from pytorch_lightning import Callback

    RNNModel(
        model="RNN",
        input_chunk_length=24,
        training_length=48,
        n_epochs=EPOCHS,
        random_state=0,
        pl_trainer_kwargs=QUIET | {"callbacks": [callback(Callback, watch)]},
    ).fit(sunspots(), verbose=False)


def darts_block_rnn(watch: Watch) -> None:
    from darts.models import BlockRNNModel
    from pytorch_lightning import Callback

    BlockRNNModel(
        model="RNN",
        input_chunk_length=48,
        output_chunk_length=12,
        n_rnn_layers=2,
        hidden_dim=64,
        n_epochs=EPOCHS,
        random_state=0,
        pl_trainer_kwargs=QUIET | {"callbacks": [callback(Callback, watch)]},
    ).fit(sunspots(), verbose=False)


def neuralforecast(model_class: type, watch: Watch, **options) -> None:
    """NeuralForecast trains a deep copy of the model it is given, swapped by then."""
    from neuralforecast import NeuralForecast
    from neuralforecast.utils import AirPassengersPanel
    from pytorch_lightning import Callback

    model = model_class(
        h=12,
        input_size=48,
        max_steps=EPOCHS * 10,
        callbacks=[callback(Callback, watch)],
        **options,
        **QUIET,
    )
    watch.built(model)
    NeuralForecast([model], freq="ME").fit(AirPassengersPanel[["unique_id", "ds", "y"]])


def neuralforecast_rnn(watch: Watch) -> None:
    from neuralforecast.models import RNN

    neuralforecast(RNN, watch)


def neuralforecast_dilated_rnn(watch: Watch) -> None:
    from neuralforecast.models import DilatedRNN

    neuralforecast(DilatedRNN, watch, cell_type="RNN")


def sktime_rnn(watch: Watch) -> None:
    from sktime.classification.deep_learning.rnn import SimpleRNNClassifierTorch
    from sktime.datasets import load_basic_motions

    class Classifier(SimpleRNNClassifierTorch):
        def _build_network(self, X, y):
            network = super()._build_network(X, y)
            watch.built(network)
            return network

    class Loss(torch.nn.CrossEntropyLoss):
        def forward(self, input, target):
            loss = super().forward(input, target)
            watch.step(loss.item())
            return loss

    x, y = load_basic_motions(split="train", return_type="numpy3d")
    Classifier(num_epochs=EPOCHS, criterion=Loss()).fit(x, y)


def flair_tagger(watch: Watch) -> None:
    """A made-up language: a word's tag is its own parity and that of the word before it."""
    from flair.data import Corpus, Dictionary, Sentence
    from flair.datasets import FlairDatapointDataset
    from flair.embeddings import OneHotEmbeddings
    from flair.models import SequenceTagger
    from flair.trainers import ModelTrainer
    from flair.trainers.plugins import TrainerPlugin

    class Plugin(TrainerPlugin):
        @TrainerPlugin.hook
        def metric_recorded(self, record):
            if record.joined_name == "train/batch_loss":
                watch.step(record.value)

    def sentences(count):
        for _ in range(count):
            words = [random.randrange(200) for _ in range(random.randint(5, 40))]
            sentence = Sentence([f"w{word}" for word in words])
            for token, word, last in zip(sentence, words, [0, *words], strict=False):
                token.add_label("pos", f"{word % 2}{last % 2}")
            yield sentence

    splits = [FlairDatapointDataset(list(sentences(count))) for count in (256, 16, 16)]
    corpus = Corpus(*splits)
    tags = corpus.make_label_dictionary("pos", add_unk=False)
    vocabulary = Dictionary()
    for word in range(200):
        vocabulary.add_item(f"w{word}")
    model = SequenceTagger(OneHotEmbeddings(vocabulary), tags, "pos", rnn_type="RNN")
    watch.built(model)
    ModelTrainer(model, corpus).train(
        "tagger",
        max_epochs=EPOCHS,
        plugins=[Plugin()],
        save_final_model=False,
        create_file_logs=False,
        create_loss_file=False,
    )


def deeptab_rnn(watch: Watch) -> None:
    from deeptab.models import TabulaRNNRegressor
    from lightning.pytorch import Callback
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True, as_frame=True)
    y = (y - y.mean()) / y.std()
    TabulaRNNRegressor().fit(
        x,
        y,
        max_epochs=EPOCHS,
        random_state=0,
        callbacks=[callback(Callback, watch)],
        enable_progress_bar=False,
    )


MODELS = [  # package, model, its recurrent layers' (B, T, I, H), its training
    ("darts", "RNNModel", "(32, 48, 1, 25)", darts_rnn),
    ("darts", "BlockRNNModel", "(32, 48, 1, 64), 2 layers", darts_block_rnn),
    ("neuralforecast", "RNN", "(128, 48, 1, 128), 2 layers", neuralforecast_rnn),
    (
        "neuralforecast",
        "DilatedRNN",
        "(128 d, 48 / d, 128, 128), d 1 to 8",
        neuralforecast_dilated_rnn,
    ),
    ("sktime", "SimpleRNNClassifierTorch", "(1, 100, 6, 6)", sktime_rnn),
    ("flair", "SequenceTagger", "(32, 5 to 40, 300, 256), packed, bidirectional", flair_tagger),
    ("deeptab", "TabulaRNNRegressor", "(128, 10, 128 or 256, 256), relu, 4 layers", deeptab_rnn),
]


def run(train, swap: bool) -> Watch:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    watch = Watch(swap)
    train(watch)
    return watch


def check(train) -> tuple[list[str], np.ndarray, float]:
    """Names of the swapped modules, the loss curve as it is, and how far the other is from it.

    Raises:
        AssertionError: nothing was swapped or the curves differ, so nothing is timed.
    """
    plain, swapped = run(train, False), run(train, True)
    if not swapped.swapped:
        raise AssertionError("nothing was swapped")
    a, b = plain.curve(), swapped.curve()
    difference = float(np.max(np.abs(a - b) / np.abs(a)))
    if not difference < TOLERANCE:
        raise AssertionError(f"losses differ by {difference:.1e}: not timed\n{a}\n{b}")
    return swapped.swapped, a, difference


def measure(train, rounds: int) -> tuple[list[float], float]:
    """Median milliseconds a step, as it is and swapped, and the median ratio over the rounds."""
    times = []
    for i in range(rounds):
        order = (False, True) if i % 2 == 0 else (True, False)
        ms = {swap: run(train, swap).ms() for swap in order}
        times.append((ms[False], ms[True]))
    medians = [statistics.median(t[i] for t in times) for i in range(2)]
    return medians, statistics.median(a / b for a, b in times)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help="default: all installed")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    about = host(args)
    titles = ["model", "(B, T, I, H)", "swapped", "loss, first to last", "losses differ"]
    titles += ["step: as it is ms", "swapped ms", "ratio"]
    print(f"| {' | '.join(titles)} |")
    print("| --- " * len(titles) + "|")
    records = []
    home = os.getcwd()
    for package, name, shape, train in MODELS:
        if args.packages and package not in args.packages:
            continue
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            print(f"| {package} {name} | skipped: {package} is not installed |", flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)  # for what the packages write
            try:
                swapped, losses, difference = check(train)
                (plain_ms, swapped_ms), ratio = measure(train, args.rounds)
            finally:
                os.chdir(home)
        row = {
            "package": f"{package} {version}",
            "model": name,
            "shape": shape,
            "swapped": swapped,
            "losses": losses.tolist(),
            "losses_differ": difference,
            "step": {"plain_ms": plain_ms, "swapped_ms": swapped_ms, "ratio": ratio},
        }
        records.append(row)
        cells = [f"{package} {version} {name}", shape, str(len(swapped))]
        cells += [f"{losses[0]:.4g} to {losses[-1]:.4g}", f"{difference:.0e}"]
        cells += [f"{plain_ms:.2f}", f"{swapped_ms:.2f}", f"{ratio:.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)
    finish(args, about, records)


if __name__ == "__main__":
    main()
