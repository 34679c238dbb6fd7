"""
eval.py --export: a GPT-2 written down by hand reads the file and has our logits; where transformers is
installed, so has its own, with the same ids and the same scores.
"""
import json
import math
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pytest import fixture, importorskip, mark, raises

import eval as ev
import prepare_data
import train
from gatevlm import InputError, load_model
from prepare_data import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
SIZES = "--n_layer 2 --n_head 2 --n_embd 32 --n_image_layer 1 --block_size 96 --dropout 0.1 --device cpu"

@fixture(scope="module", params=["--tie_weights", "--no-tie_weights --no-images"])
def exported(tmp_path_factory, request):
    """A run of one step, whose tokenizer learned from the README."""
    tmp = tmp_path_factory.mktemp("export")
    text = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").split("\n") if line.strip()]
    text += ["👩‍👩‍👧 क्‍ष"] * 50  # joined by U+200D, which regular expressions disagree on
    for color in "red", "blue":
        Image.new("RGB", (20, 20), color).save(tmp / f"{color}.png")
    captions = "".join(f"{('red', 'blue')[i % 2]}.png\t{line}\n" for i, line in enumerate(text))
    (tmp / "captions.txt").write_text(captions, encoding="utf-8")
    data = prepare_data.main(["photos", str(tmp), "--vocab_size", "1500", "--out", f"{tmp}/data"])
    flags = f"--data {data} --out {tmp}/run --curriculum C --max_steps 1 --keep_checkpoints {request.param}"
    train.main([*SIZES.split(), *flags.split()])
    ev.main([f"{tmp}/run", "--export", f"{tmp}/gpt2"])
    return f"{tmp}/run", tmp / "gpt2"

def lines(n):
    """Random lines of words, numbers, punctuation, emoji, many spaces and line ends."""
    rng = random.Random(0)
    words = (ROOT / "README.md").read_text(encoding="utf-8").split()
    words = [word for word in words if "endoftext" not in word]  # it is special to them
    words += ["don't", "x1y22", "🙂", "👩‍👩‍👧", "क्‍ष", "é", "ß", "日本語", "\u00a0", "  "]
    words += ["\n", "\n\n", "\t", "___", "..."]
    piece = lambda: rng.choice(words) + rng.choice(["", " ", " ", " ", "  "])
    return ["".join(piece() for _ in range(rng.randint(1, 12))) for _ in range(n)]

def read_safetensors(path):
    """As its format says: eight bytes of length, a JSON header, numbers; no byte is left over."""
    raw = path.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    header, numbers, found = json.loads(raw[8 : 8 + n]), raw[8 + n :], {}
    assert header.pop("__metadata__") == {"format": "pt"}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        array = np.frombuffer(numbers[begin:end], "<f4").reshape(entry["shape"])
        found[name] = torch.from_numpy(array.copy())
    assert sum(x.numel() * 4 for x in found.values()) == len(numbers)
    return found

def gpt2(w, idx, n_head):
    """Logits (T,V) of one text idx (T,) as GPT-2 has them: x W + b; query, key and value side by side."""
    linear = lambda name, x: x @ w[f"{name}.weight"] + w[f"{name}.bias"]
    norm = lambda name, x: F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])
    h = w["transformer.wte.weight"][idx] + w["transformer.wpe.weight"][: len(idx)]
    for i in range(sum(name.endswith("ln_1.weight") for name in w)):
        at = f"transformer.h.{i}"
        q, k, v = linear(f"{at}.attn.c_attn", norm(f"{at}.ln_1", h)).chunk(3, dim=-1)
        heads = []
        for q, k, v in zip(q.chunk(n_head, -1), k.chunk(n_head, -1), v.chunk(n_head, -1)):
            future = torch.ones(len(idx), len(idx)).triu(1).bool()
            heads.append((q @ k.T / math.sqrt(q.size(-1))).masked_fill(future, -math.inf).softmax(-1) @ v)
        h = h + linear(f"{at}.attn.c_proj", torch.cat(heads, dim=-1))
        x = linear(f"{at}.mlp.c_fc", norm(f"{at}.ln_2", h))
        x = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        h = h + linear(f"{at}.mlp.c_proj", x)
    return norm("transformer.ln_f", h) @ w["lm_head.weight"].T

