"""`transformers` on the very same weights, to be timed beside this package: a black box that takes
ids, pixels and a cache. Its tensors are ours, renamed and shared, so that it needs hardly any
memory of its own; only the last block of the tower, which LLaVA never needs and `transformers` runs
all the same, is its own.

Imports `transformers` when it is asked for, never before.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from llava_lite.checkpoints.export import hf_documents
from llava_lite.checkpoints.names import our_names
from llava_lite.checkpoints.skeleton import expected_shapes
from llava_lite.checkpoints.tensors import read_json
from llava_lite.config import IMAGE_TOKEN_ID, LlavaConfig
from llava_lite.errors import LlavaLiteError
from llava_lite.llava import Llava

IN_PLACE_RANDOM = {
    *("normal_", "uniform_", "trunc_normal_"),
    *("kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "xavier_normal_"),
}
TORCHVISION = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_declared: list[torch.library.Library] = []  # operators live as long as their library


class PeerError(LlavaLiteError):
    """`transformers` cannot run these weights, or is not there."""


class Peer:
    """LlavaForConditionalGeneration on the tensors of a model of ours."""

    def __init__(self, llava: Llava) -> None:
        transformers = import_transformers()
        self.version: str = transformers.__version__
        self.device = llava.device
        self.image_id = llava.config.text.vocab_size - 1
        self.num_patches = llava.config.vision.num_patches
        state = plain_state(llava)
        raw = hf_config(llava.config, llava.dtype, self.image_id)
        with WithoutInit():  # memory is reserved, but never written, so it is never taken
            config = transformers.LlavaConfig(**raw)
            self.model = transformers.LlavaForConditionalGeneration(config)
        self.model.load_state_dict(self.named_as_theirs(state, llava.dtype), assign=True)
        # Weights go on requiring gradients, as `from_pretrained` leaves them: without, torch takes
        # a way through the last row's logits that copies all of lm_head.
        self.model.to(self.device).eval()

    @classmethod
    def from_folder(
        cls, folder: Path, config: LlavaConfig, dtype: torch.dtype, device: str
    ) -> "Peer":
        """As users of `transformers` load an exported folder, `config` what it was made from."""
        peer = cls.__new__(cls)
        transformers = import_transformers()
        peer.version = transformers.__version__
        transformers.utils.logging.disable_progress_bar()
        peer.model = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype)
        peer.model.to(device).eval()
        peer.device = torch.device(device)
        peer.image_id = read_json(folder / "config.json")["image_token_index"]
        peer.num_patches = config.vision.num_patches
        return peer

    def named_as_theirs(self, state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """Our tensors under their names, and noise for those that only they have."""
        theirs = {}
        for name, tensor in self.model.state_dict().items():
            [ours] = our_names(name)
            noise = torch.empty_like(tensor, dtype=dtype, device=self.device)
            theirs[name] = state[ours] if ours in state else noise.normal_(std=0.02)
        return theirs

    def expand(self, input_ids: Sequence[int]) -> Tensor:
        """Ids as they want them, (1, N): every image slot (-200) as often as there are patches."""
        counts = {IMAGE_TOKEN_ID: self.num_patches}
        wide = [
            self.image_id if token == IMAGE_TOKEN_ID else token
            for token in input_ids
            for _ in range(counts.get(token, 1))
        ]
        return torch.tensor([wide], device=self.device)

    def tower(self, pixel_values: Tensor) -> Any:
        """The vision tower with all of its hidden states, of which LLaVA takes one."""
        return self.model.model.vision_tower(pixel_values, output_hidden_states=True)

    def prefill(self, inputs_embeds: Tensor) -> Any:
        """Rows (1, N, C), image included, through the decoder."""
        return self.model(inputs_embeds=inputs_embeds, use_cache=True, logits_to_keep=1)

    def first_token(self, input_ids: Tensor, pixel_values: Tensor) -> tuple[Tensor, Any]:
        """From pixels and ids (1, N) to the logits (1, V) of the first token, which it has waited
        for, and the cache."""
        output = self.model(
            input_ids=input_ids, pixel_values=pixel_values, use_cache=True, logits_to_keep=1
        )
        logits = output.logits[:, -1]
        logits.argmax(-1).item()
        return logits, output.past_key_values

    def decode(self, cache: Any, steps: int) -> None:
        """So many tokens, each the likeliest after the one before; the cache grows."""
        token = torch.tensor([[5]], device=self.device)
        for _ in range(steps):
            output = self.model(
                input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            token = torch.tensor([[output.logits[0, -1].argmax().item()]], device=self.device)

    def begin_decoding(self, cache: Any, length: int, steps: int) -> Callable[[], None]:
        """`decode` after a cache that is cut back to `length`, and a first token after that."""
        excess = cache.get_seq_length() - length
        if excess:
            cache.crop(-excess)
        self.decode(cache, 1)
        return partial(self.decode, cache, steps)


def plain_state(llava: Llava) -> dict[str, Tensor]:
    """Its tensors. Raises PeerError where they are quantized, in a way of our own."""
    tensors = {name: parameter.detach() for name, parameter in llava.named_parameters()}
    if set(tensors) != set(expected_shapes(llava.config)):
        raise PeerError("transformers needs plain weights: these are quantized")
    return tensors


def hf_config(config: LlavaConfig, dtype: torch.dtype, image_id: int) -> dict[str, Any]:
    """The arguments of their LlavaConfig. Any id may mark an image that no prompt uses; padding
    there is none, and what the model is built in does not matter, every tensor is replaced."""
    raw = hf_documents(config, True, config.text.vocab_size, dtype)["config.json"]
    raw["image_token_index"] = image_id
    for part in (raw, raw["text_config"], raw["vision_config"]):
        for name in ("torch_dtype", "pad_token_id"):
            part.pop(name, None)
    return raw


class WithoutInit(TorchFunctionMode):
    """Skips random initialisation, which would write every page of a model that is thrown away."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in IN_PLACE_RANDOM:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


# ---- the import --------------------------------------------------------------------------------


def import_transformers() -> Any:
    """The package. Raises PeerError where it is not installed, or too old."""
    if find_spec("transformers") is None:
        raise PeerError("comparing needs transformers: pip install 'transformers>=4.57'")
    with usable_torchvision():
        transformers = import_module("transformers")
        try:
            _ = transformers.LlavaForConditionalGeneration
        except (AttributeError, ImportError, RuntimeError) as error:
            version = transformers.__version__
            raise PeerError(f"transformers {version} has no LLaVA to run: {error}") from error
    return transformers


@contextmanager
def usable_torchvision() -> Iterator[None]:
    """A torchvision whose compiled operators do not fit this torch fails to import, and with it
    the part of `transformers` that only looks whether it is there. Two names are enough for it."""
    if find_spec("torchvision") is not None:
        try:
            import_module("torchvision")
        except (ImportError, OSError, RuntimeError):
            library = torch.library.Library("torchvision", "FRAGMENT")
            for name, signature in TORCHVISION.items():
                if not hasattr(torch.ops.torchvision, name):
                    library.define(name + signature)
            _declared.append(library)
    yield
