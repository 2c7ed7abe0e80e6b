"""Brings an episode's raw steps into the common form that its dataset's spec describes.

    raw features of T stored steps          "action", "observation/state", ...
      terms: one vector a step              data_pipelines.oxe.terms
      row rules: which steps remain         data_pipelines.oxe.rules
    N rows: action, state, stored step, next stored step, instruction

What a dataset needs is written in its spec, so that a new set needs no code.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipelines.oxe.rules import Rows, parse_rule
from data_pipelines.oxe.spec import DatasetSpec
from data_pipelines.oxe.terms import RawFeature, parse, parse_language


@dataclass(frozen=True, kw_only=True, eq=False)
class Standardized:
    """An episode in the common form: N rows of T stored steps.

    Attributes:
      actions: float32[N, A].   states: float32[N, J], both in the data's units.
      frame: int32[N], the stored step of each row.
      next_frame: int32[N], the stored step whose image comes next; at the very end `frame` itself.
      instructions: N strings, empty where a step has none.
    """

    actions: np.ndarray
    states: np.ndarray
    frame: np.ndarray
    next_frame: np.ndarray
    instructions: tuple[str, ...]


def required_keys(spec: DatasetSpec) -> tuple[str, ...]:
    """The step features that `standardize` reads, relative to "steps/"; images not included."""
    terms = [parse(term) for term in (*spec.action, *spec.state)]
    if spec.language:
        terms.append(parse_language(spec.language))
    return tuple(dict.fromkeys(term.feature for term in terms if term.feature))


def standardize(spec: DatasetSpec, raw: Mapping[str, RawFeature]) -> Standardized:
    """Standardises one episode.

    Args:
      spec: the dataset.
      raw: step features relative to "steps/": numbers [T, ...], or T byte strings for text and
        for encoded tensors.

    Raises:
      ValueError: a feature is missing, of another kind, length or width than the spec says, or
        not finite. The message names dataset and feature.
    """
    try:
        steps = _steps(required_keys(spec), raw)
        rows = Rows.of(_vector(spec.action, raw, steps), _vector(spec.state, raw, steps))
        for rule in spec.rows:
            rows = parse_rule(rule)(rows)
        for name, vectors, width in (
            ("action", rows.actions, spec.action_dim),
            ("state", rows.states, spec.state_dim),
        ):
            if vectors.shape[1] != width:
                raise ValueError(
                    f"the {name} terms give {vectors.shape[1]} columns, {name}_modes names "
                    f"{width} (left out, it is 8 times q99 for states, 6 times q99 and none for "
                    f"actions); terms: {list(getattr(spec, name))}"
                )
        texts = parse_language(spec.language).words(raw) if spec.language else [""] * steps
    except ValueError as error:
        raise ValueError(f"dataset {spec.name!r}: {error}") from error
    return Standardized(
        actions=rows.actions,
        states=rows.states,
        frame=rows.frame,
        next_frame=rows.next_frame,
        instructions=tuple(texts[step] for step in rows.frame),
    )


def _steps(keys: Sequence[str], raw: Mapping[str, RawFeature]) -> int:
    """T, the number of steps on which all features agree."""
    missing = [key for key in keys if key not in raw]
    if missing:
        raise ValueError(
            f"step feature(s) {', '.join(missing)} missing; there are: {', '.join(sorted(raw))}"
        )
    lengths = {key: len(raw[key]) for key in keys}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"step features of different lengths: {lengths}")
    return lengths[keys[0]]


def _vector(terms: Sequence[str], raw: Mapping[str, RawFeature], steps: int) -> np.ndarray:
    """The terms side by side, float32[T, D]."""
    return np.concatenate([parse(term).vector(raw, steps) for term in terms], axis=1)
