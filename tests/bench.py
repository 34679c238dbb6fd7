"""Speed, as ratios: python tests/bench.py [--device cuda] [--json] [name ...]. Both sides of a ratio are timed alternately in one run, and
every figure is a median, so that a noisy machine disturbs them alike. Not part of the test suite.
"""
import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import eval as evaluation
import train
from gatevlm import GateVLM, GateVLMConfig, compiled, keep_best
from prepare_data import Data, load_tokenizer

PREPARE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "prepare_data.py")


def seconds(function, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def alternate(functions, device, repeat):
    """Median seconds of each function, timed in turn after one warm-up round."""
    rounds = [[seconds(function, device) for function in functions] for _ in range(repeat + 1)][1:]
    return [statistics.median(times) for times in zip(*rounds)]


class PaddedVLM(nn.Module):
    """The usual way to build the paper's model: nn.MultiheadAttention, every line padded to the block under an explicit mask, an image for
    every batch (zeros where it is text), all logits."""

    def __init__(self, c):
        super().__init__()
        D = c.n_embd
        self.token, self.position = nn.Embedding(c.vocab_size, D), nn.Embedding(c.block_size, D)
        layer = nn.TransformerEncoderLayer(D, c.n_head, 4 * D, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.project, self.encoder = nn.Linear(c.image_dim, D), nn.TransformerEncoder(layer, c.n_image_layer, enable_nested_tensor=False)
        attention = lambda: nn.MultiheadAttention(D, c.n_head, batch_first=True)
        self.blocks = nn.ModuleList(nn.ModuleDict(
            {"ln1": nn.LayerNorm(D), "attn": attention(), "ln2": nn.LayerNorm(D), "cross": attention(), "gate": nn.Linear(2 * D, D), "ln4": nn.LayerNorm(D),
             "ln3": nn.LayerNorm(D), "mlp": nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))}) for _ in range(c.n_layer))
        self.ln, self.head = nn.LayerNorm(D), nn.Linear(D, c.vocab_size, bias=False)
        self.head.weight = self.token.weight
        nn.init.normal_(self.token.weight, std=0.02)

    def forward(self, idx, targets, image):
        T = idx.size(1)
        hidden = torch.ones(T, T, dtype=torch.bool, device=idx.device).triu(1)  # what a position may not see
        image, h = self.encoder(self.project(image)), self.token(idx) + self.position.weight[:T]
        for b in self.blocks:
            x = b["ln1"](h)
            h = h + b["attn"](x, x, x, attn_mask=hidden, key_padding_mask=targets == -1, need_weights=False)[0]
            t = b["ln2"](h)
            v = b["cross"](t, image, image, need_weights=False)[0]
            g = torch.sigmoid(b["gate"](torch.cat([t, v], dim=-1)))
            h = h + b["ln4"](g * t + (1 - g) * v)
            h = h + b["mlp"](b["ln3"](h))
        return None, F.cross_entropy(self.head(self.ln(h)).flatten(0, 1), targets.flatten(), ignore_index=-1)


