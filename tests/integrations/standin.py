"""A stand-in for the published `hnet` package, which needs CUDA: its names, signatures and semantics in plain PyTorch.

Written from the paper and the published signatures, loops and all, so that fp64 in is fp64 throughout. `build()` makes
a new module tree with new classes each time, so that patching one leaves the others alone.
"""

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class RoutingModuleState:
    has_seen_tokens: Tensor  # (B,)
    last_hidden_state: Tensor  # (B, D)


@dataclass
class DeChunkState:
    last_value: Tensor  # (B, D)


@dataclass
class State:
    """Caches of a stage and of the one inside it."""

    routing: RoutingModuleState
    dechunk: DeChunkState
    inner: Any = None


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, c):
        return torch.ones_like(c)

    @staticmethod
    def backward(ctx, grad):
        return grad


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def make_dc() -> dict[str, Any]:
    @dataclass
    class RoutingModuleOutput:
        boundary_prob: Tensor
        boundary_mask: Tensor
        selected_probs: Tensor

    class RoutingModule(nn.Module):
        def __init__(self, d_model, device=None, dtype=None):
            super().__init__()
            self.d_model = d_model
            self.q_proj_layer = nn.Linear(d_model, d_model, bias=False, device=device, dtype=dtype)
            self.k_proj_layer = nn.Linear(d_model, d_model, bias=False, device=device, dtype=dtype)

        def allocate_inference_cache(self, batch_size, max_seqlen, device, dtype=None):
            last = torch.zeros(batch_size, self.d_model, device=device, dtype=dtype)
            return RoutingModuleState(torch.zeros(batch_size, dtype=torch.bool, device=device), last)

        def output(self, p, mask=None):
            both = torch.stack([1 - p, p], -1)
            b = p > 0.5 if mask is None else (p > 0.5) & mask
            return RoutingModuleOutput(both, b, both.amax(-1, keepdim=True))

        def forward(self, hidden_states, cu_seqlens=None, mask=None, inference_params=None):
            q, k = self.q_proj_layer(hidden_states), self.k_proj_layer(hidden_states)
            cos = F.cosine_similarity(q[..., :-1, :], k[..., 1:, :], dim=-1, eps=1e-12)
            p = F.pad(((1 - cos) / 2).clamp(0, 1), (1, 0), value=1.0)
            if cu_seqlens is not None:
                first = torch.zeros_like(p, dtype=torch.bool)
                first[cu_seqlens[:-1].long()] = True
                p = torch.where(first, 1.0, p)
            if inference_params is not None:
                for b, n in enumerate(mask.sum(1).tolist()):
                    if n:
                        inference_params.has_seen_tokens[b] = True
                        inference_params.last_hidden_state[b] = hidden_states[b, n - 1].detach()
            return self.output(p, mask)

        def step(self, hidden_states, inference_params):
            x = hidden_states[:, 0]
            q, k = self.q_proj_layer(inference_params.last_hidden_state), self.k_proj_layer(x)
            p = ((1 - F.cosine_similarity(q, k, dim=-1, eps=1e-12)) / 2).clamp(0, 1)
            p = torch.where(inference_params.has_seen_tokens, p, 1.0)
            inference_params.last_hidden_state.copy_(x)
            inference_params.has_seen_tokens.fill_(True)
            return self.output(p)

    class ChunkLayer(nn.Module):
        def forward(self, hidden_states, boundary_mask, cu_seqlens=None, mask=None):
            if cu_seqlens is not None:
                ends = [int(boundary_mask[:e].sum()) for e in cu_seqlens.tolist()]
                longest = max(b - a for a, b in zip(ends, ends[1:], strict=False))
                return hidden_states[boundary_mask], torch.tensor(ends, device=boundary_mask.device), longest, None
            counts = boundary_mask.sum(1)
            longest = int(counts.max())
            # after its chunks a row goes on with positions that begin none; next_mask says so
            rows = [torch.cat([x[b], x[~b]])[:longest] for x, b in zip(hidden_states, boundary_mask, strict=True)]
            return torch.stack(rows), None, None, torch.arange(longest, device=counts.device) < counts[:, None]

        def step(self, hidden_states, boundary_mask):
            return hidden_states[boundary_mask]

    class DeChunkLayer(nn.Module):
        def __init__(self, d_model, dtype=torch.bfloat16, block_size=256, headdim=32):
            super().__init__()
            self.d_model = d_model

        def allocate_inference_cache(self, batch_size, max_seqlen, device, dtype=None):
            return DeChunkState(torch.zeros(batch_size, self.d_model, device=device, dtype=dtype))

        def forward(
            self, hidden_states, boundary_mask, boundary_prob, cu_seqlens=None, inference_params=None, mask=None
        ):
            p = wide(boundary_prob[..., -1]).clamp(1e-4, 1 - 1e-4)
            if cu_seqlens is not None:
                return self.smooth(hidden_states, p[boundary_mask], set(cu_seqlens.tolist()))[
                    boundary_mask.cumsum(0) - 1
                ]
            rows = []
            for z, b, c in zip(hidden_states, boundary_mask, p, strict=True):
                rows.append(self.smooth(z[: int(b.sum())], c[b], {0})[b.cumsum(0) - 1])
            out = torch.stack(rows)
            if inference_params is not None:
                inference_params.last_value.copy_(out[:, -1])
            return out

        def smooth(self, z, p, restarts):
            y, out = torch.zeros_like(wide(z[0])), []
            for m in range(z.shape[0]):
                y = p[m] * wide(z[m]) + (0 if m in restarts else (1 - p[m]) * y)
                out.append(y)
            return torch.stack(out).to(z.dtype)

        def step(self, hidden_states, boundary_mask, boundary_prob, inference_params):
            p = wide(boundary_prob[..., -1]).clamp(1e-4, 1 - 1e-4)
            y = wide(inference_params.last_value).clone()
            for row, b in enumerate(boundary_mask.nonzero().flatten().tolist()):
                y[b] = p[b] * wide(hidden_states[row, 0]) + (1 - p[b]) * y[b]
            inference_params.last_value.copy_(y)
            return y.to(hidden_states.dtype)[:, None]

    return dict(
        RoutingModuleOutput=RoutingModuleOutput,
        RoutingModuleState=RoutingModuleState,
        DeChunkState=DeChunkState,
        RoutingModule=RoutingModule,
        ChunkLayer=ChunkLayer,
        DeChunkLayer=DeChunkLayer,
    )


