"""`factorize` on whole models: optimal, atomic, and readable when it refuses."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from harness import assert_close
from torch import nn

from fsvd_compile.errors import FactorizeError
from fsvd_compile.factorize import calibration as calibration_module
from fsvd_compile.factorize import factorize
from fsvd_compile.factorize.calibration import Covariances, collect
from fsvd_compile.factorize.closed_form import best_factors
from fsvd_compile.factorized import LowRankLinear
from fsvd_compile.families.native import modules_of

transformers = pytest.importorskip("transformers")


def tiny_llama(**changes):
    config = {
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "attention_bias": True,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config | changes)).eval()


def tokens(batches=3, shape=(2, 9), vocabulary=64):
    return [torch.randint(0, vocabulary, shape) for _ in range(batches)]


class Unchanged:
    """Asserts on leaving that the model is bit for bit, type for type and hook for hook as
    before."""

    def __init__(self, model):
        self.model = model

    def _snapshot(self):
        return {
            name: (id(m), type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks))
            for name, m in self.model.named_modules()
        }

    def __enter__(self):
        self.model.train()
        next(self.model.children()).eval()
        self.modules = self._snapshot()
        self.state = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def __exit__(self, *_):
        assert self._snapshot() == self.modules
        state = self.model.state_dict()
        assert list(state) == list(self.state)
        for name, tensor in state.items():
            assert torch.equal(tensor.nan_to_num(), self.state[name].nan_to_num()), name


def test_llama_matches_the_closed_form():
    model = tiny_llama()
    dense = copy.deepcopy(model)
    inputs = {}
    for name, module in dense.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda m, args, name=name: inputs.setdefault(name, []).append(args[0])
            )
    batches = tokens()
    report = factorize(model, 0.6, calibration=batches, progress=False)
    with torch.no_grad():
        for batch in batches:
            dense(batch)
    assert len(report.modules) == 14 and report.dense == {"lm_head": "output embeddings"}
    for entry in report.modules:
        module, old = model.get_submodule(entry.name), dense.get_submodule(entry.name)
        assert isinstance(module, LowRankLinear) and entry.tokens == 54
        assert (module.out_features, module.in_features) == tuple(old.weight.shape)
        x = torch.cat([i.reshape(-1, i.shape[-1]) for i in inputs[entry.name]]).double()
        expected = best_factors(old.weight.double(), x.T @ x, entry.rank)
        assert_close(entry.name, module.dense_weight(), expected.u @ expected.v, 1e-5)
        assert entry.error == pytest.approx(expected.error, rel=1e-6)
        if old.bias is not None:
            assert torch.equal(module.u.bias, old.bias)
    assert report.parameters_before == sum(p.numel() for p in dense.parameters())
    assert report.parameters_after == sum(p.numel() for p in model.parameters())


def test_calibrated_beats_plain_on_the_output():
    model = tiny_llama(attention_bias=False)
    with torch.no_grad():  # inputs with a spectrum, as real activations have
        model.model.embed_tokens.weight.mul_(torch.logspace(0.5, -2, 32))
    batches = tokens(4, (4, 16))
    plain, calibrated = copy.deepcopy(model), copy.deepcopy(model)
    factorize(plain, 0.5, progress=False)
    factorize(calibrated, 0.5, calibration=batches, progress=False)
    with torch.no_grad():
        reference, ours, theirs = (m(batches[0]).logits for m in (model, calibrated, plain))
    assert (ours - reference).norm() < 0.8 * (theirs - reference).norm()


def test_siblings_share_one_matrix():
    model = tiny_llama()
    modules = {n: m for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"}
    covariances, _ = collect(
        model, modules, tokens(), dtype=torch.float64, progress=False, skip_logits=True
    )
    assert len(modules) == 14 and covariances.matrices == 2 * 4
    attention = "model.layers.0.self_attn."
    q, k = (covariances.pop(attention + name)[0] for name in ("q_proj", "k_proj"))
    o = covariances.pop(attention + "o_proj")[0]
    assert q is k and q is not o


class Diverging(nn.Module):
    """Siblings that share their input until `step` says otherwise."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6, bias=False) for _ in range(3))

    def forward(self, x, step=0):
        y = self.a(x) + self.b(x)
        if step == 1:
            return y  # c is left out
        if step == 2:
            return y + self.c(x * 2)
        if step == 3:
            return self.a(y) + self.c(x)  # a a second time, c after it
        if step == 4:
            x.add_(1)  # the same object with other values
        return y + self.c(x)