@torch.no_grad()
def test_weights_are_those_of_a_gpt2(exported):
    run, folder = exported
    config = json.loads((folder / "config.json").read_text())
    weights = read_safetensors(folder / "model.safetensors")
    idx = torch.arange(40) * 37 % config["vocab_size"]
    torch.testing.assert_close(gpt2(weights, idx, config["n_head"]), load_model(run)(idx[None]).logits[0])
    sizes = dict(vocab_size=1500, n_positions=96, n_embd=32, n_layer=2, n_head=2)
    assert config == config | sizes and config["bos_token_id"] == 1499 == load_tokenizer(run).eot_token
    tied = torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"])
    assert config["tie_word_embeddings"] == tied == load_model(run).config.tie_weights

def test_a_checkpoint_is_exported_and_of_two_runs_none(exported, tmp_path):
    run, folder = exported
    (path,) = (Path(run) / "checkpoints").iterdir()  # of the only step, as best.pt
    ev.main([str(path), "--export", f"{tmp_path}/x"])
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "x" / path.name).read_bytes()
    for there in f"{tmp_path}/x", run:  # never over what is there
        with raises(OSError):
            ev.main([run, "--export", there])
    assert (Path(run) / "config.json").read_bytes() != (folder / "config.json").read_bytes()
    with raises(InputError, match="expected one run"):
        ev.main([run, run, "--export", f"{tmp_path}/y"])

# ---- the same by transformers
@fixture(scope="module")
def loaded(exported):
    transformers = importorskip("transformers", reason="transformers is not installed")
    run, folder = exported
    tokenizer = transformers.AutoProcessor.from_pretrained(folder, padding_side="right")  # as officially
    assert type(tokenizer) is type(transformers.AutoTokenizer.from_pretrained(folder))
    return run, transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), tokenizer

def test_ids_are_ours_after_eot(loaded):
    run, _, tokenizer = loaded
    encoding, texts = load_tokenizer(run), lines(10_000)
    assert tokenizer(texts).input_ids == [[encoding.eot_token, *encoding.encode_ordinary(x)] for x in texts]
    assert tokenizer.decode(tokenizer(texts[0]).input_ids, skip_special_tokens=True) == texts[0]
    assert tokenizer("a", "b").input_ids == [encoding.eot_token, 97, 98]

@torch.no_grad()
def test_logits_are_ours(loaded):
    run, model, tokenizer = loaded
    ours = load_model(run)
    for text in lines(100):
        idx = torch.tensor([tokenizer(text).input_ids[:96]])
        torch.testing.assert_close(model(idx).logits, ours(idx).logits, rtol=0, atol=1e-4)

@torch.no_grad()
@mark.parametrize("task", ["supplement", "ewok"])
def test_scores_are_those_of_a_plain_loop(loaded, toy, task):
    """Choice by choice: sums of the log-probabilities of the tokens that end in the option."""
    run, model, tokenizer = loaded
    items, _ = ev.read_task(f"{toy}/evaluation_data/full_eval", task)
    scores, cut = ev.score(load_model(run), items, load_tokenizer(run))
    for item, ours in zip(items, scores):
        plain, start = [], len(item["context"])
        for option in item["options"]:
            text = f"{item['context']} {option}" if start else option
            found = tokenizer(text, return_offsets_mapping=True)
            logits, ids = model(torch.tensor([found.input_ids])).logits[0].log_softmax(-1), found.input_ids
            ends = [end for _, end in found.offset_mapping]
            plain.append(sum(logits[i - 1, ids[i]].item() for i in range(1, len(ids)) if ends[i] > start))
        np.testing.assert_allclose(ours, plain, atol=1e-3)
        assert np.argmax(ours) == np.argmax(plain)
    assert not cut and len(items) >= 200
