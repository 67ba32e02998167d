"""Environment capture: what is recorded is what is there, and what is absent is said to be absent."""

import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from repro_assets.trust import environment as subject
from repro_assets.trust.canonical import canonical, digest, sha256
from repro_assets.trust.environment import Environment, EnvironmentProblem, capture, git_state


def test_a_captured_environment_survives_json_and_names_what_is_installed() -> None:
    """S0.28, S0.61"""
    found = capture({"OMP_NUM_THREADS": "1", "SECRET": "x"})
    assert msgspec.json.decode(canonical(found), type=Environment) == found
    assert found.python == f"CPython {platform.python_version()}"
    assert found.distributions["msgspec"] == importlib.metadata.version("msgspec")
    assert found.distributions["in-toto-attestation"] == importlib.metadata.version("in_toto_attestation")
    assert found.distributions_digest == digest(found.distributions)
    assert found.variables == {"OMP_NUM_THREADS": "1"}
    assert found.image is None
    assert found.image_name == ""
    assert (found.git is None) == bool(found.git_absent)
    assert "SECRET" not in canonical(found).decode()


def test_capture_agrees_with_a_second_process_and_loads_no_torch() -> None:
    program = (
        "import sys, msgspec; from repro_assets.trust.environment import capture; found = capture({}); "
        "sys.stdout.buffer.write(msgspec.json.encode([found, 'torch' in sys.modules]))"
    )
    root = Path(subject.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, cwd=root)
    there, torch = json.loads(done.stdout)
    here = msgspec.to_builtins(capture({}))
    for moving in ("git", "git_absent"):  # the checkout may be edited between the two looks
        here.pop(moving), there.pop(moving)
    assert there == json.loads(msgspec.json.encode(here))
    assert torch is False


# --- lock and image -----------------------------------------------------------------------------------------------------------------


def test_the_lock_is_the_named_file_else_the_one_beside_the_package(tmp_path: Path) -> None:
    """S0.29"""
    (tmp_path / "my.lock").write_bytes(b"a==1")
    named = {"REPRO_LOCK": str(tmp_path / "my.lock")}
    assert subject.lock_bytes(named) == b"a==1"
    assert capture(named).lock == sha256(b"a==1")
    beside = Path(subject.__file__).parents[2] / "deploy" / "requirements.lock"
    assert subject.lock_bytes({}) == beside.read_bytes()
    with pytest.raises(EnvironmentProblem, match=r"REPRO_LOCK=.*absent: No such file"):
        subject.lock_bytes({"REPRO_LOCK": str(tmp_path / "absent")})


def test_an_installed_package_without_a_lock_records_it_as_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel has no deploy folder."""
    monkeypatch.setattr(subject, "_home", lambda: tmp_path)
    found = capture({})
    assert found.lock is None
    assert found.git is None
    assert found.git_absent == "this package does not run from a Git checkout"


@pytest.mark.parametrize("said", ["registry.example.org:5000/team/trainer@sha256:" + "a" * 64, "sha256:" + "a" * 64])
def test_an_image_is_recorded_by_digest(said: str) -> None:
    """S0.23, S0.53"""
    found = capture({"REPRO_IMAGE": said})
    assert found.image == "a" * 64
    assert found.image_name == said.partition("@")[0]


@pytest.mark.parametrize(
    "said",
    [
        "trainer",
        "trainer:1.2",
        "registry:5000/trainer:latest",
        "trainer@sha256:abc",
        "trainer:1@sha512:" + "a" * 64,
        "sha256:" + "a" * 65,
        "a b@sha256:" + "a" * 64,
    ],
)
def test_an_image_named_by_tag_is_refused(said: str) -> None:
    """S0.25: a tag can be moved to other bytes."""
    with pytest.raises(EnvironmentProblem, match="a tag can be moved"):
        capture({"REPRO_IMAGE": said})


# --- Git ----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A real Git checkout of a small copy of this project's layout, one commit, clean."""
    root = tmp_path / "checkout"
    (root / "repro_assets").mkdir(parents=True)
    (root / "repro_assets" / "__init__.py").write_text("")
    (root / "repro_assets" / "code.py").write_text("x = 1\n")
    (root / ".gitignore").write_text("ignored.py\n")
    git(root, "init", "-q", "-b", "main")
    git(root, "add", "-A")
    git(root, "-c", "user.name=n", "-c", "user.email=e@example.org", "commit", "-q", "-m", "first")
    return root


def git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout


def test_a_clean_checkout_is_its_commit(checkout: Path) -> None:
    """S0.52"""
    state, absent = git_state(checkout)
    assert state is not None
    assert absent == ""
    assert (state.commit, state.dirty, state.diff, state.remote) == (git(checkout, "rev-parse", "HEAD").strip(), False, b"", "")
    assert state.summary().diff is None


def test_the_diff_of_a_dirty_checkout_rebuilds_it(checkout: Path, tmp_path: Path) -> None:
    """S0.1: changed, deleted, binary, untracked and oddly named files; ignored ones and the user's own Git settings stay out."""
    copy = tmp_path / "copy"
    shutil.copytree(checkout, copy)
    folder = checkout / "repro_assets"
    (folder / "code.py").write_text("x = 2\n")
    (folder / "data.bin").write_bytes(bytes(range(256)))
    (folder / "näw file.py").write_text("y = 1\n")
    (folder / "empty.py").write_text("")
    (folder / "ignored.py").write_text("z = 1\n")
    (checkout / ".gitignore").unlink()
    (checkout / ".gitignore").write_text("ignored.py\n# more\n")
    plain, _ = git_state(checkout)
    git(checkout, "config", "diff.noprefix", "true")
    git(checkout, "config", "color.ui", "always")
    git(checkout, "config", "diff.external", "false")
    git(checkout, "config", "remote.origin.url", "https://me:token@example.org/r.git")
    state, _ = git_state(checkout)
    assert state is not None
    assert plain is not None
    assert state.dirty
    assert state.diff == plain.diff
    assert state.summary().diff == sha256(state.diff)
    assert state.remote == "https://example.org/r.git"
    subprocess.run(["git", "apply", "-"], cwd=copy, input=state.diff, check=True)
    assert {path.name: path.read_bytes() for path in (copy / "repro_assets").iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir() if path.name != "ignored.py"
    }
    assert (copy / ".gitignore").read_bytes() == (checkout / ".gitignore").read_bytes()


def test_an_installation_inside_somebodys_checkout_is_not_that_checkout(checkout: Path) -> None:
    """A virtual environment commonly lies in a checkout: its packages are not what that commit says."""
    site = checkout / ".venv" / "site-packages"
    shutil.copytree(checkout / "repro_assets", site / "repro_assets")
    assert git_state(site) == (None, "this package does not run from a Git checkout")


def test_no_commit_no_repository_and_no_git_are_reasons_not_errors(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(checkout / ".git")
    assert git_state(checkout) == (None, "this package does not run from a Git checkout")
    git(checkout, "init", "-q")
    git(checkout, "add", "-A")
    assert git_state(checkout) == (None, "the checkout has no commit yet")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(checkout) == (None, "git is not installed")


@pytest.mark.parametrize(
    ("remote", "said"),
    [
        ("git@example.org:team/r.git", "git@example.org:team/r.git"),
        ("ssh://git@example.org/r", "ssh://example.org/r"),
        ("https://user:p@ss@example.org:8443/r", "https://example.org:8443/r"),
        ("/srv/r.git", "/srv/r.git"),
        ("", ""),
    ],
)
def test_a_remote_is_recorded_without_credentials(remote: str, said: str) -> None:
    assert subject._without_credentials(remote) == said
