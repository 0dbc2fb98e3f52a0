"""nanoGPT's recipe for a laptop's CPU (the README of karpathy/nanoGPT, shakespeare_char), on bytes, in plain PyTorch.

A GPT-2 of 4 layers, 4 heads and 128 channels without biases or dropout, learned positions, head tied to the embeddings;
12 sequences of 64 bytes a step, AdamW at 1e-3 down to 1e-4 by a cosine after 100 steps of warm-up, gradients clipped to
1. Its 2,000 steps become as many as the time allows, the cosine spans the run.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYERS, HEADS, WIDTH, CONTEXT = 4, 4, 128, 64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.attention_out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.fc = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.fc_out = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        n, L, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, L, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(n, L, WIDTH)
        x = x + self.attention_out(seen)
        return x + self.fc_out(F.gelu(self.fc(self.norm2(x))))


class GPT(nn.Module):
    """(n, L) int64 bytes, L <= 64 -> (n, L, 256) logits of the byte after each."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(256, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * LAYERS) if name.endswith("_out.weight") else 0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embeddings(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embeddings.weight)


class Learner:
    context, batch, peak, warmup = CONTEXT, 12, 1e-3, 100

    def __init__(self, train: Tensor, seed: int) -> None:
        """train: (bytes,) int64"""
        torch.manual_seed(seed)
        self.model, self.train, self.steps = GPT(), train, 0
        self.random = torch.Generator().manual_seed(seed)
        matrices = [p for p in self.model.parameters() if p.dim() == 2]
        vectors = [p for p in self.model.parameters() if p.dim() != 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=self.peak, betas=(0.9, 0.99))
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.bytes_per_step = self.batch * self.context
        multiplied = sum(p.numel() for p in matrices) - self.model.positions.weight.numel()
        self.flops_per_byte = 6 * (multiplied + LAYERS * 2 * WIDTH * (CONTEXT + 1) / 2)

    def step(self, progress: float) -> None:
        """One step, at this share of the run"""
        low = 0.1
        factor = min(1.0, (self.steps + 1) / self.warmup) * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak * factor
        at = torch.randint(len(self.train) - self.context, (self.batch,), generator=self.random)
        windows = self.train[at[:, None] + torch.arange(self.context + 1)]
        F.cross_entropy(self.model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1

    def log_probs(self, ids: Tensor) -> Tensor:
        return self.model(ids).log_softmax(-1)
