"""How many floating-point operations a training step or a policy call takes, from sizes alone.

    model FLOPs      what the mathematics needs: the forward pass, and the backward pass of what
                     trains                                 MFU = model FLOPs / seconds / peak
    hardware FLOPs   what is executed: also what the backward pass computes again, and keys that
                     the latent loop and a kernel's blocks only pad with
                                                            HFU = hardware FLOPs / seconds / peak

Only matrix products count, 2 m k n for [m, k] by [k, n]; norms, softmax, resized frames, the
optimizer and moving averages do not. Pads count, since lengths are static.

Backward, the gradient of each of a product's two factors costs what the product does. Data
(patches, states, noisy actions, sinusoids) and frozen parameters need none, and nothing flows back
through what has nothing that trains before or in it; the EMA teacher only sees.

Attention counts each query against each key of its segments, whatever the mask. This is PaLM's
convention, and what `attention="xla"` executes: it computes the masked half of a causal product
too. (MaxText has begun to count half of it; its newer figures are smaller for that.) Where K = 0
prefix and suffix are one segment, and every token meets every other. Else the prefix meets itself,
slot k = 1..K the prefix and k slots, the suffix everything.

Letters: D text width, W vision width, E expert width.

Sources: PaLM, arXiv 2204.02311, appendix B, for MFU and HFU. `tests/test_flops.py` compares with
what JAX traces and with XLA's own count.
"""

import argparse
import dataclasses
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lara_jax import assemble
from lara_jax.batch import Batch
from lara_jax.config import Recipe, load_recipe, split_overrides
from lara_jax.curriculum import Stage
from lara_jax.lora import LORA
from lara_jax.models.action_expert import ActionExpertConfig
from lara_jax.models.lara_vla import LaraVLAConfig
from lara_jax.models.text_decoder import TextConfig
from lara_jax.models.vision_tower import VisionConfig
from lara_jax.optimizer import PARTS, TRAINED, trained_paths
from lara_jax.outline import outlines, state_outline

# How often a training step executes a forward product, by kind, under each remat policy. The last
# product of a layer only adds to the residual stream: recomputing a layer does not need it. (Under
# "dots" half of the attention is not recomputed where the product after it is frozen; that is not
# looked into.)
FORWARD_RUNS: dict[str, dict[str, int]] = {
    "none": {"dense": 1, "last": 1, "attention": 1},
    "dots": {"dense": 1, "last": 1, "attention": 2},
    "offload": {"dense": 1, "last": 1, "attention": 2},
    "full": {"dense": 2, "last": 1, "attention": 2},
}
# The latent loop keeps the outputs of its dense layers, whatever the policy is.
LOOP_RUNS = dict.fromkeys(FORWARD_RUNS, FORWARD_RUNS["dots"]) | {"none": FORWARD_RUNS["none"]}

# Products of an attention's backward pass; forward there are 2. cuDNN's kernel computes the scores
# again.
ATTENTION_GRADIENTS = {"xla": 4, "cudnn": 5}

# Parameters whose gradients pass through the decoder's layers, so that these are differentiated.
BACKBONE = ("vision", "text/embed_tokens", "text/layers")
TIME_SINUSOIDS = 256
POLICY_CALL = "policy call"

# Dense TFLOP/s of one JAX device by `device_kind`: of bfloat16 products, and of what JAX does with
# float32 ones by default, which is one bfloat16 pass on TPUs and TF32 on NVIDIA GPUs. On TPU v3 and
# TPU7x a device is one of a chip's two cores. A slice of a GPU (MIG) has a dot in its name and
# matches nothing.
# Sources: cloud.google.com/tpu/docs/{v3,v4,v5e,v5p,v6e,tpu7x}; NVIDIA's data sheets of A100, L4,
# L40S, H100, H200, HGX B200 and GB200 (where they count sparsity, half of it).
PEAK_TFLOPS: tuple[tuple[str, float, float], ...] = (
    (r"TPU v3", 61.5, 61.5),
    (r"TPU v4", 275.0, 275.0),
    (r"TPU v5( lite|e)", 197.0, 197.0),
    (r"TPU v5p?", 459.0, 459.0),
    (r"TPU v6( lite|e)", 918.0, 918.0),
    (r"TPU7x", 1153.5, 1153.5),
    (r"NVIDIA A100[\w -]*", 312.0, 156.0),
    (r"NVIDIA L4", 121.0, 60.0),
    (r"NVIDIA L40S", 362.0, 183.0),
    (r"NVIDIA H100 PCIe", 756.5, 378.0),
    (r"NVIDIA H[12]00 NVL", 835.5, 417.5),
    (r"NVIDIA (H[12]00|GH200)[\w -]*", 989.5, 494.5),
    (r"NVIDIA B200", 2250.0, 1125.0),
    (r"NVIDIA GB200", 2500.0, 1250.0),
)


