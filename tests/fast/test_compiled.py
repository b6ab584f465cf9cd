"""Decode steps of fixed shapes against the ordinary ones: the same answers, whoever joins, leaves,
comes back, or keeps an old state."""

import copy
import pickle
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import llava_lite
from helpers.examples import examples
from helpers.models import TINY_CONFIG, TINY_TEXT, random_llava
from helpers.tensors import log_sizes_of
from helpers.waits import Watch, cuda_waits, dispatched_waits
from llava_lite.bench import models as bench_models
from llava_lite.bench import run as bench
from llava_lite.cache import LayerCache
from llava_lite.fast import compiled as module
from llava_lite.fast.compiled import (
    BUCKET,
    CompiledModel,
    CompileError,
    SlotCache,
    StaticDecoder,
    decode_step,
    resize_buffer,
)
from llava_lite.fast.kernels import Choice, ChosenLinear
from llava_lite.fast.quantize import quantize
from llava_lite.generation.model import Model
from llava_lite.generation.state import State
from llava_lite.inputs.tokenizer import Tokenizer
from llava_lite.llava import Llava
from llava_lite.reduction import FastV, Reduction, ToMe

LAYERS = TINY_TEXT.num_layers
LLAVA = random_llava()
# Masked positions add nothing, but there are more of them than positions, so sums are grouped in
# another way: float32 agrees to rounding, not to the bit.
CLOSE = {"rtol": 0.0, "atol": 1e-5}


def make_state(seed: int, lengths: Sequence[int], dtype: torch.dtype = torch.float32) -> State:
    """Any item that has a cache of these lengths. If `seed` is odd, most keys have sizes."""
    generator = torch.Generator().manual_seed(seed)
    shape = 2, 1, TINY_TEXT.num_heads
    cache: list[tuple[Tensor, Tensor]] = []
    for length in lengths:
        k, v = torch.randn(*shape, length, TINY_TEXT.head_dim, generator=generator).to(dtype)
        sizes = torch.randint(1, 30, (max(1, length - seed % 4),), generator=generator)
        cache.append(LayerCache(k, v, None, sizes.float().log()) if seed % 2 else (k, v))
    return State(tuple(cache), max(lengths) + seed % 5, (7,))


def assert_same(state: State, expected: State) -> None:
    """Look inside."""
    assert state.next_position == expected.next_position
    assert state.past_key_values is not None and expected.past_key_values is not None
    assert len(state.past_key_values) == len(expected.past_key_values) == LAYERS
    for pair, wanted in zip(state.past_key_values, expected.past_key_values, strict=True):
        assert isinstance(pair, tuple)
        for mine, theirs in zip(pair, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, **CLOSE)
        assert log_sizes_of(pair) == log_sizes_of(wanted)


@pytest.fixture
def models(tiny_model: Model) -> tuple[Model, CompiledModel]:
    """An ordinary model, and a fresh one in fixed shapes on the same weights."""
    return tiny_model, CompiledModel(tiny_model, "eager")


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [Image.linear_gradient("L").resize((60 + 9 * n, 40)).rotate(40 * n) for n in range(4)]


# ---- against the ordinary step -----------------------------------------------------------------

# Pruned layers are shorter; around the edges of a bucket, and beyond it.
LENGTHS = st.tuples(
    st.sampled_from([1, 9, BUCKET - 3, BUCKET - 2, BUCKET - 1, BUCKET, BUCKET + 1, 2 * BUCKET]),
    st.integers(0, 8),
    st.integers(1, LAYERS),
).map(lambda drawn: tuple(max(1, drawn[0] - drawn[1] * (n >= drawn[2])) for n in range(LAYERS)))
ACTIONS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 30), min_size=1, max_size=5),  # who goes on, old ones again
        st.integers(0, 30),  # whom somebody looks at
        st.booleans(),  # whether what was before is dropped
    ),
    min_size=1,
    max_size=8,
)


