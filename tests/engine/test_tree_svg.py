"""A tree and its mask as SVG: every node at a place of its own, every set bit of the mask a cell, well-formed XML."""

import json
import xml.etree.ElementTree as ET
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medusa_engine.tree_svg import draw, layout, visible
from medusa_kernels import Tree

SVG = "{http://www.w3.org/2000/svg}"
TREES = ["root", "chain-4", "4x3x2", "medusa-7b-64", "15x16"]


@st.composite
def trees(draw_from) -> Tree:
    paths: set[tuple[int, ...]] = set()
    for _ in range(draw_from(st.integers(0, 30))):
        parent = draw_from(st.sampled_from(sorted(paths | {()})))
        paths.add((*parent, draw_from(st.integers(0, 3))))
    return Tree.from_choices([list(path) for path in paths])


@given(trees())
def test_layout(tree):
    places = layout(tree)
    assert len(set(places)) == tree.num_nodes
    assert [column for column, _ in places] == tree.depths.tolist()
    leaves = [line[line >= 0][-1].item() for line in tree.retrieve_indices]
    assert sorted(places[leaf][1] for leaf in leaves) == list(range(len(leaves)))
    first = {}
    for node, parent in enumerate(tree.parents.tolist()):
        if node:
            first.setdefault(parent, node)
            assert places[node][1] >= places[parent][1]
    assert all(places[parent][1] == places[child][1] for parent, child in first.items())


def line_to(tree: Tree, node: int) -> list[int]:
    line = [node]
    while line[-1]:
        line.append(int(tree.parents[line[-1]]))
    return line[::-1]


@pytest.mark.parametrize("name", TREES)
def test_visible_is_the_mask(name):
    tree = Tree.named(name)
    assert visible(tree) == [line_to(tree, node) for node in range(tree.num_nodes)]


@pytest.mark.parametrize("name", TREES)
def test_the_picture(name):
    tree = Tree.named(name)
    root = ET.fromstring(draw(tree))
    width, height = float(root.get("width")), float(root.get("height"))
    assert root.get("viewBox") == f"0 0 {width:g} {height:g}"
    boxes = {kind: [r for r in root.iter(f"{SVG}rect") if r.get("class") == kind] for kind in ("node", "seen", "self")}
    assert len(boxes["node"]) == len(root.findall(f".//{SVG}path")) == tree.num_nodes - 1
    assert len(boxes["self"]) == tree.num_nodes
    assert len(boxes["seen"]) == sum(tree.depths.tolist())
    titles = [title.text for title in root.iter(f"{SVG}title")]
    assert f"node 0: {'root'}" in titles
    assert all(f"node {i}: {','.join(map(str, path))}" in titles for i, path in enumerate(tree.choices, start=1))
    for group in root.findall(f"{SVG}g"):
        x, y = (float(v) for v in group.get("transform")[len("translate(") : -1].split())
        for rect in group.iter(f"{SVG}rect"):
            assert 0 <= x + float(rect.get("x", 0)) + float(rect.get("width")) <= width
            assert 0 <= y + float(rect.get("y", 0)) + float(rect.get("height")) <= height


@pytest.fixture
def show(medusa):
    return partial(medusa, "tree", "show")


def test_the_command(show, tmp_path):
    file = tmp_path / "tree.svg"
    assert show("4x3x2", "--svg", file) == (0, f"{file}\n", "")
    assert file.read_text(encoding="utf-8") == draw(Tree.named("4x3x2"))
    assert show("4x3x2", "--svg") == (0, draw(Tree.named("4x3x2")), "")
    code, out, _ = show("[[0], [1]]", "--svg", file, "--json")
    assert (code, json.loads(out)) == (0, {"svg": str(file)})
    assert file.read_text(encoding="utf-8") == draw(Tree.from_choices([[0], [1]]))
    assert json.loads(show("chain-1", "--svg", "--json")[1]) == {"svg": draw(Tree.named("chain-1"))}


def test_a_file_that_cannot_be_written(show, tmp_path):
    code, out, err = show("4x3x2", "--svg", tmp_path / "no" / "tree.svg")
    assert (code, out) == (2, "")
    assert "there is no folder" in err
