"""The losses of a run over its steps, as panels of a figure and of a page."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from mmllm.utils import files

COLUMNS = 3
"""Panels in a row of curves.png."""
_NAMES = {
    "loss": "weighted sum of all losses",
    "text": "text: cross-entropy",
    "kl": "text: divergence from the base model",
}
_KINDS = {"align": "alignment", "denoise": "denoising"}


def plot_curves(file: Path, rows: list[dict[str, Any]]) -> None:
    """Plot one panel a loss, training and held out, in a grid: first text, then by modality.

    Args:
        file: the PNG to write.
        rows: lines of metrics.jsonl.
    """
    names = loss_names(rows)
    figure, axes = _figure(-(-len(names) // COLUMNS), min(len(names), COLUMNS))
    for axis, name in zip(axes, names, strict=False):
        _plot(axis, rows, name)
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    files.atomic_write(file, _saved(figure, "png"))


def panels(rows: list[dict[str, Any]]) -> dict[str, bytes]:
    """Return a loss's title -> its panel as SVG, in the order of `loss_names`."""
    made = {}
    for name in loss_names(rows):
        figure, (axis,) = _figure(1, 1)
        _plot(axis, rows, name)
        made[title_of(name)] = _saved(figure, "svg")
    return made


def loss_names(rows: list[dict[str, Any]]) -> list[str]:
    """Return the names of the training losses: the sum, those of text, and the others by modality.

    Args:
        rows: lines of metrics.jsonl.
    """
    names = {name for row in rows for name in row} - {"step", "seconds"}
    order = list(_NAMES)

    def place(name: str) -> tuple[int, str, str]:
        kind, _, modality = name.partition("/")
        return order.index(name) if name in order else len(order), modality, kind

    return sorted((name for name in names if not name.startswith("validation/")), key=place)


def title_of(name: str) -> str:
    """Return a loss's name for readers: "align/audio" is "audio: alignment"."""
    kind, _, modality = name.partition("/")
    return _NAMES.get(name) or (f"{modality}: {_KINDS.get(kind, kind)}" if modality else name)


def _figure(rows: int, columns: int) -> tuple[Any, list[Any]]:
    """Return a figure of matplotlib and its axes, row by row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4 * columns, 3 * rows), squeeze=False, layout="constrained"
    )
    return figure, list(axes.flat)


def _plot(axis: Any, rows: list[dict[str, Any]], name: str) -> None:
    steps = [row["step"] for row in rows if name in row]
    values = [row[name] for row in rows if name in row]
    axis.plot(steps, values, linewidth=0.6, alpha=0.5)
    axis.plot(steps, _smooth(values), "." * (len(values) == 1) or "-", label="training")
    validation = [row for row in rows if f"validation/{name}" in row]
    if validation:
        axis.plot(
            [row["step"] for row in validation],
            [row[f"validation/{name}"] for row in validation],
            "o-",
            markersize=3,
            label="held out",
        )
    axis.set_title(title_of(name))
    axis.set_xlabel("step")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(fontsize="small")


def _saved(figure: Any, suffix: str) -> bytes:
    """Return the figure in a file format of matplotlib, and close it."""
    from matplotlib import pyplot

    image = io.BytesIO()
    figure.savefig(image, dpi=100, format=suffix, transparent=suffix == "svg")
    pyplot.close(figure)
    return image.getvalue()


def _smooth(values: list[float]) -> list[float]:
    """Means of each value and its neighbours, up to ten on either side, fewer of a short run."""
    reach = min(10, len(values) // 8)
    around = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(near) / len(near) for near in around]
