"""Conversion of a checkpoint into a compressed one: a new folder with a manifest, or tensors in memory."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch

from compressknow.base.errors import UnsupportedError
from compressknow.base.progress import Advance, Begin, count_progress, ignore_advance, ignore_progress
from compressknow.base.reading import compute_sha256
from compressknow.compress.blocks import Pool, Reader
from compressknow.compress.manifest import Manifest, build_manifest
from compressknow.compress.output import InMemory, NewFolder, RenderCard, lay_out
from compressknow.compress.output_config import build_config, ensure_loadable
from compressknow.compress.plan import Plan, PlannedTensor, make_plan
from compressknow.compress.process import TensorConverter, TensorStats
from compressknow.compress.pruning import METHODS, Mask, Patterned
from compressknow.compress.pruning.builtin import Unstructured
from compressknow.compress.recipe import Recipe
from compressknow.compress.steps import Calibration, Prune, Quantize, choose_masks, count_pruned
from compressknow.model.checkpoint import ADAPTER_CONFIG, find_weight_files, has_adapter, open_checkpoint
from compressknow.model.groups import read_structure
from compressknow.model.loading import open_complete
from compressknow.model.manifest import read_manifest
from compressknow.model.structure import ModuleMap, Structure
from compressknow.model.tensors import OpenFiles

if TYPE_CHECKING:
    from compressknow.compress.calibrate.text import CalibrationText
    from compressknow.compress.removal.smaller import Removal
    from compressknow.engine.load import Variant


def prepare_plan(
    model: str | Path, recipe: Recipe, *, revision: str | None = None, trust_remote_code: bool = False
) -> Plan:
    """Open a checkpoint and plan a recipe. Raises the errors of `open_complete` and `VariantMaker.plan`."""
    return VariantMaker(model, revision, trust_remote_code=trust_remote_code).plan(recipe)


def _plan_after_removal(removal: Removal, recipe: Recipe) -> Plan:
    """Plan the remaining steps of a recipe on the smaller checkpoint that its removal steps leave."""
    structure = read_structure(removal.tree, recipe.module_map)
    plan = make_plan(removal.checkpoint, removal.tree, structure, recipe)
    return ensure_loadable(replace(plan, removal=removal))


def make_calibration_text(
    plan: Plan, *, trust_remote_code: bool = False, advance: Advance = ignore_advance
) -> CalibrationText | None:
    """Return the text that a recipe is calibrated on; None if no step needs activations. Raises the errors of
    `check_smoothable` and `read_calibration_text`."""
    if (calibration := plan.recipe.calibration) is None:
        return None
    from compressknow.compress.calibrate.smooth import check_smoothable
    from compressknow.compress.calibrate.text import read_calibration_text

    check_smoothable(plan)
    # The folder's model writes the text, not one without blocks: that writes worse, and the text decides which to drop.
    folder, tree = plan.checkpoint.folder, plan.tree
    return read_calibration_text(folder, tree, calibration, trust_remote_code=trust_remote_code, advance=advance)


def execute(
    plan: Plan,
    output: NewFolder | InMemory,
    text: CalibrationText | None = None,
    *,
    threads: int | None = None,
    begin: Begin = ignore_progress,
) -> Manifest:
    """Execute a plan, and return the manifest that the output folder holds as `compressknow.json`.

    Parameters
    ----------
    threads : how many tensors are processed at a time, by default one per core; the output's bytes do not depend on it.
    begin : begins the stages for progress: ``choose`` if the text decides what is dropped, then ``calibrate`` if a step
        that prunes or quantizes needs activations, otherwise ``convert``.

    Raises
    ------
    CheckpointError : a weight in scope is NaN or infinite, or a file of the checkpoint changed since it was opened.
    OutputError : the output cannot be written.
    """
    with output:
        with TemporaryDirectory(dir=output.folder, prefix=".cut-") as cut_tensors:
            plan = _complete_removal(plan, text, Path(cut_tensors), threads, begin)
            blockwise = any(step.calibrated for step in plan.recipe.steps if isinstance(step, Prune | Quantize))
            with (
                output.open(plan) as weights,
                begin("calibrate" if blockwise else "convert") as advance,
                Pool(threads) as pool,
                OpenFiles() as files,
            ):
                shards = plan.checkpoint.shards if isinstance(output, NewFolder) else ()
                nbytes = _count_bytes(plan, shards, weights.known)
                progress = count_progress(ignore_advance if blockwise else advance, nbytes)
                unfitted = plan.removal.unfitted if plan.removal else {}
                converter = TensorConverter(pool, files, progress, weights.writer, unfitted)
                masks: dict[str, Mask] = {}
                for step, tensors in plan.list_prune_steps():
                    if not step.calibrated:
                        # Calibrated steps choose their masks later, from activations.
                        chosen = choose_masks(converter, step, [tensor.to_prune for tensor in tensors])
                        masks |= dict(zip((tensor.name for tensor in tensors), chosen, strict=True))
                calibrated = None
                if blockwise:
                    from compressknow.compress.calibrate.compression import calibrate

                    assert text is not None
                    calibrated = calibrate(plan, converter, masks, text, advance)
                done = {**weights.known, **(calibrated.measured if calibrated else {})}
                hashes, measured = _write_tensors(converter, plan, masks, done, shards)
                _check_pruned_counts(plan, measured)
                weights.complete(pool, measured)
        read, written = output.write_other_files(plan)
        manifest = build_manifest(plan, measured, hashes | read, written, text, calibrated)
        output.publish(manifest)
    return manifest


def _complete_removal(
    plan: Plan, text: CalibrationText | None, folder: Path, threads: int | None, begin: Begin
) -> Plan:
    """Choose by the text which blocks and neurons are dropped, unless that is known, and plan the remaining steps. Cut
    tensors are stored in `folder`, and read from there later. Raises the errors of `complete_removal`."""
    if plan.removal is None or plan.removal.is_decided:
        return plan
    from compressknow.compress.removal.calibrated import complete_removal

    assert text is not None
    with Pool(threads) as pool, OpenFiles() as files, begin("choose") as advance:
        reader = Reader(pool, files, lambda _: None)
        removal = complete_removal(plan, text.batches, reader, folder, advance)
    return _plan_after_removal(removal, plan.recipe)


def _write_tensors(
    converter: TensorConverter,
    plan: Plan,
    masks: Mapping[str, Mask],
    done: Mapping[str, TensorStats],
    shards: tuple[str, ...],
) -> tuple[dict[str, str], dict[str, TensorStats]]:
    """Write all tensors except those `done`, and hash the `shards`, the largest first, to keep all cores busy."""
    hashes: dict[str, str] = {}
    measured = dict(done)

    def report_piece(nbytes: int) -> None:
        converter.pool.check()
        converter.progress(nbytes)

    def hash_shard(name: str) -> None:
        hashes[name] = compute_sha256(plan.checkpoint.folder / name, report_piece)

    def write(tensor: PlannedTensor) -> None:
        measured[tensor.name] = converter.write(tensor, masks.get(tensor.name))

    hashing = [((plan.checkpoint.folder / name).stat().st_size, partial(hash_shard, name)) for name in shards]
    writing = [(tensor.source.nbytes, partial(write, tensor)) for tensor in plan.tensors if tensor.name not in done]
    tasks = sorted([*hashing, *writing], key=lambda task: -task[0])
    converter.pool.map(lambda task: task[1](), tasks)
    return hashes, measured


def _check_pruned_counts(plan: Plan, measured: Mapping[str, TensorStats]) -> None:
    for step, tensors in plan.list_prune_steps():
        _, expected = count_pruned(step, [tensor.to_prune for tensor in tensors])
        if (pruned := sum(measured[tensor.name].pruned for tensor in tensors)) != expected:
            with METHODS.explain_failures(step.method):
                raise ValueError(f"it prunes {pruned:,} weights, but announced {expected:,}")


def _count_bytes(plan: Plan, hashed: tuple[str, ...], known: Container[str]) -> int:
    """Count the bytes to be read: of the shards to be `hashed`, and of all tensors except those `known`."""
    total = sum((plan.checkpoint.folder / name).stat().st_size for name in hashed)
    for tensor in plan.tensors:
        passes = 1 + int(tensor.scheme is not None and tensor.scheme.scale_per == "tensor")
        method = tensor.prune.chosen if tensor.prune else None
        if method and method.needs == "magnitudes" and not (isinstance(method, Patterned) and method.groups):
            # A threshold takes two passes: the leading bits, then the remaining bits of 32, or the ties of 16-bit keys.
            passes += 2 if isinstance(method, Unstructured) else 1
        total += 0 if tensor.name in known else tensor.source.nbytes * passes
    return total


class VariantMaker:
    """Maker of converted checkpoints, in memory or in folders, from one checkpoint by any number of recipes.

    The checkpoint is opened once, and tensors that recipes do not change are read once. Calibration texts are stored in
    the folder `texts`, if it is given.
    """

    def __init__(
        self,
        model: str | Path,
        revision: str | None = None,
        *,
        trust_remote_code: bool = False,
        texts: Path | None = None,
    ) -> None:
        self.checkpoint, self.tree = open_complete(model, revision, trust_remote_code=trust_remote_code)
        self._trust_remote_code, self._texts_folder = trust_remote_code, texts
        self._texts: dict[Calibration, CalibrationText] = {}
        self._structures: dict[ModuleMap, Structure] = {}
        self._shared: dict[str, tuple[torch.Tensor, TensorStats]] = {}

    def structure(self, module_map: ModuleMap = "structural") -> Structure:
        if module_map not in self._structures:
            self._structures[module_map] = read_structure(self.tree, module_map)
        return self._structures[module_map]

    def plan(self, recipe: Recipe) -> Plan:
        """Plan a recipe, only from headers, and check that the output loads.

        Raises the errors of `remove`, `make_plan` and `ensure_loadable`, and UnsupportedError if an adapter in the
        folder would no longer fit the model.
        """
        folder = self.checkpoint.folder
        if (recipe.removals or recipe.smooths) and has_adapter(folder):
            raise UnsupportedError(
                f"{folder} contains an adapter (LoRA), which would no longer fit the model.",
                "It was trained for the model's current blocks, neurons and layer inputs.",
                f"Merge it into the model first, or remove {ADAPTER_CONFIG}.",
            )
        if recipe.removals:
            from compressknow.compress.removal.smaller import remove

            return _plan_after_removal(remove(self.checkpoint, self.tree, recipe), recipe)
        return ensure_loadable(make_plan(self.checkpoint, self.tree, self.structure(recipe.module_map), recipe))

    def make(self, plan: Plan, begin: Begin = ignore_progress) -> Variant:
        """Execute a plan in memory, with the tensors that `write` would write. `begin` begins the stage that makes the
        text, unless it is known, and those of `execute`. Raises the errors of `get_text` and `execute`."""
        from compressknow.engine.load import Variant

        memory = InMemory(self._shared)
        manifest = execute(plan, memory, self.get_text(plan, begin), begin=begin)
        nbytes = sum(lay_out(memory.plan.tensors, memory.plan.checkpoint.shards).sizes.values())
        config = build_config(memory.plan)
        return Variant(memory.tensors, config, manifest, nbytes, self.checkpoint.folder, self.tree)

    def write(self, recipe: Recipe, output: Path, render_card: RenderCard, begin: Begin) -> Manifest:
        """Write the checkpoint of a recipe into a new folder, in the stages of `make`. Raises the errors of `plan`,
        `make` and `NewFolder`."""
        plan = self.plan(recipe)
        folder = NewFolder(output, self.checkpoint, render_card=render_card)
        return execute(plan, folder, self.get_text(plan, begin), begin=begin)

    def read(self, folder: Path) -> Variant:
        """Read a checkpoint that `write` wrote into the form that `make` returns; its tensors stay in the files."""
        from safetensors.torch import load_file

        from compressknow.engine.load import Variant

        written, files = open_checkpoint(folder), [folder / name for name in find_weight_files(folder)]
        tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
        nbytes = sum(file.stat().st_size for file in files)
        return Variant(tensors, written.config, read_manifest(folder), nbytes, self.checkpoint.folder, self.tree)

    def get_text(self, plan: Plan, begin: Begin = ignore_progress) -> CalibrationText | None:
        """Return the text that a plan is calibrated on, if any; it is made once for all recipes with the same settings.
        Raises the errors of `make_calibration_text`."""
        if (calibration := plan.recipe.calibration) is None:
            return None

        from compressknow.compress.calibrate.text import choose_name, load_or_make_text

        def make() -> CalibrationText:
            with begin(calibration.work) as advance:
                text = make_calibration_text(plan, trust_remote_code=self._trust_remote_code, advance=advance)
            assert text is not None
            return text

        if calibration not in self._texts:
            folder = self._texts_folder
            file = folder / f"{choose_name(calibration)}.json" if folder else None
            self._texts[calibration] = load_or_make_text(file, make) if file else make()
        return self._texts[calibration]

    def use_text(self, calibration: Calibration, text: CalibrationText) -> None:
        """Use a text that was made elsewhere from the same checkpoint for all recipes with these settings."""
        self._texts[calibration] = text
