"""The published `hnet` package (github.com/goombalab/hnet) on these ops: `patch(hnet)`, and `unpatch(hnet)` to go back.

Replaced: RoutingModule.forward and .step, ChunkLayer.forward, DeChunkLayer.forward and .step in hnet.modules.dc, and
load_balancing_loss in hnet.utils.train. ChunkLayer.step is one boolean index and stays. Names, arguments, shapes,
caches and the state dict are theirs; instances made before and after patching both change. What differs:

- Probabilities, smoothing and their gradients are computed in fp32 (fp64 for fp64), and probabilities are returned so,
  where theirs are rounded to bf16; DeChunkLayer's dtype, block_size and headdim no longer matter.
- Slots past the last chunk of a padded row are zero; theirs hold rows that begin no chunk. next_mask hides both.
- The steps of the layers work for any batch size (their HNet around them still takes one sequence at a time).
- The host waits for the device once a stage: in ChunkLayer, whose output is as long as there are chunks. Prefill waits
  twice more, to check the same things as theirs.

DeChunkLayer relies on what RoutingModule guarantees: a boundary has p > 1/2, and the first position of every sequence
is one (no padding on the left). On a CPU, where looking is free, anything else is refused.

The package is handed in because its name is that of our own model package. To keep theirs, install the ops alone:
`pip install . -C cmake.define.HNET_OPS_ONLY=ON`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hnet_kernels.dechunk import dechunk, dechunk_step
from hnet_kernels.pool import pool
from hnet_kernels.ratio_loss import ratio_loss
from hnet_kernels.routing import route, route_step
from hnet_kernels.types import Routing

# --- patching -----------------------------------------------------------------------------------------------------

ORIGINAL = "_hnet_kernels_original"  # attribute of a replacement: what it stands for
REEXPORT = "utils.load_balancing_loss"  # the same function once more, in releases that have it there


def patch(module: ModuleType) -> None:
    """Run the published `hnet` package on hnet_kernels, from the next call on. A second patch changes nothing.

    Args:
        module: the imported package. Code that took `load_balancing_loss` by name before keeps the original.

    Raises:
        TypeError: not a module.
        AttributeError: the module lacks something that would be replaced; the message lists all of it. Nothing has
            been changed then.
    """
    owners = _owners(module)
    replacements = _replacements(_find(module, "modules.dc").RoutingModuleOutput)
    for path, owner in owners.items():
        name, new = path.rpartition(".")[2], replacements[path]
        old = vars(owner)[name]
        if not hasattr(old, ORIGINAL):
            setattr(new, ORIGINAL, old)
            setattr(owner, name, new)


def unpatch(module: ModuleType) -> None:
    """Put back what `patch` replaced: the very same functions. Nothing happens if the module is not patched.

    Raises:
        TypeError, AttributeError: as in `patch`.
    """
    for path, owner in _owners(module).items():
        name = path.rpartition(".")[2]
        setattr(owner, name, getattr(vars(owner)[name], ORIGINAL, vars(owner)[name]))


def _find(module: ModuleType, path: str) -> Any:
    """module.a.b for path "a.b"; None if there is no such thing.

    By import where that reaches the module: as an attribute, the published `hnet.utils` is `hnet.modules.utils` until
    somebody imports the package of that name.
    """
    found: Any = module
    full = module.__name__
    by_import = sys.modules.get(full) is module
    for name in path.split("."):
        full = f"{full}.{name}"
        submodule = _import(full) if by_import and isinstance(found, ModuleType) else None
        found = submodule or getattr(found, name, None)
    return found


def _import(full: str) -> ModuleType | None:
    try:
        return importlib.import_module(full)
    except ModuleNotFoundError as e:
        if e.name != full:
            raise  # it is there, but something it needs is not
        return None


def _owners(module: ModuleType) -> dict[str, Any]:
    """What holds each function to replace: a class or a module."""
    if not isinstance(module, ModuleType):
        raise TypeError(f"module must be the imported hnet package, got {type(module).__name__}")
    owners = {path: _find(module, path.rpartition(".")[0]) for path in _replacements(None)}
    if "load_balancing_loss" not in vars(owners[REEXPORT] or object):
        del owners[REEXPORT]
    missing = [p for p, owner in owners.items() if owner is None or not callable(vars(owner).get(p.rpartition(".")[2]))]
    if not hasattr(_find(module, "modules.dc"), "RoutingModuleOutput"):
        missing.append("modules.dc.RoutingModuleOutput")
    if missing:
        where = getattr(module, "__file__", None) or "not from a file"
        raise AttributeError(
            f"module must be the published hnet package (github.com/goombalab/hnet), got {module.__name__!r} "
            f"({where}), which lacks {', '.join(missing)}"
        )
    return owners


def _replacements(output: Any) -> dict[str, Callable]:
    """Fresh functions with the published signatures; `output` is the published RoutingModuleOutput."""

    def routing_forward(self, hidden_states, cu_seqlens=None, mask=None, inference_params=None):
        return output(*_route(self, hidden_states, cu_seqlens, mask, inference_params))

    def routing_step(self, hidden_states, inference_params):
        return output(*_route_step(self, hidden_states, inference_params))

    def chunk_forward(self, hidden_states, boundary_mask, cu_seqlens=None, mask=None):
        return _chunk(hidden_states, boundary_mask, cu_seqlens, mask)

    def dechunk_forward(
        self, hidden_states, boundary_mask, boundary_prob, cu_seqlens=None, inference_params=None, mask=None
    ):
        return _dechunk(hidden_states, boundary_mask, boundary_prob, cu_seqlens, inference_params, mask)

    def dechunk_layer_step(self, hidden_states, boundary_mask, boundary_prob, inference_params):
        return _dechunk_step(hidden_states, boundary_mask, boundary_prob, inference_params)

    def load_balancing_loss(router_output, N):
        return _loss(router_output.boundary_prob, router_output.boundary_mask, N)

    return {
        "modules.dc.RoutingModule.forward": routing_forward,
        "modules.dc.RoutingModule.step": routing_step,
        "modules.dc.ChunkLayer.forward": chunk_forward,
        "modules.dc.DeChunkLayer.forward": dechunk_forward,
        "modules.dc.DeChunkLayer.step": dechunk_layer_step,
        "utils.train.load_balancing_loss": load_balancing_loss,
        REEXPORT: load_balancing_loss,
    }


# --- layout: padded rows are a pack whose sequences all have length L ---------------------------------------------


def _every(length: int, B: int, like: Tensor) -> Tensor:
    """(B+1,) int32: 0, length, 2 length, ... made on the device, where a copy from the host would wait."""
    return torch.arange(B + 1, dtype=torch.int32, device=like.device) * length


def _readable(x: Tensor) -> bool:
    """Values can be looked at for free."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _need_mask_or_cu_seqlens(mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
    if mask is None and cu_seqlens is None:
        raise ValueError("mask (padded) or cu_seqlens (packed) must be given, got neither")


