"""Caption metrics against hand-computed numbers and, where it is installed, against the scorers of
the COCO evaluation; its tokeniser needs Java, which few machines have."""

import math
import random
import shutil
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.peers import peer
from llava_lite.evaluation.suites.captions import (
    bleu,
    cider_d,
    longest_common_subsequence,
    rouge_l,
    tokenize,
)

# What the tokeniser of the COCO evaluation made of these (Stanford's, lower case, 17 marks
# dropped), recorded from a run.
TOKENIZED = {
    "A man's dog, which can't swim, is on a t-shirt (red).": (
        "a man 's dog which ca n't swim is on a t-shirt -lrb- red -rrb-"
    ),
    "He cannot say \"hello\" -- or 'bye'.": "he can not say hello or bye",
    "It's 10:30 a.m. in the U.S.": "it 's 10:30 a.m. in the u.s.",
    "Mr. Smith paid $5.50 for 1,000 apples & 50% off!": (
        "mr. smith paid $ 5.50 for 1,000 apples & 50 % off"
    ),
    "black and/or white...": "black and/or white",
    "rock 'n' roll; the dogs' bowl [x] {y}": (
        "rock 'n' roll the dogs bowl -lsb- x -rsb- -lcb- y -rcb-"
    ),
    "o'clock gonna wanna gimme": "o'clock gon na wan na gim me",
    "A café ’s sign “hi” — #1": "a café 's sign hi # 1",
    "St. Mary's St. wi-fi 3-year-old well-dressed end.The next": (
        "st. mary 's st. wi-fi 3-year-old well-dressed end.the next"
    ),
    "don’t they're I'm we've he'd she'll": "do n't they 're i 'm we 've he 'd she 'll",
    "two_words a/b 1/2 5ft 12th 7:00 2-3 A.B. e.g. etc.": (
        "two_words a/b 1/2 5ft 12th 7:00 2-3 a.b. e.g. etc."
    ),
    "A sign reads 'STOP'. Two kids' toys.": "a sign reads stop two kids toys",
    "A person on skis  standing\ton snow .\n": "a person on skis standing on snow",
    "Dr. Who vs. Mrs. Smith's, red,white: wow!!": "dr. who vs. mrs. smith 's red white wow !!",
    "New York's Times Square at 42nd/7th Ave.": "new york 's times square at 42nd/7th ave.",
    "a…b": "a b",
}


@pytest.mark.parametrize(("caption", "expected"), TOKENIZED.items())
def test_tokens_are_those_of_the_coco_evaluation(caption: str, expected: str) -> None:
    assert " ".join(tokenize(caption)) == expected


def test_the_recorded_tokens_are_those_of_the_reference_tokenizer() -> None:
    module = peer("pycocoevalcap.tokenizer.ptbtokenizer")
    if not shutil.which("java"):
        pytest.skip("the reference tokeniser needs Java")
    captions = {place: [{"caption": caption}] for place, caption in enumerate(TOKENIZED)}
    found = module.PTBTokenizer().tokenize(captions)
    assert [found[place][0] for place in captions] == list(TOKENIZED.values())


@pytest.mark.parametrize("caption", ["", " \n", "...", "-", '"', "?"])
def test_nothing_is_no_token(caption: str) -> None:
    assert tokenize(caption) == []


# ---- against the reference scorers -------------------------------------------------------------


