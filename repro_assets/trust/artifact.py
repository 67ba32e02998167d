"""What a released adapter may consist of: names, configuration keys and file forms. Anything not listed here is refused.

Used when an adapter is released and again before one is loaded. Signatures over it are `verification.py`.
"""

import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from repro_assets.trust.canonical import canonical

CONFIG = "adapter_config.json"

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
_TEXT = ("README.md", "LICENSE", "chat_template.jinja", "merges.txt")
_WEIGHTS = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill")
_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")

#: Keys by which a configuration reaches code: a loader that meets one may import it, wherever it stands
_CODE = frozenset(
    {"auto_map", "auto_mapping", "parent_library", "trust_remote_code", "custom_pipelines", "megatron_core", "megatron_config"}
    | {"_attn_implementation_internal", "_attn_implementation", "_experts_implementation_internal"}
)
#: Keys whose value says where something came from; a path of the machine that wrote it says nothing to anybody else
_PLACES = frozenset({"name_or_path", "_name_or_path", "base_model_name_or_path", "tokenizer_file", "vocab_file", "special_tokens_map_file"})

_REFERENCE = re.compile(r"sha256:[0-9a-f]{64}|[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_MODULE = re.compile(r"[A-Za-z_]\w*(\.\w+)*")

_TOKENIZER_KEYS = frozenset(
    {"version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "model"}
)
_BITS = {
    64: ("F64", "I64", "U64"),
    32: ("F32", "I32", "U32"),
    16: ("F16", "BF16", "I16", "U16"),
    8: ("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"),
}
_DTYPES = {name: bits for bits, names in _BITS.items() for name in names}
_HEADER = 100 * 1024 * 1024
_JSON = 256 * 1024 * 1024


class ArtifactRefused(Exception):
    """A file that may not be part of a released adapter; the message names the file, the key or byte, the reason and the remedy."""


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _modules(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) and _MODULE.fullmatch(name) for name in value)


def _numbers(value: Any) -> bool:
    """A rank or alpha pattern: module name -> number. PEFT reads the names as patterns, so only plain names pass."""
    return isinstance(value, dict) and all(
        _MODULE.fullmatch(name) and isinstance(item, int | float) and not isinstance(item, bool) for name, item in value.items()
    )


#: key of adapter_config.json -> what its value may be, and how to say so
_CONFIG: dict[str, tuple[Callable[[Any], bool], str]] = {
    "alpha_pattern": (_numbers, "module names to numbers"),
    "base_model_name_or_path": (lambda v: isinstance(v, str) and bool(_REFERENCE.fullmatch(v)), "a hub id or sha256:<digest>, no path"),
    "bias": (lambda v: v in ("none", "all", "lora_only"), "none, all or lora_only"),
    "fan_in_fan_out": (lambda v: isinstance(v, bool), "true or false"),
    "inference_mode": (lambda v: isinstance(v, bool), "true or false"),
    "layers_to_transform": (lambda v: isinstance(v, list) and all(_whole(n) for n in v), "a list of layer numbers"),
    "lora_alpha": (lambda v: isinstance(v, int | float) and not isinstance(v, bool), "a number"),
    "lora_bias": (lambda v: isinstance(v, bool), "true or false"),
    "lora_dropout": (lambda v: isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v < 1, "a share below 1"),
    "modules_to_save": (_modules, "a list of module names"),
    "peft_type": (lambda v: v == "LORA", "LORA"),
    "peft_version": (lambda v: isinstance(v, str) and bool(re.fullmatch(r"\d+(\.\w+)*", v)), "a version"),
    "r": (lambda v: _whole(v) and v > 0, "a whole number above 0"),
    "rank_pattern": (_numbers, "module names to numbers"),
    "revision": (lambda v: isinstance(v, str) and bool(re.fullmatch(r"[0-9a-f]{40}", v)), "a full commit hash"),
    "target_modules": (lambda v: v == "all-linear" or _modules(v), "all-linear or a list of module names"),
    "task_type": (lambda v: v == "CAUSAL_LM", "CAUSAL_LM"),
    "use_dora": (lambda v: isinstance(v, bool), "true or false"),
    "use_rslora": (lambda v: isinstance(v, bool), "true or false"),
}
_NEEDED = ("base_model_name_or_path", "lora_alpha", "peft_type", "r", "target_modules", "task_type")
#: PEFT's own defaults that it writes for features that are off, beside null, false and empty values
_OFF: dict[str, Any] = {"init_lora_weights": True, "megatron_core": "megatron.core", "qalora_group_size": 16}


def clean_config(config: Mapping[str, Any], base_model: str) -> bytes:
    """adapter_config.json as it is released: allowed keys only, sorted, canonical, with `base_model` (hub id or sha256:<digest>).

    A key that is not allowed is dropped while it is off (null, false, empty, PEFT's default) and refused when it is on: the adapter
    would be loaded as something else without it. Raises ArtifactRefused.
    """
    kept: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, set | frozenset):
            value = sorted(value)
        if key in _CONFIG:
            if value is not None and value != {} and value != []:
                kept[key] = sorted(value) if key in ("target_modules", "modules_to_save") and isinstance(value, list) else value
        elif not (value is None or value is False or value in ({}, []) or (key in _OFF and value == _OFF[key])):
            raise ArtifactRefused(f"{CONFIG}: `{key}` is {value!r}; a released adapter may not use it. Train without it")
    kept["base_model_name_or_path"] = base_model
    data = canonical(kept)
    check_config(data)
    return data


