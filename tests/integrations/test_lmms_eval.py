"""The lmms-eval plugin. Against lmms-eval 0.7.3 itself where its base class, its registry and its
tasks can be imported (its own requirements are many); otherwise against `RecordedLmms` and the
other records below, which a test compares with the real ones where those are there."""

import abc
import importlib
import inspect
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

import llava_lite
from helpers.fastvithd import FASTVLM, random_fastvlm
from helpers.models import ROOT
from llava_lite.errors import LlavaLiteError
from llava_lite.generation.model import Model
from llava_lite.inputs.pixels import preprocess
from llava_lite.inputs.tokenizer import Tokenizer
from llava_lite.integrations import lmms_eval_manifest

# ---- what lmms-eval 0.7.3 is, as far as the plugin needs it --------------------------------------


class RecordedHook:
    def __init__(self, cachinglm: Any = None) -> None: ...

    def add_partial(self, attr: Any, req: Any, res: Any) -> None: ...


class RecordedLmms(abc.ABC):
    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.cache_hook = RecordedHook(None)
        self.task_dict: dict[str, Any] = {}

    @abc.abstractmethod
    def loglikelihood(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests: Any) -> Any: ...

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Any = None) -> Any:
        pairs = [pair.split("=", 1) for pair in arg_string.split(",") if pair]
        given = {name: int(text) if text.isdigit() else text for name, text in pairs}
        more = {k: v for k, v in (additional_config or {}).items() if v is not None}
        return cls(**given, **more)

    def set_cache_hook(self, cache_hook: Any) -> None:
        self.cache_hook = cache_hook


@dataclass
class RecordedInstance:
    request_type: str
    arguments: tuple[Any, ...]
    idx: int
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def args(self) -> tuple[Any, ...]:
        return self.arguments


@dataclass
class RecordedCounts:
    input_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None


@dataclass
class RecordedResult:
    text: str
    token_counts: RecordedCounts | None = None


@dataclass
class RecordedManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


RECORDED: dict[str, dict[str, Any]] = {
    "lmms_eval": {},
    "lmms_eval.api": {},
    "lmms_eval.api.model": {"lmms": RecordedLmms, "CacheHook": RecordedHook},
    "lmms_eval.api.instance": {
        "Instance": RecordedInstance,
        "GenerationResult": RecordedResult,
        "TokenCounts": RecordedCounts,
    },
    "lmms_eval.models": {},
    "lmms_eval.models.registry_v2": {"ModelManifest": RecordedManifest},
}


def import_kit() -> str:
    """ "" with the real lmms-eval, else why its record stands in."""
    try:
        for name in RECORDED:
            importlib.import_module(name)
        return ""
    except ImportError as error:
        for name, content in RECORDED.items():
            module = ModuleType(name)
            module.__dict__.update(content, __path__=[])
            sys.modules[name] = module
        return f"lmms-eval cannot be imported: {error}"


MISSING = import_kit()
real_kit = pytest.mark.skipif(bool(MISSING), reason=MISSING)
plugin = importlib.import_module("llava_lite.integrations.lmms_eval")


def request(kind: str, arguments: tuple[Any, ...], index: int = 0) -> Any:
    """An `Instance` as the kit's tasks make them."""
    *_, doc_id, task, split = arguments
    about = {"task": task, "doc_id": doc_id, "repeats": 1, "split": split}
    return sys.modules["lmms_eval.api.instance"].Instance(kind, arguments, index, about)


# ---- a task --------------------------------------------------------------------------------------

COLORS = ("red", "green", "blue", "white", "black")
QUESTIONS = ("What color is it?", "star?", "Is it round? Yes or no.", "ring", "Describe the image.")
GREEDY = {"max_new_tokens": 6, "temperature": 0, "do_sample": False, "until": ["\n\n"]}


def picture(doc: dict[str, Any]) -> Image.Image:
    return Image.new("RGB", (60, 40), doc["color"])


def docs() -> list[dict[str, Any]]:
    return [
        {"color": color, "question": text} for color, text in zip(COLORS, QUESTIONS, strict=True)
    ]


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    return [picture(doc)]


