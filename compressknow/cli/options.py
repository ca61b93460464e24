"""Options: their groups on the help page, those that commands share, and the defaults in a project's file.

The nearest such file applies, in the working directory or above. The command line takes precedence over the file, and
within the file, a command's table over the keys above all tables.
"""

from __future__ import annotations

import contextlib
import os
import re
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compressknow.base.errors import UnusedOptions, UsageError, suggest_word
from compressknow.base.files import expand_home
from compressknow.base.format import parse_share
from compressknow.base.reading import TABLE_OF_OPTIONS, read_bytes, read_toml

if TYPE_CHECKING:
    from compressknow.compress.parameters import Option as DeclaredOption


Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
# The groups, in the order in which a user makes the choices.
GROUPS = COMPRESS, HOW, FIT, CALIBRATION, EVALUATE, RUNS, OUTPUT = (
    "What to compress",
    "How to compress it",
    "How large it may be",
    "Calibration",
    "What to evaluate",
    "Where it runs",
    "Output",
)
# Width of the column of names; longer ones have a line of their own.
NAMES = 22


class WholeNumber(click.IntRange):
    """Range of integers, which messages call whole numbers."""

    name = "whole number"


class Number(click.FloatRange):
    """Range of floats, which messages call numbers."""

    name = "number"


class Option(click.Option):
    """Option in a group of the help page, shown without its bounds."""

    def __init__(self, *args: Any, group: str = OUTPUT, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.group = group

    def make_metavar(self, ctx: click.Context) -> str:
        """Return one word; the help text lists the choices."""
        if self.metavar is not None or self.is_flag:
            return super().make_metavar(ctx)
        words = {click.Choice: "NAME", OneOf: "NAME", WholeNumber: "N", Number: "N", click.Path: "PATH"}
        return words.get(type(self.type), super().make_metavar(ctx))

    def get_help_extra(self, ctx: click.Context) -> Any:
        """Return what follows the help text in brackets: only the default."""
        extra = super().get_help_extra(ctx)
        extra.pop("range", None)
        return extra


class Command(click.Command):
    """Command whose help page has groups of options and, with `--probe`, a list of probes."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse and store the arguments. An empty one is a UsageError: as a folder, it would be the working folder."""
        empty = next((place for place, word in enumerate(args) if not word or re.fullmatch("--[a-z-]+=", word)), None)
        if empty is not None and not ctx.resilient_parsing:
            option = args[empty].removesuffix("=")
            what = f"The value of {option}" if option else f"The word after {[ctx.info_name, *args][empty]}"
            raise UsageError(f"{what} is empty.", hint="Is a variable of your script not set?")
        ctx.obj = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; if options of the project's file turn out to be unused, run it again without them."""
        try:
            return super().invoke(ctx)
        except UnusedOptions as error:
            # The same mapping as the group's, which uses it for notes on errors.
            defaults: Any = ctx.default_map or {}
            unused = [name for name in error.names if name in defaults and _is_from_file(ctx, name)]
            if not unused:
                raise
        for name in unused:
            del defaults[name]
        with self.make_context(ctx.info_name, ctx.obj, ctx.parent, default_map=defaults) as new_context:
            return self.invoke(new_context)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the epilog, and the probes."""
        if not any(each.name == "probe" for each in self.params):
            super().format_epilog(ctx, formatter)
            return
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text((self.epilog or "") + list_probes())

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the groups that have options, in order; `--help` comes last."""
        records: dict[str, list[tuple[str, str]]] = {group: [] for group in GROUPS}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                records[getattr(parameter, "group", OUTPUT)].append(record)
        for group, shown in records.items():
            if shown:
                with formatter.section(group):
                    # The first column has the same width in every group.
                    formatter.write_dl([(f"{names:<{NAMES - 2}}", text) for names, text in shown], col_max=NAMES)


# Like click's, but each option has a `group` on the help page.
command = partial(click.command, cls=Command)
option = partial(click.option, cls=Option)


def join_options(*options: Decorator) -> Decorator:
    """Make one decorator of several options, in the order of the help page."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for each in reversed(options):
            command = each(command)
        return command

    return add


def read_share(value: Any) -> float:
    """Parse a number such as 0.2, or the same in percent: 20%. The caller checks its bounds."""
    try:
        return parse_share(str(value))
    except (ArithmeticError, ValueError):
        raise click.BadParameter(f"{str(value).strip()!r} is not a number; write 0.2 or 20%.") from None


def _read_blocks(value: Any) -> int | str:
    """Parse a number of blocks; anything else, such as 20-23, stays text, which the recipe checks."""
    text = str(value).strip()
    return int(text) if text.isdecimal() and text.isascii() else text


def read_type_of(value: Any) -> tuple[str, str]:
    """Split SCOPE=TYPE or REGEX=TYPE at the last equals sign."""
    which, sign, chosen = str(value).rpartition("=")
    if not sign or not which or not chosen:
        raise click.BadParameter(f"{value!r} is not a SCOPE=TYPE; write attention=q8_0.")
    return which.strip(), chosen.strip()


class OneOf(click.Choice[str]):
    """Case-insensitive choice of names; for an unknown one, it suggests the one probably meant."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names, case_sensitive=False)

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:  # noqa: ARG002
        """List the choices, and suggest one."""
        return (
            f"{value!r} is not known. {suggest_word(str(value), self.choices)}Choose one of {', '.join(self.choices)}."
        )


PATH = click.Path(path_type=Path)
FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)
# Formats of compressed models.
FORM = OneOf(["gguf", "checkpoint"])


