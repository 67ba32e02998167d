"""Leases: all or nothing, held by the process that inherited them, and the GPUs that may be leased."""

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from resources.gpu import LeaseError, Leases, gpu_names
from resources.gpu.lease import Holder, lease_folder, listed_gpus

GPUS = ("GPU-a", "GPU-b", "GPU-c")


def test_gpus_are_taken_all_or_none(tmp_path: Path) -> None:
    mine, theirs = Leases(tmp_path, GPUS), Leases(tmp_path, GPUS)
    taken = mine.take(2)
    assert [slot.device for slot in taken] == ["GPU-a", "GPU-b"]
    assert theirs.take(2) == [], "one is free, two are wanted"
    one = theirs.take(1)
    assert [slot.device for slot in one] == ["GPU-c"], "and the free one was not kept by the try before"
    for slot in [*taken, *one]:
        slot.drop()
    assert [slot.device for slot in theirs.take(3)] == list(GPUS)


def test_more_than_there_are_is_an_error_and_not_a_wait(tmp_path: Path) -> None:
    with pytest.raises(LeaseError, match="wants 4 GPUs, this machine has 3: ask for fewer ranks, or name the GPUs to use in REPRO_GPUS"):
        Leases(tmp_path, GPUS).take(4)


def test_a_slot_lasts_as_long_as_the_process_that_inherited_it(tmp_path: Path) -> None:
    leases = Leases(tmp_path, cpu_slots=1)
    (slot,) = leases.take(0)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=(slot.lock,))
    holder = Holder("job-1", "train", "s1", child.pid, time.time())
    slot.describe(holder)
    slot.drop()
    assert leases.take(0) == []
    assert leases.holders(0) == {"cpu-0": holder}
    child.kill()
    child.wait()
    (again,) = leases.take(0)
    assert again.before == holder, "the next one learns whose remains to clear away"
    assert leases.holders(0)["cpu-0"] == holder
    again.drop()
    assert leases.holders(0) == {}


def test_cpu_slots_are_as_many_as_asked_for(tmp_path: Path) -> None:
    leases = Leases(tmp_path, cpu_slots=2)
    assert [leases.take(0)[0].device for _ in range(2)] == ["cpu-0", "cpu-1"]
    assert leases.take(0) == []


def test_gpu_slots_are_shared_by_all_homes_of_a_user_and_cpu_slots_are_not(tmp_path: Path) -> None:
    values = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    assert lease_folder(tmp_path / "one", (), values) == tmp_path / "one" / "leases"
    assert lease_folder(tmp_path / "one", GPUS, values) == lease_folder(tmp_path / "two", GPUS, values)
    assert lease_folder(tmp_path, GPUS, {"REPRO_LEASES": str(tmp_path / "here")}) == tmp_path / "here"


def fake_nvidia_smi(folder: Path, script: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


def test_gpus_come_from_the_variables_then_from_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    fake_nvidia_smi(tmp_path, 'echo "GPU 0: NVIDIA H100 (UUID: GPU-1)"; echo "GPU 1: NVIDIA H100 (UUID: GPU-2)"')
    assert gpu_names({}) == ("GPU-1", "GPU-2")
    assert gpu_names({"CUDA_VISIBLE_DEVICES": "1"}) == ("1",)
    assert gpu_names({"CUDA_VISIBLE_DEVICES": "1", "REPRO_GPUS": "0, 1"}) == ("0", "1")
    assert gpu_names({"REPRO_GPUS": "none"}) == gpu_names({"CUDA_VISIBLE_DEVICES": ""}) == gpu_names({"CUDA_VISIBLE_DEVICES": "-1"}) == ()


def test_a_driver_tool_without_a_device_means_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if Path("/dev/nvidia0").exists():
        pytest.skip("this machine has a GPU")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    fake_nvidia_smi(tmp_path, "echo 'cannot communicate with the driver'; exit 9")
    assert gpu_names({}) == ()


def test_slices_count_instead_of_the_gpu_that_is_cut_into_them() -> None:
    listed = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aaa)
  MIG 3g.40gb     Device  0: (UUID: MIG-one)
  MIG 3g.40gb     Device  1: (UUID: MIG-two)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-bbb)
"""
    assert listed_gpus(listed) == ("MIG-one", "MIG-two", "GPU-bbb")
