"""Every check on an envelope, each shown to fail when the thing it guards against is done; and the auditor's entry."""

import base64
import json
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from securesystemslib.signer import CryptoSigner

from repro_assets.trust import statements
from repro_assets.trust.blob import FolderStore
from repro_assets.trust.canonical import canonical, sha256
from repro_assets.trust.signing import PAYLOAD_TYPE, PublicKey, key_ids, public_key, sign, sign_payload
from repro_assets.trust.statements import PROVENANCE, StatementError, descriptor
from repro_assets.trust.verification import (
    BadEnvelope,
    BadSignature,
    Refused,
    Revocations,
    Revoked,
    Stale,
    SubjectMismatch,
    Trust,
    TrustError,
    UntrustedKey,
    WrongPredicate,
    WrongRole,
    encode_trust,
    load_trust,
    main,
    parse_trust,
    verify,
)

Keys = dict[str, CryptoSigner]
NOW = datetime(2024, 5, 4, 3, 2, 1, tzinfo=UTC)
HELD = {"leaves/0": sha256(b"leaf"), "recipe": sha256(b"recipe")}
BASE = sha256(b"base")


def statement(subjects: dict[str, str] = HELD, finished: datetime | None = NOW) -> dict[str, Any]:
    return statements.provenance(
        statements.BUNDLE,
        subjects,
        parameters={"seed": 7},
        dependencies=[descriptor("base_model/model.safetensors", BASE)],
        builder="urn:repro-assets:builder:0.1.0",
        invocation="run-1",
        finished=finished,
    )


def check(envelope: bytes | dict[str, Any], trust: Trust, **changed: Any) -> dict[str, Any]:
    said: dict[str, Any] = {"trust": trust, "role": "builder", "predicate_type": PROVENANCE, "subjects": HELD, "now": NOW}
    return verify(envelope, **{**said, **changed})


def altered(envelope: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    opened = json.loads(envelope)
    change(opened)
    return json.dumps(opened).encode()


def test_a_genuine_bundle_is_accepted_as_bytes_and_as_a_dict_more_than_once(keys: Keys, trust: Trust) -> None:
    """S0.42: the library rewrites the dict it parses, so that a second look at the same dict would fail."""
    envelope = sign(statement(), keys["builder"])
    opened = json.loads(envelope)
    assert check(envelope, trust) == statement() == check(opened, trust) == check(opened, trust)
    assert check(envelope, trust, subjects=HELD["recipe"]) == statement()
    assert key_ids(envelope) == [keys["builder"].public_key.keyid]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(place=st.integers(0, 10_000), bit=st.integers(0, 7), part=st.sampled_from(["payload", "sig"]))
def test_one_flipped_bit_anywhere_is_refused(keys: Keys, trust: Trust, place: int, bit: int, part: str) -> None:
    envelope = json.loads(sign(statement(), keys["builder"]))
    holder = envelope if part == "payload" else envelope["signatures"][0]
    data = bytearray(base64.b64decode(holder[part]))
    data[place % len(data)] ^= 1 << bit
    holder[part] = base64.b64encode(bytes(data)).decode()
    with pytest.raises(BadSignature, match=keys["builder"].public_key.keyid):
        check(envelope, trust)


def test_a_key_nobody_trusts_is_refused(keys: Keys, trust: Trust) -> None:
    with pytest.raises(UntrustedKey, match=f"^key: {keys['stranger'].public_key.keyid} is not in the trust configuration"):
        check(sign(statement(), keys["stranger"]), trust)


def test_a_strangers_signature_under_a_trusted_key_id_is_refused(keys: Keys, trust: Trust) -> None:
    def pretend(opened: dict[str, Any]) -> None:
        opened["signatures"][0]["keyid"] = keys["builder"].public_key.keyid

    with pytest.raises(BadSignature):
        check(altered(sign(statement(), keys["stranger"]), pretend), trust)


def test_a_trusted_key_of_another_role_is_refused(keys: Keys, trust: Trust) -> None:
    with pytest.raises(WrongRole, match="may sign as evaluator, needed is builder"):
        check(sign(statement(), keys["evaluator"]), trust)


def test_a_genuine_statement_of_another_kind_is_refused(keys: Keys, trust: Trust) -> None:
    other = statements.test_result(HELD, result="PASSED", configuration=[descriptor("suite", BASE)], evaluated=NOW)
    with pytest.raises(WrongPredicate, match="test-result"):
        check(sign(other, keys["builder"]), trust)


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ({**HELD, "leaves/0": BASE}, "'leaves/0' has digest"),
        ({**HELD, "leaves/1": BASE}, "'leaves/1' is in hand and not signed for"),
        ({"recipe": HELD["recipe"]}, "'leaves/0' is signed for .* and not in hand"),
        ({}, "not in hand"),
        (BASE, "it is about another"),
    ],
)
def test_an_envelope_replayed_for_other_things_is_refused(keys: Keys, trust: Trust, held: Any, said: str) -> None:
    """The base model is a dependency of the statement and no subject of it: it cannot stand in for one."""
    with pytest.raises(SubjectMismatch, match=said):
        check(sign(statement(), keys["builder"]), trust, subjects=held)


