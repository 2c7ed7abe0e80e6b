"""From a recipe file to frozen dataclasses: every number of a run, checked once.

`configs/<recipe>.py` has a `get_config()` that starts from `default_config()`, changes what the run
needs and locks it. The command line may then change single values, and the result turns ONCE into
the dataclasses below; nothing after that looks a name up in a dictionary or changes a number.

    configs/debug.py  ->  ConfigDict  ->  --config.train.steps=20  ->  Recipe  ->  checkpoint (JSON)

Defaults live here and nowhere else. Nothing here imports JAX: a recipe is readable anywhere.
"""

import dataclasses
import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from lara_jax.curriculum import Stage, in_steps, spans
from lara_jax.optimizer_config import EmaConfig, LoraConfig, OptimizerConfig, SpikeConfig
from lara_jax.plain_values import build, dotted, override
from lara_jax.tokenizers.prompt import BASE_PROMPT, BOX_DECIMALS, COMPONENTS, MAX_SLOTS

UNCHANGED = (1.0, 1.0)
FILTERS = ("pause", "no_language", "no_annotation", "failed", "bad_frame")


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    _check(value in allowed, f"{name} must be one of {', '.join(allowed)}; got {value!r}")


def _at_least(low: float, **values: float) -> None:
    for name, value in values.items():
        _check(value >= low, f"{name} must be at least {low}, got {value}")


