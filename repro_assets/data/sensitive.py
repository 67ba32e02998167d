"""Secrets and personal data in the texts of one record: found by pattern, counted, masked or asked to be dropped. Never shown.

Secrets are what detect-secrets' plugins describe; personal data are in `personal.py`. Listing and dropping records is `records.py`.
"""

import pkgutil
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any, Literal

import msgspec

from repro_assets.data.cleaning import rewritten
from repro_assets.data.lines import Message
from repro_assets.data.personal import Span, merged, personal_spans

Action = Literal["off", "flag", "mask", "drop"]

# Plugin of detect-secrets -> (kind, literals of which a text holds one, in lower case, wherever the plugin finds something). Left out: the
# entropy and keyword plugins, which call every digest and every `password = x` of a tutorial a secret; public addresses (personal data).
PLUGINS: dict[str, tuple[str, tuple[str, ...]]] = {
    "ArtifactoryDetector": ("artifactory", ("akc",)),
    "AWSKeyDetector": ("aws_key", ("akia", "asia", "abia", "acca", "a3t", "aws")),
    "AzureStorageKeyDetector": ("azure_storage_key", ("accountkey=",)),
    "BasicAuthDetector": ("basic_auth", ("://",)),
    "CloudantDetector": ("cloudant", ("cl",)),
    "DiscordBotTokenDetector": ("discord_token", (".",)),
    "GitHubTokenDetector": ("github_token", ("ghp_", "gho_", "ghu_", "ghs_", "ghr_")),
    "GitLabTokenDetector": ("gitlab_token", ("gl", "gr1348941")),
    "IbmCloudIamDetector": ("ibm_cloud_key", ("key", "pwd", "pass", "token")),
    "IbmCosHmacDetector": ("ibm_cos_key", ("secret",)),
    "JwtTokenDetector": ("json_web_token", ("eyj",)),
    "MailchimpDetector": ("mailchimp_key", ("-us",)),
    "NpmDetector": ("npm_token", ("_authtoken=",)),
    "OpenAIDetector": ("openai_key", ("t3blbkfj",)),
    "PrivateKeyDetector": ("private_key", ("private key", "putty-user-key")),
    "PypiTokenDetector": ("pypi_token", ("pypi-",)),
    "SendGridDetector": ("sendgrid_key", ("sg.",)),
    "SlackDetector": ("slack_token", ("xox", "hooks.slack.com")),
    "SoftlayerDetector": ("softlayer_key", ("sl", "softlayer")),
    "SquareOAuthDetector": ("square_secret", ("sq0csp-",)),
    "StripeDetector": ("stripe_key", ("k_live_",)),
    "TelegramBotTokenDetector": ("telegram_token", (":",)),
    "TwilioKeyDetector": ("twilio_key", ("ac", "sk")),
}
#: modules of detect_secrets.plugins that hold the classes above
_MODULES = (
    "artifactory",
    "aws",
    "azure_storage_key",
    "basic_auth",
    "cloudant",
    "discord",
    "github_token",
    "gitlab_token",
    "ibm_cloud_iam",
    "ibm_cos_hmac",
    "jwt",
    "mailchimp",
    "npm",
    "openai",
    "private_key",
    "pypi_token",
    "sendgrid",
    "slack",
    "softlayer",
    "square_oauth",
    "stripe",
    "telegram_token",
    "twilio",
)

# What detect-secrets 1.5 does not know and training data is full of.
OWN: dict[str, tuple[re.Pattern[str], tuple[str, ...]]] = {
    "anthropic_key": (re.compile(r"sk-ant-[A-Za-z0-9_-]{20,}"), ("sk-ant-",)),
    "github_token": (re.compile(r"github_pat_[A-Za-z0-9_]{22,}"), ("github_pat_",)),
    "google_key": (re.compile(r"AIza[A-Za-z0-9_-]{35}"), ("aiza",)),
    "huggingface_token": (re.compile(r"hf_[A-Za-z0-9]{30,}"), ("hf_",)),
    "openai_key": (re.compile(r"sk-(?:proj|svcacct|admin)-[A-Za-z0-9_-]{20,}"), ("sk-proj-", "sk-svcacct-", "sk-admin-")),
    "private_key": (re.compile(r"BEGIN ENCRYPTED PRIVATE KEY"), ("encrypted private key",)),
}

