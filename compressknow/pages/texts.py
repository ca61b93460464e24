"""Show how two models predict running text, in tables, a chart and sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from compressknow.base.format import NONE, clean, count, number, share, write_points
from compressknow.comparison.records import Measurement, Perplexity, TextChange, TextFigures
from compressknow.evaluate.records import ALONE, NO_ROOM, OTHER_SIZE, OTHER_TOKENS
from compressknow.pages import drawing
from compressknow.pages.parts import Beside, Chart, Note, Part, Table
from compressknow.pages.records import write_part

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WHY = {
    ALONE: "the original's distributions were not available. Give `compressknow report` or `compare` both "
    "checkpoints, not the answers of two runs",
    NO_ROOM: "the disk had no room for the original's distributions. Free some space, or lower --limit",
    OTHER_SIZE: "the two vocabularies differ in size",
    OTHER_TOKENS: "the two models split the text into different tokens. Perplexities per token are not comparable: "
    "compare the bits per byte",
}
_PERCENTILES = {"p50": "median", "p90": "90th", "p95": "95th", "p99": "99th", "p99_9": "99.9th", "max": "largest"}
_NOT_FINITE = "NaN or infinite"  # a perplexity, in a sentence
# Smaller divergences, in nats, have a bar of no length: they are rounding errors of 16-bit and float32 numbers.
_LEAST = 1e-7
METHOD = (
    "A text is cut into chunks of tokens. The second half of each chunk, except its first token, is scored, so that "
    "each token has at least half a chunk of context; if the vocabulary requires a BOS token, it replaces the first "
    "token of each chunk. Perplexity is exp of the mean negative log-likelihood per token; KL per token is "
    "KL(original || compressed) in nats over the whole vocabulary. Definitions and standard errors (±) are those of "
    "llama.cpp's perplexity tool with --kl-divergence. Greedy continuations start in the middle of the first 16 chunks."
)


def make_text_parts(figures: TextFigures, names: tuple[str, str]) -> Iterator[Part]:
    """Yield a text's tables, and a chart of how far the predictions moved; `names` are those of the two models."""
    name, sides = clean(figures.text, 60), (figures.original, figures.compressed)
    rows = tuple(
        (who.capitalize(), write_measurement(side.value, 2), write_measurement(side.bits_per_byte, 3))
        for who, side in zip(names, sides, strict=True)
    )
    tokens = " and ".join(dict.fromkeys(count(side.tokens) for side in sides))
    caption = f"{name}: {count(figures.chunks)} chunks of {count(figures.context)} tokens, {tokens} scored"
    yield Table(caption, ("Model", "Perplexity", "Bits per byte"), rows)
    if figures.moved:
        yield Beside(_chart_kl(figures.moved, name, names), _make_moved_table(figures.moved, name, names))
    if why := _WHY.get(figures.divergence):
        yield Note(f"KL per token was not measured: {why}.")


def write_sentence(figures: TextFigures, names: tuple[str, str] = ("the original", "it")) -> str:
    """Write the verdict's sentence on one text; `names` are what it calls the two models."""
    one, other = names
    name, moved = clean(figures.text, 60), figures.moved
    if moved is None:
        before, after = (write_measurement(side.bits_per_byte, 3) for side in (figures.original, figures.compressed))
        return f"On {name}, {other} takes {after} bits per byte; {one} takes {before}."
    before, after = (write_perplexity(each, _NOT_FINITE) for each in (figures.original, figures.compressed))
    change = f"{write_change(moved.ratio)}, from {before}" if math.isfinite(moved.ratio.value) else f"from {before}"
    change = "unchanged" if moved.ratio.value == 1 else change
    whose = "its perplexity" if other == "it" else f"the perplexity of {other}"
    same = share(moved.same_top.value)
    return f"On {name}, {whose} is {after} ({change}), and the most likely token is the same in {same} of positions."


def write_text_headline(figures: TextFigures) -> str:
    """Write the headline of a page that has no facts."""
    if figures.moved and math.isfinite(figures.moved.ratio.value):
        return f"Perplexity {write_change(figures.moved.ratio)} on {clean(figures.text, 60)}"
    return f"Perplexity on {clean(figures.text, 60)}"


def summarize_text(figures: TextFigures, names: tuple[str, str]) -> Iterator[str]:
    """Yield a text's figures in two lines, for a terminal."""
    before, after = (write_measurement(side.value, 3) for side in (figures.original, figures.compressed))
    yield f"{clean(figures.text, 40)}: perplexity {names[0]} {before}, {names[1]} {after}"
    if moved := figures.moved:
        kl = f"KL per token mean {write_measurement(moved.kl, 5)} nats" if moved.kl else "KL per token not measured"
        p99 = f", p99 {number(moved.kl_percentiles['p99'], 4)}" if moved.kl_percentiles else ""
        yield f"  ratio {write_measurement(moved.ratio, 4)}; {kl}{p99}; same top token {share(moved.same_top.value)}"
    else:
        before, after = (write_measurement(side.bits_per_byte, 3) for side in (figures.original, figures.compressed))
        yield f"  bits per byte {names[0]} {before}, {names[1]} {after}; different tokens, so no KL"


def write_perplexity(perplexity: Perplexity | None, otherwise: str = NONE) -> str:
    """Write a perplexity without its standard error; `otherwise` if it is unknown or not finite."""
    return number(perplexity.value.value, 2) if perplexity and math.isfinite(perplexity.value.value) else otherwise


