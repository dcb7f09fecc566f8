"""The entry point, its options, and what it does with calls it must not fuse."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings

import pytest
import torch
import zoo
from harness import assert_close
from torch import nn

from fsvd_compile import Config, LowRankLinear
from fsvd_compile.errors import OptionError
from fsvd_compile.passes import PIPELINE, Context, run
from fsvd_compile.report import collect


def chain(n_in=48, rank=9, n_out=40) -> nn.Module:
    return nn.Sequential(LowRankLinear(n_in, n_out, rank), nn.ReLU()).eval()


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


def test_works_without_importing_us():
    done = python(
        "import torch, sys; m = torch.compile(torch.nn.Linear(4, 4), backend='flashsvd');"
        "assert 'flashsvd' in torch._dynamo.list_backends();"
        "torch.set_grad_enabled(False); x = torch.randn(3, 4);"
        "assert torch.allclose(m(x), m._orig_mod(x), atol=1e-6); print('fine')"
    )
    assert done.stdout.strip().endswith("fine"), done.stderr


def test_import_needs_no_gpu_and_initialises_none():
    done = python("import fsvd_compile, torch; print(torch.cuda.is_initialized())")
    assert done.stdout.strip() == "False", done.stderr


def test_names_that_would_shadow_other_packages_stay_unimportable():
    done = python(
        "import importlib.util as u; print(u.find_spec('passes'), u.find_spec('fsvd_compile') is None)"
    )
    assert done.stdout.split() == ["None", "False"], done.stderr


def test_without_kernels_ahead_of_time_it_still_works(monkeypatch, caplog):
    def fails(calls, captured):
        raise RuntimeError("another mode is active")

    monkeypatch.setattr("fsvd_compile.backend.compiling_ahead", fails)
    model, x = chain(), torch.randn(3, 48)
    with torch.no_grad():
        assert_close("y", torch.compile(model, backend="flashsvd")(x), model(x), 1e-5)
    assert "not compiled ahead (RuntimeError: another mode is active)" in caplog.text


@pytest.mark.parametrize("key", ["max_autotune", "triton.cudagraphs", "force_disable_caches"])
def test_settings_of_inductor(key):
    """A plain one, one with a dot, and one that is another's second name."""
    assert Config.of({"inductor": {key: False}}).inductor == {key: False}


