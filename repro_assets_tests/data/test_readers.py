"""Rows of JSONL and Parquet: streaming, field mapping, and every reason a row may be set aside for."""

import io
import json
import tracemalloc
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from repro_assets.data import manifest, readers
from repro_assets.data.errors import SourceError
from repro_assets.data.lines import Message
from repro_assets.data.readers import Bad, Row, read
from repro_assets.recipe import Source
from repro_assets_tests.data.dribble import Dribble
from repro_assets_tests.data.material import CHAT, PAIR, jsonl, row

LIMIT = 16 << 20


def rows(data: bytes, source: Source = CHAT, limit: int = LIMIT, path: str = "a.jsonl") -> list[Row | Bad]:
    return list(read(path, "jsonl", io.BytesIO(data), source, limit))


def bad(data: bytes, source: Source = CHAT) -> Bad:
    (found,) = rows(data, source)
    assert isinstance(found, Bad)
    assert found.reason in readers.REASONS
    return found


def chat(messages: Any, **more: Any) -> bytes:
    return json.dumps({"messages": messages, "id": "1", "intent": "x", **more}).encode()


TEXT = Source(match="**", shape="text")
USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}


def test_a_chat_row_comes_with_messages_key_slices_and_place() -> None:
    data = jsonl(row("first"), row("sécond", intent="login"))
    first, second = rows(data)
    assert second == Row(2, len(row("first")) + 1, len(row("sécond", intent="login")), second.messages, "sécond", {"intent": "login"})  # type: ignore[union-attr]
    assert second.messages == (Message("sécond", "user"), Message("fine", "assistant"))  # type: ignore[union-attr]
    assert data[second.offset : second.offset + second.length] == row("sécond", intent="login")
    assert first.line == 1


def test_prompt_and_completion_become_turns_with_an_optional_system_prompt() -> None:
    source = Source(
        match="**", shape="prompt_completion", fields={"prompt": "in.q", "completion": "a", "system": "s", "id": "n"}, slices={"easy": "e"}
    )
    data = jsonl(
        json.dumps({"in": {"q": "2+2"}, "a": "4", "s": "Be brief.", "n": 7, "e": True}).encode(),
        json.dumps({"in": {"q": "3+3"}, "a": "6", "s": None, "n": 8, "e": False}).encode(),
    )
    first, second = rows(data, source)
    assert [message.role for message in first.messages] == ["system", "user", "assistant"]  # type: ignore[union-attr]
    assert (first.key, first.slices) == ("7", {"easy": "true"})  # type: ignore[union-attr]
    assert [message.content for message in second.messages] == ["3+3", "6"]  # type: ignore[union-attr]


def test_a_field_whose_own_name_has_a_dot_is_found_before_the_path() -> None:
    source = Source(match="**", shape="prompt_completion", fields={"prompt": "a.b", "completion": "c"})
    (found,) = rows(json.dumps({"a.b": "flat", "a": {"b": "nested"}, "c": "x"}).encode(), source)
    assert found.messages[0].content == "flat"  # type: ignore[union-attr]


def test_blank_lines_windows_line_ends_and_a_byte_order_mark_are_no_rows_of_their_own() -> None:
    data = b"\xef\xbb\xbf" + row("one") + b"\r\n\r\n   \n" + row("two")
    first, second = rows(data)
    assert (first.line, first.offset, second.line) == (1, 3, 4)
    assert isinstance(second, Row)
    assert data[first.offset : first.offset + first.length] == row("one") + b"\r"


