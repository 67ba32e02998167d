"""What makes one training give the same bits twice: settings, each set and then asserted, and seeds that are functions of position.

Nothing here knows of models or data. The order of sums is `exchange.py`.
"""

import hashlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from repro_assets.training.job import TrainingError
from repro_assets.trust.hardware import cpu, gpu_class

#: must be in the environment before CUDA or NCCL start
ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "FLASH_ATTENTION_DETERMINISTIC": "1",
    "NCCL_ALGO": "Ring",
    "NCCL_PROTO": "Simple",
    "NCCL_NVLS_ENABLE": "0",
}


def prepare() -> None:
    """Set the environment and forbid what cannot be pinned. Call before anything touches a GPU."""
    # bitsandbytes takes a 4-bit kernel from a hub when it finds this package: other bits, and code nobody signed for.
    if importlib.util.find_spec("kernels") is not None:
        raise TrainingError(
            "the package `kernels` is installed: bitsandbytes would fetch kernels from a hub; uninstall it from the environment"
        )
    if torch.cuda.is_initialized():
        raise TrainingError("CUDA was started before the determinism settings; start the training program in a process of its own")
    for name, value in ENVIRONMENT.items():
        if os.environ.setdefault(name, value) != value:
            raise TrainingError(f"environment: {name}={os.environ[name]!r}, training needs {value!r}; unset it")


#: CPU threads of a rank. A constant, because the number of threads moves the bits of large matrix products (seen between one and two
#: threads on an AVX-512 CPU): more cores are used by more ranks, which move nothing.
THREADS = 1


def settle() -> None:
    """Set every switch that moves bits, then assert them."""
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True, warn_only=False)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.set_default_dtype(torch.float32)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    check()


def check() -> None:
    """Raise TrainingError naming the first setting that does not hold."""
    held = {
        "torch.are_deterministic_algorithms_enabled()": (torch.are_deterministic_algorithms_enabled(), True),
        "torch.is_deterministic_algorithms_warn_only_enabled()": (torch.is_deterministic_algorithms_warn_only_enabled(), False),
        "torch.get_default_dtype()": (torch.get_default_dtype(), torch.float32),
        "torch.get_float32_matmul_precision()": (torch.get_float32_matmul_precision(), "highest"),
        "torch.backends.cudnn.deterministic": (torch.backends.cudnn.deterministic, True),
        "torch.backends.cudnn.benchmark": (torch.backends.cudnn.benchmark, False),
        "torch.backends.cuda.matmul.allow_tf32": (torch.backends.cuda.matmul.allow_tf32, False),
        "torch.is_autocast_enabled('cpu')": (torch.is_autocast_enabled("cpu"), False),
        "torch.is_autocast_enabled('cuda')": (torch.is_autocast_enabled("cuda"), False),
    }
    held |= {f"os.environ[{name!r}]": (os.environ.get(name), value) for name, value in ENVIRONMENT.items()}
    for name, (found, wanted) in held.items():
        if found != wanted:
            raise TrainingError(
                f"determinism: {name} is {found!r}, training needs {wanted!r}; something changed it after the program set it"
            )


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that the job resolved, if this device computes in it."""
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if dtype is torch.bfloat16 and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise TrainingError(f"compute dtype bfloat16: {torch.cuda.get_device_name(device)} has none; set training.compute_dtype to float32")
    return dtype


def hardware(device: torch.device) -> str:
    """The class of hardware whose bits agree, under the name that memo keys use for it."""
    return gpu_class(torch.cuda.get_device_name(device)) if device.type == "cuda" else cpu().capability


@contextmanager
def attention(device: torch.device) -> Iterator[None]:
    """Pin the attention kernels. On CUDA only the math backend both takes a mask and has a deterministic backward."""
    if device.type == "cuda":
        with sdpa_kernel([SDPBackend.MATH]):
            yield
    else:
        yield


def mix(*position: int | str) -> int:
    """A seed of 63 bits out of (seed, step, micro-batch): no generator's state has to be kept, and none can be lost."""
    return int.from_bytes(hashlib.sha256(repr(position).encode()).digest()[:8], "little") >> 1
