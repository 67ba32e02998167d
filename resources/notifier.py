"""Telling people: a notice becomes a file, and where REPRO_NOTIFY says so a POST to a webhook too. What is worth one is decided elsewhere.

A notice carries text from data that nobody vouches for, so it is escaped; a webhook's address is configuration, never data.
"""

import html
import http.client
import ipaddress
import os
import re
import secrets
import socket
import ssl
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

import msgspec

BODY_LIMIT: Final = 256 * 1024
ANSWER_LIMIT: Final = 64 * 1024
SECONDS: Final = 10.0
TEXT_LIMIT: Final = 4000


class NotifyError(Exception):
    """A notice that did not arrive, or a setting that cannot be; the message says why, what to change and where the notice lies."""


class Notice(msgspec.Struct, frozen=True, kw_only=True):
    """One event. `kind`: a short name (`hold`, `rollback`, `run_failed`). `facts`: JSON values by name; `links`: label to URL."""

    kind: str
    title: str
    text: str = ""
    facts: dict[str, Any] = {}
    links: dict[str, str] = {}


class Notifier(Protocol):
    """Somewhere a notice goes. Returns where it can be found; raises NotifyError."""

    def notify(self, notice: Notice) -> str: ...


class FileNotifier:
    """Two files a notice, `<time>-<kind>-<random>.md` for people and `.json` for programs, in `folder`. Returns the path of the first."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder).absolute()

    def notify(self, notice: Notice) -> str:
        """Writes both files whole or not at all."""
        now = datetime.now(UTC)
        stem = f"{now:%Y%m%dT%H%M%S}-{re.sub(r'[^a-z0-9]+', '-', notice.kind.lower()).strip('-') or 'notice'}-{secrets.token_hex(3)}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{stem}.md"
            stamped = {"at": now.isoformat(timespec="seconds"), **msgspec.to_builtins(notice)}
            _write(self.folder / f"{stem}.json", msgspec.json.format(msgspec.json.encode(stamped), indent=2) + b"\n")
            _write(path, markdown(notice, now).encode("utf-8", "replace"))
        except OSError as error:
            raise NotifyError(
                f"no notice in {self.folder}: {error}; free space or set REPRO_NOTIFY=file:PATH to a folder that can be written"
            ) from error
        return str(path)


class WebhookNotifier:
    """POSTs `{"text": ..., "notice": {...}}` to one address, after the notice is in a file, so that nothing is lost with the network.

    Only hosts of `hosts` are spoken to, redirects are not followed, and an address inside a private network (or plain http) is
    refused unless `private`. The connection goes to the address that was checked.
    """

    def __init__(self, url: str, files: FileNotifier, hosts: frozenset[str], private: bool = False, seconds: float = SECONDS) -> None:
        self.files, self.private, self.seconds = files, private, seconds
        parts = urlsplit(url)
        self.host, self.secure = (parts.hostname or "").lower(), parts.scheme == "https"
        try:
            self.port = parts.port or (443 if self.secure else 80)
        except ValueError as error:
            raise NotifyError(f"REPRO_NOTIFY: {error}") from None
        self.path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if parts.scheme not in ("https", "http") or not self.host or parts.username or parts.fragment:
            raise NotifyError("REPRO_NOTIFY: a webhook is https://host/path without user name or fragment")
        if not self.secure and not private:
            raise NotifyError(
                "REPRO_NOTIFY: plain http would send notices readable by others; use https, or REPRO_NOTIFY_PRIVATE=1 in your own network"
            )
        if self.host not in hosts:
            raise NotifyError(
                f"REPRO_NOTIFY: host {self.host} is not in REPRO_NOTIFY_HOSTS ({', '.join(sorted(hosts)) or 'empty'}); add it there"
            )

    def notify(self, notice: Notice) -> str:
        """Where the file lies, once the webhook has answered 2xx. Raises NotifyError, naming the file, when it did not."""
        kept = self.files.notify(notice)
        body = msgspec.json.encode({"text": plain(notice), "notice": msgspec.to_builtins(notice)})
        if len(body) > BODY_LIMIT:
            body = msgspec.json.encode({"text": plain(notice), "notice": {"kind": notice.kind, "truncated": True}})
        try:
            status = self._post(body)
        except (OSError, http.client.HTTPException) as error:
            raise NotifyError(f"the webhook at {self.host} did not take the notice: {error}; it is kept in {kept}") from error
        if not 200 <= status < 300:
            said = "redirects are not followed" if 300 <= status < 400 else "look at the receiver"
            raise NotifyError(f"the webhook at {self.host} answered HTTP {status} ({said}); the notice is kept in {kept}")
        return kept

    def _post(self, body: bytes) -> int:
        until = time.monotonic() + self.seconds
        connection = http.client.HTTPConnection(self.host, self.port, timeout=self.seconds)
        plain_socket = socket.create_connection((self._address(), self.port), timeout=self.seconds)
        try:
            connection.sock = plain_socket
            if self.secure:
                connection.sock = ssl.create_default_context().wrap_socket(plain_socket, server_hostname=self.host)
            connection.request("POST", self.path, body, {"Content-Type": "application/json", "User-Agent": "repro-assets"})
            # Each read has the rest of the time: a receiver that sends a byte a second must not hold a run.
            connection.sock.settimeout(max(0.1, until - time.monotonic()))
            answer = connection.getresponse()
            taken = 0
            while taken < ANSWER_LIMIT and time.monotonic() < until and (part := answer.read1(4096)):
                taken += len(part)
            return answer.status
        finally:
            connection.close()
            plain_socket.close()

    def _address(self) -> str:
        found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        addresses = [str(entry[4][0]) for entry in found]
        inside = [address for address in addresses if not ipaddress.ip_address(address.split("%")[0]).is_global]
        if inside and not self.private:
            raise OSError(f"{self.host} leads to {inside[0]}, inside a private network; set REPRO_NOTIFY_PRIVATE=1 if that is meant")
        return addresses[0]


def connect(home: Path, environ: Mapping[str, str] | None = None) -> Notifier:
    """The notifier that REPRO_NOTIFY names: `file:PATH` or `webhook:URL`; without it, files under `<home>/notices`.

    REPRO_NOTIFY_HOSTS: hosts that a webhook may have, by comma; unset, the one in the URL. Raises NotifyError for anything else.
    """
    values = os.environ if environ is None else environ
    chosen = values.get("REPRO_NOTIFY") or f"file:{Path(home) / 'notices'}"
    kind, _, rest = chosen.partition(":")
    if kind == "file" and rest:
        return FileNotifier(Path(rest).expanduser())
    if kind == "webhook" and rest:
        listed = values.get("REPRO_NOTIFY_HOSTS") or urlsplit(rest).hostname or ""
        hosts = frozenset(host.strip().lower() for host in listed.split(",") if host.strip())
        return WebhookNotifier(rest, FileNotifier(Path(home) / "notices"), hosts, values.get("REPRO_NOTIFY_PRIVATE") == "1")
    # The value itself may hold a webhook's secret and is not shown.
    raise NotifyError(f"REPRO_NOTIFY starts with {kind!r}: it must be file:PATH or webhook:URL")


def markdown(notice: Notice, at: datetime) -> str:
    """The notice as a page; every value is shown as text, whatever it contains."""
    lines = [f"# {escaped(notice.title)}", "", f"{escaped(notice.kind)}, {at:%Y-%m-%d %H:%M:%S} UTC", ""]
    if notice.text:
        lines += [*(escaped(line) for line in notice.text.splitlines()), ""]
    if notice.facts:
        lines += [
            "| fact | value |",
            "|---|---|",
            *(f"| {escaped(str(name))} | {escaped(_shown(value))} |" for name, value in notice.facts.items()),
            "",
        ]
    lines += [f"- {escaped(label)}: {_link(url)}" for label, url in notice.links.items()]
    return "\n".join(lines).rstrip() + "\n"


def plain(notice: Notice) -> str:
    """The notice for a chat window: `&`, `<` and `>` escaped as chat programs ask, so that no text in it can call a channel or person."""
    lines = [notice.title, notice.text, *(f"{name}: {_shown(value)}" for name, value in notice.facts.items())]
    lines += [f"{label}: {url}" for label, url in notice.links.items()]
    text = "\n".join(_printable(line, keep="\n") for line in lines if line).replace("@", "@\u200b")
    return html.escape(text[:TEXT_LIMIT], quote=False)


def escaped(text: str) -> str:
    """One line of markdown that shows `text` and does nothing else: no markup, HTML, link, list or heading comes out of it."""
    shown = re.sub(r"([\\`*_\[\]|~])", r"\\\1", html.escape(_printable(text), quote=False))
    return re.sub(r"^(\s*)([#=]|[+-](?=\s|$)|\d+[.)](?=\s|$)|-(?=-))", lambda found: f"{found[1]}{found[2][:-1]}\\{found[2][-1]}", shown)


def _printable(text: str, keep: str = "") -> str:
    return "".join(char if char in keep or char.isprintable() else " " for char in text)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _link(url: str) -> str:
    if re.fullmatch(r"https?://[^\s<>()\[\]\"'`\\]+", url):
        return f"<{url}>"
    return escaped(url)


def _write(path: Path, data: bytes) -> None:
    scratch = path.with_name(f".{path.name}.part")
    scratch.write_bytes(data)
    os.replace(scratch, path)
