"""Taking a base model in: from a local folder or a pinned hub commit into blobs, with the facts that its document states.

Nothing here loads a model or imports torch: headers and JSON say enough, and everything that could run code is refused. Writing the
files out again for a program is `restore`.
"""

import fnmatch
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from repro_assets.documents import BaseModel
from repro_assets.recipe import BaseModelSection
from repro_assets.trust.blob import Blob, BlobStore, named
from repro_assets.trust.canonical import digest, sha256

ALLOWED: Final = (
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "*.safetensors",
    "*.safetensors.index.json",
    "LICENSE*",
)
PICKLED: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pickle", "*.pkl", "*.msgpack", "*.h5")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CODE_KEYS: Final = ("auto_map", "custom_pipelines", "trust_remote_code")
# What changes the ids of a text, beside tokenizer.json itself.
TOKENIZING: Final = (
    "tokenizer_class",
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "legacy",
    "split_special_tokens",
    "extra_special_tokens",
    "additional_special_tokens",
)
# Older ones run code from config.json (transformers, CVE-2026-5241) or adapters (peft), or corrupt memory (torch, CVE-2026-24747).
FLOOR: Final = {
    "transformers": ">=5.5",
    "torch": ">=2.10",
    "peft": ">=0.21.2",
    "bitsandbytes": ">=0.50",
    "safetensors": ">=0.5",
    "tokenizers": ">=0.22",
}
HEADER_LIMIT: Final = 100 * 1024 * 1024
JSON_LIMIT: Final = 256 * 1024 * 1024
DTYPE_BITS: Final = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


class BaseModelError(Exception):
    """A base model that cannot be used; the message names the file, the reason and the remedy."""


def intake(
    section: BaseModelSection, folder: Path | None, store: BlobStore, progress: Callable[[str], None] | None = None
) -> tuple[BaseModel, dict[str, Any]]:
    """The model of `section` in `store`: its document's facts, and what is only worth showing.

    `folder` is where `section.path` leads; None means the hub's `section.repo` at `section.revision`, a full commit hash. The second
    value has `origin` (where it was read), `seconds`, and `ignored` (file name to why it was left out). Raises BaseModelError.
    """
    say = progress or (lambda line: None)
    began = time.monotonic()
    if folder is not None:
        source, origin = {"kind": "folder"}, str(folder)
    else:
        folder, origin = _from_hub(section, say)
        source = {"kind": "hub", "repo": str(section.repo), "revision": str(section.revision)}
    kept, ignored = _listing(folder)
    tensors = _weights(folder, kept, ignored)
    small = {name: _read(folder / name) for name in kept if not name.endswith(".safetensors")}
    config = _json(small, "config.json")
    _refuse_code(small)
    architecture, vocabulary = _architecture(config, folder)
    tokenizer = _check_tokenizer(small, vocabulary, folder)
    files: dict[str, Blob] = {}
    for name in sorted(kept):
        say(f"base model: {name} ({(folder / name).stat().st_size / 1e6:,.1f} MB)")
        files[name] = store.put_file(folder / name)
    model = BaseModel(
        model_files=named(files),
        architecture=architecture,
        parameters=sum(_elements(shape) for _, shape in tensors.values()),
        vocabulary=vocabulary,
        tokenizer=digest({"tokenizer.json": files["tokenizer.json"].sha256, "config": tokenizer}),
        template=sha256(chat_template(small).encode()),
        source=source,
        license=section.license,
        floor=dict(FLOOR),
    )
    return model, {"origin": origin, "seconds": round(time.monotonic() - began, 3), "ignored": ignored}


