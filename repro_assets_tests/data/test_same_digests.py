"""The whole data path in fresh processes that differ in everything that must not matter: one set of digests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from numpy._core import _multiarray_umath as numpy_core

from repro_assets.data import packing, sharding, validation
from repro_assets.recipe import RecordsSection, ShardingSection
from repro_assets.trust.blob import FolderStore
from repro_assets.trust.canonical import digest
from repro_assets_tests.data.material import CHATML, GSM8K, PAIR, Raw, base_model_of, recipe_of

ROOT = Path(__file__).resolve().parents[2]


def path_digests(folder: Path, tokenizer_json: bytes) -> dict[str, str]:
    """Digests of records, shards, report and packing plan of the first 120 real rows, in a store of their own."""
    store = FolderStore(folder)
    raw = Raw({"gsm8k.jsonl": b"".join(GSM8K.read_bytes().splitlines(keepends=True)[:120])}, store)
    cleaning = RecordsSection(sources=(PAIR,))
    made = raw.records(cleaning, target=16)
    model = base_model_of(store, tokenizer_json, CHATML)
    shards, observed = sharding.build(made, model, ShardingSection(), store)
    how = (raw.snapshot, raw.open, made, shards, observed, model, recipe_of(cleaning), store)
    report, _observed = validation.build(*how, reference=shards)
    held = [leaf for _entry, leaf in sharding.stored_leaves(shards, observed, store)]
    plan = packing.plan(
        [int(length) for leaf in held for length in leaf.lengths], [name for leaf in held for name in leaf.records], 1024, 7, 0
    )
    return {"records": digest(made), "shards": digest(shards), "report": digest(report), "plan": plan.digest}


CODE = """
import json, sys, locale
from pathlib import Path
import numpy
from numpy._core._multiarray_umath import __cpu_features__ as features
from repro_assets_tests.data.test_same_digests import path_digests
locale.setlocale(locale.LC_ALL, "")
found = path_digests(Path(sys.argv[1]), Path(sys.argv[2]).read_bytes())
print(json.dumps({"digests": found, "features": {name: bool(on) for name, on in features.items()}}))
"""


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, tokenizer_json: bytes) -> dict[str, str]:
    return path_digests(tmp_path_factory.mktemp("here"), tokenizer_json)


# numpy calls other code on another CPU: its default argsort orders ties by it. Off means the baseline of the build.
DISPATCHED = [name for name in numpy_core.__cpu_dispatch__ if numpy_core.__cpu_features__.get(name)]


@pytest.mark.parametrize(
    "surroundings",
    [
        {"PYTHONHASHSEED": "1", "TZ": "Pacific/Kiritimati", "LC_ALL": "C", "RAYON_NUM_THREADS": "4", "TOKENIZERS_PARALLELISM": "true"},
        {"PYTHONHASHSEED": "2", "TZ": "America/Adak", "NPY_DISABLE_CPU_FEATURES": " ".join(DISPATCHED), "POLARS_MAX_THREADS": "1"},
    ],
    ids=["four threads", "baseline CPU"],
)
def test_a_fresh_process_gives_the_same_digests_whatever_surrounds_it(
    expected: dict[str, str], tokenizer_json: bytes, tmp_path: Path, surroundings: dict[str, str]
) -> None:
    """S0.4, S0.9, S0.20, S3.16: hash seed, time zone, locale, threads and CPU level are no part of the result."""
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json)
    argv = [sys.executable, "-c", CODE, str(tmp_path / "store"), str(tmp_path / "tokenizer.json")]
    run = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT), **surroundings}, check=False)
    assert run.returncode == 0, run.stderr
    said = json.loads(run.stdout)
    if "NPY_DISABLE_CPU_FEATURES" in surroundings:
        assert [name for name in DISPATCHED if said["features"][name]] == []
    assert said["digests"] == expected
