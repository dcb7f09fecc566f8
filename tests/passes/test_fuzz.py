"""Random small programs, with and without the pipeline: values, mutated inputs, and what shares memory must agree.

A program is a list of steps on a growing list of values. In-place writes, views, repeated readers and shared weights
are as likely as what the rewrites look for, so most programs are near misses of something. Everything runs in
fp64, where a reordered sum is not mistaken for a wrong one.
"""

from __future__ import annotations

import os
import random
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from harness import FUSIONS, rewrite

D, LATENTS, LEAD = 10, (2, 3), (3, 5)
BATCHES, PROGRAMS = 10, int(os.environ.get("FSVD_FUZZ", "100"))


def weights(generator: torch.Generator) -> dict[str, torch.Tensor]:
    def make(*size: int) -> torch.Tensor:
        value = torch.randn(*size, dtype=torch.float64, generator=generator) / size[-1] ** 0.5
        return torch.nn.Parameter(value, requires_grad=False)

    pool = {f"v{i}": make(r, D) for i, r in enumerate(LATENTS)}
    pool |= {f"u{i}{j}": make(D, r) for i, r in enumerate(LATENTS) for j in range(2)}
    pool |= {f"d{i}": make(D, D) for i in range(2)} | {f"b{i}": make(D) for i in range(2)}
    pool |= {f"c{i}": make(r) for i, r in enumerate(LATENTS)}
    return pool | {"g": make(D), "row": make(1, D), "full": make(*LEAD, D)}


# Steps that make a value out of values a, b; `n` picks a variant.
def low_rank(a, b, w, n):
    i, j = n % 2, n // 2 % 2
    v, u = w[f"v{i}"], w[f"u{i}{j}"]
    spelled = n // 4 % 7
    if spelled == 0:
        return F.linear(F.linear(a, v), u)
    if spelled == 1:
        return F.linear(F.linear(a, v, w[f"c{i}"]), u, w["b0"])
    if spelled == 2:
        return a @ v.T @ u.t()
    if spelled == 3:
        return F.linear(a.reshape(-1, D), v).view(*a.shape[:-1], -1) @ u.T + w["b1"]
    if spelled == 4:
        return a @ (u @ v).T
    if spelled == 5:
        return a + F.linear(F.linear(a, v), u)
    z = F.linear(a, v)
    return F.linear(z, u) + F.linear(z, w[f"u{i}{1 - j}"]) if n % 3 else F.linear(F.silu(z), u)


def siblings(a, b, w, n):
    q, k = (
        F.linear(F.linear(a, w["v0"]), w["u00"]),
        F.linear(F.linear(a, w["v1"]), w["u10"], w["b0"]),
    )
    if n % 5 == 0:
        q.mul_(2)
    if n % 5 == 1:
        a.add_(0.5)
    v = F.linear(a, w["d0"]) if n % 2 else F.linear(F.linear(a, w["v0"]), w["u01"])
    if n % 5 == 2:
        k += q
    return torch.cat((q, k, v), -1).unflatten(-1, (3, D)).sum(-2) if n % 3 else q * k + v


def gated(a, b, w, n):
    act = (F.silu, F.gelu, F.relu, lambda x: x * torch.sigmoid(x))[n % 4]
    gate, up = F.linear(F.linear(a, w["v0"]), w["u00"]), F.linear(F.linear(a, w["v1"]), w["u11"])
    if n // 4 % 4 == 1:
        return act(gate) * up + gate
    return act(gate) * up if n // 4 % 2 else up * act(gate)


def dense(a, b, w, n):
    return F.linear(a, w[f"d{n % 2}"], w["b0"] if n % 3 == 0 else None)


def add(a, b, w, n):
    other = (b, b, b, w["g"], w["row"], w["full"], 1.5)[n % 7]
    if n % 11 == 0:
        return torch.add(a, b, alpha=2)
    return a + other if n % 2 or n % 7 == 6 else other + a


def norm(a, b, w, n):
    if n % 3 == 0:
        return F.layer_norm(a, (D,), w["g"], w["b0"] if n % 2 else None)
    if n % 3 == 1:
        return F.rms_norm(a, (D,), w["g"], 1e-6)
    return w["g"] * (a * torch.rsqrt(a.pow(2).mean(-1, keepdim=True) + 1e-6))


