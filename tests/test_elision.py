"""Token elision in train.py (ReGATE): which tokens a step runs, the books it keeps, the teacher's losses, resume, several processes.

What a kept token computes is tested in test_model.py. The helpers and the tiny worlds are those of test_train.py.
"""
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
import prepare_data
import train
from gatevlm import InputError, load_checkpoint, load_model
from test_train import TINY, TRAIN_PY, assert_same_training, letters, read, refused, restore_signals, resume, run, same, state, steps  # noqa: F401
from train import Elision, TrainConfig, is_dense, reference_losses

SHORT = "--elide_warmup 2 --elide_cycle 4 --elide_dense 1"  # steps 0 1 | 2 . . . | 6 . . . : dense before a bar and right after one


@pytest.fixture(scope="module")
def teacher(letters, tmp_path_factory):
    """A text-only teacher in the world of letters, whose block of 32 cuts the longest captions."""
    out = str(tmp_path_factory.mktemp("teacher") / "run")
    run(out, letters, "--no-images --block_size 32 --curriculum CT --batch_tokens 240")
    return out


@pytest.fixture(scope="module")
def toy_teacher(toy, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("toy_teacher") / "run")
    run(out, toy, "--no-images --curriculum CT")
    return out


# ----------------------------------------------------------------------------------------------------------------------
# when

def test_schedule_by_hand():
    config = TrainConfig(elide_warmup=2, elide_cycle=4, elide_dense=1, elide_tail=0.2)
    assert "".join("d" if is_dense(step, 15, config) else "." for step in range(15)) == "ddd...d...d.ddd"  # the last fifth is 12, 13, 14


@pytest.mark.parametrize("values", [dict(), dict(elide_warmup=0, elide_cycle=7, elide_dense=0), dict(elide_warmup=5, elide_cycle=3, elide_dense=3),
                                    dict(elide_cycle=10, elide_dense=2, elide_tail=0.5)])
def test_schedule_is_that_of_a_plain_loop(values):
    config, n_step, expected = TrainConfig(**values), 1000, []
    phase = 0
    for step in range(n_step):  # the reference: warm-up, then count through the cycle
        if step < config.elide_warmup:
            expected.append(True)
            continue
        expected.append(phase < config.elide_dense or step >= n_step * (1 - config.elide_tail))
        phase = (phase + 1) % config.elide_cycle
    assert [is_dense(step, n_step, config) for step in range(n_step)] == expected


def test_paper_defaults():
    c = TrainConfig()
    assert (c.elide, c.keep_ratio, c.elide_warmup, c.elide_cycle, c.elide_dense, c.elide_lambda, c.elide_beta, c.elide_tail, c.elide_text) == (
        "none", 0.5, 100, 128, 16, 0.5, 0.9, 0.0, False)


@pytest.mark.parametrize("p", [0.5, 0.25, 0.8])
def test_share_of_tokens_processed(toy, tmp_path, p):
    """After the warm-up a cycle of C steps, F of them dense, runs (F + (C - F) p) / C of the tokens, up to rounding k in each batch."""
    run(tmp_path / "run", toy, f"--curriculum CCC --batch_tokens 128 --elide random --elide_warmup 10 --elide_cycle 8 --elide_dense 2 --keep_ratio {p} --max_steps 74")
    lines = steps(tmp_path / "run")
    seen, processed = (np.diff([0] + [line[key] for line in lines]) for key in ("tokens_seen", "tokens_processed"))
    assert len(lines) == 74 and (processed[:10] == seen[:10]).all()
    np.testing.assert_allclose(processed / seen, [line["kept"] for line in lines])
    assert processed[10:].sum() / seen[10:].sum() == pytest.approx((2 + 6 * p) / 8, abs=0.03)  # captions of some 12 tokens: k is off by 1/24 at most
    summary = read(tmp_path / "run" / "summary.json")
    assert summary["tokens_processed"] == processed.sum() and summary["processed_ratio"] == pytest.approx(processed.sum() / seen.sum())


