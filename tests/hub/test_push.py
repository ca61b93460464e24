"""`push` and `--push`: uploaded files, output, and failed uploads, with a local hub."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml
from huggingface_hub import constants, errors
from huggingface_hub.utils import (
    _http,
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    filter_repo_objects,
    logging,
)

import compressknow
from compressknow.base import hub as uploads
from compressknow.base.errors import CompressknowError, UsageError
from compressknow.cli import main
from tests.gguf.making import save_checkpoint
from tests.hub.hub_server import TOKEN, Hub, serve
from tests.models import save_tiny

REPO = "me/tiny-int8"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("bert", tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(scope="module")
def converted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "tiny-int8"
    compressknow.convert(model, folder, quantize="int8")
    return folder


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_convert_pushes_the_whole_output_and_prints_its_address(
    hub: Hub, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["convert", str(model), str(out), "--quantize", "int8", "--push", REPO]) == 0
    assert hub.repositories == {REPO: read_files(out)}
    assert hub.private == {REPO: None}
    assert hub.commits == ["Blocks_GQ of tiny, by compressknow"]
    printed = capsys.readouterr()
    assert printed.out.startswith("Blocks_GQ: ")
    assert printed.out.endswith(f"\nUploaded to {hub.url}/{REPO}\n")
    metadata = yaml.safe_load(hub.repositories[REPO]["README.md"].decode().split("---\n")[1])
    assert "compressknow" in metadata["tags"]


def test_push_to_a_private_repository_of_the_user_with_json(
    hub: Hub, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", str(model), str(tmp_path / "out"), "--quantize", "int8"]
    assert main([*words, "--push", "tiny", "--private", "--json"]) == 0
    assert hub.private == {"me/tiny": True}
    printed = capsys.readouterr()
    assert json.loads(printed.out)["setup"] == "Blocks_GQ"
    assert printed.err == f"\nUploaded to {hub.url}/me/tiny\n"


def test_dry_run_lists_the_upload_without_requests(
    hub: Hub,
    model: Path,
    converted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    out = tmp_path / "out"
    words = ["convert", str(model), str(out), "--quantize", "int8", "--dry-run"]
    assert main([*words, "--push", REPO, "--private"]) == 0
    printed = capsys.readouterr().out.partition("Would upload to ")[2]
    assert printed.startswith(f"{hub.url}/{REPO} (if it is new: private):\n")
    listed = dict(line.split(maxsplit=1) for line in printed.splitlines()[1:])
    written = read_files(converted)
    assert listed.keys() == written.keys()
    assert listed["README.md"] == listed["compressknow.json"] == "?"
    assert hub.steps == []
    assert not out.exists()
    assert main([*words, "--push", "tiny"]) == 0
    address = f"Would upload to {hub.url}/YOU/tiny (if it is new: public, unless the organization's default is private)"
    assert address in capsys.readouterr().out
    manifest = compressknow.convert(model, out, quantize="int8", dry_run=True)
    assert {name: size for name, size in manifest["planned_files"].items() if size is not None} == {
        name: len(data) for name, data in written.items() if name not in ("README.md", "compressknow.json")
    }


def test_second_push_uploads_no_weights_again(hub: Hub, converted: Path) -> None:
    for _ in range(2):
        assert compressknow.push(converted, REPO) == (f"{hub.url}/{REPO}", ())
        assert hub.steps.count("put") == 1


def test_other_weights_in_the_repository_are_reported(
    hub: Hub, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = (
        "2_Dense/model.safetensors",
        "model-00001-of-00002.safetensors",
        "pytorch_model.bin",
        "a.gguf",
        "notes.txt",
    )
    old = dict.fromkeys(names, b"")
    hub.repositories[REPO] = old
    source = shutil.copytree(model, tmp_path / "tiny")
    (source / "modules.json").write_text('[{"path": "2_Dense"}]')
    (source / "2_Dense").mkdir()
    shutil.copy(model / "model.safetensors", source / "2_Dense")
    assert main(["convert", str(source), str(tmp_path / "out"), "--quantize", "int8", "--push", REPO]) == 0
    warning = " ".join(capsys.readouterr().err.split())
    others = "a.gguf, model-00001-of-00002.safetensors, pytorch_model.bin"
    assert f"also contains {others}, not from this model." in warning
    assert hub.repositories[REPO]["notes.txt"] == b""


@pytest.mark.parametrize(
    ("step", "fault", "message"),
    [
        ("create", 401, "the Hub does not know the token (HTTP 401)"),
        ("create", 403, "the token has no write access to it (HTTP 403)"),
        ("create", 429, "you have sent the Hub too many requests (HTTP 429)"),
        ("create", 500, "the Hub failed (HTTP 500)"),
        ("create", "hang", "the Hub did not answer within 1 s"),
        ("create", "cut", "the connection was lost"),
        ("list", 404, "there is no such repository, or the token may not see it (HTTP 404)"),
        ("preupload", 404, "there is no such repository, or the token may not see it (HTTP 404)"),
        ("batch", 500, "the Hub failed (HTTP 500)"),
        ("put", 500, "the Hub failed (HTTP 500)"),
        ("put", "cut", "the connection was lost"),
        ("put", "hang", "the Hub did not answer within 1 s"),
        ("verify", 418, "the Hub refused it (HTTP 418)"),
        ("commit", 409, "the repository conflicts, or was changed at the same time (HTTP 409)"),
        ("commit", 413, "a file is too large for the Hub (HTTP 413)"),
        ("commit", "cut", "the connection was lost"),
    ],
)
def test_failed_upload_is_one_message_with_the_command_to_try_again(
    hub: Hub,
    model: Path,
    tmp_path: Path,
    step: str,
    fault: int | str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(uploads, "PATIENCE", 1.0)
    hub.faults[step] = fault
    out = tmp_path / "out"
    assert main(["convert", str(model), str(out), "--quantize", "int8", "--push", REPO, "--private"]) == 1
    printed = capsys.readouterr()
    # The conversion's output is printed.
    assert printed.out.startswith("Blocks_GQ: ")
    assert printed.err.startswith(f"Error: {out} is complete, but could not be uploaded to {REPO}: {message}.\n")
    assert f"ry again: hf upload {REPO} {out} . --private\n" in printed.err
    assert ("\n  The Hub says: No for " in printed.err) == isinstance(fault, int)
    assert TOKEN not in printed.out + printed.err
    assert printed.err.count("Error") == 1
    assert compressknow.verify(out).differences == ()
    assert hub.repositories.get(REPO, {}) == {}


@pytest.mark.skipif(sys.platform == "win32", reason="no signal can be sent to a thread")
def test_interrupted_upload_names_the_command_to_continue(hub: Hub, converted: Path) -> None:
    hub.faults["commit"] = "interrupt"
    with pytest.raises(KeyboardInterrupt) as raised:
        compressknow.push(converted, REPO)
    command = f"hf upload {REPO} {converted} ."
    assert raised.value.__notes__ == [f"{converted} is complete. To continue the upload: {command}"]


def test_temporary_failure_is_retried_in_silence_with_the_clients_that_a_user_has_set(
    hub: Hub, converted: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    factory = Mock(side_effect=_http._GLOBAL_CLIENT_FACTORY)
    monkeypatch.setattr(_http, "_GLOBAL_CLIENT_FACTORY", factory)
    hub.faults, hub.times = {"put": 503}, 2
    logging.set_verbosity(logging.WARNING)
    compressknow.push(converted, REPO)
    assert hub.repositories[REPO] == read_files(converted)
    assert capfd.readouterr() == ("", "")
    assert factory.called
    assert (_http._GLOBAL_CLIENT_FACTORY, logging.get_verbosity()) == (factory, logging.WARNING)


@pytest.mark.parametrize("switch", [enable_progress_bars, disable_progress_bars])
def test_progress_bars_are_as_before_after_an_upload(
    hub: Hub, converted: Path, switch: Callable[[], None], request: pytest.FixtureRequest
) -> None:
    request.addfinalizer(disable_progress_bars if are_progress_bars_disabled() else enable_progress_bars)
    switch()
    compressknow.push(converted, REPO)
    assert hub.commits
    assert are_progress_bars_disabled() == (switch is disable_progress_bars)


def test_error_of_the_rust_uploader_is_one_message(
    hub: Hub, converted: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The local hub has no chunked storage, which huggingface_hub uses if hf_xet is installed."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with pytest.raises(CompressknowError, match=r"complete, but could not be .*xet-write-token") as raised:
        compressknow.push(converted, REPO)
    assert TOKEN not in str(raised.value)
    assert capfd.readouterr() == ("", "")


def test_unreachable_hub_is_one_message(hub: Hub, converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CompressknowError, match="the Hub cannot be reached") as raised:
        compressknow.push(converted, REPO)
    assert raised.value.hint is not None
    assert "Check the network, and HF_ENDPOINT" in raised.value.hint


@pytest.mark.parametrize(
    "repo", ["", "a/b/c", "https://huggingface.co/me/x", "-x", "me/x.git", "me/x--y", "me/ü", "a b"]
)
def test_invalid_repository_name_is_refused_before_any_work(hub: Hub, model: Path, tmp_path: Path, repo: str) -> None:
    with pytest.raises(UsageError, match="is not a valid repository name on the Hub"):
        compressknow.push(tmp_path / "nowhere", repo)
    out = tmp_path / "out"
    assert main(["convert", str(model), str(out), "--quantize", "int8", "--push", repo]) == 2
    assert not out.exists()
    assert hub.steps == []


@pytest.mark.parametrize(
    "missing",
    [
        *("token", "network"),
        pytest.param("exchange", marks=pytest.mark.skipif(not hasattr(errors, "OIDCError"), reason="it is newer")),
    ],
)
def test_missing_token_or_network_is_reported_before_any_work(
    hub: Hub,
    model: Path,
    tmp_path: Path,
    missing: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if missing == "token":
        monkeypatch.delenv("HF_TOKEN")
    elif missing == "network":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        # As in CI, but without anything to exchange for a token.
        monkeypatch.setenv("HF_OIDC_RESOURCE", REPO)
        monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    out = tmp_path / "out"
    assert main(["convert", str(model), str(out), "--quantize", "int8", "--push", REPO]) == 1
    expected = {
        "token": "hf auth login, or set HF_TOKEN",
        "network": "HF_HUB_OFFLINE is set",
        "exchange": "Error: The Hub's token could not be read.\n  HF_OIDC_RESOURCE is set but no",
    }
    assert expected[missing] in capsys.readouterr().err
    assert not out.exists()
    assert hub.steps == []


def test_private_needs_push(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(model), str(tmp_path / "out"), "--quantize", "int8", "--private"]) == 2
    assert "--private needs --push REPO." in capsys.readouterr().err


def test_push_refuses_folders_not_written_by_convert(hub: Hub, model: Path) -> None:
    with pytest.raises(CompressknowError, match=r"has no compressknow\.json"):
        compressknow.push(model, REPO)
    assert hub.steps == []


@pytest.fixture(scope="module")
def gguf(converter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a file with export."""
    pytest.importorskip("llama_cpp_py_sync")
    folder = tmp_path_factory.mktemp("gguf")
    compressknow.export(save_checkpoint("llama", folder / "tiny"), folder / "tiny.gguf", type="q8_0")
    return folder / "tiny.gguf"


def test_push_of_a_gguf_file_adds_a_card_if_there_is_none(hub: Hub, gguf: Path) -> None:
    assert compressknow.push(gguf, "me/tiny-gguf") == (f"{hub.url}/me/tiny-gguf", ())
    files = hub.repositories["me/tiny-gguf"]
    card = files.pop("README.md").decode()
    assert files == {path.name: path.read_bytes() for path in (gguf, gguf.with_name("tiny.gguf.json"))}
    assert yaml.safe_load(card.split("---\n")[1]) == {"tags": ["compressknow", "gguf"]}
    assert r"| attention | q8\_0 |" in card
    files["README.md"] = b"mine"
    assert compressknow.push(gguf, "tiny-gguf").url == f"{hub.url}/me/tiny-gguf"
    assert hub.repositories["me/tiny-gguf"]["README.md"] == b"mine"


def test_failed_upload_of_a_gguf_file_names_the_command_to_try_again(hub: Hub, gguf: Path) -> None:
    hub.faults["commit"] = 500
    with pytest.raises(CompressknowError, match="is complete, but could not be uploaded") as raised:
        compressknow.push(gguf, "me/tiny-gguf")
    assert raised.value.hint == f"Try again: hf upload me/tiny-gguf {gguf.parent} . --include 'tiny.gguf*'"