@pytest.mark.parametrize(
    "steps", [(0, 0), (0, 1, 0), (0, 2), (1, 0), (0, 3, 0), (0, 4), (4, 0), (3, 2, 1)]
)
def test_sharing_is_exact_when_inputs_diverge(steps):
    model = Diverging()
    seen = {name: [] for name, _ in model.named_children()}
    for name, module in model.named_children():
        module.register_forward_pre_hook(
            lambda m, args, name=name: seen[name].append(args[0].clone())
        )
    batches = [{"x": torch.randn(2, 5, 6), "step": step} for step in steps]
    covariances, _ = collect(
        model,
        dict(model.named_children()),
        batches,
        dtype=torch.float64,
        progress=False,
        skip_logits=True,
    )
    for name, inputs in seen.items():
        x = torch.cat(inputs).reshape(-1, 6).double()
        gram, count = covariances.pop(name)
        assert count == len(x)
        torch.testing.assert_close(gram, x.T @ x)


def test_a_dead_tensor_is_no_sibling():
    """A new tensor at the address and id of a freed one must not join its group."""
    covariances = Covariances(torch.float64)
    with covariances.batch(0, None):
        for i in range(50):
            covariances.observe(f"m{i}", torch.full((2, 3), float(i)))
    assert covariances.matrices == 50
    assert covariances.pop("m7")[0][0, 0] == 2 * 49


def test_padding_does_not_count():
    torch.manual_seed(0)
    model = tiny_llama()
    ids = torch.randint(0, 64, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    padded, plain = copy.deepcopy(model), copy.deepcopy(model)
    report = factorize(
        padded, 0.5, calibration=[{"input_ids": ids, "attention_mask": mask}], progress=False
    )
    assert {m.tokens for m in report.modules} == {14}
    factorize(plain, 0.5, calibration=[ids[:1], ids[1:, :5]], progress=False)
    for name in plain.state_dict():
        if name.endswith("v.weight"):
            other = padded.get_submodule(name[: -len(".v.weight")]).dense_weight()
            mine = plain.get_submodule(name[: -len(".v.weight")]).dense_weight()
            assert_close(name, other, mine, 1e-4)


def test_nan_in_padding_is_harmless_and_elsewhere_named():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = model

        def forward(self, x, attention_mask=None):
            return self.body(x)

    x = torch.randn(2, 4, 8)
    x[1, 3] = float("nan")
    mask = torch.ones(2, 4)
    mask[1, 3] = 0
    report = factorize(Masked(), calibration=[{"x": x, "attention_mask": mask}], progress=False)
    assert {m.tokens for m in report.modules} == {7}


def test_gpt2_conv1d():
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    dense = copy.deepcopy(model)
    batches = tokens()
    report = factorize(model, {"*": 0.99}, calibration=batches, progress=False)
    assert len(report.modules) == 8
    assert report.dense == {"lm_head": "its weight is tied to transformer.wte"}
    fused = model.transformer.h[0].attn.c_attn
    assert (fused.in_features, fused.out_features) == (32, 96)
    assert torch.equal(fused.u.bias, dense.transformer.h[0].attn.c_attn.bias)
    old = dense.transformer.h[0].attn.c_attn.weight.T.double()
    assert fused.rank == int(32 * 96 * 0.99 / 128)
    x = torch.randn(5, 32)
    exact = fused.u.bias + x @ old.float().T
    assert (fused(x) - exact).norm() < 0.7 * exact.norm()
    assert model(batches[0]).logits.shape == (2, 9, 64)


def test_bert_runs_and_keeps_its_tied_decoder():
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=64,
    )
    model = transformers.BertForMaskedLM(config)
    report = factorize(model, 0.5, calibration=tokens(), progress=False)
    assert "cls.predictions.decoder" in report.dense and model.training
    assert not report.uncalibrated
    assert model(tokens(1)[0]).logits.shape == (2, 9, 64)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        return self.experts[0](x) + self.experts[1](x[:0]).sum()


