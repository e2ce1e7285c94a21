"""The house: what is read is what runs, imports run one way, and fast/ and beyond/ can be taken away."""

import ast
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from data.chat import encode_chat
from data.tiny_world import CHOICES, World, evaluate, prompt_text
from run import show
from tests.exercises import EXERCISES, edited
from tests.helpers import ROOT, fresh, run, succeed, worked

SCRIPTS = ["ivl", "model", "sample", "train", "vocab_map"]
# What a file of each kind may import at its top; main(), which is a script's last function, may import run/.
ALLOWED = {
    "data": {"data"},
    "model": {"data"},
    "ivl": {"data", "model"},
    "vocab_map": {"data", "model", "ivl"},
    "sample": {"data", "model", "ivl", "vocab_map"},
    "train": {"data", "model", "ivl", "vocab_map", "sample"},
    "fast": {"data", *SCRIPTS, "fast"},
    "beyond": {"data", *SCRIPTS, "fast", "beyond"},
    "run": {"data", *SCRIPTS, "fast", "beyond", "run"},
}
OURS = {*ALLOWED, "paper", "bench", "tests"}


def files() -> list[Path]:
    return sorted(
        path
        for path in ROOT.glob("**/*.py")
        if not any(part.startswith((".", "venv", "out")) for part in path.relative_to(ROOT).parts)
    )


def imports(tree: ast.AST) -> list[tuple[str, int]]:
    """Packages of ours that a tree imports anywhere in it, with the line."""
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        found += [
            (name.partition(".")[0], node.lineno)
            for name in names
            if name.partition(".")[0] in OURS
        ]
    return found


def is_main(node: ast.AST) -> bool:
    """The function main, or what is done when a file is run."""
    return (
        isinstance(node, ast.FunctionDef)
        and node.name == "main"
        or isinstance(node, ast.If)
        and "__main__" in ast.dump(node)
    )


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if room in ALLOWED:
        for node in tree.body:
            late = room in {"data", *SCRIPTS} and is_main(node)
            for package, line in imports(node):
                assert package in ALLOWED[room] | ({"run"} if late else set()), (
                    f"{path.name}:{line} imports {package}"
                )
    elif room in ("paper", "bench"):
        assert not {package for package, _ in imports(tree)} & {"tests"}
    if room in SCRIPTS:
        functions = [
            node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        ]
        assert functions[-1].name == "main" or room in ("ivl", "model")
    if room == "tests":
        modules = [
            node.module
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module
        ]
        assert not [module for module in modules if module.startswith("tests.test_")]


def files_imported(path: Path) -> set[Path]:
    """The files of ours that a file imports, in whatever function, but for main."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if is_main(node):
            continue
        for part in ast.walk(node):
            names = []
            if isinstance(part, ast.Import):
                names = [alias.name for alias in part.names]
            elif isinstance(part, ast.ImportFrom) and part.module:
                names = [part.module]
                names += [f"{part.module}.{alias.name}" for alias in part.names]
            found |= {ROOT / (name.replace(".", "/") + ".py") for name in names}
    return {file for file in found if file.is_file()} - {path}


def test_no_two_files_import_each_other_by_whatever_way_round():
    imported = {path: files_imported(path) for path in files()}
    left = set(imported)
    while True:  # a file that imports nothing that is left is in no circle
        free = {path for path in left if not imported[path] & left}
        if not free:
            break
        left -= free
    assert not left, sorted(str(path.relative_to(ROOT)) for path in left)


# ---- what is read is what runs


def copy_of_the_house(folder: Path, *left_out: str) -> Path:
    """A copy of the code in a folder of its own."""
    ignore = shutil.ignore_patterns(
        "out", ".git", "venv", ".venv", "__pycache__", "tests", *left_out
    )
    return shutil.copytree(ROOT, folder / "house", ignore=ignore)


def said(output: str) -> str:
    """What a run printed, less its speed, and which twin it took."""
    output = re.sub(r"  [\d.]+k tokens/s.*|\d+ core-seconds|, \d+ s left|made in .*", "", output)
    kept = [
        line
        for line in output.splitlines()
        if not line.startswith(("loss: ", "decoding: ", "step"))
    ]
    return "\n".join(kept)


def short_exam(facts: int, sums: int) -> str:
    """The beginning of a program that runs a script's main with so many questions in its examination."""
    return f"""
import importlib, sys
from data.tiny_world import World
from run import arguments, jobs, plug, show  # so that importing is not watched
from run.cli import run_cli
facts, sums = World.fact_items, World.sum_items
World.fact_items = lambda world, split, count=None, times=1: facts(world, split, {facts})
World.sum_items = lambda world, split, times=1: sums(world, split)[:{sums}]
sys.argv = sys.argv[1:]
main = importlib.import_module(sys.argv[0].removesuffix(".py")).main
"""


