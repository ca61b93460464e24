"""What is said of how far a run is: on a terminal of 80 columns, in a file, and of the time that is left."""

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
    """A stream that keeps what was written to it, and says whether it is a terminal."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    @property
    def lines(self) -> list[str]:
        """What was to be seen, one state of a line after the other."""
        return [line.rstrip("\b ") for line in self.getvalue().replace("\n", "\r").split("\r") if line.strip()]


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DELAY_SECONDS", "SECONDS_ON_A_TERMINAL", "SECONDS_ELSEWHERE"):
        monkeypatch.setattr(terminal, name, 0.01)


def until(screen: Screen, text: str) -> None:
    end = time.monotonic() + 20
    while text not in screen.getvalue():
        assert time.monotonic() < end, screen.getvalue()
        time.sleep(0.01)


def watch(monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> Screen:
    screen = Screen(terminal)
    monkeypatch.setattr(sys, "stderr", screen)
    return screen


both = pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "file"])


@both
@pytest.mark.usefixtures("often")
def test_a_line_says_which_model_which_probe_how_far_and_how_long_still(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = watch(monkeypatch, terminal=terminal)
    with report_progress(ProgressLines(), STAGE) as told:
        assert told is not None
        until(screen, "smollm2-att-int8 (2 of 3), atlas: 0 s so far")
        told(0, 4021)
        until(screen, "smollm2-att-int8 (2 of 3), atlas: 0 of 4,021 facts")
        told(0, 4021, 300.0)
        until(screen, "smollm2-att-int8 (2 of 3), atlas: 0 of 4,021 facts, 5 min left")
        told(2000, 4021, 50.0)
        until(screen, "atlas: 2,000 of 4,021 facts, 50 s left")
    assert max(map(len, screen.lines)) < 80


@pytest.mark.usefixtures("often")
def test_a_line_in_wide_letters_fits_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = watch(monkeypatch, terminal=True)
    with report_progress(ProgressLines(), replace(STAGE, model="模" * 20, probe="facts:问题.jsonl")) as told:
        assert told is not None
        told(2000, 4021, 50.0)
        until(screen, "facts:")
        told(4000, 4021)
    assert max(sum(2 if letter in "模问题" else 1 for letter in line) for line in screen.lines) == 79
    assert screen.getvalue().endswith(f"\r{' ' * 79}\r")


@both
def test_the_whole_run_is_announced_once_before_the_first_batch_is_done(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = watch(monkeypatch, terminal=terminal)
    lines = ProgressLines()
    for number in (1, 2):
        with report_progress(relabel_progress(lines, number=number, of=2), STAGE) as told:
            assert told is not None
            told(0, 4021)
            told(0, 4021, 270.0)
            told(2000, 4021, 140.0)
    assert screen.lines == ["4,021 facts x 2 models on cpu: about 9 min."]


@pytest.mark.usefixtures("often")
def test_nothing_of_a_changing_line_stays_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = watch(monkeypatch, terminal=True)
    with report_progress(ProgressLines(), CONVERTING) as told:
        assert told is not None
        told(1_000_000, 4_000_000)
        until(screen, "Converting: 1.0 MB of 4.0 MB")
    *_, last, end = screen.getvalue().split("\r")
    assert (last.strip(), end) == ("", "")
    assert "\n" not in screen.getvalue()


@both
def test_work_that_ends_at_once_shows_nothing(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = watch(monkeypatch, terminal=terminal)
    lines = ProgressLines()
    with report_progress(lines, STAGE) as told, report_progress(lines, CONVERTING) as bytes_told:
        assert told is not None
        assert bytes_told is not None
        told(4021, 4021, 0.0)
        bytes_told(1, 1)
    assert screen.getvalue() == ""


@pytest.mark.usefixtures("often")
def test_a_screen_that_has_gone_stops_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = watch(monkeypatch, terminal=True)
    with report_progress(ProgressLines(), CONVERTING):
        screen.close()
        time.sleep(0.05)


def test_short_stages_one_after_the_other_have_a_line_a_minute_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "DELAY_SECONDS", 0.01)
    monkeypatch.setattr(terminal, "SECONDS_ELSEWHERE", 0.5)
    screen, lines = watch(monkeypatch, terminal=False), ProgressLines()
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


@pytest.mark.usefixtures("often")
def test_of_speeds_the_line_says_whose(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = watch(monkeypatch, terminal=False)
    with report_progress(relabel_progress(ProgressLines(), number=15, of=20), Stage("time", "int4")):
        until(screen, "Measuring the speed of int4 (15 of 20): 0 s so far")


@pytest.mark.usefixtures("often")
def test_the_first_bytes_tell_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = watch(monkeypatch, terminal=False)
    with report_progress(ProgressLines(), CONVERTING) as told:
        assert told is not None
        told(24, 269_000_000)
        until(screen, "Converting: 0 s so far")
        told(269_000_000 // 2, 269_000_000)
        until(screen, "Converting: 134.5 MB of 269.0 MB, 0 s left")


def test_a_number_and_its_percent_sign_stay_on_one_line() -> None:
    filled = "x" * (WIDTH - 3)
    assert wrap(f"{filled} 2 %.", indent="") == [filled, "2 %."]


def test_control_characters_of_a_name_are_not_written() -> None:
    line = ProgressLine(Stage("evaluate", "\x1b[31mred", "atlas", facts=1), 0.0)
    assert "\x1b" not in line.text()


def test_an_announcement_counts_the_models_that_are_still_to_be_asked() -> None:
    def said(stage: Stage, done: int, left: float) -> str | None:
        return announce(Progress(stage, "advances", done, 4021, left))

    assert said(STAGE, 0, 30.0) == "4,021 facts x 2 models on cpu: about 1 min."
    assert said(STAGE, 0, 5.0) is None
    of_one = Stage("evaluate", "smollm2", "atlas", facts=8042)
    assert said(of_one, 2021, 100.0) == "8,042 facts on cpu: about 5 min."


def test_the_time_left_is_that_of_a_sample_until_a_batch_is_done() -> None:
    unmeasured = Pace(1000)
    unmeasured.add(10)
    assert unmeasured.left is None  # the first batch of all prepares what later ones find done
    unmeasured.add(10)
    assert unmeasured.left is not None
    pace = Pace(1000, sample=10, seconds=2.0)
    assert pace.left == pytest.approx(200, rel=0.05)
    pace.add(1000)
    assert pace.left == 0


def test_the_original_that_runs_again_is_told_apart(often: None, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = watch(monkeypatch, terminal=False)
    again = Stage("evaluate", "smollm2", "atlas", facts=4021, number=2, of=3, again=True)
    with report_progress(ProgressLines(), again) as told:
        assert told is not None
        told(2010, 4021, 3600.0)
        until(screen, "smollm2 again, for the KL over all tokens, atlas: 2,010 of 4,021 facts")
    assert "about" not in screen.getvalue()
