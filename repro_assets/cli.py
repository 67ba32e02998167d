"""`repro ...`: what people type. Arguments, output and exit codes only; each command calls the module that does the work.

Exit codes: 0 good, 1 finding (differs, gate failed, run failed), 2 wrong use, 3 a server or file is unreachable.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from repro_assets.terminal import EXIT, Failure, explained

GOOD, FINDING, WRONG_USE, UNREACHABLE = 0, 1, 2, 3
SHARED = ("base_model", "eval_suites")


class Output:
    """Either a person's terminal or, with --json, one JSON value on stdout and nothing else there."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.people = Console(stderr=as_json, highlight=False)

    def say(self, text: str) -> None:
        self.people.print(text, markup=False, soft_wrap=True)

    def progress(self, asset: str, message: str) -> None:
        self.people.print(f"  {asset:<18} {message}" if message else f"  {asset}", markup=False, style="dim", soft_wrap=True)

    def rows(self, rows: list[dict[str, Any]]) -> None:
        if not rows:
            self.say("nothing yet")
            return
        table = Table(*(name.replace("_", " ") for name in rows[0]), box=None, pad_edge=False)
        for row in rows:
            table.add_row(*(escape("" if value is None else str(value)) for value in row.values()))
        self.people.print(table)

    def result(self, value: Any) -> None:
        if self.as_json:
            click.echo(json.dumps(msgspec.to_builtins(value, enc_hook=str), indent=2, sort_keys=True))


def command(function: Callable[..., int | None]) -> Callable[..., None]:
    """A command with --json and the exit codes; known failures become one message without a traceback."""

    @click.option("--json", "as_json", is_flag=True, help="one JSON value on stdout, nothing else")
    @wraps(function)
    def run(*arguments: Any, as_json: bool, **options: Any) -> None:
        out = Output(as_json)
        try:
            code = function(out, *arguments, **options)
        except Failure as failure:
            code, message = failure.code, str(failure)
        except KeyboardInterrupt:
            code, message = FINDING, "interrupted; the same command continues where this one stopped"
        except EXIT as error:
            code, message = explained(error)
        else:
            sys.exit(code or GOOD)
        if as_json:
            click.echo(json.dumps({"error": message, "exit_code": code}, indent=2, sort_keys=True))
        click.echo(f"repro: {message}", err=True)
        sys.exit(code)

    return run


def bench(recipe: str | None = None, up: bool = True) -> Any:
    """The resources, with the embedded servers started when no external ones are named."""
    from repro_assets import bench as made
    from resources import servers

    if up:
        servers.connect(progress=lambda said: click.echo(said, err=True))
    path = str(Path(recipe).resolve()) if recipe else ""
    return made.Bench(
        lake=made.LakeResource(),
        blobs=made.BlobsResource(),
        jobs=made.JobsResource(),
        gpu=made.ExecutorResource(),
        trust=made.KeysResource(),
        notices=made.NotifierResource(),
        recipe=made.RecipeResource(path=path),
    )


recipe_option = click.option("--recipe", "-r", default=None, metavar="FILE", help="recipe file; default REPRO_RECIPE, else the demo's")
snapshot_option = click.option("--snapshot", "-s", "key", required=True, metavar="KEY", help="snapshot key, or `newest`")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="repro-assets")
@click.option("--home", default=None, metavar="DIR", help="state folder; default REPRO_HOME, else ./.repro")
def main(home: str | None) -> None:
    """Reproducible LLM fine-tuning that proves itself: raw data to a promoted model, every step a lakeFS commit."""
    if home:
        os.environ["REPRO_HOME"] = str(Path(home).absolute())
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("WANDB_MODE", "offline")


@main.command()
@command
def up(out: Output) -> None:
    """Start the embedded lakeFS and S3 servers; harmless when they run."""
    from resources import servers

    where = servers.up(progress=out.say)
    out.say(f"lakeFS {where.lakefs_endpoint}   S3 {where.s3_endpoint}   state {where.home}")
    out.result({"lakefs": where.lakefs_endpoint, "s3": where.s3_endpoint, "home": str(where.home)})


