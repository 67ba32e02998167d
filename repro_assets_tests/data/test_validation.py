"""The verdict on shards. Every rule is made to fail by a planted defect, and passes without it."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

import msgspec
import numpy as np
import polars as pl
import pytest

from repro_assets.data import leaves, records, reproduction, rules, sharding, validation
from repro_assets.data.judged import Judged
from repro_assets.data.leaves import Leaf
from repro_assets.documents import BaseModel, RawFile, Records, ShardsObserved, TokenLeaf, ValidationReport
from repro_assets.recipe import Drift, Recipe, RecordsSection, ShardingSection, Split, ValidationSection
from repro_assets.trust.blob import FolderStore
from repro_assets.trust.canonical import canonical, sha256
from repro_assets_tests.data.material import CHAT, PAIR, Raw, jsonl, recipe_of, row

CLEANING = RecordsSection(sources=(CHAT,), split=Split(validation=0.2))


class Case:
    """Good shards of forty records, and the means to judge them, whole or with a defect."""

    def __init__(self, store: FolderStore, base_model: BaseModel) -> None:
        self.store, self.base_model = store, base_model
        texts = [f"question number {n}" for n in range(40)]
        self.raw = Raw(
            {"a b.jsonl": jsonl(*(row(text, f"answer {text}", intent="login" if text[-1] in "01" else "refund") for text in texts))}, store
        )
        self.records: Records = self.raw.records(CLEANING, target=8)
        self.shards, self.observed = sharding.build(self.records, base_model, ShardingSection(), store)
        self.recipe: Recipe = recipe_of(CLEANING)

    def judge(self, **changed: Any) -> ValidationReport:
        how = {
            "snapshot": self.raw.snapshot,
            "open_raw": self.raw.open,
            "records": self.records,
            "shards": self.shards,
            "shards_observed": self.observed,
            "base_model": self.base_model,
            "recipe": self.recipe,
            "store": self.store,
            **changed,
        }
        return validation.build(**how)[0]

    def planted(self, change: Callable[[Leaf], Leaf], count: bool = True) -> dict[str, Any]:
        """The shards with their first leaf changed, documents and identities made to fit."""
        entry, leaf = next(iter(sharding.stored_leaves(self.shards, self.observed, self.store)))
        bad = change(leaf)
        name = leaves.identity(bad)
        there = TokenLeaf(entry.split, entry.source, name, len(bad), len(bad.flat_ids), int(bad.trained.sum()))
        everything = (there, *self.shards.leaves[1:])
        sums = {
            field: {split: sum(getattr(one, field) for one in everything if one.split == split) for split in ("train", "validation")}
            for field in ("records", "tokens", "trained")
        }
        shards = msgspec.structs.replace(self.shards, leaves=everything, **(sums if count else {}))
        stored = {**self.observed.stored, name: self.store.put_bytes(leaves.store_form(bad))}
        return {"shards": shards, "shards_observed": ShardsObserved(stored, 0, 0, 0, 0.0)}


@pytest.fixture
def case(store: FolderStore, base_model: BaseModel) -> Case:
    return Case(store, base_model)


def verdicts(report: ValidationReport, *names: str) -> dict[str, str]:
    return {rule.name: rule.verdict for rule in report.rules if not names or rule.name in names}


def remade(leaf: Leaf, **columns: Any) -> Leaf:
    """The leaf with some records' columns replaced, token digests made to fit."""
    parts: dict[str, Any] = {
        "records": [bytes(one) for one in leaf.record],
        "keys": leaf.keys,
        "slices": leaf.slices,
        "ids": leaf.ids,
        "spans": leaf.spans,
        "cut": leaf.cut.tolist(),
        **columns,
    }
    return leaves.make(**parts, width=leaf.width)


def first(items: list[Any], item: Any) -> list[Any]:
    return [item, *items[1:]]


def spans(*pairs: tuple[int, int]) -> Any:
    return np.array(pairs, np.uint32).reshape(-1, 2)


