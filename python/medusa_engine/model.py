"""A Llama-family decoder as a list of op launches: bound to its buffers once, repeated every step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from medusa_kernels import PackedLinear, pack_linear
from medusa_kernels._check import MAX_HEAD_DIM
from medusa_kernels.launches import auto_backend, bind, plan, resolve_all

from .checkpoint import Checkpoint
from .kv_cache import KVCache
from .rope import rope_tables

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.bfloat16}

SAMPLE = 512  # numbers of a tensor that go into a model's digest

Weight = Tensor | PackedLinear


@dataclass(frozen=True)
class Layer:
    """One decoder layer's weights. qkv and gate_up are stacked along their outputs: one launch each."""

    input_norm: Tensor
    qkv: Weight
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Weight
    o_bias: Tensor | None
    post_norm: Tensor
    gate_up: Weight
    gate_up_bias: Tensor | None
    down: Weight
    down_bias: Tensor | None


class Model:
    """A checkpoint's weights on one device, and the launches that run them.

    Attributes:
        bitwise: whether a row's logits never depend on the rows beside it.
        digest: of the configuration and of a sample of every tensor: another model's is another.
        launch: op name -> unchecked launch, resolved once.
        dtype: of the K/V cache and of the weights that are not packed.
        activation_dtype: of everything between them: fp32 on the CPU.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        backend: str,
        device: torch.device,
        dtype: str,
        max_positions: int,
        bitwise: bool = False,
    ):
        """`bitwise`: no row's logits depend on the rows beside it, down to the last bit."""
        checkpoint.check_complete()
        self.config = checkpoint.config
        device = torch.empty(0, device=device).device  # by its number: "cuda" is whichever is current
        self.device, self.dtype, self.dtype_name = device, DTYPES[dtype], dtype
        self.backend = backend if backend != "auto" else auto_backend(device)
        self.bitwise = bitwise or self.backend == "cpu"
        if dtype == "int8" and self.backend != "cpu":
            raise ValueError(f"dtype 'int8' runs on backend 'cpu' alone, not on {self.backend!r}")
        if bitwise and self.backend not in ("cpu", "cuda"):
            raise ValueError(f"bitwise=True runs on backends 'cpu' and 'cuda' alone, not on {self.backend!r}")
        head_dim, step = self.config.head_dim, 8 if self.backend in ("cuda", "triton") else 1
        if self.backend != "reference" and (head_dim > MAX_HEAD_DIM or head_dim % step):
            limit = f"{'a multiple of 8, ' if step > 1 else ''}at most {MAX_HEAD_DIM}"
            raise ValueError(f"head_dim {head_dim} does not run on backend {self.backend!r}: it must be {limit}")
        self.activation_dtype = torch.float32 if device.type == "cpu" else self.dtype
        self.launch = resolve_all(backend, device, row_invariant=bitwise)
        self._packed_dtype = dtype if self.backend == "cpu" else None
        self._max_positions = max_positions
        self._tables: dict[int | None, tuple[Tensor, Tensor]] = {}
        self._load(checkpoint)

    def _load(self, checkpoint: Checkpoint) -> None:
        c = self.config
        digest = hashlib.sha256(repr(c).encode())

        def read(name: str) -> Tensor:
            tensor = checkpoint.tensor(name)
            some = tensor.flatten()[:: max(1, tensor.numel() // SAMPLE)]
            digest.update(some.float().numpy().tobytes())
            return tensor

        def plain(name: str) -> Tensor:
            return read(name).to(self.device, self.dtype).contiguous()

        def matrix(*names: str) -> Weight:
            return self.pack(torch.cat([read(f"{name}.weight") for name in names]))

        def bias(present: bool, *names: str) -> Tensor | None:
            return torch.cat([plain(f"{name}.bias") for name in names]) if present else None

        def norm(name: str) -> Tensor:
            return read(f"{name}.weight").to(self.device, torch.float32).contiguous()

        self.layers = []
        for i in range(c.num_layers):
            at, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
            qkv = [f"{at}.{x}_proj" for x in "qkv"]
            gate_up = [f"{mlp}.gate_proj", f"{mlp}.up_proj"]
            self.layers.append(
                Layer(
                    input_norm=norm(f"model.layers.{i}.input_layernorm"),
                    qkv=matrix(*qkv),
                    qkv_bias=bias(c.qkv_bias, *qkv),
                    q_norm=norm(f"{at}.q_norm") if c.qk_norm else None,
                    k_norm=norm(f"{at}.k_norm") if c.qk_norm else None,
                    o=matrix(f"{at}.o_proj"),
                    o_bias=bias(c.o_bias, f"{at}.o_proj"),
                    post_norm=norm(f"model.layers.{i}.post_attention_layernorm"),
                    gate_up=matrix(*gate_up),
                    gate_up_bias=bias(c.mlp_bias, *gate_up),
                    down=matrix(f"{mlp}.down_proj"),
                    down_bias=bias(c.mlp_bias, f"{mlp}.down_proj"),
                )
            )
        self.norm = norm("model.norm")
        self.embedding = plain("model.embed_tokens.weight")
        self.lm_head = self.pack(read(checkpoint.lm_head_name))
        self.digest = digest.hexdigest()[:16]
        self._checkpoint = checkpoint

    @property
    def lm_head_source(self) -> Tensor:
        """The LM head as it is in the checkpoint, read anew: Medusa heads may share rows of it."""
        return self._checkpoint.tensor(self._checkpoint.lm_head_name)

    def pack(self, weight: Tensor) -> Weight:
        """A weight as this model's kernels read it: packed for the CPU's, else rounded to the model's dtype."""
        if self._packed_dtype is None or not weight.numel():
            return weight.to(self.device, self.dtype).contiguous()
        return pack_linear(weight.float() if weight.dtype == torch.float64 else weight, self._packed_dtype)

    def rope(self, prompt_length: int | None = None) -> tuple[Tensor, Tensor]:
        """cos and sin for every position; `prompt_length` matters for the prefill of dynamic RoPE alone."""
        key = prompt_length if self.config.rope.kind == "dynamic" else None
        if key not in self._tables:
            tables = rope_tables(self.config.rope, self.config.head_dim, self._max_positions, seqlen=key)
            self._tables = {k: v for k, v in self._tables.items() if k is None}  # one prompt's tables at a time
            self._tables[key] = tuple(t.to(self.device) for t in tables)
        return self._tables[key]

    def new_cache(self, batch: int, rows: int) -> KVCache:
        c = self.config
        return KVCache.allocate(
            layers=c.num_layers,
            batch=batch,
            rows=rows,
            kv_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            dtype=self.dtype,
            device=self.device,
        )

    def head(self, hidden: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """fp32-summed logits (rows, vocab) of final-norm rows `hidden`, and the call that computes them."""
        logits = torch.empty(hidden.shape[0], self.config.vocab_size, dtype=self.activation_dtype, device=self.device)
        return logits, bind(self.launch["linear"], hidden, self.lm_head, None, None, logits)


class Forward:
    """One pass of `n` nodes per sequence through the model, over a K/V cache, as a flat list of bound launches.

    Attributes:
        tokens: int32 (batch, n), filled by the caller before `run`.
        hidden: (batch * n, hidden_size) after the final norm, written by `run`.
    """

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        n: int,
        depths: Tensor,
        tree_mask: Tensor,
        *,
        prompt_length: int | None = None,
    ):
        c, batch = model.config, cache.batch
        rows = batch * n
        self.model = model
        self.tokens = torch.zeros(batch, n, dtype=torch.int32, device=model.device)
        calls: list[Callable[[], None]] = []

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=model.activation_dtype, device=model.device)

        def add(op: str, *arguments: Any) -> None:
            calls.append(bind(model.launch[op], *arguments))

        heads, kv_heads, d = c.num_heads, c.num_kv_heads, c.head_dim
        cos, sin = model.rope(prompt_length)
        self._x = empty(rows, c.hidden_size)
        self.hidden = empty(rows, c.hidden_size)
        qkv = empty(rows, (heads + 2 * kv_heads) * d)
        q, k, v = qkv.view(batch, n, -1, d).split([heads, kv_heads, kv_heads], dim=2)
        attended = empty(batch, n, heads, d)
        gate_up, activated = empty(rows, 2 * c.intermediate_size), empty(rows, c.intermediate_size)
        x, normed, seqlens, eps = self._x, self.hidden, cache.seqlens, c.rms_norm_eps
        for i, layer in enumerate(model.layers):
            k_cache, v_cache = cache.layer(i)
            add("rms_norm", x, layer.input_norm, eps, None, normed)
            add("linear", normed, layer.qkv, layer.qkv_bias, None, qkv)
            norms = (layer.q_norm, layer.k_norm, eps)
            add("rotary_append", q, k, v, cos, sin, k_cache, v_cache, seqlens, depths, *norms)
            add("tree_attention", q, k_cache, v_cache, seqlens, tree_mask, d**-0.5, attended)
            add("linear", attended.view(rows, -1), layer.o, layer.o_bias, x, x)
            add("rms_norm", x, layer.post_norm, eps, None, normed)
            add("linear", normed, layer.gate_up, layer.gate_up_bias, None, gate_up)
            add("silu_mul", gate_up, activated)
            add("linear", activated, layer.down, layer.down_bias, x, x)
        add("rms_norm", x, model.norm, eps, None, normed)
        self._layers = plan(calls)

    def run(self) -> None:
        self._x.copy_(F.embedding(self.tokens.view(-1), self.model.embedding))
        self._layers()