# A plugin whose first group is the value beside words that may stay; elsewhere the whole match is the value.
_VALUE_IN_GROUP = {"basic_auth", "aws_key", "cloudant", "ibm_cloud_key", "ibm_cos_key", "npm_token", "softlayer_key"}
# Second Artifactory pattern: any capitals that begin with APA..APF, such as APARTMENTBUILDING.
_PATTERNS = {"artifactory": 1}

# Where a plugin looks, and how many characters before: their patterns repeat blanks and wild cards side by side, which on hostile text (a
# key word before thousands of spaces) takes the cube of its length. With a window the cost is linear in the text.
_ASSIGNED = re.compile(r"(?<![A-Za-z0-9_-])[A-Za-z0-9_-]{24,}")
_WINDOWS: dict[str, tuple[re.Pattern[str], int]] = {
    "cloudant": (_ASSIGNED, 96),
    "ibm_cloud_key": (_ASSIGNED, 96),
    "ibm_cos_key": (_ASSIGNED, 96),
    "softlayer_key": (_ASSIGNED, 96),
    "openai_key": (re.compile("T3BlbkFJ[A-Za-z0-9]{20}"), 200),
    "npm_token": (re.compile(r":_authToken=\s{0,9}[A-Za-z0-9_-]+"), 200),
    # every run of token characters that a dot and another run follow; its first `eyJ` is where a token begins
    "json_web_token": (re.compile(r"(?<![A-Za-z0-9=_-])[A-Za-z0-9=_-]++(?=\.[A-Za-z0-9=_-])"), 0),
}

_SHORT = ("://", "private key", "putty-user-key", "akc", "xox", "_authtoken=", "eyj")
_TOKEN = bytes(97 if chr(code).isalnum() or chr(code) in "_-+/=." else 32 for code in range(128)) + b" " * 128
_WORD = bytes(97 if chr(code).isalnum() or chr(code) in "_-" else 32 for code in range(128)) + b" " * 128
_RUN, _LONG = b"a" * 20, b"a" * 24
# kinds whose literals are common, and whose values have 24 letters, digits, `_` or `-` on end
_LONG_KINDS = {"cloudant", "discord_token", "gitlab_token", "ibm_cloud_key", "ibm_cos_key", "mailchimp_key", "softlayer_key"} | {
    "telegram_token",
    "twilio_key",
}
_TAIL = re.compile(r"[A-Za-z0-9_-]*")
_JWT_TAIL = re.compile(r"[A-Za-z0-9_.+/=-]*")
_PEM_END = re.compile(r"-----END [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----|Private-MAC: *[0-9A-Fa-f]+")
_PEM_LINES = re.compile(r"-*[ \t]*(?:\r?\n(?:[A-Za-z0-9+/=]{32,}|[A-Za-z0-9+/=]{16,}[ \t]*(?=\r?\n|\Z)))*")
_PEM_LIMIT = 1 << 16


class Found(msgspec.Struct, frozen=True):
    """What `Finder.find` says: the messages, masked where the recipe asks for it; `counts` by kind, such as {"personal.email": 2}, sorted;
    whether the record is to be dropped."""

    messages: tuple[Message, ...]
    counts: dict[str, int]
    drop: bool


class Finder:
    """Looks for secrets and personal data, each `off`, `flag`, `mask` or `drop`. No value it finds is in a result, an error or a log."""

    def __init__(self, secrets: Action = "off", personal: Action = "off") -> None:
        self.secrets, self.personal = secrets, personal
        self.actions: dict[str, Action] = {"secret": secrets, "personal": personal}

    def find(self, messages: tuple[Message, ...]) -> Found:
        """Contents, names and the strings of tool calls are searched. The messages themselves come back when nothing is masked.

        A mask is `[secret:aws_key]` or `[personal:email]`; text outside masks stays as it is, and in a masked record nothing is found again.
        """
        counts: Counter[str] = Counter()
        changed = tuple(self._message(message, counts) for message in messages)
        if not counts:
            return Found(messages, {}, False)
        drop = any(self.actions[kind.split(".")[0]] == "drop" for kind in counts)
        return Found(changed, dict(sorted(counts.items())), drop)

    def _message(self, message: Message, counts: Counter[str]) -> Message:
        return rewritten(message, self._text(message.content, counts), lambda text: self._text(text, counts))

    def _text(self, text: str, counts: Counter[str]) -> str:
        spans = self.spans(text)
        counts.update(f"{span.family}.{span.kind}" for span in spans)
        while masks := [span for span in spans if self.actions[span.family] == "mask"]:
            text = _masked(text, masks)
            # what a mask now stands beside may have become visible: `,` after `@` was no address before. Every round shortens what is
            # left of the text itself, since no pattern finds anything in a mask.
            spans = self.spans(text)
            counts.update(f"{span.family}.{span.kind}" for span in spans if self.actions[span.family] == "mask")
        return text

    def spans(self, text: str) -> list[Span]:
        """Where something is, in order, without overlaps; a secret wins over personal data."""
        secrets = secret_spans(text) if self.secrets != "off" else []
        personal = personal_spans(text) if self.personal != "off" else []
        if secrets and personal:
            personal = [span for span in personal if not any(span.start < other.end and other.start < span.end for other in secrets)]
        return sorted([*secrets, *personal])


