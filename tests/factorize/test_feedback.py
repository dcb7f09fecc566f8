"""Error feedback and refinement: each factor is the optimum behind the layers before it, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from harness import assert_close
from test_factorize import Unchanged, tiny_llama, tokens
from torch import nn

from fsvd_compile.errors import FactorizeError
from fsvd_compile.factorize import Refine, factorize
from fsvd_compile.factorize import feedback as feedback_module
from fsvd_compile.factorize.closed_form import best_factors
from fsvd_compile.factorize.feedback import Moments, corrected, error_of
from fsvd_compile.factorize.select import oriented_weight
from fsvd_compile.factorized import LowRankLinear

transformers = pytest.importorskip("transformers")


def moments_of(weight, old, new):
    """Of two folds of tokens, `[tokens, in]` each, written down directly."""
    moments = Moments()
    for fold, (x, y) in enumerate(zip(old, new, strict=True)):
        x, y = x.double(), y.double()
        moments.add(fold, y.T @ y, (x - y).T @ y)
        moments.tokens += len(x)
        moments.output += (x @ weight.T).square().sum().item()
        moments.drift += ((x - y) @ weight.T).square().sum().item()
    return moments


def drifted(tokens, size=12, out=9, noise=0.1):
    """A weight, and inputs before and after a linear change with some noise, in two folds."""
    weight = torch.randn(out, size, dtype=torch.float64)
    change = torch.eye(size, dtype=torch.float64) + 0.3 * torch.randn(size, size).double()
    new = [torch.randn(tokens, size, dtype=torch.float64) for _ in range(2)]
    return weight, [y @ change + noise * torch.randn(tokens, size).double() for y in new], new


@pytest.mark.parametrize("rank", [2, 5])
def test_is_the_objective_of_aa_svd(monkeypatch, rank):
    """M = W X X'^T L'^-T and W_k = SVD_k(M) L'^-1, as the paper writes it, without damping."""
    monkeypatch.setattr(feedback_module, "DAMPING", (0.0,))
    weight, old, new = drifted(50)
    moments = moments_of(weight, old, new)
    x, y = torch.cat(old).T, torch.cat(new).T
    factor = torch.linalg.cholesky(y @ y.T)
    middle = weight @ x @ y.T @ torch.linalg.inv(factor).T
    u, s, vh = torch.linalg.svd(middle, full_matrices=False)
    expected = (u[:, :rank] * s[:rank]) @ vh[:rank] @ torch.linalg.inv(factor)
    better, damping = corrected(weight, moments)
    ours = best_factors(better, moments.covariance(), rank)
    assert damping == 0
    torch.testing.assert_close(ours.u @ ours.v, expected, rtol=0, atol=1e-9)
    plain = best_factors(weight, moments.covariance(), rank)
    assert error_of(weight, ours.u @ ours.v, moments) < error_of(weight, plain.u @ plain.v, moments)


def test_error_is_what_it_says():
    weight, old, new = drifted(30)
    approximation = torch.randn_like(weight)
    x, y = torch.cat(old), torch.cat(new)
    direct = (x @ weight.T - y @ approximation.T).norm() / (x @ weight.T).norm()
    measured = error_of(weight, approximation, moments_of(weight, old, new))
    assert measured == pytest.approx(direct.item(), rel=1e-9)


def test_damping_is_measured():
    """Little where tokens are many, more where they are few; none where there is nothing to learn."""
    many, few = (corrected(w, moments_of(w, old, new)) for w, old, new in
                 (drifted(4000, noise=1.0), drifted(14, noise=1.0)))  # fmt: skip
    assert many.damping <= 1e-3
    assert few.damping is None or few.damping > many.damping
    weight, _, new = drifted(30)
    same = corrected(weight, moments_of(weight, new, new))
    assert same.weight is weight and same.damping is None
    noise = [y + torch.randn_like(y) for y in new]  # x = x' + what x' says nothing of
    chance = corrected(weight, moments_of(weight, noise, new))
    fresh = torch.randn(5000, 12, dtype=torch.float64)
    assert (fresh @ (chance.weight - weight).T).norm() < 0.5 * (fresh @ weight.T).norm()


def test_singular_moments():
    """Fewer tokens than features, dead channels, no tokens at all in a fold."""
    weight, old, new = drifted(3)
    for x in (*old, *new):
        x[:, 4] = 0
    better, _ = corrected(weight, moments_of(weight, old, new))
    assert torch.isfinite(better).all()
    torch.testing.assert_close(better[:, 4], weight[:, 4])  # nothing is known of a dead channel
    zero = [torch.zeros_like(x) for x in new]
    assert corrected(weight, moments_of(weight, old, zero)).damping is None