def check_config(data: bytes) -> dict[str, Any]:
    """The parsed adapter_config.json. Raises ArtifactRefused for an unknown key, a value out of bounds, or another form of writing."""
    config = _json(CONFIG, data)
    _no_code(CONFIG, config)
    for key, value in config.items():
        if key not in _CONFIG:
            raise ArtifactRefused(f"{CONFIG}: unknown key `{key}`; known: {', '.join(sorted(_CONFIG))}. Write it with clean_config")
        allowed, said = _CONFIG[key]
        if not allowed(value):
            raise ArtifactRefused(f"{CONFIG}: `{key}` is {_short(value)}, allowed is {said}. Write it with clean_config")
    for key in _NEEDED:
        if key not in config:
            raise ArtifactRefused(f"{CONFIG}: `{key}` is missing. Write it with clean_config")
    if data != canonical(config):
        raise ArtifactRefused(
            f"{CONFIG}: not canonical JSON (sorted keys, no spaces), so its digest is not its content's. Write it with clean_config"
        )
    return config


def check_names(names: Iterable[str]) -> None:
    """Raises ArtifactRefused for the first name outside the allow-list, or when configuration or weights are missing."""
    listed = sorted(names)
    for name in listed:
        suffix = PurePosixPath(name).suffix.lower()
        if suffix in _PICKLES:
            raise ArtifactRefused(f"{name}: a pickle runs code when it is loaded; save the tensors as safetensors")
        if name != CONFIG and name not in _TOKENIZER and name not in _TEXT and not _WEIGHTS.fullmatch(name):
            raise ArtifactRefused(
                f"{name}: not a file of a released adapter; allowed: {CONFIG}, *.safetensors, {', '.join(_TOKENIZER + _TEXT)}"
            )
    if CONFIG not in listed:
        raise ArtifactRefused(f"{CONFIG} is missing; an adapter without it cannot be loaded")
    if not any(_WEIGHTS.fullmatch(name) for name in listed):
        raise ArtifactRefused("no *.safetensors file; an adapter without weights is none")


def check(files: Mapping[str, bytes | Path]) -> dict[str, Any]:
    """Every file of an adapter by its name; returns the parsed configuration. Raises ArtifactRefused for the first that may not be."""
    check_names(files)
    for name, source in sorted(files.items()):
        if isinstance(source, Path) and (source.is_symlink() or not source.is_file()):
            raise ArtifactRefused(f"{name}: a link or not a plain file; what it names may change after the check. Copy the file itself")
        size = source.stat().st_size if isinstance(source, Path) else len(source)
        start = _read(source, 0, 8)
        if start.startswith(_MAGIC) and not name.endswith(".safetensors"):
            raise ArtifactRefused(f"{name}: begins like a pickle or an archive; save the tensors as safetensors")
        if name.endswith(".safetensors"):
            _safetensors(name, source, size)
        elif name.endswith(".json") and name != CONFIG:
            _tokenizer(name, _read(source, 0, _limited(name, size)))
        elif name in _TEXT:
            _text(name, _read(source, 0, _limited(name, size)))
    return check_config(_read(files[CONFIG], 0, _JSON))


