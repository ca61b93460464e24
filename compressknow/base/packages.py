"""Other packages: optional libraries, and the entry points that third-party packages register.

``inspect``, ``convert`` and ``verify`` run without any of the `OPTIONAL` libraries, as in a small container image.

A third-party package adds a scheme, a pruning method, a probe or a section of the report by an entry point, whose name
is the name that users type::

    [project.entry-points."compressknow.schemes"]
    my-scheme = "my_package.scheme:MyScheme"

Names are known without importing anything; an entry is imported when it is first used.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points, version
from typing import Generic, TypeVar

from compressknow.base.errors import CompressknowError, UsageError, is_out_of_memory, suggest_word

# Arguments of pip by the name of the module.
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
# Required libraries whose name for pip differs from the module's.
_NAMES = {"compressed_tensors": "compressed-tensors", "yaml": "pyyaml"}
# Older releases ignore whether a GGUF file wants a first token before texts, and silently evaluate without it.
GGUF_TRANSFORMERS = "5.23"


def require(*modules: str) -> None:
    """Raise CompressknowError, with the command that installs them, if libraries are missing; import none.

    >>> require("json", "re")
    >>> require("pyarow", "json", "scypy")
    Traceback (most recent call last):
    compressknow.base.errors.CompressknowError: pyarow and scypy are not installed. Install them with: pip install pyarow scypy
    """  # noqa: E501
    if missing := [module for module in modules if not is_installed(module)]:
        raise build_not_installed(*missing)


def can_read_gguf() -> bool:
    """Return whether the installed release of transformers reads GGUF files correctly."""
    releases = version("transformers"), GGUF_TRANSFORMERS
    installed, required = ([int(number) for number in release.split(".")[:2]] for release in releases)
    return installed >= required


def is_installed(module: str) -> bool:
    """Return whether a module is installed, without importing it."""
    spec = importlib.util.find_spec(module)
    # A folder of that name in the working directory has a spec too, but no origin.
    return spec is not None and spec.origin is not None


def build_not_installed(*modules: str) -> CompressknowError:
    """Return an error that names these modules, with the command that installs them.

    >>> build_not_installed("gguf", "llama_cpp_py_sync", "yaml").what.partition(". ")[2]
    "Install them with: pip install 'compressknow[gguf]' pyyaml"
    """
    names = (OPTIONAL | _NAMES).get
    packages = " ".join(dict.fromkeys(names(module, module) for module in modules))
    are, them = ("is", "it") if len(modules) == 1 else ("are", "them")
    listed = " and ".join(filter(None, (", ".join(modules[:-1]), modules[-1])))
    return CompressknowError(f"{listed} {are} not installed. Install {them} with: pip install {packages}")


Thing = TypeVar("Thing")


class Registry(Generic[Thing]):
    """Objects of one class by name.

    Parameters
    ----------
    group : entry point group by which third-party packages add entries, such as ``compressknow.schemes``.
    kind : name of an entry in messages, such as ``scheme``.
    of : class of the entries. An entry point is an instance, or a callable that returns one.
    built_in : name -> ``"module:attribute"``, in the order in which they are shown.
    """

    def __init__(self, group: str, kind: str, of: type[Thing], built_in: Mapping[str, str]) -> None:
        self.group, self.kind = group, kind
        self._of, self._built_in = of, dict(built_in)
        self._loaded: dict[str, Thing] = {}

    @cached_property
    def _added(self) -> dict[str, list[EntryPoint]]:
        """Return the entry points by name: usually one, several if packages have the same name for theirs."""
        added: dict[str, list[EntryPoint]] = {}
        for entry in sorted(entry_points(group=self.group), key=lambda entry: (entry.name, _get_package(entry))):
            added.setdefault(entry.name, []).append(entry)
        return added

    def __iter__(self) -> Iterator[str]:
        """Yield the names, built-in ones first."""
        return iter(dict.fromkeys((*self._built_in, *self._added)))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self._built_in or name in self._added)

    def is_built_in(self, name: str) -> bool:
        """Return whether a name is built in, even if a third-party package adds it too."""
        return name in self._built_in

    def is_added(self, name: str) -> bool:
        """Return whether a third-party package adds a name."""
        return name in self._added

    @contextmanager
    def explain_failures(self, name: str) -> Iterator[None]:
        """Raise CompressknowError, which names the package, if a third-party entry fails; errors that a user can act
        on, and those of built-in entries, are raised unchanged."""
        try:
            yield
        except (CompressknowError, OSError):
            raise
        except Exception as error:
            if not self.is_added(name) or is_out_of_memory(error):
                raise
            what = f"The {self.kind} {name!r} that {self.added_by(name)} adds failed."
            why = f"{type(error).__name__}: {error}".rstrip(" .:")
            raise CompressknowError(what, why=f"{why}.", hint=self._hint(name)) from error

    def built_in(self) -> dict[str, Thing]:
        """Return the built-in entries by name."""
        return {name: self._load_built_in(name) for name in self._built_in}

    @property
    def first(self) -> str:
        """Return the name of the default entry."""
        return next(iter(self))

    def __getitem__(self, name: str) -> Thing:
        """Return the entry of this name. Raises UsageError if it is unknown, CompressknowError if a third-party entry
        cannot be imported, has the wrong type, or has the name of another one."""
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def usable(self) -> tuple[dict[str, Thing], dict[str, CompressknowError]]:
        """Return the usable entries by name, and the errors of the others; a built-in name that is added is in both."""
        entries: dict[str, Thing] = {}
        unusable: dict[str, CompressknowError] = {}
        for name in self:
            try:
                entries[name] = self[name]
            except CompressknowError as error:
                unusable[name] = error
                if name in self._built_in:
                    entries[name] = self._load_built_in(name)
        return entries, unusable

    def added_by(self, name: str) -> str:
        """Return the third-party packages that add this name; empty if there is none."""
        return " and ".join(map(_get_package, self._added.get(name, ())))

    def _load_built_in(self, name: str) -> Thing:
        module, _, attribute = self._built_in[name].partition(":")
        return self._make_instance(name, getattr(importlib.import_module(module), attribute))

    def _load(self, name: str) -> Thing:
        if name in self._built_in and name in self._added:
            raise self.incompatible(name, f"A built-in {self.kind} has that name.")
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
            return self._make_instance(name, self._added[name][0].load())
        except CompressknowError:
            raise
        except Exception as error:
            # Importing a third-party module can raise anything.
            raise self.incompatible(name, f"{type(error).__name__}: {error}") from error

    def _make_instance(self, name: str, entry: object) -> Thing:
        instance = entry() if not isinstance(entry, self._of) and callable(entry) else entry
        if not isinstance(instance, self._of):
            raise self.incompatible(name, f"It is of the type {type(instance).__name__}, not {self._of.__name__}.")
        if getattr(instance, "name", name) != name:
            raise self.incompatible(name, f"Its name attribute is {getattr(instance, 'name', '')!r}.")
        return instance

    def incompatible(self, name: str, why: str, *, hint: str | None = None) -> CompressknowError:
        """Return an error that an entry cannot be used, which names the package that adds it."""
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
