"""Check that this checkout computes the same as another commit: weights, hashes, counts, configs, answers, reports.

For changes that should not affect results. Both commits convert the same models by the same recipes, and evaluate them
on the same facts; differences are printed.

    python tools/same_results.py BASE [--model FOLDER]... [--facts NUMBER]

The tiny models of the tests, one per architecture, are always compared; `--model` adds real ones, which are evaluated
on atlas. Exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EVERYWHERE: list[dict[str, Any]] = [
    {"prune": 0.3, "scope": ["attention", "feed-forward"]},
    {"prune": 0.3, "scope": ["feed-forward"], "per_layer": True},
    {"prune": 0.25, "method": "random-unstructured", "scope": ["attention"], "seed": 7},
    {"prune": 0.25, "method": "ln-structured", "norm": 2, "dim": 1, "scope": ["feed-forward"]},
    {"prune": 0.25, "method": "random-structured", "scope": ["attention"], "seed": 3},
]
LINEAR: list[dict[str, Any]] = [
    {"quantize": scheme, "scope": ["attention", "feed-forward"]}
    for scheme in ("int8", "int8-paper", "int8-weights", "fp8", "int4")
]
# Only for models with a tokenizer, calibrated on their own text.
CALIBRATED: list[dict[str, Any]] = [
    {"prune": 0.5, "method": "wanda"},
    {"prune": 0.5, "method": "sparsegpt", "pattern": "2:4"},
    {"quantize": "int4", "rounding": "gptq"},
    {"quantize": "int8", "smooth": 0.5},
    {"drop_blocks": 1},
    {"drop_neurons": 0.25},
]
TOKENS = 4096
# Keys that may differ: when and by which version something was made, and sentences.
IGNORED = {"versions", "seconds", "command", "key", "verdict", "warnings", "method"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", help="the commit to compare with")
    parser.add_argument("--model", action="append", default=[], type=Path, help="a real checkpoint, evaluated on atlas")
    parser.add_argument("--facts", type=int, default=100, help="facts of atlas for real checkpoints")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(compute_results(arguments.run, arguments.model, arguments.facts)))
        return 0
    with tempfile.TemporaryDirectory() as folder, check_out(arguments.base) as base:
        models = make_models(Path(folder) / "models")
        before = run_tree(base, models, arguments.model, arguments.facts)
        after = run_tree(ROOT, models, arguments.model, arguments.facts)
    return print_differences(before, after)


@contextmanager
def check_out(commit: str) -> Iterator[Path]:
    """Yield the tree of a commit, in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(tree), commit], cwd=ROOT, check=True)
        try:
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)


def make_models(folder: Path) -> Path:
    """Write the tests' tiny models: those in `knowing/` have tokenizers and facts, those in `tiny/` only weights."""
    sys.path.insert(0, str(ROOT))
    from tests.knowing import save_trained, write_facts
    from tests.models import BUILDERS, save_tiny

    for name in BUILDERS:
        save_tiny(name, folder / "tiny" / name)
    for family in ("bert", "t5", "llama"):
        save_trained(family, folder / "knowing" / family)
    write_facts(folder / "facts.jsonl")
    return folder


def run_tree(tree: Path, models: Path, real: list[Path], facts: int) -> dict[str, Any]:
    """Run this script with the code in `tree`, and return the results."""
    command = [sys.executable, __file__, "-", "--run", str(models), "--facts", str(facts)]
    command += [part for model in real for part in ("--model", str(model.resolve()))]
    environment = os.environ | {"PYTHONPATH": str(tree), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=tree, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert Path(results.pop("package")).is_relative_to(tree), "another compressknow was imported"
    return results


def compute_results(models: Path, real: list[Path], facts: int) -> dict[str, Any]:
    """Return every result by a unique name."""
    import compressknow

    results: dict[str, Any] = {"package": compressknow.__file__}
    knowing, tiny = sorted((models / "knowing").iterdir()), sorted((models / "tiny").iterdir())
    for model in [*tiny, *knowing, *real]:
        for number, step in enumerate([*EVERYWHERE, *LINEAR, *(CALIBRATED if model not in tiny else ())]):
            with tempfile.TemporaryDirectory() as folder:
                output = Path(folder) / "converted"
                name = f"{model.name} {number} {', '.join(f'{key} {value}' for key, value in step.items())}"
                results[name] = convert(model, output, step)
                if model in tiny or results[name].get("refused") or number not in (0, len(EVERYWHERE)):
                    continue
                probes = ["atlas"] if model in real else [f"facts:{models / 'facts.jsonl'}"]
                results[f"{name}, report"] = report(model, output, probes, facts, models.parent / "answers")
    return results


def convert(model: Path, output: Path, step: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest, config and hashes of a conversion, or that it was refused."""
    import compressknow

    try:
        recipe = {"steps": [dict(step)], **({"calibration": {"tokens": TOKENS}} if step in CALIBRATED else {})}
        manifest = compressknow.convert(model, output, recipe=recipe)
    except compressknow.CompressknowError:
        # Messages may differ.
        return {"refused": True}
    files = {
        path.relative_to(output).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(output.rglob("*"))
        if path.is_file() and path.name not in ("compressknow.json", "README.md", "config.json")
    }
    return {"manifest": manifest, "files": files, "config": json.loads((output / "config.json").read_text())}


def report(model: Path, output: Path, probes: list[str], facts: int, answers: Path) -> dict[str, Any]:
    """Return report.json and every answer, or that the report was refused."""
    import compressknow
    from compressknow.evaluate.answers import read_answers

    keep_in = answers / hashlib.sha256(f"{compressknow.__file__}{output}".encode()).hexdigest()[:12]
    page = output.parent / "report.json"
    try:
        compressknow.report(
            model, output, probes, output=[page], options=compressknow.Options(limit=facts), answers=keep_in
        )
    except compressknow.CompressknowError:
        # For example, a protein model cannot be evaluated on any fact of atlas.
        return {"refused": True}
    folders = sorted(path.parent for path in keep_in.glob("*/probe.json"))
    answered = [repr(answer) for folder in folders for answer in read_answers(folder).answers]
    return {"report": json.loads(page.read_text()), "answers": answered}


def print_differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> int:
    """Print differences and the number of results; return 1 if any differ."""
    different = 0
    for name in sorted(before.keys() | after.keys()):
        lines = list(find_differences(before.get(name), after.get(name)))
        different += bool(lines)
        for line in lines[:5]:
            print(f"{name}: {line}")
    refused = sum("refused" in result for result in after.values())
    print(f"{len(after)} results compared ({refused} of them refusals): {different or 'none'} differ.")
    return 1 if different else 0


def find_differences(a: Any, b: Any, where: str = "") -> Iterator[str]:
    """Yield where two nested values differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            if key not in IGNORED:
                yield from find_differences(a.get(key), b.get(key), f"{where}.{key}")
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for place, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from find_differences(x, y, f"{where}[{place}]")
    elif a != b:
        yield f"{where}: {str(a)[:80]} -> {str(b)[:80]}"


if __name__ == "__main__":
    sys.exit(main())
