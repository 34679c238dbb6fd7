"""
prepare_data.py: what it reads, makes and refuses, on small files that the tests make.
Expected values are worked by hand, or come from a plain reference, written here in another way.
"""
import hashlib
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiktoken.load
import torch
from PIL import Image, JpegImagePlugin

import prepare_data
from gatevlm import InputError
from prepare_data import COLOR, PATTERN, SHAPE, Data, captions, documents, draw_scene, entropies
from prepare_data import open_picture, patches, read_photo_captions, scenes, train_bpe, unpatch

GPT2 = Path(__file__).parents[2] / "shared" / "data" / "tiktoken_cache"

def write(root, files):
    """Write {path: bytes, text, array, picture, or what JSON can hold} below root."""
    for name, value in files.items():
        os.makedirs((path := root / name).parent, exist_ok=True)
        if isinstance(value, (Image.Image, np.ndarray)):
            value.save(path) if isinstance(value, Image.Image) else np.save(path, value)
        else:
            value = value if isinstance(value, (bytes, str)) else json.dumps(value)
            path.write_bytes(value if isinstance(value, bytes) else value.encode())
    return root

def prepare(root, files, *flags, out="out"):
    """The Data made of files; a token is a byte, <eot> is 256, unless flags say otherwise."""
    source = "photos" if "captions.txt" in files else "babylm" if files else "toy"
    argv = [source, write(root / "in", files), "--vocab_size", 257, "--out", root / out, *flags]
    return Data(prepare_data.main([str(x) for x in argv]))

@pytest.fixture
def make(tmp_path):
    return lambda *args, **more: prepare(tmp_path, *args, **more)

def told(data, *splits, see=lambda picture: picture[0, 0]):
    """[(caption, what is seen of its picture)] of splits, or of both."""
    found = []
    for split in splits or ("train", "val"):
        tokens = np.split(data.captions[split], data.offset[split][1:-1])
        said = [data.encoding.decode(ids[:-1].tolist()) for ids in tokens]
        found += zip(said, map(see, data.image[data.image_row[split]]))
    return found

def fits(data):
    return all(float(said) == number for said, number in told(data))

def texts(data):
    both = (data.encoding.decode(data.text[split].tolist()) for split in ("train", "val"))
    return tuple(text.split("<|endoftext|>")[:-1] for text in both)

def rows(*values):
    """Features in which every number of row i is values[i]."""
    return np.repeat(np.float32(values)[:, None], 4, axis=1)

def given(said, states, name="cc", home="image_caption"):
    return {f"{home}/{name}_captions.json": said, f"{home}/{name}_states.npy": states}

def dev(said, *values):
    return given(said, rows(*values), home="image_caption_dev")

def plain(color, mode="RGB", size=(8, 8)):
    return Image.new(mode, size, color)

CAPTIONS = given([f"{i}.0" for i in range(10)], rows(*range(10)))
PHOTOS = {f"{i}.png": plain((20 * i, 99, 7)) for i in range(12)}  # the first number of photo i: 20 i / 255
PHOTOS |= {"captions.txt": "".join(f"{i % 12}.png\t{i % 12} {i}\n" for i in range(24))}

# ---- the toy world
WHERE = dict(left="to the left of", right="to the right of", above="above|over", below="below|under")
INVERSE = dict(left="right", right="left", above="below", below="above")

def turned(scene):
    return scene[2], INVERSE[scene[1]], scene[0]

def is_true(sentence, scene):
    forms = []
    for (size, color, shape), relation, other in scene, turned(scene):
        a, b = (rf"(an?|the) ({s} )?({c} )?{x}" for s, c, x in ((size, color, shape), other))
        w = f"({WHERE[relation]})"
        forms += [f"{a} is {w} {b}", f"there is {a} {w} {b}", f"{w} {b} is {a}", f"{a} and {b}"]
        forms += [f"the {shape} {w} {b} is {color}", rf"what color is the {size} {shape}\? {color}"]
        forms += [rf"what shape is the {color} one\? {shape}", rf"where is {a}\? {w} {b}"]
    return any(re.fullmatch(form + r"\.", sentence) for form in forms)

def read_scene(picture):
    """The scene of a picture from its pixels, told from the left or from above."""
    pixel, found = np.asarray(picture), []
    for color, code in COLOR.items():
        mask = (pixel == list(bytes.fromhex(code[1:]))).all(axis=2)
        if mask.any():
            left, top, right, bottom = Image.fromarray(mask).getbbox()
            r = (right - left) // 2
            corners, near = (mask[top, left], mask[bottom - 1, left]), r * 2 // 5
            round_one = "circle" if mask[top + near, left + near] else "cross"
            shape = {(1, 1): "square", (0, 1): "triangle"}.get(corners, round_one)
            found.append((({6: "small", 11: "big"}[r], color, shape), left + r, top + r))
    (one, x, y), (other, x2, y2) = found
    relation, swap = ("left", x > x2) if abs(x - x2) > abs(y - y2) else ("above", y > y2)
    return (other, relation, one) if swap else (one, relation, other)

