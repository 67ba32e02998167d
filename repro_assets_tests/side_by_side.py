"""`make test` in two pytest processes that share one suite: each takes the next file that neither has begun. No tests here.

Half of the suite's time is waiting for servers and processes, so two of them fill two cores. Both collect everything: what is run, in
which order of files, and that all of it was run, is decided here; `pytest` alone runs the same suite in one process.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

CLAIMS = "PYTEST_SIDE_BY_SIDE"  # not REPRO_…: conftest.py removes those
HALVES = 2
#: begun first, so that no half ends with one of them alone; a name that is gone does no harm
LONGEST = ("test_ui.py", "test_whole.py", "test_program.py", "test_executor.py", "test_cli.py", "test_embedded.py", "test_lake_faults.py")


def files(items: Sequence[Any]) -> dict[Path, list[Any]]:
    """Collected items by file, the longest files first, the others in pytest's order."""
    found: dict[Path, list[Any]] = {}
    for item in items:
        found.setdefault(item.path, []).append(item)
    rank = {name: number for number, name in enumerate(LONGEST)}
    return dict(sorted(found.items(), key=lambda entry: rank.get(entry[0].name, len(rank))))


def claimed(items: Sequence[Any], claims: Path) -> Iterator[Any]:
    """The items of every file that this process is the first to ask for; asks only when the file before is handed out."""
    for number, of_file in enumerate(files(items).values()):
        try:
            os.close(os.open(claims / str(number), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        yield from of_file


def pytest_runtestloop(session: Any) -> bool | None:
    """pytest's own loop over the claimed items. Collection errors are left to pytest."""
    if session.testsfailed or session.config.option.collectonly:
        return None
    claims, ran = Path(os.environ[CLAIMS]), []
    mine = claimed(session.items, claims)
    item = next(mine, None)
    while item is not None:
        following = next(mine, None)  # decides which fixtures live on
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        ran.append(item.nodeid)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)
        item = following
    note = {"collected": [item.nodeid for item in session.items], "ran": ran}
    (claims / f"half-{os.getpid()}.json").write_text(json.dumps(note))
    return True


class Half(threading.Thread):
    """One pytest process. Its line for each file is shown at once; failures, warnings and summary are kept together until it ends."""

    def __init__(self, number: int, arguments: Sequence[str], claims: Path) -> None:
        super().__init__()
        self.number, self.report = number, ""
        # a percentage would be that of all tests
        command = [sys.executable, "-m", "pytest", "-p", __spec__.name, "-o", "console_output_style=classic", *arguments]
        environment = {**os.environ, CLAIMS: str(claims)}
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run(self) -> None:
        assert self.process.stdout is not None
        begun, kept = False, list[str]()
        for line in self.process.stdout:
            if not begun or kept or line.startswith("="):
                kept.append(line)
            elif line.strip():
                print(f"{self.number} {line}", end="", flush=True)
            if not begun and line.startswith("collected "):
                begun, kept = True, []
        self.process.wait()
        self.report = "".join(kept)


def missed(claims: Path) -> list[str]:
    """Why the halves are not the whole suite: notes that are missing, tests that nobody or both ran."""
    notes = [json.loads(path.read_bytes()) for path in sorted(claims.glob("half-*.json"))]
    if len(notes) < HALVES:
        return [f"{HALVES - len(notes)} of {HALVES} processes ended before their last test"]
    ran = Counter(name for note in notes for name in note["ran"])
    wrong = [f"run {ran[name]} times: {name}" for name in notes[0]["collected"] if ran[name] != 1]
    if notes[0]["collected"] != notes[1]["collected"]:
        wrong.append("the processes collected different tests")
    return wrong


def main(arguments: Sequence[str]) -> int:
    """Runs pytest with `arguments`, twice at once. 0 only when both ended well and every test was run."""
    halves: list[Half] = []

    def stop(number: int, frame: object) -> None:
        """Both tear down what they started."""
        for half in halves:
            if half.process.poll() is None:
                half.process.send_signal(signal.SIGINT)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, lambda *_: None)  # a terminal's Ctrl-C reaches both without us, even if we were started with it ignored
    with tempfile.TemporaryDirectory(prefix="repro-tests-") as folder:
        halves += [Half(number, arguments, Path(folder)) for number in range(1, HALVES + 1)]
        for half in halves:
            half.start()
        for half in halves:
            half.join()
            print(f"\n{f' process {half.number} of {HALVES} ':#^120}\n{half.report}", end="", flush=True)
        codes, wrong = [half.process.returncode for half in halves], missed(Path(folder))
    if any(codes) or wrong:
        print(f"\nFAILED: the two pytest processes ended with {codes[0]} and {codes[1]}", *wrong, sep="\n")
        return 1
    print("\nboth pytest processes ended well, and every collected test was run once")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
