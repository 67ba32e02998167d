"""Pictures of what documents say: PNGs by matplotlib, and SVG sketches so short that Dagster shows them inline. Numbers in, bytes out.

Dagster's asset page folds Markdown of 1,000 characters and more behind a link, and no PNG that one can read is that short.
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


# ---- sketches

INLINE = 700  # bytes of SVG: base64 and the Markdown around it stay below Dagster's 1,000 characters
WIDE, HIGH = 420, 110


def _svg(height: int, body: str) -> str:
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDE}" height="{height}" font-family="sans-serif" font-size="10">{body}</svg>'


def _line(points: Sequence[tuple[float, float]], colour: str) -> str:
    coordinates = " ".join(f"{x:.0f},{y:.0f}" for x, y in points)
    return f'<polyline fill="none" stroke="{colour}" points="{coordinates}"/>'


def losses_sketch(train: Sequence[tuple[int, float]], validation: Sequence[tuple[int, float]]) -> bytes:
    """The loss curve, training in blue and validation in orange, thinned until it is short enough."""
    last = max((step for step, _ in [*train, *validation]), default=1)
    top = max((loss for _, loss in [*train, *validation]), default=1.0) or 1.0

    def place(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
        return [(30 + (WIDE - 40) * step / last, 8 + (HIGH - 28) * (1 - loss / top)) for step, loss in points]

    for count in (48, 32, 24, 16, 8):
        thin = [train[round(index * (len(train) - 1) / (count - 1))] for index in range(count)] if len(train) > count else list(train)
        body = (
            _line(place(thin), "blue")
            + _line(place(validation[-12:]), "orange")
            + f'<text y="14">{top:.1f}</text><text y="90">0</text><text x="30" y="106">loss by step</text><text x="{WIDE - 30}" y="106">{last}</text>'
        )
        found = _svg(HIGH, body).encode()
        if len(found) <= INLINE:
            break
    return found


def histogram_sketch(counts: Mapping[str, int], label: str) -> bytes:
    """Bars of counts by the lower edges of powers of two."""
    edges = sorted(counts, key=int)
    top = max(counts.values(), default=1) or 1
    wide = (WIDE - 10) / max(1, len(edges))
    bars = "".join(f"M{5 + wide * index:.0f} 90v-{80 * counts[edge] / top:.0f}h{wide - 4:.0f}V90" for index, edge in enumerate(edges))
    names = "".join(f'<text x="{5 + wide * index:.0f}" y="102">{edge}</text>' for index, edge in enumerate(edges[:9]))
    return _svg(HIGH, f'<path fill="blue" d="{bars}"/>{names}<text x="300" y="10">{label}</text>').encode()


def intervals_sketch(rows: Sequence[Interval], low: float, high: float) -> bytes:
    """One interval a row on an axis from `low` to `high`; rows whose colour is RED are red. Names go first when it gets too long."""
    span = (high - low) or 1.0

    def at(value: float) -> float:
        return 110 + (WIDE - 120) * (min(max(value, low), high) - low) / span

    for named in (True, False):
        for count in (len(rows), 12, 8):
            shown = rows[:count]
            paths = {True: "", False: ""}
            names = ""
            for index, (name, middle, start, end, colour) in enumerate(shown):
                y = 10 + 13 * index
                paths[colour == RED] += f"M{at(start):.0f} {y}H{at(end):.0f}M{at(middle):.0f} {y - 3}v6"
                names += f'<text y="{y + 3}">{name.split(": ")[-1][:14]}</text>' if named else ""
            strokes = "".join(f'<path stroke="{"red" if bad else "blue"}" d="{path}"/>' for bad, path in paths.items() if path)
            found = _svg(14 + 13 * len(shown), names + strokes).encode()
            if len(found) <= INLINE:
                return found
    return found
