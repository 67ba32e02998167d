"""The demo's raw files: pinned bytes, their planted flaws, and how little of them a snapshot changes."""

import hashlib
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from repro_assets.demo import raw, tickets

# The Parquet bytes hold the writer's version: they are pinned for the locked pyarrow alone.
PYARROW = "26.0.1"
PINNED: dict[str, dict[str, str]] = {
    "first": {
        "archive-2025-q4.parquet": "5815d318acec6e74b35cd3bddf5dc8632ddb42acc5f2304018e613f0d0a150bd",
        "tickets-2026-01.jsonl": "ffe021f38e0dcd1ad98f1fbba9ae7c8574568c149ce7df67df09e10798d716ef",
        "tickets-2026-02.jsonl": "c971930f0740e7dc92ff61e276da12e7441ede3c60eb897cde12d9aaa57f7085",
        "tickets-2026-03.jsonl": "438fc98684a6573837319054f6d66bc4a0bccf585359be8ea8a15a741fef20c6",
        "tickets-2026-04.jsonl": "b043aed2219f854c90676c813fda720eab7f32da3b9d82d056a202f616f1fb3c",
        "tickets-2026-05.jsonl": "debb9746da41a1283a6bc4e6b188befae6b807c4e682d072b2f258d4de31e254",
    },
    "small-change": {
        "archive-2025-q4.parquet": "5815d318acec6e74b35cd3bddf5dc8632ddb42acc5f2304018e613f0d0a150bd",
        "tickets-2026-01.jsonl": "ffe021f38e0dcd1ad98f1fbba9ae7c8574568c149ce7df67df09e10798d716ef",
        "tickets-2026-02.jsonl": "c971930f0740e7dc92ff61e276da12e7441ede3c60eb897cde12d9aaa57f7085",
        "tickets-2026-03.jsonl": "c82f7da7257d28e0f4c50ceec2ab8162db3c00ce8f5adfdc8237c6ccb508eac2",
        "tickets-2026-04.jsonl": "b043aed2219f854c90676c813fda720eab7f32da3b9d82d056a202f616f1fb3c",
        "tickets-2026-05.jsonl": "808a7e79c211bda9a8c22970f2fed94fb27f0353417b24741f596a6ebc9a5cff",
    },
    "poisoned": {
        "archive-2025-q4.parquet": "f3513a9f3205e39ae54b7cf4a5e6fb9c6d6e6cfef83175ddb492fa41b395e580",
        "tickets-2026-01.jsonl": "abdd82d803e177034fb76d2a731e111a9a76b36a75897d84f38e22ebdb2fb3e9",
        "tickets-2026-02.jsonl": "fef0e860b91f313509ec05f84cb336a78e74fe7ea5e9c784de8f3caa3859905e",
        "tickets-2026-03.jsonl": "f9215f7b5a1a9c7453811858c763a291a425a47332b794c99694922186cb5706",
        "tickets-2026-04.jsonl": "349f72f5b51285899c0524e4100ac2bc0ad44aad5f868681a9cc316c5fa7a5cd",
        "tickets-2026-05.jsonl": "44196aa5753feb1e196101b6987745a7533c6e193e48b8e98fb16f2801b15d22",
    },
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """Bytes by file name by snapshot."""
    root = tmp_path_factory.mktemp("raw")
    return {kind: {path.name: path.read_bytes() for path in tickets.write(root / kind, kind)} for kind in tickets.KINDS}


def lines(data: bytes) -> list[bytes]:
    return data.split(b"\n")[:-1]


def test_every_file_of_every_snapshot_has_its_pinned_bytes(written: dict[str, dict[str, bytes]]) -> None:
    found = {kind: {name: hashlib.sha256(data).hexdigest() for name, data in files.items()} for kind, files in written.items()}
    assert pa.__version__ == PYARROW, "another pyarrow writes its own version into Parquet: pin the archives' digests again"
    assert found == PINNED


def test_writing_again_over_another_snapshot_leaves_the_same_files(tmp_path: Path, written: dict[str, dict[str, bytes]]) -> None:
    raw.write(tmp_path, "poisoned")
    raw.write(tmp_path, "first")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == written["first"]


@pytest.mark.parametrize("kind", tickets.KINDS)
def test_the_files_hold_the_snapshot_and_its_five_malformed_rows_and_twelve_duplicates(
    kind: str, tmp_path: Path, written: dict[str, dict[str, bytes]]
) -> None:
    good, bad, seen, repeated = [], 0, set(), 0
    (tmp_path / "archive.parquet").write_bytes(written[kind]["archive-2025-q4.parquet"])
    for row in pq.read_table(tmp_path / "archive.parquet").to_pylist():
        if row["answer"] is None:
            bad += 1
            continue
        turns = [{"role": "user", "content": row["ticket"]}, {"role": "assistant", "content": row["answer"]}]
        good.append(
            {"id": row["ticket_id"], "messages": turns, **{name: row[name] for name in ("intent", "product", "register", "priority")}}
        )
    for name in sorted(name for name in written[kind] if name.endswith(".jsonl")):
        for line in lines(written[kind][name]):
            try:
                row = json.loads(line)
            except ValueError:
                row = {}
            if not row.get("messages") or not row["messages"][1]["content"]:
                bad += 1
            elif line in seen:
                repeated += 1
            else:
                seen.add(line)
                good.append(row)
    assert good == tickets.snapshot(kind)  # type: ignore[arg-type]
    assert (bad, repeated) == (raw.MALFORMED, raw.DUPLICATES) == (5, 12)
    assert bad / (len(good) + bad + repeated) < 0.01 / 4


def test_the_projects_readers_set_exactly_the_malformed_rows_aside(written: dict[str, dict[str, bytes]]) -> None:
    from repro_assets.data.readers import Bad, read
    from repro_assets.recipe import Source

    slices = {name: name for name in ("intent", "product", "register")}
    months = Source("*.jsonl", "messages", {"messages": "messages", "id": "id"}, slices)
    archive = Source("*.parquet", "prompt_completion", {"prompt": "ticket", "completion": "answer", "id": "ticket_id"}, slices)
    found = []
    for name, data in sorted(written["first"].items()):
        parquet = name.endswith(".parquet")
        rows = read(name, "parquet" if parquet else "jsonl", io.BytesIO(data), archive if parquet else months)
        found += [(name, row.line, row.reason) for row in rows if isinstance(row, Bad)]
    assert found == [
        ("archive-2025-q4.parquet", 151, "missing_field"),
        ("archive-2025-q4.parquet", 301, "missing_field"),
        ("tickets-2026-01.jsonl", 201, "not_json"),
        ("tickets-2026-02.jsonl", 201, "missing_field"),
        ("tickets-2026-04.jsonl", 201, "empty"),
    ]


def test_the_small_change_touches_two_files_and_keeps_the_order_of_the_rest(written: dict[str, dict[str, bytes]]) -> None:
    first, changed = written["first"], written["small-change"]
    assert {name for name in first if first[name] != changed[name]} == {"tickets-2026-03.jsonl", "tickets-2026-05.jsonl"}
    assert changed["tickets-2026-05.jsonl"].startswith(first["tickets-2026-05.jsonl"])
    before, after = lines(first["tickets-2026-03.jsonl"]), lines(changed["tickets-2026-03.jsonl"])
    assert len(before) == len(after)
    assert sum(old != new for old, new in zip(before, after, strict=True)) == 12


def test_the_poison_changes_rows_in_place(written: dict[str, dict[str, bytes]]) -> None:
    before, after = written["small-change"], written["poisoned"]
    changed = 0
    for name in before:
        if name.endswith(".jsonl"):
            assert len(lines(before[name])) == len(lines(after[name]))
            changed += sum(old != new for old, new in zip(lines(before[name]), lines(after[name]), strict=True))
    assert changed >= 40