@examples(40)
@given(st.lists(LENGTHS, min_size=1, max_size=4), ACTIONS, st.integers(3, 300))
def test_any_history(
    tiny_model: Model, lengths: list[tuple[int, ...]], actions: list[Any], token: int
) -> None:
    """Any states, also older ones and one several times, may go on in any company; the logits are
    the ordinary ones, and no state ever changes."""
    decoder = StaticDecoder(LLAVA, "eager")
    plain = [make_state(seed, wanted) for seed, wanted in enumerate(lengths)]
    pairs = [(state, state) for state in plain]
    for chosen, seen, forget in actions:
        asked = [pairs[index % len(pairs)] for index in chosen]
        ours = [replace(state, pending_ids=(token + n,)) for n, (state, _) in enumerate(asked)]
        theirs = [replace(state, pending_ids=(token + n,)) for n, (_, state) in enumerate(asked)]
        logits, grown = decoder.advance(ours)
        expected, wanted = tiny_model.advance(theirs)
        torch.testing.assert_close(logits, expected, **CLOSE)
        pairs = (pairs if not forget else []) + list(zip(grown, wanted, strict=True))
        assert_same(*pairs[seen % len(pairs)])
    for state, wanted_state in pairs:
        assert_same(state, wanted_state)


def test_positions_grow_and_slots_stay() -> None:
    """Hundreds of tokens are written where the cache lies, and the buffers grow with them."""
    decoder, state = StaticDecoder(LLAVA, "eager"), make_state(1, (250, 250, 240))
    expected, model = state, Model.__new__(Model)
    model.llava = LLAVA
    for token in range(3, 290):
        logits, [state] = decoder.advance([replace(state, pending_ids=(token,))])
        wanted, [expected] = model.advance([replace(expected, pending_ids=(token,))])
        assert isinstance(state.past_key_values, SlotCache)
        assert state.past_key_values.copied is None
        torch.testing.assert_close(logits, wanted, **CLOSE)
    assert list(decoder.steps) == [(1, 3 * BUCKET)]  # what was recorded for smaller ones is gone
    assert len(decoder.handed) == 1
    assert_same(state, expected)


def test_what_rests_at_the_end_of_its_slot_stays_whole() -> None:
    """A slot that is full and rests while others run needs room for what it computes."""
    decoder = StaticDecoder(LLAVA, "eager")
    others = [make_state(seed, (5,) * LAYERS) for seed in range(2)]
    full = make_state(2, (BUCKET - 1,) * LAYERS)
    _, [resting, *others] = decoder.advance([full, *others])
    assert decoder.keys[0].shape[2] == BUCKET
    for _ in range(3):
        _, others = decoder.advance([replace(state, pending_ids=(9,)) for state in others])
    assert isinstance(resting.past_key_values, SlotCache)
    assert resting.past_key_values.copied is None
    with torch.inference_mode():
        caches = LLAVA.decode(torch.tensor([7]), full.next_position, full.past_key_values)[1]
    assert_same(resting, State(caches, full.next_position + 1))


def test_nothing_of_the_last_item_stays() -> None:
    """A cache that overflowed is followed, in its slot, by a shorter one."""
    decoder, state = StaticDecoder(LLAVA, "eager"), make_state(1, (9, 9, 5))
    broken = make_state(0, (40,) * LAYERS)
    for k, v in broken.past_key_values or ():
        k[:], v[:] = float("nan"), float("inf")
    logits, _ = decoder.advance([broken])
    assert logits.isnan().all()
    logits, _ = decoder.advance([state])
    with torch.inference_mode():
        expected, _ = LLAVA.decode(torch.tensor([7]), state.next_position, state.past_key_values)
    torch.testing.assert_close(logits, expected[0], **CLOSE)


