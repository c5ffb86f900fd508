"Reference entries of the site, read from the exported modules: no import, no execution, types as the author wrote them."
import ast, html, io, re, tokenize
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Param:
    name: str
    type: str
    default: str
    doc: str


@dataclass(frozen=True)
class Symbol:
    name: str  # "fit_surrogate", "Registry" or "Registry.register"
    kind: str  # "function", "class", "dataclass", "method", "property"
    call: str  # how a reader writes it: "fit_surrogate(runs, targets, *, kind='ensemble')"
    doc: str
    params: tuple  # of Param: arguments, or fields of a dataclass
    returns: Param | None
    members: tuple  # of Symbol: public methods of a class
    anchors: tuple  # further names that links may use: private and special methods
    bases: tuple
    source: str


def _comments(text):
    "Line number to comment, and the set of lines that hold nothing but a comment."
    found, alone = {}, set()
    for t in tokenize.generate_tokens(io.StringIO(text).readline):
        if t.type == tokenize.COMMENT:
            found[t.start[0]] = t.string.lstrip("#").strip()
            if not t.line[:t.start[1]].strip(): alone.add(t.start[0])
    return found, alone


class Module:
    "The documented symbols of one module file."

    def __init__(self, path):
        self.text = Path(path).read_text(encoding="utf-8")
        self.lines = self.text.splitlines()
        self.comments, self.alone = _comments(self.text)
        self.symbols = {}
        for node in ast.parse(self.text).body: self._add(node)

    def _add(self, node):
        if isinstance(node, ast.ClassDef): s = self._class(node)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)): s = self._function(node, *self._patched(node))
        else: return
        self.symbols[s.name] = s
        self.symbols.update({m.name: m for m in s.members})

    def _source(self, node):
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        return "\n".join(self.lines[first - 1:node.end_lineno])

    def _says(self, line):
        "The comment of `line`, or the comment lines right above it."
        if line in self.comments and line not in self.alone: return self.comments[line]
        above = []
        while line - 1 in self.alone: line -= 1; above.insert(0, self.comments[line])
        return " ".join(above)

    def _unparse(self, node):
        "The text of `node` as the author wrote it (the library's own function splits the whole file at every call)."
        if node is None: return ""
        first, last = node.lineno - 1, node.end_lineno - 1
        if first != last: return ast.unparse(node)
        return self.lines[first].encode()[node.col_offset:node.end_col_offset].decode()

    def _default(self, node):
        "A default as a reader understands it: `field(default_factory=dict)` is `dict()`."
        return re.sub(r"^(?:dataclasses\.)?field\(default_factory=([\w.]+)\)$", r"\1()", self._unparse(node))

    def _patched(self, node):
        "A function marked `@patch` belongs to the class that annotates its first argument."
        marks = {ast.unparse(d).split("(")[0] for d in node.decorator_list}
        if marks & {"patch", "patch_property"} and node.args.args: return self._unparse(node.args.args[0].annotation), True
        return None, False

    def _function(self, node, owner=None, drop_first=False):
        a = node.args
        plain = [*a.posonlyargs, *a.args]
        defaults = [None] * (len(plain) - len(a.defaults)) + list(a.defaults)
        marks = {ast.unparse(d) for d in node.decorator_list}
        if drop_first or (owner and "staticmethod" not in marks): plain, defaults = plain[1:], defaults[1:]
        entries = [("", p, d) for p, d in zip(plain, defaults)]
        if a.vararg: entries.append(("*", a.vararg, None))
        elif a.kwonlyargs: entries.append(("*,", None, None))
        entries += [("", p, d) for p, d in zip(a.kwonlyargs, a.kw_defaults)]
        if a.kwarg: entries.append(("**", a.kwarg, None))
        params, words = [], []
        for star, p, d in entries:
            if p is None: words.append("*"); continue
            default = self._unparse(d)
            words.append(f"{star}{p.arg}" + (f"={default}" if d is not None else ""))
            line = (d or p).end_lineno
            last = a_one_line(node) or any(q and q.lineno == line and q.col_offset > p.col_offset for _, q, _ in entries)
            params.append(Param(star + p.arg, self._unparse(p.annotation), default, "" if last else self._says(line)))
        end = node.returns.end_lineno if node.returns else (max([node.lineno, *(p.end_lineno for _, p, _ in entries if p)]))
        said = self.comments.get(end, "") if node.returns or a_one_line(node) else self._after_paren(node, end)
        returns = Param("", self._unparse(node.returns), "", said) if node.returns or said else None
        name = f"{owner}.{node.name}" if owner else node.name
        kind = "property" if marks & {"property", "cached_property", "functools.cached_property", "patch(as_prop=True)"} else ("method" if owner else "function")
        call = name if kind == "property" else f"{name}({', '.join(words)})"
        return Symbol(name, kind, call, ast.get_docstring(node) or "", tuple(params), returns, (), (), (), self._source(node))

    def _after_paren(self, node, last):
        "The comment on the line that closes the signature, where no return annotation stands."
        for line in range(last + 1, node.body[0].lineno):
            if self.lines[line - 1].lstrip().startswith(")"): return self.comments.get(line, "")
        return ""

    def _class(self, node):
        defs = [n for n in node.body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
        init = next((n for n in defs if n.name == "__init__"), None)
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name) and not n.target.id.startswith("_")]
        is_data = any("dataclass" in ast.unparse(d) for d in node.decorator_list)
        if init: made = self._function(init, node.name); params, call = made.params, made.call.replace(".__init__", "", 1)
        elif is_data:
            params = tuple(Param(f.target.id, self._unparse(f.annotation), self._default(f.value), self._says(f.end_lineno)) for f in fields)
            call = f"{node.name}({', '.join(p.name + (f'={p.default}' if p.default else '') for p in params)})"
        else: params, call = (), node.name
        members = tuple(self._function(n, node.name) for n in defs if not n.name.startswith("_"))
        anchors = tuple(f"{node.name}.{n.name}" for n in defs if n.name.startswith("_"))
        bases = tuple(ast.unparse(b) for b in node.bases)
        return Symbol(node.name, "dataclass" if is_data else "class", call, ast.get_docstring(node) or "", params, None, members, anchors, bases, self._source(node))


