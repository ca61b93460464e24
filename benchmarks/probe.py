"""Measure how many facts per second are answered, and compare with the paper's own loop and lm-pub-quiz, in one run.

    python benchmarks/probe.py [--data DIR] [--model DIR] [--rounds 3] [--skip PART,PART]

Parts: paper, batches, int8, int4, bear, masked, grades. Each measurement runs in its own process. Its clock starts
after the model is loaded and has answered once, and stops at the last answer: it includes writing prompts, tokenizing
and scoring. Its memory is the peak above what the process used with the model loaded. Each round measures everything
once, so that all are affected alike if the machine's speed drifts; ratios are of medians. Both sides compute in float32
and answer the same facts, the slower side only some of them, evenly spaced.

- `paper`: T-REx, and a BERT the size of bert-base with random weights. The paper's loop (LLMCompression, utils.py and
  bert_quantize.py) pads each sentence to the model's 512 tokens and computes the logits over the vocabulary at every
  position. It has batches of 128, here of at most `--paper-facts`: each sentence takes 62 MB of logits. What it prints
  and counts again for each sentence of a batch is left out.
- `batches`: the speed of compressknow by batch size, on the same model and facts.
- `int8`: T-REx, and that BERT with all layers quantized by `convert`: with the engine's int8 layers, unpacked to floats
  as in plain transformers, and the original.
- `int4`: tokens instead of facts, which the causal model of `bear` decodes one at a time as loaded by
  `compressknow.load`: all layers quantized to int4 in groups of 64, and the original in float32 and in bfloat16. Also
  the bytes of everything in the int4 layers, relative to float32.
- `bear`: BEAR's first template, and a causal model (examples/smollm2.py makes one). lm-pub-quiz runs with the fastest
  batch size of `--their-batches`, conditional scores and sums, as its authors recommend for BEAR.
- `masked`: the same as `bear` with a masked model and `answer_l2r+word_l2r`.
- `grades`: atlas, and the causal model of `bear`, with and without the greedy text that grades of knowing need.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from convert import read_resident_mb, write_verdict

from compressknow.base.errors import CompressknowError
from compressknow.evaluate.runtimes import BATCH_SIZE

# Lower bounds of the speed of compressknow relative to the other side, by part.
BOUNDS = {"paper": 30, "int4": 1.5, "bear": 5}
# Upper bound of the time with greedy text, relative to that without.
GRADES_BOUND = 1.6
# Upper bound of the bytes of int4 layers, relative to float32.
INT4_BYTES_BOUND = 0.2
# Sides of the part `int8`.
ENGINE, UNPACKED, ORIGINAL = "int8", "int8 in floats", "float32"
# Sides of the part `int4`, besides ORIGINAL.
PACKED, HALF = "int4", "bfloat16"
# Sides of the part `grades`.
GRADED, UNGRADED = "with greedy text", "without"
BATCH_SIZES = (1, 8, 32, 128)
# Scores that differ by less count as equal, because the sides sum in different orders.
ROUNDING = 1e-3
SHARED = Path(__file__).resolve().parents[2] / "shared"
SMOLLM2 = Path(__file__).resolve().parents[1] / "build" / "smollm2"

Answers = dict[str, Any]
Language = tuple[Any, Any, str]  # model, tokenizer and family
Run = Callable[[int, int], Answers]  # answers a number of facts, in batches of a size


def open_probe(part: str, options: Namespace) -> Any:
    from compressknow.evaluate.sources import Options, open_all

    if part in ("bear", "masked"):
        return open_all(["bear"], Options(data=options.data, limit=options.bear_facts))[0]
    if part == "grades":
        return open_all(["atlas"], Options(limit=options.grades_facts))[0]
    return open_all(["lama:trex"], Options(data=options.data, protocol="paper", limit=options.facts))[0]


def make_bert(options: Namespace) -> tuple[Any, Any]:
    """Make a BERT the size of bert-base with random weights, and load a tokenizer."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.masked_model)
    return BertForMaskedLM(BertConfig(vocab_size=len(tokenizer))).eval(), tokenizer


