"""
What gatevlm.py promises. Every variant of the model is causal, takes no image path on text, and equals
reference(), the forward pass written once more, slowly. Then gates, losses, generate, wrong input, and files.

Models are tiny and seeded. Their weights are random, as a fresh model hides mistakes: its biases are zero,
its FiLM leaks nothing, its gates stand near one half.
"""
import math
import os
import random
from dataclasses import asdict
from itertools import product

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from gatevlm import GATES, Attention, Gate, GateVLM, GateVLMConfig, InputError, Output, clip_loss, lcg_loss
from gatevlm import load_checkpoint, load_model, pick_device, save_checkpoint

B, T, V, D, K, DIM = 3, 6, 23, 32, 4, 5
ALL, KEEP = torch.arange(T).repeat(B, 1), torch.tensor([[0, 2, 3], [1, 2, 4], [0, 1, 5]])  # the 5 is padding
MODULATED = [("none", "cross"), *product(("film", "dyintra"), ("cross", "text", "image"))]
draw = random.Random(1).choice  # all of gate, modulation and K, each with a draw of the other switches
VARIANTS = [dict(gate=gate, modulation=modulation, modulate_at=place, n_image_token=k,
                 contrastive=draw(("none", "clip", "lcg")), tie_weights=draw((False, True)),
                 image_encoder=draw(("transformer", "mlp", "none")), channel_attention=draw((False, True)))
            for gate, (modulation, place), k in product(GATES, MODULATED, (1, K))]
