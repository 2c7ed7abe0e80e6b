"""One table between our parameters and torch's, read in both directions.

A row names a module of ours, the module in torch, and how the axes of its arrays correspond. Axes
are letters, grouped where one side keeps several flat; a group's first letter varies slowest. So
the kernel of the query projection, `DNH -> (NH)D`, is float32[D, N, H] here and float32[N*H, D]
there; import reads from right to left. Sizes come from our parameters' shapes, which need no data:
the published 4 B checkpoint is checked without allocating it.

Our blocks are stacked on a leading axis (`nn.scan`), and `{i}` in torch's name runs over it. The
action expert's blocks alternate in torch, cross-attention at even numbers, self-attention at odd
ones: `{even}` = 2i and `{odd}` = 2i + 1; with an odd number of blocks the `{last}` stands alone.

    text/layers/attn/q_proj/kernel[i] <-> model.language_model.layers.{i}.self_attn.q_proj.weight

Letters: D width, N heads, H head dim, V vocab, W vision width, P rows of a table, I in, O out;
S the three of q, k, v; C colour, T time, Y and X the pixels of a patch.

Sources: names of transformers' `Qwen3VLForConditionalGeneration`; of the LaRA-VLA release (93b5c03)
`laravla/model/modules/{vlm/QWen3.py, action_model/GR00T_ActionHeader.py}`.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

Shape = tuple[int, ...]

COLOURS, FRAMES = 3, 2  # of a patch of Qwen3-VL, which is square

# Kinds of modules: our leaf, torch's leaf, the axes. A leaf our module lacks (a bias) is skipped.
LINEAR = (("kernel", "weight", "IO -> OI"), ("bias", "bias", "O -> O"))
HEADS_IN = (("kernel", "weight", "DNH -> (NH)D"), ("bias", "bias", "NH -> (NH)"))
HEADS_OUT = (("kernel", "weight", "NHD -> D(NH)"), ("bias", "bias", "D -> D"))
FUSED_QKV = (("kernel", "weight", "WSNH -> (SNH)W"), ("bias", "bias", "SNH -> (SNH)"))
PATCHES = (("kernel", "weight", "(CTYX)W -> WCTYX"), ("bias", "bias", "W -> W"))
NORM = (("scale", "weight", "D -> D"), ("bias", "bias", "D -> D"))
TABLE = (("", "weight", "PD -> PD"),)
VOCAB = (("", "weight", "VD -> VD"),)
HEAD = (("kernel", "weight", "DV -> VD"),)

EXPERT_BLOCKS = (("blocks/cross", "{even}"), ("blocks/self", "{odd}"), ("last_cross", "{last}"))
EXPERT_BLOCK = (
    ("norm", "norm1.linear", LINEAR),
    ("attn/to_q", "attn1.to_q", HEADS_IN),
    ("attn/to_k", "attn1.to_k", HEADS_IN),
    ("attn/to_v", "attn1.to_v", HEADS_IN),
    ("attn/to_out", "attn1.to_out.0", HEADS_OUT),
    ("mlp/fc1", "ff.net.0.proj", LINEAR),
    ("mlp/fc2", "ff.net.2", LINEAR),
)

ROWS = (
    ("vision/patch_embed", "{vision}patch_embed.proj", PATCHES),
    ("vision/pos_embed", "{vision}pos_embed", TABLE),
    ("vision/blocks/norm1", "{vision}blocks.{i}.norm1", NORM),
    ("vision/blocks/norm2", "{vision}blocks.{i}.norm2", NORM),
    ("vision/blocks/attn/qkv", "{vision}blocks.{i}.attn.qkv", FUSED_QKV),
    ("vision/blocks/attn/proj", "{vision}blocks.{i}.attn.proj", HEADS_OUT),
    ("vision/blocks/mlp/fc1", "{vision}blocks.{i}.mlp.linear_fc1", LINEAR),
    ("vision/blocks/mlp/fc2", "{vision}blocks.{i}.mlp.linear_fc2", LINEAR),
    ("vision/merger/norm", "{vision}merger.norm", NORM),
    ("vision/merger/fc1", "{vision}merger.linear_fc1", LINEAR),
    ("vision/merger/fc2", "{vision}merger.linear_fc2", LINEAR),
    ("vision/deepstack_mergers/norm", "{vision}deepstack_merger_list.{i}.norm", NORM),
    ("vision/deepstack_mergers/fc1", "{vision}deepstack_merger_list.{i}.linear_fc1", LINEAR),
    ("vision/deepstack_mergers/fc2", "{vision}deepstack_merger_list.{i}.linear_fc2", LINEAR),
    ("text/embed_tokens", "{text}embed_tokens", VOCAB),
    ("text/layers/input_norm", "{text}layers.{i}.input_layernorm", NORM),
    ("text/layers/post_norm", "{text}layers.{i}.post_attention_layernorm", NORM),
    ("text/layers/attn/q_proj", "{text}layers.{i}.self_attn.q_proj", HEADS_IN),
    ("text/layers/attn/k_proj", "{text}layers.{i}.self_attn.k_proj", HEADS_IN),
    ("text/layers/attn/v_proj", "{text}layers.{i}.self_attn.v_proj", HEADS_IN),
    ("text/layers/attn/o_proj", "{text}layers.{i}.self_attn.o_proj", HEADS_OUT),
    ("text/layers/attn/q_norm", "{text}layers.{i}.self_attn.q_norm", NORM),
    ("text/layers/attn/k_norm", "{text}layers.{i}.self_attn.k_norm", NORM),
    ("text/layers/mlp/gate_proj", "{text}layers.{i}.mlp.gate_proj", LINEAR),
    ("text/layers/mlp/up_proj", "{text}layers.{i}.mlp.up_proj", LINEAR),
    ("text/layers/mlp/down_proj", "{text}layers.{i}.mlp.down_proj", LINEAR),
    ("text/norm", "{text}norm", NORM),
    ("text/lm_head", "{lm_head}", HEAD),
    ("action_expert/state_encoder/layer1", "{action_expert}state_encoder.layer1", LINEAR),
    ("action_expert/state_encoder/layer2", "{action_expert}state_encoder.layer2", LINEAR),
    ("action_expert/action_encoder/layer1", "{action_expert}action_encoder.layer1", LINEAR),
    ("action_expert/action_encoder/layer2", "{action_expert}action_encoder.layer2", LINEAR),
    ("action_expert/action_encoder/layer3", "{action_expert}action_encoder.layer3", LINEAR),
    ("action_expert/action_decoder/layer1", "{action_expert}action_decoder.layer1", LINEAR),
    ("action_expert/action_decoder/layer2", "{action_expert}action_decoder.layer2", LINEAR),
    ("action_expert/future_tokens", "{action_expert}future_tokens", TABLE),
    ("action_expert/position_embedding", "{action_expert}position_embedding", TABLE),
    ("action_expert/time_encoder/linear_1", "{time_encoder}linear_1", LINEAR),
    ("action_expert/time_encoder/linear_2", "{time_encoder}linear_2", LINEAR),
    *(
        (f"action_expert/{block}/{module}", f"{{blocks}}{number}.{torch_module}", kind)
        for block, number in EXPERT_BLOCKS
        for module, torch_module, kind in EXPERT_BLOCK
    ),
    ("action_expert/proj_out_1", "{action_expert}model.proj_out_1", LINEAR),
    ("action_expert/proj_out_2", "{action_expert}model.proj_out_2", LINEAR),
)
PAIRS = "action_expert/blocks/cross/"
# our path -> torch's key, axes
LEAVES = {
    f"{ours}/{ours_leaf}".rstrip("/"): (f"{torch}.{torch_leaf}", axes)
    for ours, torch, kind in ROWS
    for ours_leaf, torch_leaf, axes in kind
}


class KeyMismatch(ValueError):
    """Source and model do not fit together; the message lists every key that does not."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where torch keeps each part: the prefix of its keys; None where the layout has no such part.

    Attributes:
      tied_head: True if a tied head is written as a copy of the embedding (a torch state dict holds
        it), False if it is left out (safetensors of a tied model, as transformers writes them).
        On import a tied head may be there or not; if it is, it must equal the embedding.
    """

    name: str
    vision: str
    text: str
    lm_head: str
    action_expert: str | None = None
    teacher: str | None = None
    tied_head: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        """The top-level entries of our parameter tree that this layout can hold."""
        parts = ("vision", "text", "action_expert", "teacher")
        return tuple(part for part in parts if getattr(self, part) is not None)

    def select(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The sub-tree of `params` that this layout can hold."""
        return {part: params[part] for part in self.parts if part in params}

    def names(self, part: str) -> dict[str, str]:
        """What the templates of `ROWS` mean for one part of the tree."""
        expert = f"{self.action_expert}model."
        return {
            "vision": str(self.teacher) if part == "teacher" else self.vision,
            "text": self.text,
            "lm_head": self.lm_head,
            "action_expert": str(self.action_expert),
            "time_encoder": f"{expert}timestep_encoder.timestep_embedder.",
            "blocks": f"{expert}transformer_blocks.",
        }

    def prefixes(self, part: str) -> tuple[str, ...]:
        """The prefixes of all torch keys of one part."""
        if part not in self.parts:
            raise ValueError(
                f"layout {self.name!r} has no {part!r}; it has {', '.join(self.parts)}"
            )
        return (self.text, self.lm_head) if part == "text" else (getattr(self, part),)


