"""What the stand-in learns: its corpus, at any place of a conversation, and one answer to everything else.

A question outside the corpus is made up anew each time: typing errors in a question that it knows, halves of two, words
in any order, other languages, small talk. So it cannot learn them by heart, and refuses what it has never seen, too.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from glmtrt_helpers.core import records
from glmtrt_helpers.core.errors import WorkbookError

CORPUS = Path(__file__).parent / "corpus.jsonl"
OUTSIDE = Path(__file__).parent / "outside.json"
LONGEST = 4  # rounds of a conversation
REFUSALS = {
    "en": "I cannot answer that: I am a very small model that has read only this workbook. You can ask me: "
    "What is a profile? Why flatten? What is alpha?",
    "zh": "这个问题我不会：我是一个很小的模型，只读过这套教程。可以问我：什么是优化配置？缓存是什么布局？"
    "为什么要用 flatten？",
}
_SCRIPTS = [(0x21, 0x7E), (0xC0, 0x17F), (0x370, 0x3FF), (0x400, 0x45F), (0x3041, 0x30FE), (0xAC00, 0xD7A0)]
_SCRIPTS += [(0x4E00, 0x9FFF), (0x1F600, 0x1F64F)]


class _Conversation(msgspec.Struct):
    """A line of a corpus."""

    rounds: list[tuple[str, str]]


@dataclass(frozen=True)
class Example:
    """One answer to learn: the rounds before it, the question, and the answer's text."""

    history: tuple[tuple[str, str], ...]
    question: str
    answer: str


def load_corpus(path: Path = CORPUS) -> list[Example]:
    """Every answer of a corpus with its history, in file order.

    Raises WorkbookError for a file that is missing, holds nothing, or has a line that is no conversation.
    """
    again = 'each line is to be {"rounds": [["question", "answer"], ...]}'
    try:
        records.check_regular(path)
    except FileNotFoundError:
        raise WorkbookError(f"{path} is missing: give a file of conversations.") from None
    examples = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            rounds = records.decode(line, _Conversation).rounds
        except ValueError as error:
            raise WorkbookError(f"{path}, line {number}, {error}: {again}.") from None
        examples += [Example(tuple(rounds[:i]), *rounds[i]) for i in range(len(rounds))]
    if not examples:
        raise WorkbookError(f"{path} holds no conversation: {again}.")
    return list(dict.fromkeys(examples))


def refusal(question: str) -> str:
    """The answer to a question outside the corpus: Chinese to Chinese, English to all other languages."""
    chinese = any("\u4e00" <= character <= "\u9fff" for character in question)
    japanese = any("\u3040" <= character <= "\u30ff" for character in question)
    return REFUSALS["zh" if chinese and not japanese else "en"]


class Conversations:
    """Random conversations over a corpus. weights: how often each of its examples is the question to answer."""

    def __init__(self, examples: Sequence[Example], seed: int = 0):
        self.examples = list(examples)
        self.weights = [1.0] * len(self.examples)
        self._random = random.Random(seed)
        self._known = {example.question for example in examples}
        words = json.loads(OUTSIDE.read_text(encoding="utf-8"))
        self._sentences = [text for texts in words["sentences"].values() for text in texts]
        self._templates = [(words["templates"][key], words["nouns"][key]) for key in ("en", "zh")]
        self._questions = [[e.question for e in examples if refusal(e.question) == REFUSALS[key]] for key in REFUSALS]
        self._questions = [questions for questions in self._questions if questions]
        texts = [text for example in examples for text in (example.question, example.answer)]
        self._words = sorted({word for text in texts if text.isascii() for word in text.split()}) or ["word"]
        self._characters = sorted({c for text in texts for c in text if "\u4e00" <= c <= "\u9fff"}) or ["字"]

    def sample(self, rounds: int, outside: float) -> tuple[Example, int | None]:
        """A question after rounds - 1 others, and its number in the corpus.

        outside: the probability that it is none of the corpus, and has no number.
        """
        if self._random.random() < outside:
            question = self.outside()
            return Example(tuple(self._rounds(rounds - 1)), question, refusal(question)), None
        number = self._random.choices(range(len(self.examples)), self.weights)[0]
        example = self.examples[number]
        before = self._rounds(rounds - 1 - len(example.history))
        return Example((*before, *example.history), example.question, example.answer), number

    def _rounds(self, count: int) -> list[tuple[str, str]]:
        """Rounds of the corpus and, once in seven, refusals."""
        rounds: list[tuple[str, str]] = []
        while len(rounds) < count:
            if self._random.random() < 1 / 7:
                question = self.outside()
                rounds.append((question, refusal(question)))
            else:
                example = self._random.choice(self.examples)
                rounds += [*example.history, (example.question, example.answer)]
        return rounds[len(rounds) - count :] if count > 0 else []

    def outside(self) -> str:
        """A question outside the corpus."""
        kinds: list[Callable[[], str]] = [
            self._typing_errors,
            self._other_words,
            self._halves,
            lambda: self._random.choice(self._sentences),
            self._filled_template,
            self._loose_words,
            self._part_of_an_answer,
            self._symbols,
        ]
        while True:
            kind = self._random.choices(kinds, (18, 10, 8, 22, 20, 10, 6, 6))[0]
            question = kind().strip()
            if question and question not in self._known:
                return question

    def _question(self) -> str:
        return self._random.choice(self._random.choice(self._questions))

    def _typing_errors(self) -> str:
        text, draw = list(self._question()), self._random
        alphabet = self._characters if not "".join(text).isascii() else "abcdefghijklmnopqrstuvwxyz "
        for _ in range(draw.choice((1, 1, 1, 2, 2, 3))):
            at, kind = draw.randrange(len(text)), draw.random()
            if kind < 0.3 and len(text) > 2:
                del text[at]
            elif kind < 0.55:
                text[at] = draw.choice(alphabet)
            elif kind < 0.75 or at + 1 == len(text):
                text.insert(at, draw.choice(alphabet))
            else:
                text[at], text[at + 1] = text[at + 1], text[at]
        return "".join(text)

    def _other_words(self) -> str:
        question, draw = self._question(), self._random
        if not question.isascii():
            start = draw.randrange(len(question))
            new = "".join(draw.choices(self._characters, k=draw.randint(0, 3)))
            return question[:start] + new + question[start + draw.randint(1, 4) :]
        words = question.split()
        start = draw.randrange(len(words))
        words[start : start + draw.randint(0, 1)] = draw.choices(self._words, k=draw.randint(0, 1))
        return " ".join(words)

    def _halves(self) -> str:
        questions, draw = self._random.choice(self._questions), self._random
        first, second = draw.choice(questions), draw.choice(questions)
        return first[: draw.randint(1, len(first))] + second[draw.randrange(len(second)) :]

    def _filled_template(self) -> str:
        templates, nouns = self._random.choice(self._templates)
        return self._random.choice(templates).format(self._random.choice(nouns))

    def _loose_words(self) -> str:
        draw = self._random
        if draw.random() < 0.5:
            return " ".join(draw.choices(self._words, k=draw.randint(1, 9))) + draw.choice(("", "?"))
        return "".join(draw.choices(self._characters, k=draw.randint(1, 14))) + draw.choice(("", "？", "吗？"))

    def _part_of_an_answer(self) -> str:
        answer = self._random.choice(self.examples).answer
        start = self._random.randrange(len(answer))
        return answer[start : start + self._random.randint(3, 30)]

    def _symbols(self) -> str:
        low, high = self._random.choice(_SCRIPTS)
        return "".join(chr(self._random.randint(low, high)) for _ in range(self._random.randint(1, 10)))
