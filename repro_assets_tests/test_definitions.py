"""The graph as Dagster sees it, held by a snapshot; and the rules of the house that keep it light."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest

from repro_assets.definitions import defs

ROOT = Path(__file__).parents[1]
SNAPSHOT = Path(__file__).parent / "snapshots" / "graph.json"
PURE = ("data", "trust", "training", "evaluation")
HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "lm_eval", "wandb", "datasets", "matplotlib")


def drawn() -> dict[str, object]:
    graph = defs.resolve_asset_graph()
    return {
        "assets": {
            key.to_user_string(): {
                "needs": sorted(parent.to_user_string() for parent in graph.get(key).parent_keys),
                "partitions": getattr(graph.get(key).partitions_def, "name", None),
                "checks": sorted(check.name for check in graph.get(key).check_keys),
            }
            for key in sorted(graph.get_all_asset_keys())
        },
        "jobs": sorted(job.name for job in defs.resolve_all_job_defs() if not job.name.startswith("__")),
        "sensors": {sensor.name: sensor.default_status.value for sensor in defs.sensors or ()},
        "schedules": {schedule.name: schedule.default_status.value for schedule in defs.schedules or ()},
        "resources": sorted(defs.resources or {}),
    }


def test_assets_jobs_sensors_and_the_graph_are_as_the_snapshot_says() -> None:
    """S0.22: a fixed graph. Write the snapshot anew with `python -m repro_assets_tests.test_definitions` and read the difference."""
    assert drawn() == json.loads(SNAPSHOT.read_text())


def test_all_automation_ships_stopped() -> None:
    assert set(drawn()["sensors"].values()) == {"STOPPED"}  # type: ignore[attr-defined]
    assert set(drawn()["schedules"].values()) == {"STOPPED"}  # type: ignore[attr-defined]


def test_importing_the_definitions_loads_no_training_library() -> None:
    code = f"import sys, repro_assets.definitions; print([name for name in {HEAVY!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_every_asset_has_a_code_version_made_from_its_sources() -> None:
    """S0.23, S3.3: without a code version Dagster would use the run id, and every rerun would look like another version."""
    for asset in defs.assets or ():
        assert isinstance(asset, dg.AssetsDefinition)
        for spec in asset.specs:
            assert spec.code_version and len(spec.code_version) == 64, spec.key


def modules(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*.py"))


def imported(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("folder", PURE)
def test_pure_packages_import_neither_dagster_nor_resources(folder: str) -> None:
    for path in modules(f"repro_assets/{folder}"):
        bad = {name for name in imported(path) if name.split(".")[0] in ("dagster", "resources")}
        assert not bad, f"{path.relative_to(ROOT)} imports {sorted(bad)}"


def test_resources_know_neither_dagster_nor_the_graph() -> None:
    allowed = ("repro_assets.trust", "repro_assets.training.program", "repro_assets.evaluation.program")
    for path in modules("resources"):
        bad = {
            name
            for name in imported(path)
            if name.split(".")[0] == "dagster" or (name.startswith("repro_assets") and not name.startswith(allowed))
        }
        assert not bad, f"{path.relative_to(ROOT)} imports {sorted(bad)}"


def test_every_module_says_what_belongs_in_it() -> None:
    for folder in ("repro_assets", "resources"):
        for path in modules(folder):
            if path.name != "__init__.py" or path.read_text().strip():
                assert ast.get_docstring(ast.parse(path.read_text())), path.relative_to(ROOT)


def test_nothing_is_pickled_and_no_hub_code_is_trusted() -> None:
    """Attack 3 and 2 of the reference: a pickled intermediate in S3, code through config."""
    for folder in ("repro_assets", "resources"):
        for path in modules(folder):
            names = imported(path)
            assert not names & {"pickle", "dill", "cloudpickle", "joblib", "shelve"}, path
            assert "trust_remote_code=True" not in path.read_text(), path
    assert not [name for name in (defs.resources or {}) if "io_manager" in name]


if __name__ == "__main__":
    SNAPSHOT.write_text(json.dumps(drawn(), indent=1, sort_keys=True) + "\n")