def _masked(text: str, spans: Iterable[Span]) -> str:
    parts, at = [], 0
    for span in spans:
        parts += [text[at : span.start], f"[{span.family}:{span.kind}]"]
        at = span.end
    return "".join([*parts, text[at:]])


# ---- secrets


class _Detector(msgspec.Struct, frozen=True):
    kind: str
    anchors: tuple[str, ...]
    patterns: tuple[Any, ...]
    valid: Callable[[str], bool] | None
    window: tuple[re.Pattern[str], int] | None


@lru_cache(maxsize=1)
def _detectors() -> tuple[_Detector, ...]:
    """Patterns of detect-secrets' plugins. Only these are used: nothing is verified over the network and no setting of its own is read."""
    found: dict[str, Any] = {}
    for module in _MODULES:
        found |= vars(pkgutil.resolve_name(f"detect_secrets.plugins.{module}"))
    made = []
    for name, (kind, anchors) in PLUGINS.items():
        plugin = found[name]
        patterns = tuple(plugin.denylist)[: _PATTERNS.get(kind)]
        made.append(_Detector(kind, anchors, patterns, getattr(plugin, "is_formally_valid", None), _WINDOWS.get(kind)))
    return (*made, *(_Detector(kind, anchors, (pattern,), None, None) for kind, (pattern, anchors) in OWN.items()))


def secret_spans(text: str) -> list[Span]:
    """Spans of secrets, in order, merged where they overlap."""
    lower = text.lower()
    if not _suspicious(text, lower):
        return []
    spans = []
    long = _LONG in text.encode("utf-8", "surrogatepass").translate(_WORD)
    for detector in _detectors():
        if (detector.kind in _LONG_KINDS and not long) or not any(anchor in lower for anchor in detector.anchors):
            continue
        for pattern in detector.patterns:
            for match in _matches(detector, pattern, text):
                if detector.valid is None or detector.valid(match.group()):
                    spans.append(_span(text, match, detector.kind))
    return merged(spans) if spans else []


def _matches(detector: _Detector, pattern: re.Pattern[str], text: str) -> Iterator[re.Match[str]]:
    if detector.window is None:
        yield from pattern.finditer(text)
        return
    anchor, before = detector.window
    for hit in anchor.finditer(text):
        if detector.kind == "json_web_token":
            start = text.find("eyJ", *hit.span())
            if start >= 0 and (match := pattern.match(text, start)):
                yield match
        else:
            # one character more than the value, for patterns that look at what follows
            yield from pattern.finditer(text, max(0, hit.start() - before), hit.end() + 1)


def _suspicious(text: str, lower: str) -> bool:
    """Whether a text may hold a secret: a run of 20 characters as tokens have them, or a literal of those that can be shorter."""
    if any(literal in lower for literal in _SHORT):
        return True
    return _RUN in text.encode("utf-8", "surrogatepass").translate(_TOKEN)


def _span(text: str, match: re.Match[str], kind: str) -> Span:
    """The secret's own span. Plugins stop after the characters they need; a key's tail is as secret as its head."""
    start, end = match.span()
    if kind in _VALUE_IN_GROUP and match.re.groups and match.group(1):
        start, end = match.span(1)
    if kind == "npm_token":  # its pattern takes the rest of the line
        end = start
    if kind == "private_key":
        while start and text[start - 1] == "-":
            start -= 1
        following = text.find("BEGIN ", end, end + _PEM_LIMIT)
        closing = _PEM_END.search(text, end, following if following >= 0 else end + _PEM_LIMIT)
        tail = closing or _PEM_LINES.match(text, end)
    else:
        tail = (_JWT_TAIL if kind == "json_web_token" else _TAIL).match(text, end)
    return Span(start, tail.end() if tail else end, "secret", kind)
