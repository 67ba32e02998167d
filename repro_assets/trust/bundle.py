"""The training bundle's statement: which shards, recipe, code, environment and upstream files one training may use.

Signing is `signing.py`; reading the documents it is made of is the asset's. The training program checks itself against it.
"""

from collections.abc import Mapping
from typing import Any

from repro_assets.documents import BaseModel, EvalSuites, RawSnapshot, Shards
from repro_assets.trust.canonical import digest
from repro_assets.trust.environment import Environment
from repro_assets.trust.statements import BUNDLE, Descriptor, Statement, descriptor, provenance


def subjects(shards: Shards, section: Mapping[str, Any]) -> dict[str, str]:
    """What the bundle is about: every token leaf by its identity, and the recipe's sections."""
    leaves = {f"leaves/{leaf.split}/{leaf.sha256}": leaf.sha256 for leaf in shards.leaves}
    return {**leaves, "recipe": digest(section)}


def dependencies(
    *,
    snapshot: RawSnapshot,
    base_model: BaseModel,
    suites: EvalSuites,
    documents: Mapping[str, str],
    code: Mapping[str, str],
    environment: Environment,
) -> list[Descriptor]:
    """Everything that the subjects and the training come from. `documents`: asset to digest; `code`: stage to closure digest."""
    found = [descriptor("raw/manifest", snapshot.manifest.sha256)]
    found += [descriptor(f"base_model/{name}", blob.sha256) for name, blob in sorted(base_model.model_files.items())]
    found += [descriptor(f"eval_suites/{suite.name}", suite.digest) for suite in suites.suites]
    found += [descriptor(f"documents/{asset}", value) for asset, value in sorted(documents.items())]
    found += [descriptor(f"code/{stage}", value) for stage, value in sorted(code.items())]
    if environment.lock:
        found.append(descriptor("requirements.lock", environment.lock))
    if environment.image:
        found.append(descriptor("image", environment.image))
    if environment.git:
        found.append(descriptor("git", uri=environment.git.remote or None, git_commit=environment.git.commit))
        if environment.git.diff:
            found.append(descriptor("git.diff", environment.git.diff))
    return found


def statement(
    *,
    shards: Shards,
    section: Mapping[str, Any],
    dependencies: list[Descriptor],
    builder: str,
    invocation: str,
) -> Statement:
    """SLSA provenance over the shards and the recipe. `section`: the recipe's sections that training and its data depend on."""
    return provenance(
        BUNDLE,
        subjects(shards, section),
        parameters={"recipe": dict(section), "seed": section["training"]["seed"]},
        dependencies=dependencies,
        builder=builder,
        invocation=invocation,
    )
