from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PageStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PAGE_STATUS_UNSPECIFIED: _ClassVar[PageStatus]
    PAGE_STATUS_OK: _ClassVar[PageStatus]
    PAGE_STATUS_MISSING: _ClassVar[PageStatus]
    PAGE_STATUS_LEASE_EXPIRED: _ClassVar[PageStatus]
    PAGE_STATUS_STORED: _ClassVar[PageStatus]
    PAGE_STATUS_ALREADY_PRESENT: _ClassVar[PageStatus]
    PAGE_STATUS_ARRIVING: _ClassVar[PageStatus]
    PAGE_STATUS_NO_SPACE: _ClassVar[PageStatus]
    PAGE_STATUS_CHECKSUM_MISMATCH: _ClassVar[PageStatus]
    PAGE_STATUS_WRONG_SIZE: _ClassVar[PageStatus]
    PAGE_STATUS_PINNED: _ClassVar[PageStatus]
    PAGE_STATUS_DELETED: _ClassVar[PageStatus]

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    DTYPE_BF16: _ClassVar[DType]
    DTYPE_FP16: _ClassVar[DType]
    DTYPE_FP32: _ClassVar[DType]
    DTYPE_OPAQUE: _ClassVar[DType]
PAGE_STATUS_UNSPECIFIED: PageStatus
PAGE_STATUS_OK: PageStatus
PAGE_STATUS_MISSING: PageStatus
PAGE_STATUS_LEASE_EXPIRED: PageStatus
PAGE_STATUS_STORED: PageStatus
PAGE_STATUS_ALREADY_PRESENT: PageStatus
PAGE_STATUS_ARRIVING: PageStatus
PAGE_STATUS_NO_SPACE: PageStatus
PAGE_STATUS_CHECKSUM_MISMATCH: PageStatus
PAGE_STATUS_WRONG_SIZE: PageStatus
PAGE_STATUS_PINNED: PageStatus
PAGE_STATUS_DELETED: PageStatus
DTYPE_UNSPECIFIED: DType
DTYPE_BF16: DType
DTYPE_FP16: DType
DTYPE_FP32: DType
DTYPE_OPAQUE: DType

