"""The figures of a run that have a target: PASS or SHORT.

The targets are bounds for a whole 7B model in bfloat16 on a CPU, from medians of at least five
rounds. For other runs the figures have no verdict, but say what is different. A missing figure says
why.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from llava_lite.bench.cases import LLAMACPP, OURS, PARTS, SHARED_WORDS, TRANSFORMERS
from llava_lite.bench.machine import Measurement
from llava_lite.bench.run import PEER_FOOTPRINT, Report
from llava_lite.config import LLAVA_1_5_7B, LlavaConfig

FAST = "hybrid-72-36"
FEWEST_ROUNDS = 5  # for a verdict
# The least share of the read bandwidth at which a token reads a longer cache. Reading once comes
# near 1. A cache copied at every token takes four passes (read, fetch, write, read): at most 0.25.
CACHE_BANDWIDTH = 0.3
GIGA = 1e9
GROWING = PARTS[-3:]
# Why a figure is missing: the option or the model that it needs, or the system.
AGAINST, LENGTHS = "--against transformers", "--lengths 128 2048"
FOLDER, UNKNOWN = "of a folder: -m MODEL", "not known here"


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
    found = [*speed_rows(report), *int4_rows(report), *load_rows(report), *work_rows(report)]
    found += llamacpp_rows(report) if report.settings.llamacpp else ()
    return [add_conditions(report, row) for row in found]


def add_conditions(report: Report, row: Row) -> Row:
    """The row with its conditions, judged only if they hold."""
    here, target, rounds = report.config, LLAVA_1_5_7B, report.counted_rounds
    conditions = {
        report.machine["device"]: "cpu",
        report.dtype: "bfloat16",
        describe_width(here): describe_width(target),
    }
    if row.whole:
        layers = f"{target.text.num_layers} decoder layers"
        conditions[f"{here.text.num_layers} decoder layers"] = layers
    if row.plain:
        conditions[f"{report.method or 'plain'} weights"] = "plain weights"
    different = [
        f"{is_here}, not {there}" for is_here, there in conditions.items() if is_here != there
    ]
    if rounds < FEWEST_ROUNDS:
        different.append(f"{rounds} rounds, not {FEWEST_ROUNDS}")
    missing = row.missing
    if not missing or (missing == AGAINST and report.settings.against):
        missing = "the run ended before"
    text = "; ".join(different) or ", ".join([*conditions, f"{rounds} rounds"])
    return replace(row, judged=not different, conditions=text, missing=missing)


def describe_width(config: LlavaConfig) -> str:
    """The size of a decoder layer."""
    return f"width {config.text.hidden_size} with {config.text.num_heads} heads"


def speed_rows(report: Report) -> Iterator[Row]:
    """Against transformers, which has no reduction."""
    decode = ratio(report, "decode", TRANSFORMERS, OURS)  # times, so the inverse of tokens/s
    yield Row("decode, tokens/s: times transformers", decode, 1.35, True, "", AGAINST)
    share = ours.read_share if (ours := report.find(OURS, "decode")) else None
    yield Row("decode: share of the read bandwidth", share, 0.90, True)
    yield from first_token_rows(report, "none", 0.90)
    tower = ratio(report, "tower", OURS, TRANSFORMERS)
    yield Row("tower: time, transformers = 1", tower, 0.70, False, "", AGAINST, whole=False)
    yield from first_token_rows(report, FAST, 0.20)


def first_token_rows(report: Report, setting: str, bound: float) -> Iterator[Row]:
    """Our later calls and our first call. transformers caches nothing between calls, so it has one
    time for both."""
    name = "first token" if setting == "none" else f"first token, {setting}"
    for part, how, limit in (
        ("first token", f"{SHARED_WORDS} words cached", bound),
        ("first token, cold", "nothing cached", None),
    ):
        run = setting == "none" or report.find(OURS, part, setting)
        missing = AGAINST if run else report.skipped.get(setting, f"--reductions {setting}")
        value = ratio(report, part, OURS, TRANSFORMERS, setting)
        yield Row(f"{name}, {how}: time, transformers = 1", value, limit, False, "", missing)


def int4_rows(report: Report) -> Iterator[Row]:
    """int4 weights: decode against transformers in 16 bit, and peak memory."""
    settings = report.settings
    int4 = settings.quantized if settings.quantize == "int4" else ""
    missing = AGAINST if int4 else "--quantize int4"
    decode = ratio(report, "decode", TRANSFORMERS, int4)
    yield Row("int4 decode, tokens/s: times transformers", decode, 3.5, True, "", missing)
    missing = FOLDER if int4 else "--quantize int4"
    footprint, peak = report.footprints.get(OURS if report.method == "int4" else int4), None
    if footprint:
        missing = FOLDER if settings.source is None else UNKNOWN
        if footprint.loading and footprint.answering:
            peak = max(footprint.loading, footprint.answering) / GIGA
    yield Row("int4 peak memory", peak, 5.5, False, "GB", missing, plain=False)


def llamacpp_rows(report: Report) -> Iterator[Row]:
    """Against llama.cpp, which has no reduction. It computes every prompt from its first word on,
    so a first token compares with both of ours, as for transformers."""
    settings = report.settings
    wide = [f"{LLAMACPP} {form}" for form in settings.llamacpp if form in ("bf16", "f16")]
    for theirs in wide or [f"{LLAMACPP} bf16"]:
        decode = ratio(report, "decode", theirs, OURS)
        missing = "" if wide else "--gguf-formats bf16"
        yield Row(f"decode, tokens/s: times {theirs}", decode, 1.0, True, "", missing)
        for part, how, limit in (
            ("first token", f"{SHARED_WORDS} words cached", 0.8),
            ("first token, cold", "nothing cached", None),
        ):
            ours, peer = report.find(OURS, part), report.find(theirs, "first token")
            value = ours.seconds / peer.seconds if ours and peer else None
            yield Row(f"first token, {how}: time, {theirs} = 1", value, limit, False, "", missing)
    int4 = settings.quantized if settings.quantize == "int4" else ""
    decode = ratio(report, "decode", f"{LLAMACPP} q4_k", int4)
    missing = "" if "q4_k" in settings.llamacpp else "--gguf-formats q4_k"
    missing = missing if int4 else "--quantize int4"
    yield Row(f"int4 decode, tokens/s: times {LLAMACPP} q4_k", decode, 0.8, True, "", missing)


def load_rows(report: Report) -> Iterator[Row]:
    """Loading a folder in a fresh process, with the file in the page cache: time and memory, with
    bounds, and against transformers, without."""
    ours, theirs = report.footprints[OURS], report.footprints.get(TRANSFORMERS)
    figure = "load of a folder: median of fresh processes, import of torch apart"
    yield Row(figure, ours.load_seconds, 5.0, False, "s", FOLDER)
    private = None if ours.private is None else ours.private / GIGA
    missing = FOLDER if ours.load_seconds is None else UNKNOWN
    yield Row("load of a folder: private memory", private, 1.0, False, "GB", missing)
    missing = UNKNOWN if theirs else report.skipped.get(PEER_FOOTPRINT, AGAINST)
    for name, field in (
        ("time to load", "load_seconds"),
        ("private memory after loading", "private"),
        ("peak memory while answering", "answering"),
    ):
        above, below = (getattr(one, field, None) for one in (ours, theirs))
        value = above / below if above and below else None
        yield Row(f"{name}: transformers = 1", value, None, False, "", missing)


def work_rows(report: Report) -> Iterator[Row]:
    """Batches, and longer prompts."""
    one, eight = (report.find(OURS, "batch", f"none x {size}") for size in (1, 8))
    batch = 8 * one.seconds / eight.seconds if one and eight else None
    yield Row("batch of 8, tokens/s: times batch of 1", batch, 5.0, True, "", "--batch-sizes 1 8")
    lengths = grown_lengths(report)
    span = f"{lengths[0]} to {lengths[-1]} words" if len(lengths) > 1 else "by length"
    prefill = [seconds_per_token(report, length) for length in lengths]
    spread = max(prefill) / min(prefill) if len(prefill) > 1 else None
    figure = f"prefill per token but attention, {span}: slowest / fastest"
    yield Row(figure, spread, 1.15, False, "", LENGTHS)
    share, missing = cache_bandwidth(report, lengths)
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


def grown_lengths(report: Report) -> list[int]:
    """The lengths of growing prompts with all parts. An interrupted run may lack the last parts."""
    parts = {part: {r.setting for r in report.measurements if r.part == part} for part in GROWING}
    return sorted(map(int, set.intersection(*parts.values())))


def find_grown(report: Report, part: str, length: int) -> Measurement:
    """A measurement of a growing prompt of that many words."""
    found = report.find(OURS, f"growing {part}", str(length))
    assert found is not None  # all parts have the same lengths
    return found


def seconds_per_token(report: Report, length: int) -> float:
    """Seconds of prefill per token without attention, which grows with the square of the length."""
    whole, attention = (find_grown(report, part, length) for part in ("prefill", "attention"))
    return (whole.seconds - report.config.text.num_layers * attention.seconds) / length


def cache_bandwidth(report: Report, lengths: list[int]) -> tuple[float | None, str]:
    """The rate at which a token reads the extra cache of the longest prompt over the shortest, as a
    share of the read bandwidth; or None and the reason."""
    if len(lengths) < 2:
        return None, LENGTHS
    short, long = (find_grown(report, "decode", length) for length in (lengths[0], lengths[-1]))
    seconds = long.seconds - short.seconds
    if seconds <= 0:
        return None, "no more time than the machine's noise"
    return (long.bytes - short.bytes) / seconds / report.limits["read"], ""
