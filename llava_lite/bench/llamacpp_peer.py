"""Run llama.cpp, through the package `xllamacpp`, to compare its speed with this package.

It is a black box that takes an image and words, and gives tokens. Its server runs in this process,
so all contenders take turns. It has random weights of the same shapes (gguf_files.py), and keeps
its caches in float16. `xllamacpp` is imported on first use.

A prompt has as many positions as ours. The chat template and the image leave the rest to words.
Nothing is cached between the timed prompts. The timed tokens follow a cached prompt: of a cached
prompt llama.cpp runs one row again, so `steps` tokens are `steps` rows. The first token begins with
a PNG file, ours with pixels; one image takes milliseconds to decode. There is no call for the tower
alone.
"""

import base64
import io
import re
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from llava_lite.bench.cases import DECODED, LLAMACPP, Contender, Work, count_positions
from llava_lite.bench.gguf_files import MMPROJ, PlannedFile
from llava_lite.bench.machine import Case, Prepared
from llava_lite.config import LlavaConfig
from llava_lite.errors import LlavaLiteError
from llava_lite.generation.trace import decoder_flops

SPARE_POSITIONS = 64
WORD = " a"  # one token of the embedded tokenizer
Prompt = dict[str, Any]


class LlamaCppError(LlavaLiteError):
    """llama.cpp is not installed, or cannot run these files."""


class LlamaCpp:
    """A server with a text model and its mmproj, for one prompt at a time."""

    def __init__(self, text: Path, mmproj: Path, config: LlavaConfig) -> None:
        """Load two files with room for one prompt, and with torch's number of threads. Raises
        LlamaCppError."""
        context = count_positions(config) + DECODED + SPARE_POSITIONS
        threads, library = torch.get_num_threads(), import_xllamacpp()
        params = library.CommonParams()
        params.model.path, params.mmproj.path = str(text), str(mmproj)
        params.n_ctx, params.n_parallel, params.verbosity = context, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.warmup = params.fit_params = False
        params.n_gpu_layers = params.cache_ram_mib = 0  # prompts are not kept elsewhere
        try:
            self.server = library.Server(params)
        except RuntimeError as error:
            raise LlamaCppError(f"llama.cpp cannot load {text}: {error}") from error
        # A server that ends before its loop has begun waits forever. The loop refuses this prompt.
        self.server.handle_completions({**words_prompt(2 * context), "n_predict": 1})

    def run(self, prompt: Prompt, steps: int = 1, cached: bool = False) -> dict[str, Any]:
        """Run a prompt and generate `steps` tokens. cached: reuse the cache of an equal prompt.
        Returns the response. Raises LlamaCppError."""
        call = "handle_chat_completions" if "messages" in prompt else "handle_completions"
        options = {"n_predict": steps, "cache_prompt": cached, "temperature": 0, "ignore_eos": True}
        self.last = prompt
        response: dict[str, Any] = getattr(self.server, call)({**prompt, **options})
        if "error" in response:
            raise LlamaCppError(f"llama.cpp refused a prompt: {response['error']['message']}")
        return response

    def count_words(self, make: Callable[[int], Prompt], positions: int) -> int:
        """The number of words with which a prompt has that many positions. make: a prompt of so
        many words."""
        taken: int = self.run(make(1))["usage"]["prompt_tokens"]
        return 1 + positions - taken

    def begin_decoding(self, steps: int) -> Callable[[], Any]:
        """A call that generates tokens after the last prompt, which the server has cached."""
        return partial(self.run, self.last, steps, cached=True)


def open_llamacpp(
    config: LlavaConfig, dtype: torch.dtype, name: str, files: Mapping[str, PlannedFile]
) -> Contender:
    """A contender on the file of its format. dtype: of our plain model."""
    text = files[name.removeprefix(f"{LLAMACPP} ")]
    work = Work(
        config,
        dtype,
        torch.float16,
        sum(text.sizes.values()) - text.sizes["token_embd.weight"],  # only few rows are read
        sum(files[MMPROJ].sizes.values()),
    )
    return Contender(name, LlamaCpp(text.path, files[MMPROJ].path, config), work)


def words_prompt(count: int) -> Prompt:
    """So many words."""
    return {"prompt": WORD * count}


def chat_prompt(size: int | None, count: int) -> Prompt:
    """A chat with a gray image of size x size pixels (None: no image), and so many words."""
    content: list[dict[str, Any]] = [{"type": "text", "text": WORD * count}]
    if size is not None:
        file = io.BytesIO()
        Image.new("RGB", (size, size), "gray").save(file, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    return {"messages": [{"role": "user", "content": content}]}


def llamacpp_cases(one: Contender) -> list[Case]:
    """The cases of llama.cpp, without a reduction."""
    peer, work, vision = one.model, one.work, one.work.config.vision
    length = count_positions(work.config)
    lengths = (length,) * work.config.text.num_layers
    words = words_prompt(peer.count_words(words_prompt, length))
    # An image splits the words beside it, which makes one token more.
    without_image = length - vision.num_patches - 1
    count = peer.count_words(partial(chat_prompt, None), without_image)
    picture = chat_prompt(vision.image_size, count)
    peer.run(words)  # once before any turn, as the other contenders do
    prefill = work.prefill(length, decoder_flops(work.config.text, lengths, lengths))
    decode = Prepared(partial(peer.begin_decoding, DECODED))
    case = partial(Case, one.name, setting="none", image_tokens=vision.num_patches)
    return [
        case("prefill", run=partial(peer.run, words), **prefill),
        case("first token", run=partial(peer.run, picture)),
        case("decode", run=decode, **work.decode(lengths)),
    ]


def import_xllamacpp() -> Any:
    """The module xllamacpp. Raises LlamaCppError if it is not installed."""
    if find_spec("xllamacpp") is None:
        raise LlamaCppError("comparing with llama.cpp needs xllamacpp: pip install xllamacpp gguf")
    return import_module("xllamacpp")


def describe_build() -> str:
    """The version of the package, and the instructions that its llama.cpp uses."""
    library = import_xllamacpp()
    flags = re.findall(r"(\w+) = 1", library.get_system_info())
    return f"xllamacpp {library.__version__} with {', '.join(flags)}"
