"""`lara eval`: success in a simulator, or the action error on held-out demonstrations.

    lara eval --workdir DIR --suite tabletop --families place,stack --episodes 50 --workers 2
    lara eval --server ws://HOST:PORT --suite tabletop
    lara eval --workdir DIR --suite offline

On standard output a table, or with `--json` one object a line: one for each task, and where there
are several one more, whose task is "all". Everything else goes to standard error.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from data_pipelines.sampling import parse_view
from lara_jax.evals.report import format_table, save_gif
from lara_jax.evals.rollout import ALL, Episode, FirstOfEach, Rollouts, rollout
from lara_jax.evals.rollout_report import Thought, write_page
from lara_jax.evals.suites import trials
from lara_jax.evals.workers import LaneConfig, Lanes

if TYPE_CHECKING:
    from lara_jax.evals.tabletop.suite import TabletopSuite

OFFLINE = "offline"
SUITES = ("tabletop", OFFLINE)
EPISODES_FILE = "episodes.jsonl"
# Episodes of each task on the page.
SHOWN_FAILED, SHOWN_SOLVED = 3, 2
# Options that a closed loop has and the offline evaluation has not, and the other way round.
ONLY_CLOSED = ("server", "families", "image_size", "gif", "html", "out")
ONLY_OFFLINE = ("samples",)
# What a server has been told already; what only it needs.
ONLY_OWN = ("step", "latent_slots", "dataset")
ONLY_SERVER = ("token_file", "ca_file")


def main(argv: Sequence[str]) -> int:
    """Runs `lara eval`."""
    arguments = _parser().parse_args(argv)
    _check(arguments)
    if arguments.suite == OFFLINE:
        # Imported here, as what follows: the command line alone knows about models.
        from lara_jax.evals import demonstrations

        return demonstrations.run(arguments)
    return _closed_loop(arguments)


def _closed_loop(arguments: argparse.Namespace) -> int:
    with ExitStack() as ending:
        policy, size = opened_policy(arguments, ending)
        suite = tabletop(arguments, policy.views, size)
        chosen = trials(suite, arguments.episodes)
        parallel = min(arguments.parallel, len(chosen))
        workers = min(arguments.workers, parallel)
        watch = parse_view(policy.views[0])[0] if arguments.html else ""
        config = LaneConfig(suite=suite, views=policy.views, watch=watch)
        file = ending.enter_context(episodes_file(arguments.out))
        lanes = ending.enter_context(Lanes(config, parallel, workers=workers))
        result = rollout(
            policy,
            lanes,
            chosen,
            execute_steps=arguments.execute_steps,
            film_episodes=arguments.gif_episodes if arguments.gif else 0,
            keep=FirstOfEach(failed=SHOWN_FAILED, solved=SHOWN_SOLVED) if arguments.html else None,
            on_episode=None if file is None else lambda episode: _write(file, episode),
        )
    facts = {
        "split": arguments.split or "eval",
        "parallel": parallel,
        "workers": workers,
        "latent_slots": policy.latent_slots,
    }
    if arguments.gif:
        save_gif(arguments.gif, [_captioned(episode) for episode in result.episodes])
    if arguments.html:
        _page(arguments, policy, facts, result, rows=parallel)
    lines = summaries(suite.name, result, facts)
    if arguments.json:
        for line in lines:
            print(json.dumps(line))
    else:
        shown = [name for name in lines[0] if name not in facts or name == "latent_slots"]
        print(format_table(shown, [[line[name] for name in shown] for line in lines]))
    print(f"one call of the policy serves {parallel} environments", file=sys.stderr)
    return 0


def opened_policy(arguments: argparse.Namespace, ending: ExitStack) -> tuple[Any, tuple[int, ...]]:
    """The policy of a checkpoint, or of a server, and (height, width) of the frames it reads.

    Args:
      arguments: of the command line.
      ending: closes what has to be closed.

    Returns:
      A `ChunkPolicy` that has `views` and `latent_slots`; the size is empty if it does not say.
    """
    # Imported here: a simulator whose environment has no JAX reaches a policy through a server.
    if arguments.server:
        from lara_jax.serving.access import read_token
        from lara_jax.serving.client import PolicyClient

        client = PolicyClient(
            arguments.server,
            token=read_token(arguments.token_file) if arguments.token_file else None,
            ca_file=arguments.ca_file,
            timeout_seconds=arguments.server_timeout,
        )
        return ending.enter_context(client), tuple(client.metadata["image_px"])
    from lara_jax.inference.policy import Policy

    policy = Policy.from_workdir(
        arguments.workdir,
        step=arguments.step,
        latent_slots=arguments.latent_slots,
        dataset=arguments.dataset,
    )
    return policy, policy.recipe.data.image_px


def tabletop(
    arguments: argparse.Namespace, views: Sequence[str], size: Sequence[int]
) -> "TabletopSuite":
    """The tabletop as the command line asks for it, seen as the policy was trained to see.

    Args:
      arguments: `families`, `split`, `image_size`, `seed`.
      views: that the policy reads; they say which cameras.
      size: (height, width) px of its frames, or empty.

    Raises:
      ValueError: a family, split or size is not to be had, or a view is no camera of the tabletop.
    """
    from lara_jax.evals.tabletop.scene import VIEWS
    from lara_jax.evals.tabletop.suite import TabletopSuite
    from lara_jax.evals.tabletop.tasks import FAMILIES

    wanted = {view: parse_view(view)[0] for view in views}
    for view, camera in wanted.items():
        if camera not in VIEWS:
            raise ValueError(
                f"the policy reads the view {view!r}, but the tabletop's cameras are: "
                f"{', '.join(VIEWS)}"
            )
    families = arguments.families or "place"
    return TabletopSuite(
        families=tuple(FAMILIES) if families == ALL else tuple(families.split(",")),
        split=arguments.split or "eval",
        cameras=tuple(camera for camera in VIEWS if camera in {"primary", *wanted.values()}),
        image_size_px=arguments.image_size or frame_side(size),
        seed=arguments.seed,
    )


def frame_side(size: Sequence[int]) -> int:
    """The side of the square frames that a policy was trained on, px.

    Args:
      size: (height, width) px, or empty.

    Raises:
      ValueError: they are not square, or nothing says their size.
    """
    if not size:
        raise ValueError(
            "the recipe leaves its frames at their cameras' size (config.data.frame_px and "
            "resize_px are empty): give --image-size"
        )
    height, width = size
    if height != width:
        raise ValueError(
            f"the policy's frames are {height} x {width} px, the tabletop's are square: "
            "give --image-size"
        )
    return height


def summaries(suite: str, result: Rollouts, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """What `--json` prints: an object for each task and, if there are several, one for all."""
    return [
        {
            "suite": suite,
            "task": task,
            "episodes": len(part.episodes),
            "successes": part.successes,
            "success_rate": part.success_rate,
            "ci_low": part.interval[0],
            "ci_high": part.interval[1],
            "latent_slots": facts["latent_slots"],
            "latency_ms_p50": part.latency_ms_p50,
            "steps_mean": part.steps_mean,
            "seconds": part.seconds,
            **facts,
        }
        for task, part in result.by_task_and_all().items()
    ]


@contextmanager
def episodes_file(folder: Path | None) -> Iterator[IO[str] | None]:
    """The file in a folder that takes the episodes as they end; None without a folder.

    Raises:
      ChildProcessError, ConnectionError: as they come, telling where the finished episodes are.
    """
    if folder is None:
        yield None
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / EPISODES_FILE
    with path.open("w", encoding="utf-8") as file:
        try:
            yield file
        except (ChildProcessError, ConnectionError) as error:
            raise type(error)(f"{error}; finished episodes are in {path}") from error


def _write(file: IO[str], episode: Episode) -> None:
    """One line, at once."""
    line = {
        "task": episode.trial.task,
        "episode": episode.trial.index,
        "seed": episode.trial.seed,
        "instruction": episode.instruction,
        "success": episode.success,
        "steps": episode.steps,
        "phase": episode.phase,
        "seconds": episode.seconds,
    }
    file.write(json.dumps(line) + "\n")
    file.flush()


def _page(
    arguments: argparse.Namespace,
    policy: Any,
    facts: dict[str, Any],
    result: Rollouts,
    *,
    rows: int,
) -> None:
    """Writes the page: with what the policy thought, where its network is at hand."""
    of = {n: episode for n, episode in enumerate(result.episodes) if episode.asked}
    if arguments.server:
        about = {"policy": arguments.server}
        thoughts = {n: tuple(Thought() for _ in episode.asked) for n, episode in of.items()}
    else:
        from lara_jax.checkpoint import load_teacher
        from lara_jax.checkpoint_files import find
        from lara_jax.evals.thoughts import ThoughtReader

        teacher = load_teacher(arguments.workdir, arguments.step)
        read = ThoughtReader(policy, teacher, rows=rows)
        thoughts = {n: read(episode) for n, episode in of.items()}
        whose = "the policy's own vision tower" if teacher is None else "the teacher"
        about = {
            "policy": f"{arguments.workdir}, step {find(arguments.workdir, arguments.step).name}",
            "imagined frames": f"compared with what {whose} sees",
        }
    call = f"{result.latency_ms_p50:.0f} ms for {rows} environments, median"
    about |= {"a call of the policy": call, "in all": f"{result.seconds:.0f} s"}
    write_page(
        arguments.html, f"{arguments.suite}, {facts['split']}", about | facts, result, thoughts
    )


def _captioned(episode: Episode) -> tuple[Sequence[Any], str]:
    verdict = "solved" if episode.success else "not solved"
    return episode.frames, f"{episode.instruction}\n{verdict}"


def _check(arguments: argparse.Namespace) -> None:
    """Refuses options that are out of range or do not go together."""
    if arguments.suite not in SUITES:
        raise ValueError(f"unknown suite {arguments.suite!r}, available: {', '.join(SUITES)}")
    for name in ("episodes", "parallel", "workers", "execute_steps", "gif_episodes", "samples"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"{_flag(name)} must be at least 1, got {value}")
    source = "--server" if arguments.server else "--workdir"
    for names, beside in (
        (ONLY_CLOSED if arguments.suite == OFFLINE else ONLY_OFFLINE, f"--suite {arguments.suite}"),
        (ONLY_OWN if arguments.server else ONLY_SERVER, source),
    ):
        for name in names:
            if getattr(arguments, name) is not None:
                raise ValueError(f"{_flag(name)} does not go with {beside}")
    if bool(arguments.workdir) == bool(arguments.server):
        raise ValueError("give either --workdir, a run's directory, or --server, a policy server")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lara eval",
        description="Success rates in a simulator, or action errors on held-out demonstrations "
        f"(--suite {OFFLINE}).",
        epilog="With --json: one object per task; where there are several, the last line is of all "
        f"of them and its task is '{ALL}'.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--workdir", type=Path, help="directory of a training run")
    add("--step", type=int, help="which checkpoint (default: the newest)")
    add("--suite", default="tabletop", help=f"one of: {', '.join(SUITES)}")
    add("--latent-slots", type=int, help="K (default: as trained)")
    add("--dataset", help="whose statistics to act with, after a mixture; offline: which to read")
    add(
        "--split",
        help="tabletop: val, eval, eval_colours, eval_positions, eval_phrasings "
        "(default: eval); offline: of the data (default: config.data.eval_split)",
    )
    add("--json", action="store_true", help="print the result as JSON, one object a line")
    loop = parser.add_argument_group("closed loop")
    add = loop.add_argument
    add("--families", help="tabletop: of tasks, such as place,stack, or all (default: place)")
    add("--episodes", type=int, default=20, help="of each task")
    add("--seed", type=int, default=0, help="chooses the episodes")
    add("--execute-steps", type=int, default=4, help="actions executed of each chunk")
    add("--parallel", type=int, default=10, help="environments in lock-step")
    add("--workers", type=int, default=1, help="processes that step them; same episodes for any")
    add("--image-size", type=int, help="side of the images in pixels (default: as trained)")
    add("--out", type=Path, help=f"folder for {EPISODES_FILE}, written as episodes end")
    add("--html", type=Path, help="where to write a page: success, and what the policy thought")
    add("--gif", type=Path, help="where to save an animation of the first episodes")
    add("--gif-episodes", type=int, default=4, help="how many it shows")
    server = parser.add_argument_group("closed loop with a policy server (`lara serve`)")
    add = server.add_argument
    add("--server", help="its address, ws://HOST:PORT or wss://..., in place of --workdir")
    add("--token-file", type=Path, help="file with the token that it wants")
    add("--ca-file", type=Path, help="certificate that its own is checked by")
    add("--server-timeout", type=float, default=60.0, help="seconds to try for, where it is lost")
    only = parser.add_argument_group("offline")
    only.add_argument("--samples", type=int, help="steps of each dataset, evenly spread")
    return parser
