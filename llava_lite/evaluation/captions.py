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
DROPPED = frozenset("'\"`.?!,:;-")
TITLES = "mr|mrs|ms|dr|st|jr|sr|vs|etc|prof"
TOKEN = re.compile(
    rf"""
    \b(?:[^\W\d_]\.){{2,}}                  # u.s.
    | \b(?:{TITLES})\.                      # mr.
    | \d+(?:[.,:/]\d+)*(?![\w'])            # 1,000  5.50  10:30  1/2
    | '?\w+(?:[-'/]\w+)*'?                  # dog  t-shirt  man's  and/or  'n'
    | [^\w\s]
    """,
    re.VERBOSE,
)
CLITIC = re.compile(r"(?<=[^\W\d_])(n't|'(?:s|m|d|re|ve|ll))$")
TWO_WORDS = {
    "cannot": ("can", "not"),
    "gonna": ("gon", "na"),
    "wanna": ("wan", "na"),
    "gotta": ("got", "ta"),
    "gimme": ("gim", "me"),
    "lemme": ("lem", "me"),
}


def tokenize(caption: str) -> list[str]:
    """Words much as the Penn Treebank tokeniser of the COCO evaluation makes them.

    Lower case; n't, 's and their kind are tokens; numbers, hyphenated words and abbreviations stay
    whole; quotes and . ? ! , : ; - are dropped; brackets become -lrb- and so on, which the
    reference tokeniser in fact keeps. Rarer rules of that tokeniser are left out."""
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
    if clitic and clitic.start():
        return [token[: clitic.start()], clitic.group()]
    return [token]
