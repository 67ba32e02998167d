"""Signing: DSSE envelopes over bytes, by any securesystemslib signer, and what a public key looks like in configuration.

Where private keys come from is `resources/signer.py`; whether to believe an envelope is `verification.py`.
"""

from typing import Any

import msgspec
from securesystemslib.dsse import Envelope
from securesystemslib.signer import Signer

from repro_assets.trust.canonical import canonical
from repro_assets.trust.statements import STATEMENT, Statement, StatementError, subject_digests

PAYLOAD_TYPE = "application/vnd.in-toto+json"

#: Who may say what. A key is trusted for the roles that configuration gives it, and for nothing else.
ROLES = ("builder", "evaluator", "approver", "reviewer", "memo")


class PublicKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A trusted public key: securesystemslib's key type, scheme and value, the roles it may sign for, and where its private half is."""

    keytype: str
    scheme: str
    keyval: dict[str, str]
    roles: tuple[str, ...]
    name: str = ""
    uri: str = ""

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.roles) - set(ROLES)):
            raise ValueError(f"unknown role {unknown[0]!r}; known: {', '.join(ROLES)}")


def public_key(signer: Signer, roles: tuple[str, ...], *, name: str = "", uri: str = "") -> tuple[str, PublicKey]:
    """Key id and entry of `signer` for a trust file."""
    key = signer.public_key
    return key.keyid, PublicKey(key.keytype, key.scheme, dict(key.keyval), roles, name, uri)


def sign_payload(payload: bytes, payload_type: str, signer: Signer) -> bytes:
    """DSSE envelope (canonical JSON) of `payload`."""
    envelope = Envelope(payload, payload_type, {})
    envelope.sign(signer)
    return canonical(envelope.to_dict())


def sign(statement: Statement, signer: Signer) -> bytes:
    """DSSE envelope of an in-toto statement, whose payload is its canonical JSON. Raises StatementError when it is not a statement."""
    if statement.get("_type") != STATEMENT:
        raise StatementError(f"_type is {statement.get('_type')!r}, an in-toto statement has {STATEMENT!r}")
    subject_digests(statement)
    return sign_payload(canonical(statement), PAYLOAD_TYPE, signer)


def key_ids(envelope: bytes) -> list[str]:
    """Key ids that an envelope carries. Unchecked: for messages and summaries only."""
    signatures: list[dict[str, Any]] = msgspec.json.decode(envelope)["signatures"]
    return [signature["keyid"] for signature in signatures]
