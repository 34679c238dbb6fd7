"""The page keeps its word: its commands parse, its pictures and links exist, its switches are those of the
code; and the files keep the size that a student reads in an evening."""
import ast
import glob
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

import eval as evaluation
import prepare_data
import train

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
README = open(f"{ROOT}/README.md", encoding="utf-8").read()
RESULTS = open(f"{ROOT}/.github/results.md", encoding="utf-8").read()
# lines and characters at most
BUDGET = {
    "gatevlm.py": (450, 25_000), "train.py": (470, 29_000), "eval.py": (560, 34_000),
    "prepare_data.py": (760, 43_000), "README.md": (220, 17_000),
}

def commands():
    """Every command of the code blocks, [words], without the shell around it."""
    blocks = re.findall(r"```\n(.*?)```", README, re.DOTALL)
    parts = [part.strip() for block in blocks for line in block.splitlines() for part in line.split("&&")]
    return [shlex.split(part, comments=True) for part in parts if part.startswith("python ")]

def test_the_two_commands_that_ci_runs_are_there():
    lines = README.splitlines()
    assert "pip install -r requirements.txt && python train.py" in lines
    assert "pip install -r requirements.txt pytest && python -m pytest" in lines

@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_parses(command, monkeypatch, capsys):
    """Flags are known and their values fit, up to the point where files are needed."""
    if command[1:3] == ["-m", "pytest"]:
        return
    script, *argv = command[1:]
    assert os.path.isfile(f"{ROOT}/{script}")
    if script == "train.py":
        _, flags = train.parse(argv)
        values = train.PRESETS[flags.get("preset", "toy")] | flags
        known = train.TrainConfig.__dataclass_fields__
        train.TrainConfig(**{name: x for name, x in values.items() if name in known})
    elif script in ("eval.py", "prepare_data.py"):
        module = evaluation if script == "eval.py" else prepare_data
        with pytest.raises((module.InputError, OSError)) as error:  # the files of the page are not here
            module.main(argv)
        assert "unknown" not in str(error.value)

def test_the_runs_of_claims_parse(tmp_path):
    """A python that only writes down what it is asked for, and makes the run's folder: tables find theirs."""
    (tmp_path / "tests").mkdir()
    shutil.copy(f"{ROOT}/tests/claims.sh", tmp_path / "tests")
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@" >> asked\n[ "$3" != --out ] || mkdir -p "$4"\n')
    (tmp_path / "python").chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    env |= dict(BABYLM="b", FULL_EVAL="f", NORMS="n", UPOS="u")
    more = "10-toy 10-photos 10-why 1-photos 2-photos 5-photos 6-photos".split()
    for claims in [], more:
        subprocess.run(["bash", tmp_path / "tests" / "claims.sh", *claims], env=env, check=True)
    asked = [line.split() for line in (tmp_path / "asked").read_text().splitlines()]
    runs = [train.parse(argv) for script, *argv in asked if script == "train.py"]
    of = {flags["out"]: flags for _, flags in runs}  # a run of two claims is the same run
    assert all(resume and flags == of[flags["out"]] for resume, flags in runs)
    kinds = 1 + 5 + 7 + 2 + 2 + 2 + 2 + 4 * 5 + 3 + 4 + 3 + 2  # of 1 to 6, 9, 10, three on photos
    assert len(of) == 3 * kinds + 4  # two teachers, two runs that stop
    assert not [word for line in asked for word in line if "?" in word or "*" in word]
    assert sum(line[:2] == ["tests/claims.py", "table"] for line in asked) == 8 + 7
    wrong = subprocess.run(["bash", tmp_path / "tests" / "claims.sh", "99"], env=env, capture_output=True)
    assert wrong.returncode == 2

def test_inline_commands_and_flags_exist():
    configs = train.TrainConfig, train.GateVLMConfig
    known = {f"--{name}" for config in configs for name in config.__dataclass_fields__}
    known |= {f"--no-{name[2:]}" for name in known}
    known |= {f"--{name}" for name, *_ in (*prepare_data.FLAGS, *evaluation.FLAGS)}
    known |= {"--resume", "--help", "--skip", "--index-url", "--nproc_per_node"}
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README)) <= known

def test_pictures_and_links_exist_and_each_picture_says_which_command_draws_it():
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert os.path.exists(f"{ROOT}/{path}"), path
    pages = README + RESULTS
    pictures = re.findall(r"!\[[^\]]+\]\((?:\.github/)?(\w+\.(?:png|gif))\)\n\n\*`out/[^`]+`", pages)
    assert len(pictures) == pages.count("![") >= 4
    assert {*pictures} | {"results.md"} == {*os.listdir(f"{ROOT}/.github")}

def test_the_numbers_of_the_page_stand_in_the_results():
    """Every number with a decimal point, as it is or rounded, but for versions and file names."""
    rounded = lambda x: {f"{float(x):.{n}f}" for n in range(1, len(x.split(".")[1]) + 1)}
    known = set().union(*map(rounded, re.findall(r"\d+\.\d+", RESULTS)))
    page = re.sub(r"arXiv \S+|org/\S+|torch==\S+|Python \S+|`[^`\n]+`", "", README)
    numbers = re.findall(r"(?<![\w.])\d+\.\d+", page)
    assert len(numbers) > 30 and not [x for x in numbers if x not in known]

def test_every_preset_has_its_row():
    table = README[README.index("| preset |"):]
    assert all(re.search(rf"\b{name}\b", table) for name in train.PRESETS)

@pytest.mark.parametrize("name", BUDGET)
def test_a_file_keeps_its_budget(name):
    """Lines, characters and columns; no function above 60 lines."""
    text = open(f"{ROOT}/{name}", encoding="utf-8").read()
    lines, characters = BUDGET[name]
    assert text.count("\n") <= lines and len(text) <= characters
    wide = [line for line in text.splitlines() if len(line) > (200 if name == "README.md" else 110)]
    assert not wide, wide[:3]
    if name.endswith(".py"):
        functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
        assert max(node.end_lineno - node.lineno + 1 for node in functions) <= 60

def test_the_tests_keep_theirs():
    texts = [open(path, encoding="utf-8").read() for path in glob.glob(f"{ROOT}/tests/*.py")]
    assert sum(text.count("\n") for text in texts) <= 3_500 and sum(map(len, texts)) <= 190_000
    assert not [line for text in texts for line in text.splitlines() if len(line) > 110]

def test_the_four_files_import_downwards_and_nothing_but_the_agreed_packages():
    order = ["train", "eval", "prepare_data", "gatevlm"]
    for name in order:
        nodes = list(ast.walk(ast.parse(open(f"{ROOT}/{name}.py", encoding="utf-8").read())))
        found = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        found += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
        tops = {module.split(".")[0] for module in found}
        below = set(order[order.index(name) + 1 :])
        assert tops <= below | {"torch", "numpy", "tiktoken", "PIL", "tqdm"} | sys.stdlib_module_names
