"""Delta and Iceberg tables as a source window: one explicit version or snapshot, its data files, and what is said of them.

Which rows are in force must follow from the files alone, or the table is refused. Bringing the files to raw is `importing.py`.
"""

import importlib
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import ModuleType
from typing import Any, BinaryIO, cast
from urllib.parse import unquote, urlsplit

import msgspec

from repro_assets.data.errors import TableError
from repro_assets.trust.blob import Blob
from repro_assets.trust.canonical import canonical

SHOWN = 12
NO_PARTITIONS = (
    "its files do not hold these columns, the table's log does: write a copy without partitions, or import without the columns "
    "(--drop-partition-columns) if no recipe needs them; `_window.json` lists each file's values"
)


class DataFile(msgspec.Struct, frozen=True, order=True):
    """One data file: its path inside the table, what the table calls it, its size in bytes, its values of the partition columns."""

    path: str
    source: str
    size: int
    partition: dict[str, str | None] = {}


@dataclass(frozen=True)
class Table:
    """One state of a table. `version` (Delta) or `snapshot_id` (Iceberg) names it; `timestamp` is when it was written, UTC, if the table
    says so. `open` gives a file's bytes; `check` refuses one whose columns are not the table's, given its schema."""

    format: str
    uri: str
    version: int | None
    snapshot_id: int | None
    timestamp: str | None
    files: tuple[DataFile, ...]
    open: Callable[[DataFile], BinaryIO]
    check: Callable[[DataFile, Any], None]

    @property
    def name(self) -> str:
        return f"version {self.version}" if self.snapshot_id is None else f"snapshot {self.snapshot_id}"

    def window(self, blobs: Mapping[str, Blob]) -> bytes:
        """What `_window.json` says: the table, its state, and every file with size and SHA-256. `blobs`: by the files' paths."""
        files = [
            {
                "path": file.path,
                "source": file.source,
                "size": blobs[file.path].size,
                "sha256": blobs[file.path].sha256,
                "partition": file.partition,
            }
            for file in self.files
        ]
        # A snapshot id has up to 19 digits, more than a JSON number holds exactly.
        number = None if self.snapshot_id is None else str(self.snapshot_id)
        said = {"format": self.format, "table": self.uri, "version": self.version, "snapshot_id": number, "timestamp": self.timestamp}
        return canonical({**said, "files": files})


def delta(
    uri: str, version: int | None, *, storage_options: Mapping[str, str] | None = None, drop_partition_columns: bool = False
) -> Table:
    """The Delta table at `uri` (a folder or an object store's address) as it was at `version`.

    Raises TableError without a version (listing those there are), for deletion vectors, mapped columns, files outside the table, and
    partition columns unless they are to be dropped.
    """
    module = _optional("deltalake", uri)
    _no_password(uri)
    options = dict(storage_options or {})
    latest = _opened(module, uri, None, options)
    times = {int(entry["version"]): entry.get("timestamp") for entry in latest.history() if "version" in entry}
    if version is None:
        raise TableError(f"{uri}: name a version with --version, never the latest unnamed; there are {_listed(times)}")
    if not 0 <= version <= latest.version():
        raise TableError(f"{uri}: no version {version}; there are {_listed(times)}")
    table = _opened(module, uri, version, options)
    where = f"{uri} version {version}"
    if any(batch.num_rows for batch in _batches(table.deletion_vectors())):
        raise TableError(
            f"{where}: rows are deleted by deletion vectors, which its files alone do not show; run REORG TABLE … APPLY (PURGE)"
        )
    metadata = table.metadata()
    if (mapped := metadata.configuration.get("delta.columnMapping.mode", "none")) != "none":
        raise TableError(f"{where}: columns are mapped by {mapped}, so its files hold other names than the table; write a copy of it")
    if metadata.partition_columns and not drop_partition_columns:
        raise TableError(f"{where}: partitioned by {', '.join(metadata.partition_columns)}: {NO_PARTITIONS}")
    handler = importlib.import_module("deltalake.fs").DeltaStorageHandler.from_table(table._table)
    system = importlib.import_module("pyarrow.fs").PyFileSystem(handler)
    return Table(
        format="delta",
        uri=table.table_uri,
        version=version,
        snapshot_id=None,
        timestamp=_utc(times.get(version)),
        files=_delta_files(table, where),
        open=lambda file: cast(BinaryIO, system.open_input_stream(file.path, compression=None)),
        check=lambda _file, _schema: None,
    )


