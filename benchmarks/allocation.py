"""Compare what files of `export --size` keep with what llama.cpp's own types keep in as many bytes.

    python examples/smollm2.py --off-grid build/smollm2-off
    python benchmarks/allocation.py build/smollm2-off build/allocation [--types q4_k_m,q3_k_m,q2_k] [--limit 2000]
        [--roundings gptq,nearest] [--guides both,text,facts,kinds,imatrix-error] [--perplexity FILE.txt]
        [--text FILE.txt] [--tokens 8192] [--other FILE.gguf]...

A fifth of the facts of atlas choose types; of the others, those that the original knows show how many each file still
knows, in llama.cpp. Importance matrices and our guiding text come from the same text: the model's own, or a file's. The
facts kept are compared one by one, by a test that allows for relations; KL is the mean over the known facts, for the
answer's first token. Existing files and answers are reused, so that a stopped run resumes. Files of other tools are
evaluated in the same way, and compared with the last of llama.cpp's types.

Two guides are only for comparison, and not in `export`. `kinds` measures like `both`, but gives one type to the q_proj
of all layers, one to their k_proj, and so on. `imatrix-error` minimizes what llama.cpp's pull request 15550 does: the
squared error of the weights, with columns weighted by the importance matrix.
"""

from __future__ import annotations

import argparse
import json
import runpy
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np

import compressknow
from compressknow.base.errors import CompressknowError
from compressknow.base.format import write_p_value
from compressknow.comparison.intervals import number_clusters, run_paired_test, tally
from compressknow.comparison.records import Counts
from compressknow.comparison.text import compute_perplexity
from compressknow.evaluate.answers import Answer
from compressknow.gguf.grids import get_nbytes, list_legal_types, roundtrip
from compressknow.gguf.importance import read_importance
from compressknow.study.allocation import TypeOption, allocate, join_options

EVALUATION: dict[str, Any] = {"runtime": "llama.cpp", "no_noise_floor": True}
METADATA = 24_000  # about the bytes that `export` adds to a file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path, help="folder for the files and the answers")
    parser.add_argument("--types", default="q4_k_m,q3_k_m,q2_k")
    parser.add_argument("--roundings", default="gptq,nearest")
    parser.add_argument("--guides", default="both")
    parser.add_argument("--limit", type=int, default=None, help="maximum facts to evaluate  [default: all]")
    parser.add_argument("--perplexity", type=Path, help="measure perplexity on this text too, which guides no file")
    parser.add_argument("--text", default="self")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--converter", default=None)
    parser.add_argument("--other", type=Path, action="append", default=[], help="evaluate a file of another tool too")
    arguments = parser.parse_args()
    model, work, text = arguments.model, arguments.work, arguments.perplexity
    work.mkdir(parents=True, exist_ok=True)
    files = divide_facts(work)
    options: dict[str, Any] = {"calibration": arguments.text, "calibration_tokens": arguments.tokens}
    options["converter"] = arguments.converter
    exact = export_once(model, work / "exact.gguf", {"type": "bf16", "converter": arguments.converter})
    original = evaluate(exact, work, files["judge"], limit=arguments.limit)
    known = {fact: answer for fact, answer in original.items() if answer.correct}
    # A file of the same name, so that the probe's name stays. Facts that were not known cannot be lost.
    facts = work / "known" / files["judge"].name
    facts.parent.mkdir(exist_ok=True)
    lines = files["judge"].read_text("utf-8").splitlines(keepends=True)
    facts.write_text("".join(line for line in lines if json.loads(line)["id"] in known), "utf-8")
    # Evaluate the original once more on these, because the reference for KL must have the same facts.
    evaluate(exact, work, facts)
    print(f"The original knows {len(known)} of {len(original)} facts.\n", flush=True)
    print(
        f"{'file':<26}{'MB':>8}{'kept':>9}{'KL':>8}{'worse':>7}{'better':>7}{'p':>10}{'minutes':>9}{'ppl':>9}",
        flush=True,
    )
    if text:
        print(f"{'exact':<80}{measure_perplexity(exact, work, text):>12.2f}", flush=True)
    for kind in arguments.types.split(","):
        plain = export_once(model, work / f"{kind}.gguf", {"type": kind, **options})
        size = plain.stat().st_size
        base = evaluate(plain, work, facts, exact)
        print_row(kind, plain, base, base, known, measure_perplexity(plain, work, text))
        for guide in arguments.guides.split(","):
            for rounding in arguments.roundings.split(","):
                name = f"{kind}-bytes-{guide}-{rounding}"
                file = work / f"{name}.gguf"
                if not file.exists():
                    choice = choose_types(guide, model, exact, size, f"facts:{files['choose']}", options)
                    export_once(model, file, {"size": size, "rounding": rounding, **choice, **options})
                answers = evaluate(file, work, facts, exact)
                print_row(name, file, answers, base, known, measure_perplexity(file, work, text))
    for file in arguments.other:
        answers = evaluate(file, work, facts, exact)
        print_row(file.stem, file, answers, base, known, measure_perplexity(file, work, text))