def check_folder(folder: Path) -> dict[str, Any]:
    """`check` of everything that lies in `folder`, hidden files and folders included."""
    return check({path.name: path for path in sorted(Path(folder).iterdir())})


def _read(source: bytes | Path, start: int, count: int) -> bytes:
    if isinstance(source, bytes):
        return source[start : start + count]
    with source.open("rb") as file:
        file.seek(start)
        return file.read(count)


def _limited(name: str, size: int) -> int:
    if size > _JSON:
        raise ArtifactRefused(f"{name}: {size} bytes, at most {_JSON} are read")
    return size


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a key given twice would be read one way here and another way elsewhere."""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key is given twice")
    return made


def _json(name: str, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_pairs)
    except (ValueError, RecursionError) as error:
        raise ArtifactRefused(f"{name}: not JSON: {error}; write it again") from None
    if not isinstance(value, dict):
        raise ArtifactRefused(f"{name}: a JSON object is expected; write it again")
    return value


def _text(name: str, data: bytes) -> None:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactRefused(f"{name}: byte {error.start} is not UTF-8; save it as UTF-8") from None


def _no_code(name: str, value: Any) -> None:
    """No key that names code and no path of somebody's machine, at any depth."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key in _CODE:
                raise ArtifactRefused(f"{name}: `{key}` can make a loader import code; remove it and load with the library's own classes")
            if key in _PLACES and item is not None and not (isinstance(item, str) and _REFERENCE.fullmatch(item)):
                raise ArtifactRefused(
                    f"{name}: `{key}` is {_short(item)}, a path of the machine that wrote it; use a hub id or sha256:<digest>"
                )
            _no_code(name, item)
    elif isinstance(value, list):
        for item in value:
            _no_code(name, item)


def _tokenizer(name: str, data: bytes) -> None:
    value = _json(name, data)
    if name == "tokenizer.json":
        if unknown := sorted(value.keys() - _TOKENIZER_KEYS):
            raise ArtifactRefused(f"{name}: unknown key `{unknown[0]}`; known: {', '.join(sorted(_TOKENIZER_KEYS))}")
    elif name in ("tokenizer_config.json", "special_tokens_map.json"):
        # the other files map tokens to numbers, and a token may be any word
        _no_code(name, value)


def _safetensors(name: str, source: bytes | Path, size: int) -> None:
    """The header, and that the tensors it lists are exactly the bytes that follow: nothing hidden between or behind them."""
    if size < 8:
        raise ArtifactRefused(f"{name}: {size} bytes are no safetensors file; save it again")
    (length,) = struct.unpack("<Q", _read(source, 0, 8))
    if length > min(_HEADER, size - 8):
        raise ArtifactRefused(f"{name}: its header claims {length} bytes of a file of {size}; this is not safetensors")
    header = _json(name, _read(source, 8, length))
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(value, str) for value in notes.values()):
        raise ArtifactRefused(f"{name}: `__metadata__` maps names to text; save it again")
    end = 0
    for tensor, said in sorted(header.items(), key=lambda item: _start(name, *item)):
        start, stop = said["data_offsets"]
        bits = math.prod(said["shape"]) * _DTYPES[said["dtype"]]
        if start != end or (stop - start) * 8 != bits:
            raise ArtifactRefused(
                f"{name}: tensor `{tensor}` lies at bytes {start} to {stop}, expected {end} to {end + bits // 8}; save it again"
            )
        end = stop
    if 8 + length + end != size:
        raise ArtifactRefused(f"{name}: {size - 8 - length - end} bytes beyond its tensors; save it again")


def _start(name: str, tensor: str, said: Any) -> tuple[int, int]:
    """Where a tensor begins and ends, after its entry is seen to be well formed."""
    if (
        isinstance(said, dict)
        and set(said) == {"dtype", "shape", "data_offsets"}
        and said["dtype"] in _DTYPES
        and isinstance(said["shape"], list)
        and all(_whole(item) and item >= 0 for item in said["shape"])
        and isinstance(said["data_offsets"], list)
        and len(said["data_offsets"]) == 2
        and all(_whole(item) and item >= 0 for item in said["data_offsets"])
    ):
        return said["data_offsets"][0], said["data_offsets"][1]
    raise ArtifactRefused(f"{name}: the header's entry of tensor `{tensor}` is {_short(said)}; save it again")
