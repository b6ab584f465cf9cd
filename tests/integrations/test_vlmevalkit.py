"""The VLMEvalKit model class. The kit is on no package index: these run against the record of its
`BaseModel` below."""

import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from helpers.peers import peer
from llava_lite.errors import LlavaLiteError
from llava_lite.generation.model import Model
from llava_lite.inputs.prompt import build_prompt

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


class RecordedBaseModel:
    """What VLMEvalKit calls, and what a subclass may call, by its guide for developers."""

    INTERLEAVE = False

    def __init__(self) -> None:
        self.dump_image_func: Any = None

    def set_dump_image(self, dump_image_func: Any) -> None:
        self.dump_image_func = dump_image_func

    def dump_image(self, line: Any, dataset: Any) -> Any:
        return self.dump_image_func(line)

    def use_custom_prompt(self, dataset: Any) -> bool:
        return False

    def message_to_promptimg(self, message: Any, dataset: Any = None) -> Any:
        raise NotImplementedError

    def generate(self, message: Any, dataset: Any = None) -> str:
        parts = [message] if isinstance(message, str) else message
        whole = [{"type": "text", "value": p} if isinstance(p, str) else p for p in parts]
        return self.generate_inner(whole, dataset)  # type: ignore[attr-defined]

    def chat(self, messages: Any, dataset: Any = None) -> str:
        return self.chat_inner(messages, dataset=dataset)  # type: ignore[attr-defined]


MODULE = "llava_lite.integrations.vlmevalkit"
KINDS = {
    **dict.fromkeys(("MMBench", "MMBench_DEV_EN", "MMBench_DEV_CN", "MMMU_DEV_VAL"), "MCQ"),
    **dict.fromkeys(("SEEDBench_IMG", "CCBench", "MME-RealWorld"), "MCQ"),
    **dict.fromkeys(("MME", "POPE"), "Y/N"),
    **dict.fromkeys(("TextVQA_VAL", "MMVet", "OCRBench"), "VQA"),
    "COCO_VAL": "Caption",
}


