"""A whole training step of the laptop model on a CPU: our kernels against the reference ops, memory kept against
glibc's default. Each setting is a process of its own (glibc's setting cannot be taken back), and they take turns."""

import json
import statistics
import subprocess
import sys

import pytest

STEP = """
import json, sys, time
import torch
import torch.nn.functional as F
import hnet_kernels as hk
from hnet import HNetConfig, HNetForCausalLM
backend, keep, T, L, steps = sys.argv[1], sys.argv[2] == "kept", *map(int, sys.argv[3:])
if keep: hk.keep_memory()
torch.manual_seed(0)
model = HNetForCausalLM(HNetConfig.preset("laptop"))
opt = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
cu = torch.arange(0, T + 1, L, dtype=torch.int32)
seconds = []
with hk.backend(backend):
    for i in range(steps + 4):
        ids = torch.randint(0, 256, (T,))
        begin = time.perf_counter()
        out = model(ids, cu_seqlens=cu)
        loss = F.cross_entropy(out.logits, ids.roll(-1)) + 0.5 * hk.ratio_loss(out.routing[0], 4.0)
        loss.backward()
        opt.step()
        opt.zero_grad()
        seconds.append(time.perf_counter() - begin)
print(json.dumps(seconds[4:]))
"""


@pytest.mark.parametrize("T", [16384, 65536])
def test_train_step(benchmark, smoke, rounds, keep_row, T):
    T, L, steps = (512, 128, 1) if smoke else (T, 512, 3)
    settings = [("auto", "kept"), ("auto", "default"), ("reference", "kept")]
    seconds: dict[str, list[float]] = {f"{b} ops, memory {m}": [] for b, m in settings}

    def turn():
        for backend, memory in settings:
            args = [sys.executable, "-c", STEP, backend, memory, str(T), str(L), str(steps)]
            out = subprocess.run(args, capture_output=True, text=True, check=True).stdout
            seconds[f"{backend} ops, memory {memory}"] += json.loads(out)

    benchmark.pedantic(turn, rounds=1 if smoke else max(rounds // 7, 3), iterations=1)
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    keep_row(medians, ours="auto ops, memory kept", op="training step", dtype="float32", T=T, L=L, model="laptop")