def _check_first_positions(boundary: Tensor, cu_seqlens: Tensor) -> None:
    if not _readable(boundary):
        return
    first = cu_seqlens[:-1][cu_seqlens[1:] > cu_seqlens[:-1]].long()
    if not boundary[first].all():
        raise ValueError(
            "boundary_mask must begin every sequence with a boundary, and padding must be on the right; "
            f"sequence {int((~boundary[first]).nonzero()[0])} begins without one"
        )


def _padded_boundaries(boundary_mask: Tensor) -> Tensor:
    """(B*L,) bool: as given, but a row that is all padding counts one chunk, which reaches no other row."""
    empty = ~boundary_mask.any(1, keepdim=True)
    return (boundary_mask | F.pad(empty, (0, boundary_mask.shape[1] - 1))).flatten()


def _chunk_starts(boundary: Tensor, count: Tensor, rows: int) -> Tensor:
    """(rows,) int32: positions of the boundaries in order, T past the last. count: cumulative sum of boundary."""
    T = boundary.shape[0]
    slot = torch.where(boundary, count - 1, rows).clamp(max=rows).long()  # slot `rows` takes all others
    start = torch.full((rows + 1,), T, dtype=torch.int32, device=boundary.device)
    return start.scatter(0, slot, torch.arange(T, dtype=torch.int32, device=boundary.device))[:rows]


def _routing(boundary: Tensor, count: Tensor, start: Tensor, cu_chunks: Tensor, cu: Tensor, p: Tensor) -> Routing:
    """What pool and dechunk read of a Routing. The confidence gets no gradient: their HNet applies it outside."""
    none = p.new_empty(0)
    index = (count - 1).clamp(0, max(start.shape[0] - 1, 0))
    return Routing(p, boundary, p.detach(), index, start, cu_chunks, cu, none, none, none)


def _pack(x: Tensor, cu_chunks: Tensor) -> Tensor:
    """(B, M, D) -> (B*M, D): the real slots of every row end to end, then zeros."""
    B, M, D = x.shape
    m = torch.arange(B * M, dtype=torch.int32, device=x.device)
    row = torch.bucketize(m, cu_chunks[1:], right=True).clamp(max=B - 1)
    source = (row * M + m - cu_chunks[row]).clamp(max=B * M - 1)
    return torch.where((m < cu_chunks[-1])[:, None], x.reshape(B * M, D)[source], 0)


