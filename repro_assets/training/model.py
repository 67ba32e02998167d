"""The model: a frozen base quantised to NF4, a LoRA adapter on it, their digests, and the adapter's released files.

Any safetensors model that AutoModelForCausalLM knows by itself; code from a model folder never runs. The step is `loop.py`.
"""

import hashlib
import inspect
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from repro_assets.recipe import Lora, TrainingSection
from repro_assets.training import determinism
from repro_assets.training.job import TrainingError
from repro_assets.trust import artifact
from repro_assets.trust.blob import Blob, BlobStore
from repro_assets.trust.canonical import digest

#: files of a base model that loading needs; the tokenizer's work was done when the shards were made
NEEDED = re.compile(r"config\.json|generation_config\.json|[\w.-]+\.safetensors|[\w.-]+\.safetensors\.index\.json")


def fetch(store: BlobStore, files: Mapping[str, Blob], folder: Path) -> None:
    """Write the files that loading needs into `folder`; every byte is verified on the way. Raises BlobError naming a damaged one."""
    wanted = {name: blob for name, blob in files.items() if NEEDED.fullmatch(name)}
    if "config.json" not in wanted or not any(name.endswith(".safetensors") for name in wanted):
        raise TrainingError(
            f"base model: config.json and *.safetensors are needed, the job lists {', '.join(sorted(files))}; convert it to safetensors"
        )
    for name, blob in wanted.items():
        store.get_file(blob.sha256, folder / name)


@contextmanager
def uncompiled() -> Iterator[None]:
    """While it is open, `torch.compile` hands functions back as they are.

    bitsandbytes compiles two of its fallbacks on import and runs them uncompiled when that fails: other bits on a machine without a
    compiler. It also makes the import load the whole compiler, which costs 3 s of CPU time at every start.
    """
    compiler = torch.compile
    torch.compile = lambda function=None, **_: function if function is not None else (lambda inner: inner)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiler


def load_base(folder: Path, section: TrainingSection, dtype: torch.dtype, device: torch.device) -> Any:
    """The frozen base model on `device`, its linear layers in NF4 where the section says so."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    # its advice on import is to install what `determinism.prepare` forbids
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging as their_logging

    with uncompiled():
        import bitsandbytes  # noqa: F401

    their_logging.disable_progress_bar()
    quantization = None
    if section.quantization == "nf4":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=section.double_quant, bnb_4bit_compute_dtype=dtype
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=quantization,
            dtype=dtype,
            device_map={"": str(device)},
            attn_implementation="sdpa",
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise TrainingError(f"base model: transformers cannot load it: {error}") from error
    model.config.use_cache = False
    model.requires_grad_(False)
    quantised = 0
    layers: list[Any] = list(model.modules())
    for module in layers:
        # On CPUs with AVX512-BF16 the first forward in eval mode repacks NF4 in place and rounds its scales to bf16:
        # one validation would change the base for the rest of the training.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            quantised += 1
            if module.compute_dtype != dtype:
                raise TrainingError(f"base model: a quantised layer computes in {module.compute_dtype}, the job says {dtype}")
    if section.quantization == "nf4" and not quantised:
        raise TrainingError("base model: no layer was quantised to NF4; set training.quantization to none if that is wanted")
    return model


def attach_adapter(base: Any, section: TrainingSection) -> Any:
    """`base` with a fresh LoRA adapter: float32, drawn from the section's seed alone."""
    from peft import LoraConfig, get_peft_model

    lora: Lora = section.lora
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    # The A matrices are drawn inside get_peft_model: seeding after it is how two equal runs come to differ.
    torch.manual_seed(determinism.mix(section.seed, "adapter"))
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, bias="none", task_type="CAUSAL_LM"
    )
    try:
        model = get_peft_model(base, config)
    except ValueError as error:
        raise TrainingError(f"training.lora: {error}") from error
    if section.activation_checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})
    for name, parameter in trainable(model).items():
        if parameter.dtype is not torch.float32:
            raise TrainingError(f"adapter: {name} is {parameter.dtype}, training needs float32")
    check_keys(model)
    return model


