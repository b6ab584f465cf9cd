"""`llava-lite eval` as its users type it: data sets, shards, interruptions, wrong usage."""

import io
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import llava_lite
from helpers.pictures import picture
from helpers.processes import Fork, start_program
from llava_lite.cli import console
from llava_lite.cli import program as cli
from llava_lite.cli.eval import with_command
from llava_lite.evaluation import engine
from llava_lite.evaluation.predictions import PredictionsWriter
from llava_lite.evaluation.runner import Selection
from llava_lite.evaluation.suite import Sample
from llava_lite.generation.model import Model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def questions(tmp_path: Path, tiny_model: Model) -> Path:
    """Three images with three questions each, of which the model answers those about the first two
    as expected; the file of the last image is broken."""
    rows = []
    for number in range(3):
        image = tmp_path / f"{number}.png"
        picture(number).save(image)
        for word in ("star", "red", "circle"):
            text = f"What {word}?"
            answer = tiny_model.generate(image, text, max_new_tokens=4) if number < 2 else "x"
            rows.append({"image": image.name, "question": text, "answers": [answer]})
    (tmp_path / "2.png").write_bytes(b"broken")
    return write_rows(tmp_path / "own.jsonl", rows)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_eval(*words: Any, model: Path | None = None) -> int:
    chosen = ("-m", model, "--threads", 1, "-n", 4, "--quiet") if model else ()
    return cli.main(["eval", *map(str, (*words, *chosen))])


def report_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return content


def without_measures(content: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name not in ("measured", "runs")}


# ---- a data set ----------------------------------------------------------------------------------


