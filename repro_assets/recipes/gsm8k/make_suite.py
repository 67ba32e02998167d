"""Makes the suite of the gsm8k recipe from the data set's test file: choose the right final number among four. Run by hand.

    python -m repro_assets.recipes.gsm8k.make_suite TEST.jsonl

The items that ship were made from the first 440 of its 1,319 rows (MIT licence, see LICENSE beside this file).
"""

import hashlib
import json
import sys
from pathlib import Path

ITEMS = 440  # 438 resolve a margin of 5 points with 80 % power


def wrong(number: int, question: str) -> list[int]:
    """Three numbers near the right one, drawn by hash, so that every Python draws the same ones."""
    found: list[int] = []
    for counter in range(100):
        drawn = hashlib.sha256(f"{counter}:{question}".encode()).digest()
        other = number + int.from_bytes(drawn[:2], "big") % (abs(number) + 10) - abs(number) // 2
        if other != number and other not in found:
            found.append(other)
        if len(found) == 3:
            return found
    raise ValueError(f"no three wrong answers for {number}")


def item(index: int, row: dict[str, str]) -> dict[str, object]:
    """One multiple-choice item; the right answer's place is drawn by hash."""
    answer = row["answer"].rsplit("####", 1)[1].strip().replace(",", "")
    others = [str(other) for other in wrong(int(answer), row["question"])]
    place = hashlib.sha256(row["question"].encode()).digest()[0] % 4
    steps = row["answer"].count("\n")
    return {
        "id": f"gsm8k-test-{index:04d}",
        "prompt": row["question"],
        "choices": [*others[:place], answer, *others[place:]],
        "gold": place,
        "steps": "up to 3" if steps <= 3 else "4 or more",
    }


def main(source: str) -> None:
    rows = [json.loads(line) for line in Path(source).read_text().splitlines()[:ITEMS]]
    out = Path(__file__).parent / "suite" / "items.jsonl"
    out.write_text("".join(json.dumps(item(index, row), ensure_ascii=False) + "\n" for index, row in enumerate(rows)))


if __name__ == "__main__":
    main(sys.argv[1])
