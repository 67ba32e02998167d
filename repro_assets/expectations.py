"""A Great Expectations suite run on the record frame, as an extra beside our own rules. The package is optional (`repro-assets[expectations]`).

Nothing is written and nothing calls home: the context lives in memory with analytics off. Values that fail are counted, never shown.
"""

import contextlib
import io
import logging
import math
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import msgspec

from repro_assets.data.judged import EXPECTATIONS, FAIL, PASS, SHOWN, WARN, Judged
from repro_assets.recipe import Loaded
from repro_assets.trust.canonical import digest, sha256

if TYPE_CHECKING:
    import polars as pl

EXTRA = "pip install 'repro-assets[expectations]'"


class ExpectationsError(ValueError):
    """A suite that cannot be run: the package is not there, the file is no suite, or an expectation does not fit the frame."""


class _Expectation(msgspec.Struct, frozen=True):
    """One expectation as Great Expectations writes it; what else it says is kept by the package."""

    type: str
    kwargs: dict[str, Any] = {}
    severity: str = "critical"


class _Suite(msgspec.Struct, frozen=True):
    expectations: list[_Expectation]
    name: str = "suite"


def suite_of(loaded: Loaded) -> bytes | None:
    """The bytes of the suite that a recipe names, or None. Raises ExpectationsError for a file that is not there or no suite."""
    if (named := loaded.recipe.validation.expectations) is None:
        return None
    path = loaded.folder(named)
    try:
        suite = path.read_bytes()
    except OSError as error:
        raise ExpectationsError(
            f"{loaded.path}: `validation.expectations`: {path}: {error.strerror}; the path is relative to the recipe's folder"
        ) from error
    parse(suite)
    return suite


def identity(suite: bytes) -> str:
    """Digest of the suite and of the versions that judge it. Raises ExpectationsError without the package."""
    try:
        versions = {name: version(name) for name in ("great-expectations", "pandas")}
    except PackageNotFoundError as error:
        raise _missing(error) from error
    return digest({"suite": sha256(suite), "libraries": versions})


def _missing(error: Exception) -> ExpectationsError:
    return ExpectationsError(
        f"the recipe names a Great Expectations suite (validation.expectations), but the package is not installed ({error}): {EXTRA}, "
        "or take the key out of the recipe"
    )


def parse(suite: bytes) -> _Suite:
    """The suite in a JSON file. Raises ExpectationsError naming the place."""
    try:
        found = msgspec.json.decode(suite, type=_Suite)
    except msgspec.DecodeError as error:
        raise ExpectationsError(
            f'validation.expectations: not a Great Expectations suite: {error}; it looks like {{"name": ..., "expectations": '
            '[{"type": "expect_...", "kwargs": {...}}]}'
        ) from error
    if not found.expectations:
        raise ExpectationsError("validation.expectations: the suite has no expectation; add one, or take the key out of the recipe")
    return found


def judge(suite: bytes, frame: "pl.DataFrame", judged: Judged) -> None:
    """One rule `expectation <type> ...` each, in the suite's order; effect is the number of records that fail where it is about records.

    Severity `critical` fails, any other warns. Raises ExpectationsError.
    """
    wanted = parse(suite)
    with _quiet():
        batch, make = _batch(frame)
        for number, one in enumerate(wanted.expectations):
            name = f"expectation {one.type.removeprefix('expect_')}" + (f" {one.kwargs['column']}" if "column" in one.kwargs else "")
            if any(rule.name == name for rule in judged.rules):
                name = f"{name} ({number})"
            _judge_one(name, one, batch.validate(make(one)), frame, judged)


def _batch(frame: "pl.DataFrame") -> tuple[Any, Any]:
    """A batch of the frame in an ephemeral context, and what makes one expectation validatable."""
    try:
        import great_expectations as gx
        from great_expectations.data_context.types.base import DataContextConfig, InMemoryStoreBackendDefaults, ProgressBarsConfig
        from great_expectations.expectations.registry import list_registered_expectation_implementations
    except ImportError as error:
        raise _missing(error) from error
    config = DataContextConfig(
        store_backend_defaults=InMemoryStoreBackendDefaults(init_temp_docs_sites=False),
        analytics_enabled=False,
        progress_bars=ProgressBarsConfig(globally=False),
    )
    context = gx.get_context(mode="ephemeral", project_config=config)
    asset = context.data_sources.add_pandas("records").add_dataframe_asset("records")
    batch = asset.add_batch_definition_whole_dataframe("records").get_batch({"dataframe": frame.to_pandas()})
    known = set(list_registered_expectation_implementations())

    def make(one: _Expectation) -> Any:
        if one.type not in known:
            raise ExpectationsError(f"validation.expectations: Great Expectations {gx.__version__} has no {one.type!r}; correct its name")
        try:
            return gx.ExpectationSuite(name="suite", expectations=[msgspec.to_builtins(one)])
        except (gx.exceptions.GreatExpectationsError, ValueError, TypeError) as error:
            raise ExpectationsError(f"validation.expectations: {one.type}: {error}; correct its kwargs") from error

    return batch, make


def _judge_one(name: str, one: _Expectation, found: Any, frame: "pl.DataFrame", judged: Judged) -> None:
    (result,) = found.results
    raised = result.exception_info
    raised = raised if "raised_exception" in raised else next(iter(raised.values()), {})
    if raised.get("raised_exception"):
        columns = ", ".join(frame.columns)
        raise ExpectationsError(f"validation.expectations: {one.type}: {raised['exception_message']} The frame's columns are {columns}")
    told = dict(result.result)
    unexpected = told.get("unexpected_count")
    verdict = PASS if result.success else FAIL if one.severity == "critical" else WARN
    judged.add(EXPECTATIONS, name, verdict, unexpected, None, _detail(one, told, unexpected))
    rows = told.get("partial_unexpected_index_list") or []
    if verdict != PASS and rows and all(isinstance(row, int) for row in rows):
        judged.failing[name] = [str(record) for record in frame["record"].gather(rows[:SHOWN])]


def _detail(one: _Expectation, told: dict[str, Any], unexpected: int | None) -> str:
    asked = ", ".join(f"{key} {value}" for key, value in sorted(one.kwargs.items()) if key != "column")
    observed = told.get("observed_value")
    if unexpected is not None:
        seen = f"{unexpected} of {told.get('element_count')} records fail"
    elif isinstance(observed, bool | int) or (isinstance(observed, float) and math.isfinite(observed)):
        seen = f"observed {observed if isinstance(observed, int) else round(observed, 6)}"
    else:
        seen = "observed as the result says"  # lists and texts may be values of records
    return seen + (f": {asked}" if asked else "")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The package prints progress bars and logs each metric."""
    logger = logging.getLogger("great_expectations")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
