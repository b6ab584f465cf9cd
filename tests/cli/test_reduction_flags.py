"""Token reduction on the command line: what the flags mean, what is refused, what is printed."""

import argparse
import json
from pathlib import Path

import pytest

import llava_lite
from helpers.models import ROOT
from llava_lite.cli import reduction as reduction_flags
from llava_lite.cli.program import main
from llava_lite.generation.sampling import GenerationOptions
from llava_lite.reduction import REDUCTIONS, DToMe, FastV, Reduction, ToMe

SCENE = str(ROOT / "weights" / "tiny" / "examples" / "scene.png")
QUESTION = ("-i", SCENE, "-p", "What shape is the red object?", "--quiet")


def parsed(*argv: str) -> Reduction | None:
    parser = argparse.ArgumentParser()
    reduction_flags.add_reduction_arguments(parser)
    return reduction_flags.build_reduction(parser.parse_args(argv))


def folded(fastv: FastV, merge: ToMe | None = None) -> Reduction:
    return Reduction(merge, "folded", fastv)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", None),
        ("--reduction none", Reduction()),
        ("--reduction hybrid-72-36", REDUCTIONS["hybrid-72-36"]),
        ("--merge none", Reduction()),
        ("--merge tome:72", Reduction(ToMe(keep=72))),
        ("--merge tome:72 --positions logical", REDUCTIONS["tome-72-logical"]),
        ("--merge tome:r=21", Reduction(ToMe(r=21))),
        ("--merge tome:r=8,reverse_linear", Reduction(ToMe(r=8, schedule="reverse_linear"))),
        ("--merge dtome", Reduction(DToMe())),
        ("--fastv-k 0.5", REDUCTIONS["fastv-50"]),
        ("--fastv-k 36 --fastv-layer 2", Reduction(fastv=FastV(keep=36, layer=2))),
        ("--fastv-k none", Reduction()),
        # A flag replaces its part of the preset.
        ("--reduction tome-72-logical --fastv-k 36", REDUCTIONS["hybrid-72-36"]),
        ("--reduction hybrid-72-36 --fastv-k off", REDUCTIONS["tome-72-logical"]),
        ("--reduction hybrid-72-36 --positions vtu", REDUCTIONS["hybrid-vtu-72-36"]),
        ("--reduction hybrid-72-36 --merge none", Reduction(None, "logical", FastV(keep=36))),
        ("--reduction fastv-50 --fastv-layer 2", Reduction(fastv=FastV(drop=0.5, layer=2))),
        # Folding.
        ("--merge tome:72 --positions folded", REDUCTIONS["folded-72"]),
        (
            "--positions folded --fastv-k 72 --fastv-rest fold",
            REDUCTIONS["fastv-72-folded"],
        ),
        # The score of a merged token follows the rest, unless it is named.
        (
            "--reduction hybrid-72-36 --positions folded --fastv-rest fold",
            REDUCTIONS["folded-72-36"],
        ),
        ("--reduction folded-72-36 --fastv-rest drop", folded(FastV(keep=36), ToMe(72))),
        ("--reduction fastv-72-folded --fastv-rest drop", folded(FastV(keep=72))),
        ("--reduction folded-72-36 --fastv-k none", REDUCTIONS["folded-72"]),
        # An amount over a preset's FastV leaves all else of it.
        ("--reduction folded-72-36 --fastv-k 18", folded(FastV(keep=18, rest="fold"), ToMe(72))),
        (
            "--reduction folded-144-72 --fastv-k 0.9",
            folded(FastV(drop=0.9, layer=1, rest="fold"), ToMe(144)),
        ),
        ("--reduction folded-72-36-18 --fastv-k 9", folded(FastV(keep=9, rest="fold"), ToMe(72))),
        ("--reduction folded-72-36 --fastv-stages 1:36,3:18", REDUCTIONS["folded-72-36-18"]),
        (
            "--reduction folded-144-72 --fastv-stages 2:9",
            folded(FastV(stages=((2, 9),), rest="fold"), ToMe(144)),
        ),
        # Stages.
        ("--fastv-stages 1:144,3:72", Reduction(fastv=FastV(stages=((1, 144), (3, 72))))),
        ("--fastv-stages 2:0.5,3:.25", Reduction(fastv=FastV(stages=((2, 0.5), (3, 0.25))))),
        ("--fastv-stages 1:144,3:0.5", Reduction(fastv=FastV(stages=((1, 144), (3, 0.5))))),
        (
            "--positions folded --fastv-stages 1:9 --fastv-rest fold",
            folded(FastV(stages=((1, 9),), rest="fold")),
        ),
    ],
)
def test_flags(flags: str, expected: Reduction | None) -> None:
    assert parsed(*flags.split()) == expected