def test_age_is_checked_when_it_is_asked_for(keys: Keys, trust: Trust) -> None:
    envelope = sign(statement(), keys["builder"])
    week = timedelta(days=7)
    assert check(envelope, trust, max_age=week, now=NOW + week)
    with pytest.raises(Stale, match="older than 7 days"):
        check(envelope, trust, max_age=week, now=NOW + week + timedelta(seconds=1))
    with pytest.raises(Stale, match="yet to come"):
        check(envelope, trust, max_age=week, now=NOW - timedelta(minutes=6))
    with pytest.raises(Stale, match="says no time"):
        check(sign(statement(finished=None), keys["builder"]), trust, max_age=week)


def test_a_time_that_cannot_be_read_counts_as_stale(keys: Keys, trust: Trust) -> None:
    odd = statement()
    odd["predicate"]["runDetails"]["metadata"]["finishedOn"] = "yesterday"
    with pytest.raises(Stale, match="'yesterday' is not an RFC 3339 time"):
        check(sign(odd, keys["builder"]), trust, max_age=timedelta(days=1))


@pytest.mark.parametrize("what", ["subject", "dependency", "statement", "payload", "key"])
def test_what_is_revoked_is_refused_by_configuration_and_by_the_caller(keys: Keys, trust: Trust, what: str) -> None:
    made = statement()
    envelope = sign(made, keys["builder"])
    value = {
        "subject": HELD["leaves/0"],
        "dependency": BASE,
        "statement": statements.statement_digest(made),
        "payload": sha256(canonical(made)),
        "key": keys["builder"].public_key.keyid,
    }[what]
    revoked = Revocations(keys={value: "leaked"}) if what == "key" else Revocations(digests={value: "leaked"})
    with pytest.raises(Revoked, match="leaked"):
        check(envelope, msgspec.structs.replace(trust, revoked=revoked))
    with pytest.raises(Revoked, match="leaked"):
        check(envelope, trust, revoked={value: "leaked"})
    assert check(envelope, trust, revoked={sha256(b"something else"): "leaked"}) == made


def test_a_revoked_key_stays_refused_after_it_is_taken_out_of_the_trusted_keys(keys: Keys, trust: Trust) -> None:
    key_id = keys["builder"].public_key.keyid
    gone = Trust(1, {other: key for other, key in trust.keys.items() if other != key_id}, Revocations(keys={key_id: "lost laptop"}))
    with pytest.raises(Revoked, match="lost laptop"):
        check(sign(statement(), keys["builder"]), gone)


def test_one_good_signature_among_several_is_enough_and_a_bad_one_is_named_before_a_stranger(keys: Keys, trust: Trust) -> None:
    mine, strange = (json.loads(sign(statement(), keys[who])) for who in ("builder", "stranger"))
    both = {**mine, "signatures": [*strange["signatures"], *mine["signatures"]]}
    assert check(both, trust) == statement()
    wrong = json.loads(sign(statement(), keys["evaluator"]))
    with pytest.raises(WrongRole):
        check({**mine, "signatures": [*strange["signatures"], *wrong["signatures"]]}, trust)


def test_the_payload_type_is_part_of_what_is_checked(keys: Keys, trust: Trust) -> None:
    envelope = sign_payload(canonical(statement()), "application/vnd.other+json", keys["builder"])
    with pytest.raises(BadEnvelope, match=r"payload type is 'application/vnd\.other"):
        check(envelope, trust)

    def relabel(opened: dict[str, Any]) -> None:
        opened["payloadType"] = PAYLOAD_TYPE

    with pytest.raises(BadSignature):
        check(altered(envelope, relabel), trust)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"{}",
        b"\xff",
        b'{"payload":1,"payloadType":"x","signatures":[]}',
        b'{"payload":"%%","payloadType":"x","signatures":[]}',
        b'{"payload":"","payloadType":"x","signatures":[{"sig":"!"}]}',
        b'{"payload":"","payloadType":"x","signatures":[{"keyid":"a","sig":"AA=="},{"keyid":"a","sig":"AA=="}]}',
        b'{"payload":"","payloadType":"x","signatures":{}}',
        b'{"payload":"","payloadType":"x","signatures":"ab"}',
        b'{"payload":"","payloadType":null,"signatures":[]}',
    ],
)
def test_what_is_no_envelope_is_refused_in_words(trust: Trust, data: bytes) -> None:
    with pytest.raises(BadEnvelope, match=r"^envelope: "):
        check(data, trust)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["payload", "payloadType", "signatures", "keyid", "sig"]), inner, max_size=5)
        ),
        max_leaves=8,
    )
)
def test_no_json_whatever_brings_verification_down(trust: Trust, value: Any) -> None:
    with pytest.raises(Refused):
        check(json.dumps(value).encode(), trust)


