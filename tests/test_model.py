"""gatevlm.py: what the model promises, one promise per test. Tiny models, seeded, CPU only.

Most tests first give every parameter a random value (make), because a fresh model hides mistakes: a zero-initialised FiLM
layer leaks nothing, a bias of zero can be forgotten, and all gates stand near one half.
"""
import io
import math
from dataclasses import asdict, fields

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gatevlm import (CONTRASTIVES, GATES, IMAGE_ENCODERS, MODULATIONS, PLACES, Attention, Block, GateVLM, GateVLMConfig, HeadLoss, InputError,
                     clip_loss, keep_best, keep_sampled, lcg_loss, load_checkpoint, load_model, save_checkpoint)

V, T, K, IMAGE_DIM = 50, 7, 4, 6
MODULATED = [dict(modulation="none")] + [dict(modulation=m, modulate_at=p) for m in MODULATIONS if m != "none" for p in PLACES]
VARIANTS = [dict(gate=g, **m, n_image_token=k) for g in GATES for m in MODULATED for k in (1, 4)]
VARIANTS += [dict(switch, n_image_token=k) for k in (1, 4) for switch in (
    dict(channel_attention=True), dict(image_encoder="mlp"), dict(image_encoder="none"), dict(contrastive="clip"),
    dict(contrastive="lcg"), dict(tie_weights=False))]


def name(variant):
    return "-".join(value if isinstance(value, str) else f"{field}={value}" for field, value in variant.items())


def every(variants):
    return pytest.mark.parametrize("variant", variants, ids=name)


def tiny(**changes):
    base = dict(vocab_size=V, block_size=9, n_layer=2, n_head=2, n_embd=16, dropout=0.0, n_image_layer=1, n_image_token=K,
                image_dim=IMAGE_DIM)
    return GateVLMConfig(**{**base, **changes})


def make(fresh=False, **changes):
    """A tiny model in eval mode: as initialised when fresh, otherwise with every parameter random."""
    torch.manual_seed(0)
    model = GateVLM(tiny(**changes)).eval()
    return model if fresh else scramble(model)


@torch.no_grad()
def scramble(model, only=lambda name: True):
    for parameter_name, p in model.named_parameters():
        if only(parameter_name):
            p += 0.3 * torch.randn_like(p)
    return model


def captions(model, B=3):
    """idx (B,T), targets (B,T) of ragged length (T, T-1, T-2, ... real ones, then -1), image (B,K,image_dim)."""
    torch.manual_seed(1)
    idx, targets = torch.randint(V, (2, B, T))
    targets[torch.arange(T) >= T - torch.arange(B)[:, None]] = -1
    return idx, targets, torch.randn(B, model.config.n_image_token, model.config.image_dim)


def is_visual(parameter_name):
    return any(part in parameter_name.split(".") for part in ("image_encoder", "ln2", "cross", "gate", "ln4", "condition"))


