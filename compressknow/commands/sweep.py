"""sweep: one model, every cell of a grid, the same facts asked of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from compressknow.errors import UsageError
from compressknow.libraries import require
from compressknow.probe.answers import Answers
from compressknow.probe.run import Settings, refuse_twins
from compressknow.probe.sources import DEFAULT, Options, open_all
from compressknow.quiet import Bar, staged
from compressknow.report.study.records import Study
from compressknow.study.cells import Subject
from compressknow.study.folder import CELLS, MODELS, ORIGINAL, CellResult, claim, refuse_foreign, study_of
from compressknow.study.grid import PAPER_SCHEME, Cell, paper_grid, read_grid
from compressknow.study.running import Batch, RayOptions, runner

if TYPE_CHECKING:
    from compressknow.model.structure import ModuleMap

PAPER = "paper"
# Told each cell's result as it comes, and the original's answers.
Told = Callable[[CellResult, Answers], None]


def sweep(
    model: str | Path,
    output: str | Path,
    *,
    grid: str | Path = PAPER,
    probes: Sequence[str] | None = None,
    options: Options | None = None,
    settings: Settings | None = None,
    module_map: ModuleMap | None = None,
    scheme: str | None = None,
    save: bool = False,
    ray: RayOptions | None = None,
    revision: str | None = None,
    command: str | None = None,
    bar: Bar | None = None,
    told: Told | None = None,
) -> Study:
    """Convert a model in every way of a grid, ask each what the original was asked, and write the study.

    Variants are made in memory, each the very one that `convert` would write. A study that was stopped resumes; a
    cell that fails is recorded, and the rest goes on.

    Parameters
    ----------
    model : a local folder or a hub id.
    output : folder of the study; one of this model and version is resumed.
    grid : ``paper``, or a TOML file.
    probes : names; see `compressknow.probe`.
    options, settings : see `compressknow.probe`.
    module_map, scheme : of the paper's grid, by default those of its authors (``paper``, ``int8-paper``).
    save : write each converted checkpoint too, under ``models/``.
    ray : run the cells on a Ray cluster; see `compressknow.study.running.RayOptions`.
    command : the command line to show.
    bar : gives, for a stage that begins, a context with a callable that is told of its progress.
    told : is told each cell's result as it comes, and the original's answers.

    Returns
    -------
    The study, as ``study.html``, ``study.json``, ``cells.parquet`` and ``cells.csv`` in `output` show it.

    Raises
    ------
    compressknow.errors.CompressknowError : the model or a probe cannot be found or asked, the grid makes no sense, the
        cluster does not answer, or `output` holds something else.
    """
    from compressknow.report.study.pages import write_study

    require("matplotlib", "pyarrow", "scipy", *(["ray"] if ray else []))
    folder = Path(output)
    refuse_foreign(folder)
    asked = open_all([probes] if isinstance(probes, str) else probes or DEFAULT, options or Options())
    refuse_twins(asked)
    # On a cluster the workers keep what they need.
    kept = None if ray else folder
    with Subject(model, settings or Settings(), revision=revision, keep_in=kept) as subject:
        cells = _cells(subject, grid, module_map, scheme)
        with claim(folder, subject.original), runner(ray, bar) as run:
            original = subject.ask_original(asked, folder / ORIGINAL, staged(bar, of=len(cells) + 1))
            results = run(Batch(subject, cells, asked, folder / CELLS, original))
            found = {}
            with closing(results):
                for result in results:
                    found[result.cell] = result
                    if save and result.answers is not None:
                        _save(subject, result.cell, folder / MODELS)
                    if told:
                        told(result, original)
            study = study_of(original, [found[cell] for cell in cells], command=command)
            write_study(study, folder)
    return study


def _cells(subject: Subject, grid: str | Path, module_map: ModuleMap | None, scheme: str | None) -> tuple[Cell, ...]:
    if str(grid) != PAPER:
        if module_map or scheme:
            raise UsageError(
                "--module-map and --quantize are of the paper's grid.",
                hint="A grid file says both itself: module_map and quantize are axes and keys of it.",
            )
        return read_grid(Path(grid))
    chosen = module_map or "paper"
    return paper_grid(subject.maker.structure(chosen), module_map=chosen, scheme=scheme or PAPER_SCHEME)


def _save(subject: Subject, cell: Cell, models: Path) -> None:
    """Write the cell's checkpoint, unless a run before has."""
    from compressknow.compress.convert import convert
    from compressknow.report.model_card.render import model_card_for

    folder = models / subject.folder_of(cell)
    if not folder.exists():
        models.mkdir(exist_ok=True)
        convert(subject.maker.checkpoint.folder, folder, cell.recipe, render_card=model_card_for)
