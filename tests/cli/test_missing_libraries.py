"""Commands without optional libraries: some run, the others fail with one line before any work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from compressknow.base.packages import OPTIONAL
from tests.knowing import save_trained, write_facts
from tests.long import long, one_in
from tests.models import save_tiny

ROOT = Path(__file__).parents[2]
# Hides libraries from this process as if they were not installed, from other libraries too.
HIDE = """
import sys

class HidingFinder:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else self.finder.find_spec(name, path, target)

HIDDEN = set(sys.argv.pop(1).split(","))
sys.meta_path[:] = [HidingFinder(finder) for finder in sys.meta_path]
"""
COMMAND = HIDE + "from compressknow.cli import main; sys.exit(main())"
VERBS = (
    HIDE
    + """
import json
import compressknow
from compressknow.cli import main

model, folder = sys.argv[1:]
codes = [
    main(["inspect", model]),
    main(["convert", model, f"{folder}/a", "--prune", "0.2", "--quantize", "int8"]),
    main(["convert", model, f"{folder}/b", "--quantize", "int8-paper", "--dry-run"]),
    main(["verify", f"{folder}/a"]),
]
compressknow.inspect(model)
compressknow.convert(model, f"{folder}/c", prune=0.2, quantize="int8")
tensors = compressknow.verify(f"{folder}/c").tensors
named = {name.partition(".")[0] for name in sys.modules}
print(json.dumps({"codes": codes, "tensors": tensors, "imported": sorted(named)}))
"""
)


def run_python(code: str, *words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=os.environ | {"PYTHONPATH": str(ROOT)})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model `llama` that knows `facts.jsonl`, its conversion `pruned`, and a table `rows.csv`."""
    from compressknow import convert

    folder = tmp_path_factory.mktemp("models")
    save_trained("llama", folder / "llama")
    convert(folder / "llama", folder / "pruned", prune=0.5)
    write_facts(folder / "facts.jsonl")
    (folder / "rows.csv").write_text("question,answer\nWhat?,That\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("family", one_in(3, ["llama", "bert", "t5-tied"]))
def test_inspect_convert_and_verify_work_without_the_optional_libraries(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path / "model")
    # Older releases of transformers import scikit-learn if it is installed, which needs scipy.
    done = run_python(VERBS, ",".join([*OPTIONAL, "sklearn"]), tmp_path / "model", tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout.splitlines()[-1])
    assert printed["codes"] == [0, 0, 0, 0], done.stderr
    assert printed["tensors"] > 20
    assert {"torch", "transformers", "compressed_tensors"} <= set(printed["imported"])
    assert not {*OPTIONAL, "pandas", "sklearn"} & set(printed["imported"])
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "c" / "model.safetensors").read_bytes()


FACTS = "facts:facts.jsonl"
NEEDS = {
    "probe": (["probe", "llama", "-p", FACTS, "-o", "new"], ["pyarrow"]),
    "probe lm-eval": (["probe", "llama", "-p", "lm-eval:boolq", "-o", "new"], ["pyarrow", "datasets", "lm_eval"]),
    "probe hf": (["probe", "llama", "-p", "hf:rows.csv", "-o", "new"], ["pyarrow", "datasets"]),
    "report": (["report", "llama", "pruned", "-p", FACTS, "--answers", "new"], ["pyarrow", "scipy"]),
    "report html": (["report", "llama", "pruned", "-o", "new.html"], ["pyarrow", "scipy", "matplotlib"]),
    "report lm-eval": (["report", "llama", "pruned", "-p", "lm-eval:piqa", "--answers", "new"], ["lm_eval"]),
    "compare": (["compare", "llama", "pruned", "-p", FACTS, "--answers", "new"], ["pyarrow", "scipy"]),
    "compare html": (["compare", "llama", "pruned", "-o", "new.html"], ["matplotlib"]),
    "sweep": (["sweep", "llama", "-p", FACTS, "-o", "new"], ["matplotlib", "pyarrow", "scipy"]),
    "sweep ray": (["sweep", "llama", "-p", FACTS, "-o", "new", "--ray", "local"], ["ray"]),
    "sensitivity": (["sensitivity", "llama", "--facts", FACTS], ["llama_cpp_py_sync", "pyarrow"]),
    "sensitivity html": (["sensitivity", "llama", "--facts", FACTS, "-o", "new.html"], ["matplotlib"]),
    "search": (
        ["search", "llama", "-p", FACTS, "-o", "new", "--keep", "0.9"],
        ["matplotlib", "pyarrow", "scipy"],
    ),
    "search gguf": (
        ["search", "llama", "-p", FACTS, "-o", "new", "--keep", "0.9", "--to", "gguf"],
        ["llama_cpp_py_sync", "gguf", "sentencepiece"],
    ),
}


