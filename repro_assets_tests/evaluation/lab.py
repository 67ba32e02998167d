"""Everything a scoring job needs, made small and for real: a base model with random weights, adapters, a suite of two tasks, a store."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from safetensors.numpy import save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from repro_assets.evaluation.suites import intake
from repro_assets.recipe import SuiteSource
from repro_assets.trust import artifact
from repro_assets.trust.blob import Blob, FolderStore
from repro_assets.trust.canonical import digest

HIDDEN, LAYERS, HEADS, FFN, RANK = 64, 2, 4, 128, 4
SPECIAL = ("<pad>", "<|user|>", "<|assistant|>", "<|end|>")
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LETTERS = ("A", "B", "C", "D")

RANKING = """\
task: letters
dataset_path: json
dataset_kwargs: {data_files: {test: items.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "<|user|>{{ prompt }}<|end|><|assistant|>"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: letter
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
WRITING = """\
task: words
dataset_path: json
dataset_kwargs: {data_files: {test: items.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: prompt
doc_to_target: letter
generation_kwargs: {until: ["<|end|>"], do_sample: false, max_gen_toks: 6}
filter_list: [{name: first, filter: [{function: remove_whitespace}, {function: take_first}]}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {chat_template: true}
"""


def base_model() -> dict[str, bytes]:
    """Files of a random Llama and a byte-level tokenizer without merges."""
    generator = np.random.default_rng(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate([*SPECIAL, *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    size = tokenizer.get_vocab_size()

    def drawn(*shape: int) -> np.ndarray:
        return (generator.standard_normal(shape) * 0.2).astype(np.float32)

    tensors = {"model.embed_tokens.weight": drawn(size, HIDDEN), "model.norm.weight": np.ones(HIDDEN, np.float32)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        shapes = {f"self_attn.{side}_proj": (HIDDEN, HIDDEN) for side in "qkvo"}
        shapes |= {"mlp.gate_proj": (FFN, HIDDEN), "mlp.up_proj": (FFN, HIDDEN), "mlp.down_proj": (HIDDEN, FFN)}
        for name, shape in shapes.items():
            tensors[f"{at}.{name}.weight"] = drawn(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}.{name}.weight"] = np.ones(HIDDEN, np.float32)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": size, "hidden_size": HIDDEN, "intermediate_size": FFN,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "dtype": "float32", "bos_token_id": None, "eos_token_id": 3, "pad_token_id": 0,
    }  # fmt: skip
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "<|end|>", "chat_template": TEMPLATE}
    return {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": save(tensors, metadata={"format": "pt"}),
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(said).encode(),
    }


def adapter(seed: int | None, base: str, **changed: Any) -> dict[str, bytes]:
    """Files of a LoRA on q and v; random, or one that does nothing (`seed` None). `changed` goes into the configuration."""
    generator = np.random.default_rng(seed)
    tensors = {}
    for layer in range(LAYERS):
        for side in "qv":
            at = f"base_model.model.model.layers.{layer}.self_attn.{side}_proj"
            tensors[f"{at}.lora_A.weight"] = (generator.standard_normal((RANK, HIDDEN)) * 0.3).astype(np.float32)
            tensors[f"{at}.lora_B.weight"] = (generator.standard_normal((HIDDEN, RANK)) * (0.0 if seed is None else 0.5)).astype(np.float32)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **changed}
    return {
        artifact.CONFIG: artifact.clean_config(config, f"sha256:{base}"),
        "adapter_model.safetensors": save(tensors, metadata={"format": "pt"}),
    }


def items(count: int) -> list[dict[str, Any]]:
    generator = np.random.default_rng(9)
    return [
        {
            "id": f"i{number:03d}",
            "prompt": "".join(generator.choice(list("abcdefgh "), int(generator.integers(5, 30)))) + ".",
            "letter": LETTERS[int(generator.integers(4))],
            "colour": ("red", "blue")[number % 2],
            "source": f"s{number % 7}",
        }
        for number in range(count)
    ]


class Events:
    """The events of one job, in memory."""

    def __init__(self) -> None:
        self.written: list[dict[str, Any]] = []

    def emit(self, kind: str, **facts: Any) -> None:
        self.written.append({"kind": kind, **facts})

    def prior(self) -> list[dict[str, Any]]:
        return []


class Lab:
    """A store with a base model, adapters one and two, one that does nothing, and the suite of two tasks."""

    def __init__(self, root: Path, count: int = 40, tasks: Mapping[str, str] | None = None) -> None:
        self.root, self.store = root, FolderStore(root / "store")
        self.base = self.put(base_model())
        self.base_digest = digest({name: blob.sha256 for name, blob in self.base.items()})
        self.adapters = {name: self.put(adapter(seed, self.base_digest)) for name, seed in (("one", 1), ("two", 2), ("idle", None))}
        folder = root / "suite"
        folder.mkdir()
        for name, text in (tasks or {"letters.yaml": RANKING, "words.yaml": WRITING}).items():
            (folder / name).write_text(text)
        (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items(count)))
        self.source = SuiteSource(name="tiny", path="suite", labels=("colour",), cluster="source")
        self.suites, _ = intake([self.source], lambda relative: root / relative, self.store)

    def put(self, files: Mapping[str, bytes]) -> dict[str, Blob]:
        return {name: self.store.put_bytes(data) for name, data in files.items()}

    def job(self, candidate: Any = "one", baseline: Any = None, **changed: Any) -> dict[str, Any]:
        """A scoring job as the orchestrator writes it; a model is a name of `adapters`, files, or None."""
        suite = self.suites.suites[0]
        models = {
            key: self.adapters[value] if isinstance(value, str) else value
            for key, value in (("candidate", candidate), ("baseline", baseline))
        }
        job = {
            "purpose": "score",
            "base_model": self.base,
            "suites": [
                {
                    "name": suite.name,
                    "files": suite.suite_files,
                    "tasks": suite.tasks,
                    "labels": self.source.labels,
                    "cluster": self.source.cluster,
                }
            ],
            "models": models,
            "batch_size": 16,
            "seed": 1234,
            "compute_dtype": "float32",
            **changed,
        }
        return json.loads(msgspec.json.encode(job))