def test_good_shards_pass_every_rule_and_say_none_without_a_reference(case: Case) -> None:
    """S0.56: every rule is in the report with its verdict."""
    report = case.judge()
    found = verdicts(report)
    assert report.verdict == "pass"
    assert set(found) == {
        *rules.RECORD_RULES,
        "totals",
        "min_records",
        "trained_share",
        "truncation",
        "untrained_records",
        "reproduction",
        "drift lengths",
        "drift trained_tokens",
        "drift slice intent",
    }
    assert {name for name, verdict in found.items() if verdict == "none"} == {"drift lengths", "drift trained_tokens", "drift slice intent"}
    assert set(found.values()) == {"pass", "none"}
    assert msgspec.to_builtins(report.reproduction) == {"drawn": 40, "equal": 40, "differing": ()}
    written = json.loads(case.store.get_bytes(report.report.sha256))
    assert written["distributions"]["now"]["slice intent"] == {"login": 8, "refund": 32}
    assert written["failing"] == {}
    assert sum(written["histograms"]["trained_percent"].values()) == 40 == written["histograms"]["turns"]["1"]


def test_the_report_comes_out_the_same_again(case: Case) -> None:
    """S0.4: canonical JSON of whole counts and rounded effects, no clock in it."""
    assert canonical(case.judge(reference=case.shards)) == canonical(case.judge(reference=case.shards))


DEFECTS: dict[str, Callable[[Leaf], Leaf]] = {
    "unique_ids": lambda leaf: remade(leaf, records=first([bytes(one) for one in leaf.record], bytes(leaf.record[1]))),
    "length_range": lambda leaf: remade(leaf, ids=first(leaf.ids, leaf.ids[0][:1]), spans=first(leaf.spans, spans())),
    "loss_mask": lambda leaf: remade(leaf, spans=first(leaf.spans, spans())),
    "loss_spans": lambda leaf: remade(leaf, spans=first(leaf.spans, spans((2, 5), (4, len(leaf.ids[0]))))),
    "token_ids": lambda leaf: remade(leaf, ids=first(leaf.ids, np.where(leaf.ids[0] == leaf.ids[0][1], 700, leaf.ids[0]))),
    "end_of_turn": lambda leaf: remade(leaf, spans=first(leaf.spans, leaf.spans[0] - np.array([0, 1], np.uint32))),
    "untrained_prompt": lambda leaf: remade(leaf, spans=first(leaf.spans, spans((0, len(leaf.ids[0]))))),
}


@pytest.mark.parametrize("rule", sorted(DEFECTS))
def test_a_defect_in_one_record_fails_its_rule_and_names_the_record(case: Case, rule: str) -> None:
    """S0.30, S0.36, S1.11: each rule is made to fail."""
    planted = case.planted(DEFECTS[rule])
    report = case.judge(**planted)
    failed = {rule.name: rule for rule in report.rules if rule.verdict == "fail"}
    assert rule in failed
    assert report.verdict == "fail"
    allowed = {rule, "reproduction", *({"loss_mask", "end_of_turn"} if rule == "length_range" else ())}
    allowed |= {"totals"} if rule == "unique_ids" else set()
    assert set(failed) <= allowed, failed
    assert failed[rule].effect == (2 if rule == "unique_ids" else 1)
    _entry, leaf = next(iter(sharding.stored_leaves(planted["shards"], planted["shards_observed"], case.store)))
    named = json.loads(case.store.get_bytes(report.report.sha256))["failing"][rule]
    assert named == [leaf.records[0]] * int(failed[rule].effect or 0)


def test_spans_beyond_the_record_or_empty_or_reversed_are_found(case: Case) -> None:
    for bad in (spans((2, 9999)), spans((5, 5)), spans((6, 4)), spans((6, 8), (2, 4))):
        report = case.judge(**case.planted(lambda leaf, bad=bad: remade(leaf, spans=first(leaf.spans, bad))))  # type: ignore[misc]
        assert verdicts(report)["loss_spans"] == "fail", bad


