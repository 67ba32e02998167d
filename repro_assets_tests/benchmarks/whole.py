"""Our whole way from JSONL files to token leaves in a folder store, as the benchmarks call it: hashes, traces and masks included."""

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from repro_assets.data import manifest, records, sharding
from repro_assets.data.workers import WORTHWHILE, Serial, Spawn
from repro_assets.documents import BaseModel, RawFile
from repro_assets.recipe import RecordsSection, ShardingSection, Source
from repro_assets.trust.blob import FolderStore
from repro_assets.trust.canonical import sha256
from repro_assets_tests.benchmarks import corpus as corpora

CHAT = Source(match="**", shape="messages", fields={"id": "id"}, slices={"topic": "topic"})


@dataclass(frozen=True)
class Files:
    """Opens the raw files of a folder; pickles."""

    folder: Path

    def __call__(self, file: RawFile) -> BinaryIO:
        return (self.folder / file.path).open("rb")


def hashed(path: Path) -> str:
    import hashlib

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def base_model(store: FolderStore, files: dict[str, bytes]) -> BaseModel:
    return BaseModel(
        model_files={name: store.put_bytes(data) for name, data in files.items()},
        architecture="LlamaForCausalLM",
        parameters=1,
        vocabulary=1 << 16,
        tokenizer=sha256(files["tokenizer.json"]),
        template=sha256(files["chat_template.jinja"]),
        source={"kind": "folder"},
        license="Apache-2.0",
        floor={},
    )


def shards_of(corpus: Path, tokenizer: Path, out: Path, workers: int, engine: str) -> int:
    """Number of tokens in the shards. `tokenizer`: a folder with tokenizer.json."""
    store = FolderStore(out / "store")
    files = corpora.tokenizer_files((tokenizer / "tokenizer.json").read_bytes(), corpora.CHATML)
    listed = [
        RawFile(path.name, hashed(path), path.stat().st_size, manifest.format_of(path.name)) for path in sorted(corpus.glob("*.jsonl"))
    ]
    snapshot = manifest.build(listed, store)
    # As the assets choose: small inputs are not worth a process.
    size = sum(file.size for file in listed)
    places = [Spawn(workers) if workers > 1 and size >= least else Serial() for least in (WORTHWHILE, sharding.WORTHWHILE[engine])]
    section = RecordsSection(sources=(CHAT,))
    made, _observed = records.build(snapshot, Files(corpus), b"", section, store, workers=places[0])
    model = base_model(store, files)
    sharding_section = ShardingSection(max_tokens=1 << 16, engine=engine)  # type: ignore[arg-type]
    shards, _observed_shards = sharding.build(made, model, sharding_section, store, workers=places[1])
    if shards.engine.name != engine:
        raise SystemExit(str(shards.engine.gate))
    return sum(shards.tokens.values())
