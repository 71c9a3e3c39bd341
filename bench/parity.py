"""Does Medusa say what plain decoding says, and what transformers says? `python -m bench.parity --help`.

Three greedy texts per prompt, in fp32: our plain decoding, our Medusa decoding, and transformers' `generate`. Every
first difference is printed with both tokens and the margin between their logits in transformers; a margin at the size
of fp32 rounding is a near-tie, anything else a bug.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from medusa_engine import Medusa
from medusa_engine.benchmark import append_row, load_prompts, where
from medusa_engine.decode import Decoder
from medusa_engine.default_model import default_model_path
from medusa_kernels import Tree

NEAR_TIE = 1e-3  # of a logit; fp32 sums of this model in another order differ by about 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", default="chat", help="chat, humaneval or a text file")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--tree", default="16", help="a number of nodes or a name")
    parser.add_argument("--batch", type=int, default=10, help="prompts decoded at once")
    parser.add_argument("--output", type=Path, help="append the results row to this JSONL file")
    args = parser.parse_args()

    from transformers import AutoModelForCausalLM

    tree = int(args.tree) if args.tree.isdigit() else args.tree
    engine = Medusa.from_pretrained(dtype="float32", backend=args.backend, tree=tree)
    oracle = AutoModelForCausalLM.from_pretrained(default_model_path(), dtype=torch.float32).eval()
    prompts = [engine.tokenizer.encode_chat(text) for text in load_prompts(args.prompts)[: args.limit]]
    worst = max(logit_error(engine, oracle, ids) for ids in prompts[:10])
    counts = {"medusa": 0, "transformers": 0}
    differences: list[dict] = []
    for start in tqdm(range(0, len(prompts), args.batch), desc="prompts", unit=f"x{args.batch}", disable=None):
        group = prompts[start : start + args.batch]
        plain, medusa = (engine.generate(group, args.max_new_tokens, medusa=m).token_ids for m in (False, True))
        theirs = transformers_greedy(oracle, group, args.max_new_tokens)
        for i, ids in enumerate(group):
            for name, other in (("medusa", medusa[i]), ("transformers", theirs[i])):
                if other == plain[i]:
                    counts[name] += 1
                else:
                    first = first_difference(oracle, ids, plain[i], other)
                    differences.append({"prompt": start + i, "against": name, **first})
    for difference in differences:
        verdict = "near-tie" if difference["margin"] < NEAR_TIE else "BUG"
        print(f"{verdict}: {json.dumps(difference)}")
    row = {
        "benchmark": "parity",
        "prompts": args.prompts,
        "num_prompts": len(prompts),
        "max_new_tokens": args.max_new_tokens,
        "backend": engine.backend,
        "dtype": engine.dtype,
        "tree_nodes": engine.tree(1).num_nodes,
        "equal_to_plain": counts["medusa"],
        "equal_to_transformers": counts["transformers"],
        "differences": differences,
        "max_relative_logit_error": worst,
        **where(),
    }
    print(
        f"{engine.backend} {engine.dtype}, {len(prompts)} prompts x {args.max_new_tokens} tokens: "
        f"Medusa equals plain on {counts['medusa']}, plain equals transformers on {counts['transformers']}; "
        f"largest relative logit error {worst:.1e}"
    )
    if args.output:
        append_row(args.output, row)
    sys.exit(any(d["margin"] >= NEAR_TIE for d in differences))


@torch.no_grad()
def logit_error(engine: Medusa, oracle, ids: list[int]) -> float:
    """Largest |ours - theirs| over the prompt's last row, relative to their largest |logit|."""
    decoder = Decoder(engine.model, None, Tree.from_choices([]), batch=1, max_seqlen=len(ids) + 1)
    decoder.start([ids], None)
    decoder.step()
    expected = oracle(torch.tensor([ids + decoder.tree_tokens[0].tolist()])).logits[0, -1]
    return float((decoder.logits[0, 0] - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def transformers_greedy(oracle, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Token ids up to and with the EOS, left-padded as a batch."""
    longest, eos = max(map(len, prompts)), oracle.generation_config.eos_token_id
    eos = [eos] if isinstance(eos, int) else list(eos)
    ids = torch.tensor([[eos[0]] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = oracle.generate(ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=eos[0])
    texts = [row[longest:].tolist() for row in out]
    ends = [next((i + 1 for i, token in enumerate(text) if token in eos), len(text)) for text in texts]
    return [text[:end] for text, end in zip(texts, ends, strict=True)]


@torch.no_grad()
def first_difference(oracle, prompt: list[int], ours: list[int], other: list[int]) -> dict:
    """Where two texts part, the two tokens, and how far apart transformers sees them."""
    at = next((i for i, (a, b) in enumerate(zip(ours, other, strict=False)) if a != b), min(len(ours), len(other)))
    tokens = [text[at] if at < len(text) else None for text in (ours, other)]
    if None in tokens:  # one text ended though its tokens were equal so far: no near-tie can do that
        return {"position": at, "tokens": tokens, "margin": float("inf")}
    logits = oracle(torch.tensor([prompt + ours[:at]])).logits[0, -1]
    return {"position": at, "tokens": tokens, "margin": float((logits[tokens[0]] - logits[tokens[1]]).abs())}


if __name__ == "__main__":
    main()
