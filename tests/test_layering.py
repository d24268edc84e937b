"""The layout is held: who may import whom, how long things are, what is never used."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import relax

ROOT = Path(relax.__file__).parent.parent
FILES = sorted((ROOT / "relax").rglob("*.py"))
SCRIPTS = sorted(ROOT.glob("run_*.py"))

# From the top down. A module imports what stands below its own line, and its own folder.
LAYERS = """
tools
engine
callbacks serving
trainers
sampling
data models losses checkpoint
rewards monitor parallel
config optimizers
files
errors
"""
FLOORS = ("__main__" + LAYERS).split("\n")[::-1]
WITHOUT_JAX = ("relax.errors", "relax.files", "relax.config", "relax.data", "relax.rewards")
WITHOUT_JAX += ("relax.monitor",)  # and relax.__main__, until a command runs: see test_cli


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): ast.parse(file.read_text(encoding="utf-8")) for file in FILES}


def imports(tree: ast.Module) -> set[str]:
    """Full names of what a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide the layer"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def own(names: set[str]) -> set[str]:
    return {name for name in names if name in MODULES}


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def folder(name: str) -> str:
    return name.split(".")[1]


def floor(name: str) -> int:
    return next(n for n, line in enumerate(FLOORS) if folder(name) in line.split())


def test_a_module_imports_lower_layers_and_its_own_folder_only():
    for name, tree in MODULES.items():
        for other in own(imports(tree)) - {"relax"}:
            allowed = folder(other) == folder(name) or floor(other) < floor(name)
            assert allowed, f"{name} imports {other}"


def test_there_are_at_most_ten_layers_and_three_modules_at_the_root():
    assert len(LAYERS.split("\n")) - 2 <= 10
    at_root = {file.name for file in (ROOT / "relax").glob("*.py")} - {"__init__.py", "__main__.py"}
    assert len(at_root) <= 3, at_root


def test_no_private_module_of_a_dependency_is_named():
    for file in FILES:
        assert "_src" not in file.read_text(encoding="utf-8"), file


def test_algorithms_never_import_each_other():
    """But for PPO and GRPO, which stand on the RL trainer."""
    algorithms = [n for n in MODULES if n.endswith("_trainer") and n != "relax.trainers.rl_trainer"]
    assert "relax.trainers.sft_trainer" in algorithms
    for name in algorithms:
        assert not own(imports(MODULES[name])) & set(algorithms), name


def test_there_are_no_import_cycles():
    """A package's `__init__` counts as what it imports from, as it holds nothing itself."""
    packages = {name_of(file) for file in FILES if file.name == "__init__.py"}
    graph = {n: own(imports(tree)) - packages for n, tree in MODULES.items() if n not in packages}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_what_runs_before_jax_never_imports_it_not_even_within_a_function():
    heavy = {"jax", "jaxlib", "flax", "optax", "orbax"}
    light = [name for name in MODULES if any(within(name, package) for package in WITHOUT_JAX)]
    for name in light:
        used = imports(MODULES[name])
        assert not {module.split(".")[0] for module in used} & heavy, name
        assert own(used) - {"relax"} <= set(light), f"{name} imports {own(used) - set(light)}"


def test_configuration_and_data_are_imported_without_jax_and_the_configuration_without_fire():
    for modules, absent in (
        (
            "relax.config, relax.config.cli, relax.files",
            ("jax", "numpy", "fire", "transformers"),
        ),
        ("relax.data", ("jax", "transformers", "torch", "pyarrow")),
    ):
        code = f"import sys, {modules}; print(*[m for m in {absent} if m in sys.modules])"
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert run.stdout.split() == [], modules


def test_nothing_is_unpickled_evaluated_or_computed_with_torch():
    for name, tree in MODULES.items():
        used = {module.split(".")[0] for module in imports(tree)}
        assert not used & {"pickle", "cloudpickle", "dill", "marshal", "shelve", "torch"}, name
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                assert getattr(node.func, "id", None) not in ("eval", "exec", "__import__"), name
            if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "trust_remote_code"):
                assert isinstance(node.value, ast.Constant) and node.value.value is False, name


def test_a_type_error_is_ignored_with_its_code_and_the_reason_only():
    reasoned = re.compile(r"# type: ignore\[[a-z-]+\]  # \w")
    lines = [(f, line) for f in FILES for line in f.read_text(encoding="utf-8").splitlines()]
    asked = [(f.name, line) for f, line in lines if "type: ignore" in line]
    assert [found for found in asked if not reasoned.search(found[1])] == []


def test_files_have_at_most_400_lines_and_functions_60():
    for file in FILES + SCRIPTS:
        text = file.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 400, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                # A public function's arguments and docstring are as long as it takes.
                body = node.body[ast.get_docstring(node) is not None :]
                lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
                assert lines <= 60, f"{file}: {node.name} has {lines} lines"
