"""The released adapter: what PEFT and safetensors really write passes, and each way to smuggle something in is refused by name."""

import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, save

from repro_assets.trust.artifact import ArtifactRefused, check, check_config, check_folder, clean_config
from repro_assets.trust.canonical import canonical, sha256

BASE = f"sha256:{sha256(b'base')}"
CONFIG: dict[str, Any] = {
    "base_model_name_or_path": BASE,
    "bias": "none",
    "inference_mode": True,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "peft_type": "LORA",
    "r": 16,
    "target_modules": ["k_proj", "q_proj"],
    "task_type": "CAUSAL_LM",
}
TENSORS = {
    "base_model.model.q.lora_A.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.zeros((0, 4), np.float16),
    "c": np.ones(3, np.int8),
}
WEIGHTS = save(TENSORS, metadata={"format": "pt"})


def adapter(**changed: bytes) -> dict[str, bytes]:
    """A complete adapter in memory; `changed` replaces or adds files (a dot is written as two underscores)."""
    files = {
        "adapter_config.json": canonical(CONFIG),
        "adapter_model.safetensors": WEIGHTS,
        "tokenizer.json": json.dumps(
            {"version": "1.0", "model": {"type": "BPE", "vocab": {"auto_map": 0, "/etc": 1}}, "added_tokens": []}
        ).encode(),
        "tokenizer_config.json": b'{"model_max_length": 2048, "tokenizer_class": "PreTrainedTokenizerFast", "name_or_path": null}',
        "special_tokens_map.json": b'{"pad_token": {"content": "<pad>"}}',
        "README.md": "# Adapter – größe\n".encode(),
    }
    return {**files, **{name.replace("__", "."): data for name, data in changed.items()}}


def test_a_real_adapter_passes_in_memory_and_in_a_folder(tmp_path: Path) -> None:
    assert check(adapter()) == CONFIG
    for name, data in adapter().items():
        (tmp_path / name).write_bytes(data)
    assert check_folder(tmp_path) == CONFIG


def test_what_peft_writes_is_released_clean_and_loads_again(tmp_path: Path) -> None:
    """PEFT writes some forty keys and a set in the order of its hashes; what is released is the few that say something, always alike."""
    import peft

    written = []
    for order in (["q_proj", "k_proj"], ["k_proj", "q_proj"]):
        folder = tmp_path / "-".join(order)
        made = peft.LoraConfig(
            r=16, lora_alpha=32, target_modules=order, task_type="CAUSAL_LM", base_model_name_or_path=str(tmp_path / "base")
        )
        made.save_pretrained(folder)
        written.append(clean_config(json.loads((folder / "adapter_config.json").read_bytes()), BASE))
        assert clean_config(made.to_dict(), BASE) == written[-1]
    assert written[0] == written[1]
    parsed = check_config(written[0])
    assert str(tmp_path) not in written[0].decode()
    (tmp_path / "adapter_config.json").write_bytes(written[0])
    again = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert (again.r, again.lora_alpha, sorted(again.target_modules), again.base_model_name_or_path) == (16, 32, ["k_proj", "q_proj"], BASE)
    assert parsed["peft_version"] == peft.__version__


