"""Keys by role and the trust file: made once, kept private, believed only as configuration says. The checks themselves are in trust/."""

import json
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import x25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from securesystemslib.signer import SIGNER_FOR_URI_SCHEME, CryptoSigner, Key, SecretsHandler, Signature
from securesystemslib.signer import Signer as RoleKey

from repro_assets.trust.signing import ROLES, public_key, sign_payload
from repro_assets.trust.verification import Revocations, Revoked, Trust, TrustError, UntrustedKey, authenticate, encode_trust, load_trust
from resources.signer import KeyProblem, Signer

KIND = "application/test"


def accepted(signer: Signer, role: str, by: Signer | None = None) -> str:
    """Id of the key that `signer` trusted for a payload which `by` (or itself) signed."""
    envelope = sign_payload(b"payload", KIND, (by or signer).signer(role))
    return authenticate(envelope, trust=signer.trust, roles=(role,), payload_type=KIND)[1]


def quiet(home: Path, **environment: str) -> Signer:
    return Signer(home, environment, notice=lambda text: None)


def test_a_local_key_is_made_once_kept_private_and_announced(tmp_path: Path) -> None:
    said: list[str] = []
    first = Signer(tmp_path / ".repro", {}, said.append)
    key_id = first.signer("builder").public_key.keyid
    path = tmp_path / ".repro" / "keys" / "builder.pem"
    assert said == [f"made a local builder key: {path} (id {key_id[:12]}…). Back it up; for shared work set REPRO_KEY_BUILDER"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert accepted(first, "builder") == accepted(Signer(tmp_path / ".repro", {}, said.append), "builder") == key_id
    assert len(said) == 1


def test_each_role_has_a_key_of_its_own_trusted_for_that_role_only(tmp_path: Path) -> None:
    signer = quiet(tmp_path)
    ids = [signer.signer(role).public_key.keyid for role in ROLES]
    assert len(set(ids)) == len(ROLES)
    assert {key_id: entry.roles for key_id, entry in signer.trust.keys.items()} == {
        key_id: (role,) for key_id, role in zip(ids, ROLES, strict=True)
    }


def test_nothing_is_trusted_before_a_key_is_made(tmp_path: Path) -> None:
    assert quiet(tmp_path).trust == Trust(1, {})


def test_a_lost_trust_file_is_made_again_from_the_keys_that_are_there(tmp_path: Path) -> None:
    signer = quiet(tmp_path)
    for role in ("builder", "memo"):
        signer.signer(role)
    before = signer.trust
    signer.trust_file.unlink()
    assert quiet(tmp_path).trust == before


def test_a_key_that_somebody_took_out_of_the_trust_file_stays_out(tmp_path: Path) -> None:
    signer = quiet(tmp_path)
    signer.signer("builder")
    signer.trust_file.write_bytes(encode_trust(Trust(1, {})))
    again = quiet(tmp_path)
    again.signer("memo")
    assert again.trust.ids("builder") == []
    assert len(again.trust.ids("memo")) == 1
    with pytest.raises(UntrustedKey):
        accepted(again, "builder")


def test_a_revocation_counts_at_once_and_survives_new_keys(tmp_path: Path) -> None:
    signer = quiet(tmp_path)
    key_id = accepted(signer, "builder")
    trust = msgspec.structs.replace(signer.trust, revoked=Revocations(keys={key_id: "lost laptop"}))
    signer.trust_file.write_bytes(encode_trust(trust))
    signer.signer("memo")
    with pytest.raises(Revoked, match="lost laptop"):
        accepted(signer, "builder")


def test_the_key_of_another_installation_is_not_trusted(tmp_path: Path) -> None:
    mine, theirs = quiet(tmp_path / "mine"), quiet(tmp_path / "theirs")
    mine.signer("builder")
    with pytest.raises(UntrustedKey):
        accepted(mine, "builder", by=theirs)


def test_a_key_that_others_can_read_is_not_used(tmp_path: Path) -> None:
    quiet(tmp_path).signer("builder")
    path = tmp_path / "keys" / "builder.pem"
    path.chmod(0o640)
    with pytest.raises(KeyProblem, match=rf"mode 0640: others can read it. Run `chmod 600 {path}`"):
        quiet(tmp_path).signer("builder")
    path.chmod(0o600)
    assert quiet(tmp_path).signer("builder")


def test_whoever_comes_second_takes_the_key_that_the_first_one_made(tmp_path: Path) -> None:
    """Two runs on a fresh machine: each must find trusted what the other has signed. flock holds between processes and threads alike."""
    first, second = quiet(tmp_path), quiet(tmp_path)
    with ThreadPoolExecutor(1) as pool:
        with first._lock():
            late = pool.submit(lambda: second.signer("builder").public_key.keyid)
            with pytest.raises(TimeoutError):
                late.result(timeout=0.5)
            assert not (tmp_path / "keys" / "builder.pem").exists()
            made = CryptoSigner.generate_ed25519()
            (tmp_path / "keys" / "builder.pem").write_bytes(made.private_bytes)
            (tmp_path / "keys" / "builder.pem").chmod(0o600)
        assert late.result(timeout=30) == made.public_key.keyid
    assert accepted(first, "builder") == made.public_key.keyid


# --- configured keys and trust ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["file", "file2"])
def test_a_key_file_is_named_by_uri(tmp_path: Path, scheme: str) -> None:
    key = CryptoSigner.generate_ecdsa()
    (tmp_path / "my key.pem").write_bytes(key.private_bytes)
    signer = quiet(tmp_path / "home", REPRO_KEY_BUILDER=f"{scheme}:{tmp_path}/my%20key.pem")
    assert signer.signer("builder").public_key.keyid == key.public_key.keyid
    assert not (tmp_path / "home" / "keys" / "builder.pem").exists()
    with pytest.raises(UntrustedKey):
        accepted(signer, "builder")


def test_configured_trust_is_read_and_never_written(tmp_path: Path) -> None:
    said: list[str] = []
    file = tmp_path / "trust.json"
    file.write_bytes(encode_trust(Trust(1, {})))
    signer = Signer(tmp_path / "home", {"REPRO_TRUST": str(file)}, said.append)
    with pytest.raises(UntrustedKey):
        accepted(signer, "builder")
    assert load_trust(file) == Trust(1, {})
    assert not (tmp_path / "home" / "keys" / "trust.json").exists()
    start = said[0].index("does not trust it until this is under `keys`: ")
    entry = json.loads(said[0][start:].partition("`: ")[2])
    file.write_text(json.dumps({"version": 1, "keys": entry}))
    assert accepted(signer, "builder") in entry


def test_a_trust_file_that_is_not_there_or_not_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyProblem, match=r"absent.json: No such file .* set REPRO_TRUST"):
        _ = quiet(tmp_path, REPRO_TRUST=str(tmp_path / "absent.json")).trust
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(TrustError, match=r"bad.json: Object missing required field `version`"):
        _ = quiet(tmp_path, REPRO_TRUST=str(tmp_path / "bad.json")).trust


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (None, "No such file"),
        (b"not a key", "not an unencrypted PKCS#8 PEM"),
        (CryptoSigner.generate_ed25519().private_bytes[:60], "not an unencrypted PKCS#8 PEM"),
        (x25519.X25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), "that can sign"),
    ],
    ids=["no file", "no key", "half a key", "a key that only agrees"],
)
def test_a_key_file_that_cannot_sign_is_named(tmp_path: Path, data: bytes | None, said: str) -> None:
    if data is not None:
        (tmp_path / "k.pem").write_bytes(data)
    with pytest.raises(KeyProblem, match=rf"builder key {tmp_path}/k.pem: .*{said}"):
        quiet(tmp_path, REPRO_KEY_BUILDER=f"file:{tmp_path}/k.pem").signer("builder")


