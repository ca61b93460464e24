"""What a file keeps that `export --size` makes, beside llama.cpp's own types at the same bytes.

    python examples/smollm2.py --off-grid build/smollm2-off
    python benchmarks/allocation.py build/smollm2-off build/allocation [--types q4_k_m,q3_k_m,q2_k] [--limit 2000]
        [--roundings gptq,nearest] [--guides both,text,facts,kinds,imatrix-error] [--perplexity FILE.txt]
        [--text FILE.txt] [--tokens 8192] [--other FILE.gguf]...

A fifth of the facts of atlas may choose types, the others judge: of those that the original knows, how many each file
still knows, in llama.cpp. Importance matrices and our text are the same: the model's own, or that of a file. Kept facts
are compared fact by fact, by a test that knows relations; KL is the mean over them of the answer's first token. Files
and answers that are there are taken as they are, so that a run that was stopped goes on. Files of other tools are
judged alike; of these, p compares with the last of llama.cpp's types.

Two guides are here to be compared with, and not in export. `kinds` measures as `both` does, and gives one type to the
q_proj of all layers, one to their k_proj, and so on. `imatrix-error` is what llama.cpp's pull request 15550 steers by:
the squared error of the weights, their columns weighted by the importance matrix.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path, help="folder for the files and the answers")
    parser.add_argument("--types", default="q4_k_m,q3_k_m,q2_k")
    parser.add_argument("--roundings", default="gptq,nearest")
    parser.add_argument("--guides", default="both")
    parser.add_argument("--limit", type=int, default=None, help="facts that judge  [default: all of them]")
    parser.add_argument("--perplexity", type=Path, help="a text that neither way has seen, read in llama.cpp too")
    parser.add_argument("--text", default="self")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--converter", default=None)
    parser.add_argument("--other", type=Path, action="append", default=[], help="a file of another tool, judged too")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    frontier = runpy.run_path(str(Path(__file__).resolve().parent.parent / "examples/frontier.py"))
    files = frontier["divide_facts"](given.work)
    how: dict[str, Any] = {
        "calibration": given.text,
        "calibration_tokens": given.tokens,
        "converter": given.converter,
    }
    exact = _made(given.model, given.work / "exact.gguf", {"type": "bf16", "converter": given.converter})
    original = _answers(exact, given.work, files["judge"], None, given.limit)
    known = {fact: answer for fact, answer in original.items() if answer.correct}
    # Of the same name, so that answers are told by probe and fact alike; what was not known cannot be lost.
    asked = given.work / "known" / files["judge"].name
    asked.parent.mkdir(exist_ok=True)
    lines = files["judge"].read_text("utf-8").splitlines(keepends=True)
    asked.write_text("".join(line for line in lines if json.loads(line)["id"] in known), "utf-8")
    # The original once more, on these: what KL is told from must have been asked the same facts.
    _answers(exact, given.work, asked, None)
    print(f"{len(known)} facts that the original knows, of {len(original)}.\n", flush=True)
    print(
        f"{'file':<26}{'MB':>8}{'kept':>9}{'KL':>8}{'worse':>7}{'better':>7}{'p':>10}{'minutes':>9}{'ppl':>9}",
        flush=True,
    )
    if given.perplexity:
        print(f"{'exact':<80}{_perplexity(exact, given.work, given.perplexity):>12.2f}", flush=True)
    for kind in given.types.split(","):
        theirs = _made(given.model, given.work / f"{kind}.gguf", {"type": kind, **how})
        size = theirs.stat().st_size
        first = _answers(theirs, given.work, asked, exact)
        _show(kind, theirs, first, first, known, _perplexity(theirs, given.work, given.perplexity))
        for guide in given.guides.split(","):
            for rounding in given.roundings.split(","):
                name = f"{kind}-bytes-{guide}-{rounding}"
                file = given.work / f"{name}.gguf"
                if not file.exists():
                    choice = _choice(guide, given.model, exact, size, f"facts:{files['choose']}", how)
                    _made(given.model, file, {"size": size, "rounding": rounding, **choice, **how})
                answers = _answers(file, given.work, asked, exact)
                _show(name, file, answers, first, known, _perplexity(file, given.work, given.perplexity))
    for file in given.other:
        answers = _answers(file, given.work, asked, exact)
        _show(file.stem, file, answers, first, known, _perplexity(file, given.work, given.perplexity))


def _choice(guide: str, model: Path, exact: Path, size: int, facts: str, how: dict[str, Any]) -> dict[str, Any]:
    """What export is asked for, so that this guide decides."""
    if guide not in ("kinds", "imatrix-error"):
        return {"facts": facts, "guide": guide}
    texts = {key: how[key] for key in ("calibration", "calibration_tokens")}
    tensors = {each.name: each for each in gguf.GGUFReader(exact).tensors if len(each.shape) > 1}
    if guide == "kinds":
        measured = compressknow.sensitivity(model, facts=facts, **texts)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 999)
        losses = {f"{names.get_name(row.name[:-7])}.weight": measured.kl()[row.name] for row in measured.rows}
    else:
        matrix = _importance(model, exact.parent, how)
        losses = {name: _squared_errors(tensor, matrix.get(name)) for name, tensor in tensors.items()}
    table = {
        name: {kind: TypeOption(get_nbytes(kind, tensors[name].shape.tolist()[::-1]), own[kind]) for kind in own}
        for name, own in losses.items()
    }
    kinds: dict[str, list[str]] = {}
    for name in table:
        kinds.setdefault(name.split(".", 2)[-1] if guide == "kinds" else name, []).append(name)
    overhead = exact.stat().st_size - sum(int(tensors[name].n_bytes) for name in table)
    # What export adds to a file, by which it is asked for a little less.
    found = allocate(join_options(table, kinds), size - 24_000, overhead=overhead)
    return {"facts": facts, "must": [(name, found.types[kind]) for kind, own in kinds.items() for name in own]}


def _importance(model: Path, work: Path, how: dict[str, Any]) -> dict[str, Any]:
    file = work / "imatrix.gguf"
    if not file.exists():
        compressknow.export(model, work / "for-imatrix.gguf", type="q8_0", imatrix_out=file, **how)
    return read_importance(file).means()


def _squared_errors(tensor: Any, importance: Any) -> dict[str, float]:
    weight = gguf.dequantize(tensor.data, tensor.tensor_type)
    columns = np.ones(weight.shape[1], np.float32) if importance is None else importance.reshape(-1)
    return {
        kind: float((np.square(weight - roundtrip(weight, kind, importance)) * columns).sum(dtype=np.float64))
        for kind in list_legal_types(weight.shape[1])
    }


def _perplexity(file: Path, work: Path, text: Path | None) -> float:
    if text is None:
        return float("nan")
    folder = work / "answers" / "text" / file.stem
    found = compressknow.probe(file, folder, f"text:{text.resolve()}", runtime="llama.cpp", no_noise_floor=True)
    return compute_perplexity(next(iter(found.texts.values()))).value.value


def _made(model: Path, output: Path, how: dict[str, Any]) -> Path:
    if not output.exists():
        start = time.process_time()
        compressknow.export(model, output, **how)
        output.with_suffix(".seconds").write_text(str(time.process_time() - start))
    return output


def _answers(
    file: Path, work: Path, facts: Path, reference: Path | None, limit: int | None = None
) -> dict[str, Answer]:
    folder = work / "answers" / facts.parent.name / file.stem
    of = None if reference is None else work / "answers" / facts.parent.name / reference.stem
    probed = compressknow.probe(
        file, folder, f"facts:{facts}", reference=of, limit=limit, runtime="llama.cpp", no_noise_floor=True
    )
    return {answer.fact_id: answer for answer in probed.answers}


def _show(
    name: str, file: Path, own: dict[str, Answer], theirs: dict[str, Answer], known: dict[str, Answer], ppl: float
) -> None:
    right = np.array([[answers[fact].correct for fact in known] for answers in (theirs, own)])
    counts = tally(right[0], right[1], number_clusters([(answer.probe, answer.relation) for answer in known.values()]))
    total, seconds = sum(counts, Counts()), file.with_suffix(".seconds")
    divergence = statistics.fmean(_divergence(answer, own[fact]) for fact, answer in known.items())
    p = run_paired_test(counts).p if total.lost or total.gained else None
    minutes = float(seconds.read_text()) / 60 if seconds.exists() else float("nan")
    print(
        f"{name:<26}{file.stat().st_size / 1e6:>8.2f}{right[1].mean():>9.1%}{divergence:>8.3f}{total.lost:>7}"
        f"{total.gained:>7}{write_p_value(p):>10}{minutes:>9.1f}{ppl:>9.2f}",
        flush=True,
    )


def _divergence(original: Answer, answer: Answer) -> float:
    """KL over the original's most likely tokens and the rest, nats."""
    p, q = (np.exp(np.array(each.first_logp, float)) for each in (original, answer))
    p, q = (np.append(each, max(1 - each.sum(), 1e-9)) for each in (p, q))
    return float((p * np.log(p / q)).sum())


if __name__ == "__main__":
    try:
        main()
    except CompressknowError as error:
        sys.exit(f"Error: {error}")
