"""How long a sweep takes beside converting and probing its cells one by one, in one run.

    python benchmarks/sweep.py [--facts 5000] [--cells N] [--their-cells 4] [--data DIR] [--skip theirs]

The model is a BERT of bert-base's size with random weights, the grid is the paper's, the facts are T-REx's, asked as
the paper asks them. One side is `compressknow sweep`, one process. The other is what a user does without it:
`compressknow convert`, then `compressknow probe --reference` the original's answers, for each cell, each a process of
its own. A converted checkpoint is removed after its cell, which is not timed.

Both sides answer the original first; that is in neither's time. A cell of theirs takes from the start of `convert` to
the end of `probe`. A cell of ours takes from the last answer of the model before it to its own last answer, and an even
share of what the sweep does after the last cell (statistics, tables, figures, pages), which the other side does
without. Some cells, spread over the kinds of the grid (pruned, quantized, both, the final layer), are done by both: the
sweep waits, its clocks stopped, while the other side does the cell that it has just done, so that a machine whose speed
drifts does so for both. The ratio is of the sums over these cells, each kind counted as often as the grid has it. Both
sides must count as many right answers in each; their log-probabilities may differ in the last digit, as sums do whose
numbers lie elsewhere in memory.

Overhead is the share of the sweep's wall time (the process's start, the original and the pages included) that is not
spent in `compressknow.evaluate.evaluate.evaluate`: importing, making and loading variants, tokenizing, writing answers,
statistics.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compressknow.base.errors import CompressknowError
from compressknow.compress.recipe import to_toml
from compressknow.compress.steps import Prune, Quantize
from compressknow.evaluate.answers import Answer, read_answers
from compressknow.study.cells import name_folder
from compressknow.study.grid import Cell, build_paper_grid

# Of the others' seconds to ours, and per cent of the sweep's wall time.
RATIO_BOUND = 1.5
OVERHEAD_BOUND = 15.0
PROBE = "lama:trex"
# Whether a cell is of the final layer, prunes, quantizes.
KINDS = {
    (False, True, False): "pruned",
    (False, False, True): "quantized",
    (False, True, True): "both",
    (True, True, False): "final layer",
}
SHARED = Path(__file__).resolve().parents[2] / "shared"


@dataclass
class Sweep:
    """What was measured of a sweep, in seconds; its clock stood still while the other side had its turns.

    `ends` holds when the original and each cell had their last answer, from the process's start; `asking` the seconds
    within it for the same; `wall` when the process ended.
    """

    ends: list[float] = field(default_factory=list)
    asking: list[float] = field(default_factory=list)
    wall: float = 0.0

    def cells(self) -> list[float]:
        """Seconds of each cell, with its share of what comes after the last."""
        share = (self.wall - self.ends[-1]) / (len(self.ends) - 1)
        return [end - before + share for before, end in zip(self.ends, self.ends[1:], strict=False)]

    def overhead(self) -> float:
        """Per cent of the wall time."""
        return 100 * (self.wall - sum(self.asking)) / self.wall


def make_model(folder: Path, tokenizer_of: Path) -> Path:
    """Write a BERT of bert-base's size with random weights, and a tokenizer."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer)))
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"writing {folder.name}: {millions:.0f} M parameters", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def grid_of(model: Path) -> tuple[Cell, ...]:
    from compressknow.compress.convert import VariantMaker

    return build_paper_grid(VariantMaker(model).structure("paper"))


def kind_of(cell: Cell) -> tuple[bool, ...]:
    """Its key in `KINDS`."""
    steps = cell.recipe.steps
    does = (any(isinstance(step, kind) for step in steps) for kind in (Prune, Quantize))
    return (steps[0].where.scope == ("final",), *does)


def spread(cells: Sequence[Cell], count: int) -> list[Cell]:
    """`count` of the cells in their order: as many of each kind as there are, and evenly spread within it."""
    kinds: dict[tuple[bool, ...], list[Cell]] = {}
    for cell in cells:
        kinds.setdefault(kind_of(cell), []).append(cell)
    # Cells are dealt to the kinds by turns.
    turns = sorted((turn, number) for number, alike in enumerate(kinds.values()) for turn in range(len(alike)))
    dealt = [number for _, number in turns[:count]]
    chosen = {cell for number, alike in enumerate(kinds.values()) for cell in some(alike, dealt.count(number))}
    return [cell for cell in cells if cell in chosen]