def test_an_unknown_role_and_an_unknown_scheme_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyProblem, match="no role 'king'"):
        quiet(tmp_path).signer("king")
    with pytest.raises(KeyProblem, match=r"unknown scheme 'gopher'; known: file, .*awskms"):
        quiet(tmp_path, REPRO_KEY_BUILDER="gopher:x").signer("builder")


class ServiceSigner(RoleKey):
    """A key service in this process: holds the private half, gives out signatures, and is asked by URI like KMS and Vault are."""

    held: ClassVar[dict[str, CryptoSigner]] = {}

    def __init__(self, uri: str, key: Key) -> None:
        self.uri, self._key = uri, key

    @property
    def public_key(self) -> Key:
        return self._key

    def sign(self, payload: bytes) -> Signature:
        return self.held[self.uri].sign(payload)

    @classmethod
    def from_priv_key_uri(cls, priv_key_uri: str, public_key: Key, secrets_handler: SecretsHandler | None = None) -> "ServiceSigner":
        if priv_key_uri not in cls.held:
            raise ConnectionError("no such key here")
        return cls(priv_key_uri, public_key)


@pytest.fixture
def service() -> Iterator[dict[str, CryptoSigner]]:
    SIGNER_FOR_URI_SCHEME["service"] = ServiceSigner
    ServiceSigner.held = {"service:one": CryptoSigner.generate_ed25519(), "service:two": CryptoSigner.generate_rsa(size=2048)}
    yield ServiceSigner.held
    del SIGNER_FOR_URI_SCHEME["service"]


def test_a_key_service_signs_and_its_public_half_comes_from_the_trust_file(tmp_path: Path, service: dict[str, CryptoSigner]) -> None:
    """Key services do not hand out public keys in one way: configuration says which one a URI has."""
    file = tmp_path / "trust.json"
    environment = {"REPRO_TRUST": str(file), "REPRO_KEY_BUILDER": "service:two"}
    entries = [public_key(key, ("builder", "approver"), uri=uri) for uri, key in service.items()]
    file.write_bytes(encode_trust(Trust(1, dict(entries))))
    assert accepted(quiet(tmp_path, **environment), "builder") == service["service:two"].public_key.keyid

    file.write_bytes(encode_trust(Trust(1, dict(entries[:1]))))
    with pytest.raises(KeyProblem, match=r'0 public keys of this role fit it .* `"uri": "service:two"`'):
        quiet(tmp_path, **environment).signer("builder")
    file.write_bytes(encode_trust(Trust(1, dict(public_key(key, ("builder",)) for key in service.values()))))
    with pytest.raises(KeyProblem, match="2 public keys of this role fit it"):
        quiet(tmp_path, **environment).signer("builder")
    file.write_bytes(encode_trust(Trust(1, dict([public_key(service["service:one"], ("builder",))]))))
    with pytest.raises(UntrustedKey, match=service["service:two"].public_key.keyid):
        accepted(quiet(tmp_path, **environment), "builder")


def test_a_key_service_that_fails_is_named_with_its_uri(tmp_path: Path, service: dict[str, CryptoSigner]) -> None:
    file = tmp_path / "trust.json"
    file.write_bytes(encode_trust(Trust(1, dict([public_key(service["service:one"], ("memo",), uri="service:gone")]))))
    with pytest.raises(KeyProblem, match="memo key 'service:gone': ConnectionError: no such key here"):
        quiet(tmp_path, REPRO_TRUST=str(file), REPRO_KEY_MEMO="service:gone").signer("memo")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file where the folder should be")
    with pytest.raises(KeyProblem, match=r"home/keys: .*; make it writable, or set REPRO_HOME"):
        quiet(tmp_path / "home").signer("builder")
