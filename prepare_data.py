"""
Make a data folder for train.py: python prepare_data.py [toy | babylm DIR | photos DIR] [--flag value] ...

From top to bottom: the toy world (scenes, a speaker and its entropies, pictures, text, evaluation items),
tokenizer, images, readers, the writer, Data (which reads what it wrote), command line.
A folder holds meta.json, tokenizer.tiktoken, the arrays that Data describes, and (toy) evaluation_data/.
"""
import argparse
import base64
import csv
import hashlib
import heapq
import itertools
import json
import math
import os
import random
import re
import shutil
import zlib
from collections import Counter, defaultdict

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

from gatevlm import InputError, expect, run_script

# ---- the toy world: two objects in a relation, and a speaker whose choices have known probabilities
COLOR = dict(red="#dc2828", green="#28aa3c", blue="#3250dc", yellow="#f5dc32")
COLOR |= dict(orange="#fa8c14", purple="#963cb4", black="#0f0f0f", white="#fafafa")
SHAPE = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}  # and plurals
SIZE = {"small": 6, "big": 11}  # half extent in pixels
WHERE = {"left": ["to the left of"], "right": ["to the right of"]}
WHERE |= {"above": ["above", "over"], "below": ["below", "under"]}
INVERSE = {"left": "right", "right": "left", "above": "below", "below": "above"}
CLASSES = f"""ADJ {" ".join(COLOR)} {" ".join(SIZE)}
NOUN {" ".join(SHAPE)} {" ".join(SHAPE.values())} color shape left right
DET a an the this these
ADP to of above over below under
AUX is are
CCONJ and
PRON it they there what one
ADV so where
NUM two
INTJ yes no"""

def scenes():
    """All scenes, equally likely: (object, relation, object); objects (size, color, shape) in two colors."""
    objects = list(itertools.product(SIZE, COLOR, SHAPE))
    return [(a, relation, b) for a in objects for relation in WHERE for b in objects if a[1] != b[1]]

def an(word):
    return ("an " if word[0] in "aeiou" else "a ") + word

def captions(scene):
    """The speaker: {sentence: probability} for a scene. Either object can be subject: left becomes right."""
    probability = defaultdict(float)
    a, r, b = scene
    for (size, color, shape), relation, (size2, color2, shape2) in (a, r, b), (b, INVERSE[r], a):
        for where in WHERE[relation]:
            for p, sentence in (
                (0.30, f"{an(size)} {color} {shape} is {where} {an(size2)} {color2} {shape2}."),
                (0.15, f"the {color} {shape} is {where} the {size2} {color2} {shape2}."),
                (0.15, f"there is {an(size)} {color} {shape} {where} {an(color2)} {shape2}."),
                (0.10, f"{where} the {color2} {shape2} is {an(size)} {color} {shape}."),
                (0.10, f"{an(color)} {shape} and {an(size2)} {color2} {shape2}."),
                (0.05, f"the {shape} {where} the {color2} {shape2} is {color}."),
                (0.05, f"what color is the {size} {shape}? {color}."),
                (0.05, f"what shape is the {color} one? {shape}."),
                (0.05, f"where is the {color} {shape}? {where} the {color2} {shape2}."),
            ):
                probability[sentence] += 0.5 * p / len(WHERE[relation])
    return probability

def entropies(all_scenes, length):
    """Exact floors in nats per caption, and its mean length; length(sentence) -> tokens. With the picture
    H(c|s) = -mean_s sum_c p(c|s) log p(c|s), without H(c) = -sum_c p(c) log p(c)."""
    seen, total = 0.0, defaultdict(float)
    for scene in all_scenes:
        for sentence, p in captions(scene).items():
            seen -= p * math.log(p) / len(all_scenes)
            total[sentence] += p / len(all_scenes)
    blind = -sum(p * math.log(p) for p in total.values())
    return seen, blind, sum(p * length(sentence) for sentence, p in total.items())

def draw_scene(scene, rng):
    """A 64x64 picture. The larger offset, across or down, is the relation; places jitter."""
    a, relation, b = scene
    if relation in ("right", "below"):
        a, b = b, a
    picture = Image.new("RGB", (64, 64), (128, 128, 128))
    draw = ImageDraw.Draw(picture)
    for (size, color, shape), along in (a, rng.randint(12, 20)), (b, rng.randint(44, 52)):
        across, r = rng.randint(24, 40), SIZE[size]
        x, y = (along, across) if relation in ("left", "right") else (across, along)
        fill, box, w = COLOR[color], (x - r, y - r, x + r, y + r), r // 3
        if shape == "circle":
            draw.ellipse(box, fill)
        elif shape == "square":
            draw.rectangle(box, fill)
        elif shape == "triangle":
            draw.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill)
        else:
            draw.rectangle((x - r, y - w, x + r, y + w), fill)
            draw.rectangle((x - w, y - r, x + w, y + r), fill)
    return picture