def test_a_cut_record_may_end_without_its_end_mark_and_others_may_not(case: Case) -> None:
    def cut(leaf: Leaf, tokens: int) -> Leaf:
        ids, mask = leaf.ids[0][:-1], spans((int(leaf.spans[0][0][0]), len(leaf.ids[0]) - 1))
        return remade(leaf, ids=first(leaf.ids, ids), spans=first(leaf.spans, mask), cut=first(leaf.cut.tolist(), tokens))

    assert verdicts(case.judge(**case.planted(lambda leaf: cut(leaf, 1))))["end_of_turn"] == "pass"
    assert verdicts(case.judge(**case.planted(lambda leaf: cut(leaf, 0))))["end_of_turn"] == "fail"


def test_duplicates_that_the_recipe_keeps_are_a_warning(case: Case) -> None:
    planted = case.planted(DEFECTS["unique_ids"])
    kept = recipe_of(msgspec.structs.replace(CLEANING, duplicates="keep"))
    assert verdicts(case.judge(**planted, recipe=kept))["unique_ids"] == "warn"


@pytest.mark.parametrize(
    "change",
    [
        lambda frame: frame.drop("trained"),
        lambda frame: frame.with_columns(pl.col("tokens").cast(pl.Int64)),
        lambda frame: frame.with_columns(pl.when(pl.col("tokens") > 0).then(None).otherwise(pl.col("split")).alias("split")),
        lambda frame: frame.with_columns(pl.lit("NOT-HEX").alias("record")),
        lambda frame: frame.with_columns(pl.lit("test").alias("split")),
        lambda frame: frame.with_columns(pl.lit(1).alias("surplus")),
    ],
)
def test_a_frame_of_another_shape_fails_the_schema(case: Case, change: Callable[[pl.DataFrame], pl.DataFrame]) -> None:
    """S0.7, S3.13: columns, types and nulls."""
    frame, _expected = rules.table(list(sharding.stored_leaves(case.shards, case.observed, case.store)), [4])
    judged = Judged()
    rules.judge_records(change(frame), case.recipe, 700, judged)
    assert {rule.name: rule.verdict for rule in judged.rules}["schema"] == "fail"


def test_a_lazy_frame_is_refused_because_pandera_would_pass_it_in_silence(case: Case) -> None:
    frame, _expected = rules.table(list(sharding.stored_leaves(case.shards, case.observed, case.store)), [4])
    broken: Any = frame.with_columns(pl.lit(0, pl.UInt32).alias("trained")).lazy()
    rules.schema(case.recipe, 700).validate(broken).collect()
    with pytest.raises(TypeError, match="collected polars DataFrame, not LazyFrame"):
        rules.judge_records(broken, case.recipe, 700, Judged())


def test_documents_that_do_not_add_up_to_their_leaves_fail(case: Case) -> None:
    wrong = msgspec.structs.replace(case.shards, tokens={**case.shards.tokens, "train": 1})
    assert verdicts(case.judge(shards=wrong))["totals"] == "fail"
    leaf = msgspec.structs.replace(case.shards.leaves[0], trained=1)
    report = case.judge(shards=msgspec.structs.replace(case.shards, leaves=(leaf, *case.shards.leaves[1:])))
    assert next(rule.detail for rule in report.rules if rule.name == "totals") == f"leaf {leaf.sha256[:12]}"
    lost = msgspec.structs.replace(case.records, splits={"train": 99, "validation": 1})
    assert verdicts(case.judge(records=lost))["totals"] == "fail"


@pytest.mark.parametrize(
    ("limits", "rule", "verdict"),
    [
        (ValidationSection(min_records=33), "min_records", "fail"),
        (ValidationSection(min_trained=0.99), "trained_share", "fail"),
        (ValidationSection(min_tokens=50), "length_range", "fail"),
        (ValidationSection(max_truncated=0.0), "truncation", "pass"),
    ],
)
def test_limits_of_the_recipe_are_held(case: Case, limits: ValidationSection, rule: str, verdict: str) -> None:
    assert case.shards.records["train"] < 33
    assert verdicts(case.judge(recipe=recipe_of(CLEANING, validation=limits)))[rule] == verdict


