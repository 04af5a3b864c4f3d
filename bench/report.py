"""What bench/gpu.py found, as tables in Markdown and a picture.

    python bench/report.py FILE.jsonl [--picture FILE.png]

How many times as fast as torch.nn.RNN (cuDNN) rnnkern.RNN is, forward and in training, over
shapes and dtypes. Then a table for each kind of layer: microseconds as CUDA graphs, that ratio, and
how far from the floor it is. The picture (with matplotlib): microseconds a step over H.
"""

import argparse
import json
from pathlib import Path

OURS, STOCK = "rnnkern.RNN", "torch.nn.RNN"


def read(file: Path) -> tuple[dict, list[dict]]:
    """The environment's record, and the timed ones of layers."""
    records = [json.loads(line) for line in file.read_text().splitlines()]
    (environment,) = [r for r in records if r["section"] == "environment"]
    layers = [r for r in records if r["section"] == "layer"]
    return environment, [r for r in layers if "graph_us" in r or "python_us" in r]


def microseconds(record: dict) -> float:
    """As a CUDA graph; of what cannot be captured, as Python calls it."""
    return record.get("graph_us", record.get("python_us"))


def summary(records: list[dict]) -> list[str]:
    """Markdown: a row for each shape and kind, a column for each dtype, in it the ratio of
    torch.nn.RNN's time to rnnkern.RNN's, forward / training."""
    us: dict[tuple, float] = {
        (r["kind"], r["batch"], r["hidden"], r["mode"], r["what"], r["way"]): microseconds(r)
        for r in records
    }
    modes = list(dict.fromkeys(key[3] for key in us))
    kinds = list(dict.fromkeys(key[0] for key in us))
    rows = sorted({key[:3] for key in us}, key=lambda row: (kinds.index(row[0]), *row[1:]))
    lines = [f"| kind | B | H | {' | '.join(modes)} |", "| --- " * (3 + len(modes)) + "|"]
    for row in rows:
        cells = []
        for mode in modes:
            pair = []
            for what in ("forward", "training"):
                ours, stock = (us.get((*row, mode, what, way)) for way in (OURS, STOCK))
                pair.append(f"{stock / ours:.2f}" if ours and stock else "")
            cells.append(" / ".join(pair).strip(" /"))
        if any(cells):
            lines.append(f"| {' | '.join(map(str, [*row, *cells]))} |")
    return lines


def tables(records: list[dict]) -> list[str]:
    """Markdown: a row for each case, a column for each way."""
    ways = list(dict.fromkeys(r["way"] for r in records))
    lines: list[str] = []
    for kind, what in dict.fromkeys((r["kind"], r["what"]) for r in records):
        mine = [r for r in records if (r["kind"], r["what"]) == (kind, what)]
        here = [way for way in ways if any(r["way"] == way for r in mine)]
        heads = [f"{kind}, {what}: (B, T, I, H)", "dtype", *(f"{way} us" for way in here)]
        heads += [f"x {STOCK}", "x floor"]
        lines += ["", f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
        cases = dict.fromkeys(
            (r["batch"], r["steps"], r["features"], r["hidden"], r["mode"]) for r in mine
        )
        for case in cases:
            of = {
                r["way"]: r
                for r in mine
                if case == (r["batch"], r["steps"], r["features"], r["hidden"], r["mode"])
            }
            cells = [f"{microseconds(of[way]):.0f}" if way in of else "" for way in here]
            ratio = floor = ""
            if OURS in of:
                us = microseconds(of[OURS])
                if STOCK in of:
                    ratio = f"**{microseconds(of[STOCK]) / us:.2f}**"
                if of[OURS].get("floor_us"):
                    floor = f"{us / of[OURS]['floor_us']:.1f}"
            shape = ", ".join(map(str, case[:-1]))
            lines.append(f"| ({shape}) | {case[-1]} | {' | '.join([*cells, ratio, floor])} |")
    return lines


def picture(environment: dict, records: list[dict], file: Path) -> None:
    """Microseconds a step of plain layers, over H: a panel for each dtype, a line for each B."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    plain = [r for r in records if (r["kind"], r["what"]) == ("plain", "forward")]
    modes = list(dict.fromkeys(r["mode"] for r in plain))
    figure, panels = pyplot.subplots(
        1, len(modes), sharey=True, squeeze=False, figsize=(4 * len(modes), 4)
    )
    for panel, mode in zip(panels[0], modes, strict=True):
        for way, style in ((STOCK, "--"), (OURS, "-")):
            of = [r for r in plain if (r["mode"], r["way"]) == (mode, way)]
            for i, batch in enumerate(sorted({r["batch"] for r in of})):
                points = sorted(
                    (r["hidden"], microseconds(r) / r["steps"]) for r in of if r["batch"] == batch
                )
                panel.plot(
                    *zip(*points, strict=True), style, marker=".", color=f"C{i}",
                    label=f"{way}, B {batch}",
                )  # fmt: skip
        panel.set(title=mode, xlabel="hidden size", xscale="log", yscale="log")
    panels[0][0].set_ylabel("us a step, forward")
    panels[0][-1].legend(fontsize="small")
    figure.suptitle(f"{environment['device']}, torch {environment['torch']}, {environment['date']}")
    figure.tight_layout()
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    environment, records = read(args.file)
    print(", ".join(f"{name} {value}" for name, value in environment.items() if name != "section"))
    print("\n".join(["", *summary(records), *tables(records)]))
    if args.picture:
        picture(environment, records, args.picture)


if __name__ == "__main__":
    main()
