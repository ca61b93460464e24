"""Gather the answers for a report or comparison: read stored ones, and evaluate models to get the others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compressknow.base.errors import UnusedOptions, UsageError, suggest_word
from compressknow.base.files import find_cache_folder
from compressknow.base.progress import Listener, Stage, count_progress, relabel_progress, report_progress
from compressknow.engine.identity import locate, read_contents, read_export_record
from compressknow.evaluate.answers import Answer, Answers, change_model, is_answers_folder, read_answers
from compressknow.evaluate.distributions import Context, Distributions
from compressknow.evaluate.evaluate import check_alike, check_facts
from compressknow.evaluate.facts import Fact, Probe
from compressknow.evaluate.grades import PRODUCED, merge_wordings
from compressknow.evaluate.handle import ModelHandle, make_handles
from compressknow.evaluate.noise import NoiseFloors
from compressknow.evaluate.records import FactsInText, Guides, ProbeEntry
from compressknow.evaluate.run import check_unique, probe_model
from compressknow.evaluate.runtimes import Settings
from compressknow.evaluate.sources import Opened, Options, Task, check_taken, normalize_name, open_all
from compressknow.evaluate.sources.sets import PROTOCOLS
from compressknow.evaluate.speed import measure
from compressknow.evaluate.text import RunningText
from compressknow.model.checkpoint import build_server_error, is_address


def add_calibration(answers: Answers, model: ModelHandle, known_by: Answers | None) -> Answers:
    """Add to a model's record what its folder says about calibration, and which facts occur in the calibration text if
    that is available, or guided how a GGUF file was rounded. (Stored answers may come from another folder with the same
    weights.) `known_by` has the answers of the model that it is compared with; None for the original."""
    calibration = model.describe().get("calibration")
    in_text = find_facts_in_text(calibration, model, known_by) if calibration and known_by else None
    guides = _count_guides(answers, model, known_by) if known_by else None
    return change_model(answers, calibration=calibration, in_calibration=in_text, guides=guides)


def _count_guides(answers: Answers, model: ModelHandle, known_by: Answers) -> Guides | None:
    """Count the facts that guided how a GGUF file was rounded, as its record says; None if none was evaluated."""
    if model.located.path.suffix != ".gguf":
        return None
    known, kept = (
        {(each.probe, each.fact_id) for each in merge_wordings(side).answers if each.correct}
        for side in (known_by, answers)
    )
    guides = known & set(map(tuple, read_export_record(model.located.path).get("guided_by", ())))
    others = known - guides
    return Guides(len(guides), len(guides & kept), len(others), len(others & kept)) if guides else None


def find_facts_in_text(calibration: Mapping[str, Any], model: ModelHandle, known_by: Answers) -> FactsInText | None:
    """Count facts with subject and object in a calibration text, tokenized as by `model`; None if one is missing."""
    from compressknow.compress.calibrate.text import count_facts, reread_texts

    trusted = model.settings.trust_remote_code
    texts = reread_texts(model.located.path, calibration, trust_remote_code=trusted)
    facts = [answer for answer in known_by.answers if answer.sub_label.strip() and answer.gold.strip()]
    if not texts or not facts:
        return None
    known = [(answer.sub_label, answer.gold) for answer in facts if answer.correct]
    unknown = [(answer.sub_label, answer.gold) for answer in facts if not answer.correct]
    known_found = count_facts(texts, known)
    return FactsInText(len(facts), known_found + count_facts(texts, unknown), len(known), known_found)


def find_answers_folder() -> Path:
    """Return the folder of answers that reports share: ``$XDG_CACHE_HOME/compressknow/answers``."""
    return find_cache_folder() / "answers"


def open_named(probes: str | Sequence[str] | None, options: Options | None, known: str = "recognized") -> list[Opened]:
    """Open the probes that a user names, by default atlas. Raises UsageError as `open_all` does, for two probes of one
    name, and for a task if `known` means produced, which tasks do not tell."""
    opened = open_all(list_names(probes), options or Options())
    check_unique(opened)
    for task in opened:
        if known == PRODUCED and isinstance(task, Task):
            raise UsageError(
                f"The answers to {task.name} have no generated text, so none can count as produced.",
                hint="Choose probes of facts, such as atlas, or leave out --known produced.",
            )
    return opened


def check_has_facts(opened: Sequence[Opened], what: str) -> None:
    """Raise UsageError if all probes are running texts, since `what`, such as "A sweep", needs facts."""
    if all(isinstance(probe, RunningText) for probe in opened):
        raise UsageError(f"{what} needs facts, and {opened[0].name} is a text.", hint="Add a probe of facts: -p atlas.")


def check_gated(opened: Sequence[Opened], gated: Sequence[str | None]) -> None:
    """Raise UsageError if there is a gate but no facts, or if a gate names no domain or relation of the facts. `gated`
    is the name in each gate, None for all facts. The names of some tasks are known only after they have run."""
    if not gated:
        return
    check_has_facts(opened, "--fail-under")
    task_names = [probe.list_names() for probe in opened if isinstance(probe, Task)]
    if None not in task_names:
        facts = [fact for probe in opened if isinstance(probe, Probe) for fact in probe.facts]
        check_names(facts, gated, [name for names in task_names for name in names or ()])


def check_names(facts: Sequence[Fact | Answer], gated: Sequence[str | None], further: Sequence[str] = ()) -> None:
    """Raise UsageError if a gate names no domain or relation of these facts, nor one of the `further` names."""
    names = list(dict.fromkeys([*(fact.subject for fact in facts), *(fact.relation for fact in facts), *further]))
    if unknown := next((name for name in gated if name is not None and name not in names), None):
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        raise UsageError(
            f"--fail-under {unknown}=...: no facts have the domain or relation {unknown}.",
            hint=f"{suggest_word(unknown, names)}Choose from {', '.join(names[:8])}{more}.",
        )


def list_names(probes: str | Sequence[str] | None) -> list[str]:
    """Return one name, several or none, as a list. Raises UsageError for what is not a name."""
    names = list(probes or ()) if isinstance(probes, Iterable | None) and not isinstance(probes, str) else [probes]
    for name in names:
        if not isinstance(name, str):
            raise UsageError(f"A probe must be a name, such as atlas: {name!r}.")
    return names


@dataclass(frozen=True)
class Evaluation:
    """Probes to evaluate models on, the settings, and the folder of the answers.

    Attributes
    ----------
    probes : names; by default those of the answers folders, or atlas.
    keep_in : folder that gets one answers folder per model.
    timed : whether to measure the speed and the memory of each model; this is not possible for answers folders.
    known : what counts as known, for `gather_early`; see `compressknow.evaluate.grades`.
    gated : name in each gate, for `check_gated`.
    revision : of the original, if it is a Hub id.
    """

    probes: Sequence[str]
    options: Options
    settings: Settings
    keep_in: Path
    timed: bool = False
    known: str = "recognized"
    gated: Sequence[str | None] = ()
    revision: str | None = None
    on_progress: Listener | None = None


def gather(
    original: str | Path, compressed: Sequence[str | Path], evaluation: Evaluation
) -> tuple[Answers, list[Answers]]:
    """Return the original's answers and those of each compressed model, to the same probes.

    Models are evaluated on what is not stored yet, the original first: the others are scored on its most likely tokens,
    so that distributions can be compared. Answers folders are used unchanged. Raises CompressknowError if a model
    cannot be found, loaded or evaluated.
    """
    models = [original, *compressed]
    stored = [read_if_stored(model) for model in models]
    if all(stored):
        check_none_evaluated([answers for answers in stored if answers], evaluation)
        first, *others = [select_probes(answers, evaluation.probes) for answers in stored if answers]
        return first, others
    probes = open_matching(next(filter(None, stored), None), evaluation)
    sides = open_models(models, stored, evaluation, probes)
    handles = [side for side in sides if isinstance(side, ModelHandle)]
    # The original's distributions are needed only for other models that are evaluated now.
    needed = handles[0] is sides[0] and len(handles) > 1 and handles[0].located.url is None
    gathered: list[Answers] = []
    with Distributions(handles[0], evaluation.keep_in) if needed else contextlib.nullcontext() as distributions:
        for side in sides:
            if isinstance(side, Answers):
                gathered.append(side)
                continue
            listener = relabel_progress(evaluation.on_progress, number=handles.index(side) + 1, of=len(handles))
            context = Context(gathered[0] if gathered else None, distributions=distributions)
            folder = choose_folder(evaluation.keep_in, side, context, probes)
            answers = probe_model(side, probes, folder, context, on_progress=listener, wait=True)
            if not gathered:
                floors = NoiseFloors(side, folder, listener, distributions)
                answers = floors.add(probes, answers, sides[1:])
            gathered.append(finish_answers(answers, side, context.reference, evaluation.timed, listener))
    return gathered[0], gathered[1:]


def check_none_evaluated(stored: Sequence[Answers], evaluation: Evaluation) -> None:
    """Raise UnusedOptions for options that have no effect if all answers are stored."""
    if evaluation.timed:
        raise UnusedOptions(
            "--time measures models, and these are answers folders.",
            hint="Give a model, or leave --time out.",
            names=["time"],
        )
    settings, default = evaluation.settings, Settings()
    # Not the device and the batch size, which are expected to affect only the time.
    if unused := [name for name in ("dtype", "runtime") if getattr(settings, name) != getattr(default, name)]:
        raise UnusedOptions(
            f"--{unused[0]} determines how models are run, and these are answers folders.",
            hint="Give a model, or leave it out.",
            names=unused,
        )
    check_taken([name for answers in stored for name in answers.probes], evaluation.options)
    entries = [entry for answers in stored for entry in answers.record.probes.values()]
    changed = {name: getattr(evaluation.options, name) for name in evaluation.options.list_changed()}
    if unused := [name for name, value in changed.items() if any(_differs(entry, name, value) for entry in entries)]:
        raise UnusedOptions(
            f"--{unused[0]} {changed[unused[0]]} decides what is evaluated, and these folders have other answers.",
            hint="Leave it out to compare all of them, or give a model in place of a folder.",
            names=unused,
        )


def _differs(entry: ProbeEntry, name: str, value: Any) -> bool:
    """Return whether the entry is known to have been evaluated with another value of the option."""
    if name == "limit":
        evaluated = entry.text.get("chunks", 0) if entry.text else entry.asked // (entry.templates or 1)
        # A larger sample has other facts, too, unless there are no more.
        is_all = entry.limit is None or (entry.facts or evaluated) < entry.limit
        return value != entry.limit and (evaluated > value or not is_all)
    if entry.text:
        return name == "context" and entry.text.get("context") != value
    seed = None if entry.limit is None else entry.seed
    wording = (entry.source or {}).get("template")
    protocol = next((each for each, stored in PROTOCOLS.items() if stored == entry.protocol), None)
    values = {"seed": seed, "template": wording, "templates": entry.templates or 1, "protocol": protocol}
    return values.get(name) not in (None, value)


def read_if_stored(model: str | Path) -> Answers | None:
    """Read the answers if `model` is an answers folder, otherwise return None."""
    return read_answers(Path(model)) if is_answers_folder(Path(model)) else None


def open_models(
    models: Sequence[str | Path], stored: Sequence[Answers | None], evaluation: Evaluation, probes: Sequence[Opened]
) -> list[Answers | ModelHandle]:
    """Find, hash and check the models without stored answers; select the answers of the others to these probes. Raises
    as `make_handles`, `select_probes`, `check_facts` and `check_comparable` do, and CheckpointError for NaN weights."""
    stored = [answers and select_probes(answers, [probe.name for probe in probes]) for answers in stored]
    for answers in filter(None, stored):
        for probe in probes:
            check_facts(answers, probe)
    revisions = [evaluation.revision, *[None] * (len(models) - 1)]
    # Find all before evaluating the first, so that a wrong name fails at once.
    rows = zip(models, revisions, stored, strict=True)
    located = [locate(model, revision) for model, revision, answers in rows if not answers]
    handles = make_handles(located, evaluation.settings, probes, timed=evaluation.timed)
    remaining = iter(handles)
    sides = [answers or next(remaining) for answers in stored]
    check_comparable(sides, probes)
    for handle in handles:
        handle.check_sound(evaluation.on_progress)
    return sides


def check_comparable(sides: Sequence[Answers | ModelHandle], probes: Sequence[Opened]) -> None:
    """Raise CompressknowError if the files show that families or, unless all probes are texts, vocabularies differ."""
    first, *others = sides
    for other in others:
        check_alike("family", _find_family(first), _find_family(other))
    if all(isinstance(probe, RunningText) for probe in probes):
        return
    for other in others:
        # Skip loading two tokenizers, which takes seconds, if their files are identical, as they usually are.
        if isinstance(first, ModelHandle) and isinstance(other, ModelHandle) and first.has_tokenizer_of(other):
            continue
        name, vocabulary = _find_vocabulary(other)
        if vocabulary is not None:
            check_alike("vocabulary", _find_vocabulary(first), (name, vocabulary))


def _find_family(side: Answers | ModelHandle) -> tuple[str, str | None]:
    if isinstance(side, ModelHandle):
        return side.located.name, side.named_family
    return side.record.model.name, side.record.model.family


def _find_vocabulary(side: Answers | ModelHandle) -> tuple[str, str | int | None]:
    if isinstance(side, ModelHandle):
        return side.located.name, side.named_vocabulary
    model = side.record.model
    # Answers of another runtime are compared as text.
    return model.name, model.vocabulary if model.runtime is None else None


def finish_answers(
    answers: Answers, handle: ModelHandle | None, reference: Answers | None, timed: bool, on_progress: Listener | None
) -> Answers:
    """Add calibration and, if `timed`, speed to a model's answers; stored ones, without a `handle`, stay unchanged."""
    if handle is None:
        return answers
    handle.release()
    answers = add_calibration(answers, handle, reference)
    if not timed:
        return answers
    with report_progress(on_progress, Stage("time", handle.located.name)):
        return change_model(answers, speed=measure(handle.located, handle.settings))


