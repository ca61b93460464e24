"""Two models evaluated side by side: each on the facts, and each for the probabilities of the other's likely tokens."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from compressknow.errors import UsageError
from compressknow.probe.answers import Answers, is_answers_folder
from compressknow.probe.gather import folder_of

if TYPE_CHECKING:
    from compressknow.probe.distributions import Distributions
    from compressknow.probe.facts import Probe
    from compressknow.probe.run import ModelHandle, Settings
    from compressknow.probe.sources import Task
    from compressknow.quiet import Listener


class Named(NamedTuple):
    """What a user names: a folder or a hub id, and of the latter a revision."""

    model: str | Path
    revision: str | None = None


def find_both(
    a: Named, b: Named, settings: Settings, on_progress: Listener | None = None
) -> tuple[ModelHandle, ModelHandle]:
    """Both checkpoints, found and hashed; a folder that is given twice is hashed once, and is one of them.

    Raises CompressknowError where one is not found, UsageError where it is a folder of answers.
    """
    from compressknow.engine.identity import fingerprint, locate
    from compressknow.probe.run import ModelHandle
    from compressknow.quiet import Stage, begun, counted

    for named in (a, b):
        _refuse_answers(Path(named.model))
    first, second = ModelHandle(locate(*a), settings), ModelHandle(locate(*b), settings)
    if first.located.path.resolve() == second.located.path.resolve():
        return first, first
    total = sum(path.stat().st_size for side in (first, second) for path in side.located.files)
    with begun(on_progress, Stage("hash", f"{a.model} and {b.model}")) as advance, ThreadPoolExecutor(2) as pool:
        read = counted(advance, total)
        first.sha256, second.sha256 = pool.map(lambda side: fingerprint(side.located, read), (first, second))
    return first, second


def _refuse_answers(path: Path) -> None:
    if is_answers_folder(path):
        raise UsageError(
            f"{path} holds answers, no checkpoint.",
            hint="Use `compressknow report` to compare answers, or give the checkpoints that they come from.",
        )


class BothWays(NamedTuple):
    """Answers of `a` and `b`, and of each with the probabilities of the other's most likely tokens."""

    a: Answers
    b_like_a: Answers
    b: Answers
    a_like_b: Answers


def evaluate_both(
    a: ModelHandle,
    b: ModelHandle,
    probes: Sequence[Probe | Task],
    keep_in: Path,
    on_progress: Listener | None = None,
) -> BothWays:
    """Evaluate both models, one in memory at a time: each once for its answers, and once more for what it gives the
    other's tokens. Answers that `keep_in` holds already are not asked for again.

    Raises CompressknowError where a model cannot be loaded or evaluated, or where the two have no vocabulary in common.
    """
    from compressknow.probe.distributions import Distributions
    from compressknow.probe.run import Beside, probe_model
    from compressknow.quiet import staged

    def evaluate(
        model: ModelHandle, reference: Answers | None, whole: Distributions | None, known: Answers | None = None
    ) -> Answers:
        folder = folder_of(keep_in, model.sha256, reference)
        watched = staged(on_progress, number=1 if model is a else 2, of=2)
        return probe_model(model, probes, folder, Beside(reference, known, whole), on_progress=watched, wait=True)

    if a.sha256 == b.sha256:
        alone = evaluate(a, None, None)
        a.release()
        return BothWays(alone, alone, alone, alone)
    with Distributions(a, keep_in) as whole_a, Distributions(b, keep_in) as whole_b:
        of_a = evaluate(a, None, whole_a)
        a.release()
        b_like_a = evaluate(b, of_a, whole_a)
        whole_a.close()
        of_b = evaluate(b, None, whole_b, known=b_like_a)
        b.release()
        a_like_b = evaluate(a, of_b, whole_b, known=of_a)
        a.release()
    return BothWays(of_a, b_like_a, of_b, a_like_b)
