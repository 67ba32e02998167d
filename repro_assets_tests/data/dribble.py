"""A stream that behaves as a network does. What is read from it is asserted in the tests of the readers."""

import io


class Dribble(io.RawIOBase):
    """A stream that cannot seek and gives at most `sizes` bytes a read, in turn, as a network does."""

    def __init__(self, data: bytes, sizes: list[int]) -> None:
        self.data, self.at, self.sizes, self.turn = data, 0, sizes, 0

    def read(self, count: int = -1) -> bytes:
        self.turn += 1
        count = min(count if count >= 0 else len(self.data), self.sizes[self.turn % len(self.sizes)])
        block = self.data[self.at : self.at + count]
        self.at += len(block)
        return block

    def readable(self) -> bool:
        return True