def same(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def one_line(error):
    return len(str(error.value).splitlines()) == 1


# ----------------------------------------------------------------------------------------------------------------------
# causality: the answer is never in the input

def change_of_logits(model):
    """Row t of a batch differs from row 0 in token t alone. Returns the largest change of a logit before the changed token, and
    the smallest one at the changed token."""
    idx, _, image = captions(model, B=1)
    idx = idx.repeat(T, 1)
    idx[range(1, T), range(1, T)] = (idx[0, 1:] + 1) % V
    logits, _ = model(idx, image=image.expand(T, -1, -1))
    change = (logits - logits[0]).abs().amax(dim=-1)  # (row, position)
    return change.tril(-1).max().item(), change.diagonal()[1:].min().item()


@every(VARIANTS)
def test_a_token_changes_no_logit_before_it(variant):
    before, at = change_of_logits(make(**variant))
    assert before < 1e-5 and at > 1e-2


@pytest.mark.parametrize("modulation", ["film", "dyintra"])
def test_the_causality_test_sees_a_leak(modulation, monkeypatch):
    """The obvious way to condition the image on the text, its mean over the whole caption, tells a word its own future."""
    def look(block, t, image, cache, mask):
        return block.cross(t, memory=block.modulate(image, t.mean(dim=1, keepdim=True)))

    monkeypatch.setattr(Block, "look", look)
    assert change_of_logits(make(modulation=modulation, modulate_at="image"))[0] > 1e-2


def test_the_leak_hides_in_a_fresh_film_model(monkeypatch):
    """Why make() randomises: zero-initialised FiLM ignores its condition, even one that it should not see."""
    monkeypatch.setattr(Block, "look", lambda block, t, image, cache, mask: block.cross(t, memory=block.modulate(image, t.mean(1, True))))
    assert change_of_logits(make(fresh=True, modulation="film", modulate_at="image"))[0] < 1e-5


# ----------------------------------------------------------------------------------------------------------------------
# a text-only batch takes no image path

@every(VARIANTS)
def test_text_only_ignores_every_image_parameter(variant):
    model = make(**variant)
    idx, _, image = captions(model)
    logits, _, gates = model(idx, image=None, return_gates=True)
    with_image, _ = model(idx, image=image)
    scramble(model, only=is_visual)
    same(model(idx, image=None)[0], logits, 0)
    assert (gates == 1).all()
    assert not torch.allclose(model(idx, image=image)[0], with_image)  # while a caption does feel the change


def test_a_model_without_eyes_has_no_image_parameter_and_refuses_images():
    model = make(n_image_token=0)
    assert not [n for n, _ in model.named_parameters() if is_visual(n)]
    idx = torch.zeros(1, 2, dtype=torch.long)
    assert model(idx)[0].shape == (1, 2, V)
    for call in (model, lambda idx, image: model.generate(idx, 3, image)):
        with pytest.raises(InputError, match="image") as error:
            call(idx, image=torch.zeros(1, 1, IMAGE_DIM))
        assert one_line(error)


def test_a_text_longer_than_the_block_is_an_input_error():
    with pytest.raises(InputError, match="block_size 9") as error:
        make()(torch.zeros(1, 10, dtype=torch.long))
    assert one_line(error)


# ----------------------------------------------------------------------------------------------------------------------
# the equations of one decoder layer, written once more, slowly

@pytest.mark.parametrize("causal, memory", [(False, False), (True, False), (False, True)])
def test_attention_is_softmax_of_scaled_dot_products(causal, memory):
    torch.manual_seed(0)
    attention = scramble(Attention(tiny()).eval())
    x, image = torch.randn(1, 5, 16), torch.randn(1, K, 16)
    source = (image if memory else x)[0]
    D, q = 16, attention.query(x)[0]
    key, value = attention.key_value(source)[:, :D], attention.key_value(source)[:, D:]
    y = torch.zeros(5, D)
    for head in (slice(0, 8), slice(8, 16)):  # 2 heads of size 8
        for i in range(5):
            last = i + 1 if causal else len(source)
            weight = torch.stack([q[i, head] @ key[j, head] / math.sqrt(8) for j in range(last)]).softmax(0)
            y[i, head] = sum(weight[j] * value[j, head] for j in range(last))
    same(attention(x, memory=image if memory else None, causal=causal)[0], attention.proj(y))


def slow_block(block, h, image):
    """One decoder layer for a single caption, h (T,D), image (K,D), a position at a time: output (T,D), gate (T,)."""
    def modulate(x, condition):
        y = block.condition.weight @ condition + block.condition.bias
        if block.config.modulation == "film":
            return x * (1 + y[:len(condition)]) + y[len(condition):]
        return x * (1 + torch.sigmoid(y))

    place = block.config.modulate_at if block.config.modulation != "none" else None
    h = h + block.attn(block.ln1(h)[None], causal=True)[0]
    text = block.ln2(h)
    out, gates = [], []
    for i in range(len(h)):
        t, memory = text[i], image
        if place == "text":
            t = modulate(t, image.mean(0))
        if place == "image":
            memory = torch.stack([modulate(token, text[:i + 1].mean(0)) for token in image])  # words 0..i, never the next one
        v = block.cross(t[None, None], memory=memory[None])[0, 0]
        if place == "cross":
            v = modulate(v, image.mean(0))
        if block.config.gate == "none":
            fused, g = h[i] + v, torch.ones(1)
        else:
            g = block.gate(torch.cat([t, v]))
            g = torch.sigmoid(g) if block.config.gate.startswith("soft") else (g > 0).float()
            fused = h[i] + block.ln4(g * t + (1 - g) * v)
        out.append(fused + block.mlp(block.ln3(fused)))
        gates.append(g.mean())
    return torch.stack(out), torch.stack(gates)


@every([dict(gate=g, **m) for g in GATES for m in MODULATED])
def test_a_block_is_the_equation(variant):
    """h + LN4(g * t + (1 - g) * v), the modulation at its place, and the reported gate is the mean of g over features."""
    block = make(**variant).blocks[0]
    torch.manual_seed(2)
    h, image = torch.randn(2, T, 16), torch.randn(2, K, 16)
    out, gate = block(h, image)
    for row in range(2):
        slow_out, slow_gate = slow_block(block, h[row], image[row])
        same(out[row], slow_out)
        same(gate[row], slow_gate)


@pytest.mark.parametrize("encoder", IMAGE_ENCODERS)
@pytest.mark.parametrize("channel_attention", [False, True])
def test_image_encoder_is_the_equation(encoder, channel_attention):
    """Standardise, project, add the position; layers; norm; and squeeze-and-excitation weighs features, the same at all tokens."""
    model = make(image_encoder=encoder, channel_attention=channel_attention, n_embd=32).image_encoder  # 32 / 16 = 2 squeezed
    torch.manual_seed(2)
    model.mean.normal_(), model.std.uniform_(1, 2)
    image = torch.randn(2, K, IMAGE_DIM)
    x = (image - model.mean) / model.std
    if encoder == "mlp":
        x = model.proj[2](F.gelu(model.proj[0](x))) + model.position
    else:
        x = model.proj(x) + model.position
    assert len(model.layers) == (1 if encoder == "transformer" else 0)
    for layer in model.layers:
        x = x + layer.attn(layer.ln1(x))
        x = x + layer.mlp(layer.ln2(x))
    x = model.ln(x)
    if channel_attention:
        hidden = torch.relu(model.squeeze(x.mean(1)))
        assert hidden.shape == (2, 2)
        x = x * torch.sigmoid(model.excite(hidden))[:, None]
    same(model(image), x)


def test_features_of_any_scale_come_in():
    """With their mean and standard deviation in the buffers, features in thousands are the features themselves."""
    model = make()
    idx, _, image = captions(model)
    logits, _ = model(idx, image=image)
    model.image_encoder.mean.fill_(500)
    model.image_encoder.std.fill_(1000)
    same(model(idx, image=image * 1000 + 500)[0], logits, 1e-4)


def test_one_image_token_leaves_the_query_no_say():
    """The softmax over one key is 1, so with K=1 every word sees the same thing, and only the gate is word by word."""
    for k, equal in ((1, True), (4, False)):
        block = make(n_image_token=k).blocks[0]
        text, other, image = torch.randn(1, T, 16), torch.randn(1, T, 16), torch.randn(1, k, 16)
        assert torch.allclose(block.cross(text, memory=image), block.cross(other, memory=image), atol=1e-6) == equal


@pytest.mark.parametrize("place", PLACES)
def test_fresh_film_is_the_identity(place):
    """Same shared weights, with and without FiLM: gamma = beta = 0, so x * (1 + 0) + 0 = x. DyIntra starts at x * 1.5."""
    plain = make()
    idx, _, image = captions(plain)
    for modulation, equal in (("film", True), ("dyintra", False)):
        modulated = make(fresh=True, modulation=modulation, modulate_at=place)
        missing, unexpected = modulated.load_state_dict(plain.state_dict(), strict=False)
        assert missing and all(".condition." in n for n in missing) and not unexpected
        assert torch.allclose(modulated(idx, image=image)[0], plain(idx, image=image)[0], atol=1e-5) == equal


def test_dropout_is_on_every_branch_in_training_and_nowhere_in_eval():
    """Drop (nearly) all: attention is its last bias, a layer adds nothing but the bias of the norm that follows the dropout."""
    model = make(dropout=1 - 1e-9).train()
    idx, _, image = captions(model)
    x = torch.randn(2, 5, 16)
    attention, layer = model.blocks[0].attn, model.image_encoder.layers[0]
    same(attention(x), attention.proj.bias.expand_as(x))
    same(layer(x), x)
    same(model.trunk(idx, image)[0], model.ln(model.blocks[0].ln4.bias + model.blocks[1].ln4.bias).expand(3, T, -1))
    same(model.eval()(idx, image=image)[0], make(dropout=0.0)(idx, image=image)[0], 0)


def test_initial_scale():
    """Linear layers at 1 / sqrt(3 * inputs), which is GPT-2's 0.02 at width 768; what a layer adds to the residual stream is
    divided by sqrt(2 * n_layer) = 2; cross-attention is no addition but weighed against normalised text, 1 / sqrt(D)."""
    model = make(fresh=True, n_embd=64, n_layer=2)
    for n, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.weight.numel() > 2000:
            expected = (3 * module.in_features) ** -0.5
            if n.endswith(("attn.proj", "mlp.proj")):
                expected /= 2
            if n.endswith("cross.proj"):
                expected = 64 ** -0.5
            assert abs(module.weight.std().item() / expected - 1) < 0.1, n
        if isinstance(module, nn.Linear) and module.bias is not None:
            assert (module.bias == 0).all(), n
    for embedding in (model.token_embedding.weight, model.position_embedding.weight):
        assert abs(embedding.std().item() / (3 * 64) ** -0.5 - 1) < 0.1  # tied or not, as a Linear of the same width
    assert abs(model.image_encoder.position.std().item() / 0.5 - 1) < 0.1


# ----------------------------------------------------------------------------------------------------------------------
# gates

@every(VARIANTS)
def test_gates_are_shares_of_language(variant):
    model = make(n_layer=3, **variant)
    idx, _, image = captions(model)
    _, _, gates = model(idx, image=image, return_gates=True)
    assert gates.shape == (3, 3, T)  # n_layer, B, T
    assert (gates >= 0).all() and (gates <= 1).all()
    if variant.get("gate") == "none":
        assert (gates == 1).all()
    elif "hard" not in variant.get("gate", ""):
        assert len(gates.unique()) > 1  # and they differ from word to word


@pytest.mark.parametrize("gate", GATES[:4])
def test_gate_one_is_all_language_and_gate_zero_is_all_vision(gate):
    """A gate bias of +100 closes the eyes: two images give the same logits. At -100 the text side t is out of the mix."""
    model = make(gate=gate, n_layer=1)
    idx, _, image = captions(model)
    block = model.blocks[0]
    nn.init.constant_(block.gate.bias, 100.0)
    logits, _, gates = model(idx, image=image, return_gates=True)
    assert (gates == 1).all()
    same(model(idx, image=torch.randn_like(image))[0], logits)
    nn.init.constant_(block.gate.bias, -100.0)
    logits, _, gates = model(idx, image=image, return_gates=True)
    assert gates.max() < 1e-6
    assert not torch.allclose(model(idx, image=torch.randn_like(image))[0], logits, atol=1e-2)


@pytest.mark.parametrize("gate", ["hard-feature", "hard-token"])
def test_hard_gates_are_binary_in_eval_and_noisy_in_training(gate):
    model = make(gate=gate)
    idx, _, image = captions(model)
    look = lambda: model(idx, image=image, return_gates=True)[::2]  # logits, gates
    (logits, gates), (again, gates_again) = look(), look()
    same(again, logits, 0)
    same(gates_again, gates, 0)
    features_at_1 = gates * (16 if gate == "hard-feature" else 1)  # gates are reported as a mean over the 16 features
    same(features_at_1, features_at_1.round(), 0)
    assert 0 < gates.mean() < 1
    model.train()  # dropout is 0 here, so the Gumbel noise is all that differs
    (logits, gates), (again, gates_again) = look(), look()
    assert not torch.allclose(again, logits) and not torch.allclose(gates_again, gates)


@pytest.mark.parametrize("gate", ["soft-feature", "soft-token", "none"])
def test_soft_gates_are_the_same_in_training(gate):
    model = make(gate=gate)
    idx, _, image = captions(model)
    evaluated, _ = model(idx, image=image)
    same(model.train()(idx, image=image)[0], evaluated)


def test_temperature_falls_from_1_to_a_tenth_over_80_percent():
    model = make(gate="hard-feature")
    assert model.gate_temperature == 1
    for progress, temperature in ((0, 1.0), (0.2, 0.775), (0.4, 0.55), (0.8, 0.1), (0.9, 0.1), (1, 0.1), (0.4, 0.55)):
        model.anneal(progress)
        assert abs(model.gate_temperature.item() - temperature) < 1e-6


def test_temperature_sharpens_the_training_gates():
    """At 0.1 most gates are near 0 or 1; at 1.0 few are."""
    model = make(gate="hard-token").train()
    idx, _, image = captions(model)
    undecided = {}
    for progress in (0, 1):
        model.anneal(progress)
        gates = torch.cat([model(idx, image=image, return_gates=True)[2].flatten() for _ in range(20)])
        undecided[progress] = ((gates > 0.05) & (gates < 0.95)).float().mean()
    assert undecided[1] < 0.5 * undecided[0]


def test_temperature_survives_a_checkpoint(tmp_path):
    model = make(gate="hard-feature")
    model.anneal(0.4)
    assert "gate_temperature" in model.state_dict()
    save_checkpoint(tmp_path / "best.pt", {"model": model.state_dict(), "model_config": asdict(model.config)})
    assert abs(load_model(tmp_path).gate_temperature.item() - 0.55) < 1e-6


@pytest.mark.parametrize("logit", [-2.0, 0.5])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_a_two_way_gumbel_softmax_is_a_sigmoid(logit, temperature):
    """The first share of softmax(((logit, 0) + two Gumbel samples) / temperature), sampled with torch's own function, has the
    mean and the quartiles of what the block samples. 200,000 samples: the standard error of the mean is below 0.001."""
    n, block = 200_000, make(gate="hard-token").train().blocks[0]
    nn.init.zeros_(block.gate.weight)
    nn.init.constant_(block.gate.bias, logit)
    ours = block.gate_values(torch.zeros(n, 32), torch.tensor(temperature))[:, 0]
    gumbel = F.gumbel_softmax(torch.tensor([logit, 0.0]).expand(n, 2), tau=temperature)[:, 0]
    same(ours.mean(), gumbel.mean(), 5e-3)
    share = torch.tensor([0.25, 0.5, 0.75])
    same(ours.quantile(share), gumbel.quantile(share), 1e-2)
    same((ours > 0.5).float().mean(), torch.sigmoid(torch.tensor(logit)), 5e-3)  # at any temperature


# ----------------------------------------------------------------------------------------------------------------------
# generate

@every(VARIANTS)
def test_one_token_at_a_time_with_a_cache_is_the_full_forward(variant):
    model = make(**variant)
    idx, _, image = captions(model)
    for picture in (image, None):
        cache = [{"self": {}, "image": {}} for _ in model.blocks]
        parts = [model.trunk(part, picture, cache)[:2] for part in (idx[:, :3], *idx[:, 3:].split(1, dim=1))]  # 3 at once, then 1 by 1
        h, gates, _, _ = model.trunk(idx, picture)
        same(torch.cat([part[0] for part in parts], dim=1), h)
        same(torch.cat([part[1] for part in parts], dim=2), gates)


@every(VARIANTS)
def test_generate_writes_the_same_with_and_without_cache(variant):
    model = make(**variant)
    idx, _, image = captions(model)
    for picture in (image, None):
        for temperature in (0, 1.5):
            written = []
            for use_cache in (True, False):
                torch.manual_seed(3)
                written.append(model.generate(idx[:, :2], 6, picture, temperature=temperature, use_cache=use_cache))
            assert written[0].shape == (3, 8) and torch.equal(*written)


def test_temperature_0_takes_the_best_token_and_so_does_top_k_1():
    model = make()
    idx, _, image = captions(model)
    expected = idx[:, :2]
    for _ in range(6):
        expected = torch.cat([expected, model(expected, image=image)[0][:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(idx[:, :2], 6, image, temperature=0), expected)
    assert torch.equal(model.generate(idx[:, :2], 6, image, temperature=2.0, top_k=1), expected)


@pytest.mark.parametrize("top_k", [None, 3, 1000])
def test_samples_follow_softmax_of_logits_over_temperature(top_k):
    """5,000 rows of the same text: the frequencies of the next token are within 0.03 of the probabilities."""
    model = make()
    idx, _, image = captions(model, B=1)
    logits = model(idx[:, :2], image=image)[0][0, -1] / 2.0
    if top_k == 3:
        logits[logits.argsort()[:-3]] = -math.inf
    sampled = model.generate(idx[:, :2].expand(5000, -1), 1, image.expand(5000, -1, -1), temperature=2.0, top_k=top_k)[:, -1]
    frequency = torch.bincount(sampled, minlength=V) / 5000
    same(frequency, logits.softmax(0), 0.03)
    assert (frequency[logits == -math.inf] == 0).all()


def test_generate_stops_when_every_row_has_ended_and_rows_that_ended_repeat_eot():
    """The expected text is what the model writes without eot under the same seed, cut row by row. As eot take an id that all rows
    write, at different times, and that row 0 does not write twice in a row."""
    model = make(block_size=200)
    idx, _, image = captions(model)
    torch.manual_seed(3)
    free = model.generate(idx[:, :1], 199, image)
    first = {i: [row[1:].tolist().index(i) + 1 for row in free] for i in range(V) if all(i in row[1:] for row in free)}
    eot, ends = next((i, ends) for i, ends in first.items() if len(set(ends)) == 3 and ends[0] < max(ends) and free[0, ends[0] + 1] != i)
    torch.manual_seed(3)
    stopped = model.generate(idx[:, :1], 199, image, eot=eot)
    assert stopped.size(1) == max(ends) + 1 < free.size(1)
    for row, expected, end in zip(stopped, free, ends):
        assert torch.equal(row[:end + 1], expected[:end + 1]) and (row[end:] == eot).all()


def test_a_prompt_that_is_eot_does_not_end_the_caption():
    model = make()
    prompt, image = torch.arange(V)[:, None], torch.randn(1, K, IMAGE_DIM)
    written = model.generate(prompt, 6, image.expand(V, -1, -1), temperature=0)
    eot = next(i for i in range(V) if i not in written[i, 1:])
    assert torch.equal(model.generate(prompt[[eot]], 6, image, temperature=0, eot=eot), written[[eot]])


def test_generate_never_exceeds_the_block():
    model = make()  # block_size 9
    idx, _, image = captions(model)
    for use_cache in (True, False):
        full = model.generate(idx, 100, image, use_cache=use_cache)
        assert full.shape == (3, 9) and torch.equal(full[:, :T], idx)
        assert torch.equal(model.generate(full, 100, image, use_cache=use_cache), full)
    assert model.generate(idx, 0, image).shape == (3, T)


@pytest.mark.parametrize("training", [True, False])
def test_generate_samples_in_eval_mode_and_leaves_the_mode_as_it_was(training):
    model = make(dropout=0.5).train(training)
    idx, _, image = captions(model)
    expected = make(dropout=0.5).generate(idx[:, :2], 6, image, temperature=0)
    assert torch.equal(model.generate(idx[:, :2], 6, image, temperature=0), expected)
    assert all(module.training == training for module in model.modules())


@pytest.mark.parametrize("tie_weights", [True, False])
def test_padded_ids_are_never_written_and_take_no_probability(tie_weights):
    """50 ids live in 64 rows. Rows 50 and 51 get huge opposite values, so one of them beats every real id at every position."""
    model = make(tie_weights=tie_weights)
    idx, targets, image = captions(model)
    logits, _ = model(idx, image=image)
    _, loss = model(idx, targets, image)
    with torch.no_grad():
        model.head.weight[50], model.head.weight[51] = 1000.0, -1000.0
        model.head.weight[50, 0], model.head.weight[51, 0] = 3000.0, -3000.0
        raw = model.head(model.trunk(idx, image)[0])
    assert raw.size(-1) == 64 and (raw.argmax(-1) >= V).all()
    same(model(idx, image=image)[0], logits)
    same(model(idx, targets, image)[1], loss)
    for temperature in (0, 1.0, 50.0):
        assert model.generate(idx[:, :1].repeat(50, 1), 8, image.repeat(50, 1, 1), temperature=temperature).max() < V


# ----------------------------------------------------------------------------------------------------------------------
# the language loss

@every(VARIANTS)
def test_loss_is_cross_entropy_over_real_targets(variant):
    """The mean of -log p(target) over the 7 + 6 + 5 real targets; logits are not returned beside it."""
    model = make(**variant)
    idx, targets, image = captions(model)
    for picture in (image, None):
        log_p = model(idx, image=picture)[0].log_softmax(-1)
        each = [-log_p[b, t, targets[b, t]] for b in range(3) for t in range(T) if targets[b, t] != -1]
        assert len(each) == 18
        logits, loss = model(idx, targets, picture)
        assert logits is None
        same(loss, sum(each) / 18)
        assert model.loss_parts.keys() == {"language"}


def test_token_losses_are_one_number_per_target():
    model = make()
    idx, targets, image = captions(model)
    losses, gates = model.token_losses(idx, targets, image)
    logits, _, expected_gates = model(idx, image=image, return_gates=True)
    for b in range(3):
        for t in range(T):
            real = targets[b, t] != -1
            same(losses[b, t], -logits[b, t].log_softmax(-1)[targets[b, t]] if real else torch.tensor(0.0))
    same(gates, expected_gates)
    assert losses.shape == (3, T) and losses.dtype == torch.float32


def test_only_real_targets_reach_the_head_and_only_one_chunk_at_a_time(monkeypatch):
    """No (B,T,V) tensor in training, forward or backward: of 21 positions 18 have a target, which meet the vocabulary in chunks of 5."""
    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            products.append(tuple(out.shape)) if func is torch.ops.aten.mm.default else None
            every.update(tuple(x.shape) for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, torch.Tensor))
            return out
    model = make().train()
    V = model.config.vocab_size
    idx, targets, image = captions(model)
    monkeypatch.setattr(HeadLoss, "CHUNK", 5)
    products, every = [], set()
    with Shapes():
        model(idx, targets, image)[1].backward()
    assert [shape for shape in products if shape[-1] == V] == [(5, V), (5, V), (5, V), (3, V)]
    wide = {shape for shape in every if shape[-1:] == (V,) and len(shape) > 1}
    assert wide == {(5, V), (3, V), (model.config.n_embd, V)}  # the last is the matrix itself, transposed

    rows = []
    model.head.register_forward_hook(lambda head, inputs, output: rows.append(tuple(output.shape)))
    model.token_losses(idx, targets, image)
    assert rows == [(18, 64)]


@every([dict(chunk=1), dict(chunk=7), dict(chunk=20), dict(chunk=21), dict(chunk=500)])
def test_chunked_head_is_cross_entropy(monkeypatch, variant):
    """The weighted sum, every loss, and the gradients of both factors, against F.cross_entropy of all logits at once; the factor 3 stands for
    whatever the loss is multiplied with afterwards."""
    monkeypatch.setattr(HeadLoss, "CHUNK", variant["chunk"])
    torch.manual_seed(1)
    h, weight, scale = torch.randn(20, 6, requires_grad=True), torch.randn(11, 6, requires_grad=True), torch.rand(20)
    targets = torch.randint(11, (20,))
    plain = F.cross_entropy(h @ weight.T, targets, reduction="none")
    expected = torch.autograd.grad(3 * (plain * scale).sum(), (h, weight))
    loss, losses = HeadLoss.apply(h, weight, targets, scale)
    same(loss, (plain * scale).sum())
    same(losses, plain)
    assert not losses.requires_grad
    for mine, reference in zip(torch.autograd.grad(3 * loss, (h, weight)), expected):
        same(mine, reference)


@every(VARIANTS)
def test_right_padding_changes_nothing(variant):
    """Two more columns of any ids with target -1: same losses (contrastive too), same logits and gates at the real positions."""
    model = make(**variant)
    idx, targets, image = captions(model)
    padded, padded_targets = F.pad(idx, (0, 2), value=17), F.pad(targets, (0, 2), value=-1)
    logits, _, gates = model(idx, image=image, return_gates=True)
    padded_logits, _, padded_gates = model(padded, image=image, return_gates=True)
    same(padded_logits[:, :T], logits)
    same(padded_gates[..., :T], gates)
    model.train("hard" not in variant.get("gate", ""))  # dropout is 0; the noise of a hard gate depends on the shape
    same(model(padded, padded_targets, image)[1], model(idx, targets, image)[1])


@pytest.mark.parametrize("gate", ["soft-feature", "soft-token", "none"])
def test_accumulated_micro_batches_are_the_big_batch(gate):
    """Micro-batches weighted by their share of real targets, 7/18, 6/18 and 5/18, add up to the gradient of the batch of 18."""
    model = make(gate=gate).train()
    idx, targets, image = captions(model)
    model(idx, targets, image)[1].backward()
    big = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    for row in range(3):
        part = slice(row, row + 1)
        (model(idx[part], targets[part], image[part])[1] * (7 - row) / 18).backward()
    for n, p in model.named_parameters():
        same(p.grad, big[n])


# ----------------------------------------------------------------------------------------------------------------------
# token elision: only the kept positions are run

KEEP = torch.tensor([[0, 2, 3, 6], [1, 2, 4, 6], [0, 1, 2, 6]])  # position 6 is padding in rows 1 and 2


def run_kept(model, idx, targets, image, keep):
    """Logits, gates and gradients of the language loss when only keep is run."""
    model.zero_grad()
    logits, _, gates = model(idx, image=image, keep=keep, return_gates=True)
    loss = model(idx, targets, image, keep)[1]
    loss.backward()
    return logits, gates, loss, [p.grad.clone() for p in model.parameters() if p.grad is not None]


@every(VARIANTS)
def test_kept_tokens_are_the_full_forward_with_the_others_hidden(variant):
    """Reference: all T positions are run, and an explicit mask hides every dropped token from everybody."""
    model = make(**variant)
    idx, targets, image = captions(model)
    kept = torch.zeros(3, T, dtype=torch.bool).scatter(1, KEEP, True)
    mask = torch.ones(T, T, dtype=torch.bool).tril() & (kept[:, None] | torch.eye(T, dtype=torch.bool))  # a dropped token sees itself: no empty softmax
    mask = torch.where(kept[:, :, None], mask & kept[:, None], mask)
    logits, gates, loss, gradients = run_kept(model, idx, targets, image, KEEP)
    model.zero_grad()
    h, all_gates, _, _ = model.trunk(idx, image, mask=mask)
    expected = model.logits(h)
    same(logits, expected[kept].view(3, 4, V), 1e-4)
    same(gates, all_gates[:, kept].view(-1, 3, 4), 1e-4)
    real = kept & (targets != -1)
    reference = F.cross_entropy(expected[real], targets[real])
    same(loss, reference)
    reference.backward()
    for gradient, p in zip(gradients, [p for p in model.parameters() if p.grad is not None], strict=True):
        same(gradient, p.grad, 1e-4)


@every(VARIANTS)
def test_keeping_everything_is_the_dense_forward(variant):
    model = make(**variant)
    idx, targets, image = captions(model)
    logits, gates, loss, _ = run_kept(model, idx, targets, image, torch.arange(T).repeat(3, 1))
    same(logits, model(idx, image=image)[0])
    same(gates, model(idx, image=image, return_gates=True)[2])
    same(loss, model(idx, targets, image)[1])


@every([v for v in VARIANTS if v.get("modulate_at") != "image"])  # there the mean over the text so far is of kept tokens only
def test_visible_tokens_are_seen_as_they_were_embedded(variant):
    """Reference: all T positions are run, and after every block each dropped token is put back to what it was before the first."""
    model = make(**variant)
    idx, targets, image = captions(model)
    kept = torch.zeros(3, T, dtype=torch.bool).scatter(1, KEEP, True)
    embedded = h = model.token_embedding(idx) + model.position_embedding(torch.arange(T))
    encoded = model.image_encoder(image)
    for block in model.blocks:
        h = torch.where(kept[..., None], block(h, encoded)[0], embedded)
    expected = model.logits(model.ln(h))
    same(model(idx, image=image, keep=KEEP, visible=True)[0], expected[kept].view(3, 4, V), 1e-4)
    real = kept & (targets != -1)
    reference = F.cross_entropy(expected[real], targets[real])
    loss = model(idx, targets, image, KEEP, visible=True)[1]
    same(loss, reference)
    for a, b in zip(*(torch.autograd.grad(x, [model.token_embedding.weight, model.blocks[0].attn.key_value.weight]) for x in (loss, reference))):
        same(a, b, 1e-4)
    same(model(idx, image=image, keep=torch.arange(T).repeat(3, 1), visible=True)[0], model(idx, image=image)[0])


@every([v for v in VARIANTS if v.get("modulate_at") == "image"])
def test_visible_tokens_come_before(variant):
    """Causality: a token after a kept one changes nothing for it, one before it does, dropped or not."""
    model = make(**variant)
    idx, _, image = captions(model)
    for changed in 1, 4:  # both dropped in row 0: [0, 2, 3, 6]
        other = idx.clone()
        other[0, changed] = (idx[0, changed] + 1) % V
        change = (model(other, image=image, keep=KEEP, visible=True)[0] - model(idx, image=image, keep=KEEP, visible=True)[0])[0].abs().amax(dim=-1)
        assert (change > 1e-4).tolist() == [position > changed for position in KEEP[0].tolist()]


def test_kept_tokens_keep_their_positions():
    """The same two tokens at positions 1 and 3 or 0 and 1 are different texts; the token that stands between them is not seen."""
    model = make()
    idx, _, image = captions(model)
    far, near = model(idx, image=image, keep=torch.tensor([[1, 3]] * 3))[0], model(idx[:, [1, 3]], image=image)[0]
    assert (far - near).abs().max() > 1e-2
    idx[:, 2] = (idx[:, 2] + 1) % V
    same(far, model(idx, image=image, keep=torch.tensor([[1, 3]] * 3))[0], 0)


@pytest.mark.parametrize("contrastive", ["clip", "lcg"])
def test_contrastive_losses_take_the_kept_tokens_only(contrastive):
    model = make(contrastive=contrastive).train()
    idx, targets, image = captions(model)
    model(idx, targets, image, KEEP)
    kept = model.loss_parts["contrastive"]
    other = idx.clone()
    other[0, 1] = (idx[0, 1] + 1) % V  # dropped: changes nothing
    model(other, targets, image, KEEP)
    same(kept, model.loss_parts["contrastive"], 0)
    other = idx.clone()
    other[0, 2] = (idx[0, 2] + 1) % V
    model(other, targets, image, KEEP)
    assert (kept - model.loss_parts["contrastive"]).abs() > 1e-4


def test_dropped_tokens_never_reach_a_block_or_the_head():
    """Every matrix of the decoder sees B * k rows, the head those of them that have a target, the image encoder the image tokens."""
    model, rows = make(vocab_size=100), {}
    idx, targets, image = captions(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, inputs, output, name=name: rows.update({name: inputs[0].numel() // module.in_features}))
    model(idx, targets, image, KEEP)
    assert len(model.target_losses) == 4 + 3 + 3
    assert {n for name, n in rows.items() if name.startswith("blocks") and "cross.key_value" not in name} == {3 * 4}
    assert {n for name, n in rows.items() if name.startswith("image_encoder") or "cross.key_value" in name} == {3 * K}


def test_weights_of_the_kept_losses():
    model = make()
    idx, targets, image = captions(model)
    weight = torch.arange(12.0).view(3, 4)
    prefix = torch.arange(4).repeat(3, 1)
    losses = model.token_losses(idx[:, :4], targets[:, :4], image)[0]
    same(model(idx, targets, image, prefix, weight=weight)[1], (weight * losses).sum())
    same(model.target_losses, losses[targets[:, :4] != -1])


def test_keep_best_by_hand():
    """Row 0: the scores 9, 8, 7 stand at 4, 1, 5. Row 1 has two real tokens: padding is kept only because none is left, whatever its score."""
    score = torch.tensor([[1.0, 8, 3, 2, 9, 7], [1, 2, 99, 99, 99, 99]])
    real = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    keep = keep_best(score, real, 3)
    assert keep[0].tolist() == [1, 4, 5] and keep[1, :2].tolist() == [0, 1] and keep[1, 2] >= 2 and keep.shape == (2, 3)


def test_the_score_of_a_target_decides_about_the_input_before_it():
    """"<eot> a red ball": only "red" is hard. Its target stands at position 1, whose input is "a": that is what is run, and what learns "red"."""
    eot, a, red, ball = range(4)
    idx, targets = torch.tensor([[eot, a, red]]), torch.tensor([[a, red, ball]])
    keep = keep_best(torch.tensor([[0.1, 5.0, 0.2]]), targets != -1, 1)
    assert keep.tolist() == [[1]] and idx.gather(1, keep).tolist() == [[a]] and targets.gather(1, keep).tolist() == [[red]]


def test_priority_sampling_is_unbiased():
    """Weighted sums over what was drawn average to the plain sum; without weights they would favour the hard tokens."""
    torch.manual_seed(0)
    score, loss = torch.tensor([[4.0, 2, 1, 1, 0.5, 0.1]]).repeat(40000, 1), torch.tensor([[3.0, 1, 2, 0.5, 4, 1]]).repeat(40000, 1)
    real = torch.ones_like(score, dtype=torch.bool)
    real[:, 5] = False
    keep, weight = keep_sampled(score, real, 3)
    drawn = (weight * loss.gather(1, keep)).sum(dim=1)
    assert abs(drawn.mean().item() - 10.5) < 4 * drawn.std().item() / 200  # 3 + 1 + 2 + 0.5 + 4, without the padding
    assert (keep[:, 1:] > keep[:, :-1]).all() and (keep < 5).all() and (weight >= 1).all()
    assert (keep == 0).any(dim=1).float().mean() > 0.9 > 0.5 > (keep == 4).any(dim=1).float().mean()
    everything, ones = keep_sampled(score[:2], real[:2], 6)
    assert everything.tolist() == [list(range(6))] * 2 and (ones == 1).all()


# ----------------------------------------------------------------------------------------------------------------------
# contrastive losses, against slow loops

def cosine(a, b):
    return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(x * x for x in b))


def slow_clip(text, image, scale):
    score = [[math.exp(scale * cosine(t, i)) for i in image] for t in text]
    total = 0
    for b in range(len(text)):
        total -= math.log(score[b][b] / sum(score[b])) / 2  # this text among all images
        total -= math.log(score[b][b] / sum(row[b] for row in score)) / 2  # this image among all texts
    return total / len(text)


def slow_lcg(tokens, owner, image, scale):
    total = 0
    for token, mine in zip(tokens, owner):
        positive = math.exp(scale * cosine(token, image[mine]))
        images = sum(math.exp(scale * cosine(token, other)) for other in image)
        others = sum(math.exp(scale * cosine(other, image[mine])) for other, its in zip(tokens, owner) if its != mine)
        total -= math.log(positive / images) / 2  # this token must find its image among all images
        total -= math.log(positive / (positive + others)) / 2  # its image must find it among the tokens of the other captions
    return total / len(tokens)


@pytest.mark.parametrize("scale", [1.0, 1 / 0.07])
def test_clip_loss(scale):
    """Worked value: texts e1, e2 with images e1, e2 at scale s. Own score e^s, the other one e^0: -log(e^s / (e^s + 1))."""
    same(clip_loss(torch.eye(2), 5 * torch.eye(2), scale), torch.tensor(math.log(1 + math.exp(-scale))))
    torch.manual_seed(0)
    text, image = torch.randn(2, 4, 5)
    same(clip_loss(text, image, scale).item(), slow_clip(text.tolist(), image.tolist(), scale))


@pytest.mark.parametrize("scale", [1.0, 1 / 0.07])
def test_lcg_loss(scale):
    """Worked value: caption 0 is the tokens e1, e1, caption 1 the token e2, images e1, e2. Among images every token has one
    wrong choice, log(1 + e^-s). Among tokens, those of caption 0 have one rival (the twin is no rival), e2 has two."""
    one, two = math.log(1 + math.exp(-scale)), math.log(1 + 2 * math.exp(-scale))
    loss = lcg_loss(torch.eye(2)[[0, 0, 1]], torch.tensor([0, 0, 1]), torch.eye(2), scale)
    same(loss.item(), (3 * one + (2 * one + two)) / 3 / 2)
    torch.manual_seed(0)
    tokens, owner, image = torch.randn(9, 5), torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2]), torch.randn(3, 5)
    same(lcg_loss(tokens, owner, image, scale).item(), slow_lcg(tokens.tolist(), owner.tolist(), image.tolist(), scale))


@pytest.mark.parametrize("contrastive", ["clip", "lcg"])
def test_a_batch_of_one_caption_has_no_negatives(contrastive):
    """Nothing to tell apart: the loss is 0, and its gradients are finite."""
    model = make(contrastive=contrastive).train()
    idx, targets, image = captions(model, B=1)
    model(idx, targets, image)[1].backward()
    assert abs(model.loss_parts["contrastive"].item()) < 1e-6
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("weight", [1.0, 0.3, 0])
@pytest.mark.parametrize("contrastive", ["clip", "lcg"])
def test_training_adds_the_weighted_contrastive_loss(contrastive, weight):
    model = make(contrastive=contrastive, contrastive_weight=weight)
    idx, targets, image = captions(model)
    _, language = model(idx, targets, image)
    assert model.loss_parts.keys() == {"language"}  # evaluation: the language loss only
    model.train()
    _, total = model(idx, targets, image)
    parts = model.loss_parts
    assert parts["contrastive"] > 0.1 and not parts["contrastive"].requires_grad and not parts["language"].requires_grad
    same(parts["language"], language)
    same(total, language + weight * parts["contrastive"])
    _, text_only = model(idx, targets)
    same(text_only, model.loss_parts["language"])  # no image, nothing to compare
    assert model.loss_parts.keys() == {"language"}


@pytest.mark.parametrize("log_scale, scale", [(0.5, math.exp(0.5)), (9.0, 100.0)])
def test_what_clip_compares(log_scale, scale):
    """The mean embedding of the words that have a target with the mean image token; the learned scale is clamped at 100."""
    model = make(contrastive="clip").train()
    idx, targets, image = captions(model)
    nn.init.constant_(model.log_scale, log_scale)
    model(idx, targets, image)
    text = [model.token_embedding.weight[idx[b, :T - b]].mean(0).tolist() for b in range(3)]  # rows have 7, 6 and 5 real words
    pooled = model.image_encoder(image).mean(1)
    same(model.loss_parts["contrastive"].item(), slow_clip(text, pooled.tolist(), scale), 1e-4)


@pytest.mark.parametrize("log_scale, scale", [(0.5, math.exp(0.5)), (9.0, 100.0)])
def test_what_lcg_compares(log_scale, scale):
    """What block 0 makes of each word that has a target, with the mean image token."""
    model = make(contrastive="lcg").train()
    idx, targets, image = captions(model)
    nn.init.constant_(model.log_scale, log_scale)
    model(idx, targets, image)
    h, _ = model.blocks[0](model.token_embedding(idx) + model.position_embedding.weight[:T])
    tokens, owner = zip(*[(h[b, t].tolist(), b) for b in range(3) for t in range(T - b)])
    pooled = model.image_encoder(image).mean(1)
    same(model.loss_parts["contrastive"].item(), slow_lcg(tokens, owner, pooled.tolist(), scale), 1e-4)


def test_contrastive_scale_starts_as_in_clip():
    assert abs(make(fresh=True, contrastive="clip").log_scale.exp().item() - 1 / 0.07) < 1e-4


def test_lcg_block_0_has_not_seen_the_image():
    """Otherwise telling the images apart would be a matter of copying."""
    for contrastive, seen in (("lcg", False), ("clip", True)):
        model = make(contrastive=contrastive)
        idx, _, image = captions(model)
        _, gates, _, first = model.trunk(idx, image)
        _, _, _, other = model.trunk(idx, torch.randn_like(image))
        assert torch.equal(first, other) != seen
        assert (gates[0] == 1).all().item() != seen and (gates[1] < 1).all()
        assert hasattr(model.blocks[0], "cross") == seen and hasattr(model.blocks[1], "cross")


# ----------------------------------------------------------------------------------------------------------------------
# training

def has_no_say(variant, n):
    """With one image token attention to it ignores its query. Without a gate the text has no other way into the image path, unless
    it modulates the image (and fresh FiLM does not yet)."""
    if variant["n_image_token"] > 1:
        return False
    ungated, place = variant.get("gate") == "none" and n.startswith("blocks."), variant.get("modulate_at")
    return (".query." in n and (".cross." in n or "image_encoder" in n) or ungated and ".condition." in n and place == "text"
            or ungated and ".ln2." in n and not (variant["modulation"] == "dyintra" and place == "image"))


@every(VARIANTS + [dict(contrastive=c, n_image_token=k, gate="hard-token", channel_attention=True) for c in CONTRASTIVES for k in (1, 4)])
def test_every_parameter_learns_from_one_caption_batch(variant):
    """A fresh model: all gradients are there and finite, and none is 0 (or was never computed) but those of parameters that have no say."""
    model = make(fresh=True, n_embd=32, **variant).train()
    idx, targets, image = captions(model, B=4)
    model(idx, targets, image)[1].backward()
    for n, p in model.named_parameters():
        assert p.grad is None or p.grad.isfinite().all(), n
        assert (p.grad is None or p.grad.abs().max().item() < 1e-6) == has_no_say(variant, n), n


def test_one_image_token_needs_no_query():
    """The short way for one key is the long way: one token twice, at two keys, is found by every query with any weights."""
    torch.manual_seed(1)
    attn = Attention(tiny())
    x, memory = torch.randn(3, T, 16), torch.randn(3, 1, 16)
    same(attn(x, memory=memory), attn(x, memory=memory.expand(-1, 2, -1)))
    dropping = Attention(tiny(dropout=0.5)).train()  # drops the key itself for some queries, so that the short way would not do
    assert dropping(x, memory=memory).std(dim=1).max() > 0.01


@pytest.mark.parametrize("gate", GATES)
def test_a_word_that_only_the_image_tells_is_learned(gate):
    """Two captions differ in their last word and in their image. Text alone cannot get below log 2 at that word."""
    model = make(fresh=True, gate=gate, n_embd=32).train()
    idx = torch.tensor([[1, 2, 3], [1, 2, 3]])
    targets = torch.tensor([[-1, -1, 10], [-1, -1, 11]])
    image = torch.randn(2, K, IMAGE_DIM)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(40):
        model(idx, targets, image)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    assert model(idx, targets, image)[1] < 0.1
    assert model(idx, targets)[1] > math.log(2) - 1e-5


# ----------------------------------------------------------------------------------------------------------------------
# config

@pytest.mark.parametrize("field, value", [
    ("vocab_size", 0), ("vocab_size", -8), ("block_size", 0), ("n_layer", 0), ("n_head", 0), ("n_embd", 0), ("image_dim", 0),
    ("n_image_layer", -1), ("n_image_token", -1), ("dropout", -0.1), ("dropout", 1.0), ("dropout", math.nan), ("dropout", math.inf),
    ("contrastive_weight", -1.0), ("contrastive_weight", math.inf), ("contrastive_weight", math.nan),
    ("n_head", 3), ("n_embd", 15),  # the base is 2 heads of 8
    ("n_layer", 2.0), ("n_layer", "2"), ("n_layer", True), ("n_layer", None), ("dropout", "0"), ("dropout", True),
    ("tie_weights", 1), ("tie_weights", "yes"), ("channel_attention", 0),
    ("gate", "soft"), ("gate", None), ("modulation", "FiLM"), ("modulate_at", ""), ("image_encoder", "vit"), ("contrastive", "siglip")])
def test_impossible_config_names_the_field(field, value):
    with pytest.raises(InputError, match=rf"\b{field}\b") as error:
        tiny(**{field: value})
    assert one_line(error)


@pytest.mark.parametrize("contrastive", ["clip", "lcg"])
def test_contrastive_loss_needs_eyes(contrastive):
    with pytest.raises(InputError, match="contrastive.*n_image_token") as error:
        tiny(n_image_token=0, contrastive=contrastive)
    assert one_line(error)


def test_a_whole_number_is_a_fine_float():
    config = tiny(dropout=0, contrastive_weight=2)
    assert type(config.dropout) is float and type(config.contrastive_weight) is float


# field: (another value, the base config on which it must make a difference)
FLIPS = {
    "vocab_size": (51, {}), "block_size": (12, {}), "n_layer": (3, {}), "n_head": (4, {}), "n_embd": (32, {}), "dropout": (0.5, {}),
    "tie_weights": (False, {}), "gate": ("hard-feature", {}), "modulation": ("dyintra", {}),
    "modulate_at": ("text", dict(modulation="dyintra")), "channel_attention": (True, {}), "image_encoder": ("mlp", {}),
    "n_image_layer": (2, {}), "n_image_token": (1, {}), "image_dim": (5, {}), "contrastive": ("lcg", dict(contrastive="clip")),
    "contrastive_weight": (0.3, dict(contrastive="clip")),
}


def fingerprint(**changes):
    """Parameter names and shapes, and the training loss of a fresh model, all under the same seed."""
    model = make(fresh=True, **changes).train()
    idx, targets, image = captions(model)
    return [(n, p.shape) for n, p in model.named_parameters()], model(idx, targets, image)[1].item()


@pytest.mark.parametrize("field", [f.name for f in fields(GateVLMConfig)])
def test_every_config_field_changes_something(field):
    value, base = FLIPS[field]  # a KeyError here: a new field has no line in the table yet
    assert fingerprint(**base) == fingerprint(**base)
    assert fingerprint(**base) != fingerprint(**{**base, field: value})


@pytest.mark.parametrize("field, base, values", [
    ("gate", {}, GATES), ("modulation", {}, MODULATIONS), ("modulate_at", dict(modulation="dyintra"), PLACES),
    ("image_encoder", {}, IMAGE_ENCODERS), ("contrastive", {}, CONTRASTIVES)])
def test_every_choice_is_a_different_model(field, base, values):
    prints = [fingerprint(**{**base, field: value}) for value in values]
    assert all(a != b for i, a in enumerate(prints) for b in prints[:i])
    assert {f.name: f.metadata["choices"] for f in fields(GateVLMConfig)}[field] == values


def test_the_paper_has_127_million_parameters():
    with torch.device("meta"):  # shapes without memory
        assert 126.5e6 < GateVLM(GateVLMConfig()).n_parameter() < 128.5e6


def test_a_tied_matrix_counts_once():
    tied, untied = make(), make(tie_weights=False)
    assert untied.n_parameter() - tied.n_parameter() == 64 * 16  # 50 ids in 64 rows, 16 wide
    assert tied.head.weight is tied.token_embedding.weight and untied.head.weight is not untied.token_embedding.weight


# ----------------------------------------------------------------------------------------------------------------------
# save and load

def checkpoint_of(model):
    return {"model": model.state_dict(), "model_config": asdict(model.config), "step": 7}


@every([dict(), dict(gate="hard-token", modulation="film", modulate_at="image", channel_attention=True), dict(contrastive="lcg"),
        dict(tie_weights=False), dict(n_image_token=0)])
def test_a_saved_model_comes_back_the_same(variant, tmp_path):
    model = make(**variant)
    idx, targets, image = captions(model)
    image = image if model.config.n_image_token else None
    if image is not None:
        model.image_encoder.mean.fill_(0.5)  # the statistics of the features travel with the weights
    save_checkpoint(tmp_path / "best.pt", checkpoint_of(model))
    loaded = load_model(str(tmp_path))
    assert loaded.config == model.config and not loaded.training
    same(loaded(idx, image=image)[0], model(idx, image=image)[0], 0)
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 7
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]  # nothing half-written is left behind


def test_load_model_takes_the_file_name(tmp_path):
    save_checkpoint(tmp_path / "last.pt", checkpoint_of(make()))
    assert load_model(tmp_path, "last.pt").config == tiny()


def test_a_crash_while_saving_leaves_the_old_file(tmp_path):
    path = tmp_path / "best.pt"
    save_checkpoint(path, checkpoint_of(make()))
    with pytest.raises(Exception):
        save_checkpoint(path, {"model": {}, "model_config": lambda: "this cannot be saved"})
    assert load_checkpoint(path)["step"] == 7


def refused(tmp_path, match):
    """load_checkpoint and load_model both refuse best.pt with one line that names the file."""
    for load in (lambda: load_checkpoint(tmp_path / "best.pt"), lambda: load_model(tmp_path)):
        with pytest.raises(InputError, match=match) as error:
            load()
        assert one_line(error) and "best.pt" in str(error.value)


def test_missing_checkpoint(tmp_path):
    refused(tmp_path, "no such checkpoint")


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.99])
def test_truncated_checkpoint(share, tmp_path):
    path = tmp_path / "best.pt"
    save_checkpoint(path, checkpoint_of(make()))
    whole = path.read_bytes()
    path.write_bytes(whole[:int(share * len(whole))])
    refused(tmp_path, "not a readable checkpoint")