def _pad(z: Tensor, cu_chunks: Tensor, M: int) -> Tensor:
    """(rows, D) -> (B, M, D): the chunks of every sequence in a row of their own, then zeros."""
    slot = torch.arange(M, dtype=torch.int32, device=z.device)
    source = (cu_chunks[:-1, None] + slot).clamp(max=z.shape[0] - 1)
    real = slot < (cu_chunks[1:] - cu_chunks[:-1])[:, None]
    return torch.where(real[..., None], z[source], 0)


class _Pack(torch.autograd.Function):
    """Each is the other's gradient: gathers both ways, where autograd would scatter."""

    @staticmethod
    def forward(ctx, x, cu_chunks):
        ctx.M = x.shape[1]
        ctx.save_for_backward(cu_chunks)
        return _pack(x, cu_chunks)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _pad(grad, *ctx.saved_tensors, ctx.M), None


class _Pad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, cu_chunks, M):
        ctx.rows = z.shape[0]
        ctx.save_for_backward(cu_chunks)
        return _pad(z, cu_chunks, M)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        # the real slots fill at most `rows` rows, and a row has none past its M slots
        return F.pad(_pack(grad, *ctx.saved_tensors), (0, 0, 0, ctx.rows))[: ctx.rows], None, None


# --- the layers ---------------------------------------------------------------------------------------------------


def _route(layer, hidden_states, cu_seqlens, mask, cache) -> tuple[Tensor, Tensor, Tensor]:
    """boundary_prob (..., 2), boundary_mask (...), selected_probs (..., 1) of (B, L, D) with mask or (T, D) packed"""
    _need_mask_or_cu_seqlens(mask, cu_seqlens)
    shape = hidden_states.shape[:-1]
    if cache is not None:
        if mask is None:
            raise ValueError("mask must be given with inference_params, got None")
        if cache.has_seen_tokens.any():
            raise ValueError("inference_params must be fresh: the prefill is the whole prompt, has_seen_tokens is set")
    q, k = layer.q_proj_layer(hidden_states), layer.k_proj_layer(hidden_states)
    cu = _every(shape[1], shape[0], hidden_states) if cu_seqlens is None else cu_seqlens.to(torch.int32)
    T, N = shape.numel(), cu.shape[0] - 1
    # A budget that drops nothing: no shape depends on the data, so nothing waits
    r = route(q.reshape(T, -1), k.reshape(T, -1), cu, max_chunks=max(T, N, 1))
    boundary_mask = r.boundary_mask.view(shape)
    if mask is not None:
        boundary_mask = boundary_mask & mask
    if cache is not None:
        seen = mask.any(-1)
        last = (mask.sum(-1) - 1).clamp(min=0)
        x = hidden_states.detach()[torch.arange(shape[0], device=mask.device), last]
        cache.last_hidden_state.copy_(torch.where(seen[:, None], x, cache.last_hidden_state))
        cache.has_seen_tokens.copy_(cache.has_seen_tokens | seen)
    p = r.boundary_prob.view(shape)
    return torch.stack((1 - p, p), -1), boundary_mask, r.selected_prob.view(*shape, 1)


def _route_step(layer, hidden_states, cache) -> tuple[Tensor, Tensor, Tensor]:
    """boundary_prob (B, 2), boundary_mask (B,), selected_probs (B, 1) of (B, 1, D)"""
    x = hidden_states.squeeze(1)
    q, k = layer.q_proj_layer(cache.last_hidden_state), layer.k_proj_layer(x)
    p, boundary_mask, selected = route_step(q, k, is_first=~cache.has_seen_tokens)
    cache.last_hidden_state.copy_(x.detach())
    cache.has_seen_tokens.fill_(True)
    return torch.stack((1 - p, p), -1), boundary_mask, selected[:, None]


def _chunk(hidden_states, boundary_mask, cu_seqlens, mask):
    """next_hidden_states, next_cu_seqlens, next_max_seqlen, next_mask; packed: (M, D), int64, int, None"""
    _need_mask_or_cu_seqlens(mask, cu_seqlens)
    if cu_seqlens is not None:
        x, boundary, cu = hidden_states, boundary_mask, cu_seqlens.to(torch.int32)
        chunks = None
    else:
        B, L, D = hidden_states.shape
        x, boundary, cu = hidden_states.reshape(B * L, D), _padded_boundaries(boundary_mask), _every(L, B, mask)
        chunks = boundary_mask.sum(1)  # not those counted for rows of padding
    _check_first_positions(boundary, cu)
    count = boundary.cumsum(0, dtype=torch.int32)
    cu_chunks = F.pad(count, (1, 0))[cu.long()]
    lengths = cu_chunks.diff() if chunks is None else chunks
    total, longest = torch.stack((cu_chunks[-1].long(), lengths.amax().long())).tolist()  # the one wait
    start = _chunk_starts(boundary, count, total)
    p = x.new_empty(0)  # pool reads no probability
    z = pool(x, _routing(boundary, count, start, cu_chunks, cu, p))
    if chunks is None:
        return z, cu_chunks.long(), longest, None
    next_mask = torch.arange(longest, device=mask.device) < chunks[:, None]
    return _Pad.apply(z, cu_chunks, longest), None, None, next_mask