def toy_text(rng):
    """A text-only document: agreement, number, questions, turns, a relation the other way round."""
    shape, size = rng.choice(list(SHAPE)), rng.choice(list(SIZE))
    color, other = rng.sample(list(COLOR), 2)
    shape2, relation = rng.choice(list(SHAPE)), rng.choice(list(WHERE))
    where, back = rng.choice(WHERE[relation]), rng.choice(WHERE[INVERSE[relation]])
    what, that, many = rng.choice([color, size]), f"the {other} {shape2}", SHAPE[shape]
    sentences = [
        f"{rng.choice(['the', 'this', 'one'])} {shape} is {what}.",
        f"{rng.choice(['the', 'these', 'two'])} {many} are {what}.",
        f"what color is the {shape}? it is {color}.",
        f"what color are the {many}? they are {color}.",
        f"what shape is the {color} one? it is {an(shape)}.",
        f"A: is the {shape} {color}?\nB: yes, it is.",
        f"A: is the {shape} {color}?\nB: no, it is {other}.",
        f"A: are the {many} {color}?\nB: yes, they are.",
        f"the {shape} is {color}. what color is the {shape}? {color}.",
        f"the {color} {shape} is {where} {that}. {that} is {back} the {color} {shape}.",
        f"there is {an(color)} {shape}.",
        f"there are two {color} {many}.",
    ]
    return rng.choice(sentences)

def minimal_pairs(rng, i, color, color2, shape):
    """Yield (task, paradigm, good, bad): agreement, and answers that fit their question."""
    vowel = rng.choice([c for c in COLOR if c[0] in "aeiou"])
    consonant = rng.choice([c for c in COLOR if c[0] not in "aeiou"])
    right, wrong = (vowel, "a") if i % 2 else (consonant, "an")
    plural = SHAPE[shape]
    one, many = (f"the {shape}", "is", "it"), (f"the {plural}", "are", "they")
    (noun, be, it), (_, be2, it2) = (one, many) if i % 2 else (many, one)
    what, ask, blimp, more = f"what color {be} {noun}?", f"A: {be} {noun} {color}?\nB:", "blimp", "supplement"
    yield blimp, "subject_verb_agreement", f"{noun} {be} {color}.", f"{noun} {be2} {color}."
    yield blimp, "determiner_noun_agreement", f"these {plural} are {color}.", f"these {shape} are {color}."
    yield blimp, "article_agreement", f"there is {an(right)} {shape}.", f"there is {wrong} {right} {shape}."
    yield more, "qa_agreement", f"{what} {it} {be} {color}.", f"{what} {it2} {be2} {color}."
    yield more, "qa_congruence", f"{what} {it} {be} {color}.", f"{what} {it} {be} {rng.choice(list(SIZE))}."
    yield more, "turn_taking", f"{ask} no, {it} {be} {color2}.", f"{ask} yes, {it} {be} {color2}."

def toy_items(rng, n):
    """Items in the official formats, {(task, file): [item]}, and scenes of the vision tasks."""
    world, items, views = scenes(), defaultdict(list), {"winoground": [], "vqa": []}
    for i in range(n):
        shape, shape2 = rng.sample(list(SHAPE), 2)
        color, color2 = rng.sample(list(COLOR), 2)
        for task, name, good, bad in minimal_pairs(rng, i, color, color2, shape):
            item = {"sentence_good": good, "sentence_bad": bad, "UID": name, "pair_id": i, "field": "toy"}
            items[task, name].append(item | {"linguistics_term": "agreement"})

        relation = rng.choice(list(WHERE))
        there, back = WHERE[relation][0], WHERE[INVERSE[relation]][0]
        x, y = f"the {color} {shape}", f"the {color2} {shape2}"
        item = dict(Domain="spatial-relations", ContextType="direct", ContextDiff="word", TargetDiff="word")
        item |= {"Context1": f"{x} is {there} {y}.", "Context2": f"{x} is {back} {y}."}
        item |= {"Target1": f"{y} is {back} {x}.", "Target2": f"{y} is {there} {x}."}
        items["ewok", "spatial-relations"].append(item)

        # Winoground: the same words in another order; each caption is right for one of two pictures
        size, size2 = rng.choice(list(SIZE)), rng.choice(list(SIZE))
        first, tag = ((size, color, shape), relation, (size2, color2, shape2)), "places swapped"
        second = first[2], relation, first[0]
        if i % 2:
            second, tag = ((size, color2, shape), relation, (size2, color, shape2)), "colors swapped"
        say = lambda a, _, b: f"{an(a[0])} {a[1]} {a[2]} is {there} {an(b[0])} {b[1]} {b[2]}."
        for key, (own, other) in enumerate(((first, second), (second, first))):
            item = dict(caption_0=say(*own), caption_1=say(*other), image_idx=i, image_key=f"image_{key}")
            tags = dict.fromkeys(("tag", "secondary_tag", "collapsed_tag"), tag)
            items["winoground", "winoground"].append(item | tags)
        views["winoground"].append([first, second])

        # VQA: the distractors are the other colors; in every other item the text tells the answer
        asked, tag = f"the {shape} is {color}. what color is the {shape}?", "text decides"
        if i % 2:
            asked, tag = f"what color is the {size} {shape}?", "image decides"
        item = {"question": asked, "target_ans": f"{color}.", "idx_in_hf_dataset": i, "collapsed_tag": tag}
        items["vqa", "vqa"].append(item | {"distractors": [f"{c}." for c in COLOR if c != color]})
        views["vqa"].append([first if i % 2 else rng.choice(world)])
    return items, views

# ---- tokenizer
# words keep the space before them; letters, digits and the rest never mix
JOIN = "\u200c\u200d"  # letters to some
PATTERN = rf"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_{JOIN}]+| ?\d+| ?(?:[^\w\s]|[_{JOIN}])+|\s+(?!\S)|\s+"
EOT = "<|endoftext|>"  # the name under which tiktoken looks for eot_token

