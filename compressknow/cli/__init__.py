"""Command line: list the commands, import and run the one that is called, and report errors with an exit code."""

from __future__ import annotations

import _thread
import errno
import importlib
import io
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import click

from compressknow._version import __version__
from compressknow.base.errors import (
    CompressknowError,
    GateNotMet,
    GateUndecided,
    UnusedOptions,
    UsageError,
    is_out_of_memory,
    is_panic,
    suggest_word,
)
from compressknow.base.format import count
from compressknow.base.packages import build_not_installed
from compressknow.cli.options import describe_project_defaults, join_options, option, read_project_defaults
from compressknow.cli.terminal import STANDARD_OUTPUT, drop_output, fit_streams, show, wrap_whole

# In the order in which a user needs them; each is a function in a module of the same name.
COMMANDS = {
    "inspect": "Show a checkpoint's Linear layers by group and scope.",
    "convert": "Prune and quantize a checkpoint into a new folder.",
    "export": "Write a checkpoint as a GGUF file for llama.cpp.",
    "verify": "Check a converted checkpoint against its manifest.",
    "probe": "Evaluate a model on facts, and store its answers.",
    "report": "Show which knowledge compressed models kept and lost.",
    "compare": "Show how two checkpoints differ.",
    "sweep": "Evaluate a model compressed by every recipe of a grid.",
    "sensitivity": "Show which weights hold a model's knowledge.",
    "search": "Find the smallest file that keeps a share of knowledge.",
}


class LazyGroup(click.Group):
    """Group of `COMMANDS`, each imported only when it is called, so that `--help` is instant."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Return the names in order."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import the command of that name; None if there is none."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(f"compressknow.cli.{cmd_name}"), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write the list of commands without importing any of them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Resolve as click does, but suggest commands for an unknown one, and read the project's defaults."""
        if not ctx.resilient_parsing and args[0] not in COMMANDS and not args[0].startswith("-"):
            near = suggest_word(args[0], COMMANDS)
            ctx.fail(f"No such command '{args[0]}'. {near}Choose from {', '.join(COMMANDS)}.")
        name, command, rest = super().resolve_command(ctx, args)
        if name is not None and command is not None and not ctx.resilient_parsing:
            open_command = partial(self.get_command, ctx)
            # Someone who corrects a project's file may need the help.
            needs_help = not {"-h", "--help"}.isdisjoint(rest)
            with suppress(UsageError) if needs_help else nullcontext():
                ctx.default_map = {name: read_project_defaults(name, command, COMMANDS, open_command)}
        return name, command, rest

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; note which options a project's file sets on a usage error, and print any with `--debug`."""
        try:
            return super().invoke(ctx)
        except SystemExit as stop:
            if isinstance(stop, _Stopped):
                raise
            # Code of another package: its exit code may say that all went well. `exit` is itself a frame, without file.
            files = [frame.filename for frame in traceback.extract_tb(stop.__traceback__)]
            file = next(file for file in reversed(files) if not file.startswith("<"))
            raise CompressknowError(
                f"{file} ended the program (SystemExit: {stop.code}).",
                hint="Update or uninstall the package that it belongs to.",
            ) from stop
        except Exception as error:
            if type(error) in (click.BadParameter, UsageError, UnusedOptions):
                for name, defaults in (ctx.default_map or {}).items():
                    if defaults and (command := self.get_command(ctx, name)):
                        error.add_note(describe_project_defaults(command, defaults))
            click_errors = (click.ClickException, click.exceptions.Exit, click.Abort)
            if ctx.params.get("debug") and not isinstance(error, click_errors):
                show(traceback.format_exc(), err=True)
            raise


FAILED = 1
INTERRUPTED = 130
RESUMES = "Any answers so far are saved. Repeat the command to resume."
NOTHING_WRITTEN = "Nothing was written."
# How often a thread of GCC's OpenMP, which torch and llama.cpp use, polls for the others before it sleeps. The default,
# 300,000 times, occupies a core that the other threads may need (docs/performance.md).
SPIN_COUNT = 5000


class _Stopped(SystemExit):
    """Raised when a signal asks this process to end."""


