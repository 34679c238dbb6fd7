"""
Train a gated vision-language model: python train.py [--preset NAME] [--flag value] ...

From top to bottom: configuration and presets, flags, order of data, optimizers, the loop, main.
A run folder holds config.json, log.jsonl, last.pt (for --resume), best.pt (lowest validation loss),
summary.json, pictures, and the tokenizer and meta.json of its data.
"""
import argparse
import difflib
import json
import math
import os
import re
import shutil
import signal
import time
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, fields
from functools import lru_cache

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import eval as evaluation
import prepare_data
from gatevlm import Elision, GateVLM, GateVLMConfig, InputError, check, expect, load_checkpoint, option
from gatevlm import pick_device, run_script, save_checkpoint

# ---- configuration: the defaults are those of Looking to Learn
ORDERS = {"alternate": "TC", "mixed": "M", "caption-only": "C", "text-only": "T"}  # times --epochs

@dataclass
class TrainConfig:
    preset: str = option("toy", "start values", ("toy", "patches", "laptop", "evening", "small", "paper"))
    data: str = option("data/babylm", "of prepare_data.py; data/toy and data/toy16 are made if missing")
    init: str = option("", "run folder from which to take weights of the same name and shape")
    out: str = option("", "run folder to write; empty = out/<preset>")
    seed: int = option(1, "seed of weights, dropout and data order")
    curriculum: str = option("alternate", f"epochs, T text, C captions, M mixed, or {', '.join(ORDERS)}")
    epochs: int = option(10, "epochs of each kind in a named curriculum", least=1)
    mix: float = option(4.0, "M epochs: caption steps per text step; 0.1: ten text steps to one", least=0.01)
    max_steps: int = option(0, "end the schedule after so many steps; 0 = the whole curriculum")
    images: bool = option(True, "--no-images trains on captions as text, without any image module")
    batch_tokens: int = option(8192, "tokens per step, over all parts and GPUs", least=1)
    grad_accum: int = option(1, "parts of a step, to save memory", least=1)
    optimizer: str = option("adamw", "muon = Muon for hidden matrices, AdamW for the rest", ("adamw", "muon"))
    lr: float = option(5e-5, "peak learning rate", least=1e-12)
    warmup_steps: int = option(12000, "steps of linear warm-up before the cosine to zero")
    weight_decay: float = option(0.01, "decay of matrices, per step and learning rate")
    beta2: float = option(0.999, "AdamW: decay of the squared gradient average")
    elide: str = option("none", "token elision: its score", ("none", "regate", "ema", "ref", "random"))
    elide_by: str = option("target", "elide: the score that keeps a token", ("target", "own"))
    teacher: str = option("", "run folder of a text-only teacher; elide becomes regate")
    keep_ratio: float = option(0.5, "elide: share of each caption that an elided step runs", least=1e-6)
    elide_visible: bool = option(False, "elide: dropped tokens stay visible to self-attention")
    elide_warmup: int = option(100, "elide: dense steps before the first cycle")
    elide_cycle: int = option(128, "elide: steps of a cycle", least=1)
    elide_dense: int = option(16, "elide: dense steps that begin a cycle")
    elide_lambda: float = option(0.5, "elide: weight of the teacher's loss")
    elide_beta: float = option(0.9, "elide: decay of the moving average")
    eval_interval: int = option(250, "steps between validation losses and writes of last.pt", least=1)
    eval_tokens: int = option(50000, "validation tokens of each kind per evaluation", least=1)
    log_interval: int = option(10, "steps between lines of log.jsonl", least=1)
    keep_checkpoints: bool = option(False, "keep weights of evaluations, epochs, BabyLM's word counts")
    stop_after: int = option(0, "save and stop after this step; 0 = do not")
    device: str = option("auto", "cpu, cuda, mps, or auto for the best there is")
    compile: bool = option(True, "torch.compile on cuda")

    def __post_init__(self):
        check(self)
        expect(set(self.kinds) <= set("TCM"), f"curriculum: expected letters T, C, M or {', '.join(ORDERS)}")
        expect(self.teacher or self.elide not in ("regate", "ref"), f"--elide {self.elide} needs a --teacher")
        expect(max(self.beta2, self.elide_beta) < 1, "beta2 and elide_beta must be below 1")
        expect(self.keep_ratio <= 1 and self.seed < 2**32, "keep_ratio must be at most 1, seed below 2**32")

    @property
    def kinds(self):  # the curriculum spelled out, a letter an epoch
        return ORDERS.get(self.curriculum, "") * self.epochs or self.curriculum

