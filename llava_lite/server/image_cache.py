"""A cache of encoded images: a chat page sends its image again with every message.

The key is a hash of the pixels and the reduction. Only the worker's thread uses the cache.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from PIL import Image

from llava_lite.generation.model import Model
from llava_lite.generation.sampling import GenerationOptions
from llava_lite.generation.state import Request, Row
from llava_lite.llava import EncodedImage
from llava_lite.reduction import Reduction

Key: TypeAlias = tuple[tuple[int, int], bytes, Reduction]


class ImageCache:
    """At most `size` encoded images; 0 keeps none. An image of the 7B model without merging takes
    4.7 MB in 16 bit: 576 rows of the decoder's width."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.encoded: OrderedDict[Key, EncodedImage] = OrderedDict()

    def start(
        self, model: Model, requests: Sequence[Request], options: Sequence[GenerationOptions]
    ) -> list[Row]:
        """`Model.start`, but known images are not encoded again."""
        if not self.size:
            return model.start(requests, options, len(requests))
        keys = [[make_key(image, one.state.reduction) for image in one.images] for one in requests]
        known = [self.use_known(one, own) for one, own in zip(requests, keys, strict=True)]
        rows = model.start(known, options, len(known))
        for row, own in zip(rows, keys, strict=True):
            for key, image in zip(own, row.state.images, strict=True):
                self.keep(key, image)
        return rows

    def use_known(self, request: Request, keys: Sequence[Key]) -> Request:
        """The request with each known image replaced by its encoded image."""
        if not any(key in self.encoded for key in keys):
            return request
        pairs: Any = zip(keys, request.images, strict=True)
        return replace(request, images=tuple(self.encoded.get(key, image) for key, image in pairs))

    def keep(self, key: Key, image: EncodedImage) -> None:
        """Keep an image. The least recently used image makes room."""
        if key not in self.encoded:
            # Clones: the tensors are views that keep the tensors of the whole batch.
            mapping = None if image.mapping is None else image.mapping.clone()
            embeds = image.image_embeds.clone()
            self.encoded[key] = replace(image, image_embeds=embeds, mapping=mapping)
        self.encoded.move_to_end(key)
        if len(self.encoded) > self.size:
            self.encoded.popitem(last=False)


def make_key(picture: Image.Image, reduction: Reduction) -> Key:
    """The key of an encoded image: size and hash of its padded RGB pixels, and the reduction."""
    return picture.size, hashlib.sha256(picture.tobytes()).digest(), reduction
