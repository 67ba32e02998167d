"""The tiny run of a snapshot: its first records rebuilt from raw here and now, and a verdict in words when they come out differently.

Rebuilding and comparing is `data/golden.py`; a full re-execution with a certificate is `reproducing.py`. Changes nothing.
"""

from typing import Any, BinaryIO, cast

import msgspec

from repro_assets.bench import Bench
from repro_assets.data import golden, tokenizing
from repro_assets.data.golden import Deviation
from repro_assets.documents import BaseModel, Document, RawFile
from repro_assets.inspecting import Inspector, changed_code, code_of
from repro_assets.recipe import RecordsSection, ShardingSection
from repro_assets.trust.canonical import sha256
from repro_assets.trust.environment import Environment, capture, lock_bytes

SAME = "same"
NON_DETERMINISTIC = "non-deterministic transform"
ENVIRONMENT = "environment differs"
#: what of a recorded environment can change bytes of the data path beside the libraries that the code names
RECORDED = ("python", "machine", "glibc")


class TinyRun(msgspec.Struct, frozen=True):
    """`golden`: digest that the stored shards give for the first `records` records; `now`: the same of those that were just made.

    `verdict`: SAME, NON_DETERMINISTIC or ENVIRONMENT. `environment`: what differs from when the shards were made, in words, whatever the
    verdict. `first`: the first record that came out differently, `differing`: how many did. `again`: digest of a second run, made only
    after a difference.
    """

    snapshot: str
    records: int
    golden: str
    now: str
    verdict: str
    environment: tuple[str, ...]
    first: Deviation | None
    differing: int
    again: str | None

    @property
    def same(self) -> bool:
        return self.verdict == SAME

    @property
    def in_words(self) -> str:
        """The verdict, with its reasons."""
        return f"{self.verdict}: {'; '.join(self.environment)}" if self.verdict == ENVIRONMENT else self.verdict


def tiny_run(bench: Bench, key: str, count: int) -> TinyRun:
    """The first `count` records of the snapshot's shards through the whole data path again, as the documents' own sections say.

    Raises MissingDocument naming the command that makes what is missing.
    """
    inspector = Inspector(bench)
    raw, records, shards = (inspector.show(asset, key) for asset in ("raw_snapshot", "records", "shards"))
    store = inspector.shelf.blobs
    _inputs, model = inspector.shelf.by_digest(shards.inputs["base_model"], BaseModel)
    commit = inspector.shelf.snapshot(key).commit

    def open_raw(file: RawFile) -> BinaryIO:
        return cast(BinaryIO, inspector.lake.open(commit, file.path))

    cleaning = msgspec.convert(records.section, RecordsSection)
    sharding = msgspec.convert(shards.section, ShardingSection)
    codec = tokenizing.load(store, model, shards.result.engine.name)
    path = golden.Path(raw.result, open_raw, records.result, cleaning, sharding, codec)
    stored = golden.first(shards.result, shards.observed, store, count)
    wanted = [item.record for item in stored]
    found = path.again(wanted, store)
    expected, now = golden.golden(stored), golden.now_vector(stored, found)
    environment = (*differences(records, shards), *_bundled(inspector, key))
    if expected == now:
        return TinyRun(key, expected.records, expected.digest, now.digest, SAME, environment, None, 0, None)
    deviations = list(golden.deviations(stored, found, path, model, store))
    again = golden.now_vector(stored, path.again(wanted, store))
    # Two runs of one process that disagree are non-deterministic whatever changed since.
    verdict = ENVIRONMENT if environment and again == now else NON_DETERMINISTIC
    first = deviations[0] if deviations else None
    return TinyRun(key, expected.records, expected.digest, now.digest, verdict, environment, first, len(deviations), again.digest)


def differences(*documents: Document[Any, Any]) -> tuple[str, ...]:
    """Libraries and code of our own that are not what these documents were made with, in words, each once."""
    said: dict[str, None] = {}
    for document in documents:
        now = code_of(type(document.result).asset)
        was = document.made.components["libraries"]
        for name in sorted(was.keys() | now.libraries.keys()):
            old, new = was.get(name, "absent"), now.libraries.get(name, "absent")
            if old != new:
                said[f"{name} {old} -> {new}"] = None
        said |= dict.fromkeys(changed_code(document.made.sources, now))
    return tuple(said)


def _bundled(inspector: Inspector, key: str) -> list[str]:
    """What the snapshot's bundle recorded of interpreter, machine and lock file and is otherwise now; nothing when there is no bundle."""
    bundle = inspector.shelf.read(inspector.head(key), key, inspector.recipe.name, "training_bundle")
    if bundle is None:
        return []
    was = msgspec.json.decode(inspector.shelf.blobs.get_bytes(bundle.observed.environment.sha256), type=Environment)
    now = capture()
    said = [f"{name} {getattr(was, name)} -> {getattr(now, name)}" for name in RECORDED if getattr(was, name) != getattr(now, name)]
    lock = lock_bytes()
    old, new = was.lock, sha256(lock) if lock is not None else None
    return said + ([f"lock file {_short(old)} -> {_short(new)}"] if old != new else [])


def _short(digest: str | None) -> str:
    return digest[:12] if digest else "absent"
