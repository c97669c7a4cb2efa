"""The host's side of one run: its environment, what is drawn to act in it, its episodes and its records.

No training state is kept here: policies come in, with NumPy leaves, and blocks of real steps go out.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import jax
import numpy as np

from mve import config, folders, schedule
from mve.config import Config
from mve.dynamics import DynamicsConfig
from mve.envs import device_env, host, oracle
from mve.envs.base import EnvSpec, Episode, Snapshot
from mve.envs.host import HostEnv
from mve.envs.known import never
from mve.evaluate import LONGEST_EPISODE, Evaluation, evaluate
from mve.policies import Policy
from mve.state import Capacity, Progress, Recipe
from mve.types import Json, Known, RewardFn, StepFn, TerminationFn, Transition, UserError

EXPLORATION_STREAM = 3  # first word of the seeds of exploration noise, one generator per block
RECENT_EPISODES = 10


class Run:
    """One environment, its configuration and its folder."""

    def __init__(
        self,
        built: Config,
        instance: gym.Env,
        *,
        reward_fn: RewardFn | None = None,
        termination_fn: TerminationFn | None = None,
        eval_env: gym.Env | None = None,
    ):
        self.env = HostEnv(
            instance,
            seed=built.seed,
            truncation_is_terminal=built.env.truncation_is_terminal,
            reward_fn=reward_fn,
            termination_fn=termination_fn,
        )
        self.spec: EnvSpec = self.env.spec
        self.instance, self._eval_env = instance, eval_env
        config.check_actions(built, self.spec)
        self.config = schedule.with_budgets(built, self.spec.max_episode_steps)
        self.device = device_env.of(  # takes its steps in place of `env`, if there is one
            instance,
            self.spec,
            built.seed,
            built.train.block_steps,
            truncation_is_terminal=built.env.truncation_is_terminal,
            keeps_density=built.targets.reads_segments,
        )
        self.recipe = self._make_recipe()
        self.user_functions = [
            name for name, fn in (("reward", reward_fn), ("termination", termination_fn)) if fn is not None
        ]
        self.folder = Path()
        self.seconds = 0.0  # of training, up to where the run stands
        self.recent: deque[Episode] = deque(maxlen=RECENT_EPISODES)
        self.metrics: dict[str, float] = {}  # what learning said last
        self._eval_envs: list[gym.Env] = []

    def _make_recipe(self) -> Recipe:
        settings = self.config
        recipe = Recipe(
            obs_size=self.spec.obs_size,
            action_size=self.spec.action_size,
            known=_known(settings.dynamics, self.spec, settings.env.id),
            agent=settings.agent,
            dynamics=settings.dynamics,
            imagination=settings.imagination,
            targets=settings.targets,
        )
        if settings.dynamics.kind != "oracle" or not recipe.uses_model:
            return recipe
        if settings.agent.model_steps > 0:
            raise UserError("dynamics.kind=oracle has no gradient, which agent.model_steps > 0 asks for")
        return replace(recipe, simulator=self.simulator())

    def describe(self) -> str:
        """One line: task, sizes, budget, and what the model has to learn."""
        cfg, known = self.config, self.recipe.known
        kind = "discrete " if self.spec.discrete else ""
        sizes = f"{self.spec.obs_size} observations, {self.spec.action_size} {kind}actions"
        text = f"{self.spec.name} with {cfg.algo}: {sizes}, {cfg.train.total_steps} steps"
        if not self.recipe.uses_model:
            return f"{text}; no model"
        uses = {
            f"H = {cfg.targets.imagined_steps}": cfg.targets.imagined_steps,
            f"actor through {cfg.agent.model_steps} model steps": cfg.agent.model_steps,
            f"{cfg.imagination.starts} rollouts every {cfg.imagination.interval_steps} steps": (
                cfg.imagination.starts
            ),
        }
        used = ", ".join(what for what, count in uses.items() if count)
        if self.recipe.simulator is not None:
            return f"{text}; {used}, in the true simulator"
        told = {True: "learned", False: "known"}
        reward, termination = told[known.reward is None], told[known.termination is None]
        termination = "never" if cfg.dynamics.termination == "never" else termination
        return f"{text}; {used}, reward {reward}, termination {termination}"

    def capacity(self) -> Capacity:
        """No more than the budget of steps can fill."""
        total, imagination = self.config.train.total_steps, self.config.imagination
        most = schedule.rounds_due(self.config, total) * imagination.starts * max(imagination.length)
        return Capacity(min(self.config.replay.capacity, total), min(imagination.capacity, most))

    # Acting

    @property
    def action_space(self) -> host.ActionSpace:
        space = self.instance.action_space
        assert isinstance(space, gym.spaces.Box | gym.spaces.Discrete)
        return space

    def explores(self, step: int) -> bool:
        """Whether it is a policy that collects the block that starts at `step`."""
        settings = self.config.train
        return step >= settings.learning_starts or settings.warmup == "policy"

    def collect(self, policy: Policy | None, step: int, count: int) -> Transition:
        """The block of real steps that starts at `step`, padded to a whole one; no policy: random actions.

        What is drawn depends on the seed and the step only.
        """
        size, rng = self.config.train.block_steps, self._exploration_draws(step)
        if policy is None:
            actions = iter(host.random_actions(self.action_space, rng, size))
            block, ended = self.env.collect(lambda obs: next(actions), count)
        else:
            noise = iter(rng.standard_normal((size, self.spec.action_size), np.float32))
            block, ended = self.env.collect(lambda obs: policy(obs, next(noise)), count)
        if self.config.targets.reads_segments:
            block = block._replace(log_density=self._log_density(policy, block))  # pyright: ignore[reportArgumentType]
        self.recent.extend(ended)
        return jax.tree.map(
            lambda x: np.concatenate([x, np.zeros_like(x[:1]).repeat(size - count, 0)]), block
        )

    def _exploration_draws(self, step: int) -> np.random.Generator:
        return np.random.default_rng([EXPLORATION_STREAM, self.config.seed, step])

    def _log_density(self, policy: Policy | None, block: Transition) -> np.ndarray:
        if policy is None:
            return np.full(len(block.obs), host.random_log_density(self.action_space), np.float32)
        return policy.log_density(np.asarray(block.obs), np.asarray(block.action))

    # Judging

    def evaluate(self, policy: Policy, step: int, episodes: int | None = None) -> Evaluation:
        """Return and length of episodes under the deterministic policy, in environments of their own."""
        if self.device is not None:
            count = episodes or self.config.evaluate.episodes
            return Evaluation(*self.device.evaluate(policy, step, count, LONGEST_EPISODE))
        while len(self._eval_envs) < (wanted := episodes or self.config.evaluate.episodes):
            self._eval_envs.append(self.another_env())
        return evaluate(self._eval_envs[:wanted], policy, seed=self.config.seed, step=step)

    def another_env(self) -> gym.Env:
        """An environment of the same task, for evaluation."""
        if self.config.env.id and self._eval_env is None:
            return host.make(self.config.env)
        return self._copy(self._eval_env or self.instance, "for evaluation")

    def simulator(self) -> StepFn:
        """The environment's own dynamics, from a copy that is set to whatever state is imagined."""
        env_config = self.config.env
        return oracle.simulator(
            host.make(env_config) if env_config.id else self._copy(self.instance, "to be set to states")
        )

    def _copy(self, env: gym.Env, purpose: str) -> gym.Env:
        try:
            return copy.deepcopy(env)
        except Exception as error:
            raise UserError(f"{self.spec.name} cannot be copied {purpose}: {error}") from error

    # Records

    def note(self, numbers: Mapping[str, float], step: int, fits: int) -> None:
        """What learning up to `step` said. A block that fits nothing says nothing of fits: the last fit's
        word stands."""
        if not np.isfinite(numbers["train/critic_loss"]):
            raise UserError(f"training diverged: the critic's loss is not finite at step {step}")
        said = {k: x for k, x in numbers.items() if fits or np.isfinite(x) or not k.startswith("model/")}
        said["train/n_updates"] = float(schedule.updates_due(self.config, step))
        said["mve/horizon"] = float(self.config.targets.imagined_steps)
        self.metrics |= said

    def line(self, step: int) -> dict[str, float]:
        """What a record of metrics.jsonl says, but for evaluations."""
        line = {"time/time_elapsed": self.seconds, "time/fps": step / max(self.seconds, 1e-9)}
        if self.recent:
            line["rollout/ep_rew_mean"] = float(np.mean([e.ret for e in self.recent]))
            line["rollout/ep_len_mean"] = float(np.mean([e.length for e in self.recent]))
        return line | self.metrics

    def write_facts(self, folder: Path) -> None:
        """What this run is, into a folder."""
        folders.describe(folder, self.config, self.spec.name, self.user_functions)

    def save(self, folder: Path, progress: Progress) -> None:
        """A checkpoint of this run, whose progress is given, into a folder."""
        env = self.device or self.env
        facts = {
            "next_episode": env.next_episode,
            "seconds": self.seconds,
            "recent": [list(episode) for episode in self.recent],
            "metrics": {name: x for name, x in self.metrics.items() if np.isfinite(x)},
        }
        folders.save(folder, progress, env.snapshot(), facts)

    def stands_at(self, env: Snapshot | None, facts: Json) -> None:
        """Go on from a checkpoint: within its episode, or in the next where `env` could not be had."""
        acted_in = self.device or self.env
        if env is None:
            acted_in.num_steps, acted_in.num_episodes = facts["num_env_steps"], facts["next_episode"]
        else:
            acted_in.restore(env)
        self.seconds, self.metrics = facts["seconds"], facts["metrics"]
        self.recent.extend(Episode(*episode) for episode in facts["recent"])

    def keep_what_can_be_kept(self) -> str | None:
        """Before a checkpoint: where the environment's state cannot be in it, give the episode up here as a
        resumed run will have to, and say why."""
        if self.device is None and (why := self.env.snapshot_obstacle):
            self.env.abandon()
            return why
        return None


def _known(settings: DynamicsConfig, spec: EnvSpec, name: str) -> Known:
    """The true functions that the model may use; None for what it learns."""
    for what, wanted, fn in (
        ("reward", settings.reward, spec.known.reward),
        ("termination", settings.termination, spec.known.termination),
    ):
        if wanted == "known" and fn is None:
            raise UserError(f"{name}: no {what} function is known; give one, or set dynamics.{what}=learned")
    reward = None if settings.reward == "learned" else spec.known.reward
    termination = None if settings.termination == "learned" else spec.known.termination
    return Known(reward, never if settings.termination == "never" else termination)
