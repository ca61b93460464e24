"""Uploads to the Hugging Face Hub by way of huggingface_hub; every failure of it becomes one message."""

from __future__ import annotations

import glob
import logging
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, NamedTuple

from compressknow.base.errors import CompressknowError, UsageError
from compressknow.base.format import write_size

if TYPE_CHECKING:
    from huggingface_hub import HfApi


CARD = "README.md"
# Seconds without a byte from the Hub; huggingface_hub itself waits forever. It tries again a few times after that.
PATIENCE = 120.0
WEIGHTS = (".safetensors", ".bin", ".gguf")
_STATUS = {
    401: ("the Hub does not know the token", "Log in with a token that may write: hf auth login"),
    402: ("the Hub requires payment for it", "Check the plan and the storage of the account."),
    403: ("the token may not write there", "Use a token that may write to it: https://huggingface.co/settings/tokens"),
    404: ("there is no such repository, or the token may not see it", "Check the name, and log in: hf auth login"),
    409: ("the repository is in the way, or was changed at the same time", "Wait until nothing else writes to it."),
    413: ("a file is too large for the Hub", None),
    429: ("you have sent the Hub too many requests", "Wait some minutes."),
}


class Upload(NamedTuple):
    """Finished upload: the address of the repository, and weight files in it that are not of this upload."""

    url: str
    others: tuple[str, ...]


def find_address(repo: str) -> str:
    """Return where a repository of models lies, or will; of a name without its owner, the owner is the token's."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo if '/' in repo else f'YOU/{repo}'}"


def check_repo(repo: str) -> None:
    """Raise UsageError if this can be no repository of models; asks nobody."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        if not repo.isascii():  # Release 1 lets them pass.
            raise HFValidationError("It has characters that the Hub does not allow.")
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(
            f"{repo!r} is not a valid repository name on the Hub.",
            why=_get_first_line(error),
            hint="Write OWNER/NAME, such as me/smollm2-int8.",
        ) from None


def check_login() -> None:
    """Raise CompressknowError if an upload cannot succeed, as far as this machine knows: no token, or offline."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise CompressknowError("Nothing can be uploaded while HF_HUB_OFFLINE is set.", hint="Unset it.")
    try:
        token = get_token()
    except Exception as error:  # An exchange of tokens in CI has many ways to fail.
        raise CompressknowError("The Hub's token could not be read.", why=_get_first_line(error)) from None
    if not token:
        raise CompressknowError(
            "An upload needs a Hub token, and none is set.", hint="Log in with hf auth login, or set HF_TOKEN."
        )


def upload(place: Path, repo: str, *, private: bool | None, message: str, card: str | None, bars: bool) -> Upload:
    """Upload a folder, or a file and what lies next to it under its name (``OUT.gguf.json``), to a repository, which is
    made where there is none.

    Parameters
    ----------
    card : of a file, the text of the README.md, where the repository has none.
    private : of a repository that is made; None as the Hub does it: public, unless its organization says else.
    message : of the commit.
    bars : show those of huggingface_hub, on a terminal.

    Raises
    ------
    CompressknowError : it failed; says why, and the command that tries it again. What lies there is left as it is.
    """
    again = build_retry_command(place, repo, private)
    with _explain_failures(place, repo, again), _bound_requests(), _show_bars(bars):
        from huggingface_hub import HfApi

        api = HfApi()
        made = api.create_repo(repo, private=private, exist_ok=True)
        there = api.list_repo_files(made.repo_id)
        if place.is_file():
            _commit_file(api, made.repo_id, place, message, None if CARD in there else card)
            # A repository of GGUF files has one for each type.
            return Upload(find_address(made.repo_id), ())
        api.upload_folder(repo_id=made.repo_id, folder_path=place, commit_message=message)
    ours = {path.relative_to(place).as_posix() for path in place.rglob("*")}
    others = (name for name in there if PurePath(name).suffix in WEIGHTS and name not in ours)
    return Upload(find_address(made.repo_id), tuple(sorted(others)))


def _commit_file(api: HfApi, repo: str, file: Path, message: str, card: str | None) -> None:
    from huggingface_hub import CommitOperationAdd

    paths = (file, *file.parent.glob(f"{glob.escape(file.name)}.json"))
    adds = [CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path) for path in paths]
    if card is not None:
        adds.append(CommitOperationAdd(path_in_repo=CARD, path_or_fileobj=card.encode()))
    api.create_commit(repo, adds, commit_message=message)


def build_retry_command(place: Path, repo: str, private: bool | None) -> str:
    """Return the Hub's own command for the same upload; what has arrived is not sent again."""
    folder, only = (place.parent, ["--include", f"{place.name}*"]) if place.is_file() else (place, [])
    return shlex.join(["hf", "upload", repo, str(folder), ".", *only, *(["--private"] if private else [])])


@contextmanager
def _bound_requests() -> Iterator[None]:
    """End requests of huggingface_hub when nothing comes, and hide what it logs of each attempt."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http
    from huggingface_hub.utils import logging as logs

    # If the user has set a client, for a proxy say, nothing else about it is changed.
    factory, verbosity = _http._GLOBAL_CLIENT_FACTORY, logs.get_verbosity()

    def bounded():  # type: ignore[no-untyped-def]  # of httpx or httpx2, by the release
        client = factory()
        client.timeout = PATIENCE
        return client

    set_client_factory(bounded)
    logs.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        set_client_factory(factory)
        logs.set_verbosity(verbosity)


@contextmanager
def _show_bars(shown: bool) -> Iterator[None]:
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
def _explain_failures(place: Path, repo: str, again: str) -> Iterator[None]:
    """Raise any error of an upload with a note that the output is complete, and how to upload it."""
    try:
        yield
    except Exception as error:  # Of httpx, of huggingface_hub and, where it comes from Rust, of no class in particular.
        cause, hint = _explain(error)
        what = f"{place} is complete, but could not be uploaded to {repo}: {cause}."
        message = next((text for each in _list_causes(error) if (text := getattr(each, "server_message", None))), None)
        why = None if message is None else f"The Hub says: {_get_first_line(message)}"
        retry = f"Then try again: {again}" if hint else f"Try again: {again}"
        raise CompressknowError(what, why, "\n".join(filter(None, (hint, retry)))) from error
    except (KeyboardInterrupt, SystemExit) as stop:
        stop.add_note(f"{place} is complete. To continue the upload: {again}")
        raise


def _explain(error: BaseException) -> tuple[str, str | None]:
    """Return what went wrong, and what to do about it other than trying again."""
    for each in _list_causes(error):
        # By name: up to release 1 of huggingface_hub they are of httpx, from 2 on of httpx2.
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
    """Return the first line of others' message, without the token that they may have been given."""
    from huggingface_hub import get_token

    text = next((line for line in str(message).splitlines() if line.strip()), type(message).__name__)
    token = get_token()
    return (text.replace(token, "...") if token else text).strip()[:300]


def describe_upload(files: Mapping[str, int | None], repo: str, private: bool | None) -> Iterator[str]:
    """Yield lines for a dry run of an upload: `files` has bytes by name, None if they are not known yet."""
    seen = "private" if private else "public, unless the organization's default is private"
    yield f"Would upload to {find_address(repo)} (if it is new: {seen}):"
    width = max(map(len, files), default=0)
    for name, count in sorted(files.items()):
        yield f"  {name:<{width}}{'?' if count is None else write_size(count):>12}"
