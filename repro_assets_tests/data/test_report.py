"""The HTML page of a validation report: one file that needs nothing, gives nothing away and comes out the same."""

import re
from html.parser import HTMLParser
from typing import Any

import pytest

from repro_assets.data import frame, report
from repro_assets.data.lines import Message

EVIL = "<script>alert('x')</script>&\"' onload="


def said(text: str = "refund", **changed: Any) -> dict[str, Any]:
    """A report with every part in it; `text` stands wherever text of the data can."""
    rule = {"group": "records", "name": "blank_turns", "verdict": "warn", "effect": 1.0, "limit": 0, "detail": f"seen: {text}"}
    return {
        "verdict": "fail",
        "rules": [
            rule,
            {"group": "totals", "name": "totals", "verdict": "pass", "effect": 0.0, "limit": 0, "detail": "leaves hold what is said"},
            {"group": "sample", "name": text, "verdict": "none", "effect": None, "limit": 0.01, "detail": "nothing drawn"},
            {
                "group": "drift",
                "name": "drift lengths psi",
                "verdict": "fail",
                "effect": 0.31234567,
                "limit": 0.25,
                "detail": "the same bins",
            },
            {"group": "expectations", "name": "expectation x", "verdict": "pass", "effect": None, "limit": None, "detail": text},
        ],
        "failing": {
            f"rule {text}": [
                {
                    "record": "ab" * 32,
                    "split": "train",
                    "tokens": 12,
                    "trained": 3,
                    "cut": 0,
                    "characters": 40,
                    "turns": 2,
                    "labels": {f"slice {text}": text},
                    "shape": text,
                },
                {"record": "cd" * 32},
            ]
        },
        "differences": [{"record": "ab" * 32, "where": f"{text}.jsonl:7", "what": text}],
        "distributions": {
            "now": {
                "lengths": {"8": 10, "16": 30},
                f"slice {text}": {text: 5, **{f"value {n}": 1 for n in range(20)}},
                "trained_tokens": {"trained": 9, "untrained": 1},
            },
            "reference": {"lengths": {"16": 20, "32": 20}},
        },
        "histograms": {"turns": {"2": 40}, "languages": {"en": 39, text: 1}},
        "facts": {
            "files": 2,
            "manifest": "ef" * 32,
            "records": {"train": 38, "validation": 2},
            "tokens": {"train": 1234567, "validation": 10},
            "trained": {"train": 700000, "validation": 5},
            "leaves": 3,
            "rows_read": 44,
            "set_aside": {text: 4},
            "engine": f"tokenizers {text}",
            "tokenizer": "12" * 32,
            "template": "34" * 32,
            "architecture": text,
            "rebuilt": [39, 40],
        },
        **changed,
    }


class Reader(HTMLParser):
    """Every tag with its attributes, and whether tags are closed in order."""

    VOID = ("meta", "rect", "line", "i", "p")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_text_of_the_data_is_never_markup() -> None:
    """S1.11: a report is opened by people; what users wrote must not run there."""
    page = report.page(said(EVIL)).decode()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    plain, evil = (Reader(report.page(said(text)).decode()) for text in ("refund", EVIL))
    assert [tag for tag, _attributes in evil.tags] == [tag for tag, _attributes in plain.tags]
    assert not [name for _tag, attributes in evil.tags for name in attributes if name.startswith("on")]
    assert sum(EVIL in text for text in evil.texts) > 8


def test_the_page_is_whole_and_needs_no_network() -> None:
    page = report.page(said()).decode()
    reader = Reader(page)
    assert reader.open == []
    assert not re.search(r"https?:|//|url\(|@import|src=|href=", page)
    assert not {"script", "link", "img", "iframe", "object", "form"} & {tag for tag, _attributes in reader.tags}
    policy = next(attributes["content"] for tag, attributes in reader.tags if attributes.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_the_page_is_the_same_bytes_for_the_same_report() -> None:
    """S0.4: no clock, and no order but that of the report."""
    assert report.page(said()) == report.page(said())
    numbers = re.findall(r'\s(?:x|y|width|height|x1|x2|y1|y2)="([^"]*)"', report.page(said()).decode())
    assert numbers
    assert all(re.fullmatch(r"\d+", number) for number in numbers)


def test_verdicts_effects_and_counts_are_on_the_page() -> None:
    page = report.page(said()).decode()
    for shown in ("0.3123", "1\u202f234\u202f577", "39 of 40", "5 rules: 1 fail, 1 warn, 2 pass, 1 none", "What needs a look", "9 more"):
        assert shown in page, shown


@pytest.mark.parametrize("rules", [[], [{"group": "totals", "name": "totals", "verdict": "pass", "effect": 0, "limit": 0, "detail": ""}]])
def test_a_report_without_anything_to_show_is_a_page_too(rules: list[Any]) -> None:
    empty = said(verdict="pass", rules=rules, failing={}, differences=[], histograms={}, distributions={"now": {}, "reference": None})
    empty["facts"] = {**empty["facts"], "tokens": {}, "trained": {}, "records": {}, "set_aside": {}}
    page = report.page(empty).decode()
    assert "What needs a look" not in page
    assert "Records that fail" not in page


def test_the_shape_of_a_text_says_nothing_of_what_it_says() -> None:
    """S1.11: samples of failing rows without personal data."""
    messages = [
        Message(content="Call me at +49 170 1234567, Jürgen <j.m@example.org>\u202e", role="user"),
        Message(content="", role="assistant"),
    ]
    shown = frame.shape(messages)
    assert shown == "user: xxxx xx xx +99 999 9999999, xxxxxx <x.x@xxxxxxx.xxx>· ‖ assistant: "
    assert not re.search(r"[a-wyzA-Z0-8]", shown.replace("user", "").replace("assistant", ""))
    assert frame.shape([Message(content="x" * 100, role="user")] * 6).endswith("… ‖ … 2 more turns")