def recorded(model, names, batches):
    """What the named modules are called with, by name and batch, without padding."""
    seen = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen[name].append(args[0].detach())
        )
        for name in names
    ]
    with torch.no_grad():
        for batch in batches:
            kwargs = batch if isinstance(batch, dict) else {"input_ids": batch}
            model(**kwargs)
    for handle in handles:
        handle.remove()
    masks = [batch.get("attention_mask") if isinstance(batch, dict) else None for batch in batches]
    return {
        name: [
            x.flatten(0, -2) if mask is None else x[mask.bool()]
            for x, mask in zip(inputs, masks, strict=True)
        ]
        for name, inputs in seen.items()
    }


def gpt2():
    config = transformers.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=64, n_positions=32)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def bert():
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=64,
    )
    return transformers.BertForMaskedLM(config).eval()


def padded(count=4):
    batches = []
    for index in range(count):
        mask = torch.ones(2, 9, dtype=torch.long)
        mask[1, 5 + index % 3 :] = 0
        batches.append({"input_ids": torch.randint(0, 64, (2, 9)), "attention_mask": mask})
    return batches


MODELS = {"llama": lambda: tiny_llama(num_hidden_layers=3), "gpt2": gpt2, "bert": bert}


@pytest.mark.parametrize("select", [None, ["*q_proj", "*up_proj", "*c_attn", "*dense", "*query"]])
@pytest.mark.parametrize("batches", ["tokens", "padded", "one"])
@pytest.mark.parametrize("family", list(MODELS))
def test_every_factor_is_the_optimum_behind_the_ones_before(family, batches, select):
    """Inputs depend on what lies before only, so the finished model shows what each was fitted to."""
    model = MODELS[family]()
    dense = copy.deepcopy(model)
    data = {"tokens": tokens(4), "padded": padded(), "one": tokens(1, (4, 12))}[batches]
    if select is not None:
        names = [name for name, _ in model.named_modules()]
        select = [p for p in select if any(n.endswith(p[1:]) for n in names)]
    report = factorize(model, 0.6, calibration=data, feedback=True, select=select, progress=False)
    inside = [m for m in report.modules if m.feedback]
    assert inside and all(".predictions." in m.name for m in report.modules if not m.feedback)
    names = [m.name for m in inside]
    old, new = recorded(dense, names, data), recorded(model, names, data)
    for entry in inside:
        weight = oriented_weight(dense.get_submodule(entry.name)).double()
        x, y = old[entry.name], new[entry.name]
        if len(data) > 1:
            x, y = ([torch.cat(part[fold::2]) for fold in (0, 1)] for part in (x, y))
        else:
            x, y = (part[0].split(len(part[0]) // 2) for part in (x, y))
        moments = moments_of(weight, x, y)
        better, damping = corrected(weight, moments)
        u, v, _ = best_factors(better, moments.covariance(), entry.rank)
        made = model.get_submodule(entry.name)
        assert entry.damping == damping and entry.tokens == moments.tokens
        assert_close(entry.name, made.dense_weight(), u @ v, 1e-3)
        assert entry.error == pytest.approx(error_of(weight, u @ v, moments), rel=1e-3, abs=1e-4)
        if (bias := dense.get_submodule(entry.name).bias) is not None:
            assert torch.equal(made.u.bias, bias)
    state = model.state_dict()
    for name, tensor in dense.state_dict().items():
        assert name not in state or torch.equal(state[name], tensor), name


def predictable():
    """A model whose inputs have a spectrum, and enough tokens to learn from."""
    model = tiny_llama(num_hidden_layers=4, attention_bias=False)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(torch.logspace(0.5, -2, 32))
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.mul_(6)
    return model, tokens(8, (8, 16))


@torch.no_grad()
def output_error(model, dense, batches):
    pairs = [(model.model(b).last_hidden_state, dense.model(b).last_hidden_state) for b in batches]
    return sum((a - b).square().sum() for a, b in pairs).sqrt().item()


def test_better_than_without_and_refinement_better_still():
    dense, batches = predictable()
    fresh = tokens(4, (8, 16))
    errors, held_out = [], []
    for options in ({}, {"feedback": True}, {"feedback": True, "refine": Refine(60, 3e-3)}):
        model = copy.deepcopy(dense)
        report = factorize(model, 0.5, calibration=batches, progress=False, **options)
        errors.append(output_error(model, dense, batches))
        held_out.append(output_error(model, dense, fresh))
    assert errors[0] > errors[1] > errors[2]
    assert held_out[0] > held_out[1] > held_out[2]
    assert len(report.layers) == 4 and all(r.after <= r.before for r in report.layers)
    better = sum(r.after < r.before for r in report.layers)
    assert better >= 2 and f"refined: {better} of 4 layers" in str(report)
    assert "feedback: 28 of 28 modules" in str(report)


def test_refinement_trains_factors_alone_and_repeats():
    dense, batches = predictable()
    rng = torch.get_rng_state()
    models = [copy.deepcopy(dense) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        options = {"feedback": True, "refine": Refine(5, 1e-3, seed=seed)}
        factorize(model, 0.5, calibration=batches, progress=False, **options)
    assert torch.equal(torch.get_rng_state(), rng)
    first, second, other = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    for name, tensor in dense.state_dict().items():
        assert name not in first or torch.equal(first[name], tensor)
    assert all(p.grad is None and p.requires_grad for p in models[0].parameters())


def test_a_refinement_that_does_harm_is_dropped():
    dense, batches = predictable()
    plain, harmed = copy.deepcopy(dense), copy.deepcopy(dense)
    factorize(plain, 0.5, calibration=batches, feedback=True, progress=False)
    report = factorize(
        harmed, 0.5, calibration=batches, feedback=True, refine=Refine(3, 1e3), progress=False
    )
    assert all(layer.before == layer.after for layer in report.layers)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, harmed.state_dict()[name]), name
    assert "refined: 0 of 4 layers" in str(report)


def test_batches_of_padding_alone_are_left_out_of_refinement():
    dense, batches = predictable()
    given = [{"input_ids": b, "attention_mask": torch.ones_like(b)} for b in batches]
    nothing = {"input_ids": batches[0], "attention_mask": torch.zeros_like(batches[0])}
    options = {"feedback": True, "refine": Refine(20, 1e-3), "progress": False}
    expected = factorize(copy.deepcopy(dense), 0.5, calibration=given, **options)
    report = factorize(copy.deepcopy(dense), 0.5, calibration=[*given, nothing], **options)
    assert report.layers == expected.layers
    assert any(layer.after < layer.before for layer in report.layers)
    with Unchanged(dense), pytest.raises(FactorizeError, match="of 2 given 1 have any"):
        factorize(dense, 0.5, calibration=[given[0], nothing], **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    dense, batches = predictable()
    dense.to(dtype)
    report = factorize(
        dense, 0.5, calibration=batches, feedback=True, refine=Refine(20, 1e-3), progress=False
    )
    assert {p.dtype for p in dense.parameters()} == {dtype}
    assert any(layer.after < layer.before for layer in report.layers)


def test_allocation_sees_the_same_covariances():
    dense, batches = predictable()
    ranks = []
    for feedback in (False, True):
        report = factorize(
            copy.deepcopy(dense), 0.5, calibration=batches, allocation="loss",
            feedback=feedback, progress=False,
        )  # fmt: skip
        ranks.append({m.name: m.rank for m in report.modules})
    assert ranks[0] == ranks[1] and len(set(ranks[0].values())) > 1


def test_inside_inference_mode():
    dense, batches = predictable()
    twin = copy.deepcopy(dense)
    options = {"feedback": True, "refine": Refine(5, 1e-3), "progress": False}
    factorize(twin, 0.5, calibration=batches, **options)
    with torch.inference_mode():
        factorize(dense, 0.5, calibration=[batch.clone() for batch in batches], **options)
    for a, b in zip(dense.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b) and not a.is_inference()


class Layer(nn.Module):
    """With a branch that only some tokens take."""

    def __init__(self, routed):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.routed = routed

    def forward(self, x, scale=None):
        y = torch.tanh(self.first(x))
        if not self.routed:
            return x + self.second(y)
        chosen = y[..., 0] > 0
        out = x + y
        out[chosen] += self.second(y[chosen])
        return out


class Stack(nn.Module):
    def __init__(self, forward, routed=False, layers=3):
        super().__init__()
        self.before = nn.Linear(8, 8)
        self.layers = nn.ModuleList(Layer(routed) for _ in range(layers))
        self.after = nn.Linear(8, 8)
        self.body = forward

    def forward(self, x):
        return self.after(self.body(self.layers, torch.tanh(self.before(x))))


def in_order(layers, x):
    for layer in layers:
        x = layer(x)
    return x


def floats(count=4):
    return [torch.randn(2, 20, 8) for _ in range(count)]


def test_modules_outside_and_behind_a_router_are_fitted_without():
    model = Stack(in_order, routed=True)
    report = factorize(model, 0.9, calibration=floats(), feedback=True, progress=False)
    fed = {m.name: m.feedback for m in report.modules}
    assert fed == {"before": False, "after": False} | {
        f"layers.{i}.{name}": name == "first" for i in range(3) for name in ("first", "second")
    }
    assert all(m.tokens and m.error < 1 for m in report.modules)
    assert "feedback: 3 of 8 modules" in str(report)


def test_a_module_of_two_layers_is_fitted_once():
    model = Stack(in_order)
    model.layers[2].first = model.layers[0].first
    factorize(model, 0.9, calibration=floats(), feedback=True, progress=False)
    assert isinstance(model.layers[2].first, LowRankLinear)
    assert model.layers[2].first is model.layers[0].first


def twice(layers, x):
    return in_order(layers, in_order(layers, x))


def skipping(layers, x):
    return layers[2](layers[1](x) + layers[0](x))


def backwards(layers, x):
    return in_order(reversed(layers), x)


def sometimes(layers, x):
    return in_order(layers[: 2 + (x.sum() > 0)], x)


@pytest.mark.parametrize("forward", [skipping, backwards, sometimes])
def test_what_is_no_chain_is_refused(forward):
    model = Stack(forward)
    batches = [torch.ones(1, 4, 8), -torch.ones(1, 4, 8), -torch.ones(1, 4, 8)]
    with Unchanged(model), pytest.raises(FactorizeError, match="feedback=True go through"):
        factorize(model, 0.9, calibration=batches, feedback=True, progress=False)


def test_layers_called_twice_are_refused():
    model = Stack(twice)
    with Unchanged(model), pytest.raises(FactorizeError, match="feedback=True go through"):
        factorize(model, 0.9, calibration=floats(), feedback=True, progress=False)


def test_a_model_without_layers_is_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with Unchanged(model), pytest.raises(FactorizeError, match="this model has none"):
        factorize(model, 0.9, calibration=floats(), feedback=True, progress=False)


@pytest.mark.parametrize(
    "options,says",
    [
        ({"feedback": True}, "needs calibration"),
        ({"feedback": True, "calibration": []}, "calibration is empty"),
        ({"feedback": True, "calibration": [torch.full((1, 4), 1000)]}, "rejects calibration"),
        ({"refine": Refine(), "calibration": tokens(2)}, "needs feedback=True"),
        ({"feedback": True, "refine": 3, "calibration": tokens(2)}, "refine=3 has to be"),
        ({"feedback": True, "refine": Refine(), "calibration": tokens(1)}, "at least 2"),
    ],
)
def test_bad_arguments(options, says):
    model = tiny_llama()
    with Unchanged(model), pytest.raises(FactorizeError, match=says):
        factorize(model, 0.5, progress=False, **options)


@pytest.mark.parametrize(
    "values",
    [
        {"steps": 0},
        {"steps": 1.5},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"lr": "1"},
        {"held_out": 1},
        {"held_out": None},
    ],
)
def test_bad_refine(values):
    with pytest.raises(FactorizeError, match=next(iter(values))):
        Refine(**values)


def test_bad_activations_are_named():
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[5, 0] = float("nan")
    data = [torch.full((1, 4), 6), torch.full((1, 4), 5)]
    says = r"Calibration batch 1 gives NaN or inf at the input of 'model\.layers\.0\.self_attn\.q"
    with Unchanged(model), pytest.raises(FactorizeError, match=says):
        factorize(model, 0.5, calibration=data, feedback=True, progress=False)


@pytest.mark.parametrize("where", ["corrected", "best_factors", "refine_layer", "inputs_of"])
def test_an_interrupt_leaves_the_model_as_it_was(where, monkeypatch):
    from fsvd_compile.factorize import layerwise

    model, count, real = tiny_llama(), 0, getattr(layerwise, where)

    def interrupt(*args, **kwargs):
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(layerwise, where, interrupt)
    with Unchanged(model), pytest.raises(KeyboardInterrupt):
        factorize(model, 0.5, calibration=tokens(), feedback=True, refine=Refine(2), progress=False)


class Wrapped(nn.Module):
    """Takes no `use_cache`, so that the model within goes by its config."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids).logits


@pytest.mark.parametrize("refine", [None, Refine(steps=3)])
def test_no_layer_attends_to_what_it_wrote_when_it_ran_before(refine):
    model, batches = tiny_llama(num_hidden_layers=3), tokens(4)
    wrapped = Wrapped(copy.deepcopy(model))
    given = [{"input_ids": batch} for batch in batches]
    options = {"feedback": True, "refine": refine, "progress": False}
    factorize(model, 0.5, calibration=given, **options)
    factorize(wrapped, 0.5, calibration=given, **options)
    assert wrapped.model.config.use_cache is True
    for (name, a), b in zip(
        model.state_dict().items(), wrapped.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)
