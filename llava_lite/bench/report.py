"""The output of `llava-lite bench`: a table, figures with bounds (PASS or SHORT), JSON, a plot.

The bounds hold for a whole 7B model in bfloat16 on a CPU, from medians of at least five rounds. For
other runs the figures have no verdict, but say what is different. A missing figure says why.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llava_lite.bench.cases import OURS, PARTS, SHARED_WORDS, TRANSFORMERS
from llava_lite.bench.profile import KINDS, OTHERS, Profile, kind
from llava_lite.bench.run import PEER_FOOTPRINT, BenchError, Footprint, Measurement, Report
from llava_lite.config import LLAVA_1_5_7B, LlavaConfig
from llava_lite.saving import check_output, replace_file

FAST = "hybrid-72-36"
FEWEST_ROUNDS = 5  # for a verdict
# The least share of the read bandwidth at which a token reads a longer cache. Reading once comes
# near 1. A cache copied at every token takes four passes (read, fetch, write, read): at most 0.25.
CACHE_BANDWIDTH = 0.3
GIGA = 1e9
TITLES = {
    "tower": "vision tower",
    "prefill": "prefill: the whole prompt, image encoded before",
    "first token": f"first token: tower and prefill; ours with {SHARED_WORDS} words cached",
    "first token, cold": "first token of the first call, which fills that cache",
    "decode": "one decoded token",
    "batch": "one decoded token for each of several prompts",
    "growing prefill": "prefill of so many words",
    "growing decode": "one decoded token after so many words",
    "growing attention": "attention of one layer over so many words",
}


# ---- rows with a bound -------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One figure and its bound (None: no bound). value: None if the run does not have it, and
    `missing` says why. whole: the bound needs all decoder layers; plain: it needs plain weights.
    judged: the bound holds here; conditions: of the bound, or the differences here."""

    figure: str
    value: float | None
    bound: float | None
    at_least: bool
    unit: str = ""
    missing: str = ""
    whole: bool = True
    plain: bool = True
    judged: bool = True
    conditions: str = ""

    @property
    def verdict(self) -> str:
        """PASS, SHORT, "not run", or empty if no bound holds."""
        if self.value is None:
            return "not run"
        if not self.judged or self.bound is None:
            return ""
        within = self.value >= self.bound if self.at_least else self.value <= self.bound
        return "PASS" if within else "SHORT"

    def to_dict(self) -> dict[str, Any]:
        """The row in plain types, ready for JSON."""
        return {**asdict(self), "verdict": self.verdict}


def rows(report: Report) -> list[Row]:
    """All figures with a bound, and a few related ones without."""
    found = [*peer_rows(report), *quantized_rows(report), *load_rows(report)]
    found += [*peer_load_rows(report), *work_rows(report)]
    return [with_conditions(report, row) for row in found]


def with_conditions(report: Report, row: Row) -> Row:
    """The row with its conditions, judged only if they hold."""
    conditions = {
        report.machine["device"]: "cpu",
        report.dtype: "bfloat16",
        widths(report.config): widths(LLAVA_1_5_7B),
    }
    if row.whole:
        layers = (config.text.num_layers for config in (report.config, LLAVA_1_5_7B))
        here, there = (f"{count} decoder layers" for count in layers)
        conditions[here] = there
    if row.plain:
        conditions[f"{report.method or 'plain'} weights"] = "plain weights"
    different = [f"{here}, not {there}" for here, there in conditions.items() if here != there]
    rounds = report.settings.repeat
    if rounds < FEWEST_ROUNDS:
        different.append(f"{rounds} rounds, not {FEWEST_ROUNDS}")
    said = "; ".join(different) or ", ".join([*conditions, f"{rounds} rounds"])
    return replace(row, judged=not different, conditions=said)


def widths(config: LlavaConfig) -> str:
    """The size of a decoder layer."""
    return f"width {config.text.hidden_size} with {config.text.num_heads} heads"


def peer_rows(report: Report) -> Iterator[Row]:
    """Against transformers, which has no reduction."""
    missing = "--against transformers"
    decode = ratio(report, "decode", TRANSFORMERS, OURS)  # times, so the inverse of tokens/s
    yield Row("decode, tokens/s: times transformers", decode, 1.35, True, "", missing)
    ours = report.find(OURS, "decode")
    share = ours.read_share if ours else None
    yield Row("decode: share of the read bandwidth", share, 0.90, True)
    yield from first_token_rows(report, "none", 0.90)
    tower = ratio(report, "tower", OURS, TRANSFORMERS)
    yield Row("tower: time, transformers = 1", tower, 0.70, False, "", missing, whole=False)
    yield from first_token_rows(report, FAST, 0.20)


