"""The data path as pure functions: raw bytes to records, to token leaves, to a validation report and a packing plan.

Nothing here knows Dagster, lakeFS or S3; storage comes in as a `BlobStore` and raw files as a function that opens them.
`open_shards` is what other programs read shards with.
"""

import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repro_assets.data.loading import open_shards as open_shards

#: called with (what, done, of) while long work goes on; `done` and `of` in the unit that `what` names
Progress = Callable[[str, int, int], None]


def __getattr__(name: str) -> Any:
    # Found by name, not imported: an import here would make the loader part of the code that every data asset's key is made from.
    if name == "open_shards":
        return pkgutil.resolve_name("repro_assets.data.loading:open_shards")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
