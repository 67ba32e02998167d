"""The program that made the demo's base model: BPE tokenizer and a three-layer Llama of 721,792 parameters, from scratch.

Run it to make the shipped files again, byte for byte on the same processor family and locked packages (about two minutes):
`python -m repro_assets.demo.train_base FOLDER`. The graph never imports it; it reads `base_model/` like any other model folder.
"""

import argparse
import hashlib
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from repro_assets.demo.tickets import corpus

DOCUMENTS = 20_000
VOCABULARY = 1024
PAD, USER, ASSISTANT, END = SPECIAL = ("<pad>", "<|user|>", "<|assistant|>", "<|end|>")
ROW_TOKENS = 256
ROWS_A_STEP = 8
LEARNING_RATE = 3e-3
SEED = 0
IGNORED = -100

# The generation marks tell apply_chat_template (and our renderer) exactly which text the assistant says, its end mark included.
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}<|end|>"
    "{% elif message['role'] == 'assistant' %}<|assistant|>{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ raise_exception('this template knows the roles user and assistant, not ' + message['role']) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SHIPPED = ("chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


class Rows(NamedTuple):
    """Packed documents, each tensor (rows, ROW_TOKENS): token ids, labels (IGNORED where no loss is) and positions within a document."""

    ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor


def texts(documents: int) -> list[str]:
    """The corpus as the model reads it, one string a conversation."""
    return [
        "".join(f"{USER if turn['role'] == 'user' else ASSISTANT}{turn['content']}{END}" for turn in turns) for turns in corpus(documents)
    ]


def train_tokenizer(documents: list[str]) -> Tokenizer:
    """Byte-level BPE; digits stand alone, so that numbers cost no vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def tokenizer_of(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers loads it, with the chat template."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, additional_special_tokens=[USER, ASSISTANT], padding_side="left"
    )
    fast.chat_template = TEMPLATE
    return fast


def packed(documents: list[list[int]]) -> Rows:
    """Documents in order into rows of ROW_TOKENS; positions restart at each one, which is what keeps them from seeing each other."""
    rows: list[tuple[list[int], list[int], list[int]]] = []
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []

    def close() -> None:
        room = ROW_TOKENS - len(ids)
        rows.append((ids + [0] * room, labels + [IGNORED] * room, positions + list(range(room))))

    for document in documents:
        document = document[:ROW_TOKENS]
        if len(ids) + len(document) > ROW_TOKENS:
            close()
            ids, labels, positions = [], [], []
        ids += document
        labels += [IGNORED, *document[1:]]
        positions += range(len(document))
    close()
    return Rows(*(torch.tensor(column) for column in zip(*rows, strict=True)))


def new_model(vocabulary: int) -> LlamaForCausalLM:
    """Weights drawn from SEED. 2,048 positions cost no parameter (rotary) and let the same model read longer public data."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=SPECIAL.index(END),
    )
    return LlamaForCausalLM(config).train()


def train(model: LlamaForCausalLM, rows: Rows, steps: int | None = None) -> list[float]:
    """One pass over `rows` in an order drawn from SEED (or the first `steps` of it); the loss of every step, in nats a token."""
    whole = len(rows.ids) // ROWS_A_STEP
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=whole, pct_start=0.1)
    order = torch.randperm(len(rows.ids), generator=torch.Generator().manual_seed(SEED))
    losses, began = [], time.monotonic()
    for step in range(whole if steps is None else min(steps, whole)):
        batch = order[step * ROWS_A_STEP : (step + 1) * ROWS_A_STEP]
        output = model(input_ids=rows.ids[batch], position_ids=rows.positions[batch], labels=rows.labels[batch], use_cache=False)
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(output.loss.item())
        if (step + 1) % 50 == 0 or step + 1 == whole:
            print(f"step {step + 1}/{whole}  loss {losses[-1]:.3f}  {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return losses


def make(folder: Path, documents: int = DOCUMENTS, steps: int | None = None) -> dict[str, str]:
    """Train tokenizer and model into `folder`; SHA-256 of every file by its name."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    conversations = texts(documents)
    tokenizer = train_tokenizer(conversations)
    tokenizer_of(tokenizer).save_pretrained(folder)
    model = new_model(tokenizer.get_vocab_size())
    train(model, packed([encoding.ids for encoding in tokenizer.encode_batch(conversations)]), steps)
    model.save_pretrained(folder)
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in SHIPPED}


def main() -> None:
    """Write the model's files into a new folder and print their digests in the form of `base_model.sha256`."""
    parser = argparse.ArgumentParser(description="Train the demo's base model from scratch.")
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    if folder.exists() and any(folder.iterdir()):
        parser.error(f"{folder} is not empty; name a new folder")
    os.environ["HF_HUB_OFFLINE"] = "1"
    for name, digest in make(folder).items():
        print(f"{digest}  {name}")


if __name__ == "__main__":
    main()