def test_cleaning_drops_what_is_off_and_refuses_what_is_on() -> None:
    noisy = {
        **CONFIG,
        "target_modules": {"q_proj", "k_proj"},
        "megatron_core": "megatron.core",
        "eva_config": None,
        "use_new": False,
        "loftq_config": {},
    }
    assert clean_config({**noisy, "base_model_name_or_path": "/home/me/base", "revision": None, "rank_pattern": {}}, BASE) == canonical(
        CONFIG
    )
    for key, value in (
        ("megatron_core", "evil.module"),
        ("layer_replication", [[0, 4]]),
        ("arrow_config", {"top_k": 3}),
        ("init_lora_weights", "pissa"),
    ):
        with pytest.raises(ArtifactRefused, match=f"`{key}` is .* may not use it"):
            clean_config({**CONFIG, key: value}, BASE)
    with pytest.raises(ArtifactRefused, match="base_model_name_or_path"):
        clean_config(CONFIG, "/home/me/base")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("auto_map", {"AutoModel": "evil.Model"}),
        ("auto_mapping", {"parent_library": "os", "base_model_class": "system"}),
        ("megatron_core", "evil"),
        ("trust_remote_code", True),
        ("_attn_implementation_internal", "someone/kernel"),
        ("unknown", 1),
        ("unknown", None),
        ("peft_type", "PROMPT_TUNING"),
        ("task_type", None),
        ("r", 0),
        ("r", True),
        ("r", 16.5),
        ("lora_dropout", 1),
        ("bias", "some"),
        ("inference_mode", "yes"),
        ("target_modules", ".*"),
        ("target_modules", []),
        ("target_modules", ["(a+)+$"]),
        ("rank_pattern", {"(a+)+$": 4}),
        ("rank_pattern", {"q_proj": "4"}),
        ("layers_to_transform", [1, "2"]),
        ("revision", "main"),
        ("peft_version", "0.21@/home/me"),
        ("base_model_name_or_path", "/home/me/base"),
        ("base_model_name_or_path", "./base"),
        ("base_model_name_or_path", "../base"),
        ("base_model_name_or_path", "~/base"),
        ("base_model_name_or_path", "C:\\base"),
        ("base_model_name_or_path", "file:base"),
        ("base_model_name_or_path", "a/b/c"),
        ("base_model_name_or_path", ""),
        ("base_model_name_or_path", None),
    ],
)
def test_a_configuration_that_reaches_code_or_a_machine_is_refused_by_key(key: str, value: Any) -> None:
    with pytest.raises(ArtifactRefused, match=rf"adapter_config.json: .*`{key}`"):
        check(adapter(adapter_config__json=canonical({**CONFIG, key: value})))


@pytest.mark.parametrize("key", ["base_model_name_or_path", "lora_alpha", "peft_type", "r", "target_modules", "task_type"])
def test_a_configuration_without_what_loading_needs_is_refused(key: str) -> None:
    with pytest.raises(ArtifactRefused, match=f"`{key}` is missing"):
        check_config(canonical({name: value for name, value in CONFIG.items() if name != key}))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (json.dumps(CONFIG, indent=2).encode(), "not canonical"),
        (canonical(CONFIG).replace(b'"r":16', b'"r":16,"r":8'), "a key is given twice"),
        (b"[]", "a JSON object is expected"),
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_a_configuration_written_in_another_form_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(ArtifactRefused, match=said):
        check_config(data)


@pytest.mark.parametrize("name", ["adapter_model.bin", "training_args.bin", "optimizer.pt", "rng_state.PTH", "x.pkl", "model.ckpt"])
def test_a_pickle_is_refused_by_name(name: str) -> None:
    with pytest.raises(ArtifactRefused, match="a pickle runs code when it is loaded"):
        check({**adapter(), name: b"x"})


@pytest.mark.parametrize(
    "name",
    [
        *("modeling_evil.py", "config.json", ".git", "sub/adapter.safetensors", "../adapter.safetensors", ".hidden.safetensors"),
        *("/abs.safetensors", "a\n.safetensors", "adapter.safetensors\n"),
    ],
)
def test_any_file_outside_the_list_is_refused_by_name(name: str) -> None:
    """A file that no signature names must not travel along."""
    with pytest.raises(ArtifactRefused, match="not a file of a released adapter"):
        check({**adapter(), name: b"x"})


def test_weights_and_configuration_must_be_there() -> None:
    for name, said in (("adapter_config.json", "adapter_config.json is missing"), ("adapter_model.safetensors", "no .*safetensors file")):
        with pytest.raises(ArtifactRefused, match=said):
            check({other: data for other, data in adapter().items() if other != name})


def test_a_link_and_a_folder_are_refused(tmp_path: Path) -> None:
    for name, data in adapter().items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "extra.safetensors").symlink_to(tmp_path / "adapter_model.safetensors")
    with pytest.raises(ArtifactRefused, match=r"extra.safetensors: a link"):
        check_folder(tmp_path)
    (tmp_path / "extra.safetensors").unlink()
    (tmp_path / "extra.safetensors").mkdir()
    with pytest.raises(ArtifactRefused, match="not a plain file"):
        check_folder(tmp_path)


