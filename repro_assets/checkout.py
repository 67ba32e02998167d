"""The files of a snapshot back on disk: raw data, records, shards or the adapter, verified while they are written, all or nothing.

Loading shards from such a folder is `data/loading.py`; bringing data in is `importing.py`.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from repro_assets.bench import Bench
from repro_assets.data import lines, loading
from repro_assets.data.errors import SourceError
from repro_assets.documents import Document
from repro_assets.inspecting import Inspector
from repro_assets.terminal import WRONG_USE, Failure
from repro_assets.trust.blob import Blob
from repro_assets.trust.canonical import canonical

What = Literal["raw", "records", "shards", "adapter"]
Format = Literal["raw", "jsonl", "parquet", "datasets"]

#: what -> the asset whose document says which files there are
ASSETS: dict[str, str] = {"raw": "raw_snapshot", "records": "records", "shards": "shards", "adapter": "qlora_checkpoint"}
FORMATS: dict[str, tuple[str, ...]] = {
    "raw": ("raw",),
    "records": ("raw", "jsonl", "parquet", "datasets"),
    "shards": ("raw", "jsonl", "parquet", "datasets"),
    "adapter": ("raw",),
}
MANIFEST = "manifest.json"
CHUNK = 1 << 20
ROWS = 10_000  # rows of one Parquet row group

Progress = Callable[[int, int], None]


class Listed(msgspec.Struct, frozen=True):
    """One file of a checkout, its path relative to the folder."""

    path: str
    sha256: str
    size: int


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a checkout holds. `document`: data version of the asset; its content lies beside as document.json. `commit`: lakeFS commit it was
    read at. `files`: everything else in the folder, sorted by path."""

    snapshot: str
    recipe: str
    what: str
    format: str
    document: str
    commit: str
    files: tuple[Listed, ...]


def check_out(
    bench: Bench, key: str, folder: Path, what: What = "raw", format: Format | None = None, progress: Progress | None = None
) -> Manifest:
    """Write the files to `folder`, which must not exist or be empty; it appears whole or not at all. `format` raw: files as they are.

    Raises Failure for a folder that is in use or a format that `what` does not have, BlobDamaged or SourceError for bytes that are not
    what the documents say, MissingDocument naming the command that makes what is missing.
    """
    chosen = format or "raw"
    if chosen not in FORMATS[what]:
        raise Failure(WRONG_USE, f"{what} can be checked out as {', '.join(FORMATS[what])}, not as {chosen}")
    folder = Path(os.path.abspath(folder))
    _refuse_used(folder)
    inspector = Inspector(bench)
    document = inspector.show(ASSETS[what], key)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        (scratch / loading.DOCUMENT).write_bytes(document.content())
        writer = _Writer(inspector, key, document, scratch, progress or (lambda _done, _total: None))
        getattr(writer, f"{what}_{chosen}")()
        commit = inspector.shelf.snapshot(key).commit if what == "raw" else inspector.head(key)
        manifest = Manifest(key, inspector.recipe.name, what, chosen, document.digest, commit, tuple(_listed(scratch)))
        (scratch / MANIFEST).write_bytes(canonical(manifest) + b"\n")
        scratch.chmod(0o777 & ~_umask())
        os.replace(scratch, folder)  # replaces an empty folder, refuses one that somebody filled meanwhile
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return manifest


def _refuse_used(folder: Path) -> None:
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise Failure(WRONG_USE, f"{folder} is no folder; give one that is new or empty")
    if folder.is_dir() and (there := sorted(entry.name for entry in folder.iterdir())):
        raise Failure(WRONG_USE, f"{folder} is not empty (it holds {there[0]!r}); give a new or an empty folder")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _listed(root: Path) -> Iterator[Listed]:
    """Every file written, hashed again from disk."""
    found = []
    for path in root.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            found.append(Listed(path.relative_to(root).as_posix(), digest, path.stat().st_size))
    return iter(sorted(found, key=lambda item: item.path.encode()))


