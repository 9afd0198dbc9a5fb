"""Theorems 2 to 4 of the paper on random tabular MDPs. Each check must fail on wrong versions."""

from functools import partial, reduce
from types import SimpleNamespace

import numpy as np
import pytest

MDPS, STATES, STEPS, K0 = 20, 6, 40, 2.0
LAMS, GAMMAS = (0.0, 0.25, 0.5, 1.0), (0.5, 0.9, 0.99)
OWNER = np.array([0, 1, 2, 0, 0, 1, 1, 2, 2])  # columns: three dataset actions, two mild ones around each


def random_mdps(seed=0):
    """1 to 3 dataset actions a state, two mild ones within eps of each (Eq. 5)."""
    rng = np.random.default_rng(seed)
    radius = rng.uniform(0.01, 0.5, (MDPS, 1, 1)) * rng.random((MDPS, STATES, 6))
    x = (rng.uniform(-1, 1, (MDPS, STATES, 3, 2)) @ [1, 1j])[:, :, OWNER]  # actions in the plane
    x[:, :, 3:] += radius * np.exp(2j * np.pi * rng.random((MDPS, STATES, 6)))
    mild = rng.integers(1, 4, (MDPS, STATES, 1)) > OWNER  # false: the column is unused
    data, distance = mild & (np.arange(9) < 3), abs(x[:, :, :, None] - x[:, :, None])
    to_data = np.where(data[:, :, None], distance, np.inf)
    eps = np.where(mild, to_data.min(-1), 0).max((1, 2))  # the smallest
    p, r = rng.dirichlet(np.full(STATES, 0.3), (MDPS, STATES, 9)), rng.random((MDPS, STATES, 9))
    return SimpleNamespace(p=p, r=r, data=data, mild=mild, distance=distance, to_data=to_data, eps=eps)


RANDOM = random_mdps()
RANDOM_Q = np.random.default_rng(2).normal(0, 10, (2, MDPS, STATES, 9))


def dmg(m, q, lam, gamma, rest=None):
    """Eq. 6; lam = 0 is Eq. 7, the in-sample operator. The last one is for a wrong one."""
    mild, data = (np.where(actions, q, -np.inf).max(-1) for actions in (m.mild, m.data))
    v = lam * mild + (1 - lam if rest is None else rest) * data
    return m.r + gamma * np.einsum("bsat,...bt->...bsa", m.p, v)


WRONG = {
    "gamma too large": lambda m, q, lam, g: dmg(m, q, lam, 1.1 * g),
    "lam halved": lambda m, q, lam, g: dmg(m, q, lam / 2, g),
    "lam swapped": lambda m, q, lam, g: dmg(m, q, 1 - lam, g),
    "weights lam, 1": partial(dmg, rest=1),
    "weights -lam, 1+lam": lambda m, q, lam, g: dmg(m, q, -lam, g),
}


def check_contraction(operator, gamma):
    """Theorem 2: ||T Q1 - T Q2|| <= gamma ||Q1 - Q2||, with equality where they differ by a constant."""
    norm = lambda q: np.where(RANDOM.mild, abs(q), 0).max((-1, -2))  # noqa: E731  on the mild area
    q, other = RANDOM_Q
    for lam in LAMS:
        for difference in (other, 0.1 * other, abs(other)):
            change = operator(RANDOM, q + difference, lam, gamma) - operator(RANDOM, q, lam, gamma)
            assert (norm(change) <= gamma * norm(difference) + 1e-12).all()
        change = operator(RANDOM, q - 3, lam, gamma) - operator(RANDOM, q, lam, gamma)
        assert (norm(change + 3 * gamma) < 1e-12).all()


def greedy(q, area, gamma):
    """Of the policy that is greedy in q within the area: q, and the true value (I - gamma P)^-1 R."""
    pi = np.where(area, q, -np.inf).argmax(-1)[..., None]
    r, p = np.take_along_axis(RANDOM.r, pi, 2), np.take_along_axis(RANDOM.p, pi[..., None], 2)[:, :, 0]
    return np.take_along_axis(q, pi, 2)[..., 0], np.linalg.solve(np.eye(STATES) - gamma * p, r)[..., 0]


def check_performance(operator, gamma):
    """Theorem 3: V^pi_DMG >= Q*_lam(s, pi_DMG(s)) >= V^pi_In, the first with equality for lam = 1 only."""
    steps = range(int(np.log(1e-13) / np.log(gamma)))
    stars = {x: reduce(lambda q, _, x=x: operator(RANDOM, q, x, gamma), steps, 0 * RANDOM.r) for x in LAMS}
    _, v_in = greedy(stars[0], RANDOM.data, gamma)
    for lam, star in stars.items():
        q_dmg, v_dmg = greedy(star, RANDOM.mild, gamma)
        assert (v_dmg >= q_dmg - 1e-10).all() and (q_dmg >= v_in - 1e-10).all()
        assert (v_dmg - q_dmg).max() > 1e-2 if lam < 1 else (v_dmg - q_dmg).max() < 1e-10
        assert (v_dmg - v_in).max() > 1e-2 and (q_dmg - v_in).max() > 1e-2  # strictly better somewhere


def bound(lam, eps, k_q, gamma, k):
    """What Eq. 9 adds to Q_In^k."""
    return lam * eps * k_q * gamma / (1 - gamma) * (1 - gamma**k)


def overestimation(m, operator, lam, gamma, start):
    """Q^k - Q_In^k and its bound, k = 1...STEPS. What T does not know rises by K0 a unit from the data."""
    run = np.where(m.mild[:, :, None] & m.mild[..., None] & (m.distance > 0), m.distance, np.inf)
    q = q_in = start + np.zeros_like(m.r)
    k_q, gaps = np.zeros(MDPS), []
    for _ in range(STEPS):
        q = np.where(m.data, q, (q[:, :, None] + K0 * m.to_data).min(-1))
        k_q = np.maximum(k_q, (abs(q[:, :, None] - q[..., None]) / run).max((1, 2, 3)))  # measured, not K0
        q, q_in = operator(m, q, lam, gamma), operator(m, q_in, 0.0, gamma)
        gaps.append(np.where(m.data, q - q_in, 0))
    return np.array(gaps), bound(lam, m.eps, k_q, gamma, np.arange(1, STEPS + 1)[:, None])[..., None, None]


def check_overestimation(operator, gamma):
    """Theorem 4: 0 <= Q^k - Q_In^k <= the bound, from zero and from any other start."""
    for lam in LAMS:
        for start in (0.0, RANDOM_Q[0]):
            gap, limit = overestimation(RANDOM, operator, lam, gamma, start)
            assert (gap >= -1e-10).all() and (gap <= limit + 1e-10).all()
            assert (gap.max() > 1e-2) == (lam > 0)  # or nothing would be shown


CHECKS = {check_performance: list(WRONG)}  # each with wrong operators that it notices
CHECKS[check_contraction] = ["gamma too large", "weights lam, 1", "weights -lam, 1+lam"]
CHECKS[check_overestimation] = ["weights lam, 1", "gamma too large"]
MISTAKES = {f"{c.__name__}: {x}": partial(c, WRONG[x]) for c, wrongs in CHECKS.items() for x in wrongs}


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("check", CHECKS)
def test_theorem(check, gamma):
    check(dmg, gamma)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_noticed(mistake):
    with pytest.raises(AssertionError):
        MISTAKES[mistake](gamma=0.9)
