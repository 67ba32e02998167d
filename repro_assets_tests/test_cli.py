"""The command line: its life with real servers, JSON and exit codes, and one message for everything a person can get wrong."""

import ast
import contextlib
import errno
import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from repro_assets import cli, importing, terminal
from repro_assets.data import records as build_records
from repro_assets.terminal import CODES, FINDING, GOOD, UNREACHABLE, WRONG_USE, code_of, code_of_name, explained
from repro_assets_tests.graph import RECIPE, jsonl, tickets
from repro_assets_tests.resources.proxy import Exchange, Proxy
from repro_assets_tests.test_shelf import gateway
from repro_assets_tests.world import DATA, Answer, Prepared, prepared, repro
from resources.settings import Connections

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "blame", "checkout", "commit-raw", "demo", "dev", "diff", "doctor", "down", "env", "import", "materialize", "rebuild", "recipe",
    "releases", "reproduce", "rollback", "show", "snapshots", "status", "tiny-run", "up", "verify", "why",
}  # fmt: skip


@pytest.fixture(scope="module")
def made(servers: Connections, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prepared]:
    with prepared(servers, tmp_path_factory.mktemp("cli")) as found:
        yield found


def refused(answer: Answer, code: int, *words: str) -> None:
    """One message in words, the same on stderr and in the JSON, and no traceback."""
    assert answer.code == code, answer
    assert "Traceback" not in answer.err
    for word in words:
        assert word in answer.err
    said = answer.json
    if set(said) == {"error", "exit_code"}:
        assert said["exit_code"] == code
        for word in words:
            assert word in said["error"]


