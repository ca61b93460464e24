"""convert: a checkpoint in, a compressed checkpoint and its manifest out."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from compressknow.base.errors import CheckpointError, CompressknowError, UnsupportedError
from compressknow.base.libraries import require
from compressknow.base.progress import Advance, Begin, count_progress, ignore_progress
from compressknow.base.reading import sha256_of
from compressknow.compress.blocks import Reader
from compressknow.compress.layout import Layout, lay_out
from compressknow.compress.manifest import Manifest, build_manifest, serialize
from compressknow.compress.plan import Plan, PlannedTensor, make_plan
from compressknow.compress.pool import Pool
from compressknow.compress.process import Measured, OutputFiles, Work, hash_file
from compressknow.compress.proof import planned_headers, prove, prove_written
from compressknow.compress.pruning import Mask, choose, pruned_count
from compressknow.compress.recipe import Recipe
from compressknow.compress.removal.smaller import Removal, remove
from compressknow.compress.sources import quantization_config
from compressknow.compress.staging import Staging, clean, refuse_output
from compressknow.compress.steps import Prune, Quantize
from compressknow.model.checkpoint import (
    SAFETENSORS_INDEX,
    TORCH_INDEX,
    Checkpoint,
    build_loading_settings,
    check_inside,
    module_folders,
)
from compressknow.model.groups import structure_of
from compressknow.model.loading import open_complete
from compressknow.model.manifest import CARD_NAME, MANIFEST_NAME, seal_manifest
from compressknow.model.tensors import OpenFiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compressknow.compress.calibrate.compression import Calibrated
    from compressknow.compress.calibrate.text import CalibrationText

# Weights in any form, and what only training needs: not carried along.
WEIGHT_SUFFIXES = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".gguf", ".onnx", ".onnx_data"),
    *(".tflite", ".mlmodel", ".npz", ".pkl", ".pickle"),
}
# What depends on the weights that were converted: written anew.
REPLACED = {"config.json", CARD_NAME, MANIFEST_NAME, SAFETENSORS_INDEX, TORCH_INDEX}


class Conversion(NamedTuple):
    """What is to be done: a plan whose output is proved to load, and the checkpoint's module tree."""

    plan: Plan
    tree: PreTrainedModel


def prepare(
    model: str | Path, recipe: Recipe, *, revision: str | None = None, trust_remote_code: bool = False
) -> Conversion:
    """Open a checkpoint and plan a recipe on it, from its headers alone. Raises what `remove`, `make_plan` and `prove`
    do."""
    plan, tree = planned(*open_complete(model, revision, trust_remote_code=trust_remote_code), recipe)
    return Conversion(proved(plan, tree), tree)


def proved(plan: Plan, tree: PreTrainedModel) -> Plan:
    """The plan of an output that transformers loads.

    Some families (T5) initialize layers by their weight, which packed layers do not have. Transformers unpacks these
    while it loads them, if their config says so: by the scheme of all weights, and without rounding activations.

    Raises UnsupportedError where it loads neither form.
    """
    headers = planned_headers(plan.tensors)
    try:
        prove(plan.checkpoint, tree, output_config(plan), headers)
    except UnsupportedError:
        if len(plan.targets) != 1 or any(scheme.rounds for scheme in plan.targets):
            raise
        plan = replace(plan, unpacked=True)
        prove(plan.checkpoint, tree, output_config(plan), headers)
    return plan


def text_for(
    conversion: Conversion, *, trust_remote_code: bool = False, advance: Advance | None = None
) -> CalibrationText | None:
    """What a recipe is calibrated on; None where no step looks at activations. Raises what `calibration_text` does, and
    UnsupportedError where nothing can be smoothed that is to be.

    `advance` is told the tokens that the model has written, and in all, where it writes the text itself.
    """
    plan = conversion.plan
    if (calibration := plan.recipe.calibration) is None:
        return None
    # What is smaller writes worse, and its text would depend on what is to be chosen by it.
    tree = plan.removal.given[1] if plan.removal else conversion.tree
    from compressknow.compress.calibrate.text import calibration_text
    from compressknow.compress.calibrate.trial import refuse_unsmoothable

    refuse_unsmoothable(plan, conversion.tree)
    return calibration_text(
        plan.checkpoint.folder,
        tree,
        **asdict(calibration),
        trust_remote_code=trust_remote_code,
        advance=advance,
    )


