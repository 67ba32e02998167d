"""What a command shows and how it ends: a person's terminal or one JSON value, known failures as one message, the exit codes.

Exit codes: 0 good, 1 finding (differs, gate failed, run failed), 2 wrong use, 3 a server or file is unreachable. The commands are `cli.py`.
"""

import errno
import importlib
import json
import os
import shutil
import sqlite3
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from resources.settings import home_folder

if TYPE_CHECKING:
    from rich.console import Console

GOOD, FINDING, WRONG_USE, UNREACHABLE = 0, 1, 2, 3

#: exit code -> error classes by name: `--help` waits for no client, and of a failure inside a Dagster run only the name is left.
#: A subclass goes with its nearest base that is listed.
CODES: dict[int, tuple[str, ...]] = {
    FINDING: (
        "repro_assets.basemodel.BaseModelError",
        "repro_assets.bundling.BundleRefused",
        "repro_assets.data.errors.DataError",
        "repro_assets.demo.run.DemoFailed",
        "repro_assets.documents.DocumentError",
        "repro_assets.evaluation.policy.SampleError",
        "repro_assets.reproducing.CannotReproduce",
        "repro_assets.trust.artifact.ArtifactRefused",
        "repro_assets.trust.blob.BlobError",
        "repro_assets.trust.memo.ForgedMemo",
        "repro_assets.trust.statements.StatementError",
        "repro_assets.trust.verification.Refused",
        "resources.errors.StorageError",
        "resources.gpu.executor.JobError",
    ),
    WRONG_USE: (
        "repro_assets.data.errors.TableError",
        "repro_assets.evaluation.policy.PolicyError",
        "repro_assets.evaluation.suites.SuiteError",
        "repro_assets.expectations.ExpectationsError",
        "repro_assets.importing.CannotImport",
        "repro_assets.partitions.BadKey",
        "repro_assets.recipe.RecipeError",
        "repro_assets.releases.ReleaseError",
        "repro_assets.running.UnknownAsset",
        "repro_assets.shelf.MissingDocument",
        "repro_assets.shelf.UncommittedRaw",
        "repro_assets.stage.StaleInput",
        "repro_assets.trust.closure.ClosureError",
        "repro_assets.trust.environment.EnvironmentProblem",
        "repro_assets.trust.verification.TrustError",
        "resources.errors.NothingToCommit",
        "resources.errors.Uncommitted",
        "resources.settings.SettingsError",
        "resources.signer.KeyProblem",
    ),
    UNREACHABLE: (
        "builtins.OSError",
        "repro_assets.services.UiError",
        "resources.errors.Denied",
        "resources.errors.DiskFull",
        "resources.errors.NotFound",
        "resources.errors.Unavailable",
        "resources.gpu.backend.BackendError",
        "resources.notifier.NotifyError",
        "resources.servers.state.ServerError",
    ),
}
_BY_NAME = {name: code for code, names in CODES.items() for name in names}
LOW_BYTES = 32 << 20  # below this an embedded server that answers with errors is taken for one whose disk is full
HINT = "this is not a failure the project knows: the lines above say where it happened. `repro doctor` looks at servers, keys and disk"


class Failure(Exception):
    """A failure with its exit code."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def code_of(kind: type[BaseException]) -> int | None:
    """The exit code of an error class; None when neither it nor a base of it is listed."""
    return next((_BY_NAME[name] for base in kind.__mro__ if (name := f"{base.__module__}.{base.__qualname__}") in _BY_NAME), None)


def code_of_name(name: str) -> int:
    """The exit code of an error class by its full name, as a run reports it; a finding when the name is unknown."""
    module, _, attribute = name.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module or "builtins"), attribute)
    except (ImportError, AttributeError, ValueError):
        return FINDING
    return (code_of(kind) if isinstance(kind, type) and issubclass(kind, BaseException) else None) or FINDING


def explained(error: BaseException) -> tuple[int, str] | None:
    """Exit code and message of a known failure, None for one that deserves its traceback."""
    if isinstance(error, Failure):
        return error.code, str(error)
    if (full := _full_disk(error)) is not None:
        return UNREACHABLE, full
    code = code_of(type(error))
    if code is None:
        return None
    message = str(error) or type(error).__name__
    return code, message + (low_disk() if code == UNREACHABLE else "")


def _full_disk(error: BaseException) -> str | None:
    """What to say when `error`, or what it came from, is a full disk. Dagster's event log, which lies on SQLite, tells it in words only."""
    inner: BaseException | None = error
    for _ in range(10):
        if isinstance(inner, OSError) and inner.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"{inner}: free some space, or choose another place with REPRO_HOME or TMPDIR; nothing was committed"
        if isinstance(inner, sqlite3.OperationalError) and str(inner) in ("disk I/O error", "database or disk is full"):
            folder = Path(os.environ.get("DAGSTER_HOME") or home_folder())
            return (
                f"Dagster cannot write its event log in {folder} ({inner}; {shutil.disk_usage(folder).free >> 20} MiB are free there): free "
                "some space, or choose another place with REPRO_HOME; then the same command goes on, nothing half done is left"
            )
        inner = inner and (inner.__cause__ or inner.__context__)
    return None


