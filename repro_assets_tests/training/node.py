"""One rank of a test training: runs scenarios through `program.run` and writes each outcome to a file. Started by `lab.start`.

Faults are real: the process signals or kills itself in the middle of a step.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from repro_assets.training import loop, program
from repro_assets.training.batches import Batch
from repro_assets.trust.blob import FolderStore
from repro_assets_tests.training import checks
from repro_assets_tests.training.lab import FolderEvents

RANK = int(os.environ.get("RANK", "0"))
FORWARD = loop.Trainer.loss_sum


def with_faults(scenario: dict[str, Any]) -> None:
    """Make the forward pass of step `at` (1-based) raise `signal` on `rank`, in the middle of the step."""

    def loss_sum(trainer: loop.Trainer, batch: Batch) -> Any:
        number = trainer.progress.step + 1
        fault = scenario.get("fault")
        if fault and trainer.network.training and number == fault["at"] and fault.get("rank", 0) == RANK and not scenario.get("done"):
            scenario["done"] = True
            os.kill(os.getpid(), getattr(signal, fault["signal"]))
        return FORWARD(trainer, batch)

    loop.Trainer.loss_sum = loss_sum  # type: ignore[method-assign]


def flip(store: FolderStore, digest: str) -> tuple[Path, bytes]:
    """Flip one bit of a stored blob; where it is and what it was."""
    path = store._path(digest)
    before = path.read_bytes()
    path.write_bytes(bytes([*before[:-20], before[-20] ^ 1, *before[-19:]]))
    return path, before


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_bytes())
    root = Path(plan["root"])
    (root / "outcomes").mkdir(exist_ok=True)
    for scenario in plan["scenarios"]:
        with_faults(scenario)
        os.environ.update(scenario.get("environment", {}))
        # a port of its own: a rank that is early would find the store of the process group before
        os.environ["MASTER_PORT"] = str(scenario["port"])
        events = FolderEvents(root / "jobs" / scenario.get("key", scenario["name"]), writes=RANK == 0)
        store = FolderStore(Path(plan["store"]))
        damaged = {digest: flip(store, digest) for digest in scenario.get("flip", [])}
        try:
            if "check" in scenario:
                arguments = {}
                if "result_of" in scenario:
                    earlier = root / "outcomes" / f"{scenario['result_of']}-{RANK}.json"
                    arguments["result"] = json.loads(earlier.read_bytes())["result"]
                outcome = checks.run(scenario["check"], scenario["job"], store, **arguments)
            else:
                outcome = program.run(scenario["job"], store, events)
        except Exception as error:
            if not scenario.get("refused"):
                raise
            outcome = {"status": "refused", "error": type(error).__name__, "message": str(error)}
        finally:
            for path, data in damaged.values():
                path.write_bytes(data)
        (root / "outcomes" / f"{scenario['name']}-{RANK}.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    main()
