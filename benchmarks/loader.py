"""Speed and memory of the data path, against the bare JPEG decoder and against tf.data.

    python benchmarks/loader.py --json [--tensorflow-python /path/to/python]

All sides read the same files (`synthetic_bridge.py`), with one thread each, and take turns on one
core, half a second each, for many rounds, there and back, so that whatever else the machine does
hits all alike. Rates are per second of processor time; a number is the median over the rounds, a
ratio that of the rounds' ratios, and half of the rounds lie between a line's `quartiles`. The
sides::

    decoder          frames in memory -> pixels, nothing else
    ours             the loader, one camera, 16 actions a sample, batches of 32, one frame a sample
    ours_two_frames  the same with the next frame
    ours_resized     as ours, each frame brought to 224 px on the host, bicubic and antialiased
    tfdata_*         `tfdata_reader.py`, in an environment that has TensorFlow

Ours yields frames as they are stored, since they are resized on device; only where sets of
different sizes share a batch must the host do it (`data.frame_px`). tf.data is measured with
its usual resize (`lanczos`), with its cheapest (`bilinear`, called plain in the ratios) and with
none (`unresized`), so that what it pays for the resize shows. No loader that decodes with
libjpeg-turbo, as all of these do, can be faster than `decoder`: over the last no more is to be had
than `decoder_over_tfdata_unresized`.
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import synthetic_bridge
from tqdm import tqdm

from data_pipelines.index.build import build_index
from data_pipelines.index.format import (
    HEADER_FILE,
    EpisodeEntry,
    Header,
    Index,
)
from data_pipelines.index.writer import write_index
from data_pipelines.loader import Loader
from data_pipelines.mixture import MixtureSource
from data_pipelines.oxe.registry import spec_named
from data_pipelines.sampling import StepSource
from data_pipelines.statistics import index_statistics, normalizers

CAMERA = synthetic_bridge.SEEN[0]
BATCH, ACTION_HORIZON, STATE_DIM = 32, 16, 8
WARM_BATCHES = 2  # of a turn, not counted
NO_TOKENS = {
    **{f"{segment}_ids": np.zeros(64, np.int32) for segment in ("prefix", "suffix")},
    **{name: np.zeros(64, bool) for name in ("prefix_mask", "suffix_mask", "loss_mask")},
}
RESIZED = (224, 224)  # px, as tf.data's sides
STATISTICS_STEPS = 100  # of an episode
TFDATA = ("lanczos", "bilinear", "decode", "features", "parse")
TFDATA_UNRESIZED = ("decode", "features")  # of tfds
GIB = 2**30

Side = Callable[[float], float]  # seconds of processor time to work -> items per second of it


@dataclass(frozen=True)
class Results:
    """Numbers by name, one for each round, in the order in which they are printed."""

    rounds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        """One more round's number."""
        self.rounds.setdefault(name, []).append(value)

    def ratio(self, name: str, over: str, *under: str) -> None:
        """Adds the rounds' ratios; `over` to the best of `under` in that round."""
        if all(key in self.rounds for key in (over, *under)):
            rows = zip(self.rounds[over], *(self.rounds[key] for key in under), strict=True)
            self.rounds[name] = [top / max(rest) for top, *rest in rows]

    def lines(self) -> list[dict[str, Any]]:
        """Median, quartiles, smallest and largest of each."""
        lines = []
        for name, values in self.rounds.items():
            low, quarter, middle, three_quarters, high = (
                float(f"{value:.4g}") for value in np.quantile(values, (0, 0.25, 0.5, 0.75, 1))
            )
            lines.append(
                {
                    "name": name,
                    "value": middle,
                    "quartiles": [quarter, three_quarters],
                    "minimum": low,
                    "maximum": high,
                    "rounds": len(values),
                }
            )
        return lines


def prompt(instruction: str, annotation: object) -> dict[str, np.ndarray]:
    """No tokenizer: the same empty segments for every sample."""
    return NO_TOKENS


def make_loader(
    indexes: Sequence[Index],
    *,
    next_frames: bool,
    size: tuple[int, int] | None = None,
    threads: int = 0,
) -> Loader:
    """The loader over these datasets, equally weighted, with threads beside the one that asks.

    Args:
      indexes: of the datasets.
      next_frames: whether each sample has two frames.
      size: (height, width) in px that frames are brought to; None for none.
      threads: see above.
    """
    sources = tuple(
        StepSource(
            index=index,
            views=(CAMERA,),
            action_horizon=ACTION_HORIZON,
            next_frames=next_frames,
            image_size=size,
        )
        for index in indexes
    )
    # The datasets are copies of one.
    normalizer = normalizers(index_statistics(indexes[0]))
    return Loader(
        source=MixtureSource(sources=sources, weights=(1.0,) * len(sources)),
        prompt=prompt,
        normalizers={source.name: normalizer for source in sources},
        state_dim=STATE_DIM,
        batch_size=BATCH,
        num_threads=threads,
    )


