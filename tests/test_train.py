"""Training: flags, data order, whole runs, exact resume, and the numbers and pictures that a run leaves behind.

Two worlds: the toy world of conftest.py, and `letters`, whose tokens are the bytes of its text ("a" is 97, <eot> is 256), so that
every batch can be written down by hand. All models are tiny; what is tested is that the arithmetic is right, not that they learn.
"""
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
import torch
from PIL import Image
from torch.overrides import TorchFunctionMode

import eval as evaluation
import prepare_data
import train
from gatevlm import GateVLM, GateVLMConfig, InputError, load_checkpoint, load_model
from train import TrainConfig, epoch_plan, learning_rate, load_batch

TRAIN_PY = os.path.abspath(train.__file__)
TINY = ("--device cpu --n_layer 2 --n_head 2 --n_embd 16 --n_image_layer 1 --block_size 16 --gate soft-feature --batch_tokens 1024 "
        "--length_multiple 1 --optimizer adamw --lr 0.01 --warmup_steps 4 --log_interval 1")
FUNCTION_TAGS = {"ADP", "AUX", "CCONJ", "DET", "PART", "PRON", "SCONJ"}  # the closed classes of Universal Dependencies
CONTENT_TAGS = {"ADJ", "ADV", "NOUN", "NUM", "PROPN", "VERB"}


def run(out, data, flags=""):
    """train.main with tiny settings; later flags win over earlier ones."""
    return train.main([*TINY.split(), "--data", str(data), "--out", str(out), *flags.split()])


def resume(out, flags=""):
    return train.main(["--resume", "--out", str(out), *flags.split()])


def refused(*argv):
    """The one line with which main refuses argv."""
    with pytest.raises(InputError) as error:
        train.main([str(x) for x in argv])
    assert "\n" not in str(error.value)
    return str(error.value)


def state(out, name="last.pt"):
    """Everything in a checkpoint that training depends on; the seconds it took are not part of that."""
    checkpoint = load_checkpoint(os.path.join(out, name))
    checkpoint["now"].pop("seconds")
    return {key: checkpoint[key] for key in ("model", "optimizers", "now")}


def log(out):
    """The lines of log.jsonl without their speed."""
    with open(os.path.join(out, "log.jsonl")) as f:
        return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in f]


def steps(out):
    return [line for line in log(out) if "kind" in line]


def same(a, b):
    """Equal to the bit, through nested dicts and lists of tensors and numbers."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def read(path):
    with open(path) as f:
        return json.load(f)


@pytest.fixture(autouse=True)
def restore_signals():
    """A run that ends in an exception must not leave pytest deaf to Ctrl-C."""
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for s, handler in before.items():
        signal.signal(s, handler)


def babylm_folder(root, captions=(), states=None, text="", val_captions=(), val_states=None, val_text=""):
    """A folder in the layout of BabyLM, prepared with a vocabulary of 256 bytes and <eot>: no merges."""
    for split, said, features, document in ("", captions, states, text), ("_dev", val_captions, val_states, val_text):
        if document:
            os.makedirs(root / "text_only" / (split[1:] or "train"))
            (root / "text_only" / (split[1:] or "train") / "a.txt").write_text(document)
        if len(said):
            os.makedirs(root / f"image_caption{split}")
            (root / f"image_caption{split}" / "c_captions.json").write_text(json.dumps(said))
            np.save(root / f"image_caption{split}" / "c_states.npy", features)
    return prepare_data.main(["babylm", str(root), "--vocab_size", "257", "--out", str(root / "data")])


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """66 captions of 3 to 50 tokens, two for each image of 2 x 3 numbers, and one text of 485 letters (15 blocks of 32 and a rest)."""
    rng = np.random.default_rng(0)
    words = ["a", "the", "dog", "is", "on", "in", "yellow", "mountain", "car", "."]
    sentences = [" ".join(rng.choice(words, rng.integers(1, 10))) for _ in range(80)]
    pictures = np.repeat(rng.integers(-8, 9, (40, 2, 3)) / 4, 2, axis=0).astype(np.float32)  # quarters survive float16
    train_captions = ["ab", "abcde", "z" * 40] + sentences[:63]
    text = "abcdefghij" + "".join(rng.choice(list("abc .,"), 475)).replace("\n", " ")
    return babylm_folder(tmp_path_factory.mktemp("letters"), train_captions, pictures[:66], text,
                         sentences[63:77], pictures[66:], "the dog is on the mountain. a car is in the dog.")


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory):
    """One whole run in the toy world: an epoch of text, one of captions, one mixed."""
    out = str(tmp_path_factory.mktemp("finished") / "run")
    return SimpleNamespace(out=out, summary=run(out, toy, "--curriculum TCM --mix 2 --dropout 0.1 --eval_interval 4 --save_interval 5"))


# ----------------------------------------------------------------------------------------------------------------------
# independent references: the validation set one caption at a time, straight from the files

@torch.no_grad()
def captions_by_hand(model, folder, image_row=lambda row: row):
    """[(ids, losses (n,), gates (n_layer, n))] of every validation caption; image_row may choose another image, or None."""
    tokens = np.fromfile(os.path.join(folder, "caption_val.bin"), np.uint16).astype(int).tolist()
    offset, rows, image = (np.load(os.path.join(folder, name)) for name in ("caption_val_offset.npy", "caption_val_image.npy", "image.npy"))
    eot, result = tokens[-1], []
    for i, row in enumerate(rows):
        ids = tokens[offset[i]:offset[i + 1]][:model.config.block_size]
        row = image_row(row)
        features = torch.tensor(image[row][None].astype(np.float32)) if row is not None and model.config.n_image_token else None
        logits, _, gates = model(torch.tensor([[eot, *ids[:-1]]]), None, features, return_gates=True)  # (1, n, V)
        losses = -logits[0].double().log_softmax(-1)[range(len(ids)), ids]
        result.append((ids, losses.numpy(), gates[:, 0].numpy()))
    return result


@torch.no_grad()
def text_by_hand(model, folder):
    tokens = np.fromfile(os.path.join(folder, "text_val.bin"), np.uint16).astype(int).tolist()
    total, T = 0.0, model.config.block_size
    for i in range(0, len(tokens) - 1, T):
        block = tokens[i:i + T + 1]
        total -= model(torch.tensor([block[:-1]]))[0][0].double().log_softmax(-1)[range(len(block) - 1), block[1:]].sum().item()
    return total / (len(tokens) - 1)


def mean_token(rows):
    return np.concatenate([losses for _, losses, _ in rows]).mean()


def words_by_hand(model, folder, layers):
    """{class: (mean gate over layers, mean loss)}. In the toy world every word is one token, so a token's tag is its word's."""
    encoding, upos = prepare_data.load_tokenizer(folder), read(os.path.join(folder, "meta.json"))["upos"]
    found = {"function": [], "content": []}
    for ids, losses, gates in captions_by_hand(model, folder):
        for position, token in enumerate(ids):
            word = encoding.decode([token]).strip()
            assert word in upos or word in (".", "?", "<|endoftext|>")
            kind = "function" if upos.get(word) in FUNCTION_TAGS else "content" if upos.get(word) in CONTENT_TAGS else None
            if kind:
                found[kind].append((gates[layers, position].mean(), losses[position]))
    return {kind: np.mean(rows, axis=0) for kind, rows in found.items()}


# ----------------------------------------------------------------------------------------------------------------------
# flags and configurations

def flag_fields():
    return [f for config in (TrainConfig, GateVLMConfig) for f in fields(config) if f.name not in ("vocab_size", "image_dim")]


def test_every_field_is_a_flag_with_help_and_default(capsys):
    with pytest.raises(SystemExit) as end:
        train.main(["--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for f in flag_fields():
        value = f", --no-{f.name}" if f.type is bool else f" {{{','.join(f.metadata['choices'])}}}" if f.metadata["choices"] else r" [NXS]"
        default = "empty" if f.default == "" else f.default
        (shown,) = re.findall(rf"--{f.name}{value} {re.escape(f.metadata['help'])} \((default: .*?)\)", text)
        assert shown.split("; ") == [f"default: {default}"] + [f"{name}: {p[f.name]}" for name, p in train.PRESETS.items() if f.name in p]
        assert len(f.metadata["help"].split()) >= 2
    assert "--vocab_size" not in text and "--image_dim" not in text  # these come from the data


def test_parse_reads_every_field_as_its_type():
    assert train.parse([]) == ("toy", False, {})  # only what is given is set, so a preset can fill in the rest
    for f in flag_fields():
        if f.type is bool:
            assert train.parse([f"--{f.name}"])[2] == {f.name: True}
            assert train.parse([f"--no-{f.name}"])[2] == {f.name: False}
        else:
            value = f.metadata["choices"][-1] if f.metadata["choices"] else {int: 7, float: 0.25, str: "x"}[f.type]
            assert train.parse([f"--{f.name}", str(value)])[2] == {f.name: value}
    assert train.parse(["--preset", "paper", "--resume"]) == ("paper", True, {})


def test_unknown_flag_names_the_nearest_and_exits_with_2():
    result = subprocess.run([sys.executable, TRAIN_PY, "--dropuot", "0.1"], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "train.py: unknown flag --dropuot; did you mean --dropout?\n"
    assert "did you mean --n_layer?" in refused("--n-layer=3")
    assert "a switch is --flag or --no-flag alone" in refused("--channel_attention", "on")
    assert "unknown flag --n_lay;" in refused("--n_lay", 3)  # no abbreviations: they would change meaning when a flag is added


@pytest.mark.parametrize("flags, words", [
    ("--n_layer two", ("n_layer", "two")),
    ("--lr fast", ("lr", "fast")),
    ("--lr 0", ("lr", "above 0")),
    ("--lr nan", ("lr", "nan")),
    ("--weight_decay -1", ("weight_decay", "-1")),
    ("--batch_tokens 0", ("batch_tokens",)),
    ("--beta2 1", ("beta2", "below 1")),
    ("--seed 4294967296", ("seed", "below 4294967296")),
    ("--dropout 1", ("dropout", "below 1")),
    ("--gate half", ("gate", "half", "soft-feature")),
    ("--preset huge", ("preset", "huge", "toy")),
    ("--n_head 3", ("n_head", "n_embd")),
    ("--curriculum TCX", ("curriculum", "TCX", "alternate")),
    ("--curriculum=", ("curriculum", "''")),
    ("--n_image_token 16", ("n_image_token 16", "has 1 image tokens")),
    ("--data nowhere", ("nowhere", "prepare_data.py")),
    ("--device nonsense", ("device nonsense",)),
    ("--no-images --contrastive clip", ("contrastive clip", "n_image_token")),
])
def test_wrong_values_get_one_line_that_names_the_field(toy, tmp_path, flags, words):
    message = refused(*TINY.split(), "--data", toy, "--out", tmp_path / "run", *flags.split())
    assert all(word in message for word in words), message


@pytest.mark.parametrize("name", ["toy", "patches", "laptop", "small", "paper"])
def test_every_preset_makes_valid_configs(name, toy, toy16):
    preset = train.PRESETS[name]
    assert set(preset) <= {f.name for f in flag_fields()}
    data = prepare_data.Data(toy16 if preset.get("n_image_token") == 16 else toy)
    config, model_config = train.make_configs(preset, data)
    assert {key: (asdict(config) | asdict(model_config))[key] for key in preset} == preset
    assert model_config.vocab_size == data.meta["vocab_size"] and model_config.image_dim == 768
    assert list(train.PRESETS) == ["toy", "patches", "laptop", "small", "paper"]


def test_paper_preset_is_the_paper(toy):
    config, model_config = train.make_configs(train.PRESETS["paper"], prepare_data.Data(toy))  # Section 3.4
    assert (config.lr, config.warmup_steps, config.weight_decay, config.grad_clip) == (5e-5, 12000, 0.01, 1.0)
    assert (config.epoch_kinds(), config.batch_tokens) == ("TC" * 10, 64 * 128)  # 64 sequences of 128 tokens
    assert (model_config.n_layer, model_config.n_embd, model_config.n_image_layer, model_config.block_size) == (8, 768, 5, 128)


@pytest.mark.parametrize("flags, folder, tokens", [("", "toy", 1), ("--preset patches", "toy16", 16), ("--n_image_token 16", "toy16", 16)])
def test_missing_toy_data_is_made(toy, toy16, tmp_path, monkeypatch, flags, folder, tokens):
    made = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare_data, "main", lambda argv: made.append(argv) or shutil.copytree(toy16 if tokens == 16 else toy, argv[2]))
    once = f"{TINY} --max_steps 1 {flags}".split()
    train.main([*once, "--out", "one"])
    assert made == [["toy", "--out", os.path.join("data", folder), "--n_image_token", str(tokens)]]
    train.main([*once, "--out", "two"])
    assert len(made) == 1  # it is there now
    config = read("one/config.json")
    assert (config["train"]["data"], config["model"]["n_image_token"]) == (os.path.join("data", folder), tokens)


# ----------------------------------------------------------------------------------------------------------------------
# the order in which data is seen

def stub(lengths, n_text=0):
    """What epoch_plan reads of a data folder: caption lengths and the number of text tokens."""
    return SimpleNamespace(folder="stub", text={"train": np.zeros(n_text, np.uint16)},
                           lengths=lambda split, block: np.minimum(lengths, block))


LENGTHS = np.random.default_rng(3).integers(2, 61, 1000)
STUB = stub(LENGTHS, 5000)


def plan(kind, epoch=0, data=STUB, block_size=32, **values):
    return epoch_plan(kind, epoch, TrainConfig(**{"batch_tokens": 512, "length_multiple": 1} | values), block_size, data)


def equal_plans(a, b):
    return len(a) == len(b) and all(k == l and np.array_equal(x, y) for (k, x), (l, y) in zip(a, b))


@pytest.mark.parametrize("order, epochs, kinds", [
    ("alternate", 3, "TCTCTC"), ("text-first", 2, "TTCC"), ("caption-first", 2, "CCTT"), ("mixed", 3, "MMM"),
    ("caption-only", 2, "CC"), ("text-only", 2, "TT"), ("TTCM", 9, "TTCM"), ("C", 9, "C")])
def test_curriculum_orders(order, epochs, kinds):
    """Named orders expand to `epochs` epochs of each kind; letters stand for themselves."""
    assert TrainConfig(curriculum=order, epochs=epochs).epoch_kinds() == kinds


@pytest.mark.parametrize("n_text", [5000, 33, 32 * 7 + 1, 32 * 8])
def test_text_blocks_are_contiguous_disjoint_and_each_seen_once(n_text):
    """A block of 32 reads 33 tokens (the last is only a target), so n tokens hold (n - 1) // 32 of them, in any order."""
    seen = set()
    for epoch in range(20):
        batches = plan("T", epoch, stub([], n_text))
        assert {kind for kind, _ in batches} == {"T"}
        starts = np.sort(np.concatenate([rows for _, rows in batches]))
        assert len(starts) == (n_text - 1) // 32
        assert (np.diff(starts) == 32).all()
        assert starts[0] >= 0 and starts[-1] + 33 <= n_text
        assert all(len(rows) == 16 for _, rows in batches[:-1])  # 512 tokens
        seen.add(int(starts[0]))
    assert len(seen) > 1 or (n_text - 1) % 32 == 0  # blocks are cut elsewhere in every epoch where the rest allows it


