"""The auction timer core: a pure fold (`domain`), its outside forms (`contract`), and the shell that commits it."""
