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

from repro_assets.data import conversations, embedding, frame, leaves, lines, records, reproduction, rules, sharding, validation
from repro_assets.data.judged import Judged
from repro_assets.data.leaves import Leaf
from repro_assets.data.lines import Message, Record
from repro_assets.documents import BaseModel, RawFile, Records, ValidationReport
from repro_assets.recipe import Drift, Language, Range, Recipe, RecordsSection, ShardingSection, Split, ValidationSection
from repro_assets.trust.blob import FolderStore
from repro_assets.trust.canonical import canonical, sha256
from repro_assets_tests.data.material import CHAT, PAIR, TEMPLATE, Raw, base_model_of, jsonl, recipe_of, row

CLEANING = RecordsSection(sources=(CHAT,), split=Split(validation=0.2))
COUNT = 120
#: every optional rule is on
STRICT = ValidationSection(
    ranges={"characters": Range(min=20, max=400), "turns": Range(max=2)},
    slices={"intent": ("login", "refund")},
    language=Language(expected=("en",), minimum=0.99),
    max_roundtrip=0.0,
)
SUITE = json.dumps(
    {"name": "ours", "expectations": [{"type": "expect_column_values_to_be_in_set", "kwargs": {"column": "cut", "value_set": [0]}}]}
).encode()
EXPECTED = "expectation column_values_to_be_in_set cut"
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
)
GERMAN = "Könnten Sie mir bitte erklären, wie ich das vergessene Kennwort meines Kontos zurücksetzen kann?"


class Case:
    """Good shards of 120 records, and the means to judge them, whole or with a defect."""

    def __init__(self, store: FolderStore, tokenizer_json: bytes) -> None:
        self.store, self.tokenizer_json = store, tokenizer_json
        self.base_model = base_model_of(store, tokenizer_json, TEMPLATE)
        texts = [f"How do I get my money back for order number {n}?" for n in range(COUNT)]
        self.raw = Raw(
            {
                "a b.jsonl": jsonl(
                    *(
                        row(text, f"We return the money for order {n} within a week.", intent="login" if n % 10 < 2 else "refund")
                        for n, text in enumerate(texts)
                    )
                )
            },
            store,
        )
        self.records: Records = self.raw.records(CLEANING, target=8)
        self.shards, self.observed = sharding.build(self.records, self.base_model, ShardingSection(), store)
        self.recipe: Recipe = recipe_of(CLEANING)
        self.strict: Recipe = recipe_of(CLEANING, validation=STRICT)
        self.report = self.judge()

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

    def everything(self, **changed: Any) -> ValidationReport:
        """Judged by every rule there is: a strict recipe, a reference, a suite."""
        return self.judge(**{"recipe": self.strict, "reference": self.report, "suite": SUITE, **changed})

    def planted(self, change: Callable[[Leaf], Leaf], **entry_changed: Any) -> dict[str, Any]:
        """The shards with their first leaf changed, documents and identities made to fit."""
        entry, leaf = next(iter(sharding.stored_leaves(self.shards, self.observed, self.store)))
        bad = change(leaf)
        name = leaves.identity(bad)
        facts = {"sha256": name, "records": len(bad), "tokens": len(bad.flat_ids), "trained": int(bad.trained.sum())}
        everything = (msgspec.structs.replace(entry, **facts, **entry_changed), *self.shards.leaves[1:])
        sums = {
            field: {split: sum(getattr(one, field) for one in everything if one.split == split) for split in ("train", "validation")}
            for field in ("records", "tokens", "trained")
        }
        shards = msgspec.structs.replace(self.shards, leaves=everything, **sums)
        stored = {**self.observed.stored, name: self.store.put_bytes(leaves.store_form(bad))}
        return {"shards": shards, "shards_observed": msgspec.structs.replace(self.observed, stored=stored)}

    def planted_text(self, *messages: Message) -> dict[str, Any]:
        """The shards with the first record's text changed in the record leaf that they name."""
        entry = self.shards.leaves[0]
        first_one, *others = lines.decode(self.store.get_bytes(entry.source))
        changed = [Record(first_one.id, first_one.key, messages, first_one.slices), *others]
        blob = self.store.put_bytes(b"".join(lines.encode(record) for record in changed))
        entry = msgspec.structs.replace(entry, source=blob.sha256)
        return {"shards": msgspec.structs.replace(self.shards, leaves=(entry, *self.shards.leaves[1:]))}

    def reference(self, **distributions: dict[str, int]) -> ValidationReport:
        """The report of a snapshot whose distributions differ in these."""
        named = {name.replace("__", " "): counts for name, counts in distributions.items()}
        return msgspec.structs.replace(self.report, distributions={**self.report.distributions, **named})


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory, tokenizer_json: bytes) -> Case:
    return Case(FolderStore(tmp_path_factory.mktemp("store")), tokenizer_json)


