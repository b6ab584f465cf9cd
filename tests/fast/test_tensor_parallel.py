"""A decoder spread over two processes answers as one process does.

Two processes over gloo run `cases` once, and so does this one; most tests compare what they found.
"""

import io
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.multiprocessing import spawn
from torch.testing._internal.distributed.fake_pg import FakeStore

import llava_lite
from helpers.models import GQA_CONFIG, ROOT, TINY_CONFIG, random_llava
from helpers.pictures import noise
from llava_lite.checkpoints.checkpoint import save_model
from llava_lite.checkpoints.convert import convert
from llava_lite.checkpoints.opening import open_source
from llava_lite.checkpoints.share import check_divides, load_share
from llava_lite.checkpoints.source import Source
from llava_lite.cli import console
from llava_lite.cli import program as cli
from llava_lite.config import TextConfig
from llava_lite.errors import CheckpointError, ImageError
from llava_lite.fast import ranks as ranks_module
from llava_lite.fast.ranks import RankError, Ranks, attempt, join
from llava_lite.fast.tensor_parallel import ParallelDecoder, ParallelModel, decoder_plan
from llava_lite.generation.model import Model
from llava_lite.inputs.tokenizer import Tokenizer
from llava_lite.layout import Layout
from llava_lite.llama import LlamaDecoder
from llava_lite.reduction import DToMe, FastV, Reduction, ToMe

FASTV = FastV(keep=5, layer=1)
REDUCTIONS = {
    "none": Reduction(),
    "vtu": Reduction(ToMe(keep=6)),
    "logical": Reduction(ToMe(keep=6), "logical"),
    "plain": Reduction(ToMe(keep=6), "plain"),
    "dtome": Reduction(DToMe((0.4, 0.4))),
    "fastv": Reduction(fastv=FASTV),
    "hybrid": Reduction(ToMe(keep=9), "logical", FASTV),
    "hybrid-vtu": Reduction(ToMe(keep=9), "vtu", FastV(keep=4, layer=2, score="mean")),
    "folded": Reduction(ToMe(keep=9), "folded", FastV(stages=((1, 6), (2, 3)), rest="fold")),
}
WIDE = replace(
    TINY_CONFIG,
    text=TextConfig(
        vocab_size=320,
        hidden_size=512,
        intermediate_size=1536,
        num_layers=4,
        num_heads=8,
        max_positions=512,
        sampled_vocab_size=310,
    ),
)
WIDE_WEIGHTS = 4 * (4 * 512 * 512 + 3 * 512 * 1536)  # of the decoder's layers


SCENE = str(ROOT / "weights" / "tiny" / "examples" / "scene.png")
PROGRAM = ["generate", "-i", SCENE, "--reduction", "hybrid-72-36", "--quiet"]
QUESTION = "What shape is the red object?"


# ---- what one process and two do -----------------------------------------------------------------


def cases(model: Model) -> dict[str, Any]:
    """Everything the model can do, in few words."""
    found: dict[str, Any] = {}
    prompts = ["What color is the star?", "ring", "Which <image> or <image>? red, blue", "square?"]
    images = [noise(1), noise(2), [noise(3), noise(4)], None]
    ids = torch.tensor([model.tokenizer.encode_prompt("USER: <image>\nstar? ASSISTANT:")])
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(5))
    for name, reduction in REDUCTIONS.items():
        logits, cache, position = model.prefill(ids, pixels, reduction, all_logits=True)
        step, _ = model.decode(logits[0, -1].argmax(), position, cache)
        found[f"{name} logits"] = torch.cat((logits[0], step[0]))
        batch = model.generate(
            images, prompts, max_new_tokens=2, reduction=reduction, batch_size=3, trace=True
        )
        found[f"{name} tokens"] = [answer.token_ids for answer in batch]
        traces = [answer.trace for answer in batch if answer.trace is not None]
        found[f"{name} kept"] = [image.kept for trace in traces for image in trace.images]
        found[f"{name} kv_bytes"] = [trace.kv_bytes for trace in traces]
        pieces = model.stream(noise(6), "star?", max_new_tokens=3, reduction=reduction)
        found[f"{name} stream"] = list(pieces)
        chat = model.chat(noise(7), max_new_tokens=2, reduction=reduction)
        turns = [chat.send("What is it?"), chat.send("And this?", noise(8))]
        found[f"{name} chat"] = [turn.token_ids for turn in turns], chat.input_ids
        scores = model.score(images, prompts, ["red", "a blue ring", "no", "green"])
        found[f"{name} score"] = torch.tensor([score.log_likelihood for score in scores])
    sampled = model.generate(images, prompts, max_new_tokens=6, temperature=1.5, top_p=0.9, seed=3)
    found["sampled"] = [answer.token_ids for answer in sampled]
    whole = model.generate(noise(1), prompts[0], max_new_tokens=9)
    stopped = model.generate(images, prompts, max_new_tokens=9, stop=str(whole)[2:4])
    found["stopped"] = [(str(answer), answer.finish_reason) for answer in stopped]
    encoded = model.encode(noise(1), "none")
    found["kept"] = kept_tokens(model)
    found["encoded"] = model.generate(encoded, prompts[0], max_new_tokens=6).token_ids
    return found