def test_the_world_holds_every_scene_once():
    # 2 sizes, 8 colors, 4 shapes: 64 objects; 4 relations; the other has one of 7 other colors
    assert len(set(scenes())) == len(scenes()) == 64 * 4 * (2 * 7 * 4)

def test_the_speaker_is_a_distribution_over_true_sentences():
    for scene in scenes()[::150]:
        said = captions(scene)
        assert math.isclose(sum(said.values()), 1) and all(is_true(sentence, scene) for sentence in said)

@pytest.mark.parametrize("tell", [captions, lambda scene: draw_scene(scene, random.Random(3)).tobytes()])
def test_a_scene_told_from_its_other_side_is_the_same(tell):
    assert all(tell(scene) == pytest.approx(tell(turned(scene))) for scene in scenes()[::300])

def test_a_picture_shows_its_scene():
    for i, scene in enumerate(s for s in scenes()[::30] if s[1] in ("left", "above")):
        assert read_scene(draw_scene(scene, random.Random(i))) == scene

def test_floors_equal_an_enumeration():
    world = [s for s in scenes() if {s[0][1], s[2][1]} == {"red", "orange"} and s[1] != "below"]
    table = [(said, p / len(world)) for scene in world for said, p in captions(scene).items()]
    marginal = Counter()
    for said, p in table:
        marginal[said] += p
    entropy = lambda ps: -sum(p * math.log(p) for p in ps)
    with_scene = entropy(p for _, p in table) - math.log(len(world))  # H(C|S) = H(S,C) - H(S)
    letters = sum(p * len(said) for said, p in table)
    assert entropies(world, len) == pytest.approx((with_scene, entropy(marginal.values()), letters))

def seen(folder):
    return told(Data(folder), see=lambda picture: read_scene(unpatch(picture)))

def test_captions_are_true_of_their_pictures(toy16):
    assert len(seen(toy16)) == 110 and all(is_true(said, scene) for said, scene in seen(toy16))

def test_floors_are_what_a_sample_gives(toy16):
    marginal, data, sample = Counter(), Data(toy16), seen(toy16)
    for scene in scenes():
        marginal.update(captions(scene))
    tokens = np.array([len(data.encoding.encode(said)) + 1 for said, _ in sample])
    for name, p in (("floor_with_image", [captions(scene)[said] for said, scene in sample]),
                    ("floor_text_only", [marginal[said] / len(scenes()) for said, _ in sample])):
        error = -np.log(p) - data.meta[name] * tokens  # a ratio of two sums
        assert abs(error.mean()) < 3 * error.std() / math.sqrt(len(error)), name

def items(folder, task):
    home, found = Path(folder, "evaluation_data", "full_eval"), []
    for path in (home / f"{task}_filtered").iterdir():
        found += [json.loads(line) | {"file": path.stem} for line in path.read_text().splitlines()]
    states = home / f"{task}_states.npy"
    return found, np.load(states) if states.exists() else None

@pytest.mark.parametrize("task, names", [  # sentence_zero_shot/read_files.py of BabyLM 2025
    ("blimp", "sentence_good sentence_bad field UID linguistics_term"),
    ("ewok", "Context1 Context2 Target1 Target2 Domain ContextType ContextDiff TargetDiff"),
    ("winoground", "caption_0 caption_1 image_idx image_key collapsed_tag tag secondary_tag"),
    ("vqa", "question target_ans distractors idx_in_hf_dataset")])
def test_items_have_the_official_fields(toy, task, names):
    assert all(set(names.split()) <= x.keys() for x in items(toy, task)[0])

def test_one_sentence_of_a_pair_is_right(toy):
    one, many, color = ("|".join(words) for words in (SHAPE, SHAPE.values(), COLOR))
    answer = rf"what color (is the ({one})\? it is|are the ({many})\? they are) ({color})\."
    rules = {"subject_verb_agreement": rf"the (({one}) is|({many}) are) ({color})\.",
             "determiner_noun_agreement": rf"these ({many}) are ({color})\.",
             "article_agreement": rf"there is (an [aeiou]|a [^aeiou])\w+ ({one})\.",
             "qa_agreement": answer, "qa_congruence": answer,
             "turn_taking": rf"A: (is the ({one})|are the ({many})) ({color})\?\n"
                            rf"B: no, (it is|they are) (?!\4)({color})\."}  # another color than A's
    for x in items(toy, "blimp")[0] + items(toy, "supplement")[0]:
        good, bad = (re.fullmatch(rules[x["UID"]], x[f"sentence_{y}"]) for y in ("good", "bad"))
        assert good and not bad and x["UID"] == x["file"]

