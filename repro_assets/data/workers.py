"""Where a pure map runs: in this process, in spawned processes of this machine, or on a Ray cluster. Results come back in order.

Placement only: nothing that is computed may depend on it. What is mapped is said by `parts.py` and `sharding.py`.
"""

import itertools
import multiprocessing
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol, TypeVar, cast
from urllib.parse import urlsplit

from repro_assets.data.errors import WorkerLost

Unit = TypeVar("Unit")
Result = TypeVar("Result")

AHEAD = 2  # units in flight for each worker
DEATHS = 3  # times that workers may die without one unit coming through
WORTHWHILE = 32 << 20  # bytes of input below which starting processes costs more than it brings


class Workers(Protocol):
    """Runs a task over units. `count`: how many run at once. `local`: whether they see this machine's files."""

    count: int
    local: bool

    def map(self, task: Callable[[Unit], Result], units: Iterable[Unit]) -> Iterator[Result]:
        """The result of every unit, in order. Task, units and results must pickle, except in `Serial`. Raises what the task raises, and
        WorkerLost when workers keep dying."""
        ...


class Serial:
    """In this process, one unit at a time."""

    count = 1
    local = True

    def map(self, task: Callable[[Unit], Result], units: Iterable[Unit]) -> Iterator[Result]:
        return map(task, units)


_task: Callable[[Any], Any] | None = None


def _begin(task: Callable[[Any], Any]) -> None:
    """In a new worker: keep the task, and end with the parent, since an executor's orphans would wait for work for ever."""
    global _task
    _task = task
    os.environ["RAYON_NUM_THREADS"] = "1"  # the processes are the parallelism; threads of the tokenizer beside them only get in the way
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _run(unit: Any) -> Any:
    assert _task is not None, "the worker was started without its task"
    return _task(unit)


class Spawn:
    """Processes of this machine, spawned: a forked child of a process with threads may dead-lock (polars did). A unit whose worker was
    killed is run again in a new process."""

    local = True

    def __init__(self, count: int) -> None:
        self.count = count

    def map(self, task: Callable[[Unit], Result], units: Iterable[Unit]) -> Iterator[Result]:
        mapped = self._mapped(task, units)
        next(mapped, None)  # starts the processes, so that they load while the caller still prepares
        return mapped

    def _mapped(self, task: Callable[[Unit], Result], units: Iterable[Unit]) -> Iterator[Result]:
        """First nothing, then the results."""
        waiting = iter(units)
        held: deque[Any] = deque()
        deaths, starting = 0, True
        pool, flying = self._pool(task), deque[Future[Any]]()
        try:
            while True:
                held.extend(itertools.islice(waiting, self.count * AHEAD - len(held)))
                if not held:
                    return
                try:
                    # A pool that broke refuses new units too.
                    flying.extend([pool.submit(_run, unit) for unit in itertools.islice(held, len(flying), None)])
                    if starting:
                        starting = False
                        yield cast(Result, None)
                    result = flying[0].result()
                except BrokenProcessPool:
                    deaths += 1
                    if deaths > DEATHS:
                        raise WorkerLost(
                            f"worker processes died {deaths} times at the unit {held[0]!r:.200}: most often the machine ran out of memory, or "
                            "the calling script starts work without `if __name__ == '__main__'`; set REPRO_DATA_WORKERS to a smaller number, "
                            "or look at the system's log"
                        ) from None
                    pool.shutdown(wait=True)
                    pool = self._pool(task)
                    flying.clear()
                    continue
                deaths = 0
                held.popleft()
                flying.popleft()
                yield result
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _pool(self, task: Callable[[Any], Any]) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(self.count, multiprocessing.get_context("spawn"), _begin, (task,))


class Ray:
    """A Ray cluster: `address` of one that runs (`ray://host:port`, `host:port`), or `local` to start one on this machine.

    The cluster's nodes need this project installed, and are trusted with the credentials for S3 and lakeFS that the task carries.
    """

    local = False

    def __init__(self, address: str, count: int = 0) -> None:
        self.address, self.count = address, count or os.cpu_count() or 1

    def map(self, task: Callable[[Unit], Result], units: Iterable[Unit]) -> Iterator[Result]:
        try:
            import ray
        except ModuleNotFoundError as error:
            raise WorkerLost("REPRO_RAY_ADDRESS is set, but ray is not installed: install the extra `repro-assets[ray]`") from error
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        began = not ray.is_initialized()
        if began:
            local = self.address == "local"
            where: dict[str, Any] = {"num_cpus": self.count, "include_dashboard": False} if local else {}
            if not local:
                self._answers()
            ray.init(address=self.address, log_to_driver=False, **where)
        try:
            kept = ray.put(task)
            remote = ray.remote(max_retries=DEATHS)(_apply)
            flying: deque[Any] = deque()
            waiting = iter(units)
            while True:
                flying.extend(remote.remote(kept, unit) for unit in itertools.islice(waiting, self.count * AHEAD - len(flying)))
                if not flying:
                    return
                yield _of_ray(ray, flying.popleft())
        finally:
            if began:
                ray.shutdown()

    def _answers(self) -> None:
        """Look first: ray itself tries an address without a cluster for minutes."""
        where = urlsplit(self.address if "://" in self.address else f"ray://{self.address}")
        try:
            socket.create_connection((where.hostname or "", where.port or 10001), timeout=5).close()
        except OSError as error:
            raise WorkerLost(
                f"no Ray cluster answers at {self.address} ({error}): start it, or unset REPRO_RAY_ADDRESS to work on this machine"
            ) from error


def _apply(task: Callable[[Any], Any], unit: Any) -> Any:
    return task(unit)


def _of_ray(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise WorkerLost(f"the Ray cluster lost a unit {DEATHS} times: {error}; look at its workers' logs") from error


def chosen(size: int, worthwhile: int = WORTHWHILE) -> Workers:
    """Where to map over `size` bytes of input: REPRO_RAY_ADDRESS, else REPRO_DATA_WORKERS processes, else one a core from `worthwhile` bytes."""
    wanted = os.environ.get("REPRO_DATA_WORKERS", "")
    if wanted and not (wanted.isdecimal() and int(wanted) > 0):
        raise WorkerLost(f"REPRO_DATA_WORKERS is {wanted!r}: a number of processes, at least 1, or nothing")
    if address := os.environ.get("REPRO_RAY_ADDRESS"):
        return Ray(address, int(wanted or 0))
    count = int(wanted) if wanted else (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    return Spawn(count) if count > 1 and (wanted or size >= worthwhile) else Serial()
