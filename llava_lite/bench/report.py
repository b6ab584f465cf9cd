"""The output of `llava-lite bench`: a table, and JSON."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from llava_lite.bench.cases import PARTS, SHARED_WORDS, TRANSFORMERS
from llava_lite.bench.footprint import Footprint
from llava_lite.bench.machine import Measurement
from llava_lite.bench.profile import OTHERS, Profile, kind
from llava_lite.bench.run import Report
from llava_lite.bench.targets import GIGA, Row, find_theirs, rows
from llava_lite.tables import table_lines

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
        rows_here = [row for row in report.measurements if row.part == part]
        cells = [part_cells(row, *ratios(report, row)) for row in rows_here]
        if cells:
            yield f"\n{TITLES[part]}"
            yield from table_lines(cells)
    if report.profiles:
        yield "\nwhere the time goes: one pass of each under torch's profiler"
        yield from table_lines(list(map(profile_cells, report.profiles)), ("", "longest others"))
    for name, reason in report.skipped.items():
        yield f"\n{name}: not run, {reason}"
    yield ""
    yield from table_lines(list(map(target_cells, rows(report))), ("figure", "bound", "verdict"))
    if not report.machine["device"].startswith("cuda"):
        yield "  all of it on a GPU: not run (--device cuda)"


def part_cells(row: Measurement, none: float | None, other: float | None) -> dict[str, str]:
    """The cells of a measurement and its `ratios`, by title of the column."""
    low, high = (1000 * value for value in row.quartiles)
    decoded = "decode" in row.part or row.part == "batch"
    tokens = row.image_tokens if row.part in ("tower", "prefill", "first token") else None
    return {
        "": f"  {row.contender} {row.setting}",
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


def profile_cells(one: Profile) -> dict[str, str]:
    """The kinds of operators as shares of one pass, by title of the column."""
    seconds = {**one.kinds, "between": one.seconds - sum(one.kinds.values())}
    others = [(op, took) for op, took in one.operators.items() if kind(op) == OTHERS][:3]
    longest = (f"{op.split('::')[-1]} {took / one.seconds:.1%}" for op, took in others)
    return {
        "": f"  {one.contender} {one.part} {one.setting}",
        "ms": f"{1000 * one.seconds:.2f}",
        **{name: f"{took / one.seconds:.1%}" for name, took in seconds.items()},
        "longest others": ", ".join(longest),
    }


def target_cells(row: Row) -> dict[str, str]:
    """A figure with its bound, verdict and conditions, by title of the column."""
    bound = verdict = ""
    if row.bound is not None:
        bound = f"{'at least' if row.at_least else 'at most'} {row.bound:.2f} {row.unit}"
        verdict = f"{row.verdict} ({row.conditions})".strip()
    if row.value is None:
        verdict = f"not run ({row.missing})"
    value = number(row.value, ".3f") or "-"
    return {"figure": f"  {row.figure}", "here": value, "bound": bound, "verdict": verdict}


def number(value: float | None, form: str, scale: float = 1.0) -> str:
    return "" if value is None else format(scale * value, form)


def heading(report: Report) -> Iterator[str]:
    """The settings, the machine, its limits, and the footprints."""
    settings, limits = report.settings, report.limits
    weights = settings.source or "random weights"
    layers = f"{report.config.text.num_layers} decoder layers"
    yield (
        f"{report.config.name}, {weights}, {layers}, {precision(report)}; "
        + (f"medians of {n} rounds" if (n := report.counted_rounds) else "no round was completed")
        + (", then interrupted" if report.interrupted else "")
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
    if report.llamacpp:
        yield f"{report.llamacpp}, random weights of the same shapes"
    if report.choice:
        yield report.choice
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
        yield f"{name}: " + ", ".join(f"{k} {v}" for k, v in parts.items() if v)


def precision(report: Report) -> str:
    """The dtype, and the decoder's quantization if it has one."""
    return f"{report.method} decoder, {report.dtype}" if report.method else report.dtype


def load_time(footprint: Footprint) -> str:
    """Seconds to load, and the number of processes; empty for random weights."""
    if footprint.load_seconds is None:
        return ""
    processes = f" (median of {n} processes)" if (n := len(footprint.loads)) > 1 else ""
    return f"{footprint.load_seconds:.2f} s{processes}"


def in_gb(count: int | None) -> str:
    return "" if count is None else f"{count / GIGA:.2f} GB"
