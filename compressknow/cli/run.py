"""One place where errors become a message and an exit code."""

from __future__ import annotations

import errno
import io
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import click

from compressknow.cli.streams import STANDARD_OUTPUT, drop_output, fit_streams
from compressknow.cli.terminal import show
from compressknow.errors import CompressknowError, did_you_mean, is_panic

FAILED = 1
INTERRUPTED = 130
RESUMES = "The answers so far are kept: the same command resumes."
NOTHING_WRITTEN = "Nothing was written."


class _Stopped(SystemExit):
    """A signal asked this process to end."""


@contextmanager
def if_interrupted(note: str) -> Iterator[None]:
    """Let the message of an interrupted command say what has become of its work."""
    try:
        yield
    except (KeyboardInterrupt, _Stopped) as stop:
        stop.add_note(note)
        raise


def run(command: click.Command, args: list[str] | None = None) -> int:
    """Run `command` and return the exit code; whatever goes wrong is one message on stderr."""
    _exit_orderly_on_signals()
    with fit_streams(), _no_signal_lost():
        return _run(command, args)


def _run(command: click.Command, args: list[str] | None) -> int:
    try:
        returned = command.main(args, prog_name="compressknow", standalone_mode=False)
        sys.stdout.flush()
    except CompressknowError as error:
        _print_error(error.what, error.why, error.hint)
        return error.exit_code
    except click.ClickException as error:
        _show_usage(_suggested(error) if isinstance(error, click.NoSuchOption) else error)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt) as stop:
        # click raises its Abort from what stopped it.
        return _interrupted(stop.__cause__ or stop, INTERRUPTED)
    except _Stopped as stop:
        return _interrupted(stop, int(str(stop.code)))
    except OSError as error:
        return _os_error(error)
    except MemoryError:
        _print_error("There is not enough memory.", None, "Run it where there is more, or with a smaller --batch-size.")
        return FAILED
    except Exception as error:
        return _unexpected(error)
    except BaseException as error:
        if not is_panic(error):
            raise
        return _unexpected(error)
    return returned if isinstance(returned, int) else 0


def _interrupted(stop: BaseException, code: int) -> int:
    """The first note is that of who knew best."""
    notes = getattr(stop, "__notes__", ())
    show(f"Interrupted. {notes[0]}" if notes else "Interrupted", err=True)
    return code


def _unexpected(error: BaseException) -> int:
    _print_error(
        f"unexpected {type(error).__name__}: {error}",
        "This is a fault of compressknow, not of what you asked for.",
        "Run it again as `compressknow --debug ...` and report the traceback.",
    )
    return FAILED


def _show_usage(error: click.ClickException) -> None:
    said = io.StringIO()
    error.show(file=said)
    show(said.getvalue().rstrip("\n"), err=True)


def _suggested(error: click.NoSuchOption) -> click.UsageError:
    """The error with the one option that was probably meant, in place of click's list."""
    options = [name for option in error.ctx.command.params for name in option.opts] if error.ctx else []
    near = did_you_mean(error.option_name, [name for name in options if name.startswith("--")])
    return click.UsageError(f"{error.message} {near}".rstrip(), error.ctx)


def _print_error(what: str, *details: str | None) -> None:
    lines = [f"Error: {what}"]
    for detail in details:
        lines += [f"  {line}" for line in (detail or "").splitlines()]
    show("\n".join(lines), err=True)


def _os_error(error: OSError) -> int:
    if error.errno == errno.EPIPE or error.filename == STANDARD_OUTPUT:
        # It is flushed once more at exit: let that go nowhere.
        drop_output()
    if error.errno == errno.EPIPE:
        # The reader has gone (`| head`).
        return FAILED
    where = f": {error.filename}" if error.filename is not None else ""
    _print_error(f"{error.strerror or error}{where}")
    return FAILED


def _exit_orderly_on_signals() -> None:
    """Turn a request to end into SystemExit, so that temporary folders are removed on the way out."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        # A signal that the caller has chosen to ignore (nohup) stays ignored.
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _exit_orderly)


@contextmanager
def _no_signal_lost() -> Iterator[None]:
    """Python drops, with a traceback, a signal that comes while an object is removed: here it comes once more."""
    before = sys.unraisablehook

    def hook(dropped: sys.UnraisableHookArgs) -> None:
        stop = dropped.exc_value
        if isinstance(stop, (KeyboardInterrupt, _Stopped)):
            number = int(str(stop.code)) - 128 if isinstance(stop, _Stopped) else signal.SIGINT
            # Not at once: it would be dropped in here.
            threading.Timer(0.01, signal.raise_signal, [number]).start()
        else:
            before(dropped)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _exit_orderly(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    raise _Stopped(128 + number)
