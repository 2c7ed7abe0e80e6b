"""One HTML page about closed-loop episodes: how many succeeded, what the policy saw and thought.

    table of success       a line per task, and one for all
    where it failed        the furthest phase of the failed episodes
    episodes               at each call of the policy: the frame, what the latent slots decode to,
                           and which frame of the episode the imagined next one is nearest to

The page is one file: pictures are part of it, and it loads and runs nothing.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from data_pipelines.inspect_figures import frame, save_page, table
from lara_jax.evals.rollout import Episode, Rollouts


@dataclass(frozen=True, kw_only=True)
class Thought:
    """What a policy thought when it was asked.

    Attributes:
      words: of each latent slot, what it decodes to.
      imagined: number of the episode's frame that the imagined next one is nearest to, or None.
    """

    words: tuple[str, ...] = ()
    imagined: int | None = None


def write_page(
    out: Path,
    title: str,
    facts: Mapping[str, object],
    result: Rollouts,
    thoughts: Mapping[int, Sequence[Thought]],
) -> None:
    """Writes the page.

    Args:
      out: the HTML file.
      title: of the page.
      facts: what was evaluated and how, by name.
      result: the episodes.
      thoughts: by number of the episode in `result`: what the policy thought in each of `asked`.
        These episodes are shown, those that failed first.
    """
    shown = sorted(thoughts, key=lambda number: result.episodes[number].success)
    sections = [
        table((), [[name, value] for name, value in facts.items()]),
        "<h2>Success</h2>",
        success_table(result),
        *_phases(result),
        *(part for n in shown for part in _episode(result.episodes[n], thoughts[n])),
    ]
    save_page(out, title, sections)


def success_table(result: Rollouts) -> str:
    """A line per task, and one for all of them where there are several."""
    rows = []
    for task, part in result.by_task_and_all().items():
        low, high = part.interval
        rate = f"{100 * part.success_rate:.0f} %"
        interval = f"{100 * low:.0f} to {100 * high:.0f} %"
        seconds = sum(episode.seconds for episode in part.episodes) / len(part.episodes)
        rows.append(
            [task, len(part.episodes), part.successes, rate, interval, part.steps_mean, seconds]
        )
    header = [
        "task",
        "episodes",
        "solved",
        "rate",
        "95 % interval (Wilson)",
        "steps",
        "seconds each",
    ]
    return table(header, rows)


def _phases(result: Rollouts) -> Iterator[str]:
    """How many of the failed episodes came how far."""
    counts = {
        task: Counter(e.phase for e in part.episodes if not e.success and e.phase)
        for task, part in result.by_task().items()
    }
    rows = [
        [task, phase, count] for task, found in counts.items() for phase, count in found.items()
    ]
    if rows:
        yield "<h2>Where it failed: the furthest that these episodes came</h2>"
        yield table(["task", "furthest phase", "episodes"], rows)


def _episode(episode: Episode, thoughts: Sequence[Thought]) -> Iterator[str]:
    """One episode: a picture for each call of the policy, and how it ended."""
    verdict = "solved" if episode.success else "not solved"
    if episode.phase and not episode.success:
        verdict += f", furthest phase: {episode.phase}"
    yield f"<h3>{escape(episode.instruction)}</h3>"
    yield (
        f'<p class="note">{escape(str(episode.trial))}, seed {episode.trial.seed}: '
        f"{escape(verdict)}, {episode.steps} steps</p>"
    )
    figures = []
    for (step, _), thought in zip(episode.asked, thoughts, strict=True):
        pictures = [_figure(episode, step, f"step {step}", _slots(thought))]
        if thought.imagined is not None:
            words = f"imagined next: nearest to step {thought.imagined}"
            pictures.append(_figure(episode, thought.imagined, words, ""))
        figures += pictures
    figures.append(_figure(episode, episode.steps, f"step {episode.steps}, the end", ""))
    yield f'<div class="film">{"".join(figures)}</div>'


def _figure(episode: Episode, step: int, words: str, below: str) -> str:
    picture = frame(episode.seen[step], (), words)
    return f"<figure>{picture}<figcaption>{escape(words)}{below}</figcaption></figure>"


def _slots(thought: Thought) -> str:
    """The slots' words, a line each."""
    return "".join(
        f"<br>slot {number}: {escape(words)}" for number, words in enumerate(thought.words, 1)
    )
