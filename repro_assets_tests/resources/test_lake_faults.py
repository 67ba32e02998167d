"""`resources.lake` behind a network that fails: every call of a write meets every fault, through a real proxy to the real server."""

import itertools
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from lakefs_sdk.models.branch_protection_rule import BranchProtectionRule

from repro_assets_tests.resources import proxy as faults
from repro_assets_tests.resources.proxy import Proxy
from repro_assets_tests.resources.trees import digests, gateway, own_repository, placed, stored, transactions
from resources.blobs import Blobs
from resources.errors import Conflict, Denied, Gone, NotFound, Refused, StorageError, Unavailable
from resources.lake import Lake, Patience
from resources.settings import Connections

# A stall longer than the read timeout stands for the 30 s stall against the 30 s timeout of production.
QUICK = Patience(connect=2, read=0.4, long_read=0.4, total=20, attempts=5, first_wait=0.005, longest_wait=0.05)
PASSING = {
    "423": faults.status(423),
    "429": faults.status(429),
    "500": faults.status(500),
    "503": faults.status(503),
    "500 after it took effect": faults.status_after(500),
    "connection dropped before": faults.drop_before,
    "connection dropped after it took effect": faults.drop_after,
    "stall after it took effect": faults.stall(0.6),
}


@pytest.fixture(scope="module")
def connections(servers: Connections, tmp_path_factory: pytest.TempPathFactory) -> Connections:
    """One repository for the whole file: every test takes branches of its own."""
    return own_repository(servers, tmp_path_factory.mktemp("faults"))


@pytest.fixture
def proxy(connections: Connections) -> Iterator[Proxy]:
    proxy = Proxy(connections.lakefs_endpoint)
    yield proxy
    proxy.close()


@pytest.fixture(scope="module")
def direct(connections: Connections) -> Lake:
    lake = Lake.connect(connections)
    lake.ensure()
    return lake


@pytest.fixture
def lake(direct: Lake, connections: Connections, proxy: Proxy) -> Lake:
    """The lake whose calls go through the proxy."""
    return Lake.connect(replace(connections, lakefs_endpoint=proxy.endpoint), owner="faulty", patience=QUICK)


class Scene:
    """Branches whose prefix holds an old state, and the write of a new state that has every kind of call in it."""

    def __init__(self, direct: Lake, blobs: Blobs) -> None:
        self.direct = direct
        self.old = stored(blobs, {"document.json": b"old", "gone": b"g"})
        self.new = stored(blobs, {"document.json": b"new", "leaf": b"l"})
        direct.ensure_branch("start", "raw")
        direct.write("start", "a", self.old, message="old", metadata={})
        direct.write("start", "b", self.old, message="someone else's", metadata={})
        self.names = (f"w-{number}" for number in itertools.count())

    def branch(self) -> str:
        name = next(self.names)
        self.direct.ensure_branch(name, "start")
        return name

    def write(self, lake: Lake, branch: str) -> str:
        return lake.write(branch, "a", self.new, message="new", metadata={"n": "1"}).commit

    def state(self, branch: str) -> str:
        """Which whole state the branch is in; fails when it is in neither."""
        held = digests(self.direct, self.direct.head(branch))
        for name, files in (("old", self.old), ("new", self.new)):
            if held == {**placed("a", files), **placed("b", self.old)}:
                return name
        raise AssertionError(f"{branch} is neither old nor new: {held}")


@pytest.fixture(scope="module")
def scene(direct: Lake, connections: Connections) -> Scene:
    return Scene(direct, Blobs.connect(connections))


@pytest.fixture
def calls(scene: Scene, lake: Lake, proxy: Proxy) -> int:
    """How many calls one write makes."""
    branch = scene.branch()
    proxy.requests.clear()
    scene.write(lake, branch)
    seen = [request.split("?")[0].rsplit("/", 1)[-1] for request in proxy.requests]
    assert scene.state(branch) == "new"
    for step in ("commits", "delete", "branches", "backing", "ls"):
        assert step in seen, (step, proxy.requests)
    assert any("/merge/" in request for request in proxy.requests)
    return len(proxy.requests)


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_at_any_call_of_a_write_is_not_noticed(fault: str, scene: Scene, lake: Lake, proxy: Proxy, calls: int) -> None:
    """S2.1: every component is a failure point."""
    main = scene.direct.head("main")
    for number in range(calls):
        branch = scene.branch()
        before = len(list(scene.direct.log(branch)))
        proxy.plan(number, PASSING[fault])
        commit = scene.write(lake, branch)
        assert scene.state(branch) == "new", (fault, number)
        assert scene.direct.head(branch) == commit, (fault, number)
        assert len(list(scene.direct.log(branch))) == before + 1, f"{fault} at call {number} made more than one commit"
    assert scene.direct.head("main") == main
    assert transactions(scene.direct) == []


