"""LowRankLinear: shapes from tensors, refusal of wrong factors, sharing, saving, copying."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from harness import assert_close
from torch import nn
from transformers.pytorch_utils import Conv1D

from fsvd_compile.errors import FactorError
from fsvd_compile.factorized import BranchedLinear, LowRankLinear, Product


@pytest.mark.parametrize("m,n,r", [(8, 8, 3), (12, 5, 2), (5, 12, 4), (7, 9, 1), (4, 4, 11)])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_product(m, n, r, bias):
    module = LowRankLinear(n, m, r, bias=bias)
    x = torch.randn(2, 3, n)
    expected = x @ module.dense_weight().T + (module.u.bias if bias else 0)
    assert_close("forward", module(x), expected, 1e-6)
    assert (module.in_features, module.out_features, module.rank) == (n, m, r)
    assert f"{n}, {m}, rank={r}" in repr(module)
    assert (module.u.bias is not None) is bias and module.v.bias is None
    assert module.bias is module.u.bias


def test_sizes_follow_the_tensors_not_the_constructor():
    module = LowRankLinear(8, 6, 5)
    module.v.weight = nn.Parameter(torch.randn(3, 8))
    module.u.weight = nn.Parameter(torch.randn(6, 3))
    assert module.rank == 3
    assert module(torch.randn(2, 8)).shape == (2, 6)


def test_device_and_dtype():
    module = LowRankLinear(8, 6, 5, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}
    assert LowRankLinear(8, 6, 3, dtype=torch.float16).dense_weight().dtype == torch.float32


def test_from_factors_takes_the_memory_it_is_given():
    u, v, bias = torch.randn(6, 3), torch.randn(3, 8), torch.randn(6)
    module = LowRankLinear.from_factors(u, v, bias)
    assert module.u.weight.data_ptr() == u.data_ptr()
    assert module.v.weight.data_ptr() == v.data_ptr()
    assert_close("forward", module(v), v @ v.T @ u.T + bias, 1e-6)
    assert LowRankLinear.from_factors(u, v).u.bias is None


@pytest.mark.parametrize(
    "u,v,bias,says",
    [
        ((6, 3), (4, 8), None, "u.shape[1]"),
        ((3, 8), (6, 3), None, "look swapped"),
        ((6,), (3, 8), None, "u has to be [out_features, rank]"),
        ((6, 0), (0, 8), None, "u has to be [out_features, rank]"),
        ((6, 3), (3, 8), (8,), "bias has to be [out_features] = [6]"),
    ],
)
def test_from_factors_refuses_shapes(u, v, bias, says):
    with pytest.raises(FactorError, match="from_factors: u ") as caught:
        LowRankLinear.from_factors(
            torch.randn(u), torch.randn(v), None if bias is None else torch.randn(bias)
        )
    assert says in str(caught.value)


def test_from_factors_refuses_mixed_dtypes_and_kinds():
    u, v = torch.randn(6, 3), torch.randn(3, 8)
    with pytest.raises(FactorError, match=r"v is torch.float16 .* v.to\(u\)"):
        LowRankLinear.from_factors(u, v.half())
    with pytest.raises(FactorError, match=r"u is torch.int64"):
        LowRankLinear.from_factors(u.long(), v)
    with pytest.raises(FactorError, match="v is list"):
        LowRankLinear.from_factors(u, v.tolist())


@pytest.mark.parametrize("size", [0, -1, 2.5, True])
@pytest.mark.parametrize("which", ["in_features", "out_features", "rank"])
def test_constructor_refuses_sizes(which, size):
    sizes = {"in_features": 4, "out_features": 4, "rank": 2} | {which: size}
    with pytest.raises(FactorError, match=f"{which}={size!r}"):
        LowRankLinear(**sizes)


def test_state_dict_names_and_round_trip():
    module, other = LowRankLinear(8, 6, 3), LowRankLinear(8, 6, 3)
    assert list(module.state_dict()) == ["v.weight", "u.weight", "u.bias"]
    other.load_state_dict(module.state_dict())
    x = torch.randn(2, 8)
    assert torch.equal(module(x), other(x))


def test_deepcopy_and_pickle():
    module = LowRankLinear(8, 6, 3)
    x = torch.randn(2, 8)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for twin in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x), module(x))
        assert twin.u.weight.data_ptr() != module.u.weight.data_ptr()


def test_shared_v_stays_shared_in_copies_and_gradients():
    pair = nn.ModuleDict({"a": LowRankLinear(8, 6, 3), "b": LowRankLinear(8, 4, 3)})
    pair["b"].v = pair["a"].v
    assert len(list(pair.parameters())) == 5
    assert copy.deepcopy(pair)["a"].v is not pair["a"].v
    twin = copy.deepcopy(pair)
    assert twin["a"].v is twin["b"].v
    twin.load_state_dict(pair.state_dict())
    assert torch.equal(twin["b"].v.weight, pair["a"].v.weight)
    x = torch.randn(5, 8)
    (pair["a"](x).sum() + pair["b"](x).sum()).backward()
    expected = (pair["a"].u.weight.sum(0) + pair["b"].u.weight.sum(0))[:, None] * x.sum(0)
    assert_close("gradient of the shared v", pair["a"].v.weight.grad, expected, 1e-5)


def test_save_pretrained_writes_a_shared_v_once(tmp_path):
    pytest.importorskip("transformers")
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=32))
    first, second = (layer.self_attn for layer in model.model.layers)
    first.q_proj, second.q_proj = (LowRankLinear(16, 16, 3, bias=False) for _ in range(2))
    second.q_proj.v = first.q_proj.v
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert sum(name.endswith("q_proj.v.weight") for name in saved) == 1
    assert sum(name.endswith("q_proj.u.weight") for name in saved) == 2

    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    missing = twin.load_state_dict(saved, strict=False).missing_keys
    assert [name for name in missing if "q_proj" in name] == [
        "model.layers.0.self_attn.q_proj.v.weight"
    ]
    ids = torch.arange(8)[None]
    assert torch.equal(twin(ids).logits, model(ids).logits)


@pytest.mark.parametrize("conv", [False, True])
def test_a_branch_is_added_to_what_the_base_gives(conv):
    base, branch = nn.Linear(8, 6), LowRankLinear(8, 6, 3, bias=False)
    dense = base.weight.detach() + branch.dense_weight()
    if conv:
        weight, bias = base.weight.detach(), base.bias
        base = Conv1D(6, 8)
        base.weight.data, base.bias = weight.t().contiguous(), bias
    module = BranchedLinear(base, branch)
    x = torch.randn(2, 3, 8)
    assert_close("forward", module(x), x @ dense.T + base.bias, 1e-6)
    assert (module.in_features, module.out_features) == (8, 6)
    keys = {"base.weight", "base.bias", "branch.v.weight", "branch.u.weight"}
    assert set(module.state_dict()) == keys


@pytest.mark.parametrize(
    "base,branch,says",
    [
        (nn.Linear(8, 6), LowRankLinear(8, 6, 3), "the branch has a bias"),
        (
            nn.Linear(8, 6),
            LowRankLinear(6, 8, 3, bias=False),
            r"base is \[6, 8\] and branch \[8, 6\]",
        ),
        (nn.LayerNorm(8), LowRankLinear(8, 8, 3, bias=False), "base is a LayerNorm"),
        (LowRankLinear(8, 6, 2), LowRankLinear(8, 6, 3, bias=False), "base is a LowRankLinear"),
    ],
)
def test_branches_that_do_not_fit(base, branch, says):
    with pytest.raises(FactorError, match=says):
        BranchedLinear(base, branch)


@pytest.mark.parametrize("beside", [False, True])
def test_weight_is_looked_at_without_a_product(beside, monkeypatch):
    module = LowRankLinear(7, 5, 3, bias=False, dtype=torch.float64)
    if beside:
        module = BranchedLinear(nn.Linear(7, 5, dtype=torch.float64), module)
    torch.manual_seed(0)
    x = torch.randn(7, 2, dtype=torch.float64)
    eye = torch.eye(7, dtype=torch.float64)
    expected = (module(eye) - (module.base.bias if beside else 0)).T
    for name, actual in {
        "tensor": module.weight.tensor(),
        "matmul": module.weight @ eye,
        "rmatmul": eye[:5, :5] @ module.weight,
        "function": nn.functional.linear(eye, module.weight.tensor()).T,
        "method": module.weight.T.T,
    }.items():
        assert_close(name, actual, expected, 1e-12)
    assert_close("linear", module.weight @ x, expected @ x, 1e-12)
    (module.weight @ x).sum().backward()
    assert all(p.grad is not None for n, p in module.named_parameters() if "bias" not in n)
    assert module.bias is (module.base.bias if beside else None)
    assert "weight" not in module.state_dict() and "weight" not in dict(module.named_parameters())
    monkeypatch.setattr(Product, "tensor", None)
    weight = module.weight
    assert (weight.dtype, weight.device.type, weight.shape) == (torch.float64, "cpu", (5, 7))
    assert not isinstance(weight, torch.Tensor)


@pytest.mark.parametrize(
    "write",
    [
        lambda module: module.weight.data.mul_(0),
        lambda module: setattr(module.weight, "data", torch.zeros(5, 7)),
        lambda module: module.weight.zero_(),
        lambda module: module.weight.copy_(torch.zeros(5, 7)),
        lambda module: module.weight.__setitem__(0, 0.0),
        lambda module: nn.init.zeros_(module.weight),
    ],
)
def test_what_would_be_lost_is_refused(write):
    with pytest.raises(FactorError, match=r"5 x 7 .*would be lost.*`u.weight`"):
        write(LowRankLinear(7, 5, 3))


def test_weight_of_a_branch_beside_a_conv1d():
    module = BranchedLinear(Conv1D(5, 7), LowRankLinear(7, 5, 3, bias=False))
    assert_close("weight", module.weight @ torch.eye(7), module(torch.eye(7)).T, 1e-6)


def test_weight_of_factors_in_two_dtypes():
    module = LowRankLinear(7, 5, 3, bias=False)
    module.u.half()
    assert module.weight.dtype == torch.float16 == module.weight.tensor().dtype
    assert module.weight.tensor().shape == (5, 7)


@pytest.mark.parametrize("whole", [True, False])
def test_products_by_a_weight_are_compiled_in_their_order(cheap, whole):
    torch.manual_seed(0)
    module = LowRankLinear(6, 6, 3, bias=False)
    x = torch.randn(6, 6)
    products = [
        lambda x: module(x.to(module.weight.dtype)) * module.weight.shape[0],
        lambda x: module.weight.tensor() @ x,
        lambda x: module.weight.T @ x,
    ]
    if not whole:
        products += [lambda x: module.weight @ x, lambda x: x @ module.weight]
    for product in products:
        torch._dynamo.reset()
        compiled = torch.compile(product, backend="flashsvd", fullgraph=whole)
        assert_close("compiled", compiled(x), product(x), 1e-6)
    with pytest.raises(TypeError, match="must be Tensor, not Product"):
        nn.functional.linear(x, module.weight)