def first_token_rows(report: Report, setting: str, bound: float) -> Iterator[Row]:
    """Our later calls and our first call. transformers caches nothing between calls, so it has one
    time for both."""
    name = "first token" if setting == "none" else f"first token, {setting}"
    for part, how, limit in (
        ("first token", f"{SHARED_WORDS} words cached", bound),
        ("first token, cold", "nothing cached", None),
    ):
        here = ratio(report, part, OURS, TRANSFORMERS, setting)
        run = report.find(OURS, part, setting) is not None or setting == "none"
        missing = report.skipped.get(setting, f"--reductions {setting}")
        missing = "--against transformers" if run else missing
        yield Row(f"{name}, {how}: time, transformers = 1", here, limit, False, "", missing)


def quantized_rows(report: Report) -> Iterator[Row]:
    """int4 weights: decode against transformers in 16 bit, and peak memory."""
    settings = report.settings
    int4 = settings.quantized if settings.quantize == "int4" else ""
    missing = "--against transformers" if int4 else "--quantize int4"
    decode = ratio(report, "decode", TRANSFORMERS, int4)
    yield Row("int4 decode, tokens/s: times transformers", decode, 3.5, True, "", missing)
    footprint = report.footprints.get(OURS if report.method == "int4" else int4)
    peaks = [footprint.loading, footprint.answering] if footprint else []
    known = [value / GIGA for value in peaks if value is not None]
    if footprint:
        missing = "of a folder: -m MODEL" if settings.source is None else "not known here"
    usable = settings.source is not None and len(known) == 2
    value = max(known) if usable else None
    yield Row("int4 peak memory", value, 5.5, False, "GB", missing, plain=False)


def load_rows(report: Report) -> Iterator[Row]:
    """Loading a folder in a fresh process, with the file in the page cache."""
    footprint, missing = report.footprints[OURS], "of a folder: -m MODEL"
    figure = "load of a folder: median of fresh processes, import of torch apart"
    yield Row(figure, footprint.load_seconds, 5.0, False, "s", missing)
    private = footprint.private
    if footprint.load_seconds is not None:
        missing = "not known here"
    value = None if private is None else private / GIGA
    yield Row("load of a folder: private memory", value, 1.0, False, "GB", missing)


def peer_load_rows(report: Report) -> Iterator[Row]:
    """Load time and memory against transformers; no bound."""
    ours, other = report.footprints[OURS], report.footprints.get(TRANSFORMERS)
    missing = report.skipped.get(PEER_FOOTPRINT, "--against transformers")
    for name, field in (
        ("time to load", "load_seconds"),
        ("private memory after loading", "private"),
        ("peak memory while answering", "answering"),
    ):
        above, below = (getattr(one, field) if one else None for one in (ours, other))
        value = above / below if above and below else None
        said = "not known here" if other else missing
        yield Row(f"{name}: transformers = 1", value, None, False, "", said)


def work_rows(report: Report) -> Iterator[Row]:
    """Batches, and longer prompts."""
    one, eight = (report.find(OURS, "batch", f"none x {size}") for size in (1, 8))
    batch = 8 * one.seconds / eight.seconds if one and eight else None
    yield Row("batch of 8, tokens/s: times batch of 1", batch, 5.0, True, "", "--batch-sizes 1 8")
    prefill = per_token(report)
    spread = max(prefill) / min(prefill) if len(prefill) > 1 else None
    lengths = measured_lengths(report)
    span = f"{lengths[0]} to {lengths[-1]} words" if len(lengths) > 1 else "by length"
    missing = "--lengths 128 2048"
    figure = f"prefill per token but attention, {span}: slowest / fastest"
    yield Row(figure, spread, 1.15, False, "", missing)
    share, missing = cache_bandwidth(report)
    figure = f"decode, {span}: what is cached more, share of the read bandwidth"
    yield Row(figure, share, CACHE_BANDWIDTH, True, "", missing)