def open_matching(known: Answers | None, evaluation: Evaluation) -> list[Opened]:
    """Open the named probes, by default those of the `known` answers with their sample, as `open_named` does."""
    names, options = list(evaluation.probes) or (list(known.probes) if known else []), evaluation.options
    entries = list(known.record.probes.values()) if known else []
    # No sample was drawn from probes with fewer facts.
    entry = next((each for each in entries if each.limit is not None), entries[0] if entries else None)
    if entry is not None and options.limit is None:
        options = replace(options, limit=entry.limit, seed=options.seed if entry.seed is None else entry.seed)
    opened = open_named(names, options, evaluation.known)
    check_gated(opened, evaluation.gated)
    return opened


def choose_folder(keep_in: Path, model: ModelHandle, context: Context, probes: Sequence[Opened] = ()) -> Path:
    """Return the folder for a model's answers: one per original whose tokens it is scored on, runtime, precision,
    sample and wording, since a folder has one set of answers per probe."""
    names = [model.sha256[:16], next(iter(model.runtime.key()), None), model.settings.dtype]
    if context.reference:
        names += [(context.sha256 or "")[:16], context.runtime]
    return keep_in / "-".join(name for name in (*names, *_name_choices(probes)) if name is not None)


def _name_choices(probes: Sequence[Opened]) -> list[str]:
    """Name the options of probes that are not at their defaults, such as ``limit100``."""
    default, choices = {"seed": 0, "template": 1}, dict[str, object]()
    for probe in probes:
        values = {name: getattr(probe, name, None) for name in ("limit", "seed", "templates", "context")}
        if isinstance(probe, Probe):
            wording = probe.source.get("template") if probe.templates is None else None
            values |= {"template": wording, "paper": "" if probe.fold_case else None}
        for name, value in values.items():
            # A run has one value of each, but no sample is drawn from probes with fewer facts.
            if value not in (None, default.get(name)):
                choices.setdefault(name, value)
    return [f"{name}{value}" for name, value in sorted(choices.items())]