@pytest.mark.parametrize(
    ("words", "library"),
    [pytest.param(words, name, id=f"{id}-{name}") for id, (words, names) in NEEDS.items() for name in names],
)
def test_missing_library_is_one_line_before_any_work(words: list[str], library: str, models: Path) -> None:
    before = sorted(models.rglob("*"))
    done = run_python(COMMAND, library, *words, cwd=models)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == f"Error: {library} is not installed. Install it with: pip install {OPTIONAL[library]}\n"
    assert sorted(models.rglob("*")) == before


def test_several_missing_libraries_are_one_message(models: Path) -> None:
    done = run_python(COMMAND, "scipy,pyarrow,matplotlib", *NEEDS["sweep"][0], cwd=models)
    assert done.stderr == (
        "Error: matplotlib, pyarrow and scipy are not installed. Install them with: "
        "pip install matplotlib pyarrow scipy\n"
    )


@long
@pytest.mark.parametrize(
    "words",
    [
        ["probe", "llama", "-p", FACTS, "-o", "answers"],
        ["report", "llama", "pruned", "-p", FACTS, "--answers", "kept", "-o", "card.md", "-o", "card.json"],
        ["compare", "llama", "pruned"],
    ],
)
def test_unneeded_libraries_may_be_missing(words: list[str], models: Path) -> None:
    needed = NEEDS[words[0]][1] if "-p" in words else []
    done = run_python(COMMAND, ",".join(set(OPTIONAL) - set(needed)), *words, cwd=models)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("library", "package"),
    [
        ("accelerate", "accelerate"),
        ("compressed_tensors", "compressed-tensors"),
        ("yaml", "pyyaml"),
        ("regex", "regex"),
    ],
)
def test_missing_required_library_is_named(library: str, package: str, models: Path) -> None:
    words = ["convert", "llama", "new", "--quantize", "int8", "--include", "proj"]
    done = run_python(COMMAND, library, *words, cwd=models)
    assert done.returncode == 1
    assert done.stderr.endswith(f"Error: {library} is not installed. Install it with: pip install {package}\n")
    assert "Traceback" not in done.stderr
    assert not (models / "new").exists()


def test_folder_with_the_name_of_a_library_is_not_taken_for_it(tmp_path: Path) -> None:
    (tmp_path / "scipy").mkdir()
    code = "from compressknow.base.packages import require; require('scipy')"
    # -S hides installed libraries.
    command = [sys.executable, "-S", "-c", code]
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert "CompressknowError: scipy is not installed." in done.stderr


def test_library_that_cannot_be_loaded_is_one_message(models: Path, tmp_path: Path) -> None:
    compiled = tmp_path / f"numpy{EXTENSION_SUFFIXES[0]}"
    compiled.write_bytes(b"cut short")
    command = [sys.executable, "-m", "compressknow", "inspect", str(models / "llama")]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: A compiled library cannot be loaded: ")
    assert compiled.name in done.stderr
    assert "bug" not in done.stderr