def doc_to_messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
    content = [{"type": "image", "url": picture(doc)}, {"type": "text", "text": doc["question"]}]
    return [{"role": "user", "content": content}]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tiny_model: Model) -> Callable[..., Any]:
    """Makes an adapter around the tiny model, with the docs of a task in it."""

    def make(cls: str = "LlavaLite", **arguments: Any) -> Any:
        monkeypatch.setattr("llava_lite.checkpoints.load.load", lambda *_, **__: tiny_model)
        adapter = getattr(plugin, cls)(**arguments)
        adapter.task_dict = {"colors": {"test": docs()}}
        return adapter

    return make


def simple_requests(wishes: Any = GREEDY, contexts: Any = QUESTIONS) -> list[Any]:
    return [
        request("generate_until", (text, wishes, doc_to_visual, i, "colors", "test"), 0)
        for i, text in enumerate(contexts)
    ]


def chat_requests(messages: Callable[..., Any] = doc_to_messages) -> list[Any]:
    return [
        request("generate_until", (text, messages, GREEDY, i, "colors", "test"), 0)
        for i, text in enumerate(QUESTIONS)
    ]


def expected(model: Model, **options: Any) -> list[str]:
    """One by one, as `Model.generate` answers."""
    return [
        str(model.generate(picture(doc), doc["question"], **{"max_new_tokens": 6, **options}))
        for doc in docs()
    ]


def texts(results: list[Any]) -> list[str]:
    return [result.text for result in results]


# ---- the record and the real thing ---------------------------------------------------------------


@real_kit
@pytest.mark.parametrize(
    ("module", "name"),
    [(module, name) for module, content in RECORDED.items() for name in content],
)
def test_the_record_is_what_the_kit_is(module: str, name: str) -> None:
    real, recorded = getattr(sys.modules[module], name), RECORDED[module][name]
    for attribute in ("loglikelihood", "generate_until", "generate_until_multi_round"):
        assert hasattr(real, attribute) == hasattr(recorded, attribute)
    names = [n for n in vars(recorded) if inspect.isfunction(vars(recorded)[n])]
    for method in {"__init__", *names} - {"__eq__", "__repr__", "__replace__"}:
        if method not in vars(recorded):
            continue
        there = list(inspect.signature(getattr(real, method)).parameters)
        here = list(inspect.signature(getattr(recorded, method)).parameters)
        assert there[: len(here)] == here, method
    assert getattr(real, "__abstractmethods__", frozenset()) == getattr(
        recorded, "__abstractmethods__", frozenset()
    )


@real_kit
def test_the_registry_finds_it_through_the_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    declared = re.search(
        r'\[project.entry-points."lmms_eval.models"\]\nllava_lite = "(.+)"\n',
        (ROOT / "pyproject.toml").read_text(encoding="utf-8"),
    )
    assert declared
    info = tmp_path / "llava_lite_entry-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llava-lite-entry\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[lmms_eval.models]\nllava_lite = {declared[1]}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    registry = ModelRegistryV2()
    registry.load_entrypoint_manifests()
    assert registry.get_model_class("llava_lite") is plugin.LlavaLiteChat
    assert registry.get_model_class("llava_lite", force_simple=True) is plugin.LlavaLite
    assert registry.get_model_class("llava-lite") is plugin.LlavaLiteChat


def test_manifest_names_classes_that_are_there() -> None:
    manifest = lmms_eval_manifest()
    assert (manifest.model_id, manifest.aliases) == ("llava_lite", ("llava-lite",))
    for path, simple in ((manifest.simple_class_path, True), (manifest.chat_class_path, False)):
        module, _, name = path.rpartition(".")
        cls = getattr(importlib.import_module(module), name)
        assert issubclass(cls, sys.modules["lmms_eval.api.model"].lmms)
        assert cls.is_simple is simple and not inspect.isabstract(cls)


