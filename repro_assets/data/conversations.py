"""Rules that read texts: what the chat template writes around a conversation, ids that survive decoding and encoding, languages.

The tokenizer is built here from its file alone, so that these rules do not lean on the code that made the ids.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import tokenizers
from numpy.typing import NDArray

from repro_assets.data.errors import DataError, RenderingError
from repro_assets.data.frame import CALLS, Drawn
from repro_assets.data.judged import FAIL, NONE, PASS, SAMPLE, SHOWN, WARN, Judged
from repro_assets.data.language import LETTERS, model
from repro_assets.data.lines import Message
from repro_assets.data.rendering import Renderer
from repro_assets.recipe import Language, ValidationSection

# Stands for what a message says: one letter, so that no template trims it away.
PROBE = "x"
# Tokens beyond the template's own that are decoded too: the text beside them may have merged into its last one.
BESIDE = 4


class Plain:
    """A tokenizer as its file has it, without post-processor. `controls`: texts of the tokens that only the template may write."""

    def __init__(self, tokenizer_json: bytes, control_ids: Iterable[int]) -> None:
        definition = {**json.loads(tokenizer_json), "post_processor": None, "truncation": None, "padding": None}
        self._engine = tokenizers.Tokenizer.from_str(json.dumps(definition, ensure_ascii=False))
        wanted = set(control_ids)
        contents = [token["content"] for token in definition.get("added_tokens") or [] if token["id"] in wanted]
        self.controls = re.compile("|".join(re.escape(text) for text in sorted(contents, key=lambda text: (-len(text), text))) or "(?!)")

    def encode(self, text: str) -> list[int]:
        return list(self._engine.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._engine.decode(list(ids), skip_special_tokens=False))


# ---- the template


class Frames:
    """What the chat template writes before the first and after the last message, by the roles of a conversation."""

    def __init__(self, renderer: Renderer, plain: Plain) -> None:
        self._renderer, self._plain = renderer, plain
        self._known: dict[str, tuple[str, list[int], str, list[int]] | None] = {}
        #: sequence of roles -> why the template does not take it
        self.refused: dict[str, str] = {}

    def __call__(self, roles: str, ids: NDArray[Any], cut: int) -> bool | None:
        """Whether these ids begin as the template does and, unless they were cut, end as it does; None for roles it does not take."""
        if roles not in self._known:
            self._known[roles] = self._probe(roles)
        found = self._known[roles]
        if found is None:
            return None
        before, before_ids, after, after_ids = found
        head = ids[: len(before_ids)].tolist() == before_ids or _begins(
            self._plain.decode(ids[: len(before_ids) + BESIDE].tolist()), before
        )
        if not head or cut:
            return head
        tail = ids[len(ids) - len(after_ids) :].tolist() == after_ids
        return tail or _begins(self._plain.decode(ids[-len(after_ids) - BESIDE :].tolist())[::-1], after[::-1])

    def _probe(self, roles: str) -> tuple[str, list[int], str, list[int]] | None:
        if CALLS in roles:  # which calls a template takes cannot be guessed, and sharding has rendered them
            return None
        try:
            rendered = self._renderer.render([Message(content=PROBE, role=role) for role in roles.split(",")])
        except RenderingError as error:
            self.refused[roles] = str(error)
            return None
        before, after = rendered.text[: rendered.contents[0][0]], rendered.text[rendered.contents[-1][1] :]
        return before, self._plain.encode(before), after, self._plain.encode(after)


def _begins(text: str, with_: str) -> bool:
    """SentencePiece decoders lose a space at the edge."""
    return text.startswith(with_) or text.lstrip().startswith(with_.lstrip())


# ---- the keyed sample


def judge_roundtrip(drawn: Sequence[Drawn], plain: Plain, limits: ValidationSection, judged: Judged) -> None:
    """Decoding a record's ids and encoding the text again gives the same ids.

    Left out: records that were cut, perhaps inside a character, and those whose messages spell a control token, which is meant to be lost.
    """
    whole = [one for one in drawn if not one.cut and not any(plain.controls.search(message.content) for message in one.messages)]
    changed = [one.record for one in whole if plain.encode(plain.decode(one.ids.tolist())) != one.ids.tolist()]
    if not whole:
        judged.add(SAMPLE, "roundtrip", NONE, None, limits.max_roundtrip, "no record to decode: all of those drawn were cut, or none drawn")
        return
    share = len(changed) / len(whole)
    verdict = PASS if not changed else WARN if share <= limits.max_roundtrip else FAIL
    detail = f"{len(whole) - len(changed)} of {len(whole)} drawn records have the same ids after decoding and encoding again"
    judged.add(SAMPLE, "roundtrip", verdict, share, limits.max_roundtrip, detail)
    judged.failing["roundtrip"] = changed[:SHOWN]


def judge_language(drawn: Sequence[Drawn], wanted: Language, judged: Judged) -> dict[str, int]:
    """At least the wanted share of the drawn records is in an expected language. Returns records by language found."""
    languages = model()
    found = {one.record: languages.of([message.content for message in one.messages]) for one in drawn}
    told = {record: language for record, language in found.items() if language is not None}
    short = len(found) - len(told)
    beside = f"; {short} with fewer than {LETTERS} letters not judged" if short else ""
    if not told:
        judged.add(SAMPLE, "language", NONE, None, wanted.minimum, f"no drawn record is long enough to tell its language{beside}")
        return {}
    if unknown := sorted(set(wanted.expected) - set(languages.labels)):
        raise DataError(
            f"validation.language.expected: {', '.join(unknown)}: no such language in the model; it knows {', '.join(sorted(languages.labels))}"
        )
    share = sum(language in wanted.expected for language in told.values()) / len(told)
    counted = Counter(told.values())
    most = sorted(counted.items(), key=lambda item: (-item[1], item[0]))
    listed = ", ".join(f"{language} {count}" for language, count in most[:8])
    detail = f"{len(told)} drawn records, expected {', '.join(wanted.expected)}: {listed}{beside}"
    judged.add(SAMPLE, "language", PASS if share >= wanted.minimum else FAIL, share, wanted.minimum, detail)
    if share < wanted.minimum:
        judged.failing["language"] = [record for record, language in told.items() if language not in wanted.expected][:SHOWN]
    return dict(most)
