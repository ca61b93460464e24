"""`compressknow sweep`: one model converted by every recipe of a grid, each evaluated on the same facts."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compressknow.base.format import clean, count, slugify, write_percent, write_size
from compressknow.cli import RESUMES, explain_interrupt
from compressknow.cli import options as opt
from compressknow.cli.report import get_command
from compressknow.cli.terminal import ProgressLines, TableRows, pad, show, show_json_text, wrap
from compressknow.pages.records import write_estimate

if TYPE_CHECKING:
    from compressknow.evaluate.answers import Answers
    from compressknow.pages.study.records import Study
    from compressknow.study.cells import CellResult

NAME = 34
COLUMNS = f"{'Setup':<{NAME}}{'Kept (95 % interval)':<28}{'Right':>8}{'On disk':>10}"
GRID = """\
\b
A grid file (--grid FILE.toml) has axes, whose combinations are all run, and
single cells:
  [axes]
  scope = ["attention", "feed-forward", "overall"]
  method = ["l1-unstructured"]      # and wanda, sparsegpt, ln-structured, ...
  prune = [0, 0.5]                  # 0: none
  pattern = ["none", "2:4"]         # for methods that have patterns
  quantize = ["none", "int8"]       # and int8-paper, int8-weights, fp8, int4
  rounding = ["nearest", "gptq"]    # for every scheme but int8-paper
  smooth = [0, 0.5]                 # for int8 and fp8; group_size for int4
  calibration = ["self"]            # or FILE.txt, ...; calibration_tokens
  layers = ["0-5"]                  # also: seed, module_map, norm, dim, ...
  [[cells]]
  name = "first-heads"
  scope = "attention"
  layers = "0-2"
  prune = 0.5

"""


@opt.command(epilog=GRID)
@click.argument("model")
@opt.add_output_folder("Folder of the study; a stopped one resumes.")
@opt.option(
    "--grid",
    group=opt.HOW,
    default="paper",
    show_default=True,
    metavar="FILE",
    help="paper, methods, or a TOML file; see below.",
)
@opt.make_recipe_option("module_map", default=None, help="In paper and methods: structural or paper.  [default: paper]")
@opt.make_recipe_option("quantize", help="Scheme of the paper's grid.  [default: int8-paper]")
@opt.make_recipe_option("calibration")
@opt.make_recipe_option("calibration_tokens")
@opt.option(
    "--no-facts", is_flag=True, expose_value=False, help="Accepted as in report, though a study shows no facts."
)
@opt.option("--save", is_flag=True, help="Write each checkpoint too, into OUTPUT/models.")
@opt.ray_options
@opt.study_options
@opt.revision_option
@opt.option("--json", "as_json", is_flag=True, help="Print the study as JSON.")
def sweep(model: str, output: Path, probe: tuple[str, ...], as_json: bool, **options: Any) -> int:
    """Convert MODEL by every recipe of a grid, in memory, and evaluate each result on the same facts.

    `--grid paper` is the grid of the study behind this tool: attention, feed-forward and everything pruned by 10 to
    90 %, quantized, and both; the final layer pruned. `--grid methods` covers Wanda, SparseGPT, smoothing and 4 bits by
    GPTQ, which use a calibration text. OUTPUT gets the study's page (study.html, study.md), its figures and a tidy
    table (cells.csv, cells.parquet).

    \b
    compressknow sweep MODEL -o study --limit 300
    compressknow sweep MODEL -o study -p lama:trex --data DIR --grid paper
    compressknow sweep MODEL -o study --grid methods --calibration-tokens 8192
    compressknow sweep MODEL -o study --grid mine.toml
    """
    from compressknow.api.sweep import sweep as run

    with explain_interrupt(RESUMES, output):
        study = run(
            model,
            output,
            probe=probe or None,
            command=get_command(),
            on_progress=ProgressLines(),
            on_result=None
            if as_json
            else TableRows(partial(_describe_original, known=options["known"]), _describe_result),
            **options,
        )
    if as_json:
        show_json_text((output / "study.json").read_text(encoding="utf-8"))
    else:
        show(*_end(study, output))
    return 1 if study.failed else 0


def _describe_original(result: CellResult, known: str) -> Iterator[str]:
    original = result.original
    right = sum(answer.correct for answer in original.answers)
    name, total = clean(original.record.model.name, 40), len(original.answers)
    verb, adverb = ("produces", "") if known == "produced" else ("answers", " right")
    yield f"{name} {verb} {count(right)} of {count(total)} facts{adverb} ({write_percent(right, total)}).\n"
    if means := [clean(probe, 40) for probe, entry in original.record.probes.items() if entry.average == "macro"]:
        accuracy = f"the study's accuracy on {', '.join(means)} is the mean over relations"
        yield from (*wrap(f"Right is the share of all facts; {accuracy}.", indent=""), "")
    yield from (COLUMNS, "-" * len(COLUMNS), _write_row("original", "", original))


def _describe_result(result: CellResult) -> Iterator[str]:
    # The setup does not name 8-bit schemes, of which a grid may have several.
    unnamed = " + ".join(result.cell.recipe.unnamed_schemes)
    name = clean(f"{result.setup} ({unnamed})" if unnamed else result.setup, 200)
    if (key := result.cell.key) != slugify(name):
        # Its name in the grid, or what distinguishes cells with the same setup: a seed, a text.
        name += f" [{key}]"
    if result.answers is None:
        outcome = "refused" if result.refused else "failed"
        yield from wrap(f"{name}: {outcome}: {clean(result.why, 1000)}")
        return
    if (cell := pad(name, NAME)).rstrip() != name:
        # Several could look the same when cut off.
        yield from wrap(name)
        cell = " " * NAME
    yield _write_row(cell, write_estimate(result.kept), result.answers)


def _write_row(name: str, kept: str, answers: Answers) -> str:
    right = sum(answer.correct for answer in answers.answers)
    share, size = write_percent(right, len(answers.answers)), write_size(answers.record.model.bytes)
    return f"{name:<{NAME}}{kept:<28}{share:>8}{size:>10}"


def _end(study: Study, output: Path) -> Iterator[str]:
    from compressknow.pages.study.findings import evaluate_findings
    from compressknow.pages.study.summary import draw_conclusions

    if conclusions := draw_conclusions(study, evaluate_findings(study)[0]):
        yield ""
    for each in conclusions:
        yield from wrap(str(each))
    yield ""
    yield f"Written: {output}/study.html, study.md, study.json, cells.csv, cells.parquet"
    total = count(len(study.failed) + len(study.refused) + len(study.cells))
    if study.refused:
        yield ""
        refused = f"Not supported by this model: {count(len(study.refused))} of {total} cells"
        yield from wrap(f"{refused}; the study lists the reasons.", indent="")
    if study.failed:
        yield ""
        failed = f"{count(len(study.failed))} of {total} cells failed; the study lists the reasons"
        yield from wrap(f"! {failed}. Follow any advice in them, then repeat the command.", indent="")
