"""The recursion: encoder -> route -> pool -> inner stage -> dechunk + residual -> decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import hnet_kernels as hk
from hnet.config import HNetConfig

from .cache import RouteCache, StageCache
from .fork import fork
from .isotropic import Isotropic
from .pack import Pack


class RoutingModule(nn.Module):
    """Projections whose cosine distance makes boundaries; they start as the identity."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.q_proj_layer = nn.Linear(d_model, d_model, bias=False)
        self.k_proj_layer = nn.Linear(d_model, d_model, bias=False)
        with torch.no_grad():
            self.q_proj_layer.weight.copy_(torch.eye(d_model))
            self.k_proj_layer.weight.copy_(torch.eye(d_model))


class HNet(nn.Module):
    """One stage and everything inside it. forward: (T, width outside) -> (T, width outside), [Routing, ...]."""

    main_network: Any  # Isotropic in the innermost stage, HNet in the others

    def __init__(self, config: HNetConfig, stage: int = 0) -> None:
        super().__init__()
        self.stage = stage
        d_model = config.d_model[stage]
        outside = config.d_model[stage - 1] if stage else d_model
        layouts = config.layouts(stage)
        self.innermost = len(layouts) == 1
        if self.innermost:
            self.main_network = Isotropic(layouts[0], config, stage)
        else:
            self.encoder = Isotropic(layouts[0], config, stage)
            self.main_network = HNet(config, stage + 1)
            self.decoder = Isotropic(layouts[1], config, stage)
            self.routing_module = RoutingModule(d_model)
            self.residual_proj = nn.Linear(d_model, d_model)  # fp32 whatever the rest is
            self.boundaries = config.routing_cfg.boundaries if stage == 0 else "any"
            self.logit_bias: Tensor | None
            self.register_buffer("logit_bias", None, persistent=False)
            if (bias := config.routing_cfg.logit_bias) is not None:
                self.set_logit_bias(bias[stage])
        self.pad_dimension = nn.Parameter(torch.zeros(d_model - outside)) if d_model > outside else None

    def set_logit_bias(self, bias: float) -> None:
        """Moves the rate of boundaries; kept in the config, not among the weights."""
        self.logit_bias = torch.tensor(bias, dtype=torch.float32, device=self.residual_proj.weight.device)

    def _widen(self, x: Tensor) -> Tensor:
        if self.pad_dimension is None:
            return x
        return torch.cat([x, self.pad_dimension.to(x.dtype).expand(x.shape[0], -1)], dim=-1)

    def _residual(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.residual_proj(x.to(self.residual_proj.weight.dtype))

    def forward(
        self,
        x: Tensor,
        pack: Pack,
        max_chunks: list[int] | None = None,
        cache: StageCache | None = None,
        slots: Tensor | None = None,
        input_ids: Tensor | None = None,
    ) -> tuple[Tensor, list[hk.Routing]]:
        """input_ids (T,): the bytes of the outermost stage, asked for where boundaries keep to characters."""
        width = x.shape[-1]
        x = self._widen(x)
        if self.innermost:
            return self.main_network(x, pack, cache and cache.layers, slots)[:, :width], []

        x = self.encoder(x, pack, cache and cache.layers, slots)
        router = self.routing_module
        residual, q, k, x = fork(x, self.residual_proj, router.q_proj_layer, router.k_proj_layer)
        budget = None if max_chunks is None else max_chunks[self.stage]
        r = hk.route(
            q, k, pack.cu_seqlens, logit_bias=self.logit_bias,
            candidates=None if self.boundaries == "any" else candidates(self.boundaries, input_ids, pack),
            max_chunks=budget, padded=max_chunks is not None and self.stage > 0,
        )  # fmt: skip
        z = hk.pool(x, r)
        inner = Pack(r.cu_chunks, z.shape[0], pack.max_seqlen, padded=budget is not None)
        z, routings = self.main_network(z, inner, max_chunks, cache and cache.inner, slots)
        y = hk.dechunk(z, r, residual)
        if cache is not None and cache.route is not None and slots is not None:
            remember(cache.route, q, z, r, pack, slots)
            if self.boundaries == "char-end" and input_ids is not None:
                cache.route.tail[slots] = last_bytes(input_ids, pack)
        x = self.decoder(y, pack, cache and cache.decoder, slots)
        return x[:, :width], [r, *routings]

    def step(
        self, x: Tensor, cache: StageCache, slots: Tensor, input_ids: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """One new position for each slot: x (n, width). Also returns each stage's boundary mask (of its own rows)."""
        width = x.shape[-1]
        x = self._widen(x)
        if self.innermost:
            return self.main_network.step(x, cache.layers, slots)[:, :width], []

        state = cache.route
        assert state is not None
        x = self.encoder.step(x, cache.layers, slots)
        residual = self._residual(x)
        q, k = self.routing_module.q_proj_layer(x), self.routing_module.k_proj_layer(x)
        allowed = None
        if self.boundaries != "any" and input_ids is not None:
            recent = torch.cat([state.tail[slots], input_ids[:, None].to(torch.uint8)], 1)
            allowed = starts_character(recent[:, 3]) if self.boundaries == "char-start" else ends_character(recent)
            state.tail[slots] = recent[:, 1:]
        prob, mask, _ = hk.route_step(
            state.q_last[slots].to(q.dtype), k, is_first=~state.seen[slots], logit_bias=self.logit_bias,
            candidates=allowed,
        )  # fmt: skip
        state.q_last[slots] = q.to(state.q_last.dtype)
        state.seen[slots] = True

        fired = mask.nonzero().flatten()
        z, inner_masks = torch.zeros_like(x), []
        if len(fired):
            z[fired], inner_masks = self.main_network.step(x[fired], cache.inner, slots[fired])
        y, state.ema[slots] = hk.dechunk_step(z, prob, mask, state.ema[slots], residual)
        return self.decoder.step(y, cache.decoder, slots)[:, :width], [mask, *inner_masks]

    def allocate_cache(self, batch: int, max_length: int) -> StageCache:
        inner = self.main_network.allocate_cache(batch, max_length)
        if self.innermost:
            return StageCache(inner, [])
        w = self.routing_module.q_proj_layer.weight
        d = w.shape[0]
        route = RouteCache(
            w.new_zeros(batch, d),
            torch.zeros(batch, dtype=torch.bool, device=w.device),
            w.new_zeros(batch, d, dtype=torch.float32),
            torch.zeros(batch, 3, dtype=torch.uint8, device=w.device),
        )
        decoder = self.decoder.allocate_cache(batch, max_length)
        return StageCache(self.encoder.allocate_cache(batch, max_length), decoder, route, inner)


# --- boundaries between characters -----------------------------------------------------------------------------------


def candidates(boundaries: str, input_ids: Tensor | None, pack: Pack) -> Tensor:
    """(T,) bool: first bytes of UTF-8 characters, or last bytes (known from the lead byte, so causal)."""
    if input_ids is None:
        raise ValueError(f"boundaries {boundaries!r} need input_ids")
    if boundaries == "char-start":
        return starts_character(input_ids)
    return ends_character(recent_bytes(input_ids, pack))


def starts_character(byte: Tensor) -> Tensor:
    return (byte & 0xC0) != 0x80


def ends_character(recent: Tensor) -> Tensor:
    """recent (n, 4): a byte and the three before it (0 before a sequence begins). BOS and EOS end what they are."""
    d, c, b, a = recent.unbind(1)
    inner = [(x & 0xC0) == 0x80 for x in (a, b, c)]
    two = inner[0] & ((b & 0xE0) == 0xC0)
    three = inner[0] & inner[1] & ((c & 0xF0) == 0xE0)
    four = inner[0] & inner[1] & inner[2] & ((d & 0xF8) == 0xF0)
    return (a < 0x80) | (a >= 0xF8) | two | three | four


def recent_bytes(input_ids: Tensor, pack: Pack) -> Tensor:
    """(T, 4): the three bytes before each position in its sequence, and its own."""
    columns = []
    for back in (3, 2, 1):
        shifted = torch.cat([input_ids.new_zeros(back), input_ids[:-back]])[: len(input_ids)]
        columns.append(torch.where(pack.position >= back, shifted, 0))
    return torch.stack([*columns, input_ids], 1)


def last_bytes(input_ids: Tensor, pack: Pack) -> Tensor:
    """(N, 3) uint8: the last three bytes of every sequence"""
    return recent_bytes(input_ids, pack)[pack.cu_seqlens[1:].long() - 1, 1:].to(torch.uint8)


def remember(cache: RouteCache, q: Tensor, z: Tensor, r: hk.Routing, pack: Pack, slots: Tensor) -> None:
    """The state after the last position of each sequence; no sequence is empty."""
    cache.q_last[slots] = q[pack.cu_seqlens[1:].long() - 1].to(cache.q_last.dtype)
    cache.seen[slots] = True
    p = r.boundary_prob[r.chunk_start.long()].clamp(1e-4, 1 - 1e-4)
    cache.ema[slots] = hk.ema(z, p, r.cu_chunks, return_final_state=True)[1]
