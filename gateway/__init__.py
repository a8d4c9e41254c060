"""The door to the engine: HTTP, sockets, and the fan-out to everyone who watches a countdown."""
