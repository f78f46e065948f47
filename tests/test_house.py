"""The rules of the house: what every notebook, every module and the built package must keep to. Each test lists all faults that it finds."""
import ast
import json
import re
import shutil
import subprocess
import sys
import tarfile
import warnings
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

TOP = Path(__file__).parents[1]
NBS = TOP/"nbs"
NOTEBOOKS = sorted(p for p in NBS.rglob("*.ipynb") if not any(part[0] in "._" for part in p.relative_to(NBS).parts))
MODULES = sorted(p for p in (TOP/"geolab").rglob("*.py") if p.name != "_modidx.py")


def none(faults):
    faults = list(faults)
    assert not faults, "\n" + "\n".join(faults)


def cells(notebook, kind="code"):
    "Number and source of each cell of a kind."
    for i, cell in enumerate(json.loads(notebook.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == kind: yield i, "".join(cell["source"])


def module_of(notebook):
    "The module that a notebook writes, or None."
    return next((m[1] for _, source in cells(notebook) if (m := re.search(r"^#\| *default_exp +(\S+)", source, re.M))), None)


def name_of(module):
    "`geolab/data/raster.py` -> `geolab.data.raster`."
    return ".".join(module.relative_to(TOP).with_suffix("").parts).removesuffix(".__init__")


def tree_of(module):
    "Parsed source; a warning of the compiler (such as a wrong escape) is an error."
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return ast.parse(module.read_text(encoding="utf-8"))


def where(path, line):
    return f"{path.relative_to(TOP)}:{line}"


# ---- notebooks

ROOMS = {f"geolab.{module}": int(re.match(r"\d+", nb.name)[0]) for nb in NOTEBOOKS if (module := module_of(nb))}


def parsed(source):
    "Syntax of a cell, without lines for IPython or the shell."
    lines = [] if source.startswith("%%") else source.splitlines()
    return ast.parse("\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in lines))


def imports_of(source):
    "Names of geolab modules that a cell imports, wherever in it."
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.Import): yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom): yield from [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]


def test_a_room_imports_only_from_lower_numbers():
    none(f"{nb.name} cell {i} imports {name}, number {ROOMS[name]}" for nb in NOTEBOOKS if (module := module_of(nb))
         for i, source in cells(nb) for name in imports_of(source) if ROOMS.get(name, -1) >= ROOMS[f"geolab.{module}"])


def test_a_room_has_its_own_number_and_the_name_of_its_file():
    named = {nb: re.sub(r"^\d+_", "", nb.name.removesuffix(".ipynb")) for nb in NOTEBOOKS if module_of(nb)}
    none(f"{nb.name} writes {module_of(nb)}" for nb, name in named.items() if module_of(nb) != ".".join([*nb.parent.relative_to(NBS).parts, name]))
    assert len(set(ROOMS.values())) == len(ROOMS), sorted(ROOMS.items(), key=lambda pair: pair[1])


def test_import_cells_hold_only_imports():
    "The docs run exported cells and cells with an import, no others: what stands beside an import there lacks the cells before it."
    def mixed(source):
        if re.search(r"^#\| *(?:export|eval: *false)", source, re.M) or "nbdev_export()" in source: return False
        kinds = {type(node) for node in ast.walk(parsed(source))}
        return bool(kinds & {ast.Import, ast.ImportFrom} and kinds & {ast.Expr, ast.Assign})
    none(f"{nb.name} cell {i} mixes imports and other code" for nb in NOTEBOOKS if module_of(nb) for i, source in cells(nb) if mixed(source))


def test_sidebar_lists_every_notebook_once():
    def pages(node):
        if isinstance(node, str): yield node
        elif isinstance(node, list): yield from (page for item in node for page in pages(item))
        else: yield from pages([node[key] for key in ("href", "contents") if key in node])
    listed = list(pages(yaml.safe_load((NBS/"sidebar.yml").read_text())["website"]["sidebar"]))
    exist = {nb.relative_to(NBS).as_posix() for nb in NOTEBOOKS}
    none([f"not in nbs/sidebar.yml: {page}" for page in exist - set(listed)] + [f"in nbs/sidebar.yml, but not in nbs/: {page}" for page in set(listed) - exist]
         + [f"twice in nbs/sidebar.yml: {page}" for page in set(listed) if listed.count(page) > 1])


MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|work|tmp|Users|opt/conda)/[^\s\"']+|[^\s\"']*site-packages[^\s\"']*")


