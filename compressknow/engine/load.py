"""A checkpoint as a transformers model that computes what the checkpoint says, in every way it can be called."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressknow.engine.quiet import quiet
from compressknow.errors import CheckpointError, CompressknowError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model of a checkpoint folder, in eval mode; its class is the one that the config names.

    An int8 checkpoint keeps its int8 values, but they are unpacked to floats here: transformers itself does so only at
    the first forward of the whole model, so that `generate` fails where an encoder is called by itself (T5, BART).
    Activations are quantized as the checkpoint says.

    Parameters
    ----------
    folder : a local folder, converted or not.
    dtype : dtype of the weights that are not quantized; the checkpoint's own by default.
    trust_remote_code : run modelling code that lies in the folder.

    Raises
    ------
    CheckpointError : no such folder, or it cannot be loaded whole: a weight that the model needs is missing.
    """
    path = _checkpoint_folder(folder)
    with quiet(), _as_checkpoint_error(path):
        model_class = _model_class(path, trust_remote_code)
        model, report = model_class.from_pretrained(
            path,
            dtype=dtype or "auto",
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
        )
        _refuse_missing(path, report)
        _decompress(model)
    return model.to(device).eval()


def load_tokenizer(folder: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder. Raises CheckpointError where there is none."""
    from transformers import AutoTokenizer

    path = _checkpoint_folder(folder)
    with _as_checkpoint_error(path):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)


def _checkpoint_folder(folder: str | Path) -> Path:
    path = Path(folder)
    if not path.is_dir():
        raise CheckpointError(f"{folder}: no such folder.", hint="Give a checkpoint folder: config.json and weights.")
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json.", hint="A checkpoint folder has one beside its weights.")
    return path


def _model_class(path: Path, trust_remote_code: bool) -> Any:
    """The class that the config names or, where it names none that transformers has, the Auto class with a head."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    architecture = (config.architectures or [None])[0]
    named = getattr(transformers, architecture or "", None)
    if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
        return named
    return _auto_class(config, architecture, trust_remote_code)


def _auto_class(config: Any, architecture: str | None, trust_remote_code: bool) -> Any:
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForSeq2SeqLM,
    )

    auto_map = getattr(config, "auto_map", None) or {}
    for auto in (AutoModelForSeq2SeqLM, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModel):
        remote = str(auto_map.get(auto.__name__, ""))
        if trust_remote_code and remote.rpartition(".")[2] == architecture:
            return auto
    for auto in (AutoModelForSeq2SeqLM, AutoModelForCausalLM, AutoModelForMaskedLM):
        if type(config) in auto._model_mapping:
            return auto
    return AutoModel


def _refuse_missing(path: Path, report: dict[str, Any]) -> None:
    missing = sorted(report["missing_keys"])
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(
            f"{path} lacks weights that its model needs: {', '.join(missing[:3])}{more}.",
            why="transformers would fill them with random numbers, and every answer would be noise.",
            hint="See that `architectures` in config.json names the class that the weights were saved from.",
        )


def _decompress(model: Any) -> None:
    """Unpack int8 weights module by module, as `ModelCompressor.decompress_model` does. That one also puts the model
    under its own device dispatch first, after which `generate` hands BART's decoder a dict for its encoder's output.
    """
    compressor = getattr(getattr(model, "hf_quantizer", None), "compressor", None)
    if compressor is None:
        return
    from compressed_tensors.compressors.base import decompress_module
    from compressed_tensors.quantization.utils.helpers import is_module_quantized

    for module in model.modules():
        if is_module_quantized(module):
            decompress_module(module)
    compressor.remove_decompression_hook(model)


@contextlib.contextmanager
def _as_checkpoint_error(path: Path) -> Iterator[None]:
    """Whatever transformers raises on a damaged or foreign folder, as one error that names it."""
    try:
        yield
    except CompressknowError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{path} cannot be loaded.", why=lines[0]) from error
