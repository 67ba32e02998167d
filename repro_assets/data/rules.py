"""Rules on the shards as pandera checks on one collected polars frame, and rules on its sums.

A module of its own because pandera takes a second to import: `validation.py` imports it when it works, never before.
"""

from typing import Any

import pandera.polars as pa
import polars as pl

from repro_assets.data.frame import COLUMNS, label_column
from repro_assets.data.judged import FAIL, PASS, RECORDS, SHOWN, TOTALS, WARN, Judged
from repro_assets.documents import Records, Shards
from repro_assets.recipe import Range, Recipe

#: rule on records -> what holds when it passes
RECORD_RULES = {
    "schema": "columns, types, no nulls, ids and splits as documented",
    "unique_ids": "no record twice, in one split or both",
    "length_range": "tokens between validation.min_tokens and sharding.max_tokens",
    "loss_mask": "at least one trained token",
    "loss_spans": "trained spans in order, apart and inside the record",
    "token_ids": "ids inside the model's vocabulary",
    "end_of_turn": "every trained turn that was not cut ends with a control token, and the mask includes it",
    "untrained_prompt": "something that is not trained comes before what is",
    "texts": "the record leaf that the token leaf names holds the record's text",
    "blank_turns": "no turn is empty or white space",
    "roles": "the chat template takes the roles in this order",
    "template": "the tokens begin and end as the chat template writes them",
}
#: a bad record in these is worth a look and no reason to stop
LENIENT = frozenset({"blank_turns"})


# ---- the schema


def rule_names(recipe: Recipe) -> dict[str, str]:
    """Every rule on records under this recipe, and what holds when it passes."""
    limits = recipe.validation
    ranges = {f"range {column}": f"{column} {_said(bounds)}" for column, bounds in sorted(limits.ranges.items())}
    slices = {
        label_column(label): f"every record has the label {label}" + (f": {', '.join(values[:10])}" if values else "")
        for label, values in sorted(limits.slices.items())
    }
    return {**RECORD_RULES, **ranges, **slices}


def _said(bounds: Range) -> str:
    return " and ".join(
        text
        for text in (
            f"at least {bounds.min}" if bounds.min is not None else "",
            f"at most {bounds.max}" if bounds.max is not None else "",
        )
        if text
    )


def schema(recipe: Recipe, vocabulary: int, labels: tuple[str, ...] = (), refused_roles: tuple[str, ...] = ()) -> pa.DataFrameSchema:
    """Every rule that one row, or the ids of all rows, can break. `labels`: slice labels that the frame has a column for.

    `refused_roles`: sequences of roles that the chat template does not take.
    """
    longest, shortest = recipe.sharding.max_tokens, recipe.validation.min_tokens

    def whole(name: str, expression: pl.Expr) -> pa.Check:
        return pa.Check(lambda data: data.lazyframe.select(expression.fill_null(True)), name=name)

    columns: dict[str, list[pa.Check]] = {name: [] for name in COLUMNS}
    columns["record"].append(pa.Check.str_matches("^[0-9a-f]{64}$", name="schema"))
    columns["split"].append(pa.Check.isin(["train", "validation"], name="schema"))
    columns["tokens"].append(pa.Check.in_range(shortest, longest, name="length_range"))
    columns["trained"].append(pa.Check.ge(1, name="loss_mask"))
    columns["highest"].append(pa.Check.lt(vocabulary, name="token_ids"))
    columns["spans_apart"].append(pa.Check.eq(True, name="loss_spans"))
    checks = [
        whole("unique_ids", pl.col("record").is_duplicated().not_()),
        whole("end_of_turn", pl.col("answers") == pl.col("answers_ended")),
        whole("untrained_prompt", pl.col("trained") < pl.col("tokens")),
        whole("texts", pl.col("roles").is_not_null()),
        whole("blank_turns", pl.col("blank_turns") == 0),
        whole("roles", pl.col("roles").is_in(list(refused_roles)).not_()),
        whole("template", pl.col("framed")),
    ]
    for column, bounds in recipe.validation.ranges.items():
        low = pl.lit(True) if bounds.min is None else pl.col(column) >= bounds.min
        high = pl.lit(True) if bounds.max is None else pl.col(column) <= bounds.max
        checks.append(whole(f"range {column}", low & high))
    for label, values in recipe.validation.slices.items():
        name = label_column(label)
        there = pl.col(name).is_not_null()
        checks.append(whole(name, there & pl.col(name).is_in(list(values)) if values else there))
    unknown = {"characters", "turns", "longest_turn", "blank_turns", "roles", "framed"}
    return pa.DataFrameSchema(
        {
            **{name: pa.Column(COLUMNS[name], list_, nullable=name in unknown) for name, list_ in columns.items()},
            **{label_column(label): pa.Column(pl.String, nullable=True) for label in labels},
        },
        checks=checks,
        strict=True,
    )


