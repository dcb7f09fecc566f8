"""Which tensors of a checkpoint are the two factors of which module: one row per way of naming them.

Names alone never decide which factor comes first (ASVD and LowRankArena call the first `BLinear`, Dobi-SVD
`ALinear`): shapes do. Facts about the layouts are read off the public repositories named in each row.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping

import torch

from fsvd_compile.errors import CheckpointError
from fsvd_compile.families.source import Source


@dataclasses.dataclass(frozen=True)
class Factors:
    """A module's factors as they lie in a checkpoint, in the order of their names.

    Attributes:
        first, second: Keys of the two weights; which of them reads the input is not said.
        biases: Keys of biases beside them.
    """

    first: str
    second: str
    biases: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        return self.first, self.second, *self.biases


@dataclasses.dataclass(frozen=True)
class Family:
    """One way of storing factorized modules.

    Attributes:
        name: What `inspect` prints.
        source: Where the layout comes from.
        roles: A pattern of weight names without `.weight` to the module's name and the factor's place
            (0 or 1), or None for a key of another kind.
        told: Whether a checkpoint says that it is of this family and not of another with the same keys.
    """

    name: str
    source: str
    roles: Callable[[str], tuple[str, int] | None]
    told: Callable[[Source], bool] | None = None


def _nested(first: str, second: str) -> Callable[[str], tuple[str, int] | None]:
    """`<module>.<first>` and `<module>.<second>`."""

    def roles(key: str) -> tuple[str, int] | None:
        module, _, last = key.rpartition(".")
        return (module, (first, second).index(last)) if module and last in (first, second) else None

    return roles


# SVD-LLM names the projections of a block by a letter; OPT's output and MLP layers have names of their own.
_PROJECTIONS = {p: f"{p}_proj" for p in ("q", "k", "v", "o", "out", "gate", "up", "down")}
_PROJECTIONS |= {"fc1": "fc1", "fc2": "fc2"}
_LETTER = re.compile(rf"(.*\.)?({'|'.join(_PROJECTIONS)})_(v|u)_proj")
_BASIS = re.compile(rf"(.*\.)?({'|'.join(_PROJECTIONS)})_(basis|proj)")


def _by_letter(key: str) -> tuple[str, int] | None:
    """`q_v_proj` and `q_u_proj` of `q_proj`."""
    found = _LETTER.fullmatch(key)
    if found is None:
        return None
    return (found[1] or "") + _PROJECTIONS[found[2]], "vu".index(found[3])


def _by_basis(key: str) -> tuple[str, int] | None:
    """`q_basis` and the coefficients under the module's own name."""
    found = _BASIS.fullmatch(key)
    if found is None:
        return None
    return (found[1] or "") + _PROJECTIONS[found[2]], ("basis", "proj").index(found[3])


def _has(*keys: str) -> Callable[[Source], bool]:
    return lambda source: any(key in source.config for key in keys)


FAMILIES: tuple[Family, ...] = (
    Family("common", "fsvd_compile.save", _nested("v", "u")),
    Family("SVD-LLM", "arXiv 2403.07378 and 2503.12340, AIoT-MLSys-Lab/SVD-LLM", _by_letter),
    Family(
        "Dobi-SVD",
        "arXiv 2502.02723, wangqinsi1/Dobi-SVD, without remapping",
        _nested("ALinear", "BLinear"),
        lambda s: "dobi_target_modules" in s.config or any("SVDTransform" in c for c in s.classes.values()),
    ),
    Family("Dobi-SVD", "arXiv 2502.02723, wangqinsi1/Dobi-SVD, remapped to 8 bits", _nested("vt", "us")),
    Family("ASVD", "arXiv 2312.05821, hahnyuan/ASVD4LLM", _nested("BLinear", "ALinear"), _has("truncation_ranks")),
    Family("LowRankArena", "Zishan-Shao/lowrankarena, ABLinear", _nested("BLinear", "ALinear")),
    Family("Basis Sharing", "arXiv 2410.03765, TUDa-HWAI/Basis_Sharing", _by_basis),
    Family("LEMS / KFAC-SVD", "mod_a, mod_b", _nested("mod_a", "mod_b")),
    Family(
        "SVD-LLM",
        "Zishan-Shao/lowrankarena, svdllm-llama",
        _nested("v_proj", "u_proj"),
        _has("svd_ranks"),
    ),
    Family("ZS-SVD", "v_proj and u_proj under a module", _nested("v_proj", "u_proj")),
    Family("AA-SVD", "V and U under a module", _nested("V", "U")),
    Family("Palu", "arXiv 2407.21118, shadowpa0327/Palu", _nested("VT", "U")),
    Family("FWSVD", "arXiv 2207.00112, s-nlp's", _nested("lin0", "lin1")),
    Family("PELA", "nn.Sequential of two linears", _nested("0", "1")),
)  # fmt: skip
# What a checkpoint without factors is; it may be dense in disguise.
DENSE = Family("dense", "no factors", lambda key: None)


