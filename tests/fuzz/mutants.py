"""Automatic faults: one operator, constant, argument or statement of a function is changed in its AST.

A fault is applied in memory: the code of the loaded function is replaced by the code compiled from the
changed module. So it must be applied before the ranks are forked, in a process that ends with them.
"""

import ast
import copy
import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType

import launcher

PACKAGE = Path(launcher.__file__).parent
FOLDERS = ("parallel", "models", "engine")
LOCALS = ".<locals>"
# These contain no computation: messages, types and checks.
_LEFT_OUT = (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom, ast.Global, ast.Nonlocal)
_MESSAGES = {"print", "warn", "warning", "ConfigError", "refusal", "info", "debug", "isinstance", "cast"}
_CHECKS = {"strict"}  # arguments that only check: without them a right program computes the same
_OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitOr,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE,
    ast.GtE: ast.Gt, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
_NAMES = {"MAX": "SUM", "SUM": "MAX", "MIN": "MAX", "max": "min", "min": "max", "AVG": "SUM"}


@dataclass(frozen=True)
class Mutant:
    """The `number`-th fault of a file, in the function `name`; `change` shows it."""

    file: str  # below launcher/
    number: int
    line: int
    name: str
    change: str

    def __str__(self) -> str:
        return f"launcher/{self.file}:{self.line} ({self.name}): {self.change}"


@dataclass(frozen=True)
class _Site:
    """A place in a tree, and how to change it. `apply` modifies the tree that contains it."""

    line: int
    statement: int  # line of the statement
    name: str
    before: str
    after: str
    apply: Callable[["Wrap"], None]


Wrap = Callable[[ast.AST], ast.AST]  # makes of a changed node what stands in its place
REACHED = "_fuzz_reached"  # a global of the changed function, called before the changed code is evaluated


def files() -> list[str]:
    """Return the files that are mutated, below launcher/."""
    paths = [path for folder in FOLDERS for path in sorted((PACKAGE / folder).rglob("*.py"))]
    return [str(path.relative_to(PACKAGE)) for path in paths]


def mutants_of(file: str, lines: set[int]) -> list[Mutant]:
    """Return the faults of a file on these lines. Faults of other lines have no effect on the traced run."""
    if not lines:
        return []
    return [mutant for mutant, statement in _all(file) if mutant.line in lines or statement in lines]


@cache
def _all(file: str) -> list[tuple[Mutant, int]]:
    """Return the faults of a file, each with the line of its statement."""
    return [
        (Mutant(file, number, site.line, site.name, f"{site.before} -> {site.after}"), site.statement)
        for number, site in enumerate(_sites(_tree(file)))
    ]


def mutant_of(file: str, number: int) -> Mutant:
    """Return the `number`-th fault of a file. Raises StopIteration if it has none."""
    every = set(range(len((PACKAGE / file).read_bytes().splitlines()) + 1))
    return next(mutant for mutant in mutants_of(file, every) if mutant.number == number)


def apply(mutant: Mutant, reached: Callable[[], bool] | None = None) -> bool:
    """Replace the code of the loaded function; return False if the fault changes no instruction of it.

    `reached` must return True; it is called each time before the changed code is evaluated.
    """
    changed = _compiled(mutant, lambda node: node)
    marked = _compiled(mutant, _marked) or changed
    outer, replaced = mutant.name.partition(LOCALS)[0], False
    for function in _functions().get((str(PACKAGE / mutant.file), outer), []):
        key = outer, function.__code__.co_firstlineno
        code = changed.get(key)
        if code is not None and code.co_freevars == function.__code__.co_freevars:
            replaced |= not _is_same(code, function.__code__)
            if reached is not None:
                function.__globals__[REACHED], code = reached, marked[key]
            function.__code__ = code
    return replaced


