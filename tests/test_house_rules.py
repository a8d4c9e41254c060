"""House rules that a machine can hold: who imports whom, one clock, fresh references, one version, telling names."""

import ast
import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from auction_timer import __version__, reference

ROOT = Path(__file__).parent.parent
PACKAGES = ("engine", "gateway", "reconciler", "auction_timer")

# The engine's shell: what decides, schedules and owns. The store, the clock and the settings are the ground that every role
# stands on (docs/decisions/0003-what-roles-share.md).
SHELL = {"app", "journal", "shard", "scheduler", "lease", "agenda", "metrics_server"}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(name: str) -> bool:
    return name.split(".")[0] in PACKAGES


def test_the_domain_imports_the_standard_library_only() -> None:
    """`engine.domain` imports nothing of anybody's, and nothing that reads a clock or waits."""
    import sys

    for path in modules("engine/domain"):
        for name in imports(path):
            top = name.split(".")[0]
            assert name.startswith("engine.domain") or top in sys.stdlib_module_names, f"{path}: {name}"
            assert top not in {"time", "datetime", "asyncio", "logging", "random", "os"}, f"{path}: {name}"


def test_the_contract_imports_only_the_domain_of_ours() -> None:
    """`engine.contract` is pure: of ours it knows the domain and itself."""
    for path in modules("engine/contract"):
        for name in filter(ours, imports(path)):
            assert name.startswith(("engine.domain", "engine.contract")), f"{path}: {name}"


def test_imports_point_inwards() -> None:
    """The store knows no engine, the engine no gateway, the gateway not the engine's shell, and nobody the front door."""
    for path in modules("engine"):
        for name in filter(ours, imports(path)):
            assert name.startswith("engine"), f"{path}: {name}"
            if path.parent.name == "store":
                assert name.split(".")[1] in {"store", "domain", "contract", "clock"}, f"{path}: {name}"
    for path in modules("gateway"):
        for name in filter(ours, imports(path)):
            assert not name.startswith("auction_timer"), f"{path}: {name}"
            assert not (name.startswith("engine.") and name.split(".")[1] in SHELL), f"{path}: {name}"


def test_only_one_module_reads_a_clock() -> None:
    """No `time.`, `datetime.now` or `loop.time` outside `engine/clock.py`, so that all of it runs on a fake clock."""
    reads = re.compile(r"\btime\.(time|monotonic|perf_counter)|datetime\.now|\butcnow\b|loop\.time\(")
    supervises = {"auction_timer/embedded.py", "auction_timer/processes.py"}
    for package in PACKAGES:
        for path in modules(package):
            name = path.relative_to(ROOT).as_posix()
            if name == "engine/clock.py" or name in supervises:
                continue  # a supervisor of operating-system processes counts real seconds; its clock is a parameter
            assert not reads.search(path.read_text()), name


@pytest.mark.parametrize("package", PACKAGES)
def test_names_say_what_is_inside(package: str) -> None:
    """No module is called utils, helpers, common, base, manager or misc."""
    for path in modules(package):
        assert not re.search(r"util|helper|common|\bbase\b|manager|misc", path.stem), path


def test_the_references_are_fresh() -> None:
    """Every generated page is what the code says now; `make docs` makes it so."""
    assert reference.stale() == []


def test_the_version_is_one() -> None:
    """The package, its metadata and the newest entry of the changelog agree."""
    from importlib.metadata import version

    newest = re.search(r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == __version__ == version("auction-timer")


def test_every_dependency_has_its_reason() -> None:
    """Each run-time dependency is named in the decision that gives the reasons."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    reasons = (ROOT / "docs" / "decisions" / "0002-dependencies.md").read_text()
    for dependency in project["dependencies"]:
        name = re.split(r"[\[<>=;~ ]", dependency)[0]
        assert f"`{name}`" in reasons, name


def test_the_lock_names_every_extra() -> None:
    """What a locked package wants with an extra is locked with it: pip before 23.3 takes the newest instead, and fails."""
    lock = (ROOT / "requirements.lock").read_text()
    locked = {
        found[1]: set((found[2] or "").split(","))
        for found in re.finditer(r"^([a-z0-9-]+)(?:\[(.+?)\])?==", lock, re.MULTILINE)
    }
    for name in locked:
        try:
            wanted = map(Requirement, requires(name) or ())
        except PackageNotFoundError:
            continue  # locked for another platform
        for requirement in wanted:
            if requirement.extras and any(
                requirement.marker is None or requirement.marker.evaluate({"extra": extra}) for extra in locked[name]
            ):
                assert requirement.extras <= locked[canonicalize_name(requirement.name)], f"{name}: {requirement}"


def test_every_test_says_what_it_proves() -> None:
    """Each test has a docstring."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                assert ast.get_docstring(node), f"{path}: {node.name}"


def test_no_page_leads_nowhere() -> None:
    """Every relative link of the README and of the pages under `docs/` leads to a file."""
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"