def kept_tokens(model: Model) -> list[tuple[int, ...]]:
    """The image tokens that FastV keeps of a few pictures."""
    options: dict[str, Any] = {"reduction": REDUCTIONS["fastv"], "max_new_tokens": 1, "trace": True}
    answers = [model.generate(noise(n), "star?", **options) for n in range(4)]
    return [answer.trace.images[0].kept for answer in answers if answer.trace is not None]


# ---- what only two processes do ------------------------------------------------------------------


def work(rank: int, port: int, folder: Path) -> None:
    """One of two ranks: everything that the tests below look at, in one file."""
    torch.set_num_threads(1)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank))
    model = llava_lite.load(folder / "tiny", "cpu", "float32", tensor_parallel=True)
    assert isinstance(model, ParallelModel)
    found: dict[str, Any] = {"cases": cases(model), "weights": model.llava.state_dict()}
    rows = torch.randn(11, 64, generator=torch.Generator().manual_seed(6))
    found["rows"] = logits_of_rows(model, rows), logits_by_torch(model, rows)
    found["unseeded"] = model.generate(
        [noise(1)] * 2, ["star?", "ring"], max_new_tokens=9, temperature=2.0
    )
    found["only first has it"] = model.generate(
        noise(1) if rank == 0 else object(), "star?", max_new_tokens=6
    ).token_ids
    found["joined once"] = join() is model.ranks
    found["timeouts"] = timeouts(model.ranks)
    found["errors"] = errors(model, rank, folder)
    found["after errors"] = model.generate(noise(1), "star?", max_new_tokens=6).token_ids
    found["program"] = said_by_program([*PROGRAM, "--tensor-parallel", "--device", "cpu"], rank)
    found["own heads"] = kept_by_own_heads(model)
    found["memory"] = memory_of_loading(folder)
    if rank == 0:
        found["left alone"] = left_alone(model)
    torch.save(found, folder / f"rank{rank}.pt")
    os._exit(0)  # without a word to the other


def left_alone(model: ParallelModel) -> list[str]:
    """What is raised by each kind of exchange once the other rank has ended."""
    ranks, raised = model.ranks, []
    for call in (
        lambda: model.generate(None, "star?", max_new_tokens=3),
        lambda: model.prefill(torch.tensor([[1, 5, 6]]), None),
        lambda: ranks.from_first(lambda: 1),
        lambda: ranks.mean(torch.ones(3)),
        lambda: ranks.concatenate(torch.ones(1, 3), 6),
    ):
        try:
            call()
        except RankError as error:
            raised.append(str(error))
    return raised