def select_probes(answers: Answers, probes: Sequence[str]) -> Answers:
    """Return only the answers to these probes, or all if none is named. Raise UsageError if there are none to one."""
    if not probes:
        return answers
    probes = [probe if probe in answers.probes else normalize_name(probe) for probe in probes]
    if missing := [name for name in probes if name not in answers.probes]:
        raise UsageError(
            f"{answers.record.model.name} was not evaluated on {missing[0]}.",
            why=f"Its answers folder has {', '.join(answers.probes)}.",
            hint="Leave out -p, name one of these, or probe the model again.",
        )
    return answers.only(probes)


def find_both(
    a: tuple[str | Path, str | None], b: tuple[str | Path, str | None], settings: Settings, on_progress: Listener | None
) -> tuple[ModelHandle, ModelHandle]:
    """Find and hash two checkpoints, each a folder or hub id with a revision; the same one is hashed once. Raises
    CompressknowError if one is not found, UsageError if it is an answers folder."""
    for model, _ in (a, b):
        if is_address(model):
            raise build_server_error(model)
        if is_answers_folder(Path(model)):
            raise UsageError(
                f"{model} is an answers folder, not a checkpoint.",
                hint="Use `compressknow report` to compare answers, or give the checkpoints that they come from.",
            )
    first, second = make_handles([locate(*a), locate(*b)], settings)
    if first.located.path.resolve() == second.located.path.resolve():
        return first, first
    total = sum(path.stat().st_size for side in (first, second) for path in side.located.files)
    with report_progress(on_progress, Stage("hash", f"{a[0]} and {b[0]}")) as advance, ThreadPoolExecutor(2) as pool:
        read = count_progress(advance, total)
        first.contents, second.contents = pool.map(lambda side: read_contents(side.located, read), (first, second))
    return first, second


