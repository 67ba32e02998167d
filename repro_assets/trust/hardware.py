"""The hardware class: the one name that memo keys, results and certificates give to a GPU model or to a CPU's capability.

Imports nothing heavy: GPUs are asked through nvidia-smi. What else a run ran in is `environment.py`.
"""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import msgspec

#: Variables that take instruction sets away from the CPU's kernels, and so make another hardware class of it
_LOWERED = ("ATEN_CPU_CAPABILITY", "DNNL_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")

#: CPU flags that numeric libraries choose their kernels by, as Linux names them on x86-64 and arm64
_FLAGS = (
    *("avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("avx_vnni", "amx_tile", "amx_bf16", "amx_int8", "amx_fp16"),
    *("asimd", "asimdhp", "asimddp", "sve", "sve2", "bf16", "i8mm", "svebf16"),
)


class Cpu(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`flags`: the numerically relevant ones the kernel reports. `capability`: the class they make (`hardware_class`)."""

    model: str
    capability: str
    flags: tuple[str, ...]


class Gpu(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One GPU, or one MIG slice of one, as nvidia-smi names it."""

    model: str
    driver: str


def cpu(variables: Mapping[str, str] | None = None) -> Cpu:
    """The CPU of this machine, from /proc/cpuinfo where there is one."""
    model, flags = _cpuinfo()
    return Cpu(model, cpu_capability(flags, platform.machine(), os.environ if variables is None else variables), flags)


@cache
def _cpuinfo(path: str = "/proc/cpuinfo") -> tuple[str, tuple[str, ...]]:
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine(), ()
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    present = set(fields.get("flags", fields.get("Features", "")).split())
    return fields.get("model name", platform.machine()), tuple(flag for flag in _FLAGS if flag in present)


def cpu_capability(flags: tuple[str, ...], machine: str, variables: Mapping[str, str]) -> str:
    """The class of CPUs that numeric libraries pick the same kernels for: `cpu-avx2`, `cpu-avx512-bf16`, `cpu-arm64-sve`, ...

    Two models of one class may still differ in a library's own table; a run that compares bytes finds that out.
    """
    have = set(flags)
    if machine in ("aarch64", "arm64"):
        level = "arm64" + ("-sve" if "sve" in have else "") + ("-bf16" if "bf16" in have else "")
    elif {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= have:
        kinds = (("avx512_vnni", "vnni"), ("avx512_bf16", "bf16"), ("avx512_fp16", "fp16"), ("amx_bf16", "amx"))
        level = "-".join(["avx512", *(name for flag, name in kinds if flag in have)])
    elif {"avx2", "fma"} <= have:
        level = "avx2"
    else:
        level = machine.lower() or "unknown"
    lowered = [f"{name.lower()}={variables[name].lower()}" for name in _LOWERED if variables.get(name)]
    return "+".join([f"cpu-{level}", *lowered])


@cache
def gpus(visible: str | None = None) -> tuple[Gpu, ...]:
    """GPUs this process may use, by nvidia-smi and `visible` (the value of CUDA_VISIBLE_DEVICES). Empty when there are none."""
    if visible is not None and visible.strip() in ("", "-1", "NoDevFiles", "void", "none"):
        return ()
    command = shutil.which("nvidia-smi")
    if command is None:
        return ()
    listed = _output([command, "-L"])
    driver = _output([command, "--query-gpu=driver_version", "--format=csv,noheader"])
    if listed is None or driver is None:
        return ()
    return parse_gpus(listed, driver.split("\n")[0].strip(), visible)


def parse_gpus(listed: str, driver: str, visible: str | None) -> tuple[Gpu, ...]:
    """GPUs in the output of `nvidia-smi -L`. A GPU cut into MIG slices is not usable whole, so its slices are what counts."""
    found: list[tuple[str, str, str]] = []  # index, UUID, model
    parent, whole = "", ""
    for line in listed.splitlines():
        if match := re.match(r"GPU (\d+): (.+) \(UUID: ([^)]+)\)", line):
            parent, whole = match[2], match[3]
            found.append((match[1], whole, parent))
        elif match := re.match(r"\s+MIG (\S+)\s+Device\s+\d+: \(UUID: ([^)]+)\)", line):
            found = [item for item in found if item[1] != whole]
            found.append(("", match[2], f"{parent} MIG {match[1]}"))
    if visible is not None:
        wanted = [name.strip() for name in visible.split(",") if name.strip()]
        found = [item for name in wanted for item in found if name == item[0] or item[1].startswith(name)]
    return tuple(Gpu(model, driver) for _, _, model in found)


def gpu_class(model: str) -> str:
    """The class of a GPU out of its model's name, which CUDA and nvidia-smi write alike: `nvidia-h100-80gb-hbm3`."""
    return re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")


def hardware_class(variables: Mapping[str, str] | None = None) -> str:
    """What memo keys of training and evaluation say of the hardware: the GPU model, or else the CPU's capability."""
    values = os.environ if variables is None else variables
    models = sorted({gpu_class(gpu.model) for gpu in gpus(values.get("CUDA_VISIBLE_DEVICES"))})
    return "+".join(models) if models else cpu(values).capability


def _output(command: list[str]) -> str | None:
    """Standard output, or None when the command fails: a driver that does not answer is a GPU that cannot be used."""
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
