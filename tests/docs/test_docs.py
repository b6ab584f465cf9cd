"""The facts in the documentation: links, names, commands, flags, and the length of sentences."""

import argparse
import importlib
import re
import shlex
import statistics
from functools import cache
from pathlib import Path

import pytest

import llava_lite
from helpers.models import ROOT, load_tool
from helpers.pages import (
    PAGES,
    TEXTS,
    count_words,
    find_anchors,
    find_blocks,
    find_code_spans,
    find_links,
    read_page,
    split_statements,
)
from llava_lite.cli.eval import with_command
from llava_lite.cli.program import build_parser
from llava_lite.evaluation.suites.registry import SUITES
from llava_lite.reduction import REDUCTIONS

# The things that a block may need and a test does not have.
NEEDS = {
    "data",
    "gpu",
    "hours",
    "install",
    "lmms-eval",
    "minutes",
    "ray",
    "server",
    "terminal",
    "vlmevalkit",
    "weights",
}

# Flags of other programs: torchrun, pip, curl, lmms-eval, VLMEvalKit, git, ruff.
FOREIGN_FLAGS = {
    "--base-url",
    "--batch_size",
    "--check",
    "--force_simple",
    "--index-url",
    "--model",
    "--model_args",
    "--nproc-per-node",
    "--oneline",
    "--retry",
    "--retry-connrefused",
    "--retry-delay",
    "--silent",
    "--strict",
    "--tasks",
}
FOREIGN_NAMES = {"async_openai"}  # a model of lmms-eval
FOREIGN_FILES = {"run.py"}  # of VLMEvalKit


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    """All option strings of a parser and of its commands."""
    found = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found = found.union(*(options_of(command) for command in action.choices.values()))
    return found


def options_of_tools() -> set[str]:
    """The options that the files of tools/ declare."""
    sources = (path.read_text() for path in (ROOT / "tools").rglob("*.py"))
    found = {flag for source in sources for flag in re.findall(r'"(--[\w-]+)"', source)}
    return found | options_of(load_tool("train_tiny").build_parser())  # has made-up names too


@pytest.mark.parametrize("page", PAGES)
def test_blocks_have_known_marks(page: str) -> None:
    blocks = find_blocks(page)
    assert read_page(page).count("\n```") == 2 * len(blocks), "a fence that is not closed"
    assert {block.needs for block in blocks} <= NEEDS | {""}
    assert {block.language for block in blocks} <= {"bash", "python", "text", ""}


@pytest.mark.parametrize("page", [*PAGES, *TEXTS])
def test_links_have_targets(page: str) -> None:
    for link in find_links(page):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in find_anchors(target), link


def exists(name: str) -> bool:
    """Whether a path in a page names something here, from the root or from the package."""
    return any((ROOT / folder / name).exists() for folder in (".", "llava_lite"))


@pytest.mark.parametrize("page", [*PAGES, *TEXTS])
def test_named_files_exist(page: str) -> None:
    """`llava_lite/tome.py`, `inputs/images.py`, `tome.py` and `evaluation/` are there.
    `NAME.py` stands for any file, and `runs/` has the results of commands."""
    for span in find_code_spans(page):
        known = exists(span.split("/")[0]) or (re.fullmatch(r"[\w/]+\.py", span) is not None)
        placeholder = re.search(r"[A-Z]{3}|^runs/", span) is not None
        if known and re.fullmatch(r"[\w./-]+(\.\w+|/)", span) and not placeholder:
            assert exists(span) or span in FOREIGN_FILES, span


@pytest.mark.parametrize("page", PAGES)
def test_named_objects_exist(page: str) -> None:
    """`llava_lite.generation.model` and the entries of the API page are there."""
    named = re.findall(r"^::: (\S+)$", read_page(page), re.MULTILINE)
    spans = find_code_spans(page)
    named += [span for span in spans if re.fullmatch(r"llava_lite(\.\w+)+", span)]
    for name in named:
        found = llava_lite
        for part in name.split(".")[1:]:
            try:
                found = getattr(found, part)
            except AttributeError:  # a room that nobody has imported yet
                found = importlib.import_module(f"{found.__name__}.{part}")


