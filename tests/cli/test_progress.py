"""Lines of progress on a terminal of 80 columns and in a file, and the time left."""

from __future__ import annotations

import io
import sys
import time
from dataclasses import replace
from itertools import count
from typing import Any

import pytest

from compressknow.base import progress
from compressknow.base.progress import Pace, Progress, Stage, relabel_progress, report_progress
from compressknow.cli import terminal
from compressknow.cli.terminal import WIDTH, ProgressLine, ProgressLines, announce, wrap

STAGE = Stage("evaluate", "smollm2-att-int8", "atlas", facts=4021, number=2, of=3)
CONVERTING = Stage("convert", "smollm2")


class Screen(io.StringIO):
    """Stream that is a terminal or a file."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    @property
    def lines(self) -> list[str]:
        """Lines in order, and each state of a line that changed."""
        return [line.rstrip("\b ") for line in self.getvalue().replace("\n", "\r").split("\r") if line.strip()]


@pytest.fixture
def no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DELAY_SECONDS", "SECONDS_ON_A_TERMINAL", "SECONDS_ELSEWHERE"):
        monkeypatch.setattr(terminal, name, 0.01)


def wait_for(screen: Screen, text: str) -> None:
    end = time.monotonic() + 20
    while text not in screen.getvalue():
        assert time.monotonic() < end, screen.getvalue()
        time.sleep(0.01)


def replace_stderr(monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> Screen:
    screen = Screen(terminal)
    monkeypatch.setattr(sys, "stderr", screen)
    return screen


on_terminal_and_in_file = pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "file"])


@on_terminal_and_in_file
@pytest.mark.usefixtures("no_delay")
def test_line_shows_model_probe_progress_and_time_left(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = replace_stderr(monkeypatch, terminal=terminal)
    with report_progress(ProgressLines(), STAGE) as advance:
        assert advance is not None
        wait_for(screen, "smollm2-att-int8 (2 of 3), atlas: 0 s so far")
        advance(0, 4021)
        wait_for(screen, "smollm2-att-int8 (2 of 3), atlas: 0 of 4,021 facts")
        advance(0, 4021, 300.0)
        wait_for(screen, "smollm2-att-int8 (2 of 3), atlas: 0 of 4,021 facts, 5 min left")
        advance(2000, 4021, 50.0)
        wait_for(screen, "atlas: 2,000 of 4,021 facts, 50 s left")
    assert max(map(len, screen.lines)) < 80


@pytest.mark.usefixtures("no_delay")
def test_line_with_wide_characters_fits_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = replace_stderr(monkeypatch, terminal=True)
    with report_progress(ProgressLines(), replace(STAGE, model="模" * 20, probe="facts:问题.jsonl")) as advance:
        assert advance is not None
        advance(2000, 4021, 50.0)
        wait_for(screen, "facts:")
        advance(4000, 4021)
    assert max(sum(2 if letter in "模问题" else 1 for letter in line) for line in screen.lines) == 79
    assert screen.getvalue().endswith(f"\r{' ' * 79}\r")


@on_terminal_and_in_file
def test_run_is_announced_once_before_the_first_batch_ends(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = replace_stderr(monkeypatch, terminal=terminal)
    lines = ProgressLines()
    for number in (1, 2):
        with report_progress(relabel_progress(lines, number=number, of=2), STAGE) as advance:
            assert advance is not None
            advance(0, 4021)
            advance(0, 4021, 270.0)
            advance(2000, 4021, 140.0)
    assert screen.lines == ["4,021 facts x 2 models on cpu: about 9 min."]


@pytest.mark.usefixtures("no_delay")
def test_line_is_erased_from_the_terminal_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = replace_stderr(monkeypatch, terminal=True)
    with report_progress(ProgressLines(), CONVERTING) as advance:
        assert advance is not None
        advance(1_000_000, 4_000_000)
        wait_for(screen, "Converting: 1.0 MB of 4.0 MB")
    *_, last, end = screen.getvalue().split("\r")
    assert (last.strip(), end) == ("", "")
    assert "\n" not in screen.getvalue()


@on_terminal_and_in_file
def test_short_work_shows_nothing(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = replace_stderr(monkeypatch, terminal=terminal)
    lines = ProgressLines()
    with report_progress(lines, STAGE) as advance, report_progress(lines, CONVERTING) as advance_conversion:
        assert advance is not None
        assert advance_conversion is not None
        advance(4021, 4021, 0.0)
        advance_conversion(1, 1)
    assert screen.getvalue() == ""


@pytest.mark.usefixtures("no_delay")
def test_closed_stream_does_not_stop_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = replace_stderr(monkeypatch, terminal=True)
    with report_progress(ProgressLines(), CONVERTING):
        screen.close()
        time.sleep(0.05)


def test_sequence_of_short_stages_has_a_line_per_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "DELAY_SECONDS", 0.01)
    monkeypatch.setattr(terminal, "SECONDS_ELSEWHERE", 0.5)
    screen, lines = replace_stderr(monkeypatch, terminal=False), ProgressLines()
    end = time.monotonic() + 20
    for number in count(1):
        with report_progress(lines, replace(STAGE, number=number, of=9)):
            time.sleep(0.1)
        if screen.lines:
            break
        assert time.monotonic() < end
    assert number > 1


@pytest.mark.parametrize("work", progress.Work.__args__)  # type: ignore[attr-defined]
def test_all_work_has_a_line(work: Any) -> None:
    stage = Stage(work, "llama")
    line = ProgressLine(stage, 0.0)
    line.update(Progress(stage, "advances", 1, 2))
    assert " 1 of 2 " in line.text() or "bytes" in line.text()


@pytest.mark.usefixtures("no_delay")
def test_line_of_a_speed_test_names_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = replace_stderr(monkeypatch, terminal=False)
    with report_progress(relabel_progress(ProgressLines(), number=15, of=20), Stage("time", "int4")):
        wait_for(screen, "Measuring the speed of int4 (15 of 20): 0 s so far")


@pytest.mark.usefixtures("no_delay")
def test_first_bytes_give_no_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = replace_stderr(monkeypatch, terminal=False)
    with report_progress(ProgressLines(), CONVERTING) as advance:
        assert advance is not None
        advance(24, 269_000_000)
        wait_for(screen, "Converting: 0 s so far")
        advance(269_000_000 // 2, 269_000_000)
        wait_for(screen, "Converting: 134.5 MB of 269.0 MB, 0 s left")


def test_time_left_is_that_of_the_remaining_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("compressknow.cli.terminal.time.monotonic", lambda: clock[0])
    line = ProgressLine(CONVERTING, 0.0)
    clock[0] += 25
    line.update(Progress(CONVERTING, "advances", 100_000_000, 300_000_000))
    assert line.text() == "Converting: 100.0 MB of 300.0 MB, 50 s left"


def test_time_left_does_not_count_what_comes_before_the_first_block(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("compressknow.cli.terminal.time.monotonic", lambda: clock[0])
    stage = Stage("sensitivity", "smollm2")
    line = ProgressLine(stage, 0.0)
    # The final layer takes as long as eight blocks.
    clock[0] += 480
    line.update(Progress(stage, "advances", 0, 30))
    assert line.text() == "Measuring the sensitivity: 8 min so far"
    clock[0] += 60
    line.update(Progress(stage, "advances", 1, 30))
    assert line.text() == "Measuring the sensitivity: 1 of 30 blocks, 29 min left"


def test_number_and_percent_sign_stay_on_one_line() -> None:
    filled = "x" * (WIDTH - 3)
    assert wrap(f"{filled} 2 %.", indent="") == [filled, "2 %."]


def test_a_name_with_hyphens_stays_on_one_line() -> None:
    filled, path = "x" * (WIDTH - 8), "study/cells/att-gp-50"
    assert wrap(f"{filled} {path}", indent="") == [filled, path]


def test_control_characters_of_a_name_are_not_written() -> None:
    line = ProgressLine(Stage("evaluate", "\x1b[31mred", "atlas", facts=1), 0.0)
    assert "\x1b" not in line.text()


def test_announcement_covers_the_remaining_models() -> None:
    def announce_stage(stage: Stage, done: int, left: float) -> str | None:
        return announce(Progress(stage, "advances", done, 4021, left))

    assert announce_stage(STAGE, 0, 30.0) == "4,021 facts x 2 models on cpu: about 1 min."
    assert announce_stage(STAGE, 0, 5.0) is None
    single = Stage("evaluate", "smollm2", "atlas", facts=8042)
    assert announce_stage(single, 2021, 100.0) == "8,042 facts on cpu: about 5 min."


def test_time_left_is_predicted_until_a_batch_is_measured() -> None:
    unmeasured = Pace(1000)
    unmeasured.add(10)
    assert unmeasured.left is None  # the first batch takes longer than later ones
    unmeasured.add(10)
    assert unmeasured.left is not None
    pace = Pace(1000, predicted=200)
    assert pace.left == 200
    pace.add(500)
    assert pace.left == 100
    pace.add(500)
    assert pace.left == 0


@pytest.mark.usefixtures("no_delay")
def test_second_run_of_the_original_has_its_own_line(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = replace_stderr(monkeypatch, terminal=False)
    again = Stage("evaluate", "smollm2", "atlas", facts=4021, number=2, of=3, again=True)
    with report_progress(ProgressLines(), again) as advance:
        assert advance is not None
        advance(2010, 4021, 3600.0)
        wait_for(screen, "smollm2 again, for the KL over all tokens, atlas: 2,010 of 4,021 facts")
    assert "about" not in screen.getvalue()
