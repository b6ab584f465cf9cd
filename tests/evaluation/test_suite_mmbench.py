"""MMBench: a file as the field publishes it, written here, and every number by hand."""

import base64
import csv
import threading
from pathlib import Path
from string import ascii_uppercase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.mmbench_rows import COLUMNS, FRUIT, MILLION, encoded, png, rotated, row, write
from llava_lite.errors import EvaluationError
from llava_lite.evaluation.suite import Metric
from llava_lite.evaluation.suites.mmbench import (
    MMBenchRow,
    RowImage,
    index_of,
    open_mmbench,
    rotations,
)
from llava_lite.evaluation.suites.multiple_choice import chosen_letter, multiple_choice_prompt


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """20 rows: questions 0 and 1 in four rotations, 2 in two, 3 in three; seven alone."""
    yes_no = row(2, options=("yes", "no"), answer="B", category="logic", **{"l2-category": "mind"})
    three = row(3, options=FRUIT[:3], D="nan", answer="C", hint="It is blue.")
    rows = [
        *rotated(row(0), 4),
        *rotated(row(1, answer="D", image=encoded("green")), 4),
        *rotated(yes_no, 2),
        *rotated(three, 3),
        row(4, question="这是什么颜色？", options=("红", "绿", "蓝"), image="1000001"),
        row(5, image="AAAA" * 30 + "A"),
        row(6, image="77"),
        row(7, image="8", category="logic"),
        row(8, image="7", category="logic"),
        row("x9"),
        row(10, options=("only",)),
    ]
    assert len(rows) == 20
    return write(tmp_path / "bench.tsv", rows)


# ---- samples -----------------------------------------------------------------------------------


def test_samples_are_the_rows_in_order(file: Path) -> None:
    samples = open_mmbench([file]).samples()
    assert [sample.id for sample in samples] == [
        *("0", "1000000", "2000000", "3000000"),
        *("1", "1000001", "2000001", "3000001"),
        *("2", "1000002", "3", "1000003", "2000003"),
        *("4", "5", "6", "7", "8", "line 20", "10"),
    ]
    assert [sample.id for sample in samples if sample.error] == [
        "5", "6", "7", "8", "line 20", "10",
    ]  # fmt: skip


def test_prompts_are_the_official_ones(file: Path) -> None:
    prompts = {sample.id: sample.prompt for sample in open_mmbench([file]).samples()}
    assert prompts["1000000"] == (
        "Which fruit?\nA. pear\nB. plum\nC. fig\nD. apple\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert prompts["3"] == (
        "It is blue.\nWhich fruit?\nA. apple\nB. pear\nC. plum\n"
        "Answer with the option's letter from the given choices directly."
    )
    chinese = {sample.id: sample.prompt for sample in open_mmbench([file], "cn").samples()}
    assert chinese["4"] == "这是什么颜色？\nA. 红\nB. 绿\nC. 蓝\n请直接回答选项字母。"


def test_shared_images_are_shared(file: Path) -> None:
    samples = {sample.id: sample for sample in open_mmbench([file]).samples()}
    assert samples["0"].images == samples["3000000"].images == (png("red"),)
    # 4 -> 1000001 -> 1, and the images of 0 and 2 are equal without a reference.
    assert samples["4"].images == (png("green"),)
    keys = {name: samples[name].image_key for name in ("0", "1000000", "2", "1", "4")}
    assert keys["0"] == keys["1000000"] == keys["2"]
    assert keys["1"] == keys["4"] != keys["0"]
    assert samples["4"].images[0] is samples["1"].images[0]


@pytest.mark.parametrize(
    ("sample_id", "reason"),
    [
        ("5", "the image is not valid base64"),
        ("6", "the image is that of row 77, which is not in the file"),
        ("7", "the image references go in a circle: 7 -> 8 -> 7"),
        ("line 20", "line 20: the index 'x9' is not a whole number"),
        ("10", "line 21: has 1 options, needs 2 or more"),
    ],
)
def test_a_bad_row_costs_one_row(file: Path, sample_id: str, reason: str) -> None:
    errors = {sample.id: sample.error or "" for sample in open_mmbench([file]).samples()}
    assert reason in errors[sample_id]


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"image": ""}, "the row has no image"),
        ({"image": "abc"}, "the image 'abc' is no row's index"),
        ({"image": "1"}, "the image is that of row 1: the row has no image"),
        ({"answer": "E"}, "line 2: the answer 'E' is none of A, B, C, D"),
        ({"question": "nan"}, "line 2: has no question"),
    ],
)
def test_other_bad_rows(tmp_path: Path, cells: dict[str, object], reason: str) -> None:
    path = write(tmp_path / "a.tsv", [row(0, **cells), row(1, image="")])
    assert reason in (open_mmbench([path]).samples()[0].error or "")