@pytest.mark.parametrize("page", [*PAGES, *TEXTS])
def test_named_identifiers_exist(page: str) -> None:
    """Names such as `merge_tokens`, `max_new_tokens` and `FastV(keep=36)` are words of the code."""
    for span in find_code_spans(page):
        name = re.fullmatch(r"(\w+(?:\.\w+)*)(\(.*\))?", span)
        if name is not None and not exists(span):
            unknown = set(name[1].split(".")) - words_of_code() - FOREIGN_NAMES
            assert not {word for word in unknown if "NAME" not in word}, span


@cache
def words_of_code() -> set[str]:
    """All words in the package, its tools and its data."""
    folders = ("llava_lite", "tools", "weights/tiny")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    paths = [path for path in paths if path.suffix in (".py", ".json")]
    texts = (path.read_text() for path in (*paths, ROOT / "pyproject.toml"))
    return {word for text in texts for word in re.findall(r"\w+", text)}


def test_api_page_has_every_public_name() -> None:
    page = read_page("docs/api.md")
    missing = [name for name in llava_lite.__all__ if not re.search(rf"\b{name}\b", page)]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_understood(page: str) -> None:
    """The program's parser accepts every `llava-lite` line, also those that no test can run."""
    blocks = [block.code for block in find_blocks(page) if block.language == "bash"]
    statements = [statement for code in blocks for statement in split_statements(code)]
    for statement in statements:
        for words in commands_in(statement):
            build_parser().parse_args(with_command(words))


def commands_in(statement: str) -> list[list[str]]:
    """The arguments of each call of `llava-lite` in a shell statement."""
    if "llava-lite " not in statement:
        return []
    lexer = shlex.shlex(statement.replace("\\\n", " "), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("|&;<>"):
            commands.append([])
        else:
            commands[-1].append(word)
    return [words[1:] for words in commands if words[:1] == ["llava-lite"]]


def test_commands_are_found() -> None:
    """The search itself: pipes, redirections, comments, continued lines."""
    assert commands_in('echo "a | b" | llava-lite info --json > x') == [["info", "--json"]]
    assert commands_in("llava-lite bench --size 7b \\\n  --strict  # look") == [
        ["bench", "--size", "7b", "--strict"]
    ]
    assert commands_in("llava-lite serve --port 8099 &") == [["serve", "--port", "8099"]]


@pytest.mark.parametrize("page", [*PAGES, *TEXTS])
def test_named_flags_exist(page: str) -> None:
    known = options_of(build_parser()) | options_of_tools() | FOREIGN_FLAGS | {"--data-file"}
    found = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", read_page(page)))
    assert found <= known


def test_readme_is_short() -> None:
    assert len(read_page("README.md").splitlines()) <= 150


def test_readme_shows_the_whole_package() -> None:
    """The tree of the README has one line for each file and folder of the package."""
    tree = re.search(r"^llava_lite/\n((?:  .*\n)+)", read_page("README.md"), re.MULTILINE)
    assert tree is not None
    shown = {line.split()[0] for line in tree[1].splitlines()}
    package = Path(llava_lite.__file__).parent
    folders = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    files = {path.name for path in package.glob("*.py")}
    assert shown == folders | files - {"__init__.py", "__main__.py"}


def first_column(page: str) -> set[str]:
    """All names in inline code in the first columns of the tables of a page."""
    cells = re.findall(r"^\| ([^|]*) \|", read_page(page), re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def test_tables_are_complete() -> None:
    """Each preset, command and suite has its line."""
    [commands] = [
        set(action.choices)
        for action in build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    ]
    assert first_column("README.md") == commands | set(REDUCTIONS)
    assert first_column("docs/reduction.md") >= set(REDUCTIONS) - {"none"}
    evaluation = read_page("docs/evaluation.md")
    assert [name for name in SUITES if f"eval {name}" not in evaluation] == []


def test_sentences_are_short() -> None:
    """Half of all sentences have at most 18 words, and no sentence has more than 30."""
    counted = [entry for page in (*PAGES, *TEXTS) for entry in count_words(page)]
    assert len(counted) > 500
    assert statistics.median(number for number, _ in counted) <= 18
    assert [entry for entry in counted if entry[0] > 30] == []
