"""Other packages: libraries that some commands need, and what packages of others register.

``inspect``, ``convert`` and ``verify`` run where none of `OPTIONAL` is installed: in a small image, say.

Another package adds a scheme, a method, a source of facts or a section by an entry point, whose name is the name that
users type::

    [project.entry-points."compressknow.schemes"]
    my-scheme = "my_package.scheme:MyScheme"

Names are known without importing anything; what is named is imported when it is first used.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points, version
from typing import Generic, TypeVar

from compressknow.base.errors import CompressknowError, UsageError, suggest_word

# By name of the import, what pip installs.
OPTIONAL = {
    "datasets": "datasets",
    "gguf": "'compressknow[gguf]'",
    "llama_cpp_py_sync": "'compressknow[gguf]'",
    "lm_eval": "lm-eval",
    "matplotlib": "matplotlib",
    "pyarrow": "pyarrow",
    "ray": "'compressknow[ray]'",
    "requests": "requests",
    "scipy": "scipy",
    "sentencepiece": "'compressknow[gguf]'",
    "urllib3": "urllib3",
}
# Others whose name for pip is another.
_NAMES = {"compressed_tensors": "compressed-tensors", "yaml": "pyyaml"}
# Older releases leave out whether a GGUF file puts its first token before a text: it is asked otherwise, unseen.
GGUF_TRANSFORMERS = "5.23"


def require(*modules: str) -> None:
    """Raise CompressknowError, with the command that installs them, where libraries are missing; import none.

    >>> require("json", "re")
    >>> require("pyarow", "json", "scypy")
    Traceback (most recent call last):
    compressknow.base.errors.CompressknowError: pyarow and scypy are not installed. Install them with: pip install pyarow scypy
    """  # noqa: E501
    if missing := [module for module in modules if not is_installed(module)]:
        raise build_not_installed(*missing)


def can_read_gguf() -> bool:
    """Return whether the transformers that is installed reads a GGUF file as what it is."""
    releases = version("transformers"), GGUF_TRANSFORMERS
    installed, needed = ([int(number) for number in release.split(".")[:2]] for release in releases)
    return installed >= needed


def is_installed(module: str) -> bool:
    """Return whether a module is there to be imported; imports nothing."""
    found = importlib.util.find_spec(module)
    # A folder of that name in the working directory is found too, with no origin.
    return found is not None and found.origin is not None


def build_not_installed(*modules: str) -> CompressknowError:
    """Return the error that names these modules, and what to tell pip."""
    names = (OPTIONAL | _NAMES).get
    packages = " ".join(dict.fromkeys(names(module, module) for module in modules))
    are, them = ("is", "it") if len(modules) == 1 else ("are", "them")
    listed = " and ".join(filter(None, (", ".join(modules[:-1]), modules[-1])))
    return CompressknowError(f"{listed} {are} not installed. Install {them} with: pip install {packages}")


Thing = TypeVar("Thing")


class Registry(Generic[Thing]):
    """Registry of things of one kind, by name.

    Parameters
    ----------
    group : of the entry points by which other packages add to it, such as ``compressknow.schemes``.
    kind : what one of them is called in messages, such as ``scheme``.
    of : the class of its entries. An entry is an instance, or something that gives one when it is called.
    built_in : name -> ``"module:attribute"``, in the order in which they are shown.
    """

    def __init__(self, group: str, kind: str, of: type[Thing], built_in: Mapping[str, str]) -> None:
        self.group, self.kind = group, kind
        self._of, self._built_in = of, dict(built_in)
        self._loaded: dict[str, Thing] = {}

    @cached_property
    def _added(self) -> dict[str, list[EntryPoint]]:
        """Return by name the entry points that bring it: one, or several packages contend for it."""
        added: dict[str, list[EntryPoint]] = {}
        for entry in sorted(entry_points(group=self.group), key=lambda entry: (entry.name, _get_package(entry))):
            added.setdefault(entry.name, []).append(entry)
        return added

    def __iter__(self) -> Iterator[str]:
        """Yield names: those built in first."""
        return iter(dict.fromkeys((*self._built_in, *self._added)))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self._built_in or name in self._added)

    def is_built_in(self, name: str) -> bool:
        """Return whether it is built in; another package may contend for its name."""
        return name in self._built_in

    def is_added(self, name: str) -> bool:
        """Return whether another package has brought it."""
        return name in self._added

    @contextmanager
    def explain_failures(self, name: str) -> Iterator[None]:
        """Turn errors of a third-party entry into CompressknowError that names its package, unless they are already
        meant for the user; errors of built-in entries are left as they are."""
        try:
            yield
        except (CompressknowError, OSError, MemoryError):
            raise
        except Exception as error:
            if not self.is_added(name):
                raise
            what = f"The {self.kind} {name!r} that {self.added_by(name)} adds failed."
            why = f"{type(error).__name__}: {error}".rstrip(" .:")
            raise CompressknowError(what, why=f"{why}.", hint=self._hint(name)) from error

    def built_in(self) -> dict[str, Thing]:
        """Return those of this package, by name, without those that others add."""
        return {name: self._load_built_in(name) for name in self._built_in}

    @property
    def first(self) -> str:
        """Return the one that is meant where none is named."""
        return next(iter(self))

    def __getitem__(self, name: str) -> Thing:
        """Return what has this name.

        Raises
        ------
        UsageError : nothing has it.
        CompressknowError : another package's entry cannot be imported, is something else, or has the name of a
            built-in one.
        """
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def usable(self) -> tuple[dict[str, Thing], dict[str, CompressknowError]]:
        """Return all usable entries by name, and the errors of the others. A third-party entry with a built-in's name
        is an error, and does not replace it."""
        things: dict[str, Thing] = {}
        unusable: dict[str, CompressknowError] = {}
        for name in self:
            try:
                things[name] = self[name]
            except CompressknowError as error:
                unusable[name] = error
                if name in self._built_in:
                    things[name] = self._load_built_in(name)
        return things, unusable

    def added_by(self, name: str) -> str:
        """Return the packages that add this name; empty if it is built in alone."""
        return " and ".join(map(_get_package, self._added.get(name, ())))

    def _load_built_in(self, name: str) -> Thing:
        module, _, attribute = self._built_in[name].partition(":")
        return self._instance(name, getattr(importlib.import_module(module), attribute))

    def _load(self, name: str) -> Thing:
        if name in self._built_in and name in self._added:
            raise self.incompatible(name, "The name is taken by a built-in one.")
        if name in self._built_in:
            return self._load_built_in(name)
        if name not in self._added:
            near = suggest_word(name, self)
            raise UsageError(f"{name!r} is not known. {near}The {self.kind}s are {', '.join(self)}.")
        if len(self._added[name]) > 1:
            raise self.incompatible(
                name, f"Two packages add a {self.kind} of that name.", hint="Uninstall one of them."
            )
        try:
            return self._instance(name, self._added[name][0].load())
        except CompressknowError:
            raise
        except Exception as error:
            # A third-party module may raise anything while it is imported.
            raise self.incompatible(name, f"{type(error).__name__}: {error}") from error

    def _instance(self, name: str, entry: object) -> Thing:
        made = entry() if not isinstance(entry, self._of) and callable(entry) else entry
        if not isinstance(made, self._of):
            raise self.incompatible(name, f"It is of the type {type(made).__name__}, not {self._of.__name__}.")
        if getattr(made, "name", name) != name:
            raise self.incompatible(name, f"It calls itself {getattr(made, 'name', '')!r}.")
        return made

    def incompatible(self, name: str, why: str, *, hint: str | None = None) -> CompressknowError:
        """Return the error to raise where what has this name cannot be used; it names the package that adds it."""
        by = self.added_by(name)
        return CompressknowError(
            f"The {self.kind} {name!r} that {by} {'add' if ' and ' in by else 'adds'} cannot be used.",
            why=why,
            hint=hint or self._hint(name),
        )

    def _hint(self, name: str) -> str:
        return f"Update or uninstall {self.added_by(name)}."


def _get_package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else "an installed package"