def test_a_pickle_under_an_allowed_name_is_refused(tmp_path: Path) -> None:
    """The name is only a name: torch.load and joblib look at the bytes."""
    for protocol in (2, 4, 5):
        with pytest.raises(ArtifactRefused, match=r"README.md: begins like a pickle"):
            check(adapter(README__md=pickle.dumps({"a": 1}, protocol=protocol)))
    archive = tmp_path / "model.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("data.pkl", pickle.dumps(1))
    with pytest.raises(ArtifactRefused, match=r"README.md: begins like a pickle or an archive"):
        check(adapter(README__md=archive.read_bytes()))
    for data in (pickle.dumps({"a": 1}), archive.read_bytes()):
        with pytest.raises(ArtifactRefused, match=r"adapter_model.safetensors: its header claims"):
            check(adapter(adapter_model__safetensors=data))


def header(tensors: Any, body: bytes = b"") -> bytes:
    text = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + body


GOOD = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "0 bytes are no safetensors file"),
        (struct.pack("<Q", 2**63) + b"{}", "header claims"),
        (WEIGHTS + b"x", "1 bytes beyond its tensors"),
        (WEIGHTS[:-1], "-1 bytes beyond its tensors"),
        (header(b"[]"), "a JSON object is expected"),
        (header(b'{"a":{},"a":{}}'), "given twice"),
        (header({"__metadata__": {"a": {"b": "c"}}}), "maps names to text"),
        (header({"a": {**GOOD, "dtype": "PICKLE"}}, b"0000"), "entry of tensor `a`"),
        (header({"a": {**GOOD, "extra": 1}}, b"0000"), "entry of tensor `a`"),
        (header({"a": {**GOOD, "shape": [-1]}}, b"0000"), "entry of tensor `a`"),
        (header({"a": {**GOOD, "shape": [2]}}, b"0000"), "tensor `a` lies at"),
        (header({"a": GOOD, "b": GOOD}, b"0000"), "tensor `b` lies at bytes 0 to 4, expected 4 to 8"),
        (header({"a": GOOD, "b": {**GOOD, "data_offsets": [8, 12]}}, b"0" * 12), "tensor `b` lies at bytes 8 to 12, expected 4 to 8"),
    ],
)
def test_a_file_that_only_looks_like_safetensors_is_refused(data: bytes, said: str) -> None:
    """Nothing may lie between, behind or on top of the tensors: bytes that no tensor names are bytes nobody looked at."""
    with pytest.raises(ArtifactRefused, match=f"adapter_model.safetensors: .*{said}"):
        check(adapter(adapter_model__safetensors=data))


ARRAYS = st.dictionaries(
    st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=6),
    st.tuples(st.sampled_from(["float32", "float16", "int64", "uint8", "bool"]), st.lists(st.integers(0, 3), max_size=3)),
    min_size=1,
    max_size=5,
)


@given(ARRAYS)
def test_whatever_the_library_saves_is_accepted(described: dict[str, tuple[str, list[int]]]) -> None:
    data = save({name: np.ones(shape, dtype) for name, (dtype, shape) in described.items()})
    check(adapter(adapter_model__safetensors=data))


@given(st.integers(0, len(WEIGHTS) - 1), st.integers(0, 255))
def test_a_changed_byte_is_refused_or_still_reads_as_the_same_layout(place: int, value: int) -> None:
    """Our reading of the header is never more lenient than the library's own; the bytes of a tensor are the digest's to guard."""
    changed = bytearray(WEIGHTS)
    changed[place] = value
    try:
        check(adapter(adapter_model__safetensors=bytes(changed)))
    except ArtifactRefused:
        return
    assert sum(array.nbytes for array in load(bytes(changed)).values()) == sum(array.nbytes for array in TENSORS.values())


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("tokenizer_config.json", b'{"auto_map": {"AutoTokenizer": ["evil.T", null]}}', "`auto_map` can make a loader import code"),
        ("tokenizer_config.json", b'{"deep": [{"auto_map": 1}]}', "`auto_map`"),
        ("tokenizer_config.json", b'{"name_or_path": "/home/me/base"}', "`name_or_path` is '/home/me/base', a path of the machine"),
        ("tokenizer_config.json", b'{"a": 1, "a": 2}', "given twice"),
        ("special_tokens_map.json", b"{", "not JSON"),
        ("tokenizer.json", b'{"model": {}, "code": "x"}', "unknown key `code`"),
        ("README.md", b"\xff\xfe", "byte 0 is not UTF-8"),
    ],
)
def test_a_tokenizer_or_card_that_reaches_code_or_a_machine_is_refused(name: str, data: bytes, said: str) -> None:
    with pytest.raises(ArtifactRefused, match=f"{name}: .*{said}"):
        check({**adapter(), name: data})