def ratio(report: Report, part: str, above: str, below: str, setting: str = "none") -> float | None:
    """The ratio of two contenders' median times. transformers has only the setting "none"."""
    top, bottom = (
        find_theirs(report, part) if name == TRANSFORMERS else report.find(name, part, setting)
        for name in (above, below)
    )
    return top.seconds / bottom.seconds if top and bottom else None


def find_theirs(report: Report, part: str) -> Measurement | None:
    """The measurement of transformers to compare with; each of its first tokens is a cold one."""
    return report.find(TRANSFORMERS, part.removesuffix(", cold"))


def measured_lengths(report: Report) -> list[int]:
    """The lengths of the growing prompts, ascending."""
    part = PARTS[-1]
    return sorted(int(row.setting) for row in report.measurements if row.part == part)


def per_token(report: Report) -> list[float]:
    """Seconds of prefill per token for every length, without attention, which grows with the square
    of the length."""
    layers, values = report.config.text.num_layers, []
    for length in measured_lengths(report):
        whole = report.find(OURS, "growing prefill", str(length))
        attention = report.find(OURS, "growing attention", str(length))
        if whole and attention:
            values.append((whole.seconds - layers * attention.seconds) / length)
    return values


def cache_bandwidth(report: Report) -> tuple[float | None, str]:
    """The rate at which a token reads the extra cache of the longest prompt over the shortest, as a
    share of the read bandwidth; or None and the reason."""
    lengths = map(str, measured_lengths(report))
    timed = [row for n in lengths if (row := report.find(OURS, "growing decode", n))]
    if len(timed) < 2:
        return None, "--lengths 128 2048"
    seconds = timed[-1].seconds - timed[0].seconds
    if seconds <= 0:
        return None, "no more time than the machine's noise"
    return (timed[-1].bytes - timed[0].bytes) / seconds / report.limits["read"], ""


# ---- table and JSON ----------------------------------------------------------------------------


def to_dict(report: Report) -> dict[str, Any]:
    """The report in plain types, ready for JSON."""
    content = asdict(report)
    content["config"] = report.config.to_dict()
    for name, footprint in report.footprints.items():
        content["footprints"][name]["config"] = footprint.config.name
    for line, row in zip(content["measurements"], report.measurements, strict=True):
        line["against_none"], line["against_transformers"] = ratios(report, row)
    return {**content, "rows": [row.to_dict() for row in rows(report)]}


def ratios(report: Report, row: Measurement) -> tuple[float | None, float | None]:
    """The time relative to the same part without a reduction, and to transformers."""
    bases = report.find(row.contender, row.part), find_theirs(report, row.part)
    none, other = (row.seconds / base.seconds if base else None for base in bases)
    return none, None if row.contender == TRANSFORMERS else other


def table(report: Report) -> Iterator[str]:
    """The lines to print."""
    yield from heading(report)
    for part in PARTS:
        lines = [row for row in report.measurements if row.part == part]
        if lines:
            yield from part_lines(report, part, lines)
    if report.profiles:
        yield from profile_lines(report.profiles)
    for name, reason in report.skipped.items():
        yield f"\n{name}: not run, {reason}"
    yield f"\n{'figure':<74}{'here':>8}  bound"
    yield from (bound_line(row) for row in rows(report))
    if not report.machine["device"].startswith("cuda"):
        yield "  all of it on a GPU: not run (--device cuda)"


def part_lines(report: Report, part: str, lines: list[Measurement]) -> Iterator[str]:
    """The title of a part and a line for each measurement. Empty columns are left out."""
    cells = [table_cells(report, row) for row in lines]
    widths = {
        title: 2 + max(len(title), *(len(line[title]) for line in cells))
        for title in cells[0]
        if any(line[title] for line in cells)
    }
    names = [f"{row.contender} {row.setting}" for row in lines]
    width = 2 + max(map(len, names))
    yield f"\n{TITLES[part]}"
    yield " " * (width + 2) + "".join(f"{title:>{size}}" for title, size in widths.items())
    for name, line in zip(names, cells, strict=True):
        values = "".join(f"{line[title]:>{size}}" for title, size in widths.items())
        yield f"  {name:<{width}}{values}".rstrip()


