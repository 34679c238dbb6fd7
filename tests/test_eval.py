"""
eval.py: losses and scores are those of a plain loop; percentages, statistics and tables are published or
worked out by hand; pictures show the numbers they are drawn from.
"""
import io
import json
import math
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace as Stub

import numpy as np
import torch
from PIL import Image, ImageColor
from pytest import approx, fixture, mark, param, raises

import eval as ev
import train
from gatevlm import GATES, Elision, GateVLM, GateVLMConfig, InputError, load_model, save_checkpoint
from prepare_data import Data, load_meta, load_tokenizer, main

cases, ROOT = mark.parametrize, "evaluation_data/full_eval"
REAL = Path(__file__).resolve().parents[2] / "shared/data"
SIZES = dict(n_layer=2, n_head=2, n_embd=16, n_image_layer=1, block_size=32, gate="soft-token", dropout=0.1)
FLAGS = ["--device=cpu", *(f"--{name}={x}" for name, x in SIZES.items())]

def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return path

@fixture
def tmp(tmp_path):
    return tmp_path

def close(x, y):
    np.testing.assert_allclose(x, y, 1e-4, 1e-4)

@fixture(scope="module")
def trained(toy, tmp_path_factory):
    """Epochs T C T C end at steps 3, 7, 10 and 14. Checkpoints are of these, and of step 5."""
    out = tmp_path_factory.mktemp("trained") / "run"
    flags = f"--data={toy} --out={out} --curriculum=TCTC --keep_checkpoints --eval_interval=5"
    train.main([*FLAGS, *flags.split()])
    return out

@fixture
def run(trained, tmp):
    ignore = shutil.ignore_patterns("*.png", "*.csv", "[ps]*.json")  # what evaluate writes
    return shutil.copytree(trained, tmp / "run", ignore=ignore)

def make(folder, seed=0, save=False, **changes):
    """No parameter starts at 0, say. save: into a run folder."""
    sizes = {name: load_meta(folder)[name] for name in ("vocab_size", "image_dim", "n_image_token")}
    torch.manual_seed(seed)
    model = GateVLM(GateVLMConfig(**SIZES | sizes | changes))
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    if save:
        save_checkpoint(f"{folder}/best.pt", model=model.state_dict(), model_config=vars(model.config))
    return model

@torch.no_grad()
def plain(model, ids, image=None):
    """Losses and gates of the tokens ids[1:] of one text."""
    image = None if image is None else torch.from_numpy(np.float32(image))[None]
    logits, _, gates, _ = model.eval()(torch.from_numpy(np.int64(ids[:-1]))[None], image)
    losses = -logits[0].log_softmax(dim=-1).numpy()[range(len(ids) - 1), ids[1:]]
    return losses, gates[model.gated or [0], 0].mean(dim=0).numpy()

# ---- losses
def alone(model, data, view="image"):
    """[(ids, losses, gates)] of the held-out captions, straight from the files."""
    tokens = np.fromfile(f"{data.folder}/caption_val.bin", np.uint16)
    image, rows, eot = np.load(f"{data.folder}/image.npy"), data.image_row["val"].tolist(), tokens[-1]
    other = dict(zip(every := sorted({*rows}), every[1:] + every[:1]))
    for ids, row in zip(np.split(tokens, np.flatnonzero(tokens == eot) + 1), rows):
        ids, x = ids[: model.config.block_size], image[other[row] if view == "other" else row]
        yield ids, *plain(model, [eot, *ids], None if view == "none" else x)

def mean_loss(texts):
    return approx(np.concatenate([loss for *_, loss, _ in texts]).mean(), rel=1e-5)

@cases("view, changes", [
    ("image", {}), ("none", {}), ("other", {}), ("image", dict(block_size=8, contrastive="lcg"))], ids=str)
