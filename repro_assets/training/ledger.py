"""The ledger: deterministic facts of every step, part of the checkpoint's content; and timings, which are not.

One canonical JSON object a line. The ledger of a resumed run equals the uninterrupted one's byte for byte.
"""

import struct
from collections.abc import Iterable
from typing import Any

import msgspec

from repro_assets.trust.canonical import canonical

Row = dict[str, Any]


def bits(value: float) -> str:
    """The 64 bits of `value` as big-endian hexadecimal: equal losses are equal here, and nothing rounds."""
    return struct.pack(">d", value).hex()


def row(*, step: int, epoch: int, loss: float, learning_rate: float, gradient_norm: float, tokens: int, trained: int, records: str) -> Row:
    """The ledger row of one step. `loss`: mean nats a trained token. `records`: SHA-256 over the record ids in order."""
    return {
        "step": step,
        "epoch": epoch,
        "loss": loss,
        "loss_bits": bits(loss),
        "learning_rate": learning_rate,
        "gradient_norm": gradient_norm,
        "gradient_norm_bits": bits(gradient_norm),
        "tokens": tokens,
        "trained": trained,
        "records": records,
    }


def encode(rows: Iterable[Row]) -> bytes:
    return b"".join(canonical(item) + b"\n" for item in rows)


def decode(data: bytes) -> list[Row]:
    return [msgspec.json.decode(line) for line in data.splitlines()]
