"""Fixtures of all tests, and what tests must not depend on."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from llava_lite.checkpoints.checkpoint import save_model
from llava_lite.fast import timings
from llava_lite.generation.model import Model
from llava_lite.inputs.tokenizer import Tokenizer, train_tokenizer

pytest.register_assert_rewrite("helpers")  # failures there show values, as in tests
from helpers.examples import PROFILE, examples  # noqa: E402
from helpers.models import CORPUS, SHARED, TINY_TEXT, random_llava  # noqa: E402

# How long an example takes says nothing: a busy machine fails no test.
settings.register_profile(PROFILE, examples(100), deadline=None)
settings.load_profile(PROFILE)

# Tests must not depend on what their user prefers; processes they start inherit this.
for name in ("LLAVA_LITE_MODEL", "FASTV_K"):
    os.environ.pop(name, None)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's job in the background ignores Ctrl-C, and so would the processes that tests stop.
    signal.signal(signal.SIGINT, signal.default_int_handler)

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1 and "OMP_NUM_THREADS" not in os.environ:
    # Processes that each use every core would mostly wait for each other.
    THREADS = max(1, (os.cpu_count() or 1) // WORKERS)
    os.environ["OMP_NUM_THREADS"] = str(THREADS)  # of the processes that tests start
    torch.set_num_threads(THREADS)


@pytest.fixture(scope="session", autouse=True)
def own_timings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Times of kernels that tests measure stay out of the user's cache."""
    folder = tmp_path_factory.mktemp("timings")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timings, "cache_folder", lambda: folder)
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of goldens and specs; tests that need it skip without it."""
    if not SHARED.is_dir():
        pytest.skip(f"no goldens at {SHARED} (set LLAVA_LITE_SHARED)")
    return SHARED


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Tokenizer:
    tokenizer = train_tokenizer(CORPUS, TINY_TEXT.sampled_vocab_size)
    assert tokenizer.vocab_size == TINY_TEXT.sampled_vocab_size
    return tokenizer


@pytest.fixture(scope="session")
def tiny_model(tiny_tokenizer: Tokenizer) -> Model:
    """A random model in float32 with a tokenizer of its own: 56 px images of 16 patches."""
    return Model(random_llava(), tiny_tokenizer)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Model) -> Path:
    """`tiny_model` as a folder, to read only."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    save_model(tiny_model.llava, tiny_model.config, folder, tiny_model.tokenizer)
    return folder
