"""`llava-lite bench` runs and says everything it promises. No figure of time is asserted.

Run: pytest tests/bench/test_bench.py
"""

import gc
import json
import mmap
import shutil
import statistics
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from helpers.models import random_llava
from helpers.peers import peer
from llava_lite.bench import cases as bench_cases
from llava_lite.bench import footprint as footprints
from llava_lite.bench import machine as hardware
from llava_lite.bench import memory, models, phases, plot, targets, transformers_peer
from llava_lite.bench import report as bench_report
from llava_lite.bench import run as bench
from llava_lite.bench.cases import OURS, TRANSFORMERS, Work, stored_bytes, word_ids
from llava_lite.bench.footprint import Footprint, find_footprint, find_peer_footprint
from llava_lite.bench.machine import Measurement, Prepared, time_in_turns
from llava_lite.bench.models import BenchError, Settings, open_model, random_model, twin
from llava_lite.bench.profile import Profile
from llava_lite.bench.run import Report
from llava_lite.bench.targets import Row
from llava_lite.bench.transformers_peer import Peer, PeerError
from llava_lite.checkpoints.convert import convert
from llava_lite.checkpoints.load import embedded_model
from llava_lite.cli import program as cli
from llava_lite.config import LLAVA_1_5_7B, LLAVA_1_5_13B, TINY, FastViTHDConfig, LlavaConfig
from llava_lite.errors import CheckpointError
from llava_lite.generation.model import Model

INT4 = f"{OURS} int4"
FAST = "hybrid-72-36"
PRESETS = {"none", "tome-72", "tome-72-logical", FAST}
WIDTH, MLP = 64, 160  # a quarter of the embedded model's decoder
NARROW = replace(
    TINY,
    vision=replace(TINY.vision, hidden_size=48, intermediate_size=96, num_layers=4, num_heads=4),
    text=replace(TINY.text, hidden_size=WIDTH, intermediate_size=MLP, num_heads=4),
)


@pytest.fixture(scope="module", autouse=True)
def small_limits() -> Iterator[None]:
    """The machine's own limits, asked for in a moment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardware, "MATMUL", (8, 64, 96))
        patch.setattr(hardware, "READ_BYTES", 1 << 20)
        yield


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process of its own for loading."""
    monkeypatch.setattr(footprints, "apart", lambda task, *args: task(*args))


