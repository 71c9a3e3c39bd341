"""A model to guess for, a noisy copy of it that guesses, and prompts of many lengths."""

from functools import cache

import torch

from medusa_engine import Medusa
from medusa_engine.heads_files import save_heads
from tests.engine.models import FOLDER, PROMPTS, fitted_heads, random_folder, random_model, save_model, write_tokenizer

RAGGED = ([7], *PROMPTS, list(range(70)), [3, 3, 3, 50, 51], [8, 9] * 20)


@cache
def target(dtype: str = "float32", backend: str = "cpu") -> Medusa:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(random_folder(), dtype=torch.float32)
    folder = FOLDER / "draft-sources-heads"
    if not folder.exists():
        save_heads(folder, fitted_heads(model, PROMPTS, num_heads=3), dtype=torch.float32)
    return Medusa.from_pretrained(random_folder(), folder, dtype=dtype, backend=backend)


@cache
def noisy_folder(padding: int = 0):
    """The target with a little noise on every weight: often right. `padding`: rows of tokens that nothing spells."""
    folder = FOLDER / f"noisy-{padding}"
    model = random_model("llama")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.04 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    vocab = model.config.vocab_size
    if padding:
        model.resize_token_embeddings(vocab + padding, mean_resizing=False)
        with torch.no_grad():
            model.lm_head.weight[vocab:] = 10 * model.lm_head.weight[:padding]  # would win, could they be guessed
    save_model(folder, model)
    write_tokenizer(folder, [chr(0x4E00 + i) for i in range(vocab)])
    return folder
