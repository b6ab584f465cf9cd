"""The tools that are a subcommand of the program under another name."""

import runpy
import sys

import pytest

from helpers.models import ROOT


@pytest.mark.parametrize(
    ("tool", "text"), [("convert_weights", "SOURCE"), ("find_thresholds", "IMAGES")]
)
def test_a_wrapper_is_its_subcommand(
    tool: str, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [tool, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "tools" / f"{tool}.py"), run_name="__main__")
    assert end.value.code == 0 and text in capsys.readouterr().out