def test_an_envelope_without_signatures_is_refused(keys: Keys, trust: Trust) -> None:
    with pytest.raises(BadSignature, match="carries none"):
        check(altered(sign(statement(), keys["builder"]), lambda opened: opened["signatures"].clear()), trust)


@pytest.mark.parametrize(
    "payload",
    [
        {"_type": "https://in-toto.io/Statement/v0.1", "subject": [], "predicateType": PROVENANCE, "predicate": {}},
        {"_type": statements.STATEMENT, "subject": [], "predicateType": PROVENANCE, "predicate": {}},
        {"_type": statements.STATEMENT, "subject": [{"name": "x"}], "predicateType": PROVENANCE, "predicate": {}},
        {"_type": statements.STATEMENT, "subject": [1], "predicateType": PROVENANCE, "predicate": {}},
        {"_type": statements.STATEMENT, "predicateType": PROVENANCE, "predicate": {}},
        {"_type": statements.STATEMENT, "subject": [], "predicateType": PROVENANCE},
        [],
    ],
)
def test_a_signed_payload_that_is_no_statement_is_refused(keys: Keys, trust: Trust, payload: Any) -> None:
    with pytest.raises(BadEnvelope, match="not an in-toto Statement v1"):
        check(sign_payload(canonical(payload), PAYLOAD_TYPE, keys["builder"]), trust)


def test_signing_what_is_no_statement_is_refused(keys: Keys) -> None:
    with pytest.raises(StatementError, match="_type"):
        sign({"subject": []}, keys["builder"])


def test_the_signature_of_the_same_statement_by_the_same_key_is_the_same_bytes(keys: Keys) -> None:
    assert sign(statement(), keys["builder"]) == sign(statement(), keys["builder"])


# --- trust configuration ------------------------------------------------------------------------------------------------------------


def test_a_trust_file_survives_writing_and_reading(trust: Trust, tmp_path: Path) -> None:
    full = msgspec.structs.replace(trust, revoked=Revocations({"a": "lost"}, {BASE: "poisoned"}))
    (tmp_path / "trust.json").write_bytes(encode_trust(full))
    assert load_trust(tmp_path / "trust.json") == full
    assert full.ids("builder") == [key for key, entry in full.keys.items() if entry.roles == ("builder",)]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"{", "trust.json: "),
        (b'{"version":2,"keys":{}}', "`version` is 2"),
        (b'{"version":1,"keys":{},"extra":1}', "unknown field `extra`"),
        (b'{"version":1}', "missing required field `keys`"),
        (
            b'{"version":1,"keys":{"k":{"keytype":"ed25519","scheme":"none","keyval":{"public":"00"},"roles":["builder"]}}}',
            "`keys.k`: Unsupp",
        ),
        (b'{"version":1,"keys":{"k":{"keytype":"ed25519","scheme":"ed25519","keyval":{},"roles":["builder"]}}}', "`keys.k`: public key"),
        (
            b'{"version":1,"keys":{"k":{"keytype":"ed25519","scheme":"ed25519","keyval":{"public":"00"},"roles":["king"]}}}',
            "unknown role 'king'",
        ),
    ],
)
def test_a_trust_file_that_cannot_be_used_says_where(data: bytes, said: str) -> None:
    with pytest.raises(TrustError, match=said):
        parse_trust(data, "trust.json")


def test_a_key_whose_public_half_is_garbage_verifies_nothing(keys: Keys, trust: Trust) -> None:
    key_id = keys["builder"].public_key.keyid
    broken = Trust(1, {key_id: PublicKey("ed25519", "ed25519", {"public": "zz"}, ("builder",))})
    with pytest.raises(BadSignature):
        check(sign(statement(), keys["builder"]), broken)


def test_other_kinds_of_keys_work_alike() -> None:
    key = CryptoSigner.generate_ecdsa()
    trust = Trust(1, dict([public_key(key, ("builder",))]))
    assert check(sign(statement(), key), parse_trust(encode_trust(trust))) == statement()


