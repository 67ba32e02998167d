"""Patterns of personal data, ASCII only: e-mail, telephone, IBAN, payment card, US social security number, public IP address.

Names, postal addresses and national numbers without a checksum are not found by pattern. What becomes of a find is `sensitive.py`.
"""

import ipaddress
import re
from collections.abc import Iterator

import msgspec


class Span(msgspec.Struct, frozen=True, order=True):
    """Characters start..end of a text, `family` secret or personal, and the kind."""

    start: int
    end: int
    family: str
    kind: str


_DIGITS = re.compile(r"\d[\d .()-]{5,}\d", re.A)
_COLONS = re.compile(r":[0-9A-Fa-f]{0,4}:")

_LOCAL = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._%+-")
_DOMAIN = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}")
_INTERNATIONAL = re.compile(r"(?<![\w+])\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d(?:[ .-]?\d){4,13}(?!\w)", re.A)
_NORTH_AMERICAN = re.compile(r"(?<![\w.+-])(?:1[ .-])?(?:\([2-9]\d\d\) ?|[2-9]\d\d[ .-])[2-9]\d\d[ .-]\d{4}(?![\w-])", re.A)
_CARD = re.compile(r"(?<![\w.+-])(?:\d{13,19}|\d{4}([ -])\d{4}\1\d{4}\1\d{4}(?:\1\d{3})?|\d{4}([ -])\d{6}\2\d{4,5})(?![\w-])", re.A)
_SSN = re.compile(r"(?<![\w-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])", re.A)
_OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_IPV4 = re.compile(rf"(?<![\w.-])(?:{_OCTET}\.){{3}}{_OCTET}(?![\w-]|\.\d)", re.A)
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])")
_IBAN = re.compile(r"[A-Z]{2}\d{2}(?= ?[A-Z0-9])", re.A)

# addresses of no one: private, loopback, link-local, shared, documentation, multicast and reserved (RFC 6890, 5737, 6598, 3849).
# A list of our own, since ipaddress.is_global moves with the patch version of Python.
_NOBODY_V4 = [
    ipaddress.IPv4Network(network)
    for network in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.2.0/24"),
        *("192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/3"),
    )
]
_NOBODY_V6 = [ipaddress.IPv6Network(network) for network in ("::/8", "fc00::/7", "fe80::/10", "ff00::/8", "2001:db8::/32")]

# length of an IBAN by country (registry of ISO 13616): without it one cannot tell where it ends among spaces and words
IBAN_LENGTHS = dict(
    re.findall(
        r"([A-Z]{2})(\d\d)",
        "AD24AE23AL28AT20AZ28BA20BE16BG22BH22BI27BR29BY28CH21CR22CY28CZ24DE22DJ27DK18DO28EE20EG29ES24FI18FK18FO18FR27GB22GE22GI23GL18GR27"
        "GT28HN28HR21HU28IE22IL23IQ23IS26IT27JO30KW30KZ20LB28LC32LI21LT20LU20LV21LY25MC27MD24ME22MK19MN20MR27MT31MU30NI28NL18NO15OM23PK24"
        "PL28PS29PT25QA29RO24RS22RU33SA24SC31SD18SE24SI19SK24SM27SO23ST25SV28TL23TN24TR26UA29VA22VG24XK20YE30",
    )
)


def personal_spans(text: str) -> list[Span]:
    """Spans of personal data, in order, merged where they overlap. A text without `@`, runs of digits and colons costs one search."""
    spans: list[Span] = []
    if "@" in text:
        spans += _emails(text)
    runs = [match.span() for match in _DIGITS.finditer(text)]
    if runs:
        spans += _ibans(text)
    for start, end in runs:
        # what the patterns match lies within such a run and a sign and bracket before it; they look at two characters behind
        spans += _numbers(text, max(0, start - 2), end + 2)
    if _COLONS.search(text):
        spans += _ipv6(text)
    return merged(spans) if spans else []


