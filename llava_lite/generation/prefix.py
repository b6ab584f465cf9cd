"""The beginning that all prompts of a template share, system text included: its keys and values are
computed once and reused. Where few image tokens are left it is a third of the prompt."""

from itertools import chain
from os.path import commonprefix

import torch

from llava_lite.cache import KVCache
from llava_lite.inputs.prompt import IMAGE_MARKER, Template, build_prompt
from llava_lite.inputs.tokenizer import Tokenizer
from llava_lite.llava import Llava

MOST = 8  # templates and system texts whose ids are kept
MOST_POSITIONS = 4096  # in the caches together: 2 GiB of the 7B model's in 16 bit


class Prefix:
    """KV caches of prompt beginnings, as `Model.prefix`.

    They are computed anew when parameters or buffers of the decoder are replaced, moved, or written
    to in the ways that torch counts. It does not count writes through `.data`, through numpy views,
    or to tensors made in inference mode: after these, call `model.prefix.clear()`."""

    def __init__(self, llava: Llava, tokenizer: Tokenizer) -> None:
        self.llava, self.tokenizer = llava, tokenizer
        self.known_ids: dict[tuple[str | Template, str | None], tuple[int, ...]] = {}
        self.caches: dict[tuple[int, ...], KVCache] = {}
        self.weights = 0

    def ids(self, template: str | Template, system: str | None) -> tuple[int, ...]:
        """The ids with which every first prompt of this template and system text begins, whether
        text or an image follows."""
        key = template, system
        if key not in self.known_ids:
            prompts = [build_prompt(template, [(text, None)], system) for text in "Ab1"]
            prompts.append(build_prompt(template, [(IMAGE_MARKER, None)], system))
            ids = [self.tokenizer.encode_prompt(prompt) for prompt in prompts]
            make_space(self.known_ids)
            self.known_ids[key] = tuple(commonprefix(ids))  # of any sequences, not only of paths
        return self.known_ids[key]

    def clear(self) -> None:
        """Forget all caches: what was written to weights unseen then counts from the next call."""
        self.caches.clear()

    @torch.inference_mode()
    def cache(self, ids: tuple[int, ...]) -> KVCache:
        """The KV cache of these ids, which stand at positions 0, 1, ... It is kept for the next
        call unless it is longer than all that may be kept."""
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
        """Another number when weights are replaced, moved, or written to."""
        decoder = self.llava.decoder
        weights = chain(decoder.parameters(), decoder.buffers())  # quantised weights are buffers
        versions = ((id(w), w.data_ptr(), 0 if w.is_inference() else w._version) for w in weights)
        return hash(tuple(versions))


def make_space(known: dict) -> None:
    """Forget what came first when there is much."""
    if len(known) >= MOST:
        del known[next(iter(known))]
