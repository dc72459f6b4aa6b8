"""The rules of CONTRIBUTING.md, "Architecture", read off the sources; each rule is also shown to catch a breach."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "subnet_ft"
KERNELS = ROOT / "kernels" / "subnet_kernels"

_WEIGHTS = {"deltas", "optim", "masks", "checkpoints", "errors"}
# What each part of subnet_ft may import. A new part needs a line here and in CONTRIBUTING.md.
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "processes": {"errors"},
    "environment": {"processes"},
    "digests": set(),
    "recipe": {"errors"},
    "tasks": {"recipe", "errors"},
    "checkpoints": {"errors", "subnet_kernels"},
    "masks": {"checkpoints", "errors", "subnet_kernels"},
    "optim": {"masks", "checkpoints", "errors", "subnet_kernels"},
    "deltas": {"optim", "masks", "checkpoints", "errors", "subnet_kernels"},
    "evidence": {"deltas", "masks", "checkpoints", "tasks", "recipe", "errors", "subnet_kernels"},
    "methods": {"masks", "checkpoints", "recipe", "errors"},
    "training": {*_WEIGHTS, "processes", "methods", "tasks", "recipe", "subnet_kernels"},
    "inputs": {*_WEIGHTS, "processes", "digests", "recipe", "tasks"},
    "stages": {"processes", "masks", "errors"},
    "training_data": {*_WEIGHTS, "inputs", "stages", "tasks", "recipe", "digests", "environment"},
    "base_stage": {*_WEIGHTS, "processes", "inputs", "stages", "digests", "recipe"},
    "delta_stage": {*_WEIGHTS, "processes", "stages"},
    "held_out": {*_WEIGHTS, "methods", "inputs", "training_data", "evidence", "tasks", "recipe"},
    "verification": {
        *_WEIGHTS,
        "inputs",
        "held_out",
        "tasks",
        "recipe",
        "training",
        "evidence",
        "stages",
        "environment",
    },
    "mask_stages": {
        *_WEIGHTS,
        "processes",
        "inputs",
        "recipe",
        "training",
        "stages",
        "verification",
    },
    "trained_runs": {"stages"},
    "evidence_stages": {
        *_WEIGHTS,
        "methods",
        "tasks",
        "digests",
        "recipe",
        "evidence",
        "inputs",
        "stages",
        "trained_runs",
        "training",
        "verification",
    },
    "run_report": {
        *_WEIGHTS,
        "delta_stage",
        "evidence_stages",
        "trained_runs",
        "inputs",
        "recipe",
        "training",
        "evidence",
        "stages",
        "verification",
    },
    "pipeline": {
        *_WEIGHTS,
        "processes",
        "mask_stages",
        "trained_runs",
        "evidence_stages",
        "run_report",
        "methods",
        "tasks",
        "recipe",
        "training",
        "evidence",
        "stages",
        "environment",
        "verification",
        "digests",
        "inputs",
        "training_data",
        "base_stage",
        "delta_stage",
        "held_out",
    },
    "comparison": {
        *_WEIGHTS,
        "methods",
        "recipe",
        "evidence",
        "stages",
        "verification",
        "pipeline",
    },
    "studies": {
        *_WEIGHTS,
        "recipe",
        "digests",
        "evidence",
        "inputs",
        "stages",
        "training",
        "verification",
        "pipeline",
    },
    "bench": {*_WEIGHTS, "training", "environment", "subnet_kernels"},
    "plan": {*_WEIGHTS, "methods", "tasks", "recipe", "training", "bench", "subnet_kernels"},
    "cli": {
        *_WEIGHTS,
        "processes",
        "methods",
        "tasks",
        "recipe",
        "training",
        "evidence",
        "stages",
        "environment",
        "verification",
        "inputs",
        "held_out",
        "pipeline",
        "comparison",
        "studies",
        "bench",
        "plan",
    },
    "__main__": {"cli"},
    "benchmarks": {"subnet_kernels"},  # kernels/benchmarks, which is not packaged
}
KERNEL_IMPORTS = {"torch", "triton", "numba", "llvmlite", "numpy", "subnet_kernels", *sys.stdlib_module_names}
LONGEST_FILE = 350
# Families of models, and what else has one of their names in it.
FAMILIES = re.compile(r"llama|qwen|gemma|phi.?3|olmo|neox|pythia|deepseek|mistral|mixtral|granite", re.IGNORECASE)
NO_FAMILIES = re.compile(r"tiny:\w+|llama[-_]cpp[-_]python")
HEAVY = {"torch", "transformers", "triton", "numba", "trl", "datasets", "matplotlib"}
STARTS = {
    "import subnet_ft": "import subnet_ft",
    "subnet-ft --help": "from subnet_ft.cli import main\nsys.argv[1:] = ['--help']\nsys.exit(main())",
}


def _sources() -> list[Path]:
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py"), ROOT / "setup.py"]
    return sorted(path for path in files if "__pycache__" not in path.parts)


def _module(path: Path) -> str:
    """Return the dotted name of a source file, `subnet_ft.masks.file`; a package's own file keeps `__init__`."""
    for source_root in (ROOT / "kernels", ROOT):
        if path.is_relative_to(source_root):
            return ".".join(path.relative_to(source_root).with_suffix("").parts)
    raise AssertionError(path)


