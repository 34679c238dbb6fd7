"""eval.py: statistics against published examples, scores against a plain transcription of the rules, benchmarks, gates and files.

Models are tiny and random, or a table of preferred strings whose accuracies can be counted by hand: nothing here has to learn.
"""
import csv
import glob
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
import torch
from PIL import Image

import eval as evaluation
import prepare_data
import train
from gatevlm import GateVLM, GateVLMConfig, InputError, load_checkpoint, load_model, save_checkpoint

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FULL_EVAL = os.path.join(os.path.dirname(ROOT), "shared", "data", "evaluation_data", "full_eval")
TINY = dict(n_layer=2, n_head=2, n_embd=16, n_image_layer=1, block_size=64, gate="soft-token", dropout=0.0)


def read(path):
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def read_rows(path):
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f if line.strip()]


def write_rows(path, rows):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def eval_root(folder):
    return os.path.join(folder, "evaluation_data", "full_eval")


def shorten(folder, out, n):
    """A copy of a data folder with the first n lines of every benchmark file, and all of its features."""
    shutil.copytree(folder, out)
    for path in glob.glob(os.path.join(eval_root(out), "*", "*.jsonl")):
        write_rows(path, read_rows(path)[:n])
    return str(out)


def random_model(folder, seed=0, noise=0.15, **changes):
    """A model for a data folder, in eval mode. noise moves every parameter, those that start at zero too, so that scores differ."""
    meta = prepare_data.load_meta(folder)
    torch.manual_seed(seed)
    model = GateVLM(GateVLMConfig(**TINY | dict(vocab_size=meta["vocab_size"], image_dim=meta["image_dim"], n_image_token=meta["n_image_token"]) | changes))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 2 * noise).add_(noise * torch.randn_like(p))
        if model.image_encoder is not None and noise:
            model.image_encoder.mean.uniform_(0.3, 0.7)
            model.image_encoder.std.uniform_(0.2, 0.4)
    return model.eval()


def save_run(out, folder, model, seed=1, **train_values):
    """A run folder as train.py leaves it, without training."""
    os.makedirs(out)
    config = {"data": str(folder), "out": str(out), "seed": seed, **train_values}
    prepare_data.write_json(os.path.join(out, "config.json"), {"preset": "toy", "train": config, "model": asdict(model.config)})
    for name in "tokenizer.tiktoken", "meta.json":
        shutil.copy(os.path.join(folder, name), out)
    save_checkpoint(os.path.join(out, "best.pt"), {"model": model.state_dict(), "model_config": asdict(model.config)})
    return str(out)


@pytest.fixture(scope="module")
def small(toy, tmp_path_factory):
    return shorten(toy, tmp_path_factory.mktemp("small") / "data", 24)


@pytest.fixture(scope="module")
def few(toy, tmp_path_factory):
    return shorten(toy, tmp_path_factory.mktemp("few") / "data", 6)


@pytest.fixture(scope="module")
def few16(toy16, tmp_path_factory):
    return shorten(toy16, tmp_path_factory.mktemp("few16") / "data", 6)


@pytest.fixture(scope="module")
def run(few, tmp_path_factory):
    """A run folder of a random model that sees."""
    return save_run(tmp_path_factory.mktemp("run") / "run", few, random_model(few))


@pytest.fixture(scope="module")
def encoding(toy):
    return prepare_data.load_tokenizer(toy)


# ----------------------------------------------------------------------------------------------------------------------
# statistics: published worked examples, and exact arithmetic beside them

def mid_ranks(x):
    """By the definition: a value's rank is 1 + how many are smaller + half of the others that equal it."""
    return [1 + sum(b < a for b in x) + Fraction(sum(b == a for b in x) - 1, 2) for a in x]


def exact_H(groups):
    x = [value for group in groups for value in group]
    r, n = iter(mid_ranks(x)), len(x)
    sums = sum(sum(next(r) for _ in group) ** 2 / Fraction(len(group)) for group in groups)
    ties = sum(x.count(value) ** 3 - x.count(value) for value in set(x))
    return (Fraction(12, n * (n + 1)) * sums - 3 * (n + 1)) / (1 - Fraction(ties, n ** 3 - n))


KRUSKAL = [  # the first two: documentation of scipy.stats.kruskal
    ([[1, 3, 5, 7, 9], [2, 4, 6, 8, 10]], Fraction(3, 11), 0.2727272727272734, 0.6015081344405895),
    ([[1, 1, 1], [2, 2, 2], [2, 2]], Fraction(7), 7.0, 0.0301973834223185),
    # Hollander & Wolfe (1973), p. 116, as in the help of R's kruskal.test: mucociliary efficiency of three groups
    ([[2.9, 3.0, 2.5, 2.6, 3.2], [3.8, 2.7, 4.0, 2.4], [2.8, 3.4, 3.7, 2.2, 2.0]], Fraction(27, 35), 0.7714285714285714, 0.6799647735788936)]


@pytest.mark.parametrize("groups, exact, H, p", KRUSKAL)
def test_kruskal_wallis_published(groups, exact, H, p):
    assert exact_H(groups) == exact  # our own arithmetic agrees with the source
    tail = math.erfc(math.sqrt(H / 2)) if len(groups) == 2 else math.exp(-H / 2)  # chi-squared with 1 or 2 degrees of freedom
    assert p == pytest.approx(tail, rel=1e-9)
    found = evaluation.kruskal_wallis([np.array(group, dtype=float) for group in groups])
    assert found["H"] == pytest.approx(H, rel=1e-6) and found["p"] == pytest.approx(p, rel=1e-4) and found["df"] == len(groups) - 1


def test_kruskal_wallis_exactly_on_random_ties_of_unequal_groups():
    rng = random.Random(0)
    for n_group in range(2, 7):
        groups = [[rng.randrange(6) for _ in range(rng.randrange(1, 12))] for _ in range(n_group)]
        found = evaluation.kruskal_wallis([np.array(group) for group in groups])
        assert found["H"] == pytest.approx(float(exact_H(groups)), rel=1e-9) and found["df"] == n_group - 1


def test_kruskal_wallis_of_equal_rank_sums_is_zero():
    """1..2nk dealt to and fro: every group has the same sum of ranks, so H is 0, not a rounding error below it, whose p is no number."""
    for k in range(2, 40):
        for n in range(1, 20):
            deal = np.arange(2 * n * k).reshape(2 * n, k)
            deal[1::2] = deal[1::2, ::-1]
            found = evaluation.kruskal_wallis(list(deal.T.astype(float)))
            assert found["H"] == pytest.approx(0, abs=1e-8) and found["H"] >= 0 and found["p"] == pytest.approx(1)


@pytest.mark.parametrize("groups", [[[1.0, 2.0, 3.0]], [[5.0, 5.0], [5.0]], [[1.0]]])
def test_kruskal_wallis_without_an_answer(groups):
    found = evaluation.kruskal_wallis([np.array(group) for group in groups])
    assert found["H"] is None and found["p"] is None


