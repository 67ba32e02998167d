"""Rows of Parquet files by row group: only the columns that are mapped, a few megabytes of values at a time.

What is in a row is `rows.py`; text formats are `cutting.py`.
"""

import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from repro_assets.data.errors import SourceError
from repro_assets.data.rows import mapping
from repro_assets.recipe import Source

BLOCK = 1 << 20
#: uncompressed bytes and rows of one batch, at most
BATCH_BYTES, BATCH_ROWS = 16 << 20, 1024

GroupRow = tuple[int, int, int, dict[str, Any]]


def rows(path: str, stream: BinaryIO, source: Source, row_group_limit: int | None, only: set[int] | None = None) -> Iterator[GroupRow]:
    """(row number, row group, row in the group, values) of every row, or of the row groups in `only`; only columns that are mapped.

    Raises SourceError for a file that is no Parquet, and for a row group whose columns hold more than `row_group_limit` bytes.
    """
    import pyarrow
    import pyarrow.parquet

    with _seekable(stream) as seekable:
        if not seekable.read(1):
            return
        seekable.seek(0)
        try:
            file = pyarrow.parquet.ParquetFile(seekable, buffer_size=BLOCK, pre_buffer=False)
            used = [*mapping(source).values(), *source.slices.values()]
            columns = [name for name in file.schema_arrow.names if any(name == field or field.startswith(name + ".") for field in used)]
            line = 0
            for group in range(file.num_row_groups):
                found = file.metadata.row_group(group)
                if only is not None and group not in only:
                    line += found.num_rows
                    continue
                size = _size(found, columns)
                if row_group_limit is not None and size > row_group_limit:
                    raise SourceError(
                        f"{path}: row group {group} of {file.num_row_groups} holds {size:,} bytes uncompressed in {found.num_rows:,} rows, more "
                        f"than records.row_group_limit ({row_group_limit:,}): write the file with smaller row groups "
                        "(pyarrow: row_group_size=10000), or raise the limit if the machine has the memory"
                    )
                batch = max(1, min(BATCH_ROWS, BATCH_BYTES * found.num_rows // max(1, size)))
                at = 0
                # No mapped column means no rows in a batch: read them all, so that every row gets its reason.
                for part in file.iter_batches(batch_size=batch, row_groups=[group], columns=columns or None, use_threads=False):
                    for values in part.to_pylist():
                        line += 1
                        yield line, group, at, values
                        at += 1
        except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, OSError, UnicodeDecodeError) as error:
            raise SourceError(f"{path}: not a readable Parquet file: {error}; write it again, or leave it out with raw.exclude") from error


def _size(group: Any, columns: list[str]) -> int:
    """Uncompressed bytes of the columns that are read; of all of them when none is."""
    wanted = set(columns)
    found = [group.column(number) for number in range(group.num_columns)]
    return sum(column.total_uncompressed_size for column in found if not wanted or column.path_in_schema.split(".")[0] in wanted)


def _seekable(stream: BinaryIO) -> BinaryIO:
    """The stream itself when it can seek, else its bytes in a temporary file: a Parquet footer is at the end."""
    if stream.seekable():
        return stream
    spool = tempfile.SpooledTemporaryFile(max_size=BLOCK)  # noqa: SIM115  the caller closes it, as it does the stream
    while block := stream.read(BLOCK):
        spool.write(block)
    spool.seek(0)
    stream.close()
    return cast(BinaryIO, spool)