@main.command()
@command
def down(out: Output) -> None:
    """Stop the embedded servers; nothing is lost."""
    from resources import servers

    stopped = servers.down(progress=out.say)
    out.say(f"stopped: {', '.join(stopped) or 'nothing was running'}")
    out.result({"stopped": stopped})


@main.command()
@command
def status(out: Output) -> int:
    """Whether the embedded servers run, where, and since when."""
    from resources import servers

    found = [msgspec.to_builtins(item, enc_hook=str) for item in servers.status()]
    out.rows(found)
    out.result(found)
    return GOOD if found and all(item.get("running", item.get("healthy")) for item in found) else FINDING


@main.command()
@click.option("--show-secrets/--hide-secrets", default=True, help="secrets are printed so that `eval $(repro env)` works")
@command
def env(out: Output, show_secrets: bool) -> None:
    """Environment variables for lakectl, the AWS CLI and boto3: `eval $(repro env)`."""
    from resources.settings import Connections

    values = Connections.from_environment().environment()
    if not show_secrets:
        values = {name: "********" if "SECRET" in name else value for name, value in values.items()}
    if not out.as_json:
        for name, value in values.items():
            click.echo(f"export {name}='{value}'")
    out.result(values)


@main.command("import")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--to", default="", metavar="FOLDER", help="folder on the branch raw")
@click.option("--message", "-m", default="", help="commit message")
@command
def import_(out: Output, paths: tuple[Path, ...], to: str, message: str) -> None:
    """Bring files or folders to the branch raw as one commit; prints the snapshot key."""
    from repro_assets import importing, running
    from repro_assets.partitions import snapshots

    made = bench()
    done = importing.import_files(made.lake.client, made.blobs.store, paths, to=to, message=message, actor=made.actor)
    running.open_instance().add_dynamic_partitions(str(snapshots.name), [done.key])
    out.say(f"{done.files} files, {done.size:,} bytes" if done.new else f"{done.files} files, all there already as they are")
    out.say(f"snapshot {done.key}")
    out.result(vars(done))


@main.command("commit-raw")
@click.option("--message", "-m", required=True, help="commit message")
@command
def commit_raw(out: Output, message: str) -> None:
    """Commit what other tools wrote to the branch raw; prints the snapshot key."""
    from repro_assets import importing, running
    from repro_assets.partitions import snapshots

    made = bench()
    done = importing.commit_raw(made.lake.client, message, made.actor)
    running.open_instance().add_dynamic_partitions(str(snapshots.name), [done.key])
    out.say(f"{done.files} objects committed\nsnapshot {done.key}")
    out.result(vars(done))


@main.command()
@recipe_option
@command
def snapshots(out: Output, recipe: str | None) -> None:
    """Every snapshot, newest first, and what became of it."""
    from repro_assets.inspecting import Inspector

    rows = Inspector(bench(recipe)).snapshots()
    out.rows([{**row, "raw_commit": row["raw_commit"][:12]} for row in rows])
    out.result(rows)


