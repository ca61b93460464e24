"""Function `convert`: prune and quantize a checkpoint into a new folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from inspect import signature
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressknow.api.keywords import api_function, check_type
from compressknow.base.files import check_links
from compressknow.base.progress import OnProgress, Stage, begin_stages, report_progress, resolve_progress
from compressknow.compress.recipe import (
    OPTIONS,
    Recipe,
    build_recipe,
    check_recipe_conflicts,
    list_parameters,
    read_recipe,
)
from compressknow.compress.staging import check_output, clean
from compressknow.compress.steps import SHARED, Where
from compressknow.model.checkpoint import check_is_checkpoint
from compressknow.model.structure import ModuleMap
from compressknow.pages.model_card import make_model_card

if TYPE_CHECKING:
    from compressknow.compress.manifest import Manifest


@api_function
def convert(
    model: str | Path,
    output: str | Path,
    *,
    scope: str | Sequence[str] = ("blocks",),
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    layers: int | str | None = None,
    drop_blocks: int | str | None = None,
    drop_neurons: float | None = None,
    prune: float | None = None,
    prune_method: str = "l1-unstructured",
    pattern: str | None = None,
    per_layer: bool = False,
    norm: float = 1.0,
    dim: int = 0,
    seed: int = 0,
    quantize: str | None = None,
    group_size: int | None = None,
    rounding: str = "nearest",
    smooth: float | None = None,
    calibration: str | None = None,
    calibration_tokens: int | None = None,
    module_map: ModuleMap = "structural",
    parameters: Mapping[str, Any] | None = None,
    recipe: Recipe | dict[str, Any] | str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    threads: int | None = None,
    on_progress: OnProgress | None = None,
) -> Manifest:
    """Drop blocks and neurons of a checkpoint, prune and quantize it, and write a new one with a manifest and a card.

    Parameters
    ----------
    model : a local folder or a hub id.
    output : the folder to write; it appears only when it is complete.
    scope : which Linear layers: ``blocks`` (all in the transformer blocks), ``attention``, ``feed-forward``, ``final``,
        ``overall`` and the finer ones in ``compressknow.model.structure.SCOPES``.
    include, exclude, layers : regular expressions on module names, and blocks (``3``, ``"0-5"``), that narrow it.
    drop_blocks : how many blocks of each stack to drop, or which: ``"20-23"``; narrowed by ``encoder`` or ``decoder``.
    drop_neurons : share of the hidden units of each feed-forward block to drop; narrowed the same way.
    prune : share of the weights to zero, between 0 and 1.
    prune_method : a name of `compressknow.compress.pruning.METHODS`, by default ``l1-unstructured``.
    pattern : such as ``"2:4"``, for methods that support it.
    per_layer, norm, dim, seed : see `compressknow.compress.steps.Prune`.
    quantize : a name of `compressknow.compress.schemes.SCHEMES`, such as ``int8``.
    group_size : how many weights share a scale, for ``int4``.
    rounding : ``nearest``, or ``gptq``, which needs calibration.
    smooth : alpha of SmoothQuant, for schemes that round activations (``int8`` and ``fp8``).
    calibration : the text for methods that look at activations: ``self`` (the model's own samples), the path of a
        ``.txt`` or ``.jsonl`` file, or ``hf:DATASET``; `calibration_tokens` of it, 32,768 by default. `seed` also seeds
        the samples and the masking.
    parameters : parameters of third-party methods and schemes, by name.
    recipe : the steps, instead of the options above: a `Recipe`, its dict, a TOML file, a manifest or its folder.
    overwrite : replace `output` if convert wrote it, once the new one is complete.
    dry_run : write nothing; return the manifest as far as the headers of the weight files tell it.
    threads : tensors to process at a time, by default one per core; the output does not depend on it.
    on_progress : called with each `compressknow.Progress`, in bytes or blocks; ``"bar"`` shows a bar.

    Returns
    -------
    The manifest: what was done, in total, by group and by tensor; a dict, with properties for its entries.

    Raises
    ------
    compressknow.CompressknowError : what is wrong, why, and what to try.
    """
    chosen = _choose_recipe(locals())
    # Check both paths before torch is imported, which takes seconds.
    check_is_checkpoint(model)
    check_links(Path(output).parent)
    if not dry_run:
        # Remove what a killed run left, even if this one fails.
        clean(Path(output))
    check_output(Path(output), overwrite=overwrite, source=Path(model))
    if chosen.calibration is not None:
        from compressknow.compress.calibrate.text import check_text

        check_text(chosen.calibration)
    from compressknow.compress.convert import execute, make_calibration_text, prepare_plan
    from compressknow.compress.manifest import Manifest, predict_manifest
    from compressknow.compress.output import NewFolder, list_files

    listener, text_source = resolve_progress(on_progress), chosen.calibration
    # Planning is part of the first stage: making the calibration text, or converting.
    with report_progress(listener, Stage(text_source.work if text_source else "convert", str(model))) as advance:
        plan = prepare_plan(model, chosen, revision=revision, trust_remote_code=trust_remote_code)
        if dry_run:
            from compressknow.compress.calibrate.smooth import check_smoothable

            check_smoothable(plan)
            return Manifest({**predict_manifest(plan), "planned_files": list_files(plan)})
        new_folder = partial(NewFolder, output, plan.checkpoint, overwrite=overwrite, render_card=make_model_card)
        if not text_source:
            return execute(plan, new_folder(), threads=threads, begin=lambda _: nullcontext(advance))
        text = make_calibration_text(plan, trust_remote_code=trust_remote_code, advance=advance)
    return execute(plan, new_folder(), text, threads=threads, begin=begin_stages(listener, model))


def _choose_recipe(arguments: dict[str, Any]) -> Recipe:
    """Return the recipe given to `convert`, or build it from the other arguments."""
    method_parameters = [name for name in list_parameters() if name in arguments and name not in SHARED]
    others = arguments["parameters"] or {}
    defaults = signature(convert).parameters
    if (recipe := arguments["recipe"]) is not None:
        own_defaults = {name: defaults[name].default for name in (*OPTIONS, *SHARED, *method_parameters)}
        check_type("recipe", recipe, Recipe | dict | str | PathLike, "a Recipe, its dict, or a path")
        check_recipe_conflicts(arguments | others, own_defaults | dict.fromkeys(others))
        if isinstance(recipe, dict):
            return Recipe.from_dict(recipe)
        return recipe if isinstance(recipe, Recipe) else read_recipe(Path(recipe))
    options = {name: arguments[name] for name in (*OPTIONS, *SHARED)}
    parameters = {name: arguments[name] for name in method_parameters if arguments[name] != defaults[name].default}
    where = Where(*(options.pop(name) for name in ("scope", "include", "exclude", "layers")))
    return build_recipe(where, parameters={**others, **parameters}, **options)
