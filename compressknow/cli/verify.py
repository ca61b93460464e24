"""`compressknow verify`: check a converted checkpoint against its manifest."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from compressknow.base.errors import CompressknowError
from compressknow.base.format import count, write_size
from compressknow.cli.options import PATH, command, option, threads_option
from compressknow.cli.terminal import ProgressLines, show, show_json, wrap


@command()
@click.argument("folder", type=PATH)
@threads_option
@option("--json", "as_json", is_flag=True, help="Print every difference as JSON.")
def verify(folder: Path, threads: int | None, as_json: bool) -> int:
    """Compare FOLDER, which `compressknow convert` wrote, with its manifest: hashes, zeros, dtypes and shapes.

    Instead of a folder, a GGUF file that `compressknow export` wrote is compared with the record next to it.

    Files that are not in the manifest are listed, and an edited manifest is reported. The exit code is 1 if anything
    differs. The model card, README.md, may be edited and is not compared.
    """
    from compressknow.api.verify import verify as run

    result = run(folder, threads=threads, on_progress=ProgressLines(), check=not as_json)
    if as_json:
        show_json(asdict(result))
        return CompressknowError.exit_code if result.differences else 0
    compared = f"{count(result.tensors)} tensors match the record"
    if folder.suffix != ".gguf":
        compared = f"{count(result.tensors)} tensors and {result.files} files match the manifest"
    show(f"{folder}: {compared} ({write_size(result.bytes)}).")
    for note in result.notes:
        show(*wrap(f"! {note}"))
    return 0
