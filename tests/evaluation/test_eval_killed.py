"""`llava-lite eval` killed at any moment: --reuse goes on, to the report of a clean run."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers.coco_files import drawn_references, plain_file
from helpers.eval_command import Command, command
from helpers.mmbench_rows import broken_base64, encoded, rotated, row, write
from helpers.models import ROOT
from helpers.processes import start_program
from llava_lite.cli import console
from llava_lite.cli import program as cli

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@dataclass(frozen=True)
class Moment:
    """When a process is killed: `delay` seconds after so many samples of its file are written and
    it has written a line itself; after its start if `samples` is None."""

    samples: int | None
    delay: float


@dataclass(frozen=True)
class Life:
    """A process that runs a command. `kill` is kill -9, and returns the exit code: that of the
    signal, unless the process ended before."""

    has_ended: Callable[[], bool]
    kill: Callable[[], int]


def process_of(evaluation: Command) -> Life:
    """The command in a process of its own, as its users start it, and a group of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "llava_lite", *evaluation.words, "--reuse"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )

    def kill() -> int:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait(timeout=60)

    return Life(lambda: process.poll() is not None, kill)


def fork_of(evaluation: Command) -> Life:
    """The same, forked from a process that has imported torch."""
    process = start_program(*evaluation.words, "--reuse")

    def kill() -> int:
        process.kill()
        return process.wait()

    return Life(lambda: process.poll() is not None, kill)


def content_of(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def samples_in(content: bytes) -> int:
    """Whole lines of samples."""
    return sum(line.startswith(b'{"id": ') for line in content.split(b"\n")[:-1])


def kill_at(evaluation: Command, moment: Moment, start: Callable[[Command], Life]) -> int:
    """Start the command with --reuse, kill it at that moment, and return its exit code."""
    before = content_of(evaluation.predictions)
    life = start(evaluation)
    while moment.samples is not None and not life.has_ended():
        now = content_of(evaluation.predictions)
        if len(now) > len(before) and samples_in(now) >= moment.samples:
            break
        time.sleep(0.002)
    time.sleep(moment.delay)
    code = life.kill()
    assert code in (-signal.SIGKILL, console.OK, console.FAILED)
    whole_lines = before[: before.rfind(b"\n") + 1]
    assert content_of(evaluation.predictions).startswith(whole_lines)  # what was written stays
    return code


def moments(rng: random.Random, total: int, running: int, starting: int = 0) -> Iterator[Moment]:
    """Moments spread over the whole evaluation: some while a process starts, the others after more
    and more samples; enough are left that a slow test is never too late."""
    counts = sorted(rng.sample(range(total * 3 // 4), running))
    planned = [Moment(count, rng.uniform(0.0, 0.05)) for count in counts]
    for _ in range(starting):
        planned.insert(rng.randrange(len(planned)), Moment(None, rng.uniform(0.0, 0.3)))
    yield from planned


def check_like_clean(killed: Command, clean: Command, total: int) -> None:
    """Same report, same answers, no sample lost or doubled."""
    assert len(killed.records) == len(clean.records) == total
    for name, line in clean.records.items():
        again = killed.records[name]
        for part in ("answer", "error", "finish_reason", "usage"):
            assert again.get(part) == line.get(part), name
    reports = [killed.report, clean.report]
    for report in reports:
        del report["measured"], report["runs"]
    assert reports[0] == reports[1]
    assert (killed.folder / "report.html").exists()


def kill_when_all_is_answered(evaluation: Command, total: int, times: int) -> int:
    """Kill as often before the report is delivered; a process that was faster does not count.
    Returns how often it was done."""
    rng = random.Random(times)
    codes: list[int] = []
    while codes.count(-signal.SIGKILL) < times and len(codes) < 10 * times:
        codes.append(kill_at(evaluation, Moment(total, rng.uniform(0.0, 0.01)), fork_of))
    return codes.count(-signal.SIGKILL)


def rows_to_kill() -> list[dict[str, object]]:
    """32 questions of four rotations about 31 pictures and a broken one."""
    colors = [f"rgb({number * 8}, {255 - number * 8}, {number * 3})" for number in range(31)]
    images = [*map(encoded, colors), broken_base64()]
    rows: list[dict[str, object]] = []
    for number, image in enumerate(images):
        answer = "ABCD"[number % 4]
        question = f"Which fruit {'star ' * (number % 6)}is this?"
        rows += rotated(row(number, question=question, answer=answer, image=image), 4)
    return rows


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="kills by POSIX signals")
def test_mmbench_killed_twenty_times(model_folder: Path, tmp_path: Path) -> None:
    """kill -9 at 20 moments, of the start, the answers and the end: the report of a clean run."""
    file = write(tmp_path / "bench.tsv", rows_to_kill())
    options = ("--batch-size", 3, "-n", 40)
    clean = command(tmp_path / "clean", model_folder, "mmbench", file, *options)
    killed = command(tmp_path / "killed", model_folder, "mmbench", file, *options)
    assert clean.run()["samples"]["failed"] == 4
    deaths = []
    for moment in moments(random.Random(20), 128, running=14, starting=4):
        assert kill_at(killed, moment, fork_of) == -signal.SIGKILL
        deaths.append(samples_in(content_of(killed.predictions)))
    assert len(set(deaths)) >= 6 and 0 < deaths[-1] < 128
    assert kill_when_all_is_answered(killed, 128, times=2) == 2
    killed.run("--reuse")
    check_like_clean(killed, clean, 128)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="kills by POSIX signals")
def test_coco_killed(model_folder: Path, tmp_path: Path) -> None:
    file = plain_file(tmp_path / "captions.json", drawn_references(tmp_path))
    words = ("coco", tmp_path / "val2014", file, "--batch-size", 2, "-n", 12)
    clean = command(tmp_path / "clean", model_folder, *words)
    killed = command(tmp_path / "killed", model_folder, *words)
    clean.run()
    for moment in moments(random.Random(5), 50, running=3):
        assert kill_at(killed, moment, process_of) == -signal.SIGKILL
    done = samples_in(content_of(killed.predictions))
    assert 0 < done < 50
    assert cli.main(["eval", "report", str(killed.folder)]) == console.FAILED
    assert killed.report["samples"]["answered"] == len(killed.answers)
    not_asked = {"reason": "not asked yet", "count": 50 - done}
    assert not_asked.items() <= killed.report["failures"][0].items()
    killed.run("--reuse")
    check_like_clean(killed, clean, 50)


@pytest.mark.parametrize("seed", range(6))
def test_a_file_that_ends_anywhere_goes_on(seed: int, model_folder: Path, tmp_path: Path) -> None:
    """A disk that was full, or without power, keeps any number of bytes."""
    file = write(tmp_path / "bench.tsv", rows_to_kill()[-20:])
    clean = command(tmp_path / "clean", model_folder, "mmbench", file)
    cut = command(tmp_path / "cut", model_folder, "mmbench", file)
    clean.run()
    cut.folder.mkdir()
    rng = random.Random(seed)
    content = clean.predictions.read_bytes()
    cut.predictions.write_bytes(content[: rng.randrange(len(content))])
    for _ in range(2):
        cut.run("--reuse")
        check_like_clean(cut, clean, 20)
        content = cut.predictions.read_bytes()
        cut.predictions.write_bytes(content[: rng.randrange(len(content) // 2, len(content))])
    cut.run("--reuse")
    check_like_clean(cut, clean, 20)
