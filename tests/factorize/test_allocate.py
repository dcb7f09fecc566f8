"""Ranks under one budget: the allocation itself, the gradients behind it, and factorize with both."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from fsvd_compile import LowRankLinear, factorize
from fsvd_compile.errors import FactorizeError
from fsvd_compile.factorize.allocate import Spectrum, allocate
from fsvd_compile.factorize.sensitivity import sensitivities


def falling(seed, size, scale=1.0):
    torch.manual_seed(seed)
    return (scale * torch.rand(size)).sort(descending=True).values


def spent(ranks, spectra):
    return sum(
        s.out_features * s.in_features if r is None else r * (s.out_features + s.in_features)
        for (name, s), r in zip(spectra.items(), ranks.values(), strict=True)
    )


def lost(ranks, spectra):
    return sum(
        0.0 if ranks[name] is None else s.weight * s.values[ranks[name] :].sum().item()
        for name, s in spectra.items()
    )


def test_nothing_under_the_budget_loses_less():
    """Against every combination, for equal costs a direction and far from break-even: greedy is then exact."""
    spectra = {name: Spectrum(falling(i, 6), 1.0 + i, 40, 40, 1) for i, name in enumerate("abc")}
    budget = 9 * 80
    ranks = allocate(spectra, budget, 1)
    assert spent(ranks, spectra) <= budget
    options = [dict(zip("abc", r, strict=True)) for r in itertools.product(range(1, 7), repeat=3)]
    best = min(lost(o, spectra) for o in options if spent(o, spectra) <= budget)
    assert lost(ranks, spectra) == pytest.approx(best)


def test_modules_that_matter_get_more_and_become_dense():
    values = falling(0, 32)
    spectra = {
        "much": Spectrum(values, 100.0, 32, 32, 4),
        "some": Spectrum(values, 1.0, 32, 32, 4),
        "none": Spectrum(values, 1e-9, 32, 32, 4),
    }
    ranks = allocate(spectra, int(0.6 * 3 * 32 * 32), 4)
    assert ranks["much"] is None
    assert ranks["some"] > ranks["none"] == 4
    assert all(r is None or r % 4 == 0 for r in ranks.values())
    assert spent(ranks, spectra) <= int(0.6 * 3 * 32 * 32)


def test_smallest_and_largest_budgets():
    spectra = {
        "a": Spectrum(falling(0, 5), 1.0, 5, 40, 2),
        "b": Spectrum(falling(1, 30), 1.0, 30, 30, 8),
    }
    assert allocate(spectra, 0, 8) == {"a": 2, "b": 8}
    assert allocate(spectra, 10**6, 8)["b"] is None


class Two(nn.Module):
    """Two layers and a loss that can be differentiated by hand."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def test_gradients_are_those_of_the_outputs():
    torch.manual_seed(0)
    model, batches = Two(), [torch.randn(4, 6), torch.randn(2, 6)]
    model.second.weight.requires_grad_(False)
    modules = {"first": model.first, "second": model.second}
    target = lambda model, x: model(x).square().sum()  # noqa: E731
    found = sensitivities(model, modules, batches, target, progress=False)
    squares = {"first": [], "second": []}
    for x in batches:
        hidden = model.first(x).detach().requires_grad_()
        out = F.linear(torch.tanh(hidden), model.second.weight)
        out.retain_grad()
        out.square().sum().backward()
        squares["first"].append(hidden.grad.square().flatten())
        squares["second"].append(out.grad.square().flatten())
    for name, parts in squares.items():
        assert found[name] == pytest.approx(torch.cat(parts).double().mean().item(), rel=1e-5)
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == [True, True, False]
    assert not model.first._forward_hooks and not model.first._forward_pre_hooks


