"""compressknow: compress a language model, and know what it forgot.

>>> import compressknow
>>> manifest = compressknow.convert("bert-base-uncased", "bert-att-int8", scope="attention", prune=0.2,
...                                 quantize="int8")  # doctest: +SKIP
>>> manifest["setup"]  # doctest: +SKIP
'Att_GPQ 20%'
>>> model = compressknow.load("bert-att-int8")  # doctest: +SKIP

Importing this module is quick: torch and transformers are imported by the first call that needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from compressknow.compress.recipe import PruneMethod, Recipe, Scheme
    from compressknow.compress.verify import Verification
    from compressknow.model.structure import ModuleMap
    from compressknow.report.diff.compare import compare
    from compressknow.study.search import search
    from compressknow.study.sweep import sweep


__version__ = "0.1.0"
__all__ = ["__version__", "compare", "convert", "inspect", "load", "probe", "report", "search", "sweep", "verify"]


# Where the public functions are that are imported when they are first named.
_FUNCTIONS = {
    "compare": "compressknow.report.diff.compare",
    "search": "compressknow.study.search",
    "sweep": "compressknow.study.sweep",
}


def __getattr__(name: str) -> Any:
    """`probe` and `report` are rooms that can be called."""
    import importlib

    if name in ("probe", "report"):
        return importlib.import_module(f"compressknow.{name}")
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def inspect(
    model: str | Path,
    *,
    revision: str | None = None,
    module_map: ModuleMap = "structural",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Count a checkpoint's Linear layers by group and by scope, from its configuration; no weights are read.

    Parameters
    ----------
    model : a local folder or a hub id.
    module_map : ``structural``, or ``paper`` for the split that the paper's authors use in BERT and RoBERTa.

    Returns
    -------
    What ``compressknow inspect --json`` prints: groups, scopes, parameters stored and used, tied and unplaced weights.
    """
    from compressknow.model.summary import inspect_checkpoint

    return inspect_checkpoint(model, module_map=module_map, revision=revision, trust_remote_code=trust_remote_code)


def convert(
    model: str | Path,
    output: str | Path,
    *,
    scope: str | Sequence[str] = ("blocks",),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    layers: str | None = None,
    prune: float | None = None,
    prune_method: PruneMethod = "l1-unstructured",
    per_layer: bool = False,
    norm: float = 1,
    dim: int = 0,
    seed: int = 0,
    quantize: Scheme | None = None,
    module_map: ModuleMap = "structural",
    recipe: Recipe | dict[str, Any] | str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Prune and quantize a checkpoint into a new folder of safetensors, with a manifest and a model card.

    Parameters
    ----------
    model : a local folder or a hub id.
    output : the folder to write; it appears only when it is whole.
    scope : which Linear layers: ``blocks`` (all in the transformer blocks), ``attention``, ``feed-forward``, ``final``,
        ``overall`` and the finer ones of ``compressknow.model.scopes.SCOPES``.
    include, exclude, layers : regular expressions on module names, and a range of blocks (``0-5``), that narrow it.
    prune : share of the weights to zero, between 0 and 1.
    prune_method : ``l1-unstructured``, ``ln-structured``, ``random-unstructured`` or ``random-structured``.
    per_layer, norm, dim, seed : see `compressknow.compress.recipe.Prune`.
    quantize : ``int8``, ``int8-paper`` or ``int8-weights``.
    recipe : the steps, instead of all the options above: a `Recipe`, its dict, or the path of a TOML file, a manifest
        or a converted folder.
    overwrite : replace `output` where convert wrote it, once the new one is whole.
    dry_run : write nothing; return what the manifest would hold, as far as the headers of the weight files tell it.
    threads : tensors worked on at a time, by default one a core; the output does not depend on it.
    progress : told the bytes read so far, and in all.

    Returns
    -------
    The manifest: what was done, in total, by group and by tensor.

    Raises
    ------
    compressknow.errors.CompressknowError : with what is wrong, why, and what to try.
    """
    given = locals()
    from compressknow.compress.recipe import Where, recipe_of
    from compressknow.compress.staging import clean, refuse_output
    from compressknow.model.checkpoint import refuse_no_checkpoint

    if recipe is None:
        where = Where((scope,) if isinstance(scope, str) else tuple(scope), tuple(include), tuple(exclude), layers)
        chosen = recipe_of(
            where,
            prune=prune,
            prune_method=prune_method,
            per_layer=per_layer,
            norm=norm,
            dim=dim,
            seed=seed,
            quantize=quantize,
            module_map=module_map,
        )
    else:
        _refuse_beside_recipe(given)
        chosen = _as_recipe(recipe)
    # What is wrong is said before torch is imported, which takes seconds.
    refuse_no_checkpoint(model)
    if not dry_run:
        # What a dead run has left goes, whatever becomes of this one.
        clean(Path(output))
    refuse_output(Path(output), overwrite=overwrite, source=Path(model))
    from compressknow.compress.convert import convert as convert_checkpoint
    from compressknow.compress.convert import preview
    from compressknow.report.model_card.render import model_card_for

    if dry_run:
        return preview(
            model, output, chosen, revision=revision, trust_remote_code=trust_remote_code, overwrite=overwrite
        )
    return convert_checkpoint(
        model,
        output,
        chosen,
        revision=revision,
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
        threads=threads,
        progress=progress,
        render_card=model_card_for,
    )


def verify(folder: str | Path) -> Verification:
    """Recount and rehash a converted checkpoint against its manifest.

    Returns
    -------
    What was compared: numbers of tensors, files and bytes.

    Raises
    ------
    compressknow.errors.VerificationError : the weights differ from what the manifest says.
    """
    from compressknow.compress.verify import verify as verify_checkpoint

    return verify_checkpoint(folder)


def load(
    model: str | Path,
    *,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A checkpoint, converted or not, as a transformers model in eval mode that computes what the checkpoint says.

    Use it rather than ``from_pretrained`` for an int8 checkpoint of an encoder-decoder model: there, plain transformers
    fails in ``generate``.

    Parameters
    ----------
    model : a local folder or a hub id.
    dtype : dtype of the weights that are not quantized; the checkpoint's own by default.
    trust_remote_code : run modelling code that lies in the checkpoint.

    Raises
    ------
    compressknow.errors.CheckpointError : it cannot be loaded whole; no weight is ever filled in at random.
    """
    from compressknow.engine.load import load as load_folder
    from compressknow.model.checkpoint import open_checkpoint

    folder = open_checkpoint(model, revision).folder
    return load_folder(folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code)


def _refuse_beside_recipe(given: dict[str, Any]) -> None:
    """Raise UsageError where an option of `convert` that a recipe says instead differs from its default."""
    from inspect import signature

    from compressknow.compress.recipe import RECIPE_OPTIONS
    from compressknow.errors import UsageError

    defaults = signature(convert).parameters
    if beside := [name for name in RECIPE_OPTIONS if given[name] != defaults[name].default]:
        raise UsageError(f"A recipe says it all: leave out {', '.join(beside)}.")


def _as_recipe(recipe: Recipe | dict[str, Any] | str | Path) -> Recipe:
    from compressknow.compress.recipe import Recipe, read_recipe

    if isinstance(recipe, Recipe):
        return recipe
    return Recipe.from_dict(recipe) if isinstance(recipe, dict) else read_recipe(Path(recipe))
