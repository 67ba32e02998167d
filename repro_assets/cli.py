"""`repro ...`: what people type. Arguments and words only; each command calls the module that does the work.

Output, errors and exit codes (0 good, 1 finding, 2 wrong use, 3 unreachable) are `terminal.py`. Modules are imported inside the commands:
`repro --help` should not wait for Dagster.
"""

import json
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from repro_assets import questions
from repro_assets.options import bench, maybe_snapshot_option, newest_or, recipe_option, snapshot_option
from repro_assets.terminal import FINDING, GOOD, UNREACHABLE, WRONG_USE, Failure, Output, Program, code_of_name, command, low_disk

if TYPE_CHECKING:
    from dagster import DagsterInstance

    from repro_assets.bench import Bench
    from repro_assets.running import Ran

SHARED = ("base_model", "eval_suites")


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="repro-assets")
@click.option("--home", default=None, metavar="DIR", help="state folder; default REPRO_HOME, else ./.repro")
def main(home: str | None) -> None:
    """Reproducible LLM fine-tuning that proves itself: raw data to a promoted model, every step a lakeFS commit."""
    if home:
        os.environ["REPRO_HOME"] = str(Path(home).absolute())
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("WANDB_MODE", "offline")


# ---- servers


@main.command()
@command
def up(out: Output) -> None:
    """Start the embedded lakeFS and S3 servers; harmless when they run."""
    from resources import servers

    where = servers.up(progress=lambda said: click.echo(said, err=True))
    if (where.home / "dagster" / "dagster.yaml").exists():
        from repro_assets import running
        from resources.lake import Lake

        with running.open_instance() as instance:
            _settle(out, instance)
        for branch in Lake.connect(where).clean():
            out.say(f"removed transaction {branch}, which a dead writer left")
    out.say(f"lakeFS {where.lakefs_endpoint}   S3 {where.s3_endpoint}   state {where.home}")
    out.result({"lakefs": where.lakefs_endpoint, "s3": where.s3_endpoint, "home": str(where.home)})


def _settle(out: Output, instance: "DagsterInstance") -> None:
    """Runs whose process is gone would be shown as running for ever."""
    from repro_assets import abandoned

    for run in abandoned.settle(instance):
        out.say(f"run {run} was abandoned by its process: marked as failed")


@main.command()
@command
def down(out: Output) -> None:
    """Stop the embedded servers; nothing is lost."""
    from resources import servers

    stopped = servers.down(progress=lambda said: click.echo(said, err=True))
    out.say(f"stopped: {', '.join(stopped) or 'nothing was running'}")
    out.result({"stopped": stopped})


@main.command()
@command
def status(out: Output) -> int:
    """Whether the servers answer, and where. Starts nothing."""
    from repro_assets.health import servers_seen

    rows = servers_seen()
    out.rows([{**row, "healthy": "yes" if row["healthy"] else "no"} for row in rows])
    out.result({"servers": rows})
    return GOOD if all(row["healthy"] for row in rows) else UNREACHABLE


@main.command()
@click.option("--show-secrets/--hide-secrets", default=True, help="secrets are printed so that `eval $(repro env)` works")
@command
def env(out: Output, show_secrets: bool) -> None:
    """Environment variables for lakectl, the AWS CLI and boto3: `eval "$(repro env)"`."""
    from resources.settings import Connections

    values = Connections.from_environment().environment()
    if not show_secrets:
        values = {name: "********" if "SECRET" in name else value for name, value in values.items()}
    if not out.as_json:
        for name, value in values.items():
            click.echo(f"export {name}={shlex.quote(value)}")
    out.result(values)


# ---- raw data


