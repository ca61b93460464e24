"""Load a checkpoint as a transformers model that computes correctly however it is called."""

from __future__ import annotations

import contextlib
import copy
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressknow.base.errors import CheckpointError, CompressknowError, UnsupportedError
from compressknow.base.files import escape_name
from compressknow.base.packages import GGUF_TRANSFORMERS, can_read_gguf, is_installed
from compressknow.base.progress import silence_libraries, translate_panics
from compressknow.base.reading import NotReadable
from compressknow.model.checkpoint import has_adapter, list_config_groups, list_some, read_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from compressknow.engine.layers import EngineLinear


@dataclass(frozen=True)
class Variant:
    """Converted checkpoint in memory.

    Attributes
    ----------
    tensors : the contents that the weight files would have, by name; tensors that the recipe does not change are shared
        with the other variants of the checkpoint.
    config : the contents that config.json would have.
    manifest : as `convert` returns it, without the hashes of files.
    bytes : size of the weight files.
    folder : the source checkpoint's folder.
    tree : the source checkpoint's model, on the meta device.
    """

    tensors: dict[str, torch.Tensor] = field(repr=False)
    config: dict[str, Any] = field(repr=False)
    manifest: dict[str, Any] = field(repr=False)
    bytes: int
    folder: Path
    tree: PreTrainedModel = field(repr=False)


def load(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
    language_model: bool = False,
) -> PreTrainedModel:
    """Load the model of a checkpoint folder, in eval mode; its class is the one that the config names.

    Quantized weights without a layer in `compressknow.engine.layers` are unpacked to floats here: transformers does so
    only at the first forward of the whole model, so that `generate` fails if it calls the encoder first (T5, BART).

    Parameters
    ----------
    folder : a local folder, converted or not, or a GGUF file in one (``FOLDER/FILE.gguf``), unpacked to floats.
    dtype : dtype of the weights that are not quantized; the checkpoint's own by default.
    trust_remote_code : run modelling code from the folder.
    language_model : use the class with a language-modelling head if the config names one without.

    Raises
    ------
    CheckpointError : no such folder, or it cannot be loaded completely: a weight that the model needs is missing.
    UnsupportedError : a GGUF file, with a transformers release that reads it differently; zero points that transformers
        does not unpack.
    """
    path = _find_checkpoint(folder)
    with silence_libraries(), warnings.catch_warnings(), _translate_errors(path):
        # transformers warns that the other settings of the config remain.
        warnings.filterwarnings("ignore", "You passed `quantization_config`")
        from transformers import AutoConfig

        from compressknow.model.meta import find_own_config, needs_own_code

        if trust_remote_code and path.is_dir():
            # As for the module tree, prefer transformers' own class.
            raw = read_json(path / "config.json")
            trust_remote_code = needs_own_code(raw, str((raw.get("architectures") or [None])[0]))
        _require_peft(path)
        source = _find_source(path, trust_remote_code)
        config = AutoConfig.from_pretrained(**source)
        named, model_class = _find_class(config, trust_remote_code, language_model)
        unpacked = {"quantization_config": each} if (each := _choose_unpacking(path, config)) else {}
        headless = named if named != model_class.__name__ and language_model else None
        # By itself, a text class would ignore that a multimodal config says that weights are quantized.
        if (own := find_own_config(model_class, config)) is not config:
            source["config"] = own
        model = _load_whole(model_class, path, headless, **source, **unpacked, dtype=dtype or "auto")
        _unpack(model, device)
        return model.to(device).eval()


def load_variant(
    variant: Variant, *, device: str | torch.device = "cpu", dtype: str | torch.dtype | None = None
) -> PreTrainedModel:
    """Load the model of a conversion in memory, as `load` does that of a converted folder."""
    from compressknow.model.meta import parse_config

    path, tree = variant.folder, variant.tree
    with silence_libraries(), _translate_errors(path):
        _, named = _find_class(tree.config, False, True)
        # An Auto class would load code from the folder, from which the tree is already built.
        model_class = named if hasattr(named, "config_class") else type(tree)
        source: dict[str, Any] = {"pretrained_model_name_or_path": None, "state_dict": dict(variant.tensors)}
        config = parse_config(tree, copy.deepcopy(variant.config))
        model = _load_whole(model_class, path, **source, config=config, dtype=dtype or "auto")
        if model.can_generate() and (path / "generation_config.json").is_file():
            model.generation_config = type(model.generation_config).from_pretrained(path)
        _require_peft(path)
        if has_adapter(path):
            model.load_adapter(str(path))
        _unpack(model, device)
        return model.to(device).eval()


