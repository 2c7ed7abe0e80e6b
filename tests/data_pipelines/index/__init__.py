"""Tests of data_pipelines.index."""
