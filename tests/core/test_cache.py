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
from llava_lite.cache import FEWEST_SPARE, LayerCache, append

H, D = 2, 3


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


@examples(60)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 90)), min_size=1, max_size=12))
def test_every_branch_is_what_concatenation_gives(steps: list[tuple[int, int]]) -> None:
    """Any pair handed out so far may be continued, again and again; none of them ever changes."""
    first = draw(4)
    pairs: list[tuple[LayerCache, tuple[Tensor, Tensor]]] = [(append(None, *first), first)]
    for seed, (parent, length) in enumerate(steps, start=1):
        past, expected = pairs[parent % len(pairs)]
        new = draw(length, seed)
        pairs.append((append(past, *new), joined(expected, new)))
        assert all(same(pair, wanted) for pair, wanted in pairs)


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
    cache = append(append(None, *draw(5)), *draw(1, 1))
    k, v = cache
    assert isinstance(cache, tuple) and cache[0] is k and cache[1] is v
    for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert same(twin, cache)
        assert same(append(twin, *draw(1, 2)), append(cache, *draw(1, 2)))


def test_any_pair_can_be_continued() -> None:
    assert same(append(draw(5), *draw(2, 1)), joined(draw(5), draw(2, 1)))


@pytest.mark.parametrize("past", [None, draw(5), append(None, *draw(5))])
def test_attention_continues_any_pair(past: tuple[Tensor, Tensor] | None) -> None:
    """A plain tuple, a pair of ours, or nothing: the new queries see the past and themselves."""
    (k, v), (q, _) = draw(3, 1), draw(3, 2)
    pair = (k, v) if past is None else joined(past, (k, v))
    mixed, grown = LayerCache.wrap(past, k).attend(q, k, v, None)
    assert same(grown, pair)
    ahead = torch.ones(3, pair[0].shape[2], dtype=torch.bool).triu(pair[0].shape[2] - 2)
    scores = (q @ pair[0].mT / D**0.5).masked_fill(ahead, -torch.inf)
    assert torch.allclose(mixed, scores.softmax(-1) @ pair[1], atol=1e-6)


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