def _require_peft(path: Path) -> None:
    """Raise CompressknowError for an adapter that transformers would leave out."""
    if has_adapter(path) and not is_installed("peft"):
        hint = "Install it with: pip install peft"
        raise CompressknowError(f"{path} also holds an adapter (LoRA), and peft is not installed.", hint=hint)


def load_tokenizer(folder: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint folder or GGUF file. Raises CheckpointError if there is none, or one without a
    vocabulary, UnsupportedError as `load` does."""
    from transformers import AutoTokenizer

    path = _find_checkpoint(folder)
    files = "tokenizer.json, tokenizer_config.json, ..."
    hint = f"Put the model's tokenizer files ({files}) in the same folder as the weights."
    with silence_libraries():
        try:
            source = _find_source(path, trust_remote_code)
            with translate_panics():
                tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(**source)
            if not isinstance(tokenizer.model_max_length, int | float):
                # transformers would later fail to compare it with a length.
                raise ValueError(f"its model_max_length, {tokenizer.model_max_length!r}, is not a number")
        except CompressknowError:
            raise
        except Exception as error:
            raise CheckpointError(f"{path} has no tokenizer that loads.", find_reason(error), hint) from error
    if len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)) < 2:
        raise CheckpointError(
            f"{path} has no tokenizer: it lacks the file of its vocabulary.",
            "transformers would create one with only special tokens, and every word would be unknown.",
            hint,
        )
    return tokenizer


def _find_checkpoint(folder: str | Path) -> Path:
    path = Path(folder)
    if escape_name(str(path)) != str(path):
        raise CheckpointError(
            f"The path {escape_name(str(path))} is not valid {sys.getfilesystemencoding().upper()}.",
            hint="Rename the folder, or set PYTHONUTF8=1 if its name is UTF-8: the libraries that load weights and "
            "tokenizers cannot open such a path.",
        )
    if path.suffix == ".gguf" and path.is_file():
        if not can_read_gguf():
            raise UnsupportedError(
                f"{path} is a GGUF file: it needs transformers {GGUF_TRANSFORMERS} or newer, and "
                f"{version('transformers')} is installed.",
                why="Older releases begin its texts with different tokens, so that it would give different answers.",
                hint=f"Upgrade with: pip install 'transformers>={GGUF_TRANSFORMERS}'",
            )
        return path
    if not path.is_dir():
        raise CheckpointError(f"{folder}: no such folder.", hint="Give a checkpoint folder: config.json and weights.")
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json.", hint="It must be in the same folder as the weights.")
    for file in sorted(path.iterdir()):
        # transformers would ignore it, and perhaps tokenize text differently.
        if file.is_symlink() and not file.exists():
            raise CheckpointError(f"{file} is a link that leads nowhere.", hint="Fetch the checkpoint again.")
    return path


def _find_source(path: Path, trust_remote_code: bool) -> dict[str, Any]:
    """Return where `from_pretrained` finds a checkpoint. Raises CheckpointError for a GGUF file that it misreads."""
    # Code that is trusted may lie in another repository of the Hub.
    options = {"trust_remote_code": trust_remote_code, "local_files_only": not trust_remote_code}
    if path.suffix != ".gguf":
        return {"pretrained_model_name_or_path": path, **options}
    from compressknow.model.gguf_file import check_gguf

    try:
        check_gguf(path)
    except NotReadable as error:
        raise CheckpointError(f"{path} is damaged: {error}.", hint="Download it again.") from None
    return {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name, **options}


def _choose_unpacking(path: Path, config: Any) -> Any:
    """Return how transformers is to unpack weights, or None. Raises UnsupportedError if it would do so wrongly."""
    from transformers import CompressedTensorsConfig, GgufConfig

    if path.suffix == ".gguf":
        return GgufConfig(dequantize=True)
    quantization: Any = getattr(config, "quantization_config", None)
    groups = list(list_config_groups(quantization))
    asymmetric = [
        group
        for group in groups
        if (group.get("format") or quantization.get("format")) == "pack-quantized"
        and not (group.get("weights") or {}).get("symmetric", True)
    ]
    if not asymmetric:
        return None
    # In a packed layer, transformers expects zero points that are not packed. It unpacks by the first group alone.
    if len(groups) > 1 or groups[0].get("input_activations"):
        raise UnsupportedError(
            f"{path} has packed zero points, and layers that are quantized in another way.",
            why="transformers unpacks them only if all quantized layers are alike, with float inputs.",
            hint="Quantize it again in one group, or without zero points (symmetric).",
        )
    return CompressedTensorsConfig(dequantize=True)


def _find_class(config: Any, trust_remote_code: bool, language_model: bool) -> tuple[str, Any]:
    """Return the name of the config's class, and the class to load: that one or, if transformers lacks it (or it has no
    head, for a `language_model`), the Auto class with a head."""
    import transformers
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

    architecture = str((config.architectures or [None])[0])
    named = getattr(transformers, architecture, None)
    # The order matters: an encoder's config maps to a causal class too, and Whisper's to one without its encoder.
    kinds = (AutoModelForSeq2SeqLM, AutoModelForMaskedLM, AutoModelForCausalLM)
    heads = kinds[:2] if config.is_encoder_decoder else kinds
    with_head = next((auto for auto in heads if type(config) in auto._model_mapping), None)
    if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
        if with_head and language_model and not find_family_of_class(architecture):
            return architecture, with_head._model_mapping[type(config)]
        return architecture, named
    auto_map = getattr(config, "auto_map", None) or {}
    remote = {name: str(reference).rpartition(".")[2] for name, reference in auto_map.items() if trust_remote_code}
    matching = (auto for auto in (*kinds, AutoModel) if remote.get(auto.__name__) == architecture)
    return architecture, next(matching, with_head or AutoModel)


def find_family_of_class(architecture: str) -> str | None:
    """Return the family of a transformers class: ``seq2seq``, ``masked`` or ``causal``; None for other classes."""
    from compressknow.model.meta import LANGUAGE_MODEL_CLASSES

    return next((family for family, names in LANGUAGE_MODEL_CLASSES.items() if architecture in names.values()), None)


def _load_whole(model_class: Any, path: Path, headless: str | None = None, **source: Any) -> Any:
    """Load a model; `headless` names the class without a head in its config. Raises CheckpointError for weights that
    transformers would fill at random: those with other shapes than the config's, and missing ones."""
    model, report = model_class.from_pretrained(**source, output_loading_info=True, ignore_mismatched_sizes=True)
    if mismatched := sorted(report["mismatched_keys"]):
        name, stored, needed = mismatched[0]
        more = f", and {len(mismatched) - 1} more do not fit" if len(mismatched) > 1 else ""
        raise CheckpointError(
            f"{path} does not match its config.json: {name} is {list(stored)}, but should be {list(needed)}{more}.",
            hint="Put the config.json that the weights were saved with in the same folder, or download both again.",
        )
    missing = report["missing_keys"]
    if missing and headless:
        raise CheckpointError(
            f"{path} has no language-modelling head: its config names {headless}, and it lacks {list_some(missing)}.",
            why="A head filled with random numbers would answer at random.",
            hint="Give a checkpoint of a masked, causal or sequence-to-sequence language model.",
        )
    if missing:
        raise CheckpointError(
            f"{path} lacks weights that its model needs: {list_some(missing)}.",
            why="transformers would fill them with random numbers, and every answer would be noise.",
            hint="Check that `architectures` in config.json names the class that the weights were saved from.",
        )
    return model


