"""The environments that evaluation plays in, beside the one that is trained in."""

from __future__ import annotations

import copy
from collections.abc import Callable

import gymnasium as gym
from gymnasium.wrappers import (
    NormalizeObservation,
    NormalizeReward,
    OrderEnforcing,
    PassiveEnvChecker,
    TimeLimit,
)

from mve.envs import host, snapshot, worker
from mve.envs.base import EnvConfig
from mve.envs.known import name_of
from mve.envs.stepped import Stepped
from mve.messages import one_line
from mve.types import FaultError, UserError

FORGETFUL = (TimeLimit, OrderEnforcing, PassiveEnvChecker)  # wrappers that a reset makes like new
GATHERING = (NormalizeObservation, NormalizeReward)  # those whose numbers a policy was trained by


class EvaluationEnvs:
    """Of the same task as the one `trained` in: the one that was given for it, or else copies of that, or
    others that are made by the id in `made`, if it has one. UserError for one that others act in."""

    def __init__(self, made: EnvConfig, trained: Callable[[], gym.Env], given: gym.Env | None, obs_size: int):
        self._made, self._trained, self._obs_size = made, trained, obs_size
        self._given = given if given is not trained() else None
        self._held: list[Stepped] = []
        if self._given is not None:
            self._refuse_other(self._given)

    def side_by_side(self, wanted: int) -> list[Stepped]:
        """So many, or one, whose episodes follow one another. FaultError where there can be none: the run is
        saved then, as for any fault."""
        if self._given is not None:
            return [worker.stepped(EnvConfig(), self._given, self._obs_size)]
        apart = self._made.is_apart  # in a process, which makes its own and holds one
        if not apart and (not self._made.id or self._may_gather):
            # Copied anew: wrappers that gather statistics have the instance's, whenever the run was resumed.
            self._held.clear()
        try:
            while len(self._held) < (1 if apart else wanted):
                env = self._trained() if apart else self.another()
                self._held.append(worker.stepped(self._made, env, self._obs_size))
        except UserError as error:
            raise FaultError(f"no environment to evaluate in: {error}") from error
        return self._held[:wanted]

    def another(self) -> gym.Env:
        """The one that was given, or a new one; UserError where there is no way to one."""
        if self._given is not None:
            return self._given
        if self._made.id and not self._may_gather:
            return host.make(self._made)
        try:
            return copied(self._trained(), "for evaluation")
        except UserError as error:
            if self._made.id and self.gathering is None:
                return host.make(self._made)
            raise UserError(f"{error}; give another as eval_env") from error

    def check(self) -> None:
        """UserError where there is none to evaluate in: before the first step, not after a thousand."""
        if self._given is not None:
            return
        layer = self.gathering
        if self._made.is_apart and layer is not None:
            raise UserError(
                f"{self._made.id} has {type(layer).__name__}, whose statistics evaluation in another process "
                "would not have; set env.own_process=false and no env.timeout"
            )
        if not self._made.id or layer is not None:
            self.another()

    def close(self) -> None:
        """Give them up, and the process that one may be in; one that was given stays open."""
        for env in self._held:
            env.close()
        self._held.clear()

    @property
    def _may_gather(self) -> bool:
        """Whether a wrapper may keep something from one episode to the next, as those for statistics do."""
        return any(not isinstance(layer, FORGETFUL) for layer in snapshot.layers_of(self._trained())[:-1])

    @property
    def gathering(self) -> gym.Env | None:
        """A wrapper that does, if one is known to: it is copied, never made anew."""
        layers = snapshot.layers_of(self._trained())
        return next((layer for layer in layers if isinstance(layer, GATHERING)), None)

    def _refuse_other(self, given: gym.Env) -> None:
        mine, name = self._trained(), f"eval_env {name_of(given)}"
        if given.action_space != mine.action_space:
            raise UserError(
                f"{name} has actions {one_line(given.action_space)}, training {one_line(mine.action_space)}: "
                "one policy acts in both; wrap them alike"
            )
        if given.observation_space.shape != mine.observation_space.shape:
            raise UserError(
                f"{name} shows observations of shape {given.observation_space.shape}, training "
                f"{mine.observation_space.shape}; wrap them alike"
            )


def copied(env: gym.Env, purpose: str) -> gym.Env:
    """A copy of an instance; UserError for one that holds what cannot be copied."""
    try:
        return copy.deepcopy(env)
    except Exception as error:
        raise UserError(f"{name_of(env)} cannot be copied {purpose}: {error}") from error
