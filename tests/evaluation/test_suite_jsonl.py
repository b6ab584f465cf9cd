"""Questions of one's own, and the table of all suites."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from helpers.eval_command import write_lines
from llava_lite.errors import EvaluationError, LlavaLiteError
from llava_lite.evaluation.engine import select_shard
from llava_lite.evaluation.suite import Metric, Suite
from llava_lite.evaluation.suites.images import ImageFolder
from llava_lite.evaluation.suites.own_data import open_jsonl
from llava_lite.evaluation.suites.registry import SUITES, Exporting, open_suite

LETTER = "Answer with the option's letter from the given choices directly."
PIXEL = "data:image/png;base64,AAAA"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    return tmp_path


@pytest.fixture
def file(folder: Path) -> Path:
    choices = ["cat", "dog", "cow"]
    return write_lines(
        folder / "own.jsonl",
        {"image": "a.png", "question": "How many?", "answer": "two", "category": "count"},
        {"id": "pick", "images": ["a.png", "b.png"], "text": "Which?", "choices": choices,
         "answer": "dog", "category": "pick"},
        {"id": 7, "prompt": "Say.", "answers": ["yes"] * 2 + ["no"] * 8},
        {"question": "Who?", "image": "http://example.org/x.jpg"},
        {"question": "Who?", "image": PIXEL, "answers": ["me", "I"]},
        {"question": "Who?", "image": ["a.png", "none.png"], "answer": 3},
    )  # fmt: skip


def test_samples(file: Path, folder: Path) -> None:
    suite = open_jsonl([file])
    samples = suite.samples()
    assert [sample.id for sample in samples] == ["1", "pick", "7", "4", "5", "6"]
    assert samples[0].prompt == "How many?"
    assert samples[0].images == (folder / "a.png",)
    assert samples[0].image_key == "a.png"
    assert samples[1].prompt == f"Which?\nA. cat\nB. dog\nC. cow\n{LETTER}"
    assert samples[1].images == (folder / "a.png", folder / "b.png")
    assert samples[1].image_key == "a.png\nb.png"
    assert (samples[2].images, samples[2].image_key) == ((), None)
    assert samples[3].images == ("http://example.org/x.jpg",)
    assert samples[4].images == (PIXEL,)
    assert samples[5].error == f"{folder / 'none.png'}: no such image file"
    assert (suite.name, suite.files, suite.max_new_tokens) == ("jsonl", [file], 128)
    assert suite.settings == {"short_answer": False, "without_reference": 1}


def test_scores_by_hand(file: Path) -> None:
    scores = open_jsonl([file]).score({"1": "2.", "pick": "A dog", "7": "Yes", "4": "x", "5": "i"})
    # exact, choice by text, 2 of 10 agreeing, unscored, exact, failed.
    assert scores.metrics["accuracy"].value == pytest.approx((1 + 1 + 0.6 + 1 + 0) / 5)
    assert scores.metrics["accuracy"].count == 5
    by_scoring = scores.groups["accuracy by scoring"]
    assert by_scoring["choice"] == Metric.share(1, 1)
    assert by_scoring["exact"] == Metric.share(2, 3)
    assert by_scoring["vqa"].value == pytest.approx(0.6)
    assert scores.groups["accuracy by category"] == {
        "count": Metric.share(1, 1),
        "pick": Metric.share(1, 1),
    }


@pytest.mark.parametrize("answer", ["B", "dog", 1, ["B"], ["dog", "C"]])
def test_the_right_choice_is_a_letter_a_text_or_an_index(folder: Path, answer: Any) -> None:
    line = {"question": "Which?", "choices": ["cat", "dog", "cow"], "answer": answer}
    suite = open_jsonl([write_lines(folder / "a.jsonl", line)])
    assert suite.score({"1": "B"}).metrics["accuracy"].value == 1
    assert suite.score({"1": "A"}).metrics["accuracy"].value == 0
    assert suite.score({"1": "unclear"}).metrics["accuracy"].value == 0


def test_a_short_answer_can_be_asked_for(file: Path) -> None:
    prompts = [sample.prompt for sample in open_jsonl([file], short_answer=True).samples()]
    short = "Answer the question using a single word or phrase."
    assert prompts[0] == f"How many?\n{short}"
    assert prompts[1].endswith(LETTER)


def test_without_answers_there_are_predictions_only(folder: Path) -> None:
    suite = open_jsonl([write_lines(folder / "a.jsonl", {"question": "?", "image": "a.png"})])
    assert suite.score({"1": "x"}).metrics == {}


def test_images_may_lie_elsewhere(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("rows")
    path = write_lines(elsewhere / "a.jsonl", {"question": "?", "image": "a.png"})
    assert open_jsonl([path]).samples()[0].error
    assert open_jsonl([path], folder).samples()[0].images == (folder / "a.png",)


CHOICE = {"question": "?", "choices": ["cat", "dog"]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"image": "a.png"}, "line 1: needs a text in 'question' or 'prompt' or 'text'"),
        ({"question": "?", "id": 1.5}, "line 1: needs an id in 'id' or 'question_id'"),
        (
            {"question": "?", "image": 5.5, "answer": {}},
            "line 1: 'answer' must be a text or a list",
        ),
        ({"question": "?", "image": [None]}, "line 1: 'image' must be a text or a list of texts"),
        ({"question": "?", "answers": [""]}, "line 1: 'answers' must be a text or a list of texts"),
        ({**CHOICE, "answer": "C"}, "line 1: the answer 'C' is none of the choices"),
        ({**CHOICE, "answer": 2}, "line 1: the answer 2 is none of the choices"),
        ({**CHOICE, "answer": -1}, "line 1: the answer -1 is none of the choices"),
        ({**CHOICE, "answer": True}, "line 1: the answer True is none of the choices"),
        ({"question": "?", "choices": ["x"]}, "line 1: has 1 choices, must be 2 to 26"),
        ({"question": "?", "choices": ["x"] * 27}, "line 1: has 27 choices, must be 2 to 26"),
    ],
)
def test_a_bad_row_of_the_file_is_refused(folder: Path, line: dict[str, Any], message: str) -> None:
    with pytest.raises(EvaluationError, match=f"a.jsonl, {message}"):
        open_jsonl([write_lines(folder / "a.jsonl", line)])


def test_repeated_ids_are_refused(folder: Path) -> None:
    path = write_lines(folder / "a.jsonl", {"question": "?"}, {"id": "1", "question": "?"})
    with pytest.raises(EvaluationError, match="line 2: repeats the id '1' of .*line 1"):
        open_jsonl([path])


# ---- by name -----------------------------------------------------------------------------------


@pytest.fixture
def paths(folder: Path) -> dict[str, list[Path]]:
    """Files of every suite."""
    image = {"image": "a.png"}
    pope = {**image, "question_id": 1, "text": "?", "label": "no"}
    vqa = {"1": {"imageId": "a", "question": "?", "answer": "x"}}
    turns = [{"from": "human", "value": "?"}]
    problems = {"1": {"choices": ["x"], "answer": 0}}
    files: dict[str, Any] = {
        "coco.json": {"images": [{"id": 1, "file_name": "a.png"}]},
        "vqa.json": vqa,
        "science.json": [{"id": "1", "conversations": turns}],
        "problems.json": problems,
        "data.json": [{**image, "caption": "x"}],
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    columns, cells = ("index", "image", "question", "A", "B"), ("1", "2", "?", "x", "y")
    table = "\n".join("\t".join(row) for row in (columns, cells))
    (folder / "bench.tsv").write_text(table, encoding="utf-8")
    return {
        "mmbench": [folder / "bench.tsv"],
        "coco": [folder, folder / "coco.json"],
        "pope": [
            write_lines(folder / "random.jsonl", pope),
            write_lines(folder / "b.jsonl", pope),
            folder,
        ],
        "vqa": [folder / "vqa.json", folder],
        "scienceqa": [folder / "science.json", folder / "problems.json"],
        "jsonl": [write_lines(folder / "own.jsonl", {**image, "question": "?"})],
        "data-file": [folder / "data.json"],
    }


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_opens_by_its_name(paths: dict[str, list[Path]], name: str) -> None:
    suite: Suite = open_suite(name, paths[name], **dict.fromkeys(SUITES[name].options))
    assert suite.name == name
    assert list(suite.files) == [path for path in paths[name] if path.is_file()]
    samples = suite.samples()
    assert samples and suite.max_new_tokens > 0
    answers = {sample.id: "yes" for sample in samples}
    assert suite.score(answers).metrics.keys() == suite.score({}).metrics.keys()
    json.dumps(dict(suite.settings))
    in_reverse = open_suite(name, [str(path) for path in reversed(paths[name])])  # type: ignore[misc]
    assert {sample.id for sample in in_reverse.samples()} == {sample.id for sample in samples}
    if isinstance(suite, Exporting):
        out = paths[name][0].parent / "exported"
        suite.export(answers, out)
        assert "yes" in out.read_text(encoding="utf-8")


def test_which_suites_export(paths: dict[str, list[Path]]) -> None:
    exporting = {name for name in SUITES if isinstance(open_suite(name, paths[name]), Exporting)}
    assert exporting == {"mmbench", "coco", "vqa", "data-file"}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mmbench", {"language": "cn", "circular": True}),
        ("mmbench", {"language": "en"}),
        ("jsonl", {"short_answer": True}),
    ],
)
def test_options_reach_the_suite(
    paths: dict[str, list[Path]], name: str, options: dict[str, Any]
) -> None:
    suite = open_suite(name, paths[name], **options)
    for option in set(options) - {"circular"}:
        assert suite.settings[option] == options[option]
    if options.get("circular"):
        assert suite.settings["rotations"].startswith("made here")


def test_what_does_not_fit_is_refused(paths: dict[str, list[Path]], folder: Path) -> None:
    bench, coco = paths["mmbench"][0], folder / "coco.json"
    for name, given, options, message in [
        ("mmlu", [bench], {}, "unknown suite 'mmlu', known are mmbench, coco, pope"),
        ("mmbench", [bench], {"split": "x", "ocr": 1}, "mmbench takes no option ocr, split"),
        ("mmbench", [bench, folder], {}, "mmbench takes FILE.tsv, got 1 files and 1 folders"),
        ("coco", [folder, coco], {"split": "val"}, "has no splits to choose 'val' from"),
        ("vqa", [folder, folder / "vqa.json"], {"ocr": True}, "no question has OCR tokens"),
        ("mmbench", [], {}, "got 0 files and 0 folders"),
        ("mmbench", [bench, coco], {}, "got 2 files and 0 folders"),
        ("coco", [coco], {}, "coco takes IMAGES_FOLDER ANNOTATIONS.json, got 1 files and 0"),
        ("coco", [folder, folder, coco], {}, "got 1 files and 2 folders"),
        ("scienceqa", [coco], {}, "scienceqa takes QUESTIONS.json PROBLEMS.json"),
        ("pope", [coco, coco, folder], {}, "pope: a file is given twice"),
        ("coco", [folder / "none", coco], {}, "none: no such file or folder"),
    ]:
        with pytest.raises(LlavaLiteError, match=message.replace("[", r"\[")):
            open_suite(name, given, **options)


def test_suites_need_neither_torch_nor_pillow() -> None:
    from helpers.processes import run_python

    code = "import sys; import llava_lite.evaluation.suites.registry; print(*sorted(sys.modules))"
    modules = {name.split(".")[0] for name in run_python(code).stdout.split()}
    assert "llava_lite" in modules
    assert not modules & {"torch", "PIL", "numpy", "pandas", "pycocoevalcap"}


def test_shards_do_not_depend_on_which_images_are_there(folder: Path) -> None:
    """A report is made on a machine that need not have the images."""
    names = [["none.png"], ["none.png"], ["b.png"], ["a.png", "none.png"]]
    rows = [{"image": name, "question": f"{n}?"} for n, name in enumerate(names)]
    suite = open_jsonl([write_lines(folder / "more.jsonl", *rows)])
    here = [[s.id for s in select_shard(suite.samples(), (part, 2))] for part in (1, 2)]
    assert here == [["1", "2", "4"], ["3"]]
    assert [sample.error is None for sample in suite.samples()].count(True) == 1
    elsewhere = open_jsonl([folder / "more.jsonl"], folder / "nowhere")
    there = [[s.id for s in select_shard(elsewhere.samples(), (part, 2))] for part in (1, 2)]
    assert there == here


def test_half_a_character_costs_no_run(tmp_path: Path) -> None:
    path = tmp_path / "half.jsonl"
    path.write_text(
        '{"id": "x\\ud83d", "question": "bad \\ud83d", "choices": ["\\uDE00", "b"]}\n'
        '{"question": "good \\ud83d\\ude00"}\n'
    )
    first, other = open_jsonl([path]).samples()
    assert (first.id, first.prompt.split("\n")[:2]) == ("x\ufffd", ["bad \ufffd", "A. \ufffd"])
    assert other.prompt == "good \U0001f600"


def test_a_number_that_is_a_choice_is_meant(tmp_path: Path) -> None:
    numbers = {"question": "How many?", "choices": [1, 2, 3]}
    rows = [{**numbers, "answer": answer} for answer in (1, 3, 0, "2")]
    rows.append({"question": "Which?", "choices": ["a cat", "a dog"], "answer": 1})
    suite = open_jsonl([write_lines(tmp_path / "own.jsonl", *rows)])
    assert [one.references for one in suite.entries] == [("A",), ("C",), ("A",), ("B",), ("B",)]


def test_only_own_data_may_name_urls(tmp_path: Path) -> None:
    """A published data set never makes this machine open a URL."""
    url = "http://example.org/x.jpg"
    [own] = ImageFolder(tmp_path, urls=True).sample("1", "?", (url,)).images
    assert own == url
    sample = ImageFolder(tmp_path).sample("1", "?", (url,))
    assert sample.images == (tmp_path / url,)
    assert sample.error == f"{tmp_path / url}: no such image file"


def test_the_first_missing_image_is_named(tmp_path: Path) -> None:
    sample = ImageFolder(tmp_path).sample("1", "?", ("a.png",), ("b.png",))
    assert sample.error == f"{tmp_path / 'a.png'}: no such image file"
