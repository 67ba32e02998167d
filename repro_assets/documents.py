"""The frozen documents that assets return: what each stage says, and nothing about how it came to say it.

A document has two halves. The *content* (asset, schema, inputs, section, result) must come out the same again; the SHA-256 of its
canonical JSON is the asset's data version and also the blob that holds it. The *observed* half may differ between two honest runs and
is stored beside it. Building, reading and committing documents is `stage.py`; what their blobs hold is said in the pure packages.
"""

from typing import Any, ClassVar, Generic, TypeVar

import msgspec

from repro_assets.trust.blob import Blob
from repro_assets.trust.canonical import canonical, sha256


class DocumentError(Exception):
    """A document that cannot be read; the message names the asset, the field and the reason."""


class Value(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every value inside a document: frozen, strict, without defaults that hide a missing fact."""


class Result(Value):
    """The asset's own facts, part of the content. Raise `schema` when a field changes its meaning, comes or goes."""

    asset: ClassVar[str]
    schema: ClassVar[int] = 1

    def files(self) -> dict[str, Blob]:
        """Readable names, relative to the asset's folder in lakeFS, of the blobs that the content names."""
        return {}


class Observed(Value):
    """Facts that may differ between two honest runs. Never digested."""

    def files(self) -> dict[str, Blob]:
        """Readable names of blobs that belong to the run rather than to the content."""
        return {}


R = TypeVar("R", bound=Result)
Seen = TypeVar("Seen", bound=Observed)


class Made(Value):
    """How a document came to be in one run. `key` and `components`: what the memo compared; `sources`: module to SHA-256 of its code."""

    key: str
    components: dict[str, Any]
    sources: dict[str, str]
    reused: bool
    run: str
    at: str
    host: str
    actor: str


class Document(msgspec.Struct, Generic[R, Seen], frozen=True, kw_only=True):
    """One asset in one snapshot. `inputs` maps a name (an upstream asset, or a reference such as `baseline`) to a content digest."""

    inputs: dict[str, str]
    section: dict[str, Any]
    result: R
    observed: Seen
    made: Made

    def content(self) -> bytes:
        """Canonical JSON of the half that must come out the same again."""
        kind = type(self.result)
        return canonical(
            {"asset": kind.asset, "schema": kind.schema, "inputs": self.inputs, "section": self.section, "result": self.result}
        )

    def beside(self) -> bytes:
        """Canonical JSON of the observed half, as `observed.json` holds it."""
        return canonical({"made": self.made, "observed": self.observed})

    @property
    def digest(self) -> str:
        """SHA-256 of the content: the asset's data version, and the name of the blob that holds `document.json`."""
        return sha256(self.content())

    def files(self) -> dict[str, Blob]:
        """Every blob of this document under its readable name; the observed half may not shadow the content."""
        content, observed = self.result.files(), self.observed.files()
        if shared := content.keys() & observed.keys():
            raise DocumentError(f"{type(self.result).asset}: {sorted(shared)} named by both halves of the document")
        return dict(sorted({**content, **observed}.items()))


def parse(kind: type[R], observed: type[Seen], content: bytes, beside: bytes) -> Document[R, Seen]:
    """The document in `content` (document.json) and `beside` (observed.json).

    Raises DocumentError naming the asset and the field for an unknown field, a wrong type, another asset or a schema of the future.
    """
    inputs, section, result = parse_content(kind, content)
    raw = _json(kind, "observed.json", beside, ("made", "observed"))
    try:
        return Document(
            inputs=inputs,
            section=section,
            result=result,
            observed=msgspec.convert(raw["observed"], observed),
            made=msgspec.convert(raw["made"], Made),
        )
    except (msgspec.ValidationError, ValueError) as error:
        raise DocumentError(f"{kind.asset}: observed.json: {error}; materialize {kind.asset} again") from error


def parse_content(kind: type[R], content: bytes) -> tuple[dict[str, str], dict[str, Any], R]:
    """(inputs, section, result) of a document.json. Raises DocumentError as `parse` does."""
    raw = _json(kind, "document.json", content, ("asset", "inputs", "result", "schema", "section"))
    if raw["asset"] != kind.asset:
        raise DocumentError(f"{kind.asset}: field `asset`: this is the document of {raw['asset']!r}")
    if type(raw["schema"]) is int and raw["schema"] > kind.schema:
        raise DocumentError(
            f"{kind.asset}: field `schema` is {raw['schema']}, written by a newer version of this project; this one knows {kind.schema}. Upgrade to read it"
        )
    if raw["schema"] != kind.schema:
        raise DocumentError(
            f"{kind.asset}: field `schema` is {raw['schema']!r}, this version writes {kind.schema}. Materialize {kind.asset} again"
        )
    try:
        return (
            msgspec.convert(raw["inputs"], dict[str, str]),
            msgspec.convert(raw["section"], dict[str, Any]),
            msgspec.convert(raw["result"], kind),
        )
    except (msgspec.ValidationError, ValueError) as error:
        raise DocumentError(f"{kind.asset}: document.json: {error}; materialize {kind.asset} again") from error


def _json(kind: type[Result], name: str, data: bytes, fields: tuple[str, ...]) -> dict[str, Any]:
    try:
        raw = msgspec.json.decode(data)
    except msgspec.DecodeError as error:
        raise DocumentError(f"{kind.asset}: {name} is not JSON: {error}; materialize {kind.asset} again") from error
    if not isinstance(raw, dict) or sorted(raw) != sorted(fields):
        found = sorted(raw) if isinstance(raw, dict) else type(raw).__name__
        raise DocumentError(f"{kind.asset}: {name} has the fields {', '.join(fields)}; this one has {found}")
    return raw


# --- raw_snapshot -------------------------------------------------------------------------------------------------------------------


class RawFile(Value):
    """One raw object: its path on the raw branch, SHA-256, size in bytes, and format by suffix (jsonl, parquet, ... or other)."""

    path: str
    sha256: str
    size: int
    format: str


class RawSnapshot(Result):
    """The raw data at one commit. `manifest` is the canonical list of {path, sha256, size}; its digest is the content identity."""

    asset: ClassVar[str] = "raw_snapshot"
    manifest: Blob
    files_listed: tuple[RawFile, ...]
    size: int

    def files(self) -> dict[str, Blob]:
        return {"manifest.json": self.manifest}


class RawObserved(Observed):
    """`first_seen`: path to the raw commit that brought the object as it is now. `window`: oldest and newest of those commits, UTC."""

    commit: str
    first_seen: dict[str, str]
    window: tuple[str, str]
    seconds: float


# --- base_model and eval_suites (shared, not partitioned) ----------------------------------------------------------------------------


class BaseModel(Result):
    """A frozen base model. `tokenizer` and `template` are digests of what tokenising depends on. `floor`: oldest loader versions."""

    asset: ClassVar[str] = "base_model"
    model_files: dict[str, Blob]
    architecture: str
    parameters: int
    vocabulary: int
    tokenizer: str
    template: str
    source: dict[str, str]
    license: str
    floor: dict[str, str]

    def files(self) -> dict[str, Blob]:
        return {f"files/{name}": blob for name, blob in self.model_files.items()}


class Suite(Value):
    """One evaluation suite: lm-eval YAML and JSONL by digest. `tasks`: task names in it. `labels`: slice label to its values."""

    name: str
    suite_files: dict[str, Blob]
    tasks: tuple[str, ...]
    items: int
    labels: dict[str, dict[str, int]]
    digest: str


class EvalSuites(Result):
    """The suites that models are scored on. `prompts` is a JSONL blob of normalised item texts for the contamination check."""

    asset: ClassVar[str] = "eval_suites"
    suites: tuple[Suite, ...]
    prompts: Blob

    def files(self) -> dict[str, Blob]:
        named = {f"{suite.name}/{name}": blob for suite in self.suites for name, blob in suite.suite_files.items()}
        return {**named, "prompts.jsonl": self.prompts}


class SharedObserved(Observed):
    """Where a shared asset was read from on this machine, and how long it took (seconds)."""

    origin: str
    seconds: float


# --- records ------------------------------------------------------------------------------------------------------------------------


class SourceCount(Value):
    """Rows of one source of the recipe (`match`): read = kept + quarantined + duplicates + near_duplicates + contaminated + sensitive +
    unsampled (left out by weight or quota). `augmented` copies come on top of `kept`."""

    match: str
    license: str
    date: str | None
    files: int
    read: int
    kept: int
    quarantined: int
    duplicates: int
    near_duplicates: int
    contaminated: int
    sensitive: int
    unsampled: int
    augmented: int


class RecordLeaf(Value):
    """A run of records of one split in canonical order: canonical JSON lines in a blob whose digest is the leaf's identity.

    `lines`: SHA-256 of the SHA-256 digests of its lines, by which an unchanged leaf is known without its text."""

    split: str
    blob: Blob
    records: int
    lines: str


class Records(Result):
    """Cleaned, deduplicated, split records. `index`: raw path to the blob that says where each record came from, in
    fixed-width rows (`data.records.PLACE`).

    `cleaned`: rows changed by each cleaning step. `sensitive`: records by kind of secret or personal data found; `flagged` lists them by
    id, never by value. `clusters`: near duplicates, one JSON line a cluster: the record that stayed and those that went.
    """

    asset: ClassVar[str] = "records"
    schema: ClassVar[int] = 2
    sources: tuple[SourceCount, ...]
    reasons: dict[str, int]
    cleaned: dict[str, int]
    sensitive: dict[str, int]
    leaves: tuple[RecordLeaf, ...]
    index: dict[str, Blob]
    quarantine: Blob
    flagged: Blob
    clusters: Blob
    splits: dict[str, int]
    slices: dict[str, dict[str, int]]

    def files(self) -> dict[str, Blob]:
        leaves = {f"leaves/{leaf.split}/{n:05d}-{leaf.blob.sha256[:12]}.jsonl": leaf.blob for n, leaf in enumerate(self.leaves)}
        index = {f"index/{path}.bin": blob for path, blob in self.index.items()}
        beside = {"quarantine.jsonl": self.quarantine, "flagged.jsonl": self.flagged, "clusters.jsonl": self.clusters}
        return {**leaves, **index, **beside}


class FilePart(Value):
    """A run of rows of one raw file as they were parsed: `columns` (digests, places, counts), and `text` (their leaf lines) when the rows
    were parsed on another machine."""

    rows: int
    columns: Blob
    text: Blob | None


class ParsedFile(Value):
    """What parsing a raw file gave, kept so that an unchanged file is not parsed again, nor an unchanged row of a changed one. `made_from`:
    digest of the file's own SHA-256 and of all that parsing depends on beside the section and the code; `items`: of the evaluation items
    among that."""

    made_from: str
    items: str
    parts: tuple[FilePart, ...]


class Since(Value):
    """What changed since the records made before under the same section: (added, removed, changed) files and records, (added, removed)
    leaves, and by slice label and value (before, now)."""

    files: tuple[int, int, int]
    leaves: tuple[int, int]
    records: tuple[int, int, int]
    slices: dict[str, dict[str, tuple[int, int]]]


class RecordsObserved(Observed):
    """How long reading took (seconds), megabytes of raw data a second; leaves that were there before; files parsed and taken over.

    `since`: null when there were no records before."""

    seconds: float
    megabytes_per_second: float
    leaves_known: int
    leaves_new: int
    files_parsed: int
    files_known: int
    parsed: dict[str, ParsedFile]
    since: Since | None

    def files(self) -> dict[str, Blob]:
        parts = {f"parsed/{path}/{number:05d}": part for path, file in self.parsed.items() for number, part in enumerate(file.parts)}
        named = {f"{name}.columns": part.columns for name, part in parts.items()}
        return {**named, **{f"{name}.text": part.text for name, part in parts.items() if part.text is not None}}


# --- shards -------------------------------------------------------------------------------------------------------------------------


class Engine(Value):
    """The tokenizer library that made the ids; `canary` is the digest of the ids of fixed strings. `gate`: how another engine than the
    reference was held against it, or why the reference is used instead; null where none was asked for."""

    name: str
    version: str
    canary: str
    gate: str | None = None


class TokenLeaf(Value):
    """The tokens of one record leaf (`source`). `sha256` is over the canonical uncompressed bytes, never over the stored form.

    `lengths`, `slices` and `cut_*` are the leaf's share of the totals, so that a leaf taken over need not be read. `untrained`: records
    of the source that have no trained token and are not in the leaf.
    """

    split: str
    source: str
    sha256: str
    records: int
    tokens: int
    trained: int
    lengths: dict[str, int]
    slices: dict[str, dict[str, int]]
    cut_records: int
    cut_tokens: int
    untrained: tuple[str, ...]


class Shards(Result):
    """Tokenised records. `lengths`: records by token count, keyed by the lower edge of a power of two. `truncated_*`: what was cut.

    `quarantine`: one JSON line for every record that is left out, with the reason."""

    asset: ClassVar[str] = "shards"
    schema: ClassVar[int] = 2
    leaves: tuple[TokenLeaf, ...]
    engine: Engine
    tokenizer: str
    template: str
    width: int
    tokens: dict[str, int]
    trained: dict[str, int]
    records: dict[str, int]
    lengths: dict[str, int]
    slices: dict[str, dict[str, int]]
    truncated_records: int
    truncated_tokens: int
    untrained_records: int
    quarantine: Blob

    def files(self) -> dict[str, Blob]:
        return {"quarantine.jsonl": self.quarantine}


class ShardsObserved(Observed):
    """`stored`: leaf identity to the blob of its Arrow IPC form (zstd bytes move with the library). Counts say what was reused."""

    stored: dict[str, Blob]
    leaves_reused: int
    leaves_new: int
    records_new: int
    tokens_new: int
    seconds: float

    def files(self) -> dict[str, Blob]:
        return {f"leaves/{leaf}.arrow": blob for leaf, blob in self.stored.items()}


# --- validation_report --------------------------------------------------------------------------------------------------------------


class Rule(Value):
    """One check. `verdict`: pass, warn, fail or none (nothing to compare with yet). `effect` and `limit` in the rule's own unit; null where it
    has none. `group`: what is judged: records, totals, sample, drift or expectations."""

    group: str
    name: str
    verdict: str
    effect: float | None
    limit: float | None
    detail: str


class Reproduction(Value):
    """Records drawn by keyed hash, rebuilt from raw, and how many came out equal. `differing` names up to ten that did not."""

    drawn: int
    equal: int
    differing: tuple[str, ...]


class ValidationReport(Result):
    """Every rule with its verdict. `verdict` is the worst of them. `report` holds histograms and failing rows as JSON, `page` the same as one
    HTML page. `distributions` (name to bin to records or tokens) and `words` (hashed n-gram counts of drawn records) are what a later
    snapshot is compared with. `suite`: the Great Expectations suite that was run, if the recipe names one."""

    asset: ClassVar[str] = "validation_report"
    schema: ClassVar[int] = 2
    verdict: str
    rules: tuple[Rule, ...]
    reproduction: Reproduction
    distributions: dict[str, dict[str, int]]
    words: Blob
    report: Blob
    page: Blob
    suite: Blob | None

    def files(self) -> dict[str, Blob]:
        suite = {"expectations.json": self.suite} if self.suite else {}
        return {"report.json": self.report, "report.html": self.page, "words.bin": self.words, **suite}


class ValidationObserved(Observed):
    """`p_values` are printed, never gated on. `seconds` of the whole validation."""

    p_values: dict[str, float]
    seconds: float


# --- training_bundle ----------------------------------------------------------------------------------------------------------------


class TrainingBundle(Result):
    """The statement that pins everything. `statement` is its canonical JSON without run details; training verifies the envelope."""

    asset: ClassVar[str] = "training_bundle"
    statement: Blob
    subjects: int
    dependencies: tuple[str, ...]

    def files(self) -> dict[str, Blob]:
        return {"statement.json": self.statement}


class BundleObserved(Observed):
    """The signed envelope, who signed it, and the environment it was signed in."""

    envelope: Blob
    key_id: str
    environment: Blob
    lock: Blob | None
    git: dict[str, str]

    def files(self) -> dict[str, Blob]:
        lock = {"requirements.lock": self.lock} if self.lock else {}
        return {"bundle.dsse.json": self.envelope, "environment.json": self.environment, **lock}


# --- qlora_checkpoint ---------------------------------------------------------------------------------------------------------------


class Checkpoint(Value):
    """A saved training state. `tensors`: digest of the adapter's tensors at `step`. `validation_loss`: mean nats a trained token, or null."""

    step: int
    manifest: Blob
    tensors: str
    validation_loss: float | None


class QloraCheckpoint(Result):
    """A trained adapter. `adapter`: released files by name (the best step's). `ledger`: per-step facts. `quantised_base`: digest before = after."""

    asset: ClassVar[str] = "qlora_checkpoint"
    adapter: dict[str, Blob]
    tensors: str
    steps: int
    best_step: int
    ledger: Blob
    checkpoints: tuple[Checkpoint, ...]
    quantised_base: str
    plan: str
    compute_dtype: str
    hardware: str

    def files(self) -> dict[str, Blob]:
        return {**{f"adapter/{name}": blob for name, blob in self.adapter.items()}, "ledger.jsonl": self.ledger}


class CheckpointObserved(Observed):
    """How the run went: speed, GPU- or CPU-hours by use, where it ran, the lakeFS commit of every checkpoint."""

    timings: Blob
    envelope: Blob
    tokens_per_second: float
    steps_per_second: float
    seconds: float
    device_hours: dict[str, float]
    world_size: int
    backend: str
    job: str
    attempts: int
    commits: dict[str, str]
    losses: tuple[tuple[int, float], ...]
    validation: tuple[tuple[int, float], ...]

    def files(self) -> dict[str, Blob]:
        return {"timings.jsonl": self.timings, "checkpoint.dsse.json": self.envelope}


# --- eval_results -------------------------------------------------------------------------------------------------------------------


class Score(Value):
    """Items of one slice and how many each model got right."""

    items: int
    correct: int
    baseline_correct: int


class SuiteScore(Value):
    """One task of one suite. `slices`: label to value to Score; the label `overall` has the one value `all`."""

    suite: str
    task: str
    metric: str
    slices: dict[str, dict[str, Score]]


class EvalResults(Result):
    """Candidate and baseline scored in one process. `samples`: JSONL with one row an item (id, cluster, slices, both answers and scores)."""

    asset: ClassVar[str] = "eval_results"
    scores: tuple[SuiteScore, ...]
    samples: Blob
    candidate: str
    baseline: str
    hardware: str
    compute_dtype: str
    batch_size: int

    def files(self) -> dict[str, Blob]:
        return {"samples.jsonl": self.samples}


class EvalObserved(Observed):
    """Signed test-result envelope, speed, and what the scoring process needed (bytes, seconds, latency percentiles in milliseconds)."""

    envelope: Blob
    seconds: float
    job: str
    attempts: int
    peak_memory: int
    latency: dict[str, float]

    def files(self) -> dict[str, Blob]:
        return {"evaluation.dsse.json": self.envelope}


# --- promotion ----------------------------------------------------------------------------------------------------------------------


class GateVerdict(Value):
    """One gate on one slice. `difference`, `low`, `high`: candidate minus baseline as a share of items, with the interval's bounds.

    `verdict`: non_inferior, inconclusive or regressed. `detectable`: smallest margin that the suite's size resolves with 80 % power.
    """

    gate: str
    suite: str
    label: str
    value: str
    level: str
    verdict: str
    items: int
    candidate: float
    baseline: float
    difference: float
    low: float
    high: float
    margin: float
    detectable: float
    p_value: float
    detail: str


class Promotion(Result):
    """The gates' verdict on one checkpoint. `decision`: promote, hold, rollback or retrain. `policy`: digest of the gates section."""

    asset: ClassVar[str] = "promotion"
    decision: str
    reasons: tuple[str, ...]
    verdicts: tuple[GateVerdict, ...]
    policy: str
    adapter: str


class PromotionObserved(Observed):
    """What was done about the decision. `release`: number on main, or null. `failure`: bundle of flipped items and one command."""

    acted: str
    release: int | None
    release_commit: str | None
    envelope: Blob
    failure: Blob | None
    notice: str | None

    def files(self) -> dict[str, Blob]:
        failure = {"failure.json": self.failure} if self.failure else {}
        return {"decision.dsse.json": self.envelope, **failure}


#: asset name -> (result type, observed type), in graph order
KINDS: dict[str, tuple[type[Result], type[Observed]]] = {
    kind.asset: (kind, observed)
    for kind, observed in (
        (BaseModel, SharedObserved),
        (EvalSuites, SharedObserved),
        (RawSnapshot, RawObserved),
        (Records, RecordsObserved),
        (Shards, ShardsObserved),
        (ValidationReport, ValidationObserved),
        (TrainingBundle, BundleObserved),
        (QloraCheckpoint, CheckpointObserved),
        (EvalResults, EvalObserved),
        (Promotion, PromotionObserved),
    )
}
