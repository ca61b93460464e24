"""Push what convert or export wrote to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from compressknow.api.keywords import api_function
from compressknow.base.hub import Upload, check_login, check_repo, upload
from compressknow.gguf.record import read_record
from compressknow.model.manifest import read_manifest
from compressknow.pages.model_card import render_gguf_card


@api_function
def push(output: str | Path, repo: str, *, private: bool | None = None, bars: bool = False) -> Upload:
    """Upload a folder that `convert` wrote, or a GGUF file that `export` wrote, to the Hugging Face Hub.

    With a folder, this uploads weights, tokenizer, manifest and the current model card, including what `report` wrote
    into it; with a file, also its record and, if the repository has none, a model card.

    Parameters
    ----------
    output : what `convert` or `export` wrote.
    repo : ``OWNER/NAME``, or ``NAME`` under your own account; it is created if it does not exist.
    private : for a new repository; by default public, unless its organization's default is private.
    bars : show huggingface_hub's progress bars, on a terminal.

    Returns
    -------
    The repository's address, and the weight files there that are not from `output`.

    Raises
    ------
    compressknow.CompressknowError : the name is not valid, there is no token, or the upload failed; `output` is not
        changed. The token is huggingface_hub's: `HF_TOKEN`, or that of `hf auth login`.
    """
    check_repo(repo)
    check_login()
    path, card = Path(output), None
    if path.suffix == ".gguf":
        record = read_record(path)
        card = render_gguf_card(record, path.name)
    else:
        record = read_manifest(path)
    message = f"{record['setup']} of {record['source']['name']}, by compressknow"
    return upload(path, repo, private=private, message=message, card=card, bars=bars)
