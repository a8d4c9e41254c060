"""Every benchmark runs in its smoke size, so that none can rot. What it measures is not judged here."""

import asyncio

import pytest

from benchmarks.__main__ import SIZES

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("name", SIZES)
def test_a_benchmark_runs_and_counts_right(name: str) -> None:
    """The smoke size runs to its end, saves nothing, and nothing closed early in it."""
    measure, _, smoke = SIZES[name]
    result = asyncio.run(measure(**smoke, save=False))
    assert result["benchmark"] == name
    assert result["measured"]
    if name == "closing":
        assert all(result["measured"][case]["closed_early"] == 0 for case in ("spread", "together"))
