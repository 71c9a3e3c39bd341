"""Rows into the short table that is printed last."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

KEPT = 10  # failures shown in full; the rows hold all


def report(rows: Sequence[dict]) -> str:
    """Failures, checks, kernels against their floors, steps: a few lines each."""
    by_kind: dict[str, list[dict]] = defaultdict(list)
    for row in rows:
        by_kind[row["benchmark"]].append(row)
    parts = [
        _ceilings(by_kind["ceilings"]),
        _kernels([row for row in by_kind["kernel"] if "us" in row]),
        _steps(by_kind["step"]),
        _decoding(by_kind["decoding"]),
        [f"trace: {r['launches_per_step']:.0f} launches a step, {r['busy_percent']:.1f}% busy, "
         f"{r['copies_to_host']} copies to the host" for r in by_kind["trace"]],
        _checks(by_kind["check"]),
        _problems([r for r in by_kind["kernel"] if "failed" in r], "failed", "kernels that got no time"),
        _problems(by_kind["skipped"], "reason", "skipped"),
        _problems(by_kind["failure"], "error", "failures"),
    ]  # fmt: skip
    return "\n\n".join("\n".join(part) for part in parts if part)


def _ceilings(rows: Iterable[dict]) -> list[str]:
    return [
        f"{r['device']}: {r['bandwidth_gb_per_s']:.0f} GB/s, {r['tflop_per_s']:.0f} bf16 TFLOP/s, "
        f"two events around nothing {r['empty_us']:.1f} us"
        for r in rows
    ]


def _kernels(rows: Iterable[dict]) -> list[str]:
    """A line per case: our time and share of the floor, then every other implementation's time over ours. Ours is
    Triton's where there is no CUDA kernel.
    """
    cases: dict[str, dict[str, dict]] = defaultdict(dict)
    for row in rows:
        cases[row["case"]].setdefault(row["implementation"], row)
    lines = []
    for case, found in _matrices_together(cases).items():
        ours = next((name for name in ("cuda", "triton") if name in found), None)
        if ours is None:
            continue
        own = found[ours]
        others = "  ".join(f"{name} {row['us'] / own['us']:.2f}x" for name, row in found.items() if name != ours)
        case += " by triton" * (ours == "triton")
        lines.append(f"{case:<40} {own['us']:9.1f} us {own['percent_of_floor']:4.0f}% | {others}")
    return ["kernels: us, % of the floor | other implementations' time over ours", *lines] if lines else []


def _matrices_together(cases: dict[str, dict[str, dict]]) -> dict[str, dict[str, dict]]:
    """The linear layers of one model and row count as one case: what they take together."""
    groups: dict[str, list[dict[str, dict]]] = defaultdict(list)
    kept = {}
    for case, found in cases.items():
        if next(iter(found.values()))["op"] == "linear":
            op, model, _, rows = case.split()
            groups[f"{op} {model} {rows}"].append(found)
        else:
            kept[case] = found
    for name, members in groups.items():
        sums = {}
        for implementation in set.intersection(*map(set, members)):
            us, floor = (sum(m[implementation][field] for m in members) for field in ("us", "floor_us"))
            sums[implementation] = {"us": us, "percent_of_floor": 100 * floor / us}
        kept[f"{name}, {len(members)} matrices"] = sums
    return kept


def _steps(rows: Iterable[dict]) -> list[str]:
    lines = []
    for r in rows:
        name = f"{r['model']} b{r['batch']} ctx{r['context']} {r['decoding']}"
        name += " (own LM heads)" if r.get("own_lm_heads") else ""
        parts = [f"{name:<62} {r['step_us'] / 1e3:7.2f} ms {r['tokens_per_second']:7.0f} tok/s"]
        if "times_weight_floor" in r:
            parts.append(f"{r['times_weight_floor']:.2f}x weights {r['times_floor']:.2f}x floor")
            parts.append(f"engine {r['engine_step_us'] / 1e3:.2f} ms")
        if "overhead" in r:
            parts.append(f"overhead {r['overhead']:.2f} speedup {r['speedup']:.2f}")
        lines.append(" | ".join(parts))
    return ["steps", *lines] if lines else []


def _decoding(rows: Iterable[dict]) -> list[str]:
    return [
        f"{r['num_prompts']} {r['prompts']} prompts: plain {r['plain_tokens_per_second']:.0f} tok/s, Medusa "
        f"{r['medusa_tokens_per_second']:.0f}, {r['tokens_per_step']:.2f} tokens/step, {r['speedup']:.2f}x, "
        f"{r['equal_texts']} texts equal"
        for r in rows
    ]


def _checks(rows: Sequence[dict]) -> list[str]:
    wrong = [r for r in rows if not r["passed"]]
    lines = [f"checks: {len(rows) - len(wrong)} of {len(rows)} passed"] if rows else []
    lines += [f"  {r['case']}: {r['passed_tests']} passed, {r['failed_tests']} failed" for r in rows
              if "passed_tests" in r]  # fmt: skip
    return lines + [f"  WRONG {r['case']}: {r['detail'][:300]}" for r in wrong[:KEPT]]


def _problems(rows: Sequence[dict], field: str, title: str) -> list[str]:
    if not rows:
        return []
    who = [f"{r['case']}{' ' + r['implementation'] if 'implementation' in r else ''}" for r in rows]
    lines = [f"  {name}: {r[field][:200]}" for name, r in zip(who[:KEPT], rows, strict=False)]
    more = [f"  and {len(rows) - KEPT} more"] if len(rows) > KEPT else []
    return [f"{title}: {len(rows)}", *lines, *more]