def test_a_request_that_arrives_only_when_it_is_repeated_does_no_harm(scene: Scene, lake: Lake, proxy: Proxy, calls: int) -> None:
    """The client took it for lost, asked whether it had taken effect, was told no, and sent it again: now it takes effect twice."""
    for number in range(calls):
        branch = scene.branch()
        before = len(list(scene.direct.log(branch, "a/")))
        proxy.plan(number, faults.arrive_late(), times=1000)
        commit = scene.write(lake, branch)
        proxy.clear()
        assert scene.state(branch) == "new", number
        assert digests(scene.direct, commit, "a/") == placed("a", scene.new), number
        assert len(list(scene.direct.log(branch, "a/"))) == before + 1, number
    assert transactions(scene.direct) == []


@pytest.mark.parametrize("code", [400, 401, 403, 404, 409, 410, 412])
def test_an_answer_that_does_not_pass_leaves_the_old_or_the_new_state(
    code: int, scene: Scene, lake: Lake, proxy: Proxy, calls: int
) -> None:
    failed = 0
    for number in range(calls):
        branch = scene.branch()
        proxy.plan(number, faults.status(code))
        try:
            scene.write(lake, branch)
            assert scene.state(branch) == "new"
        except StorageError:
            failed += 1
        scene.state(branch)
        lake.clean(owner="faulty", older_than=0)
        assert transactions(scene.direct) == []
        scene.write(lake, branch)
        assert scene.state(branch) == "new"
    assert failed >= (2 if code in (404, 409) else 5)


def test_a_server_that_stays_away_ends_the_call_in_time_and_says_what_to_do(scene: Scene, lake: Lake, proxy: Proxy, calls: int) -> None:
    for number in range(calls):
        branch = scene.branch()
        proxy.plan(number, faults.drop_before, times=100)
        began = time.monotonic()
        with pytest.raises(Unavailable, match=rf"{proxy.endpoint}.*5 attempts.*repro up"):
            scene.write(lake, branch)
        assert time.monotonic() - began < 5
        proxy.clear()
        scene.state(branch)
        lake.clean(owner="faulty", older_than=0)
        assert transactions(scene.direct) == []


def test_a_call_is_made_as_often_as_patience_says_and_not_once_more(direct: Lake, lake: Lake, proxy: Proxy) -> None:
    """urllib3 has retries of its own, which would multiply ours."""
    for fault in (faults.drop_before, faults.status(503)):
        proxy.requests.clear()
        proxy.plan(0, fault, times=100)
        with pytest.raises(Unavailable, match="5 attempts"):
            lake.head("main")
        assert len(proxy.requests) == QUICK.attempts
        proxy.clear()


def test_the_deadline_of_a_call_holds_even_with_attempts_left(direct: Lake, connections: Connections, proxy: Proxy) -> None:
    patient = Patience(read=0.2, total=0.5, attempts=1000, first_wait=0.001)
    lake = Lake.connect(replace(connections, lakefs_endpoint=proxy.endpoint), patience=patient)
    proxy.plan(0, faults.stall(1.0), times=1000)
    began = time.monotonic()
    with pytest.raises(Unavailable, match="ReadTimeoutError"):
        lake.head("main")
    assert time.monotonic() - began < 2


def test_a_transaction_left_behind_is_said_and_cleaned(
    scene: Scene, lake: Lake, proxy: Proxy, calls: int, caplog: pytest.LogCaptureFixture
) -> None:
    branch = scene.branch()
    delete = next(number for number, request in enumerate(proxy.requests[-calls:]) if request.startswith("DELETE"))
    proxy.plan(delete, faults.drop_before, times=5)
    with caplog.at_level(logging.WARNING):
        scene.write(lake, branch)
    assert scene.state(branch) == "new"
    assert "lake.clean()" in caplog.text
    proxy.clear()
    left = transactions(scene.direct)
    assert len(left) == 1
    assert list(lake.clean(owner="faulty", older_than=0)) == left


