"""The model behind the interface of lmms-eval, registered as an entry point.

    lmms-eval --model llava_lite --tasks pope,mmbench_en_dev --batch_size 8 \\
        --model_args pretrained=weights/llava-1.5-7b,reduction=folded-144-36

Tasks with messages use `LlavaLiteChat`. All other tasks, and tasks that compare likelihoods, use
`LlavaLite` (lmms-eval's --force_simple). Written for lmms-eval 0.7.3.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms

from llava_lite.errors import LlavaLiteError
from llava_lite.generation.answer import Answer
from llava_lite.generation.failures import try_together
from llava_lite.generation.loop import DEFAULT_BATCH_SIZE
from llava_lite.generation.model import Model
from llava_lite.generation.sampling import GenerationOptions, with_size
from llava_lite.generation.state import as_list
from llava_lite.inputs.messages import Conversation, ImagePart, Message, Part
from llava_lite.integrations.conversation import (
    answer_conversations,
    read_conversation,
    read_question,
)
from llava_lite.llava import EncodedImage

MAX_NEW_TOKENS = 1024  # default of a task, as in LLaVA's scripts for long answers
BATCHES_AT_ONCE = 4  # their images are in memory
# Settings of tasks for other models, and settings without effect on a single greedy answer.
NEUTRAL = {"image_aspect_ratio", "use_cache", "num_beams", "do_sample", "num_return_sequences"}


class LlavaLite(lmms):
    """llava_lite behind lmms-eval's interface for tasks of a text and its images.

    pretrained: a source for `llava_lite.load`, None for the default model. reduction: the name of a
    preset. image_size: of FastVLM, in pixels. template, system_prompt: of the prompt. seed: for
    tasks that sample. exif: apply the rotation in the metadata; LLaVA's scripts do not.
    load_options: other arguments of `llava_lite.load`: dtype, quantize, revision, ..."""

    is_simple = True

    def __init__(
        self,
        pretrained: str | None = None,
        device: str | None = None,
        batch_size: int | str = DEFAULT_BATCH_SIZE,
        max_batch_size: int | None = None,
        reduction: str | None = None,
        image_size: int | None = None,
        template: str | None = None,
        system_prompt: str | None = None,
        seed: int | None = None,
        exif: bool = False,
        **load_options: Any,
    ) -> None:
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise LlavaLiteError("llava_lite runs lmms-eval in one process, not in several")
        from llava_lite.checkpoints.load import load

        self.rows = int(DEFAULT_BATCH_SIZE if batch_size == "auto" else batch_size)
        if self.rows < 1:
            raise LlavaLiteError(f"batch_size {batch_size} must be at least 1")
        self.prompting: dict[str, Any] = {
            "system": system_prompt,
            "template": template,
            "seed": seed,
            "reduction": with_size(reduction, image_size),
        }
        GenerationOptions(**self.prompting)  # checks the options before loading
        device = "auto" if device is None else str(device)
        self.model: Model = load(pretrained, device=device, exif=exif, **load_options)

    @property
    def template(self) -> str:
        return self.prompting["template"] or self.model.config.template

    # ---- generation ----

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """The answer to each request, with its token counts, in the order of the requests.

        A request that fails (bad image, prompt too long) gets an empty answer and a warning."""
        results: list[GenerationResult] = []
        for chunk in chunks(requests, self.rows * BATCHES_AT_ONCE):
            jobs = [Job(self, request) for request in chunk]
            for job, answer in zip(jobs, self.answers(jobs), strict=True):
                results.append(generation_result(answer))
                if answer is not None:
                    job.remember("generate_until", str(answer))
        return results

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[list[str]]:
        """The outputs of the task for each request, after all rounds, in order.

        After every round the task sees the answers so far. It asks again or ends."""
        results: list[list[str]] = []
        for chunk in chunks(requests, self.rows):
            jobs = [Job(self, request) for request in chunk]
            talking = jobs
            while talking:
                for job, answer in zip(talking, self.answers(talking), strict=True):
                    job.outputs.append("" if answer is None else str(answer))
                talking = [job for job in talking if job.next_round()]
            for job in jobs:
                job.remember("generate_until_multi_round", job.outputs)
                results.append(job.outputs)
        return results

    def answers(self, jobs: Sequence["Job"]) -> list[Answer | None]:
        """The answers of one round, all at once, or one by one if that fails.

        A question without an answer gets None and a warning. Raises a failure of an accelerator."""

        def answer(jobs: Sequence[Job]) -> list[Answer | None]:
            asked = [job.conversation() for job in jobs]
            options = [job.options for job in jobs]
            return [*answer_conversations(self.model, asked, options, self.rows)]

        return try_together(jobs, answer, partial(warn_of, "answer", None))

    def options(self, wishes: dict[str, Any]) -> GenerationOptions:
        """The options for a task's generation_kwargs. Raises LlavaLiteError for beam search."""
        wishes = {name: value for name, value in wishes.items() if value is not None}
        if wishes.get("num_beams", 1) > 1:
            raise LlavaLiteError(f"num_beams {wishes['num_beams']}: there is no beam search here")
        greedy = not wishes.get("do_sample", wishes.get("temperature", 0) > 0)
        known = {"max_new_tokens", "max_gen_toks", "until", "temperature", "top_p", "top_k"}
        unknown = sorted(wishes.keys() - known - NEUTRAL)
        if unknown:
            warnings.warn(f"lmms-eval: {', '.join(unknown)} of the task are ignored", stacklevel=2)
        length = wishes.get("max_new_tokens", wishes.get("max_gen_toks", MAX_NEW_TOKENS))
        return GenerationOptions(
            max_new_tokens=int(length),
            temperature=0.0 if greedy else float(wishes.get("temperature", 1.0)),
            top_p=float(wishes.get("top_p", 1.0)) or 1.0,  # tasks write 0 for "not set"
            top_k=int(wishes.get("top_k", 0)),
            stop=[stop for stop in as_list(wishes.get("until")) if stop],
            **self.prompting,
        )

    # ---- likelihood ----

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding writes it) of each continuation.

        The continuations of one document are neighbors, so its images are encoded once. A
        multiple-choice task has its choices as texts; the kit picks the smallest number, as for a
        loss. These get the negative log-likelihood. A continuation that fails gets the lowest
        likelihood and a warning."""
        results: list[tuple[float, bool]] = []
        for chunk in chunks(requests, self.rows * BATCHES_AT_ONCE):
            jobs = [Job(self, request) for request in chunk]
            images: dict[Any, list[EncodedImage]] = {}
            for job, (likelihood, is_greedy) in zip(jobs, self.scores(jobs, images), strict=True):
                is_choice = isinstance(job.request.args[1], str)
                results.append((-likelihood if is_choice else likelihood, is_greedy))
        return results

    def scores(
        self, jobs: Sequence["Job"], images: dict[Any, list[EncodedImage]]
    ) -> list[tuple[float, bool]]:
        """The scores of some continuations, all at once, or one by one if that fails. Raises a
        failure of an accelerator."""
        fail = partial(warn_of, "score", (-float("inf"), False))
        return try_together(jobs, lambda jobs: self.scores_at_once(jobs, images), fail)

    def scores_at_once(
        self, jobs: Sequence["Job"], images: dict[Any, list[EncodedImage]]
    ) -> list[tuple[float, bool]]:
        """`Model.score` of some continuations; an empty one is certain. `images`: encoded images
        of each document."""
        prompts, shown = [], []
        for job in jobs:
            if job.document not in images:
                reduction = self.prompting["reduction"]
                images[job.document] = [self.model.encode(i, reduction) for i in job.visuals()]
            one = read_question(job.request.args[0], images[job.document], self.template)
            prompts.append(one.turns[0][0])
            shown.append(list(one.images))
        texts = [job.continuation() for job in jobs]
        full = [index for index, text in enumerate(texts) if text.removeprefix(" ")]
        scored = self.model.score(
            [shown[index] for index in full],
            [prompts[index] for index in full],
            [texts[index] for index in full],
            system=self.prompting["system"],
            template=self.template,
            reduction=self.prompting["reduction"],
            batch_size=self.rows,
        )
        found = {
            index: (s.log_likelihood, s.is_greedy) for index, s in zip(full, scored, strict=True)
        }
        return [found.get(index, (0.0, True)) for index in range(len(jobs))]


class LlavaLiteChat(LlavaLite):
    """`LlavaLite` for tasks with messages: roles, texts and images."""

    is_simple = False  # lmms-eval asks for likelihoods in simple tasks only


class Job:
    """One request of lmms-eval, for one round or several."""

    def __init__(self, owner: LlavaLite, request: Instance) -> None:
        self.owner, self.request = owner, request
        *self.own, doc_id, task, split = request.args
        self.document = (task, split, doc_id)
        self.name = f"{task}, {split}, document {doc_id}"
        self.outputs: list[str] = []
        self.context: str = request.args[0]
        self.info: Any = None  # the task gets it back in the next round
        self.round = 0
        self.asked: Any = None  # visuals or messages of a later round

    @property
    def doc(self) -> Any:
        task, split, doc_id = self.document
        return self.owner.task_dict[task][split][doc_id]

    @property
    def wishes(self) -> dict[str, Any]:
        """The task's generation_kwargs."""
        return self.own[1] if self.owner.is_simple else self.own[2]

    @property
    def options(self) -> GenerationOptions:
        return self.owner.options(self.wishes)

    def conversation(self) -> Conversation:
        """The conversation of this round."""
        if self.owner.is_simple:
            images = self.visuals() if self.asked is None else as_visuals(self.asked)
            return read_question(self.context, images, self.owner.template)
        messages = self.own[1](self.doc) if self.asked is None else self.asked
        return read_conversation([read_message(one) for one in messages], self.owner.template)

    def visuals(self) -> list[Any]:
        """The images of the document."""
        doc_to_visual: Callable[[Any], Any] = self.own[2]
        return as_visuals(doc_to_visual(self.doc))

    def continuation(self) -> str:
        """The text to score. Raises LlavaLiteError for a target that is not a text."""
        target = self.own[1]
        target = target if isinstance(target, str) else target(self.doc)
        if not isinstance(target, str):
            raise LlavaLiteError(f"{self.name}: the target {target!r} is not a text")
        return target

    def next_round(self) -> bool:
        """Ask the task for the next round; False if it is done. Its outputs replace the answers."""
        self.round += 1
        known = {
            "previous_output": self.outputs,
            "round_idx": self.round,
            "previous_round_info": self.info,
        }
        if self.owner.is_simple:
            ask = self.own[3]
            self.asked, context, done, outputs, self.info = ask(self.doc, **known)
            self.context = context or ""
        else:
            step = self.own[1](self.doc, **known)
            if isinstance(step, list):  # the task has a single round
                return False
            self.asked, done, outputs, self.info = step
        self.outputs = list(outputs)
        return not done

    def remember(self, kind: str, result: Any) -> None:
        """Add a result to the cache of lmms-eval."""
        self.owner.cache_hook.add_partial(kind, (self.request.args[0], self.wishes), result)


