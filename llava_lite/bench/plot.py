"""The plot of `llava-lite bench`: time to first token and tokens per second, as bars."""

import io
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llava_lite.bench.cases import OURS, TRANSFORMERS
from llava_lite.bench.machine import Measurement
from llava_lite.bench.models import BenchError
from llava_lite.bench.report import precision
from llava_lite.bench.run import Report
from llava_lite.bench.targets import FAST
from llava_lite.saving import check_output, replace_file

# The colors of Okabe and Ito, which color-blind people can tell apart.
BARS = (
    (TRANSFORMERS, "none", "transformers", "#999999"),
    (OURS, "none", "llava_lite, no reduction", "#0072B2"),
    (OURS, "tome-72-logical", "tome-72-logical", "#56B4E9"),
    (OURS, FAST, FAST, "#E69F00"),
    (f"{OURS} int4", FAST, f"int4, {FAST}", "#009E73"),
)


def check_plot(path: Path) -> None:
    """Raise BenchError, before a long run, if the plot cannot be drawn or written."""
    if path.suffix.lower() != ".png":
        raise BenchError(f"{path}: the plot is a file that ends in .png")
    check_output(path, BenchError)
    if find_spec("matplotlib") is None:
        raise BenchError("a plot needs matplotlib: pip install 'llava-lite[viz]'")


def save_plot(report: Report, path: Path) -> None:
    """Draw the plot, with quartiles."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_bars(left, report, "first token", "time to first token, s", lambda seconds: seconds)
    draw_bars(right, report, "decode", "decoded tokens per second", lambda seconds: 1 / seconds)
    right.set_yticklabels([])
    facts = report.machine
    subtitle = f"{facts['name']}, threads {facts['threads']}, torch {facts['torch']}"
    layers = f"{report.config.text.num_layers} layers, {precision(report)}"
    figure.suptitle(f"{report.config.name}, {layers}, one image and 64 words\n{subtitle}", size=10)
    canvas, buffer = FigureCanvasAgg(figure), io.BytesIO()
    canvas.print_png(buffer)
    replace_file(path, buffer.getvalue())


def draw_bars(
    axes: Any, report: Report, part: str, title: str, value_of: Callable[[float], float]
) -> None:
    """Draw a bar for each contender, with the value of its median seconds at its end."""
    if not (found := bars(report, part)):  # an interrupted run may lack a part
        return
    rows, labels, colors = zip(*found, strict=True)
    values = [value_of(row.seconds) for row in rows]
    ends = [sorted(map(value_of, row.quartiles)) for row in rows]
    below = [max(0.0, value - low) for value, (low, _) in zip(values, ends, strict=True)]
    above = [max(0.0, high - value) for value, (_, high) in zip(values, ends, strict=True)]
    places = range(len(rows))
    axes.barh(places, values, color=colors, height=0.7)
    axes.errorbar(values, places, xerr=(below, above), fmt="none", ecolor="0.25", capsize=2)
    for place, value, more in zip(places, values, above, strict=True):
        text = f"{value:.3g}"
        if place and rows[0].contender == TRANSFORMERS:
            text += f"  ({value / values[0]:.2f} x)"
        offset = {"xytext": (5, 0), "textcoords": "offset points"}
        axes.annotate(text, (value + more, place), va="center", size=9, **offset)
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.35 * max(map(sum, zip(values, above, strict=True))))
    axes.set_title(title, size=10)
    axes.spines[["top", "right"]].set_visible(False)


def bars(report: Report, part: str) -> list[tuple[Measurement, str, str]]:
    """(measurement, label, color) of each of `BARS` that was run."""
    found = []
    for name, setting, label, color in BARS:
        if row := report.find(name, part, setting):
            found.append((row, label, color))
    return found
