"""Keys by role: where the private ones come from, and which public ones this installation trusts.

Default: a local ed25519 key a role under `<home>/keys`, made once. Elsewhere: `REPRO_KEY_<ROLE>` is a URI of any securesystemslib signer
(file, awskms, gcpkms, azurekms, hv, hsm) and `REPRO_TRUST` the trust file. What trust means is `repro_assets/trust/verification.py`.
"""

import fcntl
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlparse

import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import SIGNER_FOR_URI_SCHEME, CryptoSigner, Key
from securesystemslib.signer import Signer as RoleKey

from repro_assets.trust.signing import ROLES, public_key
from repro_assets.trust.verification import Trust, encode_trust, load_trust


class KeyProblem(Exception):
    """A key that cannot be made, read or used; the message names the role, the place and the remedy."""


def _notice(text: str) -> None:
    print(text, file=sys.stderr)


class Signer:
    """The keys and the trust of one installation. `home` is the folder of local state (`.repro`); `environment` is read once."""

    @classmethod
    def connect(cls, home: Path) -> "Signer":
        """By the process's environment variables. Opens nothing yet: keys are read or made on first use."""
        return cls(home, os.environ)

    def __init__(self, home: Path, environment: Mapping[str, str] | None = None, notice: Callable[[str], None] = _notice) -> None:
        values = environment or {}
        self.folder = Path(home) / "keys"
        self.uris = {role: values[name] for role in ROLES if values.get(name := f"REPRO_KEY_{role.upper()}")}
        self.configured = Path(values["REPRO_TRUST"]) if values.get("REPRO_TRUST") else None
        self.notice = notice
        self._signers: dict[str, RoleKey] = {}

    @property
    def trust_file(self) -> Path:
        """The trust configuration in force: `REPRO_TRUST`, else the one made with the local keys."""
        return self.configured or self.folder / "trust.json"

    @property
    def trust(self) -> Trust:
        """Which keys are trusted for what. Read anew each time, so that a revocation counts at once.

        Raises TrustError for a file that is no trust configuration and KeyProblem for one that is not there.
        """
        if self.configured is None and not self.trust_file.exists():
            with self._lock():
                if not self.trust_file.exists():
                    self._write_trust(self._local_trust())
        try:
            return load_trust(self.trust_file)
        except OSError as error:
            raise KeyProblem(
                f"trust configuration {self.trust_file}: {error.strerror or error}; set REPRO_TRUST to a readable file"
            ) from error

    def signer(self, role: str) -> RoleKey:
        """The key that signs for `role`: from its URI, else the local key, made on first use. Raises KeyProblem."""
        if role not in ROLES:
            raise KeyProblem(f"no role {role!r}; known: {', '.join(ROLES)}")
        if role not in self._signers:
            uri = self.uris.get(role)
            self._signers[role] = self._from_uri(role, uri) if uri else self._local(role)
        return self._signers[role]

    def _from_uri(self, role: str, uri: str) -> RoleKey:
        scheme = uri.partition(":")[0]
        if scheme in ("file", "file2"):
            return _load(role, Path(unquote(urlparse(uri).path)))
        if scheme not in SIGNER_FOR_URI_SCHEME:
            raise KeyProblem(f"{role} key {uri!r}: unknown scheme {scheme!r}; known: file, {', '.join(sorted(SIGNER_FOR_URI_SCHEME))}")
        trust = self.trust
        entries = {key_id: entry for key_id in trust.ids(role) if (entry := trust.keys[key_id]).uri in (uri, "")}
        exact = {key_id: entry for key_id, entry in entries.items() if entry.uri == uri} or entries
        if len(exact) != 1:
            raise KeyProblem(
                f"{role} key {uri!r}: {len(exact)} public keys of this role fit it in {self.trust_file}; a service does not hand out its "
                f'public half, so give one entry under `keys` the role {role} and `"uri": "{uri}"`'
            )
        ((key_id, entry),) = exact.items()
        key = Key.from_dict(key_id, {"keytype": entry.keytype, "scheme": entry.scheme, "keyval": dict(entry.keyval)})
        try:
            return RoleKey.from_priv_key_uri(uri, key)
        except Exception as error:  # securesystemslib lets every key service raise errors of its own
            raise KeyProblem(f"{role} key {uri!r}: {type(error).__name__}: {error}; check that the key service is reachable") from error

    def _local(self, role: str) -> RoleKey:
        path = self.folder / f"{role}.pem"
        with self._lock():
            if not path.exists():
                made = CryptoSigner.generate_ed25519()
                # trusted first: a crash in between leaves a public key without a private one, which can sign nothing
                if self.configured is None:
                    self._trust_also(role, made)
                _write(path, made.private_bytes, 0o600)
                self.notice(self._made(role, path, made))
        if (mode := stat.S_IMODE(path.stat().st_mode)) & 0o077:
            raise KeyProblem(
                f"{role} key {path} has mode {mode:04o}: others can read it. Run `chmod 600 {path}`, or make a new key if it leaked"
            )
        return _load(role, path)

    def _local_trust(self) -> Trust:
        present = {role: _load(role, path) for role in ROLES if (path := self.folder / f"{role}.pem").exists()}
        return Trust(1, dict(public_key(signer, (role,), name=f"local {role}") for role, signer in present.items()))

    def _trust_also(self, role: str, made: RoleKey) -> None:
        """Add a key that is made just now. One that somebody took out of the file is never put back: that would undo their decision."""
        trust = load_trust(self.trust_file) if self.trust_file.exists() else self._local_trust()
        key_id, entry = public_key(made, (role,), name=f"local {role}")
        self._write_trust(msgspec.structs.replace(trust, keys={**trust.keys, key_id: entry}))

    def _made(self, role: str, path: Path, made: RoleKey) -> str:
        said = (
            f"made a local {role} key: {path} (id {made.public_key.keyid[:12]}…). Back it up; for shared work set REPRO_KEY_{role.upper()}"
        )
        if self.configured is None:
            return said
        key_id, entry = public_key(made, (role,), name=f"local {role}")
        return f"{said}. {self.configured} does not trust it until this is under `keys`: {msgspec.json.encode({key_id: entry}).decode()}"

    def _write_trust(self, trust: Trust) -> None:
        _write(self.folder / "trust.json", encode_trust(trust), 0o644)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """One process at a time makes keys: two at once would each trust a key that the other has replaced."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with (self.folder / ".lock").open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield
        except OSError as error:
            raise KeyProblem(f"keys folder {self.folder}: {error}; make it writable, or set REPRO_HOME to a folder that is") from error


def _write(path: Path, data: bytes, mode: int) -> None:
    """Written beside, then renamed: a crash leaves the old file or the new one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _load(role: str, path: Path) -> CryptoSigner:
    try:
        private = load_pem_private_key(path.read_bytes(), None)
        return CryptoSigner(private)  # type: ignore[arg-type]
    except OSError as error:
        raise KeyProblem(f"{role} key {path}: {error.strerror or error}; put the key there or change REPRO_KEY_{role.upper()}") from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise KeyProblem(
            f"{role} key {path}: not an unencrypted PKCS#8 PEM private key that can sign: {error}; restore it from a copy"
        ) from error