def judge_records(
    frame: pl.DataFrame, recipe: Recipe, vocabulary: int, judged: Judged, refused_roles: dict[str, str] | None = None
) -> None:
    """One rule each of `rule_names`; effect is the number of records that fail, limit the number that may.

    `refused_roles`: sequence of roles to the reason why the chat template does not take it.
    """
    if not isinstance(frame, pl.DataFrame):
        raise TypeError(
            f"rules on records need a collected polars DataFrame, not {type(frame).__name__}: pandera skips data checks on a LazyFrame"
        )
    refused = refused_roles or {}
    named = rule_names(recipe)
    labels = tuple(name.removeprefix("slice ") for name in frame.columns if name.startswith("slice "))
    broken: dict[str, set[int]] = {}
    said: dict[str, str] = {}
    try:
        schema(recipe, vocabulary, labels, tuple(refused)).validate(frame, lazy=True)
    except pa.errors.SchemaErrors as errors:
        for error in errors.schema_errors:
            name = getattr(error.check, "name", None)
            rule = name if name in named and error.reason_code == pa.errors.SchemaErrorReason.DATAFRAME_CHECK else "schema"
            broken.setdefault(rule, set()).update(_failing(error, frame))
            if rule == "schema":
                said.setdefault("schema", f"{error.schema.name or 'frame'}: {error.reason_code.name.lower()}")
    if "roles" in broken:
        said["roles"] = "; ".join(f"{roles}: {why}" for roles, why in list(refused.items())[:3])
    for rule, meaning in named.items():
        rows = sorted(broken.get(rule, ()))
        allowed = _allowed(rule, recipe, frame.height)
        verdict = PASS if rule not in broken else WARN if len(rows) <= allowed or _lenient(rule, recipe) else FAIL
        detail = f"{said.get(rule) or f'{len(rows)} of {frame.height} records fail'}: {meaning}" if rule in broken else meaning
        judged.add(RECORDS, rule, verdict, len(rows), allowed, detail)
        if rows and "record" in frame.columns:
            judged.failing[rule] = [str(name) for name in frame["record"].gather(rows[:SHOWN])]


def _allowed(rule: str, recipe: Recipe, height: int) -> int:
    bounds = recipe.validation.ranges.get(rule.removeprefix("range ")) if rule.startswith("range ") else None
    return int(bounds.allowed * height) if bounds else 0


def _lenient(rule: str, recipe: Recipe) -> bool:
    return rule in LENIENT or (rule == "unique_ids" and recipe.records.duplicates == "keep")


def _failing(error: Any, frame: pl.DataFrame) -> list[int]:
    """Row numbers of one pandera error; a missing column or a wrong type concerns every row."""
    output = getattr(error, "check_output", None)
    if isinstance(output, pl.LazyFrame):
        output = output.collect()
    if isinstance(output, pl.DataFrame) and output.height == frame.height and output.width:
        return pl.arg_where(~output[output.columns[-1]].fill_null(False), eager=True).to_list()
    return list(range(frame.height))


# ---- rules on totals


def judge_totals(frame: pl.DataFrame, torn: list[str], records: Records, shards: Shards, recipe: Recipe, judged: Judged) -> None:
    """Rules on sums: what the documents say against what the leaves hold, and the recipe's limits on shares."""
    limits = recipe.validation
    wrong = list(torn)
    for split in ("train", "validation"):
        part = frame.filter(pl.col("split") == split)
        found = (part.height, int(part["tokens"].sum()), int(part["trained"].sum()))
        if found != (shards.records.get(split), shards.tokens.get(split), shards.trained.get(split)):
            wrong.append(f"split {split}: {found} records, tokens, trained")
    if sum(records.splits.values()) != frame.height + shards.untrained_records:
        wrong.append(f"{sum(records.splits.values())} records, but {frame.height} tokenised and {shards.untrained_records} untrained")
    judged.add(TOTALS, "totals", FAIL if wrong else PASS, len(wrong), 0, "; ".join(wrong[:5]) or "leaves hold what the documents say")

    train = shards.records.get("train", 0)
    judged.add(
        TOTALS, "min_records", FAIL if train < limits.min_records else PASS, train, limits.min_records, f"{train} records to train on"
    )
    tokens, trained = int(frame["tokens"].sum()), int(frame["trained"].sum())
    share = trained / tokens if tokens else 0.0
    detail = f"{trained} of {tokens} tokens are trained"
    judged.add(TOTALS, "trained_share", FAIL if share < limits.min_trained else PASS, share, limits.min_trained, detail)
    cut = int(frame["cut"].sum())
    share = cut / (tokens + cut) if tokens + cut else 0.0
    detail = f"{cut} tokens of {shards.truncated_records} records are cut off at sharding.max_tokens"
    judged.add(TOTALS, "truncation", FAIL if share > limits.max_truncated else PASS, share, limits.max_truncated, detail)
    lost = shards.untrained_records
    detail = f"{lost} records have no trained token and are left out"
    judged.add(TOTALS, "untrained_records", WARN if lost else PASS, lost, 0, detail)