def errors(model: ParallelModel, rank: int, folder: Path) -> dict[str, str]:
    """What this rank raises, by what is wrong."""
    encoded = model.encode(noise(1))
    calls: dict[str, Callable[[], Any]] = {
        "first rank's image": lambda: model.generate(
            str(folder / "none.png") if rank == 0 else noise(1), "star?"
        ),
        "prompts": lambda: model.generate(None, "star? red blue" if rank else "star?"),
        "stop strings": lambda: model.generate(None, "star?", stop="a" if rank else None),
        "counts": lambda: model.generate([None] * (1 + rank), ["star?"] * (1 + rank)),
        "continuations": lambda: model.score(None, "star?", "red ring" if rank else "red"),
        "encoded": lambda: model.encode(encoded if rank else noise(1)),
        "context": lambda: model.generate(None, "star? " * 600),
        **errors_of_one(model, rank, folder / "tiny"),
        "bad weights on one": lambda: load_parallel(folder / "nan"),
        "three heads": lambda: load_parallel(folder / "three-heads"),
        "cuda:1": lambda: load_parallel(folder / "tiny", device="cuda:1"),
        "auto": lambda: one_gpu(model.ranks),
        "one rank": lambda: model.ranks.gather(lambda: [0][rank]),
        "strange": lambda: model.ranks.from_first(raise_strange),
    }
    raised = {}
    for name, call in calls.items():
        try:
            call()
        except Exception as error:
            raised[name] = f"{type(error).__name__}: {error}"
    return raised


def said_by_program(arguments: list[str], rank: int) -> tuple[int, str, str]:
    """The program's exit status and what it writes; the first rank alone has the question."""
    said, complaint = io.StringIO(), io.StringIO()
    question = io.StringIO("" if rank else QUESTION)
    with patch.object(sys, "stdin", question), redirect_stdout(said), redirect_stderr(complaint):
        code = cli.main(arguments)
    return code, said.getvalue(), complaint.getvalue()


def one_gpu(ranks: Ranks) -> torch.device:
    """What "auto" is where the first rank alone sees a GPU."""
    with patch.object(torch.cuda, "is_available", lambda: ranks.index == 0):
        return ranks.pick_device("auto", torch.device)


def timeouts(ranks: Ranks) -> list[timedelta]:
    """How long the decoder's own sums, and objects, wait for another rank."""
    assert dist.group.WORLD is not None
    groups = [dist.group.WORLD, ranks.objects]
    return [group._get_backend(torch.device("cpu")).options._timeout for group in groups]


def errors_of_one(model: ParallelModel, rank: int, tiny: Path) -> dict[str, Callable[[], Any]]:
    """Calls of which only the second rank's is wrong."""
    long = "star? " * (600 if rank else 1)
    bad: dict[str, Any] = {"top_p": 9.0} if rank else {}
    return {
        "generate, too long": lambda: model.generate(None, long),
        "generate, options": lambda: model.generate(None, "star?", **bad),
        "stream, too long": lambda: model.stream(None, long),
        "chat, options": lambda: model.chat(None, **bad),
        "chat, too long": lambda: model.chat(None).send(long),
        "encode, reduction": lambda: model.encode(noise(1), "all" if rank else "none"),
        "score, empty": lambda: model.score(None, "star?", "" if rank else "red"),
        "score, chunks": lambda: model.score(
            None, ["star?"] * (1 + rank), ["red"] * (1 + rank), batch_size=1
        ),
        "prefill, ids": lambda: model.prefill(torch.tensor([[1, 5, 6 + rank]]), None),
        "no such dtype": lambda: load_parallel(tiny, dtype="float8" if rank else "float32"),
        "dtypes": lambda: load_parallel(tiny, dtype="bfloat16" if rank else "float32"),
        "chat or generate": lambda: (
            model.generate(None, "star?") if rank else model.chat(None).send("star?")
        ),
    }


@pytest.mark.parametrize(
    ("rest", "expected"), [("fold", [(8,), (6, TINY_CONFIG.text.hidden_size)]), ("drop", [(8,)])]
)
def test_ranks_agree_on_folded_hidden_states(rest: str, expected: list[tuple[int, ...]]) -> None:
    """A mean over ranks: on a GPU the sums of two ranks may differ in their last bit."""
    asked = []

    def mean(x: Tensor) -> Tensor:
        asked.append(tuple(x.shape))
        return x if x.ndim == 1 else torch.zeros_like(x)

    text = TINY_CONFIG.text
    decoder = ParallelDecoder(cast(Ranks, SimpleNamespace(mean=mean)), text).double()
    layout = Layout(8, torch.arange(8), 8, torch.arange(8), True, ((1, 7),))
    x = torch.randn(8, text.hidden_size, dtype=torch.float64)
    out = decoder(x, [layout], [None], [FastV(keep=4, layer=text.num_layers - 1, rest=rest)])
    assert asked == expected
    assert len(out.hidden_states) == 6
    assert out.hidden_states.any() == (rest == "drop")  # zeros stay zeros in the last layer