def planned(checkpoint: Checkpoint, tree: PreTrainedModel, recipe: Recipe) -> Conversion:
    """What a recipe does to a checkpoint, of whose smaller form the plan is if the recipe drops anything."""
    return planned_on(remove(checkpoint, tree, recipe), recipe)


def planned_on(removal: Removal, recipe: Recipe) -> Conversion:
    """The rest of a recipe, on what its removal steps have left."""
    structure = structure_of(removal.tree, recipe.module_map)
    plan = make_plan(removal.checkpoint, removal.tree, structure, recipe)
    return Conversion(replace(plan, removal=removal) if removal else plan, removal.tree)


def decided(
    conversion: Conversion, text: CalibrationText | None, reader: Reader, folder: Path, begin: Begin = ignore_progress
) -> Conversion:
    """The conversion once the text has said which blocks and neurons go, of what it did not say before.

    Parameters
    ----------
    folder : where tensors that were cut lie, until the conversion is written.

    Raises what `decide` does.
    """
    plan = conversion.plan
    if plan.removal is None or plan.removal.decided:
        return conversion
    from compressknow.compress.removal.calibrated import decide

    assert text is not None
    with begin("choose") as advance:
        removal = decide(plan.removal, plan.recipe, text.batches, reader, folder, on_progress=advance or max)
    smaller, tree = planned_on(removal, plan.recipe)
    return Conversion(proved(smaller, tree), tree)


def convert(
    model: str | Path,
    output: str | Path,
    recipe: Recipe,
    *,
    overwrite: bool = False,
    text: CalibrationText | None = None,
    threads: int | None = None,
    render_card: Callable[[Mapping[str, Any], Path], str] | None = None,
) -> Manifest:
    """Prune and quantize a checkpoint into a new folder: `refuse_output`, `prepare`, `write`.

    Parameters
    ----------
    text : what a recipe that looks at activations is calibrated on; by default that which it says.

    Raises
    ------
    UsageError, CheckpointError, UnsupportedError : see `make_plan`; a weight in scope is NaN or infinite.
    OutputError : the output exists, overlaps the input, or cannot be written.
    """
    clean(Path(output))
    refuse_output(Path(output), overwrite=overwrite, source=Path(model))
    conversion = prepare(model, recipe)
    text = text or text_for(conversion)
    return write(conversion, output, text=text, overwrite=overwrite, threads=threads, render_card=render_card)


def write(
    conversion: Conversion,
    output: str | Path,
    *,
    overwrite: bool = False,
    text: CalibrationText | None = None,
    threads: int | None = None,
    begin: Begin = ignore_progress,
    render_card: Callable[[Mapping[str, Any], Path], str] | None = None,
) -> Manifest:
    """Carry a conversion out.

    Tensors stream through blocks of a fixed size: memory depends neither on the model nor on its largest tensor.
    The output appears whole, by one rename at the end, or not at all.

    Parameters
    ----------
    output : a folder that does not exist, or one that convert wrote, with `overwrite`.
    text : what the model runs over; wanted where a step of the recipe looks at activations.
    threads : tensors worked on at a time, by default one a core. The output's bytes do not depend on it.
    begin : begins the stages: ``choose``, where the text says what is dropped, then ``calibrate``, where a step that
        prunes or quantizes looks at activations, or else ``convert``.
    render_card : the model card's text for a manifest and the source folder; no card is written without it.

    Returns
    -------
    The manifest, as `compressknow.json` in the output holds it.

    Raises
    ------
    CheckpointError : a weight in scope is NaN or infinite; a file of the checkpoint changed since it was opened.
    OutputError : the output cannot be written.
    """
    checkpoint = conversion.plan.checkpoint
    source = checkpoint.folder
    carried = list(carried_files(source))
    with Staging(Path(output), overwrite=overwrite, source=source) as staging:
        with _scratch(conversion.plan, staging) as scratch, OpenFiles() as opened:
            with Pool(threads) as pool:
                conversion = decided(conversion, text, Reader(pool, opened, lambda _: None), scratch, begin)
            plan, tree = conversion
            layout = lay_out(plan.tensors, plan.checkpoint.shards)
            with begin("calibrate" if _is_calibrated(plan) else "convert") as advance:
                weights = _write_weights(conversion, layout, staging, text, threads, advance)
        files = _written_files(plan, layout)
        written = {name: staging.write(name, content) for name, content in files.items()}
        prove_written(plan.checkpoint, tree, staging.folder)
        copied = {name: staging.copy(source / name, name) for name in carried if name not in written}
        manifest = _manifest(plan, weights, written, copied, text)
        staging.write(MANIFEST_NAME, serialize(manifest))
        if render_card:
            staging.write(CARD_NAME, render_card(manifest, source).encode("utf-8", "backslashreplace"))
        checkpoint.check_unchanged()
        staging.commit()
    return manifest