def faults_of(notebook):
    nb = json.loads(notebook.read_text(encoding="utf-8"))
    if notebook.stat().st_size > 250_000: yield f"{notebook.stat().st_size//1000} kB, the limit is 250"
    outputs = [(i, out) for i, cell in enumerate(nb["cells"]) for out in cell.get("outputs", [])]
    if any(cell.get("execution_count") for cell in nb["cells"]): yield "execution counts are stored; run `python .ci/clean`"
    if "widgets" in nb["metadata"] or any("widget-view" in kind for _, out in outputs for kind in out.get("data", {})):
        yield "widgets are stored; run `python .ci/clean`"
    for i, out in outputs:
        if out["output_type"] == "error": yield f"cell {i}: stored error {out['ename']}"
    for i, cell in enumerate(nb["cells"]):
        if not isinstance(cell["source"], list): yield f"cell {i}: source is not a list of lines"
    texts = [(i, cell["source"]) for i, cell in enumerate(nb["cells"])]
    texts += [(i, text) for i, out in outputs for kind, text in [("text", out.get("text")), *out.get("data", {}).items()] if "image" not in kind]
    for i, text in texts:
        if path := MACHINE_PATH.search(json.dumps(text)): yield f"cell {i}: path of a machine, {path[0]}"


def test_stored_notebooks_are_clean_and_small():
    none(f"{nb.relative_to(TOP)}: {fault}" for nb in NOTEBOOKS for fault in faults_of(nb))


def test_links_between_pages_lead_somewhere():
    link = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")
    pages = [(nb, source) for nb in NOTEBOOKS for _, source in cells(nb, "markdown")] + [(p, p.read_text()) for p in TOP.glob("*.md")]
    none(f"{page.relative_to(TOP)}: {target}" for page, source in pages for target in link.findall(source) if not (page.parent/target).exists())


def test_commands_in_formulas_have_one_backslash():
    "Two of them are a line break, and the name of the command is then shown as text."
    doubled = re.compile(r"\\\\(?:[a-zA-Z]+|,)")
    assert doubled.search(r"$e^{-t/\\tau}$") and not doubled.search(r"$\begin{cases}0 & t < d\\ 1 & t \ge d\end{cases}$")
    none(f"{nb.relative_to(TOP)}, cell {i}: {found[0]}" for nb in NOTEBOOKS for i, source in cells(nb, "markdown") for found in doubled.finditer(source))


# ---- the package

def is_safe_loader(loader, tree):
    "Is this the SafeLoader, or a class derived from it in the same file?"
    if ast.unparse(loader) in ("yaml.SafeLoader", "yaml.CSafeLoader"): return True
    return any(isinstance(node, ast.ClassDef) and node.name == ast.unparse(loader) and any(is_safe_loader(base, tree) for base in node.bases)
               for node in ast.walk(tree))


def dangers_of(tree):
    "Line and description of what can run foreign code, or hides where a name comes from."
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {getattr(node, "module", None), *(alias.name for alias in node.names)}
            for name in names & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}: yield node.lineno, f"import of {name}"
            if "*" in names: yield node.lineno, "star import"
        if not isinstance(node, ast.Call): continue
        called, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        for keyword in ("weights_only=False", "allow_pickle=True", "shell=True"):
            if keywords.get(keyword.split("=")[0]) == keyword.split("=")[1]: yield node.lineno, keyword
        if called in ("eval", "exec", "os.system"): yield node.lineno, f"{called}()"
        if called == "torch.load" and keywords.get("weights_only") != "True": yield node.lineno, "torch.load without weights_only=True"
        if called in ("yaml.unsafe_load", "yaml.full_load"): yield node.lineno, called
        if called == "yaml.load":
            loader = next((k.value for k in node.keywords if k.arg == "Loader"), node.args[1] if len(node.args) > 1 else None)
            if loader is None or not is_safe_loader(loader, tree): yield node.lineno, "yaml.load without a loader derived from SafeLoader"


def at_import(tree):
    "Statements that run when a module is imported: not the bodies of functions."
    todo = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)): continue
        yield node
        todo += ast.iter_child_nodes(node)


def test_package_never_unpickles_evaluates_or_star_imports():
    none(f"{where(module, line)} {what}" for module in MODULES for line, what in dangers_of(tree_of(module)))


@pytest.mark.parametrize("source", ["import pickle", "from x import *", "torch.load(f)", "torch.load(f, weights_only=False)", "yaml.load(t)", "yaml.load(t, L)",
                                    "np.load(f, allow_pickle=True)", "eval(t)", "run(c, shell=True)", "class L(yaml.Loader): pass\nyaml.load(t, Loader=L)"])
def test_that_rule_sees(source):
    assert list(dangers_of(ast.parse(source)))