def restore(files: Mapping[str, Blob], store: BlobStore, folder: Path) -> None:
    """Writes `files` into `folder` under their names, every byte verified. Raises BaseModelError for a name that is not a plain one."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, blob in sorted(files.items()):
        if not _is_allowed(name):
            raise BaseModelError(f"{name!r} is not a file of a base model; allowed are {', '.join(ALLOWED)}")
        store.get_file(blob.sha256, folder / name)


def small_files(files: Mapping[str, Blob], store: BlobStore) -> dict[str, bytes]:
    """The files beside the weights (JSON, template, licence), for `chat_template` and `special_tokens`."""
    return {name: store.get_bytes(blob.sha256) for name, blob in sorted(files.items()) if not name.endswith(".safetensors")}


def chat_template(files: Mapping[str, bytes]) -> str:
    """The Jinja text of the model's chat template, empty when it has none. `files`: name to bytes, as `small_files` gives.

    `chat_template.jinja` comes before the field in `tokenizer_config.json`; of several named ones, `default`.
    """
    if "chat_template.jinja" in files:
        return _text("chat_template.jinja", files["chat_template.jinja"])
    found = _json(files, "tokenizer_config.json", {}).get("chat_template")
    if isinstance(found, list):
        found = next((item.get("template") for item in found if isinstance(item, dict) and item.get("name") == "default"), None)
        if found is None:
            raise BaseModelError(
                "tokenizer_config.json: several chat templates and none is named `default`: name one so, or save it as chat_template.jinja"
            )
    if found is not None and not isinstance(found, str):
        raise BaseModelError(
            f"tokenizer_config.json: `chat_template` is of type {type(found).__name__}, not text: save it as chat_template.jinja"
        )
    return found or ""


def special_tokens(files: Mapping[str, bytes]) -> dict[str, int]:
    """The ids `{"pad": ..., "eos": ...}`: as tokenizer_config.json or special_tokens_map.json names them, else as config.json does.

    A model without a padding token pads with its end token. Raises BaseModelError when there is no end token.
    """
    ids = _token_ids(_json(files, "tokenizer.json"))
    found = {name: _special(files, ids, f"{name}_token") for name in ("eos", "pad")}
    if found["eos"] is None:
        raise BaseModelError(
            "tokenizer_config.json: no `eos_token`, and config.json has no `eos_token_id`: training could not teach it to stop; set one"
        )
    pad = found["pad"]
    return {"pad": found["eos"] if pad is None else pad, "eos": found["eos"]}


# --- files --------------------------------------------------------------------------------------------------------------------------


def _is_allowed(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) is not None and any(fnmatch.fnmatchcase(name, pattern) for pattern in ALLOWED)


def _listing(folder: Path) -> tuple[set[str], dict[str, str]]:
    """The names to keep, and why each other one is left out. Raises BaseModelError for no such folder or a download under way."""
    if not folder.is_dir():
        raise BaseModelError(f"{folder}: no such folder; correct `base_model.path` in the recipe (it starts at the recipe's own folder)")
    kept: set[str] = set()
    ignored: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        if path.name.endswith((".incomplete", ".part", ".crdownload", ".tmp")):
            raise BaseModelError(f"{path}: a download that did not finish; finish or delete it, then import again")
        if path.is_dir():
            ignored[path.name + "/"] = "folders are not taken"
        elif any(fnmatch.fnmatchcase(path.name, pattern) for pattern in PICKLED):
            ignored[path.name] = "weights in a format that can run code are never read"
        elif not _is_allowed(path.name):
            ignored[path.name] = "not on the list of files a model needs"
        else:
            kept.add(path.name)
    pickles = [name for name, reason in ignored.items() if "run code" in reason]
    if pickles and not any(name.endswith(".safetensors") for name in kept):
        raise BaseModelError(
            f"{folder / pickles[0]}: these weights can run code when they are loaded and are refused; convert them once with "
            "`AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)` on a machine where you trust them, "
            f"or take a revision that has {WEIGHTS}"
        )
    for name in ("config.json", "tokenizer.json"):
        if name not in kept:
            remedy = "" if name == "config.json" else " (save it with `AutoTokenizer.from_pretrained(...).save_pretrained(...)`)"
            raise BaseModelError(f"{folder / name}: missing; a base model needs it{remedy}")
    return kept, ignored


def _weights(folder: Path, kept: set[str], ignored: dict[str, str]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every tensor. Drops from `kept` the safetensors that the index does not name (another format's copy)."""
    if INDEX in kept:
        index = _json({INDEX: _read(folder / INDEX)}, INDEX).get("weight_map")
        if not isinstance(index, dict) or not index or not all(isinstance(name, str) for name in index.values()):
            raise BaseModelError(f"{folder / INDEX}: no `weight_map` from tensor to file; download it again")
    elif WEIGHTS in kept:
        index = None
    else:
        raise BaseModelError(f"{folder / WEIGHTS}: missing, and there is no {INDEX}; only weights in safetensors are taken")
    shards = sorted(set(index.values())) if index else [WEIGHTS]
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for shard in shards:
        if shard not in kept:
            raise BaseModelError(f"{folder / shard}: missing, but {INDEX} names it; download it again")
        held = safetensors_header(folder / shard)
        if index and (astray := {name for name, file in index.items() if file == shard} ^ held.keys()):
            raise BaseModelError(f"{folder / shard}: tensor {min(astray)!r} is in only one of {INDEX} and the file; download both again")
        found.update(held)
    for name in [name for name in kept if name.endswith((".safetensors", ".index.json")) and name not in shards and name != INDEX]:
        kept.discard(name)
        ignored[name] = f"not part of {INDEX if index else WEIGHTS}"
    return found


def safetensors_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensor name to dtype (`F32`, `BF16`, ...) and shape, from the file's header.

    Raises BaseModelError when the file is not safetensors, or is not exactly as long as its header says (a broken download).
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, HEADER_LIMIT):
            raise BaseModelError(
                f"{path}: {size} bytes that are not a whole safetensors file (or a Git LFS pointer to one); download it again"
            )
        raw = file.read(length)
    try:
        header: dict[str, Any] = json.loads(raw)
        header.pop("__metadata__", None)
        found = {name: (str(item["dtype"]), tuple(int(n) for n in item["shape"])) for name, item in header.items()}
        spans = sorted((int(item["data_offsets"][0]), int(item["data_offsets"][1]), name) for name, item in header.items())
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise BaseModelError(
            f"{path}: its safetensors header cannot be read ({type(error).__name__}: {error}); download it again"
        ) from error
    at = 0
    for start, end, name in spans:
        dtype, shape = found[name]
        if start != at or end < start or (dtype in DTYPE_BITS and (end - start) * 8 != _elements(shape) * DTYPE_BITS[dtype]):
            raise BaseModelError(
                f"{path}: tensor {name!r} ({dtype} {list(shape)}) lies at bytes {start} to {end}, which cannot be; download it again"
            )
        at = end
    if size != 8 + length + at:
        raise BaseModelError(f"{path}: {size} bytes, but its header speaks of {8 + length + at}: the download broke off; download it again")
    return found


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count


def _read(path: Path) -> bytes:
    size = path.stat().st_size
    if size == 0:
        raise BaseModelError(f"{path}: empty; download it again")
    if size > JSON_LIMIT:
        raise BaseModelError(f"{path}: {size} bytes is more than any such file has ({JSON_LIMIT}); look what it is")
    return path.read_bytes()