# --- the auditor's entry ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def handed(keys: Keys, trust: Trust, tmp_path: Path) -> tuple[Path, Path, Path]:
    """What an auditor is given: envelope, trust file and a folder of blobs with both subjects."""
    store = FolderStore(tmp_path / "blobs")
    store.put_many([b"leaf", b"recipe"])
    (tmp_path / "bundle.dsse.json").write_bytes(sign(statement(), keys["builder"]))
    (tmp_path / "trust.json").write_bytes(encode_trust(trust))
    return tmp_path / "bundle.dsse.json", tmp_path / "trust.json", tmp_path / "blobs"


def test_the_auditor_needs_neither_dagster_nor_lakefs_nor_torch(handed: tuple[Path, Path, Path]) -> None:
    """S0.6, S0.18: the program runs in a process where importing any of them fails."""
    program = (
        "import sys, runpy\n"
        "for name in ('dagster', 'lakefs_sdk', 'boto3', 'torch', 'transformers', 'resources'): sys.modules[name] = None\n"
        "sys.argv = ['verification', *sys.argv[1:]]\n"
        "runpy.run_module('repro_assets.trust.verification', run_name='__main__')\n"
    )
    envelope, trust, store = handed
    done = subprocess.run(
        [sys.executable, "-c", program, str(envelope), "--trust", str(trust), "--store", str(store)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "2 of 2 read and equal" in done.stdout
    assert "the builder" in done.stdout
    assert statements.statement_digest(statement()) in done.stdout


def test_the_auditor_finds_a_flipped_byte_in_a_blob(handed: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """S0.18"""
    envelope, trust, store = handed
    blob = store / "sha256" / HELD["leaves/0"][:2] / HELD["leaves/0"]
    blob.write_bytes(b"leaG")
    assert main([str(envelope), "--trust", str(trust), "--store", str(store)]) == 1
    said = capsys.readouterr().out
    assert said.startswith("REFUSED     subject: 'leaves/0': blob")
    assert sha256(b"leaG") in said


def test_the_auditor_reports_what_is_not_in_hand(handed: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    envelope, trust, store = handed
    (store / "sha256" / HELD["leaves/0"][:2] / HELD["leaves/0"]).unlink()
    call = [str(envelope), "--trust", str(trust), "--store", str(store)]
    assert main(call) == 1
    assert "'leaves/0' is signed for" in capsys.readouterr().out
    assert main([*call, "--partial"]) == 0
    assert "1 of 2 read and equal, 1 not in hand" in capsys.readouterr().out


def test_the_auditor_hashes_files_in_hand(handed: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    envelope, trust, _ = handed
    (tmp_path / "leaf").write_bytes(b"leaf")
    (tmp_path / "recipe").write_bytes(b"recipe")
    call = [str(envelope), "--trust", str(trust), "--subject", f"leaves/0={tmp_path}/leaf", "--subject", f"recipe={tmp_path}/recipe"]
    assert main(call) == 0
    (tmp_path / "recipe").write_bytes(b"Recipe")
    assert main(call) == 1
    assert main([*call, "--partial"]) == 1
    assert "'recipe' has digest" in capsys.readouterr().out


def test_the_auditors_exit_codes_tell_findings_from_wrong_use_and_missing_files(
    handed: tuple[Path, Path, Path], keys: Keys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    envelope, trust, store = handed
    forged = tmp_path / "forged.json"
    forged.write_bytes(sign(statement(), keys["stranger"]))
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    assert main([str(envelope), "--trust", str(trust)]) == 0
    assert "0 of 2 read and equal, 2 not in hand" in capsys.readouterr().out
    assert main([str(forged), "--trust", str(trust)]) == 1
    assert main([str(broken), "--trust", str(trust)]) == 1
    assert main([str(envelope), "--trust", str(trust), "--role", "approver"]) == 1
    assert main([str(envelope), "--trust", str(trust), "--type", statements.VSA]) == 1
    assert main([str(envelope), "--trust", str(trust), "--max-age", "0.001"]) == 1
    assert main([str(envelope), "--trust", str(broken)]) == 2
    assert main([str(tmp_path / "absent"), "--trust", str(trust)]) == 3
    assert main([str(envelope), "--trust", str(tmp_path / "absent")]) == 3
    assert main([str(envelope), "--trust", str(trust), "--store", str(tmp_path / "absent")]) == 3
    with pytest.raises(SystemExit, match="2"):
        main([str(envelope), "--trust", str(trust), "--subject", "no-equals-sign"])
    assert store.is_dir()
