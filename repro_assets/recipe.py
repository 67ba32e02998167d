"""The recipe: everything a human chooses, as strict typed sections, and the loader that turns one YAML file into them.

Where things run (ranks, backends, servers) is not here: it is never part of an identity.
"""

import difflib
import re
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, Literal

import msgspec
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError

from repro_assets.trust.canonical import digest


class RecipeError(Exception):
    """A recipe that cannot be used; the message names the file, the line, the key and the remedy."""


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every part of a recipe: frozen, unknown keys refused, every default visible in `repro recipe show`."""

    def identity(self) -> dict[str, Any]:
        """The values that identities are made of: every field, defaults written out."""
        return msgspec.to_builtins(self)

    def digest(self) -> str:
        return digest(self.identity())


class RawSection(Section):
    """Which raw paths belong to this recipe: glob patterns (`**` crosses folders) against the path on the raw branch."""

    include: tuple[str, ...] = ("**",)
    exclude: tuple[str, ...] = ()


class Source(Section):
    """How the files that match are read. `shape` names the row: chat messages, a prompt and its completion, an instruction with its input
    and output, a preference pair (the chosen side is kept), or raw text.

    `fields` maps our names (messages, prompt, completion, chosen, instruction, input, output, text, system, id) to the row's; a dotted name
    reaches into nested rows. `slices` maps a label to the field that holds its value. `license` is an SPDX identifier, `date` the day the
    data was acquired (YYYY-MM-DD). `weight`: share of its records kept, drawn by keyed hash. `quota`: at most that many records, those
    with the lowest keyed hash. `record`: what one record is in a plain text file.
    """

    match: str
    shape: Literal["messages", "prompt_completion", "instruction", "preference", "text"]
    fields: dict[str, str] = {}
    slices: dict[str, str] = {}
    license: str = "NOASSERTION"
    date: str | None = None
    weight: float = 1.0
    quota: int | None = None
    record: Literal["file", "line", "paragraph"] = "line"


class Split(Section):
    """Share of records held out for validation, drawn by keyed hash of the record id, so that no record changes side."""

    validation: float = 0.05
    key: str = "split"


class NearDuplicates(Section):
    """Near duplicates by one-permutation MinHash of hashed word n-grams. `words`: words in an n-gram. A pair that shares one of `bands`
    bands of `rows` values, and whose estimated Jaccard similarity is at least `similarity`, is one cluster; one record of it stays."""

    words: int = 5
    bands: int = 14
    rows: int = 8
    similarity: float = 0.7


class Augmentation(Section):
    """Altered copies of training records beside the originals: a pure function of the record, drawn by keyed hash for `share` of them."""

    kind: Literal["lowercase", "typos", "spaces"]
    share: float = 0.1
    seed: int = 0


class RecordsSection(Section):
    """Cleaning. `quarantine_limit`: share of rows read that may be bad before the asset stops. `row_limit`: bytes of one row, and
    `row_group_limit` of one Parquet row group, uncompressed.

    Texts: `normalize` Unicode; `controls: drop` takes out control characters and bidirectional overrides (tabs and line ends stay);
    `whitespace: trim` at the ends of a text, `collapse` also runs of spaces inside a line.
    `contamination` drops records whose prompt is an evaluation item: `exact` compares texts (NFC, case and spaces folded), `ngram` also
    finds items of which `contamination_share` of the word n-grams (`contamination_words` words) occur in the record.
    `secrets` and `personal`: `flag` counts and lists records, `mask` replaces what was found, `drop` takes the record out.
    `order` of the leaves: by path and position, or by key hash for sources that arrive reshuffled; `target`: records a leaf, on average.
    """

    sources: tuple[Source, ...]
    normalize: Literal["NFC", "none"] = "NFC"
    controls: Literal["drop", "keep"] = "drop"
    whitespace: Literal["keep", "trim", "collapse"] = "keep"
    duplicates: Literal["drop", "keep"] = "drop"
    near_duplicates: NearDuplicates | None = None
    contamination: Literal["exact", "ngram", "off"] = "exact"
    contamination_words: int = 13
    contamination_share: float = 0.5
    secrets: Literal["off", "flag", "mask", "drop"] = "off"
    personal: Literal["off", "flag", "mask", "drop"] = "off"
    augment: tuple[Augmentation, ...] = ()
    quarantine_limit: float = 0.01
    row_limit: int = 16 * 1024 * 1024
    row_group_limit: int = 256 * 1024 * 1024
    split: Split = Split()
    order: Literal["path", "key_hash"] = "path"
    target: int = 256


class ShardingSection(Section):
    """Rendering and tokenising. `max_tokens`: longer records are cut and counted. `engine: fastokens` is used where it gives the ids of the
    reference on the fuzz set, the canary and 1 % of the records; elsewhere the reference (`tokenizers`) is, and the page says so."""

    max_tokens: int = 2048
    engine: Literal["tokenizers", "fastokens"] = "tokenizers"
    train_on: Literal["assistant", "last_assistant"] = "assistant"


class Drift(Section):
    """Limits on effect size against the last promoted snapshot: population stability index, Jensen-Shannon distance, and how well a
    classifier tells the records of the two snapshots apart by their words (`auc`: 0.5 not at all, 1 always). `sample`: records a side,
    drawn by keyed hash, that the classifier sees."""

    psi_warn: float = 0.1
    psi_fail: float = 0.25
    js_warn: float = 0.1
    js_fail: float = 0.2
    auc_warn: float = 0.65
    auc_fail: float = 0.8
    sample: int = 2000


class Range(Section):
    """Values that a column may have, both ends included. `allowed`: share of records outside that is a warning rather than a failure."""

    min: int | None = None
    max: int | None = None
    allowed: float = 0.0


class Language(Section):
    """ISO 639-1 codes of the languages records may be in, and the least share of those drawn (`sample`) that must be in one of them."""

    expected: tuple[str, ...]
    minimum: float = 0.9
    sample: int = 2000


#: columns of the record frame that `validation.ranges` can limit
RANGED = ("tokens", "trained", "cut", "characters", "turns", "longest_turn")


class ValidationSection(Section):
    """Rules on the shards. Lengths in tokens, shares in 0..1. `reproduce`: records rebuilt from raw and compared.

    `ranges`: column (tokens, trained, cut, characters, turns, longest_turn) to its limits. `slices`: label that every record must have, to
    its allowed values (none listed: any). `roundtrip`: records whose ids are decoded and encoded again; `max_roundtrip`: share of them
    that may come out differently. `expectations`: a Great Expectations suite as JSON, relative to the recipe.
    """

    min_records: int = 1
    min_tokens: int = 2
    max_truncated: float = 0.02
    min_trained: float = 0.01
    ranges: dict[str, Range] = {}
    slices: dict[str, tuple[str, ...]] = {}
    language: Language | None = None
    roundtrip: int = 1000
    max_roundtrip: float = 0.01
    expectations: str | None = None
    drift: Drift = Drift()
    reproduce: int = 3000

    def identity(self) -> dict[str, Any]:
        """Without `expectations`: where the suite lies identifies nothing; its bytes are in the memo key and in the report."""
        return {key: value for key, value in msgspec.to_builtins(self).items() if key != "expectations"}


class BaseModelSection(Section):
    """A local folder (`path`, relative to the recipe), or a hub id (`repo`) with its full commit hash (`revision`)."""

    path: str | None = None
    repo: str | None = None
    revision: str | None = None
    license: str = "NOASSERTION"

    def identity(self) -> dict[str, Any]:
        """Without `path`: where a folder lies on one machine identifies nothing; its files' digests do."""
        return {key: value for key, value in msgspec.to_builtins(self).items() if key != "path"}


