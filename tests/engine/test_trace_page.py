"""The trace page in a real headless Chromium: stepping, pointing, narrow and dark screens, and nothing from outside."""

import os
import re
import shutil
from pathlib import Path

import pytest

from medusa_engine import Medusa
from medusa_engine.sampling import SamplingOptions
from medusa_engine.trace import page, record
from medusa_kernels import Tree
from tests.engine.models import counting_folder, counting_heads_folder
from tests.engine.test_trace import CHOICES, HOSTILE

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")

NARROW, WIDE = {"width": 375, "height": 740}, {"width": 1200, "height": 900}


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright.sync_playwright() as driver:
        executable = found or driver.chromium.executable_path
        if not Path(executable).exists():
            pytest.skip("no Chromium on this machine: apt-get install chromium, or playwright install chromium")
        sandbox = [] if os.geteuid() else ["--no-sandbox"]  # Chromium's sandbox refuses root
        browser = driver.chromium.launch(executable_path=executable, args=sandbox)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def engine():
    heads = counting_heads_folder(patchy=True)
    return Medusa.from_pretrained(counting_folder(), heads, dtype="float32", tree=CHOICES)


@pytest.fixture(scope="module")
def trace(engine):
    return {**record(engine, "a", 45), "prompt": HOSTILE}


@pytest.fixture
def open_page(browser, tmp_path):
    """open_page(trace, **context) -> the loaded page. At the end: no error, no request but the file itself."""
    troubles, requests, contexts = [], [], []

    def open_it(trace: dict, **context):
        file = tmp_path / "trace.html"
        file.write_text(page(trace), encoding="utf-8")
        contexts.append(browser.new_context(**{"viewport": WIDE, **context}))
        opened = contexts[-1].new_page()
        opened.on("console", lambda message: troubles.append(message.text))
        opened.on("pageerror", lambda error: troubles.append(str(error)))
        opened.on("request", lambda request: requests.append(request.url))
        opened.goto(file.as_uri())
        return opened

    yield open_it
    for context in contexts:
        context.close()
    assert troubles == []
    assert requests == [(tmp_path / "trace.html").as_uri()] * len(contexts)


def step_shown(opened) -> int:
    return int(re.match(r"Step (\d+) of", opened.inner_text("#status"))[1])


def nodes_of(opened, kind: str) -> list[int]:
    return [int(g.get_attribute("data-node")) for g in opened.query_selector_all(f"#tree .node.{kind}")]


def test_what_is_shown(open_page, trace):
    opened = open_page(trace)
    assert opened.title() == "Medusa trace"  # the prompt's script did not run
    assert opened.inner_text("#prompt") == HOSTILE
    facts = f"45 tokens in {len(trace['steps'])} steps · {trace['tokens_per_step']:.2f} tokens a step · tree of 8 nodes"
    assert opened.inner_text("#facts") == f"{facts} · greedy · cpu float32"
    assert opened.text_content("#text") == trace["text"]
    for piece, step in zip(opened.query_selector_all("#text [role=button]"), trace["steps"], strict=True):
        assert piece.get_attribute("class") == f"piece n{len(step['tokens'])}"
    colours = opened.eval_on_selector_all("#legend .piece", "all => all.map(e => getComputedStyle(e).backgroundColor)")
    assert len(colours) == len(set(colours)) == max(len(step["tokens"]) for step in trace["steps"])


def test_every_step_shows_its_tree_and_its_reasons(open_page, trace):
    opened = open_page(trace)
    tree = Tree.from_choices(CHOICES)
    for index, step in enumerate(trace["steps"]):
        assert step_shown(opened) == index + 1
        assert opened.get_attribute("#text [aria-current=step]", "aria-label").startswith(f"Step {index + 1}, ")
        kinds = {"root": "root", "accepted": "accepted", "other": "rejected", "unreached": "unreached"}
        for why, kind in kinds.items():
            assert nodes_of(opened, kind) == [node for node, word in enumerate(step["why"]) if word == why]
        words = [text.text_content() for text in opened.query_selector_all("#tree .node text:first-of-type")]
        assert words == [trace["labels"][token][:9] for token in step["nodes"]]
        assert len(opened.query_selector_all("#tree .edge.accepted")) == len(step["path"]) - 1
        assert len(opened.query_selector_all("#mask .cell")) == tree.num_nodes + int(tree.depths.sum())
        items = opened.query_selector_all("#why li")
        assert len(items) == len(step["path"])
        for node, item in zip(step["path"], items, strict=True):
            codes = [code.text_content() for code in item.query_selector_all("code")]
            assert codes[:2] == [trace["labels"][step["nodes"][node]], trace["labels"][step["choice"][node]]]
            rejected = [i for i, parent in enumerate(tree.parents.tolist()) if parent == node and i not in step["path"]]
            assert codes[2:] == [trace["labels"][step["nodes"][i]] for i in rejected]
        opened.keyboard.press("ArrowRight")