def load_model(part: str, side: str, options: Namespace) -> Language:
    """Load the model, tokenizer and family for a side of a part."""
    from compressknow.engine import layers
    from compressknow.engine.language_model import load_language_model

    if part == "paper":
        return *make_bert(options), "masked"
    if part == "int8":
        if side == UNPACKED:
            layers.Int8Kind.runs_on = lambda *_: False
        language = load_language_model(options.checkpoints / (ORIGINAL if side == ORIGINAL else ENGINE))
    else:
        folder = options.masked_model if part == "masked" else options.model
        language = load_language_model(folder, dtype="float32")
        # lm-pub-quiz begins every text with this token, whatever the tokenizer does by default.
        language.tokenizer.add_bos_token = language.tokenizer.bos_token is not None
    return language.model, language.tokenizer, language.family


def prepare_decoding(side: str, options: Namespace) -> Run:
    """Return a function that decodes the tokens after a text, one at a time."""
    import torch

    from compressknow.engine.load import load, load_tokenizer

    folder = options.checkpoints / PACKED if side == PACKED else options.model
    model = load(folder, dtype=HALF if side == HALF else ORIGINAL)
    ids = torch.tensor([load_tokenizer(folder)("The capital of France is Paris, and").input_ids])

    def run(count: int, _: int) -> Answers:
        generated = model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        return {str(place): token for place, token in enumerate(generated[0, ids.shape[1] :].tolist())}

    return run