def key_of(name: str) -> str:
    """A parameter's name as PEFT writes it to a file: without the adapter's own name."""
    return name.replace(".default.", ".")


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The adapter's parameters under their file keys, in the model's order."""
    return {key_of(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def check_keys(model: torch.nn.Module) -> None:
    """What is trained must be exactly what PEFT saves and loads; raises TrainingError naming a key that is not."""
    from peft import get_peft_model_state_dict

    ours, theirs = set(trainable(model)), set(get_peft_model_state_dict(model))
    if not ours or ours != theirs:
        raise TrainingError(
            f"adapter: trained and saved keys differ at {sorted(ours ^ theirs)[:3]}; training.lora.targets matches what PEFT cannot save"
        )


def snapshot(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A copy in host memory that later steps cannot reach."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def restore(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Copy an adapter's tensors into `model`. Strict: raises TrainingError naming the first key, shape or dtype that differs."""
    parameters = trainable(model)
    for name in sorted(parameters.keys() | tensors.keys()):
        if name not in tensors or name not in parameters:
            raise TrainingError(f"{source}: adapter key {name!r} is {'missing' if name not in tensors else 'unknown to this model'}")
        have, want = tensors[name], parameters[name]
        if have.shape != want.shape or have.dtype != want.dtype:
            raise TrainingError(
                f"{source}: {name!r} is {have.dtype} {tuple(have.shape)}, this model trains {want.dtype} {tuple(want.shape)}"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def check_trained(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise TrainingError naming a lora_B that training left at zero: an adapter that does nothing."""
    for name, tensor in tensors.items():
        if ".lora_B." in name and not bool(tensor.any()):
            raise TrainingError(
                f"adapter: {name} is still zero after training; the layer got no gradient (name it out of training.lora.targets)"
            )


def _hash(pairs: Iterator[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of tensors, in the order of their names."""
    listed = {}
    for name, tensor in pairs:
        data = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
        listed[name] = {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "sha256": hashlib.sha256(data.data).hexdigest(),
        }
    return digest(listed)


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """The identity of an adapter: its tensors by name, dtype, shape and bytes."""
    return _hash(iter(tensors.items()))


def base_digest(model: torch.nn.Module) -> str:
    """Digest of everything frozen, quantisation scales included. Equal before and after training, or the base was moved."""

    def frozen() -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                yield name, parameter
                state = getattr(parameter, "quant_state", None)
                if state is not None:
                    for key, value in state.as_dict().items():
                        if isinstance(value, torch.Tensor):
                            yield f"{name}.{key}", value
                        elif isinstance(value, float):
                            # the offset of double quantisation is no tensor, and moves every weight
                            yield f"{name}.{key}", torch.tensor(value, dtype=torch.float64)
        yield from model.named_buffers()

    return _hash(frozen())


def keeps_logits(model: Any) -> bool:
    """Whether the model can be asked for logits at some positions only, which saves the head's work on untrained tokens."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters


@contextmanager
def autocast(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """bfloat16 where the job says so: matrix products in bfloat16, master adapter and sums in float32."""
    if dtype is torch.bfloat16:
        with torch.autocast(device.type, torch.bfloat16):
            yield
    else:
        yield


def check_isolation(model: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Assert that a document in a packed row cannot see the one before it.

    A packed row is run twice with another first document: the second document's logits must not move by one bit, while its own
    first token must move them. Wrong when an attention mask is passed, a cache is used or positions do not restart.
    """
    vocabulary = int(model.config.vocab_size)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, vocabulary, (2, 48), generator=generator)
    other, own = ids.clone(), ids.clone()
    other[:, :20] = (ids[:, :20] + 1 + torch.randint(0, vocabulary - 1, (2, 20), generator=generator)) % vocabulary
    own[:, 20] = (ids[:, 20] + 1) % vocabulary
    positions = torch.cat([torch.arange(20), torch.arange(28)]).repeat(2, 1).to(device)
    training = model.training
    model.eval()
    with torch.no_grad(), autocast(dtype, device), determinism.attention(device):
        outputs = [model(input_ids=row.to(device), position_ids=positions, use_cache=False).logits[:, 20:] for row in (ids, other, own)]
    model.train(training)
    if not torch.equal(outputs[0], outputs[1]):
        gap = (outputs[0].float() - outputs[1].float()).abs().max().item()
        raise TrainingError(
            f"packing: a document sees the one before it in its row (logits move by {gap:.2g}); this model cannot be trained on packed rows"
        )
    if torch.equal(outputs[0], outputs[2]):
        raise TrainingError("packing: the probe saw no effect of a document's own token; the model ignores its input")


def adapter_config(model: Any, base: str) -> bytes:
    """adapter_config.json as releases allow it; the base model is named by its digest."""
    config = model.peft_config["default"].to_dict()
    kind, task = (getattr(config[name], "value", config[name]) for name in ("peft_type", "task_type"))
    return artifact.clean_config({**config, "peft_type": kind, "task_type": task, "inference_mode": True}, f"sha256:{base}")


def adapter_bytes(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """adapter_model.safetensors: equal tensors give equal bytes."""
    return save(dict(tensors), metadata={"format": "pt"})
