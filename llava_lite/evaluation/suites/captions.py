"""Caption metrics: CIDEr-D, BLEU and ROUGE-L over tokens, and the tokens of a caption.

    candidates = [tokenize(caption), ...]
    references = [[tokenize(caption), ...], ...]
    cider_d(candidates, references)      # a score for each image; their mean is CIDEr-D

The numbers are those of the scorers that the COCO evaluation uses, which tests compare with.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

Tokens = Sequence[str]
Ngram = tuple[str, ...]

ORDERS = (1, 2, 3, 4)
CIDER_SIGMA = 6.0
CIDER_SCALE = 10.0
ROUGE_BETA = 1.2
# The COCO scorer keeps BLEU above zero and its divisions defined by these.
BLEU_TINY = 1e-15
BLEU_SMALL = 1e-9

# ---- tokens ------------------------------------------------------------------------------------

TOKENIZER = "ptb-like: lower case, contractions split, punctuation dropped"
QUOTES = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "—": " - ", "–": " - "})
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
DROPPED = frozenset("'\"`.?!,:;-…")
ABBREVIATIONS = "mr|mrs|ms|dr|st|ave|jr|sr|vs|etc|prof|jan|feb|aug|sept|oct|nov|dec"
TOKEN = re.compile(
    rf"""
    \b(?:[^\W\d_]\.){{2,}}                          # u.s.
    | \b(?:{ABBREVIATIONS})\.                       # mr.
    | 'n' | (?<!\w)'(?:s|m|d|re|ve|ll)\b            # rock 'n' roll  man 's
    | \w+ (?: [-'/.] \w+ | (?<=\d) [,:] \d+ )*      # dog  t-shirt  man's  and/or  1,000  10:30
    | [?!]{{2,}}                                    # more than one is kept
    | [^\w\s]
    """,
    re.VERBOSE,
)
CLITIC = re.compile(r"(?<=\w)(?:n't|'(?:s|m|d|re|ve|ll))$")
TWO_WORDS = {
    "cannot": ("can", "not"),
    "gonna": ("gon", "na"),
    "wanna": ("wan", "na"),
    "gotta": ("got", "ta"),
    "gimme": ("gim", "me"),
    "lemme": ("lem", "me"),
}


def tokenize(caption: str) -> list[str]:
    """Words much as the Penn Treebank tokenizer of the COCO evaluation makes them.

    Lower case; n't, 's and their kind are tokens; numbers, hyphenated words and abbreviations stay
    whole; quotes and . ? ! , : ; - are dropped; brackets become -lrb- and so on, which the
    reference tokenizer in fact keeps. Rarer rules of that tokenizer are left out."""
    tokens: list[str] = []
    for token in TOKEN.findall(caption.translate(QUOTES).lower()):
        tokens += split_word(token)
    return tokens


def split_word(token: str) -> Iterable[str]:
    """The parts of one match: none for dropped marks, two for contractions."""
    if token in DROPPED:
        return []
    if token in BRACKETS:
        return [BRACKETS[token]]
    if token in TWO_WORDS:
        return TWO_WORDS[token]
    clitic = CLITIC.search(token)
    if clitic:
        return [token[: clitic.start()], clitic.group()]
    return [token]


# ---- CIDEr-D -----------------------------------------------------------------------------------


def cider_d(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float]:
    """CIDEr-D of every image (Vedantam et al., CVPR 2015), 10 at most; the mean is the score.

    `candidates[i]` is one caption, `references[i]` the captions of the same image. How rare an
    n-gram is follows from the references given here, so scores of different subsets differ."""
    rarity = ngram_rarity(references)
    scores = []
    for candidate, of_image in zip(candidates, references, strict=True):
        own = cider_vectors(candidate, rarity, len(references))
        similar = [
            cider_similarity(own, cider_vectors(reference, rarity, len(references)))
            * length_penalty(candidate, reference)
            for reference in of_image
        ]
        scores.append(CIDER_SCALE * sum(similar) / len(similar))
    return scores


def ngrams(tokens: Tokens, order: int) -> list[Ngram]:
    """All runs of `order` tokens."""
    return [tuple(tokens[start : start + order]) for start in range(len(tokens) - order + 1)]


def ngram_rarity(references: Sequence[Sequence[Tokens]]) -> Counter[Ngram]:
    """In the references of how many images every n-gram stands."""
    images: Counter[Ngram] = Counter()
    for of_image in references:
        images.update({ngram for ref in of_image for n in ORDERS for ngram in ngrams(ref, n)})
    return images


def cider_vectors(
    tokens: Tokens, images_with: Counter[Ngram], images: int
) -> list[dict[Ngram, float]]:
    """For each order, TF-IDF of the caption's n-grams."""
    total = math.log(images)
    return [
        {
            ngram: count * (total - math.log(max(images_with[ngram], 1)))
            for ngram, count in Counter(ngrams(tokens, order)).items()
        }
        for order in ORDERS
    ]


def cider_similarity(
    candidate: Sequence[dict[Ngram, float]], reference: Sequence[dict[Ngram, float]]
) -> float:
    """Mean over the orders of the cosine, where no n-gram counts more than in the reference."""
    cosines = []
    for own, other in zip(candidate, reference, strict=True):
        norms = math.hypot(*own.values()) * math.hypot(*other.values())
        product = sum(
            min(weight, other[ngram]) * other[ngram]
            for ngram, weight in own.items()
            if ngram in other
        )
        cosines.append(product / norms if norms else 0.0)
    return sum(cosines) / len(cosines)


def length_penalty(candidate: Tokens, reference: Tokens) -> float:
    """1 for equal lengths, less the more they differ. The COCO scorer counts pairs of words."""
    difference = max(len(candidate) - 1, 0) - max(len(reference) - 1, 0)
    return math.exp(-(difference**2) / (2 * CIDER_SIGMA**2))


# ---- BLEU --------------------------------------------------------------------------------------


def bleu(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float]:
    """Corpus BLEU-1 to BLEU-4 (Papineni et al., ACL 2002), 0..1, against the closest length."""
    matches, possible = [0] * len(ORDERS), [0] * len(ORDERS)
    candidate_length = reference_length = 0
    for candidate, of_image in zip(candidates, references, strict=True):
        candidate_length += len(candidate)
        reference_length += closest_length(len(candidate), of_image)
        for index, order in enumerate(ORDERS):
            matches[index] += clipped_matches(candidate, of_image, order)
            possible[index] += max(len(candidate) - order + 1, 0)
    ratio = (candidate_length + BLEU_TINY) / (reference_length + BLEU_SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, scores = 1.0, []
    for order, right, count in zip(ORDERS, matches, possible, strict=True):
        product *= (right + BLEU_TINY) / (count + BLEU_SMALL)
        scores.append(product ** (1 / order) * brevity)
    return scores


def closest_length(length: int, references: Sequence[Tokens]) -> int:
    """The reference length nearest to this one, the shorter of two."""
    return min((len(ref) for ref in references), key=lambda other: (abs(other - length), other))


def clipped_matches(candidate: Tokens, references: Sequence[Tokens], order: int) -> int:
    """How many n-grams of the candidate are in a reference, none more often than there."""
    most: Counter[Ngram] = Counter()
    for reference in references:
        most |= Counter(ngrams(reference, order))
    return (Counter(ngrams(candidate, order)) & most).total()


# ---- ROUGE-L -----------------------------------------------------------------------------------


def rouge_l(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float]:
    """ROUGE-L of every image (Lin, ACL 2004), 0..1; the mean is the score.

    As in the COCO evaluation, the best precision and the best recall over the references count,
    recall a little more (beta 1.2)."""
    return [
        rouge_of_image(candidate, of_image)
        for candidate, of_image in zip(candidates, references, strict=True)
    ]


def rouge_of_image(candidate: Tokens, references: Sequence[Tokens]) -> float:
    if not candidate:
        return 0.0
    common = [longest_common_subsequence(candidate, reference) for reference in references]
    precision = max(common) / len(candidate)
    recall = max(
        shared / len(reference) if reference else 0.0
        for shared, reference in zip(common, references, strict=True)
    )
    if not precision or not recall:
        return 0.0
    squared = ROUGE_BETA**2
    return (1 + squared) * precision * recall / (recall + squared * precision)


def longest_common_subsequence(first: Tokens, second: Tokens) -> int:
    """How many tokens both have in the same order, others between them or not."""
    lengths = [0] * (len(second) + 1)
    for token in first:
        diagonal = 0
        for place, other in enumerate(second, start=1):
            above = lengths[place]
            lengths[place] = diagonal + 1 if token == other else max(above, lengths[place - 1])
            diagonal = above
    return lengths[-1]
