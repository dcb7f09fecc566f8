"""The common modules: every SVD family becomes `LowRankLinear`, y = U (V x) + b; what keeps its dense weight with a
low-rank pair beside it is a `BranchedLinear`, y = W x + b + U (V x).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fsvd_compile.errors import FactorError


class LowRankLinear(nn.Module):
    """A linear layer held as two factors: `forward(x) = u(v(x))`.

    `v` and `u` are plain `nn.Linear`, so the traced graph is `linear(linear(x, V), U, b)`, the one
    spelling all published families share, and parameter names are `<name>.v.weight`,
    `<name>.u.weight` and `<name>.u.bias`. Sizes are read from the weights on every access: loaders
    assign tensors whose rank differs from the one a module was built with, and a stored attribute
    would then be wrong.

    `v` may be one object in several modules (Basis Sharing, arXiv 2410.03765): `b.v = a.v`. Both
    names appear in `state_dict()`; transformers' `save_pretrained` writes one copy.

    Args:
        in_features: Size n of the last dimension of the input.
        out_features: Size m of the last dimension of the output.
        rank: Inner size r; any integer of at least 1, also odd or above min(m, n).
        bias: Whether `u` adds a bias of shape `[out_features]`.
        device: Where the weights are made.
        dtype: The dtype of both weights and the bias.

    Attributes:
        v: `nn.Linear(in_features, rank)`, weight `[rank, in_features]`.
        u: `nn.Linear(rank, out_features)`, weight `[out_features, rank]`.

    Raises:
        FactorError: a size is not a positive integer.
    """

    # transformers asks every module for these and refuses to save shared tensors that are not named
    # here.
    _tied_weights_keys = {"v.weight": "v.weight"}  # noqa: RUF012

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"in_features": in_features, "out_features": out_features, "rank": rank}
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise FactorError(f"LowRankLinear: {name}={size!r} has to be an int of at least 1.")
        self.v = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.u = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    def from_factors(
        cls, u: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None
    ) -> LowRankLinear:
        """The module for W = u @ v.

        Args:
            u: Of shape `[out_features, rank]`.
            v: Of shape `[rank, in_features]`, same dtype and device as `u`.
            bias: Of shape `[out_features]`, same dtype and device, or `None`.

        Returns:
            A module whose parameters share memory with the tensors given (no copy). Tensors that
            are parameters already are taken as they are, so a `v` given twice is shared.

        Raises:
            FactorError: shapes, dtypes or devices do not fit together.
        """
        _check_factors(u, v, bias)
        module = cls(v.shape[1], u.shape[0], u.shape[1], bias=bias is not None, device="meta")
        module.v.weight = _parameter(v)
        module.u.weight = _parameter(u)
        if bias is not None:
            module.u.bias = _parameter(bias)
        return module

    @property
    def in_features(self) -> int:
        return self.v.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.u.weight.shape[0]

    @property
    def rank(self) -> int:
        return self.v.weight.shape[0]

    @property
    def weight(self) -> Product:
        """The dense weight, for code that looks at a linear layer's from outside."""
        return Product(self.u.weight, self.v.weight)

    @property
    def bias(self) -> nn.Parameter | None:
        """That of `u`."""
        return self.u.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        return self.u(self.v(x))

    def dense_weight(self) -> torch.Tensor:
        """U V in fp32, of shape `[out_features, in_features]`, detached."""
        return self.u.weight.detach().float() @ self.v.weight.detach().float()

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}"


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, a linear layer whose weight is `[in, out]`; by name, nothing is imported."""
    return type(module).__name__ == "Conv1D"


class BranchedLinear(nn.Module):
    """A dense linear layer with a low-rank pair beside it: `forward(x) = base(x) + branch(x)`.

    What a LoRA adapter is on a dense weight, exactly and without touching it. Parameter names are
    `<name>.base.weight`, `<name>.base.bias`, `<name>.branch.v.weight` and `<name>.branch.u.weight`.

    Args:
        base: An `nn.Linear`, or transformers' Conv1D; taken as it is, with its bias.
        branch: From and to the same number of features, without a bias; a scale belongs into its `u`.

    Raises:
        FactorError: the base is no linear layer with a 2-D weight, or the branch no `LowRankLinear`, or one with a
            bias or another shape.
    """

    def __init__(self, base: nn.Module, branch: LowRankLinear) -> None:
        super().__init__()
        weight = getattr(base, "weight", None)
        linear = isinstance(base, nn.Linear) or is_conv1d(base)
        if not linear or not isinstance(weight, torch.Tensor) or weight.dim() != 2:
            raise FactorError(
                f"BranchedLinear: base is a {type(base).__name__}; it takes an nn.Linear or a Conv1D."
            )
        if not isinstance(branch, LowRankLinear):
            raise FactorError(
                f"BranchedLinear: branch is a {type(branch).__name__}; it takes a LowRankLinear."
            )
        shape = tuple(weight.shape if isinstance(base, nn.Linear) else weight.shape[::-1])
        if shape != (branch.out_features, branch.in_features):
            raise FactorError(
                f"BranchedLinear: base is {list(shape)} and branch "
                f"{[branch.out_features, branch.in_features]}; both have to be [out_features, in_features]."
            )
        if branch.u.bias is not None:
            raise FactorError("BranchedLinear: the branch has a bias; the base's is the only one.")
        self.base = base
        self.branch = branch

    @property
    def in_features(self) -> int:
        return self.branch.in_features

    @property
    def out_features(self) -> int:
        return self.branch.out_features

    @property
    def weight(self) -> Product:
        """The sum, `[out_features, in_features]`, for code that looks at a linear layer's weight from outside."""
        base = self.base.weight if isinstance(self.base, nn.Linear) else self.base.weight.T
        return Product(self.branch.u.weight, self.branch.v.weight, base)

    @property
    def bias(self) -> nn.Parameter | None:
        """That of `base`."""
        return self.base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        return self.base(x) + self.branch(x)


