"""A thread beside the main one: it does its task again and again, until it is told to end."""

from __future__ import annotations

import time
from itertools import repeat

from compressknow.base.progress import Repeating


def test_the_task_is_done_again_and_again_and_not_after_the_end() -> None:
    done: list[int] = []
    repeating = Repeating(lambda: done.append(1), repeat(0.001))
    while len(done) < 3:
        time.sleep(0.001)
    repeating.end()
    repeating.wait()
    before = len(done)
    time.sleep(0.02)
    assert len(done) == before
    repeating.wait()


def test_it_ends_by_itself_where_nothing_is_to_be_waited_for() -> None:
    done: list[int] = []
    Repeating(lambda: done.append(1), [0.001, 0.001]).wait()
    assert len(done) == 2
