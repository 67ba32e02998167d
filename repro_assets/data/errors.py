"""Errors of the data path. Every message names the file or record, the reason and the remedy."""


class DataError(ValueError):
    """Base of every refusal of the data path."""


class SnapshotError(DataError):
    """Raw files that make no snapshot: none selected, or a path listed twice."""


class SourceError(DataError):
    """A raw file that cannot be read at all: no source for it, no reader for its format, a pointer instead of data, a broken container."""


class QuarantineError(DataError):
    """More rows are bad than the recipe allows. The message lists the first ten as file:line: reason."""


class RenderingError(DataError):
    """A chat template that is missing or fails, or a record of which it cannot be told what the assistant said."""


class TokenizerError(DataError):
    """A tokenizer that is missing, is not deterministic or does not fit the model."""


class LeafError(DataError):
    """Bytes that are not the token leaf they are said to be."""


class PackingError(DataError):
    """Records that cannot be packed into rows of the wanted size."""


class WorkerLost(DataError):
    """A map that could not be finished where it ran: workers that keep dying, or a cluster that is not there."""


class TableError(DataError):
    """A Delta or Iceberg table that cannot be imported: no version named, one that is not there, or rows that its files alone do not say."""
