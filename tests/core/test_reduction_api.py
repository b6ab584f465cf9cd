"""Token reduction through every public entry point: they agree with each other, and what cannot be
is refused before anything is computed."""

from dataclasses import replace

import pytest
import torch

from helpers.models import TINY_CONFIG, TINY_TEXT, TINY_VISION, random_llava
from helpers.pictures import picture
from llava_lite.config import IMAGE_TOKEN_ID
from llava_lite.errors import ContextError
from llava_lite.generation.model import Model
from llava_lite.generation.sampling import GenerationOptions
from llava_lite.inputs.pixels import preprocess
from llava_lite.inputs.prompt import build_prompt, place_images
from llava_lite.inputs.tokenizer import Tokenizer
from llava_lite.llava import EncodedImage
from llava_lite.reduction import POSITIONS, REDUCTIONS, DToMe, FastV, Reduction, ToMe

P = TINY_VISION.num_patches
LENGTH = 8
WISHES = {
    "vtu": Reduction(ToMe(keep=6)),
    "logical": Reduction(ToMe(keep=6), "logical"),
    "plain": Reduction(ToMe(keep=6), "plain"),
    "schedule": Reduction(ToMe(r=2, schedule="linear"), "logical"),
    "thresholds": Reduction(DToMe((0.5, 0.2))),
    "fastv": Reduction(fastv=FastV(drop=0.5, layer=1)),
    "hybrid": Reduction(ToMe(keep=8), "logical", FastV(keep=3, layer=2)),
    "hybrid vtu": Reduction(ToMe(keep=8), "vtu", FastV(keep=3, layer=1)),
    "hybrid thresholds": Reduction(DToMe((0.5, 0.2)), "vtu", FastV(drop=0.5, layer=2)),
    "folded": Reduction(ToMe(keep=6), "folded"),
    "folded stages": Reduction(None, "folded", FastV(stages=((1, 7), (2, 0.6)), rest="fold")),
    "folded thresholds": Reduction(
        DToMe((0.5, 0.2)), "folded", FastV(keep=3, layer=1, score="mean", rest="fold")
    ),
}
each_wish = pytest.mark.parametrize("wish", WISHES.values(), ids=WISHES)


def prompt_ids(model: Model, text: str, num_images: int = 1) -> list[int]:
    turn = (place_images(text, num_images, model.config.template), None)
    return model.tokenizer.encode_prompt(build_prompt(model.config.template, [turn], None))


@torch.inference_mode()
def by_hand(
    model: Model,
    input_ids: list[int],
    images: list[EncodedImage],
    wish: Reduction,
    spoken: tuple[int, ...] = (),
    length: int = LENGTH,
) -> tuple[list[int], list[float]]:
    """Prefill, then decode one token after the other: those of `spoken`, then greedily `length`
    more. Returns these, and the log-probabilities of `spoken`."""
    rows, layout = model.llava.splice(input_ids, images, positions=wish.positions)
    logits, [cache], _ = model.llava([rows], [layout], [None], [wish.fastv])
    tokens: list[int] = []
    logprobs: list[float] = []
    for step in range(len(spoken) + length):
        text_logits = logits.flatten()[: TINY_TEXT.sampled_vocab_size]
        if step < len(spoken):
            token = spoken[step]
            logprobs.append(float(text_logits.log_softmax(-1)[token]))
        else:
            token = int(text_logits.argmax())
            if token == TINY_TEXT.eos_id:
                break
            tokens.append(token)
        logits, cache = model.llava.decode(torch.tensor(token), layout.next_position + step, cache)
    return tokens, logprobs


# ---- the entry points agree --------------------------------------------------------------------


@each_wish
def test_generate_is_prefill_and_decode(tiny_model: Model, wish: Reduction) -> None:
    images = [tiny_model.encode(picture(seed), wish) for seed in (1, 2)]
    expected, _ = by_hand(tiny_model, prompt_ids(tiny_model, "star?", 2), images, wish)
    for given in (images, [picture(1), picture(2)]):
        answer = tiny_model.generate(given, "star?", max_new_tokens=LENGTH, reduction=wish)
        assert list(answer.token_ids) == expected
    assert answer.usage["image_patches"] == 2 * P
    assert answer.usage["image_tokens"] == sum(len(image.image_embeds) for image in images)


