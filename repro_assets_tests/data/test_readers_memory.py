"""Peak memory of reading a large file of each format, in a process of its own. The figure of 2 GB files is benchmarks/reading.py."""

from pathlib import Path

import pytest

from repro_assets_tests.benchmarks import reading

MEGABYTES, LIMIT = 200, 150


@pytest.mark.parametrize("name", ["jsonl", "csv.zst", "json", "parquet"])
def test_a_file_of_200_megabytes_needs_less_than_150_above_the_imports(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"rows.{name}"
    total = reading.write(path, name.partition(".")[0], MEGABYTES * 1_000_000)
    assert total >= MEGABYTES * 1_000_000
    counted, characters, _wall, _cpu, _peak, above = reading.measure(path)
    assert counted * 1500 < characters
    assert characters > 0.9 * MEGABYTES * 1e6
    assert above < LIMIT
