"""What an asset's page shows in Dagster: a table, pictures where they say more, links, digests. One function a document type.

Drawing is `pictures.py`; what the numbers mean is said by the documents. Text from data is escaped: Dagster renders Markdown.
"""

import base64
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import dagster as dg

from repro_assets import documents as d
from repro_assets import pictures

ROWS = 40  # rows of a table; Dagster keeps every one in its event log


def of(asset: str, document: d.Document[Any, Any]) -> dict[str, Any]:
    """Metadata in the order it is shown."""
    return TELLERS[asset](document.result, document.observed)


def page(asset: str, document: d.Document[Any, Any], commit: str, branch: str, link: Callable[[str], str]) -> dict[str, Any]:
    """Everything that an asset's page says. `link` gives the address of a file of the document in lakeFS, or of its folder for no name."""
    pages = {name.removesuffix(".html"): dg.MetadataValue.url(link(name)) for name in document.files() if name.endswith(".html")}
    return {**pages, **of(asset, document), **_anchors(document, commit, branch, link(""))}


def _anchors(document: d.Document[Any, Any], commit: str, branch: str, link: str) -> dict[str, Any]:
    """Where the document is and what it was made of: the last lines of every page."""
    return {
        "data version": document.digest,
        "lakeFS commit": commit,
        "lakeFS branch": branch,
        "browse in lakeFS": dg.MetadataValue.url(link),
        "made from": table({"input": name, "digest": value} for name, value in document.inputs.items()) if document.inputs else "raw data",
    }


def table(rows: Iterable[Mapping[str, Any]]) -> dg.TableMetadataValue | str:
    """A table of flat rows; the first row names the columns. Long ones are cut and say so."""
    listed = [{name: plain(value) for name, value in row.items()} for row in rows]
    if not listed:
        return "none"
    if len(listed) > ROWS:
        first = next(iter(listed[0]))
        rest = dict.fromkeys(listed[0], "")
        listed = [*listed[:ROWS], {**rest, first: f"… and {len(listed) - ROWS} more"}]
    return dg.MetadataValue.table(
        [dg.TableRecord(row) for row in listed], schema=dg.TableSchema([dg.TableColumn(name, _kind(listed, name)) for name in listed[0]])
    )


def _kind(rows: list[dict[str, Any]], name: str) -> str:
    values = [row[name] for row in rows]
    if all(isinstance(value, bool) for value in values):
        return "bool"
    if all(isinstance(value, int) for value in values):
        return "int"
    return "float" if all(isinstance(value, int | float) for value in values) else "string"


def plain(value: Any) -> Any:
    """Numbers stay numbers; text loses what Markdown or HTML would act on."""
    if isinstance(value, str):
        return value.replace("<", "‹").replace(">", "›").replace("![", "[").replace("`", "'")
    return value if isinstance(value, bool | int | float) else str(value)


def picture(alt: str, png: bytes) -> dg.MarkdownMetadataValue:
    """The picture in full, behind a link on the page; below 50 kB because it lives in the event log."""
    return dg.MetadataValue.md(f"![{plain(alt)}](data:image/png;base64,{base64.b64encode(png).decode()})")


def sketch(alt: str, svg: bytes) -> dg.MarkdownMetadataValue:
    """A picture that Dagster shows inline: Markdown below 1,000 characters."""
    return dg.MetadataValue.md(f"![{plain(alt)}](data:image/svg+xml;base64,{base64.b64encode(svg).decode()})")


