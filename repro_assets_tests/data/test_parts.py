"""Parsing as a map: what is parsed again and what is not, and the cleaning steps as they meet in the records."""

import pickle
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec
import pytest

from repro_assets.data import lines, manifest, records, reproduction, sharding
from repro_assets.data.errors import SourceError
from repro_assets.data.parts import Intake, Parse
from repro_assets.data.tokenizing import load
from repro_assets.data.workers import Serial, Spawn
from repro_assets.documents import BaseModel, RawFile, Records
from repro_assets.recipe import Augmentation, NearDuplicates, RecordsSection, ShardingSection, Source, Split
from repro_assets.trust.blob import FolderStore
from repro_assets.trust.canonical import canonical, digest
from repro_assets_tests.data.material import CHAT, Raw, jsonl, row

MakeRaw = Callable[[Mapping[str, bytes]], Raw]
SECTION = RecordsSection(sources=(CHAT,), split=Split(validation=0.1), target=8)


@dataclass(frozen=True)
class Folder:
    """Opens raw files of a folder, in any process."""

    root: str

    def __call__(self, file: RawFile) -> BinaryIO:
        return (Path(self.root) / file.path).open("rb")


def questions(name: str, count: int) -> list[bytes]:
    return [row(f"{name} asks question number {n} about {n * n}") for n in range(count)]


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths that were parsed."""
    seen: list[str] = []
    real = Parse.__call__
    monkeypatch.setattr(Parse, "__call__", lambda self, unit: (seen.append(unit.file.path), real(self, unit))[1])
    return seen


# ---- what is paid for again


def test_an_unchanged_file_is_not_parsed_again_and_the_records_are_those_of_a_full_run(raw: MakeRaw, parsed: list[str]) -> None:
    files = {name: jsonl(*questions(name, 60)) for name in ("a.jsonl", "b.jsonl", "c.jsonl")}
    before = raw(files).both(SECTION)
    changed = {**files, "b.jsonl": jsonl(row("new at the head"), *questions("b.jsonl", 60)), "d.jsonl": jsonl(*questions("d", 5))}
    parsed.clear()
    now = raw(changed).both(SECTION, previous=before)
    assert parsed == ["b.jsonl", "d.jsonl"]
    assert (now[1].files_parsed, now[1].files_known) == (2, 2)
    assert now[0] == raw(changed).records(SECTION)
    assert 0 < now[1].leaves_new < now[1].leaves_known
    assert now[1].since is not None
    assert now[1].since.files == (1, 0, 1)
    assert now[1].since.records == (6, 0, 0)
    assert now[1].since.slices == {"intent": {"refund": (180, 186)}}


def test_an_unchanged_row_of_a_changed_file_is_not_parsed_again(raw: MakeRaw, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies, findings, cleaning counts and signatures come with it; its place is the new one."""
    section = msgspec.structs.replace(
        SECTION,
        augment=(Augmentation("lowercase", share=0.5),),
        personal="flag",
        whitespace="trim",
        near_duplicates=NearDuplicates(),
        order="key_hash",
        quarantine_limit=1.0,
    )
    rows = [*questions("A", 60), row("Write to Jane@Example.org"), row("  Spaces  "), b"broken"]
    before = raw({"a.jsonl": jsonl(*rows)}).both(section)
    seen: list[int] = []
    real = Intake.examined
    monkeypatch.setattr(Intake, "examined", lambda self, one: (seen.append(one.line), real(self, one))[1])
    edited = [row("at the head"), *rows[:30], row("in the middle"), *rows[31:]]
    now = raw({"a.jsonl": jsonl(*edited)}).both(section, previous=before)
    fresh = [line for line in seen if line in (1, 32)]
    assert fresh == [1, 32]
    assert len(seen) < 45  # the others only where a new leaf needs their text
    seen.clear()
    full = raw({"a.jsonl": jsonl(*edited)}).both(section)
    assert now[0] == full[0]
    assert len(seen) == 63
    assert (now[0].cleaned, now[0].sensitive, now[0].reasons) == ({"whitespace": 1}, {"personal.email": 1}, {"not_json": 1})
    again = raw({"a.jsonl": jsonl(*edited[1:])}).both(section, previous=now)
    assert again[0] == raw({"a.jsonl": jsonl(*edited[1:])}).records(section)


def test_rows_that_are_known_by_their_bytes_need_the_same_evaluation_items(raw: MakeRaw) -> None:
    rows = questions("a", 20)
    before = raw({"a.jsonl": jsonl(*rows)}).both(SECTION)
    item = canonical({"item": "1", "suite": "s", "text": lines.normal_text("a asks question number 3 about 9")}) + b"\n"
    now = raw({"a.jsonl": jsonl(row("new"), *rows)}).both(SECTION, item, previous=before)
    assert now[0].reasons == {"contaminated": 1}


