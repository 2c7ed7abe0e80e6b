"""A policy behind a websocket: the server, its protocols, and a client that needs only NumPy."""
