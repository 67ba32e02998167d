"""The ordered sum and its neighbours on real process groups: the same bits for every world size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from repro_assets_tests.training.lab import free_port

PROGRAM = """
import hashlib, json, os, sys
import torch
from repro_assets.training import determinism, exchange
from repro_assets.training.job import TrainingError
determinism.prepare()
world = exchange.join()
determinism.settle()
generator = torch.Generator().manual_seed(1)
parts = torch.randn(8, 1003, generator=generator) * torch.logspace(-4, 4, 8)[:, None]
total = exchange.OrderedSum(world, 1003)
sums = []
for repeat in range(2):
    total.start()
    for first in range(0, 8, world.size):
        vector = total.vector()
        vector[:1003] = parts[first + world.rank]
        total.add(vector)
    sums.append(total.total().clone())
digest = hashlib.sha256(sums[0].numpy().tobytes()).hexdigest()
naive = parts.sum(0)
gathered = exchange.gather_bytes(world, b"x" * world.rank)
flags = [exchange.any_rank(world, False), exchange.any_rank(world, world.rank == world.size - 1)]
values = torch.zeros(8, dtype=torch.float64)
values[world.rank :: world.size] = torch.arange(8, dtype=torch.float64)[world.rank :: world.size] / 3
shared = exchange.shared_values(world, values).tolist()
exchange.agree(world, "same", "a")
try:
    exchange.agree(world, "colour", "red" if world.rank == 0 else "blue")
    refusal = ""
except TrainingError as error:
    refusal = str(error)
exchange.leave(world)
if world.rank == 0:
    print(json.dumps({"digest": digest, "repeats": torch.equal(*sums), "close": bool(torch.allclose(sums[0], naive, rtol=1e-4, atol=1e-2)),
        "gathered": [len(item) for item in gathered], "flags": flags, "shared": shared, "refusal": refusal}))
"""


def run(folder: Path, size: int) -> dict[str, object]:
    script = folder / "exchange_ranks.py"
    script.write_text(PROGRAM)
    port, processes = free_port(), []
    for rank in range(size):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        variables = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **(place if size > 1 else {})}
        processes.append(subprocess.Popen([sys.executable, str(script)], env=variables, text=True, stdout=subprocess.PIPE))
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * size
    found: dict[str, object] = json.loads(outputs[0].splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, object]]:
    folder = tmp_path_factory.mktemp("exchange")
    return {size: run(folder, size) for size in (1, 2, 4)}


def test_one_two_and_four_ranks_give_one_sum_to_the_last_bit(worlds: dict[int, dict[str, object]]) -> None:
    """S2.10, S2.11: gradients are synchronised, in an order that the number of ranks cannot change."""
    assert len({world["digest"] for world in worlds.values()}) == 1
    assert all(world["repeats"] and world["close"] for world in worlds.values())


def test_bytes_flags_and_values_reach_every_rank(worlds: dict[int, dict[str, object]]) -> None:
    for size, world in worlds.items():
        assert world["gathered"] == list(range(size))
        assert world["flags"] == [False, True]
        assert world["shared"] == [number / 3 for number in range(8)]


def test_ranks_that_differ_are_refused_by_number(worlds: dict[int, dict[str, object]]) -> None:
    assert worlds[1]["refusal"] == ""
    assert "colour: rank 1 has blue, rank 0 has red" in str(worlds[2]["refusal"])