def test_keys(open_page, trace):
    opened, last = open_page(trace), len(trace["steps"])
    for key, expected in [
        ("ArrowRight", 2),
        ("ArrowRight", 3),
        ("ArrowLeft", 2),
        ("End", last),
        ("ArrowRight", last),
        ("Home", 1),
        ("ArrowLeft", 1),
        ("Control+ArrowRight", 1),  # the browser's own
    ]:
        opened.keyboard.press(key)
        assert step_shown(opened) == expected
    opened.focus("#slider")
    opened.keyboard.press("ArrowRight")
    assert step_shown(opened) == 2  # the slider moves itself, once
    opened.keyboard.press("End")
    assert step_shown(opened) == last


def test_keyboard_alone_reaches_the_text(open_page, trace):
    """One tab stop for the whole text, and the arrows move the focus along in it."""
    opened = open_page(trace)
    opened.keyboard.press("Tab")
    for index in range(3):
        focused = opened.evaluate("document.activeElement.getAttribute('aria-label')")
        assert focused.startswith(f"Step {index + 1}, ")
        opened.keyboard.press("ArrowRight")
    opened.keyboard.press("Tab")
    assert opened.evaluate("document.activeElement.id") == "home"


def test_buttons_and_slider(open_page, trace):
    opened, last = open_page(trace), len(trace["steps"])
    assert opened.is_disabled("#home")
    assert opened.is_disabled("#back")
    opened.click("#next")
    assert step_shown(opened) == 2
    opened.click("#end")
    assert step_shown(opened) == last
    assert opened.is_disabled("#next")
    opened.click("#back")
    assert step_shown(opened) == last - 1
    opened.click("#home")
    assert step_shown(opened) == 1
    opened.fill("#slider", "4")
    assert step_shown(opened) == 4


def test_mouse(open_page, trace):
    """Hovering shows a step, leaving the text goes back to the one that was clicked."""
    opened = open_page(trace)
    pieces = opened.query_selector_all("#text [role=button]")
    pieces[4].hover()
    assert step_shown(opened) == 5
    pieces[2].click()
    pieces[6].hover()
    assert step_shown(opened) == 7
    opened.hover("h1")
    assert step_shown(opened) == 3
    opened.keyboard.press("ArrowRight")
    assert step_shown(opened) == 4


def test_a_node_and_its_row_of_the_mask(open_page, trace):
    opened = open_page(trace)
    step, tree = trace["steps"][0], trace["trees"][0]
    node = step["why"].index("other")
    opened.hover(f"#tree [data-node='{node}']")
    words = opened.inner_text("#details")
    token, parent = trace["labels"][step["nodes"][node]], tree["parents"][node]
    assert words.startswith(f"Node {node} {token}, guess {tree['ranks'][node] + 1} of head {tree['depths'][node]} (")
    assert f"rejected: the base model chose {trace['labels'][step['choice'][parent]]} (" in words
    assert opened.get_attribute("#mask .row", "y") == str(12 * node)
    opened.hover("h1")
    assert opened.inner_text("#details") == words  # it stays to be read
    opened.keyboard.press("ArrowRight")
    assert opened.query_selector("#mask .row") is None


def test_touch(open_page, trace):
    opened = open_page(trace, viewport=NARROW, has_touch=True, is_mobile=True)
    opened.query_selector_all("#text [role=button]")[3].tap()
    assert step_shown(opened) == 4
    opened.tap("#next")
    assert step_shown(opened) == 5
    opened.tap("#tree [data-node='0']")
    assert opened.inner_text("#details").startswith("Node 0 ")


CONTRASTS = """() => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (colour, under = [255, 255, 255]) => {
    context.clearRect(0, 0, 1, 1); context.fillStyle = colour; context.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = context.getImageData(0, 0, 1, 1).data;
    return [r, g, b].map((v, i) => v * a / 255 + under[i] * (1 - a / 255));
  };
  const light = (c) => c.map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => {
    const colour = getComputedStyle(e).backgroundColor;
    return colour === "rgba(0, 0, 0, 0)" && e.parentElement ? behind(e.parentElement) : rgb(colour);
  };
  const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05); };
  const found = {};
  const note = (name, value) => { found[name] = Math.min(value, found[name] ?? 99); };
  for (const e of document.querySelectorAll("p, h1, h2, li, td, th, caption, code, output, summary, .piece, button:enabled"))
    if (e.textContent.trim()) note(`${e.tagName}.${e.className}`, ratio(rgb(getComputedStyle(e).color), behind(e)));
  for (const text of document.querySelectorAll("#tree text"))
    note(text.parentElement.getAttribute("class"), ratio(rgb(getComputedStyle(text).fill), rgb(getComputedStyle(text.parentElement.querySelector(".box")).fill)));
  return found;
}"""  # noqa: E501


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [NARROW, WIDE], ids=["narrow", "wide"])
def test_readable(scheme, viewport, open_page, trace, tmp_path):
    """No sideways scrolling, contrast of at least 4.5 : 1 (WCAG AA), targets of 44 px, in both schemes."""
    opened = open_page(trace, viewport=viewport, color_scheme=scheme)
    opened.click("summary")
    opened.click("#next")
    assert opened.evaluate("document.documentElement.scrollWidth") == viewport["width"]
    contrasts = opened.evaluate(CONTRASTS)
    assert {"P.soft", "CODE.rejected", "CODE.accepted", "node rejected", "node unreached"} <= set(contrasts)
    assert {name: ratio for name, ratio in contrasts.items() if ratio < 4.5} == {}
    for button in opened.query_selector_all(".bar button, .bar input"):
        assert button.bounding_box()["height"] >= 44
    background = opened.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", background)))
    assert (brightness < 120) == (scheme == "dark")
    picture = opened.screenshot(path=tmp_path / "page.png", full_page=True)
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000  # not a blank page


def test_names_for_those_who_cannot_see_it(open_page, trace):
    opened = open_page(trace)
    unnamed = opened.evaluate(
        """() => [...document.querySelectorAll("button, input, svg, section, nav, [role=region], [role=button]")]
            .filter((e) => !(e.getAttribute("aria-label") ?? "").trim() && !e.getAttribute("aria-labelledby"))
            .map((e) => e.outerHTML)"""
    )
    assert unnamed == []
    assert opened.evaluate(
        "[...document.querySelectorAll('[aria-labelledby]')].every((e) => "
        "document.getElementById(e.getAttribute('aria-labelledby')))"
    )
    assert opened.get_attribute("#status", "aria-live") == "polite"
    assert opened.get_attribute("html", "lang") == "en"


def test_the_histograms(open_page, trace):
    opened = open_page(trace)
    rows = opened.query_selector_all("#lengths tbody tr")
    shown = [row.query_selector("td").text_content() for row in rows]
    assert shown == [str(count) for count in trace["histogram"]["accept_length"]]
    heads = opened.query_selector_all("#heads tbody tr")
    for row, head in zip(heads, trace["histogram"]["heads"], strict=True):
        right = row.query_selector("td").text_content()
        assert right.startswith(f"{sum(head['ranks'])} of {head['tried']} (" if head["tried"] else "never reached")


def test_typical_acceptance_says_what_a_token_needs(open_page, engine):
    options = SamplingOptions(mode="typical", temperature=6.0, posterior_threshold=0.02, posterior_alpha=0.5, seed=3)
    trace = record(engine, "a", 30, options)
    opened = open_page(trace)
    assert "typical, temperature 6" in opened.inner_text("#facts")
    index = next(i for i, step in enumerate(trace["steps"]) if "threshold" in step["why"])
    for _ in range(index):
        opened.keyboard.press("ArrowRight")
    assert ", needs " in opened.inner_text("#why")


def test_a_text_without_steps(open_page, engine):
    opened = open_page(record(engine, "a", 1))
    assert opened.text_content("#text") == "b"
    assert not opened.is_visible("#steps")
    opened.keyboard.press("ArrowRight")


def test_the_root_alone(open_page):
    engine = Medusa.from_pretrained(counting_folder(), counting_heads_folder(), dtype="float32", tree="root")
    opened = open_page(record(engine, "a", 4))
    opened.keyboard.press("End")
    assert step_shown(opened) == 3
    assert nodes_of(opened, "root") == [0]


def test_trees_that_change(open_page):
    heads = counting_heads_folder(patchy=True)
    engine = Medusa.from_pretrained(counting_folder(), heads, dtype="float32", tree="dynamic-6")
    trace = record(engine, "a", 40)
    opened = open_page(trace)
    assert f"{len(trace['trees'])} trees of 6 nodes" in opened.inner_text("#facts")
    for step in trace["steps"]:
        visible = trace["trees"][step["tree"]]["visible"]
        assert len(opened.query_selector_all("#mask .cell")) == sum(map(len, visible))
        assert nodes_of(opened, "accepted") == step["path"][1:]
        opened.keyboard.press("ArrowRight")


def test_guesses_without_probabilities(open_page):
    engine = Medusa.from_pretrained(counting_folder(), draft="prompt-lookup", dtype="float32", tree="chain-2")
    opened = open_page(record(engine, "abcdefghijklma", 8))
    assert opened.query_selector("#tree [data-node='1'] text:last-of-type").text_content() == "–"