def normed_block(a, b, w, n):
    y = norm(a, b, w, n)
    if n % 5 == 0:
        a.mul_(0.5)
    out = F.linear(F.linear(y, w["v0"]), w["u00"])
    return out + (y if n % 7 == 0 else a)


def activation(a, b, w, n):
    return (
        F.silu,
        F.relu,
        torch.tanh,
        F.gelu,
        lambda x: F.relu(x, inplace=True),
        lambda x: torch.relu_(x),
    )[n % 6](a)


def view(a, b, w, n):
    return (
        lambda x: x.reshape(-1, D).view(*LEAD, D),
        lambda x: x.transpose(0, 1).reshape(-1, D).view(*LEAD, D),
        lambda x: x.transpose(0, 1).contiguous().view(*LEAD, D),
        lambda x: x.contiguous(),
        lambda x: x.to(torch.float64),
        lambda x: x.to(torch.float64, copy=True),
        lambda x: F.dropout(x, 0.5, training=False),
        lambda x: x.flatten(0, 1).unflatten(0, LEAD),
        lambda x: x.transpose(0, 2).transpose(0, 2),
        lambda x: x[:],
        lambda x: torch.cat(x.chunk(2, -1)[::-1], -1),
        lambda x: x.narrow(-1, 0, D // 2).repeat(1, 1, 2),
        lambda x: x[:1].expand(*LEAD, D),
        lambda x: x.unsqueeze(0).squeeze(0),
    )[n % 14](a)


def write(a, b, w, n):
    """In place; the value returned is what was written."""
    if n % 9 == 0:
        return a.add_(b)
    if n % 9 == 1:
        a += w["g"]
        return a
    if n % 9 == 2:
        a[0] = 0.25
        return a
    if n % 9 == 3:
        a.view(-1, D)[1].mul_(0.5)
        return a
    if n % 9 == 4:
        return a.relu_()
    if n % 9 == 5:
        w[("v0", "u00", "d0", "g", "b0")[n % 5]].mul_(0.9)
        return a
    if n % 9 == 6:
        left, right = a.chunk(2, -1)
        left.mul_(0.5)
        return torch.cat((right, left), -1)
    if n % 9 == 7:
        torch.mul(b, 0.5, out=a)
        return a
    return a.copy_(b)


STEPS = (low_rank, siblings, gated, dense, add, norm, normed_block, activation, view, write)
OFTEN = (5, 3, 2, 2, 5, 1, 2, 2, 4, 3)


def program(seed: int):
    rng = random.Random(seed)
    steps = []
    for i in range(rng.randint(3, 9)):
        # Mostly the newest values, so that chains form.
        pick = lambda i=i: max(0, i + 1 - int(rng.expovariate(0.8)))  # noqa: E731
        steps.append((rng.choices(STEPS, OFTEN)[0], pick(), pick(), rng.randrange(10_000)))
    returned = sorted(
        {len(steps), *(rng.randrange(len(steps) + 1) for _ in range(rng.randint(0, 2)))}
    )

    def fn(x, y, w):
        values = [x, y]
        for step, a, b, n in steps:
            values.append(step(values[a], values[b], w, n))
        return [values[i + 1] for i in returned]

    return fn, [(step.__name__, a, b, n) for step, a, b, n in steps]


def run_program(seed: int) -> Counter[str] | None:
    """Matches per fusion; None for programs that eager refuses (a write into expanded memory)."""
    fn, steps = program(seed)
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(*LEAD, D, dtype=torch.float64, generator=generator) for _ in range(2))
    pool = weights(generator)
    try:
        fn(x.clone(), y.clone(), {k: v.clone() for k, v in pool.items()})
    except RuntimeError:
        return None
    lowered, device = seed % 3 == 0, "cuda" if seed % 2 else "cpu"
    try:
        result = rewrite(fn, x, y, pool, limit=1e-10, device=device, lowered=lowered)
    except Exception as error:
        raise AssertionError(f"seed {seed}: {steps}") from error
    return Counter(result.only(*FUSIONS))


@pytest.mark.parametrize("batch", range(BATCHES))
def test_random_programs(batch):
    total, ran = Counter(), 0
    for seed in range(batch, PROGRAMS, BATCHES):
        found = run_program(seed)
        ran += found is not None
        total += found or Counter()
    assert ran > 0 and sum(total.values()) > 0  # the generator has not gone blind
