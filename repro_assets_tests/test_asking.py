"""The questions about the data through the real commands: diff, tiny-run, blame, checkout, on three snapshots of one graph.

What is found is asserted against the documents; the pure parts have their tests under data/.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import pytest

from repro_assets import checkout, inspecting, tiny
from repro_assets.data import leaves, lines, open_shards
from repro_assets.documents import Document
from repro_assets.terminal import FINDING, GOOD, UNREACHABLE, WRONG_USE
from repro_assets.trust.blob import BlobStore
from repro_assets.trust.canonical import sha256
from repro_assets_tests.graph import Graph, jsonl, tickets
from repro_assets_tests.world import DATA, SIGNED, Prepared, prepared, repro
from resources.settings import Connections

TRAINED = (*SIGNED, "qlora_checkpoint")


def said(user: str, answer: str = "route: billing | priority: low") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]}


def id_of(row: dict[str, Any]) -> str:
    return lines.identity(tuple(lines.Message(content=item["content"], role=item["role"]) for item in row["messages"])).hex()


def twins() -> list[dict[str, Any]]:
    """Two rows whose record ids begin with the same four digits."""
    known: dict[str, dict[str, Any]] = {}
    for number in range(10_000):
        row = {"id": f"twin{number}", **said(f"twin {number}"), "intent": "delivery"}
        if (other := known.setdefault(id_of(row)[:4], row)) is not row:
            return [other, row]
    raise AssertionError("no two ids with the same beginning")


EDITED = {"id": "t0007", **said("ticket 7: the invoice number 50 is lost"), "intent": "invoice"}
KNOWN = {"id": "known", **said("item 3: where is my parcel"), "intent": "delivery"}


@dataclass(frozen=True)
class World:
    """`first`: 60 tickets in one file, trained. `second`: one ticket edited, one removed; a second file, in which the last two rows are no
    record and an evaluation item. `third`: a third file, with twins."""

    prepared: Prepared
    first: str
    second: str
    third: str
    known: dict[tuple[str, str], Document[Any, Any]] = field(default_factory=dict)

    @property
    def graph(self) -> Graph:
        return self.prepared.graph

    @cached_property
    def store(self) -> BlobStore:
        return self.graph.bench().blobs.store

    def document(self, key: str, asset: str) -> Document[Any, Any]:
        if (key, asset) not in self.known:
            self.known[key, asset] = self.graph.document(key, asset)
        return self.known[key, asset]

    def records(self, key: str) -> dict[str, lines.Record]:
        """User key to record."""
        store, result = self.store, self.document(key, "records").result
        return {str(record.key): record for record in lines.read(store, [leaf.blob for leaf in result.leaves])}


@pytest.fixture(scope="module")
def world(servers: Connections, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with prepared(servers, tmp_path_factory.mktemp("asking"), TRAINED) as made:
        graph = made.graph
        rows = tickets(60)
        rows[7] = EDITED
        del rows[20]
        second = graph.import_({"a.jsonl": jsonl(rows), "b.jsonl": jsonl([*tickets(20, 200), {"id": "bad"}, KNOWN])})
        third = graph.import_({"c.jsonl": jsonl(twins())})
        for key in (second, third):
            ran = graph.run(key, DATA, made.recipe)
            assert ran.success, ran.failure
        yield World(made, made.key, second, third)


# ---- diff


def test_a_diff_names_files_records_and_slices_and_reads_only_leaves_that_differ(world: World) -> None:
    """S0.48, S0.49, S2.7, S2.19."""
    answer = repro("diff", world.first, world.second, "--json")
    assert answer.code == FINDING
    found = answer.json
    before, now = world.records(world.first), world.records(world.second)
    assert found["files"] == {"added": ["tickets/b.jsonl"], "removed": [], "changed": ["tickets/a.jsonl"]}
    assert found["edits"] == [{"name": "t0007", "before": before["t0007"].id, "now": id_of(EDITED)}]
    assert found["records"]["changed"] == ["t0007"]
    assert found["records"]["removed"] == [before["t0020"].id]
    assert found["records"]["added"] == sorted(now[key].id for key in now.keys() - before.keys())
    assert found["slices"] == {"intent": {"delivery": [30, 39], "invoice": [30, 40]}}
    assert found["same"] is False
    table = repro("diff", world.first, world.second, "--limit", "3")
    assert "t0007" in table.out
    assert "more; --limit 0 shows all" in table.out


def test_a_snapshot_does_not_differ_from_itself(world: World) -> None:
    answer = repro("diff", world.first, world.first, "--json")
    assert answer.code == GOOD
    assert answer.json["same"] is True


@pytest.mark.parametrize("called", ["t0007", id_of(EDITED)[:12]])
def test_a_changed_record_is_shown_token_by_token(world: World, called: str) -> None:
    before = world.records(world.first)["t0007"]
    view = repro("diff", world.first, world.second, "--record", called, "--json").json["record"]
    texts = {kind: ["".join(piece["texts"]) for piece in view["pieces"] if piece["kind"] == kind] for kind in ("same", "removed", "added")}
    assert "".join(texts["removed"]).replace(" ", "") == "49wrong"
    assert "".join(texts["added"]).replace(" ", "") == "50lost"
    assert (
        "".join("".join(piece["texts"]) for piece in view["pieces"] if piece["kind"] != "removed").count(EDITED["messages"][0]["content"])
        == 1
    )
    for side, key, record in (("before", world.first, before.id), ("now", world.second, id_of(EDITED))):
        assert view[side]["id"] == record
        kinds = ("same", "removed" if side == "before" else "added")
        ids = [token for piece in view["pieces"] if piece["kind"] in kinds for token in piece["ids"]]
        shards, store = world.document(key, "shards"), world.store
        stored = [
            leaf.ids[leaf.records.index(record)].tolist()
            for entry in shards.result.leaves
            for leaf in [leaves.load(store.get_bytes(shards.observed.stored[entry.sha256].sha256), entry.sha256)]
            if record in leaf.records
        ]
        assert stored == [ids]


def test_the_table_of_a_changed_record_has_both_sides_in_one_row(world: World) -> None:
    shown = repro("diff", world.first, world.second, "--record", "t0007").out
    assert any('"4|9"' in line and '"5|0"' in line for line in shown.splitlines()), shown


def test_an_added_record_has_one_side(world: World) -> None:
    added = world.records(world.second)["t0200"].id
    view = repro("diff", world.first, world.second, "--record", added, "--json").json["record"]
    assert view["before"] is None
    assert view["now"]["tokens"] == view["added_tokens"] > 0
    assert {piece["kind"] for piece in view["pieces"]} == {"added"}


def test_a_record_that_does_not_differ_is_wrong_use(world: World) -> None:
    answer = repro("diff", world.first, world.second, "--record", "t0008", "--json")
    assert answer.code == WRONG_USE
    assert "no record that differs is called 't0008'; did you mean 't0007'?" in answer.json["error"]


def test_a_snapshot_without_records_names_the_command_that_makes_them(world: World) -> None:
    other = world.graph.recipe("never-used")
    answer = repro("diff", world.first, world.second, "--recipe", other, "--json")
    assert answer.code == WRONG_USE
    assert f"repro materialize --snapshot {world.first}" in answer.json["error"]


# ---- why


def test_why_names_hardware_and_lock_where_they_count(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    assert repro("why", "qlora_checkpoint", "-s", world.first).code == GOOD
    was = world.document(world.first, "qlora_checkpoint").made.components["hardware"]
    monkeypatch.setattr(inspecting, "hardware_class", lambda: "another machine")
    monkeypatch.setattr(inspecting, "lock_bytes", lambda: b"another lock")
    differs = repro("why", "qlora_checkpoint", "-s", world.first, "--json").json["differs"]
    assert differs[0] == f"qlora_checkpoint: hardware {was} -> another machine"
    assert differs[1].startswith("qlora_checkpoint: lock ")
    assert len(differs) == 2


def test_why_says_that_an_older_version_of_the_project_wrote_the_document(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from repro_assets.documents import Records

    monkeypatch.setattr(Records, "schema", Records.schema + 1)
    answer = repro("why", "records", "-s", world.first, "--json")
    assert answer.code == FINDING
    assert (
        f"field `schema` is {Records.schema - 1}, this version writes {Records.schema}. Materialize records again" in answer.json["error"]
    )


# ---- tiny run


def test_the_tiny_run_gives_the_golden_again(world: World) -> None:
    """S0.45, S0.47: first N examples, whole pipeline, checksums compared."""
    answer = repro("tiny-run", "-s", world.first, "-n", "16", "--json")
    assert answer.code == GOOD
    found = answer.json
    assert (found["verdict"], found["records"], found["environment"], found["first"]) == ("same", 16, [], None)
    shards, store = world.document(world.first, "shards"), world.store
    parts = [
        bytes.fromhex(record) + bytes(token)
        for entry in shards.result.leaves
        for leaf in [leaves.load(store.get_bytes(shards.observed.stored[entry.sha256].sha256), entry.sha256)]
        for record, token in zip(leaf.records, leaf.token, strict=True)
    ]
    assert found["golden"] == found["now"] == sha256(b"".join(parts[:16]))


def shouting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cleaning step that does something else to one record."""
    from repro_assets.data import parts

    clean = parts.clean

    def other(messages: Any, section: Any) -> Any:
        cleaned, steps = clean(messages, section)
        if cleaned[0].content.startswith("ticket 5:"):
            cleaned = (msgspec.structs.replace(cleaned[0], content=cleaned[0].content.upper()), *cleaned[1:])
        return cleaned, steps

    monkeypatch.setattr(parts, "clean", other)
    monkeypatch.setattr(parts, "untouched", lambda *_how: False)


