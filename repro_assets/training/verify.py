"""The bundle check: nothing is trained that a trusted builder has not signed for, down to the last leaf, file and setting.

Signatures, keys and roles are checked by `trust/verification.py`; this compares what was signed with what the job holds.
"""

import base64
from typing import Any

import msgspec

from repro_assets.training.job import Job, TrainingError
from repro_assets.trust import statements
from repro_assets.trust.blob import BlobError, BlobStore
from repro_assets.trust.canonical import digest
from repro_assets.trust.verification import Refused, Trust, TrustError, parse_trust, verify

REMEDY = "materialize training_bundle again and submit the job from it"


def check_bundle(job: Job, store: BlobStore) -> str:
    """Digest of the signed statement (without run details and signature) that covers exactly this job.

    Raises TrainingError naming the check that failed and the remedy.
    """
    try:
        envelope = store.get_bytes(job.bundle)
    except (BlobError, ValueError) as error:
        raise TrainingError(f"bundle: {error}; training needs a signed bundle: {REMEDY}") from error
    try:
        trust: Trust = parse_trust(msgspec.json.encode(job.trust), "job.json: trust")
        # The recipe subject's digest is not in the job: it is taken as signed, and compared below by its training section.
        signed = _peek(envelope)
        held = {f"leaves/{leaf.split}/{leaf.sha256}": leaf.sha256 for leaf in job.leaves}
        if "recipe" in signed:
            held["recipe"] = signed["recipe"]
        statement = verify(envelope, trust=trust, role="builder", predicate_type=statements.PROVENANCE, subjects=held)
    except (Refused, TrustError) as error:
        raise TrainingError(f"bundle {job.bundle}: {error}") from error
    definition = statement["predicate"].get("buildDefinition", {})
    if definition.get("buildType") != statements.BUNDLE:
        raise TrainingError(
            f"bundle {job.bundle}: buildType is {definition.get('buildType')!r}, a training bundle has {statements.BUNDLE!r}; {REMEDY}"
        )
    if len(held) - ("recipe" in held) != len(job.leaves):
        raise TrainingError(f"job.json: a leaf is listed twice in one split; {REMEDY}")
    _check_base_model(job, definition)
    _check_section(job, definition)
    return statements.statement_digest(statement)


def _peek(envelope: bytes) -> dict[str, str]:
    """Subjects of an envelope nobody has verified yet; `verify` reads the same bytes right after."""
    try:
        payload = msgspec.json.decode(base64.b64decode(msgspec.json.decode(envelope)["payload"]))
        return statements.subject_digests(payload)
    except (ValueError, KeyError, TypeError, AttributeError, msgspec.DecodeError):
        return {}


def _check_base_model(job: Job, definition: dict[str, Any]) -> None:
    prefix = "base_model/"
    signed: dict[str, str] = {}
    for item in definition.get("resolvedDependencies", []):
        if item["name"].startswith(prefix):
            signed[item["name"].removeprefix(prefix)] = item["digest"].get("sha256", "")
    held = {name: blob.sha256 for name, blob in job.base_model.items()}
    if not held:
        raise TrainingError(f"job.json: base_model lists no file; {REMEDY}")
    for name in sorted(signed.keys() | held.keys()):
        if signed.get(name) != held.get(name):
            raise TrainingError(
                f"base model file {name!r}: the job holds {held.get(name, 'nothing')}, signed is {signed.get(name, 'nothing')}; {REMEDY}"
            )


def _check_section(job: Job, definition: dict[str, Any]) -> None:
    recipe = definition.get("externalParameters", {}).get("recipe", {})
    signed = recipe.get("training") if isinstance(recipe, dict) else None
    held = job.section.identity()
    if not isinstance(signed, dict):
        raise TrainingError(f"bundle {job.bundle}: its statement has no externalParameters.recipe.training; {REMEDY}")
    if digest(signed) != digest(held):
        field = next(name for name in sorted(signed.keys() | held.keys()) if signed.get(name) != held.get(name))
        raise TrainingError(
            f"training section: `{field}` is {held.get(field)!r} in the job and {signed.get(field)!r} in the signed bundle; {REMEDY}"
        )
