import json
import math

import pytest
import torch

from hnet.chunk_lm import ChunkLM, ChunkLMConfig, Windows, chunk_lm_loss, spectral

from . import reference

SMALL = dict(d_model=24, n_layers=3, seq_len=48, kernel_len=12, chunk=8, dropout=0.0, state_dim=6)


def make(dtype=torch.float64, **options):
    """A model none of whose parameters still has a value that would hide a mistake."""
    torch.manual_seed(0)
    model = ChunkLM(ChunkLMConfig(**{**SMALL, **options}), dtype=dtype)
    for name, p in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(p, std=0.5)
    return model


def ids(B, T, seed=0):
    return torch.randint(0, 256, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("options", [{}, {"spectral_state": True}, {"causal": True}])
@pytest.mark.parametrize("cutoff", [2, 7, 33])
@pytest.mark.parametrize("length", [48, 16])
def test_logits_and_gradients_equal_the_plain_formulas(options, cutoff, length):
    model, x = make(**options), ids(2, length)
    assert model.bins == 33
    got, expected = model(x, cutoff), reference.logits(model, x, cutoff)
    assert got.shape == ((2, length, 256) if model.config.causal else (2, 8, 256))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    weight = torch.randn_like(got)
    used = [p for n, p in model.named_parameters()]
    a, b = (torch.autograd.grad((y * weight).sum(), used, allow_unused=True) for y in (got, expected))
    for (name, _), x, y in zip(model.named_parameters(), a, b, strict=True):
        assert (x is None) == (y is None), name
        if x is not None:
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("cutoff", [1, 7, 60])
def test_truncated_bins_in_the_model(cutoff):
    model, x = make(seq_len=120), ids(2, 120)
    assert spectral.passed_bins(model.bins, cutoff) < model.bins == 129
    torch.testing.assert_close(model(x, cutoff), reference.logits(model, x, cutoff), rtol=0, atol=1e-10)


def test_size_of_the_published_shape():
    model = ChunkLM(ChunkLMConfig(seq_len=512))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(10.1e6, rel=0.005)
    assert ChunkLMConfig().bins == 1025
    assert ChunkLMConfig(seq_len=512).bins == 513


@pytest.mark.parametrize("autocast", [False, True])
def test_causal_head_never_looks_ahead_at_any_cutoff(autocast):
    model = make(torch.float32 if autocast else torch.float64, causal=True).eval()
    x = ids(2, 120)  # longer than a window and than a block of the convolution
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        for cutoff in range(1, model.bins + 1):
            before = model(x, cutoff)
            for t in (0, 1, 70, 119):
                changed = x.clone()
                changed[:, t] = (changed[:, t] + 1) % 256
                moved = (model(changed, cutoff) - before).abs().amax((0, 2))
                assert (moved[:t] == 0).all(), (cutoff, t)
                assert moved[t] > 1e-3, (cutoff, t)


def test_zero_phase_gains_and_whole_means_do_look_ahead():
    """The fault of the naive form, which the test above would see."""
    model, x = make(causal=True), ids(2, 48)
    changed = x.clone()
    changed[:, 40] = (changed[:, 40] + 1) % 256
    for cutoff in (7, 20):
        a, b = (reference.hidden(model, v, cutoff, naive=True) for v in (x, changed))
        assert (a - b)[:, :40].abs().max() > 1e-3 * a.abs().max()


def test_cutoff_changes_the_output_and_full_is_the_default():
    model, x = make(), ids(1, 48)
    assert model.cutoff == 33
    assert torch.equal(model(x), model(x, 33))
    assert (model(x, 2) - model(x)).abs().max() > 1e-3
    model.set_cutoff(2)
    assert model.cutoff == model.config.cutoff == 2
    assert torch.equal(model(x), model(x, 2))
    model.set_cutoff(None)
    assert model.cutoff == 33
    assert ChunkLM(model.config, dtype=torch.float64).config is not model.config
    for bad in (0, 34, 2.0, True):
        with pytest.raises(ValueError, match="cutoff must be an integer from 1 to 33"):
            model.set_cutoff(bad)
        with pytest.raises(ValueError, match="cutoff must be an integer from 1 to 33"):
            model(x, bad)


def test_spectral_state_carries_over_the_window():
    model = make(spectral_state=True)
    text = ids(2, 96)
    whole, _ = model.predict(text[:, -48:], text, None)
    memory = None
    for at in range(0, 96, 16):
        step, memory = model.predict(text[:, max(0, at - 32) : at + 16], text[:, at : at + 16], memory)
    torch.testing.assert_close(step, whole, rtol=0, atol=1e-10)
    assert (model(text[:, -48:]) - whole).abs().max() > 1e-6  # there is something beyond the window to remember


@pytest.mark.parametrize("causal", [False, True])
def test_loss(causal):
    model = make(causal=causal)
    w = Windows(ids(3, 48), ids(3, 8, seed=1))
    loss, ce = chunk_lm_loss(model, w)
    p = model(w.input_ids).log_softmax(-1)
    targets = torch.cat([w.input_ids[:, 1:], w.targets[:, :1]], 1) if causal else w.targets
    expected = -p.gather(-1, targets[..., None]).mean()
    torch.testing.assert_close(ce.double(), expected, rtol=1e-6, atol=0)
    assert loss is ce
    smooth, same = chunk_lm_loss(model, w, label_smoothing=0.1)
    assert same == ce
    torch.testing.assert_close(smooth.double(), 0.9 * expected - 0.1 * p.mean(), rtol=1e-6, atol=0)
    assert chunk_lm_loss(model, w, 3)[0] != loss
    if not causal:
        with pytest.raises(ValueError, match=r"targets must be \(3, 8\)"):
            chunk_lm_loss(model, Windows(w.input_ids, w.targets[:, :7]))


@pytest.mark.parametrize("options", [{}, {"spectral_state": True}, {"causal": True}])
def test_learns_under_autocast_with_dropout(options):
    torch.manual_seed(0)
    model = ChunkLM(ChunkLMConfig(**{**SMALL, **options, "dropout": 0.1}))
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    text = torch.arange(64).repeat(3)
    losses = []
    for i in range(100):
        start = torch.arange(8) * 7 + i
        cut = text[(start[:, None] + torch.arange(56)) % 64]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, _ = chunk_lm_loss(model, Windows(cut[:, :48], cut[:, 48:]), 16)
        assert loss.dtype == torch.float32
        loss.backward()
        missing = [n for n, p in model.named_parameters() if p.grad is None]
        assert not missing
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(256), rel=0.15)
    assert losses[-1] < 1.0


