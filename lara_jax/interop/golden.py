"""`lara check-golden FILE...`: does the model reproduce the numbers of the PyTorch reference?

A golden file holds weights, inputs and outputs of one small case; its metadata is the model's
configuration. The model is built from that metadata, run in float32, and every output compared:

    error = max |ours - theirs| / max(|theirs|, root mean square of theirs), over all numbers of one
    output

so that a single wrong number counts, small ones too. Tolerance 1e-4, for gradients 1e-3; position
ids must be equal.

Pads. The reference's action expert reads the rows at pads, so they shape its loss, its actions and
all gradients. They mean nothing, but they can be reproduced, so no output is left out and no
tolerance widened for them:

- values: a query that may attend to nothing averages uniformly over the keys of its pass; so does
  ours. These rows of `out.hidden_states` are compared as an output of their own.
- gradients: PyTorch's fused attention recomputes the weights of such a query as exp(min - min) = 1
  instead of 1/n in its backward pass, so those gradients are up to hundreds of times too large.
  `torch_sdpa` below does the same, for this check alone; training takes the true gradient.

The plain M-RoPE pass has no reader at pads and is compared where attended. The gradient of a key
bias in the expert is zero but for rounding (it shifts all scores of a query alike), so its error is
relative to its weight's gradient.
"""

import argparse
import contextlib
import dataclasses
import json
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from lara_jax import losses
from lara_jax.interop.hf_keys import GOLDEN
from lara_jax.interop.params import export_params, import_params
from lara_jax.models import attention, rope
from lara_jax.models.action_expert import ActionExpertConfig
from lara_jax.models.lara_vla import Inputs, LaraVLA, LaraVLAConfig
from lara_jax.models.text_decoder import TextConfig
from lara_jax.models.vision_tower import VisionConfig

INPUTS = [
    "input_ids",
    "attention_mask",
    "labels",
    "pixel_values",
    "image_grid_thw",
    "actions",
    "state",
    "noise",
    "time",
]
OUTPUTS = [
    "hidden_states",
    "vlm_loss",
    "action_loss",
    "predicted_actions",
    "vision_embeds",
    "plain_mrope_hidden",
    "plain_mrope_logits",
    "mrope_position_ids",
]
TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3

Arrays = Mapping[str, np.ndarray]


def torch_sdpa(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Attention with the gradient of PyTorch's fused kernel at queries that see nothing."""
    if mask is None:
        return attention.IMPLEMENTATIONS["xla"](q, k, v, mask)
    groups = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2)
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) / np.sqrt(q.shape[-1])
    return _weigh(scores, v, jnp.broadcast_to(mask[:, None], scores.shape))