class Product:
    """U V, or W + U V, in the place of a dense weight: nothing is multiplied until a value is asked for.

    Models read `.weight.dtype` and `.device` of their linear layers in `forward` (T5, BLIP-2), which costs nothing
    here, and some multiply by it (Mamba), which costs the product anew each time, and a graph break. Other
    attributes and methods are those of the tensor that it stands for, but for those that write; functions of torch
    refuse it and take `tensor()`. (With a `__torch_function__` they would not, but Dynamo of torch 2.13 would make
    x @ weight of weight @ x.)

    Args:
        u: `[out_features, rank]`.
        v: `[rank, in_features]`.
        base: `[out_features, in_features]`, added to the product.
    """

    # What transformers' initializers leave alone.
    _is_hf_initialized = True

    def __init__(self, u: torch.Tensor, v: torch.Tensor, base: torch.Tensor | None = None) -> None:
        self._u, self._v, self._base = u, v, base

    @property
    def dtype(self) -> torch.dtype:
        return (self._u if self._base is None else self._base).dtype

    @property
    def device(self) -> torch.device:
        return self._u.device

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self._u.shape[0], self._v.shape[1]))

    def tensor(self) -> torch.Tensor:
        """What it stands for, newly multiplied; gradients flow to the factors."""
        product = self._u @ self._v.to(self._u.dtype)
        return product if self._base is None else self._base + product.to(self._base.dtype)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked by copy and pickle of what has no factors yet
            raise AttributeError(name)
        if name in ("data", "grad") or name.endswith("_"):
            self._refuse(name)
        return getattr(self.tensor(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("_u", "_v", "_base"):
            self._refuse(name)
        super().__setattr__(name, value)

    def __setitem__(self, index: Any, value: Any) -> None:
        self._refuse("[]")

    def _refuse(self, name: str) -> None:
        raise FactorError(
            f"weight.{name}: the weight of a {' x '.join(map(str, self.shape))} layer is held as two factors, and what "
            "is written to their product would be lost. Write to `u.weight` and `v.weight`, or read `weight.tensor()`."
        )

    def __matmul__(self, other: Any) -> torch.Tensor:
        return self.tensor() @ other

    def __rmatmul__(self, other: Any) -> torch.Tensor:
        return other @ self.tensor()


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach())


def _check_factors(u: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> None:
    given = {"u": u, "v": v} | ({} if bias is None else {"bias": bias})
    for name, tensor in given.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise FactorError(f"from_factors: {name} is {kind}; it has to be a floating tensor.")
    shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in given.items())
    if u.dim() != 2 or v.dim() != 2 or u.numel() == 0 or v.numel() == 0:
        raise FactorError(
            f"from_factors: {shapes}; u has to be [out_features, rank] and v [rank, in_features]."
        )
    if u.shape[1] != v.shape[0]:
        swapped = v.shape[1] == u.shape[0]
        hint = "u and v look swapped" if swapped else "one of them may be stored transposed"
        raise FactorError(
            f"from_factors: {shapes}; u is [out_features, rank] and v [rank, in_features], so "
            f"u.shape[1] has to equal v.shape[0]; {hint}."
        )
    if bias is not None and tuple(bias.shape) != (u.shape[0],):
        raise FactorError(
            f"from_factors: {shapes}; bias has to be [out_features] = [{u.shape[0]}]."
        )
    for name, tensor in given.items():
        if tensor.dtype != u.dtype or tensor.device != u.device:
            raise FactorError(
                f"from_factors: {name} is {tensor.dtype} on {tensor.device} but u is {u.dtype} on "
                f"{u.device}; convert with {name}.to(u) first."
            )