def test_an_amount_over_a_preset_still_counts_for_each_image() -> None:
    """No preset does that yet."""
    preset = FastV(keep=9, per_image=True)
    found = reduction_flags.parse_fastv("4", None, None, None, preset, "--fastv-k")
    assert found == FastV(keep=4, per_image=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--reduction tome-73", "unknown reduction 'tome-73'; there are none, folded-72"),
        ("--merge 72", "--merge '72' is none of these: none, tome:72"),
        ("--merge tome:", "--merge 'tome:' is none"),
        ("--merge tome:0", "ToMe keep 0 must be a whole number of at least 1"),
        ("--merge tome:r=8,zigzag", "schedule 'zigzag' is not one of constant, linear"),
        ("--positions here", "positions 'here' is not one of vtu, folded, logical, plain"),
        ("--fastv-k 1.5", "--fastv-k '1.5' must be a whole number"),
        ("--fastv-k -3", "--fastv-k '-3' must be"),
        ("--fastv-k nan", "--fastv-k 'nan' must be"),
        ("--fastv-k 36 --fastv-layer 0", "FastV layer 0 must be a whole number of at least 1"),
        ("--fastv-layer 2", "--fastv-layer needs --fastv-k or a preset that prunes"),
        ("--merge tome:72 --thresholds x.json", "--thresholds goes with --merge dtome"),
        ("--fastv-k 4 --fastv-rest fold", "rest 'fold' needs positions 'folded', not 'vtu'"),
        *(
            (
                f"--reduction folded-72-36 --positions {positions}",
                f"FastV rest 'fold' needs positions 'folded', not '{positions}'",
            )
            for positions in ("vtu", "logical", "plain")
        ),
        ("--fastv-k 4 --fastv-rest keep", "FastV rest 'keep' is not one of drop, fold"),
        (
            "--fastv-rest fold",
            "--fastv-rest needs --fastv-k, --fastv-stages or a preset that prunes",
        ),
        (
            "--reduction folded-72 --fastv-rest fold",
            "--fastv-rest needs --fastv-k, --fastv-stages or a preset",
        ),
        ("--reduction folded-72-36 --fastv-k off --fastv-rest fold", "--fastv-rest needs"),
        ("--fastv-stages 1:9 --fastv-k 4", "--fastv-stages and --fastv-k both say how many"),
        ("--fastv-stages 1:9 --fastv-layer 2", "--fastv-layer does not go with stages"),
        ("--reduction folded-72-36-18 --fastv-layer 2", "--fastv-layer does not go with stages"),
        *(
            (
                f"--fastv-stages={text}",
                f"--fastv-stages {text!r} must be layers with their amounts, such as 1:144,3:72",
            )
            for text in (
                "",
                "1-144",
                "144",
                "1:144,",
                "1:144;3:72",
                "1:-4",
                "1:1e3",
                "x:9",
                "1:9:3",
            )
        ),
        ("--fastv-stages 0:9", "the layer of a FastV stage 0 must be a whole number of at least 1"),
        ("--fastv-stages 1:0", "the amount of a FastV stage 0 must be a whole number of at least"),
        ("--fastv-stages 1:1.5", "the amount of a FastV stage 1.5 must be a number above 0 and be"),
        ("--fastv-stages 3:9,1:4", "each layer must be above the one before, not [3, 1]"),
        ("--fastv-stages 1:9,1:4", "each layer must be above the one before, not [1, 1]"),
        (
            "--fastv-stages 1:9,3:9",
            "each number of tokens must be below the one before, not [9, 9]",
        ),
    ],
)
def test_wrong_flags_say_what_is_right(flags: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parsed(*flags.split())
    assert message in str(caught.value)


def test_thresholds_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("[0.9, 0.8]")
    for flags in (("--merge", "dtome"), ()):
        found = parsed(*flags, "--thresholds", str(tmp_path / "t.json"), "--fastv-k", "4")
        assert found == Reduction(DToMe((0.9, 0.8)), "vtu", FastV(keep=4))
    with pytest.raises(llava_lite.CheckpointError, match=r"missing\.json"):
        parsed("--thresholds", str(tmp_path / "missing.json"))


@pytest.mark.parametrize(
    ("value", "flags", "expected"),
    [
        ("36", "", Reduction(fastv=FastV(keep=36))),
        ("0.7", "--merge tome:72", Reduction(ToMe(keep=72), fastv=FastV(drop=0.7))),
        ("36", "--fastv-layer 2", Reduction(fastv=FastV(keep=36, layer=2))),
        ("none", "", Reduction()),
        ("", "", None),
        # The flag of the same meaning goes before it, and both before a preset.
        ("36", "--fastv-k 4", Reduction(fastv=FastV(keep=4))),
        ("36", "--reduction tome-72-logical", REDUCTIONS["hybrid-72-36"]),
        ("18", "--reduction hybrid-72-36", Reduction(ToMe(72), "logical", FastV(18))),
        ("none", "--reduction hybrid-72-36", REDUCTIONS["tome-72-logical"]),
        ("", "--reduction hybrid-72-36", REDUCTIONS["hybrid-72-36"]),
        ("36", "--reduction none", Reduction(fastv=FastV(keep=36))),
        ("18", "--reduction folded-72-36", folded(FastV(keep=18, rest="fold"), ToMe(72))),
        ("36", "--fastv-stages 1:9", Reduction(fastv=FastV(stages=((1, 9),)))),
        ("none", "--fastv-stages 1:9", Reduction(fastv=FastV(stages=((1, 9),)))),
        ("9", "--positions folded --fastv-rest fold", folded(FastV(keep=9, rest="fold"))),
    ],
)
def test_fastv_k_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, value: str, flags: str, expected: Reduction | None
) -> None:
    monkeypatch.setenv("FASTV_K", value)
    assert parsed(*flags.split()) == expected


