"""Verification: whom configuration trusts for what, and every check that stands between an envelope and its use.

Needs neither Dagster nor lakeFS. `python -m repro_assets.trust.verification ENVELOPE --trust FILE [--store FOLDER]` is the auditor's
entry. Making keys and finding the configuration is `resources/signer.py`.
"""

import argparse
import binascii
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import FormatError, UnsupportedLibraryError, UnverifiedSignatureError
from securesystemslib.signer import Key, Signature

from repro_assets.trust import statements
from repro_assets.trust.blob import BlobDamaged, BlobMissing, FolderStore
from repro_assets.trust.canonical import sha256
from repro_assets.trust.signing import PAYLOAD_TYPE, PublicKey
from repro_assets.trust.statements import Statement, StatementError

#: roles that may sign a predicate type, for callers that hold an envelope and no expectation
ROLES_FOR = {
    statements.PROVENANCE: ("builder",),
    statements.TEST_RESULT: ("evaluator",),
    statements.VSA: ("approver", "reviewer"),
    statements.CERTIFICATE: ("builder", "evaluator"),
}

#: clocks of two honest machines may be this far apart
SKEW = timedelta(minutes=5)


class Refused(Exception):
    """An envelope that must not be used; the message names the check that failed, the key id and the remedy."""

    check = "envelope"


class BadEnvelope(Refused):
    """Not a DSSE envelope, or its payload is not what it says it is."""


class BadSignature(Refused):
    """A trusted key's signature does not belong to these bytes."""

    check = "signature"


class UntrustedKey(Refused):
    """Signed by a key that configuration does not know."""

    check = "key"


class WrongRole(Refused):
    """Signed by a known key that may not say this."""

    check = "role"


class WrongPredicate(Refused):
    """A genuine statement of another kind."""

    check = "predicate type"


class SubjectMismatch(Refused):
    """A genuine statement about something else."""

    check = "subject"


class Stale(Refused):
    """Older than allowed, from the future, or without a time where one is asked for."""

    check = "freshness"


class Revoked(Refused):
    """Signed by a revoked key, or about a revoked thing."""

    check = "revocation"


class TrustError(Exception):
    """A trust configuration that cannot be used; the message names the file, the field and the remedy."""


