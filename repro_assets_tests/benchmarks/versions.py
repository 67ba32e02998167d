"""Token leaves under several versions of pyarrow and zstandard: equal identities, each reads the others' stored form, bytes compared.

Run by hand: `python -m repro_assets_tests.benchmarks.versions [--folder DIR]`. Makes small environments with uv (the package index is
needed the first time). Exits 1 when an identity differs or a stored leaf cannot be read.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from repro_assets_tests.benchmarks.environments import clean, environment

ROOT = Path(__file__).resolve().parents[2]
# pyarrow carries its own zstd; zstandard is what raw files and exports are read and written with.
VERSIONS = {
    "old": ["pyarrow==21.0.0", "zstandard==0.23.0", "numpy==2.2.6"],
    "middle": ["pyarrow==25.0.0", "zstandard==0.24.0", "numpy==2.3.5"],
    "new": ["pyarrow==26.0.0", "zstandard==0.25.0", "numpy"],
}
COMMON = ["msgspec", "rfc8785"]


def leaf_of(count: int, width: int):  # type: ignore[no-untyped-def]
    """A leaf of `count` records made of SHA-3 output."""
    import numpy as np

    from repro_assets.data import leaves

    def draw(name: str, size: int) -> np.ndarray:
        return np.frombuffer(hashlib.shake_128(name.encode()).digest(4 * size), dtype="<u4")

    ids, spans = [], []
    for number in range(count):
        length = 3 + int(draw(f"length {number}", 1)[0]) % 900
        ids.append((draw(f"ids {number}", length) % (50_000 if width == 2 else 200_000)).astype(np.uint32))
        spans.append(np.array([[1, 2], [2 + length % 2, length]][: 1 + number % 2], dtype=np.uint32))
    keys = [None if number % 5 == 0 else f"schlüssel {number} \U0001f642" for number in range(count)]
    names = [hashlib.sha256(f"record {number}".encode()).digest() for number in range(count)]
    labels = [{"topic": f"t{number % 7}"} if number % 3 else {} for number in range(count)]
    return leaves.make(names, keys, labels, ids, spans, [number % 4 for number in range(count)], width)


SIZES = {"empty": (0, 2), "one": (1, 2), "narrow": (256, 2), "wide": (256, 4)}


def inside(folder: Path, name: str) -> None:
    """In an environment: make and store the leaves, then read every stored leaf that lies in `folder`."""
    from importlib.metadata import version

    import zstandard

    from repro_assets.data import leaves

    said: dict[str, dict[str, str]] = {"versions": {one: version(one) for one in ("pyarrow", "zstandard", "numpy", "msgspec")}}
    said["versions"]["zstd"] = ".".join(map(str, zstandard.ZSTD_VERSION))
    said["identity"], said["stored"], said["zstandard"] = {}, {}, {}
    for size, how in SIZES.items():
        leaf = leaf_of(*how)
        said["identity"][size] = leaves.identity(leaf)
        stored = leaves.store_form(leaf)
        (folder / f"{name}-{size}.leaf").write_bytes(stored)
        packed = zstandard.ZstdCompressor(level=3).compress(leaves.canonical_bytes(leaf))
        (folder / f"{name}-{size}.zst").write_bytes(packed)
        said["stored"][size] = hashlib.sha256(stored).hexdigest()
        said["zstandard"][size] = hashlib.sha256(packed).hexdigest()
    said["read"] = {}
    for path in sorted(folder.glob("*.leaf")):
        size = path.stem.split("-")[1]
        leaf = leaves.load(path.read_bytes(), said["identity"][size])
        unpacked = zstandard.ZstdDecompressor().decompress(path.with_suffix(".zst").read_bytes())
        same = unpacked == leaves.canonical_bytes(leaf)
        said["read"][path.stem] = leaves.identity(leaf) if same else "zstandard gave other bytes"
    print(json.dumps(said))


def compare(folder: Path) -> bool:
    """Print what is equal and what is not; whether all that must be equal is."""
    said = {}
    with tempfile.TemporaryDirectory() as shared:
        # Twice, so that the first environment reads what the last one stored.
        for name in [*VERSIONS, *VERSIONS]:
            python = environment(folder, VERSIONS[name] + COMMON)
            code = "import sys; from pathlib import Path; from repro_assets_tests.benchmarks import versions; "
            code += "versions.inside(Path(sys.argv[1]), sys.argv[2])"
            run = subprocess.run(
                [str(python), "-c", code, shared, name],
                capture_output=True,
                text=True,
                env=clean(PYTHONPATH=str(ROOT)),
                check=False,
            )
            if run.returncode:
                print(f"{name}: {run.stderr}")
                return False
            said[name] = json.loads(run.stdout)
    first = next(iter(said.values()))
    for name, one in said.items():
        print(f"{name}: " + ", ".join(f"{what} {number}" for what, number in one["versions"].items()))
    good = True
    for size in SIZES:
        same = {what: len({one[what][size] for one in said.values()}) == 1 for what in ("identity", "stored", "zstandard")}
        read = all(one["read"][f"{name}-{size}"] == first["identity"][size] for one in said.values() for name in said)
        good &= same["identity"] and read
        print(
            f"leaf {size}: identity {'equal' if same['identity'] else 'DIFFERS'}, read by all {read}, "
            f"stored Arrow bytes {'equal' if same['stored'] else 'differ'}, zstandard level 3 bytes {'equal' if same['zstandard'] else 'differ'}"
        )
    return good


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "repro-benchmarks")
    return int(not compare(parser.parse_args().folder))


if __name__ == "__main__":
    sys.exit(main())
