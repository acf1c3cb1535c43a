"""How the house reads, in numbers: `python tests/house.py [FOLDER ...]` prints one table, a column for each checkout.

Layouts old and new are understood, so that a change can be measured: `git worktree add ../before HASH`, then
`python tests/house.py ../before .`; tests/test_repo.py asserts from the same functions. Nothing is imported but
the standard library."""
import ast
import io
import json
import re
import sys
import tokenize
from collections import Counter
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
MAX_LINE, MAX_PARAMETERS, MAX_MODULE, BLOCK = 120, 7, 250, 6
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING,
          tokenize.ENDMARKER}


def modules(root=ROOT):
    "Python files of the package, without the index that nbdev generates."
    return [p for p in sorted((root/"biojepa").rglob("*.py")) if p.name != "_modidx.py"]


def tests(root=ROOT): return sorted((root/"tests").glob("*.py"))


def notebooks(root=ROOT):
    return [p for p in sorted((root/"nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]


def cells(path, kind=None):
    "Cells of a notebook, of one kind or all."
    return [c for c in json.loads(path.read_text())["cells"] if kind in (None, c["cell_type"])]


def source(cell): return "".join(cell["source"])


def is_library(path): return any(re.search(r"^#\|\s*default_exp", source(c), re.M) for c in cells(path, "code"))


def library(root=ROOT): return [p for p in notebooks(root) if is_library(p)]


def tree_of(path): return ast.parse(path.read_text())


def written_lines(path):
    "Lines of a Python file that somebody wrote: not the `__all__` that nbdev fills in."
    lines = path.read_text().splitlines()
    for node in tree_of(path).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            lines[node.lineno - 1:node.end_lineno] = [""]*(node.end_lineno - node.lineno + 1)
    return lines


def wide(root=ROOT, limit=MAX_LINE):
    "Lines over a limit, as `place: line`, for each kind of text."
    found = {"package": [], "notebooks, code": [], "notebooks, prose": [], "tests": []}
    for kind, files in (("package", modules(root)), ("tests", tests(root))):
        for path in files:
            found[kind] += [f"{path.relative_to(root)}:{i}: {line.strip()[:60]}"
                            for i, line in enumerate(written_lines(path), 1) if len(line) > limit]
    for path in notebooks(root):
        for cell in cells(path):
            kind = "notebooks, prose" if cell["cell_type"] == "markdown" else "notebooks, code"
            found[kind] += [
                f"{path.relative_to(root)} {cell.get('id')}: {line.strip()[:60]}"
                for line in source(cell).splitlines() if len(line) > limit and not _unbreakable(kind, line)
            ]
    return found


def _unbreakable(kind, line):
    "A row of a table or a link in prose cannot be broken."
    return kind.endswith("prose") and (line.lstrip().startswith("|")
                                       or "](" in line and " " not in line.strip())


def tokens(path):
    "Names, operators, numbers and strings of a file."
    read = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    return sum(t.type not in LAYOUT for t in read)


def functions(root=ROOT):
    "(place, node) of every function and method of the package."
    for path in modules(root):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield f"{path.relative_to(root/'biojepa').with_suffix('')}.{node.name}".replace("/", "."), node


def long_signatures(root=ROOT, limit=MAX_PARAMETERS):
    "Functions with more parameters than can be kept in mind, and how many; `self`, *args and **kwargs do not count."
    found = {}
    for place, node in functions(root):
        names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        n = len(names) - (names[:1] in (["self"], ["cls"]))
        if n > limit: found[place] = n
    return found


def private_functions(root=ROOT):
    "References to each private function of the package: in its own module, and imports of it elsewhere."
    trees, counts = {path: tree_of(path) for path in modules(root)}, {}
    imported = Counter(a.name for tree in trees.values() for node in ast.walk(tree)
                       if isinstance(node, ast.ImportFrom) for a in node.names)
    for path, tree in trees.items():
        nodes = list(ast.walk(tree))
        used = Counter([n.id for n in nodes if isinstance(n, ast.Name)] +
                       [n.attr for n in nodes if isinstance(n, ast.Attribute)])
        for node in nodes:
            if isinstance(node, ast.FunctionDef) and re.match(r"_(?!_)", node.name):
                place = f"{path.relative_to(root/'biojepa').with_suffix('')}.{node.name}".replace("/", ".")
                counts[place] = used[node.name] + imported[node.name]
    return counts


def exported_cells(root=ROOT):
    "Lines of each exported cell that defines a function or class, by notebook and first name."
    found = {}
    for path in library(root):
        for cell in cells(path, "code"):
            text = source(cell)
            if not re.search(r"^#\|\s*exporti?\b", text, re.M): continue
            if name := re.search(r"^(?:async )?(?:def|class) (\w+)", text, re.M):
                lines = [l for l in text.splitlines() if l.strip() and not l.startswith("#|")]
                found[f"{path.stem}.{name[1]}"] = len(lines)
    return found


def prose_share(path):
    "Markdown characters over all characters of a notebook's sources."
    sizes = {kind: sum(len(source(c)) for c in cells(path, kind)) for kind in ("markdown", "code")}
    return sizes["markdown"]/sum(sizes.values())


def has_picture(path):
    outputs = [o for c in cells(path, "code") for o in c["outputs"]]
    return any(kind.startswith("image/") for o in outputs for kind in o.get("data", ()))


def repeated(root=ROOT, n=BLOCK):
    "Places in package and tests of `n` or more lines that stand elsewhere too, but for white space; imports apart."
    texts, where = {}, Counter()
    for path in (*modules(root), *tests(root)):
        lines = written_lines(path)
        for node in ast.walk(tree_of(path)):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                lines[node.lineno - 1:node.end_lineno] = [""]*(node.end_lineno - node.lineno + 1)
        kept = [(i, " ".join(line.split())) for i, line in enumerate(lines, 1)
                if line.strip() and not line.startswith("# %%")]
        texts[path] = [(kept[k][0], tuple(text for _, text in kept[k:k + n])) for k in range(len(kept) - n + 1)]
        where.update(window for _, window in texts[path])
    found = []
    for path, windows in texts.items():
        inside = False
        for line, window in windows:
            if where[window] > 1 and not inside: found.append(f"{path.relative_to(root)}:{line}")
            inside = where[window] > 1
    return found


def house(root=ROOT):
    "Every number of the table, by name."
    over, over_100 = wide(root), wide(root, 100)
    rows = {f"lines over {MAX_LINE}: {kind}": len(found) for kind, found in over.items()}
    rows |= {f"lines over 100: {kind}": len(found) for kind, found in over_100.items()}
    library_, exported, private = library(root), exported_cells(root), private_functions(root)
    shares = [prose_share(path) for path in library_]
    sizes = [(len(source(c)), c["cell_type"]) for path in library_ for c in cells(path)]
    prose = sum(n for n, kind in sizes if kind == "markdown")/sum(n for n, kind in sizes if kind != "raw")
    lengths = {path: len(path.read_text().splitlines()) for path in modules(root)}
    return rows | {
        "tokens of the package": sum(tokens(path) for path in modules(root)),
        "lines of the package": sum(lengths.values()),
        f"functions with more than {MAX_PARAMETERS} parameters": len(long_signatures(root)),
        "private functions": len(private),
        "private functions called once": sum(n == 1 for n in private.values()),
        "exported cells: median lines": median(exported.values()),
        "exported cells: longest": max(exported.values()),
        "exported cells over 60 lines": sum(n > 60 for n in exported.values()),
        "prose in library notebooks (%)": round(100*prose),
        "library notebooks under 30 % prose": sum(s < .3 for s in shares),
        "library notebooks with a picture": sum(has_picture(path) for path in library_),
        f"modules over {MAX_MODULE} lines": sum(n > MAX_MODULE for n in lengths.values()),
        f"repeated blocks of {BLOCK} or more lines": len(repeated(root)),
        "files: modules": len([p for p in lengths if p.name not in ("__init__.py", "__main__.py")]),
        "files: library notebooks": len(library_),
        "files: other notebooks": len(notebooks(root)) - len(library_),
        "files: tests": len(tests(root)),
    }


def main(folders):
    roots = [Path(f).resolve() for f in folders] or [ROOT]
    columns = [house(root) for root in roots]
    names, width = [root.name for root in roots], max(len(name) for name in columns[0])
    rows = [["", *names], *([name, *(f"{c[name]:,}" for c in columns)] for name in columns[0])]
    widths = [max(len(row[i]) for row in rows) for i in range(1, len(names) + 1)]
    for name, *values in rows:
        print(name.ljust(width), *(v.rjust(w) for v, w in zip(values, widths)), sep="  ")


if __name__ == "__main__": main(sys.argv[1:])
