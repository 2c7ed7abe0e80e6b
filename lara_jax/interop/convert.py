"""`lara import` and `lara export`: PyTorch weights to a checkpoint of ours, and back.

    lara import --from hf Qwen3-VL-4B-Instruct --new-tokens --config FILE --workdir DIR \
        --config.tokenizer.path=Qwen3-VL-4B-Instruct
    lara import --from reference steps_20000_pytorch_model.pt --config FILE --workdir DIR \
        --config.tokenizer.path=Qwen3-VL-4B-Instruct
    lara export --workdir DIR --to hf OUT
    lara export --workdir DIR --to reference OUT.pt        # or OUT.safetensors, or a directory

An import makes a checkpoint of step 0 without a training state; `config.init.path` starts from it.
What the layout does not hold (Hugging Face has no action expert) begins at random, from the
recipe's seed. An export holds what the run acts with: the average of its parameters where it keeps
one, low-rank factors merged into their kernels. `--verify` reads the result back and reports how it
compares, as a line of JSON.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from lara_jax.assemble import (
    load_recipe_tokenizer,
    model_config,
    tokenizer_from_text,
    tokenizer_to_text,
)
from lara_jax.checkpoint import CheckpointStore, RunInfo, load_average, load_info, load_params
from lara_jax.config import load_recipe, split_overrides
from lara_jax.interop.hf_config import VisionTokens, hf_config
from lara_jax.interop.hf_keys import HF, LAYOUTS, Layout
from lara_jax.interop.params import NewTokens, export_params, import_params
from lara_jax.interop.weights import (
    TORCH_SUFFIXES,
    load_torch_state,
    save_pt,
    save_safetensors,
)
from lara_jax.models.action_expert import ActionExpert
from lara_jax.models.lara_vla import LaraVLA, LaraVLAConfig
from lara_jax.tokenizers.qwen import Tokenizer
from lara_jax.train_step import acting_params, init_params

NAMES = ("hf", "reference")
EXPORT_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def import_main(argv: Sequence[str]) -> int:
    """`lara import --from hf|reference PATH --config FILE --workdir DIR`."""
    parser = argparse.ArgumentParser(prog="lara import", allow_abbrev=False)
    parser.add_argument("path", metavar="PATH", help="a weights file or a directory")
    parser.add_argument("--from", dest="layout", required=True, choices=NAMES)
    parser.add_argument("--config", required=True, metavar="FILE", help="the recipe to fill")
    parser.add_argument("--workdir", required=True, metavar="DIR")
    parser.add_argument(
        "--new-tokens",
        action="store_true",
        help="start the thought tokens, and all rows that the source lacks, from the row of `<<`",
    )
    parser.add_argument(
        "--drop",
        action="append",
        default=[],
        choices=("teacher", "action_expert"),
        help="leave out a part of the source; may be given twice",
    )
    parser.add_argument("--verify", action="store_true", help="report as JSON how it compares")
    args, rest = parser.parse_known_args(argv)
    layout = LAYOUTS[args.layout]
    recipe = load_recipe(args.config, split_overrides(rest))
    tokenizer = load_recipe_tokenizer(recipe)
    config = model_config(recipe, tokenizer, latent_slots=0)
    new_tokens = _new_tokens(tokenizer) if args.new_tokens else None
    source = load_torch_state(args.path)
    params, at_random = import_model(
        source, config, layout, new_tokens=new_tokens, drop=args.drop, seed=recipe.seed
    )
    with contextlib.closing(CheckpointStore(args.workdir)) as store:
        if store.latest() is not None:
            raise ValueError(f"{args.workdir} has a checkpoint already: give a new --workdir")
        files = tokenizer_to_text(tokenizer)
        store.save_params(params, RunInfo(recipe=recipe, statistics={}, tokenizer=files))
    print(
        f"wrote {args.workdir}/checkpoints/0; at random: {at_random or 'nothing'}", file=sys.stderr
    )
    if not args.verify:
        return 0
    saved = layout.select(load_params(args.workdir))
    kept = {part: tree for part, tree in saved.items() if part not in (*at_random, *args.drop)}
    report = compare_states(source, export_params(kept, layout), layout, new_tokens=new_tokens)
    print(json.dumps(report | {"at_random": at_random, "dropped": args.drop}))
    return 0 if report["bitwise"] else 1


def export_main(argv: Sequence[str]) -> int:
    """`lara export --workdir DIR --to hf|reference OUT`."""
    parser = argparse.ArgumentParser(prog="lara export", allow_abbrev=False)
    parser.add_argument("out", metavar="OUT", help="hf: a directory; reference: a file or one")
    parser.add_argument("--workdir", required=True, metavar="DIR")
    parser.add_argument("--to", dest="layout", required=True, choices=NAMES)
    parser.add_argument("--step", type=int, help="the checkpoint; the newest by default")
    parser.add_argument("--dtype", default="float32", choices=EXPORT_DTYPES)
    parser.add_argument("--verify", action="store_true", help="report as JSON how it compares")
    args = parser.parse_args(argv)

    layout, dtype, out = LAYOUTS[args.layout], EXPORT_DTYPES[args.dtype], Path(args.out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists already")
    info = load_info(args.workdir, args.step)
    average = load_average(args.workdir, args.step)
    params = acting_params(load_params(args.workdir, args.step), average, info.recipe)
    parts = layout.select(params)
    left_out = sorted(params.keys() - parts.keys())
    state = export_params(parts, layout, dtype=dtype)
    if layout is HF:
        _write_hf(state, out, info, dtype)
    elif out.suffix in TORCH_SUFFIXES:
        save_pt(state, out)
    else:
        save_safetensors(state, out)
    print(f"wrote {out}; not part of {layout.name}: {left_out or 'nothing'}", file=sys.stderr)
    if not args.verify:
        return 0
    written = load_torch_state(out)
    again = export_params(import_params(written, parts, layout), layout, dtype=dtype)
    report = compare_states(again, state, layout)
    exact = compare_states(export_params(parts, layout), written, layout)["max_abs_difference"]
    report |= {"max_abs_difference": exact, "dtype": args.dtype, "left_out": left_out}
    print(json.dumps(report))
    return 0 if report["bitwise"] else 1


def import_model(
    source: Mapping[str, np.ndarray],
    config: LaraVLAConfig,
    layout: Layout,
    *,
    new_tokens: NewTokens | None = None,
    drop: Sequence[str] = (),
    seed: int = 0,
) -> tuple[dict[str, Any], list[str]]:
    """All parameters of a model, from torch where the layout has them, else at random.

    Args:
      source: torch key -> array.
      config: of the model to fill.
      layout: of the source's keys.
      new_tokens, drop: see `import_params`.
      seed: of what starts at random.

    Returns:
      the parameters, and which parts of them started at random.

    Raises:
      KeyMismatch: source and model do not fit; all keys that do not are listed.
    """
    abstract = abstract_params(config)
    wanted = {part: tree for part, tree in layout.select(abstract).items() if part not in drop}
    params = import_params(source, wanted, layout, new_tokens=new_tokens, drop=drop)
    at_random = sorted(abstract.keys() - wanted.keys())
    for part in at_random:
        if part != "action_expert":
            raise ValueError(f"{part!r} cannot be dropped: a model does not start without it")
        params[part] = _random_expert(config, seed)
    return params, at_random


def _random_expert(config: LaraVLAConfig, seed: int) -> Any:
    cfg = config.expert
    row, context = jnp.zeros((1, 1, cfg.action_horizon, cfg.action_dim)), cfg.context_width
    state, bucket = jnp.zeros((1, cfg.state_dim)), jnp.zeros((1, 1), jnp.int32)
    inputs = (row, bucket, state, jnp.zeros((1, 1, context)), jnp.ones((1, 1), bool))
    params = jax.jit(ActionExpert(cfg).init)(jax.random.key(seed), *inputs)["params"]
    return jax.device_get(nn.unbox(params))


def abstract_params(config: LaraVLAConfig) -> dict[str, Any]:
    """Shapes of a model's parameters, unboxed; allocates nothing."""
    init = partial(init_params, LaraVLA(config), jax.random.key(0))
    return nn.unbox(jax.eval_shape(init))


