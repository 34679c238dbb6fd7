"""Make a data folder for train.py: python prepare_data.py [toy | babylm DIR | photos DIR] (see --help).

In reading order:
  1. the toy world     scenes, captions and their exact entropies, pictures, text, evaluation items
  2. tokenizer         a byte-level BPE trained here, or GPT-2's; both end as a tiktoken Encoding
  3. images            pixels (no weights) and DINOv2
  4. readers           BabyLM text and caption files; your own photos
  5. the writer        one folder, complete or not at all
  6. command line

The folder: meta.json, tokenizer.tiktoken, text_{train,val}.bin (documents, each ended by <eot>), caption_{train,val}.bin with
_offset.npy (n+1) and _image.npy (n, row of image.npy), image.npy (N, n_image_token, image_dim), evaluation_data/ (toy).
"""
import argparse
import base64
import glob
import hashlib
import heapq
import itertools
import json
import math
import os
import random
import re
import shutil
from collections import Counter, defaultdict
from contextlib import contextmanager

import numpy as np
import tiktoken
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

from gatevlm import InputError, Parser, run_script

try:
    import fcntl
except ImportError:  # Windows has no flock
    fcntl = None

# ----------------------------------------------------------------------------------------------------------------------
# 1. the toy world: two objects in a relation, described by a speaker whose every choice has a known probability

COLOR = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (245, 220, 50),
         "orange": (250, 140, 20), "purple": (150, 60, 180), "black": (15, 15, 15), "white": (250, 250, 250)}
SHAPE = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}  # and their plurals
SIZE = {"small": 6, "big": 11}  # half extent in pixels
RELATION = {"left": ("to the left of",), "right": ("to the right of",), "above": ("above", "over"), "below": ("below", "under")}
INVERSE = {"left": "right", "right": "left", "above": "below", "below": "above"}
WORDS_OF_CLASS = {"ADJ": " ".join([*COLOR, *SIZE]), "NOUN": " ".join([*SHAPE, *SHAPE.values(), "color shape left right"]),
                  "DET": "a an the this these", "ADP": "to of above over below under", "AUX": "is are", "CCONJ": "and",
                  "PRON": "it they there what one", "ADV": "so where", "NUM": "two", "INTJ": "yes no"}


def scenes(colors=tuple(COLOR), shapes=tuple(SHAPE), sizes=tuple(SIZE), relations=tuple(RELATION)):
    """All scenes, equally likely: (object, relation, object), an object being (size, color, shape); the two colors differ."""
    objects = list(itertools.product(sizes, colors, shapes))
    return [(a, relation, b) for a in objects for relation in relations for b in objects if a[1] != b[1]]


def an(word):
    return ("an " if word[0] in "aeiou" else "a ") + word


def captions(scene):
    """The speaker: {sentence: probability} for a scene. Either object can be the subject, so (a, left, b) is (b, right, a)."""
    probability = defaultdict(float)
    a, relation, b = scene
    for (size, color, shape), relation, (size2, color2, shape2) in (a, relation, b), (b, INVERSE[relation], a):
        for where in RELATION[relation]:
            for p, sentence in (
                    (0.30, f"{an(size)} {color} {shape} is {where} {an(size2)} {color2} {shape2}."),
                    (0.15, f"the {color} {shape} is {where} the {size2} {color2} {shape2}."),
                    (0.15, f"there is {an(size)} {color} {shape} {where} {an(color2)} {shape2}."),
                    (0.10, f"{where} the {color2} {shape2} is {an(size)} {color} {shape}."),
                    (0.10, f"{an(color)} {shape} and {an(size2)} {color2} {shape2}."),
                    (0.05, f"the {shape} {where} the {color2} {shape2} is {color}."),
                    (0.05, f"what color is the {size} {shape}? {color}."),
                    (0.05, f"what shape is the {color} one? {shape}."),
                    (0.05, f"where is the {color} {shape}? {where} the {color2} {shape2}.")):
                probability[sentence] += 0.5 * p / len(RELATION[relation])
    return probability


def entropies(all_scenes, length):
    """Exact floors of the world: the entropy of a caption with its scene, H(c|s) = -mean over scenes s of sum_c p(c|s) log p(c|s), and
    without, H(c) = -sum_c p(c) log p(c), in nats per caption, and the expected length of one; length(sentences) -> [tokens of each]. Sums
    over every scene and every sentence; nothing is sampled."""
    with_scene, tokens, total = 0.0, 0.0, defaultdict(float)
    for scene in all_scenes:
        for sentence, p in captions(scene).items():
            with_scene -= p * math.log(p) / len(all_scenes)
            total[sentence] += p / len(all_scenes)
    for sentence, n in zip(total, length(list(total))):
        tokens += total[sentence] * n
    return with_scene, -sum(p * math.log(p) for p in total.values()), tokens


def draw_scene(scene, rng):
    """A 64x64 picture of a scene. The larger offset, across or down, is the relation; positions jitter, nothing overlaps."""
    a, relation, b = scene
    if relation in ("right", "below"):
        a, b = b, a
    picture = Image.new("RGB", (64, 64), (128, 128, 128))
    draw = ImageDraw.Draw(picture)
    for (size, color, shape), along in (a, rng.randint(12, 20)), (b, rng.randint(44, 52)):
        across, r = rng.randint(24, 40), SIZE[size]
        x, y = (along, across) if relation in ("left", "right") else (across, along)
        fill, box = COLOR[color], (x - r, y - r, x + r, y + r)
        if shape == "circle":
            draw.ellipse(box, fill)
        if shape == "square":
            draw.rectangle(box, fill)
        if shape == "triangle":
            draw.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill)
        if shape == "cross":
            w = r // 3
            draw.rectangle((x - r, y - w, x + r, y + w), fill)
            draw.rectangle((x - w, y - r, x + w, y + r), fill)
    return picture