def test_a_transaction_that_somebody_removes_is_begun_again(scene: Scene, lake: Lake, proxy: Proxy, calls: int) -> None:
    for number in range(calls):
        branch = scene.branch()

        def fault(exchange: faults.Exchange) -> None:
            for name, _ in list(scene.direct.branches("tx-", hidden=True)):
                scene.direct.delete_branch(name)
            exchange.answer(*exchange.forward())

        proxy.plan(number, fault)
        scene.write(lake, branch)
        assert scene.state(branch) == "new", number


@pytest.mark.parametrize("prefix", ["a", "empty before"])
def test_another_writer_between_any_two_calls_is_neither_lost_nor_mixed(
    prefix: str, scene: Scene, lake: Lake, proxy: Proxy, calls: int
) -> None:
    """Two writers of an empty prefix without a file in common are the worst case: lakeFS merges them without a conflict."""
    other = {"other": scene.old["gone"]}
    for number in range(calls):
        branch = scene.branch()

        def fault(exchange: faults.Exchange, branch: str = branch) -> None:
            scene.direct.write(branch, prefix, other, message="other", metadata={})
            scene.direct.write(branch, "c", scene.old, message="other", metadata={})
            exchange.answer(*exchange.forward())

        proxy.plan(number, fault)
        commit = lake.write(branch, prefix, scene.new, message="new", metadata={}).commit
        proxy.clear()
        assert digests(scene.direct, commit, f"{prefix}/") == placed(prefix, scene.new), number
        head = digests(scene.direct, scene.direct.head(branch))
        assert placed("b", scene.old).items() <= head.items(), number
        at_head = {path: digest for path, digest in head.items() if path.startswith(f"{prefix}/")}
        assert at_head in (placed(prefix, scene.new), placed(prefix, other)), (number, at_head)


def test_a_merge_that_was_lost_and_overwritten_is_not_made_again(scene: Scene, lake: Lake, proxy: Proxy, calls: int) -> None:
    """The answer to the merge is lost, another writer changes the paths, then the merge is repeated: the later writer stays."""
    branch = scene.branch()
    merge = next(number for number, request in enumerate(proxy.requests[-calls:]) if "/merge/" in request)

    def fault(exchange: faults.Exchange) -> None:
        exchange.forward()
        scene.direct.write(branch, "a", {"document.json": scene.old["gone"]}, message="later", metadata={})
        exchange.drop()

    proxy.plan(merge, fault)
    commit = scene.write(lake, branch)
    assert digests(scene.direct, commit, "a/") == placed("a", scene.new)
    head = scene.direct.head(branch)
    assert scene.direct.commit_info(head).message == "later"
    assert scene.direct.commit_info(head).parents == (commit,)


def test_writers_that_never_stop_end_in_a_conflict_that_names_the_prefix(scene: Scene, lake: Lake, proxy: Proxy, calls: int) -> None:
    branch = scene.branch()
    turn = itertools.count()
    busy = threading.Lock()
    blobs = [scene.old["gone"], scene.old["document.json"]]

    def fault(exchange: faults.Exchange) -> None:
        if "/merge/" in exchange.handler.path and exchange.handler.path.endswith(branch):
            with busy:
                scene.direct.write(branch, "a", {"document.json": blobs[next(turn) % 2]}, message="other", metadata={})
        exchange.answer(*exchange.forward())

    proxy.plan(0, fault, times=10_000)
    with pytest.raises(Conflict, match=r"20 times somebody else changed 'a/'"):
        scene.write(lake, branch)
    proxy.clear()
    assert transactions(scene.direct) == []


@pytest.mark.parametrize(
    "fault", ["500", "500 after it took effect", "connection dropped after it took effect", "stall after it took effect"]
)
def test_every_other_call_survives_a_fault_that_passes(fault: str, scene: Scene, lake: Lake, proxy: Proxy) -> None:
    for number in range(8):
        branch, commit = scene.branch(), scene.direct.head("start")
        proxy.plan(number, PASSING[fault])
        lake.ensure()
        lake.ensure_branch(f"{branch}-b", commit)
        lake.tag(f"{branch}-t", commit)
        lake.pin(branch, commit)
        lake.unpin(branch)
        assert lake.tagged(f"{branch}-t") == lake.head(f"{branch}-b") == commit
        proxy.clear()


