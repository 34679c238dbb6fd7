"""Speed, as ratios: python tests/bench.py [--device cuda] [name ...]

Both sides of a ratio are timed alternately in one run, and every figure is a median, so that a noisy machine
disturbs them alike. Not part of the test suite.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import eval as evaluation
import train
from gatevlm import Elision, GateVLM, GateVLMConfig

PREPARE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "prepare_data.py")

def seconds(function, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start

def alternate(functions, args):
    """Median seconds of each function, timed in turn after one warm-up round."""
    rounds = [[seconds(function, args.device) for function in functions] for _ in range(args.repeat + 1)][1:]
    return [statistics.median(times) for times in zip(*rounds)]

# ---- what the model is compared with
class PaddedVLM(nn.Module):
    """The usual way to build the paper's model: nn.MultiheadAttention, every line padded to the block under
    an explicit mask, an image for every batch (zeros where it is text)."""

    def __init__(self, c):
        super().__init__()
        D, attend = c.n_embd, lambda: nn.MultiheadAttention(c.n_embd, c.n_head, batch_first=True)
        self.token, self.position = nn.Embedding(c.vocab_size, D), nn.Embedding(c.block_size, D)
        shape = dict(dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        layer = nn.TransformerEncoderLayer(D, c.n_head, 4 * D, **shape)
        self.project = nn.Linear(c.image_dim, D)
        self.encoder = nn.TransformerEncoder(layer, c.n_image_layer, enable_nested_tensor=False)
        norms = lambda: {f"ln{i}": nn.LayerNorm(D) for i in range(1, 5)}
        parts = lambda: {"attn": attend(), "cross": attend(), "gate": nn.Linear(2 * D, D)}
        mlp = lambda: nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))
        self.blocks = nn.ModuleList(
            nn.ModuleDict(norms() | parts() | {"mlp": mlp()}) for _ in range(c.n_layer)
        )
        self.ln, self.head = nn.LayerNorm(D), nn.Linear(D, c.vocab_size, bias=False)
        self.head.weight = self.token.weight
        nn.init.normal_(self.token.weight, std=0.02)

    def forward(self, idx, image, targets):
        T = idx.size(1)
        hidden = torch.ones(T, T, dtype=torch.bool, device=idx.device).triu(1)  # what a position may not see
        image, h = self.encoder(self.project(image)), self.token(idx) + self.position.weight[:T]
        for b in self.blocks:
            x, padding = b["ln1"](h), targets == -1
            h = h + b["attn"](x, x, x, attn_mask=hidden, key_padding_mask=padding, need_weights=False)[0]
            t = b["ln2"](h)
            v = b["cross"](t, image, image, need_weights=False)[0]
            g = torch.sigmoid(b["gate"](torch.cat([t, v], dim=-1)))
            h = h + b["ln4"](g * t + (1 - g) * v)
            h = h + b["mlp"](b["ln3"](h))
        loss = F.cross_entropy(self.head(self.ln(h)).flatten(0, 1), targets.flatten(), ignore_index=-1)
        return SimpleNamespace(losses=loss)

class BareDecoder(nn.Module):
    """A text decoder and nothing else, as nanoGPT's: one product for query, key and value."""

    def __init__(self, c):
        super().__init__()
        D, self.n_head = c.n_embd, c.n_head
        self.token, self.position = nn.Embedding(c.vocab_size, D), nn.Embedding(c.block_size, D)
        linears = lambda: {"qkv": nn.Linear(D, 3 * D), "proj": nn.Linear(D, D), "fc": nn.Linear(D, 4 * D)}
        parts = lambda: linears() | {
            "out": nn.Linear(4 * D, D), "ln1": nn.LayerNorm(D), "ln2": nn.LayerNorm(D),
        }
        self.blocks = nn.ModuleList(nn.ModuleDict(parts()) for _ in range(c.n_layer))
        self.ln, self.head = nn.LayerNorm(D), nn.Linear(D, c.vocab_size, bias=False)
        self.head.weight = self.token.weight
        nn.init.normal_(self.token.weight, std=0.02)

    def forward(self, idx, image, targets):
        h = self.token(idx) + self.position.weight[: idx.size(1)]
        for b in self.blocks:
            qkv = b["qkv"](b["ln1"](h)).chunk(3, dim=-1)
            q, k, v = (x.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for x in qkv)  # (B, nh, T, hs)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            h = h + b["proj"](y.transpose(1, 2).flatten(2))
            h = h + b["out"](F.gelu(b["fc"](b["ln2"](h)), approximate="tanh"))
        return SimpleNamespace(losses=F.cross_entropy(self.head(self.ln(h)).flatten(0, 1), targets.flatten()))

