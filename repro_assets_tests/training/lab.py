"""Everything a training job needs, made small and for real: a base model, token leaves, a signed bundle, a store, events, ranks.

Imports no torch, so that the test process stays light; the ranks are processes of their own (`node.py`).
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from safetensors.numpy import save
from securesystemslib.signer import CryptoSigner

from repro_assets.data import leaves
from repro_assets.recipe import Lora, TrainingSection
from repro_assets.trust import signing, statements
from repro_assets.trust.blob import Blob, FolderStore
from repro_assets.trust.canonical import sha256
from repro_assets.trust.verification import Trust

VOCABULARY, HIDDEN, LAYERS, HEADS, KV, FFN = 256, 64, 2, 4, 2, 128

SECTION = TrainingSection(
    seed=7, steps=12, row_tokens=64, rows=2, micro_batches=4, learning_rate=4e-3, warmup=0.2, lora=Lora(rank=8, alpha=16, dropout=0.05),
    checkpoint_every=4, validate_every=3, validation_rows=6, compute_dtype="float32",
)  # fmt: skip


def llama(seed: int = 0) -> dict[str, bytes]:
    """Files of a Llama with random weights, written without torch."""
    generator = np.random.default_rng(seed)

    def drawn(*shape: int) -> np.ndarray:
        return (generator.standard_normal(shape) * 0.06).astype(np.float32)

    tensors = {"model.embed_tokens.weight": drawn(VOCABULARY, HIDDEN), "model.norm.weight": np.ones(HIDDEN, np.float32)}
    width = HIDDEN // HEADS
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for name, shape in {
            "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KV * width, HIDDEN), "self_attn.v_proj": (KV * width, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (FFN, HIDDEN), "mlp.up_proj": (FFN, HIDDEN),
            "mlp.down_proj": (HIDDEN, FFN),
        }.items():  # fmt: skip
            tensors[f"{at}.{name}.weight"] = drawn(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}.{name}.weight"] = np.ones(HIDDEN, np.float32)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": HIDDEN,
        "intermediate_size": FFN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "dtype": "float32",
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    return {"config.json": json.dumps(config).encode(), "model.safetensors": save(tensors, metadata={"format": "pt"})}


def leaf(seed: int, records: int) -> leaves.Leaf:
    """Records of 8 to 40 tokens whose second half is trained: each of its tokens repeats one of the first half, so it can be learned."""
    generator = np.random.default_rng(seed)
    ids, spans = [], []
    for _ in range(records):
        half = generator.integers(3, 40, int(generator.integers(4, 20)))
        ids.append(np.concatenate([half, half]).astype(np.uint16))
        spans.append(np.array([[len(half), 2 * len(half)]], np.uint32))
    names = [bytes.fromhex(sha256(b"%d:%d" % (seed, index))) for index in range(records)]
    return leaves.make(names, [None] * records, [{}] * records, ids, spans, [0] * records, 2)


class Lab:
    """A store with a base model and leaves, and a trusted builder's key."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = FolderStore(root / "store")
        self.signer = CryptoSigner.generate_ed25519()
        self.trust = Trust(1, dict([signing.public_key(self.signer, ("builder",), name="the builder")]))
        self.base = {name: self.store.put_bytes(data) for name, data in llama().items()}
        self.leaves = [
            self._leaf(seed, split, records) for seed, split, records in ((1, "train", 150), (2, "train", 90), (3, "validation", 40))
        ]

    def _leaf(self, seed: int, split: str, records: int) -> dict[str, Any]:
        made = leaf(seed, records)
        stored = self.store.put_bytes(leaves.store_form(made))
        return {
            "sha256": leaves.identity(made),
            "stored": builtins(stored),
            "split": split,
            "records": records,
            "tokens": sum(map(len, made.ids)),
        }

    def bundle(self, section: TrainingSection, signer: CryptoSigner | None = None, base: Mapping[str, Blob] | None = None) -> Blob:
        subjects = {f"leaves/{item['split']}/{item['sha256']}": item["sha256"] for item in self.leaves}
        subjects["recipe"] = section.digest()
        statement = statements.provenance(
            statements.BUNDLE,
            subjects,
            parameters={"recipe": {"training": section.identity()}},
            dependencies=[statements.descriptor(f"base_model/{name}", blob.sha256) for name, blob in (base or self.base).items()],
            builder="https://example.org/builder",
            invocation="a-run",
        )
        return self.store.put_bytes(signing.sign(statement, signer or self.signer))

    def job(self, section: TrainingSection = SECTION, base: Mapping[str, Blob] | None = None, **changes: Any) -> dict[str, Any]:
        job = {
            "purpose": "train",
            "bundle": self.bundle(section, base=base).sha256,
            "trust": msgspec.to_builtins(self.trust),
            "section": section.identity(),
            "compute_dtype": "float32",
            "leaves": self.leaves,
            "base_model": {name: builtins(blob) for name, blob in (base or self.base).items()},
            "special": {"pad": 0, "eos": 2},
            "resume": None,
            "stop_after": None,
        }
        return {**job, **changes}

    def flip(self, digest: str, at: int = -20) -> bytes:
        """Flip one bit of a stored blob; returns what it was."""
        path = self.store._path(digest)
        before = path.read_bytes()
        changed = bytearray(before)
        changed[at] ^= 1
        path.write_bytes(bytes(changed))
        return before

    def mend(self, digest: str, data: bytes) -> None:
        self.store._path(digest).write_bytes(data)