def test_more_than_four_options_quotes_and_line_ends(tmp_path: Path) -> None:
    columns = ("index", "image", "question", "A", "B", "C", "D", "E", "F", "answer")
    cells = {"options": ("1", "2", "3", "4", "5", "6"), "question": 'A "quoted"\nline\there'}
    picked = {name: row("7.0", answer="f", **cells).get(name, "") for name in columns}
    path = write(tmp_path / "a.tsv", [picked], columns)
    suite = open_mmbench([path])
    [sample] = suite.samples()
    assert sample.id == "7"
    assert sample.prompt.startswith('A "quoted"\nline\there\nA. 1\n')
    assert "\nF. 6\n" in sample.prompt
    assert suite.score({"7": "F"}).metrics["circular"].value == 1.0


def test_cells_go_into_the_prompt_as_they_stand(tmp_path: Path) -> None:
    """Blanks around a text are part of the prompt; elsewhere they mean nothing."""
    cells = {"options": (" yes", "no "), "hint": " Look. ", "answer": " b ", "category": " fruit"}
    suite = open_mmbench([write(tmp_path / "a.tsv", [row(" 7 ", question="Is it? ", **cells)])])
    [sample] = suite.samples()
    assert sample.prompt == (
        " Look. \nIs it? \nA.  yes\nB. no \n"
        "Answer with the option's letter from the given choices directly."
    )
    scores = suite.score({"7": "B"})
    assert scores.metrics["vanilla"].value == 1.0
    assert list(scores.groups["vanilla by category"]) == ["fruit"]
    suite.export({"7": "B"}, tmp_path / "out.tsv")
    assert (tmp_path / "out.tsv").read_text().splitlines()[1] == "7\tIs it? \t yes\tno \tB"


@pytest.mark.parametrize("option", ["none", "Na", "no", "Nan", "nil", "0"])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_words_that_no_table_takes_for_nothing_are_options(
    tmp_path: Path, option: str, place: int
) -> None:
    options = (*FRUIT[:place], option, *FRUIT[place + 1 :])
    [sample] = open_mmbench([write(tmp_path / "a.tsv", [row(0, options=options)])]).samples()
    assert sample.error is None
    assert sample.prompt.splitlines()[1:5] == [
        f"{letter}. {said}" for letter, said in zip("ABCD", options, strict=True)
    ]


@pytest.mark.parametrize("nothing", ["", " ", "nan", "NaN", " nan ", "None", "NA", "N/A"])
def test_options_end_at_the_first_that_is_not_there(tmp_path: Path, nothing: str) -> None:
    options = (*FRUIT[:2], nothing, FRUIT[3])
    [sample] = open_mmbench([write(tmp_path / "a.tsv", [row(0, options=options)])]).samples()
    assert sample.prompt.splitlines()[1:3] == ["A. apple", "B. pear"]
    assert sample.prompt.count("\n") == 3


# ---- scores ------------------------------------------------------------------------------------


def answers_of(file: Path) -> dict[str, str]:
    """Right for 0 in all, for 1 but in one rotation, for 2 in all, 3 unclear in one, 4 by text."""
    return {
        "0": "A", "1000000": "D.", "2000000": "The answer is C", "3000000": "(B)",
        "1": "D", "1000001": "A", "2000001": "B", "3000001": "B",
        "2": "no", "1000002": "A",
        "3": "C", "1000003": "B", "2000003": "A or B",
        "4": "这是红色，选A。",
    }  # fmt: skip


def test_scores_by_hand(file: Path) -> None:
    # In the rotations of 1, D moves to C, B, A: so rotation one should be C, two B, three A.
    scores = open_mmbench([file]).score(answers_of(file))
    # Groups 0..8, the row without an index, 10: eleven, of which 0, 2 and 4 are right.
    assert list(scores.metrics) == ["circular", "vanilla"]
    assert scores.metrics["circular"] == Metric.share(3, 11)
    # Vanilla: 0, 1, 2, 3 and 4 are right.
    assert scores.metrics["vanilla"] == Metric.share(5, 11)
    by_category = {"fruit": Metric.share(2, 8), "logic": Metric.share(1, 3)}
    assert scores.groups["circular by category"] == by_category
    by_category = {"fruit": Metric.share(4, 8), "logic": Metric.share(1, 3)}
    assert scores.groups["vanilla by category"] == by_category
    by_kind = {"mind": Metric.share(1, 1), "things": Metric.share(2, 10)}
    assert scores.groups["circular by l2-category"] == by_kind
    by_kind = {"mind": Metric.share(1, 1), "things": Metric.share(4, 10)}
    assert scores.groups["vanilla by l2-category"] == by_kind


