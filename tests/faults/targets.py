"""Damage files, run the commands that read them, and check the results."""

from __future__ import annotations

import json
import os
import random
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from tests.faults.mutants import mutate_bytes, mutate_file, mutate_header, mutate_json_bytes, mutate_lines, mutate_toml
from tests.faults.scenes import COMPRESS, FACTS, find_differences
from tests.faults.warm import Outcome, RunServer
from tests.knowing import save_trained, write_facts

RECIPE = """\
module_map = "structural"

[[steps]]
prune = 0.3
method = "l1-unstructured"
scope = ["attention"]
layers = "0-1"

[[steps]]
quantize = "int8"
scope = ["attention", "feed-forward"]
exclude = ["query"]
"""
GRID = """\
[axes]
scope = ["attention"]
prune = [0, 0.2]
quantize = ["none", "int8"]

[[cells]]
name = "first"
scope = "feed-forward"
layers = "0-0"
prune = 0.5
"""
ON_FACTS = f"-p facts:{FACTS}"
CONVERT = f"convert MODEL out {COMPRESS}"
PROBE = f"probe MODEL -o asked {ON_FACTS}"
REPORT = "report answers after -o r.json"
SWEEP = f"sweep model {ON_FACTS} --grid grid.toml"
# Commands that read a checkpoint; MODEL is its path.
CHECKPOINT = ("inspect MODEL --json", f"{CONVERT} --dry-run", CONVERT, "verify out", "compare MODEL small")
# Files that are put in the place of another.
SWAPS = (
    "small/config.json", FACTS, "answers/answers.parquet", "small/model.safetensors", "recipe.toml"
)  # fmt: skip
RESULTS = ("out", "r.json", "c.json", "asked", "new", "home")


@dataclass(frozen=True)
class Target:
    """Files to damage, how to mutate them apart from their bytes, and commands to run.

    read_by : commands that must fail if the file is unreadable.
    sure : whether any damage must be noticed.
    """

    files: tuple[str, ...]
    mutate: Callable[[bytes, random.Random], bytes]
    commands: tuple[str, ...]
    model: str = "model"
    read_by: tuple[str, ...] = ("convert", "probe", "compare", "report", "sweep")
    sure: bool = False

    def runs(self) -> list[list[str]]:
        return [command.replace("MODEL", self.model).split() for command in self.commands]


TARGETS = {
    "config": Target(("model/config.json",), mutate_json_bytes, (*CHECKPOINT, PROBE)),
    "header": Target(("model/model.safetensors",), mutate_header, CHECKPOINT),
    "body": Target(("model/model.safetensors",), mutate_bytes, CHECKPOINT),
    "index": Target(("sharded/model.safetensors.index.json",), mutate_json_bytes, CHECKPOINT, "sharded"),
    "bin": Target(("binary/pytorch_model.bin",), mutate_bytes, CHECKPOINT, "binary"),
    "tokenizer": Target(
        ("model/tokenizer.json", "model/tokenizer_config.json"),
        mutate_json_bytes,
        (CONVERT, "verify out", PROBE),
        read_by=("probe",),
    ),
    "manifest": Target(
        ("small/compressknow.json",),
        mutate_json_bytes,
        ("verify small", "inspect small", "compare model small", "convert model out --recipe small", PROBE),
        "small",
        read_by=("verify", "convert"),
    ),
    "converted": Target(
        ("small/model.safetensors", "small/config.json", "small/tokenizer.json"),
        mutate_header,
        ("verify small",),
        sure=True,
    ),
    "answers": Target(("after/answers.parquet",), mutate_bytes, (REPORT,), sure=True),
    "record": Target(
        ("after/probe.json", "answers/probe.json"), mutate_json_bytes, (REPORT, f"{PROBE} --reference answers"), "small"
    ),
    "study": Target(
        (
            "study/sweep.json",
            "study/original/*/probe.json",
            "study/cells/*/probe.json",
            "study/cells/*/answers.parquet",
        ),
        mutate_json_bytes,
        (f"{SWEEP} -o study",),
    ),
    "facts": Target((FACTS,), mutate_lines, (PROBE,)),
    "recipe": Target(
        ("recipe.toml",),
        mutate_toml,
        ("convert model out --recipe recipe.toml --dry-run", "convert model out --recipe recipe.toml", "verify out"),
    ),
    "grid": Target(("grid.toml",), mutate_toml, (f"{SWEEP} -o new",)),
    "gguf": Target(("llama.gguf",), mutate_bytes, (PROBE, CONVERT), "llama.gguf"),
}