@dataclass(frozen=True)
class Work:
    """Floating-point operations, as the first lines of this file tell the two apart."""

    model: int = 0
    hardware: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.model + other.model, self.hardware + other.hardware)


@dataclass(frozen=True)
class Flops:
    """Operations of a training step or of a policy call.

    Attributes:
      by_part: of what runs among "vision", "prefix", "slots", "suffix" (the decoder's segments),
        "logits", "expert" and "teacher".
    """

    by_part: Mapping[str, Work]

    @property
    def model(self) -> int:
        """What the mathematics needs."""
        return sum(work.model for work in self.by_part.values())

    @property
    def hardware(self) -> int:
        """What is executed."""
        return sum(work.hardware for work in self.by_part.values())


def step_flops(
    recipe: Recipe,
    model_config: LaraVLAConfig,
    stage: Stage,
    batch_spec: Batch,
    *,
    trained: Collection[str] | None = None,
) -> Flops:
    """Operations of one training step, over all devices.

    Args:
      recipe: the run's settings.
      model_config: the networks, with the stage's number of slots.
      stage: loss weights and what trains.
      batch_spec: shapes of the whole batch (`lara_jax.assemble.batch_spec`).
      trained: paths of the parameters that train (`lara_jax.optimizer.trained_paths`), where groups
        freeze some or factors stand for them; None for all of the networks that the stage trains.
    """
    cfg, rows = model_config, batch_spec.size
    if trained is None:
        trained = [network for network, part in PARTS.items() if part in TRAINED[stage.trains]]
    trains = _Trained(trained, recipe.lora.rank)
    parts = _think(recipe, cfg, batch_spec, trains)
    if stage.token_weight:
        path = "text/embed_tokens" if cfg.text.tied_embeddings else "text/lm_head/kernel"
        tokens = rows * batch_spec.suffix_ids.shape[1]
        head = _dense(path, tokens, cfg.text.width, cfg.text.vocab_size)
        parts["logits"] = _work([head], trains, flows=trains(*BACKBONE, "text/norm"))
    if stage.action_weight:
        tokens = _sequence(cfg, batch_spec)
        parts["expert"] = _expert(cfg.expert, rows, cfg.expert.noise_draws, tokens, trains)
    if stage.visual_weight:
        images = assemble.image_config(recipe)
        if recipe.teacher.resize_px:
            height, width = recipe.teacher.resize_px
            images = dataclasses.replace(images, resize_px=(height, width))
        height, width = batch_spec.next_images.shape[2:4]
        patches = math.prod(images.grid((height, width)))
        # Its DeepStack features are no part of the target.
        tower = dataclasses.replace(cfg.vision, deepstack_layers=())
        parts["teacher"] = _vision(tower, rows, patches, cfg, NOTHING)
    return Flops(parts)


def policy_flops(recipe: Recipe, model_config: LaraVLAConfig, batch_spec: Batch) -> Flops:
    """Operations of one policy call: thoughts, no logits, and the expert once an Euler step.

    Args:
      recipe: the run's settings.
      model_config: the networks, with the policy's number of slots.
      batch_spec: shapes of the call's batch, one row an observation.
    """
    cfg = model_config
    parts = _think(recipe, cfg, batch_spec, NOTHING)
    once = _expert(cfg.expert, batch_spec.size, 1, _sequence(cfg, batch_spec), NOTHING)
    parts["expert"] = sum([once] * cfg.expert.euler_steps, Work())
    return Flops(parts)


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """FLOP/s that one JAX device could do, or None for a kind that is not in the table.

    Args:
      device_kind: as `jax.Device.device_kind` says it.
      dtype: of the model's computation, "bfloat16" or "float32".

    Raises:
      ValueError: another dtype.
    """
    if dtype not in ("bfloat16", "float32"):
        raise ValueError(f"no peak for dtype {dtype!r}; choose bfloat16 or float32")
    for pattern, bfloat16, float32 in PEAK_TFLOPS:
        if re.fullmatch(pattern, device_kind):
            return 1e12 * (bfloat16 if dtype == "bfloat16" else float32)
    return None