def verdicts(report: ValidationReport, *names: str) -> dict[str, str]:
    return {rule.name: rule.verdict for rule in report.rules if not names or rule.name in names}


def written(case: Case, report: ValidationReport) -> Any:
    return json.loads(case.store.get_bytes(report.report.sha256))


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


def first(items: Any, item: Any) -> list[Any]:
    return [item, *list(items)[1:]]


def spans(*pairs: tuple[int, int]) -> Any:
    return np.array(pairs, np.uint32).reshape(-1, 2)


def turned(ids: Any) -> Any:
    """Other ids that the template's own tokens still enclose."""
    return np.concatenate([ids[:1], np.roll(ids[1:-1], 1), ids[-1:]])


def user(text: str) -> Message:
    return Message(content=text, role="user")


def assistant(text: str) -> Message:
    return Message(content=text, role="assistant")


# ---- good shards


def test_good_shards_pass_every_rule_and_say_none_without_a_reference(case: Case) -> None:
    """S0.56: every rule is in the report with its verdict."""
    found = verdicts(case.report)
    drifts = {"drift lengths", "drift sources", "drift trained_percent", "drift trained_tokens", "drift slice intent", "drift words"}
    totals = {"totals", "min_records", "trained_share", "truncation", "untrained_records"}
    assert set(found) == {*rules.RECORD_RULES, *totals, "roundtrip", "reproduction", *drifts}
    assert {name for name, verdict in found.items() if verdict == "none"} == drifts
    assert (case.report.verdict, set(found.values())) == ("pass", {"pass", "none"})
    assert msgspec.to_builtins(case.report.reproduction) == {"drawn": COUNT, "equal": COUNT, "differing": ()}
    said = written(case, case.report)
    assert said["distributions"]["now"]["slice intent"] == {"login": 24, "refund": 96}
    assert said["distributions"]["now"]["sources"] == {"**": COUNT}
    assert said["failing"] == {}
    assert said["histograms"]["turns"] == {"2": COUNT}
    assert sum(said["histograms"]["trained_percent"].values()) == COUNT


def test_good_shards_pass_every_optional_rule_too(case: Case) -> None:
    report = case.everything()
    assert set(verdicts(report).values()) == {"pass"}, [rule for rule in report.rules if rule.verdict != "pass"]
    assert report.verdict == "pass"
    assert case.store.get_bytes(report.suite.sha256) == SUITE if report.suite else False


def test_the_report_comes_out_the_same_again(case: Case) -> None:
    """S0.4: canonical JSON of whole counts and rounded effects, no clock in it."""
    assert canonical(case.everything()) == canonical(case.everything())


# ---- every rule, by a planted defect


def _spelt(case: Case, leaf: Leaf) -> Leaf:
    """The first record's ids letter by letter: the same text in other tokens."""
    plain = conversations.Plain(case.tokenizer_json, range(5))
    text = plain.decode(leaf.ids[0].tolist())
    start, end = text.index("We return"), len(text) - len("<|end|>")
    middle = [token for letter in text[start:end] for token in plain.encode(letter)]
    before = plain.encode(text[:start])
    ids = np.array([*before, *middle, *plain.encode("<|end|>")])
    return remade(leaf, ids=first(leaf.ids, ids), spans=first(leaf.spans, spans((len(before), len(ids)))))


def _truncated(case: Case) -> dict[str, Any]:
    section = ShardingSection(max_tokens=30)
    shards, observed = sharding.build(case.records, case.base_model, section, case.store)
    return {"shards": shards, "shards_observed": observed, "recipe": recipe_of(CLEANING, sharding=section, validation=STRICT)}


def _recipe(**limits: Any) -> dict[str, Any]:
    return {"recipe": recipe_of(CLEANING, validation=msgspec.structs.replace(STRICT, **limits))}


def _other_words(case: Case) -> dict[str, Any]:
    rows = [(sha256(f"{n}".encode()), embedding.counts([f"{GERMAN} Bestellung {n}"])) for n in range(COUNT)]
    return {"reference": msgspec.structs.replace(case.report, words=case.store.put_bytes(embedding.Words(rows).encode()))}