def _size(name: str, value: tuple[int, ...]) -> None:
    _check(
        value == () or (len(value) == 2 and min(value) > 0),
        f"{name} must be (height, width) in px or (), got {value}",
    )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What the networks are; sizes belong to the model files, which know them by name.

    Attributes:
      backbone: size of the vision-language model: "debug", "2b", "4b" or "8b".
      expert: size of the action expert: "debug", "B" or "L".
      latent_slots: K, the thought slots when all reasoning is latent.
      slots_per_component: slots of each component in `component_order`; () shares K evenly, the
        first components taking what is left over.
      component_order: text order of the reasoning components; one left out never appears.
      latent_mode: "append", the paper's loop: each slot's hidden state feeds the next slot.
      latent_source: hidden state that feeds back: "pre_norm" or "post_norm" (of the final norm).
      position_mode: "mrope", or "sequential" for the authors' released checkpoints.
      base_prompt: words before the instruction; checkpoints of the reference know its default.
      box_decimals: of the numbers in explicit boxes, 1 to 4.
      img_next_tokens: visual-thought tokens, a square grid.
      action_horizon: C, actions per chunk.      action_dim: A.      state_dim: J.
      attend_padding: whether the action expert sees pads, as in the reference.
      dropout: of the action expert, 0 to 1.
      compute_dtype: "bfloat16" or "float32"; parameters are float32.
      remat: what the backward pass recomputes: "none", "full" (everything), "dots" (all but matrix
        products), or "offload" (as dots, which wait in the host's memory).
      attention: "xla", or "cudnn" (GPU).
    """

    backbone: str = "4b"
    expert: str = "B"
    latent_slots: int = 3
    slots_per_component: tuple[int, ...] = ()
    component_order: tuple[str, ...] = COMPONENTS
    latent_mode: str = "append"
    latent_source: str = "pre_norm"
    position_mode: str = "mrope"
    base_prompt: str = BASE_PROMPT
    box_decimals: int = BOX_DECIMALS
    img_next_tokens: int = 16
    action_horizon: int = 16
    action_dim: int = 7
    state_dim: int = 8
    attend_padding: bool = False
    dropout: float = 0.2
    compute_dtype: str = "bfloat16"
    remat: str = "full"
    attention: str = "xla"

    def __post_init__(self) -> None:
        _one_of("backbone", self.backbone, ("debug", "2b", "4b", "8b"))
        _one_of("expert", self.expert, ("debug", "B", "L"))
        _one_of("latent_mode", self.latent_mode, ("append",))
        _one_of("latent_source", self.latent_source, ("pre_norm", "post_norm"))
        _one_of("position_mode", self.position_mode, ("mrope", "sequential"))
        _one_of("compute_dtype", self.compute_dtype, ("bfloat16", "float32"))
        _one_of("remat", self.remat, ("none", "full", "dots", "offload"))
        _one_of("attention", self.attention, ("xla", "cudnn"))
        _at_least(
            1,
            action_horizon=self.action_horizon,
            action_dim=self.action_dim,
            state_dim=self.state_dim,
        )
        _check(
            0 <= self.latent_slots <= MAX_SLOTS,
            f"latent_slots must be 0 to {MAX_SLOTS}, got {self.latent_slots}",
        )
        order = self.component_order
        _check(
            bool(order) and len(set(order)) == len(order) and set(order) <= set(COMPONENTS),
            f"component_order must name some of {COMPONENTS}, each at most once; got {order}",
        )
        given = self.slots_per_component
        _check(
            not given or (len(given) == len(order) and min(given) >= 0),
            f"slots_per_component needs {len(order)} numbers >= 0, as component_order; got {given}",
        )
        _check(
            not given or sum(given) == self.latent_slots,
            f"slots_per_component {given} sums to {sum(given)}, but latent_slots is "
            f"{self.latent_slots}",
        )
        _check(
            1 <= self.box_decimals <= BOX_DECIMALS,
            f"box_decimals must be 1 to {BOX_DECIMALS}, got {self.box_decimals}",
        )
        side = round(self.img_next_tokens**0.5)
        _check(
            self.img_next_tokens >= 0 and side * side == self.img_next_tokens,
            f"img_next_tokens must be a square number, got {self.img_next_tokens}",
        )
        _check(0 <= self.dropout < 1, f"dropout must be in [0, 1), got {self.dropout}")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Attributes:
    path: directory with `tokenizer.json`; empty for the small built-in tokenizer.
    fast_path: directory of a FAST action tokenizer; empty to fit one to the training data, for
      stages with discrete actions.
    fast_vocabulary: tokens of a fitted one, at most as many as the tokenizer has action tokens.
    """

    path: str = ""
    fast_path: str = ""
    fast_vocabulary: int = 1024

    def __post_init__(self) -> None:
        _at_least(2, fast_vocabulary=self.fast_vocabulary)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and how much of it at a time.

    Attributes:
      path: directory or URL of a dataset (an RLDS/TFDS version directory, or a LeRobot one); with
        `mixture`, of the folder that holds its datasets by name.
      name: of the dataset's definition, where its files do not say the right one; empty otherwise.
      mixture: name of a mixture, built in or from `definitions`; empty for the dataset at `path`.
      definitions: TOML file with datasets and mixtures of one's own; empty for none.
      index_dir: folder or URL that holds the datasets' indexes, each in NAME/SPLIT; they are then
        fetched and never made. Empty for those beside the data or in the cache.
      balance: how often a mixture shows a dataset: "size", its weight times its steps, or "none",
        its weight alone.
      split: trained on.                         eval_split: held out.
      views: cameras by role ("primary", "secondary", "wrist") or by name; "primary@-2" is the
        frame two steps earlier. The first is the primary view.
      filters: steps to leave out: "pause", "no_language", "no_annotation", "failed", "bad_frame".
      chunk_hz: actions a second in a chunk, reached by joining a faster dataset's actions; 0 keeps
        each dataset's own rate.
      frame_px: (height, width) that every frame is brought to before batching; () demands that all
        frames have one size.
      mixed_action_spaces: let datasets of different action encodings share a batch.
      allow_changed_stream: resume although the data would come in another order.
      num_workers: reading processes; 0 reads in this one.
      batch_size: rows of a step over all devices and accumulation steps.
      prefix_tokens: P, room for chat, view tokens and instruction.
      suffix_tokens: S, room after the slots where a stage does not set its own.
      num_threads: reading threads; 0 reads when asked.
      resize_px: (height, width) that frames are brought to first; () keeps the camera's size.
      min_pixels: least area of a frame as the vision tower sees it; smaller ones are scaled up.
    """

    path: str = ""
    name: str = ""
    mixture: str = ""
    definitions: str = ""
    index_dir: str = ""
    balance: str = "size"
    split: str = "train"
    eval_split: str = "val"
    views: tuple[str, ...] = ("primary",)
    filters: tuple[str, ...] = ()
    chunk_hz: float = 0.0
    frame_px: tuple[int, ...] = ()
    mixed_action_spaces: bool = False
    allow_changed_stream: bool = False
    num_workers: int = 0
    batch_size: int = 8
    prefix_tokens: int = 192
    suffix_tokens: int = 64
    num_threads: int = 8
    resize_px: tuple[int, ...] = (224, 224)
    min_pixels: int = 65_536

    def __post_init__(self) -> None:
        _at_least(
            1,
            batch_size=self.batch_size,
            prefix_tokens=self.prefix_tokens,
            suffix_tokens=self.suffix_tokens,
            min_pixels=self.min_pixels,
        )
        _at_least(
            0, num_threads=self.num_threads, num_workers=self.num_workers, chunk_hz=self.chunk_hz
        )
        _one_of("balance", self.balance, ("size", "none"))
        for name in self.filters:
            _one_of("filters", name, FILTERS)
        _check(bool(self.views), "views must name at least one camera")
        _size("resize_px", self.resize_px)
        _size("frame_px", self.frame_px)

    @property
    def image_px(self) -> tuple[int, ...]:
        """(height, width) of the frames that shapes follow; () leaves it to the data."""
        return self.frame_px or self.resize_px


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Ranges to draw from; as they stand here, nothing is changed.

    OpenVLA trains with crop_area (0.9, 0.9), brightness 0.2, contrast and saturation (0.8, 1.2) and
    hue 0.05.

    Attributes:
      crop_area: the crop's area, as a part of the image's, in (0, 1].
      crop_ratio: the crop's width to height, relative to the image's; drawn uniformly in log. A
        crop that would stick out is cut at the image's border.
      brightness: largest change up or down, of a range of 1.
      contrast, saturation: factors.
      hue: largest change, in turns, at most 0.5.
    """

    crop_area: tuple[float, float] = UNCHANGED
    crop_ratio: tuple[float, float] = UNCHANGED
    brightness: float = 0.0
    contrast: tuple[float, float] = UNCHANGED
    saturation: tuple[float, float] = UNCHANGED
    hue: float = 0.0

    def __post_init__(self) -> None:
        limits = {
            "crop_area": (1e-4, 1.0),
            "crop_ratio": (1e-2, 1e2),
            "contrast": (0.0, math.inf),
            "saturation": (0.0, math.inf),
        }
        for name, (least, most) in limits.items():
            low, high = getattr(self, name)
            if not least <= low <= high <= most:
                raise ValueError(
                    f"{name} is {low, high}; allowed: {least} <= low <= high <= {most}"
                )
        for name, most in (("brightness", 1.0), ("hue", 0.5)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed 0..{most}")

    @property
    def crops(self) -> bool:
        """Whether crops can differ from the whole image."""
        return self.crop_area != UNCHANGED or self.crop_ratio != UNCHANGED

    @property
    def recolours(self) -> bool:
        """Whether colours can change."""
        return (
            bool(self.brightness or self.hue) or not self.contrast == self.saturation == UNCHANGED
        )


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis of the mesh; one may be -1, the rest (see `lara_jax.sharding`)."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The moving average of the vision tower that sets the target of visual thoughts.

    Attributes:
      enabled: without it no stage may weigh the visual loss.
      momentum: of the moving average, in float32.
      every_steps: the teacher moves every so many steps.
      resize_px: (height, width) that its frames are brought to first, which blurs them; () treats
        them as any other frame.
    """

    enabled: bool = True
    momentum: float = 0.999
    every_steps: int = 2
    resize_px: tuple[int, ...] = (112, 112)

    def __post_init__(self) -> None:
        _check(0 <= self.momentum <= 1, f"momentum must be 0 to 1, got {self.momentum}")
        _at_least(1, every_steps=self.every_steps)
        _size("resize_px", self.resize_px)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Attributes:
    steps: optimizer steps of the whole run.
    accumulate_steps: pieces a batch is cut into, one after the other, to save memory.
    stages: names of the stages, in order.
    hang_seconds: a step that takes longer ends the process (`lara_jax.cluster`); 0 for no limit.
    """

    steps: int = 1000
    accumulate_steps: int = 1
    stages: tuple[str, ...] = ()
    hang_seconds: float = 1800.0

    def __post_init__(self) -> None:
        _at_least(1, steps=self.steps, accumulate_steps=self.accumulate_steps)
        _check(self.hang_seconds >= 0, f"hang_seconds must be 0 or more, got {self.hang_seconds}")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a run is saved, what is kept, and what happens when it cannot be read.

    Attributes:
      every_steps: steps between checkpoints; the last step always has one.
      keep: newest checkpoints kept.
      keep_every_steps: those of steps that are multiples of it stay for good; 0 for none.
      best_metric: name of a logged metric, as "loss_action"; empty for none.
      best_mode: whether the best value is the "min" or the "max".
      keep_best: how many of the best are kept, besides the newest.
      on_damage: when the newest checkpoint is damaged, "previous" moves it aside, says so, and goes
        on from the one before, so that a run left alone goes on; "error" stops.
      preemption_notice: what asks a run to save and stop: "sigterm", or "gce", the metadata server
        of a Google Cloud machine besides.
    """

    every_steps: int = 1000
    keep: int = 2
    keep_every_steps: int = 0
    best_metric: str = ""
    best_mode: str = "min"
    keep_best: int = 1
    on_damage: str = "previous"
    preemption_notice: str = "sigterm"

    def __post_init__(self) -> None:
        _at_least(1, every_steps=self.every_steps, keep=self.keep, keep_best=self.keep_best)
        _one_of("best_mode", self.best_mode, ("min", "max"))
        _one_of("on_damage", self.on_damage, ("previous", "error"))
        _one_of("preemption_notice", self.preemption_notice, ("sigterm", "gce"))
        _check(
            self.keep_every_steps >= 0 and self.keep_every_steps % self.every_steps == 0,
            f"keep_every_steps must be 0 or a multiple of every_steps, {self.every_steps}; got "
            f"{self.keep_every_steps}",
        )


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What a run says about itself.

    Attributes:
      every_steps: steps between rows of metrics.
      wandb_project: project of Weights & Biases that gets them, too; empty for none.
      profile_steps: (first, last) step to trace, counted from 1; () for none.
      profile_signal_steps: how many steps to trace when the process gets SIGUSR1.
    """

    every_steps: int = 10
    wandb_project: str = ""
    profile_steps: tuple[int, ...] = ()
    profile_signal_steps: int = 5

    def __post_init__(self) -> None:
        _at_least(1, every_steps=self.every_steps, profile_signal_steps=self.profile_signal_steps)
        steps = self.profile_steps
        _check(
            not steps or (len(steps) == 2 and 1 <= steps[0] <= steps[1]),
            f"profile_steps must be (first, last) with 1 <= first <= last, or (); got {steps}",
        )


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Held-out evaluation during training, on `data.eval_split`.

    Attributes:
      every_steps: steps between evaluations, besides the last step of each stage; 0 for none.
      batches: how many of each dataset, of steps spread evenly over it.
    """

    every_steps: int = 0
    batches: int = 4

    def __post_init__(self) -> None:
        _at_least(0, every_steps=self.every_steps)
        _at_least(1, batches=self.batches)


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Attributes:
    path: a run's directory whose newest parameters a new run starts from; empty for random ones.
    """

    path: str = ""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that makes a run what it is."""

    name: str
    stages: tuple[Stage, ...]
    seed: int = 42
    train: TrainConfig = field(default_factory=TrainConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    spike: SpikeConfig = field(default_factory=SpikeConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    init: InitConfig = field(default_factory=InitConfig)

    def __post_init__(self) -> None:
        _check(0 <= self.seed < 2**32, f"seed must be 0 to 2**32 - 1, got {self.seed}")
        _check(bool(self.stages), "the recipe has no stage: name at least one in train.stages")
        _check(
            self.data.batch_size % self.train.accumulate_steps == 0,
            f"data.batch_size {self.data.batch_size} is not a multiple of "
            f"train.accumulate_steps {self.train.accumulate_steps}",
        )
        object.__setattr__(self, "stages", in_steps(self.stages, self.data.batch_size))
        spans(self.stages, self.train.steps)  # checks that their lengths add up
        for before, stage in pairwise(self.stages):
            room, needed = self.suffix_tokens(stage), self.suffix_tokens(before)
            _check(
                not stage.anneal or room >= needed,
                f"stages.{stage.name}.suffix_tokens is {room}, but it anneals: rows that are still "
                f"spoken need the room of stage {before.name!r}, {needed}",
            )
        for stage in self.stages:
            if not stage.visual_weight:
                continue
            where = f"stages.{stage.name}.visual_weight is {stage.visual_weight}, but"
            _check(self.teacher.enabled, f"{where} teacher.enabled is False: set one of them")
            _check(self.model.img_next_tokens > 0, f"{where} model.img_next_tokens is 0")

    def suffix_tokens(self, stage: Stage) -> int:
        """S of a stage."""
        return stage.suffix_tokens or self.data.suffix_tokens


def default_config() -> ConfigDict:
    """All keys with their defaults, unlocked, and no stages: where every recipe starts."""
    config = ConfigDict({"seed": 42, "stages": {}})
    for entry in dataclasses.fields(Recipe):
        if dataclasses.is_dataclass(entry.type):
            config[entry.name] = ConfigDict(dataclasses.asdict(entry.type()))  # type: ignore[operator]
    return config


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file and applies the command line's changes.

    Args:
      path: a Python file with `get_config() -> ConfigDict`.
      overrides: "section.key=value" each; tuples as "(1, 2)" or "a,b".

    Raises:
      FileNotFoundError: no such file.
      ValueError: an unknown key (with the nearest known one), a value of the wrong type or range.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no recipe at {path}")
    spec = importlib.util.spec_from_file_location(f"lara_recipe_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise ValueError(f"{path} has no function get_config()")
        values = module.get_config().to_dict()
    except (SyntaxError, ImportError, AttributeError, KeyError, NameError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    stage_defaults = {
        entry.name: entry.default
        for entry in dataclasses.fields(Stage)
        if entry.default is not dataclasses.MISSING
    }
    values["stages"] = {name: stage_defaults | stage for name, stage in values["stages"].items()}
    for change in overrides:
        override(values, change)
    return recipe_from_dict({"name": path.stem, **values})


def split_overrides(arguments: Sequence[str]) -> list[str]:
    """["--config.train.steps=3"] -> ["train.steps=3"].

    Raises:
      ValueError: any other argument.
    """
    unknown = [item for item in arguments if not item.startswith("--config.")]
    _check(not unknown, f"unknown arguments: {' '.join(unknown)}")
    return [item.removeprefix("--config.") for item in arguments]


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values, ready for JSON; `recipe_from_dict` is the inverse."""
    values = dataclasses.asdict(recipe)
    values["train"]["stages"] = [stage.name for stage in recipe.stages]
    values["stages"] = {stage.pop("name"): stage for stage in values["stages"]}
    return json.loads(json.dumps(values))


def recipe_from_dict(values: Mapping[str, Any]) -> Recipe:
    """Builds and checks the dataclasses; a key that is left out takes its default.

    Raises:
      ValueError: an unknown key, a value of the wrong type, or one that a check refuses.
    """
    values = dict(values)
    listed = values.pop("stages", {})
    names = tuple(values.get("train", {}).get("stages", ()))
    missing = [name for name in names if name not in listed]
    _check(not missing, f"train.stages names {missing}; config.stages has {sorted(listed)}")
    stages = tuple(build(Stage, {"name": n, **listed[n]}, f"config.stages.{n}") for n in names)
    return build(Recipe, values | {"stages": stages}, "config")


def recipe_changes(old: Recipe, new: Recipe) -> list[str]:
    """What differs, as lines like "train.steps: 100 -> 200"."""
    before, after = dotted(recipe_to_dict(old)), dotted(recipe_to_dict(new))
    keys = sorted(before.keys() | after.keys())
    changed = [key for key in keys if before.get(key) != after.get(key)]
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in changed]
