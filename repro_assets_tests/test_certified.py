"""Certificates of a snapshot as `repro verify` sees them: a genuine one holds, every way to tamper with one is a finding that names it.

The certificates here are signed over the documents of a snapshot that was not trained; those of real reproductions are in `test_whole.py`.
"""

import base64
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from repro_assets.certified import ENVELOPE, ENVIRONMENT, FOLDER, SUBJECT
from repro_assets.terminal import FINDING, GOOD
from repro_assets.trust.blob import Blob
from repro_assets.trust.certificates import Difference, Part, certificate, part
from repro_assets.trust.signing import sign
from repro_assets_tests.graph import RECIPE, jsonl, tickets
from repro_assets_tests.world import SIGNED, Prepared, prepared, repro
from resources.settings import Connections


@pytest.fixture(scope="module")
def made(servers: Connections, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prepared]:
    with prepared(servers, tmp_path_factory.mktemp("certified"), SIGNED) as found:
        yield found


def digests(made: Prepared, key: str = "") -> dict[str, str]:
    return {f"{SUBJECT}{asset}": made.graph.document(key or made.key, asset).digest for asset in SIGNED}


def certified(made: Prepared, parts: list[Part] | None = None, *, role: Any = "builder", **changes: Any) -> bytes:
    """A certificate as `reproduce` signs it, with what is changed about it before it is signed."""
    bench = made.graph.bench()
    same = {"raw_snapshot/manifest.json": "1" * 64}
    statement = certificate(
        changes.get("subjects") or digests(made),
        parts or [part("data", same, same)],
        original=changes.get("original") or made.graph.document(made.key, "training_bundle").result.statement.sha256,
        verifier="urn:test",
        certified=datetime.now(UTC),
        environment=bench.blobs.store.put_bytes(b"{}").sha256,
    )
    statement["predicate"] |= changes.get("predicate", {})
    return sign(statement, bench.signing.signer(role))


def found(made: Prepared, data: bytes, *, name: str = "", files: dict[str, Blob | None] | None = None) -> tuple[int, str, str]:
    """(exit code of `repro verify`, what it calls the certificate, what it says of it) while `data` lies there as one."""
    bench = made.graph.bench()
    lake, store = bench.lake.client, bench.blobs.store
    envelope = store.put_bytes(data)
    place = f"snapshots/{made.key}/small/{FOLDER}"
    lies: dict[str, Blob | None] = {ENVELOPE: envelope, ENVIRONMENT: store.put_bytes(b"{}"), **(files or {})}
    there = {f"{name or envelope.sha256[:12]}/{file}": blob for file, blob in lies.items() if blob}
    lake.write(f"snapshot-{made.key}", place, there, message="planted", metadata={})
    try:
        answer = repro("verify", "-s", made.key, "--json")
    finally:
        lake.write(f"snapshot-{made.key}", place, {}, message="gone again", metadata={})
    (finding,) = [item for item in answer.json["findings"] if item["what"].startswith(FOLDER)]
    assert [item["what"] for item in answer.json["findings"] if not item["good"]] == [finding["what"]] * (not finding["good"])
    return answer.code, finding["what"], finding["seen"]


def test_a_genuine_certificate_holds_and_says_its_grade(made: Prepared) -> None:
    """S0.45: proof that lies with the snapshot is checked with it."""
    data = certified(made)
    code, what, said = found(made, data)
    assert (code, said) == (GOOD, "grade R1: data bit-equal on re-execution; signed for 5 documents")
    assert what == f"certificates/{made.graph.bench().blobs.store.put_bytes(data).sha256[:12]}/certificate.dsse.json"


def test_a_genuine_certificate_of_a_failed_reproduction_holds_and_says_so(made: Prepared) -> None:
    code, _what, said = found(made, certified(made, [part("data", {"a": "1" * 64}, {"a": "2" * 64})]))
    assert (code, said) == (GOOD, "grade none: the re-execution differs; signed for 5 documents")