def decoder_side(index: Index) -> Side:
    """Frames in memory to pixels, with the loader's settings."""
    jpegs = []
    for place in index.frames[CAMERA]:
        with open(Path(index.source) / index.header.files[place["file"]].path, "rb") as file:
            file.seek(int(place["offset"]))
            jpegs.append(file.read(int(place["length"])))

    position = 0

    def run(seconds: float) -> float:
        nonlocal position
        first, start = position, time.process_time()
        while time.process_time() - start < seconds:
            data = jpegs[position % len(jpegs)]
            simplejpeg.decode_jpeg(data, "RGB", fastdct=True, fastupsample=False)
            position += 1
        return (position - first) / (time.process_time() - start)

    return run


def our_side(loader: Loader) -> Side:
    """Frames of the loader."""
    batches = loader.iterate()

    def run(seconds: float) -> float:
        for _ in range(WARM_BATCHES):
            next(batches)
        count, start = 0, time.process_time()
        while time.process_time() - start < seconds:
            batch = next(batches)
            count += int(batch.view_mask.sum() + batch.next_mask.sum())
        return count / (time.process_time() - start)

    return run


def tensorflow_lack(python: str) -> str:
    """Why an interpreter cannot run the tf.data side; empty if it can."""
    if shutil.which(python) is None:
        return "no such interpreter"
    check = [python, "-c", "import tensorflow, tensorflow_datasets"]
    found = subprocess.run(check, capture_output=True, text=True, check=False)
    return found.stderr.strip().splitlines()[-1] if found.returncode else ""


