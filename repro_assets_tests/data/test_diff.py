"""What changed between two states of the records, reading only leaves that differ; and two records token by token."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from repro_assets.data import diff, lines
from repro_assets.data.lines import Message
from repro_assets.documents import Records
from repro_assets.recipe import RecordsSection, Source, Split
from repro_assets.trust.blob import FolderStore
from repro_assets_tests.data.material import CHAT, Raw, jsonl, row

SECTION = RecordsSection(sources=(CHAT,), split=Split(validation=0.1))
KEYLESS = RecordsSection(sources=(Source(match="**", shape="messages"),), split=Split(validation=0.1))
NUMBERS = [row(f"question {n}", key=f"k{n}") for n in range(300)]


class Counted(FolderStore):
    """A folder store that remembers which blobs were read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.read: list[str] = []

    def get_bytes(self, digest: str) -> bytes:
        self.read.append(digest)
        return super().get_bytes(digest)


@pytest.fixture
def store(tmp_path: Path) -> Counted:
    return Counted(tmp_path / "store")


def state(store: FolderStore, rows: list[bytes], section: RecordsSection = SECTION) -> tuple[Raw, Records]:
    raw = Raw({"a.jsonl": jsonl(*rows), "b.jsonl": jsonl(row("always"))}, store)
    return raw, raw.records(section, target=8)


def id_of(line: bytes, store: FolderStore) -> str:
    made = Raw({"x.jsonl": jsonl(line)}, store).records(CHAT)
    return next(iter(lines.read(store, [made.leaves[0].blob]))).id


def test_edits_additions_and_removals_are_told_apart_by_key(store: Counted) -> None:
    """S0.48, S0.49, S2.19: files, leaves, records."""
    old_raw, old = state(store, NUMBERS)
    changed = row("another question", key="k5", intent="login")
    new_raw, new = state(store, [*NUMBERS[:5], changed, *NUMBERS[6:200], *NUMBERS[201:], row("new", key="n")])
    store.read.clear()
    found = diff.records(old, new, store, (old_raw.snapshot, new_raw.snapshot))
    read = list(store.read)
    came, gone, before, now = (id_of(line, store) for line in (row("new", key="n"), NUMBERS[200], NUMBERS[5], changed))
    assert found.records == diff.Change(added=(came,), removed=(gone,), changed=("k5",))
    assert found.edits == (diff.Edit("k5", before, now),)
    assert found.files == diff.Change((), (), ("a.jsonl",))
    assert found.slices == {"intent": {"login": (0, 1), "refund": (301, 300)}}
    assert found.leaves_shared + found.leaves_added == len(new.leaves)
    assert found.leaves_shared + found.leaves_removed == len(old.leaves)
    assert len(read) == found.leaves_added + found.leaves_removed < 20
    shared = {leaf.blob.sha256 for leaf in old.leaves} & {leaf.blob.sha256 for leaf in new.leaves}
    assert not shared & set(read)
    assert not found.same
    assert diff.summary(old, new, store).records == (1, 1, 1)


def test_two_equal_states_are_the_same_and_nothing_is_read(store: Counted) -> None:
    one, other = state(store, NUMBERS)[1], state(store, NUMBERS)[1]
    store.read.clear()
    found = diff.records(one, other, store)
    assert found.same
    assert found.records == diff.Change((), (), ())
    assert store.read == []


def test_records_that_only_moved_are_neither_added_nor_removed(store: Counted) -> None:
    one, other = state(store, NUMBERS)[1], state(store, NUMBERS[150:] + NUMBERS[:150])[1]
    found = diff.records(one, other, store)
    assert found.leaves_added > 0
    assert found.records == diff.Change((), (), ())


def test_a_copy_that_came_counts_when_duplicates_are_kept(store: Counted) -> None:
    keep = RecordsSection(sources=(Source(match="**", shape="messages"),), duplicates="keep")
    one, other = state(store, NUMBERS[:3], keep)[1], state(store, [*NUMBERS[:3], NUMBERS[0]], keep)[1]
    assert len(diff.records(one, other, store).records.added) == 1


def test_a_record_with_another_label_is_relabelled_and_not_a_new_one(store: Counted) -> None:
    one = state(store, NUMBERS)[1]
    other = state(store, [*NUMBERS[:9], row("question 9", key="k9", intent="login"), *NUMBERS[10:]])[1]
    found = diff.records(one, other, store)
    assert found.records == diff.Change((), (), ())
    assert found.relabelled == (id_of(NUMBERS[9], store),)
    assert not found.same


