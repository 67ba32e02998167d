"""The runner of `make test`: two pytest processes run every test once between them, and nothing that goes wrong in either is lost."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """Six files of two tests each; every test appends a line to `ran`."""
    body = "import pathlib\nHERE = pathlib.Path(__file__).parent\n"
    for number in range(6):
        for name in ("one", "two"):
            body += f"def test_{name}():\n    (HERE / 'ran').open('a').write(f'{{__name__}} {name}\\n')\n"
        (tmp_path / f"test_{number}.py").write_text(body)
        body = "import pathlib\nHERE = pathlib.Path(__file__).parent\n"
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib -p no:cacheprovider\n")
    return tmp_path


def command(suite: Path) -> list[str]:
    return [sys.executable, "-m", "repro_assets_tests.side_by_side", "--rootdir", str(suite), "-c", str(suite / "pytest.ini"), str(suite)]


def run(suite: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(suite), env=ENVIRONMENT, cwd=suite, capture_output=True, text=True, timeout=120)


def test_every_test_is_run_once_by_one_of_the_two(suite: Path) -> None:
    done = run(suite)
    assert done.returncode == 0, done.stdout + done.stderr
    ran = (suite / "ran").read_text().splitlines()
    assert sorted(ran) == sorted(f"test_{number} {name}" for number in range(6) for name in ("one", "two"))
    assert sum(map(int, re.findall(r"(\d+) passed", done.stdout))) == 12
    assert sorted(re.findall(r"^[12] test_(\d)\.py \.\.$", done.stdout, re.M)) == list("012345")
    assert done.stdout.endswith("every collected test was run once\n")


def test_a_failure_in_either_fails_the_whole_and_is_shown_with_its_reason(suite: Path) -> None:
    (suite / "test_3.py").write_text("def test_sum():\n    assert 1 + 1 == 3, 'arithmetic'\n")
    done = run(suite)
    assert done.returncode == 1
    assert "AssertionError: arithmetic" in done.stdout
    assert "FAILED test_3.py::test_sum" in done.stdout
    assert re.search(r"^FAILED: the two pytest processes ended with (1 and 0|0 and 1)$", done.stdout, re.M)
    assert len((suite / "ran").read_text().splitlines()) == 10


def test_a_process_that_dies_in_the_middle_is_a_failure(suite: Path) -> None:
    (suite / "test_3.py").write_text("import os\ndef test_exit():\n    os._exit(0)\n")
    done = run(suite)
    assert done.returncode == 1
    assert "1 of 2 processes ended before their last test" in done.stdout


def test_a_file_that_cannot_be_collected_is_a_failure(suite: Path) -> None:
    (suite / "test_3.py").write_text("import no_such_module\n")
    done = run(suite)
    assert done.returncode == 1
    assert "No module named 'no_such_module'" in done.stdout


def test_a_request_to_stop_lets_both_tear_down(suite: Path) -> None:
    """CI ends a job with SIGTERM; pytest alone would leave its servers behind."""
    slow = """
import pathlib, time, pytest

@pytest.fixture
def held():
    here = pathlib.Path(__file__)
    here.with_suffix(".up").touch()
    yield
    here.with_suffix(".down").touch()

def test_held(held):
    time.sleep(30)
"""
    for number in range(6):
        (suite / f"test_{number}.py").write_text(slow)
    process = subprocess.Popen(command(suite), env=ENVIRONMENT, cwd=suite, stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + 30
    while len(list(suite.glob("*.up"))) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    process.terminate()
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert out.count("KeyboardInterrupt") >= 2
    assert len(list(suite.glob("*.down"))) == 2
