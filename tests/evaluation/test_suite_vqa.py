"""Short answers: the normaliser, VQA accuracy, and the files of VQAv2, TextVQA, GQA and LLaVA."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from helpers.eval_command import write_json
from llava_lite.errors import EvaluationError
from llava_lite.evaluation.engine import select_shard
from llava_lite.evaluation.suite import Metric
from llava_lite.evaluation.suites.short_answers import exact_match, normalize_answer, vqa_accuracy
from llava_lite.evaluation.suites.vqa import VqaSuite, open_vqa

SHORT = "Answer the question using a single word or phrase."


def picture(path: Path) -> Path:
    Image.new("RGB", (8, 8)).save(path)
    return path


# ---- normalizing -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("Yes.", "yes"), (" The  Dog ", "dog"), ("two dogs, a cat", "2 dogs cat"),
        ("none", "0"), ("ten", "10"), ("an apple", "apple"), ("dont know", "don't know"),
        ("it's", "it's"), ("its", "its"), ("wouldntve", "wouldn't've"),
        ("wouldn'tve", "wouldn't've"), ("Isnt", "isn't"), ("well", "well"),
        ("1,000", "1000"), ("1,000-2", "10002"),  # a number with a comma: every mark goes
        ("3.5", "3.5"), (".5", ".5"), ("5.", "5"), ("a.m.", "am"), ("p.m", "pm"),
        ("red/blue", "red blue"), ("red / blue", "red blue"), ("t-shirt", "t shirt"),
        ("black-and-white (mostly)", "black and white mostly"),
        ("t-shirt - x-ray", "tshirt xray"),  # one next to a space: all of them go
        ("yes!", "yes"), ("what?!", "what"), ('"stop"', "stop"),
        ("new\nyork\tcity", "new york city"),
        ("a", ""), ("", ""), ("10:30", "10:30"), ("100%", "100%"), ("O'Clock", "o'clock"),
    ],
)  # fmt: skip
def test_normalising(answer: str, normal: str) -> None:
    assert normalize_answer(answer) == normal


WORDS = st.sampled_from(
    "the a dog Dont wouldn'tve two none 1,000 3.5 x-y , . - / ? ' .. ;. 5. .5 (b) none".split()
)


@given(st.one_of(st.text(), st.lists(WORDS).map(" ".join), st.lists(WORDS).map("".join)))
def test_normalising_twice_changes_nothing(answer: str) -> None:
    normal = normalize_answer(answer)
    assert normalize_answer(normal) == normal
    assert normal == " ".join(normal.split())


@pytest.mark.parametrize(("agreeing", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1)])
def test_vqa_accuracy_by_hand(agreeing: int, expected: float) -> None:
    # n of 10 agree: leaving one of them out (n times) gives (n-1)/3, else (10-n times) n/3.
    references = ["two"] * agreeing + [f"other {number}" for number in range(10 - agreeing)]
    assert vqa_accuracy("2.", references) == pytest.approx(expected)


@given(st.lists(st.sampled_from("abc"), min_size=10, max_size=10), st.sampled_from("bcd"))
def test_vqa_accuracy_is_the_mean_over_all_nine_of_ten(references: list[str], answer: str) -> None:
    accuracies = [min(nine.count(answer) / 3, 1) for nine in combinations(references, 9)]
    assert vqa_accuracy(answer, references) == pytest.approx(sum(accuracies) / 10)


def test_exact_match() -> None:
    assert exact_match("The dog.", ["cat", "dog"])
    assert not exact_match("dogs", ["cat", "dog"])
    assert exact_match("a", ["A"]) and not exact_match("the", ["A"])  # nothing left of either
    assert not exact_match("", ["A"])


# ---- VQAv2 -------------------------------------------------------------------------------------

QUESTIONS = {
    "data_subtype": "val2014",
    "questions": [
        {"question_id": 42000, "image_id": 42, "question": "How many dogs?"},
        {"question_id": 42001, "image_id": 42, "question": "Is it red?"},
        {"question_id": 7000, "image_id": 7, "question": "What is it?"},
        {"question_id": 8000, "image_id": 8, "question": "Where?"},
    ],
}


def annotation(question_id: int, answers: list[str], kind: str, answer_type: str) -> dict[str, Any]:
    return {
        "question_id": question_id, "question_type": kind, "answer_type": answer_type,
        "answers": [{"answer": text, "answer_id": n} for n, text in enumerate(answers, start=1)],
    }  # fmt: skip


ANNOTATIONS = {
    "annotations": [
        annotation(42000, ["2"] * 2 + ["two"] + ["3"] * 7, "how many", "number"),
        annotation(42001, ["yes"] * 10, "is it", "yes/no"),
        annotation(7000, ["dog"] * 1 + ["cat"] * 9, "what is", "other"),
        annotation(8000, ["park"] * 10, "where", "other"),
        annotation(9999, ["of another subset"] * 10, "where", "other"),
    ]
}


@pytest.fixture
def vqa(tmp_path: Path) -> VqaSuite:
    picture(tmp_path / "COCO_val2014_000000000042.jpg")
    picture(tmp_path / "7.jpg")
    questions = write_json(tmp_path / "questions.json", QUESTIONS)
    return open_vqa([questions, write_json(tmp_path / "annotations.json", ANNOTATIONS)], tmp_path)


def test_vqa_samples(vqa: VqaSuite, tmp_path: Path) -> None:
    samples = vqa.samples()
    assert [sample.id for sample in samples] == ["42000", "42001", "7000", "8000"]
    assert samples[0].prompt == f"How many dogs?\n{SHORT}"
    assert samples[0].images == (tmp_path / "COCO_val2014_000000000042.jpg",)
    assert samples[0].image_key == samples[1].image_key != samples[2].image_key
    assert samples[2].images == (tmp_path / "7.jpg",)
    missing = tmp_path / "COCO_val2014_000000000008.jpg"
    assert samples[3].error == f"{missing}: no such image file"
    assert (vqa.name, vqa.max_new_tokens) == ("vqa", 128)


def test_vqa_scores_by_hand(vqa: VqaSuite) -> None:
    scores = vqa.score({"42000": "Two", "42001": "Yes.", "7000": "a dog"})
    # 3 of 10 agree: 0.9; all: 1; one: 0.3; none.
    assert scores.metrics["accuracy"].value == pytest.approx(2.2 / 4)
    assert scores.metrics["accuracy"].count == 4
    kinds = scores.groups["accuracy by question_type"]
    assert {kind: round(metric.value, 9) for kind, metric in kinds.items()} == {
        "how many": 0.9, "is it": 1.0, "what is": 0.3, "where": 0.0,
    }  # fmt: skip
    kinds = scores.groups["accuracy by answer_type"]
    assert {kind: round(metric.value, 9) for kind, metric in kinds.items()} == {
        "number": 0.9, "other": 0.15, "yes/no": 1.0,
    }  # fmt: skip
    assert vqa.settings["scoring"] == "VQA accuracy of 10 answers"


def test_the_order_of_the_files_does_not_matter(vqa: VqaSuite, tmp_path: Path) -> None:
    files = [tmp_path / "annotations.json", tmp_path / "questions.json"]
    suite = open_vqa(files, tmp_path)
    assert suite.entries == vqa.entries and suite.files == files


def test_vqa_export(vqa: VqaSuite, tmp_path: Path) -> None:
    vqa.export({"42000": "The Two.", "8000": "park"}, tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == [
        {"question_id": 42000, "answer": "2"},
        {"question_id": 42001, "answer": ""},
        {"question_id": 7000, "answer": ""},
        {"question_id": 8000, "answer": "park"},
    ]


def test_questions_alone_give_predictions_only(tmp_path: Path) -> None:
    suite = open_vqa([write_json(tmp_path / "q.json", QUESTIONS)], tmp_path)
    assert suite.score({"42000": "2"}).metrics == {}
    assert (suite.settings["scoring"], suite.settings["without_reference"]) == ("none", 4)


@pytest.mark.parametrize(
    ("subtype", "name"),
    [
        ("test2015", "COCO_test2015_000000000042.jpg"),
        ("test-dev2015", "COCO_test2015_000000000042.jpg"),
        ("val2014", "000000000042.jpg"),
        ("val2014", "42.jpg"),
        ("val2014", "42.png"),
    ],
)
def test_names_of_images(tmp_path: Path, subtype: str, name: str) -> None:
    path = picture(tmp_path / name)
    content = {"data_subtype": subtype, "questions": QUESTIONS["questions"][:1]}
    [sample] = open_vqa([write_json(tmp_path / "q.json", content)], tmp_path).samples()
    assert sample.images == (path,)


# ---- TextVQA, GQA, LLaVA -----------------------------------------------------------------------


def text_vqa(**fields: Any) -> dict[str, Any]:
    entry = {
        "question_id": 34602, "image_id": "003a8ae2ef43b901", "question": "What brand?",
        "answers": ["dakota"] * 9 + ["sony"], **fields,
    }  # fmt: skip
    return {"dataset_type": "val", "data": [entry]}


def test_text_vqa_with_and_without_its_tokens(tmp_path: Path) -> None:
    picture(tmp_path / "003a8ae2ef43b901.jpg")
    path = write_json(tmp_path / "TextVQA_val.json", text_vqa(ocr_tokens=["DAKOTA", "DIGITAL"]))
    suite = open_vqa([path], tmp_path)
    [sample] = suite.samples()
    assert sample.prompt == f"What brand?\n{SHORT}" and sample.error is None
    assert suite.score({"34602": "Dakota"}).metrics["accuracy"].value == 1.0
    [sample] = open_vqa([path], tmp_path, ocr=True).samples()
    assert sample.prompt == f"What brand?\nReference OCR token: DAKOTA, DIGITAL\n{SHORT}"
    assert open_vqa([path], tmp_path, ocr=True).settings["ocr"] is True


def test_text_vqa_tokens_of_a_second_file(tmp_path: Path) -> None:
    path = write_json(tmp_path / "TextVQA_val.json", text_vqa())
    tokens = {"data": [{"image_id": "003a8ae2ef43b901", "ocr_tokens": ["DAKOTA"]}]}
    both = [path, write_json(tmp_path / "ocr.json", tokens)]
    [sample] = open_vqa(both, tmp_path, ocr=True).samples()
    assert sample.prompt == f"What brand?\nReference OCR token: DAKOTA\n{SHORT}"
    with pytest.raises(EvaluationError, match="TextVQA_val.json: no question has OCR tokens"):
        open_vqa([path], tmp_path, ocr=True)


def test_vizwiz_goes_by_its_images(tmp_path: Path) -> None:
    picture(tmp_path / "VizWiz_val_0.jpg")
    answers = [{"answer": "unanswerable"}] * 8 + [{"answer": "basil"}] * 2
    entry = {"image": "VizWiz_val_0.jpg", "question": "What is it?", "answers": answers}
    path = write_json(tmp_path / "val.json", [{**entry, "answer_type": "unanswerable"}])
    suite = open_vqa([path], tmp_path)
    [sample] = suite.samples()
    assert (sample.id, sample.error) == ("VizWiz_val_0.jpg", None)
    said = {"VizWiz_val_0.jpg": "Basil."}
    assert suite.score(said).metrics["accuracy"].value == pytest.approx(0.6)
    assert list(suite.score(said).groups["accuracy by answer_type"]) == ["unanswerable"]
    suite.export(said, tmp_path / "out.json")
    exported = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert exported == [{"image": "VizWiz_val_0.jpg", "answer": "basil"}]


def test_gqa_is_scored_by_equality(tmp_path: Path) -> None:
    picture(tmp_path / "n1.jpg")

    def entry(answer: str, semantic: str) -> dict[str, Any]:
        types = {"structural": "query", "semantic": semantic, "detailed": "x"}
        return {"imageId": "n1", "question": "What is it?", "answer": answer, "types": types}

    content = {"201": entry("dog", "obj"), "202": entry("red", "attr"), "203": entry("no", "attr")}
    suite = open_vqa([write_json(tmp_path / "testdev_balanced_questions.json", content)], tmp_path)
    assert [sample.images for sample in suite.samples()] == [(tmp_path / "n1.jpg",)] * 3
    scores = suite.score({"201": "A dog.", "202": "dark red"})
    assert scores.metrics["accuracy"] == Metric.share(1, 3)
    assert scores.groups["accuracy by semantic"] == {
        "attr": Metric.share(0, 2),
        "obj": Metric.share(1, 1),
    }
    assert scores.groups["accuracy by structural"] == {"query": Metric.share(1, 3)}
    said = "equality after normalising"  # codespell:ignore normalising
    assert suite.settings["scoring"] == said


def test_lines_of_llava_with_annotations(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    text = f"How many dogs?\n{SHORT}"
    line = {"question_id": 42000, "image": "a.jpg", "text": text, "category": "default"}
    path = tmp_path / "llava_vqav2.jsonl"
    path.write_text(json.dumps(line) + "\n", encoding="utf-8")
    files = [path, write_json(tmp_path / "annotations.json", ANNOTATIONS)]
    suite = open_vqa(files, tmp_path)
    [sample] = suite.samples()
    assert (sample.prompt, sample.images) == (text, (tmp_path / "a.jpg",))
    assert suite.score({"42000": "3"}).metrics["accuracy"].value == 1.0


# ---- files that cannot be used -----------------------------------------------------------------

QUESTION = {"question_id": 1, "image_id": 1, "question": "What?"}


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ([QUESTIONS, QUESTIONS], "2 of these hold questions, must be 1"),
        ([ANNOTATIONS], "0 of these hold questions, must be 1"),
        ([{}], "0.json: holds no items"),
        ([{"questions": []}], "0.json: questions: holds no items"),
        ([{"questions": [QUESTION, QUESTION]}], "item 2: repeats the id '1'"),
        ([{"questions": [{"question_id": 1, "image_id": 1}]}], "1: needs a text in 'question'"),
        ([{"questions": [{"question_id": 1, "question": "?"}]}], "1: needs an id in 'image_id'"),
        ([{"data": [{**QUESTION, "answers": ["a", "b"]}]}], "item 1: has 2 answers; VQA accuracy"),
        ([{"data": [{**QUESTION, "answers": [1]}]}], "item 1: the answers must be texts"),
        ([{"data": [{**QUESTION, "ocr_tokens": "x"}]}], "'ocr_tokens' must be a list of texts"),
        ([{"data": 5}], "needs a list at 'data'"),
        ([[{"image_id": 1, "question": "?"}]], "item 1: needs an id in 'question_id' or 'image'"),
        ([{"1": "x"}], "question 1: a str, not a JSON object"),
        (["x"], "0.json: needs a list"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused(tmp_path: Path, contents: list[Any], message: str) -> None:
    files = [write_json(tmp_path / f"{n}.json", content) for n, content in enumerate(contents)]
    with pytest.raises(EvaluationError, match=message):
        open_vqa(files, tmp_path)


def test_questions_about_a_missing_image_stay_together(tmp_path: Path) -> None:
    rows = [{"question_id": n, "image_id": n // 2, "question": "?"} for n in range(4)]
    file = write_json(tmp_path / "q.json", {"questions": rows})
    first, other = (open_vqa([file], tmp_path).samples() for _ in range(2))
    assert [sample.error is None for sample in first] == [False] * 4
    assert [[s.id for s in select_shard(first, (part, 2))] for part in (1, 2)] == [
        *(["0", "1"], ["2", "3"])
    ]
    assert first == other


def test_a_part_has_settings_of_its_own(tmp_path: Path) -> None:
    rows = [{"question_id": 1, "image_id": 1, "question": "?", "answers": ["x"]}]
    rows.append({"question_id": 2, "image_id": 1, "question": "?", "answers": []})
    suite = open_vqa([write_json(tmp_path / "q.json", {"data": rows})], tmp_path)
    assert suite.settings["without_reference"] == 1 and suite.settings["ocr"] is False
    assert "without_reference" not in suite.select({"1"}).settings
    assert suite.select({"2"}).settings["scoring"] == "none"


def test_lines_that_share_an_id_are_told_apart(tmp_path: Path) -> None:
    """As in LLaVA's file of TextVQA, whose question ids are those of images."""
    rows = [{"question_id": name, "image": "a.jpg", "text": "?"} for name in ("a", "b", "a", "a")]
    file = tmp_path / "q.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite = open_vqa([file], tmp_path)
    assert [sample.id for sample in suite.samples()] == ["a", "b", "a/2", "a/3"]
    suite.export({"a/2": "Two"}, tmp_path / "out.json")
    results = json.loads((tmp_path / "out.json").read_text())
    assert [result["question_id"] for result in results] == ["a", "b", "a", "a"]
    assert results[2]["answer"] == "2"
    annotations = {"annotations": [{"question_id": "a", "answers": [{"answer": "x"}]}]}
    with pytest.raises(EvaluationError, match="line 3: repeats the id 'a'"):
        open_vqa([file, write_json(tmp_path / "a.json", annotations)], tmp_path)
