"""Checks that need the real model: each runs inside a rank process (`node.py`) and returns facts that a test asserts.

Imports torch; the tests that read the facts do not.
"""

import tempfile
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file

from repro_assets.recipe import TrainingSection
from repro_assets.training import batches, determinism, exchange, loop, model
from repro_assets.training.job import Job, TrainingError, parse
from repro_assets.training.preemption import Preemption
from repro_assets.trust.blob import BlobStore

Facts = dict[str, Any]


def trainer(job: Job, store: BlobStore, section: TrainingSection) -> loop.Trainer:
    """A trainer on the job's model and data with another section, alone."""
    determinism.prepare()
    world = exchange.join()
    determinism.settle()
    with tempfile.TemporaryDirectory() as folder:
        model.fetch(store, job.base_model, Path(folder))
        base = model.load_base(Path(folder), section, torch.float32, world.device)
    network = model.attach_adapter(base, section)
    course = batches.load(msgspec.structs.replace(job, section=section), store)
    return loop.Trainer(network, course, section, torch.float32, world, Preemption(), lambda *_, **__: None)


def oracle(job: Job, store: BlobStore) -> Facts:
    """Losses and weights of our loop and of transformers.Trainer on the same rows, five steps each."""
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainingArguments

    section = msgspec.structs.replace(
        job.section, schedule="constant", warmup=0.0, lora=msgspec.structs.replace(job.section.lora, dropout=0.0), steps=None
    )
    ours = trainer(job, store, section)
    for number in range(1, 6):
        ours.one(number)
    theirs = trainer(job, store, section)
    rows, count = theirs.course.epochs[0], 5 * section.rows * section.micro_batches
    items = []
    for index in range(count):
        batch = rows.batch([index])
        labels = torch.full_like(batch.targets, batches.IGNORED)
        labels[:, 1:] = batch.targets[:, :-1]
        items.append({"input_ids": batch.input_ids[0], "position_ids": batch.position_ids[0], "labels": labels[0]})
    losses: list[float] = []

    class Oracle(Trainer):
        def _get_train_sampler(self, *_: Any, **__: Any) -> SequentialSampler:
            return SequentialSampler(items)

        def training_step(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
            loss = super().training_step(*arguments, **keywords)
            losses.append(float(loss))
            return loss

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=5, per_device_train_batch_size=section.rows, gradient_accumulation_steps=section.micro_batches,
            learning_rate=section.learning_rate, lr_scheduler_type="constant", warmup_steps=0, max_grad_norm=section.clip, weight_decay=0.0,
            optim="adamw_torch", use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
            remove_unused_columns=False, dataloader_num_workers=0, seed=section.seed,
        )  # fmt: skip
        Oracle(model=theirs.network, args=arguments, train_dataset=items).train()
    width = section.micro_batches
    curve = [sum(losses[start : start + width]) for start in range(0, len(losses), width)]
    mine, other = model.trainable(ours.network), model.trainable(theirs.network)
    return {
        "ours": [row["loss"] for row in ours.progress.rows],
        "theirs": curve,
        "weights": max(float((mine[name] - other[name]).detach().abs().max()) for name in mine),
        "moved": max(float(parameter.detach().abs().max()) for name, parameter in mine.items() if "lora_B" in name),
    }


def accumulation(job: Job, store: BlobStore) -> Facts:
    """The gradient of M micro-batches against that of one batch with all their rows."""
    section = msgspec.structs.replace(job.section, lora=msgspec.structs.replace(job.section.lora, dropout=0.0))
    whole = msgspec.structs.replace(section, rows=section.rows * section.micro_batches, micro_batches=1)
    found = []
    for one in (section, whole):
        subject = trainer(job, store, one)
        with torch.no_grad():
            for name, parameter in model.trainable(subject.network).items():
                if ".lora_B." in name:
                    parameter.fill_(0.01)
        total, _ = subject.gradient(subject.course.step(1))
        found.append(total.clone())
    gradient = found[1][:-1]
    return {
        "difference": float((found[0][:-1] - gradient).abs().max()),
        "largest": float(gradient.abs().max()),
        "losses": [float(total[-1]) for total in found],
    }


def isolation(job: Job, store: BlobStore) -> Facts:
    """What the probe says of the model as it is, and of one that is handed an attention mask; and a document alone against packed."""
    subject = trainer(job, store, job.section)
    network, device = subject.network, subject.world.device
    model.check_isolation(network, torch.float32, device)
    rows = subject.course.epochs[0]
    index = next(number for number, row in enumerate(rows.rows) if len(row) > 1)
    second = rows.rows[index][1]
    start, length = int(rows.corpus.lengths[rows.rows[index][0]]), int(rows.corpus.lengths[second])
    alone = batches.Rows(rows.corpus, [[second]], rows.row_tokens, 0).batch([0])
    packed = rows.batch([index])
    network.eval()
    with torch.no_grad():
        separate = network(input_ids=alone.input_ids, position_ids=alone.position_ids, use_cache=False).logits[0, :length]
        together = network(input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False).logits[0, start : start + length]
    forward = network.forward

    def masked(**inputs: Any) -> Any:
        return forward(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]))

    network.forward = masked  # type: ignore[method-assign]
    try:
        model.check_isolation(network, torch.float32, device)
        refusal = ""
    except TrainingError as error:
        refusal = str(error)
    return {"difference": float((separate - together).abs().max()), "refusal": refusal}


