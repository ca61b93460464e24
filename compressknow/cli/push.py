"""Options `--push` and `--private`: what a command has written goes to the Hub, after all else is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import click

from compressknow.base.format import count
from compressknow.cli.options import option, together
from compressknow.cli.terminal import show, wrap_whole

push_options = together(
    option("--push", metavar="REPO", help="Upload OUTPUT to the Hub, once it is complete."),
    option("--private", is_flag=True, help="Make REPO private if it is new."),
)


# Uploads an output and says so or, of a dry run, says what it would upload: bytes by name of file. `err` prints it on
# standard error.
Uploads = Callable[[Path, Mapping[str, int | None] | None, bool], None]


def prepare_upload(repo: str | None, private: bool, *, dry_run: bool) -> Uploads | None:
    """Return what uploads to `repo`, None where nothing is to be. What is wrong with its name or the login is raised
    here, before any work."""
    if repo is None:
        if private:
            raise click.UsageError("--private goes with --push REPO.")
        return None
    from compressknow.api.push import check_push, push
    from compressknow.base.hub import describe_upload

    check_push(repo, dry_run=dry_run)

    def uploads(output: Path, files: Mapping[str, int | None] | None, err: bool) -> None:
        if dry_run:
            show("\n" + "\n".join(describe_upload(files or {}, repo, private)), err=err)
            return
        done = push(output, repo, private=private or None, bars=True)
        show(f"\nUploaded to {done.url}", err=err)
        if names := done.others:
            more = f" and {count(len(names) - 3)} more" if len(names) > 3 else ""
            warning = (
                f"Warning: the repository also holds {', '.join(names[:3])}{more}, not of this model. "
                "Some loaders read all weight files that they find: delete those there if they are of an older upload."
            )
            show("\n".join(wrap_whole(warning)), err=True)

    return uploads
