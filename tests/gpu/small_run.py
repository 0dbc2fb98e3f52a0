"""Every kernel once on a small ragged pack, for compute-sanitizer: `python -m tests.gpu.small_run cuda`.

Exits with 0 once all has run; what is computed is the business of the other tests. Every tensor is an allocation of its
own (PYTORCH_NO_CUDA_MEMORY_CACHING=1), so that a read past the end of one is seen.
"""

from __future__ import annotations

import sys

import torch

import hnet_kernels as hk

from ..kernels.cases import leaf, rand
from .stage import make_stage, round_trip

LENGTHS = [1, 37, 0, 150, 2, 64, 0]


def main(device: str) -> int:
    calls = 0
    for dtype, D in ((torch.bfloat16, 96), (torch.float32, 33)):
        s = make_stage(device, dtype, D, LENGTHS)
        T = len(s.q)
        for budget in (None, 200, 60):
            candidates = torch.rand(T, device=device) < 0.9
            round_trip(s, budget, logit_bias=0.2, candidates=candidates)
            calls += 1
        r = hk.route(s.q.detach(), s.k.detach(), s.cu)
        for mode in ("boundary", "mean", "max", "last"):
            z = hk.pool(s.x, r, mode)
            torch.autograd.grad(z, s.x, torch.ones_like(z))
        p, state = leaf(torch.rand(T, device=device)), leaf(rand(len(LENGTHS), D).to(device))
        y, final = hk.ema(s.x, p, s.cu, initial_state=state, return_final_state=True)
        torch.autograd.grad(y.float().sum() + final.sum(), (s.x, p, state))
        prob, mask, _ = hk.route_step(s.q.detach(), s.k.detach())
        hk.dechunk_step(s.x.detach(), prob, mask, torch.zeros(T, D, device=device), s.residual.detach())
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{calls} round trips and every other op ran on {device}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