@contextmanager
def _scratch(plan: Plan, staging: Staging) -> Iterator[Path]:
    """A folder for tensors that are cut, in that of the output: a run that dies leaves none behind."""
    if plan.removal is None or plan.removal.decided:
        yield staging.folder
        return
    with TemporaryDirectory(dir=staging.folder, prefix=".cut-") as folder:
        yield Path(folder)


class Weights(NamedTuple):
    """What is known once the weights are written: SHA-256 of the files read, by name; what was measured, by tensor."""

    hashes: dict[str, str]
    measured: dict[str, Measured]
    calibrated: Calibrated | None


def _write_weights(
    conversion: Conversion,
    layout: Layout,
    staging: Staging,
    text: CalibrationText | None,
    threads: int | None,
    advance: Advance | None,
) -> Weights:
    """The weight files: what to prune is chosen, then all tensors are pruned, quantized and written."""
    plan = conversion.plan
    with Pool(threads) as pool, OpenFiles() as files:
        outputs = OutputFiles(staging.folder, layout)
        staging.expect(layout.sizes)
        try:
            on_progress = None if _is_calibrated(plan) else advance
            work = Work(pool, files, count_progress(on_progress, _bytes_to_read(plan)), outputs, plan.unfitted)
            masks = choose_masks(work, plan)
            calibrated = compress_blocks(conversion, work, masks, text, staging.folder, advance)
            hashes, measured = _write_tensors(work, plan, masks, calibrated.measured if calibrated else {})
            refuse_miscounts(plan, measured)
            outputs.sync(pool)
        finally:
            outputs.close()
    return Weights(hashes, measured, calibrated)


def compress_blocks(
    conversion: Conversion,
    work: Work,
    masks: Mapping[str, Mask],
    text: CalibrationText | None,
    folder: Path | None = None,
    advance: Advance | None = None,
) -> Calibrated | None:
    """All in scope, block by block, where a step looks at activations: see `calibrate`. Nothing is done elsewhere."""
    if not _is_calibrated(conversion.plan):
        return None
    from compressknow.compress.calibrate.compression import calibrate

    assert text is not None
    return calibrate(conversion.plan, conversion.tree, work, masks, text, folder=folder, on_progress=advance or max)


def _is_calibrated(plan: Plan) -> bool:
    """Whether a step that prunes or quantizes looks at activations."""
    return any(step.calibrated for step in plan.recipe.steps if isinstance(step, Prune | Quantize))


def _written_files(plan: Plan, layout: Layout) -> dict[str, bytes]:
    """config.json and what else depends on how the weights are stored, by name: the index of several weight files, and
    how sentence-transformers loads quantized ones."""
    config = output_config(plan)
    quantization = config.get("quantization_config")
    loading = build_loading_settings(plan.checkpoint.folder, quantization) if quantization else {}
    index = {SAFETENSORS_INDEX: layout.index} if layout.index else {}
    return {name: _json(content) for name, content in {"config.json": config, **index, **loading}.items()}


def _manifest(
    plan: Plan,
    weights: Weights,
    written: Mapping[str, str],
    copied: Mapping[str, str],
    text: CalibrationText | None,
) -> Manifest:
    """`written` and `copied` : SHA-256 of the files beside the weights, by name."""
    source = plan.checkpoint.folder
    replaced = {name for name in (*written, plan.checkpoint.index) if name and (source / name).is_file()}
    read = {**weights.hashes, **copied, **{name: sha256_of(source / name) for name in replaced}}
    calibration = calibration_record(text, weights.calibrated, plan.removal)
    return Manifest(seal_manifest(build_manifest(plan, weights.measured, read, {**written, **copied}, calibration)))


def calibration_record(
    text: CalibrationText | None, done: Calibrated | None, removal: Removal | None = None
) -> dict[str, Any] | None:
    """What a manifest says of calibration; None where there was none."""
    if text is None:
        return None
    apart = (done is None or done.apart) and (removal is None or removal.apart)
    said = {"kind": text.kind, "source": text.source, "sha256": text.sha256, "tokens": text.tokens, "seed": text.seed}
    smoothed = {"smoothed": done.smoothed} if done and done.smoothed else {}
    return {**said, "blocks_apart": apart, "unseen": done.unseen if done else [], **smoothed}


