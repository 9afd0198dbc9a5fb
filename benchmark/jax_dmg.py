"""DMG's update in JAX, jit and scan: the yardstick of throughput.py, nothing else. The same networks and arithmetic."""

import functools
import math

import jax
import jax.numpy as jnp

GAMMA, LAM, NU, EXPECTILE, TEMPERATURE, MAX_WEIGHT, XI, LR = 0.99, 0.25, 0.1, 0.7, 3.0, 3.0, 0.005, 3e-4


def init(key, n_in, n_out, twins=()):
    sizes, layers = ((n_in, 256), (256, 256), (256, n_out)), []
    for k, (i, o) in zip(jax.random.split(key, 3), sizes, strict=True):
        layers.append(
            [jax.random.uniform(k, (*twins, *s), minval=-(i**-0.5), maxval=i**-0.5) for s in ((i, o), (1, o))]
        )
    return layers


def mlp(layers, x):
    for w, b in layers[:-1]:
        x = jax.nn.relu(x @ w + b)
    w, b = layers[-1]
    return x @ w + b


def actor(p, s):
    return jnp.tanh(mlp(p, s))


def value(p, s):
    return mlp(p, s)[..., 0]


def critic(p, s, a):
    return mlp(p, jnp.concatenate([s, a], -1))[..., 0]  # (2, B)


def adam(p, g, state):
    m, v, t = state
    t = t + 1
    m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, g)
    v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, v, g)
    scale, size = jnp.sqrt(1 - 0.999**t), LR / (1 - 0.9**t)
    return jax.tree.map(lambda p, m, v: p - size * m / (jnp.sqrt(v) / scale + 1e-8), p, m, v), (m, v, t)


def start(key, state_dim, action_dim):
    k1, k2, k3 = jax.random.split(key, 3)
    nets = {"pi": init(k1, state_dim, action_dim), "v": init(k2, state_dim, 1)}
    nets["q"] = init(k3, state_dim + action_dim, 1, (2,))
    zeros = lambda name: jax.tree.map(jnp.zeros_like, nets[name])  # noqa: E731
    opts = {name: (zeros(name), zeros(name), jnp.zeros(())) for name in nets}
    copies = {name + "_target": jax.tree.map(jnp.copy, nets[name]) for name in ("pi", "q")}
    return nets | copies, opts


def update(nets, opts, batch, noise, update_actor):
    s, a, r, s2, terminated = batch
    target_q = critic(nets["q_target"], s, a).min(0)

    def value_loss(p):
        u = target_q - value(p, s)
        return (jnp.abs(EXPECTILE - (u < 0)) * u**2).mean()

    v, opt_v = adam(nets["v"], jax.grad(value_loss)(nets["v"]), opts["v"])
    a2 = jnp.clip(actor(nets["pi_target"], s2) + jnp.clip(0.2 * noise, -0.5, 0.5), -1, 1)
    y = r + GAMMA * (1 - terminated) * (LAM * critic(nets["q_target"], s2, a2).min(0) + (1 - LAM) * value(v, s2))
    q, opt_q = adam(nets["q"], jax.grad(lambda p: ((critic(p, s, a) - y) ** 2).mean(1).sum())(nets["q"]), opts["q"])
    nets, opts = nets | {"v": v, "q": q}, opts | {"v": opt_v, "q": opt_q}
    if update_actor:
        weight = jnp.exp(jnp.minimum(TEMPERATURE * (target_q - value(v, s)), math.log(MAX_WEIGHT)))

        def actor_loss(p):
            pi = actor(p, s)
            q_pi = critic(q, s, pi).min(0)
            scale = jax.lax.stop_gradient(jnp.abs(q_pi).mean())
            return -q_pi.mean() / scale + NU * (weight[:, None] * (pi - a) ** 2).mean()

        pi, opt_pi = adam(nets["pi"], jax.grad(actor_loss)(nets["pi"]), opts["pi"])
        nets, opts = nets | {"pi": pi}, opts | {"pi": opt_pi}
        for name in ("pi", "q"):
            nets[name + "_target"] = jax.tree.map(lambda t, p: t + XI * (p - t), nets[name + "_target"], nets[name])
    return nets, opts


@functools.partial(jax.jit, static_argnames=("steps", "batch_size"), donate_argnums=(0, 1))
def train(nets, opts, data, key, steps, batch_size=256):
    """`steps` iterations, an even number: every second one moves the actor."""

    def two(carry, key):
        nets, opts = carry
        for k, update_actor in zip(jax.random.split(key), (False, True), strict=True):
            index = jax.random.randint(k, (batch_size,), 0, len(data[2]))
            noise = jax.random.normal(k, (batch_size, data[1].shape[1]))
            nets, opts = update(nets, opts, [x[index] for x in data], noise, update_actor)
        return (nets, opts), None

    return jax.lax.scan(two, (nets, opts), jax.random.split(key, steps // 2))[0]
