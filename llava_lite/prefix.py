"""The beginning that all prompts of a template share, system text included: its keys and values are
computed once and reused. Where few image tokens are left it is a third of the prompt."""

from os.path import commonprefix

import torch

from llava_lite.cache import KVCache
from llava_lite.llava import Llava
from llava_lite.prompt import IMAGE_MARKER, Template, build_prompt
from llava_lite.tokenizer import Tokenizer

MOST = 8  # system texts whose caches are kept


class Prefix:
    """KV caches of prompt beginnings. They are computed anew when the decoder's weights change."""

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

    @torch.inference_mode()
    def cache(self, ids: tuple[int, ...]) -> KVCache:
        """The KV cache of these ids, which stand at positions 0, 1, ..."""
        weights = self.fingerprint()
        if weights != self.weights:
            self.caches.clear()
            self.weights = weights
        if ids not in self.caches:
            rows, layout = self.llava.splice(ids, [])
            make_space(self.caches)
            [self.caches[ids]] = self.llava.decoder(rows, [layout], [None]).past_key_values
        return self.caches[ids]

    def fingerprint(self) -> int:
        """Another number when weights are replaced, moved, or written to."""
        weights = self.llava.decoder.parameters()
        versions = ((id(p), p.data_ptr(), 0 if p.is_inference() else p._version) for p in weights)
        return hash(tuple(versions))


def make_space(known: dict) -> None:
    """Forget what came first when there is much."""
    if len(known) >= MOST:
        del known[next(iter(known))]