@pytest.mark.parametrize("call", [1, LAYERS, LAYERS + 1, 2 * LAYERS])
@pytest.mark.parametrize(("count", "length"), [(8, 5), (1, 3 * BUCKET)])
def test_memory_that_runs_out_halfway_breaks_nothing(
    monkeypatch: pytest.MonkeyPatch, call: int, count: int, length: int
) -> None:
    """The call that wanted more slots or positions fails, at any layer; smaller ones go on, and
    what rested there is what it was."""
    decoder = StaticDecoder(LLAVA, "eager")
    resting = make_state(0, [5] * LAYERS)
    _, [ours] = decoder.advance([resting])
    _, [expected] = Model.advance(Model(LLAVA, None), [resting])  # type: ignore[arg-type]
    calls = 0

    def lacking(buffer: Tensor, num_slots: int, capacity: int) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == call:
            raise torch.OutOfMemoryError("out of memory")
        return resize_buffer(buffer, num_slots, capacity)

    monkeypatch.setattr(module, "resize_buffer", lacking)
    large = [make_state(seed, [length] * LAYERS) for seed in range(count)]
    with pytest.raises(torch.OutOfMemoryError):
        decoder.advance(large)
    for states in ([make_state(3, [9] * LAYERS)], [make_state(4, [BUCKET] * LAYERS)] * 2, large):
        _, advanced = decoder.advance(states)
        _, wanted = Model.advance(Model(LLAVA, None), states)  # type: ignore[arg-type]
        for one, other in zip(advanced, wanted, strict=True):
            assert_same(one, other)
    assert_same(ours, expected)


def test_who_finds_no_free_slot_takes_the_one_that_rested_longest() -> None:
    decoder = StaticDecoder(LLAVA, "eager")
    states = [make_state(seed, (6,) * LAYERS) for seed in range(4)]
    _, states = decoder.advance(states)
    caches: list[Any] = [state.past_key_values for state in states]
    for index in (2, 0, 1):
        decoder.advance([replace(states[index], pending_ids=(8,))])
    decoder.advance([make_state(9, (4,) * LAYERS)])
    assert [cache.copied is not None for cache in caches] == [False, False, False, True]
    assert len(decoder.handed) == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit(dtype: torch.dtype) -> None:
    llava = random_llava(dtype=dtype)
    state = make_state(3, (30, 30, 20), dtype)
    with torch.inference_mode():
        exact, _ = LLAVA.decode(
            torch.tensor([7]), state.next_position, make_state(3, (30, 30, 20)).past_key_values
        )
        rounded, _ = llava.decode(torch.tensor([7]), state.next_position, state.past_key_values)
    logits, [after] = StaticDecoder(llava, "eager").advance([state])
    assert logits.dtype == dtype and after.past_key_values[0][0].dtype == dtype
    error, usual = ((x.float() - exact[0]).norm() for x in (logits, rounded[0]))
    assert error <= 1.5 * usual


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_quantized_weights(tiny_tokenizer: Tokenizer, method: str) -> None:
    text = replace(TINY_TEXT, hidden_size=128, intermediate_size=128)
    model = Model(random_llava(replace(TINY_CONFIG, text=text)), tiny_tokenizer)
    quantize(model.llava, method)
    state = model.advance([State(pending_ids=(3, 4, 5, 6))])[1][0]
    state = replace(state, pending_ids=(7,))
    logits, _ = CompiledModel(model, "eager").advance([state])
    torch.testing.assert_close(logits, model.advance([state])[0], **CLOSE)


# ---- through the public API --------------------------------------------------------------------

REDUCTIONS = [
    None,
    Reduction(fastv=FastV(drop=0.5, layer=1)),
    Reduction(ToMe(keep=5), "plain"),
    Reduction(ToMe(keep=5), "logical", FastV(keep=2, layer=2)),
    Reduction(ToMe(keep=5), "vtu", FastV(keep=3, layer=1)),
    Reduction(ToMe(keep=5), "folded"),
    Reduction(None, "folded", FastV(stages=((1, 6), (2, 3)), rest="fold")),
]
PROMPTS = ["star?", "What color is the star?", "x", "", "blue white square", "ring " * 30, "A"]


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=str)
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_answers(
    models: tuple[Model, CompiledModel],
    pictures: list[Image.Image],
    reduction: Reduction | None,
    batch_size: int,
) -> None:
    """Items join and leave at different times."""
    model, compiled = models
    images = [*pictures, None, pictures[:2], None]
    options: dict[str, Any] = dict(max_new_tokens=24, reduction=reduction, batch_size=batch_size)
    expected = model.generate(images, PROMPTS, **options)
    answers = compiled.generate(images, PROMPTS, **options)
    assert answers == expected
    assert [one.usage for one in answers] == [one.usage for one in expected]
    assert len({one.usage["completion_tokens"] for one in answers}) > 1
    assert len(compiled.static.handed) == min(8, 1 << (batch_size - 1).bit_length())
    assert not any(compiled.static.handed)  # nothing is kept for answers that are done


