"""Held-out evaluation between training steps, per dataset and stage.

    data.eval_split --steps spread evenly over each dataset--> batches, the same ones every time
        --eval step, no dropout, fixed noise--> losses, action chunks, slots, imagined frames
        --NumPy--> DIR/eval.csv, and DIR/eval/<stage>/<dataset>/<step>.npz for `lara report`

It reads the parameters and nothing else of the training: its frames come through a loader of its
own, its random numbers from a key of its own that no step moves. Prompts are those of training, so
where a stage spells reasoning out, the annotated words stand before what is predicted.

Metrics: `loss_<name>`; `text_token_right` and `action_token_right`, the share of those tokens that
are the likeliest ones after the true ones before them; `position_m`, `rotation_rad`,
`gripper_accuracy` of sampled chunks (other action spaces: `action_error` in the data's units), the
same with `mean_action_` in front for a policy that always says the training set's mean;
`slot_rank`, `slot_cosine`, `slot_drift`, `imagined_rank`, and `imagined_right`, the share of rows
whose imagined frame is nearer to their own next frame than to any other row's
(`lara_jax.evals.latents`).

Letters: B batch, N rows, K slots, Q <img_next> tokens, D width, C action chunk, A action.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.struct
import jax
import numpy as np

from data_pipelines.loader import Loader
from data_pipelines.mixture import MixtureSource
from data_pipelines.sampling import StepSource, action_chunks
from lara_jax import assemble, losses, sharding
from lara_jax.augment import evaluation_crop
from lara_jax.batch import Batch
from lara_jax.checkpoint_files import writing
from lara_jax.config import Recipe
from lara_jax.curriculum import Stage
from lara_jax.evals import latents
from lara_jax.evals.offline import action_error
from lara_jax.evals.report import sample_files
from lara_jax.models.lara_vla import LaraVLA
from lara_jax.models.visual_latent import gather_block
from lara_jax.train_step import (
    TrainState,
    acting_params,
    flow_draws,
    loss_sums,
    teacher_target,
)
from lara_jax.transforms import Normalizer

# Rows of a dataset whose hidden states are looked at, and whose frames are shown.
ROWS, FILMS = 64, 8
KEY = 0x4E1D  # folded into the run's seed


@flax.struct.dataclass
class Answers:
    """What the model makes of a batch.

    Attributes:
      sums: each loss of the stage, and how many tokens are right, by row.
      chunks: float32[B, C, A], sampled and normalised; None where the stage does not act.
      latents: `Latents` of the rows.
    """

    sums: dict[str, losses.Sum]
    chunks: jax.Array | None
    latents: "Latents"


@flax.struct.dataclass
class Latents:
    """Hidden states of rows.

    Attributes:
      slots: float[B, K, D].
      imagined, seen: float[B, Q, D], hidden states at <img_next>, and what the teacher sees in the
        next frame; None without a teacher.
      moves: bool[B], True where there is a next frame, and it differs.
    """

    slots: jax.Array
    imagined: jax.Array | None
    seen: jax.Array | None
    moves: jax.Array


def make_eval_step(model: LaraVLA, stage: Stage, recipe: Recipe) -> Any:
    """The evaluation of a stage, ((params, ema, teacher), batch, key) -> Answers; pure."""

    def eval_step(state: tuple[Any, Any, Any], batch: Batch, key: jax.Array) -> Answers:
        trained, ema, teacher = state
        params = acting_params(trained, ema, recipe)
        flow_key, act_key = jax.random.split(key)
        batch = dataclasses.replace(
            batch,
            images=evaluation_crop(batch.images, recipe.augment),
            next_images=evaluation_crop(batch.next_images, recipe.augment),
        )
        draws = flow_draws(flow_key, batch, model.config.expert.noise_draws)
        thoughts, lost = loss_sums(params, teacher, batch, draws, None, model, stage, recipe)
        sums = {f"loss_{name}": each for name, each in lost.items()}
        if stage.token_weight:
            sums |= right_tokens(thoughts.logits, batch, model.config.action_ids)
        chunks = imagined = seen = None
        if stage.action_weight:
            noise = jax.random.normal(act_key, batch.actions.shape)
            chunks = model.apply({"params": params}, thoughts, batch.state, noise, method="act")
        cells = model.config.img_next_tokens
        if teacher is not None and cells:
            imagined = gather_block(thoughts.hidden, thoughts.img_next, cells)
            seen = teacher_target(teacher, batch, model, recipe)
        start = batch.prefix_ids.shape[1]
        slots = thoughts.hidden[:, start : start + model.config.latent_slots]
        hidden = Latents(slots=slots, imagined=imagined, seen=seen, moves=batch.next_mask[:, 0])
        return Answers(sums=sums, chunks=chunks, latents=hidden)

    return eval_step


class HeldOut:
    """The evaluation of one stage.

    Args:
      recipe: the run's settings.
      stage: losses and prompt.
      model: with the stage's slots.
      loader: of the stage's training, for all but the steps.
      source: the held-out steps.
      state_shardings: where parameters and teacher live, a `TrainState`.
      workdir: the run's directory; samples for `lara report` go to its folder `eval`.

    Raises:
      ValueError: a dataset has no held-out step.
    """

    def __init__(
        self,
        recipe: Recipe,
        stage: Stage,
        model: LaraVLA,
        loader: Loader,
        source: MixtureSource,
        state_shardings: Any,
        workdir: Path,
    ) -> None:
        self._recipe, self._folder = recipe, workdir / "eval" / stage.name
        self._key = jax.random.fold_in(jax.random.key(recipe.seed), KEY)
        self._keep = files_to_keep(recipe.eval.every_steps, recipe.checkpoint.every_steps)
        for one in source.sources:
            if not len(one):
                raise ValueError(
                    f"{one.name}: no step of {recipe.data.eval_split!r} is left to evaluate, "
                    f"{one.filtered_rows} being left out by {', '.join(one.filters) or 'no filter'}"
                    "; choose another data.eval_split, or eval.every_steps=0 for no evaluation"
                )
        # As many rows as a step has in memory at a time.
        size = recipe.data.batch_size // recipe.train.accumulate_steps
        self._source = source
        self._loader = dataclasses.replace(loader, source=source, batch_size=size)
        first = source.sources[0]
        spec = assemble.batch_spec(recipe, stage, views=len(first.views), image_size=first.size)
        rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), spec)
        mesh = state_shardings.step.mesh
        everywhere = sharding.replicated(mesh)
        self._rows = sharding.batch_sharding(mesh, rows)
        self._here = sharding.local_rows(mesh, size)
        self._step = jax.jit(
            make_eval_step(model, stage, recipe),
            in_shardings=(_read(state_shardings), self._rows, everywhere),
            out_shardings=everywhere,
        )

    def due(self, step: int, end: int) -> bool:
        """Whether to evaluate after `step` steps, `end` being the stage's last."""
        return step % self._recipe.eval.every_steps == 0 or step == end

    def __call__(self, step: int, state: TrainState) -> dict[tuple[str, str], float]:
        """Scores by (dataset, metric) after `step` steps; the first process writes samples.

        Raises:
          SaveFailed: they cannot be written.
        """
        scores: dict[tuple[str, str], float] = {}
        for number, source in enumerate(self._source.sources):
            folder = self._folder / source.name
            numbers, answers = self._answers(number, state)
            found = means(answers.sums)
            samples: dict[str, np.ndarray] = {"numbers": numbers[:ROWS]}
            if answers.chunks is not None:
                normalizer, _ = self._loader.normalizers[source.name]
                chunks = true_chunks(source, numbers)
                predicted = physical(answers.chunks, normalizer)
                encoding = source.index.spec.action_encoding
                found |= action_scores(encoding, predicted, *chunks, normalizer.statistics.mean)
                names = ("predicted", "target", "mask")
                for name, values in zip(names, (predicted, *chunks), strict=True):
                    samples[name] = values[:ROWS]
            # Only the first process has samples of its own: it may delete what others would read.
            before = _before(folder, step) if jax.process_index() == 0 else None
            found |= latent_scores(answers.latents, numbers[:ROWS], before)
            scores |= {(source.name, metric): value for metric, value in found.items()}
            if jax.process_index() == 0:
                samples |= _pictures(source, numbers[:ROWS], answers.latents)
                with writing(folder, self._folder.parents[1]):
                    _save(folder, step, samples, keep=self._keep)
        return scores

    def _answers(self, dataset: int, state: TrainState) -> tuple[np.ndarray, Answers]:
        """What the model makes of a dataset's steps: their numbers, and of ROWS the latents."""
        steps, size = len(self._source.sources[dataset]), self._loader.batch_size
        key, parts = jax.random.fold_in(self._key, dataset), []
        chosen = list(spread(steps, self._recipe.eval.batches, size))
        for piece, (numbers, count) in enumerate(chosen):
            mine = numbers[self._here]
            batch = self._loader.batch_of(np.full_like(mine, dataset), mine)
            batch = sharding.put(batch, self._rows)
            answers = jax.device_get(
                self._step(_read(state), batch, jax.random.fold_in(key, piece))
            )
            looked_at = slice(min(count, max(0, ROWS - piece * size)))
            hidden = jax.tree.map(lambda x, of=looked_at: x[of], answers.latents)
            rest = jax.tree.map(lambda x, of=count: x[:of], answers.replace(latents=()))
            parts.append(rest.replace(latents=hidden))
        whole = jax.tree.map(lambda *x: np.concatenate(x), *parts)
        return np.concatenate([numbers[:count] for numbers, count in chosen]), whole


