"""What a size of a GGUF file is fitted by: the sensitivity of its weights, and what GPTQ runs over.

Answers, text and sensitivity are kept: another size of the same model begins where types are chosen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compressknow.errors import UsageError
from compressknow.files import cache_folder, write_whole
from compressknow.reading import read_json
from compressknow.study.guide import FEWEST, known_facts, sensitivity_of
from compressknow.study.sensitivity import Guide, Sensitivity

if TYPE_CHECKING:
    from compressknow.compress.calibrate.observe import Batches
    from compressknow.compress.calibrate.text import CalibrationText
    from compressknow.compress.steps import Calibration
    from compressknow.evaluate.facts import Fact, Probe
    from compressknow.evaluate.handle import ModelHandle
    from compressknow.quiet import Listener

# Of four facts that are evaluated, a small model may know two: so many, that there are enough.
ASKED = 400
_MOST_BYTES = 64 << 20


@dataclass(frozen=True)
class Guides:
    """The sensitivity of weights, and token ids as batches: of facts with their objects, if any are known, and of the
    text."""

    sensitivity: Sensitivity
    texts: tuple[Batches, ...]


def guides_of(
    handle: ModelHandle, probes: Sequence[Probe], calibration: Calibration, guide: Guide, on_progress: Listener | None
) -> Guides:
    """Measure what guides the types of a GGUF file, as far as it was not before.

    Parameters
    ----------
    handle : of a checkpoint of floats.
    probes : of facts with candidates. GPTQ runs over facts even where text guides alone.

    Raises UsageError where facts are to guide and the model knows fewer than 30.
    """
    from compressknow.evaluate.gather import default_answers_folder
    from compressknow.evaluate.handle import Beside
    from compressknow.evaluate.run import probe_model
    from compressknow.gguf.gptq import batches_of
    from compressknow.quiet import Stage, begun
    from compressknow.study.roundings import GgufRoundings

    folder = default_answers_folder() / handle.sha256[:16]
    probes = [probe.limited(max(1, ASKED // len(probes))) for probe in probes]
    answers = probe_model(handle, probes, folder, Beside(), on_progress=on_progress, wait=True)
    known = known_facts(answers, probes)
    sequences = _sequences(handle, probes, known)
    handle.release()
    if len(sequences) < FEWEST:
        if guide != "text":
            raise UsageError(
                f"{handle.located.name} knows {len(sequences)} of these facts, and {FEWEST} are needed to guide.",
                hint="Give other --facts, or --guide text.",
            )
        known, sequences = {}, []
    text = _text(handle, calibration, on_progress)
    with begun(on_progress, Stage("sensitivity", handle.located.name)) as advance:
        sensitivity = sensitivity_of(
            handle.located.path,
            handle.sha256,
            GgufRoundings(),
            answers=answers if known else None,
            probes=probes,
            facts=known,
            text=text,
            trust_remote_code=handle.settings.trust_remote_code,
            advance=advance,
        )
    of_facts = [batches_of(sequences)] if sequences else []
    return Guides(sensitivity, (*of_facts, text.batches))


def _sequences(handle: ModelHandle, probes: Sequence[Probe], known: Mapping[str, Sequence[Fact]]) -> list[list[int]]:
    """Token ids of facts with their objects, but for the last token, after which nothing is predicted."""
    found = []
    for probe in probes:
        wanted = {fact.id for fact in known.get(probe.name, ())}
        queries = (query for batch in handle.prompts(probe).batches for query in batch)
        found += [[*query.prompt, *query.gold[:-1]] for query in queries if query.fact.id in wanted]
    return found


def _text(handle: ModelHandle, calibration: Calibration, on_progress: Listener | None) -> CalibrationText:
    """The text, which a model that writes its own writes once."""
    from compressknow.compress.calibrate.text import calibration_text
    from compressknow.model.loading import open_complete
    from compressknow.quiet import Stage, begun

    key = hashlib.sha256(json.dumps([handle.sha256, asdict(calibration)]).encode()).hexdigest()
    file = cache_folder() / "texts" / f"{key[:32]}.json"
    if calibration.text == "self" and (stored := _stored_text(file)) is not None:
        return stored
    folder, trusted = handle.located.path, handle.settings.trust_remote_code
    _, tree = open_complete(folder, trust_remote_code=trusted)
    with begun(on_progress, Stage(calibration.work, handle.located.name)) as advance:
        text = calibration_text(
            folder,
            tree,
            text=calibration.text,
            tokens=calibration.tokens,
            seed=calibration.seed,
            trust_remote_code=trusted,
            advance=advance,
        )
    if calibration.text == "self":
        values = {
            name: getattr(text, name) for name in ("kind", "source", "sha256", "seed", "tokens", "asked", "texts")
        }
        batches = [{name: ids.tolist() for name, ids in batch.items()} for batch in text.batches]
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps({**values, "batches": batches}).encode())
    return text


def _stored_text(file: Path) -> CalibrationText | None:
    import torch

    from compressknow.compress.calibrate.text import CalibrationText, sha256_of_batches

    try:
        values = read_json(file, _MOST_BYTES)
        batches = tuple({name: torch.tensor(ids) for name, ids in batch.items()} for batch in values.pop("batches"))
        text = CalibrationText(**{**values, "texts": tuple(values["texts"])}, batches=batches)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return text if sha256_of_batches(batches) == text.sha256 else None
