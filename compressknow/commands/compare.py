"""compare: two checkpoints set side by side, in what they are and, with probes, in what they know."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compressknow.probe.handle import Settings
    from compressknow.probe.sources import Options
    from compressknow.quiet import OnProgress
    from compressknow.report.diff.records import CheckpointComparison


def compare(
    a: str | Path,
    b: str | Path,
    probes: str | Sequence[str] = (),
    *,
    outputs: Sequence[str | Path] = (),
    options: Options | None = None,
    settings: Settings | None = None,
    known: str = "recognized",
    no_facts: bool = False,
    keep_in: str | Path | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    revision_b: str | None = None,
    threads: int | None = None,
    command: str | None = None,
    on_progress: OnProgress | None = None,
) -> CheckpointComparison:
    """Compare two checkpoints of one architecture: settings, what is stored, every weight and, with probes, knowledge.

    Parameters
    ----------
    a, b : local folders or hub ids. int8 weights are compared as what they stand for.
    probes : what to evaluate both on, such as ``["atlas"]``; nothing by default. See `compressknow.probe`.
    outputs : files to write: ``.html``, ``.md``, ``.json``.
    options, settings : see `compressknow.probe`.
    known : what counts as known; see `compressknow.report`.
    no_facts : leave the text of every fact out.
    keep_in : folder of the answers; by default ``~/.cache/compressknow/answers``.
    overwrite : replace `outputs` that are there already, if they are pages of compressknow outside a checkpoint.
    revision, revision_b : of a and of b, if they are hub ids.
    threads : tensors worked on at a time, by default one a core; the figures do not depend on it.
    command : the command line to show.
    on_progress : called with each `compressknow.Progress`: of hashing the files and comparing the weights in bytes,
        of evaluating in facts; ``"bar"`` shows bars.

    Returns
    -------
    All figures; ``difference.total.relative_error`` for one, or ``behaviour.b_against_a.comparisons[0].kept``. Where
    both are the same to the byte it is `identical`, and there is no `difference`.

    Raises
    ------
    compressknow.errors.CompressknowError : a checkpoint is missing or damaged; the two are of different architectures;
        an output that cannot be written.
    """
    from compressknow.engine.identity import describe
    from compressknow.probe.gather import Named, default_answers_folder, evaluate_both, find_both, open_named
    from compressknow.probe.grades import check_known
    from compressknow.probe.handle import Settings
    from compressknow.quiet import listener
    from compressknow.report.diff.make import behaviour_of, checkpoint_of, make_comparison
    from compressknow.report.diff.pages import write_comparisons
    from compressknow.report.pages import check_outputs, require_for

    check_known(known)
    files = [Path(path) for path in outputs]
    require_for(files, *(("pyarrow", "scipy") if probes else ()))
    check_outputs(files, overwrite=overwrite)
    opened = open_named(probes, options, known) if probes else []
    settings, listening = settings or Settings(), listener(on_progress)
    first, second = find_both(Named(a, revision), Named(b, revision_b), settings, listening)
    # It imports torch, which takes seconds: what is missing is said before.
    from compressknow.diff.checkpoints import difference_of, other_files

    difference, behaviour = None, None
    if first.sha256 != second.sha256:
        trusted = settings.trust_remote_code
        difference = difference_of(
            first.located, second.located, trust_remote_code=trusted, threads=threads, on_progress=listening
        )
    if opened:
        folder = Path(keep_in) if keep_in else default_answers_folder()
        both = evaluate_both(first, second, opened, folder, listening)
        behaviour = behaviour_of(both, show_facts=not no_facts, known=known)
    for side in (first, second):
        side.check_unchanged()
    comparison = make_comparison(
        checkpoint_of(describe(first.located), first.sha256),
        checkpoint_of(describe(second.located), second.sha256),
        difference,
        behaviour,
        files=tuple(other_files(first.located, second.located)),
        show_facts=not no_facts,
        command=command,
    )
    write_comparisons(comparison, files, overwrite=overwrite)
    return comparison
