"""The package from outside: what importing it costs, which way its arrows point, and its front door
`generate` and `load`."""

import ast
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_CONFIG, random_llava
from PIL import Image

import llava_lite
from llava_lite.checkpoint import save_model
from llava_lite.generation import Model
from llava_lite.tokenizer import Tokenizer

PACKAGE = Path(llava_lite.__file__).parent

# The arrows of the core: what each file may import of ours. Errors and the tables of names that a
# layout uses are leaves beside it.
ARROWS = {
    "errors": set(),
    "config": {"errors"},
    "tome": set(),
    "reduction": {
        "tome",  # how merges spread over blocks
        "config",  # what wishes are checked against
    },
    "rope": set(),
    "layout": set(),
    "fastv": set(),
    "image": {"errors", "fetch"}, "fetch": {"errors"},
    "prompt": {"errors"},
    "tokenizer": {"errors"},
    "layouts": {"config", "errors"},
    "projector": {"config"},
    "vision": {"config", "tome"},
    "cache": set(),
    "kernels": set(),
    "allocator": set(),
    "attention": {"config", "rope", "layout", "cache"},
    "llama": {"config", "rope", "attention", "cache", "fastv", "layout", "reduction"},
    "llava": {
        "config", "errors", "reduction", "vision", "projector", "llama", "layout",
        "cache", "fastv",  # for the types of its cache and of what was pruned
    },
    "meta": {"config", "llava"},
    "files": {"errors"},
    "sources": {"config", "errors", "files", "layouts", "meta"},
    "checkpoint": {
        "config", "errors", "files", "layouts", "llava", "meta", "sources", "tokenizer",
    },
    "sampling": {"reduction"},
    "trace": {"config", "llava", "fastv", "cache", "reduction"},
    "answer": {"tokenizer", "trace"},
    "sequence": {
        "answer", "trace", "reduction", "sampling",
        "cache", "fastv", "llava",  # for the types of what a state holds
    },
    "prefix": {"cache", "llava", "prompt", "tokenizer"},
    "chat": {
        "prompt", "answer", "sampling", "sequence",
        "generation",  # for the type of its model
    },
    "generation": {
        "config", "errors", "llava", "prompt", "image", "tokenizer", "reduction",
        "sampling", "answer", "sequence", "chat", "trace", "prefix",
        "cache",  # for its type
    },
    "__init__": {
        "errors", "checkpoint", "sources", "generation",
        "answer", "chat",  # for the types of what it hands on
        "config", "tokenizer",  # for the types of what it reads before the weights
        "download",  # turns a hub id into a folder
        "reduction", "thresholds", "inspection",  # whose names it hands on
        "quantize", "quantized_checkpoint",  # through which it loads
        "kernels",  # chosen when a model is loaded
        "static_decode",  # decodes where compiling is asked for
        "ranks", "tensor_parallel",  # where several processes share the model
    },
}  # fmt: skip


