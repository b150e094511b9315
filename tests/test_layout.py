"""The layout as data: who may import whom, and what no file may do."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Each module may import from the lines above its own, and from modules before it on its line.
ORDER = """
    errors files console strict masking limits tables
    curation.text_files curation.rows data.messages
    curation.rated_rows curation.ratings curation.decontamination curation.marks curation.report
    data.pairs data.pair_formats data.answer_formats data.formats data.columns
    curation.curate curation.records
    data.sources data.preferences data.oddities curation.command
    data.tokenizer data.special_tokens data.token_arrays data.template data.tokenization
    data.planning data.packing data.dataset
    kernels
    model.intervals
    model.attention model.hf_config model.rope model.mistral model.host_copies
    model.hub model.weights model.lora model.peft
    objective.losses objective.logprobs objective.loss objective.rounding
    objective.reference objective.turns objective.cache_files objective.reference_cache
    engine.compilation engine.rendezvous engine.distributed engine.optim engine.flops engine.metrics
    engine.step_tokens engine.sinks engine.log engine.pair_records engine.signals engine.lock
    engine.host_memory engine.checkpoint engine.best engine.saver engine.history engine.profiling
    engine.warmup
    config
    generate.prompts generate.decoding generate.answering generate.samples generate.result
    models build resume run_folder
    evals
    look
    feedback.responses feedback.rubric feedback.server feedback.record feedback
    dryrun
    card
    rounds demo
    final start
    train eval
"""
RANKS = {
    name: (line, place)
    for line, names in enumerate(ORDER.split("\n"))
    for place, name in enumerate(names.split())
}
# All others take plain arguments.
READ_CONFIG = (
    "config",
    "evals",
    "dryrun",
    "card",
    "generate",
    "models",
    "build",
    "resume",
    "run_folder",
    "final",
    "start",
    "train",
    "eval",
)

SOURCES = sorted([*ROOT.glob("notus/**/*.py"), *ROOT.glob("kernels/*.py"), *ROOT.glob("*.py")])
SOURCES = [path for path in SOURCES if path.name not in ("setup.py", "__main__.py")]


def module_name(path: Path) -> str:
    """The dotted name without the leading notus: "data.planning", "kernels.reference", "train"."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "notus" else parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): path for path in SOURCES}


def place(module: str) -> tuple[int, int]:
    """Where `module`, or else the folder that it is in, stands in ORDER."""
    return RANKS.get(module) or RANKS[module.split(".")[0]]


def imports(path: Path, top: bool = False) -> Iterator[str]:
    """All that a file imports, wherever in it or only at its top: dotted names of modules."""
    tree = ast.parse(path.read_text())
    for node in tree.body if top else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def our_imports(module: str, top: bool = False) -> set[str]:
    """The project's own modules that `module` imports."""
    names = {name.removeprefix("notus.") for name in imports(MODULES[module], top)}
    return {name for name in names & MODULES.keys() if MODULES[name].name != "__init__.py"}


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_imports_go_one_way(module):
    if MODULES[module].name == "__init__.py":
        assert not list(imports(MODULES[module]))
        return
    for other in our_imports(module):
        same_folder = other.split(".")[0] == module.split(".")[0] and place(other) == place(module)
        assert same_folder or place(other) < place(module), f"{module} imports {other}"
    if module.split(".")[0] not in READ_CONFIG:
        assert "config" not in our_imports(module)


def test_nothing_imports_the_scripts():
    for module in MODULES:
        assert not our_imports(module) & {"train", "eval"} - {module}, module


def test_the_trainer_loads_only_the_trainer():
    """The rooms around it are imported where they are called."""
    waiting, seen = ["train"], set()
    while waiting:
        module = waiting.pop()
        seen.add(module)
        waiting += our_imports(module, top=True) - seen
    rooms = {module.split(".")[0] for module in seen}
    assert {"start", "engine", "data"} <= rooms
    assert not rooms & {"evals", "look", "feedback", "dryrun", "card", "demo"}


def test_every_module_has_a_place():
    for module in MODULES:
        if module and MODULES[module].name != "__init__.py":
            assert place(module), module


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name))
def test_every_module_can_be_imported(module):
    name = module if module in ("train", "eval") else f"notus.{module}"
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:  # Triton exists for Linux only, matplotlib is an extra
        assert error.name in ("triton", "matplotlib"), error


def test_kernels_is_a_link_and_no_package():
    """A top-level package `kernels` would shadow Hugging Face's, which transformers probes for.

    `python train.py` puts the repository first on sys.path, so kernels/__init__.py is enough for
    that. As notus.kernels the folder is found from a clone, an editable and a plain install.
    """
    link = ROOT / "notus" / "kernels"
    assert link.is_symlink() and link.readlink() == Path("../kernels")
    assert not (ROOT / "kernels" / "__init__.py").exists()
    for path in SOURCES:
        assert not any(name.split(".")[0] == "kernels" for name in imports(path)), path


def test_no_pickle():
    """Files come from other people: reading one must not run what it says."""
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        names = {name.split(".")[0] for name in imports(path)}
        assert not names & {"pickle", "dill", "joblib", "shelve", "cloudpickle"}, path
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not calls & {"torch.load", "torch.save", "np.save", "np.load"}, path


def test_each_folder_lists_its_files():
    """Its `__init__.py` is a docstring with one line for each file, and nothing else."""
    for init in ROOT.glob("notus/*/__init__.py"):
        described = [
            line.split("  ")[0]
            for line in ast.get_docstring(ast.parse(init.read_text())).split("\n")
        ]
        files = sorted(path.stem for path in init.parent.glob("*.py") if path.stem[0] != "_")
        assert sorted(word for word in described if word.isidentifier()) == files, init


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff_has_nothing_to_say(command):
    ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", str(ROOT)]  # may be read-only
    done = subprocess.run(ruff, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
