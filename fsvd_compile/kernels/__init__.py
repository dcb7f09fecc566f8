"""The custom ops `torch.ops.fsvd.*`: importing this package registers them, with or without a GPU.

| op | what it computes | replaces |
| --- | --- | --- |
| `fsvd::shrink` | concat of norm(x) @ V_i^T + c_i | norm, V of q/k/v or gate/up |
| `fsvd::expand` | block-diagonal z_i @ U_i^T + b_i and epilogue | U, bias, SwiGLU, residual |
| `fsvd::expand_rms`, `fsvd::shrink_rms` | an expand and a shrink with RMSNorm between them | the norm |
| `fsvd::rope_append` | rotates q and k, writes k and v into the cache | rope, two index_copy_ |
| `fsvd::attention` | grouped-query attention that reads K and V once | repeat_kv, SDPA |
| `fsvd::decode_attention` | the two above for one token a sequence | both |

Each file has `<op>_reference` (fp32 ground truth), `<op>_aten` (torch ops only: for CPUs, and for Inductor to fuse in
prefill) and `<op>_triton` (the kernels); `carried` is made of the first two files' and has no reference of its own. A
CUDA tensor takes the path `fsvd_compile.phase` says. The ops have no gradient: they are for inference.
"""

from fsvd_compile.kernels.attention import (
    attention_aten,
    attention_reference,
    attention_triton,
    sdpa_of_any_length,
)
from fsvd_compile.kernels.carried import (
    expand_rms_aten,
    expand_rms_triton,
    rms_operands,
    shrink_rms_aten,
    shrink_rms_triton,
)
from fsvd_compile.kernels.decode_attention import (
    decode_attention_aten,
    decode_attention_reference,
    decode_attention_triton,
    mask_reach,
)
from fsvd_compile.kernels.expand import expand_aten, expand_reference, expand_triton
from fsvd_compile.kernels.rope_append import (
    rope_append_aten,
    rope_append_reference,
    rope_append_triton,
)
from fsvd_compile.kernels.shrink import shrink_aten, shrink_reference, shrink_triton

__all__ = [
    "attention_aten",
    "attention_reference",
    "attention_triton",
    "decode_attention_aten",
    "decode_attention_reference",
    "decode_attention_triton",
    "expand_aten",
    "expand_reference",
    "expand_rms_aten",
    "expand_rms_triton",
    "expand_triton",
    "mask_reach",
    "rms_operands",
    "rope_append_aten",
    "rope_append_reference",
    "rope_append_triton",
    "sdpa_of_any_length",
    "shrink_aten",
    "shrink_reference",
    "shrink_rms_aten",
    "shrink_rms_triton",
    "shrink_triton",
]
