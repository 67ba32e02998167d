"""Used as Dagster users do: the real webserver and daemon, a real Chromium, the sensor, the schedule, a backfill, a cancelled run."""

import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
import pytest

from repro_assets import services
from repro_assets.documents import KINDS
from repro_assets.releases import Releases
from repro_assets_tests.graph import jsonl, tickets
from repro_assets_tests.world import Prepared, prepared
from resources.settings import Connections

ARTEFACTS = Path(__file__).parents[1] / "test-artifacts"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ENDED = (dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED)


class Ui:
    """The running UI of one prepared graph."""

    def __init__(self, url: str, world: Prepared) -> None:
        self.url, self.world, self.instance = url, world, world.graph.instance

    def ask(self, query: str, **variables: Any) -> Any:
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(f"{self.url}/graphql", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                said = json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()[:2000]) from error
        assert "errors" not in said, said["errors"]
        return said["data"]

    def launch(self, job: str, key: str, config: dict[str, Any] | None = None, **tags: str) -> str:
        """Run id of a run that the webserver was asked for."""
        said = self.ask(
            """mutation($p: ExecutionParams!) { launchRun(executionParams: $p) { __typename
               ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } ... on RunConfigValidationInvalid { errors { message } } } }""",
            p={
                "selector": {"repositoryLocationName": "repro_assets", "repositoryName": "__repository__", "jobName": job},
                "runConfigData": config or {},
                "mode": "default",
                "executionMetadata": {
                    "tags": [{"key": name, "value": value} for name, value in {"dagster/partition": key, **tags}.items()]
                },
            },
        )["launchRun"]
        assert said["__typename"] == "LaunchRunSuccess", said
        return str(said["run"]["runId"])

    def wait(self, run_id: str, seconds: float = 300) -> dg.DagsterRunStatus:
        def ended() -> dg.DagsterRunStatus | None:
            run = self.instance.get_run_by_id(run_id)
            return run.status if run and run.status in ENDED else None

        return until(ended, seconds, f"run {run_id}")


