"""Third-party packages that extend compressknow by entry points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def install_package(folder: Path, name: str, code: str, entries: Mapping[str, Sequence[str]]) -> Path:
    """Install a package of one module into a folder, which is to be added to `sys.path`.

    Parameters
    ----------
    entries : lines of entry_points.txt by group, such as ``{"compressknow.schemes": ["toy = toy:Toy"]}``.
    """
    information = folder / f"{name}-1.0.dist-info"
    information.mkdir(parents=True)
    (folder / f"{name}.py").write_text(code, encoding="utf-8")
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    lines = [line for group, points in entries.items() for line in (f"[{group}]", *points, "")]
    (information / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder
