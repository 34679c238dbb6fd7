"""Training: flags, the order of data, optimizers, whole runs, exact resume, accumulation, processes, token
elision in the loop, and what is left behind when something goes wrong. All models are tiny: that the
arithmetic is right is tested, not that they learn.
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
import torch

import eval as evaluation
import prepare_data
import train
from gatevlm import GateVLM, GateVLMConfig, InputError, load_checkpoint, load_model
from train import TrainConfig, epoch_plan, learning_rate

TRAIN_PY = os.path.abspath(train.__file__)
TINY = (
    "--device cpu --n_layer 2 --n_head 2 --n_embd 16 --n_image_layer 1 --block_size 16 --gate soft-feature "
    "--batch_tokens 1024 --optimizer adamw --lr 0.01 --warmup_steps 4 --log_interval 1 --eval_interval 1000"
)

@pytest.fixture(autouse=True)
def short_ends(monkeypatch):
    """The report at the end of a run has its own tests; what it writes is not needed here."""
    monkeypatch.setattr(evaluation, "benchmark", lambda *args: ({}, {}))
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for s, handler in before.items():
        signal.signal(s, handler)

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
    checkpoint = load_checkpoint(f"{out}/{name}")
    checkpoint["now"].pop("seconds")
    return {key: x for key, x in checkpoint.items() if key not in ("config", "model_config")}

def log(out):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in evaluation.read_log(out)]

def steps(out):
    return [line for line in log(out) if "kind" in line]

def loss_of(line):
    return next(line[name] for name in ("loss_text", "loss_caption", "loss_kept") if name in line)

def same(a, b, tolerance=0.0):
    """Equal to the bit, or within tolerance, through nested dicts and lists of tensors and numbers."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k], tolerance) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y, tolerance) for x, y in zip(a, b))
    if isinstance(a, (torch.Tensor, float)) and tolerance:
        return torch.allclose(torch.as_tensor(a).double(), torch.as_tensor(b).double(), tolerance, tolerance)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

# ---- flags
def flag_fields():
    every = [f for config in (TrainConfig, GateVLMConfig) for f in fields(config)]
    return [f for f in every if f.name not in ("vocab_size", "image_dim")]  # these come from the data

