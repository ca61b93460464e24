"""Compare the time of a sweep with that of converting and probing its cells one by one, in one run.

    python benchmarks/sweep.py [--facts 5000] [--cells N] [--their-cells 4] [--data DIR] [--skip theirs]

The model is a BERT the size of bert-base with random weights, the grid is the paper's, and the facts are T-REx's, under
the paper's protocol. On one side, `compressknow sweep` does everything in one process. On the other, each cell takes
two processes: `compressknow convert`, then `compressknow probe` with `--reference` to the original's answers.
A converted checkpoint is removed after its cell; this is not timed.

Both sides answer with the original first, which is not timed either. Without the sweep, a cell takes from the start of
`convert` to the end of `probe`. In the sweep, it takes from the last answer of the model before it to its own last
answer, plus an equal share of the time after the last cell (statistics, tables, figures, pages), which the other side
does not need. Both sides do some of the cells, spread over the kinds in the grid (pruned, quantized, both, the final
layer). The sweep and its clocks pause while the other side does the cell that the sweep has just done, so that both are
affected alike if the machine's speed drifts. The ratio is of the sums over these cells, with each kind weighted by its
share of the grid. Both sides must count as many right answers in each cell. Their log-probabilities may differ in the
last digit, because sums depend on where their numbers are in memory.

Overhead is the share of the sweep's wall time (including the process's start, the original and the pages) that is not
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

from convert import write_verdict

from compressknow.base.errors import CompressknowError
from compressknow.compress.recipe import to_toml
from compressknow.compress.steps import Prune, Quantize
from compressknow.evaluate.answers import Answer, read_answers
from compressknow.study.cells import name_folder
from compressknow.study.grid import Cell, build_paper_grid

# Lower bound of the time without the sweep relative to the sweep's, and upper bound of the overhead in percent.
RATIO_BOUND = 1.5
OVERHEAD_BOUND = 15.0
PROBE = "lama:trex"
# Name of each kind, by whether its cells are of the final layer, pruned, quantized.
KINDS = {
    (False, True, False): "pruned",
    (False, False, True): "quantized",
    (False, True, True): "both",
    (True, True, False): "final layer",
}
SHARED = Path(__file__).resolve().parents[2] / "shared"


@dataclass
class SweepTimes:
    """Seconds of a sweep, without the pauses for the other side."""

    ends: list[float] = field(default_factory=list)  # from its start to the last answer of the original, of each cell
    evaluating: list[float] = field(default_factory=list)  # spent on evaluating the original, each cell
    wall: float = 0.0  # from its start to its end

    def list_cells(self) -> list[float]:
        """Return the seconds of each cell, including its share of the time after the last."""
        share = (self.wall - self.ends[-1]) / (len(self.ends) - 1)
        return [end - before + share for before, end in zip(self.ends, self.ends[1:], strict=False)]

    def compute_overhead(self) -> float:
        """Return the overhead in percent of the wall time."""
        return 100 * (self.wall - sum(self.evaluating)) / self.wall


def make_model(folder: Path, tokenizer_folder: Path) -> Path:
    """Write a BERT the size of bert-base with random weights, and a tokenizer."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer)))
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"writing {folder.name}: {millions:.0f} M parameters", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def build_grid(model: Path) -> tuple[Cell, ...]:
    from compressknow.compress.convert import VariantMaker

    return build_paper_grid(VariantMaker(model).structure("paper"))


def find_kind(cell: Cell) -> tuple[bool, ...]:
    """Return the cell's key in `KINDS`."""
    steps = cell.recipe.steps
    does = (any(isinstance(step, kind) for step in steps) for kind in (Prune, Quantize))
    return (steps[0].where.scope == ("final",), *does)


def select_by_kind(cells: Sequence[Cell], count: int) -> list[Cell]:
    """Return `count` cells in their order, equally many of each kind if there are enough, evenly spaced within it."""
    kinds: dict[tuple[bool, ...], list[Cell]] = {}
    for cell in cells:
        kinds.setdefault(find_kind(cell), []).append(cell)
    # The kinds take turns until all cells are selected.
    turns = sorted((turn, number) for number, alike in enumerate(kinds.values()) for turn in range(len(alike)))
    counts = Counter(number for _, number in turns[:count])
    selected = {cell for number, alike in enumerate(kinds.values()) for cell in select_evenly(alike, counts[number])}
    return [cell for cell in cells if cell in selected]


