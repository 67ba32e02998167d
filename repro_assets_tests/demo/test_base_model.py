"""The shipped base model: the files that were recorded, loadable as they are, from a training that repeats byte for byte."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import repro_assets.demo
from repro_assets.demo import suites, tickets

DEMO = Path(repro_assets.demo.__file__).parent
SHIPPED = DEMO / "base_model"


def recorded() -> dict[str, str]:
    """SHA-256 by file name, from base_model.sha256 (the form of sha256sum, which is what train_base prints)."""
    pairs = (line.split("  ", 1) for line in (DEMO / "base_model.sha256").read_text().splitlines())
    return {name: digest for digest, name in pairs}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(SHIPPED, trust_remote_code=False)


def test_the_shipped_files_have_the_digests_that_the_training_printed() -> None:
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in SHIPPED.iterdir() if path.name != "README.md"}
    assert found == recorded()
    card = (SHIPPED / "README.md").read_text()
    assert "Apache-2.0" in card
    assert "python -m repro_assets.demo.train_base" in card


def test_the_model_loads_with_transformers_and_has_721792_parameters() -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(SHIPPED, trust_remote_code=False)
    assert model.num_parameters() == 721_792
    assert (model.config.vocab_size, model.config.pad_token_id, model.config.eos_token_id) == (1024, 0, 3)


def test_the_template_renders_and_marks_exactly_what_the_assistant_says(tokenizer: Any) -> None:
    record = tickets.snapshot("first")[0]
    question, answer = (turn["content"] for turn in record["messages"])
    assert tokenizer.apply_chat_template(record["messages"], tokenize=False) == f"<|user|>{question}<|end|><|assistant|>{answer}<|end|>"
    both = [*record["messages"], *record["messages"]]
    made = tokenizer.apply_chat_template(both, return_dict=True, return_assistant_tokens_mask=True)
    marked = [token for token, mask in zip(made["input_ids"], made["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(marked) == f"{answer}<|end|>" * 2


def test_the_generation_prompt_is_what_the_suites_write_out(tokenizer: Any) -> None:
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "{{prompt}}"}], tokenize=False, add_generation_prompt=True)
    assert rendered == suites.PROMPT


def test_a_role_that_the_template_does_not_know_is_refused(tokenizer: Any) -> None:
    from jinja2.exceptions import TemplateError

    with pytest.raises(TemplateError, match="knows the roles user and assistant, not system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "be kind"}], tokenize=False)


def test_special_tokens_are_the_first_four_and_any_text_survives_the_tokenizer(tokenizer: Any) -> None:
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<|user|>", "<|assistant|>", "<|end|>"]) == [0, 1, 2, 3]
    for text in ("Straße 42 – naïve ☂ 東京", "a\n\tb  c", "12345.67"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_training_a_few_steps_twice_gives_the_same_bytes_in_two_processes(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from repro_assets.demo.train_base import make; "
        "print(make(Path(sys.argv[1]), documents=400, steps=3))"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / name)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for name, seed in (("a", "1"), ("b", "2"))
    ]
    printed = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert printed[0] == printed[1] != ""
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_the_shipped_tokenizer_is_the_one_its_corpus_gives(tmp_path: Path) -> None:
    from repro_assets.demo import train_base

    made = train_base.tokenizer_of(train_base.train_tokenizer(train_base.texts(train_base.DOCUMENTS)))
    made.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (SHIPPED / name).read_bytes(), name


def test_packed_documents_restart_their_positions_and_lose_nothing() -> None:
    from repro_assets.demo.train_base import IGNORED, ROW_TOKENS, packed

    documents = [list(range(10, 10 + length)) for length in (100, 200, 56, 256, 300, 1)]
    rows = packed(documents)
    assert rows.ids.shape == rows.labels.shape == rows.positions.shape == (5, ROW_TOKENS)
    assert rows.positions[1, :256].tolist() == [*range(200), *range(56)]
    assert rows.labels[1, [0, 200]].tolist() == [IGNORED, IGNORED]
    kept = sum(min(len(document), ROW_TOKENS) - 1 for document in documents)
    assert int((rows.labels != IGNORED).sum()) == kept


def test_a_folder_with_files_in_it_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from repro_assets.demo import train_base

    (tmp_path / "mine").write_text("x")
    monkeypatch.setattr(sys, "argv", ["train_base", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        train_base.main()
    assert stopped.value.code == 2
    assert "is not empty; name a new folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
