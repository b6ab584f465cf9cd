"""The options of a call, and how the next token is sampled from logits.

Shapes: B items, V vocabulary.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import torch
from torch import Tensor

from llava_lite.reduction import Reduction

DEFAULT_MAX_NEW_TOKENS = 512


class PromptOptions(TypedDict, total=False):
    """The options of `Model.score`."""

    system: str | None
    template: str | None
    reduction: Reduction | str | None
    image_size: int | None


class Options(PromptOptions, total=False):
    """The options of `Model.generate`, which explains them, of `stream` and of `chat`."""

    max_new_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    stop: str | Sequence[str] | None
    trace: bool


def check_names(call: str, options: Mapping[str, Any], known: type) -> None:
    """Raise TypeError, as Python does, for an option that the TypedDict `known` does not have."""
    for name in options.keys() - known.__annotations__.keys():
        raise TypeError(f"{call}() got an unexpected keyword argument {name!r}")


@dataclass(frozen=True)
class GenerationOptions:
    """The checked options of one call (see `Model.generate`) with their defaults. Raises ValueError
    for a value out of range."""

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    system: str | None = None
    template: str | None = None
    reduction: Reduction | str | None = None
    trace: bool = False
    image_size: int | None = None

    def __post_init__(self) -> None:
        reduction = with_size(self.reduction, self.image_size)
        object.__setattr__(self, "reduction", reduction)
        object.__setattr__(self, "image_size", reduction and reduction.image_size)
        for name in ("max_new_tokens", "top_k", "seed"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, check_integer(name, value))
        # `not a <= x` rather than `x < a`: it refuses NaN too.
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {self.max_new_tokens} must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature {self.temperature} must be in [0, inf)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} must be in (0, 1]")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k} must be at least 0 (0 = off)")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise ValueError(f"seed {self.seed} must be in [0, 2**64)")
        if not isinstance(self.stop, str | Sequence | None) or not all(
            isinstance(stop, str) for stop in self.stop_strings
        ):
            raise ValueError(f"stop {self.stop!r} must be a string or several")
        if "" in self.stop_strings:
            raise ValueError("a stop string must not be empty")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def make_generator(self) -> torch.Generator | None:
        """The random numbers of one item, None if greedy. They come from the CPU: a seed gives the
        same numbers on every device."""
        if self.temperature == 0:
            return None
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()  # a new Generator starts from a fixed seed, not from entropy
        else:
            generator.manual_seed(self.seed)
        return generator


def with_size(wish: Reduction | str | None, image_size: int | None) -> Reduction | None:
    """The reduction with this image size. None without a wish and a size. Raises ValueError."""
    if image_size is not None:
        return replace(Reduction.of(wish), image_size=image_size)
    return None if wish is None else Reduction.of(wish)


def check_integer(name: str, value: Any) -> int:
    """The value as an int. Raises ValueError for anything but a whole number."""
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} {value!r} must be an integer") from None


def sample(
    logits: Tensor,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generators: Sequence[torch.Generator | None] = (),
    num_text_ids: int | None = None,
) -> Tensor:
    """Choose one token per item: logits (B, V) -> ids (B,) below `num_text_ids` (None = V).

    Temperature 0 takes the argmax. Otherwise, in this order: divide by the temperature, keep the
    `top_k` best (0 = all), keep the smallest set of best tokens with probability >= `top_p`
    (Holtzman et al., arXiv 1904.09751), draw once with the item's generator."""
    logits = logits[:, :num_text_ids].float()
    if temperature == 0:
        return logits.argmax(-1)
    # The last bit of a softmax depends on the device, so the rest runs on the CPU.
    logits = logits.cpu()
    smallest = torch.finfo(torch.float32).tiny
    scores = (logits - logits.amax(-1, keepdim=True)) / max(temperature, smallest)
    ids = None
    if top_k:
        scores, ids = scores.topk(min(top_k, scores.shape[-1]))
    elif top_p < 1:
        scores, ids = scores.sort(descending=True, stable=True)
    probs = scores.softmax(-1)
    if top_p < 1:
        probs = probs.where(probs.cumsum(-1) - probs < top_p, 0)
    choice = torch.stack([draw(*item) for item in zip(probs, generators, strict=True)])  # (B,)
    return choice if ids is None else ids.gather(-1, choice[:, None])[:, 0]


def draw(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw an index in proportion to `weights` (V,): invert their cumulative sum at one random
    number."""
    cumulative = weights.double().cumsum(-1)
    # A float32 uniform is at most 1 - 2^-24, so its product in float64 stays below the total.
    target = torch.rand((), generator=generator).double() * cumulative[-1]
    return torch.searchsorted(cumulative, target, right=True)
