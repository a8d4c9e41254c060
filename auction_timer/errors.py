"""What can stop the local stack from running. Each message says what was found and what to do about it.

LocalStackError
├── ServerBinaryError        no usable Redis or Valkey program on this machine
├── DataDirError             the data directory cannot be used
│   └── DataDirInUseError    somebody else is using it
├── ServerStartError         the store did not come up; trying again may help
├── UnreadableDataError      the store's files are damaged; trying again cannot help, and nothing was touched
├── ChildStartError          a role process could not be started at all
└── ChildConfigError         a role process refused its settings; trying again cannot help
"""

from collections.abc import Sequence
from pathlib import Path


class LocalStackError(Exception):
    """The root: whoever runs the local stack catches this, prints the message and exits non-zero."""


class ServerBinaryError(LocalStackError):
    """There is no program to run as the embedded store."""


class DataDirError(LocalStackError):
    """The data directory, or the directory of its socket, cannot be used as it is."""


class DataDirInUseError(DataDirError):
    """Another process uses the data directory. `holder_pid` is None if it could not be told."""

    def __init__(self, message: str, *, holder_pid: int | None) -> None:
        super().__init__(message)
        self.holder_pid = holder_pid


class ServerStartError(LocalStackError):
    """The embedded store did not come up.

    `exit_code` is the process's (negative: the signal that ended it), None if it was still running or never ran;
    `log_lines` are the last lines it logged in this start.
    """

    def __init__(self, message: str, *, exit_code: int | None = None, log_lines: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.log_lines = tuple(log_lines)


class UnreadableDataError(LocalStackError):
    """The append-only files of the data directory cannot be read. They are as they were found."""

    def __init__(self, message: str, *, data_dir: Path, file: Path) -> None:
        super().__init__(message)
        self.data_dir = data_dir
        self.file = file


class ChildStartError(LocalStackError):
    """The operating system refused to start a role process."""


class ChildConfigError(LocalStackError):
    """A role process ended with a usage or configuration error before it ever ran well."""

    def __init__(self, message: str, *, name: str, exit_code: int) -> None:
        super().__init__(message)
        self.name = name
        self.exit_code = exit_code
