"""Delta and Iceberg tables as a source window: real small tables, an older state imported although a newer one exists."""

import base64
import json
import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake
from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.table import DataScan, FileScanTask

from repro_assets import tables
from repro_assets.data.errors import TableError
from repro_assets.trust.blob import Blob
from repro_assets.trust.canonical import sha256
from repro_assets_tests.world import repro


def rows(*numbers: int) -> pa.Table:
    return pa.table({"question": [f"q{n}" for n in numbers], "answer": [f"a{n}" for n in numbers]})


def contents(table: tables.Table) -> list[dict[str, Any]]:
    """Every row of the table's files, and each file looked at as an import does."""
    found = []
    for file in table.files:
        with table.open(file) as stream:
            data = stream.read()
        assert len(data) == file.size
        read = pq.ParquetFile(pa.BufferReader(data))
        table.check(file, read.schema_arrow)
        found += read.read().to_pylist()
    return sorted(found, key=lambda row: row["question"])


@pytest.fixture
def lakehouse(tmp_path: Path) -> str:
    """Versions 0: q1 q2; 1: and q3; 2: q9 alone."""
    folder = tmp_path / "delta"
    write_deltalake(folder, rows(1, 2))
    write_deltalake(folder, rows(3), mode="append")
    write_deltalake(folder, rows(9), mode="overwrite")
    return str(folder)


@pytest.fixture
def catalog(tmp_path: Path) -> SqlCatalog:
    made = SqlCatalog("test", uri=f"sqlite:///{tmp_path}/catalog.db", warehouse=f"file://{tmp_path}/warehouse")
    made.create_namespace("n")
    return made


# ---- Delta


def test_a_delta_version_holds_its_own_rows_whatever_came_later(lakehouse: str) -> None:
    """S0.39, S0.43: time travel by version, never the latest."""
    assert [row["question"] for row in contents(tables.delta(lakehouse, 0))] == ["q1", "q2"]
    assert [row["question"] for row in contents(tables.delta(lakehouse, 1))] == ["q1", "q2", "q3"]
    assert [row["question"] for row in contents(tables.delta(lakehouse, 2))] == ["q9"]
    one = tables.delta(lakehouse, 1)
    assert (one.version, one.snapshot_id, one.name) == (1, None, "version 1")
    assert [file.path for file in one.files] == sorted(file.path for file in one.files)


def test_without_a_version_the_table_is_refused_and_its_versions_are_listed(lakehouse: str) -> None:
    with pytest.raises(TableError, match=r"name a version with --version.*there are 2 \(\d{4}-.*\+00:00\), 1 \(.*\), 0 \("):
        tables.delta(lakehouse, None)
    with pytest.raises(TableError, match=r"no version 7; there are 2 .*1 .*0 "):
        tables.delta(lakehouse, 7)
    with pytest.raises(TableError, match="no Delta table that can be read"):
        tables.delta(lakehouse + "/nowhere", 0)


def test_the_window_names_the_table_its_state_and_every_file(lakehouse: str) -> None:
    """S0.43, S0.51: a traceable source window."""
    table = tables.delta(lakehouse, 1)
    blobs = {file.path: Blob(sha256(file.path.encode()), file.size) for file in table.files}
    window = json.loads(table.window(blobs))
    assert (window["format"], window["version"], window["snapshot_id"]) == ("delta", 1, None)
    assert window["table"].rstrip("/").endswith(lakehouse)
    assert window["timestamp"].startswith("20")
    assert [(file["path"], file["sha256"], file["size"]) for file in window["files"]] == [
        (path, blob.sha256, blob.size) for path, blob in sorted(blobs.items())
    ]
    assert table.window(blobs) == tables.delta(lakehouse, 1).window(blobs)


