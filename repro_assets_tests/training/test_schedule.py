"""The learning rate, the ledger's bits and the accounting of device time: pure functions."""

import itertools
import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from repro_assets.recipe import TrainingSection
from repro_assets.training import accounting, ledger
from repro_assets.training.schedule import learning_rate


def section(schedule: str, warmup: float = 0.1, rate: float = 2.0) -> TrainingSection:
    return msgspec.convert({"schedule": schedule, "warmup": warmup, "learning_rate": rate}, TrainingSection)


def test_linear_rises_over_the_warm_up_and_falls_to_its_last_share() -> None:
    rates = [learning_rate(section("linear"), step, 20) for step in range(1, 21)]
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert rates[-1] == pytest.approx(2.0 / 18)
    assert all(later <= sooner for sooner, later in itertools.pairwise(rates[1:]))


def test_cosine_is_half_in_the_middle_and_constant_stays() -> None:
    assert learning_rate(section("cosine", warmup=0), 51, 100) == pytest.approx(1.0)
    assert {learning_rate(section("constant", warmup=0), step, 10) for step in range(1, 11)} == {2.0}


@given(st.sampled_from(["linear", "cosine", "constant"]), st.integers(1, 500), st.floats(0, 1), st.data())
def test_every_step_has_a_rate_above_zero_and_at_most_the_recipes(schedule: str, steps: int, warmup: float, data: st.DataObject) -> None:
    rate = learning_rate(section(schedule, warmup), data.draw(st.integers(1, steps)), steps)
    assert 0 < rate <= 2.0 * (1 + 1e-12)


def test_the_ledger_round_trips_and_keeps_every_bit_of_a_loss() -> None:
    loss = math.nextafter(1 / 3, 1)
    row = ledger.row(step=1, epoch=0, loss=loss, learning_rate=1e-3, gradient_norm=0.5, tokens=10, trained=4, records="ab")
    assert row["loss_bits"] != ledger.bits(1 / 3)
    again = ledger.decode(ledger.encode([row, row]))
    assert again == [row, row]
    assert again[0]["loss"] == loss


def event(kind: str, elapsed: float, **facts: object) -> dict[str, object]:
    return {"kind": kind, "elapsed": elapsed, **facts}


def test_device_hours_of_a_killed_process_are_split_into_useful_lost_and_waiting() -> None:
    """S2.8: GPU hours per experiment; what a kill cost is counted apart."""
    killed = [
        event("started", 3600, world_size=2, resumed=0),
        event("checkpoint", 2 * 3600, step=50),
        event("step", 3 * 3600, step=80),
    ]
    hours = accounting.device_hours(killed, resumed=50, world_size=4, startup=1800, seconds=1800 + 3600)
    assert hours == {"useful": 2.0 + 4.0, "lost": 2.0, "waiting": 2.0 + 2.0}


def test_device_hours_without_earlier_processes_are_this_ones() -> None:
    assert accounting.device_hours([], 0, 1, 360, 3960) == {"useful": 1.0, "lost": 0.0, "waiting": 0.1}
