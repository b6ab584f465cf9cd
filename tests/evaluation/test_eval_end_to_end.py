"""`llava-lite eval` from the files of a data set to its report.

Every number of a report is worked out again from the predictions file: by hand, or by slow code
that shares nothing with the package's. A random model is seldom right, so each data set is scored
a second time with answers written into its predictions file, which --reuse then goes on with."""

import csv
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from helpers.coco_files import (
    COCO_BROKEN,
    WORDS,
    coco_name,
    drawn_references,
    karpathy_file,
    plain_file,
    sentence,
    words_in,
    words_of,
)
from helpers.eval_command import (
    NEW_TOKENS,
    Share,
    check_groups,
    check_rest,
    check_share,
    check_shares,
    command,
    draw,
    write_json,
    write_lines,
)
from helpers.mmbench_rows import MILLION, broken_base64, encoded, png, rotated, row
from helpers.mmbench_rows import write as write_mmbench
from helpers.peers import peer
from llava_lite.evaluation.suites import captions
from llava_lite.generation.model import Model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
CAPTION = "Provide a one-sentence caption for the provided image."


def says(model: Model, image: Path | bytes | None, prompt: str) -> str:
    """What the model answers to one question by itself."""
    return model.generate(image, prompt, max_new_tokens=NEW_TOKENS)


# ---- MMBench -------------------------------------------------------------------------------------


@pytest.fixture
def mmbench_file(tmp_path: Path) -> Path:
    """20 rows: 241 and 252 in four rotations, 301 in three, 300 and 401 in two, five alone."""
    color = {"category": "color", "l2-category": "perception"}
    logic = {"category": "logic", "l2-category": "reasoning"}
    animal = {"category": "animal", "l2-category": "perception"}
    colors = row(
        241,
        question="What color is the star?",
        options=("red", "green", "blue", "yellow"),
        answer="B",
        **color,
    )
    hinted = row(252, hint="It grows in the south.", answer="D", image="241", **color)
    yes_no = row(300, options=("yes", "no"), answer="B", image=encoded("green"), **logic)
    chinese = row(
        301,
        question="星星是什么颜色？",
        options=("红色", "绿色", "蓝色"),
        D="nan",
        answer="C",
        image="1000300",
        **logic,
    )
    broken = row(401, options=("yes", "no"), answer="A", image=broken_base64(), **logic)
    return write_mmbench(
        tmp_path / "MMBench_DEV.tsv",
        [
            *rotated(colors, 4),
            *rotated(hinted, 4),
            *rotated(yes_no, 2),
            *rotated(chinese, 3),
            row(
                400,
                question="图中是什么动物？",
                options=("猫", "狗"),
                image=encoded("blue"),
                **animal,
            ),
            *rotated(broken, 2),
            row(500, image=encoded("purple"), **animal),
            row(501, answer="C", image="500", **animal),
            row(502, answer="B", **color),
            row(503, answer="D", image=encoded("white"), **logic),
        ],
    )


# What is answered to each row, the letter that means (worked out by hand), and the right one.
MMBENCH_ANSWERS: dict[str, tuple[str, str | None, str]] = {
    "241": ("B", "B", "B"),
    "1000241": ("green", "A", "A"),  # green, blue, yellow, red
    "2000241": ("The answer is D.", "D", "D"),  # blue, yellow, red, green
    "3000241": ("C. green", "C", "C"),  # yellow, red, green, blue
    "252": (" D\n", "D", "D"),
    "1000252": ("(C)", "C", "C"),
    "2000252": ("A or B", None, "B"),  # two letters
    "3000252": ("A fig, I think", "A", "A"),  # fig, apple, pear, plum
    "300": ("Yes, it is.", "A", "B"),
    "1000300": ("no", "A", "A"),  # no, yes
    "301": ("答案是C。", "C", "C"),
    "1000301": ("蓝色", "B", "B"),  # green, blue, red
    "2000301": ("A", "A", "A"),  # blue, red, green
    "400": ("这是一只猫", "A", "A"),
    "500": ("I cannot tell.", None, "A"),
    "501": ("c", None, "C"),  # no capital
    "502": ("B is what I would say after looking at it", None, "B"),  # too far from the end
    "503": ("E D", "D", "D"),  # there is no option E
}


def lone_words(text: str) -> list[str]:
    """Runs of Latin letters, digits and the marks inside of words, or of other letters."""
    words: list[str] = []
    before = ""
    for character in text:
        latin = character.isascii() and character.isalnum() or character in "_'’-"
        kind = "latin" if latin else "other" if character.isalnum() else ""
        if kind and kind == before:
            words[-1] += character
        elif kind:
            words.append(character)
        before = kind
    return words


