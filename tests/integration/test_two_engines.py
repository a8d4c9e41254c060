"""Two engines on eight shards, killed, stopped and restarted at random: the log alone must explain everything afterwards."""

import asyncio
import random

import pytest

from benchmarks.engines import FAULTS, one_run
from benchmarks.engines_judge import CHECKS, Commit, Witness

SECONDS = 16.0
AUCTIONS = 60


@pytest.mark.integration
@pytest.mark.requirement("R5", "R10", "R15", "B1", "B2", "B7")
def test_two_engines_under_fire_write_what_a_fold_of_the_intake_writes() -> None:
    """Records, chains, closes, timers, event lane and answers are those of the fold; no epoch has two writers."""
    verdict, done = asyncio.run(one_run(seconds=SECONDS, auctions=AUCTIONS, seed=random.randrange(2**32)))
    print(done)
    assert verdict.counts() == dict.fromkeys(CHECKS, 0), verdict.findings
    assert (done["died"], done["tracebacks"]) == (0, 0)
    assert done["faults"].keys() <= FAULTS.keys()
    assert sum(done["faults"].values()) >= 4
    assert verdict.closed > AUCTIONS / 3
    assert done["epochs"] > 8, "no shard changed hands"


def told(shard: int, epoch: int, holder: str, commit_id: str, *, accepted: bool) -> list[str]:
    """The lines of MONITOR about one commit."""
    keys = f'"auction:lease:{{{shard}}}" "auction:cursor:{{{shard}}}" "auction:updates:{{{shard}}}"'
    lines = [
        f'1700000000.000001 [0 unix:/s] "EVALSHA" "c0de" "3" {keys} "{epoch} {holder}" "{commit_id}" "say \\"so\\""'
    ]
    if accepted:
        lines.append(
            f'1700000000.000001 [0 lua] "HSET" "auction:cursor:{{{shard}}}" "intake" "1-0" "commit" "{commit_id}"'
        )
    return lines


def witness(*commits: list[str]) -> Witness:
    """A witness that has seen these commits."""
    seen = Witness()
    for lines in commits:
        for line in lines:
            seen.see(line)
    return seen


def test_the_witness_reads_who_committed_what() -> None:
    """A commit counts once the script has moved the cursor; one of an old epoch that was refused is counted as such."""
    seen = witness(
        told(3, 1, "left", "a", accepted=True),
        told(3, 2, "right", "b", accepted=True),
        told(3, 1, "left", "c", accepted=False),
        told(3, 2, "right", "d", accepted=True),
    )
    assert seen.accepted == {3: [Commit(1, "left", "a"), Commit(2, "right", "b"), Commit(2, "right", "d")]}
    assert seen.superseded == 1
    assert seen.foreign() == []


@pytest.mark.parametrize("last", [(1, "left"), (2, "left")], ids=["an old epoch", "two holders of one epoch"])
def test_the_witness_names_a_commit_that_should_have_been_fenced(last: tuple[int, str]) -> None:
    """A commit that was accepted under a superseded epoch, or under one that somebody else wrote under, is found."""
    seen = witness(
        told(3, 1, "left", "a", accepted=True),
        told(3, 2, "right", "b", accepted=True),
        told(3, *last, "c", accepted=True),
    )
    assert len(seen.foreign()) == 1
