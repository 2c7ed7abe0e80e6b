"""Operations counted from sizes: against what JAX traces, what XLA counts, and by hand."""

import dataclasses
import json
import math
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import pytest
from flax.traverse_util import flatten_dict
from jax.interpreters import partial_eval

from lara_jax import assemble
from lara_jax.batch import Batch
from lara_jax.cli import main as lara
from lara_jax.config import Recipe, load_recipe
from lara_jax.curriculum import Stage
from lara_jax.flops import (
    FORWARD_RUNS,
    POLICY_CALL,
    mfu,
    peak_flops,
    policy_flops,
    step_flops,
)
from lara_jax.models.lara_vla import LaraVLA, LaraVLAConfig
from lara_jax.models.layers import REMAT_POLICIES
from lara_jax.optimizer import make_optimizer, trained_paths
from lara_jax.optimizer_config import LoraConfig, ParameterGroup
from lara_jax.tokenizers.qwen import load_tokenizer
from lara_jax.train_step import (
    TrainState,
    divisors_of,
    flow_draws,
    init_params,
    init_state,
    make_train_step,
    model_inputs,
    stage_loss,
)

CONFIGS = Path(__file__).parents[1] / "configs"


FROZEN = (
    ParameterGroup(name="no vision", patterns=("vision/*",), freeze=True),
    ParameterGroup(name="no mlp", patterns=("action_expert/blocks/*/mlp/*",), freeze=True),
)
LORA = LoraConfig(rank=2, patterns=("text/*/q_proj/kernel", "text/*/o_proj/kernel"))


@dataclasses.dataclass(frozen=True)
class Case:
    """A stage of a recipe, with all that its step is made of."""

    recipe: Recipe
    stage: Stage
    config: LaraVLAConfig
    spec: Batch
    state: Any

    @property
    def trained(self) -> set[str]:
        return trained_paths(self.recipe, self.state.params, [self.stage])

    def traced(self) -> int:
        """Operations of the products in the step that JAX traces."""
        optimizer = make_optimizer(self.recipe)
        step = make_train_step(LaraVLA(self.config), optimizer, self.stage, self.recipe)
        return traced_operations(step, self.state, self.spec)


@cache
def case(name: str, stage_name: str, *overrides: str, frozen: bool = False) -> Case:
    recipe = load_recipe(CONFIGS / f"{name}.py", overrides)
    if frozen:
        optimizer = dataclasses.replace(recipe.optimizer, groups=FROZEN)
        recipe = dataclasses.replace(recipe, optimizer=optimizer, lora=LORA)
    stage = next(s for s in recipe.stages if s.name == stage_name)
    tokenizer = load_tokenizer(None)
    frame = recipe.data.frame_px or recipe.data.resize_px
    frames: dict[str, Any] = {"views": len(recipe.data.views), "image_size": (frame[0], frame[1])}
    prompt = assemble.prompt_builder(recipe, tokenizer, stage, **frames)
    config = assemble.model_config(recipe, tokenizer, latent_slots=prompt.latent_slots)
    init = partial(init_state, LaraVLA(config), make_optimizer(recipe), recipe)
    state = jax.eval_shape(init, jax.random.key(0))
    return Case(recipe, stage, config, assemble.batch_spec(recipe, stage, **frames), state)


def inner_jaxprs(value: Any) -> Iterator[Any]:
    """The programs inside an equation's parameter."""
    if hasattr(value, "jaxpr"):
        yield value.jaxpr
    elif hasattr(value, "eqns"):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from inner_jaxprs(one)


def operations(jaxpr: Any) -> int:
    """2 m k n of every product, as often as the loops around it run."""
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        assert name != "while", "a loop of unknown length"
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            total += 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)
            continue
        inside = sum(operations(j) for value in params.values() for j in inner_jaxprs(value))
        total += inside * (params["length"] if name == "scan" else 1)
    return total


def traced_operations(function: Any, *args: Any) -> int:
    """`operations` of what a function's results depend on."""
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return operations(needed)


