"""The verdict on shards: rules on records and totals (`rules.py`), drift against a reference (`drift.py`), sample reproduction
(`reproduction.py`), and the report of it all. What the verdict leads to is the next stage's business.
"""

import time
from collections.abc import Callable
from typing import BinaryIO

import msgspec

from repro_assets.data import Progress, drift, reproduction, sharding
from repro_assets.data.judged import FAIL, NONE, PASS, SHOWN, WARN, Judged
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


def build(
    snapshot: RawSnapshot,
    open_raw: Callable[[RawFile], BinaryIO],
    records: Records,
    shards: Shards,
    shards_observed: ShardsObserved,
    base_model: BaseModel,
    recipe: Recipe,
    store: BlobStore,
    reference: Shards | None = None,
    progress: Progress | None = None,
) -> tuple[ValidationReport, ValidationObserved]:
    """Judge the shards. `reference`: the shards to compare distributions with; without one, drift rules say `none`.

    The report's verdict is the worst of its rules'. Raises LeafError for a stored leaf that is not the one its shards name.
    """
    from repro_assets.data import rules  # pandera and polars: not before they are needed

    started = time.monotonic()
    codec = load(store, base_model)
    entries = []
    for number, held in enumerate(sharding.stored_leaves(shards, shards_observed, store), start=1):
        entries.append(held)
        if progress:
            progress("leaves checked", number, len(shards.leaves))
    frame, expected = rules.table(entries, codec.controls)
    judged = Judged()
    rules.judge_records(frame, recipe, base_model.vocabulary, judged)
    rules.judge_totals(frame, entries, records, shards, recipe, judged)
    p_values = judge_drift(shards, reference, recipe.validation.drift, judged)
    drawn = reproduction.draw(expected, recipe.validation.reproduce)
    rebuilt, differences = reproduction.reproduce(
        drawn, expected, snapshot, open_raw, records, codec, recipe.records, recipe.sharding, store, progress
    )
    judge_reproduction(rebuilt, judged)
    judged.failing["reproduction"] = [difference.record for difference in differences[:SHOWN]]
    report = {
        "verdict": judged.verdict,
        "rules": msgspec.to_builtins(judged.rules),
        "failing": {rule: names for rule, names in sorted(judged.failing.items()) if names},
        "differences": msgspec.to_builtins(differences[:SHOWN]),
        "distributions": {"now": distributions(shards), "reference": distributions(reference) if reference else None},
        "histograms": rules.histograms(frame),
    }
    result = ValidationReport(
        verdict=judged.verdict, rules=tuple(judged.rules), reproduction=rebuilt, report=store.put_bytes(canonical(report))
    )
    return result, ValidationObserved(p_values=p_values, seconds=time.monotonic() - started)


# ---- drift


def distributions(shards: Shards) -> dict[str, dict[str, int]]:
    """The counts that are compared between snapshots, by name."""
    trained, tokens = sum(shards.trained.values()), sum(shards.tokens.values())
    shares = {"trained": trained, "untrained": tokens - trained}
    return {"lengths": shards.lengths, "trained_tokens": shares, **{f"slice {label}": values for label, values in shards.slices.items()}}


def judge_drift(shards: Shards, reference: Shards | None, limits: Drift, judged: Judged) -> dict[str, float]:
    """Two rules for each distribution, gated by effect size; the p-values of those over records."""
    now = distributions(shards)
    before = distributions(reference) if reference else {}
    p_values = {}
    for name in sorted(now.keys() | before.keys()):
        here, there = now.get(name, {}), before.get(name, {})
        if reference is None:
            judged.add(f"drift {name}", NONE, None, None, "no reference yet: nothing is promoted under this recipe")
            continue
        came = ", ".join(sorted(here.keys() - there.keys())[:10])
        gone = ", ".join(sorted(there.keys() - here.keys())[:10])
        detail = "; ".join(text for text in (f"new: {came}" if came else "", f"gone: {gone}" if gone else "") if text) or "the same bins"
        for measure, effect, warn, fail in (
            ("psi", drift.psi(here, there), limits.psi_warn, limits.psi_fail),
            ("js", drift.js(here, there), limits.js_warn, limits.js_fail),
        ):
            verdict = FAIL if effect > fail else WARN if effect > warn else PASS
            judged.add(f"drift {name} {measure}", verdict, effect, fail, detail)
        if name != "trained_tokens":
            p_values[name] = drift.p_value(here, there)
    return p_values


def judge_reproduction(rebuilt: Reproduction, judged: Judged) -> None:
    differing = rebuilt.drawn - rebuilt.equal
    verdict = FAIL if differing or not rebuilt.drawn else PASS
    detail = f"{rebuilt.equal} of {rebuilt.drawn} drawn records came out the same from raw"
    judged.add("reproduction", verdict, differing, 0, detail + (f"; first: {rebuilt.differing[0]}" if rebuilt.differing else ""))