def test_every_field_is_a_flag_with_its_help_and_its_value_in_every_preset(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = "".join(capsys.readouterr().out.split())  # lines are wrapped, also at hyphens
    for f in flag_fields():
        values = [f"{name}: {preset[f.name]}" for name, preset in train.PRESETS.items() if f.name in preset]
        values = [f"{'paper' if values else 'default'}: {f.default}", *values]
        shown = f"{f.metadata['help']} ({', '.join(values)})"
        assert f"--{f.name}" in text and "".join(shown.split()) in text, f.name
    assert "--vocab_size" not in text and "--image_dim" not in text

def test_only_flags_that_are_given_are_set_and_each_has_its_type():
    assert train.parse([]) == (False, {})
    for f in flag_fields():
        if f.type is bool:
            assert train.parse([f"--{f.name}"])[1] == {f.name: True}
            assert train.parse([f"--no-{f.name}"])[1] == {f.name: False}
        else:
            value = (f.metadata["choices"] or [{int: 7, float: 0.25, str: "x"}[f.type]])[-1]
            assert train.parse([f"--{f.name}", str(value)])[1] == {f.name: value}

def test_an_unknown_flag_names_the_nearest_in_one_line_with_status_2():
    result = subprocess.run([sys.executable, TRAIN_PY, "--dropuot", "0.1"], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (2, "train.py: unknown --dropuot; did you mean --dropout?\n")
    assert "--n_layer" in refused("--n-layer=3")
    # no abbreviations: they would change when a flag is added
    assert "unknown --n_lay;" in refused("--n_lay", 3)

@pytest.mark.parametrize(
    "flags, word",
    [
        ("--lr 0", "lr"), ("--lr nan", "nan"), ("--weight_decay -1", "weight_decay"),
        ("--batch_tokens 0", "batch_tokens"), ("--beta2 1", "beta2"), ("--keep_ratio 1.5", "keep_ratio"),
        ("--seed 4294967296", "seed"), ("--n_head 3", "n_head"), ("--curriculum TCX", "alternate"),
        ("--n_image_token 16", "has 1 image tokens"), ("--data nowhere", "nowhere"),
        ("--device nonsense", "nonsense"), ("--no-images --contrastive clip", "contrastive"),
        ("--elide ref", "--teacher"), ("--teacher nowhere", "nowhere"),
    ],
)
def test_wrong_values_get_one_line_that_names_the_field(toy, tmp_path, flags, word):
    assert word in refused(*TINY.split(), "--data", toy, "--out", tmp_path / "run", *flags.split())

@pytest.mark.parametrize("name", train.PRESETS)
def test_every_preset_makes_valid_configs(name, toy, toy16):
    preset = train.PRESETS[name]
    data = prepare_data.Data(toy16 if preset.get("n_image_token") == 16 else toy)
    config, model_config = train.make_configs(preset, data)
    assert {key: (asdict(config) | asdict(model_config))[key] for key in preset} == preset
    assert (model_config.vocab_size, model_config.image_dim) == (data.meta["vocab_size"], 768)

def test_the_paper_preset_is_the_paper(toy):
    config, model = train.make_configs(train.PRESETS["paper"], prepare_data.Data(toy))  # Section 3.4
    assert (config.lr, config.warmup_steps, config.weight_decay) == (5e-5, 12000, 0.01)
    assert (config.kinds, config.batch_tokens, config.optimizer) == ("TC" * 10, 64 * 128, "adamw")
    assert (model.n_layer, model.n_embd, model.n_image_layer, model.block_size, model.n_head) == (
        8, 768, 5, 128, 8,
    )
    assert (model.gate, model.dropout, model.modulation, model.contrastive) == (
        "soft-feature", 0.1, "none", "none",
    )

@pytest.mark.parametrize("flags, folder, n", [("", "toy", 1), ("--preset patches", "toy16", 16)])
def test_missing_toy_data_is_made_once(toy, toy16, tmp_path, monkeypatch, flags, folder, n):
    made, source = [], toy16 if n == 16 else toy
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        prepare_data, "main", lambda argv: made.append(argv) or shutil.copytree(source, argv[2])
    )
    for out in "one", "two":
        train.main([*f"{TINY} --max_steps 1 {flags}".split(), "--out", out])
    assert made == [["toy", "--out", os.path.join("data", folder), "--n_image_token", str(n)]]

# ---- the order of data
LENGTHS = np.random.default_rng(3).integers(2, 61, 1000)

def stub(lengths=LENGTHS, n_text=5000):
    """What epoch_plan reads of a data folder."""
    return SimpleNamespace(
        folder="stub", text={"train": np.zeros(n_text, np.uint16)}, image_row={"train": lengths},
        lengths=lambda split, block, ids: np.minimum(lengths, block)[ids],
    )

def plan(letter, epoch=0, data=stub(), block_size=32, **values):
    return epoch_plan(letter, epoch, TrainConfig(**{"batch_tokens": 512} | values), block_size, data)

@pytest.mark.parametrize(
    "order, epochs, kinds",
    [
        ("alternate", 3, "TCTCTC"), ("mixed", 3, "MMM"), ("caption-only", 2, "CC"), ("text-only", 2, "TT"),
        ("TTCM", 9, "TTCM"), ("C", 9, "C"),
    ],
)
def test_named_orders_expand_to_epochs_and_letters_stand_for_themselves(order, epochs, kinds):
    assert TrainConfig(curriculum=order, epochs=epochs).kinds == kinds

@pytest.mark.parametrize("n_text", [5000, 33, 32 * 7 + 1, 32 * 8])
def test_text_blocks_are_contiguous_disjoint_and_seen_once(n_text):
    """A block of 32 reads 33 tokens (the last is only a target), so n tokens hold (n - 1) // 32 blocks."""
    first = set()
    for epoch in range(20):
        batches = plan("T", epoch, stub(n_text=n_text))
        starts = np.sort(np.concatenate([rows for _, rows in batches]))
        assert {kind for kind, _ in batches} == {"T"} and len(starts) == (n_text - 1) // 32
        assert (np.diff(starts) == 32).all() and starts[0] >= 0 and starts[-1] + 33 <= n_text
        assert all(len(rows) == 16 for _, rows in batches[:-1])  # 512 tokens
        first.add(int(starts[0]))
    # blocks are cut elsewhere every epoch, where the rest allows it
    assert len(first) > 1 or (n_text - 1) % 32 == 0

def test_a_caption_epoch_sees_every_caption_once_in_full_batches_with_little_padding():
    batches, length = plan("C", block_size=48), np.minimum(LENGTHS, 48)
    assert sorted(np.concatenate([rows for _, rows in batches])) == list(range(1000))
    full = [
        (len(rows) + 1) * length[rows].max() > 512 >= len(rows) * length[rows].max() for _, rows in batches
    ]
    assert full.count(False) <= 1  # only the batch that ends the epoch
    padded = sum(len(rows) * length[rows].max() for _, rows in batches)
    assert length.sum() / padded > 0.97
    order = [length[rows].max() for _, rows in batches]
    assert order != sorted(order) and order != sorted(order, reverse=True)  # shuffled, not by length

def test_a_mixed_epoch_has_a_text_batch_after_every_few_caption_batches():
    kinds = "".join(kind for kind, _ in plan("M", mix=3))
    assert re.fullmatch("(CCCT)*C{0,2}", kinds) and kinds.count("C") == len(plan("C"))
    # one batch of two blocks
    texts = [rows for kind, rows in plan("M", mix=3, data=stub(n_text=70)) if kind == "T"]
    assert len(texts) > 5 and all(np.array_equal(rows, texts[0]) for rows in texts)  # text starts over

def test_a_mixed_epoch_of_more_text_has_a_caption_batch_after_every_few_text_batches():
    plan_of = lambda letter: plan(letter, mix=0.25, data=stub(n_text=30_000))
    kinds = "".join(kind for kind, _ in plan_of("M"))
    assert re.fullmatch("(TTTTC)*T{0,3}", kinds) and kinds.count("T") == len(plan_of("T"))
    n = len(plan("C"))  # captions start over; 512 tokens are a batch
    batches = plan("M", mix=0.25, data=stub(n_text=512 * 4 * (n + 5) + 1))
    captions = [rows.tolist() for kind, rows in batches if kind == "C"]
    assert len(captions) == n + 5 and captions[n:] == captions[:5]

def test_a_plan_is_a_function_of_seed_and_epoch_only():
    key = lambda batches: [(kind, rows.tolist()) for kind, rows in batches]
    torch.manual_seed(5)
    np.random.seed(5)
    assert key(plan("M", 1)) == key(plan("M", 1)) != key(plan("M", 2))
    assert key(plan("M", 1)) != key(plan("M", 1, seed=2))

def test_a_plan_without_data_says_what_to_use():
    for letter, data, word in ("T", stub(n_text=32), "caption-only"), ("C", stub(LENGTHS[:0]), "text-only"):
        with pytest.raises(InputError, match=word):
            plan(letter, data=data)

def test_learning_rate_by_hand():
    config = TrainConfig(lr=1.0, warmup_steps=4)
    assert [learning_rate(i, config, 12) for i in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate(8, config, 12) == pytest.approx(0.5)  # half of the cosine from step 4 to 12
    assert learning_rate(10, config, 12) == pytest.approx((1 + math.cos(0.75 * math.pi)) / 2)
    assert learning_rate(0, TrainConfig(lr=1.0, warmup_steps=0), 12) == 1.0
    assert learning_rate(2, TrainConfig(lr=1.0, warmup_steps=100), 4) == 0.75  # never longer than the run

# ---- optimizers
MODELS = [
    dict(), dict(tie_weights=False, gate="soft-token"), dict(channel_attention=True, modulation="film"),
    dict(contrastive="clip"), dict(n_image_token=0),
]

def small_model(**variant):
    sizes = dict(vocab_size=32, block_size=8, n_layer=2, n_head=2, n_embd=32, n_image_layer=1, image_dim=8)
    torch.manual_seed(1)
    return GateVLM(GateVLMConfig(**sizes | dict(n_image_token=4, dropout=0.0) | variant))

@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("variant", MODELS, ids=str)
def test_every_parameter_has_one_optimizer_and_only_matrices_decay(variant, optimizer):
    model = small_model(**variant)
    config = TrainConfig(optimizer=optimizer, lr=0.5, weight_decay=0.1, beta2=0.8)
    optimizers = list(train.make_optimizers(model, config).values())
    assert [type(x) for x in optimizers] == [torch.optim.AdamW, train.Muon][: 1 + (optimizer == "muon")]
    groups = [group for x in optimizers for group in x.param_groups]
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    hidden = {id(p) for x in optimizers[1:] for p in x.param_groups[0]["params"]}
    for name, p in model.named_parameters():
        outside = any(
            part in name for part in ("embedding", "position", "head", ".gate.", "bias", "ln", "log_scale")
        )
        assert (id(p) in hidden) == (optimizer == "muon" and not outside), name
        vector = name.endswith("bias") or ".ln" in name or name.startswith("ln.") or name == "log_scale"
        assert decay[id(p)] == (0.0 if vector else 0.1), name
    assert all(group["lr"] == 0.5 for group in groups)
    assert all(group["betas"] == (0.9, 0.8) for group in optimizers[0].param_groups)

@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 48), (2, 48, 8), (1, 64, 32)])
def test_orthogonal_turns_every_singular_value_into_about_one(shape):
    """Against the exact polar factor U V^T: in the basis of U and V the result is diagonal, within 0.6 to
    1.3."""
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
    """Ten steps of a small model beside torch.optim.Muon, in bfloat16 (8 bits): the ways agree to its
    rounding."""
    ours, theirs = small_model(), small_model()
    start = {name: p.clone() for name, p in ours.named_parameters()}
    linear = lambda model: [(n, m.weight) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    hidden = lambda model: [p for name, p in linear(model) if name != "head" and ".gate." not in name]
    muon = train.Muon(hidden(ours), lr=0.01, weight_decay=0.1)
    adjust = dict(adjust_lr_fn="match_rms_adamw")
    reference = torch.optim.Muon(hidden(theirs), lr=0.01, weight_decay=0.1, **adjust)
    generator = torch.Generator().manual_seed(1)
    for step in range(10):
        for p, q in zip(ours.parameters(), theirs.parameters()):
            some = step % 3 or p.dim() != 2  # a text step leaves some without a gradient
            p.grad = torch.randn(p.shape, generator=generator) if some else None
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

# ---- whole runs
@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory):
    """One run in the toy world: an epoch of text, one of captions, one mixed."""
    out = str(tmp_path_factory.mktemp("finished") / "run")
    flags = "--curriculum TCM --mix 2 --dropout 0.1 --eval_interval 4  --keep_checkpoints"
    return SimpleNamespace(out=out, summary=run(out, toy, flags), flags=flags)

