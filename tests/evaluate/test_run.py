"""Answers folders: nothing is evaluated twice, nothing is lost when a run is killed, no other file is touched."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import compressknow
from compressknow.api.keywords import build_run_options
from compressknow.base.errors import (
    CheckpointError,
    CompressknowError,
    DamagedAnswers,
    OutputError,
    UnusedOptions,
    UsageError,
)
from compressknow.base.files import LOCK
from compressknow.base.progress import Listener, Progress
from compressknow.engine.identity import locate
from compressknow.evaluate import run
from compressknow.evaluate.answers import PARTS, RECORD, TABLE, Answers, lock_folder, read_answers, read_table
from compressknow.evaluate.distributions import Context
from compressknow.evaluate.facts import Probe
from compressknow.evaluate.gather import Evaluation, check_comparable, check_none_evaluated
from compressknow.evaluate.handle import ModelHandle
from compressknow.evaluate.run import probe_model
from compressknow.evaluate.runtimes import Settings
from compressknow.evaluate.scoring import families
from compressknow.evaluate.sources import Options, open_all
from tests.evaluate.references import make_known_facts, make_probe
from tests.knowing import KNOWN_FACTS, save_trained, write_bear, write_facts
from tests.pages.answering import make_answers, make_entry, make_model

SMALL = Settings(batch_size=8, noise_floor=False)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `bert`, `llama`, `t5`, the pruned `llama-3`, `llama-6` and `llama-9`, and their facts."""
    folder = tmp_path_factory.mktemp("root")
    for family in ("bert", "llama", "t5"):
        save_trained(family, folder / family)
    for amount in (3, 6, 9):
        compressknow.convert(folder / "llama", folder / f"llama-{amount}", prune=amount / 10)
    write_facts(folder / "facts.jsonl")
    return folder


def evaluate(
    model: Path,
    folder: Path,
    facts: Sequence[Path] | Path,
    settings: Settings = SMALL,
    options: Options | None = None,
    reference: Answers | None = None,
    known: Answers | None = None,
    on_progress: Listener | None = None,
) -> Answers:
    files = [facts] if isinstance(facts, Path) else facts
    probes = open_all([f"facts:{file}" for file in files], options or Options())
    handle = ModelHandle(locate(model), settings)
    return probe_model(handle, probes, folder, Context(reference, known), on_progress=on_progress)


def call_on_advance(advance: Callable[[int], None]) -> Listener:
    """Return a listener that passes on how many facts are answered, whenever this changes."""
    return lambda progress: advance(progress.done) if progress.state == "advances" else None