def low_disk() -> str:
    """What an unreachable server's message lacks when the disk of the home folder is full; empty when it is not."""
    home = home_folder()
    if not home.exists() or (free := shutil.disk_usage(home).free) >= LOW_BYTES:
        return ""
    return f". The disk of {home} has {free >> 20} MiB free: free some space first, or choose another place with REPRO_HOME"


class Output:
    """Either a person's terminal or, with --json, one JSON value on stdout and nothing else there."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self._people: Console | None = None

    @property
    def people(self) -> "Console":
        if self._people is None:
            from rich.console import Console

            self._people = Console(stderr=self.as_json, highlight=False)
        return self._people

    def say(self, text: str) -> None:
        self.people.print(text, markup=False, soft_wrap=True)

    def progress(self, asset: str, message: str) -> None:
        self.people.print(f"  {asset:<18} {message}" if message else f"  {asset}", markup=False, style="dim", soft_wrap=True)

    @contextmanager
    def bar(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """A progress bar while the block runs; the block calls it with (done, total)."""
        if not self.people.is_terminal:
            yield lambda done, total: None
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.people, transient=True) as shown:
            task = shown.add_task(what, total=None)
            yield lambda done, total: shown.update(task, completed=done, total=total)

    def rows(self, rows: list[dict[str, Any]]) -> None:
        from rich.markup import escape
        from rich.table import Table

        if not rows:
            self.say("nothing yet")
            return
        table = Table(*(name.replace("_", " ") for name in rows[0]), box=None, pad_edge=False)
        for row in rows:
            table.add_row(*(escape("" if value is None else str(value)) for value in row.values()))
        self.people.print(table)

    def result(self, value: Any) -> None:
        import msgspec

        if self.as_json:
            click.echo(json.dumps(msgspec.to_builtins(value, enc_hook=str), indent=2, sort_keys=True))

    def error(self, code: int, message: str) -> None:
        self.result({"error": message, "exit_code": code})
        click.echo(f"repro: {message}", err=True)


def command(function: Callable[..., int | None]) -> Callable[..., None]:
    """A command with --json and the exit codes; known failures become one message without a traceback."""

    @click.option("--json", "as_json", is_flag=True, help="one JSON value on stdout, nothing else")
    @wraps(function)
    def run(*arguments: Any, as_json: bool, **options: Any) -> None:
        out = Output(as_json)
        try:
            sys.exit(function(out, *arguments, **options) or GOOD)
        except KeyboardInterrupt:
            out.error(FINDING, "interrupted; the same command continues where this one stopped")
            sys.exit(FINDING)
        except (click.ClickException, BrokenPipeError):
            raise
        except Exception as error:  # the edge of the program: whatever is not known keeps its traceback and gets a hint
            known = explained(error)
            if known is None:
                traceback.print_exc()
                known = FINDING, f"{type(error).__name__}: {error}; {HINT}"
            out.error(*known)
            sys.exit(known[0])

    return run


class Program(click.Group):
    """Wrong use answers in JSON too when --json is among the arguments."""

    def main(self, args: Any = None, **extra: Any) -> Any:  # type: ignore[override]
        given = list(sys.argv[1:] if args is None else args)
        try:
            result = super().main(args=given, **{**extra, "standalone_mode": False})
        except click.ClickException as error:
            error.show()
            if "--json" in given:
                Output(True).result({"error": error.format_message(), "exit_code": WRONG_USE})
            sys.exit(WRONG_USE)
        except click.Abort:
            sys.exit(FINDING)
        except BrokenPipeError:  # `repro snapshots | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(FINDING)
        sys.exit(result if isinstance(result, int) else GOOD)
