"""The forms in which the core meets the outside: Redis names, intake bodies, hashes, audit records, frames, cursors. Pure."""