def student_p(t, df):
    """Two-sided p in closed form: Abramowitz & Stegun 26.7.3 (odd df) and 26.7.4 (even df)."""
    theta, series, term = math.atan(abs(t) / math.sqrt(df)), 0.0, 1.0
    for k in range(df // 2):  # cos^(2k) (even) or cos^(2k+1) (odd), each with its product of ratios
        series += term * math.cos(theta) ** (2 * k + df % 2)
        term *= (2 * k + 1 + df % 2) / (2 * k + 2 + df % 2)
    return 1 - (2 / math.pi * (theta + math.sin(theta) * series) if df % 2 else math.sin(theta) * series)


@pytest.mark.parametrize("t, df", [(12.7062047, 1), (2.2281389, 10), (1.9799304, 120)])  # printed tables of the 0.975 quantile
def test_student_t_p_tables(t, df):
    assert student_p(t, df) == pytest.approx(0.05, rel=1e-6)
    assert evaluation.student_t_p(t, df) == pytest.approx(0.05, rel=1e-6) == evaluation.student_t_p(-t, df)


def test_student_t_p_closed_forms():
    for df, t in itertools.product((1, 2, 3, 4, 7, 8, 9, 25, 120), (0.0, 0.1, 1.0, 2.5, 6.0)):
        assert evaluation.student_t_p(t, df) == pytest.approx(student_p(t, df), rel=1e-6, abs=1e-12), (t, df)
    for t in 0.5, 1.959964, 4.0, 8.0:  # Student's t becomes the normal distribution
        assert evaluation.student_t_p(t, 10 ** 9) == pytest.approx(math.erfc(t / math.sqrt(2)), rel=1e-5)
    assert 0 <= evaluation.student_t_p(1e8, 50) < 1e-100


IQ, TV = [86, 97, 99, 100, 101, 103, 106, 110, 112, 113], [2, 20, 28, 27, 50, 29, 7, 17, 6, 12]
SPEARMAN = [(IQ, TV, -29 / 165, 0.6271876),  # Wikipedia, Spearman's rank correlation coefficient, IQ and hours of TV
            ([1, 2, 3, 4, 5], [5, 6, 7, 8, 7], 0.8207826816681233, 0.08858700531354381)]  # documentation of scipy.stats.spearmanr, a tie


@pytest.mark.parametrize("x, y, rho, p", SPEARMAN)
def test_spearman_published(x, y, rho, p):
    n, a, b = len(x), mid_ranks(x), mid_ranks(y)
    middle = Fraction(n + 1, 2)
    product, xx, yy = (sum((u - middle) * (v - middle) for u, v in zip(*pair)) for pair in ((a, b), (a, a), (b, b)))
    assert math.copysign(math.sqrt(product ** 2 / (xx * yy)), product) == pytest.approx(rho, rel=1e-12)
    assert student_p(rho * math.sqrt((n - 2) / (1 - rho ** 2)), n - 2) == pytest.approx(p, rel=1e-5)  # as many digits as are printed
    found = evaluation.spearman(np.array(x, dtype=float), np.array(y, dtype=float))
    assert found["rho"] == pytest.approx(rho, rel=1e-6) and found["p"] == pytest.approx(p, rel=1e-4) and found["n"] == n


def test_spearman_of_perfect_orders_and_without_an_answer():
    x = np.array([3.0, 1.0, 2.0, 10.0])
    for y, rho in (np.exp(x), 1.0), (-x, -1.0):  # only the order counts
        found = evaluation.spearman(x, y)
        assert found["rho"] == pytest.approx(rho) and found["p"] == pytest.approx(0, abs=1e-6) and found["n"] == 4
    assert evaluation.spearman(x, np.ones(4)) == {"rho": None, "p": None, "n": 4} == evaluation.spearman(np.ones(4), x)
    for n in 0, 1, 2:
        assert evaluation.spearman(x[:n], x[:n]) == {"rho": None, "p": None, "n": n}


LONGLEY = """60323 83.0 234289 2356 1590 107608 1947; 61122 88.5 259426 2325 1456 108632 1948; 60171 88.2 258054 3682 1616 109773 1949;
61187 89.5 284599 3351 1650 110929 1950; 63221 96.2 328975 2099 3099 112075 1951; 63639 98.1 346999 1932 3594 113270 1952;
64989 99.0 365385 1870 3547 115094 1953; 63761 100.0 363112 3578 3350 116219 1954; 66019 101.2 397469 2904 3048 117388 1955;
67857 104.6 419180 2822 2857 118734 1956; 68169 108.4 442769 2936 2798 120445 1957; 66513 110.8 444546 4681 2637 121950 1958;
68655 112.6 482704 3813 2552 123366 1959; 69564 114.2 502601 3931 2514 125368 1960; 69331 115.7 518173 4806 2572 127852 1961;
70551 116.9 554894 4007 2827 130081 1962"""
# certified values of the NIST Statistical Reference Datasets, Longley (1967); p values as of R's summary(lm)
LONGLEY_FIT = [(-3482258.63459582, 890420.383607373, 0.003560), (15.0618722713733, 84.9149257747669, 0.863141),
               (-0.0358191792925910, 0.0334910077722432, 0.312681), (-2.02022980381683, 0.488399681651699, 0.002535),
               (-1.03322686717359, 0.214274163161675, 0.000944), (-0.0511041056535807, 0.226073200069370, 0.826212),
               (1829.15146461355, 455.478499142212, 0.003037)]


def exact_least_squares(X, y):
    """Coefficients by Gauss-Jordan elimination of the normal equations, in fractions."""
    k = len(X[0])
    A = [[sum(row[i] * row[j] for row in X) for j in range(k)] + [sum(row[i] * value for row, value in zip(X, y))] for i in range(k)]
    for i in range(k):
        A[i] = [value / A[i][i] for value in A[i]]
        for j in set(range(k)) - {i}:
            A[j] = [a - A[j][i] * b for a, b in zip(A[j], A[i])]
    return [row[-1] for row in A]


def test_least_squares_longley():
    table = [[Fraction(x) for x in line.split()] for line in LONGLEY.split(";")]
    exact = exact_least_squares([[Fraction(1), *row[1:]] for row in table], [row[0] for row in table])
    assert [float(b) for b in exact] == pytest.approx([b for b, _, _ in LONGLEY_FIT], rel=1e-12)  # the data are typed in right
    data = np.array(table, dtype=float)
    fit = evaluation.least_squares({f"x{i}": data[:, i] for i in range(1, 7)}, data[:, 0])
    assert list(fit["terms"]) == ["intercept", "x1", "x2", "x3", "x4", "x5", "x6"] and fit["n"] == 16
    assert fit["r2"] == pytest.approx(0.995479004577296, rel=1e-6)
    for found, (coef, se, p) in zip(fit["terms"].values(), LONGLEY_FIT):
        assert found["coef"] == pytest.approx(coef, rel=1e-6) and found["se"] == pytest.approx(se, rel=1e-6)
        assert found["t"] == pytest.approx(coef / se, rel=1e-6) and found["p"] == pytest.approx(p, abs=1e-6)  # six digits are published
        assert found["p"] == pytest.approx(student_p(coef / se, 9), rel=1e-4)


def test_least_squares_without_an_answer():
    x = np.arange(5.0)
    assert evaluation.least_squares({"x": x, "again": 2 * x}, x ** 2) is None  # the columns say the same
    assert evaluation.least_squares({"x": np.ones(5)}, x) is None  # as the intercept does
    assert evaluation.least_squares({"x": x[:2]}, x[:2]) is None  # no degree of freedom is left
    assert evaluation.least_squares({"x": x}, np.zeros(5)) is None  # nothing to explain
    assert evaluation.least_squares({"x": x, "never": np.zeros(5)}, x ** 2) is None  # a column of nothing


# ----------------------------------------------------------------------------------------------------------------------
# scores: a plain transcription of the rules, one sentence at a time

def options_of(task, row, protocol):
    """(context, options as they follow it, image) of a line, from the table of the official rules."""
    old = protocol == "2024"
    if task in ("blimp", "supplement"):
        return "", [" " * old + row["sentence_good"], " " * old + row["sentence_bad"]], None
    if task == "ewok":
        return row["Context1"], [" " + row["Target1"], " " + row["Target2"]], None
    if task == "winoground":
        return "", [" " * old + row["caption_0"], " " * old + row["caption_1"]], (row["image_idx"], int(row["image_key"][-1]))
    question = "Question: " + row["question"] + " Answer:" if old else row["question"]
    return question, [" " + answer for answer in [row["target_ans"]] + row["distractors"]], (row["idx_in_hf_dataset"],)


@torch.no_grad()
def plain_score(model, encoding, context, option, features=None):
    """Sum of log-probabilities of the tokens of context + option that end after the context. Texts longer than the block are read
    in windows of block_size tokens, each starting half a block later; a token is scored in the first window that predicts it."""
    ids, block = [encoding.eot_token] + encoding.encode_ordinary(context + option), model.config.block_size
    counts, end = [False], 0
    for i in ids[1:]:
        end += len(encoding.decode_single_token_bytes(i))
        counts.append(end > len(context.encode()))
    total, start, done = 0.0, 0, 1
    while done < len(ids):
        window = ids[start:start + block + 1]
        image = None if features is None else torch.from_numpy(features[None].astype(np.float32))
        logp = model(torch.tensor([window[:-1]]), image=image)[0][0].log_softmax(dim=-1)
        for at in range(done, start + len(window)):
            if counts[at]:
                total += logp[at - 1 - start, ids[at]].item()
        start, done = start + max(1, block // 2), start + len(window)
    return total


def check_scores(model, encoding, root, tasks=tuple(evaluation.TASKS), protocol="2025", batches=(1, 100, None)):
    """Every item of every task, with its image and without; returns the plain scores {task: [(n_option,)]}."""
    plain = {}
    for task in tasks:
        rows = [row for path in sorted(glob.glob(os.path.join(root, f"{task}_filtered", "*.jsonl"))) for row in read_rows(path)]
        sees = task in ("winoground", "vqa") and model.config.n_image_token > 0
        features = np.load(os.path.join(root, f"{task}_states.npy")) if sees else None
        items = evaluation.read_task(root, task, protocol)
        assert len(items) == len(rows) > 0
        for states in [None, features] if sees else [None]:
            plain[task] = []
            for row in rows:
                context, options, image = options_of(task, row, protocol)
                plain[task].append([plain_score(model, encoding, context, option, None if states is None else states[image]) for option in options])
            given = None if states is None else evaluation.read_states(root, task, items, model.config)
            for batch_tokens in batches:
                found = evaluation.score_items(model, items, encoding, given, batch_tokens)
                for item, one, other in zip(items, found, plain[task], strict=True):
                    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-3, err_msg=f"{item['where']}, batch_tokens {batch_tokens}")
    return plain


@pytest.mark.parametrize("protocol", ["2025", "2024"])
def test_scores_are_the_plain_ones_on_every_toy_item(small, encoding, protocol):
    model = random_model(small)
    plain = check_scores(model, encoding, eval_root(small), protocol=protocol)
    gaps = [abs(each[0] - each[1]) for scores in plain.values() for each in scores]
    assert np.median(gaps) > 0.5  # differences that a mistake would change
    results, _, missing = evaluation.benchmark(model, encoding, eval_root(small), protocol=protocol)
    assert missing == [] and list(results) == list(evaluation.TASKS)
    for task in "ewok", "winoground", "vqa":
        assert results[task]["mean"] == pytest.approx(100 * np.mean([each[0] >= max(each) for each in plain[task]]))


VARIANTS = {gate: dict(gate=gate) for gate in ("soft-feature", "soft-token", "hard-feature", "hard-token", "none")} | {
    f"{kind} {place}": dict(modulation=kind, modulate_at=place) for kind in ("film", "dyintra") for place in ("cross", "text", "image")} | {
    "channel attention": dict(channel_attention=True), "mlp encoder": dict(image_encoder="mlp"), "no encoder": dict(image_encoder="none"),
    "lcg": dict(contrastive="lcg"), "clip": dict(contrastive="clip"), "untied": dict(tie_weights=False), "blind": dict(n_image_token=0)}


@pytest.mark.parametrize("name", VARIANTS)
def test_scores_are_the_plain_ones_for_every_kind_of_model(few, encoding, name):
    check_scores(random_model(few, seed=1, **VARIANTS[name]), encoding, eval_root(few), protocol=("2025", "2024")[len(name) % 2])


@pytest.mark.parametrize("changes", [dict(gate="soft-feature"), dict(modulation="film", modulate_at="image"), dict(modulation="dyintra", modulate_at="text")])
def test_scores_are_the_plain_ones_with_patches(few16, changes):
    check_scores(random_model(few16, seed=2, **changes), prepare_data.load_tokenizer(few16), eval_root(few16))


@pytest.mark.parametrize("block_size", [1, 2, 7, 8, 64])
def test_texts_longer_than_the_block_are_read_in_windows(few, encoding, block_size):
    """Contexts and options of 0 to 40 tokens on both sides of every border, in one batch with and without images."""
    model, rng = random_model(few, seed=3, block_size=block_size, modulation="film"), random.Random(0)
    words = ["the", "red", "circle", "is", "zygote", "ü", "to the left of", "7"]
    text = lambda n: " ".join(rng.choice(words) for _ in range(n))
    items = [{"uid": "x", "context": context, "options": [" " + text(1 + (7 * k + 5 * j) % 19) for j in range(2)], "answers": [], "image": (k % 5,),
              "tag": None, "where": f"item {k}"} for k, context in enumerate(["", *(text(n) for n in range(1, 20, 2))])]
    states = np.load(os.path.join(eval_root(few), "vqa_states.npy"))
    lengths = {len(encoding.encode_ordinary(item["context"] + option)) for item in items for option in item["options"]}
    assert min(lengths) < 8 and max(lengths) > 40
    for features in None, states:
        for item, found in zip(items, evaluation.score_items(model, items, encoding, features, 200), strict=True):
            expected = [plain_score(model, encoding, item["context"], option, None if features is None else features[item["image"]]) for option in item["options"]]
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3, err_msg=item["where"])


@pytest.mark.skipif(not os.path.isdir(FULL_EVAL), reason="the real benchmarks are not on this machine")
def test_scores_are_the_plain_ones_on_a_real_paradigm(few, tmp_path):
    name = "irregular_plural_subject_verb_agreement_2.jsonl"
    rows = read_rows(os.path.join(FULL_EVAL, "blimp_filtered", name))
    assert len(rows) > 500
    ranks, entry = prepare_data.make_tokenizer("bpe", [row["sentence_good"] for row in rows[::2]], 400)
    words = tiktoken.Encoding("words", pat_str=entry["pattern"], mergeable_ranks=ranks, special_tokens=entry["special"])
    shutil.copytree(os.path.join(FULL_EVAL, "blimp_filtered"), tmp_path / "blimp_filtered", ignore=lambda folder, names: set(names) - {name})
    model = random_model(few, seed=4, vocab_size=words.n_vocab)
    plain = check_scores(model, words, str(tmp_path), ["blimp"], batches=(None,))["blimp"]
    results, _, missing = evaluation.benchmark(model, words, str(tmp_path))
    assert results["blimp"]["n"] == len(rows) and len(missing) == 4
    assert results["blimp"]["mean"] == pytest.approx(100 * np.mean([good >= bad for good, bad in plain]))


# ----------------------------------------------------------------------------------------------------------------------
# what guessing gets

def test_a_model_that_cannot_see_has_exactly_half_of_winoground(small, encoding):
    """Each caption is the right one for one of its two pictures, and without pictures the same one wins both times."""
    for seed in range(3):
        blind, sees = (random_model(small, seed, **changes) for changes in (dict(n_image_token=0), {}))
        result = evaluation.benchmark(blind, encoding, eval_root(small), ["winoground", "vqa"])[0]
        assert result["winoground"]["mean"] == 50.0 == result["winoground"]["mean_no_image"]
        assert result["winoground"]["text"] == result["winoground"]["image"] == result["winoground"]["group"] == 0.0
        assert result["vqa"]["mean"] == result["vqa"]["mean_no_image"]
        assert evaluation.benchmark(sees, encoding, eval_root(small), ["winoground"])[0]["winoground"]["mean_no_image"] == 50.0


def test_random_models_are_at_chance(small, encoding):
    """Items of a paradigm stand or fall together, so it is the seeds that are independent: their mean must be within 4 of its
    standard errors. A random model takes the option of fewer tokens, so paradigms with unequal options cannot be at chance."""
    seeds, found = 20, {}
    for seed in range(seeds):
        model = random_model(small, seed, noise=0.0)
        for task, result in evaluation.benchmark(model, encoding, eval_root(small))[0].items():
            fair = {uid: True for uid in result["by_uid"]}
            for item in evaluation.read_task(eval_root(small), task):
                fair[item["uid"]] &= len({len(encoding.encode_ordinary(item["context"] + option)) for option in item["options"]}) == 1
            found.setdefault(task, []).append(np.mean([x for uid, x in result["by_uid"].items() if fair[uid]]))
            assert any(fair.values()), task
    chance = {"blimp": 50, "supplement": 50, "ewok": 50, "winoground": 50, "vqa": 12.5}
    for task, x in found.items():
        error = max(np.std(x, ddof=1), 1.0) / math.sqrt(seeds)
        assert error < 8 and abs(np.mean(x) - chance[task]) < 4 * error, (task, np.mean(x), error)


