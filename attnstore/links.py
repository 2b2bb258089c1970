"""Profiles of the link between a worker and a store node, by name.

Owns: `LinkProfile` and the table `PROFILES`. All code that shapes, assumes or reports a link uses them: the relay
(`attnstore.testing.link`), network namespaces (`attnstore.testing.netns`), the calculator (`attnstore plan`) and the experiments.
Invariant: every profile is valid: rates are positive, times are not negative, and all are numbers.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from attnstore.errors import InvalidArgument
from attnstore.secrecy import shown

_UNITS = {"k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_NUMBER = r"[0-9]{1,12}(?:\.[0-9]{1,9})?"
_RATE = rf"inf|{_NUMBER}[kmgt]"
_TIME = _NUMBER
_PATTERN = re.compile(rf"(?P<down>{_RATE})(?:/(?P<up>{_RATE}))?(?:@(?P<rtt>{_TIME})ms(?:~(?P<jitter>{_TIME})ms)?)?")


@dataclass(frozen=True, slots=True)
class LinkProfile:
    """A link as the worker sees it: `down` is from the node to the worker (reads), `up` the other way (writes, queries).

    Rates are in bits per second, `math.inf` for no limit. `one_way_ms` is the delay in each direction; each piece of a transfer is
    delayed by that plus or minus up to `jitter_ms`, without overtaking. `source` says where the figures are from. Raises
    `InvalidArgument` for impossible figures.
    """

    name: str
    down_bits_per_s: float
    up_bits_per_s: float
    one_way_ms: float
    jitter_ms: float = 0.0
    source: str = ""

    def __post_init__(self) -> None:
        # Written so that a NaN fails as well.
        if not (self.down_bits_per_s > 0 and self.up_bits_per_s > 0):
            raise InvalidArgument(f"link {shown(self.name)}: rates must be positive")
        if not (0 <= self.one_way_ms < math.inf):
            raise InvalidArgument(f"link {shown(self.name)}: the delay must be finite and not negative")
        if not (0 <= self.jitter_ms <= self.one_way_ms):
            raise InvalidArgument(f"link {shown(self.name)}: the jitter must lie between 0 and the delay, which it varies")

    @property
    def rtt_ms(self) -> float:
        """The round trip time without load."""
        return 2 * self.one_way_ms

    @property
    def down_gb_per_s(self) -> float:
        """The read bandwidth, in 10^9 bytes per second."""
        return self.down_bits_per_s / 8e9

    @property
    def spec(self) -> str:
        """The figures in the form that `parse_link` takes.

        >>> parse_link("5g").spec
        '100m/50m@8ms'
        """
        rates = _rate_text(self.down_bits_per_s)
        if self.up_bits_per_s != self.down_bits_per_s:
            rates += "/" + _rate_text(self.up_bits_per_s)
        return f"{rates}@{_number_text(self.rtt_ms)}ms" + (f"~{_number_text(self.jitter_ms)}ms" if self.jitter_ms else "")


def _lan(name: str, bits_per_s: float, rtt_ms: float, source: str) -> LinkProfile:
    return LinkProfile(name, bits_per_s, bits_per_s, rtt_ms / 2, source=source)


PROFILES: dict[str, LinkProfile] = {
    profile.name: profile
    for profile in (
        _lan("loopback", math.inf, 0.0, "no link: what the machine itself can do"),
        _lan("800g", 800e9, 0.02, "one node's 8 x 100 Gb/s NICs, one rack, RDMA (Mooncake, FAST '25, table 2)"),
        _lan("400g", 400e9, 0.02, "one 400 Gb/s NIC, one rack"),
        _lan("100g", 100e9, 0.05, "one 100 Gb/s NIC, one rack, TCP"),
        _lan("25g", 25e9, 0.05, "25 Gb/s Ethernet, one rack, TCP"),
        _lan("10g", 10e9, 0.1, "10 Gb/s Ethernet, one hall"),
        _lan("1g", 1e9, 0.2, "1 Gb/s Ethernet"),
        _lan("100m", 100e6, 0.5, "Fast Ethernet, or a good radio link"),
        _lan("10m", 10e6, 1.0, "the slowest link at which anything here is measured"),
        LinkProfile("wan-20ms", 1e9, 1e9, 10.0, 0.5, "1 Gb/s between two cities: 20 ms there and back"),
        LinkProfile("5g", 100e6, 50e6, 4.0, 0.0, "what IMT-2020 asks of 5G: ITU-R M.2410, user experienced rate, 4 ms one way"),
        LinkProfile("6g-vision", 100e9, 100e9, 0.1, 0.0, "what IMT-2030 aims at: ITU-R M.2160, 50-200 Gb/s peak, 0.1-1 ms one way"),
    )
}


def parse_link(text: str) -> LinkProfile:
    """Returns the profile of that name, or the one that `text` describes: `RATE[/UP][@RTTms[~JITTERms]]`.

    RATE (down, and UP) is a number with k, m, g or t for powers of 1,000 bits per second, or `inf`.
    Raises `InvalidArgument` for any other text.

    >>> parse_link("10g").down_gb_per_s
    1.25
    >>> parse_link("2.5g/100m@30ms~2ms").rtt_ms
    30.0
    """
    if text in PROFILES:
        return PROFILES[text]
    found = _PATTERN.fullmatch(text)
    if found is None:
        raise InvalidArgument(
            f"{shown(text)} is no link: say one of {', '.join(PROFILES)}, or RATE[/UP][@RTTms[~JITTERms]] as in 1g@20ms"
        )
    down = _rate(found["down"])
    return LinkProfile(
        text,
        down_bits_per_s=down,
        up_bits_per_s=_rate(found["up"]) if found["up"] else down,
        one_way_ms=float(found["rtt"] or 0) / 2,
        jitter_ms=float(found["jitter"] or 0),
    )


def _rate(text: str) -> float:
    return math.inf if text == "inf" else float(text[:-1]) * _UNITS[text[-1]]


def _rate_text(bits_per_s: float) -> str:
    if bits_per_s == math.inf:
        return "inf"
    unit = next((unit for unit in "tgm" if bits_per_s >= _UNITS[unit]), "k")
    return _number_text(bits_per_s / _UNITS[unit]) + unit


def _number_text(number: float) -> str:
    # Never with an exponent, which the pattern does not accept.
    return f"{number:.6f}".rstrip("0").rstrip(".")
