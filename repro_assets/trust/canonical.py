"""The one way a value becomes bytes and bytes become a digest: RFC 8785 canonical JSON and SHA-256.

Every identity of the project goes through here. Reading and storing bytes is in `blob.py` and the resources.
"""

import hashlib
from typing import Any

import msgspec
import rfc8785


def canonical(value: Any) -> bytes:
    """RFC 8785 bytes of `value`: dicts, lists, str, int (within 2**53), finite float, bool, None, msgspec Structs.

    Raises ValueError naming the reason for a NaN, an infinity, an integer beyond 2**53, a lone surrogate
    or a type that JSON does not have.
    """
    try:
        return rfc8785.dumps(msgspec.to_builtins(value))
    except (rfc8785.CanonicalizationError, TypeError, UnicodeEncodeError) as error:
        raise ValueError(f"no canonical JSON for this value: {error}") from error


def sha256(data: bytes | memoryview) -> str:
    """Lower-case hexadecimal SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def digest(value: Any) -> str:
    """Lower-case hexadecimal SHA-256 of the canonical JSON of `value`."""
    return sha256(canonical(value))
