"""A strong byte model without chunks: gated convolutions and attention, Muon, no step that is there for looks.

Width 128, blocks c c t c t (c: gated convolution of 6 taps, no FFN; t: attention of 4 heads and an FFN of four widths
with squared ReLU), rotary positions, RMSNorm without weights, queries and keys normed too, output projections and head
zero at the start. Muon (0.02) for the matrices, AdamW (0.006) for the rest, 16 sequences of 128 bytes a step, a flat
rate for 30 % of the run and then linearly down. It uses what the H-Net uses: `hnet_kernels`' fused layers, the
trainer's Muon, bf16 where the processor has it, and, as `isotropic+ngrams`, the recipe's embeddings of n-grams, of
which a step updates the rows it read.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hnet_kernels as hk
from hnet.config import NgramConfig
from hnet.device import pick_autocast
from hnet.model.hnet import recent_bytes
from hnet.model.ngrams import NgramEmbeddings
from hnet.model.pack import Pack
from hnet.train.config import TrainConfig
from hnet.train.muon import Muon
from hnet.train.optim import AdamW
from hnet.train.table_adamw import TableAdamW

TAPS, HEAD, EPS = 6, 32, 1e-6


class Conv(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * width, bias=False)
        self.taps = nn.Parameter(0.3 * torch.randn(width, TAPS))
        self.register_buffer("bias", torch.zeros(width), persistent=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, h: Tensor, pack: Pack) -> Tensor:
        return self.out(hk.gated_conv(self.fc1(h), self.taps, self.bias, pack.cu_seqlens))


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, h: Tensor, pack: Pack) -> Tensor:
        qk, v = self.qkv(h).view(len(h), 3, -1, HEAD).split([2, 1], dim=1)
        qk = F.rms_norm(qk, (HEAD,)).to(v.dtype)  # before the rotation, which keeps norms
        qkv = torch.cat([qk, v], dim=1)
        cos, sin = (t.flatten(1) for t in pack.rotary(HEAD))
        return self.out(hk.attention(qkv, pack.cu_seqlens, -1, (cos, sin)).reshape(h.shape))


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width, bias=False)
        self.out = nn.Linear(4 * width, width, bias=False)

    def forward(self, h: Tensor, pack: Pack) -> Tensor:
        return self.out(self.fc1(h).relu().square())


class Isotropic(nn.Module):
    """(n, L) int64 bytes -> (n, L, 256) logits of the byte after each."""

    def __init__(self, layout: str = "cctct", width: int = 128, ngrams: NgramConfig | None = None) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(256, width)
        self.ngrams = None if ngrams is None else NgramEmbeddings(ngrams, 256, width)
        parts = [[Conv(width)] if letter == "c" else [Attention(width), MLP(width)] for letter in layout]
        self.branches = nn.ModuleList(branch for block in parts for branch in block)
        self.head = nn.Linear(width, 256, bias=False)
        self.register_buffer("ones", torch.ones(width), persistent=False)
        for end in (self.head, *(branch.out for branch in self.branches)):
            nn.init.zeros_(end.weight)

    def forward(self, ids: Tensor) -> Tensor:
        n, L = ids.shape
        pack = Pack(torch.arange(0, (n + 1) * L, L, dtype=torch.int32), n * L, L)
        x, residual = self.embeddings(ids.flatten()), None
        if self.ngrams is not None:
            x = x + self.ngrams(recent_bytes(ids.flatten(), pack, self.ngrams.longest))
        x = F.rms_norm(x, (self.ones.shape[0],))
        for branch in self.branches:
            h, residual = hk.add_rms_norm(x, residual, self.ones, EPS)
            x = branch(h, pack)
        return self.head(hk.add_rms_norm(x, residual, self.ones, EPS)[0]).view(n, L, 256)


class Learner:
    context, batch, peak = 128, 16, 0.02

    def __init__(self, train: Tensor, seed: int, recipe: TrainConfig | None = None) -> None:
        """train: (bytes,) int64; recipe: of which to take the embeddings of n-grams, default: none"""
        torch.manual_seed(seed)
        self.model, self.train, self.steps = Isotropic(ngrams=recipe and recipe.model().ngram_cfg), train, 0
        if recipe is not None and self.model.ngrams is not None:
            self.model.ngrams.dropout = recipe.ngram_dropout
        self.random = torch.Generator().manual_seed(seed)
        matrices = [m.weight for m in self.model.branches.modules() if isinstance(m, nn.Linear)]
        chosen = {id(p) for p in matrices}
        rest = [p for p in self.model.parameters() if id(p) not in chosen]
        adam = AdamW(rest, lr=0.3 * self.peak, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        if self.model.ngrams is not None:
            table = adam.table = TableAdamW(self.model.ngrams.weight, adam)
            self.model.ngrams.before_reading = table.bring_up
        self.optimizers: list[torch.optim.Optimizer] = [Muon(matrices, lr=self.peak, weight_decay=0.01), adam]
        self.dtype = pick_autocast("auto", torch.device("cpu"))
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.bytes_per_step = self.batch * self.context
        # 2 FLOPs a multiply-add, forward and twice that backward; attention looks at half of the context on average
        looks = sum(isinstance(m, Attention) for m in self.model.branches) * 2 * 128 * (self.context + 1) / 2
        self.flops_per_byte = 6 * (sum(p.numel() for p in matrices) + self.model.head.weight.numel() + looks)

    def autocast(self) -> AbstractContextManager:
        return nullcontext() if self.dtype is None else torch.autocast("cpu", dtype=self.dtype)

    def step(self, progress: float) -> None:
        """One step, at this share of the run"""
        factor = min(1.0, self.steps / 20) * (1.0 if progress < 0.3 else max(0.02, (1 - progress) / 0.7))
        for optimizer, peak in zip(self.optimizers, (self.peak, 0.3 * self.peak), strict=True):
            optimizer.param_groups[0]["lr"] = peak * factor
        at = torch.randint(len(self.train) - self.context, (self.batch,), generator=self.random)
        windows = self.train[at[:, None] + torch.arange(self.context + 1)]
        with self.autocast():
            logits = self.model(windows[:, :-1])
        F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten()).backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.steps += 1

    def log_probs(self, ids: Tensor) -> Tensor:
        self.model.eval()
        with self.autocast():
            logits = self.model(ids)
        self.model.train()
        return logits.float().log_softmax(-1)
