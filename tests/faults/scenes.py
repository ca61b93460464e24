"""Commands to disturb, each in a new folder with its inputs and with files of the user."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from compressknow.evaluate.answers import SEAL
from tests.faults.warm import RunServer
from tests.knowing import save_trained, write_facts

FACTS, MORE = "facts.jsonl", "more.jsonl"
GRID = """\
[axes]
scope = ["attention", "feed-forward"]
prune = [0.3]
"""
COMPRESS = "--scope attention --prune 0.2 --quantize int8"
# Their content changes until a study is complete.
UNFINISHED = (".lock", "answers.parquet", "probe.json")


@dataclass(frozen=True)
class Scene:
    """Command, and results of other commands that its folder has besides the model and the facts."""

    command: str
    results: tuple[str, ...] = ()

    @property
    def args(self) -> list[str]:
        return self.command.split()


SCENES = {
    "convert": Scene(f"convert model new/out {COMPRESS}"),
    "overwrite": Scene("convert model small --overwrite --prune 0.4", ("small",)),
    "probe": Scene(f"probe model -o asked -p facts:{FACTS}"),
    "probe-more": Scene(f"probe model -o answers -p facts:{MORE}", ("answers",)),
    "report": Scene(f"report model small -p facts:{FACTS} -o r.html -o r.md -o r.json --overwrite", ("small",)),
    "report-again": Scene(
        f"report model small -p facts:{FACTS} -o old.md -o old.json --overwrite --into-model-card",
        ("small", "old.md", "old.json"),
    ),
    "compare": Scene("compare model small -o c.html -o c.md -o c.json --overwrite", ("small",)),
    "sweep": Scene(f"sweep model -o study --grid grid.toml -p facts:{FACTS} --save"),
    "search": Scene(f"search model -o found -p facts:{FACTS} --keep 0.3 --to checkpoint --guide text"),
}


class Stage:
    """Folders of scenes, which are copied from files made once."""

    def __init__(self, folder: Path, server: RunServer) -> None:
        self.folder, self.server = folder, server
        self._number = 0
        self._results: dict[str, dict[str, bytes]] = {}
        self.seconds: dict[str, float] = {}
        self._props = folder / "props"
        self._props.mkdir(parents=True)
        save_trained("bert", self._props / "model")
        lines = write_facts(self._props / "all.jsonl").read_text().splitlines(keepends=True)
        (self._props / FACTS).write_text("".join(lines[::3]))
        (self._props / MORE).write_text("".join(lines[1::6]))
        (self._props / "grid.toml").write_text(GRID)
        (self._props / "precious.txt").write_text("precious")
        (self._props / "old.md").write_text("- Versions: compressknow 0.0.1\n")
        (self._props / "old.json").write_text('{"schema": 1, "verdict": "old"}')
        for command in (f"convert model small {COMPRESS}", f"probe model -o answers -p facts:{FACTS}"):
            outcome = server.run(command.split(), self._props)
            assert outcome.code == 0, outcome

    def set_up(self, scene: Scene) -> Path:
        """Make a new folder with all that a scene needs."""
        self._number += 1
        root = self.folder / f"{self._number}"
        (root / "home" / "tmp").mkdir(parents=True)
        for name in ("model", FACTS, MORE, "grid.toml", "precious.txt", *scene.results):
            source = self._props / name
            shutil.copytree(source, root / name) if source.is_dir() else shutil.copyfile(source, root / name)
        return root

    def read_results(self, name: str) -> dict[str, bytes]:
        """Return the files after an undisturbed run."""
        if name not in self._results:
            root = self.set_up(SCENES[name])
            outcome = self.server.run(SCENES[name].args, root)
            assert (outcome.code, outcome.find_problems()) == (0, []), outcome
            self._results[name], self.seconds[name] = read_files(root), outcome.seconds
            shutil.rmtree(root)
        return self._results[name]


def read_files(root: Path) -> dict[str, bytes]:
    """Return the files and folders below a folder, by name, without timings."""
    files = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        files[name + "/" * path.is_dir()] = b"" if path.is_dir() else _read_file(path)
    return files


def _read_file(path: Path) -> bytes:
    if path.name != "probe.json":
        return path.read_bytes()
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return b"torn " + path.read_bytes()
    for probe in record["probes"].values():
        probe["seconds"] = 0
    # The hash of the record covers the seconds.
    record.pop(SEAL, None)
    return json.dumps(record).encode()


def find_differences(first: Mapping[str, bytes], second: Mapping[str, bytes]) -> list[str]:
    """Return the names of files that differ, or that only one of two folders has."""
    return [name for name in sorted(first.keys() | second.keys()) if first.get(name) != second.get(name)]