@pytest.fixture(scope="module")
def report() -> Report:
    """A narrow random model in float32, a quantized one that is none, and transformers."""
    peer("transformers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.SIZES, "tiny", NARROW)
        patch.setattr(footprints, "apart", lambda task, *args: task(*args))
        patch.setattr(phases, "quantize_model", lambda llava, method: None)
        patch.setattr(models, "quantize_model", lambda llava, method: None)
        settings = Settings(
            size="tiny",
            layers=4,
            dtype="float32",
            repeat=2,
            reductions=("tome-72", "tome-72-logical", "dymu-72", "hybrid-72-36"),
            lengths=(16, 40, 4096),
            batch_sizes=(1, 8),
            against=True,
            quantize="int4",
            quiet=True,
        )
        return bench.bench(settings)


# ---- a run -------------------------------------------------------------------------------------


def test_every_part_is_there(report: Report) -> None:
    found = {(row.contender, row.part, row.setting) for row in report.measurements}
    assert len(found) == len(report.measurements)
    expected = {(OURS, part, preset) for preset in PRESETS for part in ("prefill", "first token")}
    expected |= {(OURS, "decode", preset) for preset in PRESETS}
    expected |= {(OURS, "tower", preset) for preset in ("none", "tome-72")}
    expected |= {
        (OURS, f"growing {part}", length)  # 4096 words are more than its context
        for part in ("prefill", "decode", "attention")
        for length in ("16", "40")
    }
    few = {"none", "tome-72-logical", "hybrid-72-36"}
    expected |= {(INT4, part, x) for x in few for part in ("prefill", "first token", "decode")}
    for name in (OURS, INT4):
        for preset in ("none", "hybrid-72-36"):
            expected |= {(name, "first token, cold", preset)}
            expected |= {(name, "batch", f"{preset} x {size}") for size in (1, 8)}
    peers = ("tower", "prefill", "first token", "decode")
    expected |= {(TRANSFORMERS, part, "none") for part in peers}
    assert found == expected
    assert report.phases == ((OURS, INT4, TRANSFORMERS),)
    assert "llava-lite thresholds" in report.skipped["dymu-72"]
    assert report.skipped["4096 words"] == "the context is 2048 positions"


def test_transformers_runs_the_same_weights_on_the_same_prompt(report: Report) -> None:
    assert report.transformers is not None
    assert report.difference is not None and report.difference < 1e-4


def test_figures_are_medians_and_rates_follow_from_them(report: Report) -> None:
    for row in report.measurements:
        assert len(row.rounds) == 2
        assert row.seconds == statistics.median(row.rounds) > 0
        prompt = "prefill" in row.part or "decode" in row.part or row.part == "batch"
        assert (row.tokens_per_second is not None) == prompt or row.part == "growing attention"
        assert min(row.rounds) <= row.quartiles[0] <= row.seconds <= row.quartiles[1]
        if row.bytes_per_second is not None:
            assert row.bytes_per_second == pytest.approx(row.bytes / row.seconds)
            assert row.read_share == pytest.approx(row.bytes_per_second / report.limits["read"])
    eight = report.find(OURS, "batch", "none x 8")
    assert eight is not None and eight.tokens_per_second == pytest.approx(8 / eight.seconds)
    whole = report.find(OURS, "prefill")
    assert whole is not None and whole.tokens_per_second == pytest.approx(640 / whole.seconds)
    reads = [rate for name, rate in report.limits.items() if name.startswith("read, ")]
    assert report.limits["read"] == max(reads) and len(reads) >= 2


def test_bytes_and_caches_are_those_of_the_model(report: Report) -> None:
    text = report.config.text
    full, pruned = (report.find(OURS, "decode", x) for x in ("none", "hybrid-72-36"))
    assert full is not None and pruned is not None
    per_position = 2 * WIDTH * 4  # keys and values, in float32
    assert full.kv_bytes == 4 * 640 * per_position
    assert pruned.kv_bytes == (3 * 136 + 100) * per_position
    linear = 4 * (4 * WIDTH * WIDTH + 3 * WIDTH * MLP) + WIDTH * text.vocab_size
    norms = 9 * WIDTH
    halfway = 4 * (640 + 5) * per_position  # after one token, amid eight
    assert full.bytes == 4 * (linear + norms) + halfway
    eight = report.find(OURS, "batch", "none x 8")
    assert eight is not None and eight.bytes == full.bytes + 7 * halfway
    assert (full.image_tokens, pruned.image_tokens) == (576, 72)
    ours, theirs = (report.find(name, "tower") for name in (OURS, TRANSFORMERS))
    assert ours is not None and theirs is not None
    assert theirs.bytes == ours.bytes * 4 // 3  # one more block, which LLaVA does not use


def test_operations_of_decode_are_two_for_each_weight_and_cached_number(report: Report) -> None:
    row, text = report.find(OURS, "decode"), report.config.text
    assert row is not None and row.flops_per_second is not None
    weights = 4 * (4 * WIDTH * WIDTH + 3 * WIDTH * MLP) + WIDTH * text.vocab_size
    attention = 4 * 641 * 2 * WIDTH
    assert row.flops_per_second * row.seconds == pytest.approx(2 * (weights + attention))


def test_rows_follow_from_medians(report: Report) -> None:
    rows = named_rows(report)
    ours, theirs = (report.find(name, "decode") for name in (OURS, TRANSFORMERS))
    assert ours is not None and theirs is not None
    decode = rows["decode, tokens/s"].value
    assert decode == pytest.approx(theirs.seconds / ours.seconds)
    full = report.find(TRANSFORMERS, "first token")
    assert full is not None
    for part, how in (("first token", "34 words cached"), ("first token, cold", "nothing cached")):
        for setting, name in (("none", "first token"), (FAST, f"first token, {FAST}")):
            own = report.find(OURS, part, setting)
            assert own is not None
            value = rows[f"{name}, {how}"].value
            assert value == pytest.approx(own.seconds / full.seconds)
    assert rows["int4 decode, tokens/s"].value is not None
    assert rows["int4 peak memory"].verdict == "not run"  # no folder
    assert rows["load of a folder"].verdict == "not run"
    assert {row.verdict for row in rows.values()} == {"", "not run"}  # it is no 7B model


def test_table_has_every_line(report: Report) -> None:
    lines = list(bench_report.table(report))
    for row in report.measurements:
        shown = [line for line in lines if line.startswith(f"  {row.contender} {row.setting} ")]
        assert any(f"{1000 * row.seconds:.2f}" in line for line in shown)
    for row in targets.rows(report):
        [line] = [line for line in lines if line.startswith(f"  {row.figure} ")]
        assert row.verdict in line
        if row.bound is not None:
            assert f" {row.bound:.2f}" in line
            assert (row.missing if row.value is None else row.conditions) in line
    text = "\n".join(lines)
    for title in bench_report.TITLES.values():
        assert title in text
    assert f"transformers {report.transformers}" in text and "dymu-72: not run" in text
    assert "4096 words: not run, the context is 2048 positions" in text
    assert "where the time goes" not in text
    pass_ = Profile(OURS, "prefill", "none", 2.0, {"aten::mm": 1.0})
    text = "\n".join(bench_report.table(replace(report, profiles=(pass_,))))
    assert "where the time goes" in text and "  llava_lite prefill none  2000.00  " in text


def test_json_has_everything(report: Report) -> None:
    content = json.loads(json.dumps(bench_report.to_dict(report)))
    assert len(content["measurements"]) == len(report.measurements)
    lines = {(x["contender"], x["part"], x["setting"]): x for x in content["measurements"]}
    for line in lines.values():
        none = lines.get((line["contender"], line["part"], "none"))
        if none is not None:
            assert line["against_none"] == pytest.approx(line["seconds"] / none["seconds"])
    for part, theirs in (("prefill", "prefill"), ("first token, cold", "first token")):
        fast, full = lines[OURS, part, FAST], lines[TRANSFORMERS, theirs, "none"]
        assert fast["against_transformers"] == pytest.approx(fast["seconds"] / full["seconds"])
    assert full["against_transformers"] is None
    assert content["machine"]["torch"] == torch.__version__
    assert content["footprints"][OURS]["weights"] > 0
    assert [row["figure"] for row in content["rows"]] == [
        row.figure for row in targets.rows(report)
    ]


def test_plot(report: Report, tmp_path: Path) -> None:
    peer("matplotlib")
    file = tmp_path / "speed.png"
    plot.check_plot(file)
    plot.save_plot(report, file)
    assert file.stat().st_size <= 100_000
    with Image.open(file) as image:
        assert image.width > 600
    labels = [label for _, label, _ in plot.bars(report, "decode")]
    assert labels[0] == "transformers" and "int4, hybrid-72-36" in labels and len(labels) == 5


# ---- bounds ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "at_least", "verdict"),
    [(1.35, True, "PASS"), (1.34, True, "SHORT"), (1.35, False, "PASS"), (1.36, False, "SHORT")],
)
def test_verdicts(value: float, at_least: bool, verdict: str) -> None:
    row = Row("figure", value, 1.35, at_least)
    assert row.verdict == row.to_dict()["verdict"] == verdict
    assert replace(row, judged=False).verdict == ""
    assert replace(row, value=None).verdict == "not run"


