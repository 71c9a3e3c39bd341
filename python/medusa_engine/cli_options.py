"""What the verbs of `medusa` share: their options, and what is refused before any work.

PyTorch is imported only where a verb runs.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import sys
from pathlib import Path

import click

# As medusa_kernels, which knows more of them, is not imported for --help.
MODES = ("greedy", "typical", "lossless")
BACKENDS = ("auto", "reference", "cpu", "cuda", "triton")
DTYPES = ("float32", "bfloat16", "float16", "int8")
_DYNAMIC = re.compile(r"dynamic-([0-9]{1,9})")
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


def example_of(text: str) -> str:
    """The end of a help page: an example, kept as it is written."""
    return f"\b\nExample:\n  {text}"


def verb(group: click.Group, example: str, name: str | None = None, *, short_help: str):
    """A verb of the group. `short_help` is its line in the group's help, where click would cut the first sentence."""
    return group.command(name, context_settings=CONTEXT, epilog=example_of(example), short_help=short_help)


def help_without_verb(context: click.Context) -> None:
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@contextlib.contextmanager
def mistakes():
    """What is refused in here, while arguments are prepared and a model is loaded, is the user's mistake: one line and
    exit code 2. A ValueError from the work that follows is a bug, and shows where it comes from.
    """
    from .errors import ModelFetchError

    try:
        yield
    except (ValueError, ModelFetchError) as error:
        raise click.UsageError(str(error)) from error


def given(name: str) -> bool:
    """Whether the option stands on the command line."""
    return click.get_current_context().get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


def parse_tree(text: str) -> str | int | list:
    """The `tree` argument of from_pretrained that a command-line word stands for."""
    if re.fullmatch("[0-9]+", text):
        return int(text)
    if not text.startswith("["):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{text!r:.60} is no valid JSON list of choices: {error}") from None


def check_tree(tree: str | int | list) -> None:
    """Raises ValueError or TypeError for what can be no tree, whatever the model."""
    if tree == "auto":
        return
    from medusa_kernels import Tree
    from medusa_kernels.tree import MAX_NODES

    dynamic = isinstance(tree, str) and _DYNAMIC.fullmatch(tree)
    if dynamic or isinstance(tree, int):
        nodes = int(dynamic[1]) if dynamic else tree
        if not 1 <= nodes <= MAX_NODES:
            raise ValueError(f"the number of nodes, the root counted, must be between 1 and {MAX_NODES}, not {nodes}")
    elif isinstance(tree, str):
        Tree.named(tree)
    else:
        Tree.from_choices(tree)


class TreeWord(click.ParamType):
    """Whatever `parse_tree` takes and can be a tree."""

    name = "tree"

    def convert(self, value, param, ctx):
        if not isinstance(value, str):
            return value
        try:
            tree = parse_tree(value)
            check_tree(tree)
        except (ValueError, TypeError) as error:
            self.fail(str(error), param, ctx)
        return tree


class DraftWord(click.ParamType):
    """A source of guesses that may exist; whether it fits the model is seen later."""

    name = "source"

    def convert(self, value, param, ctx):
        if value != "medusa":
            from .draft_choice import check_word

            try:
                check_word(value)
            except ValueError as error:
                self.fail(str(error), param, ctx)
        return value


class DraftWords(click.ParamType):
    """SOURCE[@TREE],...: a list of (draft, tree)."""

    name = "sources"

    def convert(self, value, param, ctx):
        if not isinstance(value, str):
            return value
        sources = re.split(r",(?![^@]*\])", value)  # not at the commas of choices, which hold no @
        pairs = [source.partition("@") for source in sources]
        return [
            (DraftWord().convert(draft, param, ctx), TreeWord().convert(tree or "auto", param, ctx))
            for draft, _, tree in pairs
        ]


class Number(click.FloatRange):
    """A float in a range, and neither NaN nor infinite."""

    def convert(self, value, param, ctx):
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number.", param, ctx)
        return number


class OutputFile(click.Path):
    """A file that is written at the end: whether it can be is asked before the work.

    `parents`: the writer makes the folders that are missing.
    """

    def __init__(self, *, parents: bool = False, **options):
        super().__init__(dir_okay=False, readable=False, path_type=Path, **options)
        self.parents = parents

    def convert(self, value, param, ctx):
        path = super().convert(value, param, ctx)
        if str(path) == "-" and self.allow_dash:
            return path
        there = path if path.exists() else path.absolute().parent
        if not there.exists() and self.parents:
            there = next(parent for parent in there.parents if parent.exists())
        if not there.exists():
            self.fail(f"{path} cannot be written: there is no folder {there}.", param, ctx)
        if there != path and not there.is_dir():
            self.fail(f"{path} cannot be written: {there} is no folder.", param, ctx)
        if not os.access(there, os.W_OK):
            self.fail(f"{path} cannot be written: {there} does not permit it.", param, ctx)
        return path


def _with(options, command):
    """The command with these options, listed in this order by --help."""
    for option in reversed(options):
        command = option(command)
    return command


