"""Writes the reference pages under `docs/` from the code they describe: `make docs`. A test fails while one is stale."""

import ast
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, Final, get_args

from engine.contract.metrics import CATALOGUE
from engine.domain.lifecycle import LIFECYCLE, Cell, Status, Trigger, Verdict
from engine.settings import PREFIX, Settings
from gateway.closing import meanings

ROOT: Final = Path(__file__).parent.parent
GENERATED: Final = "<!-- Made by `make docs` from the code. Do not edit. -->\n"


def pages() -> dict[str, str]:
    """Each generated page, by its path below `docs/`."""
    return {
        "configuration.md": configuration(),
        "lifecycle.md": lifecycle(),
        "metrics.md": metrics(),
        "close-codes.md": close_codes(),
        "requirements.md": requirements(),
    }


_HOW_TO_SET: Final = (
    f"Every setting is an environment variable `{PREFIX}*`, or a line of a `.env` file in the working directory. Options "
    "of the command line go before both. A list is written with commas between its items, or as JSON. An unknown name is an "
    "error. `auction-timer check-config` prints the effective settings and everything that is wrong with them."
)


def configuration() -> str:
    """Every setting, its default, and what it does."""
    rows = []
    for name, field in sorted(Settings.model_fields.items()):
        default = (
            "computed"
            if field.default_factory and name not in {"allowed_origins", "webhook_types"}
            else _shown(field.get_default(call_default_factory=True))
        )
        rows.append(f"| `{PREFIX}{name.upper()}` | {_type(field.annotation)} | {default} | {field.description} |")
    return "\n".join(
        [
            "# Configuration",
            GENERATED,
            _HOW_TO_SET,
            "",
            "| name | type | default | what it does |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


def _shown(value: Any) -> str:
    shown = ",".join(value) if isinstance(value, list) else value
    return "-" if shown in (None, "") else f"`{shown}`"


def _type(annotation: Any) -> str:
    arguments = [argument for argument in get_args(annotation) if argument is not type(None)]
    if arguments and all(isinstance(argument, str) for argument in arguments):
        return " or ".join(f"`{argument}`" for argument in arguments)
    if getattr(annotation, "__origin__", None) is list:
        return "list"
    kind = arguments[0] if arguments else annotation
    names = {"int": "integer", "str": "text", "bool": "true or false", "Path": "path"}
    return names.get(kind.__name__, str(kind.__name__))


_SAID: Final = {
    Verdict.STAY: "counts",
    Verdict.COMPARE: "same: no effect; other: `CONFLICTING_REGISTRATION`",
    Verdict.LATE: "recorded, no effect",
    Verdict.IGNORE: "-",
}


_HOW_TO_READ: Final = (
    "`start`, `open_window` and `reach_deadline` are done by time; a dash is a wake-up that no longer applies. A "
    "refusal writes nothing. `UNREGISTERED` and `TOMBSTONE` are never shown outside: readers get 404."
)


def lifecycle() -> str:
    """The life-cycle table, and the diagram drawn from it."""
    triggers = list(Trigger)
    lines = [
        "# Life cycle of an auction",
        GENERATED,
        "Drawn from the table in `engine/domain/lifecycle.py`, which is complete: every status has a cell for every trigger.",
        "",
        "```mermaid",
        "stateDiagram-v2",
        *sorted(_arrows()),
        "```",
        "",
        "| status | " + " | ".join(trigger.value for trigger in triggers) + " |",
        "|---" * (len(triggers) + 1) + "|",
    ]
    lines += [
        f"| `{status.value}` | " + " | ".join(_cell(LIFECYCLE[status][trigger]) for trigger in triggers) + " |"
        for status in Status
    ]
    lines += [
        "",
        _HOW_TO_READ,
        "",
    ]
    return "\n".join(lines)


def _arrows() -> list[str]:
    return [
        f"    {'[*]' if status is Status.UNREGISTERED else status.value} --> {to.value}: {trigger.value}"
        for status, row in LIFECYCLE.items()
        for trigger, cell in row.items()
        for to in cell.to
    ] + [f"    {status.value} --> [*]" for status in Status if status.is_terminal]


def _cell(cell: Cell) -> str:
    if cell.verdict is Verdict.MOVE:
        return "→ " + " or ".join(f"`{to.value}`" for to in cell.to)
    if cell.code is not None:
        return f"`{cell.code.value}`"
    return _SAID[cell.verdict]


def metrics() -> str:
    """Every metric, what it measures, and what to do."""
    lines = [
        "# Metrics",
        GENERATED,
        "Scraped at `/metrics`. Under `serve` one scrape holds every process of the machine.",
        "",
    ]
    for metric in CATALOGUE:
        labels = "".join(f" · label `{label}`" for label in metric.labels)
        lines += [
            f"## `{metric.name}`",
            "",
            f"{metric.kind.value}{labels}",
            "",
            metric.meaning,
            "",
            f"**When it looks wrong:** {metric.remedy}",
            "",
        ]
    return "\n".join(lines)


def close_codes() -> str:
    """The close codes, from the docstrings of their catalogue."""
    rows = [f"| {code.value} | {said} |" for code, said in meanings().items()]
    return "\n".join(["# Close codes", GENERATED, "| code | meaning |", "|---|---|", *rows, ""])


def requirements() -> str:
    """For each requirement id the tests that carry its mark."""
    proofs: defaultdict[str, list[str]] = defaultdict(list)
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Assign):
                for requirement in _marked(node):
                    name = node.name if not isinstance(node, ast.Assign) else "every test"
                    proofs[requirement].append(f"`{path.relative_to(ROOT)}` {name}")
    lines = ["# Requirements and the tests that prove them", GENERATED]
    for requirement in sorted(proofs, key=lambda name: (name[0] != "R", int(name[1:]))):
        lines += [f"## {requirement}", "", *(f"- {proof}" for proof in sorted(set(proofs[requirement]))), ""]
    return "\n".join(lines)


def _marked(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Assign) -> list[str]:
    marks = ast.walk(node.value) if isinstance(node, ast.Assign) else node.decorator_list
    return [
        argument.value
        for mark in marks
        if isinstance(mark, ast.Call) and isinstance(mark.func, ast.Attribute) and mark.func.attr == "requirement"
        for argument in mark.args
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
    ]


def stale() -> list[str]:
    """The pages that are not what the code says now."""
    return [
        name
        for name, text in pages().items()
        if not (ROOT / "docs" / name).is_file() or (ROOT / "docs" / name).read_text() != text
    ]


def main() -> None:
    """Write every page."""
    for name, text in pages().items():
        (ROOT / "docs" / name).write_text(text)
        sys.stdout.write(f"docs/{name}\n")


if __name__ == "__main__":
    main()
