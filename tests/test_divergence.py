"""Training that diverges is noticed in the block, explained, and kept out of the checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from test_learner import SMALL
from test_lock import SAC, Slide

from mve import Learner, config, log, seeds, train
from mve.divergence import EXPLODED, SUSTAINED, Watch, not_finite
from mve.program import Alone, Together
from mve.state import Capacity, initial_state
from mve.types import DivergedError

CONFIG = config.build("Pendulum-v1", "sac", ["targets.discount=0.9"])
RUN = [*SAC, "train.checkpoint_interval=80"]


def steps(reward: list[float], obs: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    return np.array(reward, np.float32), np.full((len(reward), 2), obs, np.float32)


def test_what_is_not_finite_is_named_and_a_model_that_was_not_fitted_is_not_asked() -> None:
    sound = {"train/critic_loss": 1.0, "train/q_mean": 0.0, "model/loss": 2.0}
    assert not_finite(sound, fits=1) is None
    assert not_finite(sound | {"train/critic_loss": np.nan}, fits=1) == "the critic's loss"
    assert not_finite(sound | {"train/actor_loss": np.inf}, fits=0) == "the actor's loss"
    assert not_finite(sound | {"model/loss": np.nan}, fits=0) is None
    assert not_finite(sound | {"model/loss": np.nan}, fits=3) == "the model's loss"


def test_values_beyond_all_rewards_are_said_once_and_only_if_they_last() -> None:
    watch = Watch()
    watch.see(*steps([-1.0, 2.0]))
    bound = 2.0 / (1 - 0.9)
    within, beyond = {"train/q_mean": EXPLODED * bound * 0.99}, {"train/q_mean": -EXPLODED * bound * 1.01}
    said = [watch.exploding(numbers, CONFIG, 1) for numbers in [*[beyond] * (SUSTAINED - 1), within]]
    assert said == [None] * SUSTAINED
    *before, first = [watch.exploding(beyond, CONFIG, 1) for _ in range(SUSTAINED)]
    assert before == [None] * (SUSTAINED - 1)
    assert first is not None
    assert "-202" in first
    assert "more than 20" in first
    assert [watch.exploding(beyond, CONFIG, 1) for _ in range(SUSTAINED)] == [None] * SUSTAINED


def test_an_entropy_bonus_is_allowed_for_and_rewards_of_nothing_tell_nothing() -> None:
    watch = Watch()
    large = {"train/q_mean": 1000.0}
    watch.see(*steps([0.0]))
    assert not any(watch.exploding(large, CONFIG, 1) for _ in range(2 * SUSTAINED))
    watch.see(*steps([0.001]))
    bonus = large | {"train/ent_coef": 5.0}
    assert not any(watch.exploding(bonus, CONFIG, 2 * SUSTAINED) for _ in range(2 * SUSTAINED))
    assert any(watch.exploding(large, CONFIG, 1) for _ in range(SUSTAINED))


def test_ranges_survive_a_checkpoint() -> None:
    watch, other = Watch(), Watch()
    watch.see(*steps([-1.0, 2.0]))
    watch.see(*steps([1.0], obs=-7.0))
    other.restore(watch.facts())
    assert (other.reward, other.obs) == ((-1.0, 2.0), (-7.0, 1.0))
    other.restore({})
    assert (other.reward, other.obs) == (None, None)


def test_the_diagnosis_shows_what_was_seen_and_what_to_try() -> None:
    watch = Watch()
    watch.see(*steps([-1.0, 5000.0], obs=1e6))
    text = "\n".join(watch.diagnosis("the critic's loss", {"train/critic_loss": 3.5, "model/loss": 1.0}))
    for words in (
        "critic loss 3.5",
        "rewards seen: -1 to 5000",
        "observations seen: 1e+06",
        "smaller rewards",
    ):
        assert words in text
    assert "targets.horizon_steps" in text
    assert "agent.critic_learning_rate" in text
    assert "dynamics.learning_rate" in watch.diagnosis("the model's loss", {})[-1]


def spoil(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """The weights of learning from that step on, while its losses stay finite."""
    learn = train.learn

    def spoilt(state: Any, *rest: Any) -> Any:
        state, metrics = learn(state, *rest)
        if int(state.num_env_steps) <= after:
            return state, metrics
        nan = lambda x: x * np.float32(np.nan) if x.dtype == np.float32 else x  # noqa: E731
        leaves = jax.tree.map(nan, state.agent)
        return train.replace(state, agent=leaves), metrics

    monkeypatch.setattr(train, "learn", spoilt)


@pytest.mark.parametrize("overlap", ["true", "false"])
def test_a_diverged_state_is_never_saved_over_the_last_good_one(
    overlap: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*RUN, f"train.overlap={overlap}"]
    run = Learner(Slide(), "sac", run_dir=tmp_path / "run", settings=settings, quiet=True, seed=7)
    spoil(monkeypatch, after=150)
    with pytest.raises(DivergedError, match=r"seed 7, .* at step 160") as caught:
        run.learn(300)
    assert caught.value.exit_code == 3
    assert "rewards seen" in str(caught.value)
    assert "try: " in (tmp_path / "run" / log.EVENTS).read_text()
    monkeypatch.undo()
    good = Learner.load(tmp_path / "run", Slide(), quiet=True)
    assert good.num_timesteps == 80
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(good.policy()))
    with pytest.raises(Exception, match="last learn"):
        run.learn(20)


def test_the_seed_that_diverges_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {"settings": RUN, "quiet": True}
    runs = seeds.create(Slide(), "sac", seeds=[4, 5], run_dir=tmp_path / "runs", **given)
    numbers = Together.numbers

    def spoilt(self: Together, metrics: Any) -> list[dict[str, float]]:
        first, second = numbers(self, metrics)
        return [first, second | {"train/critic_loss": float("nan")}]

    monkeypatch.setattr(Together, "numbers", spoilt)
    with pytest.raises(DivergedError, match="seed 5, the critic's loss is not finite at step 80"):
        seeds.learn_together(runs, 200)


def test_states_that_are_not_finite_are_found_seed_by_seed() -> None:
    recipe = Learner(Slide(), "sac", settings=SAC, quiet=True).recipe
    states = [initial_state(recipe, Capacity(20), seed) for seed in range(3)]
    assert Alone(recipe).are_finite(states[0]) == [True]
    nan = lambda x: x * np.float32(np.nan) if x.dtype == np.float32 else x  # noqa: E731
    states[1] = train.replace(states[1], agent=jax.tree.map(nan, states[1].agent))
    assert Alone(recipe).are_finite(states[1]) == [False]
    for more in ([], ["agent.normalize_obs=true"]):
        fitted = Learner(Slide(), "mve-sac", settings=[*SMALL, *more], quiet=True)
        assert Alone(fitted.recipe).are_finite(fitted.state) == [True]  # before its first step too
    together = Together(recipe, 3)
    assert together.are_finite(together.joined(states)) == [True, False, True]