def make_hnet(dc: ModuleType) -> type[nn.Module]:
    class HNet(nn.Module):
        """A stage around another one, or around nothing. Encoders work on single positions: all mixing is chunking."""

        def __init__(self, d_model: int, stages: int):
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(d_model, d_model), nn.Tanh())
            self.main_network = HNet(d_model, stages - 1) if stages > 1 else None
            self.routing_module = dc.RoutingModule(d_model)
            self.chunk_layer = dc.ChunkLayer()
            self.dechunk_layer = dc.DeChunkLayer(d_model)
            self.residual_proj = nn.Linear(d_model, d_model)

        def allocate_inference_cache(self, batch_size, device, dtype):
            return State(
                self.routing_module.allocate_inference_cache(batch_size, 0, device, dtype),
                self.dechunk_layer.allocate_inference_cache(batch_size, 0, device, dtype),
                self.main_network and self.main_network.allocate_inference_cache(batch_size, device, dtype),
            )

        def combine(self, out, x, selected):
            return out * StraightThrough.apply(selected).to(out.dtype) + self.residual_proj(x)

        def forward(self, x, cu_seqlens=None, mask=None, state=None):
            x = self.encoder(x)
            r = self.routing_module(x, cu_seqlens=cu_seqlens, mask=mask, inference_params=state and state.routing)
            z, next_cu, _, next_mask = self.chunk_layer(x, r.boundary_mask, cu_seqlens, mask=mask)
            inner = []
            if self.main_network is not None:
                z, inner = self.main_network(z, next_cu, next_mask, state and state.inner)
            y = self.dechunk_layer(
                z, r.boundary_mask, r.boundary_prob, next_cu, mask=mask, inference_params=state and state.dechunk
            )
            return self.combine(y, x, r.selected_probs), [r, *inner]

        def step(self, x, state):
            x = self.encoder(x)
            r = self.routing_module.step(x, state.routing)
            z = self.chunk_layer.step(x, r.boundary_mask)
            if self.main_network is not None and z.shape[0]:
                # the inner caches have no row numbers: with an inner stage, one sequence at a time
                z = self.main_network.step(z, state.inner)
            y = self.dechunk_layer.step(z, r.boundary_mask, r.boundary_prob, state.dechunk)
            return self.combine(y, x, r.selected_probs[:, None])  # the published HNet.step takes one sequence only

    return HNet


def load_balancing_loss(router_output, N):
    f = router_output.boundary_mask.float().mean()
    g = router_output.boundary_prob[..., -1].float().mean()
    return N / (N - 1) * ((N - 1) * f * g + (1 - f) * (1 - g))


def build(name: str = "hnet") -> ModuleType:
    """hnet.modules.dc, hnet.models.hnet, hnet.utils.train and its re-export; nothing is put into sys.modules."""

    def module(path, **contents):
        m = ModuleType(f"{name}.{path}" if path else name)
        vars(m).update(contents)
        return m

    dc = module("modules.dc", **make_dc())
    models = module("models", hnet=module("models.hnet", HNet=make_hnet(dc)))
    # a function of its own, so that patching this tree changes no other
    loss = type(load_balancing_loss)(load_balancing_loss.__code__, globals(), "load_balancing_loss")
    train = module("utils.train", load_balancing_loss=loss)
    utils = module("utils", train=train, load_balancing_loss=loss)
    return module("", modules=module("modules", dc=dc), models=models, utils=utils)


def install(root: ModuleType, monkeypatch) -> None:
    """Make `import hnet` and its submodules find this tree. As in the published package, `hnet.utils` is some other
    module (`from hnet.modules import *` brings it) until the package of that name is imported."""
    packages = {"modules": root.modules, "models": root.models, "utils": root.utils}
    leaves = {"modules.dc": root.modules.dc, "models.hnet": root.models.hnet, "utils.train": root.utils.train}
    for m in (root, *packages.values()):
        m.__path__ = []  # what makes a module a package
    for name in [n for n in sys.modules if n == "hnet" or n.startswith("hnet.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "hnet", root)
    for name, m in {**packages, **leaves}.items():
        monkeypatch.setitem(sys.modules, f"hnet.{name}", m)
    root.utils = ModuleType("hnet.modules.utils")
