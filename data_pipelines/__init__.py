"""Robot data where it lies to batches. No device code, no TensorFlow, no torch.

oxe/           what each dataset is, its standard form, mixtures
rlds/          TFRecord files, TFDS directories        lerobot/       parquet and video
index/         the sidecar: where every step and frame lies
statistics.py  for normalisation (`accumulator.py`)    catalog.py     where a recipe's datasets are
sampling.py    a step as a sample (`frames.py`)        mixture.py     datasets as one stream
loader.py      batches on any number of hosts          annotate/      reasoning annotations
convert/       Beam jobs                               inspect_page.py  datasets as a page
cli.py         `lara data VERB`
"""
