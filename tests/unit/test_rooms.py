"""What runs where: the rooms of the package, kept apart by what they may import."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORBIDDEN = {
    # Different processes: what they share stands at the root, what they tell each other in channel.py.
    "pad_vllm/frontend": ("pad_vllm.worker",),
    "pad_vllm/worker": ("pad_vllm.frontend",),
    # The reward model knows no rule and no runner.
    "pad_vllm/reward": ("pad_vllm.worker", "pad_vllm.frontend", "pad_vllm.kernels"),
    "pad_vllm/training": ("pad_vllm.worker", "pad_vllm.frontend"),
}
MAX_LINES = 400
MAX_FUNCTION_LINES = 80


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """``module`` and ``module.name`` of what a file imports, inside functions too."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            head = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*head, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def is_in(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


@pytest.mark.parametrize("room", FORBIDDEN)
def test_rooms_are_apart(room):
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(room)
        for name in imports(path)
        if any(is_in(name, module) for module in FORBIDDEN[room])
    ]
    assert sources(room)
    assert found == []


def test_kernels_import_torch_and_triton_alone():
    allowed = ("torch", "triton", "kernels", "__future__", "collections", "functools", "math", "os", "typing")
    found = {name for path in sources("kernels") for name in imports(path)}
    assert {"torch", "triton"} <= found
    assert [name for name in found if name.partition(".")[0] not in allowed] == []


def test_no_module_imports_itself_by_way_of_others():
    """Imports at the top of modules have no circle."""
    graph: dict[str, set[str]] = {}
    names = {module_name(path): path for path in sources("pad_vllm")}
    for name, path in names.items():
        tree = ast.parse(path.read_text())
        top = [node for node in tree.body if isinstance(node, ast.ImportFrom) and not node.level]
        wanted = {str(n.module) for n in top} | {f"{n.module}.{a.name}" for n in top for a in n.names}
        graph[name] = wanted & names.keys() - {name}
    assert len(graph) > 40
    assert circle(graph) is None


def test_no_benchmark_imports_itself_by_way_of_others():
    """Nor by imports for types, or inside functions."""
    names = {module_name(path): path for path in sources("benchmarks")}
    graph = {name: set(imports(path)) & names.keys() - {name} for name, path in names.items()}
    assert "benchmarks.language_bench" in graph["benchmarks.language"]
    assert circle(graph) is None


def circle(graph: dict[str, set[str]]) -> str | None:
    """Modules that import each other, in words."""
    finished: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> str | None:
        if name in path:
            return " -> ".join([*path, name])
        if name not in finished:
            for other in sorted(graph[name]):
                if found := visit(other, (*path, name)):
                    return found
            finished.add(name)
        return None

    return next((found for name in graph if (found := visit(name, ()))), None)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("folder", ["pad_vllm", "kernels"])
def test_files_and_functions_can_be_taken_in(folder):
    long = [f"{p.relative_to(ROOT)}" for p in sources(folder) if len(p.read_text().splitlines()) > MAX_LINES]
    functions = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in sources(folder)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    ]
    assert (long, functions) == ([], [])
