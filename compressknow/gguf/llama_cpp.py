"""llama.cpp's library, bound by llama-cpp-py-sync (CFFI over ``llama.h``), and memory-mapped GGUF files in it. Its log
is collected, not printed."""

from __future__ import annotations

import os
import re
from collections import Counter
from contextlib import suppress
from functools import cache, cached_property
from importlib.metadata import version
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from compressknow.base.errors import CheckpointError, CompressknowError, UnsupportedError
from compressknow.base.packages import OPTIONAL, require
from compressknow.base.reading import NotReadable
from compressknow.engine.language_model import hash_vocabulary
from compressknow.gguf.children import build_python_command, put_first, read_tail, run
from compressknow.model.gguf_file import NAMED, UNPLACED, list_parts, read_header

MODULE = "llama_cpp_py_sync"
# enum ggml_log_level of ggml.h.
_ERROR, _CONTINUED = 4, 5


class Native(NamedTuple):
    """CFFI's interface and library, and llama.cpp's build, such as ``b11739``."""

    ffi: Any
    lib: Any
    build: str


# Errors logged since `collect_errors` began, and the callback, which must live as long as the library.
_errors: list[str] = []
_callbacks: list[Any] = []


@cache
def load_native() -> Native:
    """Return the library, loaded once. Raises CompressknowError if it is not installed, or cannot be loaded."""
    require(MODULE)
    # Before it aborts the process, it would run a debugger for a backtrace.
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
    try:
        from llama_cpp_py_sync import _version

        ffi, lib = open_library()
    except (ImportError, OSError, RuntimeError) as error:
        raise CompressknowError(
            "llama.cpp cannot be loaded on this machine.",
            why=(str(error).splitlines() or [type(error).__name__])[0],
            hint=f"Reinstall it: pip install --force-reinstall {OPTIONAL[MODULE]}; or pass --runtime transformers.",
        ) from error

    last = 0

    @ffi.callback("void(enum ggml_log_level, const char *, void *)")  # type: ignore[untyped-decorator]
    def log(level: int, text: Any, _: Any) -> None:
        nonlocal last
        last = last if level == _CONTINUED else level
        if last == _ERROR:
            message = ffi.string(text).decode("utf-8", "replace")
            if level == _CONTINUED and _errors:
                _errors[-1] += message
            else:
                _errors.append(message)

    _callbacks.append(log)
    lib.llama_log_set(log, ffi.NULL)
    lib.llama_backend_init()
    return Native(ffi, lib, str(getattr(_version, "__llama_cpp_tag__", "") or version("llama-cpp-py-sync")))


def open_library() -> tuple[Any, Any]:
    """Return CFFI's two halves. Raises RuntimeError where the library does not load here."""
    from llama_cpp_py_sync import _cffi_bindings as bindings

    with suppress(RuntimeError):
        return bindings.ffi, bindings.get_lib()
    # It may want GNU's OpenMP, which small images of Linux lack: torch brings one along.
    import torch  # noqa: F401

    return bindings.ffi, bindings.get_lib()


def make_interruptible(declaration: str, *, go_on: bool) -> tuple[Any, list[BaseException]]:
    """Return a callback that llama.cpp polls, and a list of what was raised in it: Python handles signals there, so
    that KeyboardInterrupt makes llama.cpp stop. `go_on` is the return value that means to continue."""
    raised: list[BaseException] = []
    callback = load_native().ffi.callback(
        declaration, lambda *_: go_on, error=not go_on, onerror=lambda _, error, __: raised.append(error)
    )
    return callback, raised


def collect_errors() -> list[str]:
    """Return a list to which errors that llama.cpp logs from now on are added, one message per entry."""
    _errors.clear()
    return _errors