QUICKLY = short_exam(facts=24, sums=8) + "run_cli(main)\n"
ALL_REFUSED = """
import sys
from run.cli import run_cli
from sample import main
for flag in sys.argv[1:]:
    sys.argv = ["sample.py", flag]
    try:
        run_cli(main)
    except SystemExit as ended:
        assert ended.code == 2
"""
TRAIN = [
    "-c",
    QUICKLY,
    *"train.py --base --value --no-full --steps 20 --batch-size 8".split(),
]


def test_without_fast_and_beyond_everything_that_the_paper_says_remains(home, tmp_path):
    """The same metrics, to the digit, with them and without."""
    results = {}
    for name, left_out, flags in (("with", [], []), ("without", ["fast", "beyond"], ["--plain"])):
        house = copy_of_the_house(tmp_path / name, *left_out)
        assert (house / "fast").exists() == (house / "beyond").exists() == (not left_out)
        shutil.copytree(home / "out", house / "out", ignore=shutil.ignore_patterns("value-*"))
        results[name] = said(succeed(house, *TRAIN, *flags)) + said(
            succeed(house, "-c", QUICKLY, "sample.py", *flags)
        )
        if left_out:
            done = run(house, "-c", ALL_REFUSED, "--explain", "--speculate=2", "--web")
            refusals = done.stderr.splitlines()
            assert done.returncode == 0 and len(refusals) == 3
            for refusal in refusals:
                assert "which is not there" in refusal
            done = run(house, *TRAIN, "--fast", "--out", "x")
            assert done.returncode == 2 and "there is no folder fast/" in done.stderr
    assert results["with"] == results["without"] and "base+value" in results["with"]


CALLED = (
    short_exam(facts=6, sums=2)
    + """
calls = set()
sys.setprofile(lambda frame, event, _: event == "call" and calls.add(frame.f_code))
run_cli(main)
sys.setprofile(None)
for code in calls:
    print("called", code.co_filename.rpartition("/")[2], code.co_qualname)
"""
)


CALLED_BEFORE = (
    short_exam(facts=6, sums=2)
    + """
import torch, sample
class Reached(BaseException): pass
def stop(*_, **__):
    sys.setprofile(None)
    raise Reached
torch.Tensor.backward = sample.Guided.step = stop
calls = set()
sys.setprofile(lambda frame, event, _: event == "call" and calls.add(frame.f_code))
try:
    main()
except Reached:
    pass
ours = [code for code in calls if code.co_filename.startswith(ROOT) and code.co_flags & 2]
ours = [code for code in ours if "site-packages" not in code.co_filename]  # of README's .venv
print("called", len([code for code in ours if not code.co_name.startswith("<")]))
"""
)


@pytest.mark.parametrize(
    "command, most",
    [
        ("train.py --base --value --no-full --out out/mine", 171),
        ("sample.py --base tiny-s --prompt Hello", 115),
    ],
)
def test_few_functions_run_before_the_first_gradient_and_the_first_guided_step(
    command, most, home, tmp_path
):
    """Functions of ours, each counted once, without comprehensions and the bodies of classes."""
    shutil.copytree(home / "out", tmp_path / "out")
    program = f"import sys\nROOT = {str(ROOT)!r}\nsys.path.insert(0, ROOT)\n" + CALLED_BEFORE
    output = succeed(tmp_path, "-c", program, *command.split())
    assert 20 < int(output.rpartition("called ")[2]) <= most


