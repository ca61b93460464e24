"""What is built works where the repository is not."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import compressknow

ROOT = Path(__file__).parent.parent
RENDER = """
import sys
sys.path.insert(0, {site!r})
import compressknow
from compressknow.report import pages as templates
assert compressknow.__file__.startswith({site!r}), compressknow.__file__
print(templates.render("model_card.md.j2", **{values!r}))
"""
VALUES = {
    **dict.fromkeys(["name", "setup", "version", "architecture", "size_before", "size_after"], "x"),
    **dict.fromkeys(
        ["zeros_before", "zeros_after", "transformers_code", "load_code", "recipe", "command", "runs"], "x"
    ),
    **dict.fromkeys(["revision", "pruned", "quantized", "generate_needs_load", "vllm"], False),
    **{"metadata": {"license": "mit"}, "deeds": [], "rows": [], "untied": [], "warnings": []},
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_wheel_carries_what_it_needs_and_no_more(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name.startswith(f"compressknow-{compressknow.__version__}-")
    assert {f"compressknow/templates/{path.name}" for path in (ROOT / "templates").iterdir()} <= set(names)
    assert "compressknow/py.typed" in names
    assert {name.split("/")[0] for name in names} == {
        "compressknow",
        f"compressknow-{compressknow.__version__}.dist-info",
    }


def test_installed_wheel_renders_templates_outside_the_repository(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    code = RENDER.format(site=str(site), values=VALUES)
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("---\nlicense: mit\n---\n")


def test_dependencies_are_free_of_indexes_and_local_versions(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(next(name for name in archive.namelist() if name.endswith("METADATA"))).decode()
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:")]
    assert any("torch" in line for line in required)
    assert not [line for line in required if "://" in line or "+" in line]
