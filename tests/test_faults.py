"""Faults, really injected: kills, full disks, damaged and hostile files, two runs in one folder, terminals.

A command runs in a forked process (importing torch anew for each would take minutes), as the command line would run it: what counts is its
exit status and what it prints. Every damaged file ends in success or in one line and status 2, within ten seconds, and nothing half-written.
"""
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
import prepare_data
import train
from gatevlm import InputError, load_checkpoint, load_model, run_script
from test_train import TINY, babylm_folder, letters, log, read, restore_signals, run, same  # noqa: F401

SMALL = [*TINY.split(), "--n_layer", "1", "--block_size", "32"]


class Ended(SimpleNamespace):
    """status, stdout, stderr of a command, and whether it ended well or was refused in one line."""

    @property
    def refused(self):
        return self.status == 2 and self.stderr.count("\n") == 1 and self.stderr.strip() and "Traceback" not in self.stderr

    @property
    def clean(self):
        return self.refused or self.status == 0 and "Traceback" not in self.stderr


def fork(script, argv, before=lambda: None):
    """Start script.main(argv) as a command in a child process: (pid, ends of pipes from its stdout and its stderr)."""
    pipes = [os.pipe() for _ in range(2)]
    if pid := os.fork():
        for _, end in pipes:
            os.close(end)
        return pid, [end for end, _ in pipes]
    status = 1
    try:
        for number, (_, end) in enumerate(pipes, 1):
            os.dup2(end, number)
        sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
        sys.argv = [script.__file__]
        before()
        run_script(lambda: script.main([str(x) for x in argv]))
        status = 0
    except SystemExit as error:
        status = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