def count_types(path: Path) -> dict[str, dict[str, int]]:
    """Count parameters by group of layers and type, most first: ``{"attention": {"Q4_K": 7077888}}``, of a GGUF file
    opened by llama.cpp, with all of its parts."""
    members = load_native().ffi.typeof("enum ggml_type").relements
    types = {number: member.removeprefix("GGML_TYPE_") for member, number in members.items()}
    counts: dict[str, Counter[str]] = {name: Counter() for name in (*(name for name, _ in NAMED), UNPLACED)}
    # A file with more entries than our limit is not counted, though llama.cpp can read it.
    with suppress(NotReadable):
        for part in list_parts(path):
            for name, shape, kind, _ in read_header(part).tensors:
                group = next((group for group, pattern in NAMED if pattern.match(name)), UNPLACED)
                counts[group][types[kind]] += prod(shape)
    return {group: dict(by_type.most_common()) for group, by_type in counts.items() if by_type}


# llama.cpp's message before it ends the process.
_ASSERTED = re.compile(r"GGML_ASSERT\(.*\) failed")


def check_no_crash(path: Path) -> None:
    """Raise CheckpointError if llama.cpp aborts a process that loads a file, splits a text and reads a token; other
    faults of the file are reported when it is loaded."""
    status = path.stat()
    code, output = _run_trial(path.absolute(), status.st_size, status.st_mtime_ns)
    if code == 0:
        return
    assertion = _ASSERTED.search(output)
    why = f"llama.cpp says: {assertion[0]}" if assertion else f"The test process ended with exit code {code}."
    hint = "Download it again: it is damaged or invalid, for example its vocabulary lacks characters."
    raise CheckpointError(f"{path} makes llama.cpp crash.", why, hint)


@cache
def _run_trial(path: Path, size: int, changed: int) -> tuple[int, str]:  # noqa: ARG001
    """Return the exit code and output of a process that tests a file; `size` and `changed` identify its state."""
    with TemporaryDirectory(prefix="compressknow-") as scratch:
        log = Path(scratch) / "trial.log"
        command = build_python_command("-m", f"{__package__}.context", path)
        return run(command, log, environment=put_first(Path(__file__).parents[2])), read_tail(log)


# Maximum length of a metadata value that is read: a name, number or flag.
_META_BYTES = 1 << 10


class GgufModel:
    """Decoder-only language model in a GGUF file. Before the file is loaded, a separate process tests whether it
    crashes llama.cpp, unless this is a `trial`.

    Attributes
    ----------
    handle : llama.cpp's ``struct llama_model *``.
    architecture : name of the architecture in the file: ``llama``, ``qwen2``.
    parameters : number of stored parameters; a head that is tied to the embedding counts once.
    bytes : size of these.
    rows : number of tokens that it can read.
    most_tokens : maximum length of texts in training.

    Raises CheckpointError if llama.cpp cannot read the file: it is damaged, truncated or of a newer version;
    UnsupportedError if it is not a decoder-only language model, or not supported by llama.cpp.
    """

    def __init__(self, path: Path, *, trial: bool = False) -> None:
        self.path = path
        self.native: Native = load_native()
        if not trial:
            check_no_crash(path)
        self.handle = _open_model(path, self.native, copies=not trial)
        lib = self.native.lib
        self.vocab = lib.llama_model_get_vocab(self.handle)
        self.architecture = self.meta("general.architecture") or "unknown"
        self.parameters = int(lib.llama_model_n_params(self.handle))
        self.bytes = int(lib.llama_model_size(self.handle))
        self.rows = int(lib.llama_vocab_n_tokens(self.vocab))
        self.most_tokens = int(lib.llama_model_n_ctx_train(self.handle))
        try:
            _check_decoder(self)
        except UnsupportedError:
            self.close()
            raise

    def close(self) -> None:
        """Free the model; its contexts must be closed before."""
        if self.handle is not None:
            self.native.lib.llama_model_free(self.handle)
            self.handle = None

    @property
    def file_type(self) -> str:
        """Return llama.cpp's name of the file's type: ``Q4_K - Medium``."""
        ffi, lib, _ = self.native
        name = ffi.string(lib.llama_ftype_name(lib.llama_model_ftype(self.handle))).decode("utf-8", "replace")
        # llama.cpp guesses from the tensors if the metadata lacks the type.
        return str(name).removeprefix("(guessed) ")

    @cached_property
    def vocabulary(self) -> str:
        """Return the same hash of tokens as `engine.language_model.LanguageModel.vocabulary`."""
        ffi, lib, _ = self.native
        texts = (ffi.string(lib.llama_vocab_get_text(self.vocab, number)) for number in range(self.rows))
        return hash_vocabulary((text.decode("utf-8", "replace"), number) for number, text in enumerate(texts))

    def meta(self, key: str) -> str | None:
        """Return a value of the file's metadata as text, or None."""
        buffer = self.native.ffi.new("char[]", _META_BYTES)
        length = self.native.lib.llama_model_meta_val_str(self.handle, key.encode(), buffer, _META_BYTES)
        return None if length < 0 else self.native.ffi.string(buffer).decode("utf-8", "replace")


