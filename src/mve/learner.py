"""A run: one environment, one training state, one folder. The loop's outside, where time passes.

The names are Stable-Baselines3's (`learn`, `predict`, `save`, `load`), so that scripts carry over.
"""

from __future__ import annotations

import copy
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np

from mve import checkpoint, config, log, plot, schedule, train
from mve.config import Config
from mve.dynamics import DynamicsConfig
from mve.envs import host, oracle
from mve.envs.base import EnvSpec, Episode, HostPolicy
from mve.envs.host import HostEnv
from mve.envs.known import never
from mve.evaluate import Evaluation, evaluate
from mve.policies import Policy
from mve.presets import DEFAULT_ALGO, DEFAULT_DISCRETE_ALGO
from mve.state import Capacity, Recipe, grown, initial_state
from mve.train import Due
from mve.types import Known, RewardFn, StepFn, TerminationFn, Transition, UserError

EXPLORATION_STREAM = 3  # first word of the seeds of exploration noise, one generator per block
RECENT_EPISODES = 10


class Learner:
    """Trains a policy for a Gymnasium task by model-based value expansion, or by its base learner.

        learner = Learner("Pendulum-v1").learn()
        action, _ = learner.predict(obs)

    `env` is an id or an environment; `algo` one of `mve list`; `settings` are `section.field=value`.
    `reward_fn` and `termination_fn` are JAX functions (obs, action, next_obs), any leading axes, in the
    environment's own units (a discrete action is an integer, an array without a last axis); without them
    the model learns both. An instance is copied for evaluation unless `eval_env` is given. Nothing is
    written before `learn` or `save`.
    """

    def __init__(
        self,
        env: str | gym.Env,
        algo: str | None = None,
        *,
        seed: int = 0,
        run_dir: Path | str | None = None,
        settings: Sequence[str] = (),
        reward_fn: RewardFn | None = None,
        termination_fn: TerminationFn | None = None,
        eval_env: gym.Env | None = None,
        quiet: bool = False,
    ):
        with log.capture_mujoco_warnings(None):
            by_name = isinstance(env, str)
            name = env if by_name else host.name_of(env)
            instance = host.make(config.task(name, algo, settings)) if by_name else env
            built = config.build(name, algo or _default_algo(instance), settings, seed)
            if not by_name:
                built = replace(built, env=replace(built.env, id=""))
            self._set_up(built, instance, eval_env, reward_fn, termination_fn, quiet)
        self.folder = Path(run_dir) if run_dir is not None else _free_folder(self.spec.name, built)
        self._fresh = True
        self._state = initial_state(self._recipe, self._capacity(), seed)

    def _set_up(
        self,
        built: Config,
        instance: gym.Env,
        eval_env: gym.Env | None,
        reward_fn: RewardFn | None,
        termination_fn: TerminationFn | None,
        quiet: bool,
    ) -> None:
        """Everything but the training state and the folder."""
        self._env = HostEnv(
            instance,
            seed=built.seed,
            truncation_is_terminal=built.env.truncation_is_terminal,
            reward_fn=reward_fn,
            termination_fn=termination_fn,
        )
        self.spec: EnvSpec = self._env.spec
        config.check_actions(built, self.spec)
        self.config = schedule.with_budgets(built, self.spec.max_episode_steps)
        known = _known(self.config.dynamics, self.spec, self.config.env.id)
        self._recipe = Recipe(
            obs_size=self.spec.obs_size,
            action_size=self.spec.action_size,
            known=known,
            agent=self.config.agent,
            dynamics=self.config.dynamics,
            imagination=self.config.imagination,
            targets=self.config.targets,
        )
        self._instance, self._eval_env = instance, eval_env
        if self.config.dynamics.kind == "oracle" and self._recipe.uses_model:
            if self.config.agent.model_steps > 0:
                raise UserError("dynamics.kind=oracle has no gradient, which agent.model_steps > 0 asks for")
            self._recipe = replace(self._recipe, simulator=self._simulator())
        self._eval_envs: list[gym.Env] = []
        self._user_functions = [
            name for name, fn in (("reward", reward_fn), ("termination", termination_fn)) if fn is not None
        ]
        self._quiet = quiet
        self._seconds_before = 0.0
        self._policy: Policy | None = None
        self._stop = False

    @property
    def num_timesteps(self) -> int:
        """Real environment steps so far."""
        return int(self._state.num_env_steps)

    def describe(self) -> str:
        """One line: task, sizes, budget, and what the model has to learn."""
        cfg, known = self.config, self._recipe.known
        kind = "discrete " if self.spec.discrete else ""
        sizes = f"{self.spec.obs_size} observations, {self.spec.action_size} {kind}actions"
        text = f"{self.spec.name} with {cfg.algo}: {sizes}, {cfg.train.total_steps} steps"
        if not self._recipe.uses_model:
            return f"{text}; no model"
        uses = {
            f"H = {cfg.targets.imagined_steps}": cfg.targets.imagined_steps,
            f"actor through {cfg.agent.model_steps} model steps": cfg.agent.model_steps,
            f"{cfg.imagination.starts} rollouts every {cfg.imagination.interval_steps} steps": (
                cfg.imagination.starts
            ),
        }
        used = ", ".join(what for what, count in uses.items() if count)
        if self._recipe.simulator is not None:
            return f"{text}; {used}, in the true simulator"
        told = {True: "learned", False: "known"}
        reward, termination = told[known.reward is None], told[known.termination is None]
        termination = "never" if cfg.dynamics.termination == "never" else termination
        return f"{text}; {used}, reward {reward}, termination {termination}"

    def _capacity(self) -> Capacity:
        """No more than the budget of steps can fill."""
        total, imagination = self.config.train.total_steps, self.config.imagination
        most = schedule.rounds_due(self.config, total) * imagination.starts * max(imagination.length)
        return Capacity(min(self.config.replay.capacity, total), min(imagination.capacity, most))

    # Acting

    def _action_space(self) -> host.ActionSpace:
        space = self._instance.action_space
        assert isinstance(space, gym.spaces.Box | gym.spaces.Discrete)
        return space

    def _host_policy(self) -> Policy:
        """The deterministic policy with NumPy leaves. Copied: the device's buffers are donated later."""
        policy = self._policy or _on_host(self._state.agent.policy())
        self._policy = policy
        return policy

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
        policy = self._host_policy()
        if not deterministic:
            noise = np.random.default_rng().standard_normal(noise.shape, np.float32)
            policy = _on_host(train.exploration_policy(self._state))
        return np.asarray(host.native_action(self._action_space(), policy(obs, noise))), None

    def evaluate(self, episodes: int | None = None) -> Evaluation:
        """Return and length of episodes under the deterministic policy, in environments of their own."""
        with log.capture_mujoco_warnings(None):
            return self._evaluate(episodes)

    def _evaluate(self, episodes: int | None) -> Evaluation:
        while len(self._eval_envs) < (wanted := episodes or self.config.evaluate.episodes):
            self._eval_envs.append(self._another_env())
        envs = self._eval_envs[:wanted]
        return evaluate(envs, self._host_policy(), seed=self.config.seed, step=self.num_timesteps)

    def _another_env(self) -> gym.Env:
        if self.config.env.id and self._eval_env is None:
            return host.make(self.config.env)
        return self._copy(self._eval_env or self._instance, "for evaluation")

    def _copy(self, env: gym.Env, purpose: str) -> gym.Env:
        try:
            return copy.deepcopy(env)
        except Exception as error:
            raise UserError(f"{self.spec.name} cannot be copied {purpose}: {error}") from error

    def _simulator(self) -> StepFn:
        """The environment's own dynamics, from a copy that is set to whatever state is imagined."""
        env_config = self.config.env
        return oracle.simulator(
            host.make(env_config) if env_config.id else self._copy(self._instance, "to be set to states")
        )

    # Learning

    def learn(self, total_timesteps: int | None = None) -> Learner:
        """Train for so many more environment steps, or to the end of the configured budget.

        Ends with an evaluation, a checkpoint and the learning curve. On Ctrl-C the block in hand is
        finished and saved before KeyboardInterrupt is raised.
        """
        if total_timesteps is not None:
            budget = replace(self.config.train, total_steps=self.num_timesteps + total_timesteps)
            self.config = replace(self.config, train=budget)
        schedule.check(self.config, self._recipe.fits_model)
        self._open_folder()
        if not self._quiet:
            print(self.describe(), file=sys.stderr)
        self._state = grown(self._state, self._capacity())
        total = self.config.train.total_steps
        log.RunLog.truncate(self.folder, self.num_timesteps)
        records = log.RunLog(self.folder, total, quiet=self._quiet)
        with log.capture_mujoco_warnings(self.folder), records, self._stop_on_interrupt():
            self._loop(records, total)
        plot.curve([self.folder], self.folder / "curve.png")
        if self._stop:
            raise KeyboardInterrupt
        return self

    def _loop(self, records: log.RunLog, total: int) -> None:
        settings, started, first = self.config.train, time.perf_counter(), self.num_timesteps
        recent: deque[Episode] = deque(maxlen=RECENT_EPISODES)
        step, metrics = first, {}
        interval = self.config.evaluate.interval_steps
        while step < total and not self._stop:
            before, count = step, min(settings.block_steps, total - step)
            act, log_density = self._acting(before)
            block, ended = self._env.collect(act, count)
            if self.config.targets.reads_segments:
                behaviour = log_density(np.asarray(block.obs), np.asarray(block.action))
                block = block._replace(log_density=behaviour)  # pyright: ignore[reportArgumentType]
            recent.extend(ended)
            step += count
            metrics = metrics | self._learn(block, before, step)
            elapsed = self._seconds_before + time.perf_counter() - started
            records.progress(step, _progress_fields(self.spec.name, metrics, recent))
            due = schedule.crosses(before, step, interval) or step == total
            if due or schedule.crosses(before, step, max(interval // 5, 1)):
                rollout = _rollout_metrics(recent, elapsed, step)
                records.record(step, rollout | metrics | (self._judge(records, step) if due else {}))
            if schedule.crosses(before, step, settings.checkpoint_interval) or step == total or self._stop:
                self._save(self.folder, elapsed)

    def _learn(self, block: Transition, before: int, step: int) -> dict[str, float]:
        """One block into the state; its metrics, empty before anything is learned.

        A block that fits nothing says nothing of fits: what the last fit said stands.
        """
        cfg = self.config
        fits = schedule.fits_due(cfg, step) - schedule.fits_due(cfg, before) if self._recipe.fits_model else 0
        rounds = schedule.rounds_due(cfg, step) - schedule.rounds_due(cfg, before)
        updates = schedule.updates_due(cfg, step) - schedule.updates_due(cfg, before)
        padding = cfg.train.block_steps - (step - before)
        padded: Transition = jax.tree.map(
            lambda x: np.concatenate([x, np.zeros_like(x[:1]).repeat(padding, 0)]), block
        )
        due = Due.of(rows=step - before, fits=fits, rounds=rounds, updates=updates)
        self._state, metrics = train.learn(self._state, padded, due, self._recipe)
        self._policy = None
        if updates == 0:
            return {}
        numbers = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not np.isfinite(numbers["train/critic_loss"]):
            raise UserError(f"training diverged: the critic's loss is not finite at step {step}")
        if fits == 0:
            numbers = {k: x for k, x in numbers.items() if np.isfinite(x) or not k.startswith("model/")}
        numbers["train/n_updates"] = float(schedule.updates_due(cfg, step))
        numbers["mve/horizon"] = float(cfg.targets.imagined_steps)
        return numbers

    def _acting(self, step: int) -> tuple[HostPolicy, Callable[[np.ndarray, np.ndarray], np.ndarray]]:
        """What collects the block that starts at `step`, and the log-density of its actions.

        Its draws depend on the seed and the step only.
        """
        t, rng = self.config.train, np.random.default_rng([EXPLORATION_STREAM, self.config.seed, step])
        if step < t.learning_starts and t.warmup == "uniform":
            actions = iter(host.random_actions(self._action_space(), rng, t.block_steps))
            log_density = host.random_log_density(self._action_space())
            return lambda obs: next(actions), lambda obs, action: np.full(len(obs), log_density, np.float32)
        policy = _on_host(train.exploration_policy(self._state))
        noise = iter(rng.standard_normal((t.block_steps, self.spec.action_size), np.float32))
        return lambda obs: policy(obs, next(noise)), policy.log_density

    def _judge(self, records: log.RunLog, step: int) -> dict[str, float]:
        result = self._evaluate(None)  # warnings go to the run's own log
        records.evaluation(step, result.returns.tolist(), result.lengths.tolist())
        return {
            "eval/mean_reward": float(result.returns.mean()),
            "eval/std_reward": float(result.returns.std()),
            "eval/mean_ep_length": float(result.lengths.mean()),
        }

    @contextmanager
    def _stop_on_interrupt(self) -> Iterator[None]:
        """Ctrl-C asks the loop to finish its block; a second one stops at once."""
        self._stop = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(signum: int, frame: Any) -> None:
            del signum, frame
            if self._stop:
                raise KeyboardInterrupt
            self._stop = True

        previous = signal.signal(signal.SIGINT, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    # The run folder

    def _open_folder(self) -> None:
        if self._fresh and (self.folder / "config.json").exists():
            raise UserError(
                f"{self.folder} already holds a run; continue it with `mve resume {self.folder}` "
                "or choose another folder"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write_facts(self.folder)
        except OSError as error:
            raise UserError(f"cannot write the run folder {self.folder}: {error.strerror}") from error
        self._fresh = False

    def _write_facts(self, folder: Path) -> None:
        facts = config.to_json(self.config) | {"task": self.spec.name, "user_functions": self._user_functions}
        log.write_json(folder / "config.json", facts)
        log.write_versions(folder)

    def _save(self, folder: Path, seconds: float) -> None:
        facts = {
            "num_env_steps": self.num_timesteps,
            "num_episodes": self._env.num_episodes,
            "seconds": seconds,
            "replay_rows": self._state.replay.capacity,
            "imagined_rows": self._state.imagined.capacity if self._state.imagined else 0,
        }
        checkpoint.save(folder / "checkpoints", self._state, facts)

    def save(self, folder: Path | str) -> None:
        """Configuration and training state, replay included, into a folder that `load` reads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._write_facts(folder)
        self._save(folder, self._seconds_before)

    @classmethod
    def load(
        cls,
        folder: Path | str,
        env: gym.Env | None = None,
        *,
        reward_fn: RewardFn | None = None,
        termination_fn: TerminationFn | None = None,
        eval_env: gym.Env | None = None,
        quiet: bool = False,
    ) -> Learner:
        """The learner of a run folder, at its newest checkpoint. Nothing in the folder is executed.

        An environment instance, and functions the user had given, have to be given again. The episode
        that was running at the checkpoint is begun anew.
        """
        folder = Path(folder)
        data = log.read_json(folder / "config.json", what="run folder")
        data.pop("task", None)
        missing = {"reward": reward_fn, "termination": termination_fn}
        for name in data.pop("user_functions", []):
            if missing[name] is None:
                raise UserError(
                    f"{folder} was trained with your own {name} function; give it again (--{name} FILE:FUNC)"
                )
        built = config.from_json(data)
        if env is None and not built.env.id:
            raise UserError(
                f"{folder} was trained on an environment instance; give it again: load(folder, env)"
            )
        learner = cls.__new__(cls)
        with log.capture_mujoco_warnings(None):
            instance = env or host.make(built.env)
            learner._set_up(built, instance, eval_env, reward_fn, termination_fn, quiet)
        learner.folder, learner._fresh = folder, False
        newest = checkpoint.latest(folder / "checkpoints")
        held = checkpoint.read_facts(newest) if newest else {}
        rows = Capacity(held.get("replay_rows", 0), held.get("imagined_rows", 0))
        template = jax.eval_shape(lambda: initial_state(learner._recipe, rows, 0))
        state, facts = checkpoint.restore(folder / "checkpoints", template)
        learner._state = jax.tree.map(jnp.asarray, state)
        learner._env.num_steps, learner._env.num_episodes = facts["num_env_steps"], facts["num_episodes"] + 1
        learner._seconds_before = facts["seconds"]
        return learner


def _on_host(policy: Policy) -> Policy:
    return jax.tree.map(np.array, policy)


def _default_algo(env: gym.Env) -> str:
    return DEFAULT_DISCRETE_ALGO if isinstance(env.action_space, gym.spaces.Discrete) else DEFAULT_ALGO


def _free_folder(name: str, built: Config) -> Path:
    """runs/ENV/ALGO/seed-S, or the first of seed-S-2, seed-S-3, ... that holds no run yet."""
    base = Path("runs") / name.replace("/", "-").replace(":", "-") / built.algo / f"seed-{built.seed}"
    folder, n = base, 1
    while (folder / "config.json").exists():
        n += 1
        folder = base.with_name(f"{base.name}-{n}")
    return folder


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


def _rollout_metrics(recent: Sequence[Episode], elapsed: float, step: int) -> dict[str, float]:
    metrics = {"time/time_elapsed": elapsed, "time/fps": step / max(elapsed, 1e-9)}
    if recent:
        metrics["rollout/ep_rew_mean"] = float(np.mean([e.ret for e in recent]))
        metrics["rollout/ep_len_mean"] = float(np.mean([e.length for e in recent]))
    return metrics


def _progress_fields(
    name: str, metrics: dict[str, float], recent: Sequence[Episode]
) -> dict[str, float | str]:
    fields: dict[str, float | str] = {"env": name}
    if recent:
        fields["return"] = recent[-1].ret
    if "model/mse_k1" in metrics:
        fields["model error"] = metrics["model/mse_k1"]
    return fields
