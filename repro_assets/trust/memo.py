"""Memo entries: what a piece of work was done from, what came out, and the orchestrator's signature over both.

Pure: where entries lie and whether their outputs still exist is the caller's (`stage.py`).
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
from securesystemslib.signer import Signer

from repro_assets.trust.blob import Blob
from repro_assets.trust.canonical import canonical, digest
from repro_assets.trust.signing import sign_payload
from repro_assets.trust.verification import Refused, Trust, authenticate

PAYLOAD_TYPE = "application/vnd.repro-assets.memo+json"

_ABSENT = object()
_HEX = re.compile(r"[0-9a-f]{40,64}")


class ForgedMemo(Exception):
    """A memo entry that must not be used; the message names the key and what is wrong. The work is then simply done again."""


class MemoKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that decides what comes out, as nested JSON: asset, inputs, section, closure, engines, hardware."""

    components: dict[str, Any]

    @property
    def digest(self) -> str:
        return digest(self.components)


class MemoEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`key` is the digest of `components`. `result` is the blob of document.json, `observed` the one of observed.json."""

    key: str
    components: dict[str, Any]
    result: Blob
    observed: Blob

    @property
    def digest(self) -> str:
        """The document's content digest: the asset's data version."""
        return self.result.sha256


def entry(key: MemoKey, result: Blob, observed: Blob) -> MemoEntry:
    """The entry for work done from `key`."""
    return MemoEntry(key.digest, key.components, result, observed)


def seal(entry: MemoEntry, signer: Signer) -> bytes:
    """DSSE envelope of `entry`, by the memo key. Raises ValueError when its key is not the digest of its components."""
    if entry.key != digest(entry.components):
        raise ValueError(f"memo {entry.key}: the components' digest is {digest(entry.components)}")
    return sign_payload(canonical(entry), PAYLOAD_TYPE, signer)


def open_entry(data: bytes, trust: Trust, key: str) -> MemoEntry:
    """The entry in `data`, which must be for `key` and signed by a key trusted as `memo`. Raises ForgedMemo naming why not."""
    try:
        payload, key_id = authenticate(data, trust=trust, roles=("memo",), payload_type=PAYLOAD_TYPE)
    except Refused as error:
        raise ForgedMemo(f"memo {key}: {error}") from error
    try:
        found = msgspec.json.decode(payload, type=MemoEntry)
    except (msgspec.DecodeError, ValueError) as error:
        raise ForgedMemo(f"memo {key}: signed by key {key_id} and not a memo entry: {error}") from None
    if found.key != key:
        raise ForgedMemo(f"memo {key}: signed by key {key_id} for the key {found.key}: an entry of other work was put in its place")
    if (made := digest(found.components)) != key:
        raise ForgedMemo(f"memo {key}: signed by key {key_id}, its components have the digest {made}")
    for value in (found.result.sha256, found.observed.sha256):
        if reason := trust.revoked.digests.get(value):
            raise ForgedMemo(f"memo {key}: its outcome {value} is revoked ({reason})")
    return found


def differing(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two keys' components, in words and sorted: `records: section.split.validation 0.05 -> 0.1`."""
    asset = now.get("asset", was.get("asset"))
    prefix = f"{asset}: " if isinstance(asset, str) else ""
    return [f"{prefix}{path} {_said(old)} -> {_said(new)}" for path, old, new in _walk("", dict(was), dict(now))]


def _walk(path: str, was: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """Paths of the smallest parts that differ, with both values."""
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        for name in sorted(was.keys() | now.keys()):
            yield from _walk(f"{path}.{name}" if path else name, was.get(name, _ABSENT), now.get(name, _ABSENT))
    elif isinstance(was, list | tuple) and isinstance(now, list | tuple):
        for index in range(max(len(was), len(now))):
            old = was[index] if index < len(was) else _ABSENT
            new = now[index] if index < len(now) else _ABSENT
            yield from _walk(f"{path}[{index}]", old, new)
    elif (was is _ABSENT) != (now is _ABSENT) or (was is not _ABSENT and canonical(was) != canonical(now)):
        yield path, was, now


def _said(value: Any) -> str:
    if value is _ABSENT:
        return "absent"
    if isinstance(value, str):
        return f"{value[:12]}…" if _HEX.fullmatch(value) else value or "''"
    text = canonical(value).decode()
    return text if len(text) <= 80 else f"{text[:77]}…"
