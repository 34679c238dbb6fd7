"""What a trained run knows: python eval.py out/run prints its report and draws its gate picture.

In reading order: losses with and without the image, words and their gates, the report, pictures.
"""
import argparse
import json
import os
import sys

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from gatevlm import InputError, load_model
from prepare_data import Data, open_picture, read_json, unpatch

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

@torch.no_grad()
def caption_losses(model, data, ids, view="image", batch_tokens=8192):
    """Per caption of the validation set: losses (n_token,) in nats and gates (n_layer, n_token). view: "image" shows each its
    own image, "other" the next image of the file, "none" withholds it."""
    block, device = model.config.block_size, next(model.parameters()).device
    length, rows = data.lengths("val", block, ids), data.image_row["val"][ids]
    if view == "other":
        every = np.unique(data.image_row["val"])
        rows = every[(np.searchsorted(every, rows) + 1) % len(every)]
    losses, gates, order, i = [None] * len(ids), [None] * len(ids), np.argsort(-length, kind="stable"), 0
    was_training = model.training
    model.eval()
    while i < len(order):
        pick = order[i:i + max(1, batch_tokens // int(length[order[i]]))]  # longest first, so that little is padding
        idx, targets, image = (torch.from_numpy(x).to(device) for x in data.caption_batch("val", ids[pick], block, rows[pick]))
        seen = image if view != "none" and model.config.n_image_token else None
        loss, gate = (x.cpu().numpy() for x in model.token_losses(idx, targets, seen))
        for j, k in enumerate(pick):
            losses[k], gates[k] = loss[j, :length[k]], gate[:, j, :length[k]]
        i += len(pick)
    model.train(was_training)
    return losses, gates


@torch.no_grad()
def text_loss(model, data, max_tokens=None):
    """Mean loss in nats per token over the validation text, read in blocks, of which about max_tokens are evenly spread over it;
    None without text."""
    stream, T, device = data.text["val"], model.config.block_size, next(model.parameters()).device
    n = len(stream) - 1
    if n < 1:
        return None
    starts = np.arange(0, n, T)[::1 if max_tokens is None else -(-n // max_tokens)]
    whole = starts[starts + T <= n]
    was_training, total, count = model.training, 0.0, 0
    model.eval()
    for rows in [whole[i:i + 64] for i in range(0, len(whole), 64)] + [starts[starts + T > n]]:  # the last block may be short
        if len(rows):
            block = stream[rows[:, None] + np.arange(min(T, n - rows[0]) + 1)].astype(np.int64)
            block = torch.from_numpy(block).to(device)
            total += model.token_losses(block[:, :-1], block[:, 1:])[0].cpu().double().sum().item()
            count += block[:, 1:].numel()
    model.train(was_training)
    return total / count


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
# words and their gates

def words_of(ids, encoding):
    """Token ids of a caption -> [(word, position of its first token)]. A gate is read where the model predicts the word, and in a
    caption that starts after <eot> that is the same position."""
    words, letters = [], False  # letters: the previous piece can be continued
    for position, token in enumerate(ids):
        piece = encoding.decode_single_token_bytes(int(token)) if int(token) != encoding.eot_token else b""
        plain = all(c.isalnum() for c in piece.decode(errors="ignore").strip())  # part of a character counts as a letter
        if piece and (not letters or not plain or piece[:1].isspace()):
            words.append([piece, position])
        elif piece:
            words[-1][0] += piece
        letters = bool(piece) and plain
    return [(word.decode(errors="replace").strip(), position) for word, position in words if word.strip()]


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


def report(model, data):
    """The numbers of summary.json that describe the model, over the whole validation set."""
    ids = spread_ids(data, None, model.config.block_size)
    losses, gates = caption_losses(model, data, ids)
    result = {"val_loss_caption": mean_loss(losses)}
    blind = model.config.n_image_token == 0
    for view, name in ("none", "val_loss_caption_no_image"), ("other", "val_loss_caption_other_image"):
        result[name] = result["val_loss_caption"] if blind else mean_loss(caption_losses(model, data, ids, view)[0])
    result["val_loss_text"] = text_loss(model, data)
    if "floor_with_image" in data.meta and losses:
        high, low = data.meta["floor_text_only"], data.meta["floor_with_image"]
        result |= {"floor_with_image": low, "floor_text_only": high,
                   "visual_information_captured": (high - result["val_loss_caption"]) / (high - low)}
    by_class, upos = {"function": [], "content": []}, data.meta.get("upos")
    layers = looking(model)
    for i, loss, gate in zip(ids, losses, gates):
        start = data.offset["val"][i]
        for word, position in words_of(data.tokens["val"][start:start + len(loss)], data.encoding):
            kind = word_class(word, upos)
            if kind in by_class:
                by_class[kind].append((gate[layers, position].mean() if layers else np.nan, loss[position]))
    for kind, rows in by_class.items():
        gate, loss = np.mean(rows, axis=0, dtype=np.float64).tolist() if rows else (None, None)
        result |= {f"gate_{kind}_words": gate if layers and not blind else None, f"val_loss_{kind}_words": loss}
    return result


# ----------------------------------------------------------------------------------------------------------------------
# pictures

INK, PAPER, GRID = (30, 30, 30), (255, 255, 255), (225, 225, 225)
LANGUAGE, VISION = (255, 255, 255), (245, 140, 40)
LINES = [(200, 80, 20), (30, 90, 180), (40, 140, 70), (130, 60, 160), (90, 90, 90)]


def font(size):
    return ImageFont.load_default(size)


def draw_gates(path, words, gates, picture=None, title=""):
    """Caption words, each in a box as full as the model looks at the image (1 - gate, printed below), beside the picture."""
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
        canvas.paste(picture.resize((256, 256), Image.NEAREST if picture.width < 128 else Image.LANCZOS), (20, 40))
    draw.text((left, 20), title, INK, font(18))
    for x, y, width, word, gate in boxes:
        fill = round(44 * (1 - gate))  # height of the coloured part: readable without colour too
        draw.rectangle((x, y + 44 - fill, x + width, y + 44), VISION)
        draw.rectangle((x, y, x + width, y + 44), outline=INK)
        draw.text((x + 12, y + 6), word, INK, font(26))
        draw.text((x + width / 2, y + 50), f"{1 - gate:.2f}", INK, font(16), anchor="ma")
    canvas.save(path)


def draw_curves(path, series, title, xlabel, floors=()):
    """Lines {label: [(x, y)]} with their labels at the right end, and horizontal dashed floors [(label, y)]."""
    points = [p for line in series.values() for p in line]
    if not points:
        return
    xs, ys = [p[0] for p in points], [p[1] for p in points] + [y for _, y in floors]
    x0, x1, y0, y1 = min(xs), max(max(xs), min(xs) + 1), min(ys), np.quantile(ys, 0.95)  # the first steps may leave the picture
    y0, y1 = y0 - 0.05 * (y1 - y0), y1 + 0.05 * (y1 - y0) + 1e-9
    box = (70, 50, 760, 430)
    px = lambda x, y: (box[0] + (x - x0) / (x1 - x0) * (box[2] - box[0]), box[3] - (min(y, y1) - y0) / (y1 - y0) * (box[3] - box[1]))
    canvas = Image.new("RGB", (960, 490), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((box[0], 16), title, INK, font(20))
    draw.text((box[2], box[3] + 30), xlabel, INK, font(14), anchor="ra")
    for tick in np.linspace(y0, y1, 6):
        draw.line((*px(x0, tick), *px(x1, tick)), GRID)
        draw.text((box[0] - 8, px(x0, tick)[1]), f"{tick:.2f}", INK, font(14), anchor="rm")
    for tick in np.linspace(x0, x1, 6):
        draw.text((px(tick, y0)[0], box[3] + 8), f"{tick:,.0f}", INK, font(14), anchor="ma")
    labels = []
    for label, y in floors:
        for x in range(box[0], box[2], 12):
            draw.line((x, px(x0, y)[1], x + 6, px(x0, y)[1]), INK)
        labels.append((px(x0, y)[1], f"{label} {y:.3f}", INK))
    for color, (label, line) in zip(LINES, series.items()):
        if line:
            draw.line([px(*p) for p in line], color, 2)
            labels.append((px(*line[-1])[1], f"{label} {line[-1][1]:.3f}", color))
    last = -100
    for y, label, color in sorted(labels):
        last = max(y, last + 18)
        draw.text((box[2] + 8, last), label, color, font(14), anchor="lm")
    canvas.save(path)


def picture_of(data, row):
    """The picture behind a row of image.npy, or None where only its features are known."""
    if data.meta["encoder"] == "pixels":
        return unpatch(data.image[row])
    names = data.meta.get("pictures")
    return open_picture(names[row]) if names and os.path.isfile(names[row]) else None


def gate_picture(path, model, data, caption=None):
    """Draw the gates (mean of the layers that look) of one validation caption; the wordiest of the first hundred when None."""
    layers, n = looking(model), len(data.lengths("val", 1))
    if not layers or not n:
        return None
    if caption is None:
        caption = int(np.argmax(data.lengths("val", model.config.block_size)[:100]))
    if not 0 <= caption < n:
        raise InputError(f"--caption {caption}: the validation set has captions 0 to {n - 1}")
    _, (gate,) = caption_losses(model, data, np.array([caption]))
    start = data.offset["val"][caption]
    words = words_of(data.tokens["val"][start:start + gate.shape[1]], data.encoding)
    draw_gates(path, [w for w, _ in words], [gate[layers, p].mean() for _, p in words],
               picture_of(data, data.image_row["val"][caption]), "how much each word looks at the picture (1 - gate)")
    return path


def make_parser():
    parser = argparse.ArgumentParser(description="Report what a trained run knows, and draw its gates.")
    parser.add_argument("run", help="run folder made by train.py")
    parser.add_argument("--caption", type=int, default=None, help="validation caption to draw, by row (default: a long one)")
    return parser


def main(argv=None):
    """Print the report of a run as JSON and draw gates.png into its folder."""
    args = make_parser().parse_args(argv)
    data = Data(read_json(os.path.join(args.run, "config.json"))["train"]["data"])
    model = load_model(args.run)
    print(json.dumps(report(model, data), indent=1))
    print(gate_picture(os.path.join(args.run, "gates.png"), model, data, args.caption))


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        sys.exit(2)