@each_wish
def test_stream_chat_batch_and_encode_answer_as_generate(
    tiny_model: Model, wish: Reduction
) -> None:
    options = {"max_new_tokens": LENGTH, "reduction": wish}
    alone = [
        tiny_model.generate(picture(seed), text, **options)
        for seed, text in ((1, "star?"), (2, "What color is the ring?"), (3, "square"))
    ]
    assert "".join(tiny_model.stream(picture(1), "star?", **options)) == alone[0]
    chat = tiny_model.chat(picture(1), **options)
    first = chat.send("star?")
    assert (first, first.token_ids, first.usage) == (alone[0], alone[0].token_ids, alone[0].usage)
    encoded = tiny_model.encode(picture(1), wish)
    for reduction in (None, wish):  # an encoded image remembers
        answer = tiny_model.generate(encoded, "star?", max_new_tokens=LENGTH, reduction=reduction)
        assert (answer, answer.usage) == (alone[0], alone[0].usage)
    batch = tiny_model.generate(
        [picture(1), picture(2), None, picture(3)],
        ["star?", "What color is the ring?", "circle", "square"],
        batch_size=3,
        **options,
    )
    text_only = tiny_model.generate(None, "circle", max_new_tokens=LENGTH)
    for here, there in zip(batch, [*alone[:2], text_only, alone[2]], strict=True):
        assert (here.token_ids, here.usage) == (there.token_ids, there.usage)


@each_wish
def test_score_is_what_generate_would_say(tiny_model: Model, wish: Reduction) -> None:
    answer = tiny_model.generate(picture(4), "star?", max_new_tokens=4, reduction=wish)
    written = tiny_model.tokenizer.decode(answer.token_ids)
    score = tiny_model.score(picture(4), "star?", written, reduction=wish)
    images = [tiny_model.encode(picture(4), wish)]
    prompt = prompt_ids(tiny_model, "star?")
    _, logprobs = by_hand(tiny_model, prompt, images, wish, score.token_ids, length=0)
    assert score.token_logprobs == pytest.approx(logprobs, abs=1e-4)
    both = tiny_model.score(
        [picture(4), picture(5)], ["star?", "ring"], [written, "red"], reduction=wish
    )
    assert both[0].log_likelihood == pytest.approx(score.log_likelihood, abs=1e-4)
    plain = tiny_model.score(picture(4), "star?", written)
    assert plain.log_likelihood != pytest.approx(score.log_likelihood, abs=1e-6)


@torch.inference_mode()
@each_wish
def test_prefill_takes_a_reduction(tiny_model: Model, wish: Reduction) -> None:
    input_ids = torch.tensor([prompt_ids(tiny_model, "star?")])
    pixels = preprocess(picture(6), TINY_VISION.image_size, True)
    logits, cache, position = tiny_model.prefill(input_ids, pixels, wish)
    answer = tiny_model.generate(picture(6), "star?", max_new_tokens=2, reduction=wish)
    token = int(logits[0, 0, : TINY_TEXT.sampled_vocab_size].argmax())
    assert token == answer.token_ids[0]
    logits, cache = tiny_model.decode(torch.tensor([token]), position, cache)
    assert int(logits[0, 0, : TINY_TEXT.sampled_vocab_size].argmax()) == answer.token_ids[1]


def test_presets_go_by_name(tiny_tokenizer: Tokenizer) -> None:
    # 168 px are 144 patches; thresholds of its own for the preset that needs them.
    vision = replace(TINY_VISION, image_size=168)
    config = replace(
        TINY_CONFIG, vision=vision, text=replace(TINY_TEXT, num_layers=4, max_positions=512)
    )
    model = Model(random_llava(config), tiny_tokenizer, thresholds=(0.6, 0.4))
    counts = {  # image tokens, and those of them that stay
        "none": (144, 144),
        "folded-72": (72, 72),
        "folded-144-72": (144, 72),
        "folded-144-36": (144, 36),
        "folded-72-36": (72, 36),
        "folded-72-36-18": (72, 18),
        "folded-72-18-9": (72, 9),
        "fastv-72-folded": (144, 72),
        "tome-72": (72, 72),
        "tome-72-logical": (72, 72),
        "fastv-50": (144, 72),
        "hybrid-72-36": (72, 36),
        "hybrid-vtu-72-36": (72, 36),
    }
    assert set(counts) == set(REDUCTIONS) - {"dymu-72"}
    for name, reduction in REDUCTIONS.items():
        answers = [
            model.generate(picture(1), "star?", max_new_tokens=2, reduction=wish)
            for wish in (name, reduction)
        ]
        assert answers[0].token_ids == answers[1].token_ids
        usage = answers[0].usage
        found = (usage["image_tokens"], usage["kept_image_tokens"])
        assert found == counts.get(name, found[:1] * 2)
    assert (
        model.generate(None, "star?", max_new_tokens=1, reduction="dymu-72").usage["image_tokens"]
        == 0
    )


