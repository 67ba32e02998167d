"""in-toto Statements as plain dicts: provenance, test result, decision (VSA), certificate; and the digest that identifies one.

Signing them is `signing.py`, checking them `verification.py`. Times are UTC; digests lower-case hexadecimal SHA-256.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any, Literal

from repro_assets.trust.canonical import digest

STATEMENT = "https://in-toto.io/Statement/v1"
PROVENANCE = "https://slsa.dev/provenance/v1"
TEST_RESULT = "https://in-toto.io/attestation/test-result/v0.1"
VSA = "https://slsa.dev/verification_summary/v1"
CERTIFICATE = "urn:repro-assets:certificate:v1"

#: buildType of the two provenances this project writes
BUNDLE = "urn:repro-assets:bundle:v1"
CHECKPOINT = "urn:repro-assets:checkpoint:v1"

Statement = dict[str, Any]
Descriptor = dict[str, Any]
Decision = Literal["promote", "hold", "rollback", "retrain"]

_SHA256 = re.compile(r"[0-9a-f]{64}")
_GIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


class StatementError(ValueError):
    """A statement that would say nothing, or something untrue by its form; the message names the field."""


def timestamp(moment: datetime) -> str:
    """RFC 3339 in UTC with whole seconds. Raises StatementError for a naive time: it names no moment."""
    if moment.tzinfo is None:
        raise StatementError(f"{moment.isoformat()} has no time zone; use datetime.now(UTC)")
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def descriptor(
    name: str,
    sha256: str | None = None,
    *,
    uri: str | None = None,
    git_commit: str | None = None,
    annotations: Mapping[str, Any] | None = None,
) -> Descriptor:
    """A ResourceDescriptor: a subject, a dependency, a byproduct or a configuration. It needs a digest of some kind."""
    if not name:
        raise StatementError("a descriptor without a name")
    digests: dict[str, str] = {}
    if sha256 is not None:
        if not _SHA256.fullmatch(sha256):
            raise StatementError(f"{name}: {sha256!r} is not a lower-case hexadecimal SHA-256")
        digests["sha256"] = sha256
    if git_commit is not None:
        if not _GIT.fullmatch(git_commit):
            raise StatementError(f"{name}: {git_commit!r} is not a full Git commit hash")
        digests["gitCommit"] = git_commit
    if not digests:
        raise StatementError(f"{name}: a name alone pins nothing; give its SHA-256 or its Git commit")
    made: Descriptor = {"name": name, "digest": digests}
    if uri:
        made["uri"] = uri
    if annotations:
        made["annotations"] = dict(annotations)
    return made


def descriptors(digests: Mapping[str, str]) -> list[Descriptor]:
    """One descriptor a name -> SHA-256, in the order of the names."""
    return [descriptor(name, value) for name, value in sorted(digests.items())]


def _statement(subjects: Mapping[str, str], predicate_type: str, predicate: dict[str, Any]) -> Statement:
    if not subjects:
        raise StatementError(f"{predicate_type}: a statement without a subject is about nothing")
    return {"_type": STATEMENT, "subject": descriptors(subjects), "predicateType": predicate_type, "predicate": predicate}


def _unique(what: str, items: Iterable[Descriptor]) -> list[Descriptor]:
    """`items` by name; two of one name would leave open which of them was used."""
    ordered = sorted(items, key=lambda item: str(item["name"]))
    for one, following in pairwise(ordered):
        if one["name"] == following["name"]:
            raise StatementError(f"{what}: {one['name']!r} is named twice")
    return ordered


def provenance(
    build_type: str,
    subjects: Mapping[str, str],
    *,
    parameters: Mapping[str, Any],
    dependencies: Iterable[Descriptor],
    builder: str,
    invocation: str,
    started: datetime | None = None,
    finished: datetime | None = None,
    byproducts: Iterable[Descriptor] = (),
) -> Statement:
    """SLSA provenance v1 of a bundle or a checkpoint. `builder`: URI with version; `invocation`: the Dagster run id.

    Everything under `runDetails` (builder, invocation, times, byproducts) may differ between two honest runs.
    """
    metadata: dict[str, Any] = {"invocationId": invocation}
    if started:
        metadata["startedOn"] = timestamp(started)
    if finished:
        metadata["finishedOn"] = timestamp(finished)
    run: dict[str, Any] = {"builder": {"id": builder}, "metadata": metadata}
    if produced := _unique("byproducts", byproducts):
        run["byproducts"] = produced
    definition = {
        "buildType": build_type,
        "externalParameters": dict(parameters),
        "resolvedDependencies": _unique("dependencies", dependencies),
    }
    return _statement(subjects, PROVENANCE, {"buildDefinition": definition, "runDetails": run})


def test_result(
    subjects: Mapping[str, str],
    *,
    result: Literal["PASSED", "WARNED", "FAILED"],
    configuration: Iterable[Descriptor],
    evaluated: datetime,
    passed: Iterable[str] = (),  # noqa: PT028  (not a test: the predicate's own name)
    warned: Iterable[str] = (),  # noqa: PT028
    failed: Iterable[str] = (),  # noqa: PT028
) -> Statement:
    """in-toto test result of one evaluation. `configuration`: what it was run with (suites, baseline, samples, earlier statements).

    The predicate has no field for a time, so `evaluated` rides as an annotation of an entry of its own, out of the digest.
    """
    clock: Descriptor = {"name": "evaluation-time", "uri": "repro:clock", "annotations": {"timeEvaluated": timestamp(evaluated)}}
    predicate: dict[str, Any] = {"result": result, "configuration": [*_unique("configuration", configuration), clock]}
    for name, tests in (("passedTests", passed), ("warnedTests", warned), ("failedTests", failed)):
        if listed := sorted(tests):
            predicate[name] = listed
    return _statement(subjects, TEST_RESULT, predicate)


# pytest would collect a function of this name from every test module that imports it
test_result.__test__ = False  # type: ignore[attr-defined]


def vsa(
    subjects: Mapping[str, str],
    *,
    decision: Decision,
    verifier: str,
    verified: datetime,
    resource: str,
    policy: Descriptor,
    inputs: Iterable[Descriptor],
    levels: Sequence[str] = (),
) -> Statement:
    """SLSA verification summary v1: the gates' decision on one checkpoint.

    `resource`: URI of the thing decided on (`repro:releases/3`). `policy`: descriptor of the gates section. `inputs`: the statements
    read. `levels`: further custom levels, e.g. a certificate's grade. Only promote is PASSED. The decision itself is the level
    `REPRO_DECISION_…`, because the predicate knows PASSED and FAILED only.
    """
    if any(level.startswith("SLSA_") for level in levels):
        raise StatementError("levels: names that begin with SLSA_ are reserved by the specification")
    predicate = {
        "verifier": {"id": verifier},
        "timeVerified": timestamp(verified),
        "resourceUri": resource,
        "policy": {"uri": policy.get("uri") or f"repro:{policy['name']}", "digest": policy["digest"]},
        "inputAttestations": [
            {"uri": item.get("uri") or f"repro:{item['name']}", "digest": item["digest"]} for item in _unique("inputs", inputs)
        ],
        "verificationResult": "PASSED" if decision == "promote" else "FAILED",
        "verifiedLevels": [f"REPRO_DECISION_{decision.upper()}", *sorted(levels)],
        "slsaVersion": "1.1",
    }
    return _statement(subjects, VSA, predicate)


def decision_of(statement: Mapping[str, Any]) -> str:
    """promote, hold, rollback or retrain, out of a statement that `vsa` made. Raises StatementError when it says none."""
    levels = statement["predicate"].get("verifiedLevels", [])
    said = [level.removeprefix("REPRO_DECISION_").lower() for level in levels if level.startswith("REPRO_DECISION_")]
    if len(said) != 1:
        raise StatementError(f"verifiedLevels: one REPRO_DECISION_ level expected, found {levels}")
    return said[0]


def certificate(
    subjects: Mapping[str, str],
    *,
    grade: str | None,
    predicate: Mapping[str, Any],
    verifier: str,
    certified: datetime,
) -> Statement:
    """The result of a re-execution. `predicate`: what `certificates.certificate` collected; without a grade the result is FAILED."""
    body = {
        **predicate,
        "grade": grade or "none",
        "result": "PASSED" if grade else "FAILED",
        "verifier": {"id": verifier},
        "timeCertified": timestamp(certified),
    }
    return _statement(subjects, CERTIFICATE, body)


def subject_digests(statement: Mapping[str, Any]) -> dict[str, str]:
    """name -> SHA-256 of the statement's subjects. Raises StatementError for a subject without one, or a name used twice."""
    found: dict[str, str] = {}
    for item in statement["subject"]:
        name, value = item.get("name"), item.get("digest", {}).get("sha256")
        if not isinstance(name, str) or not isinstance(value, str) or not _SHA256.fullmatch(value):
            raise StatementError(f"subject {name!r} has no lower-case hexadecimal SHA-256")
        if name in found:
            raise StatementError(f"subject {name!r} is named twice")
        found[name] = value
    return found


