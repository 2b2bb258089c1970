"""The connector's configuration: `kv_connector_extra_config` of vLLM's `--kv-transfer-config`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from attnstore.environment import variable
from attnstore.errors import InvalidArgument
from attnstore.limits import DEADLINE_MS_MAX

_TP_SIZE_MAX: Final = 1_024
_TP_SIZES_MAX: Final = 8
"""A prompt that the store does not have takes a round trip for each."""


class Settings(BaseModel):
    """`store`: what `attnstore.connect` takes. `load_ms_max` bounds a load, `lookup_ms_max` the wait for what the store has.

    `token` and `tenant_salt` default to `ATTNSTORE_TOKEN` and `ATTNSTORE_TENANT_SALT` of the environment, where no list of
    processes shows them. `http_proxy` is the URL of a proxy; the environment's proxies are not used. `model_id` replaces the name
    of the weights. `tenant_salt` separates tenants of one store that must not share pages. `tensor_parallel_sizes`: those of other
    engines whose pages are read too.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    store: str = Field(repr=False)
    transport: str = "auto"
    token: str | None = Field(default_factory=lambda: variable("token"), repr=False)
    tls_ca: str | None = None
    http_proxy: str | None = None
    load_ms_max: float = Field(5_000, gt=0, le=DEADLINE_MS_MAX)
    lookup_ms_max: float = Field(500, gt=0, le=DEADLINE_MS_MAX)
    save_bytes_max: int = Field(512 << 20, gt=0)
    model_id: str | None = Field(None, min_length=1)
    tensor_parallel_sizes: tuple[Annotated[int, Field(gt=0, le=_TP_SIZE_MAX)], ...] = Field((), max_length=_TP_SIZES_MAX)
    tenant_salt: str = Field(default_factory=lambda: variable("tenant_salt") or "", repr=False)

    @classmethod
    def parse(cls, extra_config: Mapping[str, Any]) -> Settings:
        """Raises `InvalidArgument` that names the option."""
        try:
            return cls(**extra_config)
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
            raise InvalidArgument(f"kv_connector_extra_config: {wrong}") from None
