"""The host's side of one run: its environment, what is drawn to act in it, its episodes and its records.

No training state is kept here: policies come in, with NumPy leaves, and blocks of real steps go out.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import chain, count
from pathlib import Path

import gymnasium as gym
import jax
import numpy as np

from mve import config, divergence, folders, schedule
from mve.checkpoint.frozen import Frozen
from mve.checkpoint.segments import Ring, Shelf
from mve.config import Config
from mve.divergence import Watch
from mve.dynamics import DynamicsConfig
from mve.envs import device_env, host, oracle, worker
from mve.envs.base import EnvConfig, EnvSpec, Episode, HostPolicy, Snapshot
from mve.envs.given import What, fault
from mve.envs.host import BrokenOffError, HostEnv
from mve.envs.known import name_of, never
from mve.envs.stepped import Restarts
from mve.evaluate import LONGEST_EPISODE, Evaluation, evaluate
from mve.evaluation_envs import EvaluationEnvs, copied
from mve.imagine import ImaginationConfig
from mve.policies import Policy, held
from mve.state import Capacity, Progress, Recipe
from mve.types import (
    DivergedError,
    Json,
    Known,
    RewardFn,
    StepFn,
    TerminationFn,
    Transition,
    UserError,
)

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
        given: bool = False,
    ):
        self._made = EnvConfig() if given else built.env  # how another is made, if it has an id
        if built.env.is_apart and not self._made.id:
            raise UserError("env.own_process and env.timeout need an environment given by its id")
        self.instance = instance
        self.restarts = Restarts(built.env, f"{name_of(instance)}, seed {built.seed}")
        self.env = HostEnv(
            instance,
            seed=built.seed,
            truncation_is_terminal=built.env.truncation_is_terminal,
            reward_fn=reward_fn,
            termination_fn=termination_fn,
            stepped=partial(worker.stepped, self._made, instance),
            restarts=self.restarts,
        )
        self.spec: EnvSpec = self.env.spec
        self.evaluation_envs = EvaluationEnvs(
            self._made, lambda: self.env.here or instance, eval_env, self.spec.obs_size
        )
        functions = _sound({"reward": reward_fn, "termination": termination_fn}, self.spec, instance)
        config.check_actions(built, self.spec)
        self._asked = built
        self.config = self._with_budgets(built)
        self.device = device_env.of(  # takes its steps in place of `env`, if there is one
            instance,
            self.spec,
            built.seed,
            built.train.block_steps,
            hold_steps=built.train.hold_steps,
            truncation_is_terminal=built.env.truncation_is_terminal,
            keeps_density=built.targets.reads_segments,
        )
        if self.device is not None and eval_env is not None:
            raise UserError(
                f"{self.spec.name} is evaluated on the device, as it is trained; leave eval_env out"
            )
        self.recipe = self._make_recipe()
        self.user_functions: list[str] = list(functions)
        self.folder = Path()
        self.seconds = 0.0  # of training, up to where the run stands
        self.recent: deque[Episode] = deque(maxlen=RECENT_EPISODES)
        self.metrics: dict[str, float] = {}  # what learning said last
        self.watch = Watch()
        self.judged: Json | None = None  # by the last evaluation, and at which step

    def set_budget(self, total_steps: int, *, begun: bool) -> None:
        """Train to so many steps. What follows from the budget does as well, before anything has begun and
        where no other budget was asked for."""
        asked = self._asked
        if begun or asked.train.total_steps:
            self.config = replace(self.config, train=replace(self.config.train, total_steps=total_steps))
            return
        asked = replace(asked, train=replace(asked.train, total_steps=total_steps))
        self.config = self._with_budgets(asked)
        self.recipe = self._make_recipe()

    def _with_budgets(self, asked: Config) -> Config:
        learns_ends = _known(asked.dynamics, self.spec, asked.env.id).termination is None
        return schedule.with_budgets(asked, self.spec.max_episode_steps, learns_ends=learns_ends)

    def _make_recipe(self) -> Recipe:
        settings, block_steps = self.config, self.config.train.block_steps
        recipe = Recipe(
            obs_size=self.spec.obs_size,
            action_size=self.spec.action_size,
            known=_known(settings.dynamics, self.spec, settings.env.id),
            agent=settings.agent,
            dynamics=settings.dynamics,
            imagination=settings.imagination,
            targets=settings.targets,
            recency=settings.replay.recency,
            warmup_steps=-(-int(settings.train.learning_starts) // block_steps) * block_steps,
        )
        if settings.dynamics.kind != "oracle" or not recipe.uses_model:
            return recipe
        if settings.agent.model_steps > 0:
            raise UserError(
                "dynamics.kind=oracle has no gradient, which agent.model_steps > 0 asks for; set it to 0, "
                "or use --algo mve-sac"
            )
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
            f"H = {self.recipe.expanded_steps}": self.recipe.expanded_steps,
            f"actor through {cfg.agent.model_steps} model steps": cfg.agent.model_steps,
            f"{cfg.imagination.starts} rollouts every {_interval(cfg.imagination)}": cfg.imagination.starts,
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
        rounds = schedule.rounds_due(self.config, total) or imagination.rounds_kept
        most = rounds * imagination.starts * max(imagination.length)
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

    def collect(self, policy: Policy | None, step: int, num_steps: int) -> Transition:
        """The block of real steps that starts at `step`, padded to a whole one; no policy: random actions.

        What is drawn depends on the seed and the step only. A fault that ends the run raises BrokenOffError,
        whose block is padded too.
        """
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(policy)):
            # Before it acts, or the environment would be blamed for its actions.
            raise self.diverged("the policy is not finite", self.env.num_steps)
        draws = self._exploration_draws(step)
        act = self._random(draws) if policy is None else self._exploring(policy, draws)
        try:
            block, ended = self.env.collect(act, num_steps)
        except BrokenOffError as broken:
            broken.block = self._taken(policy, broken.block, broken.ended)
            raise
        return self._taken(policy, block, ended)

    def _taken(self, policy: Policy | None, block: Transition, ended: list[Episode]) -> Transition:
        """The block as it is learned from, once it is taken note of."""
        if self.config.targets.reads_segments:
            block = block._replace(log_density=self._log_density(policy, block))  # pyright: ignore[reportArgumentType]
        self.recent.extend(ended)
        self.watch.see(np.asarray(block.reward), np.asarray(block.next_obs))
        missing = self.config.train.block_steps - len(block.obs)
        return jax.tree.map(lambda x: np.concatenate([x, np.zeros((missing, *x.shape[1:]), x.dtype)]), block)

    # Draws come a block at a time. One is enough, but for steps that an environment failed at.

    def _random(self, rng: np.random.Generator) -> HostPolicy:
        size = self.config.train.block_steps
        blocks = (self._held(host.random_actions(self.action_space, rng, size), rng) for _ in count())
        actions = chain.from_iterable(blocks)
        return lambda obs: next(actions)

    def _exploring(self, policy: Policy, rng: np.random.Generator) -> HostPolicy:
        shape = (self.config.train.block_steps, self.spec.action_size)
        blocks = (self._held(rng.standard_normal(shape, np.float32), rng) for _ in count())
        noise = chain.from_iterable(blocks)
        return lambda obs: policy(obs, next(noise))

    def _held(self, draws: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        longest = self.config.train.hold_steps
        return held(draws, rng.random(len(draws)), longest) if longest > 1 else draws

    def _exploration_draws(self, step: int) -> np.random.Generator:
        return np.random.default_rng([EXPLORATION_STREAM, self.config.seed, step])

    def _log_density(self, policy: Policy | None, block: Transition) -> np.ndarray:
        if policy is None:
            return np.full(len(block.obs), host.random_log_density(self.action_space), np.float32)
        return policy.log_density(np.asarray(block.obs), np.asarray(block.action))

    # Judging

    def evaluate(self, policy: Policy, step: int, episodes: int | None = None) -> Evaluation:
        """Return and length of episodes under the deterministic policy, in environments of their own."""
        wanted = episodes or self.config.evaluate.episodes
        if self.device is not None:
            return Evaluation(*self.device.evaluate(policy, step, wanted, LONGEST_EPISODE))
        return evaluate(
            # In lots as large as those of training: the same numbers, and no thousand environments.
            self.evaluation_envs.side_by_side(min(wanted, self.config.evaluate.episodes)),
            policy,
            self.action_space,
            longest=self.spec.max_episode_steps or LONGEST_EPISODE,
            **{"episodes": wanted, "seed": self.config.seed, "step": step, "restarts": self.restarts},
        )

    def close(self) -> None:
        """Give up the environments, and the processes that they may be in; an instance of the user's own
        stays open."""
        self.evaluation_envs.close()
        if self._made.id:
            self.env.close()

    def simulator(self) -> StepFn:
        """The environment's own dynamics, from a copy that is set to whatever state is imagined."""
        return oracle.simulator(
            host.make(self._made) if self._made.id else copied(self.instance, "to be set to states")
        )

    # Records

    def note(self, numbers: Mapping[str, float], step: int, *, fits: int, updates: int) -> None:
        """What learning up to `step` said, `updates` of the agent in all. Where nothing is fitted or judged,
        or no rollouts are taken, nothing is said of them: the last word on them stands."""
        if what := divergence.not_finite(numbers, fits):
            raise self.diverged(f"{what} is not finite", step)
        absent = ("imagination/", "model/mse_k" if fits else "model/")
        said = {k: x for k, x in numbers.items() if np.isfinite(x) or not k.startswith(absent)}
        said["train/n_updates"] = float(updates)
        said["mve/horizon"] = float(self.recipe.expanded_steps)
        self.metrics |= said
        if exploding := self.watch.exploding(numbers, self.config, self.spec.action_size):
            warnings.warn(f"{exploding} (step {step})", RuntimeWarning, stacklevel=2)

    def diverged(self, what: str, step: int) -> DivergedError:
        """To be raised: what is wrong, and below it what led there."""
        first = f"training diverged: seed {self.config.seed}, {what} at step {step}"
        return DivergedError("\n".join([first, *self.watch.diagnosis(what, self.metrics)]))

    def line(self, step: int) -> dict[str, float]:
        """What a record of metrics.jsonl says, but for evaluations."""
        line = {"time/time_elapsed": self.seconds, "time/fps": step / max(self.seconds, 1e-9)}
        if self.recent:
            line["rollout/ep_rew_mean"] = float(np.mean([e.ret for e in self.recent]))
            line["rollout/ep_len_mean"] = float(np.mean([e.length for e in self.recent]))
        if self.restarts.allowed:
            line["env/restarts"] = float(self.restarts.used)
        return line | self.metrics

    def write_facts(self, folder: Path) -> None:
        """What this run is, into a folder."""
        folders.describe(folder, self.config, self.spec.name, self.user_functions)

    @property
    def identity(self) -> Json:
        """What checkpoints of this run, and of no other beside it, say of it."""
        return folders.identity_of(self.config)

    def freeze(self, progress: Progress, ring: Ring, shelf: Shelf) -> Frozen:
        """A checkpoint of this run to be written, given its progress without the replay's rows, and these."""
        step = int(progress.state.num_env_steps)
        facts = {
            "run": self.identity,
            "evaluation": self.judged if self.judged and self.judged["step"] == step else None,
            "next_episode": (self.device or self.env).next_episode,
            "seconds": self.seconds,
            "recent": [list(episode) for episode in self.recent],
            "metrics": {name: x for name, x in self.metrics.items() if np.isfinite(x)},
            "restarts": self.restarts.used,
            "seen": self.watch.facts(),
        }
        return folders.freeze(progress, (self.device or self.env).snapshot(), facts, ring, shelf)

    def stands_at(self, env: Snapshot | None, facts: Json) -> None:
        """Go on from a checkpoint: within its episode, or in the next where `env` could not be had."""
        acted_in = self.device or self.env
        if env is None or not self._restored(env):
            acted_in.num_steps, acted_in.num_episodes = facts["num_env_steps"], facts["next_episode"]
        self.seconds, self.metrics, self.judged = facts["seconds"], facts["metrics"], facts["evaluation"]
        self.restarts.used = facts.get("restarts", 0)
        self.watch.restore(facts.get("seen") or {})
        self.recent.extend(Episode(*episode) for episode in facts["recent"])

    def _restored(self, env: Snapshot) -> bool:
        """Put the environment into the state saved, which another version of MuJoCo, say, cannot take."""
        try:
            (self.device or self.env).restore(env)
        except UserError as error:
            warnings.warn(f"{error}; its episode is begun anew", stacklevel=2)
            return False
        return True

    def keep_what_can_be_kept(self) -> str | None:
        """Before a checkpoint: where the environment's state cannot be in it, give the episode up here as a
        resumed run will have to, and say why."""
        if self.device is None and (why := self.env.snapshot_obstacle):
            self.env.abandon()
            return why
        return None


def _interval(imagination: ImaginationConfig) -> str:
    updates = imagination.interval_updates
    return f"{updates} updates" if updates else f"{imagination.interval_steps} steps"


def _sound(given: Mapping[What, RewardFn | TerminationFn | None], spec: EnvSpec, env: gym.Env) -> list[What]:
    """Which functions the user has given; UserError for one that cannot be used."""
    found: list[What] = []
    for what, function in given.items():
        if function is None:
            continue
        name = f"{what} function {getattr(function, '__name__', function)}"
        if why := fault(name, what, function, spec.obs_size, env.action_space):
            raise UserError(f"{why} (`mve check` asks it of real steps as well)")
        found.append(what)
    return found


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
