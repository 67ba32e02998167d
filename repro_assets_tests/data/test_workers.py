"""Where maps run. That placement does not show in digests is `test_same_digests.py` and `test_parts.py`."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from repro_assets.data import workers
from repro_assets.data.errors import SourceError, WorkerLost
from repro_assets.data.workers import Ray, Serial, Spawn


class Square(msgspec.Struct, frozen=True):
    """Squares; writes down which process did it."""

    folder: str

    def __call__(self, number: int) -> int:
        (Path(self.folder) / f"{number}-{os.getpid()}").touch()
        time.sleep(0.1)  # long enough for the second process to come up
        return number * number


class DiesOnce(msgspec.Struct, frozen=True):
    """Kills its own process the first time it sees 5, as the kernel does when memory runs out."""

    folder: str
    always: bool = False

    def __call__(self, number: int) -> int:
        mark = Path(self.folder) / "died"
        if number == 5 and (self.always or not mark.exists()):
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return number * number


class Refuses(msgspec.Struct, frozen=True):
    def __call__(self, number: int) -> int:
        raise SourceError(f"file {number}: broken")


SQUARES = [number * number for number in range(20)]


def test_a_spawned_pool_gives_every_result_in_order_from_several_processes(tmp_path: Path) -> None:
    assert list(Spawn(2).map(Square(str(tmp_path)), range(20))) == SQUARES
    processes = {name.name.split("-")[1] for name in tmp_path.iterdir()}
    assert len(processes) == 2
    assert str(os.getpid()) not in processes


def test_no_units_start_no_process() -> None:
    assert list(Spawn(2).map(Refuses(), [])) == []


def test_a_killed_worker_is_replaced_and_its_unit_run_again(tmp_path: Path) -> None:
    """A worker that dies costs its unit, not the run."""
    assert list(Spawn(2).map(DiesOnce(str(tmp_path)), range(20))) == SQUARES
    assert (tmp_path / "died").exists()


def test_a_pool_that_breaks_while_units_are_handed_to_it_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker may die between two units; seen once in forty runs of the test above."""
    calls = []
    whole = ProcessPoolExecutor.submit

    def submit(pool: ProcessPoolExecutor, *task: Any) -> Any:
        calls.append(task)
        if len(calls) == 6:
            raise BrokenProcessPool
        return whole(pool, *task)

    monkeypatch.setattr(ProcessPoolExecutor, "submit", submit)
    assert list(Spawn(2).map(Square(str(tmp_path)), range(20))) == SQUARES
    assert len(calls) > 20


def test_a_unit_that_kills_every_worker_stops_the_map_and_is_named(tmp_path: Path) -> None:
    with pytest.raises(WorkerLost, match=r"worker processes died 4 times at the unit \d+.*REPRO_DATA_WORKERS"):
        list(Spawn(1).map(DiesOnce(str(tmp_path), always=True), range(20)))


def test_an_error_of_the_task_comes_through_as_it_was() -> None:
    with pytest.raises(SourceError, match="file 0: broken"):
        list(Spawn(2).map(Refuses(), range(3)))


def test_workers_end_with_a_driver_that_was_killed(tmp_path: Path) -> None:
    """An executor's orphans would wait for work for ever, holding memory and connections."""
    script = (
        "import sys, time\n"
        "from repro_assets.data.workers import Spawn\n"
        "from repro_assets_tests.data.test_workers import Square\n"
        "if __name__ == '__main__':\n"
        f"    made = Spawn(2).map(Square({str(tmp_path)!r}), range(1000))\n"
        "    next(made)\n"
        "    print('started', flush=True)\n"
        "    time.sleep(600)\n"
    )
    (tmp_path / "driver.py").write_text(script)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen([sys.executable, str(tmp_path / "driver.py")], stdout=subprocess.PIPE, env=environment, cwd=root) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == b"started\n"
        children = psutil.Process(driver.pid).children(recursive=True)
        assert children
        driver.kill()
    _gone, alive = psutil.wait_procs(children, timeout=20)
    assert alive == []


def test_small_inputs_stay_in_this_process_and_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REPRO_DATA_WORKERS", "REPRO_RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    assert isinstance(workers.chosen(1000), Serial)
    monkeypatch.setenv("REPRO_DATA_WORKERS", "3")
    three = workers.chosen(1000)
    assert isinstance(three, Spawn)
    assert three.count == 3
    monkeypatch.setenv("REPRO_RAY_ADDRESS", "ray://127.0.0.1:10001")
    assert isinstance(workers.chosen(1000), Ray)
    monkeypatch.setenv("REPRO_DATA_WORKERS", "many")
    with pytest.raises(WorkerLost, match="REPRO_DATA_WORKERS is 'many'"):
        workers.chosen(1000)


def test_ray_gives_the_same_results_and_replaces_a_killed_worker(tmp_path: Path) -> None:
    """The map on a Ray cluster that is started here."""
    ray = Ray("local", 2)
    assert list(ray.map(DiesOnce(str(tmp_path)), range(20))) == SQUARES
    assert (tmp_path / "died").exists()
    with pytest.raises(SourceError, match="file 0: broken"):
        list(ray.map(Refuses(), range(3)))


def test_a_ray_cluster_that_does_not_answer_is_an_error_with_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    started = time.monotonic()
    with pytest.raises(WorkerLost, match=r"127\.0\.0\.1:1\b.*REPRO_RAY_ADDRESS"):
        list(Ray("127.0.0.1:1").map(Refuses(), range(3)))
    assert time.monotonic() - started < 60