def _compiled(mutant: Mutant, wrap: Wrap) -> dict[tuple[str, int], CodeType]:
    """Return the code of all functions of the changed module, by name and first line; {} if it is no code."""
    tree, path = copy.deepcopy(_tree(mutant.file)), str(PACKAGE / mutant.file)
    list(_sites(tree))[mutant.number].apply(wrap)
    with warnings.catch_warnings(action="ignore"), suppress(SyntaxError):  # such as calling a number
        return dict(_codes(compile(ast.fix_missing_locations(tree), path, "exec")))
    return {}


def _marked(node: ast.AST) -> ast.AST:
    """Return code that calls REACHED, and then evaluates the node."""
    call = ast.Call(ast.Name(REACHED, ast.Load()), [], [])
    if isinstance(node, ast.stmt):
        return _located(ast.If(call, [node], []), node)
    if not isinstance(node, ast.expr) or not isinstance(getattr(node, "ctx", ast.Load()), ast.Load):
        return node
    both = ast.Tuple([call, node], ast.Load())
    return _located(ast.Subscript(both, ast.Constant(1), ast.Load()), node)


@cache
def _tree(file: str) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text())


@cache
def _functions() -> dict[tuple[str, str], list[FunctionType]]:
    """Return the loaded functions by file and qualified name."""
    gc.unfreeze()  # frozen objects are not listed
    found: dict[tuple[str, str], list[FunctionType]] = {}
    for function in gc.get_objects():
        if isinstance(function, FunctionType) and function.__code__.co_filename.startswith(str(PACKAGE)):
            code = function.__code__
            found.setdefault((code.co_filename, code.co_qualname), []).append(function)
    return found


def prepare() -> int:
    """Find the loaded functions; return their number."""
    return sum(map(len, _functions().values()))


def _codes(code: CodeType) -> Iterator[tuple[tuple[str, int], CodeType]]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield (constant.co_qualname, constant.co_firstlineno), constant
            yield from _codes(constant)


def _is_same(one: CodeType, other: CodeType) -> bool:
    if one.co_code != other.co_code or one.co_names != other.co_names:
        return False
    if len(one.co_consts) != len(other.co_consts):
        return False
    pairs = zip(one.co_consts, other.co_consts, strict=True)
    return all(
        _is_same(a, b)
        if isinstance(a, CodeType) and isinstance(b, CodeType)
        else (type(a), a) == (type(b), b)
        for a, b in pairs
    )


def _sites(tree: ast.Module) -> Iterator[_Site]:
    """Yield the places of a module's functions in their order in the file."""
    yield from _within(tree, "", False, 0)


def _within(node: ast.AST, name: str, is_function: bool, statement: int) -> Iterator[_Site]:
    for field, value in ast.iter_fields(node):
        children = value if isinstance(value, list) else [value]
        for index, child in enumerate(children):
            if isinstance(child, ast.AST):
                yield from _child(node, field, index, child, name, is_function, statement)


def _child(
    node: ast.AST, field: str, index: int, child: ast.AST, name: str, is_function: bool, statement: int
) -> Iterator[_Site]:
    if isinstance(child, _LEFT_OUT) or field in (
        "annotation",
        "returns",
        "decorator_list",
        "args_annotation",
    ):
        return
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and field == "args":
        return  # defaults and annotations are computed where the function is defined
    if isinstance(child, ast.Call) and _name_of(child.func) in _MESSAGES:
        return
    if isinstance(child, ast.keyword) and child.arg in _CHECKS:
        return
    if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        inner = f"{name}{LOCALS}.{child.name}" if is_function else f"{name}.{child.name}".lstrip(".")
        yield from _within(child, inner, not isinstance(child, ast.ClassDef), child.lineno)
        return
    if isinstance(child, ast.stmt):
        statement = child.lineno
    if is_function:
        for before, after, act in _changes(node, field, index, child):
            yield _Site(getattr(child, "lineno", statement), statement, name, before, after, act)
    yield from _within(child, name, is_function, statement)


