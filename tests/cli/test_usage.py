"""Wrong commands fail before torch is imported, with a message that helps."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import NamedTuple

import pytest

from tests.models import save_tiny

# Runs the command lines of stdin in one process. Once imported, torch would be listed for all later ones.
RUN_ALL = """
import contextlib, io, json, sys
from compressknow.cli import main
for args in json.load(sys.stdin):
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        code = main(args)
    print(json.dumps([code, err.getvalue(), sorted({"torch", "transformers", "datasets"} & set(sys.modules))]))
"""


class Case(NamedTuple):
    """Command and part of its message; `{}` is the folder of the test."""

    args: str
    message: str


CASES = [
    Case("convert {}/model {}/new --prune 20", "Did you mean 0.2, which is 20 %?"),
    Case("convert {}/model {}/new --prune 100%", "less than 1: 1.0. 0.2 prunes 20 % of the weights"),
    Case("convert {}/model {}/new --prune 0", "greater than 0 and less than 1"),
    Case("convert {}/model {}/new --prune abc", "write 0.2 or 20%"),
    Case("convert {}/model {}/new", "Nothing to do"),
    Case("convert {}/model {}/new --prune 20% --scope atention", "Did you mean attention?"),
    Case("convert {}/model {}/new --prune 20% --scope attention,mlp", "Did you mean feed-forward?"),
    Case("convert {}/model {}/new --prune 20% --prune-method l1-unstructurd", "Did you mean l1-unstructured?"),
    Case("convert {}/model {}/new --quantize int8-wieghts", "Did you mean int8-weights?"),
    Case("convert {}/model {}/new --prun 20%", "Did you mean --prune?"),
    Case("convert {}/model {}/new --debug", "It goes before the command: compressknow --debug convert ..."),
    Case("convert {}/model {}/new --prune 20% --layers 5-", "is not a range of layers"),
    Case("convert {}/model {}/new --prune 20% --layers 5-2", "Write 2-5."),
    Case("convert {}/model {}/new --prune 20% --include (", "is not a valid regular expression"),
    Case("convert {}/model {}/there --prune 20%", "exists already"),
    Case("convert {}/model {}/model --prune 20%", "is the input itself"),
    Case("convert {}/nowhere {}/new --prune 20%", "no such folder"),
    Case("convert {}/model {}/new --recipe {}/nowhere.toml", "no such recipe"),
    Case("convert {}/model {}/new --recipe {}/wrong.toml", "Did you mean scope?"),
    Case("convert {}/some.gguf {}/new --prune 20%", "Give the checkpoint folder that it was made from"),
    Case("convrt {}/model {}/new", "Did you mean convert?"),
    Case("inspect {}/nowhere", "no such folder"),
    Case("inspect {}/some.gguf", "it is cut short"),
    Case("verify {}/nowhere", "no such folder"),
    Case("verify {}/model", "has no compressknow.json"),
    Case("probe {}/model -o {}/new -p atlass", "Did you mean atlas?"),
    Case("probe {}/model -o {}/new -p boolq", "Did you mean lm-eval:boolq?"),
    Case("probe {}/model -o {}/new -p trex", "Did you mean lama:trex?"),
    Case("probe {}/model -o {}/new -p lama:trexx", "Did you mean lama:trex?"),
    Case("probe {}/model -o {}/new --protocol papre", "Did you mean paper?"),
    Case("probe {}/model -o {}/new -p mine/facts.jsonl", "Did you mean facts:mine/facts.jsonl?"),
    Case("probe {}/model -o {}/new -p facts:{}/nowhere.jsonl", "There is no file"),
    Case("probe {}/nowhere -o {}/new", "no such folder"),
    Case("probe {}/model -o {}/new --device gpu", "Did you mean cuda?"),
    Case("probe {}/model -o {}/new --dtype float23", "Did you mean float32?"),
    Case("probe {}/model -o {}/new --limit all", "'all' is not a valid whole number."),
    Case("probe {}/model -o {}/new --timeout long", "'long' is not a valid number."),
    Case("report {}/model {}/nowhere", "no such folder"),
    Case("report {}/model {}/model -o {}/report.pdf", ".html, .md"),
    Case("report {}/model {}/model -o {}/there.html", "exists already"),
    Case("report {}/model {}/model --fail-under 95", "95%"),
    Case("compare {}/model {}/nowhere", "no such folder"),
    Case("sweep {}/model -o {}/new --grid {}/nowhere.toml", "no such grid"),
    Case("sweep {}/model -o {}/new --grid {}/grid.toml", "Did you mean scope?"),
    Case("sweep {}/model -o {}/model", "is not a study"),
    Case("sensitivity {}/model --to ggfu", "'ggfu' is not known. Did you mean gguf?"),
    Case("sensitivity {}/model -o {}/new.pdf", "end in .html, .md, .json or .csv"),
    Case("sensitivity {}/nowhere", "no such folder"),
    Case("sensitivity {}/some.gguf", "Give the checkpoint folder that it was made from"),
    Case("search {}/model -o {}/new --keep 98", "95%"),
    Case("search {}/model -o {}/model --keep 98%", "is not a study"),
    Case("search {}/model -o {}/new --keep 98% --calibration {}/nowhere.txt", "There is no calibration text"),
    Case("sweep {}/model -o {}/new --grid {}/texts.toml", "There is no calibration text nowhere.txt"),
    Case("sweep {}/model -o {}/new --grid methods --calibration slef", "A calibration text cannot be 'slef'"),
    Case("convert {}/model {}/new --prune 20% --prune-method wnda", "Did you mean wanda?"),
    Case("convert {}/model {}/new --prune 20% --prune-method wanda --calibration {}", "A calibration text cannot be"),
    Case("convert {}/model {}/new --drop-blocks 0-99999999999", "There is no block 99,999,999,999"),
    Case("convert {}/model {}/dangling/new --prune 20%", "is a link that leads nowhere"),
    Case("export {}/model {}/new.gguf --type q4_km", "Did you mean q4_k_m?"),
    Case("export {}/model {}/new.gguf --type-of attentin=q8_0", "Did you mean attention?"),
    Case("export {}/model {}/new.gguf --size 90MB --must attentin=q8_0", "--must: there is no scope 'attentin'"),
    Case("export {}/model {}/new.gguf --recipe {}/export.toml", "types a table of texts"),
    Case("export {}/model {}/new.gguf --calibration self --imatrix-out {}/new.gguf", "have the same name"),
    Case("export {}/model {}/new.gguf --calibration self --imatrix-out {}/dangling", "is a link that leads nowhere"),
    Case("export {}/model {}/new.gguf --calibration self --imatrix-out {}/nowhere/i", "no such folder"),
    Case(
        "export {}/model {}/new.gguf --calibration self --overwrite --imatrix-out {}/model/config.json",
        "config.json exists already, and is not an importance matrix: not overwritten",
    ),
    Case("export {}/model {}/dangling/new.gguf", "is a link that leads nowhere"),
    Case("export {}/model {}/new", "Name it new.gguf"),
    Case("verify {}/some.gguf", "There is no some.gguf.json next to"),
    Case("probe {}/model -o {}/new -p fact:x.jsonl", "Did you mean facts:x.jsonl?"),
    Case("probe {}/model -o {}/new -p text:{}/nowhere.txt", "There is no file"),
    Case("probe {}/model -o {}/new --runtime lama.cpp", "Did you mean llama.cpp?"),
    Case("report {}/model {}/model --early", "--early needs a gate"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, tuple[int, str, list[str]]]:
    """Return the exit code and messages of each case, and the slow libraries imported so far."""
    folder = tmp_path_factory.mktemp("folder")
    save_tiny("bert", folder / "model")
    (folder / "there").mkdir()
    (folder / "there.html").touch()
    (folder / "some.gguf").write_bytes(b"GGUF")
    (folder / "wrong.toml").write_text("[[steps]]\nscop = 'final'\nquantize = 'int8'\n", encoding="utf-8")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "export.toml").write_text("[export]\ntypes = [5]\n", encoding="utf-8")
    texts = "scope = ['attention']\nprune = [0.2]\nmethod = ['wanda']\ncalibration = ['nowhere.txt']\n"
    (folder / "texts.toml").write_text(f"[axes]\n{texts}", encoding="utf-8")
    (folder / "grid.toml").write_text("[axes]\nscop = ['attention']\nprune = [0.2]\n", encoding="utf-8")
    lines = [[word.replace("{}", str(folder)) for word in case.args.split()] for case in CASES]
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL], input=json.dumps(lines), capture_output=True, text=True, check=True
    )
    return dict(zip(CASES, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.args)
def test_wrong_command_fails_before_torch_is_imported(
    case: Case, results: dict[Case, tuple[int, str, list[str]]]
) -> None:
    code, errors, imported = results[case]
    assert code in (1, 2)
    assert case.message in " ".join(errors.split())
    assert "bug in compressknow" not in errors
    assert imported == []