def compare_states(
    expected: Mapping[str, np.ndarray],
    found: Mapping[str, np.ndarray],
    layout: Layout,
    *,
    new_tokens: NewTokens | None = None,
) -> dict[str, Any]:
    """How `found` differs from `expected` on the keys of `found`, both under torch's names.

    Args:
      expected: torch key -> array; may hold more, e.g. dropped parts, and fewer rows of tokens.
      found: torch key -> array.
      layout: of both.
      new_tokens: rows to leave out of the comparison, as they were made anew.

    Returns:
      `layout`, `tensors`, `parameters`, `bitwise`, and `max_abs_difference` by part.
    """
    worst: dict[str, float] = {}
    bitwise = True
    vocabulary = (f"{layout.text}embed_tokens.weight", f"{layout.lm_head}.weight")
    keys = [key for key in found if key in expected]
    for key in keys:
        there, here = expected[key], found[key]
        if key in vocabulary and new_tokens is not None:
            rows = np.setdiff1d(np.arange(len(there)), new_tokens.ids)
            there, here = there[rows], here[rows]
        there, here = there.astype(np.float32), here.astype(np.float32)
        part = next(p for p in layout.parts if key.startswith(layout.prefixes(p)))
        gap = float(np.abs(there - here).max(initial=0))
        worst[part] = max(gap, worst.get(part, 0.0))
        bitwise &= there.tobytes() == here.tobytes()
    return {
        "layout": layout.name,
        "tensors": len(keys),
        "parameters": sum(found[key].size for key in keys),
        "bitwise": bitwise,
        "max_abs_difference": worst,
    }


def _new_tokens(tokenizer: Tokenizer) -> NewTokens:
    thoughts = (tokenizer.thinking_id, tokenizer.start_of_thinking_id, tokenizer.end_of_thinking_id)
    return NewTokens(tokenizer.thought_seed_id, ids=(*thoughts, tokenizer.img_next_id))


def _write_hf(state: Mapping[str, np.ndarray], out: Path, info: RunInfo, dtype: Any) -> None:
    """A directory that transformers loads: weights, config.json, tokenizer.json."""
    if out.suffix:
        raise ValueError(f"{out} looks like a file; --to hf writes a directory")
    tokenizer = tokenizer_from_text(info.tokenizer)
    config = model_config(info.recipe, tokenizer, latent_slots=0)
    tokens = VisionTokens(
        image=tokenizer.image_pad_id,
        start=tokenizer.vision_start_id,
        end=tokenizer.vision_end_id,
    )
    save_safetensors(state, out)
    content = hf_config(config.vision, config.text, tokens=tokens, dtype=dtype)
    (out / "config.json").write_text(json.dumps(content, indent=2) + "\n")
    for name, text in info.tokenizer.items():
        (out / name).write_text(text, encoding="utf-8")
