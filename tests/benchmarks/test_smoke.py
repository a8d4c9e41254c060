"""Every benchmark runs in its smoke size, so that none can rot. What it measures is not judged here."""

import asyncio

import pytest

from benchmarks.__main__ import SIZES
from benchmarks.fanout_delivery import AUCTIONS
from benchmarks.fanout_storm import AWAY_SHARE

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("name", [name for name, (_, _, smoke) in SIZES.items() if smoke is not None])
def test_a_benchmark_runs_and_counts_right(name: str) -> None:
    """The smoke size runs to its end, saves nothing; nothing closed early in it, and no bid was missed or seen twice."""
    measure, _, smoke = SIZES[name]
    assert smoke is not None
    result = asyncio.run(measure(**smoke, save=False))
    assert result["benchmark"] == name
    assert result["measured"]
    if name == "closing":
        assert all(result["measured"][case]["closed_early"] == 0 for case in ("spread", "together"))
    if name == "simulation":
        assert [result["measured"][case]["failed"] for case in ("small", "days", "floor")] == [[], [], []]
    if name == "engines":
        (under_fire,) = result["measured"]["runs"]
        assert set(under_fire["wrong"].values()) == {0}
    if name == "fanout_delivery":
        cases = [result["measured"][topology][case] for topology in AUCTIONS for case in ("all_reading", "some_stuck")]
        assert [(case["gaps"], case["doubles"], case["readers_closed"]) for case in cases] == [(0, 0, {})] * 4
    if name == "fanout_storm":
        sockets = result["parameters"]["sockets"]
        for case, crowd in (("dropped", sockets), ("killed", sockets), ("away", sockets // AWAY_SHARE)):
            storm = result["measured"][case]
            assert (storm["gaps"], storm["doubles"]) == (0, 0)
            assert sum(storm["recovered"].values()) >= crowd
