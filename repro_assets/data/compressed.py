"""Gzip and Zstandard streams read piece by piece: bounded memory, every member and frame, a truncated or damaged one refused.

What is in the bytes is `cutting.py`; which file is compressed is told by its format (`manifest.py`).
"""

import zlib
from typing import Any, BinaryIO, Self

from repro_assets.data.errors import SourceError

BLOCK = 1 << 20
#: compressed bytes given to a decoder at a time. Zstandard's gives back all that they hold, in a bomb up to 32 KB for each byte
BITE = {"gz": 1 << 16, "zst": 1 << 12}
#: the largest window (bytes) of a Zstandard frame; what `zstd` itself accepts without --long
WINDOW = 1 << 27


class Decompressed:
    """The uncompressed bytes of a stream; it cannot seek. `read` raises SourceError naming file, position and remedy."""

    def __init__(self, path: str, stream: BinaryIO, compression: str) -> None:
        self.path, self.stream, self.compression = path, stream, compression
        self.position = 0  # compressed bytes taken from the stream
        self.block, self.at = b"", 0  # those taken last, and how many of them the decoder has had
        self.out = memoryview(b"")
        self.decoder: Any = None
        self.ended = False

    def read(self, count: int = -1) -> bytes:
        """At most `count` uncompressed bytes, none only at the end."""
        parts, size = [], 0
        while count < 0 or size < count:
            if not self.out and not self._more():
                break
            part = self.out if count < 0 else self.out[: count - size]
            self.out = self.out[len(part) :]
            parts.append(part)
            size += len(part)
        return b"".join(parts)

    def _more(self) -> bool:
        """Decode until there is output; False at the end of the stream."""
        while not self.ended:
            if self.at == len(self.block):
                self.block, self.at = self.stream.read(BLOCK), 0
                self.position += len(self.block)
            if not self.block:
                self.ended = True
                if self.decoder is not None:
                    raise self._broken("ends in the middle: it was cut off on the way")
            elif out := self._gzip() if self.compression == "gz" else self._zstd():
                self.out = memoryview(out)
                return True
        return False

    def _gzip(self) -> bytes:
        if self.decoder is None:
            # gzip files may be padded with zeros, as tape blocks were
            while self.at < len(self.block) and not self.block[self.at]:
                self.at += 1
            if self.at == len(self.block):
                return b""
            self.decoder = zlib.decompressobj(wbits=31)
        bite = self.block[self.at : self.at + BITE["gz"]]
        try:
            out: bytes = self.decoder.decompress(bite, BLOCK)
        except zlib.error as error:
            raise self._broken(f"is damaged ({error})") from None
        self._taken(len(bite) - len(self.decoder.unconsumed_tail) - len(self.decoder.unused_data))
        return out

    def _zstd(self) -> bytes:
        import zstandard

        if self.decoder is None:
            self.decoder = zstandard.ZstdDecompressor(max_window_size=WINDOW).decompressobj()
        bite = self.block[self.at : self.at + BITE["zst"]]
        try:
            out: bytes = self.decoder.decompress(bite)
        except zstandard.ZstdError as error:
            hint = "; compress it without --long" if "memory" in str(error) else ""
            raise self._broken(f"is damaged or not readable here ({error}{hint})") from None
        self._taken(len(bite) - len(self.decoder.unused_data))
        return out

    def _taken(self, count: int) -> None:
        self.at += count
        if self.decoder.eof:
            self.decoder = None

    def _broken(self, what: str) -> SourceError:
        at = self.position - len(self.block) + self.at
        return SourceError(
            f"{self.path}: the {self.compression} stream {what}, at compressed byte {at:,}; "
            "fetch or compress the file again and import it, or leave it out with raw.exclude"
        )

    def seekable(self) -> bool:
        return False

    def close(self) -> None:
        self.stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()
