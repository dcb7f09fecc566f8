"""Tensor parallelism: transformers' plan with factors in it, and two processes that share a model."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

import fsvd_compile
from fsvd_compile import BranchedLinear, LowRankLinear
from fsvd_compile.families.parallel import split_factors

PLAN = {"layers.*.up": "colwise", "layers.*.down": "rowwise", "head": "colwise_gather_output"}


def model(*kinds: str, bias: bool = False) -> nn.Module:
    """A layer a kind: "factors", "dense", "branch" (of `down`)."""

    def linear(n: int, m: int, kind: str) -> nn.Module:
        if kind == "dense":
            return nn.Linear(n, m, bias=bias)
        pair = LowRankLinear(n, m, 3, bias=bias and kind != "branch")
        return BranchedLinear(nn.Linear(n, m), pair) if kind == "branch" else pair

    made = nn.Module()
    made.layers = nn.ModuleList()
    for kind in kinds:
        layer = nn.Module()
        layer.up, layer.down = linear(8, 16, kind.replace("branch", "dense")), linear(16, 8, kind)
        made.layers.append(layer)
    made.head = nn.Linear(8, 20)
    return made


def test_dense_models_keep_their_plan():
    assert split_factors(model("dense", "dense"), PLAN) == PLAN


def test_factors_of_every_layer():
    for bias in (False, True):
        assert split_factors(model("factors", "factors", bias=bias), PLAN) == {
            "layers.*.up": "colwise",
            "layers.*.up.u": "colwise",
            "layers.*.down.v": "rowwise",
            "head": "colwise_gather_output",
        }


def test_factors_of_some_layers():
    import transformers.distributed.tensor_parallel as styles

    found = split_factors(model("factors", "dense"), PLAN)
    if "local_params" not in styles.ALL_PARALLEL_STYLES:
        assert found == {}
        return
    assert found == PLAN | {
        "layers.*.up.u": "colwise",
        "layers.*.down.v": "local_params",
        "layers.*.down.v.weight": "rowwise",
    }


def shared() -> nn.Module:
    made = model("factors", "factors")
    made.layers[1].down.v = made.layers[0].down.v
    return made


@pytest.mark.parametrize(
    "made, plan, says",
    [
        (model("factors", "dense", bias=True), PLAN, "with a bias, and dense"),
        (model("branch", "factors"), PLAN, "has a branch"),
        (model("factors"), PLAN | {"layers.*.up": "packed_colwise"}, "is packed_colwise"),
        (shared(), PLAN, "shares its first factor"),
    ],
)
def test_what_no_plan_suits(made, plan, says, caplog):
    caplog.set_level("DEBUG", "fsvd_compile")
    assert split_factors(made, plan) == {}
    assert says in caplog.text


RANK = """
    import sys, torch
    import fsvd_compile
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    for path in sys.argv[1:]:
        whole = AutoModelForCausalLM.from_pretrained(path)
        ours = AutoModelForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(tp_size=2))
        sharded = [n for n, p in ours.named_parameters() if hasattr(p, "to_local")]
        ids = torch.arange(1, 14)[None]
        with torch.no_grad():
            a, b = ours(ids).logits, whole(ids).logits
            error = float((a - b).norm() / b.norm())
            how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
            same = [
                torch.equal(ours.generate(ids, **how, **cache), whole.generate(ids, **how))
                for cache in ({}, {"cache_implementation": "static"})
            ]
        if torch.distributed.get_rank() == 0:
            print("FOUND", error, all(same), sum(n.endswith(".u.weight") for n in sharded),
                  sum(n.endswith(".v.weight") for n in sharded), flush=True)
    torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_processes_share_a_model(tmp_path):
    import transformers.distributed.tensor_parallel as styles
    from transformers import LlamaConfig, LlamaForCausalLM

    folders = []
    mixed = {"*.0.*": 0.5, "*.2.*": 0.7}
    for name, keep, bias in (("all", 0.5, False), ("some", mixed, False), ("bias", 0.5, True)):
        config = LlamaConfig(
            vocab_size=96, hidden_size=64, intermediate_size=112, num_hidden_layers=3,
            num_attention_heads=8, num_key_value_heads=4, attention_bias=bias, mlp_bias=bias,
        )  # fmt: skip
        made = LlamaForCausalLM(config).eval()
        for parameter in made.parameters():
            if parameter.dim() == 1:
                nn.init.normal_(parameter)
        fsvd_compile.factorize(made, keep, progress=False)
        fsvd_compile.save(made, tmp_path / name)
        folders.append(str(tmp_path / name))
    script = tmp_path / "rank.py"
    script.write_text(textwrap.dedent(RANK))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         script, *folders], capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    found = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("FOUND")]
    assert len(found) == 3, done.stderr[-3000:]
    for error, same, *_ in found:
        assert float(error) < 1e-5 and same == "True"
    some = 10 if "local_params" in styles.ALL_PARALLEL_STYLES else 0
    # q, k, v, gate and up share U, o and down share V: of three layers, or of two.
    assert [tuple(map(int, row[2:])) for row in found] == [(15, 6), (some, some // 10 * 4), (15, 6)]
