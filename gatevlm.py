"""gatevlm: a small decoder that looks at a picture only where a word asks for it.

The model of *Looking to Learn* (Ganescu, Salhan, Caines, Buttery; arXiv 2510.08470), whole, in one file. Every part stands before what is
built from it; for the whole first, read GateVLM.trunk (7) and Block.forward (4), then come back to the top.
  1. GateVLMConfig         every switch, with the values it takes (above it: errors and flags, to skip at first)
  2. Attention, MLP        the two parts that everything else is made of
  3. ImageEncoder          image features -> image tokens, with channel attention as a switch
  4. Block                 one decoder layer. forward: h_fused = g * h_text + (1 - g) * h_crossAttn, the paper's equation;
                           gate_values: g, soft or Gumbel; modulate: FiLM, DyIntra; look: cross-attention, and what modulates what
  5. clip_loss, lcg_loss   the two contrastive losses that can be added in training
  6. keep_best             the tokens worth running, by a score: the selection of *ReGATE* (Li, Kulkarni, Fazli; arXiv 2507.21420). The score
                           d = m + lambda * l_ref and the average m <- beta m + (1 - beta) l: train.py, class Elision; the schedule: is_dense
     keep_sampled          the same score as a sampling weight; in neither paper, and neither is visible, an argument of GateVLM.forward
  7. HeadLoss, GateVLM     the loss without the logits; embeddings, blocks, tied head; anneal: temperature of the Gumbel gates; generate()
  8. pick_device, compiled, save_checkpoint, load_model: a run folder -> a model, in one call

Letters in shape comments: B batch, T text positions, K image tokens, D width (n_embd), V vocabulary, nh heads, hs head size;
S positions attended to, N targets that are not padding, k positions of each row kept by elision (not K).
"""
import argparse
import math
import os
import sys
import zipfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F

GATES = ("soft-feature", "soft-token", "hard-feature", "hard-token", "none")
MODULATIONS = ("none", "film", "dyintra")
PLACES = ("cross", "text", "image")
IMAGE_ENCODERS = ("transformer", "mlp", "none")
CONTRASTIVES = ("none", "clip", "lcg")


class InputError(ValueError):
    """What the user gave cannot be used; the scripts print it as one line and exit with status 2."""


def run_script(main):
    """main() as a command: wrong input and a failing disk end in one line and status 2, Ctrl-C in status 130."""
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a letter shows a ?
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (InputError, OSError) as error:
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
        sys.exit(2)


class Parser(argparse.ArgumentParser):
    def error(self, message):  # as any other wrong input
        raise InputError(message)


