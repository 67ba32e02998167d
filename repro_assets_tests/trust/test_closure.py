"""The code closure: moves with every source a module can reach and with nothing else."""

import importlib
import importlib.metadata
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

from repro_assets.trust import closure as subject
from repro_assets.trust.closure import Closure, ClosureError, difference

NUMBERS = itertools.count()
Files = dict[str, str]
Make = Callable[[Files], Callable[..., Closure]]

STAGE: Files = {
    "{p}/__init__.py": "",
    "{p}/stage.py": "import json\nimport {p}.direct\nfrom {p}.sub import leaf, NAME\nfrom . import sibling\nfrom .sub.deep import thing\n"
    "def f():\n    from {p} import late\n",
    "{p}/direct.py": "",
    "{p}/sibling.py": "from .declared import X\nfrom . import declared\n",
    "{p}/late.py": "def g():\n    import importlib\n    return importlib.import_module('{p}.named')\n",
    "{p}/named.py": "",
    "{p}/declared.py": "from {p} import behind\nX = 1\n",
    "{p}/behind.py": "",
    "{p}/unrelated.py": "",
    "{p}/sub/__init__.py": "NAME = 1\nfrom . import hidden\n",
    "{p}/sub/hidden.py": "",
    "{p}/sub/leaf.py": "",
    "{p}/sub/deep.py": "from ..other import *\nthing = 1\n",
    "{p}/other/__init__.py": "__all__ = ['starred', 'VALUE']\nVALUE = 1\n",
    "{p}/other/starred.py": "",
    "{p}/other/unstarred.py": "",
}
REACHED = {
    "",
    ".stage",
    ".direct",
    ".sub",
    ".sub.leaf",
    ".sub.hidden",
    ".sub.deep",
    ".sibling",
    ".late",
    ".named",
    ".other",
    ".other.starred",
}


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each look sees the disk as it is: the caches are for the life of a process, and a test plays several."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    forget()


def forget() -> None:
    sys.path_importer_cache.clear()
    importlib.invalidate_caches()
    for cached in (subject._closure, subject._spec, subject._source, subject._scan, subject._exported):
        cached.cache_clear()


@pytest.fixture
def package(tmp_path: Path, fresh: None) -> Make:
    """Writes a package of a new name; returns the closure of one of its modules, as a new process would see it."""

    def make(files: Files, name: str = "", folder: Path | None = None) -> Callable[..., Closure]:
        name = name or f"closed{next(NUMBERS)}"
        root = folder or tmp_path / name
        for path, text in files.items():
            target = root / path.replace("{p}", name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(text.replace("{p}", name).encode())

        def look(module: str = "stage", stops: tuple[str, ...] = ("declared",), **more: Any) -> Closure:
            forget()
            sys.path.insert(0, str(root))
            try:
                return subject.closure(f"{name}.{module}", packages=(name,), stops=tuple(f"{name}.{stop}" for stop in stops), **more)
            finally:
                sys.path.remove(str(root))

        look.root, look.name = root, name  # type: ignore[attr-defined]
        return look

    return make


def names(found: Closure) -> set[str]:
    top = min(found.sources, key=len)
    return {name.removeprefix(top) for name in found.sources}


def test_everything_an_import_executes_is_reached_and_nothing_else(package: Make) -> None:
    assert names(package(STAGE)()) == REACHED


@pytest.mark.parametrize("path", [path for path in STAGE if path != "{p}/sub/__init__.py"])
def test_the_digest_moves_with_exactly_the_reached_sources(package: Make, path: str) -> None:
    """An unrelated commit changes nothing; a change in any reached source does."""
    look: Any = package(STAGE)
    before = look()
    target = look.root / path.replace("{p}", look.name)
    target.write_text(target.read_text() + "\nCHANGED = 1\n")
    after = look()
    module = path.removesuffix(".py").removesuffix("/__init__").removeprefix("{p}").replace("/", ".")
    if module in REACHED:
        assert before.digest != after.digest
        assert difference(before, after) == [f"module {look.name}{module} changed"]
    else:
        assert before == after


def test_neither_the_place_on_disk_nor_line_ends_nor_a_zip_matter(package: Make, tmp_path: Path) -> None:
    """S0.1: another machine, an installed wheel, a checkout with Windows line ends."""
    look: Any = package(STAGE, name="moved")
    there: Any = package(
        {path: text.replace("\n", "\r\n") for path, text in STAGE.items()}, name="moved", folder=tmp_path / "else" / "where"
    )
    assert look() == there()
    with ZipFile(tmp_path / "moved.zip", "w") as archive:
        for path in sorted(there.root.rglob("*.py")):
            archive.write(path, path.relative_to(there.root))
    look.root.rename(tmp_path / "gone")
    look.root.write_bytes((tmp_path / "moved.zip").read_bytes())
    assert look() == there()


def test_a_second_process_gets_the_same_digest_without_importing_anything(tmp_path: Path) -> None:
    """S0.4: whatever the hash seed and the working directory; asking for the closure of a program imports neither it nor torch."""
    program = (
        "import sys; from repro_assets.trust.closure import closure; "
        "found = closure('repro_assets.trust.verification', libraries=('rfc8785',)); "
        "print(found.digest, 'repro_assets.trust.verification' in sys.modules, 'torch' in sys.modules)"
    )
    root = str(Path(subject.__file__).parents[2])
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            cwd=folder,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": root},
        ).stdout
        for seed, folder in (("1", root), ("2", str(tmp_path)))
    }
    here = subject.closure("repro_assets.trust.verification", libraries=("rfc8785",))
    assert outputs == {f"{here.digest} False False\n"}