def _text(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BaseModelError(f"{name}: byte {error.start} is not UTF-8; download it again") from None


def _json(files: Mapping[str, bytes], name: str, default: dict[str, Any] | None = None) -> dict[str, Any]:
    if name not in files:
        if default is not None:
            return default
        raise BaseModelError(f"{name}: missing; a base model needs it")
    try:
        found = json.loads(_text(name, files[name]))
    except json.JSONDecodeError as error:
        raise BaseModelError(f"{name}:{error.lineno}: not JSON: {error.msg}; download it again") from None
    if not isinstance(found, dict):
        raise BaseModelError(f"{name}: a JSON {type(found).__name__} where an object belongs; download it again")
    return found


# --- what config and tokenizer say ----------------------------------------------------------------------------------------------------


def _refuse_code(files: Mapping[str, bytes]) -> None:
    for name in sorted(files):
        if not name.endswith(".json") or name == "tokenizer.json":
            continue
        if key := next((key for key in CODE_KEYS if _json(files, name).get(key)), None):
            raise BaseModelError(
                f"{name}: `{key}` asks for code from the model's repository, which is never run; "
                "take a model that transformers knows by itself"
            )


def _architecture(config: dict[str, Any], folder: Path) -> tuple[str, int]:
    named_ones = config.get("architectures")
    if not isinstance(named_ones, list) or len(named_ones) != 1 or not isinstance(named_ones[0], str):
        raise BaseModelError(f"{folder / 'config.json'}: `architectures` must name one class, it is {named_ones!r}")
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    size = config.get("vocab_size", text.get("vocab_size") if text else None)
    if type(size) is not int or size < 1:
        raise BaseModelError(f"{folder / 'config.json'}: `vocab_size` must be a whole number above 0, it is {size!r}")
    return named_ones[0], size


def _check_tokenizer(files: Mapping[str, bytes], vocabulary: int, folder: Path) -> dict[str, Any]:
    """The fields of tokenizer_config.json that change ids. Raises BaseModelError when an id has no row in the embedding."""
    ids = _token_ids(_json(files, "tokenizer.json"))
    if not ids:
        raise BaseModelError(f"{folder / 'tokenizer.json'}: it has no vocabulary; save it again with its tokenizer")
    highest = max(ids, key=lambda token: ids[token])
    if ids[highest] >= vocabulary:
        raise BaseModelError(
            f"{folder / 'tokenizer.json'}: token {highest!r} has id {ids[highest]}, but config.json has `vocab_size` {vocabulary}: "
            "tokenizer and weights are of two models; take both from one revision"
        )
    special_tokens(files)
    config = _json(files, "tokenizer_config.json", {})
    return {name: _content(config[name]) for name in TOKENIZING if config.get(name) is not None}


def _token_ids(tokenizer: dict[str, Any]) -> dict[str, int]:
    """Every token of tokenizer.json and its id: its model's vocabulary (a map, or for Unigram a list of pairs) and the added ones."""
    vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
    try:
        pairs = {entry[0]: n for n, entry in enumerate(vocabulary)} if isinstance(vocabulary, list) else dict(vocabulary)
        added = {item["content"]: item["id"] for item in tokenizer.get("added_tokens") or []}
    except (KeyError, TypeError, IndexError) as error:
        raise BaseModelError(
            f"tokenizer.json: its vocabulary cannot be read ({type(error).__name__}: {error}); save it again with its tokenizer"
        ) from None
    return {**pairs, **added}


def _special(files: Mapping[str, bytes], ids: dict[str, int], name: str) -> int | None:
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _content(_json(files, file, {}).get(name))
        if token is not None:
            if token not in ids:
                raise BaseModelError(f"{file}: `{name}` is {token!r}, which tokenizer.json does not have; take both from one revision")
            return ids[token]
    value = _json(files, "config.json", {}).get(f"{name}_id")
    first = value[0] if isinstance(value, list) and value else value
    return first if type(first) is int and first >= 0 else None


def _content(token: Any) -> Any:
    """A token's text, which older files wrap as {"content": ...}."""
    return token["content"] if isinstance(token, dict) and "content" in token else token


# --- the hub --------------------------------------------------------------------------------------------------------------------------


def _from_hub(section: BaseModelSection, say: Callable[[str], None]) -> tuple[Path, str]:
    """The hub's files of one commit in huggingface_hub's own cache, checked against the digests that the hub lists, and where from."""
    repo, revision = section.repo, section.revision
    if not repo or not revision or not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise BaseModelError(
            f"base_model.revision is {revision!r}: the hub model {repo!r} needs its full 40-digit commit hash; a branch or tag name moves"
        )
    import huggingface_hub
    from huggingface_hub import constants, errors

    where = f"{constants.ENDPOINT}/{repo} at {revision}"
    if constants.HF_HUB_OFFLINE:
        try:
            found = huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=list(ALLOWED), local_files_only=True)
        except errors.LocalEntryNotFoundError:
            raise BaseModelError(
                f"{where}: not in the local hub cache, and HF_HUB_OFFLINE is set: set HF_HUB_OFFLINE=0 for the command that fetches it "
                "once, or give `base_model.path` with a folder that holds the files"
            ) from None
        return Path(found), f"{where} (local cache)"
    try:
        return _download(huggingface_hub, repo, revision, say), where
    except errors.GatedRepoError as error:
        raise BaseModelError(f"{where}: the model is gated; accept its terms on its page and set HF_TOKEN") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        said = " ".join(str(error).split())[:300]
        raise BaseModelError(f"{where}: HTTP {status}: {said}; check `repo` and `revision`, and HF_TOKEN for a private model") from error
    except (OSError, errors.HTTPError) as error:  # its HTTP library's own base class; which library that is has changed before
        said = " ".join(str(error).split())[:300]
        raise BaseModelError(
            f"{where}: cannot be fetched: {said}; check network, disk and HF_ENDPOINT, or give `base_model.path`"
        ) from error


