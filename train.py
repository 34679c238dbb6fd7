"""Train a gated vision-language model: python train.py [--preset toy|patches|laptop|small|paper] [--flag value] (see --help).

In reading order: the configuration and its presets, flags, the order in which data is seen, token elision, the loop, the summary.
A run folder holds config.json, log.jsonl, last.pt, previous.pt, best.pt, loss.png, gates.png, summary.json and a copy of the tokenizer
and of the data's meta.json; with token elision also kept.png, with --keep_checkpoints checkpoints/.
"""
import argparse
import difflib
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import eval as evaluation
import prepare_data
from gatevlm import GateVLM, GateVLMConfig, InputError, Parser, check_fields, compiled, keep_best, keep_sampled, load_checkpoint, load_model, option, pick_device, run_script, save_checkpoint

# ----------------------------------------------------------------------------------------------------------------------
# configuration

ORDERS = {"alternate": lambda n: "TC" * n, "text-first": lambda n: "T" * n + "C" * n, "caption-first": lambda n: "C" * n + "T" * n,
          "mixed": lambda n: "M" * n, "caption-only": lambda n: "C" * n, "text-only": lambda n: "T" * n}


# regate: the student's moving average + lambda * the teacher's loss; ema, ref: one of the two alone; loss-only: regate's choice, but every
# token is run; priority: regate's score as a sampling weight, with losses weighted to stay unbiased
ELIDE = ("none", "regate", "ema", "ref", "random", "loss-only", "priority")
WITH_TEACHER = ("regate", "ref", "loss-only", "priority")


@dataclass
class TrainConfig:
    """How to train; the defaults are the paper's (Looking to Learn)."""
    data: str = option("", "data folder made by prepare_data.py; empty = data/toy, or data/toy16 with 16 image tokens, made if missing")
    out: str = option("", "run folder to write; empty = out/<preset>")
    seed: int = option(1, "seed of weights, dropout and data order")
    curriculum: str = option("alternate", "epochs in order, such as TCTC (T text, C captions, M mixed steps), or a named order: " + ", ".join(ORDERS))
    epochs: int = option(10, "epochs of each kind that a named order expands to")
    mix: int = option(4, "caption steps for each text step in an M epoch")
    elide: str = option("none", "how the tokens to run are chosen (ReGATE and controls)", ELIDE)
    teacher: str = option("", "run folder of a teacher without image modules, trained on the same data; its losses score the tokens (elide becomes regate)")
    keep_ratio: float = option(0.5, "elide: share of each caption that an elided step runs (p)")
    elide_warmup: int = option(100, "elide: dense steps before the first cycle")
    elide_cycle: int = option(128, "elide: steps of a cycle (C)")
    elide_dense: int = option(16, "elide: dense steps that begin a cycle (F)")
    elide_lambda: float = option(0.5, "elide: weight of the teacher's loss beside the student's own difficulty")
    elide_beta: float = option(0.9, "elide: decay of the moving average of the student's loss")
    elide_tail: float = option(0.0, "elide: share of the steps, at the end, that are dense")
    elide_text: bool = option(False, "elide: text blocks too")
    elide_visible: bool = option(False, "elide: dropped tokens stay visible as keys and values")
    max_steps: int = option(0, "end the schedule after this many steps; 0 = the whole curriculum")
    images: bool = option(True, "show the images; --no-images trains on the captions as text, without any image module")
    batch_tokens: int = option(8192, "tokens per step, over all micro-batches and GPUs")
    grad_accum: int = option(1, "micro-batches that a step is split into, to save memory; a contrastive loss compares within one")
    length_multiple: int = option(8, "captions are padded to a multiple of this many tokens, so that torch.compile meets few shapes")
    optimizer: str = option("adamw", "muon = Muon for the hidden matrices and AdamW for the rest", ("adamw", "muon"))
    lr: float = option(5e-5, "peak learning rate")
    warmup_steps: int = option(12000, "steps of linear warm-up before the cosine to zero")
    weight_decay: float = option(0.01, "AdamW decay of matrices, per step and learning rate")
    beta2: float = option(0.999, "AdamW decay of the squared gradient average")
    grad_clip: float = option(1.0, "largest gradient norm; longer gradients are scaled down; 0 = off")
    eval_interval: int = option(1000, "steps between validation losses; best.pt keeps the lowest")
    eval_tokens: int = option(50000, "validation tokens of each kind per evaluation; the summary uses all")
    log_interval: int = option(10, "steps between lines of log.jsonl")
    save_interval: int = option(1000, "steps between writes of last.pt")
    keep_checkpoints: bool = option(False, "also keep the weights of every evaluation and every epoch's end, for eval.py --checkpoints")
    stop_after: int = option(0, "save and stop after this step, to go on later with --resume; 0 = do not")
    device: str = option("auto", "cpu, cuda, mps, or auto for the best there is")
    autocast: bool = option(True, "bfloat16 on cuda cards that have it")
    compile: bool = option(True, "torch.compile on cuda")

    def __post_init__(self):
        check_fields(self, positive=("lr", "epochs", "mix", "batch_tokens", "grad_accum", "length_multiple", "eval_interval",
                                     "eval_tokens", "log_interval", "save_interval", "elide_cycle"))
        if self.beta2 >= 1:
            raise InputError(f"beta2 must be below 1, not {self.beta2}")
        if self.seed >= 2 ** 32:  # step and rank are mixed into it, and torch takes 64 bits
            raise InputError(f"seed must be below {2 ** 32}, not {self.seed}")
        if not 0 < self.keep_ratio <= 1 or self.elide_beta >= 1 or self.elide_tail > 1 or self.elide_dense > self.elide_cycle:
            raise InputError("expected 0 < keep_ratio <= 1, elide_beta below 1, elide_tail at most 1 and elide_dense at most elide_cycle, not "
                             f"{self.keep_ratio}, {self.elide_beta}, {self.elide_tail} and {self.elide_dense} of {self.elide_cycle}")
        if self.elide in WITH_TEACHER and not self.teacher:
            raise InputError(f"--elide {self.elide} needs the losses of a text-only teacher: --teacher RUN, trained with --no-images on the same data")
        if self.curriculum not in ORDERS and (not self.curriculum or set(self.curriculum) - set("TCM")):
            raise InputError(f"curriculum must be made of the letters T, C and M or be one of {', '.join(ORDERS)}, not {self.curriculum!r}")

    def epoch_kinds(self):
        return ORDERS[self.curriculum](self.epochs) if self.curriculum in ORDERS else self.curriculum


