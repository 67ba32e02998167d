"""What commands share: the options for recipe and snapshot, and the bench they work on. Commands are in `cli.py` and `questions.py`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from repro_assets.terminal import WRONG_USE, Failure

if TYPE_CHECKING:
    from repro_assets.bench import Bench


def bench(recipe: str | None = None, start: bool = True) -> "Bench":
    """The resources; with `start` the embedded servers are started when no external ones are named."""
    from repro_assets import bench as made

    if start:
        from resources import servers

        servers.connect(progress=lambda said: click.echo(said, err=True))
    return made.Bench.outside_a_run(recipe or "")


def _recipe(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    """A file, or the name of a recipe that ships with the project; absolute from here on."""
    if not value:
        return None
    from repro_assets.recipe import shipped

    return str(shipped(value) or Path(value).resolve())


recipe_option = click.option(
    "--recipe",
    "-r",
    default=None,
    metavar="RECIPE",
    callback=_recipe,
    help="file, or name of a shipped one; default REPRO_RECIPE, else demo",
)
snapshot_option = click.option("--snapshot", "-s", "key", required=True, metavar="KEY", help="snapshot key, or `newest`")
maybe_snapshot_option = click.option("--snapshot", "-s", "key", default="newest", metavar="KEY", help="snapshot key; default the newest")


def newest_or(made: "Bench", key: str) -> str:
    """The snapshot key, or that of the newest raw commit for `newest`."""
    from repro_assets.partitions import checked
    from repro_assets.shelf import Shelf

    if key != "newest":
        return checked(key)
    made.lake.client.ensure()
    newest = next(Shelf(made.lake.client, made.blobs.store).raw_commits(), None)
    if newest is None:
        raise Failure(WRONG_USE, "there is no snapshot yet: `repro import PATH` makes one")
    return newest[0]