def target_line(row: Row) -> str:
    """The line of a figure in the table."""
    return " ".join(bench_report.target_cells(row).values()).rstrip()


def named_rows(report: Report) -> dict[str, Row]:
    """By what stands in front of the colon, if there is one."""
    return {row.figure.split(":")[0]: row for row in targets.rows(report)}


def made_up(
    seconds: dict[tuple[str, str, str], float], device: str = "cpu", **changes: Any
) -> Report:
    """A report of such medians; a batch of n makes n tokens, and the bytes read of a
    growing prompt are as many as its words, of all else one. A second reads a thousand bytes."""
    rows = []
    for (contender, part, setting), median in seconds.items():
        tokens = int(setting.split(" x ")[1]) if " x " in setting else 1
        read = int(setting) if part == "growing decode" else 1
        share = {"read_share": 0.5 / median, "bytes": read}
        ends = median, median
        rows.append(
            Measurement(contender, part, setting, median, ends, (median,), tokens / median, **share)
        )
    nothing = Footprint(LLAVA_1_5_7B, "bfloat16", 1, None, None, None, None)
    report = Report(
        Settings(quantize="int4", against=True),
        LLAVA_1_5_7B,
        "bfloat16",
        {"device": device},
        ((OURS,),),
        {OURS: nothing, INT4: nothing},
        {"matmul": 1.0, "read": 1000.0},
        tuple(rows),
        {},
    )
    return replace(report, **changes)


GOOD = {
    (OURS, "decode", "none"): 0.5,
    (TRANSFORMERS, "decode", "none"): 0.7,
    (INT4, "decode", "none"): 0.19,
    (OURS, "tower", "none"): 0.6,
    (TRANSFORMERS, "tower", "none"): 1.0,
    (OURS, "first token", "none"): 8.0,
    (OURS, "first token", "hybrid-72-36"): 1.9,
    (OURS, "first token, cold", "none"): 9.5,
    (OURS, "first token, cold", "hybrid-72-36"): 2.5,
    (TRANSFORMERS, "first token", "none"): 10.0,
    (OURS, "batch", "none x 1"): 1.0,
    (OURS, "batch", "none x 8"): 1.5,
    (OURS, "growing prefill", "100"): 100 + 32 * 1.0,
    (OURS, "growing prefill", "200"): 200 + 32 * 4.0,
    (OURS, "growing attention", "100"): 1.0,
    (OURS, "growing attention", "200"): 4.0,
    (OURS, "growing decode", "100"): 1.0,
    (OURS, "growing decode", "200"): 1.32,
}
LOADED = {
    OURS: Footprint(LLAVA_1_5_7B, "bfloat16", 1, 4.0, 900_000_000, 1, 1),
    INT4: Footprint(LLAVA_1_5_7B, "bfloat16", 1, 9.0, 1, 5_400_000_000, 4_000_000_000),
    TRANSFORMERS: Footprint(LLAVA_1_5_7B, "bfloat16", 1, 16.0, 1_800_000_000, 1, 2),
}
FOLDER = Settings("folder", quantize="int4", against=True)