def stop_after(facts: int) -> Listener:
    """Return a listener that interrupts the run once so many facts are answered."""

    def advance(done: int) -> None:
        if done >= facts:
            raise KeyboardInterrupt

    return call_on_advance(advance)


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def write_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write each batch to disk as soon as it is answered."""
    monkeypatch.setattr(run, "SECONDS_BETWEEN_PARTS", 0.0)


@pytest.mark.usefixtures("write_each_batch")
@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_a_killed_run_resumes_where_it_stopped(root: Path, family: str, tmp_path: Path) -> None:
    whole = evaluate(root / family, tmp_path / "whole", root / "facts.jsonl")
    with pytest.raises(KeyboardInterrupt):
        evaluate(root / family, tmp_path / "killed", root / "facts.jsonl", on_progress=stop_after(40))
    stored = [answer for part in (tmp_path / "killed" / PARTS).rglob("*.parquet") for answer in read_table(part)]
    assert 40 <= len(stored) < 64

    handle = ModelHandle(locate(root / family), SMALL)
    rows: list[int] = []
    (probe,) = open_all([f"facts:{root / 'facts.jsonl'}"], Options())
    make_scorer = families.make_scorer

    def count_rows(*arguments: object) -> object:
        scorer = make_scorer(*arguments)  # type: ignore[arg-type]
        answer = scorer.answer
        scorer.answer = lambda batch, *more: rows.append(len(batch)) or answer(batch, *more)
        return scorer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "make_scorer", count_rows)
        resumed = probe_model(handle, [probe], tmp_path / "killed", Context())

    assert sum(rows) == len(KNOWN_FACTS) - len(stored)
    assert (tmp_path / "killed" / TABLE).read_bytes() == (tmp_path / "whole" / TABLE).read_bytes()
    assert [answer.predicted for answer in resumed.answers] == [answer.predicted for answer in whole.answers]
    # Batches are sorted by length, answers are not.
    assert [answer.fact_id for answer in resumed.answers] == [fact.id for fact in probe.facts]
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == [LOCK, TABLE, RECORD]


@pytest.mark.usefixtures("write_each_batch")
def test_only_a_run_with_the_same_settings_resumes_a_killed_one(root: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        evaluate(root / "llama", tmp_path / "a", root / "facts.jsonl", on_progress=stop_after(40))
    counts: list[int] = []
    settings = Settings(batch_size=16)
    evaluate(root / "llama", tmp_path / "a", root / "facts.jsonl", settings, on_progress=call_on_advance(counts.append))
    evaluate(root / "llama", tmp_path / "b", root / "facts.jsonl", settings)
    assert counts[-1] == 64
    assert (tmp_path / "a" / TABLE).read_bytes() == (tmp_path / "b" / TABLE).read_bytes()
    # A short run in between loses nothing of the long one.
    evaluate(root / "llama", tmp_path / "a", root / "facts.jsonl", options=Options(limit=4))
    counts.clear()
    evaluate(root / "llama", tmp_path / "a", root / "facts.jsonl", on_progress=call_on_advance(counts.append))
    assert min(done for done in counts if done) >= 40
    assert not (tmp_path / "a" / PARTS).exists()


def test_a_run_killed_between_answers_and_record_starts_again(root: Path, tmp_path: Path) -> None:
    evaluate(root / "llama", tmp_path / "a", root / "facts.jsonl")
    whole = (tmp_path / "a" / TABLE).read_bytes()
    (tmp_path / "a" / RECORD).unlink()
    (tmp_path / "a" / f".{TABLE}.compressknow-0123abcd").write_bytes(b"half a fi")
    evaluate(root / "llama", tmp_path / "a", root / "facts.jsonl")
    assert (tmp_path / "a" / TABLE).read_bytes() == whole
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [LOCK, TABLE, RECORD]


@pytest.mark.parametrize("name", [TABLE, RECORD])
@pytest.mark.parametrize("damage", ["cut", "removed"])
def test_a_run_says_which_damaged_answers_to_remove_and_then_makes_them_again(
    root: Path, tmp_path: Path, name: str, damage: str
) -> None:
    evaluate(root / "llama", tmp_path / "a", root / "facts.jsonl")
    whole, path = (tmp_path / "a" / TABLE).read_bytes(), tmp_path / "a" / name
    path.write_bytes(path.read_bytes()[:100]) if damage == "cut" else path.unlink()
    if (name, damage) != (RECORD, "removed"):
        with pytest.raises(DamagedAnswers, match=f"/{name}|{name} is missing or damaged") as error:
            evaluate(root / "llama", tmp_path / "a", root / "facts.jsonl")
        hint = f"Remove {tmp_path / 'a'}, and repeat the command, which evaluates its contents again."
        assert error.value.hint == hint
        shutil.rmtree(tmp_path / "a")
    evaluate(root / "llama", tmp_path / "a", root / "facts.jsonl")
    assert (tmp_path / "a" / TABLE).read_bytes() == whole


def test_a_model_that_has_not_changed_is_not_loaded_again(root: Path, tmp_path: Path, loads: list[Path]) -> None:
    first = evaluate(root / "llama", tmp_path / "a", root / "facts.jsonl")
    before = read_files(tmp_path / "a")
    shutil.copytree(root / "llama", tmp_path / "the same under another name")
    (tmp_path / "the same under another name" / "README.md").write_text("A card.")
    again = evaluate(tmp_path / "the same under another name", tmp_path / "a", root / "facts.jsonl")
    assert loads == [root / "llama"]
    assert (first.record.model.name, again.record.model.name) == ("llama", "the same under another name")
    assert replace(again.record, model=first.record.model) == first.record
    assert read_files(tmp_path / "a") == before


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Callable[[Path], None]]:
    """Return a function that makes a folder read-only, for root too."""
    mounted: list[Path] = []

    def make(folder: Path) -> None:
        folder.chmod(0o555)
        if os.access(folder, os.W_OK):
            for options in (["--bind", folder], ["-o", "remount,ro,bind"]):
                if subprocess.run(["mount", *options, folder], capture_output=True, check=False).returncode:
                    pytest.skip("root cannot mount a folder read-only here")
                mounted.append(folder)

    yield make
    for folder in {*mounted}:
        subprocess.run(["umount", folder], check=True)
    for folder in tmp_path.glob("*/"):
        folder.chmod(0o755)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no read-only folders")
def test_answers_in_a_folder_that_cannot_be_written_are_read(
    root: Path, tmp_path: Path, read_only: Callable[[Path], None], loads: list[Path]
) -> None:
    first = evaluate(root / "llama", tmp_path / "a", root / "facts.jsonl")
    read_only(tmp_path / "a")
    again = evaluate(root / "llama", tmp_path / "a", root / "facts.jsonl")
    assert loads == [root / "llama"]
    assert [answer.predicted for answer in again.answers] == [answer.predicted for answer in first.answers]
    with pytest.raises(OutputError, match="cannot be written"):
        evaluate(root / "llama", tmp_path / "a", root / "facts.jsonl", Settings(batch_size=16))


def test_changed_weights_are_refused_in_the_folder_of_the_old_ones(root: Path, tmp_path: Path) -> None:
    model = shutil.copytree(root / "llama", tmp_path / "model")
    evaluate(model, tmp_path / "a", root / "facts.jsonl")
    before = read_files(tmp_path / "a")
    shutil.copy(root / "llama-3" / "model.safetensors", model / "model.safetensors")
    with pytest.raises(OutputError, match="has the answers of another model") as error:
        evaluate(model, tmp_path / "a", root / "facts.jsonl")
    assert "files have changed since then" in str(error.value.why)
    assert read_files(tmp_path / "a") == before


@pytest.mark.parametrize("settings", [Settings(batch_size=4), Settings(batch_size=8, dtype="bfloat16")])
def test_other_settings_evaluate_again(root: Path, tmp_path: Path, settings: Settings, loads: list[Path]) -> None:
    evaluate(root / "llama", tmp_path / "a", root / "facts.jsonl")
    answers = evaluate(root / "llama", tmp_path / "a", root / "facts.jsonl", settings)
    assert len(loads) == 2
    assert len(answers.answers) == 64
    assert answers.record.model.computed_in == settings.here().computed_in


def test_another_release_of_transformers_evaluates_again(
    root: Path, tmp_path: Path, loads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(root / "llama", tmp_path / "a", root / "facts.jsonl")
    installed = run.version
    monkeypatch.setattr(run, "version", lambda name: "9.9" if name == "transformers" else installed(name))
    answers = evaluate(root / "llama", tmp_path / "a", root / "facts.jsonl")
    assert len(loads) == 2
    assert answers.record.versions["transformers"] == "9.9"


def test_code_that_is_now_trusted_evaluates_again(tmp_path: Path) -> None:
    model, facts = save_trained("llama", tmp_path / "llama"), write_facts(tmp_path / "facts.jsonl")
    code = "from transformers import LlamaForCausalLM\n\n\nclass CustomForCausalLM(LlamaForCausalLM):\n"
    code += "    def forward(self, *args, **kwargs):\n        output = super().forward(*args, **kwargs)\n"
    (model / "custom.py").write_text(f"{code}        output.logits = -output.logits\n        return output\n")
    config = json.loads((model / "config.json").read_text())
    config |= {"architectures": ["CustomForCausalLM"], "auto_map": {"AutoModelForCausalLM": "custom.CustomForCausalLM"}}
    (model / "config.json").write_text(json.dumps(config))
    for trusted, architecture, right in ((False, "LlamaForCausalLM", 64), (True, "CustomForCausalLM", 0)):
        answers = evaluate(model, tmp_path / "a", facts, replace(SMALL, trust_remote_code=trusted))
        assert answers.record.model.architecture == architecture
        assert sum(answer.correct for answer in answers.answers) == right


def test_a_new_probe_keeps_the_answers_to_the_others(root: Path, tmp_path: Path, loads: list[Path]) -> None:
    lines = (root / "facts.jsonl").read_text().splitlines(keepends=True)
    files = [tmp_path / f"{name}.jsonl" for name in ("one", "two", "three")]
    for number, file in enumerate(files):
        file.write_text("".join(lines[16 * number : 16 * number + 16]))
    evaluate(root / "llama", tmp_path / "a", files[:2])
    first = read_answers(tmp_path / "a")
    added = evaluate(root / "llama", tmp_path / "a", [files[2], files[0]])
    both = read_answers(tmp_path / "a")

    assert len(loads) == 2
    assert added.probes == ("facts:three.jsonl", "facts:one.jsonl")
    assert both.probes == ("facts:one.jsonl", "facts:two.jsonl", "facts:three.jsonl")
    assert len(both.answers) == 48
    for probe in first.probes:
        assert both.record.probes[probe] == first.record.probes[probe]
        assert [a.fact_id for a in both.of(probe)] == [a.fact_id for a in first.of(probe)]


def test_answers_to_a_changed_facts_file_replace_the_old_ones(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "facts.jsonl"
    lines = (root / "facts.jsonl").read_text().splitlines(keepends=True)
    file.write_text("".join(lines))
    evaluate(root / "llama", tmp_path / "a", file)
    file.write_text("".join(lines[:20]))
    assert len(evaluate(root / "llama", tmp_path / "a", file).answers) == 20
    assert len(read_table(tmp_path / "a" / TABLE)) == 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limit": 6}, "They were made with `limit=8`, `seed=0`, and this run is with `limit=6`, `seed=0`."),
        ({"limit": None}, "and this run is without `limit`"),
        ({"probe": "elsewhere/facts.jsonl"}, "as this run is, but to other facts: of other data under this name"),
        ({"batch_size": 4}, "The last run in this folder was on cpu in float32"),
    ],
    ids=str,
)
def test_probe_replaces_answers_only_if_told_to(
    root: Path, tmp_path: Path, changes: dict[str, Any], message: str, loads: list[Path]
) -> None:
    (tmp_path / "elsewhere").mkdir()
    for name, lines in (("", slice(0, 20)), ("elsewhere", slice(20, 40))):
        rows = (root / "facts.jsonl").read_text().splitlines(keepends=True)[lines]
        (tmp_path / name / "facts.jsonl").write_text("".join(rows))

    def probe(probe: str = "facts.jsonl", **keywords: Any) -> Answers:
        keywords = {"limit": 8, "settings": SMALL} | keywords
        return compressknow.probe(root / "llama", tmp_path / "a", f"facts:{tmp_path / probe}", **keywords)

    probe()
    before = read_files(tmp_path / "a")
    with pytest.raises(OutputError, match=r"/a has other answers to facts:facts\.jsonl: nothing was changed") as error:
        probe(**changes)
    assert message in str(error.value.why)
    assert len(loads) == 1
    assert read_files(tmp_path / "a") == before
    probe(**changes, overwrite=True)
    assert probe(**changes).answers
    assert len(loads) == 2


def test_a_changed_example_outside_the_sample_evaluates_again(root: Path, tmp_path: Path) -> None:
    file, few = tmp_path / "facts.jsonl", Options(limit=4)
    file.write_text((root / "facts.jsonl").read_text())
    original = evaluate(root / "llama", tmp_path / "original", file, options=few)
    (probe,) = open_all([f"facts:{file}"], few)
    assert isinstance(probe, Probe)
    sampled = {fact.prompt for fact in probe.facts}

    def evaluate_pruned(folder: str) -> list[str | None]:
        pruned = evaluate(root / "llama-9", tmp_path / folder, file, options=few, reference=original)
        return [answer.with_example for answer in pruned.answers]

    before = evaluate_pruned("a")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    objects = {"capital": "Zemra", "language": "Dorse", "food": "salt", "home": "ice"}
    for row in rows:
        if row["prompt"] not in sampled:
            row["obj_label"] = objects[row["relation"]]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert evaluate_pruned("a") == evaluate_pruned("b") != before


def test_subjects_that_allow_an_example_evaluate_again(root: Path, tmp_path: Path) -> None:
    file, few = tmp_path / "facts.jsonl", Options(limit=4)
    rows = [json.loads(line) for line in (root / "facts.jsonl").read_text().splitlines()]

    def count_examples() -> int:
        original = evaluate(root / "llama", tmp_path / "original", file, options=few)
        pruned = evaluate(root / "llama-9", tmp_path / "pruned", file, options=few, reference=original)
        return sum(answer.with_example is not None for answer in pruned.answers)

    file.write_text("".join(f"{json.dumps(row | {'sub_label': 'it'})}\n" for row in rows))
    assert count_examples() == 0
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert count_examples() > 0


def test_a_changed_majority_outside_the_sample_is_computed_again(root: Path, tmp_path: Path) -> None:
    file, few = tmp_path / "facts.jsonl", Options(limit=4)
    file.write_text((root / "facts.jsonl").read_text())

    def compute_majority(folder: str) -> float | None:
        return (
            evaluate(root / "llama", tmp_path / folder, file, options=few).record.probes["facts:facts.jsonl"].majority
        )

    before = compute_majority("a")
    (probe,) = open_all([f"facts:{file}"], few)
    assert isinstance(probe, Probe)
    kept = {fact.prompt for facts in (probe.facts, *probe.examples.values()) for fact in facts}
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        if row["prompt"] not in kept:
            row["obj_label"] = probe.examples[row["relation"]][1].obj_label
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (changed,) = open_all([f"facts:{file}"], few)
    assert isinstance(changed, Probe)
    assert (changed.facts, changed.examples) == (probe.facts, probe.examples)
    assert compute_majority("a") == compute_majority("b") != before


def test_stored_answers_get_corrected_labels(root: Path, tmp_path: Path, loads: list[Path]) -> None:
    file = tmp_path / "facts.jsonl"
    rows = [json.loads(line) for line in (root / "facts.jsonl").read_text().splitlines()]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    first = evaluate(root / "llama", tmp_path / "a", file)
    changes = [{"subject": "places", "sub_label": f"Great {row['sub_label']}", "popularity": 7} for row in rows]
    file.write_text("".join(f"{json.dumps(row | more)}\n" for row, more in zip(rows, changes, strict=True)))
    again = evaluate(root / "llama", tmp_path / "a", file)
    assert len(loads) == 1
    assert [answer.predicted for answer in again.answers] == [answer.predicted for answer in first.answers]
    (probe,) = open_all([f"facts:{file}"], Options())
    assert isinstance(probe, Probe)
    for answers in (again, read_answers(tmp_path / "a")):
        labels = [(a.fact_id, a.subject, a.sub_label, a.popularity) for a in answers.answers]
        assert labels == [(fact.id, "places", fact.sub_label, 7) for fact in probe.facts]
        assert answers.record.probes[probe.name].source == probe.source
    before = read_files(tmp_path / "a")
    evaluate(root / "llama", tmp_path / "a", tmp_path / "facts.jsonl")
    assert read_files(tmp_path / "a") == before


def test_hashing_large_models_is_a_stage(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes minutes on a slow disk."""
    events: list[Progress] = []
    models = [root / "llama", root / "llama-3"]
    monkeypatch.setattr("compressknow.evaluate.handle.LARGE", 0)
    facts = f"facts:{root / 'facts.jsonl'}"
    compressknow.report(*models, facts, settings=SMALL, answers=tmp_path / "kept", on_progress=events.append)
    hashing = [progress for progress in events if progress.stage.work == "hash"]
    assert events[: len(hashing)] == hashing
    assert [progress.stage.model for progress in hashing if progress.state == "ends"] == ["llama", "llama-3"]
    sizes = [sum(path.stat().st_size for path in locate(model).files) for model in models]
    assert [progress.done for progress in hashing if progress.state == "ends"] == sizes