@main.command("import")
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path))
@click.option("--to", default="", metavar="FOLDER", help="folder on the branch raw")
@click.option("--message", "-m", default="", help="commit message")
@click.option("--delta", default="", metavar="URI", help="a Delta table instead of files; needs --version and --to")
@click.option("--version", default=None, type=click.IntRange(0), help="version of the Delta table")
@click.option("--iceberg", default="", metavar="METADATA", help="an Iceberg table's metadata.json; needs --snapshot-id and --to")
@click.option("--snapshot-id", default=None, type=int, metavar="ID", help="snapshot of the Iceberg table")
@click.option("--drop-partition-columns", is_flag=True, help="import a partitioned Delta table without its partition columns")
@command
def import_(
    out: Output,
    paths: tuple[Path, ...],
    to: str,
    message: str,
    delta: str,
    version: int | None,
    iceberg: str,
    snapshot_id: int | None,
    drop_partition_columns: bool,
) -> None:
    """Bring files, folders or one state of a table to the branch raw as one commit; prints the snapshot key."""
    from repro_assets import importing, tables

    if bool(paths) + bool(delta) + bool(iceberg) != 1:
        raise Failure(WRONG_USE, "name files or folders, or --delta URI, or --iceberg METADATA: exactly one of the three")
    # Wrong paths and tables are told before any server is started.
    table = None
    if delta:
        table = tables.delta(delta, version, drop_partition_columns=drop_partition_columns)
    elif iceberg:
        table = tables.iceberg(iceberg, snapshot_id)
    else:
        importing.listed(paths, to)
    made = bench()
    lake, store = made.lake.client, made.blobs.store
    with out.bar("storing files") as progress:
        if table:
            done = importing.import_table(lake, store, table, to=to, message=message, actor=made.actor, progress=progress)
        else:
            done = importing.import_files(lake, store, paths, to=to, message=message, actor=made.actor, progress=progress)
    _known(done.key)
    out.say(f"{done.files} files, {done.size:,} bytes" if done.new else f"{done.files} files, all there already as they are")
    out.say(f"snapshot {done.key}")
    out.result(vars(done))


@main.command("commit-raw")
@click.option("--message", "-m", required=True, help="commit message")
@command
def commit_raw(out: Output, message: str) -> None:
    """Commit what other tools wrote to the branch raw; prints the snapshot key."""
    from repro_assets import importing

    made = bench()
    done = importing.commit_raw(made.lake.client, made.blobs.store, message, made.actor)
    _known(done.key)
    out.say(f"{done.files} objects committed\nsnapshot {done.key}")
    out.result(vars(done))


def _known(key: str) -> None:
    """Dagster's instance learns of a new snapshot, so that the UI offers it at once."""
    from repro_assets import running
    from repro_assets.partitions import snapshots

    with running.open_instance() as instance:
        instance.add_dynamic_partitions(str(snapshots.name), [key])


@main.command()
@recipe_option
@command
def snapshots(out: Output, recipe: str | None) -> None:
    """Every snapshot, newest first, and what became of it."""
    from repro_assets.inspecting import Inspector

    rows = Inspector(bench(recipe)).snapshots()
    out.rows([{**row, "raw_commit": row["raw_commit"][:12]} for row in rows])
    out.result({"snapshots": rows})


# ---- the graph


@main.command()
@click.option("--snapshot", "-s", "key", default=None, metavar="KEY", help="snapshot key, or `newest`; without it the shared assets")
@click.option("--select", default="", metavar="ASSETS", help="comma-separated; default all")
@recipe_option
@click.option("--ranks", default=0, type=click.IntRange(0), help="processes of the training; never changes a result")
@click.option("--no-memo", is_flag=True, help="execute again whatever is remembered, and compare")
@click.option("--refresh-references", is_flag=True, help="look up baseline, drift reference, base model and suites anew")
@click.option("--promote", is_flag=True, help="release even if a newer snapshot is in force")
@command
def materialize(
    out: Output, key: str | None, select: str, recipe: str | None, ranks: int, no_memo: bool, refresh_references: bool, promote: bool
) -> int:
    """Materialize assets through Dagster. Shared assets are made first when they are missing."""
    from repro_assets import promoting, running, stage

    chosen = [_asset(name) for part in select.split(",") if (name := part.strip())]
    shared, rest = [name for name in chosen if name in SHARED], [name for name in chosen if name not in SHARED]
    if rest and not key:
        raise Failure(WRONG_USE, f"{rest[0]} belongs to a snapshot: give --snapshot KEY (`repro snapshots` lists them)")
    made = bench(recipe)
    made.recipe.load()
    flags = {stage.NO_MEMO: no_memo, stage.REFRESH: refresh_references, promoting.PROMOTE: promote}
    tags = {name: "true" for name, on in flags.items() if on}
    runs = []
    with running.open_instance() as instance:
        _settle(out, instance)
        if key:
            key = newest_or(made, key)
        if shared or (not chosen and (key is None or _shared_missing(made))):
            runs.append(running.materialize(instance, key=None, select=shared, recipe=recipe, tags=tags, say=out.progress))
        if key and (rest or not chosen) and all(ran.success for ran in runs):
            runs.append(running.materialize(instance, key=key, select=rest, recipe=recipe, ranks=ranks, tags=tags, say=out.progress))
    return _told(out, runs)


