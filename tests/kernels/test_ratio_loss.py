import os
import subprocess
import sys

import pytest
import torch

import hnet_kernels as hk

from . import oracle
from .cases import PACKS, assert_close, cu_of, leaf, qk_with_rate


def routed(on, lengths, rate=0.3, dtype=torch.float32):
    backend, device = on
    q, k = qk_with_rate(sum(lengths), 16, rate, dtype)
    q, k = leaf(q.to(device)), leaf(k.to(device))
    return hk.route(q, k, cu_of(lengths, device), backend=backend), q, k


def loss_on(on, *args, **kwargs):
    with hk.backend(on[0]):
        return hk.ratio_loss(*args, **kwargs)


@pytest.mark.parametrize("n", [1.5, 3.0, 6.0])
def test_batch(on, n):
    r, q, k = routed(on, PACKS["ragged"])
    loss = loss_on(on, r, n)
    assert_close(loss.detach().cpu(), oracle.ratio_loss(r.boundary_prob.detach().cpu(), r.boundary_mask.cpu(), n), 1e-6)
    got = torch.autograd.grad(loss, (q, k))
    r, q, k = routed(on, PACKS["ragged"])
    want = torch.autograd.grad(oracle.ratio_loss(r.boundary_prob, r.boundary_mask, n), (q, k))
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, 1e-5)


def test_sequence_is_the_mean_of_one_loss_each(on):
    lengths = PACKS["ragged"]
    r, *_ = routed(on, lengths)
    want = [
        oracle.ratio_loss(r.boundary_prob[s:e].detach().cpu(), r.boundary_mask[s:e].cpu(), 4.0)
        for s, e in oracle.spans(r.cu_seqlens.cpu())
        if e > s
    ]
    assert_close(loss_on(on, r, 4.0, reduction="sequence").detach().cpu(), torch.stack(want).mean(), 1e-6)


def test_equals_one_for_every_rate_when_the_mean_probability_is_on_target(on):
    """Why nobody may read the loss as proof: G = 1/N hides any F."""
    r, *_ = routed(on, [100])
    for chunks in (2, 50, 99):
        cu_chunks = torch.tensor([0, chunks], dtype=torch.int32, device=on[1])
        fake = r._replace(prob_sum=torch.full_like(r.prob_sum, 25.0), cu_chunks=cu_chunks)
        assert abs(loss_on(on, fake, 4.0).item() - 1) < 1e-6


def test_straight_through_adds_the_gradient_of_f(on):
    r, *_ = routed(on, [200])
    n = 4.0
    plain = torch.autograd.grad(loss_on(on, r, n), r.prob_sum, retain_graph=True)[0]
    through = torch.autograd.grad(loss_on(on, r, n, straight_through=True), r.prob_sum, retain_graph=True)[0]
    F, G = r.boundary_mask.float().mean().item(), r.boundary_prob.mean().item()
    scale = n / (n - 1) / 200
    assert plain.item() == pytest.approx(scale * ((n - 1) * F - (1 - F)), rel=1e-4)
    assert through.item() - plain.item() == pytest.approx(scale * ((n - 1) * G - (1 - G)), rel=1e-3)
    assert loss_on(on, r, n).item() == loss_on(on, r, n, straight_through=True).item()


def by_hand(prob_sum, cu_seqlens, cu_chunks, n, reduction, straight_through):
    """The loss in fp64 on any device, with F as a constant or carrying the gradient of G."""
    lengths, counts = cu_seqlens.diff().double(), cu_chunks.diff().double()
    if reduction == "batch":
        lengths, counts, prob_sum = lengths.sum()[None], counts.sum()[None], prob_sum.sum()[None]
    some = lengths > 0
    F, G = counts[some] / lengths[some], prob_sum[some] / lengths[some]
    if straight_through:
        F = F + (G - G.detach())
    return (n / (n - 1) * ((n - 1) * F * G + (1 - F) * (1 - G))).mean()


@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("reduction", ["batch", "sequence"])
@pytest.mark.parametrize("N", [1, 7, 600])
def test_value_and_gradient_from_the_sums(on, N, reduction, straight_through):
    """Many sequences, empty ones among them; the loss is used twice."""
    g = torch.Generator().manual_seed(N)
    lengths = torch.randint(0, 40, (N,), generator=g)
    lengths[0], lengths[1:2] = 30, 0
    counts = (lengths * torch.rand(N, generator=g)).ceil().long()
    r, *_ = routed(on, [4])
    cu_seqlens, cu_chunks = cu_of(lengths.tolist(), on[1]), cu_of(counts.tolist(), on[1])
    prob_sum = leaf((lengths * torch.rand(N, generator=g)).to(on[1]))
    r = r._replace(prob_sum=prob_sum, cu_seqlens=cu_seqlens, cu_chunks=cu_chunks)
    options = {"reduction": reduction, "straight_through": straight_through}
    loss = loss_on(on, r, 5.5, **options)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    prob_sum64 = leaf(prob_sum.double())
    want = by_hand(prob_sum64, cu_seqlens, cu_chunks, 5.5, **options)
    assert_close(loss.detach(), want.detach(), 1e-5)
    (got,) = torch.autograd.grad(2 * loss + loss, prob_sum)
    assert_close(got, torch.autograd.grad(3 * want, prob_sum64)[0], 1e-5)


WORKER = """
import sys, torch, torch.distributed as dist, hnet_kernels as hk
rank, world, port = int(sys.argv[1]), 2, sys.argv[2]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
torch.manual_seed(0)
q, k = torch.randn(90, 8), torch.randn(90, 8)
rows = slice(0, 60) if rank == 0 else slice(60, 90)
qs = q[rows].clone().requires_grad_()
r = hk.route(qs, k[rows], torch.tensor([0, rows.stop - rows.start], dtype=torch.int32))
loss = hk.ratio_loss(r, 3.0, reduction="global")
loss.backward()
qw = q.clone().requires_grad_()
whole = hk.ratio_loss(hk.route(qw, k, torch.tensor([0, 60, 90], dtype=torch.int32)), 3.0)
whole.backward()
assert torch.allclose(loss, whole, atol=1e-6), (loss, whole)
assert torch.allclose(qs.grad / world, qw.grad[rows], atol=1e-7), (qs.grad / world - qw.grad[rows]).abs().max()
dist.destroy_process_group()
print("agrees")
"""


def test_global_over_two_processes_equals_one():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(i), port], env=env, stdout=subprocess.PIPE)
        for i in range(2)
    ]
    outputs = [w.communicate(timeout=600)[0] for w in workers]
    assert [w.returncode for w in workers] == [0, 0]
    assert all(b"agrees" in out for out in outputs)
