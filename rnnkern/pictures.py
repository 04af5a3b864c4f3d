"""The pictures of a run, as PNG bytes. Drawn without pyplot: no display, no global state."""

import io

LINE, OTHER, MUTED = "#1f5fa8", "#c8501e", "#8a8a8a"


def _figure(panels: int = 1, size=(8.0, 4.5), **kwargs):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, **kwargs)
    for axis in [axes] if panels == 1 else axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.set_axisbelow(True)
    return figure, axes


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def loss(losses: list[float], scores: list[float], title: str, unit: str) -> bytes:
    """Every epoch's loss on a log scale, and its score on the data that chooses the best epoch."""
    figure, axis = _figure()
    axis.semilogy(losses, color=LINE, linewidth=1.0, label="training")
    if scores:
        best = min(range(len(scores)), key=scores.__getitem__)
        axis.semilogy(
            scores, color=OTHER, linewidth=1.0, label="end of the training part, not trained on"
        )
        axis.plot(
            best, scores[best], "o", color=OTHER, label=f"best: epoch {best}, used for the forecast"
        )
        axis.legend(frameon=False)
    axis.set(title=title, xlabel="epoch", ylabel=f"mean square error ({unit})")
    return _png(figure)


def prediction(inputs: list[int], predicted: list[float], note: str) -> bytes:
    """Counting: the predicted next numbers beside the right ones, and how far off they are."""
    figure, (left, right) = _figure(2, size=(9.0, 4.5))
    target = [x + 1 for x in inputs]
    left.plot(inputs, target, color=MUTED, linewidth=1.0, label="right answer (input + 1)")
    left.plot(inputs, predicted, "o", color=LINE, label="prediction")
    left.set(
        title=f"Next number after {inputs[0]}..{inputs[-1]}",
        xlabel="input number",
        ylabel="next number",
    )
    left.legend(frameon=False)
    right.bar(
        inputs, [p - t for p, t in zip(predicted, target, strict=True)], color=LINE, width=0.6
    )
    right.axhline(0, color=MUTED, linewidth=1.0)
    right.set(title="Error", xlabel="input number", ylabel="prediction - right answer")
    for axis in (left, right):
        axis.xaxis.get_major_locator().set_params(integer=True)
    if note:
        figure.supxlabel(note, fontsize=9, color=MUTED)
    return _png(figure)


def forecast(series, held_out: int, predicted: list[float], errors: dict) -> bytes:
    """The held-out values and their one-step forecasts, after the end of the training part."""
    figure, axis = _figure(size=(10.0, 4.5))
    shown = max(0, held_out - (len(series.values) - held_out) // 2)
    axis.plot(
        series.axis[shown:], series.values[shown:], color=MUTED, linewidth=1.2, label="actual"
    )
    rmse = {name: f"{found['rmse']:.4g}" for name, found in errors.items()}
    label = f"one-step forecast, RMSE {rmse['model']} (naive: {rmse['naive']})"
    axis.plot(series.axis[held_out:], predicted, color=LINE, linewidth=1.4, label=label)
    border = (series.axis[held_out - 1] + series.axis[held_out]) / 2
    axis.axvline(border, color=OTHER, linestyle="--", linewidth=1.0, label="held out from here on")
    axis.set(
        title=f"{series.column}: held-out values", xlabel=series.axis_name, ylabel=series.column
    )
    # Above the plot, where no curve can run through it.
    figure.legend(
        *axis.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False
    )
    return _png(figure)
