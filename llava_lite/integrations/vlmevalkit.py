"""The model behind the interface of VLMEvalKit:

    from functools import partial
    from vlmeval.config import supported_VLM
    from llava_lite.integrations.vlmevalkit import LLaVALite
    supported_VLM["llava_lite"] = partial(LLaVALite, model_path="weights/llava-1.5-7b")

before `run.py` of the kit looks for `--model llava_lite`. No package index has the kit.
"""

import re
from collections.abc import Mapping
from itertools import takewhile
from string import ascii_uppercase
from typing import Any

from llava_lite.errors import LlavaLiteError
from llava_lite.evaluation.suites.coco import CAPTION_PROMPT
from llava_lite.evaluation.suites.multiple_choice import is_missing, multiple_choice_prompt
from llava_lite.evaluation.suites.short_answers import short_answer_prompt
from llava_lite.generation.model import Model
from llava_lite.generation.sampling import GenerationOptions
from llava_lite.inputs.messages import ImagePart, Message, Part
from llava_lite.integrations.conversation import answer_conversations, read_conversation

try:
    from vlmeval.vlm.base import BaseModel
except ImportError:  # without the kit, only `generate_inner` and `chat_inner` work
    BaseModel = object

MAX_NEW_TOKENS = 1024  # of LLaVA's scripts for multiple choice and long answers

# The kit calls all free answers VQA; the starts of these names tell which are short.
SHORT_ANSWERS = ("TextVQA", "DocVQA", "InfoVQA", "ChartQA", "OCRVQA", "GQA", "VQAv2", "VizWiz")
OTHER_NAMES = ("MMBench-Video", "MMMU_Pro_V", "MME-RealWorld")  # LLaVA has no prompt for these


class LLaVALite(BaseModel):
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
        return self.chat_inner([{"role": "user", "content": message}])

    def chat_inner(self, message: Any, dataset: str | None = None) -> str:
        """The answer to a conversation: [{"role", "content": text or parts}].

        Raises as `Model.generate`."""
        template = self.options.template or self.model.config.template
        conversation = read_conversation([read_message(one) for one in message], template)
        [answer] = answer_conversations(self.model, [conversation], [self.options])
        return str(answer)


def read_message(message: Mapping[str, Any]) -> Message:
    """A message of VLMEvalKit. Raises LlavaLiteError for videos."""
    content = message["content"]
    parts: list[Part] = []
    for part in [content] if isinstance(content, str | Mapping) else content:
        part = {"type": "text", "value": part} if isinstance(part, str) else part
        if part["type"] == "image":
            parts.append(ImagePart(part["value"]))
        elif part["type"] == "text":
            parts.append(part["value"])
        else:
            raise LlavaLiteError(f"LLaVA knows texts and images, not {part['type']!r}")
    return Message(message["role"], tuple(parts))


# ---- official prompts ----------------------------------------------------------------------------


def find_kind(dataset: str | None) -> str | None:
    """ "choice", "yes or no", "short" or "caption"; None for other kinds of answers."""
    if not dataset or dataset.startswith(OTHER_NAMES):
        return None
    if dataset.startswith(SHORT_ANSWERS):
        return "short"
    from vlmeval.dataset import DATASET_TYPE

    by_kit = {"MCQ": "choice", "Y/N": "yes or no", "Caption": "caption"}
    return by_kit.get(DATASET_TYPE(dataset))


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