class Lora(Section):
    """The adapter. `targets`: `all-linear` or names of modules."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"


class TrainingSection(Section):
    """One training. A step is `micro_batches` forward passes of `rows` packed rows of `row_tokens` tokens, summed in order.

    `steps`: null means whole epochs. `checkpoint_every` and `validate_every` in steps; `keep`: checkpoints linked beside the best one.
    `compute_dtype: auto` is bfloat16 where the hardware has it, else float32; the choice is part of the checkpoint's content.
    """

    seed: int = 7
    epochs: int = 1
    steps: int | None = None
    row_tokens: int = 2048
    rows: int = 1
    micro_batches: int = 8
    learning_rate: float = 2e-4
    warmup: float = 0.1
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: float = 0.0
    clip: float = 1.0
    lora: Lora = Lora()
    quantization: Literal["nf4", "none"] = "nf4"
    double_quant: bool = True
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    activation_checkpointing: bool = False
    checkpoint_every: int = 500
    validate_every: int = 500
    validation_rows: int = 64
    keep: int = 2


class SuiteSource(Section):
    """A folder of lm-eval YAML and JSONL (`path`, relative to the recipe). `labels`: item fields that are slices. `cluster`: item field
    whose equal values share a source. `prompt`: item field that the contamination check compares."""

    name: str
    path: str
    labels: tuple[str, ...] = ()
    cluster: str | None = None
    prompt: str = "prompt"

    def identity(self) -> dict[str, Any]:
        return {key: value for key, value in msgspec.to_builtins(self).items() if key != "path"}


class EvaluationSection(Section):
    """What is scored. `batch_size` is part of the identity: it moves log-probabilities."""

    suites: tuple[SuiteSource, ...]
    batch_size: int = 32
    seed: int = 1234

    def identity(self) -> dict[str, Any]:
        return {**msgspec.to_builtins(self), "suites": [suite.identity() for suite in self.suites]}


class Gate(Section):
    """One rule of the policy. `label: overall` gates the whole suite, another label each of its values (or only those in `values`).

    `margin`: share of items the candidate may lose to the baseline. `minimum`: share it must reach whatever the baseline has.
    """

    name: str
    suite: str
    task: str | None = None
    label: str = "overall"
    values: tuple[str, ...] | None = None
    margin: float = 0.05
    minimum: float | None = None
    alpha: float = 0.05
    level: Literal["hard", "soft"] = "hard"


class GatesSection(Section):
    """The promotion policy. `on_regressed`: what a hard gate that fails asks for."""

    gates: tuple[Gate, ...]
    on_regressed: Literal["hold", "rollback", "retrain"] = "hold"


class Recipe(Section, kw_only=True):
    """One recipe. `name` is a folder name in lakeFS and never part of an identity."""

    name: str
    description: str = ""
    raw: RawSection = RawSection()
    base_model: BaseModelSection
    records: RecordsSection
    sharding: ShardingSection = ShardingSection()
    validation: ValidationSection = ValidationSection()
    training: TrainingSection = TrainingSection()
    evaluation: EvaluationSection
    gates: GatesSection

    def identity(self) -> dict[str, Any]:
        sections = ("raw", "base_model", "records", "sharding", "validation", "training", "evaluation", "gates")
        return {name: getattr(self, name).identity() for name in sections}


class Loaded(msgspec.Struct, frozen=True):
    """A recipe and the file it came from; relative paths in it start at the file's folder."""

    recipe: Recipe
    path: Path

    def folder(self, relative: str) -> Path:
        return (self.path.parent / relative).resolve()


NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


def shipped(name: str) -> Path | None:
    """The file of a recipe that comes with the package, by its name; None for anything else."""
    path = Path(__file__).parent / "recipes" / f"{name}.yaml"
    return path if NAME.fullmatch(name) and path.exists() else None


def load(path: Path | str) -> Loaded:
    """The recipe in one YAML file. Raises RecipeError naming file, line, key and remedy."""
    path = Path(path).resolve()
    try:
        tree = YAML(typ="rt", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe; name a YAML file with --recipe or REPRO_RECIPE") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"{path}:{line}: not YAML: {error.problem}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}:1: a recipe is a mapping of sections; start from `repro recipe show`")
    try:
        recipe = msgspec.convert(_plain(tree), Recipe, strict=True)
    except msgspec.ValidationError as error:
        raise RecipeError(_explain(path, tree, str(error))) from None
    _check(path, tree, recipe)
    return Loaded(recipe, path)


def _plain(value: Any) -> Any:
    """ruamel's marked containers and scalars as builtins, so that msgspec's strict conversion sees true types."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value


def _explain(path: Path, tree: Any, message: str) -> str:
    """msgspec's message with the line of the key it speaks of, and the nearest known key for an unknown one."""
    where = re.search(r" - at `\$(.*)`$", message)
    steps = re.findall(r"\.([A-Za-z_]\w*)|\[(\d+)\]", where.group(1)) if where else []
    keys: list[str | int] = [name if name else int(index) for name, index in steps]
    said = message[: where.start()] if where else message
    if unknown := re.search(r"unknown field `(.*)`", said):
        name = unknown.group(1)
        known = _known(keys)
        near = difflib.get_close_matches(name, known, 1, 0.5)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        return f"{path}:{_line(tree, [*keys, name])}: unknown key `{_dotted([*keys, name])}`{hint} Known here: {', '.join(known)}"
    return f"{path}:{_line(tree, keys)}: `{_dotted(keys) or 'recipe'}`: {said}"


