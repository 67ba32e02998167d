"""The ordered sum and its neighbours on real process groups: the same bits for every world size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from repro_assets_tests.training.lab import free_port

SIZES = (4, 2, 1)
PROGRAM = """
import hashlib, json, os, sys
import torch
from repro_assets.training import determinism, exchange
from repro_assets.training.job import TrainingError

def told(world):
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
    close = bool(torch.allclose(sums[0], parts.sum(0), rtol=1e-4, atol=1e-2))
    return {"size": world.size, "digest": digest, "repeats": torch.equal(*sums), "close": close,
        "gathered": [len(item) for item in gathered], "flags": flags, "shared": shared, "refusal": refusal}

determinism.prepare()
found = []
for size, port in json.loads(sys.argv[1]):
    if int(os.environ["RANK"]) < size:
        os.environ.update(WORLD_SIZE=str(size), MASTER_PORT=str(port))
        world = exchange.join()
        determinism.settle()
        found.append(told(world))
        exchange.leave(world)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, object]]:
    """What rank 0 of each size found. Four processes in all: those that a smaller size does not need leave."""
    script = tmp_path_factory.mktemp("exchange") / "exchange_ranks.py"
    script.write_text(PROGRAM)
    plan, processes = json.dumps([(size, free_port()) for size in SIZES]), []
    for rank in range(max(SIZES)):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, str(script), plan]
        processes.append(subprocess.Popen(command, env={**os.environ, **place}, text=True, stdout=subprocess.PIPE))
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes)
    found = {world["size"]: world for world in json.loads(outputs[0].splitlines()[-1])}
    assert set(found) == set(SIZES)
    return found


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