# ---- chats -------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_merged_chat_equals_its_history_from_scratch(tiny_model: Model, positions: str) -> None:
    wish = Reduction(ToMe(keep=6), positions)
    chat = tiny_model.chat(picture(1), max_new_tokens=LENGTH, reduction=wish)
    images = [tiny_model.encode(picture(1), wish)]
    for text, extra in (("star?", None), ("And the ring?", picture(2)), ("red", None)):
        answer = chat.send(text, image=extra)
        if extra is not None:
            images.append(tiny_model.encode(extra, wish))
        spoken = chat.input_ids[: len(chat.input_ids) - len(answer.token_ids)]
        expected, _ = by_hand(tiny_model, list(spoken), images, wish)
        assert list(answer.token_ids) == expected


@pytest.mark.parametrize(
    ("positions", "rest"), [("logical", "drop"), ("folded", "drop"), ("folded", "fold")]
)
def test_a_chat_prunes_every_image_once(tiny_model: Model, positions: str, rest: str) -> None:
    wish = Reduction(ToMe(keep=8), positions, FastV(keep=3, layer=1, rest=rest))
    chat = tiny_model.chat(picture(1), max_new_tokens=2, reduction=wish)
    kept, lengths = [], []
    for text, extra in (("star?", None), ("ring?", None), ("square", picture(2)), ("red", None)):
        kept.append(chat.send(text, image=extra).usage["kept_image_tokens"])
        cache = chat.log.state.past_key_values
        assert cache is not None
        lengths.append([k.shape[2] for k, _ in cache])
    assert kept == [3, 3, 6, 6]
    dropped = [first - deep for first, *_, deep in lengths]
    assert dropped == [5, 5, 10, 10]
    assert all(middle == deep for _, middle, deep in lengths)


@pytest.mark.parametrize(
    ("positions", "rest"), [*((name, "drop") for name in POSITIONS), ("folded", "fold")]
)
def test_later_turns_go_on_over_what_the_first_one_kept(
    tiny_model: Model, positions: str, rest: str
) -> None:
    """Static pruning: from scratch, that is the pruned first prompt and then every token alone."""
    wish = Reduction(ToMe(keep=8), positions, FastV(keep=3, layer=1, rest=rest))
    chat = tiny_model.chat(picture(1), max_new_tokens=4, reduction=wish)
    chat.send("star?")
    first = prompt_ids(tiny_model, "star?")
    for text in ("And the ring?", "red"):
        answer = chat.send(text)
        assert answer.usage["kept_image_tokens"] == 3
        spoken = chat.input_ids[len(first) : len(chat.input_ids) - len(answer.token_ids)]
        images = [tiny_model.encode(picture(1), wish)]
        expected, _ = by_hand(tiny_model, first, images, wish, spoken, length=4)
        assert list(answer.token_ids) == expected


@each_wish
def test_an_interrupted_stream_leaves_a_chat_that_goes_on(
    tiny_model: Model, wish: Reduction
) -> None:
    stopped = tiny_model.chat(picture(1), max_new_tokens=LENGTH, reduction=wish)
    pieces = stopped.stream("star?")
    next(pieces)
    pieces.close()
    spoken = len(stopped.input_ids) - len(prompt_ids(tiny_model, "star?"))
    assert 0 < spoken < LENGTH
    short = tiny_model.chat(picture(1), max_new_tokens=spoken, reduction=wish)
    short.send("star?")
    assert stopped.input_ids == short.input_ids
    short.options = stopped.options
    after = [chat.send("And the ring?", image=picture(2)) for chat in (stopped, short)]
    assert (after[0].token_ids, after[0].usage) == (after[1].token_ids, after[1].usage)
    assert after[0].usage["image_patches"] == 2 * P