def merged(spans: list[Span]) -> list[Span]:
    """In order; overlapping spans as one, of the kind of the first (of the longest where two begin together)."""
    out: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.start, -span.end, span.kind)):
        if out and span.start < out[-1].end:
            out[-1] = msgspec.structs.replace(out[-1], end=max(out[-1].end, span.end))
        else:
            out.append(span)
    return out


def _span(start: int, end: int, kind: str) -> Span:
    return Span(start, end, "personal", kind)


def _emails(text: str) -> Iterator[Span]:
    # from each @ outwards: one pattern for the whole address is quadratic on a long run of letters
    at = text.find("@")
    while at >= 0:
        start = at
        while start and text[start - 1] in _LOCAL:
            start -= 1
        domain = _DOMAIN.match(text, at + 1)
        if start < at and domain:
            yield _span(start, domain.end(), "email")
        at = text.find("@", at + 1)


def _numbers(text: str, start: int, end: int) -> Iterator[Span]:
    """Cards, phones, social security numbers and IPv4 addresses in one run of digits and what separates them.

    Phones: international with a leading +, 8 to 15 digits (E.164), North American as 3-3-4; other national forms are not told from numbers.
    """
    for match in _CARD.finditer(text, start, end):
        digits = [int(character) for character in match.group() if character.isdigit()]
        if _issued(digits) and _luhn(digits):
            yield _span(*match.span(), "card")
    for match in _INTERNATIONAL.finditer(text, start, end):
        if 8 <= sum(character.isdigit() for character in match.group()) <= 15:
            yield _span(*match.span(), "phone")
    for match in _NORTH_AMERICAN.finditer(text, start, end):
        yield _span(*match.span(), "phone")
    for match in _SSN.finditer(text, start, end):
        yield _span(*match.span(), "ssn")
    for match in _IPV4.finditer(text, start, end):
        address = ipaddress.IPv4Address(match.group())
        if not any(address in network for network in _NOBODY_V4):
            yield _span(*match.span(), "ip")


def _ipv6(text: str) -> Iterator[Span]:
    for match in _IPV6.finditer(text):
        groups = match.group().split(":")
        if sum(map(bool, groups)) < 3:
            continue
        try:
            address = ipaddress.IPv6Address(match.group())
        except ValueError:
            continue
        if not any(address in network for network in _NOBODY_V6):
            yield _span(*match.span(), "ip")


def _issued(digits: list[int]) -> bool:
    """Whether a card of this length begins like this (American Express, Diners, Visa, Mastercard, Discover, UnionPay, JCB, Maestro)."""
    length = len(digits)
    four = int("".join(map(str, digits[:4])))
    two = four // 100
    if length == 15:
        return two in (34, 37)
    if length == 14:
        return two in (30, 36, 38)
    if two // 10 == 4:
        return length in (13, 16, 19)
    if 51 <= two <= 55 or 2221 <= four <= 2720:
        return length == 16
    return length >= 16 and (two in (35, 62, 65) or four == 6011 or 644 <= four // 10 <= 649)


def _luhn(digits: list[int]) -> bool:
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return (sum(digits[::-2]) + sum(doubled)) % 10 == 0


def _ibans(text: str) -> Iterator[Span]:
    for match in _IBAN.finditer(text):
        if match.start() and text[match.start() - 1].isascii() and text[match.start() - 1].isalnum():
            continue
        length = int(IBAN_LENGTHS.get(match.group()[:2], 0))
        end, characters = match.start(), ""
        while len(characters) < length and end < len(text):
            character = text[end]
            if character != " ":
                characters += character
            elif text[end - 1] == " ":
                break
            end += 1
        whole = length and len(characters) == length and characters.isascii() and characters.isalnum() and characters.upper() == characters
        if whole and not (end < len(text) and text[end].isascii() and text[end].isalnum()) and _mod97(characters):
            yield _span(match.start(), end, "iban")


def _mod97(characters: str) -> bool:
    return int("".join(str(int(character, 36)) for character in characters[4:] + characters[:4])) % 97 == 1
