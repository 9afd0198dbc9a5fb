"""DMG's update as one would first write it in PyTorch: two critics, torch's Adam, every call its own. A yardstick."""

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F


def mlp(n_in: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(n_in, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, n_out)
    )  # fmt: skip


class PlainDMG:
    def __init__(self, state_dim: int, action_dim: int):
        self.actor, self.value = mlp(state_dim, action_dim), mlp(state_dim, 1)
        self.q1, self.q2 = mlp(state_dim + action_dim, 1), mlp(state_dim + action_dim, 1)
        self.actor_target, self.q1_target, self.q2_target = map(copy.deepcopy, (self.actor, self.q1, self.q2))
        adam = lambda *nets: torch.optim.Adam([p for net in nets for p in net.parameters()], lr=3e-4)  # noqa: E731
        self.actor_optimizer, self.value_optimizer = adam(self.actor), adam(self.value)
        self.q_optimizer = adam(self.q1, self.q2)

    def update(self, s, a, r, next_s, terminated, noise, update_actor: bool) -> None:
        sa = torch.cat([s, a], 1)
        with torch.no_grad():
            target_q = torch.min(self.q1_target(sa), self.q2_target(sa)).squeeze(1)
        u = target_q - self.value(s).squeeze(1)
        self.step(self.value_optimizer, ((0.7 - (u < 0).float()).abs() * u**2).mean())
        with torch.no_grad():
            next_a = (torch.tanh(self.actor_target(next_s)) + (0.2 * noise).clamp(-0.5, 0.5)).clamp(-1, 1)
            next_sa = torch.cat([next_s, next_a], 1)
            mild = torch.min(self.q1_target(next_sa), self.q2_target(next_sa)).squeeze(1)
            y = r + 0.99 * (1 - terminated) * (0.25 * mild + 0.75 * self.value(next_s).squeeze(1))
        self.step(self.q_optimizer, F.mse_loss(self.q1(sa).squeeze(1), y) + F.mse_loss(self.q2(sa).squeeze(1), y))
        if update_actor:
            pi = torch.tanh(self.actor(s))
            s_pi = torch.cat([s, pi], 1)
            q = torch.min(self.q1(s_pi), self.q2(s_pi)).squeeze(1)
            with torch.no_grad():
                target_q = torch.min(self.q1_target(sa), self.q2_target(sa)).squeeze(1)
                weight = torch.exp(3 * (target_q - self.value(s).squeeze(1))).clamp(max=3)
            penalty = (weight.unsqueeze(1) * (pi - a) ** 2).mean()
            self.step(self.actor_optimizer, -q.mean() / q.abs().mean().detach() + 0.1 * penalty)
            for net, target in (
                (self.actor, self.actor_target),
                (self.q1, self.q1_target),
                (self.q2, self.q2_target),
            ):
                for p, t in zip(net.parameters(), target.parameters(), strict=True):
                    t.data.copy_(0.005 * p.data + 0.995 * t.data)

    def step(self, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