@contextmanager
def evaluating(model):
    """Eval mode without gradients, and back to what it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def option(default, help, choices=None):
    """A dataclass field that is also a command line flag: its help sentence and its allowed values travel with it."""
    return field(default=default, metadata={"help": help, "choices": choices})


def check_fields(config, positive):
    """Types, choices and ranges of a config: numbers are finite and at least 0, those named positive above 0."""
    for name, f in config.__dataclass_fields__.items():
        value = getattr(config, name)
        if f.type is float and type(value) is int:
            value = float(value)
            setattr(config, name, value)
        if type(value) is not f.type:
            raise InputError(f"{name} must be of type {f.type.__name__}, not {value!r}")
        if f.metadata["choices"] and value not in f.metadata["choices"]:
            raise InputError(f"{name} must be one of {', '.join(f.metadata['choices'])}, not {value!r}")
        if f.type in (int, float) and not (0 < value < math.inf if name in positive else 0 <= value < math.inf):
            raise InputError(f"{name} must be {'above' if name in positive else 'at least'} 0 and finite, not {value}")


# ----------------------------------------------------------------------------------------------------------------------
# 1. config

@dataclass
class GateVLMConfig:
    """Size and switches of the model; the defaults are the paper's. Impossible values raise InputError."""
    vocab_size: int = option(8192, "ids the tokenizer can produce, <eot> among them; train.py takes it from the data")
    block_size: int = option(128, "longest text the model reads, in tokens")
    n_layer: int = option(8, "decoder layers")
    n_head: int = option(8, "attention heads; must divide n_embd")
    n_embd: int = option(768, "width of every token vector, in numbers")
    dropout: float = option(0.1, "share of activations zeroed in training, 0 to below 1")
    tie_weights: bool = option(True, "share one matrix between token embedding and output head")
    gate: str = option("soft-feature", "how text and image mix: sigmoid or Gumbel, one gate per feature or per token; none adds the image to the text", GATES)
    modulation: str = option("none", "feature modulation: FiLM x*(1+gamma)+beta, or DyIntra x*(1+sigmoid(Wc))", MODULATIONS)
    modulate_at: str = option("cross", "what is modulated: cross-attention output, text, or image tokens", PLACES)
    channel_attention: bool = option(False, "squeeze-and-excitation over the features of the encoded image")
    image_encoder: str = option("transformer", "what turns image features into image tokens", IMAGE_ENCODERS)
    n_image_layer: int = option(5, "layers of the transformer image encoder")
    n_image_token: int = option(1, "image tokens: 1 = one global embedding, more = patches, 0 = a model without eyes")
    image_dim: int = option(768, "numbers per image token in the data; train.py takes it from the data")
    contrastive: str = option("none", "extra training loss that aligns text and image", CONTRASTIVES)
    contrastive_weight: float = option(1.0, "weight of the contrastive loss beside the language loss (the paper tries 1.0 and 0.3)")

    def __post_init__(self):
        check_fields(self, positive=("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "image_dim"))
        if self.n_embd % self.n_head:
            raise InputError(f"n_embd must be a multiple of n_head, and {self.n_embd} is not a multiple of {self.n_head}")
        if self.dropout >= 1:
            raise InputError(f"dropout must be below 1, not {self.dropout}")
        if self.contrastive == "lcg" and self.n_layer < 2:
            raise InputError("contrastive lcg keeps the image away from block 0, so n_layer must be at least 2")
        if self.n_image_token == 0 and self.contrastive != "none":
            raise InputError(f"contrastive {self.contrastive} compares text with images, but n_image_token is 0")


# ----------------------------------------------------------------------------------------------------------------------
# 2. the two parts

class Attention(nn.Module):
    """Multi-head attention of x (B,T,D) over itself, or over memory (B,S,D) when one is given: (B,T,D). mask (B,T,S): True where a row may look.
    cache: None, or a dict that is empty at the first call of generate and holds the keys and values of earlier calls afterwards."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.query = nn.Linear(config.n_embd, config.n_embd)
        self.key_value = nn.Linear(config.n_embd, 2 * config.n_embd)
        self.proj = nn.Linear(config.n_embd, config.n_embd)

    def heads(self, x):
        return x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)  # (B, T, D) -> (B, nh, T, hs)

    def forward(self, x, memory=None, causal=False, cache=None, mask=None):
        if memory is not None and memory.size(1) == 1 and not (self.training and self.dropout):
            # the softmax over one key is 1: every query finds the same, so none is computed. (Dropout zeroes that 1 for some queries and heads
            # and not for others: then the long way is taken.)
            found = cache["found"] if cache else self.proj(self.key_value(memory).chunk(2, dim=-1)[1])  # (B, 1, D)
            if cache is not None:
                cache["found"] = found
            return found.expand(-1, x.size(1), -1)  # (B, T, D)
        q = self.heads(self.query(x))  # (B, nh, T, hs)
        if memory is not None and cache:
            k, v = cache["key"], cache["value"]  # the image does not change while a caption is written
        else:
            k, v = (self.heads(y) for y in self.key_value(x if memory is None else memory).chunk(2, dim=-1))
            if cache is not None:
                if memory is None and cache:
                    k = torch.cat([cache["key"], k], dim=2)  # (B, nh, T so far, hs)
                    v = torch.cat([cache["value"], v], dim=2)
                cache["key"], cache["value"] = k, v
        if q.size(2) == 1 or mask is not None:
            causal = False  # one new token may see every cached one; a mask says all there is to say
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None], is_causal=causal,
                                           dropout_p=self.dropout if self.training else 0.0)
        return self.proj(y.transpose(1, 2).flatten(2))  # (B, nh, T, hs) -> (B, T, D)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.proj(F.gelu(self.fc(x), approximate="tanh"))


# ----------------------------------------------------------------------------------------------------------------------
# 3. image features -> image tokens

class ImageLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln1, self.attn = nn.LayerNorm(config.n_embd), Attention(config)
        self.ln2, self.mlp = nn.LayerNorm(config.n_embd), MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x):
        x = x + self.drop(self.attn(self.ln1(x)))  # bidirectional: a picture has no order of reading
        return x + self.drop(self.mlp(self.ln2(x)))


class ImageEncoder(nn.Module):
    """Features (B,K,image_dim) at any scale -> image tokens (B,K,D)."""

    def __init__(self, config):
        super().__init__()
        D = config.n_embd
        # features come at any scale; train.py fills in the mean and standard deviation of the training images
        self.register_buffer("mean", torch.zeros(config.image_dim))
        self.register_buffer("std", torch.ones(config.image_dim))
        self.proj = nn.Linear(config.image_dim, D)
        if config.image_encoder == "mlp":  # the non-linearity comes before the narrow width D
            self.proj = nn.Sequential(nn.Linear(config.image_dim, 4 * D), nn.GELU(), nn.Linear(4 * D, D))
        self.position = nn.Parameter(torch.zeros(config.n_image_token, D))
        n_layer = config.n_image_layer if config.image_encoder == "transformer" else 0
        self.layers = nn.ModuleList(ImageLayer(config) for _ in range(n_layer))
        self.ln = nn.LayerNorm(D)
        self.squeeze = self.excite = None
        if config.channel_attention:
            self.squeeze = nn.Linear(D, max(1, D // 16))  # reduction 16, as in squeeze-and-excitation networks
            self.excite = nn.Linear(max(1, D // 16), D)

    def forward(self, image):
        x = self.proj((image - self.mean) / self.std) + self.position  # (B, K, D)
        for layer in self.layers:
            x = layer(x)
        x = self.ln(x)
        if self.squeeze is not None:
            summary = x.mean(dim=1, keepdim=True)  # (B, 1, D)
            x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(summary))))
        return x


# ----------------------------------------------------------------------------------------------------------------------
# 4. one decoder layer

class Block(nn.Module):
    """Self-attention, then (if the batch has images) the gated look at the image, then the MLP."""

    def __init__(self, config, layer):
        super().__init__()
        D = config.n_embd
        self.config = config
        self.modulated = "nowhere" if config.modulation == "none" else config.modulate_at
        self.ln1, self.attn = nn.LayerNorm(D), Attention(config)
        self.ln3, self.mlp = nn.LayerNorm(D), MLP(config)
        self.drop = nn.Dropout(config.dropout)
        # LCG compares what block 0 makes of the text with the image, so block 0 must not have seen the image
        self.sees_image = config.n_image_token > 0 and not (config.contrastive == "lcg" and layer == 0)
        if self.sees_image:
            self.ln2, self.cross = nn.LayerNorm(D), Attention(config)
            if config.gate != "none":
                self.gate = nn.Linear(2 * D, D if config.gate.endswith("feature") else 1)
                self.ln4 = nn.LayerNorm(D)
            if config.modulation != "none":
                self.condition = nn.Linear(D, 2 * D if config.modulation == "film" else D)

    def forward(self, h, image=None, temperature=None, cache=None, mask=None, embedded=None, keep=None):
        """h (B,T,D), image tokens (B,K,D) or None -> h (B,T,D), gate (B,T), the mean over features: 1 all language, 0 all vision. With embedded
        (B,T,D), the whole text as it was embedded, h holds the positions keep (B,k) only and also attends to the others. temperature: of hard
        gates; mask (B,T,T): True where a row may look; cache: the dict of this layer, see generate."""
        h = h + self.drop(self.attend(h, cache, mask, embedded, keep))
        gate = h.new_ones(h.shape[:2])  # 1 where there is no gate: no image, a layer that does not look, or gate none (which adds v all the same)
        if image is not None and self.sees_image:
            t = self.ln2(h)
            if self.modulated == "text":
                t = self.modulate(t, image.mean(dim=1, keepdim=True))
            v = self.look(t, image, cache, mask)
            if self.config.gate == "none":
                h = h + self.drop(v)
            else:
                g = self.gate_values(torch.cat([t, v], dim=-1), temperature)  # (B, T, D) or (B, T, 1)
                h = h + self.ln4(self.drop(g * t + (1 - g) * v))  # h_fused = g * h_text + (1 - g) * h_crossAttn
                gate = g.mean(dim=-1)
        h = h + self.drop(self.mlp(self.ln3(h)))
        return h, gate

    def attend(self, h, cache, mask, embedded, keep):
        """Self-attention of text h (B,T,D), or of its kept positions (B,k,D) among embedded (B,T,D)."""
        if embedded is None:
            return self.attn(self.ln1(h), causal=True, cache=None if cache is None else cache["self"], mask=mask)
        every = embedded.scatter(1, keep[..., None].expand_as(h), h)  # (B, T, D): dropped tokens as they were embedded
        earlier = torch.arange(every.size(1), device=h.device) <= keep[..., None]  # (B, k, T)
        return self.attn(self.ln1(h), memory=self.ln1(every), mask=earlier)

    def look(self, t, image, cache, mask):
        """Cross-attention of text t (B,T,D) to image tokens (B,K,D). With K=1 the softmax is 1 and the query has no say."""
        if self.modulated != "image":
            v = self.cross(t, memory=image, cache=None if cache is None else cache["image"])
            return self.modulate(v, image.mean(dim=1, keepdim=True)) if self.modulated == "cross" else v
        # Here the text modulates the image. Averaging the whole caption would show a word its own future, so position i
        # averages positions 0..i only, and the image memory is a different one at every position.
        B, T, D = t.shape
        if mask is None:
            total, n = t.cumsum(dim=1), torch.arange(1, T + 1, device=t.device)  # (B, T, D), (T,)
        else:  # "so far" is what a position may look at
            total, n = mask.to(t.dtype) @ t, mask.sum(dim=-1)  # (B, T, D), (B, T)
        if cache is not None:  # t holds the new tokens only
            total, n = total + cache.get("text_sum", 0), n + cache.get("n_text", 0)
            cache["text_sum"], cache["n_text"] = total[:, -1:], n[-1:]
        text = total / n[..., None]  # (B, T, D)
        memory = self.modulate(image[:, None], text[:, :, None])  # (B, T, K, D)
        return self.cross(t.reshape(B * T, 1, D), memory=memory.flatten(0, 1)).view(B, T, D)  # as B * T texts of one query each

    def modulate(self, x, condition):
        """x (...,D) scaled (FiLM: and shifted) per feature by linear maps of condition (...,D); the two are broadcast."""
        if self.config.modulation == "film":
            gamma, beta = self.condition(condition).chunk(2, dim=-1)
            return x * (1 + gamma) + beta
        return x * (1 + torch.sigmoid(self.condition(condition)))  # DyIntra

    def gate_values(self, both, temperature):
        """The gate g = sigmoid(W [h_text ; h_crossAttn] + b) of both = [t ; v] (B,T,2D): (B,T,D) or (B,T,1), in 0..1. A hard gate is 0 or 1 in
        eval only; in training it is soft and noisy, a Gumbel-softmax sample at this temperature (0-d tensor, set by GateVLM.anneal)."""
        logit = self.gate(both)
        if self.config.gate.startswith("soft"):
            return torch.sigmoid(logit)
        if not self.training:
            return (logit > 0).to(logit.dtype)  # argmax, without noise
        # a 2-way Gumbel-softmax is a sigmoid: the difference of two Gumbel samples is one logistic sample
        noise = torch.logit(torch.rand_like(logit, dtype=torch.float32), eps=1e-6)  # in bfloat16 one draw in 512 rounds to 1, and CUDA makes it 0
        return torch.sigmoid((logit + noise) / temperature)


# ----------------------------------------------------------------------------------------------------------------------
# 5. contrastive losses (their cost in language scores: Section 4.3 of the paper)

def clip_loss(text, image, scale):
    """Symmetric InfoNCE: row i of text (B,D) belongs to row i of image (B,D), every other row is a negative."""
    sim = scale * F.normalize(text, dim=-1) @ F.normalize(image, dim=-1).T  # (B, B)
    labels = torch.arange(len(sim), device=sim.device)
    return (F.cross_entropy(sim, labels) + F.cross_entropy(sim.T, labels)) / 2


def lcg_loss(tokens, owner, image, scale):
    """LexiContrastive Grounding (Zhuang, Fedorenko, Andreas 2024), InfoNCE per token: tokens (N,D), owner (N,) the caption of each, image
    (B,D). A token must find its image among all images, and its image must find it among the tokens of the other captions."""
    sim = scale * F.normalize(tokens, dim=-1) @ F.normalize(image, dim=-1).T  # (N, B)
    own = owner[:, None] == torch.arange(len(image), device=sim.device)  # (N, B)
    positive = sim[own]  # (N,)
    # of token t of caption i: -log( e^sim[t,i] / sum over images j of e^sim[t,j] )
    among_images = F.cross_entropy(sim, owner)
    # -log( e^sim[t,i] / (e^sim[t,i] + sum over tokens u of other captions of e^sim[u,i]) )
    others = sim.masked_fill(own, -1e9).logsumexp(dim=0)[owner]  # (N,)
    among_tokens = (torch.logaddexp(positive, others) - positive).mean()
    return (among_images + among_tokens) / 2


# ----------------------------------------------------------------------------------------------------------------------
# 6. which tokens to run (ReGATE)

def keep_best(score, real, k):
    """The k positions of each row with the best score (B,T), ascending: (B,k). Padding (real is False) comes last of all."""
    return score.masked_fill(~real, -math.inf).topk(k, dim=1).indices.sort(dim=1).values


def keep_sampled(score, real, k):
    """Priority sampling (Duffield, Lund, Thorup 2007): (keep (B,k), weight (B,k)) of positions drawn by their score (B,T) > 0. Each
    weight is 1 / the probability of having been drawn, so that the weighted sum of losses over keep is unbiased."""
    priority = (score / torch.rand_like(score).clamp(min=1e-9)).masked_fill(~real, 0.0)
    keep = keep_best(priority, real, k)
    threshold = F.pad(priority, (0, 1)).topk(k + 1, dim=1).values[:, -1:]  # the best priority that was not kept, 0 when all are
    return keep, (threshold / score.gather(1, keep)).clamp(min=1.0)


# ----------------------------------------------------------------------------------------------------------------------
# 7. the model

class HeadLoss(torch.autograd.Function):
    """Cross-entropy of the logits h (N,D) @ weight (V,D).T against targets (N,): its sum weighted by scale (N,), and each loss (N,). Gradients are
    taken on the way forward, chunk by chunk: the logits of one chunk are all that ever exists of (N,V), and nothing is computed twice."""
    CHUNK = 512

    @staticmethod
    def forward(ctx, h, weight, targets, scale):
        losses, dh, dweight = torch.zeros_like(scale), torch.zeros_like(h), torch.zeros_like(weight)
        for i in range(0, len(h), HeadLoss.CHUNK):
            rows = slice(i, i + HeadLoss.CHUNK)
            logp = (h[rows] @ weight.T).float().log_softmax(dim=-1)  # (chunk, V)
            losses[rows] = F.nll_loss(logp, targets[rows], reduction="none")
            dlogits = logp.exp_()  # d loss / d logits = scale * (softmax - one-hot), in place of logp
            dlogits[torch.arange(len(dlogits), device=h.device), targets[rows]] -= 1
            dlogits *= scale[rows, None]
            dh[rows] = (dlogits @ weight).to(h.dtype)
            dweight += dlogits.T @ h[rows]
        ctx.save_for_backward(dh, dweight)
        ctx.mark_non_differentiable(losses)
        return (losses * scale).sum(), losses

    @staticmethod
    def backward(ctx, dloss, _):
        dh, dweight = ctx.saved_tensors
        return dloss * dh, dloss * dweight, None, None


class GateVLM(nn.Module):
    """The whole model: embeddings, blocks, norm, head. A batch without images skips the image encoder, cross-attention and gates."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        n_row = -(-config.vocab_size // 64) * 64  # GPUs like multiples of 64; the extra rows never leave this class
        self.token_embedding = nn.Embedding(n_row, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.image_encoder = ImageEncoder(config) if config.n_image_token else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, n_row, bias=False)
        if config.tie_weights:
            self.head.weight = self.token_embedding.weight
        # a buffer, not a number: it survives a checkpoint, and changing it does not make torch.compile start again
        self.register_buffer("gate_temperature", torch.tensor(1.0))
        if config.contrastive != "none":
            self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        # train.py reads these after each forward with targets
        self.loss_parts = {}  # what the last loss was made of, detached: {"language": ..., "contrastive": ...}
        self.target_losses, self.target_at = torch.zeros(0), torch.zeros(0)  # and the loss of each real target, (N,), with its flat position
        self.apply(self._init_weights)

    def _init_weights(self, module):  # self.apply calls it for the children first: what a parent sets here below is final
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=(3 * module.weight.size(1)) ** -0.5)  # GPT-2's 0.02 at width 768, more where narrow
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, (Attention, MLP)):  # the residual stream sums 2 * n_layer of these (GPT-2); image layers are scaled alike
            module.proj.weight.data /= math.sqrt(2 * self.config.n_layer)
        if isinstance(module, ImageEncoder):
            nn.init.normal_(module.position, std=0.5)  # about the scale of the projected features beside it
        if isinstance(module, Block) and module.sees_image:
            # not a residual branch of its own: the gate weighs it against normalised text, so it starts at that scale
            nn.init.normal_(module.cross.proj.weight, std=self.config.n_embd ** -0.5)
            if self.config.modulation == "film":
                nn.init.zeros_(module.condition.weight)  # FiLM starts as the identity

    def trunk(self, idx, image=None, cache=None, position=None, mask=None, keep=None, visible=False):
        """Everything below the head: h (B,T,D), gates (n_layer,B,T), pooled image (B,D) or None, block 0's output (B,T,D).
        Tokens follow each other unless position (B,T) and mask (B,T,T), True where a row may look, arrange them otherwise. With
        keep (B,k) only those positions are run, and every T above is k. cache: a dict per layer, made by generate and filled here. InputError
        where a text does not fit the block or the cache, or an image the model."""
        start = cache[0]["self"]["key"].size(2) if cache and cache[0]["self"] else 0  # tokens read before
        B, T = idx.shape
        if position is None and start + T > self.config.block_size:
            raise InputError(f"a text of {start + T} tokens does not fit block_size {self.config.block_size}")
        if start and T > 1:
            raise InputError(f"a cache that holds {start} tokens takes one more at a time, not {T}")
        if keep is not None and not visible:
            idx, position = idx.gather(1, keep), keep  # (B, k); each token keeps the position it has in the whole text
        if position is None:
            position = torch.arange(start, start + T, device=idx.device)
        h = self.drop(self.token_embedding(idx) + self.position_embedding(position))  # (B, T, D)
        embedded = None
        if keep is not None and visible:
            embedded, h = h, h.gather(1, keep[..., None].expand(-1, -1, h.size(-1)))  # (B, T, D), (B, k, D)
        if image is not None and not self.config.n_image_token:
            raise InputError("this model was trained without images (n_image_token is 0): call it with image=None")
        if image is not None:
            if image.shape != (B, self.config.n_image_token, self.config.image_dim):
                raise InputError(f"image must have shape {(B, self.config.n_image_token, self.config.image_dim)}, not {tuple(image.shape)}")
            encoded = cache[0].get("encoded") if cache else None
            image = self.image_encoder(image) if encoded is None else encoded  # (B, K, D)
            if cache:
                cache[0]["encoded"] = image
        gates = []
        for i, block in enumerate(self.blocks):
            h, gate = block(h, image, self.gate_temperature, None if cache is None else cache[i], mask, embedded, keep)
            gates.append(gate)
            if i == 0:
                first = h
        return self.ln(h), torch.stack(gates), None if image is None else image.mean(dim=1), first

    def logits(self, h):
        return self.head(h)[..., :self.config.vocab_size]

    def forward(self, idx, targets=None, image=None, keep=None, return_gates=False, weight=None, visible=False, n_target=None):
        """idx (B,T) int64, image (B,K,image_dim) or None -> (logits (B,T,V), None), or with targets (B,T), -1 ignored,
        (None, mean loss in nats); with return_gates also gates (n_layer,B,T). In training the contrastive term is added.
        keep (B,k), ascending: only these positions are run, as if the others were not in the text; visible: the others are still seen
        by self-attention, as they were embedded. weight (B,k): the loss is the sum of weight * loss instead of the mean.
        n_target: how many targets (those at keep) are not -1, where the caller knows; it must be exact. Sets loss_parts, target_losses and
        target_at. InputError as in trunk."""
        h, gates, pooled, first = self.trunk(idx, image, keep=keep, visible=visible)
        if keep is not None:
            idx, targets = idx.gather(1, keep), None if targets is None else targets.gather(1, keep)  # (B, k)
        if targets is None:
            logits, loss = self.logits(h), None
        else:
            real = targets != -1  # (B, T); padding never reaches the head
            # where the real targets stand; a GPU that is told how many there are need not stop to count them
            at = torch.nonzero_static(real.flatten(), size=int(real.sum()) if n_target is None else n_target)[:, 0]  # (N,)
            scale = torch.full_like(at, 1 / max(1, len(at)), dtype=torch.float32) if weight is None else weight.flatten()[at]
            logits, (loss, losses) = None, HeadLoss.apply(h.flatten(0, 1)[at], self.head.weight[:self.config.vocab_size], targets.flatten()[at], scale)
            self.loss_parts, self.target_losses, self.target_at = {"language": loss.detach()}, losses, at
            if self.training and image is not None and self.config.contrastive != "none":
                extra = self.contrastive_loss(idx, first, real, pooled)
                self.loss_parts["contrastive"] = extra.detach()
                loss = loss + self.config.contrastive_weight * extra
        return (logits, loss, gates) if return_gates else (logits, loss)

    def contrastive_loss(self, idx, first, real, pooled):
        """CLIP: the mean token embedding of idx (B,T) where real, against the pooled image (B,D); LCG: block 0's output first (B,T,D)."""
        scale = self.log_scale.clamp(max=math.log(100)).exp().float()
        with torch.autocast(idx.device.type, enabled=False):  # at scale 100, bfloat16 similarities would be off by 0.3
            if self.config.contrastive == "clip":
                embedded = self.token_embedding(idx).float() * real[..., None]  # (B, T, D)
                text = embedded.sum(dim=1) / real.sum(dim=1, keepdim=True).clamp(min=1)  # (B, D) mean over real tokens
                return clip_loss(text, pooled.float(), scale)
            owner = torch.arange(len(idx), device=idx.device)[:, None].expand_as(idx)[real]  # (N,)
            return lcg_loss(first[real].float(), owner, pooled.float(), scale)

    def token_losses(self, idx, targets, image=None):
        """Loss of every target in nats, (B,T) float32, 0 where targets is -1; and the gates (n_layer,B,T)."""
        h, gates, _, _ = self.trunk(idx, image)
        real = targets != -1
        losses = torch.zeros(targets.shape, device=idx.device)
        losses[real] = F.cross_entropy(self.logits(h[real]).float(), targets[real], reduction="none")
        return losses, gates

    def anneal(self, progress):
        """Hard gates: temperature 1.0 -> 0.1, linear in the share of caption steps done (0 to 1), constant after 80%."""
        self.gate_temperature.fill_(1.0 - 0.9 * min(progress / 0.8, 1.0))

    def n_parameter(self):
        return sum(p.numel() for p in self.parameters())  # a tied matrix counts once

    def generate(self, idx, max_new_tokens, image=None, temperature=1.0, top_k=None, eot=None, use_cache=True):
        """Continue idx (B,T), or caption image (B,K,image_dim) when idx is <eot>: (B, T + new). temperature 0 takes the best
        token. Ends at max_new_tokens, at a full block, or when every row has produced eot (rows that end early repeat it)."""
        done = torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
        # per layer the keys and values of self- and cross-attention; Block.look adds the sum of its text, trunk the encoded image
        cache = [{"self": {}, "image": {}} for _ in self.blocks] if use_cache else None
        with evaluating(self):
            for step in range(min(max_new_tokens, self.config.block_size - idx.size(1))):
                h, _, _, _ = self.trunk(idx[:, -1:] if use_cache and step else idx, image, cache)
                logits = self.logits(h[:, -1]).float()  # (B, V)
                if temperature == 0:
                    token = logits.argmax(dim=-1)  # (B,)
                else:
                    if top_k:
                        least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                        logits = logits.masked_fill(logits < least, -math.inf)
                    token = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1)[:, 0]
                if eot is not None:
                    token = token.masked_fill(done, eot)
                    done = done | (token == eot)
                idx = torch.cat([idx, token[:, None]], dim=1)
                if done.all():
                    break
        return idx