def _unpack(model: Any, device: str | torch.device) -> None:
    """Replace compressed-tensors' layers by the engine's if the device runs them, and unpack the others, module by
    module, like `ModelCompressor.decompress_model`. That function also adds its own device dispatch to the model, after
    which `generate` passes a dict to BART's decoder as its encoder's output."""
    from compressknow.engine.layers import LAYERS, EngineLinear
    from compressknow.model.meta import find_direct_reads

    compressor = getattr(getattr(model, "hf_quantizer", None), "compressor", None)
    if compressor is None:
        return
    from compressed_tensors.compressors.base import decompress_module
    from compressed_tensors.quantization.utils.helpers import is_module_quantized

    def runs(name: str) -> bool:
        with LAYERS.explain_failures(name):
            return LAYERS[name].runs_on(device)

    def make_layer(name: str, module: Any) -> EngineLinear | None:
        with LAYERS.explain_failures(name):
            layer = LAYERS[name].layer_of(module)
            if layer is not None and not (isinstance(layer, EngineLinear) and layer.word):
                raise TypeError("`layer_of` returns something other than an EngineLinear with a `word`")
        if layer is not None and LAYERS.is_added(name):
            layer.forward = partial(_run_added, layer, layer.forward, name, module.out_features)
        return layer

    # By module, so that a module with two names stays one.
    layers: dict[Any, Any] = {}
    kinds = [name for name in LAYERS if runs(name)]
    # Other modules read the weights of these, or cast hidden states to their dtype, which must be a float.
    in_floats = {model.get_submodule(name) for name in find_direct_reads(model)} if kinds else set()
    for module in model.modules():
        if is_module_quantized(module):
            candidates = filter(None, (make_layer(kind, module) for kind in kinds if module not in in_floats))
            if layer := next(candidates, None):
                layers[module] = layer
            else:
                decompress_module(module)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in layers:
                parent._modules[name] = layers[child]
    compressor.remove_decompression_hook(model)


