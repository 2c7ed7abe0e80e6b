"""The text that the reference makes of a sample: what `PromptBuilder` is compared with."""

from collections.abc import Mapping, Sequence

from lara_jax.tokenizers.prompt import COMPONENTS, LATENT_FROM_STAGE, Annotation
from lara_jax.tokenizers.qwen import END_OF_THINKING, IMG_NEXT, START_OF_THINKING, THINKING

WHOLE_IMAGE = (0.0, 0.0, 1.0, 1.0)


def reasoning_text(
    instruction: str,
    annotation: Annotation | None,
    *,
    reasoning_stage: int,
    component_order: Sequence[str] = COMPONENTS,
    slots_per_component: Mapping[str, int] | None = None,
    img_next_tokens: int = 16,
) -> str:
    """The reference's text after the base prompt, with its behaviour where annotations are missing.

    Args:
      instruction: the task in words.
      annotation: None is the same as an empty one.
      reasoning_stage: 0..4.
      component_order: the order in the text.
      slots_per_component: thinking tokens of each component, 1 where absent and at least 1.
      img_next_tokens: number of `<img_next>` at the end.

    Source: the PyTorch release's reasoning formatter, checked against its output.
    """
    instruction = instruction.strip()
    annotation = annotation or Annotation()
    if reasoning_stage == 0:
        text = f"{instruction}."
    elif reasoning_stage == 1:
        body = " ".join(filter(None, map(annotation.explicit, component_order)))
        text = f"{instruction}. @ {body}" if instruction else body
    else:
        if not annotation.boxes:
            annotation = Annotation(annotation.subtask, (WHOLE_IMAGE,), annotation.motion)
        counts = slots_per_component or {}
        present = [name for name in component_order if annotation.explicit(name)]
        latent = [name for name in present if LATENT_FROM_STAGE[name] <= reasoning_stage]
        text = instruction
        if latent:
            thoughts = THINKING * sum(max(1, counts.get(name, 1)) for name in latent)
            lead = f"{instruction}. @ " if instruction else ""
            text = f"{lead}{START_OF_THINKING}{thoughts}{END_OF_THINKING}"
        explicit = [annotation.explicit(name) for name in present if name not in latent]
        text = " ".join([text, *explicit] if text else explicit)
    return f"{text} {IMG_NEXT * img_next_tokens}".strip()
