"""Environments side by side, in this process or in several, with the same bits either way.

    rollout  --orders by lane--> worker 0: lanes 0, 2, 4   --reports by lane-->  rollout
                                 worker 1: lanes 1, 3, 5

A lane is one environment and the episode under way in it. It is told to begin an episode or to
execute a few actions, and reports what there is to see then. A lane knows nothing of the others, so
it does not matter which process it lives in. Workers are started afresh (spawn), as a fork of a
process with threads, like JAX's, may hang; they import the suite and no device code.
"""

import contextlib
import multiprocessing
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import gymnasium
import numpy as np

from data_pipelines.sampling import parse_view
from lara_jax.evals.suites import Suite, Trial

END_SECONDS = 10  # that a worker has to end by itself


@dataclass(frozen=True, kw_only=True)
class LaneConfig:
    """What every lane does alike.

    Attributes:
      suite: of the environments.
      views: those that the policy reads; "primary@-2" is the primary frame of two steps earlier.
      watch: camera whose frame of every step is reported; empty for none.
    """

    suite: Suite
    views: tuple[str, ...] = ()
    watch: str = ""


@dataclass(frozen=True, kw_only=True)
class Begin:
    """An order: begin an episode. With `film`, also report the environment's view for people."""

    trial: Trial
    film: bool = False