def test_arguments_of_the_command_line_reach_the_model(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Model
) -> None:
    seen: list[Any] = []

    def load(name: Any, **options: Any) -> Model:
        seen.append((name, options))
        return tiny_model

    monkeypatch.setattr("llava_lite.checkpoints.load.load", load)
    given = "pretrained=weights/some,dtype=float32,reduction=fastv-50,quantize=int8,template=plain"
    more = {"batch_size": "3", "max_batch_size": None, "device": "cpu"}
    adapter = plugin.LlavaLite.create_from_arg_string(given, more)
    loading = {"device": "cpu", "exif": False, "dtype": "float32", "quantize": "int8"}
    assert seen == [("weights/some", loading)]
    assert (adapter.rows, adapter.template) == (3, "plain")
    assert str(adapter.prompting["reduction"]) == "fastv-50"
    plugin.LlavaLite.create_from_arg_string("", {"batch_size": "auto"})
    assert seen[1] == (None, {"device": "auto", "exif": False})


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"batch_size": 0}, LlavaLiteError, "batch_size 0"),
        ({"reduction": "hybird"}, ValueError, "hybird"),
        ({"seed": -1}, ValueError, "seed"),
    ],
)
def test_bad_arguments(make: Any, arguments: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        make(**arguments)


def test_several_processes_are_refused(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LlavaLiteError, match="one process"):
        make()


# ---- generation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize(
    ("cls", "requests"), [("LlavaLite", simple_requests), ("LlavaLiteChat", chat_requests)]
)
def test_answers_in_the_order_of_the_requests(
    make: Any, tiny_model: Model, cls: str, requests: Any, batch_size: int
) -> None:
    adapter = make(cls, batch_size=batch_size)
    forward = requests()
    assert texts(adapter.generate_until(forward)) == expected(tiny_model)
    assert texts(adapter.generate_until(forward[::-1])) == expected(tiny_model)[::-1]
    assert adapter.generate_until([]) == []


def test_a_fastvlm_answers_by_its_own_template_and_size(
    monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Tokenizer
) -> None:
    fastvlm = Model(random_fastvlm(), tiny_tokenizer, replace(FASTVLM, template="llava-hf"))
    monkeypatch.setattr("llava_lite.checkpoints.load.load", lambda *_, **__: fastvlm)
    adapter = plugin.LlavaLiteChat(image_size=384, reduction="none")
    adapter.task_dict = {"colors": {"test": docs()}}
    results = adapter.generate_until(chat_requests())
    assert texts(results) == expected(fastvlm, image_size=384)
    usage = fastvlm.generate(picture(docs()[0]), QUESTIONS[0], max_new_tokens=6).usage
    assert results[0].token_counts.input_tokens == usage["prompt_tokens"] + 36


def test_token_counts(make: Any, tiny_model: Model) -> None:
    [result, *_] = make().generate_until(simple_requests())
    usage = tiny_model.generate(picture(docs()[0]), QUESTIONS[0], max_new_tokens=6).usage
    assert result.token_counts.input_tokens == usage["prompt_tokens"] + 16
    assert result.token_counts.output_tokens == usage["completion_tokens"]