def add_output_folder(about: str) -> Decorator:
    """Make the option for the folder that a command writes; `about` is its help."""
    return option("-o", "--output", type=PATH, required=True, help=about)


def add_output_files(about: str) -> Decorator:
    """Make the option for the files that a command writes; `about` is its help."""
    return option("-o", "--output", multiple=True, type=PATH, help=about)


def make_recipe_option(name: str, **settings: Any) -> Decorator:
    """Make an option that a recipe's step declares; `settings` override the declaration."""
    from compressknow.compress.recipe import OPTIONS, Recipe
    from compressknow.compress.steps import Calibration, Where

    declared = OPTIONS[name]
    kind = _find_type(declared)
    declaration = {
        "group": {Where: COMPRESS, Recipe: COMPRESS, Calibration: CALIBRATION}.get(declared.step, HOW),
        "default": declared.default,
        "type": kind,
        "multiple": declared.multiple,
        "metavar": declared.metavar or {read_share: "SHARE", _read_blocks: "BLOCKS"}.get(kind),
        "help": declared.help,
    }
    return option(declared.option, **declaration | settings)


def _find_type(declared: DeclaredOption) -> Any:
    if declared.choices:
        return OneOf(list(declared.choices))
    if declared.is_share:
        return read_share
    if declared.minimum is not None:
        return WholeNumber(declared.minimum)
    return _read_blocks if declared.kind == int | str else declared.kind


# Width of the column of names in the list of probes, and of the page.
PROBE_NAMES, WIDTH = 20, 78


def list_probes() -> str:
    """Return the list of probes for the end of a help page; this imports those of other packages."""
    from compressknow.evaluate.sources import list_usable

    sources = list(list_usable())
    lines = [line for kind, source in sources for line in _describe_probe(source.usage(kind), source.help)]
    details = [source.details for _, source in sources if source.details]
    return "\n\n".join(f"\b\n{text}" for text in ("\n".join(["Probes (-p, repeatable):", *lines]), *details))


def _describe_probe(usage: str, about: str) -> list[str]:
    """Return the lines of one probe; a long name has its own line."""
    first, indent = f"  {usage:<{PROBE_NAMES - 1}} ", " " * (PROBE_NAMES + 2)
    if len(first) > len(indent):
        return [first.rstrip(), *textwrap.wrap(about, WIDTH, initial_indent=indent, subsequent_indent=indent)]
    return textwrap.wrap(about, WIDTH, initial_indent=first, subsequent_indent=indent)


