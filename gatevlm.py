"""
gatevlm: a small decoder that looks at a picture, and learns for every word how much.

  Looking to Learn (arXiv 2510.08470): cross-attention to an image, mixed into the text by a gate per token
  ReGATE           (arXiv 2507.21420): run only the tokens that are still hard to predict

From top to bottom: configuration; attention, modulation, gate, Look with the first paper's equation; blocks,
image encoder; contrastive losses; the model; token elision, the second paper; save, load, expect, check.
B batch, T text positions, K image tokens, D width, V vocabulary, nh heads of size hs, k positions kept.
"""
import math
import os
import sys
import zipfile
from collections import namedtuple
from dataclasses import dataclass, field, fields

import torch
import torch.nn as nn
import torch.nn.functional as F

# ---- configuration: every field is also a flag of train.py, with this default, help and choices
def option(default, help, choices=None, least=0):
    return field(default=default, metadata=dict(help=help, choices=choices, least=least))

GATES = ("soft-feature", "soft-token", "hard-feature", "hard-token", "none")

@dataclass
class GateVLMConfig:
    """Size and switches of the model; the defaults are those of Looking to Learn."""
    vocab_size: int = option(8192, "ids of the tokenizer; train.py takes it from the data", least=1)
    block_size: int = option(128, "longest text, in tokens", least=1)
    n_layer: int = option(8, "decoder layers", least=1)
    n_head: int = option(8, "attention heads; must divide n_embd", least=1)
    n_embd: int = option(768, "width of a token vector", least=1)
    dropout: float = option(0.1, "share of activations zeroed in training")
    tie_weights: bool = option(True, "one matrix for token embedding and output head")
    gate: str = option("soft-feature", "how text and image mix; none adds the image to the text", GATES)
    modulation: str = option("none", "x*(1+gamma)+beta, x*(1+sigmoid(gamma))", ("none", "film", "dyintra"))
    modulate_at: str = option("cross", "of what was seen, the text or the image", ("cross", "text", "image"))
    channel_attention: bool = option(False, "squeeze-and-excitation over the image features")
    image_encoder: str = option("transformer", "none: a linear map", ("transformer", "mlp", "none"))
    n_image_layer: int = option(5, "layers of the transformer image encoder")
    n_image_token: int = option(1, "1: one vector per picture, more: patches; --no-images makes it 0")
    image_dim: int = option(768, "numbers per image token; train.py takes it from the data", least=1)
    contrastive: str = option("none", "extra loss that aligns text and image", ("none", "clip", "lcg"))
    contrastive_weight: float = option(1.0, "its weight; the paper tries 1.0 and 0.3")

    def __post_init__(self):
        check(self)
        expect(self.n_embd % self.n_head == 0, f"n_embd {self.n_embd} is no multiple of n_head {self.n_head}")
        expect(self.dropout < 1, f"dropout must be below 1, not {self.dropout}")
        expect(self.contrastive == "none" or self.n_image_token, "a contrastive loss needs image tokens")
        expect(self.contrastive != "lcg" or self.n_layer > 1, "lcg keeps block 0 blind: n_layer must be 2+")

