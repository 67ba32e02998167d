"""The token leaf's canonical bytes, identity and stored form."""

import hashlib
import struct
import subprocess
import sys
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repro_assets.data import leaves
from repro_assets.data.errors import LeafError
from repro_assets.data.leaves import Leaf

ROW = st.tuples(
    st.lists(st.integers(0, 65535), min_size=1, max_size=12),
    st.none() | st.text(),
    st.dictionaries(st.text(), st.text(), max_size=2),
    st.integers(0, 9),
)


def leaf_of(rows: list[tuple[list[int], str | None, dict[str, str], int]], width: int = 2) -> Leaf:
    return leaves.make(
        [hashlib.sha256(str(number).encode()).digest() for number in range(len(rows))],
        [key for _ids, key, _slices, _cut in rows],
        [dict(sorted(slices.items())) for _ids, _key, slices, _cut in rows],
        [np.array(ids, np.uint32) for ids, _key, _slices, _cut in rows],
        [np.array([[1, len(ids)]] if len(ids) > 1 else [], np.uint32).reshape(-1, 2) for ids, _key, _slices, _cut in rows],
        [cut for _ids, _key, _slices, cut in rows],
        width,
    )


EXAMPLE = leaf_of([([5, 6, 7], "k", {"a": "ü"}, 0), ([9], None, {}, 4)])


def test_the_canonical_bytes_are_as_documented() -> None:
    """S0.15: written out by hand once, so that nobody changes the layout without noticing."""
    record = hashlib.sha256(b"0").digest() + hashlib.sha256(b"1").digest()
    token = hashlib.sha256(struct.pack("<6I", 3, 5, 6, 7, 1, 3)).digest() + hashlib.sha256(struct.pack("<2I", 1, 9)).digest()
    expected = b"repro token leaf 1\n" + struct.pack("<BI", 2, 2) + record + token
    expected += struct.pack("<2I", 0, 4) + struct.pack("<2I", 3, 1) + struct.pack("<4H", 5, 6, 7, 9)
    expected += struct.pack("<2I", 1, 0) + struct.pack("<2I", 1, 3) + '["k",{"a":"ü"}]\n[null,{}]\n'.encode()
    assert leaves.canonical_bytes(EXAMPLE) == expected
    assert leaves.identity(EXAMPLE) == hashlib.sha256(expected).hexdigest()


@settings(max_examples=60)
@given(st.lists(ROW, max_size=6), st.sampled_from([2, 4]))
def test_a_leaf_comes_back_from_its_stored_form(rows: list[tuple[list[int], str | None, dict[str, str], int]], width: int) -> None:
    leaf = leaf_of(rows, width)
    back = leaves.load(leaves.store_form(leaf), leaves.identity(leaf))
    assert leaves.canonical_bytes(back) == leaves.canonical_bytes(leaf)
    assert (len(back), back.width, back.keys, back.slices) == (len(rows), width, leaf.keys, leaf.slices)
    assert [ids.tolist() for ids in back.ids] == [ids for ids, _key, _slices, _cut in rows]
    assert [spans.tolist() for spans in back.spans] == [[[1, len(ids)]] if len(ids) > 1 else [] for ids, _key, _slices, _cut in rows]
    assert back.records == [hashlib.sha256(str(number).encode()).hexdigest() for number in range(len(rows))]
    assert back.lengths.tolist() == [len(ids) for ids, _key, _slices, _cut in rows]
    assert leaves.token_digests(back) == [leaves.token_digest(*row) for row in zip(leaf.ids, leaf.spans, strict=True)]
    assert leaves.token_digests(back) == [bytes(row) for row in leaf.token]
    assert back.trained.tolist() == [len(ids) - 1 for ids, _key, _slices, _cut in rows]


@pytest.mark.parametrize("column", ["record", "token", "cut", "spans"])
def test_a_stored_leaf_with_a_column_of_another_type_is_refused(column: str) -> None:
    leaf = leaf_of([([1, 2, 3], None, {}, 0)], 2)
    batch = pa.ipc.open_stream(pa.BufferReader(leaves.store_form(leaf))).read_next_batch()
    other = {"record": pa.binary(16), "token": pa.binary(16), "cut": pa.uint64(), "spans": pa.list_(pa.uint64())}[column]
    value = {"record": bytes(16), "token": bytes(16), "cut": 0, "spans": [1, 3]}[column]
    changed = batch.set_column(batch.schema.get_field_index(column), column, pa.array([value], other))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, changed.schema) as writer:
        writer.write_batch(changed)
    with pytest.raises(LeafError, match="where 1|where 32"):
        leaves.load(bytes(sink.getvalue()), leaves.identity(leaf))


