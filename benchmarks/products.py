"""The matrix products of one update, counted by hand: 2 FLOP for each multiply-add, needed gradients only.

A product is told by the layer it belongs to: `rows` x `inputs` -> `outputs`. Its three uses cost the same:

    forward            (rows, inputs) (inputs, outputs)
    weight gradient    (rows, inputs)' (rows, outputs)
    input gradient     (rows, outputs) (inputs, outputs)'
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

Use = Literal["forward", "weight_gradient", "input_gradient"]
Layers = Sequence[tuple[int, int]]  # (inputs, outputs) of each linear layer


class Product(NamedTuple):
    use: Use
    rows: int
    inputs: int
    outputs: int

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inputs * self.outputs


class Sizes(NamedTuple):
    """What the count depends on."""

    batch: int
    actor: Layers
    critic: Layers
    critics: int
    actions: int
    model: Layers = ()
    members: int = 0
    termination: Layers = ()  # of the net that predicts it; none where it is known
    horizon: int = 0
    regresses_imagined: bool = False  # TD-k


def forward(rows: int, layers: Layers) -> list[Product]:
    return [Product("forward", rows, i, o) for i, o in layers]


def weight_gradients(rows: int, layers: Layers) -> list[Product]:
    return [Product("weight_gradient", rows, i, o) for i, o in layers]


def input_gradients(rows: int, layers: Layers, of_input: int = 0) -> list[Product]:
    """Back through all layers but the first, and through that for so many columns of the input."""
    first = [Product("input_gradient", rows, of_input, layers[0][1])] if of_input else []
    return first + [Product("input_gradient", rows, i, o) for i, o in layers[1:]]


def critic_part(sizes: Sizes) -> list[Product]:
    """Imagination, the bootstrap, and the regression of every critic."""
    batch = sizes.batch
    block = -(-batch // sizes.members) if sizes.members else 0  # each member serves an equal block of rows
    step = forward(batch, sizes.actor) + sizes.members * forward(block, sizes.model)
    products = sizes.horizon * (step + forward(batch, sizes.termination))
    products += forward(batch, sizes.actor) + sizes.critics * forward(batch, sizes.critic)
    rows = batch * (1 + sizes.horizon * sizes.regresses_imagined)
    return products + sizes.critics * (
        forward(rows, sizes.critic)
        + weight_gradients(rows, sizes.critic)
        + input_gradients(rows, sizes.critic)
    )


def actor_part(sizes: Sizes, critics: int) -> list[Product]:
    """The actor's improvement on so many critics: back through them to the action, then through the actor."""
    batch = sizes.batch
    products = forward(batch, sizes.actor) + critics * forward(batch, sizes.critic)
    products += critics * input_gradients(batch, sizes.critic, of_input=sizes.actions)
    return products + weight_gradients(batch, sizes.actor) + input_gradients(batch, sizes.actor)


def sac_update(sizes: Sizes) -> list[Product]:
    return critic_part(sizes) + actor_part(sizes, sizes.critics)


def td3_flops(sizes: Sizes, delay: int = 2) -> float:
    """Mean over updates: the actor improves on one critic every `delay` of them."""
    return flops(critic_part(sizes)) + flops(actor_part(sizes, 1)) / delay


def model_fit(rows: int, layers: Layers, members: int) -> list[Product]:
    """One minibatch of so many rows for every member."""
    one = forward(rows, layers) + weight_gradients(rows, layers) + input_gradients(rows, layers)
    return members * one


def flops(products: Sequence[Product]) -> int:
    return sum(product.flops for product in products)