def test_caption_losses_are_those_of_each_alone(toy, view, changes):
    model, data, ids = make(toy, **changes), Data(toy), np.array([4, 0, 29, 1])
    data.image_row["val"] = data.image_row["val"][np.arange(30) // 2]  # each picture has two captions
    found, want = ev.caption_losses(model, data, "val", ids, view), [*alone(model, data, view)]
    for i, x in zip(ids, found, strict=True):
        close(x, want[i][1:])

@cases("block, most, caption, text", [
    (16, math.inf, 1, 1), (2, math.inf, 1, 1),  # the last of 14 blocks of text has 14 tokens; two batches
    (16, 130, 3, 2)])  # of 390 tokens of captions a third, of 222 of text a half
def test_validate_takes_every_nth(toy, block, most, caption, text):
    model, data, ids = make(toy, block_size=block), Data(toy), np.fromfile(f"{toy}/text_val.bin", "u2")
    found, blocks = ev.validate(model, data, most), [ids[i : i + block + 1] for i in range(0, 222, block)]
    assert found["val_loss_caption"] == mean_loss([*alone(model, data)][::caption])
    assert found["val_loss_text"] == mean_loss([plain(model, x) for x in blocks[::text]])

# ---- benchmarks
def plain_score(model, encoding, item, option, images):
    """Log-probability of an option after its context; was the text cut to its end?"""
    ids = [encoding.eot_token, *encoding.encode_ordinary(f"{item['context']} {option}".lstrip())]
    n = len(encoding.encode_ordinary(item["context"]))  # with the toy tokenizer no token crosses the border
    cut = max(0, len(ids) - 1 - model.config.block_size)
    losses, _ = plain(model, ids[cut:], None if images is None else images[item["image"]])
    return -losses[max(0, n - cut) :].sum(), cut > 0

VARIANTS = [*({"gate": gate} for gate in GATES), dict(n_image_token=0), dict(block_size=7)]
VARIANTS += [dict(modulation="film", modulate_at="image")]

@cases("world, changes", [*((world, changes) for world in ("toy", "toy16") for changes in VARIANTS),
       param("real", {}, marks=mark.skipif(not REAL.is_dir(), reason="no ../shared/data"))], ids=str)
def test_scores_are_those_of_a_plain_loop(toy, toy16, world, changes):
    folder = toy16 if world == "toy16" else toy
    model, encoding = make(folder, **changes), load_tokenizer(folder)
    for task in ev.TASKS:
        items, states = ev.read_task(f"{REAL if world == 'real' else folder}/{ROOT}", task)
        items = items[:4] + items[-4:]
        for images in (states if model.config.n_image_token else None, None)[: len(items)]:
            found, cut = ev.score(model.train(), items, encoding, images, 100)
            each = [plain_score(model, encoding, item, x, images) for item in items for x in item["options"]]
            close(np.concatenate(found), [total for total, _ in each])
            uids = [item["uid"] for item in items for _ in item["options"]]
            assert cut == [uid for uid, (_, long) in zip(uids, each) if long]
        if task == "winoground":  # the last round was blind: no caption is right of both its pictures
            assert ev.accuracies(task, items, found)[task] == 50

def test_a_token_counts_that_ends_in_the_option(monkeypatch):
    """Tokens a s [k n] o with losses of 1, 2, 4, 8... by position: their sum tells which positions count."""
    encoding = Stub(encode_ordinary=lambda text: [0, 1, 2, 3], eot_token=4)
    encoding.decode_single_token_bytes = [b"a", b"s", b"k n", b"o"].__getitem__
    losses = lambda model, idx, targets, image: ((targets != -1) * 2.0 ** np.arange(idx.shape[1]), None)
    monkeypatch.setattr(ev, "read", losses)
    for block, context, total, cut in (9, "ask", 12, 0), (9, "", 15, 0), (3, "ask", 6, 1), (1, "ask", 1, 1):
        item = dict(uid="u", context=context, options=["no"])
        assert ev.score(Stub(config=Stub(block_size=block)), [item], encoding) == ([[-total]], ["u"] * cut)

ROWS = {  # an item of each task. Its options are a and b, its context is c
    "blimp": dict(UID="u", sentence_good="a", sentence_bad="b", linguistics_term="s-selection"),
    "supplement": dict(UID="no", sentence_good="a", sentence_bad="b"),
    "ewok": dict(Domain="u", Context1="c", Target1="a", Target2="b"),
    "winoground": dict(caption_0="a", caption_1="b", image_idx=4, image_key="image_1", collapsed_tag="t"),
    "vqa": dict(question="c", target_ans="a", distractors=["b"], idx_in_hf_dataset=4, collapsed_tag="t")}

@cases("task, uid, context, image, tag", [
    ("blimp", "u", "", None, "argument_structure"), ("supplement", "file", "", None, ""),
    ("ewok", "u", "c", None, ""),
    ("winoground", "WinoGround", "", (4, 1), "t"), ("vqa", "VQA", "c", (4,), "t")])
def test_items_are_read(tmp, task, uid, context, image, tag):
    write(tmp / f"{task}_filtered/file.jsonl", ROWS[task])
    item = dict(uid=uid, context=context, image=image, tag=tag, options=["a", "b"])
    assert ev.read_task(tmp, task) == ([item], None)

@cases("task, bad", [
    ("blimp", "{sentence"), ("blimp", "[1]"), ("ewok", "null"), ("blimp", {"UID": None}),
    ("supplement", {"sentence_bad": " "}), ("winoground", {"image_key": ""}), ("vqa", {"distractors": [1]}),
    *(("vqa", {"idx_in_hf_dataset": x}) for x in (5, -1, "4"))], ids=str)
def test_a_damaged_line_is_named(tmp, task, bad):
    bad = ROWS[task] | bad if type(bad) is dict else bad
    path = write(tmp / f"{task}_filtered/f.jsonl", ROWS[task], "", bad)
    np.save(tmp / f"{task}_states.npy", np.zeros((5, 2, 1, 1)))
    with raises(InputError, match=rf"\A({path}, line 3: .+|.*_states.npy: 5 rows, the items ask for 6)\Z"):
        ev.read_task(tmp, task)

def test_damaged_weights_are_refused(toy):
    torch.nn.init.constant_((model := make(toy)).ln.weight, math.nan)
    with raises(InputError, match="NaN"):
        ev.score(model, [dict(context="", options=["red"])], load_tokenizer(toy))

@cases("task, groups, scores, want", [  # an item's scores: the right option, the others
    # right, tie, wrong; wrong; of one phenomenon
    ("blimp", "aaab", "21 11 12 03", {"": 100 / 3, ": a": 200 / 3, ": b": 0, ": term": 50}),
    ("vqa", "tt ", "322 189 111", {"": 200 / 3, ": t": 50}),  # right, wrong; tie, of no group
    # pairs: all right; text right, image wrong; image right, text wrong; ties; half a pair, wrong
    ("winoground", "xxxxyyyyy", "41 41 21 65 34 91 11 11 12", {
        "": 700 / 9, ": x": 100, ": y": 60, ": text score": 50, ": image score": 50, ": group score": 25}),
    ("winoground", "x", "12", {"": 0, ": x": 0})])
def test_percentages_by_hand(task, groups, scores, want):
    items = [dict(uid=x, tag=x.strip(), image=(i // 2, i % 2)) for i, x in enumerate(groups)]
    if task == "blimp":
        items = [item | {"tag": "term"} for item in items]
    found = ev.accuracies(task, items, [np.array([*map(int, x)]) for x in scores.split()])
    assert {name: found[task + name] for name in want} == approx(want)

def test_predictions_are_official_and_missing_tasks_named(monkeypatch, tmp, capsys):
    """All items are ties but the first of vqa, when seen. A model without eyes needs no features."""
    found = lambda seen: ([np.array([not seen, 1]), np.array([1, 1])], ["VQA"] * 7)
    monkeypatch.setattr(ev, "score", lambda model, items, encoding, states=None: found(states is not None))
    benchmark = lambda n: ev.benchmark(Stub(config=Stub(n_image_token=n)), None, tmp)
    for task in "blimp", "vqa":
        write(tmp / f"{task}_filtered/f.jsonl", ROWS[task], ROWS[task])
    assert [*benchmark(0)[1]] == ["blimp", "vqa"] and [*benchmark(1)[1]] == ["blimp"]
    printed = capsys.readouterr().out
    for task, missing in ("ewok", "ewok_filtered/*.jsonl"), ("vqa", "vqa_states.npy"):
        assert f"{task}: left out, no {tmp}/{missing}\n" in printed
    np.save(tmp / "vqa_states.npy", np.zeros((5, 8)))
    results, predictions = benchmark(1)
    rows = lambda uid, *texts: {"predictions": [{"id": f"{uid}_{i}", "pred": x} for i, x in enumerate(texts)]}
    assert predictions == {"blimp": {"u": rows("u", "a", "a")}, "vqa": {"VQA": rows("VQA", " b", " a")}}
    assert (results["vqa"], results["vqa blind"]) == (50, 100)
    assert "vqa: 2 items, 1 ties, 7 texts cut to their end VQA\n" in capsys.readouterr().out

# ---- words and their gates
@cases("pieces, words", [  # spaces belong to words; é in two halves
    ("the| pur|ple|.|<eot>|a", [("the", 0, 1), ("purple", 1, 3), (".", 3, 4), ("a", 5, 6)]),
    ("A|:| |h|i|\n|B", [("A", 0, 1), (":", 1, 2), ("hi", 2, 5), ("B", 5, 7)]),
    ("caf|\udcc3|\udca9|'s|s| |?", [("café", 0, 3), ("'s", 3, 4), ("s", 4, 5), ("?", 6, 7)])], ids=str)
def test_words_by_hand(pieces, words):
    piece = lambda i: pieces.split("|")[i - 1].encode(errors="surrogateescape")
    ids = [0 if x == "<eot>" else i for i, x in enumerate(pieces.split("|"), 1)] + [-1]  # -1: padding
    assert ev.words_of(ids, Stub(eot_token=0, decode_single_token_bytes=piece)) == words

def test_words_have_a_class_without_a_table():
    assert [ev.word_class(word, None) for word in ("the", "dog", ".")] == ["function", "content", "other"]

def test_a_table_of_norms_as_published(tmp):
    """As Brysbaert's, with texts and NA; a quote is a word, the first row of a word counts."""
    path = write(tmp / "t", "Word\tBigram\tConc.M\tConc.SD\tSUBTLEX\tDom_Pos", "Red\t0\t4\t1.5\t60\tAdj",
                 "dog\t0\t-.5e0\tNA\t\tNoun", '"\t0\tnan\t0\t5\tinf', "red\t1\t1\t1\t1\t")
    red, dog = {"Bigram": 0, "Conc.M": 4, "Conc.SD": 1.5, "SUBTLEX": 60}, {"Bigram": 0, "Conc.M": -0.5}
    assert ev.read_words(path) == {"red": red, "dog": dog, '"': {"Bigram": 0, "Conc.SD": 0, "SUBTLEX": 5}}

def test_a_table_with_commas(tmp):
    path = write(tmp / "t", "word,UPOS,AoA", '"no, one",PRON,1', "hm,,2")
    assert ev.read_words(path) == {"no, one": dict(upos="PRON", AoA=1), "hm": dict(AoA=2)}
    with raises(InputError, match=r"\A.*/t: expected a header, .*\Z"):
        ev.read_words(write(tmp / "t", "word,x", "red,1,2"))

def seen_of(model, data):
    ids = np.arange(len(data.image_row["val"]))
    return {view: ev.caption_losses(model, data, "val", ids, view) for view in ("image", "none")}

def test_a_row_per_word_has_what_its_caption_has_alone(toy):
    model, teacher, data = make(toy), make(toy, 1, n_image_token=0), Data(toy)
    text, split = lambda ids: data.encoding.decode([*ids]), re.compile("[a-z]+|[?.]").findall
    table = ev.word_table(model, data, seen_of(model, data), {"red": {"conc": 4.0}}, teacher)
    views = alone(model, data), alone(model, data, "none"), alone(teacher, data, "none")
    for n, ((ids, loss, gates), (_, blind, _), (_, teach, _)) in enumerate(zip(*views)):
        column = lambda name: [row.get(name) for row in table if row["caption"] == n]
        starts, words = column("position"), split(text(ids[:-1]))
        assert [text(x).strip() for x in np.split(ids[:-1], starts[1:])] == words == column("word")
        assert column("tag") == [data.meta["upos"].get(word, "X") for word in words]
        for name, x in dict(gate=gates, loss=loss, loss_no_image=blind, loss_teacher=teach).items():
            close(column(name), x[starts])
        assert column("norm conc") == [4.0 if word == "red" else None for word in words]

# ---- statistics
@cases("x, y, rho", [
    ([1, 2, 3, 4, 5], [5, 6, 7, 8, 7], 0.8207826816681233),  # documentation of scipy.stats.spearmanr: a tie
    ([3, 1, 2, 10], [20, 2.7, 7.4, 999], 1), ([3, 1, 2, 10], [-3, -1, -2, -10], -1),  # only order counts
    ([1, 2, 3], [4, 4, 4], None), ([4, 4, 4], [1, 2, 3], None), ([1, 2], [1, 2], None)])
def test_spearman(x, y, rho):
    assert ev.spearman(np.array(x), np.array(y)) == (rho and approx(rho))

def word_row(word, tag, gate, norm=None):
    """Image and teacher in perfect agreement with the gate."""
    row = dict(word=word, tag=tag, gate=gate, loss=1.0, loss_no_image=2 - gate, loss_teacher=-gate)
    row["class"] = {"DET": "function", "X": "other"}.get(tag, "content")
    return row | ({"norm concreteness": norm} if norm else {})

def test_gate_report_by_hand():
    """Concreteness falls with the mean gate over three words, not with that of their first occurrences."""
    the, dog, two = [0.1, 0.9, 0.9, 0.9, 0.9], [0.2, 0.4] * 3, [0.0] * 5  # 2: often, but no letters
    rows = [word_row("the", "DET", x, 1) for x in the] + [word_row("dog", "NOUN", x, 5) for x in dog]
    rows += [word_row("2", "NOUN", x) for x in two]
    found, words = ev.gate_report(rows + [word_row(".", "X", 0.1), word_row("red", "ADJ", 0.5, 3)])
    gates = dict(DET=0.74, NOUN=1.8 / 11, ADJ=0.5, X=0.1, function=0.74, content=2.3 / 12, other=0.1)
    assert found == approx({f"gate of {name}": x for name, x in gates.items()} | {
        "loss of content": 1, "loss of function": 1, "loss of other": 1,
        "gate sd": np.std(the + dog + two + [0.5, 0.1]),
        "rho concreteness": -1, "rho loss saved": 1, "rho teacher": 1})
    assert words == ["dog", "the"]  # of those said five times or more the most visual first

# ---- pictures
def drawn(color, draw, *args, **options):
    """Which pixels (height,width) of a drawing have a color."""
    file = io.BytesIO()
    file.name = "x.png"
    draw(file, *args, **options)
    return (np.asarray(Image.open(file).convert("RGB")) == ImageColor.getrgb(color)).all(axis=-1)

def test_a_box_is_filled_as_far_as_the_word_looks():
    none, half, full = (drawn(ev.LOOKS, ev.draw_gates, ["."], [gate]).sum() for gate in (1.0, 0.5, 0.0))
    assert none == 0 and full > 500 and half / full == approx(0.5, abs=0.06)

def test_a_dropped_word_is_struck_out():
    ink = lambda *kept: drawn(ev.INK, ev.draw_gates, ["dog", "dog"], [0.5, 0.5], kept=kept)
    first, second = ((ink(*kept) & ~ink(1, 1)).nonzero()[1] for kept in ([0, 1], [1, 0]))
    assert len(first) == len(second) > 40 and first.max() < second.min()

def test_a_long_caption_wraps_beside_its_picture():
    red = Image.new("RGB", (64, 64), "red")
    one, many = (drawn(ev.LOOKS, ev.draw_gates, ["mountain"] * n, [0.0] * n, red).sum() for n in (1, 60))
    assert many == 60 * one > 0 and drawn("red", ev.draw_gates, ["a"], [1.0], red).sum() == 256 * 256

def test_curves_fall_where_the_loss_does():
    series = {"falls": [(0, 3), (50, 2), (100, 1)], "none": [], "rises": [(0, 1), (100, 2.9)]}
    series |= {f"flat {y}": [(0, y), (100, y)] for y in (1.2, 1.4, 1.6)}
    lines = [drawn(color, ev.draw_curves, series)[:, :761] for color in ev.COLORS]  # then come labels
    assert not lines[1].any()  # a color belongs to a place, also where nothing was measured
    slopes = [np.polyfit(*np.nonzero(lines[i])[::-1], 1)[0] for i in (0, 2, 3)]  # of 690 x 370 pixels, down
    # the axis goes from 1 to 2.95, below which 95% of the 11 losses are
    assert slopes == approx([370 / 690, -1.9 / 1.95 * 370 / 690, 0], abs=0.01)
    assert (lines[4].sum(axis=1) > 600).sum() == 2 * 2  # two of one color, 2 pixels each

@cases("caption, by", [(3, None), (None, "own"), (None, "target")])
def test_gate_picture_draws_its_caption(toy, monkeypatch, caption, by):
    """Elision keeps the 5 words of the highest score; by their own <eot> is always one, so 4 are left."""
    model, data, calls = make(toy), Data(toy), []
    config = Stub(elide="ref", elide_by=by, elide_beta=0.9, elide_lambda=0.5, keep_ratio=1e-6)
    score = torch.rand(len(data.captions["val"]), generator=torch.manual_seed(0))
    elision = Elision(config, len(score), score) if by else None
    monkeypatch.setattr(ev, "draw_gates", lambda *args: calls.append(args))
    if by:
        monkeypatch.setattr(elision, "n_keep", lambda length: 5)
    ev.gate_picture("", model, data, caption, elision=elision)
    captions = [*alone(model, data)]
    ids, _, gates = captions[caption or np.argmax([len(ids) for ids, *_ in captions])]
    words, starts, _ = map(list, zip(*ev.words_of(ids, data.encoding)))
    ((_, *found, picture, kept),) = calls
    assert found == [words, approx(gates[starts], rel=1e-4)] and picture.size == (16, 16)
    n = caption or np.argmax([len(ids) for ids, *_ in captions])
    best = score[data.offset["val"][n] :][: len(ids)]
    run = best[:-1].topk(4).indices if by == "own" else best.topk(5).indices
    assert kept == (by and [k in run for k in starts])

# ---- runs
def test_a_run_leaves_numbers_pictures_and_a_table(run, tmp):
    norms = write(tmp / "norms", "word\tconcreteness", "red\t5", "the\t1")
    upos = write(tmp / "upos", "word\tupos", "red\tADP")
    make(blind := shutil.copytree(run, tmp / "blind"), save=True, n_image_token=0)
    numbers = ev.main([f"{run}/", f"--norms={norms}", f"--upos={upos}", f"--teacher={blind}"])[str(run)]
    low, high = (load_meta(run)[name] for name in ("floor_with_image", "floor_text_only"))
    captured = (high - numbers["val_loss_caption"]) / (high - low)
    assert (numbers["visual_information_captured"], numbers["processed_ratio"]) == (approx(captured), 1)
    assert {"val_loss_caption_other_image", "vqa blind", "rho concreteness", "rho teacher"} < {*numbers}
    assert json.loads((run / "summary.json").read_text()) == numbers
    official = "blimp/blimp blimp/supplement ewok/ewok vqa/vqa winoground/winoground".split()
    root = run / "predictions" / "zero_shot" / "causal"
    found = {str(path.parent.relative_to(root)) for path in root.rglob("predictions.json")}
    assert found == {f"{x}_filtered" for x in official}
    assert re.search(",red,function,ADP,.*,5.0\n", (run / "gates.csv").read_text())
    assert {path.name for path in run.glob("*.png")} == {"loss.png", "gates.png", "gates_by_class.png"}

def test_training_curves_are_smoothed_and_stand_behind(run, monkeypatch):
    """A batch holds captions of one length, so its loss jumps: 1, 3, 1, 3, ... becomes 2."""
    lines = [{"step": 10 * i, "loss_caption": 1 + 2 * (i % 2)} for i in range(30)]
    lines += [{"step": i, "val_loss_caption": i} for i in (5, 9)]
    drawn = []
    monkeypatch.setattr(ev, "read_log", lambda out: lines)
    monkeypatch.setattr(ev, "draw_curves", lambda path, series: drawn.append(series))
    ev.evaluate(run, "cpu", tasks=["ewok"])
    names = ["loss_caption", "loss_text", "val_loss_caption", "val_loss_text", "floor_with_image"]
    assert [*drawn[0]][:5] == names
    close(drawn[0]["loss_caption"], [(45 + 10 * i, 2) for i in range(21)])
    close(drawn[0]["val_loss_caption"], [(5, 5), (9, 9)])

def test_a_single_picture_has_no_other(run, monkeypatch):
    monkeypatch.setattr(ev, "Data", lambda folder: (data := Data(folder)).image_row["val"].fill(300) or data)
    make(run, save=True, gate="none")
    _, numbers = ev.evaluate(run, "cpu", tasks=["ewok"])
    assert [name for name in numbers if "val_loss_caption_" in name] == ["val_loss_caption_none_image"]
    assert [path.name for path in run.glob("*.png")] == ["loss.png"]  # without a gate

def test_a_run_on_text_alone(tmp):
    for split in "train", "dev":
        write(tmp / split / "a.txt", "tell me more, " * 9)
    data = main(["babylm", str(tmp), "--vocab_size=257", f"--out={tmp}/data"])
    numbers = train.main([*FLAGS, f"--data={data}", f"--out={tmp}/run", "--curriculum=T", "--no-images"])
    assert numbers["val_loss_caption"] is None and numbers["val_loss_text"] > 0

def test_a_teacher_is_blind_and_has_the_tokenizer(run, toy, toy16):
    for data, n_image_token in (toy, 1), (toy16, 0):
        make(run, save=True, n_image_token=n_image_token)
        with raises(InputError, match="no teacher"):
            ev.load_teacher(run, Data(data))

def test_seeds_are_one_row(monkeypatch, capsys):
    """60, 63 and 69: mean 64, deviation sqrt((16 + 1 + 25) / 2). What a seed lacks has no mean."""
    config = lambda seed, n: {"train": {"seed": seed, "out": seed, "device": seed, "lr": 0.1}, "model": n}
    found = dict(a=(config(1, 8), dict(blimp=60.0, loss=1.0)), b=(config(2, 8), dict(blimp=63.0)),
                 wide=(config(1, 9), dict(blimp=1234.5)), c=(config(3, 8), dict(blimp=69.0)))
    monkeypatch.setattr(ev, "evaluate", lambda run, *_: found[run])
    ev.main([*found])
    assert capsys.readouterr().out.split() == "run seeds blimp loss a 3 64 +-4.6 wide 1 1,234".split()

def test_checkpoints_are_scored(run, toy):
    paths = [f"{run}/checkpoints/step_{step:08}.pt" for step in (3, 5, 7, 10, 14)]
    found = ev.main([*sorted(map(str, (run / "checkpoints").iterdir())), "--tasks=ewok"])
    assert [*found] == paths
    loss = mean_loss(alone(load_model(*paths[1].rsplit("/", 1)), Data(toy)))
    assert found[paths[1]]["val_loss_caption"] == loss
    assert ev.main([paths[1], "--tasks=ewok"]) == {paths[1]: found[paths[1]]}

def test_checkpoints_need_no_benchmarks(run, tmp):
    paths = sorted(map(str, (run / "checkpoints").iterdir()))
    assert len(ev.main([*paths, f"--babylm_eval={tmp}"])) == 5

# ---- command line
@fixture
def photo(tmp):
    Image.new("RGB", (20, 20), "red").save(tmp / "photo.png")
    return f"--image={tmp}/photo.png"

@cases("prompt", ["", "what color is"])
def test_image_prints_a_caption_and_its_gates(run, photo, capsys, prompt):
    model, encoding = make(run, 8, save=True), load_tokenizer(run)
    ev.main([str(run), photo, f"--prompt={prompt}"])
    start, image = [encoding.eot_token, *encoding.encode_ordinary(prompt)], torch.tensor([[1.0, 0, 0] * 256])
    ids = model.generate(torch.tensor([start]), 32, image[None], temperature=0, eot=start[0])[0].tolist()
    caption, (_, gates) = encoding.decode(ids[1:]).removesuffix("<|endoftext|>"), plain(model, ids, image)
    before, _, table = capsys.readouterr().out.partition(f"{caption}\n")
    want = [[word, f"{gates[k]:.4f}"] for word, k, _ in ev.words_of(ids[1:], encoding)]
    assert before == "" and [row.split() for row in table.splitlines()] == want and len(want) > 3
    assert (run / "caption.png").exists()

def texts(capsys, run, *flags):
    ev.main([str(run), *flags])
    return capsys.readouterr().out.splitlines()

@cases("n_image_token", [0, 1])
def test_a_prompt_is_continued(run, capsys, n_image_token):
    """Greedy: the best token each time. Seeds repeat; samples differ."""
    model, encoding = make(run, 8, save=True, n_image_token=n_image_token), load_tokenizer(run)
    ids, _ = [encoding.eot_token, *encoding.encode_ordinary("the red")], model.eval()
    with torch.no_grad():
        while len(ids) < 32 and (len(ids) < 4 or ids[-1] != encoding.eot_token):
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    (greedy,) = texts(capsys, run, "--prompt=the red")
    assert greedy == encoding.decode(ids[1:]).split("<|endoftext|>")[0].split("\n")[0]
    sampled = texts(capsys, run, "--prompt=the red", "--temperature=1", "--n_sample=3", "--seed=5")
    assert sampled == texts(capsys, run, "--prompt=the red", "--temperature=1", "--n_sample=3", "--seed=5")
    assert sampled != texts(capsys, run, "--prompt=the red", "--temperature=1", "--n_sample=3", "--seed=6")
    assert texts(capsys, run, "--n_sample=1", "--temperature=1", "--seed=2")[0] != greedy  # from <eot>

def test_a_prompt_beyond_the_block_is_refused(run):
    with raises(InputError, match="tokens do not fit the block of 32"):
        ev.main([str(run), "--prompt=" + "red " * 40])

# ---- moved data, a run folder alone
def test_a_run_folder_alone_is_scored_and_writes(run, toy, tmp, monkeypatch, capsys):
    (config := json.loads((run / "config.json").read_text()))["train"]["data"] = "gone"
    write(run / "config.json", config)
    monkeypatch.chdir(tmp)
    root = f"--babylm_eval={toy}/evaluation_data/full_eval"
    (numbers,) = ev.main(["run", root, "--tasks=ewok,vqa"]).values()
    assert "run: benchmarks only, gone is not there" in capsys.readouterr().out
    there = ev.main([str(run), f"--data={os.path.relpath(toy)}", "--tasks=ewok,vqa"])[str(run)]
    assert numbers == {name: there[name] for name in numbers} and {"ewok", "vqa", "vqa blind"} <= {*numbers}
    assert there["val_loss_caption"] > 0 and texts(capsys, "run", "--prompt=the")

def test_other_data_are_refused(run, toy16):
    with raises(InputError, match=r"\A.*: not the data that .*/run was trained on\Z"):
        ev.main([str(run), f"--data={toy16}", "--tasks=ewok"])

def test_a_teacher_with_a_shorter_block_judges_what_it_reads(toy):
    model, teacher, data = make(toy), make(toy, 1, n_image_token=0, block_size=7), Data(toy)
    table = ev.word_table(model, data, seen_of(model, data), {}, teacher)
    assert max(row["position"] for row in table) == 6 and all(row["loss_teacher"] > 0 for row in table)

def test_a_checkpoint_is_found_from_any_directory(run, monkeypatch):
    monkeypatch.chdir(run)
    assert len(ev.main(["best.pt", "checkpoints/step_00000003.pt", "--tasks=ewok"])) == 2

@cases("flag", ["--temperature=-1", "--temperature=nan", "--n_sample=-1", "--data=nowhere"])
def test_flags_of_sampling_have_a_range(run, flag):
    with raises(InputError):
        ev.main([str(run), "--prompt=the", flag])

def test_the_same_run_twice_is_one_and_a_wrong_folder_is_told(run, tmp):
    assert [*ev.main([str(run), f"{run}/.", "--tasks=ewok"])] == [str(run)]
    with raises(InputError, match="^nowhere: no such folder"):
        ev.main([str(run), "--babylm_eval=nowhere"])

@cases("gate", ["none", "soft-token"])
def test_without_gates_nothing_is_drawn_without_words_the_picture_alone(run, photo, monkeypatch, gate):
    if gate != "none":
        monkeypatch.setattr(GateVLM, "generate", lambda *_: torch.tensor([[_[-1], _[-1]]]))
    make(run, save=True, gate=gate)
    ev.main([str(run), photo])
    assert (run / "caption.png").exists() == (gate != "none")

@cases("change, flags, message", [
    ({"encoder": "given"}, "--image=x.png", "prepare_data.py --encoder"), ({}, "--image=no.png", "no.png"),
    ({}, "--tasks=blimp,glue", "--tasks blimp,glue"), ({"counts": 0}, "--data=.", "meta.json")])
def test_what_cannot_be_used_is_told(run, change, flags, message):
    write(run / "meta.json", load_meta(run) | change)
    with raises(InputError, match=rf"\A.*{message}.*\Z"):
        ev.main([str(run), flags])
