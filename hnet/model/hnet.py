"""The recursion: encoder -> route -> pool -> inner stage -> dechunk + residual -> decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hnet_kernels as hk
from hnet.config import HNetConfig

from .cache import RouteCache, Rows, StageCache, allocate_stage, run_directly, upload
from .fork import fork
from .isotropic import Isotropic
from .pack import Pack

ROUND = 32


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

    def _narrow(self, x: Tensor) -> Tensor:
        return x if self.pad_dimension is None else x[:, : x.shape[1] - len(self.pad_dimension)]

    def _residual(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.residual_proj(x.to(self.residual_proj.weight.dtype))

    def _rows_inside(self, z: Tensor) -> int:
        """Rows that the innermost network gets for chunks z (M, D): on a CPU up to ROUND - 1 of padding more. oneDNN,
        which multiplies matrices there, compiles a kernel for every number of rows it has not met, for longer than it
        takes to run, and every step has another number of chunks."""
        rows = z.shape[0]
        if not self.main_network.innermost or z.device.type != "cpu" or torch.compiler.is_compiling():
            return rows
        return -(-rows // ROUND) * ROUND

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
        x = self._widen(x)
        if self.innermost:
            return self._narrow(self.main_network(x, pack, cache and cache.layers, slots)), []

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
        chunks = rows = z.shape[0]
        if budget is None and cache is None:
            rows = self._rows_inside(z)
            z = F.pad(z, (0, 0, 0, rows - chunks)) if rows > chunks else z
        inner = Pack(r.cu_chunks, rows, pack.max_seqlen, padded=budget is not None or rows > chunks)
        z, routings = self.main_network(z, inner, max_chunks, cache and cache.inner, slots)
        y = hk.dechunk(z[:chunks] if rows > chunks else z, r, residual)
        if cache is not None and cache.route is not None and slots is not None:
            remember(cache.route, q, z, r, pack, slots)
            if self.boundaries == "char-end" and input_ids is not None:
                cache.route.tail[slots] = last_bytes(input_ids, pack)
        x = self.decoder(y, pack, cache and cache.decoder, slots)
        return self._narrow(x), [r, *routings]

    # --- decoding -------------------------------------------------------------------------------------------------

    def step(
        self,
        x: Tensor,
        cache: StageCache,
        named: list[int],
        input_ids: Tensor | None = None,
        run: Callable[..., tuple[Tensor, ...]] = run_directly,
    ) -> tuple[Tensor, list[Tensor]]:
        """One new position for each of the slots `named`: x (n, width). Also returns each stage's boundary mask (of its
        own rows) on the CPU, where the step had to look at it: this stage's mask is its one look at the device.

        `run(piece, cache, rows, *tensors)` runs what lies before, inside and after such a look: shapes depend on the
        number of rows and the capacity of the cache, and nothing in a piece waits for the device.
        """
        rows = cache.rows(named)
        if self.innermost:
            (x,) = run(self._step_innermost, cache, rows, x)
            cache.advanced(named)
            return x, []
        ids = () if self.boundaries == "any" or input_ids is None else (input_ids,)
        x, residual, prob, mask = run(self._step_to_boundary, cache, rows, x, *ids)
        fired = mask.tolist()
        z, inner_masks = x, []  # of rows without a boundary, z is not read
        inside = [s for s, f in zip(named, fired, strict=True) if f]
        if len(inside) == len(named):
            z, inner_masks = self.main_network.step(x, cache.inner, inside, None, run)
        elif inside:
            index = upload([i for i, f in enumerate(fired) if f], x.device)
            some, inner_masks = self.main_network.step(x[index], cache.inner, inside, None, run)
            z = x.index_copy(0, index, some.to(x.dtype))
        (x,) = run(self._step_from_chunk, cache, rows, z.to(x.dtype), prob, mask, residual)
        cache.advanced(named)
        return x, [torch.tensor(fired), *inner_masks]

    def _step_innermost(self, cache: StageCache, rows: Rows, x: Tensor) -> tuple[Tensor]:
        x = self._narrow(self.main_network.step(self._widen(x), cache.layers, rows))
        rows.advance()
        return (x,)

    def _step_to_boundary(
        self, cache: StageCache, rows: Rows, x: Tensor, input_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Encoder and routing. Returns x and residual (n, d_model), boundary probability and mask (n,)."""
        state = cache.route
        assert state is not None
        x = self.encoder.step(self._widen(x), cache.layers, rows)
        q, k = self.routing_module.q_proj_layer(x), self.routing_module.k_proj_layer(x)
        allowed = None
        if input_ids is not None:
            recent = torch.cat([rows.take(state.tail), input_ids[:, None].to(torch.uint8)], 1)
            allowed = starts_character(recent[:, 3]) if self.boundaries == "char-start" else ends_character(recent)
            rows.put(state.tail, recent[:, 1:])
        prob, mask, _ = hk.route_step(
            rows.take(state.q_last).to(q.dtype), k, is_first=rows.position == 0, logit_bias=self.logit_bias,
            candidates=allowed,
        )  # fmt: skip
        rows.put(state.q_last, q)
        return x, self._residual(x), prob, mask

    def _step_from_chunk(
        self, cache: StageCache, rows: Rows, z: Tensor, prob: Tensor, mask: Tensor, residual: Tensor
    ) -> tuple[Tensor]:
        """Dechunk and decoder; z (n, d_model), read where mask is true."""
        assert cache.route is not None
        y, ema = hk.dechunk_step(z, prob, mask, rows.take(cache.route.ema), residual)
        rows.put(cache.route.ema, ema)
        x = self._narrow(self.decoder.step(y, cache.decoder, rows))
        rows.advance()
        return (x,)

    def allocate_cache(self, batch: int, max_length: int) -> StageCache:
        inner = self.main_network.allocate_cache(batch, max_length)
        device = next(self.parameters()).device
        if self.innermost:
            return allocate_stage(batch, inner, [], None, None, device)
        w = self.routing_module.q_proj_layer.weight
        d = w.shape[0]
        route = RouteCache(
            w.new_zeros(batch, d),
            w.new_zeros(batch, d, dtype=torch.float32),
            torch.zeros(batch, 3, dtype=torch.uint8, device=device),
        )
        encoder, decoder = (part.allocate_cache(batch, max_length) for part in (self.encoder, self.decoder))
        return allocate_stage(batch, encoder, decoder, route, inner, device)


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


def recent_bytes(input_ids: Tensor, pack: Pack, count: int = 4) -> Tensor:
    """(T, count): the bytes before each position in its sequence, 0 before it begins, and its own."""
    columns = []
    for back in range(count - 1, 0, -1):
        shifted = torch.cat([input_ids.new_zeros(back), input_ids])[: len(input_ids)]
        columns.append(torch.where(pack.position >= back, shifted, 0))
    return torch.stack([*columns, input_ids], 1)


def last_bytes(input_ids: Tensor, pack: Pack) -> Tensor:
    """(N, 3) uint8: the last three bytes of every sequence"""
    return recent_bytes(input_ids, pack)[pack.cu_seqlens[1:].long() - 1, 1:].to(torch.uint8)


def remember(cache: RouteCache, q: Tensor, z: Tensor, r: hk.Routing, pack: Pack, slots: Tensor) -> None:
    """The state after the last position of each sequence; no sequence is empty."""
    cache.q_last[slots] = q[pack.cu_seqlens[1:].long() - 1].to(cache.q_last.dtype)
    p = r.boundary_prob[r.chunk_start.long()].clamp(1e-4, 1 - 1e-4)
    cache.ema[slots] = hk.ema(z, p, r.cu_chunks, return_final_state=True)[1]
