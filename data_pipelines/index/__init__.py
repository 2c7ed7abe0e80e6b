"""The sidecar index: one pass over a dataset's files, then any step of it by number."""