def a_one_line(node):
    "Whether the signature stands on one line, where a trailing comment belongs to the result and not to an argument."
    a = node.args
    every = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, [a.vararg, a.kwarg])]
    return all(p.lineno == node.lineno for p in every) and (not node.returns or node.returns.lineno == node.lineno)


@cache
def module(path): return Module(path)


def wrap_call(call, tail="", width=66):
    "The signature on one line where it fits, else one argument per line."
    if len(call + tail) <= width or "(" not in call: return call
    head, rest = call.split("(", 1)
    parts, depth, word = [], 0, ""
    for ch in rest[:-1]:
        if ch == "," and not depth: parts.append(word.strip()); word = ""; continue
        depth += (ch in "([{") - (ch in ")]}")
        word += ch
    parts.append(word.strip())
    return head + "(\n" + "".join(f"    {p},\n" for p in parts if p) + ")"


def _cell(text): return " ".join(text.split()).replace("|", "\\|")
def _code(text):
    if not text: return ""
    tick = "``" if "`" in text else "`"
    return f"{tick}{_cell(text)}{tick}"


def table(params, returns=None, what="Parameter", link=lambda s: s):
    "Markdown table of `params`; columns that would be empty are left out."
    rows = list(params)
    if not any(p.doc or p.type for p in [*rows, *([returns] if returns else [])]): return ""
    cols = [c for c in ("type", "default") if any(getattr(p, c) for p in rows) or (c == "type" and returns and returns.type)]
    head = [what, *(c.capitalize() for c in cols), "Details"]
    out = [head, ["---"] * len(head)]
    out += [[_code(p.name), *(_code(getattr(p, c)) for c in cols), link(_cell(p.doc))] for p in rows]
    if returns: out.append(["**returns**", *(_code(getattr(returns, c)) if c == "type" else "" for c in cols), link(_cell(returns.doc))])
    return "\n".join("| " + " | ".join(r) + " |" for r in out)


def anchor(name): return f'<a class="anchor" id="{html.escape(name.lower(), quote=True)}"></a>'


def member_table(symbol, shown=()):
    "What a class offers, one row a method; each row is the target of the links to it."
    rows = [m for m in symbol.members if m.doc or m.kind == "property" or m.params]
    if not rows: return ""
    out = ["| Member | What it gives |", "| --- | --- |"]
    for m in rows:
        target = "" if m.name in shown else anchor(m.name)
        says = " ".join(filter(None, [_cell(m.doc.split("\n\n")[0]), _cell(m.returns.doc) if m.returns and not m.doc else ""]))
        kind = f" → {_code(m.returns.type)}" if m.returns and m.returns.type else ""
        out.append(f"| {target}{_code(m.call.removeprefix(symbol.name))}{kind} | {says} |")
    return "\n".join(out)


def source_html(source):
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer
    code = highlight(source, PythonLexer(), HtmlFormatter(nowrap=True))
    return ('<details class="api-source"><summary>Source</summary><div class="highlight-python notranslate"><div class="highlight">'
            f"<pre>{code.rstrip()}\n</pre></div></div></details>")


def entry(symbol, level=3, shown=(), link=lambda text, own=(): text):
    "The reference entry of `symbol` as MyST Markdown."
    private = [a for a in (*symbol.anchors, *(m.name for m in symbol.members if not (m.doc or m.kind == "property" or m.params))) if a not in shown]
    is_class = symbol.kind in ("class", "dataclass")
    word = "class " if is_class else "property " if symbol.kind == "property" else ""
    based = f"({', '.join(symbol.bases)})" if is_class and symbol.call == symbol.name and symbol.bases else ""
    gives = f" -> {symbol.returns.type}" if symbol.returns and symbol.returns.type else ""
    head = word + wrap_call(symbol.call, word + gives) + based + gives
    own = {p.name.lstrip("*") for p in symbol.params} | {symbol.name}
    mention = lambda text: link(text, own)
    plain = symbol.name.isalnum()  # the heading has this anchor itself; an empty one before it would be what the search shows
    parts = ["".join(anchor(a) for a in ([] if plain else [symbol.name]) + private),
             f"{'#' * level} `{symbol.name}`",
             f"```{{code-block}} python\n:class: api-signature\n{head}\n```",
             mention(symbol.doc)]
    params = table(symbol.params, symbol.returns, "Field" if symbol.kind == "dataclass" else "Parameter", mention)
    if params: parts.append("```{div} api-table\n" + params + "\n```")
    members = member_table(symbol, shown) if is_class else ""
    if members: parts.append("```{div} api-table api-members\n" + members + "\n```")
    parts.append("```{raw} html\n" + source_html(symbol.source) + "\n```" if "```" not in symbol.source else
                 "~~~~{raw} html\n" + source_html(symbol.source) + "\n~~~~")
    return "\n\n".join(p for p in parts if p)
