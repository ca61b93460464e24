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
    from compressknow.probe.choose import Options
    from compressknow.probe.run import Bar, Settings
    from compressknow.report.contrast_records import Contrast
    from compressknow.report.search_records import Search, Tried
    from compressknow.report.study_records import Study
    from compressknow.study.running import RayOptions
    from compressknow.study.sweep import Told

__version__ = "0.1.0"
__all__ = ["__version__", "compare", "convert", "inspect", "load", "probe", "report", "search", "sweep", "verify"]


def __getattr__(name: str) -> Any:
    """`probe` and `report` are rooms that can be called; they are imported when they are first named."""
    if name in ("probe", "report"):
        import importlib

        return importlib.import_module(f"compressknow.{name}")
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
    scope: str | Sequence[str] = ("overall",),
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
    scope : which Linear layers, by group: ``attention``, ``feed-forward``, ``final``, ``overall`` and the finer ones.
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
    from compressknow.compress.convert import convert as convert_checkpoint
    from compressknow.compress.convert import preview
    from compressknow.compress.recipe import Where, recipe_of
    from compressknow.errors import UsageError
    from compressknow.report.model_card import model_card_for

    where = Where((scope,) if isinstance(scope, str) else tuple(scope), tuple(include), tuple(exclude), layers)
    if recipe is None:
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
    elif prune is not None or quantize is not None or where != Where():
        raise UsageError("A recipe says it all: give it or the single options, not both.")
    else:
        chosen = _as_recipe(recipe)
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


def compare(
    a: str | Path,
    b: str | Path,
    probes: str | Sequence[str] = (),
    *,
    outputs: Sequence[str | Path] = (),
    options: Options | None = None,
    settings: Settings | None = None,
    no_facts: bool = False,
    keep_in: str | Path | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    revision_b: str | None = None,
    threads: int | None = None,
    command: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    bar: Bar | None = None,
) -> Contrast:
    """Compare two checkpoints of one architecture: settings, what is stored, every weight and, if asked, knowledge.

    Parameters
    ----------
    a, b : local folders or hub ids. int8 weights are compared as what they stand for.
    probes : what to ask both, such as ``["atlas"]``; nothing by default. See `compressknow.probe`.
    outputs : files to write: ``.html``, ``.md``, ``.json``.
    options, settings : see `compressknow.probe`.
    no_facts : leave the text of every fact out.
    keep_in : folder of the answers; by default ``~/.cache/compressknow/answers``.
    overwrite : replace `outputs` that are there already.
    revision, revision_b : of a and of b, if they are hub ids.
    threads : tensors worked on at a time, by default one a core; the figures do not depend on it.
    command : the command line to show.
    progress : told the bytes of weights read so far, and in all.
    bar : gives, for a probe's name, a context with a callable that is told of its progress.

    Returns
    -------
    All figures; ``difference.total.relative_error`` for one, or ``behaviour.b_against_a.comparisons[0].kept``. Where
    both are the same to the byte it is `identical`, and there is no `difference`.

    Raises
    ------
    compressknow.errors.CompressknowError : a checkpoint is missing or damaged; the two are of different architectures;
        an output that cannot be written.
    """
    from compressknow.report.contrast import compare as compare_checkpoints

    return compare_checkpoints(
        a,
        b,
        probes,
        outputs=outputs,
        options=options,
        settings=settings,
        no_facts=no_facts,
        keep_in=keep_in,
        overwrite=overwrite,
        revision=revision,
        revision_b=revision_b,
        threads=threads,
        command=command,
        progress=progress,
        bar=bar,
    )


