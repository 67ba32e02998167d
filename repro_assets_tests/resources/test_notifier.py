"""Notices: files that show text and nothing else, and a webhook that goes to one checked address."""

import http.server
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from resources.notifier import (
    FileNotifier,
    Notice,
    NotifyError,
    WebhookNotifier,
    connect,
    escaped,
    plain,
)

NOTICE = Notice(
    kind="hold",
    title="snapshot 20260101-abc is held",
    text="gate `billing` regressed\n# not a heading",
    facts={"slice": "<script>alert(1)</script>", "loss": 0.25, "items": ["a|b", "@everyone"]},
    links={"run": "http://127.0.0.1:3000/runs/1", "trap": "javascript:alert(1)"},
)


class Receiver(http.server.ThreadingHTTPServer):
    """A webhook that keeps what it gets and answers as told."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.got: list[tuple[str, dict[str, Any]]] = []
        self.status, self.headers, self.drip = 200, dict[str, str](), 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hooks/1?key=secret"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Receiver

    def log_message(self, *arguments: Any) -> None:
        """Quiet."""

    def do_POST(self) -> None:
        self.server.got.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
        self.send_response(self.server.status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            for _ in range(100 if self.server.drip else 0):
                time.sleep(self.server.drip)
                self.wfile.write(b"x")
        except OSError:
            return


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    server = Receiver()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def private(url: str) -> dict[str, str]:
    return {"REPRO_NOTIFY": f"webhook:{url}", "REPRO_NOTIFY_PRIVATE": "1"}


def test_a_notice_becomes_a_page_for_people_and_json_for_programs(tmp_path: Path) -> None:
    where = Path(connect(tmp_path, {}).notify(NOTICE))
    assert where.parent == tmp_path / "notices"
    assert "-hold-" in where.name
    assert where.suffix == ".md"
    page = where.read_text()
    assert "# snapshot 20260101-abc is held" in page
    assert "| loss | 0.25 |" in page
    assert r"gate \`billing\` regressed" in page
    assert "\n\\# not a heading" in page
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert r'["a\|b","@everyone"]' in page.replace(r"\[", "[").replace(r"\]", "]")
    assert "- run: <http://127.0.0.1:3000/runs/1>" in page
    assert "- trap: javascript:alert(1)" in page
    record = json.loads(where.with_suffix(".json").read_text())
    assert record.pop("at").endswith("+00:00")
    assert record == {
        "kind": "hold",
        "title": NOTICE.title,
        "text": NOTICE.text,
        "facts": NOTICE.facts,
        "links": NOTICE.links,
    }
    assert len(list(where.parent.iterdir())) == 2, "no half-written file stays"


def test_two_notices_in_one_second_are_two_files(tmp_path: Path) -> None:
    notifier = FileNotifier(tmp_path)
    assert len({notifier.notify(NOTICE) for _ in range(20)}) == 20


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("[x](http://evil)", r"\[x\](http://evil)"),
        ("**bold** _it_", r"\*\*bold\*\* \_it\_"),
        ("- item", r"\- item"),
        ("1. item", r"1\. item"),
        ("a\nb\x1b[31mc", r"a b \[31mc"),
        ("![](http://evil/x.png)", r"!\[\](http://evil/x.png)"),
        ("0.85 - fine", "0.85 - fine"),
    ],
)
def test_markdown_in_a_notice_is_shown_and_not_obeyed(text: str, shown: str) -> None:
    assert escaped(text) == shown


def test_a_chat_message_calls_nobody() -> None:
    text = plain(Notice(kind="hold", title="<!channel> @everyone", text="x" * 10_000))
    assert "<!channel>" not in text
    assert "&lt;!channel&gt;" in text
    assert "@everyone" not in text
    assert len(text) < 4100


def test_a_folder_that_cannot_be_written_says_what_to_set(tmp_path: Path) -> None:
    (tmp_path / "notices").write_text("a file")
    with pytest.raises(NotifyError, match="set REPRO_NOTIFY=file:PATH to a folder that can be written"):
        connect(tmp_path, {}).notify(NOTICE)
    elsewhere = connect(tmp_path, {"REPRO_NOTIFY": f"file:{tmp_path / 'other'}"}).notify(NOTICE)
    assert Path(elsewhere).parent == tmp_path / "other"


def test_a_webhook_gets_the_notice_and_a_file_keeps_it(tmp_path: Path, receiver: Receiver) -> None:
    where = connect(tmp_path, private(receiver.url)).notify(NOTICE)
    ((path, body),) = receiver.got
    assert path == "/hooks/1?key=secret"
    assert body["notice"]["facts"]["loss"] == 0.25
    assert "snapshot 20260101-abc is held" in body["text"]
    assert Path(where).exists()


def test_a_notice_too_large_for_a_webhook_is_sent_without_its_facts(tmp_path: Path, receiver: Receiver) -> None:
    connect(tmp_path, private(receiver.url)).notify(Notice(kind="hold", title="t", facts={"table": "y" * 300_000}))
    assert receiver.got[0][1]["notice"] == {"kind": "hold", "truncated": True}


@pytest.mark.parametrize(
    ("status", "headers", "said"), [(302, {"Location": "http://169.254.169.254/"}, "redirects are not followed"), (500, {}, "HTTP 500")]
)
def test_an_answer_other_than_yes_is_an_error_that_names_the_file(
    tmp_path: Path, receiver: Receiver, status: int, headers: dict[str, str], said: str
) -> None:
    receiver.status, receiver.headers = status, headers
    with pytest.raises(NotifyError, match=said) as caught:
        connect(tmp_path, private(receiver.url)).notify(NOTICE)
    kept = str(caught.value).rsplit(" ", 1)[1]
    assert Path(kept).exists()
    assert len(receiver.got) == 1
    assert "secret" not in str(caught.value)


def test_a_receiver_that_drips_is_not_waited_for(tmp_path: Path, receiver: Receiver) -> None:
    receiver.drip = 0.1
    notifier = WebhookNotifier(receiver.url, FileNotifier(tmp_path), frozenset({"127.0.0.1"}), private=True, seconds=0.5)
    began = time.monotonic()
    notifier.notify(NOTICE)
    assert time.monotonic() - began < 3


def test_a_private_address_is_refused_before_anything_is_sent(tmp_path: Path, receiver: Receiver) -> None:
    url = f"https://localhost:{receiver.server_port}/x"
    with pytest.raises(NotifyError, match=r"localhost leads to .*inside a private network; set REPRO_NOTIFY_PRIVATE=1") as caught:
        connect(tmp_path, {"REPRO_NOTIFY": f"webhook:{url}"}).notify(NOTICE)
    assert receiver.got == []
    assert "it is kept in" in str(caught.value)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"REPRO_NOTIFY": "mail:a@b"}, "must be file:PATH or webhook:URL"),
        ({"REPRO_NOTIFY": "webhook:"}, "must be file:PATH or webhook:URL"),
        ({"REPRO_NOTIFY": "webhook:http://hooks.example.com/1"}, "plain http would send notices readable by others"),
        ({"REPRO_NOTIFY": "webhook:ftp://hooks.example.com/1"}, "a webhook is https://host/path"),
        ({"REPRO_NOTIFY": "webhook:https://user:pw@hooks.example.com/1"}, "without user name"),
        ({"REPRO_NOTIFY": "webhook:https://hooks.example.com:99999/1"}, "Port out of range"),
        ({"REPRO_NOTIFY": "webhook:https://hooks.example.com/1", "REPRO_NOTIFY_HOSTS": "other.example.com"}, "not in REPRO_NOTIFY_HOSTS"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_at_once(tmp_path: Path, values: dict[str, str], said: str) -> None:
    with pytest.raises(NotifyError, match=said):
        connect(tmp_path, values)
