"""`medusa tree`: the trees that --tree takes, printed and drawn."""

from __future__ import annotations

import json

import click

from .cli_options import (
    CONTEXT,
    OutputFile,
    example_of,
    help_without_verb,
    parse_tree,
    verb,
)


@click.group(context_settings=CONTEXT, invoke_without_command=True, epilog=example_of("medusa tree show 4x3x2"))
@click.pass_context
def tree(context) -> None:
    """Speculation trees."""
    help_without_verb(context)


@verb(tree, "medusa tree show 4x3x2", short_help="Print or draw a tree.")
@click.argument("name")
@click.option(
    "--svg",
    type=OutputFile(allow_dash=True),
    is_flag=False,
    flag_value="-",
    metavar="[FILE]",
    help="Draw it and its mask as SVG; without FILE, print it.",
)
@click.option("--json", "as_json", is_flag=True, help="Choices, parents and depths as JSON.")
def show(name, svg, as_json) -> None:
    """Print the tree NAME: a named tree, chain-K, AxBxC, or choices as JSON."""
    from medusa_kernels import Tree

    try:
        parsed = parse_tree(name)
        chosen = Tree.from_choices(parsed) if isinstance(parsed, list) else Tree.named(name)
    except (ValueError, TypeError) as error:
        raise click.UsageError(str(error)) from error
    if svg:
        from .tree_svg import draw

        picture, printed = draw(chosen), str(svg) == "-"
        if not printed:
            svg.write_text(picture, encoding="utf-8")
            picture = str(svg)
        click.echo(json.dumps({"svg": picture}) if as_json else picture, nl=as_json or not printed)
    elif as_json:
        fields = {"choices": chosen.choices, "parents": chosen.parents.tolist(), "depths": chosen.depths.tolist()}
        click.echo(json.dumps(fields))
    else:
        click.echo(chosen.render())


FORMS = {
    "auto": "the fastest tree that `medusa calibrate` found here, or else a small one",
    "N": "the best known tree of at most N nodes, the root counted",
    "chain-K": "K nodes after the root, each the next head's best guess",
    "AxBxC": "dense: the A best guesses, after each the next head's B best, and so on",
    "dynamic-N": "at each step the N nodes that the heads find most probable",
    "[[0],[0,0],[1]]": "choices: every node's path of ranks, as JSON",
}


@verb(tree, "medusa tree list", "list", short_help="What --tree takes.")
@click.option("--json", "as_json", is_flag=True, help="Forms and names as JSON.")
def list_trees(as_json) -> None:
    """What --tree takes: forms, then names."""
    from medusa_kernels import Tree

    if as_json:
        click.echo(json.dumps({"forms": FORMS, "names": Tree.names()}))
        return
    for form, meaning in FORMS.items():
        click.echo(f"{form:<15}  {meaning}")
    click.echo("\n".join(Tree.names()))
