"""The environment's variables `ATTNSTORE_*`.

Owns: how a variable is read. Invariants: an empty variable counts as unset, because templates and compose files set variables that
were not filled in; a variable that Kubernetes sets for a Service is ignored.

For each Service `x` of a namespace, Kubernetes gives every pod there `X_PORT=tcp://10.0.0.1:9400`, `X_SERVICE_HOST`,
`X_SERVICE_PORT`, `X_PORT_9400_TCP` and more, unless the pod sets `enableServiceLinks: false`. A Service `attnstore-metrics`
therefore sets `ATTNSTORE_METRICS_PORT`, the name of an option. Of these names only `X_PORT` can be an option's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Final

PREFIX: Final = "ATTNSTORE_"
_LINK: Final = re.compile(r"(tcp|udp|sctp)://\S+", re.IGNORECASE)


def variable(option: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """Returns the value that the environment gives an option, or None if the variable is unset, empty, or a service link."""
    name = variable_name(option)
    value = environment.get(name) or None
    return None if value is not None and _is_service_link(name, value) else value


def variable_name(option: str) -> str:
    """Returns the name of an option's variable: `ATTNSTORE_TLS_CA` for `tls_ca`."""
    return PREFIX + option.upper()


def service_links(options: Iterable[str], environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Returns the variables, with their values, that have the names of these options and are service links."""
    names = map(variable_name, options)
    return {name: environment[name] for name in names if name in environment and _is_service_link(name, environment[name])}


def _is_service_link(name: str, value: str) -> bool:
    return name.endswith("_PORT") and _LINK.fullmatch(value) is not None
