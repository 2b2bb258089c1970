"""Invalid certificates: a node does not start with one, and a client that meets one learns that TLS is the reason."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

import attnstore
from attnstore import errors
from attnstore.client.health import check_serving
from attnstore.errors import InvalidArgument
from attnstore.server.certificate import Certificate
from attnstore.testing import StoreProcess
from attnstore.testing.ports import free_port
from tests.certificates import Pair, make_pair
from tests.samples import SMALL, Batch

DAY_S = 86_400.0
BatchOf = Callable[..., Batch]


def refused(*options: str) -> str:
    with pytest.raises(RuntimeError) as caught:
        StoreProcess("--capacity", "1MiB", *options)
    return str(caught.value)


def test_a_node_does_not_start_with_a_certificate_that_is_not_valid_today(tmp_path: Path) -> None:
    old = make_pair(tmp_path, "old", begins_days=-9, ends_days=-2)
    new = make_pair(tmp_path, "new", begins_days=2, ends_days=9)
    for pair, words in ((old, r"expired on \d{4}-\d\d-\d\d .*renew it"), (new, r"is not valid before \d{4}-\d\d-\d\d .*clock")):
        message = refused(*pair.options)
        assert re.search(f"--tls-cert {pair.cert} {words}", message), message
        assert "Traceback" not in message


def test_a_certificate_that_expires_soon_is_told_with_its_days_and_shown_to_prometheus(tmp_path: Path) -> None:
    port = free_port()
    for days, soon in ((3.5, True), (60, False)):
        pair = make_pair(tmp_path, f"{days}", ends_days=days)
        with StoreProcess("--capacity", "1MiB", "--metrics-port", str(port), *pair.options) as node:
            assert ("days_left=3" in re.sub(r"\x1b\[\d*m", "", node.log)) == soon, node.log
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                text = answer.read().decode()
            shown = float(re.findall(r"^attnstore_certificate_expiry_timestamp_seconds (\S+)$", text, re.MULTILINE)[0])
            assert shown == Certificate.load(pair.cert, pair.key).ends_s


def test_the_dates_of_a_certificate_are_judged_to_the_second(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "node", ends_days=90)
    certificate = Certificate.load(pair.cert, pair.key)
    assert certificate.ends_s - certificate.begins_s == 91 * DAY_S
    certificate.check(certificate.begins_s)
    certificate.check(certificate.ends_s)
    for wrong_s in (certificate.begins_s - 1, certificate.ends_s + 1):
        with pytest.raises(InvalidArgument):
            certificate.check(wrong_s)
    assert certificate.days_left(certificate.ends_s - 14 * DAY_S) is None
    assert certificate.days_left(certificate.ends_s - 14 * DAY_S + 1) == 13
    assert certificate.days_left(certificate.ends_s) == 0


@contextmanager
def foreign_server(pair: Pair) -> Iterator[str]:
    """A server with any certificate, like a node whose certificate expired while it was running."""
    server = grpc.server(futures.ThreadPoolExecutor(1))
    credentials = grpc.ssl_server_credentials([(pair.key.read_bytes(), pair.cert.read_bytes())])
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield f"grpcs://127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


def told(target: str, tls_ca: Path | None) -> list[str]:
    """Returns what a client, the health check and the command `status` report about a target."""
    messages = []
    with attnstore.connect(target, tls_ca=tls_ca, deadline_ms=5_000) as client:
        with pytest.raises(errors.Unavailable) as caught:
            client.describe()
        messages.append(str(caught.value))
    with pytest.raises(errors.Unavailable) as caught:
        check_serving(target, deadline_ms=5_000, tls_ca=tls_ca)
    messages.append(str(caught.value))
    command = [sys.executable, "-m", "attnstore.cli", "status", target]
    command += [] if tls_ca is None else ["--tls-ca", str(tls_ca)]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert shown.returncode == 1
    return [*messages, shown.stderr]


def test_whoever_meets_a_certificate_that_is_no_use_is_told_why(tmp_path: Path) -> None:
    good = make_pair(tmp_path, "good")
    for pair, tls_ca, words in (
        (make_pair(tmp_path, "old", begins_days=-9, ends_days=-2), None, "has expired: renew it"),
        (make_pair(tmp_path, "new", begins_days=2, ends_days=9), None, "is not valid yet"),
        (make_pair(tmp_path, "elsewhere", host="store.example.org"), None, "is for another name"),
        (good, make_pair(tmp_path, "other").cert, "of no authority that is trusted here: name the right one as tls_ca"),
    ):
        with foreign_server(pair) as url:
            for message in told(url, tls_ca or pair.cert):
                assert words in message, message


def test_whoever_mixes_up_tls_and_none_is_told_what_to_say(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "node")
    with StoreProcess("--capacity", "1MiB") as plain, StoreProcess("--capacity", "1MiB", *pair.options) as secure:
        for message in told(f"grpcs://{plain.address}", pair.cert):
            assert "does not speak TLS: say grpc://" in message, message
        for message in told(secure.url, None):
            assert "speaks TLS: say grpcs://" in message, message
    for message in told(plain.url, None):
        assert "TLS" not in message, "a node that is gone is not taken for one that wants TLS"


def test_a_node_is_asked_once_whether_it_wants_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = threading.Semaphore(0)

    def count(error: errors.Unavailable, _address: object, _left_s: float) -> errors.Unavailable:
        asked.release()
        return error

    monkeypatch.setattr("attnstore.client.transports.rpc.explained", count)
    with attnstore.connect(f"grpc://127.0.0.1:{free_port()}", deadline_ms=5_000) as client:
        for _ in range(3):
            with pytest.raises(errors.Unavailable):
                client.describe()
    assert asked.acquire(blocking=False)
    assert not asked.acquire(blocking=False)


def test_a_worker_trusts_the_authority_that_it_is_told_of(tmp_path: Path, batch_of: BatchOf) -> None:
    from attnstore_worker.cache import open_store

    pair = make_pair(tmp_path, "node")
    with StoreProcess("--capacity", "1MiB", *pair.options) as node:
        url = f"grpcs://{node.address}"
        with open_store(url, deadline_ms=5_000, tls_ca=pair.cert) as store:
            batch = batch_of(1)
            store.register_layout(batch.namespace, SMALL)
        with open_store(url, deadline_ms=5_000) as store, pytest.raises(errors.Unavailable, match="no authority that is trusted"):
            store.register_layout(batch.namespace, SMALL)
