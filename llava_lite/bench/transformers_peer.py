"""Run `transformers` on the same weights, to compare its speed with this package.

It is a black box that takes ids, pixels and a cache. It shares our tensors under other names, so it
needs little memory. Only the tower's last block is extra: LLaVA does not use it, `transformers`
runs it. `transformers` is imported on first use.
"""

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
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

TORCHVISION = torch.library.Library("torchvision", "FRAGMENT")  # lives as long as its operators
SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class PeerError(LlavaLiteError):
    """`transformers` cannot run these weights, or is not installed."""


class Peer:
    """LlavaForConditionalGeneration. The image id is any id that no prompt uses."""

    def __init__(self, model: Any, image_id: int, num_patches: int) -> None:
        # Weights require gradients, as after `from_pretrained`. Without gradients torch copies all
        # of lm_head to compute the last row's logits.
        self.model = model.eval()
        self.forward = partial(model, use_cache=True, logits_to_keep=1)
        self.device: torch.device = model.device
        self.image_ids = [image_id] * num_patches

    @classmethod
    def of(cls, llava: Llava) -> "Peer":
        """The peer on the tensors of one of our models."""
        transformers = import_transformers()
        image_id = llava.config.text.vocab_size - 1
        raw = hf_config(llava.config, llava.dtype, image_id)
        with WithoutInit():  # reserves memory but does not touch it
            config = transformers.LlavaConfig(**raw)
            model = transformers.LlavaForConditionalGeneration(config)
        model.load_state_dict(rename(llava, model), assign=True)
        return cls(model.to(llava.device), image_id, llava.config.vision.num_patches)

    @classmethod
    def from_folder(cls, folder: Path, dtype: torch.dtype, device: str) -> "Peer":
        """Load an exported folder as users of `transformers` do."""
        transformers = import_transformers()
        transformers.utils.logging.disable_progress_bar()
        model = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype)
        raw = read_json(folder / "config.json")
        return cls(model.to(device), raw["image_token_index"], raw["image_seq_length"])

    def expand(self, input_ids: Sequence[int]) -> Tensor:
        """Ids (1, N) with an image id for every patch in place of each image slot (-200)."""
        wide = (self.image_ids if token == IMAGE_TOKEN_ID else [token] for token in input_ids)
        return torch.tensor([list(chain.from_iterable(wide))], device=self.device)

    def tower(self, pixel_values: Tensor) -> Any:
        """Run the vision tower. LLaVA takes one of its hidden states."""
        return self.model.model.vision_tower(pixel_values, output_hidden_states=True)

    def prefill(self, inputs_embeds: Tensor) -> Any:
        """Run rows (1, N, C), image included, through the decoder."""
        return self.forward(inputs_embeds=inputs_embeds)

    def first_token(self, input_ids: Tensor, pixel_values: Tensor) -> tuple[Tensor, Any]:
        """From pixels and ids (1, N) to the first token's logits (1, V) and the cache. Waits until
        the device is done."""
        output = self.forward(input_ids=input_ids, pixel_values=pixel_values)
        logits = output.logits[:, -1]
        logits.argmax(-1).item()
        return logits, output.past_key_values

    def decode(self, cache: Any, steps: int) -> None:
        """Decode `steps` tokens greedily; the cache grows."""
        token = torch.tensor([[5]], device=self.device)
        for _ in range(steps):
            output = self.forward(input_ids=token, past_key_values=cache)
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


def rename(llava: Llava, model: Any) -> dict[str, Tensor]:
    """Our tensors under the names of `transformers`, and noise for tensors we do not have."""
    ours, theirs = plain_state(llava), {}
    for name, tensor in model.state_dict().items():
        [our_name] = our_names(name)
        noise = torch.empty_like(tensor, dtype=llava.dtype, device=llava.device)
        theirs[name] = ours[our_name] if our_name in ours else noise.normal_(std=0.02)
    return theirs


def hf_config(config: LlavaConfig, dtype: torch.dtype, image_id: int) -> dict[str, Any]:
    """The arguments of their LlavaConfig. There is no padding, and the dtype does not matter: every
    tensor is replaced."""
    raw = hf_documents(config, True, config.text.vocab_size, dtype)["config.json"]
    raw["image_token_index"] = image_id
    for part in (raw, raw["text_config"], raw["vision_config"]):
        for name in ("torch_dtype", "pad_token_id"):
            part.pop(name, None)
    return raw


def import_transformers() -> Any:
    """The module transformers. Raises PeerError if it is not installed, or too old."""
    if find_spec("transformers") is None:
        raise PeerError("comparing needs transformers: pip install 'transformers>=4.57'")
    if find_spec("torchvision") is not None:
        make_torchvision_importable()
    transformers = import_module("transformers")
    try:
        _ = transformers.LlavaForConditionalGeneration
    except (AttributeError, ImportError, RuntimeError) as error:
        version = transformers.__version__
        raise PeerError(f"transformers {version} has no LLaVA to run: {error}") from error
    return transformers


def make_torchvision_importable() -> None:
    """Declare two operators of a torchvision that does not fit this torch. `transformers` imports
    torchvision, which fails without them."""
    try:
        import_module("torchvision")
    except (ImportError, OSError, RuntimeError):
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                TORCHVISION.define(name + SIGNATURE)