def table_cells(report: Report, row: Measurement) -> dict[str, str]:
    """The cells of a measurement, by title of the column."""
    low, high = (1000 * value for value in row.quartiles)
    none, other = ratios(report, row)
    decoded = "decode" in row.part or row.part == "batch"
    tokens = row.image_tokens if row.part in ("tower", "prefill", "first token") else None
    return {
        "image tokens": number(tokens, ".0f"),
        "ms": number(1000 * row.seconds, ".2f"),
        "quartiles": f"{low:.2f}-{high:.2f}",
        "tokens/s": number(row.tokens_per_second, ".2f") if decoded else "",
        "TFLOP/s": number(row.flops_per_second, ".3g", 1e-12),
        "of matmul": number(row.matmul_share, ".3f"),
        "GB/s": number(row.bytes_per_second, ".3g", 1 / GIGA),
        "of read": number(row.read_share, ".3f"),
        "none = 1": number(none, ".3f"),
        "transformers = 1": number(other, ".3f"),
    }


def profile_lines(profiles: Sequence[Profile]) -> Iterator[str]:
    """The kinds of operators as shares of one pass, for each part."""
    names = [f"{one.contender} {one.part} {one.setting}" for one in profiles]
    width = 2 + max(map(len, names))
    yield "\nwhere the time goes: one pass of each under torch's profiler"
    titles = [*KINDS, "between", "  longest others"]
    yield " " * (width + 2) + f"{'ms':>10}" + "".join(f"{title:>11}" for title in titles)
    for name, one in zip(names, profiles, strict=True):
        kinds = one.kinds
        between = one.seconds - sum(kinds.values())
        shares = [value / one.seconds for value in (*kinds.values(), between)]
        others = [(op, took) for op, took in one.operators.items() if kind(op) == OTHERS][:3]
        longest = ", ".join(f"{op.split('::')[-1]} {took / one.seconds:.1%}" for op, took in others)
        cells = "".join(f"{share:>11.1%}" for share in shares)
        yield f"  {name:<{width}}{1000 * one.seconds:>10.2f}{cells}  {longest}".rstrip()


def number(value: float | None, form: str, scale: float = 1.0) -> str:
    return "" if value is None else format(scale * value, form)


def heading(report: Report) -> Iterator[str]:
    """The settings, the machine, its limits, and the footprints."""
    settings, limits = report.settings, report.limits
    weights = settings.source or "random weights"
    layers = f"{report.config.text.num_layers} decoder layers"
    yield (
        f"{report.config.name}, {weights}, {layers}, {precision(report)}; "
        f"medians of {settings.repeat} rounds"
        + ("; our tokens in compiled steps" if settings.compile else "")
    )
    yield ", ".join(f"{name} {value}" for name, value in report.machine.items())
    reads = [f"{name[6:]} {rate / GIGA:.1f}" for name, rate in limits.items() if "read, " in name]
    yield (
        f"it multiplies at {limits['matmul'] / 1e12:.3g} TFLOP/s and reads at "
        f"{limits['read'] / GIGA:.1f} GB/s ({', '.join(reads)})"
    )
    if report.transformers:
        yield f"transformers {report.transformers} on the same weights" + (
            f"; first logits differ by {100 * report.difference:.2g} % of the largest"
            if report.difference is not None
            else ""
        )
    turns = " | ".join(" and ".join(phase) for phase in report.phases)
    yield f"took turns in every round: {turns}" + (
        " (not all fit into memory together)" if len(report.phases) > 1 else ""
    )
    for name, footprint in report.footprints.items():
        parts = {
            "weights": in_gb(footprint.weights),
            "load, torch imported before": load_time(footprint),
            "private after loading": in_gb(footprint.private),
            "peak while loading (mapped files apart)": in_gb(footprint.loading),
            "peak while answering": in_gb(footprint.answering),
        }
        yield f"{name}: " + ", ".join(f"{k} {v}" for k, v in parts.items() if v is not None)


def precision(report: Report) -> str:
    """The dtype, and the decoder's quantization if it has one."""
    return f"{report.method} decoder, {report.dtype}" if report.method else report.dtype


def load_time(footprint: Footprint) -> str | None:
    """Seconds to load, and the number of processes."""
    if footprint.load_seconds is None:
        return None
    processes = f" (median of {n} processes)" if (n := len(footprint.loads)) > 1 else ""
    return f"{footprint.load_seconds:.2f} s{processes}"


def in_gb(count: int | None) -> str | None:
    return None if count is None else f"{count / GIGA:.2f} GB"