def _opened(module: ModuleType, uri: str, version: int | None, options: dict[str, str]) -> Any:
    from deltalake.exceptions import DeltaError

    try:
        return module.DeltaTable(uri, version=version, storage_options=options or None)
    except (DeltaError, OSError, ValueError) as error:
        if version is None:
            raise TableError(
                f"{uri}: no Delta table that can be read: {in_one_line(error)}; check the address and the credentials"
            ) from error
        raise TableError(
            f"{uri}: version {version} cannot be read: {in_one_line(error)}; its log may have been cleaned up, name a later one"
        ) from error


def _delta_files(table: Any, where: str) -> tuple[DataFile, ...]:
    files = []
    for batch in _batches(table.get_add_actions(flatten=True)):
        for row in batch.to_pylist():
            path = unquote(row["path"])
            if urlsplit(row["path"]).scheme or path.startswith("/"):
                raise TableError(f"{where}: {row['path']} lies outside the table (a shallow clone); import the table it was cloned from")
            values = {name.removeprefix("partition."): value for name, value in row.items() if name.startswith("partition.")}
            partition = {name: None if value is None else str(value) for name, value in sorted(values.items())}
            files.append(DataFile(path, row["path"], int(row["size_bytes"]), partition))
    return _sorted(files, where)


def iceberg(
    table: str, snapshot_id: int | None, *, catalog: Mapping[str, str] | None = None, properties: Mapping[str, str] | None = None
) -> Table:
    """An Iceberg table as it was at `snapshot_id`. `table`: a metadata.json's address, or with `catalog` (its properties, `name` its own name) the
    name of a table in it.

    Raises TableError without a snapshot id (listing those there are), for row-level deletes, files that are no Parquet, and columns that
    were renamed after a file was written.
    """
    module = _optional("pyiceberg.table", table)
    _no_password(table)
    loaded = _loaded(module, table, catalog, dict(properties or {}))
    times = {int(snapshot.snapshot_id): snapshot.timestamp_ms for snapshot in loaded.snapshots()}
    if snapshot_id is None:
        raise TableError(f"{table}: name a snapshot with --snapshot-id, never the current one unnamed; there are {_listed(times)}")
    snapshot = loaded.snapshot_by_id(snapshot_id)
    if snapshot is None:
        raise TableError(f"{table}: no snapshot {snapshot_id}; there are {_listed(times)}")
    where, root = f"{table} snapshot {snapshot_id}", loaded.location().rstrip("/") + "/"
    files = []
    for task in loaded.scan(snapshot_id=snapshot_id).plan_files():
        file = task.file
        if task.delete_files:
            raise TableError(
                f"{where}: rows of {file.file_path} are deleted by other files (merge on read), which it alone does not show; "
                "rewrite the data files (Spark: rewrite_data_files) and import the snapshot that makes"
            )
        if (kind := str(getattr(file.file_format, "value", file.file_format))) != "PARQUET":
            raise TableError(f"{where}: {file.file_path} is {kind}, not Parquet; rewrite the table's data files as Parquet")
        path = file.file_path
        short = path.removeprefix(root) if path.startswith(root) else path.rsplit("/", 1)[-1]
        files.append(DataFile(short, path, int(file.file_size_in_bytes)))
    schema = loaded.schemas()[snapshot.schema_id] if snapshot.schema_id is not None else loaded.schema()
    return Table(
        format="iceberg",
        uri=loaded.metadata_location,
        version=None,
        snapshot_id=snapshot_id,
        timestamp=_utc(snapshot.timestamp_ms),
        files=_sorted(files, where),
        open=lambda file: cast(BinaryIO, loaded.io.new_input(file.source).open()),
        check=lambda file, found: _check_names(where, file, found, schema),
    )