class BareDecoder(nn.Module):
    """A text decoder and nothing else, in nanoGPT's shape."""

    def __init__(self, c):
        super().__init__()
        D, self.n_head = c.n_embd, c.n_head
        self.token, self.position = nn.Embedding(c.vocab_size, D), nn.Embedding(c.block_size, D)
        self.blocks = nn.ModuleList(nn.ModuleDict({"ln1": nn.LayerNorm(D), "qkv": nn.Linear(D, 3 * D), "proj": nn.Linear(D, D), "ln2": nn.LayerNorm(D),
                                                   "fc": nn.Linear(D, 4 * D), "out": nn.Linear(4 * D, D)}) for _ in range(c.n_layer))
        self.ln, self.head = nn.LayerNorm(D), nn.Linear(D, c.vocab_size, bias=False)
        self.head.weight = self.token.weight
        nn.init.normal_(self.token.weight, std=0.02)

    def forward(self, idx, targets, image):
        h = self.token(idx) + self.position.weight[:idx.size(1)]
        for b in self.blocks:
            q, k, v = (x.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for x in b["qkv"](b["ln1"](h)).chunk(3, dim=-1))  # (B, nh, T, hs)
            h = h + b["proj"](F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
            h = h + b["out"](F.gelu(b["fc"](b["ln2"](h)), approximate="tanh"))
        return None, F.cross_entropy(self.head(self.ln(h)).flatten(0, 1), targets.flatten())


def stepper(model, device):
    """A function that makes one AdamW step of a model on idx, targets and image; compiled and in bfloat16 on a GPU, as train.py does."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    forward = compiled(model) if device.type == "cuda" else model

    def step(idx, targets, image):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            _, loss = forward(idx, targets, image)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def against_padding(args, device):
    """Useful tokens per second over the usual way, with as many parameters, the GPT-2 vocabulary, and as many positions in a step: its rows hold
    one line each and padding up to 128 tokens, ours hold packed text or captions of one length."""
    config = GateVLMConfig(vocab_size=50257, n_layer=4, n_head=4, n_embd=256, n_image_layer=2, dropout=0.0)
    rows = 256 if device.type == "cuda" else 16
    ours, usual = GateVLM(config).to(device).train(), PaddedVLM(config).to(device).train()
    n, m = (sum(p.numel() for p in model.parameters()) for model in (ours, usual))
    assert abs(n - m) < 0.05 * n, (n, m)
    our_step, usual_step = stepper(ours, device), stepper(usual, device)
    figures = {}
    for name, line in ("text", 10), ("caption", 14):  # 9 words of child-directed speech or 13 of a caption, and <eot>
        padded = torch.randint(50257, (rows, 128), device=device)
        targets = padded.masked_fill(torch.arange(128, device=device) >= line, -1)
        image = torch.randn(rows, 1, 768, device=device) * (name == "caption")
        T = 128 if name == "text" else line
        idx = torch.randint(50257, (rows * 128 // T, T), device=device)
        ours_image = torch.randn(len(idx), 1, 768, device=device) if name == "caption" else None
        fast, slow = alternate([lambda: our_step(idx, idx, ours_image), lambda: usual_step(padded, targets, image)], device, args.repeat)
        print(f"{name}_vs_padded: {n:,} and {m:,} parameters; {idx.numel() / fast:,.0f} against {rows * line / slow:,.0f} useful tokens/s, lines of {line} tokens")
        figures[f"{name}_vs_padded"] = (idx.numel() / fast) / (rows * line / slow)
    return figures


def against_bare(args, device):
    """Time of a training step over that of a bare decoder with the same depth, width, vocabulary and tokens (preset small)."""
    config = GateVLMConfig(vocab_size=8192, n_layer=6, n_head=6, n_embd=384, n_image_layer=3, dropout=0.0)
    n_token = 16384 if device.type == "cuda" else 1024
    ours, bare = stepper(GateVLM(config).to(device).train(), device), stepper(BareDecoder(config).to(device).train(), device)
    text = torch.randint(8192, (n_token // 128, 128), device=device)
    captions = torch.randint(8192, (n_token // 14, 14), device=device)
    image = torch.randn(len(captions), 1, 768, device=device)
    a, b, c, d = alternate([lambda: ours(text, text, None), lambda: bare(text, text, None), lambda: ours(captions, captions, image),
                            lambda: bare(captions, captions, None)], device, args.repeat)
    print(f"against a bare decoder, {n_token} tokens: text {a:.3f} and {b:.3f} s, captions with one image token {c:.3f} and {d:.3f} s")
    return {"text_vs_bare": a / b, "caption_vs_bare": c / d}


@torch.no_grad()
def kv_cache(args, device):
    """Time without the key-value cache over time with it, at the width of preset laptop: for one more token after 127, and for all 128."""
    model = GateVLM(GateVLMConfig(vocab_size=4096, block_size=128, n_layer=4, n_head=4, n_embd=192, n_image_layer=2, gate="soft-token")).to(device).eval()
    idx, image = torch.randint(4096, (1, 128), device=device), torch.randn(1, 1, 768, device=device)
    cache = [{"self": {}, "image": {}} for _ in model.blocks]
    model.trunk(idx[:, :127], image, cache)
    last = lambda h: model.logits(h[:, -1])
    slow, fast, whole, cached = alternate([
        lambda: [last(model.trunk(idx, image)[0]) for _ in range(10)],
        lambda: [last(model.trunk(idx[:, -1:], image, [{"self": dict(c["self"]), "image": dict(c["image"]), **({"encoded": c["encoded"]} if "encoded" in c else {})}
                                                       for c in cache])[0]) for _ in range(10)],
        lambda: model.generate(idx[:, :1], 127, image, 0, use_cache=False), lambda: model.generate(idx[:, :1], 127, image, 0)], device, args.repeat)
    print(f"kv_cache: the 128th token in {1e2 * fast:.1f} ms, without the cache in {1e2 * slow:.1f} ms; 127 tokens in {cached:.2f} and {whole:.2f} s")
    return {"kv_cache": slow / fast, "kv_cache_whole_text": whole / cached}


def sentences(args):
    """Token ids of sentence pairs: the real BLiMP and supplement when --babylm_eval and --data are given, otherwise made up:
    6 to 18 tokens, the second sentence of a pair differing in one."""
    if args.babylm_eval:
        encoding = load_tokenizer(args.data)
        items = [item for task in ("blimp", "supplement") for item in evaluation.read_task(args.babylm_eval, task)]
        return [(encoding.eot_token, *encoding.encode_ordinary(text)) for item in items for text in item["options"]], encoding.n_vocab
    rng, pairs = np.random.default_rng(1), []
    for _ in range(20000):
        good = rng.zipf(1.3, rng.integers(6, 19)) % 8000
        bad = good.copy()
        bad[rng.integers(len(bad))] = rng.integers(8000)
        pairs += [(8191, *good.tolist()), (8191, *bad.tolist())]
    return pairs, 8192


@torch.no_grad()
def batched_eval(args, device):
    """Sentences per second of eval.py's scoring over one sentence at a time, 7M parameters."""
    every, vocab_size = sentences(args)
    model = GateVLM(GateVLMConfig(vocab_size=max(vocab_size, 8192), n_layer=6, n_head=4, n_embd=256, n_image_token=0, dropout=0.0)).to(device).eval()
    batch = every if args.babylm_eval else every[:6000]  # the real benchmark is scored whole, because many of its sentences begin alike
    batch = list(dict.fromkeys(batch))
    alone = batch[::len(batch) // 200]

    def one_by_one():
        for ids in alone:
            idx = torch.tensor([ids], device=device)
            logp = model(idx[:, :-1])[0].float().log_softmax(dim=-1)  # (1, T, V)
            logp.gather(-1, idx[:, 1:, None]).sum().item()
    fast, slow = alternate([lambda: evaluation.score(model, [(None, ids, 1) for ids in batch]), one_by_one], device, args.repeat)
    print(f"batched_eval: {len(batch) / fast:.0f} sentences/s batched, {len(alone) / slow:.0f} one at a time; {model.n_parameter():,} parameters, "
          f"{np.mean([len(ids) - 1 for ids in batch]):.1f} tokens per sentence{'' if args.babylm_eval else ', made up'}")
    return {"batched_eval": (len(batch) / fast) / (len(alone) / slow)}


def train_steps(args, device):
    """Median seconds of a dense and of an elided training step at the paper's width: 14-token captions, half of each kept, with all that an
    elided step needs besides (scores, selection, the moving average)."""
    B, T, k = (1024 if device.type == "cuda" else 128), 14, 7
    config = GateVLMConfig(vocab_size=8192, dropout=0.1)
    model = GateVLM(config).to(device).train()
    (optimizer,) = train.make_optimizers(model, train.TrainConfig())
    forward = compiled(model) if device.type == "cuda" else model
    idx, targets = torch.randint(8192, (2, B, T), device=device)
    image = torch.randn(B, 1, config.image_dim, device=device)
    difficulty, reference = torch.rand(2, B * T, device=device)
    place = torch.arange(B * T, device=device).view(B, T)

    def step(elided, visible=False):
        keep, at = None, place
        if elided:
            keep = keep_best(difficulty[place] + 0.5 * reference[place], targets != -1, k)
            at = place.gather(1, keep)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            _, loss = forward(idx, targets, image, keep, visible=visible)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        difficulty[at.flatten()] = 0.9 * difficulty[at.flatten()] + 0.1 * model.target_losses
    dense, elided, visible = alternate([lambda: step(False), lambda: step(True), lambda: step(True, True)], device, args.repeat)
    print(f"training steps: {model.n_parameter():,} parameters, {B} captions of {T} tokens, {k} kept: dense {dense:.2f} s, elided {elided:.2f} s, "
          f"elided with the dropped tokens visible {visible:.2f} s")
    return {"elided_step": elided / dense, "elided_cycle": (16 + 112 * elided / dense) / 128, "elided_step_visible": visible / dense}


def muon_step(args, device):
    """Seconds of an optimizer step of the toy preset (Muon and AdamW) against those of forward and backward, on captions of 15 tokens."""
    values = train.PRESETS["toy"]
    config = GateVLMConfig(**{f: v for f, v in values.items() if f in GateVLMConfig.__dataclass_fields__}, vocab_size=389)
    model = GateVLM(config).to(device).train()
    optimizers = train.make_optimizers(model, train.TrainConfig(optimizer="muon", lr=1e-5))
    idx, targets = torch.randint(config.vocab_size, (2, values["batch_tokens"] // 15, 15), device=device)
    image = torch.randn(len(idx), config.n_image_token, config.image_dim, device=device)
    step, gradients = alternate([lambda: [x.step() for x in optimizers], lambda: model(idx, targets, image)[1].backward()], device, args.repeat)
    print(f"muon_step: {1000 * step:.0f} ms beside {1000 * gradients:.0f} ms of forward and backward")
    return {"muon_step": step / gradients}


def utilisation(args, device):
    """Training steps on text blocks of 128: tokens per second, and the share of the machine's own matrix product rate that they reach, counting
    6 operations for each weight and token, and attention's."""
    rate = torch.randn(2, 8192 if device.type == "cuda" else 1024, 8192 if device.type == "cuda" else 1024, device=device)
    rate = rate.to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    figures = {}
    for preset in "small", "paper":
        values = {f: v for f, v in train.PRESETS[preset].items() if f in GateVLMConfig.__dataclass_fields__}
        config = GateVLMConfig(**values, vocab_size=8192)
        n_token = 16384 if device.type == "cuda" else 1024
        step = stepper(GateVLM(config).to(device).train(), device)
        idx = torch.randint(8192, (n_token // config.block_size, config.block_size), device=device)
        D, T = config.n_embd, config.block_size
        work = n_token * (6 * (config.n_layer * 12 * D * D + D * config.vocab_size) + config.n_layer * 6 * T * D)  # causal: half of T x T
        taken, product = alternate([lambda: step(idx, idx, None), lambda: rate[0] @ rate[1]], device, args.repeat)
        print(f"utilisation, preset {preset}: {n_token / taken:,.0f} tokens/s, {work / taken / 1e12:.3f} of {2 * rate.size(1) ** 3 / product / 1e12:.3f} Tflop/s")
        figures[f"utilisation_{preset}"] = (work / taken) / (2 * rate.size(1) ** 3 / product)
    return figures


def peak_memory(args, device):
    """GiB at the peak of a training step of the paper's model, 8,192 caption tokens, GPT-2 vocabulary, with all that AdamW keeps. On a CPU: of
    the whole process, so this one runs best alone."""
    config = GateVLMConfig(vocab_size=50257)
    step = stepper(GateVLM(config).to(device).train(), device)
    idx, image = torch.randint(50257, (585, 14), device=device), torch.randn(585, 1, 768, device=device)
    for _ in range(2):
        step(idx, idx, image)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak_memory_gib": peak / 2**30}


def growth(args, device):
    """prepare_data.py babylm and the start of an epoch on 1, 4 and 16 times as much made-up data (the last: --megabytes of text, and 500 captions with
    768 numbers each per megabyte): seconds and peak resident memory."""
    figures = {}
    with tempfile.TemporaryDirectory() as root:
        for times in 1, 4, 16:
            folder, megabytes, rng = os.path.join(root, str(times)), args.megabytes * times / 16, np.random.default_rng(times)
            os.makedirs(os.path.join(folder, "text_only", "train"))
            os.makedirs(os.path.join(folder, "image_caption"))
            letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
            words = np.array(["".join(rng.choice(letters, n)) for n in rng.integers(1, 10, 50000)])
            with open(os.path.join(folder, "text_only", "train", "a.train"), "w") as f:
                while f.tell() < megabytes * 1e6:
                    drawn = words[rng.zipf(1.2, 100000).clip(max=50000) - 1]
                    f.writelines(" ".join(drawn[i:i + 10]) + ".\n" for i in range(0, len(drawn), 10))
            n = int(500 * megabytes)
            with open(os.path.join(folder, "image_caption", "made_up_captions.json"), "w") as f:
                json.dump([" ".join(words[rng.zipf(1.2, 12).clip(max=50000) - 1]) for _ in range(n)], f)
            states = np.lib.format.open_memmap(os.path.join(folder, "image_caption", "made_up_states.npy"), "w+", np.float32, (n, 768))
            for i in range(0, n, 1000):
                states[i:i + 1000] = rng.standard_normal((len(states[i:i + 1000]), 768))
            del states
            start, data = time.perf_counter(), os.path.join(root, f"data{times}")
            child = os.fork()
            if not child:
                os.execv(sys.executable, [sys.executable, PREPARE, "babylm", folder, "--out", data])
            _, status, used = os.wait4(child, 0)
            assert status == 0
            taken = time.perf_counter() - start
            opened = Data(data)
            epoch = min(seconds(lambda: train.epoch_plan("M", 0, train.TrainConfig(), 128, opened), device) for _ in range(3))
            order = min(seconds(lambda: np.argsort(-np.random.default_rng(1).permutation(opened.lengths("train", 128)), kind="stable"), device) for _ in range(3))
            print(f"growth: {megabytes:.0f} MB of text, {n:,} captions: {taken:.0f} s, peak {used.ru_maxrss / 2**20:.2f} GiB; start of an epoch {epoch:.3f} s, "
                  f"its permutation and sorting alone {order:.3f} s", flush=True)
            figures |= {f"prepare_seconds_{times}x": taken, f"prepare_gib_{times}x": used.ru_maxrss / 2**20, f"epoch_start_seconds_{times}x": epoch}
            shutil.rmtree(folder)
            shutil.rmtree(data)
    return figures


BENCHES = {"against_padding": against_padding, "against_bare": against_bare, "train_steps": train_steps, "muon_step": muon_step, "batched_eval": batched_eval, "kv_cache": kv_cache}
SLOW = {"utilisation": utilisation, "peak_memory": peak_memory, "growth": growth}  # only when named


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("name", nargs="*", help=f"what to measure: {', '.join(BENCHES)} (default: all these), {', '.join(SLOW)}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeat", type=int, default=5, help="rounds behind each median")
    parser.add_argument("--babylm_eval", default="", help="an evaluation_data/full_eval folder, to score the real sentences, minutes a round (--repeat 1); needs --data")
    parser.add_argument("--data", default="", help="a data or run folder, for its tokenizer")
    parser.add_argument("--megabytes", type=int, default=64, help="growth: text of the largest of its three sizes")
    parser.add_argument("--json", action="store_true", help="end with one JSON object of all figures")
    args = parser.parse_args()
    for name in args.name:
        if name not in BENCHES | SLOW:
            parser.error(f"{name}: expected some of {', '.join(BENCHES | SLOW)}")
    device = torch.device(args.device)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else (
        f"{platform.machine()} CPU with {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    print(f"{machine}, torch {torch.__version__}, medians of {args.repeat}")
    torch.manual_seed(1)
    figures = {}
    for name in args.name or BENCHES:
        figures |= (BENCHES | SLOW)[name](args, device)
    for name, figure in figures.items():
        print(f"{name:20} {figure:.2f}")
    if args.json:
        print(json.dumps({"device": machine, "torch": torch.__version__, **figures}))


if __name__ == "__main__":
    main()
