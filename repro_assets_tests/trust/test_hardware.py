"""Hardware classes: CPUs by what kernels are chosen by, GPUs by model, and one name for both everywhere."""

import os
import platform
from pathlib import Path

import pytest

from repro_assets.trust import hardware as subject
from repro_assets.trust.environment import capture
from repro_assets.trust.hardware import Gpu, cpu_capability, gpu_class, parse_gpus

AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")


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


def test_cuda_and_nvidia_smi_names_give_one_class() -> None:
    """torch.cuda.get_device_name and `nvidia-smi -L` print the same model name; slices carry their profile."""
    assert gpu_class("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert gpu_class("NVIDIA H100 80GB HBM3 MIG 1g.10gb") == "nvidia-h100-80gb-hbm3-mig-1g-10gb"
