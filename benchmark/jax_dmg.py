"""DMG's update in JAX, jit and scan: the same networks and arithmetic, for throughput.py alone."""

import functools

import jax
import jax.numpy as jnp
from jax import tree


def mlp_init(key, n_in, n_out, *nets):
    layers = []
    for size in ((n_in, 256), (256, 256), (256, n_out)):
        w = jax.random.normal(key, (*nets, *size)) / size[0] ** 0.5
        layers.append((w, jnp.zeros((*nets, 1, size[1]))))
    return layers


def mlp(layers, *inputs):
    x = jnp.concatenate(inputs, -1)
    *hidden, (w, b) = layers
    for w_hidden, b_hidden in hidden:
        x = jax.nn.relu(x @ w_hidden + b_hidden)
    return x @ w + b


def values(p, *inputs):
    return mlp(p, *inputs)[..., 0]


def adam(loss, p, state):
    """One step of Adam on loss(p)."""
    m, v, t = state
    g = jax.grad(loss)(p)
    m = tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, g)
    v = tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, v, g)
    t = t + 1
    rate = 3e-4 / (1 - 0.9**t)
    root = jnp.sqrt(1 - 0.999**t)
    p = tree.map(lambda p, m, v: p - rate * m / (jnp.sqrt(v) / root + 1e-8), p, m, v)
    return p, (m, v, t)


def start(key, state_dim, action_dim):
    nets = {"pi": mlp_init(key, state_dim, action_dim), "v": mlp_init(key, state_dim, 1)}
    nets["q"] = mlp_init(key, state_dim + action_dim, 1, 2)
    states = {}
    for name, net in nets.items():
        zeros = tree.map(jnp.zeros_like, net)
        states[name] = zeros, zeros, jnp.zeros(())
    return nets | {"pi_target": nets["pi"], "q_target": nets["q"]}, states


def update(nets, states, batch, noise, update_actor):
    s, a, r, next_s, terminated = batch
    nets, states = dict(nets), dict(states)
    target_q = values(nets["q_target"], s, a).min(0)

    def value_loss(p):
        u = target_q - values(p, s)
        return (jnp.abs(0.7 - (u < 0)) * u**2).mean()

    nets["v"], states["v"] = adam(value_loss, nets["v"], states["v"])
    next_a = jnp.tanh(mlp(nets["pi_target"], next_s)) + jnp.clip(0.2 * noise, -0.5, 0.5)
    next_a = jnp.clip(next_a, -1, 1)
    mild = values(nets["q_target"], next_s, next_a).min(0)
    y = r + 0.99 * (1 - terminated) * (0.25 * mild + 0.75 * values(nets["v"], next_s))

    def critic_loss(p):
        return ((values(p, s, a) - y) ** 2).mean(1).sum()

    nets["q"], states["q"] = adam(critic_loss, nets["q"], states["q"])
    if not update_actor:
        return nets, states
    advantage = target_q - values(nets["v"], s)
    weight = jnp.minimum(jnp.exp(3 * advantage), 3)

    def actor_loss(p):
        pi = jnp.tanh(mlp(p, s))
        q = values(nets["q"], s, pi).min(0)
        penalty = (weight[:, None] * (pi - a) ** 2).mean()
        return -q.mean() / jax.lax.stop_gradient(jnp.abs(q).mean()) + 0.1 * penalty

    nets["pi"], states["pi"] = adam(actor_loss, nets["pi"], states["pi"])
    for name in ("pi", "q"):
        move = lambda target, p: target + 0.005 * (p - target)  # noqa: E731
        nets[f"{name}_target"] = tree.map(move, nets[f"{name}_target"], nets[name])
    return nets, states


@functools.partial(jax.jit, static_argnames="steps")
def train(nets, states, data, key, steps):
    """`steps` iterations, an even number: every second one moves the actor."""

    def two(carry, key):
        for update_actor in (False, True):
            key, subkey = jax.random.split(key)
            index = jax.random.randint(subkey, (256,), 0, len(data[2]))
            batch = [x[index] for x in data]
            noise = jax.random.normal(subkey, batch[1].shape)
            carry = update(*carry, batch, noise, update_actor)
        return carry, None

    return jax.lax.scan(two, (nets, states), jax.random.split(key, steps // 2))[0]
