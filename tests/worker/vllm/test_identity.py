"""What vLLM processes may share, and what not."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnstore.errors import InvalidArgument
from worker.vllm.identity import page_hashes, page_layout, vllm_namespace, weights_fingerprint
from worker.vllm.settings import Settings

LAYOUT = page_layout(layers=30, layer_block_bytes=98_304, kv_heads=3, block_tokens=128, tp_rank=0, tp_size=2)
SETTINGS = {"model": "m", "dtype": "bfloat16", "config": {"rope_theta": 100_000}}


def test_a_page_has_the_bytes_of_all_layers() -> None:
    assert LAYOUT.page_bytes == 30 * 98_304


def test_a_block_that_heads_and_tokens_do_not_share_equally_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="K and V"):
        page_layout(layers=1, layer_block_bytes=100, kv_heads=3, block_tokens=16, tp_rank=0, tp_size=1)


def test_settings_salt_and_rank_each_separate() -> None:
    other_rank = page_layout(layers=30, layer_block_bytes=98_304, kv_heads=3, block_tokens=128, tp_rank=1, tp_size=2)
    spaces = {
        vllm_namespace(LAYOUT, SETTINGS, tenant_salt=""),
        vllm_namespace(LAYOUT, SETTINGS, tenant_salt="alice"),
        vllm_namespace(LAYOUT, {**SETTINGS, "dtype": "float32"}, tenant_salt=""),
        vllm_namespace(LAYOUT, {**SETTINGS, "config": {"rope_theta": 10_000}}, tenant_salt=""),
        vllm_namespace(other_rank, SETTINGS, tenant_salt=""),
    }
    assert len(spaces) == 5
    assert vllm_namespace(LAYOUT, dict(reversed(SETTINGS.items())), tenant_salt="") in spaces, "order is no difference"


def test_a_pages_name_depends_on_all_blocks_before_it() -> None:
    root = vllm_namespace(LAYOUT, SETTINGS, tenant_salt="")
    first, second = b"a" * 32, b"b" * 32
    assert page_hashes(root, [first, second])[0] == page_hashes(root, [first])[0]
    assert page_hashes(root, [second, second])[1] != page_hashes(root, [first, second])[1]


def test_weights_are_told_apart_by_their_bytes(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"1" * 100)
    before = weights_fingerprint(str(tmp_path))
    assert weights_fingerprint(str(tmp_path)) == before
    (tmp_path / "model.safetensors").write_bytes(b"1" * 99 + b"2")
    assert weights_fingerprint(str(tmp_path)) != before
    assert weights_fingerprint("org/model") == "org/model"


def test_a_wrong_option_is_named() -> None:
    with pytest.raises(InvalidArgument, match="load_ms_max"):
        Settings.parse({"store": "grpc://a:1", "load_ms_max": 0})
    with pytest.raises(InvalidArgument, match="stroe"):
        Settings.parse({"stroe": "grpc://a:1"})


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