def table_of_the_readme() -> list[tuple[str, str, str]]:
    """File, function and command of each pointer in the README's table: its cells are the paper, the code, the command."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition("## Where the paper is in the code")[2].partition("\n## ")[0]
    found = []
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) != 3 or cells[0].startswith(("the paper", "---")):
            continue
        command = re.search(r"`([^`]*)`", cells[2])[1]
        file = ""
        for name in re.findall(r"`([^`]*)`", cells[1]):
            if name.endswith(".py"):
                file = name
            else:
                found.append((file, name, command))
    return found


COMMANDS = list(dict.fromkeys(command for *_, command in table_of_the_readme()))
QUICK = ["python train.py", "python sample.py"]  # the others take three minutes together


@pytest.mark.skipif(
    sys.version_info < (3, 11), reason="qualified names of functions take Python 3.11"
)
@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=[] if command in QUICK else pytest.mark.slow)
        for command in COMMANDS
    ],
)
def test_every_function_that_the_readme_names_is_called_by_the_command_it_names(
    command, home, tmp_path
):
    assert set(QUICK) < set(COMMANDS)
    house = copy_of_the_house(tmp_path)
    shutil.copytree(home / "out", house / "out")
    arguments = command.removeprefix("python ").split()
    few = "--steps 2 --batch-size 2".split()
    for name, flags in (
        ("tiny-l", "--base tiny-l"),
        ("tiny-b-m", "--base tiny-b-m"),
        ("full-tiny-s", "--full"),
    ):
        if name in command:
            succeed(house, "-c", CALLED, "train.py", *flags.split(), *few)
    if "--vocab-map" in arguments:
        makes = next(other for other in COMMANDS if "vocab_map.py" in other)
        script, *flags = makes.removeprefix("python ").split()
        succeed(house, house / script, *flags)
    if arguments[0] == "train.py":
        trains_value = len(arguments) == 1 or "--value" in arguments
        arguments += few + ["--out", "out/mine"] + (["--no-full"] if trains_value else [])
    elif arguments[0] == "sample.py" and "--speculate" not in arguments:
        arguments += ["--max-new-tokens", "4"]
    output = succeed(house, "-c", CALLED, *arguments)
    called = {tuple(line.split()[1:]) for line in output.splitlines() if line.startswith("called ")}
    for file, name, other in table_of_the_readme():
        if other == command:
            assert (file.rpartition("/")[2], name) in called, f"{name} of {file}"


EDITED = """
import torch
from ivl import ValueModel
from model import KVCache, Llama
from sample import Guided
tokens = torch.tensor([[5, 9, 11, 20, 21]])
base = Llama.from_pretrained("out/seed0/tiny-s")
value = ValueModel.from_pretrained("out/seed0/value-residual-tiny-s")
guided = Guided(base, value)
with torch.inference_mode():
    whole = guided.logits(tokens)
    parts = torch.cat([guided.step(part) for part in tokens.split([2, 1, 1, 1], dim=1)], dim=1)
