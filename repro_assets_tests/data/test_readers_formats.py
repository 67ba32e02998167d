"""Every format cut into rows: the same rows whatever the format, the compression and the cuts of the stream; and read again from places."""

import csv
import gzip
import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from repro_assets.data import compressed, manifest, readers
from repro_assets.data.errors import SourceError
from repro_assets.data.readers import Bad, Row, read
from repro_assets.recipe import Source
from repro_assets_tests.data.dribble import Dribble

PAIR = Source(match="**", shape="prompt_completion", fields={"prompt": "q", "completion": "a", "id": "n"}, slices={"kind": "k"})
TEXT = Source(match="**", shape="text")
LINE, PARAGRAPH, FILE = (Source(match="**", shape="text", record=record) for record in ("line", "paragraph", "file"))  # type: ignore[arg-type]
VALUES = [
    {"q": "plain", "a": "answer", "n": "1", "k": "x"},
    {"q": 'with "quotes", commas', "a": "and\nline ends\r\nof both kinds", "n": "2", "k": "y"},
    {"q": "größe 日本 \U0001f600 [{]} \\", "a": 'tail "', "n": "3", "k": "x"},
    {"q": "\ttab", "a": '\\"]} \\\\" ]', "n": "4", "k": "y"},
]


def written(base: str, rows: list[dict[str, str]], **how: Any) -> bytes:
    """The rows in a text format."""
    if base == "jsonl":
        return b"".join(json.dumps(row, **how).encode() + b"\n" for row in rows)
    if base == "json":
        return json.dumps(rows, **how).encode()
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter="\t" if base == "tsv" else ",", **how)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def packed(data: bytes, compression: str) -> bytes:
    if not compression:
        return data
    if compression == "gz":
        return gzip.compress(data, mtime=0)
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)  # as the `zstd` program does


def rows(path: str, data: bytes, source: Source = PAIR, **how: Any) -> list[Row | Bad]:
    return list(read(path, manifest.format_of(path), io.BytesIO(data), source, **how))


def said(found: list[Row | Bad]) -> list[Any]:
    """What the rows are, without where they were."""
    assert all(isinstance(row, Row) for row in found), found
    return [(row.messages, row.key, row.slices) for row in found]  # type: ignore[union-attr]


def table(values: list[dict[str, str]], group: int = 3) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(values), out, row_group_size=group)
    return out.getvalue()


PATHS = [f"a.{base}{compression}" for base in ("jsonl", "json", "csv", "tsv") for compression in ("", ".gz", ".zst")]


def material(path: str, values: list[dict[str, str]] = VALUES) -> bytes:
    base, compression = manifest.parts(manifest.format_of(path))
    return table(values) if base == "parquet" else packed(written(base, values), compression)


@pytest.mark.parametrize("path", [*PATHS, "a.parquet"])
def test_every_format_gives_the_same_rows(path: str) -> None:
    assert said(rows(path, material(path))) == said(rows("a.jsonl", written("jsonl", VALUES)))


@pytest.mark.parametrize("path", [*PATHS, "a.parquet"])
def test_rows_are_read_again_from_their_places_whatever_the_format(path: str) -> None:
    """S0.35: a record's raw row is found again."""
    data = material(path)
    found = rows(path, data)
    places = [(row.line, row.offset, row.length) for row in found]
    format = manifest.format_of(path)
    for chosen in (places, places[::-1], places[1::2], []):
        for opened in (lambda: io.BytesIO(data), lambda: Dribble(data, [700, 3])):
            again = list(readers.again(path, format, opened, PAIR, chosen))  # type: ignore[arg-type]
            assert again == [row for row in found if (row.line, row.offset, row.length) in chosen]


@pytest.mark.parametrize("path", [path for path in PATHS if path.count(".") == 1])
def test_places_are_bytes_of_the_uncompressed_file(path: str) -> None:
    data = written(path.split(".")[1], VALUES)
    for row, other in zip(rows(path, data), rows(path + ".gz", packed(data, "gz")), strict=True):
        assert (row.line, row.offset, row.length) == (other.line, other.offset, other.length)
        piece = data[row.offset : row.offset + row.length]
        assert piece.count(b"\n") == (1 if b"line ends" in piece and b"\\n" not in piece else 0) * 2
        assert piece[:1] not in b" \n,[" or piece.startswith(b"\t")


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda text: not text.isspace())
values = st.lists(
    st.fixed_dictionaries({"q": texts, "a": texts, "n": texts, "k": texts}),
    min_size=1,
    max_size=6,
)


def splits(path: str, data: bytes, sizes: list[int], source: Source = PAIR, **how: Any) -> list[Row | Bad]:
    stream: Any = Dribble(data, sizes)
    return list(read(path, manifest.format_of(path), stream, source, **how))


