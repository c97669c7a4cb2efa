"""The Python interface: a policy for a task, from nothing or from a run folder.

The names are Stable-Baselines3's (`learn`, `predict`, `save`, `load`), so that scripts carry over.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import jax
import numpy as np

from mve import checkpoint, config, folders, lock, log, plot, room, schedule, train
from mve.checkpoint import Which
from mve.checkpoint.segments import Shelf
from mve.config import Config
from mve.display import Display
from mve.envs import host, native
from mve.envs.base import EnvSpec
from mve.envs.native import NativeTask
from mve.evaluate import Evaluation
from mve.interrupt import Interrupt
from mve.loop import Loop
from mve.policies import Policy
from mve.presets import DEFAULT_ALGO, DEFAULT_DISCRETE_ALGO
from mve.program import Alone, on_host
from mve.run import Run
from mve.state import Progress, Recipe, TrainState, grown, initial_state
from mve.types import DivergedError, RewardFn, SpoiltError, TerminationFn, UserError, Whole


class Learner:
    """Trains a policy for a Gymnasium task by model-based value expansion, or by its base learner.

        learner = Learner("Pendulum-v1").learn()
        action, _ = learner.predict(obs)

    `env` is an id, an environment or a `NativeTask`; `algo` one of `mve list`; `settings` are
    `section.field=value`.
    `reward_fn` and `termination_fn` are JAX functions (obs, action, next_obs), any leading axes, in the
    environment's own units (a discrete action is an integer, an array without a last axis); without them
    the task's own are used where they are known, and learned otherwise. An instance is copied for evaluation
    unless `eval_env` is given. Nothing is written before `learn` or `save`.
    """

    def __init__(
        self,
        env: str | gym.Env | NativeTask,
        algo: str | None = None,
        *,
        seed: Whole = 0,
        run_dir: Path | str | None = None,
        settings: Sequence[str] = (),
        reward_fn: RewardFn | None = None,
        termination_fn: TerminationFn | None = None,
        eval_env: gym.Env | None = None,
        quiet: bool = False,
    ):
        with log.capture_mujoco_warnings(None):
            if isinstance(env, str):
                name, instance = env, host.make(config.task(env, algo, settings))
            else:
                instance = native.as_gymnasium(env)
                name = host.name_of(instance)
            seed = config.whole("seed", seed)
            built = config.build(name, algo or _default_algo(instance), settings, seed)
            if not isinstance(env, str):
                built = replace(built, env=replace(built.env, id=""))
            functions: dict[str, Any] = {"reward_fn": reward_fn, "termination_fn": termination_fn}
            self.run = Run(built, instance, eval_env=eval_env, **functions)
        default = folders.default(self.spec.name, built.algo) / f"seed-{seed}"
        self.folder = Path(run_dir) if run_dir is not None else folders.free(default)
        self.room = room.check(self.run, self.folder)
        self.progress = Progress(initial_state(self.recipe, self.run.capacity(), seed))
        self.quiet = quiet
        self._fresh, self._broken_off = True, False
        self._newest: str | None = None  # checkpoint in the folder when it was last read or written
        self._policy: tuple[TrainState, Policy] | None = None

    @property
    def config(self) -> Config:
        """Every setting."""
        return self.run.config

    @property
    def spec(self) -> EnvSpec:
        """The task's name and sizes."""
        return self.run.spec

    @property
    def recipe(self) -> Recipe:
        """What is compiled into the run."""
        return self.run.recipe

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.run.folder

    @folder.setter
    def folder(self, where: Path) -> None:
        self.run.folder = where

    @property
    def state(self) -> TrainState:
        """Everything that training changes. UserError where a `learn` that failed has lost it."""
        if self._broken_off:
            raise UserError(self._gone)
        return self.progress.state

    @state.setter
    def state(self, state: TrainState) -> None:
        self.progress = self.progress._replace(state=state)

    @property
    def _gone(self) -> str:
        """Where to go on when the state is lost."""
        saved = "" if folders.newest(self.folder) else ", which=0"
        return f"the last learn() failed; go on with Learner.load({str(self.folder)!r}{saved})"

    @property
    def num_timesteps(self) -> int:
        """Real environment steps so far."""
        return int(self.state.num_env_steps)

    def describe(self) -> str:
        """One line: task, sizes, budget, and what the model has to learn."""
        return self.run.describe()

    def policy(self) -> Policy:
        """The deterministic policy, with NumPy leaves."""
        if self._policy is None or self._policy[0] is not self.state:
            self._policy = self.state, on_host(self.state.agent.policy())
        return self._policy[1]

    def predict(
        self,
        observation: np.ndarray,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, None]:
        """Action in the environment's own units for one observation (S,) or a batch (n, S), and None.

        A discrete action is an integer: an array () or (n,). The second value stands where recurrent
        policies of other libraries return their state.
        """
        del state, episode_start
        obs = np.asarray(observation, np.float32)
        if obs.shape[-1:] != (self.spec.obs_size,):
            raise UserError(
                f"predict: observation of shape {obs.shape}; expected (..., {self.spec.obs_size})"
            )
        noise = np.zeros((*obs.shape[:-1], self.spec.action_size), np.float32)
        if deterministic:
            policy = self.policy()
        else:
            noise = np.random.default_rng().standard_normal(noise.shape, np.float32)
            policy = on_host(train.exploration_policy(self.state, self.state.num_env_steps))
        return np.asarray(host.native_action(self.run.action_space, policy(obs, noise))), None

    def evaluate(self, episodes: int | None = None) -> Evaluation:
        """Return and length of episodes under the deterministic policy, in environments of their own."""
        with log.capture_mujoco_warnings(None):
            return self.run.evaluate(self.policy(), self.num_timesteps, episodes)

    def learn(self, total_timesteps: Whole | None = None) -> Learner:
        """Train for so many more environment steps, or to the end of the configured budget.

        What follows from the budget (when learning starts, how often a run is judged and saved) does so from
        the first such number, unless `train.total_steps` is set.

        Ends with an evaluation, a checkpoint and the learning curve. On Ctrl-C what is in hand is finished
        and saved before KeyboardInterrupt is raised; on SIGTERM or SIGHUP likewise before SystemExit, with
        128 plus the signal's number. A second signal raises at once, and nothing more is saved. Raises
        FaultError, everything saved, for an environment that fails, and DivergedError, nothing saved, for
        losses that are not finite; so does SpoiltError, a FaultError, for such numbers from one in JAX.
        """
        self.set_budget(total_timesteps)
        with lock.held(self.folder):
            self.prepare()
            if not self.quiet:
                print(self.describe(), self.room, sep="\n", file=sys.stderr)
            go_on([self], self.folder)
        return self

    def close(self) -> None:
        """Give up the environments, and the processes that they may be in; your own instance stays open."""
        self.run.close()

    def set_budget(self, total_timesteps: Whole | None) -> None:
        """So many more environment steps, or the configured budget; nothing is written."""
        if self._broken_off:
            raise UserError(self._gone)
        if total_timesteps is not None:
            more, done = config.whole("total_timesteps", total_timesteps), self.num_timesteps
            begun = done > 0 or not self._fresh
            if more < (0 if begun else 1):  # 0: no step more than what learning was broken off in
                raise UserError(f"total_timesteps {more} is no budget; it has to be 1 at least")
            self.run.set_budget(done + more, begun=begun)
        if total_timesteps is not None or not self._fresh:
            held = sum(leaf.nbytes for leaf in jax.tree.leaves(self.state))
            self.room = room.check(self.run, self.folder, held=held)
        schedule.check(self.config, self.recipe.fits_model)

    def prepare(self) -> None:
        """Open the run folder, which is locked, and make room for what is to come."""
        if self.run.device is None:
            self.run.evaluation_envs.check()
        if self._fresh:
            folders.refuse_taken(self.folder)
        elif folders.newest(self.folder) != self._newest:
            raise UserError(f"{self.folder} has gone on since it was loaded; load it again")
        self.run.write_facts(self.folder)
        self._fresh = False
        self.state = grown(self.state, self.run.capacity())
        # Before the records, lest a kill between them leave checkpoints of a future that no record tells of.
        checkpoint.forget_after(folders.checkpoints(self.folder), self.num_timesteps)
        self._newest = folders.newest(self.folder)
        log.RunLog.truncate(self.folder, self.num_timesteps)

    def save(self, folder: Path | str) -> None:
        """Configuration and training state, replay included, into a folder that `load` reads.

        UserError where it holds another run, or one that is further on than this.
        """
        with lock.held(Path(folder)):
            folders.refuse_other(Path(folder), self.run.identity, self.num_timesteps)
            self.run.write_facts(Path(folder))
            program = Alone(self.recipe)
            rest = self.progress._replace(state=program.rest(self.state, 0))
            frozen = self.run.freeze(rest, program.ring(self.state, 0), Shelf())
            checkpoint.write({folders.checkpoints(Path(folder)): frozen})
        if Path(folder).resolve() == self.folder.resolve():
            self._newest = folders.newest(self.folder)

    @classmethod
    def load(
        cls,
        folder: Path | str,
        env: gym.Env | NativeTask | None = None,
        *,
        reward_fn: RewardFn | None = None,
        termination_fn: TerminationFn | None = None,
        eval_env: gym.Env | None = None,
        quiet: bool = False,
        which: Which = "newest",
    ) -> Learner:
        """The learner of a run folder, at its newest checkpoint. Nothing in the folder is executed.

        `which`: "best" for the checkpoint whose evaluation was best, or the newest of at most that step; 0:
        none, the run before its first step.

        An environment instance, and functions the user had given, have to be given again. The run goes on
        within its episode, or in the next one where the environment's state cannot be saved.
        """
        folder = Path(folder)
        built, user_functions = folders.read(folder)
        missing = {"reward": reward_fn, "termination": termination_fn}
        for name in user_functions:
            if missing[name] is None:
                raise UserError(
                    f"{folder} was trained with your own {name} function; give it again (--{name} FILE:FUNC)"
                )
        if env is None and not built.env.id:
            raise UserError(
                f"{folder} was trained on an environment instance; give it again: load(folder, env)"
            )
        learner = cls.__new__(cls)
        with log.capture_mujoco_warnings(None):
            functions: dict[str, Any] = {"reward_fn": reward_fn, "termination_fn": termination_fn}
            instance = host.make(built.env) if env is None else native.as_gymnasium(env)
            learner.run = Run(built, instance, eval_env=eval_env, given=env is not None, **functions)
        learner.folder, learner.quiet = folder, quiet
        learner.room = ""  # is asked for where it is to be trained: a full disk can still be read
        learner._fresh, learner._broken_off, learner._policy = False, False, None
        learner._newest = folders.newest(folder)
        if which == 0:
            learner.progress = Progress(initial_state(learner.recipe, learner.run.capacity(), built.seed))
            return learner
        learner.progress, env_state, facts = folders.restore(
            folder, learner.recipe, learner.run.identity, which
        )
        learner.run.stands_at(env_state, facts)
        return learner