def test_text_is_elided_on_request_only(toy, tmp_path):
    for name, flag in ("no", ""), ("yes", "--elide_text"):
        run(tmp_path / name, toy, f"--curriculum TC --elide random --elide_warmup 1 --elide_cycle 4 --elide_dense 0 {flag}")
    kept = {name: {kind: [line["kept"] for line in steps(tmp_path / name) if line["kind"] == kind] for kind in "TC"} for name in ("no", "yes")}
    assert set(kept["no"]["T"]) == {1.0} and kept["yes"]["T"][0] == 1.0 and set(kept["yes"]["T"][1:]) == {0.5}
    assert kept["no"]["C"] == kept["yes"]["C"] and kept["yes"]["C"][0] == 1.0 and max(kept["yes"]["C"][1:]) < 0.6


# ----------------------------------------------------------------------------------------------------------------------
# which

def books(elide="regate", **values):
    """An Elision over 20 caption tokens without a run behind it; the teacher's loss of token i is i / 10."""
    data = SimpleNamespace(tokens={"train": range(20)}, text={"train": range(30)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "reference_losses", lambda run, data, kind, device: np.arange(20 if kind == "C" else 30, dtype=np.float16) / 10)
        return Elision(TrainConfig(elide=elide, teacher="x", **values), data, "cpu")


def test_moving_average_is_that_of_a_plain_loop():
    """m <- 0.9 m + 0.1 loss where there was a loss, and nothing elsewhere; what counts is m over 1 - 0.9^n, the weighted mean of n losses."""
    torch.manual_seed(0)
    elision, m, seen = books(), [0.0] * 20, [[] for _ in range(20)]
    for _ in range(50):
        place = torch.randperm(19)[:6]  # token 19 is never run
        losses = 5 * torch.rand(6)
        elision.update("C", place, losses)
        for i, loss in zip(place.tolist(), losses.tolist()):
            m[i] = 0.9 * m[i] + 0.1 * loss
            seen[i].append(loss)
    np.testing.assert_allclose(elision.difficulty["C"], m, rtol=1e-5)
    score = elision.score("C", torch.arange(20)[None])[0]
    for i, losses in enumerate(seen):
        weight = [0.9 ** age for age in reversed(range(len(losses)))]
        mean = np.average(losses, weights=weight) if losses else i / 10  # never run: the teacher's loss stands in
        assert score[i].item() == pytest.approx(mean + 0.5 * i / 10, rel=1e-3)
    assert not seen[19] and all(seen[:19])


def test_the_controls_score_what_they_say():
    place = torch.arange(20)[None]
    for elide in "ema", "regate", "ref", "loss-only", "priority":
        elision = books(elide, elide_lambda=2.0)
        elision.update("C", torch.tensor([3, 7]), torch.tensor([4.0, 1.0]))
        score = elision.score("C", place)[0]
        at3, at7 = {"ema": (4, 1), "ref": (0.3, 0.7)}.get(elide, (4 + 2 * 0.3, 1 + 2 * 0.7))
        assert (score[3].item(), score[7].item()) == pytest.approx((at3, at7), rel=1e-3)
        rest = np.delete(np.arange(20), [3, 7])
        if elide == "ema":  # never run and no teacher: first of all, and not by their order in the text
            assert score[rest].min() > 100 and len(set(score[rest].tolist())) == 18 and score[rest].argsort().tolist() != list(range(18))
    torch.manual_seed(1)
    a = books("random").score("C", place)
    torch.manual_seed(2)
    assert not torch.equal(a, books("random").score("C", place)) and set(books("random").state()["difficulty"]) == {"C"}


def test_a_batch_runs_the_hardest_tokens_of_each_caption(letters, tmp_path, monkeypatch):
    """Every elided step of a run against a plain loop over rows: k is the rounded share of the mean length, cut to the batch."""
    chosen, forward = [], train.GateVLM.forward
    monkeypatch.setattr(Elision, "score", lambda self, kind, place: (place * 37 % 101).float())  # a made-up score of every token

    def looking(self, idx, targets=None, image=None, keep=None, **rest):
        if torch.is_grad_enabled():
            chosen.append((targets, keep))
        return forward(self, idx, targets, image, keep, **rest)
    monkeypatch.setattr(train.GateVLM, "forward", looking)
    run(tmp_path / "run", letters, f"--block_size 32 --curriculum C --batch_tokens 240 --elide ema --keep_ratio 0.4 {SHORT} --n_image_token 2")
    config = TrainConfig(**read(tmp_path / "run" / "config.json")["train"])
    data = prepare_data.Data(letters)
    plan = train.epoch_plan("C", 0, config, 32, data)
    assert len(chosen) == len(plan) >= 5
    for step, ((_, rows), (targets, keep)) in enumerate(zip(plan, chosen)):
        if step in (0, 1, 2, 6, 10):
            assert keep is None
            continue
        length = [min(data.offset["train"][i + 1] - data.offset["train"][i], 32) for i in rows]
        k = max(1, round(0.4 * sum(length) / len(rows)))
        assert keep.shape == (len(rows), min(k, targets.size(1)))
        for row, (i, n) in enumerate(zip(rows, length)):
            score = [(data.offset["train"][i] + t) * 37 % 101 for t in range(n)]
            best = sorted(sorted(range(n), key=lambda t: -score[t])[:k])
            assert sorted(keep[row].tolist()) == keep[row].tolist() and keep[row].tolist()[:len(best)] == best


def test_books_hold_the_loss_of_every_token_that_was_run(letters, tmp_path, monkeypatch):
    """After one dense epoch, every token of the block has been run once, at the place where it stands in caption_train.bin."""
    told, update = {}, Elision.update

    def listening(self, kind, place, losses):
        told.update(zip(place.tolist(), losses.tolist()))
        update(self, kind, place, losses)
    monkeypatch.setattr(Elision, "update", listening)
    run(tmp_path / "run", letters, "--block_size 32 --curriculum C --batch_tokens 240 --elide ema --elide_warmup 1000 --n_image_token 2 --lr 1e-9")
    data, model = prepare_data.Data(letters), load_model(str(tmp_path / "run"), "last.pt")
    ids = np.arange(len(data.image_row["train"]))
    losses, _ = evaluation.caption_losses(model, data, ids, split="train")
    elision = load_checkpoint(tmp_path / "run" / "last.pt")["elision"]
    for start, loss in zip(data.offset["train"], losses):
        for t in range(len(loss)):
            assert told[start + t] == pytest.approx(loss[t], rel=1e-3)
            assert elision["difficulty"]["C"][start + t] == pytest.approx(0.1 * loss[t], rel=1e-3)
    assert len(told) == sum(map(len, losses)) < len(data.tokens["train"]) and elision["count"]["C"].sum() == len(told)  # captions cut to 32


# ----------------------------------------------------------------------------------------------------------------------
# the teacher

def reference_by_hand(teacher, folder, kind):
    """Losses of the teacher, one caption or block at a time."""
    model, data = load_model(teacher), prepare_data.Data(folder)
    stream = np.fromfile(os.path.join(folder, "caption_train.bin" if kind == "C" else "text_train.bin"), np.uint16).astype(int).tolist()
    expected = np.zeros(len(stream))
    if kind == "C":
        spans = [(start, min(stop, start + 32), [data.eot]) for start, stop in zip(data.offset["train"], data.offset["train"][1:])]
    else:  # every block sees the token before it; the first token of the stream has nothing before it and no loss
        spans = [(start, min(start + 32, len(stream)), None) for start in range(1, len(stream), 32)]
    for start, stop, before in spans:
        ids = (before or [stream[start - 1]]) + stream[start:stop]
        with torch.no_grad():
            logp = model(torch.tensor([ids[:-1]]))[0][0].log_softmax(dim=-1)
        expected[start:stop] = [-logp[t, token].item() for t, token in enumerate(ids[1:])]
    return expected


@pytest.mark.parametrize("kind", ["C", "T"])
def test_reference_losses_are_those_of_a_plain_loop_and_are_kept(letters, teacher, kind, monkeypatch):
    data = prepare_data.Data(letters)
    losses = reference_losses(teacher, data, kind, "cpu")
    expected = reference_by_hand(teacher, letters, kind)
    assert losses.dtype == np.float16 and losses.shape == expected.shape and (expected == 0).any() and (expected > 0).any()
    np.testing.assert_allclose(losses, expected, atol=2e-2)  # float16 near 6 nats
    monkeypatch.setattr(evaluation, "caption_losses", None)
    np.testing.assert_array_equal(reference_losses(teacher, data, kind, "cpu"), losses)  # read back, not computed again
    assert len([name for name in os.listdir(letters) if name.startswith("reference_" + {"C": "caption", "T": "text"}[kind])]) == 1


def test_reference_losses_go_on_where_they_were_stopped(letters, teacher, tmp_path, monkeypatch):
    """Killed after the first of several chunks: what was written is not computed again, and the result is the same."""
    folder = str(tmp_path / "data")
    shutil.copytree(letters, folder, ignore=shutil.ignore_patterns("reference_*"))
    data, computed, compute = prepare_data.Data(folder), [], evaluation.caption_losses
    monkeypatch.setattr(train, "CHUNK", 20)

    def stopping(model, data, ids, *rest, **more):
        if len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(ids.tolist())
        return compute(model, data, ids, *rest, **more)
    monkeypatch.setattr(evaluation, "caption_losses", stopping)
    with pytest.raises(KeyboardInterrupt):
        reference_losses(teacher, data, "C", "cpu")
    assert [name for name in os.listdir(folder) if name.startswith("reference_")][0].endswith(".part")
    monkeypatch.setattr(evaluation, "caption_losses", lambda model, data, ids, *rest, **more: computed.append(ids.tolist()) or compute(model, data, ids, *rest, **more))
    losses = reference_losses(teacher, data, "C", "cpu")
    assert computed == [list(range(i, min(i + 20, 66))) for i in (0, 20, 40, 60)]
    np.testing.assert_array_equal(losses, reference_losses(teacher, prepare_data.Data(letters), "C", "cpu"))
    assert not any(name.endswith(".part") for name in os.listdir(folder))


def test_another_teacher_or_other_data_have_their_own_losses(letters, teacher, tmp_path):
    other = str(tmp_path / "other")
    run(other, letters, "--no-images --block_size 32 --curriculum CT --batch_tokens 240 --seed 2")
    a, b = (reference_losses(t, prepare_data.Data(letters), "C", "cpu") for t in (teacher, other))
    assert not np.array_equal(a, b)


def test_teacher_is_refused(letters, teacher, toy, toy_teacher, finished_with_eyes, tmp_path):
    flags = [*TINY.split(), "--data", toy, "--out", str(tmp_path / "x")]
    assert "tokenizer" in refused(*flags, "--teacher", teacher)
    assert "--no-images" in refused(*flags, "--teacher", finished_with_eyes)
    assert "--teacher" in refused(*flags, "--elide", "regate")
    assert "nowhere" in refused(*flags, "--teacher", tmp_path / "nowhere")
    assert not os.path.exists(tmp_path / "x")


@pytest.fixture(scope="module")
def finished_with_eyes(toy, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("eyes") / "run")
    run(out, toy, "--max_steps 1")
    return out


def test_a_teacher_turns_elision_on_and_its_cost_is_told(toy, toy_teacher, tmp_path):
    summary = run(tmp_path / "run", toy, f"--curriculum C --teacher {toy_teacher} {SHORT}")
    assert read(tmp_path / "run" / "config.json")["train"]["elide"] == "regate" and summary["processed_ratio"] < 1
    assert summary["teacher_seconds"] == pytest.approx(60 * read(os.path.join(toy_teacher, "summary.json"))["minutes"]) and summary["reference_seconds"] >= 0
    assert os.path.exists(tmp_path / "run" / "kept.png")


@pytest.mark.parametrize("flags, words", [
    ("--keep_ratio 0", "keep_ratio"), ("--keep_ratio 1.5", "keep_ratio"), ("--elide_beta 1", "elide_beta"), ("--elide_tail 2", "elide_tail"),
    ("--elide_cycle 0", "elide_cycle"), ("--elide_dense 200", "elide_dense"), ("--elide hard", "elide")])
def test_wrong_values_are_refused(toy, tmp_path, flags, words):
    assert words in refused(*TINY.split(), "--data", toy, "--out", tmp_path / "x", *flags.split())
    assert not os.path.exists(tmp_path / "x")


# ----------------------------------------------------------------------------------------------------------------------
# whole runs

EVERY = [f"--elide {name}" for name in train.ELIDE if name != "none"] + ["--elide regate --elide_text", "--elide priority --elide_visible", "--elide random --elide_tail 0.3"]


def elision_state(out):
    return load_checkpoint(os.path.join(out, "last.pt"))["elision"]


@pytest.mark.parametrize("flags", EVERY)
def test_ten_steps_are_five_and_five(toy, toy_teacher, tmp_path, flags):
    """Resume is exact to the bit, books included."""
    flags = f"--curriculum TCC --max_steps 10 --dropout 0.1 {SHORT} --teacher {toy_teacher} {flags}"
    run(tmp_path / "whole", toy, flags)
    run(tmp_path / "parts", toy, f"{flags} --stop_after 6")
    resume(tmp_path / "parts", "--stop_after 0")
    a, b = state(tmp_path / "whole"), state(tmp_path / "parts")
    for each in a, b:
        each["now"].pop("reference_seconds")
    assert same(a, b) and same(elision_state(tmp_path / "whole"), elision_state(tmp_path / "parts"))
    assert sum(x.sum() for x in elision_state(tmp_path / "whole")["count"].values()) > 0
    assert same(steps(tmp_path / "whole"), steps(tmp_path / "parts"))


def test_loss_only_runs_every_token_and_learns_from_the_kept(toy, toy_teacher, tmp_path):
    """Rho-1: the forward is whole, so the books are told the same tokens as under regate, but with the losses that the whole context gives."""
    for elide in "regate", "loss-only":
        run(tmp_path / elide, toy, f"--curriculum C --max_steps 4 {SHORT} --teacher {toy_teacher} --elide {elide}")
    a, b = elision_state(tmp_path / "regate"), elision_state(tmp_path / "loss-only")
    assert a["count"]["C"].sum() == b["count"]["C"].sum() and not torch.equal(a["difficulty"]["C"], b["difficulty"]["C"])
    last = steps(tmp_path / "loss-only")[-1]
    assert last["tokens_processed"] == last["tokens_seen"] > steps(tmp_path / "regate")[-1]["tokens_processed"]


def test_keeping_every_token_is_dense_training(toy, tmp_path):
    for name, flags in ("dense", ""), ("all", f"--elide ema --keep_ratio 1 {SHORT}"):
        run(tmp_path / name, toy, f"--curriculum TC --max_steps 8 {flags}")
    assert_same_training(tmp_path / "dense", tmp_path / "all")


@pytest.mark.parametrize("elide", ["regate", "ref"])
def test_gradient_accumulation_is_the_big_batch(letters, teacher, tmp_path, elide):
    """Also where micro-batches hold captions of other lengths than the whole batch."""
    flags = f"--block_size 32 --n_image_token 2 --curriculum CC --batch_tokens 240 {SHORT} --teacher {teacher} --elide {elide}"
    for n in 1, 3:
        run(tmp_path / str(n), letters, f"{flags} --grad_accum {n}")
    assert_same_training(tmp_path / "1", tmp_path / "3")
    a, b = (elision_state(tmp_path / name)["difficulty"]["C"] for name in "13")
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_weighted_losses_add_up_over_micro_batches(toy, toy_teacher, tmp_path, monkeypatch):
    """Priority sampling: all parts together give the weighted sum over the whole batch, and the contrastive loss counts once."""
    def everything(score, real, k):  # no noise, so that the parts can be compared: the first k with weight 2
        return torch.arange(k).repeat(len(score), 1), torch.full((len(score), k), 2.0)
    monkeypatch.setattr(train, "keep_sampled", everything)
    totals = []
    backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: totals[-1].append(self.item()) or backward(self))
    for n in 1, 2:
        totals.append([])
        run(tmp_path / str(n), toy, f"--curriculum C --max_steps 1 --elide priority --elide_warmup 0 --elide_dense 0 --teacher {toy_teacher} --grad_accum {n}")
    assert len(totals[0]) == 1 and len(totals[1]) == 2 and sum(totals[1]) == pytest.approx(totals[0][0], rel=1e-4)
    line = steps(tmp_path / "1")[0]
    assert line["loss"] == pytest.approx(totals[0][0], rel=1e-4) and line["loss"] == pytest.approx(2 * line["kept"] * np.log(389), rel=0.1)  # untrained: ln V a token
    assert steps(tmp_path / "2")[0]["loss"] == pytest.approx(line["loss"], rel=1e-4)