def test_requests_with_different_wishes_run_together(make: Any, tiny_model: Model) -> None:
    sampled = {"max_new_tokens": 6, "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    stopping = {"max_new_tokens": 12, "until": expected(tiny_model, max_new_tokens=12)[2][3:5]}
    mixed = [simple_requests(wishes)[i] for i, wishes in enumerate((GREEDY, sampled, stopping))]
    given = texts(make(seed=5).generate_until(mixed))
    options = {"temperature": 0.7, "top_p": 0.9, "seed": 5}
    assert given[0] == expected(tiny_model)[0]
    assert given[1] == expected(tiny_model, **options)[1] != expected(tiny_model)[1]
    assert given[2] == expected(tiny_model, max_new_tokens=12, stop=stopping["until"])[2]
    assert len(given[2]) <= 3


@pytest.mark.parametrize(
    ("wishes", "wanted"),
    [
        ({}, {"max_new_tokens": 1024, "temperature": 0.0, "top_p": 1.0, "stop": []}),
        ({"max_new_tokens": 16, "until": "\n"}, {"max_new_tokens": 16, "stop": ["\n"]}),
        ({"max_gen_toks": 9, "until": ["a", ""]}, {"max_new_tokens": 9, "stop": ["a"]}),
        ({"temperature": 0.3}, {"temperature": 0.3}),
        ({"temperature": 0.3, "do_sample": False}, {"temperature": 0.0}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": 0}, {"temperature": 0.0}),
        ({"top_p": 0, "top_k": None, "num_beams": 1}, {"top_p": 1.0, "top_k": 0}),
    ],
)
def test_what_a_task_says_about_generation(make: Any, wishes: Any, wanted: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        options = make().options(wishes)
    assert {name: getattr(options, name) for name in wanted} == wanted


def test_unknown_wishes_are_named_and_beams_refused(make: Any) -> None:
    with pytest.warns(UserWarning, match="length_penalty of the task"):
        make().options({"length_penalty": 2})
    with pytest.raises(LlavaLiteError, match="num_beams 5"):
        make().options({"num_beams": 5})


def test_image_markers_of_a_context(make: Any, tiny_model: Model) -> None:
    """As many as images: they stay. Any other number: they go, and the images come first."""
    doc = docs()[0]
    contexts = ("before <image> after", "<image><image> it?", "plain text")
    given = texts(make().generate_until(simple_requests(contexts=contexts)))
    image = picture(doc)
    placed = tiny_model.generate(image, "before <image> after", max_new_tokens=6)
    assert given[0] == placed != tiny_model.generate(image, "before  after", max_new_tokens=6)
    assert given[1] == tiny_model.generate(picture(docs()[1]), "it?", max_new_tokens=6)


def test_no_image_and_several(make: Any, tiny_model: Model) -> None:
    adapter = make()
    images = [picture(doc) for doc in docs()[:2]]
    visuals: list[Any] = [lambda doc: [], lambda doc: None, lambda doc: [None], lambda doc: images]
    requests = [
        request("generate_until", ("star?", GREEDY, visual, 0, "colors", "test"), 0)
        for visual in visuals
    ]
    text_only = str(tiny_model.generate(None, "star?", max_new_tokens=6))
    both = str(tiny_model.generate(images, "star?", max_new_tokens=6))
    assert texts(adapter.generate_until(requests)) == [text_only] * 3 + [both]


def test_a_bad_image_and_a_long_prompt_cost_one_row_each(
    make: Any, tiny_model: Model, tmp_path: Path
) -> None:
    requests = simple_requests(contexts=(*QUESTIONS[:3], "ring " * 600, QUESTIONS[4]))
    missing = tmp_path / "missing.png"
    text, wishes, _, *document = requests[1].args
    requests[1] = request("generate_until", (text, wishes, lambda doc: [missing], *document), 0)
    with pytest.warns(UserWarning) as warned:
        given = texts(make().generate_until(requests))
    right = expected(tiny_model)
    assert given == [right[0], "", right[2], "", right[4]]
    said = " / ".join(str(warning.message) for warning in warned)
    assert "colors, test, document 1" in said and "missing.png" in said
    assert "document 3" in said and "context of 512" in said


def test_the_caches_hear_of_answers(make: Any, tiny_model: Model) -> None:
    heard: list[Any] = []

    class Hook:
        def add_partial(self, *call: Any) -> None:
            heard.append(call)

    adapter = make()
    adapter.set_cache_hook(Hook())
    adapter.generate_until(simple_requests()[:2])
    answers = expected(tiny_model)
    assert heard == [("generate_until", (QUESTIONS[i], GREEDY), answers[i]) for i in (0, 1)]
    heard.clear()
    chat = make("LlavaLiteChat")
    chat.set_cache_hook(Hook())
    chat.generate_until(chat_requests()[:1])
    assert heard == [("generate_until", (QUESTIONS[0], GREEDY), answers[0])]


# ---- messages ------------------------------------------------------------------------------------


def test_a_conversation_of_several_turns(make: Any, tiny_model: Model) -> None:
    def messages(doc: Any) -> list[dict[str, Any]]:
        return [
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            *doc_to_messages({**docs()[0], "question": "star?"}),
            {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
            {"role": "user", "content": [{"type": "text", "text": "And the ring?"}]},
        ]

    prompt = "Be brief. USER: <image>\nstar? ASSISTANT: red</s>USER: And the ring? ASSISTANT:"
    ids = tiny_model.tokenizer.encode_prompt(prompt)
    pixels = preprocess(picture(docs()[0]), 56, tiny_model.config.pad)
    written: list[int] = []
    while len(written) < 6:
        logits, _, _ = tiny_model.prefill(torch.tensor([[*ids, *written]]), pixels)
        written.append(int(logits[0, 0, :310].argmax()))
    [given] = texts(make("LlavaLiteChat").generate_until(chat_requests(messages)[:1]))
    assert given == tiny_model.tokenizer.decode(written).strip()


def test_texts_and_images_keep_their_order(make: Any, tiny_model: Model) -> None:
    one, two = (picture(doc) for doc in docs()[:2])

    def messages(doc: Any) -> list[dict[str, Any]]:
        parts = ["Compare", one, "with", two, "please."]
        content = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image", "url": part}
            for part in parts
        ]
        return [{"role": "user", "content": content}]

    prompt = "Compare\n<image>\nwith\n<image>\nplease."
    [given] = texts(make("LlavaLiteChat").generate_until(chat_requests(messages)[:1]))
    assert given == tiny_model.generate([one, two], prompt, max_new_tokens=6)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "the last message must have the role 'user'"),
        (
            [{"role": "assistant", "content": "x"}],
            "messages.0: an assistant message needs a user message before it",
        ),
        ([{"role": "tool", "content": "x"}], "messages.0: the role 'tool' is not supported"),
        ([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}], "not 'video'"),
    ],
)
def test_messages_that_cannot_be_asked(make: Any, messages: Any, reason: str) -> None:
    with pytest.warns(UserWarning, match=reason):
        given = make("LlavaLiteChat").generate_until(chat_requests(lambda doc: messages)[:1])
    assert texts(given) == [""]


