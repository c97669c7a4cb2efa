"""Sums on paper: what so many environments would need, from what one core was measured to do."""

from __future__ import annotations

from typing import Any, NamedTuple

from report import number, per_core_second, scaled, table

Json = dict[str, Any]

ENVIRONMENTS = (10, 1_000, 100_000)
SECONDS_A_DAY = 86_400


class Measured(NamedTuple):
    """What the sums start from; the letters are those of docs/performance.md."""

    env_steps_per_core_second: float  # e
    updates_per_core_second: float  # u
    flops_per_update: float  # F
    transition_bytes: float  # d
    policy_bytes: float  # p
    batch: int  # B
    updates_per_step: float  # U
    control_hz: float  # f, environment steps a second of a body that lives in real time


class Needs(NamedTuple):
    env_steps_per_second: float
    env_cores: float
    written: float  # bytes a second into replay
    read: float  # bytes a second out of it
    day: float  # bytes of a replay that keeps a day
    policies: float  # bytes a second if every worker core fetches the policy once a second
    learner_flops: float
    learner_cores: float


def needs(m: Measured, environments: int) -> Needs:
    """Of so many environments, each at the task's own pace."""
    steps = environments * m.control_hz
    updates, env_cores = steps * m.updates_per_step, steps / m.env_steps_per_core_second
    return Needs(
        env_steps_per_second=steps,
        env_cores=env_cores,
        written=steps * m.transition_bytes,
        read=updates * m.batch * m.transition_bytes,
        day=SECONDS_A_DAY * steps * m.transition_bytes,
        policies=max(env_cores, 1.0) * m.policy_bytes,
        learner_flops=updates * m.flops_per_update,
        learner_cores=updates / m.updates_per_core_second,
    )


def measured(section: Json) -> dict[str, Measured]:
    """By algorithm, from the JSON of the section."""
    env = next(group for group in section["groups"] if group["per"] == "env_steps")
    found = {}
    for group in section["groups"]:
        if "sizes" not in group:
            continue
        sizes, algo = group["sizes"], group["baseline"]
        flops, rate = group["arms"][algo]["facts"]["flops_hand"], per_core_second(group, algo)
        found[algo] = Measured(
            env_steps_per_core_second=per_core_second(env, "mve"),
            updates_per_core_second=rate,
            flops_per_update=flops,
            transition_bytes=sizes["transition_bytes"],
            policy_bytes=sizes["policy_bytes"],
            batch=sizes["batch"],
            updates_per_step=sizes["updates_per_step"],
            control_hz=sizes["control_hz"],
        )
    return found


def paper_text(section: Json) -> str:
    header = (
        "environments", "steps/s", "worker cores", "replay written", "replay read", "a day's replay",
        "policies sent", "learner", "as cores like this one",
    )  # fmt: skip
    parts = []
    for algo, m in measured(section).items():
        rows = []
        for environments in ENVIRONMENTS:
            n = needs(m, environments)
            rows.append(
                (
                    f"{environments:,}".replace(",", " "),
                    number(n.env_steps_per_second),
                    number(n.env_cores),
                    scaled(n.written, "B/s"),
                    scaled(n.read, "B/s"),
                    scaled(n.day, "B"),
                    scaled(n.policies, "B/s"),
                    scaled(n.learner_flops, "FLOP/s"),
                    number(n.learner_cores),
                )
            )
        parts.append(f"{_facts(algo, m)}\n\n{table(header, rows)}")
    return "\n\n".join(parts)


def _facts(algo: str, m: Measured) -> str:
    return (
        f"**{algo}**: e = {number(m.env_steps_per_core_second)} environment steps or "
        f"u = {number(m.updates_per_core_second)} updates per core-second; "
        f"F = {scaled(m.flops_per_update, 'FLOP')} an update; d = {number(m.transition_bytes)} bytes a "
        f"transition; p = {scaled(m.policy_bytes, 'B')} a policy; B = {m.batch}; "
        f"U = {m.updates_per_step:g} updates a step; f = {number(m.control_hz)} steps a second."
    )
