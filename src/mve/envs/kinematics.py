"""Forward kinematics of a MuJoCo model in JAX: where the bodies are, from the joint positions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

SMALLEST_SQUARE = 1e-24  # of a length: the root of 0 has no slope to be differentiated through

# Full float32: a GPU would multiply matrices with ten bits, and a velocity divides by a short dt what two
# nearly equal positions leave.
matmul = partial(jnp.matmul, precision="highest")


def kinematics(model: Any) -> Callable[[Array], Array]:
    """qpos -> pose (nbody, 4, 4) of every body in the world: mj_kinematics as a chain of products.

    A body's pose is its parent's, times its fixed offset, times the motion of each of its joints. A hinge at
    point p with unit axis a moves by I + sin θ A + (1 - cos θ) A², where A = [a× | p × a]; a slide by
    I + θ A, where A = [0 | a]; a free joint places its body in the world whatever the offset.
    """
    FREE, BALL, SLIDE, _HINGE = range(4)  # MuJoCo's mjtJoint
    slides, axes, points = model.jnt_type == SLIDE, model.jnt_axis, model.jnt_pos
    generators = np.zeros((model.njnt, 4, 4))
    generators[~slides, :3, :3] = np.cross(np.eye(3), axes[~slides, None])  # a× as a matrix
    generators[:, :3, 3] = np.where(slides[:, None], axes, np.cross(points, axes))
    first, second, points = f32(generators), f32(generators @ generators), f32(points)
    offsets = jax.vmap(_pose)(f32(model.body_quat), f32(model.body_pos))

    def move(pose: Array, joint: int, qpos: Array) -> Array:
        q, kind = qpos[model.jnt_qposadr[joint] :], model.jnt_type[joint]
        if kind == FREE:
            return _pose(q[3:7], q[:3])
        if kind == BALL:
            return matmul(pose, matmul(_pose(q[:4], points[joint]), _pose(jnp.eye(4)[0], -points[joint])))
        moved = q[0] - float(model.qpos0[model.jnt_qposadr[joint]])
        if kind == SLIDE:
            return matmul(pose, jnp.eye(4) + moved * first[joint])
        turn = jnp.eye(4) + jnp.sin(moved) * first[joint] + (1 - jnp.cos(moved)) * second[joint]
        return matmul(pose, turn)

    def poses(qpos: Array) -> Array:
        placed = [offsets[0]]
        for body in range(1, model.nbody):
            pose = matmul(placed[model.body_parentid[body]], offsets[body])
            first_joint = model.body_jntadr[body]
            for joint in range(first_joint, first_joint + model.body_jntnum[body]):
                pose = move(pose, joint, qpos)
            placed.append(pose)
        return jnp.stack(placed)

    return poses


def _pose(quaternion: Array, place: Array) -> Array:
    """A turn by the quaternion, then a shift. It is normalised, since a model's prediction need not be."""
    w, x, y, z = quaternion / norm(quaternion)
    px, py, pz = place
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y), px),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x), py),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y), pz),
        (0.0, 0.0, 0.0, 1.0),
    )
    return jnp.stack([jnp.stack(row) for row in rows])


def norm(vector: Array) -> Array:
    return jnp.sqrt(jnp.maximum(jnp.sum(vector**2), SMALLEST_SQUARE))


def f32(array: Any) -> Array:
    return jnp.asarray(array, jnp.float32)