# The quick presets gate per token: one number for each word can be checked against a picture.
QUICK = dict(n_layer=4, n_head=4, block_size=64, gate="soft-token", curriculum="mixed", batch_tokens=1024)
QUICK |= dict(optimizer="muon", warmup_steps=100, weight_decay=0.05, beta2=0.99, eval_tokens=20000)
TOY = QUICK | dict(data="data/toy", n_embd=128, n_image_layer=1, dropout=0.0, mix=8, epochs=2, lr=3e-3)
PATCHES = TOY | dict(data="data/toy16", n_image_token=16, image_encoder="mlp")
LAPTOP = QUICK | dict(n_embd=192, n_image_layer=2, mix=2, epochs=4, lr=2e-3)
EVENING = QUICK | dict(n_layer=6, n_embd=192, n_image_layer=1, dropout=0.0, mix=0.1, epochs=3, lr=4e-3)
EVENING |= dict(batch_tokens=4096, weight_decay=0.1)
SMALL = EVENING | dict(n_head=6, n_embd=384, block_size=128, dropout=0.1, epochs=8, batch_tokens=16384)
PRESETS = dict(toy=TOY, patches=PATCHES, laptop=LAPTOP, evening=EVENING, small=SMALL, paper={})
FROM_DATA = ("vocab_size", "image_dim")  # what only the data can know
# what can change with --resume
FREE = "data device compile lr epochs max_steps grad_accum stop_after keep_checkpoints eval_interval".split()

# ---- flags: every field of both configs is one
def parse(argv):
    """Command line -> (resume, {flag: value}). An unknown flag names the nearest one."""
    options = dict(usage="python train.py [--preset NAME] [--flag value] ...", allow_abbrev=False)
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, **options)
    parser.add_argument("--resume", default=False, action="store_true", help="go on with --out, or start it")
    for f in (*fields(TrainConfig), *fields(GateVLMConfig)):
        values = {name: p[f.name] for name, p in PRESETS.items() if f.name in p}
        values = {"paper" if values else "default": f.default} | values
        text = f.metadata["help"] + f" ({', '.join(f'{name}: {value}' for name, value in values.items())})"
        typed = dict(type=f.type, choices=f.metadata["choices"])
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else typed
        if f.name not in FROM_DATA:
            parser.add_argument(f"--{f.name}", help=text, **kind)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], parser._option_string_actions, n=1)
        raise InputError(f"unknown {unknown[0]}" + "".join(f"; did you mean {flag}?" for flag in near))
    flags = vars(args)
    return flags.pop("resume"), flags

def make_configs(values, data):
    """(TrainConfig, GateVLMConfig) of field values; what only the data knows comes from its meta.json."""
    n, values = data.meta["n_image_token"], values | {name: data.meta[name] for name in FROM_DATA}
    if not values.get("images", True):
        n = values["n_image_token"] = 0
    expect(values.setdefault("n_image_token", n) == n, f"{data.folder} has {n} image tokens per picture")
    build = lambda config: config(**{f.name: values[f.name] for f in fields(config) if f.name in values})
    return build(TrainConfig), build(GateVLMConfig)

