"""The worker's own duties: events that survive a storage outage, connections without lakeFS, the failures that are nobody's fault."""

import json
from typing import Any

import pytest

from resources.blobs import Objects
from resources.errors import Unavailable
from resources.gpu.job import event_path
from resources.gpu.worker import Events, _outcome_of, node_connections
from resources.settings import Connections, SettingsError


class Flaky(Objects):
    """The real bucket behind a network that is down while `down` is set."""

    down = False

    def put(self, key: str, data: bytes, if_absent: bool = False) -> bool:
        if self.down:
            raise Unavailable("the network is down")
        return super().put(key, data, if_absent)


@pytest.fixture
def objects(connections: Connections) -> Flaky:
    return Flaky.connect(connections)


def stored(objects: Objects) -> list[dict[str, Any]]:
    return [json.loads(objects.get(name)) for name in objects.list("jobs/k/events/")]


def test_events_that_could_not_be_sent_follow_in_order_with_the_next_one(objects: Flaky) -> None:
    events = Events(objects, "k")
    events.emit("started", world_size=1)
    objects.down = True
    events.emit("step", step=1)
    events.emit("checkpoint", step=1)
    with pytest.raises(Unavailable):
        events.flush()
    objects.down = False
    events.emit("step", step=2)
    assert [(event["kind"], event.get("step")) for event in stored(objects)] == [
        ("started", None),
        ("step", 1),
        ("checkpoint", 1),
        ("step", 2),
    ]


def test_a_later_process_reads_the_earlier_events_and_counts_on(objects: Flaky) -> None:
    first = Events(objects, "k")
    for step in range(12):
        first.emit("step", step=step)
    second = Events(objects, "k")
    assert [event["step"] for event in second.prior()] == list(range(12))
    second.emit("finished")
    assert json.loads(objects.get(event_path("k", 12)))["kind"] == "finished"


def test_only_the_first_rank_reports(objects: Flaky) -> None:
    Events(objects, "k", rank=1).emit("step", step=1)
    assert stored(objects) == []


def test_two_processes_that_report_for_one_job_are_found_out(objects: Flaky) -> None:
    one, other = Events(objects, "k"), Events(objects, "k")
    one.emit("step", step=1, loss=1.0)
    with pytest.raises(RuntimeError, match="written by another process: two run under job key k"):
        other.emit("step", step=1, loss=2.0)


def test_an_event_whose_answer_was_lost_is_not_taken_for_somebody_elses(objects: Flaky) -> None:
    events = Events(objects, "k")
    put = objects.put

    def lose_the_answer(key: str, data: bytes, if_absent: bool = False) -> bool:
        put(key, data, if_absent)
        objects.put = put  # type: ignore[method-assign]
        raise Unavailable("the connection broke")

    objects.put = lose_the_answer  # type: ignore[method-assign]
    events.emit("step", step=1)
    events.emit("step", step=2)
    assert [event["step"] for event in stored(objects)] == [1, 2]


def test_a_node_speaks_to_s3_and_knows_no_lakefs(connections: Connections) -> None:
    environment = connections.node_environment()
    assert not [name for name in environment if name.startswith("LAKECTL")]
    node = node_connections({**environment, "REPRO_CACHE": "/tmp/cache", "REPRO_CACHE_BYTES": "1000"})
    assert (node.s3_endpoint, node.jobs_bucket, node.blobs_bucket) == (
        connections.s3_endpoint,
        connections.jobs_bucket,
        connections.blobs_bucket,
    )
    assert node.lakefs_endpoint == node.lakefs_secret_key == ""
    assert node.cache_bytes == 1000
    with pytest.raises(SettingsError, match="REPRO_JOBS_BUCKET not set"):
        node_connections({name: value for name, value in environment.items() if name != "REPRO_JOBS_BUCKET"})


def test_a_lost_peer_or_storage_restarts_the_job_and_anything_else_fails_it() -> None:
    class DistNetworkError(RuntimeError):
        pass

    gloo = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:26382")
    for blameless in (gloo, DistNetworkError("store"), Unavailable("S3 is away")):
        assert _outcome_of(blameless)["status"] == "preempted"
    failed = _outcome_of(ValueError("bad\n  bundle"))
    assert (failed["status"], failed["reason"]) == ("failed", "ValueError: bad bundle")
