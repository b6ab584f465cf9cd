"""COCO captions: both annotation formats, 50 images, scores of the reference scorers; and lists of
captions as scripts write them."""

import json
import random
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from PIL import Image

from helpers.eval_command import write_json
from helpers.peers import peer
from llava_lite.errors import EvaluationError
from llava_lite.evaluation.suite import Metric
from llava_lite.evaluation.suites.base import QuestionSuite
from llava_lite.evaluation.suites.captions import tokenize
from llava_lite.evaluation.suites.coco import CaptionSuite, open_coco
from llava_lite.evaluation.suites.data_file import open_data_file

PROMPT = "Provide a one-sentence caption for the provided image."
WORDS = "a the man dog cat street red blue riding bike on in with two people's sign, tree".split()


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path)


def sentence(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(3, 12))).capitalize() + "."


def coco_content(count: int, captions: int = 5) -> dict[str, Any]:
    """As COCO's files: ids that are not in order, captions mixed."""
    rng = random.Random(1)
    ids = [1000 - 7 * place for place in range(count)]
    images = [{"id": one, "file_name": f"COCO_val2014_{one:012d}.jpg"} for one in ids]
    annotations = [
        {"id": number, "image_id": one, "caption": sentence(rng)}
        for number, one in enumerate(ids * captions)
    ]
    rng.shuffle(annotations)
    return {"info": {}, "images": images, "annotations": annotations, "licenses": []}


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    """50 images, one of which is not in the folder."""
    content = coco_content(50)
    for image in content["images"][:-1]:
        picture(tmp_path / "val2014" / image["file_name"])
    return content


# ---- COCO's format -----------------------------------------------------------------------------


def test_samples_ask_for_a_caption_of_each_image(tmp_path: Path, content: dict[str, Any]) -> None:
    suite = open_coco([write_json(tmp_path / "captions.json", content)], tmp_path / "val2014")
    samples = suite.samples()
    assert [sample.id for sample in samples] == [str(one["id"]) for one in content["images"]]
    assert {sample.prompt for sample in samples} == {PROMPT}
    first = tmp_path / "val2014" / "COCO_val2014_000000001000.jpg"
    assert samples[0].images == (first,) and samples[0].image_key == first.name
    assert [sample.id for sample in samples if sample.error] == ["657"]
    assert samples[-1].error == (
        f"{tmp_path / 'val2014' / 'COCO_val2014_000000000657.jpg'}: no such image file"
    )
    assert (suite.name, suite.max_new_tokens) == ("coco", 64)
    assert suite.files == [tmp_path / "captions.json"]


def test_scores_are_those_of_the_coco_scorers(tmp_path: Path, content: dict[str, Any]) -> None:
    bleu = peer("pycocoevalcap.bleu.bleu").Bleu(4)
    cider = peer("pycocoevalcap.cider.cider").Cider()
    rouge = peer("pycocoevalcap.rouge.rouge").Rouge()
    suite = open_coco([write_json(tmp_path / "captions.json", content)], tmp_path)
    rng = random.Random(2)
    ids = [str(image["id"]) for image in content["images"]]
    answers = {one: sentence(rng) for one in ids[:-1]}  # the last one failed
    right: dict[str, list[str]] = {one: [] for one in ids}
    for annotation in content["annotations"]:
        right[str(annotation["image_id"])].append(" ".join(tokenize(annotation["caption"])))
    said = {one: [" ".join(tokenize(answers.get(one, "")))] for one in ids}
    scores = suite.score(answers)
    expected = {
        "cider_d": cider.compute_score(right, said)[0],
        **{
            f"bleu_{order}": value
            for order, value in enumerate(bleu.compute_score(right, said, verbose=0)[0], start=1)
        },
        "rouge_l": rouge.compute_score(right, said)[0],
    }
    assert list(scores.metrics) == ["cider_d", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l"]
    for name, metric in scores.metrics.items():
        assert metric.value == pytest.approx(expected[name], abs=1e-12), name
        assert metric.count == 50
    assert 0.01 < scores.metrics["cider_d"].value < 10


def test_scores_by_hand(tmp_path: Path) -> None:
    annotations = [
        {"image_id": 1, "caption": "A cat sits here."},
        {"image_id": 2, "caption": "Two dogs."},
    ]
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}]
    path = write_json(tmp_path / "a.json", {"images": images, "annotations": annotations})
    scores = open_coco([path], tmp_path).score({"1": "a cat sits here", "2": "Two dogs"}).metrics
    # Every n-gram is of one image: all four orders of the first, two of the second are 1.
    assert scores["cider_d"].value == pytest.approx(mean([10.0, 5.0]))
    assert scores["rouge_l"] == Metric(1.0, 2)
    assert scores["bleu_4"].value == pytest.approx(1.0, rel=1e-6)
    failed = open_coco([path], tmp_path).score({"1": "a cat sits here"}).metrics
    assert failed["cider_d"].value == pytest.approx(5.0)
    assert failed["rouge_l"].value == pytest.approx(0.5)


