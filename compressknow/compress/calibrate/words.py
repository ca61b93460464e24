"""What a manifest says of calibration, in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from compressknow.format import count


def calibrated_in_words(calibration: Mapping[str, Any] | None) -> Iterator[str]:
    """Sentences on what `calibration_of` gives: on which text, and how that went. None where nothing was calibrated.

    >>> said = {"kind": "file", "source": "wiki.txt", "tokens": 8192, "seed": 0, "blocks_apart": True, "smoothed": 0}
    >>> list(calibrated_in_words({**said, "unseen": 4, "examples": ["a", "b", "c"]}))[1]
    '4 weights were compressed without knowledge of the inputs, for too few tokens reach them: a, b, c and 1 more.'
    """
    if not calibration:
        return
    yield f"Calibrated on {text_in_words(calibration)}, with seed {calibration['seed']}."
    if smoothed := calibration["smoothed"]:
        norms = "A norm gave" if smoothed == 1 else f"{count(smoothed)} norms gave"
        yield f"{norms} outliers of the activations to the weights behind (SmoothQuant)."
    if not calibration["blocks_apart"]:
        yield "Its blocks cannot be run one by one, so each layer was fitted to what the original model gives it."
    if unseen := calibration["unseen"]:
        weights = "A weight was" if unseen == 1 else f"{count(unseen)} weights were"
        more = unseen - len(calibration["examples"])
        named = ", ".join(calibration["examples"]) + (f" and {count(more)} more" if more > 0 else "")
        yield f"{weights} compressed without knowledge of the inputs, for too few tokens reach them: {named}."


def text_in_words(calibration: Mapping[str, Any]) -> str:
    """Which text, and how much of it."""
    source = "the model's own text" if calibration["kind"] == "self" else calibration["source"]
    return f"{count(calibration['tokens'])} tokens of {source}"
