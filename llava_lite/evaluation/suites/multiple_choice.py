"""Multiple choice: the prompt, and the option that an answer names.

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
# Empty cells for pandas. The official scripts use pandas, so an option "None" is missing.
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
    """The letters of `count` options, from A on."""
    return ascii_uppercase[:count]


def is_missing(text: str) -> bool:
    """Whether a cell is empty. The options end at the first empty cell."""
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
    """The letter of the option that an answer names; None if that is unclear.

    First rule: the only option letter, if it is among the last five words. Second rule: the only
    option whose text is the answer, or is in the answer. An "A" before other words may be the
    article: then the text comes first, and the letter counts only among at most three words. With
    several letters, the letter that labels a text with an article counts, else the text. The
    official kits ask a judge model about unclear answers; here they are wrong."""
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
    """The letter of the only option that equals the answer, else of the only one in the answer."""
    said = fold(answer)
    texts = [fold(option) for option in options]
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
    """Whether the text is in the answer, and not a part of a longer word.

    In a script without spaces, such as Chinese, words may begin and end anywhere."""
    return bool(re.search(rf"(?<![a-z0-9]){re.escape(text)}(?![a-z0-9])", said))


def fold(text: str) -> str:
    """Words in lower case with single spaces between them, punctuation left out."""
    return " ".join(WORD.findall(text.casefold()))