def test_trains_after_generating():
    """Tables cached in inference mode must not be inference tensors."""
    for cached in (spectral._mask, spectral._weights, spectral.band_basis):
        cached.cache_clear()
    model = make(torch.float32, seq_len=120)
    for cutoff in (3, 129):  # low rank, transform
        with torch.inference_mode():
            model(ids(1, 120), cutoff)
        model(ids(1, 120), cutoff).sum().backward()
    assert spectral.band_basis.cache_info().currsize == 1


def test_bf16_weights_run():
    for options in ({}, {"causal": True}, {"spectral_state": True}):
        model, x = make(torch.float32, **options).eval(), ids(1, 48)
        exact = model(x)
        low = model.bfloat16()(x)
        assert low.dtype == torch.bfloat16
        assert torch.nn.functional.cosine_similarity(low.float().flatten(), exact.flatten(), 0) > 0.99


def test_save_and_load(tmp_path):
    for i, options in enumerate(({}, {"causal": True}, {"spectral_state": True})):
        model, x = make(torch.float32, **options).eval(), ids(1, 48)
        model.set_cutoff(5)
        model.save_pretrained(tmp_path / str(i))
        loaded = ChunkLM.from_pretrained(tmp_path / str(i)).eval()
        assert loaded.config == model.config
        assert loaded.cutoff == 5
        assert torch.equal(loaded(x), model(x))
        from_file = ChunkLM.from_pretrained(tmp_path / str(i) / "model.safetensors").eval()
        assert torch.equal(from_file(x), model(x))


def test_bad_files(tmp_path):
    make(torch.float32).save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole, shape = weights.read_bytes(), config.read_text()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors is not a whole safetensors file") as e:
        ChunkLM.from_pretrained(tmp_path)
    assert "\n" not in str(e.value)
    weights.write_bytes(whole)
    for change, message in [
        ({"model_type": "hnet"}, "model_type must be 'chunk_lm', got 'hnet'"),
        ({"n_layers": 4}, "lacks blocks.3"),
        ({"n_layers": 2}, "has blocks.2.[a-z0-9_.]+ and 12 more, which this config does not"),
        ({"kernel_len": 11}, r"blocks.0.kernel must have shape \(11,\), got \(12,\)"),
        ({"width": 3}, "unknown key 'width'"),
        ({"d_model": 0}, "d_model must be an integer >= 1, got 0"),
    ]:
        config.write_text(json.dumps({**json.loads(shape), **change}))
        with pytest.raises(ValueError, match=message):
            ChunkLM.from_pretrained(tmp_path)
    config.write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON: Expecting"):
        ChunkLM.from_pretrained(tmp_path)
    config.unlink()
    with pytest.raises(FileNotFoundError, match="config.json does not exist"):
        ChunkLM.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="holds no model.safetensors"):
        ChunkLM.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        ChunkLM.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 1.5}, "d_model must be an integer >= 1, got 1.5"),
        ({"n_layers": 0}, "n_layers must be an integer >= 1"),
        ({"kernel_len": 2000}, r"kernel_len must be at most seq_len \(1024\), got 2000"),
        ({"chunk": 2000}, r"chunk must be at most seq_len \(1024\), got 2000"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": "a"}, "dropout must be in"),
        ({"vocab_size": 128}, "vocab_size must be 256"),
        ({"causal": 1}, "causal must be true or false, got 1"),
        ({"causal": True, "spectral_state": True}, "spectral_state belongs to the chunk head"),
        ({"cutoff": 1026}, "cutoff must be an integer from 1 to 1025, got 1026"),
        ({"cutoff": True}, "cutoff must be an integer"),
    ],
)
def test_bad_config(options, message):
    with pytest.raises(ValueError, match=message):
        ChunkLMConfig(**options)


def test_config_json(tmp_path):
    c = ChunkLMConfig(**SMALL, spectral_state=True, cutoff=9)
    c.to_json(tmp_path / "c.json")
    assert ChunkLMConfig.from_json(tmp_path / "c.json") == c
    assert ChunkLMConfig.from_dict({}) == ChunkLMConfig()
    with pytest.raises(ValueError, match="must be a JSON object"):
        ChunkLMConfig.from_dict([1])


def test_bad_input():
    model = make()
    for shape in ((48,), (1, 0), (1, 49), (1, 2, 3)):
        with pytest.raises(ValueError, match=r"input_ids must be \(batch, 1 .. 48\)"):
            model(torch.zeros(shape, dtype=torch.long))
    with pytest.raises(ValueError, match="causal_state needs a model with causal=True"):
        model.causal_state()
