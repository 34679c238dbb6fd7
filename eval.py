"""What a trained run knows: python eval.py out/run [out/another ...] [--babylm_eval DIR] [--checkpoints] [--image FILE].

In reading order: losses with and without the image, the five benchmarks, words and their gates, statistics, what the gate
learned, pictures, several runs or checkpoints side by side, command line.
"""
import csv
import glob
import itertools
import json
import math
import os
from collections import Counter

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from gatevlm import InputError, Parser, evaluating, load_checkpoint, load_model, pick_device, run_script
from prepare_data import Data, check_same_tokenizer, length_batches, load_meta, load_npy, load_tokenizer, make_encoder, open_picture, read_json, read_lines, unpatch, write_json

# the five benchmarks, and the share of items that guessing gets right, in percent
TASKS = {"blimp": 50.0, "supplement": 50.0, "ewok": 50.0, "winoground": 50.0, "vqa": 12.5}
WITH_IMAGE = ("winoground", "vqa")

# English words that carry grammar rather than a picture; used where the data has no table of word classes of its own
FUNCTION_WORDS = frozenset("""
a an the this that these those some any no each every either neither both all another
of in on at by for with from to into onto over under above below behind beside near through across along around against
between among before after during without within off out up down about as than toward towards upon
and or but nor so if because while when where although though since until whether
's 't 'd 'm 'll 've 're
i you he she it we they me him her us them my your his its our their mine yours hers ours theirs who whom whose which what there
myself yourself himself herself itself ourselves themselves one
is are was were be been being am do does did have has had having will would can could shall should may might must not
""".split())
FUNCTION_TAGS = frozenset("ADP AUX CCONJ DET PART PRON SCONJ".split())
CONTENT_TAGS = frozenset("ADJ ADV NOUN NUM PROPN VERB".split())


# ----------------------------------------------------------------------------------------------------------------------
# losses

def caption_losses(model, data, ids, view="image", batch_tokens=8192, split="val"):
    """Per caption of a split: losses (n_token,) in nats and gates (n_layer, n_token). view: "image" shows each its
    own image, "other" the next image of the file, "none" withholds it."""
    block, device = model.config.block_size, next(model.parameters()).device
    length, rows = data.lengths(split, block, ids), data.image_row[split][ids]
    if view == "other":
        every = np.unique(data.image_row[split])
        rows = every[(np.searchsorted(every, rows) + 1) % len(every)]
    losses, gates = [None] * len(ids), [None] * len(ids)
    for pick in length_batches(length, batch_tokens):
        seen = view != "none" and model.config.n_image_token > 0
        idx, targets, image = (x if x is None else torch.from_numpy(x).to(device)
                               for x in data.caption_batch(split, ids[pick], block, rows[pick], images=seen))
        with evaluating(model):
            loss, gate = (x.cpu().numpy() for x in model.token_losses(idx, targets, image))
        for j, k in enumerate(pick):
            losses[k], gates[k] = loss[j, :length[k]], gate[:, j, :length[k]]
    return losses, gates


def block_losses(model, stream, starts):
    """Reads the blocks that begin at starts (n,): yields starts (B,) and the losses (B,T) in nats of the tokens after them. The last
    block may be short."""
    n, T, device = len(stream) - 1, model.config.block_size, next(model.parameters()).device
    whole = starts[starts + T <= n]
    for rows in [whole[i:i + 64] for i in range(0, len(whole), 64)] + [starts[starts + T > n]]:
        if len(rows):
            block = torch.from_numpy(stream[rows[:, None] + np.arange(min(T, n - rows[0]) + 1)].astype(np.int64)).to(device)
            with evaluating(model):
                losses = model.token_losses(block[:, :-1], block[:, 1:])[0].cpu().numpy()
            yield rows, losses


