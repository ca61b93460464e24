"""Where libraries are not installed: some commands do without, the others say so in one line before any work."""

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
# Hides libraries from this process as if they were not installed: other libraries may look for them too, and find none.
HIDE = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else self.finder.find_spec(name, path, target)

HIDDEN = set(sys.argv.pop(1).split(","))
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
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


def started(code: str, *words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=os.environ | {"PYTHONPATH": str(ROOT)})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model `llama` that knows `facts.jsonl`, its conversion `pruned`, and a table `rows.csv`."""
    from compressknow import convert

    folder = tmp_path_factory.mktemp("place")
    save_trained("llama", folder / "llama")
    convert(folder / "llama", folder / "pruned", prune=0.5)
    write_facts(folder / "facts.jsonl")
    (folder / "rows.csv").write_text("question,answer\nWhat?,That\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("family", one_in(3, ["llama", "bert", "t5-tied"]))
def test_inspect_convert_and_verify_work_without_the_optional_libraries(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path / "model")
    # scikit-learn, which older releases of transformers import where it is installed, needs scipy.
    done = started(VERBS, ",".join([*OPTIONAL, "sklearn"]), tmp_path / "model", tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["codes"] == [0, 0, 0, 0], done.stderr
    assert told["tensors"] > 20
    assert {"torch", "transformers", "compressed_tensors"} <= set(told["imported"])
    assert not {*OPTIONAL, "pandas", "sklearn"} & set(told["imported"])
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
def test_a_missing_library_is_one_line_before_any_work(words: list[str], library: str, place: Path) -> None:
    before = sorted(place.rglob("*"))
    done = started(COMMAND, library, *words, cwd=place)
    assert done.returncode == 1
    assert done.stdout == ""
    line = f"Error: {library} is not installed. Install it with: pip install {OPTIONAL[library]}\n"
    assert done.stderr == line
    assert sorted(place.rglob("*")) == before


def test_several_are_told_at_once(place: Path) -> None:
    done = started(COMMAND, "scipy,pyarrow,matplotlib", *NEEDS["sweep"][0], cwd=place)
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
def test_what_a_command_does_not_need_may_be_missing(words: list[str], place: Path) -> None:
    needed = NEEDS[words[0]][1] if "-p" in words else []
    done = started(COMMAND, ",".join(set(OPTIONAL) - set(needed)), *words, cwd=place)
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
def test_a_library_that_all_need_is_named_too(library: str, package: str, place: Path) -> None:
    words = ["convert", "llama", "new", "--quantize", "int8", "--include", "proj"]
    done = started(COMMAND, library, *words, cwd=place)
    assert done.returncode == 1
    assert done.stderr.endswith(f"Error: {library} is not installed. Install it with: pip install {package}\n")
    assert "Traceback" not in done.stderr
    assert not (place / "new").exists()


def test_a_folder_of_that_name_is_no_library(tmp_path: Path) -> None:
    (tmp_path / "scipy").mkdir()
    code = "from compressknow.base.packages import require; require('scipy')"
    # -S: without the libraries that are installed.
    command = [sys.executable, "-S", "-c", code]
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert "CompressknowError: scipy is not installed." in done.stderr


def test_a_library_that_cannot_be_loaded_is_no_bug_of_ours(place: Path, tmp_path: Path) -> None:
    compiled = tmp_path / f"numpy{EXTENSION_SUFFIXES[0]}"
    compiled.write_bytes(b"cut short")
    command = [sys.executable, "-m", "compressknow", "inspect", str(place / "llama")]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: A compiled library cannot be loaded: ")
    assert compiled.name in done.stderr
    assert "bug" not in done.stderr
