"""Recipes: one folder a model, its ``recipe.toml``, and the user's own code beside it."""

from __future__ import annotations

import ast
import importlib
import sys
import sysconfig
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from pipeline import digest, host, targets
from pipeline.errors import ExportyardError, RecipeError, first_line, unknown
from pipeline.types import Recipe

_import_lock = threading.RLock()
# an environment may lie inside the workspace, and exportyard's own clone is one
_NOT_USERS = (Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("platlib")), Path(__file__).parent)


def read(folder: Path, name: str, known: Iterable[str]) -> Recipe:
    """The recipe ``<folder>/<name>/recipe.toml``.

    Raises:
        UsageError: there is no such recipe; the nearest name is suggested.
        RecipeError: an unknown key, a wrong value, or a name that isn't the folder's.
    """
    if name not in set(known):
        raise unknown("recipe", name, known, where=str(folder))
    path = folder / name / "recipe.toml"
    table = targets.read_toml(path)
    ours = {"folder", "root"} & set(table)
    if ours:
        raise RecipeError(f"`{path}`: unknown key `{min(ours)}`", hint="take it out; a recipe's place is its folder's")
    try:
        recipe = Recipe.model_validate({**table, "folder": path.parent, "root": folder.parent})
    except ValidationError as error:
        raise RecipeError(f"`{path}`: {targets.explain(error)}", hint=targets.hint_for(error, Recipe)) from None
    if recipe.name != name:
        raise RecipeError(f"`{path}` says name = `{recipe.name}`", hint=f"it must be the folder's name, `{name}`")
    return recipe


def is_code(source: str) -> bool:
    """Whether a setting names a callable (``module:name``) and not a file."""
    return ":" in source and "/" not in source


def module_file(recipe: Recipe, source: str) -> Path | None:
    """The workspace file that holds ``module:name``; None for an installed module."""
    return _find(source.partition(":")[0], (recipe.folder, recipe.root))


