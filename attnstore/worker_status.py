"""Measured links and costs of workers, for `attnstore status --worker URL`.

Owns: `WorkerStatus`, read from a worker's `GET /planner`. Invariant: a worker that gives no valid answer within the deadline is
shown as such.
"""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from attnstore.http_client import open_url

_ANSWER_BYTES_MAX: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class WorkerLink:
    """A tier as measured by the worker; `spread` is the factor within which the time of a read is expected."""

    tier: str
    rtt_ms: float
    gbit_per_s: float
    spread: float


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One worker. `error` is set if it does not answer; values that it has not measured are None.

    `prefill_tokens_per_s` is for a prompt of 1,024 tokens in chunks of 256, `attend_round_trip_ms` is one exchange with a node that
    attends, `choices` counts prompts by planned choice, `median_error` is the relative error of predicted times to first tokens.
    """

    url: str
    error: str | None = None
    links: tuple[WorkerLink, ...] = ()
    prefill_tokens_per_s: float | None = None
    decode_ms: float | None = None
    attend_round_trip_ms: float | None = None
    choices: tuple[tuple[str, int], ...] = ()
    median_error: float | None = None


async def worker_statuses(
    urls: Sequence[str], deadline_ms: float, http_proxy: str | None = None, token: str | None = None
) -> tuple[WorkerStatus, ...]:
    """Asks all workers at once, with the same token."""
    asked = (asyncio.to_thread(_ask, url.rstrip("/"), deadline_ms, http_proxy, token) for url in urls)
    return tuple(await asyncio.gather(*asked))


def worker_rows(workers: Sequence[WorkerStatus]) -> list[tuple[str, ...]]:
    """Returns the rows of a table, the head first: one row per link of each worker."""
    rows: list[tuple[str, ...]] = [("WORKER", "TIER", "RTT", "GB/S", "+-", "PREFILL", "DECODE", "ATTEND", "ERROR", "CHOICES")]
    for worker in workers:
        if worker.error is not None:
            rows.append((worker.url, *("-" * 8), worker.error))
            continue
        costs = (
            _shown(worker.prefill_tokens_per_s, "{:.0f}/s"),
            _shown(worker.decode_ms, "{:.1f} ms"),
            _shown(worker.attend_round_trip_ms, "{:.2f} ms"),
            _shown(worker.median_error, "{:.0%}"),
            " ".join(f"{choice}:{count}" for choice, count in worker.choices) or "-",
        )
        links = [(link.tier, f"{link.rtt_ms:.1f} ms", f"{link.gbit_per_s / 8:.3g}", f"{link.spread:.2f}") for link in worker.links]
        rows += [(worker.url, *link, *costs) for link in links or [("-",) * 4]]
    return rows


def _ask(url: str, deadline_ms: float, http_proxy: str | None, token: str | None) -> WorkerStatus:
    try:
        if not url.startswith(("http://", "https://")):
            raise ValueError("a worker's URL begins with http:// or https://")
        with open_url(f"{url}/planner?last=0", deadline_ms / 1e3, http_proxy, token) as answer:
            return _parse(url, json.loads(answer.read(_ANSWER_BYTES_MAX)))
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, AttributeError) as error:
        return WorkerStatus(url, error=f"{type(error).__name__}: {error}")


def _parse(url: str, body: dict[str, Any]) -> WorkerStatus:
    costs, predictions = body.get("costs"), body.get("predictions")
    if costs is None or predictions is None:  # a worker without measurements
        return WorkerStatus(url)
    links = [
        WorkerLink(str(tier), float(link["rtt_ms"]), float(link["bytes_per_ms"]) * 8 / 1e6, float(link["spread"]))
        for tier, link in sorted(costs["links"].items())
    ]
    attend = costs.get("attend")
    return WorkerStatus(
        url,
        links=tuple(links),
        prefill_tokens_per_s=_number(costs["prefill_tokens_per_s"]),
        decode_ms=_number(costs["decode_ms"]),
        attend_round_trip_ms=None if attend is None else float(attend["round_trip_ms"]),
        choices=tuple((str(choice), int(count)) for choice, count in sorted(predictions["choices"].items())),
        median_error=_number(predictions["median_error"]),
    )


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
