"""The package from outside: what importing it costs, which way its arrows point, and its front door
`generate` and `load`."""

import ast
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import llava_lite
from helpers.models import ROOT, TINY_CONFIG, random_llava
from helpers.processes import run_python
from llava_lite.api import load_once
from llava_lite.checkpoints.checkpoint import save_model
from llava_lite.checkpoints.load import say_once
from llava_lite.fast.device import pick_device
from llava_lite.generation.model import Model
from llava_lite.inputs.tokenizer import Tokenizer

PACKAGE = Path(llava_lite.__file__).parent

# The rooms from the lowest to the highest: a file imports from its own room and from lower ones.
# "." is the figure itself: the flat files. The front door and the program stand above everything.
ROOMS = (
    ".",
    "inputs",
    "generation",
    "fast",
    "checkpoints",
    "study",
    "evaluation",
    "api",
    "bench",
    "server",
    "integrations",
    "cli",
    "front door",
)
FRONT_DOOR = ("llava_lite", "llava_lite.__main__")


def module_name(path: Path, root: Path) -> str:
    """llava_lite/fast/ranks.py -> llava_lite.fast.ranks; a package is named by its folder."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The room of a module: its folder, "." for the figure, "api", or the front door."""
    _, *parts = module.split(".")
    if module in FRONT_DOOR:
        return "front door"
    return parts[0] if len(parts) > 1 or parts[0] in ROOMS else "."


def imports_of(path: Path, modules: set[str]) -> set[str]:
    """Modules of the package that a file imports anywhere: in functions, and for types too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else name.rpartition(".")[0] for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & modules


def read_graph(root: Path) -> dict[str, set[str]]:
    """Every module below root / llava_lite, with the modules that it imports."""
    files = {module_name(path, root): path for path in (root / "llava_lite").rglob("*.py")}
    return {name: imports_of(path, set(files)) - {name} for name, path in files.items()}


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, and those above them; empty without a circle."""
    left = {name: set(targets) for name, targets in graph.items()}
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


def find_upward_arrows(graph: dict[str, set[str]]) -> list[str]:
    """Imports from a room into a higher one."""
    return [
        f"{name} -> {target}"
        for name, targets in sorted(graph.items())
        for target in sorted(targets)
        if ROOMS.index(room_of(name)) < ROOMS.index(room_of(target))
    ]


def test_no_circle_and_no_upward_arrow() -> None:
    graph = read_graph(ROOT)
    assert len(graph) > 100
    assert find_upward_arrows(graph) == []
    assert find_circle(graph) == []


def test_circles_and_upward_arrows_are_found(tmp_path: Path) -> None:
    package = tmp_path / "llava_lite"
    (package / "fast").mkdir(parents=True)
    for name, text in {
        "__init__": "",
        "rope": "from llava_lite import layout\n",
        "layout": "def f():\n    from llava_lite.rope import rotate\n",
        "cache": "import llava_lite.fast.kernels\n",
        "fast/__init__": "",
        "fast/kernels": "import torch\n",
    }.items():
        (package / f"{name}.py").write_text(text)
    graph = read_graph(tmp_path)
    assert find_upward_arrows(graph) == ["llava_lite.cache -> llava_lite.fast.kernels"]
    assert find_circle(graph) == ["llava_lite.layout", "llava_lite.rope"]


def test_the_house_is_small_at_its_door() -> None:
    entries = [path for path in PACKAGE.iterdir() if path.name not in ("__pycache__", "weights")]
    assert sum(path.is_file() for path in entries) <= 21
    assert sum(path.is_dir() for path in entries) <= 12


# ---- cost --------------------------------------------------------------------------------------


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys; import llava_lite; print(*sorted(sys.modules))"
    modules = {name.split(".")[0] for name in run_python(code).stdout.split()}
    assert "llava_lite" in modules
    heavy = {"torch", "numpy", "PIL", "tokenizers", "safetensors", "huggingface_hub", "einops"}
    assert not modules & (heavy | {"transformers", "open_clip"})


def test_generating_imports_neither_transformers_nor_open_clip(model_folder: Path) -> None:
    code = (
        "import sys, llava_lite\n"
        "from PIL import Image\n"
        "image = Image.new('RGB', (60, 40))\n"
        "answer = llava_lite.generate(image, 'star?', sys.argv[1], max_new_tokens=3)\n"
        "print(answer.usage['image_tokens'], *sorted(sys.modules))"
    )
    tokens, *modules = run_python(code, model_folder).stdout.split()
    assert tokens == "16"
    tops = {name.split(".")[0] for name in modules}
    assert {"torch", "tokenizers", "safetensors"} <= tops
    assert not tops & {"transformers", "open_clip", "sentencepiece", "torchvision"}


# ---- front door --------------------------------------------------------------------------------