def some(cells: Sequence[Cell], count: int) -> list[Cell]:
    """`count` of the cells, evenly spread over them."""
    return [cells[(2 * index + 1) * len(cells) // (2 * count)] for index in range(count)]


def write_grid(path: Path, cells: Sequence[Cell]) -> Path:
    """The cells as a grid file, for a sweep over some of them."""
    tables = [to_toml(cell.recipe.to_dict()).replace("[[steps]]", "[[cells.steps]]") for cell in cells]
    named = [f'[[cells]]\nname = "{cell.key}"\n{table}\n' for cell, table in zip(cells, tables, strict=True)]
    path.write_text("\n".join(named), encoding="utf-8")
    return path


def asked(options: Namespace) -> list[str]:
    """The facts, as options of `probe` and `sweep`."""
    return ["-p", PROBE, "--data", str(options.data), "--protocol", "paper", "--limit", str(options.facts)]


def compressknow(*args: str | Path) -> None:
    """Run a command in a process of its own."""
    command = [sys.executable, "-m", "compressknow", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"compressknow {args[0]} failed:\n{done.stderr}")


class Theirs:
    """Cells converted and probed one by one, in a folder."""

    def __init__(self, model: Path, folder: Path, options: Namespace) -> None:
        self.model, self.folder, self.asked = model, folder, asked(options)
        self.seconds: dict[str, tuple[float, float]] = {}

    def evaluate_original(self) -> None:
        compressknow("probe", self.model, "-o", self.folder / "original", *self.asked)

    def do(self, cell: Cell) -> None:
        """Convert and probe, with the seconds of each kept."""
        recipe, converted = self.folder / f"{cell.key}.toml", self.folder / "converted"
        recipe.write_text(to_toml(cell.recipe.to_dict()), encoding="utf-8")
        start = time.perf_counter()
        compressknow("convert", self.model, converted, "--recipe", recipe)
        middle = time.perf_counter()
        reference = ("--reference", self.folder / "original")
        compressknow("probe", converted, "-o", self.folder / cell.key, *self.asked, *reference)
        self.seconds[cell.key] = (middle - start, time.perf_counter() - middle)
        shutil.rmtree(converted)

    def answers(self, cell: Cell) -> tuple[Answer, ...]:
        return read_answers(self.folder / cell.key).answers


def child(args: list[str]) -> None:
    """Run `compressknow` with these arguments; after each model's last answer print the seconds that asking took, and
    wait for a line.
    """
    import compressknow.evaluate.run as run
    from compressknow.cli import main as command_line

    evaluate, out = run.evaluate, sys.stdout

    def timed(*args: Any, **options: Any) -> Iterator[list[Answer]]:
        batches, seconds = evaluate(*args, **options), 0.0
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            seconds += time.perf_counter() - start
            if batch is None:
                break
            yield batch
        print(seconds, file=out, flush=True)
        sys.stdin.readline()

    run.evaluate = timed
    with contextlib.redirect_stdout(sys.stderr):
        code = command_line(args)
    sys.exit(code)


def measure_sweep(args: Sequence[str | Path], log: Path, turn: Callable[[int], None]) -> Sweep:
    """Run a sweep. `turn` is called after each cell, with its number, while the clock stands still."""
    command = [sys.executable, __file__, "--child", *map(str, args)]
    sweep, waited = Sweep(), 0.0
    start = time.perf_counter()
    with (
        log.open("w", encoding="utf-8") as errors,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        for line in process.stdout:
            stopped = time.perf_counter()
            sweep.ends.append(stopped - start - waited)
            sweep.asking.append(float(line))
            if len(sweep.ends) > 1:
                turn(len(sweep.ends) - 2)
            waited += time.perf_counter() - stopped
            process.stdin.write("\n")
            process.stdin.flush()
    sweep.wall = time.perf_counter() - start - waited
    if process.returncode:
        sys.exit(f"compressknow sweep failed:\n{log.read_text(encoding='utf-8')}")
    return sweep


def report_side(name: str, seconds: Sequence[float]) -> None:
    spread_over = f"({min(seconds):.1f}-{max(seconds):.1f})"
    print(f"{name:<18}{statistics.median(seconds):>8.1f} s a cell {spread_over}, {len(seconds)} cells", flush=True)


def report_ratio(grid: Sequence[Cell], shared: Sequence[Cell], ours: Sequence[float], theirs: Theirs) -> None:
    """Of the cells that both did: each side, and the ratio by kind and over the grid."""
    both = [sum(parts) for parts in theirs.seconds.values()]
    print("\nthe cells that both did")
    report_side("sweep", ours)
    report_side("convert + probe", both)
    converting = statistics.median(convert for convert, _ in theirs.seconds.values())
    print(f"{'':<18}of which convert {converting:.1f} s")
    # Few cells hold rare kinds more often than the grid does.
    there, done = Counter(map(kind_of, grid)), Counter(map(kind_of, shared))
    totals = [0.0, 0.0]
    for kind in done:
        sums = [sum(t for t, cell in zip(side, shared, strict=True) if kind_of(cell) == kind) for side in (ours, both)]
        print(f"{KINDS[kind]:<18}{sums[1] / sums[0]:>8.2f}x ({done[kind]} cells; {there[kind]} of the grid)")
        totals = [total + there[kind] / done[kind] * part for total, part in zip(totals, sums, strict=True)]
    ratio = totals[1] / totals[0]
    verdict = "met" if ratio >= RATIO_BOUND else "not met"
    print(f"{'ratio':<18}{ratio:>8.2f}x of the grid (bound {RATIO_BOUND}x: {verdict})", flush=True)


def report_overhead(sweep: Sweep) -> None:
    overhead, asking = sweep.overhead(), sum(sweep.asking)
    verdict = "met" if overhead <= OVERHEAD_BOUND else "not met"
    print(f"\n{'wall time':<18}{sweep.wall:>8.1f} s, of which asking {asking:.1f} s")
    print(f"{'overhead':<18}{overhead:>8.1f} % (bound {OVERHEAD_BOUND:.0f} %: {verdict})", flush=True)


def report_answers(cells: Sequence[Cell], study: Path, theirs: Theirs) -> None:
    """Whether both sides' answers are the same."""
    right, pairs = 0, list[tuple[Answer, Answer]]()
    for cell in cells:
        [folder] = study.glob(f"cells/{cell.key}-{'[0-9a-f]' * 8}")
        mine, others = read_answers(folder / name_folder(PROBE)).answers, theirs.answers(cell)
        right += sum(answer.correct for answer in mine) == sum(answer.correct for answer in others)
        pairs += zip(mine, others, strict=True)
    same = sum(mine.predicted == other.predicted and mine.rank == other.rank for mine, other in pairs)
    moved = max(abs(mine.top5_logp[0] - other.top5_logp[0]) for mine, other in pairs)
    verdict = "met" if right == len(cells) else "not met"
    print(f"{'as many right':<18}{right:>6} of {len(cells)} cells (bound: all, {verdict})")
    line = f"{same:>6} of {len(pairs)} facts, and the object's rank; log-probability within {moved:.1e}"
    print(f"{'same answer':<18}{line}", flush=True)


def missing(options: Namespace) -> str | None:
    """Why nothing can be measured here, or None."""
    from compressknow.evaluate.sources import Options, open_all

    if not (options.masked_model / "tokenizer.json").is_file():
        return f"there is no model in {options.masked_model}"
    try:
        open_all([PROBE], Options(data=options.data, protocol="paper", limit=options.facts))
    except CompressknowError as error:
        return str(error)
    return None


def report(options: Namespace, folder: Path) -> None:
    model = make_model(folder / "bert-base-size", options.masked_model)
    grid = grid_of(model)
    cells = spread(grid, options.cells or len(grid))
    shared = [] if "theirs" in options.skip.split(",") else spread(cells, options.their_cells)
    print(f"\n{len(cells)} of the {len(grid)} cells of the paper's grid, {options.facts} facts of T-REx", flush=True)
    theirs, study = Theirs(model, folder, options), folder / "study"
    if shared:
        theirs.evaluate_original()

    def turn(number: int) -> None:
        if cells[number] in shared:
            theirs.do(cells[number])

    which = "paper" if len(cells) == len(grid) else write_grid(folder / "grid.toml", cells)
    args = ["sweep", model, "-o", study, "--grid", which, *asked(options)]
    sweep = measure_sweep(args, folder / "sweep.log", turn)
    ours = dict(zip(cells, sweep.cells(), strict=True))
    report_side("sweep", list(ours.values()))
    if shared:
        report_ratio(grid, shared, [ours[cell] for cell in shared], theirs)
        report_answers(shared, study, theirs)
    report_overhead(sweep)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", type=int, default=5000, help="facts of T-REx")
    parser.add_argument("--cells", type=int, help="how many cells of the grid; all by default")
    parser.add_argument("--their-cells", type=int, default=4, help="how many of them are converted and probed too")
    parser.add_argument("--data", type=Path, default=SHARED / "data", help="the folder that holds lama/")
    parser.add_argument("--masked-model", type=Path, default=SHARED / "models" / "minilm-facts", help="its tokenizer")
    parser.add_argument("--skip", default="", help="`theirs`: the sweep alone, with its overhead")
    options = parser.parse_args()
    if reason := missing(options):
        print(f"not measured: {reason}")
        return
    with tempfile.TemporaryDirectory() as folder:
        report(options, Path(folder))


if __name__ == "__main__":
    main()
