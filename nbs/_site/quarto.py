"The Quarto notation that the notebooks use, in the words of MyST: callouts, figures, cross references, cell options."
import html, re

import yaml

KINDS = {"note": "note", "tip": "tip", "warning": "warning", "caution": "caution", "important": "important"}
_fence = re.compile(r"^\s*(```+|~~~+)")
_open = re.compile(r"^(:{3,})\s*(?:\{([^}]*)\}|(\w[\w-]*))?\s*$")
_heading = re.compile(r"^(#{1,6})\s+(.*?)\s*(\{[^}]*\})?\s*$")


def outside_code(text, change):
    "Apply `change` to every line of `text` that is not inside a fenced block."
    out, fence = [], None
    for line in text.split("\n"):
        m = _fence.match(line)
        if fence:
            if m and m[1].startswith(fence) and not line.strip().strip(fence[0]): fence = None
        elif m: fence = m[1]
        else: line = change(line)
        out.append(line)
    return "\n".join(out)


def attributes(text):
    "`.callout-note #id title=\"A b\"` as (classes, id, options)."
    options = {k: a or b or c for k, a, b, c in re.findall(r"([\w-]+)=(?:\"([^\"]*)\"|'([^']*)'|(\S+))", text)}
    rest = re.sub(r"[\w-]+=(?:\"[^\"]*\"|'[^']*'|\S+)", " ", text)
    return re.findall(r"\.([\w-]+)", rest), next(iter(re.findall(r"#([\w-]+)", rest)), None), options


def _callout(classes, options, body):
    kind = next((KINDS[c.removeprefix("callout-")] for c in classes if c.removeprefix("callout-") in KINDS), "note")
    title = options.get("title")
    lines = [*body]
    while lines and not lines[0].strip(): lines.pop(0)
    if not title and lines and (m := _heading.match(lines[0])): title, lines = m[2], lines[1:]
    css = [kind] + (["dropdown"] if options.get("collapse") == "true" else [])
    if title: return f"{{admonition}} {title}", [f":class: {' '.join(css)}", "", *lines]
    return f"{{{kind}}}", [*([":class: dropdown"] if "dropdown" in css else []), *lines]


def divs(text):
    "Fenced divs become directives; the colons grow towards the outside, as MyST wants it."
    def parse(lines, i, inside):
        out, depth, fence = [], 0, None
        while i < len(lines):
            line, m = lines[i], _fence.match(lines[i])
            if fence:
                if m and m[1].startswith(fence): fence = None
            elif m: fence = m[1]
            elif o := _open.match(line):
                if o[2] is None and o[3] is None:
                    if inside: return out, i + 1, depth
                else:
                    body, i, below = parse(lines, i + 1, True)
                    classes, _, options = attributes(o[2] or f".{o[3]}")
                    head, body = _callout(classes, options, body) if any(c.startswith("callout") for c in classes) else (f"{{div}} {' '.join(classes)}", body)
                    bar = ":" * (3 + below)
                    out += [bar + head, *body, bar]
                    depth = max(depth, below + 1)
                    continue
            out.append(line); i += 1
        return out, i, depth
    return "\n".join(parse(text.split("\n"), 0, False)[0])


def slug(title):
    "The anchor that pandoc gives a heading."
    text = re.sub(r"`([^`]*)`", r"\1", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title))
    text = re.sub(r"[^\w\s.-]", "", text).lower()
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", text.strip()))


def docutils_slug(title):
    "The anchor that Sphinx gives it."
    text = re.sub(r"`([^`]*)`", r"\1", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)).lower()
    return re.sub(r"^[-0-9]+|-+$", "", re.sub(r"[^a-z0-9]+", "-", text))


def headings(text):
    "Give a heading the anchors that Quarto would, where Sphinx makes another one; drop `{.unnumbered}` and the like."
    def change(line):
        m = _heading.match(line)
        if not m: return line
        named = attributes(m[3][1:-1])[1] if m[3] else None
        want = named or slug(m[2])
        mark = f'<a class="anchor" id="{want}"></a>\n\n' if want and want != docutils_slug(m[2]) else ""
        return f"{mark}{m[1]} {m[2]}"
    return outside_code(text, change)


