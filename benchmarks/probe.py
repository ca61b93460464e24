"""How many facts a second are answered, beside the paper's own loop and beside lm-pub-quiz, in one run.

    python benchmarks/probe.py [--data DIR] [--model DIR] [--rounds 3] [--skip PART,PART]

Parts: paper, batches, int8, int4, bear, masked, grades. Every measurement is a process of its own. Its clock starts
after the model is loaded and has answered once, and stops at the last answer: writing prompts, tokenizing and scoring
count. Its memory is the peak above what it held with the model loaded. Rounds alternate, so that a machine whose
speed drifts does so for all; ratios are of medians. Both sides compute in float32 and are asked the same facts; the
slower side a part of them, evenly spread.

- `paper`: T-REx, and a BERT of bert-base's size with random weights. The paper's loop (LLMCompression, utils.py and
  bert_quantize.py) fills each sentence up to the model's 512 tokens and computes the whole vocabulary at each of them.
  Theirs takes batches of 128, here of no more than `--paper-facts`: logits are 62 MB a sentence. What it prints and
  counts again for each sentence of a batch is left out.
- `int8`: T-REx, and that BERT quantized whole by `convert`, in the engine's int8 layers and unpacked to floats, as
  plain transformers computes it, beside the original.
- `int4`: no facts, but tokens that the causal model of `bear` decodes one at a time as `compressknow.load` gives it,
  quantized whole by the scheme int4 in groups of 64, beside the original in float32 and in bfloat16; and the bytes
  of the int4 layers, with all that they hold, beside the same in float32.
- `bear`: BEAR's first template, and a causal model (examples/smollm2.py makes one). lm-pub-quiz has the batch size that
  is the fastest of `--their-batches` for it, with conditional scores and sums, as its authors recommend for BEAR.
- `grades`: atlas, and the causal model of `bear`, with the greedy text that grades of knowing need and without it.
- `masked`: the same as `bear` with a masked model and `answer_l2r+word_l2r`.
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

from convert import resident_mb

from compressknow.base.errors import CompressknowError
from compressknow.evaluate.runtimes import BATCH_SIZE

# Ratios of facts a second that compressknow is held to.
BOUNDS = {"paper": 30, "int4": 1.5, "bear": 5}
# Of the time without greedy text, what it may take with it.
GRADES_TIME = 1.6
# Of float32, what int4 layers may take.
INT4_BYTES = 0.2
# Sides of the part `int8`.
ENGINE, UNPACKED, ORIGINAL = "int8", "int8 in floats", "float32"
# Sides of the part `int4`; the original has two.
PACKED, HALF = "int4", "bfloat16"
# Sides of the part `grades`.
GRADED, UNGRADED = "with greedy text", "without"
BATCH_SIZES = (1, 8, 32, 128)
# Scores that differ by less are equal: two orders of summation.
ROUNDING = 1e-3
SHARED = Path(__file__).resolve().parents[2] / "shared"
SMOLLM2 = Path(__file__).resolve().parents[1] / "build" / "smollm2"

Answers = dict[str, Any]


def probe_of(part: str, options: Namespace) -> Any:
    from compressknow.evaluate.sources import Options, open_all

    if part in ("paper", "int8"):
        return open_all(["lama:trex"], Options(data=options.data, protocol="paper", limit=options.facts))[0]
    if part == "grades":
        return open_all(["atlas"], Options(limit=options.grades_facts))[0]
    return open_all(["bear"], Options(data=options.data, limit=options.bear_facts))[0]


def bert_base(options: Namespace) -> tuple[Any, Any]:
    """A BERT of bert-base's size with random weights, and a tokenizer."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.masked_model)
    return BertForMaskedLM(BertConfig(vocab_size=len(tokenizer))).eval(), tokenizer


