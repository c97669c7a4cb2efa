"""The environments that evaluation plays in, beside the one that is trained in."""

from __future__ import annotations

import copy

import gymnasium as gym
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit

from mve.envs import host, snapshot, worker
from mve.envs.base import EnvConfig
from mve.envs.known import name_of
from mve.envs.stepped import Stepped
from mve.types import FaultError, UserError

FORGETFUL = (TimeLimit, OrderEnforcing, PassiveEnvChecker)  # wrappers that a reset makes like new


class EvaluationEnvs:
    """Of the same task as `instance`: the one that was given for it, or else copies of `instance`, or others
    that are made by the id in `made`, if it has one."""

    def __init__(self, made: EnvConfig, instance: gym.Env, given: gym.Env | None, obs_size: int):
        self._made, self._instance, self._obs_size = made, instance, obs_size
        self._given = given if given is not instance else None
        self._held: list[Stepped] = []

    def side_by_side(self, wanted: int) -> list[Stepped]:
        """So many, or one, whose episodes follow one another. FaultError where there can be none: the run is
        saved then, as for any fault."""
        if self._given is not None:
            return [worker.stepped(EnvConfig(), self._given, self._obs_size)]
        apart = self._made.is_apart  # in a process, which makes its own and holds one
        if not apart and (not self._made.id or self._gathers):
            # Copied anew: wrappers that gather statistics have the instance's, whenever the run was resumed.
            self._held.clear()
        try:
            while len(self._held) < (1 if apart else wanted):
                env = self._instance if apart else self.another()
                self._held.append(worker.stepped(self._made, env, self._obs_size))
        except UserError as error:
            raise FaultError(f"no environment to evaluate in: {error}") from error
        return self._held[:wanted]

    def another(self) -> gym.Env:
        """The one that was given, or a new one; UserError where there is no way to one."""
        if self._given is not None:
            return self._given
        if self._made.id and not self._gathers:
            return host.make(self._made)
        try:
            return copied(self._instance, "for evaluation")
        except UserError:
            if self._made.id:
                return host.make(self._made)
            raise

    def check(self) -> None:
        """UserError for an instance that cannot be copied: before the first step, not after a thousand."""
        if not self._made.id:
            self.another()

    def close(self) -> None:
        """Give them up, and the process that one may be in; one that was given stays open."""
        for env in self._held:
            env.close()
        self._held.clear()

    @property
    def _gathers(self) -> bool:
        """Whether a wrapper may keep something from one episode to the next, as those for statistics do."""
        return any(not isinstance(layer, FORGETFUL) for layer in snapshot.layers_of(self._instance)[:-1])


def copied(env: gym.Env, purpose: str) -> gym.Env:
    """A copy of an instance; UserError for one that holds what cannot be copied."""
    try:
        return copy.deepcopy(env)
    except Exception as error:
        raise UserError(f"{name_of(env)} cannot be copied {purpose}: {error}") from error