def load_parallel(folder: Path, **options: Any) -> Model:
    return llava_lite.load(folder, **{"device": "cpu", **options}, tensor_parallel=True)


class Strange(Exception):
    """One that cannot be made again from its message."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first + second)


def raise_strange() -> None:
    raise Strange("very", " strange")


def logits_by_torch(model: ParallelModel, rows: Tensor) -> Tensor:
    """The logits of all rows (R, C), each layer run by torch's own DTensors with the same plan."""
    with torch.device("meta"):
        decoder = LlamaDecoder(TINY_CONFIG.text).requires_grad_(False)
    parallelize_module(decoder, init_device_mesh("cpu", (2,)), decoder_plan())
    state = model.llava.decoder.state_dict()
    for name, tensor in decoder.state_dict().items():
        if isinstance(tensor, DTensor):
            state[name] = DTensor.from_local(state[name], tensor.device_mesh, tensor.placements)
    decoder.load_state_dict(state, assign=True)
    layout = Layout.text(len(rows), 0, rows.device)
    return decoder.lm_head(decoder(rows, [layout], [None]).hidden_states)


def logits_of_rows(model: Model, rows: Tensor) -> Tensor:
    """The same by the model itself."""
    layout = Layout.text(len(rows), 0, rows.device)
    return model.llava([rows], [layout], [None], all_logits=True)[0]


