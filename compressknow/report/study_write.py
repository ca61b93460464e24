"""A study on disk: the page, the same in Markdown and JSON, the tidy table, the figures."""

from __future__ import annotations

from pathlib import Path

from compressknow.report.study_records import Study
from compressknow.report.tidy import tidy_rows, to_csv, to_parquet
from compressknow.report.write import write_whole


def write_study(study: Study, folder: Path) -> None:
    """Write the study into `folder`, which is there; each file appears only when it is whole.

    ``cells.csv`` and ``cells.parquet``.
    """
    rows = tidy_rows(study)
    write_whole(folder / "cells.csv", to_csv(rows))
    write_whole(folder / "cells.parquet", to_parquet(rows))
