"""
What a trained run knows: python eval.py out/run [out/another ...] [--babylm_eval DIR] [--image FILE]

From top to bottom: losses with and without the image, five benchmarks, words and their gates, statistics,
pictures, tables, export, command line. A checkpoint (out/run/checkpoints/*.pt) may stand for a run.
"""
import argparse
import csv
import glob
import json
import math
import os
import re
from collections import defaultdict

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from gatevlm import InputError, expect, load_checkpoint, load_model, pick_device, run_script
from prepare_data import EOT, Data, check_text, load_meta, load_npy, load_tokenizer, make_encoder
from prepare_data import open_picture, read_json, read_lines, read_rows, unpatch, write_json

# of an item: group (of vision tasks the official name, "": of its file), context, right option, wrong ones
SIGHT = dict(winoground=("WinoGround", "", "caption_0", "caption_1"))
SIGHT |= dict(vqa=("VQA", "question", "target_ans", "distractors"))
TASKS = dict(blimp=("UID", "", "sentence_good", "sentence_bad"))
TASKS |= dict(supplement=("", "", "sentence_good", "sentence_bad"))
TASKS |= dict(ewok=("Domain", "Context1", "Target1", "Target2")) | SIGHT
CLASSES = {tag: "function" for tag in "ADP AUX CCONJ DET PART PRON SCONJ".split()}
CLASSES |= {tag: "content" for tag in "ADJ ADV NOUN NUM PROPN VERB".split()}
FUNCTION_WORDS = """a an the this that these some no all of in on at by for with from to into and or but if
    not i you he she it we they me him her my his its who what there is are was be do has have""".split()

