"""A search that is killed repeatedly ends exactly like one that was never disturbed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gguf.making import save_trained_llama
from tests.knowing import KNOWN_FACTS, save_trained, write_facts
from tests.long import long
from tests.study.killed_search import SINGLE_THREAD
from tests.study.test_search import read_results

pytest.importorskip("llama_cpp_py_sync")
# To run more of them: KILLED_SEARCHES=20 python -m pytest tests/study/test_killed_search.py
SEARCHES = int(os.environ.get("KILLED_SEARCHES", "1"))
SECONDS = 300


@long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("form", ["checkpoint", "gguf"])
def test_repeatedly_killed_search_ends_like_an_undisturbed_one(form: str, tmp_path: Path, converter: Path) -> None:
    model = save_trained_llama(tmp_path / "llama") if form == "gguf" else save_trained("llama", tmp_path / "llama")
    facts = write_facts(tmp_path / "facts.jsonl")
    facts.with_suffix(".txt").write_text("\n".join(fact.sentence(fact.obj_label) for fact in KNOWN_FACTS))
    seeds = [str(seed) for seed in range(SEARCHES)]
    paths = [str(path) for path in (model, facts, tmp_path / "out")]
    command = [sys.executable, "-m", "tests.study.killed_search", form, *paths, *seeds]
    environment = os.environ | SINGLE_THREAD | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with (tmp_path / "log").open("w") as log:
        # The output goes to a file, since remaining processes would keep a pipe open.
        process = subprocess.run(
            command, env=environment, stdout=log, stderr=log, timeout=SECONDS * (1 + SEARCHES), check=False
        )
    output = (tmp_path / "log").read_text()
    assert process.returncode == 0, output
    kills = [int(line) for line in output.splitlines() if line.isdecimal()]
    assert len(kills) == SEARCHES
    assert min(kills) > 0
    undisturbed = read_results(tmp_path / "out" / "undisturbed")
    for seed in seeds:
        killed = read_results(tmp_path / "out" / f"killed-{seed}")
        assert {name for name in killed.keys() | undisturbed if killed.get(name) != undisturbed.get(name)} == set()
    print("killed", kills)
