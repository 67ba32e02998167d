"""Base models from folders and from a small hub on localhost: what is taken, what is refused, and what the document says."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models

from repro_assets import basemodel
from repro_assets.basemodel import (
    BaseModelError,
    chat_template,
    intake,
    restore,
    small_files,
    special_tokens,
)
from repro_assets.documents import BaseModel
from repro_assets.recipe import BaseModelSection
from repro_assets.trust.blob import BlobDamaged, FolderStore

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
TENSORS = {
    "embed": np.arange(48, dtype=np.float32).reshape(6, 8),
    "layer": np.ones((8, 8), dtype=np.float16),
    "scale": np.zeros((), dtype=np.float32),
}
SECTION = BaseModelSection(path="model", license="Apache-2.0")


def write_model(folder: Path, **config: Any) -> Path:
    """A model of 113 parameters and a vocabulary of six."""
    folder.mkdir(parents=True)
    save_file(TENSORS, folder / "model.safetensors")
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    tokenizer.add_special_tokens(["<pad>", "<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"eos_token": "<|end|>", "pad_token": {"content": "<pad>"}, "padding_side": "left"})
    write_json(
        folder / "config.json", {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 6, "eos_token_id": 4, **config}
    )
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "LICENSE").write_text("Apache License 2.0")
    return folder


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "blobs")


def taken(folder: Path, store: FolderStore) -> BaseModel:
    return intake(SECTION, folder, store)[0]


def test_a_folder_becomes_blobs_and_facts(folder: Path, store: FolderStore) -> None:
    said: list[str] = []
    model, facts = intake(SECTION, folder, store, said.append)
    assert model.model_files.keys() == {
        "LICENSE",
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert model.model_files["model.safetensors"].sha256 == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert (model.architecture, model.parameters, model.vocabulary) == ("LlamaForCausalLM", 48 + 64 + 1, 6)
    assert model.template == hashlib.sha256(TEMPLATE.encode()).hexdigest()
    assert model.source == {"kind": "folder"}, "a path identifies nothing"
    assert model.license == "Apache-2.0"
    assert model.floor["transformers"] == ">=5.5"
    assert model.floor["torch"] == ">=2.10"
    assert facts["origin"] == str(folder)
    assert facts["ignored"] == {}
    assert facts["seconds"] >= 0
    assert "base model: config.json (0.0 MB)" in said


def test_the_same_model_elsewhere_is_the_same_document(folder: Path, store: FolderStore, tmp_path: Path) -> None:
    again = write_model(tmp_path / "another place" / "model")
    assert taken(again, FolderStore(tmp_path / "other")) == taken(folder, store)


def test_restore_gives_the_files_back_verified(folder: Path, store: FolderStore, tmp_path: Path) -> None:
    model = taken(folder, store)
    restore(model.model_files, store, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }
    weights = store._path(model.model_files["model.safetensors"].sha256)
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(BlobDamaged):
        restore(model.model_files, store, tmp_path / "again")
    assert not (tmp_path / "again" / "model.safetensors").exists()
    with pytest.raises(BaseModelError, match="not a file of a base model"):
        restore({"../config.json": model.model_files["config.json"]}, store, tmp_path / "again")


def test_template_and_special_tokens_come_from_the_small_files(folder: Path, store: FolderStore) -> None:
    small = small_files(taken(folder, store).model_files, store)
    assert chat_template(small) == TEMPLATE
    assert special_tokens(small) == {"pad": 3, "eos": 4}
    assert "model.safetensors" not in small


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"chat_template": "x"}, "x"),
        ({"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}, "d"),
        ({}, ""),
    ],
)
def test_a_template_inside_the_tokenizer_config_is_found(config: dict[str, Any], expected: str) -> None:
    assert chat_template({"tokenizer_config.json": json.dumps(config).encode()}) == expected


def test_several_templates_without_a_default_are_refused() -> None:
    with pytest.raises(BaseModelError, match="none is named `default`"):
        chat_template({"tokenizer_config.json": json.dumps({"chat_template": [{"name": "rag", "template": "t"}]}).encode()})


@pytest.mark.parametrize(
    ("tokenizer_config", "config", "expected"),
    [
        ({"eos_token": "<|end|>"}, {}, {"pad": 4, "eos": 4}),
        ({}, {"eos_token_id": [4, 2], "pad_token_id": 0}, {"pad": 0, "eos": 4}),
        ({"eos_token": "<|end|>", "pad_token": "<pad>"}, {"eos_token_id": 2}, {"pad": 3, "eos": 4}),
    ],
)
def test_special_tokens_fall_back_in_order(
    folder: Path, tokenizer_config: dict[str, Any], config: dict[str, Any], expected: dict[str, int]
) -> None:
    files = {"tokenizer.json": (folder / "tokenizer.json").read_bytes()}
    files |= {"tokenizer_config.json": json.dumps(tokenizer_config).encode(), "config.json": json.dumps(config).encode()}
    assert special_tokens(files) == expected


def test_what_tokenising_depends_on_moves_the_tokenizer_digest_and_nothing_else_does(folder: Path, store: FolderStore) -> None:
    before = taken(folder, store)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", {**config, "padding_side": "right", "model_max_length": 10})
    assert taken(folder, store).tokenizer == before.tokenizer
    write_json(folder / "tokenizer_config.json", {**config, "add_bos_token": True})
    assert taken(folder, store).tokenizer != before.tokenizer
    (folder / "chat_template.jinja").write_text(TEMPLATE + " ")
    changed = taken(folder, store)
    assert changed.template != before.template


def test_other_files_are_left_out_with_a_reason(folder: Path, store: FolderStore) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02pickle")
    (folder / "modeling_custom.py").write_text("import os")
    (folder / "onnx").mkdir()
    save_file(TENSORS, folder / "consolidated.safetensors")
    model, facts = intake(SECTION, folder, store)
    assert facts["ignored"] == {
        "consolidated.safetensors": "not part of model.safetensors",
        "modeling_custom.py": "not on the list of files a model needs",
        "onnx/": "folders are not taken",
        "pytorch_model.bin": "weights in a format that can run code are never read",
    }
    assert not model.model_files.keys() & facts["ignored"].keys()
    assert model.parameters == 113


def test_shards_are_counted_through_their_index(folder: Path, store: FolderStore) -> None:
    (folder / "model.safetensors").unlink()
    save_file({"embed": TENSORS["embed"]}, folder / "model-00001-of-00002.safetensors")
    save_file({"layer": TENSORS["layer"]}, folder / "model-00002-of-00002.safetensors")
    index = {"embed": "model-00001-of-00002.safetensors", "layer": "model-00002-of-00002.safetensors"}
    write_json(folder / "model.safetensors.index.json", {"weight_map": index})
    assert taken(folder, store).parameters == 112
    write_json(folder / "model.safetensors.index.json", {"weight_map": {**index, "gone": "model-00002-of-00002.safetensors"}})
    with pytest.raises(BaseModelError, match=r"model-00002-of-00002\.safetensors: tensor 'gone' is in only one of"):
        taken(folder, store)
    write_json(folder / "model.safetensors.index.json", {"weight_map": {**index, "far": "model-00003-of-00003.safetensors"}})
    with pytest.raises(BaseModelError, match=r"model-00003-of-00003\.safetensors: missing, but model\.safetensors\.index\.json names it"):
        taken(folder, store)


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-10])


def lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")


def overlap(folder: Path) -> None:
    header = json.dumps(
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}
    )
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(12))


def other_tokenizer(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, "vocab_size": 4})


def no_end(folder: Path) -> None:
    write_json(folder / "tokenizer_config.json", {})
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {name: value for name, value in config.items() if name != "eos_token_id"})


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"config\.json: missing; a base model needs it"),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"tokenizer\.json: missing.*save_pretrained"),
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            r"model\.safetensors: missing, and there is no model\.safetensors\.index\.json",
        ),
        (only_pickles, r"pytorch_model\.bin: these weights can run code when they are loaded and are refused; convert them"),
        (cut, r"model\.safetensors: \d+ bytes, but its header speaks of \d+: the download broke off"),
        (lfs_pointer, r"model\.safetensors: \d+ bytes that are not a whole safetensors file \(or a Git LFS pointer"),
        (overlap, r"model\.safetensors: tensor 'b' \(F32 \[2\]\) lies at bytes 4 to 12, which cannot be"),
        (lambda folder: write_json(folder / "config.json", {"auto_map": {"AutoModel": "m.M"}}), r"config\.json: `auto_map` asks for code"),
        (
            lambda folder: write_json(folder / "tokenizer_config.json", {"auto_map": {"AutoTokenizer": "t.T"}}),
            r"tokenizer_config\.json: `auto_map`",
        ),
        (lambda folder: (folder / "config.json").write_text("{\n'x'"), r"config\.json:2: not JSON"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff{}"), r"config\.json: byte 0 is not UTF-8"),
        (lambda folder: (folder / "config.json").write_bytes(b""), r"config\.json: empty; download it again"),
        (lambda folder: write_json(folder / "config.json", {"architectures": [], "vocab_size": 6}), r"`architectures` must name one class"),
        (
            lambda folder: write_json(folder / "config.json", {"architectures": ["L"]}),
            r"`vocab_size` must be a whole number above 0, it is None",
        ),
        (lambda folder: (folder / "model.safetensors.incomplete").touch(), r"incomplete: a download that did not finish"),
        (
            lambda folder: write_json(folder / "tokenizer_config.json", {"eos_token": "</s>"}),
            r"`eos_token` is '</s>', which tokenizer\.json does not have",
        ),
        (other_tokenizer, r"token '<\|end\|>' has id 4, but config\.json has `vocab_size` 4: tokenizer and weights are of two models"),
        (no_end, r"no `eos_token`, and config\.json has no `eos_token_id`"),
    ],
)
def test_a_model_that_cannot_be_used_is_refused_by_file_reason_and_remedy(
    folder: Path, store: FolderStore, break_it: Any, message: str
) -> None:
    break_it(folder)
    with pytest.raises(BaseModelError, match=message):
        taken(folder, store)
    assert not store.root.exists(), "nothing is stored of a model that is refused"


def test_a_folder_that_is_not_there_names_the_recipe_key(tmp_path: Path, store: FolderStore) -> None:
    with pytest.raises(BaseModelError, match=r"no such folder; correct `base_model\.path`"):
        intake(SECTION, tmp_path / "nowhere", store)


def test_a_moving_revision_is_refused(store: FolderStore) -> None:
    with pytest.raises(BaseModelError, match="needs its full 40-digit commit hash; a branch or tag name moves"):
        intake(BaseModelSection(repo="org/tiny", revision="main"), None, store)


def test_importing_the_module_loads_no_model_library() -> None:
    heavy = "('torch', 'transformers', 'huggingface_hub', 'dagster')"
    code = f"import sys, repro_assets.basemodel; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# --- a small hub ------------------------------------------------------------------------------------------------------------------------

REVISION = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.ThreadingHTTPServer):
    """Serves one repository at one commit, as huggingface_hub asks for it. `lie`: file name to the bytes that are sent instead."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.folder, self.sha, self.lie, self.asked = folder, REVISION, dict[str, bytes](), list[str]()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class HubHandler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *arguments: Any) -> None:
        """Quiet."""

    def siblings(self) -> list[dict[str, Any]]:
        found = []
        for path in sorted(self.server.folder.iterdir()):
            data = path.read_bytes()
            entry: dict[str, Any] = {
                "rfilename": path.name,
                "size": len(data),
                "blobId": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(),
            }
            if path.suffix in (".safetensors", ".bin"):
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            found.append(entry)
        return found

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        if path == f"/api/models/org/tiny/revision/{REVISION}":
            self.answer(
                json.dumps({"id": "org/tiny", "sha": self.server.sha, "siblings": self.siblings(), "tags": []}).encode(),
                {"Content-Type": "application/json"},
            )
        elif (
            path.startswith(prefix := f"/org/tiny/resolve/{REVISION}/")
            and (file := self.server.folder / path.removeprefix(prefix)).exists()
        ):
            data = self.server.lie.get(file.name, file.read_bytes())
            self.answer(data, {"X-Repo-Commit": REVISION, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'})
        else:
            self.answer(b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"}, 404)

    def answer(self, data: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@pytest.fixture
def hub(folder: Path) -> Iterator[Hub]:
    server = Hub(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


FETCH = """
import json, sys
from pathlib import Path
import msgspec
from repro_assets import basemodel
from repro_assets.recipe import BaseModelSection
from repro_assets.trust.blob import FolderStore
try:
    section, store = BaseModelSection(repo=sys.argv[1], revision=sys.argv[2]), FolderStore(Path(sys.argv[3]))
    model, facts = basemodel.intake(section, None, store, lambda line: print(line, file=sys.stderr))
except basemodel.BaseModelError as error:
    print(json.dumps({"error": str(error)}))
else:
    print(json.dumps({"model": msgspec.to_builtins(model), "facts": facts}))
"""


def fetch(endpoint: str, tmp_path: Path, repo: str = "org/tiny", **environment: str) -> dict[str, Any]:
    """intake from a hub in a process of its own: huggingface_hub reads its settings when it is imported."""
    variables = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", **environment}
    done = subprocess.run(
        [sys.executable, "-c", FETCH, repo, REVISION, str(tmp_path / "hub-blobs")],
        check=False,
        env=variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_a_hub_commit_gives_what_the_same_folder_gives(hub: Hub, folder: Path, store: FolderStore, tmp_path: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    save_file(TENSORS, folder / "consolidated.safetensors")
    local = taken(folder, store)
    found = fetch(hub.url, tmp_path)
    assert {name: blob["sha256"] for name, blob in found["model"]["model_files"].items()} == {
        name: blob.sha256 for name, blob in local.model_files.items()
    }
    assert (found["model"]["tokenizer"], found["model"]["template"], found["model"]["parameters"]) == (local.tokenizer, local.template, 113)
    assert found["model"]["source"] == {"kind": "hub", "repo": "org/tiny", "revision": REVISION}
    assert found["facts"]["origin"] == f"{hub.url}/org/tiny at {REVISION}"
    fetched = {line.rsplit("/", 1)[1] for line in hub.asked if line.startswith("GET /org/")}
    assert fetched == set(local.model_files), "neither pickles nor a second copy of the weights are fetched"
    # What was fetched once is there without the network.
    offline = fetch("http://127.0.0.1:9", tmp_path, HF_HUB_OFFLINE="1")
    assert offline["model"] == found["model"]
    assert "local cache" in offline["facts"]["origin"]


def test_bytes_that_are_not_the_commits_are_found_and_named(hub: Hub, folder: Path, tmp_path: Path) -> None:
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    hub.lie["model.safetensors"] = bytes(weights)
    assert "model.safetensors: its bytes (" in (error := fetch(hub.url, tmp_path)["error"])
    assert "are not those of the commit" in error
    hub.lie = {"chat_template.jinja": b"{{ tampered }}"}
    assert "chat_template.jinja: its bytes (" in fetch(hub.url, tmp_path / "again")["error"]


def test_what_keeps_a_hub_model_away_is_said_with_a_remedy(hub: Hub, folder: Path, tmp_path: Path) -> None:
    assert (
        "set HF_HUB_OFFLINE=0 for the command that fetches it once, or give `base_model.path`"
        in fetch(hub.url, tmp_path, HF_HUB_OFFLINE="1")["error"]
    )
    assert "HTTP 404" in (error := fetch(hub.url, tmp_path, repo="org/none")["error"])
    assert "check `repo` and `revision`" in error
    assert "cannot be fetched: " in (error := fetch("http://127.0.0.1:9", tmp_path)["error"])
    assert "HF_ENDPOINT" in error
    hub.sha = "f" * 40
    assert "answered for commit ffff" in fetch(hub.url, tmp_path)["error"]
    hub.sha = REVISION
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "no file model.safetensors; only whole weights in safetensors are taken" in fetch(hub.url, tmp_path)["error"]


def test_only_names_of_the_list_are_allowed() -> None:
    for good in ("config.json", "model-00001-of-00002.safetensors", "tokenizer_config.json", "LICENSE.txt"):
        assert basemodel._is_allowed(good)
    for bad in ("../config.json", "a/model.safetensors", ".safetensors", "model.py", "config.json\n", "adapter_model.bin"):
        assert not basemodel._is_allowed(bad)
