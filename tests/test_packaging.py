"""The wheel, the dependencies and the image."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution, distributions, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import compressknow
from compressknow.base import packages
from compressknow.base.packages import GGUF_TRANSFORMERS, OPTIONAL, can_read_gguf
from tests.long import long
from tests.pages.model_card.manifests import make_manifest

ROOT = Path(__file__).parent.parent
RENDER = """
import sys
sys.path.insert(0, {site!r})
import compressknow
from compressknow.pages.model_card import render_model_card
assert compressknow.__file__.startswith({site!r}), compressknow.__file__
print(render_model_card({manifest!r}, source_card_metadata={{"license": "mit"}}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_wheel_has_only_the_package_and_its_templates(wheel: Path) -> None:
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
    code = RENDER.format(site=str(site), manifest=make_manifest())
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("---\nlicense: mit\n")


@long
@pytest.mark.network
def test_export_needs_only_the_gguf_extra(wheel: Path, smollm2: Path, tmp_path: Path) -> None:
    """Run in an environment with only the extra's requirements and pip."""
    python = _create_environment(wheel, "gguf", tmp_path / "venv")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("COMPRESSKNOW", "PYTHON"))}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": str(python.parent)}

    def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [python, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    assert "No module named 'pytest'" in run("-c", "import pytest").stderr
    done = run("-m", "compressknow", "export", smollm2, "out.gguf", "--type", "q4_k_m")
    if "could not be fetched" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    assert "Fetching llama.cpp's converter, once, into" in done.stderr
    assert (tmp_path / "out.gguf").read_bytes()[:4] == b"GGUF"


def _create_environment(wheel: Path, extra: str, folder: Path) -> Path:
    """Create an environment with the wheel and links to its requirements as installed here; return its Python."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = next(folder.glob("lib/python*/site-packages"))
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel],
        check=True,
        capture_output=True,
    )
    (package,) = distributions(path=[str(site)])
    for each in (distribution("pip"), *_find_requirements(package, extra)):
        for file in each.files or ():
            # Skip programs, which are in another folder.
            if ".." not in file.parts:
                (site / file).parent.mkdir(parents=True, exist_ok=True)
                (site / file).symlink_to(file.locate())
    return python


def _find_requirements(package: Distribution, extra: str) -> Iterator[Distribution]:
    """Yield the requirements of a package with an extra, and their requirements."""
    found = {package.name: package}
    waiting, seen = [(package.name, extra)], set()
    while waiting:
        name, of = waiting.pop()
        for requirement in map(Requirement, found[name].requires or ()):
            if requirement.marker and not requirement.marker.evaluate({"extra": of}):
                continue
            required = _normalize(requirement.name)
            with_extras = [(required, each) for each in ("", *requirement.extras)]
            waiting += [each for each in with_extras if each not in seen]
            seen.update(with_extras)
            if required not in found:
                found[required] = distribution(requirement.name)
                yield found[required]
            if not requirement.specifier.contains(found[required].version, prereleases=True):
                pytest.skip(f"{name} requires {requirement}, which is not installed here")


def test_dependencies_are_free_of_indexes_and_local_versions(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(next(name for name in archive.namelist() if name.endswith("METADATA"))).decode()
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:")]
    assert any("torch" in line for line in required)
    assert not [line for line in required if "://" in line or "+" in line]


def _normalize(requirement: str) -> str:
    """Return the name of the required package, as package indexes spell it."""
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def _read_declared() -> tuple[set[str], set[str]]:
    """Return the packages that pyproject.toml requires, and those of the extras for users."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: needs for name, needs in project["optional-dependencies"].items() if name not in ("dev", "docs")}
    # compressknow does not import the packages for other systems.
    needed = [need for need in project["dependencies"] if "sys_platform" not in need]
    return set(map(_normalize, needed)), {_normalize(n) for needs in extras.values() for n in needs} - {"compressknow"}


def _find_imported() -> set[str]:
    """Return the packages that the code imports, inside functions too."""
    nodes = [node for path in ROOT.glob("compressknow/**/*.py") for node in ast.walk(ast.parse(path.read_bytes()))]
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
    tops = {module.partition(".")[0] for module in modules} - sys.stdlib_module_names - {"compressknow"}
    packages = packages_distributions()
    return {_normalize(packages[top][0]) for top in tops}


def test_imported_and_declared_packages_are_the_same() -> None:
    declared, extras = _read_declared()
    # llama.cpp's converter imports these.
    imported_by_others = {"protobuf", "sentencepiece"}
    assert _find_imported() == (declared | extras) - imported_by_others


def test_gguf_extra_requires_a_transformers_that_reads_gguf_files() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert f"transformers>={GGUF_TRANSFORMERS}" in extras["gguf"]


def test_install_page_lists_the_required_packages_for_a_small_image() -> None:
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    listed = re.search(r"^\$ pip install --no-deps compressknow\n\$ pip install (.+(?:\n    .+)*)$", page, re.MULTILINE)
    assert listed
    names = listed.group(1).replace("\\\n", " ").split()
    assert set(names) == _read_declared()[0] - set(OPTIONAL.values())
    assert names == sorted(names)


def test_lowest_versions_tested_are_the_lowest_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "tests" / "lowest.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    required = {need.name: need.specifier for need in map(Requirement, project["dependencies"])}
    assert len(pins) == 3
    for pin in pins:
        (exact,), (lowest,) = pin.specifier, required[pin.name]
        assert (exact.operator, lowest.operator) == ("==", ">=")
        assert Version(exact.version) == Version(lowest.version), pin.name


def test_install_page_names_every_extra_and_optional_library() -> None:
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = set(project["optional-dependencies"]) - {"dev", "docs"}
    assert set(re.findall(r"^\| `compressknow\[(\w+)\]`", page, re.MULTILINE)) == extras
    assert f"There are {('no', 'one', 'two', 'three', 'four', 'five', 'six')[len(extras)]} optional extras" in page
    needed = page.partition("| command | also needs |")[2].partition("\n\n")[0]
    assert [module for module in OPTIONAL if module.replace("_", "-") not in needed] == []


@pytest.mark.long
@pytest.mark.network
def test_image_runs_compressknow(tmp_path: Path) -> None:
    """Build it with Docker if it is installed; otherwise run each RUN of the Dockerfile in a folder."""
    if shutil.which("docker"):
        subprocess.run(["docker", "build", "-q", "-t", "compressknow-test", ROOT], check=True)
        run = ["docker", "run", "--rm", "compressknow-test"]
    else:
        lines = (ROOT / "Dockerfile").read_text().splitlines()
        steps = [line.removeprefix("RUN ") for line in lines if line.startswith("RUN ")]
        assert len(steps) == 3
        assert lines[-2:] == ['ENTRYPOINT ["compressknow"]', 'CMD ["--help"]']
        folder = tmp_path / "opt"
        for step in steps:
            # Use this machine's package index, for torch too.
            step = step.partition(" --index-url ")[0]
            command = step.replace("/opt/compressknow", str(folder)).replace("/src", str(ROOT))
            subprocess.run(["bash", "-euc", command], check=True)
        run = [str(folder / "bin" / "compressknow")]
    printed = subprocess.run([*run, "--help"], capture_output=True, text=True, check=True).stdout
    assert "Compress a language model, and know what it forgot." in printed


@pytest.mark.parametrize(
    ("release", "reads"),
    [("4.57.1", False), ("5.9.0", False), ("5.22.4", False), ("5.23.0", True), ("5.100.0", True), ("6.0.0.dev0", True)],
)
def test_gguf_files_need_a_release_of_transformers_that_reads_them_correctly(
    release: str, reads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "version", lambda _: release)
    assert can_read_gguf() == reads
