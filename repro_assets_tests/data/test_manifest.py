"""Raw files selected by pattern, their formats, and the manifest as the snapshot's content identity."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repro_assets.data import manifest
from repro_assets.data.errors import SnapshotError
from repro_assets.documents import RawFile
from repro_assets.recipe import RawSection
from repro_assets.trust.blob import FolderStore
from repro_assets.trust.canonical import sha256
from repro_assets_tests.data.material import Raw

PATHS = ["a.jsonl", "x/b.jsonl", "x/y/c.parquet", "x/y/notes.txt", "über/d e.jsonl"]


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (("**",), (), PATHS),
        (("*.jsonl",), (), ["a.jsonl"]),
        (("**/*.jsonl",), (), ["a.jsonl", "x/b.jsonl", "über/d e.jsonl"]),
        (("x/**",), ("**/*.txt",), ["x/b.jsonl", "x/y/c.parquet"]),
        (("x/*/?.parquet",), (), ["x/y/c.parquet"]),
        (("[ab].jsonl", "x/[!a].jsonl"), (), ["a.jsonl", "x/b.jsonl"]),
        (("x/**/c.*",), (), ["x/y/c.parquet"]),
        (("A.jsonl", "a.json"), (), []),
    ],
)
def test_patterns_select_paths_in_bytewise_order(include: tuple[str, ...], exclude: tuple[str, ...], expected: list[str]) -> None:
    assert manifest.selected(reversed(PATHS), RawSection(include=include, exclude=exclude)) == expected


def test_a_bracket_or_backslash_in_a_pattern_is_no_regular_expression() -> None:
    assert manifest.matches("a+b(1).jsonl", "a+b(1).jsonl")
    assert manifest.matches("a[1.jsonl", "a[1.jsonl")
    assert not manifest.matches("aab1.jsonl", "a+b(1).jsonl")
    assert not manifest.matches("x/y", "x[/]y")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a.jsonl", "jsonl"),
        ("x/B.NDJSON", "jsonl"),
        ("p.parquet", "parquet"),
        ("a.jsonl.gz", "jsonl.gz"),
        ("x/b.CSV.Zst", "csv.zst"),
        ("c.tsv", "tsv"),
        ("d.json.zst", "json.zst"),
        ("e.f.txt", "txt"),
        ("p.parquet.gz", "other"),
        ("logs.gz", "other"),
        ("x.tar.gz", "other"),
        ("x.jsonl.zip", "other"),
        ("a.jsonl.bz2", "other"),
        ("a.jsonl.dvc", "other"),
        ("README", "other"),
        ("x.jsonl/y", "other"),
    ],
)
def test_the_format_follows_the_last_suffix(path: str, expected: str) -> None:
    assert manifest.format_of(path) == expected


@given(st.permutations(PATHS))
def test_the_manifest_does_not_depend_on_the_order_of_upload(tmp_path_factory: pytest.TempPathFactory, order: list[str]) -> None:
    """S0.15, S0.17: path to SHA-256 and size, in one order whatever came first."""
    store = FolderStore(tmp_path_factory.getbasetemp() / "manifests")
    files = [RawFile(path, sha256(path.encode()), len(path), manifest.format_of(path)) for path in order]
    snapshot = manifest.build(files, store)
    expected = [{"path": path, "sha256": sha256(path.encode()), "size": len(path)} for path in sorted(PATHS, key=str.encode)]
    assert json.loads(store.get_bytes(snapshot.manifest.sha256)) == expected
    assert snapshot.manifest.sha256 == sha256(json.dumps(expected, separators=(",", ":"), ensure_ascii=False).encode())
    assert snapshot.size == sum(map(len, PATHS))


def test_an_empty_snapshot_is_refused_with_the_patterns_that_selected_nothing(store: FolderStore) -> None:
    with pytest.raises(SnapshotError, match=r"no raw file matches include \['data/\*\*'\] without exclude \['\*\*/x'\].*repro import"):
        manifest.build([], store, RawSection(include=("data/**",), exclude=("**/x",)))


def test_a_path_that_comes_twice_is_refused_by_name(store: FolderStore) -> None:
    file = RawFile("a.jsonl", sha256(b"1"), 1, "jsonl")
    with pytest.raises(SnapshotError, match=r"a\.jsonl: listed twice"):
        manifest.build([file, file], store)


def test_one_changed_byte_changes_the_manifest(store: FolderStore) -> None:
    """S0.18: the manifest's digest is the content identity of the snapshot."""
    one, other = Raw({"a.jsonl": b"1"}, store).snapshot, Raw({"a.jsonl": b"2"}, store).snapshot
    assert one.manifest != other.manifest
    assert one == Raw({"a.jsonl": b"1"}, store).snapshot


def test_a_format_falls_into_its_base_and_its_compression() -> None:
    assert [manifest.parts(format) for format in ("jsonl", "csv.zst", "other")] == [("jsonl", ""), ("csv", "zst"), ("other", "")]


@pytest.mark.parametrize(
    ("path", "remedy"),
    [
        ("x/a.zip", "an archive.*unpack it"),
        ("a.tar", "an archive"),
        ("a.TGZ", "an archive"),
        ("a.tar.gz", "an archive"),
        ("a.7z", "an archive"),
        ("a.rar", "an archive"),
        ("a.jsonl.bz2", "decompress it, or compress it as"),
        ("a.csv.xz", "decompress it"),
        ("a.jsonl.dvc", "dvc pull"),
        ("t/_delta_log/00000000000000000001.json", "repro import --delta"),
        ("t/metadata/00001-4e.metadata.json", "repro import --iceberg"),
    ],
)
def test_a_name_that_is_no_data_has_its_remedy(path: str, remedy: str) -> None:
    assert re.search(remedy, manifest.remedy_for(path) or "")
    assert manifest.remedy_for("x/a.jsonl.gz") is None
    assert manifest.remedy_for("x/a.metadata.json") is None


def test_the_window_of_a_table_is_in_no_manifest() -> None:
    assert manifest.selected(["t/a.parquet", "t/_window.json", "_window.json"], RawSection()) == ["t/a.parquet"]