_facts = partial(option, group=EVALUATE)
_runs = partial(option, group=RUNS)
_trust_option = _runs("--trust-remote-code", is_flag=True, help="Run the Python code that the checkpoint contains.")
revision_option = _runs("--revision", help="Branch, tag or commit of a Hub id.")
checkpoint_options = join_options(revision_option, _trust_option)
threads_option = _runs("--threads", type=WholeNumber(1), help="Tensors at a time.  [default: one per core]")
strict_option = option(
    "--strict", is_flag=True, help="Exit with 4 if the facts are too few to tell whether --fail-under is met."
)
no_facts_option = option("--no-facts", is_flag=True, help="Leave out the text of every fact.")
answers_option = option(
    "--answers",
    type=click.Path(path_type=Path, file_okay=False),
    group=EVALUATE,
    help="Where answers are stored.  [default: ~/.cache/compressknow/answers]",
)
known_option = _facts(
    "--known",
    type=OneOf(["recognized", "produced"]),
    default="recognized",
    show_default=True,
    help="What counts as known: recognized or produced.",
)


def add_data_option(group: str) -> Decorator:
    """Make the option for the folder of downloaded data sets."""
    return option("--data", group=group, type=FOLDER, help="Folder with a data set, or with lama/, bear/, tasks/.")


_probe_options = join_options(
    _facts("-p", "--probe", multiple=True, metavar="PROBE", help="Facts or a task, repeatable; see below."),
    add_data_option(EVALUATE),
    _facts("--limit", type=WholeNumber(1), help="Maximum facts per probe, or chunks of a text."),
    _facts("--seed", type=int, default=0, show_default=True, help="Seed of that sample, and of everything else drawn."),
    _facts("--protocol", metavar="NAME", default="lama", show_default=True, help="Rules for LAMA: lama or paper."),
    _facts("--context", type=WholeNumber(8), help="Tokens per chunk of a text.  [default: 512]"),
    _facts("--template", type=WholeNumber(1), default=1, show_default=True, help="Wording of atlas and BEAR."),
    _facts(
        "--map",
        multiple=True,
        metavar="KEY=COLUMN",
        help="Columns of hf:, repeatable: subject, object, prompt, template, relation, id, popularity, candidates.",
    ),
    _facts("--split", help="Split of an hf: data set."),
    _facts("--tasks", type=FOLDER, help="Folder of your own lm-eval tasks."),
    _facts("--no-noise-floor", is_flag=True, help="Do not measure what rounding or llama.cpp alone changes."),
    _runs("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, mps, xpu, auto."),
    _runs(
        "--dtype",
        type=OneOf(["float32", "bfloat16", "float16", "auto"]),
        help="float32, bfloat16, float16 or auto (the checkpoint's).  [default: float32 on cpu, else auto]",
    ),
    _runs("--batch-size", type=WholeNumber(1), default=128, show_default=True, help="Facts per batch."),
    _trust_option,
)
_templates_option = _facts(
    "--templates", type=WholeNumber(1), default=1, help="Wordings per fact; the majority decides."
)
# For commands that take all models, and for those that make them from one.
probe_options = join_options(
    _probe_options,
    _runs(
        "--runtime",
        metavar="NAME",
        help="What runs a model: transformers, llama.cpp, server.  [default: chosen by its format]",
    ),
    _templates_option,
)
study_options = join_options(_probe_options, _templates_option, known_option)


server_options = join_options(
    _runs("--model", "model_name", metavar="NAME", help="Name of the model, if the server has several."),
    _runs("--parallel", type=WholeNumber(1), default=4, show_default=True, help="Requests at a time to a server."),
    _runs(
        "--timeout",
        type=Number(0, min_open=True),
        metavar="SECONDS",
        default=120,
        show_default=True,
        help="How long a server may take to answer.",
    ),
)


def add_calibration_options(tokens: str, **settings: Any) -> Decorator:
    """Make the options of the calibration text; `tokens` is its default, `settings` as in `make_recipe_option`."""
    number = f"How many tokens of it.  [default: {tokens}]"
    return join_options(
        make_recipe_option("calibration", **settings), make_recipe_option("calibration_tokens", help=number)
    )