EQUAL = {  # options of as many tokens, by having the same words
    "blimp_filtered/a.jsonl": [{"UID": "a", "sentence_good": "the red circle.", "sentence_bad": "the circle red."}],
    "supplement_filtered/b.jsonl": [{"sentence_good": "is it red?", "sentence_bad": "is red it?"}] * 2,
    "ewok_filtered/c.jsonl": [{"Domain": "c", "Context1": "one.", "Target1": "it is big.", "Target2": "it big is."}],
    "winoground_filtered/winoground.jsonl": [{"caption_0": "one red circle.", "caption_1": "one circle red.", "image_idx": 0,
                                              "image_key": f"image_{k}"} for k in (0, 1)],
    "vqa_filtered/vqa.jsonl": [{"question": "what?", "target_ans": "8", "distractors": list("1234567"), "idx_in_hf_dataset": 0}]}


@pytest.fixture()
def equal_root(tmp_path, few):
    for name, rows in EQUAL.items():
        write_rows(os.path.join(tmp_path, "equal", name), rows)
    for name in "winoground_states.npy", "vqa_states.npy":
        shutil.copy(os.path.join(eval_root(few), name), tmp_path / "equal")
    return str(tmp_path / "equal")


def test_equal_logits_are_all_ties_and_the_report_says_so(few, encoding, equal_root, tmp_path, capsys):
    model = random_model(few)
    with torch.no_grad():
        model.token_embedding.weight.zero_()  # tied with the head: every logit is 0
    out = save_run(tmp_path / "run", few, model)
    results = evaluation.main([out, "--babylm_eval", equal_root])[out]
    printed = capsys.readouterr().out
    for task, n in {"blimp": 1, "supplement": 2, "ewok": 1, "winoground": 2, "vqa": 1}.items():
        assert results[task]["mean"] == 100.0 and results[task]["n"] == results[task]["ties"] == n  # as officially: the first option
        assert re.search(rf"^{task}: all {n} items are ties", printed, re.MULTILINE)
    assert results["winoground"]["text"] == results["winoground"]["image"] == results["winoground"]["group"] == 0.0  # these are strict
    evaluation.main([save_run(tmp_path / "random", few, random_model(few)), "--babylm_eval", equal_root, "--tasks", "blimp,ewok"])
    assert "items are ties" not in capsys.readouterr().out


def test_nan_weights_are_refused(few, encoding, equal_root):
    model = random_model(few)
    with torch.no_grad():
        model.ln.weight[3] = math.nan
    for task in evaluation.TASKS:
        with pytest.raises(InputError, match=r"filtered.\w+\.jsonl, line 1: .*NaN"):
            evaluation.benchmark(model, encoding, equal_root, [task])


# ----------------------------------------------------------------------------------------------------------------------
# a model that prefers given strings: accuracies counted by hand

class Prefers:
    """prefer: {image or None: {text: logit}}. Where what was read so far begins such a text, its next token gets that logit and all
    others 0. The image is one number."""

    def __init__(self, encoding, prefer):
        self.config = SimpleNamespace(n_image_token=1, image_dim=1, block_size=128, vocab_size=encoding.n_vocab)
        self.read, self.eot = [], encoding.eot_token
        self.prefer = {key: [(encoding.encode_ordinary(text), logit) for text, logit in texts.items()] for key, texts in prefer.items()}

    def parameters(self):
        yield torch.zeros(1)

    training = False

    def train(self, mode=True):
        return self

    eval = train

    def trunk(self, idx, image=None, cache=None, position=None, mask=None):
        h = torch.zeros(*idx.shape, 1)
        for b, t in np.ndindex(*idx.shape):
            seen = mask[b, t].nonzero()[:, 0].tolist()
            seen.sort(key=lambda k: position[b, k].item())
            h[b, t] = len(self.read)
            self.read.append((None if image is None else round(image[b].item()), [idx[b, k].item() for k in seen]))
        return h, None, None, h

    def logits(self, h):
        logits = torch.zeros(*h.shape[:-1], self.config.vocab_size)
        for at in np.ndindex(*h.shape[:-1]):
            key, (eot, *ids) = self.read[round(h[at].item())]
            assert eot == self.eot
            for text, logit in self.prefer.get(key, []):
                if text[:len(ids)] == ids and len(text) > len(ids):
                    logits[(*at, text[len(ids)])] = logit
        return logits


def prefer(encoding, root, table, task, protocol):
    results, predictions, missing = evaluation.benchmark(Prefers(encoding, table), encoding, str(root), [task], protocol)
    assert missing == []
    return results[task], {uid: rows["predictions"] for uid, rows in predictions[task].items()}


def both_forms(*texts, logit=20.0):
    return {form: logit for text in texts for form in (text, " " + text)}


def n_token(encoding, *texts):
    return [len(encoding.encode_ordinary(text)) for text in texts]


SENTENCES = {"one": [("agree", "the circle is red.", "the circle are red."),  # preferred: right
                     ("agree", "one 12 is.", "one 21 is."),  # neither, of as many tokens: a tie counts as right
                     ("case", "these 5 are big.", "these 5 is big."),  # right in its 2024 form only, and a tie in 2025
                     ("agree", "two cross is big.", "two crosses are big."),  # the bad one preferred: wrong
                     ("agree", "big 123.", "big 12."),  # neither, and one token more: wrong
                     ("case", "so 45 are.", "so 4 are."),  # right in its 2024 form only; in 2025 one token more: wrong
                     ("case", "yes 67.", "yes 76.")],  # the bad one preferred in its 2024 form only; a tie in 2025
             "two": [("solo", "there are two.", "there is two.")]}
SENTENCES_PREFER = {None: both_forms("the circle is red.", "two crosses are big.", "there are two.")
                    | {" these 5 are big.": 20.0, " so 45 are.": 20.0, " yes 76.": 20.0}}


@pytest.mark.parametrize("protocol, ties", [("2025", 3), ("2024", 1)])
def test_blimp_by_hand(encoding, tmp_path, protocol, ties):
    for name, rows in SENTENCES.items():
        write_rows(tmp_path / "blimp_filtered" / f"{name}.jsonl", [{"UID": uid, "sentence_good": good, "sentence_bad": bad} for uid, good, bad in rows])
    for good, bad, more in [("one 12 is.", "one 21 is.", 0), ("these 5 are big.", "these 5 is big.", 0), ("yes 67.", "yes 76.", 0),
                            ("big 123.", "big 12.", 1), ("so 45 are.", "so 4 are.", 1)]:
        for lead in "", " ":
            a, b = n_token(encoding, lead + good, lead + bad)
            assert a == b + more
    result, predictions = prefer(encoding, tmp_path, SENTENCES_PREFER, "blimp", protocol)
    # agree: right, tie, wrong, wrong. case: tie, wrong, tie in 2025; right, right, wrong in 2024. solo: right.
    expected = {"agree": 50.0, "case": 200 / 3, "solo": 100.0}
    assert result["by_uid"] == pytest.approx(expected) and (result["n"], result["ties"]) == (8, ties)
    assert result["mean"] == pytest.approx((50 + 200 / 3 + 100) / 3)  # over UIDs, though 5 of 8 items are right
    assert set(result) == {"mean", "by_uid", "n", "ties"}
    chosen = {"2025": ["these 5 are big.", "so 4 are.", "yes 67."], "2024": ["these 5 are big.", "so 45 are.", "yes 76."]}[protocol]
    assert predictions["case"] == [{"id": f"case_{k}", "pred": text} for k, text in enumerate(chosen)]  # as the file spells them
    assert [row["id"] for row in predictions["agree"]] == [f"agree_{k}" for k in range(4)]
    assert [row["pred"] for row in predictions["agree"]] == ["the circle is red.", "one 12 is.", "two crosses are big.", "big 12."]
    assert predictions["solo"] == [{"id": "solo_0", "pred": "there are two."}] and set(predictions) == {"agree", "case", "solo"}


@pytest.mark.parametrize("protocol, two", [("2025", 0.0), ("2024", 100.0)])
def test_supplement_by_hand(encoding, tmp_path, protocol, two):
    """The UID is the file's name, whatever a field says. 2024 also puts a space before these sentences."""
    write_rows(tmp_path / "supplement_filtered" / "one.jsonl", [{"UID": "no", "sentence_good": good, "sentence_bad": bad} for good, bad in (
        ("the circle is red.", "the circle are red."), ("two cross is big.", "two crosses are big."), ("big 123.", "big 12."))])
    write_rows(tmp_path / "supplement_filtered" / "two.jsonl", [{"sentence_good": "so 45 are.", "sentence_bad": "so 4 are."}])
    result, predictions = prefer(encoding, tmp_path, SENTENCES_PREFER, "supplement", protocol)
    assert result["by_uid"] == pytest.approx({"one": 100 / 3, "two": two}) and result["mean"] == pytest.approx((100 / 3 + two) / 2)
    assert (result["n"], result["ties"]) == (4, 0) and [row["id"] for row in predictions["one"]] == ["one_0", "one_1", "one_2"]
    assert predictions["two"] == [{"id": "two_0", "pred": "so 45 are." if two else "so 4 are."}]


@pytest.mark.parametrize("protocol", ["2025", "2024"])
def test_ewok_by_hand(encoding, tmp_path, protocol):
    """Context1 and a target, the same in both protocols. Domains, not files, are averaged."""
    rows = [("far", "1 is.", "red 12.", "red 21."),  # preferred: right
            ("far", "2 is.", "red 34.", "red 43."),  # the other preferred: wrong
            ("far", "3 is.", "red 56.", "red 65."),  # preferred without its context, which is not what is asked: a tie
            ("near", "4 is.", "big 788.", "big 78.")]  # neither, and longer: wrong
    items = [{"Domain": domain, "Context1": context, "Context2": "unused", "Target1": one, "Target2": two} for domain, context, one, two in rows]
    write_rows(tmp_path / "ewok_filtered" / "a.jsonl", items[:2] + items[3:])
    write_rows(tmp_path / "ewok_filtered" / "b.jsonl", items[2:3])
    result, predictions = prefer(encoding, tmp_path, {None: {"1 is. red 12.": 20.0, "2 is. red 43.": 20.0, " red 65.": 20.0, "red 65.": 20.0}}, "ewok", protocol)
    assert result["by_uid"] == pytest.approx({"far": 200 / 3, "near": 0.0}) and result["mean"] == pytest.approx(100 / 3)
    assert (result["n"], result["ties"]) == (4, 1)
    assert predictions["far"] == [{"id": "far_0", "pred": "red 12."}, {"id": "far_1", "pred": "red 43."}, {"id": "far_2", "pred": "red 56."}]


A, B = (lambda k: f"{k} red on big."), (lambda k: f"{k} big on red.")
WINOGROUND_PREFER = {  # the image is the number 2 * image_idx + (0 or 1)
    0: both_forms(A(0)), 1: both_forms(B(0)),  # pair 0: all right
    2: both_forms(A(1)), 3: both_forms(A(1)),  # pair 1: image_1 wrong; A is equally likely with both images
    # pair 2: nothing preferred, four ties
    6: both_forms(A(3), logit=5.0) | both_forms(B(3), logit=10.0), 7: both_forms(B(3)),  # pair 3: text wrong, yet each caption finds its image
    8: both_forms(A(4), logit=3.0), 9: both_forms(A(4), logit=10.0) | both_forms(B(4)),  # pair 4: text right, but A is likelier with image_1
    10: {" so 45.": 20.0},  # pair 5 has only one image; right in its 2024 form only, else a token longer
    None: both_forms(A(0), A(1), "so 4.")}  # without images: A both times; pair 5 wrong; ties elsewhere


