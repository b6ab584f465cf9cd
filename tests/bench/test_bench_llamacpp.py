"""llama.cpp as a contender: its files, its prompts, and the figures with a bound.

Run: pytest tests/bench/test_bench_llamacpp.py
"""

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.peers import peer
from llava_lite.bench import footprint as footprints
from llava_lite.bench import gguf_files, llamacpp_peer, models, targets
from llava_lite.bench import machine as hardware
from llava_lite.bench import run as bench
from llava_lite.bench.cases import DECODED, LLAMACPP, OURS
from llava_lite.bench.footprint import Footprint
from llava_lite.bench.gguf_files import MMPROJ, PlannedFile, count_bytes, write_files
from llava_lite.bench.llamacpp_peer import (
    LlamaCpp,
    LlamaCppError,
    llamacpp_cases,
    open_llamacpp,
    words_prompt,
)
from llava_lite.bench.machine import Measurement, Prepared
from llava_lite.bench.models import BenchError, Settings
from llava_lite.bench.run import Report
from llava_lite.checkpoints.gguf_header import read_header
from llava_lite.cli import program as cli
from llava_lite.config import LLAVA_1_5_7B, TINY

FORMATS = ("bf16", "f16", "q8_0", "q4_k")
BF16, Q8_0, Q4_K = (f"{LLAMACPP} {form}" for form in ("bf16", "q8_0", "q4_k"))
# Rows of 256 weights, a block of Q4_K, but for the second matrix of the MLP.
SMALL = replace(
    TINY,
    vision=replace(TINY.vision, hidden_size=48, intermediate_size=96, num_layers=3, num_heads=4),
    text=replace(TINY.text, num_layers=2),
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PlannedFile]:
    """Files of every format."""
    peer("gguf")
    return write_files(SMALL, FORMATS, tmp_path_factory.mktemp("gguf") / "files")


# ---- files -------------------------------------------------------------------------------------


def test_matrices_have_the_type_of_the_format(written: dict[str, PlannedFile]) -> None:
    types = {"bf16": "BF16", "f16": "F16", "q8_0": "Q8_0", "q4_k": "Q4_K"}
    for form, expected in types.items():
        header = read_header(written[form].path)
        kinds = {name: tensor.kind for name, tensor in header.tensors.items()}
        assert kinds["blk.1.attn_q.weight"] == kinds["output.weight"] == expected
        assert kinds["blk.1.ffn_down.weight"] == ("Q8_0" if form == "q4_k" else expected)
        assert kinds["output_norm.weight"] == "F32"
        assert header.facts["llama.block_count"] == 2
    tower = read_header(written[MMPROJ].path).tensors
    assert tower["v.blk.1.ffn_up.weight"].kind == tower["mm.0.weight"].kind == "F16"


def test_weights_have_mean_zero_and_one_deviation(written: dict[str, PlannedFile]) -> None:
    gguf = peer("gguf")
    for form in FORMATS:
        for tensor in gguf.GGUFReader(written[form].path).tensors:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            if tensor.name.endswith("norm.weight"):
                assert (values == 1).all()
            elif tensor.name != "rope_freqs.weight":
                assert abs(values.mean()) < 0.001, (form, tensor.name)
                assert values.std() == pytest.approx(0.02, rel=0.03), (form, tensor.name)


def test_bytes_of_a_contender_are_those_of_its_two_files(written: dict[str, PlannedFile]) -> None:
    sizes = count_bytes(written)
    assert set(sizes) == {f"{LLAMACPP} {form}" for form in FORMATS}
    tower = written[MMPROJ].path.stat().st_size
    for form in FORMATS:
        stored = written[form].path.stat().st_size + tower
        assert 0.9 * stored < sizes[f"{LLAMACPP} {form}"] < stored  # headers have a vocabulary
    assert sizes[Q4_K] < sizes[Q8_0] < sizes[BF16]


