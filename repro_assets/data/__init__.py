"""The data path as pure functions: raw bytes to records, to token leaves, to a validation report and a packing plan.

Nothing here knows Dagster, lakeFS or S3; storage comes in as a `BlobStore` and raw files as a function that opens them.
"""

from collections.abc import Callable

#: called with (what, done, of) while long work goes on; `done` and `of` in the unit that `what` names
Progress = Callable[[str, int, int], None]
