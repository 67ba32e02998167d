"""Code closure: the digest of the sources that a stage can reach inside our packages, and of the libraries it names.

Works on the sources alone, nothing is imported, and it needs no Git. What the recipe says is not here: sections have digests of their own.
"""

import ast
import importlib.machinery
import importlib.metadata
import importlib.util
import pkgutil
import re
from collections.abc import Iterator, Sequence
from functools import cache
from types import ModuleType
from typing import TypeGuard

import msgspec

from repro_assets.trust.canonical import digest, sha256

PACKAGES = ("repro_assets", "resources")

#: Modules that only declare. Their part of an identity is in the memo key itself: the section's digest and the document's schema.
STOPS = ("repro_assets.documents", "repro_assets.recipe")


class ClosureError(Exception):
    """Code that cannot be pinned; the message names module, line, reason and remedy."""


class Closure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`sources`: module -> SHA-256 of its source with Unix line ends. `libraries`: distribution -> installed version."""

    digest: str
    sources: dict[str, str]
    libraries: dict[str, str]


class _Import(msgspec.Struct, frozen=True):
    """`module` must exist; `maybe` is a name imported from it, which may be a submodule or only an attribute."""

    module: str
    maybe: str | None
    line: int


def closure(
    module: ModuleType | str,
    *,
    packages: Sequence[str] = PACKAGES,
    stops: Sequence[str] = STOPS,
    libraries: Sequence[str] = (),
) -> Closure:
    """The closure of one module, by its imports (function-level ones too). `stops` are neither followed nor hashed.

    Cached for the life of the process: sources that change under a running process are not the ones it runs. A program started by name
    (`python -m ...`) or a data file is not an import: name such modules in a closure of their own. Raises ClosureError for a module
    without a readable source, an import that cannot be read from the source, or a library that is not installed.
    """
    name = module if isinstance(module, str) else module.__name__
    if isinstance(module, ModuleType) and name == "__main__":
        if module.__spec__ is None:
            raise ClosureError("module __main__ was started as a file, so it has no name; give the module's name")
        name = module.__spec__.name
    return _closure(name, tuple(packages), tuple(stops), tuple(sorted(set(libraries))))


@cache
def _closure(root: str, packages: tuple[str, ...], stops: tuple[str, ...], libraries: tuple[str, ...]) -> Closure:
    if not _under(root, packages):
        raise ClosureError(f"{root} is not in {', '.join(packages)}; name its package in `packages`")
    sources: dict[str, str] = {}
    waiting = [*_parents(root), root]
    while waiting:
        name = waiting.pop()
        if name in sources or (_under(name, stops) and name != root):
            continue
        found, imports = _scan(name)
        sources[name] = found
        for item in imports:
            if _under(item.module, packages):
                waiting.extend(_reached(name, item, stops))
    ordered = dict(sorted(sources.items()))
    versions = {_normal(library): _version(root, library) for library in libraries}
    return Closure(digest({"sources": ordered, "libraries": versions}), ordered, dict(sorted(versions.items())))


def _reached(importer: str, item: _Import, stops: tuple[str, ...]) -> Iterator[str]:
    """Modules that an import executes: the module, its parent packages, and the imported name if it is a module too."""
    yield from _parents(item.module)
    if _under(item.module, stops):
        return
    if _spec(item.module) is None:
        raise ClosureError(f"{importer} line {item.line}: imports {item.module}, which does not exist; correct or remove the import")
    yield item.module
    if item.maybe == "*":
        yield from (f"{item.module}.{name}" for name in _exported(item.module) if _spec(f"{item.module}.{name}"))
    elif item.maybe and _spec(f"{item.module}.{item.maybe}"):
        yield f"{item.module}.{item.maybe}"


def _parents(name: str) -> list[str]:
    steps = name.split(".")
    return [".".join(steps[:end]) for end in range(1, len(steps))]


def _under(name: str, tops: Sequence[str]) -> bool:
    return any(name == top or name.startswith(f"{top}.") for top in tops)


@cache
def _spec(name: str) -> importlib.machinery.ModuleSpec | None:
    """Where `name` lies, found as the import system would, but without executing its parent packages."""
    parent, _, _ = name.rpartition(".")
    if not parent:
        try:
            return importlib.util.find_spec(name)
        except (ImportError, ValueError):
            return None
    above = _spec(parent)
    if above is None or above.submodule_search_locations is None:
        return None
    # not PathFinder: for a folder without __init__.py it wants the parent package imported
    portions: list[str] = []
    for place in above.submodule_search_locations:
        finder = pkgutil.get_importer(place)
        spec = finder.find_spec(name) if finder else None
        if spec is not None and spec.loader is not None:
            return spec
        portions += (spec.submodule_search_locations or ()) if spec else ()
    if not portions:
        return None
    found = importlib.machinery.ModuleSpec(name, None, is_package=True)
    found.submodule_search_locations = portions
    return found


@cache
def _source(name: str) -> str:
    spec = _spec(name)
    if spec is None:
        raise ClosureError(f"module {name} does not exist; correct the name or install the package that has it")
    if spec.loader is None or spec.origin is None:
        return ""  # a namespace package: a folder without __init__.py, nothing runs
    read = getattr(spec.loader, "get_source", None)
    try:
        text = read(name) if read else None
    except (ImportError, OSError, UnicodeDecodeError, SyntaxError) as error:
        raise ClosureError(f"module {name}: its source cannot be read: {error}; install the package again") from error
    if text is None:
        raise ClosureError(f"module {name} ({spec.origin}) has no source, so nothing can be said of its code; install it with sources")
    return str(text).replace("\r\n", "\n").replace("\r", "\n")


@cache
def _scan(name: str) -> tuple[str, tuple[_Import, ...]]:
    """SHA-256 of a module's source, and what it imports."""
    text = _source(name)
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        raise ClosureError(f"module {name} line {getattr(error, 'lineno', '?')}: not Python: {error}") from error
    spec = _spec(name)
    package = name if spec is not None and spec.submodule_search_locations is not None else name.rpartition(".")[0]
    return sha256(text.encode()), tuple(_imports(name, package, tree))


