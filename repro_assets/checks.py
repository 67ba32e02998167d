"""Asset checks that show a report's verdict in the UI. Gates never rely on them: Dagster ignores a failed check when the downstream
asset is materialized alone, so each stage re-reads what it depends on. The check `reproduces` of every asset is in `stage.py`."""

from typing import Any

import dagster as dg

from repro_assets.assets.promotion import promotion
from repro_assets.assets.validation_report import validation_report
from repro_assets.bench import Bench
from repro_assets.partitions import snapshots
from repro_assets.shelf import MissingDocument, Shelf
from repro_assets.stage import SCRATCH


def _result(context: dg.AssetCheckExecutionContext, bench: Bench, asset: str) -> Any:
    """The asset's result as this run left it. Raises MissingDocument when a check is executed alone and there is none."""
    lake, key, recipe = bench.lake.client, context.partition_key, bench.recipe.load().recipe.name
    scratch = context.run.tags.get(SCRATCH)
    found = Shelf(lake, bench.blobs.store).read(lake.head(f"scratch-{scratch}" if scratch else f"snapshot-{key}"), key, recipe, asset)
    if found is None:
        raise MissingDocument(f"{asset} of snapshot {key} was never made under recipe {recipe!r}: materialize it first")
    return found.result


@dg.asset_check(asset=validation_report, partitions_def=snapshots, blocking=True)
def data_is_valid(context: dg.AssetCheckExecutionContext, bench: Bench) -> dg.AssetCheckResult:
    """The validation report's verdict is not fail."""
    report = _result(context, bench, "validation_report")
    failed = [f"{rule.name}: {rule.detail}" for rule in report.rules if rule.verdict in ("fail", "warn")]
    severity = dg.AssetCheckSeverity.WARN if report.verdict == "warn" else dg.AssetCheckSeverity.ERROR
    return dg.AssetCheckResult(passed=report.verdict == "pass", severity=severity, description="; ".join(failed) or "every rule passed")


@dg.asset_check(asset=promotion, partitions_def=snapshots)
def gates_pass(context: dg.AssetCheckExecutionContext, bench: Bench) -> dg.AssetCheckResult:
    """Every gate of the policy says non-inferior. A refusal is an error, which ends `repro materialize` with 1, but the run did its work."""
    decision = _result(context, bench, "promotion")
    said = "; ".join(decision.reasons) or "every gate is non-inferior"
    return dg.AssetCheckResult(passed=decision.decision == "promote", description=said)


checks = (data_is_valid, gates_pass)