def add_guide_option(**settings: Any) -> Decorator:
    """Make the option for what guides the choice of types, or ranks weights."""
    text = {"help": "What decides: facts, text or both.  [default: both]", **settings}
    return option("--guide", type=OneOf(["facts", "text", "both"]), **text)


# What a user can choose about a file of a given size.
fit_options = join_options(
    option(
        "--must",
        group=FIT,
        multiple=True,
        type=read_type_of,
        metavar="WHICH=TYPE",
        help="Give these weights this type in any case: attention=q8_0; repeatable.",
    ),
    option(
        "--rounding",
        group=FIT,
        type=OneOf(["gptq", "nearest"]),
        help="How weights are rounded: gptq or nearest.  [default: gptq]",
    ),
)


ray_options = join_options(
    _runs(
        "--ray",
        metavar="ADDRESS",
        help="Ray cluster: auto, ray://HOST:10001, HOST:6379 or local. MODEL must be on shared storage.",
    ),
    _runs("--num-cpus", type=Number(0), default=1, show_default=True, help="Cores per Ray task."),
    _runs("--num-gpus", type=Number(0), default=0, show_default=True, help="GPUs per Ray task."),
)


FILE, PROJECT = "compressknow.toml", "pyproject.toml"
# Options whose value may contain the path of a file, and the prefixes that may come before it.
_NAMING_FILES = {"probe", "facts", "calibration", "grid"}
_KINDS = ("facts:", "text:", "hf:")
# A file in someone else's repository must not be able to run code, replace files or upload any.
_COMMAND_LINE_ONLY = {
    *("trust_remote_code", "converter", "tasks", "ray", "overwrite", "output", "into_model_card"),
    *("push", "private", "debug", "help", "version"),
}


def read_project_defaults(
    name: str, command: click.Command, commands: Iterable[str], open_command: Callable[[str], click.Command | None]
) -> dict[str, Any]:
    """Return the project file's values for the options of one of `commands`, as click takes them. Raises UsageError for
    a file that is not TOML, for a key that is not an option, and if the working directory is gone."""
    try:
        folder = Path.cwd()
    except FileNotFoundError:
        raise UsageError("The working directory no longer exists.", hint="Change to another one.") from None
    if (nearest := _find_file(folder)) is None:
        return {}
    file, values = nearest
    options = _list_options(command)
    tables = {key: value for key, value in values.items() if isinstance(value, Mapping)}
    for key in tables:
        if key not in commands:
            raise UsageError(
                f"{file}: there is no command {key}.", hint=f"{suggest_word(key, commands)}Rename the table."
            )
    shared = _name_as_in_python({key: value for key, value in values.items() if key not in tables}, file)
    own = _name_as_in_python(tables.get(name, {}), file)
    for key in [*shared, *own]:
        if key in _COMMAND_LINE_ONLY:
            raise UsageError(f"{file}: {key} can only be given on the command line.", hint="Remove it from the file.")
    if unknown := next((key for key in own if key not in options), None):
        raise UsageError(
            f"{file}: {name} has no option {unknown}.", hint=f"{suggest_word(unknown, options)}See {name} --help."
        )
    for key in shared.keys() - options.keys():
        # It may be an option of another command.
        if not any(key in _list_options(other) for other in map(open_command, commands) if other is not None):
            raise UsageError(f"{file}: no command has an option {key}.", hint="Correct the name, or remove it.")
    values = {key: value for key, value in {**shared, **own}.items() if key in options}
    return {str(options[key].name): _format_value(value, options[key], file) for key, value in values.items()}