def test_without_keys_an_edit_is_found_by_its_place_whatever_was_inserted_before(store: Counted) -> None:
    """The record between the same two neighbours in the same raw file is the changed one; the line is where it stands now."""
    old = state(store, NUMBERS, KEYLESS)[1]
    edited = row("another question 50")
    rows = [row("first of all"), *NUMBERS[:50], edited, *NUMBERS[51:120], *NUMBERS[121:]]
    new = state(store, rows, KEYLESS)[1]
    found = diff.records(old, new, store)
    assert found.edits == (diff.Edit("a.jsonl:52", id_of(NUMBERS[50], store), id_of(edited, store)),)
    assert found.records.added == (id_of(row("first of all"), store),)
    assert found.records.removed == (id_of(NUMBERS[120], store),)


def test_of_a_run_of_edits_without_keys_the_first_became_the_first(store: Counted) -> None:
    old = state(store, NUMBERS, KEYLESS)[1]
    new = state(store, [*NUMBERS[:10], row("x"), row("y"), *NUMBERS[13:]], KEYLESS)[1]
    found = diff.records(old, new, store)
    ids = [id_of(line, store) for line in (NUMBERS[10], NUMBERS[11], NUMBERS[12], row("x"), row("y"))]
    assert found.edits == (diff.Edit("a.jsonl:11", ids[0], ids[3]), diff.Edit("a.jsonl:12", ids[1], ids[4]))
    assert found.records.removed == (ids[2],)
    assert found.records.added == ()


def test_what_went_after_one_record_and_came_after_another_is_no_edit(store: Counted) -> None:
    old = state(store, NUMBERS, KEYLESS)[1]
    rows = [*NUMBERS[:20], *NUMBERS[21:40], NUMBERS[40], row("new"), *NUMBERS[42:]]  # without 20; 41 edited
    found = diff.records(old, state(store, rows, KEYLESS)[1], store)
    assert found.edits == (diff.Edit("a.jsonl:41", id_of(NUMBERS[41], store), id_of(row("new"), store)),)
    assert found.records.removed == (id_of(NUMBERS[20], store),)


def test_several_records_with_one_key_are_paired_one_by_one(store: Counted) -> None:
    old = state(store, [row("a", key="same"), row("b", key="same"), *NUMBERS])[1]
    new = state(store, [row("c", key="same"), *NUMBERS])[1]
    found = diff.records(old, new, store)
    assert found.records.changed == ("same",)
    assert len(found.records.removed) == 1
    assert found.records.added == ()


TOKENS = st.lists(st.integers(0, 5), max_size=300)


@given(TOKENS, TOKENS)
def test_the_pieces_spell_both_records(before: list[int], now: list[int]) -> None:
    pieces = diff.tokens(before, now, str)
    assert [token for piece in pieces if piece.kind != "added" for token in piece.ids] == before
    assert [token for piece in pieces if piece.kind != "removed" for token in piece.ids] == now
    assert all(piece.texts == tuple(map(str, piece.ids)) for piece in pieces)
    assert all(one.kind != other.kind for one, other in pairwise(pieces))
    assert diff.moved(pieces) == (
        sum(len(p.ids) for p in pieces if p.kind == "removed"),
        sum(len(p.ids) for p in pieces if p.kind == "added"),
    )


def test_a_frequent_token_does_not_hide_what_is_common() -> None:
    long = [7, 1] * 200
    assert [(piece.kind, len(piece.ids)) for piece in diff.tokens(long, [*long[:200], 9, *long[200:]], str)] == [
        ("same", 200),
        ("added", 1),
        ("same", 200),
    ]


LABEL = st.sampled_from(["slices", "messages", "id", 'a","slices":{', "x"]) | st.text(max_size=5)


@example(rows=[("a", None)], slices={"id": "x", "slices": "y"})
@given(st.lists(st.tuples(st.text(), st.none() | LABEL | st.text()), min_size=1, max_size=4), st.dictionaries(LABEL, LABEL, max_size=3))
def test_a_line_without_its_messages_has_everything_else(rows: list[tuple[str, str | None]], slices: dict[str, str]) -> None:
    """Whatever user text, keys and labels look like."""
    made = [lines.make([Message(f'{text},"slices":{{', "assistant")], key, slices) for text, key in rows]
    leaf = b"".join(lines.encode(record) for record in made)
    heads = [lines.head(line) for line in lines.without_messages(leaf)]
    assert [(head.id, head.key, head.slices) for head in heads] == [(record.id, record.key, record.slices) for record in made]
    assert heads == [lines.head(line) for line in leaf.split(b"\n")[:-1]]