@main.command()
@click.option("--snapshot", "-s", "key", default=None, metavar="KEY", help="snapshot key, or `newest`; without it the shared assets")
@click.option("--select", default="", metavar="ASSETS", help="comma-separated; default all")
@recipe_option
@click.option("--ranks", default=0, help="processes of the training; never changes a result")
@click.option("--no-memo", is_flag=True, help="execute again whatever is remembered, and compare")
@click.option("--refresh-references", is_flag=True, help="look up baseline, drift reference, base model and suites anew")
@click.option("--promote", is_flag=True, help="release even if a newer snapshot is in force")
@command
def materialize(
    out: Output, key: str | None, select: str, recipe: str | None, ranks: int, no_memo: bool, refresh_references: bool, promote: bool
) -> int:
    """Materialize assets through Dagster. Shared assets are made first when they are missing."""
    from repro_assets import promoting, running, stage

    made = bench(recipe)
    chosen = tuple(name for name in (part.strip() for part in select.split(",")) if name)
    flags = {stage.NO_MEMO: no_memo, stage.REFRESH: refresh_references, promoting.PROMOTE: promote}
    tags = {name: "true" for name, on in flags.items() if on}
    instance = running.open_instance()
    started = time.monotonic()
    runs = []
    shared = tuple(name for name in chosen if name in SHARED)
    rest = tuple(name for name in chosen if name not in SHARED)
    if shared or not chosen and (key is None or _shared_missing(made)):
        runs.append(running.materialize(instance, key=None, select=shared, recipe=recipe, tags=tags, say=out.progress))
    if key and (rest or not chosen) and all(ran.success for ran in runs):
        runs.append(running.materialize(instance, key=_key(made, key), select=rest, recipe=recipe, ranks=ranks, tags=tags, say=out.progress))
    elif rest and not key:
        raise Failure(WRONG_USE, f"{rest[0]} belongs to a snapshot: give --snapshot KEY (`repro snapshots` lists them)")
    good = all(ran.success and not ran.failed_checks for ran in runs)
    rows = [
        {"asset": name, "data_version": str(told["data version"])[:12], "commit": str(told["lakeFS commit"])[:12], "executed": told["executed"]}
        for ran in runs
        for name, told in ran.assets.items()
    ]
    out.rows(rows)
    for ran in runs:
        for check in ran.failed_checks:
            out.say(f"check failed: {check}")
        if not ran.success:
            out.say(ran.failure or "the run failed")
    out.say(f"{time.monotonic() - started:.1f} s")
    out.result({"runs": [{"run_id": ran.run_id, "success": ran.success, "failed_checks": ran.failed_checks, "failure": ran.failure} for ran in runs], "assets": rows})
    return GOOD if good else FINDING


def _shared_missing(made: Any) -> bool:
    from repro_assets.shelf import MissingDocument, Shelf

    shelf = Shelf(made.lake.client, made.blobs.store)
    made.lake.client.ensure()
    try:
        for name in SHARED:
            shelf.shared(made.recipe.load().recipe.name, name, None)
    except MissingDocument:
        return True
    return False


def _key(made: Any, key: str) -> str:
    from repro_assets.shelf import Shelf

    if key != "newest":
        return key
    made.lake.client.ensure()
    newest = next(Shelf(made.lake.client, made.blobs.store).raw_commits(), None)
    if newest is None:
        raise Failure(WRONG_USE, "there is no snapshot yet: `repro import PATH` makes one")
    return newest[0]


@main.command()
@click.argument("asset")
@click.option("--snapshot", "-s", "key", default=None, metavar="KEY", help="snapshot key, or `newest`")
@recipe_option
@command
def show(out: Output, asset: str, key: str | None, recipe: str | None) -> None:
    """The document of one asset: content, what was observed, how it was made."""
    from repro_assets.inspecting import Inspector

    made = bench(recipe)
    document = Inspector(made).show(_asset(asset, key), _key(made, key) if key else None)
    value = {"digest": document.digest, **msgspec.to_builtins(document)}
    if not out.as_json:
        out.people.print_json(json.dumps(value))
    out.result(value)


def _asset(name: str, key: str | None) -> str:
    from repro_assets.documents import KINDS

    if name not in KINDS:
        raise Failure(WRONG_USE, f"no asset {name!r}; known: {', '.join(KINDS)}")
    if name not in SHARED and key is None:
        raise Failure(WRONG_USE, f"{name} belongs to a snapshot: give --snapshot KEY (`repro snapshots` lists them)")
    return name


