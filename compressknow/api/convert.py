"""convert: a checkpoint pruned and quantized into a new folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressknow.api.words import verb

if TYPE_CHECKING:
    from compressknow.base.progress import OnProgress
    from compressknow.compress.manifest import Manifest
    from compressknow.compress.recipe import Recipe
    from compressknow.model.structure import ModuleMap


@verb
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
    norm: float = 1,
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
    """Drop blocks and neurons of a checkpoint, prune and quantize it, into a new folder of safetensors, with a manifest
    and a model card.

    Parameters
    ----------
    model : a local folder or a hub id.
    output : the folder to write; it appears only when it is whole.
    scope : which Linear layers: ``blocks`` (all in the transformer blocks), ``attention``, ``feed-forward``, ``final``,
        ``overall`` and the finer ones of ``compressknow.model.scopes.SCOPES``.
    include, exclude, layers : regular expressions on module names, and blocks (``3``, ``"0-5"``), that narrow it.
    drop_blocks : how many blocks of each stack to leave out, or which: ``"20-23"``. Of the scopes, ``encoder`` and
        ``decoder`` narrow it.
    drop_neurons : share of the hidden units of each feed-forward block to leave out; narrowed likewise.
    prune : share of the weights to zero, between 0 and 1.
    prune_method : a name of `compressknow.compress.pruning.METHODS`, by default ``l1-unstructured``.
    pattern : ``"2:4"``, of methods that prune so.
    per_layer, norm, dim, seed : see `compressknow.compress.steps.Prune`.
    quantize : a name of `compressknow.compress.schemes.SCHEMES`, such as ``int8``.
    group_size : how many weights share a scale, of ``int4``.
    rounding : ``nearest``, or ``gptq``, which needs calibration.
    smooth : alpha of SmoothQuant, for schemes that round activations (``int8``).
    calibration : the text for methods that look at activations: ``self`` (the model's own samples), the path of a
        ``.txt`` or ``.jsonl`` file, or ``hf:DATASET``; `calibration_tokens` of it, 32,768 by default, drawn by `seed`.
    parameters : by name, of methods and schemes of other packages.
    recipe : the steps, instead of all the options above: a `Recipe`, its dict, or the path of a TOML file, a manifest
        or a converted folder.
    overwrite : replace `output` where convert wrote it, once the new one is whole.
    dry_run : write nothing; return what the manifest would hold, as far as the headers of the weight files tell it.
    threads : tensors worked on at a time, by default one a core; the output does not depend on it.
    on_progress : called with each `compressknow.Progress`, in bytes or blocks; ``"bar"`` shows a bar.

    Returns
    -------
    The manifest: what was done, in total, by group and by tensor; a dict, with properties for its entries.

    Raises
    ------
    compressknow.CompressknowError : with what is wrong, why, and what to try.
    """
    chosen = _chosen(locals())
    _refuse_before_work(model, Path(output), overwrite=overwrite, writes=not dry_run)
    _refuse_no_text(chosen)
    from compressknow.base.progress import Stage, report_progress, resolve_progress
    from compressknow.compress.calibrate.trial import refuse_unsmoothable
    from compressknow.compress.convert import planned_files, prepare, text_for, write
    from compressknow.compress.manifest import Manifest
    from compressknow.compress.manifest import dry_run as preview
    from compressknow.pages.model_card import model_card_for

    listener, wanted = resolve_progress(on_progress), chosen.calibration
    how: dict[str, Any] = {"overwrite": overwrite, "threads": threads, "render_card": model_card_for}
    with report_progress(listener, Stage(wanted.work if wanted else "convert", str(model))) as advance:
        conversion = prepare(model, chosen, revision=revision, trust_remote_code=trust_remote_code)
        if dry_run:
            refuse_unsmoothable(*conversion)
            return Manifest({**preview(conversion.plan), "planned_files": planned_files(conversion.plan)})
        if not wanted:
            return write(conversion, output, begin=lambda _: nullcontext(advance), **how)
        text = text_for(conversion, trust_remote_code=trust_remote_code, advance=advance)
    return write(
        conversion, output, text=text, begin=lambda work: report_progress(listener, Stage(work, str(model))), **how
    )


# Those of built-in methods and schemes.
_PARAMETERS = ("pattern", "group_size")


def _chosen(given: dict[str, Any]) -> Recipe:
    """The recipe that the arguments of `convert` say: the one given, or one made of the options."""
    from inspect import signature

    from compressknow.compress.options import RECIPE_OPTIONS, recipe_of, refuse_beside_recipe
    from compressknow.compress.steps import Where

    if given["recipe"] is not None:
        said = signature(convert).parameters
        refuse_beside_recipe(given, {name: said[name].default for name in (*RECIPE_OPTIONS, *_PARAMETERS)})
        return _as_recipe(given["recipe"])
    options = {name: given[name] for name in RECIPE_OPTIONS}
    named = {name: given[name] for name in _PARAMETERS if given[name] is not None}
    options["parameters"] = {**(options["parameters"] or {}), **named}
    layers = options.pop("layers")
    # One text is one name or pattern, and not its letters.
    scope, include, exclude = (
        (each,) if isinstance(each, str) else tuple(each)
        for each in (options.pop(name) for name in ("scope", "include", "exclude"))
    )
    return recipe_of(Where(scope, include, exclude, None if layers is None else str(layers)), **options)


def _refuse_before_work(model: str | Path, output: Path, *, overwrite: bool, writes: bool) -> None:
    """What is wrong with the two places is said before torch is imported, which takes seconds."""
    from compressknow.base.files import check_links
    from compressknow.compress.staging import clean, refuse_output
    from compressknow.model.checkpoint import check_is_checkpoint

    check_is_checkpoint(model)
    check_links(output.parent)
    if writes:
        # What a dead run has left goes, whatever becomes of this one.
        clean(output)
    refuse_output(output, overwrite=overwrite, source=Path(model))


def _refuse_no_text(recipe: Recipe) -> None:
    if recipe.calibration is not None:
        from compressknow.compress.calibrate.text import check_text

        check_text(recipe.calibration.text, recipe.calibration.tokens)


def _as_recipe(recipe: Recipe | dict[str, Any] | str | Path) -> Recipe:
    from compressknow.compress.recipe import Recipe, read_recipe

    if isinstance(recipe, Recipe):
        return recipe
    return Recipe.from_dict(recipe) if isinstance(recipe, dict) else read_recipe(Path(recipe))
