"""Environment capture: what is recorded is what is there, and what is absent is said to be absent."""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from repro_assets.trust import environment as subject
from repro_assets.trust.canonical import canonical, digest, sha256
from repro_assets.trust.environment import Environment, EnvironmentProblem, Gpu, capture, cpu_capability, git_state, parse_gpus

AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")


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


# --- hardware -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "machine", "variables", "said"),
    [
        ((), "x86_64", {}, "cpu-x86_64"),
        (("avx", "avx2"), "x86_64", {}, "cpu-x86_64"),
        (("avx", "avx2", "fma"), "x86_64", {}, "cpu-avx2"),
        (("avx2", "fma", "avx512f"), "x86_64", {}, "cpu-avx2"),
        (("avx2", "fma", *AVX512), "x86_64", {}, "cpu-avx512"),
        (("avx2", "fma", *AVX512, "avx512_vnni"), "x86_64", {}, "cpu-avx512-vnni"),
        (("avx2", "fma", *AVX512, "avx512_vnni", "avx512_bf16"), "x86_64", {}, "cpu-avx512-vnni-bf16"),
        ((*AVX512, "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16"), "x86_64", {}, "cpu-avx512-vnni-bf16-fp16-amx"),
        (("asimd", "sve", "bf16"), "aarch64", {}, "cpu-arm64-sve-bf16"),
        (("asimd",), "arm64", {}, "cpu-arm64"),
        (("avx2", "fma"), "x86_64", {"ATEN_CPU_CAPABILITY": "DEFAULT", "OMP_NUM_THREADS": "2"}, "cpu-avx2+aten_cpu_capability=default"),
        ((), "riscv64", {}, "cpu-riscv64"),
    ],
)
def test_the_class_of_a_cpu_is_what_kernels_are_chosen_by(
    flags: tuple[str, ...], machine: str, variables: dict[str, str], said: str
) -> None:
    assert cpu_capability(flags, machine, variables) == said


def test_the_cpu_is_read_from_the_kernels_own_list(tmp_path: Path) -> None:
    intel = tmp_path / "intel"
    intel.write_text(
        "processor\t: 0\nmodel name\t: Xeon\nflags\t\t: fpu avx avx2 fma amx_bf16\n\nprocessor\t: 1\nmodel name\t: Other\nflags\t\t: fpu\n"
    )
    assert subject._cpuinfo(str(intel)) == ("Xeon", ("avx", "avx2", "fma", "amx_bf16"))
    arm = tmp_path / "arm"
    arm.write_text("processor\t: 0\nFeatures\t: fp asimd sve bf16\n")
    assert subject._cpuinfo(str(arm)) == (platform.machine(), ("asimd", "sve", "bf16"))
    assert subject._cpuinfo(str(tmp_path / "absent"))[1] == ()


LISTED = """\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-11111111-aaaa)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-22222222-bbbb)
  MIG 3g.40gb     Device  0: (UUID: MIG-33333333-cccc)
  MIG 1g.10gb     Device  1: (UUID: MIG-44444444-dddd)
"""


@pytest.mark.parametrize(
    ("visible", "models"),
    [
        (None, ["NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3 MIG 3g.40gb", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"]),
        ("0", ["NVIDIA H100 80GB HBM3"]),
        ("GPU-1111", ["NVIDIA H100 80GB HBM3"]),
        ("MIG-44444444-dddd", ["NVIDIA H100 80GB HBM3 MIG 1g.10gb"]),
        ("7", []),
    ],
)
def test_a_gpu_cut_into_slices_counts_by_its_slices(visible: str | None, models: list[str]) -> None:
    assert parse_gpus(LISTED, "570.1", visible) == tuple(Gpu(model, "570.1") for model in models)


def fake_smi(folder: Path, script: str) -> None:
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "nvidia-smi").chmod(0o755)


def test_the_hardware_class_is_the_gpus_model_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs of one model are one class: the number of ranks is never part of an identity."""
    first = LISTED.splitlines()[0]
    second = first.replace("GPU 0", "GPU 1").replace("1111", "5555")
    fake_smi(tmp_path, f'case "$1" in -L) echo "{first}"; echo "{second}";; *) echo 570.1; echo 570.1;; esac')
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    subject.gpus.cache_clear()
    try:
        assert subject.hardware_class({}) == "nvidia-h100-80gb-hbm3"
        assert capture({}).gpus == (Gpu("NVIDIA H100 80GB HBM3", "570.1"),) * 2
        for hidden in ("", "-1"):
            assert subject.hardware_class({"CUDA_VISIBLE_DEVICES": hidden}).startswith("cpu-")
        subject.gpus.cache_clear()
        fake_smi(tmp_path, "echo 'could not communicate with the driver'; exit 9")
        assert subject.hardware_class({}).startswith("cpu-")
    finally:
        subject.gpus.cache_clear()


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