def divide_facts(folder: Path) -> dict[str, Path]:
    """Write the facts of atlas into two files: those that choose types, and those that judge files."""
    frontier = runpy.run_path(str(Path(__file__).resolve().parent.parent / "examples/frontier.py"))
    files: dict[str, Path] = frontier["divide_facts"](folder)
    return files


def choose_types(
    guide: str, model: Path, exact: Path, size: int, facts: str, options: dict[str, Any]
) -> dict[str, Any]:
    """Return options of `export` with which this guide chooses the types."""
    if guide not in ("kinds", "imatrix-error"):
        return {"facts": facts, "guide": guide}
    tensors = {each.name: each for each in gguf.GGUFReader(exact).tensors if len(each.shape) > 1}
    if guide == "kinds":
        texts = {key: options[key] for key in ("calibration", "calibration_tokens")}
        measured = compressknow.sensitivity(model, facts=facts, **texts).kl()
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 999)
        losses = {f"{names.get_name(name.removesuffix('.weight'))}.weight": measured[name] for name in measured}
    else:
        matrix = compute_importance(model, exact.parent, options)
        losses = {name: compute_squared_errors(tensor, matrix.get(name)) for name, tensor in tensors.items()}
    table = {
        name: {kind: TypeOption(get_nbytes(kind, tensors[name].shape.tolist()[::-1]), loss[kind]) for kind in loss}
        for name, loss in losses.items()
    }
    units: dict[str, list[str]] = {}
    for name in table:
        units.setdefault(name.split(".", 2)[-1] if guide == "kinds" else name, []).append(name)
    overhead = exact.stat().st_size - sum(int(tensors[name].n_bytes) for name in table)
    types = allocate(join_options(table, units), size - METADATA, overhead=overhead).types
    return {"facts": facts, "must": [(name, types[unit]) for unit, members in units.items() for name in members]}


def compute_importance(model: Path, work: Path, options: dict[str, Any]) -> dict[str, Any]:
    file = work / "imatrix.gguf"
    if not file.exists():
        compressknow.export(model, work / "for-imatrix.gguf", type="q8_0", imatrix_out=file, **options)
    return read_importance(file).means()


def compute_squared_errors(tensor: Any, importance: Any) -> dict[str, float]:
    weight = gguf.dequantize(tensor.data, tensor.tensor_type)
    columns = np.ones(weight.shape[1], np.float32) if importance is None else importance
    return {
        kind: float((np.square(weight - roundtrip(weight, kind, importance)) * columns).sum(dtype=np.float64))
        for kind in list_legal_types(weight.shape[1])
    }


def measure_perplexity(file: Path, work: Path, text: Path | None) -> float:
    if text is None:
        return float("nan")
    folder = work / "answers" / "text" / file.stem
    answers = compressknow.probe(file, folder, f"text:{text.resolve()}", **EVALUATION)
    return compute_perplexity(next(iter(answers.texts.values()))).value.value


def export_once(model: Path, output: Path, options: dict[str, Any]) -> Path:
    """Export a file and note the CPU seconds, unless it exists."""
    if not output.exists():
        start = time.process_time()
        compressknow.export(model, output, **options)
        output.with_suffix(".seconds").write_text(str(time.process_time() - start))
    return output


def evaluate(
    file: Path, work: Path, facts: Path, reference: Path | None = None, limit: int | None = None
) -> dict[str, Answer]:
    """Return a file's answers by fact id; `reference` is the file whose tokens KL is measured on."""
    folder = work / "answers" / facts.parent.name
    options = EVALUATION | {"reference": reference and folder / reference.stem, "limit": limit}
    answers = compressknow.probe(file, folder / file.stem, f"facts:{facts}", **options)
    return {answer.fact_id: answer for answer in answers.answers}


def print_row(
    name: str, file: Path, answers: dict[str, Answer], base: dict[str, Answer], known: dict[str, Answer], ppl: float
) -> None:
    """Print a file's figures; `base` are the answers that its own are compared with."""
    before, after = (np.array([each[fact].correct for fact in known]) for each in (base, answers))
    counts = tally(before, after, number_clusters([(answer.probe, answer.relation) for answer in known.values()]))
    total, seconds = sum(counts, Counts()), file.with_suffix(".seconds")
    kl = statistics.fmean(compute_kl(answer, answers[fact]) for fact, answer in known.items())
    p = run_paired_test(counts) if total.lost or total.gained else None
    minutes = float(seconds.read_text()) / 60 if seconds.exists() else float("nan")
    print(
        f"{name:<26}{file.stat().st_size / 1e6:>8.2f}{after.mean():>9.1%}{kl:>8.3f}{total.lost:>7}"
        f"{total.gained:>7}{write_p_value(p):>10}{minutes:>9.1f}{ppl:>9.2f}",
        flush=True,
    )


def compute_kl(original: Answer, answer: Answer) -> float:
    """Return the KL in nats over the original's most likely tokens, with all other tokens as one."""
    p, q = (np.exp(np.array(each.first_logp, float)) for each in (original, answer))
    p, q = (np.append(each, max(1 - each.sum(), 1e-9)) for each in (p, q))
    return float((p * np.log(p / q)).sum())


if __name__ == "__main__":
    try:
        main()
    except CompressknowError as error:
        sys.exit(f"Error: {error}")
