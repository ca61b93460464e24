"""The tensors of a quantized GGUF file rounded anew by GPTQ, in place: block by block, while the model runs over texts.

The file has its types and sizes already, from llama.cpp; only codes and scales change.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compressknow.compress.calibrate.gathering import Key
from compressknow.compress.calibrate.observe import Batches, observe
from compressknow.compress.calibrate.statistics import InputStatistics
from compressknow.compress.calibrate.text import BATCH_TOKENS
from compressknow.compress.pool import Pool
from compressknow.gguf.calibration import LEAST_TOKENS
from compressknow.gguf.rounding import LAYOUTS, round_gptq
from compressknow.gguf.tensors import Tensors
from compressknow.model.loading import open_complete
from compressknow.quiet import Begin


def batches_of(sequences: Sequence[Sequence[int]]) -> list[dict[str, torch.Tensor]]:
    """Return token ids as batches of sequences of one length: nothing is padded."""
    by_length: dict[int, list[Sequence[int]]] = {}
    for sequence in sequences:
        if sequence:
            by_length.setdefault(len(sequence), []).append(sequence)
    return [
        {"input_ids": torch.tensor(alike[start : start + rows])}
        for length, alike in sorted(by_length.items())
        for rows in [max(BATCH_TOKENS // length, 1)]
        for start in range(0, len(alike), rows)
    ]


def round_file(
    output: Path,
    exact: Path,
    tensors: Tensors,
    same_channels: Collection[str],
    source: Path,
    texts: Sequence[Batches],
    *,
    folder: Path,
    threads: int | None,
    begin: Begin,
    trust_remote_code: bool,
) -> list[str]:
    """Round what the texts reach, and write it over what stands in `output`; return the names of these tensors.

    Parameters
    ----------
    exact : the file with the same tensors in 32 or 16 bits, of which `tensors` tells.
    same_channels : the tensors whose input channels are those of the checkpoint, in its order.
    source : the checkpoint, of floats.
    texts : each counts as much as the others.
    folder : where large hidden states lie meanwhile.
    """
    import gguf

    checkpoint, tree = open_complete(source, trust_remote_code=trust_remote_code)
    made, floats = gguf.GGUFReader(output, "r+"), gguf.GGUFReader(exact)
    rounding = _Rounding(tensors, same_channels, made, floats)
    with begin("round") as advance:
        observe(
            checkpoint,
            tree,
            texts,
            rounding.visit,
            products=True,
            threads=threads,
            folder=folder,
            told=advance or max,
        )
    made.data.flush()
    return rounding.names


@dataclass(frozen=True)
class _Part:
    """A matrix of a tensor: what is written over, its exact values, and what is known of its inputs."""

    kind: str
    stored: Any
    floats: Any
    exact_type: Any
    inputs: InputStatistics

    def round(self) -> None:
        import gguf

        # A copy: torch takes no array that cannot be written to, such as one of a file.
        exact = gguf.dequantize(self.floats, self.exact_type).astype(np.float32, order="C")
        self.stored[...] = round_gptq(torch.from_numpy(exact), self.kind, self.inputs)


class _Rounding:
    def __init__(self, tensors: Tensors, same_channels: Collection[str], made: Any, floats: Any) -> None:
        self._made = {tensor.name: tensor for tensor in made.tensors}
        self._floats = {tensor.name: tensor for tensor in floats.tensors}
        # Of what was merged, all parts read the same.
        self._names = {
            weights[0].parameter: name for name, weights in tensors.weights.items() if name in set(same_channels)
        }
        self.names: list[str] = []

    def visit(self, seen: Mapping[Key, InputStatistics], pool: Pool) -> None:
        """Round what a block has, by what was seen of its inputs."""
        pool.map(_Part.round, list(self._parts(seen)))

    def _parts(self, seen: Mapping[Key, InputStatistics]) -> Iterator[_Part]:
        for key, inputs in seen.items():
            name = self._names.get(key.parameter)
            kind = self._made[name].tensor_type.name.lower() if name else None
            if name is None or kind not in LAYOUTS:
                continue
            stored, floats = self._made[name].data, self._floats[name]
            values = floats.data
            if stored.ndim > 2:
                if inputs.tokens < LEAST_TOKENS:
                    continue
                stored, values = stored[key.matrix], values[key.matrix]
            if name not in self.names:
                self.names.append(name)
            yield _Part(kind, stored, values, floats.tensor_type, inputs)
