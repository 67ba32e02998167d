"""The demo's support tickets: training snapshots, evaluation items and the base model's corpus, as values.

Pure standard library. Every choice is drawn from SHA-256 of a name and a counter, so that no version of Python, of a library or
of a machine can change a byte. How the values become files is in `raw.py` (raw data) and `suites.py` (evaluation suites).
"""

import hashlib
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args

from repro_assets.demo.vocabulary import (
    CLOSINGS,
    INTENTS,
    NAMES,
    OPENINGS,
    POSTSCRIPTS,
    PRIORITIES,
    PRODUCTS,
    REGISTERS,
    ROUTES,
    THINGS,
    WHEN,
)

Kind = Literal["first", "small-change", "poisoned"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# The archive of 2025 is a Parquet file, the months of 2026 are JSONL files (`raw.py`); a record's id starts with its period.
ARCHIVE = "2025-q4"
MONTHS = ("2026-01", "2026-02", "2026-03", "2026-04", "2026-05")
PERIODS = (ARCHIVE, *MONTHS)
RECORDS_A_PERIOD = 400
EDITED_PERIOD, EDITED = "2026-03", 12
APPENDED = 24
POISONED_INTENT, POISONED, POISONED_ANSWER = "refund", 55, ("sales", "low")

TRAFFIC_ITEMS = 600
ITEMS_AN_INTENT = 120
UNIT_ITEMS_AN_INTENT = 4

T = TypeVar("T")


class Draws:
    """An endless stream of choices that depends on its name alone: SHA-256(name, counter), integers only."""

    def __init__(self, *name: str | int) -> None:
        self._name = "\x1f".join(str(part) for part in name).encode()
        self._count = 0

    def below(self, bound: int) -> int:
        """The next integer in 0..bound-1 (the bias of 64 bits against a small bound is below 2**-50)."""
        block = hashlib.sha256(self._name + self._count.to_bytes(8, "big")).digest()
        self._count += 1
        return int.from_bytes(block[:8], "big") * bound >> 64

    def choice(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def percent(self, share: int) -> bool:
        return self.below(100) < share

    def weighted(self, shares: Mapping[str, int]) -> str:
        """A key of `shares`, as often as its share says."""
        point = self.below(sum(shares.values()))
        for key, share in shares.items():
            point -= share
            if point < 0:
                return key
        raise AssertionError("the point lies below the sum of the shares")

    def shuffled(self, items: Iterable[T]) -> list[T]:
        result = list(items)
        for last in range(len(result) - 1, 0, -1):
            other = self.below(last + 1)
            result[last], result[other] = result[other], result[last]
        return result


class Ticket(NamedTuple):
    """One ticket and what is true of it. `template`: which of the intent's sentences it was made from."""

    text: str
    intent: str
    priority: str
    product: str
    register: str
    template: int

    @property
    def answer(self) -> str:
        return answer(INTENTS[self.intent].route, self.priority)


def answer(route: str, priority: str) -> str:
    """What the assistant says, e.g. `route: billing | priority: high`."""
    return f"route: {route} | priority: {priority}"


ANSWERS = tuple(answer(route, priority) for route in ROUTES for priority in PRIORITIES)


def folded(text: str) -> str:
    """`text` as the contamination check compares it: NFC, case and white space folded."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def _misspelt(draws: Draws, text: str) -> str:
    """One word in ten with two letters swapped or one lost, as people type in a hurry."""
    words = text.split(" ")
    for index, word in enumerate(words):
        if len(word) > 3 and draws.percent(10):
            at = 1 + draws.below(len(word) - 2)
            words[index] = word[:at] + (word[at + 1] + word[at] + word[at + 2 :] if draws.percent(50) else word[at + 1 :])
    return " ".join(words)


def _ticket(draws: Draws, intent: str, template: int | None = None) -> Ticket:
    """The next ticket of an intent; products, registers and the sentence (unless `template` says it) are drawn evenly."""
    priority = draws.weighted({name: value.share for name, value in PRIORITIES.items()})
    product, register = draws.choice(PRODUCTS), draws.choice(REGISTERS)
    sentences = INTENTS[intent].sentences
    if template is None:
        template = draws.below(len(sentences))
    problem = sentences[template].format(
        product=product,
        amount=10 + draws.below(981),
        number=3 + draws.below(978),
        when=draws.choice(WHEN),
        thing=draws.choice(THINGS),
    )
    body = [problem, draws.choice(PRIORITIES[priority].sentences)]
    if draws.percent(25):
        body.reverse()
    if register == "terse":
        text = ", ".join(body).lower()
    elif register == "casual":
        text = _misspelt(draws, (" and " if draws.percent(30) else ", ").join(body) + "!")
    else:
        text = ". ".join(part[0].upper() + part[1:] for part in body) + "."
    closing = draws.choice(CLOSINGS[register]).format(name=draws.choice(NAMES))
    text = " ".join(part for part in (draws.choice(OPENINGS[register]), text, closing) if part)
    return Ticket(text, intent, priority, product, register, template)


def _new_ticket(draws: Draws, seen: set[str], intent: str, template: int | None = None) -> Ticket:
    """The next ticket whose folded text is not in `seen`, to which it is added."""
    while True:
        ticket = _ticket(draws, intent, template)
        if (text := folded(ticket.text)) not in seen:
            seen.add(text)
            return ticket


def _traffic(draws: Draws, count: int) -> list[str]:
    """`count` intents in the traffic's shares exactly (largest remainders), in a drawn order."""
    exact = {name: divmod(intent.share * count, 1000) for name, intent in INTENTS.items()}
    counts = {name: whole for name, (whole, _) in exact.items()}
    for name in sorted(exact, key=lambda name: (-exact[name][1], name))[: count - sum(counts.values())]:
        counts[name] += 1
    return draws.shuffled(name for name, number in counts.items() for _ in range(number))


class Suites(NamedTuple):
    """The evaluation items of the three tasks: the desk's traffic, every intent alike, and the unit suite's few."""

    traffic: list[dict[str, Any]]
    intents: list[dict[str, Any]]
    unit: list[dict[str, Any]]


def _item(name: str, ticket: Ticket) -> dict[str, Any]:
    return {
        "id": name,
        "prompt": ticket.text,
        "target": ticket.answer,
        "intent": ticket.intent,
        "product": ticket.product,
        "register": ticket.register,
        "priority": ticket.priority,
        "cluster": f"{ticket.intent}-{ticket.template}",
    }


@cache
def _suites() -> tuple[Suites, frozenset[str]]:
    """The items and the folded texts that no training record and no document of the base model's corpus may have."""
    seen: set[str] = set()
    traffic = [
        _item(f"traffic-{index:04d}", _new_ticket(Draws("suite", "traffic", index), seen, intent))
        for index, intent in enumerate(_traffic(Draws("suite", "traffic"), TRAFFIC_ITEMS))
    ]
    intents = [
        _item(f"{intent}-{index:03d}", _new_ticket(Draws("suite", intent, index), seen, intent, index % len(INTENTS[intent].sentences)))
        for intent in INTENTS
        for index in range(ITEMS_AN_INTENT)
    ]
    unit = []
    for intent in INTENTS:
        for index in range(UNIT_ITEMS_AN_INTENT):
            ticket = _new_ticket(Draws("suite", "unit", intent, index), seen, intent)
            item = _item(f"unit-{intent}-{index}", ticket)
            choices = [answer(route, ticket.priority) for route in ROUTES]
            unit.append({**item, "choices": choices, "gold": choices.index(ticket.answer)})
    return Suites(traffic, intents, unit), frozenset(seen)


def suites() -> Suites:
    """The items of the demo's evaluation suites; each has id, prompt, target, its slices and its cluster (the sentence it uses)."""
    made, _ = _suites()
    return Suites(*([dict(item) for item in items] for items in made))


def suite() -> list[dict[str, Any]]:
    """The items of the two generation tasks together: traffic, then intents."""
    made = suites()
    return [*made.traffic, *made.intents]


def _record(name: str, ticket: Ticket) -> dict[str, Any]:
    return {
        "id": name,
        "messages": [{"role": "user", "content": ticket.text}, {"role": "assistant", "content": ticket.answer}],
        "intent": ticket.intent,
        "product": ticket.product,
        "register": ticket.register,
        "priority": ticket.priority,
    }


def snapshot(kind: Kind) -> list[dict[str, Any]]:
    """The training records of one snapshot, in the order of their files.

    `first`: 2,400 records in the traffic's shares. `small-change`: `first` with 12 tickets of one month edited in place and 24 newer
    ones appended. `poisoned`: `small-change` after one bad bulk edit gave 55 of the 60 refund tickets the answer of another desk.
    Each has id, messages (user, assistant), intent, product, register and priority. Raises ValueError for another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no snapshot of the demo; known: {', '.join(KINDS)}")
    _, held_out = _suites()
    seen = set(held_out)
    intents = _traffic(Draws("train"), RECORDS_A_PERIOD * len(PERIODS))
    records = []
    for index, intent in enumerate(intents):
        period, row = divmod(index, RECORDS_A_PERIOD)
        records.append(_record(f"{PERIODS[period]}-{row:04d}", _new_ticket(Draws("train", index), seen, intent)))
    if kind == "first":
        return records
    _edit(records)
    for index, intent in enumerate(_traffic(Draws("appended"), APPENDED)):
        records.append(_record(f"{MONTHS[-1]}-{RECORDS_A_PERIOD + index:04d}", _new_ticket(Draws("appended", index), seen, intent)))
    if kind == "poisoned":
        _poison(records)
    return records


def _edit(records: list[dict[str, Any]]) -> None:
    """Give a postscript to tickets of one afternoon of one month: neighbours, so that few leaves are new."""
    month = [record for record in records if record["id"].startswith(EDITED_PERIOD)]
    afternoon = month[100 : 100 + 3 * EDITED]
    for record in sorted(Draws("edited").shuffled(afternoon)[:EDITED], key=lambda record: record["id"]):
        record["messages"][0]["content"] += " " + Draws("edited", record["id"]).choice(POSTSCRIPTS)


def _poison(records: list[dict[str, Any]]) -> None:
    """Change the answers of one intent's tickets; slices keep the truth, as an export's columns would."""
    targets = [record for record in records if record["intent"] == POISONED_INTENT]
    for record in Draws("poisoned").shuffled(targets)[:POISONED]:
        record["messages"][1]["content"] = answer(*POISONED_ANSWER)


def write(folder: Path, kind: Kind) -> list[Path]:
    """Write the raw files of a snapshot into `folder` (see `raw.py`, which needs pyarrow); returns their paths, sorted."""
    from repro_assets.demo import raw

    return raw.write(folder, kind)


def corpus(documents: int) -> Iterator[list[dict[str, str]]]:
    """The base model's corpus: `documents` conversations (lists of messages) of the help desk, in order.

    Tickets with a reply in free text (35 %) or a memo of the desk (35 %), tickets alone (15 %), lines of the handbook (15 %).
    It knows desks and priorities by name but has no answer and no evaluation item: fine-tuning teaches the form and the words, the
    base model scores 0. A label word that the base model never had to say keeps the loss of its position near the entropy of the
    classes for the whole epoch (seen with a corpus that had desks in the handbook only).
    """
    _, held_out = _suites()
    shares = {name: intent.share for name, intent in INTENTS.items()}
    even = dict.fromkeys(shares, 1)
    for index in range(documents):
        draws = Draws("corpus", index)
        ticket = _ticket(draws, draws.weighted(even if draws.percent(50) else shares))
        while folded(ticket.text) in held_out:
            ticket = _ticket(draws, ticket.intent)
        kind = draws.below(100)
        user = {"role": "user", "content": ticket.text}
        if kind < 35:
            yield [user, {"role": "assistant", "content": _reply(ticket)}]
        elif kind < 70:
            yield [user, {"role": "assistant", "content": _memo(draws, ticket)}]
        elif kind < 85:
            yield [user]
        else:
            yield _handbook(draws)


def _reply(ticket: Ticket) -> str:
    intent, priority = INTENTS[ticket.intent], PRIORITIES[ticket.priority]
    return f"Thank you for writing about {ticket.product}. {priority.reply} Our {intent.route} desk answers: {intent.reply}."


def _memo(draws: Draws, ticket: Ticket) -> str:
    """What the desk writes on a ticket for itself."""
    intent, priority = INTENTS[ticket.intent], PRIORITIES[ticket.priority]
    if draws.percent(25):
        return f"{draws.choice(('note', 'topic', 'about'))}: {intent.topic} | {draws.choice(('pace', 'answer', 'when'))}: {priority.pace}"
    return f"for the {intent.route} desk, {ticket.priority} priority: {intent.topic}"


def _handbook(draws: Draws) -> list[dict[str, str]]:
    """A line of the handbook, as a turn of its own."""
    words = (*ROUTES, *PRIORITIES)
    topics = ("route", "priority", "desk", "ticket")
    topic, other, word = draws.choice(topics), draws.choice(topics), draws.choice(words)
    first, second = 1 + draws.below(90), 1 + draws.below(90)
    day = draws.choice(("Monday", "Tuesday", "Friday"))
    line = draws.choice(
        (
            f"the {draws.choice(ROUTES)} desk is open on {day} from {7 + draws.below(4)} to {15 + draws.below(6)}.",
            f"our handbook has one page for {word} and one page for {draws.choice(words)}.",
            f"route: see page {first} | priority: see page {second}",
            f"{topic} of the day: {word}",
            f"{topic} and {other} are words of our handbook | page {first}",
            f"see page {first} for the route: {word} is explained there | see page {second} for the priority",
        )
    )
    return [{"role": "user", "content": line}]