def option_in(said: str, option: str) -> bool:
    """Whether the option's words stand in what was said, not inside of a Latin word."""
    for start in range(len(said) - len(option) + 1):
        around = said[:start][-1:] + said[start + len(option) :][:1]
        inside = any(c.isascii() and c.isalnum() for c in around)
        if said[start : start + len(option)] == option and not inside:
            return True
    return False


def letter_by_text(answer: str, options: Sequence[str]) -> str | None:
    said = " ".join(lone_words(answer.casefold()))
    texts = [" ".join(lone_words(option.casefold())) for option in options]
    equal = [letter for letter, text in zip("ABCD", texts, strict=False) if text == said]
    inside = [letter for letter, text in zip("ABCD", texts, strict=False) if option_in(said, text)]
    if len(equal) == 1:
        return equal[0]
    return inside[0] if len(inside) == 1 else None


def meant_letter(answer: str, options: Sequence[str]) -> str | None:
    """The rules that the documentation of letter extraction names, one after the other."""
    words = lone_words(answer)
    letters = sorted({word for word in words if word in list("ABCD"[: len(options)])})
    by_text = letter_by_text(answer, options)
    if len(letters) == 2 and letters[0] == "A":  # "B. A cat": a label, then an article
        first, *rest = answer.split()
        labels = {f"{opening}{letters[1]}{mark}" for opening in ("", "(") for mark in ".):"}
        if first in labels and rest[0] == "A" and rest[1][:1] in "abcdefghijklmnopqrstuvwxyz":
            return letters[1]
    if len(letters) != 1:
        return by_text
    if letters == ["A"] and words[-1] != "A":
        return by_text or ("A" if len(words) <= 3 else None)
    return letters[0] if letters[0] in words[-5:] else by_text


def mmbench_letters(file: Path, answers: Mapping[str, str]) -> dict[str, str | None]:
    """The letter that each answer means."""
    letters = {}
    for cells in table_of(file):
        options = [cells[name] for name in "ABCD" if cells[name] not in ("", "nan")]
        if cells["index"] in answers:
            letters[cells["index"]] = meant_letter(answers[cells["index"]], options)
    return letters


def table_of(file: Path) -> list[dict[str, str]]:
    with open(file, encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened, delimiter="\t"))


def mmbench_shares(
    file: Path, letters: Mapping[str, str | None]
) -> tuple[dict[str, Share], dict[str, dict[str, Share]]]:
    """Circular and vanilla accuracy of all questions, and by both categories."""
    table = table_of(file)
    right = {int(cells["index"]): letters.get(cells["index"]) == cells["answer"] for cells in table}
    bases = [cells for cells in table if int(cells["index"]) < MILLION]
    outcomes: dict[str, dict[int, bool]] = {"circular": {}, "vanilla": {}}
    for base in (int(cells["index"]) for cells in bases):
        rotations = [index for index in right if index % MILLION == base]
        outcomes["circular"][base] = all(right[index] for index in rotations)
        outcomes["vanilla"][base] = right[base]
    shares = {kind: (sum(found.values()), len(bases)) for kind, found in outcomes.items()}
    groups: dict[str, dict[str, Share]] = {}
    for kind, found in outcomes.items():
        for column in ("category", "l2-category"):
            for group in {cells[column] for cells in bases}:
                members = [int(cells["index"]) for cells in bases if cells[column] == group]
                share = (sum(found[base] for base in members), len(members))
                groups.setdefault(f"{kind} by {column}", {})[group] = share
    return shares, groups


def test_mmbench(mmbench_file: Path, model_folder: Path, tiny_model: Model, tmp_path: Path) -> None:
    assert len(table_of(mmbench_file)) == 20
    evaluation = command(tmp_path / "run", model_folder, "mmbench", mmbench_file)
    report = evaluation.run()
    letters = mmbench_letters(mmbench_file, evaluation.answers)
    shares, groups = mmbench_shares(mmbench_file, letters)
    check_shares(report["scores"], shares)
    check_groups(report["groups"], groups)
    # Pictures of 241 (which 252 and 502 show, too), 300, 400, 401 (broken), 500 and 503.
    check_rest(evaluation, [mmbench_file], 20, ["401", "1000401"], images=6)
    options = "A. plum\nB. fig\nC. apple\nD. pear"
    prompt = f"It grows in the south.\nWhich fruit?\n{options}\n{LETTER}"
    assert evaluation.answers["2000252"] == says(tiny_model, png("red"), prompt)
    prompt = f"星星是什么颜色？\nA. 绿色\nB. 蓝色\nC. 红色\n{LETTER}"
    assert evaluation.answers["1000301"] == says(tiny_model, png("green"), prompt)


