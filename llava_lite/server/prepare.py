"""The bytes of a request become a job for the worker, in threads beside the event loop.

There are two pools. One works: only a few images are decoded at once. One fetches images: a slow
host delays no other request.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

from PIL import Image

from llava_lite.errors import CheckpointError, ContextError, ImageError, one_line
from llava_lite.generation.model import Model
from llava_lite.generation.sampling import GenerationOptions
from llava_lite.generation.state import Request
from llava_lite.inputs.messages import Conversation
from llava_lite.inputs.prompt import IMAGE_MARKER
from llava_lite.server.errors import ApiError
from llava_lite.server.images import fetch_image, is_remote, open_image
from llava_lite.server.messages import read_messages
from llava_lite.server.protocol import ChatRequest, parse_request
from llava_lite.server.settings import Settings
from llava_lite.server.worker import Job

FETCHES = 8  # images that are fetched at once
T = TypeVar("T")


class Preparer:
    """Turns requests into jobs."""

    def __init__(self, model: Model, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.work = ThreadPoolExecutor(settings.image_workers, "llava-lite-prepare")
        self.fetching = ThreadPoolExecutor(FETCHES, "llava-lite-fetch")
        self.fetched = asyncio.Semaphore(FETCHES)  # bounds fetched images that wait for decoding
        self.tokenizing = threading.Lock()  # the prefixes of the model are not thread-safe
        self.longest_piece = max(map(len, (*model.tokenizer.pieces, IMAGE_MARKER)))

    async def prepare(self, body: bytes) -> tuple[Job, bool]:
        """The job of a request, and whether its stream ends with the usage. Raises ApiError,
        ImageError, PromptError, ContextError."""
        request, conversation, options = await in_pool(self.work, lambda: self.read(body))
        images = [
            await self.image(number, source, options.image_size)
            for number, source in enumerate(conversation.images, start=1)
        ]
        prompt = await in_pool(self.work, lambda: self.prompt(conversation, images, options))
        return Job(prompt, options, bool(request.stream)), request.include_usage

    def read(self, body: bytes) -> tuple[ChatRequest, Conversation, GenerationOptions]:
        """Check everything that needs no image. Raises ApiError, PromptError."""
        request = parse_request(body)
        served = self.settings.model_name
        if request.model not in (None, served):
            message = f"the model {request.model!r} is not served here, {served!r} is"
            raise ApiError(404, message[:500], "model", "model_not_found")
        options = self.options(request)
        conversation = read_messages(request.messages, self.model.config.template)
        count, limit = len(conversation.images), self.settings.max_images
        if count > limit:
            raise ApiError(400, f"{count} images, a request may have {limit}", "messages")
        return request, conversation, options

    def options(self, request: ChatRequest) -> GenerationOptions:
        """The options of the answer. Raises ApiError."""
        wanted, limit = request.max_completion_tokens, self.settings.max_new_tokens
        wanted = request.max_tokens if wanted is None else wanted
        if wanted is not None and wanted > limit:
            raise ApiError(400, f"max_tokens {wanted}: at most {limit} are allowed", "max_tokens")
        temperature, top_p = request.temperature or 0.0, request.top_p
        if top_p == 0:  # only the best token is left
            temperature, top_p = 0.0, None
        served, size = self.settings.reduction, request.image_size
        if size is None and served is not None:  # a reduction by name keeps the server's size
            size = served.image_size
        try:
            options = GenerationOptions(
                wanted,
                temperature,
                1.0 if top_p is None else top_p,
                request.top_k or 0,
                request.seed,
                request.stop or None,
                reduction=request.reduction or served,
                image_size=size,
            )
            self.model.reduction_for([], options.reduction)
        except CheckpointError:  # of the thresholds; its message names a file
            message = f"reduction {request.reduction!r} is not available for this model"
            raise ApiError(400, message, "reduction") from None
        except ValueError as error:  # in other places a ValueError is a bug
            raise ApiError(400, one_line(error)) from None
        return options

    async def image(self, number: int, source: str, size: int | None = None) -> Image.Image:
        """The picture of a source. Raises ImageError with the number of the image."""
        try:
            if not is_remote(source):
                return await self.open(source, size)
            async with self.fetched:
                found = await in_pool(self.fetching, lambda: fetch_image(source, self.settings))
                return await self.open(found, size)
        except ImageError as error:
            raise ImageError(f"image {number}: {error}") from error

    async def open(self, found: str | bytes, size: int | None) -> Image.Image:
        """Open a data URL, a file or bytes in the working pool. `size`: its side as a square."""
        config, exif = self.model.config.at(size), self.model.exif
        return await in_pool(self.work, lambda: open_image(found, self.settings, config, exif))

    def prompt(
        self, conversation: Conversation, images: list[Image.Image], options: GenerationOptions
    ) -> Request:
        """The request for the model. Without a length, the answer is as long as the server and the
        context allow. Raises PromptError, ContextError."""
        limit = self.model.config.text.max_positions
        length = sum(len(text or "") for turn in conversation.turns for text in turn)
        length += len(conversation.system or "")
        if length > limit * self.longest_piece:  # a long text takes long to tokenize
            raise ContextError(f"a prompt of {length} characters exceeds the context of {limit}")
        with self.tokenizing:
            # The client's system text is no option: its keys and values would stay in the cache.
            request = self.model.request(
                images, conversation.turns, options, system=conversation.system
            )
        most = min(request.max_new_tokens, self.settings.max_new_tokens)
        return replace(request, max_new_tokens=most)

    def close(self) -> None:
        """End the threads. Waiting work is dropped."""
        for pool in (self.work, self.fetching):
            pool.shutdown(wait=False, cancel_futures=True)


async def in_pool(pool: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    """Run `work` in a thread of the pool and return its result."""
    return await asyncio.get_running_loop().run_in_executor(pool, work)
