"""Parameters of a checkpoint in any supported format, and their values as floats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch

from compressknow.compress.blocks import READABLE, Block, Reader, get_matrix_shape
from compressknow.compress.schemes import dequantize, repeat_scales
from compressknow.model.checkpoint import Checkpoint
from compressknow.model.groups import list_parents, read_structure
from compressknow.model.loading import PACKED_DTYPES, NameMapping, find_packed_weights, find_suppliers
from compressknow.model.meta import build_meta_model
from compressknow.model.structure import LinearWeight, Structure
from compressknow.model.tensors import FLOAT_DTYPES, StoredTensor, get_torch_dtype, view_bytes


@dataclass(frozen=True)
class Values:
    """Stored values of a parameter: a tensor and, in few bits, its scale; `packed` is the tensor of values that share
    integers. If `numbers` are given, only these entries along `axis` count."""

    tensor: StoredTensor
    scale: StoredTensor | None = None
    packed: StoredTensor | None = None
    axis: int = 0
    numbers: tuple[int, ...] = ()

    @property
    def stored(self) -> StoredTensor:
        return self.packed or self.tensor

    @property
    def nbytes(self) -> int:
        return self.stored.nbytes + (self.scale.nbytes if self.scale else 0)

    @property
    def shape(self) -> tuple[int, ...]:
        whole = self.tensor.shape
        return (*whole[: self.axis], len(self.numbers), *whole[self.axis + 1 :]) if self.numbers else whole

    @property
    def rows(self) -> tuple[int, ...] | None:
        """Return the rows that are compared; None for all."""
        return self.numbers if self.numbers and self.axis < len(self.tensor.shape) - 1 else None

    @property
    def columns(self) -> list[int] | None:
        """Return the columns that are compared; None for all."""
        return list(self.numbers) if self.numbers and self.rows is None else None

    @property
    def bytes_read(self) -> int:
        """Count the bytes that are read, without scales."""
        rows = get_matrix_shape(self.shape)[0]
        return self.stored.nbytes // max(get_matrix_shape(self.tensor.shape)[0], 1) * rows

    def blocks(self, reader: Reader, columns: int | None = None, *, whole: bool = False) -> Iterator[Block]:
        """Yield blocks of the compared values, as `Reader.blocks` does; `columns` is by default the tensor's width."""
        width = get_matrix_shape(self.tensor.shape)[1]
        # Indexing with a tensor is several times as fast as with a list.
        indices = None if self.columns is None else torch.tensor(self.columns)
        for block in reader.blocks(self.stored, whole=whole, columns=columns or width, rows=self.rows):
            values = block.values if self.packed is None else _unpack(block.values, width, self.tensor.dtype)
            yield Block(block.first_row, values if indices is None else values[:, indices])

    def floats(self, reader: Reader) -> Iterator[tuple[Block, torch.Tensor]]:
        """Yield each block with its dequantized values, float64, which the next block does not overwrite."""
        scale = read_scales(reader, self)
        for block in self.blocks(reader):
            yield block, dequantize_block(self, block, scale)


