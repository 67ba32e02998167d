"""Records: identity, duplicates, contamination, quarantine, split, leaves and index, on made and on real rows."""

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st

from repro_assets.data import lines, records
from repro_assets.data.errors import DataError, QuarantineError, SourceError
from repro_assets.data.lines import Message, Record
from repro_assets.documents import RawFile, Records
from repro_assets.recipe import RecordsSection, Source, Split
from repro_assets.trust.blob import FolderStore
from repro_assets.trust.canonical import canonical, digest
from repro_assets_tests.data.material import CHAT, PAIR, Raw, jsonl, row

MakeRaw = Callable[[Mapping[str, bytes]], Raw]
EVERYTHING = RecordsSection(sources=(CHAT,), quarantine_limit=1.0)


def read(store: FolderStore, result: Records, split: str | None = None) -> list[Record]:
    return list(lines.read(store, [leaf.blob for leaf in result.leaves if split in (None, leaf.split)]))


def prompts(*texts: str) -> bytes:
    return b"".join(canonical({"item": str(n), "suite": "s", "text": lines.normal_text(text)}) + b"\n" for n, text in enumerate(texts))


# ---- identity


@given(
    st.lists(st.tuples(st.text(), st.sampled_from(["user", "assistant"])), max_size=4),
    st.none() | st.text(),
    st.dictionaries(st.text(), st.text()),
)
def test_leaf_lines_and_record_ids_are_rfc_8785_canonical_json(
    turns: list[tuple[str, str]], key: str | None, slices: dict[str, str]
) -> None:
    made = lines.make([Message(content, role) for content, role in turns], key, slices, "none")
    plain = {"id": made.id, "key": key, "messages": [{"role": role, "content": content} for content, role in turns], "slices": slices}
    assert lines.encode(made) == rfc8785.dumps(plain) + b"\n"
    assert made.id == digest(plain["messages"])
    assert list(lines.decode(lines.encode(made))) == [made]


def test_nfc_makes_one_record_of_two_spellings_only_when_the_recipe_says_so() -> None:
    composed, spelled = (Message("caf\u00e9", "user"),), (Message("cafe\u0301", "user"),)
    assert lines.make(composed, None, {}) == lines.make(spelled, None, {})
    assert lines.make(composed, None, {}, "none").id != lines.make(spelled, None, {}, "none").id
    assert lines.make((), "e\u0301", {"l": "e\u0301"}) == Record(lines.make((), None, {}).id, "\u00e9", (), {"l": "\u00e9"})


def test_the_id_is_of_the_messages_alone() -> None:
    turns = (Message("q", "user"), Message("a", "assistant"))
    assert (
        lines.make(turns, "k", {"x": "1"}).id
        == lines.make(turns, None, {}).id
        == digest([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])
    )


@given(st.text())
def test_normal_text_is_stable_and_blind_to_case_and_spaces(text: str) -> None:
    normal = lines.normal_text(text)
    assert lines.normal_text(normal) == normal
    assert lines.normal_text(f"  {text}\n") == normal


def test_normal_text_folds_case_spaces_and_composition() -> None:
    assert lines.normal_text(" Stra\u00dfe \t\n  CAFE\u0301 ") == "strasse caf\u00e9"


# ---- what is kept, and what is not


