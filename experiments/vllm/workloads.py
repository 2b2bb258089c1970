"""The workloads of vLLM: documents about which several users ask questions, conversations of several turns, and prompts that nobody
asks again.

Owns: the prompts, from Python's own documentation, and the execution of a workload on an engine. Invariant: every engine gets the
same requests; a later turn contains the answer of vLLM alone, so that all compute the same tokens.
"""

from __future__ import annotations

import pydoc_data.topics
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from experiments.vllm.session import Answers, Batch

DOCUMENT_TOKENS: Final = 1_776
_QUESTIONS: Final = (
    "\n\nQuestion: what is this text about?\nAnswer:",
    "\n\nQuestion: which of these rules is the most surprising one?\nAnswer:",
    "\n\nQuestion: give a short example.\nAnswer:",
)
_TURN: Final = "\n\nUser: {text}\nAssistant:"
_TURN_CHARACTERS: Final = 6_000
_TURN_TOKENS: Final = 320
_ANSWER_TOKENS: Final = 24
_NO_HITS_TOKENS: Final = 640
_NO_HITS_TOKEN_MAX: Final = 30_000

Tokenize = Callable[[str], list[int]]
Ask = Callable[[Batch], Answers]


@dataclass(slots=True)
class Played:
    """The measurements of a workload, and the tokens of every answer in order."""

    ttft_ms: list[float] = field(default_factory=list)
    wall_ms: float = 0.0
    tokens: list[list[int]] = field(default_factory=list)

    def add(self, answers: Answers) -> None:
        """Adds a batch."""
        self.ttft_ms += answers.ttft_ms
        self.wall_ms += answers.wall_ms
        self.tokens += answers.tokens


class Workload(Protocol):
    """Prompts in an order."""

    name: str
    shares: bool
    """Whether engines find pages of each other."""
    waits: bool
    """Whether pages are written before the next request comes."""

    def fill(self, ask: Ask) -> None:
        """Computes what other processes are assumed to have computed before."""
        ...

    def play(self, ask: Ask, known: Sequence[list[int]] | None) -> Played:
        """Runs all requests; `known` are the answers of vLLM alone, or None if this is vLLM alone."""
        ...


class SharedDocuments:
    """Each question about each document comes from another user, one after the other."""

    name = "shared_document"
    shares = True
    waits = True

    def __init__(self, tokenize: Tokenize, documents: int, questions: int) -> None:
        text = tokenize("\n\n".join(pydoc_data.topics.topics.values())[:200_000])
        # Every document begins at another offset, so that no two share a block.
        self._documents = [text[begin : begin + DOCUMENT_TOKENS] for begin in range(0, documents * 2_000, 2_000)]
        self._questions = [tokenize(question) for question in _QUESTIONS[:questions]]

    def fill(self, ask: Ask) -> None:
        """One earlier user asked about each document."""
        for document in self._documents:
            ask(Batch([document], 1))

    def play(self, ask: Ask, known: Sequence[list[int]] | None) -> Played:
        """See `Workload`."""
        del known
        played = Played()
        for document in self._documents:
            for question in self._questions:
                played.add(ask(Batch([document + question], _ANSWER_TOKENS)))
        return played


class MultiTurn:
    """Conversations that progress together, turn by turn; between turns other users replace them in the engine's cache."""

    name = "multi_turn"
    shares = False
    waits = True

    def __init__(self, tokenize: Tokenize, conversations: int, turns: int) -> None:
        text = "\n\n".join(sorted(pydoc_data.topics.topics.values()))
        begins = range(0, _TURN_CHARACTERS * conversations * turns, _TURN_CHARACTERS)
        parts = [tokenize(_TURN.format(text=text[begin:][:_TURN_CHARACTERS]))[:_TURN_TOKENS] for begin in begins]
        self._said = [parts[user::conversations] for user in range(conversations)]

    def fill(self, ask: Ask) -> None:
        """No-op: each turn writes what the next one reads."""

    def play(self, ask: Ask, known: Sequence[list[int]] | None) -> Played:
        """See `Workload`."""
        played = Played()
        histories: list[list[int]] = [[] for _ in self._said]
        for turn in range(len(self._said[0])):
            prompts = [history + said[turn] for history, said in zip(histories, self._said, strict=True)]
            played.add(ask(Batch(prompts, _ANSWER_TOKENS)))
            given = (played.tokens if known is None else known)[turn * len(prompts) :]
            histories = [prompt + list(answer) for prompt, answer in zip(prompts, given, strict=False)]
        return played


class NoHits:
    """Prompts without a common block, some at a time and without a pause: what saving costs where nothing is ever read."""

    name = "no_hits"
    shares = False
    waits = False

    def __init__(self, batches: int, prompts: int) -> None:
        tokens = random.Random(0)
        self._batches = [
            [[tokens.randrange(1_000, _NO_HITS_TOKEN_MAX) for _ in range(_NO_HITS_TOKENS)] for _ in range(prompts)]
            for _ in range(batches)
        ]

    def fill(self, ask: Ask) -> None:
        """No-op: nothing is read."""

    def play(self, ask: Ask, known: Sequence[list[int]] | None) -> Played:
        """See `Workload`."""
        del known
        played = Played()
        for prompts in self._batches:
            played.add(ask(Batch(prompts, _ANSWER_TOKENS)))
        return played
