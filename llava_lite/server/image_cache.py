"""The images that were looked at last: a chat page sends its picture again with every turn.

Only what the vision tower made of an image is kept, under the hash of the pixels that it saw, and
only on the worker's thread.
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
    """At most `size` encoded images, each of as many bytes as its tokens have: 576 rows of the
    decoder's width where none merge, 4.7 MB for the 7B model in 16 bit. 0 keeps none."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.encoded: OrderedDict[Key, EncodedImage] = OrderedDict()

    def start(
        self, model: Model, requests: Sequence[Request], options: Sequence[GenerationOptions]
    ) -> list[Row]:
        """`Model.start`, which looks only at images that are not known."""
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
        """The request with the encoded image in place of each that is known."""
        if not any(key in self.encoded for key in keys):
            return request
        pairs: Any = zip(keys, request.images, strict=True)
        return replace(request, images=tuple(self.encoded.get(key, image) for key, image in pairs))

    def keep(self, key: Key, image: EncodedImage) -> None:
        """Keep an image as the last one; the one that was not asked for the longest goes."""
        if key not in self.encoded:
            # Its tensors are parts of those of a whole batch, which would stay with them.
            mapping = None if image.mapping is None else image.mapping.clone()
            embeds = image.image_embeds.clone()
            self.encoded[key] = replace(image, image_embeds=embeds, mapping=mapping)
        self.encoded.move_to_end(key)
        if len(self.encoded) > self.size:
            self.encoded.popitem(last=False)


def make_key(picture: Image.Image, reduction: Reduction) -> Key:
    """What the encoded image depends on: the RGB pixels, as they are after padding, and the
    reduction."""
    return picture.size, hashlib.sha256(picture.tobytes()).digest(), reduction