def mfu(
    flops: float, seconds: float, devices: Sequence[Any], *, dtype: str = "bfloat16"
) -> float | None:
    """The part of the devices' peak in use, 0 to 1; None where a device's peak is not known.

    Args:
      flops: model FLOPs done by all devices together (hardware FLOPs give the HFU).
      seconds: in this time.
      devices: all that take part (`jax.devices()`), with a `device_kind` each.
      dtype: of the model's computation.

    Raises:
      ValueError: no device, no time, or an unknown dtype.
    """
    if not devices or seconds <= 0:
        raise ValueError(f"{len(devices)} devices over {seconds} s; need one and a time above 0")
    peaks = [peak_flops(device.device_kind, dtype) for device in devices]
    known = [peak for peak in peaks if peak is not None]
    return flops / (seconds * sum(known)) if len(known) == len(peaks) else None


def main(argv: Sequence[str]) -> int:
    """`lara flops --config FILE [--json] [--config.section.key=value ...]`."""
    parser = argparse.ArgumentParser(prog="lara flops", allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="FILE", help="a recipe")
    parser.add_argument("--json", action="store_true", help="print JSON, in single operations")
    args, rest = parser.parse_known_args(argv)
    recipe = load_recipe(args.config, split_overrides(rest))
    counts = recipe_flops(recipe)
    if args.json:
        print(json.dumps({name: _plain(flops) for name, flops in counts.items()}, indent=1))
        return 0
    print(f"{'GFLOPs a row':<18}{'model':>12}{'hardware':>12}")
    for name, flops in counts.items():
        rows = 1 if name == POLICY_CALL else recipe.data.batch_size
        lines = {name: Work(flops.model, flops.hardware)}
        lines |= {f"  {part}": work for part, work in flops.by_part.items()}
        for label, work in lines.items():
            print(f"{label:<18}{work.model / rows / 1e9:12.3f}{work.hardware / rows / 1e9:12.3f}")
    return 0


def recipe_flops(recipe: Recipe) -> dict[str, Flops]:
    """Operations of a step of each stage, and of a policy call with one observation.

    Needs no data, and no tokenizer: without one the vocabulary has its published size.

    Returns:
      by the stage's name, and under "policy call" where the last stage writes no reasoning.

    Raises:
      ValueError: neither `data.frame_px` nor `data.resize_px` says how large a frame is.
    """
    found = outlines(recipe)
    params = state_outline(recipe, found[-1]).params
    counts = {}
    for outline in found:
        trained = trained_paths(recipe, params, [outline.stage])
        parts = outline.model.config, outline.stage, outline.batch
        counts[outline.stage.name] = step_flops(recipe, *parts, trained=trained)
    if found[-1].stage.reasoning_stage in (0, 4):
        counts[POLICY_CALL] = policy_flops(recipe, found[-1].model.config, found[-1].rows(1))
    return counts


def _plain(flops: Flops) -> dict[str, Any]:
    """The counts as JSON has them."""
    by_part = {part: dataclasses.asdict(work) for part, work in flops.by_part.items()}
    return {"model": flops.model, "hardware": flops.hardware, "by_part": by_part}


class _Trained:
    """Whether any parameter below one of some paths trains, or a low-rank factor of it.

    A trained path may be a network's name, which is all of it.
    """

    def __init__(self, trained: Collection[str], rank: int = 0) -> None:
        self._trained = [path.removeprefix(f"{LORA}/") for path in trained]
        factors = (path for path in trained if path.startswith(f"{LORA}/"))
        self._adapted = {path.removeprefix(f"{LORA}/").rpartition("/")[0] for path in factors}
        self._rank = rank

    def __call__(self, *paths: str) -> bool:
        return any(
            one.startswith(path) or path.startswith(one) for one in self._trained for path in paths
        )

    def rank(self, kernel: str) -> int:
        """Of the factors that train in the kernel's place; 0 where it has none."""
        return self._rank if kernel in self._adapted else 0


NOTHING = _Trained(())


@dataclass(frozen=True, kw_only=True)
class _Product:
    """Forward operations of a matrix product.

    Attributes:
      kind: "dense", "last" or "attention", see `FORWARD_RUNS`.
      path: of the parameter that is its second factor; "" for none.
      reads_data: whether its first factor is data, which has no gradient.
      sizes: of one with a parameter: rows, inputs, outputs.
      flops: what it needs.
      executed: what it executes, padding included.
      gradients: of an attention: operations of its backward pass that are executed.
    """

    kind: str = "dense"
    path: str = ""
    reads_data: bool = False
    sizes: tuple[int, int, int] = (0, 0, 0)
    flops: int
    executed: int
    gradients: int = 0

    def factors(self, rank: int) -> list["_Product"]:
        """The path x A B beside it."""
        rows, inputs, outputs = self.sizes
        a = _dense(f"{self.path}/a", rows, inputs, rank, reads_data=self.reads_data)
        return [a, _dense(f"{self.path}/b", rows, rank, outputs, kind=self.kind)]