# ---- rounds --------------------------------------------------------------------------------------


def rounds(doc: Any, previous_output: Any = None, round_idx: Any = None, **more: Any) -> Any:
    """Asks the first document twice, the others three times."""
    last = 2 if doc["color"] == "red" else 3
    info = more["previous_round_info"]
    assert info == (None if round_idx == 1 else {"round": round_idx - 1})
    if round_idx == last:
        return None, None, True, [*previous_output, "end"], None
    question = f"{previous_output[-1]} ring?"
    return [picture(doc)], question, False, previous_output, {"round": round_idx}


def message_rounds(
    doc: Any, round_idx: Any = None, previous_output: Any = None, **more: Any
) -> Any:
    if round_idx is None:
        return doc_to_messages(doc)
    images, text, done, outputs, info = rounds(doc, previous_output, round_idx, **more)
    messages = None if done else doc_to_messages({**doc, "question": text})
    return messages, done, outputs, info


def test_rounds_go_on_until_the_task_ends_them(make: Any, tiny_model: Model) -> None:
    wanted = []
    for number, doc in enumerate(docs()):
        said, question = [], doc["question"]
        for _ in range(2 if number == 0 else 3):
            said.append(str(tiny_model.generate(picture(doc), question, max_new_tokens=6)))
            question = f"{said[-1]} ring?"
        wanted.append([*said, "end"])
    simple = [
        request(
            "generate_until_multi_round",
            (text, GREEDY, doc_to_visual, rounds, i, "colors", "test"),
            0,
        )
        for i, text in enumerate(QUESTIONS)
    ]
    given = make(batch_size=2).generate_until_multi_round(simple)
    assert given == wanted
    assert all(type(one) is list for one in given)  # the kit turns a tuple into its text
    chat = make("LlavaLiteChat", batch_size=2)
    assert chat.generate_until_multi_round(chat_requests(message_rounds)) == wanted


def test_messages_that_know_no_rounds_have_one(make: Any, tiny_model: Model) -> None:
    def messages(doc: Any, **rounds: Any) -> Any:
        return doc_to_messages(doc)

    given = make("LlavaLiteChat").generate_until_multi_round(chat_requests(messages))
    assert given == [[answer] for answer in expected(tiny_model)]


# ---- likelihood ----------------------------------------------------------------------------------