# ---- the look at the picture: attention, modulation, gate
class Attention(nn.Module):
    """Multi-head attention of x (B,T,D) over memory (B,S,D): self-attention where both are one text."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.query = nn.Linear(config.n_embd, config.n_embd)
        self.key_value = nn.Linear(config.n_embd, 2 * config.n_embd)
        self.proj = nn.Linear(config.n_embd, config.n_embd)

    def heads(self, x):
        return x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)  # (B, T, D) -> (B, nh, T, hs)

    def forward(self, x, memory, causal=False, mask=None):
        k, v = self.key_value(memory).chunk(2, dim=-1)  # (B, S, D) each
        dropout = self.dropout if self.training else 0.0
        if memory.size(1) == 1 and not dropout:
            return self.proj(v).expand_as(x)  # the softmax over one key is 1: the query has no say
        y = F.scaled_dot_product_attention(self.heads(self.query(x)), self.heads(k), self.heads(v),
                                           attn_mask=mask, is_causal=causal, dropout_p=dropout)
        return self.proj(y.transpose(1, 2).flatten(2))  # (B, nh, T, hs) -> (B, T, D)

class Modulation(nn.Module):
    """x (...,D) scaled by a linear map of condition (...,D): DyIntra, or FiLM, which also shifts (§4.2)."""

    def __init__(self, config):
        super().__init__()
        self.film = config.modulation == "film"
        self.linear = nn.Linear(config.n_embd, 2 * config.n_embd if self.film else config.n_embd)

    def forward(self, x, condition):
        if self.film:
            gamma, beta = self.linear(condition).chunk(2, dim=-1)
            return x * (1 + gamma) + beta
        return x * (1 + torch.sigmoid(self.linear(condition)))

class Gate(nn.Module):
    """g = sigmoid(W [text ; seen] + b) per feature (B,T,D) or token (B,T,1): 1 is all language, 0 all vision.
    A hard gate is 0 or 1; in training it is a Gumbel-softmax sample, whose temperature falls."""

    def __init__(self, config):
        super().__init__()
        self.hard = config.gate.startswith("hard")
        self.linear = nn.Linear(2 * config.n_embd, config.n_embd if config.gate.endswith("feature") else 1)
        self.register_buffer("temperature", torch.tensor(1.0))

    def forward(self, text, seen):
        logit = self.linear(torch.cat([text, seen], dim=-1))
        if not self.hard:
            return torch.sigmoid(logit)
        if not self.training:
            return (logit > 0).to(logit.dtype)
        # a 2-way Gumbel-softmax is a sigmoid: the difference of two Gumbel samples is one logistic sample
        noise = torch.logit(torch.rand_like(logit, dtype=torch.float32), eps=1e-6)
        return torch.sigmoid((logit + noise) / self.temperature)

class Look(nn.Module):
    """Gated cross-attention: text h (B,T,D), image (B,K,D) -> what to add to h (B,T,D), the gate (B,T)."""

    def __init__(self, config):
        super().__init__()
        self.place = config.modulate_at if config.modulation != "none" else None
        self.ln, self.cross = nn.LayerNorm(config.n_embd), Attention(config)
        self.drop = nn.Dropout(config.dropout)
        self.modulate = Modulation(config) if self.place else None
        self.gate = Gate(config) if config.gate != "none" else None
        self.ln_fused = nn.LayerNorm(config.n_embd) if self.gate else None

    def forward(self, h, image):
        text, pooled = self.ln(h), image.mean(dim=1, keepdim=True)  # (B, T, D), (B, 1, D)
        if self.place == "text":
            text = self.modulate(text, pooled)
        seen = self.see_modulated(text, image) if self.place == "image" else self.cross(text, image)
        if self.place == "cross":
            seen = self.modulate(seen, pooled)
        if self.gate is None:
            return self.drop(seen), h.new_ones(h.shape[:2])  # in place of a gate
        g = self.gate(text, seen)
        fused = g * text + (1 - g) * seen  # the paper: h_fused = g * h_text + (1 - g) * h_crossAttn
        return self.ln_fused(self.drop(fused)), g.mean(dim=-1)

    def see_modulated(self, text, image):
        """The text modulates the image, each position by the mean of the text so far: the mean of the whole
        caption would tell a word its own future. So every position has image tokens of its own."""
        B, T, D = text.shape
        so_far = text.cumsum(dim=1) / torch.arange(1, T + 1, device=text.device)[:, None]  # (B, T, D)
        memory = self.modulate(image[:, None], so_far[:, :, None])  # (B, T, K, D)
        return self.cross(text.reshape(B * T, 1, D), memory.flatten(0, 1)).view(B, T, D)  # one query each

# ---- the layers
def MLP(n_in, n_out):
    return nn.Sequential(nn.Linear(n_in, 4 * n_out), nn.GELU(approximate="tanh"), nn.Linear(4 * n_out, n_out))

class Block(nn.Module):
    """Self-attention, the look at the picture if there is one, MLP: h (B,T,D) -> h (B,T,D), gate (B,T)."""

    def __init__(self, config, looks, causal=True):
        super().__init__()
        self.causal = causal
        self.ln1, self.attn = nn.LayerNorm(config.n_embd), Attention(config)
        self.look = Look(config) if looks else None
        self.ln2, self.mlp = nn.LayerNorm(config.n_embd), MLP(config.n_embd, config.n_embd)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, h, image=None, context=None, mask=None):
        x = self.ln1(h)
        context = x if context is None else self.ln1(context)  # the whole text, where h is its kept tokens
        h = h + self.drop(self.attn(x, context, causal=self.causal and mask is None, mask=mask))
        gate = h.new_ones(h.shape[:2])  # a layer that does not look is all language
        if image is not None and self.look is not None:
            seen, gate = self.look(h, image)
            h = h + seen
        return h + self.drop(self.mlp(self.ln2(h))), gate

class ImageEncoder(nn.Module):
    """Image features (B,K,image_dim) -> image tokens (B,K,D)."""

    def __init__(self, config):
        super().__init__()
        D = config.n_embd
        self.register_buffer("mean", torch.zeros(config.image_dim))  # features come at any scale
        self.register_buffer("std", torch.ones(config.image_dim))
        self.proj = (MLP if config.image_encoder == "mlp" else nn.Linear)(config.image_dim, D)
        self.position = nn.Parameter(torch.zeros(config.n_image_token, D))
        n_layer = config.n_image_layer if config.image_encoder == "transformer" else 0
        self.layers = nn.ModuleList(Block(config, looks=False, causal=False) for _ in range(n_layer))
        self.ln = nn.LayerNorm(D)
        self.channels = None
        if config.channel_attention:  # squeeze-and-excitation with reduction 16
            r = max(1, D // 16)
            self.channels = nn.Sequential(nn.Linear(D, r), nn.ReLU(), nn.Linear(r, D), nn.Sigmoid())

    def measure(self, image):
        std, mean = torch.std_mean(image.flatten(0, 1), dim=0, correction=0)
        self.mean.copy_(mean)
        self.std.copy_(std + 1e-3 * std.mean() + 1e-12)  # a constant is not blown up

    def forward(self, image):
        x = self.proj((image - self.mean) / self.std) + self.position
        for layer in self.layers:
            x, _ = layer(x)
        x = self.ln(x)
        return x if self.channels is None else x * self.channels(x.mean(dim=1, keepdim=True))

# ---- contrastive losses (§4.3)
def clip_loss(text, image, scale):
    """Row i of text (B,D) belongs to row i of image (B,D); the other rows are negatives. In nats."""
    sim = scale * F.normalize(text, dim=-1) @ F.normalize(image, dim=-1).T  # (B, B)
    own = torch.arange(len(sim), device=sim.device)
    return (F.cross_entropy(sim, own) + F.cross_entropy(sim.T, own)) / 2

def lcg_loss(tokens, owner, image, scale):
    """LexiContrastive Grounding (Zhuang et al. 2024), CLIP per token: tokens (N,D) of captions owner (N,),
    image (B,D). A token finds its image among all; its image finds it among the tokens of other captions."""
    sim = scale * F.normalize(tokens, dim=-1) @ F.normalize(image, dim=-1).T  # (N, B)
    own = F.one_hot(owner, len(image)).bool()
    others = sim.masked_fill(own, -1e9).logsumexp(dim=0)[owner]  # (N,)
    among_tokens = (torch.logaddexp(sim[own], others) - sim[own]).mean()
    return (F.cross_entropy(sim, owner) + among_tokens) / 2

# ---- the model
Output = namedtuple("Output", "logits losses gates contrastive")

class GateVLM(nn.Module):
    """Embeddings, blocks, head. A batch without images skips image encoder, cross-attention and gates."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.image_encoder = ImageEncoder(config) if config.n_image_token else None
        # LCG compares the output of block 0 with the image, so block 0 must not have seen it
        n_blind = config.n_layer if config.n_image_token == 0 else int(config.contrastive == "lcg")
        self.blocks = nn.ModuleList(Block(config, looks=i >= n_blind) for i in range(config.n_layer))
        self.gated = [] if config.gate == "none" else [*range(n_blind, config.n_layer)]  # layers with a gate
        self.ln = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.head.weight = self.token_embedding.weight
        if config.contrastive != "none":
            self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.apply(self.init_weights)

    def init_weights(self, module):  # children come first: what a parent sets here is final
        if isinstance(module, (nn.Linear, nn.Embedding)):  # GPT-2's 0.02 at width 768, more where narrow
            nn.init.normal_(module.weight, std=(3 * module.weight.size(1)) ** -0.5)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, Block):  # as in GPT-2, where the residual stream sums 2 * n_layer of these
            module.attn.proj.weight.data /= math.sqrt(2 * self.config.n_layer)
            module.mlp[2].weight.data /= math.sqrt(2 * self.config.n_layer)
        if isinstance(module, ImageEncoder):  # about the scale of the projected features beside it
            nn.init.normal_(module.position, std=0.5)
        if isinstance(module, Modulation) and module.film:
            nn.init.zeros_(module.linear.weight)  # FiLM starts as the identity
        if isinstance(module, Look):  # the gate weighs it against normalised text, so it starts at that scale
            nn.init.normal_(module.cross.proj.weight, std=self.config.n_embd ** -0.5)

    def forward(self, idx, image=None, targets=None, keep=None, visible=False):
        """idx (B,T), image (B,K,image_dim) or None, targets (B,T) with -1 where there is none. Returns logits
        (B,T,V), losses (B,T) in nats, gates (n_layer,B,T) and, in training, the contrastive loss or 0.
        Token elision runs only the positions keep (B,k), ascending: every T above is then k. The others are
        gone or, if visible, still attended to as they were embedded. InputError for what does not fit."""
        c, T = self.config, idx.size(1)
        expect(T <= c.block_size, f"the text does not fit block_size {c.block_size}")  # no T: torch.compile
        shape = len(idx), c.n_image_token, c.image_dim
        expect(image is None or c.n_image_token and image.shape == shape, f"the model takes images {shape}")
        position = torch.arange(T, device=idx.device)
        h = self.drop(self.token_embedding(idx) + self.position_embedding(position))  # (B, T, D)
        context, mask, gates = None, None, []
        if keep is not None:
            at = keep[..., None].expand(-1, -1, c.n_embd)
            embedded, h = h, h.gather(1, at)  # (B, T, D), (B, k, D)
            idx, targets = idx.gather(1, keep), None if targets is None else targets.gather(1, keep)
            mask = (position <= keep[..., None])[:, None] if visible else None  # (B, 1, k, T)
        image = None if image is None else self.image_encoder(image)  # (B, K, D)
        for i, block in enumerate(self.blocks):
            if mask is not None:
                context = embedded.scatter(1, at, h)
            h, gate = block(h, image, context, mask)
            gates.append(gate)
            if i == 0:
                first = h
        logits = self.head(self.ln(h)).float()
        losses, contrastive = None, logits.new_zeros(())
        if targets is not None:
            flat = logits.flatten(0, 1), targets.flatten()  # (B * T, V), (B * T,)
            losses = F.cross_entropy(*flat, ignore_index=-1, reduction="none").view_as(targets)
            if self.training and image is not None and c.contrastive != "none":
                contrastive = self.contrastive_loss(idx, targets != -1, first, image.mean(dim=1))
        return Output(logits, losses, torch.stack(gates), contrastive)

    def contrastive_loss(self, idx, real, first, image):
        """CLIP with the mean token embedding, LCG with block 0's output first (B,T,D); image (B,D)."""
        scale = self.log_scale.clamp(max=math.log(100)).exp()
        with torch.autocast(idx.device.type, enabled=False):  # similarities times 100 need float32
            if self.config.contrastive == "lcg":
                return lcg_loss(first[real].float(), real.nonzero()[:, 0], image.float(), scale)
            text = (self.token_embedding(idx) * real[..., None]).sum(dim=1)  # (B, D)
            return clip_loss(text / real.sum(dim=1, keepdim=True).clamp(min=1), image.float(), scale)

    def anneal(self, progress):
        """Hard gates: temperature 1 -> 0.1, linear in the share of caption steps done, until 80% of them."""
        for module in self.modules():
            if isinstance(module, Gate):
                module.temperature.fill_(1.0 - 0.9 * min(progress / 0.8, 1.0))

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, image=None, temperature=1.0, eot=None):
        """Continue idx (B,T), or caption image where idx is <eot>. temperature 0 takes the best token. Ends
        when every row has produced eot, or the block is full."""
        self.eval()
        done = torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
        for _ in range(min(max_new_tokens, self.config.block_size - idx.size(1))):
            logits = self(idx, image).logits[:, -1]  # (B, V)
            if temperature == 0:
                token = logits.argmax(dim=-1)
            else:
                token = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1)[:, 0]
            if eot is not None:
                token = token.masked_fill(done, eot)
                done |= token == eot
            idx = torch.cat([idx, token[:, None]], dim=1)
            if done.all():
                break
        return idx