def warn_of(kind: str, result: Any, job: Job, error: Exception) -> Any:
    """Warn that a job has no answer or score, and return `result` for it."""
    warnings.warn(f"lmms-eval: {job.name}: no {kind}: {error}", stacklevel=2)
    return result


def chunks(requests: Sequence[Instance], size: int) -> Iterator[Sequence[Instance]]:
    for start in range(0, len(requests), size):
        yield requests[start : start + size]


def as_visuals(visuals: Any) -> list[Any]:
    """None, one image or several, some of them None -> the images."""
    return [image for image in as_list(visuals) if image is not None]


def generation_result(answer: Answer | None) -> GenerationResult:
    """The text with lmms-eval's token counts; an empty text for no answer."""
    if answer is None:
        return GenerationResult("")
    usage = answer.usage
    tokens = usage["prompt_tokens"] + usage["image_tokens"]
    counts = TokenCounts(input_tokens=tokens, output_tokens=usage["completion_tokens"])
    return GenerationResult(str(answer), counts)


def read_message(message: Any) -> Message:
    """A message of lmms-eval. Raises LlavaLiteError for videos and sounds."""
    content = message["content"]
    parts: list[Part] = []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        if part["type"] == "text":
            parts.append(part["text"])
        elif part["type"] == "image":
            parts.append(ImagePart(part["url"]))
        else:
            raise LlavaLiteError(f"LLaVA knows texts and images, not {part['type']!r}")
    return Message(message["role"], tuple(parts))