def test_nothing_is_read_of_unchanged_files(raw: MakeRaw, monkeypatch: pytest.MonkeyPatch) -> None:
    made = raw({"a.jsonl": jsonl(*questions("a", 50))})
    before = made.both(SECTION)
    monkeypatch.setattr(made, "open", None)
    assert made.both(SECTION, previous=before)[0] == before[0]


def test_other_evaluation_items_or_lost_parts_have_the_file_parsed_again(raw: MakeRaw, store: FolderStore, parsed: list[str]) -> None:
    made = raw({"a.jsonl": jsonl(*questions("a", 20)), "b.jsonl": jsonl(*questions("b", 20))})
    before = made.both(SECTION)
    parsed.clear()
    item = canonical({"item": "1", "suite": "s", "text": lines.normal_text("a asks question number 3 about 9")}) + b"\n"
    assert made.both(SECTION, item, previous=before)[0].reasons == {"contaminated": 1}
    assert parsed == ["a.jsonl", "b.jsonl"]
    parsed.clear()
    lost = before[1].parsed["b.jsonl"].parts[0].columns.sha256
    (store.root / "sha256" / lost[:2] / lost).unlink()
    assert made.both(SECTION, previous=before)[0] == before[0]
    assert parsed == ["b.jsonl"]


def test_a_record_that_was_dropped_for_a_file_that_is_gone_comes_back_without_parsing(raw: MakeRaw, parsed: list[str]) -> None:
    """The winner of a pair of duplicates leaves; the other one's row is read again, by its place."""
    files = {
        "a.jsonl": jsonl(row("said twice", key="1"), *questions("a", 5)),
        "b.jsonl": jsonl(*questions("b", 5), row("said twice", key="0")),
    }
    before = raw(files).both(SECTION)
    assert before[0].reasons == {"duplicate": 1}
    parsed.clear()
    del files["a.jsonl"]
    now = raw(files).both(SECTION, previous=before)
    assert parsed == []
    assert now[0] == raw(files).records(SECTION)
    assert (now[0].sources[0].kept, now[0].reasons) == (6, {})


def test_a_row_that_is_read_again_and_is_another_one_is_refused(raw: MakeRaw) -> None:
    files = {
        "a.jsonl": jsonl(row("said twice", key="1"), *questions("a", 5)),
        "b.jsonl": jsonl(*questions("b", 5), row("said twice", key="0")),
    }
    before = raw(files).both(SECTION)
    del files["a.jsonl"]
    changed = raw(files)
    changed.files["b.jsonl"] = files["b.jsonl"].replace(b"said twice", b"said since")
    with pytest.raises(SourceError, match=r"b\.jsonl:6: the row is not the one that was parsed before.*materialize raw_snapshot again"):
        changed.both(SECTION, previous=before)