def until(look: Callable[[], Any], seconds: float, what: str) -> Any:
    """The first true value of `look`, asked for a while."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := look():
            return found
        time.sleep(0.5)
    raise AssertionError(f"{what}: not within {seconds:.0f} s")


@pytest.fixture(scope="module")
def ui(servers: Connections, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ui]:
    folder = tmp_path_factory.mktemp("ui")
    with prepared(servers, folder, ("raw_snapshot",)) as world:
        # the shipped schedule waits for Monday; a test cannot
        # Two data workers: a run that the daemon or the webserver started must be able to start processes of its own.
        environment = {"REPRO_RETRAIN_CRON": "* * * * *", "REPRO_RECIPE": str(world.recipe), "REPRO_DATA_WORKERS": "2"}
        with services.running(environment=environment) as running:
            yield Ui(running.url, world)


def logs(ui: Ui, run_id: str) -> str:
    return "\n".join(entry.user_message for entry in ui.instance.all_logs(run_id))


@pytest.mark.browser
def test_a_click_on_materialize_all_makes_everything_and_the_asset_page_shows_table_and_picture(ui: Ui) -> None:
    """The plain click works with no config, and the page tells the story."""
    if CHROMIUM is None:
        if os.environ.get("CI"):
            pytest.fail("no Chromium in PATH: .ci/run installs Debian's package `chromium`")
        pytest.skip("no Chromium in PATH: install Debian's package `chromium` to run the browser test")
    from playwright.sync_api import sync_playwright

    ARTEFACTS.mkdir(exist_ok=True)
    key = ui.world.key
    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--no-first-run",
            ],
        )
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        page.goto(f"{ui.url}/asset-groups/")
        page.get_by_role("button", name="Materialize all").first.wait_for(timeout=90_000)
        page.wait_for_timeout(1500)
        page.screenshot(path=str(ARTEFACTS / "graph.png"))
        page.get_by_role("button", name="Materialize all").first.click()
        page.get_by_text("Select a partition or create one").click()
        page.get_by_placeholder("Filter partitions").fill(key)
        page.wait_for_timeout(700)
        page.locator("label:visible, li:visible").filter(has_text=key).last.click()
        page.keyboard.press("Escape")
        page.screenshot(path=str(ARTEFACTS / "launch.png"))
        before = {run.run_id for run in ui.instance.get_runs()}
        page.get_by_role("button", name="Launch 1 run").click()
        run_id = until(
            lambda: next((run.run_id for run in ui.instance.get_runs() if run.run_id not in before), None), 60, "the launched run"
        )
        assert ui.wait(run_id) is dg.DagsterRunStatus.SUCCESS, logs(ui, run_id)[-3000:]
        for asset, picture in (
            ("qlora_checkpoint", "loss by step"),
            ("eval_results", "small/small_tickets by slice"),
            ("promotion", "candidate minus baseline"),
        ):
            page.goto(f"{ui.url}/assets/{asset}?view=partitions&partition={key}")
            image = page.locator(f'img[alt="{picture}"]').first
            image.wait_for(timeout=60_000)
            page.wait_for_timeout(800)
            page.screenshot(path=str(ARTEFACTS / f"{asset}.png"), full_page=True)
            assert image.evaluate("image => image.naturalWidth") > 200
            assert page.get_by_text("lakeFS commit").count() > 0
            assert page.locator("table").count() > 0
        page.goto(f"{ui.url}/runs/{run_id}")
        page.wait_for_timeout(2500)
        page.screenshot(path=str(ARTEFACTS / "run.png"))
        browser.close()
    made = {asset: ui.world.graph.document(key, asset) for asset in KINDS if asset not in ("base_model", "eval_suites")}
    assert made["promotion"].result.decision == "promote"
    assert {made[asset].made.run for asset in ("records", "shards", "qlora_checkpoint", "eval_results", "promotion")} == {run_id}


def test_a_started_sensor_turns_a_raw_commit_into_a_snapshot_and_a_started_schedule_retrains_the_newest(ui: Ui) -> None:
    """S0.43, S0.50: new raw data becomes an immutable snapshot by itself, once somebody started the automation."""
    graph = ui.world.graph
    start = """mutation($s: SensorSelector!) { startSensor(sensorSelector: $s) { __typename ... on Sensor { sensorState { status } } } }"""
    where = {"repositoryLocationName": "repro_assets", "repositoryName": "__repository__"}
    key = graph.import_({"b.jsonl": jsonl(tickets(20, start=500))})
    assert ui.ask(start, s={**where, "sensorName": "raw_commits"})["startSensor"]["sensorState"]["status"] == "RUNNING"
    started = """mutation($s: ScheduleSelector!) { startSchedule(scheduleSelector: $s) { __typename
                 ... on ScheduleStateResult { scheduleState { id status } } } }"""
    state = ui.ask(started, s={**where, "scheduleName": "retrain_newest"})["startSchedule"]["scheduleState"]
    assert state["status"] == "RUNNING"
    by_sensor = until(
        lambda: next(
            (run for run in ui.instance.get_runs() if run.tags.get("dagster/sensor_name") and run.tags.get("dagster/partition") == key),
            None,
        ),
        120,
        "the sensor's run of the new commit",
    )
    assert key in ui.instance.get_dynamic_partitions("snapshots")
    assert ui.wait(by_sensor.run_id) is dg.DagsterRunStatus.SUCCESS, logs(ui, by_sensor.run_id)[-3000:]
    assert graph.document(key, "validation_report").result.verdict in ("pass", "warn")
    by_schedule = until(
        lambda: next((run for run in ui.instance.get_runs() if run.tags.get("dagster/schedule_name") == "retrain_newest"), None),
        120,
        "the schedule's run",
    )
    stopped = ui.ask("""mutation($id: String!) { stopRunningSchedule(id: $id) { __typename } }""", id=state["id"])["stopRunningSchedule"]
    assert stopped["__typename"] == "ScheduleStateResult"
    assert by_schedule.tags["dagster/partition"] == max(ui.instance.get_dynamic_partitions("snapshots"))
    run_keys = [run.tags["dagster/run_key"] for run in ui.instance.get_runs() if run.tags.get("dagster/sensor_name")]
    assert len(run_keys) == len(set(run_keys))
    ui.wait(by_schedule.run_id)


def test_a_backfill_of_old_snapshots_without_memo_gives_the_same_content_and_promotes_nothing(ui: Ui) -> None:
    """S0.1, S0.45: months later, the same snapshots give the same digests."""
    graph = ui.world.graph
    keys = sorted(ui.instance.get_dynamic_partitions("snapshots"))[:2]
    assets = ("raw_snapshot", "records", "shards", "validation_report")
    until(lambda: all(run.status in ENDED for run in ui.instance.get_runs()), 240, "the runs of the automation")
    assert graph.run(keys[0], assets, ui.world.recipe).success
    assert graph.run(keys[1], assets, ui.world.recipe).success
    was = {(key, asset): graph.document(key, asset).digest for key in keys for asset in assets}
    releases = Releases(graph.bench().lake.client, graph.bench().blobs.store)
    before = [release.number for release in releases.all()]
    said = ui.ask(
        """mutation($p: LaunchBackfillParams!) { launchPartitionBackfill(backfillParams: $p) { __typename
           ... on LaunchBackfillSuccess { backfillId } ... on PythonError { message } } }""",
        p={
            "selector": {
                "partitionSetName": "data_partition_set",
                "repositorySelector": {"repositoryLocationName": "repro_assets", "repositoryName": "__repository__"},
            },
            "partitionNames": keys,
            "tags": [{"key": "repro/no-memo", "value": "true"}],
        },
    )["launchPartitionBackfill"]
    assert said["__typename"] == "LaunchBackfillSuccess", said
    backfill = said["backfillId"]

    def runs() -> list[dg.DagsterRun]:
        return [run for run in ui.instance.get_runs() if run.tags.get("dagster/backfill") == backfill and run.status in ENDED]

    until(lambda: len(runs()) == 2, 240, "the backfill's two runs")
    assert {run.status for run in runs()} == {dg.DagsterRunStatus.SUCCESS}, [logs(ui, run.run_id)[-1500:] for run in runs()]
    assert {(key, asset): graph.document(key, asset).digest for key in keys for asset in assets} == was
    again = {graph.document(key, asset).made.run for key in keys for asset in assets}
    assert again == {run.run_id for run in runs()}
    assert [release.number for release in releases.all()] == before


def test_terminating_a_run_in_the_ui_ends_every_process_of_its_training(ui: Ui) -> None:
    """The cancel button kills the whole group: nothing keeps a GPU."""
    graph = ui.world.graph
    endless = graph.recipe("endless", steps=100_000)
    assert graph.run(None, recipe=endless).success
    config = {"resources": {"recipe": {"config": {"path": str(endless)}}, "gpu": {"config": {"ranks": 2}}}}
    run_id = ui.launch("snapshot_to_promotion", ui.world.key, config)
    until(lambda: "submitted: backend local" in logs(ui, run_id), 240, "the training's start")
    # torchrun and its two ranks
    workers = until(lambda: found if len(found := _workers()) >= 3 else None, 120, "the training's processes")
    said = ui.ask(
        """mutation($id: String!) { terminateRun(runId: $id) { __typename ... on TerminateRunFailure { message } } }""", id=run_id
    )["terminateRun"]
    assert said["__typename"] == "TerminateRunSuccess", said
    assert ui.wait(run_id, 120) is dg.DagsterRunStatus.CANCELED
    until(
        lambda: not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers),
        60,
        "the end of every process",
    )


def _workers() -> list[psutil.Process]:
    """Processes of the GPU worker that belong to this test's home."""
    found = []
    for process in psutil.process_iter():
        try:
            if (
                "resources.gpu.worker" in " ".join(process.cmdline())
                and process.environ().get("REPRO_BLOBS_BUCKET") == os.environ["REPRO_BLOBS_BUCKET"]
            ):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def test_the_instance_settings_that_ship_load_in_dagster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Telemetry and the greeting dialog are off in both; production keeps compute logs in S3."""
    import yaml

    deploy = Path(__file__).parents[1] / "deploy"
    for name in ("dagster.local.yaml", "dagster.yaml"):
        settings = yaml.safe_load((deploy / name).read_text())
        assert settings["telemetry"] == {"enabled": False}
        assert settings["nux"] == {"enabled": False}
    production = yaml.safe_load((deploy / "dagster.yaml").read_text())
    assert production["compute_logs"]["class"] == "S3ComputeLogManager"
    (tmp_path / "dagster.yaml").write_text((deploy / "dagster.local.yaml").read_text())
    checked = subprocess.run(
        [shutil.which("dagster") or ".venv/bin/dagster", "instance", "info"],
        env={**os.environ, "DAGSTER_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stderr
