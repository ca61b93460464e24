"""Packages of other people, as pip would install them: a module, and the entry points by which it adds to this one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def install_package(folder: Path, name: str, code: str, entries: Mapping[str, Sequence[str]]) -> Path:
    """Install a package of one module; `folder` on the path then brings it.

    Parameters
    ----------
    entries : entry points by group, such as ``{"compressknow.schemes": ["toy = toy:Toy"]}``.
    """
    information = folder / f"{name}-1.0.dist-info"
    information.mkdir(parents=True)
    (folder / f"{name}.py").write_text(code, encoding="utf-8")
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    lines = [line for group, points in entries.items() for line in (f"[{group}]", *points, "")]
    (information / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder
