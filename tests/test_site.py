"The docs site: every link alive, nothing from another host, and a browser that sees no error on desk and phone, by day and night."
import ast, functools, http.server, re, shutil, sys, threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root / "nbs" / "_site"))
import apidoc, build

pytestmark = pytest.mark.site
docs = root / "_docs"
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync".split()


def inputs():
    "Everything that the site is made from."
    return [root / "_quarto.yml", *(root / "mixbook").glob("*.py"), *(build.nbs / p for p in build.notebooks()),
            *(p for p in build.here.rglob("*") if p.is_file() and "__pycache__" not in p.parts)]


def fresh():
    mark = docs / ".buildinfo"  # written by Sphinx only
    return mark.exists() and (docs / "llms.txt").exists() and mark.stat().st_mtime > max(p.stat().st_mtime for p in inputs())


@pytest.fixture(scope="session")
def site():
    "The folder of the built site; one worker builds, the others wait."
    with build.only_one():
        if not fresh(): build.build_sphinx()
    return docs


class Links(HTMLParser):
    "What a page points to, what it loads, and where one may land on it."

    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.ids, self.images, self.text = [], [], set(), [], []
        self.skip = 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a[k] for k in ("id", "name") if a.get(k)}
        if tag in ("script", "style"): self.skip += 1
        if tag == "a" and a.get("href"): self.links.append(a["href"])
        if tag == "link" and a.get("href") and a.get("rel") not in ("next", "prev", "search", "index", "canonical", "author"): self.loads.append(a["href"])
        if tag in ("script", "img", "iframe", "source", "video", "audio", "embed") and a.get("src"): self.loads.append(a["src"])
        if tag == "img": self.images.append(a)

    def handle_endtag(self, tag):
        if tag in ("script", "style"): self.skip -= 1

    def handle_data(self, data):
        if not self.skip: self.text.append(data)


@pytest.fixture(scope="session")
def pages(site):
    return {p.relative_to(site).as_posix(): Links(p.read_text(encoding="utf-8")) for p in site.rglob("*.html") if "_static" not in p.parts}


def test_every_notebook_has_its_page(pages):
    missing = [p.as_posix() for p in build.notebooks() if f"{build.page_name(p)}.html" not in pages]
    assert not missing and len(pages) > 3


def test_links_and_anchors_are_alive(site, pages):
    dead = []
    for name, page in pages.items():
        for href in page.links + page.loads:
            if urlsplit(href).scheme or href.startswith("//"): continue
            url = urlsplit(urljoin(f"/{name}", href))
            target = unquote(url.path).lstrip("/") or "index.html"
            if not (site / target).is_file(): dead.append(f"{name} → {href}")
            elif url.fragment and target in pages and unquote(url.fragment) not in pages[target].ids: dead.append(f"{name} → {href} (no such anchor)")
    assert not dead, "\n".join(sorted(set(dead)))


def test_no_link_leaves_for_the_sites_own_address(pages):
    "Links that nbdev writes with the public address are made relative, or a copy on a disk would lead elsewhere."
    base = build.website()["site-url"]
    assert not [f"{n} → {h}" for n, p in pages.items() for h in p.links if h.startswith(base)]


def test_nothing_is_loaded_from_another_host(site, pages):
    away = [f"{n} → {h}" for n, p in pages.items() for h in p.loads if re.match(r"(https?:)?//", h)]
    for css in site.rglob("*.css"):
        away += [f"{css.name} → {m}" for m in re.findall(r"(?:url\(|@import)\s*[\"']?((?:https?:)?//[^\"')]+)", css.read_text(encoding="utf-8", errors="replace"))]
    assert not away, "\n".join(away)


def test_api_pages_document_every_exported_function(pages):
    checked = 0
    for path in build.notebooks():
        m = re.search(r"#\| *default_exp +(\w+)", (build.nbs / path).read_text(encoding="utf-8"))
        if not m: continue
        file = root / "mixbook" / f"{m[1]}.py"
        names = next(ast.literal_eval(n.value) for n in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__")
        page = pages[f"{build.page_name(path)}.html"]
        text = " ".join(page.text)
        for name in set(names) & set(apidoc.module(file).symbols):
            assert name.lower() in page.ids, f"{path}: no anchor for {name}"
            assert name in text
            checked += 1
    assert checked > 20


def test_nothing_is_left_untranslated(pages):
    "Quarto's and MyST's own notation, helper reprs and widgets are gone from what a reader sees."
    left = []
    for name, page in pages.items():
        text = "".join(page.text)
        for sign in (r"^:::", r"\{\.callout", r"^#\| ", r"(?<!\w)@fig-", r"\{numref\}", r"_GeneratorContextManager", r"application/vnd\.jupyter", r"\{target="):
            left += [f"{name}: {m}" for m in re.findall(rf"{sign}.*", text, re.M)[:2]]
    assert not left, "\n".join(left)


def test_figures_have_words(pages):
    bare = [f"{n}: {i.get('src')}" for n, p in pages.items() for i in p.images if not i.get("alt") or re.fullmatch(r"(\.\./)*_images/.*", i["alt"])]
    assert not bare, "figures without alt text:\n" + "\n".join(bare)


def test_llms_txt_lists_pages_that_exist(site):
    text = (site / "llms.txt").read_text(encoding="utf-8")
    files = re.findall(r"\]\(([^)]+)\)", text)
    assert len(files) > 3 and all((site / f).is_file() for f in files)
    assert "check_runs" in (site / "core.html.md").read_text(encoding="utf-8")


# ---------------------------------------------------------------- in a browser

@pytest.fixture(scope="session")
def address(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *a): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="session")
def browser():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"))), None)
    if not found: pytest.skip("no Chromium on this machine: the links are checked, the pages were not opened")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as p:
        b = p.chromium.launch(executable_path=found, args=FLAGS)
        yield b
        b.close()