def test_a_teacher_is_not_needed_and_not_told_of_where_nothing_asks_it(toy, toy_teacher, tmp_path):
    for elide in "none", "random":
        summary = run(tmp_path / elide, toy, f"--curriculum C --max_steps 3 --elide {elide} --teacher {toy_teacher}")
        assert "teacher_seconds" not in summary


def test_resume_refuses_another_teacher(toy, toy_teacher, tmp_path):
    teacher = str(tmp_path / "teacher")
    shutil.copytree(toy_teacher, teacher)
    run(tmp_path / "run", toy, f"--curriculum C --teacher {teacher} {SHORT} --stop_after 2")
    run(tmp_path / "other", toy, "--no-images --curriculum CT --seed 2")
    shutil.copy(tmp_path / "other" / "best.pt", teacher)
    with pytest.raises(InputError, match="teacher"):
        resume(tmp_path / "run")


def test_captions_without_any_text(tmp_path, letters, teacher):
    """--elide_text finds nothing to elide."""
    folder = str(tmp_path / "data")
    shutil.copytree(letters, folder)
    open(os.path.join(folder, "text_train.bin"), "w").close()
    meta = prepare_data.load_meta(folder)
    meta["sha256"]["text_train.bin"] = prepare_data.sha256(os.path.join(folder, "text_train.bin"))
    prepare_data.write_json(os.path.join(folder, "meta.json"), meta)
    run(tmp_path / "run", folder, f"--block_size 32 --n_image_token 2 --curriculum C --batch_tokens 240 --elide_text --teacher {teacher} {SHORT}")


