"""What a served policy takes and gives, as plain numbers, and the check of what clients send.

The network compiles for one size of images and one number of observations, and acts on whatever
numbers stand in them: what reaches it has been checked here, value by value. The same numbers go
to every client as metadata, so that it can check itself against them before it moves a robot.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

import lara_jax
from lara_jax.serving.codec import Refused
from lara_jax.transforms import Normalizer

Observation = dict[str, Any]

MAX_INSTRUCTION = 1000  # characters
MAX_SIDE_PX = 4096
MAX_STATE = 1e6  # no robot's state in metres, radians or degrees comes near it
MISSING_STATE = ("refuse", "mean")


class ServedPolicy(Protocol):
    """What the server asks of a policy; `lara_jax.inference.policy.Policy` is one."""

    def __call__(self, observations: Sequence[Observation], /) -> np.ndarray:
        """E observations -> float32[E, C, A] in physical units."""
        ...

    def check_instruction(self, instruction: str, image_px: tuple[int, int]) -> None:
        """Raises ValueError if the policy cannot read the instruction."""
        ...


@dataclass(frozen=True, kw_only=True)
class Contract:
    """A policy's inputs and outputs.

    Attributes:
      dataset: whose robot it acts for; clients call it the "unnorm key".
      views: names of the frames it reads, in its order.
      image_px: (height, width) of every frame.
      any_image_size: whether the policy itself brings other sizes to `image_px`, as in training.
      state: scales states; its width is the state's, J.
      action: scales actions; its width is the action's, A.
      action_horizon: C, actions of a chunk.
      control_hz: actions a second.
      latent_slots: K in use.
      missing_state: what an observation without state means: "refuse" it, or take the "mean" state
        of the training data.
    """

    dataset: str
    views: tuple[str, ...]
    image_px: tuple[int, int]
    any_image_size: bool
    state: Normalizer
    action: Normalizer
    action_horizon: int
    control_hz: float
    latent_slots: int
    missing_state: str = "refuse"

    def __post_init__(self) -> None:
        if not self.views:
            raise ValueError("a policy must read at least one view")
        if not all(1 <= side <= MAX_SIDE_PX for side in self.image_px):
            raise ValueError(f"image_px is {self.image_px}; allowed 1..{MAX_SIDE_PX}")
        if self.missing_state not in MISSING_STATE:
            raise ValueError(
                f"missing_state is {self.missing_state!r}; allowed: {', '.join(MISSING_STATE)}"
            )

    def metadata(self) -> dict[str, Any]:
        """What a client is told on connecting; the words of openpi's and of starVLA's servers."""
        return {
            "server": "lara_jax",
            "version": lara_jax.__version__,
            "env": self.dataset,
            "views": list(self.views),
            "image_px": list(self.image_px),
            "any_image_size": self.any_image_size,
            "state_dim": len(self.state.modes),
            "missing_state": self.missing_state,
            "action_dim": len(self.action.modes),
            "action_chunk_size": self.action_horizon,
            "control_hz": self.control_hz,
            "latent_slots": self.latent_slots,
            "available_unnorm_keys": [self.dataset],
            "default_unnorm_key": self.dataset,
        }

    def example(self) -> Observation:
        """A valid observation: black frames, the mean state, no words."""
        frame = np.zeros((*self.image_px, 3), np.uint8)
        state = np.array(self.state.statistics.mean, np.float32)
        return {**dict.fromkeys(self.views, frame), "state": state, "instruction": ""}

    def checked(self, frames: Mapping[str, Any], state: Any, instruction: Any) -> Observation:
        """An observation that the policy can act on.

        Args:
          frames: by view, uint8[H, W, 3], or None where a camera is absent.
          state: float[J] in the data's units; None where the client sends none.
          instruction: what to do.

        Returns:
          The frames by view, "state" float32[J], "instruction".

        Raises:
          Refused: anything has the wrong type, shape or size, is not finite, or out of range.
        """
        missing = [view for view in self.views if view not in frames]
        if missing:
            raise Refused(f"the request lacks the views {missing}; it needs {list(self.views)}")
        given = {view: self._frame(view, frames[view]) for view in self.views}
        if all(frame is None for frame in given.values()):
            raise Refused(f"the request has no frame in any of {list(self.views)}")
        if not isinstance(instruction, str) or len(instruction) > MAX_INSTRUCTION:
            raise Refused(f"the instruction must be text of at most {MAX_INSTRUCTION} characters")
        return {**given, "state": self._state(state), "instruction": instruction}

    def _frame(self, view: str, frame: Any) -> np.ndarray | None:
        if frame is None:
            return None
        if not isinstance(frame, np.ndarray):
            raise Refused(f"view {view!r} must be an array uint8[H, W, 3]")
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise Refused(
                f"view {view!r} must be uint8[H, W, 3], got {frame.dtype}{list(frame.shape)}"
            )
        size = frame.shape[:2]
        if self.any_image_size:
            if not all(1 <= side <= MAX_SIDE_PX for side in size):
                raise Refused(f"view {view!r} is {size} px; allowed 1..{MAX_SIDE_PX}")
        elif size != self.image_px:
            raise Refused(f"view {view!r} is {size} px; this policy reads {self.image_px} px")
        return frame

    def _state(self, state: Any) -> np.ndarray:
        width = len(self.state.modes)
        if state is None:
            if self.missing_state == "refuse":
                raise Refused(f"the request has no state; this policy reads {width} numbers")
            return np.array(self.state.statistics.mean, np.float32)
        if isinstance(state, list) and all(type(x) in (int, float) for x in state):
            state = np.array(state, np.float64)
        if not isinstance(state, np.ndarray) or state.shape != (width,):
            raise Refused(f"the state must be an array of {width} numbers")
        # As float64 first: a number too large for float32 is out of range, not infinite.
        wide = state.astype(np.float64)
        if not np.isfinite(wide).all():
            raise Refused("the state has numbers that are not finite")
        if np.abs(wide).max() > MAX_STATE:
            raise Refused(f"the state has numbers beyond +-{MAX_STATE:g}")
        return wide.astype(np.float32)