@pytest.mark.slow
def test_a_step_executes_what_jax_traces() -> None:
    """At published sizes, what is no product of the networks (resized frames) is below 0.1 %."""
    c = case("bridge_4b", "latent_2")
    count = step_flops(c.recipe, c.config, c.stage, c.spec)
    assert c.config.latent_slots == 2 and c.config.remat == "full"
    assert count.hardware == pytest.approx(c.traced(), rel=1e-3)
    assert count == step_flops(c.recipe, c.config, c.stage, c.spec, trained=c.trained)


@pytest.mark.slow
def test_a_step_with_frozen_and_adapted_parameters_executes_what_jax_traces() -> None:
    """Under the other policy, too."""
    c = case("debug", "action", "model.remat=dots", frozen=True)
    count = step_flops(c.recipe, c.config, c.stage, c.spec, trained=c.trained)
    assert count.hardware == pytest.approx(c.traced(), rel=2e-3)
    everything = step_flops(c.recipe, c.config, c.stage, c.spec)
    assert count.model < 0.8 * everything.model
    forward_only = policy_flops(c.recipe, c.config, c.spec).by_part["vision"]
    assert count.by_part["vision"] == forward_only


def test_a_frozen_backbone_only_sees() -> None:
    c = case("debug", "action", "stages.action.trains=action_only", "model.remat=full")
    count = step_flops(c.recipe, c.config, c.stage, c.spec).by_part
    call = policy_flops(c.recipe, c.config, c.spec).by_part
    assert all(count[part] == call[part] for part in ("vision", "prefix", "slots", "suffix"))
    assert count["expert"].model > 2 * call["expert"].model / c.config.expert.euler_steps


def test_a_policy_call_executes_what_jax_traces() -> None:
    c = case("debug", "action")
    model, images = LaraVLA(c.config), assemble.image_config(c.recipe)

    def act(params: Any, batch: Batch) -> jax.Array:
        thoughts = model.apply({"params": params}, *model_inputs(batch, images))
        return model.apply({"params": params}, thoughts, batch.state, batch.actions, method="act")

    count = policy_flops(c.recipe, c.config, c.spec)
    traced = traced_operations(act, c.state.params, c.spec)
    assert count.hardware == pytest.approx(traced, rel=1e-4)


@pytest.mark.slow
def test_gradients_execute_what_xla_counts() -> None:
    """All losses at published widths, one layer of each network, within 1 %.

    XLA counts a loop's body once whatever its length, and also what is done element by element.
    """
    c = case("oxe_8b", "pretrain", "data.batch_size=8", "model.compute_dtype=float32")
    config = dataclasses.replace(
        c.config,
        vision=dataclasses.replace(c.config.vision, depth=1, deepstack_layers=(0,)),
        text=dataclasses.replace(c.config.text, layers=1),
        expert=dataclasses.replace(c.config.expert, layers=2),
        latent_slots=1,
        remat="none",
    )
    stage = dataclasses.replace(c.stage, token_weight=1.0)
    model = LaraVLA(config)

    def gradients(state: TrainState, batch: Batch) -> Any:
        draws = flow_draws(state.rng, batch, config.expert.noise_draws)
        rest = (batch, draws, state.rng, divisors_of(batch, model), model, stage, c.recipe)
        return jax.grad(stage_loss, has_aux=True)(state.params, state.teacher, *rest)[0]

    init = partial(init_state, model, make_optimizer(c.recipe), c.recipe)
    state = jax.eval_shape(init, jax.random.key(0))
    xla = jax.jit(gradients).lower(state, c.spec).compile().cost_analysis()["flops"]
    count = step_flops(c.recipe, config, stage, c.spec)
    parts = ["vision", "prefix", "slots", "suffix", "logits", "expert", "teacher"]
    assert list(count.by_part) == parts
    assert xla == pytest.approx(count.hardware, rel=0.01)


def test_every_kernel_is_counted_under_its_own_path() -> None:
    """Freezing any one saves operations, whatever the model has."""
    c = case("debug", "action")
    config = dataclasses.replace(
        c.config,
        text=dataclasses.replace(c.config.text, tied_embeddings=False),
        expert=dataclasses.replace(c.config.expert, layers=5),
    )
    stage = Stage(name="all", token_weight=1.0, visual_weight=1.0, action_weight=1.0)
    init = partial(init_params, LaraVLA(config))
    params = nn.unbox(jax.eval_shape(init, jax.random.key(0)))
    paths = set(flatten_dict(params, sep="/"))
    kernels = {path for path in paths if path.endswith("/kernel")}
    count = partial(step_flops, c.recipe, config, stage, c.spec)
    whole = count(trained=paths)
    assert whole == count() and len(kernels) == 49
    assert [k for k in kernels if count(trained=paths - {k}).model >= whole.model] == []