def test_a_run_folder_holds_everything(finished, toy):
    names = set(os.listdir(finished.out))
    assert names >= {
        "config.json", "log.jsonl", "last.pt", "best.pt", "summary.json", "loss.png", "gates.png",
    }
    for name in "tokenizer.tiktoken", "meta.json":
        assert open(f"{finished.out}/{name}", "rb").read() == open(f"{toy}/{name}", "rb").read()
    config = prepare_data.read_json(f"{finished.out}/config.json")
    assert (config["train"]["preset"], config["train"]["data"], config["model"]["n_embd"]) == ("toy", toy, 16)
    assert prepare_data.read_json(f"{finished.out}/summary.json") == finished.summary

def test_the_log_follows_the_curriculum(finished, toy):
    config, data = TrainConfig(batch_tokens=1024, mix=2), prepare_data.Data(toy)
    kinds = ["".join(kind for kind, _ in epoch_plan(letter, 0, config, 16, data)) for letter in "TCM"]
    lines, n_step = steps(finished.out), len("".join(kinds))
    assert "".join(line["kind"] for line in lines) == "".join(kinds)
    assert [line["step"] for line in lines] == list(range(1, n_step + 1))
    rate = TrainConfig(lr=0.01, warmup_steps=4)
    assert [line["lr"] for line in lines] == [learning_rate(i, rate, n_step) for i in range(n_step)]
    assert all(("loss_caption" in line) == (line["kind"] == "C") for line in lines)
    n_text, n_caption = (len(data.text["train"]) - 1) // 16 * 16, int(data.lengths("train", 16).sum())
    # the first epoch is all text, the second all captions
    assert lines[len(kinds[0]) - 1]["tokens_seen"] == n_text
    assert lines[len(kinds[0]) + len(kinds[1]) - 1]["tokens_seen"] == n_text + n_caption
    assert finished.summary["tokens_seen"] == finished.summary["tokens_processed"] == lines[-1]["tokens_seen"]

def test_best_is_the_lowest_validation_loss(finished, toy):
    losses = {
        line["step"]: line["val_loss_caption"] for line in log(finished.out) if "val_loss_caption" in line
    }
    last = steps(finished.out)[-1]["step"]
    assert list(losses) == [*range(4, last, 4), last]
    best = min(losses, key=losses.get)
    assert (state(finished.out)["now"]["best"], state(finished.out)["now"]["best_step"]) == (
        losses[best], best,
    )
    model = load_model(finished.out)
    assert evaluation.validate(model, prepare_data.Data(toy))["val_loss_caption"] == pytest.approx(
        losses[best], 1e-6
    )

def test_best_stays_when_the_loss_rises(toy, tmp_path, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 1.5])
    validate = lambda *args, **more: {"val_loss_caption": next(losses, 9.0), "val_loss_text": None}
    monkeypatch.setattr(evaluation, "validate", validate)
    run(tmp_path / "run", toy, "--curriculum C --eval_interval 1")
    found = [load_checkpoint(f"{tmp_path}/run/{name}")["now"] for name in ("best.pt", "last.pt")]
    assert [(now["step"], now["best_step"], now["best"]) for now in found] == [(2, 2, 1.0), (4, 2, 1.0)]

