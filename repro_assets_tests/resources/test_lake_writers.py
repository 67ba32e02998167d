"""Two processes that write to one snapshot branch at the same moment, fifty times.

Run as a program this file is one of the writers: a line on its standard input starts a round, a line on its output ends it.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY))

from repro_assets.trust.canonical import sha256  # noqa: E402  the program needs the path above
from resources.blobs import Blobs  # noqa: E402
from resources.lake import Lake, Placement  # noqa: E402
from resources.settings import Connections  # noqa: E402

ROUNDS = 50
BRANCH = "snapshot-k"


def files(writer: int, turn: int) -> dict[str, bytes]:
    """What a writer gives the contested asset: a document both write, and names that differ."""
    text = f"{writer} {turn}".encode()
    return {"document.json": text, f"leaf-{writer}-{turn % 3}": text, "leaf": text}


def loose(writer: int, turn: int) -> dict[str, bytes]:
    """The worst case, under a prefix that was empty: no path in common, which lakeFS merges into a mixture without a word."""
    return {f"only-{writer}": f"{writer} {turn}".encode()}


def main() -> None:
    values = json.loads(sys.stdin.readline())
    connections = Connections(**{**values, "home": Path(values["home"]), "cache": Path(values["cache"])})
    writer = int(sys.argv[1])
    lake, blobs = Lake.connect(connections, owner=f"writer-{writer}"), Blobs.connect(connections)

    def stored(contents: dict[str, bytes]):  # type: ignore[no-untyped-def]
        return {name: blobs.put_bytes(data) for name, data in contents.items()}

    print("ready", flush=True)
    for line in sys.stdin:
        turn = int(line)
        metadata = {"turn": str(turn), "writer": str(writer)}
        own, same, mixed = stored({"document.json": f"{writer} {turn}".encode()}), stored(files(writer, turn)), stored(loose(writer, turn))
        commits = [
            lake.write(BRANCH, f"own-{writer}", own, message="own", metadata=metadata).commit,
            lake.write(BRANCH, "same", same, message="same", metadata=metadata).commit,
            lake.write_all(BRANCH, [Placement(f"loose-{turn}", mixed)], message="loose", metadata=metadata).commit,
        ]
        print(json.dumps(commits), flush=True)


class Writer:
    """One of the two processes."""

    def __init__(self, connections: Connections, number: int) -> None:
        command = [sys.executable, __file__, str(number)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
        self.send(json.dumps(asdict(connections), default=str))

    def send(self, line: str) -> None:
        assert self.process.stdin is not None
        print(line, file=self.process.stdin, flush=True)

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


@pytest.fixture
def writers(connections: Connections) -> Iterator[list[Writer]]:
    started = [Writer(connections, number) for number in (0, 1)]
    yield started
    for writer in started:
        assert writer.process.stdin is not None
        writer.process.stdin.close()
        assert writer.process.wait(timeout=30) == 0


@pytest.mark.timeout(180)
def test_two_processes_on_one_snapshot_lose_nothing_and_mix_nothing(connections: Connections, writers: list[Writer]) -> None:
    """S0.10: two runs of one snapshot at once are safe by construction."""
    from repro_assets_tests.resources.trees import digests, transactions

    def placed(prefix: str, contents: dict[str, bytes]) -> dict[str, str | None]:
        return {f"{prefix}/{name}": sha256(data) for name, data in sorted(contents.items())}

    lake = Lake.connect(connections)
    lake.ensure()
    lake.ensure_branch(BRANCH, "raw")
    assert [writer.answer() for writer in writers] == ["ready", "ready"]
    for turn in range(ROUNDS):
        for writer in writers:
            writer.send(str(turn))
        commits = [json.loads(writer.answer()) for writer in writers]
        head = digests(lake, lake.head(BRANCH))
        for number in (0, 1):
            own, same, only = commits[number]
            mine = placed(f"own-{number}", {"document.json": f"{number} {turn}".encode()})
            assert digests(lake, own, f"own-{number}/") == mine
            assert digests(lake, same, "same/") == placed("same", files(number, turn))
            assert digests(lake, only, f"loose-{turn}/") == placed(f"loose-{turn}", loose(number, turn))
            assert mine.items() <= head.items(), f"round {turn}: writer {number} lost its asset"
        for prefix, made in (("same", files), (f"loose-{turn}", loose)):
            held = {path: digest for path, digest in head.items() if path.startswith(f"{prefix}/")}
            assert held in [placed(prefix, made(number, turn)) for number in (0, 1)], f"round {turn}: {prefix} is a mixture: {held}"
    assert transactions(lake) == []
    own = [info.metadata["turn"] for info in lake.log(BRANCH, "own-0/")]
    assert own == [str(turn) for turn in reversed(range(ROUNDS))], "every write is one commit of the branch, in order"


if __name__ == "__main__":
    main()