@pytest.fixture
def kit(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module as it is where a VLMEvalKit of the recorded base is installed."""
    base = ModuleType("vlmeval.vlm.base")
    base.__dict__["BaseModel"] = RecordedBaseModel
    dataset = ModuleType("vlmeval.dataset")
    dataset.__dict__["DATASET_TYPE"] = KINDS.get
    parents = {name: ModuleType(name) for name in ("vlmeval", "vlmeval.vlm")}
    for name, module in {**parents, base.__name__: base, dataset.__name__: dataset}.items():
        module.__dict__.setdefault("__path__", [])
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules.pop(MODULE, None)
    yield importlib.import_module(MODULE)
    del sys.modules[MODULE]


@pytest.fixture
def model(kit: Any, monkeypatch: pytest.MonkeyPatch, tiny_model: Model) -> Any:
    """The class around the tiny model."""
    monkeypatch.setattr("llava_lite.checkpoints.load.load", lambda *_, **__: tiny_model)
    assert issubclass(kit.LLaVALite, RecordedBaseModel)
    return kit.LLaVALite(max_new_tokens=6)


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    paths = [str(tmp_path / f"{color}.png") for color in ("red", "blue")]
    for path in paths:
        Image.new("RGB", (60, 40), Path(path).stem).save(path)
    return paths


def text(value: str) -> dict[str, str]:
    return {"type": "text", "value": value}


def image(value: str) -> dict[str, str]:
    return {"type": "image", "value": value}


def test_methods_take_what_the_kit_gives(kit: Any) -> None:
    wanted = {
        "generate_inner": ["self", "message", "dataset"],
        "chat_inner": ["self", "message", "dataset"],
        "use_custom_prompt": ["self", "dataset"],
        "build_prompt": ["self", "line", "dataset"],
    }
    for name, parameters in wanted.items():
        assert list(inspect.signature(getattr(kit.LLaVALite, name)).parameters) == parameters
    assert kit.LLaVALite.INTERLEAVE is True


def test_arguments_reach_the_model(
    kit: Any, monkeypatch: pytest.MonkeyPatch, tiny_model: Model
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        "llava_lite.checkpoints.load.load",
        lambda name, **options: seen.append((name, options)) or tiny_model,
    )
    made = kit.LLaVALite("weights/some", {"dtype": "float32"}, reduction="fastv-50", template="v1")
    assert seen == [("weights/some", {"exif": False, "dtype": "float32"})]
    assert (made.options.max_new_tokens, made.options.temperature) == (1024, 0.0)
    with pytest.raises(ValueError, match="hybird"):
        kit.LLaVALite(reduction="hybird")
    assert len(seen) == 1  # said before a model is loaded


# ---- answers -------------------------------------------------------------------------------------


def test_an_image_and_a_question(model: Any, tiny_model: Model, images: list[str]) -> None:
    expected = tiny_model.generate(images[0], "star?", max_new_tokens=6)
    assert model.generate([image(images[0]), text("star?")], dataset="MMBench") == expected
    assert model.generate([text("star?")]) == tiny_model.generate(None, "star?", max_new_tokens=6)
    assert type(model.generate("star?")) is str


def test_without_the_kit(monkeypatch: pytest.MonkeyPatch, tiny_model: Model) -> None:
    monkeypatch.setattr("llava_lite.checkpoints.load.load", lambda *_, **__: tiny_model)
    monkeypatch.setitem(sys.modules, "vlmeval", None)
    sys.modules.pop(MODULE, None)
    model = importlib.import_module(MODULE).LLaVALite(max_new_tokens=6)
    del sys.modules[MODULE]
    expected = tiny_model.generate(None, "star?", max_new_tokens=6)
    assert model.generate_inner([text("star?")]) == expected


def test_interleaved_messages_keep_their_order(
    model: Any, tiny_model: Model, images: list[str]
) -> None:
    one, two = images
    message = [text("Compare"), image(one), text("with"), image(two), text("please.")]
    prompt = "Compare\n<image>\nwith\n<image>\nplease."
    expected = tiny_model.generate([one, two], prompt, max_new_tokens=6)
    assert model.generate_inner(message) == expected
    swapped = [text("Compare"), image(two), text("with"), image(one), text("please.")]
    assert model.generate_inner(swapped) == tiny_model.generate(
        [two, one], prompt, max_new_tokens=6
    )


def test_a_conversation(model: Any, tiny_model: Model, images: list[str]) -> None:
    messages = [
        {"role": "user", "content": [image(images[0]), text("star?")]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "And the ring?"},
    ]
    system = build_prompt("vicuna_v1", [("", None)]).split(" USER:")[0]
    prompt = "<image>\nstar? ASSISTANT: red</s>USER: And the ring?"
    expected = tiny_model.generate(images[0], prompt, max_new_tokens=6, system=system)
    assert model.chat(messages) == expected


def test_what_cannot_be_asked(model: Any, tmp_path: Path) -> None:
    with pytest.raises(LlavaLiteError, match="not 'video'"):
        model.generate_inner([{"type": "video", "value": "a.mp4"}, text("x")])
    with pytest.raises(LlavaLiteError, match="missing.png"):
        model.generate_inner([image(str(tmp_path / "missing.png")), text("x")])
    with pytest.raises(LlavaLiteError, match="the last message must have the role 'user'"):
        model.chat([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}])


# ---- prompts -------------------------------------------------------------------------------------

NAN = float("nan")


@pytest.mark.parametrize(
    ("kind", "line", "dataset", "expected"),
    [
        (
            "choice",
            {"question": "Which?", "hint": "Look.", "A": "x", "B": 2, "C": "z", "D": NAN},
            "MMBench_DEV_EN",
            f"Look.\nWhich?\nA. x\nB. 2\nC. z{LETTER}",
        ),
        (
            "choice",  # options end at the first that is missing
            {"question": "Which?", "hint": NAN, "A": "x", "B": "nan", "C": "z"},
            "SEEDBench_IMG",
            f"Which?\nA. x{LETTER}",
        ),
        (
            "choice",  # as the file itself is read (mmbench.py)
            {"question": "Which? ", "A": "none", "B": "Na", "C": " no", "D": "NA"},
            "MMBench_DEV_EN",
            f"Which? \nA. none\nB. Na\nC.  no{LETTER}",
        ),
        (
            "choice",
            {"question": "哪个?", "A": "红", "B": "蓝"},
            "CCBench",
            "哪个?\nA. 红\nB. 蓝\n请直接回答选项字母。",
        ),
        (
            "choice",
            {"question": "3+4=?", "A": "7", "B": "8"},
            "MMBench_DEV_CN",
            "3+4=?\nA. 7\nB. 8\n请直接回答选项字母。",
        ),
        ("choice", {"question": "How many?"}, "MMMU_DEV_VAL", f"How many?{SHORT}"),
        ("yes or no", {"question": "Is it? Please answer yes or no."}, "MME", f"Is it?{SHORT}"),
        ("yes or no", {"question": "Is there a dog?"}, "POPE", f"Is there a dog?{SHORT}"),
        ("short", {"question": "What year?"}, "TextVQA_VAL", f"What year?{SHORT}"),
        (
            "caption",
            {"answer": "['a']"},
            "COCO_VAL",
            "Provide a one-sentence caption for the provided image.",
        ),
    ],
)
def test_official_prompts(kit: Any, kind: str, line: Any, dataset: str, expected: str) -> None:
    assert kit.find_kind(dataset) == kind
    assert kit.official_prompt(kind, line, dataset) == expected


def test_lines_come_as_pandas_rows(kit: Any) -> None:
    pandas = peer("pandas")
    table = pandas.DataFrame(
        [{"question": "Which?", "hint": None, "A": "x", "B": 2.0, "C": None}, {"question": "b"}]
    )
    prompt = kit.official_prompt("choice", table.iloc[0], "MMBench")
    assert prompt == f"Which?\nA. x\nB. 2.0{LETTER}"


@pytest.mark.parametrize("dataset", ["MMVet", "OCRBench", "MME-RealWorld", "Unknown", "", None])
def test_other_data_sets_keep_the_kits_prompt(model: Any, dataset: str | None) -> None:
    assert model.use_custom_prompt(dataset) is False
    with pytest.raises(LlavaLiteError, match="no official prompt"):
        model.build_prompt({"question": "x"}, dataset)


@pytest.mark.parametrize("several", [False, True])
def test_build_prompt_puts_the_images_first(model: Any, images: list[str], several: bool) -> None:
    model.set_dump_image(lambda line: images if several else images[0])
    line = {"question": "Which?", "A": "x", "B": "y"}
    assert model.use_custom_prompt("MMBench_DEV_EN") is True
    message = model.build_prompt(line, dataset="MMBench_DEV_EN")
    shown = images if several else images[:1]
    assert message == [*map(image, shown), text(f"Which?\nA. x\nB. y{LETTER}")]
    assert isinstance(model.generate(message, dataset="MMBench_DEV_EN"), str)
