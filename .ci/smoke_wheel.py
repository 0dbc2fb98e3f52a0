"""An installed wheel in use: `python smoke_wheel.py [ops]`, from anywhere. `ops`: the wheel has no hnet package."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import hnet_kernels as hk
from hnet_kernels import _C, info

assert Path(hk.__file__).resolve().is_relative_to(Path(sys.prefix).resolve()), f"not the wheel: {hk.__file__}"
assert importlib.metadata.version("hnet-kernels") == hk.__version__
print(info.report())

q, k, x = (torch.randn(100, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
cu_seqlens = torch.tensor([0, 1, 40, 100], dtype=torch.int32)


def outputs(backend: str) -> list[torch.Tensor]:
    rows = [t.clone().requires_grad_() for t in (q, k, x)]
    with hk.backend(backend):
        r = hk.route(*rows[:2], cu_seqlens)
        out = hk.dechunk(hk.pool(rows[2], r), r, rows[2])
        loss = out.square().mean() + hk.ratio_loss(r, 3.0)
    return [out, loss, *torch.autograd.grad(loss, rows)]


for ours, plain in zip(outputs("cpu"), outputs("reference"), strict=True):
    torch.testing.assert_close(ours, plain)
before = torch.get_num_threads()
torch.set_num_threads(1)
one = outputs("cpu")
torch.set_num_threads(before)
assert all(torch.equal(a, b) for a, b in zip(one, outputs("cpu"), strict=True))
if sys.platform == "linux":  # a second OpenMP runtime would not follow torch.set_num_threads
    maps = Path("/proc/self/maps").read_text().splitlines()
    runtimes = {line.split(maxsplit=5)[5] for line in maps if "gomp" in line}
    assert len(runtimes) == 1, f"OpenMP runtimes: {runtimes}"
    assert _C.has_openmp()

if "ops" in sys.argv[1:]:
    assert importlib.util.find_spec("hnet") is None
else:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "text.txt").write_text("the cat sat on the mat, and the dog on the log\n\n" * 400)
        hnet = [sys.executable, "-m", "hnet"]
        options = "--data text.txt --preset tiny --steps 2 --batch-bytes 512 --seq-len 128 --eval-bytes 1024 --out run"
        page = ["segment", "run", "text.txt", "--bytes", "200", "--out", "chunks.html"]  # of files that are no Python
        for command in (["--version"], ["train", *options.split()], ["generate", "run", "--prompt", "the "], page):
            env = {**os.environ, "PYTHONSAFEPATH": "1"}
            subprocess.run([*hnet, *command], cwd=folder, env=env, check=True)
print(f"hnet-kernels {hk.__version__} works from {Path(hk.__file__).parent}")
