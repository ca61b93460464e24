"""Uploads to the Hugging Face Hub with huggingface_hub, whose failures become CompressknowErrors."""

from __future__ import annotations

import glob
import logging
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, NamedTuple

from compressknow.base.errors import CompressknowError, UsageError
from compressknow.base.format import write_size

if TYPE_CHECKING:
    from huggingface_hub import HfApi


CARD = "README.md"
# Seconds without a byte from the Hub before huggingface_hub, which would wait for ever, retries a few times.
PATIENCE = 120.0
WEIGHTS = (".safetensors", ".bin", ".gguf")
_STATUS = {
    401: ("the Hub does not know the token", "Log in with a token that has write access: hf auth login"),
    402: ("the Hub requires payment for it", "Check the plan and the storage of the account."),
    403: ("the token has no write access to it", "Use one that has: https://huggingface.co/settings/tokens"),
    404: ("there is no such repository, or the token may not see it", "Check the name, and log in: hf auth login"),
    409: ("the repository conflicts, or was changed at the same time", "Wait until nothing else writes to it."),
    413: ("a file is too large for the Hub", None),
    429: ("you have sent the Hub too many requests", "Wait a few minutes."),
}


class Upload(NamedTuple):
    """Finished upload: the address of the repository, and its weight files that are not part of this upload."""

    url: str
    other_weights: tuple[str, ...]


def find_address(repo: str) -> str:
    """Return the URL of a model repository, which need not exist; without an owner it has YOU, the token's owner."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo if '/' in repo else f'YOU/{repo}'}"


def check_repo(repo: str) -> None:
    """Raise UsageError if this is not a valid name of a repository; sends no request."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        if not isinstance(repo, str):
            raise HFValidationError("It must be text.")
        if not repo.isascii():  # huggingface_hub 1 does not check this.
            raise HFValidationError("It has characters that the Hub does not allow.")
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(
            f"{repo!r} is not a valid repository name on the Hub.",
            why=_get_first_line(error),
            hint="Write OWNER/NAME, such as me/smollm2-int8.",
        ) from None


def check_login() -> None:
    """Raise CompressknowError if there is no token or the Hub is set offline; sends no request."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise CompressknowError("Nothing can be uploaded while HF_HUB_OFFLINE is set.", hint="Unset it.")
    try:
        token = get_token()
    except Exception as error:  # Exchanging tokens in CI can fail in many ways.
        raise CompressknowError("The Hub's token could not be read.", why=_get_first_line(error)) from None
    if not token:
        raise CompressknowError(
            "An upload needs a Hub token, and none is set.", hint="Log in with hf auth login, or set HF_TOKEN."
        )


def upload(path: Path, repo: str, *, private: bool | None, message: str, card: str | None, bars: bool) -> Upload:
    """Upload a folder, or a file and its JSON (``OUT.gguf.json``), to a repository, which is created if it is missing.

    `card` is the README.md for a file, used if the repository has none; `private` is for a new repository, None for the
    Hub's default: public, unless its organization differs. `bars` shows progress bars, on a terminal. Raises
    CompressknowError with the reason, and the command that repeats the upload; local files are unchanged."""
    retry_command = build_retry_command(path, repo, private)
    with _explain_failures(path, repo, retry_command), _bound_requests(), _show_bars(bars):
        from huggingface_hub import HfApi

        api = HfApi()
        repo_id = api.create_repo(repo, private=private, exist_ok=True).repo_id
        remote = api.list_repo_files(repo_id)
        if path.is_file():
            _commit_file(api, repo_id, path, message, None if CARD in remote else card)
            # A repository of GGUF files is meant to have several, one per type.
            return Upload(find_address(repo_id), ())
        api.upload_folder(repo_id=repo_id, folder_path=path, commit_message=message)
    uploaded = {file.relative_to(path).as_posix() for file in path.rglob("*")}
    other_weights = (name for name in remote if PurePath(name).suffix in WEIGHTS and name not in uploaded)
    return Upload(find_address(repo_id), tuple(sorted(other_weights)))


def _commit_file(api: HfApi, repo: str, file: Path, message: str, card: str | None) -> None:
    from huggingface_hub import CommitOperationAdd

    paths = (file, file.with_name(f"{file.name}.json"))
    adds = [CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path) for path in paths if path.exists()]
    if card is not None:
        adds.append(CommitOperationAdd(path_in_repo=CARD, path_or_fileobj=card.encode()))
    api.create_commit(repo, adds, commit_message=message)


def build_retry_command(path: Path, repo: str, private: bool | None) -> str:
    """Return the ``hf`` command for the same upload, which does not send again what has arrived."""
    folder, include = (path.parent, ["--include", f"{glob.escape(path.name)}*"]) if path.is_file() else (path, [])
    return shlex.join(["hf", "upload", repo, str(folder), ".", *include, *(["--private"] if private else [])])


@contextmanager
def _bound_requests() -> Iterator[None]:
    """Set a timeout for requests of huggingface_hub, and hide what it logs about each attempt."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http
    from huggingface_hub.utils import logging as logs

    # A client that the user has set (for a proxy, say) only gets the timeout.
    factory, verbosity = _http._GLOBAL_CLIENT_FACTORY, logs.get_verbosity()

    def make_client():  # type: ignore[no-untyped-def]  # of httpx or httpx2, depending on the release
        client = factory()
        client.timeout = PATIENCE
        return client

    set_client_factory(make_client)
    logs.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        set_client_factory(factory)
        logs.set_verbosity(verbosity)


