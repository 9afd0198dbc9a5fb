"""Losses, weights and schedule against numbers worked out outside this project (numpy, float64)."""

import pytest
import torch

from dmg_offline import Args, actor_learning_rate, in_sample_value_loss

Q = [-2, -0.5, 0, 1, 20]
LOW = [-49.7, -19.7]  # all far below V: XQL's loss is scaled by e at most
XQL, SQL = {"in_sample": "xql"}, {"in_sample": "sql"}
K = "in_sample_temperature"


@pytest.mark.parametrize("q, settings, loss, gradient", [
    (Q, {"expectile": 0.7}, 54.7624, [0.276, 0.096, 0.036, -0.196, -5.516]),
    (Q, {"expectile": 0.9}, 70.0648, [0.092, 0.032, 0.012, -0.252, -7.092]),
    (Q, XQL | {K: 5}, 0.18123428, [0.00028683, 0.00011502, 0.0000453, -0.0001169, -0.03922207]),
    (Q, XQL | {K: 2}, 0.19865347, [0.00006231, 0.00003006, 0.0000127, -0.00003821, 0]),
    (LOW, XQL | {K: 5}, 16.33464621, [0.27181584, 0.26684948]),
    (Q, SQL | {K: 2}, 7.7825, [0.0575, 0.02, 0.0075, -0.0175, -0.4925]),
    (Q, SQL | {K: 5}, 2.5292, [0.0092, 0.0032, 0.0012, -0.0028, -0.0788]),
])  # fmt: skip
def test_value_loss_and_its_gradient_with_respect_to_v(q, settings, loss, gradient):
    q, expected = torch.tensor(q, dtype=torch.float64), torch.tensor(gradient, dtype=torch.float64)
    v = torch.full_like(q, 0.3, requires_grad=True)
    found = in_sample_value_loss(q, v, Args(**settings))
    assert found.item() == pytest.approx(loss, abs=1e-8)
    torch.testing.assert_close(torch.autograd.grad(found, v)[0], expected, rtol=0, atol=1e-8)


def test_actor_learning_rate_is_a_cosine_over_all_actor_updates():
    args = Args(gradient_steps=1000, policy_frequency=2, learning_rate=3e-4)
    assert actor_learning_rate(2, args) == 3e-4  # the first actor update
    assert actor_learning_rate(2 + 250, args) == pytest.approx(1.5e-4 * (1 + 0.5**0.5))
    assert 0 < actor_learning_rate(1000, args) < 1e-8  # the last one
    third = Args(gradient_steps=1500, policy_frequency=3)  # actor updates are counted, not steps
    for k in (1, 77, 500):
        assert actor_learning_rate(3 * k, third) == pytest.approx(actor_learning_rate(2 * k, args))
