"""Conversion, download and the tools around them: complete or nothing, and never silently.

Run: pytest tests/checkpoints/test_convert.py
"""

import errno
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import weakref
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import llava_lite.checkpoints.source
import llava_lite.checkpoints.tensors
from helpers.layouts import LAYOUTS, STYLES, Golden, golden_folder, hf_state, write_layout
from helpers.models import ROOT, TINY_CONFIG, random_llava
from llava_lite import load
from llava_lite.checkpoints.checkpoint import load_model, load_tokenizer, save_model
from llava_lite.checkpoints.convert import convert
from llava_lite.checkpoints.download import choose_files, download, plan_download, resolve
from llava_lite.checkpoints.names import hf_name
from llava_lite.checkpoints.opening import open_source
from llava_lite.checkpoints.source import Source
from llava_lite.cli.convert import parse_size
from llava_lite.cli.program import main
from llava_lite.errors import CheckpointError
from llava_lite.llava import Llava


@pytest.fixture(scope="module")
def golden(shared: Path) -> Golden:
    return Golden(shared)


@pytest.fixture(scope="module")
def llava() -> Llava:
    return random_llava()


@pytest.fixture(scope="module")
def source(llava: Llava, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers of the official layout with a tower beside it, float32."""
    return write_layout("official", tmp_path_factory.mktemp("source"), hf_state(llava))


def same_weights(folder: Path, llava: Llava, dtype: torch.dtype) -> None:
    loaded = load_model(folder)
    assert loaded.dtype == dtype
    for name, tensor in llava.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.to(dtype)), name


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# What is written


@pytest.mark.parametrize("style", STYLES)
def test_every_layout_converts(style: str, llava: Llava, tmp_path: Path) -> None:
    folder = write_layout(style, tmp_path / "source", hf_state(llava))
    report = convert(folder, tmp_path / "out", verify=True)
    assert report.written and report.verified
    assert report.tensors == len(llava.state_dict())
    # The last block's 16 tensors, 12 where q, k and v are packed, and the final norm's 2.
    assert len(report.unused) == (14 if "openai" in style else 18)
    same_weights(tmp_path / "out", llava, torch.bfloat16)
    assert names_in(tmp_path / "out") == ["config.json", "manifest.json", "model.safetensors"]
    assert names_in(tmp_path) == ["out", "source"]


@pytest.mark.parametrize(
    "dtype, expected",
    [(None, torch.float32), ("float16", torch.float16), (torch.bfloat16, torch.bfloat16)],
)
def test_dtypes(dtype: object, expected: torch.dtype, source: Path, llava, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", dtype=dtype)  # type: ignore[arg-type]
    same_weights(tmp_path / "out", llava, expected)


@pytest.mark.parametrize("to", ["llava_lite", "hf"])
def test_shards_stay_below_their_size(to: str, source: Path, llava, tmp_path: Path) -> None:
    report = convert(source, tmp_path / "out", shard_size=60_000, to=to, dtype=None)
    assert len(report.files) > 5
    seen = []
    for file in report.files:
        with safe_open(tmp_path / "out" / file, "pt") as shard:
            names = list(shard.keys())
            size = sum(shard.get_tensor(name).nbytes for name in names)
        assert size <= 60_000 or len(names) == 1
        seen += names
    assert len(seen) == len(set(seen)) == report.tensors
    if to == "llava_lite":
        same_weights(tmp_path / "out", llava, torch.float32)
    else:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert sorted(index["weight_map"]) == sorted(seen)
        assert index["metadata"]["total_size"] == report.size


def test_one_tensor_is_in_memory_at_a_time(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref] = []
    most = 0
    read = Source.read

    def counting(self: Source, *args: object) -> Tensor:
        nonlocal most
        tensor = read(self, *args)  # type: ignore[arg-type]
        alive.append(weakref.ref(tensor))
        most = max(most, sum(reference() is not None for reference in alive))
        return tensor

    monkeypatch.setattr(Source, "read", counting)
    convert(source, tmp_path / "out")
    assert len(alive) > 50
    assert most <= 2  # the one being written, and the next one


def test_each_file_of_the_source_is_opened_once_to_read(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    read = llava_lite.checkpoints.source.read_tensors

    def counting(path: Path) -> dict[str, Tensor]:
        opened.append(path.name)
        return read(path)

    monkeypatch.setattr("llava_lite.checkpoints.source.read_tensors", counting)
    convert(source, tmp_path / "out")
    assert len(opened) == 2 * 3  # two shards and a tower: names first, then values


def test_dry_run_reports_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    report = convert(source, tmp_path / "out", dry_run=True)
    assert not report.written and list(tmp_path.iterdir()) == []
    assert report.size == 2 * report.parameters == 2 * open_source(source).num_parameters
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" in report.ignored
    assert "would write" in report.summary() and "no tokenizer" in report.summary()


def test_the_tokenizer_and_the_manifest_come_along(llava, tiny_tokenizer, tmp_path: Path) -> None:
    save_model(llava, TINY_CONFIG, tmp_path / "m", tiny_tokenizer)
    report = convert(tmp_path / "m", tmp_path / "out", dtype="float32")
    assert report.tokenizer
    loaded = load_tokenizer(tmp_path / "out", TINY_CONFIG)
    assert loaded.encode("Where is the ring?") == tiny_tokenizer.encode("Where is the ring?")
    first, second = (
        json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("m", "out")
    )
    assert first["tensors"] == second["tensors"]
    assert second["source"] == str(tmp_path / "m")


def test_the_revision_of_a_cached_repository_is_kept(llava: Llava, tmp_path: Path) -> None:
    save_model(llava, TINY_CONFIG, tmp_path / "snapshots" / "abc123")
    assert convert(tmp_path / "snapshots" / "abc123", tmp_path / "out").revision == "abc123"
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["revision"] == "abc123"


@pytest.mark.parametrize("layout", [*LAYOUTS, "lora"])
def test_golden_layouts_converted(layout: str, shared: Path, tmp_path: Path) -> None:
    golden = Golden(shared)
    folder, tower = golden_folder(golden, layout, tmp_path)
    base = golden.folder / "official_layout" if layout == "lora" else None
    convert(folder, tmp_path / "out", dtype="float32", base=base, vision_tower=tower, verify=True)
    if layout == "lora":
        direct = load_model(folder, dtype="float32", base=base).state_dict()
        converted = load_model(tmp_path / "out").state_dict()
        assert all(torch.equal(direct[name], converted[name]) for name in direct)
        return
    model = load_model(tmp_path / "out")
    for prompt in golden.facts["prompts"]:
        with torch.no_grad():
            logits, _, _ = model.prefill(*golden.inputs(prompt))
        reference = golden.tensors[f"{prompt}.logits_last"][: logits.shape[-1]]
        torch.testing.assert_close(logits[0, 0], reference, atol=2e-5, rtol=0)


# Back to llava-hf


def test_to_hf_keeps_every_tensor_of_a_whole_tower(llava: Llava, tmp_path: Path) -> None:
    state = hf_state(llava)
    folder = write_layout("hf-new", tmp_path / "source", state)
    report = convert(folder, tmp_path / "out", to="hf", dtype=None)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in state.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vision_feature_layer"] == TINY_CONFIG.vision.feature_layer
    assert config["vision_config"]["num_hidden_layers"] == TINY_CONFIG.vision.num_layers
    assert report.notes == [note for note in report.notes if "tokenizer" in note]


def test_to_hf_says_what_a_converted_model_no_longer_has(llava: Llava, tmp_path: Path) -> None:
    save_model(llava, TINY_CONFIG, tmp_path / "m")
    report = convert(tmp_path / "m", tmp_path / "out", to="hf", dtype=None)
    assert "only the 2 vision blocks" in report.summary()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vision_config"]["num_hidden_layers"] == 2
    assert config["vision_feature_layer"] == -1
    back = load_model(tmp_path / "out")
    assert back.config.text == TINY_CONFIG.text
    assert back.config.vision.num_blocks == TINY_CONFIG.vision.num_blocks
    for name, tensor in llava.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor)


def test_to_hf_makes_room_for_the_image_token(tmp_path: Path, tiny_tokenizer) -> None:
    from dataclasses import replace

    text = replace(TINY_CONFIG.text, vocab_size=310)
    config = replace(TINY_CONFIG, text=text)
    llava = random_llava(config)
    save_model(llava, config, tmp_path / "m", tiny_tokenizer)
    report = convert(tmp_path / "m", tmp_path / "out", to="hf", dtype=None)
    assert "from 310 to 320 rows" in report.summary()
    head = load_file(tmp_path / "out" / "model.safetensors")[hf_name("decoder.lm_head.weight")]
    assert torch.equal(head[:310], llava.decoder.lm_head.weight)
    mean = llava.decoder.lm_head.weight.mean(0)
    torch.testing.assert_close(head[310:], mean.expand(10, -1).detach())
    tokenizer = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert added["<image>"] == written["image_token_index"] == 310
    assert added["<pad>"] == written["pad_token_id"] == 311


# Nothing half-written


class Stop:
    """A progress callback that raises when half of the bytes are done."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __call__(self, done: int, total: int) -> None:
        if done > total / 2:
            raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), RuntimeError("bug")])