@pytest.mark.parametrize("protocol, last", [("2025", 0), ("2024", 1)])
def test_winoground_by_hand(encoding, tmp_path, protocol, last):
    rows = [{"caption_0": (A, B)[key](k), "caption_1": (B, A)[key](k), "image_idx": k, "image_key": f"image_{key}", "collapsed_tag": "x" if k < 2 else "y"}
            for key in (0, 1) for k in range(5)]  # the two halves of a pair are not neighbours
    rows += [{"caption_0": "so 45.", "caption_1": "so 4.", "image_idx": 5, "image_key": "image_0", "collapsed_tag": "y"}]
    write_rows(tmp_path / "winoground_filtered" / "winoground.jsonl", rows)
    np.save(tmp_path / "winoground_states.npy", np.arange(12, dtype=np.float16).reshape(6, 2, 1, 1))
    for k, lead in itertools.product(range(5), ("", " ")):
        a, b = n_token(encoding, lead + A(k), lead + B(k))
        assert a == b and a >= 6
    result, predictions = prefer(encoding, tmp_path, WINOGROUND_PREFER, "winoground", protocol)
    # image_0: 1 1 tie 0 1 and the last; image_1: 1 0 tie 1 1
    assert result["mean"] == pytest.approx(100 * (8 + last) / 11) and (result["n"], result["ties"]) == (11, 2)
    assert result["by_uid"] == {"winoground": result["mean"]}
    assert result["by_tag"] == pytest.approx({"x": 75.0, "y": 100 * (5 + last) / 7})  # pairs 0 and 1; the others
    # of the 5 whole pairs: text 0 and 4, image 0 and 3, both 0; an equal score is not a higher one
    assert (result["text"], result["image"], result["group"]) == pytest.approx((40.0, 40.0, 20.0))
    # without images: 1 1 tie tie tie 0, and 0 0 tie tie tie
    assert result["mean_no_image"] == pytest.approx(100 * 8 / 11) and result["ties_no_image"] == 6
    assert result["by_tag_no_image"] == pytest.approx({"x": 50.0, "y": 100 * 6 / 7})
    chosen = [A(0), A(1), A(2), B(3), A(4), B(0), A(1), B(2), B(3), B(4), "so 45." if last else "so 4."]
    assert predictions == {"winoground": [{"id": f"winoground_{k}", "pred": text} for k, text in enumerate(chosen)]}


@pytest.mark.parametrize("protocol, right", [("2025", [1, 0, 0, 1]), ("2024", [1, 0, 1, 1])])
def test_vqa_by_hand(encoding, tmp_path, protocol, right):
    old = protocol == "2024"
    ask = lambda question: f"Question: {question} Answer:" if old else question
    answers = lambda target, other: {"target_ans": target, "distractors": [f"{other}{k}" for k in range(7)]}
    rows = [{"question": "red?", "idx_in_hf_dataset": 2, "collapsed_tag": "t", **answers("17", 3)},
            {"question": "big?", "idx_in_hf_dataset": 0, "collapsed_tag": "t", **answers("28", 3)},
            {"question": "so?", "idx_in_hf_dataset": 0, **answers("399", 4)},  # the target is one token longer
            {"question": "one?", "idx_in_hf_dataset": 1, **answers("47", 5)}]  # nothing preferred: all eight tie
    write_rows(tmp_path / "vqa_filtered" / "vqa.jsonl", rows)
    np.save(tmp_path / "vqa_states.npy", np.arange(3, dtype=np.float32).reshape(3, 1, 1))
    table = {2: {ask("red?") + " 17": 20.0}, 0: {ask("big?") + " 34": 20.0, "Question: so? Answer: 399": 20.0},
             None: {ask("red?") + " 36": 20.0, ask("big?") + " 28": 20.0}}
    assert len(set(n_token(encoding, "so? 399", "so? 400"))) == 1 and np.diff(n_token(encoding, "so? 40", "so? 399")) == 1
    result, predictions = prefer(encoding, tmp_path, table, "vqa", protocol)
    assert result["mean"] == pytest.approx(100 * np.mean(right)) and (result["n"], result["ties"]) == (4, 1 if old else 2)
    # without the image: wrong, right, wrong (longer than seven that tie), tie
    assert result["mean_no_image"] == 50.0 and result["ties_no_image"] == 2
    assert result["by_tag"] == {"t": 50.0} == result["by_tag_no_image"]
    chosen = ["17", "34", "399" if old else "40", "47"]  # of equal distractors the first
    assert predictions == {"vqa": [{"id": f"vqa_{k}", "pred": text} for k, text in enumerate(chosen)]}


# ----------------------------------------------------------------------------------------------------------------------
# files

def content(path):
    with open(path, "rb") as f:
        return f.read()


def test_main_writes_the_same_files_twice(run, few, encoding, tmp_path, capsys):
    out = shutil.copytree(run, tmp_path / "run")
    names = ["results.json", "predictions.json", "gates.csv", "gates.json", "gates.png", "gates_by_class.png", "paradigms.png"]
    returned = evaluation.main([str(out), "--paradigms"])
    printed, first = capsys.readouterr().out, {name: content(out / name) for name in names}
    evaluation.main([str(out)])
    assert {name: content(out / name) for name in names} == first and not glob.glob(str(out / "*.part"))
    results, predictions, _ = evaluation.benchmark(load_model(run), encoding, eval_root(few))
    assert read(out / "results.json") == results == returned[str(out)] and read(out / "predictions.json") == predictions
    assert list(results) == ["blimp", "supplement", "ewok", "winoground", "vqa"]
    for task, result in results.items():
        path = os.path.join(eval_root(few), f"{task}_filtered")
        assert result["n"] == 6 * len(os.listdir(path)) == sum(len(rows["predictions"]) for rows in predictions[task].values())
        line = next(line for line in printed.splitlines() if line.startswith(f"{task} ")).split()
        assert line[1:4] == [str(result["n"]), f"{evaluation.TASKS[task]:.2f}", f"{result['mean']:.2f}"]
        for uid, value in result["by_uid"].items():  # --paradigms
            assert re.search(rf"^{task}: {uid} +{value:.2f}$", printed, re.MULTILINE)
    mean = np.mean([result["mean"] for result in results.values()])
    assert re.search(rf"^mean of tasks +{mean:.2f}$", printed, re.MULTILINE)


def test_missing_tasks_are_named_and_left_out(run, few, tmp_path, capsys):
    out, root = shutil.copytree(run, tmp_path / "run"), shutil.copytree(eval_root(few), tmp_path / "full_eval")
    shutil.rmtree(root / "ewok_filtered")
    os.remove(root / "supplement_filtered" / "turn_taking.jsonl")  # a file less is a UID less
    os.remove(root / "vqa_states.npy")
    results = evaluation.main([str(out), "--babylm_eval", str(root)])[str(out)]
    printed = capsys.readouterr().out
    assert list(results) == ["blimp", "supplement", "winoground"] and set(results["supplement"]["by_uid"]) == {"qa_agreement", "qa_congruence"}
    assert re.search(r"ewok: left out, .*ewok_filtered", printed) and re.search(r"vqa: left out, .*vqa_states.npy", printed)
    assert set(read(out / "predictions.json")) == set(results)


def test_a_blind_run_needs_no_features(few, tmp_path):
    for name in "winoground_states.npy", "vqa_states.npy":
        assert os.path.exists(os.path.join(eval_root(few), name))
    root = shutil.copytree(eval_root(few), tmp_path / "full_eval", ignore=shutil.ignore_patterns("*.npy"))
    out = save_run(tmp_path / "run", few, random_model(few, n_image_token=0))
    results = evaluation.main([out, "--babylm_eval", str(root)])[out]
    assert list(results) == list(evaluation.TASKS) and results["winoground"]["mean"] == 50.0


def test_only_the_tasks_asked_for(run, few, encoding, tmp_path):
    out = str(shutil.copytree(run, tmp_path / "run"))
    assert list(evaluation.main([out, "--tasks", "vqa,blimp"])[out]) == ["vqa", "blimp"]
    predictions = read(os.path.join(out, "predictions.json"))
    expected = evaluation.benchmark(load_model(out), encoding, eval_root(few), ["vqa", "blimp"], "2024")[0]
    assert evaluation.main([out, "--tasks", "vqa,blimp", "--protocol", "2024"])[out] == expected
    for flags in ["--protocol", "2023"], ["--caption", "1000000"], ["--captoin", "1"]:
        with pytest.raises(InputError, match=flags[0]):
            evaluation.main([out, "--tasks", "ewok", *flags])
    assert "ewok" not in read(os.path.join(out, "results.json"))  # refused before anything was written
    evaluation.main([out, "--tasks", "blimp,vqa,blimp"])  # asking twice is asking once
    again = read(os.path.join(out, "predictions.json"))
    assert again == predictions
    for tasks in "glue", "blimp,", "", "Blimp":
        with pytest.raises(InputError, match="--tasks"):
            evaluation.main([out, "--tasks", tasks])


def test_an_empty_folder_is_refused(run, tmp_path):
    out = str(shutil.copytree(run, tmp_path / "run"))
    for folder in tmp_path, tmp_path / "nowhere":
        with pytest.raises(InputError, match=re.escape(str(folder))):
            evaluation.main([out, "--babylm_eval", str(folder)])
    assert not os.path.exists(os.path.join(out, "results.json"))


def with_(**changes):
    return lambda row: json.dumps(row | changes).encode()


def without(name):
    return lambda row: json.dumps({key: value for key, value in row.items() if key != name}).encode()


DAMAGE = {
    "not json": ("blimp", lambda row: b"{sentence"), "a list": ("blimp", lambda row: b"[1, 2]"), "null": ("ewok", lambda row: b"null"),
    "cut short": ("vqa", lambda row: json.dumps(row).encode()[:-9]), "too deep": ("blimp", lambda row: b"[" * 100_000),
    "not utf-8": ("supplement", lambda row: json.dumps(row).encode().replace(b"is", b"\xff\xfe")),
    "a long number": ("vqa", lambda row: b'{"x": ' + b"9" * 5000 + b"}"),
    "no UID": ("blimp", without("UID")), "no good": ("supplement", without("sentence_good")), "no Target2": ("ewok", without("Target2")),
    "no image_idx": ("winoground", without("image_idx")), "no question": ("vqa", without("question")),
    "empty good": ("blimp", with_(sentence_good="")), "empty context": ("ewok", with_(Context1="")), "empty target": ("vqa", with_(target_ans="")),
    "UID a number": ("blimp", with_(UID=3)), "bad null": ("supplement", with_(sentence_bad=None)), "target a list": ("ewok", with_(Target1=["a"])),
    "image_idx a text": ("winoground", with_(image_idx="1")), "image_idx true": ("winoground", with_(image_idx=True)),
    "image_idx 1.0": ("winoground", with_(image_idx=1.0)), "image_key": ("winoground", with_(image_key="image_2")),
    "6 distractors": ("vqa", with_(distractors=list("123456"))), "8 distractors": ("vqa", with_(distractors=list("12345678"))),
    "a text of distractors": ("vqa", with_(distractors="1234567")), "a number among them": ("vqa", with_(distractors=[1, *"234567"])),
    "an empty one": ("vqa", with_(distractors=["", *"234567"])), "no distractors": ("vqa", with_(distractors=[])),
    "surrogate": ("blimp", with_(sentence_bad="half \ud83d of it")), "surrogate UID": ("blimp", with_(UID="\ud83d")),
    "surrogate context": ("ewok", with_(Context1="\udc00")), "surrogate distractor": ("vqa", with_(distractors=["\udc00", *"234567"])),
    "surrogate tag": ("winoground", with_(collapsed_tag="\ud83d")),
    "image_idx too large": ("winoground", with_(image_idx=200)), "image_idx below 0": ("winoground", with_(image_idx=-1)),
    "image_idx far too large": ("vqa", with_(idx_in_hf_dataset=10 ** 30)), "idx below 0": ("vqa", with_(idx_in_hf_dataset=-200))}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_lines_stop_the_run(run, few, tmp_path, name):
    task, damage = DAMAGE[name]
    out, root = shutil.copytree(run, tmp_path / "run"), shutil.copytree(eval_root(few), tmp_path / "full_eval")
    (out / "results.json").write_text("{}")
    path = sorted(glob.glob(str(root / f"{task}_filtered" / "*.jsonl")))[-1]
    lines = [json.dumps(row).encode() for row in read_rows(path)]
    with open(path, "wb") as f:
        f.write(b"\n".join([*lines[:3], b"", damage(json.loads(lines[3])), *lines[4:]]) + b"\n")  # an empty line counts, but is no item
    with pytest.raises(InputError) as error:
        evaluation.main([str(out), "--babylm_eval", str(root), "--tasks", f"{task},ewok"])
    assert f"{path}, line 5: " in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < len(path) + 400
    assert content(out / "results.json") == b"{}" and not glob.glob(str(out / "*.part"))


