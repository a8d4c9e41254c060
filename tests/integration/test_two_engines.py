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
    """Records, chains, closes, timers, event lane and answers are those of the fold; nobody commits without the lease."""
    verdict, done = asyncio.run(one_run(seconds=SECONDS, auctions=AUCTIONS, seed=random.randrange(2**32)))
    print(done)
    assert verdict.counts() == dict.fromkeys(CHECKS, 0), verdict.findings
    assert (done["died"], done["tracebacks"]) == (0, 0)
    assert done["faults"].keys() <= FAULTS.keys()
    assert sum(done["faults"].values()) >= 2
    assert verdict.closed > AUCTIONS / 3
    assert done["claims"] > 8, "no shard changed hands"


def claimed(shard: int, holder: str) -> list[str]:
    """The lines of MONITOR about a claim."""
    return [
        f'1700000000.000001 [0 unix:/s] "EVALSHA" "c1a1" "1" "auction:lease:{{{shard}}}" "{holder}" "-1" "-1"',
        f'1700000000.000001 [0 lua] "HINCRBY" "auction:lease:{{{shard}}}" "epoch" "1"',
        f'1700000000.000001 [0 lua] "HSET" "auction:lease:{{{shard}}}" "holder" "{holder}" "beat" "0"',
    ]


def committed(
    shard: int, epoch: int, holder: str, commit_id: str, *, accepted: bool, script: str = '"EVALSHA" "c0de"'
) -> list[str]:
    """The lines of MONITOR about a commit."""
    keys = f'"auction:lease:{{{shard}}}" "auction:cursor:{{{shard}}}" "auction:updates:{{{shard}}}"'
    asked = f'1700000000.000001 [0 unix:/s] {script} "3" {keys} "{epoch} {holder}" "{commit_id}" "say \\"so\\""'
    done = f'1700000000.000001 [0 lua] "HSET" "auction:cursor:{{{shard}}}" "intake" "1-0" "commit" "{commit_id}"'
    return [asked, done] if accepted else [asked]


def witness(*told: list[str]) -> Witness:
    """A witness that was told this."""
    seen = Witness()
    for lines in told:
        for line in lines:
            seen.see(line)
    return seen


def test_the_witness_reads_who_committed_what() -> None:
    """A commit counts once the script has moved the cursor; one of an old epoch that was refused is counted as such."""
    seen = witness(
        claimed(3, "left"),
        committed(3, 1, "left", "a", accepted=True, script='"EVAL" "-- KEYS 1 \\"auction:lease:{k}\\"\\nreturn"'),
        claimed(3, "right"),
        committed(3, 1, "left", "b", accepted=False),
        committed(3, 2, "right", "c", accepted=True),
    )
    assert seen.accepted == {3: [Commit(1, "left", "a"), Commit(2, "right", "c")]}
    assert (seen.claims, seen.refused, seen.foreign) == (2, 1, [])


@pytest.mark.parametrize("last", [(1, "left"), (2, "left"), (1, "right")])
def test_the_witness_names_a_commit_that_should_have_been_fenced(last: tuple[int, str]) -> None:
    """A commit that was accepted under an epoch or for a holder that the lease did not name is found."""
    seen = witness(claimed(3, "left"), claimed(3, "right"), committed(3, *last, "a", accepted=True))
    assert len(seen.foreign) == 1
