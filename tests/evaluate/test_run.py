"""A folder of answers: nothing is asked twice, nothing is lost when a run is killed, nothing foreign is touched."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import compressknow
from compressknow.base.errors import CheckpointError, CompressknowError, DamagedAnswers, OutputError, UsageError
from compressknow.base.files import LOCK
from compressknow.base.progress import Listener, Progress
from compressknow.engine.identity import locate
from compressknow.evaluate import run
from compressknow.evaluate.answers import PARTS, RECORD, TABLE, Answers, lock_folder, read_answers, read_table
from compressknow.evaluate.distributions import Context
from compressknow.evaluate.facts import Probe
from compressknow.evaluate.handle import ModelHandle
from compressknow.evaluate.run import probe_model
from compressknow.evaluate.runtimes import Settings
from compressknow.evaluate.scoring import families
from compressknow.evaluate.sources import Options, open_all
from tests.knowing import KNOWN_FACTS, facts_file, in_wordings, knowing

FEW = Settings(batch_size=8, noise_floor=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints `bert`, `llama`, `t5`, two of them compressed, and their facts."""
    folder = tmp_path_factory.mktemp("place")
    for family in ("bert", "llama", "t5"):
        knowing(family, folder / family)
    for amount in (3, 6, 9):
        compressknow.convert(folder / "llama", folder / f"llama-{amount}", prune=amount / 10)
    facts_file(folder / "facts.jsonl")
    return folder