@pytest.fixture
def fresh_door(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """No default model named, none loaded, nothing said yet."""
    monkeypatch.delenv("LLAVA_LITE_MODEL", raising=False)
    for cached in (load_once, say_once):
        cached.cache_clear()
    yield monkeypatch
    load_once.cache_clear()


def picture() -> Image.Image:
    return Image.linear_gradient("L").resize((60, 40))


def test_public_names_are_there() -> None:
    for name in llava_lite.__all__:
        assert getattr(llava_lite, name) is not None
    assert llava_lite.Model is Model
    with pytest.raises(AttributeError, match="no attribute 'Modle'"):
        _ = llava_lite.Modle
    for error in ("ImageError", "PromptError", "ContextError", "CheckpointError"):
        assert issubclass(getattr(llava_lite, error), llava_lite.LlavaLiteError)


def test_load_gives_the_saved_model(model_folder: Path, tiny_model: Model) -> None:
    model = llava_lite.load(model_folder, device="cpu")
    assert model.config == TINY_CONFIG
    answer = model.generate(picture(), "star?", max_new_tokens=8)
    assert answer == tiny_model.generate(picture(), "star?", max_new_tokens=8)


@pytest.mark.parametrize(
    ("stored", "wanted", "expected"),
    [
        (torch.float32, "auto", torch.float32),
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float16, "auto", torch.bfloat16),
        (torch.bfloat16, "small", torch.float32),
        (torch.float16, "small", torch.float32),
        (torch.float16, "float16", torch.float16),
        (torch.float16, torch.float32, torch.float32),
    ],
)
def test_dtype_auto_is_the_files_but_for_float16_and_small_models_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    tiny_tokenizer: Tokenizer,
    stored: torch.dtype,
    wanted: str | torch.dtype,
    expected: torch.dtype,
) -> None:
    save_model(random_llava(), TINY_CONFIG, tmp_path / "m", tiny_tokenizer, dtype=stored)
    if wanted == "small":
        wanted = "auto"
        quantized = llava_lite.load(tmp_path / "m", device="cpu", quantize="int8")
        assert quantized.llava.dtype == torch.bfloat16
    else:
        monkeypatch.setattr("llava_lite.fast.device.FEW_PARAMETERS", 1)
    model = llava_lite.load(tmp_path / "m", device="cpu", dtype=wanted)
    assert {parameter.dtype for parameter in model.llava.parameters()} == {expected}


@pytest.mark.parametrize("device", ["warp", "cuda", "mps", "meta", "xpu", "cpu:1"])
def test_load_refuses_a_device_that_is_not_there(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"device '{device}' is not"):
        llava_lite.load(model_folder, device=device)
    assert llava_lite.load(model_folder).llava.device.type == "cpu"


def test_load_counts_the_devices(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("cuda:2", "cuda:9"):
        with pytest.raises(ValueError, match=f"device '{name}' is not available .* 2 of cuda"):
            llava_lite.load(model_folder, device=name)
    assert pick_device("cuda:1") == torch.device("cuda:1")


def test_load_overrides_padding_and_rotation(model_folder: Path, tiny_model: Model) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    picture().save(buffer, "PNG", exif=exif)
    model = llava_lite.load(model_folder, device="cpu", pad=False, exif=False)
    assert (model.config.pad, model.exif) == (False, False)
    assert model.config == replace(TINY_CONFIG, pad=False)
    cropped = Model(tiny_model.llava, tiny_model.tokenizer, replace(TINY_CONFIG, pad=False))
    embeds = model.encode(buffer.getvalue()).image_embeds
    assert torch.equal(embeds, cropped.encode(picture()).image_embeds)
    assert not torch.equal(embeds, cropped.encode(buffer.getvalue()).image_embeds)
    assert not torch.equal(embeds, tiny_model.encode(picture()).image_embeds)


def test_load_refuses_an_unknown_dtype(model_folder: Path) -> None:
    with pytest.raises(ValueError, match="int3"):
        llava_lite.load(model_folder, dtype="int3")


def test_load_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(llava_lite.CheckpointError, match="nowhere"):
        llava_lite.load(tmp_path / "nowhere")


def test_generate_takes_the_model_of_the_environment(
    model_folder: Path, fresh_door: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh_door.setenv("LLAVA_LITE_MODEL", str(model_folder))
    answer = llava_lite.generate(picture(), "star?", max_new_tokens=4)
    assert answer == llava_lite.generate(picture(), "star?", model_folder, max_new_tokens=4)
    assert answer == llava_lite.load(model_folder).generate(picture(), "star?", max_new_tokens=4)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_generate_says_once_that_it_uses_the_embedded_model(
    model_folder: Path, fresh_door: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh_door.setattr("llava_lite.checkpoints.load.embedded_model", lambda: model_folder)
    for _ in range(2):
        llava_lite.generate(None, ["star?"], max_new_tokens=2)
    llava_lite.load()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    for word in ("drawn scenes", "llava-lite download", "llava-lite convert", "$LLAVA_LITE_MODEL"):
        assert word in captured.err


def test_generate_keeps_the_model_loaded(
    model_folder: Path, fresh_door: pytest.MonkeyPatch, tiny_model: Model
) -> None:
    sources = []

    def counting(source: str) -> Model:
        sources.append(source)
        return tiny_model

    fresh_door.setattr("llava_lite.api.load", counting)
    for source in (model_folder, str(model_folder), model_folder):
        llava_lite.generate(None, "star?", source, max_new_tokens=1)
    llava_lite.generate(None, "star?", tiny_model, max_new_tokens=1)
    assert sources == [str(model_folder)]


def test_embedded_model_is_found_in_a_wheel_and_in_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "llava_lite"
    here = package / "checkpoints" / "load.py"
    monkeypatch.setattr("llava_lite.checkpoints.load.__file__", str(here))
    with pytest.raises(llava_lite.CheckpointError, match="no embedded model"):
        llava_lite.embedded_model()
    for folder in (tmp_path / "site" / "weights" / "tiny", package / "weights" / "tiny"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        assert llava_lite.embedded_model() == folder


def test_config_of_the_folder_decides_the_template(
    tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    config = replace(TINY_CONFIG, template="llava-hf")
    save_model(random_llava(config), config, tmp_path / "m", tiny_tokenizer)
    model = llava_lite.load(tmp_path / "m")
    expected = len(model.tokenizer.encode("USER: star? ASSISTANT:"))
    assert model.generate(None, "star?", max_new_tokens=1).usage["prompt_tokens"] == expected