def test_an_interrupt_leaves_nothing_and_a_rerun_works(
    error: BaseException, source: Path, llava: Llava, tmp_path: Path
) -> None:
    with pytest.raises(type(error)):
        convert(source, tmp_path / "out", shard_size=60_000, progress=Stop(error))
    assert list(tmp_path.iterdir()) == []
    convert(source, tmp_path / "out", shard_size=60_000)
    same_weights(tmp_path / "out", llava, torch.bfloat16)


def test_a_full_disk_is_an_error_that_leaves_nothing(
    source: Path, llava: Llava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(CheckpointError, match="No space left"):
        convert(source, tmp_path / "out", progress=Stop(full))
    assert list(tmp_path.iterdir()) == []

    def fsync(_file: int) -> None:
        raise full

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fsync)
        with pytest.raises(CheckpointError, match="No space left"):
            convert(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    convert(source, tmp_path / "out")
    same_weights(tmp_path / "out", llava, torch.bfloat16)


def test_too_little_free_space_is_found_before_writing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(10**6, 10**6 - 1000, 1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: usage)
    with pytest.raises(CheckpointError, match="are free"):
        convert(source, tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


def test_nan_in_the_source_leaves_nothing(llava: Llava, tmp_path: Path) -> None:
    folder = write_layout("hf-old", tmp_path / "source", hf_state(llava))
    name = hf_name("decoder.norm.weight")
    for file in folder.glob("*.safetensors"):
        state = load_file(file)
        if name in state:
            state[name][0] = float("nan")
            save_file(state, file)
    with pytest.raises(CheckpointError, match=rf"{name}.*NaN"):
        convert(folder, tmp_path / "out")
    assert names_in(tmp_path) == ["source"]


def test_verify_finds_a_byte_that_did_not_reach_the_disk(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = llava_lite.checkpoints.tensors.write_shards

    def damaged(folder: Path, *args: object) -> dict:
        table = write(folder, *args)  # type: ignore[arg-type]
        file = folder / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-7] ^= 64
        file.write_bytes(data)
        return table

    monkeypatch.setattr("llava_lite.checkpoints.tensors.write_shards", damaged)
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*differs"):
        convert(source, tmp_path / "out", verify=True)
    assert list(tmp_path.iterdir()) == []


def test_two_runs_at_once_share_no_folder(source: Path, llava: Llava, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="not empty"):
        with llava_lite.checkpoints.tensors.stage_folder(out) as slower:
            (slower / "model.safetensors").write_text("half")
            assert slower.parent.parent == tmp_path
            assert slower.parent.name.startswith(".out.partial-")
            convert(source, out)
            assert (slower / "model.safetensors").read_text() == "half"
    assert names_in(tmp_path) == ["out"]  # the faster one, complete
    same_weights(out, llava, torch.bfloat16)


def test_the_result_has_the_rights_of_any_new_folder(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_force_replaces_a_checkpoint_and_nothing_else(
    source: Path, llava: Llava, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    convert(source, out, shard_size=60_000)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        convert(source, out)
    convert(source, out, dtype="float16", force=True)
    same_weights(out, llava, torch.float16)
    assert names_in(out) == ["config.json", "manifest.json", "model.safetensors", "notes.txt"]
    convert(source, out, to="hf", force=True)
    assert "manifest.json" not in names_in(out)
    assert open_source(out).layout == "llava-hf, old names"


LEFTOVERS = (
    "adapter_config.json",
    "adapter_model.bin",
    "mm_projector.bin",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "open_clip_pytorch_model.bin",
    "pytorch_model-00001-of-00002.bin",
    "pytorch_model.bin.index.json",
    "tokenizer.model",
    "tokenizer_config.json",
)


def test_force_leaves_nothing_that_changes_what_the_new_checkpoint_is(
    source: Path, llava: Llava, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (out / "examples").mkdir(parents=True)
    (out / "examples" / "model.safetensors").write_text("mine")
    for name in LEFTOVERS:
        (out / name).write_text("{}")
    convert(source, out, force=True)
    expected = ["config.json", "examples", "manifest.json", "model.safetensors"]
    assert names_in(out) == expected
    assert (out / "examples" / "model.safetensors").read_text() == "mine"
    same_weights(out, llava, torch.bfloat16)


def test_a_replacement_cut_off_is_no_checkpoint(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    convert(source, out, shard_size=60_000)
    replace, moved = Path.replace, 0

    def killed(self: Path, target: Path) -> Path:
        nonlocal moved
        moved += 1
        if moved == 3:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        convert(source, out, shard_size=80_000, dtype="float16", force=True)
    assert len(names_in(out)) == 2  # two of the new shards, and none of the old
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_source(out)


@pytest.mark.parametrize("linked", [True, False])
def test_a_folder_that_exists_is_filled_in_place(
    linked: bool, source: Path, llava: Llava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link, or a disk mounted there: it stays, and nothing is written beside it."""
    disk, out = tmp_path / "disk", tmp_path / "disk"
    disk.mkdir()
    (disk / "lost+found").mkdir()
    if linked:
        out = tmp_path / "out"
        out.symlink_to(disk)
    inode, asked = disk.stat().st_ino, []
    usage = shutil.disk_usage

    def disk_usage(path: Path) -> object:
        asked.append(path)
        return usage(path)

    monkeypatch.setattr("shutil.disk_usage", disk_usage)
    seen: list[list[str]] = []
    convert(source, out, progress=lambda *_: seen.append(names_in(tmp_path)))
    assert asked == [disk]
    assert {tuple(names) for names in seen} == {tuple(names_in(tmp_path))}  # staged inside
    assert out.is_symlink() == linked and disk.stat().st_ino == inode
    written = ["config.json", "lost+found", "manifest.json", "model.safetensors"]
    assert names_in(disk) == written
    same_weights(out, llava, torch.bfloat16)


def test_the_source_is_never_the_destination(source: Path, tmp_path: Path) -> None:
    before = names_in(source)
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(CheckpointError, match="where the source lies"):
        convert(source, tmp_path / "link", force=True)
    for place in (source, source.parent / "tower"):
        with pytest.raises(CheckpointError, match="where the source lies"):
            convert(source, place, force=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        convert(source, tmp_path / "file")
    assert names_in(source) == before


# Command line and tools


def tool(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    return tool(name).main()


def convert_command(*arguments: object) -> int:
    return main(["convert", *map(str, arguments)])


def test_convert_command(source: Path, llava, tmp_path: Path, capsys) -> None:
    options = ("--dtype", "keep", "--shard-size", "60KB", "--verify", "--json")
    assert convert_command(source, tmp_path / "out", *options) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["verified"] and len(report["files"]) > 5
    same_weights(tmp_path / "out", llava, torch.float32)
    assert convert_command(source, tmp_path / "out") == 1
    output = capsys.readouterr()
    assert "not empty" in output.err and output.out == ""
    assert output.err.startswith("error: ") and output.err.count("\n") == 1
    assert convert_command(source) == 2
    assert "destination is needed" in capsys.readouterr().err
    assert convert_command(source, "--dry-run") == 0
    assert "would write" in capsys.readouterr().out


def test_help_and_wrong_usage_come_without_torch() -> None:
    code = (
        "import sys; from llava_lite.cli.program import main; main(['convert', '--help'])\n"
        "print(main(['convert', 'source']), 'torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.endswith("\n2 False\n")


@pytest.mark.parametrize("text, size", [("2GB", 2 * 10**9), ("1.5mb", 1_500_000), ("17", 17)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "2TB", "nan", "inf", "1e400GB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError):
        parse_size(text)


@pytest.mark.parametrize("layout", ["official", "llava-hf"])
def test_random_checkpoint_converts_and_runs(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"any")
    out = tmp_path / "made" / "m"
    options = ("--layout", layout, "--size", "tiny", "--layers", 3, "--out", out)
    tokenizer = ("--tokenizer", tmp_path / "tokenizer.model")
    assert call("make_random_checkpoint", monkeypatch, *options, *tokenizer) == 0
    source = open_source(out)
    assert source.layout.startswith(layout)
    assert source.config.text.num_layers == 3
    assert source.tokenizer_file == out / "tokenizer.model"
    assert len(source.unused) == 18
    model = load_model(out, dtype="float32")
    with torch.no_grad():
        pixels = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(0))
        logits, _, position = model.prefill(torch.tensor([[1, 7, -200, 9]]), pixels)
    assert position == 3 + 576
    assert logits.isfinite().all() and 0.1 < logits.std() < 10


@pytest.mark.parametrize("layout", ["official", "llava-hf"])
def test_random_checkpoint_is_converted_and_answers(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer
) -> None:
    tiny_tokenizer.save(tmp_path / "tokenizer.json")
    out = tmp_path / "made" / "m"
    options = ("--layout", layout, "--size", "tiny", "--tokenizer", tmp_path / "tokenizer.json")
    assert call("make_random_checkpoint", monkeypatch, *options, "--out", out) == 0
    report = convert(out, tmp_path / "converted", dtype="float32", verify=True)
    assert report.verified and report.tokenizer
    answers = []
    for folder in (out, tmp_path / "converted"):
        model = load(folder, device="cpu", dtype="float32")
        image = Image.new("RGB", (40, 30), "red")
        answers.append(model.generate(image, "What color is it?", max_new_tokens=4).token_ids)
    assert answers[0] == answers[1] and 1 <= len(answers[0]) <= 4


def test_random_checkpoint_overwrites_no_tower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    tower = tmp_path / "clip-vit-large-patch14-336"
    tower.mkdir()
    (tower / "pytorch_model.bin").write_bytes(b"1.7 GB")
    options = ("--layout", "official", "--size", "tiny", "--out", tmp_path / "m")
    with pytest.raises(SystemExit):
        call("make_random_checkpoint", monkeypatch, *options)
    assert "clip-vit-large-patch14-336 is there" in capsys.readouterr().err
    assert (tower / "pytorch_model.bin").read_bytes() == b"1.7 GB"
    assert names_in(tmp_path) == ["clip-vit-large-patch14-336"]


# Download, with a hub that is only pretended


class FakeHub:
    """Repositories as {id: {file: content}}; remembers what was fetched."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.fetched: list[str] = []
        self.revisions: list[tuple[str, str | None]] = []
        self.online = True

    def model_info(self, repo_id: str, **_options: object) -> SimpleNamespace:
        if not self.online:
            raise ConnectionError("no network\nat all")
        files = self.repositories[repo_id]
        siblings = [SimpleNamespace(rfilename=n, size=len(data)) for n, data in files.items()]
        return SimpleNamespace(siblings=siblings)

    def snapshot_download(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        allow_patterns: list[str] | None = None,
        local_dir: str | Path | None = None,
    ) -> str:
        self.revisions.append((repo_id, revision))
        folder = Path(local_dir or self.cache / repo_id.replace("/", "--") / (revision or "main"))
        if local_files_only:
            if not folder.is_dir():
                raise FileNotFoundError(repo_id)
            return str(folder)
        if not self.online:
            raise ConnectionError("no network")
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self.repositories[repo_id].items():
            if allow_patterns is None or name in allow_patterns:
                (folder / name).write_bytes(data)
                self.fetched.append(f"{repo_id}/{name}")
        return str(folder)


@pytest.fixture
def hub(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    hub = FakeHub(tmp_path / "cache")
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    config = json.loads(files["config.json"])
    config["mm_vision_tower"] = "openai/clip-tiny"
    files["config.json"] = json.dumps(config).encode()
    extra = {"README.md": b"x", "tf_model.h5": b"x" * 99, "original/weights.bin": b"x"}
    tower = {path.name: path.read_bytes() for path in (source.parent / "tower").iterdir()}
    hub.repositories = {"owner/llava": files | extra, "openai/clip-tiny": tower | extra}
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    return hub


def test_nothing_is_fetched_unasked(hub: FakeHub) -> None:
    with pytest.raises(CheckpointError, match=r"4 files of owner/llava \(0\.0 GB\).*--download"):
        resolve("owner/llava")
    hub.online = False
    with pytest.raises(CheckpointError, match=r"owner/llava \(about 14 GB.*--download"):
        resolve("owner/llava")
    with pytest.raises(CheckpointError, match="about 14 GB"):
        resolve("owner/llava", offline=True, download_missing=True)
    assert hub.fetched == []


def test_converting_offline_does_not_ask_the_hub(
    hub: FakeHub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    unknown = ("owner/llava", tmp_path / "out")
    assert convert_command(*unknown) == 1
    assert "4 files of owner/llava" in capsys.readouterr().err
    for options in (unknown, (source, tmp_path / "out", "--base", "owner/llava")):
        assert convert_command(*options, "--offline") == 1
        assert "about 14 GB" in capsys.readouterr().err


def test_download_brings_the_tower_and_is_then_used(hub: FakeHub, llava: Llava) -> None:
    folder = resolve("owner/llava", download_missing=True)
    assert {name.rsplit("/", 1)[0] for name in hub.fetched} == {"owner/llava", "openai/clip-tiny"}
    assert not any("README" in name or "h5" in name for name in hub.fetched)
    hub.online, count = False, len(hub.fetched)
    assert resolve("owner/llava") == folder == download("owner/llava", offline=True)
    assert len(hub.fetched) == count
    loaded = load_model(folder).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in llava.state_dict().items())


def test_download_into_a_folder(hub: FakeHub, tmp_path: Path) -> None:
    folder = download("owner/llava", destination=tmp_path / "big" / "llava")
    assert folder == tmp_path / "big" / "llava"
    assert names_in(tmp_path / "big") == ["clip-tiny", "llava"]
    assert open_source(folder).layout == "official"


def test_an_incomplete_cache_is_not_used(hub: FakeHub) -> None:
    folder = resolve("owner/llava", download_missing=True)
    (folder / "pytorch_model-2.bin").unlink()
    with pytest.raises(CheckpointError, match="files of owner/llava"):
        resolve("owner/llava")
    with pytest.raises(CheckpointError, match="not complete"):
        download("owner/llava", offline=True)


def test_a_missing_tower_is_named(hub: FakeHub) -> None:
    hub.snapshot_download("owner/llava", allow_patterns=list(plan_download("owner/llava").files))
    with pytest.raises(CheckpointError, match=r"2 files of openai/clip-tiny"):
        resolve("owner/llava")
    assert plan_download("openai/clip-tiny").files == ("config.json", "pytorch_model.bin")


def test_another_tower_makes_the_named_one_needless(
    hub: FakeHub,
    source: Path,
    llava: Llava,
    tiny_tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tower = source.parent / "tower"
    folder = resolve("owner/llava", download_missing=True, vision_tower=tower)
    assert {name.rsplit("/", 1)[0] for name in hub.fetched} == {"owner/llava"}
    with pytest.raises(CheckpointError, match="clip-tiny.*--vision-tower"):
        resolve("owner/llava")
    assert resolve("owner/llava", vision_tower=tower) == folder
    options = ("owner/llava", tmp_path / "out", "--vision-tower", tower, "--dtype", "keep")
    assert convert_command(*options) == 0
    same_weights(tmp_path / "out", llava, torch.float32)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    recorded = [manifest[name] for name in ("source", "base", "vision_tower")]
    assert recorded == ["owner/llava", None, str(tower)]
    monkeypatch.setattr(
        "llava_lite.checkpoints.checkpoint.load_tokenizer", lambda *_: tiny_tokenizer
    )
    assert load("owner/llava", vision_tower=tower, device="cpu").llava.dtype == torch.float32


@pytest.mark.parametrize("indexed", [True, False])
def test_a_tower_inside_makes_the_named_one_needless(
    indexed: bool, hub: FakeHub, llava: Llava, tmp_path: Path
) -> None:
    folder = write_layout("official-tower-inside", tmp_path / "inside", hf_state(llava))
    if not indexed:
        (folder / "pytorch_model.bin.index.json").unlink()
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    config = json.loads(files["config.json"]) | {"mm_vision_tower": "openai/clip-tiny"}
    files["config.json"] = json.dumps(config).encode()
    hub.repositories["owner/whole"] = files
    found = resolve("owner/whole", download_missing=True)
    assert {name.rsplit("/", 1)[0] for name in hub.fetched} == {"owner/whole"}
    hub.online = False
    assert resolve("owner/whole") == found


def test_the_revision_reaches_the_hub(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = resolve("owner/llava", revision="v1", download_missing=True)
    assert folder.name == "v1"
    hub.revisions.clear()
    options = ("owner/llava", tmp_path / "out", "--revision", "v1")
    assert convert_command(*options) == 0
    assert hub.revisions[0] == ("owner/llava", "v1")
    assert ("owner/llava", None) not in hub.revisions
    with pytest.raises(CheckpointError, match="not on this disk"):
        resolve("owner/llava", revision="v2")


def test_the_base_is_in_the_manifest(shared: Path, tmp_path: Path) -> None:
    golden, base = Golden(shared), shared / "goldens" / "llava" / "tiny" / "official_layout"
    convert(golden.folder / "lora", tmp_path / "out", base=base)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["base"] == str(base)
    assert Path(manifest["vision_tower"]).is_dir()


def test_a_repository_without_weights_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    hub.repositories["owner/data"] = {"config.json": b"{}", "train.parquet": b"x"}
    with pytest.raises(CheckpointError, match="owner/data: holds no weights"):
        download("owner/data", destination=tmp_path / "data")
    assert hub.fetched == []
    hub.repositories["owner/clip"] = {"open_clip_model.bin": b"x", "open_clip_config.json": b"{}"}
    assert plan_download("owner/clip").files == ("open_clip_config.json", "open_clip_model.bin")


def test_offline_puts_nothing_into_a_folder(hub: FakeHub, tmp_path: Path) -> None:
    resolve("owner/llava", download_missing=True)
    with pytest.raises(CheckpointError, match="out: nothing can be put there offline"):
        download("owner/llava", offline=True, destination=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_failures_of_the_hub_are_one_line(hub: FakeHub) -> None:
    hub.online = False
    with pytest.raises(CheckpointError, match=r"owner/llava: cannot reach the hub: no network$"):
        download("owner/llava")
    with pytest.raises(CheckpointError, match="no hub id"):
        download("llava")
    with pytest.raises(CheckpointError, match="no such file or folder"):
        resolve("./nowhere/at/all")


def test_a_local_path_is_itself(tmp_path: Path) -> None:
    assert resolve(tmp_path) == tmp_path


def test_only_one_copy_of_the_weights_is_wanted() -> None:
    names = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "tokenizer.model",
        "flax_model.msgpack",
        ".gitattributes",
        "onnx/model.safetensors",
    ]
    assert choose_files(names) == sorted(names[:4] + ["tokenizer.model"])