class Revocations(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is no longer believed, each with its reason: key ids, and SHA-256 digests of statements, subjects or dependencies."""

    keys: dict[str, str] = {}
    digests: dict[str, str] = {}


class Trust(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which public keys may sign what, by key id, and what is revoked. Comes from configuration, never from the store it guards."""

    version: int
    keys: dict[str, PublicKey]
    revoked: Revocations = Revocations()

    def ids(self, role: str) -> list[str]:
        """Ids of the keys trusted for `role`."""
        return sorted(key_id for key_id, key in self.keys.items() if role in key.roles)


def parse_trust(data: bytes, source: str = "trust configuration") -> Trust:
    """The configuration in `data` (JSON). Raises TrustError naming `source`, the field and the remedy."""
    try:
        trust = msgspec.json.decode(data, type=Trust)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise TrustError(f"{source}: {error}; see `version`, `keys` and `revoked` in the file that `repro up` makes") from None
    if trust.version != 1:
        raise TrustError(f"{source}: `version` is {trust.version}, this project reads 1; use the project's version that wrote it")
    for key_id, entry in trust.keys.items():
        try:
            _key(key_id, entry)
        except (KeyError, TypeError, ValueError) as error:
            raise TrustError(f"{source}: `keys.{key_id}`: {error}") from None
    return trust


def load_trust(path: Path) -> Trust:
    """The configuration in a file. Raises TrustError, or OSError when it cannot be read."""
    return parse_trust(Path(path).read_bytes(), str(path))


def encode_trust(trust: Trust) -> bytes:
    """`trust` as an indented JSON file that a person can read and edit."""
    return msgspec.json.format(msgspec.json.encode(trust, order="sorted"), indent=2) + b"\n"


def _key(key_id: str, entry: PublicKey) -> Key:
    return Key.from_dict(key_id, {"keytype": entry.keytype, "scheme": entry.scheme, "keyval": dict(entry.keyval)})


def _open(envelope: bytes | Mapping[str, Any], payload_type: str) -> Envelope:
    # Envelope.from_dict rewrites the dict it is given, so it always gets one of its own
    raw = envelope if isinstance(envelope, bytes) else msgspec.json.encode(envelope)
    try:
        parsed = Envelope.from_dict(msgspec.json.decode(raw))
    except (msgspec.DecodeError, binascii.Error, KeyError, TypeError, ValueError, AttributeError, FormatError) as error:
        raise BadEnvelope(f"envelope: not a DSSE envelope ({type(error).__name__}: {error}); fetch or sign it again") from None
    if parsed.payload_type != payload_type:
        raise BadEnvelope(f"envelope: payload type is {parsed.payload_type!r}, expected {payload_type!r}; this is another kind of document")
    if not parsed.signatures:
        raise BadSignature("signature: the envelope carries none; sign it with a trusted key")
    return parsed


def _accept(signature: Signature, signed: bytes, trust: Trust, roles: Sequence[str], revoked: Mapping[str, str]) -> None:
    """Every check on one signature: known key, not revoked, genuine, and for the right role, in this order."""
    key_id = signature.keyid
    entry = trust.keys.get(key_id)
    if reason := trust.revoked.keys.get(key_id) or revoked.get(key_id):
        raise Revoked(f"revocation: key {key_id} is revoked ({reason}); sign again with a key that is in force")
    if entry is None:
        raise UntrustedKey(
            f"key: {key_id} is not in the trust configuration; if you know its owner add it under `keys`, else do not use this"
        )
    try:
        _key(key_id, entry).verify_signature(signature, signed)
    except UnsupportedLibraryError as error:
        raise BadSignature(f"signature: key {key_id} cannot be checked here: {error}") from None
    except (UnverifiedSignatureError, ValueError) as error:
        raise BadSignature(
            f"signature: it is not key {key_id}'s over these bytes ({type(error).__name__}): the payload or the signature was changed "
            "after signing; restore the original or make it again"
        ) from None
    if not set(roles) & set(entry.roles):
        raise WrongRole(
            f"role: key {key_id} may sign as {', '.join(entry.roles) or 'nothing'}, needed is {' or '.join(roles)}; have it signed by the "
            f"right key, or give this one the role in the trust configuration"
        )


def authenticate(
    envelope: bytes | Mapping[str, Any],
    *,
    trust: Trust,
    roles: Sequence[str],
    payload_type: str = PAYLOAD_TYPE,
    revoked: Mapping[str, str] | None = None,
) -> tuple[bytes, str]:
    """Payload and key id of an envelope that one trusted key of one of `roles` signed.

    Says who signed, not what it may be used for: callers go on to check kind, subject and time. Raises a subclass of Refused.
    """
    opened = _open(envelope, payload_type)
    signed = opened.pae()
    failures: list[Refused] = []
    for signature in opened.signatures.values():
        try:
            _accept(signature, signed, trust, roles, revoked or {})
        except Refused as failure:
            failures.append(failure)
        else:
            return opened.payload, signature.keyid
    # a stranger's signature beside ours must not hide what is wrong with ours
    raise next((failure for failure in failures if not isinstance(failure, UntrustedKey)), failures[0])


def _statement(payload: bytes) -> Statement:
    try:
        statement = msgspec.json.decode(payload, type=dict[str, Any])
        if statement.get("_type") != statements.STATEMENT:
            raise StatementError(f"_type is {statement.get('_type')!r}")
        if not isinstance(statement.get("predicate"), dict) or not isinstance(statement.get("predicateType"), str):
            raise StatementError("predicate or predicateType is missing")
        if not statements.subject_digests(statement):
            raise StatementError("it has no subject")
        return statement
    except (msgspec.DecodeError, StatementError, KeyError, TypeError, AttributeError) as error:
        raise BadEnvelope(f"envelope: the payload is not an in-toto Statement v1: {error}; make it again") from None


def _check_subjects(said: Mapping[str, str], held: Mapping[str, str] | str, key_id: str) -> None:
    who = f"(signed by key {key_id})"
    if isinstance(held, str):
        if held not in said.values():
            raise SubjectMismatch(
                f"subject: no subject of the statement {who} has the digest {held} of the thing in hand; it is about another"
            )
        return
    for name in sorted(said.keys() | held.keys()):
        if name not in held:
            raise SubjectMismatch(f"subject: {name!r} is signed for {who} and not in hand; fetch it")
        if name not in said:
            raise SubjectMismatch(f"subject: {name!r} is in hand and not signed for {who}; remove it, or sign a statement that names it")
        if said[name] != held[name]:
            raise SubjectMismatch(
                f"subject: {name!r} has digest {held[name]}, the statement {who} says {said[name]}; restore the signed bytes"
            )


def _check_fresh(statement: Statement, key_id: str, max_age: timedelta, now: datetime) -> None:
    try:
        made = statements.signed_at(statement)
    except StatementError as error:
        raise Stale(f"freshness: the statement signed by key {key_id} has no readable time: {error}; sign it again") from None
    if made is None:
        raise Stale(f"freshness: the statement signed by key {key_id} says no time, and at most {max_age} old is asked for; sign it again")
    if made > now + SKEW:
        raise Stale(f"freshness: signed by key {key_id} at {made.isoformat()}, which is yet to come; set the clocks right and sign again")
    if now - made > max_age:
        raise Stale(f"freshness: signed by key {key_id} at {made.isoformat()}, older than {max_age}; do the work again and sign it")


def _check_revoked(statement: Statement, payload: bytes, key_id: str, revoked: Mapping[str, str]) -> None:
    named = {
        sha256(payload): "this statement",
        statements.statement_digest(statement): "this statement",
        **statements.referenced(statement),
        **{value: name for name, value in statements.subject_digests(statement).items()},
    }
    for value, name in named.items():
        if value in revoked:
            raise Revoked(
                f"revocation: {name} ({value}) in the statement signed by key {key_id} is revoked ({revoked[value]}); build without it"
            )


def verify(
    envelope: bytes | Mapping[str, Any],
    *,
    trust: Trust,
    role: str,
    predicate_type: str,
    subjects: Mapping[str, str] | str,
    max_age: timedelta | None = None,
    revoked: Mapping[str, str] | None = None,
    now: datetime | None = None,
) -> Statement:
    """The statement of an envelope, after payload type, signature, key, role, predicate type, subjects, age and revocation are checked.

    `subjects`: the things in hand. A mapping of names to SHA-256 must be the statement's list exactly, nothing missing on either side;
    one digest must be among them. `revoked`: further key ids or digests with their reasons. Raises a subclass of Refused.
    """
    payload, key_id = authenticate(envelope, trust=trust, roles=(role,), revoked=revoked)
    statement = _statement(payload)
    if statement["predicateType"] != predicate_type:
        raise WrongPredicate(
            f"predicate type: key {key_id} signed {statement['predicateType']!r}, expected {predicate_type!r}; hand over the right envelope"
        )
    _check_subjects(statements.subject_digests(statement), subjects, key_id)
    if max_age is not None:
        _check_fresh(statement, key_id, max_age, now or datetime.now(UTC))
    _check_revoked(statement, payload, key_id, {**trust.revoked.digests, **(revoked or {})})
    return statement


# --- the auditor's entry ------------------------------------------------------------------------------------------------------------


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m repro_assets.trust.verification",
        description="Check a signed statement without Dagster, lakeFS or a network. Exit: 0 good, 1 finding, 2 wrong use, 3 unreachable.",
    )
    parser.add_argument("envelope", type=Path, help="DSSE envelope (JSON)")
    parser.add_argument("--trust", type=Path, required=True, help="trust configuration (JSON): who may sign what, what is revoked")
    parser.add_argument("--role", action="append", help="role that the key must have (default: by predicate type)")
    parser.add_argument("--type", help="predicate type that is expected (default: any that this project writes)")
    parser.add_argument("--store", type=Path, help="folder of blobs (sha256/<2 hex>/<digest>): every subject is read and hashed")
    parser.add_argument("--subject", action="append", default=[], metavar="NAME=FILE", help="a file in hand; it is hashed")
    parser.add_argument("--partial", action="store_true", help="subjects that are not in hand are no finding")
    parser.add_argument("--max-age", type=float, metavar="DAYS", help="refuse an older statement")
    arguments = parser.parse_args(argv)
    for pair in arguments.subject:
        if "=" not in pair:
            parser.error(f"--subject {pair}: write NAME=FILE")
    return arguments


