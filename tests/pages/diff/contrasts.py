"""Comparisons of two checkpoints, made by hand from records."""

from __future__ import annotations

from dataclasses import replace

from compressknow.comparison.diff import CheckpointDiff, ConfigChange, DiffSums, StructureChange, TensorDiff
from compressknow.evaluate.records import ModelRecord
from compressknow.pages.diff.make import CheckpointComparison, make_behaviour, write_verdict
from tests.pages.answering import COMPRESSED_HASH, ORIGINAL_HASH, make_rows, make_runs

MODULES = ("SelfAttention.q", "SelfAttention.v", "DenseReluDense.wi")


def make_tensor(
    stack: str | None, layer: int | None, module: str, error: float, group: str = "attention"
) -> TensorDiff:
    """Return the diff of 1,000 weights of energy 100 whose change has this relative error."""
    return TensorDiff(
        name=f"{stack}.block.{layer}.{module}.weight",
        group=group,
        stack=stack,
        layer=layer,
        module=module if layer is not None else None,
        shape=(10, 100),
        dtype_a="F32",
        dtype_b="I8",
        bytes_a=4000,
        bytes_b=1040,
        same_bytes=not error,
        sums=DiffSums(1000, 0, 200, 100.0, 90.0, 100.0 * error**2, error),
    )


def make_diff(layers: int = 3) -> CheckpointDiff:
    tensors = [
        make_tensor(stack, layer, module, 0.0 if module == MODULES[2] else 0.01 * 2 ** (layer + len(stack) // 2 * i))
        for stack in ("encoder", "decoder")
        for layer in range(layers)
        for i, module in enumerate(MODULES)
    ]
    tensors.append(make_tensor(None, None, "shared", 0.0, "not-linear"))
    return CheckpointDiff(
        "T5ForConditionalGeneration",
        (ConfigChange("d_ff", "48", None), ConfigChange("rope.theta", '"x"', "5")),
        (
            StructureChange("a.weight", "retyped", "F32 [2, 2]", "I8 [2, 2]"),
            StructureChange("b.weight", "retyped", "F32 [2, 3]", "I8 [2, 3]"),
            StructureChange("c.weight", "added", "-", "F32 [7]"),
            StructureChange("d.weight", "packed", "F32 [7]", "qweight I32"),
        ),
        tuple(tensors),
    )


def make_comparison(*, facts: bool = True, show_facts: bool = True, layers: int = 3) -> CheckpointComparison:
    a = ModelRecord(name="tiny-t5", revision="main", sha256=ORIGINAL_HASH, bytes=4_000_000, dtype="F32")
    b = ModelRecord(
        name="tiny-t5-int8",
        sha256=COMPRESSED_HASH,
        bytes=1_100_000,
        dtype="I8 + F32",
        quantization="int8",
        setup="Overall_GQ",
        source={"name": "tiny-t5"},
    )
    before, after = make_runs(make_rows(140, 30, 2, 60))
    behaviour = make_behaviour((before, after), (after, before), show_facts=show_facts) if facts else None
    difference = make_diff(layers)
    return CheckpointComparison(
        verdict=write_verdict((a.name, b.name), False, difference, behaviour),
        a=a,
        b=b,
        identical=False,
        files={"chat_template.jinja": (True, False), "tokenizer.json": (True, True)},
        difference=difference,
        behaviour=behaviour,
        warnings=("1 weight is packed.",),
        show_facts=show_facts,
        versions={"compressknow": "0.1.0"},
        command="compressknow compare a b",
    )


def make_identical_comparison() -> CheckpointComparison:
    """Return the comparison of a checkpoint with itself."""
    comparison = make_comparison(facts=False)
    verdict = write_verdict((comparison.a.name, comparison.b.name), True, None, None)
    return replace(comparison, identical=True, difference=None, files={}, warnings=(), verdict=verdict)
