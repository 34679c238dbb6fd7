"""prepare_data.py: what a data folder holds, checked against references that are written here in another way.

In reading order: the tokenizer, the toy world, pictures, your own photos, BabyLM files, every data folder, batches, toy
evaluation items, wrong input, command line.
"""
import filecmp
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import unicodedata
from collections import Counter

import numpy as np
import pytest
import tiktoken
import tiktoken.load
import torch
from PIL import Image

import prepare_data
from gatevlm import InputError
from prepare_data import COLOR, INVERSE, RELATION, SHAPE, SIZE, Data, captions, draw_scene, entropies, patches, scenes, train_bpe, unpatch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHARED = os.path.join(ROOT, "..", "shared", "data")


# ----------------------------------------------------------------------------------------------------------------------
# small inputs

def write(root, files):
    """Write {relative path: bytes, text, array, picture or anything JSON can hold} below root."""
    for name, value in files.items():
        path = os.path.join(root, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if isinstance(value, Image.Image):
            value.save(path)
        elif isinstance(value, np.ndarray):
            np.save(path, value)
        else:
            data = value if isinstance(value, (bytes, str)) else json.dumps(value)
            with open(path, "wb") as f:
                f.write(data if isinstance(data, bytes) else data.encode())
    return str(root)


def plain(color, size=(64, 64)):
    return Image.new("RGB", size, color)


def rows(*values, dim=6):
    """Image features in which every number of row i is values[i], so that a row tells where it came from."""
    return np.repeat(np.float32(values)[:, None], dim, axis=1)


TEXT = "".join(f"*MOT: look at the {noun} number {i} .\n" for i, noun in enumerate(["dog", "cat", "ball", "spoon"] * 30))
NAMES = [f"caption {i}" for i in range(10)]


def babylm(**changes):
    """A BabyLM download in small: two text files, and one caption set whose features come in two parts. None removes a file."""
    files = {"text_only/train/childes.train": TEXT, "text_only/train/wiki.train": "A word .\n\nAnother word .\n",
             "image_caption/cc_captions.json": NAMES, "image_caption/cc_dino_v2_states_1of2.npy": rows(0, 0, 1, 2),
             "image_caption/cc_dino_v2_states_2of2.npy": rows(2, 2, 3, 4, 4, 5)}
    short = {"text": "text_only/train/wiki.train", "captions": "image_caption/cc_captions.json",
             "part1": "image_caption/cc_dino_v2_states_1of2.npy", "part2": "image_caption/cc_dino_v2_states_2of2.npy"}
    files.update({short.get(name, name): value for name, value in changes.items()})
    return {name: value for name, value in files.items() if value is not None}


PHOTOS = {f"{i}.png": plain((20 * i, 255 - 20 * i, 7)) for i in range(12)} | {
    "captions.txt": "".join(f"{i % 12}.png\tphoto {i % 12}, caption {i}\n" for i in range(24))}


def prepare(tmp_path, *argv, out="out"):
    """The data folder of a command line, opened."""
    return Data(prepare_data.main([*map(str, argv), "--out", str(tmp_path / out)]))


def decoded(data, split):
    """[caption] of a split, each without its <eot>."""
    offset, tokens = data.offset[split], data.tokens[split]
    return [data.encoding.decode(tokens[i:j - 1].tolist()) for i, j in zip(offset, offset[1:])]


def documents(data, split):
    """[document] of the text stream, which must end with an <eot>."""
    ids = data.text[split].tolist()
    assert not ids or ids[-1] == data.eot
    return [data.encoding.decode(list(run)) for is_eot, run in itertools.groupby(ids, lambda i: i == data.eot) if not is_eot]


def features_of(data, split):
    """[(caption, its image (K, image_dim))] of a split."""
    return [(said, data.image[row].astype(np.float32)) for said, row in zip(decoded(data, split), data.image_row[split])]


def files_of(folder):
    return sorted(os.path.relpath(os.path.join(d, f), folder) for d, _, names in os.walk(folder) for f in names)


def same_bytes(a, b, without=()):
    names = [f for f in files_of(a) if f not in without]
    assert names == [f for f in files_of(b) if f not in without]
    return filecmp.cmpfiles(a, b, names, shallow=False)[0] == names


def cli(*argv):
    env = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, os.path.join(ROOT, "prepare_data.py"), *map(str, argv)], capture_output=True, text=True, env=env)


# ----------------------------------------------------------------------------------------------------------------------
# the tokenizer

def textbook_bpe(texts, vocab_size):
    """BPE as it is explained: count all pairs of the whole corpus, merge the most frequent one everywhere, count again.
    Returns the tokens in order of their ids, and {word: its ids} for every word of the corpus."""
    count = Counter(word for text in texts for word in re.findall(prepare_data.PATTERN, text))
    ids = {word: list(word.encode()) for word in count}
    tokens = [bytes([i]) for i in range(256)]
    while len(tokens) < vocab_size:
        pairs = Counter()
        for word, n in count.items():
            for pair in zip(ids[word], ids[word][1:]):
                pairs[pair] += n
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))  # ties go to the smallest ids
        for word, old in ids.items():
            new = []
            for i in old:
                if new and (new[-1], i) == best:
                    new[-1] = len(tokens)  # this id is larger than any in best, so it cannot be merged again in this pass
                else:
                    new.append(i)
            ids[word] = new
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return tokens, ids


def encoding_of(ranks):
    return tiktoken.Encoding("test", pat_str=prepare_data.PATTERN, mergeable_ranks=ranks, special_tokens={})


def corpora():
    """Random corpora in which pairs tie, overlap (aaa) and repeat, then a sentence-like one."""
    rng = random.Random(1)
    for letters, longest in [("a", 20), ("ab", 9), ("ab", 30), ("abc", 6), ("aé", 9), ("xyz ", 12)] * 8:
        words = ("".join(rng.choices(letters, k=rng.randint(1, longest))) for _ in range(rng.randint(1, 25)))
        yield " ".join(words).split("\n"), 256 + rng.randint(1, 40)
    yield TEXT.splitlines(), 320


def test_bpe_makes_the_merges_of_the_textbook_and_tiktoken_applies_them_in_the_same_order():
    for texts, vocab_size in corpora():
        tokens, ids = textbook_bpe(texts, vocab_size)
        ranks = train_bpe(texts, vocab_size)
        assert sorted(ranks, key=ranks.get) == tokens and sorted(ranks.values()) == list(range(len(tokens)))
        encoding = encoding_of(ranks)
        assert {word: encoding.encode_ordinary(word) for word in ids} == ids


def test_bpe_worked_example():
    # aaabdaaabac, the example of Wikipedia and minbpe. Pairs: aa 4 times (each aaa holds two), ab 2, the rest once -> 256 = aa.
    # Now aa a b d aa a b a c. (aa, a) and (a, b) occur twice; the smaller ids win: (97, 98) < (256, 97)         -> 257 = ab.
    # Now aa ab d aa ab a c. (aa, ab) occurs twice                                                              -> 258 = aaab.
    # Now aaab d aaab a c, all pairs once: smallest ids are (a, c) = (97, 99)                                   -> 259 = ac.
    # Now aaab d aaab ac: (d, aaab) = (100, 258) comes before (258, 100)                                        -> 260 = daaab.
    ranks = train_bpe(["aaabdaaabac"], 261)
    assert [token for token, rank in sorted(ranks.items(), key=lambda x: x[1])[256:]] == [b"aa", b"ab", b"aaab", b"ac", b"daaab"]
    assert encoding_of(ranks).encode("aaabdaaabac") == [258, 260, 259]


def test_bpe_stops_when_no_pair_is_left(tmp_path):
    assert len(train_bpe(["ab ab ab"], 300)) == 258  # "ab", then " ab"; nothing else can be merged
    assert len(train_bpe(["a b"], 300)) == 257  # words keep the space before them: " b"
    assert len(train_bpe([], 300)) == 256
    write(tmp_path / "in", {"text_only/train/a.train": "ab\n" * 200})
    meta = prepare(tmp_path, "babylm", tmp_path / "in", "--vocab_size", 5000, "--lines_per_document", 1).meta
    assert meta["vocab_size"] == 258  # 256 bytes, "ab" and <eot>


def test_the_tokenizer_of_a_folder_is_trained_on_its_training_data_only(tmp_path):
    files = babylm() | {"text_only/dev/a.dev": "qqqq zzzz\n" * 50, "image_caption_dev/cc_captions.json": ["qqqq zzzz"] * 3,
                        "image_caption_dev/cc_states.npy": rows(1, 2, 3)}
    data = prepare(tmp_path, "babylm", write(tmp_path / "in", files), "--vocab_size", 300)
    tokens, _ = textbook_bpe(NAMES + documents(data, "train"), 299)
    assert data.encoding._mergeable_ranks == {token: i for i, token in enumerate(tokens)} and data.eot == 299