def test_workers_that_share_no_disk_leave_the_text_in_the_store(raw: MakeRaw, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Ray cluster: what one worker wrote, another machine reads."""
    made = raw({"a.jsonl": jsonl(*questions("a", 50))})
    here = made.both(SECTION)
    away = Serial()
    monkeypatch.setattr(away, "local", False)
    there = made.both(SECTION, workers=away)
    assert there[0] == here[0]
    assert [part.text is None for seen in (here[1], there[1]) for part in seen.parsed["a.jsonl"].parts] == [True, False]
    assert set(there[1].files()) - set(here[1].files()) == {"parsed/a.jsonl/00000.text"}
    assert made.both(SECTION, previous=there, workers=away, target=16)[0] == made.records(SECTION, target=16)


def test_a_large_file_is_many_parts_with_the_same_records(raw: MakeRaw, monkeypatch: pytest.MonkeyPatch) -> None:
    made = raw({"a.jsonl": jsonl(*questions("a", 200), b"broken")})
    whole = made.both(SECTION, quarantine_limit=1.0)
    monkeypatch.setattr("repro_assets.data.parts.PART", 1000)
    monkeypatch.setattr("repro_assets.data.parts.BATCH_ROWS", 7)
    cut = made.both(SECTION, quarantine_limit=1.0)
    assert (len(whole[1].parsed["a.jsonl"].parts), len(cut[1].parsed["a.jsonl"].parts) > 10) == (1, True)
    assert cut[0] == whole[0]


def test_any_number_of_processes_gives_the_same_records_and_shards(store: FolderStore, tmp_path: Path, base_model: BaseModel) -> None:
    files = {f"part-{n}.jsonl": jsonl(*questions(f"file {n}", 40)) for n in range(6)}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    made = Raw(files, store)
    section = msgspec.structs.replace(SECTION, near_duplicates=NearDuplicates(), personal="mask", contamination="ngram")
    item = canonical({"item": "1", "suite": "s", "text": "file 3 asks question number 3 about 9"}) + b"\n"
    found = []
    for workers in (Serial(), Spawn(1), Spawn(2), Spawn(4)):
        cleaned, _seen = records.build(made.snapshot, Folder(str(tmp_path)), item, section, store, workers=workers)
        shards, _seen2 = sharding.build(cleaned, base_model, ShardingSection(), store, workers=workers)
        found.append((digest(cleaned), digest(shards)))
    assert len(set(found)) == 1
    assert cleaned.reasons["contaminated"] == 1


def test_tasks_travel_to_other_processes(store: FolderStore, base_model: BaseModel) -> None:
    task = sharding.Tokenise(base_model, ShardingSection(), store)
    assert task.codec.width == 2
    assert pickle.loads(pickle.dumps(task)).codec.engine() == task.codec.engine()


# ---- sampling


def counted(result: Records) -> dict[str, int]:
    return {name: value for name, value in msgspec.to_builtins(result.sources[0]).items() if isinstance(value, int) and value}


def test_a_weight_keeps_its_share_and_a_quota_its_number_and_the_rest_is_listed(raw: MakeRaw, store: FolderStore) -> None:
    made = raw({"a.jsonl": jsonl(*questions("a", 400))})
    half = made.records(msgspec.structs.replace(SECTION, sources=(msgspec.structs.replace(CHAT, weight=0.5),)))
    assert 150 < half.sources[0].kept < 250
    assert half.sources[0].kept + half.sources[0].unsampled == 400
    asides = list(records.asides(store, half))
    assert {aside.reason for aside in asides} == {"unsampled"}
    assert len({aside.line for aside in asides}) == half.sources[0].unsampled
    ten = made.records(msgspec.structs.replace(SECTION, sources=(msgspec.structs.replace(CHAT, quota=10),)))
    assert counted(ten) == {"files": 1, "read": 400, "kept": 10, "unsampled": 390}


def test_a_sampled_record_stays_when_others_come(raw: MakeRaw, store: FolderStore) -> None:
    section = msgspec.structs.replace(SECTION, sources=(msgspec.structs.replace(CHAT, weight=0.3),))
    few, more = (
        {record.id for record in lines.read(store, [leaf.blob for leaf in raw(files).records(section).leaves])}
        for files in (
            {"b.jsonl": jsonl(*questions("b", 100))},
            {"a.jsonl": jsonl(*questions("a", 50)), "b.jsonl": jsonl(*questions("b", 100))},
        )
    )
    assert few < more


# ---- near duplicates, secrets, augmentation


def test_of_near_duplicates_one_stays_whatever_the_order_and_the_cluster_is_listed(raw: MakeRaw, store: FolderStore) -> None:
    long = "the printer in the office on the third floor prints every page twice and then stops with a red light that never goes out again"
    texts = [long, f"{long} please", f"hello {long}", "something else entirely that nobody else has ever said about any printer at all"]
    section = msgspec.structs.replace(
        SECTION, near_duplicates=NearDuplicates(words=3, bands=28, rows=4, similarity=0.6), split=Split(validation=0)
    )
    one = raw({"a.jsonl": jsonl(*map(row, texts))}).records(section)
    other = raw({"a.jsonl": jsonl(*map(row, reversed(texts)))}).records(section)
    assert (one.sources[0].near_duplicates, one.sources[0].kept) == (2, 2)
    kept = [sorted(record.id for record in lines.read(store, [leaf.blob for leaf in made.leaves])) for made in (one, other)]
    assert kept[0] == kept[1]
    assert one.clusters == other.clusters
    (cluster,) = (msgspec.json.decode(line) for line in store.get_bytes(one.clusters.sha256).splitlines())
    assert cluster["kept"] in kept[0]
    assert len(cluster["dropped"]) == 2
    aside = next(records.asides(store, one))
    assert (aside.reason, aside.detail.startswith("nearly the same text as a.jsonl:")) == ("near_duplicate", True)


@pytest.mark.parametrize("action", ["flag", "mask", "drop"])
def test_personal_data_is_counted_and_treated_as_the_recipe_says_and_never_written_down(
    raw: MakeRaw, store: FolderStore, action: str
) -> None:
    address = "jane.doe@example.org"
    made = raw({"a.jsonl": jsonl(row(f"write to {address} today"), row("nothing here"))})
    result, seen = made.both(SECTION, personal=action)
    texts = [message.content for record in lines.read(store, [leaf.blob for leaf in result.leaves]) for message in record.messages]
    listed = [msgspec.json.decode(line) for line in store.get_bytes(result.flagged.sha256).splitlines()]
    beside = b"".join(store.get_bytes(blob.sha256) for blob in (result.quarantine, result.flagged, result.clusters))
    assert address.encode() not in beside + canonical(result) + canonical(seen)
    if action == "drop":
        assert (result.reasons, len(texts), listed) == ({"sensitive": 1}, 2, [])
    else:
        assert result.sensitive == {"personal.email": 1}
        assert [flag["kinds"] for flag in listed] == [{"personal.email": 1}]
        assert (address in " ".join(texts)) == (action == "flag")
        assert ("[personal:email]" in " ".join(texts)) == (action == "mask")


def test_augmented_copies_stand_beside_training_records_only_and_are_rebuilt_from_raw(
    raw: MakeRaw, store: FolderStore, base_model: BaseModel
) -> None:
    made = raw({"a.jsonl": jsonl(*[row(f"Please Refund ORDER Number {n}") for n in range(80)])})
    section = msgspec.structs.replace(SECTION, augment=(Augmentation("lowercase", share=0.5),), split=Split(validation=0.3))
    result = made.records(section)
    copies = [record for record in lines.read(store, [leaf.blob for leaf in result.leaves]) if "augmented" in record.slices]
    assert 10 < len(copies) == result.sources[0].augmented < 40
    assert all(record.messages[0].content.startswith("please refund order") for record in copies)
    held_out = {record.id for leaf in result.leaves if leaf.split == "validation" for record in lines.read(store, [leaf.blob])}
    assert held_out.isdisjoint(record.id for record in copies)
    assert result.sources[0].read == result.sources[0].kept == 80
    shards, observed = sharding.build(result, base_model, ShardingSection(), store)
    expected = {
        name: bytes(token)
        for _entry, leaf in sharding.stored_leaves(shards, observed, store)
        for name, token in zip(leaf.records, leaf.token, strict=True)
    }
    codec = load(store, base_model)
    rebuilt, differences = reproduction.reproduce(
        expected, expected, made.snapshot, made.open, result, codec, section, ShardingSection(), store
    )
    assert (rebuilt.drawn, rebuilt.equal, differences) == (80 + len(copies), 80 + len(copies), [])


def test_copies_go_with_an_original_that_goes(raw: MakeRaw) -> None:
    section = msgspec.structs.replace(
        SECTION,
        augment=(Augmentation("lowercase", share=1.0),),
        sources=(msgspec.structs.replace(CHAT, quota=7),),
        split=Split(validation=0),
    )
    result = raw({"a.jsonl": jsonl(*[row(f"Question {n}") for n in range(30)])}).records(section)
    assert (result.sources[0].kept, result.sources[0].augmented, result.splits["train"]) == (7, 7, 14)


def test_sources_carry_their_licence_and_date(raw: MakeRaw) -> None:
    source = Source(match="**", shape="messages", license="CC-BY-4.0", date="2026-10-01")
    result = raw({"a.jsonl": jsonl(row("x"))}).records(source)
    assert (result.sources[0].license, result.sources[0].date) == ("CC-BY-4.0", "2026-10-01")
    assert manifest.format_of("a.jsonl") == "jsonl"


def test_the_text_of_unchanged_rows_comes_from_the_leaves_and_not_from_the_raw_file_again(
    raw: MakeRaw, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = questions("a", 200)
    before = raw({"a.jsonl": jsonl(*rows)}).both(SECTION)
    rows[77] = row("another one")
    now = raw({"a.jsonl": jsonl(*rows)})
    opened: list[str] = []
    whole = Raw.open
    monkeypatch.setattr(Raw, "open", lambda self, file: opened.append(file.path) or whole(self, file))
    made, observed = now.both(SECTION, previous=before)
    assert opened == ["a.jsonl"]
    assert 0 < observed.leaves_new < observed.leaves_known
    assert made == raw({"a.jsonl": jsonl(*rows)}).records(SECTION)


def test_no_thread_is_left_of_a_file_that_was_read_or_refused(raw: Callable[[Mapping[str, bytes]], Raw]) -> None:
    """Each file is hashed by a thread of its own; a snapshot may have ten thousand of them."""
    made = raw({f"{name}.jsonl": jsonl(row(f"question {name}")) for name in range(12)})
    before = threading.active_count()
    made.records()
    made.files["3.jsonl"] += b" "
    with pytest.raises(SourceError, match="changed after it was hashed"):
        made.records()
    assert threading.active_count() == before