def _open_model(path: Path, llama: Native, *, copies: bool) -> Any:
    parameters = llama.lib.llama_model_default_params()
    # Evaluate on the CPU.
    parameters.n_gpu_layers = 0
    # Copies of weights in the order for the fastest kernels take longer to make than reading one token.
    parameters.use_extra_bufts = copies
    # Called before each tensor.
    callback, raised = make_interruptible("bool(float, void *)", go_on=True)
    parameters.progress_callback = callback
    errors = collect_errors()
    handle = llama.lib.llama_model_load_from_file(str(path).encode("utf-8", "surrogateescape"), parameters)
    if raised:
        raise raised.pop()
    if handle != llama.ffi.NULL:
        return handle
    raise _explain_failure(path, errors)


# llama.cpp's messages about problems of files.
_UNKNOWN_ARCHITECTURE = re.compile(r"unknown model architecture: '([^']*)'")
_NEWER = re.compile(r"GGUF file is version (\d+)|bad GGUF version|version (\d+) but this software")
_CUT = re.compile(
    r"not within (?:the )?file bounds|failed to (?:read|seek)|unexpectedly reached end|corrupted or incomp"
)
_NO_GGUF = re.compile(r"invalid magic")


def _explain_failure(path: Path, errors: list[str]) -> CheckpointError | UnsupportedError:
    text = "".join(errors)
    # Later errors follow from the first, which begins with names of llama.cpp's functions.
    first = next((line.strip() for line in errors if line.strip()), None)
    why = first and re.sub(r"^(?:\w+: |error loading model: )+", "", first)
    if match := _UNKNOWN_ARCHITECTURE.search(text):
        return UnsupportedError(
            f"{path}: llama.cpp {load_native().build} does not know the architecture {match[1]!r}.",
            hint="A newer one may: pip install --upgrade llama-cpp-py-sync; or pass --runtime transformers.",
        )
    if _NEWER.search(text):
        return CheckpointError(
            f"{path} is a GGUF file of a version that llama.cpp {load_native().build} does not read.",
            why=why,
            hint="Convert the model again, or upgrade llama.cpp: pip install --upgrade llama-cpp-py-sync",
        )
    if _NO_GGUF.search(text):
        return CheckpointError(f"{path} is not a GGUF file.", why=why, hint="Download it again.")
    if _CUT.search(text):
        return CheckpointError(f"{path} is cut short or damaged.", why=why, hint="Download it again.")
    return CheckpointError(f"llama.cpp cannot load {path}.", why=why)


def _check_decoder(model: GgufModel) -> None:
    lib, handle, name = model.native.lib, model.handle, model.architecture
    if lib.llama_model_has_encoder(handle) or not lib.llama_model_has_decoder(handle):
        kind = "has an encoder"
    elif model.meta(f"{name}.attention.causal") == "false" or model.meta(f"{name}.pooling_type") not in (None, "0"):
        kind = "does not generate text"
    elif lib.llama_model_is_diffusion(handle):
        kind = "generates text by diffusion"
    else:
        return
    raise UnsupportedError(
        f"{model.path} is a {name}, which {kind}: in llama.cpp only decoder-only models can be evaluated.",
        hint="Evaluate the checkpoint that it was made from; transformers runs that.",
    )
