# SPDX-License-Identifier: Apache-2.0
"""Charts of the report, drawn with matplotlib as SVG; no window is opened."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from mmeformer.report.history import Series
from mmeformer.report.review import RECALLS, Confusion, Curve, Statistics

COLORS = (
    *("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2"),
    *("#db2777", "#65a30d", "#475569", "#b45309"),
)
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": "#94a3b8",
    "axes.labelcolor": "#334155",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e2e8f0",
    "xtick.color": "#475569",
    "ytick.color": "#475569",
    "legend.frameon": False,
    "legend.fontsize": 8,
    # Letters stay text, which the browser draws: smaller files, and one can search them.
    "svg.fonttype": "none",
}
MAX_LINES = 10
"""Lines of a chart that get a color and an entry in the legend each; others are gray."""
LEGEND_COLUMNS = 3
MAX_NAMED = 30
"""Classes up to which a chart names every class."""
WIDE = 10
"""Ratio of the largest and the smallest object from which the axis of sizes is logarithmic."""
MAX_WRITTEN = 15
"""Classes up to which a confusion matrix has its numbers written in."""


def draw(paint: Callable[[Axes], None], width: float = 5.2, height: float = 3.2) -> bytes:
    """Draw one chart; returns an SVG file.

    Args:
        paint: draws on the axes.
        width, height: in inches of 96 pixels.
    """
    with rc_context(STYLE):
        # Without pyplot there is neither a window nor state that the training could share.
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure.add_subplot())
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
    return file.getvalue()


def lines(
    series: Sequence[Series],
    label: str,
    unit: str,
    log: bool = False,
    bold: str | None = None,
    marks: bool = False,
) -> bytes:
    """A chart of numbers over the training.

    Args:
        series: the lines.
        label: of the vertical axis.
        unit: of the horizontal axis.
        log: logarithmic vertical axis.
        bold: name of the line that matters most.
        marks: mark every value, and the best of ``bold``.
    """

    def paint(axes: Axes) -> None:
        order = sorted(series, key=lambda item: item.name != bold)
        for number, item in enumerate(order):
            plain = number >= MAX_LINES
            axes.plot(
                item.steps,
                item.values,
                color="#cbd5e1" if plain else COLORS[number],
                label=None if plain else item.name,
                linewidth=2 if item.name == bold else 1.2,
                marker="o" if marks or len(item.values) == 1 else None,
                markersize=4 if item.name == bold else 3,
                # The line that matters most is drawn over the others.
                zorder=3 if item.name == bold else 2,
            )
        if log and all(value > 0 for item in series for value in item.values):
            axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        axes.set_xlabel(unit)
        axes.set_ylabel(label)
        if len(series) > 1 or marks:
            _legend(axes)

    rows = -(-min(len(series), MAX_LINES) // LEGEND_COLUMNS)
    return draw(paint, height=3.0 + 0.18 * rows)


def precision_recall(curves: Sequence[Curve]) -> bytes:
    """Precision over recall of every class, and their mean."""

    def paint(axes: Axes) -> None:
        for number, curve in enumerate(curves):
            plain = number >= MAX_LINES
            axes.plot(
                RECALLS,
                curve.precision,
                color="#cbd5e1" if plain else COLORS[number],
                linewidth=1.3,
                label=None if plain else f"{curve.name}  {curve.ap:.3f}",
            )
        mean = np.mean([curve.precision for curve in curves], axis=0)
        ap = np.mean([curve.ap for curve in curves])
        if len(curves) > 1:
            axes.plot(RECALLS, mean, color="#0f172a", linewidth=2.4, label=f"mean  {ap:.3f}")
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
        _legend(axes, "average precision")

    rows = -(-min(len(curves), MAX_LINES) // LEGEND_COLUMNS)
    return draw(paint, height=3.8 + 0.18 * rows)


def _legend(axes: Axes, title: str | None = None) -> None:
    """Names of the lines, below the chart."""
    axes.figure.legend(loc="outside lower center", ncols=LEGEND_COLUMNS, title=title)


def confusion(matrix: Confusion) -> bytes:
    """A confusion matrix; colors are shares of the row, numbers are counts."""
    names = list(matrix.names)
    rows = names + ["(nothing)"] * matrix.has_background
    columns = names + ["(missed)"] * matrix.has_background
    counts = matrix.counts
    totals = counts.sum(1, keepdims=True)
    share = counts / np.maximum(totals, 1)

    def paint(axes: Axes) -> None:
        axes.grid(False)
        image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for spine in axes.spines.values():
            spine.set_visible(False)
        if len(rows) <= MAX_NAMED + 1:
            axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right")
            axes.set_yticks(range(len(rows)), rows)
        if len(rows) <= MAX_WRITTEN + 1:
            for (row, column), value in np.ndenumerate(counts):
                if matrix.has_background and row == column == len(names):
                    continue
                text = f"{share[row, column]:.2f}" if matrix.unit == "pixels" else f"{value}"
                color = "white" if share[row, column] > 0.55 else "#334155"
                axes.text(
                    column,
                    row,
                    text if value else "·",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color=color,
                )
        axes.set_xlabel("predicted")
        axes.set_ylabel("labeled")
        bar = axes.figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02)
        bar.outline.set_visible(False)
        bar.set_label("share of the row")

    side = min(2.4 + 0.36 * min(len(rows), MAX_NAMED), 8.5)
    return draw(paint, width=max(side + 1.2, 5.2), height=max(side, 3.6))


def amounts(statistics: Statistics) -> bytes:
    """Labels per class, the most frequent first."""
    order = np.argsort(-statistics.amounts, kind="stable")
    values = statistics.amounts[order]
    shown = len(order) <= MAX_NAMED

    def paint(axes: Axes) -> None:
        axes.barh(range(len(order)), values, color=COLORS[0], height=0.72)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        if shown:
            axes.set_yticks(range(len(order)), [statistics.names[index] for index in order])
        else:
            axes.set_ylabel(f"{len(order)} classes")
        axes.set_xlabel(statistics.unit)
        if values.max(initial=0) > 50 * max(np.median(values), 1):
            axes.set_xscale("symlog")

    return draw(paint, height=max(1.6, 0.9 + 0.24 * min(len(order), MAX_NAMED)))


def sizes(values: np.ndarray) -> bytes:
    """Distribution of the sizes of objects, see :class:`Statistics`."""
    values = np.maximum(values, 1.0)
    low, high = values.min(), values.max() * 1.001
    is_wide = high > WIDE * low
    bins = (np.geomspace if is_wide else np.linspace)(low, high, 25).tolist()

    def paint(axes: Axes) -> None:
        axes.hist(values, bins=bins, color=COLORS[2], rwidth=0.92)
        if is_wide:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="size of an object: square root of its area, pixels", ylabel="objects")

    return draw(paint, height=2.6)
