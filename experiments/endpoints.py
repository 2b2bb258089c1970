"""Requests of experiments to running services over HTTP: completions of a worker, metrics, queries of Prometheus."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from attnstore.http_client import open_url


@dataclass(frozen=True, slots=True)
class Completion:
    """A worker's answer. `cached_tokens` of the prompt's tokens needed no computation."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


def model_name(worker: str, token: str | None, timeout_s: float = 10.0) -> str:
    """Returns the model that a worker serves; `token` if it requires one."""
    return str(_json(f"{worker}/v1/models", timeout_s, token)["data"][0]["id"])


def complete(worker: str, token: str | None, model: str, prompt: str, *, tokens: int, timeout_s: float) -> Completion:
    """Continues a prompt by exactly `tokens` tokens, greedily. Raises `OSError` if that fails or takes longer."""
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{worker}/v1/completions", json.dumps(body).encode(), headers={"content-type": "application/json"}
    )
    answer = _json(request, timeout_s, token)
    usage = answer["usage"]
    return Completion(
        answer["choices"][0]["text"],
        usage["prompt_tokens"],
        usage["completion_tokens"],
        usage["prompt_tokens_details"]["cached_tokens"],
    )


def metric(endpoint: str, name: str, timeout_s: float = 10.0) -> float:
    """Returns the sum of a metric's samples over its labels, from `endpoint`/metrics; 0 if there are none."""
    with open_url(f"{endpoint}/metrics", timeout_s) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return sum(sample.value for family in families for sample in family.samples if sample.name == name)


def query(prometheus: str, expression: str, timeout_s: float = 10.0) -> list[dict[str, Any]]:
    """Returns the series of an instant query. Raises `ValueError` with Prometheus' message if it refuses the expression."""
    try:
        answer = _json(f"{prometheus}/api/v1/query?{urllib.parse.urlencode({'query': expression})}", timeout_s)
    except urllib.error.HTTPError as error:
        raise ValueError(f"{expression}: {error.read().decode(errors='replace')}") from None
    series: list[dict[str, Any]] = answer["data"]["result"]
    return series


def _json(request: str | urllib.request.Request, timeout_s: float, token: str | None = None) -> Any:
    with open_url(request, timeout_s, token=token) as answer:
        return json.load(answer)
