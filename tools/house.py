"""Count what the product is made of, and check which part imports which.

    python tools/house.py           # print the tables; status 1 if an import or a limit is broken

Product means the Python of protos/ (generated files left out), services/, gpu_worker/, kernels/ and
src/octavo/. An import counts wherever it stands: at the top, inside a function, or under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("services", "gpu_worker", "kernels", "protos", "src/octavo/ray")
SCHEDULER_CORE = ("admission", "core", "groups", "kv_cache", "queueing", "requests")  # without clock and sockets
PROTOS = {"admin", "common", "inference", "scheduler", "worker"}

# Which parts of octavo each part may import, besides itself. A proto package is "protos".
ALLOWED: dict[str, set[str]] = {
    "protos": set(),
    "kernels": set(),
    "gpu_worker": {"protos", "kernels", "services.telemetry", "services.vocabulary"},
    "services.telemetry": set(),
    "services.vocabulary": set(),
    "services.common": {"protos"},
    "services.gateway": {
        "protos", "services.batch", "services.common", "services.telemetry", "services.vocabulary",
    },
    "services.scheduler": {"protos", "services.common", "services.telemetry"},
    "services.client": {"protos", "services.common"},
    "services.bench": {"services.client"},
    "services.batch": {"services.common"},
    "services.offline": {"services.batch", "services.client"},
    "services.cli": {
        "protos", "services.batch", "services.bench", "services.client", "services.common", "services.gateway",
        "services.offline", "services.scheduler", "services.telemetry", "gpu_worker", "kernels",
    },
    "ray": {"protos", "services.client", "services.offline"},
}  # fmt: skip

ANYTHING = "*"
# Inside the big parts: which sub-packages, and modules that lie in none, each of them may import.
WALLS: dict[str, dict[str, set[str]]] = {
    "services.gateway": {
        "__main__": {ANYTHING},
        "app": {ANYTHING},
        "authentication": {"security_config"},
        "config": {"mesh", "output", "security_config"},
        "constraints": {"offload"},
        "http": {"authentication", "batches", "config", "offload", "requests", "rpc", "tokenization"},
        "output": {"offload", "tokenization"},
        "requests": {"constraints", "mesh", "offload", "output", "schedulers", "tokenization", "validation"},
        "rpc": {"authentication", "mesh", "requests", "schedulers", "tokenization", "validation"},
        "schedulers": {"offload", "tokenization"},
        "telemetry": {ANYTHING},
        "tokenization": {"offload", "validation"},
    },
    "services.scheduler": {
        "__main__": {ANYTHING},
        "admin": {"config", "engine", "queueing", "requests"},
        "admission": {"config", "groups", "queueing", "requests"},
        "cache_watchers": {"kv_cache"},
        "core": {"admission", "config", "groups", "kv_cache", "queueing", "requests"},
        "engine": {"cache_watchers", "config", "core", "node", "queueing", "telemetry", "workers"},
        "groups": {"config", "kv_cache", "requests"},
        "kv_cache": {"config"},
        "node": {"config", "core", "groups", "workers"},
        "queueing": {"config", "groups", "requests"},
        "requests": {"config", "kv_cache"},
        "server": {"engine"},
        "telemetry": {"config", "core"},
        "workers": {"config"},
    },
    "gpu_worker": {
        "__main__": {ANYTHING},
        "adapters": {"device_thread", "errors", "loading", "steps"},
        "config": {"quantization"},
        "devices": {
            "devices.cpu",
            "devices.cuda",
            "devices.reference",
            "distributed",
            "errors",
            "ops",
            "sampling",
            "steps",
        },
        "devices.cpu": {"errors", "ops", "quantization"},
        "devices.cuda": {
            "distributed",
            "errors",
            "loading",
            "memory",
            "ops",
            "protocol",
            "quantization",
            "sampling",
            "steps",
        },
        "devices.reference": {"ops", "protocol", "sampling"},
        "distributed": {"config", "engine", "errors", "lifetime", "link", "loading", "ops", "protocol", "steps"},
        "engine": {
            "adapters",
            "config",
            "devices",
            "distributed",
            "errors",
            "loading",
            "ops",
            "protocol",
            "sampling",
            "steps",
        },
        "formats": {"errors"},
        "lifetime": {"config", "errors"},
        "link": {"config", "errors", "protocol"},
        "loading": {
            "config",
            "devices",
            "devices.cpu",
            "errors",
            "formats",
            "memory",
            "models",
            "ops",
            "quantization",
            "sampling",
            "steps",
        },
        "models": {"errors", "formats", "ops", "protocol"},
        "sampling": {"errors", "formats", "ops", "protocol"},
        "steps": {"config", "errors", "memory", "ops", "protocol", "sampling"},
        "telemetry": {ANYTHING},
        "worker": {ANYTHING},
    },
}  # fmt: skip


# Cycles under TYPE_CHECKING or in functions that are still there. No other may come.
KNOWN_CYCLES: list[list[str]] = [
    ["octavo.gpu_worker.steps.batch", "octavo.gpu_worker.steps.pooler"],
    [
        f"octavo.gpu_worker.loading.{name}"
        for name in (
            "decoder_heads",
            "encoder_files",
            "gguf_model",
            "loading",
            "packed_cache",
            "pooling_files",
            "weights",
        )
    ],
]


@dataclass(frozen=True)
class Limit:
    """A number that must not grow, and the one that is wanted."""

    name: str
    value: int
    most: int
    wanted: int


def sources() -> list[Path]:
    """Return the product's Python files, without those that are generated."""
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    return sorted({*files, ROOT / "src/octavo/__init__.py"} - {path for path in files if "_pb2" in path.name})


