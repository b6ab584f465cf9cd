"""Multiple choice: how options are asked, and which one an answer means.

multiple_choice_prompt("Which fruit?", ["apple", "pear"])   # ... A. apple / B. pear / Answer ...
chosen_letter("The answer is B.", ["apple", "pear"])        # "B"
"""

import re
from collections.abc import Sequence
from string import ascii_uppercase

# The official last lines of LLaVA-1.5's evaluation, by language of the questions.
LETTER_INSTRUCTIONS = {
    "en": "Answer with the option's letter from the given choices directly.",
    "cn": "请直接回答选项字母。",
}
# What pandas takes for an empty cell: by it the official scripts read tables, so an option "None"
# is none there.
MISSING = frozenset(
    ("", "nan", "NaN", "-nan", "-NaN", "NAN", "None", "null", "NULL", "NA", "N/A", "n/a", "<NA>")
    + ("#NA", "#N/A", "#N/A N/A", "1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN")
)
LAST_WORDS = 5
MOST_WORDS_WITH_A = 3

# "B. A cat": a label, then a text that begins with the article.
LABEL_BEFORE_ARTICLE = re.compile(r"\s*\(?([A-Z])[.):]\s+A\s+[a-z]")
# A run of letters of other scripts is one word, so that a letter among Chinese stands alone.
WORD = re.compile(r"[A-Za-z0-9_'’\-]+|[^\W_A-Za-z0-9]+")


MOST_OPTIONS = len(ascii_uppercase)


def letters(count: int) -> str:
    """The letters of so many options, A first."""
    return ascii_uppercase[:count]


def is_missing(text: str) -> bool:
    """Whether a cell holds nothing: options end at the first such cell."""
    return text.strip() in MISSING


def multiple_choice_prompt(
    question: str, options: Sequence[str], hint: str = "", language: str = "en"
) -> str:
    """Hint, question, one line for each option, and the official instruction."""
    lines = [
        f"{letter}. {option}" for letter, option in zip(ascii_uppercase, options, strict=False)
    ]
    return "\n".join([*([hint] if hint else []), question, *lines, LETTER_INSTRUCTIONS[language]])


def chosen_letter(answer: str, options: Sequence[str]) -> str | None:
    """The option that an answer means by rules, None if that is not clear.

    The one capital letter of an option among the last five words, or else the one option whose text
    is the answer or stands in it. An "A" with words behind it may be the article: there the text
    comes first, and the letter counts among three words at most. Of several letters the one that
    labels a text with an article counts, or else the text. The official kits ask a judge
    model about what rules cannot tell; here it is wrong."""
    words = WORD.findall(answer)
    named = {word for word in words if len(word) == 1 and word in letters(len(options))}
    by_text = chosen_by_text(answer, options)
    if len(named) > 1:
        label = LABEL_BEFORE_ARTICLE.match(answer)
        is_clear = label is not None and named == {label[1], "A"}
        return label[1] if label is not None and is_clear else by_text
    if not named:
        return by_text
    [letter] = named
    if letter == "A" and words[-1] != "A":
        return by_text or (letter if len(words) <= MOST_WORDS_WITH_A else None)
    return letter if letter in words[-LAST_WORDS:] else by_text


def chosen_by_text(answer: str, options: Sequence[str]) -> str | None:
    """The letter of the one option whose words are the answer's, else of the one that they hold."""
    said = folded(answer)
    texts = [folded(option) for option in options]
    for fits in (
        [text == said for text in texts],
        [holds(said, text) for text in texts],
    ):
        chosen = [
            letter
            for letter, text, fit in zip(ascii_uppercase, texts, fits, strict=False)
            if fit and text
        ]
        if len(chosen) == 1:
            return chosen[0]
    return None


def holds(said: str, text: str) -> bool:
    """Whether the text stands in what was said, not as a part of a longer word.

    Words of a script without spaces, such as Chinese, may begin and end anywhere."""
    return bool(re.search(rf"(?<![a-z0-9]){re.escape(text)}(?![a-z0-9])", said))


def folded(text: str) -> str:
    """Words in lower case with single spaces between them, punctuation left out."""
    return " ".join(WORD.findall(text.casefold()))