def references(text, page, figures):
    "`@fig-x` becomes a numbered reference; figures are known to all pages, so their names carry the page."
    def one(m): return f"{{numref}}`{page}-{m[1]}`" if m[1] in figures else m[0]
    return outside_code(text, lambda line: re.sub(r"(?<![\w`@])\[?-?@(fig-[\w-]*\w)\]?", one, line))


def links(text, page_of, here):
    "Links to notebooks become links to their pages, and Quarto's link attributes go."
    def one(m):
        target, _, anchor = m[2].partition("#")
        url = page_of(target, here)
        return f"[{m[1]}]({url}{'#' + anchor if anchor else ''})" if url else f"[{m[1]}]({m[2]})"
    def change(line):
        line = re.sub(r"(\]\([^)\s]+\))\{[^}]*\}", r"\1", line)
        return re.sub(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)", one, line)
    return outside_code(text, change)


def images(text, page):
    "`![caption](file){#fig-x fig-alt=\"…\"}` on a line of its own becomes a figure."
    def change(line):
        m = re.match(r"^!\[(.*)\]\((\S+?)\)(?:\{([^}]*)\})?\s*$", line)
        if not m: return line
        _, name, options = attributes(m[3] or "")
        if not (name or m[1]): return line
        head = [f"```{{figure}} {m[2]}"] + ([f":name: {page}-{name}"] if name else [])
        head += [f":{k}: {v}" for k, v in (("alt", options.get("fig-alt") or m[1]), ("width", options.get("width"))) if v]
        return "\n".join([*head, "", m[1], "```"])
    return outside_code(text, change)


def flows(text):
    "A fenced line of steps joined by arrows, `a ─► b ─► c`, becomes a row of steps that wraps on a narrow screen."
    def one(m):
        steps = "".join(f"<li>{html.escape(s.strip())}</li>" for s in m[1].split("─►"))
        return f'```{{raw}} html\n<ol class="flow">{steps}</ol>\n```'
    return re.sub(r"^```\n([^\n]*─►[^\n]*)\n```$", one, text, flags=re.M)


def cell_options(source):
    "The `#|` lines of a code cell as a mapping, and the cell without them."
    lines = source.split("\n")
    marks = [l for l in lines if re.match(r"^\s*#\|", l)]
    rest = "\n".join(l for l in lines if not re.match(r"^\s*#\|", l)).strip("\n")
    options = {}
    for line in (m.split("#|", 1)[1].strip() for m in marks):
        try: value = yaml.safe_load(line)
        except yaml.YAMLError: value = None
        if isinstance(value, dict): options.update(value)
        elif ":" in line: key, text = line.split(":", 1); options[key.strip()] = text.strip().strip("\"'")
        else: options[line] = True
    return options, rest


def code_cell(cell, options, page):
    "Put what the cell options ask for into the words of MyST-NB; false means that the cell is not shown at all."
    if str(options.get("include", True)).lower() == "false": return False
    no = lambda key: str(options.get(key, True)).lower() == "false"
    tags = [t for key, t in (("echo", "remove-input"), ("output", "remove-output"), ("warning", "remove-stderr")) if no(key)]
    if str(options.get("code-fold", "false")).lower() in ("true", "show") and not no("echo"): tags.append("hide-input")
    more = {}
    if caption := options.get("fig-cap"):
        more["figure"] = {"caption": str(caption), **({"name": f"{page}-{options['label']}"} if options.get("label") else {})}
    if alt := options.get("fig-alt") or options.get("fig-cap"): more["image"] = {"alt": str(alt)}
    if summary := options.get("code-summary"): more |= {"code_prompt_show": str(summary), "code_prompt_hide": str(summary)}
    cell.metadata = {**({"tags": tags} if tags else {}), **({"mystnb": more} if more else {})}
    return True
