"""Small PNG pictures of what documents say, for asset pages and reports. Pure: numbers in, bytes out.

Which picture belongs to which asset is `story.py`. matplotlib is imported on first use: it takes a second.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

BLUE, ORANGE, GREY, RED, GREEN = "#2b6cb0", "#dd6b20", "#a0aec0", "#c53030", "#2f855a"
Interval = tuple[str, float, float, float, str]


def _axes(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    return figure, axes


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def losses(train: Sequence[tuple[int, float]], validation: Sequence[tuple[int, float]], best: int) -> bytes:
    """Loss in nats a trained token by step; the best checkpoint is marked."""
    figure, axes = _axes(6.2, 2.8)
    if train:
        axes.plot(*zip(*train, strict=True), color=BLUE, linewidth=1.2, label="training")
    if validation:
        axes.plot(*zip(*validation, strict=True), color=ORANGE, marker="o", markersize=3, linewidth=1.2, label="validation")
    axes.axvline(best, color=GREY, linestyle="--", linewidth=1, label=f"best: step {best}")
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel("loss (nats)", fontsize=8)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, frameon=False)
    return _png(figure)


def histogram(counts: Mapping[str, int], label: str) -> bytes:
    """Bars of counts whose keys are lower edges of powers of two."""
    figure, axes = _axes(6.2, 2.4)
    edges = sorted(counts, key=int)
    axes.bar([f"{edge}–{2 * int(edge) - 1}" if int(edge) else "0" for edge in edges], [counts[edge] for edge in edges], color=BLUE)
    axes.set_xlabel(label, fontsize=8)
    axes.set_ylabel("records", fontsize=8)
    return _png(figure)


def intervals(rows: Sequence[Interval], label: str, limit: float | None = None) -> bytes:
    """One horizontal interval a row: (name, middle, low, high, colour). `limit` is a vertical line."""
    figure, axes = _axes(6.2, 0.8 + 0.24 * len(rows))
    for index, (_name, middle, low, high, colour) in enumerate(rows):
        axes.plot([low, high], [index, index], color=colour, linewidth=2, solid_capstyle="round")
        axes.plot(middle, index, "o", color=colour, markersize=4)
    axes.set_yticks(range(len(rows)), [row[0] for row in rows], fontsize=8)
    axes.invert_yaxis()
    if limit is not None:
        axes.axvline(limit, color=RED, linestyle="--", linewidth=1)
    axes.set_xlabel(label, fontsize=8)
    return _png(figure)