def referenced(statement: Mapping[str, Any]) -> dict[str, str]:
    """Every SHA-256 or Git commit that the statement names beside its subjects -> the name or URI it is named under."""
    predicate = statement["predicate"]
    definition = predicate.get("buildDefinition", {})
    items = [
        *definition.get("resolvedDependencies", []),
        *predicate.get("configuration", []),
        *predicate.get("inputAttestations", []),
        *([predicate["policy"]] if "policy" in predicate else []),
        *predicate.get("dependencies", []),
    ]
    return {value: str(item.get("name") or item.get("uri")) for item in items for value in item.get("digest", {}).values()}


def signed_at(statement: Mapping[str, Any]) -> datetime | None:
    """When the statement says it was made; None when it says nothing."""
    predicate = statement["predicate"]
    said = predicate.get("timeVerified") or predicate.get("timeCertified")
    said = said or predicate.get("runDetails", {}).get("metadata", {}).get("finishedOn")
    for item in predicate.get("configuration", []):
        said = said or item.get("annotations", {}).get("timeEvaluated")
    if said is None:
        return None
    try:
        moment = datetime.fromisoformat(said)
    except (TypeError, ValueError):
        raise StatementError(f"{said!r} is not an RFC 3339 time") from None
    if moment.tzinfo is None:
        raise StatementError(f"{said!r} has no time zone")
    return moment


def statement_digest(statement: Mapping[str, Any]) -> str:
    """SHA-256 of what the statement says, without who said it and when: making and signing it again changes nothing."""
    return digest(timeless(statement))


def timeless(statement: Mapping[str, Any]) -> Statement:
    """The statement without run details, verifier and times: the form whose canonical JSON is stored as content."""
    predicate = {
        name: value
        for name, value in statement["predicate"].items()
        if name not in ("runDetails", "timeVerified", "timeCertified", "verifier")
    }
    if "configuration" in predicate:
        predicate["configuration"] = [item for item in predicate["configuration"] if "timeEvaluated" not in item.get("annotations", {})]
    return {**statement, "predicate": predicate}