def test_a_transform_that_is_not_deterministic_is_named_with_record_and_stage(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """S0.5, S0.46."""
    shouting(monkeypatch)
    answer = repro("tiny-run", "-s", world.first, "--json")
    assert answer.code == FINDING
    found = answer.json
    assert found["verdict"] == tiny.NON_DETERMINISTIC
    assert found["golden"] != found["now"] == found["again"]
    assert found["differing"] == 1
    assert found["first"] == {
        "record": world.records(world.first)["t0005"].id,
        "where": "tickets/a.jsonl:6",
        "stage": "cleaning",
        "detail": "message 1 (user): the texts differ from character 0 on",
    }
    assert "60 records: non-deterministic transform" in repro("tiny-run", "-s", world.first).out


def test_another_environment_is_named_with_both_versions(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """S0.46: environment mismatch, in words; a difference that changes nothing is told and is no finding."""
    now = inspecting.code_of("shards")
    newer = msgspec.structs.replace(now, libraries={**now.libraries, "tokenizers": "99.0"})
    monkeypatch.setattr(tiny, "code_of", lambda asset: newer if asset == "shards" else inspecting.code_of(asset))
    differs = [f"tokenizers {now.libraries['tokenizers']} -> 99.0"]
    harmless = repro("tiny-run", "-s", world.first, "--json")
    assert (harmless.code, harmless.json["verdict"], harmless.json["environment"]) == (GOOD, "same", differs)
    shouting(monkeypatch)
    assert repro("tiny-run", "-s", world.first, "--json").json["verdict"] == tiny.ENVIRONMENT
    assert f"environment differs: {differs[0]}" in repro("tiny-run", "-s", world.first).out


def test_what_the_bundle_recorded_of_the_environment_counts(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "lock_bytes", lambda: b"another lock")
    (said,) = repro("tiny-run", "-s", world.first, "-n", "1", "--json").json["environment"]
    assert said.startswith("lock file ")
    assert said.endswith(f"-> {sha256(b'another lock')[:12]}")


# ---- blame


def test_blame_of_a_record_names_everything_that_saw_it(world: World) -> None:
    """S0.3, S0.6, S3.18: from a record to file, line, leaves, bundle, checkpoint."""
    record = world.records(world.first)["t0001"]
    found = repro("blame", record.id[:20], "--steps", "--json").json
    assert found["record"] == record.id
    assert found["first_snapshot"] == world.first
    assert [seen["snapshot"] for seen in found["seen"]] == [world.third, world.second, world.first]
    store = world.store
    for seen in found["seen"]:
        assert (seen["file"], seen["line"]) == ("tickets/a.jsonl", 2)
        assert record.id in {held.id for held in lines.decode(store.get_bytes(seen["record_leaf"]))}
        shards = world.document(seen["snapshot"], "shards")
        assert seen["token_leaf"] in {entry.sha256 for entry in shards.result.leaves if entry.source == seen["record_leaf"]}
    newest, second, first = found["seen"]
    assert first["since"] == world.document(world.first, "raw_snapshot").observed.commit
    assert newest["since"] == second["since"] == world.document(world.second, "raw_snapshot").observed.commit
    assert (newest["bundle"], newest["checkpoint"]) == (None, None)
    assert first["bundle"] == world.document(world.first, "training_bundle").digest
    trained = world.document(world.first, "qlora_checkpoint")
    checkpoint = first["checkpoint"]
    assert (checkpoint["document"], checkpoint["tensors"]) == (trained.digest, trained.result.tensors)
    saved = [item.step for item in trained.result.checkpoints]
    assert checkpoint["saved"] == [step for step in saved if any(had <= step for had in checkpoint["steps"])]
    assert found["reads"]["indices"] <= 4
    assert found["reads"]["leaves"] <= 6


def test_an_edited_record_is_blamed_on_the_snapshots_that_had_it(world: World) -> None:
    old, new = world.records(world.first)["t0007"].id, id_of(EDITED)
    assert [seen["snapshot"] for seen in repro("blame", old, "--json").json["seen"]] == [world.first]
    found = repro("blame", new, "--json").json
    assert ([seen["snapshot"] for seen in found["seen"]], found["first_snapshot"]) == ([world.third, world.second], world.second)
    assert repro("blame", "tickets/a.jsonl:8", "--json").json["record"] == new
    assert "first snapshot " + world.second in repro("blame", new).out


def test_a_row_that_was_set_aside_is_found_with_its_reason_by_id_and_by_place(world: World) -> None:
    """Nothing is dropped in silence: a contaminated row still has an id, a bad one only a place."""
    for name in (id_of(KNOWN)[:10], "tickets/b.jsonl:22"):
        found = repro("blame", name, "--json").json
        assert found["record"] is None
        assert [aside["snapshot"] for aside in found["aside"]] == [world.third, world.second]
        assert {(aside["file"], aside["line"], aside["reason"]) for aside in found["aside"]} == {("tickets/b.jsonl", 22, "contaminated")}
        assert found["first_snapshot"] == world.second
        assert found["reads"]["raw files"] == (0 if ":" in name else 1)
    (bad, _second) = repro("blame", "tickets/b.jsonl:21", "--json").json["aside"]
    assert (bad["reason"], bad["detail"]) == ("missing_field", "messages: not in the row")
    assert "set aside: contaminated" in repro("blame", "tickets/b.jsonl:22").out


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("0" * 64, "no record '0000"),
        ("tickets/a.jsonl:999", "no record 'tickets/a.jsonl:999' in 3 snapshots"),
        ("abc", "at least 4 hexadecimal digits"),
        ("no such thing", "no place in a raw file (path:line)"),
    ],
)
def test_an_unknown_record_is_wrong_use_and_says_what_else_can_be_asked(world: World, name: str, words: str) -> None:
    answer = repro("blame", name, "--json")
    assert answer.code == WRONG_USE
    assert words in answer.json["error"]