def stepper(model, device):
    """A function that makes one AdamW step on idx, image and targets; compiled and in bfloat16 on a GPU."""
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    forward = torch.compile(model, dynamic=True) if device.type == "cuda" else model

    def step(idx, image, targets, *elision):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            losses = forward(idx, image, targets, *elision).losses
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return losses.detach()

    return step

# ---- figures
def against_padding(args):
    """Useful tokens per second over the usual way, with as many parameters, the GPT-2 vocabulary, and as many
    positions in a step: its rows hold a line each and padding, ours packed text or captions of one length."""
    sizes = dict(n_layer=4, n_head=4, n_embd=256, n_image_layer=2, dropout=0.0)
    config, rows = GateVLMConfig(vocab_size=50257, **sizes), 256 if args.device.type == "cuda" else 16
    ours, usual = GateVLM(config), PaddedVLM(config)
    n, m = (sum(p.numel() for p in model.parameters()) for model in (ours, usual))
    assert abs(n - m) < 0.05 * n, (n, m)
    our_step, usual_step, figures = stepper(ours, args.device), stepper(usual, args.device), {}
    for name, line in ("text", 10), ("caption", 14):  # 9 words of speech to a child or 13 of a caption, <eot>
        padded = torch.randint(50257, (rows, 128), device=args.device)
        targets = padded.masked_fill(torch.arange(128, device=args.device) >= line, -1)
        image = torch.randn(rows, 1, 768, device=args.device) * (name == "caption")
        T = 128 if name == "text" else line
        idx = torch.randint(50257, (rows * 128 // T, T), device=args.device)
        own = torch.randn(len(idx), 1, 768, device=args.device) if name == "caption" else None
        both = [lambda: our_step(idx, own, idx), lambda: usual_step(padded, image, targets)]
        fast, slow = alternate(both, args)
        figures[f"{name}_vs_padded"] = (idx.numel() / fast) / (rows * line / slow)
    return figures

def against_bare(args):
    """Seconds of a training step over those of a bare decoder of the same shape (preset small)."""
    config = GateVLMConfig(vocab_size=8192, n_layer=6, n_head=6, n_embd=384, n_image_layer=3, dropout=0.0)
    n_token = 16384 if args.device.type == "cuda" else 2048
    ours, bare = stepper(GateVLM(config), args.device), stepper(BareDecoder(config), args.device)
    text = torch.randint(8192, (n_token // 128, 128), device=args.device)
    captions = torch.randint(8192, (n_token // 14, 14), device=args.device)
    image = torch.randn(len(captions), 1, 768, device=args.device)
    a, b, c, d = alternate(
        [
            lambda: ours(text, None, text), lambda: bare(text, None, text),
            lambda: ours(captions, image, captions), lambda: bare(captions, None, captions),
        ],
        args,
    )
    print(f"against a bare decoder, {n_token} tokens: text {a:.3f}, {b:.3f} s, captions {c:.3f}, {d:.3f} s")
    return {"text_vs_bare": a / b, "caption_vs_bare": c / d}

def train_steps(args):
    """Seconds of an elided training step over a dense one at the paper's width: 14-token captions, half of
    each kept, with all that an elided step needs besides (scores, choice, books)."""
    B, T, k, device = (1024 if args.device.type == "cuda" else 128), 14, 7, args.device
    step = stepper(GateVLM(GateVLMConfig(vocab_size=8192, dropout=0.1)), device)
    elision = Elision(train.TrainConfig(elide="regate", teacher="a run"), B * T, torch.rand(B * T)).to(device)
    idx, image = torch.randint(8192, (B, T), device=device), torch.randn(B, 1, 768, device=device)
    place = torch.arange(B * T, device=device).view(B, T)

    def elided(visible):
        keep = elision.choose(place, idx != -1, k)
        losses = step(idx, image, idx, keep, visible)
        elision.update(place.gather(1, keep).flatten(), losses.flatten())

    dense, gone, seen = alternate(
        [lambda: step(idx, image, idx), lambda: elided(False), lambda: elided(True)], args
    )
    print(
        f"training steps, {k} of {T} tokens kept: dense {dense:.2f} s, elided {gone:.2f}, visible {seen:.2f}"
    )
    return {
        "elided_step": gone / dense, "elided_cycle": (16 + 112 * gone / dense) / 128,
        "visible_step": seen / dense,
    }

def muon_step(args):
    """Seconds of an optimizer step of the toy preset over those of forward and backward, captions of 15
    tokens."""
    values = {f: v for f, v in train.TOY.items() if f in GateVLMConfig.__dataclass_fields__}
    model = GateVLM(config := GateVLMConfig(**values, vocab_size=389)).to(args.device).train()
    optimizers = train.make_optimizers(model, train.TrainConfig(optimizer="muon", lr=1e-5)).values()
    idx = torch.randint(config.vocab_size, (train.TOY["batch_tokens"] // 15, 15), device=args.device)
    image = torch.randn(len(idx), config.n_image_token, config.image_dim, device=args.device)
    gradients = lambda: model(idx, image, idx).losses.mean().backward()
    step, gradient = alternate([lambda: [optimizer.step() for optimizer in optimizers], gradients], args)
    print(f"muon_step: {1000 * step:.0f} ms beside {1000 * gradient:.0f} ms of forward and backward")
    return {"muon_step": step / gradient}

def batched_eval(args):
    """Sentences per second of eval.py's scoring over one sentence at a time: made-up pairs that differ in a
    word."""
    sizes = dict(vocab_size=8192, n_layer=6, n_head=4, n_embd=256, n_image_token=0, dropout=0.0)
    model, rng, items = GateVLM(GateVLMConfig(**sizes)).to(args.device).eval(), np.random.default_rng(1), []
    for _ in range(3000):
        good = (rng.zipf(1.3, rng.integers(6, 19)) % 8000).tolist()
        bad = [*good[:-2], 7, good[-1]]
        items.append({"context": "", "options": [" ".join(map(str, x)) for x in (good, bad)], "image": None})
    encoding = SimpleNamespace(eot_token=8191, encode_ordinary=lambda text: list(map(int, text.split())))
    alone = [[8191, *encoding.encode_ordinary(text)] for item in items[::30] for text in item["options"]]

    @torch.no_grad()
    def one_by_one():
        for ids in alone:
            idx = torch.tensor([ids], device=args.device)
            logp = model(idx[:, :-1]).logits.log_softmax(dim=-1)  # (1, T, V)
            logp.gather(-1, idx[:, 1:, None]).sum().item()

    fast, slow = alternate([lambda: evaluation.score(model, items, encoding), one_by_one], args)
    print(f"batched_eval: {2 * len(items) / fast:.0f} sentences/s, {len(alone) / slow:.0f} one at a time")
    return {"batched_eval": (2 * len(items) / fast) / (len(alone) / slow)}

def utilisation(args):
    """Training steps on text blocks of 128: the share of the machine's own matrix product rate that they
    reach, counting 6 operations for each weight and token, and attention's."""
    figures, cuda = {}, args.device.type == "cuda"
    side, n_token = (8192, 16384) if cuda else (1024, 1024)
    a = torch.randn(side, side, device=args.device, dtype=torch.bfloat16 if cuda else torch.float32)
    for preset in "small", "paper":
        values = {f: v for f, v in train.PRESETS[preset].items() if f in GateVLMConfig.__dataclass_fields__}
        config = GateVLMConfig(**values, vocab_size=8192)
        step, D, T = stepper(GateVLM(config), args.device), config.n_embd, config.block_size
        idx = torch.randint(8192, (n_token // T, T), device=args.device)
        weights = config.n_layer * 12 * D * D + D * config.vocab_size
        work = n_token * (6 * weights + config.n_layer * 6 * T * D)  # causal: half of T x T
        taken, product = alternate([lambda: step(idx, None, idx), lambda: a @ a], args)
        print(f"utilisation, {preset}: {n_token / taken:,.0f} tokens/s, {work / taken / 1e12:.3f} Tflop/s")
        figures[f"utilisation_{preset}"] = (work / taken) / (2 * side**3 / product)
    return figures

def peak_memory(args):
    """GiB at the peak of a training step of the paper's model, 8,192 caption tokens, GPT-2's vocabulary,
    AdamW. On a CPU: of the whole process, so this one runs best alone."""
    step = stepper(GateVLM(GateVLMConfig(vocab_size=50257)), args.device)
    idx = torch.randint(50257, (585, 14), device=args.device)
    image = torch.randn(585, 1, 768, device=args.device)
    for _ in range(2):
        step(idx, image, idx)
    cpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated() if args.device.type == "cuda" else cpu
    return {"peak_memory_gib": peak / 2**30}

def growth(args):
    """prepare_data.py babylm on 1, 4 and 16 times as much made-up data (the last: --megabytes of text and 500
    captions with 768 numbers each per megabyte): seconds and peak resident memory."""
    figures, letters = {}, np.array(list("abcdefghijklmnopqrstuvwxyz"))
    for times in 1, 4, 16:
        with tempfile.TemporaryDirectory() as root:
            megabytes, rng = args.megabytes * times / 16, np.random.default_rng(times)
            os.makedirs(os.path.join(root, "text_only", "train"))
            os.makedirs(os.path.join(root, "image_caption"))
            words = np.array(["".join(rng.choice(letters, n)) for n in rng.integers(1, 10, 50000)])
            draw = lambda n: words[rng.zipf(1.2, n).clip(max=50000) - 1]
            with open(os.path.join(root, "text_only", "train", "a.train"), "w") as f:
                while f.tell() < megabytes * 1e6:
                    f.writelines(" ".join(line) + ".\n" for line in draw(100000).reshape(-1, 10))
            n = int(500 * megabytes)
            with open(os.path.join(root, "image_caption", "a_captions.json"), "w") as f:
                json.dump([" ".join(line) for line in draw(12 * n).reshape(n, 12)], f)
            path = os.path.join(root, "image_caption", "a_states.npy")
            states = np.lib.format.open_memmap(path, "w+", np.float32, (n, 768))
            for i in range(0, n, 1000):
                states[i : i + 1000] = rng.standard_normal((len(states[i : i + 1000]), 768))
            del states
            start, out = time.perf_counter(), os.path.join(root, "data")
            subprocess.run(
                [sys.executable, PREPARE, "babylm", root, "--out", out], check=True, capture_output=True
            )
            taken = time.perf_counter() - start
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
            print(f"growth: {megabytes:.0f} MB, {n:,} captions: {taken:.0f} s, {peak:.2f} GiB")
            figures |= {f"prepare_seconds_{times}x": taken, f"prepare_gib_{times}x": peak}
    return figures

BENCHES = dict(against_padding=against_padding, against_bare=against_bare, train_steps=train_steps)
BENCHES |= dict(muon_step=muon_step, batched_eval=batched_eval)
SLOW = dict(utilisation=utilisation, peak_memory=peak_memory, growth=growth)  # only when named

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    names = f"some of {', '.join(BENCHES)} (default: all these), {', '.join(SLOW)}"
    parser.add_argument("name", nargs="*", help=names)
    parser.add_argument("--device", type=torch.device, default="cpu")
    parser.add_argument("--repeat", type=int, default=5, help="rounds behind each median")
    parser.add_argument("--megabytes", type=int, default=64, help="growth: text of its largest size")
    args = parser.parse_args()
    kind, n = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    cpu = f"{platform.machine()} CPU with {kind}, {n} threads"
    machine = torch.cuda.get_device_name() if args.device.type == "cuda" else cpu
    print(f"{machine}, torch {torch.__version__}, medians of {args.repeat}")
    torch.manual_seed(1)
    figures = {}
    for name in args.name or BENCHES:
        figures |= (BENCHES | SLOW)[name](args)
    for name, figure in figures.items():
        print(f"{name:20} {figure:.2f}")

if __name__ == "__main__":
    main()