def _dechunk(hidden_states, boundary_mask, boundary_prob, cu_chunks, cache, mask) -> Tensor:
    """(T, D) of (M, D) and cu_chunks, the inner cu_seqlens; or (B, L, D) of (B, M, D). No confidence, no residual."""
    if cache is not None:
        if mask is None:
            raise ValueError("mask must be given with inference_params, got None")
        if not boundary_mask[:, 0].all():
            raise ValueError("boundary_mask must begin every prompt with a boundary")
    dtype = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
    p = boundary_prob[..., -1].flatten().to(dtype).contiguous()
    if cu_chunks is None:
        (B, L), M = boundary_mask.shape, hidden_states.shape[1]
        if M == 0:
            return hidden_states.new_zeros(B, L, hidden_states.shape[2])
        boundary, rows, most = _padded_boundaries(boundary_mask), B * M, M
    else:
        boundary, rows = boundary_mask, hidden_states.shape[0]
        most = rows
    count = boundary.cumsum(0, dtype=torch.int32)
    start = _chunk_starts(boundary, count, rows)
    if cu_chunks is None:
        cu = _every(L, B, p)
        cu_chunks = F.pad(count, (1, 0))[cu.long()].clamp(max=rows)
        z = _Pack.apply(hidden_states, cu_chunks)
    else:
        cu_chunks = cu_chunks.to(torch.int32).clamp(max=rows)
        cu = F.pad(start, (0, 1), value=p.shape[0])[cu_chunks.long()]  # a sequence begins where its first chunk does
        z = hidden_states
    _check_dechunk(boundary_mask, boundary, p, cu, most)
    out = dechunk(z, _routing(boundary, count, start, cu_chunks, cu, p)).view(*boundary_mask.shape, -1)
    if cache is not None:
        cache.last_value.copy_(out.detach()[:, -1])
    return out


def _check_dechunk(boundary_mask: Tensor, boundary: Tensor, p: Tensor, cu_seqlens: Tensor, rows: int) -> None:
    if not _readable(p):
        return
    _check_first_positions(boundary, cu_seqlens)
    most = int(boundary_mask.sum(-1).max()) if boundary_mask.numel() else 0
    if most > rows or (boundary_mask.dim() == 1 and most != rows):
        raise ValueError(f"hidden_states must have one row for each of the {most} boundaries, got {rows}")
    if (boundary_mask.flatten() & (p < 0.5)).any():
        raise ValueError("boundary_prob must be at least 1/2 at every boundary of boundary_mask")


def _dechunk_step(hidden_states, boundary_mask, boundary_prob, cache) -> Tensor:
    """(B, 1, D) of the new chunk rows (B', 1, D), B' boundaries among the B sequences"""
    B, dtype = boundary_mask.shape[0], hidden_states.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    z = hidden_states.new_zeros(B, hidden_states.shape[-1])
    if hidden_states.shape[0]:
        z = hidden_states.squeeze(1)[(boundary_mask.cumsum(0) - 1).clamp(0, hidden_states.shape[0] - 1)]
    out, state = dechunk_step(z, boundary_prob[..., -1].to(wide), boundary_mask, cache.last_value.to(wide))
    cache.last_value.copy_(state)
    return out[:, None]


def _loss(boundary_prob: Tensor, boundary_mask: Tensor, N: float) -> Tensor:
    """() fp32, over all positions, padding included, as published"""
    p = boundary_prob[..., -1].float()
    count = boundary_mask.sum(dtype=torch.int32).view(1)
    none = p.new_empty(0)  # the loss reads sums only
    return ratio_loss(
        Routing(
            boundary_prob=none,
            boundary_mask=boundary_mask,
            selected_prob=none,
            chunk_index=none,
            chunk_start=none,
            cu_chunks=F.pad(count, (1, 0)),
            cu_seqlens=_every(p.numel(), 1, p),
            prob_sum=p.sum().view(1),
            entropy_sum=none,
            num_dropped=none,
        ),
        N,
    )
