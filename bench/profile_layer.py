"""Where a layer of a decode step spends its time: microseconds from the end of one kernel to the end of the next.

    python bench/profile_layer.py [--tokens 32 --layers 4]

The layers are those of `tune_layer.py`, with the tiles that launches take. Dependent launches overlap, so that a
kernel's own duration says little: what it adds is what lies between the ends. Kernels in the order they end; the
median over layers and replays, by the PyTorch profiler (CUPTI). Below them the same layers without it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
import tune_layer
from torch.profiler import ProfilerActivity, profile

from fsvd_compile.table import aligned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1, help="sequences of a step, a token each")
    parser.add_argument("--layers", type=int, default=8)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("profile_layer: kernels are timed on a GPU and there is none.")
    tune_layer.setting = tune_layer.Setting(tokens=args.tokens)
    layers = [tune_layer.Layer() for _ in range(args.layers)]
    found = between_ends(layers)
    whole = tune_layer.layer_us(layers)
    print(f"{torch.cuda.get_device_name()}, {tune_layer.setting}, {args.layers} layers")
    cells = [("kernel", "us"), *((name, f"{us:.1f}") for name, us in found)]
    cells += [("together", f"{sum(us for _, us in found):.1f}"), ("unprofiled", f"{whole:.1f}")]
    print("\n".join(aligned(cells)))


def between_ends(layers: list[tune_layer.Layer], replays: int = 4) -> list[tuple[str, float]]:
    """(kernel, microseconds since the end of the one before) of a layer, for all layers in one CUDA graph.

    Raises:
        RuntimeError: the layers have different numbers of kernels.
    """
    graph = tune_layer.captured(layers)
    graph.replay()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(replays):
            graph.replay()
        torch.cuda.synchronize()
    ends = _ends(profiler)
    per_layer, rest = divmod(len(ends), replays * len(layers))
    if rest or not per_layer:
        raise RuntimeError(
            f"{len(ends)} kernels in {replays} replays of {len(layers)} layers; each layer has to have as many."
        )
    times = defaultdict(list)
    for i, ((before, _), (end, _)) in enumerate(itertools.pairwise(ends), 1):
        if i % (per_layer * len(layers)):  # the first of a graph waits for its launch
            times[i % per_layer].append(end - before)
    return [(name, statistics.median(times[i])) for i, (_, name) in enumerate(ends[:per_layer])]


def _ends(profiler: profile) -> list[tuple[float, str]]:
    """When kernels ended, in microseconds, and their names; in that order."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kernels = (e for e in events if e.get("cat") == "kernel")
    return sorted((e["ts"] + e["dur"], e["name"]) for e in kernels)


if __name__ == "__main__":
    main()