def test_the_settings_warn_of_the_subset(tmp_path: Path, content: dict[str, Any]) -> None:
    suite = open_coco([write_json(tmp_path / "captions.json", content)], tmp_path)
    assert "these 50 images" in suite.settings["idf"]
    assert "ptb-like" in suite.settings["tokenizer"]
    assert suite.settings["prompt"] == PROMPT


def test_images_and_captions_without_each_other_are_left_out(tmp_path: Path) -> None:
    content = coco_content(5)
    content["images"][0]["id"] = 3
    suite = open_coco([write_json(tmp_path / "captions.json", content)], tmp_path)
    assert [sample.id for sample in suite.samples()] == ["993", "986", "979", "972"]
    assert suite.settings["images_without_captions"] == 1
    assert suite.settings["captions_without_image"] == 5
    assert "these 4 images" in suite.settings["idf"]


def test_a_file_without_captions_gives_predictions_only(tmp_path: Path) -> None:
    content = {"images": coco_content(3)["images"]}
    suite = open_coco([write_json(tmp_path / "image_info.json", content)], tmp_path)
    assert len(suite.samples()) == 3
    assert suite.score({"1000": "a cat"}).metrics == {}


def test_export_is_the_coco_result_format(tmp_path: Path) -> None:
    suite = open_coco([write_json(tmp_path / "captions.json", coco_content(2))], tmp_path)
    suite.export({"993": " a café\n"}, tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == [
        {"image_id": 1000, "caption": ""},
        {"image_id": 993, "caption": "a café"},
    ]


# ---- Karpathy's format -------------------------------------------------------------------------


def karpathy_content() -> dict[str, Any]:
    def image(number: int, split: str, **fields: Any) -> dict[str, Any]:
        sentences = [{"tokens": [], "raw": f"caption {number}"}, {"raw": " "}]
        name = f"COCO_val2014_{number:012d}.jpg"
        default = {"filepath": "val2014", "filename": name, "cocoid": number, "imgid": -1}
        return {**default, "sentences": sentences, "split": split, **fields}

    images = [
        *(image(1, "test"), image(2, "val"), image(3, "test"), image(4, "restval")),
        image(5, "train"),
    ]
    return {"images": images, "dataset": "coco"}


@pytest.mark.parametrize(
    ("split", "ids"),
    [(None, ["1", "3"]), ("test", ["1", "3"]), ("val", ["2"]), ("train", ["4", "5"])],
)
def test_karpathy_splits(tmp_path: Path, split: str | None, ids: list[str]) -> None:
    path = write_json(tmp_path / "dataset_coco.json", karpathy_content())
    picture(tmp_path / "val2014" / "COCO_val2014_000000000001.jpg")
    picture(tmp_path / "COCO_val2014_000000000003.jpg")  # right in the folder
    suite = open_coco([path], tmp_path, split)
    samples = suite.samples()
    assert [sample.id for sample in samples] == ids
    assert suite.settings["split"] == (split or "test")
    if "1" in ids:
        assert [sample.error for sample in samples] == [None, None]
        assert samples[0].images[0].parent.name == "val2014"
    assert [image.references for image in suite.entries] == [(f"caption {one}",) for one in ids]


def test_karpathy_takes_imgid_without_cocoid(tmp_path: Path) -> None:
    content = karpathy_content()
    for number, image in enumerate(content["images"]):
        del image["cocoid"], image["filepath"]
        image["imgid"] = number
    suite = open_coco([write_json(tmp_path / "dataset_flickr30k.json", content)], tmp_path)
    assert [sample.id for sample in suite.samples()] == ["0", "2"]


# ---- files that cannot be used -----------------------------------------------------------------

IMAGE = {"id": 1, "file_name": "a.jpg"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([IMAGE], "captions.json: needs a list at 'images'"),
        ({"annotations": []}, "needs a list at 'images'"),
        ({"images": []}, "captions.json: images: holds no items"),
        ({"images": [5]}, "images, item 1: a int, not a JSON object"),
        ({"images": [{"id": 1}]}, "item 1: needs a text in 'file_name'"),
        ({"images": [{"file_name": "a"}]}, "item 1: needs an id in 'id'"),
        ({"images": [IMAGE, IMAGE]}, "item 2: repeats the id '1' of .*item 1"),
        ({"images": [IMAGE], "annotations": [{"caption": "x"}]}, "1: needs an id in 'image_id'"),
        ({"images": [IMAGE], "annotations": [{"image_id": 1}]}, "1: needs a text in 'caption'"),
        ({"images": [IMAGE], "annotations": {"a": 1}}, "needs a list at 'annotations'"),
        ({"images": [{"sentences": 1, "split": "test", "filename": "a", "cocoid": 1}]},
         "item 1: sentences: not a list of objects"),
        ({"images": [{"sentences": [], "filename": "a", "cocoid": 1}]}, "a text in 'split'"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = write_json(tmp_path / "captions.json", content)
    with pytest.raises(EvaluationError, match=message):
        open_coco([path], tmp_path)


def test_unknown_splits_are_refused(tmp_path: Path, content: dict[str, Any]) -> None:
    path = write_json(tmp_path / "dataset_coco.json", karpathy_content())
    with pytest.raises(EvaluationError, match="no split 'dev', only restval, test, train, val"):
        open_coco([path], tmp_path, "dev")
    path = write_json(tmp_path / "captions.json", content)
    with pytest.raises(EvaluationError, match="has no splits to choose 'val' from"):
        open_coco([path], tmp_path, "val")


def test_what_is_not_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"images": [', encoding="utf-8")
    with pytest.raises(EvaluationError, match="a.json: not valid JSON: .*line 1"):
        open_coco([path], tmp_path)
    path.write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(EvaluationError, match="a.json: not valid JSON"):
        open_coco([path], tmp_path)


# ---- data files of scripts ---------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, "data", "samples", "items", "images"])
@pytest.mark.parametrize(
    ("fields", "references"),
    [
        ({"image": "a.png", "captions": ["a cat", "one cat"]}, ("a cat", "one cat")),
        ({"file_name": "a.png", "caption": "a cat"}, ("a cat",)),
        ({"image_path": "a.png", "references": [{"caption": "a cat"}]}, ("a cat",)),
        ({"filename": "a.png", "captions": [{"raw": "a cat "}]}, ("a cat",)),
        ({"image": "a.png"}, ()),
    ],
)
def test_a_list_of_captions(
    tmp_path: Path, key: str | None, fields: dict[str, Any], references: tuple[str, ...]
) -> None:
    picture(tmp_path / "a.png")
    entries = [{**fields, "image_id": 42}, {**fields, "id": 7, "prompt": "Say it."}]
    path = write_json(tmp_path / "coco_val_500.json", {key: entries} if key else entries)
    suite = open_data_file([path])
    assert isinstance(suite, CaptionSuite) and suite.name == "data-file"
    samples = suite.samples()
    assert [(sample.id, sample.prompt) for sample in samples] == [("42", PROMPT), ("7", "Say it.")]
    assert [sample.images for sample in samples] == [(tmp_path / "a.png",)] * 2
    assert [image.references for image in suite.entries] == [references] * 2
    assert bool(suite.score({}).metrics) == bool(references)
    assert suite.settings["prompt"] == f"the file's own, else: {PROMPT}"


def test_entries_without_an_id_are_numbered(tmp_path: Path) -> None:
    entries = [{"image": "a.png", "caption": "x"}, {"image": "b.png", "caption": "y"}]
    path = write_json(tmp_path / "a.json", entries)
    folder = tmp_path / "images"
    picture(folder / "b.png")
    suite = open_data_file([path], folder)
    first, second = suite.samples()
    assert suite.settings["prompt"] == PROMPT
    assert (first.id, first.error) == ("1", f"{folder / 'a.png'}: no such image file")
    assert (second.id, second.images) == ("2", (folder / "b.png",))


def test_a_list_of_questions(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    entries = [
        {"img": "a.png", "question": "How many?", "answer": "two", "id": "q"},
        {"path": "a.png", "instruction": "Which?", "options": ["cat", "dog"], "label": "dog"},
    ]
    suite = open_data_file([write_json(tmp_path / "a.json", entries)])
    assert type(suite) is QuestionSuite and suite.name == "data-file"
    assert [sample.id for sample in suite.samples()] == ["q", "2"]
    assert suite.score({"q": "2", "2": "A"}).metrics["accuracy"] == Metric.share(1, 2)
    assert suite.settings["prompt"] == suite.select({"q"}).settings["prompt"] == "the file's own"


def test_a_coco_file_is_a_data_file(tmp_path: Path, content: dict[str, Any]) -> None:
    path = write_json(tmp_path / "val2014" / "coco_val_500.json", content)
    suite = open_data_file([path])
    assert isinstance(suite, CaptionSuite)
    assert (suite.name, len(suite.samples())) == ("data-file", 50)
    assert sum(sample.error is None for sample in suite.samples()) == 49
    path = write_json(tmp_path / "dataset_coco.json", karpathy_content())
    assert [sample.id for sample in open_data_file([path]).samples()] == ["1", "3"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "a.json: holds no items"),
        ({"a": 1}, "needs a list, or an object with a list at one of 'data', 'samples'"),
        ("text", "a.json: needs a list"),
        (["a.png"], "item 1: a str, not a JSON object"),
        ([{"caption": "x"}], "item 1: has 0 images, must be 1"),
        ([{"image": ["a", "b"], "caption": "x"}], "item 1: has 2 images, must be 1"),
        ([{"image": "a", "caption": 5}], "item 1: the captions must be texts"),
        ([{"image": "a", "caption": ""}], "item 1: the captions must be texts"),
        ([{"image": "a", "caption": "x"}, {"image": "a", "question": "q", "answer": "x"}],
         r"has captions \(.*item 1\) and answers \(.*item 2\)"),
        ([{"image": "a", "answer": "x"}], "item 1: needs a text in 'prompt' or 'question'"),
        ([{"image": "a", "caption": "x", "id": 1}, {"image": "a", "caption": "y", "id": 1}],
         "item 2: repeats the id '1'"),
        ([{"image": {"a": 1}, "caption": "x"}], "'image' must be a text or a list of texts"),
    ],
)  # fmt: skip
def test_a_bad_data_file_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        open_data_file([write_json(tmp_path / "a.json", content)])


def test_a_part_says_how_many_images_its_idf_is_from(tmp_path: Path) -> None:
    suite = open_coco([write_json(tmp_path / "captions.json", coco_content(4))], tmp_path)
    part = suite.select({sample.id for sample in suite.samples()[:3]})
    assert "these 4 images" in suite.settings["idf"] and "these 3 images" in part.settings["idf"]


def test_questions_about_one_image_have_ids_of_their_own(tmp_path: Path) -> None:
    rows = [
        {"question_id": n, "image_id": 7, "image": "7.jpg", "question": "?", "answer": "x"}
        for n in (1, 2)
    ]
    suite = open_data_file([write_json(tmp_path / "list.json", rows)])
    assert [sample.id for sample in suite.samples()] == ["1", "2"]