def test_torchs_filter_of_guards_goes_among_the_options():
    model, x = chain(), torch.randn(3, 48)
    skip = torch.compiler.skip_guard_on_all_nn_modules_unsafe
    options = {"guard_filter_fn": skip, "disable": ["lowrank_chain"]}  # torch takes the first out
    compiled = torch.compile(model, backend="flashsvd", options=options)
    with torch.no_grad(), collect() as reports:
        for scale in (1, 2):
            next(model.parameters()).mul_(scale)
            assert_close("y", compiled(x), model(x), 1e-5)
    (report,) = reports
    assert "lowrank_chain" not in report.matches


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"cuda_graph": "step"}, ["cuda_graph", "cuda_graphs", "max_captures"]),
        ({"cuda_graphs": "always"}, ["cuda_graphs", "'always'", "'step'", "'layer'", "'off'"]),
        ({"max_captures": 0}, ["max_captures", "0", "at least 1"]),
        ({"max_captures": True}, ["max_captures", "True"]),
        ({"kernels": "cuda"}, ["kernels", "'cuda'", "'aten'"]),
        ({"layers": 1}, ["layers", "1", "True or False"]),
        ({"disable": "residual"}, ["disable", "'residual'", "list"]),
        ({"disable": ["residuals"]}, ["disable", "'residuals'", "residual", "siblings"]),
        ({"disable": None}, ["disable", "None", "list"]),
        ({"disable": 5}, ["disable", "5", "list"]),
        ({"inductor": 3}, ["inductor", "3", "dict"]),
        ({"inductor": {"bogus": 1}}, ["inductor", "bogus", "torch._inductor.config"]),
        ({"inductor": {"max-autotune": True}}, ["inductor", "max-autotune", "_ for -"]),
        (
            {"inductor": {"triton.cudagraphs": True}},
            ["inductor", "triton.cudagraphs", "cuda_graphs"],
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_options_name_key_value_and_what_is_allowed(options, names):
    with pytest.raises(OptionError) as error:
        Config.of(options)
    for name in names:
        assert name in str(error.value)


def test_a_bad_option_reaches_the_user_through_torch_compile():
    with torch.no_grad(), pytest.raises(Exception, match="allowed keys: cuda_graphs"):
        torch.compile(chain(), backend="flashsvd", options={"nope": 1})(torch.randn(2, 48))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs", None])
def test_modes(mode):
    model, x = chain(), torch.randn(2, 48)
    with torch.no_grad():
        assert_close("mode", torch.compile(model, backend="flashsvd", mode=mode)(x), model(x), 1e-5)


def test_unknown_mode():
    with pytest.raises(OptionError, match="reduce-overhead"):
        Config.of(mode="fastest")


@pytest.mark.parametrize(
    "name", [r.name for r in PIPELINE if r.name in ("lowrank_chain", "siblings", "activation")]
)
def test_disabled_rewrites_do_not_run(name):
    model, x = zoo.factorized("mlp"), torch.randn(3, 48)
    compiled = torch.compile(model, backend="flashsvd", options={"disable": [name]})
    with torch.no_grad(), collect() as reports:
        assert_close("disabled", compiled(x), model(x), 1e-5)
    assert name not in reports[0].matches


def test_names_of_rewrites_are_unique():
    names = [r.name for r in PIPELINE]
    assert len(set(names)) == len(names)
    assert all(r.what for r in PIPELINE)


def test_gradients_flow_through_the_unfused_path_with_one_warning():
    model = chain()
    reference = chain()
    reference.load_state_dict(model.state_dict())
    compiled = torch.compile(model, backend="flashsvd")
    torch._dynamo.reset()
    x = torch.randn(5, 48)
    with warnings.catch_warnings(record=True) as caught, collect() as reports:
        warnings.simplefilter("always")
        for batch in (x, x[:3]):
            loss = compiled(batch).square().sum()
    ours = [w for w in caught if "flashsvd" in str(w.message)]
    assert len(ours) == 1
    assert "torch.no_grad()" in str(ours[0].message)
    assert all(r.unfused and not r.outcomes for r in reports)
    loss.backward()
    reference(x[:3]).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert_close(name, p.grad, q.grad, 1e-5)


def test_training_mode_keeps_active_dropout():
    model = nn.Sequential(nn.Linear(48, 9, bias=False), nn.Dropout(0.5), nn.Linear(9, 40)).train()
    x = torch.ones(400, 48)
    with torch.no_grad(), collect() as reports:
        a, b = (torch.compile(model, backend="flashsvd")(x) for _ in range(2))
    assert not torch.equal(a, b)
    assert "lowrank_chain" not in reports[0].matches


def test_autocast_runs_unfused():
    model, x = chain(), torch.randn(5, 48)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with collect() as reports:
            actual = torch.compile(model, backend="flashsvd")(x)
        assert_close("autocast", actual, model(x), 1e-2)
    assert "autocast" in reports[0].unfused


class Transformed(nn.Module):
    """A low-rank layer under a transform of torch.func."""

    def __init__(self, how):
        super().__init__()
        self.layer, self.how = chain(), how

    def forward(self, x):
        if self.how == "vmap":
            return torch.vmap(lambda row: self.layer(row).sin())(x)
        if self.how == "vmap of activations":  # it asks for the layout they have in eager
            return self.layer(torch.vmap(lambda row: row.view(-1))((x * 2).t().contiguous().t()))
        if self.how == "vmap that hands on memory":
            places = torch.arange(5)
            rows = torch.vmap(lambda i: i)(places)
            places.add_(1)
            return self.layer(x) + rows[:, None]
        if self.how == "vmap that writes":
            return self.layer(torch.vmap(lambda row: row.mul_(2))(x.clone()))
        if self.how == "grad":
            return torch.func.grad(lambda x: self.layer(x).sin().sum())(x)
        return torch.func.jvp(lambda x: self.layer(x).sin(), (x,), (torch.ones_like(x),))[1]


@pytest.mark.parametrize(
    "how",
    (
        "vmap",
        "vmap of activations",
        "vmap that hands on memory",
        "vmap that writes",
        "grad",
        "jvp",
    ),
)
def test_transforms_of_torch_func_run_unfused(how):
    model, x = Transformed(how).eval().requires_grad_(False), torch.randn(5, 48)
    with pytest.warns(UserWarning, match=r"torch\.func"), collect() as reports:
        actual = torch.compile(model, backend="flashsvd")(x)
    assert_close(how, actual, model(x), 1e-5)
    assert [bool(r.unfused) for r in reports] == [True]


class Masked(nn.Module):
    """Two blocks behind a mask that is made inside `torch.vmap`, as transformers before 5.0 makes its own."""

    def __init__(self, through_layers=False):
        super().__init__()
        norm, low = lambda: nn.LayerNorm(48), lambda: LowRankLinear(48, 48, 9)
        self.layers = nn.ModuleList(
            nn.Sequential(norm(), low(), nn.Tanh(), low(), nn.Sigmoid(), norm(), low())
            for _ in range(2)
        )
        self.through_layers = through_layers

    def forward(self, x):
        places = torch.arange(len(x))
        allowed = lambda row, column: row >= column  # noqa: E731
        mask = torch.vmap(torch.vmap(allowed, (None, 0)), (0, None))(places, places + 1)
        if self.through_layers:
            mask = torch.vmap(lambda row: self.layers[1][4](self.layers[0][2](row)))(mask)
        for layer in self.layers:
            x = layer(x) + mask.float().sum(1, keepdim=True)
        return x


@pytest.mark.parametrize("through_layers", (False, True))
def test_what_is_beside_a_vmap_is_fused(through_layers):
    model, x = Masked(through_layers).eval(), torch.randn(5, 48)
    options = {"kernels": "ops"}
    with torch.no_grad(), warnings.catch_warnings(), collect() as reports:
        warnings.simplefilter("error", UserWarning)
        compiled = torch.compile(model, backend="flashsvd", options=options, fullgraph=True)
        assert_close("y", compiled(x), model(x), 1e-5)
        assert_close("y", compiled(x + 1), model(x + 1), 1e-5)
    (report,) = reports
    assert not report.unfused
    matched = {o.name: o.matches for o in report.outcomes}
    assert (matched["lowrank_chain"], matched["norm_prologue"]) == (6, 4)
    # The mask's operations, which `torch.vmap` keeps together, and the two blocks, which are alike.
    assert 2 in report.layers


def test_grad_modes_and_inference_mode_agree():
    model, x = chain().requires_grad_(False), torch.randn(5, 48)
    compiled = torch.compile(model, backend="flashsvd")
    expected = model(x)
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            assert_close(context.__name__, compiled(x), expected, 1e-5)


def test_half_precision_and_fp64():
    for dtype, limit in ((torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float64, 1e-12)):
        model = chain().to(dtype)
        x = torch.randn(7, 48, dtype=dtype)
        with torch.no_grad():
            actual = torch.compile(model, backend="flashsvd")(x)
            expected = chain_in_fp64(model, x)
        assert actual.dtype == dtype
        assert_close(str(dtype), actual, expected, limit)


def chain_in_fp64(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return copy.deepcopy(model).double()(x.double())


def test_reset_is_reached_through_dynamo():
    from fsvd_compile import report

    report._warned.add("something")
    torch.compile(chain(), backend="flashsvd")
    torch._dynamo.reset()
    assert not report._warned


@pytest.mark.parametrize("stored", [True, False], ids=["parameters", "computed"])
def test_on_a_gpu_only_parameters_and_buffers_are_read_ahead(stored):
    """Decided without a GPU: under programmatic dependent launch a computed weight may still be on its way."""
    seen = {}

    def rewrite(gm, inputs):
        for node in gm.graph.nodes:
            node.meta["stored"] = stored
        outcomes = run(PIPELINE, gm.graph, Context("cuda"))
        seen.update({o.name: (o.matches, [reason for _, reason in o.misses]) for o in outcomes})
        return gm

    with torch.no_grad():
        torch.compile(zoo.factorized("mlp"), backend=rewrite)(torch.randn(3, 48))
    matches, reasons = seen["lowrank_chain"]
    assert matches == (3 if stored else 0)
    assert stored or all("no parameter or buffer" in reason for reason in reasons)


@pytest.mark.parametrize("dynamic", [None, True])
def test_branches_that_depend_on_values(dynamic):
    """`torch.cond`: its branches are sub-graphs, which have no value."""

    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.chain = LowRankLinear(8, 8, 2)
            self.requires_grad_(False)

        def forward(self, x):
            x = self.chain(x)
            return torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: x - 1, (x,))

    model = Branching()
    compiled = torch.compile(model, backend="flashsvd", dynamic=dynamic)
    with torch.no_grad():
        for sign in (1, -1):
            x = sign * torch.randn(2, 8)
            assert_close("branch", compiled(x), model(x), 1e-5)
