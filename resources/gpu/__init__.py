"""The GPU executor: one call, `executor.run(job, progress) -> outcome`, whatever runs the job. No Dagster and no torch in here."""

from resources.gpu.backend import Backend, BackendError, State, Status
from resources.gpu.executor import Executor, JobCancelled, JobError, JobFailed
from resources.gpu.job import TRUST, Event, Job, Outcome, job_key
from resources.gpu.lease import LeaseError, Leases, Slot, gpu_names
from resources.gpu.local import LocalBackend

__all__ = [
    "TRUST",
    "Backend",
    "BackendError",
    "Event",
    "Executor",
    "Job",
    "JobCancelled",
    "JobError",
    "JobFailed",
    "LeaseError",
    "Leases",
    "LocalBackend",
    "Outcome",
    "Slot",
    "State",
    "Status",
    "gpu_names",
    "job_key",
]