def test_a_bad_fastv_k_names_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTV_K", "1.5")
    assert main(["generate", *QUESTION]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.splitlines()[-1]
    assert "error: FASTV_K '1.5' must be a whole number of tokens to keep" in last


def test_options_take_names_and_reductions() -> None:
    assert GenerationOptions(reduction="tome-72").reduction == REDUCTIONS["tome-72"]
    with pytest.raises(ValueError, match="unknown reduction 'tome-73'"):
        GenerationOptions(reduction="tome-73")


# ---- the program -------------------------------------------------------------------------------


def test_generate_shows_the_tokens_of_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--reduction", "hybrid-72-36", "--json", "--trace", "--stats"]
    assert main(["generate", *QUESTION, *flags]) == 0
    captured = capsys.readouterr()
    answer = json.loads(captured.out)
    assert answer["text"] == "ring"
    counts = [answer["usage"][n] for n in ("image_patches", "image_tokens", "kept_image_tokens")]
    assert counts == [576, 72, 36]
    [image] = answer["trace"]["images"]
    assert (len(image["groups"]), len(image["sizes"]), len(image["kept"])) == (576, 72, 36)
    assert "prompt + 576 -> 72 -> 36 image tokens: 1 new" in captured.err


@pytest.mark.parametrize(
    "name",
    ["folded-144-36", "fastv-72-folded", "tome-72", "dymu-72", "fastv-50", "hybrid-vtu-72-36"],
)
def test_every_preset_answers(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", *QUESTION, "--reduction", name]) == 0
    assert capsys.readouterr().out == "ring\n"


@pytest.mark.parametrize("flags", ["--fastv-k 900", "--fastv-stages 1:900,2:800"])
def test_an_amount_above_what_is_there_prunes_nothing(
    flags: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fold = ["--positions", "folded", "--fastv-rest", "fold", "--json", "--trace"]
    assert main(["generate", *QUESTION, *flags.split(), *fold]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["usage"]["kept_image_tokens"] == 576
    assert answer["trace"]["prune_layers"] == []
    assert answer["trace"]["decoder_flops"]["gated"]["ratio"] == 1


def test_without_a_reduction_nothing_of_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", *QUESTION, "--json", "--stats"]) == 0
    captured = capsys.readouterr()
    assert "trace" not in json.loads(captured.out)
    assert "prompt + 576 image tokens: 1 new" in captured.err


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--trace",), 2, "--trace is part of the object that --json prints"),
        (("--merge", "tome:900"), 1, "ToMe keep 900 must be in 9..576"),
        (("--fastv-k", "4", "--fastv-layer", "6"), 1, "FastV layer 6 must be in 1..5"),
        (("--fastv-stages", "1:9,6:4"), 1, "FastV layer 6 must be in 1..5"),
        (("--fastv-stages", "1-144"), 2, "--fastv-stages '1-144' must be layers with"),
        (("--fastv-k", "4", "--fastv-rest", "fold"), 2, "FastV rest 'fold' needs positions"),
        (("--reduction", "best"), 2, "unknown reduction 'best'"),
        (("--reduction", ""), 2, "unknown reduction ''"),
        (("--fastv-layer", "2"), 2, "--fastv-layer needs --fastv-k"),
        (("--merge", "tome:72", "--thresholds", "x.json"), 2, "--thresholds goes with"),
    ],
)
def test_refused(
    flags: tuple[str, ...], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", *QUESTION, *flags]) == code
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err
    assert "Traceback" not in captured.err


def test_chat_prunes_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("What shape is the red object?\n/stats\n"))
    assert main(["chat", "-i", SCENE, "--quiet", "--reduction", "hybrid-72-36"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "ring\n"
    assert "576 -> 72 -> 36 image tokens" in captured.err


def test_batch_notes_the_reduction_and_resumes_only_with_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": n, "image": SCENE, "prompt": "What shape is the red object?"} for n in range(3)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["batch", str(tmp_path / "q.jsonl"), "-o", str(tmp_path / "a.jsonl"), "--quiet"]
    assert main([*command, "--merge", "tome:72", "--positions", "logical", "--fastv-k", "36"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [line["reduction"] for line in lines] == ["hybrid-72-36"] * 3
    assert [line["usage"]["kept_image_tokens"] for line in lines] == [36] * 3
    before = (tmp_path / "a.jsonl").read_bytes()
    for flags in ([], ["--reduction", "tome-72"], ["--fastv-k", "36"]):
        assert main([*command, "--resume", *flags]) == 1
        assert "was asked with another reduction" in capsys.readouterr().err
    assert main([*command, "--resume", "--reduction", "hybrid-72-36"]) == 0
    assert (tmp_path / "a.jsonl").read_bytes() == before


def test_info_lists_the_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--presets"]) == 0
    text = capsys.readouterr().out
    for name in REDUCTIONS:
        assert f"\n{name} " in text
    assert main(["info", "--presets", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["reductions"]["hybrid-72-36"]["fastv"]["keep"] == 36
    assert set(content["reductions"]) == set(REDUCTIONS)


def test_thresholds_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "t.json"
    folder = str(Path(SCENE).parent)
    assert main(["thresholds", folder, "-o", str(output), "--keep", "100", "--quiet"]) == 0
    assert len(json.loads(output.read_text())["thresholds"]) == 6
    flags = ["--thresholds", str(output), "--json"]
    assert main(["generate", *QUESTION, *flags]) == 0
    usage = json.loads(capsys.readouterr().out)["usage"]
    assert 1 <= usage["image_tokens"] < 576
