"""The demo's raw data as people have it: one Parquet export of last year and a JSONL file a month, with the flaws of real exports.

Which tickets there are is in `tickets.py`. Nothing but data files is written: whatever lies in the folder is imported.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from repro_assets.demo.tickets import ARCHIVE, MONTHS, Kind, snapshot

# Exports of neighbouring months overlap: the last tickets of one month are written again as the first of the next.
OVERLAP = 3
DUPLICATES = OVERLAP * (len(MONTHS) - 1)
MALFORMED = 5


def write(folder: Path, kind: Kind) -> list[Path]:
    """Write the raw files of a snapshot into `folder`; returns their paths, sorted.

    `archive-2025-q4.parquet` has the prompt/completion shape with columns of its own (ticket_id, ticket, answer, intent,
    product, register, priority); `tickets-2026-01.jsonl` to `-05.jsonl` have chat rows. Every kind has the same 5 malformed
    rows (2 in the archive, 3 in the months) and the same 12 exact duplicates of JSONL rows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    records = snapshot(kind)
    archive = folder / f"archive-{ARCHIVE}.parquet"
    pq.write_table(
        _archive([record for record in records if record["id"].startswith(ARCHIVE)]),
        archive,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
        store_schema=False,
        version="2.6",
    )
    paths = [archive]
    before: list[str] = []
    for month in MONTHS:
        lines = [_line(record) for record in records if record["id"].startswith(month)]
        path = folder / f"tickets-{month}.jsonl"
        path.write_bytes("".join(f"{line}\n" for line in _flawed(month, before + lines)).encode())
        before = lines[-OVERLAP:]
        paths.append(path)
    return sorted(paths)


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False)


def _flawed(month: str, lines: list[str]) -> list[str]:
    """The month's lines with its malformed one: half a row, a row without messages, a row whose answer is empty."""
    half = lines[200][: len(lines[200]) // 2]
    bare = _line({"id": f"{month}-draft", "subject": "draft, never sent"})
    empty = _line(
        {"id": f"{month}-open", "messages": [{"role": "user", "content": "is anybody there"}, {"role": "assistant", "content": ""}]}
    )
    flaw = {"2026-01": half, "2026-02": bare, "2026-04": empty}.get(month)
    return lines if flaw is None else [*lines[:200], flaw, *lines[200:]]


def _archive(records: list[dict[str, Any]]) -> pa.Table:
    """The archive's rows; two of them were exported before anybody had answered."""
    rows: list[dict[str, str | None]] = [
        {
            "ticket_id": record["id"],
            "ticket": record["messages"][0]["content"],
            "answer": record["messages"][1]["content"],
            "intent": record["intent"],
            "product": record["product"],
            "register": record["register"],
            "priority": record["priority"],
        }
        for record in records
    ]
    names = list(rows[0])
    for number in (1, 2):
        rows.insert(150 * number, dict.fromkeys(names) | {"ticket_id": f"{ARCHIVE}-open-{number}", "ticket": "still open"})
    return pa.table({name: pa.array([row[name] for row in rows], pa.string()) for name in names})
