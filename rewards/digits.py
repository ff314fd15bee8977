"""The digits task's true score: how well a text counts upwards (or downwards) in multiples.

One definition for the data generator, the rewards of PPO and the evaluation. Pure Python.
"""

import re

# ASCII digits alone: int() would also take other alphabets' digits, underscores and blanks. The
# bound keeps int() linear on hostile text and far from Python's limit of 4,300 digits.
NUMBER = re.compile(r"-?[0-9]{1,18}")

# A prompt of the digits task is the first two numbers of a row: one number leaves only 50 prompts,
# none of them new to the model; with three, a third of the score is given before it writes a word.
PROMPT_NUMBERS = 2


def parse_number(word: str) -> int | None:
    """The integer that `word` spells, or None ("4.", "2,", "1e3" and "two" are not numbers)."""
    return int(word) if NUMBER.fullmatch(word) else None


def count_numbers(text: str) -> int:
    """How many of the blank-separated words of `text` are integers.

    Log its mean beside the score: a score can rise because the texts get shorter.
    """
    return sum(parse_number(word) is not None for word in text.split())


def digits_score(
    text: str,
    *,
    increasing: bool = True,
    multiple_of: int = 2,
    min_length: int = 5,
    cut_off: bool = False,
) -> float:
    """Score of a row of numbers, in [0, 1]: ``fits / max(number of words, min_length)``.

    `text` is the whole row, prompt and response together. A word fits if it is an integer, a
    multiple of `multiple_of`, and strictly beyond the number before it: greater when `increasing`,
    smaller otherwise. The first number has none before it, so only its multiple counts. "The number
    before it" is the last integer in the text, whether or not that one fitted itself; so one stray
    high number costs itself or its follower, not the rest of the row. Words that are not integers
    never fit, do count as words, and are skipped by the comparison. Empty text scores 0.

    The floor `min_length` takes away the reward for writing one number and stopping.

    `cut_off` says that the token limit ended the text. Its last word may then be the front half
    of a number ("2" of "24"), which nobody can judge, so it counts neither as a word nor as a
    fit, unless a blank follows it. With a tokenizer that keeps a number in one token (the
    embedded model's, up to 99) nothing is ever cut, and leaving `cut_off` False is exact.

    Raises ValueError if `multiple_of` or `min_length` is below 1.
    """
    if multiple_of < 1 or min_length < 1:
        raise ValueError(
            f"multiple_of and min_length must be at least 1, got {multiple_of} and {min_length}"
        )
    words = text.split()
    if cut_off and words and not text[-1].isspace():
        words.pop()
    fits = 0
    last = None
    for word in words:
        number = parse_number(word)
        if number is None:
            continue
        in_order = last is None or (number > last if increasing else number < last)
        fits += in_order and number % multiple_of == 0
        last = number
    return fits / max(len(words), min_length)
