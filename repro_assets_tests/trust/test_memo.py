"""Memo entries: only the one that the memo key signed for exactly this work is honoured; and keys compared in words."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from securesystemslib.signer import CryptoSigner

from repro_assets.trust.blob import Blob
from repro_assets.trust.canonical import canonical, digest, sha256
from repro_assets.trust.memo import PAYLOAD_TYPE, ForgedMemo, MemoEntry, MemoKey, differing, entry, open_entry, seal
from repro_assets.trust.signing import sign_payload
from repro_assets.trust.verification import Revocations, Trust

Keys = dict[str, CryptoSigner]
RESULT, OBSERVED, OTHER = (Blob(sha256(data), len(data)) for data in (b"result", b"observed", b"other"))
KEY = MemoKey(
    {"asset": "records", "inputs": {"raw_snapshot": sha256(b"raw")}, "section": {"split": {"validation": 0.05}}, "code": sha256(b"c")}
)
ENTRY = entry(KEY, RESULT, OBSERVED)


def test_what_was_sealed_is_opened(keys: Keys, trust: Trust) -> None:
    opened = open_entry(seal(ENTRY, keys["memo"]), trust, KEY.digest)
    assert opened == ENTRY
    assert opened.digest == RESULT.sha256


@pytest.mark.parametrize("signer", ["builder", "evaluator", "approver", "reviewer"])
def test_an_entry_signed_by_another_role_is_forged(keys: Keys, trust: Trust, signer: str) -> None:
    with pytest.raises(ForgedMemo, match=f"memo {KEY.digest}: role: .* may sign as {signer}, needed is memo"):
        open_entry(seal(ENTRY, keys[signer]), trust, KEY.digest)


def test_an_entry_signed_by_a_stranger_is_forged(keys: Keys, trust: Trust) -> None:
    with pytest.raises(ForgedMemo, match="not in the trust configuration"):
        open_entry(seal(ENTRY, keys["stranger"]), trust, KEY.digest)


def test_an_entry_for_other_work_put_in_its_place_is_forged(keys: Keys, trust: Trust) -> None:
    other = MemoKey({**KEY.components, "asset": "shards"})
    with pytest.raises(ForgedMemo, match=f"for the key {other.digest}"):
        open_entry(seal(entry(other, RESULT, OBSERVED), keys["memo"]), trust, KEY.digest)


def test_an_entry_whose_outcome_was_swapped_after_signing_is_forged(keys: Keys, trust: Trust) -> None:
    good = json.loads(seal(ENTRY, keys["memo"]))
    bad = json.loads(seal(entry(KEY, OTHER, OBSERVED), keys["memo"]))
    with pytest.raises(ForgedMemo, match="signature: "):
        open_entry(json.dumps({**good, "payload": bad["payload"]}).encode(), trust, KEY.digest)


def test_components_that_do_not_make_the_key_are_neither_sealed_nor_opened(keys: Keys, trust: Trust) -> None:
    lying = MemoEntry(KEY.digest, {"asset": "records"}, RESULT, OBSERVED)
    with pytest.raises(ValueError, match="components' digest"):
        seal(lying, keys["memo"])
    with pytest.raises(ForgedMemo, match="its components have the digest"):
        open_entry(sign_payload(canonical(lying), PAYLOAD_TYPE, keys["memo"]), trust, KEY.digest)


def test_an_envelope_of_another_kind_by_the_memo_key_is_forged(keys: Keys, trust: Trust) -> None:
    with pytest.raises(ForgedMemo, match="payload type"):
        open_entry(sign_payload(canonical(ENTRY), "application/vnd.in-toto+json", keys["memo"]), trust, KEY.digest)
    with pytest.raises(ForgedMemo, match="not a memo entry"):
        open_entry(sign_payload(b'{"key":1}', PAYLOAD_TYPE, keys["memo"]), trust, KEY.digest)
    with pytest.raises(ForgedMemo, match="not a memo entry"):
        open_entry(
            sign_payload(canonical({**msgspec.to_builtins(ENTRY), "result": {"sha256": "x", "size": 1}}), PAYLOAD_TYPE, keys["memo"]),
            trust,
            KEY.digest,
        )
    with pytest.raises(ForgedMemo, match="not a DSSE envelope"):
        open_entry(b"{", trust, KEY.digest)


def test_a_revoked_outcome_is_not_recalled(keys: Keys, trust: Trust) -> None:
    revoked = msgspec.structs.replace(trust, revoked=Revocations(digests={RESULT.sha256: "poisoned"}))
    with pytest.raises(ForgedMemo, match=r"is revoked \(poisoned\)"):
        open_entry(seal(ENTRY, keys["memo"]), revoked, KEY.digest)


# --- in words -----------------------------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)
COMPONENTS = st.dictionaries(st.text(min_size=1, max_size=3), VALUES, max_size=4)


@given(COMPONENTS, COMPONENTS)
def test_words_are_said_exactly_when_the_keys_differ(was: dict[str, Any], now: dict[str, Any]) -> None:
    assert bool(differing(was, now)) == (MemoKey(was).digest != MemoKey(now).digest)
    assert differing(was, was) == []


@given(COMPONENTS)
def test_the_key_does_not_move_with_the_order_of_its_components(components: dict[str, Any]) -> None:
    """S0.4"""
    assert MemoKey(dict(reversed(components.items()))).digest == MemoKey(components).digest == digest(components)


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        (
            {"section": {"split": {"validation": 0.05}}},
            {"section": {"split": {"validation": 0.1}}},
            ["records: section.split.validation 0.05 -> 0.1"],
        ),
        ({"inputs": {"raw": "a" * 64}}, {"inputs": {"raw": "b" * 64}}, ["records: inputs.raw aaaaaaaaaaaa… -> bbbbbbbbbbbb…"]),
        (
            {"engine": "0.22"},
            {"engine": "0.23", "hardware": "cpu-avx2"},
            ["records: engine 0.22 -> 0.23", "records: hardware absent -> cpu-avx2"],
        ),
        ({"list": [1, 2]}, {"list": [1, 3, 4]}, ["records: list[1] 2 -> 3", "records: list[2] absent -> 4"]),
        ({"a": None}, {}, ["records: a null -> absent"]),
        ({"a": 1}, {"a": True}, ["records: a 1 -> true"]),
        ({"a": 1}, {"a": {"b": 1}}, ['records: a 1 -> {"b":1}']),
        ({"a": ""}, {"a": "x"}, ["records: a '' -> x"]),
        ({"a": 1}, {"a": 1.0}, []),
    ],
)
def test_what_differs_is_said_by_path(was: dict[str, Any], now: dict[str, Any], said: list[str]) -> None:
    """S0.46: name what differs."""
    assert differing({"asset": "records", **was}, {"asset": "records", **now}) == said


def test_without_an_asset_the_path_stands_alone() -> None:
    assert differing({"a": 1}, {"a": 2}) == ["a 1 -> 2"]


def test_long_values_are_cut() -> None:
    (said,) = differing({"a": list(range(100))}, {"a": "x"})
    assert said.startswith("a [0,1,2")
    assert said.endswith("… -> x")
    assert len(said) < 100