@pytest.mark.parametrize("source", ["torch.load(f, weights_only=True)", "network.eval()", "class L(yaml.SafeLoader): pass\nyaml.load(t, Loader=L)"])
def test_that_rule_lets_pass(source):
    assert not list(dangers_of(ast.parse(source)))


def test_importing_sets_no_environment():
    changes = re.compile(r"^(?:os\.)?(?:environ\[.*\] *=[^=]|environ\.(?:setdefault|update|pop)\(|putenv\()")
    none(f"{where(module, node.lineno)} {ast.unparse(node)}" for module in MODULES for node in at_import(tree_of(module))
         if isinstance(node, (ast.Assign, ast.Expr)) and changes.match(ast.unparse(node)))


def test_public_names_have_one_line_of_docstring():
    public = [(module, node) for module in MODULES for node in tree_of(module).body
              if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")]
    none(f"{where(module, node.lineno)} {node.name}" for module, node in public if len((ast.get_docstring(node) or "").splitlines()) != 1)


IMPORT = """
import os, sys, warnings, importlib, traceback
def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.bind"): raise RuntimeError(f"{event}{args[1:]}: importing must not use the network")
sys.addaudithook(refuse)
import geolab
heavy = sorted({"torch", "rasterio"} & set(sys.modules))
if heavy: sys.exit(f"`import geolab` alone imports {heavy}")
import torch, lightning, rasterio, geopandas, segmentation_models_pytorch, sklearn, matplotlib.pyplot  # once, for all the forks
warnings.simplefilter("ignore")
warnings.filterwarnings("error", module=r"geolab(\\.|$)")
failed = 0
for name in sys.argv[1:]:
    if not (child := os.fork()):
        try: importlib.import_module(name)
        except BaseException: print(name, traceback.format_exc(limit=-2), flush=True); os._exit(1)
        os._exit(0)
    failed += bool(os.waitpid(child, 0)[1])
sys.exit(failed)
"""


def test_every_module_imports_alone_without_warnings_or_network():
    done = subprocess.run([sys.executable, "-c", IMPORT, *map(name_of, MODULES)], cwd=TOP, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


# ---- README and the built package

def test_readme_is_made_from_the_front_page():
    done = subprocess.run([sys.executable, TOP/".ci/readme", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_readme_and_ci_run_the_same_tests():
    readme, ci = (TOP/"README.md").read_text(), (TOP/".ci/run").read_text()
    for part in ["python3.11 -m venv .venv && . .venv/bin/activate", "pip install", "-e '.[dev]'", "bash tests/run.sh"]: assert part in readme and part in ci, part


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "Names in the sdist, names in the wheel that is made from it, and the wheel's metadata."
    tmp = tmp_path_factory.mktemp("build")
    skip = shutil.ignore_patterns(".*", "_proc", "_docs", "runs", "*.egg-info", "build", "__pycache__", "tests", "mlruns")
    shutil.copytree(TOP, tmp/"tree", ignore=skip)
    done = subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp/"dist", tmp/"tree"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    with tarfile.open(next((tmp/"dist").glob("*.tar.gz"))) as sdist: sources = {name.partition("/")[2] for name in sdist.getnames()}
    with zipfile.ZipFile(next((tmp/"dist").glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read(next(name for name in names if name.endswith("METADATA"))).decode()
    return sources, names, Parser().parsestr(metadata)


def test_wheel_holds_the_package_and_nothing_else(built):
    sources, names, _ = built
    assert {"settings.ini", "LICENSE", "README.md"} <= sources
    assert {name for name in names if ".dist-info/" not in name} == {str(module.relative_to(TOP)) for module in [*MODULES, TOP/"geolab/_modidx.py"]}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_extras_and_bounds_of_the_metadata(built):
    metadata = built[2]
    extras = {"cluster", "track", "sweep", "foundation", "fast", "compare", "notebook"}
    needs = {extra: set() for extra in ["", "dev", *extras]}
    for spec in map(Requirement, metadata.get_all("Requires-Dist")):
        extra = re.search(r"extra == [\"'](\w+)", str(spec.marker or ""))
        needs[extra[1] if extra else ""].add(f"{spec.name}{spec.specifier}")
    assert set(metadata.get_all("Provides-Extra")) == {*extras, "dev"}
    none(f"{extra} is empty" for extra in extras if not needs[extra])
    none(f"dev lacks {spec}" for extra in extras for spec in needs[extra] - needs["dev"])
    free = {spec for extra in ["", *extras] for spec in needs[extra]}
    none(f"{spec}: lower bounds only, so that a hosted runtime keeps what it ships" for spec in free if {s.operator for s in Requirement(spec).specifier} - {">=", "!="})