def _imports(name: str, package: str, tree: ast.Module) -> Iterator[_Import]:
    skipped = {id(inner) for node in ast.walk(tree) if _only_for_types(node) for part in node.body for inner in ast.walk(part)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield _Import(alias.name, None, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            module = _absolute(name, package, node)
            for alias in node.names:
                yield _Import(module, alias.name, node.lineno)
        elif isinstance(node, ast.Call) and _imports_by_name(node.func):
            yield _by_name(name, package, node)


def _only_for_types(node: ast.AST) -> TypeGuard[ast.If]:
    """`if TYPE_CHECKING:` never runs, so it cannot change what comes out."""
    return isinstance(node, ast.If) and (
        (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING")
        or (isinstance(node.test, ast.Attribute) and node.test.attr == "TYPE_CHECKING")
    )


def _absolute(name: str, package: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    steps = package.split(".")
    if node.level > len(steps):
        raise ClosureError(f"module {name} line {node.lineno}: a relative import beyond the top package; write it absolute")
    base = ".".join(steps[: len(steps) - node.level + 1])
    return f"{base}.{node.module}" if node.module else base


def _imports_by_name(function: ast.expr) -> bool:
    called = function.attr if isinstance(function, ast.Attribute) else function.id if isinstance(function, ast.Name) else ""
    return called in ("import_module", "__import__")


def _by_name(name: str, package: str, node: ast.Call) -> _Import:
    said = node.args[0] if node.args else None
    if not isinstance(said, ast.Constant) or not isinstance(said.value, str):
        raise ClosureError(
            f"module {name} line {node.lineno}: imports a module whose name is computed: what it reaches cannot be pinned; write the name"
        )
    try:
        return _Import(importlib.util.resolve_name(said.value, package), None, node.lineno)
    except ImportError as error:
        raise ClosureError(f"module {name} line {node.lineno}: {error}; write it absolute") from error


@cache
def _exported(name: str) -> tuple[str, ...]:
    """Names in a literal `__all__`, which a star import of a package imports as submodules."""
    for node in ast.parse(_source(name)).body:
        if isinstance(node, ast.Assign) and any(isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets):
            try:
                return tuple(ast.literal_eval(node.value))
            except ValueError as error:
                raise ClosureError(f"module {name} line {node.lineno}: a computed __all__; write its names out") from error
    return ()


def _normal(library: str) -> str:
    return re.sub(r"[-_.]+", "-", library).lower()


def _version(root: str, library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        raise ClosureError(
            f"{root}: library {library}, named as relevant to its results, is not installed; run `make lock` and install"
        ) from None


def difference(was: Closure, now: Closure) -> list[str]:
    """What differs, in words: modules that changed, came or went, and libraries with both versions."""
    said = []
    for name in sorted(was.sources.keys() | now.sources.keys()):
        if name not in now.sources:
            said.append(f"module {name} no longer reached")
        elif name not in was.sources:
            said.append(f"module {name} newly reached")
        elif was.sources[name] != now.sources[name]:
            said.append(f"module {name} changed")
    for name in sorted(was.libraries.keys() | now.libraries.keys()):
        old, new = was.libraries.get(name, "absent"), now.libraries.get(name, "absent")
        if old != new:
            said.append(f"library {name} {old} -> {new}")
    return said