@contextmanager
def tfdata_sides(python: str | None, data: Path) -> Iterator[dict[str, Side]]:
    """The variants of `tfdata_reader.py`, in a process of its own; none without TensorFlow."""
    python = python or sys.executable
    lack = tensorflow_lack(python)
    if lack:
        print(
            f"tf.data is left out: {python}: {lack}; name an interpreter that has tensorflow and "
            f"tensorflow_datasets with --tensorflow-python",
            file=sys.stderr,
        )
        yield {}
        return
    script = str(Path(__file__).with_name("tfdata_reader.py"))
    # Its own packages only, not those that this process was pointed to.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    with subprocess.Popen(
        [python, script, str(data)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        orders, answers = process.stdin, process.stdout

        def side(variant: str) -> Side:
            def run(seconds: float) -> float:
                print(variant, seconds, file=orders, flush=True)
                line = answers.readline()
                if not line:
                    raise RuntimeError(f"{script} ended with status {process.wait()}")
                answer = json.loads(line)
                return answer["steps"] / answer["cpu_seconds"]

            return run

        yield {f"tfdata_{variant}_steps_per_second": side(variant) for variant in TFDATA}
        orders.close()


def cpu_seconds() -> float:
    """Processor time of this process and of its ended children."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def index_seconds(data: Path, folder: Path, episodes: int) -> float:
    """Processor seconds to index 1000 episodes."""
    start = cpu_seconds()
    build_index(data, "train", folder, workers=1)
    return (cpu_seconds() - start) * 1000 / episodes


def statistics_rate(index: Index) -> float:
    """Steps a second of processor time, nothing cached."""
    for file in index.folder.glob("statistics*"):
        file.unlink()
    start = cpu_seconds()
    index_statistics(index)
    return len(index) / (cpu_seconds() - start)


def wide_index(folder: Path, like: Index, episodes: int) -> Index:
    """An index of many steps without frames, for the statistics."""
    random, rows = np.random.default_rng(0), STATISTICS_STEPS
    steps = np.arange(rows, dtype=np.int32)
    widths = like.spec.action_dim, like.spec.state_dim

    def entry(number: int) -> EpisodeEntry:
        actions, states = (random.normal(size=(rows, n)).astype(np.float32) for n in widths)
        return EpisodeEntry(
            key=str(number),
            file=0,
            record=number,
            success=None,
            actions=actions,
            states=states,
            frame=steps,
            next_frame=np.minimum(steps + 1, rows - 1),
            instructions=[""] * rows,
            annotations=[],
            flags=np.zeros(rows, np.uint8),
            frames={},
            stored_steps=rows,
        )

    header = Header(
        dataset=like.header.dataset,
        version="1.0.0",
        split="train",
        source="",
        spec=spec_named(synthetic_bridge.NAME),
        cameras={},
        files=like.header.files,
    )
    return write_index(folder, header, (entry(number) for number in range(episodes)))


def copies(index: Index, root: Path, count: int) -> list[Path]:
    """The index under so many names, pointing at the same files."""
    folders = []
    for number in range(count):
        folder = root / f"copy_{number}"
        if not folder.is_dir():
            shutil.copytree(index.folder, folder, ignore=shutil.ignore_patterns("statistics*"))
            header = json.loads((folder / HEADER_FILE).read_text(encoding="utf-8"))
            header["dataset"] = f"{header['dataset']}_{number}"
            (folder / HEADER_FILE).write_text(json.dumps(header), encoding="utf-8")
        folders.append(folder)
    return folders


def memory_gb(field_name: str) -> float:
    """A field of this process's memory report, GiB: VmHWM is the most resident so far."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields[field_name].split()[0]) * 1024 / GIB


def loading_memory(folders: Sequence[Path], samples: int) -> dict[str, float]:
    """What a process of its own holds while it draws samples from these datasets, GiB."""
    before = memory_gb("VmHWM")
    loader = make_loader([Index.open(folder) for folder in folders], next_frames=True, threads=2)
    batches = loader.iterate()
    for _ in range(0, samples, BATCH):
        next(batches)
    held = {"before": before, "peak": memory_gb("VmHWM"), "anonymous": memory_gb("RssAnon")}
    batches.close()  # type: ignore[attr-defined]
    return held


def measure_memory(results: Results, index: Index, root: Path, datasets: int, samples: int) -> None:
    """Peak memory with one dataset and with many."""
    folders = copies(index, root, datasets)
    for count, name in ((1, "1_dataset"), (datasets, f"{datasets}_datasets")):
        # A pool of this kind says so if its process dies.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            held = pool.submit(loading_memory, folders[:count], samples).result()
        results.add(f"peak_memory_gb_{name}", held["peak"])
        results.add(f"unshared_memory_gb_{name}", held["anonymous"])
        results.add(f"memory_gb_before_opening_{name}", held["before"])


def derive(results: Results) -> None:
    """The ratios, and what a name of the table calls best."""
    ours, decoder = "ours_frames_per_second", "decoder_frames_per_second"
    results.ratio("ours_over_decoder", ours, decoder)
    results.ratio("ours_two_frames_over_decoder", "ours_two_frames_frames_per_second", decoder)
    lanczos = "tfdata_lanczos_steps_per_second"
    results.ratio("ours_over_tfdata_lanczos", ours, lanczos)
    results.ratio("ours_resized_over_tfdata_lanczos", "ours_resized_frames_per_second", lanczos)
    results.ratio("ours_over_tfdata_plain", ours, "tfdata_bilinear_steps_per_second")
    unresized = [f"tfdata_{variant}_steps_per_second" for variant in TFDATA_UNRESIZED]
    results.ratio("ours_over_tfdata_unresized", ours, *unresized)
    results.ratio("decoder_over_tfdata_unresized", decoder, *unresized)
    results.ratio("ours_over_tfdata_parse", ours, "tfdata_parse_steps_per_second")


def run(arguments: argparse.Namespace, work: Path) -> Results:
    """All measurements."""
    data = synthetic_bridge.open_or_write(arguments.data, arguments.episodes)
    index = build_index(data, "train", work / "index")
    wide = wide_index(work / "wide_index", index, arguments.statistics_episodes)
    results = Results()
    lengths = index.frames[CAMERA]["length"]
    results.add("jpeg_kilobytes_mean", float(lengths.mean()) / 1000)
    with tfdata_sides(arguments.tensorflow_python, data) as tfdata:
        one, two = (our_side(make_loader([index], next_frames=frames)) for frames in (False, True))
        resized = our_side(make_loader([index], next_frames=False, size=RESIZED))
        sides: Mapping[str, Side] = {
            "decoder_frames_per_second": decoder_side(index),
            "ours_frames_per_second": one,
            "ours_two_frames_frames_per_second": two,
            "ours_resized_frames_per_second": resized,
            **tfdata,
        }
        results.rounds.update({name: [] for name in sides})  # in this order
        for number in tqdm(range(-1, arguments.rounds), desc="rounds", file=sys.stderr):
            for name, side in list(sides.items())[:: 1 if number % 2 else -1]:
                rate = side(arguments.seconds)
                if number >= 0:  # the first round warms caches
                    results.add(name, rate)
            if number >= 0:
                folder = work / f"index_{number}"
                seconds = index_seconds(data, folder, arguments.episodes)
                results.add("index_seconds_per_1000_episodes", seconds)
                results.add("stats_steps_per_second", statistics_rate(wide))
    derive(results)
    rates = results.rounds["stats_steps_per_second"]
    results.rounds["stats_minutes_per_10_million_steps"] = [1e7 / rate / 60 for rate in rates]
    measure_memory(results, index, work / "copies", arguments.datasets, arguments.samples)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description="Speed and memory of the data path.")
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    parser.add_argument("--tensorflow-python", metavar="PATH", help="interpreter with TensorFlow")
    cache = Path(tempfile.gettempdir()) / "lara_benchmark_data"
    parser.add_argument("--data", type=Path, default=cache, help="where the made-up data lies")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--statistics-episodes", type=int, default=3000, metavar="N")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=0.5, help="processor time of a turn")
    parser.add_argument("--datasets", type=int, default=50, help="of the large mixture")
    parser.add_argument("--samples", type=int, default=4096, help="drawn to measure memory")
    arguments = parser.parse_args(argv)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory(prefix="lara_benchmark_") as work:
        results = run(arguments, Path(work))
    for line in results.lines():
        if arguments.json:
            print(json.dumps(line))
        else:
            low, high = line["quartiles"]
            print(f"{line['name']:42} {line['value']:>10g}  ({low:g} .. {high:g})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
