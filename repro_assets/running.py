"""Materializing from a terminal, through Dagster: its instance under the home folder, partition keys, one run, one line an asset.

The graph is `definitions.py`. Runs started here are ordinary runs: the UI shows them.
"""

import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg

from repro_assets.abandoned import mark
from repro_assets.partitions import checked, snapshots
from repro_assets.stage import TERMINAL
from resources.settings import home_folder

LOCAL = Path(__file__).parents[1] / "deploy" / "dagster.local.yaml"
FALLBACK = "telemetry: {enabled: false}\nnux: {enabled: false}\n"  # an installed wheel has no deploy folder


class UnknownAsset(ValueError):
    """A selection that names no asset."""


@dataclass(frozen=True)
class Ran:
    """One run: whether it succeeded, what each asset reported, how long its step took, and the first failure in words.

    `failed_checks` are findings; `warnings` are checks that failed with severity WARN, which change no exit code.
    `error` is the full name of the failure's class, by which `terminal.py` knows the exit code; empty when nothing failed.
    """

    run_id: str
    success: bool
    assets: dict[str, dict[str, Any]]
    seconds: dict[str, float]
    failed_checks: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    failure: str = ""
    error: str = ""


def dagster_home(home: Path | None = None) -> Path:
    """The folder of Dagster's instance; made with the local settings when it is not there. DAGSTER_HOME wins."""
    if named := os.environ.get("DAGSTER_HOME"):
        return Path(named)
    folder = home_folder(home) / "dagster"
    folder.mkdir(parents=True, exist_ok=True)
    settings = folder / "dagster.yaml"
    if not settings.exists():
        if LOCAL.exists():
            shutil.copyfile(LOCAL, settings)
        else:
            settings.write_text(FALLBACK)
    return folder


def open_instance(home: Path | None = None) -> dg.DagsterInstance:
    """The instance that the UI shows too."""
    folder = dagster_home(home)
    os.environ["DAGSTER_HOME"] = str(folder)
    return dg.DagsterInstance.get()


def materialize(
    instance: dg.DagsterInstance,
    *,
    key: str | None,
    select: Sequence[str] = (),
    recipe: str | None = None,
    ranks: int = 0,
    tags: Mapping[str, str] | None = None,
    say: Callable[[str, str], None] | None = None,
    resource_overrides: Mapping[str, Any] | None = None,
) -> Ran:
    """One run. Without `key` the shared assets; with it the partitioned ones, or those in `select`. Unknown names raise UnknownAsset."""
    from repro_assets import assets
    from repro_assets.definitions import build_defs

    chosen = assets.shared if key is None else assets.partitioned
    known = {asset.key.to_user_string(): asset.key for asset in chosen}
    if unknown := [name for name in select if name not in known]:
        raise UnknownAsset(
            f"no asset {unknown[0]!r} {'among the shared assets' if key is None else 'of a snapshot'}; known: {', '.join(known)}"
        )
    if key is not None:
        instance.add_dynamic_partitions(str(snapshots.name), [checked(key)])
    definitions = build_defs(resource_overrides=resource_overrides, loggers={"terminal": _logger(say)})
    job = definitions.resolve_implicit_global_asset_job_def()
    config: dict[str, Any] = {"loggers": {"terminal": {}}, "resources": {}}
    if recipe:
        config["resources"]["recipe"] = {"config": {"path": str(Path(recipe).resolve())}}
    if ranks:
        config["resources"]["gpu"] = {"config": {"ranks": ranks}}
    done = job.execute_in_process(
        instance=instance,
        partition_key=key,
        asset_selection=[known[name] for name in (select or known)],
        run_config=config,
        tags={TERMINAL: mark(), **(tags or {})},
        raise_on_error=False,
    )
    return _ran(done)


def _ran(done: dg.ExecuteInProcessResult) -> Ran:
    found: dict[str, dict[str, Any]] = {}
    checks: list[str] = []
    warnings: list[str] = []
    failure = error = ""
    seconds: dict[str, float] = {}
    for event in done.all_events:
        if event.is_step_success:
            seconds[str(event.step_key)] = round(event.step_success_data.duration_ms / 1000, 2)
        if event.is_step_materialization:
            materialization = event.step_materialization_data.materialization
            name = materialization.asset_key.to_user_string()
            found[name] = {label: value.value for label, value in materialization.metadata.items()}
        elif event.event_type_value == "ASSET_CHECK_EVALUATION":
            check = event.asset_check_evaluation_data
            if not check.passed:
                worst = checks if check.severity is dg.AssetCheckSeverity.ERROR else warnings
                worst.append(f"{check.asset_key.to_user_string()}: {check.check_name}: {check.description}")
        elif event.is_step_failure and not failure:
            error, failure = _failure(event.step_failure_data.error)
    if not done.success and not failure:
        failure = "the run failed before its first step; see its page in the UI"
    return Ran(done.run_id, done.success, found, seconds, tuple(checks), tuple(warnings), failure, error)


def _failure(error: Any) -> tuple[str, str]:
    """(full class name, message) of what a step raised: the outermost error that is not Dagster's frame around it. What lies further
    in is how a library put it, without our remedy."""
    while error is not None and error.cause is not None and (error.cls_name or "").startswith("Dagster"):
        error = error.cause
    if error is None:
        return "", "the run failed; see its page in the UI"
    if error.cls_name == "DagsterExecutionInterruptedError":
        return error.cls_name, "interrupted; the same command continues where this one stopped"
    # Dagster keeps the text of traceback.format_exception_only: the class's full name, a colon, the message
    name, _, said = str(error.message).strip().partition(": ")
    return (name, said) if error.cls_name and name.endswith(error.cls_name) else (error.cls_name or "", str(error.message).strip())


class _Telling(logging.Handler):
    """Hands every `context.log` line to `say(asset, message)`; Dagster's own event lines are left out."""

    def __init__(self, say: Callable[[str, str], None]) -> None:
        super().__init__(logging.INFO)
        self.say = say

    def emit(self, record: logging.LogRecord) -> None:
        meta = getattr(record, "dagster_meta", {})
        if not meta.get("dagster_event"):
            asset, colon, message = str(meta.get("orig_message", record.getMessage())).partition(": ")
            self.say(asset if colon else str(meta.get("step_key") or ""), message if colon else asset)


def _logger(say: Callable[[str, str], None] | None) -> dg.LoggerDefinition:
    """The only logger of a run that is started here."""

    def make(_context: dg.InitLoggerContext) -> logging.Logger:
        made = logging.Logger("repro.terminal", logging.INFO)
        made.addHandler(_Telling(say) if say else logging.NullHandler())
        return made

    return dg.LoggerDefinition(make, description="one line a message, for a terminal")
