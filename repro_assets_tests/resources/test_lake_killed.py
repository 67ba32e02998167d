"""A write whose process is killed (SIGKILL) before, in the middle of and after every call to lakeFS, then the same write again.

Run as a program this file is the victim: it forks one child for each line on its standard input, so that the SDK is imported once.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY))

from repro_assets.trust.blob import Blob  # noqa: E402  the program needs the path above
from resources.blobs import Blobs  # noqa: E402
from resources.lake import Lake  # noqa: E402
from resources.settings import Connections  # noqa: E402

MOMENTS = ("before", "sent", "after")


def die_at(call: int, moment: str) -> list[str]:
    """From now on the `call`-th request (0 is the next) kills this process at `moment`; returns the growing list of requests."""
    from urllib3.connection import HTTPConnection
    from urllib3.connectionpool import HTTPConnectionPool

    seen: list[str] = []
    lock, mine = threading.Lock(), threading.local()  # links are made in threads: each request knows its own number
    whole, answer = HTTPConnectionPool.urlopen, HTTPConnection.getresponse

    def due(now: str) -> None:
        if mine.number == call and moment == now:
            os.kill(os.getpid(), signal.SIGKILL)

    def urlopen(self, method, url, *arguments, **options):  # type: ignore[no-untyped-def]
        with lock:
            mine.number = len(seen)
            seen.append(f"{method} {url.split('?')[0]}")
        due("before")
        response = whole(self, method, url, *arguments, **options)
        due("after")
        return response

    def getresponse(self, *arguments, **options):  # type: ignore[no-untyped-def]
        due("sent")
        return answer(self, *arguments, **options)

    HTTPConnectionPool.urlopen, HTTPConnection.getresponse = urlopen, getresponse  # type: ignore[method-assign]
    return seen


def victim(connections: Connections, order: dict) -> None:  # type: ignore[type-arg]
    seen = die_at(order["call"], order["moment"])
    files = {name: Blob(digest, size) for name, (digest, size) in order["files"].items()}
    Lake.connect(connections, owner="victim").write(order["branch"], "a", files, message="new", metadata={}, keep=("kept",))
    print(json.dumps(seen), flush=True)


def main() -> None:
    values = json.loads(sys.stdin.readline())
    connections = Connections(**{**values, "home": Path(values["home"]), "cache": Path(values["cache"])})
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            victim(connections, json.loads(line))
            os._exit(0)
        print(json.dumps(os.waitpid(child, 0)[1]), flush=True)


class Program:
    """The victim, waiting for orders."""

    def __init__(self, connections: Connections) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
        )
        self.send(asdict(connections))

    def send(self, value: object) -> None:
        assert self.process.stdin is not None
        print(json.dumps(value, default=str), file=self.process.stdin, flush=True)

    def line(self) -> object:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def write(self, branch: str, files: dict[str, Blob], call: int, moment: str) -> None:
        listed = {name: (blob.sha256, blob.size) for name, blob in files.items()}
        self.send({"branch": branch, "files": listed, "call": call, "moment": moment})


@pytest.fixture
def program(connections: Connections) -> Iterator[Program]:
    program = Program(connections)
    yield program
    assert program.process.stdin is not None
    program.process.stdin.close()
    program.process.wait(timeout=30)


@pytest.mark.timeout(120)
def test_a_writer_killed_at_any_moment_leaves_the_old_or_the_new_state(connections: Connections, program: Program) -> None:
    """S2.16: after a crash the same command goes on, with nothing lost and nothing half done."""
    from repro_assets_tests.resources.trees import digests, placed, stored, transactions

    lake, blobs = Lake.connect(connections), Blobs.connect(connections)
    lake.ensure()
    old = stored(blobs, {"document.json": b"old", "gone": b"g", "same": b"s"})
    new = stored(blobs, {"document.json": b"new", "leaf-0": b"0", "leaf-1": b"1", "leaf-2": b"2", "same": b"s"})
    kept = placed("a/kept", lake_files := stored(blobs, {"1": b"k"}))
    lake.ensure_branch("start", "raw")
    lake.write("start", "a/kept", lake_files, message="kept", metadata={})
    start = lake.write("start", "a", old, message="old", metadata={}, keep=("kept",)).commit
    main_before = lake.head("main")

    lake.ensure_branch("whole", "start")
    program.write("whole", new, -1, "never")
    requests = program.line()
    assert isinstance(requests, list)
    assert program.line() == 0
    assert digests(lake, lake.head("whole")) == {**placed("a", new), **kept}
    assert len(requests) >= 11

    outcomes: dict[str, set[str]] = {moment: set() for moment in MOMENTS}
    for call in range(len(requests)):
        for moment in MOMENTS:
            branch = f"w-{call}-{moment}"
            lake.ensure_branch(branch, start)
            program.write(branch, new, call, moment)
            assert program.line() == signal.SIGKILL, f"the writer was not killed {moment} call {call}"
            head = digests(lake, lake.head(branch))
            assert head in ({**placed("a", old), **kept}, {**placed("a", new), **kept}), f"killed {moment} call {call}: {head}"
            outcomes[moment].add("new" if "a/leaf-0" in head else "old")
            assert lake.head("main") == main_before
            lake.clean(owner="victim", older_than=0)
            assert transactions(lake) == []
            again = lake.write(branch, "a", new, message="new", metadata={}, keep=("kept",))
            assert digests(lake, again.commit) == digests(lake, lake.head(branch)) == {**placed("a", new), **kept}
            assert len(list(lake.log(branch))) == len(list(lake.log(start))) + 1, "one write is one commit, killed or not"
    assert outcomes["before"] == outcomes["after"] == {"old", "new"}, "the kills did not lie on both sides of the merge"


if __name__ == "__main__":
    main()