def train_bpe(texts, vocab_size):
    """Byte-level BPE: {bytes: rank}, 256 bytes and merges of the most frequent pair (ties: the smallest ids).
    Each merge touches only the words that contain the pair."""
    counts = Counter()
    for text in texts:
        counts.update(word for word in re.findall(PATTERN, text) if len(word) <= 64)
    words = [[list(word.encode()), n] for word, n in sorted(counts.items())]  # [ids, how often]
    tokens = [bytes([i]) for i in range(256)]
    pairs, where = Counter(), defaultdict(set)  # of a pair: how often it occurs, in which words
    for w, (ids, n) in enumerate(words):
        for pair in zip(ids, ids[1:]):
            pairs[pair] += n
            where[pair].add(w)
    heap = [(-n, pair) for pair, n in pairs.items()]
    heapq.heapify(heap)
    ranks = {token: i for i, token in enumerate(tokens)}
    while heap and len(tokens) < vocab_size:
        negative, pair = heapq.heappop(heap)
        if -negative != pairs[pair] or negative == 0:
            continue  # the count has changed since
        token = tokens[pair[0]] + tokens[pair[1]]
        new = ranks.setdefault(token, len(tokens))  # pairs that spell the same bytes share an id
        if new == len(tokens):
            tokens.append(token)
        changed = set()
        for w in where.pop(pair):
            ids, n = words[w]
            merged, i = [], 0
            while i < len(ids):
                hit = i + 1 < len(ids) and (ids[i], ids[i + 1]) == pair
                merged.append(new if hit else ids[i])
                i += 2 if hit else 1
            for part, change in (ids, -n), (merged, n):
                for p in zip(part, part[1:]):
                    pairs[p] += change
                    where[p].add(w)
                    changed.add(p)
            words[w][0] = merged
        for p in changed:
            heapq.heappush(heap, (-pairs[p], p))
    return ranks

def online(load, *names, way):
    """What load downloads once; where there is no network InputError says a way around."""
    try:
        return load(*names)
    except Exception as error:  # many classes
        raise InputError(f"no {names[-1]}: go online once, {way}") from error

def make_tokenizer(kind, texts, vocab_size):
    """Ranks and entry of meta.json of a BPE trained on texts, or of GPT-2's, which tiktoken downloads."""
    if kind == "gpt2":
        way = "set TIKTOKEN_CACHE_DIR to where it lies, or use --tokenizer bpe"
        gpt2 = online(tiktoken.get_encoding, "gpt2", way=way)
        return gpt2._mergeable_ranks, {"pattern": gpt2._pat_str, "special": {EOT: gpt2.eot_token}}
    ranks = train_bpe(texts, vocab_size - 1)
    return ranks, {"pattern": PATTERN, "special": {EOT: len(ranks)}}

def make_encoding(ranks, entry):
    parts = dict(pat_str=entry["pattern"], mergeable_ranks=ranks, special_tokens=entry["special"])
    return tiktoken.Encoding("gatevlm", **parts)

def load_tokenizer(folder):
    """The tiktoken Encoding of a data folder or run folder; its eot_token ends every document."""
    meta = load_meta(folder)
    with open(check_whole(folder, meta, "tokenizer.tiktoken"), "rb") as f:
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, f)}
    return make_encoding(ranks, meta["tokenizer"])

# ---- images -> features (n_image_token, image_dim)
def patches(picture, n_image_token):
    """PIL picture -> (1, 768), a 16x16 RGB thumbnail, or (16, 768), 64x64 pixels in 4x4 patches; 0 to 1."""
    side = 16 if n_image_token == 1 else 64
    picture = ImageOps.fit(picture.convert("RGB"), (side, side), Image.BOX)
    grid = np.asarray(picture, np.float32).reshape(side // 16, 16, side // 16, 16, 3) / 255
    return grid.transpose(0, 2, 1, 3, 4).reshape(n_image_token, 768)

def unpatch(features):
    """The picture that patches() saw, from its features (1, 768) or (16, 768)."""
    n = math.isqrt(len(features))
    grid = np.asarray(features, np.float32).reshape(n, n, 16, 16, 3).transpose(0, 2, 1, 3, 4)
    return Image.fromarray((grid.reshape(n * 16, n * 16, 3) * 255).round().clip(0, 255).astype(np.uint8))

@torch.no_grad()
def dinov2_features(model, pictures, n_image_token):
    """PIL pictures -> CLS tokens (n, 1, D), or patch tokens averaged to a square grid (n, K, D)."""
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])  # of ImageNet
    x = np.stack([np.asarray(ImageOps.fit(p, (224, 224), Image.BICUBIC), np.float32) for p in pictures])
    y = model.forward_features(torch.from_numpy((x / 255 - mean) / std).permute(0, 3, 1, 2))
    if n_image_token == 1:
        return y["x_norm_clstoken"][:, None].numpy()
    grid = y["x_norm_patchtokens"].transpose(1, 2).unflatten(2, (16, 16))  # (n, D, 16, 16)
    return F.adaptive_avg_pool2d(grid, math.isqrt(n_image_token)).flatten(2).transpose(1, 2).numpy()