@pytest.fixture
def look(browser, address):
    "A page in a given width and scheme, and what went wrong on it so far."
    opened = []

    def start(width=1280, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 860}, color_scheme=scheme, has_touch=width < 600)
        page, wrong = context.new_page(), []
        page.on("console", lambda m: wrong.append(f"{page.url}: console {m.text}") if m.type == "error" else None)
        page.on("pageerror", lambda e: wrong.append(f"{page.url}: {e}"))
        page.on("requestfailed", lambda r: None if "ERR_ABORTED" in (r.failure or "") else wrong.append(f"{page.url}: failed {r.url}"))  # aborted: we left the page first
        page.on("response", lambda r: wrong.append(f"{page.url}: {r.status} {r.url}") if r.status >= 400 else None)
        page.on("request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else wrong.append(f"{page.url}: asked {r.url}"))
        opened.append(context)
        return page, wrong

    yield start
    for c in opened: c.close()


OVERFLOW = """async () => {
  if (window.MathJax && MathJax.startup) await MathJax.startup.promise;
  const wide = [...document.querySelectorAll('.bd-article *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1
    && !e.closest('pre, table, .cell_output, mjx-container, .pst-scrollable-table-container, .api-table, .names-table')).map(e => e.tagName + '.' + e.className);
  return [document.documentElement.scrollWidth - document.documentElement.clientWidth, wide.slice(0, 3).join(' ')];
}"""


@pytest.mark.parametrize("width,scheme,every", [(1280, "light", 2), (390, "dark", 1), (1280, "dark", 5), (390, "light", 5)])
def test_pages_open_without_a_complaint(look, address, pages, width, scheme, every):
    page, wrong = look(width, scheme)
    names = sorted(n for n in pages if n != "search.html")
    for name in ["index.html", *names[::every]]:
        page.goto(address + name, wait_until="load")
        assert page.evaluate("document.documentElement.dataset.theme") == scheme
        over, what = page.evaluate(OVERFLOW)
        if over > 0: wrong.append(f"{name} is {over} px wider than a screen of {width} px: {what}")
    assert not wrong, "\n".join(wrong)


def test_formulas_are_typeset_without_a_network(look, address, site):
    name = next((p.relative_to(site).as_posix() for p in sorted(site.rglob("*.html")) if 'class="math' in p.read_text(encoding="utf-8")), None)
    assert name, "no page with a formula"
    page, wrong = look()
    page.goto(address + name)
    page.wait_for_selector("mjx-container", timeout=20000)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("word,width", [("weights", 1280), ("mixture", 390)])
def test_search_finds_a_page_and_its_link_works(look, address, word, width):
    page, wrong = look(width)
    page.goto(address + "index.html")
    page.locator("button.search-button__button:visible, button.search-button:visible").first.click()
    page.locator("dialog input[type=search]").first.fill(word)
    page.keyboard.press("Enter")
    page.wait_for_url("**/search.html?*")
    page.wait_for_selector("#search-results ul.search li a", timeout=20000)
    page.locator("#search-results ul.search li a").first.click()
    page.wait_for_load_state("load")
    assert "search.html" not in page.url and word in page.inner_text("body").lower()
    assert not wrong, "\n".join(wrong)


def test_navigation_on_a_phone(look, address):
    page, wrong = look(390, "dark")
    page.goto(address + "core.html")
    page.locator("button.primary-toggle").click()
    link = page.locator("dialog a:visible", has_text="API").first
    link.click()
    page.wait_for_url("**/api.html")
    assert not wrong, "\n".join(wrong)


def test_theme_switch_source_and_copy_button(look, address):
    page, wrong = look()
    page.goto(address + "core.html")
    page.locator("button.theme-switch-button").first.click()
    page.locator("button.theme-change-button[data-mode=dark]:visible").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.locator("details.api-source summary").first.click()
    assert page.locator("details.api-source[open] pre").first.is_visible()
    assert page.locator("button.copybtn").count() > 3
    assert not wrong, "\n".join(wrong)