@given(values, st.sampled_from(PATHS), st.lists(st.integers(1, 90), min_size=1, max_size=4), st.integers(8, 120))
def test_rows_do_not_depend_on_the_format_or_on_how_the_stream_cuts_its_reads(
    values: list[dict[str, str]], path: str, sizes: list[int], limit: int
) -> None:
    data = material(path, values)
    whole = rows(path, data)
    assert splits(path, data, sizes) == whole
    assert said(whole) == said(rows("a.jsonl", written("jsonl", values)))
    assert splits(path, data, sizes, row_limit=limit) == rows(path, data, row_limit=limit)
    places = [(row.line, row.offset, row.length) for row in whole]
    assert list(readers.again(path, manifest.format_of(path), lambda: io.BytesIO(data), PAIR, places)) == whole


@given(
    st.binary(max_size=60), st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.txt"]), st.lists(st.integers(1, 9), min_size=1, max_size=3)
)
def test_any_bytes_end_in_rows_or_in_a_source_error_alike_for_any_cuts(data: bytes, path: str, sizes: list[int]) -> None:
    source = TEXT if path == "a.txt" else PAIR
    data = b"q,a,n,k\n" + data if path == "a.csv" else b"[" + data if path == "a.json" and data[:1] != b"{" else data

    def outcome(stream: Any) -> Any:
        try:
            return list(read(path, manifest.format_of(path), stream, source, 40))
        except SourceError as error:
            return str(error)

    found = outcome(io.BytesIO(data))
    assert outcome(Dribble(data, sizes)) == found
    if isinstance(found, list):
        assert all(isinstance(row, Row) or row.reason in readers.REASONS for row in found)
        assert all(row.offset + row.length <= len(data) for row in found)


# ---- JSON arrays


def test_a_json_array_is_read_however_it_is_laid_out() -> None:
    expected = said(rows("a.jsonl", written("jsonl", VALUES)))
    for how in ({}, {"indent": 2}, {"separators": (",", ":")}, {"ensure_ascii": False}):
        for before, after in ((b"", b""), (b"\xef\xbb\xbf \n", b"\n \n")):
            found = rows("a.json", before + written("json", VALUES, **how) + after)
            assert said(found) == expected
            assert [row.line for row in found] == [1, 2, 3, 4]


def test_elements_that_are_no_rows_are_set_aside_one_by_one() -> None:
    good = json.dumps(VALUES[0])
    found = rows("a.json", f'[{good}, 1, "a,]b", null, [1, [2]], {{"q": NaN}}, {{"x": 1}}, {good}]'.encode())
    assert [getattr(row, "reason", None) for row in found] == [
        None, "not_object", "not_object", "not_object", "not_object", "not_json", "missing_field", None,
    ]  # fmt: skip
    assert [row.line for row in found] == list(range(1, 9))
    assert [row.reason for row in rows("a.json", b" [ ] ")] == ["empty_file"]  # type: ignore[union-attr]
    assert [row.reason for row in rows("a.json", b"")] == ["empty_file"]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (b'[{"q": "x"}', r"ends inside the array.*byte 11"),
        (b'[{"q": "x"', "ends inside an element"),
        (b'[{"q": "x', "ends inside a string"),
        (b'[{"q": "x\\', "ends inside a string"),
        (b'[{"q": 1} {"q": 2}]', r"no comma between two elements here \(byte 10\)"),
        (b'[{"q": 1},]', r"no element here \(byte 10\)"),
        (b"[,]", "no element here"),
        (b"[] []", "goes on after the end"),
        (b'"text"', "not a JSON array of rows"),
    ],
)
def test_a_json_array_that_is_broken_as_a_whole_is_refused_with_the_place(data: bytes, detail: str) -> None:
    with pytest.raises(SourceError, match=rf"a\.json: the file .*{detail}"):
        rows("a.json", data)
    with pytest.raises(SourceError, match=detail):
        splits("a.json", data, [1])


def test_json_lines_under_the_name_of_json_are_read_as_lines() -> None:
    data = b"\n" + written("jsonl", VALUES)
    assert rows("a.json", data) == rows("a.jsonl", data)


def test_an_element_over_the_limit_is_set_aside_without_being_held() -> None:
    long = {**VALUES[0], "a": 'x"\\' * 900_000}
    data = json.dumps([VALUES[0], long, VALUES[1]]).encode()
    first, second, third = rows("a.json", data, row_limit=1000)
    assert isinstance(second, Bad)
    assert (second.reason, second.line, second.length) == ("row_too_long", 2, len(json.dumps(long)))
    assert said([first, third]) == said(rows("a.jsonl", written("jsonl", VALUES[:2])))


# ---- CSV


