"""HTTP to our own processes: a worker's endpoint, metrics.

Owns: `open_url`, and the syntax of a proxy's URL. Invariant: no request goes through a proxy that only the environment names
(`http_proxy`, `all_proxy`): such proxies are meant for the internet, would see the requests to workers, and cannot reach addresses
of a private network.
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
    """Returns the answer as a context manager; `http_proxy` is the URL of a proxy. Raises what `urllib` raises.

    `token` is sent only to the host of the request, not to a host to which it redirects.
    """
    if token is not None:
        request = urllib.request.Request(request) if isinstance(request, str) else request
        request.add_unredirected_header("Authorization", BEARER + token)
    proxies = {} if http_proxy is None else {"http": http_proxy, "https": http_proxy}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies))
    return cast(http.client.HTTPResponse, opener.open(request, timeout=timeout_s))


def is_http_proxy(url: str) -> bool:
    """Returns whether `url` is a proxy's: `http://host:port`, with `user:password@` before the host if the proxy
    requires a login.
    """
    if not re.fullmatch("[!-~]+", url):
        return False
    try:
        parts = urlsplit(url)
        return parts.scheme == "http" and bool(parts.hostname) and bool(parts.port)
    except ValueError:
        return False