def test_good_figures_pass_every_bound() -> None:
    rows = targets.rows(made_up(GOOD, footprints=LOADED, settings=FOLDER))
    assert [row.verdict for row in rows if row.bound is not None] == ["PASS"] * 12
    assert rows[0].value == pytest.approx(1.4)
    assert rows[1].value == 1.0
    named = {row.figure: row.value for row in rows}
    first = "first token, hybrid-72-36"
    assert named[f"{first}, 34 words cached: time, transformers = 1"] == pytest.approx(0.19)
    assert named[f"{first}, nothing cached: time, transformers = 1"] == pytest.approx(0.25)
    assert named["time to load: transformers = 1"] == 0.25
    assert named["private memory after loading: transformers = 1"] == 0.5
    assert named["peak memory while answering: transformers = 1"] == 0.5
    assert rows[-2].value == pytest.approx(1.0)  # the attention is not counted
    assert rows[-1].value == pytest.approx(100 / 0.32 / 1000)
    whole = "width 4096 with 32 heads, 32 decoder layers, plain weights, 5 rounds"
    assert target_line(rows[0]).endswith(f"PASS (cpu, bfloat16, {whole})")


@pytest.mark.parametrize("figure", ["first token", "first token, hybrid-72-36"])
def test_a_first_token_with_nothing_cached_is_a_figure_without_a_bound(figure: str) -> None:
    cold = named_rows(made_up(GOOD))[f"{figure}, nothing cached"]
    assert cold.bound is None and cold.verdict == ""
    assert target_line(cold).endswith(f"{cold.value:.3f}")


def config_with(**changes: Any) -> LlavaConfig:
    return replace(LLAVA_1_5_7B, text=replace(LLAVA_1_5_7B.text, **changes))


@pytest.mark.parametrize(
    ("changes", "still_judged", "reason"),
    [
        ({"machine": {"device": "cuda"}}, [], "cuda, not cpu"),
        ({"dtype": "float32"}, [], "float32, not bfloat16"),
        ({"config": LLAVA_1_5_13B}, [], "width 5120 with 40 heads, not width 4096 with 32 heads"),
        ({"config": config_with(num_layers=4)}, ["tower"], "4 decoder layers, not 32 decoder"),
        ({"settings": replace(FOLDER, repeat=4)}, [], "4 rounds, not 5"),
        (
            {"footprints": {**LOADED, OURS: replace(LOADED[OURS], method="int4")}},
            ["int4 peak memory"],
            "int4 weights, not plain weights",
        ),
    ],
)
def test_no_verdict_where_the_bounds_do_not_hold(
    changes: dict[str, Any], still_judged: list[str], reason: str
) -> None:
    rows = targets.rows(made_up(GOOD, **{"footprints": LOADED, "settings": FOLDER, **changes}))
    assert all(row.value is not None for row in rows)
    judged = [row.figure.split(":")[0] for row in rows if row.judged]
    assert judged == still_judged
    for row in rows:
        assert (row.verdict != "") == row.judged
        if not row.judged and row.bound is not None:
            assert reason in row.conditions and f"({row.conditions})" in target_line(row)


def test_what_more_words_cost_a_token_has_to_be_more_than_noise() -> None:
    for seconds in (1.0, 0.9):
        row = targets.rows(made_up({**GOOD, (OURS, "growing decode", "200"): seconds}))[-1]
        assert row.value is None and "noise" in target_line(row)


@pytest.mark.parametrize(
    ("key", "seconds", "figure"),
    [
        ((TRANSFORMERS, "decode", "none"), 0.66, "decode, tokens/s"),
        ((OURS, "decode", "none"), 0.56, "decode: share"),
        ((OURS, "first token", "none"), 9.1, "first token, 34 words"),
        ((OURS, "tower", "none"), 0.71, "tower"),
        ((OURS, "first token", "hybrid-72-36"), 2.1, "first token, hybrid"),
        ((INT4, "decode", "none"), 0.21, "int4 decode"),
        ((OURS, "batch", "none x 8"), 1.7, "batch of 8"),
        ((OURS, "growing prefill", "200"), 200 + 32 * 6.0, "prefill per token"),
        ((OURS, "growing decode", "200"), 1.34, "decode, 100 to 200 words"),
    ],
)
def test_a_slow_figure_falls_short(key: tuple[str, str, str], seconds: float, figure: str) -> None:
    rows = targets.rows(made_up({**GOOD, key: seconds}, footprints=LOADED, settings=FOLDER))
    short = [row.figure for row in rows if row.verdict == "SHORT"]
    assert any(name.startswith(figure) for name in short), short
    assert len(short) <= 2  # our decode is part of two


def test_load_and_memory_have_bounds() -> None:
    slow = {
        OURS: replace(LOADED[OURS], load_seconds=5.1, private=1_100_000_000),
        INT4: replace(LOADED[INT4], answering=5_600_000_000),
    }
    rows = targets.rows(made_up(GOOD, footprints=slow, settings=FOLDER))
    short = [row.figure for row in rows if row.verdict == "SHORT"]
    assert short == [
        "int4 peak memory",
        "load of a folder: median of fresh processes, import of torch apart",
        "load of a folder: private memory",
    ]


