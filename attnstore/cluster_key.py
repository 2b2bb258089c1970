"""The key of a cluster: nodes sign with it, and all others verify.

Owns: the key's files, and the signatures: Ed25519 (RFC 8032) of the JSON text of `[context, kind, *fields]`. Invariant: the signed
text includes its `kind`, so a signature of one kind of record is never valid for another.
"""

from __future__ import annotations

import base64
import json
import os
import stat
from pathlib import Path
from typing import Final, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from attnstore.errors import InvalidArgument

Field = str | int

_CONTEXT: Final = "attnstore.1"
_OTHERS: Final = stat.S_IWGRP | stat.S_IRWXO


class PublicKey:
    """Verifies signatures. `str(key)` is its text, 43 characters of base64url."""

    def __init__(self, key: Ed25519PublicKey) -> None:
        self._key = key

    @classmethod
    def parse(cls, text: str) -> Self:
        """The inverse of `str`. Raises `InvalidArgument`."""
        try:
            return cls(Ed25519PublicKey.from_public_bytes(_decoded(text)))
        except ValueError:
            raise InvalidArgument("not the public key of a cluster: attnstore cluster-key FILE shows it") from None

    @classmethod
    def read(cls, text: str) -> Self:
        """Reads a key from its text, or from a file if the text begins with `/`. Raises `InvalidArgument`."""
        if not text.startswith("/"):
            return cls.parse(text)
        try:
            return cls.parse(Path(text).read_text().strip())
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidArgument(f"the cluster's public key {text} cannot be read: {error}") from None

    def __str__(self) -> str:
        return _encoded(self._key.public_bytes_raw())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PublicKey) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def has_signed(self, signature: str, kind: str, *fields: Field) -> bool:
        """Returns whether the signature is the cluster's, of exactly these fields."""
        try:
            self._key.verify(_decoded(signature), _message(kind, fields))
        except (InvalidSignature, ValueError):
            return False
        return True


class ClusterKey:
    """Signs. `repr` never contains the secret."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public = PublicKey(key.public_key())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads a key file. Raises `InvalidArgument` if it is not a key, or if others may read it."""
        try:
            mode, text = path.stat().st_mode, path.read_bytes()
        except OSError as error:
            raise InvalidArgument(f"the cluster's key {path} cannot be read: {error.strerror}") from None
        if mode & _OTHERS:
            raise InvalidArgument(f"the cluster's key {path} may be read by others: chmod 600 {path}")
        try:
            key = load_pem_private_key(text, password=None)
        except (ValueError, TypeError):
            key = None
        if not isinstance(key, Ed25519PrivateKey):
            raise InvalidArgument(f"{path} is not the key of a cluster, made by attnstore cluster-key")
        return cls(key)

    @classmethod
    def create(cls, path: Path) -> Self:
        """Creates a key and its file, which only its owner may read. Raises `InvalidArgument` if the file exists or cannot be
        written.
        """
        key = Ed25519PrivateKey.generate()
        try:
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        except OSError as error:
            raise InvalidArgument(f"the cluster's key {path} cannot be written: {error.strerror}") from None
        return cls(key)

    def sign(self, kind: str, *fields: Field) -> str:
        """Returns the signature, 86 characters; deterministic."""
        return _encoded(self._key.sign(_message(kind, fields)))


def _message(kind: str, fields: tuple[Field, ...]) -> bytes:
    return json.dumps([_CONTEXT, kind, *fields]).encode()


def _encoded(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _decoded(text: str) -> bytes:
    """Raises `ValueError`."""
    if not text.isascii() or _encoded(raw := base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))) != text:
        raise ValueError("not base64url")
    return raw
