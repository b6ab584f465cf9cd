"""`llava-lite batch`: rows in, lines out, and nothing lost when it is cut off."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from helpers.models import ROOT
from helpers.processes import Fork, start_program
from llava_lite import saving
from llava_lite.cli.program import main
from llava_lite.cli.progress import Progress
from llava_lite.errors import ImageError
from llava_lite.generation import batch_file, failures
from llava_lite.generation.answer import Answer
from llava_lite.generation.batch_file import BatchError, plan, read_rows, run_batch, select_shard
from llava_lite.generation.model import Model
from llava_lite.reduction import FastV, Reduction, ToMe

COLORS = ("red", "green", "blue", "white", "black")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of five small images."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number, color in enumerate(COLORS):
        Image.new("RGB", (20 + 7 * number, 30), color).save(folder / f"{color}.png")
    return folder


class Echo:
    """Stands for a model: answers with the prompt, and notes what it was asked at once."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def generate(self, image: list[Any], prompt: list[str], **_: Any) -> list[Answer]:
        self.batches.append(prompt)
        for sources in image:
            for source in sources:
                if not Path(source).is_file():
                    raise ImageError(f"{source}: no such file")
        return [
            Answer(f"{text}! {len(sources)}\u2028")
            for text, sources in zip(prompt, image, strict=True)
        ]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def questions(images: Path, count: int) -> Path:
    """A JSONL file of `count` questions beside the images."""
    rows = [
        {"id": f"q{n}", "image": f"{COLORS[n % 5]}.png", "prompt": f"question {n}"}
        for n in range(count)
    ]
    return write_jsonl(images / "rows.jsonl", rows)


# ---- input -------------------------------------------------------------------------------------


def test_jsonl_fields_and_their_other_names(images: Path) -> None:
    path = write_jsonl(
        images / "rows.jsonl",
        [
            {"id": "a", "image": "red.png", "prompt": "one"},
            {"question_id": 7, "images": ["red.png", "blue.png"], "text": "two"},
            {"image": None, "question": "three", "answer": "ignored"},
        ],
    )
    rows = read_rows(path)
    assert [(row.id, row.prompt, row.image) for row in rows] == [
        ("a", "one", "red.png"),
        (7, "two", ["red.png", "blue.png"]),
        (3, "three", None),
    ]
    assert rows[1].sources == [str(images / "red.png"), str(images / "blue.png")]
    assert rows[2].sources == []


def test_sources_that_are_not_relative_stay(images: Path) -> None:
    absolute = str(images / "red.png")
    sources = [absolute, "https://example.org/a.png", "data:image/png;base64,AA=="]
    [row] = read_rows(write_jsonl(images / "rows.jsonl", [{"images": sources, "prompt": "x"}]))
    assert row.sources == sources


def test_csv_with_header_quotes_and_empty_cells(images: Path) -> None:
    path = images / "rows.csv"
    path.write_text(
        '\ufeffid,image,prompt\na,red.png,"What, ""exactly""?"\nb,,"two\nlines"\n', encoding="utf-8"
    )
    rows = read_rows(path)
    assert [(row.id, row.prompt, row.image) for row in rows] == [
        ("a", 'What, "exactly"?', "red.png"),
        ("b", "two\nlines", None),
    ]