def likelihood_requests(target: Any) -> list[Any]:
    return [
        request("loglikelihood", (text, target, doc_to_visual, i, "colors", "test"), 0)
        for i, text in enumerate(QUESTIONS)
    ]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_likelihoods_of_targets(make: Any, tiny_model: Model, batch_size: int) -> None:
    given = make(batch_size=batch_size).loglikelihood(likelihood_requests(lambda doc: doc["color"]))
    for doc, (likelihood, is_greedy) in zip(docs(), given, strict=True):
        score = tiny_model.score(picture(doc), doc["question"], doc["color"])
        assert likelihood == pytest.approx(score.log_likelihood, rel=1e-5)
        assert likelihood < 0 and is_greedy is score.is_greedy


def test_the_embedded_models_own_answer_is_greedy() -> None:
    adapter = plugin.LlavaLite(str(llava_lite.embedded_model()), device="cpu")
    adapter.task_dict = {
        "scenes": {"test": [{"image": str(ROOT / "weights/tiny/examples/scene.png")}]}
    }
    question = "What shape is the red object?"
    answer = str(adapter.model.generate(adapter.task_dict["scenes"]["test"][0]["image"], question))
    targets = [answer, "cross" if answer != "cross" else "ring"]
    given = adapter.loglikelihood(
        [
            request(
                "loglikelihood",
                (question, lambda doc, t=t: t, lambda doc: [doc["image"]], 0, "scenes", "test"),
            )
            for t in targets
        ]
    )
    assert [is_greedy for _, is_greedy in given] == [True, False]
    assert given[0][0] > given[1][0]


def test_of_choices_the_kit_takes_the_smallest_number(make: Any, tiny_model: Model) -> None:
    choices = [" red", " green", " blue circle"]
    requests = [
        request("loglikelihood", (QUESTIONS[0], text, doc_to_visual, 0, "colors", "test"), i)
        for i, text in enumerate(choices)
    ]
    adapter, calls = make(), []
    encode = tiny_model.encode
    adapter.model = type("Counting", (), {})()
    adapter.model.__dict__.update(
        config=tiny_model.config,
        score=tiny_model.score,
        encode=lambda *args: calls.append(args) or encode(*args),
    )
    given = adapter.loglikelihood(requests)
    image = picture(docs()[0])
    scores = [tiny_model.score(image, QUESTIONS[0], text).log_likelihood for text in choices]
    assert [number for number, _ in given] == pytest.approx([-s for s in scores], rel=1e-5)
    assert len(calls) == 1  # one image, looked at once


def test_targets_that_cannot_be_scored(make: Any) -> None:
    targets = dict(zip(COLORS, ["", " ", 3, "red", "ring " * 600], strict=True))
    with pytest.warns(UserWarning) as warned:
        given = make().loglikelihood(likelihood_requests(lambda doc: targets[doc["color"]]))
    assert given[:2] == [(0.0, True), (0.0, True)]
    assert given[2] == given[4] == (-float("inf"), False)
    assert len(warned) == 2 and "the target 3 is not a text" in str(warned[0].message)


# ---- real tasks ----------------------------------------------------------------------------------


DECLARED: list[torch.library.Library] = []  # operators live as long as their library


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """lmms-eval's module of tasks, and a data set on this disk."""
    if MISSING:
        pytest.skip(MISSING)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("LMMS_EVAL_HOME", str(tmp_path))
    for name in ("nms", "qnms"):  # a CPU torch lacks these, and torchvision then cannot be imported
        if not hasattr(torch.ops.torchvision, name):
            DECLARED.append(torch.library.Library("torchvision", "FRAGMENT"))
            DECLARED[-1].define(
                f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
    try:
        module = importlib.import_module("lmms_eval.api.task")
    except ImportError as error:
        pytest.skip(f"lmms-eval's tasks cannot be imported: {error}")
    lines = "\n".join(json.dumps(doc) for doc in docs())
    (tmp_path / "docs.jsonl").write_text(lines, encoding="utf-8")
    yield (
        module,
        {
            "task": "colors",
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(tmp_path / "docs.jsonl")},
                "cache_dir": str(tmp_path / "cache"),
            },
            "test_split": "test",
            "doc_to_visual": lambda doc, **_: doc_to_visual(doc),
            "doc_to_text": lambda doc, **_: doc["question"],
            "doc_to_target": "color",
            "process_results": lambda doc, results: {"seen": results},
            "metric_list": [{"metric": "seen", "aggregation": len, "higher_is_better": True}],
        },
    )


