"""The exceptions of AttnStore: one tree, which decides what is retried.

    AttnStoreError
    ├── Retryable                     the same call may succeed later or elsewhere
    │   ├── DeadlineExceeded          no answer arrived within the deadline
    │   ├── Unavailable               no node there, connection lost, or the node is draining
    │   ├── Overloaded                a limit of the node on concurrent work is reached
    │   └── LeaseExpired              match again, then read
    └── NotRetryable                  the call itself is wrong
        ├── InvalidArgument           malformed hash, empty or too large batch, bad range, bad option
        ├── BufferMismatch            a caller-supplied buffer does not fit the requested pages
        ├── NamespaceUnknown          register the layout first
        ├── LayoutMismatch            the namespace is registered with another layout
        ├── Unauthenticated           missing or wrong token
        ├── PermissionDenied          shared memory is for processes of the node's user
        ├── ProtocolError             the peer broke the protocol: a bug or a foreign server
        ├── Unsupported               this node does not offer the requested feature
        └── ClientClosed              the client was closed before or during the call

A page of a batch that is missing, late or corrupt does *not* raise: its status (`PageStatus`) says so, and it is a miss. `code` is
the name of the error in the trailer `attnstore-error`, in logs and in metrics.
"""

from __future__ import annotations

from typing import ClassVar


class AttnStoreError(Exception):
    """Base of all errors that AttnStore raises on purpose."""

    code: ClassVar[str] = "error"
    retryable: ClassVar[bool] = False


class Retryable(AttnStoreError):
    """The same call may succeed later or on another node."""

    code = "retryable"
    retryable = True


class NotRetryable(AttnStoreError):
    """Repeating the same call does not help."""

    code = "not_retryable"


class DeadlineExceeded(Retryable):
    """No answer arrived within the deadline."""

    code = "deadline_exceeded"


class Unavailable(Retryable):
    """No node there, connection lost, or the node is draining."""

    code = "unavailable"


class Overloaded(Retryable):
    """A limit on concurrent work is reached."""

    code = "overloaded"


class LeaseExpired(Retryable):
    """The lease is unknown or has expired."""

    code = "lease_expired"


class InvalidArgument(NotRetryable, ValueError):
    """A malformed argument; the message names it and the rule."""

    code = "invalid_argument"


class BufferMismatch(NotRetryable, ValueError):
    """A caller-supplied buffer does not fit the requested pages."""

    code = "buffer_mismatch"


class NamespaceUnknown(NotRetryable):
    """The node does not know the namespace; register the layout first."""

    code = "namespace_unknown"


class LayoutMismatch(NotRetryable):
    """The namespace is registered with another layout."""

    code = "layout_mismatch"


class Unauthenticated(NotRetryable):
    """Missing or wrong token."""

    code = "unauthenticated"


class PermissionDenied(NotRetryable):
    """The caller has no access: shared memory is for processes of the node's user."""

    code = "permission_denied"


class ProtocolError(NotRetryable):
    """The peer broke the protocol."""

    code = "protocol_error"


class Unsupported(NotRetryable):
    """This node does not offer the requested feature; `Describe` lists what it offers."""

    code = "unsupported"


class ClientClosed(NotRetryable):
    """The client was closed before or during the call."""

    code = "client_closed"


def error_of_code(code: str) -> type[AttnStoreError] | None:
    """Returns the concrete class with this `code`, or None for a code that this version does not know."""
    return _BY_CODE.get(code)


def _leaves(cls: type[AttnStoreError]) -> list[type[AttnStoreError]]:
    children = cls.__subclasses__()
    return [leaf for child in children for leaf in _leaves(child)] if children else [cls]


_BY_CODE = {cls.code: cls for cls in _leaves(AttnStoreError)}