@contextmanager
def explain_interrupt(note: str, folder: Path | None = None) -> Iterator[None]:
    """Add to the message of an interrupted command what happened to its work; nothing, if its folder does not exist."""
    try:
        yield
    except (KeyboardInterrupt, _Stopped) as stop:
        stop.add_note(note if folder is None or folder.exists() else NOTHING_WRITTEN)
        raise


@contextmanager
def show_before_error(show_result: Callable[[Any], object]) -> Iterator[None]:
    """Show the result that a gate was checked on, before its error."""
    try:
        yield
    except (GateNotMet, GateUndecided) as error:
        show_result(error.result)
        raise


def run(command: click.Command, args: list[str] | None = None) -> int:
    """Run `command` and return the exit code; any error is one message on stderr."""
    if "OMP_WAIT_POLICY" not in os.environ:
        # Read when torch is imported.
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
    _stop_orderly_on_signals()
    with fit_streams(), _repeat_dropped_signals():
        return _run(command, args)


def _run(command: click.Command, args: list[str] | None) -> int:
    try:
        returned = command.main(args, prog_name="compressknow", standalone_mode=False)
        sys.stdout.flush()
    except CompressknowError as error:
        _report_failure(*error.of_options, *getattr(error, "__notes__", ()))
        return error.exit_code
    except click.ClickException as error:
        message = io.StringIO()
        (_suggest(error) if isinstance(error, click.NoSuchOption) else error).show(file=message)
        show(message.getvalue().rstrip("\n"), *(f"  {note}" for note in getattr(error, "__notes__", ())), err=True)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt) as stop:
        # click raises Abort from the original exception.
        return _report_interrupt(stop.__cause__ or stop, INTERRUPTED)
    except _Stopped as stop:
        return _report_interrupt(stop, int(str(stop.code)))
    except OSError as error:
        return _report_os_error(error)
    except ImportError as error:
        return _report_missing(error)
    except BaseException as error:
        if is_out_of_memory(error):
            hint = "Use a machine with more memory, or a smaller --batch-size where a model answers."
            return _report_failure("There is not enough memory.", hint)
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        return _report_bug(error)
    return returned if isinstance(returned, int) else 0


def _report_interrupt(stop: BaseException, code: int) -> int:
    """Print the first note, which was added closest to the interrupted work."""
    notes = getattr(stop, "__notes__", ())
    show(f"Interrupted. {notes[0]}" if notes else "Interrupted", err=True)
    return code


def _report_missing(error: ImportError) -> int:
    """Name a library that every command needs, or one that another library needs."""
    if (error.path or "").endswith((".so", ".pyd")):
        hint = "Install it again, or what it needs of the system; or use a machine with more memory."
        return _report_failure(f"A compiled library cannot be loaded: {error}", hint)
    module = (error.name or "").partition(".")[0]
    if module in ("", "compressknow") or not isinstance(error, ModuleNotFoundError):
        return _report_bug(error)
    return _report_failure(build_not_installed(module).what)


def _report_bug(error: BaseException) -> int:
    return _report_failure(
        f"unexpected {type(error).__name__}: {error}",
        "This is a bug in compressknow.",
        "Run it again as `compressknow --debug ...` and report the traceback.",
    )


def _suggest(error: click.NoSuchOption) -> click.UsageError:
    """Replace click's list of suggestions with the option that was probably meant, or say where the option belongs."""
    ctx, name = error.ctx, error.option_name
    options = [word for option in ctx.command.params for word in option.opts] if ctx else []
    near = suggest_word(name, [word for word in options if word.startswith("--")])
    if ctx and ctx.parent and any(name in option.opts for option in ctx.parent.command.params):
        near = f"It goes before the command: compressknow {name} {ctx.info_name} ..."
    return click.UsageError(f"{error.message} {near}".rstrip(), ctx)


def _report_failure(what: str, *details: str | None) -> int:
    lines = [f"Error: {what}"]
    for detail in details:
        lines += [f"  {line}" for line in (detail or "").splitlines()]
    show(*lines, err=True)
    return FAILED


def _report_os_error(error: OSError) -> int:
    if error.errno == errno.EPIPE or error.filename == STANDARD_OUTPUT:
        # It is flushed once more at exit, which must not fail again.
        drop_output()
    if error.errno == errno.EPIPE:
        # The reader has exited (`| head`).
        return FAILED
    where = f": {error.filename}" if error.filename is not None else ""
    # The message of Python's tempfile, in a container with a read-only file system.
    hint = "Set TMPDIR to a folder that can be written to." if "usable temporary directory" in str(error) else None
    return _report_failure(f"{error.strerror or error}{where}", hint)