def _leaf(change: Callable[[Leaf], Leaf]) -> Callable[[Case], dict[str, Any]]:
    return lambda case: case.planted(change)


#: rule -> a defect that it has to find
DEFECTS: dict[str, Callable[[Case], dict[str, Any]]] = {
    "schema": lambda case: case.planted(lambda leaf: leaf, split="test"),
    "unique_ids": _leaf(lambda leaf: remade(leaf, records=first([bytes(one) for one in leaf.record], bytes(leaf.record[1])))),
    "length_range": _leaf(lambda leaf: remade(leaf, ids=first(leaf.ids, leaf.ids[0][:1]), spans=first(leaf.spans, spans()))),
    "loss_mask": _leaf(lambda leaf: remade(leaf, spans=first(leaf.spans, spans()))),
    "loss_spans": _leaf(lambda leaf: remade(leaf, spans=first(leaf.spans, spans((2, 5), (4, len(leaf.ids[0])))))),
    "token_ids": _leaf(lambda leaf: remade(leaf, ids=first(leaf.ids, np.where(leaf.ids[0] == leaf.ids[0][1], 700, leaf.ids[0])))),
    "end_of_turn": _leaf(lambda leaf: remade(leaf, spans=first(leaf.spans, leaf.spans[0] - np.array([0, 1], np.uint32)))),
    "untrained_prompt": _leaf(lambda leaf: remade(leaf, spans=first(leaf.spans, spans((0, len(leaf.ids[0])))))),
    "texts": _leaf(lambda leaf: remade(leaf, records=first([bytes(one) for one in leaf.record], bytes(32)))),
    "blank_turns": lambda case: case.planted_text(user("What is the matter with my order?"), assistant(" \n")),
    "roles": lambda case: {
        **case.planted_text(user("How do I get my money back?"), user("Where has my order gone?")),
        "base_model": base_model_of(case.store, case.tokenizer_json, ALTERNATING + TEMPLATE.removeprefix("{% for m in messages %}")),
    },
    "template": _leaf(lambda leaf: remade(leaf, ids=first(leaf.ids, np.concatenate([[1], leaf.ids[0][1:]])))),
    "range characters": lambda case: case.planted_text(user("Is it long? " * 40), assistant("It is.")),
    "range turns": lambda case: case.planted_text(user("Where is it?"), assistant("Here."), user("Where?"), assistant("Here, I say.")),
    "slice intent": _leaf(lambda leaf: remade(leaf, slices=first(leaf.slices, {"intent": "unheard-of"}))),
    "totals": lambda case: {"shards": msgspec.structs.replace(case.shards, tokens={**case.shards.tokens, "train": 1})},
    "min_records": lambda _case: _recipe(min_records=COUNT),
    "trained_share": lambda _case: _recipe(min_trained=0.99),
    "truncation": _truncated,
    "untrained_records": lambda case: {"shards": msgspec.structs.replace(case.shards, untrained_records=2)},
    "roundtrip": lambda case: case.planted(lambda leaf: _spelt(case, leaf)),
    "language": lambda case: {**case.planted_text(user(GERMAN), assistant(GERMAN)), **_recipe(language=Language(("en",), 0.999))},
    "reproduction": _leaf(lambda leaf: remade(leaf, ids=first(leaf.ids, turned(leaf.ids[0])))),
    "drift lengths psi": lambda case: {"reference": case.reference(lengths={"512": COUNT})},
    "drift lengths js": lambda case: {"reference": case.reference(lengths={"512": COUNT})},
    "drift sources psi": lambda case: {"reference": case.reference(sources={"**": 60, "other/**": 60})},
    "drift sources js": lambda case: {"reference": case.reference(sources={"**": 60, "other/**": 60})},
    "drift trained_percent psi": lambda case: {"reference": case.reference(trained_percent={"0": COUNT})},
    "drift trained_percent js": lambda case: {"reference": case.reference(trained_percent={"0": COUNT})},
    "drift trained_tokens psi": lambda case: {"reference": case.reference(trained_tokens={"trained": 1, "untrained": 5000})},
    "drift trained_tokens js": lambda case: {"reference": case.reference(trained_tokens={"trained": 1, "untrained": 5000})},
    "drift slice intent psi": lambda case: {"reference": case.reference(slice__intent={"refund": 96, "crash": 24})},
    "drift slice intent js": lambda case: {"reference": case.reference(slice__intent={"refund": 96, "crash": 24})},
    "drift words auc": _other_words,
    EXPECTED: _leaf(lambda leaf: remade(leaf, cut=first(leaf.cut.tolist(), 3))),
}
WARNINGS = {"blank_turns", "untrained_records"}
#: a defect that cannot be planted without another rule seeing it too
ALSO = {
    "schema": {"totals"},
    "unique_ids": {"totals"},
    "totals": {"drift trained_tokens psi", "drift trained_tokens js"},
    "length_range": {"loss_mask", "end_of_turn", "template", "roundtrip", "untrained_prompt"},
    "token_ids": {"roundtrip"},
    "truncation": {
        EXPECTED,
        *(f"drift {name} {measure}" for name in ("lengths", "trained_percent", "trained_tokens") for measure in ("psi", "js")),
    },
    "untrained_records": {"totals"},
    "template": {"roundtrip"},
}