def random_texts(n, seed=1):
    """Strings of everything that UTF-8 can hold, in runs of one kind, as real text has them."""
    rng = random.Random(seed)
    marks = [chr(c) for c in range(0x300, 0x20D0) if unicodedata.combining(chr(c))]
    kinds = ["abcdefghijklmnopqrstuvwxyz", "ABC'sdtm", "0123456789", "٣४๕²½Ⅷ", " ", "\x00",
             " \t\n\r\x0b\x0c\x1c\x85\u00a0\u2028\u3000", "\ufeff\u200d\u202e\ufffd", "_-.,!?‿«»…", marks,
             ["é", "ß", "Ж", "ﬁ", "漢", "字", "ह", "ि", "न", "ก", "한"], ["😀", "👩‍👩‍👧", "🇩🇪", "✈️", "👍🏽"],
             [prepare_data.EOT, "don't", "I'll've", "CHI:"]]
    for _ in range(n):
        text = "".join("".join(rng.choices(rng.choice(kinds), k=rng.randint(1, 5))) for _ in range(rng.randint(0, 12)))
        anything = rng.randrange(0x110000 - 0x800)  # any code point but the surrogates
        yield text + chr(anything if anything < 0xD800 else anything + 0x800)


def test_every_text_survives_encoding_and_decoding(toy):
    trained = encoding_of(train_bpe(random_texts(300), 1000))
    for encoding in trained, Data(toy).encoding:  # the second has never seen most of these characters
        for text in random_texts(2000, seed=2):
            ids = encoding.encode_ordinary(text)
            assert encoding.decode_bytes(ids) == text.encode()
            assert max(ids, default=0) < len(encoding._mergeable_ranks)  # an <|endoftext|> that someone typed makes no <eot>


