"""Run `transformers` on the same weights, to compare its speed with this package.

It is a black box that takes ids, pixels and a cache. It shares our tensors under other names, so it
needs little memory. Only the tower's last block is extra: LLaVA does not use it, `transformers`
runs it. `transformers` is imported on first use.
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

from llava_lite.checkpoints.export import hf_documents
from llava_lite.checkpoints.names import our_names
from llava_lite.checkpoints.skeleton import WithoutInit, expected_shapes
from llava_lite.checkpoints.tensors import read_json
from llava_lite.config import IMAGE_TOKEN_ID, LlavaConfig
from llava_lite.errors import LlavaLiteError
from llava_lite.llava import Llava

TORCHVISION = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_declared: list[torch.library.Library] = []  # operators live as long as their library


class PeerError(LlavaLiteError):
    """`transformers` cannot run these weights, or is not installed."""


class Peer:
    """LlavaForConditionalGeneration on the tensors of one of our models."""

    def __init__(self, llava: Llava) -> None:
        transformers = import_transformers()
        self.version: str = transformers.__version__
        self.device = llava.device
        self.image_id = llava.config.text.vocab_size - 1
        self.num_patches = llava.config.vision.num_patches
        state = plain_state(llava)
        raw = hf_config(llava.config, llava.dtype, self.image_id)
        with WithoutInit():  # reserves memory but does not touch it
            config = transformers.LlavaConfig(**raw)
            self.model = transformers.LlavaForConditionalGeneration(config)
        self.model.load_state_dict(self.rename(state, llava.dtype), assign=True)
        # Weights require gradients, as after `from_pretrained`. Without gradients torch copies all
        # of lm_head to compute the last row's logits.
        self.model.to(self.device).eval()

    @classmethod
    def from_folder(
        cls, folder: Path, config: LlavaConfig, dtype: torch.dtype, device: str
    ) -> "Peer":
        """Load an exported folder as users of `transformers` do. config: of the original model."""
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

    def rename(self, state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """Our tensors under the names of `transformers`, and noise for tensors we do not have."""
        theirs = {}
        for name, tensor in self.model.state_dict().items():
            [ours] = our_names(name)
            noise = torch.empty_like(tensor, dtype=dtype, device=self.device)
            theirs[name] = state[ours] if ours in state else noise.normal_(std=0.02)
        return theirs

    def expand(self, input_ids: Sequence[int]) -> Tensor:
        """Ids (1, N) with an image id for every patch in place of each image slot (-200)."""
        counts = {IMAGE_TOKEN_ID: self.num_patches}
        wide = [
            self.image_id if token == IMAGE_TOKEN_ID else token
            for token in input_ids
            for _ in range(counts.get(token, 1))
        ]
        return torch.tensor([wide], device=self.device)

    def tower(self, pixel_values: Tensor) -> Any:
        """Run the vision tower. LLaVA takes one of its hidden states."""
        return self.model.model.vision_tower(pixel_values, output_hidden_states=True)

    def prefill(self, inputs_embeds: Tensor) -> Any:
        """Run rows (1, N, C), image included, through the decoder."""
        return self.model(inputs_embeds=inputs_embeds, use_cache=True, logits_to_keep=1)

    def first_token(self, input_ids: Tensor, pixel_values: Tensor) -> tuple[Tensor, Any]:
        """From pixels and ids (1, N) to the first token's logits (1, V) and the cache. Waits until
        the device is done."""
        output = self.model(
            input_ids=input_ids, pixel_values=pixel_values, use_cache=True, logits_to_keep=1
        )
        logits = output.logits[:, -1]
        logits.argmax(-1).item()
        return logits, output.past_key_values

    def decode(self, cache: Any, steps: int) -> None:
        """Decode `steps` tokens greedily; the cache grows."""
        token = torch.tensor([[5]], device=self.device)
        for _ in range(steps):
            output = self.model(
                input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            token = torch.tensor([[output.logits[0, -1].argmax().item()]], device=self.device)

    def begin_decoding(self, cache: Any, length: int, steps: int) -> Callable[[], None]:
        """Cut the cache back to `length`, decode one token, and return a call that decodes more."""
        excess = cache.get_seq_length() - length
        if excess:
            cache.crop(-excess)
        self.decode(cache, 1)
        return partial(self.decode, cache, steps)


def plain_state(llava: Llava) -> dict[str, Tensor]:
    """All tensors by name. Raises PeerError if they are quantized: only we know the format."""
    tensors = {name: parameter.detach() for name, parameter in llava.named_parameters()}
    if set(tensors) != set(expected_shapes(llava.config)):
        raise PeerError("transformers needs plain weights: these are quantized")
    return tensors


def hf_config(config: LlavaConfig, dtype: torch.dtype, image_id: int) -> dict[str, Any]:
    """The arguments of their LlavaConfig. The image id is any id that no prompt uses. There is no
    padding, and the dtype does not matter: every tensor is replaced."""
    raw = hf_documents(config, True, config.text.vocab_size, dtype)["config.json"]
    raw["image_token_index"] = image_id
    for part in (raw, raw["text_config"], raw["vision_config"]):
        for name in ("torch_dtype", "pad_token_id"):
            part.pop(name, None)
    return raw


# ---- the import --------------------------------------------------------------------------------


def import_transformers() -> Any:
    """The module transformers. Raises PeerError if it is not installed, or too old."""
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
    """Make `transformers` importable beside a torchvision that does not fit this torch. The import
    of torchvision fails without two operators, so declare them."""
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
