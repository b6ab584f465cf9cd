"""Prompt templates as data, byte-exact as in training.

A history is `system, USER: q1, ASSISTANT: a1, USER: q2, ASSISTANT:`. Templates differ only in the
system text and in the separators.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from llava_lite.errors import PromptError

IMAGE_MARKER = "<image>"
Turn = tuple[str, str | None]  # a question and its answer; None: the answer is to be generated

_SYSTEM = (
    "A chat between a curious {user} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {user}'s questions."
)


@dataclass(frozen=True)
class Template:
    """One chat format: `system_start + system + system_end`, then per turn `user_start + question +
    user_end` and `answer_start + answer + answer_end`. A prompt ends with `user_end`.

    family: of the tokenizers that know its markers, None: any. skips_empty: an empty message has no
    end, as in the reference of `qwen_2`.
    """

    name: str
    system: str = ""
    system_start: str = ""
    system_end: str = " "
    user_start: str = "USER: "
    user_end: str = " ASSISTANT:"
    answer_start: str = " "
    answer_end: str = "</s>"
    image_end: str = "\n"
    family: str | None = "llama"
    skips_empty: bool = False


VICUNA_V1 = Template("vicuna_v1", system=_SYSTEM.format(user="user"))
LLAVA_V1 = Template("llava_v1", system=_SYSTEM.format(user="human"))
LLAVA_HF = Template("llava-hf", answer_end=" ")
# Projectors of stage 1 were trained on an image and its caption: no roles, no newline.
PLAIN = Template(
    "plain",
    user_start="",
    user_end="",
    answer_start="",
    answer_end="\n",
    image_end="",
    family=None,
)
QWEN_2 = Template(  # ChatML
    "qwen_2",
    system="You are a helpful assistant.",
    system_start="<|im_start|>system\n",
    system_end="<|im_end|>\n",
    user_start="<|im_start|>user\n",
    user_end="<|im_end|>\n<|im_start|>assistant\n",
    answer_start="",
    answer_end="<|im_end|>\n",
    family="qwen2",
    skips_empty=True,
)

TEMPLATES: dict[str, Template] = {
    template.name: template for template in (VICUNA_V1, LLAVA_V1, PLAIN, LLAVA_HF, QWEN_2)
}
ALIASES = {"v1": "vicuna_v1"}
DEFAULT_TEMPLATE = "vicuna_v1"


def get_template(template: str | Template) -> Template:
    """The template with this name or alias; a `Template` is returned as is. Raises ValueError."""
    if isinstance(template, Template):
        return template
    name = ALIASES.get(template, template)
    if name not in TEMPLATES:
        names = ", ".join([*TEMPLATES, *ALIASES])
        raise ValueError(f"unknown prompt template {template!r}; known templates: {names}")
    return TEMPLATES[name]


def check_family(template: str | Template, family: str) -> None:
    """Raise ValueError if a template is none of a tokenizer's family: it has unknown markers."""
    template = get_template(template)
    if template.family not in (None, family):
        fitting = ", ".join(t.name for t in TEMPLATES.values() if t.family in (None, family))
        raise ValueError(
            f"the prompt template {template.name!r} is for {template.family} models, this one is "
            f"{family}; templates that fit: {fitting}"
        )


def build_prompt(
    template: str | Template,
    turns: Sequence[Turn],
    system: str | None = None,
) -> str:
    """The prompt of a conversation given as (question, answer) pairs.

    The last answer is None if it is to be generated, else the conversation is complete. `system`
    replaces the system text of the template; "" leaves it out. `place_images` adds image markers.
    Raises PromptError without turns, and if an earlier turn has no answer.
    """
    template = get_template(template)
    if not turns:
        raise PromptError("a prompt needs at least one turn, got 0")
    system = template.system if system is None else system
    prompt = ""
    if system:  # a text with its marker stays as it is
        start = "" if system.startswith(template.system_start) else template.system_start
        prompt = start + system + template.system_end
    for index, (question, answer) in enumerate(turns):
        end = template.user_end
        if template.skips_empty and not question:
            end = end.removeprefix(template.answer_end)
        prompt += template.user_start + question + end
        if answer is not None:
            end = "" if template.skips_empty and not answer else template.answer_end
            prompt += template.answer_start + answer + end
        elif index < len(turns) - 1:
            raise PromptError(f"turn {index + 1} of {len(turns)} has no answer; only the last may")
    return prompt


def next_turn_text(template: str | Template, question: str) -> str:
    """The text of the next turn after a cached history that ends with an answer.

    The old prompt up to its last answer, without `answer_end`, plus this text equals `build_prompt`
    of all turns. The KV cache ends with the last token of the answer (no `</s>`), so encode this
    text alone: `encode_prompt(text, after="text")`. Cached and new ids together equal the ids of
    the whole history, in legacy and non-legacy mode, if the ids of the answer are canonical.
    """
    template = get_template(template)
    return template.answer_end + template.user_start + question + template.user_end


def place_images(text: str, num_images: int, template: str | Template = DEFAULT_TEMPLATE) -> str:
    """Put one `<image>` marker per image in front of a question that has no markers.

    A newline follows each marker; the template "plain" has none, its prompt is `<image>` alone. A
    question with markers stays as it is, and `check_images` compares the counts.
    """
    if num_images < 0:
        raise ValueError(f"num_images must be at least 0, got {num_images}")
    if IMAGE_MARKER in text:
        return text
    return (IMAGE_MARKER + get_template(template).image_end) * num_images + text


def check_images(text: str, num_images: int) -> None:
    """Raise PromptError unless a text has one `<image>` marker per image. Names both counts."""
    markers = text.count(IMAGE_MARKER)
    if markers != num_images:
        raise PromptError.of_counts(markers, num_images)