def language_of(part: str, side: str, options: Namespace) -> tuple[Any, Any, str]:
    """Model, tokenizer and family that a side of a part asks."""
    from compressknow.engine import layers
    from compressknow.engine.language_model import load_language_model

    if part == "paper":
        return *bert_base(options), "masked"
    if part == "int8":
        if side == UNPACKED:
            layers.Int8Kind.runs_on = lambda *_: False
        language = load_language_model(options.checkpoints / (ORIGINAL if side == ORIGINAL else ENGINE))
    else:
        causal = part in ("bear", "grades")
        language = load_language_model(options.model if causal else options.masked_model, dtype="float32")
        # lm-pub-quiz begins each text so, whatever the tokenizer's own way is.
        language.tokenizer.add_bos_token = language.tokenizer.bos_token is not None
    return language.model, language.tokenizer, language.family


def decoding(side: str, options: Namespace) -> Callable[[int, int], Answers]:
    """The tokens that follow a text, each decoded by itself."""
    import torch

    from compressknow.engine.load import load, load_tokenizer

    folder = options.checkpoints / PACKED if side == PACKED else options.model
    model = load(folder, dtype=HALF if side == HALF else ORIGINAL)
    ids = torch.tensor([load_tokenizer(folder)("The capital of France is Paris, and").input_ids])

    def run(count: int, _: int) -> Answers:
        made = model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        return {str(place): token for place, token in enumerate(made[0, ids.shape[1] :].tolist())}

    return run


