"""Commands that ask about the data and change nothing: diff, tiny-run, blame, checkout. What they print is here, the work is elsewhere."""

from pathlib import Path
from typing import Any

import click

from repro_assets.options import bench, newest_or, recipe_option, snapshot_option
from repro_assets.terminal import FINDING, GOOD, Output, command


@click.command("diff")
@click.argument("before")
@click.argument("now")
@click.option("--record", "-k", "name", default=None, metavar="KEY|ID", help="one record that differs, token by token")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(0), help="names shown; 0 shows all. --json always holds all")
@recipe_option
@command
def diff_(out: Output, before: str, now: str, name: str | None, limit: int, recipe: str | None) -> int:
    """What changed between two snapshots: files, leaves, records, slices, tokens. Exit code 1 when something did."""
    import msgspec

    from repro_assets import comparing

    made = bench(recipe)
    comparer = comparing.Comparer(made, newest_or(made, before), newest_or(made, now))
    found = comparer.difference()
    view = comparer.record(name, found) if name else None
    if view is not None:
        _told_record(out, view)
    else:
        out.rows(comparing.counts(found))
        for rows in (comparing.named(found), comparing.slices(found)):
            if rows:
                out.say("")
                out.rows(rows[: limit or None])
                if limit and len(rows) > limit:
                    out.say(f"and {len(rows) - limit} more; --limit 0 shows all")
    result = {"before": comparer.keys[0], "now": comparer.keys[1], "same": found.same, **msgspec.to_builtins(found)}
    out.result({**result, "record": msgspec.to_builtins(view)} if view else result)
    return GOOD if found.same else FINDING


def _told_record(out: Output, view: Any) -> None:
    """What was replaced on the left, what replaces it on the right, in the order of the texts."""
    from repro_assets.comparing import side_by_side

    for what, side in (("before", view.before), ("now", view.now)):
        said = f"{side.id}  {side.split}  {side.tokens or 0} tokens, {side.trained or 0} trained" if side else "not there"
        out.say(f"{view.name}  {what:<6} {said}")
    out.rows(side_by_side(view.pieces))


@click.command("tiny-run")
@snapshot_option
@click.option("--records", "-n", "count", default=64, show_default=True, type=click.IntRange(1), help="how many of the first records")
@recipe_option
@command
def tiny_run(out: Output, key: str, count: int, recipe: str | None) -> int:
    """The first records of a snapshot through the whole data path again, against the stored golden digest."""
    import msgspec

    from repro_assets import tiny

    made = bench(recipe)
    found = tiny.tiny_run(made, newest_or(made, key), count)
    out.say(f"golden {found.golden}\nnow    {found.now}\n{found.records} records: {found.in_words}")
    if found.same and found.environment:
        out.say(f"and that although the environment differs: {'; '.join(found.environment)}")
    if found.first:
        out.say(
            f"first of {found.differing}: record {found.first.record} ({found.first.where or 'raw'}), {found.first.stage}: {found.first.detail}"
        )
    out.result({**msgspec.to_builtins(found), "same": found.same})
    return GOOD if found.same else FINDING


@click.command("blame")
@click.argument("record", metavar="RECORD_ID|PATH:LINE")
@click.option("--steps", is_flag=True, help="also the training steps that had it; reads the train leaves of those snapshots")
@recipe_option
@command
def blame(out: Output, record: str, steps: bool, recipe: str | None) -> None:
    """Where a record came from, and every leaf, bundle, checkpoint and release that saw it. The beginning of an id does."""
    import msgspec

    from repro_assets.tracing import Tracer

    found = Tracer(bench(recipe)).trace(record, steps=steps)
    out.say(f"record {found.record or 'none: the row was set aside'}\nfirst snapshot {found.first_snapshot}")
    for seen in found.seen:
        out.say(f"\n{seen.snapshot}  {seen.file}:{seen.line}  {seen.split}  file of raw commit {seen.since[:12]}")
        out.say(f"  record leaf {seen.record_leaf[:12]}  token leaf {(seen.token_leaf or 'none: no trained token')[:24]}")
        out.say(f"  bundle {(seen.bundle or 'none')[:12]}")
        if seen.checkpoint:
            had = "" if seen.checkpoint.steps is None else f" in steps {', '.join(map(str, seen.checkpoint.steps)) or 'none'};"
            saved = ", ".join(map(str, seen.checkpoint.saved)) or "none"
            out.say(f"  checkpoint {seen.checkpoint.document[:12]}: {seen.checkpoint.use} on it;{had} saved at steps {saved}")
        if seen.releases:
            out.say(f"  releases {', '.join(map(str, seen.releases))}")
    for aside in found.aside:
        out.say(f"\n{aside.snapshot}  {aside.file}:{aside.line}  set aside: {aside.reason}: {aside.detail}")
    for what, reason in found.unread.items():
        out.say(f"\n{what} was not read: {reason}")
    out.result(msgspec.to_builtins(found))


@click.command("checkout")
@click.argument("key")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--what", default="raw", show_default=True, type=click.Choice(["raw", "records", "shards", "adapter"]))
@click.option("--format", "form", default="raw", show_default=True, type=click.Choice(["raw", "jsonl", "parquet", "datasets"]))
@recipe_option
@command
def checkout(out: Output, key: str, folder: Path, what: Any, form: Any, recipe: str | None) -> None:
    """Files of a snapshot back on disk, verified while written, with a manifest.json. The folder must be new or empty."""
    import msgspec

    from repro_assets import checkout as writing

    made = bench(recipe)
    with out.bar("writing") as progress:
        done = writing.check_out(made, newest_or(made, key), folder, what, form, progress)
    size = sum(file.size for file in done.files)
    out.say(f"{len(done.files)} files, {size:,} bytes of {what} of {done.snapshot} in {folder}; digests in manifest.json")
    out.result({**msgspec.to_builtins(done), "folder": str(folder)})


COMMANDS = (diff_, tiny_run, blame, checkout)