def test_a_decoder_without_slots_costs_what_palm_says() -> None:
    """6 N a token and 12 L H Q T for attention, N without embeddings (appendix B)."""
    c = case("oxe_8b", "pretrain")
    text, (rows, prefix), (_, suffix) = (
        c.config.text,
        c.spec.prefix_ids.shape,
        c.spec.suffix_ids.shape,
    )
    T = prefix + suffix
    layers = flatten_dict(c.state.params["text"]["layers"], sep="/")
    N = sum(math.prod(x.shape) for path, x in layers.items() if path.endswith("kernel"))
    per_token = 6 * N + 12 * text.layers * text.heads * text.head_dim * T
    parts = step_flops(c.recipe, c.config, c.stage, c.spec).by_part
    assert parts["prefix"].model + parts["suffix"].model == rows * T * per_token


def test_model_flops_do_not_depend_on_how_they_are_computed() -> None:
    c = case("debug", "action")
    plain = step_flops(c.recipe, c.config, c.stage, c.spec)
    changes = (("remat", "full"), ("attention", "cudnn"))
    for field, value in changes:
        config = dataclasses.replace(c.config, **{field: value})
        other = step_flops(c.recipe, config, c.stage, c.spec)
        assert other.model == plain.model and other.hardware > plain.hardware, value


def test_every_remat_policy_has_its_count() -> None:
    assert set(REMAT_POLICIES) <= set(FORWARD_RUNS)


@pytest.mark.parametrize(
    ("kind", "bfloat16", "float32"),
    [
        ("TPU v4", 275e12, 275e12),
        ("TPU v5 lite", 197e12, 197e12),
        ("TPU v5p", 459e12, 459e12),
        ("TPU v5", 459e12, 459e12),
        ("TPU v6 lite", 918e12, 918e12),
        ("TPU7x", 1153.5e12, 1153.5e12),
        ("NVIDIA A100-SXM4-40GB", 312e12, 156e12),
        ("NVIDIA H100 80GB HBM3", 989.5e12, 494.5e12),
        ("NVIDIA H100 PCIe", 756.5e12, 378e12),
        ("NVIDIA H200", 989.5e12, 494.5e12),
        ("NVIDIA B200", 2250e12, 1125e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None),
        ("cpu", None, None),
    ],
)
def test_peaks(kind: str, bfloat16: float | None, float32: float | None) -> None:
    assert peak_flops(kind, "bfloat16") == bfloat16
    assert peak_flops(kind, "float32") == float32


def test_utilisation() -> None:
    tpu, cpu = SimpleNamespace(device_kind="TPU v4"), SimpleNamespace(device_kind="cpu")
    assert mfu(275e12, 2.0, [tpu, tpu]) == 0.25
    assert mfu(275e12, 2.0, [tpu, cpu]) is None
    with pytest.raises(ValueError, match="float8"):
        mfu(1.0, 1.0, [tpu], dtype="float8")
    with pytest.raises(ValueError, match="0 devices over"):
        mfu(1.0, 1.0, [])


def test_the_verb_prints_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    file = str(CONFIGS / "debug.py")
    assert lara(["flops", "--config", file, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    recipe = load_recipe(file)
    assert list(printed) == [*(stage.name for stage in recipe.stages), POLICY_CALL]
    assert list(printed["action"]["by_part"]) == ["vision", "prefix", "slots", "suffix", "expert"]
    c = case("debug", "action")
    assert printed["action"]["model"] == step_flops(c.recipe, c.config, c.stage, c.spec).model
    assert lara(["flops", "--config", file]) == 0
    lines = capsys.readouterr().out.splitlines()
    per_row = f"{printed['action']['model'] / recipe.data.batch_size / 1e9:.3f}"
    assert any(line.split()[:2] == ["action", per_row] for line in lines)
    assert lara(["flops", "--config", file, "--config.data.resize_px=()"]) == 2
    assert "config.data.frame_px" in capsys.readouterr().err