def test_a_missing_answer_is_wrong(file: Path) -> None:
    suite = open_mmbench([file])
    answers = answers_of(file)
    del answers["3000000"]
    scores = suite.score(answers).metrics
    assert (scores["circular"], scores["vanilla"]) == (Metric.share(2, 11), Metric.share(5, 11))
    assert suite.score({}).metrics["circular"] == Metric.share(0, 11)


def test_without_rotations_circular_is_vanilla(tmp_path: Path) -> None:
    suite = open_mmbench([write(tmp_path / "a.tsv", [row(0), row(1, answer="B"), row(2)])])
    metrics = suite.score({"0": "A", "1": "A", "2": "A"}).metrics
    assert metrics["circular"] == metrics["vanilla"] == Metric.share(2, 3)
    assert suite.settings["rotations"] == "none: circular accuracy equals vanilla accuracy"


def test_the_settings_say_what_changes_a_score(file: Path) -> None:
    suite = open_mmbench([file], "cn")
    assert suite.settings["language"] == "cn"
    assert suite.settings["rotations"] == "the file's own"
    assert "no judge model" in suite.settings["letter_extraction"]
    assert (suite.name, suite.files, suite.max_new_tokens) == ("mmbench", [file], 1024)


def test_the_test_split_gives_predictions_but_no_scores(tmp_path: Path) -> None:
    path = write(tmp_path / "test.tsv", [row(0, answer=""), row(1, answer="nan", image="0")])
    suite = open_mmbench([path])
    assert [sample.error for sample in suite.samples()] == [None, None]
    scores = suite.score({"0": "A", "1": "B"})
    assert (scores.metrics, scores.groups) == ({}, {})


def test_export_has_the_columns_of_a_submission(tmp_path: Path, file: Path) -> None:
    suite = open_mmbench([file])
    suite.export({"0": "A", "4": "选\t'A'\n"}, tmp_path / "out.tsv")
    with open(tmp_path / "out.tsv", encoding="utf-8", newline="") as exported:
        table = list(csv.reader(exported, delimiter="\t"))
    assert table[0] == ["index", "question", "A", "B", "C", "D", "prediction"]
    assert len(table) == 21
    assert table[1] == ["0", "Which fruit?", *FRUIT, "A"]
    assert table[14] == ["4", "这是什么颜色？", "红", "绿", "蓝", "", "选\t'A'\n"]
    assert table[2][-1] == ""


# ---- rotations made here -----------------------------------------------------------------------


def test_rotations_are_made_for_a_file_without_them(tmp_path: Path) -> None:
    rows = [row(5, answer="C", options=FRUIT[:3]), row(6, image="broken"), row(7, options=("x",))]
    path = write(tmp_path / "a.tsv", rows)
    suite = open_mmbench([path], circular=True)
    samples = suite.samples()
    assert [sample.id for sample in samples] == [
        *("5", "1000005", "2000005", "6", "1000006", "2000006", "3000006", "7"),
    ]
    assert "A. plum\nB. apple\nC. pear\n" in samples[2].prompt
    assert samples[0].image_key == samples[2].image_key
    right = {"5": "C", "1000005": "B", "2000005": "A"}
    assert suite.score(right).metrics == {
        "circular": Metric.share(1, 3),
        "vanilla": Metric.share(1, 3),
    }
    assert suite.score({**right, "2000005": "C"}).metrics["circular"] == Metric.share(0, 3)
    assert suite.settings["rotations"] == "made here: as many as a question has options"
    suite.export(right, tmp_path / "out.tsv")
    lines = (tmp_path / "out.tsv").read_text(encoding="utf-8").splitlines()
    assert [line.split("\t")[0] for line in lines] == ["index", "5", "6", "7"]


def test_rotations_are_not_made_twice(file: Path) -> None:
    with pytest.raises(EvaluationError, match="line 3: index 1000000 is a rotation"):
        open_mmbench([file], circular=True)