def imports_of_ours(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere, in functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            module = node.module or ""
            if module == "llava_lite":
                found |= {alias.name for alias in node.names}
            elif module.startswith("llava_lite."):
                found.add(module.split(".")[1])
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found |= {name.split(".")[1] for name in names if name.startswith("llava_lite.")}
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "import_module":
            [name] = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
            found |= {name.split(".")[1]} if name.startswith("llava_lite.") else set()
    return found


@pytest.mark.parametrize("name", sorted(ARROWS))
def test_arrows_point_up(name: str) -> None:
    path = PACKAGE / f"{name}.py"
    assert imports_of_ours(path) <= ARROWS[name]


def test_every_core_file_is_known_or_around_the_core() -> None:
    """Nothing in the core imports a file that is not in the table, so all others are around it."""
    around = {
        *("download", "thresholds", "inspection", "quantize", "quantized_checkpoint"),
        "static_decode",
        "ranks",
        "tensor_parallel",
    }
    for name, allowed in ARROWS.items():
        assert allowed <= set(ARROWS) | around, name
    assert {path.stem for path in PACKAGE.glob("*.py")} >= set(ARROWS)


def test_the_scan_finds_imports(tmp_path: Path) -> None:
    path = tmp_path / "sample.py"
    path.write_text(
        "import llava_lite.config\n"
        "from llava_lite import rope\n"
        "def f():\n    from llava_lite.cli import main\n    import_module('llava_lite.batch')\n"
    )
    assert imports_of_ours(path) == {"config", "rope", "cli", "batch"}


# ---- cost --------------------------------------------------------------------------------------


def run_python(code: str, *args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that finds this package and no default model."""
    env = {key: value for key, value in os.environ.items() if key != "LLAVA_LITE_MODEL"}
    env |= {"PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=True, timeout=120)


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    """The tiny random model as a folder."""
    folder = tmp_path_factory.mktemp("models") / "random"
    save_model(random_llava(), TINY_CONFIG, folder, tiny_tokenizer)
    return folder


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys; import llava_lite; print(*sorted(sys.modules))"
    modules = {name.split(".")[0] for name in run_python(code).stdout.split()}
    assert "llava_lite" in modules
    heavy = {"torch", "numpy", "PIL", "tokenizers", "safetensors", "huggingface_hub", "einops"}
    assert not modules & (heavy | {"transformers", "open_clip"})


def test_generating_imports_neither_transformers_nor_open_clip(saved_model: Path) -> None:
    code = (
        "import sys, llava_lite\n"
        "from PIL import Image\n"
        "image = Image.new('RGB', (60, 40))\n"
        "answer = llava_lite.generate(image, 'star?', sys.argv[1], max_new_tokens=3)\n"
        "print(answer.usage['image_tokens'], *sorted(sys.modules))"
    )
    tokens, *modules = run_python(code, saved_model).stdout.split()
    assert tokens == "16"
    tops = {name.split(".")[0] for name in modules}
    assert {"torch", "tokenizers", "safetensors"} <= tops
    assert not tops & {"transformers", "open_clip", "sentencepiece", "torchvision"}


# ---- front door --------------------------------------------------------------------------------


@pytest.fixture
def fresh_door(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """No default model named, none loaded, nothing said yet."""
    monkeypatch.delenv("LLAVA_LITE_MODEL", raising=False)
    for cached in (llava_lite._load_once, llava_lite._say_once):
        cached.cache_clear()
    yield monkeypatch
    llava_lite._load_once.cache_clear()


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


def test_load_gives_the_saved_model(saved_model: Path, tiny_model: Model) -> None:
    model = llava_lite.load(saved_model, device="cpu")
    assert model.config == TINY_CONFIG
    answer = model.generate(picture(), "star?", max_new_tokens=8)
    assert answer == tiny_model.generate(picture(), "star?", max_new_tokens=8)


@pytest.mark.parametrize(
    ("stored", "wanted", "expected"),
    [
        (torch.float32, "auto", torch.float32),
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float16, "auto", torch.bfloat16),
        (torch.float16, "float16", torch.float16),
        (torch.float16, torch.float32, torch.float32),
    ],
)
def test_dtype_auto_is_the_files_but_for_float16_on_the_cpu(
    tmp_path: Path,
    tiny_tokenizer: Tokenizer,
    stored: torch.dtype,
    wanted: str | torch.dtype,
    expected: torch.dtype,
) -> None:
    save_model(random_llava(), TINY_CONFIG, tmp_path / "m", tiny_tokenizer, dtype=stored)
    model = llava_lite.load(tmp_path / "m", device="cpu", dtype=wanted)
    assert {parameter.dtype for parameter in model.llava.parameters()} == {expected}


@pytest.mark.parametrize("device", ["warp", "cuda", "mps", "meta", "xpu", "cpu:1"])
def test_load_refuses_a_device_that_is_not_there(
    saved_model: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"device '{device}' is not"):
        llava_lite.load(saved_model, device=device)
    assert llava_lite.load(saved_model).llava.device.type == "cpu"


def test_load_counts_the_devices(saved_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("cuda:2", "cuda:9"):
        with pytest.raises(ValueError, match=f"device '{name}' is not available .* 2 of cuda"):
            llava_lite.load(saved_model, device=name)
    assert llava_lite._pick_device("cuda:1") == torch.device("cuda:1")


def test_load_overrides_padding_and_rotation(saved_model: Path, tiny_model: Model) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    picture().save(buffer, "PNG", exif=exif)
    model = llava_lite.load(saved_model, device="cpu", pad=False, exif=False)
    assert (model.config.pad, model.exif) == (False, False)
    assert model.config == replace(TINY_CONFIG, pad=False)
    cropped = Model(tiny_model.llava, tiny_model.tokenizer, replace(TINY_CONFIG, pad=False))
    embeds = model.encode(buffer.getvalue()).image_embeds
    assert torch.equal(embeds, cropped.encode(picture()).image_embeds)
    assert not torch.equal(embeds, cropped.encode(buffer.getvalue()).image_embeds)
    assert not torch.equal(embeds, tiny_model.encode(picture()).image_embeds)


def test_load_refuses_an_unknown_dtype(saved_model: Path) -> None:
    with pytest.raises(ValueError, match="int3"):
        llava_lite.load(saved_model, dtype="int3")


def test_load_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(llava_lite.CheckpointError, match="nowhere"):
        llava_lite.load(tmp_path / "nowhere")


def test_generate_takes_the_model_of_the_environment(
    saved_model: Path, fresh_door: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh_door.setenv("LLAVA_LITE_MODEL", str(saved_model))
    answer = llava_lite.generate(picture(), "star?", max_new_tokens=4)
    assert answer == llava_lite.generate(picture(), "star?", saved_model, max_new_tokens=4)
    assert answer == llava_lite.load(saved_model).generate(picture(), "star?", max_new_tokens=4)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_generate_says_once_that_it_uses_the_embedded_model(
    saved_model: Path, fresh_door: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh_door.setattr(llava_lite, "embedded_model", lambda: saved_model)
    for _ in range(2):
        llava_lite.generate(None, ["star?"], max_new_tokens=2)
    llava_lite.load()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    for word in ("drawn scenes", "llava-lite download", "llava-lite convert", "$LLAVA_LITE_MODEL"):
        assert word in captured.err


def test_generate_keeps_the_model_loaded(
    saved_model: Path, fresh_door: pytest.MonkeyPatch, tiny_model: Model
) -> None:
    sources = []

    def counting(source: str) -> Model:
        sources.append(source)
        return tiny_model

    fresh_door.setattr(llava_lite, "load", counting)
    for source in (saved_model, str(saved_model), saved_model):
        llava_lite.generate(None, "star?", source, max_new_tokens=1)
    llava_lite.generate(None, "star?", tiny_model, max_new_tokens=1)
    assert sources == [str(saved_model)]


def test_embedded_model_is_found_in_a_wheel_and_in_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "llava_lite"
    monkeypatch.setattr(llava_lite, "__file__", str(package / "__init__.py"))
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