def sweep(
    model: str | Path,
    output: str | Path,
    *,
    grid: str | Path = "paper",
    probes: Sequence[str] | None = None,
    options: Options | None = None,
    settings: Settings | None = None,
    module_map: ModuleMap | None = None,
    scheme: Scheme | None = None,
    save: bool = False,
    ray: RayOptions | None = None,
    revision: str | None = None,
    command: str | None = None,
    bar: Bar | None = None,
    told: Told | None = None,
) -> Study:
    """Convert a model in every way of a grid, ask each what the original was asked, and write the study.

    Variants are made in memory, each the very one that `convert` would write. A study that was stopped goes on where it
    was; a cell that fails is recorded, and the rest goes on.

    Parameters
    ----------
    model : a local folder or a hub id.
    output : folder of the study; one of this model and version is gone on with.
    grid : ``paper``, or a TOML file.
    probes : names; see `compressknow.probe`.
    options, settings : see `compressknow.probe`.
    module_map, scheme : of the paper's grid, by default those of its authors (``paper``, ``int8-paper``).
    save : write each converted checkpoint too, under ``models/``.
    ray : run the cells on a Ray cluster; see `compressknow.study.running.RayOptions`.
    command : the command line to show.
    bar : gives, for a probe's name, a context with a callable that is told of its progress.
    told : is told each cell's result as it comes, and the original's answers.

    Returns
    -------
    The study, as ``study.html``, ``study.json``, ``cells.parquet`` and ``cells.csv`` in `output` show it.

    Raises
    ------
    compressknow.errors.CompressknowError : the model or a probe cannot be found or asked, the grid makes no sense, the
        cluster does not answer, or `output` holds something else.
    """
    from compressknow.study.sweep import sweep as run

    return run(
        model,
        output,
        grid=grid,
        probes=probes,
        options=options,
        settings=settings,
        module_map=module_map,
        scheme=scheme,
        save=save,
        ray=ray,
        revision=revision,
        command=command,
        bar=bar,
        told=told,
    )


def search(
    model: str | Path,
    output: str | Path,
    *,
    keep: float,
    minimize: str = "sparse-bytes",
    trials: int = 40,
    schemes: Sequence[Scheme] = ("int8", "int8-weights"),
    module_map: ModuleMap = "structural",
    probes: Sequence[str] | None = None,
    options: Options | None = None,
    settings: Settings | None = None,
    seed: int = 0,
    no_facts: bool = False,
    ray: RayOptions | None = None,
    revision: str | None = None,
    command: str | None = None,
    bar: Bar | None = None,
    told: Callable[[Tried], None] | None = None,
) -> Search:
    """Find the cheapest checkpoint of a model that keeps a share of its knowledge.

    Half of the facts of each relation guide the search; what it finds is judged on the other half, by the lower end of
    its interval. A search that was stopped goes on where it was. Needs Optuna.

    Parameters
    ----------
    model : a local folder or a hub id.
    output : folder of the search; one of this model and version is gone on with.
    keep : share of knowledge, between 0 and 1.
    minimize : ``sparse-bytes`` (non-zero weights at their width and one bit a weight), ``bytes`` (on disk, where pruned
        weights are dense) or ``nonzero`` (weights left).
    trials : recipes that the optimiser chooses, beside the paper's setups.
    schemes : int8 schemes that it may choose from.
    probes, options, settings : see `compressknow.probe`; lm-eval's tasks cannot be held out.
    seed : of the halves and of the optimiser.
    no_facts : leave the text of every fact out of the winner's report card.
    ray : run on a Ray cluster; see `compressknow.study.running.RayOptions`.
    told : is told each recipe's result as it comes.

    Returns
    -------
    The search, as ``search.html`` and ``search.json`` in `output` show it; `winner` is None where nothing keeps as
    much. With a winner there are ``recipe.toml``, the converted ``winner/``, and its ``report.html`` too.

    Raises
    ------
    compressknow.errors.CompressknowError : the model or a probe cannot be found or asked, Optuna is missing, or
        `output` holds something else.
    """
    from compressknow.study.search import search as run

    return run(
        model,
        output,
        keep=keep,
        minimize=minimize,
        trials=trials,
        schemes=schemes,
        module_map=module_map,
        probes=probes,
        options=options,
        settings=settings,
        seed=seed,
        no_facts=no_facts,
        ray=ray,
        revision=revision,
        command=command,
        bar=bar,
        told=told,
    )


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


def _as_recipe(recipe: Recipe | dict[str, Any] | str | Path) -> Recipe:
    from compressknow.compress.recipe import Recipe, read_recipe

    if isinstance(recipe, Recipe):
        return recipe
    return Recipe.from_dict(recipe) if isinstance(recipe, dict) else read_recipe(Path(recipe))