@pytest.fixture(scope="module")
def trained():
    """A small language model that has learned something, so that its modules differ in weight."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = model(tokens(16), labels=None, use_cache=False).logits
        ids = optimizer_ids[-1]
        loss = F.cross_entropy(loss[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().state_dict(), config


optimizer_ids: list[torch.Tensor] = []


def tokens(count):
    """Sequences that count on by a step of their own."""
    start, step = torch.randint(0, 61, (count, 1)), torch.randint(1, 6, (count, 1))
    ids = (start + step * torch.arange(24)) % 61
    optimizer_ids.append(ids)
    return ids


def fresh(trained):
    state, config = trained
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(state)
    return model


@torch.no_grad()
def loss_of(model):
    torch.manual_seed(99)
    ids = tokens(64)
    return model(ids, labels=ids).loss.item()


def test_less_loss_for_the_same_parameters(trained):
    torch.manual_seed(1)
    batches = [tokens(8) for _ in range(6)]
    losses, sizes = {}, {}
    for allocation in ("uniform", "loss"):
        model = fresh(trained)
        report = factorize(
            model, 0.5, calibration=iter(batches), allocation=allocation, progress=False
        )
        losses[allocation], sizes[allocation] = loss_of(model), report.parameters_after
        if allocation == "loss":
            ranks = {m.rank for m in model.modules() if isinstance(m, LowRankLinear)}
            assert all(rank % 8 == 0 for rank in ranks) and len(ranks) > 1
            assert {m.name for m in report.modules}.isdisjoint(report.dense)
    dense = loss_of(fresh(trained))
    assert sizes["loss"] <= sizes["uniform"]
    assert losses["loss"] - dense < 0.67 * (losses["uniform"] - dense)


def test_it_is_deterministic_and_leaves_gradients_alone(trained):
    torch.manual_seed(1)
    batches = [{"input_ids": tokens(4), "attention_mask": torch.ones(4, 24, dtype=torch.long)}]
    models = [fresh(trained) for _ in range(2)]
    for model in models:
        factorize(model, 0.5, calibration=batches, allocation="loss", progress=False)
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
    for a, b in zip(*(m.state_dict().values() for m in models), strict=True):
        assert torch.equal(a, b)


def test_padding_has_no_loss(trained):
    torch.manual_seed(1)
    ids = tokens(4)
    mask = torch.ones_like(ids)
    mask[:, 20:] = 0
    noisy = ids.masked_fill(mask == 0, 3)
    model = fresh(trained)
    modules = {"q": model.model.layers[0].self_attn.q_proj}
    one, two = (
        sensitivities(
            model, modules, [{"input_ids": i, "attention_mask": mask}], None, progress=False
        )["q"]
        for i in (ids, noisy)
    )
    assert one == pytest.approx(two, rel=1e-4)


def test_a_model_without_a_loss_takes_one():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
    )
    model = BertModel(config).eval()
    ids = [torch.randint(0, 61, (2, 9))]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for bad, says in (
        (None, "gives no loss"),
        (lambda model, batch: 3.0, "returned float"),
        (lambda model, batch: torch.tensor(math.nan), "is nan"),
        (lambda model, batch: torch.tensor(1.0), "no gradient reached"),
        (lambda model, batch: 1 / 0, "cannot be computed: ZeroDivisionError"),
    ):
        with pytest.raises(FactorizeError, match=says):
            factorize(model, 0.5, calibration=ids, allocation="loss", loss=bad, progress=False)
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    mine = lambda model, batch: model(batch).last_hidden_state.square().mean()  # noqa: E731
    assert factorize(
        model, 0.5, calibration=ids, allocation="loss", loss=mine, progress=False
    ).modules


def test_bad_arguments(trained):
    with pytest.raises(FactorizeError, match="needs calibration"):
        factorize(fresh(trained), 0.5, allocation="loss")
    with pytest.raises(FactorizeError, match='"uniform" or "loss"'):
        factorize(fresh(trained), 0.5, allocation="best")
    with pytest.raises(FactorizeError, match="empty"):
        factorize(fresh(trained), 0.5, calibration=[], allocation="loss", progress=False)


def test_modules_without_gradient_keep_their_rank(trained):
    model = fresh(trained)
    model.model.unused = nn.Linear(40, 40)
    torch.manual_seed(1)
    factorize(model, 0.5, calibration=[tokens(4)], allocation="loss", progress=False)
    assert model.model.unused.rank == 10