def test_checkpoints_of_every_evaluation_and_epoch_say_where_they_stand(finished):
    ends = [
        i + 1
        for i, (a, b) in enumerate(zip(steps(finished.out), steps(finished.out)[1:]))
        if a["epoch"] != b["epoch"]
    ]
    last = steps(finished.out)[-1]["step"]
    paths = sorted(os.listdir(f"{finished.out}/checkpoints"))
    assert paths == [f"step_{step:08}.pt" for step in sorted({*range(4, last, 4), *ends, last})]
    for path in paths:
        now = load_checkpoint(f"{finished.out}/checkpoints/{path}")["now"]
        assert now["ends_epoch"] == (now["step"] in (*ends, last))
        assert now["kind"] == "TCM"[now["epoch"]] and now["epoch"] == sum(now["step"] > end for end in ends)

def test_the_image_encoder_knows_its_training_images(finished, toy):
    """From every picture (300 are under 2,000): mean, and deviation plus a thousandth of the mean
    deviation."""
    data, encoder = prepare_data.Data(toy), load_model(finished.out).image_encoder
    x = data.image[np.unique(data.image_row["train"])].astype(np.float64)[:, 0]
    assert np.allclose(encoder.mean.numpy(), x.mean(axis=0), atol=1e-5)
    assert np.allclose(encoder.std.numpy(), x.std(axis=0) + 1e-3 * x.std(axis=0).mean(), atol=1e-5)

def test_without_images_captions_are_text(toy, tmp_path):
    summary = run(tmp_path / "run", toy, "--no-images --curriculum C")
    assert load_model(f"{tmp_path}/run").config.n_image_token == 0
    assert summary["val_loss_caption"] == summary["val_loss_caption_none_image"]

