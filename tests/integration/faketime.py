"""A date that a test can set, for one process: Debian's libfaketime, preloaded, reads it from a file at every look."""

from pathlib import Path
from typing import Final

LIBRARY: Final = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")
MISSING: Final = (
    None if LIBRARY.exists() else f"{LIBRARY} is not there: no clock can be stepped (apt-get install faketime)"
)


class Date:
    """The date of whoever runs with `env`. Its monotonic clock is left alone."""

    def __init__(self, directory: Path, name: str) -> None:
        self._file = directory / f"{name}.date"
        self.set(0)
        self.env = {
            "LD_PRELOAD": str(LIBRARY),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }

    def set(self, ahead_s: int) -> None:
        """From now on the date is so many seconds ahead of the true one."""
        written = self._file.with_suffix(".new")
        written.write_text(f"{ahead_s:+d}")
        written.replace(self._file)
