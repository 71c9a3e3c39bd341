"""An engine whose heads are right now and then, and calibrations of it that take no time."""

from medusa_engine import Medusa, calibrate
from tests.engine.models import counting_folder, counting_heads_folder

# Every fourth letter begins a text of its own length; 40 texts are three groups.
PROMPTS = [c * (1 + i % 3) for i, c in enumerate("aeimquybfjnrvzcgkosw")] * 2


def patchy(backend: str = "cpu", **options) -> Medusa:
    """An engine whose heads are right at rank 0 or at rank 1, as counting_heads_folder says."""
    heads = counting_heads_folder(4, patchy=True)
    return Medusa.from_pretrained(counting_folder(), heads, dtype="float32", backend=backend, **options)


def quick(engine: Medusa, prompts=PROMPTS, **options):
    return calibrate.calibrate(engine, prompts, **{"max_new_tokens": 30, "rounds": 1, "context": 20, **options})


def costs(step_seconds):
    """Steps that take exactly so long, instead of being timed: step_seconds(nodes)."""

    def samples(model, drafter, trees, prompts, rounds):
        return {tree.num_nodes: [step_seconds(tree.num_nodes)] * rounds for tree in trees}

    return samples
