"""Rules on the shards as pandera checks on one collected polars frame, and rules on its sums.

A module of its own because pandera takes a second to import: `validation.py` imports it when it works, never before.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandera.polars as pa
import polars as pl

from repro_assets.data.judged import FAIL, PASS, SHOWN, WARN, Judged
from repro_assets.data.leaves import Leaf
from repro_assets.documents import Records, Shards, TokenLeaf
from repro_assets.recipe import Recipe

COLUMNS = {
    "record": pl.String,
    "split": pl.String,
    "tokens": pl.UInt32,
    "trained": pl.UInt32,
    "cut": pl.UInt32,
    "highest": pl.UInt32,
    "spans_apart": pl.Boolean,
    "turns": pl.UInt32,
    "turns_ended": pl.UInt32,
}


# ---- the frame


def table(entries: list[tuple[TokenLeaf, Leaf]], control_ids: Iterable[int]) -> tuple[pl.DataFrame, dict[str, bytes]]:
    """One row a record in the order of the leaves (COLUMNS), and each record's token digest.

    `highest`: largest id. `spans_apart`: spans in order, apart, inside the record. `turns`: trained spans that were not cut off,
    `turns_ended`: those of them whose last token is a control token, which is how a turn ends.
    """
    rows: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    expected: dict[str, bytes] = {}
    controls = np.array(sorted(control_ids), dtype=np.uint32)
    for entry, leaf in entries:
        names = leaf.records
        expected.update(zip(names, (bytes(row) for row in leaf.token), strict=True))
        rows["record"] += names
        rows["split"] += [entry.split] * len(leaf)
        rows["tokens"] += leaf.lengths.tolist()
        rows["trained"] += leaf.trained.clip(0).tolist()
        rows["cut"] += leaf.cut.tolist()
        for ids, spans, cut in zip(leaf.ids, leaf.spans, leaf.cut.tolist(), strict=True):
            flat = spans.reshape(-1).astype(np.int64)
            apart = bool(len(flat)) and bool((np.diff(flat)[::2] > 0).all() and (np.diff(flat)[1::2] >= 0).all() and flat[-1] <= len(ids))
            whole = [end for _start, end in spans.tolist() if not (cut and end >= len(ids))] if apart else []
            rows["highest"].append(int(ids.max()) if len(ids) else 0)
            rows["spans_apart"].append(apart or not len(flat))
            rows["turns"].append(len(whole))
            rows["turns_ended"].append(int(np.isin(ids[np.array(whole, dtype=np.int64) - 1], controls).sum()) if whole else 0)
    return pl.DataFrame(rows, schema=COLUMNS), expected


# ---- rules on records


def schema(recipe: Recipe, vocabulary: int) -> pa.DataFrameSchema:
    """Every rule that one row, or the ids of all rows, can break."""
    longest, shortest = recipe.sharding.max_tokens, recipe.validation.min_tokens

    def whole(name: str, expression: pl.Expr) -> pa.Check:
        return pa.Check(lambda data: data.lazyframe.select(expression), name=name)

    return pa.DataFrameSchema(
        {
            "record": pa.Column(pl.String, pa.Check.str_matches("^[0-9a-f]{64}$", name="schema")),
            "split": pa.Column(pl.String, pa.Check.isin(["train", "validation"], name="schema")),
            "tokens": pa.Column(pl.UInt32, pa.Check.in_range(shortest, longest, name="length_range")),
            "trained": pa.Column(pl.UInt32, pa.Check.ge(1, name="loss_mask")),
            "cut": pa.Column(pl.UInt32),
            "highest": pa.Column(pl.UInt32, pa.Check.lt(vocabulary, name="token_ids")),
            "spans_apart": pa.Column(pl.Boolean, pa.Check.eq(True, name="loss_spans")),
            "turns": pa.Column(pl.UInt32),
            "turns_ended": pa.Column(pl.UInt32),
        },
        checks=[
            whole("unique_ids", pl.col("record").is_duplicated().not_()),
            whole("end_of_turn", pl.col("turns") == pl.col("turns_ended")),
            whole("untrained_prompt", pl.col("trained") < pl.col("tokens")),
        ],
        strict=True,
    )


#: rule on records -> what its limit means
RECORD_RULES = {
    "schema": "columns, types, no nulls, ids and splits as documented",
    "unique_ids": "no record twice, in one split or both",
    "length_range": "tokens between validation.min_tokens and sharding.max_tokens",
    "loss_mask": "at least one trained token",
    "loss_spans": "trained spans in order, apart and inside the record",
    "token_ids": "ids inside the model's vocabulary",
    "end_of_turn": "every trained turn that was not cut ends with a control token, and the mask includes it",
    "untrained_prompt": "something that is not trained comes before what is",
}


def judge_records(frame: pl.DataFrame, recipe: Recipe, vocabulary: int, judged: Judged) -> None:
    """One rule each of RECORD_RULES; effect is the number of records that fail, limit 0."""
    if not isinstance(frame, pl.DataFrame):
        raise TypeError(
            f"rules on records need a collected polars DataFrame, not {type(frame).__name__}: pandera skips data checks on a LazyFrame"
        )
    broken: dict[str, set[int]] = {}
    said: dict[str, str] = {}
    try:
        schema(recipe, vocabulary).validate(frame, lazy=True)
    except pa.errors.SchemaErrors as errors:
        for error in errors.schema_errors:
            name = getattr(error.check, "name", None)
            rule = name if name in RECORD_RULES and error.reason_code == pa.errors.SchemaErrorReason.DATAFRAME_CHECK else "schema"
            broken.setdefault(rule, set()).update(_failing(error, frame))
            if rule == "schema":
                said.setdefault("schema", f"{error.schema.name or 'frame'}: {error.reason_code.name.lower()}")
    for rule, meaning in RECORD_RULES.items():
        rows = sorted(broken.get(rule, ()))
        failed = rule in broken
        allowed = rule == "unique_ids" and recipe.records.duplicates == "keep"
        detail = f"{said.get(rule) or f'{len(rows)} of {frame.height} records fail'}: {meaning}" if failed else meaning
        judged.add(rule, (WARN if allowed else FAIL) if failed else PASS, len(rows), 0, detail)
        if rows and "record" in frame.columns:
            judged.failing[rule] = [str(name) for name in frame["record"].gather(rows[:SHOWN])]


def _failing(error: Any, frame: pl.DataFrame) -> list[int]:
    """Row numbers of one pandera error; a missing column or a wrong type concerns every row."""
    output = getattr(error, "check_output", None)
    if isinstance(output, pl.LazyFrame):
        output = output.collect()
    if isinstance(output, pl.DataFrame) and output.height == frame.height and output.width:
        return pl.arg_where(~output[output.columns[-1]].fill_null(False), eager=True).to_list()
    return list(range(frame.height))


# ---- rules on totals


def judge_totals(
    frame: pl.DataFrame, entries: list[tuple[TokenLeaf, Leaf]], records: Records, shards: Shards, recipe: Recipe, judged: Judged
) -> None:
    """Rules on sums: what the documents say against what the leaves hold, and the recipe's limits on shares."""
    limits = recipe.validation
    wrong = [
        f"leaf {entry.sha256[:12]}"
        for entry, leaf in entries
        if (entry.records, entry.tokens, entry.trained) != (len(leaf), len(leaf.flat_ids), int(leaf.trained.sum()))
    ]
    for split in ("train", "validation"):
        part = frame.filter(pl.col("split") == split)
        found = (part.height, int(part["tokens"].sum()), int(part["trained"].sum()))
        if found != (shards.records.get(split), shards.tokens.get(split), shards.trained.get(split)):
            wrong.append(f"split {split}: {found} records, tokens, trained")
    if sum(records.splits.values()) != frame.height + shards.untrained_records:
        wrong.append(f"{sum(records.splits.values())} records, but {frame.height} tokenised and {shards.untrained_records} untrained")
    judged.add("totals", FAIL if wrong else PASS, len(wrong), 0, "; ".join(wrong[:5]) or "leaves hold what the documents say")

    train = shards.records.get("train", 0)
    judged.add("min_records", FAIL if train < limits.min_records else PASS, train, limits.min_records, f"{train} records to train on")
    tokens, trained = int(frame["tokens"].sum()), int(frame["trained"].sum())
    share = trained / tokens if tokens else 0.0
    judged.add(
        "trained_share",
        FAIL if share < limits.min_trained else PASS,
        share,
        limits.min_trained,
        f"{trained} of {tokens} tokens are trained",
    )
    cut = int(frame["cut"].sum())
    share = cut / (tokens + cut) if tokens + cut else 0.0
    detail = f"{cut} tokens of {shards.truncated_records} records are cut off at sharding.max_tokens"
    judged.add("truncation", FAIL if share > limits.max_truncated else PASS, share, limits.max_truncated, detail)
    lost = shards.untrained_records
    judged.add("untrained_records", WARN if lost else PASS, lost, 0, f"{lost} records have no trained token and are left out")


# ---- the report


def histograms(frame: pl.DataFrame) -> dict[str, dict[str, int]]:
    """Records by tenth of trained tokens (lower edge in percent) and by trained turns, for the report and its pictures."""
    shares = Counter(
        str(int(10 * trained / tokens) * 10) if tokens else "0" for trained, tokens in frame.select("trained", "tokens").iter_rows()
    )
    return {
        "trained_percent": dict(sorted(shares.items(), key=lambda item: int(item[0]))),
        "turns": {str(turns): count for turns, count in sorted(Counter(frame["turns"].to_list()).items())},
    }