def ask_task(adapter: Any, task: Any) -> list[Any]:
    """All its requests, answered by the method that they name."""
    task.build_all_requests()
    adapter.task_dict = {"colors": {"test": task.test_docs()}}
    kind = task.instances[0].request_type
    return getattr(adapter, kind)(task.instances)


@pytest.mark.parametrize("cls", ["LlavaLite", "LlavaLiteChat"])
def test_real_tasks_generate(make: Any, tasks: Any, tiny_model: Model, cls: str) -> None:
    module, config = tasks
    name = "ConfigurableTask" if cls == "LlavaLite" else "ConfigurableMessagesTask"
    config |= {"output_type": "generate_until", "generation_kwargs": GREEDY}
    task = getattr(module, name)(config=config, model_name="llava_lite")
    assert texts(ask_task(make(cls, batch_size=2), task)) == expected(tiny_model)


@pytest.mark.parametrize("cls", ["LlavaLite", "LlavaLiteChat"])
def test_real_tasks_of_rounds(make: Any, tasks: Any, tiny_model: Model, cls: str) -> None:
    module, config = tasks

    def text(doc: Any, lmms_eval_specific_kwargs: Any = None, **round_of: Any) -> Any:
        return rounds(doc, **round_of) if round_of.get("round_idx") else doc["question"]

    name = "ConfigurableTask" if cls == "LlavaLite" else "ConfigurableMessagesTask"
    config |= {"output_type": "generate_until_multi_round", "generation_kwargs": GREEDY}
    task = getattr(module, name)(config=config | {"doc_to_text": text}, model_name="llava_lite")
    given = ask_task(make(cls), task)
    assert [one[0] for one in given] == expected(tiny_model)
    assert [len(one) for one in given] == [3, 4, 4, 4, 4]


def test_real_multiple_choice_takes_the_likeliest(make: Any, tasks: Any, tiny_model: Model) -> None:
    """Whatever the sign of a likelihood is: the kit's own scoring must choose what is likeliest."""
    module, config = tasks
    registry = importlib.import_module("lmms_eval.api.registry")
    registry.AGGREGATION_REGISTRY.setdefault("mean", len)
    choices = [" green", " red", " blue"]
    likeliest = [
        max(
            range(3),
            key=lambda i, doc=doc: (
                tiny_model.score(picture(doc), doc["question"], choices[i]).log_likelihood
            ),
        )
        for doc in docs()
    ]
    by_question = dict(zip(QUESTIONS, likeliest, strict=True))
    config = {name: value for name, value in config.items() if name != "process_results"}
    try:
        registry.register_metric(
            metric="acc", higher_is_better=True, output_type=["multiple_choice"], aggregation="mean"
        )(lambda items: items)
    except AssertionError:  # the kit's own is there
        pass
    config |= {
        "output_type": "multiple_choice",
        "doc_to_choice": lambda doc: [text.strip() for text in choices],
        "doc_to_target": lambda doc: by_question[doc["question"]],
        "metric_list": [{"metric": "acc", "aggregation": len, "higher_is_better": True}],
    }
    task = module.ConfigurableTask(config=config, model_name="llava_lite")
    numbers = ask_task(make(), task)
    for index, doc in enumerate(task.test_docs()):
        assert task.process_results(doc, numbers[3 * index : 3 * index + 3])["acc"] == 1.0


def test_partial_is_what_the_kit_hands_over(make: Any, tiny_model: Model) -> None:
    """Its doc_to_text comes as a partial with the task's own keywords."""
    ask = partial(rounds, lmms_eval_specific_kwargs=None)
    arguments = (QUESTIONS[0], GREEDY, doc_to_visual, ask, 0, "colors", "test")
    [given] = make().generate_until_multi_round(
        [request("generate_until_multi_round", arguments, 0)]
    )
    assert given[0] == expected(tiny_model)[0] and given[-1] == "end"