def test_every_rule_that_exists_has_a_planted_defect(case: Case) -> None:
    """S1.11: no rule is only ever seen to pass."""
    assert sorted(DEFECTS) == sorted(rule.name for rule in case.everything().rules)


@pytest.mark.parametrize("rule", sorted(DEFECTS))
def test_a_planted_defect_is_found_by_its_rule(case: Case, rule: str) -> None:
    """S0.30, S0.36, S1.11: each rule is made to fail, and no rule beside it cries without reason."""
    report = case.everything(**DEFECTS[rule](case))
    found = {one.name: one for one in report.rules if one.verdict in ("fail", "warn")}
    assert rule in found, sorted(found)
    assert found[rule].verdict == ("warn" if rule in WARNINGS else "fail")
    allowed = {rule, "reproduction", *ALSO.get(rule, set())}
    if rule.startswith("drift"):
        allowed |= {name for name in DEFECTS if name.rsplit(" ", 1)[0] == rule.rsplit(" ", 1)[0]}
    assert set(found) <= allowed, {name: one.detail for name, one in found.items()}
    assert report.verdict == ("warn" if {one.verdict for one in found.values()} == {"warn"} else "fail")


@pytest.mark.parametrize("rule", ["unique_ids", "loss_mask", "loss_spans", "token_ids", "end_of_turn", "untrained_prompt", "slice intent"])
def test_the_record_that_fails_is_named_and_counted(case: Case, rule: str) -> None:
    planted = DEFECTS[rule](case)
    report = case.everything(**planted)
    (one,) = [one for one in report.rules if one.name == rule]
    assert one.effect == (2 if rule == "unique_ids" else 1)
    _entry, leaf = next(iter(sharding.stored_leaves(planted["shards"], planted["shards_observed"], case.store)))
    named = written(case, report)["failing"][rule]
    assert [row["record"] for row in named] == [leaf.records[0]] * int(one.effect or 0)


def test_spans_beyond_the_record_or_empty_or_reversed_are_found(case: Case) -> None:
    for bad in (spans((2, 9999)), spans((5, 5)), spans((6, 4)), spans((6, 8), (2, 4))):
        report = case.judge(**case.planted(lambda leaf, bad=bad: remade(leaf, spans=first(leaf.spans, bad))))  # type: ignore[misc]
        assert verdicts(report)["loss_spans"] == "fail", bad


def test_a_cut_record_may_end_without_its_end_mark_and_others_may_not(case: Case) -> None:
    def cut(leaf: Leaf, tokens: int) -> Leaf:
        ids, mask = leaf.ids[0][:-1], spans((int(leaf.spans[0][0][0]), len(leaf.ids[0]) - 1))
        return remade(leaf, ids=first(leaf.ids, ids), spans=first(leaf.spans, mask), cut=first(leaf.cut.tolist(), tokens))

    assert verdicts(case.judge(**case.planted(lambda leaf: cut(leaf, 1))), "end_of_turn", "template") == {
        "end_of_turn": "pass",
        "template": "pass",
    }
    assert verdicts(case.judge(**case.planted(lambda leaf: cut(leaf, 0))), "end_of_turn", "template") == {
        "end_of_turn": "fail",
        "template": "fail",
    }


def test_duplicates_that_the_recipe_keeps_are_a_warning(case: Case) -> None:
    kept = recipe_of(msgspec.structs.replace(CLEANING, duplicates="keep"))
    assert verdicts(case.judge(**DEFECTS["unique_ids"](case), recipe=kept))["unique_ids"] == "warn"