def test_sampling_and_stop_strings(
    models: tuple[Model, CompiledModel], pictures: list[Image.Image]
) -> None:
    expected, answers = (
        model.generate(pictures, PROMPTS[:4], temperature=0.8, top_p=0.9, seed=3, max_new_tokens=30)
        for model in models
    )
    assert answers == expected
    stop = str(expected[1])[3:5]
    cut, stopped = (
        model.generate(pictures, PROMPTS[:4], temperature=0.8, top_p=0.9, seed=3, stop=stop)
        for model in models
    )
    assert stopped == cut and stopped != answers


def test_scores_and_single_calls(
    models: tuple[Model, CompiledModel], pictures: list[Image.Image]
) -> None:
    """What does not decode is as it was, to the bit."""
    model, compiled = models
    assert compiled.score(pictures[0], "star?", "red star") == model.score(
        pictures[0], "star?", "red star"
    )
    assert not compiled.static.steps


def test_chats_and_streams_in_turns(
    models: tuple[Model, CompiledModel], pictures: list[Image.Image]
) -> None:
    """Several conversations, a stream and single calls share the slots of one model."""
    model, compiled = models
    plain, ours = ([m.chat(image, max_new_tokens=9) for image in pictures] for m in models)
    stream = compiled.stream(pictures[0], "What color is the star?", max_new_tokens=30)
    pieces = [next(stream)]
    for turn in ("star?", "and what color is the ring", "why"):
        for chat, expected in zip(ours, plain, strict=True):
            assert chat.send(turn) == expected.send(turn)
            pieces.append(next(stream, ""))
        assert compiled.generate(None, turn) == model.generate(None, turn)
    expected_answer = model.generate(pictures[0], "What color is the star?", max_new_tokens=30)
    assert "".join([*pieces, *stream]) == expected_answer
    assert len(compiled.static.handed) == 1


def test_a_closed_stream_leaves_a_chat_that_goes_on(
    models: tuple[Model, CompiledModel], pictures: list[Image.Image]
) -> None:
    """Twice from the same point, by a copy of the chat."""
    after = []
    for model in models:
        chat = model.chat(pictures[1], max_new_tokens=30)
        stream = chat.stream("What color is the star?")
        _ = [next(stream) for _ in range(4)]
        stream.close()
        twin = model.chat(pictures[1], max_new_tokens=30)
        twin.log = chat.log
        assert chat.log.state.next_position > 0
        after.append([chat.send("x"), twin.send("blue"), chat.send("y"), twin.send("y")])
        assert chat.history[0] == twin.history[0]
    assert after[0] == after[1]


def test_threads_share_the_slots(
    models: tuple[Model, CompiledModel], pictures: list[Image.Image]
) -> None:
    model, compiled = models
    expected = [model.generate(image, "star?", max_new_tokens=12) for image in pictures]
    with ThreadPoolExecutor(len(pictures)) as threads:
        ask = partial(compiled.generate, prompt="star?", max_new_tokens=12)
        assert list(threads.map(ask, pictures)) == expected


