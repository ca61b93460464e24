"""A search that is killed again and again ends exactly as one that was never disturbed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.knowing import facts_file, knowing
from tests.long import long
from tests.study.killed_search import ALONE
from tests.study.test_search import results

pytest.importorskip("optuna")
# More of them: KILLED_SEARCHES=20 python -m pytest tests/study/test_killed_search.py
SEARCHES = int(os.environ.get("KILLED_SEARCHES", "1"))
SECONDS = 120


@long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="its processes are forks of one")
def test_a_search_that_is_killed_again_and_again_ends_as_the_undisturbed_one(tmp_path: Path) -> None:
    model, facts = knowing("llama", tmp_path / "llama"), facts_file(tmp_path / "facts.jsonl")
    seeds = [str(seed) for seed in range(SEARCHES)]
    command = [sys.executable, "-m", "tests.study.killed_search", str(model), str(facts), str(tmp_path / "out"), *seeds]
    environment = os.environ | ALONE | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with (tmp_path / "log").open("w") as log:
        # Its output goes to a file: a pipe would be held open by whatever it leaves.
        ended = subprocess.run(
            command, env=environment, stdout=log, stderr=log, timeout=SECONDS * (1 + SEARCHES), check=False
        )
    told = (tmp_path / "log").read_text()
    assert ended.returncode == 0, told
    kills = [int(line) for line in told.splitlines() if line.isdecimal()]
    assert len(kills) == SEARCHES
    assert min(kills) > 0
    undisturbed = results(tmp_path / "out" / "undisturbed")
    for seed in seeds:
        killed = results(tmp_path / "out" / f"killed-{seed}")
        assert {name for name in killed.keys() | undisturbed if killed.get(name) != undisturbed.get(name)} == set()
    print("killed", kills)