def test_a_removal_that_is_refused_inside_a_successful_answer_is_seen(scene: Scene, lake: Lake, proxy: Proxy, calls: int) -> None:
    branch = scene.branch()
    remove = next(number for number, request in enumerate(proxy.requests[-calls:]) if request.endswith("/objects/delete"))
    body = b'{"errors":[{"status_code":500,"message":"injected","path":"a/gone"}]}'
    proxy.plan(remove, lambda exchange: exchange.answer(200, [("Content-Type", "application/json")], body))
    with pytest.raises(Unavailable, match=r"did not remove 'a/gone': injected \(500\)"):
        scene.write(lake, branch)
    assert scene.state(branch) == "old"
    assert transactions(scene.direct) == []


def test_protection_rules_of_others_survive_ensure(scene: Scene, lake: Lake, proxy: Proxy) -> None:
    """Somebody sets a rule between our reading the rules and our writing them."""
    rules, repository = scene.direct.client.repositories, scene.direct.repository
    rules.set_branch_protection_rules(repository, [BranchProtectionRule(pattern="theirs-0")])

    def fault(exchange: faults.Exchange) -> None:
        rules.set_branch_protection_rules(repository, [BranchProtectionRule(pattern="theirs-1")])
        exchange.answer(*exchange.forward())

    proxy.plan(1, fault)
    lake.ensure()
    assert {rule.pattern for rule in rules.get_branch_protection_rules(repository)} == {"theirs-1", "main"}


@pytest.mark.parametrize("fault", PASSING)
def test_staged_data_is_committed_once_whatever_happens_to_the_answer(
    fault: str, scene: Scene, lake: Lake, proxy: Proxy, connections: Connections
) -> None:
    for number in range(2):
        branch = scene.branch()
        gateway(connections).put_object(Bucket=connections.repository, Key=f"{branch}/staged", Body=b"x")
        proxy.plan(number, PASSING[fault])
        commit = lake.commit_staged(branch, "m", {})
        assert scene.direct.head(branch) == commit
        assert scene.direct.commit_info(commit).parents == (scene.direct.head("start"),)


def test_a_commit_of_staged_data_that_arrives_late_is_found(scene: Scene, lake: Lake, proxy: Proxy, connections: Connections) -> None:
    branch = scene.branch()
    gateway(connections).put_object(Bucket=connections.repository, Key=f"{branch}/staged", Body=b"x")
    proxy.plan(1, faults.arrive_late(), times=1000)
    commit = lake.commit_staged(branch, "m", {})
    assert scene.direct.head(branch) == commit
    assert scene.direct.commit_info(commit).parents == (scene.direct.head("start"),)


def test_a_read_goes_on_where_the_connection_broke(scene: Scene, lake: Lake, proxy: Proxy, connections: Connections) -> None:
    data = bytes(range(256)) * 40_000
    blob = Blobs.connect(connections).put_bytes(data)
    commit = scene.direct.write(scene.branch(), "big", {"data": blob}, message="m", metadata={}).commit
    proxy.plan(0, faults.cut_body(3_000_000), times=2)
    assert lake.read(commit, "big/data") == data
    proxy.plan(0, faults.cut_body(5), times=100)
    with pytest.raises(Unavailable, match="broke 5 times, last at byte 0"):
        lake.read(commit, "big/data")
    with pytest.raises(Unavailable), lake.open(commit, "big/data") as stream:
        stream.read(10)


@pytest.mark.parametrize(
    ("code", "error"), [(400, Refused), (401, Denied), (403, Denied), (404, NotFound), (409, Conflict), (410, Gone), (412, Denied)]
)
def test_every_status_has_its_type(code: int, error: type[StorageError], lake: Lake, direct: Lake, proxy: Proxy) -> None:
    commit = direct.head("main")
    proxy.plan(0, faults.status(code), times=2)
    with pytest.raises(error, match=rf"injected by the test \(HTTP {code}\)"):
        lake.head("main")
    with pytest.raises(error, match=rf"'x'.*\(HTTP {code}\)"):
        lake.read(commit, "x")
