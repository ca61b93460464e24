"""Sweep a grid: one model in every cell, all evaluated on the same facts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Unpack

from compressknow.api.keywords import RunKeywords, api_function, build_run_options
from compressknow.base.errors import UnusedOptions, UsageError
from compressknow.base.packages import require
from compressknow.base.progress import OnProgress, relabel_progress, resolve_progress
from compressknow.engine.language_model import CPU
from compressknow.evaluate.gather import check_has_facts, open_named
from compressknow.evaluate.grades import RECOGNIZED, check_known
from compressknow.evaluate.noise import NoiseFloors
from compressknow.evaluate.runtimes import Settings
from compressknow.evaluate.sources import Options
from compressknow.evaluate.text import RunningText
from compressknow.model.structure import ModuleMap
from compressknow.pages.study.pages import write_study
from compressknow.pages.study.records import Study
from compressknow.study.cells import (
    CELLS,
    MODELS,
    ORIGINAL,
    TEXTS,
    CellResult,
    StudyModel,
    build_study,
    check_study_folder,
    claim,
    grade,
)
from compressknow.study.grid import PAPER, list_cells
from compressknow.study.running import CellBatch, RayOptions, open_runner


@api_function
def sweep(
    model: str | Path,
    output: str | Path,
    *,
    grid: str | Path | Mapping[str, Any] = PAPER,
    probe: str | Sequence[str] | None = None,
    options: Options | None = None,
    settings: Settings | None = None,
    known: str = RECOGNIZED,
    module_map: ModuleMap | None = None,
    quantize: str | None = None,
    calibration: str | None = None,
    calibration_tokens: int | None = None,
    save: bool = False,
    ray: RayOptions | str | None = None,
    num_cpus: float = 1,
    num_gpus: float = 0,
    revision: str | None = None,
    command: str | None = None,
    on_progress: OnProgress | None = None,
    on_result: Callable[[CellResult], object] | None = None,
    **keywords: Unpack[RunKeywords],
) -> Study:
    """Convert a model by every recipe of a grid, evaluate each variant like the original, and write the study.

    Variants are made in memory, identical to what `convert` would write. A stopped study resumes; a
    failed cell is recorded, and the rest continues.

    Parameters
    ----------
    model : a local folder or a hub id.
    output : folder of the study; one of this model, version and facts is resumed.
    grid : ``paper``, ``methods`` (Wanda, SparseGPT, GPTQ and SmoothQuant besides the paper's), a TOML file, or a dict
        with the content of one.
    probe : names; see `compressknow.probe`. At least one must have facts: running texts give perplexities.
    options, settings, keywords : see `compressknow.probe`.
    known : what counts as known; see `compressknow.report`. It can be changed later without evaluating again.
    module_map, quantize : for the paper's grid, by default its authors' (``paper``, ``int8-paper``); `module_map` is
        also for the grid of methods.
    calibration, calibration_tokens : for the grid of methods; see `compressknow.convert`.
    save : write each converted checkpoint too, under ``models/``.
    ray, num_cpus, num_gpus : run the cells on a Ray cluster: its address, or a `compressknow.RayOptions`.
    command : the command line to show.
    on_progress : called with each `compressknow.Progress`: as a cell is made, and as it is evaluated, or on a cluster
        as the answers of all cells come in; ``"bar"`` shows bars.
    on_result : called with the result of each cell, as soon as it is available.

    Returns
    -------
    The study, as in ``study.html``, ``study.json``, ``cells.parquet`` and ``cells.csv`` in `output`.

    Raises
    ------
    compressknow.CompressknowError : the model or a probe cannot be found or evaluated, the grid is not valid,
        the cluster does not answer, or `output` contains something else.
    """
    options, settings = build_run_options(keywords, options, settings)
    if not isinstance(ray, str) and (num_cpus, num_gpus) != (1, 0):
        raise UnusedOptions(
            "--num-cpus and --num-gpus are for tasks on a Ray cluster.",
            hint="Set them in the RayOptions." if ray else "Add --ray ADDRESS.",
            names=("num_cpus", "num_gpus"),
        )
    cluster = RayOptions(ray, num_cpus, num_gpus) if isinstance(ray, str) else ray
    require("matplotlib", "pyarrow", "scipy", *(["ray"] if cluster else []))
    check_known(known)
    folder, listener = Path(output), resolve_progress(on_progress)
    check_study_folder(folder)
    # Texts first: a model that cannot read one is refused before it is evaluated on anything else.
    opened = sorted(open_named(probe, options, known), key=lambda each: not isinstance(each, RunningText))
    check_has_facts(opened, "A sweep")
    # On a cluster, workers keep their own distributions.
    keep_in, models = None if cluster else folder, folder / MODELS if save else None
    with closing(
        StudyModel(model, settings, revision=revision, keep_in=keep_in, texts=folder / TEXTS, models=models)
    ) as study_model:
        if cluster and cluster.num_gpus and study_model.original.settings.device == CPU:
            raise UsageError(
                f"--num-gpus {cluster.num_gpus:g}: the original runs on this machine's CPU, and so do all cells.",
                hint="Run the command on a machine with a GPU, or leave out --num-gpus.",
            )
        # Only built-in grids open the model, so errors in a grid file are found first.
        cells = list_cells(
            grid,
            lambda: study_model.maker,
            module_map=module_map,
            quantize=quantize,
            calibration=calibration,
            calibration_tokens=calibration_tokens,
        )
        with claim(folder, study_model.original, probes=opened), open_runner(cluster, listener) as run:
            watched = relabel_progress(listener, of=len(cells) + 1)
            original = study_model.evaluate(
                study_model.original, opened, folder / ORIGINAL, None, watched, noise_floors=[NoiseFloors.add_precision]
            )
            before, by_cell = grade(original, known), {}
            with closing(run(CellBatch(study_model, cells, opened, folder / CELLS, original))) as results:
                for result in (study_model.add_facts_in_text(each.grade(before, known)) for each in results):
                    by_cell[result.cell] = result
                    if result.answers is not None:
                        study_model.save(result.cell, listener)
                    if on_result:
                        on_result(result)
            study = build_study(before, [by_cell[cell] for cell in cells], known=known, command=command)
            write_study(study, folder)
    return study
