"""Every block of the documentation runs, unless its mark says what it needs."""

import ast
import contextlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers.models import ROOT
from helpers.pages import PAGES, Block, find_blocks, read_page, split_statements
from llava_lite.cli.program import main


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that examples use, so that the checkout stays as it is. The folder `bin`
    has the program under its name."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("weights/tiny", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    programs = {"llava-lite": f"{sys.executable} -m llava_lite", "python": sys.executable}
    (folder / "bin").mkdir()
    for name, command in programs.items():
        script = folder / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        script.chmod(0o755)
    return folder


@pytest.fixture
def in_checkout(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(checkout)
    monkeypatch.setenv("PATH", f"{checkout / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    yield checkout


def run_bash(block: Block) -> str:
    """Run a block, and return what it wrote to stdout."""
    statements = split_statements(block.code)
    if any("&" in statement for statement in statements):  # a shell has to see all of them
        return run_shell(block.code)
    return "".join(map(run_statement, statements))


def run_statement(statement: str) -> str:
    """Run the program and the tools in this process: importing torch again would take seconds."""
    code = statement.split("  #")[0]
    if set("|<>$*") & set(code) or not code.startswith(("llava-lite ", "python tools/")):
        return run_shell(statement)
    program, *arguments = shlex.split(code)
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        exit_code = main(arguments) if program == "llava-lite" else run_tool(*arguments)
    assert not exit_code, stderr.getvalue()
    return stdout.getvalue()


def run_tool(path: str, *arguments: str) -> object:
    """Run a file of tools/ as a script, and return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [path, *arguments])
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as end:
            return end.code
    return 0


def run_shell(code: str) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code], capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_python(code: str, namespace: dict[str, object]) -> None:
    """Run a block. A statement that ends in `# -> TEXT` must print this text."""
    lines = code.splitlines()
    for statement in ast.parse(code).body:
        with contextlib.redirect_stdout(io.StringIO()) as stdout:
            exec(compile(ast.Module([statement], []), "<block>", "exec"), namespace)
        assert statement.end_lineno is not None
        _, arrow, expected = lines[statement.end_lineno - 1].partition("# -> ")
        assert not arrow or stdout.getvalue() == expected + "\n"


@pytest.mark.parametrize("page", PAGES)
def test_blocks_run(page: str, in_checkout: Path) -> None:
    """In order, the Python of a page in one namespace. A reader can start at the top and go on."""
    namespace = {"__name__": "__main__"}
    for block in find_blocks(page):
        if block.needs:
            continue
        if block.language == "bash":
            run_bash(block)
        elif block.language == "python":
            run_python(block.code, namespace)


def test_first_command_prints_ring(in_checkout: Path) -> None:
    """The README and the quickstart say so."""
    first = next(block for block in find_blocks("docs/quickstart.md") if block.language == "bash")
    assert first.code.strip() in read_page("README.md")
    assert run_bash(first) == "ring\n"


def test_tour_runs(in_checkout: Path) -> None:
    """The code of the notebook runs in order, and its stored outputs are complete and small."""
    path = ROOT / "docs" / "tour.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    namespace = {"__name__": "__main__"}
    with contextlib.redirect_stdout(io.StringIO()) as stdout, torch.enable_grad():
        for cell in cells:  # the context ends with the tour's own choice about gradients
            exec(compile("".join(cell["source"]), path.name, "exec"), namespace)
    assert stdout.getvalue().endswith("ring\n")
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert path.stat().st_size < 300_000
    assert not re.search(r"/(home|root|tmp|Users)/", path.read_text(encoding="utf-8"))
