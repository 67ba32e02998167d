"""Contamination: is a record's text an item of the evaluation suites, word for word or for the most part?

What a suite's prompts are is written by `evaluation/suites.py`; dropping and listing records is `records.py`.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from repro_assets.data.errors import DataError
from repro_assets.data.lines import Message, normal_text
from repro_assets.data.near import Hashes, grams_of, word_grams
from repro_assets.recipe import RecordsSection

_FILTER_BITS = 20


class Prompt(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of the eval suites' prompts: an item's text after `normal_text`."""

    item: str
    suite: str
    text: str


class Evaluated:
    """The items of the evaluation suites, ready to be looked for. `digest`: SHA-256 of the prompts' lines and nothing else, "" when off."""

    def __init__(self, words: int, share: float, digest: str) -> None:
        self.words, self.share, self.digest = words, share, digest
        self._texts: dict[bytes, str] = {}
        self._starts: set[str] = set()
        self._names: list[str] = []
        self._sizes: list[int] = []
        self._items: dict[int, tuple[int, ...]] = {}
        self._filter: NDArray[np.bool_] | None = None

    @classmethod
    def build(cls, prompts: Iterable[bytes] | bytes, section: RecordsSection) -> Self:
        """From JSONL of {"item", "suite", "text"}, whole or line by line. Raises DataError for anything else."""
        if section.contamination == "off":
            return cls(section.contamination_words, section.contamination_share, "")
        hashed = hashlib.sha256()
        rows: list[Prompt] = []
        for number, line in enumerate(prompts.split(b"\n") if isinstance(prompts, bytes) else prompts, start=1):
            if not line.strip():
                continue
            hashed.update(line.rstrip(b"\n") + b"\n")
            try:
                rows.append(msgspec.json.decode(line, type=Prompt))
            except msgspec.DecodeError as error:
                raise DataError(
                    f"the eval suites' prompts, line {number}, cannot be read: {error}; materialize eval_suites again"
                ) from error
        made = cls(section.contamination_words, section.contamination_share, hashed.hexdigest())
        for row in rows:
            made._texts.setdefault(_digest(row.text), f"{row.suite}/{row.item}")
            made._starts.add(" ".join(row.text.split(" ", 3)[:3]))
        if section.contamination == "ngram":
            made._index(rows)
        return made

    def _index(self, rows: list[Prompt]) -> None:
        """Which items have which n-gram. An item with fewer words than an n-gram has is only compared whole."""
        items: dict[int, list[int]] = {}
        for row in rows:
            if len(row.text.split()) < self.words:
                continue
            grams = np.unique(word_grams(row.text, self.words))
            for gram in grams.tolist():
                items.setdefault(gram, []).append(len(self._names))
            self._names.append(f"{row.suite}/{row.item}")
            self._sizes.append(len(grams))
        self._items = {gram: tuple(numbers) for gram, numbers in items.items()}
        self._filter = np.zeros(1 << _FILTER_BITS, bool)
        self._filter[_places(np.fromiter(self._items, np.uint64, len(self._items)))] = True

    def find(self, messages: tuple[Message, ...]) -> str | None:
        """What the record has of the evaluation, in words; None when it is clean.

        Word for word: any user turn, the user turns joined, or a text record whole. By n-grams: the record's turns in order, whatever
        their role, and the user turns joined; the item of which the largest share is there, the first one when several are equal.
        """
        return self.find_all([messages])[0]

    def find_all(self, records: Sequence[tuple[Message, ...]]) -> list[str | None]:
        """`find` of each of many records: for short ones by n-grams several times as fast as one by one."""
        if not self._texts:
            return [None] * len(records)
        said = [self._whole(messages) for messages in records]
        if self._filter is None:
            return said
        texts: list[str] = []
        owners: list[int] = []
        for number, messages in enumerate(records):
            if said[number] is None:
                turns = _turns(messages)
                texts.append("\n".join(message.content for message in messages))
                owners.append(number)
                if 1 < len(turns) < len(messages):
                    texts.append("\n".join(turns))
                    owners.append(number)
        grams, text = grams_of(texts, self.words)
        maybe = self._filter[_places(grams)]
        found: dict[int, set[int]] = {}
        for gram, index in zip(grams[maybe].tolist(), text[maybe].tolist(), strict=True):
            if gram in self._items:
                found.setdefault(owners[index], set()).add(gram)
        for number, hits in found.items():
            said[number] = self._share(hits)
        return said

    def _whole(self, messages: tuple[Message, ...]) -> str | None:
        turns = _turns(messages)
        for text in [*turns, "\n".join(turns)] if len(turns) > 1 else turns:
            if self._begins(text) and (item := self._texts.get(_digest(normal_text(text)))):
                return f"the prompt is the evaluation item {item}"
        return None

    def _begins(self, text: str) -> bool:
        """Whether some item begins with the text's first three words; most texts need not be folded whole to know that they are no item."""
        return normal_text(" ".join(text.split(None, 3)[:3])) in self._starts

    def _share(self, grams: set[int]) -> str | None:
        """What is said of a record that has these n-grams of items."""
        counts: dict[int, int] = {}
        for gram in grams:
            for number in self._items[gram]:
                counts[number] = counts.get(number, 0) + 1
        best = min(counts, key=lambda number: (-counts[number] / self._sizes[number], number))
        if counts[best] / self._sizes[best] < self.share:
            return None
        percent = 100 * counts[best] // self._sizes[best]
        return f"{percent} % of the {self.words}-grams of the evaluation item {self._names[best]}"


def _turns(messages: tuple[Message, ...]) -> list[str]:
    return [message.content for message in messages if message.role in ("user", "text")]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _places(grams: Hashes) -> NDArray[np.int64]:
    return (grams >> np.uint64(64 - _FILTER_BITS)).astype(np.int64)