@given(st.integers(2, 9), st.data())
def test_every_rotation_keeps_the_right_option(count: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, count - 1))
    options = tuple(f"option {place}" for place in range(count))
    base = MMBenchRow("4", "?", options, RowImage(b"x", "x"), "here", answer=ascii_uppercase[right])
    made = list(rotations(base))
    assert [one.id for one in made] == [str(4 + turn * MILLION) for turn in range(1, count)]
    assert len({one.options for one in (base, *made)}) == count
    for one in made:
        assert one.answer and one.options[ascii_uppercase.index(one.answer)] == options[right]
        assert sorted(one.options) == sorted(options)
    # Over all rotations the right option stands once in every place.
    letters = sorted(one.answer or "" for one in (base, *made))
    assert letters == list(ascii_uppercase[:count])


# ---- files that cannot be used -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"bench.tsv, line 1: the tab-separated header lacks the columns 'index', 'image'"),
        ("index,image,question,A,B\n", "lacks the columns"),
        ("index\timage\tquestion\tA\n", "lacks the column 'B'$"),
        ("index\timage\tquestion\tA\tB\n", "holds no rows"),
        ("index\timage\tquestion\tA\tB\tA\n", "line 1: repeated columns A"),
        ("index\timage\tquestion\tA\tB\n0\ti\tq\ta\tb\n1\ti\tq\ta\tb\tc\n", "line 3: 6 fields"),
        ("index\timage\tquestion\tA\tB\n0\ti\tq\ta\tb\n0\ti\tq\ta\tb\n",
         "line 3: repeats the id '0' of .*line 2"),
        (b"index\timage\tquestion\tA\tB\n0\ti\t\xff\ta\tb\n", "is not UTF-8 text"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "bench.tsv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(EvaluationError, match=message):
        open_mmbench([path])


def test_a_missing_file_and_an_unknown_language_are_refused(file: Path) -> None:
    with pytest.raises(EvaluationError, match="none.tsv: cannot be read: No such file"):
        open_mmbench([file.parent / "none.tsv"])
    with pytest.raises(EvaluationError, match="language 'de' is not en or cn"):
        open_mmbench([file], "de")


def test_large_images_are_read_and_the_limit_of_others_stays(tmp_path: Path) -> None:
    large = b"\x89PNG" + bytes(300_000)
    cells = {"image": base64.b64encode(large).decode()}
    paths = [write(tmp_path / f"{name}.tsv", [row(0, **cells)] * 1) for name in "abc"]
    limit = csv.field_size_limit()
    found: list[int] = []

    def read(path: Path) -> None:
        for _ in range(20):
            [sample] = open_mmbench([path]).samples()
            found.append(len(sample.images[0]))

    threads = [threading.Thread(target=read, args=(path,)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [len(large)] * 60
    assert csv.field_size_limit() == limit


def test_a_byte_order_mark_is_no_part_of_the_header(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert len(open_mmbench([file]).samples()) == 20


@pytest.mark.parametrize(
    ("text", "index"),
    [("7", 7), ("007", 7), ("7.0", 7), ("-1", None), ("", None), ("7.5", None), ("٣", None),
     ("1" * 19, None), ("1e3", None)],
)  # fmt: skip
def test_index(text: str, index: int | None) -> None:
    assert index_of(text) == index


# ---- letters -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"), ("B.", "B"), ("(B)", "B"), (" B\n", "B"), ("B: pear", "B"), ("**B**", "B"),
        ("The answer is B", "B"), ("The answer is A", "A"), ("A", "A"), ("A.", "A"),
        ("答案是B。", "B"), ("B、梨", "B"),
        ("pear", "B"), ("Pear.", "B"), ("I see a pear on the table", "B"),
        ("A pear lies on the table", "B"),  # A is an article
        ("B is my answer since the fruit that I see is round", None),  # too far from the end
        ("A pear", "B"), ("A is right", "A"), ("A dog lies here", None), ("A.\npear", "B"),
        ("A or B", None), ("A and A", "A"), ("E", None), ("b", None), ("", None),
        ("apple or pear", None), ("spearmint", None), ("AB", None), ("B2", None),
    ],
)  # fmt: skip
def test_letter_of_an_answer(answer: str, letter: str | None) -> None:
    assert chosen_letter(answer, FRUIT) == letter


def test_letter_by_text_takes_the_exact_option_first() -> None:
    assert chosen_letter("cat and dog", ["cat", "cat and dog"]) == "B"
    assert chosen_letter("it is a cat and dog", ["cat", "cat and dog"]) is None
    assert chosen_letter("这是一只猫", ["猫", "狗"]) == "A"
    assert chosen_letter("same", ["same", "same"]) is None
    assert chosen_letter("anything", ["!", "?"]) is None


@given(st.text(), st.lists(st.text(max_size=8), min_size=2, max_size=8))
def test_letters_are_those_of_options(answer: str, options: list[str]) -> None:
    letter = chosen_letter(answer, options)
    assert letter is None or ascii_uppercase.index(letter) < len(options)
    for place, name in enumerate(ascii_uppercase[: len(options)]):
        assert chosen_letter(name, options) == ascii_uppercase[place]


def test_prompt_of_options() -> None:
    assert multiple_choice_prompt("Q?", ["a", "b"], language="cn") == (
        "Q?\nA. a\nB. b\n请直接回答选项字母。"
    )


@pytest.mark.parametrize(
    "answer", ["B. A cat", "(B) A cat", "The answer is B. A cat", "A cat (B)", "B. A black one"]
)
def test_an_article_is_no_second_letter(answer: str) -> None:
    assert chosen_letter(answer, ["A dog", "A cat"]) == "B"


@pytest.mark.parametrize("answer", ["A or B", "A. or B.", "A dog or a cat, B", "B. A mix or C"])
def test_several_letters_without_one_text_are_unclear(answer: str) -> None:
    assert chosen_letter(answer, ["A dog", "A cat", "A cow"]) is None


def write_table(path: Path, rows: list[dict[str, object]]) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, delimiter="\t", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_question_without_all_of_its_rotations_is_not_circular(tmp_path: Path) -> None:
    rows = [*rotated(row(1), 4), *rotated(row(2), 4)]
    suite = open_mmbench([write_table(tmp_path / "m.tsv", rows)])
    part = suite.select({"1", "1000001", "2000001", "3000001", "2"})
    answers = {"1": "A", "1000001": "D", "2000001": "C", "3000001": "A", "2": "A"}
    scores = part.score(answers)
    assert scores.metrics["circular"].count == 1 and scores.metrics["circular"].value == 0
    assert scores.metrics["vanilla"].count == 2 and scores.metrics["vanilla"].value == 1
    assert part.settings["questions_left_out_of_circular"] == 1
    assert "questions_left_out_of_circular" not in suite.settings
    again = part.select({"1", "2"})
    assert again.score(answers).metrics["circular"].count == 0
    assert again.settings["questions_left_out_of_circular"] == 2
    assert again.settings["rotations"].startswith("none")


def test_a_part_without_rows_exports_a_header(tmp_path: Path) -> None:
    suite = open_mmbench([write_table(tmp_path / "m.tsv", [row(1)])])
    suite.select(set()).export({}, tmp_path / "out.tsv")
    assert (tmp_path / "out.tsv").read_text() == "index\tquestion\tprediction\n"


def test_the_same_bytes_are_kept_once(tmp_path: Path) -> None:
    rows = [row(1), row(2), row(3, image=encoded("blue"))]
    samples = open_mmbench([write_table(tmp_path / "m.tsv", rows)]).samples()
    assert samples[0].images[0] is samples[1].images[0]
    assert samples[2].images[0] == png("blue")


@pytest.mark.parametrize("end", ["", 'x"y\n', 'x" \n2\tb\tc\td\te\n'])
def test_a_quote_that_is_not_closed_swallows_no_rows(tmp_path: Path, end: str) -> None:
    path = tmp_path / "m.tsv"
    image = encoded("red")
    head = f"index\timage\tquestion\tA\tB\n0\t{image}\tWhich?\ta\tb\n"
    path.write_text(head + f'1\t{image}\t"Which?\ta\tb\n2\t{image}\tWhich?\ta\tb\n' + end)
    with pytest.raises(EvaluationError, match=r"m\.tsv, line 3: not a tab-separated row"):
        open_mmbench([path])


def test_quotes_as_tables_are_written_are_read(tmp_path: Path) -> None:
    question = 'Who says "hi",\nand\t"where"?'
    path = write_table(tmp_path / "m.tsv", [row(1, question=question, hint='5" wide')])
    [sample] = open_mmbench([path]).samples()
    assert sample.prompt.startswith(f'5" wide\n{question}\nA. apple')