def test_the_real_closures_stop_at_documents_and_recipe_and_never_reach_dagster() -> None:
    found = subject.closure("repro_assets.trust.bundle")
    assert "repro_assets.trust.environment" in found.sources
    assert "repro_assets.documents" not in found.sources
    import repro_assets.trust.bundle as module

    assert subject.closure(module) == found


def test_libraries_count_by_installed_version_under_their_normal_name(package: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    look = package(STAGE)
    plain, named = look(), look(libraries=("MSGSPEC", "in_toto.attestation"))
    assert plain.digest != named.digest
    assert named.libraries == {
        "in-toto-attestation": importlib.metadata.version("in-toto-attestation"),
        "msgspec": importlib.metadata.version("msgspec"),
    }
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99")
    other = look(libraries=("msgspec",))
    assert difference(named, other) == [
        f"library in-toto-attestation {named.libraries['in-toto-attestation']} -> absent",
        f"library msgspec {named.libraries['msgspec']} -> 99",
    ]


def test_modules_that_come_and_go_are_named(package: Make) -> None:
    look: Any = package({"{p}/__init__.py": "", "{p}/stage.py": "from {p} import one\n", "{p}/one.py": "", "{p}/two.py": ""})
    before = look()
    (look.root / look.name / "stage.py").write_text(f"from {look.name} import two\n")
    p = look.name
    assert difference(before, look()) == [f"module {p}.one no longer reached", f"module {p}.stage changed", f"module {p}.two newly reached"]


def test_imports_for_the_type_checker_only_are_not_reached(package: Make) -> None:
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from {p} import typed\nelse:\n    from {p} import used\n"
    assert names(package({"{p}/__init__.py": "", "{p}/stage.py": text, "{p}/typed.py": "", "{p}/used.py": ""})()) == {"", ".stage", ".used"}


def test_circular_imports_end(package: Make) -> None:
    assert names(package({"{p}/__init__.py": "", "{p}/stage.py": "from . import b\n", "{p}/b.py": "from . import stage\n"})()) == {
        "",
        ".stage",
        ".b",
    }


def test_a_stop_keeps_what_is_behind_it_out_but_not_its_package(package: Make) -> None:
    files = {
        "{p}/__init__.py": "",
        "{p}/stage.py": "import {p}.sub.declared\n",
        "{p}/sub/__init__.py": "",
        "{p}/sub/declared.py": "import {p}.far\n",
        "{p}/far.py": "",
    }
    assert names(package(files)(stops=("sub.declared",))) == {"", ".stage", ".sub"}
    assert names(package(files)(stops=())) == {"", ".stage", ".sub", ".sub.declared", ".far"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import {p}.nowhere\n", r"stage line 1: imports closed\d+.nowhere, which does not exist"),
        ("\nfrom .nowhere import x\n", r"stage line 2: imports closed\d+.nowhere"),
        ("from ... import x\n", "beyond the top package"),
        ("import importlib\nimportlib.import_module('{p}.' + str(1))\n", "line 2: .* whose name is computed"),
        ("__import__(name)\n", "whose name is computed"),
        ("def f(:\n", "stage line 1: not Python"),
        ("from .star import *\n", "star line 1: a computed __all__"),
    ],
)
def test_code_that_cannot_be_pinned_is_refused_with_its_line(package: Make, text: str, said: str) -> None:
    with pytest.raises(ClosureError, match=said):
        package({"{p}/__init__.py": "", "{p}/stage.py": text, "{p}/star.py": "__all__ = [n for n in dir()]\n"})()


def test_a_module_without_sources_is_refused(package: Make) -> None:
    """A wheel of compiled files only runs, and nothing can be said of its code."""
    import py_compile

    look: Any = package({"{p}/__init__.py": "", "{p}/stage.py": "from {p} import bare\n", "{p}/bare.py": ""})
    source = look.root / look.name / "bare.py"
    py_compile.compile(str(source), cfile=str(source.with_suffix(".pyc")))
    source.unlink()
    with pytest.raises(ClosureError, match=r"bare .* has no source"):
        look()


def test_an_unreadable_source_a_missing_module_and_a_missing_library_are_refused(package: Make) -> None:
    look: Any = package({"{p}/__init__.py": "", "{p}/stage.py": ""})
    with pytest.raises(ClosureError, match=r"no-such-library, named as relevant .* is not installed"):
        look(libraries=("no-such-library",))
    with pytest.raises(ClosureError, match="absent does not exist"):
        look("absent")
    with pytest.raises(ClosureError, match="json is not in repro_assets, resources"):
        subject.closure("json")
    (look.root / look.name / "stage.py").write_bytes(b"x = '\xff'\n")
    with pytest.raises(ClosureError, match="source cannot be read"):
        look()


def test_a_folder_without_init_is_a_package_without_code(package: Make) -> None:
    found = package({"{p}/__init__.py": "", "{p}/stage.py": "from .space import inner\n", "{p}/space/inner.py": ""})()
    assert names(found) == {"", ".stage", ".space", ".space.inner"}


def test_one_process_looks_once(package: Make) -> None:
    """Sources that change under a running process are not the ones it runs."""
    look: Any = package(STAGE)
    first = look()
    (look.root / look.name / "stage.py").write_text("")
    assert subject.closure(f"{look.name}.stage", packages=(look.name,), stops=(f"{look.name}.declared",)) is first
