"""Where records came from: one index for each raw file, in fixed-width rows. A leaf holds none of it, since an insert moves all that follow.

Making an index is `records.py`; what offset and length mean is said by `readers.Row`.
"""

from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from repro_assets.documents import Records
from repro_assets.trust.blob import BlobStore

ORIGINAL = -1  # not made by an augmentation
#: one row of an index, little-endian, 60 bytes
PLACE = np.dtype([("id", "u1", (32,)), ("line", "<i8"), ("offset", "<i8"), ("length", "<i8"), ("by", "<i4")])


class Place(msgspec.Struct, frozen=True):
    """Where the record `id` came from. `by`: the index of the augmentation that made it, ORIGINAL for the row itself."""

    id: str
    length: int
    line: int
    offset: int
    by: int = ORIGINAL


def index(store: BlobStore, records: Records, path: str) -> NDArray[Any]:
    """The index of one raw file as an array of PLACE, in the order of the file."""
    return np.frombuffer(store.get_bytes(records.index[path].sha256), PLACE)


def places(store: BlobStore, records: Records, path: str) -> Iterator[Place]:
    """The same, row by row."""
    for place in index(store, records, path):
        yield Place(bytes(place["id"]).hex(), int(place["length"]), int(place["line"]), int(place["offset"]), int(place["by"]))