def test_written_files_are_used_again(
    written: dict[str, PlannedFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_files, "write_file", lambda *_: pytest.fail("written"))
    folder = written["bf16"].path.parent
    with gguf_files.gguf_files(SMALL, ("bf16", "q4_k"), str(folder)) as files:
        assert files["q4_k"].path == written["q4_k"].path


def test_a_file_of_another_model_is_no_cache(written: dict[str, PlannedFile]) -> None:
    folder = written["bf16"].path.parent
    wide = replace(SMALL, text=replace(SMALL.text, intermediate_size=1024))
    with pytest.raises(BenchError, match="is of another model, name another --gguf-folder"):
        write_files(wide, ("bf16",), folder)


def test_temporary_files_are_removed() -> None:
    peer("gguf")
    with gguf_files.gguf_files(SMALL, ("q4_k",), None) as files:
        folder = files["q4_k"].path.parent
        assert files["q4_k"].path.exists()
    assert not folder.exists()


def test_a_full_disk_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer("gguf")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2_000_000_000))
    with pytest.raises(BenchError, match=r"need 14\.\d\d GB, 2\.00 GB are free on this disk: use"):
        write_files(LLAVA_1_5_7B, ("bf16",), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    write_files(SMALL, ("q4_k",), tmp_path / "new")


def test_an_interrupted_file_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peer("gguf")

    def interrupt(file: PlannedFile, name: str) -> Any:
        assert list(tmp_path.glob("*.part"))
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_files, "random_bytes", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_files(SMALL, ("bf16",), tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- llama.cpp ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(written: dict[str, PlannedFile]) -> LlamaCpp:
    peer("xllamacpp")
    return LlamaCpp(written["q4_k"].path, written[MMPROJ].path, SMALL)


def test_prompts_have_our_positions_and_steps_are_single_rows(
    written: dict[str, PlannedFile], server: LlamaCpp
) -> None:
    one = open_llamacpp(SMALL, models.random_dtype(Settings()), Q4_K, written)
    cases = {case.part: case for case in llamacpp_cases(one)}
    assert set(cases) == {"prefill", "first token", "decode"}
    for part in ("prefill", "first token"):
        run = cases[part].run
        assert not isinstance(run, Prepared)
        usage = run()["usage"]
        assert usage["prompt_tokens"] == 640 and usage["completion_tokens"] == 1
        assert usage["prompt_tokens_details"]["cached_tokens"] == 0
    decode = cases["decode"].run
    assert isinstance(decode, Prepared)
    for part in ("prefill", "first token"):  # after both prompts alike
        cases[part].run()
        usage = decode.make()()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == 639  # one row runs again
        assert usage["completion_tokens"] == cases["decode"].steps == DECODED


def test_bytes_of_a_token_are_those_of_the_format(written: dict[str, PlannedFile]) -> None:
    peer("xllamacpp")
    one = open_llamacpp(SMALL, models.random_dtype(Settings()), BF16, written)
    text = SMALL.text
    layer = 4 * text.hidden_size**2 + 3 * text.hidden_size * text.intermediate_size
    norms = 4 * (2 * text.num_layers + 1) * text.hidden_size  # in float32
    matrices = 2 * (text.num_layers * layer + text.hidden_size * text.vocab_size)
    assert one.work.decoder_bytes == matrices + norms


def test_a_refused_prompt_is_an_error(server: LlamaCpp) -> None:
    with pytest.raises(LlamaCppError, match="llama.cpp refused a prompt: "):
        server.run(words_prompt(2000))


def test_files_that_llama_cpp_cannot_load(written: dict[str, PlannedFile], tmp_path: Path) -> None:
    peer("xllamacpp")
    with pytest.raises(LlamaCppError, match="llama.cpp cannot load .*none.gguf: "):
        LlamaCpp(tmp_path / "none.gguf", written[MMPROJ].path, SMALL)


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The small model in this process, and the machine's limits in a moment."""
    monkeypatch.setitem(models.SIZES, "tiny", SMALL)
    monkeypatch.setattr(footprints, "apart", lambda task, *args: task(*args))
    monkeypatch.setattr(hardware, "MATMUL", (8, 64, 96))
    monkeypatch.setattr(hardware, "READ_BYTES", 1 << 20)
    yield


@pytest.mark.usefixtures("inline")
def test_the_command(
    written: dict[str, PlannedFile], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    peer("xllamacpp")
    words = "--size tiny --reductions none --lengths 16 --batch-sizes 1 --repeat 1 --quiet"
    theirs = "--against llamacpp --gguf-formats bf16 q4_k bf16 --gguf-folder"
    file = tmp_path / "figures.json"
    folder = str(written["bf16"].path.parent)
    assert cli.main(["bench", *words.split(), *theirs.split(), folder, "-o", str(file)]) == 0
    text, content = capsys.readouterr().out, json.loads(file.read_text())
    assert content["phases"] == [[OURS, BF16, Q4_K]]
    found = {(row["contender"], row["part"]) for row in content["measurements"]}
    for name in (BF16, Q4_K):
        assert {(name, part) for part in ("prefill", "first token", "decode")} <= found
        footprint = content["footprints"][name]
        assert footprint["load_seconds"] > 0 and footprint["answering"] > footprint["weights"]
        assert f"\n{name}: weights 0.0" in text and f"\n  {name} none" in text
    assert "\nxllamacpp 20" in text and " random weights of the same shapes\n" in text
    rows = {row["figure"]: row for row in content["rows"]}
    seconds = {
        row["contender"]: row["seconds"]
        for row in content["measurements"]
        if row["part"] == "decode"
    }
    row = rows["decode, tokens/s: times llama.cpp bf16"]
    assert row["value"] == pytest.approx(seconds[BF16] / seconds[OURS])
    assert row["verdict"] == "" and row["bound"] == 1.0


# ---- bad input ---------------------------------------------------------------------------------


def test_without_xllamacpp_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(llamacpp_peer, "find_spec", lambda name: None)
    assert cli.main(["bench", "--size", "tiny", "--against", "llamacpp"]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err == (
        "error: comparing with llama.cpp needs xllamacpp: pip install xllamacpp gguf\n"
    )


def test_without_gguf_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peer("xllamacpp")
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(footprints, "apart", lambda *_: pytest.fail("started"))
    assert cli.main(["bench", "--size", "tiny", "--against", "llamacpp"]) == 1
    assert "pip install 'llava-lite[gguf]'" in capsys.readouterr().err


def test_llama_cpp_runs_on_the_cpu_only() -> None:
    peer("xllamacpp")
    with pytest.raises(BenchError, match="not on cuda: use --device cpu"):
        bench.check(Settings(size="tiny", device="cuda", llamacpp=("bf16",)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "llamacpp", "--gguf-formats", "q5_k"], "invalid choice: 'q5_k'"),
        (["--against", "vllm"], "invalid choice: 'vllm'"),
        (["--gguf-formats", "bf16"], "--gguf-formats goes with --against llamacpp"),
        (
            ["--against", "transformers", "--gguf-folder", "x"],
            "--gguf-folder goes with --against llamacpp",
        ),
    ],
)
def test_wrong_usage(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "--size", "tiny", *arguments]) == 2
    assert message in capsys.readouterr().err


# ---- who runs together, and bounds -------------------------------------------------------------


def test_equal_precisions_share_a_phase_before_others() -> None:
    settings = Settings(quantize="int4", against=True, llamacpp=("bf16", "q4_k"))
    plain = Footprint(LLAVA_1_5_7B, "bfloat16", 14_000_000_000, None, None, None, None)
    files = {BF16: 14_000_000_000, Q4_K: 4_500_000_000}
    names = settings.contenders
    ours, int4, theirs = names[:3]
    assert names == (ours, int4, theirs, BF16, Q4_K)
    assert bench.plan(settings, plain, None, files) == [names]
    wide = (ours, theirs, BF16)
    free = bench.needed_bytes(settings, plain, wide, files)
    assert 32e9 < free < 40e9
    assert bench.plan(settings, plain, free, files) == [wide, (int4, Q4_K)]
    assert bench.plan(settings, plain, free - 1, files)[0] == (ours, theirs)
    alone = bench.needed_bytes(settings, plain, (BF16,), files)
    assert alone < bench.needed_bytes(settings, plain, (ours,), files) + 1
    assert bench.plan(settings, plain, 1, files) == [(name,) for name in names]


def made_up(ours: float, int4: float, first: float, **changes: Any) -> Report:
    """A report in which llama.cpp needs a second for everything."""
    seconds = {
        (OURS, "decode"): ours,
        (f"{OURS} int4", "decode"): int4,
        (OURS, "first token"): first,
        (OURS, "first token, cold"): 2 * first,
        **{(name, part): 1.0 for name in (BF16, Q4_K) for part in ("decode", "first token")},
    }
    rows = [
        Measurement(name, part, "none", took, (took, took), (took,), None)
        for (name, part), took in seconds.items()
    ]
    nothing = Footprint(LLAVA_1_5_7B, "bfloat16", 1, None, None, None, None)
    settings = Settings(quantize="int4", llamacpp=("bf16", "q4_k"), repeat=5)
    report = Report(
        settings,
        LLAVA_1_5_7B,
        "bfloat16",
        {"device": "cpu"},
        (settings.contenders,),
        {OURS: nothing},
        {"matmul": 1.0, "read": 1.0},
        tuple(rows),
        {},
    )
    return replace(report, **changes)


FIGURES = (
    "decode, tokens/s: times llama.cpp bf16",
    "first token, 34 words cached: time, llama.cpp bf16 = 1",
    "int4 decode, tokens/s: times llama.cpp q4_k",
)


@pytest.mark.parametrize(
    ("values", "verdicts"),
    [((1.0, 1.25, 0.8), ["PASS"] * 3), ((1.01, 1.26, 0.81), ["SHORT"] * 3)],
)
def test_bounds(values: tuple[float, float, float], verdicts: list[str]) -> None:
    rows = {row.figure: row for row in targets.rows(made_up(*values))}
    assert [rows[figure].verdict for figure in FIGURES] == verdicts
    cold = rows["first token, nothing cached: time, llama.cpp bf16 = 1"]
    assert cold.value == pytest.approx(2 * values[2]) and cold.bound is None


def test_figures_without_their_format_say_how_to_get_them() -> None:
    settings = Settings(llamacpp=("q8_0",))
    rows = {row.figure: row for row in targets.rows(made_up(1, 1, 1, settings=settings))}
    missing = [rows[figure].missing for figure in FIGURES if rows[figure].value is None]
    assert missing == ["--quantize int4"]


def test_other_16_bit_formats_have_their_own_figures() -> None:
    settings = Settings(llamacpp=("f16", "q4_k"))
    figures = [row.figure for row in targets.rows(made_up(1, 1, 1, settings=settings))]
    assert FIGURES[0].replace("bf16", "f16") in figures and FIGURES[0] not in figures
    assert not any(
        "llama.cpp" in row.figure for row in targets.rows(made_up(1, 1, 1, settings=Settings()))
    )


def test_shown_instructions_are_those_of_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    library = SimpleNamespace(
        __version__="2030.1", get_system_info=lambda: "CPU : AVX2 = 1 | AVX512 = 0 | REPACK = 1 | "
    )
    monkeypatch.setattr(llamacpp_peer, "import_xllamacpp", lambda: library)
    assert llamacpp_peer.describe_build() == "xllamacpp 2030.1 with AVX2, REPACK"
