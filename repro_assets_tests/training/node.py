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

from repro_assets.training import loop, program  # noqa: E402
from repro_assets.training.batches import Batch  # noqa: E402
from repro_assets.trust.blob import FolderStore  # noqa: E402
from repro_assets_tests.training.lab import FolderEvents  # noqa: E402

RANK = int(os.environ.get("RANK", "0"))
FORWARD = loop.Trainer.loss_sum


def with_faults(scenario: dict[str, Any]) -> None:
    """Make the forward pass of step `at` (1-based) raise `signal` on `rank`, in the middle of the step."""

    def loss_sum(trainer: loop.Trainer, batch: Batch) -> Any:
        number = trainer.progress.step + 1
        fault = scenario.get("fault")
        if fault and trainer.network.training and number == fault["at"] and RANK == fault.get("rank", 0) and not scenario.get("done"):
            scenario["done"] = True
            os.kill(os.getpid(), getattr(signal, fault["signal"]))
        return FORWARD(trainer, batch)

    loop.Trainer.loss_sum = loss_sum  # type: ignore[method-assign]


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_bytes())
    root = Path(plan["root"])
    (root / "outcomes").mkdir(exist_ok=True)
    for scenario in plan["scenarios"]:
        with_faults(scenario)
        events = FolderEvents(root / "jobs" / scenario.get("key", scenario["name"]), writes=RANK == 0)
        try:
            outcome = program.run(scenario["job"], FolderStore(Path(plan["store"])), events)
        except Exception as error:  # noqa: BLE001  the test reads what was refused and why
            if not scenario.get("refused"):
                raise
            outcome = {"status": "refused", "error": type(error).__name__, "message": str(error)}
        (root / "outcomes" / f"{scenario['name']}-{RANK}.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    main()
