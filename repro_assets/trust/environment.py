"""What a run ran in: interpreter, machine, installed distributions, lock file, image and Git state.

Records only; whether an environment is good enough is decided by whoever asked. Naming the hardware is `hardware.py`.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import msgspec

from repro_assets.trust.canonical import digest, sha256
from repro_assets.trust.hardware import Cpu, Gpu, cpu, gpus, hardware_class

#: Variables that change which numbers a library computes
VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_VISIBLE_DEVICES",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "NPY_DISABLE_CPU_FEATURES",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
    "PYTHONHASHSEED",
)

_IMAGE = re.compile(r"(?:(?P<name>[^\s@]+)@)?sha256:(?P<digest>[0-9a-f]{64})")


class EnvironmentProblem(Exception):
    """An environment that cannot be recorded truthfully; the message names the variable or command and the remedy."""


class Git(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`remote`: origin without credentials, or empty. `diff`: SHA-256 of the dirty tree's diff, or null when it is clean."""

    commit: str
    dirty: bool
    diff: str | None
    remote: str


class GitState(msgspec.Struct, frozen=True):
    """`diff`: what `git apply` needs to get from `commit` to the working tree, untracked files of the code folders included."""

    commit: str
    dirty: bool
    diff: bytes
    remote: str

    def summary(self) -> Git:
        return Git(self.commit, self.dirty, sha256(self.diff) if self.dirty else None, self.remote)


class Environment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything recorded of one environment. `lock`, `image`: SHA-256, or null when there is none. `git` null: see `git_absent`."""

    python: str
    platform: str
    glibc: str
    machine: str
    cpu: Cpu
    gpus: tuple[Gpu, ...]
    hardware: str
    distributions: dict[str, str]
    distributions_digest: str
    lock: str | None
    image: str | None
    image_name: str
    git: Git | None
    git_absent: str
    variables: dict[str, str]


def capture(variables: Mapping[str, str] | None = None) -> Environment:
    """The environment of this process. Takes about 0.2 s. Raises EnvironmentProblem for an image named by tag only."""
    values = os.environ if variables is None else variables
    state, absent = git_state()
    lock = lock_bytes(values)
    image = image_digest(values)
    installed = distributions()
    return Environment(
        python=f"{platform.python_implementation()} {platform.python_version()}",
        platform=platform.platform(),
        glibc=" ".join(part for part in platform.libc_ver() if part),
        machine=platform.machine(),
        cpu=cpu(values),
        gpus=gpus(values.get("CUDA_VISIBLE_DEVICES")),
        hardware=hardware_class(values),
        distributions=installed,
        distributions_digest=digest(installed),
        lock=sha256(lock) if lock is not None else None,
        image=image,
        image_name=values.get("REPRO_IMAGE", "").partition("@")[0] if image else "",
        git=state.summary() if state else None,
        git_absent=absent,
        variables={name: values[name] for name in VARIABLES if name in values},
    )


def distributions() -> dict[str, str]:
    """Installed distributions by normalised name. The first on the path wins, as it does for imports."""
    found: dict[str, str] = {}
    for item in importlib.metadata.distributions():
        name = item.metadata["Name"]
        if name:
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), item.version)
    return dict(sorted(found.items()))


def lock_bytes(variables: Mapping[str, str] | None = None) -> bytes | None:
    """The lock file: `REPRO_LOCK`, else deploy/requirements.lock beside the package; None when installed without one."""
    values = os.environ if variables is None else variables
    if named := values.get("REPRO_LOCK"):
        try:
            return Path(named).read_bytes()
        except OSError as error:
            raise EnvironmentProblem(f"REPRO_LOCK={named}: {error.strerror or error}; name a readable lock file, or unset it") from error
    beside = _home() / "deploy" / "requirements.lock"
    return beside.read_bytes() if beside.is_file() else None


def image_digest(variables: Mapping[str, str] | None = None) -> str | None:
    """SHA-256 out of `REPRO_IMAGE` (`name@sha256:…` or `sha256:…`), None when unset. Raises EnvironmentProblem for a tag."""
    values = os.environ if variables is None else variables
    said = values.get("REPRO_IMAGE", "").strip()
    if not said:
        return None
    if not (match := _IMAGE.fullmatch(said)):
        raise EnvironmentProblem(
            f"REPRO_IMAGE={said}: a tag can be moved to other bytes; write name@sha256:<digest> (docker inspect --format "
            "'{{index .RepoDigests 0}}' NAME prints it)"
        )
    return match["digest"]


# --- Git ----------------------------------------------------------------------------------------------------------------------------


def git_state(root: Path | None = None) -> tuple[GitState | None, str]:
    """The Git state of the checkout that this package runs from, or None and the reason why there is none.

    A package installed into an environment that happens to lie in somebody's checkout does not belong to that checkout.
    """
    root = root or _home()
    if shutil.which("git") is None:
        return None, "git is not installed"
    if _git(root, "ls-files", "--error-unmatch", "repro_assets/__init__.py") is None:
        return None, "this package does not run from a Git checkout"
    commit = _git(root, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return None, "the checkout has no commit yet"
    diff = _git(root, *_DIFF, "HEAD")
    untracked = _git(
        root, "ls-files", "--others", "--exclude-standard", "-z", "--", "repro_assets", "resources", "deploy", "pyproject.toml"
    )
    if diff is None or untracked is None:
        return None, "git could not compare the working tree with HEAD"
    for name in sorted(filter(None, untracked.decode("utf-8", "surrogateescape").split("\0"))):
        added = _git(root, *_DIFF, "--no-index", "--", os.devnull, name, codes=(0, 1))
        if added is None:
            return None, f"git could not read the untracked file {name}"
        diff += added
    remote = _git(root, "config", "--get", "remote.origin.url") or b""
    return GitState(commit.decode().strip(), bool(diff), diff, _without_credentials(remote.decode().strip())), ""


#: The user's own settings must not reach the bytes of a recorded diff
_DIFF = ("diff", "--no-ext-diff", "--no-textconv", "--no-color", "--binary", "--full-index", "--src-prefix=a/", "--dst-prefix=b/")


def _home() -> Path:
    return Path(__file__).resolve().parents[2]


def _git(root: Path, *arguments: str, codes: tuple[int, ...] = (0,)) -> bytes | None:
    try:
        done = subprocess.run(
            ["git", "-c", "core.quotePath=true", *arguments],
            check=False,
            cwd=root,
            capture_output=True,
            timeout=60,
            env={**os.environ, "LC_ALL": "C"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode in codes else None


def _without_credentials(remote: str) -> str:
    parts = urlsplit(remote)
    if not parts.scheme or "@" not in parts.netloc:
        return remote
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