class PageLayout(_message.Message):
    __slots__ = ("layers", "kv_heads", "head_dim", "block_tokens", "dtype", "tp_rank", "tp_size")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    TP_RANK_FIELD_NUMBER: _ClassVar[int]
    TP_SIZE_FIELD_NUMBER: _ClassVar[int]
    layers: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    dtype: DType
    tp_rank: int
    tp_size: int
    def __init__(self, layers: _Optional[int] = ..., kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., block_tokens: _Optional[int] = ..., dtype: _Optional[_Union[DType, str]] = ..., tp_rank: _Optional[int] = ..., tp_size: _Optional[int] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("node_id", "epoch", "version", "limits", "capacity_bytes", "used_bytes", "in_flight", "draining", "transports", "attend", "tenant")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    ATTEND_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    epoch: bytes
    version: str
    limits: Limits
    capacity_bytes: int
    used_bytes: int
    in_flight: int
    draining: bool
    transports: _containers.RepeatedCompositeFieldContainer[Transport]
    attend: AttendOffer
    tenant: str
    def __init__(self, node_id: _Optional[str] = ..., epoch: _Optional[bytes] = ..., version: _Optional[str] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., capacity_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., in_flight: _Optional[int] = ..., draining: _Optional[bool] = ..., transports: _Optional[_Iterable[_Union[Transport, _Mapping]]] = ..., attend: _Optional[_Union[AttendOffer, _Mapping]] = ..., tenant: _Optional[str] = ...) -> None: ...

class AttendOffer(_message.Message):
    __slots__ = ("rows_max", "bytes_max", "hashes_max", "sets_max", "latents", "windows")
    ROWS_MAX_FIELD_NUMBER: _ClassVar[int]
    BYTES_MAX_FIELD_NUMBER: _ClassVar[int]
    HASHES_MAX_FIELD_NUMBER: _ClassVar[int]
    SETS_MAX_FIELD_NUMBER: _ClassVar[int]
    LATENTS_FIELD_NUMBER: _ClassVar[int]
    WINDOWS_FIELD_NUMBER: _ClassVar[int]
    rows_max: int
    bytes_max: int
    hashes_max: int
    sets_max: int
    latents: bool
    windows: bool
    def __init__(self, rows_max: _Optional[int] = ..., bytes_max: _Optional[int] = ..., hashes_max: _Optional[int] = ..., sets_max: _Optional[int] = ..., latents: _Optional[bool] = ..., windows: _Optional[bool] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("chunk_bytes_max", "hashes_max", "lease_ms_max", "page_bytes_max")
    CHUNK_BYTES_MAX_FIELD_NUMBER: _ClassVar[int]
    HASHES_MAX_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_MAX_FIELD_NUMBER: _ClassVar[int]
    PAGE_BYTES_MAX_FIELD_NUMBER: _ClassVar[int]
    chunk_bytes_max: int
    hashes_max: int
    lease_ms_max: int
    page_bytes_max: int
    def __init__(self, chunk_bytes_max: _Optional[int] = ..., hashes_max: _Optional[int] = ..., lease_ms_max: _Optional[int] = ..., page_bytes_max: _Optional[int] = ...) -> None: ...

class Transport(_message.Message):
    __slots__ = ("name", "address")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    name: str
    address: str
    def __init__(self, name: _Optional[str] = ..., address: _Optional[str] = ...) -> None: ...

class RegisterLayoutRequest(_message.Message):
    __slots__ = ("namespace", "layout")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    layout: PageLayout
    def __init__(self, namespace: _Optional[bytes] = ..., layout: _Optional[_Union[PageLayout, _Mapping]] = ...) -> None: ...

class RegisterLayoutResponse(_message.Message):
    __slots__ = ("page_bytes", "pages_max", "epoch")
    PAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PAGES_MAX_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    page_bytes: int
    pages_max: int
    epoch: bytes
    def __init__(self, page_bytes: _Optional[int] = ..., pages_max: _Optional[int] = ..., epoch: _Optional[bytes] = ...) -> None: ...

class MatchRequest(_message.Message):
    __slots__ = ("namespace", "prefixes", "lease_ms")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    PREFIXES_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    prefixes: _containers.RepeatedScalarFieldContainer[bytes]
    lease_ms: int
    def __init__(self, namespace: _Optional[bytes] = ..., prefixes: _Optional[_Iterable[bytes]] = ..., lease_ms: _Optional[int] = ...) -> None: ...

class MatchResponse(_message.Message):
    __slots__ = ("hits", "lease_id", "lease_ms")
    HITS_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    hits: _containers.RepeatedScalarFieldContainer[int]
    lease_id: bytes
    lease_ms: int
    def __init__(self, hits: _Optional[_Iterable[int]] = ..., lease_id: _Optional[bytes] = ..., lease_ms: _Optional[int] = ...) -> None: ...

class ReadRequest(_message.Message):
    __slots__ = ("namespace", "hashes", "layer_begin", "layer_end", "lease_id")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    LAYER_BEGIN_FIELD_NUMBER: _ClassVar[int]
    LAYER_END_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    hashes: bytes
    layer_begin: int
    layer_end: int
    lease_id: bytes
    def __init__(self, namespace: _Optional[bytes] = ..., hashes: _Optional[bytes] = ..., layer_begin: _Optional[int] = ..., layer_end: _Optional[int] = ..., lease_id: _Optional[bytes] = ...) -> None: ...

class ReadChunk(_message.Message):
    __slots__ = ("page_index", "status", "size_bytes", "offset_bytes", "checksum", "payload")
    PAGE_INDEX_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    page_index: int
    status: PageStatus
    size_bytes: int
    offset_bytes: int
    checksum: int
    payload: bytes
    def __init__(self, page_index: _Optional[int] = ..., status: _Optional[_Union[PageStatus, str]] = ..., size_bytes: _Optional[int] = ..., offset_bytes: _Optional[int] = ..., checksum: _Optional[int] = ..., payload: _Optional[bytes] = ...) -> None: ...

class WriteChunk(_message.Message):
    __slots__ = ("namespace", "hash", "checksum", "offset_bytes", "payload", "age_ms")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    HASH_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    AGE_MS_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    hash: bytes
    checksum: int
    offset_bytes: int
    payload: bytes
    age_ms: int
    def __init__(self, namespace: _Optional[bytes] = ..., hash: _Optional[bytes] = ..., checksum: _Optional[int] = ..., offset_bytes: _Optional[int] = ..., payload: _Optional[bytes] = ..., age_ms: _Optional[int] = ...) -> None: ...

class WriteResponse(_message.Message):
    __slots__ = ("verdicts",)
    VERDICTS_FIELD_NUMBER: _ClassVar[int]
    verdicts: _containers.RepeatedScalarFieldContainer[PageStatus]
    def __init__(self, verdicts: _Optional[_Iterable[_Union[PageStatus, str]]] = ...) -> None: ...

class RenewLeaseRequest(_message.Message):
    __slots__ = ("lease_id", "lease_ms")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    lease_id: bytes
    lease_ms: int
    def __init__(self, lease_id: _Optional[bytes] = ..., lease_ms: _Optional[int] = ...) -> None: ...

class RenewLeaseResponse(_message.Message):
    __slots__ = ("lease_ms",)
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    lease_ms: int
    def __init__(self, lease_ms: _Optional[int] = ...) -> None: ...

class ReleaseLeaseRequest(_message.Message):
    __slots__ = ("lease_id",)
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    lease_id: bytes
    def __init__(self, lease_id: _Optional[bytes] = ...) -> None: ...

class ReleaseLeaseResponse(_message.Message):
    __slots__ = ("released",)
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    released: bool
    def __init__(self, released: _Optional[bool] = ...) -> None: ...

class DeleteRequest(_message.Message):
    __slots__ = ("namespace", "hashes", "tell")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    TELL_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    hashes: bytes
    tell: bool
    def __init__(self, namespace: _Optional[bytes] = ..., hashes: _Optional[bytes] = ..., tell: _Optional[bool] = ...) -> None: ...

class DeleteResponse(_message.Message):
    __slots__ = ("statuses",)
    STATUSES_FIELD_NUMBER: _ClassVar[int]
    statuses: _containers.RepeatedScalarFieldContainer[PageStatus]
    def __init__(self, statuses: _Optional[_Iterable[_Union[PageStatus, str]]] = ...) -> None: ...

class VerifyRequest(_message.Message):
    __slots__ = ("namespace", "hashes")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    hashes: bytes
    def __init__(self, namespace: _Optional[bytes] = ..., hashes: _Optional[bytes] = ...) -> None: ...

class VerifyResponse(_message.Message):
    __slots__ = ("statuses",)
    STATUSES_FIELD_NUMBER: _ClassVar[int]
    statuses: _containers.RepeatedScalarFieldContainer[PageStatus]
    def __init__(self, statuses: _Optional[_Iterable[_Union[PageStatus, str]]] = ...) -> None: ...

class StatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatsResponse(_message.Message):
    __slots__ = ("node_id", "epoch", "capacity_bytes", "used_bytes", "pages_sealed", "pages_arriving", "pages_pinned", "leases", "hit_pages", "missed_pages", "stored_pages", "evicted_pages", "read_bytes", "written_bytes", "uptime_ms", "namespaces", "read_pages", "verified_pages", "corrupt_pages")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PAGES_SEALED_FIELD_NUMBER: _ClassVar[int]
    PAGES_ARRIVING_FIELD_NUMBER: _ClassVar[int]
    PAGES_PINNED_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    HIT_PAGES_FIELD_NUMBER: _ClassVar[int]
    MISSED_PAGES_FIELD_NUMBER: _ClassVar[int]
    STORED_PAGES_FIELD_NUMBER: _ClassVar[int]
    EVICTED_PAGES_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_BYTES_FIELD_NUMBER: _ClassVar[int]
    UPTIME_MS_FIELD_NUMBER: _ClassVar[int]
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    READ_PAGES_FIELD_NUMBER: _ClassVar[int]
    VERIFIED_PAGES_FIELD_NUMBER: _ClassVar[int]
    CORRUPT_PAGES_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    epoch: bytes
    capacity_bytes: int
    used_bytes: int
    pages_sealed: int
    pages_arriving: int
    pages_pinned: int
    leases: int
    hit_pages: int
    missed_pages: int
    stored_pages: int
    evicted_pages: int
    read_bytes: int
    written_bytes: int
    uptime_ms: int
    namespaces: _containers.RepeatedCompositeFieldContainer[NamespaceStats]
    read_pages: int
    verified_pages: int
    corrupt_pages: int
    def __init__(self, node_id: _Optional[str] = ..., epoch: _Optional[bytes] = ..., capacity_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., pages_sealed: _Optional[int] = ..., pages_arriving: _Optional[int] = ..., pages_pinned: _Optional[int] = ..., leases: _Optional[int] = ..., hit_pages: _Optional[int] = ..., missed_pages: _Optional[int] = ..., stored_pages: _Optional[int] = ..., evicted_pages: _Optional[int] = ..., read_bytes: _Optional[int] = ..., written_bytes: _Optional[int] = ..., uptime_ms: _Optional[int] = ..., namespaces: _Optional[_Iterable[_Union[NamespaceStats, _Mapping]]] = ..., read_pages: _Optional[int] = ..., verified_pages: _Optional[int] = ..., corrupt_pages: _Optional[int] = ...) -> None: ...

class NamespaceStats(_message.Message):
    __slots__ = ("namespace", "layout", "pages_sealed")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    PAGES_SEALED_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    layout: PageLayout
    pages_sealed: int
    def __init__(self, namespace: _Optional[bytes] = ..., layout: _Optional[_Union[PageLayout, _Mapping]] = ..., pages_sealed: _Optional[int] = ...) -> None: ...

class OpenChannelRequest(_message.Message):
    __slots__ = ("transport",)
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    transport: str
    def __init__(self, transport: _Optional[str] = ...) -> None: ...

class OpenChannelResponse(_message.Message):
    __slots__ = ("address", "token", "token_ms")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    TOKEN_MS_FIELD_NUMBER: _ClassVar[int]
    address: str
    token: bytes
    token_ms: int
    def __init__(self, address: _Optional[str] = ..., token: _Optional[bytes] = ..., token_ms: _Optional[int] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("namespace",)
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    def __init__(self, namespace: _Optional[bytes] = ...) -> None: ...

class PageEvent(_message.Message):
    __slots__ = ("kind", "hash", "sequence", "dropped")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[PageEvent.Kind]
        KIND_SEALED: _ClassVar[PageEvent.Kind]
        KIND_EVICTED: _ClassVar[PageEvent.Kind]
        KIND_DELETED: _ClassVar[PageEvent.Kind]
        KIND_LAGGED: _ClassVar[PageEvent.Kind]
    KIND_UNSPECIFIED: PageEvent.Kind
    KIND_SEALED: PageEvent.Kind
    KIND_EVICTED: PageEvent.Kind
    KIND_DELETED: PageEvent.Kind
    KIND_LAGGED: PageEvent.Kind
    KIND_FIELD_NUMBER: _ClassVar[int]
    HASH_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    kind: PageEvent.Kind
    hash: bytes
    sequence: int
    dropped: int
    def __init__(self, kind: _Optional[_Union[PageEvent.Kind, str]] = ..., hash: _Optional[bytes] = ..., sequence: _Optional[int] = ..., dropped: _Optional[int] = ...) -> None: ...

class AttendRequest(_message.Message):
    __slots__ = ("open", "query", "close")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    QUERY_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    open: AttendOpen
    query: AttendQuery
    close: AttendClose
    def __init__(self, open: _Optional[_Union[AttendOpen, _Mapping]] = ..., query: _Optional[_Union[AttendQuery, _Mapping]] = ..., close: _Optional[_Union[AttendClose, _Mapping]] = ...) -> None: ...

class AttendOpen(_message.Message):
    __slots__ = ("set", "namespace", "hashes", "lease_id", "q_heads", "scale", "value_dim")
    SET_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    Q_HEADS_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    VALUE_DIM_FIELD_NUMBER: _ClassVar[int]
    set: int
    namespace: bytes
    hashes: bytes
    lease_id: bytes
    q_heads: int
    scale: float
    value_dim: int
    def __init__(self, set: _Optional[int] = ..., namespace: _Optional[bytes] = ..., hashes: _Optional[bytes] = ..., lease_id: _Optional[bytes] = ..., q_heads: _Optional[int] = ..., scale: _Optional[float] = ..., value_dim: _Optional[int] = ...) -> None: ...

class AttendQuery(_message.Message):
    __slots__ = ("layer", "budget_ms", "sets", "rows", "checksum", "windowed")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    BUDGET_MS_FIELD_NUMBER: _ClassVar[int]
    SETS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    WINDOWED_FIELD_NUMBER: _ClassVar[int]
    layer: int
    budget_ms: int
    sets: _containers.RepeatedCompositeFieldContainer[AttendRows]
    rows: bytes
    checksum: int
    windowed: bool
    def __init__(self, layer: _Optional[int] = ..., budget_ms: _Optional[int] = ..., sets: _Optional[_Iterable[_Union[AttendRows, _Mapping]]] = ..., rows: _Optional[bytes] = ..., checksum: _Optional[int] = ..., windowed: _Optional[bool] = ...) -> None: ...

class AttendRows(_message.Message):
    __slots__ = ("set", "rows")
    SET_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    set: int
    rows: int
    def __init__(self, set: _Optional[int] = ..., rows: _Optional[int] = ...) -> None: ...

class AttendClose(_message.Message):
    __slots__ = ("set",)
    SET_FIELD_NUMBER: _ClassVar[int]
    set: int
    def __init__(self, set: _Optional[int] = ...) -> None: ...

class AttendResponse(_message.Message):
    __slots__ = ("opened", "partial")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_FIELD_NUMBER: _ClassVar[int]
    opened: AttendOpened
    partial: AttendPartial
    def __init__(self, opened: _Optional[_Union[AttendOpened, _Mapping]] = ..., partial: _Optional[_Union[AttendPartial, _Mapping]] = ...) -> None: ...

class AttendOpened(_message.Message):
    __slots__ = ("set",)
    SET_FIELD_NUMBER: _ClassVar[int]
    set: int
    def __init__(self, set: _Optional[int] = ...) -> None: ...

class AttendPartial(_message.Message):
    __slots__ = ("out", "lse", "checksum")
    OUT_FIELD_NUMBER: _ClassVar[int]
    LSE_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    out: bytes
    lse: bytes
    checksum: int
    def __init__(self, out: _Optional[bytes] = ..., lse: _Optional[bytes] = ..., checksum: _Optional[int] = ...) -> None: ...