def test_command_to_try_again_uploads_a_file_whose_name_looks_like_a_pattern(tmp_path: Path) -> None:
    names = ["tiny[1].gguf", "tiny[1].gguf.json"]
    (tmp_path / names[0]).touch()
    *_, pattern = shlex.split(uploads.build_retry_command(tmp_path / names[0], REPO, None))
    assert list(filter_repo_objects([*names, "tiny1.gguf"], allow_patterns=pattern)) == names


def test_export_lists_the_upload_in_a_dry_run_and_pushes_otherwise(
    hub: Hub, gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", str(gguf.with_name("tiny")), str(tmp_path / "new.gguf"), "--type", "q8_0", "--push", REPO]
    assert main([*words, "--dry-run"]) == 0
    printed = capsys.readouterr().out.partition("Would upload to ")[2]
    assert printed.startswith(f"{hub.url}/{REPO} (if it is new: public,")
    assert [line.split()[0] for line in printed.splitlines()[1:]] == ["README.md", "new.gguf", "new.gguf.json"]
    assert hub.steps == []
    assert main(words) == 0
    assert hub.repositories[REPO]["new.gguf"] == (tmp_path / "new.gguf").read_bytes()


def test_endpoint_comes_from_the_environment_and_the_retry_command_works(converted: Path, tmp_path: Path) -> None:
    """Run both in new processes: the upload fails, and then the printed command of huggingface_hub succeeds."""
    with serve() as hub:
        hub.faults = {"commit": 500}
        environment = os.environ | {
            **{"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"},
            **{"HF_HOME": str(tmp_path)},
        }
        code = f"import compressknow; compressknow.push({str(converted)!r}, {REPO!r})"
        failed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert failed.returncode == 1
        command = shlex.split(failed.stderr.strip().splitlines()[-1].partition("ry again: ")[2])
        hub.faults = {}
        hf = Path(sys.executable).with_name(command[0])
        subprocess.run([hf, *command[1:]], env=environment, check=True, capture_output=True)
        assert hub.repositories == {REPO: read_files(converted)}