@pytest.mark.parametrize(
    ("data", "reason", "detail"),
    [
        (row("caf\u00e9").decode().encode("latin-1"), "not_utf8", r"byte \d+ of the line \(0xe9\).*save the file as UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "not_utf8", "UTF-16"),
        (row("half")[:-9], "not_json", "truncated"),
        (b'{"messages": NaN}', "not_json", "malformed"),
        (b'{"messages": "\\ud800"}', "not_json", ""),
        (b"[" * 100_000, "not_json", "nested too deep"),
        (b"[1, 2]", "not_object", "a JSON array"),
        (b'{"id": "1", "intent": "x"}', "missing_field", "messages: not in the row"),
        (chat([USER, ASSISTANT], intent=None), "missing_field", "intent: null"),
        (chat("hello"), "wrong_type", "messages: a string, not an array"),
        (chat([USER, "x"]), "wrong_type", r"messages\[1\]: a string"),
        (chat([{"role": "user", "content": [{"type": "image"}]}, ASSISTANT]), "wrong_type", r"messages\[0\].content: a array|an? array"),
        (chat([USER, {**ASSISTANT, "audio": [1]}]), "wrong_type", "'audio'.*would be lost"),
        (chat([USER, {**ASSISTANT, "tool_calls": [1]}]), "wrong_type", r"tool_calls\[0\]: not an object that names its function"),
        (chat([USER, ASSISTANT], id=1.5), "wrong_type", "id: a number"),
        (chat([]), "empty", "no messages"),
        (chat([USER, {"role": "assistant", "content": " \n"}]), "empty", r"messages\[1\].content: no text"),
        (chat([{"role": "narrator", "content": "x"}, ASSISTANT]), "unknown_role", "'narrator'; known: system, user, assistant"),
        (chat([USER]), "no_assistant", "1 messages"),
    ],
)
def test_a_row_that_cannot_be_a_record_says_why(data: bytes, reason: str, detail: str) -> None:
    """S0.30, S1.9: types and required fields, by stable reason and a detail without the row's text."""
    import re

    found = bad(data)
    assert (found.reason, found.line) == (reason, 1)
    assert re.search(detail, found.detail), found.detail


def test_a_field_of_a_message_that_is_null_is_no_loss() -> None:
    (found,) = rows(chat([{**USER, "name": None}, ASSISTANT]))
    assert isinstance(found, Row)


def test_an_empty_file_is_one_bad_row_of_line_zero() -> None:
    for data in (b"", b"\n \n"):
        assert rows(data) == [Bad(0, 0, 0, "empty_file", "no rows in it")]


def test_a_row_over_the_limit_is_set_aside_and_the_next_one_read() -> None:
    data = jsonl(row("a" * 500), row("short"))
    first, second = rows(data, limit=200)
    assert isinstance(first, Bad)
    assert (first.reason, first.length, first.detail) == ("row_too_long", len(row("a" * 500)), f"{first.length} bytes, the limit is 200")
    assert isinstance(second, Row)
    assert rows(row("x"), limit=len(row("x")))[0].line == 1
    assert isinstance(rows(row("x"), limit=len(row("x")))[0], Row)


def test_a_single_row_of_20_megabytes_needs_no_20_megabytes_of_memory(tmp_path: Path) -> None:
    path = tmp_path / "big.jsonl"
    with path.open("wb") as file:
        file.write(b'{"messages": "')
        for _ in range(20):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n' + row("after") + b"\n")
    tracemalloc.start()
    with path.open("rb") as stream:
        first, second = read("big.jsonl", "jsonl", stream, CHAT, 1 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(first, Bad)
    assert (first.reason, first.length) == ("row_too_long", 20 * (1 << 20) + 16)
    assert isinstance(second, Row)
    assert peak < 6 << 20


def test_a_row_of_20_megabytes_inside_the_limit_is_read() -> None:
    (found,) = rows(row("y" * (20 << 20), key="k"), limit=32 << 20)
    assert isinstance(found, Row)
    assert len(found.messages[0].content) == 20 << 20


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(20, 200))
def test_rows_do_not_depend_on_how_the_stream_cuts_its_reads(sizes: list[int], limit: int) -> None:
    data = jsonl(row("one"), b"", b"broken", row("z" * 150), "größe".encode(), row("last"))[:-1]
    stream: Any = Dribble(data, sizes)
    assert list(read("a.jsonl", "jsonl", stream, CHAT, limit)) == rows(data, limit=limit)


@pytest.mark.parametrize(
    ("path", "remedy"),
    [
        ("a.arrow", r"no reader for this format \(\.jsonl.*\.gz or \.zst\).*convert or rename it"),
        ("a.jsonl.xz", "compressed in a way that is not read here"),
        ("a.tar.gz", "an archive.*unpack it"),
        ("a.jsonl.dvc", "a DVC pointer.*dvc pull"),
    ],
)
def test_a_format_without_a_reader_is_refused_with_the_remedy(path: str, remedy: str) -> None:
    with pytest.raises(SourceError, match=rf"{path}: {remedy}.*or leave it out with raw\.exclude"):
        list(read(path, manifest.format_of(path), io.BytesIO(b"x"), CHAT))


def test_a_pointer_or_an_archive_is_told_before_a_source_is_missed() -> None:
    for path, remedy in (("x/a.jsonl.dvc", "dvc pull"), ("x/a.zip", "unpack"), ("t/_delta_log/1.json", "--delta")):
        with pytest.raises(SourceError, match=remedy):
            readers.source_for(path, [Source(match="**/*.jsonl", shape="messages")])


def test_a_dvc_file_under_another_name_is_refused_with_the_remedy() -> None:
    pointer = b"outs:\n- md5: a304afb96060aad90176268345e10355\n  size: 37\n  hash: md5\n  path: data.jsonl\n"
    for data in (pointer, b"md5: 0f1b\nfrozen: true\n" + pointer):
        for path in ("a.jsonl", "a.csv", "a.txt", "a.json", "a.parquet", "a.jsonl.gz"):
            source = TEXT if path == "a.txt" else PAIR
            with pytest.raises(SourceError, match=f"{path}: a DVC pointer.*dvc pull"):
                list(read(path, manifest.format_of(path), io.BytesIO(data), source))


def test_a_git_lfs_pointer_is_refused_with_the_remedy() -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n"
    for path in ("a.jsonl", "a.parquet", "a.json.zst", "a.csv.gz", "a.tsv"):
        for stream in (io.BytesIO(pointer), Dribble(pointer, [5])):
            with pytest.raises(SourceError, match=f"{path}: a Git LFS pointer.*git lfs pull"):
                list(read(path, manifest.format_of(path), stream, CHAT))  # type: ignore[arg-type]


def test_a_file_that_no_source_matches_is_named_with_the_remedy() -> None:
    with pytest.raises(SourceError, match=r"x/b\.jsonl: no source.*a/\*\*.*raw\.exclude"):
        readers.source_for("x/b.jsonl", [Source(match="a/**", shape="messages")])
    assert readers.source_for("a/b", [Source(match="b", shape="messages"), PAIR]) is PAIR


def test_a_mapped_field_that_the_shape_does_not_have_is_refused_by_name() -> None:
    with pytest.raises(SourceError, match=r"shape messages has no field 'prompt'; known: messages, id"):
        list(read("a.jsonl", "jsonl", io.BytesIO(b""), Source(match="**", shape="messages", fields={"prompt": "x"})))


# ---- Parquet


def parquet(path: Path, rows: list[dict[str, Any]], group: int = 3) -> bytes:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path.read_bytes()


TABLE = [{"question": f"q{n}", "answer": f"a{n}", "other": n} for n in range(8)]


def test_parquet_rows_are_those_of_the_same_data_as_jsonl(tmp_path: Path) -> None:
    data = parquet(tmp_path / "t.parquet", TABLE)
    found = list(read("t.parquet", "parquet", io.BytesIO(data), PAIR))
    lines = rows(jsonl(*(json.dumps(line).encode() for line in TABLE)), PAIR)
    assert [line.messages for line in found] == [line.messages for line in lines]  # type: ignore[union-attr]
    assert [(line.line, line.offset, line.length) for line in found] == [(n + 1, n // 3, n % 3) for n in range(8)]


def test_parquet_from_a_stream_that_cannot_seek_is_the_same(tmp_path: Path) -> None:
    data = parquet(tmp_path / "t.parquet", TABLE)
    stream: Any = Dribble(data, [1000])
    assert list(read("t.parquet", "parquet", stream, PAIR)) == list(read("t.parquet", "parquet", io.BytesIO(data), PAIR))


def test_parquet_messages_and_bad_rows_have_their_reasons(tmp_path: Path) -> None:
    table = [{"id": n, "intent": "x", "messages": [USER, ASSISTANT]} for n in range(2)] + [
        {"id": 9, "intent": None, "messages": [USER, ASSISTANT]}
    ]
    found = list(read("t.parquet", "parquet", io.BytesIO(parquet(tmp_path / "t.parquet", table)), CHAT))
    assert [type(line) for line in found] == [Row, Row, Bad]
    assert found[2] == Bad(3, 0, 2, "missing_field", "intent: null")
    missing = list(read("t.parquet", "parquet", io.BytesIO(parquet(tmp_path / "u.parquet", TABLE)), CHAT))
    assert len(missing) == 8
    assert {line.reason for line in missing} == {"missing_field"}  # type: ignore[union-attr]
    long = list(read("t.parquet", "parquet", io.BytesIO(parquet(tmp_path / "v.parquet", TABLE)), PAIR, row_limit=3))
    assert {line.reason for line in long} == {"row_too_long"}  # type: ignore[union-attr]


def test_parquet_of_no_rows_or_no_bytes_is_an_empty_file(tmp_path: Path) -> None:
    empty = parquet(tmp_path / "t.parquet", TABLE)
    pq.write_table(pa.Table.from_pylist(TABLE).slice(0, 0), tmp_path / "e.parquet")
    assert [line.reason for line in read("e", "parquet", io.BytesIO((tmp_path / "e.parquet").read_bytes()), PAIR)] == ["empty_file"]  # type: ignore[union-attr]
    assert [line.reason for line in read("e", "parquet", io.BytesIO(b""), PAIR)] == ["empty_file"]  # type: ignore[union-attr]
    with pytest.raises(SourceError, match=r"t\.parquet: not a readable Parquet file: .*write it again"):
        list(read("t.parquet", "parquet", io.BytesIO(empty[:-20]), PAIR))


# ---- reading again


def test_rows_are_read_again_from_their_places(tmp_path: Path) -> None:
    data = jsonl(row("one"), b"broken", row("two"), row("three"))
    found = [line for line in rows(data) if isinstance(line, Row)]
    places = [(line.line, line.offset, line.length) for line in reversed(found)]

    def seekable() -> BinaryIO:
        return io.BytesIO(data)

    def streamed() -> Any:
        return Dribble(data, [7, 3])

    for opened in (seekable, streamed):
        assert list(readers.again("a.jsonl", "jsonl", opened, CHAT, places)) == found
    packed = parquet(tmp_path / "t.parquet", TABLE)
    twice = list(readers.again("t.parquet", "parquet", lambda: io.BytesIO(packed), PAIR, [(8, 2, 1), (2, 0, 1)]))
    assert [(line.line, line.messages[0].content) for line in twice] == [(2, "q1"), (8, "q7")]  # type: ignore[union-attr]


def test_a_place_that_no_longer_holds_its_row_comes_back_bad() -> None:
    (found,) = readers.again("a.jsonl", "jsonl", lambda: io.BytesIO(b"xxxxxxxxxx"), CHAT, [(1, 0, 5)])
    assert isinstance(found, Bad)
    assert found.reason == "not_json"