def _audit_subjects(said: Mapping[str, str], arguments: argparse.Namespace, key_id: str) -> str:
    """Hash what is in hand and compare; says how many of the subjects were seen."""
    held = dict(pair.split("=", 1) for pair in arguments.subject)
    seen: dict[str, str] = {name: sha256(Path(path).read_bytes()) for name, path in held.items()}
    if arguments.store:
        if not arguments.store.is_dir():
            raise FileNotFoundError(f"{arguments.store} is not a folder")
        store = FolderStore(arguments.store)
        for name, value in said.items():
            try:
                store.get_bytes(value)
            except BlobMissing:
                continue
            except BlobDamaged as error:
                raise SubjectMismatch(f"subject: {name!r}: {error}") from None
            seen.setdefault(name, value)
    absent = said.keys() - seen.keys()
    whole = {**{name: said[name] for name in absent}, **seen} if arguments.partial or not (held or arguments.store) else seen
    _check_subjects(said, whole, key_id)
    return f"{len(said) - len(absent)} of {len(said)} read and equal" + (f", {len(absent)} not in hand" if absent else "")


def _audit(arguments: argparse.Namespace) -> list[str]:
    trust = load_trust(arguments.trust)
    data = arguments.envelope.read_bytes()
    kind = _statement(_open(data, PAYLOAD_TYPE).payload)["predicateType"]
    roles = tuple(arguments.role or ROLES_FOR.get(kind, ()))
    expected = arguments.type or kind
    if kind != expected or not roles:
        known = expected if arguments.type else " or ".join(ROLES_FOR)
        raise WrongPredicate(f"predicate type: {kind!r}, expected {known}; hand over the right envelope, or name --role and --type")
    payload, key_id = authenticate(data, trust=trust, roles=roles)
    entry = trust.keys[key_id]
    statement = _statement(payload)
    said = statements.subject_digests(statement)
    lines = [
        f"envelope    {arguments.envelope}",
        f"signature   good, key {key_id}" + (f" ({entry.name})" if entry.name else ""),
        f"role        {' '.join(role for role in entry.roles if role in roles)}",
        f"predicate   {kind}",
        f"subjects    {_audit_subjects(said, arguments, key_id)}",
    ]
    now = datetime.now(UTC)
    if arguments.max_age is not None:
        _check_fresh(statement, key_id, timedelta(days=arguments.max_age), now)
    made = statements.signed_at(statement)
    lines.append(f"made        {made.isoformat() if made else 'says no time'}" + ("" if arguments.max_age is None else ", fresh"))
    _check_revoked(statement, payload, key_id, trust.revoked.digests)
    lines.append(f"revocation  {len(trust.revoked.keys)} keys and {len(trust.revoked.digests)} digests on the list, none concerns it")
    return [*lines, f"digest      {statements.statement_digest(statement)}"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the auditor's check; prints what was checked and returns the exit code."""
    arguments = _arguments(argv)
    try:
        lines = _audit(arguments)
    except Refused as error:
        print(f"REFUSED     {error}")
        return 1
    except TrustError as error:
        print(f"wrong use: {error}", file=sys.stderr)
        return 2
    except StatementError as error:
        print(f"REFUSED     statement: {error}")
        return 1
    except OSError as error:
        print(f"unreachable: {error}", file=sys.stderr)
        return 3
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
