"""
What the papers claim, measured on runs: python tests/claims.py COMMAND ..., as claims.sh asks for it.

table NAME,NAME RUN ...    numbers of summary.json, minutes and steps
film GIF RUN               claim 1: a caption's gates while a run learns, a frame for each of checkpoints/
explain RUN ...            claims 1, 7: do class, concreteness, frequency explain the gate? Of gates.csv
flat DATA FOLDER           claim 4: the same data with one long vector per picture instead of its patches
swing SETS RUN ...         claim 6: what an epoch of each kind does to losses and benchmarks, of checkpoints/
                           SETS: evaluation_data/full_eval, then without BLiMP; "" = those of the data
why PICTURE CHECKPOINT ... claim 10: how much of its captions a run still has to learn
Tables are Markdown. Runs that differ only in their seed are one, mean ± standard deviation.
"""
import csv
import glob
import io
import os
import re
import shutil
import sys
from collections import defaultdict

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import eval as evaluation
from gatevlm import expect, load_checkpoint, load_model, pick_device, run_script
from prepare_data import Data, read_json, sha256, write_json

def checkpoints(run):
    paths = sorted(glob.glob(os.path.join(glob.escape(run), "checkpoints", "*.pt")))
    expect(paths, f"{run}: no checkpoints; train with --keep_checkpoints")
    return paths

def markdown(found):
    """Print runs [(folder, config, {name: number})]."""
    text = lambda x: f"{x:.4g}" if type(x) is float else str("" if x is None else x).replace("+-", "± ")
    rows = [*evaluation.fold_seeds(found)]
    for row in rows:
        row["run"] = os.path.basename(row["run"]).removesuffix("-1")
    for cells in [rows[0], ["---"] * len(rows[0]), *(map(text, row.values()) for row in rows)]:
        print("|", " | ".join(cells), "|")

def table(names, *runs):
    found, names = [], [*names.split(","), "minutes", "step"]
    for run in runs:
        config, summary = (read_json(os.path.join(run, f"{name}.json")) for name in ("config", "summary"))
        summary["minutes"] = summary["seconds"] / 60
        found.append((run, config, {name: summary.get(name) for name in names}))
    markdown(found)

# ---- 1, gates while a run learns
def film(gif, run):
    data, frames = Data(read_json(os.path.join(run, "config.json"))["train"]["data"]), []
    for path in checkpoints(run):
        frame = io.BytesIO()
        frame.name = "frame.png"  # tells Pillow the format
        evaluation.gate_picture(frame, load_model(*os.path.split(path)), data)
        frames.append(Image.open(frame).convert("RGB"))
        step = f"step {int(path[-11:-3]):,}"
        ImageDraw.Draw(frames[-1]).text((1000, 14), step, "black", ImageFont.load_default(18), anchor="ra")
    times = [400] * (len(frames) - 1) + [3000]  # milliseconds
    frames[0].save(gif, save_all=True, append_images=frames[1:], duration=times, loop=0)

# ---- 1 and 7, what explains the gate
def kruskal_wallis(groups):
    """Do groups [(n_i,)] differ in rank? H, n - 1 times the share of variance of the ranks that is between
    them; None where there is no variance."""
    r = evaluation.ranks(np.concatenate([*groups, []]))
    if len(groups) < 2 or np.ptp(r) == 0:
        return None
    parts = np.split(r, np.cumsum([len(group) for group in groups])[:-1])
    between = sum(len(x) * (x.mean() - r.mean()) ** 2 for x in parts)
    return float((len(r) - 1) * between / ((r - r.mean()) ** 2).sum())

def regression(columns, y):
    """R2 of least squares of y (n,) on columns [(n,)]; None where there is no unique answer."""
    X = np.stack([np.ones(len(y)), *columns], axis=1)
    coef, _, rank, _ = np.linalg.lstsq(X, y, rcond=None)
    if rank < X.shape[1] or len(y) <= rank or np.ptp(y) == 0:
        return None
    return float(1 - ((y - X @ coef) ** 2).sum() / ((y - y.mean()) ** 2).sum())