def size(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError("unreachable")


def share(value: float) -> str:
    return f"{100 * value:.1f} %"


def raw_snapshot(result: d.RawSnapshot, observed: d.RawObserved) -> dict[str, Any]:
    rows = (
        {
            "file": file.path,
            "format": file.format,
            "size": size(file.size),
            "first seen": observed.first_seen.get(file.path, "")[:12],
            "sha256": file.sha256,
        }
        for file in result.files_listed
    )
    return {
        "files": table(rows),
        "summary": f"{len(result.files_listed)} files, {size(result.size)}, data from {observed.window[0]} to {observed.window[1]}",
        "manifest": result.manifest.sha256,
        "raw commit": observed.commit,
    }


def base_model(result: d.BaseModel, observed: d.SharedObserved) -> dict[str, Any]:
    rows = ({"file": name, "size": size(blob.size), "sha256": blob.sha256} for name, blob in result.model_files.items())
    return {
        "summary": f"{result.architecture}, {result.parameters:,} parameters, vocabulary {result.vocabulary:,}, licence {result.license}",
        "files": table(rows),
        "tokenizer": result.tokenizer,
        "chat template": result.template,
        "read from": observed.origin,
    }


def eval_suites(result: d.EvalSuites, observed: d.SharedObserved) -> dict[str, Any]:
    rows = (
        {
            "suite": suite.name,
            "tasks": ", ".join(suite.tasks),
            "items": suite.items,
            "slices": ", ".join(suite.labels) or "-",
            "digest": suite.digest,
        }
        for suite in result.suites
    )
    return {"suites": table(rows), "read from": observed.origin}


def records(result: d.Records, observed: d.RecordsObserved) -> dict[str, Any]:
    counted = (
        "files",
        "read",
        "kept",
        "augmented",
        "quarantined",
        "duplicates",
        "near_duplicates",
        "contaminated",
        "sensitive",
        "unsampled",
    )
    rows = (
        {
            "source": count.match,
            "licence": count.license,
            "date": count.date or "not said",
            **{name.replace("_", " "): getattr(count, name) for name in counted},
        }
        for count in result.sources
    )
    files = f"{observed.files_parsed} files parsed, {observed.files_known} taken over from earlier records"
    told = {
        "sources": table(rows),
        **_since(observed.since),
        "splits": table({"split": name, "records": count} for name, count in result.splits.items()),
        "dropped, by reason": table({"reason": name, "rows": count} for name, count in result.reasons.items()),
        "reuse": f"{files}; {len(result.leaves)} leaves: {observed.leaves_new} new, {observed.leaves_known} already stored",
        "quarantine": f"{result.quarantine.sha256} (quarantine.jsonl beside this document)",
        "slices": table(
            {"label": label, "value": value, "records": n} for label, values in result.slices.items() for value, n in values.items()
        ),
    }
    if result.cleaned:
        told["cleaned"] = table({"step": step, "rows changed": count} for step, count in result.cleaned.items())
    if result.sensitive:
        told["secrets and personal data"] = table({"kind": kind, "records": count} for kind, count in result.sensitive.items())
    return told


def _since(since: d.Since | None) -> dict[str, Any]:
    """The difference from the records that were made before, as tables."""
    if since is None:
        return {}
    rows = [
        {"what": "files", "added": since.files[0], "removed": since.files[1], "changed": since.files[2]},
        {"what": "leaves", "added": since.leaves[0], "removed": since.leaves[1], "changed": 0},
        {"what": "records", "added": since.records[0], "removed": since.records[1], "changed": since.records[2]},
    ]
    moved = [
        {"label": label, "value": value, "before": before, "now": now}
        for label, values in since.slices.items()
        for value, (before, now) in values.items()
    ]
    return {"since the records before": table(rows), **({"slices since then": table(moved)} if moved else {})}


def shards(result: d.Shards, observed: d.ShardsObserved) -> dict[str, Any]:
    rows = (
        {
            "split": split,
            "records": result.records[split],
            "tokens": result.tokens[split],
            "trained tokens": result.trained[split],
            "leaves": sum(leaf.split == split for leaf in result.leaves),
        }
        for split in result.tokens
    )
    total = sum(result.tokens.values())
    reused = f"{observed.leaves_reused} of {len(result.leaves)} leaves reused; {observed.records_new:,} records and {observed.tokens_new:,} of {total:,} tokens made new"
    return {
        "summary": table(rows),
        "reuse": reused,
        "lengths": sketch("lengths", pictures.histogram_sketch(result.lengths, "tokens a record")),
        "lengths in full": picture("tokens a record", pictures.histogram(result.lengths, "tokens a record")),
        "truncated": f"{result.truncated_records} records, {result.truncated_tokens} tokens; {result.untrained_records} records without a trained token left out",
        "engine": f"{result.engine.name} {result.engine.version}, canary {result.engine.canary[:12]}"
        + (f"; {result.engine.gate}" if result.engine.gate else ""),
        "tokenizer": result.tokenizer,
        "chat template": result.template,
    }


def validation_report(result: d.ValidationReport, observed: d.ValidationObserved) -> dict[str, Any]:
    rank = {"fail": 0, "warn": 1}
    rows = (
        {
            "group": rule.group,
            "rule": rule.name,
            "verdict": rule.verdict,
            "effect": "-" if rule.effect is None else f"{rule.effect:.4f}",
            "limit": "-" if rule.limit is None else f"{rule.limit:.4f}",
            "detail": rule.detail,
        }
        for rule in sorted(result.rules, key=lambda rule: rank.get(rule.verdict, 2))
    )
    tally = {verdict: sum(rule.verdict == verdict for rule in result.rules) for verdict in ("fail", "warn", "pass", "none")}
    again = result.reproduction
    return {
        "verdict": f"{result.verdict}: {', '.join(f'{count} {verdict}' for verdict, count in tally.items() if count)}",
        "rules": table(rows),
        "rebuilt from raw": f"{again.equal} of {again.drawn} drawn records came out equal"
        + (f"; not {', '.join(again.differing)}" if again.differing else ""),
        "p values, not gated on": table({"test": name, "p": value} for name, value in observed.p_values.items()),
    }


def training_bundle(result: d.TrainingBundle, observed: d.BundleObserved) -> dict[str, Any]:
    return {
        "signed by": observed.key_id,
        "statement": result.statement.sha256,
        "pins": f"{result.subjects} subjects, {len(result.dependencies)} dependencies",
        "dependencies": table({"dependency": name} for name in result.dependencies),
        "git": table({"": name, "value": value} for name, value in observed.git.items()) if observed.git else "not a Git checkout",
    }


def qlora_checkpoint(result: d.QloraCheckpoint, observed: d.CheckpointObserved) -> dict[str, Any]:
    rows = (
        {
            "step": point.step,
            "validation loss": "-" if point.validation_loss is None else f"{point.validation_loss:.4f}",
            "best": point.step == result.best_step,
            "lakeFS commit": observed.commits.get(str(point.step), "")[:12],
            "tensors": point.tensors[:16],
        }
        for point in result.checkpoints
    )
    hours = ", ".join(f"{name} {value:.4f}" for name, value in observed.device_hours.items())
    return {
        "loss": sketch("loss by step", pictures.losses_sketch(observed.losses, observed.validation)),
        "loss in full": picture("loss", pictures.losses(observed.losses, observed.validation, result.best_step)),
        "checkpoints": table(rows),
        "adapter tensors": result.tensors,
        "speed": f"{observed.steps_per_second:.2f} steps/s, {observed.tokens_per_second:,.0f} tokens/s, {observed.seconds:.1f} s in all",
        "ran on": f"{result.hardware}, {result.compute_dtype}, {observed.world_size} ranks, backend {observed.backend}, {observed.attempts} attempt(s)",
        "device hours": hours,
        "quantised base": f"{result.quantised_base} (the same before and after)",
    }


def eval_results(result: d.EvalResults, observed: d.EvalObserved) -> dict[str, Any]:
    from repro_assets.evaluation.statistics import wilson

    told: dict[str, Any] = {}
    for score in result.scores:
        rows: list[dict[str, Any]] = []
        bars: list[pictures.Interval] = []
        for label, values in score.slices.items():
            for value, found in values.items():
                name = "overall" if label == "overall" else f"{label}: {value}"
                low, high = wilson(found.correct, found.items)
                rows.append(
                    {
                        "slice": name,
                        "items": found.items,
                        "candidate": share(found.correct / found.items),
                        "95 % interval": f"{share(low)} – {share(high)}",
                        "baseline": share(found.baseline_correct / found.items),
                    }
                )
                bars.append((name, found.correct / found.items, low, high, pictures.BLUE))
        name = f"{score.suite}/{score.task}"
        told[f"{name} by slice"] = sketch(f"{name} by slice", pictures.intervals_sketch(bars, 0.0, 1.0))
        told[f"{name}, {score.metric}"] = table(rows)
        told[f"{name} in full"] = picture(name, pictures.intervals(bars, f"{score.metric}, Wilson 95 % interval"))
    return {
        **told,
        "baseline": result.baseline,
        "speed": f"{observed.seconds:.1f} s, peak memory {size(observed.peak_memory)}",
    }


def promotion(result: d.Promotion, observed: d.PromotionObserved) -> dict[str, Any]:
    colours = {"non_inferior": pictures.GREEN, "inconclusive": pictures.ORANGE, "regressed": pictures.RED}
    rows = (
        {
            "gate": verdict.gate,
            "slice": verdict.label if verdict.label == "overall" else f"{verdict.label}: {verdict.value}",
            "verdict": verdict.verdict,
            "candidate": share(verdict.candidate),
            "baseline": share(verdict.baseline),
            "difference": f"{100 * verdict.difference:+.1f} points [{100 * verdict.low:+.1f}, {100 * verdict.high:+.1f}]",
            "margin": f"{100 * verdict.margin:.0f} points",
            "items": verdict.items,
            "detectable": f"{100 * verdict.detectable:.1f} points",
            "level": verdict.level,
        }
        for verdict in result.verdicts
    )
    bars = [
        (
            "overall" if verdict.label == "overall" else f"{verdict.label}: {verdict.value}",
            100 * verdict.difference,
            100 * verdict.low,
            100 * verdict.high,
            colours.get(verdict.verdict, pictures.GREY),
        )
        for verdict in result.verdicts
    ]
    lows, highs = [bar[2] for bar in bars], [bar[3] for bar in bars]
    return {
        "decision": result.decision,
        "reasons": "; ".join(plain(reason) for reason in result.reasons) or "every gate is non-inferior",
        "done": observed.acted,
        "differences": sketch("candidate minus baseline", pictures.intervals_sketch(bars, min(-20.0, *lows), max(20.0, *highs))),
        "gates": table(rows),
        "differences in full": picture("differences", pictures.intervals(bars, "candidate minus baseline, points", 0.0)),
        "policy": result.policy,
        "adapter": result.adapter,
        **({"failure bundle": observed.failure.sha256} if observed.failure else {}),
        **({"notice": observed.notice} if observed.notice else {}),
    }


TELLERS: dict[str, Any] = {
    teller.__name__: teller
    for teller in (
        base_model,
        eval_suites,
        raw_snapshot,
        records,
        shards,
        validation_report,
        training_bundle,
        qlora_checkpoint,
        eval_results,
        promotion,
    )
}
