"""The validation report in the graph: the page in lakeFS and its link, the suite in the memo key, the reference of a later snapshot."""

import json
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import pytest

from repro_assets import promoting
from repro_assets.shelf import folder
from repro_assets_tests.graph import RECIPE, Graph, jsonl, tickets

DATA = ("raw_snapshot", "records", "shards", "validation_report")


def made(graph: Graph, recipe: Path | None = None, rows: int = 60, start: int = 0) -> str:
    """A snapshot of tickets with its report."""
    assert graph.run(None, recipe=recipe).success
    key = graph.import_({f"{start}.jsonl": jsonl(tickets(rows, start))})
    ran = graph.run(key, DATA, recipe)
    assert ran.success, ran.failure
    return key


def test_the_page_lies_in_lakefs_and_the_asset_page_links_to_it(graph: Graph) -> None:
    """S0.56: one HTML page, with the JSON it is made from beside it."""
    key = made(graph)
    told = graph.run(key, ("validation_report",)).assets["validation_report"]
    document = graph.document(key, "validation_report").result
    lake = graph.bench().lake.client
    place = folder(key, "small", "validation_report")
    listed = {entry.path.removeprefix(f"{place}/"): entry for entry in lake.list(graph.head(key), place)}
    assert {"report.html", "report.json", "words.bin"} <= listed.keys()
    assert listed["report.html"].content_type == "text/html; charset=utf-8"
    link = urlparse(told["report"])
    asked = parse_qs(link.query)
    with lake.open(asked["ref"][0], asked["path"][0]) as stream:
        page = stream.read()
    assert page.startswith(b"<!doctype html>")
    assert page == graph.bench().blobs.store.get_bytes(document.page.sha256)
    assert {rule.verdict for rule in document.rules} == {"pass", "none"}


def test_a_changed_suite_is_another_key_and_a_failed_one_is_in_the_report(graph: Graph) -> None:
    text = RECIPE.replace("reproduce: 50,", "expectations: suite.json, reproduce: 50,")
    recipe = graph.recipe("expected", text)

    def expect(most: int) -> None:
        one = {"type": "expect_column_values_to_be_between", "kwargs": {"column": "turns", "max_value": most}}
        (graph.folder / "suite.json").write_text(json.dumps({"name": "ours", "expectations": [one]}))

    expect(2)
    key = made(graph, recipe)
    assert graph.document(key, "validation_report", "expected").result.verdict == "pass"
    assert graph.run(key, ("validation_report",), recipe).assets["validation_report"]["executed"].startswith("no")
    expect(1)
    graph.run(key, ("validation_report",), recipe)
    report = graph.document(key, "validation_report", "expected").result
    assert [(rule.name, rule.effect) for rule in report.rules if rule.verdict == "fail"] == [
        ("expectation column_values_to_be_between turns", 60)
    ]


def test_a_later_snapshot_is_compared_with_the_report_of_the_release(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    """S1.10: the reference's own leaves are not read again; its report holds what is compared."""
    first = made(graph)
    before = graph.document(first, "validation_report")
    # the release itself is test_whole's; here only which report it names
    monkeypatch.setattr(promoting, "released", lambda _stage, asset: before.digest if asset == "validation_report" else None)
    later = made(graph, rows=30, start=60)
    document = graph.document(later, "validation_report")
    assert document.inputs["drift_reference"] == before.digest
    found = {rule.name: rule.verdict for rule in document.result.rules if rule.group == "drift"}
    assert found["drift slice intent psi"] == "pass"
    assert found["drift words auc"] == "none"  # 60 and 90 records are too few to tell
    monkeypatch.setattr(promoting, "released", lambda _stage, asset: graph.document(first, "shards").digest)
    other = made(graph, rows=5, start=90)
    said = {rule.detail for rule in graph.document(other, "validation_report").result.rules if rule.group == "drift"}
    assert said == {"no reference: the report of the release in force has another form; the next release has this one"}