def test_a_beginning_that_several_records_have_lists_them(world: World) -> None:
    one, other = sorted(id_of(row) for row in twins())
    answer = repro("blame", one[:4], "--json")
    assert answer.code == WRONG_USE
    assert one in answer.json["error"]
    assert other in answer.json["error"]
    assert repro("blame", one[:40], "--json").json["record"] == one


# ---- checkout


def held(folder: Path) -> dict[str, str]:
    """Path to SHA-256 of every file but the manifest."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


def out(world: World, folder: Path, *options: str) -> dict[str, str]:
    """The files of a checkout of the first snapshot, which must be those of its manifest."""
    answer = repro("checkout", world.first, folder, *options, "--json")
    assert answer.code == GOOD, answer
    manifest = json.loads((folder / "manifest.json").read_text())
    assert answer.json == {**manifest, "folder": str(folder)}
    assert {file["path"]: file["sha256"] for file in manifest["files"]} == held(folder)
    assert manifest["document"] == sha256((folder / "document.json").read_bytes())
    return held(folder)


def test_raw_files_come_back_as_they_were(world: World, tmp_path: Path) -> None:
    """S0.14, S2.5, S2.20: one command gives the data set of a snapshot."""
    listed = world.document(world.first, "raw_snapshot").result.files_listed
    found = out(world, tmp_path / "new" / "raw")
    assert {path: digest for path, digest in found.items() if path != "document.json"} == {
        f"raw/{file.path}": file.sha256 for file in listed
    }
    assert (tmp_path / "new" / "raw" / "raw" / "tickets" / "a.jsonl").read_bytes() == jsonl(tickets(60))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["raw"]


def test_shards_open_from_the_folder_as_from_the_store(world: World, tmp_path: Path) -> None:
    out(world, tmp_path / "shards", "--what", "shards")
    document = world.document(world.first, "shards")
    folder = open_shards(tmp_path / "shards", document=document.digest)
    store = open_shards(world.store, document.result, document.observed.stored)
    assert folder.frame().equals(store.frame())
    assert len(folder) == document.result.records["train"]


@pytest.mark.parametrize("form", ["jsonl", "parquet", "datasets"])
@pytest.mark.parametrize("what", ["records", "shards"])
def test_every_format_holds_every_row(world: World, tmp_path: Path, what: str, form: str) -> None:
    import datasets
    import polars

    out(world, tmp_path / "data", "--what", what, "--format", form)
    expected: dict[str, list[tuple[str, Any]]] = {}
    document, store = world.document(world.first, what), world.store
    if what == "records":
        for leaf in document.result.leaves:
            for record in lines.decode(store.get_bytes(leaf.blob.sha256)):
                texts = [(message.role, message.content) for message in record.messages]
                expected.setdefault(leaf.split, []).append((record.id, texts))
    else:
        for split in document.result.records:
            shards = open_shards(store, document.result, document.observed.stored, split=split)
            expected[split] = [(record, ids.tolist()) for record, ids, _spans in map(shards.at, range(len(shards)))]
    name = "id" if what == "records" else "record"
    for split, wanted in expected.items():
        path = tmp_path / "data" / f"{split}.{form}"
        if form == "datasets":
            found = list(datasets.load_from_disk(str(tmp_path / "data" / "dataset"))[split])
        elif form == "parquet":
            found = polars.read_parquet(path).to_dicts()
        else:
            found = [json.loads(line) for line in path.read_text().splitlines()]
        assert [row[name] for row in found] == [record for record, _content in wanted]
        for row, (_record, content) in zip(found, wanted, strict=True):
            told = row["input_ids"] if what == "shards" else [(message["role"], message["content"]) for message in row["messages"]]
            assert told == content
    assert not [path for path in (tmp_path / "data").iterdir() if path.name.startswith(".")]


def test_records_and_the_adapter_come_back_as_they_are_stored(world: World, tmp_path: Path) -> None:
    found = out(world, tmp_path / "records", "--what", "records")
    named = {name: blob.sha256 for name, blob in world.document(world.first, "records").result.files().items()}
    assert found == {**named, "document.json": world.document(world.first, "records").digest}
    found = out(world, tmp_path / "adapter", "--what", "adapter")
    adapter = world.document(world.first, "qlora_checkpoint").result.adapter
    assert found == {
        **{f"adapter/{name}": blob.sha256 for name, blob in adapter.items()},
        "document.json": world.document(world.first, "qlora_checkpoint").digest,
    }
    assert any(name.endswith(".safetensors") for name in found)


def test_a_folder_in_use_and_a_format_that_is_not_there_are_wrong_use(world: World, tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("mine")
    answer = repro("checkout", world.first, tmp_path / "used", "--json")
    assert answer.code == WRONG_USE
    assert "is not empty (it holds 'mine.txt'); give a new or an empty folder" in answer.json["error"]
    assert held(tmp_path / "used") == {"mine.txt": sha256(b"mine")}
    (tmp_path / "file").write_text("x")
    assert repro("checkout", world.first, tmp_path / "file").code == WRONG_USE
    answer = repro("checkout", world.first, tmp_path / "new", "--format", "parquet", "--json")
    assert (answer.code, answer.json["error"]) == (WRONG_USE, "raw can be checked out as raw, not as parquet")
    (tmp_path / "empty").mkdir()
    assert repro("checkout", world.first, tmp_path / "empty").code == GOOD


def test_bytes_that_are_not_those_of_the_snapshot_leave_nothing_behind(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verified while written: a raw object that changed, a disk that is full half way; the folder is whole or absent."""
    from resources.lake import Lake

    true = Lake.open

    def other(self: Lake, commit: str, path: str) -> Any:
        import io

        return io.BytesIO(true(self, commit, path).read().replace(b"parcel", b"PARCEL"))

    with monkeypatch.context() as patch:
        patch.setattr(Lake, "open", other)
        answer = repro("checkout", world.first, tmp_path / "out", "--json")
    assert answer.code == FINDING
    assert "tickets/a.jsonl: the bytes read have SHA-256" in answer.json["error"]
    assert list(tmp_path.iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setattr(checkout, "_listed", lambda root: (_ for _ in ()).throw(OSError(28, "No space left on device", str(root))))
        answer = repro("checkout", world.first, tmp_path / "out", "--json")
    assert answer.code == UNREACHABLE
    assert "free some space" in answer.json["error"]
    assert list(tmp_path.iterdir()) == []
