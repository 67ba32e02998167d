"""Comparing an original with its re-execution, and the grade that the comparison earns (R0 to R4).

Doing the re-execution is the caller's; signing the certificate is `signing.py`.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

import msgspec

from repro_assets.trust import statements
from repro_assets.trust.statements import Statement

Grade = Literal["R0", "R1", "R2", "R3", "R4"]
Scope = Literal["data", "resume", "training"]

#: What each grade says, for people
MEANING: dict[str, str] = {
    "R0": "recorded, not re-executed",
    "R1": "data bit-equal on re-execution",
    "R2": "resumed training bit-equal to uninterrupted training",
    "R3": "whole training bit-equal on the same hardware",
    "R4": "whole training bit-equal with another world size, backend or hardware",
}


class Difference(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One name whose digest came out otherwise; None where a side does not have the name."""

    name: str
    was: str | None
    now: str | None

    def __str__(self) -> str:
        if self.was is None:
            return f"{self.name}: only in the re-execution ({self.now})"
        if self.now is None:
            return f"{self.name}: missing from the re-execution (was {self.was})"
        return f"{self.name}: was {self.was}, is {self.now}"


class Run(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a training ran: hardware class, number of ranks, backend."""

    hardware: str
    world_size: int
    backend: str


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One scope that was re-executed: how many digests were compared, and those that differ."""

    scope: Scope
    compared: int
    differences: tuple[Difference, ...]


def compare(original: Mapping[str, str], again: Mapping[str, str]) -> list[Difference]:
    """Names whose digests differ or that only one side has, in the order of `original`, then of the new names."""
    names = [*original, *(name for name in again if name not in original)]
    return [Difference(name, original.get(name), again.get(name)) for name in names if original.get(name) != again.get(name)]


def part(scope: Scope, original: Mapping[str, str], again: Mapping[str, str]) -> Part:
    """`compare` of one scope, with the number of names seen on either side."""
    return Part(scope, len(original.keys() | again.keys()), tuple(compare(original, again)))


def grade(parts: Sequence[Part], was: Run | None = None, now: Run | None = None) -> Grade | None:
    """The highest grade that `parts` earn, or None when anything differs or a part compared nothing.

    Nothing re-executed is R0. `training` needs both runs: equal ones earn R3, another world size, backend or hardware R4.
    """
    if any(item.differences or item.compared == 0 for item in parts):
        return None
    scopes = {item.scope for item in parts}
    if "training" in scopes:
        if was is None or now is None:
            raise ValueError("a grade for a whole training needs to know where both ran")
        return "R3" if was == now else "R4"
    if "resume" in scopes:
        return "R2"
    return "R1" if "data" in scopes else "R0"


def first_difference(parts: Sequence[Part]) -> Difference | None:
    """The earliest difference in the order of the parts: what everything after it may follow from."""
    return next((difference for item in parts for difference in item.differences), None)


def certificate(
    subjects: Mapping[str, str],
    parts: Sequence[Part],
    *,
    original: str,
    verifier: str,
    certified: datetime,
    was: Run | None = None,
    now: Run | None = None,
    environment: str | None = None,
    listed: int = 100,
) -> Statement:
    """The certificate's statement about `subjects`. `original`: digest of the statement that was re-executed.

    At most `listed` differences of each part are written out; the counts are always whole.
    """
    earned = grade(parts, was, now)
    predicate: dict[str, Any] = {
        "meaning": MEANING[earned] if earned else "the re-execution differs",
        "parts": [
            {
                "scope": item.scope,
                "compared": item.compared,
                "differing": len(item.differences),
                "differences": [msgspec.to_builtins(difference) for difference in item.differences[:listed]],
            }
            for item in parts
        ],
        "dependencies": [statements.descriptor("original", original)],
    }
    if environment:
        predicate["dependencies"].append(statements.descriptor("environment", environment))
    for name, run in (("original", was), ("reexecution", now)):
        if run:
            predicate[name] = msgspec.to_builtins(run)
    return statements.certificate(subjects, grade=earned, predicate=predicate, verifier=verifier, certified=certified)
