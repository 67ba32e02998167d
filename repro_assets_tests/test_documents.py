"""Documents: two halves, one digest, strict parsing."""

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from repro_assets import documents as d
from repro_assets.trust.blob import Blob
from repro_assets.trust.canonical import canonical, sha256

HEX = st.text("0123456789abcdef", min_size=64, max_size=64)


def snapshot(digest: str = "a" * 64, seconds: float = 1.0, run: str = "r1") -> d.Document[d.RawSnapshot, d.RawObserved]:
    file = d.RawFile(path="a b/ü.jsonl", sha256=digest, size=3, format="jsonl")
    return d.Document(
        inputs={},
        section={"include": ["**"], "exclude": []},
        result=d.RawSnapshot(manifest=Blob(digest, 9), files_listed=(file,), size=3),
        observed=d.RawObserved(commit="c" * 64, first_seen={"a b/ü.jsonl": "c" * 64}, window=("", ""), seconds=seconds),
        made=d.Made(key="k", components={"asset": "raw_snapshot"}, sources={}, reused=False, run=run, at="now", host="h", actor="me"),
    )


def test_the_observed_half_does_not_move_the_digest_and_the_content_does() -> None:
    """S0.8, S0.10: what may differ between two honest runs is recorded beside what may not."""
    assert snapshot(seconds=1.0, run="r1").digest == snapshot(seconds=2.0, run="r2").digest
    assert snapshot("a" * 64).digest != snapshot("b" * 64).digest


def test_the_digest_is_the_sha256_of_the_file_that_holds_the_content() -> None:
    document = snapshot()
    assert document.digest == sha256(document.content())
    assert document.content() == canonical(msgspec.json.decode(document.content()))


@given(digest=HEX, seconds=st.floats(0, 1e6))
def test_what_is_written_is_read_back_as_it_was(digest: str, seconds: float) -> None:
    document = snapshot(digest, seconds)
    assert d.parse(d.RawSnapshot, d.RawObserved, document.content(), document.beside()) == document


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda raw: raw["result"].update(surplus=1), "surplus"),
        (lambda raw: raw["result"].update(size="3"), r"Expected `int`, got `str` - at `\$\.size`"),
        (lambda raw: raw["result"].pop("manifest"), "manifest"),
        (lambda raw: raw["result"]["manifest"].update(sha256="xyz"), "not a lower-case hexadecimal SHA-256"),
        (lambda raw: raw.update(schema=99), "newer version of this project"),
        (lambda raw: raw.update(schema=0), "this version writes 1"),
        (lambda raw: raw.update(asset="records"), "document of 'records'"),
        (lambda raw: raw.update(more=1), "has the fields asset, inputs, result, schema, section"),
    ],
)
def test_a_document_that_is_not_as_expected_is_refused_and_the_field_named(change, words: str) -> None:  # type: ignore[no-untyped-def]
    """S0.7: schemas are versioned, and an unknown one is an error, not a guess."""
    document = snapshot()
    raw = msgspec.json.decode(document.content())
    change(raw)
    with pytest.raises(d.DocumentError, match=words) as caught:
        d.parse(d.RawSnapshot, d.RawObserved, canonical(raw), document.beside())
    assert str(caught.value).startswith("raw_snapshot:")


def test_bytes_that_are_no_json_are_refused_with_the_asset_and_the_remedy() -> None:
    with pytest.raises(d.DocumentError, match="raw_snapshot: document.json is not JSON.*materialize raw_snapshot again"):
        d.parse(d.RawSnapshot, d.RawObserved, b"{", snapshot().beside())


def test_the_two_halves_may_not_name_one_file_twice() -> None:
    class Both(d.RawObserved):
        def files(self) -> dict[str, Blob]:
            return {"manifest.json": Blob("b" * 64, 1)}

    seen = snapshot().observed
    both = Both(commit=seen.commit, first_seen={}, window=("", ""), seconds=0.0)
    document = msgspec.structs.replace(snapshot(), observed=both)
    with pytest.raises(d.DocumentError, match="named by both halves"):
        document.files()


def test_every_asset_of_the_graph_has_a_document_type_and_a_story() -> None:
    from repro_assets import assets, story
    from repro_assets.stage import SECTIONS

    names = [asset.key.to_user_string() for asset in assets.graph]
    assert list(d.KINDS) == names == list(SECTIONS) == list(story.TELLERS)


def test_a_document_type_change_without_a_schema_change_is_noticed() -> None:
    """The fields of every result type, held here: change them together with `schema`, or old documents are misread."""
    said = {
        asset: [kind.schema, sorted(field.name for field in msgspec.structs.fields(kind))] for asset, (kind, _observed) in d.KINDS.items()
    }
    assert said == msgspec.json.decode((Path(__file__).parent / "snapshots" / "documents.json").read_bytes())