def select_evenly(cells: Sequence[Cell], count: int) -> list[Cell]:
    return [cells[(2 * index + 1) * len(cells) // (2 * count)] for index in range(count)]


def write_grid(path: Path, cells: Sequence[Cell]) -> Path:
    """Write a grid file of these cells."""
    tables = [to_toml(cell.recipe.to_dict()).replace("[[steps]]", "[[cells.steps]]") for cell in cells]
    named = [f'[[cells]]\nname = "{cell.key}"\n{table}\n' for cell, table in zip(cells, tables, strict=True)]
    path.write_text("\n".join(named), encoding="utf-8")
    return path


def list_probe_options(options: Namespace) -> list[str]:
    """Return the options of `probe` and `sweep` that name the facts."""
    return ["-p", PROBE, "--data", str(options.data), "--protocol", "paper", "--limit", str(options.facts)]


def run_command(*args: str | Path) -> None:
    """Run `compressknow` in its own process."""
    command = [sys.executable, "-m", "compressknow", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"compressknow {args[0]} failed:\n{done.stderr}")


class SeparateRuns:
    """Cells converted and probed one by one, in a folder; `seconds` of both by the cell's key."""

    def __init__(self, model: Path, folder: Path, options: Namespace) -> None:
        self.model, self.folder, self.probe_options = model, folder, list_probe_options(options)
        self.seconds: dict[str, tuple[float, float]] = {}

    def evaluate_original(self) -> None:
        run_command("probe", self.model, "-o", self.folder / "original", *self.probe_options)

    def evaluate_cell(self, cell: Cell) -> None:
        recipe, converted = self.folder / f"{cell.key}.toml", self.folder / "converted"
        recipe.write_text(to_toml(cell.recipe.to_dict()), encoding="utf-8")
        start = time.perf_counter()
        run_command("convert", self.model, converted, "--recipe", recipe)
        middle = time.perf_counter()
        reference = ("--reference", self.folder / "original")
        run_command("probe", converted, "-o", self.folder / cell.key, *self.probe_options, *reference)
        self.seconds[cell.key] = (middle - start, time.perf_counter() - middle)
        shutil.rmtree(converted)

    def read_answers(self, cell: Cell) -> tuple[Answer, ...]:
        return read_answers(self.folder / cell.key).answers


def run_child(args: list[str]) -> None:
    """Run `compressknow` with these arguments. After each model's last answer, print the seconds that evaluating took,
    and wait for a line."""
    import compressknow.evaluate.run as run
    from compressknow.cli import main as command_line

    evaluate, out = run.evaluate, sys.stdout

    def evaluate_timed(*args: Any, **options: Any) -> Iterator[list[Answer]]:
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

    run.evaluate = evaluate_timed
    with contextlib.redirect_stdout(sys.stderr):
        code = command_line(args)
    sys.exit(code)


def measure_sweep(args: Sequence[str | Path], log: Path, on_cell: Callable[[int], None]) -> SweepTimes:
    """Run a sweep. `on_cell` is called after each cell, with its number, while the clock is stopped."""
    command = [sys.executable, __file__, "--child", *map(str, args)]
    sweep, paused = SweepTimes(), 0.0
    start = time.perf_counter()
    with (
        log.open("w", encoding="utf-8") as errors,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        for line in process.stdout:
            stopped = time.perf_counter()
            sweep.ends.append(stopped - start - paused)
            sweep.evaluating.append(float(line))
            if len(sweep.ends) > 1:
                on_cell(len(sweep.ends) - 2)
            paused += time.perf_counter() - stopped
            process.stdin.write("\n")
            process.stdin.flush()
    sweep.wall = time.perf_counter() - start - paused
    if process.returncode:
        sys.exit(f"compressknow sweep failed:\n{log.read_text(encoding='utf-8')}")
    return sweep


def report_side(name: str, seconds: Sequence[float]) -> None:
    spread = f"({min(seconds):.1f}-{max(seconds):.1f})"
    print(f"{name:<18}{statistics.median(seconds):>8.1f} s per cell {spread}, {len(seconds)} cells", flush=True)


def report_ratio(grid: Sequence[Cell], shared: Sequence[Cell], ours: Sequence[float], theirs: SeparateRuns) -> None:
    """Print the times of the cells that both sides did, and their ratio by kind and over the grid."""
    separate = [sum(parts) for parts in theirs.seconds.values()]
    print("\ncells that both sides did")
    report_side("sweep", ours)
    report_side("convert + probe", separate)
    converting = statistics.median(convert for convert, _ in theirs.seconds.values())
    print(f"{'':<18}of which convert {converting:.1f} s")
    # Rare kinds are a larger share of the few cells than of the grid.
    in_grid, done = Counter(map(find_kind, grid)), Counter(map(find_kind, shared))
    totals = [0.0, 0.0]
    for kind in done:
        sums = [
            sum(t for t, cell in zip(side, shared, strict=True) if find_kind(cell) == kind) for side in (ours, separate)
        ]
        print(f"{KINDS[kind]:<18}{sums[1] / sums[0]:>8.2f}x ({done[kind]} cells, of {in_grid[kind]} in the grid)")
        totals = [total + in_grid[kind] / done[kind] * part for total, part in zip(totals, sums, strict=True)]
    ratio = totals[1] / totals[0]
    verdict = write_verdict(ratio >= RATIO_BOUND)
    print(f"{'ratio':<18}{ratio:>8.2f}x over the grid (bound {RATIO_BOUND}x: {verdict})", flush=True)


def report_overhead(sweep: SweepTimes) -> None:
    overhead = sweep.compute_overhead()
    print(f"\n{'wall time':<18}{sweep.wall:>8.1f} s, of which evaluating {sum(sweep.evaluating):.1f} s")
    bound = f"bound {OVERHEAD_BOUND:.0f} %: {write_verdict(overhead <= OVERHEAD_BOUND)}"
    print(f"{'overhead':<18}{overhead:>8.1f} % ({bound})", flush=True)


def report_answers(cells: Sequence[Cell], study: Path, runs: SeparateRuns) -> None:
    """Print in how many cells both sides have as many right answers, and how many answers are the same."""
    right, pairs = 0, list[tuple[Answer, Answer]]()
    for cell in cells:
        [folder] = study.glob(f"cells/{cell.key}-{'[0-9a-f]' * 8}")
        ours, theirs = read_answers(folder / name_folder(PROBE)).answers, runs.read_answers(cell)
        right += sum(answer.correct for answer in ours) == sum(answer.correct for answer in theirs)
        pairs += zip(ours, theirs, strict=True)
    same = sum(a.predicted == b.predicted and a.rank == b.rank for a, b in pairs)
    difference = max(abs(a.top5_logp[0] - b.top5_logp[0]) for a, b in pairs)
    print(f"{'as many right':<18}{right:>6} of {len(cells)} cells (bound: all, {write_verdict(right == len(cells))})")
    line = f"{same:>6} of {len(pairs)} facts, with the object's rank; log-probabilities within {difference:.1e}"
    print(f"{'same answer':<18}{line}", flush=True)


def find_obstacle(options: Namespace) -> str | None:
    """Return why nothing can be measured, or None."""
    from compressknow.evaluate.sources import Options, open_all

    if not (options.masked_model / "tokenizer.json").is_file():
        return f"{options.masked_model} has no tokenizer.json"
    try:
        open_all([PROBE], Options(data=options.data, protocol="paper", limit=options.facts))
    except CompressknowError as error:
        return str(error)
    return None


def report(options: Namespace, folder: Path) -> None:
    model = make_model(folder / "bert-base-size", options.masked_model)
    grid = build_grid(model)
    cells = select_by_kind(grid, options.cells or len(grid))
    shared = [] if "theirs" in options.skip.split(",") else select_by_kind(cells, options.their_cells)
    print(f"\n{len(cells)} of the {len(grid)} cells of the paper's grid, {options.facts} facts of T-REx", flush=True)
    theirs, study = SeparateRuns(model, folder, options), folder / "study"
    if shared:
        theirs.evaluate_original()

    def evaluate_shared(number: int) -> None:
        if cells[number] in shared:
            theirs.evaluate_cell(cells[number])

    grid_option = "paper" if len(cells) == len(grid) else write_grid(folder / "grid.toml", cells)
    args = ["sweep", model, "-o", study, "--grid", grid_option, *list_probe_options(options)]
    sweep = measure_sweep(args, folder / "sweep.log", evaluate_shared)
    ours = dict(zip(cells, sweep.list_cells(), strict=True))
    report_side("sweep", list(ours.values()))
    if shared:
        report_ratio(grid, shared, [ours[cell] for cell in shared], theirs)
        report_answers(shared, study, theirs)
    report_overhead(sweep)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        run_child(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", type=int, default=5000, help="facts of T-REx")
    parser.add_argument("--cells", type=int, help="number of cells of the grid  [default: all]")
    parser.add_argument("--their-cells", type=int, default=4, help="how many of them to convert and probe too")
    parser.add_argument("--data", type=Path, default=SHARED / "data", help="the folder that contains lama/")
    parser.add_argument("--masked-model", type=Path, default=SHARED / "models" / "minilm-facts", help="its tokenizer")
    parser.add_argument("--skip", default="", help="`theirs`: run only the sweep, and report its overhead")
    options = parser.parse_args()
    if reason := find_obstacle(options):
        print(f"not measured: {reason}")
        return
    with tempfile.TemporaryDirectory() as folder:
        report(options, Path(folder))


if __name__ == "__main__":
    main()