def test_lines_that_are_fine(run, few, encoding, tmp_path):
    """A BOM, CRLF, empty lines, unknown fields, other alphabets and a text that looks like a special token."""
    rows = [{"UID": "x", "sentence_good": "naïve 猫 🐈", "sentence_bad": "<|endoftext|>", "more": [1]}, {"UID": "x", "sentence_good": "a", "sentence_bad": "b"}]
    os.makedirs(tmp_path / "blimp_filtered")
    text = "\ufeff" + "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "blimp_filtered" / "x.jsonl").write_bytes(text.encode())
    items = evaluation.read_task(str(tmp_path), "blimp")
    assert [item["answers"] for item in items] == [["naïve 猫 🐈", "<|endoftext|>"], ["a", "b"]]
    assert [item["where"].rsplit(", ", 1)[1] for item in items] == ["line 1", "line 3"]
    model = load_model(run)
    for item, found in zip(items, evaluation.score_items(model, items, encoding), strict=True):
        assert found == pytest.approx([plain_score(model, encoding, "", text) for text in item["answers"]], rel=1e-4, abs=1e-3)


STATES = {"wrong width": lambda x: x[..., :767], "no token axis": lambda x: x[..., 0, :], "two tokens": lambda x: x.repeat(2, axis=-2),
          "integers": lambda x: x.astype(np.int32), "text": lambda x: x.astype("U3"), "no rows": lambda x: x[:0], "empty": lambda x: None,
          "cut short": lambda x: None, "an archive": lambda x: None, "NaN": lambda x: None, "inf": lambda x: None}


@pytest.mark.parametrize("task", ["winoground", "vqa"])
@pytest.mark.parametrize("name", STATES)
def test_damaged_features_stop_the_run(run, few, tmp_path, name, task):
    out, root = shutil.copytree(run, tmp_path / "run"), shutil.copytree(eval_root(few), tmp_path / "full_eval")
    (out / "results.json").write_text("{}")
    path = root / f"{task}_states.npy"
    states = np.load(path)
    if name in ("NaN", "inf"):
        states[1, ..., 5] = {"NaN": np.nan, "inf": -np.inf}[name]  # one number per picture of a row that the items use
        np.save(path, states)
    elif name == "an archive":
        np.savez(str(path)[:-4], states)
        os.replace(str(path)[:-4] + ".npz", path)
    elif name in ("empty", "cut short"):
        path.write_bytes(path.read_bytes()[:0 if name == "empty" else -100])
    else:
        np.save(path, STATES[name](states))
    with pytest.raises(InputError) as error:
        evaluation.main([str(out), "--babylm_eval", str(root), "--tasks", task])
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert content(out / "results.json") == b"{}" and not os.path.exists(out / "predictions.json")


def test_features_of_any_float_type(run, few, encoding, tmp_path):
    root = shutil.copytree(eval_root(few), tmp_path / "full_eval")
    expected = evaluation.benchmark(load_model(run), encoding, eval_root(few), ["winoground", "vqa"])[0]
    for kind in np.float64, np.float32:
        for task in "winoground", "vqa":
            np.save(root / f"{task}_states.npy", np.load(os.path.join(eval_root(few), f"{task}_states.npy")).astype(kind))
        assert evaluation.benchmark(load_model(run), encoding, str(root), ["winoground", "vqa"])[0] == expected


