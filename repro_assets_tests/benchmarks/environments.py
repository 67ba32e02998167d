"""Throw-away Python environments for comparisons with other tools and other versions, made by uv and kept under one folder."""

import os
import shutil
import subprocess
from pathlib import Path

from repro_assets.trust.canonical import digest


def uv() -> str:
    """The uv in PATH, else the one that the project's installer keeps in the user's cache."""
    kept = sorted(Path.home().glob(".cache/repro-assets/uv-*/bin/uv"))
    if found := shutil.which("uv") or (str(kept[-1]) if kept else None):
        return found
    raise SystemExit("no uv: run `make install` once, which keeps one, or put uv into PATH")


def environment(folder: Path, packages: list[str]) -> Path:
    """The Python of an environment with these packages, made once for each list of them."""
    home = folder / "environments" / digest(sorted(packages))[:12]
    python = home / "bin" / "python"
    if not (home / "complete").is_file():
        subprocess.run([uv(), "venv", "--quiet", "--clear", "--python", "3.11", str(home)], check=True)
        subprocess.run([uv(), "pip", "install", "--quiet", "--python", str(python), *packages], check=True)
        (home / "complete").write_text("\n".join(packages))
    return python


def clean(**more: str) -> dict[str, str]:
    """This process's surroundings without what would lead Python elsewhere."""
    return {**{name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}, **more}
