"""One training run: optimizer, learning rates, log, and a state to resume from."""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from tqdm import tqdm


def initialize(module: nn.Module, num_blocks: int) -> None:
    """Small normal weights. The last layer of a residual branch starts smaller in deeper models."""
    for name, parameter in module.named_parameters():
        if parameter.dim() < 2 and not name.endswith("class_embed"):
            continue
        std = 0.02
        if name.endswith(("o_proj.weight", "fc2.weight", "down_proj.weight")):
            std /= math.sqrt(2 * num_blocks)
        if name.endswith("patch_embed.weight"):
            std = 0.04
        nn.init.normal_(parameter, std=std)


class Trainer:
    """AdamW with warm-up and cosine, gradient clipping, a JSONL log, and a state to resume from."""

    def __init__(
        self,
        name: str,
        work: Path,
        modules: dict[str, nn.Module],
        rates: dict[str, float],
        steps: int,
    ) -> None:
        self.name, self.modules, self.steps, self.step = name, modules, steps, 0
        self.state_path, self.log_path = work / f"{name}.state.pt", work / "log.jsonl"
        self.losses: list[float] = []
        groups: list[dict[str, Any]] = []
        self.rates: list[float] = []
        for key, module in modules.items():
            named = list(module.named_parameters())
            # Weight decay would shrink the position table, but not the patches it is added to.
            matrices = [p for name, p in named if p.dim() >= 2 and name != "pos_embed"]
            others = [p for name, p in named if p.dim() < 2 or name == "pos_embed"]
            groups.append({"params": matrices, "weight_decay": 0.05})
            groups.append({"params": others, "weight_decay": 0.0})
            self.rates += [rates[key]] * 2
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
        if self.state_path.exists():
            self._restore(torch.load(self.state_path, "cpu", weights_only=True))

    def rate_factor(self) -> float:
        """Warm-up, then cosine down to 1/50. It depends on the step alone, so a resumed stage can
        have another rate or number of steps."""
        warm_up = min(200, self.steps // 10 + 1)
        cosine = 0.02 + 0.49 * (1 + math.cos(math.pi * self.step / self.steps))
        return min(1.0, (self.step + 1) / warm_up) * cosine

    def _restore(self, state: dict[str, Any]) -> None:
        for key, module in self.modules.items():
            module.load_state_dict(state[key])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        if self.step >= self.steps != state["steps"]:
            self.save()  # the stage ends here

    def save(self) -> None:
        state: dict[str, Any] = {key: module.state_dict() for key, module in self.modules.items()}
        state |= {"optimizer": self.optimizer.state_dict(), "step": self.step, "steps": self.steps}
        partial = self.state_path.with_suffix(".partial")
        torch.save(state, partial)
        partial.rename(self.state_path)

    def update(self, loss: Tensor) -> None:
        loss.backward()
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            nn.utils.clip_grad_norm_(group["params"], 1.0)
            group["lr"] = rate * self.rate_factor()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.losses.append(loss.item())

    def is_due(self, every: int) -> bool:
        """Whether to log after this step: each `every` steps and at the end."""
        return self.step % every == 0 or self.step == self.steps

    def log(self, every: int, **values: float) -> None:
        """Write a line with the mean loss of the last `every` steps."""
        loss = round(float(np.mean(self.losses[-every:])), 4)
        line = {"stage": self.name, "step": self.step, "time": round(time.time()), "loss": loss}
        line |= values
        with self.log_path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        tqdm.write(json.dumps(line))

    def run(self) -> Iterator[int]:
        """Yield the remaining step numbers, with a progress bar. Saves the state on the way."""
        if self.step >= self.steps:
            print(f"{self.name} has had its {self.step} steps ({self.state_path})")
        bar = tqdm(range(self.step, self.steps), self.name, initial=self.step, total=self.steps)
        for step in bar:
            yield step
            if self.step % 100 == 0 or self.step == self.steps:
                self.save()


def autocast(device: str) -> torch.autocast:
    return torch.autocast(torch.device(device).type, torch.bfloat16)


class PlainAttention(TorchFunctionMode):
    """Computes attention by its formula. On a CPU the backward pass of the fused kernel takes twice
    as long, and torch's own plain kernel spends a third on fully masked rows."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or kwargs.get("is_causal"):
            return func(*args, **kwargs)
        q, k, v = args
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        mask = kwargs.get("attn_mask")
        if mask is not None:
            is_bool = mask.dtype == torch.bool
            scores = scores.masked_fill(~mask, -torch.inf) if is_bool else scores + mask
        return scores.softmax(-1) @ v


def attention(device: str) -> AbstractContextManager:
    """A context with the fastest attention to train with."""
    return PlainAttention() if device == "cpu" else nullcontext()
