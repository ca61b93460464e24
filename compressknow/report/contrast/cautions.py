"""What a reader of a comparison must know before trusting its figures, in plain words."""

from __future__ import annotations

from collections.abc import Iterator

from compressknow.compress.difference_records import Difference
from compressknow.report.card.cautions import was_made_from
from compressknow.report.contrast.records import Behaviour, Checkpoint
from compressknow.report.figures import count
from compressknow.report.text import plain

_NAME = 120
_ASK = "Behaviour can be compared all the same: name what to ask with -p PROBE."


def contrast_cautions(
    a: Checkpoint, b: Checkpoint, identical: bool, difference: Difference | None, behaviour: Behaviour | None
) -> Iterator[str]:
    """What stands in the wrong place, could not be compared, or is broken; and the warnings on the answers."""
    if was_made_from(a, b):
        yield "A was made from B, as its manifest says: give B first to see what it lost."
    if not identical and difference is None:
        yield _left_out("The weights of a GGUF file are packed: they were not compared.", behaviour)
    if difference and (packed := difference.packed()):
        yield _packed(len(packed), packed[0].name, behaviour)
    for tensor in difference.tensors if difference else ():
        if not tensor.sums.finite:
            yield f"{plain(tensor.name, _NAME)} holds NaN or infinity: neither it nor what it is a part of has figures."
    if behaviour and not identical:
        yield from behaviour.warnings


def _packed(number: int, example: str, behaviour: Behaviour | None) -> str:
    weights = "1 weight is" if number == 1 else f"{count(number)} weights are"
    said = f"{weights} packed in a form whose values cannot be read here, {plain(example, _NAME)} for one, and left out"
    return _left_out(f"{said} of all figures of weights.", behaviour)


def _left_out(said: str, behaviour: Behaviour | None) -> str:
    return said if behaviour else f"{said} {_ASK}"