def test_the_command_line_ends_with_one_line_and_status_2(run, few, tmp_path):
    root = shutil.copytree(eval_root(few), tmp_path / "full_eval")
    (root / "blimp_filtered" / "bad.jsonl").write_text('{"UID": 1}\n')
    process = subprocess.run([sys.executable, os.path.join(ROOT, "eval.py"), run, "--babylm_eval", str(root)], capture_output=True, text=True,
                             env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert process.returncode == 2 and process.stderr.splitlines()[-1].startswith("eval.py: ") and "Traceback" not in process.stderr
    assert "bad.jsonl, line 1" in process.stderr.splitlines()[-1]


# ----------------------------------------------------------------------------------------------------------------------
# several runs

def test_fold_seeds_by_hand():
    config = lambda seed, lr=0.1, width=8, out="x": {"preset": "toy", "train": {"seed": seed, "lr": lr, "out": out}, "model": {"n_embd": width}}
    rows = evaluation.fold_seeds({
        "a": (config(1), {"blimp": 60.0, "caption loss": 1.0, "captured": None}), "wide": (config(1, width=9), {"blimp": 70.0, "caption loss": None}),
        "b": (config(2, out="y"), {"blimp": 63.0, "caption loss": 3.0, "captured": 0.5}), "fast": (config(1, lr=0.2), {"blimp": 50.0, "vqa": 1.0}),
        "c": (config(3), {"blimp": 69.0, "caption loss": 5.0, "captured": 0.7})})
    assert [(name, n) for name, n, _ in rows] == [("a", 3), ("wide", 1), ("fast", 1)]
    # 60, 63, 69: mean 64, squared deviations 16 + 1 + 25 = 42 over 2; a column that a seed lacks is no mean
    assert rows[0][2] == {"blimp": (64.0, pytest.approx(math.sqrt(21))), "caption loss": (3.0, pytest.approx(2.0))}
    assert rows[1][2] == {"blimp": (70.0, None)} and rows[2][2] == {"blimp": (50.0, None), "vqa": (1.0, None)}
    rows = evaluation.fold_seeds({name: (config(seed), {"blimp": 60.0 + seed}) for name, seed in (("a", 1), ("copy", 1), ("b", 2))})
    assert [(name, n) for name, n, _ in rows] == [("a", 2), ("copy", 1)]  # the same seed twice would make the spread too small


def test_print_runs_marks_the_best(capsys):
    evaluation.print_runs([("out/a", 3, {"blimp": (64.0, math.sqrt(21)), "text loss": (3.004, 0.1)}),
                           ("out/b", 1, {"blimp": (70.0, None), "text loss": (2.5, None)}),
                           ("out/c", 2, {"blimp": (69.999, 1.0), "vqa": (20.0, 0.25)})])
    header, a, b, c = ([cell for cell in re.split(r"\s{2,}", line.strip()) if cell] for line in capsys.readouterr().out.splitlines())
    assert header == ["run", "seeds", "blimp", "text loss", "vqa"]
    assert a == ["out/a", "3", "64.00 +-4.58", "3.004 +-0.100"]
    assert b == ["out/b", "1", "70.00*", "2.500*"]  # of losses the lowest
    assert c == ["out/c", "2", "70.00 +-1.00*", "20.00 +-0.25*"]  # equal as printed: both are best
    evaluation.print_runs([("alone", 2, {"blimp": (64.0, 1.0)})])
    assert "*" not in capsys.readouterr().out


def test_several_runs_print_tables(few, encoding, tmp_path, capsys):
    names = [save_run(tmp_path / name, few, random_model(few, seed), seed, lr=lr) for name, seed, lr in (("a", 1, 0.1), ("b", 2, 0.1), ("c", 1, 0.5))]
    for name, loss in zip(names, (1.0, 2.0, 9.0)):
        prepare_data.write_json(os.path.join(name, "summary.json"), {"val_loss_caption": loss, "val_loss_text": None})
    every = evaluation.main([*names, names[0] + os.sep])  # a run named twice is one
    titles, tables, lines = [], [], capsys.readouterr().out.splitlines()
    for line in lines:
        if line and not line.startswith(("run", *names)):
            titles.append(line)
            tables.append([])
        elif line:
            tables[-1].append(line)
    assert [title.split(";")[0].split(":")[0] for title in titles] == ["scores", "items by kind, in %", "gates"] and [len(table) for table in tables] == [3] * 3
    assert list(every) == names and all(read(os.path.join(name, "results.json")) == every[name] for name in names)
    lines = tables[0]
    cells = [[cell.strip() for cell in re.split(r"\s{2,}", line.strip())] for line in lines]
    assert len(lines) == 3 and [cell.replace(",", "") for cell in cells[0][:8]] == ["run", "seeds", *"blimp supplement ewok winoground".split(), "winoground blind", "vqa"]
    assert cells[1][:2] == [names[0], "2"] and cells[2][:2] == [names[2], "1"] and cells[1][-1] == "1.500 +-0.707*" and cells[0][-1] == "caption loss"
    x, y = (every[name]["blimp"]["mean"] for name in names[:2])
    assert cells[1][2].rstrip("*") == f"{(x + y) / 2:.2f} +-{abs(x - y) / math.sqrt(2):.2f}"  # standard deviation of two
    assert cells[2][2].rstrip("*") == f"{every[names[2]]['blimp']['mean']:.2f}"
    tags, gates = ([re.split(r"\s{2,}", line.strip()) for line in table] for table in tables[1:])
    assert tags[0][-2:] == ["vqa: text decides", "vqa: text decides blind"] and tags[2][-2].rstrip("*") == f"{every[names[2]]['vqa']['by_tag']['text decides']:.2f}"
    found = [read(os.path.join(name, "gates.json")) for name in names]
    x, y = (each["by_class"]["function"]["mean"] - each["by_class"]["content"]["mean"] for each in found[:2])
    at = gates[0].index("difference")
    assert gates[1][at] == f"{(x + y) / 2:.3f} +-{abs(x - y) / math.sqrt(2):.3f}" and gates[2][gates[0].index("H")] == f"{found[2]['kruskal_wallis']['mean_of_layers']['H']:,.0f}"
    assert gates[2][gates[0].index("rho saved")] == f"{found[2]['papers_agree']['rho']:.3f}" and "rho teacher" not in gates[0]
    for flags in ["--image", "x.png"], ["--caption", "1"]:
        with pytest.raises(InputError, match="one run"):
            evaluation.main([*names, *flags])


def test_a_teacher_tells_what_the_words_alone_cannot(few, tmp_path, capsys):
    """--teacher: every token of gates.csv gets the loss of a model without eyes, and the gate is compared with it."""
    model, teacher = random_model(few, 1), random_model(few, 2, n_image_token=0)
    run, blind = save_run(tmp_path / "a", few, model), save_run(tmp_path / "teacher", few, teacher)
    evaluation.main([run, "--tasks", "blimp", "--teacher", blind])
    printed = capsys.readouterr().out
    assert "the loss of the text-only teacher: rho" in printed and f"{run}: training has not ended" in printed  # save_run leaves no summary
    prepare_data.write_json(os.path.join(run, "summary.json"), {"minutes": 1.0})
    evaluation.main([run, "--tasks", "blimp", "--teacher", blind])
    assert "has not ended" not in capsys.readouterr().out
    with open(os.path.join(run, "gates.csv"), newline="") as f:
        rows = list(csv.DictReader(f))
    data = prepare_data.Data(str(few))
    for i in {int(row["caption"]) for row in rows}:
        ids = torch.from_numpy(np.int64(data.caption("val", i, 64)))[None]  # a caption ends with <eot>; the one before it ended the last
        idx = torch.cat([torch.tensor([[data.encoding.eot_token]]), ids[:, :-1]], dim=1)
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(teacher.eval()(idx)[0][0], ids[0], reduction="none")
        mine = {int(row["position"]): float(row["loss_teacher"]) for row in rows if int(row["caption"]) == i}
        assert mine and all(loss[k].item() == pytest.approx(x, abs=1e-4) for k, x in mine.items())
    expected = evaluation.spearman(np.array([1 - float(row["gate"]) for row in rows]), np.array([float(row["loss_teacher"]) for row in rows]))
    assert read(os.path.join(run, "gates.json"))["teacher_agrees"]["rho"] == pytest.approx(expected["rho"], abs=1e-6)
    looks = np.array([1 - float(row["gate"]) for row in rows])[np.argsort([float(row["loss_teacher"]) for row in rows], kind="stable")]
    tenths = read(os.path.join(run, "gates.json"))["by_teacher_loss"]
    assert [x["n"] for x in tenths] == np.diff(np.arange(11) * len(rows) // 10).tolist()
    assert [1 - x["mean"] for x in tenths] == pytest.approx([part.mean() for part in np.split(looks, np.cumsum([x["n"] for x in tenths])[:-1])], abs=1e-6)
    assert all(a["loss_to"] <= b["loss_from"] for a, b in zip(tenths, tenths[1:])) and os.path.isfile(os.path.join(run, "gates_by_teacher.png"))
    with pytest.raises(InputError, match="has image tokens"):
        evaluation.main([run, "--tasks", "blimp", "--teacher", run])
    short = save_run(tmp_path / "short", few, random_model(few, 2, n_image_token=0, block_size=8))
    os.remove(os.path.join(run, "results.json"))
    with pytest.raises(InputError, match="short reads 8 tokens, the model 64"):
        evaluation.main([run, "--tasks", "blimp", "--teacher", short])
    assert not os.path.exists(os.path.join(run, "results.json"))  # refused before anything is scored


def test_several_runs_name_what_each_of_them_lacks(few, tmp_path, capsys):
    """Without --babylm_eval each run has its own data: what only the first lacks must be named too."""
    poor = shutil.copytree(few, tmp_path / "poor")
    os.remove(os.path.join(eval_root(poor), "vqa_states.npy"))
    names = [save_run(tmp_path / name, data, random_model(few)) for name, data in (("a", poor), ("b", few))]
    evaluation.main(names)
    assert len(re.findall(r"vqa: left out, ", capsys.readouterr().out)) == 1


# ----------------------------------------------------------------------------------------------------------------------
# gates

@torch.no_grad()
def captions_by_hand(model, folder, encoding):
    """[(text, ids, losses (n,), losses without image (n,), gates (n_layer, n))] of the validation captions, one at a time."""
    load = lambda name: np.load(os.path.join(folder, name))
    tokens = np.fromfile(os.path.join(folder, "caption_val.bin"), np.uint16).astype(int)
    offset, rows, image, found = load("caption_val_offset.npy"), load("caption_val_image.npy"), load("image.npy"), []
    for start, stop, row in zip(offset[:-1], offset[1:], rows):
        ids = tokens[start:stop].tolist()
        idx, losses = torch.tensor([[encoding.eot_token, *ids[:-1]]]), []
        for features in None, torch.from_numpy(image[row][None].astype(np.float32)):
            logits, _, gates = model(idx, image=features, return_gates=True)
            losses.append([-logits[0, k].log_softmax(dim=-1)[i].item() for k, i in enumerate(ids)])
        found.append((encoding.decode(ids[:-1]), ids, losses[1], losses[0], gates[:, 0].numpy()))
    return found


def words_by_hand(text, ids, encoding):
    """[(word, its positions)] of an English caption: runs of letters or marks, each with the space before it."""
    ends = np.cumsum([len(encoding.decode([i])) for i in ids])
    words = []
    for match in re.finditer(r" ?([a-z]+|[^\sa-z])", text):
        words.append((match[1], [k for k, end in enumerate(ends) if match.start() < end <= match.end()]))
    return words


@pytest.mark.parametrize("layers, changes", [((0, 1), {}), ((1,), dict(contrastive="lcg"))])  # LCG: layer 0 does not look
def test_gate_table_is_what_each_caption_has_alone(few, encoding, layers, changes):
    model, data = random_model(few, seed=5, gate="soft-feature", **changes), prepare_data.Data(few)
    rows, names = evaluation.gate_table(model, data, data.meta["upos"])
    with open(os.path.join(few, "caption_train.bin"), "rb") as f:
        said = encoding.decode(np.frombuffer(f.read(), np.uint16).astype(int).tolist()).replace("<|endoftext|>", " ")
    said = re.findall(r"[a-z]+|[^\sa-z]", said)
    captions = captions_by_hand(model, few, encoding)
    expected = [(c, word, position, k) for c, (text, ids, *_) in enumerate(captions)
                for word, positions in words_by_hand(text, ids[:-1], encoding) for k, position in enumerate(positions)]
    assert [(row["caption"], row["word"], row["position"]) for row in rows] == [x[:3] for x in expected] and names == ["log10_frequency"]
    assert [row["starts_word"] for row in rows] == [int(k == 0) for *_, k in expected]
    classes = {"the": ("DET", "function"), "is": ("AUX", "function"), "red": ("ADJ", "content"), "circle": ("NOUN", "content"),
               "?": ("X", "other"), ".": ("X", "other")}
    for row in rows:
        _, ids, loss, dark, gates = captions[row["caption"]]
        k = row["position"]
        assert row["token"] == encoding.decode([ids[k]])
        assert row["loss"] == pytest.approx(loss[k], rel=1e-4, abs=1e-5) and row["loss_no_image"] == pytest.approx(dark[k], rel=1e-4, abs=1e-5)
        assert [key for key in row if re.fullmatch(r"gate_\d+", key)] == [f"gate_{layer}" for layer in layers]
        assert [row[f"gate_{layer}"] for layer in layers] == pytest.approx(gates[list(layers), k], rel=1e-4)
        assert row["gate"] == pytest.approx(gates[list(layers), k].mean(), rel=1e-4)
        assert (row["tag"], row["class"]) == classes.get(row["word"], (row["tag"], row["class"]))
        n = said.count(row["word"])
        assert row["log10_frequency"] == (pytest.approx(math.log10(n)) if n else None)  # without norms, words are counted
    assert {row["word"] for row in rows} >= {"the", "is", ".", "red"} and np.std([row["gate"] for row in rows]) > 1e-3


def test_gates_csv_is_the_table(run, few, tmp_path):
    out = str(shutil.copytree(run, tmp_path / "run"))
    (tmp_path / "norms.tsv").write_text("word\tconcreteness\tlog10_frequency\nRed\t4.5\t2\nthe\tNA\t6\ncircle\t4.9\t\n")
    evaluation.main([out, "--tasks", "ewok", "--norms", str(tmp_path / "norms.tsv")])
    data, model = prepare_data.Data(few), load_model(out)
    rows, names = evaluation.gate_table(model, data, data.meta["upos"], evaluation.read_norms(tmp_path / "norms.tsv"))
    with open(os.path.join(out, "gates.csv"), encoding="utf-8", newline="") as f:
        found = list(csv.DictReader(f))
    assert names == ["concreteness", "log10_frequency"] and len(found) == len(rows) > 200
    assert list(found[0]) == ["caption", "position", "token", "starts_word", "word", "class", "tag", *names, "gate_0", "gate_1", "gate", "loss", "loss_no_image"]
    for one, other in zip(found, rows):
        assert one == {key: "" if value is None else str(value) for key, value in other.items()}
    norms = {row["word"]: (row["concreteness"], row["log10_frequency"]) for row in found}
    assert norms["red"] == ("4.5", "2.0") and norms["the"] == ("", "6.0") and norms["circle"] == ("4.9", "") and norms["is"] == ("", "")
    report = read(os.path.join(out, "gates.json"))
    gates = [float(row["gate"]) for row in found if row["starts_word"] == "1" and row["tag"] == "ADJ"]
    assert report["by_tag"]["ADJ"]["n"] == len(gates) and report["by_tag"]["ADJ"]["mean"] == pytest.approx(np.mean(gates))
    saved = [float(row["loss_no_image"]) - float(row["loss"]) for row in found]
    assert report["papers_agree"]["n"] == len(found)
    order = [mid_ranks(x) for x in (saved, [1 - float(row["gate"]) for row in found])]
    assert report["papers_agree"]["rho"] == pytest.approx(np.corrcoef(np.array(order, dtype=float))[0, 1], rel=1e-6)


def test_upos_and_norms_change_the_classes(run, tmp_path):
    out = str(shutil.copytree(run, tmp_path / "run"))
    (tmp_path / "upos.tsv").write_text("word\tupos\tcount\nred\tADP\t3\nTHE\tNOUN\t1\n")
    evaluation.main([out, "--tasks", "ewok", "--upos", str(tmp_path / "upos.tsv")])
    with open(os.path.join(out, "gates.csv"), encoding="utf-8", newline="") as f:
        kinds = {row["word"]: (row["tag"], row["class"]) for row in csv.DictReader(f)}
    assert kinds["red"] == ("ADP", "function") and kinds["the"] == ("NOUN", "content") and kinds["is"] == ("X", "other")


def token_row(word, tag, gate, last=None, starts=1, saved=0.0, **norms):
    kind = {"DET": "function", "NOUN": "content", "ADJ": "content"}.get(tag, "other")
    return {"caption": 0, "position": 0, "token": word, "starts_word": starts, "word": word, "class": kind, "tag": tag, **norms,
            "gate_1": gate if last is None else last, "gate": gate, "loss": 1.0, "loss_no_image": 1.0 + saved}


def test_the_regression_takes_the_ratings_and_not_their_spread():
    """Of columns concreteness and concreteness_sd the first is the predictor: the gate is 1 - rating / 10, so R2 is 1."""
    rows = [token_row(f"w{i}", "NOUN" if i % 2 else "DET", 1 - rating / 10, concreteness=rating, concreteness_sd=i % 3)
            for i, rating in enumerate(np.random.default_rng(0).uniform(1, 5, 30).tolist())]
    assert evaluation.gate_report(rows, ["concreteness", "concreteness_sd"], "gate_1")["regression"]["r2"] == pytest.approx(1)
    assert evaluation.gate_report(rows, ["concreteness_sd"], "gate_1")["regression"]["r2"] < 0.5


def test_gate_report_by_hand():
    """concreteness rises with the gate over tokens of "the", and falls over the three words that have it."""
    rows = ([token_row("the", "DET", gate, last, saved=1 - gate, concreteness=1.0) for gate, last in ((0.9, 0.8), (0.9, 0.8), (0.7, 0.6), (0.9, 0.8), (0.9, 0.8))]
            + [token_row("dog", "NOUN", gate, saved=1 - gate, concreteness=5.0) for gate in (0.2, 0.4)]
            + [token_row("gy", "NOUN", 0.99, starts=0, saved=0.01, concreteness=5.0)]  # the rest of a word: only the papers' question counts it
            + [token_row("red", "ADJ", 0.5, saved=0.5, concreteness=3.0), token_row(".", "X", 0.1, saved=0.9, concreteness=None)])
    found = evaluation.gate_report(rows, ["concreteness"], "gate_1")
    the = found["by_tag"]["DET"]
    assert the["n"] == 5 and the["mean"] == pytest.approx(0.86) and the["sd"] == pytest.approx(0.08) and the["last_layer"] == pytest.approx(0.76)
    assert (the["q1"], the["median"], the["q3"]) == pytest.approx((0.9, 0.9, 0.9))
    assert {tag: (x["n"], round(x["mean"], 9)) for tag, x in found["by_tag"].items()} == {"DET": (5, 0.86), "NOUN": (2, 0.3), "ADJ": (1, 0.5), "X": (1, 0.1)}
    assert {kind: (x["n"], round(x["mean"], 9)) for kind, x in found["by_class"].items()} == {
        "function": (5, 0.86), "content": (3, round(1.1 / 3, 9)), "other": (1, 0.1)}
    # parts of speech, without X: gates .5 | .9 .9 .7 .9 .9 | .2 .4, and the last layer's .8 .8 .6 .8 .8 in the same order of ranks
    H = exact_H([[5], [9, 9, 7, 9, 9], [2, 4]])
    for name in "mean_of_layers", "last_layer":
        assert found["kruskal_wallis"][name] == {"H": pytest.approx(float(H)), "df": 2, "p": pytest.approx(math.exp(-H / 2))}
    tokens, words = found["spearman"]["concreteness"]["tokens"], found["spearman"]["concreteness"]["words"]
    assert (tokens["n"], words["n"]) == (8, 3) and words["rho"] == pytest.approx(-1) and words["p"] == pytest.approx(0, abs=1e-6)  # the .86, red .5, dog .3
    a, b = np.array([mid_ranks([1, 1, 1, 1, 1, 5, 5, 3]), mid_ranks([9, 9, 7, 9, 9, 2, 4, 5])], dtype=float)
    assert tokens["rho"] == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert found["papers_agree"]["rho"] == pytest.approx(1) and found["papers_agree"]["n"] == 10  # saved is 1 - gate
    assert found["spread"] == pytest.approx(np.std([0.9, 0.9, 0.7, 0.9, 0.9, 0.2, 0.4, 0.5, 0.1])) and found["collapsed"] is False
    assert [list(x) for x in found["most_visual"]] == [[pytest.approx(0.86), "the", 5]] == [list(x) for x in found["most_linguistic"]]  # 5 times or more
    json.dumps(found)


def test_gate_report_separates_words_from_tokens_and_sees_a_collapse():
    """Common words pull the tokens up, while over words there is no order at all: 1 2 3 4 against 2 4 1 3 is rho 0."""
    rows = [token_row(f"w{k}", "NOUN", gate, norm=float(k)) for k, gate, n in ((1, 0.2, 1), (2, 0.4, 20), (3, 0.1, 1), (4, 0.3, 1)) for _ in range(n)]
    found = evaluation.gate_report(rows, ["norm"], "gate_1")["spearman"]["norm"]
    assert found["words"]["rho"] == pytest.approx(0, abs=1e-12) and found["words"]["p"] == pytest.approx(1) and found["tokens"]["n"] == 23
    a, b = (np.array(mid_ranks(x), dtype=float) for x in ([1] + [2] * 20 + [3, 4], [2] + [4] * 20 + [1, 3]))
    assert found["tokens"]["rho"] == pytest.approx(np.corrcoef(a, b)[0, 1]) and abs(found["tokens"]["rho"]) > 0.1
    falling = evaluation.gate_report([row | {"loss_no_image": 1 + row["gate"]} for row in rows], ["norm"], "gate_1")
    assert falling["papers_agree"]["rho"] == pytest.approx(-1) and not falling["collapsed"]
    constant = evaluation.gate_report([row | {"gate": 0.5, "gate_1": 0.5} for row in rows], ["norm"], "gate_1")
    assert constant["collapsed"] is True and constant["spread"] == 0 and constant["papers_agree"]["rho"] is None
    assert constant["spearman"]["norm"]["words"] == {"rho": None, "p": None, "n": 4}
    json.dumps([falling, constant])


def test_a_collapsed_gate_is_reported(few, tmp_path, capsys):
    model = random_model(few, seed=6)
    with torch.no_grad():
        for block in model.blocks:
            block.gate.weight.zero_()
            block.gate.bias.fill_(2.0)
    evaluation.main([save_run(tmp_path / "flat", few, model), "--tasks", "ewok"])
    assert "WARNING: the gate has collapsed" in capsys.readouterr().out and read(tmp_path / "flat" / "gates.json")["collapsed"] is True
    evaluation.main([save_run(tmp_path / "alive", few, random_model(few, seed=6)), "--tasks", "ewok"])
    assert "WARNING" not in capsys.readouterr().out and read(tmp_path / "alive" / "gates.json")["spread"] > 0.01


@pytest.mark.parametrize("changes", [dict(n_image_token=0), dict(gate="none")])
def test_a_model_without_a_gate_is_reported(few, tmp_path, capsys, changes):
    evaluation.main([save_run(tmp_path / "run", few, random_model(few, **changes)), "--tasks", "winoground"])
    assert "no gate to look at" in capsys.readouterr().out
    assert os.path.exists(tmp_path / "run" / "results.json") and not os.path.exists(tmp_path / "run" / "gates.csv")


def test_regress_finds_planted_coefficients():
    """gate = 1 + 2 class - 3 z + 0.5 class z, z being concreteness in standard deviations."""
    rng = np.random.default_rng(0)
    x, kind = rng.normal(3, 2, 80), rng.integers(0, 2, 80)
    z = (x - x.mean()) / np.sqrt(((x - x.mean()) ** 2).mean())
    gate = 1 + 2 * kind - 3 * z + 0.5 * kind * z
    words = [{"class": ("function", "content")[k], "norm_a": a, "gate": g} for k, a, g in zip(kind, x, gate)]
    fit = evaluation.regress(words, {"class": "class", "concreteness": "norm_a"})
    planted = {"intercept": 1, "class": 2, "concreteness": -3, "class x concreteness": 0.5}
    assert {name: x["coef"] for name, x in fit["terms"].items()} == pytest.approx(planted) and fit["r2"] == pytest.approx(1) and fit["n"] == 80
    # without concreteness, class alone is left: what it explains is the variance between the two means
    means = np.where(kind == 1, gate[kind == 1].mean(), gate[kind == 0].mean())
    assert fit["r2_lost_without"]["concreteness"] == pytest.approx(1 - means.var() / gate.var())
    line = np.polyval(np.polyfit(z, gate, 1), z)
    assert fit["r2_lost_without"]["class"] == pytest.approx(1 - line.var() / gate.var())
    noisy = evaluation.regress([row | {"gate": row["gate"] + e} for row, e in zip(words, rng.normal(0, 0.1, 80))], {"class": "class", "concreteness": "norm_a"})
    for name, value in planted.items():
        assert abs(noisy["terms"][name]["coef"] - value) < 4 * noisy["terms"][name]["se"] < 0.2 and noisy["terms"][name]["p"] < 1e-4
    assert evaluation.regress([], {"class": "class"}) is None
    assert evaluation.regress([row | {"class": "content"} for row in words], {"class": "class"}) is None  # one class says nothing


def test_read_table_and_norms(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_bytes("\ufeffword\tconcreteness\tfamiliarity\r\nRed\t4.24\tNA\r\n\"\t\t-1e3\r\nthé\tnan\t2\r\nred\t1\t1\r\n".encode())
    assert evaluation.read_table(path)["red"] == {"concreteness": "4.24", "familiarity": "NA"}  # the first of two spellings
    assert evaluation.read_norms(path) == {"red": {"concreteness": 4.24}, '"': {"familiarity": -1000.0}, "thé": {"familiarity": 2.0}}


@pytest.mark.parametrize("text, where", [
    ("", "line 1"), ("red\t4\n", "line 1"), ("word\nred\n", "line 1"), ("concreteness\tword\n4\tred\n", "line 1"), ("word,concreteness\nred,4\n", "line 1"),
    ("word\tx\nred\t1\nblue\n", "line 3"), ("word\tx\nred\t1\t2\n", "line 2"), ("word\tx\nred\t1\nblue\tbig\n", "blue"), ("word\tx\nred\t1,5\n", "red")])
def test_damaged_tables_are_refused(run, tmp_path, text, where):
    (tmp_path / "t.tsv").write_text(text)
    with pytest.raises(InputError) as error:
        evaluation.main([run, "--norms", str(tmp_path / "t.tsv")])
    assert str(tmp_path / "t.tsv") in str(error.value) and where in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(InputError, match="nowhere.tsv"):
        evaluation.main([run, "--upos", str(tmp_path / "nowhere.tsv")])


# ----------------------------------------------------------------------------------------------------------------------
# caption any picture

@pytest.mark.parametrize("flag, text, words", [
    ("--upos", "word\ttag\nred\tADJ\n", "upos"), ("--norms", "word\tconcreteness\nred\tinf\n", "finite"), ("--norms", "word\tgate\nred\t1\n", "begin with"),
    ("--norms", "word\ta\ta\nred\t1\t2\n", "header")])
def test_tables_that_would_give_nonsense_are_refused_before_anything_is_scored(run, tmp_path, flag, text, words, monkeypatch):
    (tmp_path / "table.tsv").write_text(text)
    monkeypatch.setattr(evaluation, "benchmark", None)
    with pytest.raises(InputError, match="table.tsv.*" + words):
        evaluation.main([run, flag, str(tmp_path / "table.tsv")])


@pytest.mark.parametrize("name, text", [("config.json", "{}"), ("config.json", "[]"), ("config.json", '{"train": {"data": 1}, "model": {}}'), ("summary.json", "[1]"),
                                        ("config.json", "nothing")])
def test_a_damaged_run_folder_is_refused(few, tmp_path, name, text):
    out = save_run(tmp_path / "run", few, random_model(few))
    with open(os.path.join(out, name), "w") as f:
        f.write(text)
    with pytest.raises(InputError, match="nowhere.config.json: not there"):
        evaluation.main([str(tmp_path / "nowhere")])
    with pytest.raises(InputError, match="config.json"):
        evaluation.main([out, "--tasks", "ewok"])


def test_data_that_was_prepared_anew_is_refused(few, tmp_path):
    """The folder has the same name and another tokenizer: its losses and words would be nonsense."""
    data = str(tmp_path / "data")
    shutil.copytree(few, data)
    out = save_run(tmp_path / "run", data, random_model(data))
    lines = open(os.path.join(data, "tokenizer.tiktoken")).read().splitlines()
    with open(os.path.join(data, "tokenizer.tiktoken"), "w") as f:
        f.write("\n".join(lines[:-1] + [lines[-1].split()[0][:-4] + "AAAA " + lines[-1].split()[1]]) + "\n")
    with pytest.raises(InputError, match="tokenizer"):
        evaluation.main([out, "--tasks", "ewok"])


def test_an_item_given_twice_is_refused(few, encoding, tmp_path):
    root = str(tmp_path / "full_eval")
    shutil.copytree(eval_root(few), root)
    path = os.path.join(root, "winoground_filtered", "winoground.jsonl")
    rows = read_rows(path)
    write_rows(path, rows + rows[:1])
    with pytest.raises(InputError, match="second time"):
        evaluation.benchmark(random_model(few), encoding, root, ["winoground"])


def test_protocols_have_their_own_files(few, tmp_path):
    out = save_run(tmp_path / "run", few, random_model(few))
    for year in "2025", "2024":
        evaluation.main([out, "--tasks", "blimp", "--protocol", year])
    assert {"results.json", "predictions.json", "results_2024.json", "predictions_2024.json"} <= set(os.listdir(out))


def test_runs_are_opened_before_any_is_scored(run, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "benchmark", None)
    with pytest.raises(InputError, match="nowhere"):
        evaluation.main([run, str(tmp_path / "nowhere")])


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A picture of 16 x 16 pixels, which is its own thumbnail."""
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path), torch.from_numpy(pixels.reshape(1, 1, 768).astype(np.float32) / 255)


@pytest.mark.parametrize("prompt", ["", "what color is"])
def test_image_prints_a_caption_and_its_gates(few, encoding, photo, tmp_path, capsys, prompt):
    """A model that reads itself: each next token is the likeliest, and the gate of a word is that of the position predicting it."""
    path, features = photo
    model = random_model(few, seed=8, block_size=12)
    out = save_run(tmp_path / "run", few, model)
    evaluation.main([out, "--image", path, "--prompt", prompt])
    lines = capsys.readouterr().out.rstrip("\n")
    idx = [encoding.eot_token, *encoding.encode_ordinary(prompt)]
    with torch.no_grad():
        while len(idx) < 12 and (len(idx) == 1 or idx[-1] != encoding.eot_token):
            idx.append(model(torch.tensor([idx]), image=features)[0][0, -1].argmax().item())
        gates = model(torch.tensor([idx[:-1]]), image=features, return_gates=True)[2][:, 0].mean(dim=0).tolist()
    said = [i for i in idx[1:] if i != encoding.eot_token]
    caption = encoding.decode(said)
    assert lines.startswith(caption + "\n") and caption.startswith(prompt) and len(said) > len(prompt.split())
    printed = [line.rsplit(" gate ", 1) for line in lines[len(caption) + 1:].split("\n")[:-1]]
    assert [(word.strip(), value) for word, value in printed] == [(word, f"{gates[k]:.2f}") for word, k, _ in evaluation.words_of(idx[1:], encoding)]
    assert len(printed) > 2 * bool(prompt) and lines.split("\n")[-1] == os.path.join(out, "caption.png")
    with Image.open(os.path.join(out, "caption.png")) as drawn:
        pixels = np.asarray(drawn.convert("RGB"))
    with Image.open(path) as picture:
        expected = np.asarray(picture.resize((256, 256), Image.NEAREST))
    assert any((pixels[y:y + 256, x:x + 256] == expected).all() for y in range(30, 50) for x in range(10, 30))  # the picture is beside the words
    assert (pixels == evaluation.LOOKS).all(axis=-1).sum() > 100


def test_the_picture_decides_the_gates(few, photo, tmp_path, capsys):
    path, _ = photo
    out = save_run(tmp_path / "run", few, random_model(few, seed=8))
    Image.new("RGB", (300, 200), (250, 0, 0)).save(tmp_path / "red.jpg")
    printed = []
    for file in path, tmp_path / "red.jpg":
        evaluation.main([out, "--image", str(file), "--prompt", "the red circle is"])
        printed.append(capsys.readouterr().out)
    assert printed[0] != printed[1]


def test_image_refusals(run, few, photo, tmp_path):
    path, _ = photo
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "half.png").write_bytes(content(path)[:200])
    given = shutil.copytree(run, tmp_path / "given")
    prepare_data.write_json(given / "meta.json", prepare_data.load_meta(run) | {"encoder": "given"})
    blind = save_run(tmp_path / "blind", few, random_model(few, n_image_token=0))
    for argv, word in (([run, "--image", str(tmp_path / "no.png")], "no.png"), ([run, "--image", str(tmp_path / "text.png")], "text.png"),
                       ([run, "--image", str(tmp_path / "half.png")], "half.png"), ([run, "--image", str(tmp_path)], str(tmp_path)),
                       ([str(given), "--image", path], "ready-made"), ([blind, "--image", path], "without images"),
                       ([run, "--image", path, "--prompt", "7 " * 40], "--prompt"), ([str(tmp_path / "nowhere"), "--image", path], "nowhere")):
        with pytest.raises(InputError) as error:
            evaluation.main(argv)
        assert word in str(error.value) and "\n" not in str(error.value)
    assert not os.path.exists(os.path.join(run, "caption.png"))


# ----------------------------------------------------------------------------------------------------------------------
# checkpoints

@pytest.fixture(scope="module")
def kept(few, tmp_path_factory):
    """A run over epochs T C T C that kept a checkpoint at every second step and at every epoch's end."""
    out = str(tmp_path_factory.mktemp("kept") / "run")
    train.main(["--data", few, "--out", out, *"--device cpu --n_layer 1 --n_head 2 --n_embd 16 --n_image_layer 1 --block_size 32 --batch_tokens 160 "
                "--optimizer adamw --lr 0.01 --warmup_steps 2 --curriculum TCTC --keep_checkpoints --eval_interval 5".split()])
    return out


def test_checkpoints(kept, few, encoding, capsys):
    with open(os.path.join(kept, "log.jsonl"), encoding="utf-8") as f:
        last = [line for line in map(json.loads, f) if "val_loss_caption" in line][-1]["step"]
    config, data = train.TrainConfig(data=few, batch_tokens=160, curriculum="TCTC", length_multiple=1), prepare_data.Data(few)
    length = [len(train.epoch_plan(kind, epoch, config, 32, data)) for epoch, kind in enumerate("TCTC")]
    ends = np.cumsum(length).tolist()
    assert ends[-1] == last
    expected = [(step, int(np.searchsorted(ends, step)), "TCTC"[int(np.searchsorted(ends, step))], step in ends)
                for step in sorted({*range(5, last + 1, 5), *ends})]
    assert evaluation.main([kept, "--checkpoints", "--tasks", "ewok,winoground"]) is None
    printed, saved = capsys.readouterr().out, read(os.path.join(kept, "checkpoints.json"))
    rows = saved["checkpoints"]
    assert [(row["step"], row["epoch"], row["kind"], row["ends_epoch"]) for row in rows] == expected and sum(row["ends_epoch"] for row in rows) == 4
    for row in rows[0], rows[-1]:
        model = load_model(kept, os.path.join("checkpoints", f"step_{row['step']:08}.pt"))
        losses = [loss for _, _, losses, _, _ in captions_by_hand(model, few, encoding) for loss in losses]
        assert row["val_loss_caption"] == pytest.approx(np.mean(losses), rel=1e-4)
        assert row["val_loss_text"] == pytest.approx(evaluation.text_loss(model, data), rel=1e-5)
        results = evaluation.benchmark(model, encoding, eval_root(few), ["ewok", "winoground"])[0]
        assert {task: row[task] for task in results} == {task: result["mean"] for task, result in results.items()}
    assert "blimp" not in rows[0] and rows[0]["val_loss_caption"] > rows[-1]["val_loss_caption"]
    table = [line.split() for line in printed.splitlines()]
    assert [line[0] for line in table[1:len(rows) + 1]] == [str(row["step"]) for row in rows]
    at_end = [row["val_loss_caption"] for row in rows if row["ends_epoch"]]  # T C T C: the first epoch has nothing before it
    assert saved["oscillation"]["val_loss_caption"]["T"] == pytest.approx([at_end[2] - at_end[1], abs(at_end[2] - at_end[1])])
    c = [at_end[1] - at_end[0], at_end[3] - at_end[2]]
    assert saved["oscillation"]["val_loss_caption"]["C"] == pytest.approx([np.mean(c), np.mean(np.abs(c))])
    for name in "checkpoints.png", "checkpoint_losses.png":
        with Image.open(os.path.join(kept, name)) as picture:
            assert (np.asarray(picture.convert("RGB")) == evaluation.LINES[0]).all(axis=-1).any()


def test_checkpoints_of_several_runs_are_a_table(kept, tmp_path, capsys):
    """Seeds folded: the last checkpoint's scores, not the best one's, and the mean change over an epoch of each kind."""
    other = shutil.copytree(kept, tmp_path / "other")
    config = read(other / "config.json")
    config["train"]["seed"] = 2
    prepare_data.write_json(str(other / "config.json"), config)
    newest = max(glob.glob(str(other / "checkpoints" / "*.pt")))
    shutil.copy(min(glob.glob(str(other / "checkpoints" / "*.pt"))), tmp_path / "first.pt")
    checkpoint = load_checkpoint(newest)
    checkpoint["model"] = load_checkpoint(str(tmp_path / "first.pt"))["model"]  # the second seed ends where it began
    save_checkpoint(newest, checkpoint)
    assert evaluation.main([kept, str(other), "--checkpoints", "--tasks", "ewok"]) is None
    header, line = [re.split(r"\s{2,}", line.strip()) for line in capsys.readouterr().out.splitlines()[-2:]]
    assert header[:5] == ["run", "seeds", "caption loss", "text loss", "ewok"] and line[:2] == [kept, "2"]
    a, b = (read(os.path.join(run, "checkpoints.json")) for run in (kept, str(other)))
    x, y = a["checkpoints"][-1]["val_loss_text"], b["checkpoints"][-1]["val_loss_text"]
    assert abs(x - y) > 0.01 and line[3] == f"{(x + y) / 2:.3f} +-{abs(x - y) / math.sqrt(2):.3f}"
    x, y = (each["oscillation"]["val_loss_caption"]["C"][0] for each in (a, b))
    assert line[header.index("in C: caption loss")] == f"{(x + y) / 2:.3f} +-{abs(x - y) / math.sqrt(2):.3f}"


def test_oscillation_by_hand():
    row = lambda kind, ends, blimp, loss=None: {"step": 1, "epoch": 0, "kind": kind, "ends_epoch": ends, "blimp": blimp, "val_loss_text": loss}
    rows = [row("T", False, 0.0), row("T", True, 50.0), row("C", False, 99.0), row("C", True, 48.0), row("T", True, 53.0),
            row("C", True, 54.0), row("M", True, 50.0)]
    # C: 50 -> 48 and 53 -> 54; T: 48 -> 53, the first epoch has no start; M: 54 -> 50. What is None is left out.
    assert evaluation.oscillation(rows) == {"blimp": {"C": (-0.5, 1.5), "M": (-4.0, 4.0), "T": (5.0, 5.0)}}
    assert evaluation.oscillation(rows[:3]) == {} == evaluation.oscillation(rows[:1])


def test_a_prompt_needs_a_picture(run):
    with pytest.raises(InputError, match="--image; give both"):
        evaluation.main([run, "--prompt", "there is"])


def test_scores_do_not_depend_on_training_mode(few):
    model = random_model(few, dropout=0.5)
    pieces = [(None, (model.config.vocab_size - 1, 5, 9, 30), 1)]
    model.train()
    assert np.array_equal(evaluation.score(model, pieces), evaluation.score(model.eval(), pieces))
    model.train()
    evaluation.score(model, pieces)
    assert model.training


def test_what_is_shown_of_one_run_is_refused_for_several(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    for flag in (["--paradigms"], ["--caption", "1"], ["--image", "x.png"]):
        with pytest.raises(InputError, match="take one run"):
            evaluation.main([run, str(other), *flag])
    evaluation.main([run, str(other), "--tasks", "blimp"])
    assert all(os.path.exists(os.path.join(name, "paradigms.png")) for name in (run, other))


def test_no_checkpoints_is_an_input_error(run):
    with pytest.raises(InputError, match="--keep_checkpoints"):
        evaluation.main([run, "--checkpoints"])


# ----------------------------------------------------------------------------------------------------------------------
# bars

def orange(path, rows):
    """Orange pixels of each of a picture's rows of bars, by equal parts of the height that has any ink of bars."""
    with Image.open(path) as picture:
        lit = (np.asarray(picture.convert("RGB")) == evaluation.LOOKS).all(axis=-1).sum(axis=1)
    inside = np.split(lit, np.flatnonzero(np.diff(lit > 0)) + 1)
    bars = [int(part.max()) for part in inside if part.max() > 0]
    assert len(bars) == rows
    return bars


def test_draw_bars(tmp_path):
    path = tmp_path / "bars.png"
    evaluation.draw_bars(path, [("a", 0, 100, None), ("b", 0, 50, None), ("c", 0, 25, None)], "from 0", 0, 100)
    a, b, c = orange(path, 3)
    assert a > b > c and b / a == pytest.approx(0.5, abs=0.03) and c / a == pytest.approx(0.25, abs=0.03)
    evaluation.draw_bars(path, [("a", 50, 100, None), ("b", 50, 75, None)], "from chance", 0, 100)
    half, quarter = orange(path, 2)
    assert half / a == pytest.approx(0.5, abs=0.03) and quarter / a == pytest.approx(0.25, abs=0.03)  # from chance to the value
    evaluation.draw_bars(path, [("a", 50, 20, None), ("b", 12.5, 0, None)], "below chance", 0, 100)
    assert orange(path, 0) == []
    with Image.open(path) as picture:
        height = picture.height
    evaluation.draw_bars(path, [(str(k), 50, 60 + k, (40, 70)) for k in range(10)], "ten", 0, 100)
    with Image.open(path) as picture:
        assert picture.height > height  # as many rows, as much room


def test_draw_bars_outlines_what_is_below_its_origin(tmp_path):
    """Readable in black and white: an outline to the left of the origin, as long as the value is below it."""
    dark = {}
    for value in 49, 30, 10:
        evaluation.draw_bars(tmp_path / "b.png", [("", 50, value, None)], "", 0, 100)
        with Image.open(tmp_path / "b.png") as picture:
            lines = (np.asarray(picture.convert("RGB")) == evaluation.INK).all(axis=-1).sum(axis=1)
        dark[value] = int(lines.max())
    assert dark[10] > dark[30] > dark[49] and dark[10] - dark[30] == pytest.approx(dark[30] - dark[49], abs=0.1 * dark[10])


def test_spread_is_drawn_over_the_bar(tmp_path):
    ink = []
    for spread in None, (0.2, 0.9):
        evaluation.draw_bars(tmp_path / "b.png", [("", 0, 0.5, spread)], "", 0, 1)
        with Image.open(tmp_path / "b.png") as picture:
            ink.append((np.asarray(picture.convert("RGB")) == evaluation.INK).all(axis=-1).any(axis=0).sum())
    assert ink[1] > ink[0] + 100  # it reaches beyond the value