def _dense(
    path: str,
    rows: int,
    inputs: int,
    outputs: int,
    *,
    kind: str = "dense",
    reads_data: bool = False,
) -> _Product:
    """[rows, inputs] by a parameter [inputs, outputs]."""
    flops = 2 * rows * inputs * outputs
    return _Product(
        kind=kind,
        path=path,
        reads_data=reads_data,
        sizes=(rows, inputs, outputs),
        flops=flops,
        executed=flops,
    )


def _attention(
    implementation: str, rows: int, queries: int, keys: int, width: int, *, unused_keys: int = 0
) -> _Product:
    """Scores and weighted values, of all heads together `width` wide."""
    flops = 2 * 2 * rows * queries * keys * width
    keys += unused_keys
    one = 2 * rows * queries * keys * width
    return _Product(
        kind="attention",
        flops=flops,
        executed=2 * one,
        gradients=ATTENTION_GRADIENTS[implementation] * one,
    )


def _work(
    products: Iterable[_Product],
    trains: _Trained,
    *,
    flows: bool,
    runs: Mapping[str, int] = FORWARD_RUNS["none"],
) -> Work:
    """Sums the products of a training step.

    Args:
      products: each as often as it runs forward.
      trains: which parameters have a gradient.
      flows: whether what comes into these products has one.
      runs: how often a product is executed forward once gradients flow, by kind.
    """
    total = Work()
    for product in products:
        hardware = product.executed * (runs[product.kind] if flows else 1)
        if product.kind == "attention":
            model, backward = flows * 2 * product.flops, flows * product.gradients
        else:
            rank = trains.rank(product.path)
            if rank:
                total += _work(product.factors(rank), trains, flows=flows, runs=runs)
            gradients = (trains(product.path) and not rank) + (flows and not product.reads_data)
            model = backward = gradients * product.flops
        total += Work(product.flops + model, hardware + backward)
    return total


def _sequence(cfg: LaraVLAConfig, spec: Batch) -> int:
    """T, tokens of a row."""
    return int(spec.prefix_ids.shape[1] + cfg.latent_slots + spec.suffix_ids.shape[1])


def _think(recipe: Recipe, cfg: LaraVLAConfig, spec: Batch, trains: _Trained) -> dict[str, Work]:
    """The backbone's parts without its logits."""
    rows, views, height, width = spec.images.shape[:4]
    patches = math.prod(assemble.image_config(recipe).grid((height, width)))
    prefix, suffix = spec.prefix_ids.shape[1], spec.suffix_ids.shape[1]
    slots, total = cfg.latent_slots, _sequence(cfg, spec)

    def layer(queries: int, keys: int, unused_keys: int = 0) -> list[_Product]:
        return _text_layer(cfg.text, cfg.attention, rows, queries, keys, unused_keys)

    def segment(layer: list[_Product], runs: Mapping[str, Mapping[str, int]]) -> Work:
        layers = layer * cfg.text.layers
        return _work(layers, trains, flows=trains(*BACKBONE), runs=runs[cfg.remat])

    parts = {"vision": _vision(cfg.vision, rows * views, patches, cfg, trains)}
    parts["prefix"] = segment(layer(prefix, prefix if slots else total), FORWARD_RUNS)
    if slots:
        # Slot k = 1..K is given the keys of all K slots, of which k - 1 are set, and its own.
        loop = [p for k in range(1, slots + 1) for p in layer(1, prefix + k, slots + 1 - k)]
        parts["slots"] = segment(loop, LOOP_RUNS)
    parts["suffix"] = segment(layer(suffix, total), FORWARD_RUNS)
    return parts


def _text_layer(
    cfg: TextConfig, implementation: str, rows: int, queries: int, keys: int, unused_keys: int
) -> list[_Product]:
    """A decoder layer over `queries` new tokens of each row."""
    tokens, D = rows * queries, cfg.width
    heads, kv_heads = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    attn, mlp = "text/layers/attn", "text/layers/mlp"
    return [
        _dense(f"{attn}/q_proj/kernel", tokens, D, heads),
        _dense(f"{attn}/k_proj/kernel", tokens, D, kv_heads),
        _dense(f"{attn}/v_proj/kernel", tokens, D, kv_heads),
        _attention(implementation, rows, queries, keys, heads, unused_keys=unused_keys),
        _dense(f"{attn}/o_proj/kernel", tokens, heads, D),
        _dense(f"{mlp}/gate_proj/kernel", tokens, D, cfg.mlp),
        _dense(f"{mlp}/up_proj/kernel", tokens, D, cfg.mlp),
        _dense(f"{mlp}/down_proj/kernel", tokens, cfg.mlp, D, kind="last"),
    ]