def ask(
    model: Path,
    folder: Path,
    facts: Sequence[Path] | Path,
    settings: Settings = FEW,
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
    """Tells how many facts are answered, each time that this changes."""
    return lambda progress: advance(progress.done) if progress.state == "advances" else None


def stopped_after(facts: int) -> Listener:
    """With this the user stops the run once so many facts are answered."""

    def advance(done: int) -> None:
        if done >= facts:
            raise KeyboardInterrupt

    return call_on_advance(advance)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def parts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each batch is put on disk as soon as it is answered."""
    monkeypatch.setattr(run, "SECONDS_BETWEEN_PARTS", 0.0)


@pytest.mark.usefixtures("parts_at_once")
@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_a_run_that_was_killed_goes_on_where_it_was(place: Path, family: str, tmp_path: Path) -> None:
    whole = ask(place / family, tmp_path / "whole", place / "facts.jsonl")
    with pytest.raises(KeyboardInterrupt):
        ask(place / family, tmp_path / "killed", place / "facts.jsonl", on_progress=stopped_after(40))
    kept = [answer for part in (tmp_path / "killed" / PARTS).rglob("*.parquet") for answer in read_table(part)]
    assert 40 <= len(kept) < 64

    handle = ModelHandle(locate(place / family), FEW)
    rows: list[int] = []
    (probe,) = open_all([f"facts:{place / 'facts.jsonl'}"], Options())
    scorers = families.make_scorer

    def counting(*arguments: object) -> object:
        scorer = scorers(*arguments)  # type: ignore[arg-type]
        answer = scorer.answer
        scorer.answer = lambda batch, *more: rows.append(len(batch)) or answer(batch, *more)
        return scorer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "make_scorer", counting)
        resumed = probe_model(handle, [probe], tmp_path / "killed", Context())

    assert sum(rows) == len(KNOWN_FACTS) - len(kept)
    assert (tmp_path / "killed" / TABLE).read_bytes() == (tmp_path / "whole" / TABLE).read_bytes()
    assert [answer.predicted for answer in resumed.answers] == [answer.predicted for answer in whole.answers]
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == [LOCK, TABLE, RECORD]


@pytest.mark.usefixtures("parts_at_once")
def test_what_a_killed_run_asked_otherwise_is_not_taken_up_and_waits_for_it(place: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        ask(place / "llama", tmp_path / "a", place / "facts.jsonl", on_progress=stopped_after(40))
    told: list[int] = []
    settings = Settings(batch_size=16)
    ask(place / "llama", tmp_path / "a", place / "facts.jsonl", settings, on_progress=call_on_advance(told.append))
    ask(place / "llama", tmp_path / "b", place / "facts.jsonl", settings)
    assert told[-1] == 64
    assert (tmp_path / "a" / TABLE).read_bytes() == (tmp_path / "b" / TABLE).read_bytes()
    # Who tries a few facts meanwhile loses nothing of a long run.
    ask(place / "llama", tmp_path / "a", place / "facts.jsonl", options=Options(limit=4))
    told.clear()
    ask(place / "llama", tmp_path / "a", place / "facts.jsonl", on_progress=call_on_advance(told.append))
    assert min(done for done in told if done) >= 40
    assert not (tmp_path / "a" / PARTS).exists()


def test_a_run_killed_between_answers_and_record_starts_again(place: Path, tmp_path: Path) -> None:
    ask(place / "llama", tmp_path / "a", place / "facts.jsonl")
    whole = (tmp_path / "a" / TABLE).read_bytes()
    (tmp_path / "a" / RECORD).unlink()
    (tmp_path / "a" / f".{TABLE}.compressknow-0123abcd").write_bytes(b"half a fi")
    ask(place / "llama", tmp_path / "a", place / "facts.jsonl")
    assert (tmp_path / "a" / TABLE).read_bytes() == whole
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [LOCK, TABLE, RECORD]


@pytest.mark.parametrize("name", [TABLE, RECORD])
@pytest.mark.parametrize("damage", ["cut", "removed"])
def test_a_run_says_which_damaged_answers_to_remove_and_gives_them_again(
    place: Path, tmp_path: Path, name: str, damage: str
) -> None:
    ask(place / "llama", tmp_path / "a", place / "facts.jsonl")
    whole, path = (tmp_path / "a" / TABLE).read_bytes(), tmp_path / "a" / name
    path.write_bytes(path.read_bytes()[:100]) if damage == "cut" else path.unlink()
    if (name, damage) != (RECORD, "removed"):
        with pytest.raises(DamagedAnswers, match=f"/{name}|{name} is missing or damaged") as told:
            ask(place / "llama", tmp_path / "a", place / "facts.jsonl")
        hint = f"Remove {tmp_path / 'a'}, and repeat the command, which evaluates its contents again."
        assert told.value.hint == hint
        shutil.rmtree(tmp_path / "a")
    ask(place / "llama", tmp_path / "a", place / "facts.jsonl")
    assert (tmp_path / "a" / TABLE).read_bytes() == whole


def test_a_model_that_has_not_changed_is_not_even_loaded_again(place: Path, tmp_path: Path, loads: list[Path]) -> None:
    first = ask(place / "llama", tmp_path / "a", place / "facts.jsonl")
    before = bytes_of(tmp_path / "a")
    shutil.copytree(place / "llama", tmp_path / "the same under another name")
    (tmp_path / "the same under another name" / "README.md").write_text("A card.")
    again = ask(tmp_path / "the same under another name", tmp_path / "a", place / "facts.jsonl")
    assert loads == [place / "llama"]
    assert (first.record.model.name, again.record.model.name) == ("llama", "the same under another name")
    assert replace(again.record, model=first.record.model) == first.record
    assert bytes_of(tmp_path / "a") == before


def test_changed_weights_are_refused_in_the_folder_of_the_old_ones(place: Path, tmp_path: Path) -> None:
    model = shutil.copytree(place / "llama", tmp_path / "model")
    ask(model, tmp_path / "a", place / "facts.jsonl")
    before = bytes_of(tmp_path / "a")
    shutil.copy(place / "llama-3" / "model.safetensors", model / "model.safetensors")
    with pytest.raises(OutputError, match="has the answers of another model") as error:
        ask(model, tmp_path / "a", place / "facts.jsonl")
    assert "files have changed since then" in str(error.value.why)
    assert bytes_of(tmp_path / "a") == before


@pytest.mark.parametrize("settings", [Settings(batch_size=4), Settings(batch_size=8, dtype="bfloat16")])
def test_another_way_of_running_asks_anew(place: Path, tmp_path: Path, settings: Settings, loads: list[Path]) -> None:
    ask(place / "llama", tmp_path / "a", place / "facts.jsonl")
    answers = ask(place / "llama", tmp_path / "a", place / "facts.jsonl", settings)
    assert len(loads) == 2
    assert len(answers.answers) == 64
    assert answers.record.model.computed_in == settings.here().computed_in


def test_another_release_of_transformers_asks_anew(
    place: Path, tmp_path: Path, loads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(place / "llama", tmp_path / "a", place / "facts.jsonl")
    installed = run.version
    monkeypatch.setattr(run, "version", lambda name: "9.9" if name == "transformers" else installed(name))
    answers = ask(place / "llama", tmp_path / "a", place / "facts.jsonl")
    assert len(loads) == 2
    assert answers.record.versions["transformers"] == "9.9"


def test_code_that_is_trusted_now_asks_anew(tmp_path: Path) -> None:
    model, facts = knowing("llama", tmp_path / "llama"), facts_file(tmp_path / "facts.jsonl")
    own = "from transformers import LlamaForCausalLM\n\n\nclass OwnForCausalLM(LlamaForCausalLM):\n"
    own += "    def forward(self, *given, **named):\n        output = super().forward(*given, **named)\n"
    (model / "own.py").write_text(f"{own}        output.logits = -output.logits\n        return output\n")
    config = json.loads((model / "config.json").read_text())
    config |= {"architectures": ["OwnForCausalLM"], "auto_map": {"AutoModelForCausalLM": "own.OwnForCausalLM"}}
    (model / "config.json").write_text(json.dumps(config))
    for trusted, architecture, right in ((False, "LlamaForCausalLM", 64), (True, "OwnForCausalLM", 0)):
        answers = ask(model, tmp_path / "a", facts, replace(FEW, trust_remote_code=trusted))
        assert answers.record.model.architecture == architecture
        assert sum(answer.correct for answer in answers.answers) == right


def test_one_folder_holds_several_probes_and_a_new_one_leaves_the_others(
    place: Path, tmp_path: Path, loads: list[Path]
) -> None:
    lines = (place / "facts.jsonl").read_text().splitlines(keepends=True)
    files = [tmp_path / f"{name}.jsonl" for name in ("one", "two", "three")]
    for number, file in enumerate(files):
        file.write_text("".join(lines[16 * number : 16 * number + 16]))
    ask(place / "llama", tmp_path / "a", files[:2])
    first = read_answers(tmp_path / "a")
    added = ask(place / "llama", tmp_path / "a", [files[2], files[0]])
    both = read_answers(tmp_path / "a")

    assert len(loads) == 2
    assert added.probes == ("facts:three.jsonl", "facts:one.jsonl")
    assert both.probes == ("facts:one.jsonl", "facts:two.jsonl", "facts:three.jsonl")
    assert len(both.answers) == 48
    for probe in first.probes:
        assert both.record.probes[probe] == first.record.probes[probe]
        assert [a.fact_id for a in both.of(probe)] == [a.fact_id for a in first.of(probe)]


def test_a_changed_facts_file_is_asked_anew_in_place_of_the_old_one(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "facts.jsonl"
    lines = (place / "facts.jsonl").read_text().splitlines(keepends=True)
    file.write_text("".join(lines))
    ask(place / "llama", tmp_path / "a", file)
    file.write_text("".join(lines[:20]))
    assert len(ask(place / "llama", tmp_path / "a", file).answers) == 20
    assert len(read_table(tmp_path / "a" / TABLE)) == 20


def test_a_fact_outside_the_sample_that_is_an_example_asks_anew(place: Path, tmp_path: Path) -> None:
    file, few = tmp_path / "facts.jsonl", Options(limit=4)
    file.write_text((place / "facts.jsonl").read_text())
    original = ask(place / "llama", tmp_path / "original", file, options=few)
    (probe,) = open_all([f"facts:{file}"], few)
    assert isinstance(probe, Probe)
    sampled = {fact.prompt for fact in probe.facts}

    def ask_pruned(folder: str) -> list[str | None]:
        found = ask(place / "llama-9", tmp_path / folder, file, options=few, reference=original)
        return [answer.with_example for answer in found.answers]

    before = ask_pruned("a")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    other = {"capital": "Zemra", "language": "Dorse", "food": "salt", "home": "ice"}
    for row in rows:
        if row["prompt"] not in sampled:
            row["obj_label"] = other[row["relation"]]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert ask_pruned("a") == ask_pruned("b") != before


def test_domains_that_are_corrected_are_those_of_answers_that_are_kept(
    place: Path, tmp_path: Path, loads: list[Path]
) -> None:
    text = (place / "facts.jsonl").read_text()
    (tmp_path / "facts.jsonl").write_text(text)
    first = ask(place / "llama", tmp_path / "a", tmp_path / "facts.jsonl")
    (tmp_path / "facts.jsonl").write_text(text.replace('"geography"', '"places"').replace('"popularity": 10,', ""))
    again = ask(place / "llama", tmp_path / "a", tmp_path / "facts.jsonl")
    assert len(loads) == 1
    assert {answer.subject for answer in again.answers} == {"places", "science"}
    assert [answer.predicted for answer in again.answers] == [answer.predicted for answer in first.answers]
    stored = read_answers(tmp_path / "a")
    assert [(a.fact_id, a.subject, a.popularity) for a in stored.answers] == [
        (a.fact_id, a.subject, a.popularity) for a in again.answers
    ]
    before = bytes_of(tmp_path / "a")
    ask(place / "llama", tmp_path / "a", tmp_path / "facts.jsonl")
    assert bytes_of(tmp_path / "a") == before


def test_the_files_of_large_models_are_read_as_a_stage(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Minutes, where they lie on a slow disk."""
    told: list[Progress] = []
    models = [place / "llama", place / "llama-3"]
    monkeypatch.setattr("compressknow.evaluate.handle.LARGE", 0)
    facts = f"facts:{place / 'facts.jsonl'}"
    compressknow.report(*models, facts, settings=FEW, answers=tmp_path / "kept", on_progress=told.append)
    read = [progress for progress in told if progress.stage.work == "hash"]
    assert told[: len(read)] == read
    assert [progress.stage.model for progress in read if progress.state == "ends"] == ["llama", "llama-3"]
    sizes = [sum(path.stat().st_size for path in locate(model).files) for model in models]
    assert [progress.done for progress in read if progress.state == "ends"] == sizes


def test_a_failed_probe_leaves_the_answers_that_were_there(place: Path, tmp_path: Path) -> None:
    ask(place / "llama", tmp_path / "a", place / "facts.jsonl")
    before = bytes_of(tmp_path / "a")
    other = Path(shutil.copy(place / "facts.jsonl", tmp_path / "other.jsonl"))
    with pytest.raises(CompressknowError, match=r"was not evaluated on facts:other\.jsonl"):
        ask(place / "llama", tmp_path / "a", other, reference=read_answers(tmp_path / "a"))
    assert bytes_of(tmp_path / "a") == before


def test_two_facts_files_of_one_name_are_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    twin = shutil.copy(place / "facts.jsonl", tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=r"Two probes have the name facts:facts\.jsonl"):
        ask(place / "llama", tmp_path / "a", [place / "facts.jsonl", Path(twin)])
    assert not (tmp_path / "a").exists()


def test_a_sample_is_drawn_by_its_seed(place: Path, tmp_path: Path) -> None:
    def asked(folder: str, limit: int, seed: int) -> set[str]:
        options = Options(limit=limit, seed=seed)
        answers = ask(place / "llama", tmp_path / folder, place / "facts.jsonl", options=options)
        entry = answers.record.probes["facts:facts.jsonl"]
        assert (entry.limit, entry.seed, entry.facts, entry.asked) == (limit, seed, 64, limit)
        return {answer.fact_id for answer in answers.answers}

    twelve = asked("a", 12, 0)
    assert asked("b", 12, 0) == twelve
    assert asked("c", 12, 1) != twelve
    assert asked("d", 20, 0) > twelve


def test_a_model_is_evaluated_on_the_sample_of_stored_answers(place: Path, tmp_path: Path) -> None:
    lines = (place / "facts.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "few.jsonl").write_text("".join(lines[:4]))
    ask(place / "llama", tmp_path / "original", [tmp_path / "few.jsonl", place / "facts.jsonl"], FEW, Options(limit=12))
    probes = [f"facts:{tmp_path / 'few.jsonl'}", f"facts:{place / 'facts.jsonl'}"]
    card = compressknow.report(tmp_path / "original", place / "llama-3", probes, answers=tmp_path / "kept")
    assert [probe.counts.n for probe in card.comparisons[0].probes] == [4, 12]


def test_a_folder_that_another_run_uses_is_left_alone(place: Path, tmp_path: Path) -> None:
    ask(place / "llama", tmp_path / "a", place / "facts.jsonl")
    before = bytes_of(tmp_path / "a")
    with (tmp_path / "a" / LOCK).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="is in use by another run"):
            ask(place / "llama", tmp_path / "a", place / "facts.jsonl")
    # The other run has ended.
    ask(place / "llama", tmp_path / "a", place / "facts.jsonl")
    assert bytes_of(tmp_path / "a") == before


def test_who_waits_for_a_run_that_fails_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    started, seen = threading.Event(), []

    def wait_for_it() -> None:
        started.set()
        with lock_folder(tmp_path / "a", wait=True):
            seen.append((tmp_path / "a" / LOCK).is_file())
            (tmp_path / "a" / "answer").touch()

    waiting = threading.Thread(target=wait_for_it)
    with contextlib.suppress(UsageError), lock_folder(tmp_path / "a", wait=True):
        waiting.start()
        started.wait()
        raise UsageError("It failed.")
    waiting.join()
    assert seen == [True]
    assert (tmp_path / "a" / "answer").exists()


@pytest.mark.parametrize("where", ["a", "a/b"])
def test_a_link_that_leads_nowhere_is_one_message(place: Path, tmp_path: Path, where: str) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "gone")
    with pytest.raises(OutputError, match=r"/a is a link that leads nowhere"):
        ask(place / "llama", tmp_path / where, place / "facts.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("content", ["letter.txt", TABLE, "model.safetensors", ".hidden"])
def test_a_folder_that_holds_something_else_is_left_alone(place: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / content).write_text("the user's own")
    with pytest.raises(OutputError, match="is not an answers folder"):
        ask(place / "llama", tmp_path / "a", place / "facts.jsonl")
    assert bytes_of(tmp_path / "a") == {content: b"the user's own"}


def test_a_file_in_the_place_of_the_folder_is_left_alone(place: Path, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("the user's own")
    with pytest.raises(OutputError, match="is a file"):
        ask(place / "llama", tmp_path / "a", place / "facts.jsonl")
    assert (tmp_path / "a").read_text() == "the user's own"


@pytest.mark.parametrize("empty_before", [True, False])
def test_an_error_leaves_no_empty_folder(place: Path, tmp_path: Path, empty_before: bool) -> None:
    model = shutil.copytree(place / "llama", tmp_path / "model")
    (model / "tokenizer.json").unlink()
    if empty_before:
        (tmp_path / "deep" / "er").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        ask(model, tmp_path / "deep" / "er", place / "facts.jsonl")
    assert (tmp_path / "deep").exists() == empty_before
    assert not empty_before or not list((tmp_path / "deep" / "er").iterdir())


def test_a_reference_that_lacks_facts_is_refused(place: Path, tmp_path: Path) -> None:
    original = ask(place / "llama", tmp_path / "original", place / "facts.jsonl")
    rows = original.answers
    fewer = Answers(original.record, rows[:60])
    with pytest.raises(CompressknowError, match="lack 4 of 64 facts") as error:
        ask(place / "llama-3", tmp_path / "a", place / "facts.jsonl", reference=fewer)
    assert rows[60].fact_id in error.value.what
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("probe", "told"), [("facts", "on other facts or prompts"), ("atlas", "not evaluated on atlas")]
)
def test_stored_answers_to_other_questions_are_refused_before_any_is_asked(
    place: Path, tmp_path: Path, loads: list[Path], probe: str, told: str
) -> None:
    facts = f"facts:{place / 'facts.jsonl'}"
    compressknow.probe(place / "llama-3", tmp_path / "compressed", facts)
    with pytest.raises(CompressknowError, match=told):
        compressknow.report(
            place / "llama", tmp_path / "compressed", facts if probe == "facts" else probe, limit=30, answers=tmp_path
        )
    assert place / "llama" not in loads


def test_a_reference_that_was_asked_other_questions_is_refused_before_any_is_asked(
    place: Path, tmp_path: Path, loads: list[Path]
) -> None:
    reference = ask(place / "llama", tmp_path / "original", place / "facts.jsonl", options=Options(limit=30))
    with pytest.raises(UsageError, match=r"was evaluated on other facts or prompts of facts:facts\.jsonl"):
        ask(place / "llama-3", tmp_path / "a", place / "facts.jsonl", reference=reference)
    assert loads == [place / "llama"]
    assert not (tmp_path / "a").exists()


def test_a_model_of_another_kind_is_refused_before_it_is_asked(place: Path, tmp_path: Path) -> None:
    reference = ask(place / "llama", tmp_path / "original", place / "facts.jsonl")
    with pytest.raises(
        CompressknowError, match="bert is not a compressed version of llama: they differ in family"
    ) as error:
        ask(place / "bert", tmp_path / "a", place / "facts.jsonl", reference=reference)
    assert error.value.why == "The family of llama is causal, that of bert masked."
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("stored", [False, True])
def test_a_model_of_another_vocabulary_is_refused_before_any_is_loaded(
    place: Path, tmp_path: Path, loads: list[Path], stored: bool
) -> None:
    other, facts = shutil.copytree(place / "llama-3", tmp_path / "other"), place / "facts.jsonl"
    text = (other / "tokenizer.json").read_text(encoding="utf-8")
    (other / "tokenizer.json").write_text(text.replace('"capital"', '"Capital"'), encoding="utf-8")
    if stored:
        ask(place / "llama", tmp_path / "original", facts)
        loads.clear()
    original = tmp_path / "original" if stored else place / "llama"
    with pytest.raises(CompressknowError, match="other is not a compressed version of llama: they differ in vocab"):
        compressknow.report(original, [place / "llama-6", other], f"facts:{facts}", answers=tmp_path / "kept")
    if not stored:
        with pytest.raises(CompressknowError, match="they differ in vocabulary"):
            compressknow.compare(original, other, f"facts:{facts}", answers=tmp_path / "kept")
    assert not loads


def test_a_compressed_model_without_a_tokenizer_is_refused_before_any_is_loaded(
    place: Path, tmp_path: Path, loads: list[Path]
) -> None:
    other = shutil.copytree(place / "llama-3", tmp_path / "other", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(CheckpointError, match="other has no tokenizer"):
        compressknow.report(place / "llama", other, f"facts:{place / 'facts.jsonl'}", answers=tmp_path / "kept")
    assert not loads


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_known_answers_are_asked_the_other_tokens_alone(
    place: Path, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts, compressed = place / "facts.jsonl", tmp_path / "compressed"
    compressknow.convert(place / family, compressed, prune=0.3)
    reference = ask(place / family, tmp_path / "original", facts)
    known = ask(compressed, tmp_path / "known", facts)
    ask(compressed, tmp_path / "whole", facts, reference=reference)
    with monkeypatch.context() as patched:
        patched.delattr("compressknow.evaluate.scoring.scorer.Scorer.answer")
        anew = ask(compressed, tmp_path / "anew", facts, reference=reference, known=known)
    assert (tmp_path / "anew" / TABLE).read_bytes() == (tmp_path / "whole" / TABLE).read_bytes()
    assert anew.answers[0].first_ids.tolist() != known.answers[0].first_ids.tolist()


def report_on(
    place: Path, compressed: Sequence[str], keep_in: Path, settings: Settings = FEW, **options: Any
) -> list[str]:
    """The names of the folders of answers that a report leaves."""
    compressknow.report(
        place / "llama",
        [place / name for name in compressed],
        [f"facts:{place / 'facts.jsonl'}"],
        settings=settings,
        answers=keep_in,
        options=Options(**options),
    )
    return sorted(path.name for path in keep_in.iterdir())


def test_a_report_asks_each_model_once_and_the_original_once_for_all(
    place: Path, tmp_path: Path, loads: list[Path]
) -> None:
    names = ["llama-3", "llama-6", "llama-9"]
    folders = report_on(place, names[:2], tmp_path / "kept")
    assert [path.name for path in loads] == ["llama", "llama-3", "llama-6"]
    assert len(folders) == 3
    report_on(place, names, tmp_path / "kept")
    # The original once more for its distributions, with which only the last one is compared.
    assert [path.name for path in loads] == ["llama", "llama-3", "llama-6", "llama", "llama-9"]


def test_a_report_on_other_facts_or_in_another_precision_leaves_the_answers_of_the_first(
    place: Path, tmp_path: Path, loads: list[Path]
) -> None:
    for _ in range(2):
        report_on(place, ["llama-3"], tmp_path / "kept")
        report_on(place, ["llama-3"], tmp_path / "kept", limit=16)
        report_on(place, ["llama-3"], tmp_path / "kept", limit=16, seed=1)
        report_on(place, ["llama-3"], tmp_path / "kept", replace(FEW, dtype="bfloat16"))
    assert [path.name for path in loads] == ["llama", "llama-3"] * 4


@pytest.mark.parametrize("architecture", ["T5ForConditionalGeneration", "T5Model"])
def test_the_token_that_a_decoder_begins_with_decides_the_answers(
    architecture: str, place: Path, tmp_path: Path, loads: list[Path]
) -> None:
    model = shutil.copytree(place / "t5", tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"architectures": [architecture]}
    start = config.pop("decoder_start_token_id")
    (model / "config.json").write_text(json.dumps(config))
    for token in (start, start, start + 5):
        (model / "generation_config.json").write_text(json.dumps({"decoder_start_token_id": token}))
        ask(model, tmp_path / "a", place / "facts.jsonl")
    assert len(loads) == 2


def test_a_report_in_another_wording_leaves_the_answers_to_the_first(
    place: Path, tmp_path: Path, loads: list[Path]
) -> None:
    bear = in_wordings(tmp_path / "bear")
    first = Options(data=bear)
    for _ in range(2):
        for options in (first, replace(first, template=2), replace(first, templates=2)):
            compressknow.report(
                place / "llama", place / "llama-3", "bear", options=options, settings=FEW, answers=tmp_path / "kept"
            )
    assert [path.name for path in loads] == ["llama", "llama-3"] * 3


def test_a_model_in_two_reports_in_two_roles_is_asked_once_for_each(
    place: Path, tmp_path: Path, loads: list[Path]
) -> None:
    for _ in range(2):
        report_on(place, ["llama"], tmp_path / "kept")
        assert [path.name for path in loads] == ["llama", "llama"]