def check_against_reference(candidates: list[list[str]], references: list[list[list[str]]]) -> None:
    cider = peer("pycocoevalcap.cider.cider").Cider()
    reference_bleu = peer("pycocoevalcap.bleu.bleu").Bleu(4)
    rouge = peer("pycocoevalcap.rouge.rouge").Rouge()
    right = {
        place: [" ".join(one) for one in of_image] for place, of_image in enumerate(references)
    }
    given_ = {place: [" ".join(one)] for place, one in enumerate(candidates)}
    score, scores = cider.compute_score(right, given_)
    assert cider_d(candidates, references) == pytest.approx(list(scores), abs=1e-12)
    assert mean(cider_d(candidates, references)) == pytest.approx(score, abs=1e-12)
    score, _ = reference_bleu.compute_score(right, given_, verbose=0)
    assert bleu(candidates, references) == pytest.approx(score, abs=1e-12, rel=1e-12)
    _, scores = rouge.compute_score(right, given_)
    assert rouge_l(candidates, references) == pytest.approx(list(scores), abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_random_captions_score_as_in_the_coco_evaluation(seed: int) -> None:
    rng = random.Random(seed)
    words = [f"w{number}" for number in range(rng.choice((2, 5, 30)))]

    def caption(shortest: int) -> list[str]:
        return rng.choices(words, k=rng.randint(shortest, 14))

    count = rng.randint(1, 12)
    references = [[caption(1) for _ in range(rng.randint(1, 5))] for _ in range(count)]
    check_against_reference([caption(0) for _ in range(count)], references)


@pytest.mark.parametrize(
    ("candidates", "references"),
    [
        ([""], [["a cat"]]),
        (["a cat"], [["a cat"]]),  # one image: everything is in all images, CIDEr-D 0
        (["cat", "dog"], [["cat"], ["dog"]]),
        (["a a a a a", "b"], [["a", "a a"], ["b b b"]]),
        (["x y z", "q"], [["a b c"], ["d e f"]]),
        (["a b c d e f g h i j k l m n o p q r s t", "b"], [["a b"], ["c"]]),
        (["a cat", "a dog"], [["a cat", "a cat"], ["a dog runs", "dog"]]),
    ],
)
def test_edge_captions_score_as_in_the_coco_evaluation(
    candidates: list[str], references: list[list[str]]
) -> None:
    check_against_reference(
        [one.split() for one in candidates],
        [[one.split() for one in of_image] for of_image in references],
    )


# ---- by hand -----------------------------------------------------------------------------------


def test_cider_by_hand() -> None:
    references = [["a b c d".split()], ["e f".split()]]
    # All n-grams are in one of two images, so each order that a caption has is a cosine of 1.
    assert cider_d(["a b c d".split(), "e f".split()], references) == pytest.approx([10.0, 5.0])
    # Of "a b c d" only a: unigrams 1 / (1 * 2), two pairs of words fewer than 3, so exp(-9/72).
    expected = 10 * 0.5 / 4 * math.exp(-9 / 72)
    assert cider_d([["a"], ["x", "y"]], references) == pytest.approx([expected, 0.0])
    # One image alone: everything is in all images, so nothing is rare.
    assert cider_d(["e f".split()], [["e f".split()]]) == [0.0]
    # "a" twice counts once against the reference, but twice in the norm.
    [score, _] = cider_d(["a a b".split(), []], [["a b".split()], [["c"]]])
    unigrams = (1 + 1) / (math.sqrt(5) * math.sqrt(2))
    pairs = 1 / math.sqrt(2)
    assert score == pytest.approx(10 * (unigrams + pairs) / 4 * math.exp(-1 / 72))


def test_bleu_by_hand() -> None:
    # 2 of 3 words, "the" only twice; 1 of 2 pairs; no run of three. Length 3 equals the nearest.
    scores = bleu(["the the the".split()], [["the the cat sat".split(), "the cat sat".split()]])
    assert scores[:2] == pytest.approx([2 / 3, math.sqrt(2 / 3 * 1 / 2)], rel=1e-6)
    assert scores[2] < 1e-4
    # A caption of half the length: exp(1 - 2).
    assert bleu(["a b".split()], [["a b c d".split()]])[0] == pytest.approx(math.exp(-1), rel=1e-6)


def test_rouge_by_hand() -> None:
    # "a c d" is common: precision 3/4, recall 3/5.
    [score] = rouge_l(["a x c d".split()], [["a b c d e".split()]])
    assert score == pytest.approx(2.44 * 0.75 * 0.6 / (0.6 + 1.44 * 0.75))
    assert rouge_l([[], ["a"]], [[["a"]], [["b"]]]) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("first", "second", "length"),
    [("", "abc", 0), ("abc", "abc", 3), ("abcbdab", "bdcaba", 4), ("xaxbx", "ab", 2)],
)
def test_longest_common_subsequence(first: str, second: str, length: int) -> None:
    assert longest_common_subsequence(list(first), list(second)) == length
    assert longest_common_subsequence(list(second), list(first)) == length


CAPTIONS = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=8)


@given(st.lists(CAPTIONS, min_size=2, max_size=6), st.data())
def test_no_caption_beats_the_reference_itself(
    references: list[list[str]], data: st.DataObject
) -> None:
    others = [data.draw(CAPTIONS) for _ in references]
    single = [[reference] for reference in references]
    best = cider_d(references, single)
    assert all(0 <= score <= 10 + 1e-9 for score in best)
    assert all(a <= b + 1e-9 for a, b in zip(cider_d(others, single), best, strict=True))
    assert rouge_l(references, single) == pytest.approx([1.0] * len(references))
    assert bleu(references, single)[0] == pytest.approx(1.0, rel=1e-6)


@given(st.text())
def test_tokens_hold_no_space_and_no_capital(caption: str) -> None:
    for token in tokenize(caption):
        assert token and token == "".join(token.split()).lower()