def kept_by_own_heads(model: ParallelModel) -> list[tuple[int, ...]]:
    """What this rank would keep, had it asked only its own heads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ParallelDecoder, "fastv_scores", LlamaDecoder.fastv_scores)
        return kept_tokens(model)


def memory_of_loading(folder: Path) -> dict[str, int]:
    """Bytes of the layers' weights that loading a larger decoder, cast to half its width, reads and
    keeps. Storages count whole: a view of a whole weight would hold all of that weight."""
    seen, read = {}, Source.read_part

    def watched(self: Source, name: str, *args: Any) -> Tensor:
        tensor = read(self, name, *args)
        seen[name] = tensor.untyped_storage().nbytes()
        return tensor

    with patch.object(Source, "read_part", watched):
        model = load_parallel(folder / "wide", dtype="bfloat16")
    kept = sum(p.untyped_storage().nbytes() for p in model.llava.decoder.layers.parameters())
    layers = [size for name, size in seen.items() if name.startswith("decoder.layers.")]
    return {"read": sum(layers), "kept": kept, "reads": len(seen)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    """The models as folders in our format."""
    place = tmp_path_factory.mktemp("models")
    save_model(random_llava(), TINY_CONFIG, place / "tiny", tiny_tokenizer)
    save_model(random_llava(WIDE), WIDE, place / "wide", tiny_tokenizer)
    save_model(random_llava(GQA_CONFIG), GQA_CONFIG, place / "fewer heads", tiny_tokenizer)
    text = replace(TINY_CONFIG.text, hidden_size=48, num_heads=3)
    three = replace(TINY_CONFIG, text=text)
    save_model(random_llava(three), three, place / "three-heads", tiny_tokenizer)
    return place


@dataclass
class Found:
    """What one process found, and what each of two did."""

    alone: dict[str, Any]
    ranks: list[dict[str, Any]]


@pytest.fixture(scope="module")
def found(folder: Path) -> Found:
    state = random_llava().state_dict()
    state["decoder.layers.1.mlp.gate_proj.weight"][-1, 0] = float("nan")  # rank 1 has this row
    write_unchecked(folder / "tiny", folder / "nan", state)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = spawn(work, (port, folder), nprocs=2, join=False)
    assert context is not None
    alone = cases(llava_lite.load(folder / "tiny", "cpu", "float32"))
    for _ in range(60):
        if context.join(timeout=2):  # raises what a process raised
            break
    else:
        for process in context.processes:
            process.kill()
        pytest.fail("the ranks wait for each other")
    return Found(alone, [torch.load(folder / f"rank{r}.pt", weights_only=False) for r in (0, 1)])


def write_unchecked(source: Path, folder: Path, state: dict[str, Tensor]) -> None:
    """A copy of the model with other weights, which nobody has checked: no manifest says so."""
    from safetensors.torch import save_file

    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    save_file(state, folder / "model.safetensors")


# ---- two ranks in one process --------------------------------------------------------------------


class Threads:
    """Stands in for `torch.distributed`: every rank is a thread of this process."""

    def __init__(self, count: int) -> None:
        self.here, self.slots = threading.local(), [None] * count
        self.barrier = threading.Barrier(count, timeout=30)

    def swap(self, value: Any) -> list[Any]:
        """The values of all ranks; of a rank that runs alone, as often this value."""
        if not hasattr(self.here, "rank"):
            return [value] * len(self.slots)
        self.slots[self.here.rank] = value
        self.barrier.wait()
        values = list(self.slots)
        self.barrier.wait()
        return values

    def get_world_size(self) -> int:
        return len(self.slots)

    def new_group(self, **_: Any) -> None:
        return None

    def all_gather(self, parts: list[Tensor], x: Tensor) -> None:
        parts[:] = self.swap(x.clone())

    def all_reduce(self, x: Tensor) -> None:
        x.copy_(sum(self.swap(x.clone())))

    def all_gather_object(self, outcomes: list[Any], own: Any, group: None) -> None:
        outcomes[:] = self.swap(own)

    def broadcast_object_list(self, sent: list[Any], src: int, group: None) -> None:
        sent[:] = self.swap(list(sent))[src]

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """What `work(rank)` returns on every rank."""

        def one(rank: int) -> Any:
            self.here.rank = rank
            return work(rank)

        with ThreadPoolExecutor(len(self.slots)) as pool:
            return list(pool.map(one, range(len(self.slots))))


@pytest.fixture(params=["tiny", "fewer heads"])
def parallel(
    request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Threads, list[ParallelModel], Model]:
    """Both shares of a model, loaded one after the other, and the whole model. Only the cut is
    torch's."""
    threads, models = Threads(2), []
    whole = llava_lite.load(folder / request.param, "cpu", "float32")
    monkeypatch.setattr(ranks_module, "dist", threads)
    for rank in (0, 1):
        threads.get_rank = lambda rank=rank: rank  # type: ignore[attr-defined]
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2)
        try:
            source = open_source(folder / request.param)
            llava = load_share(source, Ranks(), torch.device("cpu"), torch.float32)
        finally:
            dist.destroy_process_group()
        models.append(ParallelModel(llava, whole.tokenizer))
    return threads, models, whole


