"""HTTP to our own processes: a worker's endpoint, metrics.

Owns: `open_url`, and what a proxy's URL is. Invariant: no request goes through a proxy that only the environment names
(`http_proxy`, `all_proxy`): those are meant for the internet, would see what workers are asked, and know no address of a private
network.
"""

from __future__ import annotations

import http.client
import re
import urllib.request
from typing import cast
from urllib.parse import urlsplit

from attnstore.tokens import BEARER


def open_url(
    request: str | urllib.request.Request, timeout_s: float, http_proxy: str | None = None, token: str | None = None
) -> http.client.HTTPResponse:
    """The answer, to be used in a `with`; `http_proxy` is the URL of a proxy to go through. Raises what `urllib` raises.

    `token` is shown to the host of the request alone, and to no other one that it redirects to.
    """
    if token is not None:
        request = urllib.request.Request(request) if isinstance(request, str) else request
        request.add_unredirected_header("Authorization", BEARER + token)
    proxies = {} if http_proxy is None else {"http": http_proxy, "https": http_proxy}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies))
    return cast(http.client.HTTPResponse, opener.open(request, timeout=timeout_s))


def is_http_proxy(url: str) -> bool:
    """Whether a proxy can be at `url`: `http://host:port`, with `user:password@` before the host where it asks for them."""
    if not re.fullmatch("[!-~]+", url):
        return False
    try:
        parts = urlsplit(url)
        return parts.scheme == "http" and bool(parts.hostname) and bool(parts.port)
    except ValueError:
        return False
