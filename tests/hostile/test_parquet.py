"""Parquet files that unpack to gigabytes are refused before they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from compressknow.base.errors import CompressknowError, UsageError
from compressknow.base.reading import check_parquet
from compressknow.evaluate.answers import make_schema, read_table
from tests.evaluate.layouts import read_hub_facts
from tests.hostile.bounded import bounded


def write_answers_bomb(path: Path, **columns: Any) -> None:
    """Write a small file of many equal rows with these values."""
    row: dict[str, Any] = {name: "" for name in make_schema().names if make_schema().field(name).type == pa.string()}
    row |= {"correct": True, "top5": [], "top5_logp": [], "first_ids": [], "first_logp": []}
    rows = [row | columns] * 20_000
    with pq.ParquetWriter(path, make_schema(), compression="zstd") as writer:
        for _ in range(5):
            writer.write_table(pa.Table.from_pylist(rows, schema=make_schema()))


def test_answers_with_the_same_text_in_every_row_are_refused(tmp_path: Path) -> None:
    write_answers_bomb(tmp_path / "answers.parquet", prompt="x" * 20_000)
    assert (tmp_path / "answers.parquet").stat().st_size < 1 << 20
    with bounded(), pytest.raises(CompressknowError, match="cannot be read as answers") as caught:
        read_table(tmp_path / "answers.parquet")
    assert "its texts would unpack" in str(caught.value)


def test_too_many_equal_values_are_refused(tmp_path: Path) -> None:
    table = pa.table({"n": pa.nulls(40_000_000, pa.int32())})
    with pq.ParquetWriter(tmp_path / "t.parquet", table.schema, compression="zstd") as writer:
        for _ in range(3):
            writer.write_table(table)
    with bounded(), pytest.raises(ValueError, match="more than 64,000,000 values"):
        check_parquet(tmp_path / "t.parquet")


def test_dataset_that_unpacks_to_gigabytes_is_refused(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["x [MASK] " + "y" * 50_000] * 2000, "obj_label": ["z"] * 2000})
    (tmp_path / "data").mkdir()
    with pq.ParquetWriter(tmp_path / "data" / "t.parquet", table.schema) as writer:
        for _ in range(20):
            writer.write_table(table)
    for name in (tmp_path, tmp_path / "data" / "t.parquet"):
        with bounded(), pytest.raises(UsageError, match=r"t.parquet cannot be read: its texts would unpack"):
            read_hub_facts(str(name))