def prompt_argument(command):
    return click.argument("prompt", callback=_read_prompt)(command)


def _read_prompt(context, parameter, value: str) -> str:
    with mistakes():  # bytes that are no text
        text = sys.stdin.read() if value == "-" else value
    if not text:
        raise click.BadParameter("it is empty; the model needs something to answer.")
    return text


def new_tokens_option(default: int = 128, least: int = 1):
    """-n; at least 2 where it is about the steps: the first token is the prefill's."""
    return click.option("-n", "--max-new-tokens", type=click.IntRange(min=least), default=default, show_default=True)


def model_options(command):
    """Options that choose and load a model: they become the keyword `load`, a call that returns the engine."""
    options = [
        click.option(
            "--model", default="default", show_default=True, help="'default', a folder, a .gguf file or a hub id."
        ),
        click.option("--heads", help="Medusa heads: a folder, a file or a hub id."),
        click.option(
            "--draft",
            type=DraftWord(),
            default="medusa",
            show_default=True,
            help="Where guesses come from: medusa, prompt-lookup, first-layers:N, or a smaller model's path.",
        ),
        click.option(
            "--tree",
            type=TreeWord(),
            default="auto",
            show_default=True,
            help="'auto', a number of nodes, a name, or choices as JSON; see `medusa tree list`.",
        ),
        click.option("--backend", type=click.Choice(BACKENDS), default="auto", show_default=True),
        click.option("--device", help="cpu or cuda; default: where the backend runs."),
        click.option(
            "--dtype",
            type=click.Choice(DTYPES),
            help="float16 is for CUDA, int8 for the CPU; default: bfloat16.",
        ),
        click.option(
            "--max-seqlen",
            type=click.IntRange(min=2),
            help="Prompt + new tokens at most; default: min(context, 4096).",
        ),
        click.option("--bitwise", is_flag=True, help="On a GPU too, logits equal to plain decoding's bit for bit."),
    ]

    @functools.wraps(command)
    def wrapper(model, heads, **rest):
        names = ("draft", "backend", "device", "dtype", "tree", "max_seqlen", "bitwise")
        chosen = {name: rest.pop(name) for name in names}
        if chosen["draft"] != "medusa" and isinstance(chosen["tree"], str) and _DYNAMIC.fullmatch(chosen["tree"]):
            raise click.UsageError(
                f"--tree {chosen['tree']} needs the probabilities of Medusa heads, not --draft {chosen['draft']}"
            )

        def load():
            from .engine import Medusa

            return Medusa.from_pretrained(model, heads, **chosen)

        return command(load=load, **rest)

    return _with(options, wrapper)


def sampling_options(command):
    """Options that say how tokens are chosen: keywords of `Medusa.generate`."""
    options = [
        click.option("--mode", type=click.Choice(MODES), default="greedy", show_default=True),
        click.option("--temperature", type=Number(min=0), default=1.0, show_default=True),
        click.option("--top-p", type=Number(0, 1, min_open=True), default=1.0, show_default=True),
        click.option("--top-k", type=click.IntRange(min=0), default=0, show_default=True, help="0 is off."),
        click.option(
            "--posterior-threshold",
            type=Number(min=0),
            default=0.09,
            show_default=True,
            help="For --mode typical: a guess more probable than this is always accepted.",
        ),
        click.option(
            "--posterior-alpha",
            type=Number(min=0),
            default=0.3,
            show_default=True,
            help="For --mode typical: so is, where the model is unsure, one above this times exp(-entropy).",
        ),
        click.option("--seed", type=click.IntRange(-(2**63), 2**63 - 1), help="Reproduces a sampled text."),
    ]
    names = ("mode", "temperature", "top_p", "top_k", "posterior_threshold", "posterior_alpha", "seed")

    @functools.wraps(command)
    def wrapper(**everything):
        mode = everything["mode"]
        for name in ("posterior_threshold", "posterior_alpha"):
            if given(name) and mode != "typical":
                raise click.UsageError(
                    f"--{name.replace('_', '-')} has no effect with --mode {mode}; it is for typical"
                )
        import torch

        from .sampling import SamplingOptions

        with mistakes():  # such as a temperature without sampling
            SamplingOptions(**{name: everything[name] for name in names}).acceptance(1, torch.device("cpu"))
        return command(**everything)

    return _with(options, wrapper)


def prompt_options(least_new_tokens: int = 1):
    """Options that choose a prompt set, and how far to answer each prompt: `prompts`, its name, and `texts`."""
    options = [
        click.option(
            "--prompts", default="chat", show_default=True, help="'chat', 'humaneval', or a text file with one a line."
        ),
        click.option("--limit", type=click.IntRange(min=1), help="Use the first LIMIT prompts only."),
        new_tokens_option(least=least_new_tokens),
    ]

    def decorate(command):
        @functools.wraps(command)
        def wrapper(prompts, limit, **rest):
            from .benchmark import load_prompts

            with mistakes():
                texts = load_prompts(prompts)[:limit]
            return command(prompts=prompts, texts=texts, **rest)

        return _with(options, wrapper)

    return decorate