def _told(out: Output, runs: list["Ran"]) -> int:
    rows = [
        {
            "asset": name,
            "data_version": str(told["data version"])[:12],
            "commit": str(told["lakeFS commit"])[:12],
            "executed": told["executed"] == "yes",
            "seconds": ran.seconds.get(name),
        }
        for ran in runs
        for name, told in ran.assets.items()
    ]
    out.rows([{**row, "executed": "yes" if row["executed"] else "no, recalled"} for row in rows])
    for ran in runs:
        for check in ran.failed_checks:
            out.say(f"check failed: {check}")
        for warning in ran.warnings:
            out.say(f"warning: {warning}")
    told = {ran.run_id: _failure(ran) for ran in runs}
    listed = [
        {
            "run_id": ran.run_id,
            "success": ran.success,
            "failed_checks": ran.failed_checks,
            "warnings": ran.warnings,
            "failure": told[ran.run_id],
            "error": ran.error,
        }
        for ran in runs
    ]
    out.result({"runs": listed, "assets": rows})
    for ran in runs:
        if not ran.success:
            click.echo(f"repro: {told[ran.run_id]}", err=True)
            return code_of_name(ran.error) if ran.error else FINDING
    return FINDING if any(ran.failed_checks for ran in runs) else GOOD


def _failure(ran: "Ran") -> str:
    """Why a run failed, in words; empty when it did not."""
    if ran.success:
        return ""
    full = low_disk() if ran.error and code_of_name(ran.error) == UNREACHABLE else ""
    return (ran.failure or "the run failed") + full


def _shared_missing(made: "Bench") -> bool:
    from repro_assets.shelf import MissingDocument, Shelf

    made.lake.client.ensure()
    shelf, name = Shelf(made.lake.client, made.blobs.store), made.recipe.load().recipe.name
    try:
        for asset in SHARED:
            shelf.shared(name, asset, None)
    except MissingDocument:
        return True
    return False


def _asset(name: str) -> str:
    import difflib

    from repro_assets.documents import KINDS

    if name not in KINDS:
        near = difflib.get_close_matches(name, KINDS, 1)
        raise Failure(WRONG_USE, f"no asset {name!r}{f'; did you mean {near[0]}?' if near else ''} Known: {', '.join(KINDS)}")
    return name


@main.command()
@click.argument("asset")
@maybe_snapshot_option
@recipe_option
@command
def show(out: Output, asset: str, key: str, recipe: str | None) -> None:
    """The document of one asset: content, what was observed, how it was made."""
    import msgspec

    from repro_assets.inspecting import Inspector

    made = bench(recipe)
    document = Inspector(made).show(_asset(asset), None if asset in SHARED else newest_or(made, key))
    value = {"digest": document.digest, **msgspec.to_builtins(document)}
    if not out.as_json:
        out.people.print_json(json.dumps(value))
    out.result(value)


@main.command()
@click.argument("asset")
@maybe_snapshot_option
@recipe_option
@command
def why(out: Output, asset: str, key: str, recipe: str | None) -> int:
    """Why an asset would be executed again: what differs in its memo key, in words. Exit code 1 when something does."""
    from repro_assets.inspecting import Inspector

    made = bench(recipe)
    found = None if _asset(asset) in SHARED else newest_or(made, key)
    differs = Inspector(made).why(asset, found)
    for line in differs or [f"{asset}: nothing differs; it would be recalled from the memo"]:
        out.say(line)
    out.result({"asset": asset, "snapshot": found, "differs": differs})
    return FINDING if differs else GOOD


@main.command()
@snapshot_option
@recipe_option
@click.option("--deep", is_flag=True, help="hash every raw object again too")
@command
def verify(out: Output, key: str, recipe: str | None, deep: bool) -> int:
    """Read every document and blob of a snapshot from the servers and check every digest and signature."""
    from repro_assets.verifying import Verifier

    made = bench(recipe)
    return _findings(out, Verifier(made, newest_or(made, key)).findings(deep))


def _findings(out: Output, findings: Iterator[Any]) -> int:
    seen = []
    for item in findings:
        out.say(f"{'ok  ' if item.good else 'BAD '} {item.what}: {item.seen}")
        seen.append(item)
    out.result({"good": all(item.good for item in seen), "findings": [vars(item) for item in seen]})
    return max((item.code for item in seen if not item.good), default=GOOD)


