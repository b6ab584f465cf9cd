"""The program `llava-lite`: what goes to stdout and stderr, exit codes, bad input, the chat."""

import errno
import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from helpers.models import ROOT, random_llava
from llava_lite.checkpoints.checkpoint import save_model
from llava_lite.cli import program as cli
from llava_lite.cli.chat import CHAT_HELP, Repl
from llava_lite.cli.program import main
from llava_lite.generation.model import Model
from llava_lite.inputs.tokenizer import Tokenizer
from llava_lite.version import __version__

COMMANDS = (
    *("generate", "chat", "batch", "convert", "download", "info"),
    *("thresholds", "inspect", "eval", "bench", "serve"),
)
QUESTION = "What color is the star?"


@pytest.fixture(scope="module")
def model(tiny_tokenizer: Tokenizer) -> Model:
    """A random model that never ends an answer by itself."""
    llava = random_llava()
    with torch.no_grad():
        llava.decoder.lm_head.weight[llava.config.text.eos_id] = 0
    return Model(llava, tiny_tokenizer)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory, model: Model) -> str:
    folder = tmp_path_factory.mktemp("cli") / "model"
    save_model(model.llava, model.config, folder, model.tokenizer)
    return str(folder)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A photo of 40 x 20 pixels that the camera says is to be turned."""
    path = tmp_path / "photo.jpg"
    picture = Image.radial_gradient("L").resize((40, 20)).convert("RGB")
    picture.paste((250, 10, 10), (0, 0, 12, 20))
    exif = Image.Exif()
    exif[274] = 6
    picture.save(path, exif=exif)
    return path


class Terminal(io.StringIO):
    """Text that claims to be typed, or printed, at a terminal."""

    def isatty(self) -> bool:
        return True


def generate(*arguments: Any) -> int:
    return main(["generate", *map(str, arguments), "--threads", "1"])


def program(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Run the program as a process of its own."""
    command = [sys.executable, "-m", "llava_lite", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120, **options)


# ---- help and usage ----------------------------------------------------------------------------


