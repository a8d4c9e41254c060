"""What the failover benchmark counts as an error of the countdown."""

import pytest

from benchmarks.failover import Sample

END = 20_000


def _sample(*, after: float, server_time: int, ends_at: int = END) -> Sample:
    return Sample("a", before=10_000.6, after=after, server_time=server_time, ends_at=ends_at)


@pytest.mark.requirement("R6")
@pytest.mark.parametrize("server_time", [10_000, 10_700, 11_400])
def test_an_answer_that_was_right_at_some_moment_of_its_request_is_right(server_time: int) -> None:
    """The first is the date of the asking, in whole milliseconds."""
    assert _sample(after=11_400.2, server_time=server_time).error_ms(END) == 0


@pytest.mark.requirement("R6")
@pytest.mark.parametrize(("server_time", "error"), [(9_300, 699.6), (11_700, 299.8)])
def test_a_date_from_outside_the_request_is_an_error(server_time: int, error: float) -> None:
    """However long the request took."""
    assert _sample(after=11_400.2, server_time=server_time).error_ms(END) == pytest.approx(error)


@pytest.mark.requirement("R6")
@pytest.mark.parametrize("ends_at", [END - 300, END + 300])
def test_a_long_request_excuses_no_wrong_end(ends_at: int) -> None:
    """Nor does a date that is wrong the other way."""
    assert _sample(after=11_400.2, server_time=10_700, ends_at=ends_at).error_ms(END) == 300
    assert _sample(after=11_400.2, server_time=9_699, ends_at=ends_at).error_ms(END) == pytest.approx(600.6)