def toy_text(rng):
    """One text-only document: agreement, number, questions, turn taking, and what a relation says the other way round."""
    shape, size = rng.choice(list(SHAPE)), rng.choice(list(SIZE))
    color, other = rng.sample(list(COLOR), 2)
    shape2, relation = rng.choice(list(SHAPE)), rng.choice(list(RELATION))
    where, back = rng.choice(RELATION[relation]), rng.choice(RELATION[INVERSE[relation]])
    what = rng.choice([color, size])
    return rng.choice([
        f"{rng.choice(['the', 'this', 'one'])} {shape} is {what}.",
        f"{rng.choice(['the', 'these', 'two'])} {SHAPE[shape]} are {what}.",
        f"what color is the {shape}? it is {color}.",
        f"what color are the {SHAPE[shape]}? they are {color}.",
        f"what shape is the {color} one? it is {an(shape)}.",
        f"A: is the {shape} {color}?\nB: yes, it is.",
        f"A: is the {shape} {color}?\nB: no, it is {other}.",
        f"A: are the {SHAPE[shape]} {color}?\nB: yes, they are.",
        f"the {shape} is {color}. what color is the {shape}? {color}.",
        f"the {color} {shape} is {where} the {other} {shape2}. the {other} {shape2} is {back} the {color} {shape}.",
        f"there is {an(color)} {shape}.",
        f"there are two {color} {SHAPE[shape]}.",
    ])


def toy_items(rng, n):
    """Evaluation items in the official formats: {file: [item]}, and the scenes of the two tasks that have images."""
    world, items, views = scenes(), defaultdict(list), {"winoground": [], "vqa": []}

    def pair(folder, name, good, bad):
        items[f"{folder}/{name}.jsonl"].append({"sentence_good": good, "sentence_bad": bad, "UID": name,
                                                "field": "toy", "pair_id": len(items[f"{folder}/{name}.jsonl"])})
    for i in range(n):
        shape, shape2 = rng.sample(list(SHAPE), 2)
        color, color2 = rng.sample(list(COLOR), 2)
        vowel, consonant = rng.choice([c for c in COLOR if c[0] in "aeiou"]), rng.choice([c for c in COLOR if c[0] not in "aeiou"])
        right, wrong = (vowel, "a") if i % 2 else (consonant, "an")
        one, many = (f"the {shape}", "is", "it"), (f"the {SHAPE[shape]}", "are", "they")
        (noun, verb, pronoun), (_, other_verb, other_pronoun) = (one, many) if i % 2 else (many, one)
        pair("blimp_filtered", "subject_verb_agreement", f"{noun} {verb} {color}.", f"{noun} {other_verb} {color}.")
        pair("blimp_filtered", "determiner_noun_agreement", f"these {SHAPE[shape]} are {color}.", f"these {shape} are {color}.")
        pair("blimp_filtered", "article_agreement", f"there is {an(right)} {shape}.", f"there is {wrong} {right} {shape}.")
        question = f"what color {verb} {noun}?"
        pair("supplement_filtered", "qa_agreement", f"{question} {pronoun} {verb} {color}.",
             f"{question} {other_pronoun} {other_verb} {color}.")
        pair("supplement_filtered", "qa_congruence", f"{question} {pronoun} {verb} {color}.", f"{question} {pronoun} {verb} {rng.choice(list(SIZE))}.")
        question = f"A: {verb} {noun} {color}?\nB: "
        pair("supplement_filtered", "turn_taking", f"{question}no, {pronoun} {verb} {color2}.", f"{question}yes, {pronoun} {verb} {color2}.")

        relation = rng.choice(list(RELATION))
        x, y = f"the {color} {shape}", f"the {color2} {shape2}"
        there, back = RELATION[relation][0], RELATION[INVERSE[relation]][0]
        items["ewok_filtered/spatial-relations.jsonl"].append({
            "Domain": "spatial-relations", "Context1": f"{x} is {there} {y}.", "Context2": f"{x} is {back} {y}.",
            "Target1": f"{y} is {back} {x}.", "Target2": f"{y} is {there} {x}."})

        # Winoground: the same words in another order, colors or places swapped; each caption is right for one of two pictures
        size, size2 = rng.choice(list(SIZE)), rng.choice(list(SIZE))
        first = (size, color, shape), relation, (size2, color2, shape2)
        if i % 2:
            second, tag = ((size, color2, shape), relation, (size2, color, shape2)), "colors swapped"
        else:
            second, tag = ((size2, color2, shape2), relation, (size, color, shape)), "places swapped"
        both = [f"{an(a[0])} {a[1]} {a[2]} is {there} {an(b[0])} {b[1]} {b[2]}." for a, _, b in (first, second)]
        for key in 0, 1:
            items["winoground_filtered/winoground.jsonl"].append({
                "caption_0": both[key], "caption_1": both[1 - key], "image_idx": i, "image_key": f"image_{key}",
                "collapsed_tag": tag})
        views["winoground"].append([first, second])

        # VQA: the distractors are the seven other colors; in every other item the text has told the answer already
        decides = i % 2 == 1
        items["vqa_filtered/vqa.jsonl"].append({
            "question": f"what color is the {size} {shape}?" if decides else f"the {shape} is {color}. what color is the {shape}?",
            "target_ans": f"{color}.", "distractors": [f"{c}." for c in COLOR if c != color], "idx_in_hf_dataset": i,
            "collapsed_tag": "image decides" if decides else "text decides"})
        views["vqa"].append([first if decides else rng.choice(world)])
    return items, views


# ----------------------------------------------------------------------------------------------------------------------
# 2. tokenizer

# words keep the space before them; letters, digits and the rest never mix; written so that Python's re and tiktoken both read it
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\w\s]|_)+|\s+(?!\S)|\s+"
EOT = "<|endoftext|>"  # the name under which tiktoken looks for eot_token


def train_bpe(texts, vocab_size):
    """Byte-level BPE: {bytes: rank} with 256 bytes and merges of the most frequent pair (ties: the smallest ids), fewer when no
    pair is left. Each merge touches only the words that contain the pair."""
    counts = Counter()
    for text in texts:
        counts.update(word for word in re.findall(PATTERN, text) if len(word) <= 64)  # a longer one teaches nothing and slows every merge
    words = [[list(word.encode()), n] for word, n in sorted(counts.items())]  # [ids, how often]
    tokens = [bytes([i]) for i in range(256)]
    pairs, where = Counter(), defaultdict(set)  # how often a pair occurs, and in which words
    for w, (ids, n) in enumerate(words):
        for pair in zip(ids, ids[1:]):
            pairs[pair] += n
            where[pair].add(w)
    heap = [(-n, pair) for pair, n in pairs.items()]
    heapq.heapify(heap)
    ranks = {token: i for i, token in enumerate(tokens)}
    progress = tqdm(total=vocab_size - 256, desc="bpe merges", disable=None, leave=False)
    while heap and len(tokens) < vocab_size:
        negative, pair = heapq.heappop(heap)
        if -negative != pairs[pair]:
            continue  # an old entry: the count has changed since, and a newer entry exists
        token = tokens[pair[0]] + tokens[pair[1]]
        new = ranks.setdefault(token, len(tokens))  # two pairs can spell the same bytes: they share one id
        if new == len(tokens):
            tokens.append(token)
            progress.update()
        changed = set()
        for w in where.pop(pair):
            ids, n = words[w]
            for old in zip(ids, ids[1:]):
                pairs[old] -= n
                changed.add(old)
            merged, i = [], 0
            while i < len(ids):
                hit = i + 1 < len(ids) and (ids[i], ids[i + 1]) == pair
                merged.append(new if hit else ids[i])
                i += 2 if hit else 1
            words[w][0] = merged
            for fresh in zip(merged, merged[1:]):
                pairs[fresh] += n
                where[fresh].add(w)
                changed.add(fresh)
        for p in changed:
            if pairs[p] > 0:
                heapq.heappush(heap, (-pairs[p], p))
    progress.close()
    return ranks