@pytest.mark.parametrize("name", ["none", "fastv", "hybrid", "folded"])
def test_two_threads_with_half_the_weights_answer_as_one_process(
    parallel: tuple[Threads, list[ParallelModel], Model], name: str
) -> None:
    """The arithmetic of a cut decoder, without a second process."""
    threads, models, whole = parallel
    attn, kv_width = models[0].llava.decoder.layers[0].attn, whole.config.text.kv_width
    shapes = [tuple(proj.weight.shape) for proj in (attn.q_proj, attn.k_proj, attn.v_proj)]
    assert shapes == [(32, 64), (kv_width // 2, 64), (kv_width // 2, 64)]

    def logits(model: Model) -> Tensor:
        pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(5))
        ids = torch.tensor([model.tokenizer.encode_prompt("USER: <image>\nstar? ASSISTANT:")])
        found, cache, position = model.prefill(ids, pixels, REDUCTIONS[name], all_logits=True)
        step, _ = model.decode(found[0, -1].argmax(), position, cache)
        return torch.cat((found[0], step[0]))

    def answer(model: Model) -> tuple[int, ...]:
        options = {
            "max_new_tokens": 6,
            "reduction": REDUCTIONS[name],
            "temperature": 2.0,
            "seed": 1,
        }
        return model.generate(noise(1), "star?", **options).token_ids

    alone = logits(whole)
    # The logits of a tied head are larger here: an embedding has no unit gain.
    atol = 1e-5 * (float(alone.std()) if whole.config.text.tie_embeddings else 1)
    for found in threads.run(lambda rank: logits(models[rank])):
        torch.testing.assert_close(found, alone, rtol=0, atol=atol)
    assert threads.run(lambda rank: answer(models[rank])) == [answer(whole)] * 2


# ---- equal answers -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", list(REDUCTIONS))
def test_logits_are_those_of_one_process(found: Found, name: str) -> None:
    alone = found.alone[f"{name} logits"]
    assert len(alone) > 8 and alone.abs().max() > 1
    for rank in found.ranks:
        torch.testing.assert_close(rank["cases"][f"{name} logits"], alone, rtol=0, atol=1e-5)
        scores = rank["cases"][f"{name} score"]
        torch.testing.assert_close(scores, found.alone[f"{name} score"], rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["tokens", "kept", "kv_bytes", "stream", "chat"])
@pytest.mark.parametrize("name", list(REDUCTIONS))
def test_answers_are_those_of_one_process(found: Found, name: str, what: str) -> None:
    alone = found.alone[f"{name} {what}"]
    assert any(alone)
    for rank in found.ranks:
        assert rank["cases"][f"{name} {what}"] == alone


@pytest.mark.slow
def test_the_plan_run_by_torch_gives_the_same(found: Found) -> None:
    for rank in found.ranks:
        ours, torchs = rank["rows"]
        assert ours.shape == (11, TINY_CONFIG.text.vocab_size)
        torch.testing.assert_close(ours, torchs, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_ranks_have_the_same_bits(found: Found) -> None:
    first, second = (rank["cases"] for rank in found.ranks)
    for name in REDUCTIONS:
        assert torch.equal(first[f"{name} logits"], second[f"{name} logits"])


@pytest.mark.slow
@pytest.mark.parametrize("what", ["sampled", "stopped", "encoded"])
def test_options_do_as_in_one_process(found: Found, what: str) -> None:
    for rank in found.ranks:
        assert rank["cases"][what] == found.alone[what]
    reasons = {reason for _, reason in found.alone["stopped"]}
    assert reasons == {"stop", "length"}  # rows of one batch ended at different steps


@pytest.mark.slow
def test_without_a_seed_all_ranks_draw_the_same(found: Found) -> None:
    first, second = (rank["unseeded"] for rank in found.ranks)
    assert [answer.token_ids for answer in first] == [answer.token_ids for answer in second]


@pytest.mark.slow
def test_fastv_asks_the_heads_of_all_ranks(found: Found) -> None:
    """Half of the heads would keep other tokens: without the mean over ranks, wrong ones."""
    first, second = (rank["own heads"] for rank in found.ranks)
    alone = found.alone["kept"]
    assert [rank["cases"]["kept"] for rank in found.ranks] == [alone, alone]
    assert [len(kept) for kept in first + second] == [FASTV.keep] * 8
    assert first != alone and second != alone and first != second


# ---- what a rank holds ---------------------------------------------------------------------------


@pytest.mark.slow
def test_every_rank_has_its_part_of_the_weights(found: Found) -> None:
    whole = random_llava().state_dict()
    first, second = (rank["weights"] for rank in found.ranks)
    assert list(first) == list(second) and set(first) == set(whole)
    for name, tensor in whole.items():
        by_columns = name.endswith(("o_proj.weight", "down_proj.weight"))
        is_linear = "decoder.layers" in name and "_proj" in name
        if by_columns and is_linear:
            joined = torch.cat((first[name], second[name]), 1)
        elif is_linear or name == "decoder.lm_head.weight":
            joined = torch.cat((first[name], second[name]))
        else:
            joined = first[name]
            assert torch.equal(second[name], tensor)
        assert torch.equal(joined, tensor), name
        assert not is_linear or len(first[name].flatten()) == len(tensor.flatten()) / 2


@pytest.mark.slow
def test_no_rank_ever_has_the_whole_decoder_in_memory_of_its_own(found: Found) -> None:
    for rank in found.ranks:
        memory = rank["memory"]
        share = 2 * WIDE_WEIGHTS / 2  # bytes in bfloat16
        assert memory["reads"] > 28
        assert share <= memory["kept"] < 1.01 * share  # the norms are whole
        assert share <= memory["read"] < 1.01 * share


# ---- errors --------------------------------------------------------------------------------------

RAISED = {
    "first rank's image": "ImageError: {folder}/none.png: No such file or directory",
    "prompts": "RankError: all ranks have to make the same calls, but the prompts or options of "
    "rank 1 differ from those of rank 0",
    "context": "ContextError: 3138 prompt tokens + 0 image positions",
    "bad weights on one": "CheckpointError: {folder}/nan/model.safetensors: tensor "
    "'decoder.layers.1.mlp.gate_proj.weight' has NaN or infinite values",
    "three heads": "ValueError: 2 ranks cannot share the decoder evenly: heads 3 must be a "
    "multiple of their number",
    "generate, options": "ValueError: top_p 9.0 must be",
    "encode, reduction": "ValueError: unknown reduction 'all'",
    "score, empty": "ValueError: a continuation to score must not be empty",
    "no such dtype": "ValueError: dtype 'float8' is not one of",
    "dtypes": "RankError: all ranks have to make the same calls, but the dtypes of rank 1 differ",
    "chat or generate": "RankError: all ranks have to make the same calls, but the calls of rank 1 "
    "differ",
    "cuda:1": "ValueError: device 'cuda:1' does not go with tensor parallel: cuda, cpu or auto",
    "auto": "ValueError: all ranks need the same kind of device, but there is cuda on rank 0, cpu "
    "on rank 1",
    "one rank": "IndexError: list index out of range",
    "strange": "RankError: Strange: very strange",
}
RAISED["stop strings"] = RAISED["counts"] = RAISED["prefill, ids"] = RAISED["prompts"]
RAISED["continuations"] = RAISED["prompts"].replace("options", "continuations")
RAISED["score, chunks"] = RAISED["continuations"]
RAISED["chat, options"] = RAISED["generate, options"]
for kind in ("generate", "stream", "chat"):
    RAISED[f"{kind}, too long"] = RAISED["context"]
RAISED["encoded"] = RAISED["prompts"].replace("prompts or options", "images or their reductions")


@pytest.mark.slow
@pytest.mark.parametrize("name", list(RAISED))
def test_an_error_is_raised_on_all_ranks(found: Found, folder: Path, name: str) -> None:
    for rank in found.ranks:
        assert rank["errors"].get(name, "none").startswith(RAISED[name].format(folder=folder))


@pytest.mark.slow
def test_the_end_of_one_rank_is_an_error_on_the_others(found: Found) -> None:
    """Not a wait without end."""
    raised = found.ranks[0]["left alone"]
    assert len(raised) == 5
    for words in raised:
        assert words.startswith("another rank has ended, or cannot be reached: ")


@pytest.mark.slow
def test_a_rank_waits_as_long_as_a_user_may_take(found: Found) -> None:
    for rank in found.ranks:
        assert rank["joined once"]
        assert rank["timeouts"] == [timedelta(days=30)] * 2


@pytest.mark.slow
def test_after_an_error_the_ranks_go_on(found: Found) -> None:
    for rank in found.ranks:
        assert set(rank["errors"]) == set(RAISED)
        assert rank["after errors"] == rank["only first has it"]
        assert len(rank["after errors"]) == 6


@pytest.mark.slow
def test_an_image_is_what_the_first_rank_has(folder: Path, found: Found) -> None:
    model = llava_lite.load(folder / "tiny", "cpu", "float32")
    alone = model.generate(noise(1), "star?", max_new_tokens=6).token_ids
    assert [rank["only first has it"] for rank in found.ranks] == [alone, alone]


@pytest.mark.parametrize("text", [{"num_heads": 4}, {"intermediate_size": 98}])
def test_a_decoder_must_divide(text: dict[str, int]) -> None:
    config = replace(TINY_CONFIG.text, **text)
    check_divides(config, 2)
    [(name, size)] = text.items()
    words = f"4 ranks .* {name.removeprefix('num_')} {size} must be a multiple"
    if size % 4:
        with pytest.raises(ValueError, match=words):
            check_divides(config, 4)
    else:
        check_divides(config, 4)


def test_ranks_must_divide_the_heads_of_keys() -> None:
    config = replace(GQA_CONFIG.text, num_heads=8, intermediate_size=96)
    check_divides(config, 2)
    words = "4 ranks cannot share the decoder evenly: key/value heads 2 must be a multiple"
    with pytest.raises(ValueError, match=words):
        check_divides(config, 4)


def test_without_torchrun_it_says_how(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RankError, match="torchrun --nproc-per-node 2 -m llava_lite generate"):
        llava_lite.load(tensor_parallel=True)
    assert cli.main(["generate", "-p", "star?", "--tensor-parallel"]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: tensor parallel needs the processes")
    assert len(said.err.splitlines()) == 1


@pytest.mark.parametrize("option", [{"quantize": "int8"}, {"compile": True}])
def test_what_does_not_go_together(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="tensor_parallel goes neither with quantize nor"):
        llava_lite.load(tensor_parallel=True, **option)


def test_quantized_folders_are_refused(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    save_model(random_llava(), TINY_CONFIG, tmp_path / "plain", tiny_tokenizer)
    convert(tmp_path / "plain", tmp_path / "int8", quantize="int8")
    ranks = cast(Ranks, SimpleNamespace(count=2, index=0))
    with pytest.raises(CheckpointError, match="is int8, but tensor parallel needs unquantized"):
        load_share(open_source(tmp_path / "int8"), ranks, torch.device("cpu"), torch.float32)


def test_an_error_that_travels_keeps_its_type_if_it_can() -> None:
    assert attempt(lambda: 3) == (3, None)
    error = ImageError("a.png: is no image")

    def fail() -> None:
        raise error

    assert attempt(fail) == (None, error)


# ---- the program ---------------------------------------------------------------------------------


def test_only_the_first_rank_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others do the same in silence; one that fails waits, for the first has to say why."""
    waited: list[float] = []
    monkeypatch.setattr(console.time, "sleep", waited.append)

    def program(code: int) -> Callable[[], int]:
        def run() -> int:
            print("an answer")
            console.say("error: no such file")
            return code

        return run

    for code in (0, console.INTERRUPTED):
        assert console.run_silently(1, program(code)) == code
        assert not waited and capsys.readouterr() == ("", "")
    assert console.run_silently(3, program(2)) == 2
    assert waited == [console.GRACE]
    assert capsys.readouterr() == ("", "rank 3: error: no such file\n")
    assert console.run_silently(1, lambda: [][0]) == 1
    said = capsys.readouterr().err
    assert said.startswith("rank 1: Traceback") and said.endswith("list index out of range\n")


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The program in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m", "llava_lite"]
    path = os.pathsep.join([str(ROOT), *sys.path])
    return subprocess.run(
        [*command, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        input=QUESTION,
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.mark.slow
def test_the_program_answers_once(found: Found, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*PROGRAM, "-p", QUESTION]) == 0
    alone = capsys.readouterr().out
    assert len(alone.split()) > 0
    assert [rank["program"] for rank in found.ranks] == [(0, alone, ""), (0, "", "")]


@pytest.mark.slow
def test_an_error_is_said_once_and_ends_all() -> None:
    ran = torchrun("generate", "-i", "none.png", "--tensor-parallel", "--device", "cpu")
    assert ran.returncode == 1 and ran.stdout == ""
    said = [line for line in ran.stderr.splitlines() if "none.png" in line]
    assert said == ["error: none.png: No such file or directory"]


def test_other_commands_do_not_have_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chat", "--tensor-parallel"]) == 2
    assert "unrecognized arguments: --tensor-parallel" in capsys.readouterr().err
