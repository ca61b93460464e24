"""A server of runs per pytest worker, and the folders that its tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.scenes import Stage
from tests.faults.targets import Bench
from tests.faults.warm import RunServer, start_server


@pytest.fixture(scope="session")
def server() -> Iterator[RunServer]:
    with start_server() as server:
        yield server


@pytest.fixture(scope="session")
def stage(server: RunServer, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Stage(tmp_path_factory.mktemp("stage") / "scenes", server)


@pytest.fixture(scope="session")
def bench(server: RunServer, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"), server)
