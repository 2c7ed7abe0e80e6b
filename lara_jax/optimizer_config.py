"""The part of a recipe that says how parameters move; `lara_jax.config.Recipe` holds each of these.

A parameter is named by its path, such as "text/layers/attn/q_proj/kernel". Patterns are globs over
whole paths in which `*` also stands for slashes: "vision/*" is all of the vision tower,
"*_proj/kernel" every projection of the text decoder.
"""

from dataclasses import dataclass

MOMENTS = ("float32", "bfloat16_first", "bfloat16")
# Above it a second moment of 8 significant bits is too coarse to follow the gradient down.
MOST_B2_FOR_BFLOAT16 = 0.98


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters that train otherwise than the rest of their part of the model.

    Attributes:
      name: what messages call it.
      patterns: paths; each pattern has to match some parameter. With a kernel come its factors.
      rate_factor: times the learning rate of their part.
      decay_factor: times `weight_decay`.
      freeze: never train: no gradient, no moments.
    """

    name: str
    patterns: tuple[str, ...]
    rate_factor: float = 1.0
    decay_factor: float = 1.0
    freeze: bool = False

    def __post_init__(self) -> None:
        if not self.name or not self.patterns:
            raise ValueError(
                f"a group needs a name and patterns, got {self.name!r} and {self.patterns}"
            )
        if min(self.rate_factor, self.decay_factor) < 0:
            raise ValueError(
                f"group {self.name!r}: rate_factor and decay_factor must be at least 0, got "
                f"{self.rate_factor} and {self.decay_factor}"
            )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a learning rate per part of the model and one schedule per stage.

    Attributes:
      base_rate: the rate that `final_rate` refers to.
      backbone_rate: vision tower and text decoder.     expert_rate: action expert.
      final_rate: where the cosine ends for `base_rate`; the parts end at the same proportion.
      warmup_fraction: part of a stage's steps with a linearly growing rate.
      b1, b2, epsilon, weight_decay: AdamW's.           clip_norm: of the whole gradient.
      groups: parameters with a rate or decay of their own, or frozen; the first that matches one
        counts.
      moments: how AdamW's two moments are kept between steps: "float32", "bfloat16" or
        "bfloat16_first" (the first one only); they are computed in float32.

    Source: the reference's `trainer` section (arXiv 2602.01166).
    """

    base_rate: float = 3e-5
    backbone_rate: float = 1e-5
    expert_rate: float = 1e-4
    final_rate: float = 5e-7
    warmup_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 1e-8
    clip_norm: float = 1.0
    groups: tuple[ParameterGroup, ...] = ()
    moments: str = "float32"

    def __post_init__(self) -> None:
        for name in ("backbone_rate", "expert_rate", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not (0 <= self.final_rate <= self.base_rate and self.base_rate > 0):
            raise ValueError(
                f"need 0 <= final_rate <= base_rate, got {self.final_rate} and {self.base_rate}"
            )
        if not 0 <= self.warmup_fraction <= 1:
            raise ValueError(f"warmup_fraction must be 0 to 1, got {self.warmup_fraction}")
        if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1):
            raise ValueError(f"b1 and b2 must be in [0, 1), got {self.b1} and {self.b2}")
        for name in ("epsilon", "clip_norm"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.moments not in MOMENTS:
            raise ValueError(f"moments must be one of {', '.join(MOMENTS)}; got {self.moments!r}")
        if self.moments == "bfloat16" and self.b2 > MOST_B2_FOR_BFLOAT16:
            raise ValueError(
                f"moments 'bfloat16' needs b2 <= {MOST_B2_FOR_BFLOAT16}, got {self.b2}: a step "
                "would change the second moment by less than its last bit; use 'bfloat16_first'"
            )
        names = [group.name for group in self.groups]
        if len(set(names)) < len(names):
            raise ValueError(f"groups must have names of their own, got {names}")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters: kernel + alpha / rank * A B, of which only A and B train.

    A network (vision, text, action_expert) with an adapted kernel trains by its factors alone; one
    without trains as ever.

    Attributes:
      rank: of A and B; 0 adapts nothing.
      alpha: their weight.
      patterns: paths of the kernels to adapt; what else they match stays as it is.

    Source: arXiv 2106.09685.
    """

    rank: int = 0
    alpha: float = 16.0
    patterns: tuple[str, ...] = ("text/*_proj/kernel",)

    def __post_init__(self) -> None:
        if self.rank < 0 or self.alpha <= 0:
            raise ValueError(
                f"rank must be at least 0 and alpha positive, got {self.rank} and {self.alpha}"
            )
        if self.rank and not self.patterns:
            raise ValueError(f"rank is {self.rank}, but patterns name no kernel")

    @property
    def scale(self) -> float:
        """What A B is multiplied by."""
        return self.alpha / self.rank if self.rank else 0.0


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """The moving average of what trains, in float32: what evaluation, policies and export take.

    Attributes:
      decay: average = decay * average + (1 - decay) * parameters, each step; 0 keeps none.
    """

    decay: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {self.decay}")


@dataclass(frozen=True, kw_only=True)
class SpikeConfig:
    """Steps that change nothing: their loss or gradient is not finite, or explodes.

    Attributes:
      factor: a step explodes whose loss or gradient norm is above so many times the stage's usual
        one (the median of the last 64 steps that counted, of at least 16), and whose norm is above
        `optimizer.clip_norm`; 0 skips only what is not finite.
      max_in_a_row: so many skipped steps in a row end the run with a checkpoint.
    """

    factor: float = 10.0
    max_in_a_row: int = 10

    def __post_init__(self) -> None:
        if not (self.factor == 0 or self.factor > 1):
            raise ValueError(f"factor must be above 1, or 0 for never, got {self.factor}")
        if self.max_in_a_row < 1:
            raise ValueError(f"max_in_a_row must be at least 1, got {self.max_in_a_row}")
