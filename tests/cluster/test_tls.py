"""A cluster in which everything is encrypted: nodes, clients and hand-over use TLS."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import attnstore
from attnstore import errors
from tests.cluster.conftest import Cluster, hits_and_no_wrong_byte, stored
from tests.samples import Batch

pytestmark = pytest.mark.redis


def test_nodes_serve_and_hand_over_over_tls(certificates: Path, batch_of: Callable[..., Batch]) -> None:
    authority = certificates / "cert.pem"
    encrypted = ("--tls-cert", str(authority), "--tls-key", str(certificates / "key.pem"), "--peer-ca", str(authority))
    cluster = Cluster("ada", "bob", options=encrypted)
    try:
        with attnstore.connect(cluster.url, tls_ca=authority) as client:
            batch = stored(client, batch_of(500))
            assert all(member.url.startswith("grpcs://") for member in client.members())
            drain = ["drain", "bob", "--wait", "30", "--directory", cluster.url, "--tls-ca", str(authority)]
            assert subprocess.run([sys.executable, "-m", "attnstore.cli", *drain], check=False, timeout=60).returncode == 0
            cluster.nodes.pop("bob").stop()
            assert hits_and_no_wrong_byte(client, batch) == 500
        wary = attnstore.connect(cluster.url, tls_ca=certificates / "other.pem", deadline_ms=3_000)
        with wary as client, pytest.raises(errors.Retryable):
            client.describe()
    finally:
        cluster.close()