def test_figures_that_are_not_there_say_how_to_get_them() -> None:
    plain = Settings(quiet=True)
    rows = targets.rows(made_up({}, settings=plain))
    assert {row.verdict for row in rows} == {"not run"}
    missing = {row.figure.split(":")[0].split(",")[0]: row.missing for row in rows}
    assert missing["tower"] == "--against transformers"
    assert missing["int4 decode"] == missing["int4 peak memory"]
    assert missing["int4 decode"] == "--quantize int4"
    assert missing["load of a folder"] == "of a folder: -m MODEL"
    lines = "\n".join(map(target_line, rows))
    assert "not run (--against transformers)" in lines


# ---- who runs together -------------------------------------------------------------------------


def test_what_does_not_fit_together_runs_one_after_the_other() -> None:
    settings = Settings(quantize="int4", against=True)
    plain = Footprint(LLAVA_1_5_7B, "bfloat16", 13_500_000_000, None, None, None, None)
    together = settings.contenders
    assert together == (OURS, INT4, TRANSFORMERS)
    free = bench.needed_bytes(settings, plain, together)
    assert 18e9 < free < 26e9
    assert bench.plan(settings, plain, free) == [together]
    assert bench.plan(settings, plain, None) == [together]
    assert bench.plan(settings, plain, free - 1) == [(OURS, TRANSFORMERS), (INT4,)]
    assert bench.plan(settings, plain, 10**9) == [(OURS,), (INT4,), (TRANSFORMERS,)]


@pytest.mark.parametrize(("names", "ours"), [((OURS,), 1), ((OURS, INT4, TRANSFORMERS), 2)])
def test_compiled_steps_need_their_buffers(names: tuple[str, ...], ours: int) -> None:
    """8 slots of 2,304 positions, each 16 KiB in each of 32 layers."""
    settings = Settings(quantize="int4", against=True, lengths=(128, 2048))
    plain = Footprint(LLAVA_1_5_7B, "bfloat16", 13_500_000_000, None, None, None, None)
    without = bench.needed_bytes(settings, plain, names)
    needed = bench.needed_bytes(replace(settings, compile=True), plain, names)
    assert needed - without == ours * 8 * 2304 * 32 * 2**14


def test_a_first_call_fills_the_cache_of_the_first_words(tiny_model: Model) -> None:
    """In a pass of its own, as `generate` does; the calls after it find it."""
    passes: list[int] = []
    hook = tiny_model.llava.decoder.register_forward_pre_hook(
        lambda _, inputs: passes.append(len(inputs[0]))
    )
    try:
        with torch.inference_mode():
            walks, _ = bench_cases.walk_all(tiny_model, [])
            contender = bench_cases.Contender(OURS, tiny_model, Work.of(tiny_model.llava))
            cases = bench_cases.prompt_cases(contender, "none", walks["none"])
            runs = {case.part: case.run for case in cases}
            for part in ("first token, cold", "first token"):
                run = runs[part]
                call = run.make() if isinstance(run, Prepared) else run
                passes.clear()
                call()
                rest = 64 - 34 + tiny_model.config.vision.num_patches
                assert passes == ([34, rest] if "cold" in part else [rest])
    finally:
        hook.remove()
        tiny_model.prefix.clear()


def test_random_weights_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "free_bytes", lambda device: 20_000_000_000)
    bench.check(Settings(size="7b"))
    bench.check(Settings(size="13b", layers=4))
    with pytest.raises(BenchError, match=r"13b .*40 layers in bfloat16 needs 26\.\d GB, but 20.0"):
        bench.check(Settings(size="13b"))


# ---- transformers ------------------------------------------------------------------------------


def test_the_peer_shares_our_tensors() -> None:
    peer("transformers")
    llava = random_model(TINY, torch.bfloat16, "cpu")
    other = Peer.of(llava)
    theirs = {tensor.data_ptr() for tensor in other.model.state_dict().values()}
    assert {tensor.data_ptr() for tensor in llava.state_dict().values()} <= theirs
    assert {tensor.dtype for tensor in other.model.state_dict().values()} == {torch.bfloat16}
    # Whoever turns this off measures another transformers, see Peer.
    assert all(parameter.requires_grad for parameter in other.model.parameters())
    assert not any(parameter.requires_grad for parameter in llava.parameters())
    ids = word_ids(TINY.text, 5000)
    assert set(ids) == set(range(3, TINY.text.vocab_size - 1))  # never the one of images


def test_the_peer_refuses_weights_of_another_kind() -> None:
    llava = random_llava()
    llava.decoder.lm_head = nn.Identity()
    with pytest.raises(PeerError, match="these are quantized"):
        transformers_peer.plain_state(llava)