def test_mmbench_by_hand(mmbench_file: Path, model_folder: Path, tmp_path: Path) -> None:
    """241, 301, 400 and 503 are right in all rotations, 252 in its first one; 401 is broken."""
    evaluation = command(tmp_path / "run", model_folder, "mmbench", mmbench_file)
    evaluation.run()
    answers = {name: answer for name, (answer, _, _) in MMBENCH_ANSWERS.items()}
    report = evaluation.run_with_answers(answers)
    check_shares(report["scores"], {"circular": (4, 10), "vanilla": (5, 10)})
    expected: dict[str, dict[str, Share]] = {
        "circular by category": {"color": (1, 3), "logic": (2, 4), "animal": (1, 3)},
        "vanilla by category": {"color": (2, 3), "logic": (2, 4), "animal": (1, 3)},
        "circular by l2-category": {"perception": (2, 6), "reasoning": (2, 4)},
        "vanilla by l2-category": {"perception": (3, 6), "reasoning": (2, 4)},
    }
    check_groups(report["groups"], expected)
    check_rest(evaluation, [mmbench_file], 20, ["401", "1000401"], images=6)
    # The slow rules and the file agree with the table, so the other test's numbers stand on it.
    by_hand = {name: letter for name, (_, letter, _) in MMBENCH_ANSWERS.items()}
    assert mmbench_letters(mmbench_file, answers) == by_hand
    rights = {cells["index"]: cells["answer"] for cells in table_of(mmbench_file)}
    assert {name: rights[name] for name in by_hand} == {
        name: right for name, (_, _, right) in MMBENCH_ANSWERS.items()
    }
    assert mmbench_shares(mmbench_file, by_hand)[1] == expected


def test_mmbench_rotates_a_chinese_file(
    model_folder: Path, tiny_model: Model, tmp_path: Path
) -> None:
    rows = [
        row(7, question="是什么？", options=("猫", "狗", "牛"), answer="C", hint="看图。"),
        row(8, question="几个？", options=("一", "二"), answer="A", image="7", category="count"),
        row(9, question="几个？", options=("一", "二"), answer="B", image=broken_base64()),
    ]
    file = write_mmbench(tmp_path / "MMBench_DEV_CN.tsv", rows)
    words = ("mmbench", file, "--circular", "--language", "cn")
    evaluation = command(tmp_path / "run", model_folder, *words)
    evaluation.run()
    check_rest(evaluation, [file], 7, ["9", "1000009"], images=2)
    prompt = "看图。\n是什么？\nA. 狗\nB. 牛\nC. 猫\n请直接回答选项字母。"
    assert evaluation.answers["1000007"] == says(tiny_model, png("red"), prompt)
    # The right letters are C, B, A for 7, and A, B for 8, whose rotation is answered wrongly.
    answers = {"7": "C", "1000007": "牛", "2000007": "选A。", "8": "一个", "1000008": "二"}
    report = evaluation.run_with_answers(answers)
    check_shares(report["scores"], {"circular": (1, 3), "vanilla": (2, 3)})
    by_category: dict[str, dict[str, Share]] = {
        "circular by category": {"fruit": (1, 2), "count": (0, 1)},
        "vanilla by category": {"fruit": (1, 2), "count": (1, 1)},
        "circular by l2-category": {"things": (1, 3)},
        "vanilla by l2-category": {"things": (2, 3)},
    }
    check_groups(report["groups"], by_category)


# ---- COCO ----------------------------------------------------------------------------------------


@pytest.fixture
def references(tmp_path: Path) -> dict[str, list[str]]:
    return drawn_references(tmp_path)


