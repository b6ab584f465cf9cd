"""The model behind the interface of VLMEvalKit:

    from functools import partial
    from vlmeval.config import supported_VLM
    from llava_lite.integrations.vlmevalkit import LLaVALite
    supported_VLM["llava_lite"] = partial(LLaVALite, model_path="weights/llava-1.5-7b")

before `run.py` of the kit looks for `--model llava_lite`. No package index has the kit. Without the
kit, `LLaVALite` uses a small base class with the documented helpers.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from string import ascii_uppercase
from typing import Any

from llava_lite.errors import LlavaLiteError
from llava_lite.evaluation.suites.coco import CAPTION_PROMPT
from llava_lite.evaluation.suites.multiple_choice import is_missing, multiple_choice_prompt
from llava_lite.evaluation.suites.short_answers import short_answer_prompt
from llava_lite.generation.model import Model
from llava_lite.generation.sampling import GenerationOptions
from llava_lite.inputs.messages import Conversation, ImagePart, Message, Part
from llava_lite.integrations.conversation import answer_conversations, read_conversation

MAX_NEW_TOKENS = 1024  # of LLaVA's scripts for multiple choice and long answers

# Data sets by the start of their names, for use without the kit.
YES_OR_NO = ("MME", "POPE", "HallusionBench", "AMBER")
CAPTIONS = ("COCO",)
SHORT_ANSWERS = ("TextVQA", "DocVQA", "InfoVQA", "ChartQA", "OCRVQA", "GQA", "VQAv2", "VizWiz")
CHOICES = (
    *("MMBench", "CCBench", "SEEDBench", "ScienceQA", "AI2D", "MMMU", "MMStar", "RealWorldQA"),
    *("BLINK", "A-OKVQA", "MMT-Bench", "TaskMeAnything", "Q-Bench"),
)
OTHER_NAMES = ("MMBench-Video", "MMMU_Pro_V", "MME-RealWorld")  # other kinds with such names


class StandInBase:
    """`vlmeval.vlm.base.BaseModel` as in VLMEvalKit's guide for developers."""

    INTERLEAVE = False

    def __init__(self) -> None:
        self.dump_image_func: Callable[[Any], Any] | None = None

    def set_dump_image(self, dump_image_func: Callable[[Any], Any]) -> None:
        self.dump_image_func = dump_image_func

    def dump_image(self, line: Any, dataset: str | None) -> Any:
        """The paths of the images of a line. Raises LlavaLiteError before `set_dump_image`."""
        if self.dump_image_func is None:
            raise LlavaLiteError("the data set's dump_image is needed: call set_dump_image first")
        return self.dump_image_func(line)

    def message_to_promptimg(
        self, message: Sequence[Mapping[str, str]], dataset: str | None = None
    ) -> tuple[str, str | None]:
        """All texts, each on a line, and the first image."""
        texts = [part["value"] for part in message if part["type"] == "text"]
        images = [part["value"] for part in message if part["type"] == "image"]
        return "\n".join(texts), images[0] if images else None

    def generate(self, message: Any, dataset: str | None = None) -> str:
        """An answer to a text, or to texts and images in order."""
        parts = [message] if isinstance(message, str | Mapping) else message
        whole = [as_part(part) for part in parts]
        answer: str = self.generate_inner(whole, dataset)  # type: ignore[attr-defined]
        return answer

    def chat(self, messages: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """An answer to a conversation that ends with the user's message."""
        answer: str = self.chat_inner(messages, dataset)  # type: ignore[attr-defined]
        return answer


def as_part(part: Any) -> Mapping[str, str]:
    return {"type": "text", "value": part} if isinstance(part, str) else part


def base_class() -> type:
    """The base class of VLMEvalKit if it is installed."""
    try:
        from vlmeval.vlm.base import BaseModel
    except ImportError:
        return StandInBase
    return BaseModel


class LLaVALite(base_class()):  # type: ignore[misc]
    """llava_lite behind VLMEvalKit's interface. `message` is [{"type": "image" | "text", "value"}].

    model_path, load_options: of `llava_lite.load`, but with exif=False by default, as in LLaVA's
    scripts. options: of `Model.generate`."""

    INSTALL_REQ = False
    INTERLEAVE = True

    def __init__(
        self,
        model_path: str | None = None,
        load_options: Mapping[str, Any] | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        **options: Any,
    ) -> None:
        super().__init__()
        from llava_lite.checkpoints.load import load

        self.options = GenerationOptions(max_new_tokens, **options)
        loading = {"exif": False, **(load_options or {})}
        self.model: Model = load(model_path, **loading)

    # ---- prompts ----

    def use_custom_prompt(self, dataset: str | None) -> bool:
        """Whether LLaVA has an official prompt for this kind of data set."""
        return find_kind(dataset) is not None

    def build_prompt(self, line: Any, dataset: str | None = None) -> list[dict[str, str]]:
        """The images of a line and LLaVA's official prompt. Raises LlavaLiteError if
        `use_custom_prompt` is False."""
        kind = find_kind(dataset)
        if kind is None:
            raise LlavaLiteError(f"LLaVA has no official prompt for the data set {dataset!r}")
        paths = self.dump_image(line, dataset)
        paths = [paths] if isinstance(paths, str) else paths
        images = [{"type": "image", "value": str(path)} for path in paths or []]
        return [*images, {"type": "text", "value": official_prompt(kind, line, dataset or "")}]

    # ---- answers ----

    def generate_inner(self, message: Any, dataset: str | None = None) -> str:
        """The answer to texts and images in order."""
        return self.answer([{"role": "user", "content": message}])

    def chat_inner(self, message: Any, dataset: str | None = None) -> str:
        """The answer to a conversation: [{"role", "content": text or parts}]."""
        return self.answer(message)

    def answer(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Raises as `Model.generate`."""
        [answer] = answer_conversations(self.model, [self.read(messages)], [self.options])
        return str(answer)

    def read(self, messages: Sequence[Mapping[str, Any]]) -> Conversation:
        template = self.options.template or self.model.config.template
        return read_conversation([read_message(one) for one in messages], template)


def read_message(message: Mapping[str, Any]) -> Message:
    """A message of VLMEvalKit. Raises LlavaLiteError for videos."""
    content = message["content"]
    parts: list[Part] = []
    for part in [content] if isinstance(content, str | Mapping) else content:
        part = as_part(part)
        if part["type"] == "image":
            parts.append(ImagePart(part["value"]))
        elif part["type"] == "text":
            parts.append(part["value"])
        else:
            raise LlavaLiteError(f"LLaVA knows texts and images, not {part['type']!r}")
    return Message(message["role"], tuple(parts))


# ---- official prompts ----------------------------------------------------------------------------


def find_kind(dataset: str | None) -> str | None:
    """ "choice", "yes or no", "short" or "caption"; None for data sets with other kinds of answers.

    The kit calls all free answers VQA; the name tells which are short."""
    if not dataset or dataset.startswith(OTHER_NAMES):
        return None
    if dataset.startswith(SHORT_ANSWERS):
        return "short"
    by_kit = {"MCQ": "choice", "Y/N": "yes or no", "Caption": "caption"}
    try:
        from vlmeval.dataset import DATASET_TYPE
    except ImportError:
        pass
    else:
        return by_kit.get(DATASET_TYPE(dataset))
    names = (("choice", CHOICES), ("yes or no", YES_OR_NO), ("caption", CAPTIONS))
    return next((kind for kind, starts in names if dataset.startswith(starts)), None)


def official_prompt(kind: str, line: Any, dataset: str) -> str:
    """The prompt of LLaVA's scripts for one line of a data set."""
    if kind == "caption":
        return CAPTION_PROMPT
    question = str(line["question"])
    if kind == "choice":
        return choice_prompt(question, line, dataset)
    # MME of the kit asks for yes or no in its questions, MME of LLaVA does not.
    return short_answer_prompt(question.removesuffix("Please answer yes or no.").rstrip())


def choice_prompt(question: str, line: Any, dataset: str) -> str:
    """[hint,] question, options up to the first missing one, and the instruction."""
    hint = cell(line, "hint") or ""
    cells = (cell(line, letter) for letter in ascii_uppercase)
    options = [option for option in takewhile(bool, cells) if option]
    if not options:  # some data sets contain open questions
        return short_answer_prompt(f"{hint}\n{question}" if hint else question)
    text = "\n".join([hint, question, *options])
    is_chinese = "_CN" in dataset.upper() or re.search(r"[\u4e00-\u9fff]", text) is not None
    return multiple_choice_prompt(question, options, hint, "cn" if is_chinese else "en")


def cell(line: Any, name: str) -> str | None:
    """A field of a line (a dict or a pandas Series); None if it is missing or empty."""
    value = line.get(name)
    if value is None or value != value:  # NaN: an empty cell in pandas
        return None
    text = str(value)
    return None if is_missing(text) else text
