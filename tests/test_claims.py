"""
claims.py: statistics are published or worked out by hand.
"""
import os

import numpy as np
from PIL import Image
from pytest import approx, mark, raises

import claims
import eval as evaluation
import train
from gatevlm import InputError
from prepare_data import Data, write_json

cases = mark.parametrize

@cases("groups, H", [  # documentation of scipy.stats.kruskal, ties; equal rank sums
    ([[1, 1, 1], [2, 2, 2], [2, 2]], 7), ([[1, 4, 5, 8], [2, 3, 6, 7]], 0),
    ([[5, 5], [5]], None), ([[1, 2, 3]], None), ([], None)])
def test_kruskal_wallis(groups, H):
    assert claims.kruskal_wallis([np.array(x) for x in groups]) == (H if H is None else approx(H, abs=1e-12))

def test_regression_by_hand():
    """Lane, Online Statistics: sums of squares 4.597 of y, 2.79075 left over."""
    x, y = np.arange(1.0, 6), np.array([1, 2, 1.3, 3.75, 2.25])
    assert claims.regression([x], y) == approx(1 - 2.79075 / 4.597)

X = np.arange(5.0)

@cases("columns, y", [([X, 2 * X], X**2), ([np.ones(5)], X), ([X[:2]], X[:2]), ([X], np.ones(5))])
def test_regression_without_an_answer(columns, y):
    assert claims.regression(columns, y) is None

def test_what_explains_the_gate_counts_a_word_once():
    """Without concreteness two means are left, without class a line. H: of two groups, all occurrences."""
    rng = np.random.default_rng(0)
    norm, kind = rng.normal(3, 2, 80), rng.integers(0, 2, 80)
    gate = 1 + 2 * kind - 3 * norm
    of = dict(DET="function", NOUN="content", X="other")
    row = lambda word, tag, gate, norm: {
        "word": word, "tag": tag, "class": of[tag], "gate": str(gate), "norm Conc.M": str(norm)}
    often = np.r_[:80, :80:2, :80:5]
    rows = [row(f"w{i}", ("DET", "NOUN")[kind[i]], gate[i], norm[i]) for i in often]
    found = claims.explained([*rows, row(".", "X", 9, 9), row("new", "NOUN", 9, "")])
    means, line = [gate[kind == k].mean() for k in kind], np.polyval(np.polyfit(norm, gate, 1), norm)
    assert found == approx({
        "H": claims.kruskal_wallis([gate[often][kind[often] == 0], np.r_[gate[often][kind[often] == 1], 9]]),
        "words": 80, "R2": 1, "R2 lost without norm Conc.M": 1 - np.var(means) / gate.var(),
        "R2 lost without class": 1 - line.var() / gate.var()})

def test_changes_are_over_epochs():
    """T costs captions 3, then 1: 2 on average."""
    row = lambda kind, loss: dict(kind=kind, val_loss_caption=loss, val_loss_text=None)
    rows = [row("C", 1.0), row("T", 4.0), row("C", 2.5), row("T", 3.5)]
    want = {"val_loss_caption, change in T": 2, "val_loss_caption, change in C": -1.5}
    assert claims.changes(rows) == approx(want)

def test_shares_by_hand():
    """p: 1, 1, a half, a quarter. Losses 0, 0, log 2, 2 log 2; pushes 0, 0, 0.5, 0.75."""
    found = claims.shares(-np.log([1, 1, 0.5, 0.25]))
    assert [*found.values()] == approx([0.75 * np.log(2), 50, 1.25 / 4, 100, 0])

def test_a_table_has_means_over_seeds_in_markdown(tmp_path, capsys):
    """1, 2 and 4: mean 7/3, squared distances 16/9, 1/9 and 25/9, whose half of the sum is 7/3."""
    runs = [f"{tmp_path}/{seed}" for seed in range(1, 5)]
    for seed, run, loss in zip(range(1, 5), runs, [1.0, 2.0, 4.0, 5.0]):
        os.mkdir(run)
        config = {"train": {"seed": seed, "lr": seed // 4, "out": run}, "model": {}}
        write_json(f"{run}/config.json", config)
        write_json(f"{run}/summary.json", {"a loss": loss, "seconds": 90.0, "step": 7})
    claims.table("a loss", *runs)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["| run", "seeds", "a loss", "minutes", "step |"] and len({*map(len, rows)}) == 1
    assert rows[2][1:] == ["3", "2.333 ± 1.5", "1.5 ± 0", "7 ± 0 |"]
    assert rows[3] == ["| 4", "1", "5", "1.5", "7 |"]

def test_flat_data_hold_the_same_pixels_in_one_vector(toy16, tmp_path):
    claims.flat(toy16, f"{tmp_path}/flat")
    flat, patches = Data(f"{tmp_path}/flat"), Data(toy16)
    assert flat.images([7]).shape == (1, 1, 16 * 768) == (1, 1, flat.meta["image_dim"])
    assert (flat.images([7]).reshape(1, 16, 768) == patches.images([7])).all()
    flags = "--n_layer 1 --n_head 1 --n_embd 8 --image_encoder none --max_steps 1 --curriculum C"
    found = train.main([*flags.split(), "--data", flat.folder, "--out", f"{tmp_path}/run"])
    assert "winoground" in found and "vqa" in found

def test_the_commands(toy, tmp_path, capsys, monkeypatch):
    """A run through: the tables have a row for the run, and the picture is there."""
    sizes = "--n_layer 1 --n_head 2 --n_embd 16 --n_image_layer 1 --gate soft-token --device cpu"
    flags = f"--data {toy} --out {tmp_path}/run --curriculum CT --keep_checkpoints --eval_interval 5"
    train.main([*sizes.split(), *flags.split()])
    claims.explain(f"{tmp_path}/run")
    scored, paths, curves, evaluate = [], claims.checkpoints(f"{tmp_path}/run"), [], evaluation.evaluate
    monkeypatch.setattr(evaluation, "evaluate", lambda *args: scored.append(args[0]) or evaluate(*args))
    with raises(InputError, match="keep_checkpoints"):
        claims.checkpoints(toy)
    claims.swing("", f"{tmp_path}/run")
    assert scored[1:] == paths[-1:] and len(paths) > 2  # ends of epochs
    out = capsys.readouterr().out
    assert "R2 lost without class" in out and "val_loss_text, change in T" in out
    draw = evaluation.draw_curves
    monkeypatch.setattr(evaluation, "draw_curves", lambda *args: curves.append(args[1]) or draw(*args))
    claims.why(f"{tmp_path}/why.png", *paths, f"{tmp_path}/run/last.pt")
    assert [*curves[0]] == [f"run, step {int(path[-11:-3])}" for path in paths]  # the last is last.pt, too
    loss = claims.token_losses(f"{tmp_path}/run/last.pt")
    assert (tmp_path / "why.png").exists() and (np.diff(loss) >= 0).all()
    assert len(loss) == len(Data(toy).captions["val"])
    claims.film(f"{tmp_path}/film.gif", f"{tmp_path}/run")
    with Image.open(tmp_path / "film.gif") as film:
        assert film.n_frames == len(paths)
    assert f"{loss.mean():.4f}" in capsys.readouterr().out