def test_modules_without_tokens_get_the_plain_svd():
    model = Experts()
    weights = [m.weight.detach().double() for m in model.experts]
    report = factorize(model, 0.5, calibration=[torch.randn(5, 8)], progress=False)
    assert report.uncalibrated == ("experts.1", "experts.2")
    assert [m.tokens for m in report.modules] == [5, 0, 0]
    for index in (1, 2):
        expected = best_factors(weights[index], None, 2)
        assert_close("plain", model.experts[index].dense_weight(), expected.u @ expected.v, 1e-6)
    assert "plain SVD, no calibration token reached them (2): experts.*" in str(report)


def test_fewer_tokens_than_features():
    model = tiny_llama()
    dense = copy.deepcopy(model)
    batch = tokens(1, (1, 4))
    report = factorize(model, 0.5, calibration=batch, progress=False)
    assert max(m.error for m in report.modules) < 1e-5
    with torch.no_grad():
        assert_close("logits", model(batch[0]).logits, dense(batch[0]).logits, 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_factors_have_the_dtype_of_the_module(dtype):
    model = tiny_llama().to(dtype)
    factorize(model, 0.5, calibration=tokens(), progress=False)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert torch.isfinite(model(tokens(1)[0]).logits).all()


def test_float32_computation_is_close():
    model = tiny_llama()
    other = copy.deepcopy(model)
    batches = tokens()
    factorize(model, 0.5, calibration=batches, progress=False)
    factorize(other, 0.5, calibration=batches, progress=False, dtype=torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            twin = other.get_submodule(name)
            assert_close(name, twin.dense_weight(), module.dense_weight(), 1e-3)


def test_deterministic_and_leaves_the_random_state_alone():
    model = tiny_llama(attention_dropout=0.5)
    model.train()
    twin = copy.deepcopy(model)
    batches = tokens()
    state = torch.get_rng_state()
    for m in (model, twin):
        factorize(m, 0.5, calibration=batches, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    for (name, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_modes_and_gradients_are_kept():
    model = tiny_llama()
    model.train()
    model.model.layers[0].eval()
    model.model.layers[1].self_attn.q_proj.weight.requires_grad_(False)
    factorize(model, 0.5, calibration=tokens(), progress=False)
    assert model.training and not model.model.layers[0].self_attn.q_proj.u.training
    q, k = (getattr(model.model.layers[1].self_attn, n) for n in ("q_proj", "k_proj"))
    assert q.training and q.v.training
    assert not q.u.weight.requires_grad and not q.v.weight.requires_grad
    assert q.u.bias.requires_grad and k.u.weight.requires_grad
    assert not any(m._forward_pre_hooks for m in model.modules())
    model(tokens(1)[0]).logits.sum().backward()


def test_inside_inference_mode_and_autocast():
    model = tiny_llama()
    other = copy.deepcopy(model)
    batches = tokens()
    factorize(other, 0.5, calibration=batches, progress=False)
    with torch.inference_mode():
        factorize(model, 0.5, calibration=batches, progress=False)
    assert not any(p.is_inference() for p in model.parameters())
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    model(batches[0]).logits.sum().backward()
    with torch.autocast("cpu"):
        report = factorize(tiny_llama(), 0.5, calibration=batches, progress=False)
    assert not report.uncalibrated


def test_save_and_load_round_trip(tmp_path):
    from safetensors.torch import load_file

    model = tiny_llama()
    factorize(model, {"*.q_proj": 0.3, "*": 0.6}, calibration=tokens(), progress=False)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    prefix = "model.layers.1.self_attn.q_proj."
    assert {prefix + "u.weight", prefix + "u.bias", prefix + "v.weight"} <= saved.keys()
    assert not any(name.endswith("q_proj.weight") for name in saved)
    fresh = tiny_llama()
    factorize(fresh, {"*.q_proj": 0.3, "*": 0.6}, progress=False)
    fresh.load_state_dict(saved, strict=True)
    ids = tokens(1)[0]
    assert torch.equal(fresh(ids).logits, model(ids).logits)


def test_its_own_save_pretrained_describes_the_factors(tmp_path):
    config = tiny_llama().config
    dense, model = (transformers.LlamaForCausalLM(config) for _ in range(2))
    factorize(model, {"*.q_proj": 0.3, "*": 0.6}, calibration=tokens(), progress=False)
    for name, written in {"first": model, "copy": copy.deepcopy(model)}.items():
        written.save_pretrained(tmp_path / name)
        read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        ids = tokens(1)[0]
        assert torch.equal(read(ids).logits, model(ids).logits)
        assert isinstance(read.model.layers[1].self_attn.q_proj, LowRankLinear)
    # A model of the same config object is as dense as before, and is written so.
    assert dense.config is config and not hasattr(config, "quantization_config")
    assert model.model.config is model.config is not config
    dense.save_pretrained(tmp_path / "dense")
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(read(ids).logits, dense(ids).logits)
    # What changes later is what is written; what is refused changes nothing.
    factorize(model, 0.5, select=["lm_head"], progress=False)
    model.save_pretrained(tmp_path / "head")
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "head")
    assert torch.equal(read(ids).logits, model(ids).logits)
    with pytest.raises(FactorizeError):
        factorize(dense, 0.5, calibration=[], progress=False)
    assert dense.config is config and not hasattr(config, "quantization_config")


def test_report_reads_well():
    report = factorize(tiny_llama(), 0.5, calibration=tokens(), progress=False)
    text = repr(report)
    assert str(report) == text
    row = next(line for line in text.splitlines() if "*.self_attn.k_proj" in line)
    assert row.split()[1:6] == ["2", "32", "16", "5", "0.5"]
    assert "dense: lm_head: output embeddings" in text
    assert max(map(len, text.splitlines())) < 110


def test_compiled_model_is_calibrated_eagerly():
    compiled = torch.compile(tiny_llama(), backend="eager")
    compiled.compile(backend="inductor")
    report = factorize(compiled, 0.5, calibration=tokens(), progress=False)
    assert report.modules[0].name == "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "calibration,says",
    [
        ([], "calibration is empty"),
        (iter(()), "calibration is empty"),
        (torch.zeros(2, 4, dtype=torch.long), "calibration is one tensor.*\\[batch\\]"),
        ({"input_ids": torch.zeros(1, 2).long()}, "one batch .a mapping."),
        ("text", "calibration is a str"),
        (3, "calibration is a int"),
        (["some text"], "Calibration batch 0 is a str.*tokenize"),
        ([torch.full((1, 4), 1000)], "rejects calibration batch 0 .*\\[1, 4\\].*IndexError"),
        ([torch.zeros(1, 4).long(), {"no_such": 1}], "rejects calibration batch 1"),
        ([torch.zeros(1, 4)], "rejects calibration batch 0 .*float32"),
    ],
)
def test_bad_calibration(calibration, says):
    model = tiny_llama()
    with Unchanged(model), pytest.raises(FactorizeError, match=says):
        factorize(model, 0.5, calibration=calibration, progress=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_weights_are_named(value):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    says = r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or inf"
    with Unchanged(model), pytest.raises(FactorizeError, match=says):
        factorize(model, 0.5, progress=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_activations_are_named(value):
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[5, 0] = value
    good, bad = torch.full((1, 4), 6), torch.full((1, 4), 5)
    says = r"Calibration batch 1 gives NaN or inf at the input of 'model\.layers\.0\.self_attn\.q"
    with Unchanged(model), pytest.raises(FactorizeError, match=says):
        factorize(model, 0.5, calibration=[good, bad], progress=False)


def test_bad_arguments_and_meta_weights():
    model = tiny_llama()
    with Unchanged(model), pytest.raises(FactorizeError, match=r"dtype=torch.float16"):
        factorize(model, dtype=torch.float16)
    with Unchanged(model), pytest.raises(FactorizeError, match="keep=2"):
        factorize(model, 2)
    with torch.device("meta"):
        empty = tiny_llama()
    with pytest.raises(FactorizeError, match=r"q_proj.weight is on the meta device"):
        factorize(empty)


def test_failed_decomposition_is_named(monkeypatch):
    calls = []

    def failing(matrix):
        calls.append(matrix)
        if len(calls) == 5:
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(matrix)

    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", failing)
    model = tiny_llama()
    with Unchanged(model), pytest.raises(FactorizeError, match=r"mlp.gate_proj.*did not converge"):
        factorize(model, 0.5, calibration=tokens(), progress=False)


@pytest.mark.parametrize("where", ["calibration", "hook", "factors", "swap", "trial", "describe"])
def test_an_interrupt_leaves_the_model_as_it_was(where, monkeypatch):
    model = tiny_llama()
    count = 0

    def interrupt(*args, **kwargs):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    def batches():
        yield from tokens(1)
        raise KeyboardInterrupt

    calibration = batches() if where == "calibration" else tokens()
    if where == "hook":
        real = Covariances.observe
        monkeypatch.setattr(Covariances, "observe", interrupt)
    elif where == "factors":
        real = best_factors
        # By sys.modules: the package's attribute of that name is the function.
        module = sys.modules["fsvd_compile.factorize.swap"]
        monkeypatch.setattr(module, "best_factors", interrupt)
    elif where == "swap":
        real, count = nn.Module.__setattr__, -4

        def setter(self, name, value):
            return (interrupt if isinstance(value, LowRankLinear) else real)(self, name, value)

        monkeypatch.setattr(nn.Module, "__setattr__", setter)
    elif where == "trial":
        real, count = calibration_module._forward, -1
        monkeypatch.setattr(calibration_module, "_forward", interrupt)
    elif where == "describe":
        real, count = modules_of, 2
        monkeypatch.setattr("fsvd_compile.families.hub.modules_of", interrupt)
    config = model.config
    with Unchanged(model), pytest.raises(KeyboardInterrupt):
        factorize(model, 0.5, calibration=calibration, progress=False)
    assert model.config is config and not hasattr(config, "quantization_config")


class ReadsWeight(nn.Module):
    def __init__(self, multiplies):
        super().__init__()
        self.wo = nn.Linear(8, 8)
        self.multiplies = multiplies

    def forward(self, x):
        if self.multiplies:
            return nn.functional.linear(x, self.wo.weight)
        return self.wo(x.to(self.wo.weight.dtype))


def test_a_model_that_looks_at_weights():
    model = nn.Sequential(ReadsWeight(False), nn.Linear(8, 8))
    report = factorize(model, 0.5, calibration=[torch.randn(2, 8)], progress=False)
    assert [module.name for module in report.modules] == ["0.wo", "1"]


def test_a_model_that_multiplies_by_weights_is_put_back():
    model = nn.Sequential(ReadsWeight(True), nn.Linear(8, 8))
    batch = [torch.randn(2, 8)]
    with Unchanged(model), pytest.raises(FactorizeError, match=r"Tensor, not Product.*select="):
        factorize(model, 0.5, calibration=batch, progress=False)
    report = factorize(model, 0.5, calibration=batch, select=["1"], progress=False)
    assert report.dense == {"0.wo": "not selected"}


def test_an_encoder_and_a_decoder_of_equal_length():
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4
    )
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    ids, mask = torch.randint(1, 97, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    batch = {"input_ids": ids, "decoder_input_ids": ids, "attention_mask": mask}
    with pytest.raises(FactorizeError, match="Give batches with `labels`"):
        factorize(model, 0.8, calibration=[batch], allocation="loss", progress=False)
    for name in ("attention_mask", "decoder_attention_mask"):
        padded = batch | {name: mask.clone().index_fill_(1, torch.tensor([8]), 0)}
        with pytest.raises(FactorizeError, match=r"batch 0 has padding.*masks of their own"):
            factorize(model, 0.8, calibration=[padded], progress=False)
    report = factorize(model, 0.8, calibration=[batch], progress=False)
    assert {module.tokens for module in report.modules} == {18}
