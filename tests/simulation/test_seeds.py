"""Many seeds at a time: none is lost, whatever becomes of the process that runs it."""

import multiprocessing
import os
from typing import Any, cast

import pytest

from auction_timer.simulation import seeds
from auction_timer.simulation.run import Plan, small
from auction_timer.simulation.seeds import RAN_TO_ITS_END, judge, judge_all


class Deadly:
    """A plan that ends the process which is handed it."""

    seed = 66

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (9,)


@pytest.mark.requirement("B10")
def test_an_error_inside_a_simulation_is_a_violation_of_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is raised at whoever judges a thousand seeds: the outcome says where it broke."""

    def breaks(_plan: Plan) -> None:
        raise ZeroDivisionError("in the third auction")

    monkeypatch.setattr(seeds, "simulate", breaks)
    outcome = judge(small(7))
    assert not outcome.is_good
    assert outcome.plan.seed == 7
    (told,) = outcome.violations[RAN_TO_ITS_END]
    assert told.startswith("Traceback")
    assert told.endswith("ZeroDivisionError: in the third auction")


@pytest.mark.requirement("B10")
def test_a_seed_has_the_same_trace_in_any_process() -> None:
    """What runs in a process of its own, beside others or after others, is what runs here."""
    plans = [small(seed) for seed in range(3, 6)]
    outcomes = {outcome.plan.seed: outcome for outcome in judge_all(plans, processes=2)}
    assert sorted(outcomes) == [3, 4, 5]
    assert outcomes[5] == judge(plans[2])
    assert outcomes[5].cpu_s > 0
    assert multiprocessing.active_children() == []


@pytest.mark.requirement("B10")
def test_a_seed_whose_process_is_killed_fails_and_the_others_are_judged() -> None:
    """The kernel may end a process that takes too much memory: its seed is named, and the next one gets another process."""
    outcomes = {outcome.plan.seed: outcome for outcome in judge_all([cast("Plan", Deadly()), small(3)], processes=1)}
    assert outcomes[66].violations == {RAN_TO_ITS_END: ["its process ended with 9"]}
    assert outcomes[3].is_good


@pytest.mark.requirement("B10")
def test_whoever_stops_asking_leaves_no_process_behind() -> None:
    """What still runs is ended at once, however long it would have taken."""
    outcomes = judge_all((small(seed) for seed in range(10**6)), processes=2)
    next(outcomes)
    outcomes.close()
    assert multiprocessing.active_children() == []