def text_loss(model, data, max_tokens=None):
    """Mean loss in nats per token over the validation text, or over evenly spread blocks of it that hold about max_tokens;
    None without text."""
    n = len(data.text["val"]) - 1
    if n < 1:
        return None
    starts = np.arange(0, n, model.config.block_size)[::1 if max_tokens is None else -(-n // max_tokens)]
    parts = [(losses.sum(dtype=np.float64), losses.size) for _, losses in block_losses(model, data.text["val"], starts)]
    return float(sum(total for total, _ in parts) / sum(count for _, count in parts))


def spread_ids(data, max_tokens, block_size):
    """Validation captions, evenly spread over the file, that hold about max_tokens tokens; all of them for None."""
    length = data.lengths("val", block_size)
    every = 1 if max_tokens is None else max(1, -(-int(length.sum()) // max_tokens))
    return np.arange(0, len(length), every)


def mean_loss(losses):
    return float(np.concatenate(losses).mean(dtype=np.float64)) if losses else None


def validate(model, data, max_tokens=None):
    """{val_loss_caption, val_loss_text} in nats per token; None for what the data does not have."""
    ids = spread_ids(data, max_tokens, model.config.block_size)
    return {"val_loss_caption": mean_loss(caption_losses(model, data, ids)[0]), "val_loss_text": text_loss(model, data, max_tokens)}


# ----------------------------------------------------------------------------------------------------------------------
# the five benchmarks, as the official BabyLM pipelines score them

FIELDS = {"blimp": {"UID": str, "sentence_good": str, "sentence_bad": str}, "supplement": {"sentence_good": str, "sentence_bad": str},
          "ewok": {"Domain": str, "Context1": str, "Target1": str, "Target2": str},
          "winoground": {"caption_0": str, "caption_1": str, "image_idx": int, "image_key": str},
          "vqa": {"question": str, "target_ans": str, "distractors": list, "idx_in_hf_dataset": int}}


def read_item(task, line, uid, protocol):
    """A line of a task's JSONL file -> dict of uid, context, options (scored after the context; the right one is the first), answers
    (the same as the file spells them), image (index into the states, or None), tag. ValueError says what is wrong with it."""
    row = json.loads(line)
    for name, kind in FIELDS[task].items():
        value = row.get(name) if isinstance(row, dict) else None
        if type(value) is not kind or value in ("", []):
            raise ValueError(f"expected {name}, a {kind.__name__}, found {value!r:.60}")
    lead, context, image = " " if protocol == "2024" else "", "", None  # 2024 put a space before whole sentences
    if task in ("blimp", "supplement"):
        uid, answers = row["UID"] if task == "blimp" else uid, [row["sentence_good"], row["sentence_bad"]]
    elif task == "ewok":
        uid, context, answers = row["Domain"], row["Context1"], [row["Target1"], row["Target2"]]
    elif task == "winoground":
        if row["image_key"] not in ("image_0", "image_1"):
            raise ValueError(f"expected image_key image_0 or image_1, found {row['image_key']!r:.60}")
        answers, image = [row["caption_0"], row["caption_1"]], (row["image_idx"], int(row["image_key"] == "image_1"))
    else:
        if [type(x) for x in row["distractors"]] != [str] * 7 or "" in row["distractors"]:
            raise ValueError(f"expected distractors, a list of 7 texts, found {row['distractors']!r:.60}")
        context = f"Question: {row['question']} Answer:" if protocol == "2024" else row["question"]
        answers, image = [row["target_ans"], *row["distractors"]], (row["idx_in_hf_dataset"],)
    tag = row.get("collapsed_tag") if task in WITH_IMAGE else None
    " ".join([uid, context, str(tag), *answers]).encode()  # a lone surrogate is a ValueError too
    return {"uid": uid, "context": context, "options": [(" " if context else lead) + x for x in answers], "answers": answers,
            "image": image, "tag": tag if isinstance(tag, str) else None}


def read_task(root, task, protocol="2025"):
    """Items of root/<task>_filtered/*.jsonl, as of read_item, with the file and line they stand at; [] without files."""
    items = []
    for path in sorted(glob.glob(os.path.join(glob.escape(root), f"{task}_filtered", "*.jsonl"))):
        for number, line in read_lines(path):
            try:
                if line.strip():
                    items.append({"where": f"{path}, line {number}", **read_item(task, line, os.path.basename(path).removesuffix(".jsonl"), protocol)})
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}, line {number}: {error}") from error
    return items


def read_states(root, task, items, config):
    """Image features of a vision task, (n, 2, K, image_dim) or (n, K, image_dim) mapped from disk; None when the file is missing."""
    path = os.path.join(root, f"{task}_states.npy")
    if not os.path.isfile(path):
        return None
    states = load_npy(path)
    shape = *([2] if task == "winoground" else []), config.n_image_token, config.image_dim
    if states.dtype.kind != "f" or states.shape[1:] != shape:
        raise InputError(f"{path}: expected floats of shape (n, {', '.join(map(str, shape))}) for this model, found {states.dtype} {states.shape}")
    for item in items:
        if not 0 <= item["image"][0] < len(states):
            raise InputError(f"{item['where']}: image {item['image'][0]}, but {path} has rows 0 to {len(states) - 1}")
        if not np.isfinite(states[item["image"]]).all():
            raise InputError(f"{path}, row {item['image'][0]}: NaN or inf")
    return states


def option_ids(item, encoding, block_size):
    """Each option of an item as pieces (ids, first): the model reads ids[:-1] and ids[first:] are scored. One piece per option,
    or, where a text does not fit the block, half overlapping windows of it."""
    pieces = []
    for option, text in enumerate(item["options"]):
        ids, before = encoding.encode_ordinary(item["context"] + text), len(item["context"].encode())
        ends = np.cumsum([len(encoding.decode_single_token_bytes(i)) for i in ids])
        first = 1 + int(np.searchsorted(ends, before, side="right"))  # a token that begins in the context and ends in the option is scored, as officially
        ids = [encoding.eot_token, *ids]
        while len(ids) > block_size + 1:
            if first <= block_size:
                pieces.append((option, tuple(ids[:block_size + 1]), first))
            stride = max(1, block_size // 2)
            ids, first = ids[stride:], max(first, block_size + 1) - stride
        pieces.append((option, tuple(ids), first))
    return pieces


def grow_trees(pieces, width):
    """Pieces (image, ids, first) -> trees of at most about width tokens, in which texts that begin alike share their beginning
    and are computed once, and for each piece (tree, its scored edges). A tree is (image, tokens, parent of each token, edges);
    an edge (i, token) asks how well the model at token i predicts that token. Of the texts "a cat ran ." and "a cat sat":
        tokens  <eot> a cat ran    parent  0 0 1 2    edges  (0, a) (1, cat) (2, ran) (3, .) (2, sat)
    "." and "sat" end their texts, so they are asked for but never read; the second text is scored by edges 0, 1, 4."""
    trees, found, previous = [], [None] * len(pieces), ((), ())
    for n in sorted(range(len(pieces)), key=lambda n: (pieces[n][0] or (), pieces[n][1])):
        image, ids, first = pieces[n]
        common = len(os.path.commonprefix([previous[1], ids]))  # despite its name, it takes any two sequences
        if not trees or previous[0] != image or common == 0 or len(trees[-1][1]) + len(ids) - common > width:
            trees.append((image, [], [], []))
            path, scored, common = [], [], 0  # path[k]: where ids[k] stands in the tree; scored[k]: the edge that asks for ids[k + 1]
        _, tokens, parent, edges = trees[-1]
        path, scored = path[:common], scored[:max(0, common - 1)]
        for token in ids[len(path):-1]:
            parent.append(path[-1] if path else 0)
            path.append(len(tokens))
            tokens.append(token)
        for depth in range(len(scored) + 1, len(ids)):
            scored.append(len(edges))
            edges.append((path[depth - 1], ids[depth]))
        found[n], previous = (len(trees) - 1, scored[first - 1:]), (image, ids)
    return trees, found


@torch.no_grad()
def score(model, pieces, states=None, batch_tokens=None, width=128):
    """Sum of log-probabilities of the scored tokens of each piece (image, ids, first): (n,) float64 in nats. Log-probabilities
    are float32; their sum is not rounded, so that equal options tie."""
    device = next(model.parameters()).device
    batch_tokens = batch_tokens or (1024 if device.type == "cpu" else 16384)  # what stays in a CPU's cache is fastest
    trees, found = grow_trees(pieces, width)
    losses, progress = [None] * len(trees), tqdm(total=len(trees), disable=None, leave=False, desc="scoring")
    for batch in length_batches([len(tokens) for _, tokens, _, _ in trees], batch_tokens):
        B, T = len(batch), len(trees[batch[0]][1])
        idx, parent = torch.zeros(2, B, T, dtype=torch.long)
        for row, t in enumerate(batch):
            idx[row, :len(trees[t][1])], parent[row, :len(trees[t][1])] = torch.tensor(trees[t][1]), torch.tensor(trees[t][2])
        mask = torch.eye(T, dtype=torch.bool).repeat(B, 1, 1)  # (B, T, T): a token sees itself and what its parent sees
        for k in range(1, T):
            mask[:, k] |= mask[torch.arange(B), parent[:, k]]
        image = None if states is None else torch.from_numpy(np.stack([states[trees[t][0]] for t in batch]).astype(np.float32)).to(device)
        # a token sees its ancestors and itself: one more than stand before it in its text
        with evaluating(model):
            h = model.trunk(idx.to(device), image, position=mask.sum(dim=-1).to(device) - 1, mask=mask.to(device))[0]  # (B, T, D)
        # the head runs once per token, however many edges leave it
        size = [len(trees[t][1]) for t in batch]
        real = torch.arange(T) < torch.tensor(size)[:, None]  # (B, T)
        logp = model.logits(h[real.to(device)]).float().log_softmax(dim=-1)  # (N, V)
        at = torch.tensor([start + node for t, start in zip(batch, np.cumsum([0, *size])) for node, _ in trees[t][3]], device=device)
        target = torch.tensor([token for t in batch for _, token in trees[t][3]], device=device)
        loss = -logp[at, target].cpu().double().numpy()
        for t, part in zip(batch, np.split(loss, np.cumsum([len(trees[t][3]) for t in batch])[:-1])):
            losses[t] = part
        progress.update(B)
    progress.close()
    return np.array([-losses[t][edges].sum() for t, edges in found])


def score_items(model, items, encoding, states=None, batch_tokens=None):
    """Scores of every option of every item: a list of (n_option,). Equal texts with equal images are scored once."""
    known, parts = {}, []
    for n, item in enumerate(items):
        image = None if states is None else item["image"]
        parts += [(n, option, known.setdefault((image, ids, first), len(known))) for option, ids, first in option_ids(item, encoding, model.config.block_size)]
    value, scores = score(model, list(known), states, batch_tokens), [np.zeros(len(item["options"])) for item in items]
    for n, option, piece in parts:
        scores[n][option] += value[piece]
    for item, each in zip(items, scores):
        if np.isnan(each).any():
            raise InputError(f"{item['where']}: the model's score is NaN; its weights are damaged or its training diverged")
    return scores


def percent(hits):
    return 100 * float(np.mean(hits))


def accuracies(task, items, scores):
    """{mean, by_uid, n, ties[, by_tag, text, image, group]} in percent. Ties go to the first option, which is the right one."""
    hit = np.array([np.argmax(each) == 0 for each in scores])
    share = lambda key: {value: percent(hit[[item[key] == value for item in items]]) for value in sorted({item[key] for item in items if item[key]})}
    by_uid, by_tag = share("uid"), share("tag")
    result = {"mean": percent(hit) if task in WITH_IMAGE else float(np.mean(list(by_uid.values()))), "by_uid": by_uid, **({"by_tag": by_tag} if by_tag else {}),
              "n": len(items), "ties": sum(int((each == each.max()).sum() > 1) for each in scores)}
    if task == "winoground":
        both = {}  # image_idx -> scores (2 images, 2 captions), both with their own caption first
        for item, each in zip(items, scores):
            if item["image"][1] in both.setdefault(item["image"][0], {}):
                raise InputError(f"{item['where']}: image_{item['image'][1]} of image_idx {item['image'][0]} a second time")
            both[item["image"][0]][item["image"][1]] = each
        full = np.array([[pair[0], pair[1]] for pair in both.values() if len(pair) == 2])  # (n, image, own caption or the other's)
        if len(full):
            text = (full[:, :, 0] > full[:, :, 1]).all(axis=1)
            image = (full[:, 0, 0] > full[:, 1, 1]) & (full[:, 1, 0] > full[:, 0, 1])
            result |= {"text": percent(text), "image": percent(image), "group": percent(text & image)}
    return result


def benchmark(model, encoding, root, tasks=tuple(TASKS), protocol="2025", batch_tokens=None):
    """Score a model on the tasks found under root: results {task: accuracies}, predictions in the official shape, and a line for
    each task left out. Vision tasks are also scored without their images (mean_no_image)."""
    results, predictions, missing = {}, {}, []
    for task in tasks:
        items, states, blind = read_task(root, task, protocol), None, not model.config.n_image_token
        if items and task in WITH_IMAGE and not blind:
            states = read_states(root, task, items, model.config)
        lacks = "_filtered/*.jsonl" if not items else "_states.npy" if task in WITH_IMAGE and states is None and not blind else ""
        if lacks:
            missing.append(f"{task}: left out, {root} has no {task}{lacks}")
            continue
        scores = score_items(model, items, encoding, states, batch_tokens)
        results[task] = accuracies(task, items, scores)
        if task in WITH_IMAGE:
            without = accuracies(task, items, scores if blind else score_items(model, items, encoding, None, batch_tokens))
            results[task] |= {f"{name}_no_image": without[name] for name in ("mean", "ties", "by_tag") if name in without}
        chosen = predictions.setdefault(task, {})
        for item, each in zip(items, scores):
            rows = chosen.setdefault(item["uid"], {"predictions": []})["predictions"]
            rows.append({"id": f"{item['uid']}_{len(rows)}", "pred": item["answers"][int(np.argmax(each))]})
    return results, predictions, missing


# ----------------------------------------------------------------------------------------------------------------------
# words and their gates

def words_of(ids, encoding):
    """Token ids of a caption -> [(word, position of its first token, position after its last)]; a space or newline that is a token of its own
    is the first token of the word after it. A gate is read where the model predicts the word, and in a caption that starts after <eot>
    that is the same position."""
    words, letters = [], False  # letters: the previous piece can be continued
    for position, token in enumerate(np.asarray(ids).tolist()):
        piece = encoding.decode_single_token_bytes(token) if token != encoding.eot_token else b""
        plain = all(c.isalnum() for c in piece.decode(errors="ignore").strip())  # part of a character counts as a letter
        if piece and (not letters or not plain or piece[:1].isspace()):
            words.append([piece, position, position + 1])
        elif piece:
            words[-1][0] += piece
            words[-1][2] = position + 1
        letters = bool(piece) and plain
    return [(word.decode(errors="replace").strip(), first, stop) for word, first, stop in words if word.strip()]


def word_class(word, upos=None):
    """"function", "content" or "other" (punctuation, interjections, words that upos, {word: tag}, does not know)."""
    word = word.lower()
    if upos:
        tag = upos.get(word)
        return "function" if tag in FUNCTION_TAGS else "content" if tag in CONTENT_TAGS else "other"
    return "function" if word in FUNCTION_WORDS else "content" if any(c.isalpha() for c in word) else "other"


def looking(model):
    """The layers that have a gate."""
    return [i for i, block in enumerate(model.blocks) if hasattr(block, "gate")]


# ----------------------------------------------------------------------------------------------------------------------
# statistics

def ranks(x):
    """Ranks 1..n of x (n,); equal values share the mean of their ranks."""
    _, inverse, count = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[inverse]


def student_t_p(t, df):
    """Two-sided p of Student's t. With t = sqrt(df) tan(a) the density of a is proportional to cos(a)^(df-1): smooth, over a finite range. The
    tail is integrated by Gauss-Legendre up to pi/2, or over 40 standard deviations (1 / sqrt(df) each), beyond which nothing is left."""
    a = math.atan(abs(t) / math.sqrt(df))
    width = min(math.pi / 2 - a, 40 / math.sqrt(df))
    x, weight = np.polynomial.legendre.leggauss(200)
    scale = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - math.log(math.pi) / 2
    # half the width, as the nodes are those of -1..1, times two sides
    return float(width * (weight * np.exp(scale + (df - 1) * np.log(np.cos(a + width * (x + 1) / 2)))).sum())


def spearman(x, y):
    """Rank correlation of x and y (n,): {rho, p, n}, p from Student's t; None where one of them does not vary."""
    x, y, n = ranks(x), ranks(y), len(x)
    if n < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return {"rho": None, "p": None, "n": n}
    rho = float(np.corrcoef(x, y)[0, 1])
    return {"rho": rho, "p": student_t_p(rho * math.sqrt((n - 2) / (1 - rho * rho)), n - 2) if abs(rho) < 1 else 0.0, "n": n}


def kruskal_wallis(groups):
    """Do groups [(n_i,)] differ in rank? {H, df, p}, H corrected for ties, p from chi-squared; None where nothing varies."""
    x, sizes, df = np.concatenate(groups), [len(g) for g in groups], len(groups) - 1
    r, n, (_, ties) = ranks(x), len(x), np.unique(x, return_counts=True)
    correction = 1 - (ties.astype(float) ** 3 - ties).sum() / (n ** 3 - n) if n > 1 else 0.0
    if df < 1 or correction == 0:
        return {"H": None, "df": df, "p": None}
    sums = [part.sum() ** 2 / len(part) for part in np.split(r, np.cumsum(sizes)[:-1])]
    H = max(0.0, float((12 / (n * (n + 1)) * sum(sums) - 3 * (n + 1)) / correction))  # rounding can leave -1e-13
    return {"H": H, "df": df, "p": torch.special.gammaincc(torch.tensor(df / 2).double(), torch.tensor(H / 2).double()).item()}


def least_squares(columns, y):
    """Ordinary least squares of y (n,) on columns {name: (n,)} and an intercept: {terms: {name: {coef, se, t, p}}, r2, n}; None
    where it has no unique answer."""
    names, X = ["intercept", *columns], np.stack([np.ones(len(y)), *columns.values()], axis=1)
    scale = np.linalg.norm(X, axis=0)  # columns of one length keep a large one from drowning the others
    scale[scale == 0] = 1
    if len(y) <= len(names) or np.linalg.matrix_rank(X / scale) < len(names) or np.ptp(y) == 0:
        return None
    Q, R = np.linalg.qr(X / scale)
    coef = np.linalg.solve(R, Q.T @ y)
    residual, total, df = ((y - X / scale @ coef) ** 2).sum(), ((y - y.mean()) ** 2).sum(), len(y) - len(names)
    se = np.sqrt((np.linalg.inv(R) ** 2).sum(axis=1) * residual / df)
    terms = {name: {"coef": float(b / k), "se": float(e / k), "t": float(b / e), "p": student_t_p(b / e, df)} if e else {"coef": float(b / k)}
             for name, b, e, k in zip(names, coef, se, scale)}
    return {"terms": terms, "r2": float(1 - residual / total), "n": len(y)}


# ----------------------------------------------------------------------------------------------------------------------
# what the gate learned

RESERVED = ("caption", "position", "token", "starts_word", "word", "class", "tag", "gate", "loss")  # columns of gates.csv begin so: no norm may


def read_table(path):
    """A tab-separated file with a header whose first column is the word: {word: {column: text}}."""
    lines, table = read_lines(path), {}
    _, header = next(lines, (0, ""))
    names = header.split("\t")
    if names[0] != "word" or len(names) < 2 or len(set(names)) < len(names):
        raise InputError(f"{path}, line 1: expected a header 'word<TAB>column...', found {header!r:.60}")
    for number, line in lines:
        values = line.split("\t")
        if len(values) != len(names):
            raise InputError(f"{path}, line {number}: {len(values)} columns, expected {len(names)} as in the header")
        table.setdefault(values[0].lower(), dict(zip(names[1:], values[1:])))
    return table


def read_norms(path):
    """{word: {norm: number}} of a table; empty and NA cells are left out."""
    table = read_table(path)
    for word, row in table.items():
        try:
            table[word] = {name: float(value) for name, value in row.items() if value.lower() not in ("", "na", "nan")}
        except ValueError as error:
            raise InputError(f"{path}, word {word!r}: expected numbers or empty cells ({error})") from error
        if not all(map(math.isfinite, table[word].values())) or any(name.startswith(RESERVED) for name in row):
            raise InputError(f"{path}, word {word!r}: expected finite numbers or empty cells, and columns that do not begin with {', '.join(RESERVED)}")
    return table


def read_upos(path):
    """{word: part of speech} of a table with a column upos."""
    table = read_table(path)
    if not all("upos" in row for row in table.values()):
        raise InputError(f"{path}, line 1: expected a column upos")
    return {word: row["upos"] for word, row in table.items()}


def load_teacher(run, data, device="cpu", block_size=0):
    """The text-only model of a run folder; InputError when it cannot judge texts of block_size tokens of this data."""
    model = load_model(run, device=device)
    check_same_tokenizer(run, data)
    if model.config.n_image_token:
        raise InputError(f"--teacher {run} has image tokens; expected a text-only model, trained with --no-images")
    if model.config.block_size < block_size:
        raise InputError(f"--teacher {run} reads {model.config.block_size} tokens, the model {block_size}; expected at least as many")
    return model


def counted_norms(data):
    """{word: {"log10_frequency": ...}} of the training captions, for want of a table of norms."""
    counts = Counter()
    for start, stop in zip(data.offset["train"][:-1], data.offset["train"][1:]):
        counts.update(word.lower() for word, _, _ in words_of(data.tokens["train"][start:stop], data.encoding))
    return {word: {"log10_frequency": math.log10(n)} for word, n in counts.items()}


def gate_table(model, data, upos=None, norms=None, teacher=None):
    """Rows {column: value}, one per token of every held-out caption, and the names of the norms: the word and its class, its norms,
    its gate in every layer that looks and their mean, its loss in nats with and without the image, and a teacher's (gates.csv)."""
    ids, layers, rows = spread_ids(data, None, model.config.block_size), looking(model), []
    norms = norms or counted_norms(data)
    names = list(dict.fromkeys(name for row in norms.values() for name in row))
    losses, gates = caption_losses(model, data, ids)
    others = {"loss_no_image": caption_losses(model, data, ids, "none")[0]}
    if teacher is not None:
        others["loss_teacher"] = caption_losses(teacher, data, ids, "none")[0]
    for n, (i, loss, gate) in enumerate(zip(ids, losses, gates)):
        tokens, mean = data.caption("val", i, len(loss)), gate[layers].mean(axis=0, dtype=np.float64)  # (T,)
        for word, first, stop in words_of(tokens, data.encoding):
            word = word.lower()
            about = {"word": word, "class": word_class(word, upos), "tag": upos.get(word, "X") if upos else word_class(word),
                     **{name: norms.get(word, {}).get(name) for name in names}}
            for k in range(first, stop):
                rows.append({"caption": int(i), "position": k, "token": data.encoding.decode([int(tokens[k])]), "starts_word": int(k == first),
                             **about, **{f"gate_{layer}": float(gate[layer, k]) for layer in layers},
                             "gate": float(mean[k]), "loss": float(loss[k]), **{name: float(each[n][k]) for name, each in others.items()}})
    return rows, names


def gate_report(rows, names, last):
    """What the gate learned, from the rows of gate_table (last: the last layer that looks): spread per part of speech and word class,
    Kruskal-Wallis, Spearman with norms, one joint regression over words, extreme words, and whether the two papers agree."""
    starts = [row for row in rows if row["starts_word"]]
    value = lambda key, some: np.array([row[key] for row in some], dtype=np.float64)

    def groups(kind):
        parts = {}
        for row in starts:
            parts.setdefault(row[kind], []).append(row)
        return dict(sorted(parts.items()))

    def describe(some):
        gate = value("gate", some)
        q1, median, q3 = np.quantile(gate, (0.25, 0.5, 0.75)).tolist()
        return {"n": len(some), "mean": gate.mean(), "sd": gate.std(), "q1": q1, "median": median, "q3": q3, "last_layer": value(last, some).mean()}
    result = {f"by_{kind}": {tag: describe(some) for tag, some in groups(kind).items()} for kind in ("tag", "class")}
    # over every occurrence of a word as if they were independent: they are not, so p is far too small, and H grows with the number of captions
    known = [some for tag, some in groups("tag").items() if tag not in ("X", "other")]
    result["kruskal_wallis"] = {name: kruskal_wallis([value(key, some) for some in known]) if known else None
                                for name, key in (("mean_of_layers", "gate"), ("last_layer", last))}

    # words: a word is one observation, however often it occurs; tokens: each occurrence is one (that of its first token)
    words = [{**some[0], "gate": value("gate", some).mean(), "n": len(some)} for some in groups("word").values()]
    result["spearman"] = {}
    for name in names:
        for unit, some in ("tokens", starts), ("words", words):
            some = [row for row in some if row[name] is not None]
            result["spearman"].setdefault(name, {})[unit] = spearman(value(name, some), value("gate", some))
    predictors = {"class": "class"}
    for short in "concreteness", "frequency":
        predictors |= {short: name for name in names[::-1] if short in name}  # the first such column: ratings often come with their spread
    some = [row for row in words if row["class"] != "other" and all(row[name] is not None for name in predictors.values())]
    result["regression"] = regress(some, predictors)

    gate = value("gate", starts)
    result |= {"spread": gate.std(), "collapsed": bool(gate.std() < 0.01)}
    often = sorted((row["gate"], row["word"], row["n"]) for row in words if row["n"] >= 5 and any(c.isalpha() for c in row["word"]))
    result |= {"most_visual": often[:12], "most_linguistic": often[::-1][:12]}
    # Looking to Learn asks where a token looks, ReGATE what it would cost not to: the gate against the loss saved by the image,
    # and against what a teacher that never saw an image cannot predict
    result["papers_agree"] = spearman(1 - value("gate", rows), value("loss_no_image", rows) - value("loss", rows))
    if "loss_teacher" in rows[0]:
        result["teacher_agrees"] = spearman(1 - value("gate", rows), value("loss_teacher", rows))
        easy_first = sorted(rows, key=lambda row: row["loss_teacher"])
        tenths = [easy_first[i * len(rows) // 10:(i + 1) * len(rows) // 10] for i in range(10)]
        result["by_teacher_loss"] = [{"loss_from": part[0]["loss_teacher"], "loss_to": part[-1]["loss_teacher"], **describe(part)} for part in tenths if part]
    return result


def regress(words, predictors):
    """Gate on class (1 content, 0 function) x concreteness x log frequency (the last two in standard deviations), as far as they are
    known, with interactions; and the share of variance lost without each (open question 2 of the paper)."""
    columns = {}
    for short, name in predictors.items():
        x = np.array([row[name] == "content" if short == "class" else row[name] for row in words], dtype=np.float64)
        columns[short] = x if short == "class" or not x.size or x.std() == 0 else (x - x.mean()) / x.std()
    y, n = np.array([row["gate"] for row in words]), len(columns)
    terms = {" x ".join(some): np.prod([columns[name] for name in some], axis=0) for k in range(1, n + 1) for some in itertools.combinations(columns, k)}
    fit = least_squares(terms, y) if len(y) and np.ptp(y) > 1e-9 else None
    if fit:
        without = {name: least_squares({term: x for term, x in terms.items() if name not in term.split(" x ")}, y) for name in columns}
        fit["r2_lost_without"] = {name: fit["r2"] - less["r2"] for name, less in without.items()}
    return fit


def report(model, data, upos=None):
    """The numbers of summary.json that describe the model, over the whole validation set; losses in nats per token. visual_information_captured:
    (floor without image - caption loss) / (difference of the floors), 1 at the physical limit, below 0 where a perfect blind model would be
    better. Gate and loss of function and content words are those at the first token of each word."""
    ids = spread_ids(data, None, model.config.block_size)
    losses, gates = caption_losses(model, data, ids)
    result = {"val_loss_caption": mean_loss(losses)}
    blind = model.config.n_image_token == 0
    for view, name in ("none", "val_loss_caption_no_image"), ("other", "val_loss_caption_other_image"):
        result[name] = result["val_loss_caption"] if blind else mean_loss(caption_losses(model, data, ids, view)[0])
    result["val_loss_text"] = text_loss(model, data)
    # the floors are those of whole captions: none may be cut by the model's block, nor by --max_caption of prepare_data.py
    cut = data.lengths("val", math.inf).max(initial=0) > model.config.block_size or data.meta["count"].get("caption_val_cut")
    if "floor_with_image" in data.meta and losses and not cut:
        high, low = data.meta["floor_text_only"], data.meta["floor_with_image"]
        result |= {"floor_with_image": low, "floor_text_only": high,
                   "visual_information_captured": (high - result["val_loss_caption"]) / (high - low)}
    by_class, upos = {"function": [], "content": []}, upos or data.meta.get("upos")
    layers = looking(model)
    for i, loss, gate in zip(ids, losses, gates):
        for word, position, _ in words_of(data.caption("val", i, len(loss)), data.encoding):
            kind = word_class(word, upos)
            if kind in by_class:
                by_class[kind].append((gate[layers, position].mean() if layers else np.nan, loss[position]))
    for kind, rows in by_class.items():
        gate, loss = np.mean(rows, axis=0, dtype=np.float64).tolist() if rows else (None, None)
        result |= {f"gate_{kind}_words": gate if layers else None, f"val_loss_{kind}_words": loss}
    return result


# ----------------------------------------------------------------------------------------------------------------------
# pictures

INK, PAPER, GRID = (30, 30, 30), (255, 255, 255), (225, 225, 225)
LOOKS = (245, 140, 40)
LINES = [(200, 80, 20), (30, 90, 180), (40, 140, 70), (130, 60, 160), (90, 90, 90)]
MARKS = [(4, 4), (4, 4), (1, 6), (6, 1), (4, 4)]  # half width and height: dot, ring, bars, empty square, to tell the lines apart without color


def font(size):
    return ImageFont.load_default(size)


def draw_gates(path, words, gates, picture=None, title="", kept=None):
    """Caption words, each in a box as full as the model looks at the image (1 - gate, printed below), beside the picture; words that
    are not kept (token elision) are struck out."""
    left = 20 if picture is None else 300
    boxes, x, y = [], left, 60
    for word, gate in zip(words, gates):
        width = int(font(26).getlength(word)) + 24
        if x + width > 1000:
            x, y = left, y + 100
        boxes.append((x, y, width, word, gate))
        x += width + 8
    canvas = Image.new("RGB", (1020, max(y + 110, 320 if picture else 0)), PAPER)
    draw = ImageDraw.Draw(canvas)
    if picture is not None:
        canvas.paste(ImageOps.contain(picture, (256, 256), Image.NEAREST if picture.width < 128 else Image.LANCZOS), (20, 40))
    draw.text((20, 12), title, INK, font(18))
    for i, (x, y, width, word, gate) in enumerate(boxes):
        fill = round(44 * (1 - gate))  # height of the coloured part: readable without colour too
        draw.rectangle((x, y + 44 - fill, x + width, y + 44), LOOKS)
        draw.rectangle((x, y, x + width, y + 44), outline=INK)
        draw.text((x + 12, y + 6), word, INK, font(26))
        draw.text((x + width / 2, y + 50), f"{1 - gate:.2f}", INK, font(16), anchor="ma")
        if kept is not None and not kept[i]:
            draw.line((x, y + 44, x + width, y), INK, 3)
    canvas.save(path)


def ticks(low, high):
    """Four to ten round numbers between low and high, 1, 2 or 5 times a power of ten apart."""
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = max((k * power for k in (1, 2, 5) if k * power <= (high - low) / 4), default=power)
    return np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step


def draw_curves(path, series, title, xlabel, floors=(), top=1.0, ends=()):
    """Lines {label: [(x, y)]} with their labels at the right end, horizontal dashed floors [(label, y)], and vertical lines where
    epochs end [(x, kind)]. Points above the quantile top are cut: the first steps of a loss would flatten all the rest."""
    points = [p for line in series.values() for p in line]
    if not points:
        return
    xs, ys = [p[0] for p in points], [p[1] for p in points] + [y for _, y in floors]
    x0, x1, y0, y1 = min(xs), max(max(xs), min(xs) + 1), min(ys), np.quantile(ys, top)
    y0, y1 = y0 - 0.05 * (y1 - y0), y1 + 0.05 * (y1 - y0) + 1e-9
    box = (70, 50, 760, 430)
    px = lambda x, y: (box[0] + (x - x0) / (x1 - x0) * (box[2] - box[0]), box[3] - (min(y, y1) - y0) / (y1 - y0) * (box[3] - box[1]))
    canvas = Image.new("RGB", (1000, 490), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((box[0], 16), title, INK, font(20))
    draw.text((box[2], box[3] + 30), xlabel, INK, font(14), anchor="ra")
    for tick in ticks(y0, y1):
        draw.line((*px(x0, tick), *px(x1, tick)), GRID)
        draw.text((box[0] - 8, px(x0, tick)[1]), f"{tick:,.10g}", INK, font(14), anchor="rm")
    for tick in ticks(x0, x1):
        draw.text((px(tick, y0)[0], box[3] + 8), f"{tick:,.10g}", INK, font(14), anchor="ma")
    for x, kind in ends:
        draw.line((*px(x, y0), *px(x, y1)), GRID)
        draw.text((px(x, y0)[0] - 6, box[1] + 2), kind, INK, font(14), anchor="ra")
    labels = []
    for label, y in floors:
        for x in range(box[0], box[2], 12):
            draw.line((x, px(x0, y)[1], x + 6, px(x0, y)[1]), INK)
        labels.append((px(x0, y)[1], f"{label} {y:.3f}", INK))
    for i, (color, (label, line)) in enumerate(zip(LINES, series.items())):
        if line:
            draw.line([px(*p) for p in line], color, 2)
            w, h = MARKS[i]
            for x, y in (px(*p) for p in line[::max(1, len(line) // 12)]):
                (draw.ellipse if i < 2 else draw.rectangle)((x - w, y - h, x + w, y + h), PAPER if i in (1, 4) else color, color)
            labels.append((px(*line[-1])[1], f"{label} {line[-1][1]:#.3g}", color))
    last = -100
    for y, label, color in sorted(labels):
        last = max(y, last + 18)
        draw.text((box[2] + 8, last), label, color, font(14), anchor="lm")
    canvas.save(path)


def draw_bars(path, rows, title, low, high):
    """Horizontal bars, rows of (label, origin, value, spread (from, to) or None): each from its origin, such as chance, to its value."""
    left, width, step = 430, 520, 22
    canvas = Image.new("RGB", (1020, 90 + step * len(rows)), PAPER)
    draw = ImageDraw.Draw(canvas)
    px = lambda x: left + (min(max(x, low), high) - low) / (high - low) * width
    draw.text((20, 16), title, INK, font(20))
    for tick in np.linspace(low, high, 6):
        draw.line((px(tick), 62, px(tick), 66 + step * len(rows)), GRID)
        draw.text((px(tick), 58), f"{tick:g}", INK, font(14), anchor="mb")
    for i, (label, origin, value, spread) in enumerate(rows):
        y = 66 + step * i + step // 2
        draw.text((left - 10, y), label, INK, font(14), anchor="rm")
        x0, x1 = sorted((px(origin), px(value)))
        draw.rectangle((x0, y - 7, x1, y + 7), LOOKS if value >= origin else PAPER, INK)  # below its origin: an empty bar to the left
        draw.line((px(origin), y - 10, px(origin), y + 10), INK, 3)
        if spread:
            draw.line((px(spread[0]), y, px(spread[1]), y), INK, 3)
        draw.text((left + width + 12, y), f"{value:.2f}" if high <= 1 else f"{value:.1f}", INK, font(14), anchor="lm")
    canvas.save(path)


def picture_of(data, row):
    """The picture behind a row of image.npy, or None where only its features are known."""
    if data.meta["encoder"] == "pixels":
        return unpatch(data.image[row])
    names = data.meta.get("pictures")
    return open_picture(names[row]) if names and os.path.isfile(names[row]) else None


def gate_picture(path, model, data, caption=None, split="val", keep=None, title=""):
    """Draw the gates (mean of the layers that look) of one caption, the wordiest of the first hundred when None; with keep, the
    positions that token elision runs, words without one are struck out."""
    layers, length = looking(model), data.lengths(split, model.config.block_size)
    if not layers or not len(length):
        return None
    if caption is None:
        caption = int(np.argmax(length[:100]))
    _, (gate,) = caption_losses(model, data, np.array([caption]), split=split)
    words = words_of(data.caption(split, caption, model.config.block_size), data.encoding)
    draw_gates(path, [word for word, _, _ in words], [gate[layers, first].mean() for _, first, _ in words],
               picture_of(data, data.image_row[split][caption]), f"how much each word looks at the picture (1 - gate){title}",
               None if keep is None else [bool(set(range(first, stop)) & set(keep)) for _, first, stop in words])
    return path


# ----------------------------------------------------------------------------------------------------------------------
# several runs, several checkpoints

def print_table(rows):
    """Rows of cells, the first one a header; the first column is text, the others are numbers."""
    cells = [[f"{x:.2f}" if isinstance(x, float) else "" if x is None else str(x) for x in row] for row in rows]
    width = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for row in cells:
        print("  ".join([row[0].ljust(width[0]), *(x.rjust(w) for x, w in zip(row[1:], width[1:]))]).rstrip())


def fold_seeds(runs):
    """{run: (config, {column: number})} -> rows (name, n, {column: (mean, std or None)}); runs that differ only in seed are one."""
    groups, aside = {}, ("seed", "out", "device", "compile", "log_interval", "save_interval", "stop_after", "keep_checkpoints")
    for name, (config, numbers) in runs.items():
        same = {part: {key: value for key, value in config[part].items() if key not in aside} for part in ("train", "model")}
        key, seed = json.dumps(same, sort_keys=True), config["train"].get("seed")
        while seed in [known for _, known, _ in groups.get(key, [])]:
            key += " again"  # a seed a second time is not another seed: a row of its own
        groups.setdefault(key, []).append((name, seed, numbers))
    rows = []
    for members in groups.values():
        columns = {}
        for column in members[0][2]:
            x = [numbers[column] for _, _, numbers in members if numbers.get(column) is not None]
            if len(x) == len(members):
                columns[column] = float(np.mean(x)), float(np.std(x, ddof=1)) if len(x) > 1 else None
        rows.append((members[0][0], len(members), columns))
    return rows


def print_runs(rows):
    """One line per run, the best score of each column marked * (losses: the lowest)."""
    columns = list(dict.fromkeys(column for _, _, numbers in rows for column in numbers))
    percents = [c for c in columns if c.split(":")[0].split()[0] in (*TASKS, "mean")]
    told = lambda c, x: f"{x:,.{0 if c == 'H' else 2 if c in percents else 3}f}"
    best = {}  # column -> its best mean as printed: what is equal as printed is equally good
    for c in columns if len(rows) > 1 else ():
        if c in (*percents, "caption loss", "text loss", "captured") and "blind" not in c:
            best[c] = told(c, (min if "loss" in c else max)(numbers[c][0] for _, _, numbers in rows if c in numbers))
    cell = lambda c, mean, std: f"{told(c, mean)}{'' if std is None else f' +-{told(c, std)}'}{'*' if best.get(c) == told(c, mean) else ' '}"
    print_table([["run", "seeds", *columns]] + [[name, n, *(cell(c, *numbers[c]) if c in numbers else None for c in columns)] for name, n, numbers in rows])


def score_checkpoints(run, data, root, tasks, protocol, device):
    """Every checkpoint that train.py --keep_checkpoints left: rows {step, epoch, kind, ends_epoch, losses and accuracies}."""
    rows = []
    for path in sorted(glob.glob(os.path.join(glob.escape(run), "checkpoints", "step_*.pt"))):
        now, model = load_checkpoint(path).get("now", {}), load_model(run, os.path.join("checkpoints", os.path.basename(path)), device)
        if not {"step", "epoch", "kind", "ends_epoch"} <= set(now):
            raise InputError(f"{path}: not a checkpoint of --keep_checkpoints")
        results, _, missing = benchmark(model, data.encoding, root, tasks, protocol)
        rows.append({**{key: now[key] for key in ("step", "epoch", "kind", "ends_epoch")}, **validate(model, data, 50000),
                     **{task: result["mean"] for task, result in results.items()}})
    if not rows:
        raise InputError(f"{run}: no checkpoints/step_*.pt; train with --keep_checkpoints")
    for line in missing:
        print(line)
    return rows


def oscillation(rows):
    """{measure: {kind: (mean change, mean size of the change) over epochs of that kind}}, from one epoch's end to the next."""
    ends, result = [row for row in rows if row["ends_epoch"]], {}
    for measure in [key for key in rows[0] if key not in ("step", "epoch", "kind", "ends_epoch") and rows[0][key] is not None]:
        for kind in sorted({row["kind"] for row in ends[1:]}):
            change = [b[measure] - a[measure] for a, b in zip(ends, ends[1:]) if b["kind"] == kind]
            result.setdefault(measure, {})[kind] = float(np.mean(change)), float(np.mean(np.abs(change)))
    return result


# ----------------------------------------------------------------------------------------------------------------------
# what the command line asks for

def draw_paradigms(run, results):
    bars = [(f"{task}: {uid}", TASKS[task], x, None) for task, r in results.items() for uid, x in sorted(r["by_uid"].items(), key=lambda x: -x[1])]
    if bars:
        draw_bars(os.path.join(run, "paradigms.png"), bars, "accuracy in %, from chance", 0, 100)


def show_benchmarks(results, paradigms):
    rows = [["task", "items", "chance", "accuracy", "without image", "ties"]]
    rows += [[task, r["n"], TASKS[task], r["mean"], r.get("mean_no_image"), r["ties"]] for task, r in results.items()]
    if results:
        print_table(rows + [["mean of tasks", None, None, float(np.mean([r["mean"] for r in results.values()])), None, None]])
    for task, r in results.items():
        if r["ties"] == r["n"]:
            print(f"{task}: all {r['n']} items are ties; the first option is the right one, so a tie counts as right")
        if "group" in r:
            print(f"{task}: both captions right {r['text']:.2f}, both images right {r['image']:.2f}, all four {r['group']:.2f} (chance 25, 25, 16.7)")
        for tag in r.get("by_tag", ()):
            print(f"{task}, {tag}: {r['by_tag'][tag]:.2f}, without image {r['by_tag_no_image'][tag]:.2f}")
    if paradigms:
        print_table([["paradigm", "accuracy"]] + [[f"{task}: {uid}", x] for task, r in results.items() for uid, x in r["by_uid"].items()])


def learn_gates(run, model, data, upos, norms, teacher):
    """What the gate of a run learned (gate_report), written to gates.csv, gates.json, gates_by_class.png and, with a teacher, gates_by_teacher.png;
    None without a gate."""
    layers = looking(model)
    if not layers or not len(data.image_row["val"]):
        print(f"{run}: no gate to look at: " + ("the validation set has no captions" if layers else "the model was trained without one"))
        return None
    rows, names = gate_table(model, data, upos or data.meta.get("upos"), norms, teacher)
    with open(os.path.join(run, "gates.csv"), "w", encoding="utf-8", newline="") as f:
        csv.writer(f).writerows([rows[0], *(row.values() for row in rows)])  # a header, and every row in its order
    found = gate_report(rows, names, f"gate_{layers[-1]}")
    write_json(os.path.join(run, "gates.json"), found)
    bar = lambda label, x: (label, 0, 1 - x["mean"], (1 - x["q3"], 1 - x["q1"]))
    draw_bars(os.path.join(run, "gates_by_class.png"), [bar(f"{tag} ({x['n']:,})", x) for tag, x in by_gate(found)],
              "how much the model looks at the picture (1 - gate): mean, 25% to 75%", 0, 1)
    if teacher is not None:
        draw_bars(os.path.join(run, "gates_by_teacher.png"),
                  [bar(f"the teacher's loss is {x['loss_from']:.2f} to {x['loss_to']:.2f} nats", x) for x in found["by_teacher_loss"]],
                  "how much the model looks (1 - gate), by tenths of the tokens", 0, 1)
    return found


def by_gate(found):
    return sorted(found["by_tag"].items(), key=lambda x: x[1]["mean"])


def gate_numbers(found):
    """{column: number or None} of a gate_report: mean gate of function and content words and their difference, Kruskal-Wallis H, Spearman's rho
    (norms: over words; loss saved by the image, teacher's loss: over tokens), R2 of the regression, and what it loses without each predictor."""
    function, content = (found["by_class"].get(kind, {}).get("mean") for kind in ("function", "content"))
    numbers = {"function": function, "content": content, "difference": None if None in (function, content) else function - content,
               "H": (found["kruskal_wallis"]["mean_of_layers"] or {}).get("H")}
    numbers |= {f"rho {name}": x["words"]["rho"] for name, x in found["spearman"].items()}
    numbers |= {"rho saved": found["papers_agree"]["rho"], "rho teacher": found.get("teacher_agrees", {}).get("rho")}
    if found["regression"]:
        numbers |= {"R2": found["regression"]["r2"], **{f"R2 lost: {name}": x for name, x in found["regression"]["r2_lost_without"].items()}}
    return numbers


def show_gates(found):
    p = lambda x: "" if x is None else f"{x:.2g}"
    print()
    kinds = by_gate(found)
    if "content" not in found["by_tag"]:  # without a table of parts of speech the tags are the classes
        kinds += found["by_class"].items()
    print_table([["gate (1 language, 0 vision)", "words", "mean", "sd", "last layer"]]
                + [[tag, x["n"], x["mean"], x["sd"], x["last_layer"]] for tag, x in kinds])
    for name, test in found["kruskal_wallis"].items():
        if test and test["H"] is not None:
            print(f"Kruskal-Wallis over parts of speech, {name.replace('_', ' ')}: H {test['H']:.1f}, df {test['df']}, p {p(test['p'])}")
    print_table([["Spearman with the gate", "rho, words", "p", "n", "rho, tokens", "n"]]
                + [[name, x["words"]["rho"], p(x["words"]["p"]), x["words"]["n"], x["tokens"]["rho"], x["tokens"]["n"]] for name, x in found["spearman"].items()])
    if found["regression"]:
        fit = found["regression"]
        print_table([[f"regression over {fit['n']} words", "coefficient", "se", "t", "p"]]
                    + [[name, f"{x['coef']:.4f}", f"{x['se']:.4f}", x["t"], p(x["p"])] for name, x in fit["terms"].items() if "p" in x])
        print(f"R2 {fit['r2']:.3f}; lost without " + ", ".join(f"{name} {x:.3f}" for name, x in fit["r2_lost_without"].items()))
    for title in "most_visual", "most_linguistic":
        print(f"{title.replace('_', ' ')} words: " + ", ".join(f"{word} {gate:.2f}" for gate, word, _ in found[title]))
    for name, what in ("papers_agree", "the loss that the image saves"), ("teacher_agrees", "the loss of the text-only teacher"):
        if found.get(name, {}).get("rho") is not None:
            print(f"do the papers agree? Spearman of 1 - gate with {what}: rho {found[name]['rho']:.3f}, {found[name]['n']:,} tokens")
    if found["collapsed"]:
        print(f"WARNING: the gate has collapsed: its standard deviation over the occurrences of words is {found['spread']:.4f}")


def show_checkpoints(runs, root_of, tasks, protocol, device):
    """checkpoints.json, checkpoints.png (accuracies) and checkpoint_losses.png of every run {run: config}. Prints the checkpoints of a single run and
    how its scores move in each kind of epoch, or over several runs a table of the last checkpoints and of these moves."""
    table = {}
    for run, config in runs.items():
        rows = score_checkpoints(run, open_data(run, config), root_of(config), tasks, protocol, device)
        moves = oscillation(rows)
        write_json(os.path.join(run, "checkpoints.json"), {"checkpoints": rows, "oscillation": moves})
        for name, keys in ("checkpoints.png", list(TASKS)), ("checkpoint_losses.png", ["val_loss_caption", "val_loss_text"]):
            draw_curves(os.path.join(run, name), {key: [(row["step"], row[key]) for row in rows] for key in keys if rows[0].get(key) is not None},
                        "accuracy in %" if keys[0] in TASKS else "loss, nats per token", "steps; T and C: a text or caption epoch ends, M: a mixed one",
                        ends=[(row["step"], row["kind"]) for row in rows if row["ends_epoch"]])
        plain = {measure: f"{measure.removeprefix('val_loss_')} loss" if "loss" in measure else measure for measure in rows[0]}
        table[run] = config, {**{plain[key]: value for key, value in rows[-1].items() if key not in ("step", "epoch", "kind", "ends_epoch")},
                              **{f"in {kind}: {plain[key]}": mean for key, kinds in moves.items() for kind, (mean, _) in kinds.items()}}
    if len(runs) > 1:
        print("\nthe last checkpoint, and the mean change over an epoch of a kind; losses in nats per token")
        return print_runs(fold_seeds(table))
    measures = [key for key in rows[0] if key not in ("epoch", "ends_epoch")]  # of the one run of the loop above
    print_table([measures] + [[str(row["step"])] + [row[key] for key in measures[1:]] for row in rows])
    print_table([["change over an epoch", "epochs", "mean", "mean size"]]
                + [[measure, kind, f"{mean:+.3f}", f"{size:.3f}"] for measure, kinds in moves.items() for kind, (mean, size) in kinds.items()])


@torch.no_grad()
def show_picture(run, model, path, prompt):
    """Caption any picture: prints the words and their gates, and draws them into caption.png."""
    meta, encoding, device = load_meta(run), load_tokenizer(run), next(model.parameters()).device
    if not model.config.n_image_token:
        raise InputError(f"{run}: the model was trained without images; it cannot look at {path}")
    if meta["encoder"] == "given":
        raise InputError(f"{run}: its image features came ready-made with the data, and nothing here can compute them for {path}; "
                         "train on pictures (prepare_data.py toy or photos) to caption your own")
    picture = open_picture(path)
    image = torch.from_numpy(np.float32(make_encoder(meta["encoder"], model.config.n_image_token)([picture]))).to(device)
    idx = torch.tensor([[encoding.eot_token, *encoding.encode_ordinary(prompt)]], device=device)
    if idx.size(1) > model.config.block_size:
        raise InputError(f"--prompt has {idx.size(1) - 1} tokens; the model reads {model.config.block_size - 1} at most")
    idx = model.generate(idx, model.config.block_size, image, temperature=0, eot=encoding.eot_token)
    ids, layers = idx[0, 1:].tolist(), looking(model)
    gates = model.trunk(idx[:, :-1], image)[1][:, 0].cpu().numpy()  # (n_layer, T) at the positions that predict ids
    words = [(word, float(gates[layers, first].mean())) for word, first, _ in words_of(ids, encoding)] if layers else []
    print(encoding.decode([i for i in ids if i != encoding.eot_token]))
    for word, gate in words:
        print(f"{word:20} gate {gate:.2f}")
    if words:
        out = os.path.join(run, "caption.png")
        draw_gates(out, *zip(*words), picture, "how much each word looks at the picture (1 - gate)")
        print(out)


def make_parser():
    parser = Parser(description="What a trained run knows: benchmarks, losses, what its gate learned, pictures. "
                    "Several runs print tables, a row per run; runs that differ only in seed are one row.", allow_abbrev=False)
    parser.add_argument("run", nargs="+", help="run folder made by train.py")
    parser.add_argument("--babylm_eval", default="", metavar="DIR", help="an evaluation_data/full_eval folder (default: that of the run's own data)")
    parser.add_argument("--tasks", default=",".join(TASKS), help="tasks by comma (default: %(default)s)")
    parser.add_argument("--protocol", default="2025", choices=("2025", "2024"),
                        help="2024: a space before whole sentences, and VQA as 'Question: ... Answer:' (default: %(default)s)")
    parser.add_argument("--paradigms", action="store_true", help="print the accuracy of every paradigm (paradigms.png always shows them)")
    parser.add_argument("--norms", default="", metavar="TSV", help="word norms: a header 'word<TAB>concreteness<TAB>...' and a line per word")
    parser.add_argument("--upos", default="", metavar="TSV", help="parts of speech: columns 'word' and 'upos', a line per word")
    parser.add_argument("--teacher", default="", metavar="RUN", help="a run trained with --no-images: does the gate look where that run cannot predict?")
    parser.add_argument("--caption", type=int, default=None, metavar="N", help="validation caption to draw into gates.png, by row (default: a long one)")
    parser.add_argument("--checkpoints", action="store_true", help="score every checkpoint of runs trained with --keep_checkpoints")
    parser.add_argument("--image", default="", metavar="FILE", help="caption this picture instead")
    parser.add_argument("--prompt", default="", help="how the caption of --image begins")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps, or auto for the best there is (default: %(default)s)")
    return parser


def read_run(run):
    """config.json of a run folder and, where training has ended, summary.json (otherwise {})."""
    path, told = os.path.join(run, "config.json"), os.path.join(run, "summary.json")
    if not os.path.isfile(path):
        raise InputError(f"{path}: not there; expected the folder of a run of train.py")
    config, summary = read_json(path), read_json(told) if os.path.isfile(told) else {}
    parts = [config.get("train"), config.get("model")] if isinstance(config, dict) else [None]
    if not all(isinstance(part, dict) for part in (*parts, summary)) or not isinstance(parts[0].get("data"), str):
        raise InputError(f"{path}: not the config.json of a run, or its summary.json is damaged")
    return config, {key: value for key, value in summary.items() if type(value) in (int, float)}


def open_data(run, config):
    """The data a run was trained on; InputError when its tokenizer is another by now."""
    data = Data(config["train"]["data"])
    check_same_tokenizer(run, data)
    return data


def main(argv=None):
    """Score runs and write results.json, predictions.json, paradigms.png, gates.csv, gates.json and gates_by_class.png into their folders;
    prints all about a single run and draws its gates.png, or prints tables over several. Returns {run: results}, or None where other things were asked for."""
    args = make_parser().parse_args(argv)
    tasks, device = list(dict.fromkeys(args.tasks.split(","))), pick_device(args.device)
    for task in tasks:
        if task not in TASKS:
            raise InputError(f"--tasks {task}: expected some of {', '.join(TASKS)}")
    if len(args.run) > 1 and (args.image or args.paradigms or args.caption is not None):
        raise InputError("--image, --paradigms and --caption take one run")
    names = [os.path.normpath(run) for run in dict.fromkeys(args.run)]
    runs = {run: (*read_run(run), load_model(run, device=device), load_tokenizer(run)) for run in names}  # before anything is scored
    root_of = lambda config: args.babylm_eval or os.path.join(config["train"]["data"], "evaluation_data", "full_eval")
    if args.prompt and not args.image:
        raise InputError("--prompt begins the caption of --image; give both")
    config, _, model, _ = runs[names[0]]
    if args.image:
        return show_picture(names[0], model, args.image, args.prompt)
    if args.checkpoints:
        return show_checkpoints({run: config for run, (config, *_) in runs.items()}, root_of, tasks, args.protocol, device)
    upos = read_upos(args.upos) if args.upos else None
    norms = read_norms(args.norms) if args.norms else None
    every, tables, counted, year = {}, ({}, {}, {}), {}, "" if args.protocol == "2025" else f"_{args.protocol}"
    for run, (config, summary, model, encoding) in runs.items():
        data = open_data(run, config)  # first: where data, teacher or --caption do not fit, nothing of this run is overwritten
        n_caption = len(data.image_row["val"])
        if args.caption is not None and not 0 <= args.caption < n_caption:
            raise InputError(f"--caption {args.caption}: the validation set has {n_caption} captions, counted from 0")
        teacher = load_teacher(args.teacher, data, device, model.config.block_size) if args.teacher else None
        if not summary:
            print(f"{run}: training has not ended (no summary.json); this is its best model so far")
        results, predictions, missing = benchmark(model, encoding, root_of(config), tasks, args.protocol)
        every[run] = results
        for line in missing:
            print(f"{run}: {line}")
        if args.babylm_eval and not results:
            raise InputError(f"{args.babylm_eval}: none of {args.tasks} is there; expected an evaluation_data/full_eval folder")
        write_json(os.path.join(run, f"results{year}.json"), results)
        write_json(os.path.join(run, f"predictions{year}.json"), predictions)
        draw_paradigms(run, results)
        if not norms and data.folder not in counted and looking(model):
            counted[data.folder] = counted_norms(data)  # once for all runs on the same data
        found = learn_gates(run, model, data, upos, norms or counted.get(data.folder), teacher)
        scores = {name: value for task, r in results.items() for name, value in ((task, r["mean"]), (f"{task} blind", r.get("mean_no_image")))}
        scores |= {"mean": float(np.mean([r["mean"] for r in results.values()])) if results else None}
        scores |= {"caption loss": summary.get("val_loss_caption"), "text loss": summary.get("val_loss_text"), "captured": summary.get("visual_information_captured"),
                   "tokens run": summary.get("processed_ratio"), "minutes": summary.get("minutes")}
        by_tag = {f"{task}: {tag}{blind}": r[f"by_tag{key}"][tag] for task, r in results.items() for tag in r.get("by_tag", ())
                  for blind, key in (("", ""), (" blind", "_no_image"))}
        for table, numbers in zip(tables, (scores, by_tag, gate_numbers(found) if found else {})):
            table[run] = config, numbers
    if len(runs) > 1:
        if len({tuple(results) for results in every.values()}) > 1:
            for _, numbers in tables[0].values():
                del numbers["mean"]  # means over different tasks do not compare
        for title, table in zip(("scores; losses in nats per token", "items by kind, in %", "gates: 1 language, 0 vision"), tables):
            if any(numbers for _, numbers in table.values()):
                print(f"\n{title}")
                print_runs(fold_seeds(table))
        return every
    show_benchmarks(results, args.paradigms)  # from here on the one run of the loop above
    print()
    for name, value in report(model, data, upos).items():
        print(f"{name:32} {value if not isinstance(value, float) else f'{value:.4f}'}")
    if found:
        show_gates(found)
    print(gate_picture(os.path.join(run, "gates.png"), model, data, args.caption) or "")
    return every


if __name__ == "__main__":
    run_script(main)