def _vision(
    cfg: VisionConfig, images: int, patches: int, model: LaraVLAConfig, trains: _Trained
) -> Work:
    """The tower over images of `patches` patches, its merger and DeepStack's."""
    tokens, W = images * patches, cfg.width
    merged, joined = tokens // cfg.merge_size**2, W * cfg.merge_size**2
    embed = _dense("vision/patch_embed/kernel", tokens, cfg.patch_values, W, reads_data=True)
    block = [
        _dense("vision/blocks/attn/qkv/kernel", tokens, W, 3 * W),
        _attention(model.attention, images, patches, patches, W),
        _dense("vision/blocks/attn/proj/kernel", tokens, W, W),
        _dense("vision/blocks/mlp/fc1/kernel", tokens, W, cfg.mlp),
        _dense("vision/blocks/mlp/fc2/kernel", tokens, cfg.mlp, W, kind="last"),
    ]
    names = ["merger"] + ["deepstack_mergers"] * len(cfg.deepstack_layers)
    mergers = [
        product
        for name in names
        for product in (
            _dense(f"vision/{name}/fc1/kernel", merged, joined, joined),
            _dense(f"vision/{name}/fc2/kernel", merged, joined, cfg.out_width),
        )
    ]
    into = trains("vision/patch_embed", "vision/pos_embed", "vision/blocks")
    out = into or trains("vision")
    runs = FORWARD_RUNS[model.remat]
    return (
        _work([embed], trains, flows=into)
        + _work(block * cfg.depth, trains, flows=into, runs=runs)
        + _work(mergers, trains, flows=out)
    )


def _expert(cfg: ActionExpertConfig, rows: int, draws: int, context: int, trains: _Trained) -> Work:
    """The action expert over `draws` noisy chunks a row, which share `context` keys."""
    E, times = cfg.width, rows * draws
    actions = times * cfg.action_horizon
    queries = 1 + cfg.future_tokens + cfg.action_horizon
    tokens = times * queries

    def dense(path: str, *sizes: int, reads_data: bool = False) -> _Product:
        return _dense(f"action_expert/{path}/kernel", *sizes, reads_data=reads_data)

    def block(path: str) -> list[_Product]:
        return [
            dense(f"{path}/norm", times, E, 2 * E),
            dense(f"{path}/attn/to_q", tokens, E, E),
            dense(f"{path}/attn/to_out", tokens, E, E),
            dense(f"{path}/mlp/fc1", tokens, E, 4 * E),
            dense(f"{path}/mlp/fc2", tokens, 4 * E, E),
        ]

    def key_values(path: str, *sizes: int) -> list[_Product]:
        return [dense(f"{path}/attn/{name}", *sizes, E) for name in ("to_k", "to_v")]

    encoders = [
        dense("state_encoder/layer1", rows, cfg.state_dim, cfg.hidden, reads_data=True),
        dense("state_encoder/layer2", rows, cfg.hidden, E),
        dense("action_encoder/layer1", actions, cfg.action_dim, E, reads_data=True),
        dense("action_encoder/layer2", actions, 2 * E, E),
        dense("action_encoder/layer3", actions, E, E),
        dense("time_encoder/linear_1", times, TIME_SINUSOIDS, E, reads_data=True),
        dense("time_encoder/linear_2", times, E, E),
    ]
    crosses = ["blocks/cross"] * (cfg.layers // 2) + ["last_cross"] * (cfg.layers % 2)
    across = _attention("xla", rows, draws * queries, context, E)
    among = _attention("xla", times, queries, queries, E)
    pair = [*block("blocks/self"), *key_values("blocks/self", tokens, E), among]
    blocks = [p for path in crosses for p in (*block(path), across)] + pair * (cfg.layers // 2)
    contexts = [p for path in crosses for p in key_values(path, rows * context, cfg.context_width)]
    head = [
        dense("proj_out_1", times, E, 2 * E),
        dense("proj_out_2", actions, E, cfg.hidden),
        dense("action_decoder/layer1", actions, cfg.hidden, cfg.hidden),
        dense("action_decoder/layer2", actions, cfg.hidden, cfg.action_dim),
    ]
    own, thoughts = trains("action_expert"), trains(*BACKBONE)
    return (
        _work(encoders, trains, flows=own)
        + _work(contexts, trains, flows=thoughts)
        + _work(blocks + head, trains, flows=own or thoughts)
    )
