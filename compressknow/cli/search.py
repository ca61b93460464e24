"""`compressknow search`: the smallest file that keeps a share of the knowledge."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compressknow.base.errors import GateNotMet
from compressknow.base.format import clean, share_against, write_size
from compressknow.cli import RESUMES, explain_interrupt
from compressknow.cli import options as opt
from compressknow.cli.report import get_command
from compressknow.cli.terminal import WIDTH, ProgressLines, TableRows, show, show_json_text, wrap
from compressknow.pages.records import write_estimate

if TYPE_CHECKING:
    from compressknow.pages.search import Trial

COLUMNS = f"{'Weights':<40}{'Search facts kept (99.7 %)':<28}{'Size':>12}"
HELD_OUT = f"{'Weights':<40}{'Held-out facts kept (99.7 %)':<28}{'Size':>12}"


@opt.command()
@click.argument("model")
@opt.add_output_folder("Folder of the search; a stopped one resumes.")
@opt.option("--keep", group=opt.FIT, type=opt.read_share, metavar="SHARE", help="Knowledge to keep: 0.98, or 98%.")
@opt.option("--size", group=opt.FIT, metavar="SIZE", help="Find the best file of this size instead, such as 90MB.")
@opt.option("--to", group=opt.FIT, type=opt.FORM, help="gguf or checkpoint.  [default: gguf for models that generate]")
@opt.add_guide_option(group=opt.FIT, default="both")
@opt.fit_options
@opt.add_calibration_options(tokens="8192")
@opt.option("--facts", group=opt.EVALUATE, multiple=True, metavar="PROBE", help="Same as --probe, as export calls it.")
@opt.study_options
@opt.no_facts_option
@opt.revision_option
@opt.option("--json", "as_json", is_flag=True, help="Print the search as JSON.")
def search(model: str, output: Path, probe: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Find the smallest file of MODEL that keeps a share of its knowledge, or the best of a size.

    A third of the facts guides the search. The winner must keep the share on another third, by the lower end of its
    interval; the last third grades it. OUTPUT gets the page (search.html), the file (model.gguf, or the checkpoint
    model/), its recipe (recipe.toml) and its report card (report.html). Exits with 3 if no file keeps as much.

    \b
    compressknow search MODEL -o found --keep 0.95
    compressknow search MODEL -o found --size 90MB --facts facts:mine.jsonl
    compressknow search MODEL -o found --keep 0.95 --to checkpoint
    """
    from compressknow.api.search import search as run
    from compressknow.pages.search import list_warnings, write_verdict

    describe = partial(_describe_trial, options["keep"])
    with explain_interrupt(RESUMES, output):
        result = run(
            model,
            output,
            probe=probe or None,
            command=get_command(),
            on_progress=ProgressLines(),
            on_result=None if as_json else TableRows(lambda _: (COLUMNS, "-" * len(COLUMNS)), describe),
            **options,
        )
    if as_json:
        show_json_text((output / "search.json").read_text(encoding="utf-8"))
    else:
        show()
        if result.confirmed:
            show(HELD_OUT, "-" * len(HELD_OUT))
            for trial in result.confirmed:
                mark = "* " if result.winner and trial.types == result.winner.types else ""
                show(*describe(replace(trial, kept=trial.held_out or trial.kept), mark))
            show(*["* the winner"] * bool(result.winner), "")
        for text in (write_verdict(result), *list_warnings(result)):
            show(*wrap(text, indent=""))
        file = "model.gguf" if result.form == "gguf" else "model/"
        show(f"\nWritten: {output}/search.html" + (f", recipe.toml, {file}, report.html" if result.winner else ""))
    if result.winner is None:
        raise GateNotMet(
            f"No file tried is certain to keep {100 * (result.keep or 0):g} %.",
            hint="Lower --keep, or use more facts (--limit).",
        )


def _describe_trial(keep: float | None, trial: Trial, mark: str = "") -> Iterator[str]:
    name = clean(trial.setup, WIDTH)
    if len(name) > 39:
        yield name
        name = ""
    # As on the page: a share that misses the target is not rounded to it.
    kept = write_estimate(trial.kept, partial(share_against, limits=[keep or 0.0]))
    yield f"{name:<40}{kept:<28}{mark + write_size(trial.bytes):>12}"
