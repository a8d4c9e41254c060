"""Fakes that are hostile on purpose: a clock that starts anywhere, drifts and steps, and a store that fails when told to."""