# ----------------------------------------------------------------------------------------------------------------------
# 8. devices, save and load

def pick_device(wanted, local_rank=0):
    """torch.device of "cpu", "cuda", "mps" or "auto" (the best there is); InputError when it is not there."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(wanted, local_rank) if wanted == "cuda" else torch.device(wanted)
        torch.zeros(1, device=device)
        if wanted == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {wanted} is not there: {str(error).splitlines()[0]}") from error
    return device


def compiled(model):
    """torch.compile of the model without its head loss: the number of real targets differs in every batch. (Not a decorator on
    HeadLoss, which would load the compiler at every start of every script.)"""
    HeadLoss.forward = staticmethod(torch.compiler.disable(HeadLoss.forward))
    return torch.compile(model)


def save_checkpoint(path, checkpoint, previous=None):
    """Write a dict of plain values and tensors; a crash or a full disk leaves the old file or the new one, never half of one. The
    old one stays under the name previous, if one is given."""
    part = f"{path}.part"
    try:
        with open(part, "wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of a full disk
        if os.path.exists(part):
            os.unlink(part)
        raise InputError(f"{path}: cannot be written ({str(error).splitlines()[0]}); what was saved before is as it was") from error
    if previous and os.path.exists(path):
        os.replace(path, previous)
    os.replace(part, path)


def load_checkpoint(path):
    """Read what save_checkpoint wrote, onto the CPU. weights_only: a file from a stranger can hold numbers, never code."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such checkpoint; train one with train.py")
    try:
        with zipfile.ZipFile(path) as parts:  # torch does not look at the checksums of its own format
            damaged = parts.testzip()
        checkpoint = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different class for every way a file can be damaged
        raise InputError(f"{path}: not a readable checkpoint ({type(error).__name__})") from error
    if damaged:
        raise InputError(f"{path}: not a readable checkpoint (the checksum of its part {damaged} is wrong)")
    if not isinstance(checkpoint, dict) or not {"model", "model_config"} <= set(checkpoint):
        raise InputError(f"{path}: not a gatevlm checkpoint (no 'model' and 'model_config' in it)")
    return checkpoint


def load_model(run, checkpoint="best.pt", device="cpu"):
    """The model of a run folder, in eval mode: load_model("out/toy")."""
    path = os.path.join(run, checkpoint)
    state = load_checkpoint(path)
    try:
        model = GateVLM(GateVLMConfig(**state["model_config"])).to(device)
        model.load_state_dict(state["model"])
    except (TypeError, AttributeError, RuntimeError, KeyError, InputError) as error:
        raise InputError(f"{path}: made by another version of gatevlm: {str(error).splitlines()[0]}") from error
    return model.eval()
