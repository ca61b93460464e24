"""How many of the facts that models were evaluated on stand in the text that one of them was calibrated on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from compressknow.evaluate.records import FactsInText

if TYPE_CHECKING:
    from compressknow.evaluate.answers import Answers
    from compressknow.evaluate.handle import ModelHandle


def with_calibration(answers: Answers, model: ModelHandle, known_by: Answers | None) -> Answers:
    """A model's answers, with what its folder says of calibration in their record, and the facts that stand in the text
    if that is at hand. (Kept answers may be those of another folder with the same weights.)

    Parameters
    ----------
    known_by : what the model that it is compared with answered to the same facts; None for the original.
    """
    calibration = model.described().get("calibration")
    found = _found(calibration, model, known_by) if calibration and known_by else None
    said = replace(answers.record.model, calibration=calibration, in_calibration=found)
    return replace(answers, record=replace(answers.record, model=said))


def _found(calibration: Mapping[str, Any], model: ModelHandle, known_by: Answers) -> FactsInText | None:
    from compressknow.compress.calibrate.text import texts_again

    trusted = model.settings.trust_remote_code
    texts = texts_again(model.located.folder, calibration, trust_remote_code=trusted)
    return facts_in_text(texts, known_by) if texts else None


def facts_in_text(texts: Sequence[str], known_by: Answers) -> FactsInText | None:
    """Counted over the facts that have a subject and an object; None where none has."""
    from compressknow.compress.calibrate.text import facts_in

    pairs: dict[bool, list[tuple[str, str]]] = {True: [], False: []}
    for answer in known_by.answers:
        if answer.sub_label.strip() and answer.gold.strip():
            pairs[answer.correct].append((answer.sub_label, answer.gold))
    known, others = pairs[True], pairs[False]
    if not known and not others:
        return None
    found = facts_in(texts, known)
    return FactsInText(len(known) + len(others), found + facts_in(texts, others), len(known), found)