def test_tokenizer_file_is_tiktokens_own_format(toy, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # else tiktoken keeps a copy of the file by its path
    ranks = tiktoken.load.load_tiktoken_bpe(os.path.join(toy, "tokenizer.tiktoken"))
    meta = json.load(open(os.path.join(toy, "meta.json"), encoding="utf-8"))
    assert ranks == Data(toy).encoding._mergeable_ranks and len(ranks) == meta["vocab_size"] - 1
    assert meta["tokenizer"]["special"] == {prepare_data.EOT: meta["vocab_size"] - 1} == {"<|endoftext|>": Data(toy).eot}


def test_gpt2_ids_are_tiktokens(tmp_path, monkeypatch):
    cache = os.path.join(SHARED, "tiktoken_cache")
    if not os.path.isdir(cache):
        pytest.skip("../shared/data/tiktoken_cache is not there")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", cache)
    said = ["A black dog runs.", "Zwei Hunde über dem Zaun 😀", "it isn't 1234 <|endoftext|>  ok"]
    files = {"image_caption/a_captions.json": said, "image_caption/a_states.npy": rows(1, 2, 3),
             "image_caption_dev/a_captions.json": said, "image_caption_dev/a_states.npy": rows(1, 2, 3)}
    data = prepare(tmp_path, "babylm", write(tmp_path / "in", files), "--tokenizer", "gpt2")
    gpt2 = tiktoken.get_encoding("gpt2")
    assert data.meta["vocab_size"] == 50257 and data.eot == 50256
    assert data.tokens["train"].tolist() == [i for s in said for i in (*gpt2.encode_ordinary(s), 50256)]
    assert data.encoding.encode_ordinary("A black dog") == [32, 2042, 3290]  # "A", " black", " dog" in GPT-2's vocab.json
    assert decoded(data, "train") == said


# ----------------------------------------------------------------------------------------------------------------------
# the toy world

def some_scenes(n, seed=1):
    return random.Random(seed).sample(scenes(), n)


def told_from_the_other_side(scene):
    a, relation, b = scene
    return b, INVERSE[relation], a


def test_the_world_is_large_enough():
    assert len(COLOR) >= 8 and len(SHAPE) >= 4 and len(SIZE) >= 2 and len(RELATION) >= 4
    # (size, color, shape) twice and a relation between them, the colors differ: 2*8*4 objects, 2*7*4 others, 4 relations
    assert len(set(scenes())) == len(scenes()) == len(SIZE) * len(COLOR) * len(SHAPE) * 4 * len(SIZE) * (len(COLOR) - 1) * len(SHAPE)
    assert all(a[1] != b[1] for a, _, b in scenes())
    kind = {**dict.fromkeys(COLOR, "COLOR"), **dict.fromkeys(SHAPE, "SHAPE"), **dict.fromkeys(SIZE, "SIZE"), "left": "SIDE", "right": "SIDE"}
    said = captions((("big", "red", "cross"), "left", ("small", "blue", "circle")))
    assert len({" ".join(kind.get(word, word) for word in re.findall(r"\w+|\S", sentence)) for sentence in said}) >= 5  # sentence forms


def test_the_speaker_is_a_distribution_over_sentences_that_does_not_depend_on_the_side():
    for scene in some_scenes(200):
        said, other = captions(scene), captions(told_from_the_other_side(scene))
        assert min(said.values()) > 0 and math.isclose(sum(said.values()), 1, abs_tol=1e-12)
        assert said == pytest.approx(other, abs=1e-12)


def test_floors_that_can_be_worked_out_by_hand():
    one = ("big", "red", "cross"), "left", ("small", "blue", "circle")
    other = ("big", "white", "square"), "above", ("small", "black", "triangle")
    assert not captions(one).keys() & captions(other).keys()
    with_image, text_only, _ = entropies([one, other], lambda said: [1] * len(said))
    assert math.isclose(text_only - with_image, math.log(2))  # no sentence is true of both, so the picture tells exactly one bit
    with_image, text_only, _ = entropies([one, told_from_the_other_side(one)], lambda said: [1] * len(said))
    assert math.isclose(text_only, with_image)  # the same scene twice: the picture tells nothing


@pytest.mark.parametrize("colors, shapes, sizes, relations", [
    (["red", "orange"], ["circle", "cross"], ["small"], ["left", "above"]),
    (["red", "orange", "blue"], ["circle", "cross"], ["small", "big"], ["left", "right"]),
    (["white", "black"], ["square", "triangle"], ["small", "big"], ["below", "above"])])
def test_floors_equal_the_enumeration_of_a_small_world(colors, shapes, sizes, relations):
    """p(scene, sentence) written out as a table, H(C|S) = H(S,C) - H(S), and bits the picture tells = H(S) + H(C) - H(S,C)."""
    table = {}
    for size, color, shape in itertools.product(sizes, colors, shapes):
        for size2, color2, shape2 in itertools.product(sizes, colors, shapes):
            for relation in relations:
                if color != color2:
                    scene = (size, color, shape), relation, (size2, color2, shape2)
                    for sentence, p in captions(scene).items():
                        table[scene, sentence] = p
    n = len({scene for scene, _ in table})
    scene_p, sentence_p = Counter(), Counter()
    for (scene, sentence), p in table.items():
        scene_p[scene] += p / n
        sentence_p[sentence] += p / n
    entropy = lambda probabilities: -sum(p * math.log(p) for p in probabilities)
    joint, of_scene, of_sentence = entropy(p / n for p in table.values()), entropy(scene_p.values()), entropy(sentence_p.values())
    letters = sum(p * len(sentence) for sentence, p in sentence_p.items())

    world = scenes(colors=colors, shapes=shapes, sizes=sizes, relations=relations)
    with_image, text_only, length = entropies(world, lambda said: list(map(len, said)))
    assert len(world) == n and math.isclose(of_scene, math.log(n))
    assert math.isclose(with_image, joint - of_scene) and math.isclose(text_only, of_sentence) and math.isclose(length, letters)
    assert math.isclose(text_only - with_image, of_scene + of_sentence - joint)


def read_scene(picture):
    """The scene of a picture, from its pixels alone and told from the left or from above; asserts that two whole objects are there."""
    pixel, found = np.asarray(picture).astype(int), []
    for color, rgb in COLOR.items():
        mask = (pixel == rgb).all(axis=2)
        if mask.any():
            y, x = np.nonzero(mask)
            top, bottom, left, right = y.min(), y.max(), x.min(), x.max()
            r, (cy, cx) = (right - left) // 2, ((top + bottom) // 2, (left + right) // 2)
            assert bottom - top == right - left == 2 * r  # whole, no part cut off or covered
            size = next(name for name, half in SIZE.items() if half == r)
            corners, diagonal = (mask[top, left], mask[bottom, left]), mask[cy - r * 6 // 10, cx - r * 6 // 10]
            shape = {(True, True): "square", (False, True): "triangle"}.get(corners, "circle" if diagonal else "cross")
            found.append(((size, color, shape), y.mean(), x.mean(), (top, bottom, left, right)))
    assert len(found) == 2
    painted = sum((pixel == COLOR[o[0][1]]).all(axis=2) for o in found)
    assert (painted | (pixel == pixel[0, 0]).all(axis=2)).all()  # nothing else but background
    (_, y, x, box), (_, y2, x2, box2) = found
    assert box[1] < box2[0] or box2[1] < box[0] or box[3] < box2[2] or box2[3] < box[2], "the objects overlap"
    across = abs(x - x2) > abs(y - y2)
    first, second = sorted(found, key=lambda o: o[2] if across else o[1])
    return first[0], "left" if across else "above", second[0]


def test_a_picture_shows_its_scene_and_nothing_else():
    for i, scene in enumerate(some_scenes(1500)):
        canonical = scene if scene[1] in ("left", "above") else told_from_the_other_side(scene)
        assert read_scene(draw_scene(scene, random.Random(i))) == canonical
        assert draw_scene(scene, random.Random(i)).size == (64, 64)


def test_the_same_scene_told_from_the_other_side_is_the_same_picture():
    for i, scene in enumerate(some_scenes(50)):
        assert draw_scene(scene, random.Random(i)).tobytes() == draw_scene(told_from_the_other_side(scene), random.Random(i)).tobytes()


def test_both_objects_jitter_down_and_across():
    for scene in some_scenes(10):
        for _, color, _ in scene[0], scene[2]:
            pictures = (np.asarray(draw_scene(scene, random.Random(i))) for i in range(40))
            places = [np.argwhere((pixel == COLOR[color]).all(axis=2)).mean(axis=0) for pixel in pictures]
            assert min(len(set(place)) for place in zip(*places)) >= 5


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A toy world whose pictures are stored whole (16 patches), so that a test can read the scene back from the features."""
    return prepare(tmp_path_factory.mktemp("world"), "toy", "--n_image", 1200, "--n_text", 300, "--n_image_token", 16, "--seed", 7)


def test_a_toy_folder_holds_true_captions_of_its_pictures_and_floors_that_sampling_confirms(world):
    marginal, n_scene = Counter(), len(scenes())
    for scene in scenes():
        for sentence, p in captions(scene).items():
            marginal[sentence] += p / n_scene
    surprise, surprise_blind, tokens = [], [], []
    for split in "train", "val":
        for (sentence, image), n in zip(features_of(world, split), np.diff(world.offset[split])):
            said = captions(read_scene(unpatch(image)))
            assert sentence in said
            surprise.append(-math.log(said[sentence]))
            surprise_blind.append(-math.log(marginal[sentence]))
            tokens.append(n)
    meta = world.meta
    length = meta["tokens_per_caption"]
    per_caption = [meta["floor_with_image"] * length, meta["floor_text_only"] * length, length]
    for exact, sample in zip(per_caption, map(np.array, (surprise, surprise_blind, tokens))):
        assert abs(sample.mean() - exact) < 4 * sample.std() / math.sqrt(len(sample))
    told = np.array(surprise_blind) - surprise  # paired: a far smaller standard error than that of the two means
    assert abs(told.mean() / math.log(2) - meta["visual_bits_per_caption"]) < 4 * told.std() / math.log(2) / math.sqrt(len(told))
    assert meta["visual_bits_per_caption"] >= 8
    assert math.isclose((per_caption[1] - per_caption[0]) / math.log(2), meta["visual_bits_per_caption"])


def test_toy_counts_and_word_classes(world):
    count, text = world.meta["count"], documents(world, "train") + documents(world, "val")
    assert (count["caption_train"], count["caption_val"]) == (count["image_train"], count["image_val"]) == (1200, 120)
    assert (count["text_train_documents"], count["text_val_documents"]) == (300, 30) and len(text) == 330
    words = {w for s in text + decoded(world, "train") for w in re.findall(r"[a-z]+", s)}
    assert words <= world.meta["upos"].keys() and {"are", "they", "these"} <= words
    assert set(world.meta["upos"].values()) <= {"ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM", "PRON"}  # UPOS tags
    assert [world.meta["upos"][w] for w in "the big red circle is above".split()] == ["DET", "ADJ", "ADJ", "NOUN", "AUX", "ADP"]


# ----------------------------------------------------------------------------------------------------------------------
# pictures

def noise(side):
    return Image.fromarray(np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8))


@pytest.mark.parametrize("side, n_image_token", [(64, 16), (16, 1)])
def test_patches_keep_every_pixel(side, n_image_token):
    features = patches(noise(side), n_image_token)
    assert features.shape == (n_image_token, 768) and features.min() >= 0 and features.max() <= 1
    for x in features, features.astype(np.float16):  # float16 is what image.npy stores: 11 bits are enough for 256 values
        assert np.array_equal(np.asarray(unpatch(x)), np.asarray(noise(side)))


def test_layout_of_a_patch():
    picture = plain("black")
    picture.putpixel((17, 2), (255, 0, 51))  # column 17, row 2: second patch from the left in the top row, there column 1, row 2
    expected = np.zeros((16, 768))
    expected[1, 3 * (2 * 16 + 1):][:3] = 1, 0, 0.2  # 16 pixels per row, 3 numbers per pixel
    assert np.allclose(patches(picture, 16), expected)
    picture = plain("black")
    picture.putpixel((0, 63), (255, 0, 0))  # bottom left corner: the first patch of the last row of patches, number 12
    assert np.flatnonzero(patches(picture, 16)).tolist() == [12 * 768 + 3 * (15 * 16 + 0)]


def test_thumbnail_averages_and_crops_the_middle():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 200  # every 4x4 block that becomes a pixel holds 8 pixels of 200 and 8 of 0
    assert np.allclose(patches(Image.fromarray(stripes), 1), 100 / 255)
    wide = Image.new("RGB", (128, 64), "red")
    wide.paste(plain("blue"), (32, 0))  # the middle square is blue
    assert np.allclose(patches(wide, 1).reshape(16, 16, 3), (0, 0, 1)) and np.allclose(patches(wide.rotate(90, expand=True), 16)[:, 2::3], 1)


def encoded(picture, format, **options):
    """The bytes of a picture file."""
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def odd_pictures():
    """{file: (content, RGB at the left, RGB at the right)} of pictures that are not plain RGB."""
    sideways = Image.new("RGB", (64, 64), "red")
    sideways.paste(Image.new("RGB", (64, 32), "blue"), (0, 32))  # red above, blue below; orientation 6 = show it turned right by 90 degrees
    exif = Image.Exif()
    exif[0x0112] = 6
    palette = Image.new("P", (64, 64), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 0, 255])
    palette.paste(2, (32, 0, 64, 64))
    alpha = Image.new("RGBA", (64, 64), (255, 0, 0, 255))
    alpha.paste((0, 0, 255, 255), (32, 0, 64, 64))
    grey16 = np.full((64, 64), 0x4000, np.uint16)
    grey16[:, 32:] = 0xC000
    return {"turned.png": (encoded(sideways, "PNG", exif=exif), (0, 0, 255), (255, 0, 0)),
            "cmyk.jpg": (encoded(Image.new("CMYK", (64, 64), (0, 255, 255, 0)), "JPEG", quality=95), (255, 0, 0), (255, 0, 0)),
            "palette.png": (encoded(palette, "PNG", transparency=0), (255, 0, 0), (0, 0, 255)),
            "alpha.png": (encoded(alpha, "PNG"), (255, 0, 0), (0, 0, 255)),
            "grey.png": (encoded(Image.new("L", (64, 64), 100), "PNG"), (100,) * 3, (100,) * 3),
            "one_bit.png": (encoded(Image.new("1", (64, 64), 1), "PNG"), (255,) * 3, (255,) * 3),
            "grey16.png": (encoded(Image.fromarray(grey16), "PNG"), (64,) * 3, (192,) * 3)}


@pytest.mark.parametrize("name", list(odd_pictures()))
def test_every_kind_of_picture_becomes_upright_rgb_or_one_clear_line(tmp_path, name):
    content, left, right = odd_pictures()[name]
    write(tmp_path / "in", {name: content, "b.png": plain("white"), "captions.txt": f"{name}\tthis one\nb.png\tthe other\n"})
    try:
        data = prepare(tmp_path, "photos", tmp_path / "in", "--n_image_token", 16)
    except InputError as error:
        assert name in str(error) and "\n" not in str(error)
        return
    image = dict(features_of(data, "train") + features_of(data, "val"))["this one"]
    pixel = np.asarray(unpatch(image)).astype(int)
    assert np.abs(pixel[:, 2:30] - left).max() <= 4 and np.abs(pixel[:, 34:62] - right).max() <= 4


# ----------------------------------------------------------------------------------------------------------------------
# your own photos

@pytest.mark.parametrize("n_image_token", [1, 16])
def test_photos_keep_their_captions_and_no_photo_is_in_both_splits(tmp_path, n_image_token):
    data = prepare(tmp_path, "photos", write(tmp_path / "in", PHOTOS), "--n_image_token", n_image_token)
    seen = {}
    for split in "train", "val":
        for said, image in features_of(data, split):
            i = int(re.match(r"photo (\d+), caption \d+$", said)[1])
            assert image.shape == (n_image_token, 768) and np.allclose(image.reshape(-1, 3) * 255, (20 * i, 255 - 20 * i, 7), atol=0.1)
            seen.setdefault(split, []).append(said)
    assert sorted(seen["train"] + seen["val"]) == sorted(f"photo {i % 12}, caption {i}" for i in range(24))
    photo = {split: {said.split(",")[0] for said in seen[split]} for split in seen}
    assert not photo["train"] & photo["val"] and len(photo["val"]) == 1  # a tenth of 12 photos
    assert len(data.image) == 12  # stored once, though every photo has two captions
    assert data.meta["count"]["text_train_tokens"] == 0


def test_the_three_formats_of_photo_captions_mean_the_same(tmp_path):
    pairs = [line.split("\t") for line in PHOTOS["captions.txt"].splitlines()]
    flickr = "".join(f"{name}#{i % 5}\t{said}\r\n" for i, (name, said) in enumerate(pairs))
    coco = {"images": [{"id": 100 - i, "file_name": f"{i}.png"} for i in range(12)],
            "annotations": [{"image_id": 100 - int(name[:-4]), "caption": said} for name, said in pairs]}
    folder = write(tmp_path / "in", PHOTOS | {"flickr.txt": b"\xef\xbb\xbf" + flickr.encode(), "coco.json": coco})
    tabbed = prepare(tmp_path, "photos", folder).folder
    for name in "flickr.txt", "coco.json":
        other = prepare(tmp_path, "photos", folder, "--captions_file", f"{folder}/{name}", out=name).folder
        assert same_bytes(tabbed, other, without=["meta.json"])


class StandInDinov2(torch.nn.Module):
    """Answers as DINOv2 does, with known numbers: CLS = mean of the normalised pixels per channel; patch token (i, j) = (16i, j)."""

    def forward_features(self, x):
        assert x.dtype == torch.float32 and x.shape[1:] == (3, 224, 224) and not self.training and not torch.is_grad_enabled()
        i, j = torch.meshgrid(torch.arange(16.), torch.arange(16.), indexing="ij")
        tokens = torch.stack([16 * i, j], dim=-1).reshape(1, 256, 2)
        return {"x_norm_clstoken": x.mean(dim=(2, 3)), "x_norm_patchtokens": tokens.expand(len(x), 256, 2)}


def test_dinov2_gives_the_cls_token_or_a_pooled_grid_of_patches(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.hub, "load", lambda repo, name, **options: asked.append((repo, name)) or StandInDinov2().train())
    folder = write(tmp_path / "in", PHOTOS)
    data = prepare(tmp_path, "photos", folder, "--encoder", "dinov2_vits14")
    assert asked[0] == ("facebookresearch/dinov2", "dinov2_vits14") and data.image.shape == (12, 1, 3) and data.meta["image_dim"] == 3
    for said, image in features_of(data, "train"):
        i = int(re.match(r"photo (\d+)", said)[1])
        rgb = np.array([20 * i, 255 - 20 * i, 7]) / 255
        assert np.allclose(image, (rgb - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225], atol=5e-3)  # mean and std of ImageNet
    assert len(data.meta["pictures"]) == 12
    for row, path in enumerate(data.meta["pictures"]):  # the files behind image.npy, so that pictures can be drawn beside captions
        rgb = np.asarray(Image.open(path).convert("RGB"))[0, 0] / 255
        assert np.allclose(data.image[row, 0], (rgb - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225], atol=5e-3)
    data = prepare(tmp_path, "photos", folder, "--encoder", "dinov2_vitb14", "--n_image_token", 16, out="grid")
    # 16x16 patches pooled to 4x4, row by row: token (I, J) is the mean of rows 4I..4I+3 and columns 4J..4J+3
    grid = [(16 * (4 * I + 1.5), 4 * J + 1.5) for I in range(4) for J in range(4)]
    assert asked[-1][1] == "dinov2_vitb14" and data.image.shape == (12, 16, 2) and np.array_equal(data.image[3], np.float16(grid))


def test_real_photos(tmp_path):
    if not os.path.isdir(os.path.join(SHARED, "photos")):
        pytest.skip("../shared/data/photos is not there")
    lines = [line.split("\t") for line in open(os.path.join(SHARED, "photos", "captions.txt"), encoding="utf-8").read().splitlines()]
    data = prepare(tmp_path, "photos", os.path.join(SHARED, "photos"), "--n_image_token", 16)
    name_of = {said.strip(): name.split("#")[0] for name, said in lines}
    assert len(data.image) == len({name.split("#")[0] for name, _ in lines})
    assert sorted(decoded(data, "train") + decoded(data, "val")) == sorted(said for _, said in lines)
    for said, image in features_of(data, "train")[::100]:
        photo = Image.open(os.path.join(SHARED, "photos", name_of[said.strip()])).convert("RGB")
        assert np.abs(image.mean(axis=0).reshape(-1, 3).mean(axis=0) * 255 - middle(photo)).max() < 2


def middle(photo):
    """Mean RGB of the middle square of a picture."""
    w, h = photo.size
    side, pixel = min(w, h), np.asarray(photo).astype(float)
    return pixel[(h - side) // 2:(h + side) // 2, (w - side) // 2:(w + side) // 2].mean(axis=(0, 1))


# ----------------------------------------------------------------------------------------------------------------------
# BabyLM files

def test_row_i_of_the_parts_one_after_the_other_belongs_to_caption_i(tmp_path):
    dev = {"image_caption_dev/cc_captions.json": ["of dev"], "image_caption_dev/cc_states.npy": rows(77)}
    data = prepare(tmp_path, "babylm", write(tmp_path / "in", babylm() | dev))
    # parts 0 0 1 2 | 2 2 3 4 4 5: photo 2 goes on over the border of the parts; equal neighbours are stored once: 0 1 2 3 4 5
    assert [(said, image[0, 0]) for said, image in features_of(data, "train")] == list(zip(NAMES, [0, 0, 1, 2, 2, 2, 3, 4, 4, 5]))
    assert [(said, image.tolist()) for said, image in features_of(data, "val")] == [("of dev", rows(77).tolist())]
    assert data.image_row["train"].tolist() == [0, 0, 1, 2, 2, 2, 3, 4, 4, 5] and data.image_row["val"].tolist() == [6]
    assert data.image.shape == (7, 1, 6) and data.image[:, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, 77]


def test_several_caption_sets_and_the_choice_of_one(tmp_path):
    files = babylm() | {"image_caption/narr_captions.json": ["n 0", "n 1", "n 2"], "image_caption/narr_states.npy": rows(5, 6, 6)}
    folder = write(tmp_path / "in", files)
    data = prepare(tmp_path, "babylm", folder)
    together = dict(zip(NAMES, [0, 0, 1, 2, 2, 2, 3, 4, 4, 5])) | {"n 0": 5, "n 1": 6, "n 2": 6}
    assert {said: image[0, 0] for split in ("train", "val") for said, image in features_of(data, split)} == together
    data = prepare(tmp_path, "babylm", folder, "--caption_sets", "narr", out="narr")
    assert sorted(decoded(data, "train") + decoded(data, "val")) == ["n 0", "n 1", "n 2"]


def test_ten_parts_are_read_in_the_order_of_their_numbers(tmp_path):
    parts = {f"image_caption/cc_states_{i}of12.npy": rows(i) for i in range(1, 13)}  # 10of12 comes before 1of12 in the alphabet
    data = prepare(tmp_path, "babylm", write(tmp_path / "in", parts | {"image_caption/cc_captions.json": [f"row {i}" for i in range(1, 13)]}))
    assert all(said == f"row {image[0, 0]:.0f}" for said, image in features_of(data, "train") + features_of(data, "val"))


def test_a_set_whose_name_begins_with_the_name_of_another(tmp_path):
    files = {"image_caption/a_captions.json": ["a 1", "a 2"], "image_caption/a_states.npy": rows(1, 2),
             "image_caption/a_long_captions.json": ["b 3"], "image_caption/a_long_states.npy": rows(3)}
    data = prepare(tmp_path, "babylm", write(tmp_path / "in", files))
    assert all(said.endswith(f" {image[0, 0]:.0f}") for said, image in features_of(data, "train") + features_of(data, "val"))


def test_features_with_several_tokens_per_picture(tmp_path):
    grid = np.arange(10 * 4 * 3, dtype=np.float16).reshape(10, 4, 3)
    data = prepare(tmp_path, "babylm", write(tmp_path / "in", babylm(part1=grid[:4], part2=grid[4:])))
    assert data.image.shape == (10, 4, 3) and (data.meta["n_image_token"], data.meta["image_dim"]) == (4, 3)
    assert all(np.array_equal(image, grid[int(said.split()[1])]) for said, image in features_of(data, "train"))


def test_without_a_dev_folder_images_and_documents_are_held_out(tmp_path):
    said = [f"photo {i // 5}, caption {i}" for i in range(1000)]  # five captions per photo, one after the other
    files = babylm(captions=said, part1=rows(*[i // 5 for i in range(500)]), part2=rows(*[i // 5 for i in range(500, 1000)]))
    data = prepare(tmp_path, "babylm", write(tmp_path / "in", files), "--lines_per_document", 1)
    photo = {split: [int(s.split(",")[0].split()[1]) for s in decoded(data, split)] for split in ("train", "val")}
    assert len(set(photo["val"])) == 2 and len(photo["val"]) == 10  # 1% of 200 photos, with all their captions
    assert not set(photo["val"]) & set(photo["train"]) and sorted(photo["train"] + photo["val"]) == [i // 5 for i in range(1000)]
    assert all(image[0, 0] == int(s.split(",")[0].split()[1]) for split in photo for s, image in features_of(data, split))
    train, val = documents(data, "train"), documents(data, "val")
    assert len(val) == 2 and len(train) == 120  # the first of every hundred of 122 lines
    assert sorted(train + val) == sorted(TEXT.splitlines() + ["A word .", "Another word ."])


def test_documents_are_lines_joined_and_end_at_a_blank_line_or_the_end_of_a_file(tmp_path):
    files = {"text_only/train/a.train": b"\xef\xbb\xbfone\r\ntwo\r\nthree\n \n\nfour\nf\xc3\xbcnf",
             "text_only/train/b.train": "six <|endoftext|>\n",
             "text_only/train/notes.md": "not a text of the corpus\n", "text_only/dev/a.dev": "seven\neight\nnine\n"}
    data = prepare(tmp_path, "babylm", write(tmp_path / "in", files), "--lines_per_document", 2)
    assert documents(data, "train") == ["one\ntwo", "three", "four\nfünf", "six <|endoftext|>"]  # no byte order mark, no \r
    assert documents(data, "val") == ["seven\neight", "nine"]
    assert data.meta["count"]["text_train_documents"] == 4 and data.meta["count"]["caption_train"] == 0


def test_words_and_captions_take_a_reproducible_sample_of_the_size_asked_for(tmp_path):
    lines = [f"line {i} has six words ." for i in range(4000)]
    said = [f"caption {i}" for i in range(1000)]
    files = {"text_only/train/a.train": "\n".join(lines[:1000]), "text_only/train/b.train": "\n".join(lines[1000:]),
             "text_only/dev/a.dev": "".join(f"dev {i} has six words .\n" for i in range(800)),
             "image_caption/cc_captions.json": said, "image_caption/cc_states.npy": rows(*range(1000)),
             "image_caption_dev/cc_captions.json": ["x"], "image_caption_dev/cc_states.npy": rows(0)}
    flags = ["babylm", write(tmp_path / "in", files), "--words", 6000, "--captions", 300, "--lines_per_document", 1]
    data = prepare(tmp_path, *flags)
    kept = documents(data, "train")
    # 6000 of 24,000 words: each of the 4000 lines is taken with probability 1/4, so 1000 lines, standard deviation sqrt(4000 * 1/4 * 3/4) = 27
    assert abs(len(kept) - 1000) < 4 * 27 and sorted(kept, key=lines.index) == kept and len(set(kept)) == len(kept)
    assert abs(sum(lines.index(line) >= 1000 for line in kept) - 750) < 4 * 24  # from both files, not the head of the first
    assert len(features_of(data, "train")) == 300 and all(said == f"caption {image[0, 0]:.0f}" for said, image in features_of(data, "train"))
    assert np.diff([int(s.split()[1]) for s in decoded(data, "train")]).max() < 60  # spread over the file
    assert len(data.image) == 301  # pictures that no caption needs are not stored
    val = documents(data, "val")  # a tenth as many words: each of the 800 lines with probability 1/8, so 100 lines, standard deviation 9.4
    assert abs(len(val) - 100) < 4 * 9.4 and len(set(val)) == len(val) and all(line.startswith("dev") for line in val)
    assert decoded(data, "val") == ["x"]  # validation captions are all kept
    assert same_bytes(data.folder, prepare(tmp_path, *flags, out="again").folder)
    other = prepare(tmp_path, *flags, "--seed", 2, out="seed2")
    assert documents(other, "train") != kept and decoded(other, "train") != decoded(data, "train")


def test_real_captions_keep_their_rows(tmp_path):
    if not os.path.isdir(os.path.join(SHARED, "image_caption_dev")):
        pytest.skip("../shared/data is not there")
    os.makedirs(tmp_path / "in")
    os.symlink(os.path.abspath(os.path.join(SHARED, "image_caption_dev")), tmp_path / "in" / "image_caption")  # the small half as training data
    data = prepare(tmp_path, "babylm", tmp_path / "in", "--caption_sets", "flickr8k", "--captions", 500, "--vocab_size", 500)
    said = json.load(open(os.path.join(SHARED, "image_caption_dev", "flickr8k_captions.json"), encoding="utf-8"))
    states = np.load(os.path.join(SHARED, "image_caption_dev", "flickr8k_states.npy"), mmap_mode="r")
    assert len(decoded(data, "train")) == 500
    for caption, image in features_of(data, "train") + features_of(data, "val"):
        assert any(np.array_equal(image, states[i:i + 1].astype(np.float16)) for i in range(len(said)) if said[i] == caption)


# ----------------------------------------------------------------------------------------------------------------------
# every data folder

def command_of(source, tmp_path):
    """A command line per source, small and quick."""
    if source == "toy":
        return ["toy", "--n_image", 40, "--n_text", 20]
    return [source, write(tmp_path / "in", babylm() if source == "babylm" else PHOTOS)]


@pytest.fixture(scope="module", params=["toy", "babylm", "photos"])
def folder(request, tmp_path_factory):
    if request.param == "toy":
        return request.getfixturevalue("toy")
    tmp_path = tmp_path_factory.mktemp(request.param)
    return prepare(tmp_path, *command_of(request.param, tmp_path)).folder


def test_files_types_and_offsets(folder):
    wanted = ["meta.json", "tokenizer.tiktoken", "image.npy"] + [f"{x}_{split}{end}" for split in ("train", "val") for x, end in (
        ("text", ".bin"), ("caption", ".bin"), ("caption", "_offset.npy"), ("caption", "_image.npy"))]
    files = files_of(folder)
    assert [f for f in files if not f.startswith("evaluation_data")] == sorted(wanted)
    meta = json.load(open(os.path.join(folder, "meta.json"), encoding="utf-8"))
    assert any(f.startswith("evaluation_data") for f in files) == (meta["source"] == "toy")
    load = lambda name: np.load(os.path.join(folder, name))
    image, n_image = load("image.npy"), 0
    assert image.dtype == np.float16 and image.shape[1:] == (meta["n_image_token"], meta["image_dim"])
    for split in "train", "val":
        offset, row = load(f"caption_{split}_offset.npy"), load(f"caption_{split}_image.npy")
        tokens = np.fromfile(os.path.join(folder, f"caption_{split}.bin"), "<u2")
        text = np.fromfile(os.path.join(folder, f"text_{split}.bin"), "<u2")
        assert offset.dtype == np.int64 and row.dtype == np.int32 and len(offset) == len(row) + 1 > 1
        assert offset[0] == 0 and offset[-1] == len(tokens) and max(tokens.max(), *text[:9], 0) < meta["vocab_size"]
        eot = meta["tokenizer"]["special"]["<|endoftext|>"]
        assert np.array_equal(np.flatnonzero(tokens == eot) + 1, offset[1:])  # one <eot> per caption, at its end
        count = {name.replace(f"_{split}", ""): n for name, n in meta["count"].items() if split in name}
        assert count == {"caption": len(row), "caption_tokens": len(tokens), "caption_cut": 0, "image": len(set(row)),
                         "text_tokens": len(text), "text_documents": (text == eot).sum()}
        assert set(row) == set(range(n_image, n_image + len(set(row))))  # every stored image is used, by one split
        n_image += len(set(row))
    assert n_image == len(image)


def test_meta_has_the_sha256_of_every_other_file(folder):
    meta = json.load(open(os.path.join(folder, "meta.json"), encoding="utf-8"))
    assert meta["sha256"] == {name: hashlib.sha256(open(os.path.join(folder, name), "rb").read()).hexdigest()
                              for name in files_of(folder) if name != "meta.json"}


@pytest.mark.parametrize("source", ["toy", "babylm", "photos"])
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path, source, monkeypatch):
    monkeypatch.setattr(prepare_data, "entropies", lambda world, length: (1, 2, 3))  # exact, slow, and without any chance
    flags = command_of(source, tmp_path)
    one, same, other = (prepare(tmp_path, *flags, "--seed", seed, out=out).folder for seed, out in ((1, "a"), (1, "b"), (2, "c")))
    assert same_bytes(one, same) and not same_bytes(one, other, without=["meta.json"])


def test_a_caption_longer_than_the_block_is_kept_cut_and_counted(tmp_path):
    files = {"image_caption/a_captions.json": ["abcdefg", "abcdefgh", "é" * 9], "image_caption/a_states.npy": rows(1, 2, 3),
             "image_caption_dev/a_captions.json": ["x"], "image_caption_dev/a_states.npy": rows(4)}
    data = prepare(tmp_path, "babylm", write(tmp_path / "in", files), "--vocab_size", 257, "--max_caption", 8)  # no merges: a token is a byte
    # 7 bytes and <eot> are 8 tokens: whole. 8 bytes lose one. é has two bytes: 3 of them and a half stay
    assert np.split(data.tokens["train"], data.offset["train"][1:-1])[0].tolist() == [*b"abcdefg", 256]
    assert data.tokens["train"].tolist() == [*b"abcdefg", 256, *b"abcdefg", 256, *"éééé".encode()[:7], 256]
    assert data.meta["count"]["caption_train_cut"] == 2 and data.meta["count"]["caption_val_cut"] == 0


def test_overwrite_replaces_the_whole_folder(tmp_path):
    fresh = prepare(tmp_path, *command_of("photos", tmp_path), out="fresh").folder
    prepare(tmp_path, "babylm", write(tmp_path / "other", babylm()))
    os.makedirs(tmp_path / "out.part.old")  # what a run leaves that is killed while it removes the folder it has replaced
    (tmp_path / "out.part.old" / "meta.json").write_text("{}")
    data = prepare(tmp_path, "photos", tmp_path / "in", "--overwrite")
    assert same_bytes(data.folder, fresh) and sorted(os.listdir(tmp_path)) == ["fresh", "in", "other", "out"]


@pytest.mark.parametrize("name, content", [
    ("meta.json", None), ("meta.json", b"{"), ("tokenizer.tiktoken", b"what is this"), ("image.npy", None), ("image.npy", b"\x93NUMPY"),
    ("caption_train.bin", b""), ("caption_val_offset.npy", np.array([0, 5])), ("caption_train_image.npy", np.zeros(3, np.int32)),
    ("caption_train_image.npy", np.full(22, 12)), ("caption_train_image.npy", np.full(22, -1))])
def test_a_damaged_data_folder_is_refused_by_name(tmp_path, name, content):
    out = prepare(tmp_path, *command_of("photos", tmp_path)).folder  # 12 photos, two captions each, one photo is held out: 22 captions
    os.remove(os.path.join(out, name))
    if content is not None:
        write(out, {name: content})
    with pytest.raises(InputError, match=re.escape(out)):
        Data(out)


# ----------------------------------------------------------------------------------------------------------------------
# batches

def test_caption_batch_worked_example(tmp_path):
    files = {"image_caption/a_captions.json": ["ab", "wxyz", "k"], "image_caption/a_states.npy": rows(5, 6, 7, dim=2),
             "image_caption_dev/a_captions.json": ["x"], "image_caption_dev/a_states.npy": rows(8, dim=2)}
    data = prepare(tmp_path, "babylm", write(tmp_path / "in", files), "--vocab_size", 257)  # a token is a byte, <eot> is 256
    a, b, w, x, y, z, E = *b"abwxyz", 256
    idx, targets, image = data.caption_batch("train", np.array([1, 0]), block_size=128)
    assert targets.tolist() == [[w, x, y, z, E], [a, b, E, -1, -1]]  # each caption with its end; -1 = no target
    assert idx.tolist() == [[E, w, x, y, z], [E, a, b, E, E]]  # what the model has read when it predicts the target
    assert image.tolist() == [[[6, 6]], [[5, 5]]] and image.dtype == np.float32
    assert idx.dtype == targets.dtype == np.int64
    assert data.lengths("train", 128).tolist() == [3, 5, 2] and data.lengths("train", 4).tolist() == [3, 4, 2]

    idx, targets, _ = data.caption_batch("train", np.array([1, 0]), block_size=3)  # cut to the block: no room for <eot> in the first
    assert targets.tolist() == [[w, x, y], [a, b, E]] and idx.tolist() == [[E, w, x], [E, a, b]]
    idx, targets, _ = data.caption_batch("train", np.array([0]), block_size=128, multiple=4)  # padded to a multiple of 4
    assert targets.tolist() == [[a, b, E, -1]] and idx.tolist() == [[E, a, b, E]]
    assert data.caption_batch("train", np.array([1]), block_size=6, multiple=4)[0].shape == (1, 6)  # but never beyond the block
    _, _, image = data.caption_batch("train", np.array([1, 0]), 128, image_rows=np.array([3, 2]))  # images of other captions
    assert image[:, 0, 0].tolist() == [8, 7]


# ----------------------------------------------------------------------------------------------------------------------
# toy evaluation items

def evaluation(data):
    """{task: {file without .jsonl: [item]}} and {name: states} of a toy folder."""
    root, items, states = os.path.join(data.folder, "evaluation_data", "full_eval"), {}, {}
    for name in files_of(root):
        if name.endswith(".npy"):
            states[name] = np.load(os.path.join(root, name))
        else:
            with open(os.path.join(root, name), encoding="utf-8") as f:
                items.setdefault(os.path.dirname(name), {})[os.path.basename(name)[:-6]] = [json.loads(line) for line in f]
    return items, states


def agreement_errors(sentence):
    """What English grammar objects to, in the words of the toy world."""
    one, many = "|".join(SHAPE), "|".join(SHAPE.values())
    rules = [r"\ba [aeiou]", r"\ban [^aeiou]", rf"\b(these|two) ({one})\b", rf"\b(this|one|an?) ({many})\b", rf"\b({many}) is\b",
             rf"\bthe ({one}) are\b", rf"\bis the ({many})\b", rf"\bare the ({one})\b", r"\bit are\b", r"\bthey is\b",
             rf"\b({many})\b.*\bit\b", rf"\bthe ({one})\b.*\bthey\b"]
    return [rule for rule in rules if re.search(rule, sentence)]


def test_minimal_pairs(world):
    items, _ = evaluation(world)
    assert items.keys() == {"blimp_filtered", "supplement_filtered", "ewok_filtered", "winoground_filtered", "vqa_filtered"}
    for task in "blimp_filtered", "supplement_filtered":
        assert len(items[task]) >= 3
        for name, pairs in items[task].items():
            assert len(pairs) >= 100 and all(x["UID"] == name for x in pairs)
            for good, bad in ((x["sentence_good"], x["sentence_bad"]) for x in pairs):
                words, words_bad = (re.findall(r"\w+", s.lower()) for s in (good, bad))
                assert good != bad and not agreement_errors(good) and set(words + words_bad) <= world.meta["upos"].keys() | {"a", "b"}
                if "agreement" in name:
                    assert agreement_errors(bad)
                if name == "qa_congruence":  # asked for a color: an answer that is one, and one that is not
                    assert words[:2] == ["what", "color"] and words[-1] in COLOR and words_bad[-1] in SIZE
                    assert len(words) == len(words_bad)
                if name == "turn_taking":  # another color than the one asked about: "no", not "yes"
                    asked, told = (w for w in words if w in COLOR)
                    assert asked != told and good.replace("no,", "yes,") == bad


def test_text_of_the_toy_world_is_grammatical(world):
    for sentence in documents(world, "train") + decoded(world, "train"):
        assert not agreement_errors(sentence), sentence


def placed(sentence):
    """'the red circle is above the blue cross.' -> who is first, counted from the left or from above, and on which axis."""
    first, where, second = re.fullmatch(r"the (\w+ \w+) is (.+) the (\w+ \w+)\.", sentence).groups()
    relation = next(name for name, phrases in RELATION.items() if where in phrases)
    return (first, relation, second) if relation in ("left", "above") else (second, INVERSE[relation], first)


def test_ewok_targets_say_the_same_as_their_own_context(world):
    for x in evaluation(world)[0]["ewok_filtered"]["spatial-relations"]:
        assert x["Domain"] == "spatial-relations" and x["Context1"] != x["Target1"]
        assert placed(x["Context1"]) == placed(x["Target1"]) != placed(x["Context2"]) == placed(x["Target2"])


def test_winoground_captions_are_true_of_one_picture_and_false_of_the_other(world):
    items, states = evaluation(world)
    items, pictures = items["winoground_filtered"]["winoground"], states["winoground_states.npy"]
    assert pictures.shape == (len(items) // 2, 2, 16, 768) and pictures.dtype == np.float16
    assert [(x["image_idx"], x["image_key"]) for x in items] == [(i, f"image_{k}") for i in range(len(pictures)) for k in (0, 1)]
    for x in items:
        true_here = captions(read_scene(unpatch(pictures[x["image_idx"], int(x["image_key"][-1])])))
        assert x["caption_0"] in true_here and x["caption_1"] not in true_here
    for x, y in zip(items[::2], items[1::2]):
        assert (x["caption_0"], x["caption_1"], x["collapsed_tag"]) == (y["caption_1"], y["caption_0"], y["collapsed_tag"])
    assert len({x["collapsed_tag"] for x in items}) >= 2


def test_winoground_captions_are_the_same_words_in_another_order(world):
    for x in evaluation(world)[0]["winoground_filtered"]["winoground"]:
        assert sorted(re.findall(r"\w+", x["caption_0"])) == sorted(re.findall(r"\w+", x["caption_1"])) and x["caption_0"] != x["caption_1"]


def test_vqa_is_answered_by_the_picture_or_by_the_text_as_its_tag_says(world):
    items, states = evaluation(world)
    items, pictures, told = items["vqa_filtered"]["vqa"], states["vqa_states.npy"], Counter()
    assert pictures.shape == (len(items), 16, 768) and [x["idx_in_hf_dataset"] for x in items] == list(range(len(items)))
    for x in items:
        assert len(x["distractors"]) == 7 and {*x["distractors"], x["target_ans"]} == {f"{c}." for c in COLOR}
        true_here = captions(read_scene(unpatch(pictures[x["idx_in_hf_dataset"]])))
        if x["collapsed_tag"] == "image decides":
            assert [answer for answer in (x["target_ans"], *x["distractors"]) if f"{x['question']} {answer}" in true_here] == [x["target_ans"]]
            assert not set(re.findall(r"\w+", x["question"])) & COLOR.keys()
        else:
            assert re.search(rf"\bis {x['target_ans']}", x["question"])
        told[x["collapsed_tag"]] += 1
    assert told == {"image decides": len(items) // 2, "text decides": len(items) // 2}


def test_evaluation_pictures_have_one_vector_each_in_the_thumbnail_world(toy):
    _, states = evaluation(Data(toy))
    n = len(states["vqa_states.npy"])
    assert states["vqa_states.npy"].shape == (n, 1, 768) and states["winoground_states.npy"].shape == (n, 2, 1, 768)


# ----------------------------------------------------------------------------------------------------------------------
# wrong input: one line that says where, and nothing written

def with_value(row, value):
    states = rows(2, 2, 3, 4, 4, 5)
    states[row, 3] = value
    return states


def coco(**changes):
    file = {"images": [{"id": 1, "file_name": "1.png"}], "annotations": [{"image_id": 1, "caption": "one"}]} | changes
    return PHOTOS | {"c.json": {key: value for key, value in file.items() if value is not None}}


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz(array):
    file = io.BytesIO()
    np.savez(file, array)
    return file.getvalue()


def photos(**changes):
    return PHOTOS | {"captions.txt" if name == "captions" else name: value for name, value in changes.items()}


def dev_set(states):
    return {"image_caption_dev/d_captions.json": ["x"], "image_caption_dev/d_states.npy": states}


JPEG = encoded(noise(64), "JPEG")
FROM_COCO = ["--captions_file", "IN/c.json"]
PART1, PART2, CAPTIONS = "cc_dino_v2_states_1of2.npy", "cc_dino_v2_states_2of2.npy", "cc_captions.json"
WRONG = {  # name: (files, flags after the folder, what the line must say)
    "more captions than rows": (babylm(captions=[*NAMES, "x"]), [], [CAPTIONS, PART1, PART2, "11", "10"]),
    "fewer captions than rows": (babylm(captions=NAMES[:9]), [], [CAPTIONS, "9", "10"]),
    "parts of different width": (babylm(part2=rows(2, 2, 3, 4, 4, 5, dim=7)), [], [PART2, "7", "6", PART1]),
    "sets of different width": (babylm() | {"image_caption/d_captions.json": ["x"], "image_caption/d_states.npy": rows(1, dim=7)}, [],
                                ["d_states.npy", "7", "6"]),
    "dev set of another width": (babylm() | dev_set(rows(1, dim=7)), [], ["d_states.npy", "7", "6"]),
    "dev set that numpy would stretch": (babylm() | dev_set(rows(1, dim=1)), [], ["d_states.npy", "1", "6"]),
    "dev captions alone": ({"text_only/train/a.train": "x\n"} | dev_set(rows(1)), [], ["d_captions.json", "none to train on"]),
    "NaN": (babylm(part2=with_value(5, np.nan)), [], [PART2, "row 5", "NaN"]),
    "one picture for all": (babylm(part1=rows(7, 7, 7, 7), part2=rows(7, 7, 7, 7, 7, 7)), [], [CAPTIONS, "one picture only"]),
    "inf": (babylm(part2=with_value(1, np.inf)), [], [PART2, "row 1", "inf"]),
    "minus inf": (babylm(part2=with_value(4, -np.inf)), [], [PART2, "row 4", "inf"]),
    "too large for float16": (babylm(part2=with_value(2, -70000)), [], [PART2, "row 2", "65504"]),
    "truncated .npy": (babylm(part1=npy(rows(0, 0, 1, 2))[:-7]), [], [PART1, ".npy"]),
    "empty .npy": (babylm(part1=b""), [], [PART1, ".npy"]),
    "an .npz named .npy": (babylm(part1=npz(rows(0, 0, 1, 2))), [], [PART1, ".npy"]),
    "too large for float32": (babylm(part2=np.float64(with_value(2, 1)) * 1e300), [], [PART2, "row 0", "65504"]),
    "integers as features": (babylm(part1=np.zeros((4, 6), int)), [], [PART1, "float", "int64"]),
    "one number per caption": (babylm(part1=np.zeros(4, np.float32)), [], [PART1, "shape", "(4,)"]),
    "no states file": (babylm(part1=None, part2=None), [], [CAPTIONS, "states", "npy"]),
    "empty caption": (babylm(captions=[*NAMES[:7], " \n", *NAMES[8:]]), [], [CAPTIONS, "row 7"]),
    "caption that is a number": (babylm(captions=[*NAMES[:9], 5]), [], [CAPTIONS, "row 9", "5"]),
    "caption that is null": (babylm(captions=[None, *NAMES[1:]]), [], [CAPTIONS, "row 0", "None"]),
    "lone surrogate": (babylm(captions=[*NAMES[:3], "half of \ud83d", *NAMES[4:]]), [], [CAPTIONS, "row 3", r"\ud83d", "surrogate"]),
    "captions that are not JSON": (babylm(captions=b'["a", "b"'), [], [CAPTIONS, "JSON"]),
    "captions that are no list": (babylm(captions={"a": "b"}), [], [CAPTIONS, "list", "dict"]),
    "text that is not UTF-8": (babylm(text=b"fine\nalso f\xc3\xaene\nGr\xfc\xdfe\n"), [], ["wiki.train", "line 3", "UTF-8"]),
    "two train folders": (babylm() | {"text_only/train_10M/a.train": "x\n"}, [], ["train", "train_10M"]),
    "unknown caption set": (babylm(), ["--caption_sets", "cc,nar"], ["nar_captions.json"]),
    "nothing to read": ({"readme.txt": "hello"}, [], ["image_caption", "text_only"]),
    "vocabulary too small": (babylm(), ["--vocab_size", 256], ["vocab_size", "257", "256"]),
    "no room for a caption": (babylm(), ["--max_caption", 1], ["max_caption", "2"]),
    "photo that is not there": (photos(captions="1.png\tone\nnone.png\ttwo\n"), [], ["captions.txt", "none.png"]),
    "line without TAB": (photos(captions="1.png\tone\n\n2.png two\n"), [], ["captions.txt", "line 3", "2.png two"]),
    "photo captions not UTF-8": (photos(captions=b"1.png\tone\n2.png\tzw\xf6lf\n"), [], ["captions.txt", "line 2", "UTF-8"]),
    "photo without a caption": (photos(captions="1.png\tone\n\n2.png\t\n"), [], ["captions.txt", "line 3", "caption"]),
    "no captions file": ({"0.png": plain("red")}, [], ["captions.txt"]),
    "one photo cannot be split": (photos(captions="1.png\tone\n"), [], ["captions.txt"]),
    "negative seed": (PHOTOS, ["--seed", -1], ["seed", "-1"]),
    "no photo captions": (photos(captions="\n\n"), [], ["captions.txt", "no captions"]),
    "not a picture": (photos(**{"3.png": b"GIF? no."}), [], ["3.png", "picture"]),
    "truncated picture": (photos(captions="1.png\tone\n4.jpg\tfour\n", **{"4.jpg": JPEG[:len(JPEG) // 2]}), [], ["4.jpg", "picture"]),
    "COCO without captions": (coco(annotations=None), FROM_COCO, ["c.json", "COCO", "annotations"]),
    "COCO with an unknown image": (coco(images=[]), FROM_COCO, ["c.json", "COCO", "1"]),
    "COCO with a number for a name": (coco(images=[{"id": 1, "file_name": 5}]), FROM_COCO, ["c.json", "5"]),
    "COCO that is a list": (photos(**{"c.json": [1]}), FROM_COCO, ["c.json", "COCO"]),
    "pixels in four": (PHOTOS, ["--n_image_token", 4], ["pixels", "1, 16", "4"]),
}


def wrong(name, tmp_path):
    """The command line of a wrong input, and what the message must hold."""
    files, flags, said = WRONG[name]
    folder = write(tmp_path / "in", files)
    return ["photos" if "0.png" in files else "babylm", folder, *(str(flag).replace("IN", folder) for flag in flags)], said


@pytest.mark.filterwarnings("error::RuntimeWarning")  # numpy's, which would be a second line
@pytest.mark.parametrize("name", list(WRONG))
def test_wrong_input_is_refused_in_one_line_and_leaves_no_folder(tmp_path, name):
    argv, said = wrong(name, tmp_path)
    with pytest.raises(InputError) as error:
        prepare_data.main([*argv, "--out", str(tmp_path / "out")])
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in said), message
    assert os.listdir(tmp_path) == ["in"]  # no out, no out.part
    write(tmp_path / "out", {"meta.json": {"source": "toy"}, "mine/notes": "keep me"})
    with pytest.raises(InputError, match=re.escape(message)):
        prepare_data.main([*argv, "--out", str(tmp_path / "out"), "--overwrite"])
    assert sorted(os.listdir(tmp_path)) == ["in", "out"] and files_of(tmp_path / "out") == ["meta.json", "mine/notes"]
    assert (tmp_path / "out" / "mine" / "notes").read_text() == "keep me"


def test_an_existing_folder_is_kept_without_overwrite(tmp_path):
    argv = command_of("photos", tmp_path)
    old = prepare(tmp_path, *argv).folder
    shutil.copytree(old, tmp_path / "copy")
    with pytest.raises(InputError, match=r"out: exists.*--overwrite"):
        prepare(tmp_path, *argv, "--seed", 2)
    os.remove(tmp_path / "in" / "captions.txt")
    with pytest.raises(InputError, match=r"out: exists"):  # before the input, which may be large, is read
        prepare(tmp_path, *argv)
    assert same_bytes(old, tmp_path / "copy") and sorted(os.listdir(tmp_path)) == ["copy", "in", "out"]


def test_overwrite_does_not_remove_a_folder_that_is_no_data_folder(tmp_path):
    argv = command_of("photos", tmp_path)
    with pytest.raises(InputError, match="in: "):  # a slip of the hand: --out names the photos themselves
        prepare_data.main([*argv, "--out", str(tmp_path / "in"), "--overwrite"])
    assert files_of(tmp_path / "in") == sorted(PHOTOS)


def test_overwrite_does_not_remove_a_run(tmp_path):
    """A run folder holds the meta.json of its data, but its weights cannot be made again in a moment."""
    data = prepare(tmp_path, *command_of("photos", tmp_path)).folder
    run = shutil.copytree(data, tmp_path / "run")
    (run / "config.json").write_text("{}")
    with pytest.raises(InputError, match="run: exists"):
        prepare_data.main([*command_of("photos", tmp_path), "--out", str(run), "--overwrite"])
    assert (run / "config.json").exists() and sorted(os.listdir(data)) == sorted(set(os.listdir(run)) - {"config.json"})


def test_a_picture_with_damaged_exif_is_an_input_error(tmp_path):
    """Turning a picture upright writes its EXIF block anew, and trips over a resolution (tag 0x011A) that is bytes and no fraction."""
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "JPEG", exif=exif)
    for name, data in ("whole", picture.getvalue()), ("damaged", picture.getvalue().replace(b"\x01\x1a\x00\x05", b"\x01\x1a\x00\x01")):
        (tmp_path / f"{name}.jpg").write_bytes(data)
    assert prepare_data.open_picture(str(tmp_path / "whole.jpg")).size == (8, 8)
    with pytest.raises(InputError, match="damaged.jpg: not a readable picture"):
        prepare_data.open_picture(str(tmp_path / "damaged.jpg"))


def test_toy_flags_have_least_values(tmp_path):
    for flag in "--n_image", "--n_text", "--lines_per_document":
        with pytest.raises(InputError, match=f"{flag} must be at least 1, not 0"):
            prepare(tmp_path, "toy", flag, 0)
    for source in "babylm", "photos":
        for folder in [], [tmp_path / "nowhere"]:
            with pytest.raises(InputError, match="is not a folder"):
                prepare(tmp_path, source, *folder)
    assert os.listdir(tmp_path) == []


def no_network(*args, **kwargs):
    raise ConnectionError("no network")


def test_without_network_dinov2_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "load", no_network)
    with pytest.raises(InputError, match=r"^dinov2_vits14 could not be downloaded.*--encoder pixels.*$"):
        prepare(tmp_path, *command_of("photos", tmp_path), "--encoder", "dinov2_vits14")
    assert os.listdir(tmp_path) == ["in"]


def test_without_network_gpt2_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(InputError, match=r"^.*GPT-2.*TIKTOKEN_CACHE_DIR.*--tokenizer bpe.*$"):
        prepare(tmp_path, *command_of("babylm", tmp_path), "--tokenizer", "gpt2")
    assert os.listdir(tmp_path) == ["in"]


# ----------------------------------------------------------------------------------------------------------------------
# command line

@pytest.mark.parametrize("name", ["lone surrogate", "text that is not UTF-8", "truncated picture"])
def test_the_command_line_exits_with_2_and_one_line(tmp_path, name):
    argv, said = wrong(name, tmp_path)
    result = cli(*argv, "--out", tmp_path / "out")
    assert result.returncode == 2 and result.stdout == "" and os.listdir(tmp_path) == ["in"]
    assert result.stderr.count("\n") == 1 and all(part in result.stderr for part in ["prepare_data.py", *said])


def test_help_explains_every_flag():
    result = cli("--help")
    assert result.returncode == 0 and "toy" in result.stdout and result.stderr == ""
    flags = re.split(r"\n  (?=-)", result.stdout)[1:]
    assert len(flags) >= 10
    for flag in flags:  # "--seed SEED   what it does"; the text may start on the next line
        assert re.match(r"-\S+(, --\S+)?( [A-Z_]+| \{\S+\})?\s{2,}\w", flag), f"no help text: {flag}"