def _loaded(module: ModuleType, table: str, catalog: Mapping[str, str] | None, properties: dict[str, str]) -> Any:
    from pyiceberg.exceptions import NoSuchTableError

    try:
        if catalog is None:
            return module.StaticTable.from_metadata(table, properties)
        named = {**catalog}
        return importlib.import_module("pyiceberg.catalog").load_catalog(named.pop("name", "default"), **named).load_table(table)
    except (OSError, ValueError, NoSuchTableError) as error:
        raise TableError(
            f"{table}: no Iceberg table that can be read: {in_one_line(error)}; name its newest metadata.json, or a table of the catalog"
        ) from error


def _check_names(where: str, file: DataFile, found: Any, schema: Any) -> None:
    """Raise TableError when a column of the file has another name than the table gives its id, as after a rename."""
    for number, name in _ids(found, ""):
        wanted = schema.find_column_name(number)
        if wanted is not None and wanted != name:
            raise TableError(
                f"{where}: {file.source} calls the column {wanted!r} {name!r}: it was renamed after the file was written; "
                "rewrite the data files and import the snapshot that makes"
            )


def _ids(fields: Iterable[Any], above: str) -> Iterable[tuple[int, str]]:
    """(field id, dotted name) of every Arrow field that has an id; names of the insides of lists and maps are Iceberg's."""
    types = importlib.import_module("pyarrow").types
    for field in fields:
        name = above + field.name
        if (number := (field.metadata or {}).get(b"PARQUET:field_id")) is not None:
            yield int(number), name
        if types.is_struct(field.type):
            yield from _ids(field.type, name + ".")
        elif types.is_list(field.type) or types.is_large_list(field.type):
            yield from _ids([field.type.value_field.with_name("element")], name + ".")
        elif types.is_map(field.type):
            yield from _ids([field.type.key_field.with_name("key"), field.type.item_field.with_name("value")], name + ".")


# ---- small parts


def _optional(name: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise TableError(f"{what}: reading tables needs {name.split('.')[0]}; install `repro-assets[tables]`") from error


def _no_password(uri: str) -> None:
    if urlsplit(uri).password is not None:
        raise TableError("the table's address holds a password, which would be written to raw; give credentials by environment variables")


def _batches(reader: Any) -> Iterable[Any]:
    """An arro3 table or reader as Arrow batches."""
    arrow = importlib.import_module("pyarrow")
    return cast(Iterable[Any], arrow.RecordBatchReader.from_stream(reader))


def _sorted(files: list[DataFile], where: str) -> tuple[DataFile, ...]:
    """In the order of paths. Raises TableError for no file, and for two of one path."""
    if not files:
        raise TableError(f"{where}: holds no data file, so there is nothing to import")
    ordered = sorted(files, key=lambda file: file.path.encode())
    for one, other in itertools.pairwise(ordered):
        if one.path == other.path:
            raise TableError(f"{where}: {one.source} and {other.source} would both become {one.path!r}; rewrite the table's data files")
    return tuple(ordered)


def _listed(times: Mapping[int, Any]) -> str:
    """The newest states by number, with their time."""
    newest = sorted(times, key=lambda number: (times[number] or 0, number))[-SHOWN:]
    more = f", and {len(times) - SHOWN} older ones" if len(times) > SHOWN else ""
    return ", ".join(f"{number} ({_utc(times[number]) or 'no time'})" for number in reversed(newest)) + more if times else "none"


def in_one_line(error: BaseException) -> str:
    """A library's message without its line ends and colours."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|\u21b3", "", str(error)).split())


def _utc(milliseconds: Any) -> str | None:
    return None if milliseconds is None else datetime.fromtimestamp(int(milliseconds) / 1000, UTC).isoformat(timespec="milliseconds")