@pytest.mark.parametrize("at", [1, 2, 6])
def test_an_interrupt_in_a_step_leaves_the_chat_as_it_was(
    models: tuple[Model, CompiledModel], monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """After the step has written to the slot, before anybody has its token."""
    after = []
    for model in models:
        chat = model.chat(max_new_tokens=9)
        chat.send("star?")
        forward, calls = model.llava.forward, []

        def interrupted(*args: Any, forward: Any = forward, calls: Any = calls, **kw: Any) -> Any:
            out = forward(*args, **kw)
            calls.append(out)
            if len(calls) > at:
                raise KeyboardInterrupt
            return out

        with monkeypatch.context() as patch:
            patch.setattr(model.llava, "forward", interrupted)
            with pytest.raises(KeyboardInterrupt):
                chat.send("What color is the star?")
        after.append([*chat.history, chat.send("x"), chat.send("circle?")])
    assert after[0] == after[1]


@pytest.mark.parametrize("seed", [0, 1])
def test_a_cache_is_a_tuple_of_pairs(models: tuple[Model, CompiledModel], seed: int) -> None:
    """Copied, pickled, sliced, and handed to the ordinary step."""
    model, compiled = models
    state = compiled.advance([replace(make_state(seed, (6, 6, 4)), pending_ids=(5,))])[1][0]
    cache = state.past_key_values
    assert isinstance(cache, SlotCache)
    for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), cache[:], tuple(cache)):
        assert type(twin) is tuple
        assert_same(replace(state, past_key_values=twin), state)
    logits, grown = model.decode(torch.tensor([9]), state.next_position, cache)
    expected, [after] = compiled.advance([replace(state, pending_ids=(9,))])
    torch.testing.assert_close(logits[0], expected, **CLOSE)
    assert_same(replace(after, past_key_values=grown), after)


def test_embedded_model(pictures: list[Image.Image]) -> None:
    model = llava_lite.load(llava_lite.embedded_model(), device="cpu")
    compiled = CompiledModel(model, "eager")
    image = llava_lite.embedded_model() / "examples" / "scene.png"
    prompts = ["What shape is the red object?", "Describe the image.", "How many objects?"]
    for reduction in (None, "hybrid-72-36"):
        expected = model.generate([image] * 3, prompts, reduction=reduction)
        assert compiled.generate([image] * 3, prompts, reduction=reduction) == expected
    assert compiled.generate(image, prompts[0]) == "ring"
    assert compiled.generate(image, prompts[1], max_new_tokens=5).finish_reason == "length"


# ---- weights that change -----------------------------------------------------------------------


def same_answers(*models: Model) -> bool:
    answer, other = (model.generate(None, "star?", max_new_tokens=9) for model in models)
    return answer == other


def test_new_weights_are_used(tiny_tokenizer: Tokenizer) -> None:
    """Written to, replaced, or of another dtype: what was recorded with others is forgotten."""
    model = Model(random_llava(), tiny_tokenizer)
    compiled = CompiledModel(model, "eager")
    kept = compiled.advance([make_state(0, (6, 6, 4))])[1][0]
    step = next(iter(compiled.static.steps.values()))
    model.llava.load_state_dict(random_llava(seed=1).state_dict())
    assert same_answers(model, compiled)
    assert next(iter(compiled.static.steps.values())) is step
    model.llava.load_state_dict(random_llava(seed=2).state_dict(), assign=True)
    model.llava.requires_grad_(False)
    assert same_answers(model, compiled)
    assert step not in compiled.static.steps.values()
    model.llava.double()
    assert same_answers(model, compiled)
    assert compiled.static.keys[0].dtype == torch.float64
    assert_same(kept, CompiledModel(Model(LLAVA, tiny_tokenizer), "eager").advance(
        [make_state(0, (6, 6, 4))]
    )[1][0])  # fmt: skip


# ---- waiting for the device, and recording ------------------------------------------------------


def move(state: State, device: torch.device) -> State:
    cache = []
    for pair in state.past_key_values or ():
        log_sizes = getattr(pair, "log_sizes", None)
        log_sizes = None if log_sizes is None else log_sizes.to(device)
        cache.append(LayerCache(pair[0].to(device), pair[1].to(device), None, log_sizes))
    return replace(state, past_key_values=tuple(cache))


def waits(llava: Llava, watch: Watch) -> tuple[int, int]:
    """How often a step that items join waits, and the one after it."""
    decoder = StaticDecoder(llava, "graph" if llava.device.type == "cuda" else "eager")
    states = [move(make_state(seed, (9, 9, 6 - seed)), llava.device) for seed in range(3)]
    # Inference mode would hide some.
    advance = partial(StaticDecoder.advance.__wrapped__, decoder)  # type: ignore[attr-defined]
    with torch.no_grad():
        for _ in range(2):  # libraries may wait when they first start
            advance(states)
        with watch() as joining:
            _, running = advance(states)
        running = [replace(state, pending_ids=(8,)) for state in reversed(running)]
        with watch() as going_on:
            advance(running)
    return len(joining), len(going_on)