def test_a_range_warns_as_long_as_few_enough_records_are_outside(case: Case) -> None:
    planted = DEFECTS["range characters"](case)
    for allowed, verdict in ((1 / COUNT, "warn"), (0.5 / COUNT, "fail")):
        section = ValidationSection(ranges={"characters": Range(max=400, allowed=allowed)})
        report = case.judge(**planted, recipe=recipe_of(CLEANING, validation=section))
        assert verdicts(report)["range characters"] == verdict


def test_a_label_must_be_there_and_any_value_will_do_when_none_is_listed(case: Case) -> None:
    missing = case.planted(lambda leaf: remade(leaf, slices=first(leaf.slices, {})))
    cases: list[tuple[dict[str, tuple[str, ...]], str | None]] = [({"intent": ()}, "fail"), ({"product": ()}, "fail"), ({}, None)]
    for section, verdict in cases:
        report = case.judge(**missing, recipe=recipe_of(CLEANING, validation=ValidationSection(slices=section)))
        assert next((one.verdict for one in report.rules if one.name.startswith("slice ")), None) == verdict
    other = case.judge(**DEFECTS["slice intent"](case), recipe=recipe_of(CLEANING, validation=ValidationSection(slices={"intent": ()})))
    assert verdicts(other)["slice intent"] == "pass"


def test_texts_too_short_to_tell_are_no_language_and_a_wrong_code_is_refused(case: Case) -> None:
    short = case.planted_text(user("1?"), assistant("2!"))
    detail = next(rule.detail for rule in case.everything(**short).rules if rule.name == "language")
    assert detail == f"{COUNT - 1} drawn records, expected en: en {COUNT - 1}; 1 with fewer than 20 letters not judged"
    with pytest.raises(ValueError, match=r"validation.language.expected: english: no such language in the model; it knows .*en"):
        case.judge(recipe=recipe_of(CLEANING, validation=ValidationSection(language=Language(("english",)))))


def test_messages_that_spell_a_control_token_are_left_out_of_the_round_trip(case: Case, store: FolderStore) -> None:
    raw = Raw({"a.jsonl": jsonl(row("what does <|end|> mean here?"), row("and what is a plain question?"))}, store)
    made = raw.records(CLEANING)
    model = base_model_of(store, case.tokenizer_json, TEMPLATE)
    shards, observed = sharding.build(made, model, ShardingSection(), store)
    report, _observed = validation.build(raw.snapshot, raw.open, made, shards, observed, model, case.recipe, store)
    rule = next(rule for rule in report.rules if rule.name == "roundtrip")
    assert (rule.verdict, rule.detail) == ("pass", "1 of 1 drawn records have the same ids after decoding and encoding again")


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
    judged = Judged()
    rules.judge_records(change(table(case).frame()), case.recipe, 700, judged)
    assert {rule.name: rule.verdict for rule in judged.rules}["schema"] == "fail"


def table(case: Case) -> frame.Table:
    return frame.read(sharding.stored_leaves(case.shards, case.observed, case.store), case.store, frame.Table([4], 10))


def test_a_lazy_frame_is_refused_because_pandera_would_pass_it_in_silence(case: Case) -> None:
    broken: Any = table(case).frame().with_columns(pl.lit(0, pl.UInt32).alias("trained")).lazy()
    rules.schema(case.recipe, 700, ("intent",)).validate(broken).collect()
    with pytest.raises(TypeError, match="collected polars DataFrame, not LazyFrame"):
        rules.judge_records(broken, case.recipe, 700, Judged())


def test_the_sample_is_the_same_whatever_order_records_come_in() -> None:
    names = [sha256(str(n).encode()) for n in range(300)]
    made = {name: frame.Drawn(name, (), np.zeros(0, np.uint16), 0) for name in names}
    drawn = []
    for order in (names, names[::-1], [*names, *names[:50]]):
        sample = frame.Sample(40)
        for name in order:
            sample.offer(name, lambda name=name: made[name])  # type: ignore[misc]
        drawn.append([one.record for one in sample.drawn(40)])
    assert drawn[0] == drawn[1] == drawn[2]
    assert (len(set(drawn[0])), [one.record for one in sample.drawn(7)]) == (40, drawn[0][:7])