def _download(hub: Any, repo: str, revision: str, say: Callable[[str], None]) -> Path:
    info = hub.HfApi().model_info(repo, revision=revision, files_metadata=True)
    if info.sha != revision:
        raise BaseModelError(f"{repo}: the hub answered for commit {info.sha} when {revision} was asked for; check HF_ENDPOINT")
    listed = {item.rfilename: item for item in info.siblings or [] if _is_allowed(item.rfilename)}
    if "config.json" not in listed:
        raise BaseModelError(f"{repo} at {revision}: no config.json, so this is not a model of transformers; check `base_model.repo`")

    def fetch(name: str) -> Path:
        size = listed[name].size
        say(f"base model: fetching {name}" + (f" ({size / 1e6:,.1f} MB)" if size else ""))
        path = Path(hub.hf_hub_download(repo, name, revision=revision))
        _check_download(path, listed[name])
        return path

    small = {name: fetch(name) for name in sorted(listed) if not name.endswith(".safetensors")}
    weights = {WEIGHTS}
    if INDEX in small:  # a repository may hold the weights a second time in another layout
        weights = set(_json({INDEX: _read(small[INDEX])}, INDEX).get("weight_map", {}).values())
    for name in sorted(weights):
        if name not in listed:
            raise BaseModelError(
                f"{repo} at {revision}: no file {name}; only whole weights in safetensors are taken, so choose a revision that has them"
            )
        fetch(name)
    return small["config.json"].parent


def _check_download(path: Path, item: Any) -> None:
    """The bytes against what the hub lists for the commit: SHA-256 for large files, Git's blob id for the others."""
    size = path.stat().st_size
    if item.lfs is not None:
        hasher, expected = hashlib.sha256(), item.lfs.sha256
    elif item.blob_id:
        hasher, expected = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False), item.blob_id
    else:
        raise BaseModelError(
            f"{path.name}: the hub lists no digest for it; use its own endpoint rather than a mirror that leaves digests out"
        )
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            hasher.update(chunk)
    if hasher.hexdigest() != expected:
        real = os.path.realpath(path)
        raise BaseModelError(
            f"{path.name}: its bytes ({hasher.hexdigest()[:16]}) are not those of the commit ({expected[:16]}): "
            f"delete {real} and fetch again"
        )