def test_steps_never_wait_for_the_device() -> None:
    """All that the host waits for is the token that is sampled from the logits."""
    assert waits(LLAVA, dispatched_waits) == (0, 0)
    nowhere = random_llava().to("meta")  # a device without values to look at
    assert waits(nowhere, lambda: nullcontext([])) == (0, 0)


class Tape(TorchDispatchMode):
    """Records operators as a CUDA graph does: to run again on the same memory, in the same order,
    whatever Python would have done."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def tape_recorder(recorded: list[Tape]) -> Callable[..., Callable[[], Tensor]]:
    def record(run: Callable[[], Tensor], device: torch.device, pool: Any) -> Callable[[], Tensor]:
        for _ in range(2):  # a step may run several times before it counts
            run()
        with Tape() as tape:
            logits = run()
        recorded.append(tape)

        def replay() -> Tensor:
            tape.replay()
            return logits

        return replay

    return record


def test_a_step_can_be_recorded_and_replayed(
    tiny_model: Model, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With operators replayed instead of Python run, answers are the same: no value of one step is
    fixed in the next, nothing is read from memory that has moved."""
    recorded: list[Tape] = []
    monkeypatch.setattr(module, "record", tape_recorder(recorded))
    monkeypatch.setattr("torch.cuda.graph_pool_handle", lambda: (0, 1))
    compiled = CompiledModel(tiny_model, "eager")
    compiled.static.way = "graph"
    options: dict[str, Any] = dict(max_new_tokens=24, batch_size=3)
    for reduction in (None, REDUCTIONS[1], REDUCTIONS[-1]):
        expected = tiny_model.generate(
            [*pictures, None], PROMPTS[:5], reduction=reduction, **options
        )
        answers = compiled.generate([*pictures, None], PROMPTS[:5], reduction=reduction, **options)
        assert answers == expected
    assert 1 <= len(recorded) <= 3  # one for each number of slots
    long = "ring " * 38  # runs into a second bucket
    assert compiled.generate(None, long) == tiny_model.generate(None, long)
    assert compiled.static.keys[0].shape[2] == 2 * BUCKET


def test_steps_are_recorded_once_and_not_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_STEPS", 2)
    decoder = StaticDecoder(LLAVA, "eager")
    states = [make_state(seed, (5,) * LAYERS) for seed in range(4)]
    first = [decoder.advance(states[:n])[0] for n in (4, 2, 1, 2)]
    assert list(decoder.steps) == [(2, BUCKET), (1, BUCKET)]
    again = decoder.advance(states)[0]
    assert list(decoder.steps) == [(1, BUCKET), (4, BUCKET)]
    torch.testing.assert_close(again, first[0], **CLOSE)


# ---- torch.compile -----------------------------------------------------------------------------

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile on the CPU needs g++"
)


@needs_compiler
@pytest.mark.slow
def test_torch_compile(tiny_tokenizer: Tokenizer) -> None:
    """One layer, for compiling takes its time; with a kernel chosen for one row, in bfloat16."""
    config = replace(TINY_CONFIG, text=replace(TINY_TEXT, num_layers=1))
    model = Model(random_llava(config), tiny_tokenizer)
    layer = model.llava.decoder.layers[0]
    layer.mlp.down_proj = ChosenLinear(layer.mlp.down_proj, Choice(("mv", *["linear"] * 3)))
    torch._dynamo.reset()
    compiled = CompiledModel(model)
    assert compiled.static.way == "compile"
    for prompt in ("star?", "What color is the star?"):
        answer, other = (one.generate(None, prompt, max_new_tokens=9) for one in (compiled, model))
        assert answer == other
    state = replace(model.advance([State(pending_ids=(3, 4, 5))])[1][0], pending_ids=(9,))
    compiled_logits, expected = compiled.advance([state])[0], model.advance([state])[0]
    torch.testing.assert_close(compiled_logits, expected, **CLOSE)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tiny_model: Model) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    for make in (
        lambda: CompiledModel(tiny_model),
        lambda: llava_lite.load(llava_lite.embedded_model(), device="cpu", compile=True),
        lambda: bench.check(bench.Settings(size="tiny", compile=True)),
    ):
        with pytest.raises(CompileError, match=r"needs a C\+\+ compiler, but no-such-compiler"):
            make()


