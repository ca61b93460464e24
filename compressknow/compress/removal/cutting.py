"""Cut tensors, written to files of their own from which all later steps read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import torch

from compressknow.compress.blocks import Block, Reader
from compressknow.compress.removal.neurons import Cut
from compressknow.compress.removal.smaller import Removal
from compressknow.model.tensors import StoredTensor, byte_view, torch_dtype


@dataclass(frozen=True)
class KeptNeurons:
    """The neurons of a feed-forward network that stay (`numbers`, int64, ascending), and new weights [out, kept] of the
    projection that reads them; None leaves it as it was."""

    numbers: torch.Tensor
    down: torch.Tensor | None = None


def cut_tensors(
    reader: Reader, removal: Removal, kept: Mapping[str, KeptNeurons], folder: Path
) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """Write the cut tensors of a removal into `folder`, in files named as the weight files that they come from.

    Parameters
    ----------
    kept : of each feed-forward network, by the parameter name of its down projection.

    Returns
    -------
    The tensors in their new places, by stored name; and, of those with new weights, what they would be without.
    """
    made: dict[str, StoredTensor] = {}
    unfitted: dict[str, StoredTensor] = {}
    files: dict[Path, BinaryIO] = {}
    try:
        for name, cut in removal.cuts.items():
            path = folder / cut.source.file.relative_to(removal.checkpoint.folder)
            if path not in files:
                path.parent.mkdir(parents=True, exist_ok=True)
                files[path] = path.open("xb")
            stored, neurons = removal.checkpoint.tensors[name], kept[cut.network.down.parameter]
            versions = [(made, neurons)]
            if neurons.down is not None and cut.parameter == cut.network.down.parameter:
                versions.append((unfitted, replace(neurons, down=None)))
            for tensors, version in versions:
                tensors[name] = replace(stored, file=path, offset=files[path].tell(), loaded=None)
                for rows in _rows(reader, cut, version):
                    files[path].write(byte_view(rows.contiguous()))
    finally:
        for file in files.values():
            file.close()
    return made, unfitted


def _rows(reader: Reader, cut: Cut, kept: KeptNeurons) -> Iterator[torch.Tensor]:
    """A cut tensor in pieces, in its own dtype."""
    down = cut.network.down
    if kept.down is not None and cut.parameter == down.parameter:
        values = kept.down.T if down.transposed else kept.down
        yield values.to(torch_dtype(cut.source.dtype))
        return
    numbers = torch.cat([kept.numbers + cut.network.width * part for part in range(cut.each)])
    for block in reader.blocks(cut.source):
        yield _part(block, cut, numbers)


def _part(block: Block, cut: Cut, numbers: torch.Tensor) -> torch.Tensor:
    """What stays of some rows of a tensor; its last axis are the columns of a block."""
    if cut.axis == len(cut.source.shape) - 1:
        return block.values[:, numbers]
    rows = block.rows
    inside = numbers[(numbers >= rows.start) & (numbers < rows.stop)]
    return block.values[inside - rows.start]