# ---- token elision (ReGATE): which tokens of a caption to run
class Elision(nn.Module):
    """A score for every token of the training captions, which lie back to back in one stream of n_token:
        d = m + lambda * l_ref    m: moving average of the student's loss, l_ref: loss of a text-only teacher
    Controls: ema (m alone), ref (l_ref alone), random."""

    def __init__(self, config, n_token, teacher=None):
        super().__init__()
        self.config = config  # of train.py
        self.register_buffer("average", torch.zeros(n_token))
        self.register_buffer("count", torch.zeros(n_token, dtype=torch.int32))
        self.register_buffer("teacher", torch.zeros(n_token) if teacher is None else teacher.float())

    def is_dense(self, n):
        """Does caption step n run every token? After a warm-up each cycle begins with dense steps."""
        c = self.config
        return n < c.elide_warmup or (n - c.elide_warmup) % c.elide_cycle < c.elide_dense

    def score(self, place):
        c, teacher, n = self.config, self.teacher[place], self.count[place]
        m = self.average[place] / (1 - c.elide_beta ** n).clamp(min=1e-9)  # corrected for its start at 0
        first = 1000 + (place % 65521) ** 2 * 40503 % 65521 / 65521  # in an order as good as random
        m = torch.where(n > 0, m, teacher if c.elide == "regate" else first)
        d = {"regate": m + c.elide_lambda * teacher, "ema": m, "ref": teacher}
        return d[c.elide] if c.elide in d else torch.rand_like(m)

    def n_keep(self, length):
        """How many tokens of each caption a step runs, for captions of this mean length."""
        return max(1, round(self.config.keep_ratio * length))

    def choose(self, place, real, k):
        """place (B,T) of the targets in the stream, real (B,T) -> positions to keep (B,k), ascending; padding
        comes last of all. A token is kept by its own score, <eot> always, or by that of its target."""
        score = self.score(place)
        if self.config.elide_by == "own":
            score = F.pad(score[:, :-1], (1, 0), value=math.inf)
        return score.masked_fill(~real, -math.inf).topk(k, dim=1).indices.sort(dim=1).values

    def update(self, place, losses):
        """After a step: losses (N,) of the tokens run, at place (N,). m <- beta m + (1 - beta) loss"""
        self.average[place] = self.average[place].lerp(losses, 1 - self.config.elide_beta)
        self.count[place] += 1