def find(
    source: Source, tensors: Mapping[str, torch.Tensor], modules: Container[str]
) -> tuple[Family | None, dict[str, Factors]]:
    """The family with the most complete pairs, and its pairs by module name.

    Families with the same keys are told apart by what the checkpoint says of itself.

    Args:
        source: The checkpoint, for what it says of itself.
        tensors: Its tensors under the plain model's names.
        modules: Names of the plain model's linear modules; pairs of others are none.

    Returns:
        (None, {}) if there is no pair.
    """
    found = [(family, dict(_pairs(family, tensors, modules))) for family in FAMILIES]
    most = max(len(pairs) for _, pairs in found)
    if most == 0:
        return None, {}
    best = [(family, pairs) for family, pairs in found if len(pairs) == most]
    told = [(family, pairs) for family, pairs in best if family.told and family.told(source)]
    silent = [(family, pairs) for family, pairs in best if family.told is None]
    return (told or silent or best)[0]


def nearest(tensors: Iterable[str]) -> str | None:
    """The families after which most tensors are named, and how many are; None where there are none."""
    keys = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
    hits = {
        # Coefficients under the module's own name may be a dense weight.
        family: sum((role := family.roles(key)) is not None and role[0] != key for key in keys)
        for family in FAMILIES
        if family.name != "PELA"  # its names are numbers, which any nn.Sequential has
    }
    most = max(hits.values())
    names = dict.fromkeys(family.name for family, count in hits.items() if count == most)
    return f"{' or '.join(names)}, after which {most} are named" if most else None


def _pairs(
    family: Family, tensors: Mapping[str, torch.Tensor], modules: Container[str]
) -> Iterator[tuple[str, Factors]]:
    halves: dict[str, dict[int, str]] = {}
    for name, tensor in tensors.items():
        if not name.endswith(".weight") or tensor.dim() != 2:
            continue
        role = family.roles(name.removesuffix(".weight"))
        if role is not None and role[0] in modules:
            halves.setdefault(role[0], {})[role[1]] = name
    for module, keys in halves.items():
        if len(keys) < 2:
            continue
        beside = [f"{key.removesuffix('.weight')}.bias" for key in (keys[0], keys[1])]
        beside.append(f"{module}.bias")
        biases = tuple(key for key in dict.fromkeys(beside) if key in tensors)
        yield module, Factors(keys[0], keys[1], biases)


def is_swapped(
    pairs: Mapping[str, Factors],
    tensors: Mapping[str, torch.Tensor],
    shapes: Mapping[str, tuple[int, int]],
) -> bool:
    """Whether U comes before V in the order of the names, wherever shapes tell: square full-rank factors do not.

    A checkpoint is written by one code in one order. Where none of its pairs tells, or they disagree, it is the
    order of the family's names.
    """
    orders = set()
    for name, factors in pairs.items():
        a, b = tensors[factors.first].shape, tensors[factors.second].shape
        plain = a[0] == b[1] and (b[0], a[1]) == shapes[name]
        swapped = b[0] == a[1] and (a[0], b[1]) == shapes[name]
        if plain != swapped:
            orders.add(swapped)
    return orders == {True}


def oriented(
    module: str,
    a: torch.Tensor,
    b: torch.Tensor,
    out_features: int,
    in_features: int,
    swap: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """(U, V, whether V is `a`) of two factors in whichever order and orientation they were stored.

    Of all that multiply to `[out_features, in_features]` the one with the smallest rank is meant; of
    equals, the one that was stored as two `nn.Linear` in the order of the names, or with `swap` in the other.

    Raises:
        CheckpointError: they do not multiply to that shape either way.
    """
    candidates = []
    for flips in range(4):
        first, second = (t.T if flips & bit else t for t, bit in ((a, 1), (b, 2)))
        for swapped, (v, u) in enumerate(((first, second), (second, first))):
            if v.shape[0] == u.shape[1] and (u.shape[0], v.shape[1]) == (out_features, in_features):
                candidates.append((v.shape[0], flips, swapped != swap, swapped, u, v))
    if not candidates:
        raise CheckpointError(
            f"{module}: factors {list(a.shape)} and {list(b.shape)} do not multiply to the module's "
            f"[{out_features}, {in_features}]; the config or a factor belongs to another model."
        )
    *_, swapped, u, v = min(candidates, key=lambda c: c[:3])
    return u, v, not swapped