def test_without_transformers_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(transformers_peer, "find_spec", lambda name: None)
    assert cli.main(["bench", "--size", "tiny", "--against", "transformers"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "error: comparing needs transformers: pip install 'transformers>=4.57'\n"


# ---- machine -----------------------------------------------------------------------------------


def test_what_is_prepared_is_made_anew_untimed_and_let_go_of() -> None:
    class State:
        pass

    made: list[weakref.ref] = []

    def make() -> Callable[[], Any]:
        gc.collect()
        assert all(state() is None for state in made)
        state = State()
        made.append(weakref.ref(state))
        return partial(id, state)

    calls: list[str] = []
    runs = {"plain": partial(calls.append, "plain"), "prepared": Prepared(make)}
    seconds = time_in_turns(runs, 2, "cpu", hidden=True)
    assert len(made) == len(calls) == 3  # the first round warms up
    assert {name: len(values) for name, values in seconds.items()} == {"plain": 2, "prepared": 2}


def test_runs_take_turns_and_the_first_round_does_not_count() -> None:
    calls: list[str] = []
    runs = {name: partial(calls.append, name) for name in ("full", "merged")}
    seconds = time_in_turns(runs, 2, "cpu", hidden=True)
    assert calls == ["full", "merged"] * 3
    assert {key: len(values) for key, values in seconds.items()} == dict.fromkeys(runs, 2)
    assert hardware.quartiles([3.0]) == (3.0, 3.0)


def test_memory_of_this_process() -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("this system has no /proc")
    private = memory.private_bytes()
    assert private is None or 10_000_000 < private < 64e9
    assert 0 < (memory.free_bytes("cpu") or 0)
    with memory.MemoryWatch() as watch:
        before = watch.resident
        # Fresh pages: an allocator could have kept some that were counted before.
        with mmap.mmap(-1, 100_000_000) as block:
            block.write(bytes([1]) * len(block))
            watch.look()  # as its thread does, which a busy machine may delay
    assert before is not None and watch.resident is not None and watch.anonymous is not None
    assert watch.resident >= watch.anonymous
    assert watch.resident > before + 20_000_000


def test_memory_where_the_system_does_not_say(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memory, "PROC", tmp_path)
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "nowhere")
    assert memory.private_bytes() is None and memory.free_bytes("cpu") is None
    with memory.MemoryWatch() as watch:
        pass
    assert watch.resident is watch.anonymous is None
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:  7 kB\n")
    assert memory.free_bytes("cpu") == 7 * 1024


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({"memory.max": "max", "memory.current": "10"}, 7000 * 1024),
        ({"memory.max": "5000000", "memory.current": "2000000"}, 3_000_000),
        ({"memory.max": "5000000"}, 7000 * 1024),  # what is taken cannot be read
        ({"memory.max": "5000000", "memory.current": "6000000"}, 0),
        ({"memory.max": "9999999999", "memory.current": "0"}, 7000 * 1024),
        (
            {
                "memory.max": "5000000",
                "memory.current": "4000000",
                "memory.stat": "anon 900\nactive_file 1000000\ninactive_file 500000\n",
            },
            2_500_000,
        ),
        (
            {
                "app/inner/memory.max": "max",
                "app/inner/memory.current": "1",
                "app/memory.max": "5000000",
                "app/memory.current": "1000000",
            },
            4_000_000,
        ),
        (
            {
                "memory/app/inner/memory.limit_in_bytes": "4000000",
                "memory/app/inner/memory.usage_in_bytes": "1000000",
                "memory/memory.limit_in_bytes": "9223372036854771712",
                "memory/memory.usage_in_bytes": "1000000",
            },
            3_000_000,
        ),
    ],
)
def test_free_memory_is_that_of_a_container(
    files: dict[str, str], free: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "sys")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemAvailable:  7000 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/app/inner\n0::/app/inner\n")
    for name, content in files.items():
        file = tmp_path / "sys" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content + "\n")
    assert memory.free_bytes("cpu") == free