def base_guard(job: Job, store: BlobStore) -> Facts:
    """Digest of the quantised base before and after forward passes in both modes, and after one stored byte is changed."""
    subject = trainer(job, store, job.section)
    before = model.base_digest(subject.network)
    subject.one(1)
    subject.validate()
    after = model.base_digest(subject.network)
    weight = next(parameter for parameter in subject.network.parameters() if parameter.dtype is torch.uint8)
    with torch.no_grad():
        weight.view(-1)[0] ^= 1
    return {"before": before, "after": after, "changed": model.base_digest(subject.network), "training": subject.network.training}


def strict_keys(job: Job, store: BlobStore) -> Facts:
    """What loading and checking an adapter say to a missing key, an unknown key, another shape, another dtype, and a dead layer."""
    subject = trainer(job, store, job.section)
    good = model.snapshot(model.trainable(subject.network))
    first = next(iter(good))
    cases = {
        "missing": {name: tensor for name, tensor in good.items() if name != first},
        "unknown": {**good, "other.lora_A.weight": torch.ones(1)},
        "shape": {**good, first: good[first][:1]},
        "dtype": {**good, first: good[first].half()},
    }
    said: Facts = {}
    for name, tensors in cases.items():
        try:
            model.restore(subject.network, tensors, "checkpoint x")
            said[name] = ""
        except TrainingError as error:
            said[name] = str(error)
    try:
        model.check_trained(good)
        said["dead"] = ""
    except TrainingError as error:
        said["dead"] = str(error)
    model.restore(subject.network, {name: tensor + 1 for name, tensor in good.items()}, "checkpoint x")
    model.check_trained(model.snapshot(model.trainable(subject.network)))
    return said


def loaders(job: Job, store: BlobStore) -> Facts:
    """Llama, Qwen and Mistral classes with random weights through the one code path: quantised, adapted, isolated, trained a step."""
    from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    shared = {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128,
    }  # fmt: skip
    found: Facts = {}
    for kind in (LlamaConfig, Qwen2Config, Qwen3Config, MistralConfig):
        torch.manual_seed(0)
        config = kind(**shared)
        with tempfile.TemporaryDirectory() as folder:
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
            files = {path.name: store.put_file(path) for path in Path(folder).iterdir()}
        section = msgspec.structs.replace(job.section, activation_checkpointing=kind is Qwen2Config)
        subject = trainer(msgspec.structs.replace(job, base_model=files, section=section), store, section)
        model.check_isolation(subject.network, torch.float32, subject.world.device)
        subject.one(1)
        subject.one(2)
        tensors = model.snapshot(model.trainable(subject.network))
        model.check_trained(tensors)
        found[config.model_type] = {"keys": len(tensors), "loss": subject.progress.rows[0]["loss"], "few_logits": subject.few_logits}
    return found


def reload(job: Job, store: BlobStore, result: Facts) -> Facts:
    """The released files through PEFT's own loader on a fresh base: validation loss there against the best one of the run."""
    from peft import PeftModel

    section = job.section
    subject = trainer(job, store, section)
    with tempfile.TemporaryDirectory() as folder:
        for name, blob in result["adapter"].items():
            store.get_file(blob["sha256"], Path(folder) / name)
        config = (Path(folder) / "adapter_config.json").read_text()
        model.fetch(store, job.base_model, Path(folder))
        base = model.load_base(Path(folder), section, torch.float32, subject.world.device)
        subject.network = PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=False)
    return {"loss": subject.validate(), "config": config}


def bad_base(job: Job, store: BlobStore) -> Facts:
    """A base model without safetensors, and one whose files are not a model."""
    said: Facts = {}
    with tempfile.TemporaryDirectory() as folder:
        save_file({"x": torch.ones(2)}, Path(folder) / "model.safetensors")
        (Path(folder) / "config.json").write_text('{"model_type": "no-such-model"}')
        try:
            model.load_base(Path(folder), job.section, torch.float32, torch.device("cpu"))
        except TrainingError as error:
            said["unknown"] = str(error)
        try:
            model.fetch(store, {"config.json": job.base_model["config.json"]}, Path(folder))
        except TrainingError as error:
            said["pickle"] = str(error)
    return said


def run(name: str, job: dict[str, Any], store: BlobStore, **arguments: Any) -> Facts:
    facts: Facts = globals()[name](parse(job), store, **arguments)
    return facts