def test_a_certificate_of_documents_that_changed_since_holds_for_what_they_were(made: Prepared) -> None:
    """Making an asset again does not make an honest certificate false."""
    data = certified(made)
    changed = made.graph.recipe("other", RECIPE.replace("{name}", "small"), quarantine=0.07)
    assert made.graph.run(made.key, SIGNED, changed).success
    made.graph.monkeypatch.setenv("REPRO_RECIPE", str(changed))
    try:
        code, _what, said = found(made, data)
    finally:
        made.graph.monkeypatch.setenv("REPRO_RECIPE", str(made.recipe))
        assert made.graph.run(made.key, SIGNED, made.recipe).success
    assert code == GOOD
    assert said.endswith("signed for 5 documents; records, shards, training_bundle, validation_report changed since")


def payload_changed(data: bytes, old: bytes, new: bytes) -> bytes:
    envelope = msgspec.json.decode(data)
    payload = base64.b64decode(envelope["payload"])
    assert old in payload
    return msgspec.json.encode({**envelope, "payload": base64.b64encode(payload.replace(old, new)).decode()})


def test_a_changed_payload_is_found(made: Prepared) -> None:
    """The planted tamper: a failed reproduction made to say R4."""
    failed = certified(made, [part("data", {"a": "1" * 64}, {"a": "2" * 64})])
    code, what, said = found(made, payload_changed(failed, b'"grade":"none"', b'"grade":"R4"'))
    assert code == FINDING
    assert what.endswith("/certificate.dsse.json")
    assert "the payload or the signature was changed after signing" in said
    assert "`repro reproduce` writes another" in said


def test_a_signed_claim_that_its_own_comparison_does_not_earn_is_found(made: Prepared) -> None:
    one = [Difference("a", "1" * 64, "2" * 64)]
    for parts, claim in (([Part("data", 1, tuple(one))], "R1"), ([Part("data", 1, ())], "R3"), ([Part("data", 0, ())], "R1")):
        code, _what, said = found(made, certified(made, parts, predicate={"grade": claim}))
        assert code == FINDING
        assert f"it claims grade {claim}, what it compared earns" in said


def test_a_key_without_the_role_is_found(made: Prepared) -> None:
    code, _what, said = found(made, certified(made, role="approver"))
    assert code == FINDING
    assert said.startswith("role: key ")


def test_a_certificate_of_another_snapshot_is_found(made: Prepared) -> None:
    """Genuine, signed, about documents that exist: only not of this snapshot."""
    other = made.graph.import_({"other.jsonl": jsonl(tickets(20, 700))})
    assert made.graph.run(other, SIGNED, made.recipe).success
    code, _what, said = found(made, certified(made, subjects=digests(made, other)))
    assert code == FINDING
    assert "which was never a document of this snapshot: it belongs elsewhere" in said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"subjects": {"documents/records": "a" * 64}}, "blob " + "a" * 64),
        ({"subjects": {"documents/base_model": "a" * 64}}, "which are no documents of a snapshot"),
        ({"subjects": {"records": "a" * 64}}, "which are no documents of a snapshot"),
        ({"original": "b" * 64}, "it is about bundle bbbbbbbbbbbb"),
        ({"predicate": {"parts": "none"}}, "TypeError"),
    ],
    ids=["document that is not there", "shared asset", "no document", "another bundle", "no comparison"],
)
def test_what_it_names_must_exist_and_agree(made: Prepared, change: dict[str, Any], words: str) -> None:
    code, _what, said = found(made, certified(made, **change))
    assert code == FINDING
    assert words in said


def test_files_that_were_swapped_or_deleted_are_found(made: Prepared) -> None:
    data = certified(made)
    other = made.graph.bench().blobs.store.put_bytes(b'{"python": "another"}')
    for options, words in (
        ({"name": "0" * 12}, "lies in the folder of 000000000000"),
        ({"files": {ENVIRONMENT: other}}, f"environment.json is {other.sha256[:12]}"),
        ({"files": {ENVIRONMENT: None}}, "environment.json is not there"),
        ({"files": {ENVELOPE: None}}, "certificate.dsse.json is not there"),
    ):
        code, _what, said = found(made, data, **options)  # type: ignore[arg-type]
        assert code == FINDING
        assert words in said
