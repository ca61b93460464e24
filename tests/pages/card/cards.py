"""Report cards made by hand: of one compressed model, of several, and of one with hardly any figures."""

from __future__ import annotations

import math
from dataclasses import replace

from compressknow.comparison.records import (
    Certainty,
    ChangedFact,
    Confidence,
    Counts,
    Estimate,
    GradeCounts,
    Group,
    KlFigures,
    ProbeFigures,
    ReliabilityBin,
    Tertile,
)
from compressknow.evaluate.answers import GRADES
from compressknow.evaluate.records import ModelRecord, NoiseFloor, Speed
from compressknow.pages.records import Card, Comparison, Grade

# Relation, domain, and the counts of its facts.
ATLAS = (
    ("capital", "geography", Counts(118, 14, 3, 40)),
    ("continent", "geography", Counts(131, 3, 1, 18)),
    ("currency", "geography", Counts(62, 9, 2, 71)),
    ("us_city_state", "geography", Counts(70, 6, 0, 15)),
    ("official_language", "language", Counts(77, 4, 2, 32)),
    ("translation", "language", Counts(58, 8, 3, 51)),
    ("element_symbol", "science", Counts(88, 2, 0, 13)),
    ("atomic_number", "science", Counts(31, 6, 2, 25)),
    ("inventor", "history and people", Counts(27, 3, 1, 44)),
    ("author", "arts and literature", Counts(41, 5, 0, 66)),
    ("used_for", "common sense", Counts(0, 0, 1, 12)),
)
CONCEPTNET = (
    ("AtLocation", "common sense", Counts(61, 18, 6, 240)),
    ("CapableOf", "common sense", Counts(44, 11, 4, 161)),
    ("HasProperty", "common sense", Counts(39, 11, 5, 130)),
)
POPULARITY = (
    ("top 20 %", Counts(186, 4, 1, 28)),
    ("20 to 40 %", Counts(170, 8, 2, 39)),
    ("40 to 60 %", Counts(147, 11, 3, 58)),
    ("60 to 80 %", Counts(119, 16, 3, 81)),
    ("bottom 20 %", Counts(81, 21, 6, 111)),
)
LOST = (
    ("capital", "The capital of Chad is [MASK].", "N'Djamena", "Abuja", 1, 4),
    ("capital", "The capital of Tuvalu is [MASK].", "Funafuti", "Suva", 1, 2),
    ("capital", "The capital of Slovenia is [MASK].", "Ljubljana", "Zagreb", 1, 3),
    ("currency", "The currency of Mongolia is the [MASK].", "tugrik", "yuan", 1, 17),
    ("currency", "The currency of Malawi is the [MASK].", "kwacha", "shilling", 1, 2),
    ("us_city_state", "The American city of Laramie is in the state of [MASK].", "Wyoming", "Colorado", 1, 2),
    ("official_language", "The official language of Angola is [MASK].", "Portuguese", "French", 1, 2),
    ("translation", "The French word for bread is [MASK].", "pain", "le", 1, 6),
    ("atomic_number", "The atomic number of tin is [MASK].", "50", "48", 1, 5),
    ("inventor", "The telescope was improved for astronomy by [MASK].", "Galileo", "Newton", 1, 2),
    ("author", "The Divine Comedy was written by [MASK].", "Dante", "Boccaccio", 1, 2),
)
GAINED = (
    ("capital", "The capital of Myanmar is [MASK].", "Naypyidaw", "Yangon", 2, 1),
    ("translation", "The Hebrew word for peace is [MASK].", "שלום", "salaam", 3, 1),
    ("continent", "On a map of the world, Guyana is in [MASK].", "South America", "Africa", 2, 1),
)
THRESHOLDS = ((0.99, "A+"), (0.97, "A"), (0.93, "B"), (0.85, "C"), (0.70, "D"))
METHOD = (
    "Each fact was asked as a sentence with a blank; the answer is the candidate that the model finds most likely.",
    "Knowledge kept counts only facts that the original answered right; the intervals are Wilson's, at 95 %.",
    "What a model answers to one sentence is not all that it knows: another wording may bring out more.",
)