def explained(rows):
    """Of gates.csv: H of gates over parts of speech, the share of the variance of words' mean gates that all
    predictors explain, what it loses without each. For the shares a word counts once."""
    tags = defaultdict(list)
    for row in rows:
        if row["tag"] not in ("X", "other"):
            tags[row["tag"]].append(float(row["gate"]))
    norms = [name for name in dict.fromkeys(n for row in rows for n in row) if name.startswith("norm ")]
    matching = ([n for n in norms if re.search(part, n, re.I)] for part in ("conc", "freq|subtlex|zipf"))
    predictors, gates, of = [names[0] for names in matching if names], defaultdict(list), {}
    for row in rows:
        if row["class"] != "other" and all(row.get(name) not in (None, "") for name in predictors):
            gates[row["word"]].append(float(row["gate"]))
            of[row["word"]] = [row["class"] == "content", *(float(row[name]) for name in predictors)]
    y = np.array([np.mean(gates[word]) for word in of])
    x = dict(zip(["class", *predictors], np.array([*of.values()], float).T))
    found = {"H": kruskal_wallis([*tags.values()]), "words": len(y), "R2": regression(x.values(), y)}
    for name in x if found["R2"] is not None else ():
        less = regression([x[other] for other in x if other != name], y)
        found[f"R2 lost without {name}"] = found["R2"] - less
    return found

def explain(*runs):
    found = []
    for run in runs:
        with open(os.path.join(run, "gates.csv"), encoding="utf-8", newline="") as f:
            found.append((run, read_json(os.path.join(run, "config.json")), explained([*csv.DictReader(f)])))
    markdown(found)

# ---- 4, one image token for all pixels
def flat(source, folder):
    shutil.copytree(source, folder)
    meta, own = read_json(os.path.join(folder, "meta.json")), os.path.join(folder, "image.npy")
    for path in own, *glob.glob(os.path.join(glob.escape(folder), "evaluation_data", "full_eval", "*.npy")):
        image = np.load(path)
        np.save(path, image.reshape(*image.shape[:-2], 1, -1))  # (..., K, image_dim)
    meta |= dict(n_image_token=1, image_dim=meta["n_image_token"] * meta["image_dim"], encoder="flat")
    meta["sha256"]["image.npy"] = sha256(own)
    write_json(os.path.join(folder, "meta.json"), meta)

# ---- 6, how scores swing (stability, §6)
def changes(rows):
    """How numbers change over an epoch of each kind, on average, of those at the ends of epochs."""
    found = defaultdict(list)
    for a, b in zip(rows, rows[1:]):
        for name in b:
            if name in ("val_loss_caption", "val_loss_text", *evaluation.TASKS) and b[name] is not None:
                found[f"{name}, change in {b['kind']}"].append(b[name] - a[name])
    return {name: float(np.mean(x)) for name, x in found.items()}

def swing(root, *runs):
    found, where = [], (pick_device("auto"), root, ("winoground",) if root else ("blimp", "winoground"))
    for run in runs:
        ends = [path for path in checkpoints(run) if load_checkpoint(path)["now"]["ends_epoch"]]
        scored = [evaluation.evaluate(path, *where) for path in ends]
        found.append((run, scored[0][0], changes([row for _, row in scored])))
    markdown(found)

# ---- 10, what is left to learn
def token_losses(path):
    """Loss in nats of every token of at most 2,000 held-out captions (n,), lowest first."""
    data = Data(load_checkpoint(path)["config"]["data"])
    ids = np.arange(len(data.image_row["val"]))[:2000]
    seen = evaluation.caption_losses(load_model(*os.path.split(path)), data, "val", ids)
    return np.sort(np.concatenate([loss for loss, _ in seen]))

def shares(loss):
    """How tokens share loss and gradient, of their losses (n,), lowest first. A token pushes its right logit
    by 1 - p."""
    push, half = 1 - np.exp(-loss), len(loss) // 2
    row = {"loss": loss.mean(), "% of tokens below 0.03": 100 * (loss < 0.03).mean()}
    row["mean 1 - p"] = push.mean()
    row["% of loss, hard half"] = 100 * loss[half:].sum() / loss.sum()
    row["% of gradient, easy half"] = 100 * push[:half].sum() / push.sum()
    return {name: float(x) for name, x in row.items()}

def why(picture, *paths):
    """Draw the losses of held-out caption tokens, the easiest first: x percent of them are below y."""
    curves, rows = {}, []
    for path in paths:
        loss, step = token_losses(path), load_checkpoint(path)["now"]["step"]
        name = os.path.basename(evaluation.locate(path)[0])
        curves[f"{name}, step {step}"] = [(x, np.quantile(loss, x / 100)) for x in range(96)]
        rows.append({"run": path} | shares(loss))
    evaluation.draw_curves(picture, curves)
    evaluation.print_table(rows)

if __name__ == "__main__":
    name, *paths = sys.argv[1:]
    commands = {f.__name__: f for f in (table, film, explain, flat, swing, why)}
    run_script(lambda: commands[name](*paths))
