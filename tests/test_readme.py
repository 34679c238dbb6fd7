"""The commands of the README are commands: every flag exists, every value is allowed, every preset is there; loops are unrolled by bash, and
what they train and score in the toy world is run, small."""
import glob
import os
import re
import shlex
import subprocess

import pytest

import eval as evaluation
import prepare_data
import train

with open(os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "README.md"), encoding="utf-8") as f:
    README = f.read()
COMMAND = r"(?:python|torchrun --nproc_per_node=\d+) (?:train|prepare_data|eval)\.py[^`\n;&]*"
BLOCKS = re.findall(r"^```\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def unrolled(lines):
    """Every python line of a shell script, as bash would call it; globs stay as they are."""
    # each line in one write: commands of a loop run side by side
    script = 'set -f\npython() { local words; printf -v words " %q" "$@"; echo "python$words"; }\npip() { :; }\n' + lines
    return subprocess.run(["bash", "-c", script], check=True, capture_output=True, text=True).stdout.splitlines()


LOOPS = {block: unrolled(block.replace('seeds="1 2 3"', "seeds=1")) for block in BLOCKS if "\nfor " in block or block.startswith("for ")}
INLINE = [line for loop in re.findall(r"`(for [^`]*; done)`", README) for line in unrolled(loop)]
COMMANDS = sorted({*(command for command in re.findall(COMMAND, README) if "$" not in command), *INLINE, *(line for lines in LOOPS.values() for line in lines)})


def argv_of(command):
    words = shlex.split(command, comments=True)
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return words[script], words[script + 1:]


def test_the_readme_has_commands_and_the_two_that_the_project_promises():
    assert len(COMMANDS) >= 40 and len(LOOPS) >= 2
    lines = README.splitlines()
    assert "pip install -r requirements.txt && python train.py" in lines
    assert "pip install -r requirements.txt pytest && python -m pytest" in lines


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command):
    script, argv = argv_of(command)
    if "--help" in argv:
        return
    if script == "train.py":
        preset, _, flags = train.parse(argv)
        values = train.PRESETS[preset] | flags
        train.TrainConfig(**{k: v for k, v in values.items() if k in train.TrainConfig.__dataclass_fields__})
        train.GateVLMConfig(**{k: v for k, v in values.items() if k in train.GateVLMConfig.__dataclass_fields__})
    elif script == "prepare_data.py":
        prepare_data.make_parser().parse_args(argv)
    elif script == "eval.py":
        evaluation.make_parser().parse_args(argv)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """The two toy worlds of the page, small: they differ in their pictures only, so one teacher serves both."""
    root, size = tmp_path_factory.mktemp("worlds"), ["--n_image", "60", "--n_text", "60", "--out"]
    return {"toy": prepare_data.main(["toy", *size, str(root / "toy")]), "patches": prepare_data.main(["toy", "--n_image_token", "16", *size, str(root / "toy16")])}


SMALL = "--max_steps 3 --n_layer 2 --n_head 2 --n_embd 16 --n_image_layer 1 --batch_tokens 256 --elide_warmup 1 --elide_cycle 2 --elide_dense 1 --eval_interval 2 --eval_tokens 100"


@pytest.mark.parametrize("block", LOOPS, ids=lambda block: block.splitlines()[0][:40])
def test_loops_run_small_and_their_tables_come_out(block, worlds, tmp_path, monkeypatch, capsys):
    """Every loop over runs over the toy world, a few steps of a few numbers each, in the order of the page."""
    monkeypatch.chdir(tmp_path)
    teacher = [line for lines in LOOPS.values() for line in lines if line.endswith("--out out/teacher")]  # other blocks use it too
    assert teacher
    for line in dict.fromkeys([*teacher, *LOOPS[block]]):
        script, argv = argv_of(line)
        if script == "train.py":
            preset, _, flags = train.parse(argv)
            if preset in worlds:  # other presets need data that are not here
                assert flags.get("data", "data/toy").startswith("data/toy")
                train.main([*argv, "--data", worlds[preset], *SMALL.split()])
        elif script == "eval.py" and "--babylm_eval" not in argv:
            capsys.readouterr()
            evaluation.main([name for word in argv for name in (sorted(glob.glob(word)) if set(word) & set("*?[") else [word])] + ["--tasks", "supplement"])
            assert "supplement" in capsys.readouterr().out


def test_pictures_and_anchors_are_there_and_every_picture_says_which_command_draws_it():
    root = os.path.dirname(train.__file__)
    drawn = re.findall(r"^!\[[^\]]+\]\(([^)]+)\)\n\n\*(.*)\*$", README, re.MULTILINE)  # a picture, an empty line, its caption in italics
    assert len(drawn) == README.count("![") >= 6
    for path, caption in drawn:
        assert os.path.isfile(os.path.join(root, path)) and "`" in caption
    assert sorted(path for path, _ in drawn) == sorted(f".github/{name}" for name in os.listdir(os.path.join(root, ".github")))
    headings = {re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-") for line in README.splitlines() if line.startswith("#")}
    assert set(re.findall(r"\]\(#([^)]*)\)", README)) <= headings


def test_every_switch_in_the_table_is_a_flag_and_every_value_one_of_its_choices():
    rows = re.findall(r"^\| `--(\w+)` \| ([^|]*) \|", README, re.MULTILINE)
    assert len(rows) >= 8
    for name, values in rows:
        field = train.GateVLMConfig.__dataclass_fields__.get(name) or train.TrainConfig.__dataclass_fields__[name]
        if field.metadata["choices"]:
            assert tuple(values.split(", ")) == tuple(field.metadata["choices"])
            assert field.default == field.metadata["choices"][0]
