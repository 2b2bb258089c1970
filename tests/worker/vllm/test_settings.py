"""The connector's own options."""

from __future__ import annotations

import pytest

from attnstore.errors import InvalidArgument
from attnstore_worker.vllm.settings import Settings


def test_a_wrong_option_is_named() -> None:
    with pytest.raises(InvalidArgument, match="load_ms_max"):
        Settings.parse({"store": "grpc://a:1", "load_ms_max": 0})
    with pytest.raises(InvalidArgument, match="stroe"):
        Settings.parse({"stroe": "grpc://a:1"})
    with pytest.raises(InvalidArgument, match="model_id"):
        Settings.parse({"store": "grpc://a:1", "model_id": ""})


@pytest.mark.parametrize("option", ["load_ms_max", "lookup_ms_max"])
@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan")])
def test_no_wait_is_without_an_end(option: str, value: float) -> None:
    with pytest.raises(InvalidArgument, match=option):
        Settings.parse({"store": "grpc://a:1", option: value})


def test_the_token_is_that_of_the_environment_unless_one_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATTNSTORE_TOKEN", raising=False)
    assert Settings.parse({"store": "grpc://node:7400"}).token is None
    monkeypatch.setenv("ATTNSTORE_TOKEN", "from-the-environment")
    assert Settings.parse({"store": "grpc://node:7400"}).token == "from-the-environment"
    assert Settings.parse({"store": "grpc://node:7400", "token": "given"}).token == "given"


def test_the_tenants_salt_is_that_of_the_environment_unless_one_is_given_and_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATTNSTORE_TENANT_SALT", raising=False)
    assert Settings.parse({"store": "grpc://node:7400"}).tenant_salt == ""
    monkeypatch.setenv("ATTNSTORE_TENANT_SALT", "pepper")
    from_environment = Settings.parse({"store": "grpc://node:7400"})
    assert from_environment.tenant_salt == "pepper"
    assert "pepper" not in repr(from_environment)
    assert Settings.parse({"store": "grpc://node:7400", "tenant_salt": "given"}).tenant_salt == "given"