def _name_as_in_python(values: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Return the values of a table with underscores in their keys. Raise UsageError for one spelled in two ways."""
    if twice := next((key for key in values if "-" in key and key.replace("-", "_") in values), None):
        raise UsageError(f"{file}: {twice} is also given as {twice.replace('-', '_')}.", hint="Leave out one of them.")
    return {key.replace("-", "_"): value for key, value in values.items()}


def describe_project_defaults(command: click.Command, names: Iterable[str]) -> str:
    """Say which file sets these options of a command, named as in Python."""
    nearest, options = _find_file(Path.cwd()), _list_options(command)
    words = ", ".join(max(options[name].opts, key=len) for name in names)
    return f"Options of {nearest[0] if nearest else FILE}: {words}."


def drop_recipe_conflicts(options: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return the options; if there is a recipe, without those of `names` that the project's file sets. Raises
    UsageError if one of `names` is on the command line along with a recipe, even with its default value."""
    if options["recipe"] is None:
        return dict(options)
    from compressknow.compress.recipe import check_recipe_conflicts

    ctx = click.get_current_context()
    commandline = click.core.ParameterSource.COMMANDLINE
    check_recipe_conflicts(
        {name: ctx.get_parameter_source(name) == commandline for name in names}, dict.fromkeys(names, False)
    )
    return {name: value for name, value in options.items() if name not in names or not _is_from_file(ctx, name)}


def _is_from_file(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) == click.core.ParameterSource.DEFAULT_MAP


def _list_options(command: click.Command) -> dict[str, click.Option]:
    """List options by their names in Python and on the command line: ``as_json`` and ``json``."""
    options = [each for each in command.params if isinstance(each, click.Option)]
    long = {word[2:].replace("-", "_"): each for each in options for word in each.opts if word.startswith("--")}
    return long | {str(each.name): each for each in options}


def _find_file(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    for place in (folder, *folder.parents):
        for file in (place / FILE, place / PROJECT):
            # Unlike Path.is_file, it raises no error in a folder without permission.
            if os.path.isfile(file) and (values := _read(file)) is not None:  # noqa: PTH113
                return file, values
    return None


def _read(file: Path) -> dict[str, Any] | None:
    """Return the options in a file; None if a `PROJECT` has none, or is not TOML, which other tools report. One that
    may have our table is an error: a gate in it must not be skipped."""
    try:
        values = read_toml(file)
    except (ValueError, OSError) as error:
        if file.name == PROJECT and isinstance(error, ValueError) and not _names_our_table(file):
            return None
        raise UsageError(f"{file} cannot be read.", why=str(error), hint="Correct it, or remove it.") from None
    if file.name == FILE:
        return values
    tools = values.get("tool")
    own = tools.get("compressknow") if isinstance(tools, dict) else None
    return own if isinstance(own, dict) else None


def _names_our_table(file: Path) -> bool:
    with contextlib.suppress(ValueError):
        return b"[tool.compressknow" in read_bytes(file, TABLE_OF_OPTIONS)
    return False


def _format_value(value: Any, option: click.Option, file: Path) -> Any:
    """Return a value as text, as on the command line, so that 1.5 is not a whole number here either: a path relative to
    the file's folder; several values as a list, a table as KEY=VALUE. Raises UsageError for several values of an option
    that takes one."""
    if isinstance(value, list | dict) and not option.multiple:
        raise UsageError(f"{file}: {option.name} takes one value.", hint="Write it without brackets.")
    if isinstance(value, dict):
        value = [f"{key}={each}" for key, each in value.items()]
    values = [str(each) for each in (value if isinstance(value, list) else [value])]
    if isinstance(option.type, click.Path):
        values = [str(file.parent / expand_home(each)) for each in values]
    elif option.name in _NAMING_FILES:
        values = [_resolve_file(file, each) for each in values]
    return values if option.multiple else values[0]


def _resolve_file(file: Path, value: str) -> str:
    """Return ``facts:mine.jsonl`` or ``notes.txt`` with a path relative to the file's folder, if it exists there."""
    kind, colon, part = value.partition(":") if value.startswith(_KINDS) else ("", "", value)
    place = file.parent / expand_home(part)
    # Without a prefix, only a name with a suffix can be a file: a folder may be called atlas.
    is_there = part and place.exists() if colon else place.suffix and place.is_file()
    if kind == "hf" and not is_there:
        # A configuration may follow the folder.
        is_there = ":" in part and (file.parent / expand_home(part.rpartition(":")[0])).is_dir()
    return f"{kind}{colon}{place}" if is_there else value
