"""A quick look: choose sizes so that a table stands within three minutes on any machine.

One product is timed, and gives the rate of the slowest contender. The number of whole prompts
until the end of the first round is known, so the decoder layers and the lengths follow. Rounds go
on until the time is over (`Clock` in machine.py). A rate that is estimated too low costs layers,
not time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch.nn import functional as F

from llava_lite.bench.cases import count_positions
from llava_lite.bench.machine import MATMUL, ROWS_IN_A_HURRY, Case, time_call
from llava_lite.bench.models import Settings, name_of, random_config, random_dtype
from llava_lite.config import FastViTHDConfig, LlavaConfig
from llava_lite.generation.trace import decoder_flops, fastvithd_flops, tower_flops

QUICK_REDUCTIONS = ("none", "folded-72")  # with any number of layers
SECONDS = 155.0  # until the last round ends; the rest is for the start and the table
FIRST_SHARE = 0.25  # of these seconds, for the prompts until the end of the first round
MARGIN = 1.25  # of expected seconds
PEER_SHARE = 0.3  # transformers is left out if one prompt takes a larger share
# Whole prompts until the end of the first round. Ours: walk, tower and prefill, two first tokens;
# a reduction saves two thirds. transformers: walk, tower and prefill, first token.
OUR_PROMPTS, REDUCED_PROMPTS, PEER_PROMPTS, LLAMACPP_PROMPTS = 4.0, 1.3, 3.0, 2.5


def choose_sizes(settings: Settings) -> tuple[Settings, str]:
    """Choose the layers and lengths for random weights, at most those of the settings. Batches are
    left out. Returns the settings, and one line that says what was chosen and why."""
    dtype, config = random_dtype(settings), random_config(settings)
    rate, most = time_product(dtype, settings.device), config.text.num_layers
    prompts = count_prompts(settings)
    seconds = {layers: prompt_flops(config, layers) / rate for layers in halved(most)}
    fitting = [n for n, prompt in seconds.items() if prompts * prompt <= FIRST_SHARE * SECONDS]
    layers = max(fitting, default=1)
    left = FIRST_SHARE * SECONDS / seconds[layers] - prompts  # whole prompts
    words = sorted(settings.lengths)
    fits = [2 * count <= left * count_positions(config) for count in accumulate(words)]
    lengths = tuple(words[: sum(fits)])
    line = (
        f"a quick look: products in {name_of(dtype)} run at {rate / 1e9:.0f} GFLOP/s; chosen are "
        f"{layers} of {most} layers, {' '.join(map(str, lengths)) or 'no'} growing words, no "
        f"batches, and at most {settings.repeat} rounds until {SECONDS:.0f} s are over"
    )
    against = settings.against and seconds[layers] <= PEER_SHARE * SECONDS
    if against != settings.against:
        line += f"; transformers is left out, one prompt would take {seconds[layers]:.0f} s"
    chosen = replace(
        settings, layers=layers, lengths=lengths, batch_sizes=(), against=against, profile=False
    )
    return chosen, line


def expect_seconds(
    cases: Sequence[Case], rate: float, prompt: int
) -> dict[tuple[str, str, str], float]:
    """At most so many seconds a contender's cases take, by key. rate: operations per second of the
    contender. prompt: operations of a whole prompt, for cases whose operations are not counted."""
    return {case.key: MARGIN * (case.steps * case.flops or prompt) / rate for case in cases}


def time_product(dtype: torch.dtype, device: str) -> float:
    """Operations per second of one product of many rows with the widest weight."""
    _, width, out = MATMUL
    weight = torch.full((out, width), 0.01, dtype=dtype, device=device)
    rows = torch.full((ROWS_IN_A_HURRY, width), 0.5, dtype=dtype, device=device)
    seconds = [time_call(lambda: F.linear(rows, weight), device) for _ in range(2)]
    return 2 * rows.numel() * out / seconds[-1]  # the first call warms up


def prompt_flops(config: LlavaConfig, layers: int) -> int:
    """Operations from pixels to the first token, with so many decoder layers."""
    text, vision = config.text, config.vision
    rows = [count_positions(config)] * layers
    if isinstance(vision, FastViTHDConfig):
        tower = fastvithd_flops(vision, vision.grid)
    else:
        tower = tower_flops(vision, [vision.num_patches] * vision.num_blocks)
    return 2 * (tower + decoder_flops(text, rows, rows) + text.hidden_size * text.vocab_size)


def count_prompts(settings: Settings) -> float:
    """Whole prompts until the end of the first round, without lengths."""
    reduced = len(set(settings.reductions) - {"none"})
    ours = len(settings.ours) * (OUR_PROMPTS + reduced * REDUCED_PROMPTS)
    return ours + PEER_PROMPTS * settings.against + LLAMACPP_PROMPTS * len(settings.llamacpp)


def halved(layers: int) -> Iterator[int]:
    """A number of layers, its half, and so on, down to 1."""
    while layers:
        yield layers
        layers //= 2