class Bench:
    """Folder in which files are damaged and commands run, in a copy per seed."""

    def __init__(self, folder: Path, server: RunServer) -> None:
        self.folder, self.server = folder, server
        self.props = folder / "props"
        (self.props / "home" / "tmp").mkdir(parents=True)
        self._make_models()
        lines = write_facts(self.props / "all.jsonl").read_text().splitlines(keepends=True)
        (self.props / FACTS).write_text("".join(lines[::5]))
        (self.props / "recipe.toml").write_text(RECIPE)
        (self.props / "grid.toml").write_text(GRID)
        for command in (
            f"convert model small {COMPRESS}",
            f"probe model -o answers {ON_FACTS}",
            f"probe small -o after {ON_FACTS} --reference answers",
            f"{SWEEP} -o study",
            REPORT,
        ):
            outcome = server.run(command.split(), self.props)
            assert (outcome.code, outcome.find_problems()) == (0, []), outcome
        self._counts = _read_counts(self.props / "r.json")
        (self.props / "r.json").unlink()

    def _make_models(self) -> None:
        from transformers import AutoModelForMaskedLM

        from tests.engine.gguf_files import write_gguf

        model = AutoModelForMaskedLM.from_pretrained(save_trained("bert", self.props / "model"))
        for name, options in {"sharded": {"max_shard_size": "150KB"}, "binary": {}}.items():
            shutil.copytree(self.props / "model", self.props / name)
            (self.props / name / "model.safetensors").unlink()
            model.save_pretrained(self.props / name, **options)
        state = load_file(self.props / "binary/model.safetensors")
        (self.props / "binary/model.safetensors").unlink()
        torch.save(state, self.props / "binary/pytorch_model.bin")
        write_gguf(save_trained("llama", self.folder / "llama"), self.props / "llama.gguf")

    def run(self, kind: str, seed: int) -> list[str]:
        """Damage a file at random, run the commands, and return the problems."""
        target, root = TARGETS[kind], self.folder / f"{kind}-{seed}"
        shutil.copytree(self.props, root)
        rng = random.Random(f"{kind} {seed}")
        file = rng.choice(sorted(path for pattern in target.files for path in root.glob(pattern)))
        original = file.read_bytes()
        damage = mutate_file(file, [self.props / name for name in SWAPS], _choose_mutation(target, file), rng)
        changed = not file.is_file() or file.is_symlink() or file.read_bytes() != original
        problems = self._run_commands(root, target, file) if changed else []
        shutil.rmtree(root)
        return [f"{kind} {seed} ({file.relative_to(root)}: {damage}): {line}" for line in problems]

    def _run_commands(self, root: Path, target: Target, file: Path) -> list[str]:
        """Run the commands on a damaged file, and return the problems with them and with the files they leave."""
        problems, before = [], _read_regular_files(root)
        for args in target.runs():
            outcome = self.server.run(args, root)
            lines = [*outcome.find_problems(), *self._check_result(root, args, outcome, target, file)]
            problems += [f"{' '.join(args)}: {line}\n{outcome.out[-300:]}{outcome.err[-1500:]}" for line in lines]
        written = (*RESULTS, *(["study"] if "study" in args else []))
        differences = find_differences(before, _read_regular_files(root))
        changed = [name for name in differences if name.split("/")[0] not in written]
        return [*problems, *(f"{name} was changed or left behind" for name in changed)]

    def _check_result(self, root: Path, args: list[str], outcome: Outcome, target: Target, file: Path) -> list[str]:
        """Return the problems with the result of a command."""
        command, out = args[0], root / "out"
        if outcome.code:
            if command == "convert" and out.exists():
                return ["failed, and there is an output"]
            return ["what was converted does not verify"] if args == ["verify", "out"] and out.exists() else []
        problems = ["the damage passed"] if target.sure else []
        top = file.relative_to(root).parts[0]
        if command in target.read_by and any(top in word for word in args) and not _is_readable(file):
            problems.append("passed, yet the file cannot be read by others")
        if command == "report" and _read_counts(root / "r.json") != self._counts:
            problems.append("another report")
        if args == ["verify", "out"]:
            problems += _check_weights(root / target.model, out)
        return problems


def _choose_mutation(target: Target, file: Path) -> Callable[[bytes, random.Random], bytes]:
    """Return how a file is mutated: a target may have files of several kinds."""
    if file.suffix == ".json":
        return mutate_json_bytes
    return mutate_bytes if file.suffix == ".parquet" else target.mutate


def _read_regular_files(root: Path) -> dict[str, bytes]:
    """Return the content of the files below a folder, and "special" for links, pipes and devices."""
    files = {}
    for path in sorted(root.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            files[str(path.relative_to(root))] = b"special"
        elif path.is_file():
            files[str(path.relative_to(root))] = path.read_bytes()
    return files


def _read_counts(report: Path) -> object:
    (compressed,) = json.loads(report.read_text(encoding="utf-8"))["compressed"]
    keys = ("n", "both", "lost", "gained", "neither")
    return {name: [probe[key] for key in keys] for name, probe in compressed["probes"].items()}


def _is_readable(file: Path) -> bool:
    """Return whether other libraries can read the file."""
    if file.is_symlink() or not file.is_file():
        # This file may be missing.
        return file.name == "tokenizer_config.json" and not os.path.lexists(file)
    try:
        match file.suffix:
            case ".json":
                json.loads(file.read_bytes().decode())
            case ".jsonl":
                [json.loads(line) for line in file.read_bytes().decode().splitlines() if line.strip()]
            case ".toml":
                tomllib.loads(file.read_bytes().decode())
            case ".safetensors":
                load_file(file)
            case ".bin":
                torch.load(file, weights_only=True)
    except (ValueError, RecursionError, OSError, SafetensorError, RuntimeError, EOFError, KeyError):
        return False
    except Exception:  # torch.load may raise anything
        return file.suffix != ".bin"
    return True


def _check_weights(source: Path, out: Path) -> list[str]:
    """Check with other libraries that a conversion did not change tensors that are not compressed."""
    manifest = json.loads((out / "compressknow.json").read_text())
    compressed = {row["name"] for row in manifest["tensors"] if row["scheme"] or row["pruned"]}
    before, after = {}, {}
    for folder, tensors in ((source, before), (out, after)):
        for file in sorted(folder.glob("*.safetensors")):
            tensors |= load_file(file)
        for file in folder.glob("*.bin"):
            tensors |= torch.load(file, weights_only=True)
    problems = [f"{name} is missing in the output" for name in before if name not in after]
    for name, tensor in before.items():
        if name in after and name not in compressed:
            same = tensor.dtype == after[name].dtype and tensor.shape == after[name].shape
            if not same or tensor.contiguous().view(torch.uint8).ne(after[name].view(torch.uint8)).any():
                problems.append(f"{name} differs in the output")
    return problems
