"""No control character of any text reaches a terminal or a generated page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from compressknow.cli import main
from compressknow.cli.terminal import show, show_json
from tests.knowing import save_trained, write_facts
from tests.models import edit_config, save_tiny

# A terminal's title, a bell, C1, DEL, an override and an isolate of the text's direction, and a carriage return.
HOSTILE = "a\x1b]0;owned\x07b\x9b31mc\x7fd\u202ee\u2066f\rg"
# Markdown pages put these around right-to-left names.
ISOLATES = "\u2068\u2069"

Run = Callable[..., str]


def find_controls(text: str) -> list[str]:
    return [f"U+{ord(c):04X} in {text[max(0, i - 40) : i + 20]!r}" for i, c in enumerate(text) if not is_allowed(c)]


def is_allowed(character: str) -> bool:
    return character.isprintable() or character in ("\n", "\u200c", "\u200d", *ISOLATES)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs a command, checks that it printed no control characters, and returns its output."""

    def run(*args: str | Path, code: int | None = None) -> str:
        capsys.readouterr()
        exit_code = main(list(map(str, args)))
        out, err = capsys.readouterr()
        assert not find_controls(out), find_controls(out)
        assert not find_controls(err), find_controls(err)
        assert code is None or exit_code == code, out + err
        return out + err

    return run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny("bert", tmp_path / f"m{HOSTILE}")


def test_name_of_a_folder(model: Path, tmp_path: Path, run: Run) -> None:
    out, pruned = tmp_path / f"o{HOSTILE}", ("--prune", "0.2")
    for args in (("inspect", model), ("inspect", model, "--json"), ("convert", model, out, *pruned, "--dry-run")):
        run(*args, code=0)
    run("convert", model, out, *pruned, "--quantize", "int8", code=0)
    readme = (out / "README.md").read_text()
    assert not find_controls(readme), find_controls(readme)
    for args in (
        ("verify", out),
        ("verify", out, "--json"),
        ("compare", model, out),
        ("compare", model, out, "--json"),
    ):
        run(*args, code=0)
    pages = [tmp_path / f"c{HOSTILE}.{kind}" for kind in ("md", "json", "html")]
    run("compare", model, out, *(part for page in pages for part in ("-o", page)), code=0)
    assert not find_controls(pages[0].read_text())
    (out / HOSTILE).write_text("")
    (out / "config.json").unlink()
    assert "⟨U+001B⟩" in run("verify", out, code=1)
    run("convert", model, out, *pruned, code=1)
    run("probe", model, "-o", tmp_path / "answers", code=1)
    run("report", tmp_path / HOSTILE, model, code=None)
    run("sweep", tmp_path / HOSTILE, "-o", out)


@pytest.mark.parametrize("key", ["model_type", "architectures", "torch_dtype", "hidden_act", "auto_map", "hidden_size"])
def test_values_of_a_config(model: Path, run: Run, key: str) -> None:
    value: object = {"architectures": [HOSTILE], "auto_map": {"AutoModel": f"x.{HOSTILE}"}}.get(key, HOSTILE)
    edit_config(model, **{key: value})
    run("inspect", model)
    run("inspect", model, "--json")
    run("--debug", "inspect", model)