def spread(steps: int, batches: int, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Which steps of a dataset are looked at: evenly spread, in an order that mixes them.

    Args:
      steps: of the dataset, at least one.
      batches: at most so many.
      size: of a batch.

    Yields:
      int64[size] numbers, and how many of them count: the last batch is filled up.
    """
    chosen = np.unique(np.linspace(0, steps - 1, min(steps, batches * size)).round().astype(int))
    chosen = np.random.default_rng(0).permutation(chosen)
    for start in range(0, len(chosen), size):
        part = chosen[start : start + size]
        yield np.pad(part, (0, size - len(part)), mode="edge"), len(part)


def right_tokens(
    logits: jax.Array, batch: Batch, action_ids: tuple[int, int]
) -> dict[str, losses.Sum]:
    """How many of the tokens that carry a loss are the likeliest ones.

    Args:
      logits: float32[B, S, V]; logits[:, i] predicts the batch's suffix_ids[:, i].
      batch: with the true tokens.
      action_ids: the first discrete action token, and one past the last.
    """
    right = logits.argmax(axis=-1) == batch.suffix_ids
    is_action = (batch.suffix_ids >= action_ids[0]) & (batch.suffix_ids < action_ids[1])
    kinds = {"text": batch.loss_mask & ~is_action, "action": batch.loss_mask & is_action}
    return {
        f"{kind}_token_right": losses.Sum((right & mask).sum(axis=1), mask.sum(axis=1))
        for kind, mask in kinds.items()
    }


def means(sums: Mapping[str, losses.Sum]) -> dict[str, float]:
    """The mean of each; none of what counts nothing."""
    return {
        name: float(s.totals.sum() / s.counts.sum()) for name, s in sums.items() if s.counts.sum()
    }


def action_scores(
    encoding: str,
    predicted: np.ndarray,
    target: np.ndarray,
    mask: np.ndarray,
    mean: Sequence[float],
) -> dict[str, float]:
    """Action error in physical units, and that of always saying the mean action.

    Args:
      encoding: of the actions, see `data_pipelines.oxe.spec.ACTION_ENCODINGS`.
      predicted, target: float[N, C, A].
      mask: bool[N, C], True where the target lies inside its episode.
      mean: A numbers, the training set's.
    """
    constant = np.broadcast_to(np.array(mean, np.float32), target.shape)
    found: dict[str, float] = {}
    for prefix, chunks in (("", predicted), ("mean_action_", constant)):
        if encoding == "EEF_POS":
            errors = dataclasses.asdict(action_error(chunks, target, mask))
        else:
            errors = {"action_error": float(np.abs(chunks - target)[mask].mean())}
        found |= {prefix + name: value for name, value in errors.items()}
    return found


def latent_scores(
    hidden: Latents, numbers: np.ndarray, before: Mapping[str, np.ndarray] | None
) -> dict[str, float]:
    """Whether thoughts vary, differ, move and see; left out where that cannot be said.

    Args:
      hidden: of N rows.
      numbers: int[N], their steps.
      before: samples of the evaluation before, or None.
    """
    slots = np.asarray(hidden.slots, np.float32)
    found = {}
    if slots.shape[1] and len(slots) > 1:
        found["slot_rank"] = latents.effective_rank(slots.reshape(-1, slots.shape[-1]))
    if slots.shape[1] > 1:
        found["slot_cosine"] = latents.slot_cosine(slots)
    same = before is not None and np.array_equal(before["numbers"], numbers)
    if before is not None and same and slots.size and before["slots"].shape == slots.shape:
        found["slot_drift"] = latents.drift(slots, before["slots"])
    moves = np.asarray(hidden.moves)
    if hidden.imagined is not None and hidden.seen is not None and moves.sum() > 1:
        imagined = np.asarray(hidden.imagined, np.float32)[moves]
        right = latents.nearest(imagined, np.asarray(hidden.seen, np.float32)[moves])
        found["imagined_rank"] = latents.effective_rank(imagined.reshape(-1, imagined.shape[-1]))
        found["imagined_right"] = float((right == np.arange(len(right))).mean())
    return found


def physical(chunks: Any, normalizer: Normalizer) -> np.ndarray:
    """Normalised chunks float32[N, C, A] as actions of a dataset, in its own width and units."""
    return normalizer.unnormalize(np.asarray(chunks)[..., : normalizer.statistics.width])


def true_chunks(source: StepSource, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The demonstrated actions float32[N, C, A] of steps as stored, and where they are their own.

    Not the loader's, which are clipped to what the model can say. The second is bool[N, C].
    """
    index = source.index
    rows = np.array([source.row(int(number)) for number in numbers])
    episodes = index.episodes[index.rows[rows]["episode"]]
    ends = episodes["first_row"] + episodes["rows"]
    return action_chunks(
        index.actions, rows, ends, source.action_horizon, source.absolute, source.stride
    )


def _read(state: TrainState) -> tuple[Any, Any, Any]:
    """What evaluation reads of a state, or of its shardings."""
    return state.params, state.ema, state.teacher


def _pictures(source: StepSource, numbers: np.ndarray, hidden: Latents) -> dict[str, np.ndarray]:
    """Slots, and of the first rows that move: frames, and the next frame nearest to the imagined.

    Returns:
      `slots` float32[N, K, D]; of FILMS rows `frames`, `next_frames`, `nearest_frames`
      uint8[M, H, W, 3], `right` bool[M], whether the nearest is their own, and `words`.
    """
    found = {"slots": np.asarray(hidden.slots, np.float32)}
    rows = np.flatnonzero(hidden.moves)
    if hidden.imagined is None or hidden.seen is None or not len(rows):
        return found
    nearest = latents.nearest(
        np.asarray(hidden.imagined, np.float32)[rows], np.asarray(hidden.seen, np.float32)[rows]
    )[:FILMS]
    steps = [source[int(number)] for number in numbers[rows[:FILMS]]]
    others = [source[int(number)] for number in numbers[rows[nearest]]]
    return found | {
        "frames": np.stack([step["images"][0] for step in steps]),
        "next_frames": np.stack([step["next_images"][0] for step in steps]),
        "nearest_frames": np.stack([step["next_images"][0] for step in others]),
        "right": nearest == np.arange(len(nearest)),
        "words": np.array([step["instruction"] for step in steps]),
    }


def _before(folder: Path, step: int) -> dict[str, np.ndarray] | None:
    """The samples of the newest evaluation before a step, or None."""
    earlier = [path for number, path in sample_files(folder).items() if number < step]
    return dict(np.load(earlier[-1])) if earlier else None


def files_to_keep(eval_steps: int, checkpoint_steps: int) -> int:
    """How many evaluations' samples a run needs that resumes.

    It may go back by two checkpoints, where it was killed as it saved, and needs the evaluation
    before that to tell the drift.
    """
    return 2 + 2 * -(-checkpoint_steps // eval_steps)


def _save(folder: Path, step: int, samples: Mapping[str, np.ndarray], *, keep: int) -> None:
    """Writes samples in one go; of older ones the newest stay, later ones are void."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / "unfinished"
    with unfinished.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, **samples)
    unfinished.replace(folder / f"{step}.npz")
    files = sample_files(folder)
    void = [number for number in files if number > step]
    old = [number for number in files if number <= step][:-keep]
    for number in (*void, *old):
        files[number].unlink()