# ---- losses
def length_batches(length, batch_tokens):
    """Indices of length (n,), longest first, in batches of at most batch_tokens tokens, or of one text."""
    order, i = np.argsort(-np.asarray(length), kind="stable"), 0
    while i < len(order):
        n = max(1, batch_tokens // max(1, length[order[i]]))
        yield order[i : i + n]
        i += n

@torch.no_grad()
def read(model, idx, targets, image=None):
    """Losses (B,T) in nats and gates (B,T), the mean of the layers that have one, of arrays, as arrays."""
    model.eval()
    device = next(model.parameters()).device
    out = model(*(None if x is None else torch.from_numpy(x).to(device) for x in (idx, image, targets)))
    return out.losses.cpu().numpy(), out.gates[model.gated].mean(dim=0).cpu().numpy()

def caption_losses(model, data, split, ids, view="image"):
    """Per caption of ids (n,): losses (n_token,) in nats, gates (n_token,). view: "image" shows each its own,
    "other" the next one of the file, "none" withholds it."""
    block, rows = model.config.block_size, data.image_row[split][ids]
    if view == "other":
        shown = np.unique(data.image_row[split])
        rows = shown[(np.searchsorted(shown, rows) + 1) % len(shown)]
    length, result = data.lengths(split, block, ids), [None] * len(ids)
    looks = view != "none" and model.config.n_image_token > 0
    for pick in length_batches(length, 8192):
        idx, targets, _ = data.batch("C", split, ids[pick], block)
        losses, gates = read(model, idx, targets, data.images(rows[pick]) if looks else None)
        for n, loss, gate in zip(pick, losses, gates):
            result[n] = loss[: length[n]], gate[: length[n]]
    return result

def validate(model, data, most=math.inf, seen=None):
    """Losses in nats per token of held-out text and captions, evenly spread ones of about most tokens, or
    of seen {view: caption_losses}; or None."""
    block, n = model.config.block_size, len(data.text["val"]) - 1
    length, found = data.lengths("val", block), {}
    ids = np.arange(0, len(length), max(1, math.ceil(length.sum() / most)))
    for view, result in (seen or {"image": caption_losses(model, data, "val", ids)}).items():
        name = "val_loss_caption" if view == "image" else f"val_loss_caption_{view}_image"
        found[name] = [loss for loss, _ in result]
    starts, found["val_loss_text"] = np.arange(0, max(0, n), block)[:: max(1, math.ceil(n / most))], []
    for i in range(0, len(starts), 64):
        idx, targets, _ = data.batch("T", "val", starts[i : i + 64], block)
        found["val_loss_text"].append(read(model, idx, targets)[0][targets != -1])
    return {name: float(np.concatenate(x).mean(dtype=np.float64)) if x else None for name, x in found.items()}

# ---- benchmarks, scored as officially: by the probability of an option after <eot> and context
def read_item(task, row, name):
    """A line of a benchmark -> uid, context, options, image (index into the states, or None), tag."""
    group, context, right, wrong = TASKS[task]
    item = {"uid": group if task in SIGHT else row[group] if group else name, "image": None}
    tag = row.get("collapsed_tag") or row.get("linguistics_term") or ""  # one of BLiMP's 12 phenomena
    item["tag"] = tag.replace("s-selection", "argument_structure")
    item["context"] = row[context] if context else ""
    item["options"] = [row[right], *row[wrong]] if task == "vqa" else [row[right], row[wrong]]
    for text in (item["uid"], item["context"] or "none", *item["options"]):
        check_text("text", text)
    if task == "winoground":
        item["image"] = row["image_idx"], ("image_0", "image_1").index(row["image_key"])
    if task == "vqa":
        item["image"] = (row["idx_in_hf_dataset"],)
    expect(all(type(i) is int and i >= 0 for i in item["image"] or ()), f"image {item['image']}")
    return item

def read_task(root, task):
    """Items of root/<task>_filtered/*.jsonl, and for a vision task the image features, mapped, or None."""
    items, path = [], os.path.join(root, f"{task}_states.npy")
    for file in sorted(glob.glob(os.path.join(glob.escape(root), f"{task}_filtered", "*.jsonl"))):
        for number, line in read_lines(file):
            try:
                if line.strip():
                    items.append(read_item(task, json.loads(line), os.path.basename(file)[: -len(".jsonl")]))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(f"{file}, line {number}: not an item of {task} ({error!r:.80})") from error
    if task not in SIGHT or not os.path.isfile(path):
        return items, None
    states = load_npy(path, ndim=(2, 3, 4))  # winoground: (n, 2, K, image_dim), vqa: (n, K, image_dim)
    n = 1 + max((item["image"][0] for item in items), default=-1)
    expect(n <= len(states), f"{path}: {len(states)} rows, the items ask for {n}")
    return items, states

def score(model, items, encoding, states=None, batch_tokens=4096):
    """Sum of the log-probabilities in nats of every option of every item, [(n_option,)], and [uid] of texts
    longer than the block: of those the end is read."""
    texts, block = [], model.config.block_size
    for n, item in enumerate(items):
        before = len(item["context"].encode())
        for option in item["options"]:
            ids = encoding.encode_ordinary(item["context"] + " " * bool(before) + option)
            sizes = [len(encoding.decode_single_token_bytes(i)) for i in ids] if before else []
            first = np.searchsorted(np.cumsum(sizes), before, side="right")  # a token that ends in the option
            cut = max(0, len(ids) - block)
            texts.append((n, [encoding.eot_token, *ids][cut:], max(0, first - cut), cut))
    length, total = np.array([len(ids) - 1 for _, ids, _, _ in texts]), np.zeros(len(texts))
    for pick in length_batches(length, batch_tokens):
        idx, image = np.zeros((len(pick), length[pick].max()), np.int64), None
        targets = np.full_like(idx, -1)
        for row, (_, ids, first, _) in enumerate(texts[t] for t in pick):
            idx[row, : len(ids) - 1], targets[row, first : len(ids) - 1] = ids[:-1], ids[1 + first :]
        if states is not None:
            image = np.stack([states[items[texts[t][0]]["image"]] for t in pick]).astype(np.float32)
        total[pick] = -read(model, idx, targets, image)[0].sum(axis=1, dtype=np.float64)
    expect(np.isfinite(total).all(), "a score is NaN: weights or image features are damaged")
    ends = np.cumsum([len(item["options"]) for item in items])
    return np.split(total, ends[:-1]), [items[n]["uid"] for n, *_, cut in texts if cut]

def accuracies(task, items, scores):
    """{name: percent right} of a task and its groups. The first option is right, and a tie is, too."""
    right, groups = 100.0 * np.array([np.argmax(x) == 0 for x in scores]), defaultdict(list)
    for item, x in zip(items, right):
        for name in {item["tag"], item["tag" if task in SIGHT else "uid"]}:
            groups[name].append(x)
    means = {name: float(np.mean(x)) for name, x in sorted(groups.items()) if name}
    whole = right if task in SIGHT else [means[x] for x in sorted({item["uid"] for item in items})]
    result = {task: float(np.mean(whole))} | {f"{task}: {name}": x for name, x in means.items()}
    if task == "winoground":  # an item stands twice, once per image, each time its own caption first
        of = {item["image"]: x for item, x in zip(items, scores)}
        pairs = [i for i, key in of if key == 0 and (i, 1) in of]
        a, b = (np.array([of[i, key] for i in pairs]).reshape(-1, 2) for key in (0, 1))
        text = (a[:, 0] > a[:, 1]) & (b[:, 0] > b[:, 1])
        image = (a[:, 0] > b[:, 1]) & (b[:, 0] > a[:, 1])
        for name, x in ("text", text), ("image", image), ("group", text & image):
            result |= {f"{task}: {name} score": 100 * float(x.mean())} if pairs else {}
    return result

def benchmark(model, encoding, root, tasks=tuple(TASKS)):
    """{name: percent right} of the tasks found in root, vision tasks also without images ("blind"), and
    {task: predictions as officially spelled}."""
    results, predictions = {}, {}
    for task in tasks:
        items, states = read_task(root, task)
        looks = task in SIGHT and model.config.n_image_token > 0
        if not items or looks and states is None:
            print(f"{task}: left out, no {root}/{task}{'_states.npy' if items else '_filtered/*.jsonl'}")
            continue
        scores, cut = score(model, items, encoding, states if looks else None)
        results |= accuracies(task, items, scores)
        n = sum(int((x == x.max()).sum() > 1) for x in scores)
        print(f"{task}: {len(items):,} items, {n} ties, {len(cut)} texts cut to their end", *sorted({*cut}))
        if task in SIGHT:
            blind = score(model, items, encoding)[0] if looks else scores
            results |= {f"{name} blind": x for name, x in accuracies(task, items, blind).items()}
        chosen = predictions[task] = {}
        for item, x in zip(items, scores):
            rows = chosen.setdefault(item["uid"], {"predictions": []})["predictions"]
            pred = " " * bool(item["context"]) + item["options"][int(np.argmax(x))]
            rows.append({"id": f"{item['uid']}_{len(rows)}", "pred": pred})
    return results, predictions

# ---- words and their gates
def words_of(ids, encoding):
    """Targets of a caption -> [(word, position of its first token, after its last)]."""
    words, letters = [], False  # letters: the piece before can be continued
    for position, token in enumerate(np.asarray(ids).tolist()):
        piece = encoding.decode_single_token_bytes(token) if 0 <= token != encoding.eot_token else b""
        plain = all(c.isalnum() for c in piece.decode(errors="ignore").strip())
        if piece and (not letters or not plain or piece[:1].isspace()):
            words.append([piece, position, position + 1])
        elif piece:
            words[-1] = [words[-1][0] + piece, words[-1][1], position + 1]
        letters = bool(piece) and plain
    return [(word.decode(errors="replace").strip(), *at) for word, *at in words if word.strip()]

def word_class(word, upos):
    """Function, content, other: by a table {word: part of speech}, or else by FUNCTION_WORDS."""
    guess = "function" if word in FUNCTION_WORDS else "content" if any(map(str.isalpha, word)) else "other"
    return CLASSES.get(upos.get(word, "").upper(), "other") if upos else guess

def read_words(path):
    """{word: {column: number, "upos": tag}} of a table with a header, first column the word."""
    header, *rows = (row for row in read_rows(path) if row)
    expect(all(len(row) == len(header) for row in rows), f"{path}: expected a header, rows of as many cells")
    table = defaultdict(dict)
    for word, *cells in rows:
        for name, cell in zip(header[1:], cells):
            if name.lower() == "upos" and cell:
                table[word.lower()].setdefault("upos", cell)
            elif re.fullmatch(r"[+-]?\d*\.?\d+(e[+-]?\d+)?", cell, re.I):
                table[word.lower()].setdefault(name, float(cell))
    print(f"{path}: {len(table):,} words, {', '.join(header[1:])}")
    return table

def word_table(model, data, seen, words, teacher=None):
    """A row per word of held-out captions, seen as {view: caption_losses}, for gates.csv: class, norms, gate,
    losses in nats with the image, without, of a teacher at its first token."""
    ids, rows = np.arange(len(data.image_row["val"])), []
    upos = {word: row["upos"] for word, row in words.items() if "upos" in row} or data.meta.get("upos")
    views = {"loss": seen["image"], "loss_no_image": seen["none"]}
    if teacher:
        views["loss_teacher"] = caption_losses(teacher, data, "val", ids, "none")
    block = min(m.config.block_size for m in (model, teacher or model))
    for n in ids:
        _, (targets,), _ = data.batch("C", "val", ids[n : n + 1], block)
        for word, k, _ in words_of(targets, data.encoding):
            word = word.lower()
            row = {"caption": int(n), "position": k, "word": word, "class": word_class(word, upos)}
            row["tag"] = upos.get(word, "X") if upos else row["class"]
            row["gate"] = float(views["loss"][n][1][k])
            row |= {name: float(view[n][0][k]) for name, view in views.items()}
            norms = words.get(word, {}).items()
            rows.append(row | {f"norm {name}": x for name, x in norms if name != "upos"})
    return rows

# ---- statistics
def ranks(x):
    """1..n; equal values share the mean of their ranks."""
    _, inverse, count = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[inverse]

def spearman(x, y):
    """Rank correlation of x and y (n,); None where one of them does not vary."""
    varies = len(x) > 2 and np.ptp(x) > 0 and np.ptp(y) > 0
    return float(np.corrcoef(ranks(x), ranks(y))[0, 1]) if varies else None

def gate_report(rows):
    """Of word_table: {name: number}, gates per class and part of speech, Spearman's rho with norms; and the
    words, most visual first."""
    column = lambda name, part=rows: np.array([row[name] for row in part])
    gate = column("gate")
    by = {name: {v: gate[column(name) == v] for v in sorted({*column(name)})} for name in ("class", "tag")}
    found = {f"gate of {v}": x.mean() for groups in by.values() for v, x in groups.items()}
    found |= {f"loss of {v}": column("loss")[column("class") == v].mean() for v in by["class"]}
    found["gate sd"] = gate.std()
    # from here on a word counts once
    _, first, which, n = np.unique(column("word"), return_index=True, return_inverse=True, return_counts=True)
    mean = np.bincount(which, gate) / n
    words = [rows[i] | {"gate": g, "n": k} for i, g, k in zip(first, mean.tolist(), n)]
    for name in sorted({name for word in words for name in word if name.startswith("norm ")}):
        part = [word for word in words if name in word]
        found[f"rho {name[5:]}"] = spearman(column(name, part), column("gate", part))
    # does the gate look where the image saves loss, and where a teacher cannot predict?
    found["rho loss saved"] = spearman(1 - gate, column("loss_no_image") - column("loss"))
    if "loss_teacher" in rows[0]:
        found["rho teacher"] = spearman(1 - gate, column("loss_teacher"))
    often = sorted((word["gate"], word["word"]) for word in words if word["n"] >= 5)
    found = {k: None if x is None else float(x) for k, x in found.items()}
    return found, [word for _, word in often if word.isalpha()]

# ---- pictures
INK, GRID, LOOKS = "#1e1e1e", "#e1e1e1", "#f58c28"
COLORS = "#ebb496", "#96b9e6", "#c85014", "#1e5ab4", INK, INK  # the first stand behind
font = ImageFont.load_default

def new_canvas(width, height, title):
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((20, 14), title, INK, font(18))
    return canvas, draw

def draw_gates(path, words, gates, picture=None, kept=None):
    """Words in boxes as full as the model looks at the picture (1 - gate). Those not kept are struck out."""
    left, boxes = 300 if picture else 20, []
    x, y = left, 60
    for word in words:
        width = int(font(26).getlength(word)) + 24
        if x + width > 1000:
            x, y = left, y + 100
        boxes.append((x, y, x + width, y + 44))
        x += width + 8
    canvas, draw = new_canvas(1020, max(y + 110, 320), "how much each word looks at the picture")
    if picture:
        sharp = Image.NEAREST if picture.width < 128 else Image.LANCZOS
        canvas.paste(ImageOps.contain(picture, (256, 256), sharp), (20, 44))
    for i, (word, gate, (x, y, right, low)) in enumerate(zip(words, gates, boxes)):
        draw.rectangle((x, y + round(44 * float(gate)), right, low), LOOKS)
        draw.rectangle((x, y, right, low), outline=INK)
        draw.text((x + 12, y + 6), word, INK, font(26))
        draw.text(((x + right) / 2, y + 50), f"{1 - gate:.2f}", INK, font(16), anchor="ma")
        if kept is not None and not kept[i]:
            draw.line((x, low, right, y), INK, 3)
    canvas.save(path)

def draw_curves(path, series):
    """Losses {label: [(step, y)]}. The highest 5%, of the first steps, are cut."""
    lines = [(label, line, color) for (label, line), color in zip(series.items(), COLORS) if line]
    x, y = np.array([point for _, line, _ in lines for point in line]).T
    x0, x1, y0, y1 = x.min(), x.max(), y.min(), np.quantile(y, 0.95) + 1e-9
    canvas, draw = new_canvas(1000, 480, "loss in nats per token")
    px = lambda x, y: (70 + 690 * (x - x0) / max(1, x1 - x0), 430 - 370 * (min(y, y1) - y0) / (y1 - y0))
    for i in range(6):
        x, y = x0 + (x1 - x0) * i / 5, y0 + (y1 - y0) * i / 5
        draw.line((*px(x0, y), *px(x1, y)), GRID)
        draw.text((62, px(x, y)[1]), f"{y:.3g}", INK, font(14), anchor="rm")
        draw.text((px(x, y)[0], 438), f"{x:,.0f}", INK, font(14), anchor="ma")
    last = 0
    for _, line, color in lines:
        draw.line([px(*point) for point in line], color, 2)
    for label, line, color in sorted(lines, key=lambda x: -x[1][-1][1]):
        last = max(px(*line[-1])[1], last + 16)
        draw.text((768, last), f"{label} {line[-1][1]:.3g}", color, font(14), anchor="lm")
    canvas.save(path)

def gate_picture(path, model, data, caption=None, split="val", elision=None):
    """Draw the gates of a caption, for None the longest of a hundred; struck out is what elision drops."""
    block, names = model.config.block_size, data.meta.get("pictures")
    ids = np.array([np.argmax(data.lengths(split, block)[:100]) if caption is None else caption])
    ((_, gate),), row = caption_losses(model, data, split, ids), data.image_row[split][ids[0]]
    _, targets, place = data.batch("C", split, ids, block)
    words, kept = words_of(targets[0], data.encoding), None
    picture = unpatch(data.image[row]) if data.meta["encoder"] == "pixels" else None
    if names and os.path.isfile(names[row]):
        picture = open_picture(names[row])
    if elision:
        place, own = torch.from_numpy(place), elision.config.elide_by == "own"
        keep = elision.choose(place, place >= 0, elision.n_keep(targets[0].size)).tolist()[0]
        kept = [first + own in keep for _, first, _ in words]  # its first token
    draw_gates(path, [word for word, *_ in words], [gate[first] for _, first, _ in words], picture, kept)

# ---- what a run knows
def load_teacher(run, data, device="cpu"):
    """The text-only model of a run; InputError where it cannot judge the captions of data."""
    teacher, key = load_model(run, device=device), "tokenizer.tiktoken"
    fits = not teacher.config.n_image_token and load_meta(run)["sha256"][key] == data.meta["sha256"][key]
    expect(fits, f"{run}: no teacher for {data.folder}; train it with --no-images on that data")
    return teacher

def read_log(out):
    """The lines of log.jsonl, but for a last one that a crash cut short."""
    with open(os.path.join(out, "log.jsonl"), encoding="utf-8") as f:
        return [json.loads(line) for line in f if line.endswith("\n")]

def locate(run):
    """(folder, name in it) of the checkpoint that run stands for."""
    folder = run if os.path.isdir(run) else re.sub(r"(/checkpoints)?/[^/]*$", "", os.path.abspath(run))
    return folder, "best.pt" if folder == run else os.path.relpath(run, folder)

def evaluate(run, device, root="", tasks=tuple(TASKS), words=None, teacher="", data=""):
    """All that a run knows: config and {name: number}; writes summary.json, predictions/, gates.csv and
    pictures. Of a checkpoint: losses and benchmarks. Without its data: benchmarks."""
    folder, name = locate(run)
    path, model = lambda name: os.path.join(folder, name), load_model(folder, name, device)
    config = read_json(path("config.json"))
    data = data or config["train"]["data"]
    root = root or os.path.join(data, "evaluation_data", "full_eval")
    scores, predictions = benchmark(model, load_tokenizer(folder), root, tasks)
    if not os.path.isdir(data):
        print(f"{run}: benchmarks only, {data} is not there (see --data)")
        return config, scores | (load_checkpoint(run)["now"] if folder != run else {})
    data = Data(data)
    same = load_meta(folder)["sha256"] == data.meta["sha256"]
    expect(same, f"{data.folder}: not the data that {folder} was trained on")
    if folder != run:
        return config, load_checkpoint(run)["now"] | validate(model, data, 50000) | scores
    ids, n = np.arange(len(data.image_row["val"])), len(np.unique(data.image_row["val"]))
    views = ("image", "none", "other")[: 1 + n]  # one has no other
    seen = {view: caption_losses(model, data, "val", ids, view) for view in views}
    numbers = validate(model, data, seen=seen)
    whole = data.lengths("val", math.inf).max(initial=0) <= model.config.block_size
    if "floor_with_image" in data.meta and whole:  # the floors are those of whole captions
        low, high = (data.meta[name] for name in ("floor_with_image", "floor_text_only"))
        captured = (high - numbers["val_loss_caption"]) / (high - low)
        numbers |= dict(floor_with_image=low, floor_text_only=high, visual_information_captured=captured)
    numbers |= load_checkpoint(path("last.pt"))["now"] | scores
    numbers["processed_ratio"] = numbers["tokens_processed"] / max(1, numbers["tokens_seen"])
    for task, chosen in predictions.items():  # where the official collation looks
        home = path(f"predictions/zero_shot/causal/{task.replace('supplement', 'blimp')}/{task}_filtered")
        os.makedirs(home, exist_ok=True)
        write_json(f"{home}/predictions.json", chosen)
    log, curves = read_log(folder), {}
    for name, k in ("loss_caption", 10), ("loss_text", 10), ("val_loss_caption", 1), ("val_loss_text", 1):
        x = np.array([(line["step"], line[name]) for line in log if line.get(name) is not None])
        curves[name] = [x[i : i + k].mean(axis=0) for i in range(len(x) - k + 1)]  # smooth
    floors = {name: [(0, x), (numbers["step"], x)] for name, x in numbers.items() if name.startswith("floor")}
    draw_curves(path("loss.png"), curves | floors)
    if model.gated and len(data.image_row["val"]):
        judge = load_teacher(teacher, data, device) if teacher else None
        rows = word_table(model, data, seen, words or {}, judge)
        with open(path("gates.csv"), "w", encoding="utf-8", newline="") as f:
            table = csv.DictWriter(f, dict.fromkeys(name for row in rows for name in row))
            table.writeheader()
            table.writerows(rows)
        found, often = gate_report(rows)
        print(f"{run} looks most at {', '.join(often[:12])}; least at {', '.join(often[:-13:-1])}")
        classes = {name[8:]: x for name, x in found.items() if name.startswith("gate of ")}
        draw_gates(path("gates_by_class.png"), classes.keys(), classes.values())
        gate_picture(path("gates.png"), model, data)
        numbers |= found
    write_json(path("summary.json"), numbers)
    return config, numbers

# ---- tables
def print_table(rows):
    """Rows {column: text or number}, a line each; turned round where there are far more columns than rows."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    digits = lambda x: 0 if abs(x) >= 1000 else 2 if abs(x) >= 10 else 4
    text = lambda x: "" if x is None else f"{x:,.{digits(x)}f}" if isinstance(x, float) else str(x)
    cells = [columns] + [[text(row.get(column)) for column in columns] for row in rows]
    cells = cells if len(columns) < len(rows) + 9 else list(zip(*cells))
    width = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        print("  ".join([row[0].ljust(width[0]), *map(str.rjust, row[1:], width[1:])]).rstrip())

def fold_seeds(runs):
    """[(run, config, {name: number})] -> rows; runs that differ only in their seed are one, mean +- std."""
    groups = defaultdict(list)
    for run, config, numbers in runs:
        train = config["train"] | dict.fromkeys("seed out device stop_after compile log_interval".split())
        step = os.path.basename(run) if run.endswith(".pt") else ""
        groups[json.dumps([train, config["model"], step])].append((run, numbers))
    for (run, numbers), *others in groups.values():
        row = {"run": run, "seeds": 1 + len(others)} | numbers
        for name in numbers if others else ():
            x = [part.get(name) for part in (numbers, *(part for _, part in others))]
            whole = None not in x and type(x[0]) is not str
            row[name] = f"{np.mean(x):.4g} +-{np.std(x, ddof=1):.2g}" if whole else None
        yield row

# ---- export
def export(run, folder):
    """Write the language half of a run as a GPT-2 of transformers, <eot> before every text."""
    model, encoding = load_model(*locate(run)), load_tokenizer(locate(run)[0])
    c, eot, ids = model.config, encoding.eot_token, encoding._mergeable_ranks
    parts = {"wte": [model.token_embedding], "wpe": [model.position_embedding], "ln_f": [model.ln]}
    for i, b in enumerate(model.blocks):
        parts |= {f"h.{i}.ln_1": [b.ln1], f"h.{i}.ln_2": [b.ln2]}
        parts |= {f"h.{i}.attn.c_attn": [b.attn.query, b.attn.key_value], f"h.{i}.attn.c_proj": [b.attn.proj]}
        parts |= {f"h.{i}.mlp.c_fc": [b.mlp[0]], f"h.{i}.mlp.c_proj": [b.mlp[2]]}
    weights = {"lm_head.weight": model.head.weight}
    for name, layers in parts.items():
        for kind, _ in layers[0].named_parameters():
            x = torch.cat([getattr(layer, kind) for layer in layers])
            weights[f"transformer.{name}.{kind}"] = x.t() if isinstance(layers[0], torch.nn.Linear) else x
    header, data = {"__metadata__": {"format": "pt"}}, bytearray()
    for name, x in weights.items():  # safetensors: length of the header, header, numbers
        raw = x.detach().numpy().tobytes()
        header[name] = dict(dtype="F32", shape=[*x.shape], data_offsets=[len(data), len(data) + len(raw)])
        data += raw
    os.makedirs(folder)
    with open(os.path.join(folder, "model.safetensors"), "wb") as f:
        head = json.dumps(header).encode()
        f.write(len(head).to_bytes(8, "little") + head + data)

    # a letter for every byte, as GPT-2 has them; a merge for every way to put a token together
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order = sorted(range(256), key=lambda byte: byte not in plain)
    letters = dict(zip(order, map(chr, [*plain, *range(256, 324)])))
    spell = lambda token: "".join(letters[byte] for byte in token)
    splits = [(t[:i], t[i:]) for t in ids for i in range(1, len(t))]
    merges = [[spell(a), spell(b)] for a, b in splits if a in ids and b in ids]
    bpe = dict(type="BPE", vocab={spell(t): i for t, i in ids.items()}, merges=merges, ignore_merges=True)
    end = dict.fromkeys("single_word lstrip rstrip normalized".split(), False) | {"special": True}
    split = dict(type="Split", pattern={"Regex": encoding._pat_str}, behavior="Isolated", invert=False)
    spelled = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=False)
    special = {EOT: dict(id=EOT, ids=[eot], tokens=[EOT])}
    one = [{"SpecialToken": dict(id=EOT, type_id=0)}, {"Sequence": dict(id="A", type_id=0)}]
    begin = dict(type="TemplateProcessing", single=one, special_tokens=special)
    begin["pair"] = [*one, {"Sequence": dict(id="B", type_id=0)}]
    tokenizer = dict(added_tokens=[end | dict(id=eot, content=EOT)], model=bpe, decoder=spelled)
    steps = dict(type="Sequence", pretokenizers=[split, spelled])
    tokenizer |= dict(pre_tokenizer=steps, post_processor=begin)
    config = dict(model_type="gpt2", architectures=["GPT2LMHeadModel"], vocab_size=c.vocab_size,
                  n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
                  tie_word_embeddings=c.tie_weights, bos_token_id=eot, eos_token_id=eot)
    names = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token=EOT, eos_token=EOT)
    for name, x in ("config", config), ("tokenizer", tokenizer), ("tokenizer_config", names):
        write_json(os.path.join(folder, f"{name}.json"), x)
    print(f"{folder}: the language half of {run}, a GPT-2 for transformers")

# ---- command line
def write(run, model, args):
    """Print texts that go on from a prompt or captions of a picture, the first with gates: caption.png."""
    encoding, n, block, image = load_tokenizer(run), max(1, args.n_sample), model.config.block_size, None
    encoder, device = load_meta(run)["encoder"], next(model.parameters()).device
    if args.image:
        expect(model.config.n_image_token, f"{run}: the model was trained without images")
        expect(encoder != "given", f"{run}: of an unknown image encoder; see prepare_data.py --encoder")
        picture = open_picture(args.image)
        features = np.float32(make_encoder(encoder, model.config.n_image_token)([picture]))
        image = torch.from_numpy(features).to(device).expand(n, -1, -1)
    torch.manual_seed(args.seed % 2**63)
    idx = torch.tensor([[encoding.eot_token, *encoding.encode_ordinary(args.prompt)]] * n, device=device)
    expect(idx.size(1) <= block, f"--prompt: {idx.size(1)} tokens do not fit the block of {block}")
    idx = model.generate(idx, block, image, args.temperature, encoding.eot_token).cpu().numpy()
    print(*(encoding.decode(row).split(EOT)[0] for row in idx[:, 1:].tolist()), sep="\n")
    if args.image and model.gated:
        _, (gate,) = read(model, idx[:1, :-1], idx[:1, 1:], features)
        gates = [(word, gate[first]) for word, first, _ in words_of(idx[0, 1:], encoding)]
        print("".join(f"{word:16} {g:.4f}\n" for word, g in gates), end="")
        draw_gates(os.path.join(run, "caption.png"), [w for w, _ in gates], [g for _, g in gates], picture)

FLAGS = [
    ("babylm_eval", "", "evaluation_data/full_eval; empty = that of the data"),
    ("tasks", ",".join(TASKS), "benchmarks by comma"),
    ("data", "", "where the data of the run are now"),
    ("norms", "", "table of word norms; its first column is the word"),
    ("upos", "", "table of parts of speech: columns word and upos"),
    ("teacher", "", "a text-only run: does the gate look where that is at a loss?"),
    ("export", "", "folder to write instead: a GPT-2 for transformers"),
    ("image", "", "picture to caption instead"),
    ("prompt", "", "text to go on from, or to begin the caption with"),
    ("n_sample", 0, "texts to write"),
    ("temperature", 0.0, "of sampling; 0 takes the best token"),
    ("seed", 1, "of sampling"),
    ("device", "auto", "cpu, cuda, mps, or auto for the best"),
]

def main(argv=None):
    """Score runs and print a table of them; returns their {name: number}."""
    p = argparse.ArgumentParser(usage="eval.py RUN [RUN ...] [--flag value] ...", allow_abbrev=False)
    p.add_argument("run", nargs="+", help="run folder, or a checkpoint in it")
    for name, default, text in FLAGS:
        text += f" (default: {default!r})"
        p.add_argument(f"--{name}", type=type(default), default=default, help=text)
    args = p.parse_args(argv)
    device, tasks, words = pick_device(args.device), args.tasks.split(","), {}
    expect(set(tasks) <= set(TASKS), f"--tasks {args.tasks}: expected some of {', '.join(TASKS)}")
    for folder in filter(None, (args.babylm_eval, args.data)):
        expect(os.path.isdir(folder), f"{folder}: no such folder")
    expect(args.temperature >= 0 <= args.n_sample, "a flag of sampling is below 0")
    if args.export:
        expect(len(args.run) == 1, "--export: expected one run")
        return export(args.run[0], args.export)
    if args.image or args.prompt or args.n_sample:
        return [write(x, load_model(x, name, device), args) for x, name in map(locate, args.run)]
    for path in filter(None, (args.norms, args.upos)):
        for word, row in read_words(path).items():
            words.setdefault(word, {}).update(row)
    names = dict.fromkeys(map(os.path.normpath, args.run))
    runs = [(x, *evaluate(x, device, args.babylm_eval, tasks, words, args.teacher, args.data)) for x in names]
    print_table([*fold_seeds(runs)])
    return {run: numbers for run, _, numbers in runs}

if __name__ == "__main__":
    run_script(main)
