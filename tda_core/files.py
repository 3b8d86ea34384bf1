"""Files written whole or not at all, and fingerprints of source code: standard library only.

The runner decides with these, in under a second and without importing torch, what is up to date.
"""

import ast
import hashlib
import os
import uuid
from functools import lru_cache
from pathlib import Path

from tda_core import paths

TEMPORARY = ".partial-"  # how the names of unfinished files begin; whoever finds one may delete it


def atomic_write(path: str | Path, *pieces: bytes | str | memoryview) -> None:
    """Write pieces (text as UTF-8), one after another, so that a reader sees the old file or the new, never a part.

    Raises OSError naming the path when the disk is full, the folder read-only, or a file stands where a
    folder should be; the old file then still stands and nothing is left beside it.
    """
    path = Path(path)
    for piece in pieces:
        if not isinstance(piece, bytes | str | memoryview):
            raise TypeError(f"data for {path} must be bytes or str, got {type(piece).__name__}")
    temporary = path.parent / f"{TEMPORARY}{uuid.uuid4().hex[:12]}-{path.name}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            for piece in pieces:
                view = memoryview(piece.encode() if isinstance(piece, str) else piece)
                while view:
                    view = view[os.write(handle, view) :]  # one call may take only a part
            os.fsync(handle)  # before the rename: else a power cut can leave an empty file under the new name
        finally:
            os.close(handle)
        os.replace(temporary, path)
    except OSError as error:
        reason = f"cannot write {path}: {error.strerror or error}; expected a writable folder with enough free space"
        raise OSError(error.errno, reason) from error
    finally:
        if os.path.lexists(temporary):  # gone after a success
            os.unlink(temporary)


def file_hash(path: str | Path) -> str:
    """SHA-256 (hex) of a file's contents."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def module_file(module: str) -> Path | None:
    """The file of `tda_core` or `tda_core.x.y`, None if there is no such module of ours."""
    package, *rest = module.split(".")
    if package != paths.PACKAGE.name:
        return None
    base = paths.PACKAGE.joinpath(*rest)
    for candidate in (base / "__init__.py", base.with_suffix(".py") if rest else base):
        if candidate.is_file():
            return candidate
    return None


def imported_modules(source: str, package: str = "") -> set[str]:
    """The tda_core modules that this source names in any import statement, also inside functions.

    package: the package that the source belongs to, which relative imports start from.
    The root package itself counts only where something other than its modules is taken from it.
    Raises SyntaxError for source that is not Python.
    """
    plain, taken = _parsed_imports(source, package)
    named = set(plain)
    for base, members in taken:
        modules = {member for member in members if module_file(member)}
        named |= modules
        if modules != members or base != paths.PACKAGE.name:
            named.add(base)
    return {module for module in named if module_file(module)}


@lru_cache(maxsize=1024)
def _parsed_imports(source: str, package: str) -> tuple[frozenset[str], tuple[tuple[str, frozenset[str]], ...]]:
    """Names of `import ...`, and (base, names below it) of each `from base import ...`: what does not depend on files.

    Kept, because the runner asks for the same sources again for every notebook.
    """
    plain, taken = set(), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            plain |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, *([node.module] if node.module else [])])
            taken.append((base, frozenset(f"{base}.{alias.name}" for alias in node.names)))
    return frozenset(plain), tuple(taken)


def reachable_modules(source: str) -> set[str]:
    """All tda_core modules that running this source can import, directly or through each other."""
    return _closure(imported_modules(source))


def source_fingerprint(modules: list[str] | set[str], without: set[str] | frozenset[str] = frozenset()) -> str:
    """16 hex digits over the source of these tda_core modules and of all that they import, `without` some.

    The files in a folder `x_page` count as source of the module `x` beside it.
    Raises ValueError naming a module that tda_core does not have.
    """
    unknown = sorted(module for module in modules if module_file(module) is None)
    if unknown:
        raise ValueError(f"no such module: {', '.join(unknown)}; expected modules of {paths.PACKAGE.name}")
    digest = hashlib.sha256()
    for module in sorted(_closure(set(modules)) - without):
        file = module_file(module)
        digest.update(f"{module} {file_hash(file)}\n".encode())
        for part in sorted(file.with_name(f"{file.stem}_page").glob("*.*")):
            digest.update(f"{module} {part.name} {file_hash(part)}\n".encode())
    return digest.hexdigest()[:16]


def _closure(modules: set[str]) -> set[str]:
    """These modules, their sub-packages (importing a.b.c runs a.b too) and everything they import."""
    found, waiting = set(), set(modules)
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        found.add(module)
        parent = module.rpartition(".")[0]
        if parent and parent != paths.PACKAGE.name:
            waiting.add(parent)
        file = module_file(module)
        package = module if file.name == "__init__.py" else parent
        waiting |= imported_modules(file.read_text(encoding="utf-8"), package) - found
    return found
