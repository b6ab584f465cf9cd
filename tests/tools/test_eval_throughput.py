"""The tool runs and says what it promises. No figure of time is asserted."""

import json
from pathlib import Path
from types import ModuleType

import pytest

from helpers.models import load_tool


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("eval_throughput")


@pytest.mark.slow
def test_both_ways_answer_the_same(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    words = ("--images", "2", "--rounds", "1", "--questions", "1", "2", "4", "--json", str(file))
    assert tool.main([*words, "--dtype", "float32"]) == 0
    content, out = json.loads(file.read_text()), capsys.readouterr().out
    rows = {row["questions_per_image"]: row for row in content["rows"]}
    assert [(row["questions"], row["bound"]) for row in rows.values()] == [
        *((2, 1.5), (4, None), (8, 2.5))
    ]
    for row in rows.values():
        rates = row["questions_per_second"]
        assert row["ratio"] == pytest.approx(rates["batched"] / rates["one by one"])
        assert row["different_answers"] == 0
        if row["bound"]:
            assert row["verdict"] == ("PASS" if row["ratio"] >= row["bound"] else "SHORT")
    assert content["settings"]["dtype"] == "float32" and "llava-tiny-scenes" in out


def test_different_answers_fail(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(self: object) -> None:
        self.answers["batched"] = dict.fromkeys(self.answers["one by one"], "?")  # type: ignore

    monkeypatch.setattr(tool.Asking, "batched", wrong)
    words = ["--images", "2", "--rounds", "1", "--questions", "1", "--size", "tiny"]
    more = ["--layers", "1", "--max-new-tokens", "2"]
    assert tool.main([*words, *more, "--dtype", "float32"]) == 1
    assert "2 of 2 answers differ" in capsys.readouterr().out
    assert tool.main([*words, *more]) == 0  # rounding of random weights in 16 bit


@pytest.mark.parametrize("count", ["0", "11"])
def test_more_questions_than_families_are_refused(
    tool: ModuleType, count: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        tool.parse(["--questions", "1", count])
    assert end.value.code == 2
    assert "--questions: must be 1 to 10" in capsys.readouterr().err