def wait(child, limit=10.0):
    """Ended of a child; a test fails when it takes longer than limit seconds."""
    pid, pipes = child
    deadline = time.monotonic() + limit
    while not (done := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < deadline:
        time.sleep(0.002)
    if not done[0]:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        pytest.fail(f"still running after {limit} s")
    stdout, stderr = (open(end, encoding="utf-8", errors="replace").read() for end in pipes)
    return Ended(status=os.waitstatus_to_exitcode(done[1]), stdout=stdout, stderr=stderr)


def command(script, argv, before=lambda: None, limit=10.0):
    return wait(fork(script, argv, before), limit)


@pytest.fixture(scope="module")
def teacher(letters, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("teacher") / "run")
    run(out, letters, "--no-images --block_size 32 --curriculum C --batch_tokens 240")
    return out


@pytest.fixture(scope="module")
def small_run(letters, tmp_path_factory):
    """A finished run whose checkpoints, log and tables the tests damage."""
    out = str(tmp_path_factory.mktemp("small") / "run")
    train.main([*SMALL, "--data", letters, "--out", out, "--curriculum", "CT", "--max_steps", "4", "--save_interval", "2"])
    return out


# ----------------------------------------------------------------------------------------------------------------------
# 1. killed at any moment

def everything(out):
    """All that training depends on in last.pt; seconds are not part of that."""
    state = load_checkpoint(os.path.join(out, "last.pt"))
    for name in "seconds", "reference_seconds":
        state["now"].pop(name)
    state["config"].pop("out")
    return state


def kill_at(place):
    """Kill this process inside the nth write of a checkpoint: before, in the middle of or after it, or between its two renames."""
    moment, nth = place
    write, rename, count = torch.save, os.replace, [0]

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def save(checkpoint, f):
        count[0] += 1
        if count[0] == nth and moment == "before":
            die()
        if count[0] == nth and moment == "inside":
            whole = io.BytesIO()
            write(checkpoint, whole)
            f.write(whole.getvalue()[:len(whole.getvalue()) // 2])
            f.flush()
            die()
        write(checkpoint, f)

    def replace(a, b):
        rename(a, b)
        if count[0] >= nth and str(b).endswith("previous.pt") and moment == "between":
            die()
        if count[0] >= nth and str(b).endswith("last.pt") and moment == "after":
            die()
    torch.save, os.replace = save, replace


def test_killed_again_and_again_is_never_killed(letters, teacher, tmp_path, pytestconfig, capsys):
    """SIGKILL at random moments and inside checkpoint writes; then weights, optimizer, elision state and log are those of a run that
    nobody disturbed. --kills 60 does it 60 times."""
    n_kill, rng = pytestconfig.getoption("kills"), random.Random(1)
    flags = [*SMALL, "--data", letters, "--teacher", teacher, "--curriculum", "CTCTC", "--batch_tokens", 60, "--dropout", 0.1, "--save_interval", 2,
             "--eval_interval", 5, "--elide_warmup", 4, "--elide_cycle", 6, "--elide_dense", 2, "--keep_checkpoints"]
    train.main([str(x) for x in [*flags, "--out", tmp_path / "whole"]])
    whole = everything(tmp_path / "whole")
    killed = finished = 0
    out = tmp_path / "run 0"
    holds = lambda: any(os.path.exists(out / name) for name in ("last.pt", "previous.pt"))
    seconds = [0.5]
    while killed < n_kill or not finished:
        argv = ["--resume", "--out", out] if holds() else [*flags, "--out", out]
        place = (rng.choice(["before", "inside", "between", "after"]), rng.randint(1, 4))
        started = time.monotonic()
        if killed >= n_kill:
            ended = command(train, argv, limit=60)
        elif killed % 2:
            ended = command(train, argv, lambda: kill_at(place), limit=60)
        else:
            child = fork(train, argv)
            time.sleep(rng.uniform(0, seconds[0]))
            os.kill(child[0], signal.SIGKILL)
            ended = wait(child)
        killed += ended.status == -signal.SIGKILL
        assert ended.status in (0, -signal.SIGKILL), ended.stderr
        if holds():
            train.read_state(out)  # whatever the moment, one whole checkpoint is there
        if ended.status == 0:
            seconds[0] = max(seconds[0], time.monotonic() - started)
            assert same(everything(out), whole) and log(out) == log(tmp_path / "whole")
            assert sorted(os.listdir(out / "checkpoints")) == sorted(os.listdir(tmp_path / "whole" / "checkpoints"))
            numbers = [line["step"] for line in log(out) if "kind" in line]
            assert numbers == list(range(1, whole["now"]["step"] + 1))  # no step twice, none missing
            finished += 1
            out = tmp_path / f"run {finished}"
    with capsys.disabled():
        print(f" [{killed} kills, {finished} runs equal to the undisturbed one]", end="")


# ----------------------------------------------------------------------------------------------------------------------
# 2. the disk is full

def at_most(n_byte):
    """No file of this process may grow beyond n_byte."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (n_byte, n_byte))


def test_no_room_for_a_checkpoint(letters, tmp_path):
    out = tmp_path / "run"
    argv = [*SMALL, "--data", letters, "--out", out, "--curriculum", "CC", "--save_interval", 2, "--eval_interval", 100]
    assert command(train, [*argv, "--stop_after", 2]).status == 0
    before = load_checkpoint(out / "last.pt")
    ended = command(train, ["--resume", "--out", out], at_most(os.path.getsize(out / "last.pt") // 2))
    assert ended.refused and ".pt: cannot be written" in ended.stderr
    assert same(load_checkpoint(out / "last.pt"), before) and not [name for name in os.listdir(out) if name.endswith(".part")]
    assert command(train, ["--resume", "--out", out]).status == 0


def test_no_room_for_the_log(letters, tmp_path):
    """The log fills up before the first checkpoint; its torn last line is gone after a resume."""
    out = tmp_path / "run"
    argv = [*SMALL, "--data", letters, "--out", out, "--curriculum", "CCCC", "--batch_tokens", 60, "--save_interval", 100, "--eval_interval", 100]
    assert command(train, [*argv, "--stop_after", 2]).status == 0
    ended = command(train, ["--resume", "--out", out], at_most(os.path.getsize(out / "log.jsonl") + 1000))
    assert ended.refused and "log.jsonl" in ended.stderr and load_checkpoint(out / "last.pt")["now"]["step"] == 2
    assert command(train, ["--resume", "--out", out]).status == 0
    assert [line["step"] for line in log(out) if "kind" in line] == list(range(1, load_checkpoint(out / "last.pt")["now"]["step"] + 1))


@pytest.mark.parametrize("file", ["tokenizer.tiktoken", "caption_train.bin"])
def test_no_room_for_data(letters, tmp_path, file):
    """The disk ends ten bytes before the end of a file: no folder is left, and the one that was there is as it was."""
    room = os.path.getsize(os.path.join(letters, file)) - 10
    argv = ["babylm", os.path.dirname(letters), "--vocab_size", 257, "--out", tmp_path / "data"]
    assert command(prepare_data, argv).status == 0
    before = sorted(os.listdir(tmp_path / "data"))
    for more in [], ["--overwrite"]:
        ended = command(prepare_data, [*argv[:-1], tmp_path / ("data" if more else "new"), *more], at_most(room))
        assert ended.refused
    assert os.listdir(tmp_path) == ["data"] and sorted(os.listdir(tmp_path / "data")) == before and prepare_data.Data(str(tmp_path / "data"))


def test_no_room_for_reference_losses(letters, teacher, tmp_path):
    data = shutil.copytree(letters, tmp_path / "data")
    for path in data.glob("reference_*"):
        path.unlink()
    argv = [*SMALL, "--data", data, "--teacher", teacher, "--curriculum", "C", "--out", tmp_path / "run"]
    assert command(train, argv, at_most(500)).refused
    assert command(train, argv).status == 0


# ----------------------------------------------------------------------------------------------------------------------
# 3. damaged and hostile checkpoints

def test_resume_falls_back_on_the_checkpoint_before(small_run, tmp_path):
    """A run of 4 steps that saved at 2 and 4; last.pt is damaged, so it goes on from step 2 and ends with the same bits."""
    for damage in lambda raw: raw[:len(raw) // 2], lambda raw: raw[:-3000] + bytes([raw[-3000] ^ 1]) + raw[-2999:], lambda raw: b"":
        out = tmp_path / "run"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(small_run, out)
        raw = (out / "last.pt").read_bytes()
        (out / "last.pt").write_bytes(damage(raw))
        ended = command(train, ["--resume", "--out", out])
        assert ended.status == 0 and "last.pt" in ended.stdout and "going on from" in ended.stdout and "previous.pt" in ended.stdout
        assert same(everything_plain(out), everything_plain(small_run))


def everything_plain(out):
    state = load_checkpoint(os.path.join(out, "last.pt"))
    state["now"].pop("seconds")
    state["config"].pop("out")
    return state


def test_every_flipped_byte_of_a_checkpoint_is_seen(small_run, tmp_path, pytestconfig):
    """A byte in the middle of the weights, flipped: torch itself would load it. Bytes between the parts of the file do not matter."""
    path, rng = tmp_path / "last.pt", random.Random(2)
    raw, good = open(os.path.join(small_run, "last.pt"), "rb").read(), load_checkpoint(os.path.join(small_run, "last.pt"))
    refused = 0
    for _ in range(20 * pytestconfig.getoption("mutations")):
        at = rng.randrange(len(raw))
        path.write_bytes(raw[:at] + bytes([raw[at] ^ (1 << rng.randrange(8))]) + raw[at + 1:])
        try:
            assert same(load_checkpoint(path), good)
        except InputError as error:
            refused += 1
            assert "last.pt" in str(error) and "\n" not in str(error)
    assert refused > 10 * pytestconfig.getoption("mutations")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_with_code_is_refused_and_never_run(small_run, tmp_path):
    trap = str(tmp_path / "trap")
    for name in "last.pt", "best.pt":
        run_folder = shutil.copytree(small_run, tmp_path / name)
        (run_folder / "previous.pt").unlink()
        state = load_checkpoint(run_folder / name)
        for hostile in lambda f: torch.save(state | {"now": Bomb(trap)}, f), lambda f: pickle.dump(state | {"now": Bomb(trap)}, f):
            with open(run_folder / name, "wb") as f:
                hostile(f)
            ended = command(train, ["--resume", "--out", run_folder]) if name == "last.pt" else command(evaluation, [run_folder, "--tasks", "blimp"])
            assert ended.refused and name in ended.stderr and not os.path.exists(trap)


def changed(state, **parts):
    return {key: parts[key](value) if key in parts else value for key, value in state.items()}


@pytest.mark.parametrize("change, words", [
    (lambda s: changed(s, model_config=lambda c: c | {"n_embd": 32}), "another version"),
    (lambda s: changed(s, model_config=lambda c: c | {"n_eye": 2}), "n_eye"),
    (lambda s: changed(s, model_config=lambda c: {"n_layer": 1}), "another version"),
    (lambda s: changed(s, model=lambda m: {}), "Missing key"),
    (lambda s: {"weights": s["model"]}, "not a gatevlm checkpoint"),
], ids=["another width", "unknown field", "fields missing", "no weights", "another program"])
def test_a_checkpoint_of_another_config_or_version_is_refused(change, words, small_run, tmp_path):
    out = shutil.copytree(small_run, tmp_path / "run")
    (out / "previous.pt").unlink()
    for name in "last.pt", "best.pt":
        torch.save(change(load_checkpoint(out / name)), out / name)
    assert command(train, ["--resume", "--out", out]).refused
    ended = command(evaluation, [out, "--tasks", "blimp"])
    assert ended.refused and "best.pt" in ended.stderr and (words in ended.stderr or words == "Missing key")


@pytest.mark.parametrize("change, words", [
    (lambda s: changed(s, config=lambda c: c | {"momentum": 1.0}), "momentum"),
    (lambda s: changed(s, config=lambda c: {k: v for k, v in c.items() if k != "beta2"}), "beta2"),
    (lambda s: changed(s, optimizers=lambda o: [{"state": {}, "param_groups": []}]), "does not fit"),
    (lambda s: {k: v for k, v in s.items() if k != "optimizers"}, "no state of a training run"),
], ids=["flag of another version", "flag missing", "another optimizer", "weights only"])
def test_a_state_that_training_cannot_go_on_from_is_refused(change, words, small_run, tmp_path):
    out = shutil.copytree(small_run, tmp_path / "run")
    (out / "previous.pt").unlink()
    torch.save(change(load_checkpoint(out / "last.pt")), out / "last.pt")
    ended = command(train, ["--resume", "--out", out])
    assert ended.refused and words in ended.stderr


def test_resume_wants_the_data_it_was_started_with(letters, tmp_path):
    """Other captions with the same tokenizer, then another tokenizer: both are named."""
    data, out = shutil.copytree(letters, tmp_path / "data"), tmp_path / "run"
    assert command(train, [*SMALL, "--data", data, "--out", out, "--curriculum", "CC", "--stop_after", 1]).status == 0
    shutil.rmtree(data)
    made = babylm_folder(tmp_path / "other", ["abc", "de"] * 20, np.float32(np.arange(240).reshape(40, 2, 3)), "one two three. " * 20, ["ab"], np.ones((1, 2, 3), np.float32), "one. " * 20)
    shutil.copytree(made, data)
    ended = command(train, ["--resume", "--out", out])
    assert ended.refused and "caption_train.bin" in ended.stderr
    shutil.rmtree(data)
    prepare_data.main(["babylm", str(tmp_path / "other"), "--vocab_size", "260", "--out", str(data)])
    assert command(train, ["--resume", "--out", out]).refused
    ended = command(evaluation, [out, "--tasks", "blimp"])
    assert ended.refused


# ----------------------------------------------------------------------------------------------------------------------
# 4. damaged data: what goes in, what prepare_data.py wrote, what a run left

def other_value(rng):
    return rng.choice([None, -1, 10 ** 30, 1e308, True, "", "x", "\ud800", [], {}, [[]], {"a": None}, "\x00"])


def mutate_json(value, rng):
    """A copy of a JSON value in which one place is gone or holds something else."""
    places = []

    def walk(node):
        for key in list(node if isinstance(node, dict) else range(len(node))):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])
    value = json.loads(json.dumps(value))
    if not isinstance(value, (dict, list)) or not value:
        return other_value(rng)
    walk(value)
    node, key = rng.choice(places)
    if rng.random() < 0.4:
        del node[key]
    else:
        node[key] = other_value(rng)
    return value


def mutate_npy(array, rng):
    """Wrong type, wrong shape, numbers that cannot be."""
    array = np.array(array)
    bad = rng.choice(["dtype", "object", "rank", "rows", "number", "transposed", "archive"])
    if bad == "dtype":
        with np.errstate(all="ignore"):
            return array.astype(rng.choice([np.float64, np.int8, np.complex64, np.uint32, bool]))
    if bad == "object":
        return np.array([{"a": 1}, None], dtype=object)
    if bad == "rank":
        return array.reshape(-1) if array.ndim > 1 else array[:, None]
    if bad == "rows":
        return array[:rng.randrange(len(array) + 1)] if rng.random() < 0.5 else np.concatenate([array, array[-1:]])
    if bad == "transposed":
        return np.asfortranarray(array.T)
    if array.size and bad == "number":
        flat = array.reshape(-1)
        at = rng.randrange(array.size)
        flat[at] = rng.choice([np.nan, np.inf, -np.inf]) if array.dtype.kind == "f" else rng.choice([-1, np.iinfo(array.dtype).max])
        return array
    return {"a": array}


def mutations(name, raw, rng, n):
    """n times each: (what was done, new bytes, or a function of the path that does it)."""
    for _ in range(n):
        at, more = rng.randrange(len(raw) + 1), rng.randrange(len(raw) + 1)
        yield "cut", raw[:at]
        yield "bytes", b"".join([raw[:at], rng.randbytes(rng.randint(1, 8)), raw[at + rng.randint(0, 8):]])
        yield "flip", raw[:at] + bytes([raw[at] ^ (1 << rng.randrange(8))]) + raw[at + 1:] if at < len(raw) else raw + b"x"
        yield "doubled", raw[:at] + raw[min(at, more):]
        yield "NUL", raw[:at] + b"\x00" * rng.randint(1, 5) + raw[at:]
        if name.endswith(".npy"):
            def rewrite(path, array=mutate_npy(np.load(io.BytesIO(raw)), rng)):
                with open(path, "wb") as f:
                    np.savez(f, **array) if isinstance(array, dict) else np.save(f, array)
            yield "array", rewrite
        elif name.endswith(".json"):
            yield "value", json.dumps(mutate_json(json.loads(raw), rng)).encode()
        elif name.endswith(".jsonl"):
            lines = raw.decode().splitlines()
            i = rng.randrange(len(lines))
            lines[i] = json.dumps(mutate_json(json.loads(lines[i]), rng))
            yield "value", "\n".join(lines).encode()
        elif not name.endswith((".bin", ".pt", ".png", ".jpg")):
            yield "not UTF-8", raw[:at] + rng.choice([b"\xff", b"\xc3", b"\xed\xa0\x80", "é".encode("latin-1")]) + raw[at:]
    yield "empty", b""
    yield "BOM", b"\xef\xbb\xbf" + raw
    yield "CRLF", raw.replace(b"\n", b"\r\n")
    yield "loop of links", lambda path: os.symlink(path, path)
    yield "folder", os.mkdir
    yield "missing", lambda path: None
    yield "nested", b"[" * 100_000 + b"]" * 100_000
    yield "swapped", None


def damage(path, change, rng):
    """Put a mutation in the place of a file; a swap takes another file's content."""
    beside = [p for p in sorted(os.listdir(os.path.dirname(path))) if os.path.isfile(os.path.join(os.path.dirname(path), p)) and p != os.path.basename(path)]
    if change is None:
        change = open(os.path.join(os.path.dirname(path), rng.choice(beside)), "rb").read() if beside else b"swapped"
    os.unlink(path)
    if callable(change):
        change(path)
    else:
        with open(path, "wb") as f:
            f.write(change)


def remove(path):
    if os.path.islink(path) or os.path.isfile(path):
        os.unlink(path)
    elif os.path.isdir(path):
        shutil.rmtree(path)


COUNT = {"success": 0, "refused": 0}


def campaign(root, files, commands, after, n):
    """Damage each of files below root in every way; run the commands; after each, files are as they were."""
    for name in files:
        path, rng = os.path.join(root, name), random.Random(f"seed {name}")
        raw = open(path, "rb").read()
        for what, change in list(mutations(name, raw, rng, n)):
            damage(path, change, rng)
            for ended in commands():
                assert ended.clean, f"{name}, {what}: status {ended.status}, {ended.stderr[-2000:]}"
                COUNT["refused" if ended.refused else "success"] += 1
                after(ended)
            remove(path)
            with open(path, "wb") as f:
                f.write(raw)


def test_damaged_data_folder(letters, tmp_path, pytestconfig):
    """Every file that prepare_data.py writes; a training step and its evaluation read all of them."""
    data, out = str(shutil.copytree(letters, tmp_path / "data")), tmp_path / "run"
    for path in (tmp_path / "data").glob("reference_*"):
        path.unlink()

    def commands():
        shutil.rmtree(out, ignore_errors=True)
        yield command(train, [*SMALL, "--data", data, "--out", out, "--curriculum", "CT", "--max_steps", 4, "--stop_after", 2, "--eval_interval", 1])

    def after(ended):
        if ended.refused:
            assert not any(name.endswith(".part") for name in (os.listdir(out) if os.path.exists(out) else []))
            assert data in ended.stderr
    campaign(data, sorted(os.listdir(data)), commands, after, pytestconfig.getoption("mutations"))


@pytest.fixture
def babylm(tmp_path):
    """A BabyLM folder whose two state files are halves of one array."""
    root = tmp_path / "babylm"
    os.makedirs(root / "text_only" / "train")
    os.makedirs(root / "image_caption")
    (root / "text_only" / "train" / "a.train").write_text("the dog is here.\nit is yellow.\n\nhow are you? fine.\n" * 4)
    (root / "image_caption" / "local_narr_captions.json").write_text(json.dumps([f"a dog number {i}" for i in range(8)]))
    states = np.float32(np.random.default_rng(0).normal(size=(8, 4)))
    np.save(root / "image_caption" / "local_narr_dino_v2_states_1of2.npy", states[:5])
    np.save(root / "image_caption" / "local_narr_dino_v2_states_2of2.npy", states[5:])
    return root


def prepares(source, root, data, *flags):
    """A command that prepares data, and a check that it leaves a whole folder or none."""
    def commands():
        shutil.rmtree(data, ignore_errors=True)
        yield command(prepare_data, [source, root, "--vocab_size", 300, "--out", data, *flags])

    def after(ended):
        assert not os.path.exists(f"{data}.part")
        assert os.path.exists(data) == (ended.status == 0)
        if ended.status == 0:
            prepare_data.Data(str(data))
        else:
            assert str(root) in ended.stderr
    return commands, after


def test_damaged_babylm_files(babylm, tmp_path, pytestconfig):
    files = ["text_only/train/a.train", "image_caption/local_narr_captions.json", "image_caption/local_narr_dino_v2_states_1of2.npy",
             "image_caption/local_narr_dino_v2_states_2of2.npy"]
    campaign(babylm, files, *prepares("babylm", babylm, tmp_path / "data"), pytestconfig.getoption("mutations"))


def test_damaged_photos(tmp_path, pytestconfig):
    root = tmp_path / "photos"
    os.makedirs(root)
    for i in range(4):
        Image.new("RGB", (20, 20), (60 * i, 0, 0)).save(root / f"{i}.{'png' if i % 2 else 'jpg'}")
    (root / "captions.txt").write_text("".join(f"{i}.{'png' if i % 2 else 'jpg'}#0\ta photo of {i}\n" for i in range(4)))
    coco = {"images": [{"id": i, "file_name": f"{i}.{'png' if i % 2 else 'jpg'}"} for i in range(4)], "annotations": [{"image_id": i, "caption": f"photo {i}"} for i in range(4)]}
    (root / "coco.json").write_text(json.dumps(coco))
    n = pytestconfig.getoption("mutations")
    campaign(root, ["captions.txt", "0.jpg", "1.png"], *prepares("photos", root, tmp_path / "data"), n)
    campaign(root, ["coco.json"], *prepares("photos", root, tmp_path / "data", "--captions_file", root / "coco.json"), n)


def evaluation_sets(root, dim=(2, 3)):
    """A line or two of every benchmark in the official formats."""
    lines = {"blimp_filtered/a.jsonl": [{"UID": "a", "sentence_good": "the dog is.", "sentence_bad": "the dog are."}] * 2,
             "supplement_filtered/b.jsonl": [{"sentence_good": "is it? it is.", "sentence_bad": "is it? they are."}],
             "ewok_filtered/c.jsonl": [{"Domain": "d", "Context1": "a is on b.", "Context2": "b is on a.", "Target1": "b is in a.", "Target2": "a is in b."}],
             "winoground_filtered/w.jsonl": [{"caption_0": "a dog", "caption_1": "dog a", "image_idx": i, "image_key": "image_0", "collapsed_tag": "x"} for i in range(2)],
             "vqa_filtered/v.jsonl": [{"question": "what is it?", "target_ans": "a dog", "distractors": list("bcdefgh"), "idx_in_hf_dataset": i} for i in range(2)]}
    for name, rows in lines.items():
        os.makedirs(os.path.dirname(os.path.join(root, name)))
        with open(os.path.join(root, name), "w") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
    np.save(os.path.join(root, "winoground_states.npy"), np.ones((2, 2, *dim), np.float16))
    np.save(os.path.join(root, "vqa_states.npy"), np.ones((2, *dim), np.float16))
    return [*lines, "winoground_states.npy", "vqa_states.npy"]


def test_damaged_evaluation_sets(small_run, tmp_path, pytestconfig):
    """Two runs: tables alone, without the pictures and the losses of a single one."""
    root, runs = str(tmp_path / "full_eval"), [shutil.copytree(small_run, tmp_path / name) for name in "ab"]
    files = evaluation_sets(root)
    for path, text in (tmp_path / "norms.tsv", "word\tconcreteness\ndog\t4.8\nis\t1.2\n"), (tmp_path / "upos.tsv", "word\tupos\ndog\tNOUN\nis\tAUX\n"):
        path.write_text(text)
    n = pytestconfig.getoption("mutations")
    for name in files:
        task = name.split("_")[0]
        campaign(root, [name], lambda: [command(evaluation, [*runs, "--babylm_eval", root, "--tasks", task])], lambda ended: None, n)
    tables = ["--norms", tmp_path / "norms.tsv", "--upos", tmp_path / "upos.tsv"]
    campaign(str(tmp_path), ["norms.tsv", "upos.tsv"], lambda: [command(evaluation, [runs[0], "--babylm_eval", root, "--tasks", "blimp", *tables])], lambda ended: None, n)


def test_damaged_run_folder(small_run, tmp_path, pytestconfig):
    """Whatever is damaged in a run folder, eval.py and --resume work or say what is wrong."""
    out, root = str(tmp_path / "run"), str(tmp_path / "full_eval")
    evaluation_sets(root)

    evaluate = lambda: command(evaluation, [out, small_run, "--babylm_eval", root, "--tasks", "blimp"])  # two runs: tables alone
    resume = lambda: command(train, ["--resume", "--out", out])
    shutil.copytree(small_run, out)
    for name, readers in {"config.json": [evaluate], "summary.json": [evaluate], "log.jsonl": [resume], "last.pt": [resume], "previous.pt": [resume],
                          "best.pt": [evaluate, resume], "meta.json": [evaluate, resume], "tokenizer.tiktoken": [evaluate]}.items():
        shutil.rmtree(out)
        shutil.copytree(small_run, out)
        campaign(out, [name], lambda: (reader() for reader in readers), lambda ended: None, 1)


def test_a_line_of_ten_megabytes(babylm, tmp_path):
    """One endless word, and one endless gap, which is more than tiktoken's regular expressions can take."""
    commands, after = prepares("babylm", babylm, tmp_path / "data")
    for text, status in (b"a" * 10_000_000, 0), (b"the dog " * 1_250_000, 0), (b"a" + b" " * 10_000_000 + b"a", 2), (b"!?" * 500_000, 0):
        (babylm / "text_only" / "train" / "a.train").write_bytes(text + b"\n")
        for ended in commands():
            assert ended.clean and ended.status == status, ended.stderr[:500]
            COUNT["refused" if ended.refused else "success"] += 1
            after(ended)


def test_the_campaign_was_large_enough(pytestconfig, capsys):
    """Runs after the tests above, in the order of this file."""
    if COUNT["success"] + COUNT["refused"]:
        with capsys.disabled():
            print(f" [{sum(COUNT.values())} damaged files: {COUNT['refused']} refused, {COUNT['success']} harmless]", end="")
        assert sum(COUNT.values()) >= 300 and min(COUNT.values()) > 30


# ----------------------------------------------------------------------------------------------------------------------
# 5. pictures, by hand: what arrives is what a viewer shows (test_data.py has formats, rotation and transparency)

def test_a_picture_of_one_pixel_and_one_of_a_gigapixel(tmp_path):
    root = tmp_path / "photos"
    os.makedirs(root)
    Image.new("RGB", (1, 1), (200, 0, 0)).save(root / "a.png")
    Image.new("RGB", (1, 3), (0, 200, 0)).save(root / "b.png")
    (root / "captions.txt").write_text("a.png\tred\nb.png\tgreen\n")
    assert command(prepare_data, ["photos", root, "--vocab_size", 257, "--out", tmp_path / "data"]).status == 0
    colors = {tuple(row) for row in (prepare_data.Data(str(tmp_path / "data")).image[:, 0, :3] * 255).round().astype(int).tolist()}
    assert colors == {(200, 0, 0), (0, 200, 0)}
    Image.new("1", (20_000, 20_000)).save(root / "b.png")  # 50 kB that would be 1.2 GB of RGB
    for strict in False, True:  # as python -W error too, which makes an error of Pillow's warning
        ended = command(prepare_data, ["photos", root, "--vocab_size", 257, "--out", tmp_path / "new"], lambda: warnings.simplefilter("error" if strict else "ignore"))
        assert ended.refused and "b.png" in ended.stderr and not os.path.exists(tmp_path / "new")


# ----------------------------------------------------------------------------------------------------------------------
# 6. numbers

def test_bad_images_are_told_apart_from_a_rate_that_diverges(letters, tmp_path):
    """NaN in row 7 of image.npy, which the checksums leave out, is named; good data with an absurd learning rate names step and batch."""
    data = shutil.copytree(letters, tmp_path / "data")
    argv = [*SMALL, "--data", data, "--curriculum", "C", "--batch_tokens", 120, "--warmup_steps", 0]
    ended = command(train, [*argv, "--lr", 1e30, "--save_interval", 1, "--out", tmp_path / "diverged"])
    assert ended.refused and "step 2 (epoch 0, batch 1 of it: captions " in ended.stderr and "diverged" in ended.stderr and "--lr" in ended.stderr
    assert load_model(str(tmp_path / "diverged"), "last.pt")
    named = [int(x) for x in ended.stderr.split("captions ")[1].split(")")[0].split(", ") if x != "..."]
    config = train.TrainConfig(curriculum="C", batch_tokens=120, length_multiple=1)
    assert train.epoch_plan("C", 0, config, 32, prepare_data.Data(str(data)))[1][1][:4].tolist() == named
    image = np.load(data / "image.npy")
    image[7, 1, 2] = np.nan
    np.save(data / "image.npy", image)
    ended = command(train, [*argv, "--out", tmp_path / "bad"])
    assert ended.refused and "image.npy, row 7" in ended.stderr and "--lr" not in ended.stderr


# ----------------------------------------------------------------------------------------------------------------------
# 7. two runs, one folder

def test_two_runs_in_one_folder(letters, tmp_path):
    """The second is refused while the first runs; after a kill its lock is gone."""
    out = tmp_path / "run"
    argv = [*SMALL, "--data", letters, "--out", out, "--curriculum", "C" * 50, "--save_interval", 1]
    first = fork(train, argv)
    try:
        while not os.path.exists(out / "last.pt"):
            time.sleep(0.01)
        for again in argv, ["--resume", "--out", out]:
            ended = command(train, again)
            assert ended.refused and "another run" in ended.stderr
        with pytest.raises(InputError, match="another run"), prepare_data.locked(str(out)):
            pass
    finally:
        os.kill(first[0], signal.SIGKILL)
        wait(first)
    step = load_checkpoint(out / "last.pt")["now"]["step"]
    assert command(train, ["--resume", "--out", out, "--stop_after", step + 2]).status == 0


def test_two_preparations_of_one_folder(letters, tmp_path):
    """The second is refused; what a killed one left behind is cleared away."""
    argv = ["babylm", os.path.dirname(letters), "--vocab_size", 257, "--out", tmp_path / "data"]
    with prepare_data.locked(str(tmp_path / "data.part")):
        ended = command(prepare_data, argv)
        assert ended.refused and "another run" in ended.stderr
    os.makedirs(tmp_path / "data.part" / "evaluation_data")
    (tmp_path / "data.part" / "image.npy").write_bytes(b"half")
    assert command(prepare_data, argv).status == 0 and os.listdir(tmp_path) == ["data"]
    prepare_data.Data(str(tmp_path / "data"))


# ----------------------------------------------------------------------------------------------------------------------
# 10. terminals and platforms

def test_a_path_with_letters_that_the_terminal_does_not_know(letters, tmp_path):
    """Spaces, an umlaut and Greek in paths; python -W error; terminals without those letters or any ability."""
    data, where, root = shutil.copytree(letters, tmp_path / "my dätä ψ"), tmp_path / "öut ψ", os.path.dirname(os.path.abspath(train.__file__))
    evaluation_sets(str(tmp_path / "full_eval"))
    os.makedirs(where)
    for encoding, script, argv in (("latin-1", "train.py", [*SMALL, "--data", data, "--out", where / "run ψ 1", "--max_steps", 2, "--curriculum", "C"]),
                                   ("ascii", "eval.py", [where / "run ψ 1", "--babylm_eval", tmp_path / "full_eval"])):
        ended = subprocess.run([sys.executable, "-W", "error", os.path.join(root, script), *map(str, argv)], capture_output=True, cwd=where, text=True, encoding="latin-1",
                               env=os.environ | {"OMP_NUM_THREADS": "1", "TERM": "dumb", "LC_ALL": "C", "PYTHONIOENCODING": encoding})
        assert ended.returncode == 0 and ended.stderr == "" and "run ? 1" in ended.stdout, ended.stderr[-3000:]
    assert os.path.exists(where / "run ψ 1" / "gates.csv")