def _dotted(keys: list[str | int]) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).lstrip(".")


def _line(tree: Any, keys: list[str | int]) -> int:
    """1-based line of the deepest of `keys` that the YAML tree has."""
    line = 1
    for key in keys:
        try:
            line = (tree.lc.item(key) if isinstance(key, int) else tree.lc.key(key))[0] + 1
            tree = tree[key]
        except (KeyError, IndexError, AttributeError, TypeError):
            break
    return line


def _known(keys: list[str | int]) -> list[str]:
    """Names of the fields that a mapping at `keys` may have, in the order of the type."""
    kind: Any = msgspec.inspect.type_info(Recipe)
    for key in keys:
        kind = _unwrap(kind)
        if isinstance(key, int):
            kind = kind.item_type
        elif isinstance(kind, msgspec.inspect.StructType):
            kind = next(field.type for field in kind.fields if field.encode_name == key)
        else:
            return []
    kind = _unwrap(kind)
    return [field.encode_name for field in kind.fields] if isinstance(kind, msgspec.inspect.StructType) else []


def _unwrap(kind: Any) -> Any:
    if isinstance(kind, msgspec.inspect.UnionType):
        return next((option for option in kind.types if not isinstance(option, msgspec.inspect.NoneType)), kind)
    return kind


def _is_date(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _check_validation(section: ValidationSection, refuse: Callable[[list[str | int], str], None]) -> None:
    """Rules of the validation section; `refuse` takes the place of a key and what is wrong there."""
    for column, limits in section.ranges.items():
        at: list[str | int] = ["validation", "ranges", column]
        if column not in RANGED:
            near = difflib.get_close_matches(column, RANGED, 1, 0.5)
            refuse(at, f"no such column{f'; did you mean `{near[0]}`?' if near else ''}; the columns are {', '.join(RANGED)}")
        if limits.min is None and limits.max is None:
            refuse(at, "limits nothing; give min, max or both")
        if limits.min is not None and limits.max is not None and limits.min > limits.max:
            refuse(at, f"min {limits.min} is above max {limits.max}")
        if not 0 <= limits.allowed < 1:
            refuse([*at, "allowed"], "a share of at least 0 and below 1")
    if (language := section.language) and not (language.expected and 0 < language.minimum <= 1 and language.sample >= 1):
        refuse(["validation", "language"], "at least one expected language, a minimum above 0 and at most 1, a sample of at least 1")
    if section.roundtrip < 0 or not 0 <= section.max_roundtrip < 1:
        refuse(["validation", "roundtrip"], "a count of at least 0, and max_roundtrip a share of at least 0 and below 1")
    drift = section.drift
    if not 0.5 <= drift.auc_warn <= drift.auc_fail <= 1:
        refuse(["validation", "drift"], "0.5 <= auc_warn <= auc_fail <= 1: 0.5 is guessing, 1 telling every record apart")
    if not (0 <= drift.psi_warn <= drift.psi_fail and 0 <= drift.js_warn <= drift.js_fail <= 1 and drift.sample >= 0):
        refuse(["validation", "drift"], "0 <= psi_warn <= psi_fail, 0 <= js_warn <= js_fail <= 1, and a sample of at least 0")


def _check(path: Path, tree: Any, recipe: Recipe) -> None:
    """Rules that no single field's type can say."""

    def refuse(keys: list[str | int], message: str) -> None:
        raise RecipeError(f"{path}:{_line(tree, keys)}: `{_dotted(keys)}`: {message}")

    if not NAME.fullmatch(recipe.name):
        refuse(["name"], f"{recipe.name!r} is a folder name in lakeFS: lower-case letters, digits and dashes, at most 63")
    model = recipe.base_model
    if (model.path is None) == (model.repo is None):
        refuse(["base_model"], "give either `path` (a folder) or `repo` with `revision`, not both or none")
    if model.repo and not re.fullmatch(r"[0-9a-f]{40}", model.revision or ""):
        refuse(["base_model", "revision"], "a hub model needs the full 40-digit commit hash; a branch or tag name moves")
    suites = {suite.name for suite in recipe.evaluation.suites}
    for index, gate in enumerate(recipe.gates.gates):
        if gate.suite not in suites:
            refuse(
                ["gates", "gates", index, "suite"], f"no suite {gate.suite!r} under evaluation.suites; known: {', '.join(sorted(suites))}"
            )
        if not 0 < gate.margin < 1:
            refuse(["gates", "gates", index, "margin"], "a margin is a share of items between 0 and 1")
    if not recipe.records.sources:
        refuse(["records", "sources"], "at least one source is needed to read anything")
    for index, source in enumerate(recipe.records.sources):
        at: list[str | int] = ["records", "sources", index]
        if not 0 < source.weight <= 1:
            refuse([*at, "weight"], "the share of the source's records that is kept: above 0, at most 1")
        if source.quota is not None and source.quota < 1:
            refuse([*at, "quota"], "at least 1 record; leave a source out with raw.exclude")
        if source.date is not None and not _is_date(source.date):
            refuse([*at, "date"], f"{source.date!r} is not a day; write YYYY-MM-DD")
    if (near := recipe.records.near_duplicates) and not (0 < near.similarity <= 1 and min(near.words, near.bands, near.rows) >= 1):
        refuse(["records", "near_duplicates"], "similarity is above 0 and at most 1; words, bands and rows are at least 1")
    if not (0 < recipe.records.contamination_share <= 1 and recipe.records.contamination_words >= 1):
        refuse(["records", "contamination_share"], "a share above 0 and at most 1, of n-grams of at least 1 word")
    for index, augmentation in enumerate(recipe.records.augment):
        if not 0 < augmentation.share <= 1:
            refuse(["records", "augment", index, "share"], "a share above 0 and at most 1")
    _check_validation(recipe.validation, refuse)
    if not 0 <= recipe.records.split.validation < 1:
        refuse(["records", "split", "validation"], "a share between 0 and 1")
    if recipe.training.row_tokens < recipe.sharding.max_tokens:
        refuse(
            ["training", "row_tokens"],
            f"a packed row must hold the longest record: at least sharding.max_tokens ({recipe.sharding.max_tokens})",
        )
    for name in ("row_tokens", "rows", "micro_batches", "epochs", "checkpoint_every", "validate_every"):
        if getattr(recipe.training, name) < 1:
            refuse(["training", name], "must be at least 1")