def make_tokenizer(kind, texts, vocab_size):
    """(ranks, meta entry) of a BPE trained on texts, or of GPT-2's vocabulary when kind is gpt2 (downloaded by tiktoken)."""
    if kind == "gpt2":
        try:
            gpt2 = tiktoken.get_encoding("gpt2")
        except Exception as error:  # whatever requests raises when there is no network
            raise InputError("the GPT-2 vocabulary could not be downloaded: go online once, or set TIKTOKEN_CACHE_DIR to a folder "
                             f"that has it, or use --tokenizer bpe ({type(error).__name__})") from error
        return gpt2._mergeable_ranks, {"pattern": gpt2._pat_str, "special": {EOT: gpt2.eot_token}}
    ranks = train_bpe(texts, vocab_size - 1)
    return ranks, {"pattern": PATTERN, "special": {EOT: len(ranks)}}


def make_encoding(ranks, entry):
    """The tiktoken Encoding of ranks and of what make_tokenizer says about them."""
    return tiktoken.Encoding("gatevlm", pat_str=entry["pattern"], mergeable_ranks=ranks, special_tokens=entry["special"])


def load_tokenizer(folder):
    """The tiktoken Encoding of a data folder or run folder; its eot_token ends every document."""
    meta = load_meta(folder)
    path = check_whole(folder, meta, "tokenizer.tiktoken")
    try:
        with open(path, "rb") as f:
            ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in f if line.strip())}
        encoding = make_encoding(ranks, meta["tokenizer"])
        if encoding.max_token_value + 1 != meta["vocab_size"]:
            raise ValueError(f"{encoding.max_token_value + 1} ids, but {meta['vocab_size']} in meta.json")
        encoding.eot_token
    except Exception as error:  # tiktoken raises plain ValueErrors and KeyErrors, and what its regular expressions raise
        raise InputError(f"{path}: not a tiktoken file of 'base64 rank' lines that fits meta.json ({error})") from error
    return encoding


def check_same_tokenizer(run, data):
    """InputError unless the run folder was trained with the tokenizer of this data."""
    a, b = (sha256(os.path.join(folder, "tokenizer.tiktoken")) for folder in (run, data.folder))
    if a != b or load_meta(run)["tokenizer"] != data.meta["tokenizer"]:
        raise InputError(f"{run} has another tokenizer than {data.folder}: it was trained on other data")


# ----------------------------------------------------------------------------------------------------------------------
# 3. images -> features (n_image_token, image_dim)

def patches(picture, n_image_token):
    """PIL picture -> (1, 768): a 16x16 RGB thumbnail, or (16, 768): a 64x64 picture as 4x4 patches of 16x16 RGB; 0 to 1."""
    side = 16 if n_image_token == 1 else 64
    picture = ImageOps.fit(picture.convert("RGB"), (side, side), Image.BOX)
    grid = np.asarray(picture, np.float32).reshape(side // 16, 16, side // 16, 16, 3) / 255
    return grid.transpose(0, 2, 1, 3, 4).reshape(n_image_token, 768)


def unpatch(features):
    """The picture that patches() saw, from its features (1, 768) or (16, 768)."""
    n = math.isqrt(len(features))
    grid = np.asarray(features, np.float32).reshape(n, n, 16, 16, 3).transpose(0, 2, 1, 3, 4).reshape(n * 16, n * 16, 3)
    return Image.fromarray((grid * 255).round().clip(0, 255).astype(np.uint8))


def load_dinov2(name):
    """DINOv2 (dinov2_vits14: 384 numbers, dinov2_vitb14: 768) from torch.hub, which downloads it once."""
    import torch
    try:
        return torch.hub.load("facebookresearch/dinov2", name, verbose=False).eval()
    except Exception as error:  # torch.hub raises many classes when there is no network
        raise InputError(f"{name} could not be downloaded: go online once so that torch.hub can keep it, or use --encoder pixels "
                         f"({type(error).__name__})") from error


def dinov2_features(model, pictures, n_image_token):
    """PIL pictures -> (n, 1, D) CLS tokens, or (n, K, D): the 16x16 patch tokens averaged to a square grid of K."""
    import torch
    import torch.nn.functional as F
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])  # of ImageNet, as DINOv2 was trained
    x = np.stack([np.asarray(ImageOps.fit(p.convert("RGB"), (224, 224), Image.BICUBIC), np.float32) for p in pictures])
    with torch.no_grad():
        y = model.forward_features(torch.from_numpy((x / 255 - mean) / std).permute(0, 3, 1, 2))
    if n_image_token == 1:
        return y["x_norm_clstoken"][:, None].numpy()
    grid = y["x_norm_patchtokens"].transpose(1, 2).unflatten(2, (16, 16))  # (n, D, 16, 16)
    return F.adaptive_avg_pool2d(grid, math.isqrt(n_image_token)).flatten(2).transpose(1, 2).numpy()


def open_picture(path):
    """An upright RGB picture, or InputError naming the file."""
    try:
        with Image.open(path) as picture:
            if picture.mode.startswith("I"):  # 16 bits per pixel, which convert() would clip to white
                picture = Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8))
            return ImageOps.exif_transpose(picture).convert("RGB")
    except Exception as error:  # a damaged picture raises whatever its decoder does, or the reader of its EXIF data
        raise InputError(f"{path}: not a readable picture ({error})") from error