def test_documents_that_do_not_add_up_to_their_leaves_fail(case: Case) -> None:
    leaf = msgspec.structs.replace(case.shards.leaves[0], trained=1)
    report = case.judge(shards=msgspec.structs.replace(case.shards, leaves=(leaf, *case.shards.leaves[1:])))
    assert next(rule.detail for rule in report.rules if rule.name == "totals") == f"leaf {leaf.sha256[:12]}"
    lost = msgspec.structs.replace(case.records, splits={"train": 99, "validation": 1})
    assert verdicts(case.judge(records=lost))["totals"] == "fail"


def test_truncation_and_untrained_records_are_judged(case: Case) -> None:
    """S1.11: what is cut off is a share of tokens with a limit, what is left out is a warning."""
    cut = _truncated(case)
    report = case.judge(**cut)
    shards = cut["shards"]
    total = sum(shards.tokens.values()) + shards.truncated_tokens
    rule = next(rule for rule in report.rules if rule.name == "truncation")
    assert (rule.verdict, rule.effect) == ("fail", round(shards.truncated_tokens / total, 8))
    fewer = msgspec.structs.replace(case.shards, untrained_records=2)
    more = msgspec.structs.replace(case.records, splits={**case.records.splits, "train": case.records.splits["train"] + 2})
    report = case.judge(shards=fewer, records=more)
    assert (verdicts(report, "untrained_records", "totals"), report.verdict) == ({"untrained_records": "warn", "totals": "pass"}, "warn")


# ---- drift


def test_the_same_data_has_no_drift(case: Case) -> None:
    report = case.judge(reference=case.report)
    drifts = {rule.name: (rule.verdict, rule.effect) for rule in report.rules if rule.name.startswith("drift")}
    names = ("lengths", "sources", "trained_percent", "trained_tokens", "slice intent")
    assert drifts == {
        "drift words auc": ("pass", 0.5),
        **{f"drift {name} {measure}": ("pass", 0) for name in names for measure in ("psi", "js")},
    }


def test_a_moved_slice_is_judged_by_effect_size_and_names_what_is_new(case: Case) -> None:
    """S0.31, S1.10, S3.14: class drift against a reference."""
    report = case.judge(**DEFECTS["drift slice intent psi"](case))
    rule = next(rule for rule in report.rules if rule.name == "drift slice intent psi")
    assert (rule.verdict, rule.limit, rule.detail) == ("fail", 0.25, "new: login; gone: crash")
    mild = case.reference(slice__intent={"refund": 108, "login": 12})
    lenient = recipe_of(CLEANING, validation=ValidationSection(drift=Drift(psi_warn=0.01, psi_fail=5, js_warn=0.9, js_fail=1)))
    found = verdicts(case.judge(reference=mild, recipe=lenient))
    assert (found["drift slice intent psi"], found["drift slice intent js"]) == ("warn", "pass")


def test_a_label_that_only_one_side_has_is_a_warning(case: Case) -> None:
    reference = msgspec.structs.replace(
        case.report,
        distributions={
            **{name: counts for name, counts in case.report.distributions.items() if name != "slice intent"},
            "slice product": {"app": COUNT},
        },
    )
    found = {rule.name: (rule.verdict, rule.detail) for rule in case.judge(reference=reference).rules}
    assert found["drift slice intent"] == ("warn", "the reference does not have it: nothing to compare with")
    assert found["drift slice product"] == ("warn", "gone: only the reference has it")


def test_p_values_are_observed_and_no_part_of_the_content(case: Case) -> None:
    how = (case.raw.snapshot, case.raw.open, case.records, case.shards, case.observed, case.base_model, case.recipe, case.store)
    result, observed = validation.build(*how, reference=case.report)
    assert observed.p_values == {name: pytest.approx(1.0) for name in ("lengths", "slice intent", "sources", "trained_percent")}
    content = canonical(result) + case.store.get_bytes(result.report.sha256) + case.store.get_bytes(result.page.sha256)
    assert b"p_value" not in content


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

    planted = DEFECTS["reproduction"](case)
    report = case.judge(**planted)
    assert {name for name, verdict in verdicts(report).items() if verdict == "fail"} == {"reproduction"}
    (named,) = report.reproduction.differing
    assert (report.reproduction.drawn, report.reproduction.equal) == (COUNT, COUNT - 1)
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
    assert report.reproduction.equal == COUNT - 2
    assert any("the row is record" in text for text in report.reproduction.differing)
    assert any("the row is bad now: not_json" in text for text in report.reproduction.differing)
    cut = case.judge(open_raw=lambda file: io.BytesIO(data[: len(data) // 2]))
    assert cut.reproduction.equal < 0.6 * COUNT


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
