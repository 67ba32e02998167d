"""Experiment trackers: sinks that are told what the ledger already holds. They can be missing, off or broken; training never notices.

W&B is the first. The ledger and the timings in the blob store are the truth.
"""

import importlib
import importlib.util
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from repro_assets.trust.blob import Blob, BlobStore

Row = Mapping[str, Any]


class Tracker(Protocol):
    """A sink for one training. Calls come from rank 0 only, after the work they speak of is safe."""

    def start(self, run: str, config: Mapping[str, Any], history: Sequence[Row]) -> None:
        """Open run `run` (an id made from the job's content) and replay the steps before this process."""
        ...

    def log(self, rows: Sequence[Row]) -> None:
        """Steps that are new since the last call, in order."""
        ...

    def finish(self, digests: Mapping[str, Any]) -> dict[str, Blob]:
        """Close the run with the digests that tie it to its checkpoint; names blobs that hold an offline run."""
        ...


class NoTracker:
    """Tracking switched off."""

    def start(self, run: str, config: Mapping[str, Any], history: Sequence[Row]) -> None:
        return

    def log(self, rows: Sequence[Row]) -> None:
        return

    def finish(self, digests: Mapping[str, Any]) -> dict[str, Blob]:
        return {}


class WandbOffline:
    """Collects, and writes one whole offline run at the end.

    An offline directory cannot be resumed (W&B starts a second one at step 0, and syncing one replaces the other), so each is complete;
    and W&B is not even imported while there is training to do.
    """

    def __init__(self, store: BlobStore, project: str) -> None:
        self.store, self.project = store, project

    def start(self, run: str, config: Mapping[str, Any], history: Sequence[Row]) -> None:
        self.run, self.config, self.rows = run, dict(config), list(history)

    def log(self, rows: Sequence[Row]) -> None:
        self.rows.extend(rows)

    def finish(self, digests: Mapping[str, Any]) -> dict[str, Blob]:
        with tempfile.TemporaryDirectory(prefix="repro-wandb-") as folder:
            run = _open(self.run, self.project, self.config, "offline", folder)
            _send(run, self.rows)
            run.summary.update(dict(digests))
            run.finish()
            # finish comes back before the writing process has emptied its buffers; only its end means that the file is whole
            importlib.import_module("wandb").teardown()
            root = Path(folder)
            kept = sorted(path for path in root.rglob("*.wandb") if path.is_file())
            return dict(zip((f"{self.run}/{path.name}" for path in kept), self.store.put_many(kept), strict=True))


class WandbOnline:
    """Live runs for those who have a key. W&B drops steps it already has when an earlier process's are replayed."""

    def __init__(self, project: str) -> None:
        self.project = project

    def start(self, run: str, config: Mapping[str, Any], history: Sequence[Row]) -> None:
        self.run = _open(run, self.project, config, "online", tempfile.mkdtemp(prefix="repro-wandb-"))
        _send(self.run, history)

    def log(self, rows: Sequence[Row]) -> None:
        _send(self.run, rows)

    def finish(self, digests: Mapping[str, Any]) -> dict[str, Blob]:
        self.run.summary.update(dict(digests))
        self.run.finish()
        return {}


def _open(run: str, project: str, config: Mapping[str, Any], mode: str, folder: str) -> Any:
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    settings = wandb.Settings(
        console="off",
        save_code=False,
        disable_git=True,
        x_disable_stats=mode == "offline",
        x_disable_meta=True,
        x_save_requirements=False,
        silent=True,
    )
    return wandb.init(id=run, name=run, project=project, config=dict(config), mode=mode, dir=folder, resume="allow", settings=settings)  # type: ignore[arg-type]


def _send(run: Any, rows: Sequence[Row]) -> None:
    for row in rows:
        facts = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "step"}
        run.log(facts, step=int(row["step"]))


class Guarded:
    """A tracker whose failure is reported once and never reaches the training."""

    def __init__(self, inner: Tracker) -> None:
        self.inner, self.failure = inner, ""

    def _try(self, call: Any, *arguments: Any) -> Any:
        if self.failure:
            return None
        try:
            return call(*arguments)
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"
            return None

    def start(self, run: str, config: Mapping[str, Any], history: Sequence[Row]) -> None:
        self._try(self.inner.start, run, config, history)

    def log(self, rows: Sequence[Row]) -> None:
        self._try(self.inner.log, rows)

    def finish(self, digests: Mapping[str, Any]) -> dict[str, Blob]:
        return self._try(self.inner.finish, digests) or {}


def choose(store: BlobStore) -> Guarded:
    """The tracker that the environment asks for: REPRO_WANDB=off, a key (WANDB_API_KEY, without WANDB_MODE=offline), else offline."""
    project = os.environ.get("WANDB_PROJECT", "repro-assets")
    if os.environ.get("REPRO_WANDB", "").lower() == "off" or importlib.util.find_spec("wandb") is None:
        return Guarded(NoTracker())
    if os.environ.get("WANDB_API_KEY") and os.environ.get("WANDB_MODE", "online") == "online":
        return Guarded(WandbOnline(project))
    return Guarded(WandbOffline(store, project))
