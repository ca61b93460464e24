"""compare: two checkpoints set side by side, in what they are and, where asked, in what they know."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressknow._version import __version__
from compressknow.errors import UsageError
from compressknow.reading import sha256_of
from compressknow.report.diff.records import Behaviour, Checkpoint, Contrast
from compressknow.report.diff.verdict import contrast_cautions, contrast_verdict, names_of

if TYPE_CHECKING:
    from compressknow.diff.records import Difference
    from compressknow.engine.identity import Located
    from compressknow.probe.run import Respondent, Settings
    from compressknow.probe.sources import Options
    from compressknow.quiet import Bar


def compare(
    a: str | Path,
    b: str | Path,
    probes: str | Sequence[str] = (),
    *,
    outputs: Sequence[str | Path] = (),
    options: Options | None = None,
    settings: Settings | None = None,
    no_facts: bool = False,
    keep_in: str | Path | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    revision_b: str | None = None,
    threads: int | None = None,
    command: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    bar: Bar | None = None,
) -> Contrast:
    """Compare two checkpoints of one architecture: settings, what is stored, every weight and, if asked, knowledge.

    Parameters
    ----------
    a, b : local folders or hub ids. int8 weights are compared as what they stand for.
    probes : what to ask both, such as ``["atlas"]``; nothing by default. See `compressknow.probe`.
    outputs : files to write: ``.html``, ``.md``, ``.json``.
    options, settings : see `compressknow.probe`.
    no_facts : leave the text of every fact out.
    keep_in : folder of the answers; by default ``~/.cache/compressknow/answers``.
    overwrite : replace `outputs` that are there already.
    revision, revision_b : of a and of b, if they are hub ids.
    threads : tensors worked on at a time, by default one a core; the figures do not depend on it.
    command : the command line to show.
    progress : told the bytes read so far, and in all: first to hash the files, then of weights to compare.
    bar : gives, for a stage that begins, a context with a callable that is told of its progress.

    Returns
    -------
    All figures; ``difference.total.relative_error`` for one, or ``behaviour.b_against_a.comparisons[0].kept``. Where
    both are the same to the byte it is `identical`, and there is no `difference`.

    Raises
    ------
    compressknow.errors.CompressknowError : a checkpoint is missing or damaged; the two are of different architectures;
        an output that cannot be written.
    """
    from compressknow.probe.run import Settings
    from compressknow.probe.sources import Options, open_all
    from compressknow.report.diff.pages import write_contrasts
    from compressknow.report.pages import check_outputs, require_for

    files = [Path(path) for path in outputs]
    require_for(files, *(("pyarrow", "scipy") if probes else ()))
    check_outputs(files, overwrite=overwrite)
    settings = settings or Settings()
    asked = open_all([probes] if isinstance(probes, str) else list(probes), options or Options())
    first, second = _respondents((a, revision), (b, revision_b), settings, progress)
    identical = first.sha256 == second.sha256
    difference = None if identical else _difference(first.located, second.located, settings, threads, progress)
    behaviour = _behaviour(first, second, asked, keep_in, not no_facts, bar) if asked else None
    sides = _checkpoint(first), _checkpoint(second)
    contrast = Contrast(
        verdict=contrast_verdict(names_of(*sides), identical, difference, behaviour),
        a=sides[0],
        b=sides[1],
        identical=identical,
        files=() if identical else tuple(_other_files(first.located, second.located)),
        difference=difference,
        behaviour=behaviour,
        warnings=tuple(contrast_cautions(*sides, identical, difference, behaviour)),
        show_facts=not no_facts,
        versions=dict(behaviour.b_against_a.versions) if behaviour else {"compressknow": __version__},
        command=command,
    )
    write_contrasts(contrast, files, overwrite=overwrite)
    return contrast


def _respondents(
    a: tuple[str | Path, str | None],
    b: tuple[str | Path, str | None],
    settings: Settings,
    progress: Callable[[int, int], None] | None,
) -> tuple[Respondent, Respondent]:
    """Both checkpoints, found and hashed; a folder that is given twice is hashed once."""
    from compressknow.engine.identity import fingerprint, locate
    from compressknow.probe.answers import is_answers_folder
    from compressknow.probe.run import Respondent
    from compressknow.quiet import counted

    for model, _ in (a, b):
        if is_answers_folder(Path(model)):
            raise UsageError(
                f"{model} holds answers, no checkpoint.",
                hint="`compressknow report` compares answers; give the checkpoints that they are from.",
            )
    first, second = Respondent(locate(*a), settings), Respondent(locate(*b), settings)
    if first.located.path.resolve() == second.located.path.resolve():
        return first, first
    total = sum(path.stat().st_size for side in (first, second) for path in side.located.files)
    read = counted(progress, total)
    with ThreadPoolExecutor(2) as pool:
        hashes = pool.map(lambda side: fingerprint(side.located, read), (first, second))
        first.sha256, second.sha256 = hashes
    return first, second


def _difference(
    a: Located, b: Located, settings: Settings, threads: int | None, progress: Callable[[int, int], None] | None
) -> Difference | None:
    """What the weights differ in; None where one side is a GGUF file."""
    from compressknow.diff.checkpoints import difference
    from compressknow.model.checkpoint import open_checkpoint

    if ".gguf" in (a.path.suffix, b.path.suffix):
        return None
    opened = [open_checkpoint(located.path) for located in (a, b)]
    return difference(*opened, trust_remote_code=settings.trust_remote_code, threads=threads, progress=progress)


def _behaviour(
    a: Respondent, b: Respondent, asked: Sequence[Any], keep_in: str | Path | None, show_facts: bool, bar: Bar | None
) -> Behaviour:
    from compressknow.probe.gather import default_answers_folder
    from compressknow.report.diff.view import ask_both_ways, behaviour_of

    folder = Path(keep_in) if keep_in else default_answers_folder()
    return behaviour_of(ask_both_ways(a, b, asked, folder, bar), show_facts=show_facts)


def _checkpoint(respondent: Respondent) -> Checkpoint:
    from compressknow.engine.identity import describe

    described: dict[str, Any] = describe(respondent.located) | {"sha256": respondent.sha256}
    known: dict[str, Any] = {key: described.get(key) for key in Checkpoint.__dataclass_fields__}
    return Checkpoint(**known)


def _other_files(a: Located, b: Located) -> Iterator[str]:
    """Small files that decide answers too and are not alike: of the tokenizer, and modelling code."""
    if a.path.suffix == ".gguf" or b.path.suffix == ".gguf":
        return
    from compressknow.model.checkpoint import weight_files

    left_out = {"config.json", *weight_files(a.path), *weight_files(b.path)}
    for name in sorted({path.name for located in (a, b) for path in located.files} - left_out):
        hashes = [sha256_of(located.path / name) if (located.path / name).is_file() else None for located in (a, b)]
        if hashes[0] != hashes[1]:
            yield name