def test_two_processes_are_one(letters, teacher, tmp_path):
    """Each process runs half of the rows, and both keep the same books."""
    flags = f"--block_size 32 --n_image_token 2 --curriculum CC --batch_tokens 240 {SHORT} --teacher {teacher}"
    result = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", TRAIN_PY, *TINY.split(), "--data", letters,
                             *flags.split(), "--out", str(tmp_path / "two")], capture_output=True, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert result.returncode == 0, result.stderr
    run(tmp_path / "one", letters, flags)
    assert_same_training(tmp_path / "one", tmp_path / "two")
    a, b = (elision_state(tmp_path / name) for name in ("one", "two"))
    torch.testing.assert_close(a["difficulty"]["C"], b["difficulty"]["C"], atol=1e-4, rtol=1e-3)
    assert same(a["count"], b["count"])


def test_kept_words_are_drawn(tmp_path):
    """A word that is not run is struck out: dark pixels across its box."""
    dark = {}
    for name, kept in ("none", None), ("all", [True, True]), ("one", [True, False]):
        evaluation.draw_gates(tmp_path / f"{name}.png", [".", "."], [0.5, 0.5], kept=kept)
        with Image.open(tmp_path / f"{name}.png") as picture:
            dark[name] = int((np.asarray(picture.convert("L")) < 100).sum())
    assert dark["none"] == dark["all"] < dark["one"] - 80