@pytest.mark.parametrize("other", [{"weights": 1}, {"model": {}}, [1, 2], torch.zeros(3)], ids=str)
def test_a_file_of_something_else(other, tmp_path):
    save_checkpoint(tmp_path / "best.pt", other)
    refused(tmp_path, "not a gatevlm checkpoint")


def test_a_file_that_is_text(tmp_path):
    (tmp_path / "best.pt").write_text("hello\nworld\n")
    refused(tmp_path, "not a readable checkpoint")


def test_code_in_a_checkpoint_is_never_run(tmp_path):
    """A pickle may ask for any call; this one opens a file for writing, as the last lines show."""
    trace = tmp_path / "trace"

    class Stranger:
        def __reduce__(self):
            return io.open, (str(trace), "w")

    torch.save({"model": Stranger(), "model_config": {}}, tmp_path / "best.pt")
    refused(tmp_path, "not a readable checkpoint")
    assert not trace.exists()
    torch.load(tmp_path / "best.pt", weights_only=False)
    assert trace.exists()


@pytest.mark.parametrize("damage", [
    lambda c: c["model_config"].update(n_eyes=2), lambda c: c["model_config"].update(gate="sharp"), lambda c: c["model"].pop("ln.weight"),
    lambda c: c["model"].update(more=torch.zeros(1)), lambda c: c["model_config"].update(n_embd=32), lambda c: c.update(model_config=3)],
    ids=["unknown field", "unknown value", "missing weight", "extra weight", "other width", "no config"])
def test_a_checkpoint_of_another_version(damage, tmp_path):
    checkpoint = checkpoint_of(make())
    damage(checkpoint)
    save_checkpoint(tmp_path / "best.pt", checkpoint)
    with pytest.raises(InputError, match="another version") as error:
        load_model(tmp_path)
    assert one_line(error) and "best.pt" in str(error.value)