@pytest.mark.parametrize("multiple", [1, 8])
def test_caption_epoch_sees_every_caption_once_in_full_batches_with_little_padding(multiple):
    batches = plan("C", block_size=48, length_multiple=multiple)
    length, real, padded = np.minimum(LENGTHS, 48), 0, 0
    assert sorted(np.concatenate([rows for _, rows in batches])) == list(range(1000))
    short = 0
    for kind, rows in batches:
        T = -(-length[rows].max() // multiple) * multiple
        assert kind == "C" and len(rows) * T <= 512
        short += (len(rows) + 1) * T <= 512  # one more caption would have fitted
        real, padded = real + length[rows].sum(), padded + len(rows) * T
    assert short <= 1  # only the batch that ends the epoch
    assert padded / real < (1.03 if multiple == 1 else 1.2)  # in batches drawn at random, it would be about 1.8
    assert sorted(range(len(batches)), key=lambda i: -length[batches[i][1]].max()) != list(range(len(batches)))  # not longest first


def test_a_caption_longer_than_a_batch_is_a_batch_of_its_own():
    assert [len(rows) for _, rows in plan("C", data=stub(np.array([40, 40, 40])), block_size=48, batch_tokens=10)] == [1, 1, 1]


@pytest.mark.parametrize("mix", [1, 3, 7])
def test_mixed_epoch_has_one_text_batch_after_every_mix_caption_batches(mix):
    """Every caption once, as in a C epoch; text goes round again when it runs out (with mix 1 it does here)."""
    batches = plan("M", mix=mix, data=stub(LENGTHS, 1000))
    n_caption = sum(kind == "C" for kind, _ in batches)
    assert sorted(np.concatenate([rows for kind, rows in batches if kind == "C"])) == list(range(1000))
    kinds = "".join(kind for kind, _ in batches)
    assert kinds == ("C" * mix + "T") * (n_caption // mix) + "C" * (n_caption % mix)
    text = [rows.tolist() for kind, rows in batches if kind == "T"]  # 999 // 32 = 31 blocks: batches of 16 and 15
    assert all(rows == text[i % 2] for i, rows in enumerate(text))
    assert len(np.unique(np.concatenate(text[:2]))) == 31


@pytest.mark.parametrize("kind", "TCM")
def test_plan_is_a_pure_function_of_seed_and_epoch(kind):
    first = plan(kind)
    torch.manual_seed(5), np.random.seed(5)
    assert equal_plans(first, plan(kind))
    assert not equal_plans(first, plan(kind, epoch=1)) and not equal_plans(first, plan(kind, seed=2))
    assert not equal_plans(plan(kind, epoch=1), plan(kind, seed=2))
    assert {len(plan(kind, epoch, seed=seed)) for epoch in range(8) for seed in (1, 2)} == {len(first)}  # so the schedule knows its end


NO_CAPTIONS = stub(np.zeros(0, int), 5000)


@pytest.mark.parametrize("kind, data, advice", [("T", stub(LENGTHS, 32), "caption-only"), ("M", stub(LENGTHS), "caption-only"),
                                                ("C", NO_CAPTIONS, "text-only"), ("M", NO_CAPTIONS, "text-only")])
def test_plan_without_data_says_what_to_use(kind, data, advice):
    with pytest.raises(InputError, match=f"use --curriculum {advice}"):
        plan(kind, data=data)


def test_load_batch_by_hand(letters):
    """Caption 0 is "ab", caption 1 "abcde", both of image 0 or 1 (two captions each); the text starts "abcdefghij"."""
    data, E = prepare_data.Data(letters), 256  # <eot>
    model_config = GateVLMConfig(vocab_size=257, block_size=8, n_image_token=2, image_dim=3)
    a, b, c, d, e, f, g, h, i, j = range(97, 107)

    idx, targets, image = load_batch(("C", np.array([1, 0])), TrainConfig(length_multiple=1), model_config, data, "cpu")
    assert idx.tolist() == [[E, a, b, c, d, e], [E, a, b, E, E, E]]  # a caption starts after <eot>
    assert targets.tolist() == [[a, b, c, d, e, E], [a, b, E, -1, -1, -1]]  # and ends with it; -1 is not counted
    states = np.load(os.path.join(os.path.dirname(letters), "image_caption", "c_states.npy"))
    assert image.dtype == torch.float32 and np.array_equal(image, states[[1, 0]])

    idx, targets, _ = load_batch(("C", np.array([1, 0])), TrainConfig(length_multiple=8), model_config, data, "cpu")
    assert idx.shape == (2, 8) and targets[0].tolist() == [a, b, c, d, e, E, -1, -1]
    small = GateVLMConfig(vocab_size=257, block_size=4, n_image_token=2, image_dim=3)
    idx, targets, _ = load_batch(("C", np.array([1])), TrainConfig(length_multiple=8), small, data, "cpu")
    assert (idx.tolist(), targets.tolist()) == ([[E, a, b, c]], [[a, b, c, d]])  # never longer than a block

    idx, targets, image = load_batch(("T", np.array([0, 5])), TrainConfig(), small, data, "cpu")
    assert (idx.tolist(), targets.tolist(), image) == ([[a, b, c, d], [f, g, h, i]], [[b, c, d, e], [g, h, i, j]], None)
    blind = GateVLMConfig(vocab_size=257, block_size=8, n_image_token=0, image_dim=3)
    assert load_batch(("C", np.array([0])), TrainConfig(), blind, data, "cpu")[2] is None


@pytest.mark.parametrize("step, expected", [
    (0, 0.1), (4, 0.5), (9, 1.0),  # ten warm-up steps: a tenth more each; then (1 + cosine) / 2 of 0, 45, 90, 135 and 180 degrees
    (10, 1.0), (35, 0.5 + 0.5 * math.sqrt(0.5)), (60, 0.5), (85, 0.5 - 0.5 * math.sqrt(0.5)), (110, 0.0)])
def test_learning_rate_by_hand(step, expected):
    assert learning_rate(step, TrainConfig(lr=1.0, warmup_steps=10), 110) == pytest.approx(expected, abs=1e-12)


def test_learning_rate_without_warm_up_and_with_too_much_of_it():
    assert learning_rate(0, TrainConfig(lr=1.0, warmup_steps=0), 100) == 1.0
    rates = [learning_rate(step, TrainConfig(lr=1.0, warmup_steps=1000), 4) for step in range(4)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0])  # a run shorter than its warm-up is all warm-up


# ----------------------------------------------------------------------------------------------------------------------
# optimizers

MODELS = [dict(), dict(tie_weights=False, gate="soft-token"), dict(channel_attention=True, modulation="film"), dict(contrastive="clip"), dict(n_image_token=0)]


def small_model(**variant):
    torch.manual_seed(1)
    return GateVLM(GateVLMConfig(**dict(vocab_size=32, block_size=8, n_layer=2, n_head=2, n_embd=32, n_image_layer=1, image_dim=8, n_image_token=4, dropout=0.0) | variant))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("variant", MODELS, ids=str)
def test_every_parameter_has_one_optimizer_and_only_matrices_decay(variant, optimizer):
    model = small_model(**variant)
    optimizers = train.make_optimizers(model, TrainConfig(optimizer=optimizer, lr=0.5, weight_decay=0.1, beta2=0.8))
    assert [type(x) for x in optimizers] == [torch.optim.AdamW, train.Muon][:1 + (optimizer == "muon")]
    groups = [group for x in optimizers for group in x.param_groups]
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(id(p) for p in model.parameters())
    hidden = {id(p) for x in optimizers[1:] for p in x.param_groups[0]["params"]}
    for name, p in model.named_parameters():
        outside = any(part in name for part in ("embedding", "position", "head", "gate", "bias", "ln", "log_scale"))
        assert (id(p) in hidden) == (optimizer == "muon" and not outside), name
        vector = name.endswith("bias") or ".ln" in name or name.startswith("ln.") or name == "log_scale"
        assert decay[id(p)] == (0.0 if vector else 0.1), name
    assert all(group["lr"] == 0.5 for group in groups) and all(group["betas"] == (0.9, 0.8) for group in optimizers[0].param_groups)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 48), (2, 48, 8), (1, 64, 32)])