@main.command()
@snapshot_option
@recipe_option
@click.option(
    "--ranks",
    default=2,
    show_default=True,
    type=click.IntRange(1),
    help="processes of the re-executed training; another number than the original's can earn R4",
)
@command
def reproduce(out: Output, key: str, recipe: str | None, ranks: int) -> int:
    """Re-execute a snapshot without the memo, compare every digest, sign a certificate."""
    from repro_assets import reproducing, running

    made = bench(recipe)
    with running.open_instance() as instance:
        proof = reproducing.reproduce(instance, made, newest_or(made, key), recipe=recipe, ranks=ranks, say=out.progress)
    for part in proof.parts:
        out.say(f"{part.scope}: {part.compared} digests compared, {len(part.differences)} differ")
    out.say(f"certificate {proof.grade}: {proof.certificate.sha256}" if proof.grade else f"differs: {proof.first_in_words}")
    out.result(vars(proof))
    return GOOD if proof.grade else FINDING


# ---- questions about the data

for _question in questions.COMMANDS:
    main.add_command(_question)


# ---- releases


@main.command()
@click.argument("number", type=click.IntRange(1))
@click.option("--reason", "-m", required=True, help="why; written into the release")
@command
def rollback(out: Output, number: int, reason: str) -> None:
    """Put an earlier release in force again, as a new release; its decision is verified anew."""
    import msgspec

    from repro_assets import promoting
    from repro_assets.releases import Releases

    made = bench()
    made.lake.client.ensure()
    release, commit = promoting.roll_back(Releases(made.lake.client, made.blobs.store), made.signing, number, reason)
    out.say(f"release {release.number} restores release {number}; commit {commit[:12]} on main")
    out.result({**msgspec.to_builtins(release), "commit": commit})


@main.command()
@command
def releases(out: Output) -> None:
    """Every release on main, oldest first."""
    from repro_assets.releases import Releases, told

    made = bench()
    made.lake.client.ensure()
    rows = [told(release) for release in Releases(made.lake.client, made.blobs.store).all()]
    out.rows(rows)
    out.result({"releases": rows})


# ---- upkeep


@main.command()
@command
def rebuild(out: Output) -> None:
    """Give an empty Dagster instance its partitions and materializations back from lakeFS."""
    from repro_assets import rebuilding, running

    made = bench()
    with running.open_instance() as instance, out.bar("reading documents") as progress:
        done = rebuilding.rebuild(instance, made, progress=progress)
    out.say(f"{done.keys} partition keys and {done.materializations} materializations restored")
    out.result(vars(done))


@main.command()
@recipe_option
@command
def doctor(out: Output, recipe: str | None) -> int:
    """Whether this machine, its servers and keys are in order. Starts nothing."""
    from repro_assets.health import examine

    return _findings(out, examine(bench(recipe, start=False)))


@main.group()
def recipe() -> None:
    """Recipes: everything a human chooses."""


@recipe.command("show")
@recipe_option
@command
def recipe_show(out: Output, recipe: str | None) -> None:
    """The recipe with every default written out."""
    import msgspec
    from ruamel.yaml import YAML

    from repro_assets.bench import RecipeResource

    loaded = RecipeResource(path=recipe or "").load()
    value = msgspec.to_builtins(loaded.recipe)
    if not out.as_json:
        click.echo(f"# {loaded.path}")
        YAML(typ="safe", pure=True).dump(value, sys.stdout)
    out.result(value)


@main.command()
@command
def dev(out: Output) -> None:
    """The Dagster UI and its daemon until Ctrl-C. The lakeFS and S3 servers keep running: `repro down` stops them."""
    from repro_assets import running, services

    bench()
    with running.open_instance() as instance:
        _settle(out, instance)
    with services.running() as ui:
        out.say(
            f"Dagster UI  {ui.url}\nAll automation ships stopped: start sensors and schedules on the Automation page. Ctrl-C ends the UI."
        )
        out.result({"url": ui.url})
        ui.wait()
    out.say("the UI is stopped; `repro down` stops the servers")


@main.command()
@command
def demo(out: Output) -> int:
    """The whole story on generated data; about three minutes on two cores."""
    from repro_assets.demo import run

    return run.play(out)