def test_folder_in_order_with_subfolders(images: Path) -> None:
    (images / "sub").mkdir()
    Image.new("RGB", (9, 9)).save(images / "sub" / "deep.JPG", "JPEG")
    (images / "notes.txt").write_text("no image")
    (images / ".hidden.png").write_bytes(b"")
    rows = read_rows(images, "Describe.")
    names = [f"{color}.png" for color in sorted(COLORS)]
    assert [row.id for row in rows] == sorted([*names, "sub/deep.JPG"])
    assert {row.prompt for row in rows} == {"Describe."}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"prompt": "a"}\n{"prompt": \n', "line 2: not valid JSON"),
        ('{"prompt": "a"}\n\n["b"]\n', "line 3: a list, not a JSON object"),
        ('{"prompt": "a", "id": 1}\n{"id": 2}\n', "line 2: needs a prompt"),
        ('{"prompt": ""}\n', "line 1: needs a prompt"),
        ('{"prompt": 5}\n', "line 1: needs a prompt"),
        ('{"prompt": "a", "id": 1.5}\n', "line 1: the id 1.5"),
        ('{"prompt": "a", "id": true}\n', "line 1: the id True"),
        ('{"prompt": "a", "image": 3}\n', "line 1: the image 3"),
        ('{"prompt": "a", "images": ["b", ""]}\n', "line 1: the image"),
        ('{"prompt": "a", "text": "b"}\n', "line 1: has both 'prompt' and 'text'"),
        ('{"prompt": "a", "id": "x"}\n\n{"prompt": "b", "id": "x"}\n', "lines 1 and 3"),
        ("\n", "contains no rows"),
    ],
)
def test_malformed_jsonl_names_file_and_line(tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(BatchError, match=problem) as caught:
        read_rows(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("id,prompt\na,b,c\n", "line 2: needs 2 columns"),
        ("id,prompt\na,b\nc\n", "line 3: needs 2 columns"),
        ("id,image\na,b\n", "line 2: needs a prompt"),
        ('id,prompt\na,"b\n', "not valid CSV"),
        ("id,prompt\n", "contains no rows"),
    ],
)
def test_malformed_csv_names_file_and_line(tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(content)
    with pytest.raises(BatchError, match=problem) as caught:
        read_rows(path)
    assert str(path) in str(caught.value)


def test_other_unusable_input(tmp_path: Path) -> None:
    with pytest.raises(BatchError, match="no such file or folder"):
        read_rows(tmp_path / "absent.jsonl")
    with pytest.raises(BatchError, match="contains no images"):
        read_rows(tmp_path, "Describe.")
    with pytest.raises(BatchError, match="needs a prompt"):
        read_rows(tmp_path)
    (tmp_path / "binary.jsonl").write_bytes(b'{"prompt": "\xff\xfe"}\n')
    with pytest.raises(BatchError, match="not UTF-8"):
        read_rows(tmp_path / "binary.jsonl")


@pytest.mark.parametrize("total", [1, 2, 3, 7])
def test_shards_partition_the_rows(images: Path, total: int) -> None:
    rows = read_rows(questions(images, 5))
    shards = [select_shard(rows, (part, total)) for part in range(1, total + 1)]
    assert sorted(row.id for shard in shards for row in shard) == [row.id for row in rows]
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@pytest.mark.parametrize("shard", [(0, 2), (3, 2), (1, 0), (-1, 2)])
def test_shard_out_of_range(shard: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="1 <= i <= n"):
        select_shard([], shard)


# ---- run ---------------------------------------------------------------------------------------


def test_lines_are_the_single_answers_in_order(images: Path, tiny_model: Model) -> None:
    path = write_jsonl(
        images / "rows.jsonl",
        [
            {"id": 1, "image": "red.png", "prompt": "What color is the star?"},
            {"id": 2, "images": ["green.png", "blue.png"], "prompt": "Which?"},
            {"id": 3, "prompt": "No image here"},
        ],
    )
    rows, output = read_rows(path), images / "out.jsonl"
    summary = run_batch(tiny_model, rows, output, batch_size=2, max_new_tokens=8)
    assert (summary.answered, summary.failed, summary.present) == (3, 0, 0)
    for row, record in zip(rows, read_jsonl(output), strict=True):
        answer = tiny_model.generate(row.sources, row.prompt, max_new_tokens=8)
        assert record == {
            "id": row.id,
            "prompt": row.prompt,
            "image": row.image,
            "answer": str(answer),
            "finish_reason": answer.finish_reason,
            "usage": answer.usage,
        }


def test_bad_image_costs_one_row(images: Path, tiny_model: Model) -> None:
    (images / "green.png").write_bytes(b"no image at all")
    whole = (images / "blue.png").read_bytes()
    (images / "blue.png").write_bytes(whole[: len(whole) // 2])
    rows, output = read_rows(questions(images, 5)), images / "out.jsonl"
    summary = run_batch(tiny_model, rows, output, batch_size=5, max_new_tokens=2)
    records = read_jsonl(output)
    assert [record["id"] for record in records] == [row.id for row in rows]
    assert ["error" in record for record in records] == [False, True, True, False, False]
    assert "green.png" in records[1]["error"] and "blue.png" in records[2]["error"]
    assert all(("answer" in record) != ("error" in record) for record in records)
    assert (summary.answered, summary.failed) == (3, 2)
    assert summary.first_error == records[1]


def test_prompt_beyond_the_context_costs_one_row(images: Path, tiny_model: Model) -> None:
    prompts = ["short", "long " * 400, "<image> without one"]
    path = write_jsonl(images / "rows.jsonl", [{"prompt": prompt} for prompt in prompts])
    run_batch(tiny_model, read_rows(path), images / "out.jsonl", max_new_tokens=2)
    records = read_jsonl(images / "out.jsonl")
    assert "answer" in records[0]
    assert "context" in records[1]["error"]
    assert "<image>" in records[2]["error"]


def test_bad_option_ends_the_run(images: Path, tiny_model: Model) -> None:
    rows, output = read_rows(questions(images, 2)), images / "out.jsonl"
    with pytest.raises(ValueError, match="temperature"):
        run_batch(tiny_model, rows, output, temperature=-1.0)
    assert not output.exists() or not output.read_bytes()


def test_batches_have_the_size_asked_for(images: Path) -> None:
    model, rows = Echo(), read_rows(questions(images, 5))
    seen = []
    run_batch(model, rows, images / "out.jsonl", batch_size=2, on_record=seen.append)
    assert [len(prompts) for prompts in model.batches] == [2, 2, 1]
    assert seen == read_jsonl(images / "out.jsonl")
    with pytest.raises(ValueError, match="batch_size 0"):
        run_batch(model, rows, images / "other.jsonl", batch_size=0)


def test_every_batch_is_on_disk_before_the_next(images: Path) -> None:
    output, lines = images / "out.jsonl", []

    class Watching(Echo):
        def generate(self, *arguments: Any, **options: Any) -> list[Answer]:
            lines.append(len(read_jsonl(output)))
            return super().generate(*arguments, **options)

    run_batch(Watching(), read_rows(questions(images, 5)), output, batch_size=2)
    assert lines == [0, 2, 4]


def test_output_in_use_is_refused(images: Path) -> None:
    rows, output = read_rows(questions(images, 2)), images / "out.jsonl"
    output.write_text("precious\n")
    with pytest.raises(BatchError, match="--resume"):
        run_batch(Echo(), rows, output)
    with pytest.raises(BatchError, match="out.jsonl, line 1"):
        run_batch(Echo(), rows, output, resume=True)
    assert output.read_text() == "precious\n"


@pytest.mark.parametrize("content", [b"precious", b"\x89PNG\r\n\x1a\n\0\0", b'{"id": 1, \0'])
def test_only_half_of_our_own_line_is_dropped(images: Path, content: bytes) -> None:
    output = images / "out.jsonl"
    output.write_bytes(content)
    with pytest.raises(BatchError, match="out.jsonl, line"):
        run_batch(Echo(), read_rows(questions(images, 2)), output, resume=True)
    assert output.read_bytes() == content


def test_input_as_output_is_refused(images: Path) -> None:
    path = questions(images, 2)
    before = path.read_bytes()
    with pytest.raises(BatchError, match="not a line of a batch output"):
        run_batch(Echo(), read_rows(path), path, resume=True)
    assert path.read_bytes() == before


def test_missing_output_folder(images: Path) -> None:
    with pytest.raises(BatchError, match="does not exist"):
        plan(read_rows(questions(images, 1)), images / "absent" / "out.jsonl")


def test_resume_after_a_cut_at_any_byte_equals_a_clean_run(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(images)
    path = write_jsonl(
        Path("rows.jsonl"),
        [{"id": n, "image": f"{n}.png", "prompt": "x"} for n in (0, 1, 2)],
    )
    Path("0.png").touch()
    Path("2.png").touch()  # 1.png is missing: an error line is part of it
    rows, output = read_rows(path), Path("out.jsonl")
    run_batch(Echo(), rows, output, batch_size=2)
    clean = output.read_bytes()
    assert clean.count(b"\n") == 3
    for size in range(len(clean)):
        output.write_bytes(clean[:size])
        model = Echo()
        summary = run_batch(model, rows, output, batch_size=2, resume=True)
        kept = clean[:size].count(b"\n")
        assert output.read_bytes() == clean
        assert (summary.answered + summary.present, summary.failed) == (2, 1)
        ran = [prompt for prompts in model.batches for prompt in prompts]
        # One failing row makes its batch run again row by row.
        assert len(ran) in range(3 - kept, 3 - kept + 3)


def test_errors_stay_unless_they_are_to_be_retried(images: Path) -> None:
    path, output = questions(images, 4), images / "out.jsonl"
    blue = (images / "blue.png").read_bytes()
    (images / "blue.png").unlink()
    rows = read_rows(path)
    run_batch(Echo(), rows, output)
    (images / "blue.png").write_bytes(blue)

    model = Echo()
    summary = run_batch(model, rows, output, resume=True)
    assert model.batches == []
    assert (summary.answered, summary.failed, summary.present) == (0, 1, 3)

    link = images / "link.jsonl"
    link.symlink_to(output)
    summary = run_batch(model, rows, link, resume=True, retry_errors=True)
    assert link.is_symlink()
    assert model.batches == [["question 2"]]
    assert (summary.answered, summary.failed, summary.present) == (1, 0, 3)
    records = read_jsonl(output)
    assert [record["id"] for record in records] == ["q0", "q1", "q3", "q2"]
    assert all("answer" in record for record in records)
    assert sorted(file.name for file in images.glob(".*")) == []


def test_same_id_for_another_question_is_refused(images: Path) -> None:
    output = images / "out.jsonl"
    run_batch(Echo(), read_rows(images, "Describe."), output)
    with pytest.raises(BatchError, match="line 1: id 'black.png' was asked with another prompt"):
        run_batch(Echo(), read_rows(images, "Count."), output, resume=True)


def test_lines_of_a_reduction_are_the_single_answers_and_name_it(
    images: Path, tiny_model: Model
) -> None:
    wish = Reduction(ToMe(keep=8), "logical", FastV(keep=3, layer=1))
    path = write_jsonl(
        images / "rows.jsonl",
        [
            {"id": 1, "image": "red.png", "prompt": "What color is the star?"},
            {"id": 2, "images": ["green.png", "blue.png"], "prompt": "Which?"},
            {"id": 3, "prompt": "No image here"},
            {"id": 4, "image": "absent.png", "prompt": "What?"},
        ],
    )
    rows, output = read_rows(path), images / "out.jsonl"
    run_batch(tiny_model, rows, output, batch_size=3, max_new_tokens=8, reduction=wish)
    records = read_jsonl(output)
    for row, record in zip(rows[:3], records, strict=False):
        answer = tiny_model.generate(row.sources, row.prompt, max_new_tokens=8, reduction=wish)
        assert (record["answer"], record["usage"]) == (str(answer), answer.usage)
    assert [record["usage"].get("kept_image_tokens") for record in records] == [3, 3, 0, None]
    assert "absent.png" in records[3]["error"]
    assert [record["reduction"] for record in records] == [repr(wish)] * 4
    with pytest.raises(BatchError, match="line 1: id 1 was asked with another reduction"):
        run_batch(tiny_model, rows, output, resume=True, reduction="tome-72")
    again = run_batch(tiny_model, rows, output, resume=True, reduction=wish)
    assert (again.present, again.answered, again.failed) == (3, 0, 1)
    assert read_jsonl(output) == records


def test_no_reduction_and_the_one_named_none_are_the_same(images: Path) -> None:
    output, rows = images / "out.jsonl", read_rows(images, "Describe.")
    run_batch(Echo(), rows, output, reduction="none")
    assert all("reduction" not in record for record in read_jsonl(output))
    assert run_batch(Echo(), rows, output, resume=True, reduction=None).present == 5


def test_lines_name_the_image_size(images: Path) -> None:
    output, rows = images / "out.jsonl", read_rows(images, "Describe.")
    run_batch(Echo(), rows, output, reduction="tome-72", image_size=768)
    assert {record["reduction"] for record in read_jsonl(output)} == {"tome-72 at 768 px"}
    with pytest.raises(BatchError, match="another reduction .tome-72 at 768 px, now none at 512"):
        run_batch(Echo(), rows, output, resume=True, image_size=512)


def test_unknown_reduction_shows_before_the_output_is_touched(images: Path) -> None:
    output = images / "out.jsonl"
    with pytest.raises(ValueError, match="unknown reduction 'best'"):
        run_batch(Echo(), read_rows(images, "Describe."), output, reduction="best")
    assert not output.exists()


def test_shards_may_share_an_output_one_after_the_other(images: Path) -> None:
    rows, output = read_rows(questions(images, 5)), images / "out.jsonl"
    run_batch(Echo(), rows, output, shard=(2, 2))
    summary = run_batch(Echo(), rows, output, shard=(1, 2), resume=True)
    assert (summary.answered, summary.present) == (3, 0)
    assert [record["id"] for record in read_jsonl(output)] == ["q1", "q3", "q0", "q2", "q4"]


def test_interrupt_leaves_complete_lines(images: Path) -> None:
    output = images / "out.jsonl"

    class Interrupted(Echo):
        def generate(self, *arguments: Any, **options: Any) -> list[Answer]:
            if len(self.batches) == 2:
                raise KeyboardInterrupt
            return super().generate(*arguments, **options)

    rows = read_rows(questions(images, 5))
    with pytest.raises(KeyboardInterrupt):
        run_batch(Interrupted(), rows, output, batch_size=2)
    assert [record["id"] for record in read_jsonl(output)] == ["q0", "q1", "q2", "q3"]
    run_batch(Echo(), rows, output, batch_size=2, resume=True)
    assert [record["id"] for record in read_jsonl(output)] == [row.id for row in rows]


def test_a_bug_is_not_taken_for_a_bad_row(images: Path) -> None:
    class Broken(Echo):
        def generate(self, *arguments: Any, **options: Any) -> list[Answer]:
            raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        run_batch(Broken(), read_rows(questions(images, 1)), images / "out.jsonl")


# ---- command line ------------------------------------------------------------------------------


def run_main(*arguments: Any) -> int:
    return main(["batch", *map(str, arguments), "-n", "3", "--threads", "1"])


def test_command_answers_a_folder(
    images: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = images / "out.jsonl"
    assert run_main(images, "-o", output, "-p", "Describe.", "-m", model_folder) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"{output}: 5 answered, 0 failed\n"
    assert [record["id"] for record in read_jsonl(output)] == sorted(f"{c}.png" for c in COLORS)


def test_command_reports_failed_rows_with_exit_code_1(
    images: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = questions(images, 4), images / "out.jsonl"
    (images / "blue.png").write_bytes(b"")
    arguments = (path, "-o", output, "-m", model_folder, "--batch-size", 3)
    assert run_main(*arguments) == 1
    printed = capsys.readouterr().err.splitlines()
    assert printed[0] == f"{output}: 3 answered, 1 failed"
    assert printed[1].startswith("first to fail: 'q2': ") and "blue.png" in printed[1]

    assert run_main(*arguments, "--resume") == 1
    assert "3 were there, 0 answered, 1 failed" in capsys.readouterr().err

    Image.new("RGB", (9, 9), "blue").save(images / "blue.png")
    assert run_main(*arguments, "--resume", "--retry-errors", "--quiet") == 0
    assert capsys.readouterr().err == ""


def test_problems_show_before_the_model_loads(
    images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "llava_lite.cli.wanted.load", lambda *_, **__: pytest.fail("the model was loaded")
    )
    path, output = questions(images, 2), images / "out.jsonl"
    output.write_text("precious\n")
    assert run_main(path, "-o", output) == 1
    assert capsys.readouterr().err.startswith(f"error: {output}: is not empty")
    assert output.read_text() == "precious\n"
    path.write_text('{"prompt": "a"}\n{"prompt"\n')
    assert run_main(path, "-o", images / "new.jsonl") == 1
    assert f"error: {path}, line 2: not valid JSON" in capsys.readouterr().err
    assert not (images / "new.jsonl").exists()


def test_finished_output_needs_no_model(
    images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, output = questions(images, 2), images / "out.jsonl"
    run_batch(Echo(), read_rows(path), output)
    monkeypatch.setattr(
        "llava_lite.cli.wanted.load", lambda *_, **__: pytest.fail("the model was loaded")
    )
    assert run_main(path, "-o", output, "--resume") == 0
    assert capsys.readouterr().err == f"{output}: 2 were there, 0 answered, 0 failed\n"


@pytest.mark.parametrize(
    "wrong",
    [
        ["--shard", "3/2"],
        ["--shard", "0/2"],
        ["--shard", "2"],
        ["--batch-size", "0"],
        ["--retry-errors"],
    ],
)
def test_wrong_usage(images: Path, wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(questions(images, 2), "-o", images / "out.jsonl", *wrong) == 2
    assert wrong[0] in capsys.readouterr().err
    assert not (images / "out.jsonl").exists()


def test_command_shards(images: Path, model_folder: Path) -> None:
    path = questions(images, 5)
    for part in (1, 2):
        output = images / f"out{part}.jsonl"
        arguments = ("-o", output, "-m", model_folder, "--shard", f"{part}/2", "--quiet")
        assert run_main(path, *arguments) == 0
    ids = [[record["id"] for record in read_jsonl(images / f"out{part}.jsonl")] for part in (1, 2)]
    assert ids == [["q0", "q2", "q4"], ["q1", "q3"]]


def test_command_interrupted(
    images: Path,
    model_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = images / "out.jsonl"

    def interrupted(progress: Progress, record: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "count", interrupted)
    arguments = ("-o", output, "-m", model_folder, "--batch-size", 2)
    assert run_main(questions(images, 3), *arguments) == 130
    assert len(read_jsonl(output)) == 2
    printed = capsys.readouterr().err.splitlines()
    assert printed == [
        f"{output} keeps all answers so far; resume with --resume",
        "interrupted",
    ]


def start_batch(path: Path, output: Path, model: Path) -> Fork:
    options = ("--batch-size", 1, "-n", 40, "--threads", 1, "--quiet")
    return start_program("batch", path, "-o", output, "-m", model, "--resume", *options)


def wait_for_lines(output: Path, count: int, process: Fork) -> None:
    """Until the output has so many lines, or the process has ended."""
    deadline = time.monotonic() + 120
    while not output.exists() or output.read_bytes().count(b"\n") < count:
        assert process.poll() is None, "it ended before it could be stopped"
        assert time.monotonic() < deadline, "it wrote nothing"
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="kills by POSIX signals")
def test_killed_and_interrupted_runs_equal_a_clean_one(
    images: Path, model_folder: Path, tiny_model: Model
) -> None:
    path, output, clean = questions(images, 60), images / "out.jsonl", images / "clean.jsonl"
    rows = read_rows(path)
    run_batch(tiny_model, rows, clean, max_new_tokens=40)
    for lines, sent, code in ((3, signal.SIGKILL, -9), (20, signal.SIGINT, 130)):
        process = start_batch(path, output, model_folder)
        wait_for_lines(output, lines, process)
        process.send_signal(sent)
        assert process.wait(timeout=60) == code
        assert output.read_bytes().count(b"\n") < 60
    run_batch(tiny_model, rows, output, resume=True, max_new_tokens=40)
    assert output.read_bytes() == clean.read_bytes()


def test_module_is_light() -> None:
    """Usage errors and `--shard` must not wait for torch."""
    script = f"import sys; import {batch_file.__name__}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


def test_together_or_each_alone() -> None:
    """All at once, and only if that fails each by itself; only what fails alone has failed."""
    calls: list[str] = []

    def work(items: Sequence[str]) -> list[str]:
        calls.append("".join(items))
        if "x" in items:
            raise OSError("x is bad")
        return [item.upper() for item in items]

    def tried(items: str) -> tuple[list[str], list[str]]:
        calls.clear()
        return failures.try_together(items, work, lambda item, error: f"{item}: {error}"), calls

    assert tried("abc") == (["A", "B", "C"], ["abc"])
    assert tried("axc") == (["A", "x: x is bad", "C"], ["axc", "a", "x", "c"])
    assert tried("x") == (["x: x is bad"], ["x"])
    assert tried("") == ([], [])


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: an illegal memory access"), KeyError("no row's error")]
)
def test_what_is_no_rows_error_is_not_tried_again(error: Exception) -> None:
    calls: list[int] = []

    def work(items: Sequence[str]) -> list[str]:
        calls.append(len(items))
        raise error

    with pytest.raises(type(error)) as raised:
        failures.try_together("abc", work, lambda item, error: item)
    assert raised.value is error and calls == [3]


def test_an_accelerator_that_fails_ends_the_run(
    tmp_path: Path, tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(type(tiny_model), "generate", failing)
    rows = [batch_file.Row(n, "star?", None, tmp_path, n) for n in range(3)]
    with pytest.raises(RuntimeError, match="CUDA error"):
        batch_file.run_batch(tiny_model, rows, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == b""
    oom = RuntimeError("CUDA error: out of memory")
    assert not failures.is_accelerator_failure(oom)


def resume_of(tmp_path: Path) -> tuple[list[batch_file.Row], Path, batch_file.Plan]:
    """Two rows, the first answered and the second failed, and the plan to ask the second again."""
    rows = [
        batch_file.Row(number, f"question {number}", None, tmp_path, number) for number in (1, 2)
    ]
    output = tmp_path / "answers.jsonl"
    answered = {**rows[0].start_record(), "answer": "yes"}
    failed = {**rows[1].start_record(), "error": "broken"}
    output.write_bytes(saving.lines_of(answered, failed))
    return rows, output, batch_file.plan(rows, output, resume=True, retry_errors=True)


def test_one_run_writes_at_a_time(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    rows, output, work = resume_of(tmp_path)
    again = {**rows[1].start_record(), "answer": "no"}

    def meanwhile() -> Iterator[list[dict[str, Any]]]:
        before = output.read_bytes()
        late = batch_file.plan(rows, output, resume=True)
        with pytest.raises(batch_file.BatchError, match="another run is writing to it"):
            batch_file.append_records(output, late, [[again]], None)
        assert output.read_bytes() == before
        yield [again]

    summary = batch_file.append_records(output, work, meanwhile(), None)
    assert (summary.answered, summary.failed) == (1, 0)
    assert [json.loads(line).get("answer") for line in output.open()] == ["yes", "no"]


def test_nothing_is_cut_off_that_another_run_wrote_since_the_plan(tmp_path: Path) -> None:
    rows, output, work = resume_of(tmp_path)
    with output.open("ab") as file:
        file.write(saving.lines_of({**rows[1].start_record(), "answer": "no"}))
    before = output.read_bytes()
    with pytest.raises(batch_file.BatchError, match="another run has changed it"):
        batch_file.append_records(output, work, [], None)
    assert output.read_bytes() == before


def test_an_existing_output_is_appended_to_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder may be read-only; a new file needs the folder, and an old one its own mode."""
    output, denied = tmp_path / "out.jsonl", {tmp_path}
    output.write_text("")
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) not in denied)
    saving.check_output(output, BatchError, appends=True)
    for path in (output, tmp_path / "new.jsonl"):
        with pytest.raises(BatchError, match="the folder .* cannot be written to"):
            saving.check_output(path, BatchError)
    denied.add(output)
    with pytest.raises(BatchError, match="out.jsonl: cannot be written to"):
        saving.check_output(output, BatchError, appends=True)