def coco_answers(references: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """A reference itself, words of two references, words of none, or nothing at all."""
    rng = random.Random(5)
    answers = {}
    for place, (name, listed) in enumerate(references.items()):
        first, second = words_in(listed[0]), words_in(listed[1])
        kinds = (listed[2], sentence(first[:3] + second), sentence(words_of(rng)), listed[4])
        answers[name] = "" if place % 10 == 3 else kinds[place % 4]
    return {name: answer for name, answer in answers.items() if name != COCO_BROKEN}


def coco_scores(
    references: Mapping[str, Sequence[str]], tokens: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """What the scorers of the COCO evaluation say; no tokens for a failed image."""
    cider = peer("pycocoevalcap.cider.cider").Cider()
    bleu = peer("pycocoevalcap.bleu.bleu").Bleu(4)
    rouge = peer("pycocoevalcap.rouge.rouge").Rouge()
    right = {
        name: [" ".join(words_in(caption)) for caption in listed]
        for name, listed in references.items()
    }
    said = {name: [" ".join(tokens.get(name, []))] for name in references}
    return {
        "cider_d": float(cider.compute_score(right, said)[0]),
        **{
            f"bleu_{order}": value
            for order, value in enumerate(bleu.compute_score(right, said, verbose=0)[0], start=1)
        },
        "rouge_l": float(rouge.compute_score(right, said)[0]),
    }


def check_scores(report: Mapping[str, Any], expected: Mapping[str, float], count: int) -> None:
    assert list(report["scores"]) == list(expected)
    for name, metric in report["scores"].items():
        assert metric["value"] == pytest.approx(expected[name], abs=1e-12), name
        assert (metric["count"], metric["interval"]) == (count, None)
    assert report["groups"] == {}


@pytest.mark.parametrize("write", [plain_file, karpathy_file])
def test_coco(
    write: Any,
    references: dict[str, list[str]],
    model_folder: Path,
    tiny_model: Model,
    tmp_path: Path,
) -> None:
    file = write(tmp_path / "captions.json", references)
    images = tmp_path / "val2014" if write is plain_file else tmp_path
    evaluation = command(tmp_path / "run", model_folder, "coco", images, file)
    report = evaluation.run()
    tokens = {name: captions.tokenize(answer) for name, answer in evaluation.answers.items()}
    check_scores(report, coco_scores(references, tokens), 50)
    check_rest(evaluation, [file], 50, [COCO_BROKEN], images=50)
    for name in ("156", "173"):  # a PNG file and a JPEG file
        picture = tmp_path / "val2014" / coco_name(name)
        assert evaluation.answers[name] == says(tiny_model, picture, CAPTION)

    answers = coco_answers(references)
    report = evaluation.run_with_answers(answers)
    expected = coco_scores(references, {name: words_in(said) for name, said in answers.items()})
    check_scores(report, expected, 50)
    assert 1 < expected["cider_d"] < 9  # neither all right nor all wrong
    assert 0.1 < expected["bleu_4"] < 0.9 and 0.1 < expected["rouge_l"] < 0.9
    check_rest(evaluation, [file], 50, [COCO_BROKEN], images=50)
    assert report["settings"]["suite_settings"].get("split") == (
        "test" if write is karpathy_file else None
    )


# ---- POPE ----------------------------------------------------------------------------------------

# By category: label, an answer, and what that says by the official rule (None: broken image).
POPE: dict[str, list[tuple[str, str, str | None]]] = {
    "random": [
        ("yes", "Yes", "yes"), ("yes", "No.", "no"), ("no", "no", "no"),
        ("no", "Yes, there is", "yes"),
    ],
    "popular": [
        ("yes", "yes", "yes"), ("yes", "Yes, it is not hidden", "no"),
        ("no", "There is no dog. Yes.", "no"), ("no", "not sure", "no"),
    ],
    "adversarial": [
        ("yes", "Certainly", "yes"), ("no", "NO", "yes"), ("no", "No, sir", "no"),
        ("no", "", None),
    ],
}  # fmt: skip


@pytest.fixture
def pope_files(tmp_path: Path) -> list[Path]:
    files = []
    for place, (category, rows) in enumerate(POPE.items()):
        lines = []
        for number, (label, _, said) in enumerate(rows, start=1):
            name = f"COCO_val2014_{place * 10 + number // 2:012d}.jpg"
            if said is None:
                name = draw(tmp_path / "val2014" / "COCO_val2014_broken.jpg", -1).name
            else:
                draw(tmp_path / "val2014" / name, place * 10 + number // 2)
            text = f"Is there a {WORDS[number + 2]} in the image?"
            lines.append({"question_id": number, "image": name, "text": text, "label": label})
        files.append(write_lines(tmp_path / f"coco_pope_{category}.json", *lines))
    return files


def pope_says(answer: str) -> str:
    """The official rule: the first sentence without commas holds a negation as a word, or not."""
    words = answer.partition(".")[0].replace(",", "").split(" ")
    return "no" if "No" in words or "not" in words or "no" in words else "yes"


def pope_counts(said: Mapping[str, str], category: str) -> dict[str, int]:
    """How often each thing was said where each was right; "missing" for a failed question."""
    counts = dict.fromkeys(("yes yes", "yes no", "no no", "no yes", "missing no"), 0)
    for number, (label, _, _) in enumerate(POPE[category], start=1):
        counts[f"{said.get(f'{category}/{number}', 'missing')} {label}"] += 1
    return counts


def pope_f1(counts: Mapping[str, int]) -> float:
    precision = counts["yes yes"] / max(counts["yes yes"] + pope_false_yes(counts), 1)
    recall = counts["yes yes"] / max(counts["yes yes"] + counts["no yes"], 1)
    return 2 * precision * recall / (precision + recall) if precision and recall else 0.0


def pope_false_yes(counts: Mapping[str, int]) -> int:
    """A failed question counts as answered wrongly; only questions with "no" failed here."""
    return counts["yes no"] + counts["missing no"]


def pope_shares(counts: Mapping[str, int]) -> dict[str, Share]:
    total = sum(counts.values())
    said_yes = counts["yes yes"] + counts["yes no"]
    all_yes = counts["yes yes"] + pope_false_yes(counts)
    return {
        "accuracy": (counts["yes yes"] + counts["no no"], total),
        "precision": (counts["yes yes"], all_yes),
        "recall": (counts["yes yes"], counts["yes yes"] + counts["no yes"]),
        "yes_ratio": (said_yes, total - counts["missing no"]),
    }


def check_pope(report: Mapping[str, Any], answers: Mapping[str, str]) -> None:
    said = {name: pope_says(answer) for name, answer in answers.items()}
    by_category = {category: pope_counts(said, category) for category in POPE}
    together = {
        name: sum(counts[name] for counts in by_category.values()) for name in by_category["random"]
    }
    f1 = {category: pope_f1(counts) for category, counts in by_category.items()}
    scores = dict(report["scores"])
    assert list(scores)[0] == "f1"
    assert scores.pop("f1") == {
        "value": pytest.approx(sum(f1.values()) / 3, abs=1e-12), "count": 12, "interval": None
    }  # fmt: skip
    check_shares(scores, pope_shares(together))
    groups = dict(report["groups"])
    for category, metric in groups.pop("f1 by category").items():
        assert metric["value"] == pytest.approx(f1[category], abs=1e-12)
        assert metric["count"] == 4
    for name, metrics in groups.items():
        assert list(metrics) == list(POPE)
        for category, metric in metrics.items():
            shares = pope_shares(by_category[category])
            check_share(metric, shares[name.removesuffix(" by category")])
    assert len(groups) == 4


def test_pope(
    pope_files: list[Path], model_folder: Path, tiny_model: Model, tmp_path: Path
) -> None:
    images = tmp_path / "val2014"
    evaluation = command(tmp_path / "run", model_folder, "pope", *pope_files, images)
    check_pope(evaluation.run(), evaluation.answers)
    check_rest(evaluation, pope_files, 12, ["adversarial/4"], images=9)
    prompt = f"Is there a dog in the image?\n{SHORT}"
    picture = images / "COCO_val2014_000000000000.jpg"
    assert evaluation.answers["random/1"] == says(tiny_model, picture, prompt)

    answers = {
        f"{category}/{number}": answer
        for category, rows in POPE.items()
        for number, (_, answer, said) in enumerate(rows, start=1)
        if said is not None
    }
    report = evaluation.run_with_answers(answers)
    check_pope(report, answers)
    check_rest(evaluation, pope_files, 12, ["adversarial/4"], images=9)
    # By hand: rightly yes 1 + 1 + 1, no 1 + 2 + 1; wrongly yes 1 + 0 + 2, no 1 + 1 + 0.
    by_hand = {"accuracy": (7, 12), "precision": (3, 6), "recall": (3, 5), "yes_ratio": (5, 11)}
    for name, share in by_hand.items():
        check_share(report["scores"][name], share)
    assert report["scores"]["f1"]["value"] == pytest.approx((1 / 2 + 2 / 3 + 1 / 2) / 3, abs=1e-12)


# ---- VQA -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vqa:
    """A question of VQAv2, an answer to it, and what the answer is after normalizing, by hand."""

    image: int
    text: str
    references: tuple[str, ...]
    question_type: str
    answer_type: str
    answer: str = ""
    normal: str = ""


VQA: dict[str, Vqa] = {
    "42001": Vqa(
        42, "How many stars are there?", ("2",) * 4 + ("3",) * 6, "how many", "number", "Two.", "2"
    ),
    "42002": Vqa(
        42, "Is it red?", ("yes",) * 2 + ("no",) * 8, "is it", "yes/no", " Yes!\n", "yes"
    ),
    "42003": Vqa(
        42, "What is it?", ("dog", *("cat",) * 9), "what is", "other", "The dog", "dog"
    ),
    "43001": Vqa(
        43, "What is worn?", ("t shirt",) * 3 + ("none",) * 7, "what is", "other", "T-shirt",
        "t shirt",
    ),
    "43002": Vqa(43, "What is here?", ("cat",) * 10, "what is", "other", "a dog", "dog"),
    "44001": Vqa(44, "Is it blue?", ("no",) * 10, "is it", "yes/no"),
}  # fmt: skip
VQA_FAILED = "44001"


def vqa_files(tmp_path: Path, questions: Mapping[str, Vqa]) -> list[Path]:
    for number in (42, 43):
        draw(tmp_path / "val2014" / f"COCO_val2014_{number:012d}.jpg", number)
    draw(tmp_path / "val2014" / "COCO_val2014_000000000044.jpg", -1)
    asked = [
        {"image_id": one.image, "question": one.text, "question_id": int(name)}
        for name, one in questions.items()
    ]
    annotations = [
        {
            "question_id": int(name), "image_id": one.image, "question_type": one.question_type,
            "answer_type": one.answer_type, "multiple_choice_answer": one.references[-1],
            "answers": [
                {"answer": said, "answer_confidence": "yes", "answer_id": number}
                for number, said in enumerate(one.references, start=1)
            ],
        }
        for name, one in questions.items()
    ]  # fmt: skip
    about = {"data_type": "mscoco", "data_subtype": "val2014", "info": {}, "license": {}}
    return [
        write_json(tmp_path / "questions.json", {**about, "questions": asked}),
        write_json(tmp_path / "annotations.json", {**about, "annotations": annotations}),
    ]


def leave_one_out(said: str, references: Sequence[str]) -> float:
    """The mean over the people of min(1, a third of the others who said the same)."""
    total = 0.0
    for left_out in range(len(references)):
        others = [said == other for n, other in enumerate(references) if n != left_out]
        total += min(sum(others) / 3, 1.0)
    return total / len(references)


def vqa_groups(outcomes: Mapping[str, float]) -> dict[str, dict[str, Share]]:
    groups: dict[str, dict[str, Share]] = {"question_type": {}, "answer_type": {}}
    for name, one in VQA.items():
        for kind, value in (("question_type", one.question_type), ("answer_type", one.answer_type)):
            right, count = groups[kind].get(value, (0.0, 0))
            groups[kind][value] = (right + outcomes[name], count + 1)
    return {f"accuracy by {kind}": shares for kind, shares in groups.items()}


def test_vqa(model_folder: Path, tiny_model: Model, tmp_path: Path) -> None:
    """Two of the ten people said what the model says to one question: 0.6 for it."""
    vqa_files(tmp_path, VQA)
    picture = tmp_path / "val2014" / "COCO_val2014_000000000043.jpg"
    own = says(tiny_model, picture, f"What is here?\n{SHORT}")
    asked = {
        **VQA,
        "43002": Vqa(43, "What is here?", (own, own, *("cat",) * 8), "what is", "other"),
    }
    files = vqa_files(tmp_path, asked)
    evaluation = command(tmp_path / "run", model_folder, "vqa", *files, tmp_path / "val2014")
    report = evaluation.run()
    outcomes = {**dict.fromkeys(VQA, 0.0), "43002": 0.6}
    check_shares(report["scores"], {"accuracy": (0.6, 6)})
    check_groups(report["groups"], vqa_groups(outcomes))
    check_rest(evaluation, files, 6, [VQA_FAILED], images=3)
    assert evaluation.answers["43002"] == own


def test_vqa_by_hand(model_folder: Path, tmp_path: Path) -> None:
    files = vqa_files(tmp_path, VQA)
    evaluation = command(tmp_path / "run", model_folder, "vqa", *files, tmp_path / "val2014")
    evaluation.run()
    answers = {name: one.answer for name, one in VQA.items() if name != VQA_FAILED}
    report = evaluation.run_with_answers(answers)
    by_hand = {
        "42001": 1.0,
        "42002": 0.6,
        "42003": 0.3,
        "43001": 0.9,
        "43002": 0.0,
        VQA_FAILED: 0.0,
    }
    outcomes = {
        name: leave_one_out(
            one.normal, ["0" if said == "none" else said for said in one.references]
        )
        for name, one in VQA.items()
    }
    assert outcomes == pytest.approx(by_hand, abs=1e-12)
    check_shares(report["scores"], {"accuracy": (2.8, 6)})
    check_groups(report["groups"], vqa_groups(by_hand))
    check_groups(
        report["groups"],
        {
            "accuracy by question_type": {
                "how many": (1.0, 1),
                "is it": (0.6, 2),
                "what is": (1.2, 3),
            },
            "accuracy by answer_type": {"number": (1.0, 1), "yes/no": (0.6, 2), "other": (1.2, 3)},
        },
    )
    check_rest(evaluation, files, 6, [VQA_FAILED], images=3)


# ---- ScienceQA -----------------------------------------------------------------------------------

# Right choice, subject, grade, hint, image; an answer, and the index that it gives by hand.
SCIENCE: dict[str, tuple[int, str, int, str, int | None, str, int | None]] = {
    "4": (1, "natural science", 2, "", 4, "B", 1),
    "5": (0, "natural science", 7, "Look.", 5, "The answer is A. The answer is A.", None),
    "11": (2, "language science", 6, "", None, "C. It is z.", 2),
    "12": (0, "social science", 12, "Read.", None, "I think so. The answer is A.", 0),
    "13": (1, "social science", 8, "", 13, "b", None),
    "14": (1, "language science", 1, "", 14, "C", 2),
    "15": (0, "natural science", 3, "", -1, "", None),
}


@pytest.fixture
def science_files(tmp_path: Path) -> list[Path]:
    questions, problems = [], {}
    for name, (answer, subject, grade, hint, image, _, _) in SCIENCE.items():
        text = f"Context: N/A\nOptions: (A) x (B) y (C) z {name}"
        entry: dict[str, Any] = {"id": name}
        if image is not None:
            draw(tmp_path / "images" / name / "image.png", image)
            entry["image"], text = f"{name}/image.png", f"<image>\n{text}"
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "The answer is A."}]
        questions.append({**entry, "conversations": turns})
        problems[name] = {
            "question": "Which?", "choices": ["x", "y", "z"], "answer": answer, "hint": hint,
            "image": None if image is None else "image.png", "subject": subject,
            "grade": f"grade{grade}", "split": "test", "topic": "", "lecture": "",
        }  # fmt: skip
    return [
        write_json(tmp_path / "llava_test_CQM-A.json", questions),
        write_json(tmp_path / "problems.json", problems),
    ]


def science_index(answer: str) -> int | None:
    """A letter alone, one that begins a sentence, or one "The answer is ..."."""
    text = answer.strip()
    if text in list("ABCDE"):
        return "ABCDE".index(text)
    if text[:1] in list("ABCDE") and text[1:3] == ". ":
        return "ABCDE".index(text[0])
    said = [part[0] for part in text.split("The answer is ")[1:] if part[1:2] == "."]
    return "ABCDE".index(said[0]) if len(said) == 1 else None


def science_shares(
    chosen: Mapping[str, int | None],
) -> tuple[dict[str, Share], dict[str, dict[str, Share]]]:
    counts: dict[tuple[str, str], Share] = {}
    for name, (answer, subject, grade, hint, image, _, _) in SCIENCE.items():
        places = [("", "accuracy"), ("subject", subject)]
        places += [("grades", "1-6" if grade < 7 else "7-12")]
        places += [("", "image_accuracy"), ("context", "image")] if image is not None else []
        places += [("context", "text")] if hint else []
        places += [("context", "none")] if not hint and image is None else []
        for place in places:
            right, count = counts.get(place, (0, 0))
            counts[place] = (right + (chosen.get(name) == answer), count + 1)
    groups: dict[str, dict[str, Share]] = {}
    for (kind, group), share in counts.items():
        groups.setdefault(f"accuracy by {kind}" if kind else "", {})[group] = share
    scores = groups.pop("")
    return {name: scores[name] for name in ("accuracy", "image_accuracy")}, groups


def test_scienceqa(
    science_files: list[Path], model_folder: Path, tiny_model: Model, tmp_path: Path
) -> None:
    words = ("scienceqa", *science_files, tmp_path / "images")
    evaluation = command(tmp_path / "run", model_folder, *words)
    report = evaluation.run()
    chosen = {name: science_index(answer) for name, answer in evaluation.answers.items()}
    shares, groups = science_shares(chosen)
    check_shares(report["scores"], shares)
    check_groups(report["groups"], groups)
    check_rest(evaluation, science_files, 7, ["15"], images=5)
    prompt = f"Context: N/A\nOptions: (A) x (B) y (C) z 11\n{LETTER}"
    assert evaluation.answers["11"] == says(tiny_model, None, prompt)

    answers = {name: fields[5] for name, fields in SCIENCE.items() if name != "15"}
    report = evaluation.run_with_answers(answers)
    by_hand = {name: fields[6] for name, fields in SCIENCE.items() if name != "15"}
    assert {name: science_index(answer) for name, answer in answers.items()} == by_hand
    # 4, 11 and 12 are right; 4 has an image, 11 and 12 have none.
    check_shares(report["scores"], {"accuracy": (3, 7), "image_accuracy": (1, 5)})
    expected: dict[str, dict[str, Share]] = {
        "accuracy by subject": {
            "natural science": (1, 3), "language science": (1, 2), "social science": (1, 2),
        },
        "accuracy by context": {"text": (1, 2), "image": (1, 5), "none": (1, 1)},
        "accuracy by grades": {"1-6": (2, 4), "7-12": (1, 3)},
    }  # fmt: skip
    check_groups(report["groups"], expected)
    assert science_shares(by_hand)[1] == expected
    check_rest(evaluation, science_files, 7, ["15"], images=5)


# ---- own data ------------------------------------------------------------------------------------


def own_file(tmp_path: Path, own: str) -> Path:
    """Eight questions; `own` is the right answer to the first one."""
    for number in (1, 2):
        draw(tmp_path / f"{number}.png", number)
    draw(tmp_path / "broken.jpg", -1)
    ten = ["yes"] * 3 + ["no"] * 7
    choices = ["cat", "dog", "cow"]
    return write_lines(
        tmp_path / "own.jsonl",
        {"image": "1.png", "question": "What is it?", "answers": [own, "a fig"],
         "category": "fruit"},
        {"id": "many", "image": "1.png", "question": "How many?", "answer": "two",
         "category": "count"},
        {"id": "pick", "image": "2.png", "question": "Which?", "choices": choices, "answer": "dog",
         "category": "animal"},
        {"id": "index", "image": "2.png", "question": "And now?", "choices": choices, "answer": 2,
         "category": "animal"},
        {"id": "ten", "image": "2.png", "question": "Is it red?", "answers": ten},
        {"id": "both", "images": ["1.png", "2.png"], "question": "Same?", "answer": "no",
         "category": "count"},
        {"id": "text", "question": "Say yes.", "answer": "yes"},
        {"id": "bad", "image": "broken.jpg", "question": "What?", "answer": "x",
         "category": "fruit"},
    )  # fmt: skip


def test_jsonl(model_folder: Path, tiny_model: Model, tmp_path: Path) -> None:
    own_file(tmp_path, "?")  # for its images
    own = says(tiny_model, tmp_path / "1.png", "What is it?")
    file = own_file(tmp_path, own)
    evaluation = command(tmp_path / "run", model_folder, "jsonl", file)
    report = evaluation.run()
    assert evaluation.answers["1"] == own
    # The model's letters are by the slow rules; nothing else that it says is right.
    options = ["cat", "dog", "cow"]
    letters = {name: meant_letter(evaluation.answers[name], options) for name in ("pick", "index")}
    chosen = (letters["pick"] == "B") + (letters["index"] == "C")
    check_shares(report["scores"], {"accuracy": (1 + chosen, 8)})
    check_groups(
        report["groups"],
        {
            "accuracy by category": {"fruit": (1, 2), "count": (0, 2), "animal": (chosen, 2)},
            "accuracy by scoring": {"exact": (1, 5), "choice": (chosen, 2), "vqa": (0, 1)},
        },
    )
    check_rest(evaluation, [file], 8, ["bad"], images=5)

    answers = {
        "1": "The fig.", "many": "2", "pick": "A dog, surely", "index": "Cow.", "ten": "Yes",
        "both": "not", "text": "yes!",
    }  # fmt: skip
    report = evaluation.run_with_answers(answers)
    # Wrong: both and bad; nine tenths of ten, which three of ten people said.
    check_shares(report["scores"], {"accuracy": (5.9, 8)})
    check_groups(
        report["groups"],
        {
            "accuracy by category": {"fruit": (1, 2), "count": (1, 2), "animal": (2, 2)},
            "accuracy by scoring": {"exact": (3, 5), "choice": (2, 2), "vqa": (0.9, 1)},
        },
    )
    check_rest(evaluation, [file], 8, ["bad"], images=5)