# Answers of a model, and answers of another that was scored on the first one's most likely tokens.
Direction = tuple[Answers, Answers]


def evaluate_both(
    a: ModelHandle, b: ModelHandle, probes: Sequence[Opened], keep_in: Path, on_progress: Listener | None
) -> tuple[Direction, Direction]:
    """Evaluate both models in both directions, with one in memory at a time: each for its own answers, and on the
    other's tokens. Answers in `keep_in` are reused. Raises CompressknowError if one fails, or vocabularies differ."""

    def evaluate(model: ModelHandle, context: Context) -> Answers:
        listener = relabel_progress(on_progress, number=1 if model is a else 2, of=2)
        folder = choose_folder(keep_in, model, context, probes)
        return probe_model(model, probes, folder, context, on_progress=listener, wait=True)

    if a.sha256 == b.sha256:
        answers = evaluate(a, Context())
        a.release()
        return (answers, answers), (answers, answers)
    with Distributions(a, keep_in) as distributions_a, Distributions(b, keep_in) as distributions_b:
        of_a = evaluate(a, Context(distributions=distributions_a))
        folder = choose_folder(keep_in, a, Context(), probes)
        of_a = NoiseFloors(a, folder, on_progress, distributions_a).add(probes, of_a, [b])
        a.release()
        b_on_a = evaluate(b, Context(of_a, distributions=distributions_a))
        distributions_a.close()
        of_b = evaluate(b, Context(known=b_on_a, distributions=distributions_b))
        b.release()
        a_on_b = evaluate(a, Context(of_b, known=of_a, distributions=distributions_b))
        a.release()
    return (of_a, b_on_a), (add_calibration(of_b, b, of_a), a_on_b)
