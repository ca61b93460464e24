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

    Of a folder go weights, tokenizer, manifest, and its model card as it is now, with what `report` has written into
    it; of a file, its record and, where the repository has none, a model card.

    Parameters
    ----------
    output : what `convert` or `export` wrote.
    repo : ``OWNER/NAME``, or ``NAME`` of one of your own; created if it does not exist.
    private : of a repository that is made; by default public, unless its organization says else.
    bars : show huggingface_hub's progress bars, on a terminal.

    Returns
    -------
    The repository's address, and the weight files there that are not of this folder.

    Raises
    ------
    compressknow.CompressknowError : the name cannot be one, there is no token, or the upload failed; `output`
        stays as it is. The token is taken from where huggingface_hub keeps it: `HF_TOKEN`, or `hf auth login`.
    """
    check_repo(repo)
    check_login()
    place, card = Path(output), None
    if place.suffix == ".gguf":
        record = read_record(place)
        card = render_gguf_card(record, place.name)
    else:
        record = read_manifest(place)
    message = f"{record['setup']} of {record['source']['name']}, by compressknow"
    return upload(place, repo, private=private, message=message, card=card, bars=bars)
