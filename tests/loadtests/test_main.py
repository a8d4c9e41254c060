"""The load test as a command: against a stack of the tests, and against one of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.live import LiveStack, children_of

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parent.parent.parent
WITHIN_S = 120
GENEROUS = "[steady.{phase}]\ntick_p99_ms = 10_000\nbid_p99_ms = 10_000\nfailures = 0\n"
IMPOSSIBLE = "[steady.{phase}]\ntick_p99_ms = -1\nbid_p99_ms = -1\nfailures = 0\n"


def loadtest(tmp_path: Path, budget: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run it. In a process of its own: gevent and pytest do not share one."""
    budgets = tmp_path / "budgets.toml"
    budgets.write_text(budget.format(phase="one") + budget.format(phase="spread"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    return subprocess.run(
        [sys.executable, "-m", "loadtests", "--budgets", str(budgets), *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=WITHIN_S,
    )


@pytest.mark.requirement("R7")
def test_twenty_watchers_on_four_auctions(tmp_path: Path) -> None:
    """It starts a stack, everybody is served, the table says so, and nothing is left running."""
    done = loadtest(tmp_path, GENEROUS, "--phase", "spread", "--watchers", "20", "--auctions", "4", "--seconds", "5")
    assert done.returncode == 0, done.stderr
    rows = {row.split()[0]: row.split() for row in done.stdout.splitlines() if row}
    assert rows["connect"][1:3] == ["20", "0"]
    assert int(rows["tick"][1]) >= 20
    assert int(rows["bid"][1].replace(",", "")) >= 20
    assert not [command for command in children_of(os.getpid()).values() if "loadtests" in command]


def test_a_broken_budget_is_an_exit_code(tmp_path: Path, live_stack: LiveStack) -> None:
    """Against a running gateway; with a budget that nothing can keep, it names each breach and ends with 1."""
    done = loadtest(
        tmp_path, IMPOSSIBLE, "--url", live_stack.url, "--phase", "one", "--watchers", "3", "--seconds", "2"
    )
    assert done.returncode == 1, done.stderr
    told = [row for row in done.stdout.splitlines() if row.startswith("broken: ")]
    assert [row.split()[1:5] for row in told] == [
        ["steady.one:", "p99", "of", "tick"],
        ["steady.one:", "p99", "of", "bid"],
    ]


def test_without_a_server_it_says_so(tmp_path: Path) -> None:
    """No gateway at the URL: an exit code of its own, and no traceback."""
    done = loadtest(tmp_path, GENEROUS, "--url", "http://127.0.0.1:9", "--phase", "one")
    assert done.returncode == 2
    assert done.stderr.startswith("loadtests: ")
    assert "Traceback" not in done.stderr
