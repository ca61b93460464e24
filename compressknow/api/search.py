"""Search for the smallest file that keeps a share of the knowledge, graded on facts that the search did not see."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Unpack

from compressknow.api.keywords import RunKeywords, api_function, build_run_options, list_rules
from compressknow.base.files import write_whole
from compressknow.base.format import count, parse_size
from compressknow.base.packages import require
from compressknow.base.progress import OnProgress, begin_stages, resolve_progress
from compressknow.base.reading import RECORD, read_json
from compressknow.comparison.records import Estimate
from compressknow.compress.calibrate.text import check_text
from compressknow.compress.steps import Calibration
from compressknow.engine.identity import locate
from compressknow.evaluate.answers import change_model
from compressknow.evaluate.gather import check_has_facts, find_facts_in_text, list_names, open_named
from compressknow.evaluate.grades import RECOGNIZED, check_known
from compressknow.evaluate.handle import ModelHandle
from compressknow.evaluate.noise import NoiseFloors
from compressknow.evaluate.runtimes import Settings
from compressknow.evaluate.sources import Options
from compressknow.evaluate.text import RunningText
from compressknow.gguf.choice import Rounding
from compressknow.pages.card.gate import parse_gates
from compressknow.pages.card.make import make_card
from compressknow.pages.card.pages import write_reports
from compressknow.pages.search import Search, Trial, write_search
from compressknow.study.allocation import Allocation
from compressknow.study.cells import ORIGINAL, AddNoiseFloor, StudyModel, check_study_folder, claim
from compressknow.study.formats import GGUF, NEEDED, CheckpointFormat, GgufFormat, SearchRequest, is_made, open_format
from compressknow.study.search import (
    LEVEL,
    Candidate,
    CandidateHandle,
    Candidates,
    EvaluationSet,
    SizeSearch,
    build_search,
    remove,
    split_facts,
)
from compressknow.study.sensitivity import FIT_TOKENS, Guide, can_guide

# Folders and files of a search; candidate files are in a hidden folder.
SEARCHED, HELD_OUT, GRADING, CANDIDATES = "searched", "held-out", "grading", ".parts"
RECIPE, REPORTS, PAGES = "recipe.toml", ("report.html", "report.md", "report.json"), ("search.html", "search.json")
WRITTEN = (*PAGES, RECIPE, *REPORTS)


@api_function
def search(
    model: str | Path,
    output: str | Path,
    *,
    keep: float | None = None,
    size: str | int | None = None,
    to: str | None = None,
    guide: Guide = "both",
    must: Mapping[str, str] | Sequence[tuple[str, str]] = (),
    rounding: Rounding | None = None,
    calibration: str | None = None,
    calibration_tokens: int | None = None,
    probe: str | Sequence[str] | None = None,
    facts: str | Sequence[str] | None = None,
    options: Options | None = None,
    settings: Settings | None = None,
    known: str = RECOGNIZED,
    no_facts: bool = False,
    revision: str | None = None,
    command: str | None = None,
    on_progress: OnProgress | None = None,
    on_result: Callable[[Trial], object] | None = None,
    **keywords: Unpack[RunKeywords],
) -> Search:
    """Find the smallest file of a model that keeps a share of its knowledge, or the best one of a size.

    Types are chosen for all weights so that the total predicted loss is least. Some facts, at most 450 of a probe,
    guide this choice and the sizes that are tried. A third of all facts selects the winner, by the lower end of its
    interval, and another third grades it: the reported share is of facts that had no part in the choice. A stopped
    search resumes, with the same result as without the interruption.

    Parameters
    ----------
    model : a local folder or a hub id.
    output : folder of the search; one of this model and version is resumed.
    keep : share of knowledge, between 0 and 1; or `size`, the maximum size of the file, as a number of bytes or a text
        (``"90MB"``).
    to : ``gguf`` (for llama.cpp; the default for models that generate) or ``checkpoint``.
    guide, must, rounding, calibration, calibration_tokens : as in `compressknow.export` with a size. For a checkpoint,
        `must` assigns types ``none``, ``int8-weights``, ``int4/64``, by scopes or regular expressions on modules.
    probe, facts, options, settings, keywords : see `compressknow.probe`; `facts` are more probes, and `seed` is also
        that of the split and the text. lm-eval's tasks cannot be held out. A running text among the probes does not
        guide the search: only the winner reads it, for its report card.
    known : what counts as known, on every split; see `compressknow.report`.
    no_facts : leave the text of every fact out of the winner's report card.
    on_progress : called with each `compressknow.Progress`, in facts; ``"bar"`` shows bars.
    on_result : called with the trial of each file, as soon as it is available.

    Returns
    -------
    The search, as in ``search.html`` and ``search.json`` in `output`; `winner` is None if no file keeps as much. With a
    winner, `output` also has ``model.gguf`` or ``model/``, ``recipe.toml`` and ``report.html``.

    Raises
    ------
    compressknow.GateNotMet : the model knows too few facts to show that any file keeps as much.
    compressknow.CompressknowError : the model or a probe cannot be found or evaluated, no file is that small, or
        `output` contains something else.
    """
    options, settings = build_run_options(keywords, options, settings)
    seed = options.seed
    request = SearchRequest(
        keep,
        None if size is None else parse_size(size),
        to,
        guide,
        list_rules("must", must),
        rounding,
        Calibration(calibration or "self", FIT_TOKENS if calibration_tokens is None else calibration_tokens, seed),
    )
    require("matplotlib", "pyarrow", "scipy", *(NEEDED if to == GGUF else []))
    check_known(known)
    check_text(request.text)
    folder, listener = Path(output), resolve_progress(on_progress)
    check_study_folder(folder)
    opened = open_named([*list_names(probe), *list_names(facts)], options, known)
    check_has_facts(opened, "A search")
    texts = [each for each in opened if isinstance(each, RunningText)]
    parts = [split_facts(each, seed) for each in opened if not isinstance(each, RunningText)]
    guided_by = [part.search for part in parts]
    number = sum(len(probe.facts) for probe in guided_by)
    can_guide(number, f"{count(number)} facts are left to search with", guide, is_search=True)

    begin = begin_stages(listener, model)
    with (
        closing(StudyModel(model, settings, revision=revision, keep_in=folder)) as study_model,
        claim(folder, study_model.original, known),
        open_format(study_model, request, folder, begin, listener) as form,
    ):
        if request.size is not None:
            form.check(request.size)
        if texts:  # A model that cannot read one is refused before it is evaluated on anything else.
            place = folder / GRADING / ORIGINAL
            floors = [NoiseFloors.add_precision]
            study_model.evaluate(study_model.original, texts, place, None, listener, noise_floors=floors)
        selection = None
        if keep is not None:
            selected_by = [part.selection for part in parts]
            selection = EvaluationSet(study_model, selected_by, folder / HELD_OUT, listener, known)
            selection.check_enough_known(keep)
        guided = EvaluationSet(study_model, guided_by, folder / SEARCHED, listener, known)
        # It imports torch, which takes seconds; wrong arguments have been reported by now.
        from compressknow.study.guides import measure_guides

        original, answers = study_model.original, guided.reference
        measured = measure_guides(original, guided_by, request.text, guide, form.roundings, listener, answers)
        sensitivity, read_by_gptq, text = measured
        form.learn(sensitivity, read_by_gptq)
        if isinstance(form, CheckpointFormat):  # Its files are rounded over the same text, which takes long to write.
            study_model.maker.use_text(request.text, text)
        graded_by = [part.grading if selection else part.held_out for part in parts]
        # What rounding, or the runtime, changes in the original's answers.
        noise: list[AddNoiseFloor] = [NoiseFloors.add_precision]
        if form.name == GGUF:
            noise.append(partial(NoiseFloors.add_runtime, floats=form.floats))
        grading = EvaluationSet(
            study_model, [*graded_by, *texts], folder / GRADING, listener, known, noise_floors=noise
        )
        candidates = Candidates(study_model.original, form, folder / CANDIDATES, begin)

        def estimate_kept(allocation: Allocation, by: EvaluationSet) -> Estimate:
            return by.estimate_kept(by.evaluate(CandidateHandle(candidates, allocation)), LEVEL)

        def evaluate(allocation: Allocation) -> Trial:
            trial = candidates.trial(allocation, estimate_kept(allocation, guided))
            if on_result:
                on_result(trial)
            return trial

        if keep is not None and selection is not None:
            chosen = SizeSearch(keep, (form.floor, form.ceiling), form.choose, evaluate, guided.provable)
            chosen.explore()
            chosen.confirm(lambda allocation: estimate_kept(allocation, selection))
            winner = chosen.winner
        else:
            chosen, allocation = None, form.choose(request.size or 0)
            winner = Candidate(allocation, candidates.trial(allocation, Estimate(None)))
        # The hash of what was read makes a file that has changed since count as missing.
        read = {**asdict(request.text), "source": request.text.text, "kind": request.text.kind}
        in_text = find_facts_in_text(read | {"sha256": form.guidance.text}, original, grading.original)
        result = build_search(request, form, chosen, guided, selection, grading, in_text, seed=seed, command=command)
        _remove_winner_of_other_form(folder, form.name)
        for name in WRITTEN:  # Left by an earlier search in this folder, for another share or size.
            (folder / name).unlink(missing_ok=True)
        if winner is None:
            remove(folder / form.file_name)
        else:
            candidates.place(winner.allocation, folder / form.file_name)
            handle = ModelHandle(locate(folder / form.file_name), candidates.settings)
            after = grading.evaluate(handle)
            trial = replace(winner.trial, graded=grading.estimate_kept(after))
            is_smallest = winner.allocation.nbytes == form.floor
            recipe = form.recipe(winner.allocation)
            result = replace(result, winner=trial, recipe=recipe, is_smallest=is_smallest)
            card = make_card(
                grading.reference,
                [change_model(after, in_calibration=in_text)],
                show_facts=not no_facts,
                known=known,
                command=command,
                gates=parse_gates(keep),
            )
            write_reports(card, [folder / name for name in REPORTS], overwrite=True)
            write_whole(folder / RECIPE, f"{result.recipe}\n".encode())
        write_search(result, folder)
        candidates.remove()
    return result


def _remove_winner_of_other_form(folder: Path, name: str) -> None:
    """Remove the winner of an earlier search in another format, according to its record."""
    try:
        earlier = read_json(folder / "search.json", RECORD)
    except (OSError, ValueError):
        return
    if not isinstance(earlier, dict):
        return
    for form in (GgufFormat, CheckpointFormat):
        if form.name == earlier.get("form") != name and earlier.get("winner") and is_made(folder / form.file_name):
            remove(folder / form.file_name)