def test_orthogonal_turns_every_singular_value_into_about_one(shape):
    """Against the exact polar factor U V^T: in the basis of U and V the result is diagonal, and its diagonal is within 0.6 to 1.3."""
    torch.manual_seed(1)
    U, _, Vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    r = min(shape[1:])
    x = U @ torch.diag(torch.logspace(-2, 0, r, dtype=torch.float64)) @ Vh  # singular values from 0.01 to 1
    diagonal = U.mT @ train.orthogonal(x.float()).double() @ Vh.mT
    found = diagonal.diagonal(dim1=1, dim2=2)
    assert 0.6 < found.min() and found.max() < 1.3
    assert (diagonal - torch.diag_embed(found)).abs().max() < 1e-3
    assert torch.equal(train.orthogonal(torch.zeros(shape)), torch.zeros(shape))  # no gradient, no step


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_muon_steps_as_torch_does():
    """Ten steps of a small model beside torch.optim.Muon, which works in bfloat16 (8 bits): the ways gone agree to its rounding."""
    ours, theirs = small_model(), small_model()
    start = {name: p.clone() for name, p in ours.named_parameters()}
    hidden = lambda model: [m.weight for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and not name.endswith(("gate", "head"))]
    muon = train.Muon(hidden(ours), lr=0.01, weight_decay=0.1)
    reference = torch.optim.Muon(hidden(theirs), lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    generator = torch.Generator().manual_seed(1)
    for step in range(10):
        for p, q in zip(ours.parameters(), theirs.parameters()):
            p.grad = torch.randn(p.shape, generator=generator) if step % 3 or p.dim() != 2 else None  # a text step leaves some without
            q.grad = None if p.grad is None else p.grad.clone()
        for group in muon.param_groups + reference.param_groups:
            group["lr"] = 0.01 * (10 - step)
        muon.step()
        reference.step()
    moved = 0
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
        way = (q - start[name]).norm()
        moved += way > 0
        assert (p - q).norm() <= 0.03 * way, name
    assert moved == len(muon.state) == len(hidden(ours)) > 10


# ----------------------------------------------------------------------------------------------------------------------
# a whole run

def test_run_folder_holds_everything(finished, toy):
    assert {"config.json", "log.jsonl", "last.pt", "best.pt", "loss.png", "gates.png", "summary.json",
            "tokenizer.tiktoken"} <= set(os.listdir(finished.out))
    assert not [name for name in os.listdir(finished.out) if name.endswith(".part")]
    config = read(os.path.join(finished.out, "config.json"))
    assert config["preset"] == "toy" and config["train"]["curriculum"] == "TCM" and config["model"]["n_embd"] == 16
    assert config["train"]["beta2"] == train.PRESETS["toy"]["beta2"] != TrainConfig().beta2  # given by no flag: the preset's
    assert TrainConfig(**config["train"]) and GateVLMConfig(**config["model"])
    text = "the red circle is above a big blue square."
    assert prepare_data.load_tokenizer(finished.out).encode(text) == prepare_data.load_tokenizer(toy).encode(text)
    for name in "loss.png", "gates.png":
        with Image.open(os.path.join(finished.out, name)) as picture:
            picture.load()
            assert 300 <= picture.height <= 1200 and 600 <= picture.width <= 1200


def test_summary_losses_are_those_of_a_plain_loop(finished, toy):
    model, summary = load_model(finished.out), read(os.path.join(finished.out, "summary.json"))
    assert summary == finished.summary
    assert summary["val_loss_caption"] == pytest.approx(mean_token(captions_by_hand(model, toy)), rel=1e-5)
    assert summary["val_loss_caption_no_image"] == pytest.approx(mean_token(captions_by_hand(model, toy, lambda row: None)), rel=1e-5)
    rows = np.load(os.path.join(toy, "caption_val_image.npy")).tolist()
    following = dict(zip(rows, rows[1:] + rows[:1]))  # the toy world has one caption per picture
    assert summary["val_loss_caption_other_image"] == pytest.approx(mean_token(captions_by_hand(model, toy, following.get)), rel=1e-5)
    assert len({summary[f"val_loss_caption{view}"] for view in ("", "_no_image", "_other_image")}) == 3
    assert summary["val_loss_text"] == pytest.approx(text_by_hand(model, toy), rel=1e-5)


def test_summary_counts_floors_and_word_classes(finished, toy):
    summary, meta = finished.summary, read(os.path.join(toy, "meta.json"))
    high, low = meta["floor_text_only"], meta["floor_with_image"]
    assert (summary["floor_text_only"], summary["floor_with_image"]) == (high, low)
    assert summary["visual_information_captured"] == pytest.approx((high - summary["val_loss_caption"]) / (high - low))
    model = load_model(finished.out)
    short = GateVLM(GateVLMConfig(**{**asdict(model.config), "block_size": 8}))  # the floors are those of whole captions, which it cannot read
    assert not {"visual_information_captured", "floor_text_only"} & set(evaluation.report(short, prepare_data.Data(toy)))
    data = prepare_data.Data(toy)
    data.meta["count"]["caption_val_cut"] = 1  # prepare_data.py cuts too
    assert not {"visual_information_captured", "floor_text_only"} & set(evaluation.report(model, data))
    for kind, (gate, loss) in words_by_hand(model, toy, [0, 1]).items():
        assert summary[f"gate_{kind}_words"] == pytest.approx(gate, rel=1e-5)
        assert summary[f"val_loss_{kind}_words"] == pytest.approx(loss, rel=1e-5)
    weights = load_checkpoint(os.path.join(finished.out, "best.pt"))["model"]  # a tied head is stored twice and counted once
    buffers = ("gate_temperature", "image_encoder.mean", "image_encoder.std", "head.weight")
    assert summary["n_parameter"] == sum(w.numel() for name, w in weights.items() if name not in buffers)
    assert summary["tokens_per_second"] == pytest.approx(summary["tokens_seen"] / (60 * summary["minutes"]), abs=0.51)


def test_log_follows_the_curriculum(finished, toy):
    """2,474 // 16 text blocks at 64 per batch, every caption twice (C and M), one text batch after every two in M."""
    data = prepare_data.Data(toy)
    n_text = (len(data.text["train"]) - 1) // 16
    n_caption, caption_tokens = len(plan("C", data=data, block_size=16, batch_tokens=1024)), int(data.offset["train"][-1])
    assert data.lengths("val", 99).max() <= 16  # so no caption is cut here
    kinds = "T" * -(-n_text // 64) + "C" * n_caption + ("CCT" * (n_caption // 2) + "C" * (n_caption % 2))
    lines = steps(finished.out)
    assert "".join(line["kind"] for line in lines) == kinds
    assert [line["step"] for line in lines] == list(range(1, len(kinds) + 1))
    assert [line["lr"] for line in lines] == [learning_rate(i, TrainConfig(lr=0.01, warmup_steps=4), len(kinds)) for i in range(len(kinds))]
    text_tokens = [line["tokens_seen"] for line in lines if line["kind"] == "T" and line["epoch"] == 0]
    assert text_tokens[0] == 64 * 16 and text_tokens[-1] == n_text * 16
    mixed = sum(line["tokens_seen"] - before["tokens_seen"] for before, line in zip(lines, lines[1:])
                if line["kind"] == "C")
    assert mixed == 2 * caption_tokens
    assert finished.summary["tokens_seen"] == lines[-1]["tokens_seen"] == state(finished.out)["now"]["tokens_seen"]
    assert lines[0]["loss"] == pytest.approx(math.log(data.meta["vocab_size"]), rel=0.05)  # an untrained model knows nothing
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
    for line in lines:  # gates belong to captions: a text batch does not look
        assert ("gate_mean" in line) == ("gate_std" in line) == (line["kind"] == "C")
        assert line["kind"] == "T" or len(line["gate_mean"]) == 2 and 0 < min(line["gate_mean"]) < max(line["gate_mean"]) < 1
    validated = [line["step"] for line in log(finished.out) if "val_loss_caption" in line]
    assert validated == [*range(4, len(kinds), 4)] + [len(kinds)]


def test_best_checkpoint_is_the_lowest_validation_loss(toy, tmp_path, monkeypatch):
    losses = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(evaluation, "validate", lambda *_: {"val_loss_caption": next(losses), "val_loss_text": 0.0})
    summary = run(tmp_path / "run", toy, "--max_steps 6 --eval_interval 2")
    assert (summary["best_step"], summary["step"]) == (4, 6)
    assert state(tmp_path / "run", "best.pt")["now"]["step"] == 4 and state(tmp_path / "run")["now"]["best"] == 1.0
    losses = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(evaluation, "validate", lambda *_: {"val_loss_caption": 0.0, "val_loss_text": next(losses)})
    assert run(tmp_path / "text", toy, "--max_steps 6 --eval_interval 2 --curriculum text-only")["best_step"] == 4  # no captions trained


def test_image_encoder_knows_the_statistics_of_the_training_images(letters, tmp_path):
    run(tmp_path / "run", letters, "--max_steps 1 --n_image_token 2")
    states = np.load(os.path.join(os.path.dirname(letters), "image_caption", "c_states.npy"))[::2]  # each is there twice
    weights = state(tmp_path / "run")["model"]
    assert weights["image_encoder.mean"].numpy() == pytest.approx(states.mean(axis=(0, 1)), abs=1e-6)
    assert weights["image_encoder.std"].numpy() == pytest.approx(states.std(axis=(0, 1)), abs=2e-3)


def test_without_images_captions_are_text(toy, tmp_path):
    summary = run(tmp_path / "run", toy, "--no-images --curriculum TC")
    weights = state(tmp_path / "run")["model"]
    assert not [name for name in weights if re.search("image|cross|gate\\.", name)]
    assert summary["gate_function_words"] is None and summary["gate_content_words"] is None
    by_hand = mean_token(captions_by_hand(load_model(tmp_path / "run"), toy))
    for view in "", "_no_image", "_other_image":
        assert summary[f"val_loss_caption{view}"] == pytest.approx(by_hand, rel=1e-5)
    assert not os.path.exists(tmp_path / "run" / "gates.png") and os.path.exists(tmp_path / "run" / "loss.png")
    assert not any("gate_mean" in line for line in log(tmp_path / "run"))


def test_hard_gates_anneal_with_caption_steps_and_decide_in_the_summary(toy, tmp_path):
    """Temperature 1 - 0.9 * min(done / 0.8, 1): with C caption steps in all, the k-th (from 0) runs at done = k / C."""
    out, n = tmp_path / "run", len(plan("C", data=prepare_data.Data(toy), block_size=16, batch_tokens=512))
    n_text = len(plan("T", data=prepare_data.Data(toy), block_size=16, batch_tokens=512))
    flags = f"--gate hard-token --curriculum CTC --batch_tokens 512 --stop_after {n + n_text + 1}"
    assert run(out, toy, flags) is None
    temperature = lambda: state(out)["model"]["gate_temperature"].item()
    assert temperature() == pytest.approx(1 - 0.9 * (n / (2 * n)) / 0.8)  # n captions steps done, n to go; text does not count
    summary = resume(out)
    assert temperature() == pytest.approx(0.1)
    model = load_model(out)
    gates = np.concatenate([gates for _, _, gates in captions_by_hand(model, toy)], axis=1)
    assert set(np.unique(gates)) == {0.0, 1.0}  # without noise, one or the other
    for kind, (gate, _) in words_by_hand(model, toy, [0, 1]).items():
        assert summary[f"gate_{kind}_words"] == pytest.approx(gate, rel=1e-6)
    assert summary["val_loss_caption"] == pytest.approx(mean_token(captions_by_hand(model, toy)), rel=1e-5)


def test_gate_none_has_no_gates_to_report(toy, tmp_path):
    summary = run(tmp_path / "run", toy, "--gate none --curriculum C")
    assert summary["gate_function_words"] is None and summary["gate_content_words"] is None
    for kind, (_, loss) in words_by_hand(load_model(tmp_path / "run"), toy, [0, 1]).items():
        assert summary[f"val_loss_{kind}_words"] == pytest.approx(loss, rel=1e-5)
    assert not os.path.exists(tmp_path / "run" / "gates.png")
    assert summary["val_loss_caption"] != summary["val_loss_caption_no_image"]


def test_lcg_leaves_block_0_out_of_gate_means(toy16, tmp_path):
    """Block 0 never looks under LCG, so its gate is 1 by definition and would only dilute the mean."""
    summary = run(tmp_path / "run", toy16, "--contrastive lcg --curriculum TC --image_encoder none")
    model = load_model(tmp_path / "run")
    assert all((gates[0] == 1).all() for _, _, gates in captions_by_hand(model, toy16))
    for kind, (gate, _) in words_by_hand(model, toy16, [1]).items():
        assert summary[f"gate_{kind}_words"] == pytest.approx(gate, rel=1e-5)
    assert all(("contrastive" in line) == (line["kind"] == "C") for line in steps(tmp_path / "run"))


def test_data_with_only_text_or_only_captions(tmp_path):
    """The refusal names the curriculum to use, and using it works."""
    rng = np.random.default_rng(0)
    (tmp_path / "t").mkdir(), (tmp_path / "c").mkdir()
    only_text = babylm_folder(tmp_path / "t", text="to be or not to be. " * 20, val_text="to be or so.")
    only_captions = babylm_folder(tmp_path / "c", ["a dog", "the car is red"] * 8, rng.normal(size=(16, 3)),
                                  val_captions=["a car"], val_states=rng.normal(size=(1, 3)))

    assert "--curriculum text-only" in refused(*TINY.split(), "--data", only_text, "--out", tmp_path / "1")
    summary = run(tmp_path / "1", only_text, "--curriculum text-only --epochs 1")
    assert summary["val_loss_text"] == pytest.approx(text_by_hand(load_model(tmp_path / "1"), only_text), rel=1e-5)
    assert summary["val_loss_caption"] is None and summary["gate_function_words"] is None
    assert "floor_with_image" not in summary and "visual_information_captured" not in summary

    assert "--curriculum caption-only" in refused(*TINY.split(), "--data", only_captions, "--out", tmp_path / "2")
    summary = run(tmp_path / "2", only_captions, "--curriculum caption-only --epochs 1")
    assert summary["val_loss_text"] is None
    assert summary["val_loss_caption"] == pytest.approx(mean_token(captions_by_hand(load_model(tmp_path / "2"), only_captions)), rel=1e-5)
    assert os.path.exists(tmp_path / "1" / "loss.png") and os.path.exists(tmp_path / "2" / "loss.png")


def test_text_only_curriculum_leaves_image_modules_as_they_were(toy, tmp_path):
    run(tmp_path / "run", toy, "--curriculum text-only --epochs 1 --stop_after 1")
    first = state(tmp_path / "run")["model"]
    resume(tmp_path / "run")
    last = state(tmp_path / "run")["model"]
    changed = {name for name in last if not torch.equal(first[name], last[name])}
    assert changed and not [name for name in changed if re.search("image_encoder|cross|gate|ln2|ln4", name)]  # not even decayed


# ----------------------------------------------------------------------------------------------------------------------
# exact resume

VARIANTS = {
    "soft-feature, dropout": "--dropout 0.2",
    "muon": "--optimizer muon",
    "hard-token: noise and temperature": "--gate hard-token",
    "clip": "--contrastive clip --dropout 0.1",
    "lcg": "--contrastive lcg --dropout 0.1",
    "patches": "--n_image_token 16 --channel_attention --dropout 0.1 --batch_tokens 512",
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_ten_steps_are_five_and_five(variant, toy, toy16, tmp_path):
    """Stopped inside a text epoch, at its end, inside captions, at their end, and inside a mixed epoch: nothing differs by a bit."""
    data = toy16 if variant == "patches" else toy
    flags = f"{VARIANTS[variant]} --curriculum TCMC --grad_accum 2 --eval_interval 3 --save_interval 4"
    whole = run(tmp_path / "whole", data, flags)
    ends = np.cumsum([sum(line["epoch"] == epoch for line in steps(tmp_path / "whole")) for epoch in range(4)]).tolist()
    assert min(np.diff([0, *ends])) >= 3  # every epoch has an inside
    stops = [1, ends[0], ends[0] + 1, ends[1], ends[1] + 2, ends[2]]
    for i, stop in enumerate(stops):
        stop_after = f"--stop_after {stop}"
        assert (resume(tmp_path / "parts", stop_after) if i else run(tmp_path / "parts", data, f"{flags} {stop_after}")) is None
        assert state(tmp_path / "parts")["now"]["step"] == stop
    parts = resume(tmp_path / "parts")
    for name in "last.pt", "best.pt":
        a, b = state(tmp_path / "whole", name), state(tmp_path / "parts", name)
        assert a["now"] == b["now"] and same(a["model"], b["model"]) and same(a["optimizers"], b["optimizers"])
    assert log(tmp_path / "whole") == log(tmp_path / "parts")
    timing = "tokens_per_second", "minutes"
    assert {k: v for k, v in whole.items() if k not in timing} == {k: v for k, v in parts.items() if k not in timing}


def test_resume_after_a_crash_repeats_what_was_lost(toy, tmp_path, monkeypatch, capsys):
    """The crash comes at step 6, the last save was at 4: the log's lines of steps 5 and 6 are written again, once."""
    flags = "--curriculum TC --max_steps 8 --dropout 0.2 --save_interval 4 --eval_interval 5"
    run(tmp_path / "whole", toy, flags)

    def crash(step, *rest):
        if step == 6:
            raise RuntimeError("power cut")
        return learning_rate(step, *rest)
    monkeypatch.setattr(train, "learning_rate", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "run", toy, flags)
    assert state(tmp_path / "run")["now"]["step"] == 4 and log(tmp_path / "run")[-1]["step"] == 6
    monkeypatch.undo()
    resume(tmp_path / "run")
    assert same(state(tmp_path / "whole"), state(tmp_path / "run")) and log(tmp_path / "whole") == log(tmp_path / "run")


def test_resume_of_a_finished_run_only_reports(finished, tmp_path):
    shutil.copytree(finished.out, tmp_path / "copy")
    before = state(finished.out), log(finished.out), os.stat(os.path.join(finished.out, "last.pt")).st_mtime_ns
    assert resume(finished.out) == finished.summary
    assert same(state(finished.out), before[0]) and log(finished.out) == before[1]
    assert os.stat(os.path.join(finished.out, "last.pt")).st_mtime_ns == before[2]


@pytest.mark.parametrize("flag, value, was", [("lr", "0.5", "0.01"), ("n_layer", "3", "2"), ("batch_tokens", "64", "1024"),
                                              ("curriculum", "T", "TCM"), ("gate", "none", "soft-feature"), ("seed", "2", "1"), ("preset", "laptop", "toy")])
def test_resume_refuses_other_values(finished, flag, value, was):
    message = refused("--resume", "--out", finished.out, f"--{flag}", value)
    assert f"--{flag} {value}" in message and was in message and finished.out in message


def test_resume_accepts_the_same_value_and_what_is_free(toy, tmp_path):
    out = tmp_path / "run"
    run(out, toy, "--max_steps 4 --stop_after 2")
    assert resume(out, "--lr 0.01 --stop_after 3 --device cpu --no-compile --log_interval 2 --eval_interval 3 --save_interval 7") is None
    assert state(out)["now"]["step"] == 3
    assert load_checkpoint(out / "last.pt")["config"]["save_interval"] == 7
    assert resume(out, "--stop_after 0")["step"] == 4


def test_the_same_line_starts_a_run_goes_on_with_it_and_reports_it(toy, tmp_path):
    """README's loops over runs are typed again after an interruption: --resume starts where nothing is saved yet."""
    again = lambda: train.main([*TINY.split(), "--data", str(toy), "--max_steps", "4", "--seed", "3", "--resume", "--out", str(tmp_path / "run")])
    first = again()
    assert first["step"] == 4 and same(state(tmp_path / "run")["model"], state(run(tmp_path / "other", toy, "--max_steps 4 --seed 3") and tmp_path / "other")["model"])
    assert again() == first  # finished: only reported


def test_a_start_needs_a_free_folder(finished, toy, tmp_path):
    before = state(finished.out)
    message = refused(*TINY.split(), "--data", toy, "--out", finished.out)
    assert finished.out in message and "--resume" in message
    assert same(before, state(finished.out))


# ----------------------------------------------------------------------------------------------------------------------
# what must not change training

@pytest.mark.parametrize("gate", ["soft-feature", "hard-feature"])
def test_evaluating_logging_and_saving_never_change_training(gate, toy, tmp_path):
    flags = f"--gate {gate} --dropout 0.2 --curriculum MT --max_steps 9"
    run(tmp_path / "rare", toy, f"{flags} --eval_interval 1000 --log_interval 1000 --save_interval 1000")
    rare = state(tmp_path / "rare")
    for evaluate, write, save in (1, 1, 1), (2, 3, 1000), (1000, 1, 2):
        out = tmp_path / f"{evaluate} {write} {save}"
        run(out, toy, f"{flags} --eval_interval {evaluate} --log_interval {write} --save_interval {save}")
        often = state(out)
        assert same(rare["model"], often["model"]) and same(rare["optimizers"], often["optimizers"])


def assert_same_training(a, b):
    """Equal up to float rounding. Losses and gradient norms of every step and Adam's averages of the gradient are compared as they are;
    weights where the gradient is more than rounding, since Adam divides by its size (the bias of a key has gradient 0 in theory)."""
    for x, y in zip(steps(a), steps(b), strict=True):
        assert x["kind"] == y["kind"] and x["tokens_seen"] == y["tokens_seen"]
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-4) and x["grad_norm"] == pytest.approx(y["grad_norm"], rel=1e-3)
    a, b = state(a), state(b)
    names = [name for name in a["model"] if name not in ("gate_temperature", "image_encoder.mean", "image_encoder.std", "head.weight")]
    names.sort(key=lambda name: a["model"][name].dim() < 2)  # the optimizer's order: matrices, then vectors
    one_key = len(a["model"].get("image_encoder.position", ())) == 1  # which needs no query
    without = {i for i, name in enumerate(names) if ".cross.query." in name and one_key}
    assert a["optimizers"][0]["state"].keys() == b["optimizers"][0]["state"].keys() == set(range(len(names))) - without
    compared = 0
    for i, name in enumerate(names):
        if i in without:
            continue
        x, y = a["optimizers"][0]["state"][i], b["optimizers"][0]["state"][i]
        torch.testing.assert_close(x["exp_avg"], y["exp_avg"], rtol=1e-3, atol=2e-6)
        real = x["exp_avg_sq"].sqrt() > 1e-5
        torch.testing.assert_close(a["model"][name][real], b["model"][name][real], rtol=0, atol=2e-4)
        compared += real.sum().item()
    assert compared > 3000


UNEQUAL = "--curriculum TC --block_size 32 --batch_tokens 240 --grad_clip 0 --n_image_token 2"


def test_unequal_batches(letters):
    """The batches of UNEQUAL: an odd number of rows, a single row (fewer than micro-batches or processes), captions of several lengths."""
    data = prepare_data.Data(letters)
    assert [len(rows) for _, rows in plan("T", data=data, batch_tokens=240)] == [7, 7, 1]
    captions = [rows for _, rows in plan("C", data=data, batch_tokens=240)]
    assert any(len(rows) % 2 for rows in captions) and any(np.ptp(data.lengths("train", 32)[rows]) > 5 for rows in captions)


def test_gradient_accumulation_is_the_big_batch(letters, tmp_path):
    for n in 1, 2, 4:
        run(tmp_path / str(n), letters, f"{UNEQUAL} --grad_accum {n}")
    assert_same_training(tmp_path / "1", tmp_path / "2")
    assert_same_training(tmp_path / "1", tmp_path / "4")


def test_two_processes_are_one(letters, tmp_path):
    """torchrun with 2 processes x 2 micro-batches = 1 process with whole batches; only rank 0 writes and prints."""
    flags = [*TINY.split(), "--data", letters, *UNEQUAL.split(), "--grad_accum", "2", "--out", str(tmp_path / "two")]
    result = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", TRAIN_PY, *flags],
                            capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert result.returncode == 0, result.stderr
    summary = run(tmp_path / "one", letters, UNEQUAL)
    assert_same_training(tmp_path / "one", tmp_path / "two")
    assert result.stdout.count("parameters on cpu") == result.stdout.count("everything is in") == 1
    assert [line["step"] for line in steps(tmp_path / "two")] == list(range(1, summary["step"] + 1))
    assert read(tmp_path / "two" / "summary.json")["val_loss_caption"] == pytest.approx(summary["val_loss_caption"], rel=1e-4)


def test_two_processes_log_the_contrastive_loss_of_both(toy, tmp_path):
    """A contrastive loss compares within a micro-batch: 2 processes hold the halves that 1 process with 2 micro-batches has one after the other."""
    flags = "--curriculum C --max_steps 2 --contrastive clip --data".split() + [toy]
    result = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", TRAIN_PY, *TINY.split(), *flags, "--out", str(tmp_path / "two")],
                            capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert result.returncode == 0, result.stderr
    run(tmp_path / "one", toy, " ".join(flags) + " --grad_accum 2")
    one, two = ([line["contrastive"] for line in steps(tmp_path / name)] for name in ("one", "two"))
    assert len(one) == 2 and two == pytest.approx(one, rel=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# every field of TrainConfig does something, and only that

def observe(out, data, flags):
    """What one run did: {"weights", "order" (first tokens of every micro-batch), "shapes", "kinds", "lr", "losses", ...}."""
    saved, shapes, order, kept = [], [], [], []
    save, forward = train.save_checkpoint, GateVLM.forward

    def saving(path, checkpoint, previous=None):
        saved.append((os.path.basename(path), checkpoint["now"]["step"]))
        save(path, checkpoint, previous)

    def looking(self, idx, targets=None, image=None, keep=None, **rest):
        shapes.append(tuple(idx.shape))
        order.append(idx[0, :6].tolist())
        kept.append(None if keep is None else keep.size(1))
        return forward(self, idx, targets, image, keep, **rest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "save_checkpoint", saving)
        patch.setattr(GateVLM, "forward", looking)
        summary = run(out, data, f"--curriculum TC --max_steps 5 --eval_interval 2 --save_interval 2 --dropout 0.1 {flags}")
    lines = steps(out)
    return {"weights": state(out)["model"], "order": order, "shapes": shapes, "k": kept, "kinds": [line["kind"] for line in lines],
            "lr": [line["lr"] for line in lines], "first loss": lines[0]["loss"], "logged at": [line["step"] for line in lines],
            "evaluations": [(line["step"], line["val_loss_caption"]) for line in log(out) if "val_loss_caption" in line],
            "saved": [step for name, step in saved if name == "last.pt"], "kept": [step for name, step in saved if name.startswith("step_")],
            "steps": state(out)["now"]["step"],
            "folder": read(os.path.join(out, "config.json"))["train"]["out"], "finished": summary is not None}


ELIDED = "--curriculum C --elide random --elide_warmup 1 --elide_cycle 4 --elide_dense 0"
REPEATED = "--curriculum CCCCC --batch_tokens 4096 --elide regate --teacher {blind} --elide_warmup 1 --elide_cycle 4 --elide_dense 0"  # each step is an epoch
FIELDS = {  # field: (flags, other flags, what must differ, what must not)
    "data": ("--batch_tokens 240", "--batch_tokens 240 --data {letters}", {"order", "weights"}, {"steps", "lr"}),
    "out": ("", "", {"folder"}, {"weights", "order", "lr", "evaluations", "saved"}),
    "seed": ("", "--seed 2", {"order", "weights"}, {"kinds", "lr"}),
    "curriculum": ("", "--curriculum CT", {"kinds", "order", "weights"}, {"lr", "steps"}),
    "epochs": ("--curriculum text-only --max_steps 0 --epochs 1", "--curriculum text-only --max_steps 0 --epochs 2", {"steps", "lr"},
               {"first loss"}),
    "mix": ("--curriculum M --mix 1", "--curriculum M --mix 2", {"kinds"}, {"lr", "first loss"}),
    "max_steps": ("", "--max_steps 3", {"steps", "lr"}, {"first loss"}),
    "images": ("", "--no-images", {"weights", "evaluations"}, {"kinds", "order", "lr"}),
    "batch_tokens": ("", "--batch_tokens 512", {"shapes", "weights"}, {"steps"}),
    "grad_accum": ("", "--grad_accum 2", {"shapes"}, {"kinds", "lr", "steps"}),
    "length_multiple": ("", "--length_multiple 16", {"shapes"}, {"kinds", "lr", "first loss"}),
    "optimizer": ("", "--optimizer muon", {"weights"}, {"order", "lr", "first loss"}),
    "lr": ("", "--lr 0.02", {"lr", "weights"}, {"order", "first loss"}),
    "warmup_steps": ("", "--warmup_steps 2", {"lr", "weights"}, {"order", "first loss"}),
    "weight_decay": ("", "--weight_decay 0.5", {"weights"}, {"order", "lr", "first loss"}),
    "beta2": ("", "--beta2 0.9", {"weights"}, {"order", "lr", "first loss"}),
    "grad_clip": ("--grad_clip 0", "--grad_clip 0.1", {"weights"}, {"order", "lr", "first loss"}),
    "eval_interval": ("", "--eval_interval 3", {"evaluations"}, {"weights", "saved", "logged at"}),
    "eval_tokens": ("", "--eval_tokens 100", {"evaluations"}, {"weights", "saved", "logged at"}),
    "log_interval": ("", "--log_interval 2", {"logged at"}, {"weights", "saved", "evaluations"}),
    "save_interval": ("", "--save_interval 3", {"saved"}, {"weights", "logged at", "evaluations"}),
    "elide": ("--curriculum C", ELIDED, {"k", "weights"}, {"order", "lr", "first loss"}),
    "keep_ratio": (ELIDED, f"{ELIDED} --keep_ratio 0.3", {"k", "weights"}, {"order", "lr", "first loss"}),
    "elide_warmup": (ELIDED, f"{ELIDED} --elide_warmup 3", {"k", "weights"}, {"order", "lr", "first loss"}),
    "elide_cycle": (f"{ELIDED} --elide_dense 1", f"{ELIDED} --elide_dense 1 --elide_cycle 2", {"k", "weights"}, {"order", "lr", "first loss"}),
    "elide_dense": (ELIDED, f"{ELIDED} --elide_dense 1", {"k", "weights"}, {"order", "lr", "first loss"}),
    "elide_lambda": (REPEATED, f"{REPEATED} --elide_lambda 30", {"weights"}, {"k", "order", "first loss"}),
    "elide_beta": (REPEATED, f"{REPEATED} --elide_beta 0.1", {"weights"}, {"k", "order", "first loss"}),
    "elide_tail": (ELIDED, f"{ELIDED} --elide_tail 0.5", {"k", "weights"}, {"order", "lr", "first loss"}),
    "elide_text": (f"{ELIDED} --curriculum T", f"{ELIDED} --curriculum T --elide_text", {"k", "weights"}, {"order", "lr", "first loss"}),
    "elide_visible": (ELIDED, f"{ELIDED} --elide_visible", {"weights"}, {"k", "order", "lr", "first loss"}),
    "keep_checkpoints": ("", "--keep_checkpoints", {"kept"}, {"weights", "saved", "evaluations", "logged at"}),
    "stop_after": ("", "--stop_after 3", {"finished", "steps", "weights"}, {"first loss"}),
}
ON_CUDA = {"device", "autocast", "compile"}  # the test below this one
ELSEWHERE = {"teacher"}  # test_elision.py


@pytest.fixture(scope="module")
def observed(toy, letters, tmp_path_factory):
    """flags -> what a run with them did; a run that several fields are compared with is made once."""
    known, blind = {}, tmp_path_factory.mktemp("observed") / "blind"
    run(blind, toy, "--no-images --curriculum C --max_steps 2")

    def look(flags, fresh=False):
        if fresh or flags not in known:
            known[flags] = observe(tmp_path_factory.mktemp("observed") / "run", toy, flags.format(letters=letters, blind=blind))
        return known[flags]
    return look


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_changes_what_it_should_and_nothing_else(field, observed):
    flags, other, differ, equal = FIELDS[field]
    a, b = observed(flags), observed(other, fresh=field == "out")
    assert {key for key in differ if same(a[key], b[key])} == set()
    assert {key for key in equal if not same(a[key], b[key])} == set()


def test_no_field_is_forgotten():
    assert set(FIELDS) | ON_CUDA | ELSEWHERE == {f.name for f in fields(TrainConfig)}


def test_weight_decay_by_hand(toy, tmp_path):
    """AdamW first multiplies every matrix by 1 - lr * decay, then takes a step that does not know of the decay; biases do not decay."""
    for decay in 0, 2:
        run(tmp_path / str(decay), toy, f"--max_steps 1 --curriculum C --weight_decay {decay} --lr 0.01 --warmup_steps 0 --seed 3")
    plain, decayed = (state(tmp_path / name)["model"] for name in "02")
    config = load_model(tmp_path / "0").config
    torch.manual_seed(3)
    start = dict(GateVLM(config).named_parameters())
    for name, weight in start.items():
        if ".cross.query." in name:
            continue  # one image token needs no query, which then has no gradient
        expected = plain[name] - (0.02 * weight.detach() if weight.dim() >= 2 else 0)
        torch.testing.assert_close(decayed[name], expected, rtol=2e-7, atol=1e-7)  # rounding of float32


def test_gradient_clipping_by_hand(toy, tmp_path):
    """After one step, AdamW's average of the gradient is a tenth of it (beta1 is 0.9): of the length that clipping left."""
    for clip in 0, 0.25:
        run(tmp_path / str(clip), toy, f"--max_steps 1 --curriculum C --grad_clip {clip} --grad_accum 2")
        norm = steps(tmp_path / str(clip))[0]["grad_norm"]  # logged as it was before clipping
        assert norm > 0.5
        average = torch.cat([s["exp_avg"].flatten() for s in state(tmp_path / str(clip))["optimizers"][0]["state"].values()])
        assert average.norm().item() == pytest.approx(0.1 * (clip or norm), rel=1e-4)


class CudaOnCpu(TorchFunctionMode):
    """A pretended GPU: whatever should go to cuda goes to the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        cpu = lambda x: torch.device("cpu") if isinstance(x, torch.device) and x.type == "cuda" else x
        return function(*map(cpu, args), **{k: cpu(v) for k, v in (kwargs or {}).items()})


@pytest.mark.parametrize("flags, device, compiled, low_precision", [
    ("--device cpu", "cpu", 0, 0), ("--device auto", "cuda:0", 1, 2), ("--device cuda", "cuda:0", 1, 2),
    ("--device cuda --no-compile", "cuda:0", 0, 2), ("--device cuda --no-autocast", "cuda:0", 1, 0)])
def test_device_autocast_and_compile(toy, tmp_path, monkeypatch, capsys, flags, device, compiled, low_precision):
    """On cuda the model is compiled once, and each of the 2 steps runs in bfloat16; the CPU gets neither."""
    calls, autocast, pick_device = [], torch.autocast, train.pick_device

    def pretending(*wanted):  # only while a device is picked: a torch built for CUDA would go on and ask the driver
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            return pick_device(*wanted)
    monkeypatch.setattr(train, "pick_device", pretending)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda *_: None)
    monkeypatch.setattr(torch, "compile", lambda model: calls.append("compile") or model)

    class Cast(autocast):
        def __init__(self, kind, dtype):
            assert (kind, dtype) == ("cuda", torch.bfloat16)
            super().__init__("cpu", dtype)

        def __enter__(self):
            calls.append("autocast")
            return super().__enter__()
    monkeypatch.setattr(torch, "autocast", Cast)
    monkeypatch.setattr(train, "finish", lambda *_: None)
    with CudaOnCpu():
        run(tmp_path / "run", toy, f"--max_steps 2 --curriculum C {flags}")
    assert f"parameters on {device}" in capsys.readouterr().out
    assert (calls.count("compile"), calls.count("autocast")) == (compiled, low_precision)
    assert all(w.dtype == torch.float32 for w in state(tmp_path / "run")["model"].values())  # the weights stay whole


# ----------------------------------------------------------------------------------------------------------------------
# when something goes wrong, and Ctrl-C

def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_save(toy, tmp_path, monkeypatch):
    """Step 5 goes wrong, by a cosmic ray; last.pt is of step 4, and the run goes on from there as if nothing had been."""
    flags = "--curriculum TC --max_steps 7 --save_interval 2 --eval_interval 1 --dropout 0.1"
    run(tmp_path / "whole", toy, flags)
    forward, calls = GateVLM.forward, []

    def ray(self, *args, **options):
        logits, loss, gates = forward(self, *args, **options)
        calls.append(1)
        return logits, loss * (math.nan if len(calls) == 5 else 1), gates
    monkeypatch.setattr(GateVLM, "forward", ray)
    message = refused(*TINY.split(), "--data", toy, "--out", tmp_path / "run", *flags.split())
    assert "step 5 " in message and "--lr" in message
    monkeypatch.undo()
    assert state(tmp_path / "run")["now"]["step"] == 4 and load_model(tmp_path / "run", "last.pt")
    assert all(math.isfinite(line["loss"]) for line in steps(tmp_path / "run"))
    resume(tmp_path / "run")
    assert same(state(tmp_path / "whole"), state(tmp_path / "run"))


def test_a_learning_rate_that_explodes_names_its_step(toy, tmp_path):
    """The first step is still finite (it starts from good weights); the second meets weights of 1e30."""
    flags = "--lr 1e30 --warmup_steps 0 --save_interval 1"
    assert "step 2 " in refused(*TINY.split(), "--data", toy, "--out", tmp_path / "run", *flags.split())
    assert load_checkpoint(tmp_path / "run" / "last.pt")["now"]["step"] == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_resume_is_exact(toy, tmp_path, monkeypatch, capsys, number):
    """The signal comes during step 4 (step counts from 0): that step is finished and saved."""
    flags = "--curriculum TC --max_steps 7 --dropout 0.1"
    run(tmp_path / "whole", toy, flags)
    before = signal.getsignal(number)

    def interrupted(step, *rest):
        if step == 4:
            signal.raise_signal(number)
        return learning_rate(step, *rest)
    monkeypatch.setattr(train, "learning_rate", interrupted)
    assert run(tmp_path / "run", toy, flags) is None
    assert f"python train.py --resume --out {tmp_path / 'run'}" in capsys.readouterr().out
    assert signal.getsignal(number) == before
    assert state(tmp_path / "run")["now"]["step"] == 5
    monkeypatch.undo()
    resume(tmp_path / "run")
    assert same(state(tmp_path / "whole"), state(tmp_path / "run")) and log(tmp_path / "whole") == log(tmp_path / "run")


def test_ctrl_c_from_outside_exits_with_0(toy, tmp_path):
    out = tmp_path / "run"
    # validating at every step makes the run take seconds, so that the signal comes long before its end
    flags = [*TINY.split(), "--data", toy, "--out", str(out), "--curriculum", "TC" * 20, "--max_steps", "120", "--eval_interval", "1"]
    process = subprocess.Popen([sys.executable, TRAIN_PY, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    while process.poll() is None and not (os.path.exists(out / "log.jsonl") and os.path.getsize(out / "log.jsonl")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    command = re.search(r"python train\.py (--resume --out \S+)", stdout).group(1)
    stopped = state(out)["now"]["step"]
    assert 0 < stopped < 120 and "Traceback" not in stderr
    assert train.main([*command.split(), "--eval_interval", "1000"])["step"] == 120
    assert [line["step"] for line in steps(out)] == list(range(1, 121))


# ----------------------------------------------------------------------------------------------------------------------
# eval.py

@pytest.fixture(scope="module")
def pieces():
    """A tokenizer of bytes and six pieces; "purple" and "café" take two tokens."""
    tokens = [bytes([i]) for i in range(256)] + [b"the", b" pur", b"ple", b" cross", b" caf", "é".encode()]
    encoding = tiktoken.Encoding("pieces", pat_str=r"\s+|\S+", mergeable_ranks={t: i for i, t in enumerate(tokens)},
                                 special_tokens={"<|endoftext|>": 262})
    return encoding, {t.decode(): i for i, t in enumerate(tokens) if i < 128 or i >= 256} | {"<eot>": 262}


@pytest.mark.parametrize("spelled, words", [
    (["the", " pur", "ple", " cross", ".", "<eot>"], [("the", 0, 1), ("purple", 1, 3), ("cross", 3, 4), (".", 4, 5)]),  # a word is read where it starts
    (["the", " cross", "?", " caf", "é", "<eot>"], [("the", 0, 1), ("cross", 1, 2), ("?", 2, 3), ("café", 3, 5)]),
    (["A", ":", " ", "h", "i", "\n", "B", ":"], [("A", 0, 1), (":", 1, 2), ("hi", 2, 5), ("B", 5, 7), (":", 7, 8)]),  # the space belongs to the word
    (["the", " ", "?", "<eot>"], [("the", 0, 1), ("?", 2, 3)]),  # a space alone is no word
    (["<eot>"], []), ([], [])])
def test_words_of(pieces, spelled, words):
    encoding, ids = pieces
    assert evaluation.words_of([ids[piece] for piece in spelled], encoding) == words


@pytest.mark.parametrize("word, upos, expected", [
    ("the", None, "function"), ("The", None, "function"), ("on", None, "function"), ("is", None, "function"), ("dog", None, "content"),
    ("Mountain", None, "content"), (".", None, "other"), ("42", None, "other"),
    ("red", {"red": "ADJ"}, "content"), ("Red", {"red": "ADJ"}, "content"), ("of", {"of": "ADP"}, "function"),
    ("yes", {"yes": "INTJ"}, "other"), ("dog", {"red": "ADJ"}, "other")])  # a table of tags has the last word
def test_word_class(word, upos, expected):
    assert evaluation.word_class(word, upos) == expected


@pytest.fixture(scope="module")
def letters_run(letters, tmp_path_factory):
    out = tmp_path_factory.mktemp("letters_run") / "run"
    summary = run(out, letters, "--block_size 32 --n_image_token 2 --curriculum TCC --batch_tokens 240")
    return SimpleNamespace(out=str(out), summary=summary)


@pytest.mark.parametrize("view", ["image", "none", "other"])
@pytest.mark.parametrize("batch_tokens", [1, 100, 8192])
def test_caption_losses(letters, letters_run, view, batch_tokens):
    """Any selection, in any order and any batches, cut to the block: each caption's losses and gates are those it has alone."""
    model, data, ids = load_model(letters_run.out), prepare_data.Data(letters), np.array([5, 0, 13, 2])
    rows = np.load(os.path.join(letters, "caption_val_image.npy"))
    every = sorted(set(rows.tolist()))
    other = {row: every[(k + 1) % len(every)] for k, row in enumerate(every)}  # two captions share each image: the next row will not do
    assert len(rows) == 14 and len(every) == 7 and all(row != different for row, different in other.items())
    expected = captions_by_hand(model, letters, {"image": lambda row: row, "none": lambda row: None, "other": other.get}[view])
    model.train()
    losses, gates = evaluation.caption_losses(model, data, ids, view, batch_tokens)
    assert model.training and any(len(loss) == 32 for loss in losses + [expected[k][1] for k in range(14)])
    for k, loss, gate in zip(ids, losses, gates, strict=True):
        np.testing.assert_allclose(loss, expected[k][1], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(gate, expected[k][2], rtol=1e-4, atol=1e-5)


def test_validate_takes_an_even_share_of_the_captions(letters, letters_run):
    model, data = load_model(letters_run.out), prepare_data.Data(letters)
    whole = evaluation.validate(model, data)
    assert whole["val_loss_caption"] == pytest.approx(letters_run.summary["val_loss_caption"])
    n = int(data.lengths("val", 32).sum())
    assert evaluation.spread_ids(data, n, 32).tolist() == list(range(14))
    assert evaluation.spread_ids(data, -(-n // 3), 32).tolist() == [0, 3, 6, 9, 12]  # a third of the tokens: every third caption
    part = evaluation.validate(model, data, -(-n // 3))
    rows = captions_by_hand(model, letters)
    assert part["val_loss_caption"] == pytest.approx(mean_token(rows[::3]), rel=1e-5) and part != whole


def orange(path):
    """How many pixels say "looks at the picture"."""
    with Image.open(path) as picture:
        return int((np.asarray(picture.convert("RGB")) == evaluation.LOOKS).all(axis=-1).sum())


def test_draw_gates_fills_a_box_as_far_as_the_word_looks(tmp_path):
    filled = {}
    for gate in 1.0, 0.5, 0.0:  # 1 is all language, 0 all vision
        evaluation.draw_gates(tmp_path / "g.png", ["."], [gate])
        filled[gate] = orange(tmp_path / "g.png")
    assert filled[1.0] == 0 and filled[0.0] > 500
    assert filled[0.5] / filled[0.0] == pytest.approx(0.5, abs=0.06)


def test_draw_gates_wraps_long_captions_and_shows_the_picture(tmp_path):
    red = Image.new("RGB", (64, 64), (255, 0, 0))
    evaluation.draw_gates(tmp_path / "short.png", ["a", "dog"], [0.5, 0.5], red)
    evaluation.draw_gates(tmp_path / "long.png", ["mountain"] * 60, [0.0] * 60, red)
    with Image.open(tmp_path / "short.png") as short, Image.open(tmp_path / "long.png") as long:
        assert short.width == long.width <= 1100 and short.height < long.height < 2500
        assert (np.asarray(short) == (255, 0, 0)).all(axis=-1).sum() == 256 * 256
    evaluation.draw_gates(tmp_path / "one.png", ["mountain"], [0.0], red)
    assert orange(tmp_path / "long.png") == 60 * orange(tmp_path / "one.png")  # none is cut off


def test_draw_curves_goes_down_where_the_loss_does(tmp_path):
    series = {"falling": [(0, 3.0), (50, 2.0), (100, 1.0)], "rising": [(0, 1.0), (100, 2.9)], "nothing": []}
    evaluation.draw_curves(tmp_path / "c.png", series, "loss", "steps", [("floor", 0.5)])
    with Image.open(tmp_path / "c.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert 300 <= pixels.shape[0] <= 800 and 600 <= pixels.shape[1] <= 1200
    for color, sign in zip(evaluation.LINES, (1, -1)):
        y, x = np.nonzero((pixels[:, :750] == color).all(axis=-1))  # right of that stand the labels
        assert x.max() - x.min() > 500
        assert sign * (y[x > x.max() - 50].mean() - y[x < x.min() + 50].mean()) > 150  # y grows downwards
    evaluation.draw_curves(tmp_path / "ends.png", series, "loss", "steps", [("floor", 0.5)], ends=[(25, "T")])
    with Image.open(tmp_path / "ends.png") as picture:
        y, x = np.nonzero((np.asarray(picture.convert("RGB")) != pixels).any(axis=-1))  # a letter, and a line at a quarter of the axis from 70 to 760
    assert x.max() == round(70 + 690 / 4) and 370 <= (x == x.max()).sum() <= 381 and x.max() - 30 < x.min()
    evaluation.draw_curves(tmp_path / "empty.png", {"nothing": []}, "loss", "steps")
    assert not os.path.exists(tmp_path / "empty.png")


def test_ticks_are_round_numbers_within_the_axis():
    for low, high, expected in (0.1, 2.29, ["0.5", "1", "1.5", "2"]), (3, 4, ["3", "3.2", "3.4", "3.6", "3.8", "4"]), (10, 1098, ["200", "400", "600", "800", "1000"]):
        assert [f"{tick:.10g}" for tick in evaluation.ticks(low, high)] == expected
    for low, high in np.random.default_rng(0).uniform((-5, 0.001), (5, 1000), (200, 2)) @ [[1, 1], [0, 1]]:
        every = evaluation.ticks(low, high)
        assert 4 <= len(every) <= 11 and low - 1e-6 <= every[0] and every[-1] <= high + 1e-6


def test_gate_picture_draws_the_gates_of_its_caption(finished, toy, tmp_path, monkeypatch):
    drawn, model, data = [], load_model(finished.out), prepare_data.Data(toy)
    monkeypatch.setattr(evaluation, "draw_gates", lambda path, words, gates, picture, title, kept: drawn.append((words, gates, picture)))
    evaluation.gate_picture("x.png", model, data, 3)
    evaluation.gate_picture("x.png", model, data)
    rows = captions_by_hand(model, toy)
    longest = int(np.argmax([len(ids) for ids, _, _ in rows]))  # what it takes by itself
    for (words, gates, picture), k in zip(drawn, (3, longest), strict=True):
        ids, _, expected = rows[k]
        assert words == [data.encoding.decode([i]).strip() for i in ids[:-1]]  # without <eot>
        np.testing.assert_allclose(gates, expected.mean(axis=0)[:-1], rtol=1e-4)
        features = np.asarray(data.image[data.image_row["val"][k]], np.float32)
        assert np.abs(np.asarray(picture) / 255 - features.reshape(16, 16, 3)).max() < 0.01  # the thumbnail, as the model gets it


def test_eval_reports_a_run_folder(finished, tmp_path, capsys):
    out = tmp_path / "copy"
    shutil.copytree(finished.out, out)
    os.remove(out / "gates.png")
    evaluation.main([str(out), "--caption", "2"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    told = {line[0]: line[1] for line in lines if len(line) == 2}
    for name in ("val_loss_caption", "val_loss_text", "gate_function_words", "gate_content_words", "visual_information_captured"):
        assert told[name] == f"{finished.summary[name]:.4f}"
    assert lines[-1] == [str(out / "gates.png")] and orange(out / "gates.png") > 1000
    with pytest.raises(InputError):
        evaluation.main([str(tmp_path / "nowhere")])