VARIANTS.append(dict(gate="soft-feature", n_image_token=0))
each = pytest.mark.parametrize
every_variant = each("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))

def tiny(**changes):
    size = dict(vocab_size=V, block_size=9, n_layer=2, n_head=2, n_embd=D, n_image_layer=1, image_dim=DIM)
    return GateVLMConfig(**size | dict(n_image_token=K, dropout=0.0) | changes)

def make(fresh=False, train=False, **changes):
    torch.manual_seed(0)
    model = GateVLM(tiny(**changes)).train(train)
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        if not fresh and not name.endswith("temperature"):
            x.data += 0.3 * (torch.rand_like(x) if name.endswith("std") else torch.randn_like(x))
    return model

def scene(rows=B, **changes):
    """Model, idx (B,T), image (B,K,image_dim) or None, targets (B,T), of which row b lacks the last b."""
    model = make(**changes)
    torch.manual_seed(1)
    idx, targets = torch.randint(V, (2, rows, T))
    targets[torch.arange(T) >= T - torch.arange(rows)[:, None]] = -1
    k = model.config.n_image_token
    return model, idx, torch.randn(rows, k, DIM) if k else None, targets

def same(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)

def refused(call, match):
    with pytest.raises(InputError, match=match) as error:
        call()
    assert "\n" not in str(error.value)

# ---- the forward pass, from the equations and with nothing of the model but its config c and weights w
def linear(w, name, x):
    return x @ w[name + ".weight"].T + w[name + ".bias"]

def norm(w, name, x):
    return F.layer_norm(x, (D,), w[name + ".weight"], w[name + ".bias"])

def mlp(w, name, x):
    return linear(w, name + ".2", F.gelu(linear(w, name + ".0", x), approximate="tanh"))

def attention(w, name, x, memory, allowed=torch.tensor(True)):
    qkv, y = [linear(w, name + ".query", x), *linear(w, name + ".key_value", memory).split(D, dim=1)], []
    for q, k, v in zip(*(x.split(D // 2, dim=1) for x in qkv)):  # 2 heads
        score = (q @ k.T / math.sqrt(D // 2)).masked_fill(~allowed, -math.inf)
        y.append(score.softmax(dim=1) @ v)
    return linear(w, name + ".proj", torch.cat(y, dim=1))

def modulate(c, w, name, x, condition):
    y = linear(w, name + ".modulate.linear", condition)
    return x * (1 + y[:D]) + y[D:] if c.modulation == "film" else x * (1 + torch.sigmoid(y))

def look(c, w, name, x, image, run):
    place = c.modulation != "none" and c.modulate_at
    if place == "text":
        x = modulate(c, w, name, x, image.mean(0))
    v = attention(w, name + ".cross", x, image)
    if place == "cross":
        v = modulate(c, w, name, v, image.mean(0))
    if place == "image":  # by the mean of the text so far, as much of it as is run
        for t in range(T):
            memory = modulate(c, w, name, image, x[:t + 1][run[:t + 1]].mean(0))
            v[t] = attention(w, name + ".cross", x[t:t + 1], memory)
    if c.gate == "none":
        return v, torch.ones(T)
    g = linear(w, name + ".gate.linear", torch.cat([x, v], dim=1))
    g = torch.sigmoid(g) if c.gate.startswith("soft") else (g > 0).float()
    return norm(w, name + ".ln_fused", g * x + (1 - g) * v), g.mean(1)

def encode(c, w, image, e="image_encoder"):
    x, project = (image - w[e + ".mean"]) / w[e + ".std"], mlp if c.image_encoder == "mlp" else linear
    x = project(w, e + ".proj", x) + w[e + ".position"]
    if c.image_encoder == "transformer":
        text = norm(w, e + ".layers.0.ln1", x)
        x = x + attention(w, e + ".layers.0.attn", text, text)
        x = x + mlp(w, e + ".layers.0.mlp", norm(w, e + ".layers.0.ln2", x))
    x = norm(w, e + ".ln", x)
    if c.channel_attention:
        squeezed = linear(w, e + ".channels.0", x.mean(0))[:D // 16].clamp(min=0)
        x = x * torch.sigmoid(linear(w, e + ".channels.2", squeezed))
    return x

@torch.no_grad()
def reference(model, idx, image, targets, keep, visible):
    """One caption: idx (T,), image (K,image_dim), targets (T,), keep (k,); other positions are seen by nobody
    or, if visible, as they were embedded. Logits, losses, gates, output of block 0; mean image token."""
    c, w, run = model.config, model.state_dict(), torch.zeros(T).bool().scatter(0, keep, True)
    image = None if image is None else encode(c, w, image)
    embedded = h = w["token_embedding.weight"][idx] + w["position_embedding.weight"][:T]
    allowed, outputs, gates = torch.ones(T, T).tril().bool() & (run | visible), [], []
    for i in range(c.n_layer):
        name, g = f"blocks.{i}", torch.ones(T)
        x = norm(w, name + ".ln1", h)
        h = h + attention(w, name + ".attn", x, x, allowed)
        if image is not None and not (i == 0 and c.contrastive == "lcg"):
            seen, g = look(c, w, name + ".look", norm(w, name + ".look.ln", h), image, run)
            h = h + seen
        h = torch.where(run[:, None], h + mlp(w, name + ".mlp", norm(w, name + ".ln2", h)), embedded)
        outputs.append(h), gates.append(g)
    logits = norm(w, "ln", h) @ w["head.weight"].T
    losses = -logits.log_softmax(dim=1)[range(T), targets] * (targets != -1)
    pooled = torch.zeros(D) if image is None else image.mean(0)
    return logits[keep], losses[keep], torch.stack(gates, dim=1)[keep], outputs[0][keep], pooled

def references(model, idx, image, targets, keep, visible=False):
    rows = zip(idx, [None] * B if image is None else image, targets, keep)
    return [torch.stack(x) for x in zip(*(reference(model, *row, visible) for row in rows))]

@every_variant
def test_the_forward_pass_is_the_equation(variant):
    """Dense, and with tokens that are gone (no other sees them; positions stay those of the whole text) or
    visible (seen as they were embedded). The loss is 0 where there is no target."""
    model, *batch = scene(**variant)
    for keep, visible in (None, False), (KEEP, False), (KEEP, True):
        out = model(*batch, keep, visible)
        expected = references(model, *batch, ALL if keep is None else keep, visible)
        for a, b in zip((out.logits, out.losses, out.gates.movedim(0, -1)), expected):
            same(a, b)

# ---- invariants of every variant
@torch.no_grad()
@every_variant
def test_a_token_changes_no_logit_before_it(variant):
    model, idx, image, _ = scene(rows=T, dropout=0.2, **variant)
    other = (idx + torch.eye(T, dtype=torch.long)) % V  # row t differs in token t
    for training in False, True:
        logits = []
        for x in idx, other:
            torch.manual_seed(2)  # the same dropout and noise of hard gates
            logits.append(model.train(training)(x, image).logits)
        change = (logits[1] - logits[0]).abs().amax(dim=-1)  # (row, position)
        assert change.tril(-1).max() < 1e-5 and change.diagonal().min() > 1e-3

@torch.no_grad()
@every_variant
def test_a_text_batch_takes_no_image_path(variant):
    """What touches a nan becomes one, as a caption batch does."""
    model, idx, image, _ = scene(**variant)
    before = model(idx)
    for name, p in model.named_parameters():
        if "image_encoder" in name or ".look." in name:
            p.fill_(math.nan)
    assert torch.equal(model(idx).logits, before.logits) and (before.gates == 1).all()
    assert image is None or model(idx, image).logits.isnan().all()

@every_variant
def test_keeping_every_token_is_the_dense_forward(variant):
    model, *batch = scene(train="hard" not in variant["gate"], **variant)  # hard gates would be noisy
    dense = model(*batch)
    for visible in False, True:
        for a, b in zip(model(*batch, ALL, visible), dense):
            same(a, b)

@every_variant
def test_padding_to_the_right_changes_nothing(variant):
    model, idx, image, targets = scene(train="hard" not in variant["gate"], **variant)
    out = model(F.pad(idx, (0, 2), value=7), image, F.pad(targets, (0, 2), value=-1))
    assert (out.losses[:, T:] == 0).all()
    out = out.logits[:, :T], out.losses[:, :T], out.gates[..., :T], out.contrastive
    for a, b in zip(out, model(idx, image, targets)):
        same(a, b)

def has_no_say(c, name):
    """With one image token attention to it ignores the query. Without a gate text then has no other way into
    the image path, unless it modulates the image, and FiLM, which starts at zero, hides even that."""
    text = ".look.ln." in name and (c.modulation != "dyintra" or c.modulate_at != "image")
    text |= ".modulate." in name and c.modulate_at == "text"
    query = ".query." in name and (".cross." in name or "image_encoder" in name)
    return c.n_image_token == 1 and (query or text and c.gate == "none")

@every_variant
def test_every_parameter_learns_from_one_caption_batch(variant):
    model, *batch = scene(rows=T, fresh=True, train=True, **variant | dict(n_embd=64))
    out = model(*batch)
    (out.losses.sum() + out.contrastive).backward()
    for name, p in model.named_parameters():
        learns = p.grad is not None and p.grad.abs().max() > 1e-6
        assert learns != has_no_say(model.config, name), name

def test_only_kept_tokens_are_computed():
    (model, *batch), shapes = scene(), []
    for module in model.blocks[0].mlp, model.blocks[1].attn.key_value, model.head:
        module.register_forward_hook(lambda module, x, y: shapes.append(x[0].shape))
    model(*batch, KEEP)
    assert shapes == [(B, 3, D)] * 3

# ---- gates, attention, dropout, first values
@each("gate", GATES[:4])
def test_gate_one_is_all_language_and_gate_zero_all_vision(gate):
    """By a bias of +100 and -100. At 1 another image gives the same logits."""
    model, idx, image, _ = scene(gate=gate, n_layer=1)
    for bias, language in (100.0, True), (-100.0, False):
        nn.init.constant_(model.blocks[0].look.gate.linear.bias, bias)
        out, other = model(idx, image), model(idx, torch.randn_like(image))
        assert (out.gates == 1).all() if language else out.gates.max() < 1e-6
        assert torch.allclose(out.logits, other.logits, atol=1e-4) == language

@each("logit, temperature", [(-2.0, 1.0), (0.5, 0.3)])
def test_a_hard_gate_is_a_two_way_gumbel_softmax_and_0_or_1_in_eval(logit, temperature):
    """The quartiles are those of torch's; of 100,000 samples their standard error is below 0.003."""
    gate, nothing = Gate(tiny(gate="hard-token")), torch.zeros(100_000, D)
    nn.init.constant_(gate.linear.bias, logit), gate.temperature.fill_(temperature)
    torch.manual_seed(0)
    gumbel = F.gumbel_softmax(torch.tensor([logit, 0.0]).expand(100_000, 2), tau=temperature)[:, 0]
    for share in 0.25, 0.5, 0.75:
        same(gate(nothing, nothing).quantile(share), gumbel.quantile(share), 0.015)
    assert (gate.eval()(nothing, nothing) == (logit > 0)).all()

def test_temperature_falls_from_1_to_a_tenth_over_80_percent_and_is_saved(tmp_path):
    model = make(gate="hard-feature")
    for progress, temperature in (0, 1.0), (0.2, 0.775), (0.8, 0.1), (1, 0.1), (0.4, 0.55):
        model.anneal(progress)
        save(model, tmp_path)
        for block in *model.blocks, *load_model(tmp_path).blocks:
            assert block.look.gate.temperature.item() == pytest.approx(temperature)

@each("dropout", [0.0, 0.5])
def test_one_image_token_leaves_the_query_no_say_unless_it_is_dropped(dropout):
    torch.manual_seed(0)
    attention = Attention(tiny(dropout=dropout))
    seen = attention(torch.randn(1, 40, D), torch.randn(1, 1, D))
    seen.sum().backward()
    assert torch.equal(seen, seen[:, :1].expand_as(seen)) == (dropout == 0)
    assert (attention.query.weight.grad is None) == (dropout == 0)

def test_film_starts_as_the_identity():
    modulate = make(fresh=True, modulation="film").blocks[0].look.modulate
    x, condition = torch.randn(2, T, D)
    assert torch.equal(modulate(x, condition), x)

@each("gate", ["soft-feature", "none"])
def test_dropout_is_on_every_branch_in_training_and_nowhere_in_eval(gate):
    """With (nearly) all dropped attention is its last bias; a layer adds the bias of norm at the gate."""
    model, *batch = scene(gate=gate, dropout=1 - 1e-9)
    assert torch.equal(model(*batch).logits, make(gate=gate)(*batch).logits)
    model.train()
    x, attention = torch.randn(2, 5, D), model.blocks[0].attn
    same(attention(x, x), attention.proj.bias.expand_as(x))
    h = torch.zeros(D) if gate == "none" else sum(block.look.ln_fused.bias for block in model.blocks)
    same(model(*batch).logits, model.head(model.ln(h)).expand(B, T, V))

def test_first_values():
    """Matrices at 1 / sqrt(3 * inputs), GPT-2's 0.02 at width 768; what a layer adds to the residual stream
    is divided by sqrt(2 * n_layer) = 2; cross-attention is weighed against normalised text, 1 / sqrt(D)."""
    model = make(fresh=True, n_embd=64, vocab_size=99, block_size=99, tie_weights=False, contrastive="clip")
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            std = (3 * module.weight.size(1))**-0.5 / (2 if name.endswith(("attn.proj", "mlp.2")) else 1)
            std = 64**-0.5 if name.endswith("cross.proj") else std
            assert module.weight.std().item() == pytest.approx(std, rel=0.15), name
        assert getattr(module, "bias", None) is None or (module.bias == 0).all(), name
    assert model.image_encoder.position.std().item() == pytest.approx(0.5, rel=0.15)
    assert model.log_scale.exp().item() == pytest.approx(1 / 0.07)  # as in CLIP

def test_features_are_measured_and_a_constant_is_not_blown_up():
    """Feature 0 takes 1 and 3: deviation 1. Feature 1 is always 5: deviation 0. A thousandth of their mean,
    0.0005, is added to both, so that a later 5.001 is 2 and not infinite."""
    encoder = make(image_dim=2).image_encoder
    encoder.measure(torch.tensor([[[1.0, 5.0], [3.0, 5.0]], [[3.0, 5.0], [1.0, 5.0]]]))
    same(encoder.mean, torch.tensor([2.0, 5.0]))
    same(encoder.std, torch.tensor([1.0005, 0.0005]), 1e-7)
    encoder.measure(torch.ones(2, K, 2))
    assert (encoder.std > 0).all()

def test_the_defaults_have_127_million_parameters():
    """8192 words, 128 positions; a block: attention 4D^2 + 4D, MLP 8D^2 + 5D, two norms 4D; its look:
    attention, gate 2D^2 + D, two norms; 5 image layers; projection, position and norm of the image."""
    d, block, look = 768, 12 * 768**2 + 13 * 768, 6 * 768**2 + 9 * 768
    n = (8192 + 128) * d + 8 * (block + look) + 2 * d + 5 * block + (d * d + d) + d + 2 * d
    with torch.device("meta"):  # shapes without memory
        assert sum(p.numel() for p in GateVLM(GateVLMConfig()).parameters()) == n

# ---- contrastive losses
def slow_lcg(tokens, owner, image, scale):
    score = [[math.exp(scale * F.cosine_similarity(token, i, dim=0)) for i in image] for token in tokens]
    total = 0
    for row, mine in zip(score, owner):
        total -= math.log(row[mine] / sum(row)) / 2  # this token must find its image among all images
        others = sum(other[mine] for other, its in zip(score, owner) if its != mine)
        total -= math.log(row[mine] / (row[mine] + others)) / 2  # and the image it, among tokens of others
    return total / len(tokens)

@each("scale", [1.0, 1 / 0.07])
def test_lcg_loss(scale):
    """Caption 0 is the tokens e1, e1, caption 1 the token e2, images e1, e2. Among images a token has one
    rival, log(1 + e^-s). Among tokens e1 has one (its twin is none), e2 two. Then a plain loop."""
    one, two = math.log(1 + math.exp(-scale)), math.log(1 + 2 * math.exp(-scale))
    loss = lcg_loss(torch.eye(2)[[0, 0, 1]], torch.tensor([0, 0, 1]), torch.eye(2), scale)
    same(loss.item(), (3 * one + (2 * one + two)) / 3 / 2)
    tokens, image = torch.randn(12, 5, generator=torch.manual_seed(0)).split([9, 3])
    owner = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2])
    same(lcg_loss(tokens, owner, image, scale).item(), slow_lcg(tokens, owner, image, scale))

@each("scale", [1.0, 1 / 0.07])
def test_clip_loss_is_that_of_one_token_a_caption(scale):
    text, image = torch.randn(2, 4, 5, generator=torch.manual_seed(0))
    same(clip_loss(text, image, scale).item(), slow_lcg(text, range(4), image, scale))

@each("log_scale, scale", [(0.5, math.exp(0.5)), (9.0, 100.0)])
@each("contrastive", ["clip", "lcg"])
def test_what_the_contrastive_losses_compare(contrastive, log_scale, scale):
    """The mean image token with the mean token embedding (CLIP) or the outputs of block 0, which is blind
    (LCG), of tokens that run and have a target. The learned scale is at most 100."""
    model, idx, image, targets = scene(train=True, contrastive=contrastive)
    nn.init.constant_(model.log_scale, log_scale)
    *_, first, pooled = references(model, idx, image, targets, KEEP)
    real = targets.gather(1, KEEP) != -1
    text, owner = first[real], real.nonzero()[:, 0]
    if contrastive == "clip":
        embedded = model.token_embedding.weight.detach()[idx.gather(1, KEEP)]
        text, owner = [x[r].mean(0) for x, r in zip(embedded, real)], range(B)
    loss = model(idx, image, targets, KEEP).contrastive.item()
    same(loss, slow_lcg(text, owner, pooled, scale), 1e-3)

@each("contrastive", ["none", "clip", "lcg"])
def test_the_contrastive_loss_is_0_but_in_training_with_images(contrastive):
    model, idx, image, targets = scene(contrastive=contrastive)
    assert model(idx, image, targets).contrastive == 0
    model.train()
    assert model(idx, None, targets).contrastive == 0
    assert (model(idx, image, targets).contrastive > 0.1) == (contrastive != "none")

@each("contrastive", ["clip", "lcg"])
def test_one_caption_alone_has_no_negatives(contrastive):
    model, *batch = scene(rows=1, train=True, contrastive=contrastive)
    loss = model(*batch).contrastive
    loss.backward()
    assert abs(loss) < 1e-6 and model.token_embedding.weight.grad.isfinite().all()

@each("gate", GATES)
def test_a_word_that_only_the_image_tells_is_learned(gate):
    """Two captions differ in image and last word. Text alone cannot get below log 2 there."""
    model = make(fresh=True, train=True, gate=gate, n_layer=1)
    idx, targets = torch.tensor([[1, 2, 3]] * 2), torch.tensor([[-1, -1, 10], [-1, -1, 11]])
    image = torch.randn(2, K, DIM)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model(idx, image, targets).losses.sum().backward()
        optimizer.step()
    model.eval()
    assert model(idx, image, targets).losses.sum() / 2 < 0.1
    assert model(idx, None, targets).losses.sum() / 2 > math.log(2) - 1e-5

# ---- generate
def test_temperature_0_takes_the_best_token_until_the_block_is_full():
    model, idx, image, _ = scene(dropout=0.5)
    expected = idx
    while expected.size(1) < 9:  # block_size
        expected = torch.cat([expected, model(expected, image).logits[:, -1:].argmax(-1)], dim=1)
    model.train()  # generate turns dropout off
    assert torch.equal(model.generate(idx, 100, image, temperature=0), expected)

def test_samples_follow_softmax_of_logits_over_temperature():
    """Of 5,000 rows a frequency has a standard error of at most 0.0071, of which 4 are allowed."""
    model, idx, image, _ = scene(rows=1)
    logits = model(idx, image).logits[0, -1] / 2.0
    idx, image = idx.expand(5000, -1), image.expand(5000, -1, -1)
    written = model.generate(idx, 1, image, temperature=2.0)
    frequency = torch.bincount(written[:, -1], minlength=V) / 5000
    assert (frequency - logits.softmax(0)).abs().max() < 0.028

def test_generate_stops_when_all_rows_have_ended_and_fills_up_with_eot(monkeypatch):
    """The model writes a script. eot is 1: row 1 ends first, row 2 last; the prompt, eot too, ends none."""
    script, model = torch.tensor([[5, 1, 6, 7], [1, 8, 6, 7], [5, 5, 1, 9]]), make()
    forward = lambda idx, image: Output(F.one_hot(script[:, :idx.size(1)], V).float(), None, None, None)
    monkeypatch.setattr(model, "forward", forward)
    written = model.generate(torch.ones(3, 1).long(), 4, temperature=0, eot=1)
    assert written.tolist() == [[1, 5, 1, 1], [1, 1, 1, 1], [1, 5, 5, 1]]

# ---- wrong input
IMPOSSIBLE = dict(
    vocab_size=[0], block_size=[0], n_layer=[0, 2.0, True], n_head=[0, 3], n_embd=[0, 15], image_dim=[-8],
    n_image_layer=[-1], n_image_token=[-1], dropout=[-0.1, 1.0, "0"], contrastive_weight=[math.inf, math.nan],
    tie_weights=[1], gate=["soft", None], modulation=["FiLM"], contrastive=["siglip"])

@each("field, value", [(name, x) for name, values in IMPOSSIBLE.items() for x in values])
def test_an_impossible_config_names_the_field(field, value):
    refused(lambda: tiny(**{field: value}), rf"\b{field}\b")

def test_input_that_does_not_fit_is_refused():
    model, idx = make(), torch.zeros(2, 3, dtype=torch.long)
    refused(lambda: model(torch.zeros(1, 10, dtype=torch.long)), "does not fit block_size 9")
    for shape in (2, 3, DIM), (2, K, 9), (1, K, DIM):
        refused(lambda: model(idx, torch.zeros(shape)), r"images \(2, 4, 5\)")
    refused(lambda: make(n_image_token=0)(idx, torch.zeros(2, 0, DIM)), "image")
    refused(lambda: tiny(n_image_token=0, contrastive="clip"), "contrastive.*image")
    refused(lambda: tiny(n_layer=1, contrastive="lcg"), "lcg.*n_layer")
    refused(lambda: pick_device("abacus"), "^device abacus is not there .{,40}$")

# ---- save and load
def save(model, folder, /, **changes):
    parts = dict(model=model.state_dict(), model_config=asdict(model.config), step=7)
    save_checkpoint(f"{folder}/best.pt", **parts | changes)

@each("variant", [dict(contrastive="lcg"), dict(tie_weights=False), *VARIANTS[-2:]], ids=str)
def test_a_saved_model_comes_back_the_same(variant, tmp_path):
    model, *batch = scene(**variant)
    save(model, tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config == model.config and not loaded.training
    assert torch.equal(loaded(*batch).logits, model(*batch).logits)

@each("at", ["torch.save", "os.fsync", "os.replace"])
def test_a_save_that_fails_leaves_the_old_file(at, tmp_path, monkeypatch):
    def fail(part, file=None):
        if at == "torch.save":
            file.write(b"half of it")
        raise (RuntimeError if at == "torch.save" else OSError)("disk full")
    save(make(), tmp_path)
    monkeypatch.setattr(at, fail)
    refused(lambda: save(make(), tmp_path, step=8), "best.pt.*disk full")
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 7 and os.listdir(tmp_path) == ["best.pt"]

@each("damage", ["one byte", "cut", "empty", "text"])
def test_a_damaged_checkpoint_is_refused(damage, tmp_path):
    path = tmp_path / "best.pt"
    save(make(), tmp_path, more=torch.tensor(list(b"12345678"), dtype=torch.uint8))
    whole = path.read_bytes()
    other = whole.replace(b"12345678", b"12345679")
    path.write_bytes({"one byte": other, "cut": whole[:-9], "empty": b"", "text": b"hello\n"}[damage])
    refused(lambda: load_checkpoint(path), "best.pt")

def test_a_missing_or_foreign_checkpoint_is_refused(tmp_path):
    refused(lambda: load_model(tmp_path), "best.pt: no such checkpoint")
    for other in {"weights": 1}, {"model": {}}, [1, 2], torch.zeros(3):
        torch.save(other, tmp_path / "best.pt")
        refused(lambda: load_model(tmp_path), "best.pt.*not a checkpoint")

def test_code_in_a_checkpoint_is_never_run(tmp_path):
    """A pickle may ask for any call. This one makes a folder, which can be done once."""
    path, trace = tmp_path / "best.pt", f"{tmp_path}/trace"
    code = type("Code", (), {"__reduce__": lambda self: (os.mkdir, (trace,))})()
    torch.save({"model": code, "model_config": {}}, path)
    refused(lambda: load_checkpoint(path), "best.pt")
    torch.load(path, weights_only=False)
    assert os.path.exists(trace)

@each("changes", [
    dict(model_config=dict(n_eyes=2)), dict(model_config=dict(gate="sharp")), dict(model_config=3),
    dict(model_config=asdict(tiny(n_embd=16))), dict(model={}), dict(model=3)], ids=str)
def test_a_checkpoint_of_another_version_is_refused(changes, tmp_path):
    save(make(), tmp_path, **changes)
    refused(lambda: load_model(tmp_path), "best.pt.*another version")
