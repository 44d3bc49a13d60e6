"""Which file may know which, read from the source without running it, and a few habits that a reader relies on."""

from __future__ import annotations

import ast
import importlib
import inspect
import statistics
from pathlib import Path

import vqdist

ROOT = Path(vqdist.__file__).parent
PATHS = {
    ".".join(["vqdist", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
TREES = {module: ast.parse(path.read_text()) for module, path in PATHS.items()}

# What each part may import of vqdist, besides itself; `cli -> trainers -> {...} -> leaves`.
LEAVES = {
    *("vqdist.errors", "vqdist.files", "vqdist.options", "vqdist.parts", "vqdist.registries", "vqdist.storage"),
    *("vqdist.classes", "vqdist.draw_options", "vqdist.locations", "vqdist.sizes", "vqdist.version"),
    *("vqdist.importing", "vqdist.names", "vqdist.conventions", "vqdist.extractor_names", "vqdist.precision"),
}
PARTS = {
    "vqdist.errors": set(),
    "vqdist.files": {"vqdist.errors"},
    "vqdist.storage": set(),
    "vqdist.version": set(),
    "vqdist.names": {"vqdist.errors"},
    "vqdist.conventions": {"vqdist.names"},
    "vqdist.importing": {"vqdist.errors", "vqdist.names"},
    "vqdist.parts": {"vqdist.errors", "vqdist.importing", "vqdist.names"},
    "vqdist.registries": {"vqdist.parts"},
    "vqdist.classes": {"vqdist.errors"},
    "vqdist.sizes": {"vqdist.errors", "vqdist.options"},
    "vqdist.draw_options": {"vqdist.errors"},
    "vqdist.extractor_names": {"vqdist.errors"},
    "vqdist.locations": {"vqdist.errors", "vqdist.files"},
    "vqdist.protocol": {"vqdist.errors", "vqdist.files", "vqdist.sizes", "vqdist.version"},
    "vqdist.declared": set(),
    "vqdist.shipped": set(),
    "vqdist.options": {"vqdist.errors"},
    "vqdist.seeding": LEAVES,
    "vqdist.allocator": set(),
    "vqdist.precision": set(),
    "vqdist.stopping": LEAVES,
    "vqdist.leaving": {*LEAVES, "vqdist.stopping"},
    "vqdist.schedules": {*LEAVES, "vqdist.parts"},
    "vqdist.losses": LEAVES,
    "vqdist.sampling": {*LEAVES, "vqdist.losses"},
    "vqdist.objectives": {*LEAVES, "vqdist.losses", "vqdist.schedules"},
    "vqdist.models": {
        *(*LEAVES, "vqdist.export", "vqdist.losses", "vqdist.objectives", "vqdist.sampling", "vqdist.schedules")
    },
    "vqdist.data": {*LEAVES, "vqdist.seeding", "vqdist.stopping"},
    "vqdist.uncaught": {*LEAVES, "vqdist.stopping"},
    "vqdist.backends": {*LEAVES, "vqdist.leaving", "vqdist.stopping"},
    "vqdist.manifest": LEAVES,
    "vqdist.completion": {*LEAVES, "vqdist.manifest"},
    "vqdist.export": LEAVES,
    "vqdist.checkpoint": {*LEAVES, "vqdist.backends", "vqdist.completion", "vqdist.manifest", "vqdist.ranks"},
    "vqdist.ranks": {*LEAVES, "vqdist.backends"},
    "vqdist.tracking": LEAVES,
    "vqdist.reports": {*LEAVES, "vqdist.protocol"},
    "vqdist.metrics": {*LEAVES, "vqdist.backends", "vqdist.models"},
    "vqdist.evaluation": {*LEAVES, "vqdist.backends", "vqdist.metrics", "vqdist.models", "vqdist.objectives"},
}
PARTS["vqdist.encoding"] = {
    *(*LEAVES, "vqdist.backends", "vqdist.ranks"),
    *("vqdist.data", "vqdist.metrics", "vqdist.models"),
}
PARTS["vqdist.drawing"] = {
    *(*LEAVES, "vqdist.backends", "vqdist.models", "vqdist.ranks", "vqdist.sampling", "vqdist.seeding"),
    "vqdist.tracking",
}
PARTS["vqdist.model_card"] = {*LEAVES, "vqdist.export", "vqdist.protocol"}
PARTS["vqdist.inspection"] = {*LEAVES, "vqdist.export", "vqdist.models", "vqdist.protocol"}

PARTS["vqdist.trainers"] = PARTS.keys() - {"vqdist.version"}
PARTS["vqdist.doctor"] = {*LEAVES, "vqdist", "vqdist.backends"}
PARTS["vqdist.cli"] = set(PARTS)
PARTS["vqdist.__main__"] = {"vqdist.cli"}


def part_of(module: str) -> str:
    """Return the part that a module belongs to: `vqdist.models.vqgan` is of `vqdist.models`."""
    return ".".join(module.split(".")[:2])


def imports_of(tree: ast.AST) -> set[str]:
    """Modules that are imported anywhere, inside functions too. `from a import b` gives a.b where that is a module."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in PATHS else node.module for name in names}
    return found


def modules_below(*parts: str) -> list[str]:
    return [module for module in TREES if part_of(module) in parts]


def parts_known_to(module: str) -> set[str]:
    return {part_of(name) for name in imports_of(TREES[module])}


def test_the_scan_sees_the_package():
    assert {"vqdist.models.vqgan", "vqdist.trainers.base", "vqdist.backends.deepspeed", "vqdist.cli"} <= TREES.keys()
    assert "vqdist.backends" in imports_of(TREES["vqdist.trainers.vqgan"])
    assert "vqdist.losses" in imports_of(TREES["vqdist.models.vqgan"])
    assert "vqdist.doctor" in imports_of(TREES["vqdist.cli"])  # within a function


def test_imports_flow_one_way():
    modules = [module for module in TREES if module != "vqdist"]
    assert sorted({part_of(module) for module in modules} - PARTS.keys()) == [], "say in PARTS what they may import"
    against = {}
    for module in modules:
        part = part_of(module)
        own = {part_of(name) for name in imports_of(TREES[module]) if name.partition(".")[0] == "vqdist"}
        against[module] = sorted(own - {part} - PARTS[part])
    assert offenders(against) == {}


def offenders(found: dict[str, list]) -> dict[str, list]:
    """Return the modules with something found in them, all of them at once."""
    return {module: problems for module, problems in found.items() if problems}


def runs_when_used(tree: ast.AST) -> list[ast.AST]:
    """Return every node of a module but those that only a type checker reads, below `if TYPE_CHECKING:`."""
    found: list[ast.AST] = []
    for node in ast.iter_child_nodes(tree):
        for_types = isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        below = ast.Module(node.orelse, []) if isinstance(node, ast.If) and for_types else node
        found += [below, *runs_when_used(below)]
    return found


def needed_by(tree: ast.AST) -> set[str]:
    """Return the modules of vqdist that a module imports when it runs, at its top or within functions.

    `from vqdist import Name` needs the module that gives the package this name when it is first used.
    """
    found = set()
    for node in runs_when_used(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                lazy = vqdist._PUBLIC.get(alias.name) if node.module == "vqdist" else None
                found.add(name if name in PATHS else lazy or str(node.module))
    return found & PATHS.keys()


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules each of which reaches all others of its group, and a module that needs itself."""
    reached = {module: reachable(graph, module) for module in graph}
    groups = {
        tuple(sorted(other for other in reached[module] if module in reached[other]))
        for module in graph
        if module in reached[module]
    }
    return sorted(map(list, groups))


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    """Return what a module needs, what that needs, and so on; itself only if a path leads back to it."""
    seen: set[str] = set()
    ahead = list(graph[start])
    while ahead:
        module = ahead.pop()
        if module not in seen:
            seen.add(module)
            ahead += graph[module]
    return seen


def test_no_two_modules_need_each_other():
    """Not even within functions. A registry's table of names is no import: who reads it need not know the parts."""
    found = circles({module: needed_by(tree) for module, tree in TREES.items()})
    files = [[str(PATHS[module].relative_to(ROOT.parent)) for module in group] for group in found]
    assert files == [], "these import each other; move what both need into a module that imports neither"


def test_the_search_for_circles_finds_them():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}, "e": {"a"}}) == [["b", "c"], ["d"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    within = "def f():\n    from vqdist.losses import hinge\n    import vqdist.errors"
    assert needed_by(ast.parse(within)) == {"vqdist.losses", "vqdist.errors"}
    assert needed_by(ast.parse("from vqdist import VQGanVAE, losses")) == {"vqdist.models.vqgan", "vqdist.losses"}
    for_types = "if TYPE_CHECKING:\n    import vqdist.losses\nelse:\n    import vqdist.errors"
    assert needed_by(ast.parse(for_types)) == {"vqdist.errors"}


def test_models_and_their_leaves_know_nothing_above_them():
    above = {"vqdist.trainers", "vqdist.backends", "vqdist.data", "vqdist.cli", "vqdist.checkpoint", "vqdist.tracking"}
    below = modules_below("vqdist.models", "vqdist.losses", "vqdist.sampling", "vqdist.schedules")
    assert offenders({module: sorted(parts_known_to(module) & above) for module in below}) == {}


def test_only_backends_speak_to_accelerate_and_deepspeed():
    users = {
        module
        for module, tree in TREES.items()
        if {name.partition(".")[0] for name in imports_of(tree)} & {"accelerate", "deepspeed"}
    }
    assert users and {part_of(module) for module in users} == {"vqdist.backends"}


def test_nobody_but_main_imports_the_command_line():
    users = {module for module, tree in TREES.items() if "vqdist.cli" in imports_of(tree)}
    assert users == {"vqdist.__main__"}


def test_data_does_not_know_trainers_or_models():
    above = {"vqdist.trainers", "vqdist.models"}
    known = {module: sorted(parts_known_to(module) & above) for module in modules_below("vqdist.data")}
    assert offenders(known) == {}


def calls_in(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    """Every call with the dotted name of what is called."""
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_nothing_is_asked_or_unpickled():
    assert offenders({module: asked_or_unpickled(TREES[module]) for module in TREES}) == {}
    assert asked_or_unpickled(ast.parse("import dill\ninput()\ntorch.load(a, weights_only=False)")) == ["dill", 2, 3]


def asked_or_unpickled(tree: ast.AST) -> list[str | int]:
    """Return modules that unpickle, and the lines that ask, run text or load tensors freely."""
    roots = {name.partition(".")[0] for name in imports_of(tree)}
    found: list[str | int] = sorted(roots & {"pickle", "dill", "cloudpickle"})
    for name, call in calls_in(tree):
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        free = name == "torch.load" and options.get("weights_only") != "True"
        found += [call.lineno] if free or name in ("input", "eval", "exec") else []
    return found


def test_models_and_trainers_do_not_print():
    silent = modules_below("vqdist.models", "vqdist.trainers", "vqdist.losses")
    lines = {module: [call.lineno for name, call in calls_in(TREES[module]) if name == "print"] for module in silent}
    assert offenders(lines) == {}


PACKAGES = ["vqdist", "vqdist.backends", "vqdist.cli", "vqdist.data", "vqdist.models", "vqdist.trainers"]


def test_functions_are_short():
    """The median function of a package, constructors aside, has at most 12 lines without its docstring."""
    medians = {}
    for package in PACKAGES:
        folder = ROOT if package == "vqdist" else ROOT / package.partition(".")[2]
        lengths = [
            length_without_docstring(node)
            for module, path in PATHS.items()
            if path.parent == folder
            for node in ast.walk(TREES[module])
            if isinstance(node, ast.FunctionDef) and node.name != "__init__"
        ]
        assert len(lengths) > 10, package
        medians[package] = statistics.median(lengths)
    assert {package: median for package, median in medians.items() if median > 12} == {}


def length_without_docstring(function: ast.FunctionDef) -> int:
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        lines -= function.body[0].end_lineno - function.body[0].lineno + 1
    return lines


def test_what_is_public_is_documented():
    assert offenders({module: undocumented(module) for module in TREES}) == {}


def undocumented(module: str) -> list[str]:
    """Public names of a module without a docstring, of their own or inherited with the contract they fulfil."""
    if not TREES[module].body:  # an empty __init__.py
        return []
    loaded = importlib.import_module(module) if module != "vqdist.__main__" else None
    missing = [] if ast.get_docstring(TREES[module]) else ["the module itself"]
    for name, value in vars(loaded).items() if loaded else ():
        if name.startswith("_") or getattr(value, "__module__", None) != module:
            continue
        if inspect.isfunction(value) and not value.__doc__:
            missing.append(name)
        if inspect.isclass(value):
            missing += [name] * (not value.__doc__)
            missing += [
                f"{name}.{attribute}"
                for attribute, member in vars(value).items()
                if not attribute.startswith("_")
                and (inspect.isroutine(member) or isinstance(member, property | classmethod | staticmethod))
                and not inspect.getdoc(getattr(value, attribute))
            ]
    return missing
