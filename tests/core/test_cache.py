"""The KV cache grows in place, and nobody can tell."""

import copy
import pickle
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

from helpers.examples import examples
from helpers.tensors import log_sizes_of
from llava_lite.cache import FEWEST_SPARE, LayerCache, add_sizes, append

H, D = 2, 3
Step = tuple[int, int, bool]  # which pair goes on, by how many keys, and whether these have sizes


def draw(length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, 1, H, length, D, generator=generator)
    return k, v


def joined(*pairs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.cat([k for k, _ in pairs], 2), torch.cat([v for _, v in pairs], 2)


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return len(a) == len(b) == 2 and torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.fixture
def eager_threads() -> Iterator[None]:
    """Threads take turns all the time."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


def sizes(length: int, sized: bool, seed: int = 0) -> Tensor | None:
    """Log sizes of keys, or of none."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(1, 600, (length,), generator=generator)
    return drawn.float().log() if sized else None


@examples(60)
@given(
    st.booleans(),
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(1, 90), st.booleans()), min_size=1, max_size=12
    ),
)
def test_every_branch_is_what_concatenation_gives(sized: bool, steps: list[Step]) -> None:
    """Any pair handed out so far may be continued, again and again; none of them ever changes."""
    first, logs = draw(4), sizes(4, sized)
    pairs = [(append(None, *first, logs), first, (logs if sized else torch.zeros(4)).tolist())]
    for seed, (parent, length, with_sizes) in enumerate(steps, start=1):
        past, expected, known = pairs[parent % len(pairs)]
        new, logs = draw(length, seed), sizes(length, with_sizes, seed)
        grown = append(past, *new, logs)
        all_logs = known + (torch.zeros(length) if logs is None else logs).tolist()
        pairs.append((grown, joined(expected, new), all_logs))
        for pair, wanted, all_logs in pairs:
            assert same(pair, wanted) and log_sizes_of(pair) == all_logs


def test_without_sizes_there_are_none() -> None:
    """Then attention needs no mask."""
    pair = append(append(append(None, *draw(5)), *draw(1, 1)), *draw(2, 2))
    assert pair.log_sizes is None


def test_tokens_are_written_behind_the_others() -> None:
    cache = append(append(None, *draw(10)), *draw(1, 1))
    places = {cache[0].data_ptr()}
    for seed in range(FEWEST_SPARE):
        cache = append(cache, *draw(1, seed))
        places.add(cache[0].data_ptr())
    assert len(places) == 1  # no copy
    longer = append(cache, *draw(1, 1))  # that was all of the space
    assert longer[0].data_ptr() not in places and same(longer, joined(cache, draw(1, 1)))


def test_copies_are_rare_in_long_caches() -> None:
    cache, copies = append(None, *draw(1000)), 0
    for seed in range(1000):
        longer = append(cache, *draw(1, seed % 7))
        copies += longer[0].data_ptr() != cache[0].data_ptr()
        cache = longer
    assert cache[0].shape[2] == 2000
    assert copies <= 4


def test_threads_that_continue_the_same_pair_do_not_meet(eager_threads: None) -> None:
    news = [torch.full((1, 32, 1, 128), float(number)) for number in range(3)]
    first = torch.zeros(1, 32, 50, 128)
    start = Barrier(len(news))

    def longer(base: LayerCache, new: Tensor) -> bool:
        start.wait()
        pair = append(base, new, new)
        return all(torch.equal(x[:, :, -1:], new) for x in pair)

    right = []
    with ThreadPoolExecutor(len(news)) as threads:
        for _ in range(100):
            base = append(append(None, first, first), news[0], news[0])
            right += threads.map(partial(longer, base), news)
    assert right.count(True) == 300


