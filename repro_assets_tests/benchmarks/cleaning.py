"""What each step of cleaning costs on one core, in MB of UTF-8 text a CPU second: on real questions (gsm8k) and on text that needs work.

Run by hand: `python -m repro_assets_tests.benchmarks.cleaning`. Prints a table; the records are 0.5 kB and, joined by six, 3 kB.
"""

import statistics
import time
from collections.abc import Callable

import msgspec

from repro_assets.data import near
from repro_assets.data.augmenting import augmented
from repro_assets.data.cleaning import clean
from repro_assets.data.contamination import Evaluated
from repro_assets.data.lines import Message, normal_text
from repro_assets.data.sensitive import Finder
from repro_assets.recipe import Augmentation, NearDuplicates, RecordsSection, Source
from repro_assets.trust.canonical import canonical
from repro_assets_tests.data.material import GSM8K

Messages = tuple[Message, ...]
NEAR = NearDuplicates()
ROUNDS, BATCH = 3, 256


def section(**how: object) -> RecordsSection:
    return RecordsSection(sources=(Source(match="**", shape="messages"),), **how)  # type: ignore[arg-type]


def material() -> dict[str, list[Messages]]:
    rows = [msgspec.json.decode(line) for line in GSM8K.read_bytes().splitlines()]

    def chat(question: str, answer: str) -> Messages:
        return (Message(content=question, role="user"), Message(content=answer, role="assistant"))

    short = [chat(f"{number} {row['question']}", row["answer"]) for number in range(15) for row in rows]
    long = [
        chat(*("\n".join(row[part] for row in rows[at : at + 6]) for part in ("question", "answer")))
        for _ in range(15)
        for at in range(0, len(rows) - 6, 6)
    ]
    ascii_only = [chat(*(message.content.encode("ascii", "ignore").decode() for message in record)) for record in long]
    cyrillic = [chat(*(message.content.translate(str.maketrans("aeosnit", "аеоснит")) for message in record)) for record in long]
    links = [
        chat(record[0].content.replace("How", "See https://example.org/a/long/path/page.html on 2024-01-15: how"), record[1].content)
        for record in long
    ]
    return {"0.5 kB": short, "3 kB": long, "3 kB ASCII": ascii_only, "3 kB Cyrillic": cyrillic, "3 kB links, dates": links}


def steps(records: list[Messages]) -> dict[str, Callable[[list[Messages]], object]]:
    prompts = b"".join(
        canonical({"item": str(number), "suite": "s", "text": normal_text(f"an item {record[0].content}")}) + b"\n"
        for number, record in enumerate(records[: len(records) // 100])
    )
    exact, ngram = (Evaluated.build(prompts, section(contamination=kind)) for kind in ("exact", "ngram"))
    secrets, personal = Finder("mask", "off"), Finder("off", "mask")
    plain, collapse = section(), section(whitespace="collapse")
    typos = (Augmentation(kind="typos", share=0.1),)
    joined = [
        ["\n".join(message.content for message in record) for record in records[at : at + BATCH]] for at in range(0, len(records), BATCH)
    ]
    return {
        "clean": lambda here: [clean(record, plain) for record in here],
        "clean, collapse": lambda here: [clean(record, collapse) for record in here],
        "secrets": lambda here: [secrets.find(record) for record in here],
        "personal": lambda here: [personal.find(record) for record in here],
        "near, one by one": lambda _: [near.signature(text, NEAR) for batch in joined for text in batch],
        f"near, by {BATCH}": lambda _: [near.signatures(batch, NEAR) for batch in joined],
        "contamination exact": lambda here: [exact.find(record) for record in here],
        "contamination ngram": lambda here: [ngram.find(record) for record in here],
        f"ngram, by {BATCH}": lambda here: [ngram.find_all(here[at : at + BATCH]) for at in range(0, len(here), BATCH)],
        "augment 10 %": lambda here: [augmented(record, str(number), typos) for number, record in enumerate(here)],
    }


def main() -> None:
    found: dict[str, dict[str, float]] = {}
    for name, records in material().items():
        size = sum(len(message.content.encode()) for record in records for message in record) / 1e6
        for step, run in steps(records).items():
            run(records[:BATCH])
            times = []
            for _ in range(ROUNDS):
                begun = time.process_time()
                run(records)
                times.append(time.process_time() - begun)
            found.setdefault(step, {})[name] = size / statistics.median(times)
    names = list(next(iter(found.values())))
    print(f"{'MB per CPU second':22}" + "".join(f"{name:>19}" for name in names))
    for step, figures in found.items():
        print(f"{step:22}" + "".join(f"{figures[name]:19.1f}" for name in names))


if __name__ == "__main__":
    main()
