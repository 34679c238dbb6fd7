"""The commands of the README are commands: every flag exists, every value is allowed, every preset is there."""
import os
import re
import shlex

import pytest

import eval as evaluation
import prepare_data
import train

with open(os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "README.md"), encoding="utf-8") as f:
    README = f.read()
COMMANDS = re.findall(r"((?:python|torchrun --nproc_per_node=\d+) (?:train|prepare_data|eval)\.py[^`\n;&]*)", README)


def test_the_readme_has_commands_and_the_two_that_the_project_promises():
    assert len(COMMANDS) >= 10
    lines = README.splitlines()
    assert "pip install -r requirements.txt && python train.py" in lines
    assert "pip install -r requirements.txt pytest && python -m pytest" in lines


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_command(command):
    words = shlex.split(command, comments=True)
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    argv = [word.replace("$g", "soft-token") for word in words[script + 1:]]
    if "--help" in argv:
        return
    if words[script] == "train.py":
        preset, _, flags = train.parse(argv)
        values = train.PRESETS[preset] | flags
        train.TrainConfig(**{k: v for k, v in values.items() if k in train.TrainConfig.__dataclass_fields__})
        train.GateVLMConfig(**{k: v for k, v in values.items() if k in train.GateVLMConfig.__dataclass_fields__})
    elif words[script] == "prepare_data.py":
        prepare_data.make_parser().parse_args(argv)
    else:
        evaluation.make_parser().parse_args(argv)


def test_every_switch_in_the_table_is_a_flag_and_every_value_one_of_its_choices():
    rows = re.findall(r"^\| `--(\w+)` \| ([^|]*) \|", README, re.MULTILINE)
    assert len(rows) >= 8
    for name, values in rows:
        field = train.GateVLMConfig.__dataclass_fields__.get(name) or train.TrainConfig.__dataclass_fields__[name]
        if field.metadata["choices"]:
            assert tuple(values.split(", ")) == tuple(field.metadata["choices"])
            assert field.default == field.metadata["choices"][0]
