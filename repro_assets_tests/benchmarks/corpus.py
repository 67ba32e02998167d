"""Chat corpora for benchmarks: one of any size, made of SHA-3 output, the same bytes on every machine; and gsm8k. With a tokenizer each."""

import hashlib
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from repro_assets_tests.data.material import CHATML, GSM8K, SPECIAL, tokenizer_files

WORDS = 60_000
VOCABULARY = 32_000
ROW_BYTES = 2720  # on average, which the reference's measurements had
FILES = 8
WHOLE = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl"
SYLLABLES = [
    "ba",
    "be",
    "bi",
    "bo",
    "bu",
    "da",
    "de",
    "di",
    "do",
    "du",
    "ka",
    "ke",
    "ki",
    "ko",
    "ku",
    "la",
    "le",
    "li",
    "lo",
    "lu",
    "ma",
    "me",
    "mi",
    "mo",
    "mu",
    "na",
    "ne",
    "ni",
    "no",
    "nu",
    "ra",
    "re",
    "ri",
    "ro",
    "ru",
    "sa",
    "se",
    "si",
    "so",
    "su",
    "ta",
    "te",
    "ti",
    "to",
    "tu",
]
ENDINGS = ("", "", "", "s", "ing", "ed", "er", "ly", "é", "ß", "n", "th")
MARKS = (" ", " ", " ", " ", " ", " ", " ", " ", ", ", ". ", ".\n", ": ", " - ", "? ")


def draw(name: str, count: int) -> NDArray[np.uint32]:
    return np.frombuffer(hashlib.shake_128(name.encode()).digest(4 * count), dtype="<u4")


def vocabulary() -> list[str]:
    words = []
    for number, value in enumerate(draw("words", WORDS).tolist()):
        length = 1 + min(3, number.bit_length() // 5)
        parts = [SYLLABLES[value // len(SYLLABLES) ** place % len(SYLLABLES)] for place in range(length)]
        words.append("".join(parts) + ENDINGS[value % len(ENDINGS)])
    for number, word in enumerate(("你好", "世界", "naïve", "Grüße", "здравствуй", "🙂", "3.14", "x_1", "HTTPServer", "don't")):
        words[200 + 37 * number] = word
    return words


class Rows:
    """Row n of the corpus. 3 % repeat an earlier row, 5 % differ from one in a few words."""

    def __init__(self) -> None:
        self._words = np.array(vocabulary(), dtype=object)
        weights = (1 << 40) // (np.arange(WORDS, dtype=np.int64) + 3)
        self._upto = np.cumsum(weights)

    def _text(self, name: str, count: int) -> str:
        values = draw(name, 2 * count)
        scaled = values[:count].astype(np.int64) * (int(self._upto[-1]) >> 32)
        words = self._words[np.minimum(np.searchsorted(self._upto, scaled, "right"), WORDS - 1)].tolist()
        return "".join([word + MARKS[mark] for word, mark in zip(words, (values[count:] % len(MARKS)).tolist(), strict=True)])

    def line(self, number: int) -> bytes:
        kind, back, asked, said = draw(f"row {number}", 4).tolist()
        source, edit = number, ""
        if number > 100 and kind % 100 < 8:
            source = number - 1 - back % 100
            edit = "" if kind % 100 < 3 else f"{number} "
            _kind, _back, asked, said = draw(f"row {source}", 4).tolist()
        messages = [
            {"role": "user", "content": edit + self._text(f"{source} user", 29 + asked % 174)},
            {"role": "assistant", "content": self._text(f"{source} assistant", 43 + said % 348)},
        ]
        return json.dumps({"id": f"r{number}", "messages": messages, "topic": f"t{number % 12}"}, ensure_ascii=False).encode() + b"\n"


def write(folder: Path, megabytes: int) -> list[Path]:
    """The corpus as JSONL files, made once."""
    rows = megabytes * 1_000_000 // ROW_BYTES
    paths = [folder / f"corpus-{megabytes}" / f"part-{number}.jsonl" for number in range(FILES)]
    if paths[-1].is_file():
        return paths
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    made = Rows()
    for number, path in enumerate(paths):
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            for row in range(rows * number // FILES, rows * (number + 1) // FILES):
                file.write(made.line(row))
        partial.rename(path)
    return paths


def gsm8k(folder: Path) -> list[Path]:
    """gsm8k's training set as chat files: the whole where it lies beside the checkout, else the 400 rows that ship with the tests."""
    source = WHOLE if WHOLE.is_file() else GSM8K
    rows = [json.loads(line) for line in source.read_bytes().splitlines()]
    paths = [folder / f"gsm8k-{len(rows)}" / f"part-{number}.jsonl" for number in range(FILES)]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(paths):
        with path.open("wb") as file:
            for at in range(len(rows) * number // FILES, len(rows) * (number + 1) // FILES):
                turns = zip(("user", "assistant"), (rows[at]["question"], rows[at]["answer"]), strict=True)
                row = {"id": f"g{at}", "messages": [{"role": role, "content": text} for role, text in turns], "topic": f"t{at % 12}"}
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    return paths


def tokenizer(folder: Path, sample: Path) -> dict[str, bytes]:
    """tokenizer.json and the other files of a byte-level BPE trained on `sample`, made once."""
    kept = folder / f"tokenizer-{sample.parent.name}.json"
    if not kept.is_file():
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        rows = (json.loads(line) for line in sample.open("rb"))
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
        made.train_from_iterator((message["content"] for row in rows for message in row["messages"]), trainer)
        kept.write_text(made.to_str())
    return tokenizer_files(kept.read_bytes(), CHATML)
