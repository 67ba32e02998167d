"""The whole data path in surroundings that differ in everything that must not matter: one set of digests."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy._core import _multiarray_umath as numpy_core

from repro_assets.data import packing, sharding, validation
from repro_assets.data.workers import Ray, Serial, Spawn, Workers
from repro_assets.documents import Records, Shards, ShardsObserved
from repro_assets.recipe import RecordsSection, ShardingSection
from repro_assets.trust.blob import FolderStore
from repro_assets.trust.canonical import digest
from repro_assets_tests.data.material import CHATML, GSM8K, PAIR, Raw, base_model_of, recipe_of

ROOT = Path(__file__).resolve().parents[2]
CLEANING = RecordsSection(sources=(PAIR,))


def raw_in(store: FolderStore) -> Raw:
    """The first 120 real rows in three files, so that there is something to share out."""
    rows = GSM8K.read_bytes().splitlines(keepends=True)[:120]
    return Raw({f"gsm8k-{part}.jsonl": b"".join(rows[40 * part : 40 * part + 40]) for part in range(3)}, store)


def built(
    store: FolderStore, tokenizer_json: bytes, workers: Workers, engine: str = "tokenizers"
) -> tuple[Raw, Records, Shards, ShardsObserved]:
    raw = raw_in(store)
    made = raw.records(CLEANING, target=16, workers=workers)
    model = base_model_of(store, tokenizer_json, CHATML)
    section = ShardingSection(engine=engine)  # type: ignore[arg-type]
    return raw, made, *sharding.build(made, model, section, store, workers=workers)


def path_digests(folder: Path, tokenizer_json: bytes) -> dict[str, str]:
    """Digests of records, shards, report and packing plan, in a store of their own."""
    store = FolderStore(folder)
    raw, made, shards, observed = built(store, tokenizer_json, Serial())
    model = base_model_of(store, tokenizer_json, CHATML)
    how = (raw.snapshot, raw.open, made, shards, observed, model, recipe_of(CLEANING), store)
    first, _observed = validation.build(*how)
    report, _observed = validation.build(*how, reference=first)
    held = [leaf for _entry, leaf in sharding.stored_leaves(shards, observed, store)]
    plan = packing.plan(
        [int(length) for leaf in held for length in leaf.lengths], [name for leaf in held for name in leaf.records], 1024, 7, 0
    )
    return {"records": digest(made), "shards": digest(shards), "report": digest(report), "plan": plan.digest}


def orders() -> dict[str, str]:
    """How numpy orders ties: by default, which depends on the CPU, and stably."""
    ties = (np.frombuffer(hashlib.shake_128(b"ties").digest(20_000), "<u4") % 50).astype(np.int64)
    ways = {"default": np.argsort(ties), "stable": np.argsort(ties, kind="stable")}
    return {name: hashlib.sha256(order.tobytes()).hexdigest() for name, order in ways.items()}


CODE = """
import json, sys, locale, time
from pathlib import Path
from numpy._core._multiarray_umath import __cpu_features__ as features
from repro_assets_tests.data.test_same_digests import orders, path_digests
found = {"locale": locale.setlocale(locale.LC_ALL, ""), "clock": time.strftime("%z"), "hash": hash("a"), "orders": orders()}
found["features"] = [name for name, on in features.items() if on]
found["digests"] = path_digests(Path(sys.argv[1]), Path(sys.argv[2]).read_bytes())
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, tokenizer_json: bytes) -> dict[str, str]:
    return path_digests(tmp_path_factory.mktemp("here"), tokenizer_json)


# numpy calls other code on another CPU: its default argsort orders ties by it. Off means the baseline of the build. The names are those
# of the build: others (AVX512F where it has X86_V4) are ignored with a warning at most.
DISPATCHED = [name for name in numpy_core.__cpu_dispatch__ if numpy_core.__cpu_features__.get(name)]
SURROUNDINGS = {
    "hash seed, zone, C locale, four threads": {
        **{"PYTHONHASHSEED": "1", "TZ": "Pacific/Kiritimati", "LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0"},
        **{"RAYON_NUM_THREADS": "4", "TOKENIZERS_PARALLELISM": "true", "PYTHONCOERCECLOCALE": "0"},
    },
    "baseline CPU, one thread": {
        **{"PYTHONHASHSEED": "2", "TZ": "America/Adak", "LC_ALL": "C.UTF-8", "NPY_DISABLE_CPU_FEATURES": " ".join(DISPATCHED)},
        **{"POLARS_MAX_THREADS": "1", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
    },
}


@pytest.mark.parametrize("name", sorted(SURROUNDINGS))
def test_a_fresh_process_gives_the_same_digests_whatever_surrounds_it(
    expected: dict[str, str], tokenizer_json: bytes, tmp_path: Path, name: str
) -> None:
    """S0.4, S0.9, S0.20, S3.16: hash seed, time zone, locale, threads and CPU level are no part of the result."""
    surroundings = SURROUNDINGS[name]
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json)
    argv = [sys.executable, "-c", CODE, str(tmp_path / "store"), str(tmp_path / "tokenizer.json")]
    run = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT), **surroundings}, check=False)
    assert run.returncode == 0, run.stderr
    said = json.loads(run.stdout)
    assert said["locale"].split("=")[-1].split(";")[0] == surroundings["LC_ALL"]
    assert said["clock"] == {"Pacific/Kiritimati": "+1400", "America/Adak": "-1000"}[surroundings["TZ"]]
    assert said["hash"] != hash("a")
    assert said["orders"]["stable"] == orders()["stable"]
    if "NPY_DISABLE_CPU_FEATURES" in surroundings:
        assert [feature for feature in DISPATCHED if feature in said["features"]] == []
        if "X86_V3" in DISPATCHED:
            assert said["orders"]["default"] != orders()["default"], "the other code of numpy was not called, so nothing was shown"
        else:
            print(f"this CPU has none of numpy's other levels for sorting ({DISPATCHED}): its default order cannot be made to differ")
    assert said["digests"] == expected


@pytest.mark.parametrize("workers", [Spawn(2), Spawn(4), Ray("local", 2)], ids=["2 processes", "4 processes", "Ray"])
def test_the_place_of_the_work_does_not_show(expected: dict[str, str], tokenizer_json: bytes, tmp_path: Path, workers: Workers) -> None:
    """S0.4, S3.16: one, two and four processes and a Ray cluster give one set of digests."""
    _raw, made, shards, _observed = built(FolderStore(tmp_path / "store"), tokenizer_json, workers)
    assert {"records": digest(made), "shards": digest(shards)} == {name: expected[name] for name in ("records", "shards")}


def test_the_engine_shows_in_its_name_only(tokenizer_json: bytes, tmp_path: Path) -> None:
    """S0.20: fastokens makes the leaves of the reference, byte for byte."""
    _raw, _made, slow, slow_observed = built(FolderStore(tmp_path / "slow"), tokenizer_json, Serial())
    _raw, _made, fast, fast_observed = built(FolderStore(tmp_path / "fast"), tokenizer_json, Serial(), "fastokens")
    assert (slow.engine.name, fast.engine.name) == ("tokenizers", "fastokens")
    assert fast.leaves == slow.leaves
    assert fast.engine.canary == slow.engine.canary
    assert fast_observed.stored == slow_observed.stored
