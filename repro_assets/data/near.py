"""Near duplicates: one-permutation MinHash of hashed word n-grams, and the clusters that bands of equal values find.

Which record of a cluster stays is decided by `records.py`. Word n-grams are also what `contamination.py` compares.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from repro_assets.data.lines import normal_text
from repro_assets.recipe import NearDuplicates

Hashes = NDArray[np.uint64]
Numbers = NDArray[np.int64]
Signatures = NDArray[np.uint32]

BLOCK = 1 << 16  # bytes of text hashed at a time: what is held of it fits the second-level cache
PROBES = 64
NEIGHBOURS = 8
PAIRS = 1 << 18
_EMPTY = np.uint32(0xFFFFFFFF)
_ZERO = np.zeros(1, np.int64)
_FOLD = bytes(32 if chr(code).isspace() else ord(chr(code).lower()) for code in range(128)) + bytes(range(128, 256))
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64


# ---- word n-grams


def word_grams(text: str, words: int) -> Hashes:
    """64-bit hashes of every run of `words` words, in order; of the whole text when it has fewer. Case and white space are folded.

    The text is read as `lines.normal_text` gives it; words are what white space separates. Empty for a text without words.
    """
    return grams_of([text], words)[0]


def grams_of(texts: Sequence[str], words: int) -> tuple[Hashes, Numbers]:
    """The same for many texts at once: hashes, and for each the index of its text."""
    return _grams([folded(text) for text in texts], words)


def folded(text: str) -> bytes:
    """`lines.normal_text` of the text in UTF-8, five times as fast for ASCII."""
    if not text.isascii():
        return normal_text(text).encode()
    data = text.encode("ascii").translate(_FOLD)
    while b"  " in data:
        data = data.replace(b"  ", b" ")
    return data.strip(b" ")


def _grams(datas: Sequence[bytes], words: int) -> tuple[Hashes, Numbers]:
    """Hashes of the n-grams of several folded texts, and the number of the text that each is of."""
    hashes: list[Hashes] = []
    owners: list[Numbers] = []
    group: list[int] = []
    size = 0

    def flush() -> None:
        if group:
            found, owner = _block([datas[number] for number in group], words)
            hashes.append(found)
            owners.append(np.array(group)[owner])
            group.clear()

    for number, data in enumerate(datas):
        if size + len(data) > BLOCK:
            flush()
            size = 0
        if len(data) > BLOCK:
            for piece in _pieces(data, words):
                found, owner = _block([piece], words)
                hashes.append(found)
                owners.append(owner + number)
        elif data:
            group.append(number)
            size += len(data) + 1
    flush()
    if not hashes:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    return np.concatenate(hashes), np.concatenate(owners)


def _pieces(data: bytes, words: int) -> list[bytes]:
    """A long text in pieces that overlap by `words` - 1 words, so that together they have exactly its n-grams."""
    pieces = []
    start = 0
    while len(data) - start > BLOCK:
        end = data.find(b" ", start + BLOCK // 2)
        if end < 0:
            break
        overlap = end
        for _ in range(words - 1):
            overlap = data.rfind(b" ", start, overlap)
            if overlap < 0:
                break
        if overlap < 0:  # fewer words than an n-gram has in half a block: take the text as it is
            break
        pieces.append(data[start:end])
        start = overlap + 1
    return [*pieces, data[start:]]


@lru_cache(maxsize=1)
def _powers() -> tuple[Hashes, Hashes]:
    """Powers of the base and of its inverse, modulo 2**64, for positions in a block."""
    return _powers_to(2 * BLOCK)


def _powers_to(count: int) -> tuple[Hashes, Hashes]:
    def powers(base: int) -> Hashes:
        out = np.ones(count, np.uint64)
        out[1:] = np.uint64(base)
        return np.multiply.accumulate(out)

    return powers(_BASE), powers(pow(_BASE, -1, 1 << 64))


def _block(datas: list[bytes], words: int) -> tuple[Hashes, Numbers]:
    """The same for texts, none of them empty, that are hashed at once.

    The hash of the bytes from s to e is the polynomial of their values: a difference of prefix sums, shifted back to position 0.
    """
    text = np.frombuffer(b" ".join(datas), np.uint8)
    powers, inverse = _powers() if len(text) <= 2 * BLOCK else _powers_to(len(text))
    sums = np.zeros(len(text) + 1, np.uint64)
    np.cumsum(text * powers[: len(text)], out=sums[1:])
    gaps = np.flatnonzero(text == 32)
    starts = np.concatenate([_ZERO, gaps + 1])
    ends = np.concatenate([gaps, [len(text)]])
    if len(datas) == 1 and len(starts) >= words:
        return _spans(sums, inverse, starts[: len(starts) - words + 1], ends[words - 1 :]), np.zeros(len(starts) - words + 1, np.int64)
    counts = np.array([data.count(b" ") + 1 for data in datas])
    after = np.cumsum(counts)
    # every run of words of the whole block, without those that reach into the next text, and each shorter text whole
    whole = np.ones(len(starts), bool)
    short = counts < words
    for back in range(1, words):
        whole[np.maximum(after - back, after - counts)] = False
    begin = np.flatnonzero(whole)
    end = begin + (words - 1)
    if short.any():
        begin = np.concatenate([begin, (after - counts)[short]])
        end = np.concatenate([end, after[short] - 1])
    owner = np.searchsorted(after, begin, side="right") if len(datas) > 1 else np.zeros(len(begin), np.int64)
    return _spans(sums, inverse, starts[begin], ends[end]), owner


def _spans(sums: Hashes, inverse: Hashes, first: Numbers, last: Numbers) -> Hashes:
    hashes = sums[last]
    hashes -= sums[first]
    hashes *= inverse[first]
    hashes += (last - first).astype(np.uint64)
    return _mixed(hashes)


def _mixed(values: Hashes) -> Hashes:
    """The finaliser of splitmix64: every input bit moves every output bit."""
    values = values ^ (values >> np.uint64(30))
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


# ---- signatures


def signature(text: str, near: NearDuplicates) -> bytes:
    """MinHash of the text: `bands` * `rows` uint32, little endian. The share of equal values of two signatures estimates the Jaccard
    similarity of their sets of word n-grams."""
    return signatures([text], near)[0].astype("<u4").tobytes()


def signatures(texts: Sequence[str], near: NearDuplicates) -> Signatures:
    """(len(texts), bands * rows): the signature of each text. Faster than one by one for short texts; equal to it."""
    slots = near.bands * near.rows
    grams, owner = grams_of(texts, near.words)
    # slot from the high half by multiply and shift, value from the low half: independent bits
    slot = ((grams >> np.uint64(32)) * np.uint64(slots)) >> np.uint64(32)
    value = np.minimum(grams & np.uint64(0xFFFFFFFF), np.uint64(0xFFFFFFFE)).astype(np.uint32)
    flat = np.full(len(texts) * slots, _EMPTY, np.uint32)
    np.minimum.at(flat, owner * slots + slot.astype(np.int64), value)
    return _densified(flat.reshape(len(texts), slots))


def _densified(found: Signatures) -> Signatures:
    """Every empty slot takes the value of a slot that a fixed hash of (slot, try) names, the first that is not empty; after PROBES tries
    the next one to the right that is not empty. The same walk for every text, so equal sets agree (optimal densification)."""
    filled = found != _EMPTY
    if filled.all():
        return found
    out = found.copy()
    slots = found.shape[1]
    row, slot = np.nonzero(~filled & filled.any(axis=1, keepdims=True))
    for probe in _probes(slots):
        if not len(row):
            return out
        source = probe[slot]
        hit = filled[row, source]
        out[row[hit], slot[hit]] = found[row[hit], source[hit]]
        row, slot = row[~hit], slot[~hit]
    for step in range(1, slots):
        if not len(row):
            break
        source = (slot + step) % slots
        hit = filled[row, source]
        out[row[hit], slot[hit]] = found[row[hit], source[hit]]
        row, slot = row[~hit], slot[~hit]
    return out


@lru_cache(maxsize=4)
def _probes(slots: int) -> Numbers:
    """(PROBES, slots): where slot s looks at its p-th try."""
    blocks = [hashlib.sha256(f"densify|{slots}|{number}".encode()).digest() for number in range((PROBES * slots + 7) // 8)]
    drawn = np.frombuffer(b"".join(blocks), "<u4").astype(np.int64)[: PROBES * slots]
    return (drawn * slots >> 32).reshape(PROBES, slots)


# ---- clusters


def clusters(signatures: Signatures, near: NearDuplicates) -> list[list[int]]:
    """Clusters of at least two rows of `signatures` (n, bands * rows), each sorted, in the order of their first rows.

    Two rows are joined that share a band and agree in at least `similarity` of their values; a cluster is what joins connect. Equal
    rows are joined always. In a band shared by many, a row is compared with the first and with NEIGHBOURS on each side in the order of
    their values, so that boilerplate costs no square. That order is the rows' content: the order of rows changes nothing but numbers.
    """
    if not len(signatures):
        return []
    little = np.ascontiguousarray(signatures, "<u4")
    distinct, where = _distinct(little)
    pairs = _candidates(distinct, near)
    parent = list(range(len(distinct)))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for left, right in _similar(distinct, pairs, near.similarity).tolist():
        low, high = sorted((root(left), root(right)))
        parent[high] = low
    roots = np.fromiter((root(node) for node in range(len(distinct))), np.int64, len(distinct))[where]
    order = np.argsort(roots, kind="stable")
    cuts = np.flatnonzero(np.diff(roots[order])) + 1
    return sorted(group.tolist() for group in np.split(order, cuts) if len(group) > 1)


def _distinct(rows: Signatures) -> tuple[Signatures, Numbers]:
    """The distinct rows in the order of their bytes, and for each row which of them it is."""
    keys = rows.view(np.dtype((np.void, rows.shape[1] * 4))).ravel()
    order = np.argsort(keys, kind="stable")
    new = np.ones(len(order), bool)
    new[1:] = keys[order[1:]] != keys[order[:-1]]
    where = np.empty(len(order), np.int64)
    where[order] = np.cumsum(new) - 1
    return rows[order[new]], where


def _candidates(rows: Signatures, near: NearDuplicates) -> Numbers:
    """(m, 2) pairs of rows that share a band, each once, the smaller first."""
    count = len(rows)
    found: list[Numbers] = []
    for band in range(near.bands):
        values = rows[:, band * near.rows : (band + 1) * near.rows].astype(np.uint64)
        key = np.zeros(count, np.uint64)
        for column in range(near.rows):
            key = _mixed(key + values[:, column] + np.uint64(_BASE))
        order = np.argsort(key, kind="stable")
        key = key[order]
        same = np.flatnonzero(key[1:] == key[:-1])
        if not len(same):
            continue
        new = np.ones(count, bool)
        new[1:] = key[1:] != key[:-1]
        first = np.maximum.accumulate(np.where(new, np.arange(count), 0))
        behind = np.flatnonzero(~new)
        ends = [(first[behind], behind)]
        for distance in range(1, min(NEIGHBOURS, count - 1) + 1):
            here = np.flatnonzero(key[distance:] == key[:-distance])
            ends.append((here, here + distance))
        found += [order[left] * count + order[right] for left, right in ends]
    codes = np.unique(np.concatenate(found)) if found else np.zeros(0, np.int64)
    return np.stack(np.divmod(codes, count), axis=1)


def _similar(rows: Signatures, pairs: Numbers, similarity: float) -> Numbers:
    """Those of `pairs` whose rows agree in at least that share of values."""
    kept = []
    for start in range(0, len(pairs), PAIRS):
        part = pairs[start : start + PAIRS]
        agree = (rows[part[:, 0]] == rows[part[:, 1]]).sum(axis=1)
        kept.append(part[agree / rows.shape[1] >= similarity])
    return np.concatenate(kept) if kept else pairs