def test_name_of_a_tensor(model: Path, tmp_path: Path, run: Run) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, HOSTILE: tensors["bert.embeddings.LayerNorm.weight"].clone()}, model / "model.safetensors")
    run("convert", model, tmp_path / "out", "--prune", "0.2")
    run("convert", model, tmp_path / "other", "--prune", "0.2", "--json")
    run("compare", model, save_tiny("bert", tmp_path / "b"))
    index = {"weight_map": {HOSTILE: f"../{HOSTILE}"}}
    (model / "model.safetensors").rename(model / "other.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "⟨U+001B⟩" in run("inspect", model, code=1)


@pytest.mark.parametrize(
    "args",
    [
        (HOSTILE,),
        ("inspect", f"--{HOSTILE}"),
        ("inspect", "MODEL", "--module-map", HOSTILE),
        ("convert", "MODEL", "out", "--prune", HOSTILE),
        ("convert", "MODEL", "out", "--scope", HOSTILE, "--prune", "0.1"),
        ("convert", "MODEL", "out", "--include", f"({HOSTILE}", "--prune", "0.1"),
        ("convert", "MODEL", "out", "--exclude", HOSTILE, "--prune", "0.1"),
        ("convert", "MODEL", "out", "--layers", HOSTILE, "--prune", "0.1"),
        ("convert", "MODEL", "out", "--recipe", HOSTILE),
        ("probe", "MODEL", "-o", "out", "-p", HOSTILE),
        ("probe", "MODEL", "-o", "out", "-p", f"facts:{HOSTILE}"),
        ("probe", "MODEL", "-o", "out", "-p", f"hf:./{HOSTILE}"),
        ("sweep", "MODEL", "-o", "out", "--grid", HOSTILE),
        ("search", "MODEL", "-o", "out", "--keep", HOSTILE),
    ],
    ids=lambda args: " ".join(args).replace(HOSTILE, "H"),
)
def test_arguments_in_usage_errors(model: Path, tmp_path: Path, run: Run, args: tuple[str, ...]) -> None:
    words = [str(model) if arg == "MODEL" else str(tmp_path / "out") if arg == "out" else arg for arg in args]
    errors = run(*words)
    assert "Error: " in errors
    assert "owned" in errors


def test_facts_and_answers(tmp_path: Path, run: Run) -> None:
    """Put hostile texts into facts, relations, domains and the name of the model."""
    model = save_trained("bert", tmp_path / f"m{HOSTILE}")
    rows = [json.loads(line) for line in write_facts(tmp_path / "plain.jsonl").read_text().splitlines()]
    facts = tmp_path / f"f{HOSTILE}.jsonl"
    hostile = [
        row | {"relation": f"{HOSTILE}{number % 2}", "subject": f"{HOSTILE}{number % 3}", "id": f"{HOSTILE}{number}"}
        | ({"sub_label": HOSTILE} if "prompt" in row else {})
        for number, row in enumerate(rows)
    ]  # fmt: skip
    facts.write_text("\n".join(map(json.dumps, hostile)))
    out = tmp_path / f"o{HOSTILE}"
    run("convert", model, out, "--prune", "0.7", code=0)
    probe = ("-p", f"facts:{facts}")
    run("probe", model, *probe, "-o", tmp_path / f"a{HOSTILE}", code=0)
    run("probe", model, *probe, "-o", tmp_path / f"a{HOSTILE}", "--json", code=0)
    pages = [tmp_path / f"r{HOSTILE}.{kind}" for kind in ("md", "json", "html")]
    outputs = [part for page in pages for part in ("-o", page)]
    run("report", model, out, *probe, "--answers", tmp_path / "kept", *outputs, "--into-model-card", code=0)
    run("report", model, out, *probe, "--answers", tmp_path / "kept", "--json", code=0)
    run("compare", model, out, *probe, "--answers", tmp_path / "kept", code=0)
    for page in (*tmp_path.glob("*.md"), out / "README.md"):
        assert not find_controls(page.read_text()), page.name
    (tmp_path / "grid.toml").write_text('[axes]\nscope = ["attention"]\nprune = [0.5]\n')
    study = tmp_path / f"s{HOSTILE}"
    run("sweep", model, "-o", study, "--grid", tmp_path / "grid.toml", *probe, code=0)
    run("sweep", model, "-o", study, "--grid", tmp_path / "grid.toml", *probe, "--json", code=0)
    assert not find_controls((study / "study.md").read_text())
    facts.write_text(json.dumps({"prompt": HOSTILE, "obj_label": 1, HOSTILE: 2, "subjekt": HOSTILE}))
    assert "Error: " in run("probe", model, *probe, "-o", tmp_path / "b")


def test_errors_of_other_libraries_and_tracebacks(model: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError(HOSTILE)

    monkeypatch.setattr("compressknow.api.inspect.inspect_checkpoint", fail)
    assert "⟨U+009B⟩" in run("inspect", model, code=1)
    assert "Traceback" in run("--debug", "inspect", model, code=1)


def test_escaped_json_has_the_same_values(capsys: pytest.CaptureFixture[str]) -> None:
    values = {HOSTILE: [HOSTILE, "möbel 東京 🦙 \U000e0001 \ue000 \u2028", 1.5, None]}
    show_json(values)
    out = capsys.readouterr().out
    assert json.loads(out) == values
    assert not find_controls(out)
    assert "möbel 東京 🦙" in out
    show("möbel\n\t東京 \u202e")
    assert capsys.readouterr().out == "möbel\n 東京 ⟨U+202E⟩\n"