# ---- devices, save and load
def pick_device(name, local_rank=0):
    """The device called cpu, cuda, mps, or auto for the best there is; InputError where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{local_rank}" if name == "cuda" else name)
        torch.zeros(1, device=device)
        if name == "cuda":
            torch.cuda.set_device(device)
    except Exception as error:  # of a class for every way in which a device can be missing
        raise InputError(f"device {name} is not there ({type(error).__name__}); cpu always is") from error
    return device

def save_checkpoint(path, **parts):
    """A crash or a full disk leaves the old file or the new one, never half of one."""
    try:
        with open(path + ".part", "wb") as f:
            torch.save(parts, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".part", path)
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of a full disk
        if os.path.exists(path + ".part"):
            os.unlink(path + ".part")
        raise InputError(f"{path}: cannot be written ({error!s:.80}); the last save is whole") from error

def load_checkpoint(path):
    """{"model": ..., "model_config": ..., "now": ...}. weights_only: a stranger's file cannot hold code."""
    expect(os.path.isfile(path), f"{path}: no such checkpoint; train one with train.py")
    try:
        with zipfile.ZipFile(path) as parts:
            damaged = parts.testzip()
        checkpoint = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a class of its own for every way a file can be damaged
        raise InputError(f"{path}: not a readable checkpoint ({type(error).__name__})") from error
    expect(isinstance(checkpoint, dict) and {"model", "model_config"} <= set(checkpoint),
           f"{path}: damaged, or not a checkpoint of gatevlm")
    return checkpoint