def go_on(learners: Sequence[Learner], folder: Path) -> None:
    """Train learners that differ in the seed only, and are prepared, to the end of their budget.

    MuJoCo's warnings and the picture of all curves go to `folder`. Raises what a signal means, once
    everything is saved, and the errors that `Learner.learn` names.
    """
    train, interrupt = learners[0].config.train, Interrupt()
    total = train.total_steps
    display = Display(total, learning_starts=int(train.learning_starts), quiet=learners[0].quiet)
    loop = Loop([each.run for each in learners], [each.progress for each in learners])
    for learner in learners:
        learner._broken_off = True
    try:
        with ExitStack() as held:
            held.enter_context(log.capture_mujoco_warnings(folder))
            records = [held.enter_context(log.RunLog(each.folder)) for each in learners]
            held.enter_context(display)
            held.enter_context(interrupt.watched())
            held.enter_context(jax.default_matmul_precision(learners[0].config.train.matmul_precision))
            held.enter_context(loop.writer)
            _train(loop, total, records, display, interrupt)
    except (DivergedError, SpoiltError):
        raise
    except UserError:  # the loop has ended in good order all the same
        _take_stock(learners, loop)
        raise
    _take_stock(learners, loop)
    for learner in learners:
        plot.curve([learner.folder], learner.folder / "curve.png")
    if len(learners) > 1:
        plot.curve([each.folder for each in learners], folder / "curve.png")
    if interrupt.asked:
        interrupt.leave()


def _take_stock(learners: Sequence[Learner], loop: Loop) -> None:
    """The loop has ended between two blocks, and everything is saved."""
    for learner, progress in zip(learners, loop.progress(), strict=True):
        learner.progress, learner._broken_off = progress, False
        learner._newest = folders.newest(learner.folder)


def _train(
    loop: Loop, total: int, records: Sequence[log.RunLog], display: Display, interrupt: Interrupt
) -> None:
    try:
        loop.go_on(total, records, display, interrupt)
    except UserError as error:
        for record in records:
            record.event(str(error))
        raise


def _default_algo(env: gym.Env) -> str:
    return DEFAULT_DISCRETE_ALGO if isinstance(env.action_space, gym.spaces.Discrete) else DEFAULT_ALGO
