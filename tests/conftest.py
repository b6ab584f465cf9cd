"""What several test files share: where the goldens are, and a tiny random model."""

import importlib.util
import os
import signal
import sys
from pathlib import Path
from types import ModuleType

import hypothesis
import pytest
import torch

from llava_lite.checkpoint import save_model
from llava_lite.config import LlavaConfig, TextConfig, VisionConfig
from llava_lite.generation import Model
from llava_lite.llava import Llava
from llava_lite.tokenizer import Tokenizer, train_tokenizer

pytest.register_assert_rewrite("eval_command")  # its failures show values, as those of tests do

# How long an example takes says nothing: a busy machine fails no test.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")

ROOT = Path(__file__).resolve().parents[1]
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

SHARED = Path(os.environ.get("LLAVA_LITE_SHARED", ROOT.parent / "shared"))

TINY_VISION = VisionConfig(
    image_size=56, hidden_size=48, intermediate_size=96, num_layers=3, num_heads=4
)
TINY_TEXT = TextConfig(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=96,
    num_layers=3,
    num_heads=4,
    max_positions=512,
    sampled_vocab_size=310,
)
TINY_CONFIG = LlavaConfig(vision=TINY_VISION, text=TINY_TEXT, name="random")
CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: ASSISTANT:",
    "What color is the star? red orange yellow green blue purple white black circle square ring",
] * 2


def random_llava(
    config: LlavaConfig = TINY_CONFIG, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Llava:
    """A model of random weights, the same in every dtype, scaled so that its answers vary."""
    generator = torch.Generator().manual_seed(seed)
    llava = Llava(config).to(torch.float64)
    with torch.no_grad():
        for name, tensor in llava.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if "norm" in name and name.endswith("weight"):
                tensor.copy_(1 + 0.1 * noise)
            elif tensor.ndim > 1 and "embed" not in name:
                tensor.copy_(noise * 1.5 / tensor[0].numel() ** 0.5)
            else:
                tensor.copy_(noise * (1.0 if "embed" in name else 0.1))
        llava.vision.patch_embed.weight *= 0.1
    return llava.to(dtype).eval()


def load_tool(name: str) -> ModuleType:
    """A developer's tool, loaded by its path: tools are no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


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