def _name_of(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


Change = tuple[str, str, Callable[[Wrap], None]]


def _changes(parent: ast.AST, field: str, index: int, node: ast.AST) -> Iterator[Change]:
    """Yield each change of a node: its text before and after, and the function that makes it."""

    def replaced(new: ast.AST) -> Callable[[Wrap], None]:
        def act(wrap: Wrap) -> None:
            if isinstance(held := getattr(parent, field), list):
                held[index] = wrap(new)
            else:
                setattr(parent, field, wrap(new))

        return act

    def change(new: ast.AST, before: ast.AST = node) -> Change:
        ast.copy_location(new, node)
        return _text(before), _text(ast.fix_missing_locations(new)), replaced(new)

    if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in _OPERATORS:
        new = copy.deepcopy(node)
        new.op = _OPERATORS[type(node.op)]()  # type: ignore[assignment]
        yield change(new)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _OPERATORS:
        compare = copy.deepcopy(node)
        compare.ops[0] = _OPERATORS[type(node.ops[0])]()  # type: ignore[call-overload]
        yield change(compare)
    if isinstance(node, ast.BoolOp):
        both = copy.deepcopy(node)
        both.op = _OPERATORS[type(node.op)]()  # type: ignore[assignment]
        yield change(both)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
        yield change(copy.deepcopy(node.operand))
    if isinstance(node, ast.Constant) and not isinstance(parent, ast.Expr):
        for value in _other_constants(node.value):
            yield change(ast.Constant(value))
    if isinstance(node, ast.Attribute) and node.attr in _NAMES:
        yield change(ast.Attribute(copy.deepcopy(node.value), _NAMES[node.attr], node.ctx))
    if isinstance(node, ast.If | ast.IfExp | ast.While) and not isinstance(node, ast.While):
        negated = copy.deepcopy(node)
        negated.test = ast.UnaryOp(ast.Not(), negated.test)
        yield change(negated, node.test)[0], f"not ({_text(node.test)})", replaced(_located(negated, node))
    if isinstance(node, ast.Call):
        yield from ((*texts, replaced(_located(new, node))) for *texts, new in _calls(node))
    if isinstance(node, ast.stmt) and _can_be_dropped(node):
        yield _text(node), "pass", replaced(_located(ast.Pass(), node))


def _located(new: ast.AST, old: ast.AST) -> ast.AST:
    return ast.fix_missing_locations(ast.copy_location(new, old))


def _other_constants(value: object) -> list[object]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1]
    if isinstance(value, float):
        return [value * 2 if value else 1.0]
    return []


def _calls(node: ast.Call) -> Iterator[tuple[str, str, ast.AST]]:
    """Yield calls with two arguments exchanged, with one left out, and the object without its method."""
    plain = [argument for argument in node.args if not isinstance(argument, ast.Starred)]
    if len(plain) == len(node.args) >= 2:
        new = copy.deepcopy(node)
        new.args[0], new.args[1] = new.args[1], new.args[0]
        yield _text(node), f"{_text(node.func)}({_text(new.args[0])}, {_text(new.args[1])}, ...)", new
    for index in range(len(node.keywords)):
        new = copy.deepcopy(node)
        left_out = new.keywords.pop(index)
        if left_out.arg not in _CHECKS:
            yield _text(node), f"without {left_out.arg}={_text(left_out.value)}", new
    if isinstance(node.func, ast.Attribute):
        is_method = not isinstance(node.func.value, ast.Name | ast.Constant)  # else perhaps of a module
        if is_method or not (node.args or node.keywords):
            yield _text(node), _text(node.func.value), copy.deepcopy(node.func.value)


def _can_be_dropped(node: ast.stmt) -> bool:
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Call) and _name_of(node.value.func) not in _MESSAGES
    if isinstance(node, ast.Assign):  # dropping a local name ends in a NameError: no silent fault
        return all(isinstance(target, ast.Attribute | ast.Subscript) for target in node.targets)
    return isinstance(node, ast.AugAssign)


def _text(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 70 else f"{text[:67]}..."