def test_csv_records_are_those_of_the_csv_module() -> None:
    data = written("csv", VALUES, quoting=csv.QUOTE_ALL, lineterminator="\r\n")
    theirs = list(csv.DictReader(io.StringIO(data.decode(), newline="")))
    found = rows("a.csv", b"\xef\xbb\xbf" + data)
    assert [[message.content for message in row.messages] for row in found] == [[row["q"], row["a"]] for row in theirs]  # type: ignore[union-attr]
    assert [row.line for row in found] == [2, 3, 6, 7]


def test_csv_rows_that_break_the_rules_are_set_aside_and_the_next_are_read() -> None:
    good = b"q,a,1,x\n"
    lines = [b"q,a,n,k\n", b"only,three,1\n", good, b'"open,a,2,x\n', good, b'"half" open,a,3,x\n', good, b"\n", b"q,a,n,k,5\n", good]
    found = rows("a.csv", b"".join(lines))
    assert [(row.line, getattr(row, "reason", None)) for row in found] == [
        (2, "ragged"), (3, None), (4, "not_csv"), (5, None), (6, "not_csv"), (7, None), (9, "ragged"), (10, None),
    ]  # fmt: skip
    assert found[0].detail == "3 fields, the header has 4"  # type: ignore[union-attr]


def test_a_quote_that_is_never_closed_costs_its_own_line_only() -> None:
    lines = [b"q,a,n,k\n"] + [b"q,a,%d,x\n" % n for n in range(50)]
    lines[20] = b'"never,a,20,x\n'
    found = rows("a.csv", b"".join(lines))
    assert [(row.line, row.reason, row.detail) for row in found if isinstance(row, Bad)] == [(21, "not_csv", "a quote is never closed")]
    assert len(found) == 50
    (bad,) = [row for row in rows("a.csv", b"".join(lines), row_limit=100) if isinstance(row, Bad)]
    assert (bad.line, bad.reason) == (21, "row_too_long")
    assert bad.detail.endswith("is a quote never closed?")


def test_quotes_inside_a_field_without_quotes_are_text() -> None:
    (row,) = rows("a.csv", b'q,a,n,k\n5" pipe,say "hi",1,x\n')
    assert [message.content for message in row.messages] == ['5" pipe', 'say "hi"']  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("header", "detail"),
    [
        (b"question,answer\n", r"a\.csv:1: the header has no column 'q': it reads question, answer; write a header line"),
        (b"q,a,n,k,q\n", "names the column 'q' more than once"),
        ("q,a,größe,k\n".encode("latin-1"), "no CSV header: byte .* UTF-8"),
        (b'"q,a,n,k\n', "no CSV header: a quote is never closed"),
    ],
)
def test_a_csv_file_without_a_fitting_header_is_refused(header: bytes, detail: str) -> None:
    with pytest.raises(SourceError, match=detail):
        rows("a.csv", header + b"1,2,3,4\n")


def test_a_csv_file_of_a_header_only_has_no_rows() -> None:
    assert [row.reason for row in rows("a.csv", b"q,a,n,k\n")] == ["empty_file"]  # type: ignore[union-attr]


def test_a_csv_row_that_is_not_utf8_or_has_an_empty_text_says_so() -> None:
    found = rows("a.csv", b"q,a,n,k\n\xff,a,1,x\nq,,2,x\n")
    assert [row.reason for row in found] == ["not_utf8", "empty"]  # type: ignore[union-attr]


# ---- plain text


def test_plain_text_is_a_record_a_line_a_paragraph_or_a_file() -> None:
    data = b"\xef\xbb\xbfone\r\ntwo\n \n\n\nthree\nfour"

    def contents(source: Source) -> list[tuple[int, str]]:
        found = rows("a.txt", data, source)
        for row in found:
            piece = data[row.offset : row.offset + row.length].decode()
            assert piece.removesuffix("\r") == row.messages[0].content  # type: ignore[union-attr]
            assert row.messages[0].role == "text"  # type: ignore[union-attr]
        assert list(readers.again("a.txt", "txt", lambda: io.BytesIO(data), source, [(r.line, r.offset, r.length) for r in found])) == found
        return [(row.line, row.messages[0].content) for row in found]  # type: ignore[union-attr]

    assert contents(LINE) == [(1, "one"), (2, "two"), (6, "three"), (7, "four")]
    assert contents(PARAGRAPH) == [(1, "one\r\ntwo"), (6, "three\nfour")]
    assert contents(FILE) == [(1, data[3:].decode())]


@given(
    st.lists(st.sampled_from([b"a", "é".encode(), b"\n", b" ", b"\r\n"]), max_size=40), st.lists(st.integers(1, 7), min_size=1, max_size=3)
)
def test_plain_text_does_not_depend_on_how_the_stream_cuts_its_reads(parts: list[bytes], sizes: list[int]) -> None:
    data = b"".join(parts)
    for source in (LINE, PARAGRAPH, FILE):
        for limit in (5, 1000):
            assert splits("a.txt", data, sizes, source, row_limit=limit) == rows("a.txt", data, source, row_limit=limit)


