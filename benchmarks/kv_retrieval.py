"""Keys hidden in a long text, and whether a model finds them again.

The text is the prompt. Question and number are read as the answer, so that selections which choose
for answers only have something to choose.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from benchmarks.kv_reader import Reader
from polydelta.engine.models.tokenizer import Tokenizer

# One line alone, or one of several that differ in the name only.
NEEDLE, MULTI_KEY = "needle", "multi-key"
LINES = 8
NAMES = ("Berlin", "Cairo", "Dublin", "London", "Madrid", "Paris", "Rome", "Tokyo")
DIGITS = 5
# From so many tokens on, one line alone is hidden at one depth only: such texts take seconds.
LONG = 4096


@dataclass(frozen=True)
class Haystack:
    """A text with keys, and questions for some of them."""

    task: str
    # Tokens of all, questions and answers included.
    length: int
    tokens: Sequence[int]
    # How many of them are the text.
    prompt: int
    # Of the numbers that were asked for, in `tokens`.
    answers: Sequence[range]


@dataclass
class Score:
    """How many digits were the most likely ones, and how many numbers as a whole."""

    digits: int = 0
    right_digits: int = 0
    keys: int = 0
    right_keys: int = 0

    @property
    def digits_share(self) -> float:
        return self.right_digits / self.digits

    @property
    def keys_share(self) -> float:
        return self.right_keys / self.keys

    def add(self, right: Sequence[bool]) -> None:
        """Of one key."""
        self.digits += len(right)
        self.right_digits += sum(right)
        self.keys += 1
        self.right_keys += all(right)

    def __iadd__(self, other: Score) -> Score:
        self.digits += other.digits
        self.right_digits += other.right_digits
        self.keys += other.keys
        self.right_keys += other.right_keys
        return self


# By task and length.
Scores = dict[tuple[str, int], Score]


def haystacks(
    tokenizer: Tokenizer, filler: Sequence[int], lengths: Sequence[int], depths: Sequence[float]
) -> list[Haystack]:
    """For each length a text for each depth with one line there, and a text with `LINES` lines, of
    which those nearest to the depths are asked one after the other. Long texts have their one line
    at the depth in the middle. filler: tokens of the text. Raises ValueError for a length without
    room."""
    random = Random(0)
    made = []
    for length in lengths:
        for depth in depths if length < LONG else [depths[len(depths) // 2]]:
            made.append(_haystack(NEEDLE, tokenizer, filler, length, [depth], [0], random))
        places = [(line + 0.5) / LINES for line in range(LINES)]
        asked = [int(depth * LINES) for depth in depths]
        made.append(_haystack(MULTI_KEY, tokenizer, filler, length, places, asked, random))
    return made


def _haystack(
    task: str,
    tokenizer: Tokenizer,
    filler: Sequence[int],
    length: int,
    depths: Sequence[float],
    asked: Sequence[int],
    random: Random,
) -> Haystack:
    """depths: of the lines, ascending; asked: which of them."""

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    names = random.sample(NAMES, len(depths))
    numbers = [str(random.randrange(10 ** (DIGITS - 1), 10**DIGITS)) for _ in depths]
    facts = [f"The special number of {name} is " for name in names]
    lines = [ids(f"\n\n{fact}{number}.\n\n") for fact, number in zip(facts, numbers, strict=True)]
    # What is asked, one part after the other, and whether it is a number.
    questions = [(ids(f"\n\n{facts[line]}"), ids(numbers[line])) for line in asked]
    room = length - sum(map(len, lines)) - sum(len(q) + len(a) for q, a in questions)
    if room < 0:
        raise ValueError(f"{length} tokens have no room for {len(lines)} lines and the questions.")
    tokens: list[int] = []
    begin = 0
    for depth, line in zip(depths, lines, strict=True):
        end = int(depth * room)
        tokens += [*filler[begin:end], *line]
        begin = end
    tokens += filler[begin:room]
    prompt, answers = len(tokens), []
    for question, number in questions:
        tokens += [*question, *number]
        answers.append(range(len(tokens) - len(number), len(tokens)))
    return Haystack(task, length, tokens, prompt, answers)


def search(reader: Reader, haystack: Haystack) -> Score:
    """Asks for the keys of one text."""
    likeliest = torch.zeros(len(haystack.tokens), dtype=torch.int64)

    def take(place: int, logits: Tensor) -> None:
        likeliest[place + 1 : place + 1 + len(logits)] = logits.argmax(-1)

    reader.read(haystack.tokens, haystack.prompt, take)
    score = Score()
    for answer in haystack.answers:
        score.add([int(likeliest[at]) == haystack.tokens[at] for at in answer])
    return score


def no_scores() -> Scores:
    return defaultdict(Score)
