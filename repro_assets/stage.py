"""The life of an asset, from click to commit: pin the inputs, recall earlier work, commit, report.

Every asset of the graph goes through `Stages.begin` and `Stage.commit`; what an asset computes is in the pure packages, how its page
looks is in `story.py`. Nothing here knows what any asset means.
"""

import socket
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import cached_property, partial
from typing import Any, Generic, TypeVar, cast

import dagster as dg
import msgspec
from pydantic import PrivateAttr

from repro_assets import raw, story
from repro_assets.bench import Bench
from repro_assets.documents import KINDS, Document, Made, Result
from repro_assets.memo import Memo, Remembered
from repro_assets.recipe import Loaded, Recipe
from repro_assets.shelf import SHARED_ASSETS, MissingDocument, Shelf, Snapshot, folder
from repro_assets.trust.canonical import digest, sha256
from repro_assets.trust.closure import Closure
from repro_assets.trust.environment import lock_bytes
from repro_assets.trust.hardware import hardware_class
from repro_assets.trust.memo import differing
from resources.errors import StorageError
from resources.lake import DAGSTER_LINK, SHARED

R = TypeVar("R", bound=Result)

NO_MEMO = "repro/no-memo"
REFRESH = "repro/refresh-references"
SCRATCH = "repro/scratch"
TERMINAL = "repro/terminal"  # a run that a person started in a terminal and watches there
PROGRESS_SECONDS = 5.0
NONE = "none"  # the input digest of a reference that was looked up and does not exist yet

#: asset -> the part of the recipe that its document depends on
SECTIONS: dict[str, Callable[[Recipe], dict[str, Any]]] = {
    "base_model": lambda recipe: recipe.base_model.identity(),
    "eval_suites": lambda recipe: {"suites": [suite.identity() for suite in recipe.evaluation.suites]},
    "raw_snapshot": lambda recipe: recipe.raw.identity(),
    "records": lambda recipe: recipe.records.identity(),
    "shards": lambda recipe: recipe.sharding.identity(),
    "validation_report": lambda recipe: recipe.validation.identity(),
    "training_bundle": lambda recipe: {name: value for name, value in recipe.identity().items() if name not in ("evaluation", "gates")},
    "qlora_checkpoint": lambda recipe: recipe.training.identity(),
    "eval_results": lambda recipe: recipe.evaluation.identity(),
    "promotion": lambda recipe: recipe.gates.identity(),
}


class StaleInput(Exception):
    """An upstream document that the present recipe would not have made; the message names the field and the asset to materialize."""


class Stages(dg.ConfigurableResource):
    """Opens a stage for an asset of the run. One per Dagster process; everything it needs is on the bench."""

    bench: dg.ResourceDependency[Bench]
    _clean: bool = PrivateAttr(default=False)

    def begin(
        self,
        context: dg.AssetExecutionContext,
        kind: type[R],
        *,
        needs: tuple[type[Result], ...] = (),
        shared: tuple[type[Result], ...] = (),
        code: Closure,
        key_on: tuple[type[Result], ...] | None = None,
        on_hardware: bool = False,
    ) -> "Stage[R]":
        """Pin the branch head, read the upstream documents there, refuse those that the present recipe would not have made.

        `code`: the closure of the module that makes the result, with the libraries that its result depends on. `key_on`: the inputs whose results enter the memo key (default: all).
        `on_hardware`: the result also depends on the hardware class and the locked libraries.
        """
        stage = Stage(kind, context, self.bench)
        stage._pin()
        self._remove_left_over(stage)
        for need in needs:
            stage._take(need)
        for other in shared:
            stage._share(other)
        stage._code = code
        stage._key_on = {need.asset for need in (needs + shared if key_on is None else key_on)}
        stage._hardware = {"hardware": hardware_class(), "lock": sha256(lock_bytes() or b"")} if on_hardware else {}
        return stage

    def _remove_left_over(self, stage: "Stage[Any]") -> None:
        """Once a run: transactions of writers that died long ago. Who may not delete them can still work."""
        if self._clean:
            return
        self._clean = True
        try:
            for branch in self.bench.lake.client.clean():
                stage.log.info(f"{stage.asset}: removed transaction {branch}, which a dead writer left")
        except StorageError as error:
            stage.log.warning(f"{stage.asset}: transactions of dead writers stay behind: {error}")


