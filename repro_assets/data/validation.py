"""The verdict on shards: rules on records and totals (`rules.py`), on texts (`conversations.py`), drift against a reference, sample reproduction,
and the report of it all. What the verdict leads to is the next stage's business.
"""

import time
from collections.abc import Callable
from typing import Any, BinaryIO

import msgspec

from repro_assets import expectations
from repro_assets.data import Progress, drift, embedding, report, reproduction, sharding
from repro_assets.data.judged import DRIFT, FAIL, NONE, PASS, SAMPLE, SHOWN, WARN, Judged
from repro_assets.data.tokenizing import load
from repro_assets.documents import (
    BaseModel,
    RawFile,
    RawSnapshot,
    Records,
    Reproduction,
    Shards,
    ShardsObserved,
    ValidationObserved,
    ValidationReport,
)
from repro_assets.recipe import Drift, Recipe
from repro_assets.trust.blob import BlobStore
from repro_assets.trust.canonical import canonical

NO_REFERENCE = "no reference yet: nothing is promoted under this recipe"


def build(
    snapshot: RawSnapshot,
    open_raw: Callable[[RawFile], BinaryIO],
    records: Records,
    shards: Shards,
    shards_observed: ShardsObserved,
    base_model: BaseModel,
    recipe: Recipe,
    store: BlobStore,
    reference: ValidationReport | None = None,
    no_reference: str = NO_REFERENCE,
    suite: bytes | None = None,
    progress: Progress | None = None,
) -> tuple[ValidationReport, ValidationObserved]:
    """Judge the shards. `reference`: the report to compare distributions with; without one, drift rules say `none` and `no_reference`.

    `suite`: a Great Expectations suite as JSON. The report's verdict is the worst of its rules'. Raises LeafError for a stored leaf that
    is not the one its shards name, ExpectationsError for a suite that cannot be run.
    """
    from repro_assets.data import conversations, frame, rules  # pandera and polars: not before they are needed

    started = time.monotonic()
    limits = recipe.validation
    codec = load(store, base_model)
    plain = conversations.Plain(store.get_bytes(base_model.model_files["tokenizer.json"].sha256), codec.controls)
    frames = conversations.Frames(codec.renderer, plain)
    table = frame.Table(
        codec.controls, max(limits.drift.sample, limits.roundtrip, limits.language.sample if limits.language else 0), frames
    )
    entries = sharding.stored_leaves(shards, shards_observed, store)
    frame.read(entries, store, table, (lambda number: progress("leaves checked", number, len(shards.leaves))) if progress else None)
    rows = table.frame(limits.slices)
    judged = Judged()
    rules.judge_records(rows, recipe, base_model.vocabulary, judged, frames.refused)
    rules.judge_totals(rows, table.torn, records, shards, recipe, judged)
    conversations.judge_roundtrip(table.sample.drawn(limits.roundtrip), plain, limits, judged)
    languages = {}
    if limits.language:
        languages = conversations.judge_language(table.sample.drawn(limits.language.sample), limits.language, judged)
    drawn = reproduction.draw(table.expected, limits.reproduce)
    rebuilt, differences = reproduction.reproduce(
        drawn, table.expected, snapshot, open_raw, records, codec, recipe.records, recipe.sharding, store, progress
    )
    judge_reproduction(rebuilt, judged)
    judged.failing["reproduction"] = [difference.record for difference in differences[:SHOWN]]
    histograms = frame.histograms(rows)
    now = distributions(records, shards, histograms)
    words = embedding.Words(
        (one.record, embedding.counts([message.content for message in one.messages])) for one in table.sample.drawn(limits.drift.sample)
    )
    p_values = judge_drift(now, words, reference, limits.drift, store, judged, no_reference)
    if suite is not None:
        expectations.judge(suite, rows, judged)
    said = {
        "verdict": judged.verdict,
        "rules": msgspec.to_builtins(judged.rules),
        "failing": {rule: frame.shown(rows, table, names, store) for rule, names in sorted(judged.failing.items()) if names},
        "differences": msgspec.to_builtins(differences[:SHOWN]),
        "distributions": {"now": now, "reference": reference.distributions if reference else None},
        "histograms": {**histograms, **({"languages": languages} if limits.language else {})},
        "facts": facts(snapshot, records, shards, base_model, rebuilt),
    }
    result = ValidationReport(
        verdict=judged.verdict,
        rules=tuple(judged.rules),
        reproduction=rebuilt,
        distributions=now,
        words=store.put_bytes(words.encode()),
        report=store.put_bytes(canonical(said)),
        page=store.put_bytes(report.page(said)),
        suite=store.put_bytes(suite) if suite is not None else None,
    )
    return result, ValidationObserved(p_values=p_values, seconds=time.monotonic() - started)


