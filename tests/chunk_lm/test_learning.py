"""Does the chunk head learn? On the sources of the standard library, held-out files, a minute or two on one core."""

import math
import sysconfig

import pytest
import torch
import torch.nn.functional as F

import hnet_kernels as hk
from hnet.chunk_lm import ChunkLM, ChunkLMConfig, WindowStream, chunk_lm_loss, eval_windows
from hnet.chunk_lm.train_config import ChunkLMTrainConfig
from hnet.data.sources import open_corpus

from .markov import markov_baselines

STEPS, BATCH, PEAK = 800, 128, 3e-3


@torch.no_grad()
def losses_by_place(model, corpus, windows):
    """(chunk,) nats: cross entropy of each of the bytes a chunk holds."""
    c, rows = model.config, []
    for w in eval_windows(corpus, c.seq_len, c.chunk, 256, windows):
        logits = model(w.input_ids).float()
        rows.append(F.cross_entropy(logits.flatten(0, 1), w.targets.flatten(), reduction="none").view(-1, c.chunk))
    return torch.cat(rows).mean(0)


@pytest.mark.long
@pytest.mark.slow
def test_chunk_head_beats_unigram_and_bigram_models():
    exclude = ["test", "tests", "site-packages", "lib2to3", "idlelib", "encodings"]
    data = ChunkLMTrainConfig(data=[sysconfig.get_paths()["stdlib"]], pattern="*.py", exclude=exclude)
    train, held_out = open_corpus(data)
    hk.keep_memory()
    torch.manual_seed(0)
    model = ChunkLM(ChunkLMConfig(d_model=256, n_layers=3, seq_len=32, kernel_len=32, chunk=16, dropout=0.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.98), fused=True)
    stream = WindowStream(train, 32, 16, BATCH, seed=0)
    for i in range(STEPS):
        lr = PEAK * min(1, (i + 1) / 100) * (0.05 + 0.95 * (1 + math.cos(math.pi * i / STEPS)) / 2)
        optimizer.param_groups[0]["lr"] = lr
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported()):
            loss, _ = chunk_lm_loss(model, next(stream))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    ours = losses_by_place(model.eval(), held_out, 4096)
    counted = {name: torch.tensor(v) for name, v in markov_baselines(train, held_out, 16).items()}
    print("\nfirst byte:", round(ours[0].item(), 3), {n: round(v[0].item(), 3) for n, v in counted.items()})
    print("mean of 16:", round(ours.mean().item(), 3), {n: round(v.mean().item(), 3) for n, v in counted.items()})
    assert ours[0] < counted["bigram"][0] - 0.05
    assert ours.mean() < counted["unigram"].mean() - 0.1
    assert ours.mean() < counted["bigram"].mean() - 0.05
    assert ours.mean() < counted["direct"].mean()