def test_a_failed_probe_keeps_the_stored_answers(root: Path, tmp_path: Path) -> None:
    evaluate(root / "llama", tmp_path / "a", root / "facts.jsonl")
    before = read_files(tmp_path / "a")
    other = Path(shutil.copy(root / "facts.jsonl", tmp_path / "other.jsonl"))
    with pytest.raises(CompressknowError, match=r"was not evaluated on facts:other\.jsonl"):
        evaluate(root / "llama", tmp_path / "a", other, reference=read_answers(tmp_path / "a"))
    assert read_files(tmp_path / "a") == before


def test_two_facts_files_with_the_same_name_are_refused(root: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    twin = shutil.copy(root / "facts.jsonl", tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=r"Two probes have the name facts:facts\.jsonl"):
        evaluate(root / "llama", tmp_path / "a", [root / "facts.jsonl", Path(twin)])
    assert not (tmp_path / "a").exists()


def test_a_sample_is_drawn_by_its_seed(root: Path, tmp_path: Path) -> None:
    def evaluate_sample(folder: str, limit: int, seed: int) -> set[str]:
        options = Options(limit=limit, seed=seed)
        answers = evaluate(root / "llama", tmp_path / folder, root / "facts.jsonl", options=options)
        entry = answers.record.probes["facts:facts.jsonl"]
        assert (entry.limit, entry.seed, entry.facts, entry.asked) == (limit, seed, 64, limit)
        return {answer.fact_id for answer in answers.answers}

    twelve = evaluate_sample("a", 12, 0)
    assert evaluate_sample("b", 12, 0) == twelve
    assert evaluate_sample("c", 12, 1) != twelve
    assert evaluate_sample("d", 20, 0) > twelve


def test_a_model_is_evaluated_on_the_sample_of_stored_answers(root: Path, tmp_path: Path) -> None:
    lines = (root / "facts.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "few.jsonl").write_text("".join(lines[:4]))
    files = [tmp_path / "few.jsonl", root / "facts.jsonl"]
    evaluate(root / "llama", tmp_path / "original", files, SMALL, Options(limit=12, seed=3))
    probes = [f"facts:{file}" for file in files]
    card = compressknow.report(tmp_path / "original", root / "llama-3", probes, answers=tmp_path / "kept")
    assert [probe.counts.n for probe in card.comparisons[0].probes] == [4, 12]


@pytest.mark.parametrize(
    ("entry", "keywords", "refused"),
    [
        ({}, {"limit": 30}, True),
        ({}, {"limit": 100}, False),
        ({"limit": 30, "asked": 30}, {"limit": 30}, False),
        # More facts were there than were evaluated.
        ({"limit": 30, "asked": 30}, {"limit": 50}, True),
        ({"limit": 30, "asked": 28}, {"limit": 29}, True),
        # A task had fewer.
        ({"limit": 50, "asked": 10, "facts": 10}, {"limit": 30}, False),
        # Wordings count as one fact.
        ({"asked": 30, "templates": 3}, {"limit": 20, "templates": 3}, False),
        ({"limit": 9, "text": {"chunks": 9}}, {"limit": 9}, False),
        ({"limit": 9, "text": {"chunks": 9}}, {"limit": 10}, True),
        ({"text": {"chunks": 9}}, {"limit": 8}, True),
        ({"text": {"chunks": 9}}, {"limit": 10}, False),
        # No sample was drawn.
        ({}, {"seed": 5}, False),
        ({"limit": 30, "asked": 30}, {"seed": 5}, True),
        ({"limit": 30, "asked": 30, "seed": 5}, {"seed": 5}, False),
        ({"source": {"template": 2}}, {"template": 3}, True),
        ({"source": {"template": 2}}, {"template": 2}, False),
        ({}, {"templates": 3}, True),
        ({"templates": 3}, {"templates": 3}, False),
        ({"text": {"context": 512}}, {"context": 256}, True),
        ({"text": {"context": 512}}, {"context": 512}, False),
        ({}, {"context": 512}, True),
        ({}, {"dtype": "bfloat16"}, True),
        ({}, {"runtime": "transformers"}, True),
        ({}, {"device": "cpu", "batch_size": 1}, False),
    ],
    ids=str,
)
def test_options_that_stored_answers_were_not_evaluated_with_are_refused(
    tmp_path: Path, entry: dict[str, Any], keywords: dict[str, Any], refused: bool
) -> None:
    # The answers to another probe, of few facts, suit most of them.
    few = make_entry(asked=1, templates=entry.get("templates"))
    stored = make_answers(
        [], probes={"facts:few.jsonl": few, "text:x.txt" if "text" in entry else "atlas": make_entry(**entry)}
    )
    evaluation = Evaluation([], *build_run_options(keywords), keep_in=tmp_path)
    with pytest.raises(UnusedOptions) if refused else contextlib.nullcontext():
        check_none_evaluated([stored], evaluation)


def test_a_folder_that_another_run_uses_is_left_alone(root: Path, tmp_path: Path) -> None:
    evaluate(root / "llama", tmp_path / "a", root / "facts.jsonl")
    before = read_files(tmp_path / "a")
    with (tmp_path / "a" / LOCK).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="is in use by another run"):
            evaluate(root / "llama", tmp_path / "a", root / "facts.jsonl")
    # The other run has ended.
    evaluate(root / "llama", tmp_path / "a", root / "facts.jsonl")
    assert read_files(tmp_path / "a") == before


def test_a_run_that_waits_for_a_failing_one_gets_its_own_folder(tmp_path: Path) -> None:
    started, had_lock_file = threading.Event(), []

    def wait_for_lock() -> None:
        started.set()
        with lock_folder(tmp_path / "a", wait=True):
            had_lock_file.append((tmp_path / "a" / LOCK).is_file())
            (tmp_path / "a" / "answer").touch()

    thread = threading.Thread(target=wait_for_lock)
    with contextlib.suppress(UsageError), lock_folder(tmp_path / "a", wait=True):
        thread.start()
        started.wait()
        raise UsageError("It failed.")
    thread.join()
    assert had_lock_file == [True]
    assert (tmp_path / "a" / "answer").exists()


@pytest.mark.parametrize("where", ["a", "a/b"])
def test_a_broken_link_is_an_error(root: Path, tmp_path: Path, where: str) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "gone")
    with pytest.raises(OutputError, match=r"/a is a link that leads nowhere"):
        evaluate(root / "llama", tmp_path / where, root / "facts.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("name", ["atlas", "facts:mine.jsonl"])
def test_a_probe_in_place_of_the_folder_is_refused(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`report` takes its probes at this place."""
    monkeypatch.chdir(root)
    with pytest.raises(UsageError, match=f"{name} is the name of a probe, not of a folder"):
        compressknow.probe("llama", name)
    assert not (root / name).exists()


@pytest.mark.parametrize("content", ["letter.txt", TABLE, "model.safetensors", ".hidden"])
def test_a_folder_with_other_files_is_left_alone(root: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / content).write_text("the user's own")
    with pytest.raises(OutputError, match="is not an answers folder"):
        evaluate(root / "llama", tmp_path / "a", root / "facts.jsonl")
    assert read_files(tmp_path / "a") == {content: b"the user's own"}


def test_a_file_at_the_path_of_the_folder_is_left_alone(root: Path, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("the user's own")
    with pytest.raises(OutputError, match="is a file"):
        evaluate(root / "llama", tmp_path / "a", root / "facts.jsonl")
    assert (tmp_path / "a").read_text() == "the user's own"


@pytest.mark.parametrize("empty_before", [True, False])
def test_an_error_leaves_no_empty_folder(root: Path, tmp_path: Path, empty_before: bool) -> None:
    model = shutil.copytree(root / "llama", tmp_path / "model")
    (model / "tokenizer.json").unlink()
    if empty_before:
        (tmp_path / "deep" / "er").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        evaluate(model, tmp_path / "deep" / "er", root / "facts.jsonl")
    assert (tmp_path / "deep").exists() == empty_before
    assert not empty_before or not list((tmp_path / "deep" / "er").iterdir())


def test_a_reference_that_lacks_facts_is_refused(root: Path, tmp_path: Path) -> None:
    original = evaluate(root / "llama", tmp_path / "original", root / "facts.jsonl")
    rows = original.answers
    fewer = Answers(original.record, rows[:60])
    with pytest.raises(CompressknowError, match="lack 4 of 64 facts") as error:
        evaluate(root / "llama-3", tmp_path / "a", root / "facts.jsonl", reference=fewer)
    assert rows[60].fact_id in error.value.what
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("probe", "message"), [("facts", "on other facts or prompts"), ("atlas", "not evaluated on atlas")]
)
def test_stored_answers_to_other_facts_are_refused_before_any_evaluation(
    root: Path, tmp_path: Path, loads: list[Path], probe: str, message: str
) -> None:
    facts = f"facts:{root / 'facts.jsonl'}"
    compressknow.probe(root / "llama-3", tmp_path / "compressed", facts)
    with pytest.raises(CompressknowError, match=message):
        compressknow.report(
            root / "llama", tmp_path / "compressed", facts if probe == "facts" else probe, limit=30, answers=tmp_path
        )
    assert root / "llama" not in loads


def test_a_reference_with_other_facts_is_refused_before_any_evaluation(
    root: Path, tmp_path: Path, loads: list[Path]
) -> None:
    reference = evaluate(root / "llama", tmp_path / "original", root / "facts.jsonl", options=Options(limit=30))
    with pytest.raises(UsageError, match=r"was evaluated on other facts or prompts of facts:facts\.jsonl"):
        evaluate(root / "llama-3", tmp_path / "a", root / "facts.jsonl", reference=reference)
    assert loads == [root / "llama"]
    assert not (tmp_path / "a").exists()


def test_a_model_of_another_family_is_refused_before_its_evaluation(root: Path, tmp_path: Path) -> None:
    reference = evaluate(root / "llama", tmp_path / "original", root / "facts.jsonl")
    with pytest.raises(
        CompressknowError, match="bert is not a compressed version of llama: they differ in family"
    ) as error:
        evaluate(root / "bert", tmp_path / "a", root / "facts.jsonl", reference=reference)
    assert error.value.why == "The family of llama is causal, that of bert masked."
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("stored", [False, True])
def test_a_model_of_another_vocabulary_is_refused_before_any_is_loaded(
    root: Path, tmp_path: Path, loads: list[Path], stored: bool
) -> None:
    other, facts = shutil.copytree(root / "llama-3", tmp_path / "other"), root / "facts.jsonl"
    text = (other / "tokenizer.json").read_text(encoding="utf-8")
    (other / "tokenizer.json").write_text(text.replace('"capital"', '"Capital"'), encoding="utf-8")
    if stored:
        evaluate(root / "llama", tmp_path / "original", facts)
        loads.clear()
    original = tmp_path / "original" if stored else root / "llama"
    with pytest.raises(CompressknowError, match="other is not a compressed version of llama: they differ in vocab"):
        compressknow.report(original, [root / "llama-6", other], f"facts:{facts}", answers=tmp_path / "kept")
    if not stored:
        with pytest.raises(CompressknowError, match="they differ in vocabulary"):
            compressknow.compare(original, other, f"facts:{facts}", answers=tmp_path / "kept")
    assert not loads


def test_stored_answers_of_another_runtime_may_have_another_vocabulary() -> None:
    """They are compared as text."""
    made = [("a", None), ("b", {"name": "llama.cpp", "build": "b11739"}), ("b", None)]
    original, of_runtime, other = (make_answers([], make_model(vocabulary=each, runtime=of)) for each, of in made)
    probe = make_probe(make_known_facts())
    check_comparable([original, of_runtime], [probe])
    with pytest.raises(CompressknowError, match="they differ in vocabulary"):
        check_comparable([original, other], [probe])


def test_a_compressed_model_without_a_tokenizer_is_refused_before_any_is_loaded(
    root: Path, tmp_path: Path, loads: list[Path]
) -> None:
    other = shutil.copytree(root / "llama-3", tmp_path / "other", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(CheckpointError, match="other has no tokenizer"):
        compressknow.report(root / "llama", other, f"facts:{root / 'facts.jsonl'}", answers=tmp_path / "kept")
    assert not loads


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_known_answers_get_only_the_tokens_of_the_reference(
    root: Path, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts, compressed = root / "facts.jsonl", tmp_path / "compressed"
    compressknow.convert(root / family, compressed, prune=0.3)
    reference = evaluate(root / family, tmp_path / "original", facts)
    known = evaluate(compressed, tmp_path / "known", facts)
    evaluate(compressed, tmp_path / "whole", facts, reference=reference)
    with monkeypatch.context() as patched:
        patched.delattr("compressknow.evaluate.scoring.scorer.Scorer.answer")
        again = evaluate(compressed, tmp_path / "anew", facts, reference=reference, known=known)
    assert (tmp_path / "anew" / TABLE).read_bytes() == (tmp_path / "whole" / TABLE).read_bytes()
    assert again.answers[0].first_ids.tolist() != known.answers[0].first_ids.tolist()
    # A folder with answers that were scored on the model's own tokens gets others.
    evaluate(compressed, tmp_path / "known", facts, reference=reference)
    assert (tmp_path / "known" / TABLE).read_bytes() == (tmp_path / "whole" / TABLE).read_bytes()


def report(
    root: Path, compressed: Sequence[str], keep_in: Path, settings: Settings = SMALL, **options: Any
) -> list[str]:
    """Return the names of the answers folders that a report leaves."""
    compressknow.report(
        root / "llama",
        [root / name for name in compressed],
        [f"facts:{root / 'facts.jsonl'}"],
        settings=settings,
        answers=keep_in,
        options=Options(**options),
    )
    return sorted(path.name for path in keep_in.iterdir())


def test_a_report_evaluates_each_model_once(root: Path, tmp_path: Path, loads: list[Path]) -> None:
    names = ["llama-3", "llama-6", "llama-9"]
    folders = report(root, names[:2], tmp_path / "kept")
    assert [path.name for path in loads] == ["llama", "llama-3", "llama-6"]
    assert len(folders) == 3
    report(root, names, tmp_path / "kept")
    # The original is loaded again for its distributions, with which the last model is compared.
    assert [path.name for path in loads] == ["llama", "llama-3", "llama-6", "llama", "llama-9"]


def test_a_report_on_other_facts_or_in_another_precision_keeps_the_first_answers(
    root: Path, tmp_path: Path, loads: list[Path]
) -> None:
    for _ in range(2):
        report(root, ["llama-3"], tmp_path / "kept")
        report(root, ["llama-3"], tmp_path / "kept", limit=16)
        report(root, ["llama-3"], tmp_path / "kept", limit=16, seed=1)
        report(root, ["llama-3"], tmp_path / "kept", replace(SMALL, dtype="bfloat16"))
    assert [path.name for path in loads] == ["llama", "llama-3"] * 4


@pytest.mark.parametrize("architecture", ["T5ForConditionalGeneration", "T5Model"])
def test_another_first_token_of_the_decoder_evaluates_again(
    architecture: str, root: Path, tmp_path: Path, loads: list[Path]
) -> None:
    model = shutil.copytree(root / "t5", tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"architectures": [architecture]}
    start = config.pop("decoder_start_token_id")
    (model / "config.json").write_text(json.dumps(config))
    for token in (start, start, start + 5):
        (model / "generation_config.json").write_text(json.dumps({"decoder_start_token_id": token}))
        evaluate(model, tmp_path / "a", root / "facts.jsonl")
    assert len(loads) == 2


def test_a_report_in_another_wording_keeps_the_answers_to_the_first(
    root: Path, tmp_path: Path, loads: list[Path]
) -> None:
    bear = write_bear(tmp_path / "bear")
    first = Options(data=bear)
    for _ in range(2):
        for options in (first, replace(first, template=2), replace(first, templates=2)):
            compressknow.report(
                root / "llama", root / "llama-3", "bear", options=options, settings=SMALL, answers=tmp_path / "kept"
            )
    assert [path.name for path in loads] == ["llama", "llama-3"] * 3


def test_a_model_in_two_roles_is_evaluated_once_for_each(root: Path, tmp_path: Path, loads: list[Path]) -> None:
    for _ in range(2):
        report(root, ["llama"], tmp_path / "kept")
        assert [path.name for path in loads] == ["llama", "llama"]