def test_ewok_targets_say_what_their_own_context_says(toy):
    flip = {WHERE[r].split("|")[0]: WHERE[INVERSE[r]].split("|")[0] for r in WHERE}
    for x in items(toy, "ewok")[0]:
        a, there, b = re.fullmatch(r"(the \w+ \w+) is (.+) (the \w+ \w+)\.", x["Context1"]).groups()
        said = f"{a} is {flip[there]} {b}.", f"{b} is {flip[there]} {a}.", f"{b} is {there} {a}."
        assert (x["Context2"], x["Target1"], x["Target2"]) == said

def test_winoground_is_true_of_one_picture_each(toy16):
    found, pictures = items(toy16, "winoground")
    assert len(found) == 400 and pictures.shape == (200, 2, 16, 768)
    for x in found:
        scene = read_scene(unpatch(pictures[x["image_idx"], int(x["image_key"][-1])]))
        assert is_true(x["caption_0"], scene) and not is_true(x["caption_1"], scene)
        assert sorted(x["caption_0"][:-1].split()) == sorted(x["caption_1"][:-1].split())

def test_vqa_is_answered_by_picture_or_text_as_its_tag_says(toy16):
    found, pictures = items(toy16, "vqa")
    assert len(found) == 200 and pictures.shape == (200, 16, 768)
    for x in found:
        answers, question = [x["target_ans"], *x["distractors"]], x["question"]
        scene = read_scene(unpatch(pictures[x["idx_in_hf_dataset"]]))
        decides = {"image decides": [is_true(f"{question} {answer}", scene) for answer in answers],
                   "text decides": [f"is {answer}" in question for answer in answers]}
        assert decides[x["collapsed_tag"]] == [True] + [False] * 7
        assert sorted(answers) == sorted(f"{color}." for color in COLOR)

# ---- tokenizer
def textbook_bpe(text, vocab_size):
    """Count all pairs, merge the most frequent one everywhere, count again. Returns tokens, and
    words in which character i is token i."""
    words = [word.encode().decode("latin-1") for word in re.findall(PATTERN, text)]
    tokens = [bytes([i]) for i in range(256)]
    while len(tokens) < vocab_size:
        pairs = Counter(a + b for word in words for a, b in zip(word, word[1:]))
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        words = [word.replace(best, chr(len(tokens))) for word in words]
        tokens.append(tokens[ord(best[0])] + tokens[ord(best[1])])
    return tokens, words

def test_bpe_worked_example():
    # aaabdaaabac: aa stands 4 times (each aaa holds two), ab 2, the rest once -> 256 = aa
    # aa a b d aa a b a c: (aa, a) and (a, b) twice; smallest ids: (97, 98) < (256, 97) -> 257 = ab
    assert list(train_bpe(["aaabdaaabac"], 258).items())[256:] == [(b"aa", 256), (b"ab", 257)]

