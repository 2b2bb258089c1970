"""`python -m experiments.walkthrough`: a tour of a running cluster that checks whether it works.

Each prompt is computed by one worker and then sent to the other, which must find its pages in the store and return the same text;
every node must hold pages, and every query of the dashboard must return data. Exit status 0 if all of that holds.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from attnstore.command_line import CommandParser
from attnstore.environment import variable
from attnstore.option_types import file_to_write
from experiments.endpoints import Completion, complete, metric, model_name, query
from experiments.options import COUNT

_ANSWER_S_MAX: Final = 300.0
_SETTLE_S_MAX: Final = 60.0
_DATA_S_MAX: Final = 90.0
"""A rate needs two scrapes."""
_POLL_S: Final = 0.5
_PROMPT_CHARACTERS: Final = 2_400
_RATE_INTERVAL: Final = "1m"
_HIT_SHARE_MIN: Final = 0.5
"""Not all, because the planner computes what it expects to compute sooner than to fetch."""


@dataclass(frozen=True, slots=True)
class Tour:
    """The observations. `pages` are those that each node holds; `silent` queries of the dashboard returned no data."""

    prompts: int
    prompt_tokens: int
    hit_tokens: int
    hit_tokens_possible: int
    texts_equal: int
    computed_s: float
    shared_s: float
    pages: dict[str, int]
    queries: int
    silent: list[str]

    @property
    def is_good(self) -> bool:
        """True if the cluster works."""
        return (
            self.texts_equal == self.prompts
            and self.hit_tokens >= _HIT_SHARE_MIN * self.hit_tokens_possible
            and all(self.pages.values())
            and not self.silent
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Takes the tour. Returns 0 if everything was as expected."""
    options = _parser().parse_args(argv)
    tour = take_tour(options.workers, options.nodes, options.prometheus, dashboard_queries(options.dashboard), options.prompts)
    print(_told(tour))
    if options.json is not None:
        options.json.write_text(json.dumps(asdict(tour) | {"good": tour.is_good}, indent=1) + "\n")
    return 0 if tour.is_good else 1


def take_tour(workers: Sequence[str], nodes: Sequence[str], prometheus: str, queries: Sequence[str], prompts: int) -> Tour:
    """Sends prompts to the first worker, then to the others in turn, and inspects nodes and metrics."""
    model = model_name(workers[0], variable("worker_token"))
    texts = _prompts(prompts)
    cold, computed_s = _timed(lambda: [_ask(workers[0], model, text) for text in texts])
    blocks = sum(answer.prompt_tokens // 16 for answer in cold)
    _until(lambda: sum(_pages(nodes).values()) >= blocks, _SETTLE_S_MAX)
    others = workers[1:]
    warm, shared_s = _timed(lambda: [_ask(others[index % len(others)], model, text) for index, text in enumerate(texts)])
    silent = list(queries)

    def has_data() -> bool:
        silent[:] = [expression for expression in silent if not query(prometheus, expression)]
        return not silent

    _until(has_data, _DATA_S_MAX)
    return Tour(
        prompts=prompts,
        prompt_tokens=sum(answer.prompt_tokens for answer in warm),
        hit_tokens=sum(answer.cached_tokens for answer in warm),
        hit_tokens_possible=sum((answer.prompt_tokens - 1) // 16 * 16 for answer in warm),
        texts_equal=sum(left.text == right.text for left, right in zip(cold, warm, strict=True)),
        computed_s=computed_s,
        shared_s=shared_s,
        pages=_pages(nodes),
        queries=len(queries),
        silent=silent,
    )


def dashboard_queries(path: Path) -> list[str]:
    """Returns the expressions of a Grafana dashboard's panels, with its interval variable filled in."""
    panels = json.loads(path.read_text())["panels"]
    expressions = (target["expr"] for panel in panels for target in panel.get("targets", ()))
    return [expression.replace("$__rate_interval", _RATE_INTERVAL) for expression in expressions]


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser("python -m experiments.walkthrough", description="A tour of a running cluster.")
    add = parser.add_argument
    add("--workers", type=_urls, required=True, metavar="URL,URL", help="workers; the first computes, the others share")
    add("--nodes", type=_urls, required=True, metavar="URL,...", help="the nodes' metrics endpoints")
    add("--prometheus", required=True, metavar="URL")
    add("--dashboard", type=Path, required=True, metavar="FILE", help="Grafana dashboard whose queries must return data")
    add("--prompts", type=COUNT, default=8, metavar="N", help="prompts to share (default 8)")
    add("--json", type=file_to_write, metavar="PATH", help="write what was seen")
    return parser


def _urls(text: str) -> list[str]:
    return text.split(",")


def _prompts(count: int) -> list[str]:
    """Returns texts with different beginnings, so that no two share a page: chapters of Python's own manual."""
    topics = pydoc_data.topics.topics
    chapters: Iterable[str] = (topics[name] for name in sorted(topics) if len(topics[name]) >= _PROMPT_CHARACTERS)
    return [chapter[:_PROMPT_CHARACTERS] for _, chapter in zip(range(count), chapters, strict=False)]


def _ask(worker: str, model: str, prompt: str) -> Completion:
    return complete(worker, variable("worker_token"), model, prompt, tokens=16, timeout_s=_ANSWER_S_MAX)


def _pages(nodes: Sequence[str]) -> dict[str, int]:
    return {node: int(metric(node, "attnstore_pages_sealed")) for node in nodes}


def _timed(work: Callable[[], list[Completion]]) -> tuple[list[Completion], float]:
    began_s = time.perf_counter()
    return work(), time.perf_counter() - began_s


def _until(is_so: Callable[[], bool], timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_so() and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)


def _told(tour: Tour) -> str:
    lines = [
        f"{tour.prompts} prompts, {tour.prompt_tokens:,} tokens: computed by the first worker in {tour.computed_s:.1f} s",
        f"the other worker found {tour.hit_tokens:,} of {tour.hit_tokens_possible:,} tokens in the store: {tour.shared_s:.1f} s",
        f"texts equal: {tour.texts_equal} of {tour.prompts}",
        *(f"{node} holds {pages:,} pages" for node, pages in tour.pages.items()),
        f"{tour.queries - len(tour.silent)} of {tour.queries} queries of the dashboard return data",
        *(f"no data: {expression}" for expression in tour.silent),
        "all as it should be" if tour.is_good else "NOT as it should be",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