def _unpack(packed: torch.Tensor, columns: int, dtype: str) -> torch.Tensor:
    """Unpack int8 [rows, columns] from int32 [rows, columns / 8] or [rows, columns / 4]."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    bits = next(bits for bits, name in PACKED_DTYPES.items() if name == dtype)
    integers: torch.Tensor = unpack_from_int32(packed, bits, torch.Size((len(packed), columns)))
    return integers.contiguous()


def read_scales(reader: Reader, values: Values) -> torch.Tensor | None:
    """Read float32 scales, [rows, groups], [rows, 1] or [1, 1], of the rows that are compared."""
    if values.scale is None:
        return None
    rows = get_matrix_shape(values.tensor.shape)[0] if values.scale.numel > 1 else 1
    buffer = torch.empty(rows, values.scale.numel // rows, dtype=get_torch_dtype(values.scale.dtype))
    reader.files.read_into(values.scale, view_bytes(buffer), 0)
    scale = buffer.to(torch.float32)
    return scale if rows == 1 or values.rows is None else scale[list(values.rows)]


def dequantize_block(values: Values, block: Block, scale: torch.Tensor | None) -> torch.Tensor:
    """Return float64 values of a block; `scale` is that of `read_scales`."""
    if scale is None:
        return block.values.to(torch.float64)
    scales = repeat_scales(scale if len(scale) == 1 else scale[block.rows], values.tensor.shape[-1])
    if scales.shape[-1] > 1 and values.columns is not None:
        scales = scales[:, values.columns]
    return dequantize(block.values, scales).to(torch.float64)


@dataclass(frozen=True)
class StoredWeights:
    """Stored values of a checkpoint, by parameter; tensors that are not loaded, or fused with others, by their names.

    Attributes
    ----------
    config : the settings in effect, including defaults.
    own : parameter -> the stored tensor of its name.
    supply : parameter -> the stored tensor with its values, ties resolved; includes `own`.
    loaded_to : stored tensor -> the parameter that it becomes part of, if it is fused with others on loading.
    parts : module -> its other stored tensors: scales, zero points, packed weights.
    unpacked : values of packed weights, by the name of the tensor that represents them in `own`.
    modules : module -> its name in `parts`, if modules are named by the numbers that their blocks had before others
        were dropped.
    """

    name: str
    config: dict[str, object]
    structure: Structure
    own: dict[str, StoredTensor]
    supply: dict[str, StoredTensor]
    loaded_to: dict[str, str]
    parts: dict[str, dict[str, StoredTensor]]
    unpacked: dict[str, Values] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)

    @cached_property
    def linears(self) -> dict[str, LinearWeight]:
        return {weight.parameter: weight for weight in self.structure.linears}

    def linear(self, key: str) -> LinearWeight | None:
        """Return the Linear weight that a tensor is, or is part of."""
        return self.linears.get(self.loaded_to.get(key, key))

    def values(self, key: str) -> Values | None:
        """Return a parameter's values; None if it has none, or none that can be read."""
        tensor = self.supply.get(key)
        if tensor and tensor.name in self.unpacked:
            return self.unpacked[tensor.name]
        if tensor is None or tensor.dtype not in READABLE:
            return None
        if self.linear(key) is None or tensor.dtype in (*FLOAT_DTYPES, "F64"):
            return Values(tensor)
        # Of quantized weights, only those of 8 bits with a scale can be read.
        scale = _find_scale(self.parts.get(tensor.name.removesuffix(".weight"), {}), tensor)
        return Values(tensor, scale) if tensor.dtype in ("I8", "F8_E4M3") and scale else None

    def packed(self, key: str) -> str | None:
        """Describe how a tensor with unreadable values is stored; None if they can be read, or it is not stored."""
        if self.values(key) is not None:
            return None
        tensor, module = self.supply.get(key), key.removesuffix(".weight")
        # With renumbered blocks, a module that is not among these was dropped.
        module = self.modules.get(module, "") if self.modules else module
        stored = ([tensor] if tensor else []) + list(self.parts.get(module, {}).values())
        names = (f"{part.name.removeprefix(module + '.')} {part.dtype}" for part in stored)
        return " + ".join(names) if stored else None

    def packed_weights(self) -> Iterator[str]:
        """Yield the Linear weights that are stored only as packed values, not under their own names."""
        return (name for name in self.linears if name not in self.supply and self.packed(name))


def _find_scale(parts: Mapping[str, StoredTensor], tensor: StoredTensor) -> StoredTensor | None:
    """Return the scale of a symmetric low-bit weight of compressed-tensors: per tensor, row or group of columns."""
    scale = parts.get(f"{tensor.name}_scale")
    # Zero points, and groups of columns that are not adjacent, are not supported.
    is_unsupported = any(f"{tensor.name}_{part}" in parts for part in ("zero_point", "g_idx"))
    if scale is None or is_unsupported or scale.dtype not in FLOAT_DTYPES:
        return None
    rows, columns = get_matrix_shape(tensor.shape)
    per_group = len(scale.shape) == 2 and scale.shape[0] == rows and scale.shape[1] and not columns % scale.shape[1]
    # Scales of two-dimensional blocks may be as many as the rows.
    per_row = scale.numel == rows and scale.shape[:1] == tensor.shape[:1]
    return scale if scale.numel == 1 or per_row or per_group else None


def read_stored_weights(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> StoredWeights:
    """Read the headers of a checkpoint's stored weights. Raises CheckpointError if it has none, or builds no model."""
    checkpoint.check_has_weights()
    model = build_meta_model(checkpoint.folder, trust_remote_code=trust_remote_code, tensor_names=checkpoint.tensors)
    structure, naming = read_structure(model), NameMapping(model)
    bound, packed = naming.bind(checkpoint.tensors), find_packed_weights(checkpoint, naming, structure)
    # By their names in the tree and in the files, which differ if the architecture's modules were renamed since.
    names = (*structure.parameters, *bound, *(words.name for words, _ in packed.values()))
    modules = {name.rpartition(".")[0] for name in names} - {""}
    quantized = "quantization_config" in checkpoint.config
    own: dict[str, StoredTensor] = {}
    loaded_to: dict[str, str] = {}
    parts: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in checkpoint.tensors.items():
        binding = bound.get(name)
        if binding and not binding.reshaped:
            own[binding.parameter] = tensor
        elif binding is None and quantized and (module := next(filter(modules.__contains__, list_parents(name)), None)):
            parts.setdefault(module, {})[name] = tensor
        else:
            own[name] = tensor
            if binding:
                loaded_to[name] = binding.parameter
    unpacked: dict[str, Values] = {}
    quantized_weights: dict[str, StoredTensor] = {}
    for parameter in (weight.parameter for weight in structure.linears if weight.parameter in packed):
        words, values = packed[parameter]
        if scale := _find_scale(checkpoint.tensors, values):
            quantized_weights[parameter], unpacked[values.name] = values, Values(values, scale, words)
    own |= quantized_weights
    stored = find_suppliers(checkpoint, bound, structure.tied)
    # A packed final layer has its own values even if it was tied.
    supply = own | {parameter: checkpoint.tensors[name] for parameter, name in stored.items()} | quantized_weights
    return StoredWeights(checkpoint.name, model.config.to_dict(), structure, own, supply, loaded_to, parts, unpacked)
