"""lakeFS behind one door: `Lake` and the values it takes and gives. Nothing of the SDK leaves this package."""

from resources.lake.client import Patience
from resources.lake.lake import MAIN, RAW, SHARED, Lake
from resources.lake.values import COMMIT, DAGSTER_LINK, Change, CommitInfo, Entry, Placement, Written, checked_path

__all__ = [
    "COMMIT",
    "DAGSTER_LINK",
    "MAIN",
    "RAW",
    "SHARED",
    "Change",
    "CommitInfo",
    "Entry",
    "Lake",
    "Patience",
    "Placement",
    "Written",
    "checked_path",
]