# The quick presets gate per token: one number for each word is what a reader can check against a picture.
QUICK = dict(n_layer=4, n_head=4, block_size=64, gate="soft-token", curriculum="mixed", batch_tokens=1024, length_multiple=1, optimizer="muon",
             warmup_steps=100, weight_decay=0.05, beta2=0.99, eval_interval=250, save_interval=250)
TOY = QUICK | dict(n_embd=128, n_image_layer=1, dropout=0.0, mix=8, epochs=2, lr=3e-3)
REAL = dict(data="data/babylm")
PRESETS = {
    "toy": TOY,
    "patches": TOY | dict(n_image_token=16, image_encoder="mlp"),
    "laptop": REAL | QUICK | dict(n_embd=192, n_image_layer=2, mix=2, epochs=4, lr=2e-3, eval_tokens=20000),
    "small": REAL | dict(n_layer=6, n_head=6, n_embd=384, n_image_layer=3, epochs=4, batch_tokens=16384, lr=6e-4, warmup_steps=200,
                         weight_decay=0.1, beta2=0.95, eval_interval=250, save_interval=250),
    "paper": REAL,
}
FROM_DATA = ("vocab_size", "image_dim")  # fields that only the data can know
FREE = ("stop_after", "device", "compile", "log_interval", "eval_interval", "save_interval", "keep_checkpoints")  # may change when a run is resumed


# ----------------------------------------------------------------------------------------------------------------------
# flags: every field of both configs is one

def make_parser():
    parser = Parser(description="Train a gated vision-language model. Without flags: the toy world, in minutes, on any machine.",
                    usage="python train.py [--preset NAME] [--flag value] ...", allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--preset", default="toy", choices=PRESETS, help="set of values, shown at each flag below, which the other flags change (default: toy)")
    parser.add_argument("--resume", action="store_true", default=False, help="go on with the run in --out from its last.pt, to the bit; where nothing is saved yet, start it")
    for title, config in ("training", TrainConfig), ("model", GateVLMConfig):
        group = parser.add_argument_group(title)
        for f in fields(config):
            if f.name in FROM_DATA:
                continue
            kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=f.type, choices=f.metadata["choices"])
            if not f.metadata["choices"] and f.type is not bool:
                kind["metavar"] = {int: "N", float: "X", str: "S"}[f.type]
            values = {name: preset[f.name] for name, preset in PRESETS.items() if f.name in preset}
            default = "; ".join([f"default: {'empty' if f.default == '' else f.default}"] + [f"{name}: {value}" for name, value in values.items()])
            group.add_argument(f"--{f.name}", help=f"{f.metadata['help']} ({default})", **kind)
    return parser


def parse(argv):
    """Command line -> (preset, resume, explicit flags {name: value}). An unknown flag names the nearest one."""
    parser = make_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown and not unknown[0].startswith("-"):
        raise InputError(f"unexpected {unknown[0]}: every value follows its --flag, and a switch is --flag or --no-flag alone")
    if unknown:
        known = [flag for action in parser._actions for flag in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1, cutoff=0)
        raise InputError(f"unknown flag {unknown[0]}; did you mean {near[0]}?")
    flags = vars(args)
    return flags.pop("preset"), flags.pop("resume"), flags


def make_configs(values, data):
    """(TrainConfig, GateVLMConfig) of a dict of field values; what only the data knows comes from its meta."""
    values = values | {name: data.meta[name] for name in FROM_DATA}
    if not values.get("images", True):
        values["n_image_token"] = 0
    elif values.setdefault("n_image_token", data.meta["n_image_token"]) != data.meta["n_image_token"]:
        raise InputError(f"--n_image_token {values['n_image_token']}, but {data.folder} has {data.meta['n_image_token']} image tokens per picture")
    return (TrainConfig(**{f.name: values[f.name] for f in fields(TrainConfig) if f.name in values}),
            GateVLMConfig(**{f.name: values[f.name] for f in fields(GateVLMConfig) if f.name in values}))


# ----------------------------------------------------------------------------------------------------------------------
# data order: a pure function of (seed, epoch), so (epoch, cursor) is all that a checkpoint has to remember