def test_every_row_is_accounted_for_in_counts_and_quarantine(raw: MakeRaw, store: FolderStore) -> None:
    """S0.8: nothing is dropped in silence."""
    made = raw(
        {
            "a/one.jsonl": jsonl(row("q1"), b"{broken", row("q2"), row("exam"), row("q1")),
            "b/two.jsonl": jsonl(row("q3"), row("q1", key="other")),
            "b/empty.jsonl": b"",
        }
    )
    sources = (Source(match="a/**", shape="messages", slices={"intent": "intent"}, license="MIT"), CHAT)
    result = made.records(RecordsSection(sources=sources, quarantine_limit=0.5), prompts("EXAM "))
    none = {"date": None, "near_duplicates": 0, "sensitive": 0, "unsampled": 0, "augmented": 0}
    counts = [
        {"match": "a/**", "license": "MIT", "files": 1, "read": 5, "kept": 2, "quarantined": 1, "duplicates": 1, "contaminated": 1},
        {"match": "**", "license": "NOASSERTION", "files": 2, "read": 3, "kept": 1, "quarantined": 1, "duplicates": 1, "contaminated": 0},
    ]
    assert [msgspec.to_builtins(count) for count in result.sources] == [{**count, **none} for count in counts]
    assert result.reasons == {"contaminated": 1, "duplicate": 2, "empty_file": 1, "not_json": 1}
    assert [(aside.file, aside.line, aside.reason) for aside in records.asides(store, result)] == [
        ("a/one.jsonl", 2, "not_json"),
        ("a/one.jsonl", 4, "contaminated"),
        ("a/one.jsonl", 5, "duplicate"),
        ("b/empty.jsonl", 0, "empty_file"),
        ("b/two.jsonl", 2, "duplicate"),
    ]
    details = {(aside.file, aside.line): aside.detail for aside in records.asides(store, result)}
    assert details[("b/two.jsonl", 2)] == "the same messages as a/one.jsonl:1"
    assert details[("a/one.jsonl", 4)] == "the prompt is the evaluation item s/0"
    assert sorted(record.messages[0].content for record in read(store, result)) == ["q1", "q2", "q3"]
    assert sum(result.splits.values()) == 3
    assert result.slices == {"intent": {"refund": 3}}


def test_which_duplicate_stays_depends_on_content_and_source_never_on_arrival(raw: MakeRaw, store: FolderStore) -> None:
    copies = [row("same", key=key) for key in ("k1", "k2", "k3")]
    kept = set()
    for seed in range(6):
        shuffled = random.Random(seed).sample(copies, 3)
        result = raw({f"{n}.jsonl": jsonl(copy) for n, copy in enumerate(shuffled)}).records()
        kept.add(read(store, result)[0].key)
        assert result.sources[0].duplicates == 2
    assert len(kept) == 1
    ranked = RecordsSection(sources=(Source(match="z.jsonl", shape="messages", fields={"id": "id"}), CHAT))
    other = next(copy for copy in copies if msgspec.json.decode(copy)["id"] not in kept)
    result = raw({"a.jsonl": jsonl(*copies), "z.jsonl": jsonl(other)}).records(ranked)
    assert read(store, result)[0].key == msgspec.json.decode(other)["id"]


def test_duplicate_rows_everywhere_leave_one_record(raw: MakeRaw, store: FolderStore) -> None:
    result = raw({"a.jsonl": jsonl(*[row("x", key="k")] * 500), "b.jsonl": jsonl(*[row("x", key="k")] * 500)}).records()
    assert (result.sources[0].kept, result.sources[0].duplicates) == (1, 999)
    (place,) = records.places(store, result, "a.jsonl")
    assert place.line == 1
    assert list(records.places(store, result, "b.jsonl")) == []


def test_duplicates_stay_when_the_recipe_keeps_them(raw: MakeRaw, store: FolderStore) -> None:
    result = raw({"a.jsonl": jsonl(row("x"), row("x"))}).records(RecordsSection(sources=(CHAT,), duplicates="keep"))
    assert len(read(store, result)) == 2
    assert result.reasons == {}


def test_a_turn_of_a_longer_conversation_that_is_an_evaluation_item_is_found(raw: MakeRaw, store: FolderStore) -> None:
    turns = [("user", "hello"), ("assistant", "hi"), ("user", "What is   2+2?"), ("assistant", "4")]
    data = msgspec.json.encode({"id": "1", "intent": "x", "messages": [{"role": role, "content": content} for role, content in turns]})
    made = raw({"a.jsonl": jsonl(data, row("clean"), row("two\nlines"))})
    assert made.records(EVERYTHING, prompts("what is 2+2?", "unrelated", "two lines")).reasons == {"contaminated": 2}
    off = RecordsSection(sources=(CHAT,), contamination="off")
    assert made.records(off, prompts("what is 2+2?")).reasons == {}


