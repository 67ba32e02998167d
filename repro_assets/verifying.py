"""Verification of one snapshot: every document, blob, signature and link of the chain, read anew from the servers. Changes nothing.

What a signature must say is `trust/verification.py`; re-executing is `reproducing.py`.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from repro_assets import raw
from repro_assets.bench import Bench
from repro_assets.certified import Certificates
from repro_assets.documents import KINDS, Document, DocumentError, RawFile
from repro_assets.health import Finding
from repro_assets.inspecting import Inspector
from repro_assets.memo import Memo
from repro_assets.releases import ReleaseError, Releases
from repro_assets.shelf import SHARED_ASSETS, Shelf, folder
from repro_assets.trust.blob import Blob, BlobError
from repro_assets.trust.bundle import subjects as bundle_subjects
from repro_assets.trust.canonical import canonical, digest, sha256
from repro_assets.trust.memo import ForgedMemo, open_entry
from repro_assets.trust.statements import BUNDLE, CHECKPOINT, PROVENANCE, TEST_RESULT, VSA, decision_of, referenced, timeless
from repro_assets.trust.verification import Refused, verify
from resources.errors import NotFound, StorageError

THREADS = 8
ROLES = {
    "training_bundle": ("builder", PROVENANCE),
    "qlora_checkpoint": ("builder", PROVENANCE),
    "eval_results": ("evaluator", TEST_RESULT),
    "promotion": ("approver", VSA),
}
BUILDS = {"training_bundle": BUNDLE, "qlora_checkpoint": CHECKPOINT}  # one role signs both: a bundle is no checkpoint


class Verifier:
    """Looks at one snapshot under one recipe. Cached copies are not believed: every byte comes from the server."""

    def __init__(self, bench: Bench, key: str) -> None:
        self.bench, self.key = bench, key
        self.inspector = Inspector(bench)
        self.lake, self.recipe = self.inspector.lake, self.inspector.recipe.name
        self.blobs = bench.blobs.store.without_cache()
        self.shelf = Shelf(self.lake, self.blobs)
        self.snapshot = self.shelf.snapshot(key)
        self.head = self.inspector.head(key)
        self.documents: dict[str, Document[Any, Any]] = {}
        self.shared: dict[str, Any] = {}

    def findings(self, deep: bool = False) -> Iterator[Finding]:
        """Document by document in graph order, then releases and certificates; `deep` hashes the raw objects again too."""
        for asset in KINDS:
            if asset not in SHARED_ASSETS:
                yield from self._asset(asset)
        if not self.documents:
            yield Finding(
                self.key,
                False,
                f"nothing was made of this snapshot under recipe {self.recipe!r}: `repro materialize --snapshot {self.key}`",
            )
        yield from self._shared()
        yield from self._releases()
        now = {asset: document.digest for asset, document in self.documents.items()}
        trust = self.bench.signing.trust
        yield from Certificates(self.lake, self.blobs, trust, self.head, self.key, self.recipe).findings(now)
        if deep and "raw_snapshot" in self.documents:
            yield from self._raw(self.documents["raw_snapshot"].result.files_listed)

    # ---- one document

    def _asset(self, asset: str) -> Iterator[Finding]:
        try:
            document = self.shelf.read(self.head, self.key, self.recipe, asset)
        except (BlobError, DocumentError) as error:
            yield Finding(asset, False, str(error))
            return
        if document is None:
            return
        self.documents[asset] = document
        bad = [
            *self._tree(asset, document),
            *self._blobs(asset, document.files()),
            *self._chain(asset, document),
            *self._origin(asset, document),
        ]
        yield from bad
        if not bad:
            yield Finding(asset, True, f"document {document.digest[:12]} and {len(document.files())} blobs")
        if asset in ROLES:
            yield self._signature(asset, document)

    def _tree(self, asset: str, document: Document[Any, Any]) -> Iterator[Finding]:
        """The readable names in lakeFS must lead to the blobs that the document names."""
        place = f"{folder(self.key, self.recipe, asset)}/"
        there = {entry.path.removeprefix(place): entry.sha256 for entry in self.lake.list(self.head, place)}
        for name, blob in document.files().items():
            if there.get(name) != blob.sha256:
                found = there.get(name) or ("another tool's object" if name in there else "nothing")
                yield Finding(
                    f"{asset}/{name}", False, f"lakeFS has {found[:64]} there, the document says {blob.sha256}: materialize {asset} again"
                )

    def _blobs(self, what: str, files: Mapping[str, Blob]) -> Iterator[Finding]:
        """Every byte of every blob, from the server."""
        with ThreadPoolExecutor(THREADS) as pool:
            for name, error in zip(files, pool.map(self._read, files.values()), strict=True):
                if error:
                    yield Finding(f"{what}/{name}", False, error)

    def _read(self, blob: Blob) -> str:
        size = 0
        try:
            with self.blobs.open(blob.sha256) as stream:
                while chunk := stream.read(1 << 20):
                    size += len(chunk)
        except BlobError as error:
            return str(error)
        return (
            "" if size == blob.size else f"blob {blob.sha256} has {size} bytes, the document says {blob.size}: materialize its asset again"
        )

    def _chain(self, asset: str, document: Document[Any, Any]) -> Iterator[Finding]:
        """What the document says it was made from must be what lies upstream."""
        for name, read in document.inputs.items():
            if name in self.documents and self.documents[name].digest != read:
                yield Finding(
                    asset,
                    False,
                    f"was made from {name} {read[:12]}, but {name} is {self.documents[name].digest[:12]}: one of them was changed or is "
                    f"older than the other; materialize {asset} again",
                )

    def _origin(self, asset: str, document: Document[Any, Any]) -> Iterator[Finding]:
        """The orchestrator signed a memo entry for what it made: a document that somebody wrote into lakeFS by hand has none."""
        key = document.made.key
        if digest(document.made.components) != key:
            yield Finding(
                f"{asset}: origin",
                False,
                f"its components do not have the key {key[:12]} it names: the document was not written by this project",
            )
            return
        try:
            entry = open_entry(self.bench.objects.get(f"memo/{key}"), self.bench.signing.trust, key)
        except NotFound:
            again = f"`repro materialize --snapshot {self.key} --select {asset} --no-memo` makes it anew"
            yield Finding(f"{asset}: origin", False, f"no signed memo entry says that this was made here; {again}")
            return
        except ForgedMemo as error:
            yield Finding(f"{asset}: origin", False, str(error))
            return
        made = sha256(canonical(document.result))
        if entry.result.sha256 != made:
            yield Finding(
                f"{asset}: origin",
                False,
                f"the document's result is {made[:12]}, the orchestrator signed {entry.result.sha256[:12]} for the same work: the document "
                f"is forged; `repro materialize --snapshot {self.key} --select {asset} --no-memo` executes the work again",
            )
        elif document.section != document.made.components.get("section"):
            yield Finding(f"{asset}: origin", False, "its recipe section is not the one that its key was made from: the document is forged")

    # ---- signatures

    def _signature(self, asset: str, document: Document[Any, Any]) -> Finding:
        role, predicate = ROLES[asset]
        what = f"{asset}: signature"
        try:
            envelope = self.blobs.get_bytes(document.observed.envelope.sha256)
            statement = verify(
                envelope, trust=self.bench.signing.trust, role=role, predicate_type=predicate, subjects=self._subjects(asset)
            )
        except (BlobError, Refused) as error:
            return Finding(what, False, str(error))
        wrong = self._said_otherwise(asset, document, statement)
        return Finding(what, not wrong, wrong or f"by a trusted {role}")

    def _subjects(self, asset: str) -> dict[str, str]:
        """The things in hand that the statement must speak of, all of them and no others."""
        if asset == "training_bundle" and "shards" in self.documents:
            return dict(bundle_subjects(self.documents["shards"].result, self.documents[asset].section))
        checkpoint = self.documents.get("qlora_checkpoint")
        return {f"adapter/{name}": blob.sha256 for name, blob in checkpoint.result.adapter.items()} if checkpoint else {}

    def _said_otherwise(self, asset: str, document: Document[Any, Any], statement: Any) -> str:
        """What the document says and the signed statement does not; empty when they agree."""
        result = document.result
        if asset in BUILDS and (build := statement["predicate"]["buildDefinition"]["buildType"]) != BUILDS[asset]:
            return f"the builder signed a {build}, not a {BUILDS[asset]}"
        if asset == "training_bundle":
            return (
                ""
                if digest(timeless(statement)) == result.statement.sha256
                else "the signed statement is not the one that the document names"
            )
        if asset == "promotion":
            decision = decision_of(statement)
            if decision != result.decision:
                return f"the approver signed {decision!r}, the document says {result.decision!r}: the document is forged"
            named = {**{f"input {name}": value for name, value in document.inputs.items() if len(value) == 64}, "policy": result.policy}
        elif asset == "eval_results":
            named = {"samples": result.samples.sha256}
        else:
            named = {"ledger": result.ledger.sha256}
        said = referenced(statement)
        lost = [f"{name} {value[:12]}" for name, value in named.items() if value not in said]
        return f"the signed statement does not name {', '.join(lost)}, which the document stands on" if lost else ""

    # ---- beside the chain

    def _shared(self) -> Iterator[Finding]:
        """Base model and suites as the documents name them by digest, whatever the branch shared holds by now."""
        named = sorted(
            {(name, value) for document in self.documents.values() for name, value in document.inputs.items() if name in SHARED_ASSETS}
        )
        for name, value in named:
            try:
                _inputs, result = self.shelf.by_digest(value, KINDS[name][0])
            except (BlobError, DocumentError) as error:
                yield Finding(name, False, str(error))
                continue
            bad = list(self._blobs(name, result.files()))
            yield from bad
            if not bad:
                yield Finding(name, True, f"document {value[:12]} and {len(result.files())} blobs")

    def _releases(self) -> Iterator[Finding]:
        """Releases of this snapshot on main: their decision must verify for the adapter they hand out."""
        try:
            found = [
                release
                for release in Releases(self.lake, self.blobs).all()
                if release.snapshot == self.key and release.recipe == self.recipe
            ]
        except (ReleaseError, BlobError, msgspec.MsgspecError) as error:
            yield Finding("releases", False, str(error))
            return
        for release in found:
            what = f"release {release.number}"
            subjects = {f"adapter/{name}": blob.sha256 for name, blob in release.adapter.items()}
            try:
                envelope = self.blobs.get_bytes(release.decision)
                statement = verify(envelope, trust=self.bench.signing.trust, role="approver", predicate_type=VSA, subjects=subjects)
                said = decision_of(statement)
            except (BlobError, Refused) as error:
                yield Finding(what, False, str(error))
                continue
            good = said == "promote"
            yield Finding(
                what, good, "decision signed by a trusted approver" if good else f"the approver signed {said!r}, which releases nothing"
            )

    def _raw(self, files: tuple[RawFile, ...]) -> Iterator[Finding]:
        reader = raw.Reader(self.lake, Memo(self.bench.objects, self.blobs, self.bench.signing), again=True)
        bad = 0
        for file in files:
            wrong = ""
            try:
                found = reader.digest(self.snapshot.commit, self.lake.stat(self.snapshot.commit, file.path))
                if found != file.sha256:
                    wrong = f"SHA-256 is {found}, the snapshot says {file.sha256}: restore the object from a copy"
            except (OSError, StorageError) as error:
                wrong = str(error)
            if wrong:
                bad += 1
                yield Finding(f"raw {file.path}", False, wrong)
        if not bad:
            yield Finding("raw", True, f"{len(files)} raw objects read again, every SHA-256 as recorded")
