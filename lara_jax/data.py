"""A recipe's data, in one place: training, evaluation and reports call the same functions.

recipe -> stream of steps (a mixture of indexed datasets) -> statistics -> batches of a stage
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from data_pipelines import catalog
from data_pipelines.loader import Loader, Prompt
from data_pipelines.mixture import MixtureSource
from data_pipelines.sampling import StepSource
from data_pipelines.statistics import DatasetStatistics, index_statistics, normalizers
from lara_jax import cluster
from lara_jax.assemble import ActionTokens
from lara_jax.config import Recipe
from lara_jax.curriculum import Stage
from lara_jax.tokenizers.fast import FastTokenizer

Statistics = Mapping[str, DatasetStatistics]
FAST_CHUNKS = 16_384  # that a FAST tokenizer is fitted to


def open_mixture(recipe: Recipe, split: str) -> MixtureSource:
    """The stream of steps that a recipe trains on, or is evaluated on.

    Indexes that are not there yet are made. What filters leave out, and what else departs from the
    datasets as they are stored, is said on standard error.

    Args:
      recipe: the run's settings.
      split: as in `config.data.split`.

    Raises:
      FileNotFoundError: there is no such dataset.
      ValueError: a dataset, mixture or split is unknown, its index is stale, or datasets do not go
        together.
    """
    data, model = recipe.data, recipe.model
    if not data.path:
        raise ValueError("config.data.path is empty: give --config.data.path=DIRECTORY")
    chosen = catalog.entries(
        data.path, name=data.name, mixture=data.mixture, definitions=data.definitions
    )
    sources = []
    for entry in chosen:
        read = catalog.split_of(entry.path, split, held_out=data.eval_split)
        part = catalog.open_part(
            entry, read, definitions=data.definitions, index_dir=data.index_dir
        )
        source = StepSource(
            index=part.index,
            views=data.views,
            action_horizon=model.action_horizon,
            filters=data.filters,
            episodes=part.episodes,
            image_size=(data.frame_px[0], data.frame_px[1]) if data.frame_px else None,
            chunk_hz=data.chunk_hz,
            action_dim=model.action_dim,
        )
        _report(source, entry, part, asked=split, held_out=data.eval_split)
        sources.append(source)
    _refuse_other_action_spaces(sources, mixed=data.mixed_action_spaces)
    return MixtureSource(
        sources=tuple(sources),
        weights=tuple(entry.weight for entry in chosen),
        seed=recipe.seed,
        balance=data.balance,
    )


def stage_source(source: MixtureSource, stage: Stage) -> MixtureSource:
    """The stream of a stage, which may take some of a mixture's datasets only.

    Args:
      source: of all datasets.
      stage: names those that it takes.

    Raises:
      ValueError: a name is not in the mixture.
    """
    if not stage.datasets:
        return source
    known = [s.name for s in source.sources]
    for name in stage.datasets:
        if name not in known:
            raise ValueError(
                f"config.stages.{stage.name}.datasets names {name!r}; the run has: "
                f"{', '.join(sorted(known))}"
            )
    pairs = zip(source.sources, source.weights, strict=True)
    sources, weights = zip(*(pair for pair in pairs if pair[0].name in stage.datasets), strict=True)
    return replace(source, sources=sources, weights=weights)


def statistics_of(source: MixtureSource) -> dict[str, DatasetStatistics]:
    """Statistics of each dataset's steps, by its name; from the cache beside its index."""
    return {
        s.name: index_statistics(s.index, filters=s.filters, stride=s.stride, episodes=s.episodes)
        for s in source.sources
    }


def statistics_to_dict(statistics: Statistics) -> dict[str, Any]:
    """Plain values by dataset, as a checkpoint holds them."""
    return {name: of.to_dict() for name, of in statistics.items()}


def statistics_from_dict(values: Mapping[str, Any]) -> dict[str, DatasetStatistics]:
    """The inverse of `statistics_to_dict`."""
    return {name: DatasetStatistics.from_dict(of) for name, of in values.items()}