def test_on_a_gpu_memory_is_what_torch_allocated_there(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = iter([5, 7, 7, *[9] * 1000])
    fake = SimpleNamespace(
        init=lambda: None,
        reset_peak_memory_stats=lambda device: None,
        max_memory_allocated=lambda device: next(peaks),
        mem_get_info=lambda device: (11, 99),
    )
    monkeypatch.setattr(torch, "cuda", fake)
    with memory.MemoryWatch("cuda:0") as watch:
        pass
    assert watch.resident == watch.anonymous in (7, 9)
    assert memory.free_bytes("cuda:0") == 11


def test_weights_count_in_whatever_form_they_are_kept() -> None:
    llava = random_model(TINY, torch.bfloat16, "cpu")
    plain = Work.of(llava)
    assert stored_bytes(llava) == sum(tensor.nbytes for tensor in llava.state_dict().values())
    words = llava.decoder.embed_tokens.weight.nbytes
    parts = (llava.vision, llava.decoder, llava.projector)
    assert stored_bytes(llava) == sum(map(stored_bytes, parts))
    assert plain.decoder_bytes == stored_bytes(llava.decoder) - words


def test_random_models_are_the_same_every_time_and_finite() -> None:
    first, second = (random_model(TINY, torch.bfloat16, "cpu") for _ in range(2))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
        assert tensor.isfinite().all(), name
    assert first.decoder.norm.weight.eq(1).all()
    assert 0.015 < first.decoder.lm_head.weight.float().std() < 0.025
    one = Model(first, open_model(Settings(size="tiny")).tokenizer)
    other = twin(one)
    assert other.llava is not first
    pairs = zip(first.state_dict().values(), other.llava.state_dict().values(), strict=True)
    assert all(a.data_ptr() == b.data_ptr() for a, b in pairs)


def test_no_value_of_a_random_fastvithd_fades_away() -> None:
    """With the depths of the published tower: denormal numbers would falsify times."""
    vision = FastViTHDConfig(256, widths=(8, 16, 32, 32, 32))
    tower = random_model(replace(TINY, vision=vision), torch.bfloat16, "cpu").vision
    x = torch.randn(1, 3, 256, 256, dtype=next(tower.parameters()).dtype)
    for part in (tower.stem, *tower.stages, tower.expand):
        x = part(x)
        assert x.isfinite().all() and x.abs().float().mean() > 1e-5


# ---- command line ------------------------------------------------------------------------------


def run_cli(*arguments: object) -> int:
    small = ("--repeat", 1, "--lengths", 16, 24, "--batch-sizes", 1, 2, "--reductions")
    return cli.main(["bench", *map(str, (*small, "hybrid-72-36", *arguments))])


@pytest.mark.slow
def test_a_folder_in_a_process_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    assert run_cli("-m", embedded_model(), "--json", "-o", file, "--quiet") == 0
    printed = capsys.readouterr()
    content = json.loads(printed.out)
    assert json.loads(file.read_text()) == content
    assert printed.err == ""
    footprint = content["footprints"][OURS]
    assert 0 < footprint["load_seconds"] < 60
    assert footprint["loads"] == [footprint["load_seconds"]]
    assert footprint["weights"] < footprint["answering"] < 4e9
    assert footprint["private"] < footprint["answering"]
    verdicts = {row["figure"]: row["verdict"] for row in content["rows"]}
    assert verdicts["load of a folder: private memory"] == ""  # a bound of the 7B model
    assert verdicts["tower: time, transformers = 1"] == "not run"


@pytest.mark.slow
@pytest.mark.usefixtures("inline")
def test_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peer("transformers")
    monkeypatch.setattr(bench, "free_bytes", lambda device: 1)
    assert run_cli("-m", embedded_model(), "--against", "transformers", "--quiet") == 0
    text, noise = capsys.readouterr()
    assert "Loading" not in noise
    assert f"{OURS} | {TRANSFORMERS} (not all fit" in text
    [line] = [line for line in text.splitlines() if "first logits" in line]
    assert float(line.split("differ by ")[1].split(" %")[0]) < 5  # bfloat16
    assert "not run (--against" not in text
    figures = [line for line in text.splitlines() if ": transformers = 1 " in line]
    assert len(figures) == 3 and not any("not run" in line for line in figures)
    assert any(line.startswith("transformers: weights") for line in text.splitlines())


@pytest.mark.usefixtures("inline")
def test_without_space_for_a_copy_the_row_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(str(embedded_model()), against=True)
    plain = replace(LOADED[OURS], config=TINY)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000_000))
        with pytest.raises(CheckpointError, match=r"hf: needs 0\.02 GB, 0\.01 GB are free"):
            find_peer_footprint(settings, plain)
    with pytest.raises(BenchError, match="of a folder"):
        find_peer_footprint(Settings(size="tiny", against=True), plain)
    skipped = {bench.PEER_FOOTPRINT: "no space"}
    line = target_line(named_rows(made_up({}, skipped=skipped))["peak memory while answering"])
    assert line.endswith("not run (no space)")


@pytest.mark.parametrize(("value", "code"), [(2.0, 0), (1.0, 1)])
def test_only_strict_runs_fail_beyond_a_bound(
    monkeypatch: pytest.MonkeyPatch, value: float, code: int
) -> None:
    seconds = {(OURS, "decode", "none"): 0.5, (TRANSFORMERS, "decode", "none"): 0.5 * value}
    report = made_up(seconds, machine={"device": "cpu", "threads": 1})
    monkeypatch.setattr(bench, "bench", lambda settings: report)
    assert cli.main(["bench", "--size", "tiny"]) == 0
    assert cli.main(["bench", "--size", "tiny", "--strict"]) == code
    other = replace(report, dtype="float32")  # where the bound does not hold
    monkeypatch.setattr(bench, "bench", lambda settings: other)
    assert cli.main(["bench", "--size", "tiny", "--strict"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "tiny", "-m", "x"], "--size is for random weights"),
        (["--layers", "4"], "--layers goes with --size"),
        (["--size", "70b"], "invalid choice: '70b'"),
        (["--size", "tiny", "--repeat", "0"], "'0' is not a number of at least 1"),
        (["--size", "tiny", "--base", "x"], "random weights: it does not go with --base"),
        (["--size", "tiny", "--vision-tower", "x"], "it does not go with --vision-tower"),
        (["--size", "tiny", "--revision", "x"], "it does not go with --revision"),
        (["--size", "tiny", "--offline"], "it does not go with --offline"),
        (["--size", "tiny", "--download"], "it does not go with --download"),
        (["--reductions", "tome-7"], "no reduction 'tome-7'; there are none, folded-72,"),
    ],
)
def test_wrong_usage(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench, "bench", lambda _: pytest.fail("started"))
    assert cli.main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_what_is_named_twice_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Settings] = []
    report = made_up({}, machine={"device": "cpu", "threads": 1})
    monkeypatch.setattr(bench, "bench", lambda settings: seen.append(settings) or report)
    twice = ["--lengths", "40", "16", "40", "--batch-sizes", "8", "1", "8"]
    twice += ["--reductions", FAST, "none", FAST]
    assert cli.main(["bench", "--size", "tiny", *twice]) == 0
    [settings] = seen
    assert (settings.lengths, settings.batch_sizes) == ((40, 16), (8, 1))
    assert settings.reductions == (FAST, "none")


