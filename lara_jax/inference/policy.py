"""From observations to physical action chunks, with the transforms and statistics of training.

    frames, state, instruction --normalise, tokenise--> prefix | K slots | suffix
                               --think----------------> hidden states
                               --4 Euler steps--------> normalised chunk
                               --un-normalise---------> metres, radians, gripper

The prompt is the one of the last stage of the curriculum, without annotations: nothing is
generated, so a call is one compiled function.

Letters: E observations of a call, V views, C action chunk, A action, J state.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.frames import resize
from data_pipelines.statistics import DatasetStatistics, normalizers
from lara_jax import assemble
from lara_jax.augment import evaluation_crop
from lara_jax.batch import Batch
from lara_jax.checkpoint import RunInfo, load_average, load_info, load_params
from lara_jax.config import AugmentConfig
from lara_jax.data import statistics_from_dict
from lara_jax.image_processing import ImageConfig
from lara_jax.models.lara_vla import LaraVLA
from lara_jax.tokenizers.prompt import PromptBuilder, split_slots
from lara_jax.train_step import acting_params, model_inputs
from lara_jax.transforms import pad_state

Observation = Mapping[str, Any]


class Policy:
    """A trained model that acts.

    Args:
      info: recipe, statistics and tokenizer of a checkpoint.
      params: float32 tree of the model's parameters.
      latent_slots: K to act with; None takes the trained one.
      dataset: whose robot it acts for: its statistics scale states and actions. None where the
        policy was trained on one dataset.
      seed: of the flow's noise; call n of a policy draws from (seed, n).

    Attributes:
      recipe, tokenizer, params: what it was made of; `images`: how frames become patches.
      statistics: of the data of the robot that it acts for.
      views: the frames that an observation has.

    Raises:
      ValueError: the last stage of the curriculum speaks its reasoning (it would have to be
        generated), K is out of range, or the dataset is unknown or not said.
    """

    def __init__(
        self,
        info: RunInfo,
        params: Any,
        *,
        latent_slots: int | None = None,
        dataset: str | None = None,
        seed: int = 0,
    ) -> None:
        recipe = info.recipe
        self.recipe = recipe
        self._stage = recipe.stages[-1]
        if self._stage.reasoning_stage in (1, 2, 3):
            raise ValueError(
                f"stage {self._stage.name!r} has explicit reasoning text, which a policy does not "
                f"write; "
                "train a last stage with reasoning_stage 0 or 4"
            )
        self.tokenizer = assemble.tokenizer_from_text(info.tokenizer)
        self._slots = assemble.component_slots(recipe)
        if latent_slots is not None and self._stage.reasoning_stage == 0:
            raise ValueError(
                f"latent_slots is {latent_slots}, but stage {self._stage.name!r} was trained "
                "without reasoning and has no slots"
            )
        if latent_slots is not None:
            self._slots = split_slots(latent_slots, recipe.model.component_order)
        self.statistics = _statistics(info, dataset)
        self._action, self._state = normalizers(self.statistics)
        self.views = recipe.data.views
        self.images = assemble.image_config(recipe)
        self.params = jax.device_put(params)
        self._key, self._calls = jax.random.key(seed), 0
        self._prompts: dict[tuple[int, int], PromptBuilder] = {}

    @classmethod
    def from_workdir(
        cls,
        workdir: str | Path,
        *,
        step: int | None = None,
        latent_slots: int | None = None,
        dataset: str | None = None,
    ) -> "Policy":
        """The policy of a run's checkpoint, the newest unless `step` is given.

        It acts with the moving average of the parameters where the run keeps one, and with
        low-rank factors merged in.
        """
        info, average = load_info(workdir, step), load_average(workdir, step)
        params = acting_params(load_params(workdir, step), average, info.recipe)
        return cls(info, params, latent_slots=latent_slots, dataset=dataset)

    @property
    def latent_slots(self) -> int:
        """K in use."""
        return sum(self._slots.values()) if self._stage.reasoning_stage else 0

    def check_instruction(self, instruction: str, image_px: tuple[int, int]) -> None:
        """Whether there is room for an instruction beside frames of (height, width).

        Raises:
          ValueError: there is not.
        """
        self._prompt(image_px)(instruction)

    def __call__(self, observations: Sequence[Observation]) -> np.ndarray:
        """Acts on several observations at once; compiles anew when their number changes.

        Args:
          observations: each with a uint8[H, W, 3] frame under every name of `views`, or None where
            there is none (a camera that is missing, a step before the episode); `state` float[J] in
            the data's units; and `instruction`.

        Returns:
          float32[E, C, A], un-normalised: metres, radians, gripper 1 = open.

        Raises:
          ValueError: a view is missing, or a frame or state has the wrong shape or type, or is not
            finite.
        """
        batch = self.batch(observations)
        key = jax.random.fold_in(self._key, self._calls)
        self._calls += 1
        chunks = act(self.model, self.images, self.recipe.augment, self.params, batch, key)
        return self._action.unnormalize(np.asarray(chunks)[..., : len(self._action.modes)])

    @property
    def model(self) -> LaraVLA:
        """The network, with the slots in use."""
        return LaraVLA(
            assemble.model_config(self.recipe, self.tokenizer, latent_slots=self.latent_slots)
        )

    def batch(self, observations: Sequence[Observation]) -> Batch:
        """What the network is given of observations; called as above."""
        model = self.recipe.model
        frames, view_mask = map(np.stack, zip(*map(self._frames, observations), strict=True))
        rows = len(observations)
        prompt = self._prompt(frames.shape[2:4])
        text = [prompt(str(o["instruction"]), None) for o in observations]
        states = [self._state.normalize(self._checked_state(o)) for o in observations]
        return Batch(
            images=frames,
            view_mask=view_mask,
            next_images=frames,
            next_mask=np.zeros(frames.shape[:2], bool),
            state=np.stack([pad_state(s, model.state_dim) for s in states]),
            actions=np.zeros((rows, model.action_horizon, model.action_dim), np.float32),
            action_mask=np.zeros((rows, model.action_horizon, model.action_dim), bool),
            annotated=np.zeros(rows, bool),
            dataset=np.zeros(rows, np.int32),
            sample_id=np.arange(rows, dtype=np.int32),
            **{name: np.stack([t[name] for t in text]) for name in text[0]},
        )

    def _frames(self, observation: Observation) -> tuple[np.ndarray, np.ndarray]:
        """uint8[V, H, W, 3], and bool[V], False at views that are not there: black, as trained."""
        missing = [view for view in self.views if view not in observation]
        if missing:
            raise ValueError(
                f"the observation lacks the views {missing}; the policy reads {list(self.views)}"
            )
        given = [observation[view] for view in self.views]
        present = np.array([frame is not None for frame in given])
        if not present.any():
            raise ValueError(f"the observation has no frame in any of {list(self.views)}")
        frames = [np.asarray(frame) for frame in given if frame is not None]
        for view, frame in zip(np.array(self.views)[present], frames, strict=True):
            if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[-1] != 3:
                raise ValueError(
                    f"view {view!r} must be uint8[H, W, 3], got {frame.dtype}{list(frame.shape)}"
                )
        size = self.recipe.data.frame_px
        if size:
            frames = [resize(frame, (size[0], size[1])) for frame in frames]
        images = np.zeros((len(given), *frames[0].shape), np.uint8)
        images[present] = np.stack(frames)
        return images, present

    def _checked_state(self, observation: Observation) -> np.ndarray:
        state = np.asarray(observation["state"], np.float32)
        width = len(self._state.modes)
        if state.shape != (width,) or not np.isfinite(state).all():
            raise ValueError(f"state must be {width} finite numbers, got {state.tolist()}")
        return state

    def _prompt(self, image_size: tuple[int, ...]) -> PromptBuilder:
        height, width = image_size
        if (height, width) not in self._prompts:
            self._prompts[height, width] = assemble.prompt_builder(
                self.recipe,
                self.tokenizer,
                self._stage,
                views=len(self.views),
                image_size=(height, width),
                slots=self._slots,
            )
        return self._prompts[height, width]


def _statistics(info: RunInfo, dataset: str | None) -> DatasetStatistics:
    """Of the dataset to act for, as the run has used them."""
    statistics = statistics_from_dict(info.statistics)
    known = ", ".join(sorted(statistics))
    if not statistics:
        raise ValueError(
            "the checkpoint holds no statistics of actions and states, as imported weights do not: "
            "train from it first (config.init.path)"
        )
    if dataset is None and len(statistics) > 1:
        raise ValueError(f"the policy was trained on several datasets; say which of: {known}")
    name = next(iter(statistics)) if dataset is None else dataset
    if name not in statistics:
        raise ValueError(f"the policy was not trained on dataset {name!r}, but on: {known}")
    return statistics[name]


@partial(jax.jit, static_argnums=(0, 1, 2))
def act(
    model: LaraVLA,
    images: ImageConfig,
    augmentation: AugmentConfig,
    params: Any,
    batch: Batch,
    key: jax.Array,
) -> jax.Array:
    """Normalised chunks float32[E, C, A] in one compiled call, from frames to actions."""
    batch = dataclasses.replace(batch, images=evaluation_crop(batch.images, augmentation))
    variables = {"params": params}
    thoughts = model.apply(variables, *model_inputs(batch, images))
    noise = jax.random.normal(key, jnp.shape(batch.actions))
    return model.apply(variables, thoughts, batch.state, noise, method="act")
