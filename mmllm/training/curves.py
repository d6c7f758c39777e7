"""curves.png: the losses of a run over its steps."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from mmllm.utils import files


def plot_curves(file: Path, rows: list[dict[str, Any]]) -> None:
    """Plot one panel a loss, training and held out.

    Args:
        file: the PNG to write.
        rows: lines of metrics.jsonl.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    skip = {"step", "seconds"}
    names = sorted({n for row in rows for n in row if n not in skip and "validation" not in n})
    figure, axes = pyplot.subplots(
        1, len(names), figsize=(4 * len(names), 3), squeeze=False, layout="constrained"
    )
    for axis, name in zip(axes[0], names, strict=True):
        steps = [row["step"] for row in rows if name in row]
        values = [row[name] for row in rows if name in row]
        axis.plot(steps, values, linewidth=0.6, alpha=0.5)
        axis.plot(steps, _smooth(values), linewidth=1.4, label="training")
        validation = [row for row in rows if f"validation/{name}" in row]
        if validation:
            axis.plot(
                [row["step"] for row in validation],
                [row[f"validation/{name}"] for row in validation],
                "o-",
                markersize=3,
                label="held out",
            )
        axis.set_title(name)
        axis.set_xlabel("step")
        axis.legend(fontsize="small")
    image = io.BytesIO()
    figure.savefig(image, dpi=100)
    pyplot.close(figure)
    files.atomic_write(file, image.getvalue())


def _smooth(values: list[float], window: int = 20) -> list[float]:
    """Means of each value and those before it, `window` at most."""
    return [
        sum(values[max(0, i - window + 1) : i + 1]) / len(values[max(0, i - window + 1) : i + 1])
        for i in range(len(values))
    ]
