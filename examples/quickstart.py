"""The whole road on a tiny random Llama: factorize with calibration data, compile, compare,
explain."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fsvd_compile

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
config = LlamaConfig(
    hidden_size=256,
    intermediate_size=688,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=1000,
)
model = LlamaForCausalLM(config).eval().requires_grad_(False).to(device)

# Calibration batches are token tensors [B, T], or dicts of the model's keyword arguments.
calibration = [torch.randint(0, config.vocab_size, (2, 64)) for _ in range(4)]
report = fsvd_compile.factorize(model, keep=0.5, calibration=calibration)
print(report)

# Each selected linear is now u(v(x)), two smaller ones.
print(model.model.layers[0].mlp.gate_proj)

compiled = torch.compile(model, backend="flashsvd")
ids = torch.randint(0, config.vocab_size, (1, 16), device=device)
with torch.no_grad():
    expected, actual = model(ids).logits, compiled(ids).logits
error = ((actual - expected).norm() / expected.norm()).item()
print(f"\nrelative difference between compiled and eager: {error:.1e}")
assert error < 1e-4, "the compiled model gives other numbers than the eager one"

print(fsvd_compile.explain(compiled, ids))