def test_the_context_of_a_chat_counts_the_positions_of_all_its_images(tiny_model: Model) -> None:
    for positions in POSITIONS:
        taken = 12 if positions == "plain" else 2 * P
        wish = Reduction(ToMe(keep=6), positions, FastV(keep=2, layer=1))
        chat = tiny_model.chat(picture(1), max_new_tokens=2, reduction=wish)
        chat.send("star?")
        before = chat.log
        message = rf"\d+ prompt tokens \+ {taken} image positions \+ 2 new tokens"
        with pytest.raises(ContextError, match=message):
            chat.send("ring " * 200, image=picture(2))
        assert chat.log is before


# ---- encoded images ----------------------------------------------------------------------------


def test_an_encoded_image_goes_with_other_positions_and_pruning(tiny_model: Model) -> None:
    merge = ToMe(keep=6)
    encoded = tiny_model.encode(picture(1), Reduction(merge))
    for positions in POSITIONS:
        for fastv in (None, FastV(keep=2, layer=1)):
            wish = Reduction(merge, positions, fastv)
            here = tiny_model.generate(encoded, "star?", max_new_tokens=LENGTH, reduction=wish)
            there = tiny_model.generate(picture(1), "star?", max_new_tokens=LENGTH, reduction=wish)
            assert (here.token_ids, here.usage) == (there.token_ids, there.usage)