def make_encoder(encoder, n_image_token):
    """A function: PIL pictures -> features (n, n_image_token, image_dim)."""
    allowed = (1, 16) if encoder == "pixels" else (1, 4, 16, 64, 256)
    expect(n_image_token in allowed, f"--encoder {encoder} makes {allowed} image tokens, not {n_image_token}")
    if encoder == "pixels":
        return lambda pictures: np.stack([patches(p, n_image_token) for p in pictures])
    model = online(torch.hub.load, "facebookresearch/dinov2", encoder, way="or use --encoder pixels").eval()
    return lambda pictures: dinov2_features(model, pictures, n_image_token)

def open_picture(path):
    """An upright RGB picture, its shorter side below 1000, transparency laid over white."""
    try:
        with Image.open(path) as picture:
            picture.draft("RGB", (500, 500))  # a JPEG is decoded at about this size
            picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith("I"):  # 16 bits, which convert() would clip
                picture = Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8))
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            return picture.convert("RGB").reduce(max(1, min(picture.size) // 500))
    except Exception as error:  # of its decoder
        way = "save it as JPEG" if path.lower().endswith(("heic", "heif")) else f"{error!s:.60}"
        raise InputError(f"{path}: not a readable picture ({way})") from error

# ---- readers. What cannot be used is counted and named
def report(bad, what, skip=True):
    """Count and name what is left out, or InputError."""
    if bad:
        names = f"{len(bad):,} {what}: {', '.join(bad[:3])}{', ...' * (len(bad) > 3)}"
        expect(skip, f"{names}; --skip leaves them out")
        print(f"left out: {names}")

def check_text(where, text):
    """Text without white space around; InputError for a blank and what is not UTF-8 (a lone surrogate)."""
    whole = isinstance(text, str) and text.strip() and not re.search("[\ud800-\udfff]", text)
    expect(whole, f"{where}: expected text in UTF-8, found {text!r:.40}")
    return text.strip()

def read_lines(path, most=1 << 20):
    """Yield (number, line) of a UTF-8 file with any line ends; lines longer than most come in pieces."""
    expect(os.path.isfile(path), f"{path}: no such file")
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as f:
        number = 1
        while line := f.readline(most):
            if line.strip():
                check_text(f"{path}, line {number}", line)
            yield number, line
            number += line.endswith("\n")

LINES, LONGEST = 8, 50_000  # lines of a document, characters of a line: text may have no line ends
def documents(paths):
    """Yield documents: LINES lines, fewer before a blank or where long."""
    for path in paths:
        lines = []
        for _, line in itertools.chain(read_lines(path, LONGEST), [(0, "\n")]):
            if line.strip():
                lines.append(line.rstrip("\n"))
            full = len(lines) == LINES or not line.strip() or sum(map(len, lines)) > LONGEST / 2
            if lines and full:
                yield "\n".join(lines)
                lines = []

def find_files(root):
    """{(kind, split): [path]} of a BabyLM folder, however deep: text in .train, .dev files, .txt files of a
    train, dev or val folder (train_10M), captions in *_captions.json, the rest ("other", "")."""
    found, homes = defaultdict(list), {}
    for folder, _, names in sorted(os.walk(root, followlinks=True)):
        parts = os.path.relpath(folder, root).lower().split(os.sep)
        at = [i for i, part in enumerate(parts) if re.search("(^|_)(train|(dev|val|validation)(_|$))", part)]
        split = "" if not at else "train" if "train" in parts[at[-1]] else "val"
        for name in sorted(names):
            stem, end = os.path.splitext(name.lower())
            key = "other", ""
            if stem.endswith("_captions") and end == ".json":
                key = "captions", split or "train"
            elif end in (".train", ".dev") or end == ".txt" and split:
                key = "text", split or {".train": "train", ".dev": "val"}[end]
                home = "/".join(parts[: at[-1] + 1] if at else parts)
                expect(homes.setdefault(key, home) == home, f"{root}: text in {homes[key]} and in {home}")
            found[key].append(os.path.join(folder, name))
    return found

def read_json(path):
    try:
        with open(path, encoding="utf-8-sig") as f:
            return json.load(f)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from error

def load_npy(path, ndim=(2, 3)):
    """A .npy array of floats (n, image_dim) or (n, K, image_dim), mapped from disk, as the latter."""
    try:
        x = np.load(path, mmap_mode="r", allow_pickle=False)
        floats = x.ndim in ndim and x.dtype.kind == "f" and x.shape[-1] > 0
    except Exception as error:  # numpy reads the header as Python, and raises whatever that does
        raise InputError(f"{path}: not a whole .npy file ({type(error).__name__})") from error
    expect(floats, f"{path}: expected floats (n, 768) or (n, K, 768), found {x.dtype} {x.shape}")
    return x if x.ndim > 2 else x[:, None]

def read_given(files, others):
    """Captions, keys (equal: one picture), splits, fetch of caption files {split: [path]} and their states,
    which are taken out of others."""
    lines, keys, splits, paths, starts = [], [], [], [], [0]
    files = [(path, split) for split, part in files.items() for path in part]
    for path, split in sorted(files, key=lambda x: -len(x[0])):  # cc_3M_x finds its states before cc_3M does
        pattern = re.escape(path[:-len("captions.json")]) + "[^/]*states[^/]*npy"
        states = sorted((p for p in others if re.fullmatch(pattern, p)), key=lambda p: (len(p), p))
        expect(states, f"{path}: expected ..._states.npy of the same name beside it")
        others[:] = [p for p in others if p not in states]
        captions = read_json(path)
        expect(isinstance(captions, list), f"{path}: expected a list of captions")
        lines += [check_text(f"{path}, row {row}", caption) for row, caption in enumerate(captions)]
        for p in states:
            paths.append(p)
            shapes = {load_npy(p).shape[1:] for p in paths}
            expect(len(shapes) == 1, f"{p}: rows of another shape than before")
            for i in range(0, len(load_npy(p)), 4096):
                x = load_npy(p)[i : i + 4096]  # opened anew: what a map has read stays in memory with it
                bad = ~(np.abs(x) <= 65504).all(axis=(1, 2))  # NaN, or what float16 cannot hold
                expect(not bad.any(), f"{p}, row {i + bad.argmax()}: NaN, inf or beyond 65504")
                keys += [hashlib.sha1(row.tobytes()).digest() for row in x.astype("<f2")]
            starts.append(len(keys))
        splits += [split] * len(captions)
        counts = f"{len(lines):,} captions so far, {len(keys):,} rows in {', '.join(paths)}"
        expect(len(lines) == len(keys), f"{path}: {counts}; expected one row per caption")

    def fetch(rows):
        where = np.searchsorted(starts, rows, "right") - 1
        states = {k: load_npy(paths[k]) for k in set(where)}
        return np.stack([states[k][row - starts[k]] for k, row in zip(where, rows)])

    return lines, keys, splits, fetch

FORMATS = """picture<TAB>caption (Flickr8k: picture#0<TAB>caption), tables with a header and tabs, commas or |
(Kaggle's captions.txt, Flickr30k's results.csv), COCO captions JSON, Karpathy's dataset_*.json"""
HEADS = "image image_name file_name filename picture".split(), "caption comment text sentence".split()

def read_rows(path, formats="a table with tabs, commas or |"):
    """Rows of a table, their cells stripped; InputError where path holds none of formats."""
    lines = [line for _, line in read_lines(path)] or [""]
    mark = next((mark for mark in "\t|," if mark in lines[0]), None)
    expect(mark, f"{path}: expected {' '.join(formats.split())}")
    quoting = csv.QUOTE_MINIMAL if mark == "," else csv.QUOTE_NONE
    try:
        rows = csv.reader(lines, delimiter=mark, quoting=quoting, strict=True)
        return [[cell.strip() for cell in row] for row in rows]
    except csv.Error as error:
        raise InputError(f"{path}: {error}") from error

def read_photo_captions(path, skip=False):
    """[(picture, caption, split or "")] of a file in one of FORMATS, told by its content."""
    found, start = [], next(read_lines(path, 99), (1, ""))[1].lstrip()[:1]
    try:
        if start not in ("{", "["):
            rows = read_rows(path, FORMATS)
            heads = [[i for i, x in enumerate(rows[0]) if x.lower() in names] for names in HEADS]
            (picture, *_), (caption, *_) = heads if all(heads) else ([0], [1])
            n = len(rows[0]) if all(heads) else 2
            for number, row in enumerate(rows, 1):
                expect(len(row) <= n, f"{path}, row {number}: {len(row)} columns, expected {n}")
                row += [""] * (n - len(row))
                found += [(re.sub(r"#\d+$", "", row[picture]), row[caption], "")] if any(row) else []
            found = found[all(heads):]
        elif "annotations" in (table := read_json(path)):  # COCO
            name = {image["id"]: image["file_name"] for image in table["images"]}
            found = [(name[a["image_id"]], a["caption"], "") for a in table["annotations"]]
        else:  # Karpathy
            for image in table["images"]:
                split = dict(train="train", restval="train", val="val", test="test")[image["split"]]
                name = os.path.join(image.get("filepath", ""), image["filename"])
                found += [(name, sentence["raw"], split) for sentence in image["sentences"]]
        bad = [f"one of {name}" for name, caption, _ in found if not (name.strip() and caption.strip())]
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: neither COCO nor Karpathy ({error!r:.60})") from error
    report(bad, f"blank captions in {path}", skip)
    report([name for name, _, split in found if split == "test"], "captions of the test split")
    found = [row for row in found if row[1].strip() and row[2] != "test"]
    return [(name, check_text(f"{path}, {name!r}", caption), split) for name, caption, split in found]

# ---- the writer, and the reader of what it wrote
def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while part := f.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()

def write_json(path, value):
    """A crash leaves the old or the new one."""
    with open(f"{path}.part", "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1, ensure_ascii=False)
    os.replace(f"{path}.part", path)

MAX_CAPTION = 128  # tokens with <eot>; longer captions are cut and counted
def write_stream(path, texts, encoding, most=None):
    """Texts as uint16, each with <eot>, cut to most tokens: lengths, number cut, words per token."""
    lengths, cut, words = [], 0, 0
    with open(path, "wb") as f:
        for text in texts:
            ids = encoding.encode_ordinary(text)
            if most and len(ids) >= most:
                ids, cut = ids[:most - 1], cut + 1
                text = encoding.decode(ids)
            words += len(text.split())
            f.write(np.array([*ids, encoding.eot_token], np.uint16).tobytes())
            lengths.append(len(ids) + 1)
    return lengths, cut, words / max(1, sum(lengths))

def fill_folder(folder, args, text, captions, images, extra):
    """Write text {split: function -> documents}, captions {split: ([caption], rows (n,), fetch)}, where
    fetch(rows) -> (n,K,image_dim), images (encoder, K, image_dim); returns meta."""
    path, jobs, n_image, count, words = lambda name: os.path.join(folder, name), [], 0, {}, {}
    meta = dict(zip(("encoder", "n_image_token", "image_dim"), images)) | {"made_from": vars(args)}
    texts = itertools.chain(captions["train"][0], text["train"]())
    ranks, meta["tokenizer"] = make_tokenizer(args.tokenizer, texts, args.vocab_size)
    meta["vocab_size"] = V = max(*ranks.values(), *meta["tokenizer"]["special"].values()) + 1
    expect(V <= 65536, f"{V} ids do not fit the 16 bits of a .bin file")
    with open(path("tokenizer.tiktoken"), "wb") as f:
        for token, rank in sorted(ranks.items(), key=lambda x: x[1]):
            f.write(base64.b64encode(token) + b" %d\n" % rank)
    encoding = make_encoding(ranks, meta["tokenizer"])
    for split in "train", "val":
        lengths, _, words[split, "T"] = write_stream(path(f"text_{split}.bin"), text[split](), encoding)
        count[f"text_{split}_tokens"] = sum(lengths)
        lines, rows, fetch = captions[split]
        lengths, cut, words[split, "C"] = write_stream(
            path(f"caption_{split}.bin"), lines, encoding, MAX_CAPTION)
        np.save(path(f"caption_{split}_offset.npy"), np.cumsum([0, *lengths], dtype=np.int64))
        unique, inverse = np.unique(rows, return_inverse=True)
        np.save(path(f"caption_{split}_image.npy"), (inverse + n_image).astype(np.int32))
        count |= {f"caption_{split}": len(lines), f"caption_{split}_cut": cut, f"image_{split}": len(unique)}
        jobs += [(fetch, unique[i : i + 64]) for i in range(0, len(unique), 64)]
        n_image += len(unique)
    n = count["text_train_tokens"] + count["caption_train"]
    expect(n, f"{args.folder}: nothing to train on, such as text_only/train*/*.train")
    with open(path("image.npy"), "wb") as f:
        header = {"descr": "<f2", "fortran_order": False, "shape": (n_image, *images[1:])}
        np.lib.format.write_array_header_1_0(f, header)
        for fetch, rows in tqdm(jobs, desc="images", disable=None, leave=False):
            f.write(fetch(rows).astype("<f2").tobytes())
    meta |= {"count": count, "words_per_token": {kind: words["train", kind] for kind in "TC"}}
    meta |= extra(folder, encoding) if extra else {}
    files = sorted(os.path.join(d, f) for d, _, names in os.walk(folder) for f in names)
    meta["sha256"] = {os.path.relpath(f, folder): sha256(f) for f in files}
    write_json(path("meta.json"), meta)
    return meta

def check_free(path):
    expect(not os.path.exists(path), f"{path} exists: remove it, or write elsewhere with --out")

def write_folder(out, args, source):
    """Write what a prepare_ function returns; only a whole folder gets its name out."""
    part = f"{out}.part"
    check_free(part)  # another process is at work, or was killed
    os.makedirs(part)
    try:
        meta = fill_folder(part, args, *source)
        os.rename(part, out)  # fails where out is
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return meta

def load_meta(folder):
    """meta.json of a data folder or run folder."""
    meta = read_json(path := os.path.join(folder, "meta.json"))
    keys = {"encoder", "n_image_token", "image_dim", "tokenizer", "words_per_token", "sha256"}
    expect(isinstance(meta, dict) and keys <= set(meta), f"{path}: of another version: make it again")
    return meta

def check_whole(folder, meta, name):
    """The path of a file that is as prepare_data.py wrote it, or InputError."""
    path = os.path.join(folder, name)
    whole = os.path.isfile(path) and sha256(path) == meta["sha256"].get(name)
    expect(whole, f"{path}: missing or changed; prepare the data again")
    return path

class Data:
    """A data folder, mapped into memory. Per split: text and captions, uint16 streams of texts that end with
    <eot>; offset (n+1,), where captions begin; image_row (n,), their rows of image (N,K,image_dim).
    Every file but image.npy is checked against its checksum (InputError)."""

    def __init__(self, folder):
        self.folder, self.meta, self.encoding = folder, load_meta(folder), load_tokenizer(folder)
        self.text, self.captions, self.offset, self.image_row = {}, {}, {}, {}
        for split in "train", "val":
            self.text[split] = self.stream(f"text_{split}.bin")
            self.captions[split] = self.stream(f"caption_{split}.bin")
            self.offset[split] = np.load(check_whole(folder, self.meta, f"caption_{split}_offset.npy"))
            self.image_row[split] = np.load(check_whole(folder, self.meta, f"caption_{split}_image.npy"))
        self.image = load_npy(path := os.path.join(folder, "image.npy"), ndim=(3,))
        n = 1 + max(rows.max(initial=-1) for rows in self.image_row.values())
        shape = n, self.meta["n_image_token"], self.meta["image_dim"]
        expect(self.image.shape == shape, f"{path}: expected shape {shape}, found {self.image.shape}")

    def stream(self, name):
        path = check_whole(self.folder, self.meta, name)  # numpy cannot map an empty file
        return np.memmap(path, np.uint16, "r") if os.path.getsize(path) else np.zeros(0, np.uint16)

    def lengths(self, split, block_size, ids=slice(None)):
        """Tokens of captions ids with their <eot>, cut to block_size: (n,)."""
        return np.minimum(self.offset[split][1:][ids] - self.offset[split][:-1][ids], block_size)

    def batch(self, kind, split, rows, block_size):
        """Rows (B,) -> idx (B,T), targets (B,T) with -1 after the end, and their place (B,T) in the stream.
        kind "C": rows are captions, each read after an <eot>; "T": rows are where blocks of text start."""
        stream, start = self.text[split], rows + 1
        length = np.minimum(len(stream) - start, block_size)
        if kind == "C":
            stream, start = self.captions[split], self.offset[split][rows]
            length = self.lengths(split, block_size, rows)
        T = np.arange(length.max())
        place = np.minimum(start[:, None] + T, len(stream) - 1)  # (B, T)
        targets = np.where(T < length[:, None], stream[place].astype(np.int64), -1)
        return stream[place - 1].astype(np.int64), targets, place  # -1, before the first caption: an <eot>

    def images(self, rows):
        """Rows (B,) of image.npy, (B,K,image_dim) float32."""
        x = self.image[rows].astype(np.float32)
        bad = ~np.isfinite(x).all(axis=(1, 2))
        expect(not bad.any(), f"{self.folder}/image.npy, row {rows[bad.argmax()]}: NaN or inf in it")
        return x

# ---- command line. A prepare_ function returns what fill_folder takes
def prepare_toy(args):
    rng, world, encode = random.Random(args.seed), scenes(), make_encoder("pixels", args.n_image_token)
    captions_of, text = {}, {}
    for split, share in ("train", 1), ("val", 10):
        n_image, n_text = max(1, args.n_image // share), max(1, args.n_text // share)
        drawn, lines = rng.choices(world, k=n_image), []
        for scene in drawn:
            options = captions(scene)
            lines += rng.choices(list(options), options.values())

        def fetch(rows, drawn=drawn, seed=f"{args.seed} {split}"):
            return encode([draw_scene(drawn[i], random.Random(f"{seed} {i}")) for i in rows])

        captions_of[split] = lines, np.arange(n_image), fetch
        text[split] = [toy_text(rng) for _ in range(n_text)].copy

    def extra(folder, encoding):
        root = os.path.join(folder, "evaluation_data", "full_eval")
        items, views = toy_items(random.Random(f"{args.seed} items"), 200)
        for (task, name), rows in items.items():
            os.makedirs(home := os.path.join(root, f"{task}_filtered"), exist_ok=True)
            with open(os.path.join(home, f"{name}.jsonl"), "w") as f:
                f.writelines(json.dumps(row) + "\n" for row in rows)
        jitter = random.Random(f"{args.seed} views")
        for task, groups in views.items():
            states = np.stack([encode([draw_scene(s, jitter) for s in group]) for group in groups])
            states = states if task == "winoground" else states[:, 0]
            np.save(os.path.join(root, f"{task}_states.npy"), states.astype(np.float16))
        seen, blind, n = entropies(world, lambda x: len(encoding.encode_ordinary(x)) + 1)
        print(f"a caption carries {(blind - seen) / math.log(2):.1f} bits that only its picture can tell;")
        print(f"no model gets below {seen / n:.4f} nats per token with it, {blind / n:.4f} without")
        upos = {word: tag for tag, *words in map(str.split, CLASSES.splitlines()) for word in words}
        return {"floor_with_image": seen / n, "floor_text_only": blind / n, "upos": upos}

    return text, captions_of, ("pixels", args.n_image_token, 768), extra

def divide(lines, keys, splits, fetch, share, args):
    """{split: ([caption], rows (n,), fetch)}: as splits say, or a random share of the pictures held out."""
    _, first, inverse = np.unique(np.array(keys, "S"), return_index=True, return_inverse=True)
    rows, held, rng = first[inverse], np.array(splits) == "val", np.random.default_rng(args.seed)
    if lines and not held.any():
        expect(len(first) > 1, "captions of one picture only: none to hold out")
        held = np.isin(rows, rng.choice(np.sort(first), max(1, round(share * len(first))), replace=False))
    leak = ~held & np.isin(rows, rows[held])
    report([lines[i] for i in np.flatnonzero(leak)], "training captions of held-out pictures")
    ids = {"train": np.flatnonzero(~held & ~leak), "val": np.flatnonzero(held)}
    if 0 < args.captions < len(ids["train"]):
        ids["train"] = np.sort(rng.choice(ids["train"], args.captions, replace=False))
    return {split: ([lines[i] for i in which], rows[which], fetch) for split, which in ids.items()}

def split_text(args, files):
    """{split: function -> documents} of {split: [path]}; of "train" alone every 100th is held out."""
    def sample(split, words):
        share = words / max(1, sum(len(d.split()) for d in documents(files[split]))) if words else 1
        taken = lambda document: zlib.crc32(document.encode(), args.seed) < share * 2**32
        return lambda: filter(taken, documents(files[split]))

    train = sample("train", args.words)
    if files["val"]:
        return {"train": train, "val": sample("val", math.ceil(args.words / 10))}
    part = lambda held: lambda: (d for i, d in enumerate(train()) if (i % 100 == 1) == held)
    return {"train": part(False), "val": part(True)}

def prepare_babylm(args):
    found, wanted = find_files(args.folder), args.caption_sets.lower().split(",")
    name = lambda path: os.path.basename(path).lower().removesuffix("_captions.json")
    chosen = lambda paths: [path for path in paths if wanted == [""] or name(path) in wanted]
    text = {split: found["text", split] for split in ("train", "val")}
    files = {split: chosen(found["captions", split]) for split in ("train", "val")}
    for kind, part in ("text", text), ("captions", files):
        expect(part["train"] or not part["val"], f"{args.folder}: {kind} to hold out, but none to train on")
    missing = set(wanted) - {"", *map(name, files["train"])}
    expect(not missing, f"{args.folder}: there is no {', '.join(sorted(missing))}_captions.json")
    captions = divide(*read_given(files, found["other", ""]), 0.01, args)
    report([os.path.relpath(p, args.folder) for p in found["other", ""]], "other files")
    lines, _, fetch = captions["val"]
    shape = fetch([0]).shape[1:] if lines else (0, 1)
    return split_text(args, text), captions, (args.encoder or "given", *shape), None

def prepare_photos(args):
    captions_file = args.captions_file or os.path.join(args.folder, "captions.txt")
    found, keys, bad = read_photo_captions(captions_file, args.skip), {}, []
    for name in tqdm(sorted({name for name, _, _ in found}), desc="looking", disable=None, leave=False):
        try:
            open_picture(path := os.path.join(args.folder, name))
            keys[name] = sha256(path)
        except InputError as error:
            bad.append(str(error))
    report(bad, "pictures that cannot be read", args.skip)
    found = [row for row in found if row[0] in keys]
    expect(found, f"{captions_file}: no caption of a picture that can be read")
    names, lines, splits = zip(*found)
    paths = [os.path.abspath(os.path.join(args.folder, name)) for name in names]
    encode = make_encoder(encoder := args.encoder or "pixels", args.n_image_token)
    fetch = lambda rows: encode([open_picture(paths[i]) for i in rows])
    captions = divide(lines, [keys[name] for name in names], splits, fetch, 0.1, args)
    extra = lambda *_: {"pictures": [paths[i] for _, rows, _ in captions.values() for i in np.unique(rows)]}
    return {"train": list, "val": list}, captions, (encoder, *fetch([0]).shape[1:]), extra

FLAGS = [  # name, default, help
    ("out", "", "data folder to write; empty = data/<source>, or data/toy16 for 16 image tokens"),
    ("seed", 1, "of random choices"),
    ("n_image_token", 1, "toy, photos: vectors per picture; 16 = a 4x4 grid of patches"),
    ("tokenizer", "bpe", "a byte-level BPE of this data, or gpt2's 50,257 ids"),
    ("vocab_size", 8192, "ids of bpe at most, 256 bytes and <eot> among them"),
    ("n_image", 40000, "toy: training pictures, one caption each; a tenth as many are held out"),
    ("n_text", 5000, "toy: training documents; a tenth as many are held out"),
    ("words", 0, "babylm: words in a random sample of text, a tenth as many to hold out; 0 = all"),
    ("captions", 0, "babylm, photos: random sample of training captions; 0 = all"),
    ("caption_sets", "", "babylm: caption files, such as local_narr,cc_3m; empty = all"),
    ("captions_file", "", "photos: empty = captions.txt in the folder"),
    ("encoder", "", "photos, babylm: what makes features (empty = pixels), or made the given states"),
]
CHOICES = {"tokenizer": ("bpe", "gpt2"), "encoder": ("pixels", "dinov2_vits14", "dinov2_vitb14")}

def main(argv=None):
    """Prepare a data folder; returns its path. On wrong input: InputError, and no folder is left."""
    usage = "prepare_data.py [toy | babylm DIR | photos DIR] [--flag value] ..."
    p = argparse.ArgumentParser(usage=usage, allow_abbrev=False, epilog=f"captions of photos: {FORMATS}")
    p.add_argument("source", nargs="?", default="toy", choices=("toy", "babylm", "photos"))
    p.add_argument("folder", nargs="?", default="")
    for name, default, text in FLAGS:
        text += f" (default: {default or 'empty'})"
        p.add_argument(f"--{name}", type=type(default), default=default, choices=CHOICES.get(name), help=text)
    p.add_argument("--skip", action="store_true", help="photos: leave out what cannot be read, and count it")
    args = p.parse_args(argv)
    for name, default, text in FLAGS:
        value, fits = getattr(args, name), ":" not in text or args.source in text.split(":")[0]
        expect(fits or value == default, f"--{name} {value}: not for {args.source}")
        expect(type(value) is str or value >= 0, f"--{name} {value}: expected 0 or more")
    expect(args.vocab_size > 256, f"--vocab_size {args.vocab_size}: expected 257 or more")
    expect(os.path.isdir(args.folder) or args.source == "toy", f"{args.source}: no folder {args.folder!r}")
    name = "toy16" if args.source == "toy" and args.n_image_token == 16 else args.source
    out = os.path.normpath(args.out or os.path.join("data", name))
    check_free(out)  # before gigabytes are read
    prepare = {"toy": prepare_toy, "babylm": prepare_babylm, "photos": prepare_photos}[args.source]
    for name, n in write_folder(out, args, prepare(args))["count"].items():
        print(f"{out}: {n:,} {name}")
    return out

if __name__ == "__main__":
    run_script(main)
