"""Conversions that are not written: the very tensors that `convert` would write, in memory."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from compressknow.compress.blocks import Reader
from compressknow.compress.calibrate.text import load_or_make_text
from compressknow.compress.convert import (
    Conversion,
    calibration_record,
    choose_all_masks,
    compress_blocks,
    decided,
    output_config,
    planned,
    proved,
    refuse_miscounts,
    text_for,
)
from compressknow.compress.layout import lay_out
from compressknow.compress.manifest import build_manifest
from compressknow.compress.plan import Plan, PlannedTensor, make_plan
from compressknow.compress.pool import Pool
from compressknow.compress.process import Measured, TensorWriter, Work
from compressknow.compress.recipe import Recipe
from compressknow.compress.steps import Calibration
from compressknow.engine.load import Variant
from compressknow.model.groups import structure_of
from compressknow.model.loading import open_complete
from compressknow.model.structure import ModuleMap, Structure
from compressknow.model.tensors import OpenFiles, byte_view, torch_dtype

if TYPE_CHECKING:
    from compressknow.compress.calibrate.text import CalibrationText


class VariantMaker:
    """Opens a checkpoint once, for any number of recipes. Its tensors that a recipe leaves alone are read once.

    Parameters
    ----------
    texts : a folder that keeps calibration texts: those that are there are taken as they are.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
        threads: int | None = None,
        texts: Path | None = None,
    ) -> None:
        self.checkpoint, self.tree = open_complete(model, revision, trust_remote_code=trust_remote_code)
        self._threads, self._trusted = threads, trust_remote_code
        self._texts: dict[Calibration, CalibrationText] = {}
        self._kept_in = texts
        self._structures: dict[ModuleMap, Structure] = {}
        self._files = OpenFiles()
        self._kept: dict[str, torch.Tensor] = {}
        self._measured: dict[str, Measured] = {}

    def __enter__(self) -> VariantMaker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.__exit__(kind, error, trace)

    def structure(self, module_map: ModuleMap = "structural") -> Structure:
        if module_map not in self._structures:
            self._structures[module_map] = structure_of(self.tree, module_map)
        return self._structures[module_map]

    def plan(self, recipe: Recipe) -> Plan:
        """What a recipe does, from headers alone. Raises what `remove`, `make_plan` and `proved` do."""
        if recipe.removals:
            plan, tree = planned(self.checkpoint, self.tree, recipe)
            return proved(plan, tree)
        plan = make_plan(self.checkpoint, self.tree, self.structure(recipe.module_map), recipe)
        # Only where weights are not stored under their own names may a form not load.
        return proved(plan, self.tree) if any(tensor.stored[0].suffix for tensor in plan.tensors) else plan

    def make(self, plan: Plan) -> Variant:
        """The converted checkpoint of a plan of this maker.

        Raises CheckpointError where a weight in scope is NaN or infinite, and what `text_for`, `decide` and `calibrate`
        do.
        """
        if plan.removal is None:
            return self._make(Conversion(plan, self.tree), self._files)
        conversion = Conversion(plan, plan.removal.tree)
        with TemporaryDirectory() as folder, OpenFiles() as files:
            with Pool(self._threads) as pool:
                reader = Reader(pool, files, lambda _: None)
                conversion = decided(conversion, self.text(plan), reader, Path(folder))
            return self._make(conversion, files)

    def _make(self, conversion: Conversion, files: OpenFiles) -> Variant:
        plan = conversion.plan
        # Names of a smaller model are those of other tensors; smoothing divides norms that no scope has.
        alone = plan.removal is not None or plan.recipe.smooths
        output, text = _Memory(plan, {} if alone else self._kept), self.text(plan)
        with Pool(self._threads) as pool:
            work = Work(pool, files, lambda _: None, output, plan.unfitted)
            masks = choose_all_masks(work, plan)
            calibrated = compress_blocks(conversion, work, masks, text)
            done = calibrated.measured if calibrated else {}

            def write(tensor: PlannedTensor) -> Measured:
                if tensor.name in output.kept:
                    return self._measured[tensor.name]
                return done.get(tensor.name) or work.write(tensor, masks.get(tensor.name))

            measured = dict(zip((t.name for t in plan.tensors), pool.map(write, plan.tensors), strict=True))
        refuse_miscounts(plan, measured)
        if not alone:
            self._keep(plan, output, measured)
        sizes = lay_out(plan.tensors, plan.checkpoint.shards).sizes
        manifest = build_manifest(plan, measured, {}, {}, calibration_record(text, calibrated, plan.removal))
        tensors, bytes = output.kept | output.made, sum(sizes.values())
        return Variant(tensors, output_config(plan), manifest, bytes, self.checkpoint.folder, self.tree)

    def text(self, plan: Plan) -> CalibrationText | None:
        """What a plan is calibrated on, if it is: made once for all recipes that say the same of it. Raises what
        `text_for` does."""
        if (calibration := plan.recipe.calibration) is None:
            return None

        def make() -> CalibrationText:
            text = text_for(Conversion(plan, self.tree), trust_remote_code=self._trusted)
            assert text is not None
            return text

        if calibration not in self._texts:
            self._texts[calibration] = load_or_make_text(self._kept_in, calibration, make) if self._kept_in else make()
        return self._texts[calibration]

    def take(self, calibration: Calibration, text: CalibrationText) -> None:
        """Use this text, made elsewhere from the same checkpoint, for all recipes that say so."""
        self._texts[calibration] = text

    def _keep(self, plan: Plan, output: _Memory, measured: dict[str, Measured]) -> None:
        for tensor in plan.tensors:
            if not tensor.in_scope and tensor.name in output.made:
                self._kept[tensor.name] = output.made[tensor.name]
                self._measured[tensor.name] = measured[tensor.name]


class _Memory:
    """The tensors of a plan: those `kept` of variants before it, and those to be made, with their scales."""

    def __init__(self, plan: Plan, known: dict[str, torch.Tensor]) -> None:
        self.kept = {t.name: known[t.name] for t in plan.tensors if not t.in_scope and t.name in known}
        self.made: dict[str, torch.Tensor] = {}
        for tensor in plan.tensors:
            if tensor.name not in self.kept:
                for name, part in tensor.written:
                    self.made[name] = torch.empty(part.shape, dtype=torch_dtype(part.dtype))

    def writer(self, tensor_name: str) -> TensorWriter:
        memory = byte_view(self.made[tensor_name])

        def put(data: memoryview, position: int) -> None:
            memory[position : position + len(data)] = data

        return TensorWriter(put, 0)
