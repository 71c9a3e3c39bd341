"""A speculation tree and its attention mask as a picture: `medusa tree show --svg`, and the trace page's layout."""

from __future__ import annotations

from html import escape

from medusa_kernels import Tree

COLUMN, ROW, BOX_WIDTH, BOX_HEIGHT = 84, 26, 60, 20
CELL, MARGIN, CAPTION = 12, 16, 22
PREFIX_CELLS = 2  # how wide the committed prefix is drawn beside the nodes' columns

STYLE = """
svg { background: #ffffff; font: 11px ui-monospace, monospace; }
text { fill: #1a2330; }
.caption { font: 13px system-ui, sans-serif; }
.edge { fill: none; stroke: #8794a5; stroke-width: 1.5; }
.node { fill: #e4eefb; stroke: #4477b0; }
.root { fill: #4477b0; }
.root + text { fill: #ffffff; }
.grid { fill: none; stroke: #8794a5; }
.seen { fill: #4477b0; }
.self { fill: #c2410c; }
.prefix { fill: #b9cbe0; }
@media (prefers-color-scheme: dark) {
  svg { background: #11161d; }
  text { fill: #e6edf3; }
  .node { fill: #1c2c40; stroke: #6ea3dd; }
  .root { fill: #6ea3dd; }
  .root + text { fill: #11161d; }
  .seen { fill: #6ea3dd; }
  .self { fill: #fb923c; }
  .prefix { fill: #34465c; }
}
"""


def layout(tree: Tree) -> list[tuple[int, int]]:
    """(column, row) of every node: its depth, and the row of its first child; leaves have a row each, depth first.

    The path of best guesses is therefore the straight line along the top, and no two nodes share a place.
    """
    children, rows = tree.children, [0] * tree.num_nodes
    leaves = 0
    stack = [0]
    while stack:
        node = stack.pop()
        rows[node] = leaves
        if not children[node]:
            leaves += 1
        stack += reversed(children[node])
    return list(zip(tree.depths.tolist(), rows, strict=True))


def visible(tree: Tree) -> list[list[int]]:
    """The nodes that each node attends to, itself included, ascending: the set bits of `Tree.mask_words`."""
    bits = [sum((word % 2**64) << 64 * i for i, word in enumerate(words)) for words in tree.mask_words.tolist()]
    return [[node for node in range(tree.num_nodes) if row >> node & 1] for row in bits]


def draw(tree: Tree) -> str:
    """One SVG document: the tree, each node labelled by its head's rank, and beside it the mask, a row per node."""
    places = layout(tree)
    tree_width = COLUMN * tree.max_depth + BOX_WIDTH
    tree_height = ROW * max(row for _, row in places) + BOX_HEIGHT
    mask_width = CELL * (PREFIX_CELLS + tree.num_nodes)
    mask_x = 2 * MARGIN + tree_width + 24
    width = mask_x + max(mask_width, 190) + MARGIN
    height = 2 * MARGIN + CAPTION + max(tree_height, CELL * tree.num_nodes)
    top = MARGIN + CAPTION
    title = f"A tree of {tree.num_nodes} nodes and depth {tree.max_depth}, and its attention mask"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-labelledby="title">',
        f'<title id="title">{escape(title)}</title>',
        f"<style>{STYLE}</style>",
        f'<text class="caption" x="{MARGIN}" y="{MARGIN + 6}">{tree.num_nodes} nodes</text>',
        f'<g transform="translate({MARGIN} {top})">{_nodes(tree, places)}</g>',
        f'<text class="caption" x="{mask_x}" y="{MARGIN + 6}">prefix, then nodes seen by each</text>',
        f'<g transform="translate({mask_x} {top})">{_mask(tree)}</g>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _nodes(tree: Tree, places: list[tuple[int, int]]) -> str:
    parts = []
    parents = tree.parents.tolist()
    for node, (column, row) in enumerate(places[1:], start=1):
        from_column, from_row = places[parents[node]]
        start, end = COLUMN * from_column + BOX_WIDTH, COLUMN * column
        y, middle = ROW * row + BOX_HEIGHT / 2, (COLUMN * from_column + BOX_WIDTH + COLUMN * column) / 2
        from_y = ROW * from_row + BOX_HEIGHT / 2
        parts.append(f'<path class="edge" d="M{start} {from_y:g}H{middle:g}V{y:g}H{end}"/>')
    for node, ((column, row), path) in enumerate(zip(places, [[], *tree.choices], strict=True)):
        x, y = COLUMN * column, ROW * row
        shown = ",".join(map(str, path)) or "root"
        kind, label = ("node", f"rank {path[-1]}") if node else ("root", "root")
        parts.append(
            f'<g><title>node {node}: {shown}</title><rect class="{kind}" x="{x}" y="{y}" width="{BOX_WIDTH}" '
            f'height="{BOX_HEIGHT}" rx="4"/><text x="{x + BOX_WIDTH / 2:g}" y="{y + 14}" text-anchor="middle">{label}'
            f"</text></g>"
        )
    return "".join(parts)


def _mask(tree: Tree) -> str:
    size, offset = CELL * tree.num_nodes, CELL * PREFIX_CELLS
    parts = [f'<rect class="prefix" width="{offset - 2}" height="{size}"><title>the committed prefix</title></rect>']
    for row, nodes in enumerate(visible(tree)):
        for node in nodes:
            kind = "self" if node == row else "seen"
            x, y = offset + CELL * node, CELL * row
            parts.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{CELL - 1}" height="{CELL - 1}"/>')
    parts.append(f'<rect class="grid" x="{offset - 0.5}" y="-0.5" width="{size}" height="{size}"/>')
    return "".join(parts)