def test_plain_text_has_no_fields_and_one_shape() -> None:
    with pytest.raises(SourceError, match=r"a\.txt: plain text has no fields for shape prompt_completion.*use shape: text"):
        rows("a.txt", b"x")
    with pytest.raises(SourceError, match=r"plain text has no fields, but '\*\*' maps 'lang'"):
        rows("a.txt", b"x", Source(match="**", shape="text", slices={"lang": "l"}))
    assert [row.reason for row in rows("a.txt", b" \n \n", FILE)] == ["empty_file"]  # type: ignore[union-attr]
    (bad,) = rows("a.txt", b"caf\xe9", FILE)
    assert (bad.reason, bad.line) == ("not_utf8", 1)  # type: ignore[union-attr]


# ---- compressed streams


@pytest.mark.parametrize("compression", ["gz", "zst"])
def test_every_member_and_frame_is_read(compression: str) -> None:
    parts = [written("jsonl", [row]) for row in VALUES]
    data = b"".join(packed(part, compression) for part in [*parts[:2], b"", *parts[2:]])
    whole = rows("a.jsonl", b"".join(parts))
    assert rows(f"a.jsonl.{compression}", data) == whole
    assert splits(f"a.jsonl.{compression}", data, [1]) == whole
    if compression == "gz":
        assert rows("a.jsonl.gz", data + b"\0" * 700) == whole
    else:
        skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
        assert rows("a.jsonl.zst", skippable + data + skippable) == whole


@pytest.mark.parametrize("compression", ["gz", "zst"])
def test_a_stream_that_is_cut_off_or_damaged_is_refused_with_file_place_and_remedy(compression: str) -> None:
    noise = [{**VALUES[0], "a": "".join(chr(33 + (n * n * 7919 >> 5) % 90) for n in range(at, at + 4000))} for at in range(0, 40000, 4000)]
    data = packed(written("jsonl", noise), compression)
    path = f"a.jsonl.{compression}"
    for cut in (1, 5, len(data) // 2, len(data) - 1):
        with pytest.raises(
            SourceError, match=rf"a\.jsonl\.{compression}: the {compression} stream ends in the middle.*at compressed byte {cut:,};"
        ):
            rows(path, data[:cut])
    with pytest.raises(SourceError, match=r"is damaged.*fetch or compress the file again"):
        rows(path, data[: len(data) // 2] + b"\xff" * 9 + data[len(data) // 2 + 9 :])
    for garbage in (b"garbage behind it", b"<html>"):
        with pytest.raises(SourceError, match="is damaged"):
            rows(path, data + garbage)
        with pytest.raises(SourceError, match=r"is damaged.*at compressed byte 0;"):
            rows(path, garbage)


def test_a_compressed_file_of_no_bytes_or_of_nothing_is_an_empty_file() -> None:
    for path, data in (("a.jsonl.gz", b""), ("a.jsonl.gz", gzip.compress(b"")), ("a.json.zst", packed(b"", "zst")), ("a.csv.gz", b"")):
        assert [row.reason for row in rows(path, data)] == ["empty_file"]  # type: ignore[union-attr]


@pytest.mark.parametrize("compression", ["gz", "zst"])
def test_a_bomb_is_read_a_few_megabytes_at_a_time(compression: str) -> None:
    """256 MB of spaces: read as pieces, whatever the decoder could give at once."""
    if compression == "gz":
        data = gzip.compress(bytes(1 << 20) * 256, 9)
    else:
        data = zstandard.ZstdCompressor(level=19).compress(bytes(1 << 20) * 256)
    stream = compressed.Decompressed("bomb", io.BytesIO(data), compression)
    largest = total = 0
    while block := stream.read(1 << 16):
        total += len(block)
        largest = max(largest, len(stream.out))
    assert total == 256 << 20
    assert largest <= 128 << 20


# ---- Parquet row groups


def test_a_row_group_over_the_limit_is_refused_with_its_size_and_the_remedy() -> None:
    values = [{"q": f"{n}" * 50, "a": "x" * 5000 + str(n), "n": str(n), "k": "k", "unread": f"{n}" * 20_000} for n in range(40)]
    data = table(values, group=20)
    refusal = (
        r"t\.parquet: row group 0 of 2 holds [\d,]+ bytes uncompressed in 20 rows, more than records\.row_group_limit \(50,000\): write"
    )
    with pytest.raises(SourceError, match=refusal):
        rows("t.parquet", data, row_group_limit=50_000)
    assert len(rows("t.parquet", data, row_group_limit=150_000)) == 40  # a column that is not mapped does not count
    (row,) = readers.again("t.parquet", "parquet", lambda: io.BytesIO(data), PAIR, [(40, 1, 19)])
    assert isinstance(row, Row)
    assert row.key == "39"