def facts(snapshot: RawSnapshot, records: Records, shards: Shards, base_model: BaseModel, rebuilt: Reproduction) -> dict[str, Any]:
    """What was judged, for the head of the report."""
    return {
        "files": len(snapshot.files_listed),
        "manifest": snapshot.manifest.sha256,
        "records": {split: shards.records[split] for split in sorted(shards.records)},
        "tokens": {split: shards.tokens[split] for split in sorted(shards.tokens)},
        "trained": {split: shards.trained[split] for split in sorted(shards.trained)},
        "leaves": len(shards.leaves),
        "rows_read": sum(count.read for count in records.sources),
        "set_aside": dict(sorted(records.reasons.items())),
        "engine": f"{shards.engine.name} {shards.engine.version}",
        "tokenizer": shards.tokenizer,
        "template": shards.template,
        "architecture": base_model.architecture,
        "rebuilt": [rebuilt.equal, rebuilt.drawn],
    }


# ---- drift


def distributions(records: Records, shards: Shards, histograms: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """The counts that are compared between snapshots, by name. Never negative, whatever a document that `totals` refutes may say."""
    trained, tokens = sum(shards.trained.values()), sum(shards.tokens.values())
    return {
        "lengths": shards.lengths,
        "sources": {source.match: source.kept for source in records.sources},
        "trained_percent": histograms["trained_percent"],
        "trained_tokens": {"trained": trained, "untrained": max(0, tokens - trained)},
        **{f"slice {label}": values for label, values in sorted(shards.slices.items())},
    }


def judge_drift(
    now: dict[str, dict[str, int]],
    words: embedding.Words,
    reference: ValidationReport | None,
    limits: Drift,
    store: BlobStore,
    judged: Judged,
    no_reference: str = NO_REFERENCE,
) -> dict[str, float]:
    """Two rules for each distribution and one for words, gated by effect size; the p-values of those over records."""
    before = reference.distributions if reference else {}
    p_values = {}
    for name in sorted(now.keys() | before.keys()):
        if reference is None:
            judged.add(DRIFT, f"drift {name}", NONE, None, None, no_reference)
        elif name not in now or name not in before:
            said = "the reference does not have it: nothing to compare with" if name in now else "gone: only the reference has it"
            judged.add(DRIFT, f"drift {name}", WARN, None, None, said)
        else:
            _judge_counts(name, now[name], before[name], limits, judged)
            if name != "trained_tokens":
                p_values[name] = drift.p_value(now[name], before[name])
    if reference is None:
        judged.add(DRIFT, "drift words", NONE, None, None, no_reference)
    else:
        _judge_words(words, embedding.decode(store.get_bytes(reference.words.sha256)), limits, judged)
    return p_values


def _judge_counts(name: str, here: dict[str, int], there: dict[str, int], limits: Drift, judged: Judged) -> None:
    came = ", ".join(sorted(here.keys() - there.keys())[:10])
    gone = ", ".join(sorted(there.keys() - here.keys())[:10])
    detail = "; ".join(text for text in (f"new: {came}" if came else "", f"gone: {gone}" if gone else "") if text) or "the same bins"
    # One record more in a bin of few moves these measures past any limit: what so few show is worth a look, never a refusal.
    fewest = min(sum(here.values()), sum(there.values()))
    if fewest < embedding.FEWEST:
        detail += f"; only {fewest} on one side, {embedding.FEWEST} are needed to fail"
    for measure, effect, warn, fail in (
        ("psi", drift.psi(here, there), limits.psi_warn, limits.psi_fail),
        ("js", drift.js(here, there), limits.js_warn, limits.js_fail),
    ):
        verdict = FAIL if effect > fail else WARN if effect > warn else PASS
        if verdict == FAIL and fewest < embedding.FEWEST:
            verdict = WARN
        judged.add(DRIFT, f"drift {name} {measure}", verdict, effect, fail, detail)


def _judge_words(words: embedding.Words, before: embedding.Words, limits: Drift, judged: Judged) -> None:
    found = embedding.auc(words, before)
    both = len(set(words.names) & set(before.names))
    detail = f"{len(words)} records drawn here, {len(before)} of the reference, {both} of them in both"
    if found is None:
        few = f"; {embedding.FEWEST} a side are needed to tell"
        judged.add(DRIFT, "drift words auc", NONE, None, limits.auc_fail, detail + few)
        return
    verdict = FAIL if found > limits.auc_fail else WARN if found > limits.auc_warn else PASS
    judged.add(DRIFT, "drift words auc", verdict, found, limits.auc_fail, detail)


def judge_reproduction(rebuilt: Reproduction, judged: Judged) -> None:
    differing = rebuilt.drawn - rebuilt.equal
    verdict = FAIL if differing or not rebuilt.drawn else PASS
    detail = f"{rebuilt.equal} of {rebuilt.drawn} drawn records came out the same from raw"
    judged.add(SAMPLE, "reproduction", verdict, differing, 0, detail + (f"; first: {rebuilt.differing[0]}" if rebuilt.differing else ""))
