"""A training step of ChunkLM (forward, backward, AdamW) at several cutoffs, against the same model in plain torch.fft.

Plain is what one writes first: batch first, all bins and all positions at any cutoff, PyTorch's dropout; the same
weights, windows and optimiser. All contenders take turns in one process.
"""

import pytest
import torch
import torch.nn.functional as F

from hnet.chunk_lm import ChunkLM, ChunkLMConfig, Windows, chunk_lm_loss, spectral

from . import harness

BF16 = torch.cpu._is_avx512_bf16_supported()


def plain_logits(model: ChunkLM, ids: torch.Tensor, cutoff: int) -> torch.Tensor:
    c, x = model.config, model.embeddings(ids)
    mask = spectral.cutoff_mask(model.bins, cutoff)
    for b in model.blocks:
        u = b.norm1(x)
        gates = torch.sigmoid(b.freq_gate)[:, None] * torch.sigmoid(b.content_gate(u.mean(1)))[:, None]
        H = torch.fft.rfft(b.kernel, c.n_fft)[:, None] * b.gain * gates * mask[:, None]
        y = torch.fft.irfft(torch.fft.rfft(u, c.n_fft, dim=1) * H, c.n_fft, dim=1)[:, : ids.shape[1]]
        x = x + F.dropout(y, c.dropout)
        x = x + F.dropout(b.fc2(F.gelu(b.fc1(b.norm2(x)))), c.dropout)
    return model.head(model.norm(x)[:, -1]).unflatten(-1, (c.chunk, 256))


def step_of(batch: int, T: int, *, plain: bool, bf16: bool, cutoff: int | None = None, causal: bool = False):
    torch.manual_seed(0)
    model = ChunkLM(ChunkLMConfig(seq_len=T, causal=causal))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    inputs = [Windows(torch.randint(0, 256, (batch, T)), torch.randint(0, 256, (batch, 16))) for _ in range(4)]

    def run(i: int) -> None:
        w = inputs[i % len(inputs)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            if plain:
                logits = plain_logits(model, w.input_ids, cutoff or model.bins)
                loss = F.cross_entropy(logits.float().flatten(0, 1), w.targets.flatten())
            else:
                loss, _ = chunk_lm_loss(model, w, cutoff)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def test_plain_is_the_same_model():
    model = ChunkLM(ChunkLMConfig(d_model=32, n_layers=2, seq_len=100, dropout=0.0, kernel_len=20))
    ids = torch.randint(0, 256, (2, 100))
    for cutoff in (10, 65):
        torch.testing.assert_close(model(ids, cutoff), plain_logits(model, ids, cutoff), rtol=1e-4, atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("T", [512, 1024])
def test_step(smoke, rounds, keep_row, T):
    batch, T = (1, 128) if smoke else (4, T)
    full = ChunkLMConfig(seq_len=T).bins
    cutoffs = [c for c in (128, 256, 512) if c < full - 1] + [full]
    contenders = {"plain torch.fft fp32": step_of(batch, T, plain=True, bf16=False)}
    if BF16:
        contenders["plain torch.fft bf16"] = step_of(batch, T, plain=True, bf16=True)
    for bf16 in (True, False) if BF16 else (False,):
        name = "bf16" if bf16 else "fp32"
        for c in cutoffs:
            contenders[f"{name} cutoff {c}"] = step_of(batch, T, plain=False, bf16=bf16, cutoff=c)
        contenders[f"{name} next-byte head"] = step_of(batch, T, plain=False, bf16=bf16, causal=True)
    seconds = harness.race(contenders, max(rounds // 3, 2), warmup=2)
    ours = f"{'bf16' if BF16 else 'fp32'} cutoff {full}"
    keep_row(seconds, ours=ours, op="training step", dtype="fp32 weights", T=T, B=batch, model="ChunkLM")


@pytest.mark.long
@pytest.mark.parametrize("bf16", [True, False] if BF16 else [False])
@pytest.mark.parametrize("T", [512, 1024])
def test_filter(smoke, rounds, keep_row, T, bf16):
    """Forward and backward of one block's filter, 2048 columns, in each form."""
    T, C = (128, 64) if smoke else (T, 2048)
    c = ChunkLMConfig(seq_len=T)
    n, bins = c.n_fft, c.bins
    kernel, gate = torch.randn(c.kernel_len, requires_grad=True), torch.zeros(bins, requires_grad=True)
    u, dy = torch.randn(T, C, requires_grad=True), torch.randn(T, C)

    def run(cutoff: int, form: str | None):
        def go(_: int) -> None:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                y = spectral.spectral_filter(u, spectral.response(kernel, gate, cutoff, n), n, form)
            torch.autograd.grad(y, (u, kernel, gate), dy.to(y.dtype))

        return go

    def plain(_: int) -> None:
        H = torch.fft.rfft(kernel, n) * torch.sigmoid(gate) * spectral.cutoff_mask(bins, bins)
        x = u.view(T, 4, C // 4).transpose(0, 1)
        y = torch.fft.irfft(torch.fft.rfft(x, n, dim=1) * H[:, None], n, dim=1)[:, :T]
        torch.autograd.grad(y, (u, kernel, gate), dy.view(T, 4, C // 4).transpose(0, 1))

    contenders = {"plain torch.fft fp32": plain}
    for cutoff in [x for x in (64, 128, 256, 512) if x < bins - 1] + [bins]:
        for form in ("lowrank", "toeplitz", "fft") if cutoff < bins else ("toeplitz", "fft"):
            contenders[f"{form} cutoff {cutoff}"] = run(cutoff, form)
        contenders[f"chosen cutoff {cutoff}"] = run(cutoff, None)
    seconds = harness.race(contenders, max(rounds // 3, 2), warmup=2)
    dtype = "bf16 autocast" if bf16 else "fp32"
    keep_row(seconds, ours=f"chosen cutoff {bins}", op="filter", dtype=dtype, T=T, model="ChunkLM")
