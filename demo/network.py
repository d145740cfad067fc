"""The MiniMax-M2 network in PyTorch, for training and for scores: every expert is computed and the router masks."""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Dimensions:
    vocab_size: int = 1536
    hidden_size: int = 256
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int = 4  # Uneven over three nodes.
    head_dim: int = 64
    rotary_dim: int = 32
    intermediate_size: int = 192  # Per expert: three groups of 64, so that three nodes can share one expert.
    num_local_experts: int = 16
    num_experts_per_tok: int = 4
    rope_theta: float = 5_000_000
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048

    def as_config(self) -> dict:
        return asdict(self)


class Norm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class Cache:
    """Keys and values of one layer, [batch, heads, positions, head_dim]; a row's unused positions are never attended to."""

    def __init__(self, batch: int, dims: Dimensions, length: int, device):
        shape = (batch, dims.num_key_value_heads, length, dims.head_dim)
        self.keys, self.values = torch.zeros(shape, device=device), torch.zeros(shape, device=device)

    def put(self, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        index = positions[:, None, :, None].expand_as(keys)
        self.keys.scatter_(2, index, keys.float())
        self.values.scatter_(2, index, values.float())
        return self.keys, self.values


class Attention(nn.Module):
    def __init__(self, dims: Dimensions):
        super().__init__()
        self.dims = dims
        q, kv = dims.num_attention_heads * dims.head_dim, dims.num_key_value_heads * dims.head_dim
        self.q_proj = nn.Linear(dims.hidden_size, q, bias=False)
        self.k_proj = nn.Linear(dims.hidden_size, kv, bias=False)
        self.v_proj = nn.Linear(dims.hidden_size, kv, bias=False)
        self.o_proj = nn.Linear(q, dims.hidden_size, bias=False)
        self.q_norm, self.k_norm = Norm(q, dims.rms_norm_eps), Norm(kv, dims.rms_norm_eps)

    def forward(self, x: Tensor, positions: Tensor, cache: Cache | None) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x)), self.v_proj(x)
        q, k, v = (t.view(batch, length, -1, self.dims.head_dim).transpose(1, 2) for t in (q, k, v))
        q, k = (rotate(t, positions, self.dims).to(v.dtype) for t in (q, k))
        mask = None
        if cache is not None:
            k, v = cache.put(k, v, positions)
            q = q.float()
            mask = (torch.arange(k.shape[2], device=x.device) <= positions[:, :, None])[:, None]
        repeats = self.dims.num_attention_heads // self.dims.num_key_value_heads
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))


def rotate(x: Tensor, positions: Tensor, dims: Dimensions) -> Tensor:
    """Rotary positions on the first `rotary_dim` entries of each head, halves paired (not neighbors)."""
    half = dims.rotary_dim // 2
    rates = dims.rope_theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = positions[:, None, :, None].float() * rates
    cos, sin = angles.cos(), angles.sin()
    a, b, rest = x[..., :half], x[..., half:dims.rotary_dim], x[..., dims.rotary_dim:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1)


class Experts(nn.Module):
    """The stacked projections, [experts, out, in] as the checkpoint has them."""

    def __init__(self, dims: Dimensions):
        super().__init__()
        e, i, h = dims.num_local_experts, dims.intermediate_size, dims.hidden_size
        self.gate_proj, self.up_proj = nn.Parameter(torch.empty(e, i, h)), nn.Parameter(torch.empty(e, i, h))
        self.down_proj = nn.Parameter(torch.empty(e, h, i))

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        hidden = F.silu(F.linear(x, self.gate_proj.flatten(0, 1))) * F.linear(x, self.up_proj.flatten(0, 1))
        hidden = hidden.unflatten(-1, weights.shape[-1:] + (-1,)) * weights[..., None].to(hidden.dtype)
        return F.linear(hidden.flatten(-2), self.down_proj.permute(1, 0, 2).flatten(1))


class MixtureOfExperts(nn.Module):
    def __init__(self, dims: Dimensions):
        super().__init__()
        self.top = dims.num_experts_per_tok
        self.gate = nn.Linear(dims.hidden_size, dims.num_local_experts, bias=False)
        self.switch_mlp = Experts(dims)
        self.register_buffer("e_score_correction_bias", torch.zeros(dims.num_local_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            scores = torch.sigmoid(F.linear(x.float(), self.gate.weight.float()))
        chosen = (scores + self.e_score_correction_bias).topk(self.top, -1).indices
        mask = torch.zeros_like(scores).scatter(-1, chosen, 1.0)
        weights = scores * mask
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return self.switch_mlp(x, weights), mask.sum((0, 1))


class Layer(nn.Module):
    def __init__(self, dims: Dimensions):
        super().__init__()
        self.self_attn, self.block_sparse_moe = Attention(dims), MixtureOfExperts(dims)
        self.input_layernorm = Norm(dims.hidden_size, dims.rms_norm_eps)
        self.post_attention_layernorm = Norm(dims.hidden_size, dims.rms_norm_eps)

    def forward(self, x: Tensor, positions: Tensor, cache: Cache | None) -> tuple[Tensor, Tensor]:
        x = x + self.self_attn(self.input_layernorm(x), positions, cache)
        y, load = self.block_sparse_moe(self.post_attention_layernorm(x))
        return x + y, load


class Body(nn.Module):
    def __init__(self, dims: Dimensions):
        super().__init__()
        self.embed_tokens = nn.Embedding(dims.vocab_size, dims.hidden_size)
        self.layers = nn.ModuleList(Layer(dims) for _ in range(dims.num_hidden_layers))
        self.norm = Norm(dims.hidden_size, dims.rms_norm_eps)


class Network(nn.Module):
    def __init__(self, dims: Dimensions):
        super().__init__()
        self.dims, self.model = dims, Body(dims)
        self.lm_head = nn.Linear(dims.hidden_size, dims.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                ends = name.endswith(("o_proj.weight", "down_proj"))
                nn.init.normal_(parameter, std=0.02 / (2 * dims.num_hidden_layers) ** 0.5 if ends else 0.02)

    def forward(self, tokens: Tensor, positions: Tensor, caches: list[Cache] | None = None) -> tuple[Tensor, Tensor]:
        """Logits [batch, length, vocabulary] and how many tokens each expert of each layer got."""
        x, loads = self.model.embed_tokens(tokens).float(), []
        for place, layer in enumerate(self.model.layers):
            x, load = layer(x, positions, caches[place] if caches else None)
            loads.append(load)
        return self.lm_head(self.model.norm(x)), torch.stack(loads)


@torch.no_grad()
def generate(network: Network, prompts: list[list[int]], tokens_max: int, end: int) -> list[list[int]]:
    """Greedy continuations of prompts of any lengths, without the end token."""
    device = network.lm_head.weight.device
    longest = max(map(len, prompts))
    caches = [Cache(len(prompts), network.dims, longest + tokens_max, device) for _ in network.model.layers]
    padded = torch.tensor([prompt + [end] * (longest - len(prompt)) for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    positions = torch.arange(longest, device=device).expand(len(prompts), -1)
    logits, _ = network(padded, positions, caches)
    token = logits[torch.arange(len(prompts), device=device), lengths - 1].argmax(-1)
    written, done = [token], token == end
    for step in range(tokens_max - 1):
        if done.all():
            break
        logits, _ = network(token[:, None], (lengths + step)[:, None], caches)
        token = logits[:, -1].argmax(-1)
        written.append(token)
        done |= token == end
    rows = torch.stack(written, 1).tolist()
    return [row[:row.index(end)] if end in row else row for row in rows]
