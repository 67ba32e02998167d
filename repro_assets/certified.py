"""Verification of the certificates that `reproduce` wrote beside a snapshot's documents. Writing them is `reproducing.py`.

A certificate speaks of the documents as they were when it was made: later ones do not make it false.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from repro_assets.documents import KINDS, DocumentError, parse_content
from repro_assets.health import Finding
from repro_assets.shelf import SHARED_ASSETS
from repro_assets.trust.blob import BlobError, BlobStore
from repro_assets.trust.certificates import Part, Run, grade
from repro_assets.trust.statements import CERTIFICATE, Statement, subject_digests
from repro_assets.trust.verification import Refused, Trust, authenticate, verify
from resources.errors import NotFound
from resources.lake import Entry, Lake

FOLDER = "certificates"
ENVELOPE, ENVIRONMENT = "certificate.dsse.json", "environment.json"
SUBJECT = "documents/"


class NotCertified(Refused):
    """A genuinely signed certificate that proves nothing; the message says what of it does not agree with what."""

    check = "certificate"


class Certificates:
    """The certificates of one snapshot under one recipe at one commit. `blobs` must not believe a cache."""

    def __init__(self, lake: Lake, blobs: BlobStore, trust: Trust, head: str, key: str, recipe: str) -> None:
        self.lake, self.blobs, self.trust, self.head = lake, blobs, trust, head
        self.place = f"snapshots/{key}/{recipe}/"

    def findings(self, now: Mapping[str, str]) -> Iterator[Finding]:
        """One finding a certificate. `now`: asset -> digest of the documents that are there now."""
        found: dict[str, dict[str, Entry]] = {}
        root = f"{self.place}{FOLDER}/"
        for entry in self.lake.list(self.head, root):
            name, _, file = entry.path.removeprefix(root).partition("/")
            found.setdefault(name, {})[file] = entry
        for name, files in found.items():
            what = f"{FOLDER}/{name}/{ENVELOPE}"
            try:
                yield Finding(what, True, self._certificate(name, files, now))
            except (BlobError, DocumentError, Refused, msgspec.MsgspecError, KeyError, TypeError, ValueError) as error:
                said = str(error) if isinstance(error, BlobError | DocumentError | Refused) else f"{type(error).__name__}: {error}"
                yield Finding(what, False, f"{said}; do not rely on it, `repro reproduce` writes another")

    def _certificate(self, name: str, files: Mapping[str, Entry], now: Mapping[str, str]) -> str:
        """What a certificate that holds says. Raises what `findings` reports."""
        envelope = self._file(files, ENVELOPE)
        if not envelope.startswith(name):
            raise NotCertified(f"the file is blob {envelope[:12]}, but lies in the folder of {name}: it was put there by hand")
        data = self.blobs.get_bytes(envelope)
        payload, _key = authenticate(data, trust=self.trust, roles=("builder",))
        subjects = subject_digests(msgspec.json.decode(payload, type=dict[str, Any]))
        statement = verify(data, trust=self.trust, role="builder", predicate_type=CERTIFICATE, subjects=subjects)
        documents = {subject.removeprefix(SUBJECT): value for subject, value in subjects.items() if subject.startswith(SUBJECT)}
        if len(documents) < len(subjects) or unknown(documents):
            raise NotCertified(f"it speaks of {', '.join(sorted(subjects))}, which are no documents of a snapshot")
        results = {asset: parse_content(KINDS[asset][0], self.blobs.get_bytes(value))[2] for asset, value in documents.items()}
        earlier = {asset: value for asset, value in documents.items() if now.get(asset) != value}
        for asset, value in earlier.items():
            if not self._held(asset, value):
                raise NotCertified(f"it speaks of {asset} {value[:12]}, which was never a document of this snapshot: it belongs elsewhere")
        self._agrees(statement, results, self._file(files, ENVIRONMENT))
        said = f"grade {statement['predicate']['grade']}: {statement['predicate']['meaning']}"
        changed = f"; {', '.join(sorted(earlier))} changed since" if earlier else ""
        return f"{said}; signed for {len(documents)} documents{changed}"

    def _file(self, files: Mapping[str, Entry], name: str) -> str:
        """Digest of one of the certificate's two files, its bytes seen to be right."""
        if name not in files:
            raise NotCertified(f"{name} is not there: it was deleted by hand")
        digest = files[name].sha256
        if digest is None:
            raise NotCertified(f"{name} is another tool's object (no SHA-256 in lakeFS): the certificate was overwritten")
        self.blobs.get_bytes(digest)
        return digest

    def _held(self, asset: str, value: str) -> bool:
        """Whether the snapshot's branch ever held this document under this recipe."""
        document = f"{self.place}{asset}/document.json"
        for info in self.lake.log(self.head, document):
            with contextlib.suppress(NotFound):
                if self.lake.stat(info.id, document).sha256 == value:
                    return True
        return False

    def _agrees(self, statement: Statement, results: Mapping[str, Any], environment: str) -> None:
        """The grade is the one that its own comparison earns; bundle and environment are those that lie there."""
        predicate = statement["predicate"]
        parts = [msgspec.convert({name: item[name] for name in ("scope", "compared", "differences")}, Part) for item in predicate["parts"]]
        runs = [msgspec.convert(predicate[name], Run) if name in predicate else None for name in ("original", "reexecution")]
        earned = grade(parts, *runs) or "none"
        if predicate["grade"] != earned:
            raise NotCertified(f"it claims grade {predicate['grade']}, what it compared earns {earned}")
        named = {item["name"]: item["digest"]["sha256"] for item in predicate["dependencies"]}
        bundle = results["training_bundle"].statement.sha256 if "training_bundle" in results else None
        if named.get("original") != bundle:
            raise NotCertified(f"it is about bundle {str(named.get('original'))[:12]}, its documents are of bundle {str(bundle)[:12]}")
        if named.get("environment") != environment:
            raise NotCertified(f"it was made in environment {str(named.get('environment'))[:12]}, {ENVIRONMENT} is {environment[:12]}")


def unknown(documents: Mapping[str, str]) -> set[str]:
    """Names among `documents` that are no assets of a snapshot."""
    return documents.keys() - (KINDS.keys() - set(SHARED_ASSETS))