def planned_files(plan: Plan) -> dict[str, int | None]:
    """The files that an output will hold, with their bytes; None where the weights decide it."""
    layout, source = lay_out(plan.tensors, plan.checkpoint.shards), plan.checkpoint.folder
    carried = {name: (source / name).stat().st_size for name in carried_files(source)}
    written = {name: len(content) for name, content in _written_files(plan, layout).items()}
    return {**layout.sizes, **carried, **written, **dict.fromkeys((CARD_NAME, MANIFEST_NAME))}


def carried_files(folder: Path) -> Iterator[str]:
    """The files of a checkpoint that go along unchanged: tokenizer, generation config, licence, code, and the modules
    that sentence-transformers runs behind the model, with their weights.

    Raises CheckpointError where one of them is a link that leads nowhere, or out of the checkpoint.
    """
    modules = module_folders(folder)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith((".", "__pycache__")) for part in name.parts)
        weights = path.suffix in WEIGHT_SUFFIXES and not any(name.is_relative_to(module) for module in modules)
        if hidden or weights or str(name) in REPLACED:
            continue
        if path.is_symlink() and not path.exists():
            raise CheckpointError(f"{path} is a link that leads nowhere.", hint="Fetch the checkpoint again.")
        if path.is_file():
            check_inside(folder, path)
            yield name.as_posix()


def choose_masks(work: Reader, plan: Plan) -> dict[str, Mask]:
    """What the plan prunes by looking at weights alone, by tensor name."""
    masks: dict[str, Mask] = {}
    for index, step in enumerate(plan.recipe.steps):
        if isinstance(step, Prune) and not step.calibrated:
            tensors = plan.pruned_by(index)
            chosen = choose(work, step, [tensor.to_prune for tensor in tensors])
            masks |= {tensor.name: mask for tensor, mask in zip(tensors, chosen, strict=True)}
    return masks


def refuse_miscounts(plan: Plan, measured: Mapping[str, Measured]) -> None:
    """Raise CompressknowError where a step did not prune as many weights as it said it would."""
    for index, step in enumerate(plan.recipe.steps):
        if isinstance(step, Prune):
            tensors = plan.pruned_by(index)
            _, said = pruned_count(step, [tensor.to_prune for tensor in tensors])
            if (found := sum(measured[tensor.name].pruned for tensor in tensors)) != said:
                raise CompressknowError(f"{step.method} prunes {found:,} weights where it said {said:,}.")


def _write_tensors(
    work: Work, plan: Plan, masks: Mapping[str, Mask], done: Mapping[str, Measured]
) -> tuple[dict[str, str], dict[str, Measured]]:
    """Write all tensors but those that are `done`, and hash the source files beside that: both keep every core busy,
    largest task first."""
    hashes: dict[str, str] = {}
    measured = dict(done)

    def hash_shard(name: str) -> None:
        hashes[name] = hash_file(work.pool, plan.checkpoint.folder / name, work.progress)

    def write(tensor: PlannedTensor) -> None:
        measured[tensor.name] = work.write(tensor, masks.get(tensor.name))

    hashing = [
        ((plan.checkpoint.folder / name).stat().st_size, partial(hash_shard, name)) for name in plan.checkpoint.shards
    ]
    writing = [(tensor.source.nbytes, partial(write, tensor)) for tensor in plan.tensors if tensor.name not in done]
    tasks = sorted([*hashing, *writing], key=lambda task: -task[0])
    work.pool.map(lambda task: task[1](), tasks)
    return hashes, measured


def output_config(plan: Plan) -> dict[str, Any]:
    """The output's config.json."""
    if not plan.targets:
        return plan.config
    require("compressed_tensors")
    version = importlib.metadata.version("compressed-tensors")
    settings = quantization_config(plan.targets, plan.ignore, version, plan.structure.prefix)
    if plan.unpacked:
        settings["dequantize"] = True
    return plan.config | {"quantization_config": settings}


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def _bytes_to_read(plan: Plan) -> int:
    hashed = sum((plan.checkpoint.folder / name).stat().st_size for name in plan.checkpoint.shards)
    # A threshold takes one pass over 16-bit weights and two over 32-bit ones.
    thresholds = sum(t.source.nbytes * (t.source.itemsize // 2) for t in plan.tensors if t.prune is not None)
    return hashed + thresholds + sum(tensor.source.nbytes for tensor in plan.tensors)
