"""`medusa tree`: a tree by name or by choices, and every form that is listed."""

import json

import pytest

from medusa_engine import cli_options
from medusa_engine.cli_options import parse_tree
from medusa_engine.cli_tree import FORMS
from medusa_kernels import Tree


def test_tree_show(medusa):
    code, out, _ = medusa("tree", "show", "4x3x2")
    assert (code, out.rstrip("\n")) == (0, Tree.named("4x3x2").render())
    assert out.startswith("41 nodes (1 + 4 + 12 + 24 by depth)")
    tree = Tree.from_choices([[0], [1], [0, 0]])
    assert medusa("tree", "show", "[[0], [1], [0, 0]]")[1].rstrip("\n") == tree.render()
    shown = json.loads(medusa("tree", "show", "medusa-7b-16", "--json")[1])
    assert shown["choices"] == Tree.named("medusa-7b-16").choices
    assert shown["parents"] == Tree.named("medusa-7b-16").parents.tolist()
    assert shown["depths"] == Tree.named("medusa-7b-16").depths.tolist()


def test_tree_list(medusa):
    lines = medusa("tree", "list")[1].splitlines()
    assert [line.split()[0] for line in lines] == [*FORMS, *Tree.names()]
    assert json.loads(medusa("tree", "list", "--json")[1]) == {"forms": FORMS, "names": Tree.names()}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_listed_is_a_tree(form):
    text = form.replace("AxBxC", "4x3x2").replace("N", "16").replace("K", "3")
    cli_options.check_tree(parse_tree(text))