def some(facts: Sequence[Any], count: int) -> list[Any]:
    """`count` of the facts, evenly spread over them."""
    count = min(count, len(facts))
    return [facts[index * len(facts) // count] for index in range(count)]


def ours(
    part: str, language: tuple[Any, Any, str], options: Namespace, *, greedy: bool = True
) -> Callable[[int, int], Answers]:
    """Each fact's most likely token, and whether it is right; of BEAR the answer, the object's rank, the best score."""
    from compressknow.evaluate.evaluate import evaluate, make_prompts
    from compressknow.evaluate.scoring.families import make_scorer

    probe = probe_of(part, options)

    def run(count: int, batch_size: int) -> Answers:
        scorer: Any = make_scorer(*language, replace(probe, facts=tuple(some(probe.facts, count))))
        if not greedy:
            scorer.produce = lambda batch, *_: [""] * len(batch)
        answers = (answer for batch in evaluate(make_prompts(scorer, batch_size)) for answer in batch)
        if part in ("paper", "int8"):
            return {answer.fact_id: [int(answer.first_ids[0]), answer.correct] for answer in answers}
        return {answer.fact_id: [answer.predicted, answer.rank, answer.top5_logp[0]] for answer in answers}

    return run


def papers_loop(part: str, language: tuple[Any, Any, str], options: Namespace) -> Callable[[int, int], Answers]:
    """Each fact's most likely token, and whether its text is the object's."""
    import torch

    from compressknow.evaluate.facts import BLANK

    model, tokenizer, _ = language
    facts = probe_of(part, options).facts

    def encoded(texts: list[str], length: int) -> Any:
        return tokenizer(texts, truncation=True, padding="max_length", max_length=length, return_tensors="pt")

    def answered(batch: list[Any]) -> Iterator[tuple[str, list[Any]]]:
        sentences = encoded([fact.prompt.replace(BLANK, tokenizer.mask_token) for fact in batch], 512)
        labels = encoded([fact.obj_label for fact in batch], 8)["input_ids"]
        texts = [tokenizer.decode(label, skip_special_tokens=True) for label in labels]
        with torch.no_grad():
            logits = model(sentences["input_ids"], attention_mask=sentences["attention_mask"]).logits
        rows, places = torch.where(sentences["input_ids"] == tokenizer.mask_token_id)
        top = torch.topk(logits[rows, places, :], 5, dim=-1).indices
        outputs = [[tokenizer.decode(token).lower() for token in five] for five in top]
        for fact, text, five, ids in zip(batch, texts, outputs, top.tolist(), strict=True):
            yield fact.id, [ids[0], text == five[0]]

    def run(count: int, batch_size: int) -> Answers:
        batches = [some(facts, count)[start : start + batch_size] for start in range(0, count, batch_size)]
        return {name: answer for batch in batches for name, answer in answered(batch)}

    return run


def lm_pub_quiz(part: str, language: tuple[Any, Any, str], options: Namespace) -> Callable[[int, int], Answers]:
    """The object's place among each fact's labels, and their scores."""
    from lm_pub_quiz import Evaluator

    model, tokenizer, family = language
    kind = {"causal": {"model_type": "CLM", "ensure_bos_token_added": False}}
    masked = {"model_type": "MLM", "pll_metric": "answer_l2r+word_l2r"}
    evaluator = Evaluator.from_model(model, tokenizer=tokenizer, conditional_score=True, **kind.get(family, masked))
    facts = probe_of(part, options).facts
    relations = json.loads((options.data / "bear" / "metadata_relations.json").read_text(encoding="utf-8"))

    def run(count: int, batch_size: int) -> Answers:
        found = {}
        for fact in some(facts, count):
            about = relations[fact.relation]
            asked = {"template": about["templates"][0], "answers": about["answer_space_labels"]}
            asked |= {"subject": fact.sub_label, "reduction": "sum", "batch_size": batch_size}
            scores = evaluator.evaluate_instance(**asked)
            found[fact.id] = [list(fact.candidates), fact.candidates.index(fact.obj_label), scores]
        return found

    return run


SIDES: dict[str, Callable[..., Callable[[int, int], Answers]]] = {
    **dict.fromkeys(("compressknow", ENGINE, UNPACKED, ORIGINAL, GRADED), ours),
    UNGRADED: partial(ours, greedy=False),
    "the paper's loop": papers_loop,
    "lm-pub-quiz": lm_pub_quiz,
}


def child(options: Namespace) -> None:
    """Let one side answer, and print its seconds, peak memory and answers."""
    part, side, count, batch_size = *options.child[:2], *map(int, options.child[2:])
    run = decoding(side, options) if part == "int4" else SIDES[side](part, language_of(part, side, options), options)
    run(1, batch_size)
    # From here on the peak is that of answering, not of loading.
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = resident_mb("VmRSS")
    start = time.perf_counter()
    answers = run(count, batch_size)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak_mb": resident_mb("VmHWM") - before, "answers": answers}))


def measure(part: str, side: str, count: int, batch_size: int) -> dict[str, Any]:
    command = [sys.executable, *sys.argv, "--child", part, side, str(count), str(batch_size)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    result["speed"] = len(result["answers"]) / result["seconds"]
    return result


def compare(part: str, sides: dict[str, tuple[int, int]], rounds: int) -> dict[str, dict[str, Any]]:
    """What each side (name -> number of facts, batch size) does, side by side, and its last answers."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, (count, batch_size) in sides.items():
            runs[side].append(measure(part, side, count, batch_size))
    for side, (_, batch_size) in sides.items():
        speeds = sorted(run["speed"] for run in runs[side])
        asked, peak = len(runs[side][0]["answers"]), max(run["peak_mb"] for run in runs[side])
        unit = "tokens" if part == "int4" else "facts"
        line = f"{statistics.median(speeds):>9.2f} {unit}/s ({speeds[0]:.2f}-{speeds[-1]:.2f}){peak:>8.0f} MB"
        print(f"{side:<18}{line}  {asked} {unit}, batches of {batch_size}", flush=True)
    return {
        side: {"speed": statistics.median(run["speed"] for run in of_side), "answers": of_side[-1]["answers"]}
        for side, of_side in runs.items()
    }


def report_ratio(part: str, results: dict[str, dict[str, Any]]) -> None:
    mine, other = (results[side]["speed"] for side in results)
    bound = BOUNDS.get(part)
    verdict = f" (bound {bound}x: {'met' if mine >= bound * other else 'not met'})" if bound else ""
    print(f"{'ratio':<18}{mine / other:>8.1f}x{verdict}", flush=True)


def report_paper(options: Namespace) -> None:
    print("\nT-REx as the paper asks it, BERT of bert-base's size")
    count = options.paper_facts
    sides = {"compressknow": (options.facts, BATCH_SIZE), "the paper's loop": (count, min(count, 128))}
    results = compare("paper", sides, options.rounds)
    report_ratio("paper", results)
    mine, theirs = (results[side]["answers"] for side in sides)
    same = sum(mine[name] == answer for name, answer in theirs.items())
    tokens = len({token for token, _ in theirs.values()})
    right = sum(correct for _, correct in theirs.values())
    verdict = "met" if same == len(theirs) else "not met"
    print(f"{'same answer':<18}{same} of {len(theirs)} ({tokens} tokens, {right} right; bound: all, {verdict})")


def report_batches(options: Namespace) -> None:
    count = options.facts // 4
    print(f"\ncompressknow by batch size: T-REx, the same model, {count} facts, one run each")
    for size in BATCH_SIZES:
        run = measure("paper", "compressknow", count, size)
        print(f"{size:<18}{run['speed']:>9.2f} facts/s{run['peak_mb']:>8.0f} MB", flush=True)


def report_int8(options: Namespace) -> None:
    from compressknow import convert

    print("\nT-REx, BERT of bert-base's size, quantized whole by the scheme int8")
    with tempfile.TemporaryDirectory() as folder:
        for part in bert_base(options):
            part.save_pretrained(Path(folder) / ORIGINAL)
        convert(Path(folder) / ORIGINAL, Path(folder) / ENGINE, quantize="int8")
        sys.argv += ["--checkpoints", folder]
        results = compare(
            "int8", dict.fromkeys((ENGINE, UNPACKED, ORIGINAL), (options.facts, BATCH_SIZE)), options.rounds
        )
    for other in (UNPACKED, ORIGINAL):
        print(f"{'ratio':<18}{results[ENGINE]['speed'] / results[other]['speed']:>8.1f}x of {other}", flush=True)


def report_int4(options: Namespace) -> None:
    from compressknow import convert, load
    from compressknow.engine.layers import Int4Linear

    print(f"\nDecoding one token at a time, {options.model.name}, quantized whole by the scheme int4, groups of 64")
    with tempfile.TemporaryDirectory() as folder:
        convert(options.model, Path(folder) / PACKED, scope="overall", quantize="int4", group_size=64)
        layers = [layer for layer in load(Path(folder) / PACKED).modules() if isinstance(layer, Int4Linear)]
        sys.argv += ["--checkpoints", folder]
        results = compare("int4", dict.fromkeys((PACKED, ORIGINAL, HALF), (options.tokens, 1)), options.rounds)
    faster = max((ORIGINAL, HALF), key=lambda side: results[side]["speed"])
    report_ratio("int4", {side: results[side] for side in (PACKED, faster)})
    held = sum(tensor.nbytes for layer in layers for tensor in (*layer.parameters(), *layer.buffers()))
    share = held / sum(4 * layer.unlisted for layer in layers)
    verdict = "met" if share <= INT4_BYTES else "not met"
    print(f"{'weights':<18}{share:>8.3f}x of float32 ({held / 1e6:.0f} MB; bound {INT4_BYTES}x: {verdict})", flush=True)


def report_bear(part: str, options: Namespace) -> None:
    print(f"\nBEAR, {(options.model if part == 'bear' else options.masked_model).name}")
    count = options.bear_facts
    sizes = [int(size) for size in options.their_batches.split(",")]
    theirs = min(options.their_facts, count)
    trials = {size: measure(part, "lm-pub-quiz", max(theirs // 5, 1), size) for size in sizes}
    fastest = max(trials, key=lambda size: trials[size]["speed"])
    print("lm-pub-quiz by batch size: " + ", ".join(f"{size}: {run['speed']:.2f}" for size, run in trials.items()))
    sides = {"compressknow": (count, BATCH_SIZE), "lm-pub-quiz": (theirs, fastest)}
    results = compare(part, sides, options.rounds)
    report_ratio(part, results)
    mine, answers = (results[side]["answers"] for side in sides)
    same = [same_ranking(*mine[name], *answer) for name, answer in answers.items()]
    best, rank = sum(best for best, _ in same), sum(rank for _, rank in same)
    verdict = "met" if best == rank == len(same) else "not met"
    print(f"{'same ranking':<18}answer {best}, the object's rank {rank} of {len(same)} (bound: all, {verdict})")


def report_grades(options: Namespace) -> None:
    print(f"\natlas, {options.model.name}: grades of knowing")
    results = compare("grades", dict.fromkeys((GRADED, UNGRADED), (options.grades_facts, BATCH_SIZE)), options.rounds)
    ratio = results[UNGRADED]["speed"] / results[GRADED]["speed"]
    verdict = "met" if ratio <= GRADES_TIME else "not met"
    print(f"{'ratio':<18}{ratio:>8.2f}x the time (bound {GRADES_TIME}x: {verdict})", flush=True)


def same_ranking(predicted: str, rank: int, top: float, labels: list[str], gold: int, scores: list[float]) -> Any:
    """Whether the most likely answer and the object's rank are those of the scores; equal ones in any order."""
    same = scores[labels.index(predicted)] >= max(scores) - ROUNDING and abs(top - max(scores)) < ROUNDING
    above = sum(score > scores[gold] + ROUNDING for score in scores)
    return same, 1 + above <= rank <= sum(score >= scores[gold] - ROUNDING for score in scores)


def missing(part: str, options: Namespace) -> str | None:
    """Why a part cannot be measured here, or None."""
    from compressknow.engine.layers import Int4Kind

    if part in options.skip.split(","):
        return "skipped by --skip"
    if part in ("bear", "masked") and not importlib.util.find_spec("lm_pub_quiz"):
        return "lm-pub-quiz is not installed (pip install lm-pub-quiz)"
    folder = options.model if part in ("bear", "int4", "grades") else options.masked_model
    if not (folder / "tokenizer.json").is_file():
        return f"there is no model in {folder}"
    if part == "int4":
        return None if Int4Kind().runs_on("cpu") else "this CPU has no fast kernel for int4"
    try:
        probe_of("bear" if part in ("bear", "masked") else part if part == "grades" else "paper", options)
    except CompressknowError as error:
        return str(error)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED / "data", help="the folder that holds lama/ and bear/")
    parser.add_argument("--model", type=Path, default=SMOLLM2, help="the causal model")
    parser.add_argument("--masked-model", type=Path, default=SHARED / "models" / "minilm-facts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--facts", type=int, default=1000, help="facts of T-REx for compressknow")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to decode")
    parser.add_argument("--paper-facts", type=int, default=32, help="those of them for the paper's loop")
    parser.add_argument("--bear-facts", type=int, default=500, help="facts of BEAR for compressknow")
    parser.add_argument("--their-facts", type=int, default=40, help="those of them for lm-pub-quiz")
    parser.add_argument("--grades-facts", type=int, default=300, help="facts of atlas for grades")
    parser.add_argument("--their-batches", default="16,32,64")
    parser.add_argument("--skip", default="")
    parser.add_argument("--checkpoints", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    for part in ("paper", "batches", "int8", "int4", "bear", "masked", "grades"):
        if reason := missing(part, options):
            print(f"\n{part}: not measured: {reason}", flush=True)
        elif part == "paper":
            report_paper(options)
        elif part == "batches":
            report_batches(options)
        elif part == "int8":
            report_int8(options)
        elif part == "int4":
            report_int4(options)
        elif part == "grades":
            report_grades(options)
        else:
            report_bear(part, options)


if __name__ == "__main__":
    main()