@dataclass(frozen=True, kw_only=True)
class Act:
    """An order: execute actions float[n, A], one after the other, until the episode is over."""

    actions: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a lane has come to.

    Attributes:
      observation: the environment's last, and for each view of earlier steps its frame, or None
        before the episode.
      steps: executed since the episode began.
      over, success: whether it has ended, and solved.
      phase: the furthest that it has come to, where the environment says so.
      film: views for people since the last report, uint8[R, R, 3] each, where asked for.
      seen: frames of the watched camera since the last report, uint8[H, W, 3] each.
    """

    observation: Mapping[str, Any]
    steps: int
    over: bool
    success: bool
    phase: str
    film: tuple[np.ndarray, ...]
    seen: tuple[np.ndarray, ...]


class Lane:
    """One environment and its episode under way."""

    def __init__(self, config: LaneConfig) -> None:
        self._config = config
        views = {view: parse_view(view) for view in config.views}
        self._earlier = {view: (key, back) for view, (key, back) in views.items() if back}
        self._longest = max((back for _, back in self._earlier.values()), default=0)
        self._env: gymnasium.Env[Any, np.ndarray] | None = None
        self._trial: Trial | None = None
        self._filming = self.over = self.success = False
        self._steps, self._phase = 0, ""
        self._history: list[Mapping[str, Any]] = []
        self._film: list[np.ndarray] = []
        self._seen: list[np.ndarray] = []

    def obey(self, order: Begin | Act) -> Report:
        """Carries an order out.

        Raises:
          ValueError: the environment refuses a seed, an option or an action; names the episode.
        """
        if isinstance(order, Begin):
            env = self._env_for(order.trial.task)
            self._trial, self._filming = order.trial, order.film
            self._steps, self._phase, self._history = 0, "", []
            self.over = self.success = False
            options = order.trial.options
            try:
                first, info = env.reset(
                    seed=order.trial.seed, options=None if options is None else dict(options)
                )
            except ValueError as error:
                raise ValueError(f"{order.trial}: {error}") from error
            self._observe(env, first, info)
        else:
            for action in order.actions:
                if not self.over:
                    self._step(action)
        return self._report()

    def close(self) -> None:
        """Ends the environment."""
        if self._env is not None:
            self._env.close()

    def _env_for(self, task: str) -> gymnasium.Env[Any, np.ndarray]:
        if self._env is None or self._trial is None or self._trial.task != task:
            self.close()
            self._env = self._config.suite.make_env(task)
        return self._env

    def _step(self, action: np.ndarray) -> None:
        if self._env is None or self._trial is None:
            raise ValueError("a lane begins an episode before it acts")
        try:
            observation, _, solved, truncated, info = self._env.step(action)
        except ValueError as error:
            raise ValueError(f"{self._trial}, step {self._steps}: {error}") from error
        self._steps += 1
        self.success = bool(solved)
        self.over = bool(solved or truncated or self._steps >= self._config.suite.step_limit)
        self._observe(self._env, observation, info)

    def _observe(
        self,
        env: gymnasium.Env[Any, np.ndarray],
        observation: Mapping[str, Any],
        info: Mapping[str, Any],
    ) -> None:
        self._history = [*self._history, observation][-1 - self._longest :]
        self._phase = str(info.get("phase", ""))
        if self._filming:
            self._film.append(np.asarray(env.render()))
        if self._config.watch:
            self._seen.append(np.asarray(observation[self._config.watch]))

    def _report(self) -> Report:
        earlier = {
            view: self._history[-1 - back][key] if back < len(self._history) else None
            for view, (key, back) in self._earlier.items()
        }
        film, seen = tuple(self._film), tuple(self._seen)
        self._film, self._seen = [], []
        return Report(
            observation={**self._history[-1], **earlier},
            steps=self._steps,
            over=self.over,
            success=self.success,
            phase=self._phase,
            film=film,
            seen=seen,
        )


class Lanes:
    """So many lanes, spread over worker processes; a context manager that ends them.

    Args:
      config: of every lane.
      count: lanes, at least 1.
      workers: processes; with 1 the lanes live in this one.

    Raises:
      ValueError: a number is below 1.
    """

    def __init__(self, config: LaneConfig, count: int, *, workers: int = 1) -> None:
        if count < 1 or workers < 1:
            raise ValueError(f"need at least 1 environment and 1 worker, got {count} and {workers}")
        self.count = count
        self._own: dict[int, Lane] = {}
        self._workers: list[_Worker] = []
        if workers == 1:
            self._own = {lane: Lane(config) for lane in range(count)}
        else:
            total = min(workers, count)
            self._workers = [
                _Worker(config, number, total, range(number, count, total))
                for number in range(total)
            ]

    def __enter__(self) -> "Lanes":
        return self

    def __exit__(self, *_: object) -> None:
        for lane in self._own.values():
            lane.close()
        for worker in self._workers:
            worker.end()

    def run(self, orders: Mapping[int, Begin | Act]) -> dict[int, Report]:
        """Has lanes carry out orders, all workers at the same time.

        Args:
          orders: by lane; lanes without one stay as they are.

        Returns:
          A report of each of these lanes, in the lanes' order.

        Raises:
          ValueError: an environment refuses what it is told; names the episode.
          ChildProcessError: a worker has died; names it and its episodes under way.
        """
        if self._own:
            return {lane: self._own[lane].obey(orders[lane]) for lane in sorted(orders)}
        busy = [worker for worker in self._workers if worker.send(orders)]
        reports: dict[int, Report] = {}
        for worker in busy:
            reports |= worker.receive()
        return dict(sorted(reports.items()))


class _Worker:
    """A process that steps some of the lanes, seen from the one that holds the policy."""

    def __init__(self, config: LaneConfig, number: int, total: int, lanes: Sequence[int]) -> None:
        self._name = f"worker {number} of {total}"
        self._lanes = tuple(lanes)
        self._under_way: dict[int, Trial] = {}
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, config, self._lanes), daemon=True, name=self._name
        )
        self.process.start()
        # Only the worker holds its end now, so that it ends with the worker.
        theirs.close()

    def send(self, orders: Mapping[int, Begin | Act]) -> bool:
        """Hands over the orders of the worker's own lanes; False where it has none."""
        mine = {lane: orders[lane] for lane in self._lanes if lane in orders}
        for lane, order in mine.items():
            if isinstance(order, Begin):
                self._under_way[lane] = order.trial
        if mine:
            try:
                self._connection.send(mine)
            except (BrokenPipeError, ConnectionResetError) as error:
                raise self._died() from error
        return bool(mine)

    def receive(self) -> dict[int, Report]:
        """The reports on what was sent."""
        try:
            reply = self._connection.recv()
        except (EOFError, ConnectionResetError) as error:
            raise self._died() from error
        if isinstance(reply, ValueError):
            raise reply
        for lane, report in reply.items():
            if report.over:
                self._under_way.pop(lane)
        return reply

    def end(self) -> None:
        """Ends the process, which may be dead already."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._connection.send(None)
        self._connection.close()
        self.process.join(END_SECONDS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def _died(self) -> ChildProcessError:
        self.process.join(END_SECONDS)
        code = self.process.exitcode
        how = f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        lost = ", ".join(map(str, self._under_way.values())) or "no episode"
        return ChildProcessError(f"{self._name} died ({how}) with {lost} under way")


def _serve(connection: Connection, config: LaneConfig, numbers: tuple[int, ...]) -> None:
    """What a worker does: carries orders out until it is sent None, or the other side is gone."""
    # An interrupt from the keyboard reaches every process; the one with the policy sees to it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lanes = {number: Lane(config) for number in numbers}
    try:
        while (orders := connection.recv()) is not None:
            reply: dict[int, Report] | ValueError
            try:
                reply = {number: lanes[number].obey(order) for number, order in orders.items()}
            except ValueError as error:
                reply = ValueError(str(error))
            connection.send(reply)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        # The process with the policy is gone: nobody is left to tell.
        return
    finally:
        for lane in lanes.values():
            lane.close()
