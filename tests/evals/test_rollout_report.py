"""The page about episodes: its numbers, what it shows, and whose thoughts."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lara_jax.evals.rollout import Episode, Rollouts
from lara_jax.evals.rollout_report import Thought, success_table, write_page
from lara_jax.evals.suites import Trial


def episode(index: int, *, success: bool, task: str = "place", steps: int = 5) -> Episode:
    """Asked at steps 0 and 4; its frames are ever brighter."""
    rng = np.random.default_rng(index)
    seen = [rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(steps + 1)]
    state = np.zeros(8, np.float32)
    text = f"put <{index}> away"
    asked = [
        (step, {"primary": seen[step], "state": state, "instruction": text})
        for step in range(0, steps, 4)
    ]
    return Episode(
        trial=Trial(task=task, index=index, seed=100 + index),
        instruction=text,
        success=success,
        steps=steps,
        phase="solved" if success else "grasped",
        seconds=2.0,
        asked=tuple(asked),
        seen=tuple(seen),
    )


def test_the_page_shows_numbers_and_what_was_thought(tmp_path: Path) -> None:
    episodes = (
        episode(0, success=True),
        episode(1, success=False),
        episode(2, success=False, task="stack"),
    )
    thoughts = {
        0: (Thought(words=("red / blue",), imagined=1), Thought(words=("<b>",), imagined=5)),
        1: (Thought(words=()), Thought(words=())),
    }
    out = tmp_path / "new" / "page.html"
    write_page(out, "run: tabletop", {"workers": 2}, Rollouts(episodes=episodes), thoughts)
    page = out.read_text()
    # Failed before solved; the third was not kept.
    assert page.index("put &lt;1&gt; away") < page.index("put &lt;0&gt; away")
    assert "put &lt;2&gt; away" not in page
    assert "slot 1: red / blue" in page and "slot 1: &lt;b&gt;" in page
    assert "imagined next: nearest to step 5" in page and "step 4<br>" in page
    assert "place episode 1, seed 101: not solved, furthest phase: grasped, 5 steps" in page
    # Solved: 2 calls with an imagined frame each, and the end; failed: 2 calls and the end.
    assert page.count("<img src=") == 2 * 2 + 1 + 2 + 1
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    phases = page.split("Where it failed")[1].split("</table>")[0]
    assert re.findall(r"<td>(\w+)</td>", phases) == ["place", "grasped", "stack", "grasped"]


def test_success_is_told_by_task_and_in_all() -> None:
    one = Rollouts(episodes=(episode(0, success=True), episode(1, success=False)))
    assert "50 %" in success_table(one) and "9 to 91 %" in success_table(one)
    assert "<td>all</td>" not in success_table(one)
    several = Rollouts(episodes=(*one.episodes, episode(2, success=True, task="stack")))
    assert [f"<td>{task}</td>" in success_table(several) for task in ("place", "stack", "all")] == [
        True
    ] * 3


@pytest.mark.slow
def test_thoughts_are_those_of_the_policy() -> None:
    from lara_jax.evals.thoughts import WORDS, ThoughtReader, see, slot_logits
    from lara_jax.inference.policy import Policy
    from lara_jax.models.visual_latent import gather_block
    from lara_jax.train_step import model_inputs
    from tests.inference.test_policy import info, params

    policy = Policy(info(), params(), latent_slots=2)
    shown = episode(3, success=False, steps=10)
    thoughts = ThoughtReader(policy, None, rows=2)(shown)
    assert len(thoughts) == len(shown.asked) == 3
    assert all(len(t.words) == 2 and t.words[0].count(" / ") >= WORDS - 1 for t in thoughts)

    # The same for the last observation, step by step and by itself.
    batch = policy.batch([shown.asked[2][1]] * 2)
    inputs, grid = model_inputs(batch, policy.images)
    found = jax.jit(lambda p, x: policy.model.apply({"params": p}, x, grid))(policy.params, inputs)
    start = batch.prefix_ids.shape[1]
    logits = policy.model.apply(
        {"params": policy.params}, found.hidden[:, start : start + 2], method="logits"
    )
    best = policy.tokenizer.decode([int(logits[0, 1].argmax())]).strip()
    assert thoughts[2].words[1].startswith(best)
    imagined = gather_block(found.hidden, found.img_next, policy.recipe.model.img_next_tokens)[0]
    vision = policy.params["vision"]
    rows = [policy.batch([{**shown.asked[0][1], "primary": frame}] * 2) for frame in shown.seen]
    features = [see(policy.model, policy.recipe, vision, row)[0] for row in rows]
    distances = [float(jnp.abs(imagined - of).mean()) for of in features]
    assert thoughts[2].imagined == int(np.argmin(distances))

    # A model that returns normed states has the same words: the head norms but once.
    slots = jax.random.normal(jax.random.key(0), (1, 2, found.hidden.shape[-1]))
    scale = 1 + 0.5 * jax.random.uniform(jax.random.key(1), (slots.shape[-1],))
    text = {**policy.params["text"], "norm": {"scale": scale}}
    scaled = {**policy.params, "text": text}
    normed_model = policy.model.clone(
        config=dataclasses.replace(policy.model.config, latent_source="post_norm")
    )
    normed = policy.model.apply({"params": scaled}, slots, method=lambda m, x: m.text.final_norm(x))
    np.testing.assert_allclose(
        slot_logits(normed_model, scaled, normed),
        slot_logits(policy.model, scaled, slots),
        rtol=1e-4,
        atol=1e-4,
    )
