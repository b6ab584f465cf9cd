"""Prefix caching: all prompts of a template begin with the same tokens, system text included. Their
keys and values are computed once and reused."""

from itertools import chain
from os.path import commonprefix

import torch

from llava_lite.cache import KVCache
from llava_lite.inputs.prompt import IMAGE_MARKER, Template, build_prompt
from llava_lite.inputs.tokenizer import Tokenizer
from llava_lite.llava import Llava

MOST = 8  # templates and system texts whose ids are kept
MOST_POSITIONS = 4096  # in all caches together: 2 GiB for the 7B model in 16 bit


class Prefix:
    """KV caches of prompt beginnings, as `Model.prefix`.

    The caches are computed again after parameters or buffers of the decoder are replaced, moved, or
    written to. Torch does not count writes through `.data`, through numpy views, or to tensors made
    in inference mode: after such a write, call `model.prefix.clear()`."""

    def __init__(self, llava: Llava, tokenizer: Tokenizer) -> None:
        self.llava, self.tokenizer = llava, tokenizer
        self.known_ids: dict[tuple[str | Template, str | None], tuple[int, ...]] = {}
        self.caches: dict[tuple[int, ...], KVCache] = {}
        self.weights = 0

    def ids(self, template: str | Template, system: str | None) -> tuple[int, ...]:
        """The ids that begin every prompt with this template and system text, whether text or an
        image follows."""
        key = template, system
        if key not in self.known_ids:
            prompts = [build_prompt(template, [(text, None)], system) for text in "Ab1"]
            prompts.append(build_prompt(template, [(IMAGE_MARKER, None)], system))
            ids = [self.tokenizer.encode_prompt(prompt) for prompt in prompts]
            make_space(self.known_ids)
            self.known_ids[key] = tuple(commonprefix(ids))  # of any sequences, not only of paths
        return self.known_ids[key]

    def clear(self) -> None:
        """Forget all caches. The next call computes them with the current weights."""
        self.caches.clear()

    @torch.inference_mode()
    def cache(self, ids: tuple[int, ...]) -> KVCache:
        """The KV cache of these ids at positions 0, 1, ... It is kept for the next call, unless it
        is longer than `MOST_POSITIONS`."""
        weights = self.fingerprint()
        if weights != self.weights:
            self.clear()
            self.weights = weights
        kept = self.caches.get(ids)
        if kept is not None:
            return kept
        rows, layout = self.llava.splice(ids, [])
        [cache] = self.llava.decoder(rows, [layout], [None]).past_key_values
        if len(ids) <= MOST_POSITIONS:
            self.caches[ids] = cache
            oldest = list(self.caches)  # other threads may change the original
            while sum(map(len, oldest)) > MOST_POSITIONS:
                self.caches.pop(oldest.pop(0), None)
        return cache

    def fingerprint(self) -> int:
        """A number that changes when weights are replaced, moved, or written to."""
        decoder = self.llava.decoder
        weights = chain(decoder.parameters(), decoder.buffers())  # quantized weights are buffers
        versions = ((id(w), w.data_ptr(), 0 if w.is_inference() else w._version) for w in weights)
        return hash(tuple(versions))


def make_space(known: dict) -> None:
    """Forget the oldest entry of a full table."""
    if len(known) >= MOST:
        del known[next(iter(known))]