print(*[z[0, -1, 7].item() for z in (whole, parts)])
"""


def test_an_edit_of_a_layer_changes_cached_and_uncached_logits_alike(home, tmp_path):
    house = copy_of_the_house(tmp_path)
    shutil.copytree(home / "out", house / "out")
    before = [float(number) for number in succeed(house, "-c", EDITED).split()]
    source = (house / "model.py").read_text()
    gate = "activation(self.gate_proj(x))"
    assert source.count(gate) == 1
    (house / "model.py").write_text(source.replace(gate, f"torch.tanh({gate})"))
    after = [float(number) for number in succeed(house, "-c", EDITED).split()]
    assert before[0] == pytest.approx(before[1], abs=1e-4) and after[0] == pytest.approx(
        after[1], abs=1e-4
    )
    assert abs(after[0] - before[0]) > 1e-3


# ---- other systems


def test_the_main_job_needs_nothing_that_only_unix_has(home, tmp_path):
    """fcntl and resource are hidden, as on Windows: train and sample."""
    house = copy_of_the_house(tmp_path)
    shutil.copytree(home / "out", house / "out", ignore=shutil.ignore_patterns("value-*"))
    hidden = "import sys\nsys.modules['fcntl'] = sys.modules['resource'] = None\n"
    assert "base+value" in succeed(house, "-c", hidden + TRAIN[1], *TRAIN[2:])
    assert "tiny-s + value" in succeed(
        house, "-c", hidden + QUICKLY, "sample.py", "--prompt", "Hello"
    )


def test_every_main_ends_in_one_line(home, tmp_path):
    """Also those of data/: a mistake, and a reader who leaves."""
    for arguments, message in (
        (["data.tiny_world", "--infinity", "/dev/full/x"], ""),
        ("data.chat absent --tokenizer absent".split(), "absent"),
    ):
        done = run(ROOT, "-m", *arguments)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr, (
            done.stderr
        )
    existing = tmp_path / "mine.jsonl"
    existing.write_text("mine")
    done = run(ROOT, "-m data.tiny_world --infinity", existing)
    assert (
        done.returncode == 2
        and "not what world 0 makes" in done.stderr
        and existing.read_text() == "mine"
    )
    reading, writing = os.pipe()
    os.close(reading)
    data = home / "out/seed0/demonstrations.jsonl"
    tokenizer = home / "out/seed0/tiny-s"
    command = f"-m data.chat {data} --tokenizer {tokenizer} --show 300"
    done = fresh(ROOT, command, stdout=writing)
    os.close(writing)
    assert "Traceback" not in done.stderr and done.returncode in (141, 120), done.stderr


# ---- templates


def test_an_examination_is_in_the_template_of_what_is_examined(home):
    """Questions, ends of turns and choices: who answers rightly in llama-3 has all the points there, none in llama-2."""
    world = World(0)
    tokenizer = world.tokenizer_for("tiny-b-m")
    items = {
        prompt_text(item): item.answer
        for item in world.fact_items("development") + world.sum_items("development")
    }
    prompts = {
        tuple(encode_chat(tokenizer, "llama-3", [("user", question)])[0]): question
        for question in items
    }

    def answer(asked):
        assert all(tuple(prompt) in prompts for prompt in asked)
        return [
            [*tokenizer.encode(items[prompts[tuple(prompt)]]), tokenizer.end_of_turn_id]
            for prompt in asked
        ]

    def score(pairs):
        for context, continuation in pairs:
            text = tokenizer.decode(context + continuation)
            assert text.endswith(tokenizer.decode(continuation)) and context[0] == tokenizer.bos_id
            assert re.search(r"\n\n[A-Z].* \w+\.$", text.rpartition("assistant")[2]), (
                text
            )  # the beginning of an answer, a value
        return [(float(number % CHOICES == 0), True) for number in range(len(pairs))]

    metrics = evaluate(world, tokenizer, answer, score, template="llama-3")
    assert metrics == dict(exact=1.0, know=1.0, ins=1.0, arith=1.0, mc=1.0, fk=1.0)


def test_train_and_sample_examine_in_the_template_of_the_value_network(home, tmp_path, monkeypatch):
    shutil.copytree(
        home / "out", tmp_path / "out", ignore=shutil.ignore_patterns("tiny-b-s")
    )  # another test may have made it
    seen = []
    monkeypatch.setattr(
        show, "evaluate", lambda *arguments: seen.append(arguments[5]) or {"exact": 0.0}
    )
    worked(tmp_path, "train.py --base tiny-b-s --steps 2 --batch-size 2")
    worked(
        tmp_path,
        "train.py --base tiny-b-s --value --no-full --template llama-3 --steps 2 "
        "--batch-size 2 --out other",
    )
    assert seen == ["llama-2", "llama-3", "llama-3"]
    worked(tmp_path, "sample.py --value other")
    assert seen[3:] == ["llama-3", "llama-3"]


@pytest.mark.parametrize("name", EXERCISES)
def test_the_edits_of_the_exercises_fit_the_code(name, tmp_path):
    exercise = EXERCISES[name]
    if exercise.file:
        file = tmp_path / exercise.file
        file.parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / exercise.file, file)
        edited(exercise, tmp_path)
        ast.parse(file.read_text(encoding="utf-8"))
    assert f"\n{name.partition(',')[0]}. **" in (ROOT / "EXERCISES.md").read_text(encoding="utf-8")