def compute_wilson(part: int, whole: int) -> Estimate:
    if not whole:
        return Estimate(None)
    z, share = 1.959964, part / whole
    middle = (share + z * z / (2 * whole)) / (1 + z * z / whole)
    half = z * math.sqrt(share * (1 - share) / whole + z * z / (4 * whole * whole)) / (1 + z * z / whole)
    return Estimate(share, max(0.0, min(middle - half, share)), min(1.0, max(middle + half, share)))


def sum_counts(groups: tuple[tuple[str, str, Counts], ...]) -> Counts:
    return sum((counts for _, _, counts in groups), Counts())


def estimate_kept(counts: Counts) -> Estimate:
    return compute_wilson(counts.both, counts.known_before)


def make_group(name: str, counts: Counts) -> Group:
    changed = (counts.lost + counts.gained + counts.neither // 5) / counts.n if counts.n else None
    p = min(1.0, 2.0 ** -(counts.lost - counts.gained)) if counts.lost > counts.gained else 1.0
    return Group(name, counts, (counts,), estimate_kept(counts), p, min(1.0, 3 * p), changed, chance=0.01)


def find_grade(share: float | None) -> str:
    return "-" if share is None else next((name for least, name in THRESHOLDS if share >= least), "F")


def make_grade(subject: str, counts: Counts) -> Grade:
    estimate = estimate_kept(counts)
    low, high = find_grade(estimate.low), find_grade(estimate.high)
    return Grade(subject, (counts,), estimate, find_grade(estimate.value), f"{high} to {low}" if low != high else None)


def sum_by_domain(groups: tuple[tuple[str, str, Counts], ...]) -> dict[str, Counts]:
    subjects: dict[str, Counts] = {}
    for _, subject, counts in groups:
        subjects[subject] = subjects.get(subject, Counts()) + counts
    return subjects


def make_probe(name: str, groups: tuple[tuple[str, str, Counts], ...], *, popular: bool) -> ProbeFigures:
    counts = sum_counts(groups)
    before, after = compute_wilson(counts.known_before, counts.n), compute_wilson(counts.known_after, counts.n)
    assert before.value is not None
    assert after.value is not None
    change = after.value - before.value
    return ProbeFigures(
        probe=name,
        protocol="closed, version 1" if popular else "lama, version 1",
        average="micro" if popular else "macro",
        counts=counts,
        accuracy_original=before,
        accuracy_compressed=after,
        difference=Estimate(change, change - 0.011, change + 0.012),
        kept=estimate_kept(counts),
        kept_above_chance=Estimate(0.934, 0.917, 0.949) if popular else Estimate(None),
        macro_original=Estimate(0.587, 0.561, 0.613),
        macro_compressed=Estimate(0.544, 0.518, 0.571),
        macro_difference=Estimate(-0.043, -0.058, -0.029),
        answer_changed=0.1284,
        movement=KlFigures(counts.n, 0.0831, 0.0204, 0.912, 4.377, (0.1204, 0.1337)),
        logp_change={"p1": -3.91, "p5": -1.72, "p25": -0.31, "p50": -0.04, "p75": 0.08, "p95": 0.61, "p99": 1.33},
        mrr=(0.671, 0.639),
        p_at_5=(0.8312, 0.8107),
        lost_still_in_top5=counts.lost * 4 // 5,
        chance=0.0213 if popular else None,
        majority=0.0817,
        drop_absolute=-change,
        drop_relative=-change / before.value,
        by_relation=tuple(make_group(relation, counts) for relation, _, counts in groups),
        by_subject=tuple(make_group(subject, counts) for subject, counts in sum_by_domain(groups).items()),
        by_popularity=tuple(make_group(name, counts) for name, counts in POPULARITY) if popular else (),
        facts_read=counts.n + (14 if popular else 103),
        dropped={"the object is not one token of the model": 95, "the object stands in the prompt": 8}
        if not popular
        else {"the object stands in the prompt": 14},
        limit=None,
        seed=0,
        certainty=make_certainty(estimate_kept(counts), len(groups)),
        confidence=make_confidence(counts) if popular else None,
        knowing=make_grade_counts(counts) if popular else None,
        noise_floor=NoiseFloor(300, 14, 212, 3, 2, 0.00071, "float32"),
    )


def make_confidence(counts: Counts) -> Confidence:
    """Return the figures of an overconfident model; two bins are empty, and one has few answers."""
    known, lost = counts.known_before // 3, counts.lost
    parts = [Counts(max(0, known - each), min(known, each)) for each in (lost // 6, lost // 3, lost // 2)]
    names = ("most confident third", "middle third", "least confident third")
    ends = ((0.62, 0.99), (0.31, 0.61), (0.02, 0.31))
    bins = [
        (41, 0.05),
        (60, 0.1),
        (0, None),
        (88, 0.24),
        (7, 0.31),
        (0, None),
        *((55, i / 15 - 0.03) for i in range(7, 16)),
    ]
    sides = [
        tuple(ReliabilityBin(facts, round(facts * less * (at or 0)), at) for facts, at in bins) for less in (0.97, 0.8)
    ]
    rows = zip(names, ends, parts, strict=True)
    thirds = (Tertile(name, *end, part, estimate_kept(part)) for name, end, part in rows)
    wrong = counts.n - counts.known_before, counts.n - counts.known_after
    return Confidence(tuple(thirds), 0.44, *wrong, 61, 97, *sides, ece=(0.0413, 0.0677), brier=(0.1522, 0.1689))


def make_certainty(kept: Estimate, relations: int) -> Certainty:
    if kept.value is None or relations < 5:
        return Certainty(0.0031, "relation", relations, kept, Estimate(-0.04), 0.0421, 1844)
    kept, difference = Estimate(kept.value, 0.871, 0.956), Estimate(-0.04, -0.071, -0.012)
    return Certainty(2.3e-7, "relation", relations, kept, difference, 0.0312, 1713)


def make_grade_counts(counts: Counts) -> GradeCounts:
    """Return counts in which most known facts are produced, and half of the lost ones are demoted."""
    near = counts.lost // 2
    moved = dict.fromkeys(((before, after) for before in GRADES for after in GRADES), 0)
    moved |= {
        ("produced", "produced"): counts.both * 3 // 4,
        ("produced", "recognized"): counts.both // 8,
        ("recognized", "recognized"): counts.both - counts.both * 3 // 4 - counts.both // 8,
        ("produced", "demoted"): near,
        ("recognized", "gone"): counts.lost - near,
        ("demoted", "recognized"): counts.gained,
        ("gone", "gone"): counts.neither,
    }
    original, compressed = (
        {grade: sum(facts for move, facts in moved.items() if move[side] == grade) for grade in GRADES}
        for side in (0, 1)
    )
    return GradeCounts(original, compressed, moved, (True, True), counts.lost, near // 2)


def make_changed_facts(
    rows: tuple[tuple[str, str, str, str, int, int], ...], number: int, *, lost: bool
) -> tuple[ChangedFact, ...]:
    """Return `number` changed facts: the rows, and then numbered variants of them."""
    changed = []
    for i in range(number):
        relation, prompt, gold, other, before, after = rows[i % len(rows)]
        if i >= len(rows):
            prompt = prompt.replace("The ", f"{i}. The ", 1)
        predicted = (gold, other) if lost else (other, gold)
        fact = ChangedFact("atlas", relation, "geography", prompt, gold, *predicted, before, after)
        grades = ("produced", "demoted" if after <= 5 else "gone") if lost else ("demoted", "recognized")
        with_example = i % 4 == 0 and after <= 5 if lost else None
        changed.append(replace(fact, grade_before=grades[0], grade_after=grades[1], with_example=with_example))
    return tuple(changed)


def make_layer_group(parameters: int, pruned: int = 0, quantized: int = 0, error: float = 0.0) -> dict[str, float]:
    return {
        "parameters": parameters,
        "zeros_after": pruned,
        "pruned": pruned,
        "quantized": quantized,
        "relative_error": error,
    }


def make_original() -> ModelRecord:
    return ModelRecord(
        name="HuggingFaceTB/SmolLM2-135M",
        revision="93efa2f097d58c2a74874c7e644dbc9b0cee75a2",
        sha256="5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c",
        architecture="LlamaForCausalLM",
        family="causal",
        parameters=134_515_008,
        bytes=269_030_016,
        dtype="bfloat16",
        zeros=42,
        groups={},
        speed=Speed("cpu, 2 threads", 31.62, 1_104_000_000, computed_in="bfloat16"),
    )


def make_compressed(setup: str = "Att_GPQ 20%", size: int = 242_600_000) -> ModelRecord:
    return replace(
        make_original(),
        name="smollm2-" + setup.lower().replace(" ", "-").replace("%", ""),
        revision=None,
        sha256="c3ab8ff13720e8ad9047dd39466b3c8974e592c2fa383d4a3960714caef0c4f2",
        bytes=size,
        dtype="bfloat16, int8",
        setup=setup,
        quantization="int8 weights per output channel, int8 activations per token",
        recipe={
            "module_map": "structural",
            "steps": [
                {"prune": 0.2, "method": "l1-unstructured", "scope": ["attention"]},
                {"quantize": "int8", "scope": ["attention"]},
            ],
        },
        source={"name": "HuggingFaceTB/SmolLM2-135M", "revision": "93efa2f097d58c2a74874c7e644dbc9b0cee75a2"},
        zeros=5_649_000,
        groups={
            "attention": make_layer_group(26_542_080, 5_308_416, 26_542_080, 0.0912),
            "feed-forward": make_layer_group(79_626_240),
            "not-linear": make_layer_group(28_346_688),
        },
        speed=Speed("cpu, 2 threads", 33.07, 1_061_000_000, computed_in="bfloat16"),
    )


def make_pruned(setup: str, size: int) -> ModelRecord:
    both = make_compressed(setup, size)
    assert both.recipe is not None
    return replace(both, quantization=None, recipe={**both.recipe, "steps": both.recipe["steps"][:1]})


def lose_share(groups: tuple[tuple[str, str, Counts], ...], loss: float) -> tuple[tuple[str, str, Counts], ...]:
    """Return the same facts, of which a share `loss` of the known ones is lost."""
    changed = []
    for relation, subject, counts in groups:
        lost = round(counts.known_before * loss)
        changed.append((relation, subject, replace(counts, both=counts.known_before - lost, lost=lost)))
    return tuple(changed)


def make_comparison(
    model: ModelRecord, probes: dict[str, tuple[tuple[str, str, Counts], ...]], *, lost: int, gained: int
) -> Comparison:
    counts = sum((sum_counts(groups) for groups in probes.values()), Counts())
    estimate = estimate_kept(counts)
    assert estimate.value is not None
    groups_of_all = tuple(row for groups in probes.values() for row in groups)
    return Comparison(
        model=model,
        verdict=f"{model.setup} still knows {counts.both:,} of the {counts.known_before:,} facts that the original "
        f"knows ({100 * estimate.value:.1f} %), in {model.bytes / 1e6:.1f} MB instead of 269.0 MB.",
        kept=estimate,
        counts=counts,
        grades=tuple(make_grade(subject, counts) for subject, counts in sum_by_domain(groups_of_all).items()),
        probes=tuple(make_probe(name, groups, popular=name == "atlas") for name, groups in probes.items()),
        lost=make_changed_facts(LOST, lost, lost=True),
        gained=make_changed_facts(GAINED, gained, lost=False),
        certainty=make_certainty(estimate, len(groups_of_all)),
        next="Next: evaluate more facts: about 900 that the original knows would tell whether 95 % is kept.",
        warnings=("Common sense: the original knows too little of it for a grade that means much.",),
    )


def make_card(*comparisons: Comparison, verdict: str | None = None) -> Card:
    return Card(
        verdict=verdict or comparisons[0].verdict,
        original=make_original(),
        comparisons=comparisons,
        warnings=(),
        show_facts=True,
        versions={"compressknow": "0.1.0", "torch": "2.9.0", "transformers": "5.24.0"},
        command="compressknow report HuggingFaceTB/SmolLM2-135M smollm2-att_gpq-20 -p atlas -p lama:conceptnet "
        "-o report.html -o report.md -o report.json",
        method=METHOD,
    )


def make_card_of_one(*, lost: int = 100, gained: int = 35) -> Card:
    """Return a card of one compressed model and two probes."""
    probes = {"atlas": ATLAS, "lama:conceptnet": CONCEPTNET}
    return make_card(make_comparison(make_compressed(), probes, lost=lost, gained=gained))


def make_card_of_several(amounts: tuple[int, ...] = (10, 20, 40, 60)) -> Card:
    """Return a card of three scopes pruned by each amount, the same quantized too, and each only quantized."""
    losses = {"Att": 1.0, "FF": 1.4, "All": 2.2}
    models = []
    for scope, factor in losses.items():
        for kind, extra in (("GP", 0.0), ("GPQ", 0.02)):
            for amount in amounts:
                loss = min(0.99, factor * (amount / 100) ** 2.2 + extra)
                models.append((f"{scope}_{kind} {amount}%", loss, 269_030_016 - (kind == "GPQ") * 40_000_000))
        models.append((f"{scope}_GQ", 0.02 * factor, 229_030_016))
    comparisons = [
        make_comparison(
            _vary_deployment(make_pruned(setup, size) if "_GP " in setup else make_compressed(setup, size)),
            {"atlas": lose_share(ATLAS, loss), "lama:conceptnet": lose_share(CONCEPTNET, loss)},
            lost=100,
            gained=35,
        )
        for setup, loss, size in models
    ]
    verdict = "Pruning attention by 10 % costs least (0.6 % of the facts are lost), pruning everything by 60 % most."
    return make_card(*comparisons, verdict=verdict)


def _vary_deployment(model: ModelRecord) -> ModelRecord:
    """Give the models that were only quantized different sizes and speeds, and run one in llama.cpp."""
    if model.setup not in ("Att_GQ", "FF_GQ", "All_GQ"):
        return model
    index = ("Att_GQ", "FF_GQ", "All_GQ").index(model.setup)
    runtime = {"name": "llama.cpp", "build": "b1", "types": {}} if model.setup == "FF_GQ" else None
    computed_in = "llama.cpp b1" if runtime else "bfloat16"
    speed = Speed("cpu, 2 threads", 10.0 + index, 400_000_000, 25.0 + 15 * index, computed_in)
    return replace(model, bytes=int(model.bytes or 0) - 20_000_000 * index, runtime=runtime, speed=speed)


def make_card_of_nothing() -> Card:
    """Return a card of an original that knew nothing: every figure that may be None is None."""
    none = Estimate(None)
    card = make_card_of_one(lost=0, gained=0)
    figures = replace(
        card.comparisons[0].probes[0],
        counts=Counts(neither=3),
        accuracy_original=Estimate(0.0),
        accuracy_compressed=Estimate(0.0),
        difference=none,
        kept=none,
        kept_above_chance=none,
        macro_original=none,
        macro_compressed=none,
        macro_difference=none,
        answer_changed=None,
        movement=None,
        logp_change=None,
        mrr=None,
        p_at_5=None,
        lost_still_in_top5=None,
        chance=None,
        majority=None,
        noise_floor=None,
        drop_absolute=None,
        drop_relative=None,
        by_relation=(Group("capital", Counts(neither=3), (), none, None, None, None),),
        by_subject=(),
        by_popularity=(),
        dropped={},
    )
    bare = make_compressed()
    bare = replace(bare, revision=None, setup=None, quantization=None, recipe=None, source=None, zeros=None)
    empty = replace(
        card.comparisons[0],
        model=replace(bare, groups={}, speed=None),
        verdict="The original knew none of the 3 facts: nothing can be said of what was lost.",
        kept=none,
        counts=Counts(neither=3),
        grades=(Grade("geography", (Counts(neither=3),), none, "-"),),
        probes=(figures,),
        warnings=(),
    )
    source = replace(make_original(), revision=None, speed=None, zeros=None)
    return replace(card, verdict=empty.verdict, original=source, comparisons=(empty,), command=None, versions={})
