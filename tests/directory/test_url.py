"""URLs of directories: which are accepted, which are refused, and that no password is ever shown."""

from __future__ import annotations

import pytest

from attnstore.directory import DirectoryUrl, is_directory_url, open_directory
from attnstore.errors import InvalidArgument


@pytest.mark.parametrize(
    ("url", "kind", "hosts", "tls", "service", "database", "cluster"),
    [
        ("redis://h", "standalone", (("h", 6379),), False, "", 0, "default"),
        ("redis://h:1/2?cluster=blue", "standalone", (("h", 1),), False, "", 2, "blue"),
        ("rediss://[fd00::1]:7/0", "standalone", (("fd00::1", 7),), True, "", 0, "default"),
        ("redis+sentinel://a,b:2/store/3", "sentinel", (("a", 26379), ("b", 2)), False, "store", 3, "default"),
        ("rediss+cluster://a:1,b:2", "cluster", (("a", 1), ("b", 2)), True, "", 0, "default"),
    ],
)
def test_urls_say_how_the_directory_is_reached(
    url: str, kind: str, hosts: tuple[tuple[str, int], ...], tls: bool, service: str, database: int, cluster: str
) -> None:
    parsed = DirectoryUrl.parse(url)
    assert (parsed.kind, parsed.hosts, parsed.tls) == (kind, hosts, tls)
    assert (parsed.service, parsed.database, parsed.cluster) == (service, database, cluster)
    assert is_directory_url(url)


def test_a_login_is_decoded_and_never_shown() -> None:
    parsed = DirectoryUrl.parse("redis://ada:s%40cret@h:1/0")
    assert (parsed.username, parsed.password) == ("ada", "s@cret")
    assert parsed.shown == "redis://h:1/0"
    assert "cret" not in parsed.shown + repr(parsed) + open_directory("redis://ada:s%40cret@h:1/0").name


def test_sentinels_have_a_login_of_their_own_which_is_decoded_and_never_shown() -> None:
    url = "redis+sentinel://ada:s3cret@h/store/0?cluster=blue&sentinel_username=eve&sentinel_password=a%26s3cret+b"
    parsed = DirectoryUrl.parse(url)
    assert (parsed.sentinel_username, parsed.sentinel_password) == ("eve", "a&s3cret+b")
    assert (parsed.username, parsed.password, parsed.cluster) == ("ada", "s3cret", "blue")
    assert "s3cret" not in parsed.shown + repr(parsed)


def test_a_text_of_a_server_loses_the_passwords_in_it() -> None:
    parsed = DirectoryUrl.parse("redis://ada:s3cret@h")
    assert "s3cret" not in parsed.without_secrets("unknown command 'HELLO', with args beginning with: '3' 'AUTH' 'ada' 's3cret'")


@pytest.mark.parametrize(
    "url",
    [
        "http://s3cret:s3cret@h",
        "redis://u:s3cret@",
        "redis://u:s3cret@h:99999",
        "redis://u:s3cret@a,b",
        "redis://u:s3cret@h/x",
        "redis://u:s3cret@h/0/1",
        "redis://u:s3cret@h/0?color=red",
        "redis://u:s3cret@h/0?cluster=a{b}",
        "redis+sentinel://u:s3cret@h",
        "redis://u:s3cret@h/0?cluster=a&cluster=b",
        "redis://u:s3cret@h/0?sentinel_password=s3cret",
        "redis://u:s3cret@h/0?ca=/s3cret",
        "redis://u:s3cret@h/99999999999999999999",
        "redis+sentinel://h/store/0?sentinel_password=s3&cret",
    ],
)
def test_a_wrong_url_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        DirectoryUrl.parse(url)
    assert "s3cret" not in str(refusal.value)


@pytest.mark.parametrize("target", ["grpc://h:1", "grpcs://h:1", "h:1", ""])
def test_other_targets_are_no_directories(target: str) -> None:
    assert not is_directory_url(target)
