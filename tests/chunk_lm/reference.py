"""The model as the formulas say it, in plain torch.fft, batch first: what the fast forms must agree with."""

import torch
import torch.nn.functional as F

from hnet.chunk_lm.spectral import cutoff_mask


def filtered(u, kernel, freq_gate, cutoff, n):
    """(B, T, D) -> (B, T, D): all bins, zero-phase gains on the signal (looks ahead)."""
    mask = cutoff_mask(n // 2 + 1, cutoff).to(kernel.dtype)
    H = torch.fft.rfft(kernel, n) * torch.sigmoid(freq_gate) * mask
    return torch.fft.irfft(torch.fft.rfft(u, n, dim=1) * H[:, None], n, dim=1)[:, : u.shape[1]]


def filtered_causally(u, kernel, freq_gate, cutoff, n):
    """The same gains on the kernel, cut to its taps, then a linear convolution tap by tap."""
    mask = cutoff_mask(n // 2 + 1, cutoff).to(kernel.dtype)
    taps = torch.fft.irfft(torch.fft.rfft(kernel, n) * torch.sigmoid(freq_gate) * mask, n)[: len(kernel)]
    out = torch.zeros_like(u)
    for j, tap in enumerate(taps[: u.shape[1]]):
        out = out + tap * F.pad(u, (0, 0, j, 0))[:, : u.shape[1]]
    return out


def mean_so_far(u, memory):
    m, out = torch.zeros_like(u[:, 0]), []
    for t in range(u.shape[1]):
        m = m + (u[:, t] - m) / min(t + 1, memory)
        out.append(m)
    return torch.stack(out, 1)


def hidden(model, ids, cutoff, naive=False):
    """(B, T, D): the final LayerNorm at every position. naive: the non-causal filter and a whole mean, in any model."""
    c, x = model.config, model.embeddings(ids)
    for b in model.blocks:
        u = b.norm1(x)
        if c.causal and not naive:
            y = filtered_causally(u, b.kernel, b.freq_gate, cutoff, c.n_fft)
            mean = mean_so_far(u, c.seq_len)
        else:
            y, mean = filtered(u, b.kernel, b.freq_gate, cutoff, c.n_fft), u.mean(1, keepdim=True)
        x = x + y * b.gain * torch.sigmoid(b.content_gate(mean))
        x = x + b.fc2(F.gelu(b.fc1(b.norm2(x))))
    return model.norm(x)


def logits(model, ids, cutoff):
    h = hidden(model, ids, cutoff)
    if model.config.causal:
        return model.head(h)
    last = h[:, -1]
    if model.state is not None:
        last = last + model.state(serial_state(model.state, ids))
    return model.head(last).view(len(ids), model.config.chunk, 256)


def serial_state(state, ids):
    """The accumulator, one chunk after the other; ids a whole number of chunks."""
    decay, turn = torch.sigmoid(state.decay), torch.exp(1j * state.angle)
    H = torch.zeros(len(ids), *state.angle.shape, dtype=turn.dtype)
    for part in ids.split(state.chunk, 1):
        H = decay * turn * H + (1 - decay) * torch.fft.rfft(state.embedding(part), dim=1)
    return H