def make_encoder(encoder, n_image_token):
    """A function from a list of PIL pictures to features (n, n_image_token, image_dim)."""
    allowed = (1, 16) if encoder == "pixels" else (1, 4, 16, 64, 256)
    if n_image_token not in allowed:
        raise InputError(f"--encoder {encoder} makes {', '.join(map(str, allowed))} image tokens, not {n_image_token}")
    if encoder == "pixels":
        return lambda pictures: np.stack([patches(p, n_image_token) for p in pictures])
    model = load_dinov2(encoder)
    return lambda pictures: dinov2_features(model, pictures, n_image_token)


# ----------------------------------------------------------------------------------------------------------------------
# 4. readers: BabyLM files and your own photos

def check_spaces(where, text):
    """InputError for a gap so wide that tiktoken's regular expressions run out of stack in it."""
    if len(text) > 100_000 and re.search(r"\s{100000}", text):
        raise InputError(f"{where}: more than 100,000 spaces in a row; expected text")


def read_lines(path):
    """Yield (line number, line) of a UTF-8 text file, LF or CRLF, with or without BOM; InputError names a bad line."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file")
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise InputError(f"{path}, line {number}: not UTF-8 text ({error.reason} at byte {error.start})") from error
            check_spaces(f"{path}, line {number}", text)
            yield number, text


def documents(paths, lines_per_document, keep=1.0, seed=0):
    """Yield documents: up to lines_per_document lines joined by newlines; a blank line or the file's end ends one. keep < 1
    takes that share of them, the same ones every time."""
    rng = random.Random(seed)
    for path in paths:
        lines = []
        for _, line in itertools.chain(read_lines(path), [(0, "")]):
            if line.strip():
                lines.append(line)
            if lines and (len(lines) == lines_per_document or not line.strip()):
                if keep >= 1 or rng.random() < keep:
                    yield "\n".join(lines)
                lines = []


def find_text(root, split):
    """The text files of the one train*/ or dev*/ folder below root, text_only/ or text_data/."""
    files = sorted(path for sub in ("", "text_only", "text_data") for path in glob.glob(os.path.join(glob.escape(root), sub, f"{split}*", "*"))
                   if path.endswith((".train", ".dev", ".txt")))
    folders = sorted({os.path.dirname(path) for path in files})
    if len(folders) > 1:
        raise InputError(f"{root}: more than one {split} folder ({', '.join(folders)}); expected one, move the others")
    return files


def find_captions(root, split, wanted):
    """[(captions file, [states files])] of image_caption/ (validation: image_caption_dev/), multimodal_data/ or root itself."""
    stems = [path.removesuffix("_captions.json") for sub in (("image_caption", "multimodal_data", "") if split == "train" else ("image_caption_dev",))
             for path in sorted(glob.glob(os.path.join(glob.escape(root), sub, "*_captions.json")))]
    found, by_number = [], lambda path: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", path)]  # _2of12 before _10of12
    for stem in stems:
        longer = tuple(f"{other}_" for other in stems if other.startswith(f"{stem}_"))
        states = [path for path in glob.glob(f"{glob.escape(stem)}_*states*.npy") if not path.startswith(longer)]
        if not wanted or os.path.basename(stem) in wanted:
            if not states:
                raise InputError(f"{stem}_captions.json: expected {os.path.basename(stem)}_*states*.npy beside it")
            found.append((f"{stem}_captions.json", sorted(states, key=by_number)))
    return found


def read_json(path):
    try:
        with open(path, encoding="utf-8-sig") as f:
            return json.load(f)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from error


def check_captions(path, captions):
    """Every caption must be a non-empty string that UTF-8 can hold."""
    if not isinstance(captions, list):
        raise InputError(f"{path}: expected a list of captions, not {type(captions).__name__}")
    for row, caption in enumerate(captions):
        if not isinstance(caption, str) or not caption.strip():
            raise InputError(f"{path}, row {row}: expected a caption, found {caption!r:.40}")
        try:
            caption.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{path}, row {row}: {error.object[error.start]!r} is half a character (a lone surrogate), not text") from error
        check_spaces(f"{path}, row {row}", caption)
    return captions


def load_npy(path):
    """A .npy array, mapped from disk; InputError for anything else."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy reads the header as Python, and raises whatever Python's tokenizer does
        raise InputError(f"{path}: not a whole .npy file ({str(error).splitlines()[0] if str(error) else type(error).__name__})") from error
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path}: an archive of arrays; expected one .npy array")
    return array


def open_states(path):
    """A memory-mapped .npy of image features as (n, K, image_dim)."""
    states = load_npy(path)
    if states.ndim not in (2, 3) or states.dtype.kind != "f" or 0 in states.shape:
        raise InputError(f"{path}: expected floats of shape (n, 768) or (n, tokens, 768), found {states.dtype} {states.shape}")
    return states if states.ndim == 3 else states[:, None]


def chunks(n, size=4096):
    return (slice(i, min(i + size, n)) for i in range(0, n, size))