def make_loader(
    recipe: Recipe,
    source: MixtureSource,
    statistics: Statistics,
    prompt: Prompt,
    *,
    host: tuple[int, int] = (0, 1),
    action_tokens: ActionTokens | None = None,
    silent_share: Callable[[int], float] | None = None,
) -> Loader:
    """The batches of a stage, whose prompt decides what the words become.

    Args:
      recipe: the run's settings.
      source: the steps.
      statistics: of the run, which may be older than the data.
      prompt: the stage's.
      host: this host's number, and the number of hosts.
      action_tokens, silent_share: see `Loader`; None in stages without.
    """
    return Loader(
        source=source,
        prompt=prompt,
        normalizers={name: normalizers(of) for name, of in statistics.items()},
        state_dim=recipe.model.state_dim,
        batch_size=recipe.data.batch_size,
        num_threads=recipe.data.num_threads,
        num_workers=recipe.data.num_workers,
        host=host,
        action_tokens=action_tokens,
        silent_share=silent_share,
    )


def fast_tokenizer(
    recipe: Recipe, source: MixtureSource, statistics: Statistics, action_ids: tuple[int, int]
) -> FastTokenizer | None:
    """The FAST tokenizer of a run: the one at `config.tokenizer.fast_path`, or one that is fitted.

    Args:
      recipe: the run's settings.
      source: the training steps, whose first chunks it is fitted to.
      statistics: of the run.
      action_ids: the text tokenizer's `action_range`.

    Returns:
      None where no stage has discrete actions.

    Raises:
      ValueError: it has more tokens than the text tokenizer has action tokens.
    """
    if not any(stage.discrete_actions for stage in recipe.stages):
        return None
    room = action_ids[1] - action_ids[0]
    if recipe.tokenizer.fast_path:
        fast = FastTokenizer.load(recipe.tokenizer.fast_path)
    else:
        chunks = make_loader(recipe, source, statistics, _no_prompt).normalized_chunks(FAST_CHUNKS)
        extremes = (
            normalizers(of)[0].normalize(np.array([of.action.min, of.action.max]))
            for of in statistics.values()
        )
        fast = FastTokenizer.fit(
            list(chunks),
            vocab_size=min(recipe.tokenizer.fast_vocabulary, room),
            reach=max(1.0, *(float(np.abs(values).max()) for values in extremes)),
        )
    if fast.vocab_size > room:
        raise ValueError(
            f"config.tokenizer.fast_path: {recipe.tokenizer.fast_path} has {fast.vocab_size} "
            f"tokens; the text tokenizer has {room} action tokens"
        )
    return fast


def _no_prompt(*_: Any) -> dict[str, Any]:
    return {}


def _report(
    source: StepSource, entry: catalog.Entry, part: catalog.Part, *, asked: str, held_out: str
) -> None:
    """Says what is read of a dataset, and what is not."""
    counts, mine = part.index.header.counts, part.counts
    notes = [f"{mine['dropped_steps']} stored steps are no steps to learn from"]
    if part.split != asked:
        others = counts["episodes"] - mine["episodes"]
        rest = "trained on" if asked == held_out else "held out"
        notes.append(f"as it has no split {held_out!r}, the other {others} episodes are {rest}")
    for name, why in (
        ("empty_episodes", "have no step"),
        ("left_out_episodes", "are left out by its definition"),
    ):
        if counts[name]:
            notes.append(f"{counts[name]} more episodes of the split {why}")
    if entry.ignored_weights:
        again = ", ".join(f"{weight:g}" for weight in entry.ignored_weights)
        notes.append(f"the mixture names it again, with weight {again}, which is ignored")
    if source.filters:
        notes.append(f"{source.filtered_rows} more are left out by {', '.join(source.filters)}")
    if source.missing_views:
        notes.append(f"it has no view {', '.join(source.missing_views)}")
    if source.is_too_slow:
        notes.append(f"slower than chunk_hz, it keeps its {source.chunk_rate_hz:g} Hz")
    elif source.chunk_hz:
        rate, stride = source.chunk_rate_hz, source.stride
        notes.append(f"{rate:.3g} actions a second in a chunk, {stride} of its steps each")
    cluster.say(
        f"{source.name}: {len(source)} steps, {mine['episodes']} episodes of {part.split}, "
        f"weight {entry.weight:g}; " + "; ".join(notes)
    )


def _refuse_other_action_spaces(sources: list[StepSource], *, mixed: bool) -> None:
    """One policy head, one meaning of its numbers, unless it is asked for otherwise."""
    spaces = {source.name: source.index.spec.action_encoding for source in sources}
    if len(set(spaces.values())) > 1 and not mixed:
        listed = ", ".join(f"{name} {space}" for name, space in spaces.items())
        raise ValueError(
            f"the mixture has different action spaces ({listed}); leave some out, or set "
            f"config.data.mixed_action_spaces=true, which fills narrower actions up and masks them"
        )