def test_encoding_again_changes_what_is_not_merged(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tiny_model.encode(picture(1), Reduction(ToMe(keep=6)))
    monkeypatch.setattr(tiny_model.llava.vision, "forward", None)  # it is not looked at again
    wish = Reduction(ToMe(keep=6), "logical", FastV(keep=2, layer=1))
    again = tiny_model.encode(first, wish)
    assert again.image_embeds is first.image_embeds
    assert (again.reduction, first.reduction) == (wish, Reduction(ToMe(keep=6)))
    here = tiny_model.generate(again, "star?", max_new_tokens=LENGTH)
    there = tiny_model.generate(first, "star?", max_new_tokens=LENGTH, reduction=wish)
    assert (here.token_ids, here.usage) == (there.token_ids, there.usage)
    assert here.usage["kept_image_tokens"] == 2
    assert tiny_model.encode(first).reduction == first.reduction
    with pytest.raises(ValueError, match="encoded with merge"):
        tiny_model.encode(first, Reduction(ToMe(keep=8)))


def test_pruning_leaves_text_alone(tiny_model: Model) -> None:
    plain = tiny_model.generate(None, "star?", max_new_tokens=LENGTH)
    for name in ("fastv", "hybrid", "hybrid vtu", "folded stages"):
        answer = tiny_model.generate(None, "star?", max_new_tokens=LENGTH, reduction=WISHES[name])
        assert (answer.token_ids, answer.usage) == (plain.token_ids, plain.usage)


def test_a_batch_of_differently_encoded_images(tiny_model: Model) -> None:
    wishes = [*WISHES.values(), Reduction()]
    encoded = [tiny_model.encode(picture(seed), wish) for seed, wish in enumerate(wishes)]
    together = tiny_model.generate(encoded, ["star?"] * len(wishes), max_new_tokens=LENGTH)
    for answer, seed, wish in zip(together, range(len(wishes)), wishes, strict=True):
        alone = tiny_model.generate(picture(seed), "star?", max_new_tokens=LENGTH, reduction=wish)
        assert (answer.token_ids, answer.usage) == (alone.token_ids, alone.usage)


def test_encoded_images_that_do_not_fit_the_call(tiny_model: Model) -> None:
    six, eight = (tiny_model.encode(picture(1), Reduction(ToMe(keep=n))) for n in (6, 8))
    plain = tiny_model.encode(picture(1))
    with pytest.raises(ValueError, match=r"encoded with merge=ToMe\(keep=6.* call asks .*keep=8"):
        tiny_model.generate(six, "star?", reduction=Reduction(ToMe(keep=8)))
    with pytest.raises(ValueError, match=r"encoded with merge=None, but the call asks"):
        tiny_model.generate(plain, "star?", reduction=Reduction(ToMe(keep=8)))
    with pytest.raises(ValueError, match="different reductions"):
        tiny_model.generate([six, eight], "star?")


def test_a_later_image_of_a_chat_is_reduced_as_the_one_before(tiny_model: Model) -> None:
    wish = WISHES["hybrid"]
    named = tiny_model.chat(picture(1), max_new_tokens=4, reduction=wish)
    inherited = tiny_model.chat(tiny_model.encode(picture(1), wish), max_new_tokens=4)
    for text, extra in (("star?", None), ("And the ring?", None), ("red", picture(2))):
        there, here = named.send(text, extra), inherited.send(text, extra)
        assert (here.token_ids, here.usage) == (there.token_ids, there.usage)
    other = Reduction(ToMe(keep=8))  # an encoded one goes by its own
    assert inherited.send("star?", tiny_model.encode(picture(3), other)).usage["image_tokens"] == (
        there.usage["image_tokens"] + 8
    )
    inherited.clear()
    again = tiny_model.chat(picture(1), max_new_tokens=4, reduction=wish).send("star?")
    assert inherited.send("star?").usage == again.usage


# ---- refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        (Reduction(ToMe(keep=P + 1)), rf"ToMe keep {P + 1} must be in \d+\.\.{P}"),
        (Reduction(fastv=FastV(keep=2, layer=3)), r"FastV layer 3 must be in 1\.\.2"),
        (Reduction(DToMe()), "no thresholds of its own: find some with `llava-lite thresholds`"),
        (Reduction(DToMe((0.5,) * 5)), "5 DToMe thresholds, but the tower runs 2 of 3 blocks"),
        ("dymu-73", "unknown reduction 'dymu-73'; there are none, folded-72"),
        (72, "reduction 72 is neither a Reduction nor a preset's name"),
    ],
)
def test_bad_reductions_are_refused_before_any_computation(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch, wish: object, message: str
) -> None:
    monkeypatch.setattr(tiny_model.llava.vision, "forward", None)
    monkeypatch.setattr(tiny_model.llava.decoder, "forward", None)
    options = {"reduction": wish}
    calls = [
        lambda: tiny_model.generate(picture(1), "star?", **options),
        lambda: tiny_model.generate([picture(1)] * 2, ["star?", "ring"], **options),
        lambda: tiny_model.stream(picture(1), "star?", **options),
        lambda: tiny_model.chat(picture(1), **options).send("star?"),
        lambda: tiny_model.score(picture(1), "star?", "red", **options),
        lambda: tiny_model.encode(picture(1), wish),
        lambda: tiny_model.prefill(torch.tensor([[1, IMAGE_TOKEN_ID]]), None, wish),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_own_thresholds_stand_in(tiny_tokenizer: Tokenizer) -> None:
    llava = random_llava()
    model = Model(llava, tiny_tokenizer, thresholds=(0.5, 0.2))
    own = model.generate(picture(1), "star?", max_new_tokens=4, reduction=Reduction(DToMe()))
    named = Model(llava, tiny_tokenizer).generate(
        picture(1), "star?", max_new_tokens=4, reduction=Reduction(DToMe((0.5, 0.2)))
    )
    assert (own.token_ids, own.usage) == (named.token_ids, named.usage)
    assert own.usage["image_tokens"] < P


def test_the_context_is_counted_in_positions(tiny_model: Model) -> None:
    """Merged images take as many positions as ever, but for `plain`, where their text moves up."""
    words = len(prompt_ids(tiny_model, "star?")) - 1
    room = TINY_TEXT.max_positions - words
    for wish, taken in (
        (Reduction(ToMe(keep=6)), P),
        (Reduction(ToMe(keep=6), "logical", FastV(keep=2, layer=1)), P),
        (Reduction(ToMe(keep=6), "folded", FastV(keep=2, layer=1, rest="fold")), P),
        (Reduction(ToMe(keep=6), "plain"), 6),
        (Reduction(DToMe((0.5, 0.2)), "plain"), P),  # nobody knows before looking
    ):
        message = rf"{words} prompt tokens \+ {taken} image positions \+ {room - taken + 1} new"
        with pytest.raises(ContextError, match=message):
            tiny_model.generate(
                picture(1), "star?", max_new_tokens=room - taken + 1, reduction=wish
            )
        request = tiny_model.request(
            [picture(1)],
            "star?",
            GenerationOptions(room - taken, reduction=wish),
        )
        assert request.max_new_tokens == room - taken