def bound_line(row: Row) -> str:
    """One figure with its bound, verdict and conditions."""
    bound = ""
    if row.bound is not None:
        bound = f"{'at least' if row.at_least else 'at most'} {row.bound:.2f} {row.unit}".rstrip()
    value, said = "-", f"not run ({row.missing})"
    if row.value is not None:
        value = f"{row.value:.3f}"
        said = f"{row.verdict} ({row.conditions})" if row.verdict else f"({row.conditions})"
    if row.bound is None and row.value is not None:
        said = ""
    return f"  {row.figure:<72}{value:>8}  {bound:<17}{said}".rstrip()


# ---- plot --------------------------------------------------------------------------------------

# The colors of Okabe and Ito, which color-blind people can tell apart.
BARS = (
    (TRANSFORMERS, "none", "transformers", "#999999"),
    (OURS, "none", "llava_lite, no reduction", "#0072B2"),
    (OURS, "tome-72-logical", "tome-72-logical", "#56B4E9"),
    (OURS, FAST, FAST, "#E69F00"),
    ("int4", FAST, f"int4, {FAST}", "#009E73"),
)


def check_plot(path: Path) -> None:
    """Raise BenchError, before a long run, if the plot cannot be drawn or written."""
    if path.suffix.lower() != ".png":
        raise BenchError(f"{path}: the plot is a file that ends in .png")
    check_output(path, BenchError)
    if find_spec("matplotlib") is None:
        raise BenchError("a plot needs matplotlib: pip install 'llava-lite[viz]'")


def save_plot(report: Report, path: Path) -> None:
    """Draw time to first token and tokens per second, as bars with quartiles."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_bars(left, report, "first token", "time to first token, s", lambda row: row.seconds)
    draw_bars(right, report, "decode", "decoded tokens per second", lambda row: 1 / row.seconds)
    right.set_yticklabels([])
    facts = report.machine
    subtitle = f"{facts['name']}, threads {facts['threads']}, torch {facts['torch']}"
    layers = f"{report.config.text.num_layers} layers, {precision(report)}"
    figure.suptitle(f"{report.config.name}, {layers}, one image and 64 words\n{subtitle}", size=10)
    canvas, buffer = FigureCanvasAgg(figure), io.BytesIO()
    canvas.print_png(buffer)
    replace_file(path, buffer.getvalue())


def draw_bars(
    axes: Any,
    report: Report,
    part: str,
    title: str,
    value_of: Callable[[Measurement], float],
) -> None:
    """Draw a bar for each contender, with the value at its end."""
    found = bars(report, part)
    values = [value_of(row) for row, _, _ in found]
    places = range(len(found))
    base = values[0] if found and found[0][0].contender == TRANSFORMERS else None
    errors = [error_bar(row, value_of(row)) for row, _, _ in found]
    axes.barh(places, values, color=[color for _, _, color in found], height=0.7)
    axes.errorbar(
        values, places, xerr=list(zip(*errors, strict=True)), fmt="none", ecolor="0.25", capsize=2
    )
    for place, value, (_, high) in zip(places, values, errors, strict=True):
        offset = {"xytext": (5, 0), "textcoords": "offset points"}
        text = f"{value:.3g}" + (f"  ({value / base:.2f} x)" if base and place else "")
        axes.annotate(text, (value + high, place), va="center", size=9, **offset)
    axes.set_yticks(places, [label for _, label, _ in found])
    axes.invert_yaxis()
    axes.set_xlim(
        0, 1.35 * max(value + high for value, (_, high) in zip(values, errors, strict=True))
    )
    axes.set_title(title, size=10)
    axes.spines[["top", "right"]].set_visible(False)


def bars(report: Report, part: str) -> list[tuple[Measurement, str, str]]:
    """(measurement, label, color) of each of `BARS` that was run."""
    found = []
    for contender, setting, label, color in BARS:
        name = f"{OURS} int4" if contender == "int4" else contender
        row = report.find(name, part, setting)
        if row is not None:
            found.append((row, label, color))
    return found


def error_bar(row: Measurement, value: float) -> tuple[float, float]:
    """Distances from the value to its quartiles, below and above. value: seconds or a rate."""
    ends = [value * q / row.seconds for q in row.quartiles]
    if value != row.seconds:
        ends = [value * row.seconds / q for q in row.quartiles]
    return max(0.0, value - min(ends)), max(0.0, max(ends) - value)