class Stage(Generic[R]):
    """One asset in one run, between `begin` and `commit`."""

    def __init__(self, kind: type[R], context: dg.AssetExecutionContext, bench: Bench) -> None:
        self.kind, self.context, self.bench = kind, context, bench
        self.asset = kind.asset
        self.loaded: Loaded = bench.recipe.load()
        self.recipe: Recipe = self.loaded.recipe
        self.section: dict[str, Any] = SECTIONS[self.asset](self.recipe)
        self.blobs = bench.blobs.store
        self.shelf = Shelf(bench.lake.client, self.blobs)
        self.memo = Memo(bench.objects, self.blobs, bench.signing)
        self.tags: Mapping[str, str] = context.run.tags
        self.log = context.log
        self.inputs: dict[str, str] = {}
        self._documents: dict[str, Document[Any, Any]] = {}
        self._shared: dict[str, Any] = {}
        self._results: dict[str, str] = {}
        self._code = Closure(digest="", sources={}, libraries={})
        self._key_on: set[str] = set()
        self._hardware: dict[str, str] = {}
        self._remembered: Remembered | None = None
        self._said = 0.0

    # ---- begin

    def _pin(self) -> None:
        """Resolve the branch head once: every read of this stage goes through that commit."""
        lake = self.bench.lake.client
        lake.ensure()
        if self.asset in SHARED_ASSETS:
            self.key, self.branch = "", SHARED
        else:
            self.key = self.context.partition_key
            self.snapshot: Snapshot = self.shelf.snapshot(self.key)
            self.branch = self.snapshot.branch
            if scratch := self.tags.get(SCRATCH):
                self.branch = f"scratch-{scratch}"
                lake.ensure_branch(self.branch, self.snapshot.commit, hidden=True)
        self.head = lake.head(self.branch)
        self.previous = self.shelf.read(self.head, self.key, self.recipe.name, self.asset)

    def _take(self, kind: type[Result]) -> None:
        """Read an upstream document of this snapshot and recipe, and hold it against the present recipe and its own inputs."""
        name = kind.asset
        document = self.shelf.read(self.head, self.key, self.recipe.name, name)
        if document is None:
            raise MissingDocument(
                f"{self.asset} needs {name} of snapshot {self.key} under recipe {self.recipe.name!r}, which is not there: "
                f"run `repro materialize --snapshot {self.key} --select {name}` first, or click Materialize on {name}"
            )
        now = SECTIONS[name](self.recipe)
        if changed := differing(document.section, now):
            raise StaleInput(
                f"{name} of snapshot {self.key} was made by another recipe than {self.loaded.path.name} is now: {'; '.join(changed[:5])}. "
                f"Materialize {name} again (`repro materialize --snapshot {self.key} --select {name}`), or take the change back"
            )
        for upstream, read in document.inputs.items():
            if upstream in KINDS and upstream not in SHARED_ASSETS:
                there = self.shelf.digest_at(self.head, self.key, self.recipe.name, upstream)
                if there is not None and there != read:
                    raise StaleInput(
                        f"{name} of snapshot {self.key} was made from {upstream} {read[:12]}, but {upstream} is {there[:12]} now: "
                        f"materialize {name} again (`repro materialize --snapshot {self.key} --select {name}`)"
                    )
        self._hold(name, document)

    def _share(self, kind: type[Result]) -> None:
        """A shared asset, as the upstream documents or this asset's own previous document named it, else its newest state."""
        name = kind.asset
        named = [document.inputs[name] for document in self._documents.values() if name in document.inputs]
        if not named and self.previous is not None and name in self.previous.inputs and not self.tags.get(REFRESH):
            named = [self.previous.inputs[name]]
        if named:
            _inputs, result = self.shelf.by_digest(named[0], kind)
            self._fits(name, self.shelf.section_of(named[0], kind))
            self.inputs[name], self._results[name] = named[0], digest(result)
            self._shared[name] = result
        else:
            newest = self.shelf.shared(self.recipe.name, name, self.key)
            self._fits(name, newest.section)
            self._hold(name, newest)

    def _fits(self, name: str, section: dict[str, Any]) -> None:
        """Refuse a shared document that the present recipe would not have made."""
        if changed := differing(section, SECTIONS[name](self.recipe)):
            raise StaleInput(
                f"{name} was made by another recipe than {self.loaded.path.name} is now: {'; '.join(changed[:5])}. Make it again "
                f"(`repro materialize --select {name}`), then `repro materialize --snapshot {self.key} --refresh-references`; or take the change back"
            )

    def _hold(self, name: str, document: Document[Any, Any]) -> None:
        self._documents[name] = document
        self.inputs[name], self._results[name] = document.digest, digest(document.result)

    # ---- inputs

    def document(self, kind: type[Result]) -> Document[Any, Any]:
        """The upstream document as pinned."""
        return self._documents[kind.asset]

    def input(self, kind: type[Result]) -> Any:
        """The upstream result as pinned."""
        name = kind.asset
        return self._shared[name] if name in self._shared else self._documents[name].result

    def observed(self, kind: type[Result]) -> Any:
        """What was observed when the upstream document was made: where its bytes are stored, how long it took."""
        return self._documents[kind.asset].observed

    @cached_property
    def open_raw(self) -> raw.Opener:
        """Opens the bytes of a raw object at the snapshot's commit; may be sent to another process."""
        return raw.Opener(self.bench.lake.connections, self.snapshot.commit)

    def progress(self, what: str, done: int, total: int) -> None:
        """One line in the Dagster log every few seconds: progress bars freeze its UI."""
        now = time.monotonic()
        if now - self._said > PROGRESS_SECONDS or (done == total and self._said):
            self._said = now
            self.log.info(f"{self.asset}: {what} {done:,} of {total:,}")

    def depends(self, name: str, value: str) -> None:
        """The result also depends on `value`, which is no document: it enters the memo key, not the content."""
        self._results[name] = value
        self._key_on.add(name)

    def reference(self, name: str, resolve: Callable[[], str | None]) -> str | None:
        """A digest looked up once: as the previous document of this asset named it, else what `resolve` finds now.

        So that a rebuild of an old snapshot compares with what it was compared with then (`repro/refresh-references` looks again).
        """
        if self.previous is not None and name in self.previous.inputs and not self.tags.get(REFRESH):
            found = self.previous.inputs[name]
        else:
            found = resolve() or NONE
        self.inputs[name] = self._results[name] = found
        self._key_on.add(name)
        return None if found == NONE else found

    # ---- memo

    def components(self) -> dict[str, Any]:
        """Everything the result depends on; its digest is the memo key."""
        return {
            "asset": self.asset,
            "schema": self.kind.schema,
            "inputs": {name: self._results[name] for name in sorted(self._key_on)},
            "section": self.section,
            "code": self._code.digest,
            "libraries": self._code.libraries,
            **self._hardware,
        }

    def recall(self) -> Document[R, Any] | None:
        """The document that the same inputs, recipe section and code made before, or None. Its outputs are seen to exist."""
        components = self.components()
        found = self.memo.find(components, *KINDS[self.asset])
        if self.unmemoed:
            self._remembered = found
            self.log.info(f"{self.asset}: memo not used (run tag {NO_MEMO}), executing again")
            return None
        if found is None:
            self.log.info(f"{self.asset}: {self.memo.reason}")
            return None
        self.log.info(f"{self.asset}: nothing changed, recalled the result of {found.made_at}")
        return self._document(cast(R, found.result), found.observed, reused=True)

    @property
    def unmemoed(self) -> bool:
        """Whether this run executes everything again, whatever is remembered."""
        return bool(self.tags.get(NO_MEMO) or self.tags.get(SCRATCH))

    def relative(self) -> tuple[R, Any] | None:
        """The newest result of this asset made by the same section and code from other inputs: a source of unchanged parts."""
        if self.unmemoed:
            return None
        found = self.memo.find_relative(self.components(), *KINDS[self.asset])
        return (cast(R, found.result), found.observed) if found else None

    # ---- commit

    def _document(self, result: R, observed: Any, *, reused: bool) -> Document[R, Any]:
        components = self.components()
        made = Made(
            key=digest(components),
            components=components,
            sources=self._code.sources,
            reused=reused,
            run=self.context.run.run_id,
            at=datetime.now(UTC).isoformat(timespec="seconds"),
            host=socket.gethostname(),
            actor=self.tags.get("user") or self.bench.actor,
        )
        return Document(inputs=dict(sorted(self.inputs.items())), section=self.section, result=result, observed=observed, made=made)

    def commit(self, made: Document[R, Any] | tuple[R, Any], *, keep: tuple[str, ...] = (), renew: bool = False) -> dg.MaterializeResult:
        """One lake transaction, then the materialization with data version and story.

        `keep`: sub-folders of the asset that this write leaves alone. `renew`: write the observed half even when the content is as it
        was. A result that differs from what the same key gave before is a failed check, and the branch keeps what it had.
        """
        recalled = isinstance(made, Document)
        document = made if isinstance(made, Document) else self._document(made[0], made[1], reused=False)
        differences = self._differences(document)
        if differences and not self.tags.get(SCRATCH):
            document = self.previous or document
            written = self.head
        elif self._stands(document) and not (renew or self.unmemoed):
            document, written = cast(Document[R, Any], self.previous), self.head
        else:
            if not self.tags.get(SCRATCH):
                self.memo.keep(document)  # first: a process that dies in between leaves an entry too many, not a document without one
            written = self._write(document, keep)
        self.log.info(f"{self.asset}: data version {document.digest[:12]}, commit {written[:12]}")
        return dg.MaterializeResult(
            data_version=dg.DataVersion(document.digest),
            metadata={
                **story.page(self.asset, document, written, self.branch, partial(self.bench.lake.link, written, self._folder)),
                "executed": "no, recalled from the memo" if recalled else "yes",
            },
            check_results=[self._check(document, differences, recalled)],
        )

    @property
    def _folder(self) -> str:
        return folder(self.key, self.recipe.name, self.asset)

    def _stands(self, document: Document[R, Any]) -> bool:
        """Whether the branch already says this, made from the same key; another key is written, so that `repro why` compares with it."""
        return self.previous is not None and self.previous.digest == document.digest and self.previous.made.key == document.made.key

    def _write(self, document: Document[R, Any], keep: tuple[str, ...]) -> str:
        content, beside = self.blobs.put_many([document.content(), document.beside()])
        files = {**document.files(), "document.json": content, "observed.json": beside}
        what = self.key or "shared"
        return self.bench.lake.client.write(
            self.branch,
            self._folder,
            files,
            message=f"{self.asset} of {what} ({self.recipe.name})",
            metadata=self.commit_metadata(document),
            keep=keep,
        ).commit

    def commit_metadata(self, document: Document[R, Any]) -> dict[str, str]:
        """What a lakeFS commit of this asset says about itself."""
        run = {DAGSTER_LINK: f"{self.bench.ui_url}/runs/{self.context.run.run_id}"} if self.bench.ui_url else {}
        return {
            "asset": self.asset,
            "snapshot": self.key or "shared",
            "recipe": self.recipe.name,
            "document": document.digest,
            "code": document.made.components["code"] or "none",
            "run": self.context.run.run_id,
            "actor": document.made.actor,
            "host": document.made.host,
            **run,
        }

    def _differences(self, document: Document[R, Any]) -> list[str]:
        """What a re-execution under the same key made differently, by field."""
        if self._remembered is None or document.made.reused:
            return []
        return differing(msgspec.to_builtins(self._remembered.result), msgspec.to_builtins(document.result))

    def _check(self, document: Document[R, Any], differences: list[str], recalled: bool) -> dg.AssetCheckResult:
        """The check `reproduces`: the same key gave the same content."""
        if differences:
            said = f"not deterministic: the same key gave another content in {'; '.join(differences[:10])}"
        elif recalled:
            said = "recalled: the same inputs, recipe section and code were executed before"
        elif self._remembered is not None:
            said = "executed again under the same key: every digest came out the same"
        elif self.previous is not None and self.previous.made.key != document.made.key:
            said = f"changed because {'; '.join(differing(self.previous.made.components, document.made.components)[:10])}"
        else:
            said = "first execution under this key: nothing to compare with yet"
        if differences:
            self.log.error(f"{self.asset}: {said}")
        # A reproduction goes on to the end: its certificate lists every difference, not only the first asset's.
        severity = dg.AssetCheckSeverity.WARN if self.tags.get(SCRATCH) else dg.AssetCheckSeverity.ERROR
        return dg.AssetCheckResult(
            check_name="reproduces", passed=not differences, severity=severity, description=said, metadata={"differs": differences[:50]}
        )


def reproduces(asset: str) -> list[dg.AssetCheckSpec]:
    """The check that every asset reports from inside its own step."""
    said = "The same inputs, recipe section and code gave the same content (compared whenever the memo is not used)."
    return [dg.AssetCheckSpec("reproduces", asset=asset, description=said, blocking=True)]
