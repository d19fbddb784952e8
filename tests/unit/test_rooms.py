"""What runs where: the rooms of the package, kept apart by what they may import."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORBIDDEN = {
    # Different processes: what they share stands at the root, what they tell each other in channel.py.
    "pad_vllm/frontend": ("pad_vllm.worker",),
    "pad_vllm/worker": ("pad_vllm.frontend",),
    # The reward model knows no rule and no runner; of the kernels only the name of what it hands them.
    "pad_vllm/reward": ("pad_vllm.worker", "pad_vllm.frontend", "pad_vllm.kernels"),
    "pad_vllm/training": ("pad_vllm.worker", "pad_vllm.frontend"),
}
EXCEPTIONS = {"pad_vllm/reward": ("pad_vllm.kernels.types",)}
IN_SEVERAL_FILES = {
    "logger": "a module's logger",
    "main": "what a script runs",
    "run add_arguments": "a command's",
    "install": "puts a room's patches into vLLM",
    "PARAMETERS": "of vLLM's functions, as pad-vllm calls them",
    "guide_ mix_contexts undo_controls score_groups keep_shares": "a part of the step, in PyTorch and in Triton",
    "bound_beta": "the strength that keeps to a bound, in PyTorch and in Triton",
    "BLOCK BLOCK_D BLOCK_M COUNTS ROW_POINTERS WARPS SCORE_WARPS REWEIGHT_WARPS": "a launch's, each for its kernels",
    "Cell": "a user and a prompt, as the harness asks for them",
    "prompting": "the method of the tables that has the preference in the prompt",
    "BETAS TOP_K ROWS": "what a benchmark varies",
    "write verdicts fingerprint": "a table of methods: its files, its sentences, the hash of all that decides it",
    "FULL SMALL": "sizes of what is published, and of a quick run",
    # The demo's and the synthetic ones:
    "Recipe TINY build build_base PROMPT_TEMPLATE PACKAGE SHA256": "models, and what they are made from",
    "DIMENSIONS USERS preference": "what users want of answers, and how they say it",
    "ENGINE start generate MAX_TOKENS TEMPERATURE": "an engine in a process of ours, and its answers",
}
"""Names that stand in several files, and the one concept that they are."""
MAX_LINES = 400
MAX_FUNCTION_LINES = 80
MAX_ATTRIBUTES = 12


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(path: Path) -> Iterator[tuple[str, str]]:
    """Module, and ``module.name``, of what a file imports: inside functions too, and for types alone."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            head = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*head, *([node.module] if node.module else [])])
            yield from ((module, f"{module}.{alias.name}") for alias in node.names)


def imports(path: Path) -> set[str]:
    return {name for both in imported(path) for name in both}


def is_in(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


@pytest.mark.parametrize("room", FORBIDDEN)
def test_rooms_are_apart(room):
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(room)
        for name in imports(path)
        if any(is_in(name, module) for module in FORBIDDEN[room])
        and not any(is_in(name, module) for module in EXCEPTIONS.get(room, ()))
    ]
    assert sources(room)
    assert found == []


def test_kernels_import_torch_and_triton_alone():
    allowed = (
        "torch",
        "triton",
        "kernels",
        "__future__",
        "collections",
        "concurrent",
        "functools",
        "math",
        "os",
        "typing",
    )
    found = {name for path in sources("kernels") for name in imports(path)}
    assert {"torch", "triton"} <= found
    assert [name for name in found if name.partition(".")[0] not in allowed] == []


def test_no_module_knows_itself_by_way_of_others():
    """Imports have no circle: at the top of modules, inside functions, or for types alone."""
    names = {module_name(path): path for path in sources("pad_vllm") + sources("kernels") + sources("benchmarks")}
    graph = {name: {module_of(*found, names) for found in imported(path)} for name, path in names.items()}
    finished: set[str] = set()
    circles: list[str] = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            return circles.append(" -> ".join([*path[path.index(name) :], name]))
        if name not in finished:
            for other in sorted(graph[name] & names.keys() - {name}):
                visit(other, (*path, name))
            finished.add(name)
        return None

    for name in graph:
        visit(name, ())
    assert len(finished) == len(names) > 100
    assert circles == []


def module_name(path: Path) -> str:
    """As it is imported: ``kernels/`` is installed within the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("pad_vllm", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def module_of(module: str, name: str, names: dict[str, Path]) -> str:
    """Where ``module.name`` is: a module itself, or in one."""
    module, name = (f"pad_vllm.{n}" if is_in(n, "kernels") else n for n in (module, name))
    return name if name in names else module


def test_a_name_is_one_concept():
    files: dict[str, set[Path]] = {}
    for path in sources("pad_vllm") + sources("kernels") + sources("benchmarks"):
        for name in top_level_names(parsed(path)):
            files.setdefault(name, set()).add(path)
    found = {name for name, paths in files.items() if len(paths) > 1 and not name.startswith("_")}
    assert sorted(found) == sorted(name for names in IN_SEVERAL_FILES for name in names.split())


def top_level_names(module: ast.Module) -> Iterator[str]:
    """Of functions, classes and variables."""
    for node in module.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name))


@pytest.mark.parametrize("folder", ["pad_vllm/worker"])
def test_classes_can_be_taken_in(folder):
    found = {
        f"{path.relative_to(ROOT)}: {node.name}": attributes(node)
        for path in sources(folder)
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ClassDef)
    }
    assert len(found) > 20
    assert {name: sorted(has) for name, has in found.items() if len(has) > MAX_ATTRIBUTES} == {}


def attributes(node: ast.ClassDef) -> set[str]:
    """What a class's instances are given: fields, and what methods set on ``self``."""
    fields = {
        item.target.id for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }
    return fields | {
        inner.attr
        for inner in ast.walk(node)
        if isinstance(inner, ast.Attribute)
        and isinstance(inner.ctx, ast.Store)
        and isinstance(inner.value, ast.Name)
        and inner.value.id == "self"
    }


@pytest.mark.parametrize("folder", ["pad_vllm", "kernels"])
def test_files_and_functions_can_be_taken_in(folder):
    long = [f"{p.relative_to(ROOT)}" for p in sources(folder) if len(p.read_text().splitlines()) > MAX_LINES]
    functions = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in sources(folder)
        for node in ast.walk(parsed(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    ]
    assert (long, functions) == ([], [])
