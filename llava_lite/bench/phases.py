"""Build the contenders that run together, and time them in turns."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from llava_lite.bench.cases import (
    LLAMACPP,
    OURS,
    PARTS,
    TRANSFORMERS,
    Contender,
    Work,
    our_cases,
    peer_cases,
    walk_all,
)
from llava_lite.bench.footprint import Footprint
from llava_lite.bench.gguf_files import PlannedFile
from llava_lite.bench.llamacpp_peer import llamacpp_cases, open_llamacpp
from llava_lite.bench.machine import Case, Clock, Measurement, time_cases
from llava_lite.bench.models import Settings, open_model, twin
from llava_lite.bench.profile import Profile, profile_cases
from llava_lite.bench.quick import expect_seconds, prompt_flops
from llava_lite.bench.transformers_peer import Peer
from llava_lite.fast.quantize import quantize as quantize_model
from llava_lite.generation.model import Model

WITH_QUANTIZED = ("none", "tome-72-logical", "hybrid-72-36")  # reductions


# ---- contenders --------------------------------------------------------------------------------


def build(settings: Settings, names: Sequence[str]) -> list[Contender]:
    """The named contenders but llama.cpp. They share the plain weights."""
    if not names:
        return []
    model = open_model(settings)
    models: dict[str, Model | Peer] = {OURS: model}
    works = dict.fromkeys(names, Work.of(model.llava))
    if TRANSFORMERS in names:
        models[TRANSFORMERS] = Peer.of(model.llava)
    if settings.quantize and settings.quantized in names:
        copy = model if len(names) == 1 else twin(model)
        quantize_model(copy.llava, settings.quantize)
        models[settings.quantized], works[settings.quantized] = copy, Work.of(copy.llava)
    return [Contender(name, models[name], works[name]) for name in names]


# ---- what is timed -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """The figures of contenders that ran together. logits: of the prompt's last row, by name.
    rounds: how many were completed."""

    limits: dict[str, float]
    measurements: list[Measurement]
    skipped: dict[str, str]
    logits: dict[str, Tensor]
    profiles: list[Profile]
    rounds: int


def run_phases(
    settings: Settings,
    plain: Footprint,
    phases: Sequence[Sequence[str]],
    files: Mapping[str, PlannedFile],
    clock: Clock,
) -> list[Phase]:
    """Run the phases until the user interrupts. Raises KeyboardInterrupt before any figure."""
    found: list[Phase] = []
    for names in phases:
        try:
            found.append(run_phase(settings, plain, names, files, clock))
        except KeyboardInterrupt:
            clock.interrupted = True
        if clock.interrupted:
            break
    if not found:
        raise KeyboardInterrupt
    return found


def run_phase(
    settings: Settings,
    plain: Footprint,
    names: Sequence[str],
    files: Mapping[str, PlannedFile],
    clock: Clock,
) -> Phase:
    """Build some contenders, time them and the machine in turns, and free them."""
    theirs = [name for name in names if name.startswith(LLAMACPP)]
    # not in inference mode: transformers is not built in it
    contenders = build(settings, [name for name in names if name not in theirs])
    dtype = getattr(torch, plain.dtype)
    contenders += [open_llamacpp(plain.config, dtype, name, files) for name in theirs]
    with torch.inference_mode():
        return time_contenders(settings, contenders, clock)


def time_contenders(settings: Settings, contenders: Sequence[Contender], clock: Clock) -> Phase:
    """Make all cases, and time them and the machine in turns."""
    cases: list[Case] = []
    skipped: dict[str, str] = {}
    logits: dict[str, Tensor] = {}
    for one in contenders:
        start = perf_counter()
        if one.name == TRANSFORMERS:
            found, logits[one.name] = peer_cases(one)
        elif one.name.startswith(LLAMACPP):
            found = llamacpp_cases(one)
        else:
            found, logits[one.name], reasons = make_our_cases(settings, one)
            skipped |= reasons
        if settings.quick:
            prompt = prompt_flops(one.work.config, one.work.config.text.num_layers)
            walks = sum(case.part == "prefill" for case in found)  # a reduction saves two thirds
            whole = prompt * (2 + walks) / 3
            walked = found[0].flops if one.name.startswith(LLAMACPP) else whole
            rate = walked / (perf_counter() - start)
            clock.expected |= expect_seconds(found, rate, prompt)
        cases += found
    cases.sort(key=lambda case: PARTS.index(case.part))
    hidden = settings.quiet or not sys.stderr.isatty()
    dtype = contenders[0].work.dtype
    rates, measured = time_cases(cases, settings.repeat, dtype, settings.device, hidden, clock)
    seen = [case for case in cases if not case.contender.startswith(LLAMACPP)]
    wanted = settings.profile and not clock.interrupted
    profiles = profile_cases(seen, settings.device) if wanted else []
    return Phase(rates, measured, skipped, logits, profiles, clock.rounds)


def make_our_cases(settings: Settings, one: Contender) -> tuple[list[Case], Tensor, dict[str, str]]:
    """The cases of one of our models, its logits (1, V), and the reasons for missing cases."""
    names, lengths = settings.reductions, settings.lengths
    if one.name != OURS:  # fewer for quantized weights
        names, lengths = tuple(name for name in names if name in WITH_QUANTIZED), ()
    walks, reasons = walk_all(one.model, names)
    context = one.work.config.text.max_positions
    too_long = {f"{n} words": f"the context is {context} positions" for n in lengths if n > context}
    cases = our_cases(one, walks, settings.batch_sizes, lengths)
    return cases, walks["none"].logits, reasons | too_long