def test_truncation_and_untrained_records_are_judged(case: Case) -> None:
    """S1.11: what is cut off is a share of tokens with a limit, what is left out is a warning."""
    section = ShardingSection(max_tokens=17)
    shards, observed = sharding.build(case.records, case.base_model, section, case.store)
    assert shards.truncated_tokens > 0
    report = case.judge(shards=shards, shards_observed=observed, recipe=recipe_of(CLEANING, sharding=section))
    total = sum(shards.tokens.values()) + shards.truncated_tokens
    rule = next(rule for rule in report.rules if rule.name == "truncation")
    assert (rule.verdict, rule.effect) == ("fail", round(shards.truncated_tokens / total, 8))
    fewer = msgspec.structs.replace(case.shards, untrained_records=2)
    more = msgspec.structs.replace(case.records, splits={**case.records.splits, "train": case.records.splits["train"] + 2})
    report = case.judge(shards=fewer, records=more)
    assert (verdicts(report, "untrained_records", "totals"), report.verdict) == ({"untrained_records": "warn", "totals": "pass"}, "warn")


# ---- drift


def test_the_same_data_has_no_drift(case: Case) -> None:
    report = case.judge(reference=case.shards)
    drifts = {rule.name: (rule.verdict, rule.effect) for rule in report.rules if rule.name.startswith("drift")}
    assert drifts == {
        f"drift {name} {measure}": ("pass", 0) for name in ("lengths", "trained_tokens", "slice intent") for measure in ("psi", "js")
    }


def test_a_moved_slice_is_judged_by_effect_size_and_names_what_is_new(case: Case) -> None:
    """S0.31, S1.10, S3.14: class drift against a reference."""
    before = msgspec.structs.replace(case.shards, slices={"intent": {"refund": 32, "crash": 8}})
    report = case.judge(reference=before)
    rule = next(rule for rule in report.rules if rule.name == "drift slice intent psi")
    assert (rule.verdict, rule.limit, rule.detail) == ("fail", 0.25, "new: login; gone: crash")
    mild = msgspec.structs.replace(case.shards, slices={"intent": {"refund": 36, "login": 4}})
    lenient = recipe_of(CLEANING, validation=ValidationSection(drift=Drift(psi_warn=0.01, psi_fail=5, js_warn=0.9, js_fail=1)))
    found = verdicts(case.judge(reference=mild, recipe=lenient))
    assert (found["drift slice intent psi"], found["drift slice intent js"]) == ("warn", "pass")


def test_moved_lengths_and_trained_shares_are_drift(case: Case) -> None:
    """S0.32: token-length distribution; the share of trained tokens too."""
    longer = msgspec.structs.replace(case.shards, lengths={"512": 40}, trained=dict.fromkeys(case.shards.trained, 1))
    found = verdicts(case.judge(reference=longer))
    assert (found["drift lengths psi"], found["drift lengths js"], found["drift trained_tokens psi"]) == ("fail", "fail", "fail")


def test_p_values_are_observed_and_no_part_of_the_content(case: Case) -> None:
    how = (case.raw.snapshot, case.raw.open, case.records, case.shards, case.observed, case.base_model, case.recipe, case.store)
    result, observed = validation.build(*how, reference=case.shards)
    assert observed.p_values == {"lengths": 1.0, "slice intent": pytest.approx(1.0)}
    assert b"p_value" not in canonical(result) + case.store.get_bytes(result.report.sha256)


# ---- sample reproduction


