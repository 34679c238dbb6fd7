"""Speed, as ratios: python tests/bench.py [--device cuda] [--json] [name ...]. Both sides of a ratio are timed alternately in one run, and
every figure is a median, so that a noisy machine disturbs them alike. Not part of the test suite.
"""
import argparse
import json
import os
import platform
import statistics
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import numpy as np
import torch

import eval as evaluation
from gatevlm import GateVLM, GateVLMConfig, keep_best
from prepare_data import load_tokenizer


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
    (optimizer,) = model.optimizers(1e-5, 0.01)
    forward = torch.compile(model) if device.type == "cuda" else model
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


BENCHES = {"batched_eval": batched_eval, "train_steps": train_steps}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("name", nargs="*", help=f"what to measure: {', '.join(BENCHES)} (default: all)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeat", type=int, default=5, help="rounds behind each median")
    parser.add_argument("--babylm_eval", default="", help="an evaluation_data/full_eval folder, to score the real sentences, minutes a round (--repeat 1); needs --data")
    parser.add_argument("--data", default="", help="a data or run folder, for its tokenizer")
    parser.add_argument("--json", action="store_true", help="end with one JSON object of all figures")
    args = parser.parse_args()
    for name in args.name:
        if name not in BENCHES:
            parser.error(f"{name}: expected some of {', '.join(BENCHES)}")
    device = torch.device(args.device)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    print(f"{machine}, torch {torch.__version__}, medians of {args.repeat}")
    torch.manual_seed(1)
    figures = {}
    for name in args.name or BENCHES:
        figures |= BENCHES[name](args, device)
    for name, figure in figures.items():
        print(f"{name:20} {figure:.2f}")
    if args.json:
        print(json.dumps({"device": machine, "torch": torch.__version__, **figures}))


if __name__ == "__main__":
    main()