def builtins(blob: Blob) -> dict[str, Any]:
    return {"sha256": blob.sha256, "size": blob.size}


class FolderEvents:
    """The events of one job as numbered files; the same rule as on S3: n counts on over restarts."""

    def __init__(self, folder: Path, writes: bool = True) -> None:
        self.folder, self.writes = folder, writes
        folder.mkdir(parents=True, exist_ok=True)

    def prior(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_bytes()) for path in sorted(self.folder.glob("*.json"))]

    def emit(self, kind: str, **facts: Any) -> None:
        if self.writes:
            count = len(list(self.folder.glob("*.json")))
            scratch = self.folder / ".part"
            scratch.write_bytes(msgspec.json.encode({"kind": kind, **facts}))
            scratch.rename(self.folder / f"{count:08d}.json")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


NODE = Path(__file__).with_name("node.py")


def start(lab: Lab, scenarios: list[dict[str, Any]], ranks: int = 1) -> list[subprocess.Popen[str]]:
    """Start `ranks` processes that run `scenarios` one after the other. A scenario: name, job, and faults that node.py knows."""
    plan = lab.root / f"plan-{scenarios[0]['name']}-{ranks}.json"
    numbered = [{**scenario, "port": free_port()} for scenario in scenarios]
    plan.write_bytes(msgspec.json.encode({"store": str(lab.store.root), "root": str(lab.root), "scenarios": numbered}))
    processes = []
    for rank in range(ranks):
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "REPRO_WANDB": "off"}
        if ranks > 1:
            variables |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
            }  # fmt: skip
        processes.append(
            subprocess.Popen(
                [sys.executable, str(NODE), str(plan)], env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )
    return processes


def finish(
    lab: Lab, scenarios: list[dict[str, Any]], processes: list[subprocess.Popen[str]], timeout: float = 450
) -> dict[str, dict[str, Any]]:
    """Wait for the ranks; outcomes of rank 0 by scenario. Raises AssertionError with the ranks' output when one ended badly."""
    texts = []
    try:
        for process in processes:
            texts.append(process.communicate(timeout=timeout)[0])
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()
    codes = [process.returncode for process in processes]
    assert codes == [0] * len(codes), f"ranks ended with {codes}\n" + "\n".join(texts)
    return {item["name"]: outcome(lab, item["name"]) for item in scenarios}


def run(lab: Lab, scenarios: list[dict[str, Any]], ranks: int = 1) -> dict[str, dict[str, Any]]:
    return finish(lab, scenarios, start(lab, scenarios, ranks))


def outcome(lab: Lab, name: str, rank: int = 0) -> dict[str, Any]:
    """What `program.run` returned on `rank`, or {"status": "refused", "error", "message"}."""
    found: dict[str, Any] = json.loads((lab.root / "outcomes" / f"{name}-{rank}.json").read_bytes())
    return found


def events(lab: Lab, key: str) -> list[dict[str, Any]]:
    return FolderEvents(lab.root / "jobs" / key).prior()
