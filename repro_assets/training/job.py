"""What a training job says, and the errors and protocols of the training program.

The job is written by the orchestrator and believed only after `verify.py`; nothing here imports torch.
"""

from typing import Any, Literal, Protocol

import msgspec

from repro_assets.recipe import TrainingSection
from repro_assets.trust.blob import Blob
from repro_assets.trust.canonical import digest


class TrainingError(Exception):
    """Training that must not start or go on; the message names what is wrong, where, and the remedy."""


class Events(Protocol):
    """The job's event log. Only rank 0's events are written; `prior` lists those of earlier processes of this job, oldest first."""

    def emit(self, kind: str, **facts: Any) -> None: ...

    def prior(self) -> list[dict[str, Any]]: ...


class Leaf(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One token leaf: its identity (`sha256`), the blob that holds its Arrow form, and its counts."""

    sha256: str
    stored: Blob
    split: Literal["train", "validation"]
    records: int
    tokens: int


class Special(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Token ids that packing needs: `pad` fills rows, `eos` ends a document."""

    pad: int
    eos: int


class Job(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One training job. `resume`: digest of a checkpoint manifest, or null for this job's own newest. `stop_after`: last step to do."""

    purpose: Literal["train"]
    bundle: str
    trust: dict[str, Any]
    section: TrainingSection
    compute_dtype: Literal["float32", "bfloat16"]
    leaves: tuple[Leaf, ...]
    base_model: dict[str, Blob]
    special: Special
    resume: str | None = None
    stop_after: int | None = None

    @property
    def content(self) -> str:
        """Digest of what the training is made of; the same for a second signature, another backend or a resume."""
        return digest(
            {
                "section": self.section.identity(),
                "compute_dtype": self.compute_dtype,
                "leaves": [{"sha256": leaf.sha256, "split": leaf.split} for leaf in self.leaves],
                "base_model": {name: blob.sha256 for name, blob in self.base_model.items()},
            }
        )

    @property
    def base(self) -> str:
        """Digest of the base model's files."""
        return digest({name: blob.sha256 for name, blob in self.base_model.items()})


def parse(job: dict[str, Any]) -> Job:
    """The job in `job`. Raises TrainingError naming the field."""
    try:
        return msgspec.convert(job, Job)
    except (msgspec.ValidationError, ValueError) as error:
        raise TrainingError(f"job.json: {error}; the orchestrator and the node run different versions of this project") from error