def epoch_plan(kind, epoch, config, block_size, data):
    """The global batches of one epoch: a list of ("T", text starts (n,)) and ("C", caption ids (n,))."""
    rng = np.random.default_rng([config.seed, epoch])
    text, captions = [], []
    if kind in "TM":
        n = len(data.text["train"]) - 1
        if n < block_size:
            raise InputError(f"{data.folder}: {n + 1} tokens of text are too few for blocks of {block_size}; use --curriculum caption-only or a smaller --block_size")
        starts = rng.integers(n % block_size + 1) + block_size * rng.permutation(n // block_size)  # n % block_size are left over
        n_row = max(1, config.batch_tokens // block_size)
        text = [("T", starts[i:i + n_row]) for i in range(0, len(starts), n_row)]
    if kind in "CM":
        length = data.lengths("train", block_size)
        if not len(length):
            raise InputError(f"{data.folder}: there are no captions; use --curriculum text-only")
        order = rng.permutation(len(length))
        captions = [("C", order[pick]) for pick in prepare_data.length_batches(length[order], config.batch_tokens, config.length_multiple)]
        captions = [captions[i] for i in rng.permutation(len(captions))]
    if kind != "M":
        return text + captions
    mixed = []
    for i, batch in enumerate(captions):
        mixed.append(batch)
        if (i + 1) % config.mix == 0:
            mixed.append(text[(i // config.mix) % len(text)])  # text starts over when it is used up
    return mixed


def load_batch(batch, config, model_config, data, device):
    """A global batch or a part of it -> idx, targets (B,T) int64 and image (B,K,image_dim) or None, on the device."""
    kind, rows = batch
    if kind == "T":
        block = data.text["train"][rows[:, None] + np.arange(model_config.block_size + 1)].astype(np.int64)  # (B, T + 1)
        idx, targets, image = block[:, :-1], block[:, 1:], None
    else:
        idx, targets, image = data.caption_batch("train", rows, model_config.block_size, multiple=config.length_multiple,
                                                 images=model_config.n_image_token > 0)
    tensors = [None if x is None else torch.from_numpy(np.ascontiguousarray(x)) for x in (idx, targets, image)]
    if torch.device(device).type == "cuda":  # only from pinned memory is a copy made while the GPU computes
        tensors = [None if x is None else x.pin_memory() for x in tensors]
    return [None if x is None else x.to(device, non_blocking=True) for x in tensors]


def target_places(batch, T, data, device):
    """Where the targets of a batch (B,T) stand in their token stream; padding gets some place within it."""
    kind, rows = batch
    first, n = (rows + 1, len(data.text["train"])) if kind == "T" else (data.offset["train"][rows], len(data.tokens["train"]))
    return torch.from_numpy(np.minimum(first[:, None] + np.arange(T), n - 1)).to(device)


def n_target(batch, model_config, data, most=None):
    """Targets of a batch, at most this many of each row."""
    kind, rows = batch
    length = np.full(len(rows), model_config.block_size) if kind == "T" else data.lengths("train", model_config.block_size, rows)
    return int((length if most is None else np.minimum(length, most)).sum())


def learning_rate(step, config, n_step):
    """Linear warm-up, then a cosine to zero at n_step."""
    warm = min(config.warmup_steps, n_step)
    if step < warm:
        return config.lr * (step + 1) / warm
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, n_step - warm)))


# ----------------------------------------------------------------------------------------------------------------------
# token elision (ReGATE): run only the tokens that matter

CHUNK = 2000  # captions or text blocks between two writes of the reference losses


def reference_losses(run, data, kind, device):
    """Loss in nats of every training token of a kind (C captions, T text) under a frozen text-only teacher: float16 (n_token,),
    computed once and kept beside the data under a name made of both their hashes. Picks up where it was stopped."""
    model = evaluation.load_teacher(run, data, device)
    source, T = "caption_train.bin" if kind == "C" else "text_train.bin", model.config.block_size
    key = hashlib.sha256((prepare_data.sha256(os.path.join(run, "best.pt")) + data.meta["sha256"][source]).encode()).hexdigest()[:16]
    path = os.path.join(data.folder, f"reference_{source.removesuffix('.bin')}_{key}.npy")
    if os.path.exists(path):
        return prepare_data.load_npy(path)
    part, stream = f"{path}.part", data.tokens["train"] if kind == "C" else data.text["train"]
    if not len(stream):
        return np.zeros(0, np.float16)
    if not os.path.exists(part):
        np.save(f"{part}.npy", np.full(stream.shape, np.nan, np.float16))  # not a number: not computed yet
        os.replace(f"{part}.npy", part)
    prepare_data.load_npy(part)  # refuses a file that was cut short
    losses = np.lib.format.open_memmap(part, "r+")
    if kind == "T":
        losses[0] = 0  # nothing stands before it
    bounds = [*(data.offset["train"][:-1:CHUNK] if kind == "C" else np.arange(1, len(stream), CHUNK * T)), len(stream)]
    for i in tqdm(range(len(bounds) - 1), desc=f"reference losses of {source}", disable=None, leave=False):
        start, stop = bounds[i], bounds[i + 1]
        if not np.isnan(losses[stop - 1]):
            continue  # done before the last interruption
        chunk = np.zeros(stop - start, np.float16)  # what does not fit the teacher's block has no reference
        if kind == "C":
            ids = np.arange(i * CHUNK, min((i + 1) * CHUNK, len(data.offset["train"]) - 1))
            for at, loss in zip(data.offset["train"][ids] - start, evaluation.caption_losses(model, data, ids, "none", split="train")[0]):
                chunk[at:at + len(loss)] = loss
        else:  # a block predicts the tokens after its start
            for starts, loss in evaluation.block_losses(model, stream, np.arange(start - 1, stop - 1, T)):
                for at, row in zip(starts + 1 - start, loss):
                    chunk[at:at + len(row)] = row
        losses[start:stop] = chunk
        losses.flush()
    if not os.path.exists(path):  # another run with this teacher may have been faster
        os.replace(part, path)
    return prepare_data.load_npy(path)


def is_dense(step, n_step, config):
    """Does this step (counted per kind) run every token? Warm-up, then cycles that begin with dense steps, then a dense tail."""
    cycle = (step - config.elide_warmup) % config.elide_cycle
    return step < config.elide_warmup or cycle < config.elide_dense or step >= round((1 - config.elide_tail) * n_step)


def from_all_ranks(tensors):
    """The tensors of every process, in order of rank, so that all keep the same books."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [x.cpu() for x in tensors])
    return [[x.to(tensors[0].device) for x in theirs] for theirs in everyone]


class Elision:
    """Difficulty of every training token (a moving average of the student's own loss on it) and the choice of what to run."""

    def __init__(self, config, data, device):
        self.config, self.kinds = config, "CT" if config.elide_text else "C"
        n, started = {"C": len(data.tokens["train"]), "T": len(data.text["train"])}, time.perf_counter()
        zeros = lambda dtype=torch.float32: {kind: torch.zeros(n[kind], dtype=dtype, device=device) for kind in self.kinds}
        self.difficulty, self.count = zeros(), zeros(torch.int32)  # m before the correction in score, and how many losses it holds
        self.reference = {}  # the teacher's loss
        if config.elide in WITH_TEACHER:
            self.reference = {kind: torch.tensor(reference_losses(config.teacher, data, kind, device)).to(device) for kind in self.kinds}
        self.seconds = time.perf_counter() - started  # next to nothing when the losses are cached

    def score(self, kind, place):
        """d = m + lambda * l_ref (ReGATE) of the tokens at place (B,T) of the stream, or what a control puts in its stead: (B,T) float32."""
        elide, beta = self.config.elide, self.config.elide_beta
        if elide == "random":
            return torch.rand(place.shape, device=place.device)
        reference = self.reference[kind][place].float() if self.reference else 0.0
        if elide == "ref":
            return reference
        n = self.count[kind][place]
        m = self.difficulty[kind][place] / (1 - beta ** n).clamp(min=1e-9)  # an average that starts at 0, corrected as in Adam
        # a token that was never run has no m: the teacher's loss stands in. Without a teacher such tokens come before all others (no loss is
        # near 1000), among themselves in an order as good as random: by a hash of their place
        unseen = reference if self.reference else 1000 + (place * 40503 % 65536) / 65536  # 40503 = 2^16 / golden ratio
        return (torch.where(n > 0, m, unseen) + self.config.elide_lambda * reference).float()

    def choose(self, kind, place, real, k):
        """Positions to keep (B,k), ascending, and the weight of each one's loss, or None where all count the same. The score of
        target t+1 decides about input t: both stand at position t of a batch."""
        if self.config.elide == "priority":
            return keep_sampled(self.score(kind, place).clamp(min=0.1), real, k)  # easy tokens are rare, not excluded, so no weight explodes
        return keep_best(self.score(kind, place), real, k), None

    def update(self, kind, place, losses):
        """After a step: place (N,) of the tokens whose losses (N,) were computed. m <- beta m + (1 - beta) loss."""
        m, beta = self.difficulty[kind], self.config.elide_beta
        m[place] = beta * m[place] + (1 - beta) * losses
        self.count[kind][place] += 1

    def state(self):
        # the sum names the teacher: in float64, float16 numbers add up without rounding, on every device alike
        return {"difficulty": self.difficulty, "count": self.count,
                "teacher": {kind: float(reference.cpu().double().sum()) for kind, reference in self.reference.items()}}

    def load(self, state):
        if state["teacher"] != self.state()["teacher"]:
            raise InputError(f"--teacher {self.config.teacher} is not the one this run was started with: its losses are others")
        for mine, saved in (self.difficulty, "difficulty"), (self.count, "count"):
            for kind in mine:
                mine[kind].copy_(state[saved][kind])


# ----------------------------------------------------------------------------------------------------------------------
# optimizers

def orthogonal(x):
    """Matrices x (n,rows,columns) -> about their orthogonal factors U V^T: five Newton-Schulz steps x <- a x + b (x x^T) x + c (x x^T)^2 x bring
    singular values that are within a factor of some hundred of each other to between 0.6 and 1.3."""
    if x.size(1) > x.size(2):
        return orthogonal(x.mT).mT  # so that x x^T is as small as can be
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value above 1
    if x.is_cuda:
        x = x.bfloat16()
        for _ in range(5):
            A = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(A, A, A, beta=b, alpha=c), x, beta=a)
        return x
    # elsewhere in float32: many CPUs have no bfloat16 instructions and take 20 times as long. It is exact enough to step on A = x x^T alone,
    # in small products, and to multiply x once by what the steps P = a + b A + c A^2 amount to
    A = x @ x.mT
    for i in range(5):
        if i:
            A = P @ A @ P
        P = torch.baddbmm(A, A, A, beta=b, alpha=c)
        P.diagonal(dim1=1, dim2=2).add_(a)
        Q = P @ Q if i else P
    return Q @ x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum made orthogonal, so that a step moves a matrix equally far in every direction (Jordan 2024). Scaled to the step of
    AdamW, so that one learning rate suits both: as torch.optim.Muon with match_rms_adamw, which works in bfloat16 on every machine."""

    def __init__(self, params, lr, weight_decay, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            same = {}  # shape -> (parameters, updates): equal shapes are orthogonalised together, in few large products
            for p in group["params"]:
                if p.grad is not None:  # a text batch leaves the image modules alone
                    m = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                    m.lerp_(p.grad, 1 - group["momentum"])
                    params, updates = same.setdefault(p.shape, ([], []))
                    params.append(p)
                    updates.append(p.grad.lerp(m, group["momentum"]))
            for shape, (params, updates) in same.items():
                scale = group["lr"] * 0.2 * math.sqrt(max(shape))  # an orthogonal matrix has a root mean square of 1 / sqrt(max(shape))
                for p, update in zip(params, orthogonal(torch.stack(updates))):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(scale * update)


def make_optimizers(model, config):
    """[AdamW], or [AdamW, Muon]: Muon takes the hidden matrices, AdamW the rest, gates among it. Matrices decay; biases, norms and the
    contrastive temperature do not."""
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    hidden = [module.weight for name, module in linears if config.optimizer == "muon" and not name.endswith(("gate", "head"))]
    rest = [p for p in model.parameters() if p not in set(hidden)]
    groups = [{"params": [p for p in rest if p.dim() >= 2], "weight_decay": config.weight_decay},
              {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=rest[0].device.type in ("cuda", "cpu"))
    return [adamw, Muon(hidden, config.lr, config.weight_decay)] if hidden else [adamw]


# ----------------------------------------------------------------------------------------------------------------------
# the loop

def image_statistics(data):
    """Mean and standard deviation (image_dim,) of the training images, from at most 2,000 of them."""
    rows = np.unique(data.image_row["train"])
    stride = math.ceil(len(rows) / 2000)
    x = torch.from_numpy(data.images(rows[::stride])).flatten(0, 1)  # (n * K, image_dim)
    std = x.std(dim=0, correction=0)
    return x.mean(dim=0), std + 1e-3 * std.mean() + 1e-12  # a feature that never varies is not blown up


def read_log(path):
    """The lines of log.jsonl; a last line that a crash cut short is left out."""
    lines = []
    with open(path, encoding="utf-8", errors="replace") as f:
        whole = [line for line in f if line.endswith("\n")]
    for number, line in enumerate(whole, 1):
        try:
            lines.append(json.loads(line))
            lines[-1]["step"] + 0  # a number, or it is no line of ours
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: not a line of a training log, {line!r:.60}; take it out to go on") from error
    return lines


def read_state(out):
    """The newest whole checkpoint of a run: last.pt or, where that is damaged or missing, the one before it."""
    paths = [os.path.join(out, name) for name in ("last.pt", "previous.pt")]
    for path in paths:
        try:
            state = load_checkpoint(path)
            if not all(isinstance(state.get(key), dict) for key in ("model_config", "config", "now")) or "optimizers" not in state:
                raise InputError(f"{path}: holds no state of a training run")
            names, known = set(state["config"]), {f.name for f in fields(TrainConfig)}
            if names != known:
                raise InputError(f"{path}: made by another version of gatevlm, with other flags ({', '.join(sorted(names ^ known))})")
            return state
        except InputError as error:
            if path == paths[-1] or not os.path.exists(paths[-1]):
                raise
            print(f"{error}; going on from {paths[-1]}")


def train(config, model_config, data, state=None):
    """Run the curriculum, or what is left of it after state (a checkpoint). Returns True when the curriculum is done."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(config.device, int(os.environ.get("LOCAL_RANK", 0)))
    main_process, on_cuda = rank == 0, device.type == "cuda"
    torch.manual_seed(config.seed)
    raw = GateVLM(model_config).to(device)
    if model_config.n_image_token and len(data.image_row["train"]):
        mean, std = image_statistics(data)
        raw.image_encoder.mean.copy_(mean)
        raw.image_encoder.std.copy_(std)
    optimizers = make_optimizers(raw, config)
    kinds = config.epoch_kinds()
    # where the run stands: cursor is the next batch of the epoch; tokens_seen counts the targets of all batches so far, tokens_processed those of
    # them that went through the model; best is the lowest validation loss
    now = {"step": 0, "epoch": 0, "cursor": 0, "caption_step": 0, "tokens_seen": 0, "tokens_processed": 0, "seconds": 0.0, "best": math.inf, "best_step": 0}
    if state:
        try:
            raw.load_state_dict(state["model"])
            for optimizer, saved in zip(optimizers, state["optimizers"]):
                optimizer.load_state_dict(saved)
            now |= state["now"]
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{config.out}: its checkpoint does not fit this version of gatevlm ({str(error).splitlines()[0]})") from error
    elision = None
    if config.elide != "none":
        if rank:
            dist.barrier()  # until the first process has written the reference losses
        elision = Elision(config, data, device)
        if world > 1 and not rank:
            dist.barrier()
        if state:
            elision.load(state["elision"])
        else:
            now["reference_seconds"] = elision.seconds
    model = compiled(raw) if config.compile and on_cuda else raw
    if world > 1:  # text batches leave the image modules without gradients
        model = DistributedDataParallel(model, find_unused_parameters=True, broadcast_buffers=False)
    precision = torch.autocast("cuda", torch.bfloat16) if config.autocast and on_cuda and torch.cuda.is_bf16_supported() else nullcontext()
    torch.set_float32_matmul_precision("high")

    plans = {kind: epoch_plan(kind, 0, config, model_config.block_size, data) for kind in set(kinds)}  # epoch 0 stands for all: number and kinds of batches depend on lengths only
    order = [(epoch, cursor, batch[0]) for epoch, kind in enumerate(kinds) for cursor, batch in enumerate(plans[kind])]
    n_step = min(len(order), config.max_steps or len(order))
    n_kind_step = {kind: sum(kind == k for _, _, k in order[:n_step]) for kind in "CT"}
    plan = epoch_plan(kinds[now["epoch"]], now["epoch"], config, model_config.block_size, data)

    path = lambda name: os.path.join(config.out, name)
    signals, bad = [], torch.zeros((), device=device)  # signals caught; first step (from 1) whose loss or gradient was not finite, 0 = none
    if main_process:
        lines = [line for line in read_log(path("log.jsonl")) if line["step"] <= now["step"]] if state else []
        with open(path("log.jsonl.part"), "w", encoding="utf-8") as f:
            f.writelines(json.dumps(line) + "\n" for line in lines)
        os.replace(path("log.jsonl.part"), path("log.jsonl"))
        if config.keep_checkpoints:
            os.makedirs(path("checkpoints"), exist_ok=True)
        told = f"; {now['step']:,} of them done before" if state else ""
        print(f"{raw.n_parameter():,} parameters on {device}; {n_step:,} steps: {kinds}{told}")
    handlers = {s: signal.signal(s, lambda number, frame: signals.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}

    def write_log(line):
        if main_process:
            try:
                with open(path("log.jsonl"), "a", encoding="utf-8") as f:
                    f.write(json.dumps(line) + "\n")
            except OSError as error:
                raise InputError(f"{path('log.jsonl')}: cannot be written ({error.strerror}); make room and go on with --resume --out {config.out}") from error

    def save(name):
        if main_process:
            save_checkpoint(path(name), {"model": raw.state_dict(), "model_config": asdict(model_config), "config": asdict(config),
                                         "optimizers": [optimizer.state_dict() for optimizer in optimizers], "now": now,
                                         **({"elision": elision.state()} if elision and name == "last.pt" else {})},
                            path("previous.pt") if name == "last.pt" else None)

    @contextmanager
    def off_the_clock():
        """Evaluating and saving count neither as training time nor against tokens per second."""
        nonlocal started, since_log
        paused = time.perf_counter()
        now["seconds"] += paused - started
        yield
        started = time.perf_counter()
        since_log += started - paused

    def evaluate():
        """Validation losses into the log; best.pt is kept by the caption loss, or the text loss where no captions are trained."""
        if main_process:
            losses = evaluation.validate(raw, data, config.eval_tokens)
            write_log({"step": now["step"], "epoch": now["epoch"], **losses})
            told = ", ".join(f"{name.removeprefix('val_loss_')} {loss:.3f}" for name, loss in losses.items() if loss is not None)
            tqdm.write(f"step {now['step']:,} of {n_step:,}, {now['seconds'] / 60:.1f} min, validation loss: {told}", file=sys.stdout)
            loss = losses["val_loss_caption" if set(kinds) & set("CM") else "val_loss_text"]
            if loss is None or loss < now["best"]:
                now["best"], now["best_step"] = now["best"] if loss is None else loss, now["step"]
                save("best.pt")

    def check_finite():
        if bad.item():
            epoch, cursor, _ = order[int(bad.item()) - 1]
            kind, rows = epoch_plan(kinds[epoch], epoch, config, model_config.block_size, data)[cursor]
            shown = ", ".join(map(str, rows[:4])) + (", ..." if len(rows) > 4 else "")
            what = f"captions {shown}" if kind == "C" else f"text from tokens {shown}"
            raise InputError(f"the loss or its gradient became NaN or inf at step {int(bad.item())} (epoch {epoch}, batch {cursor} of it: {what}). The data are finite, "
                             "so the run has diverged; nothing was saved since. A new run with a lower --lr or more --warmup_steps is the usual cure")

    raw.train()
    progress = tqdm(total=n_step, initial=now["step"], disable=None if main_process else True, dynamic_ncols=True)
    started = since_log = time.perf_counter()
    tokens_since = 0
    try:
        while now["step"] < n_step:
            if now["cursor"] == len(plan):
                now["epoch"], now["cursor"] = now["epoch"] + 1, 0
                plan = epoch_plan(kinds[now["epoch"]], now["epoch"], config, model_config.block_size, data)
            kind, rows = batch = plan[now["cursor"]]
            # noise is a function of (seed, step, rank): resuming needs no generator state, and evaluating cannot disturb training
            torch.manual_seed((config.seed * 1_000_003 + now["step"]) * world + rank)
            if kind == "C":
                raw.anneal(now["caption_step"] / n_kind_step["C"])
            lr = learning_rate(now["step"], config, n_step)
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = lr

            n_real, loss, extra = n_target(batch, model_config, data), torch.zeros((), device=device), None
            tracked = elision is not None and kind in elision.kinds  # do the losses of this step go into the moving average?
            nth = now["caption_step"] if kind == "C" else now["step"] - now["caption_step"]  # steps of this kind before this one
            sparse = tracked and not is_dense(nth, n_kind_step[kind], config)  # does this step keep only k tokens of each row?
            # one k for all rows, so that what is kept is a tensor (B,k): p of their mean length, for the rows of a batch are about as long
            k = max(1, round(config.keep_ratio * n_real / len(rows))) if sparse else None
            n_kept = n_target(batch, model_config, data, k)  # a row shorter than k is kept whole
            # loss of the batch = sum over parts of share * mean loss of the part, share being the part's fraction of the tokens that are run
            for micro in range(config.grad_accum):
                part = kind, rows[micro * world + rank::config.grad_accum * world]
                share = n_target(part, model_config, data, k) / n_kept * world  # world, because DDP averages over ranks
                if not len(part[1]):
                    part = kind, rows[:1]  # every rank has to take part in the reduction, if only with weight 0
                n_part = n_target(part, model_config, data, k)
                idx, targets, image = load_batch(part, config, model_config, data, device)
                keep = weight = None
                if tracked:
                    place = target_places(part, targets.size(1), data, device)
                if sparse:
                    keep, weight = elision.choose(kind, place, targets != -1, min(k, targets.size(1)))
                    if weight is not None and share:  # share and the mean of DDP cancel: over all parts the loss is sum(weight * loss) / n_real
                        weight = weight * world / (n_real * share)
                    if config.elide == "loss-only":  # every token is run, but only the kept ones have a target
                        targets, keep = torch.full_like(targets, -1).scatter(1, keep, targets.gather(1, keep)), None
                last = micro == config.grad_accum - 1
                with nullcontext() if last or world == 1 else model.no_sync():
                    with precision:
                        _, total, gates = model(idx, targets, image, keep, return_gates=True, weight=weight, visible=config.elide_visible, n_target=n_part)
                    (total * share).backward()
                loss += raw.loss_parts["language"] * share / world
                if keep is not None:  # (B, k), as what was run: target_at and gates count in it
                    targets, place = targets.gather(1, keep), place.gather(1, keep)
                if tracked:
                    at = raw.target_at if share else raw.target_at[:0]  # (N,); the stand-in for an empty part has nothing to tell
                    ran = place.flatten()[at], raw.target_losses[:len(at)]  # (N,), (N,)
                    for places, losses in [ran] if world == 1 else from_all_ranks(ran):
                        elision.update(kind, places, losses)
                if "contrastive" in raw.loss_parts:
                    extra = raw.loss_parts["contrastive"] * share / world + (0 if extra is None else extra)
            norm = torch.nn.utils.clip_grad_norm_(raw.parameters(), config.grad_clip or math.inf)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            now["step"], now["cursor"] = now["step"] + 1, now["cursor"] + 1
            now["caption_step"] += kind == "C"
            now["tokens_seen"] += n_real
            now["tokens_processed"] += n_real if config.elide == "loss-only" else n_kept
            tokens_since += n_real
            progress.update()
            done, logs = now["step"] == n_step, now["step"] % config.log_interval == 0 or now["step"] == n_step
            bad = torch.where((bad == 0) & ~torch.isfinite(loss + norm), now["step"], bad)
            if not on_cuda or logs:  # reading a number makes a GPU wait
                check_finite()
            if logs:
                if world > 1:
                    for part in [loss] if extra is None else [loss, extra]:  # each process holds its share of the mean
                        dist.all_reduce(part)
                line = {"step": now["step"], "epoch": now["epoch"], "kind": kind, "loss": loss.item(), "lr": lr,
                        "grad_norm": norm.item(), "tokens_seen": now["tokens_seen"],
                        "tokens_processed": now["tokens_processed"], "kept": n_kept / n_real,
                        "tokens_per_second": round(tokens_since / (time.perf_counter() - since_log))}
                if extra is not None:
                    line["contrastive"] = float(extra)
                if image is not None:  # of the last micro-batch, on the first process
                    g = gates.detach()[:, targets != -1]  # (n_layer, N)
                    line |= {"gate_mean": g.mean(dim=1).tolist(), "gate_std": g.std(dim=1, correction=0).tolist()}
                write_log(line)
                progress.set_postfix_str(f"{kind} loss {line['loss']:.3f}")
                since_log, tokens_since = time.perf_counter(), 0
            if now["step"] % config.eval_interval == 0 or done:
                with off_the_clock():
                    evaluate()
            ends_epoch = now["cursor"] == len(plan)
            if config.keep_checkpoints and main_process and (now["step"] % config.eval_interval == 0 or done or ends_epoch):
                check_finite()
                with off_the_clock():
                    save_checkpoint(path(os.path.join("checkpoints", f"step_{now['step']:08}.pt")), {
                        "model": raw.state_dict(), "model_config": asdict(model_config), "now": now | {"kind": kinds[now["epoch"]], "ends_epoch": ends_epoch}})
            stopping = bool(signals) or now["step"] == config.stop_after
            if world > 1:  # a signal may reach one process a step before another
                flag = torch.tensor(float(stopping), device=device)
                dist.all_reduce(flag)
                stopping = flag.item() > 0
            if now["step"] % config.save_interval == 0 or done or stopping:
                check_finite()
                with off_the_clock():
                    save("last.pt")
            if stopping:
                break
    finally:
        progress.close()
        for s, handler in handlers.items():
            signal.signal(s, handler)
    return now["step"] == n_step


def kept_picture(path, config, data, state):
    """A training caption with its gates at the last step, whose checkpoint is state; struck out what an elided step would drop."""
    model = load_model(config.out, "last.pt")
    caption = int(np.argmax(data.lengths("train", model.config.block_size)[:100]))
    batch = "C", np.array([caption])
    _, targets, _ = load_batch(batch, config, model.config, data, "cpu")
    elision = Elision(config, data, "cpu")
    elision.load(state["elision"])
    torch.manual_seed(config.seed)
    k = max(1, round(config.keep_ratio * n_target(batch, model.config, data)))
    keep, _ = elision.choose("C", target_places(batch, targets.size(1), data, "cpu"), targets != -1, k)
    evaluation.gate_picture(path, model, data, caption, "train", keep[0].tolist(), f", step {state['now']['step']:,}; struck out: dropped by {config.elide}")


def finish(config, data):
    """Report on best.pt, pictures, summary.json."""
    path = lambda name: os.path.join(config.out, name)
    model = load_model(config.out, device=pick_device(config.device, int(os.environ.get("LOCAL_RANK", 0))))
    state = load_checkpoint(path("last.pt"))
    now = state["now"]
    summary = evaluation.report(model, data)
    summary |= {"tokens_seen": now["tokens_seen"], "tokens_processed": now["tokens_processed"],
                "processed_ratio": now["tokens_processed"] / now["tokens_seen"], "tokens_per_second": round(now["tokens_seen"] / now["seconds"]), "minutes": now["seconds"] / 60,
                "n_parameter": model.n_parameter(), "step": now["step"], "best_step": now["best_step"]}
    if config.elide in WITH_TEACHER:
        known = os.path.join(config.teacher, "summary.json")
        summary |= {"teacher_seconds": prepare_data.read_json(known)["minutes"] * 60 if os.path.exists(known) else None,
                    "reference_seconds": now["reference_seconds"]}
    prepare_data.write_json(path("summary.json"), summary)
    lines = read_log(path("log.jsonl"))
    # validation lines have no kind; an elided step's loss is that of its hard tokens only, so it is not drawn
    series = {name: [(line["step"], line[key]) for line in lines if line.get(key) is not None and line.get("kind", kind) == kind and line.get("kept", 1) == 1]
              for name, key, kind in (("captions, training", "loss", "C"), ("captions, validation", "val_loss_caption", None),
                                      ("text, training", "loss", "T"), ("text, validation", "val_loss_text", None))}
    floors = [(f"captions, {name.replace('_', ' ')}", summary[name]) for name in ("floor_with_image", "floor_text_only") if name in summary]
    evaluation.draw_curves(path("loss.png"), series, "loss, nats per token", "steps", floors, top=0.95)
    evaluation.gate_picture(path("gates.png"), model, data)
    if config.elide != "none" and evaluation.looking(model) and len(data.image_row["train"]):
        kept_picture(path("kept.png"), config, data, state)
    for name, value in summary.items():
        print(f"{name:32} {value if not isinstance(value, float) else f'{value:.4f}'}")
    print(f"everything is in {config.out}: summary.json, loss.png, gates.png, log.jsonl, best.pt, last.pt")
    return summary


def main(argv=None):
    """Train from command line flags; returns the summary, or None when the run stopped early to be resumed."""
    preset, resume, flags = parse(argv)
    out, main_process = flags.pop("out", "") or os.path.join("out", preset), int(os.environ.get("RANK", 0)) == 0
    with prepare_data.locked(out) if main_process else nullcontext():
        return start(preset, resume, flags, out, main_process)


def start(preset, resume, flags, out, main_process):
    """Start a run in the folder out, or go on with the one in it."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    saved = any(os.path.exists(os.path.join(out, name)) for name in ("last.pt", "previous.pt"))
    state = read_state(out) if resume and saved else None  # nothing saved yet: a loop over runs can be typed again after a crash
    if state:
        values = state["model_config"] | state["config"]
        if preset != "toy" and (begun := evaluation.read_run(out)[0].get("preset")) != preset:  # toy is also what stands where none was given
            raise InputError(f"--preset {preset}: the run in {out} was started with {begun}; another --out starts another run")
        for name, value in flags.items():
            if name not in FREE and value != values.get(name):
                raise InputError(f"--{name} {value}: the run in {out} was started with {values.get(name)}; only {', '.join(FREE)} may change on --resume")
        values |= flags | {"out": out}
    else:
        if saved:
            raise InputError(f"{out} holds a run already: --resume goes on with it, --out starts another")
        values = PRESETS[preset] | flags | {"out": out}
        if values.get("teacher"):
            values.setdefault("elide", "regate")
        if not values.get("data"):
            values["data"] = os.path.join("data", "toy16" if values.get("n_image_token", 1) == 16 else "toy")
            if not os.path.exists(values["data"]) and main_process:
                prepare_data.main(["toy", "--out", values["data"], "--n_image_token", str(values.get("n_image_token", 1))])
    if world > 1:
        on_cuda = pick_device(values.get("device", "auto"), int(os.environ.get("LOCAL_RANK", 0))).type == "cuda"
        dist.init_process_group("nccl" if on_cuda else "gloo", timeout=timedelta(hours=4))  # reference losses may take that long
        dist.barrier()  # until the first process has made the data
    data = prepare_data.Data(values["data"])
    if state and (was := prepare_data.load_meta(out)["sha256"]) != data.meta["sha256"]:
        changed = sorted(name for name in {*was, *data.meta["sha256"]} if was.get(name) != data.meta["sha256"].get(name))
        raise InputError(f"{data.folder}: not the data that the run in {out} was started with ({', '.join(changed[:3])} differ); --resume needs the same")
    config, model_config = make_configs(values, data)
    if config.elide in WITH_TEACHER:
        evaluation.load_teacher(config.teacher, data)
    if main_process and not state:
        prepare_data.write_json(os.path.join(out, "config.json"), {"preset": preset, "train": asdict(config), "model": asdict(model_config)})
        for name in "tokenizer.tiktoken", "meta.json":
            shutil.copy(os.path.join(data.folder, name), out)
    if world > 1:
        dist.barrier()  # until the run folder is there
    done = train(config, model_config, data, state)
    if world > 1:
        dist.destroy_process_group()
    if not done and main_process:
        print(f"stopped and saved; go on with: python train.py --resume --out {out}")
    return finish(config, data) if done and main_process else None


if __name__ == "__main__":
    run_script(main)
