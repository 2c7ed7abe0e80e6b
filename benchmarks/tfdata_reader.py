"""The tf.data side of the loader's measurement, in a process and an environment of its own.

Needs TensorFlow and TensorFlow Datasets and nothing of this project. Reads the orders of
`loader.py` from standard input, a line each, "VARIANT SECONDS", and answers with a line of JSON:
steps taken and processor seconds used. One thread does all the work: that is the most that tf.data
yields for a core. Every variant yields batches of 32 steps: one camera's frame with action, state
and instruction, over and over::

    lanczos    episodes of tfds, frames left encoded; steps flattened; decoded; Lanczos, antialiased
               to 224 px: what the usual Open-X loaders do
    decode     the same without the resize
    bilinear   features, then tf.image.resize's plain setting
    features   episodes of tfds, which decodes that camera itself; steps flattened
    parse      no tfds: the records parsed for these four features only, steps flattened, decoded
"""

import json
import os
import sys
import time
from collections.abc import Iterator

os.environ.update(CUDA_VISIBLE_DEVICES="-1", TF_CPP_MIN_LOG_LEVEL="3")

import tensorflow as tf
import tensorflow_datasets as tfds

BATCH = 32
WARM_BATCHES = 2
RESIZED = (224, 224)  # px
CAMERA = "image_0"


def _episodes(path: str, *, decode: bool) -> tf.data.Dataset:
    """Episodes of tfds, the camera's frames decoded or not, all others never."""
    builder = tfds.builder_from_directory(path)
    cameras = [k for k in builder.info.features["steps"]["observation"] if k.startswith("image")]
    skipped = {k: tfds.decode.SkipDecoding() for k in cameras if not (decode and k == CAMERA)}
    return builder.as_dataset(
        split="train",
        decoders={"steps": {"observation": skipped}},
        read_config=tfds.ReadConfig(try_autocache=False),
    )


def _steps(episodes: tf.data.Dataset) -> tf.data.Dataset:
    """The steps of all episodes, over and over, only what is needed of them."""

    def needed(step):
        observation = step["observation"]
        return {
            "image": observation[CAMERA],
            "state": observation["state"],
            "action": step["action"],
            "instruction": step["language_instruction"],
        }

    return episodes.repeat().flat_map(lambda episode: episode["steps"]).map(needed)


def _parsed(path: str) -> tf.data.Dataset:
    """As `_steps`, frames encoded, straight from the records."""
    text = tf.io.RaggedFeature(tf.string)
    numbers = tf.io.RaggedFeature(tf.float32)
    wanted = {
        f"steps/observation/{CAMERA}": text,
        "steps/observation/state": numbers,
        "steps/action": numbers,
        "steps/language_instruction": text,
    }

    def parse(record):
        found = tf.io.parse_single_example(record, wanted)
        image, state, action, instruction = (found[key] for key in wanted)
        return tf.data.Dataset.from_tensor_slices(
            {
                "image": image,
                "state": tf.reshape(state, [-1, 7]),
                "action": tf.reshape(action, [-1, 7]),
                "instruction": instruction,
            }
        )

    files = sorted(tf.io.gfile.glob(os.path.join(path, "*.tfrecord*")))
    return tf.data.TFRecordDataset(files).repeat().flat_map(parse)


def _decode(step):
    return {**step, "image": tf.io.decode_jpeg(step["image"], channels=3)}


def _lanczos(step):
    image = tf.image.resize(step["image"], RESIZED, method="lanczos3", antialias=True)
    return {**step, "image": tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)}


def _bilinear(step):
    return {**step, "image": tf.cast(tf.image.resize(step["image"], RESIZED), tf.uint8)}


def _batches(variant: str, path: str) -> Iterator[object]:
    """Endless batches of a variant."""
    if variant in ("features", "bilinear"):
        steps = _steps(_episodes(path, decode=True))
    elif variant == "parse":
        steps = _parsed(path).map(_decode)
    else:
        steps = _steps(_episodes(path, decode=False)).map(_decode)
    if variant == "lanczos":
        steps = steps.map(_lanczos)
    elif variant == "bilinear":
        steps = steps.map(_bilinear)
    options = tf.data.Options()
    options.autotune.enabled = False
    options.threading.private_threadpool_size = 1
    return iter(steps.batch(BATCH).with_options(options))


def main() -> None:
    """Answers orders until standard input ends."""
    path = sys.argv[1]
    open_variants: dict[str, Iterator[object]] = {}
    for line in sys.stdin:
        variant, seconds = line.split()
        if variant not in open_variants:
            open_variants[variant] = _batches(variant, path)
        batches = open_variants[variant]
        for _ in range(WARM_BATCHES):
            next(batches)
        steps, start = 0, time.process_time()
        while (used := time.process_time() - start) < float(seconds):
            next(batches)
            steps += BATCH
        print(json.dumps({"steps": steps, "cpu_seconds": used}), flush=True)


if __name__ == "__main__":
    main()