def test_prompts_that_are_not_the_suites_jsonl_are_refused(raw: MakeRaw) -> None:
    with pytest.raises(DataError, match=r"prompts, line 1, cannot be read.*materialize eval_suites"):
        raw({"a.jsonl": jsonl(row("x"))}).records(CHAT, b'{"text": 1}\n')


def test_more_bad_rows_than_the_limit_stop_with_the_first_ten_and_the_remedy(raw: MakeRaw) -> None:
    """S1.9: file, line, reason and remedy in one message."""
    made = raw({"data/bad ü.jsonl": jsonl(*[b"nope"] * 12, row("good"))})
    with pytest.raises(QuarantineError) as caught:
        made.records(CHAT)
    said = str(caught.value)
    assert said.startswith("12 of 13 rows are bad (92.31%), more than records.quarantine_limit (1.00%):\n  data/bad ü.jsonl:1: not_json: ")
    assert "bad ü.jsonl:10: not_json" in said
    assert "bad ü.jsonl:11" not in said
    assert "and 2 more" in said
    assert "raise records.quarantine_limit" in said


def test_duplicates_and_contaminated_rows_do_not_count_as_bad(raw: MakeRaw) -> None:
    strict = RecordsSection(sources=(CHAT,), quarantine_limit=0.0)
    result = raw({"a.jsonl": jsonl(row("x"), row("x"), row("exam"))}).records(strict, prompts("exam"))
    assert result.sources[0].kept == 1


def test_a_snapshot_without_a_good_row_is_refused(raw: MakeRaw) -> None:
    with pytest.raises(DataError, match=r"no records are left of 2 rows: \{'empty_file': 1, 'not_json': 1\}"):
        raw({"a.jsonl": b"", "b.jsonl": b"x\n"}).records(EVERYTHING)


def test_raw_bytes_that_are_not_those_of_the_manifest_are_refused(raw: MakeRaw) -> None:
    """S0.18: the bytes read are hashed again."""
    made = raw({"a.jsonl": jsonl(row("x"))})
    made.files["a.jsonl"] = jsonl(row("y"))
    with pytest.raises(SourceError, match=r"a\.jsonl: the bytes read have SHA-256 .*changed after it was hashed"):
        made.records()


def test_a_slice_label_with_a_value_for_every_record_is_refused(raw: MakeRaw) -> None:
    source = Source(match="**", shape="messages", slices={"id": "id"})
    with pytest.raises(DataError, match=r"a\.jsonl: slice label 'id' has 1100 values, more than 1000.*fields\.id"):
        raw({"a.jsonl": jsonl(*(row(str(n)) for n in range(1100)))}).records(source)


def test_a_path_with_spaces_and_unicode_goes_through_index_and_quarantine(raw: MakeRaw, store: FolderStore) -> None:
    path = "mes données/été ☀ (1).jsonl"
    result = raw({path: jsonl(row("x"), b"bad")}).records(EVERYTHING)
    assert list(result.index) == [path]
    assert [aside.file for aside in records.asides(store, result)] == [path]
    assert f"index/{path}.bin" in result.files()


# ---- order, split, leaves


