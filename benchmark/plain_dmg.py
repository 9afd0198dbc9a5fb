"""DMG's update as one would first write it in PyTorch: two critics, torch's Adam, every call its own."""

import copy

import torch
from torch import nn


def mlp(n_in, n_out):
    first, second = nn.Linear(n_in, 256), nn.Linear(256, 256)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(256, n_out))


def q_min(critic, s, a):
    sa = torch.cat([s, a], 1)
    q1, q2 = (q(sa) for q in critic)
    return torch.min(q1, q2).squeeze(1)


class PlainDMG:
    def __init__(self, state_dim, action_dim):
        self.actor = nn.Sequential(mlp(state_dim, action_dim), nn.Tanh())
        self.value = mlp(state_dim, 1)
        self.critic = nn.ModuleList([mlp(state_dim + action_dim, 1) for _ in range(2)])
        self.actor_target = copy.deepcopy(self.actor)
        self.critic_target = copy.deepcopy(self.critic)
        nets = self.actor, self.value, self.critic
        self.optimizers = {net: torch.optim.Adam(net.parameters(), lr=3e-4) for net in nets}

    def minimize(self, net, loss):
        self.optimizers[net].zero_grad()
        loss.backward()
        self.optimizers[net].step()

    def update(self, batch, noise, update_actor):
        s, a, r, next_s, terminated = batch
        with torch.no_grad():
            target_q = q_min(self.critic_target, s, a)
        u = target_q - self.value(s).squeeze(1)
        self.minimize(self.value, ((0.7 - (u < 0).float()).abs() * u**2).mean())
        with torch.no_grad():
            next_a = self.actor_target(next_s) + (0.2 * noise).clamp(-0.5, 0.5)
            mild = q_min(self.critic_target, next_s, next_a.clamp(-1, 1))
            y = r + 0.99 * (1 - terminated) * (0.25 * mild + 0.75 * self.value(next_s).squeeze(1))
        sa = torch.cat([s, a], 1)
        self.minimize(self.critic, sum(((q(sa).squeeze(1) - y) ** 2).mean() for q in self.critic))
        if update_actor:
            pi = self.actor(s)
            q = q_min(self.critic, s, pi)
            with torch.no_grad():
                advantage = target_q - self.value(s).squeeze(1)
                weight = torch.exp(3 * advantage).clamp(max=3)
            penalty = (weight.unsqueeze(1) * (pi - a) ** 2).mean()
            self.minimize(self.actor, -q.mean() / q.abs().mean().detach() + 0.1 * penalty)
            self.move(self.actor, self.actor_target)
            self.move(self.critic, self.critic_target)

    def move(self, net, target):
        for p, t in zip(net.parameters(), target.parameters(), strict=True):
            t.data.copy_(0.005 * p.data + 0.995 * t.data)