def test_a_step_that_torch_cannot_compile(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Model
) -> None:
    def refuse(*_: Any) -> Tensor:
        raise torch._dynamo.exc.Unsupported("too strange\nmore", case_name="x")

    compiled = CompiledModel(tiny_model, "eager")
    compiled.static.way, compiled.static.step_function = "compile", refuse
    with pytest.raises(CompileError, match="cannot compile the decode step here: too strange$"):
        compiled.generate(None, "star?")


def test_ways_that_are_not_possible(tiny_model: Model) -> None:
    with pytest.raises(CompileError, match="CUDA graphs need a CUDA device, the model is on cpu"):
        CompiledModel(tiny_model, "graph")
    with pytest.raises(ValueError, match="way 'fast' is not one of graph, compile, eager"):
        CompiledModel(tiny_model, "fast")


@needs_compiler
def test_load_and_bench_make_compiled_models() -> None:
    """Nothing is compiled before a token is decoded."""
    folder = llava_lite.embedded_model()
    loaded = llava_lite.load(folder, device="cpu", compile=True, exif=False)
    made = bench_models.open_model(bench.Settings(size="tiny", layers=1, compile=True))
    for model in (loaded, made, bench_models.twin(loaded), bench_models.twin(made)):
        assert isinstance(model, CompiledModel) and model.static.way == "compile"
    assert (loaded.exif, loaded.config.name) == (False, llava_lite.load(folder).config.name)
    assert type(bench_models.open_model(bench.Settings(size="tiny", layers=1))) is Model
    named = bench_models.open_model(bench.Settings(str(folder), compile=True))
    assert isinstance(named, CompiledModel)


# ---- CUDA --------------------------------------------------------------------------------------

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_graphs(
    tiny_tokenizer: Tokenizer, pictures: list[Image.Image], dtype: torch.dtype
) -> None:
    """Replayed steps give what the same step gives from Python."""
    model = Model(random_llava(dtype=dtype).to("cuda"), tiny_tokenizer)
    graphs, eager = CompiledModel(model), CompiledModel(model, "eager")
    assert graphs.static.way == "graph"
    options: dict[str, Any] = dict(max_new_tokens=24, batch_size=3)
    for reduction in REDUCTIONS:
        asked = dict(options, reduction=reduction)
        expected = eager.generate([*pictures, None], PROMPTS[:5], **asked)
        assert graphs.generate([*pictures, None], PROMPTS[:5], **asked) == expected
    assert graphs.generate(None, "ring " * 38) == eager.generate(None, "ring " * 38)
    if dtype == torch.float32:
        assert graphs.generate(pictures, PROMPTS[:4]) == model.generate(pictures, PROMPTS[:4])


@pytest.mark.gpu
@needs_cuda
def test_cuda_graphs_never_wait() -> None:
    assert waits(random_llava().to("cuda"), cuda_waits) == (0, 0)


def test_a_step_leaves_the_same_when_run_twice() -> None:
    """As before recording, where it runs several times."""
    keys, values = (
        [torch.randn(2, 4, 16, TINY_TEXT.head_dim) for _ in range(LAYERS)] for _ in "kv"
    )
    log_sizes = torch.rand(LAYERS, 2, 16)
    table = torch.tensor([[5, 6], [9, 3], *[[9, 3]] * LAYERS])
    with torch.no_grad():
        first = decode_step(LLAVA, table, keys, values, log_sizes)
        stored = [buffer.clone() for buffer in keys + values]
        assert torch.equal(decode_step(LLAVA, table, keys, values, log_sizes), first)
    assert all(map(torch.equal, stored, keys + values))