@settings(max_examples=25)
@given(st.permutations(["a.jsonl", "b/ü.jsonl", "b/z.jsonl", "c.jsonl"]))
def test_records_do_not_depend_on_the_order_in_which_files_arrive(tmp_path_factory: pytest.TempPathFactory, order: list[str]) -> None:
    store = FolderStore(tmp_path_factory.getbasetemp() / "records")
    data = {name: jsonl(*(row(f"{name} {n}") for n in range(30)), row("everywhere", key=name), b"bad") for name in sorted(order)}
    section = RecordsSection(sources=(CHAT,), quarantine_limit=1.0, split=Split(validation=0.2))
    results = [Raw({name: data[name] for name in names}, store).records(section, target=8) for names in (sorted(order), order)]
    assert digest(results[0]) == digest(results[1])


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 119), st.sampled_from(["insert", "delete", "edit"])), min_size=1, max_size=3))
def test_an_edit_changes_only_the_leaves_that_hold_it_and_their_neighbours(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, str]]
) -> None:
    """Also for an insert at the head of the first file: nothing in a leaf moves with position."""
    store = FolderStore(tmp_path_factory.getbasetemp() / "edits")
    section = RecordsSection(sources=(CHAT,), split=Split(validation=0))
    before = [row(f"question {n}") for n in range(480)]
    after: list[bytes | None] = list(before)
    for n, (position, kind) in enumerate(edits):
        here = after[4 * position]
        after[4 * position] = (
            None if kind == "delete" else row(f"new {n}") if kind == "edit" else row(f"new {n}") + b"\n" + (here or row(f"old {n}"))
        )
    left, right = ({"a.jsonl": jsonl(*(line for line in lines if line))} for lines in (before, after))
    old, new = (Raw(files, store).records(section, target=8) for files in (left, right))
    assert old.index != new.index
    changed = {leaf.blob.sha256 for leaf in new.leaves} - {leaf.blob.sha256 for leaf in old.leaves}
    assert len(changed) <= 3 * len(edits) < len(new.leaves)


def test_a_record_never_changes_side_when_others_come_or_go(raw: MakeRaw, store: FolderStore) -> None:
    section = RecordsSection(sources=(CHAT,), split=Split(validation=0.3))
    texts = [f"question {n}" for n in range(400)]

    def held_out(some: list[str]) -> set[str]:
        return {record.id for record in read(store, raw({"a.jsonl": jsonl(*map(row, some))}).records(section), "validation")}

    everything, half = held_out(texts), held_out(texts[::-2])
    assert half <= everything
    assert 80 < len(everything) < 160
    assert held_out(texts) != {
        record.id
        for record in read(
            store,
            raw({"a.jsonl": jsonl(*map(row, texts))}).records(RecordsSection(sources=(CHAT,), split=Split(0.3, "other"))),
            "validation",
        )
    }


def test_leaves_hold_every_record_once_in_canonical_order(raw: MakeRaw, store: FolderStore) -> None:
    files = {name: jsonl(*(row(f"{name}{n}") for n in range(40))) for name in ("b.jsonl", "a.jsonl", "B.jsonl")}
    result = raw(files).records(RecordsSection(sources=(CHAT,), split=Split(validation=0.1)), target=8)
    for split in records.SPLITS:
        texts = [record.messages[0].content for record in read(store, result, split)]
        expected = [f"{name}{n}" for name in ("B.jsonl", "a.jsonl", "b.jsonl") for n in range(40)]
        assert texts == [text for text in expected if text in set(texts)]
    assert sum(leaf.records for leaf in result.leaves) == 120 == sum(result.splits.values())
    assert [leaf.split for leaf in result.leaves] == sorted(leaf.split for leaf in result.leaves)
    for leaf in result.leaves:
        assert store.get_bytes(leaf.blob.sha256).count(b"\n") == leaf.records


def test_order_by_key_hash_gives_reshuffled_sources_the_same_leaves(raw: MakeRaw) -> None:
    rows = [row(f"q{n}", key=f"key{n}") for n in range(100)]
    shuffled = random.Random(1).sample(rows, 100)
    one, other = (raw({"a.jsonl": jsonl(*order)}).records(CHAT, order="key_hash", target=8) for order in (rows, shuffled))
    assert one.leaves == other.leaves
    assert (
        raw({"a.jsonl": jsonl(*rows)}).records(CHAT, target=8).leaves != raw({"a.jsonl": jsonl(*shuffled)}).records(CHAT, target=8).leaves
    )


def test_the_index_leads_from_each_record_back_to_its_bytes(raw: MakeRaw, store: FolderStore) -> None:
    """S0.6: from a record to file, line and bytes."""
    data = jsonl(row("one"), b"", b"junk", row("zwei ü"), row("one"))
    made = raw({"x y.jsonl": data})
    result = made.records(EVERYTHING)
    found = {place.id: data[place.offset : place.offset + place.length] for place in records.places(store, result, "x y.jsonl")}
    assert {record.id: record.messages[0].content for record in read(store, result)} == {
        name: msgspec.json.decode(line)["id"] for name, line in found.items()
    }
    assert [place.line for place in records.places(store, result, "x y.jsonl")] == [1, 4]