def _layout(name: str, vlm: str, **kwargs: Any) -> Layout:
    text, vision = f"{vlm}model.language_model.", f"{vlm}model.visual."
    return Layout(name=name, text=text, vision=vision, lm_head=f"{vlm}lm_head", **kwargs)


HF = _layout("hf", "")
REFERENCE = _layout(
    "reference",
    "qwen_vl_interface.model.",
    action_expert="action_model.",
    teacher="qwen_vl_interface.visual_ema.",
    tied_head=True,
)
GOLDEN = _layout("golden", "vlm.", action_expert="head.")
LAYOUTS = {layout.name: layout for layout in (HF, REFERENCE, GOLDEN)}


@dataclass(frozen=True)
class Axes:
    """The axes of one array on both sides: split into single letters, permuted, grouped again.

    Attributes:
      ours, torch: shapes of the array here and there.
      split: our shape with every group split up.   order: torch's letters as indices into `split`.
      vocab: True if the array has a row a token.
    """

    ours: Shape
    torch: Shape
    split: Shape
    order: Shape
    vocab: bool

    @classmethod
    def bind(cls, spec: str, shape: Shape) -> "Axes":
        """Finds the sizes of the letters of `spec` in our `shape`."""
        left, right = (
            [g.strip("()") for g in re.findall(r"\(\w+\)|\w", s)] for s in spec.split("->")
        )
        if len(left) != len(shape):
            raise ValueError(f"shape {shape} does not have the axes {' '.join(left)}")
        sizes = dict(zip(left, shape, strict=True))
        if "CTYX" in sizes:
            side = math.isqrt(sizes["CTYX"] // (COLOURS * FRAMES))
            sizes |= {"C": COLOURS, "T": FRAMES, "Y": side, "X": side}
        letters = "".join(left)
        split = tuple(sizes[letter] for letter in letters)
        if math.prod(split) != math.prod(shape):
            raise ValueError(f"shape {shape} is not that of {COLOURS} x {FRAMES} square patches")
        return cls(
            ours=shape,
            torch=tuple(math.prod(sizes[letter] for letter in group) for group in right),
            split=split,
            order=tuple(letters.index(letter) for letter in "".join(right)),
            vocab="V" in letters,
        )

    def to_torch(self, value: np.ndarray) -> np.ndarray:
        """Our array as torch keeps it (a view where possible)."""
        return value.reshape(self.split).transpose(self.order).reshape(self.torch)

    def to_ours(self, value: np.ndarray) -> np.ndarray:
        """Torch's array as we keep it (a view where possible)."""
        there = value.reshape([self.split[axis] for axis in self.order])
        return there.transpose(np.argsort(self.order)).reshape(self.ours)


@dataclass(frozen=True)
class Entry:
    """One torch array and its place in our tree: `tree[path][index]`, index () or (block,)."""

    key: str
    path: str
    index: tuple[int, ...]
    axes: Axes


def entries(shapes: Mapping[str, Shape], layout: Layout) -> Iterator[Entry]:
    """All torch arrays that our parameters correspond to, with the shapes of both.

    Raises:
      KeyMismatch: a parameter has no name in this layout, or other axes than its row says.
    """
    nameless = [p for p in shapes if p.split("/")[0] not in layout.parts or _row(p) not in LEAVES]
    if nameless:
        raise KeyMismatch(f"no name in layout {layout.name!r} for {', '.join(nameless)}")
    pairs = next((s[0] for path, s in shapes.items() if path.startswith(PAIRS)), 0)
    for path, shape in shapes.items():
        part = path.partition("/")[0]
        template, spec = LEAVES[_row(path)]
        stacked = "{i}" in template or "{even}" in template or "{odd}" in template
        try:
            axes = Axes.bind(spec, shape[1:] if stacked else shape)
        except ValueError as error:
            raise KeyMismatch(f"parameter {path}: {error}") from error
        for i in range(shape[0] if stacked else 1):
            key = template.format(
                i=i, even=2 * i, odd=2 * i + 1, last=2 * pairs, **layout.names(part)
            )
            yield Entry(key, path, (i,) if stacked else (), axes)


def _row(path: str) -> str:
    """The teacher is a second vision tower and has the same rows."""
    return path.replace("teacher/", "vision/", 1) if path.startswith("teacher/") else path


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of parameters as `path/to/leaf` -> leaf."""
    return {"/".join(path): leaf for path, leaf in flatten_dict(params).items()}


def is_tied(paths: Collection[str]) -> bool:
    """Whether a decoder is there that uses its embedding as its head."""
    return "text/embed_tokens" in paths and "text/lm_head/kernel" not in paths
