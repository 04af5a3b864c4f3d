"""The package's shape: which way imports go, docstrings, and that every example runs."""

import ast
import doctest
import importlib
import re
import warnings
from pathlib import Path

import pytest
import torch

import rnnkern

PACKAGE = Path(rnnkern.__file__).parent
ROOT = Path(__file__).parent.parent
# From the bottom up; a module imports only from rows below its own.
# A directory stands for its modules.
LAYERS = [
    ["library", "reference", "stock", "data"],
    ["rows", "checks", "flops", "onnx"],
    ["autograd"],
    ["vmap"],
    ["backends"],
    ["dispatch"],
    ["functional"],
    ["modules"],
    ["interop", "quantized"],
    ["parity"],
    ["training"],
    ["results", "series", "pictures", "distributed"],
    ["cli"],
    ["__main__"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# The public names, which the commands may use as any user does.
PUBLIC = "__init__"

FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(file):
    """The name in LAYERS that a file belongs to."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imports_of(file):
    """The package's own modules that a file imports, anywhere in it, as names in LAYERS."""
    parts = ("rnnkern", *file.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(file.read_text())):
        targets = []
        if isinstance(node, ast.ImportFrom):
            base = parts[: len(parts) + 1 - node.level] if node.level else ()
            source = [*base, *(node.module or "").split(".")]
            source = [part for part in source if part]
            targets = [[*source, alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        for target in targets:
            if target[0] == "rnnkern":
                name = target[1] if len(target) > 1 and target[1] in LEVEL else PUBLIC
                yield name, node.lineno


def test_every_module_has_a_layer():
    assert {module_of(file) for file in FILES} - {PUBLIC} <= set(LEVEL)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_go_down(file):
    here = module_of(file)
    if here == PUBLIC:
        return
    upward = []
    for name, line in imports_of(file):
        if name == PUBLIC:
            allowed = LEVEL[here] > LEVEL["modules"]
        else:
            allowed = LEVEL[name] < LEVEL[here] or here == name == "backends"
        if not allowed:
            upward.append(f"line {line}: {here} imports {name}")
    assert not upward, "; ".join(upward)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_public_names_have_docstrings(file):
    """Every module, and every public class and function at its top.

    backends/: their __init__ says once what each name of the contract means.
    """
    tree = ast.parse(file.read_text())
    missing = []
    if tree.body and not ast.get_docstring(tree):
        missing.append("the module")
    contract = {"unsupported", "rnn_scan", "rnn_layer", "linear_scan", "rnn_scan_backward_kernel"}
    in_backends = module_of(file) == "backends"
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node) and not (in_backends and node.name in contract):
            missing.append(node.name)
    assert not missing, f"no docstring: {', '.join(missing)}"


@pytest.mark.parametrize("name", ["functional", "modules", "dispatch", "interop", "quantized"])
def test_docstring_examples(name):
    module = importlib.import_module(f"rnnkern.{name}")
    names = {"rnnkern": rnnkern, "torch": torch}
    tests = doctest.DocTestFinder(exclude_empty=True).find(module, extraglobs=names)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    said = []
    for test in tests:
        runner.run(test, out=said.append)
    assert runner.summarize(verbose=False).attempted > 0, "no example"
    assert not runner.failures, "".join(said)


def readme_blocks():
    """README.md's Python code blocks, with the line each starts at."""
    readme = ROOT / "README.md"
    text = readme.read_text() if readme.exists() else ""
    for match in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield text[: match.start()].count("\n") + 2, match[1]


def test_there_is_a_readme():
    assert (ROOT / "README.md").exists()


def test_readme_examples(tmp_path, monkeypatch):
    """One after the other in one namespace, as a reader types them. ">>>" blocks are doctests."""
    monkeypatch.chdir(tmp_path)
    names = {"torch": torch, "rnnkern": rnnkern, "__name__": "readme"}
    for line, code in readme_blocks():
        if ">>>" in code:
            test = doctest.DocTestParser().get_doctest(code, names, "README", "README.md", line)
            said = []
            result = doctest.DocTestRunner().run(test, out=said.append, clear_globs=False)
            assert result.failed == 0, "".join(said)
            names.update(test.globs)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                exec(compile("\n" * (line - 1) + code, "README.md", "exec"), names)
