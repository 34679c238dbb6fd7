"""
What the class Elision of gatevlm.py promises (the paper ReGATE): which steps run every token, what the score
of a token is, which tokens are chosen, and which books are kept. What a kept token computes is tested in
test_model.py.
"""
from types import SimpleNamespace

import pytest
import torch

from gatevlm import Elision

N = 12  # tokens of the training captions
TEACHER = torch.arange(N) / 10  # the teacher's loss of token i is i / 10 nats
parametrize = pytest.mark.parametrize

def elision(elide="regate", teacher=TEACHER, **changes):
    schedule = dict(elide_warmup=2, elide_cycle=4, elide_dense=1, elide_by="target")
    config = dict(elide=elide, keep_ratio=0.5, elide_lambda=0.5, elide_beta=0.9) | schedule | changes
    return Elision(SimpleNamespace(**config), N, teacher)

def scores(e):
    return e.score(torch.arange(N)[None])[0].tolist()

def run_some(e, n_update=30):
    """Random losses of 5 random tokens at a time, never of token 0. Returns those of each, oldest first."""
    generator, seen = torch.manual_seed(0), [[] for _ in range(N)]
    for _ in range(n_update):
        place = 1 + torch.randperm(N - 1, generator=generator)[:5]
        losses = 4 * torch.rand(5, generator=generator)
        e.update(place, losses)
        for i, loss in zip(place.tolist(), losses.tolist()):
            seen[i].append(loss)
    return seen

# ---- when
def test_the_schedule_by_hand():
    """2 dense steps of warm-up, then cycles of 4 that begin with 1 dense step."""
    e = elision()
    assert "".join("d" if e.is_dense(step) else "." for step in range(14)) == "dd" + "d..." * 3

@parametrize("warmup, cycle, dense", [(100, 128, 16), (0, 7, 0), (5, 3, 3), (3, 1, 0)])
def test_the_schedule_is_that_of_a_plain_loop(warmup, cycle, dense):
    e, phase = elision(elide_warmup=warmup, elide_cycle=cycle, elide_dense=dense), 0
    for step in range(500):
        if step < warmup:
            assert e.is_dense(step)
            continue
        assert e.is_dense(step) == (phase < dense)
        phase = (phase + 1) % cycle

# ---- the score
@parametrize("beta", [0.9, 0.5, 0.0])
@parametrize("elide, weight", [("regate", 0.5), ("regate", 2.0), ("ema", 0.0)])
def test_the_score_is_that_of_a_plain_loop(elide, weight, beta):
    """The mean of a token's losses, each with beta times the weight of the next (which is what the moving
    average is once it is divided by its own weights), plus lambda times the teacher's loss."""
    e = elision(elide, elide_lambda=weight, elide_beta=beta)
    seen, score = run_some(e), scores(e)
    assert min(map(len, seen[1:])) > 2
    for i in range(1, N):
        weights = [beta ** age for age in reversed(range(len(seen[i])))]
        mean = sum(w * loss for w, loss in zip(weights, seen[i])) / sum(weights)
        assert score[i] == pytest.approx(mean + weight * i / 10, rel=1e-4)

def test_the_average_is_corrected_for_its_start_at_zero():
    """A loss that is always 2 has an average of 2, after 1 update as after 3; uncorrected 0.2 and 0.542."""
    e = elision(elide_lambda=0.0)
    for n in 1, 2, 3:
        e.update(torch.tensor([4]), torch.tensor([2.0]))
        assert scores(e)[4] == pytest.approx(2.0)
    assert e.average[4].item() == pytest.approx(0.542) and e.count[4] == 3

def test_the_teacher_stands_in_for_a_token_that_was_never_run():
    """i / 10 in place of the average, and half of it again."""
    assert scores(elision()) == pytest.approx([1.5 * i / 10 for i in range(N)])

def test_without_a_teacher_tokens_that_were_never_run_come_first_and_not_by_their_place():
    e = elision("ema", teacher=None)
    e.update(torch.tensor([3, 7]), torch.tensor([9.0, 8.0]))
    torch.manual_seed(0)
    *first, second_to_last, last = sorted(range(N), key=lambda i, score=scores(e): -score[i])
    assert (second_to_last, last) == (3, 7) and first not in (sorted(first), sorted(first)[::-1])

def test_ref_is_the_loss_of_the_teacher_alone():
    e = elision("ref", teacher=TEACHER.half())
    run_some(e)
    assert scores(e) == pytest.approx(TEACHER.tolist(), rel=1e-3)  # float16 has 3 digits

def test_random_keeps_every_token_equally_often():
    """1 of 12 in 6,000 rows is 500 times, with a standard deviation below 22; whatever the losses were."""
    e = elision("random")
    run_some(e)
    torch.manual_seed(0)
    place = torch.arange(N).repeat(6000, 1)
    kept = e.choose(place, torch.ones_like(place).bool(), 1)
    assert (torch.bincount(kept[:, 0], minlength=N) - 500).abs().max() < 88

# ---- the choice
def test_the_highest_scores_are_kept_in_ascending_order_and_padding_last_of_all():
    """Row 0: the scores 9, 8, 7 stand at 4, 1, 5. Row 1 has two real tokens, so padding fills up, whatever
    score stands at the place it points to."""
    e = elision("ref", teacher=torch.tensor([1.0, 8, 3, 2, 9, 7, 1, 2, 99, 99, 99, 99]))
    real = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    keep = e.choose(torch.arange(N).view(2, 6), real, 3).tolist()
    assert keep[0] == [1, 4, 5] and keep[1][:2] == [0, 1] and keep[1][2] >= 2

@parametrize("by, run", [("target", ["a", "is"]), ("own", ["<eot>", "red"])])
def test_both_readings_of_the_paper(by, run):
    """In "<eot> a red ball is wet <eot>" the teacher finds "red" hard (5 nats) and "wet" (2). By its own
    score "red" is run, and <eot> always is; by that of its target "a", which predicts "red", and "is"."""
    words = "<eot> a red ball is wet <eot>".split()
    place = torch.arange(6)[None]  # of the targets, words[1:], in the stream of captions
    e = elision("ref", teacher=torch.tensor([0.1, 5, 1, 0.3, 2, 0] + [0.0] * 6), elide_by=by)
    keep = e.choose(place, place >= 0, 2)[0].tolist()
    assert [words[t] for t in keep] == run

def test_how_many_tokens_are_kept():
    """Half of 4.5 is 2.25; of one token at least one is run."""
    assert elision().n_keep(4.5) == 2 and elision().n_keep(1) == 1

# ---- the books
def test_an_update_touches_only_the_tokens_that_ran():
    e = elision()
    run_some(e)
    average, count = e.average.clone(), e.count.clone()
    e.update(torch.tensor([2, 9]), torch.tensor([1.0, 0.0]))
    changed = torch.tensor([i in (2, 9) for i in range(N)])
    assert torch.equal(e.average != average, changed) and torch.equal(e.count - count, changed.int())

def test_a_checkpoint_restores_the_choice_and_the_teacher():
    e, restored = elision(), Elision(elision().config, N)
    run_some(e)
    restored.load_state_dict(e.state_dict())
    assert scores(restored) == scores(e) != scores(elision())
    run_some(e, 3), run_some(restored, 3)
    assert scores(restored) == scores(e)