def select_evenly(facts: Sequence[Any], count: int) -> list[Any]:
    count = min(count, len(facts))
    return [facts[index * len(facts) // count] for index in range(count)]


def prepare_compressknow(part: str, language: Language, options: Namespace, *, greedy: bool = True) -> Run:
    """Return a function that answers with each fact's most likely token, and whether it is right; for BEAR and atlas
    with the answer, the object's rank and the best score."""
    from compressknow.evaluate.evaluate import Prompts, evaluate
    from compressknow.evaluate.scoring.families import make_scorer

    probe = open_probe(part, options)

    def run(count: int, batch_size: int) -> Answers:
        scorer: Any = make_scorer(*language, replace(probe, facts=tuple(select_evenly(probe.facts, count))))
        if not greedy:
            scorer.produce = lambda batch, *_: [""] * len(batch)
        answers = (answer for batch in evaluate(Prompts(scorer, batch_size)) for answer in batch)
        if part in ("paper", "int8"):
            return {answer.fact_id: [int(answer.first_ids[0]), answer.correct] for answer in answers}
        return {answer.fact_id: [answer.predicted, answer.rank, answer.top5_logp[0]] for answer in answers}

    return run


def prepare_papers_loop(part: str, language: Language, options: Namespace) -> Run:
    """Return a function that answers with each fact's most likely token, and whether its text is the object's."""
    import torch

    from compressknow.evaluate.facts import BLANK

    model, tokenizer, _ = language
    facts = open_probe(part, options).facts

    def encode(texts: list[str], length: int) -> Any:
        return tokenizer(texts, truncation=True, padding="max_length", max_length=length, return_tensors="pt")

    def answer_batch(batch: list[Any]) -> Iterator[tuple[str, list[Any]]]:
        sentences = encode([fact.prompt.replace(BLANK, tokenizer.mask_token) for fact in batch], 512)
        labels = encode([fact.obj_label for fact in batch], 8)["input_ids"]
        texts = [tokenizer.decode(label, skip_special_tokens=True) for label in labels]
        with torch.no_grad():
            logits = model(sentences["input_ids"], attention_mask=sentences["attention_mask"]).logits
        rows, places = torch.where(sentences["input_ids"] == tokenizer.mask_token_id)
        top = torch.topk(logits[rows, places, :], 5, dim=-1).indices
        outputs = [[tokenizer.decode(token).lower() for token in five] for five in top]
        for fact, text, five, ids in zip(batch, texts, outputs, top.tolist(), strict=True):
            yield fact.id, [ids[0], text == five[0]]

    def run(count: int, batch_size: int) -> Answers:
        selected = select_evenly(facts, count)
        batches = [selected[start : start + batch_size] for start in range(0, count, batch_size)]
        return {name: answer for batch in batches for name, answer in answer_batch(batch)}

    return run


def prepare_lm_pub_quiz(part: str, language: Language, options: Namespace) -> Run:
    """Return a function that answers with each fact's labels, the object's index among them, and their scores."""
    from lm_pub_quiz import Evaluator

    model, tokenizer, family = language
    kind = {"causal": {"model_type": "CLM", "ensure_bos_token_added": False}}
    masked = {"model_type": "MLM", "pll_metric": "answer_l2r+word_l2r"}
    evaluator = Evaluator.from_model(model, tokenizer=tokenizer, conditional_score=True, **kind.get(family, masked))
    facts = open_probe(part, options).facts
    relations = json.loads((options.data / "bear" / "metadata_relations.json").read_text(encoding="utf-8"))

    def run(count: int, batch_size: int) -> Answers:
        answers = {}
        for fact in select_evenly(facts, count):
            relation = relations[fact.relation]
            scores = evaluator.evaluate_instance(
                template=relation["templates"][0],
                answers=relation["answer_space_labels"],
                subject=fact.sub_label,
                reduction="sum",
                batch_size=batch_size,
            )
            answers[fact.id] = [list(fact.candidates), fact.candidates.index(fact.obj_label), scores]
        return answers

    return run


SIDES: dict[str, Callable[..., Run]] = {
    **dict.fromkeys(("compressknow", ENGINE, UNPACKED, ORIGINAL, GRADED), prepare_compressknow),
    UNGRADED: partial(prepare_compressknow, greedy=False),
    "the paper's loop": prepare_papers_loop,
    "lm-pub-quiz": prepare_lm_pub_quiz,
}


def run_child(options: Namespace) -> None:
    """Let one side answer, and print its seconds, peak memory and answers."""
    part, side, count, batch_size = *options.child[:2], *map(int, options.child[2:])
    if part == "int4":
        run = prepare_decoding(side, options)
    else:
        run = SIDES[side](part, load_model(part, side, options), options)
    run(1, batch_size)
    # Reset the peak, so that it does not include loading.
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = read_resident_mb("VmRSS")
    start = time.perf_counter()
    answers = run(count, batch_size)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak_mb": read_resident_mb("VmHWM") - before, "answers": answers}))


def measure(part: str, side: str, count: int, batch_size: int) -> dict[str, Any]:
    command = [sys.executable, *sys.argv, "--child", part, side, str(count), str(batch_size)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    result["speed"] = len(result["answers"]) / result["seconds"]
    return result


def compare(part: str, sides: dict[str, tuple[int, int]], rounds: int) -> dict[str, dict[str, Any]]:
    """Measure each side (name -> number of facts, batch size) once per round; print and return its median speed, and
    return its last answers."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, (count, batch_size) in sides.items():
            runs[side].append(measure(part, side, count, batch_size))
    results = {}
    unit = "tokens" if part == "int4" else "facts"
    for side, of_side in runs.items():
        speeds, answers = sorted(run["speed"] for run in of_side), of_side[-1]["answers"]
        results[side] = {"speed": statistics.median(speeds), "answers": answers}
        peak = max(run["peak_mb"] for run in of_side)
        line = f"{results[side]['speed']:>9.2f} {unit}/s ({speeds[0]:.2f}-{speeds[-1]:.2f}){peak:>8.0f} MB"
        print(f"{side:<18}{line}  {len(answers)} {unit}, batches of {sides[side][1]}", flush=True)
    return results


def report_ratio(part: str, results: dict[str, dict[str, Any]]) -> None:
    ours, theirs = (result["speed"] for result in results.values())
    bound = BOUNDS.get(part)
    verdict = f" (bound {bound}x: {write_verdict(ours >= bound * theirs)})" if bound else ""
    print(f"{'ratio':<18}{ours / theirs:>8.1f}x{verdict}", flush=True)


def report_paper(options: Namespace) -> None:
    print("\nT-REx by the paper's protocol, BERT the size of bert-base")
    count = options.paper_facts
    sides = {"compressknow": (options.facts, BATCH_SIZE), "the paper's loop": (count, min(count, 128))}
    results = compare("paper", sides, options.rounds)
    report_ratio("paper", results)
    ours, theirs = (result["answers"] for result in results.values())
    same = sum(ours[name] == answer for name, answer in theirs.items())
    tokens, right = len({token for token, _ in theirs.values()}), sum(correct for _, correct in theirs.values())
    line = f"{same} of {len(theirs)} (bound: all, {write_verdict(same == len(theirs))}); {tokens} tokens, {right} right"
    print(f"{'same answer':<18}{line}")


def report_batches(options: Namespace) -> None:
    count = options.facts // 4
    print(f"\ncompressknow by batch size: T-REx, the same model, {count} facts, one run each")
    for size in BATCH_SIZES:
        run = measure("paper", "compressknow", count, size)
        print(f"{size:<18}{run['speed']:>9.2f} facts/s{run['peak_mb']:>8.0f} MB", flush=True)


def report_int8(options: Namespace) -> None:
    from compressknow import convert

    print("\nT-REx, BERT the size of bert-base, all layers quantized to int8")
    with tempfile.TemporaryDirectory() as folder:
        for part in make_bert(options):
            part.save_pretrained(Path(folder) / ORIGINAL)
        convert(Path(folder) / ORIGINAL, Path(folder) / ENGINE, quantize="int8")
        sys.argv += ["--checkpoints", folder]
        sides = dict.fromkeys((ENGINE, UNPACKED, ORIGINAL), (options.facts, BATCH_SIZE))
        results = compare("int8", sides, options.rounds)
    for other in (UNPACKED, ORIGINAL):
        print(f"{'ratio':<18}{results[ENGINE]['speed'] / results[other]['speed']:>8.1f}x of {other}", flush=True)


def report_int4(options: Namespace) -> None:
    from compressknow import convert, load
    from compressknow.engine.layers import Int4Linear

    print(f"\nDecoding one token at a time, {options.model.name}, all layers quantized to int4, groups of 64")
    with tempfile.TemporaryDirectory() as folder:
        convert(options.model, Path(folder) / PACKED, scope="overall", quantize="int4", group_size=64)
        layers = [layer for layer in load(Path(folder) / PACKED).modules() if isinstance(layer, Int4Linear)]
        sys.argv += ["--checkpoints", folder]
        results = compare("int4", dict.fromkeys((PACKED, ORIGINAL, HALF), (options.tokens, 1)), options.rounds)
    faster = max((ORIGINAL, HALF), key=lambda side: results[side]["speed"])
    report_ratio("int4", {side: results[side] for side in (PACKED, faster)})
    nbytes = sum(tensor.nbytes for layer in layers for tensor in (*layer.parameters(), *layer.buffers()))
    share = nbytes / sum(4 * layer.unlisted for layer in layers)
    print(f"{'weights':<18}{share:>8.3f}x of float32 ({nbytes / 1e6:.0f} MB; bound {INT4_BYTES_BOUND}x: ", end="")
    print(f"{write_verdict(share <= INT4_BYTES_BOUND)})", flush=True)


def report_bear(part: str, options: Namespace) -> None:
    print(f"\nBEAR, {(options.model if part == 'bear' else options.masked_model).name}")
    count = options.bear_facts
    sizes = [int(size) for size in options.their_batches.split(",")]
    fewer = min(options.their_facts, count)
    trials = {size: measure(part, "lm-pub-quiz", max(fewer // 5, 1), size) for size in sizes}
    fastest = max(trials, key=lambda size: trials[size]["speed"])
    speeds = ", ".join(f"{size}: {run['speed']:.2f}" for size, run in trials.items())
    print(f"lm-pub-quiz by batch size, facts/s: {speeds}")
    sides = {"compressknow": (count, BATCH_SIZE), "lm-pub-quiz": (fewer, fastest)}
    results = compare(part, sides, options.rounds)
    report_ratio(part, results)
    ours, theirs = (result["answers"] for result in results.values())
    same = [compare_rankings(*ours[name], *answer) for name, answer in theirs.items()]
    best, rank = sum(best for best, _ in same), sum(rank for _, rank in same)
    line = f"answer {best}, the object's rank {rank} of {len(same)}"
    print(f"{'same ranking':<18}{line} (bound: all, {write_verdict(best == rank == len(same))})", flush=True)


def report_grades(options: Namespace) -> None:
    print(f"\natlas, {options.model.name}: grades of knowing")
    results = compare("grades", dict.fromkeys((GRADED, UNGRADED), (options.grades_facts, BATCH_SIZE)), options.rounds)
    ratio = results[UNGRADED]["speed"] / results[GRADED]["speed"]
    verdict = write_verdict(ratio <= GRADES_BOUND)
    print(f"{'ratio':<18}{ratio:>8.2f}x the time (bound {GRADES_BOUND}x: {verdict})", flush=True)


def compare_rankings(
    predicted: str, rank: int, top: float, labels: list[str], gold: int, scores: list[float]
) -> tuple[bool, bool]:
    """Return whether the most likely answer and the object's rank agree with the scores, whose ties have any order."""
    same = scores[labels.index(predicted)] >= max(scores) - ROUNDING and abs(top - max(scores)) < ROUNDING
    above = sum(score > scores[gold] + ROUNDING for score in scores)
    return same, 1 + above <= rank <= sum(score >= scores[gold] - ROUNDING for score in scores)


def find_obstacle(part: str, options: Namespace) -> str | None:
    """Return why a part cannot be measured, or None."""
    from compressknow.engine.layers import Int4Kind

    if part in options.skip.split(","):
        return "skipped by --skip"
    if part in ("bear", "masked") and not importlib.util.find_spec("lm_pub_quiz"):
        return "lm-pub-quiz is not installed (pip install lm-pub-quiz)"
    folder = options.model if part in ("bear", "int4", "grades") else options.masked_model
    if not (folder / "tokenizer.json").is_file():
        return f"{folder} has no tokenizer.json"
    if part == "int4":
        return None if Int4Kind().runs_on("cpu") else "this CPU has no fast kernel for int4"
    try:
        open_probe(part, options)
    except CompressknowError as error:
        return str(error)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED / "data", help="the folder that contains lama/ and bear/")
    parser.add_argument("--model", type=Path, default=SMOLLM2, help="the causal model")
    parser.add_argument("--masked-model", type=Path, default=SHARED / "models" / "minilm-facts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--facts", type=int, default=1000, help="facts of T-REx for compressknow")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to decode")
    parser.add_argument("--paper-facts", type=int, default=32, help="facts of T-REx for the paper's loop")
    parser.add_argument("--bear-facts", type=int, default=500, help="facts of BEAR for compressknow")
    parser.add_argument("--their-facts", type=int, default=40, help="facts of BEAR for lm-pub-quiz")
    parser.add_argument("--grades-facts", type=int, default=300, help="facts of atlas for grades")
    parser.add_argument("--their-batches", default="16,32,64", help="batch sizes to try for lm-pub-quiz")
    parser.add_argument("--skip", default="")
    parser.add_argument("--checkpoints", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_child(options)
        return
    reports: dict[str, Callable[[Namespace], None]] = {
        "paper": report_paper,
        "batches": report_batches,
        "int8": report_int8,
        "int4": report_int4,
        "bear": partial(report_bear, "bear"),
        "masked": partial(report_bear, "masked"),
        "grades": report_grades,
    }
    for part, report in reports.items():
        if reason := find_obstacle(part, options):
            print(f"\n{part}: not measured: {reason}", flush=True)
        else:
            report(options)


if __name__ == "__main__":
    main()