def leaves(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from leaves(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


# ---- the program itself


def test_help_waits_for_no_client_and_lists_every_command() -> None:
    heavy = ("dagster", "boto3", "lakefs_sdk", "pydantic", "torch", "rich.progress", "msgspec", "repro_assets.stage")
    code = (
        f"import sys\nfrom repro_assets.cli import main\ntry: main(['--help'])\nfinally: print([m for m in {heavy!r} if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"
    assert set(cli.main.commands) == COMMANDS
    for name in COMMANDS:
        assert f"  {name} " in found.stdout


def test_every_command_speaks_json_and_explains_itself() -> None:
    for name, command in leaves(cli.main):
        assert "--json" in [text for parameter in command.params for text in parameter.opts], name
        assert command.help, name
        shown = repro(*name.split(), "--help")
        assert (shown.code, shown.err) == (0, ""), name


def test_every_error_that_has_an_exit_code_exists_and_every_error_of_ours_has_one() -> None:
    for code, names in CODES.items():
        for name in names:
            assert code_of_name(name) == code, name
    inner = {"Failure", "Inspected", "StillRunning", "Unfit"}  # never leave their module
    for folder in ("repro_assets", "resources"):
        for path in (ROOT / folder).rglob("*.py"):
            if "training" in path.parts or path.name in ("program.py", "scoring.py", "tasks.py"):
                continue  # programs on nodes: what they raise arrives as JobFailed
            for node in ast.parse(path.read_text()).body:
                bases = [base.id for base in node.bases if isinstance(base, ast.Name)] if isinstance(node, ast.ClassDef) else []
                if any(base.endswith(("Error", "Exception")) for base in bases) and node.name not in inner:  # type: ignore[union-attr]
                    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
                    kind = getattr(importlib.import_module(module), node.name)  # type: ignore[union-attr]
                    assert code_of(kind) is not None, kind


def test_a_full_disk_says_what_to_do() -> None:
    known = explained(OSError(errno.ENOSPC, "No space left on device", "/somewhere"))
    assert known is not None
    assert known[0] == UNREACHABLE
    assert "free some space" in known[1]
    assert "/somewhere" in known[1]


def test_an_unknown_failure_keeps_its_traceback_and_gets_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_arguments: object) -> None:
        raise RuntimeError("never seen before")

    monkeypatch.setattr(importing, "listed", broken)
    answer = repro("import", "x", "--json")
    assert answer.code == FINDING
    assert "Traceback" in answer.err
    assert "RuntimeError: never seen before" in answer.json["error"]
    assert terminal.HINT in answer.json["error"]


def test_an_interrupt_says_that_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(importing, "listed", interrupted)
    assert repro("import", "x", "--json").json == {
        "error": "interrupted; the same command continues where this one stopped",
        "exit_code": FINDING,
    }


# ---- wrong use


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], ["No such command 'nothing'"]),
        (["verify"], ["Missing option '--snapshot'"]),
        (["snapshots", "--wrong"], ["No such option"]),
        (["rollback", "zero", "-m", "x"], ["'zero' is not a valid integer"]),
        (["materialize", "-s", "newest", "--ranks", "-1"], ["-1"]),
        (["materialize", "--select", "shrads", "-s", "newest"], ["no asset 'shrads'", "did you mean shards?"]),
        (["materialize", "--select", "shards"], ["shards belongs to a snapshot", "--snapshot KEY"]),
        (["show", "nothing"], ["no asset 'nothing'", "Known: base_model"]),
        (["show", "records", "-s", "No Key"], ["'No Key' is no snapshot key", "repro snapshots"]),
        (["verify", "-s", "20200101-000000-0123456789ab"], ["no raw commit made the snapshot", "repro snapshots"]),
        (["import", "/no/such place"], ["/no/such place: no such file or folder"]),
        (["import", "{data}", "--to", "_lakefs_x"], ["hooks under _lakefs", "rename"]),
        (["commit-raw", "-m", "x"], ["nothing is staged on the branch raw"]),
        (["reproduce"], ["Missing option '--snapshot'"]),
        (["reproduce", "-s", "newest", "--ranks", "0"], ["0 is not in the range x>=1"]),
        (["reproduce", "-s", "20200101-000000-0123456789ab"], ["no raw commit made the snapshot", "repro snapshots"]),
        (["rollback", "1"], ["Missing option '--reason'"]),
        (["rollback", "0", "-m", "x"], ["0 is not in the range x>=1"]),
        (["rollback", "99", "-m", "x"], ["there is no release 99", "none yet"]),
        (["recipe", "show", "-r", "/nowhere.yaml"], ["/nowhere.yaml: no such recipe", "--recipe"]),
        (["snapshots", "-r", "{typo}"], ["typo.yaml:10", "unknown key `records.quarantine_limt`", "did you mean `quarantine_limit`"]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_wrong_use_is_told_in_one_message_with_the_remedy(made: Prepared, arguments: list[str], words: list[str]) -> None:
    data = made.graph.folder / "import"
    typo = made.graph.recipe("typo", RECIPE.replace("quarantine_limit", "quarantine_limt"))
    refused(repro(*(part.format(data=data, typo=typo) for part in arguments), "--json"), WRONG_USE, *words)


def test_a_snapshot_that_was_never_made_whole_cannot_be_reproduced(made: Prepared) -> None:
    refused(repro("reproduce", "-s", made.key, "--json"), FINDING, "was never made", f"run `repro materialize --snapshot {made.key}`")
    assert not list(made.graph.bench().lake.client.branches("scratch-", hidden=True))


def test_a_broken_variable_is_named(made: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPRO_CACHE_BYTES", "lots")
    refused(repro("snapshots", "--json"), WRONG_USE, "REPRO_CACHE_BYTES is 'lots'")


@pytest.mark.parametrize("variable", ["LAKECTL_SERVER_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_servers_that_nobody_runs_are_unreachable(made: Prepared, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    refused(repro("snapshots", "--json"), UNREACHABLE, "127.0.0.1:9")
    status = repro("status", "--json")
    assert status.code == UNREACHABLE
    assert sum(not row["healthy"] for row in status.json["servers"]) >= 1


# ---- the life of a snapshot


def test_from_files_to_a_verified_snapshot_in_json(made: Prepared, tmp_path: Path) -> None:
    """Each command's JSON keys are what scripts depend on."""
    raw = tmp_path / "some rows ä.jsonl"
    raw.write_bytes(jsonl(tickets(40, 500)))
    imported = repro("import", raw, "--to", "tickets/new", "-m", "forty", "--json")
    assert (imported.code, set(imported.json)) == (GOOD, {"key", "commit", "files", "size", "new"})
    key = imported.json["key"]
    rows = repro("snapshots", "--json").json["snapshots"]
    assert rows[0] == {"snapshot": key, "raw_commit": imported.json["commit"], "assets": 0, "decision": "", "release": None}
    assert [row["snapshot"] for row in rows] == [key, made.key]
    ran = repro("materialize", "-s", "newest", "--select", ",".join(DATA), "--json")
    refused(ran, WRONG_USE, "base_model", "repro materialize --select base_model,eval_suites")
    shared = repro("materialize", "--json")
    assert shared.code == GOOD
    assert [row["asset"] for row in shared.json["assets"]] == ["base_model", "eval_suites"]
    ran = repro("materialize", "-s", "newest", "--select", ",".join(DATA), "--json")
    assert ran.code == GOOD, ran
    assert set(ran.json) == {"runs", "assets"}
    assert set(ran.json["runs"][0]) == {"run_id", "success", "failed_checks", "warnings", "failure", "error"}
    assert [set(row) for row in ran.json["assets"]] == [{"asset", "data_version", "commit", "executed", "seconds"}] * 4
    again = repro("materialize", "-s", key, "--select", ",".join(DATA), "--json")
    assert [row["executed"] for row in again.json["assets"]] == [False] * 4
    shown = repro("show", "records", "--json")
    assert set(shown.json) == {"digest", "inputs", "section", "result", "observed", "made"}
    assert shown.json["digest"].startswith(ran.json["assets"][1]["data_version"])
    assert repro("why", "shards", "--json").json == {"asset": "shards", "snapshot": key, "differs": []}
    verified = repro("verify", "-s", key, "--deep", "--json")
    assert (verified.code, set(verified.json), verified.json["good"]) == (GOOD, {"good", "findings"}, True)
    assert set(verified.json["findings"][0]) == {"what", "good", "seen", "code"}
    assert repro("rebuild", "--json").json == {"keys": 1, "materializations": 0}  # the fixture's snapshot came without the command line
    assert repro("rebuild", "--json").json == {"keys": 0, "materializations": 0}
    assert repro("releases", "--json").json == {"releases": []}
    assert repro("doctor", "--json").json["good"]


def test_the_same_commands_speak_to_people(made: Prepared) -> None:
    for arguments, words in {
        ("snapshots",): "snapshot",
        ("doctor",): "ok   lakeFS",
        ("status",): "healthy",
        ("recipe", "show"): "max_tokens: 128",
        ("releases",): "nothing yet",
    }.items():
        answer = repro(*arguments)
        assert answer.code == GOOD, answer
        assert words in answer.out


def test_a_recipe_is_named_by_file_or_by_the_name_it_ships_under(made: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    assert repro("recipe", "show", "-r", "gsm8k", "--json").json["name"] == "gsm8k"
    assert repro("recipe", "show", "-r", str(made.recipe), "--json").json["name"] == "small"
    monkeypatch.setenv("REPRO_RECIPE", "demo")
    assert repro("recipe", "show", "--json").json["name"] == "demo"


def test_the_variables_it_prints_lead_a_shell_to_the_servers(made: Prepared) -> None:
    answer = repro("env")
    shell = subprocess.run(
        ["sh", "-c", f"{answer.out}\nprintf '%s' \"$LAKECTL_SERVER_ENDPOINT_URL\""], capture_output=True, text=True, check=True, env={}
    )
    assert shell.stdout == made.graph.connections.lakefs_endpoint
    hidden = repro("env", "--hide-secrets", "--json")
    assert made.graph.connections.lakefs_secret_key not in hidden.out
    assert repro("env", "--json").json == made.graph.connections.environment() | {
        "REPRO_HOME": str(made.graph.folder / "home"),
        "REPRO_CACHE": str(made.graph.folder / "home" / "cache"),
    }


def test_objects_staged_by_others_stop_import_and_materialize_until_they_are_committed(made: Prepared, tmp_path: Path) -> None:
    where = made.graph.connections
    (tmp_path / "x.jsonl").write_bytes(jsonl(tickets(2)))
    gateway(where).put_object(Bucket=where.repository, Key="raw/tickets/by-boto3.jsonl", Body=jsonl(tickets(30, 900)))
    refused(repro("import", tmp_path, "--json"), WRONG_USE, "tickets/by-boto3.jsonl", "repro commit-raw")
    refused(repro("materialize", "-s", made.key, "--select", "raw_snapshot", "--json"), WRONG_USE, "repro commit-raw")
    committed = repro("commit-raw", "-m", "by boto3", "--json")
    assert (committed.code, committed.json["files"]) == (GOOD, 1)
    assert repro("snapshots", "--json").json["snapshots"][0]["snapshot"] == committed.json["key"]
    assert repro("materialize", "-s", "newest", "--select", "raw_snapshot,records").code == GOOD


# ---- bad data and stale inputs, through a run


@pytest.mark.parametrize(
    ("files", "changes", "code", "words"),
    [
        ({"b.jsonl": jsonl(tickets(3)) + b'{"id": "half'}, {}, FINDING, ["b.jsonl:4", "quarantine"]),
        ({"b.jsonl": b"\xff\xfe\x00bad\n"}, {}, FINDING, ["b.jsonl:1", "UTF-8"]),
        ({"b.jsonl": b'{"id": "x", "text": "no messages"}\n'}, {}, FINDING, ["b.jsonl:1", "messages"]),
        ({"b.jsonl": b""}, {}, FINDING, ["b.jsonl", "no row"]),
        ({"b.jsonl": jsonl(tickets(40)) * 5}, {}, GOOD, []),
        ({}, {"text": RECIPE.replace("tickets/**", "nowhere/**")}, FINDING, ["nowhere"]),
    ],
    ids=["half a line", "not UTF-8", "no mapped field", "empty file", "duplicates everywhere", "empty snapshot"],
)
def test_bad_raw_data_stops_the_run_with_file_line_and_reason(
    made: Prepared, files: dict[str, bytes], changes: dict[str, Any], code: int, words: list[str], request: pytest.FixtureRequest
) -> None:
    folder = made.graph.folder / f"bad-{request.node.callspec.id}".replace(" ", "-")
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(jsonl(tickets(20, 300)))
    for name, data in files.items():
        (folder / name).write_bytes(data)
    name = folder.name.lower()[:40]
    recipe = made.graph.recipe("bad", changes.get("text", RECIPE).replace("tickets/**", f"{name}/**"), quarantine=0.001)
    key = repro("import", folder, "--to", name, "--json").json["key"]
    if not made.graph.bench().lake.client.exists("bad-is-prepared"):  # its shared assets serve every case
        assert repro("materialize", "-r", recipe).code == GOOD
        made.graph.bench().lake.client.ensure_branch("bad-is-prepared", "main")
    answer = repro("materialize", "-s", key, "--select", "raw_snapshot,records", "-r", recipe, "--json")
    refused(answer, code, *words)
    made_assets = {row["asset"] for row in answer.json["assets"]}
    assert ("records" in made_assets) is (code == GOOD)


def test_a_stale_input_and_a_missing_one_are_wrong_use(made: Prepared) -> None:
    stale = made.graph.recipe("stale")
    assert repro("materialize", "-r", stale).code == GOOD
    missing = repro("materialize", "-s", made.key, "--select", "shards", "-r", stale, "--json")
    refused(missing, WRONG_USE, "shards needs records", f"repro materialize --snapshot {made.key} --select records")
    assert missing.json["runs"][0]["error"] == "repro_assets.shelf.MissingDocument"
    assert repro("materialize", "-s", made.key, "--select", "raw_snapshot,records", "-r", stale).code == GOOD
    made.graph.recipe("stale", quarantine=0.5)
    refused(repro("materialize", "-s", made.key, "--select", "shards", "-r", stale, "--json"), WRONG_USE, "quarantine_limit 0.05 -> 0.5")


def test_a_missing_base_model_file_is_named(made: Prepared) -> None:
    (made.graph.folder / "empty-model").mkdir()
    recipe = made.graph.recipe("modelless", model=made.graph.folder / "empty-model")
    answer = repro("materialize", "--select", "base_model", "-r", recipe, "--json")
    refused(answer, FINDING, "empty-model")
    assert answer.json["assets"] == []


# ---- servers that go away in the middle of a run


def through(endpoint: str) -> tuple[Proxy, Callable[[], None]]:
    """A proxy that forwards until its second value is called; every connection breaks from then on."""
    proxy = Proxy(endpoint)
    down: list[bool] = []
    proxy.plan(0, lambda exchange: _drop(exchange) if down else exchange.answer(*exchange.forward()), 1_000_000)
    return proxy, lambda: down.append(True)


def _drop(exchange: Exchange) -> None:
    exchange.drop()


@pytest.mark.parametrize("variable", ["LAKECTL_SERVER_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_a_server_that_dies_in_the_middle_of_a_run_is_told_as_unreachable_and_leaves_nothing_half_done(
    made: Prepared, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    where = made.graph.connections
    name = "down-" + variable.split("_")[0].lower()
    recipe = made.graph.recipe(name, quarantine=0.06 + len(name) / 1000)  # a key of its own: nothing to recall
    assert repro("materialize", "-r", recipe).code == GOOD
    lake = made.graph.bench().lake.client
    proxy, goes_away = through(where.lakefs_endpoint if variable.startswith("LAKECTL") else str(where.s3_endpoint))
    real = build_records.build

    def build(*arguments: Any, **options: Any) -> Any:
        goes_away()
        return real(*arguments, **options)

    with contextlib.closing(proxy), monkeypatch.context() as patch:
        patch.setattr(build_records, "build", build)
        patch.setenv(variable, proxy.endpoint)
        patch.setenv("REPRO_CACHE_BYTES", "0")
        answer = repro("materialize", "-s", made.key, "--select", "raw_snapshot,records", "-r", recipe, "--json")
    assert answer.code == UNREACHABLE, answer
    assert "Traceback" not in answer.err
    assert proxy.endpoint.removeprefix("http://") in answer.err
    assert [row["asset"] for row in answer.json["assets"]] == ["raw_snapshot"]
    assert answer.json["runs"][0]["error"] == "resources.errors.Unavailable"
    place = f"snapshots/{made.key}/{name}/"
    there = {entry.path.removeprefix(place).split("/")[0] for entry in lake.list(lake.head(f"snapshot-{made.key}"), place)}
    assert there == {"raw_snapshot"}
    assert repro("materialize", "-s", made.key, "--select", "raw_snapshot,records", "-r", recipe).code == GOOD


def test_two_runs_of_one_snapshot_at_once_both_succeed_and_agree(made: Prepared) -> None:
    recipe = made.graph.recipe("twice", quarantine=0.09)
    assert repro("materialize", "-r", recipe).code == GOOD
    command = [
        sys.executable,
        "-m",
        "repro_assets",
        "materialize",
        "-s",
        made.key,
        "--select",
        "raw_snapshot,records",
        "-r",
        str(recipe),
        "--json",
    ]
    running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [process.communicate(timeout=180) for process in running]
    assert [process.returncode for process in running] == [GOOD, GOOD], answers
    versions = [[row["data_version"] for row in json.loads(out)["assets"]] for out, _err in answers]
    assert versions[0] == versions[1]
    assert repro("verify", "-s", made.key, "-r", recipe).code == GOOD


# ---- the embedded servers


def test_up_status_env_and_down_of_a_home_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "LAKECTL_SERVER_ENDPOINT_URL",
        "LAKECTL_CREDENTIALS_ACCESS_KEY_ID",
        "LAKECTL_CREDENTIALS_SECRET_ACCESS_KEY",
        "AWS_ENDPOINT_URL_S3",
    ):
        monkeypatch.delenv(name, raising=False)
    home = ("--home", tmp_path / "a home")
    refused(repro(*home, "env", "--json"), UNREACHABLE, "repro up")
    assert repro(*home, "status", "--json").code == UNREACHABLE
    assert repro(*home, "doctor", "--json").code == UNREACHABLE
    try:
        up = repro(*home, "up", "--json")
        assert (up.code, set(up.json)) == (GOOD, {"lakefs", "s3", "home"})
        status = repro(*home, "status", "--json")
        assert status.code == GOOD
        assert [(row["name"], row["endpoint"]) for row in status.json["servers"]] == [("s3", up.json["s3"]), ("lakefs", up.json["lakefs"])]
        assert repro(*home, "env", "--json").json["LAKECTL_SERVER_ENDPOINT_URL"] == up.json["lakefs"]
        assert repro(*home, "up", "--json").json == up.json
    finally:
        down = repro(*home, "down", "--json")
    assert down.json == {"stopped": ["lakefs", "s3"]}
    assert repro(*home, "down", "--json").json == {"stopped": []}
