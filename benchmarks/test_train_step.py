"""A whole training step. Of the laptop model on a CPU: our kernels against plain PyTorch, for its layers and for
chunking too, memory kept against glibc's default; each setting is a process of its own (glibc's setting cannot be taken
back), and they take turns. On a GPU: the forms of the trainer's step, one after the other."""

import dataclasses
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from hnet.train.config import TrainConfig

from . import steps

ROOT = Path(__file__).parents[1]

STEP = """
import json, sys, time
import torch
import torch.nn.functional as F
import hnet_kernels as hk
from hnet import HNetConfig, HNetForCausalLM
ops, keep, bf16, T, L, steps = sys.argv[1], sys.argv[2] == "kept", sys.argv[3] == "bfloat16", *map(int, sys.argv[4:])
if keep: hk.keep_memory()
if ops != "ours":
    from benchmarks import plain_layers
    plain_layers.use()
torch.manual_seed(0)
model = HNetForCausalLM(HNetConfig.preset("laptop"))
opt = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
cu = torch.arange(0, T + 1, L, dtype=torch.int32)
seconds = []
with hk.backend("reference" if ops == "plain" else "auto"):
    for i in range(steps + 4):
        ids = torch.randint(0, 256, (T,))
        begin = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            out = model(ids, cu_seqlens=cu)
        loss = F.cross_entropy(out.logits.float(), ids.roll(-1)) + 0.5 * hk.ratio_loss(out.routing[0], 4.0)
        loss.backward()
        opt.step()
        opt.zero_grad()
        seconds.append(time.perf_counter() - begin)
print(json.dumps(seconds[4:]))
"""


SETTINGS = {
    "ours": ("ours", "kept"),
    "ours, glibc's default memory": ("ours", "default"),
    "plain layers": ("plain layers", "kept"),
    "plain layers and chunking": ("plain", "kept"),
}


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("T", [2048, 16384])
def test_train_step(benchmark, smoke, rounds, keep_row, T, dtype):
    if smoke and T > 2048:
        pytest.skip("one size is enough to see that it runs")
    T, L, count = (512, 128, 1) if smoke else (T, 512, max(3, 24576 // T))
    seconds: dict[str, list[float]] = {name: [] for name in SETTINGS}

    def turn():
        for name, (ops, memory) in SETTINGS.items():
            args = [sys.executable, "-c", STEP, ops, memory, dtype, str(T), str(L), str(count)]
            out = subprocess.run(args, capture_output=True, text=True, check=True, cwd=ROOT).stdout
            seconds[name] += json.loads(out)

    benchmark.pedantic(turn, rounds=1 if smoke else max(rounds // 7, 3), iterations=1)
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    keep_row(medians, ours="ours", op="training step", dtype=dtype, T=T, L=L, model="laptop")


# --- on a GPU ---------------------------------------------------------------------------------------------------------

CASES = [  # the most telling first
    steps.Case("laptop", 8192, 1024, [4.0]),
    steps.Case("small", 32768, 2048, [4.0]),
    steps.Case("hnet_1stage_L", 131072, 8192, [6.0]),
    steps.Case("laptop", 32768, 1024, [4.0]),
    steps.Case("hnet_1stage_L", 32768, 8192, [6.0]),
]
TINY = steps.Case("tiny", 512, 128, [3.0])
ON = [pytest.param("cpu", TINY, id="cpu"), *(pytest.param("cuda", c, id=str(c), marks=pytest.mark.gpu) for c in CASES)]


def contenders(hnet: TrainConfig, isotropic: TrainConfig, large: bool) -> dict[str, TrainConfig]:
    """A large model's step takes seconds, and so does compiling it: the forms that matter there."""
    budget = steps.with_budget(hnet)
    forms = {
        "eager": (hnet, False, "off"),
        "eager, budget": (budget, False, "off"),
        "captured": (budget, False, "on"),
        "compiled": (budget, True, "off"),
        "captured, compiled": (budget, True, "on"),
        "isotropic": (isotropic, False, "off"),
        "isotropic, captured, compiled": (isotropic, True, "on"),
    }
    kept = ("eager", "compiled", "captured, compiled", "isotropic, captured, compiled") if large else tuple(forms)
    return {
        name: dataclasses.replace(config, compile=compiled, cuda_graph=graph)
        for name, (config, compiled, graph) in forms.items()
        if name in kept
    }


@pytest.mark.parametrize(("device", "case"), ON)
def test_forms_of_the_step(smoke, keep_row, tmp_path, device, case):
    """The trainer's own step: eager, with a budget, captured, compiled; and a Transformer of as many FLOPs a byte."""
    if device == "cpu" and not smoke:
        pytest.skip("only to see that the benchmark runs")
    case = TINY if smoke else case
    large = case.preset.startswith("hnet_")
    warmup, count = (1, 2) if smoke else (5, 5) if large else (8, 20)
    found: dict[str, steps.Steps] = {}
    left_out: dict[str, str] = {}
    for name, config in contenders(**steps.prepare(tmp_path, case, device), large=large).items():
        if device == "cpu" and (config.compile or config.cuda_graph == "on"):
            left_out[name] = "needs a GPU"
            continue
        try:
            found[name] = steps.measure(config, warmup, count)
        except Exception as e:  # the others are worth their while
            left_out[name] = f"{type(e).__name__}: {e}"
    for name, why in left_out.items():
        print(f"{name} left out: {why}")
    assert found
    values = {field: {n: getattr(s, field) for n, s in found.items()} for field in steps.Steps._fields}
    keep_row(
        values.pop("seconds"), ours=next(iter(found)), op="training step", model=case.preset, T=case.T, L=case.L,
        device=device, **values, left_out=left_out,
    )  # fmt: skip
    assert device == "cpu" or not left_out