class _Writer:
    """Writes one asset's files under `root`. A method for each pair of what and format."""

    def __init__(self, inspector: Inspector, key: str, document: Document[Any, Any], root: Path, progress: Progress) -> None:
        self.inspector, self.key, self.document, self.root, self.progress = inspector, key, document, root, progress
        self.store = inspector.shelf.blobs

    # ---- as they are

    def raw_raw(self) -> None:
        commit = self.inspector.shelf.snapshot(self.key).commit
        done = 0
        for file in self.document.result.files_listed:
            path = self._path(f"raw/{file.path}")
            hashed = hashlib.sha256()
            with self.inspector.lake.open(commit, file.path) as stream, path.open("xb") as out:
                while block := stream.read(CHUNK):
                    hashed.update(block)
                    out.write(block)
                    done += len(block)
                    self.progress(done, self.document.result.size)
            if (found := hashed.hexdigest()) != file.sha256:
                raise SourceError(
                    f"{file.path}: the bytes read have SHA-256 {found}, the snapshot says {file.sha256}: restore the raw object from a copy; "
                    "nothing was checked out"
                )

    def records_raw(self) -> None:
        self._blobs(self.document.result.files())

    def shards_raw(self) -> None:
        """Every leaf is loaded once, so that its identity is checked and not only the stored bytes."""
        opened = self._opened()
        for number, entry in enumerate(opened.entries, start=1):
            opened.verified(entry)
            self.store.get_file(self.document.observed.stored[entry.sha256].sha256, self._path(f"leaves/{entry.sha256}.arrow"))
            self.progress(number, len(opened.entries))
        self._blobs(self.document.result.files())

    def adapter_raw(self) -> None:
        self._blobs({f"adapter/{name}": blob for name, blob in self.document.result.adapter.items()})

    def _blobs(self, files: dict[str, Blob]) -> None:
        for number, (name, blob) in enumerate(files.items(), start=1):
            self.store.get_file(blob.sha256, self._path(name))
            self.progress(number, len(files))

    def _path(self, name: str) -> Path:
        path = self.root / name
        if not path.resolve().is_relative_to(self.root.resolve()):
            raise SourceError(f"{name}: leads out of the folder; rename the raw object")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    # ---- as rows

    def records_jsonl(self) -> None:
        for split, rows in self._record_rows():
            self._jsonl(split, rows)

    def shards_jsonl(self) -> None:
        for split, rows in self._shard_rows():
            self._jsonl(split, rows)

    def records_parquet(self) -> None:
        for split, rows in self._record_rows():
            self._parquet(self.root / f"{split}.parquet", rows, _record_schema())

    def shards_parquet(self) -> None:
        for split, rows in self._shard_rows():
            self._parquet(self.root / f"{split}.parquet", rows, _shard_schema())

    def records_datasets(self) -> None:
        self._datasets(self._record_rows(), _record_schema())

    def shards_datasets(self) -> None:
        self._datasets(self._shard_rows(), _shard_schema())

    def _record_rows(self) -> Iterator[tuple[str, Iterator[dict[str, Any]]]]:
        for split in self._splits():
            blobs = [leaf.blob for leaf in self.document.result.leaves if leaf.split == split]
            yield (
                split,
                (
                    {
                        "id": record.id,
                        "key": record.key,
                        "messages": [msgspec.to_builtins(message) for message in record.messages],
                        "slices": msgspec.json.encode(record.slices).decode(),
                    }
                    for record in lines.read(self.store, blobs)
                ),
            )

    def _shard_rows(self) -> Iterator[tuple[str, Iterator[dict[str, Any]]]]:
        opened = self._opened()
        for split in self._splits():
            yield (
                split,
                (
                    row
                    for entry in opened.entries
                    if entry.split == split
                    for row in loading.batch_of(opened.verified(entry), split).drop_columns(["split"]).to_pylist()
                ),
            )

    def _splits(self) -> list[str]:
        return list(dict.fromkeys(leaf.split for leaf in self.document.result.leaves))

    def _opened(self) -> loading.OpenShards:
        return loading.open_shards(self.store, self.document.result, self.document.observed.stored, split=None)

    def _jsonl(self, split: str, rows: Iterable[dict[str, Any]]) -> None:
        encode = msgspec.json.Encoder().encode
        with (self.root / f"{split}.jsonl").open("xb") as out:
            for number, row in enumerate(rows, start=1):
                out.write(encode(row) + b"\n")
                if number % ROWS == 0:
                    self.progress(number, number)

    def _parquet(self, path: Path, rows: Iterable[dict[str, Any]], schema: Any) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        with pq.ParquetWriter(path, schema, compression="zstd") as out:
            for batch in _batched(rows):
                out.write_table(pa.Table.from_pylist(batch, schema=schema))

    def _datasets(self, splits: Iterable[tuple[str, Iterable[dict[str, Any]]]], schema: Any) -> None:
        """A `datasets.DatasetDict` folder; it opens with `datasets.load_from_disk`."""
        import datasets

        work = self.root / ".parquet"
        work.mkdir()
        datasets.disable_progress_bars()
        try:
            for split, rows in splits:
                self._parquet(work / f"{split}.parquet", rows, schema)
            made = {
                path.stem: datasets.Dataset.from_parquet(str(path), cache_dir=str(work / "cache"))
                for path in sorted(work.glob("*.parquet"))
            }
            datasets.DatasetDict(made).save_to_disk(str(self.root / "dataset"))
        finally:
            shutil.rmtree(work)


def _batched(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == ROWS:
            yield batch
            batch = []
    if batch:
        yield batch


def _record_schema() -> Any:
    import pyarrow as pa

    names = [field.name for field in msgspec.structs.fields(lines.Message)]
    message = pa.struct([(name, pa.string()) for name in names])
    return pa.schema([("id", pa.string()), ("key", pa.string()), ("messages", pa.list_(message)), ("slices", pa.string())])


def _shard_schema() -> Any:
    import pyarrow as pa

    return pa.schema(
        [
            ("record", pa.string()),
            ("key", pa.string()),
            ("slices", pa.string()),
            ("tokens", pa.int64()),
            ("trained", pa.int64()),
            ("cut", pa.uint32()),
            ("input_ids", pa.list_(pa.int32())),
            ("labels", pa.list_(pa.int32())),
        ]
    )