def test_the_token_digest_does_not_depend_on_the_width_and_does_on_ids_and_spans() -> None:
    ids, spans = np.array([1, 2, 3]), np.array([[1, 3]], np.uint32)
    digest = leaves.token_digest(ids.astype(np.uint16), spans)
    assert digest == leaves.token_digest(ids.astype(np.uint32), spans)
    assert digest != leaves.token_digest(ids[:2], spans) != leaves.token_digest(ids, spans[:0])
    # without the count in front, an id could pass for a span
    assert leaves.token_digest(np.array([1, 1, 3]), spans[:0]) != leaves.token_digest(np.array([1]), spans)


@pytest.mark.parametrize(
    "changed",
    [
        [([5, 6, 8], "k", {"a": "ü"}, 0), ([9], None, {}, 4)],
        [([5, 6, 7], None, {"a": "ü"}, 0), ([9], None, {}, 4)],
        [([5, 6, 7], "k", {"a": "u"}, 0), ([9], None, {}, 4)],
        [([5, 6, 7], "k", {"a": "ü"}, 1), ([9], None, {}, 4)],
        [([5, 6], "k", {"a": "ü"}, 0), ([7, 9], None, {}, 4)],
    ],
)
def test_every_column_is_part_of_the_identity(changed: Any) -> None:
    assert leaves.identity(leaf_of(changed)) != leaves.identity(EXAMPLE)
    assert leaves.identity(leaf_of(changed, 4)) != leaves.identity(leaf_of(changed, 2))


def test_bytes_that_are_not_the_leaf_are_refused_by_name() -> None:
    stored, other = leaves.store_form(EXAMPLE), leaf_of([([1, 2], None, {}, 0)])
    said = f"token leaf {leaves.identity(other)}: the stored bytes hold the leaf {leaves.identity(EXAMPLE)}; they were changed: restore"
    with pytest.raises(LeafError, match=said):
        leaves.load(stored, leaves.identity(other))
    with pytest.raises(LeafError, match=r"the stored bytes are not one: .*materialize shards again"):
        leaves.load(b"nothing of the kind", "a" * 64)
    for cut in (10, len(stored) // 2):
        with pytest.raises(LeafError):
            leaves.load(stored[:cut], leaves.identity(EXAMPLE))


def test_no_flipped_byte_of_the_stored_form_is_taken_for_the_leaf() -> None:
    """Each byte in turn: refused, or (in Arrow's padding) the same leaf."""
    stored, identity = leaves.store_form(EXAMPLE), leaves.identity(EXAMPLE)
    refused = 0
    for position in range(len(stored)):
        damaged = stored[:position] + bytes([stored[position] ^ 1]) + stored[position + 1 :]
        try:
            assert leaves.identity(leaves.load(damaged, identity)) == identity
        except LeafError:
            refused += 1
    assert refused > 200


def test_compression_is_transport_and_no_part_of_the_identity() -> None:
    reader = pa.ipc.open_stream(leaves.store_form(EXAMPLE))
    batch = reader.read_next_batch()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    plain = bytes(sink.getvalue())
    assert plain != leaves.store_form(EXAMPLE)
    assert leaves.identity(leaves.load(plain, leaves.identity(EXAMPLE))) == leaves.identity(EXAMPLE)


def test_an_id_too_large_for_the_width_is_refused() -> None:
    with pytest.raises(LeafError, match="does not fit 2 bytes"):
        leaf_of([([65536], None, {}, 0)], 2)
    assert leaf_of([([65536], None, {}, 0)], 4).ids[0].tolist() == [65536]


def test_reading_leaves_needs_numpy_and_pyarrow_and_nothing_heavier() -> None:
    heavy = ("torch", "transformers", "polars", "pandera", "dagster", "pyarrow")
    code = f"import sys, repro_assets.data.leaves; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_storing_and_loading_a_leaf_does_not_import_pandas() -> None:
    """It is installed beside pyarrow in most environments, and its import was a second of every worker and every rank."""
    script = (
        "import sys, numpy as np\n"
        "from repro_assets.data import leaves\n"
        "leaf = leaves.make([bytes(32)] * 2, ['a', None], [{}, {'x': 'y'}], [np.arange(3), np.arange(2)],"
        " [np.array([[1, 2]], 'u4'), np.zeros((0, 2), 'u4')], [0, 1], 2)\n"
        "stored = leaves.store_form(leaf)\n"
        "assert leaves.load(stored, leaves.identity(leaf)).keys == ('a', None)\n"
        "assert leaves.record_column(stored) == bytes(64)\n"
        "assert 'pyarrow' in sys.modules and 'pandas' not in sys.modules\n"
    )
    pytest.importorskip("pandas", reason="pandas is not installed, so nothing can import it")
    subprocess.run([sys.executable, "-c", script], check=True)