def test_the_draw_is_by_keyed_hash_and_stable_under_new_records() -> None:
    """S0.35: which records are rebuilt is nobody's choice and no order's."""
    names = [sha256(str(n).encode()) for n in range(500)]
    drawn = reproduction.draw(names, 100)
    assert drawn == reproduction.draw(reversed(names), 100) == sorted(drawn)
    assert len(set(drawn)) == 100
    assert len(set(drawn) & set(reproduction.draw(names[5:], 100))) >= 95
    assert reproduction.draw(names[:7], 3000) == sorted(names[:7])


def test_ids_that_raw_does_not_give_are_found_by_record_and_line(case: Case) -> None:
    """S0.45, S0.46, S0.49: shards that look sound and are not what raw gives."""

    def turned(leaf: Leaf) -> Leaf:
        return remade(leaf, ids=first(leaf.ids, np.append(np.roll(leaf.ids[0][:-1], 1), leaf.ids[0][-1])))

    planted = case.planted(turned)
    report = case.judge(**planted)
    assert {name for name, verdict in verdicts(report).items() if verdict == "fail"} == {"reproduction"}
    (named,) = report.reproduction.differing
    assert (report.reproduction.drawn, report.reproduction.equal) == (40, 39)
    _entry, leaf = next(iter(sharding.stored_leaves(planted["shards"], planted["shards_observed"], case.store)))
    line = next(place.line for place in records.places(case.store, case.records, "a b.jsonl") if place.id == leaf.records[0])
    assert named == f"{leaf.records[0]} (a b.jsonl:{line}): its tokens came out differently"


def test_raw_rows_that_changed_under_the_index_are_found(case: Case) -> None:
    data = case.raw.files["a b.jsonl"]
    lines = data.splitlines(keepends=True)
    swapped = b"".join([lines[0].replace(b"number 0", b"number X"), b"#" + lines[1][1:], *lines[2:]])

    def opened(file: RawFile) -> BinaryIO:
        return io.BytesIO(swapped)

    report = case.judge(open_raw=opened)
    assert report.reproduction.equal == 38
    assert any("the row is record" in text for text in report.reproduction.differing)
    assert any("the row is bad now: not_json" in text for text in report.reproduction.differing)
    cut = case.judge(open_raw=lambda file: io.BytesIO(data[: len(data) // 2]))
    assert cut.reproduction.equal < 25


def test_records_that_no_index_leads_to_are_found(case: Case) -> None:
    report = case.judge(records=msgspec.structs.replace(case.records, index={}))
    assert (report.reproduction.equal, len(report.reproduction.differing)) == (0, 10)
    assert report.reproduction.differing[0].endswith("(raw): no index leads to it")


def test_only_as_many_as_the_recipe_says_are_rebuilt(case: Case) -> None:
    report = case.judge(recipe=recipe_of(CLEANING, validation=ValidationSection(reproduce=7)))
    assert (report.reproduction.drawn, report.reproduction.equal) == (7, 7)


def test_real_rows_of_parquet_and_jsonl_are_rebuilt_alike(store: FolderStore, base_model: BaseModel, gsm8k: bytes) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [json.loads(line) for line in gsm8k.splitlines()]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows[:200]), sink, row_group_size=64)
    raw = Raw({"a.parquet": sink.getvalue(), "b.jsonl": b"".join(gsm8k.splitlines(keepends=True)[200:])}, store)
    cleaning = RecordsSection(sources=(PAIR,))
    made = raw.records(cleaning)
    assert made.leaves == Raw({"a.jsonl": gsm8k}, store).records(cleaning).leaves
    shards, observed = sharding.build(made, base_model, ShardingSection(), store)
    report, _observed = validation.build(raw.snapshot, raw.open, made, shards, observed, base_model, recipe_of(cleaning), store)
    assert (report.verdict, report.reproduction.drawn, report.reproduction.equal) == ("pass", 400, 400)


def test_importing_the_validation_loads_neither_pandera_nor_polars_nor_scipy() -> None:
    """Dagster's definitions import it; pandera alone takes more than a second."""
    heavy = ("pandera", "polars", "scipy", "pyarrow", "torch", "transformers", "dagster")
    code = f"import sys, repro_assets.data.validation; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