# ---- order of data: a function of (seed, epoch), so that the step alone tells where a run stands
def epoch_plan(letter, epoch, config, block_size, data):
    """Batches of an epoch: ("T", starts of text blocks (n,)) and ("C", captions (n,) of about one length)."""
    rng = np.random.default_rng([config.seed, epoch])
    text, captions = [], []
    if letter in "TM":
        n, n_row = len(data.text["train"]) - 1, max(1, config.batch_tokens // block_size)
        expect(n >= block_size, f"{data.folder}: {n + 1} tokens of text; try --curriculum caption-only")
        starts = rng.integers(n % block_size + 1) + block_size * rng.permutation(n // block_size)
        text = [("T", starts[i : i + n_row]) for i in range(0, len(starts), n_row)]
    if letter in "CM":
        order = rng.permutation(len(data.image_row["train"]))
        expect(len(order), f"{data.folder}: no captions; try --curriculum text-only")
        length = data.lengths("train", block_size, order)
        captions = [("C", order[pick]) for pick in evaluation.length_batches(length, config.batch_tokens)]
        captions = [captions[i] for i in rng.permutation(len(captions))]
    if letter != "M":
        return text + captions
    n, mixed = round(max(config.mix, 1 / config.mix)), []
    one, other = (captions, text) if config.mix >= 1 else (text, captions)
    for i, batch in enumerate(one, 1):  # the other starts over when it is used up
        mixed += [batch] if i % n else [batch, other[(i // n - 1) % len(other)]]
    return mixed

def learning_rate(step, config, n_step):
    """Linear warm-up, then a cosine towards zero."""
    warm = min(config.warmup_steps, n_step)
    share = max(0, step - warm) / max(1, n_step - warm)
    return config.lr * min((step + 1) / max(1, warm), 0.5 + 0.5 * math.cos(math.pi * share))

# ---- optimizers
def orthogonal(x):
    """Matrices x (n,rows,columns) -> about their orthogonal factors U V^T: five Newton-Schulz steps
    x <- a x + b (x x^T) x + c (x x^T)^2 x bring all but tiny singular values to between 0.6 and 1.3."""
    if x.size(1) > x.size(2):
        return orthogonal(x.mT).mT  # so that x x^T is as small as can be
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value above 1
    if x.is_cuda and torch.cuda.is_bf16_supported(False):
        x = x.bfloat16()
        for _ in range(5):
            A = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(A, A, A, beta=b, alpha=c), x, beta=a)
        return x
    # Elsewhere float32: CPUs without bfloat16 instructions are 20 times slower with it. It is exact enough to
    # step on the small A = x x^T alone: x <- P x makes it P A P. The end is Q x, Q the product of all P.
    for i in range(5):
        A = P @ A @ P if i else x @ x.mT
        P = torch.baddbmm(A, A, A, beta=b, alpha=c)
        P.diagonal(dim1=1, dim2=2).add_(a)
        Q = P @ Q if i else P
    return Q @ x

class Muon(torch.optim.Optimizer):
    """Nesterov momentum made orthogonal: a step moves a matrix equally far in every direction (Jordan 2024).
    Scaled to AdamW's step, so that one learning rate suits both (torch.optim.Muon's match_rms_adamw)."""

    def __init__(self, params, lr, weight_decay, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            same = {}  # shape -> [(parameter, update)], for few large products
            for p in group["params"]:
                if p.grad is not None:  # a text batch leaves the image modules alone
                    if not self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                    m = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                    same.setdefault(p.shape, []).append((p, p.grad.lerp(m, group["momentum"])))
            for shape, pairs in same.items():
                scale = group["lr"] * 0.2 * math.sqrt(max(shape))  # U V^T has entries of max(shape) ** -0.5
                updates = orthogonal(torch.stack([update for _, update in pairs]))
                for (p, _), update in zip(pairs, updates):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(scale * update)

def make_optimizers(model, config):
    """{name: optimizer}: AdamW, and Muon for the hidden matrices. Vectors and scalars do not decay."""
    linears = [(name, m.weight) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    muon = config.optimizer == "muon"
    hidden = {p: name for name, p in linears if muon and name != "head" and ".gate." not in name}
    rest = [p for p in model.parameters() if p not in hidden]
    groups = [dict(params=[p for p in rest if p.dim() >= 2], weight_decay=config.weight_decay)]
    groups += [dict(params=[p for p in rest if p.dim() < 2], weight_decay=0.0)]
    adamw = torch.optim.AdamW(groups, config.lr, (0.9, config.beta2), fused=rest[0].device.type != "mps")
    return {"adamw": adamw} | ({"muon": Muon([*hidden], config.lr, config.weight_decay)} if muon else {})

# ---- the loop
def teacher_losses(config, data, device):
    """Loss in nats of every training caption token under a text-only model (n_token,); beyond its block 0."""
    model, offset = evaluation.load_teacher(config.teacher, data, device), data.offset["train"]
    losses, ids = torch.zeros(len(data.captions["train"])), np.arange(len(offset) - 1)
    for i, (loss, _) in zip(ids, evaluation.caption_losses(model, data, "train", ids, "none")):
        losses[offset[i] : offset[i] + len(loss)] = torch.from_numpy(loss)
    return losses

@torch.no_grad()
def take_weights(model, run, data):
    """Copy from a run what fits by name and shape, and positions that both have; print what does not."""
    a, b = (meta["sha256"]["tokenizer.tiktoken"] for meta in (prepare_data.load_meta(run), data.meta))
    expect(a == b, f"--init {run}: its tokenizer is not that of {data.folder}")
    old, fresh = load_checkpoint(os.path.join(run, "best.pt"))["model"], {}
    for name, new in model.named_parameters():
        source = old.get(name)
        if name == "position_embedding.weight":
            source, new = source[: len(new)], new[: len(source)]
        if source is not None and source.shape == new.shape:
            new.copy_(source)
        else:
            fresh[re.sub(r"\.\d+|\.[^.]*$", "", name)] = True  # blocks.0.attn.proj.bias: blocks.attn.proj
    print(f"weights are those of {run}, but fresh: {', '.join(fresh) or 'none'}")

class Run:
    """A run. Its state is parts (model, optimizers, elision) and now, whose step says where it stands."""

    def __init__(self, config, model_config, data, state, device, rank, world):
        self.config, self.data, self.block_size = config, data, model_config.block_size
        self.device, self.rank, self.world, self.caught = device, rank, world, []
        torch.manual_seed(config.seed)
        self.model = self.forward = GateVLM(model_config).to(device)
        if model_config.n_image_token and len(rows := np.unique(data.image_row["train"])):
            few = data.images(rows[:: math.ceil(len(rows) / 2000)])
            self.model.image_encoder.measure(torch.from_numpy(few))
        if config.init and not state:
            take_weights(self.model, config.init, data)
        self.optimizers, self.elision = make_optimizers(self.model, config), None
        self.parts = {"model": self.model, **self.optimizers}
        if config.elide != "none":
            teacher = teacher_losses(config, data, device) if config.teacher and not state else None
            self.elision = Elision(config, len(data.captions["train"]), teacher).to(device)
            self.parts["elision"] = self.elision  # with the teacher's losses: it is asked once
        # the schedule, a letter a step: how many batches an epoch has depends on lengths only
        self.plan = lru_cache(1)(lambda letter, n: epoch_plan(letter, n, config, self.block_size, data))
        kinds = {letter: "".join(kind for kind, _ in self.plan(letter, 0)) for letter in set(config.kinds)}
        self.schedule = "".join(kinds[letter] for letter in config.kinds)[: config.max_steps or None]
        self.starts = np.cumsum([0, *(len(kinds[letter]) for letter in config.kinds)])  # of epochs, in steps
        counts = "step tokens_seen tokens_processed words_seen seconds best_step".split()
        self.now = dict.fromkeys(counts, 0) | {"best": None}
        if state:  # what is to come can be another schedule, what has been cannot
            self.now |= state["now"]
            fits = self.now["step"] <= len(self.schedule)
            expect(fits, f"{config.out} is at step {self.now['step']}: its past cannot change")
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
        if config.compile and device.type == "cuda":
            self.forward = torch.compile(self.model, dynamic=True)  # captions differ in length
        if self.world > 1:  # a text batch leaves the image modules without gradients
            self.forward = DDP(self.forward, find_unused_parameters=True)
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(False)
        self.precision = torch.autocast(device.type, torch.bfloat16, enabled=bf16)

    def log(self, **line):
        if self.rank == 0:
            with open(os.path.join(self.config.out, "log.jsonl"), "a", encoding="utf-8") as f:
                f.write(json.dumps({"step": self.now["step"], **line}) + "\n")

    def save(self, name, parts=("model",), **more):
        if self.rank == 0:
            configs = dict(config=asdict(self.config), model_config=asdict(self.model.config))
            states = {part: self.parts[part].state_dict() for part in parts}
            save_checkpoint(os.path.join(self.config.out, name), now=self.now | more, **configs, **states)

    def gather(self, *tensors):  # those of every process, one after the other; they may differ in length
        everyone = [tensors]
        if self.world > 1:
            everyone = [None] * self.world
            dist.all_gather_object(everyone, [x.cpu() for x in tensors])
        return [torch.cat(parts).to(self.device) for parts in zip(*everyone)]

    def gradients(self, kind, rows, elided):
        """Forward and backward of a batch: this process takes every world-th row, in grad_accum parts; all
        give the gradient of the mean. Returns losses (2,: language, contrastive); the share of tokens run."""
        c, m, world, losses = self.config, self.model.config, self.world, torch.zeros(2, device=self.device)
        length = np.full(len(rows), self.block_size)
        if kind == "C":
            length = self.data.lengths("train", self.block_size, rows)
        k = self.elision.n_keep(length.mean()) if elided else self.block_size  # run per row
        n, n_run = int(length.sum()), int(np.minimum(length, k).sum())
        for micro in range(c.grad_accum):
            mine = rows[micro * world + self.rank :: c.grad_accum * world]
            share = len(mine) / len(rows)  # a process without rows takes part with weight 0
            mine = mine if share else rows[:1]
            batch = self.data.batch(kind, "train", mine, self.block_size)
            idx, targets, place = (torch.from_numpy(x).to(self.device) for x in batch)
            image = None
            if kind == "C" and m.n_image_token:
                image = torch.from_numpy(self.data.images(self.data.image_row["train"][mine])).to(self.device)
            keep = self.elision.choose(place, targets != -1, min(k, place.size(1))) if elided else None
            last = world == 1 or micro == c.grad_accum - 1
            with nullcontext() if last else self.forward.no_sync():
                with self.precision:
                    out = self.forward(idx, image, targets, keep, c.elide_visible)
                language, contrastive = out.losses.sum() * bool(share) / n_run, share * out.contrastive
                ((language + m.contrastive_weight * contrastive) * world).backward()  # DDP takes the mean
            losses += torch.stack([language, contrastive]).detach()
            if self.elision and kind == "C":  # every process keeps the same books
                if elided:
                    targets, place = targets.gather(1, keep), place.gather(1, keep)
                ran = (targets != -1) & bool(share)
                self.elision.update(*self.gather(place[ran], out.losses.detach()[ran]))
        if world > 1:
            dist.all_reduce(losses)
        self.now["tokens_seen"] += n
        self.now["words_seen"] += n * self.data.meta["words_per_token"][kind]
        self.now["tokens_processed"] += n_run
        return losses, n_run / n

    def evaluate(self, epoch):
        """Validation losses; best.pt has the lowest of captions, of text where no captions are trained."""
        if self.rank == 0:
            losses, now = evaluation.validate(self.model, self.data, self.config.eval_tokens), self.now
            self.log(epoch=epoch, **losses)
            text = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items() if loss is not None)
            tqdm.write(f"step {now['step']:,}, {now['seconds'] / 60:.1f} min: {text}")
            loss = losses["val_loss_text" if set(self.config.kinds) == {"T"} else "val_loss_caption"]
            if None in (loss, now["best"]) or loss < now["best"]:  # nothing held out: the last is the best
                now |= dict(best=loss, best_step=now["step"])
                self.save("best.pt")

def train(run):
    """Run the schedule from where the run stands. False when it was stopped."""
    c, now, schedule, clock = run.config, run.now, run.schedule, time.perf_counter()
    # what changes at 1M, 2M, ... 10M, 20M, ... words, where BabyLM wants checkpoints
    millions = lambda words: words // 10 ** max(6, int(math.log10(max(1, words))))
    n_step, steps = len(schedule), range(now["step"], len(schedule))
    for step in tqdm(steps, initial=now["step"], total=n_step, disable=run.rank > 0 or None):
        # what is the batch, and do all of its tokens run?
        epoch = int(np.searchsorted(run.starts, step, "right")) - 1
        kind, rows = run.plan(c.kinds[epoch], epoch)[step - run.starts[epoch]]
        nth = schedule.count(kind, 0, step)  # batches of its kind that came before
        elided = run.elision is not None and kind == "C" and not run.elision.is_dense(nth)

        # forward, backward, step. Noise is a function of (seed, step, rank): a resumed run draws the same
        torch.manual_seed((c.seed * 1_000_003 + step) * run.world + run.rank)
        run.model.train()
        if kind == "C":
            run.model.anneal(nth / schedule.count("C"))
        words, ((loss, contrastive), kept) = now["words_seen"], run.gradients(kind, rows, elided)
        norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), max_norm=1.0)
        lr = learning_rate(step, c, n_step)
        for optimizer in run.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        # log, evaluate, save
        now["step"] = step = step + 1
        stop = bool(run.caught) or step == c.stop_after
        if run.world > 1:  # a signal may reach one process a step before another
            dist.all_reduce(stop := torch.tensor(float(stop), device=run.device))
        due = lambda interval: step == n_step or step % interval == 0
        ends, mark = step in run.starts, millions(words) != millions(now["words_seen"])
        keeps = c.keep_checkpoints and (ends or mark or due(c.eval_interval))
        if due(c.log_interval) or due(c.eval_interval) or keeps or stop:
            name = {"T": "loss_text", "C": "loss_caption"}[kind] if kept == 1 else "loss_kept"
            numbers = {name: loss.item(), "contrastive": contrastive.item(), "grad_norm": norm.item()}
            expect(math.isfinite(sum(numbers.values())), f"NaN or inf by step {step}: --resume, a lower --lr")
            now["seconds"] += time.perf_counter() - clock  # evaluating and saving do not count
            if due(c.log_interval):
                run.log(n_step=n_step, epoch=epoch, kind=kind, lr=lr, kept=kept, **numbers, **now)
            if due(c.eval_interval):
                run.evaluate(epoch)
            if keeps:
                run.save(f"checkpoints/step_{step:08}.pt", epoch=epoch, kind=c.kinds[epoch], ends_epoch=ends)
            if due(c.eval_interval) or stop:
                run.save("last.pt", run.parts)
            clock = time.perf_counter()
        if stop and step < n_step:
            print(f"stopped and saved; go on with: python train.py --resume --out {c.out}")
            return False
    return True

# ---- main
def settle(resume, flags, out):
    """(values of fields, checkpoint or None) of a run to start in folder out, or to go on with."""
    last = os.path.join(out, "last.pt")
    expect(not os.path.exists(os.path.join(out, "image.npy")), f"--out {out} holds data")
    if not os.path.exists(last):
        values = PRESETS[flags.get("preset", "toy")] | flags
        if values.get("teacher"):
            values.setdefault("elide", "regate")
        return values, None
    expect(resume, f"{out} holds a run: --resume goes on with it, --out starts another")
    state, known = load_checkpoint(last), asdict(TrainConfig()).keys()
    expect(state.get("config", {}).keys() == known, f"{last}: not of a run of this version of gatevlm")
    values = state["model_config"] | state["config"]
    for name, value in flags.items():
        fixed = f"--{name} {value}: the run in {out} has {values[name]}; only {', '.join(FREE)} may change"
        expect(name in FREE or value == values[name], fixed)
    return values | flags, state

def begin(run, resumed):
    """What a run folder holds before the first step."""
    c, out, step = run.config, run.config.out, run.now["step"]
    os.makedirs(f"{out}/checkpoints", exist_ok=True)
    for name in "tokenizer.tiktoken", "meta.json":
        shutil.copy(os.path.join(run.data.folder, name), out)
    prepare_data.write_json(f"{out}/config.json", {"train": asdict(c), "model": asdict(run.model.config)})
    lines = evaluation.read_log(out) if resumed else []
    with open(f"{out}/log.jsonl", "w", encoding="utf-8") as f:  # but for steps that were not saved
        f.writelines(json.dumps(line) + "\n" for line in lines if line["step"] <= step)
    if not resumed:
        run.save("last.pt", run.parts)
    n, lr = sum(map(torch.numel, run.model.parameters())), learning_rate(step, c, len(run.schedule))
    print(f"{n:,} parameters on {run.device}; step {step:,} of {len(run.schedule):,}, lr {lr:.2g}")

def main(argv=None):
    """Start or resume a run; returns its summary, or None where it stopped."""
    resume, flags = parse(argv)
    out = os.path.normpath(flags.pop("out", "") or os.path.join("out", flags.get("preset", "toy")))
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    values, state = settle(resume, flags, out)
    folder = values.get("data", TrainConfig.data)
    if rank == 0 and os.path.basename(folder) in ("toy", "toy16") and not os.path.exists(folder):
        prepare_data.main(["toy", "--out", folder, "--n_image_token", "16" if folder.endswith("16") else "1"])
    device = pick_device(values.get("device", "auto"), int(os.environ.get("LOCAL_RANK", 0)))
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        dist.barrier()  # until the first process has made the data
    data = prepare_data.Data(folder)
    same = not state or prepare_data.load_meta(out)["sha256"] == data.meta["sha256"]
    expect(same, f"{folder}: not the data of the run in {out}")
    run = Run(*make_configs(values | {"out": out}, data), data, state, device, rank, world)
    if rank == 0:
        begin(run, bool(state))
    signals = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}
    with ExitStack() as after:  # the handlers of before are put back; nohup ignores SIGHUP
        for s in (s for s in signals if signal.getsignal(s) != signal.SIG_IGN):
            after.callback(signal.signal, s, signal.signal(s, lambda number, _: run.caught.append(number)))
        done = train(run)
    if world > 1:
        dist.barrier()  # a process that ended while gloo still held a tensor of it would abort
        dist.destroy_process_group()
    if rank or not done:
        return None
    if run.elision and run.model.gated and "C" in run.schedule:  # what a step drops
        evaluation.gate_picture(f"{out}/kept.png", run.model, data, 0, "train", run.elision.cpu())
    _, summary = evaluation.evaluate(out, device)
    evaluation.print_table([{name: x for name, x in summary.items() if ":" not in name}])  # without groups
    return summary

if __name__ == "__main__":
    run_script(main)
