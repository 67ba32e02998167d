"""Remembering finished work by content: signed entries in S3, honoured only after their outputs are seen to exist.

What a key is made of is said by `stage.py`; sealing and checking an entry is `trust/memo.py`.
"""

from dataclasses import dataclass
from typing import Any

import msgspec

from repro_assets.documents import Document, Observed, Result
from repro_assets.trust.blob import Blob, BlobError, BlobStore
from repro_assets.trust.canonical import canonical, digest
from repro_assets.trust.memo import ForgedMemo, MemoKey, entry, open_entry, seal
from resources.blobs import Objects
from resources.errors import NotFound
from resources.signer import Signer


@dataclass(frozen=True)
class Remembered:
    """A result and what was observed when it was made (UTC)."""

    result: Result
    observed: Observed
    made_at: str


class Memo:
    """`memo/<key>` holds the first result of a key; `memo/near/<key without inputs>` points to the newest one of its kind."""

    def __init__(self, objects: Objects, blobs: BlobStore, keys: Signer) -> None:
        self.objects, self.blobs, self.keys = objects, blobs, keys
        self.reason = ""

    def find(self, components: dict[str, Any], kind: type[Result], observed: type[Observed]) -> Remembered | None:
        """The remembered result of this key. `reason` says why there is none."""
        return self._open(f"memo/{digest(components)}", digest(components), kind, observed)

    def find_relative(self, components: dict[str, Any], kind: type[Result], observed: type[Observed]) -> Remembered | None:
        """The newest remembered result that differs in its inputs only."""
        near = _without_inputs(components)
        return self._open(f"memo/near/{digest(near)}", digest(near), kind, observed)

    def keep(self, document: Document[Any, Any]) -> None:
        """Remember a document that was committed. The first result of a key stays; the pointer to the newest moves."""
        result, observed = self.blobs.put_many(
            [canonical(document.result), canonical({"at": document.made.at, "observed": document.observed})]
        )
        components = document.made.components
        for folder, known, first in (("memo", components, True), ("memo/near", _without_inputs(components), False)):
            sealed = seal(entry(MemoKey(known), result, observed), self.keys.signer("memo"))
            self.objects.put(f"{folder}/{digest(known)}", sealed, if_absent=first)

    def digest_of(self, place: dict[str, Any]) -> str | None:
        """The SHA-256 of an object whose place was hashed before; see `raw.Reader`."""
        try:
            return open_entry(self.objects.get(f"memo/raw/{digest(place)}"), self.keys.trust, digest(place)).result.sha256
        except (NotFound, ForgedMemo):
            return None

    def keep_digest(self, place: dict[str, Any], sha256: str, size: int) -> None:
        blob = Blob(sha256, size)
        self.objects.put(f"memo/raw/{digest(place)}", seal(entry(MemoKey(place), blob, blob), self.keys.signer("memo")), if_absent=True)

    def _open(self, name: str, key: str, kind: type[Result], observed: type[Observed]) -> Remembered | None:
        try:
            found = open_entry(self.objects.get(name), self.keys.trust, key)
        except NotFound:
            self.reason = "never executed with these inputs, this recipe section and this code"
            return None
        except ForgedMemo as error:
            self.reason = f"the memo entry is not used: {error}"
            return None
        try:
            result = msgspec.json.decode(self.blobs.get_bytes(found.result.sha256), type=kind)
            beside = msgspec.json.decode(self.blobs.get_bytes(found.observed.sha256))
            seen = msgspec.convert(beside["observed"], observed)
        except (BlobError, msgspec.ValidationError) as error:
            self.reason = f"the remembered result cannot be read, so it is made again: {error}"
            return None
        outputs = {blob.sha256 for blob in (*result.files().values(), *seen.files().values())}
        if lost := self.blobs.missing(outputs):
            self.reason = f"{len(lost)} of {len(outputs)} remembered outputs are gone from the blob store, so they are made again"
            return None
        return Remembered(result, seen, beside["at"])


def _without_inputs(components: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in components.items() if name != "inputs"}