def test_a_data_set_in_one_command(
    questions: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Six right, and three whose image is broken: exit code 1, and everything is written."""
    assert (
        run_eval("jsonl", questions, "-o", tmp_path / "run", model=model_folder) == console.FAILED
    )
    out, err = capsys.readouterr()
    assert err == ""
    content = report_of(tmp_path / "run")
    assert content["scores"]["accuracy"]["value"] == pytest.approx(6 / 9)
    counts = {"total": 9, "asked": 9, "answered": 6, "failed": 3, "cut_off": 6}
    assert content["samples"] == counts
    [failure] = content["failures"]
    assert failure["count"] == 3 and "2.png: not an image" in failure["reason"]
    assert content["measured"]["images"] == 3
    assert content["tokens"]["image_tokens"] == 16
    settings = content["settings"]
    assert (settings["suite"], settings["model"], settings["dtype"]) == (
        "jsonl",
        "random",
        "float32",
    )
    assert len(settings["model_hash"]) == len(settings["files"][0]["sha256"]) == 64
    assert f"{'accuracy':<32}{'66.7%':>9}" in out and "6 answered, 3 failed" in out
    assert "66.7%" in (tmp_path / "run" / "report.html").read_text()


def test_json_is_the_report(
    questions: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("-o", tmp_path / "run", "--json", "--limit", 4, "--report-file", tmp_path / "r.json")
    assert run_eval("jsonl", questions, *words, model=model_folder) == console.OK
    content = json.loads(capsys.readouterr().out)
    assert content == report_of(tmp_path / "run") == json.loads((tmp_path / "r.json").read_text())
    assert content["scores"]["accuracy"]["value"] == 1.0
    assert content["scores"]["accuracy"]["count"] == content["samples"]["asked"] == 4


def test_batches_workers_and_reductions_arrive(
    questions: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    init = engine.Engine.__init__

    def spy(self: Any, model: Model, options: Any, batch_size: int, workers: int) -> None:
        seen.update(options=options, batch_size=batch_size, workers=workers, model=model)
        init(self, model, options, batch_size, workers)

    monkeypatch.setattr(engine.Engine, "__init__", spy)
    words = ("--batch-size", 3, "--workers", 0, "--merge", "tome:6", "--no-pad", "--no-exif")
    more = ("--template", "plain", "--stop", ".", "--dtype", "bf16", "--limit", 2)
    run_eval("jsonl", questions, "-o", tmp_path / "run", *words, *more, model=model_folder)
    assert (seen["batch_size"], seen["workers"]) == (3, 0)
    content = report_of(tmp_path / "run")
    settings, names = content["settings"], ("pad", "exif", "template", "stop", "dtype")
    assert [settings[name] for name in names] == [False, False, "plain", ["."], "bfloat16"]
    assert "keep=6" in settings["reduction"]
    assert content["tokens"]["image_tokens"] == 6


def test_the_official_number_of_new_tokens_is_the_default(
    model_folder: Path, tmp_path: Path
) -> None:
    file = write_rows(tmp_path / "own.jsonl", [{"question": "star?", "answers": ["x"]}])
    words = ("jsonl", file, "-o", tmp_path / "run", "-m", model_folder, "--quiet")
    assert run_eval(*words) == console.OK
    assert report_of(tmp_path / "run")["settings"]["max_new_tokens"] == 128


def test_the_arguments_of_other_evaluations(
    questions: Path, model_folder: Path, tmp_path: Path
) -> None:
    """--data-file FILE --report-file FILE; predictions lie beside the report."""
    rows = [json.loads(line) for line in questions.read_text().splitlines()[:2]]
    file = tmp_path / "list.json"
    file.write_text(json.dumps(rows))
    words = ("--max_new_tokens", 4, "--data-file", file, "--report-file", tmp_path / "out.json")
    more = ("--quiet", "-m", model_folder)
    assert run_eval(*words, *more) == console.OK
    content = json.loads((tmp_path / "out.json").read_text())
    assert (content["suite"], content["samples"]["answered"]) == ("data-file", 2)
    assert content["settings"]["max_new_tokens"] == 4
    assert content["settings"]["suite_settings"]["prompt"] == "the file's own"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("predictions.jsonl", "report.json", "report.html")
    }


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (["eval", "-n", "4", "--data-file", "a"], ["eval", "data-file", "a", "-n", "4"]),
        (["eval", "--data-file=a=b", "--json"], ["eval", "data-file", "a=b", "--json"]),
        (["eval", "scenes", "--json"], ["eval", "scenes", "--json"]),
        (["eval", "--data-file"], ["eval", "--data-file"]),
        (["info", "--data-file", "a"], ["info", "--data-file", "a"]),
        ([], []),
    ],
)
def test_data_file_is_a_command_too(argv: list[str], meant: list[str]) -> None:
    assert with_command(argv) == meant


# ---- going on ------------------------------------------------------------------------------------


def test_reuse_asks_only_what_is_missing(
    questions: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clean, parts = tmp_path / "clean", tmp_path / "parts"
    run_eval("jsonl", questions, "-o", clean, model=model_folder)
    run_eval("jsonl", questions, "-o", parts, "--limit", 5, model=model_folder)
    run_eval("jsonl", questions, "-o", parts, "--reuse", model=model_folder)
    assert without_measures(report_of(parts)) == without_measures(report_of(clean))
    assert [run["samples"] for run in report_of(parts)["runs"]] == [5, 4]
    capsys.readouterr()
    before = (parts / "predictions.jsonl").read_bytes()
    assert run_eval("jsonl", questions, "-o", parts, model=model_folder) == console.FAILED
    assert "already exists (use --reuse to resume" in capsys.readouterr().err
    words = ("--reuse", "--merge", "tome:6")
    assert run_eval("jsonl", questions, "-o", parts, *words, model=model_folder) == console.FAILED
    err = capsys.readouterr().err
    assert "was answered with other settings: reduction none, now Reduction(merge=ToMe" in err
    assert err.count("\n") == 1
    assert (parts / "predictions.jsonl").read_bytes() == before
    run_eval("jsonl", questions, "-o", parts, "--force", "--limit", 2, model=model_folder)
    assert report_of(parts)["samples"]["asked"] == 2


def test_what_failed_is_asked_again_on_request(
    questions: Path, model_folder: Path, tmp_path: Path
) -> None:
    run_eval("jsonl", questions, "-o", tmp_path / "run", model=model_folder)
    picture(2).save(tmp_path / "2.png")
    words = ("jsonl", questions, "-o", tmp_path / "run", "--reuse")
    assert run_eval(*words, model=model_folder) == console.FAILED
    assert run_eval(*words, "--retry-errors", model=model_folder) == console.OK
    content = report_of(tmp_path / "run")
    assert content["samples"]["failed"] == 0
    assert [run["samples"] for run in content["runs"]] == [9, 0, 3]


def test_shards_become_one_report(
    questions: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clean = tmp_path / "clean"
    run_eval("jsonl", questions, "-o", clean, model=model_folder)
    shards = [tmp_path / f"shard-{part}" for part in (1, 2)]
    for part, folder in enumerate(shards, start=1):
        run_eval("jsonl", questions, "-o", folder, "--shard", f"{part}/2", model=model_folder)
    assert [report_of(folder)["samples"]["asked"] for folder in shards] == [6, 3]
    assert run_eval("report", *shards, "-o", tmp_path / "all") == console.FAILED  # the broken image
    assert without_measures(report_of(tmp_path / "all")) == without_measures(report_of(clean))
    assert report_of(tmp_path / "all")["measured"]["images"] == 3
    assert (tmp_path / "all" / "report.html").exists()
    capsys.readouterr()
    assert run_eval("report", shards[1], "--json") == console.OK
    assert json.loads(capsys.readouterr().out) == report_of(shards[1])


def test_a_report_of_moved_files(
    questions: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_eval("jsonl", questions, "-o", tmp_path / "run", model=model_folder)
    moved = questions.rename(tmp_path / "moved.jsonl")
    assert run_eval("report", tmp_path / "run") == console.FAILED
    assert "own.jsonl: no such file" in capsys.readouterr().err
    assert run_eval("report", tmp_path / "run", "--files", moved, "--json") == console.FAILED
    assert json.loads(capsys.readouterr().out)["samples"]["answered"] == 6
    moved.write_text(moved.read_text() + "\n")
    assert run_eval("report", tmp_path / "run", "--files", moved) == console.FAILED
    said = "differs from the file that the questions were asked from, own.jsonl"
    assert capsys.readouterr().err == f"error: {moved} {said}\n"


def test_answers_in_the_format_of_the_server(model_folder: Path, tmp_path: Path) -> None:
    annotations = {
        "images": [{"id": 7, "file_name": "7.png"}],
        "annotations": [{"image_id": 7, "caption": "a red star"}],
    }
    (tmp_path / "captions.json").write_text(json.dumps(annotations))
    (tmp_path / "images").mkdir()
    picture(7).save(tmp_path / "images" / "7.png")
    words = ("coco", tmp_path / "images", tmp_path / "captions.json", "-o", tmp_path / "run")
    export = tmp_path / "results.json"
    assert run_eval(*words, "--export", export, model=model_folder) == console.OK
    [result] = json.loads(export.read_text())
    assert result["image_id"] == 7 and result["caption"]
    export.unlink()
    assert run_eval("report", tmp_path / "run", "--export", export) == console.OK
    assert json.loads(export.read_text()) == [result]
    assert "cider_d" in report_of(tmp_path / "run")["scores"]


# ---- interruptions and progress ------------------------------------------------------------------


def many_questions(tmp_path: Path) -> Path:
    rows = [{"question": f"star {n}?", "answers": ["x"], "image": "0.png"} for n in range(400)]
    picture(0).save(tmp_path / "0.png")
    return write_rows(tmp_path / "many.jsonl", rows)


def wait_for_lines(path: Path, process: Fork, count: int) -> None:
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None
        time.sleep(0.005)


def test_ctrl_c_keeps_everything_and_says_how_to_go_on(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, folder = many_questions(tmp_path), tmp_path / "run"
    words = ("jsonl", file, "-o", folder, "-m", model_folder, "-n", 40, "--batch-size", 1)
    process = start_program("eval", *words, "--threads", 1)
    predictions = folder / "predictions.jsonl"
    wait_for_lines(predictions, process, 6)
    assert run_eval(*words, "--limit", 1, "--reuse") == console.FAILED
    assert capsys.readouterr().err == f"error: {predictions}: another run is writing to it\n"
    process.send_signal(signal.SIGINT)
    out, err = process.stdout.read(), process.stderr.read()
    assert process.wait() == console.INTERRUPTED
    said = err.splitlines()
    assert said[-2:] == [
        f"{folder} keeps all answers so far; resume with --reuse",
        "interrupted",
    ]
    assert out == "" and "|" not in err  # no bar where there is no terminal
    lines = predictions.read_bytes().splitlines()
    assert 6 <= len(lines) < 402
    assert all(json.loads(line) for line in lines)


class Terminal(io.StringIO):
    """Text that claims to be printed at a terminal."""

    def isatty(self) -> bool:
        return True


def test_progress_shows_on_a_terminal_only(
    questions: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("jsonl", questions, "-o", tmp_path / "run", "-m", model_folder, "-n", 4)
    for terminal, more in ((Terminal(), ()), (io.StringIO(), ("--force",))):
        monkeypatch.setattr(sys, "stderr", terminal)
        run_eval(*words, *more)
        assert ("9/9" in terminal.getvalue()) == terminal.isatty()
        assert ("failed=3" in terminal.getvalue()) == terminal.isatty()


# ---- wrong usage ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "the following arguments are required"),
        (("tasting", "a"), "invalid choice: 'tasting'"),
        (("jsonl", "a.jsonl"), "a folder for predictions and report is needed: -o DIR"),
        (("jsonl", "a", "--report-file", "noend"), "a folder for predictions is needed: -o DIR"),
        (("jsonl", "-o", "d"), "the following arguments are required: PATH"),
        (("jsonl", "a", "-o", "d", "--retry-errors"), "--retry-errors needs --reuse"),
        (("jsonl", "a", "-o", "d", "--reuse", "--force"), "--reuse resumes with the predictions"),
        (("jsonl", "a", "-o", "d", "--limit", "0"), "not a number of at least 1"),
        (("jsonl", "a", "-o", "d", "--workers", "-1"), "not a number of at least 0"),
        (("jsonl", "a", "-o", "d", "--shard", "3/2"), "is not I/N"),
        (("jsonl", "a", "-o", "d", "--reduction", "half"), "unknown reduction 'half'"),
        (("jsonl", "a", "-o", "d", "--flavor", "x"), "unrecognized arguments: --flavor x"),
        (("mmbench", "a", "-o", "d", "--language", "fr"), "invalid choice: 'fr'"),
        (("coco", ".", "-o", "d"), "coco takes IMAGES_FOLDER ANNOTATIONS.json, got 0 files"),
        (("report",), "the following arguments are required: DIR"),
    ],
)
def test_wrong_usage(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_eval(*words) == console.WRONG_USAGE
    err = capsys.readouterr().err
    assert message in err
    assert sum("error:" in line for line in err.splitlines()) == 1


def test_a_data_set_without_a_format_for_answers(
    questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("jsonl", questions, "-o", tmp_path / "run", "--export", tmp_path / "x")
    assert run_eval(*words) == console.WRONG_USAGE
    assert "--export: jsonl has no format for answers" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("jsonl", "none.jsonl", "-o", "run"), "none.jsonl: no such file"),
        (("report", "nowhere"), "nowhere/predictions.jsonl: cannot be read: No such file"),
    ],
)
def test_missing_files_are_one_line(
    words: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_eval(*words) == console.FAILED
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_reduction_that_the_model_cannot_do_writes_nothing(
    questions: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("jsonl", questions, "-o", tmp_path / "run", "--fastv-k", "4", "--fastv-layer", "9")
    assert run_eval(*words, model=model_folder) == console.FAILED
    assert capsys.readouterr().err == "error: FastV layer 9 must be in 1..2\n"
    assert not (tmp_path / "run").exists()


def test_help_lists_the_data_sets(capsys: pytest.CaptureFixture[str]) -> None:
    names = ("mmbench", "coco", "pope", "vqa", "scienceqa", "jsonl", "data-file")
    assert run_eval("--help") == console.OK
    words = capsys.readouterr().out.split()
    assert {*names, "scenes", "report"} <= set(words)
    for name in names:
        assert run_eval(name, "--help") == console.OK
        out = " ".join(capsys.readouterr().out.split())
        assert f"usage: llava-lite eval {name} " in out and "default: what the data set" in out


def test_a_selection_takes_the_first_then_its_share() -> None:
    # The first nine are about images 0 to 4; of these the second shard of two has 1 and 3.
    samples = [Sample(f"{n % 5}-{n // 5}", "?", (n % 5,), str(n % 5)) for n in range(12)]
    chosen = Selection(9, (2, 2)).of(samples)
    assert [sample.id for sample in chosen] == ["1-0", "3-0", "1-1", "3-1"]
    assert Selection(2).of(samples) == samples[:2]
    assert Selection().of(samples) == samples


def test_a_selection_comes_back_from_json() -> None:
    assert Selection.read({}) == Selection()
    assert Selection.read({"limit": 3, "shard": [2, 4]}) == Selection(3, (2, 4))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-o", "file/run"), "file/run: "),
        (("-o", "file"), "file: "),
        (("-o", "run", "--report-file", "none/r.json"), "r.json: the folder "),
        (("-o", "run", "--report-file", "."), "is a folder, the output must be a file"),
    ],
)
def test_what_cannot_be_written_shows_before_the_model_is_loaded(
    words: tuple[str, ...],
    message: str,
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert run_eval("jsonl", questions, *words, model=tmp_path / "no model") == console.FAILED
    err = capsys.readouterr().err
    assert message in err and "no model" not in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "predictions.jsonl already exists (use --reuse"),
        (("--reuse", "--merge", "tome:6"), "was answered with other settings: reduction none, now"),
        (("--reuse", "-n", 5), "was answered with other settings: max_new_tokens 4, now 5"),
    ],
)
def test_predictions_that_stay_refuse_before_the_model_is_loaded(
    words: tuple[Any, ...],
    message: str,
    questions: Path,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    run_eval("jsonl", questions, "-o", folder, "--limit", 1, model=model_folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    capsys.readouterr()
    monkeypatch.setattr(llava_lite, "load", None)
    length = () if "-n" in words else ("-n", 4)
    assert run_eval("jsonl", questions, "-o", folder, *words, *length, "--quiet") == console.FAILED
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_run_that_is_writing_refuses_before_the_model_is_loaded(
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(llava_lite, "load", None)
    path = tmp_path / "run" / "predictions.jsonl"
    with PredictionsWriter(path) as writer:
        writer.begin({}, {})
        for flag in ("--reuse", "--force"):
            assert run_eval("jsonl", questions, "-o", tmp_path / "run", flag) == console.FAILED
            assert capsys.readouterr().err == f"error: {path}: another run is writing to it\n"


def test_where_a_report_cannot_be_written_shows_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report_file = tmp_path / "none" / "r.json"
    words = ("report", tmp_path / "nowhere", "-o", tmp_path, "--report-file", report_file)
    assert run_eval(*words) == console.FAILED
    assert "none does not exist" in capsys.readouterr().err


def test_other_images_are_other_settings(
    questions: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_eval("jsonl", questions, "-o", tmp_path / "run", "--limit", 1, model=model_folder)
    assert report_of(tmp_path / "run")["settings"]["images"] == "."
    (tmp_path / "others").mkdir()
    words = ("jsonl", questions, tmp_path / "others", "-o", tmp_path / "run", "--reuse")
    capsys.readouterr()
    assert run_eval(*words, model=model_folder) == console.FAILED
    assert "other settings: images ., now others" in capsys.readouterr().err