@main.command()
@click.argument("asset")
@click.option("--snapshot", "-s", "key", default=None, metavar="KEY", help="snapshot key, or `newest`")
@recipe_option
@command
def why(out: Output, asset: str, key: str | None, recipe: str | None) -> int:
    """Why an asset would be executed again: what differs in its memo key, in words. Exit code 1 when something does."""
    from repro_assets.inspecting import Inspector

    made = bench(recipe)
    differs = Inspector(made).why(_asset(asset, key), _key(made, key) if key else None)
    for line in differs or [f"{asset}: nothing differs; it would be recalled from the memo"]:
        out.say(line)
    out.result({"asset": asset, "differs": differs})
    return FINDING if differs else GOOD


@main.command()
@snapshot_option
@recipe_option
@click.option("--deep", is_flag=True, help="hash every raw object again too")
@command
def verify(out: Output, key: str, recipe: str | None, deep: bool) -> int:
    """Read every document and blob of a snapshot from the servers and check every digest and signature."""
    from repro_assets.inspecting import Inspector

    made = bench(recipe)
    found = list(Inspector(made).verify(_key(made, key), deep))
    for item in found:
        out.say(f"{'ok  ' if item.good else 'BAD '} {item.what}: {item.seen}")
    out.result([vars(item) for item in found])
    return GOOD if all(item.good for item in found) else FINDING


@main.command()
@snapshot_option
@recipe_option
@click.option("--ranks", default=2, show_default=True, help="processes of the re-executed training; another number than the original's can earn R4")
@command
def reproduce(out: Output, key: str, recipe: str | None, ranks: int) -> int:
    """Re-execute a snapshot without the memo, compare every digest, sign a certificate."""
    from repro_assets import reproducing, running

    made = bench(recipe)
    proof = reproducing.reproduce(running.open_instance(), made, _key(made, key), recipe=recipe, ranks=ranks, say=out.progress)
    for part in proof.parts:
        out.say(f"{part.scope}: {part.compared} digests compared, {len(part.differences)} differ")
    out.say(f"certificate {proof.grade}: {proof.certificate.sha256}" if proof.grade else f"differs: {proof.first_in_words}")
    out.result(vars(proof))
    return GOOD if proof.grade else FINDING


@main.command()
@click.argument("number", type=int)
@click.option("--reason", "-m", required=True, help="why; written into the release")
@command
def rollback(out: Output, number: int, reason: str) -> None:
    """Put an earlier release in force again, as a new release; its decision is verified anew."""
    from repro_assets import promoting
    from repro_assets.releases import Releases

    made = bench()
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
    out.result(rows)


@main.command()
@command
def rebuild(out: Output) -> None:
    """Give an empty Dagster instance its partitions and materializations back from lakeFS."""
    from repro_assets import rebuilding, running
    from repro_assets.shelf import Shelf

    made = bench()
    done = rebuilding.rebuild(running.open_instance(), Shelf(made.lake.client, made.blobs.store))
    out.say(f"{done.keys} partition keys and {done.materializations} materializations restored")
    out.result(vars(done))


@main.command()
@recipe_option
@command
def doctor(out: Output, recipe: str | None) -> int:
    """Whether this machine, its servers and keys are in order."""
    from repro_assets.inspecting import Inspector

    found = list(Inspector(bench(recipe)).doctor())
    for item in found:
        out.say(f"{'ok  ' if item.good else 'BAD '} {item.what}: {item.seen}")
    out.result([vars(item) for item in found])
    return GOOD if all(item.good for item in found) else FINDING


@main.group()
def recipe() -> None:
    """Recipes: everything a human chooses."""


@recipe.command("show")
@recipe_option
@command
def recipe_show(out: Output, recipe: str | None) -> None:
    """The recipe with every default written out."""
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
    running.open_instance()
    with services.running() as url:
        out.say(f"Dagster UI  {url}\nAll automation ships stopped: start sensors and schedules on the Automation page. Ctrl-C ends the UI.")
        while True:
            time.sleep(3600)


@main.command()
@command
def demo(out: Output) -> int:
    """The whole story on generated data; about three minutes on two cores."""
    from repro_assets.demo import run

    return run.play(out)