def test_help_and_usage_errors_do_not_wait_for_torch() -> None:
    script = """
import sys
from llava_lite.cli.program import main
codes = [main(argv.split()) for argv in (
    "--help", "--version", "generate --help", "chat --help", "batch --help", "download --help",
    "info --help", "", "nonsense", "generate --nonsense", "generate --top-k x", "batch",
    "generate --dtype f64",
)]
heavy = {"torch", "numpy", "PIL", "huggingface_hub", "tokenizers", "tqdm"} & set(sys.modules)
assert not heavy, heavy
print("codes", *codes)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "codes 0 0 0 0 0 0 0 2 2 2 2 2 2"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert re.findall(r"^    (\w+) ", printed.out, re.MULTILINE) == list(COMMANDS)
    assert "130 interrupted" in printed.out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_fits_a_terminal(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"usage: llava-lite {command} ")
    assert "exit codes" in printed.out
    assert max(map(len, printed.out.splitlines())) <= 100


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"llava-lite {__version__}\n"


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (["--nonsense"], "--nonsense"),
        (["--device", "tpu"], "tpu"),
        (["--dtype", "int8"], "int8"),
        (["--template", "v7"], "v7"),
        (["--threads", "0"], "'0'"),
        (["--temperature", "warm"], "warm"),
        (["--json", "--stream"], "--json"),
        (["--trace"], "--trace"),
        (["--fastv-layer", "two"], "two"),
        (["-p", ""], "the prompt is empty"),
        (["-i", "-", "-", "-p", "x"], "stdin"),
    ],
)
def test_wrong_usage_is_exit_code_2(
    wrong: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "-p", QUESTION, *wrong]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("usage: llava-lite generate ")
    last = printed.err.splitlines()[-1]
    assert last.startswith("llava-lite generate: error: ") and named in last


def test_a_prompt_is_needed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal())
    assert main(["generate"]) == 2
    assert "-p TEXT" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert main(["generate"]) == 2
    assert "empty" in capsys.readouterr().err


def test_underscores_mean_hyphens(model_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("-m", model_folder, "--max_new_tokens=3", "--prompt=a_b --c_d", "--json") == 0
    assert json.loads(capsys.readouterr().out)["usage"]["completion_tokens"] == 3
    assert cli.hyphenate("--top_p=a_b") == "--top-p=a_b"
    assert cli.hyphenate("my_photo.png") == "my_photo.png"


# ---- generate ----------------------------------------------------------------------------------


def test_answer_on_stdout_nothing_else(
    model: Model, model_folder: str, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate("-m", model_folder, "-i", image, "-p", QUESTION, "-n", 12) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{model.generate(image, QUESTION, max_new_tokens=12)}\n"
    assert printed.err == ""


def test_json_is_one_object(
    model: Model, model_folder: str, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate("-m", model_folder, "-i", image, "-p", QUESTION, "-n", 12, "--json") == 0
    content = json.loads(capsys.readouterr().out)
    answer = model.generate(image, QUESTION, max_new_tokens=12)
    assert content["text"] == answer
    assert content["finish_reason"] == "length"
    assert content["usage"] == answer.usage
    assert content["timings"].keys() == answer.timings.keys()


def test_a_terminal_sees_the_answer_grow(
    model: Model,
    model_folder: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = model.generate(None, QUESTION, max_new_tokens=12)
    monkeypatch.setattr(Model, "generate", lambda *_, **__: pytest.fail("not streamed"))
    assert generate("-m", model_folder, "-p", QUESTION, "-n", 12, "--stream") == 0
    assert capsys.readouterr().out == f"{expected}\n"
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    assert generate("-m", model_folder, "-p", QUESTION, "-n", 12) == 0
    assert screen.getvalue() == f"{expected}\n"
    monkeypatch.setattr(Model, "stream", lambda *_, **__: pytest.fail("streamed"))
    monkeypatch.setattr(Model, "generate", lambda *_, **__: expected)
    assert generate("-m", model_folder, "-p", QUESTION, "-n", 12, "--no-stream") == 0


def test_every_option_reaches_the_model(
    model_folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    real = Model.generate

    def spy(self: Model, image: Any, prompt: str, **options: Any) -> Any:
        seen.update(options)
        return real(self, image, prompt, **options)

    monkeypatch.setattr(Model, "generate", spy)
    options = (
        "-n 5 --temperature 0.5 --top-p 0.9 --top-k 7 --seed 3 --system be_brief --template v1"
    )
    assert (
        generate("-m", model_folder, "-p", "x", *options.split(), "--stop", "a", "--stop", "b") == 0
    )
    assert seen == {
        "max_new_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "seed": 3,
        "stop": ["a", "b"],
        "system": "be_brief",
        "template": "v1",
        "reduction": None,
        "trace": False,
    }


def test_load_gets_the_model_arguments(
    model: Model, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, dict[str, Any]]] = []

    def load(source: Any, **options: Any) -> Model:
        calls.append((source, options))
        return model

    monkeypatch.setattr("llava_lite.cli.wanted.load", load)
    flags = "-m a/b --device cuda:1 --dtype bf16 --revision r1 --base c --vision-tower d --download"
    assert generate("-p", "x", "-n", 2, *flags.split(), "--quantize", "int4", "--compile") == 0
    assert generate("-p", "x", "-n", 2, "--offline") == 0
    assert calls[0] == (
        "a/b",
        {
            "device": "cuda:1",
            "dtype": "bfloat16",
            "download": True,
            "revision": "r1",
            "offline": False,
            "base": "c",
            "vision_tower": "d",
            "pad": None,
            "exif": True,
            "quantize": "int4",
            "compile": True,
            "tensor_parallel": False,
        },
    )
    assert calls[1][1]["quantize"] is None and not calls[1][1]["compile"]
    assert calls[1][0] is None
    assert calls[1][1]["offline"] and calls[1][1]["device"] == calls[1][1]["dtype"] == "auto"


def test_prompt_and_image_from_stdin(
    model: Model,
    model_folder: str,
    image: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\n"))
    assert generate("-m", model_folder, "-i", image, "-n", 8) == 0
    expected = f"{model.generate(image, QUESTION, max_new_tokens=8)}\n"
    assert capsys.readouterr().out == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(image.read_bytes())))
    assert generate("-m", model_folder, "-i", "-", "-p", QUESTION, "-n", 8) == 0
    assert capsys.readouterr().out == expected


def test_several_images_repeated_or_in_a_row(
    model: Model, model_folder: str, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = f"{model.generate([image, image], QUESTION, max_new_tokens=8)}\n"
    for arguments in (["-i", image, image], ["-i", image, "-i", image]):
        assert generate("-m", model_folder, *arguments, "-p", QUESTION, "-n", 8) == 0
        assert capsys.readouterr().out == expected


def test_padding_and_rotation_can_be_switched_off(
    model: Model,
    model_folder: str,
    image: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from llava_lite.inputs.images import load_image
    from llava_lite.inputs.pixels import preprocess

    seen: list[torch.Tensor] = []
    real = type(model.llava).encode_image

    def spy(self: Any, pixel_values: torch.Tensor, *rest: Any) -> Any:
        seen.append(pixel_values)
        return real(self, pixel_values, *rest)

    monkeypatch.setattr(type(model.llava), "encode_image", spy)
    for flags in ([], ["--no-pad"], ["--no-exif"], ["--no-pad", "--no-exif"]):
        assert generate("-m", model_folder, "-i", image, "-p", "x", "-n", 1, *flags) == 0
        upright = load_image(image, exif="--no-exif" not in flags)
        expected = preprocess(upright, 56, pad="--no-pad" not in flags)
        assert torch.equal(seen[-1], expected)
    assert not any(torch.equal(seen[0], other) for other in seen[1:])


def test_stats(model_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("-m", model_folder, "-p", QUESTION, "-n", 5, "--stats") == 0
    printed = capsys.readouterr().err
    assert re.search(r"0 image tokens: 5 new \(length\); .*prefill .* tokens/s", printed)


def test_default_model(
    model_folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAVA_LITE_MODEL", model_folder)
    assert generate("-p", QUESTION, "-n", 2) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.delenv("LLAVA_LITE_MODEL")
    for module in ("llava_lite.checkpoints.load", "llava_lite.cli.wanted"):
        monkeypatch.setattr(f"{module}.embedded_model", lambda: Path(model_folder))
    assert generate("-p", QUESTION, "-n", 2, "--quiet") == 0
    assert capsys.readouterr().err == ""


# ---- bad input ---------------------------------------------------------------------------------


def bad_images(folder: Path) -> Iterator[tuple[str, bytes | None]]:
    """(name, content) of what is no usable image; None: no file at all."""
    png = io.BytesIO()
    Image.radial_gradient("L").save(png, "PNG")
    tiff = io.BytesIO()
    Image.new("L", (4, 4)).save(tiff, "TIFF")
    huge = io.BytesIO()
    Image.new("1", (9000, 9000)).save(huge, "PNG")
    yield "absent.png", None
    yield "empty.png", b""
    yield "text.png", b"this is no image"
    yield "truncated.png", png.getvalue()[:200]
    yield "format.tiff", tiff.getvalue()
    yield "huge.png", huge.getvalue()


def test_bad_images_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "llava_lite.cli.wanted.load", lambda *_, **__: pytest.fail("the model was loaded")
    )
    for name, content in bad_images(tmp_path):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        assert generate("-i", tmp_path / name, "-p", "x") == 1
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
        assert name in printed.err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["-i", "http://127.0.0.1:9/a.png"], "127.0.0.1"),
        (["-i", "ftp://example.org/a.png"], "ftp"),
        (["--temperature", "-1"], "temperature -1.0 must be"),
        (["--temperature", "nan"], "temperature nan must be"),
        (["--top-p", "0"], "top_p 0.0 must be"),
        (["--top-k", "-3"], "top_k -3 must be"),
        (["-n", "0"], "max_new_tokens 0 must be"),
        (["--seed", "-1"], "seed -1 must be"),
        (["--stop", ""], "stop string"),
    ],
)
def test_bad_options_are_one_line_before_the_model_loads(
    arguments: list[str],
    named: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "llava_lite.cli.wanted.load", lambda *_, **__: pytest.fail("the model was loaded")
    )
    assert generate("-p", QUESTION, *arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert named in printed.err


def test_prompts_that_do_not_fit(
    model_folder: str, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate("-m", model_folder, "-i", image, "-p", "<image> or <image>?") == 1
    assert re.search(r"error: .* 2 <image> markers.* 1 ", capsys.readouterr().err)
    assert generate("-m", model_folder, "-i", image, "-p", "x", "-n", 5000) == 1
    pattern = r"error: \d+ prompt tokens \+ 16 image positions \+ 5000 new tokens .* 512\n"
    assert re.fullmatch(pattern, capsys.readouterr().err)


def test_bad_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("-m", tmp_path / "absent", "-p", "x") == 1
    assert re.fullmatch(r"error: .*absent.*\n", capsys.readouterr().err)
    assert generate("-m", tmp_path, "-p", "x") == 1
    assert re.fullmatch(r"error: .*config\.json.*\n", capsys.readouterr().err)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is there")
def test_absent_device(model_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("-m", model_folder, "-p", "x", "--device", "cuda") == 1
    assert capsys.readouterr().err == "error: device 'cuda' is not available here\n"


def test_device_that_is_not_there(model_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("-m", model_folder, "-p", "x", "--device", "cuda:9") == 1
    assert re.fullmatch(
        r"error: device 'cuda:9' is not available here.*\n", capsys.readouterr().err
    )
    assert generate("-m", model_folder, "-p", "x", "--device", "warp") == 2
    assert "'warp' is not one of auto, cpu, cuda" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "chat", "batch", "download"])
def test_quiet_hides_the_hub_s_progress_bars(
    command: str, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars

    seen: list[bool] = []

    def fetch(*_: Any, **__: Any) -> Any:
        seen.append(are_progress_bars_disabled())
        return tmp_path if command == "download" else model

    questions = tmp_path / "rows.jsonl"
    questions.write_text('{"prompt": "x"}\n')
    arguments = {
        "generate": ["-p", "x"],
        "chat": [],
        "batch": [str(questions), "-o", str(tmp_path / "out.jsonl")],
        "download": ["a/b"],
    }[command]
    fetching = [] if command == "download" else ["-m", "a/b", "--download", "-n", "1"]
    monkeypatch.setattr("llava_lite.cli.wanted.load", fetch)
    monkeypatch.setattr("llava_lite.checkpoints.download.download", fetch)
    monkeypatch.setattr(sys, "stdin", Terminal(""))
    monkeypatch.setattr(sys, "stderr", Terminal())
    try:
        for quiet in ([], ["--quiet"]):
            enable_progress_bars()
            (tmp_path / "out.jsonl").unlink(missing_ok=True)
            assert main([command, *arguments, *fetching, *quiet]) == 0
    finally:
        enable_progress_bars()
    assert seen == [False, True]


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="absent"):
        generate("-m", tmp_path / "absent", "-p", "x", "--debug")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("llava_lite.cli.wanted.load", broken)
    with pytest.raises(KeyError, match="a bug"):
        generate("-p", "x")


def test_interrupt_is_exit_code_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llava_lite.cli.wanted.load", interrupted)
    assert generate("-p", "x") == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_out_of_memory_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nframe #0: c10")

    monkeypatch.setattr("llava_lite.cli.wanted.load", exhausted)
    assert generate("-p", "x") == 1
    assert capsys.readouterr().err == "error: CUDA out of memory. Tried to allocate 2 GiB\n"


def test_warnings_are_one_line_and_quiet_hides_them(
    model: Model, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import warnings

    def load(*_: Any, **__: Any) -> Model:
        warnings.warn("ignored 3 tensors", stacklevel=2)
        return model

    monkeypatch.setattr("llava_lite.cli.wanted.load", load)
    assert generate("-m", "x", "-p", "x", "-n", 1) == 0
    assert capsys.readouterr().err == "warning: ignored 3 tensors\n"
    assert generate("-m", "x", "-p", "x", "-n", 1, "--quiet") == 0
    assert capsys.readouterr().err == ""


class Closed(io.StringIO):
    """A stdout whose reader has gone."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize(
    ("number", "said"), [(errno.EPIPE, ""), (errno.ENOSPC, "error: No space left on device\n")]
)
@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_stdout_that_takes_nothing(
    number: int,
    said: str,
    stream: str,
    model_folder: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdout", Closed(number))
    assert generate("-m", model_folder, "-p", "x", "-n", 4, stream) == 1
    assert capsys.readouterr().err == said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_processes_with_a_closed_pipe_and_a_full_disk() -> None:
    """No traceback, and nothing more when the interpreter flushes at exit."""
    buffered = {name: text for name, text in os.environ.items() if name != "PYTHONUNBUFFERED"}
    read, write = os.pipe()
    os.close(read)
    for target, said in ((write, b""), (os.open("/dev/full", os.O_WRONLY), b"No space left")):
        command = [sys.executable, "-m", "llava_lite", "--help"]
        done = subprocess.run(
            command, cwd=ROOT, env=buffered, stdout=target, stderr=subprocess.PIPE, timeout=120
        )
        os.close(target)
        assert done.returncode == 1
        assert done.stderr.count(b"\n") == bool(said) and said in done.stderr


# ---- download, convert -------------------------------------------------------------------------


def test_download_prints_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def download(repo_id: str, **options: Any) -> Path:
        calls.append((repo_id, options))
        return tmp_path

    monkeypatch.setattr("llava_lite.checkpoints.download.download", download)
    assert main(["download", "a/b", "--revision", "r", "--out", "c", "--offline"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}\n"
    assert calls == [("a/b", {"revision": "r", "offline": True, "destination": "c"})]


def test_download_of_what_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["download", "nobody/nothing-of-this-name", "--offline"]) == 1
    assert re.fullmatch(r"error: nobody/nothing-of-this-name: .*\n", capsys.readouterr().err)


def test_convert_and_use(
    model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "converted"
    assert main(["convert", model_folder, str(target), "--dtype", "keep", "--verify"]) == 0
    assert main(["info", str(target), "--checksums"]) == 0
    capsys.readouterr()
    for folder in (model_folder, str(target)):
        assert generate("-m", folder, "-p", QUESTION, "-n", 5) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    assert main(["convert", model_folder, str(target)]) == 1
    assert "not empty" in capsys.readouterr().err
    assert main(["convert", model_folder]) == 2


# ---- chat --------------------------------------------------------------------------------------


def chat(lines: str, monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    return main(["chat", *map(str, arguments), "-n", "6", "--threads", "1"])


def test_scripted_chat_prints_answers_only(
    model: Model,
    model_folder: str,
    image: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert chat("What?\n\n  Why?  \n", monkeypatch, "-m", model_folder, "-i", image) == 0
    printed = capsys.readouterr()
    talk = model.chat(image, max_new_tokens=6)
    assert printed.out == f"{talk.send('What?')}\n{talk.send('Why?')}\n"
    assert printed.err == ""


def test_image_clear_and_quit(
    model: Model,
    model_folder: str,
    image: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = tmp_path / "with space.png"
    Image.linear_gradient("L").save(other)
    script = f"One?\n/image {other}\nTwo?\n/clear\nThree?\n/quit\nFour?\n"
    assert chat(script, monkeypatch, "-m", model_folder, "-i", image) == 0
    talk = model.chat(image, max_new_tokens=6)
    expected = [talk.send("One?"), talk.send("Two?", other)]
    expected.append(model.chat(other, max_new_tokens=6).send("Three?"))
    assert capsys.readouterr().out == "".join(f"{answer}\n" for answer in expected)


def test_image_before_the_first_question_replaces_the_one_given(
    model: Model,
    model_folder: str,
    image: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = tmp_path / "other.png"
    Image.linear_gradient("L").save(other)
    script = f"/image '{other}' {image}\n<image> or <image>?\n"
    assert chat(script, monkeypatch, "-m", model_folder, "-i", image) == 0
    answer = model.chat([other, image], max_new_tokens=6).send("<image> or <image>?")
    assert capsys.readouterr().out == f"{answer}\n"


def test_errors_do_not_end_the_chat(
    model: Model,
    model_folder: str,
    image: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = f"/image absent.png\n/image\n/image 'a\n/dance\n{'long ' * 400}\nWhat?\n"
    assert chat(script, monkeypatch, "-m", model_folder, "-i", image) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{model.chat(image, max_new_tokens=6).send('What?')}\n"
    errors = printed.err.splitlines()
    assert [line.startswith("error: ") for line in errors] == [True] * 5
    for text, line in zip(("absent.png", "path", "", "/dance", "context"), errors, strict=True):
        assert text in line


def test_help_and_stats_in_the_chat(
    model_folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chat("/stats\n/help\nWhat?\n/stats\n/exit\n", monkeypatch, "-m", model_folder) == 0
    printed = capsys.readouterr().err
    assert printed.startswith("no answer yet\n")
    assert CHAT_HELP in printed
    assert "image tokens: 6 new (length)" in printed
    assert chat("What?\nWhy?\n", monkeypatch, "-m", model_folder, "--stats") == 0
    assert capsys.readouterr().err.count("image tokens: 6 new (length)") == 2


def test_bad_first_image_ends_the_chat(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chat("What?\n", monkeypatch, "-i", tmp_path / "absent.png") == 1
    assert "absent.png" in capsys.readouterr().err
    assert chat("What?\n", monkeypatch, "-i", "-") == 2


def test_script_with_interrupt_ends(
    model_folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("llava_lite.generation.chat.Chat.stream", interrupted)
    assert chat("What?\nWhy?\n", monkeypatch, "-m", model_folder) == 130


SLOW_CHAT = """
import sys, time
from llava_lite.cli.program import main
from llava_lite.generation.chat import Chat

fast = Chat.stream

def slow(self, text, image=None):
    pieces = fast(self, text, image)
    try:
        while True:
            piece = next(pieces)
            time.sleep(0.1)
            yield piece
    except StopIteration as end:
        return end.value
    finally:
        pieces.close()

Chat.stream = slow
sys.exit(main(sys.argv[1:]))
"""


class Screen:
    """A program on a pseudo-terminal: type, wait for text, press Ctrl-C."""

    def __init__(self, script: str, *arguments: str) -> None:
        self.master, slave = os.openpty()
        self.text = ""
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, *arguments],
            cwd=ROOT,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={**os.environ, "TERM": "dumb", "OMP_NUM_THREADS": "1"},
        )
        os.close(slave)

    def type(self, line: str) -> None:
        os.write(self.master, line.encode())

    def interrupt(self) -> None:
        time.sleep(0.5)  # readline shows its prompt a moment before it listens to signals
        self.process.send_signal(signal.SIGINT)

    def wait_for(self, pattern: str, seconds: float = 120) -> str:
        """Read until the pattern has appeared; returns what came up to its end."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.text)):
            left = deadline - time.monotonic()
            assert left > 0 and select.select([self.master], [], [], left)[0], self.text
            self.text += os.read(self.master, 4096).decode(errors="replace")
        seen, self.text = self.text[: found.end()], self.text[found.end() :]
        return seen


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_ctrl_c_stops_the_answer_then_the_program(model_folder: str) -> None:
    screen = Screen(SLOW_CHAT, "chat", "-m", model_folder, "-n", "200", "--threads", "1")
    try:
        screen.wait_for(r"/help.*\n.*> ")
        screen.type("What?\n")
        screen.wait_for(r"What\?\r\n\S")  # the echo, and the answer's first piece
        screen.interrupt()
        screen.wait_for(r"\(stopped\)\r\n.*> ")
        screen.type("/stats\n")  # it goes on
        screen.wait_for(r"no answer yet\r\n.*> ")
        screen.interrupt()
        screen.wait_for(r"Ctrl-C again.*\r\n.*> ")
        screen.type("/help\n")  # a line in between, and the first Ctrl-C is forgotten
        screen.wait_for(r"/quit(.|\r|\n)*> ")
        screen.interrupt()
        screen.wait_for(r"Ctrl-C again.*\r\n.*> ")
        screen.interrupt()
        assert screen.process.wait(timeout=60) == 130
    finally:
        screen.process.kill()
        screen.process.wait()
        os.close(screen.master)


def test_stopped_answer_stays_in_the_conversation(
    model: Model, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("One?\nTwo?\n"))
    talk = model.chat(None, max_new_tokens=20)
    repl = Repl(talk, str, [Image.new("RGB", (8, 8))])
    real, count = sys.stdout.write, 0

    def write(text: str) -> int:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return real(text)

    with monkeypatch.context() as patched:
        patched.setattr(sys.stdout, "write", write)
        repl.run()
    assert "(stopped)" in capsys.readouterr().err
    [(question, stopped), (_, whole)] = talk.history
    assert question == "One?"
    full = model.chat(Image.new("RGB", (8, 8)), max_new_tokens=20).send("One?")
    assert stopped and full.startswith(stopped) and len(stopped) < len(full)
    assert whole
    assert talk.input_ids.count(-200) == 1  # the image went with the first question only


def test_module_runs_as_a_program(model_folder: str, model: Model) -> None:
    done = program("chat", "-m", model_folder, "-n", 5, "--threads", 1, input=b"What?\n")
    assert done.stderr == b""
    assert done.returncode == 0
    answer = model.chat(max_new_tokens=5).send("What?")
    assert done.stdout.decode() == f"{answer}\n"
