"""The snapshots partition, and the rule that makes a partition key from a raw commit. Finding and pinning commits is in `shelf.py`."""

import re
from datetime import UTC, datetime

import dagster as dg

snapshots = dg.DynamicPartitionsDefinition(name="snapshots")

KEY = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
SHORT = 12


class BadKey(ValueError):
    """A text that is no snapshot key."""


def key_of(commit: str, created: int) -> str:
    """Partition key of a raw commit: its creation time (epoch seconds, shown in UTC) and the first digits of its id.

    Dagster checks no dynamic key (it accepts empty ones, commas and line breaks), so this rule is the only guard.
    """
    key = f"{datetime.fromtimestamp(created, UTC):%Y%m%d-%H%M%S}-{commit[:SHORT]}"
    return checked(key)


def checked(key: str) -> str:
    if not KEY.fullmatch(key):
        raise BadKey(f"{key!r} is no snapshot key: lower-case letters, digits and dashes, at most 63; see `repro snapshots`")
    return key


def commit_prefix(key: str) -> str:
    """The digits of the raw commit id in a key that `key_of` made."""
    digits = checked(key).rsplit("-", 1)[-1]
    if not re.fullmatch(rf"[0-9a-f]{{{SHORT}}}", digits):
        raise BadKey(f"{key!r} does not end in {SHORT} digits of a raw commit id; see `repro snapshots` for the keys there are")
    return digits