@pytest.fixture(scope="module")
def int4_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int4") / "model"
    convert(embedded_model(), folder, quantize="int4")
    return folder


@pytest.mark.parametrize(
    ("arguments", "wish"),
    [
        (["--quantize", "int4"], "--quantize"),
        (["--quantize", "int8"], "--quantize"),
        (["--against", "transformers"], "--against transformers"),
    ],
)
def test_what_needs_plain_weights_is_refused_before_anything_slow(
    int4_folder: Path,
    arguments: list[str],
    wish: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "transformers" in arguments:
        peer("transformers")
    monkeypatch.setattr(footprints, "apart", lambda *_: pytest.fail("started"))
    assert cli.main(["bench", "-m", str(int4_folder), *arguments]) == 1
    error = capsys.readouterr().err
    assert f"is int4 already, {wish} needs the plain weights" in error and error.count("\n") == 1


@pytest.mark.usefixtures("inline")
def test_a_quantized_folder_is_measured_as_what_it_is(
    int4_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--reductions", "none", "--batch-sizes", 1, "--lengths", 128)
    assert run_cli("-m", int4_folder, "--quiet", *words) == 0
    text = capsys.readouterr().out
    assert "6 decoder layers, int4 decoder, bfloat16; " in text.split("\n")[0]
    [line] = [line for line in text.splitlines() if line.startswith("  decode: share")]
    assert "int4 weights, not plain weights" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "nowhere/x.json"], "nowhere does not exist"),
        (["-o", "."], ".: is a folder, the output must be a file"),
        (["--plot", "speed.svg"], "speed.svg: the plot is a file that ends in .png"),
        (["--plot", "nowhere/speed.png"], "nowhere does not exist"),
        (["--device", "cuda:99"], "device 'cuda:99' is not"),
    ],
)
def test_errors_come_before_anything_slow(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(footprints, "apart", lambda *_: pytest.fail("started"))
    assert cli.main(["bench", "--size", "tiny", *arguments]) == 1
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and printed.out == ""


def test_a_plot_needs_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    with pytest.raises(BenchError, match=r"pip install 'llava-lite\[viz\]'"):
        plot.check_plot(tmp_path / "speed.png")


def test_a_folder_is_loaded_once_in_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks: list[tuple[str, bool]] = []  # and whether the model answers
    alive: weakref.WeakSet = weakref.WeakSet()
    kept: list[bool] = []

    def fresh(task: Callable[..., Any], *args: Any) -> Any:
        tasks.append((task.__name__, args[-1]))
        return task(*args)

    def counted(*args: Any) -> Model:
        gc.collect()
        assert not alive and len(kept) == len(tasks)
        model = open_model(*args)
        alive.add(model)
        return model

    monkeypatch.setattr(footprints, "apart", fresh)
    monkeypatch.setattr(footprints, "open_model", counted)
    monkeypatch.setattr(footprints, "keep_freed_memory", lambda: kept.append(True))
    settings = Settings(str(embedded_model()), repeat=3, quantize="int8")
    plain = find_footprint(settings, OURS)
    assert tasks == [("footprint", True), ("footprint", False), ("footprint", False)]
    assert len(plain.loads) == 3 and plain.load_seconds == statistics.median(plain.loads)
    quantized = find_footprint(settings, settings.quantized)
    assert tasks[3:] == [("footprint", True)] and quantized.method == "int8"
    assert "(median of 3 processes)" in bench_report.load_time(plain)
    assert find_footprint(Settings(size="tiny", layers=2), OURS).loads == ()


def end_at_once(settings: Settings) -> Footprint:
    """What a process does that the system ends."""
    import os

    os._exit(9)


@pytest.mark.slow
def test_a_process_that_is_ended_is_an_error() -> None:
    with pytest.raises(BenchError, match=r"was killed \(out of memory\?\)"):
        footprints.apart(end_at_once, Settings())