# Signals that wait for the end of an import.
_waiting: set[int] = set()


def _stop_orderly_on_signals() -> None:
    """Turn signals into exceptions, so that temporary folders are removed, but not within an import: libraries catch
    exceptions there, and fail later. A signal waits for the end of the import; a second one ends the process."""

    def stop(number: int, frame: FrameType | None) -> None:
        if not any(map(_is_import, _list_code(frame))):
            raise KeyboardInterrupt if number == signal.SIGINT else _Stopped(128 + number)
        if number in _waiting:
            show("Interrupted", err=True)
            os._exit(128 + number)
        _waiting.add(number)
        _raise_later(number, _is_import)

    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
        number = getattr(signal, name, None)
        # A signal that the caller has chosen to ignore (nohup) stays ignored.
        if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, stop)


@contextmanager
def _repeat_dropped_signals() -> Iterator[None]:
    """Raise again a signal that Python drops, with a traceback, because it arrives while an object is finalized."""
    before = sys.unraisablehook

    def hook(dropped: sys.UnraisableHookArgs) -> None:
        stop = dropped.exc_value
        if isinstance(stop, (KeyboardInterrupt, _Stopped)):
            number = int(str(stop.code)) - 128 if isinstance(stop, _Stopped) else signal.SIGINT
            # The signal would be dropped in this hook, too.
            _raise_later(number, lambda code: code is hook.__code__)
        else:
            before(dropped)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _raise_later(number: int, is_busy: Callable[[CodeType], bool]) -> None:
    """Raise a signal in this thread once it runs no code that `is_busy`."""
    this = threading.get_ident()

    def wait() -> None:
        while any(map(is_busy, _list_code(sys._current_frames().get(this)))):
            time.sleep(0.01)
        _waiting.discard(number)
        if sys.platform == "win32":
            signal.raise_signal(number)
        else:
            signal.pthread_kill(this, number)

    # Unlike `threading.Thread`, this takes no lock that the interrupted code may hold.
    _thread.start_new_thread(wait, ())


def _list_code(frame: FrameType | None) -> Iterator[CodeType]:
    return (each.f_code for each, _ in traceback.walk_stack(frame)) if frame else iter(())


def _is_import(code: CodeType) -> bool:
    return code.co_filename == "<frozen importlib._bootstrap>"


push_options = join_options(
    option("--push", metavar="REPO", help="Upload OUTPUT to the Hub, once it is complete."),
    option("--private", is_flag=True, help="Make REPO private if it is new."),
)


def check_upload(repo: str | None, private: bool, *, dry_run: bool) -> None:
    """Raise an error for an invalid repository name, or without a login, before any work."""
    if repo is None:
        if private:
            raise click.UsageError("--private needs --push REPO.")
        return
    from compressknow.base.hub import check_login, check_repo

    check_repo(repo)
    if not dry_run:
        check_login()


def upload(
    output: Path, repo: str, private: bool, *, planned: Mapping[str, int | None] | None = None, err: bool = False
) -> None:
    """Upload an output, and print its address. In a dry run, print what would be uploaded: `planned`, bytes by file."""
    from compressknow.api.push import push
    from compressknow.base.hub import describe_upload

    if planned is not None:
        show("", *describe_upload(planned, repo, private), err=err)
        return
    uploaded = push(output, repo, private=private or None, bars=True)
    show(f"\nUploaded to {uploaded.url}", err=err)
    if names := uploaded.other_weights:
        more = f" and {count(len(names) - 3)} more" if len(names) > 3 else ""
        warning = (
            f"Warning: the repository also contains {', '.join(names[:3])}{more}, not from this model. "
            "Some loaders read all weight files that they find: delete them if they are from an older upload."
        )
        show(*wrap_whole(warning), err=True)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80})
@click.version_option(__version__, message="%(prog)s %(version)s", help="Show the version and exit.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Compress a language model, and know what it forgot.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 a gate that you set was not met, 4 too few facts to tell (--strict),
    130 interrupted.
    """


def main(args: list[str] | None = None) -> int:
    """Run the command line and return its exit code; `args` default to those of the process."""
    return run(cli, args)