@jax.custom_vjp
def _weigh(scores: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    weights = jax.nn.softmax(scores + attention.additive(mask), axis=-1)
    return jnp.einsum("BNTS,BSNH->BTNH", weights, v)


def _weigh_forward(scores: jax.Array, v: jax.Array, mask: jax.Array) -> tuple[jax.Array, Any]:
    return _weigh(scores, v, mask), (scores, v, mask)


def _weigh_backward(saved: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    scores, v, mask = saved
    true = jax.nn.softmax(scores + attention.additive(mask), axis=-1)
    recomputed = jnp.where(mask.any(axis=-1, keepdims=True), true, 1.0)
    to_weights = jnp.einsum("BTNH,BSNH->BNTS", gradient, v)
    to_scores = recomputed * (to_weights - (true * to_weights).sum(axis=-1, keepdims=True))
    return to_scores, jnp.einsum("BNTS,BTNH->BSNH", recomputed, gradient), None


_weigh.defvjp(_weigh_forward, _weigh_backward)


@contextlib.contextmanager
def _torch_attention() -> Iterator[None]:
    """Inside, models may ask for "torch_sdpa"."""
    attention.IMPLEMENTATIONS["torch_sdpa"] = torch_sdpa
    try:
        yield
    finally:
        del attention.IMPLEMENTATIONS["torch_sdpa"]


@dataclasses.dataclass(frozen=True)
class Golden:
    """One case: the metadata parsed, the arrays by name."""

    path: Path
    meta: Mapping[str, Any]
    arrays: Arrays

    @classmethod
    def read(cls, path: Path) -> "Golden":
        """Reads a file.

        Raises:
          FileNotFoundError: no such file.
          ValueError: not a safetensors file, or without the metadata of a golden file.
        """
        if not path.is_file():
            raise FileNotFoundError(f"golden file {path} does not exist")
        try:
            with safe_open(path, framework="numpy") as file:
                meta = {k: json.loads(v) for k, v in (file.metadata() or {}).items()}
                arrays = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        except (SafetensorError, struct.error) as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
        needed = {"text_config", "vision_config", "action_head", "token_ids", "latents", "grid"}
        if missing := sorted(needed - set(meta)):
            raise ValueError(
                f"{path} is not a golden file: its metadata lacks {', '.join(missing)}"
            )
        golden = cls(path, meta, arrays)
        golden._check()
        return golden

    def _check(self) -> None:
        """Everything that a comparison needs is there.

        Raises:
          ValueError: naming what is missing, or does not fit together.
        """
        needed = {f"in.{name}" for name in INPUTS} | {f"out.{name}" for name in OUTPUTS}
        if missing := sorted(needed - set(self.arrays)):
            raise ValueError(f"{self.path} is not a golden file: it lacks {', '.join(missing)}")
        try:
            self.config()
        except KeyError as error:
            raise ValueError(f"{self.path}: its metadata lacks {error}") from error
        grids = self.arrays["in.image_grid_thw"]
        if (grids != self.meta["grid"]).any():
            raise ValueError(
                f"{self.path}: in.image_grid_thw is {grids.tolist()}, the metadata's grid is "
                f"{self.meta['grid']}"
            )

    @property
    def grid(self) -> tuple[int, int]:
        _, rows, columns = self.meta["grid"]
        return rows, columns

    def config(self) -> LaraVLAConfig:
        """The model of this case, as the reference ran it."""
        text, vision = self.meta["text_config"], self.meta["vision_config"]
        head, ids = self.meta["action_head"], self.meta["token_ids"]
        return LaraVLAConfig(
            vision=VisionConfig(
                depth=vision["depth"],
                width=vision["hidden_size"],
                heads=vision["num_heads"],
                mlp=vision["intermediate_size"],
                out_width=vision["out_hidden_size"],
                patch_size=vision["patch_size"],
                merge_size=vision["spatial_merge_size"],
                temporal_patch_size=vision["temporal_patch_size"],
                position_table=round(vision["num_position_embeddings"] ** 0.5),
                deepstack_layers=tuple(vision["deepstack_visual_indexes"]),
            ),
            text=TextConfig(
                vocab_size=text["vocab_size"],
                width=text["hidden_size"],
                layers=text["num_hidden_layers"],
                heads=text["num_attention_heads"],
                kv_heads=text["num_key_value_heads"],
                head_dim=text["head_dim"],
                mlp=text["intermediate_size"],
                rope_theta=text["rope_theta"],
                mrope_section=tuple(text["rope_scaling"]["mrope_section"]),
                tied_embeddings=text["tie_word_embeddings"],
                norm_eps=text["rms_norm_eps"],
            ),
            expert=ActionExpertConfig(
                width=head["input_embedding_dim"],
                heads=head["num_attention_heads"],
                head_dim=head["attention_head_dim"],
                layers=head["num_layers"],
                hidden=head["hidden_size"],
                context_width=text["hidden_size"],
                action_dim=head["action_dim"],
                action_horizon=head["action_horizon"],
                state_dim=head["state_dim"],
                future_tokens=head["num_target_vision_tokens"],
                max_positions=head["max_seq_len"],
                time_buckets=head["num_timestep_buckets"],
                euler_steps=head["num_inference_timesteps"],
                dropout=0.0,
            ),
            image_id=ids["image"],
            img_next_id=ids["img_next"],
            latent_slots=self.meta["latents"],
            position_mode="sequential" if self.meta["latents"] else "mrope",
            latent_source="pre_norm",
            attend_padding=True,
            dtype="float32",
            remat="none",
        )

    def inputs(self) -> tuple[Inputs, np.ndarray]:
        """The three segments and the labels of the suffix, int[B, S] with -100 = no loss.

        Raises:
          ValueError: the slots do not stand at the same places in every row, or a label precedes
            the suffix.
        """
        ids, valid = self.arrays["in.input_ids"], self.arrays["in.attention_mask"] > 0
        labels, slots = self.arrays["in.labels"], self.meta["latents"]
        thinking = ids == self.meta["token_ids"]["thinking"]
        if slots:
            start = int(thinking[0].argmax())
            if not (
                thinking[:, start : start + slots].all() and thinking.sum() == slots * len(ids)
            ):
                raise ValueError(f"{self.path}: the {slots} slots are not aligned over the rows")
        else:
            start = int((labels != -100).any(axis=0).argmax())
        if (labels[:, : start + slots] != -100).any() or start == 0:
            raise ValueError(f"{self.path}: a label stands before the end of the slots")
        rows, patches = len(ids), self.grid[0] * self.grid[1]
        pixels = self.arrays["in.pixel_values"]
        inputs = Inputs(
            patches=jnp.asarray(pixels.reshape(rows, -1, patches, pixels.shape[-1])),
            view_mask=jnp.ones((rows, self.meta["num_views"]), bool),
            prefix_ids=jnp.asarray(ids[:, :start]),
            prefix_mask=jnp.asarray(valid[:, :start]),
            suffix_ids=jnp.asarray(ids[:, start + slots :]),
            suffix_mask=jnp.asarray(valid[:, start + slots :]),
        )
        return inputs, labels[:, start + slots :]


def run(golden: Golden) -> dict[str, np.ndarray]:
    """Our outputs for a case, under the file's names (`out.*`, `grad.*`), in float32."""
    with _torch_attention(), jax.default_matmul_precision("float32"):
        return _run(golden, dataclasses.replace(golden.config(), attention="torch_sdpa"))


def _run(golden: Golden, config: LaraVLAConfig) -> dict[str, np.ndarray]:
    model = LaraVLA(config)
    inputs, labels = golden.inputs()
    arrays, grid = golden.arrays, golden.grid
    abstract = jax.eval_shape(
        lambda: nn.unbox(model.init(jax.random.key(0), inputs, grid, method="init_all"))["params"]
    )
    weights = {k: v for k, v in arrays.items() if k.startswith(("vlm.", "head."))}
    params = import_params(weights, abstract, GOLDEN)
    state, actions, noise, time = (
        jnp.asarray(arrays[f"in.{k}"]) for k in ("state", "actions", "noise", "time")
    )

    def apply(p: Any, *args: Any, method: str | None = None) -> Any:
        return model.apply({"params": p}, *args, method=method)

    def total_loss(p: Any) -> Any:
        thoughts = apply(p, inputs, grid)
        token = losses.token_loss(thoughts.logits, jnp.maximum(labels, 0), labels != -100)
        t = time[:, None, None, None]
        noisy = (1 - t) * noise[:, None] + t * actions[:, None]
        bucket = (time * config.expert.time_buckets).astype(jnp.int32)[:, None]
        velocity = apply(p, thoughts, state[:, 0], noisy, bucket, method="act_velocity")
        everywhere = jnp.ones(actions.shape, bool)
        action = losses.action_loss(velocity, (actions - noise)[:, None], everywhere)
        return token.mean() + action.mean(), (thoughts, token.mean(), action.mean())

    def outputs(p: Any) -> dict[str, Any]:
        (_, (thoughts, token, action)), grads = jax.value_and_grad(total_loss, has_aux=True)(p)
        patches = inputs.patches.reshape(-1, *inputs.patches.shape[2:])
        vision = apply(p, patches, grid, method="encode_images")
        plain, logits = _plain_mrope(config, p, golden)
        ids, valid = (jnp.asarray(arrays[f"in.{k}"]) for k in ("input_ids", "attention_mask"))
        merged = config.vision.merged(grid)
        positions = rope.mrope_positions(ids == config.image_id, valid > 0, merged)
        return {
            "out.hidden_states": thoughts.hidden,
            "out.vlm_loss": token[None],
            "out.action_loss": action[None],
            "out.predicted_actions": apply(p, thoughts, state[:, 0], noise, method="act"),
            "out.vision_embeds": vision.embeds,
            **{
                f"out.deepstack.{i}": d.reshape(-1, d.shape[-1])
                for i, d in enumerate(vision.deepstack)
            },
            "out.plain_mrope_hidden": plain,
            "out.plain_mrope_logits": logits,
            "out.mrope_position_ids": positions,
            "grads": grads,
        }

    # It runs once on a small case: nearly all of its time would go into optimising the code.
    quick = {"xla_backend_optimization_level": 0}
    ours = jax.tree.map(np.asarray, jax.jit(outputs, compiler_options=quick)(params))
    grads = export_params(ours.pop("grads"), GOLDEN)
    return ours | {f"grad.{key}": value for key, value in grads.items()}


def _plain_mrope(config: LaraVLAConfig, params: Any, golden: Golden) -> tuple[Any, Any]:
    """Hidden states before the final norm, and logits, of a plain causal pass without feedback."""
    plain = dataclasses.replace(config, latent_slots=0, position_mode="mrope", img_next_id=-1)
    inputs, _ = golden.inputs()
    start = inputs.prefix_ids.shape[1]
    ids, valid = golden.arrays["in.input_ids"], golden.arrays["in.attention_mask"] > 0
    inputs = dataclasses.replace(
        inputs, suffix_ids=jnp.asarray(ids[:, start:]), suffix_mask=jnp.asarray(valid[:, start:])
    )
    model = LaraVLA(plain)
    hidden = model.apply({"params": params}, inputs, golden.grid).hidden
    return hidden, model.apply({"params": params}, hidden, method="logits")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The largest relative error of one output and what is allowed."""

    name: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # False for a NaN


def compare(golden: Golden, ours: Arrays) -> Iterator[Comparison]:
    """Compares every output and gradient that the file holds.

    Raises:
      ValueError: the file holds an output that is not known, or of another shape than ours.
    """
    attended = golden.arrays["in.attention_mask"] > 0
    for name in sorted(n for n in golden.arrays if n.startswith(("out.", "grad."))):
        if name not in ours:
            raise ValueError(f"{golden.path}: output {name} is not known")
        theirs, mine = golden.arrays[name], ours[name]
        if theirs.shape != mine.shape:
            raise ValueError(f"{golden.path}: {name} has shape {theirs.shape}, ours {mine.shape}")
        if name == "out.mrope_position_ids":
            yield Comparison(name, float(np.abs(theirs - mine).max()), 0.0)
        elif name.startswith("grad."):
            weight = theirs
            if name.endswith("attn1.to_k.bias"):
                weight = golden.arrays[name.replace(".bias", ".weight")]
            yield Comparison(name, relative_error(mine, theirs, weight), GRADIENT_TOLERANCE)
        elif theirs.shape[:2] == attended.shape:
            yield Comparison(name, relative_error(mine[attended], theirs[attended]), TOLERANCE)
            if name == "out.hidden_states" and not attended.all():
                pads = relative_error(mine[~attended], theirs[~attended])
                yield Comparison(f"{name} (pads)", pads, TOLERANCE)
        else:
            yield Comparison(name, relative_error(mine, theirs), TOLERANCE)


def relative_error(ours: np.ndarray, theirs: np.ndarray, like: np.ndarray | None = None) -> float:
    """max |ours - theirs| / max(|theirs|, rms(like)); `like` is `theirs` unless given."""
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    like = theirs if like is None else like.astype(np.float64)
    difference = np.abs(ours - theirs)
    scale = np.maximum(np.abs(theirs), np.sqrt(np.mean(like**2)))
    return float(np.max(np.where(difference == 0, 0, difference / np.maximum(scale, 1e-30))))


def main(argv: Sequence[str]) -> int:
    """Prints a line per file and output, then the verdict; 1 if anything is over its tolerance."""
    parser = argparse.ArgumentParser(prog="lara check-golden", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    goldens = [Golden.read(path) for path in args.files]
    failed = total = 0
    for golden in goldens:
        for result in compare(golden, run(golden)):
            total += 1
            failed += not result.ok
            mark = "ok" if result.ok else f"OVER {result.tolerance:g}"
            print(f"{golden.path.name}  {result.name}  {result.error:.2e}  {mark}")
            sys.stdout.flush()
    verdict = "FAILED" if failed else "passed"
    print(
        f"check-golden {verdict}: {total - failed} of {total} outputs of {len(goldens)} files agree"
    )
    return 1 if failed else 0