def test_bpe_is_the_textbooks_and_tiktoken_applies_it():
    rng = random.Random(1)
    for letters, longest in [("a", 20), ("ab", 30), ("abc", 6), ("aé", 9), ("xyz ", 12)] * 6:
        text = " ".join("".join(rng.choices(letters, k=rng.randint(1, longest))) for _ in range(12))
        tokens, words = textbook_bpe(text, vocab_size := 256 + rng.randint(1, 40))
        ranks = train_bpe([text], vocab_size)
        assert ranks == {token: i for i, token in enumerate(tokens)}
        found = tiktoken.Encoding("", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
        assert found.encode(text) == list(map(ord, "".join(words)))

def test_bpe_stops_when_no_pair_is_left_in_a_word():
    assert list(train_bpe(["ab ab a1 b_"], 300))[256:] == [b" a", b" b", b"ab", b" ab"]

def test_any_text_survives_encoding(toy):
    rng, tokenizer = random.Random(2), Data(toy).encoding
    kinds = [*" \x00\t\n\r\x85\u00a0'_.é漢ि😀٣²", "aC's", "10", "👩‍👩‍👧", "I'll've", "<|endoftext|>"]
    for _ in range(1000):
        text = "".join(rng.choice(kinds) * rng.randint(1, 4) for _ in range(8))
        ids = tokenizer.encode_ordinary(text)
        assert tokenizer.decode_bytes(ids) == text.encode() and tokenizer.eot_token not in ids

def test_tiktoken_reads_the_tokenizer_file(toy, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # else tiktoken keeps a copy of the file
    ranks = tiktoken.load.load_tiktoken_bpe(os.path.join(toy, "tokenizer.tiktoken"))
    assert ranks == Data(toy).encoding._mergeable_ranks
    assert Data(toy).meta["tokenizer"]["special"] == {"<|endoftext|>": len(ranks)}  # the last id

def test_the_tokenizer_is_trained_on_all_training_data_only(make):
    files = given(["see"], rows(1)) | dev(["qq"], 2) | {"train/a.txt": "saw", "dev/a.txt": "zz"}
    ranks = make(files, "--vocab_size", 300).encoding._mergeable_ranks
    assert list(ranks)[256:] == [b"aw", b"ee", b"saw", b"see"]  # all pairs once: smallest ids first

@pytest.mark.skipif(not GPT2.exists(), reason="no ../shared/data")
def test_gpt2_ids_are_tiktokens(make, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(GPT2))
    said = "A black dog isn't 123 über 😀"
    data = make(given([said], rows(1)) | dev(["x"], 2), "--tokenizer", "gpt2")
    assert data.captions["train"].tolist() == [*tiktoken.get_encoding("gpt2").encode(said), 50256]

# ---- images
@pytest.mark.parametrize("side, k", [(64, 16), (16, 1)])
def test_patches_keep_every_pixel_in_float16(side, k):
    pixels = np.random.default_rng(1).integers(0, 256, (side, side, 3), np.uint8)
    features = patches(Image.fromarray(pixels), k).astype(np.float16)
    assert features.shape == (k, 768) and np.array_equal(unpatch(features), pixels)

def test_a_thumbnail_averages_the_middle_square():
    picture = plain("black", size=(128, 64))
    picture.paste("white", (0, 0, 34, 64))  # the square begins at 32; 4x4 pixels become one
    found = patches(picture, 1).reshape(16, 16, 3)
    assert found[:, 0] == pytest.approx(np.full((16, 3), 0.5), abs=0.003) and not found[:, 1:].any()

@pytest.mark.parametrize("end, mode, clear", [
    ("png", "RGBA", None), ("png", "LA", None), ("tif", "PA", None), ("webp", "RGBA", None), ("png", "L", 0),
    ("png", "P", 0), ("gif", "P", 0), ("png", "1", 0), ("png", "RGB", (0, 0, 0))])
def test_a_transparent_picture_is_white(tmp_path, end, mode, clear):
    plain(0, mode).save(tmp_path / f"a.{end}", transparency=clear)  # black under its transparency
    assert open_picture(str(tmp_path / f"a.{end}")).getcolors() == [(64, (255, 255, 255))]

RED, BLUE, FLIP = (255, 0, 0), (0, 0, 255), {"exif": Image.Exif()}
FLIP["exif"][0x0112] = 3  # lies upside down: the first pixel is to be shown last
PAIR = Image.fromarray(np.uint8([[RED, BLUE]]))
GREY = Image.fromarray(np.uint16([[0x40FF, 0xC000]]))  # 16 bits: 64 and 192 of 255

@pytest.mark.parametrize("end, picture, options, first, last", [
    ("png", PAIR, FLIP, BLUE, RED), ("jpg", plain((0, 255, 255, 0), "CMYK"), {}, RED, RED),
    ("png", GREY, {}, (64,) * 3, (192,) * 3), ("png", GREY, FLIP, (192,) * 3, (64,) * 3),
    ("png", plain((0, 0, 255, 51), "RGBA"), {}, (204, 204, 255), (204, 204, 255))])  # a fifth of blue
def test_a_picture_is_what_a_viewer_shows(tmp_path, end, picture, options, first, last):
    picture.save(tmp_path / f"a.{end}", **options)
    found = np.asarray(open_picture(str(tmp_path / f"a.{end}")))
    assert (tuple(found[0, 0]), tuple(found[-1, -1])) == (first, last)

def test_a_large_picture_is_reduced_and_a_jpeg_drafted(tmp_path, monkeypatch):
    decoded, load = [], JpegImagePlugin.JpegImageFile.load
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", lambda x: decoded.append(x.size) or load(x))
    for name, size, side in ("a.png", 2000, 500), ("b.png", 999, 999), ("a.jpg", 2000, 500):
        plain("red", size=(size, size)).save(tmp_path / name)
        assert open_picture(str(tmp_path / name)).size == (side, side)
    assert set(decoded) == {(500, 500)}

def test_dinov2_gives_cls_or_a_pooled_grid():
    class Model:  # CLS = mean of the pixels per channel; patch token i = i
        def forward_features(self, x):
            grid = torch.arange(256.0)[None, :, None].expand(2, 256, 1)
            return {"x_norm_clstoken": x.mean(dim=(2, 3)), "x_norm_patchtokens": grid}

    features = lambda k: prepare_data.dinov2_features(Model(), [plain((255, 0, 51))] * 2, k)
    cls = (np.array([1, 0, 0.2]) - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]  # of ImageNet
    assert features(1) == pytest.approx(np.array([[cls], [cls]]), abs=1e-4)
    # the mean of 16 i + j over 4 rows i and 4 columns j
    grid = [[16 * (4 * i + 1.5) + 4 * j + 1.5] for i in range(4) for j in range(4)]
    assert features(16).tolist() == [grid, grid]

# ---- text
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_in_any_way_after_any_mark(tmp_path, end):
    write(tmp_path, {"a": "\ufeff" + end.join(["one", "zwölf", "", "three"])})
    assert list(documents([tmp_path / "a"])) == ["one\nzwölf", "three"]

def test_where_documents_end(tmp_path):
    eight = "0\n1\n2\n3\n4\n5\n6\n7"
    write(tmp_path, {"a": f"{eight}\n8\n9\n \n\nlast", "b": "of b\n"})
    assert list(documents([tmp_path / "a", tmp_path / "b"])) == [eight, "8\n9", "last", "of b"]

def test_a_huge_line_gives_text_to_both_splits(make):
    words = [f"word{i}" for i in range(25_000)]  # 238,889 characters
    (first, *others), (held,) = texts(make(CAPTIONS | {"train/a.txt": " ".join(words)}))
    in_order = [first, held, *others]  # the second document is held out
    assert " ".join(in_order).split() == words and max(map(len, in_order)) < 50_100

@pytest.mark.parametrize("files", [CAPTIONS, {}, given(["x"], rows(1)) | dev(["x"], 1)])
@pytest.mark.parametrize("n", [1, 250])
def test_the_second_of_100_documents_is_held_out(make, files, n):
    train, val = texts(make(files | {"train/a.train": "\n\n".join(map(str, range(n)))}))
    assert val == ["1", "101", "201"] * (n > 1) and train == [str(i) for i in range(n) if i % 100 != 1]

@pytest.mark.parametrize("train, val", [
    ("text_only/train/more/d.txt", "text_only/dev/a.dev"), ("train/b.TXT", "val/deep/b.TXT"),
    ("text_only/train_50M/train_50M/x.train", "dev_set/d.train"), ("a.train", "c.dev")])
def test_text_is_found_where_people_have_it(make, train, val):
    assert texts(make(CAPTIONS | {train: "yes", val: "no"})) == (["yes"], ["no"])

def test_words_takes_a_sample_of_about_that_size(make):
    text = "\n\n".join(f"{i} has four words" for i in range(3200))
    files = CAPTIONS | {"train/a.txt": text, "dev/a.txt": text}
    one, same, other = (texts(make(files, "--words", 3200, "--seed", i // 2, out=f"{i}")) for i in range(3))
    # 3200 of 12,800 words: each document with probability 1/4; 98 = 4 sqrt(3200 * 1/4 * 3/4), 4 sd
    assert abs(len(one[0]) - 800) < 98 and abs(len(one[1]) - 80) < 36  # to hold out: a tenth as many
    assert one == same and one[0] != other[0]

# ---- given features
@pytest.mark.parametrize("shape", [(1, 4), (2, 2)])
def test_row_i_of_all_parts_belongs_to_caption_i(make, shape):
    part = lambda *values: rows(*values).reshape(-1, *shape)
    files = {f"image_caption/cc_states_{i}of12.npy": part(i, i + 0.5) for i in range(1, 13)}  # 10of12 < 2of12
    files |= {"image_caption/cc_captions.json": [str(i / 2) for i in range(2, 26)]}
    data = make(files | given(["99.0"], part(99), "cc_long"))  # a name that begins with another's
    assert fits(data) and len(told(data)) == 25 and data.image.shape == (25, *shape)

def test_equal_rows_are_one_picture_of_one_split(make):
    pictures = list(range(150)) * 5  # all first captions, then all second ones, ...
    data = make(given([f"{i}.0" for i in pictures], rows(*pictures)))
    assert fits(data) and sorted(data.image[:, 0, 0]) == list(range(150))
    held = told(data, "val")
    assert len(held) == 10 and len(set(held)) == 2 and not set(held) & set(told(data, "train"))  # 1% of 150

def test_caption_sets_chooses_by_name(make):
    files = CAPTIONS | given(["m", "n"], rows(5, 6), "Narr") | given(["o"], rows(7), "other")
    assert sorted(told(make(files, "--caption_sets", "narr,other"))) == [("m", 5), ("n", 6), ("o", 7)]

def test_captions_takes_a_sample_and_only_its_pictures(make):
    one, other = (make(CAPTIONS | dev(["50"], 50), "--captions", 4, "--seed", s, out=f"{s}") for s in (1, 2))
    assert fits(one) and len(set(told(one, "train"))) == 4 and len(one.image) == 5
    assert told(one) != told(other)

# ---- photos
def karpathy(*images):
    return {"images": [dict(filename=f, split=s, sentences=[{"raw": c}]) for f, s, c in images]}

@pytest.mark.parametrize("content", [
    "a\t one, two \nb\tit's b\n", "a#0\tone, two\r\n\r\nb#1\tit's b",
    'image,caption\na,"one, two"\nb, it\'s b\n', "Caption\tid\tFile_Name\none, two\t1\ta\nit's b\t3\tb\n",
    "image_name| comment_number| comment\na| 0| one, two\nb| 0| it's b",
    json.dumps({"images": [{"id": 5, "file_name": "a"}, {"id": 3, "file_name": "b"}], "annotations": [
        {"image_id": 5, "caption": "one, two\n"}, {"image_id": 3, "caption": "it's b"}]}),
    json.dumps(karpathy(("a", "val", " one, two"), ("b", "restval", "it's b")))])
def test_formats_are_told_by_content(tmp_path, content):
    found = read_photo_captions(write(tmp_path, {"x.JSON": "\ufeff" + content}) / "x.JSON")
    assert [row[:2] for row in found] == [("a", "one, two"), ("b", "it's b")]

def test_a_tenth_of_the_photos_is_held_out(make):
    data = make(PHOTOS, "--n_image_token", 16)
    assert sorted(said for said, _ in told(data)) == sorted(f"{i % 12} {i}" for i in range(24))
    assert all(said.startswith(f"{first * 255 / 20:.0f} ") for said, first in told(data))
    (_, one), (_, two) = told(data, "val")  # both captions of one photo
    assert one == two not in dict(told(data, "train")).values() and data.image.shape == (12, 16, 768)

def test_meta_lists_photos_as_image_npy_does(make):
    data = make(PHOTOS)
    shown = [Image.open(path).getpixel((0, 0))[0] / 255 for path in data.meta["pictures"]]
    assert shown == pytest.approx(data.image[:, 0, 0].tolist(), abs=1e-3)

def photos(lines):
    return PHOTOS | {"captions.txt": lines}

BAD = photos("0.png\ta\nno.png\tb\ntext.png\tc\nno.png\td\n1.png\te\n") | {"text.png": b"GIF?"}
SPLITS = photos(karpathy(("0.png", "train", "a"), ("1.png", "val", "b"), ("2.png", "restval", "c"), (
    "3.png", "test", "d"), ("copy.png", "train", "e"))) | {"copy.png": PHOTOS["1.png"]}

@pytest.mark.parametrize("files, kept, words", [
    (given([*"abc"], rows(1, 2, 1)) | dev(["x"], 1), "b x", "2 training captions of held-out pictures: a, c"),
    (CAPTIONS | {"b.md": "", "c/d.txt": ""}, ".*", "2 other files: b.md, c/d.txt"),
    (SPLITS, "a c b", "1 captions of the test split: 3.png"),
    (SPLITS, "a c b", "1 training captions of held-out pictures: e"),
    (BAD, "a e|e a", "2 pictures that cannot be read: "),  # one of the two is held out
    (photos("0.png\ta\n1.png\t \n2.png\tb"), "a b|b a", "1 blank captions in ")])
def test_what_is_left_out_is_counted_and_named(make, capsys, files, kept, words):
    data = make(files, "--skip")
    assert re.fullmatch(kept, " ".join(said for said, _ in told(data)))
    assert f"left out: {words}" in capsys.readouterr().out

# ---- the writer and Data
HAND = given(["ab", "wxyz", "k"], rows(5, 6, 5)) | dev(["x"], 8)
HAND |= {"train/a.txt": "de\n\nf", "dev/a.txt": "g"}
a, b, w, x, y, z, k, d, e, f, g, E = *b"abwxyzkdefg", 256  # a token is a byte, E is <eot>

@pytest.fixture(scope="module")
def hand(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("hand"), HAND, "--encoder", "dinov2_vitb14")

@pytest.mark.parametrize("name, kind, values", [
    ("text_train.bin", "<u2", [d, e, E, f, E]), ("text_val.bin", "<u2", [g, E]),
    ("caption_train.bin", "<u2", [a, b, E, w, x, y, z, E, k, E]), ("caption_val.bin", "<u2", [x, E]),
    ("caption_train_offset.npy", "<i8", [0, 3, 8, 10]), ("caption_val_offset.npy", "<i8", [0, 2]),
    ("caption_train_image.npy", "<i4", [0, 1, 0]), ("caption_val_image.npy", "<i4", [2]),
    ("image.npy", "<f2", [[[i] * 4] for i in (5, 6, 8)])])
def test_files_by_hand(hand, name, kind, values):
    path = Path(hand.folder, name)
    found = np.load(path) if path.suffix == ".npy" else np.fromfile(path, kind)
    assert (found.dtype, found.tolist()) == (kind, values)
    assert hand.meta["sha256"][name] == hashlib.sha256(path.read_bytes()).hexdigest()

def test_meta_names_the_encoder_that_was_declared(hand):
    assert hand.meta["encoder"] == "dinov2_vitb14"

def test_a_caption_of_129_tokens_is_cut_and_counted(make):
    data = make(given(["a" * 127, "b" * 128], rows(1, 2)) | dev(["x"], 3))  # with <eot> 128 and 129
    assert told(data, "train") == [("a" * 127, 1), ("b" * 127, 2)]
    assert data.meta["count"]["caption_train_cut"] == 1

@pytest.mark.parametrize("files", [CAPTIONS, PHOTOS, {}])
def test_a_seed_decides_every_byte(make, files):
    size = [] if files else ["--n_image", 30, "--n_text", 30]
    one, same, other = (make(files, *size, "--seed", i // 2, out=f"{i}").meta["sha256"] for i in range(3))
    assert one == same and one["caption_val.bin"] != other["caption_val.bin"]

@pytest.mark.parametrize("name", ["out", "out.part"])
def test_what_exists_is_never_overwritten(make, tmp_path, name):
    write(tmp_path, {f"{name}/mine": "keep"})
    with pytest.raises(InputError, match=f"{name} exists: remove it"):
        make(CAPTIONS)
    assert (tmp_path / name / "mine").read_text() == "keep"

@pytest.mark.parametrize("damage", [
    None, lambda raw: raw[:-1], lambda raw: raw[:1] + bytes([raw[1] ^ 128]) + raw[2:],
    lambda raw: raw.replace(b"image_dim", b"image_din")])
def test_a_damaged_data_folder_is_refused_by_name(hand, tmp_path, damage):
    for name in os.listdir(hand.folder):
        path = shutil.copytree(hand.folder, tmp_path / name) / name
        raw = path.read_bytes()
        path.write_bytes(damage(raw)) if damage else path.unlink()
        if damage is None or damage(raw) != raw:
            with pytest.raises(InputError, match=re.escape(str(path))):
                Data(str(path.parent))

def test_a_picture_with_nan_is_named_when_it_is_read(hand, tmp_path):
    folder = shutil.copytree(hand.folder, tmp_path / "copy")
    np.save(folder / "image.npy", np.float16([[[5] * 4], [[6, 6, np.nan, 6]], [[8] * 4]]))
    with pytest.raises(InputError, match="image.npy, row 1: NaN"):
        Data(str(folder)).images(np.array([2, 1]))

@pytest.mark.parametrize("kind, starts, idx, targets", [  # each caption is read after an <eot>
    ("C", [1, 0], [[E, w, x, y], [E, a, b, 0]], [[w, x, y, z], [a, b, E, -1]]),
    ("C", [2], [[E, k]], [[k, E]]),
    ("T", [0, 2], [[d, e, E, f], [E, f, 0, 0]], [[e, E, f, E], [f, E, -1, -1]])])
def test_batch_worked_example(hand, kind, starts, idx, targets):
    found, found_targets, place = hand.batch(kind, "train", np.array(starts), 4)
    assert found_targets.tolist() == targets and found.dtype == found_targets.dtype == np.int64
    is_target, stream = found_targets >= 0, hand.captions if kind == "C" else hand.text
    assert np.where(is_target, found, 0).tolist() == idx
    assert (stream["train"][place] == found_targets)[is_target].all()

# ---- what others call their files
def test_pictures_of_coco_have_a_folder_each(make):
    images = karpathy(("0.png", "train", "a"), ("1.png", "val", "b"))
    for image, folder in zip(images["images"], ("train2014", "val2014")):
        image["filepath"] = folder
    files = {"train2014/0.png": PHOTOS["0.png"], "val2014/1.png": PHOTOS["1.png"], "captions.txt": images}
    data = make(files)
    assert data.image[data.image_row["val"]][0, 0, 0] == np.float16(20 / 255)

def test_a_linked_folder_is_read(make, tmp_path):
    write(tmp_path, {f"elsewhere/{name.split('/')[1]}": x for name, x in CAPTIONS.items()})
    os.makedirs(tmp_path / "in")
    os.symlink(tmp_path / "elsewhere", tmp_path / "in" / "image_caption")
    assert make({"train/a.txt": "hello"}).meta["count"]["caption_train"] == 9

@pytest.mark.parametrize("path, split", [
    ("training_data/dev/bnc.dev", "val"), ("devices/bnc.train", "train"), ("train_10M/deep/x.TXT", "train"),
    ("data/validation/x.txt", "val"), ("train/dev/x.txt", "val")])
def test_the_innermost_folder_says_what_text_is_for(tmp_path, path, split):
    write(tmp_path, {path: "x"})
    assert list(prepare_data.find_files(tmp_path)) == [("text", split)]

# ---- wrong input
@pytest.mark.parametrize("words, files, flags", [
    ("text/train and in text/train_10m", {"text/train/a.train": "x", "text/train_10M/b.train": "y"}, []),
    ("text to hold out", {"dev/a.dev": "x"} | CAPTIONS, []),
    ("nothing to train on", {"readme": "hello"}, []),
    ("a.txt, line 3: expected text in UTF-8", {"train/a.txt": b"fine\nf\xc3\xaene\nGr\xfc\xdfe"}, []),
    *[("cc_states.npy, row 1: NaN, inf or beyond 65504", given(["a", "b"], rows(1, x)), [])
      for x in (np.nan, -np.inf, 7e4)],
    ("11 captions so far, 10 rows", given(["a"] * 11, rows(*range(10))), []),
    ("cc_captions.json, row 1: expected text", given(["a", " \n"], rows(1, 2)), []),
    (r"cc_captions.json, row 1: .*\\ud83d", given(["a", "\ud83d"], rows(1, 2)), []),
    ("cc_captions.json: expected ..._states", {"image_caption/cc_captions.json": ["a"]}, []),
    ("there is no x_captions.json", CAPTIONS, ["--caption_sets", "cc,x"]),
    ("row 2: 3 columns, expected 2", photos("0.png\ta\n1.png\tb\tc\n"), []),
    ("expected picture<TAB>caption .*Kaggle.*Karpathy", photos("0.png a\n"), []),
    ("2 pictures that cannot be read: .*no.png.*text.png.*--skip leaves", BAD, []),
    ("a.HEIC: .*save it as JPEG", photos("0.png\ta\na.HEIC\tb") | {"a.HEIC": "x"}, []),
    ("b.png: .*exceeds limit of", photos("0.png\ta\nb.png\tb") | {"b.png": plain(1, size=(30, 30))}, []),
    ("1 blank captions in .*: one of 1.png; --skip", photos("0.png\ta\n1.png\t \n"), []),
    ("captions.txt", photos(karpathy((5, "train", "a"), ("0.png", "train", "b"))), []),  # a number for a name
    ("neither COCO nor Karpathy .*dev", photos(karpathy(("0.png", "dev", "b"))), []),
    ("unexpected end|delimiter expected", photos('image,caption\n0.png,"stop\n1.png,go\n'), []),
    ("--n_image 5: not for babylm", CAPTIONS, ["--n_image", "5"]),
    ("--words -5: expected 0 or more", CAPTIONS, ["--words=-5"]),
    ("no gpt2: .*TIKTOKEN_CACHE_DIR.*--tokenizer bpe", PHOTOS, ["--tokenizer", "gpt2"]),
    ("no dinov2_vits14: .*--encoder pixels", PHOTOS, ["--encoder", "dinov2_vits14"])])
def test_wrong_input_is_one_line_and_leaves_no_folder(make, tmp_path, monkeypatch, words, files, flags):
    monkeypatch.setattr(tiktoken, "get_encoding", lambda _: 1 / 0)  # there is no network
    monkeypatch.setattr(torch.hub, "load", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 440)  # Pillow refuses twice as many: 880 < 30 * 30
    with pytest.raises(InputError, match=f"^.*{words}.*$"):
        make(files, *flags)
    assert os.listdir(tmp_path) == ["in"]

def test_help_names_every_flag(capsys, monkeypatch):
    monkeypatch.setattr(prepare_data, "__doc__", None)  # as python -OO does
    with pytest.raises(SystemExit, match="0"):
        prepare_data.main(["--help"])
    assert {f"--{name}" for name, *_ in prepare_data.FLAGS} <= set(capsys.readouterr().out.split())

def test_the_command_line_ends_with_status_2():
    argv = [sys.executable, prepare_data.__file__, "photos", "nowhere"]
    ended = subprocess.run(argv, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (2, "prepare_data.py: photos: no folder 'nowhere'\n")