def module_name(path: Path) -> str:
    """Return the name under which a file is imported."""
    relative = path.relative_to(ROOT)
    for linked in ("src/octavo", "protos/octavo"):
        if relative.is_relative_to(linked):
            relative = relative.relative_to(linked)
    words = ["octavo", *relative.with_suffix("").parts]
    return ".".join(words[:-1] if words[-1] == "__init__" else words)


def part_of(module: str) -> str | None:
    """Return the part that a module belongs to: `octavo.services.client.sync` -> `services.client`."""
    words = module.split(".")
    if words[0] != "octavo" or len(words) == 1 or words[1].startswith("__"):
        return None
    if words[1] in PROTOS:
        return "protos"
    if words[1] == "services" and len(words) > 2 and not words[2].startswith("__"):
        return ".".join(words[1:3])
    return words[1]


@cache
def modules() -> dict[str, Path]:
    """Return all product modules by name."""
    return {module_name(path): path for path in sources()}


def imported_names(tree: ast.AST) -> set[str]:
    """Return the modules that are imported anywhere in a file, and the names out of them as if they were modules."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@cache
def graph(at_load: bool = False) -> dict[str, set[str]]:
    """Return what each module imports of the product. `at_load`: only what is imported when it is loaded."""
    edges = {}
    for module, path in modules().items():
        tree = ast.parse(path.read_text())
        if at_load:
            tree = _WithoutLazyImports().visit(tree)
        edges[module] = {name for name in imported_names(tree) if name in modules()} - {module}
    return edges


class _WithoutLazyImports(ast.NodeTransformer):
    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:  # noqa: ARG002
        return None

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:  # noqa: ARG002
        return None

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if ast.unparse(node.test).endswith("TYPE_CHECKING") else self.generic_visit(node)


def cycles() -> list[list[str]]:
    """Return the groups of modules that import one another in a circle (Tarjan's algorithm)."""
    edges = graph()
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in edges[module]:
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1:
                found.append(sorted(group))

    for module in edges:
        if module not in index:
            visit(module)
    return found


def depth() -> int:
    """Return how many modules the longest chain of imports at load time has."""
    edges = graph(at_load=True)

    @cache
    def below(module: str) -> int:
        return 1 + max((below(other) for other in edges[module] if not module.startswith(other + ".")), default=0)

    return max(map(below, edges))


def forbidden_imports() -> list[str]:
    """Return the imports that `ALLOWED` or `WALLS` does not have, a line each; those of generated modules count."""
    lines = []
    for module, path in modules().items():
        own = part_of(module)
        if own is None or own == "services":
            continue
        if own not in ALLOWED:
            lines.append(f"{path}: belongs to no part of the table")
        names = sorted(imported_names(ast.parse(path.read_text())))
        lines += [line for other in names if (line := _reason(module, own, other))]
    return lines


def _reason(module: str, own: str, other: str) -> str:
    part = part_of(other)
    if part is None or part == "services":
        return ""
    if own != part:
        return "" if part in ALLOWED.get(own, set()) else f"{module} imports {other}: {own} may not import {part}"
    if own not in WALLS or other not in modules():
        return ""
    here, there = _room(module, own), _room(other, part)
    if here == there or not here or not there:
        return ""
    allowed = WALLS[own].get(here, set())
    return "" if there in allowed or ANYTHING in allowed else f"{module} imports {other}: {here} may not import {there}"


def _room(module: str, part: str) -> str:
    """Return what a module is in its part: a sub-package, or itself."""
    words = module.removeprefix(f"octavo.{part}").lstrip(".").split(".")
    names = [word for depth, word in enumerate(words) if _is_package(part, words[: depth + 1])]
    return ".".join(names) or words[0]


def _is_package(part: str, words: list[str]) -> bool:
    path = modules().get(".".join(["octavo", part, *words]))
    return path is not None and path.name == "__init__.py"


def limits() -> list[Limit]:
    """Return the counts that may only sink."""
    paths = sources()
    lines = {path: len(path.read_text().splitlines()) for path in paths}
    folders = Counter(path.parent for path in paths if path.name not in ("__init__.py", "__main__.py"))
    core = [path for path in paths if path.parent in {ROOT / "services/scheduler" / name for name in SCHEDULER_CORE}]
    return [
        Limit("lines of product Python", sum(lines.values()), 64_700, 40_000),
        Limit("files of product Python", len(paths), 410, 260),
        Limit("modules in the largest folder", max(folders.values()), 28, 25),
        Limit("depth of imports", depth(), 17, 14),
        Limit("lines of the scheduler's core", sum(lines[path] for path in core), 6_290, 4_000),
        Limit("files of the scheduler's core", sum(path.name != "__init__.py" for path in core), 34, 30),
    ]


def main() -> int:
    """Print the tables."""
    print(f"{'part':22}{'files':>7}{'lines':>8}  may import")
    sizes: dict[str, list[int]] = {}
    for module, path in modules().items():
        size = sizes.setdefault(part_of(module) or "octavo", [0, 0])
        size[0] += 1
        size[1] += len(path.read_text().splitlines())
    for part, (num_files, num_lines) in sorted(sizes.items()):
        print(f"{part:22}{num_files:7}{num_lines:8}  {' '.join(sorted(ALLOWED.get(part, ())))}")
    print(f"\n{'':32}{'now':>8}{'limit':>8}{'wanted':>8}")
    broken = []
    for limit in limits():
        print(f"{limit.name:32}{limit.value:8}{limit.most:8}{limit.wanted:8}")
        if limit.value > limit.most:
            broken.append(f"{limit.name}: {limit.value} is more than {limit.most}")
    broken += forbidden_imports()
    broken += ["a cycle of imports: " + " ".join(group) for group in cycles() if group not in KNOWN_CYCLES]
    for line in broken:
        print(line, file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
