"""Load tests: whole scenarios against a running system, held to budgets. `python -m loadtests --help`."""
