"""The stack on one machine, as far as it can be told without starting it: `tests/integration/test_serve.py` starts it."""

from structlog.testing import capture_logs

from auction_timer.embedded import StartProgress, StartState
from auction_timer.stack import _Told


def test_a_store_that_loads_is_told_of_as_it_gets_on() -> None:
    """Looks come many times a second; a line is logged when the state changes, and for each tenth that was loaded."""
    tell = _Told()
    with capture_logs() as lines:
        for progress in (
            StartProgress(StartState.SILENT),
            StartProgress(StartState.SILENT),
            StartProgress(StartState.LOADING, 1.0),
            StartProgress(StartState.LOADING, 9.9),
            StartProgress(StartState.LOADING, 10.1),
        ):
            tell(progress)
    assert [(line["state"], line["loaded_percent"]) for line in lines] == [
        (StartState.SILENT, None), (StartState.LOADING, 1.0), (StartState.LOADING, 10.1),
    ]  # fmt: skip
