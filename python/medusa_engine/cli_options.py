"""Options that several verbs of `medusa` share. Nothing here imports PyTorch until a verb runs."""

from __future__ import annotations

import functools
import json

import click


def model_options(command):
    """Options that choose and load a model: they become the keyword `load`, a call that returns the engine."""
    options = [
        click.option(
            "--model", default="default", show_default=True, help="'default', a folder, a .gguf file or a hub id."
        ),
        click.option("--heads", help="Medusa heads: a folder, a file or a hub id."),
        click.option(
            "--draft",
            default="medusa",
            show_default=True,
            help="Where guesses come from: medusa, prompt-lookup, first-layers:N, or a smaller model's path.",
        ),
        click.option(
            "--tree", default="auto", show_default=True, help="'auto', a number of nodes, a name, or choices as JSON."
        ),
        click.option("--backend", default="auto", show_default=True, help="auto, reference, cpu, cuda or triton."),
        click.option("--device", help="cpu or cuda; default: where the backend runs."),
        click.option("--dtype", help="float32, bfloat16, float16 (CUDA) or int8 (CPU); default: bfloat16."),
        click.option("--max-seqlen", type=int, help="Prompt + new tokens at most; default: min(context, 4096)."),
        click.option("--bitwise", is_flag=True, help="On a GPU too, logits equal to plain decoding's bit for bit."),
    ]

    @functools.wraps(command)
    def wrapper(model, heads, draft, tree, backend, device, dtype, max_seqlen, bitwise, **rest):
        def load():
            from .engine import Medusa

            return Medusa.from_pretrained(
                model,
                heads,
                draft=draft,
                backend=backend,
                device=device,
                dtype=dtype,
                tree=parse_tree(tree),
                max_seqlen=max_seqlen,
                bitwise=bitwise,
            )

        return command(load=load, **rest)

    return _with(options, wrapper)


def _with(options, command):
    """The command with these options, listed in this order by --help."""
    for option in reversed(options):
        command = option(command)
    return command


def parse_tree(text: str) -> str | int | list:
    """The `tree` argument of from_pretrained that a command-line word stands for."""
    if text.isdigit():
        return int(text)
    if not text.startswith("["):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--tree is no valid JSON list of choices: {error}") from None


def sampling_options(command):
    """Options that say how tokens are chosen: keywords of `Medusa.generate`."""
    options = [
        click.option("--mode", default="greedy", show_default=True, help="greedy, typical or lossless."),
        click.option("--temperature", type=float, default=1.0, show_default=True),
        click.option("--top-p", type=float, default=1.0, show_default=True),
        click.option("--top-k", type=int, default=0, show_default=True),
        click.option("--seed", type=int, help="Reproduces a sampled text."),
    ]
    return _with(options, command)


def prompt_options(command):
    """Options that choose a prompt set and how far to answer each prompt."""
    options = [
        click.option(
            "--prompts", default="chat", show_default=True, help="'chat', 'humaneval', or a text file with one a line."
        ),
        click.option("--limit", type=click.IntRange(min=1), help="Use the first LIMIT prompts only."),
        click.option("-n", "--max-new-tokens", type=int, default=128, show_default=True),
    ]
    return _with(options, command)
