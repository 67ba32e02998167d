"""What changed between two states of the records, reading only leaves that differ."""

import pytest

from repro_assets.data import diff
from repro_assets.recipe import RecordsSection, Source, Split
from repro_assets.trust.blob import FolderStore
from repro_assets_tests.data.material import CHAT, Raw, jsonl, row

SECTION = RecordsSection(sources=(CHAT,), split=Split(validation=0.1))
NUMBERS = [row(f"question {n}", key=f"k{n}") for n in range(300)]


def state(store: FolderStore, rows: list[bytes], section: RecordsSection = SECTION) -> tuple[Raw, "diff.Records"]:
    raw = Raw({"a.jsonl": jsonl(*rows), "b.jsonl": jsonl(row("always"))}, store)
    return raw, raw.records(section, target=8)


def test_edits_additions_and_removals_are_told_apart_by_key(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """S0.48, S2.19: files, leaves, records."""
    old_raw, old = state(store, NUMBERS)
    edited = [*NUMBERS[:5], row("another question", key="k5", intent="login"), *NUMBERS[6:200], *NUMBERS[201:], row("new", key="n")]
    new_raw, new = state(store, edited)
    read: list[str] = []
    get = FolderStore.get_bytes
    monkeypatch.setattr(FolderStore, "get_bytes", lambda self, name: (read.append(name), get(self, name))[1])
    found = diff.records(old, new, store, (old_raw.snapshot, new_raw.snapshot))
    ids = {key: Raw({"x.jsonl": jsonl(line)}, store).records(CHAT) for key, line in (("n", row("new", key="n")), ("k200", NUMBERS[200]))}
    names = {key: get(store, made.leaves[0].blob.sha256)[7:71].decode() for key, made in ids.items()}
    assert found.records == diff.Change(added=(names["n"],), removed=(names["k200"],), changed=("k5",))
    assert found.files == diff.Change((), (), ("a.jsonl",))
    assert found.slices == {"intent": {"login": (0, 1), "refund": (301, 300)}}
    assert found.leaves_shared + found.leaves_added == len(new.leaves)
    assert found.leaves_shared + found.leaves_removed == len(old.leaves)
    assert len(read) == found.leaves_added + found.leaves_removed < 20
    assert not found.same


def test_two_equal_states_are_the_same_and_nothing_is_read(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = state(store, NUMBERS)[1], state(store, NUMBERS)[1]
    monkeypatch.setattr(FolderStore, "get_bytes", lambda self, name: pytest.fail("a leaf was read"))
    found = diff.records(one, other, store)
    assert found.same
    assert found.records == diff.Change((), (), ())


def test_records_that_only_moved_are_neither_added_nor_removed(store: FolderStore) -> None:
    one, other = state(store, NUMBERS)[1], state(store, NUMBERS[150:] + NUMBERS[:150])[1]
    found = diff.records(one, other, store)
    assert found.leaves_added > 0
    assert found.records == diff.Change((), (), ())


def test_a_copy_that_came_counts_when_duplicates_are_kept(store: FolderStore) -> None:
    keep = RecordsSection(sources=(Source(match="**", shape="messages"),), duplicates="keep")
    one, other = state(store, NUMBERS[:3], keep)[1], state(store, [*NUMBERS[:3], NUMBERS[0]], keep)[1]
    assert len(diff.records(one, other, store).records.added) == 1