def test_hard_gates_anneal_with_the_share_of_caption_steps(toy, tmp_path):
    """The last of n caption steps has progress (n - 1) / n: past 80%, so the temperature has reached 0.1.
    Text steps, which come first here, do not count."""
    flags = "--gate hard-token --batch_tokens 256"
    run(tmp_path / "run", toy, f"{flags} --curriculum TC")
    n = sum(line["kind"] == "C" for line in steps(tmp_path / "run"))
    assert n > 5
    assert load_model(f"{tmp_path}/run", "last.pt").blocks[0].look.gate.temperature == pytest.approx(0.1)
    run(tmp_path / "half", toy, f"{flags} --curriculum C --stop_after {n // 2 + 1}")
    expected = 1 - 0.9 * (n // 2 / n) / 0.8
    assert state(tmp_path / "half")["model"]["blocks.0.look.gate.temperature"] == pytest.approx(expected)

def test_a_text_only_curriculum_leaves_the_image_modules_as_they_were(toy, tmp_path):
    run(tmp_path / "run", toy, "--curriculum T --weight_decay 0.5 --optimizer muon")
    config = load_model(f"{tmp_path}/run", "last.pt").config
    torch.manual_seed(1)
    fresh = GateVLM(config).state_dict()
    for name, x in state(tmp_path / "run")["model"].items():
        measured = name in ("image_encoder.mean", "image_encoder.std")
        untouched = ("image_encoder" in name or ".look." in name) and not measured
        assert torch.equal(x, fresh[name]) == untouched or measured, name

@pytest.fixture(scope="module")
def other(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("other") / "data")
    return prepare_data.main(["toy", "--n_image", "50", "--n_text", "20", "--seed", "9", "--out", folder])

# ---- exact resume
VARIANTS = {
    "adamw": "", "muon": "--optimizer muon", "hard": "--gate hard-feature", "lcg": "--contrastive lcg",
    "mixed": "--curriculum MM --mix 2", "accum": "--grad_accum 2", "ema": "--elide ema --elide_visible",
    "random": "--elide random",
}
ELIDED = "--elide_warmup 2 --elide_cycle 4 --elide_dense 1"

@pytest.mark.parametrize("variant", VARIANTS)
def test_stopped_and_resumed_is_uninterrupted_to_the_bit(toy, tmp_path, variant):
    """Once across an evaluation and the end of an epoch, once right after a step."""
    flags = f"--curriculum CT --dropout 0.2 --eval_interval 3 {ELIDED} {VARIANTS[variant]}"
    run(tmp_path / "whole", toy, flags)
    n = len(steps(tmp_path / "whole"))
    for stop in 3, n // 2 + 1:
        run(tmp_path / f"parts{stop}", toy, f"{flags} --stop_after {stop}")
        assert steps(tmp_path / f"parts{stop}")[-1]["step"] == stop
        resume(tmp_path / f"parts{stop}", "--stop_after 0")
        assert log(tmp_path / f"parts{stop}") == log(tmp_path / "whole")
        for name in "last.pt", "best.pt":
            assert same(state(tmp_path / f"parts{stop}", name), state(tmp_path / "whole", name))

def test_resume_after_a_crash_repeats_what_was_lost(toy, tmp_path):
    run(tmp_path / "whole", toy, "--curriculum C")
    run(tmp_path / "crashed", toy, "--curriculum C --stop_after 4")
    with open(
        tmp_path / "crashed" / "log.jsonl", "a"
    ) as f:  # two steps more were logged, the second line cut short
        f.write('{"step": 5, "kind": "C", "epoch": 0, "loss_caption": 1.0}\n{"step": 6, "ki')
    resume(tmp_path / "crashed", "--stop_after 0")
    assert log(tmp_path / "crashed") == log(tmp_path / "whole")
    assert same(state(tmp_path / "crashed"), state(tmp_path / "whole"))

def test_resume_of_a_finished_run_only_reports(finished):
    before = {name: os.stat(f"{finished.out}/{name}").st_mtime_ns for name in ("last.pt", "best.pt")}
    summary = resume(finished.out)
    assert summary == {name: finished.summary[name] for name in summary} and len(summary) > 20
    assert before == {name: os.stat(f"{finished.out}/{name}").st_mtime_ns for name in before}

def test_the_same_line_starts_a_run_goes_on_with_it_and_reports_it(toy, tmp_path):
    line = ["--resume", *TINY.split(), "--data", toy, "--out", f"{tmp_path}/run", "--curriculum", "C"]
    train.main([*line, "--stop_after", "3"])
    assert train.main(line + ["--stop_after", "0"]) == train.main(line)

def test_resume_refuses_what_would_change_its_past(toy, other, tmp_path):
    out = tmp_path / "run"
    run(out, toy, "--curriculum TC --stop_after 4")  # 3 steps of text, 1 of captions
    for flags in (
        "--n_layer 3", "--seed 2", "--batch_tokens 512", "--preset laptop", "--curriculum CT",
        f"--data {other}", "--max_steps 3",
    ):
        assert str(out) in refused("--resume", "--out", out, *flags.split()), flags
    assert "--resume goes on" in refused(*TINY.split(), "--data", toy, "--out", out)

def test_resume_anywhere_with_data_that_moved(toy, tmp_path, monkeypatch):
    """What counts is the content: another folder, another spelling, another working directory."""
    run(tmp_path / "whole", toy, "--curriculum C")
    run(tmp_path / "run", shutil.copytree(toy, tmp_path / "data"), "--curriculum C --stop_after 2")
    os.rename(tmp_path / "data", tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "run")
    assert resume("../run", "--data ../moved/.")["val_loss_caption"] > 0  # the report finds it, too
    assert same(state(tmp_path / "run"), state(tmp_path / "whole"))

@pytest.mark.parametrize("before, after", [
    ("--curriculum caption-only --epochs 1", "--epochs 2"),
    ("--curriculum CC --max_steps 6", "--max_steps 16"),
])
def test_a_finished_run_goes_on_longer(toy, tmp_path, before, after):
    """Its past stays; what is to come has the order and the learning rates that a longer run has there."""
    run(tmp_path / "run", toy, before)
    past, n = log(tmp_path / "run"), steps(tmp_path / "run")[-1]["step"]
    resume(tmp_path / "run", after)
    run(tmp_path / "long", toy, f"{before} {after}")
    assert log(tmp_path / "run")[: len(past)] == past
    for line, other in zip(steps(tmp_path / "run")[n:], steps(tmp_path / "long")[n:], strict=True):
        names = "step", "epoch", "kind", "lr", "n_step", "tokens_seen"
        assert [line[name] for name in names] == [other[name] for name in names]
    assert len(steps(tmp_path / "run")) > n

def test_a_longer_run_is_exact_while_it_warms_up(toy, tmp_path):
    run(tmp_path / "run", toy, "--curriculum CC --max_steps 3")
    resume(tmp_path / "run", "--max_steps 12")
    run(tmp_path / "long", toy, "--curriculum CC --max_steps 12 --warmup_steps 4")
    # both have warmed up over 3 steps, but to another height: 4 steps against min(4, 3)
    assert [x["lr"] for x in steps(tmp_path / "run")[3:]] == [x["lr"] for x in steps(tmp_path / "long")[3:]]

def test_memory_and_learning_rate_of_a_run_can_change(toy, tmp_path):
    run(tmp_path / "run", toy, "--curriculum C --dropout 0 --stop_after 2")
    shutil.copytree(tmp_path / "run", tmp_path / "half")
    resume(tmp_path / "run", "--grad_accum 3 --stop_after 0")
    run(tmp_path / "whole", toy, "--curriculum C --dropout 0")
    assert same(state(tmp_path / "run")["model"], state(tmp_path / "whole")["model"], 5e-3)
    resume(tmp_path / "half", "--lr 0.005 --stop_after 0")
    rates = [[line["lr"] for line in steps(tmp_path / name)] for name in ("whole", "half")]
    assert rates[1] == pytest.approx(rates[0][:2] + [x / 2 for x in rates[0][2:]])

def test_a_run_killed_before_its_first_save_is_resumed_as_it_was(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "train", lambda run: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "run", toy, "--curriculum C --n_embd 32")
    monkeypatch.undo()
    resume(tmp_path / "run")
    assert load_model(tmp_path / "run").config.n_embd == 32 and state(tmp_path / "run")["now"]["step"] == 4

# ---- from the weights of another run
def test_a_model_with_eyes_starts_from_a_text_run(toy, tmp_path, teacher, capsys):
    """Its decoder is taken, image modules start fresh: without pictures it is the text run's model."""
    data = prepare_data.Data(toy)
    blind = evaluation.validate(load_model(teacher), data)
    run(tmp_path / "run", toy, f"--curriculum C --init {teacher} --lr 1e-12 --max_steps 1 --weight_decay 0")
    (fresh,) = re.findall("weights are those of .*, but fresh: (.*)", capsys.readouterr().out)
    assert {"image_encoder.proj", "blocks.look.gate.linear", "blocks.look.ln"} <= {*fresh.split(", ")}
    assert all(name.startswith(("image_encoder", "blocks.look")) for name in fresh.split(", "))
    model, ids = load_model(tmp_path / "run", "last.pt"), np.arange(len(data.image_row["val"]))
    seen = {"none": evaluation.caption_losses(model, data, "val", ids, "none")}
    seeing = evaluation.validate(model, data, seen=seen)
    assert seeing["val_loss_caption_none_image"] == pytest.approx(blind["val_loss_caption"], rel=1e-6)
    assert seeing["val_loss_text"] == pytest.approx(blind["val_loss_text"], rel=1e-6)

@pytest.mark.parametrize("block_size", [8, 24])
def test_another_block_takes_the_positions_that_exist(toy, tmp_path, teacher, block_size):
    flags = f"--curriculum C --init {teacher} --lr 1e-12 --max_steps 1 --block_size {block_size}"
    run(tmp_path / "run", toy, flags)
    old, new = (load_model(folder).position_embedding.weight for folder in (teacher, tmp_path / "run"))
    n = min(16, block_size)
    assert torch.allclose(old[:n], new[:n], atol=1e-6) and len(new) == block_size

def test_image_statistics_are_those_of_the_new_data(toy, tmp_path):
    run(tmp_path / "one", toy, "--curriculum C --max_steps 1")
    other = shutil.copytree(toy, tmp_path / "data")
    np.save(other / "image.npy", 1 - 0.5 * np.load(other / "image.npy"))
    run(tmp_path / "two", other, f"--curriculum C --max_steps 1 --init {tmp_path}/one")
    one, two = (state(tmp_path / name)["model"] for name in ("one", "two"))
    assert torch.allclose(two["image_encoder.mean"], 1 - 0.5 * one["image_encoder.mean"], atol=1e-3)

def test_another_tokenizer_is_no_start(other, tmp_path, teacher):
    flags = [*TINY.split(), "--data", other, "--out", tmp_path / "run", "--init", teacher]
    assert "its tokenizer is not that of" in refused(*flags)

def test_evaluating_logging_and_saving_never_change_training(toy, tmp_path):
    flags = "--curriculum CT --dropout 0.3 --gate hard-feature"
    run(tmp_path / "often", toy, f"{flags} --eval_interval 1  --eval_tokens 50 --keep_checkpoints")
    run(tmp_path / "never", toy, f"{flags} --eval_interval 9999  --log_interval 9999")
    assert same(state(tmp_path / "often")["model"], state(tmp_path / "never")["model"])

# ---- one batch in parts, on several processes
PARTS = [
    "", "--contrastive clip", "--elide ema --keep_ratio 0.4 " + ELIDED,
    "--optimizer muon --curriculum MM --mix 2",
]

@pytest.mark.parametrize("flags", PARTS)
def test_accumulation_is_the_big_batch(toy, tmp_path, flags):
    """Micro-batches of unequal size (1,024 tokens are about 73 captions) give the same numbers to rounding.
    CLIP compares within a micro-batch, so there the language loss of the first step has to do."""
    run(tmp_path / "one", toy, f"--curriculum C --max_steps 6 {flags}")
    run(tmp_path / "parts", toy, f"--curriculum C --max_steps 6 --grad_accum 3 {flags}")
    one, parts = steps(tmp_path / "one"), steps(tmp_path / "parts")
    assert [line["tokens_processed"] for line in one] == [line["tokens_processed"] for line in parts]
    n = 1 if "clip" in flags else 6
    assert [loss_of(x) for x in one][:n] == pytest.approx([loss_of(x) for x in parts][:n], rel=2e-4)

@pytest.mark.parametrize(
    "flags", ["--optimizer muon --mix 2 --curriculum M --elide ema " + ELIDED, "--contrastive lcg"]
)
def test_two_processes_are_one(toy, tmp_path, flags):
    """torchrun on gloo: odd numbers of rows, elision's books, the logged losses of both, one summary."""
    line = f"{TINY} --data {toy} --curriculum C --max_steps 5 {flags} --out"
    train.main([*line.split(), f"{tmp_path}/one"])
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", TRAIN_PY,
    ]
    result = subprocess.run([*command, *line.split(), f"{tmp_path}/two"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    one, two = steps(tmp_path / "one"), steps(tmp_path / "two")
    n = 1 if "lcg" in flags else 5  # negatives are those of one process
    assert [loss_of(x) for x in one][:n] == pytest.approx([loss_of(x) for x in two][:n], rel=2e-4)
    assert [x["tokens_processed"] for x in one] == [x["tokens_processed"] for x in two]
    if n == 5:
        assert same(state(tmp_path / "one")["model"], state(tmp_path / "two")["model"], 5e-3)
    assert os.path.isfile(tmp_path / "two" / "summary.json")

def test_every_step_and_process_draws_other_noise(toy, tmp_path, monkeypatch):
    """A seed each: 4 steps of 2 processes with 2 seeds."""
    seen, data, cpu = [], prepare_data.Data(toy), torch.device("cpu")
    monkeypatch.setattr(train.Run, "gradients", lambda *_: (torch.zeros(2), 1.0))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: x)
    size = GateVLMConfig(data.meta["vocab_size"], n_layer=1, n_embd=8, n_head=1, n_image_layer=1)
    for seed, rank in (1, 0), (1, 1), (2, 0), (2, 1):
        config = TrainConfig(seed=seed, out=str(tmp_path), max_steps=4, curriculum="C", batch_tokens=256)
        made = train.Run(config, size, data, None, cpu, rank, 1)
        made.world = 2
        with monkeypatch.context() as spy:
            spy.setattr(torch, "manual_seed", seen.append)
            train.train(made)
    assert len(seen) == len({*seen}) == 16

# ---- what single flags do
def test_gradients_are_clipped_to_their_norm(toy, tmp_path, monkeypatch):
    """Right after clipping, the norm of all gradients is the limit, and the logged norm is that before."""
    found, clip = [], torch.nn.utils.clip_grad_norm_

    def spy(parameters, max_norm):
        parameters = list(parameters)
        assert max_norm == 1
        norm = clip(parameters, 0.01)
        found.append(torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm().item())
        return norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    run(tmp_path / "clipped", toy, "--curriculum C --max_steps 2")
    assert found == pytest.approx([0.01, 0.01], rel=1e-3)
    assert all(line["grad_norm"] > 0.1 for line in steps(tmp_path / "clipped"))

@pytest.mark.parametrize(
    "flag",
    [
        "--seed 2", "--lr 0.02", "--warmup_steps 0", "--weight_decay 0.9", "--beta2 0.5", "--optimizer muon",
        "--batch_tokens 512", "--mix 1", "--curriculum CM", "--elide random " + ELIDED,
        "--contrastive clip",
    ],
)
def test_every_training_flag_changes_the_run(toy, tmp_path_factory, flag):
    cache = getattr(test_every_training_flag_changes_the_run, "base", None)
    if cache is None:
        base = tmp_path_factory.mktemp("base") / "run"
        run(base, toy, "--curriculum M --mix 2 --max_steps 5")
        cache = test_every_training_flag_changes_the_run.base = state(base)["model"]
    out = tmp_path_factory.mktemp("other") / "run"
    run(out, toy, f"--curriculum M --mix 2 --max_steps 5 {flag}")
    assert not same(state(out)["model"], cache)

def test_a_contrastive_loss_is_logged_and_weighted(toy, tmp_path):
    """The language loss of the first step is the same with any weight; from then on the weight tells."""
    for weight in 0, 3:
        run(
            tmp_path / f"w{weight}", toy,
            f"--curriculum C --max_steps 2 --contrastive clip --contrastive_weight {weight}",
        )
    none, much = steps(tmp_path / "w0"), steps(tmp_path / "w3")
    assert loss_of(none[0]) == loss_of(much[0]) and none[0]["contrastive"] == much[0]["contrastive"] > 1
    assert loss_of(none[1]) != loss_of(much[1])

# ---- token elision in the loop
@pytest.fixture(scope="module")
def teacher(toy, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("teacher") / "run")
    run(out, toy, "--no-images --curriculum C --max_steps 4")
    return out

def test_elided_steps_run_their_share_and_dense_ones_all(toy, tmp_path, teacher):
    """k of a batch is p of the mean length, at least 1; a caption shorter than k is run whole."""
    out, data = tmp_path / "run", prepare_data.Data(toy)
    run(out, toy, f"--curriculum CT --teacher {teacher} --keep_ratio 0.3 {ELIDED}")
    assert prepare_data.read_json(out / "config.json")["train"]["elide"] == "regate"  # a teacher turns it on
    config, seen, ran, nth = TrainConfig(batch_tokens=1024), 0, 0, 0
    batches = epoch_plan("C", 0, config, 16, data) + epoch_plan("T", 1, config, 16, data)
    for line, (kind, rows) in zip(steps(out), batches, strict=True):
        length = data.lengths("train", 16, rows) if kind == "C" else np.full(len(rows), 16)
        dense = kind == "T" or nth < 2 or (nth - 2) % 4 < 1  # warm-up of 2, cycles of 4 that begin with 1
        run_now = length.sum() if dense else np.minimum(length, max(1, round(0.3 * length.mean()))).sum()
        seen, ran, nth = seen + length.sum(), ran + run_now, nth + (kind == "C")
        assert (line["tokens_seen"], line["tokens_processed"]) == (seen, ran)
        assert line["kept"] == pytest.approx(run_now / length.sum()) and ("loss_kept" in line) == (not dense)
    assert os.path.isfile(out / "kept.png")

def test_keeping_every_token_is_dense_training(toy, tmp_path):
    run(tmp_path / "dense", toy, "--curriculum C")
    run(tmp_path / "kept", toy, f"--curriculum C --elide random --keep_ratio 1 {ELIDED}")
    dense, kept = ([loss_of(line) for line in steps(tmp_path / name)] for name in ("dense", "kept"))
    # k is the mean length: the longest lose a token or two at most
    assert kept == pytest.approx(dense, rel=1e-3)

def test_the_books_hold_the_loss_of_every_token_that_was_run(toy, tmp_path):
    """After a dense epoch of captions m is (1 - beta) times the loss of every token, whose means are
    logged."""
    run(tmp_path / "run", toy, "--curriculum C --elide ema --elide_warmup 1000 --elide_beta 0.5")
    elision, lines = state(tmp_path / "run")["elision"], steps(tmp_path / "run")
    data = prepare_data.Data(toy)
    # beyond the block nothing runs
    cut = np.concatenate([np.arange(n) < 16 for n in np.diff(data.offset["train"])])
    assert torch.equal(elision["count"], torch.from_numpy(cut.astype(np.int32)))
    n = np.diff([0] + [line["tokens_seen"] for line in lines])
    assert 2 * elision["average"].sum() == pytest.approx(
        (n * [line["loss_caption"] for line in lines]).sum(), rel=1e-5
    )

def test_teacher_losses_are_those_of_a_plain_loop(toy, teacher):
    data, model = prepare_data.Data(toy), load_model(teacher)
    losses, offset = train.teacher_losses(TrainConfig(teacher=teacher), data, "cpu"), data.offset["train"]
    for i in range(0, 300, 50):
        ids = data.captions["train"][offset[i] : offset[i + 1]].astype(int).tolist()[:16]
        logp = model(torch.tensor([[data.encoding.eot_token, *ids[:-1]]])).logits[0].double().log_softmax(-1)
        expected = [-logp[k, token].item() for k, token in enumerate(ids)]
        assert losses[offset[i] : offset[i] + len(ids)].tolist() == pytest.approx(expected, abs=1e-4)

def test_a_teacher_is_asked_once_and_need_not_be_there_to_resume(toy, tmp_path, teacher):
    there = shutil.copytree(teacher, tmp_path / "teacher")
    flags = f"--curriculum C --teacher {there} {ELIDED}"
    run(tmp_path / "whole", toy, flags)
    run(tmp_path / "parts", toy, f"{flags} --stop_after 5")
    shutil.rmtree(there)
    resume(tmp_path / "parts")
    assert same(state(tmp_path / "parts"), state(tmp_path / "whole"))

def test_a_teacher_with_eyes_or_another_tokenizer_is_refused(finished, other, toy, teacher, tmp_path):
    assert "no teacher" in refused(
        *TINY.split(), "--data", toy, "--out", tmp_path / "a", "--teacher", finished.out
    )
    assert "no teacher" in refused(
        *TINY.split(), "--data", other, "--out", tmp_path / "b", "--teacher", teacher
    )

# ---- when something goes wrong
@pytest.mark.parametrize("interval", [1, 5])
def test_a_run_that_diverges_stops_in_one_line_and_keeps_its_last_save(toy, tmp_path, interval):
    flags = f"--curriculum C --lr 1e20 --optimizer muon --warmup_steps 0 --log_interval {interval}"
    message = refused(*TINY.split(), "--data", toy, "--out", tmp_path / "run", *flags.split())
    assert "NaN or inf" in message and "--lr" in message
    saved = tmp_path / "run" / "last.pt"
    assert not saved.exists() or all(
        x.isfinite().all() for x in load_checkpoint(str(saved))["model"].values()
    )

def test_a_damaged_image_is_told_apart_from_a_run_that_diverges(toy, tmp_path):
    data = shutil.copytree(toy, tmp_path / "data")
    image = np.load(f"{data}/image.npy", mmap_mode="r+")
    image[7, 0, 3] = np.nan
    image.flush()
    assert "image.npy, row 7" in refused(
        *TINY.split(), "--data", data, "--out", tmp_path / "run", "--curriculum", "C"
    )

def test_a_signal_saves_ends_with_status_0_and_resume_is_exact(toy, tmp_path):
    line = [*TINY.split(), "--data", toy, "--curriculum", "C" * 8, "--out"]
    process = subprocess.Popen(
        [sys.executable, TRAIN_PY, *line, f"{tmp_path}/run"], stdout=subprocess.PIPE, text=True
    )
    path = tmp_path / "run" / "log.jsonl"
    while not (path.exists() and path.read_text().count("\n") >= 3):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 0 and "--resume" in process.stdout.read()
    stopped = state(tmp_path / "run")["now"]["step"]
    resume(tmp_path / "run")
    train.main([*line, f"{tmp_path}/whole"])
    assert 3 <= stopped < len(steps(tmp_path / "whole"))
    assert same(state(tmp_path / "run"), state(tmp_path / "whole"))

@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_and_a_closed_terminal_save_too(toy, tmp_path, monkeypatch, sent):
    """The step that runs is finished; afterwards the handler of before is back."""
    gradients, before = train.Run.gradients, signal.getsignal(sent)

    def spy(run, *args):
        if run.now["step"] == 2:
            os.kill(os.getpid(), sent)
        return gradients(run, *args)

    monkeypatch.setattr(train.Run, "gradients", spy)
    assert run(tmp_path / "run", toy, "--curriculum CC") is None and signal.getsignal(sent) is before
    assert state(tmp_path / "run")["now"]["step"] == 3
    monkeypatch.undo()
    resume(tmp_path / "run")
    run(tmp_path / "whole", toy, "--curriculum CC")
    assert same(state(tmp_path / "run"), state(tmp_path / "whole"))

def test_what_the_shell_ignores_stays_ignored(toy, tmp_path, monkeypatch):
    """As nohup does with SIGHUP."""
    before, gradients = signal.signal(signal.SIGHUP, signal.SIG_IGN), train.Run.gradients
    spy = lambda *args: os.kill(os.getpid(), signal.SIGHUP) or gradients(*args)
    monkeypatch.setattr(train.Run, "gradients", spy)
    assert run(tmp_path / "run", toy, "--curriculum C --max_steps 2")["step"] == 2
    signal.signal(signal.SIGHUP, before)

def test_the_end_of_a_cut_schedule_is_no_end_of_an_epoch(toy, tmp_path):
    run(tmp_path / "run", toy, "--curriculum CT --max_steps 3 --keep_checkpoints")  # an epoch of captions: 4
    resume(tmp_path / "run", "--max_steps 0")
    found = [load_checkpoint(path)["now"] for path in sorted((tmp_path / "run" / "checkpoints").iterdir())]
    assert [(now["step"], now["ends_epoch"]) for now in found] == [(3, False), (4, True), (7, True)]

def test_babylms_counts_of_words_have_checkpoints(toy, tmp_path):
    """Millions of words are what a word is counted as here: after 1M to 10M each one, then each ten."""
    data = shutil.copytree(toy, tmp_path / "data")
    meta = json.loads((data / "meta.json").read_text())
    assert meta["words_per_token"]["C"] == pytest.approx(0.8, abs=0.1)  # a full stop and <eot> are none
    meta["words_per_token"] = rate = {"C": 1200, "T": 500}
    (data / "meta.json").write_text(json.dumps(meta))
    flags = "--curriculum CCTCCC --keep_checkpoints --eval_interval 100 --log_interval 1"
    run(tmp_path / "run", data, flags)
    lines = [line for line in evaluation.read_log(tmp_path / "run") if "words_seen" in line]
    seen = [line["words_seen"] for line in lines]
    for a, b in zip([dict(words_seen=0, tokens_seen=0), *lines], lines):
        assert b["words_seen"] - a["words_seen"] == rate[b["kind"]] * (b["tokens_seen"] - a["tokens_seen"])
    assert seen[-1] > 2e7
    marks = [*range(10**6, 10**7, 10**6), *range(10**7, 10**8, 10**7)]
    want = {next(i for i, x in enumerate(seen, 1) if x >= mark) for mark in marks if mark <= seen[-1]}
    ends = {a["step"] for a, b in zip(lines, lines[1:]) if a["epoch"] < b["epoch"]} | {lines[-1]["step"]}
    kept = {int(name[5:-3]) for name in os.listdir(tmp_path / "run" / "checkpoints")}
    assert kept == want | ends

def test_killed_again_and_again_is_never_killed(toy, tmp_path, pytestconfig):
    """SIGKILL at random moments, also while it saves; --resume ends with the weights of a run left alone."""
    line = [*TINY.split(), "--data", toy, "--curriculum", "C" * 6, "--eval_interval", "3", "--out"]
    rng, out = np.random.default_rng(1), f"{tmp_path}/run"
    for _ in range(pytestconfig.getoption("kills")):
        process = subprocess.Popen(
            [sys.executable, TRAIN_PY, "--resume", *line, out], stdout=subprocess.DEVNULL
        )
        before = os.path.exists(f"{out}/log.jsonl") and len(log(out))
        while process.poll() is None and not (os.path.exists(f"{out}/log.jsonl") and len(log(out)) != before):
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.15))
        process.kill()
        process.wait()
    train.main(["--resume", *line, out])
    train.main([*line, f"{tmp_path}/whole"])
    assert same(state(out), state(tmp_path / "whole")) and log(out) == log(tmp_path / "whole")

def test_a_checkpoint_that_cannot_be_written_ends_in_one_line_and_the_last_one_stays(
    toy, tmp_path, monkeypatch
):
    out, write = tmp_path / "run", torch.save
    run(out, toy, "--curriculum C --stop_after 2")
    before = state(out)

    def full(*args):
        write(*args)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert "No space left" in refused("--resume", "--out", out, "--stop_after", "4")
    assert same(state(out), before) and not os.path.exists(out / "last.pt.part")

def test_a_damaged_or_foreign_state_is_refused(toy, tmp_path):
    run(tmp_path / "run", toy, "--curriculum C --stop_after 2")
    checkpoint = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    torch.save(checkpoint | {"config": {"data": "x"}}, tmp_path / "run" / "last.pt")
    assert "version" in refused("--resume", "--out", tmp_path / "run")
    (tmp_path / "run" / "last.pt").write_bytes(b"PK not a checkpoint")
    assert "not a readable checkpoint" in refused("--resume", "--out", tmp_path / "run")