def load_model(run, name="best.pt", device="cpu"):
    """The model of a run folder, in eval mode: load_model("out/toy")."""
    checkpoint = load_checkpoint(path := os.path.join(run, name))
    try:
        model = GateVLM(GateVLMConfig(**checkpoint["model_config"]))
        model.load_state_dict(checkpoint["model"])
    except (TypeError, AttributeError, RuntimeError, InputError) as error:
        raise InputError(f"{path}: of another version of gatevlm ({str(error).splitlines()[0]})") from error
    return model.to(device).eval()

# ---- wrong input is told in one clear line
class InputError(ValueError):
    """What the user gave cannot be used: the scripts print it and exit with status 2."""

def expect(condition, message):
    if not condition:
        raise InputError(message)

def check(config):
    """Types, choices and ranges of every field of a config."""
    for f in fields(config):
        value, choices, least = getattr(config, f.name), f.metadata["choices"], f.metadata["least"]
        if f.type is float and type(value) is int:
            setattr(config, f.name, value := float(value))
        expect(type(value) is f.type, f"{f.name} must be of type {f.type.__name__}, not {value!r}")
        expect(not choices or value in choices, f"{f.name} must be one of {choices}, not {value!r}")
        expect(f.type not in (int, float) or least <= value < math.inf,
               f"{f.name} must be at least {least} and finite, not {value}")

def run_script(main):
    """main() as a command: wrong input and a full disk end in one line and status 2, Ctrl-C in status 130."""
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a letter shows a ?
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (InputError, OSError) as error:
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
        sys.exit(2)