def _imports(tree: ast.AST, module: str) -> Iterator[str]:
    """Yield the absolute dotted name of everything `module` imports or takes from `subnet_ft`, wherever in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "subnet_ft":
            yield f"subnet_ft.{node.attr}"
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _part(name: str) -> str:
    """Return the part of the project that a dotted name belongs to, or else its top-level package."""
    top, _, rest = name.partition(".")
    if top != "subnet_ft":
        return top
    return rest.partition(".")[0] or "__init__"


def wrong_arrows(source: str, module: str) -> list[str]:
    """Return the imports of `module` that its line in `ARROWS` does not allow."""
    part = _part(module)
    names = set(_imports(ast.parse(source), module)) - {"subnet_ft", "subnet_ft.__version__"}
    if part == "subnet_kernels":
        return sorted(name for name in names if _part(name) not in KERNEL_IMPORTS)
    if part == "__init__":
        return []
    ours = {name for name in names if name.split(".")[0] in {"subnet_ft", "subnet_kernels"}}
    return sorted(name for name in ours if _part(name) not in ARROWS.get(part, set()) | {part})


def foreign_trl(source: str, module: str) -> list[str]:
    """Return imports of TRL outside `subnet_ft/training`."""
    if _part(module) == "training":
        return []
    return sorted(name for name in _imports(ast.parse(source), module) if _part(name) == "trl")


def prints(source: str, module: str) -> list[str]:
    """Return the lines of library code that print; the command line and benchmarks may."""
    if _part(module) in {"cli", "benchmarks"}:
        return []
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return [f"line {call.lineno}" for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


def unpickling(source: str, module: str) -> list[str]:
    """Return what could run a stranger's code while reading a file."""
    unsafe = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    tree = ast.parse(source)
    # The error of a refused file may be caught by its name.
    found = [name for name in _imports(tree, module) if _part(name) in unsafe and name != "pickle.UnpicklingError"]
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        callee = ast.unparse(call.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if callee == "torch.load" and keywords.get("weights_only") != "True":
            found.append(f"line {call.lineno}: torch.load without weights_only=True")
        if keywords.get("allow_pickle", "False") != "False" or callee in {"yaml.unsafe_load", "yaml.full_load"}:
            found.append(f"line {call.lineno}: {callee}")
    return found


def special_cases(source: str, module: str) -> list[str]:
    """Return code that names a family of models, so that one could be treated unlike the others; text may name them."""
    if module == "subnet_ft.checkpoints.tiny":
        return []
    tree = ast.parse(source)
    texts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.expr_context) or id(node) in texts:
            continue
        words = [value for _, value in ast.iter_fields(node) if isinstance(value, str)]
        found += [word for word in words if FAMILIES.search(NO_FAMILIES.sub("", word))]
    return found


def too_long(source: str, module: str) -> list[str]:
    """Return the length of a file that has grown past one job."""
    lines = len(source.splitlines())
    return [f"{lines} lines"] if lines > LONGEST_FILE else []


RULES = (wrong_arrows, foreign_trl, prints, unpickling, special_cases, too_long)
BREACHES = {
    "an import against the arrows": (wrong_arrows, "subnet_ft.masks.mask", "from subnet_ft.optim.state import State"),
    "the same, relative": (wrong_arrows, "subnet_ft.masks.mask", "from ..training import restrict"),
    "the same, through the top": (wrong_arrows, "subnet_ft.masks.mask", "import subnet_ft\nsubnet_ft.restrict(x)"),
    "a part without arrows": (wrong_arrows, "subnet_ft.cli", "from subnet_ft.utils import flatten"),
    "a kernel that knows the package": (wrong_arrows, "subnet_kernels.ops", "from subnet_ft.errors import MaskError"),
    "TRL outside training": (foreign_trl, "subnet_ft.pipeline", "def f():\n    from trl import GRPOConfig"),
    "a print in the library": (prints, "subnet_ft.pipeline", "print('done')"),
    "an import of pickle": (unpickling, "subnet_ft.masks.file", "import pickle"),
    "an unsafe torch.load": (unpickling, "subnet_ft.masks.file", "torch.load(path, weights_only=False)"),
    "a case for one family": (special_cases, "subnet_ft.masks.mask", "if config.model_type == 'qwen2':\n    skip()"),
    "the same, by class": (special_cases, "subnet_ft.optim.base", "from transformers import Gemma2Config"),
    "the same, by layer": (special_cases, "subnet_ft.checkpoints.models", "norm = model.gpt_neox.final_layer_norm"),
    "a file with two jobs": (too_long, "subnet_ft.pipeline", "x = 1\n" * (LONGEST_FILE + 1)),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_sources_have_none_of(rule: Callable[[str, str], list[str]]) -> None:
    found = {_module(path): rule(path.read_text(encoding="utf-8"), _module(path)) for path in _sources()}
    assert {module: breaches for module, breaches in found.items() if breaches} == {}


@pytest.mark.parametrize("breach", BREACHES)
def test_rules_catch(breach: str) -> None:
    rule, module, source = BREACHES[breach]
    assert rule(source, module)


def test_arrows_name_every_part_and_point_one_way() -> None:
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or list(path.glob("*.py"))}
    assert parts - {"__init__"} <= set(ARROWS)
    order = list(ARROWS)
    for part, allowed in ARROWS.items():
        assert allowed - {"subnet_kernels"} <= set(order[: order.index(part)]), part


def test_no_folder_becomes_a_module_named_kernels() -> None:
    """transformers imports Hugging Face's package `kernels`; ours must never stand in its way."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "kernels").exists()


@pytest.mark.parametrize("command", STARTS)
def test_start_loads_nothing_heavy(command: str, tmp_path: Path) -> None:
    loaded = f"atexit.register(lambda: print('LOADED', *sorted({HEAVY} & set(sys.modules))))"
    program = f"import atexit, sys\n{loaded}\n{STARTS[command]}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].strip() == "LOADED"


def test_version_is_the_same_everywhere() -> None:
    import subnet_ft

    assert f"\nversion: {subnet_ft.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## [Unreleased] {subnet_ft.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
