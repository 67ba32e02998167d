"""Shards opened elsewhere: the same ids and labels as the leaves, in torch and in polars, and nothing unverified."""

import pickle
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from repro_assets import data
from repro_assets.data import loading, sharding
from repro_assets.data.errors import LeafError
from repro_assets.data.loading import IGNORED, OpenShards, open_shards
from repro_assets.documents import BaseModel, Document, Made, Shards, ShardsObserved
from repro_assets.recipe import RecordsSection, ShardingSection, Split
from repro_assets.trust.blob import BlobDamaged, FolderStore
from repro_assets_tests.data.material import CHAT, Raw, jsonl, row

Made_ = tuple[Shards, ShardsObserved]


@pytest.fixture
def made(store: FolderStore, base_model: BaseModel) -> Made_:
    raw = Raw({"a.jsonl": jsonl(*(row(f"question number {n}", f"answer {n}", key=f"k{n}") for n in range(60)))}, store)
    records = raw.records(RecordsSection(sources=(CHAT,), split=Split(validation=0.2)), target=8)
    return sharding.build(records, base_model, ShardingSection(), store)


def opened(made: Made_, store: FolderStore, split: str | None = "train") -> OpenShards:
    return open_shards(store, made[0], made[1].stored, split=split)


def test_every_record_of_the_split_comes_with_its_ids_and_labels_in_order(made: Made_, store: FolderStore) -> None:
    import torch

    expected = [
        (name, ids.tolist(), spans.tolist())
        for entry, leaf in sharding.stored_leaves(*made, store)
        if entry.split == "train"
        for name, ids, spans in zip(leaf.records, leaf.ids, leaf.spans, strict=True)
    ]
    dataset = opened(made, store)
    assert len(dataset) == len(expected) == made[0].records["train"]
    for index, (name, ids, spans) in enumerate(expected):
        item = dataset[index]
        assert item["record"] == name
        assert item["input_ids"].dtype == item["labels"].dtype == torch.int64
        assert item["input_ids"].tolist() == ids
        inside = {position for start, end in spans for position in range(start, end)}
        assert inside
        assert item["labels"].tolist() == [token if at in inside else IGNORED for at, token in enumerate(ids)]
    assert dataset[-1]["record"] == expected[-1][0]
    with pytest.raises(IndexError, match=f"record {len(expected)} of {len(expected)}"):
        dataset[len(expected)]


def test_a_data_loader_reads_the_same_from_a_pickled_copy(made: Made_, store: FolderStore) -> None:
    from torch.utils.data import DataLoader

    dataset = opened(made, store)
    dataset[3]
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy._held == {}
    rows = [item[0] for item in DataLoader(copy, collate_fn=list, batch_size=1)]  # type: ignore[arg-type]
    assert [item["record"] for item in rows] == [dataset[index]["record"] for index in range(len(dataset))]


def test_only_a_few_leaves_stay_in_memory(made: Made_, store: FolderStore) -> None:
    dataset = OpenShards(made[0].leaves, opened(made, store)._source, held=2)
    for index in range(len(dataset)):
        dataset.at(index)
    assert len(dataset._held) == 2


def test_the_frame_has_a_row_for_every_record_and_the_same_labels(made: Made_, store: FolderStore) -> None:
    dataset = opened(made, store, split=None)
    frame = dataset.frame()
    assert frame.columns == ["record", "split", "key", "slices", "tokens", "trained", "cut", "input_ids", "labels"]
    assert frame["split"].value_counts().sort("split").rows() == sorted(made[0].records.items())
    assert frame["trained"].sum() == sum(made[0].trained.values())
    assert frame["tokens"].sum() == sum(made[0].tokens.values())
    for index, values in enumerate(frame.iter_rows(named=True)):
        record, ids, spans = dataset.at(index)
        assert values["record"] == record
        assert values["input_ids"] == ids.tolist()
        assert values["labels"] == loading.labels(ids, spans).tolist()
        assert msgspec.json.decode(values["slices"]) == {"intent": "refund"}
        assert values["key"].startswith("k")


def checked_out(made: Made_, store: FolderStore, root: Path) -> Document[Shards, ShardsObserved]:
    document = Document(inputs={}, section={}, result=made[0], observed=made[1], made=Made("", {}, {}, False, "", "", "", ""))
    (root / "leaves").mkdir(parents=True)
    (root / "document.json").write_bytes(document.content())
    for identity, blob in made[1].stored.items():
        store.get_file(blob.sha256, root / "leaves" / f"{identity}.arrow")
    return document


def test_a_folder_gives_what_the_store_gives(made: Made_, store: FolderStore, tmp_path: Path) -> None:
    document = checked_out(made, store, tmp_path / "out")
    folder = data.open_shards(tmp_path / "out", document=document.digest)
    assert folder.frame().equals(opened(made, store).frame())


def test_a_changed_leaf_is_refused_when_it_is_read_and_names_the_leaf(made: Made_, store: FolderStore, tmp_path: Path) -> None:
    """Another leaf's bytes, a flipped byte, a lost file: each is told, none is returned."""
    checked_out(made, store, tmp_path / "out")
    names = [entry.sha256 for entry in made[0].leaves if entry.split == "train"]
    first, other = (tmp_path / "out" / "leaves" / f"{name}.arrow" for name in names[:2])
    kept = first.read_bytes()
    first.write_bytes(other.read_bytes())
    with pytest.raises(LeafError, match=f"token leaf {names[0]}: the stored bytes hold the leaf {names[1]}"):
        open_shards(tmp_path / "out")[0]
    flipped = bytearray(kept)
    flipped[len(flipped) // 2] ^= 1
    first.write_bytes(bytes(flipped))
    with pytest.raises(LeafError, match=names[0]):
        open_shards(tmp_path / "out")[0]
    first.unlink()
    with pytest.raises(LeafError, match=f"{names[0]} is not there; check the shards out again"):
        open_shards(tmp_path / "out")[0]


def test_a_damaged_blob_of_a_store_is_refused(made: Made_, store: FolderStore) -> None:
    path = store._path(made[1].stored[made[0].leaves[0].sha256].sha256)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(BlobDamaged):
        opened(made, store).at(0)


def test_wrong_folders_documents_and_splits_are_told(made: Made_, store: FolderStore, tmp_path: Path) -> None:
    with pytest.raises(LeafError, match="no checkout of shards"):
        open_shards(tmp_path)
    checked_out(made, store, tmp_path / "out")
    with pytest.raises(LeafError, match=f"not {'0' * 64}; check out the snapshot that you mean"):
        open_shards(tmp_path / "out", document="0" * 64)
    with pytest.raises(LeafError, match="no split 'test'; there are: train, validation"):
        open_shards(tmp_path / "out", split="test")
    with pytest.raises(TypeError, match="also needs the shards' document"):
        open_shards(store)


def test_the_loader_is_no_part_of_the_code_that_data_assets_are_made_from() -> None:
    from repro_assets.trust.closure import closure

    assert "repro_assets.data.loading" not in closure("repro_assets.data.sharding").sources
    assert data.open_shards is open_shards
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        data.nothing  # noqa: B018  the access is what is tested


def test_opening_shards_imports_no_torch() -> None:
    code = "import sys\nfrom repro_assets.data import open_shards\nprint('torch' in sys.modules, 'polars' in sys.modules, 'dagster' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False", "False"]


def test_labels_leave_out_what_is_not_in_a_span() -> None:
    ids = np.array([5, 6, 7, 8, 9], np.uint16)
    assert loading.labels(ids, np.array([[1, 2], [3, 5]], np.uint32)).tolist() == [IGNORED, 6, IGNORED, 8, 9]
