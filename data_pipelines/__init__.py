"""RLDS directories on disk to batches of NumPy arrays. No device code, no TensorFlow, no torch.

rlds/         TFRecord files, TFDS directories, reading and writing
datasets.py   what each dataset is, and its standard form      episodes.py   steps, frames, chunks
stats.py      statistics for normalisation                     loader.py     shuffle, rows, batches
cli.py        `lara data VERB`
"""