def _find(module: str, roots: Iterable[Path]) -> Path | None:
    relative = Path(*module.split("."))
    for root in roots:
        for candidate in (root / relative.with_suffix(".py"), root / relative / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None


def code_files(recipe: Recipe, *sources: str | None) -> list[Path]:
    """The workspace files behind ``module:name`` settings: each module and all it imports inside the workspace.

    Imports are read from the source text; one made at run time by a computed name isn't seen.
    """
    found: dict[Path, None] = {}
    for source in sources:
        if source is None or not is_code(source):
            continue
        start = module_file(recipe, source)
        if start is not None:
            _follow(start, recipe, found, set())
    return sorted(found)


def code_digest(recipe: Recipe, *sources: str | None) -> str:
    """Digest of the text and relative names of `code_files`."""
    files = code_files(recipe, *sources)
    return digest.of_json([(path.relative_to(recipe.root).as_posix(), digest.of_file(path)) for path in files])


def code_tools(recipe: Recipe, *sources: str | None) -> dict[str, str]:
    """Versions of the installed packages that the code behind `sources` imports."""
    outside: set[str] = set()
    found: dict[Path, None] = {}
    for source in sources:
        if source is None or not is_code(source):
            continue
        start = module_file(recipe, source)
        if start is None:
            outside.add(source.partition(":")[0].split(".")[0])
        else:
            _follow(start, recipe, found, outside)
    names = {name for module in outside if (name := host.distribution_of(module)) is not None}
    return host.versions(sorted(names))


def _follow(path: Path, recipe: Recipe, found: dict[Path, None], outside: set[str]) -> None:
    if path in found:
        return
    found[path] = None
    for module in _imports(path, recipe.root):
        inside = _find(module, (recipe.folder, recipe.root))
        if inside is not None:
            _follow(inside, recipe, found, outside)
            continue
        top = module.split(".")[0]
        # `from model import CNN` may mean a module `model.CNN`; there is none, and `model` is no package to look up
        if top not in sys.stdlib_module_names and _find(top, (recipe.folder, recipe.root)) is None:
            outside.add(top)


def _imports(path: Path, root: Path) -> Iterator[str]:
    """Dotted names of the modules that the file imports, anywhere in it."""
    try:
        tree = ast.parse(path.read_bytes(), filename=str(path))
    except (SyntaxError, ValueError):
        return  # loading it will say what is wrong
    package = ".".join(path.relative_to(root).parts[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, package)
            if base:
                yield base
            yield from (f"{base}.{alias.name}" if base else alias.name for alias in node.names)


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    parts = package.split(".")[: len(package.split(".")) - node.level + 1]
    return ".".join([*parts, node.module] if node.module else parts)


def resolve(recipe: Recipe, source: str, setting: str) -> Callable[..., Any]:
    """The callable that ``module:name`` names; the recipe's folder is searched first, then the workspace.

    Raises:
        RecipeError: the module can't be imported, or has no such callable.
    """
    module_name, _, attribute = source.partition(":")
    with _import_lock:
        _use_code_of(recipe, source)
        try:
            module = importlib.import_module(module_name)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # see `call`
            raise fault(recipe, f"can't import `{module_name}` (setting `{setting}`)", error) from error
    found = getattr(module, attribute, None)
    if found is None:
        functions = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        close = unknown("name", attribute, functions)
        raise RecipeError(f'`{setting} = "{source}"`: `{module_name}` has no `{attribute}`', hint=close.hint)
    if not callable(found):
        raise RecipeError(f'`{setting} = "{source}"` is a {type(found).__name__}', hint="name a function or a class")
    return found  # type: ignore[no-any-return]  # callable() narrows to a type that mypy can't return


def call(recipe: Recipe, source: str, setting: str, *arguments: Any) -> Any:
    """Call the user's ``module:name`` with `arguments`.

    Raises:
        RecipeError: it raised; the message has the user's file, line and the exception.
    """
    function = resolve(recipe, source, setting)
    try:
        return function(*arguments)
    except (ExportyardError, KeyboardInterrupt):
        raise
    except BaseException as error:  # `sys.exit()` there would end the command, and look like success
        raise fault(recipe, f'`{setting} = "{source}"` raised', error) from error


def fault(recipe: Recipe, what: str, error: BaseException) -> RecipeError:
    """A `RecipeError` that shows where in the user's code `error` came from."""
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError) and error.filename:
        where = f"{error.filename}:{error.lineno}"
    else:
        mine = [frame for frame in frames if is_users(frame.filename, recipe.root)]
        frame = mine[-1] if mine else (frames[-1] if frames else None)
        where = f"{frame.filename}:{frame.lineno}: {(frame.line or '')[:160]}" if frame else "unknown place"
    return RecipeError(
        f"recipe `{recipe.name}`: {what}: {type(error).__name__}: {first_line(error)}\n  at {where}",
        hint="correct the code there; it runs outside exportyard too, so a debugger can be used on it",
    )


def is_users(file: str, root: Path) -> bool:
    """Whether a source file is the user's own: in the workspace, and neither an installed package nor exportyard."""
    path = Path(file)
    return path.is_relative_to(root) and not any(path.is_relative_to(place) for place in _NOT_USERS)


class _Code:
    """The modules of one recipe, which share their plain names (``model``) with those of others.

    They are set aside, not forgotten, while another recipe is at work: a module that registers an operator of torch
    can't be imported twice.
    """

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.aside: dict[str, ModuleType] = {}

    def give_way(self, keep: set[str]) -> None:
        """Leave `sys.modules`, but for what the next recipe uses, too."""
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None)
            if file in self.files and file not in keep:
                self.aside[name] = sys.modules.pop(name)

    def come_back(self) -> None:
        """Be importable again."""
        sys.modules.update(self.aside)
        self.aside.clear()


_codes: dict[Path, _Code] = {}  # by the recipe's folder
_places: list[str] = []  # what stands on `sys.path` for the recipe at work


def code_of(recipe: Recipe) -> list[Path]:
    """Workspace files outside the recipe's folder that its code imports, relative to the workspace."""
    calibration = recipe.calibration.data if recipe.calibration else None
    sources = (recipe.factory, recipe.train, recipe.feeds, recipe.translations, calibration)
    files = code_files(recipe, *sources, recipe.evaluation.data, recipe.evaluation.metric)
    return [path.relative_to(recipe.root) for path in files if not path.is_relative_to(recipe.folder)]


def _use_code_of(recipe: Recipe, source: str) -> None:
    """Make `recipe` the one whose modules are found by their plain names."""
    mine = _codes.setdefault(recipe.folder, _Code())
    # what is loaded already for another reason, as in a program that has us as a library, is no recipe's own
    loaded = {getattr(module, "__file__", None) for module in sys.modules.values()}
    known = {file for code in _codes.values() for file in code.files}
    found = {str(path) for path in code_files(recipe, source) if is_users(str(path), recipe.root)}
    mine.files |= found - (loaded - known)
    for folder, other in _codes.items():
        if folder != recipe.folder:
            other.give_way(mine.files)
    mine.come_back()
    for entry in _places:
        if entry in sys.path:
            sys.path.remove(entry)  # the first, which is ours; one further behind is somebody else's
    _places[:] = [str(recipe.folder), str(recipe.root)]
    sys.path[:0] = _places
    importlib.invalidate_caches()