@contextmanager
def _show_bars(shown: bool) -> Iterator[None]:
    # Not `disable_bars`: an upload also has a display without tqdm, which follows this switch.
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled() or (shown and sys.stderr.isatty()):
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def _explain_failures(path: Path, repo: str, retry_command: str) -> Iterator[None]:
    """Turn the failure of an upload into a CompressknowError, and add to any that the output is complete."""
    try:
        yield
    except Exception as error:  # Of httpx and huggingface_hub; errors from Rust have no common class.
        cause, hint = _explain(error)
        what = f"{path} is complete, but could not be uploaded to {repo}: {cause}."
        message = next((text for each in _list_causes(error) if (text := getattr(each, "server_message", None))), None)
        why = None if message is None else f"The Hub says: {_get_first_line(message)}"
        retry = f"Then try again: {retry_command}" if hint else f"Try again: {retry_command}"
        raise CompressknowError(what, why, "\n".join(filter(None, (hint, retry)))) from error
    except (KeyboardInterrupt, SystemExit) as stop:
        stop.add_note(f"{path} is complete. To continue the upload: {retry_command}")
        raise


def _explain(error: BaseException) -> tuple[str, str | None]:
    """Return what went wrong, and a hint other than trying again."""
    for each in _list_causes(error):
        # Compared by name, since huggingface_hub raises errors of httpx up to release 1, and of httpx2 from 2.
        kinds = {kind.__name__ for kind in type(each).__mro__}
        status = getattr(getattr(each, "response", None), "status_code", None)
        if status is not None:
            what, hint = _STATUS.get(status, ("the Hub failed" if status >= 500 else "the Hub refused it", None))
            return f"{what} (HTTP {status})", hint
        if "TimeoutException" in kinds:
            return f"the Hub did not answer within {PATIENCE:.0f} s", None
        if "ConnectError" in kinds:
            return "the Hub cannot be reached", "Check the network, and HF_ENDPOINT if it is set."
        if "TransportError" in kinds:
            return "the connection was lost", None
    return f"{type(error).__name__}: {_get_first_line(error)}", None


def _list_causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _get_first_line(message: object) -> str:
    """Return the first line of a library's message, with any token masked."""
    from huggingface_hub import get_token

    text = next((line for line in str(message).splitlines() if line.strip()), type(message).__name__)
    with suppress(Exception):  # The message may be that there is no token, as in `check_login`.
        if token := get_token():
            text = text.replace(token, "...")
    return text.strip()[:300]


def describe_upload(files: Mapping[str, int | None], repo: str, private: bool | None) -> Iterator[str]:
    """Yield the lines of a dry run of an upload; `files` maps names to bytes, None if they are not known yet."""
    visibility = "private" if private else "public, unless the organization's default is private"
    yield f"Would upload to {find_address(repo)} (if it is new: {visibility}):"
    width = max(map(len, files), default=0)
    for name, nbytes in sorted(files.items()):
        yield f"  {name:<{width}}{'?' if nbytes is None else write_size(nbytes):>12}"