def test_leaves_that_the_store_holds_are_not_put_again(raw: MakeRaw, store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    made = raw({"a.jsonl": jsonl(*(row(f"q{n}") for n in range(200)))})
    first = made.both(EVERYTHING, target=8)
    put: list[int] = []
    real = FolderStore.put_many
    monkeypatch.setattr(FolderStore, "put_many", lambda self, items: (put.extend(len(item) for item in items), real(self, items))[1])
    again = made.both(EVERYTHING, target=8)
    assert again[0] == first[0]
    assert {leaf.blob.size for leaf in first[0].leaves}.isdisjoint(put)
    assert (first[1].leaves_known, again[1].leaves_new) == (0, 0)
    assert first[1].leaves_new == again[1].leaves_known == len(first[0].leaves)


# ---- real rows


def test_real_rows_give_the_records_they_always_gave(raw: MakeRaw, store: FolderStore, gsm8k: bytes) -> None:
    """S0.34: small real input, golden output. A new digest here means that every snapshot would be built anew."""
    result = raw({"gsm8k/train.jsonl": gsm8k}).records(PAIR)
    assert result.splits == {"train": 382, "validation": 18}
    assert digest([[leaf.split, leaf.blob.sha256, leaf.records] for leaf in result.leaves]) == GOLDEN
    first = read(store, result)[0]
    assert first.messages[0].content.startswith("Natalia sold clips to 48 of her friends")
    assert first.messages[1].content.endswith("#### 72")


GOLDEN = "0436abfc519e0ff5803e94a7519410901b47c4f47936d640ccf4882cafc061b4"


def test_the_whole_of_gsm8k_is_read_when_it_is_there(raw: MakeRaw, store: FolderStore) -> None:
    folder = next(
        (parent / "shared" / "data" / "gsm8k" for parent in Path(__file__).resolve().parents if (parent / "shared/data/gsm8k").is_dir()),
        None,
    )
    if folder is None:
        pytest.skip("shared/data/gsm8k is not beside this checkout; the first 400 rows are tested above")
    train, test = ((folder / name).read_bytes() for name in ("train.jsonl", "test.jsonl"))
    result = raw({"train.jsonl": train}).records(PAIR, prompts(*(msgspec.json.decode(line)["question"] for line in test.splitlines())))
    assert (result.sources[0].read, result.sources[0].kept, result.reasons) == (7473, 7473, {})
    leaked = train + test.splitlines(keepends=True)[5].upper().replace(b'"QUESTION"', b'"question"').replace(
        b'"ANSWER"', b'"answer"'
    ).replace(b"\\N", b"\\n")
    again = raw({"train.jsonl": leaked}).records(PAIR, prompts(*(msgspec.json.decode(line)["question"] for line in test.splitlines())))
    assert again.reasons == {"contaminated": 1}
    assert again.leaves == result.leaves


def test_a_stream_that_fails_midway_stores_no_leaf(raw: MakeRaw, store: FolderStore) -> None:
    """S3 or lakeFS down in the middle of reading leaves nothing half done."""

    class Broken:
        def __init__(self) -> None:
            self.reads = 0

        def read(self, count: int = -1) -> bytes:
            self.reads += 1
            if self.reads > 1:
                raise ConnectionError("reset by peer")
            return row("x") + b"\n"

        def close(self) -> None:
            self.closed = True

    made = raw({"a.jsonl": jsonl(row("x"))})
    broken: Any = Broken()
    before = sorted(path.name for path in store.root.rglob("*") if path.is_file())

    def opened(file: RawFile) -> Any:
        return broken

    with pytest.raises(ConnectionError):
        records.build(made.snapshot, opened, b"", EVERYTHING, store)
    assert broken.closed
    assert sorted(path.name for path in store.root.rglob("*") if path.is_file()) == before
