"""Libraries that some commands need and others do without: what is missing is told before any work.

``inspect``, ``convert`` and ``verify`` run where none of `OPTIONAL` is installed: in a small image, say.
"""

from __future__ import annotations

import importlib.util
import re
from importlib.metadata import version

from compressknow.base.errors import CompressknowError

# By the name that is imported: what pip is told.
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
        raise not_installed(*missing)


def reads_gguf() -> bool:
    """Return whether the transformers that is installed reads a GGUF file as what it is."""
    return _release(version("transformers")) >= _release(GGUF_TRANSFORMERS)


def _release(text: str) -> tuple[int, ...]:
    """Return the two numbers by which releases are ordered.

    >>> _release("5.9.0") < _release("5.23") <= _release("5.23.0.dev0")
    True
    """
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])


def is_installed(module: str) -> bool:
    """Return whether a module is there to be imported; imports nothing."""
    found = importlib.util.find_spec(module)
    # A folder of that name in the working directory is found too, with no origin.
    return found is not None and found.origin is not None


def not_installed(*modules: str) -> CompressknowError:
    """Return the error that names these modules, and what to tell pip."""
    names = (OPTIONAL | _NAMES).get
    packages = " ".join(dict.fromkeys(names(module, module) for module in modules))
    are, them = ("is", "it") if len(modules) == 1 else ("are", "them")
    listed = " and ".join(filter(None, (", ".join(modules[:-1]), modules[-1])))
    return CompressknowError(f"{listed} {are} not installed. Install {them} with: pip install {packages}")
