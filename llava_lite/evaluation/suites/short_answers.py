"""Short answers: the standard VQA normalizer and the two ways of comparing with references.

normalize_answer("Two dogs, a cat.")          # "2 dogs cat"
vqa_accuracy("2", ["two"] * 3 + ["3"] * 7)     # 0.9
"""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import combinations

SHORT_ANSWER_INSTRUCTION = "Answer the question using a single word or phrase."
PEOPLE = 10  # people who answered each question of VQA
AGREEING = 3  # an answer that this many people gave is fully right

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")
FREE_PERIOD = re.compile(r"\.(?!\d)")
ARTICLES = ("a", "an", "the")
NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
# Contractions that people write without (all of) their apostrophes. Forms that are another word
# without one (it's, we'll, he'll, she'd, I'd, we're) are left alone.
CONTRACTIONS = """
    ain't aren't can't couldn't couldn't've could've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's i'd've i'm i've isn't it'd it'd've it'll ma'am
    mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't shan't she'd've
    should've shouldn't shouldn't've somebody'd somebody'd've somebody'll somebody's someone'd
    someone'd've someone'll someone's something'd something'd've something'll that'd that'd've
    that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas
    wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
    who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
    y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()


def without_some_apostrophes(word: str) -> Iterable[str]:
    """Every form of the word without one or more of its apostrophes."""
    places = [place for place, character in enumerate(word) if character == "'"]
    for count in range(1, len(places) + 1):
        for dropped in combinations(places, count):
            yield "".join(c for place, c in enumerate(word) if place not in dropped)


REPAIRED = {
    form: contraction
    for contraction in CONTRACTIONS
    for form in without_some_apostrophes(contraction)
    if form not in CONTRACTIONS
}


@lru_cache(maxsize=2**16)  # references say the same few words again and again
def normalize_answer(answer: str) -> str:
    """The standard VQA normalizer: punctuation, case, number words, articles, contractions.

    A mark is removed if it is next to a space somewhere, or if the answer has a number with a
    comma. Otherwise the mark becomes a space. A period is removed unless a digit follows. TextVQA's
    own evaluation differs: it drops commas and question marks between letters, splits off 's."""
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    number_with_comma = COMMA_IN_NUMBER.search(text) is not None
    clean = text
    for mark in PUNCTUATION:
        goes = number_with_comma or f"{mark} " in text or f" {mark}" in text
        clean = clean.replace(mark, "" if goes else " ")
    words = FREE_PERIOD.sub("", clean).lower().split()
    numbered = (NUMBERS.get(word, word) for word in words)
    return " ".join(REPAIRED.get(word, word) for word in numbered if word not in ARTICLES)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """VQA accuracy: the mean of min(agreeing / 3, 1) over all ways to leave one reference out."""
    said = normalize_answer(answer)
    agree = [normalize_answer(reference) == said for reference in references]
    total = sum(agree)
    shares = [min((total - own) / AGREEING, 1.0) for own in agree]
    return sum(shares) / len(shares)


def short_answer_score(answer: str, references: Sequence[str]) -> float:
    """VQA accuracy for the answers of ten people, else 1 for an answer that equals a reference."""
    score = vqa_accuracy if len(references) == PEOPLE else exact_match
    return float(score(answer, references))


def exact_match(answer: str, references: Sequence[str]) -> bool:
    """Whether the answer equals one of the references after normalizing.

    A text that normalizing empties, such as the letter A, is compared without regard to case."""
    return comparable(answer) in {comparable(reference) for reference in references}


def comparable(answer: str) -> str:
    return normalize_answer(answer) or answer.strip().lower()


def short_answer_prompt(question: str) -> str:
    """The question and the official instruction, once."""
    if question.rstrip().endswith(SHORT_ANSWER_INSTRUCTION):
        return question
    return f"{question}\n{SHORT_ANSWER_INSTRUCTION}"