def _run_added(
    layer: EngineLinear, forward: Callable[[torch.Tensor], torch.Tensor], kind: str, outputs: int, x: torch.Tensor
) -> torch.Tensor:
    """Run a layer of another package. Raises CompressknowError, which names the package, if it fails, or if its first
    output has another shape, which might be broadcast."""
    try:
        values = forward(x)
        if not layer.is_checked:
            if values.shape != (shape := (*x.shape[:-1], outputs)):
                raise ValueError(f"`forward` returns {list(values.shape)} instead of {list(shape)}")
            layer.is_checked = True
        return values
    except Exception:
        from compressknow.engine.layers import LAYERS

        # Only here, because it takes as long as a small product.
        with LAYERS.explain_failures(kind):
            raise


@contextlib.contextmanager
def _translate_errors(path: Path) -> Iterator[None]:
    """Raise any error of transformers on a damaged or foreign folder as one error that names the folder."""
    try:
        yield
    except CompressknowError:
        raise
    except ImportError as error:
        hint = f"pip install {error.name.partition('.')[0]}" if error.name else None
        raise CheckpointError(
            f"{path} needs a library that is not installed.", why=find_reason(error), hint=hint
        ) from error
    except Exception as error:
        raise CheckpointError(f"{path} cannot be loaded.", why=find_reason(error)) from error


# Replacements for advice of libraries to programmers, which would not help users here, or even harm them.
_ADVICE = {
    "out of memory|allocate memory": "There is not enough memory for it.",
    "weights.only": "Its .bin file holds more than tensors, and loading that could run code; or it is damaged.",
    "backend tokenizer": "It has no tokenizer.json, and no other file to build one from; some of these need "
    "sentencepiece or tiktoken.",
    "trust_remote_code": "It needs its own Python code. If you trust it, pass --trust-remote-code.",
}


def find_reason(error: BaseException) -> str:
    """Return the first line of a library's error; if it gives advice meant for programmers, a sentence for users."""
    text = str(error).strip()
    advice = next((words for sign, words in _ADVICE.items() if re.search(sign, text, re.IGNORECASE)), None)
    return advice or (text.splitlines() or [type(error).__name__])[0]