def length_batches(length, batch_tokens, multiple=1):
    """Indices of length (n,), longest first, in batches of at most batch_tokens tokens, but of one text at least. A text counts as long as the
    longest of its batch, rounded up to a multiple of multiple. Texts of about one length stand together, so that little is padding."""
    order, i = np.argsort(-np.asarray(length), kind="stable"), 0
    while i < len(order):
        T = math.ceil(length[order[i]] / multiple) * multiple
        yield order[i:i + max(1, batch_tokens // T)]
        i += max(1, batch_tokens // T)


def read_caption_sets(found):
    """([caption], rows (n,), fetch) of caption files and their states. Row i of a file's concatenated states belongs to caption i;
    of equal neighbours only the first is used. Everything is read and checked here, before anything is written."""
    said, paths, lengths, new, last = [], [], [], [], None
    for captions_path, states_paths in found:
        said += check_captions(captions_path, read_json(captions_path))
        for path in states_paths:
            states = open_states(path)
            paths.append(path)
            lengths.append(len(states))
            if states.shape[1:] != (expected := open_states(paths[0]).shape[1:]):
                raise InputError(f"{path}: rows of shape {states.shape[1:]}, expected {expected} as in {paths[0]}")
            for part in chunks(len(states)):
                with np.errstate(over="ignore"):  # what float32 cannot hold becomes inf and is refused
                    x = np.asarray(open_states(path)[part], np.float32)  # opened anew: what a map has read stays in memory with it
                bad = ~(np.abs(x) <= 65504).all(axis=(1, 2))  # NaN, inf, and what float16 cannot hold
                if bad.any():
                    raise InputError(f"{path}, row {part.start + bad.argmax()}: NaN, inf or a number beyond 65504; expected finite features")
                before = np.concatenate([np.full_like(x[:1], np.nan) if last is None else last, x[:-1]])
                new.append((x != before).any(axis=(1, 2)))
                last = x[-1:]
        if sum(lengths) != len(said):
            raise InputError(f"{captions_path}: {len(said)} captions up to here, but {sum(lengths)} rows in {', '.join(states_paths)} and before; "
                             "expected one row per caption")
    if not said:
        return [], np.zeros(0, np.int64), None
    starts = np.cumsum([0, *lengths])

    def fetch(rows):
        where = np.searchsorted(starts, rows, "right") - 1
        states = {k: open_states(paths[k]) for k in set(where)}
        return np.stack([states[k][row - starts[k]] for k, row in zip(where, rows)])
    rows = np.where(np.concatenate(new), np.arange(len(said)), 0)  # a repeated row holds 0 ...
    return said, np.maximum.accumulate(rows), fetch  # ... and takes the row of the last new one before it


def read_photo_captions(path):
    """[(picture name, caption)] from name<TAB>caption lines, Flickr8k's name.jpg#0<TAB>caption, or a COCO captions JSON."""
    if path.endswith(".json"):
        coco = read_json(path)
        try:
            name = {image["id"]: image["file_name"] for image in coco["images"]}
            pairs = [(name[a["image_id"]], a["caption"]) for a in coco["annotations"]]
        except (KeyError, TypeError) as error:
            raise InputError(f"{path}: expected COCO captions (images: id, file_name; annotations: image_id, caption), "
                             f"and met {type(error).__name__} {error}") from error
    else:
        pairs = []
        for number, line in read_lines(path):
            if line.strip():
                if "\t" not in line:
                    raise InputError(f"{path}, line {number}: expected picture<TAB>caption, found {line!r:.60}")
                name, caption = line.split("\t", 1)
                if not caption.strip():
                    raise InputError(f"{path}, line {number}: expected a caption after the TAB")
                pairs.append((re.sub(r"#\d+$", "", name), caption))
    if not pairs:
        raise InputError(f"{path}: no captions in it")
    for name, _ in pairs:
        if not isinstance(name, str):
            raise InputError(f"{path}: expected the file name of a picture, found {name!r}")
    check_captions(path, [caption for _, caption in pairs])
    return pairs


# ----------------------------------------------------------------------------------------------------------------------
# 5. the writer, and the reader of what it wrote

def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while part := f.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def write_text(path, documents, encoding):
    """uint16 stream of documents, each ended by <eot>. Returns (documents, tokens). Holds a thousand documents at a time."""
    n_document = n_token = 0
    with open(path, "wb") as f:
        while batch := list(itertools.islice(documents, 1000)):
            ids = [i for d in encoding.encode_ordinary_batch(batch, num_threads=os.cpu_count()) for i in (*d, encoding.eot_token)]
            f.write(np.array(ids, np.uint16).tobytes())
            n_document, n_token = n_document + len(batch), n_token + len(ids)
    return n_document, n_token


def write_captions(stem, captions, encoding, max_caption):
    """stem.bin and stem_offset.npy. Returns (tokens, how many captions were cut to max_caption tokens, <eot> included)."""
    lengths, cut = [0], 0
    with open(f"{stem}.bin", "wb") as f:
        for part in chunks(len(captions)):
            for ids in encoding.encode_ordinary_batch(captions[part], num_threads=os.cpu_count()):
                cut += len(ids) >= max_caption
                ids = [*ids[:max_caption - 1], encoding.eot_token]
                f.write(np.array(ids, np.uint16).tobytes())
                lengths.append(len(ids))
    offset = np.cumsum(lengths, dtype=np.int64)
    np.save(f"{stem}_offset.npy", offset)
    return int(offset[-1]), cut


def write_images(path, jobs, n_image_token, image_dim):
    """image.npy, float16, from [(fetch, rows)], 256 pictures at a time."""
    shape = (sum(len(rows) for _, rows in jobs), n_image_token, image_dim)
    with open(path, "wb") as f, tqdm(total=shape[0], desc="images", disable=None, leave=False) as progress:
        np.lib.format.write_array_header_1_0(f, {"descr": "<f2", "fortran_order": False, "shape": shape})
        for fetch, rows in jobs:
            for part in chunks(len(rows), 256):
                f.write(fetch(rows[part]).astype("<f2").tobytes())
                progress.update(len(rows[part]))


def check_free(out, overwrite):
    """InputError when a folder is there that may not be replaced."""
    has = lambda name: os.path.isfile(os.path.join(out, name))
    if os.path.exists(out) and not (overwrite and has("meta.json") and not has("config.json")):  # a run folder has both, and hours of training
        raise InputError(f"{out}: exists already; --overwrite replaces a data folder, --out writes elsewhere")


def write_folder(out, text, captions, tokenizer, meta, max_caption, overwrite, extra=None):
    """Write a data folder under a temporary name and rename it when it is whole. text {split: function -> documents}; captions {split:
    ([caption], rows (n,), fetch)} where fetch(rows) -> features (n, K, image_dim); tokenizer (kind, texts, vocab_size) for make_tokenizer;
    extra(folder, encoding) adds files and returns more meta."""
    check_free(out, overwrite)  # again: another run may have made it meanwhile
    part = f"{out.rstrip('/')}.part"
    with locked(part):
        try:
            for left in os.scandir(part):  # by a run that was killed
                shutil.rmtree(left) if left.is_dir() else os.unlink(left)
            meta = fill_folder(part, text, captions, tokenizer, meta, max_caption, extra)
            if os.path.exists(out):
                shutil.rmtree(f"{part}.old", ignore_errors=True)  # of a run that was killed while it removed it
                os.rename(out, f"{part}.old")
            os.rename(part, out)
            shutil.rmtree(f"{part}.old", ignore_errors=True)
        except BaseException as error:
            shutil.rmtree(part, ignore_errors=True)
            if isinstance(error, OSError) and not error.filename:
                raise InputError(f"{out}: cannot be written ({error})") from error
            raise
    return meta


def fill_folder(folder, text, captions, tokenizer, meta, max_caption, extra):
    """Write every file of a data folder, of what write_folder takes; returns its meta."""
    ranks, meta["tokenizer"] = make_tokenizer(*tokenizer)
    meta["vocab_size"] = max(*ranks.values(), *meta["tokenizer"]["special"].values()) + 1
    if meta["vocab_size"] > 65536:
        raise InputError(f"a vocabulary of {meta['vocab_size']} ids does not fit the 16 bits of a .bin file; expected at most 65536")
    with open(os.path.join(folder, "tokenizer.tiktoken"), "wb") as f:
        f.writelines(base64.b64encode(token) + b" %d\n" % rank for token, rank in sorted(ranks.items(), key=lambda x: x[1]))
    encoding, count, jobs = make_encoding(ranks, meta["tokenizer"]), {}, []
    for split in "train", "val":
        count[f"text_{split}_documents"], count[f"text_{split}_tokens"] = write_text(
            os.path.join(folder, f"text_{split}.bin"), iter(text[split]()), encoding)
        sentences, rows, fetch = captions[split]
        stem = os.path.join(folder, f"caption_{split}")
        count[f"caption_{split}"] = len(sentences)
        count[f"caption_{split}_tokens"], count[f"caption_{split}_cut"] = write_captions(stem, sentences, encoding, max_caption)
        unique, inverse = np.unique(rows, return_inverse=True)
        np.save(f"{stem}_image.npy", (inverse + sum(len(rows) for _, rows in jobs)).astype(np.int32))
        count[f"image_{split}"] = len(unique)
        jobs.append((fetch, unique))
    write_images(os.path.join(folder, "image.npy"), jobs, meta["n_image_token"], meta["image_dim"])
    meta["count"] = count
    if extra:
        meta.update(extra(folder, encoding))
    files = sorted(os.path.relpath(os.path.join(d, f), folder) for d, _, names in os.walk(folder) for f in names)
    meta["sha256"] = {f: sha256(os.path.join(folder, f)) for f in files}
    write_json(os.path.join(folder, "meta.json"), meta)
    return meta


@contextmanager
def locked(folder):
    """Make a folder and keep other runs out of it: two that write to one folder would ruin both. The lock ends with its process."""
    os.makedirs(folder, exist_ok=True)
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise InputError(f"{folder}: another run is writing there; wait for its end, or choose another --out") from error
    except OSError as error:  # some network file systems have no locks
        print(f"{folder}: cannot be locked ({error.strerror}); take care that no other run writes there")
    try:
        yield
    finally:
        if os.path.isdir(folder) and not os.listdir(folder):
            os.rmdir(folder)  # nothing came of it
        os.close(handle)


def write_json(path, value):
    """Write under a temporary name, then rename: a crash leaves the old file or the new one."""
    with open(f"{path}.part", "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1, ensure_ascii=False)
    os.replace(f"{path}.part", path)


META = {"vocab_size": int, "image_dim": int, "n_image_token": int, "encoder": str, "count": dict, "tokenizer": dict, "sha256": dict}


def load_meta(folder):
    """meta.json of a data folder or run folder, with fields of the right types."""
    path = os.path.join(folder, "meta.json")
    if not os.path.isfile(path):
        raise InputError(f"{path}: not there; prepare_data.py makes data folders")
    meta = read_json(path)
    for name, kind in META.items():
        if not isinstance(meta, dict) or type(meta.get(name)) is not kind:
            raise InputError(f"{path}: expected {name}, a {kind.__name__}; it is damaged or of another version, prepare the data again")
    if any(name in meta and type(meta[name]) is not float for name in ("floor_with_image", "floor_text_only")) or not isinstance(meta.get("upos", {}), dict):
        raise InputError(f"{path}: expected floors that are numbers and a table upos; prepare the data again")
    return meta


def check_whole(folder, meta, name):
    """The path of a file that prepare_data.py wrote; InputError unless it is as it was written."""
    path = os.path.join(folder, name)
    if not os.path.isfile(path) or sha256(path) != meta["sha256"].get(name):
        raise InputError(f"{path}: missing or changed since prepare_data.py wrote it (its sha256 is not the one in meta.json); prepare the data again")
    return path


class Data:
    """A data folder, opened without reading it into memory. Per split: text, a uint16 stream; tokens, the captions back to back; offset (n+1,),
    where each begins; image_row (n,), its row of image (N,K,image_dim). caption_batch puts them together. InputError for a damaged file:
    each is compared with its checksum, but for the images: they can be many GB, so a batch is looked at when it is read."""

    def __init__(self, folder):
        self.folder, self.meta, self.encoding = folder, load_meta(folder), load_tokenizer(folder)
        self.eot, self.text, self.tokens, self.offset, self.image_row = self.encoding.eot_token, {}, {}, {}, {}
        shape = self.meta["n_image_token"], self.meta["image_dim"]
        self.image = load_npy(os.path.join(folder, "image.npy"))
        if self.image.dtype != np.float16 or self.image.shape[1:] != shape:
            raise InputError(f"{folder}/image.npy: expected float16 of shape (n, {shape[0]}, {shape[1]}), found {self.image.dtype} {self.image.shape}")
        for split in "train", "val":
            self.text[split] = self.stream(f"text_{split}.bin")
            self.tokens[split] = self.stream(f"caption_{split}.bin")
            self.offset[split] = np.load(check_whole(folder, self.meta, f"caption_{split}_offset.npy"))
            self.image_row[split] = np.load(check_whole(folder, self.meta, f"caption_{split}_image.npy"))
            if (self.image_row[split] >= len(self.image)).any():
                raise InputError(f"{folder}/image.npy: {len(self.image)} rows, and caption_{split}_image.npy asks for more; prepare the data again")

    def stream(self, name):
        path = check_whole(self.folder, self.meta, name)  # numpy cannot map an empty file
        return np.memmap(path, np.uint16, "r") if os.path.getsize(path) else np.zeros(0, np.uint16)

    def images(self, rows):
        """Features of rows of image.npy, (B,K,image_dim) float32; InputError names a row with NaN or inf in it."""
        with np.errstate(all="ignore"):
            x = self.image[rows].astype(np.float32)
            whole = np.isfinite(x.sum())
        if not whole:
            bad = rows[~np.isfinite(x).all(axis=(1, 2))]
            raise InputError(f"{self.folder}/image.npy, row {bad[0]}: NaN or inf; the data are damaged, prepare them again")
        return x

    def lengths(self, split, block_size, ids=slice(None)):
        """Tokens of captions ids (all of them by default) with their <eot>, cut to block_size: (n,)."""
        return np.minimum(self.offset[split][1:][ids] - self.offset[split][:-1][ids], block_size)

    def caption(self, split, i, block_size):
        """Token ids of one caption with its <eot>, cut to block_size."""
        return self.tokens[split][self.offset[split][i]:self.offset[split][i + 1]][:block_size]

    def caption_batch(self, split, ids, block_size, image_rows=None, multiple=1, images=True):
        """Captions ids (B,) -> idx (B,T), targets (B,T) with -1 after the end, image (B,K,image_dim) float32, or None for images=False. T: the longest
        caption, rounded up to a multiple of multiple, block_size at most. image_rows (B,): show these rows of image.npy, not the captions' own."""
        length = self.lengths(split, block_size, ids)
        T = min(-(-length.max() // multiple) * multiple, block_size)
        place = self.offset[split][ids][:, None] + np.arange(T)  # (B, T)
        targets = np.where(np.arange(T) < length[:, None], self.tokens[split][np.minimum(place, len(self.tokens[split]) - 1)].astype(np.int64), -1)
        idx = np.full_like(targets, self.eot)  # a caption starts after <eot>; padding holds it too, to the right of all that counts
        idx[:, 1:] = np.where(targets[:, :-1] == -1, self.eot, targets[:, :-1])
        rows = self.image_row[split][ids] if image_rows is None else image_rows
        return idx, targets, self.images(rows) if images else None


# ----------------------------------------------------------------------------------------------------------------------
# 6. command line

def prepare_toy(args):
    rng = random.Random(args.seed)
    world, encode = scenes(), make_encoder("pixels", args.n_image_token)
    captions_of, text = {}, {}
    for split, n_image, n_text in ("train", args.n_image, args.n_text), ("val", max(1, args.n_image // 10), max(1, args.n_text // 10)):
        drawn, said = rng.choices(world, k=n_image), []
        for scene in drawn:
            options = captions(scene)
            said += rng.choices(list(options), options.values())
        seed = f"{args.seed} {split}"
        pictures = lambda rows, drawn=drawn, seed=seed: encode([draw_scene(drawn[i], random.Random(f"{seed} {i}")) for i in rows])
        captions_of[split] = said, np.arange(n_image), pictures
        sentences = [toy_text(rng) for _ in range(n_text)]
        text[split] = lambda sentences=sentences: sentences

    def evaluation(folder, encoding):
        root = os.path.join(folder, "evaluation_data", "full_eval")
        items, views = toy_items(random.Random(f"{args.seed} items"), 200)
        for name, rows in items.items():
            os.makedirs(os.path.dirname(os.path.join(root, name)), exist_ok=True)
            with open(os.path.join(root, name), "w", encoding="utf-8") as f:
                f.writelines(json.dumps(row) + "\n" for row in rows)
        jitter = random.Random(f"{args.seed} views")
        for name, groups in views.items():
            states = np.stack([encode([draw_scene(scene, jitter) for scene in group]) for group in groups]).astype(np.float16)
            np.save(os.path.join(root, f"{name}_states.npy"), states if name == "winoground" else states[:, 0])
        with_image, text_only, tokens = entropies(world, lambda said: [len(x) + 1 for x in encoding.encode_ordinary_batch(said)])
        return {"floor_with_image": with_image / tokens, "floor_text_only": text_only / tokens,
                "visual_bits_per_caption": (text_only - with_image) / math.log(2), "tokens_per_caption": tokens,
                "upos": {word: tag for tag, words in WORDS_OF_CLASS.items() for word in words.split()}}
    texts = itertools.chain(captions_of["train"][0], text["train"]())
    meta = {"source": "toy", "made_from": {"seed": args.seed, "pictures": args.n_image, "texts": args.n_text}, "encoder": "pixels",
            "n_image_token": args.n_image_token, "image_dim": 768}
    return text, captions_of, texts, meta, evaluation


def hold_out(captions, rows, share, seed, source):
    """Split captions and their image rows into (training captions, rows) and (validation captions, rows): all captions of a
    random share of the images are held out. InputError, naming the source, for a single image."""
    images = np.unique(rows)
    if len(images) < 2:
        raise InputError(f"{source}: captions of one picture only; expected at least two, as one is held out for validation")
    n = max(1, round(share * len(images)))
    held = np.isin(rows, np.random.default_rng(seed).choice(images, n, replace=False))
    train, val = (([captions[i] for i in np.flatnonzero(part)], rows[part]) for part in (~held, held))
    return train, val


def sample_captions(captions, rows, n, seed):
    """A reproducible n of the captions, in their order; all of them when n is 0 or too large."""
    if not 0 < n < len(captions):
        return captions, rows
    pick = np.sort(np.random.default_rng(seed).choice(len(captions), n, replace=False))
    return [captions[i] for i in pick], rows[pick]


def prepare_babylm(args):
    wanted = args.caption_sets.split(",") if args.caption_sets else []
    text_files, dev_files = find_text(args.folder, "train"), find_text(args.folder, "dev")
    found, found_dev = (find_captions(args.folder, split, wanted) for split in ("train", "dev"))
    missing = set(wanted) - {os.path.basename(path).removesuffix("_captions.json") for path, _ in found}
    if missing or not (text_files or found):
        expected = " and ".join(f"{name}_captions.json" for name in sorted(missing)) or "text_only/train*/*.train or image_caption/*_captions.json"
        raise InputError(f"{args.folder}: expected {expected}; the BabyLM files are at osf.io/ad7qg")
    said, rows, fetch = read_caption_sets(found)
    if found_dev and not found:
        raise InputError(f"{found_dev[0][0]}: captions to hold out, but image_caption/ has none to train on")
    if found_dev:
        val = read_caption_sets(found_dev)
    elif said:
        (said, rows), val = hold_out(said, rows, 0.01, args.seed, found[0][0])
        val = *val, fetch
    else:
        val = said, rows, fetch
    captions_of = {"train": (*sample_captions(said, rows, args.captions, args.seed), fetch), "val": val}

    def text_of(files, words):
        """A function that yields the documents of files, or of a random sample of about this many words."""
        keep = words and words / max(1, sum(len(d.split()) for d in documents(files, args.lines_per_document)))
        return lambda: documents(files, args.lines_per_document, keep or 1, args.seed)
    every = text_of(text_files, args.words)
    if dev_files:
        text = {"train": every, "val": text_of(dev_files, math.ceil(args.words / 10))}
    else:
        text = {"train": lambda: (d for i, d in enumerate(every()) if i % 100), "val": lambda: itertools.islice(every(), 0, None, 100)}
    shape = fetch(np.zeros(1, np.int64)).shape[1:] if fetch else (0, 1)
    held_shape = val[2](np.zeros(1, np.int64)).shape[1:] if val[2] else shape
    if held_shape != shape:
        raise InputError(f"{found_dev[0][1][0]}: held-out rows of shape {held_shape}, expected {shape} as in training")
    meta = {"source": "babylm", "encoder": "given", "n_image_token": shape[0], "image_dim": shape[1],
            "made_from": {"files": text_files + dev_files + [p for c, s in found + found_dev for p in (c, *s)],
                          "words": args.words, "captions": args.captions, "seed": args.seed}}
    return text, captions_of, itertools.chain(captions_of["train"][0], text["train"]()), meta, None


def prepare_photos(args):
    captions_file = args.captions_file or os.path.join(args.folder, "captions.txt")
    pairs = read_photo_captions(captions_file)
    names, rows = np.unique([name for name, _ in pairs], return_inverse=True)
    paths = [os.path.join(args.folder, name) for name in names.tolist()]
    for path in paths:
        if not os.path.isfile(path):
            raise InputError(f"{captions_file}: names {os.path.basename(path)}, and {path} is not there")
    encode = make_encoder(args.encoder, args.n_image_token)
    fetch = lambda rows: encode([open_picture(paths[i]) for i in rows])
    train, val = hold_out([caption for _, caption in pairs], rows, 0.1, args.seed, captions_file)
    captions_of = {"train": (*sample_captions(*train, args.captions, args.seed), fetch), "val": (*val, fetch)}
    meta = {"source": "photos", "encoder": args.encoder, "n_image_token": args.n_image_token, "image_dim": fetch([0]).shape[-1],
            "made_from": {"folder": args.folder, "captions_file": captions_file, "captions": args.captions, "seed": args.seed},
            "pictures": [os.path.abspath(paths[i]) for _, rows, _ in captions_of.values() for i in np.unique(rows)]}  # as in image.npy
    return {"train": list, "val": list}, captions_of, captions_of["train"][0], meta, None


def make_parser():
    p = Parser(description=__doc__.split("\n\n")[0], usage="python prepare_data.py [toy | babylm DIR | photos DIR] [--flag value] ...",
               allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("source", nargs="?", default="toy", choices=("toy", "babylm", "photos"), help="what to prepare")
    p.add_argument("folder", nargs="?", default="", help="babylm: the folder with text_only/ and image_caption/; photos: the folder of pictures")
    p.add_argument("--out", default="", help="data folder to write; empty = data/<source>, and data/toy16 for a toy world in 16 patches")
    p.add_argument("--overwrite", action="store_true", help="replace the data folder if it exists")
    p.add_argument("--seed", type=int, default=1, help="seed of every random choice: scenes, splits, held-out pictures")
    p.add_argument("--n_image_token", type=int, default=1, help="toy, photos: vectors per picture; 1 = global (thumbnail or CLS), 16 = a 4x4 grid of patches")
    p.add_argument("--max_caption", type=int, default=128, help="longest caption, in tokens with its <eot>; longer ones are cut and counted")
    t = p.add_argument_group("tokenizer")
    t.add_argument("--tokenizer", default="bpe", choices=("bpe", "gpt2"), help="bpe = byte-level BPE trained on this data; gpt2 = GPT-2's 50,257 ids")
    t.add_argument("--vocab_size", type=int, default=8192, help="bpe: number of ids at most, 256 bytes and <eot> among them")
    t = p.add_argument_group("toy world")
    t.add_argument("--n_image", type=int, default=40000, help="training pictures, one caption each; a tenth as many more for validation")
    t.add_argument("--n_text", type=int, default=5000, help="text-only training documents; a tenth as many more for validation")
    t = p.add_argument_group("BabyLM files and photos")
    t.add_argument("--words", type=int, default=0, help="babylm: take a random sample of about this many words of text, a tenth as many of dev/ (without it every 100th document is held out); 0 = all")
    t.add_argument("--captions", type=int, default=0, help="take a random sample of this many training captions; 0 = all")
    t.add_argument("--caption_sets", default="", help="babylm: names of the caption files to take, by comma, such as local_narr; empty = all")
    t.add_argument("--lines_per_document", type=int, default=8, help="babylm: lines joined into one document (a blank line ends one too)")
    t.add_argument("--captions_file", default="", help="photos: picture<TAB>caption lines, Flickr8k lines or COCO JSON; empty = captions.txt in the folder")
    t.add_argument("--encoder", default="pixels", choices=("pixels", "dinov2_vits14", "dinov2_vitb14"), help="photos: what turns a picture into features")
    return p


def main(argv=None):
    """Prepare a data folder; returns its path. Raises InputError on wrong input and then leaves no folder."""
    args = make_parser().parse_args(argv)
    least_of = {"vocab_size": 257,  # 256 bytes and <eot>
                "max_caption": 32 if args.source == "toy" else 2,  # a toy caption whole, as its floors are; elsewhere a token and <eot>
                "seed": 0, "n_image": 1, "n_text": 1, "lines_per_document": 1, "words": 0, "captions": 0}
    for name, least in least_of.items():
        if getattr(args, name) < least:
            raise InputError(f"--{name} must be at least {least}, not {getattr(args, name)}")
    if args.source != "toy" and not os.path.isdir(args.folder):
        raise InputError(f"{args.source} needs the folder to read: {args.folder or 'none given'} is not a folder")
    out = args.out or os.path.join("data", "toy16" if args.source == "toy" and args.n_image_token == 16 else args.source)
    check_free(out, args.overwrite)  # before gigabytes are read
    text, captions_of, texts, meta, extra = {"toy": prepare_toy, "babylm": prepare_babylm, "photos": prepare_photos}[args.source](args)
    meta = write_folder(out, text, captions_of, (args.tokenizer, texts, args.vocab_size), meta, args.max_caption, args.overwrite, extra)
    c = meta["count"]
    print(f"{out}: {c['text_train_tokens']:,} text tokens, {c['caption_train']:,} captions ({c['caption_train_tokens']:,} tokens, "
          f"{c['caption_train_cut']} cut) of {c['image_train']:,} pictures, vocabulary {meta['vocab_size']:,}; "
          f"validation: {c['text_val_tokens']:,} text tokens, {c['caption_val']:,} captions")
    if extra:
        print(f"a caption carries {meta['visual_bits_per_caption']:.1f} bits that only its picture can tell; no model gets below "
              f"{meta['floor_with_image']:.4f} nats per token with the picture, {meta['floor_text_only']:.4f} without")
    return out


if __name__ == "__main__":
    run_script(main)
