"""`repro demo`: three snapshots, two releases, one refusal, one certificate, told on one screen. What the data is, `tickets.py` says."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from repro_assets import importing, running, services
from repro_assets.bench import DEMO
from repro_assets.demo import raw
from repro_assets.evaluation.statistics import wilson
from repro_assets.partitions import key_of
from repro_assets.shelf import Shelf
from repro_assets.trust.canonical import digest, sha256
from repro_assets.trust.certificates import MEANING
from resources.lake import RAW
from resources.settings import home_folder

FOLDER = "tickets"
STORY = {
    "first": "2,400 tickets as they came in",
    "small-change": "0.5 % of them edited, 1 % appended",
    "poisoned": "one bulk relabel: most refund tickets sent to sales",
}
ORIGINAL_RANKS, OTHER_RANKS = 1, 2


@dataclass
class Chapter:
    """One snapshot of the story and its documents by asset."""

    kind: str
    key: str
    seconds: dict[str, float]
    executed: dict[str, bool]
    documents: dict[str, Any] = field(default_factory=dict)


class DemoFailed(Exception):
    """A step of the demo did not end as the story says; the message has the cause."""


def play(out: Any) -> int:
    """Run the demo; the exit code is 0 when the story came out as told."""
    from repro_assets.options import bench
    from repro_assets.terminal import FINDING, GOOD

    began = time.monotonic()
    os.environ.setdefault("REPRO_CPU_SLOTS", "2")  # the reproduction trains while the story goes on
    made = bench(str(DEMO))
    made.lake.client.ensure()
    instance = running.open_instance()
    phases = {"servers": time.monotonic() - began}
    out.say("shared assets: the base model and the evaluation suite")
    _ran(running.materialize(instance, key=None, recipe=str(DEMO), say=out.progress), phases, "shared")
    chapters = [_chapter(made, instance, "first", out, phases)]
    out.say(
        f"reproduce: the first snapshot again, without the memo, on {OTHER_RANKS} ranks instead of {ORIGINAL_RANKS}, beside what follows"
    )
    with _reproducing(chapters[0].key) as proving:
        chapters += [_chapter(made, instance, kind, out, phases) for kind in STORY if kind != "first"]
        started = time.monotonic()
        proof = proving()
    phases["reproduce, waited for"] = time.monotonic() - started
    tell(out.people, chapters, proof, phases, time.monotonic() - began, made)
    good = [chapter.documents["promotion"].result.decision for chapter in chapters] == ["promote", "promote", "hold"] and bool(
        proof["grade"]
    )
    out.result(
        {
            "snapshots": {chapter.kind: _summary(chapter) for chapter in chapters},
            "certificate": {name: proof[name] for name in ("grade", "certificate", "first_in_words")},
            "phases": {name: round(value, 1) for name, value in phases.items()},
        }
    )
    return GOOD if good else FINDING


@contextmanager
def _reproducing(key: str) -> Iterator[Callable[[], dict[str, Any]]]:
    """`repro reproduce` in a process of its own: the second core has little else to do. Yields what waits for its answer."""
    command = [
        sys.executable,
        "-m",
        "repro_assets",
        "reproduce",
        "--snapshot",
        key,
        "--recipe",
        str(DEMO),
        "--ranks",
        str(OTHER_RANKS),
        "--json",
    ]
    log = home_folder() / "demo" / "reproduce.log"
    with log.open("wb") as said:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said)
    try:

        def answer() -> dict[str, Any]:
            written, _ = process.communicate()
            found: dict[str, Any] = json.loads(written)
            if "grade" not in found:
                raise DemoFailed(f"reproduce: {found.get('error', found)}; its log is {log}")
            return found

        yield answer
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def _chapter(made: Any, instance: dg.DagsterInstance, kind: str, out: Any, phases: dict[str, float]) -> Chapter:
    started = time.monotonic()
    key = _import(made, kind)
    phases["import"] = phases.get("import", 0.0) + time.monotonic() - started
    out.say(f"{kind}: {STORY[kind]} - snapshot {key}")
    ran = running.materialize(instance, key=key, recipe=str(DEMO), ranks=ORIGINAL_RANKS, say=out.progress)
    _ran(ran, phases, kind)
    shelf = Shelf(made.lake.client, made.blobs.store)
    head = made.lake.client.head(f"snapshot-{key}")
    name = made.recipe.load().recipe.name
    documents = {asset: shelf.read(head, key, name, asset) for asset in ran.assets}
    return Chapter(kind, key, ran.seconds, {asset: told["executed"] == "yes" for asset, told in ran.assets.items()}, documents)


def _ran(ran: running.Ran, phases: dict[str, float], name: str) -> None:
    if not ran.success or (ran.failed_checks and name != "poisoned"):
        raise DemoFailed(f"{name}: {ran.failure or '; '.join(ran.failed_checks)} (run {ran.run_id})")
    phases[name] = sum(ran.seconds.values())


def _import(made: Any, kind: str) -> str:
    """The snapshot of this kind: the one an earlier demo imported, when its files are the same, else a new raw commit."""
    folder = home_folder() / "demo" / kind
    folder.mkdir(parents=True, exist_ok=True)
    raw.write(folder, kind)  # type: ignore[arg-type]
    files = {path.name: sha256(path.read_bytes()) for path in sorted(folder.iterdir())}
    mark = {"demo": kind, "files": digest(files)}
    for commit in made.lake.client.log(RAW):
        if commit.metadata.get("demo") == kind and commit.metadata.get("files") == mark["files"]:
            return key_of(commit.id, commit.created)
    paths = [Path(folder)]
    done = importing.import_files(
        made.lake.client, made.blobs.store, paths, to=FOLDER, message=f"demo: {STORY[kind]}", actor=made.actor, metadata=mark
    )
    return done.key


def _summary(chapter: Chapter) -> dict[str, Any]:
    records, shards, promotion = (chapter.documents[asset] for asset in ("records", "shards", "promotion"))
    return {
        "key": chapter.key,
        "files": len(records.observed.parsed),
        "files_parsed": records.observed.files_parsed,
        "records": sum(shards.result.records.values()),
        "records_new": shards.observed.records_new,
        "leaves": len(shards.result.leaves),
        "leaves_new": shards.observed.leaves_new,
        "tokens": sum(shards.result.tokens.values()),
        "tokens_new": shards.observed.tokens_new,
        "decision": promotion.result.decision,
        "release": promotion.observed.release,
        "recalled": sorted(asset for asset, executed in chapter.executed.items() if not executed),
    }


# ---- the last screen


def tell(console: Console, chapters: list[Chapter], proof: dict[str, Any], phases: dict[str, float], total: float, made: Any) -> None:
    """One screen: snapshots, reuse, accuracy by slice, decisions, certificate, where the time went, what to do next."""
    console.rule("[bold]what was built")
    console.print(_snapshots(chapters))
    console.print(_reuse(chapters))
    console.print(_slices(chapters))
    console.print(_poison(chapters[-1]))
    for part in proof["parts"]:
        console.print(
            f"reproduced {part['scope']}: {part['compared']} digests compared, {len(part['differences'])} differ", highlight=False
        )
    if grade := proof["grade"]:
        name = proof["certificate"]["sha256"][:16]
        console.print(
            f"[bold green]certificate {grade}[/] ({MEANING[grade]}): {name}…, signed, commit {proof['commit'][:12]}", highlight=False
        )
    else:
        console.print(f"[bold red]the re-execution differs:[/] {escape(proof['first_in_words'])}", highlight=False)
    console.print(_phases(phases, total, chapters), highlight=False)
    recalled = sum(not executed for chapter in chapters for executed in chapter.executed.values())
    if recalled:
        console.print(
            f"{recalled} of {sum(len(chapter.executed) for chapter in chapters)} assets were recalled from the memo: nothing they depend on had changed"
        )
    console.print(
        f"UI: [bold]make dev[/], then {services.ui_url()}   lakeFS: {made.lake.connections.lakefs_endpoint}   "
        "stop the servers: [bold]make down[/]   credentials: [bold].venv/bin/repro env[/]",
        highlight=False,
        soft_wrap=True,
    )


def _snapshots(chapters: list[Chapter]) -> Table:
    table = Table("snapshot", "what it is", "decision", box=None, pad_edge=False)
    for chapter in chapters:
        told = _summary(chapter)
        decision = f"[green]release {told['release']}[/]" if told["release"] else f"[red]{told['decision']}[/]"
        table.add_row(f"{chapter.kind} [dim]{chapter.key}[/]", STORY[chapter.kind], decision)
    return table


def _reuse(chapters: list[Chapter]) -> Table:
    """What was done anew for each snapshot, of what it holds."""
    table = Table("made anew", "files parsed", "records", "leaves", "tokens", box=None, pad_edge=False)
    for chapter in chapters:
        told = _summary(chapter)
        table.add_row(
            chapter.kind,
            f"{told['files_parsed']} of {told['files']}",
            f"{told['records_new']:,} of {told['records']:,}",
            f"{told['leaves_new']} of {told['leaves']}",
            f"{told['tokens_new']:,} of {told['tokens']:,}",
        )
    return table


def _slices(chapters: list[Chapter]) -> Table:
    """Accuracy of each candidate by intent, with Wilson 95 % intervals; regressed slices in red."""
    table = Table("accuracy, 95 % interval", *(chapter.kind for chapter in chapters), box=None, pad_edge=False)
    scores = [{score.task: score.slices for score in chapter.documents["eval_results"].result.scores} for chapter in chapters]
    bad = [
        {(verdict.label, verdict.value) for verdict in chapter.documents["promotion"].result.verdicts if verdict.verdict == "regressed"}
        for chapter in chapters
    ]
    rows = [("traffic", "overall", "all"), *(("intents", "intent", value) for value in scores[0]["intents"]["intent"])]
    for task, label, value in rows:
        cells = []
        for found, regressed in zip(scores, bad, strict=True):
            score = found[task][label][value]
            low, high = wilson(score.correct, score.items)
            cell = f"{100 * score.correct / score.items:5.1f} %  [{100 * low:.0f}, {100 * high:.0f}]"
            cells.append(f"[bold red]{escape(cell)}[/]" if (label, value) in regressed else escape(cell))
        table.add_row("overall" if label == "overall" else value, *cells)
    return table


def _poison(chapter: Chapter) -> str:
    losses = chapter.documents["qlora_checkpoint"].observed.losses
    worst = min(chapter.documents["promotion"].result.verdicts, key=lambda verdict: verdict.difference)
    return (
        f"[bold]{chapter.kind}:[/] the loss fell as ever, {losses[0][1]:.2f} to {losses[-1][1]:.2f}; the gate on {worst.label} = {worst.value} says "
        f"[red]{worst.verdict}[/]: {100 * worst.difference:+.0f} points against the release in force"
    )


def _phases(phases: dict[str, float], total: float, chapters: list[Chapter]) -> str:
    told = ", ".join(f"{name} {value:.0f}" for name, value in phases.items())
    training = sum(chapter.seconds.get("qlora_checkpoint", 0) for chapter in chapters)
    scoring = sum(chapter.seconds.get("eval_results", 0) for chapter in chapters)
    return f"seconds: {told}; of these training {training:.0f} and scoring {scoring:.0f}; {total:.0f} in all"