def write_joint_sentence(text: str, original: Perplexity, compressed: Sequence[tuple[str, Perplexity]]) -> str:
    """Write the verdict's sentence on one text, for several labelled models."""
    # A model that produces NaN would be both the lowest and the highest.
    finite = [each for each in compressed if math.isfinite(each[1].value.value)] or compressed
    best, worst = (pick(finite, key=lambda each: each[1].value.value) for pick in (min, max))
    opening = f"On {clean(text, 60)}, the original's perplexity is {write_perplexity(original, _NOT_FINITE)}"
    lowest, highest = (write_perplexity(each, _NOT_FINITE) for _, each in (best, worst))
    if best is worst:
        return f"{opening}, and that of {best[0] if len(finite) == 1 else 'each compressed model'} is {lowest}."
    return f"{opening}; of the others, {best[0]} has the lowest ({lowest}) and {worst[0]} the highest ({highest})."


def write_change(ratio: Measurement) -> str:
    """Write the change of a perplexity, which is finite, in percent, with its sign.

    >>> write_change(Measurement(1.049, 0.001)), write_change(Measurement(1.0, 0.0))
    ('+4.9 %', 'unchanged')
    """
    return "unchanged" if ratio.value == 1 else write_points(ratio.value - 1).replace("points", "%")


def list_text_warnings(
    figures: TextFigures, names: tuple[str, str] = ("The original", "The compressed model")
) -> Iterator[str]:
    """Yield what a reader must know before trusting the figures."""
    name = clean(figures.text, 60)
    if figures.divergence == OTHER_TOKENS:
        yield f"On {name}, KL per token was not measured: {_WHY[OTHER_TOKENS]}."
    for who, side in zip(names, (figures.original, figures.compressed), strict=True):
        if not math.isfinite(side.value.value):
            yield f"{who} produces NaN, or zero probabilities, on {name}: its perplexity is {_NOT_FINITE}."


def write_measurement(figure: Measurement | None, digits: int, unit: str = "") -> str:
    """Write a figure with its standard error; if a unit is given, in hundredths.

    >>> write_measurement(Measurement(12.3456, 0.5), 2), write_measurement(None, 2)
    ('12.35 ± 0.50', '-')
    >>> write_measurement(Measurement(0.5, 0.01), 1, " %")
    '50.0 ± 1.0 %'
    """
    if figure is None or not math.isfinite(figure.value):
        return NONE
    value, error = (number(100 * each if unit else each, digits) for each in (figure.value, figure.error))
    return f"{value} ± {error}{unit}" if figure.error else f"{value}{unit}"


def _make_moved_table(moved: TextChange, name: str, names: tuple[str, str]) -> Table:
    kl = moved.kl_percentiles
    rows = [
        ("Perplexity, ratio", write_measurement(moved.ratio, 4)),
        ("Perplexity, difference", write_measurement(moved.difference, 4)),
        ("Correlation of log-likelihoods", number(moved.correlation, 4)),
        ("KL, mean", write_measurement(moved.kl, 4)),
        *(
            (f"KL, {label} percentile" if label[0].isdigit() else f"KL, {label}", number(kl[key], 4) if kl else NONE)
            for key, label in _PERCENTILES.items()
        ),
        ("Same top token", write_measurement(moved.same_top, 1, " %")),
        ("Change in probability of the text's token, mean", write_measurement(moved.change, 2, " points")),
        ("Change in probability, root mean square", write_measurement(moved.change_rms, 2, " points")),
    ]
    if divergent := moved.divergent:
        middle = "none differs" if not divergent.first else f"more than {divergent.tokens}"
        middle = middle if divergent.middle is None else f"{divergent.middle:g}"
        rows += [
            (f"First differing token in {count(divergent.n)} greedy continuations, median", middle),
            (f"Continuations identical in all {divergent.tokens} tokens", write_part(divergent.same, divergent.n)),
        ]
    return Table(f"{name}, token by token: {names[1]} against {names[0]}", ("Figure", "Value"), tuple(rows))


def _chart_kl(moved: TextChange, name: str, names: tuple[str, str]) -> Chart | None:
    """Chart KL by percentile, on a logarithmic scale; None if it was not measured, or nothing moved."""
    kl = moved.kl_percentiles
    if not kl or not all(math.isfinite(kl[key]) for key in _PERCENTILES) or kl["p99_9"] <= _LEAST:
        return None
    values = [(label, kl[key]) for key, label in _PERCENTILES.items()]
    figures = ", ".join(f"{label} {number(value, 5)}" for label, value in values)
    title = f"KL({names[0]}‖{names[1]}) by percentile of tokens, {name}"
    return Chart(title, f"In nats: {figures}.", lambda plot: _draw(plot, values), height=210)


def _draw(plot: Axes, values: Sequence[tuple[str, float]]) -> None:
    sizes = [max(value, _LEAST) for _, value in values]
    # Powers of ten around the values, with room for the figures to the right of their bars.
    first, last = math.floor(math.log10(min(sizes))), math.ceil(math.log10(max(sizes)))
    low, high = 10.0**first, 10.0**last
    plot.set_xscale("log")
    plot.set_xlim(low, high * (high / low) ** 0.25)
    places = range(len(values))
    plot.barh(places, [value - low for value in sizes], left=low, height=0.5, color=drawing.SERIES[0])
    for place, ((_, value), size) in enumerate(zip(values, sizes, strict=True)):
        label = number(value, 4) if value < 10 else number(value, 1)
        plot.annotate(label, (size, place), (5, 0), textcoords="offset points", va="center")
    plot.set_ylim(len(values) - 0.5, -0.5)
    plot.set_yticks(places, [label for label, _ in values])
    ticks = [10.0**power for power in range(first, last + 1, max(1, math.ceil((last - first) / 4)))]
    plot.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    plot.minorticks_off()
    plot.set_xlabel("KL per token, nats", loc="left")
    plot.grid(axis="x")
    plot.spines["bottom"].set_visible(False)