def test_the_space_is_taken_before_it_is_written() -> None:
    """Whoever continues the same pair while somebody writes goes elsewhere."""
    base = append(append(None, *draw(10)), *draw(1, 1))
    between: list[LayerCache] = []

    class Interrupting(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is Tensor.__setitem__ and not between:
                between.append(append(base, *draw(1, 2)))
            return func(*args, **(kwargs or {}))

    with Interrupting():
        longer = append(base, *draw(1, 3))
    assert same(longer, joined(base, draw(1, 3)))
    assert same(between[0], joined(base, draw(1, 2)))


def test_it_is_a_plain_tuple() -> None:
    cache = append(append(None, *draw(5), sizes(5, True)), *draw(1, 1))
    k, v = cache
    assert isinstance(cache, tuple) and cache[0] is k and cache[1] is v
    for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert same(twin, cache) and log_sizes_of(twin) == log_sizes_of(cache)
        longer = append(twin, *draw(1, 2))
        assert same(longer, append(cache, *draw(1, 2)))
        assert log_sizes_of(longer) == [*log_sizes_of(cache), 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sizes_keep_their_digits_in_16_bits(dtype: torch.dtype) -> None:
    """The log of 3 is not a number of 16 bits."""
    logs = torch.tensor([1.0, 3, 577]).log()
    for mask in (None, torch.ones(2, 3, dtype=torch.bool)):
        bias = add_sizes(mask, logs, torch.zeros(1, 1, 2, 4, dtype=dtype))
        assert bias.dtype == torch.float32 and (bias == logs).all()


def test_sizes_stay_in_another_dtype() -> None:
    pair = LayerCache(*draw(3), None, torch.tensor([0.5, 1.5]))
    wide = LayerCache.wrap(pair, draw(1)[0].double())
    assert {part.dtype for part in wide} == {torch.float64}
    assert log_sizes_of(wide) == [0.5, 1.5, 0.0]


def test_any_pair_can_be_continued() -> None:
    assert same(append(draw(5), *draw(2, 1)), joined(draw(5), draw(2, 1)))


@pytest.mark.parametrize("past", [None, draw(5), append(None, *draw(5))])
def test_attention_continues_any_pair(past: tuple[Tensor, Tensor] | None) -> None:
    """A plain tuple, a pair of ours, or nothing: the new queries see the past and themselves."""
    (k, v), (q, _) = draw(3, 1), draw(3, 2)
    pair = (k, v) if past is None else joined(past, (k, v))
    mixed, grown = LayerCache.wrap(past, k).attend(q, k, v, None, None)
    assert same(grown, pair)
    ahead = torch.ones(3, pair[0].shape[2], dtype=torch.bool).triu(pair[0].shape[2] - 2)
    scores = (q @ pair[0].mT / D**0.5).masked_fill(ahead, -torch.inf)
    assert torch.allclose(mixed, scores.softmax(-1) @ pair[1], atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 4e-3)],
)
@pytest.mark.parametrize("kind", ["causal", "bool", "added"])
@pytest.mark.parametrize(("before", "new"), [(0, 1), (0, 20), (5, 3), (40, 1), (40, 30)])
def test_a_key_of_size_s_counts_as_s_equal_keys(
    dtype: torch.dtype, tolerance: float, kind: str, before: int, new: int
) -> None:
    """Whatever else hides or weighs keys; in 16 bit the logs of sizes keep their digits. (Kernels
    take other paths from 16 keys on.)"""
    past, (k, v), (q, _) = (
        tuple(x.to(dtype) for x in draw(length, seed))
        for seed, length in ((1, before), (2, new), (3, new))
    )
    old, fresh = sizes(before, True, 4), sizes(new, True, 5)
    mask, total = None, before + new
    if kind != "causal":
        mask = torch.randn(new, total, generator=torch.Generator().manual_seed(6)).to(dtype)
        mask[:, 0] = 1
    cache = LayerCache(*past, None, old)
    shown = mask > 0 if kind == "bool" and mask is not None else mask
    mixed, grown = cache.attend(q, k, v, fresh, shown)
    assert mixed.dtype == dtype
    counts = torch.cat([x.exp().round().long() for x in (old, fresh) if x is not None])
    assert log_sizes_of(grown) == counts.float().log().tolist()
    keys, values = (x.double().repeat_interleave(counts, 2) for x in joined(past, (k, v)))
    scores = q.double() @ keys.mT / D**0.5
    if kind == "added" and mask is not None:
        scores = scores + mask.double().repeat_interleave(counts, 1)
    else:
        seen = torch.ones(new, total, dtype=torch.bool).tril(before) if mask is None else mask > 0
        scores = scores.masked_fill(~seen.repeat_interleave(counts, 1), -torch.inf)
    expected = scores.softmax(-1) @ values
    assert torch.allclose(mixed.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("inside", [True, False])
def test_across_inference_mode(inside: bool) -> None:
    """What was cached in inference mode goes on outside of it, and the other way round."""
    with torch.inference_mode(inside):
        cache = append(append(None, *draw(5)), *draw(1, 1))
    with torch.inference_mode(not inside), torch.no_grad():
        longer = append(cache, *draw(1, 2))
    assert same(longer, joined(draw(5), draw(1, 1), draw(1, 2)))


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("turn", [0, 1])
def test_gradients_pass(which: int, turn: int) -> None:
    """To keys and to values alone, of the first and of a later part; read after each step, as
    attention does."""
    parts = [draw(3), draw(1, 1), draw(1, 2)]
    wanted = parts[turn][which].requires_grad_()
    cache, total = None, torch.zeros(())
    for k, v in parts:
        cache = append(cache, k, v)
        total = total + (cache[0].square().sum() + cache[1].square().sum())
    total.backward()
    seen = len(parts) - turn  # by so many steps
    assert wanted.grad is not None and torch.allclose(wanted.grad, 2 * seen * wanted)
