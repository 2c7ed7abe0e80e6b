"""RLDS data as TFDS writes it, without TensorFlow: TFRecord files and version directories."""