def test_partition_columns_are_not_lost_unseen(tmp_path: Path) -> None:
    folder = str(tmp_path / "parts")
    write_deltalake(folder, rows(1, 2).append_column("lang", pa.array(["de", "en us"])), partition_by=["lang"])
    with pytest.raises(TableError, match=r"partitioned by lang: its files do not hold these columns.*--drop-partition-columns"):
        tables.delta(folder, 0)
    table = tables.delta(folder, 0, drop_partition_columns=True)
    assert [row["question"] for row in contents(table)] == ["q1", "q2"]
    assert sorted(file.partition["lang"] or "" for file in table.files) == ["de", "en us"]


def test_columns_that_are_mapped_to_other_names_are_refused(lakehouse: str) -> None:
    log = Path(lakehouse) / "_delta_log" / f"{0:020d}.json"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for line in lines:
        if "metaData" in line:
            line["metaData"]["configuration"] = {"delta.columnMapping.mode": "name"}
    log.write_text("\n".join(json.dumps(line) for line in lines))
    with pytest.raises(TableError, match="columns are mapped by name|cannot be read"):
        tables.delta(lakehouse, 0)


def deletion_vector(*deleted: int) -> str:
    """An inline deletion vector: a 64-bit roaring bitmap of row numbers below 65,536, in base 85 as Delta writes it."""
    bitmap = struct.pack("<IIHHI", 12346, 1, 0, len(deleted) - 1, 16) + struct.pack(f"<{len(deleted)}H", *deleted)
    data = struct.pack("<IQI", 1681511377, 1, 0) + bitmap
    data += b"\0" * (-len(data) % 4)
    ours = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
    pythons = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;<=>?@^_`{|}~"
    return base64.b85encode(data).translate(bytes.maketrans(pythons, ours)).decode()


def test_rows_deleted_by_deletion_vectors_are_refused(lakehouse: str) -> None:
    log = Path(lakehouse) / "_delta_log"
    first = [json.loads(line) for line in (log / f"{0:020d}.json").read_text().splitlines()]
    add = next(line["add"] for line in first if "add" in line)
    vector = {"storageType": "i", "pathOrInlineDv": deletion_vector(1), "sizeInBytes": 34, "cardinality": 1}
    features = {"minReaderVersion": 3, "minWriterVersion": 7, "readerFeatures": ["deletionVectors"], "writerFeatures": ["deletionVectors"]}
    change = [{"protocol": features}, {"add": {**add, "deletionVector": vector, "dataChange": True}}]
    (log / f"{3:020d}.json").write_text("\n".join(json.dumps(line) for line in change))
    with pytest.raises(TableError, match=r"version 3: rows are deleted by deletion vectors.*PURGE"):
        tables.delta(lakehouse, 3)
    assert len(contents(tables.delta(lakehouse, 1))) == 3


def test_an_address_with_a_password_is_refused() -> None:
    with pytest.raises(TableError, match="holds a password") as refused:
        tables.delta("s3://key:geheim@bucket/table", 0)
    assert "geheim" not in str(refused.value)


def test_a_table_at_a_version_is_what_deltalake_says_it_is(lakehouse: str) -> None:
    for version in range(3):
        theirs = DeltaTable(lakehouse, version=version)
        ours = tables.delta(lakehouse, version)
        assert sorted(uri.rsplit("/", 1)[-1] for uri in theirs.file_uris()) == [file.path for file in ours.files]


# ---- Iceberg


def test_an_iceberg_snapshot_holds_its_own_rows_whatever_came_later(catalog: SqlCatalog) -> None:
    """S0.39, S0.43: an explicit snapshot id, from a metadata file or through a catalog."""
    table = catalog.create_table("n.t", schema=rows(1).schema)
    table.append(rows(1, 2))
    older = table.current_snapshot().snapshot_id  # type: ignore[union-attr]
    table.overwrite(rows(9))
    newer = table.current_snapshot().snapshot_id  # type: ignore[union-attr]
    found = tables.iceberg(table.metadata_location, older)
    assert [row["question"] for row in contents(found)] == ["q1", "q2"]
    assert (found.version, found.snapshot_id, found.name) == (None, older, f"snapshot {older}")
    assert all(file.path.startswith("data/") for file in found.files)
    assert [row["question"] for row in contents(tables.iceberg(table.metadata_location, newer))] == ["q9"]
    again = tables.iceberg("n.t", older, catalog={"name": "test", "type": "sql", **catalog.properties})
    assert again.files == found.files
    window = json.loads(found.window({file.path: Blob("0" * 64, file.size) for file in found.files}))
    assert (window["format"], window["snapshot_id"], window["version"]) == ("iceberg", str(older), None)
    with pytest.raises(TableError, match=rf"name a snapshot with --snapshot-id.*{newer} \(20.*{older} \(20"):
        tables.iceberg(table.metadata_location, None)
    with pytest.raises(TableError, match=rf"no snapshot 12; there are .*{older}"):
        tables.iceberg(table.metadata_location, 12)


def test_an_iceberg_column_renamed_after_a_file_was_written_is_refused(catalog: SqlCatalog) -> None:
    table = catalog.create_table("n.r", schema=rows(1).schema)
    table.append(rows(1))
    before = table.current_snapshot().snapshot_id  # type: ignore[union-attr]
    with table.update_schema() as update:
        update.rename_column("question", "asked")
    table.append(pa.table({"asked": ["q2"], "answer": ["a2"]}))
    after = table.current_snapshot().snapshot_id  # type: ignore[union-attr]
    assert [row["question"] for row in contents(tables.iceberg(table.metadata_location, before))] == ["q1"]
    with pytest.raises(TableError, match=r"calls the column 'asked' 'question': it was renamed"):
        contents(tables.iceberg(table.metadata_location, after))


def test_columns_inside_lists_and_structs_are_compared_by_their_ids_too(catalog: SqlCatalog) -> None:
    turn = pa.struct([("role", pa.string()), ("content", pa.string())])
    data = pa.table({"question": ["q"], "messages": pa.array([[{"role": "user", "content": "hi"}]], pa.list_(turn))})
    table = catalog.create_table("n.m", schema=data.schema)
    table.append(data)
    found = tables.iceberg(table.metadata_location, table.current_snapshot().snapshot_id)  # type: ignore[union-attr]
    assert contents(found)[0]["messages"] == [{"role": "user", "content": "hi"}]
    with found.open(found.files[0]) as stream:
        schema = pq.ParquetFile(pa.BufferReader(stream.read())).schema_arrow
    assert {name for _number, name in tables._ids(schema, "")} >= {"messages.element.role", "messages.element.content"}


def test_an_iceberg_table_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="no Iceberg table that can be read"):
        tables.iceberg(str(tmp_path / "metadata" / "1.metadata.json"), 1)


def test_iceberg_rows_that_other_files_delete_are_refused(catalog: SqlCatalog, monkeypatch: pytest.MonkeyPatch) -> None:
    """pyiceberg reads row-level deletes and cannot write them: its own plan is given the delete file that an engine would have written."""
    table = catalog.create_table("n.d", schema=rows(1).schema)
    table.append(rows(1, 2))
    (task,) = table.scan().plan_files()
    planned = FileScanTask(data_file=task.file, delete_files={task.file})
    monkeypatch.setattr(DataScan, "plan_files", lambda _scan: [planned])
    with pytest.raises(TableError, match=r"rows of .*parquet are deleted by other files.*rewrite_data_files"):
        tables.iceberg(table.metadata_location, table.current_snapshot().snapshot_id)  # type: ignore[union-attr]


# ---- the command


def test_a_state_that_is_not_named_is_told_before_any_server_is_started(lakehouse: str, tmp_path: Path) -> None:
    for wrong in ((), (tmp_path, "--delta", lakehouse), ("--delta", lakehouse, "--iceberg", "x.json")):
        answer = repro("--home", tmp_path / "home", "import", *wrong)
        assert (answer.code, "exactly one of the three" in answer.err) == (2, True), answer
    answer = repro("--home", tmp_path / "home", "import", "--delta", lakehouse, "--to", "t")
    assert answer.code in (1, 2)
    assert "name a version with --version" in answer.err
    assert "Traceback" not in answer.err
    assert not (tmp_path / "home").exists()
