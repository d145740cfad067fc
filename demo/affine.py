"""MLX's affine quantisation in PyTorch: the same scales and biases as mx.quantize, kept in bf16, and MLX's packing."""

import numpy
import torch
from torch import Tensor

GROUP = 64


def bits_of(name: str) -> int | None:
    """How a tensor of the network is stored: matrices at 5 bits, router gates at 8, all else unquantised."""
    if name.endswith("block_sparse_moe.gate.weight"):
        return 8
    return 5 if name.endswith(("_proj.weight", "_proj", "embed_tokens.weight", "lm_head.weight")) else None


def quantize(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Integers [..., groups, 64], and a scale and a bias per group, each already rounded to bf16."""
    groups = weight.float().unflatten(-1, (-1, GROUP))
    top = 2 ** bits - 1
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    falling = low.abs() > high.abs()
    scale = ((high - low) / top).clamp_min(1e-7)
    scale, edge = torch.where(falling, scale, -scale), torch.where(falling, low, high)
    zero = (edge / scale).round()
    scale = torch.where(zero != 0, edge / torch.where(zero != 0, zero, 1), scale)
    bias = torch.where(zero != 0, edge, 0)
    scale, bias = scale.bfloat16().float(), bias.bfloat16().float()
    return ((groups - bias) / scale).round().clamp(0, top), scale, bias


def rounded(weight: Tensor, bits: int) -> Tensor:
    """The weight as the quantised checkpoint will hold it."""
    integers, scale, bias = quantize(weight, bits)
    return (integers * scale + bias).flatten(-2)


def pack(integers: Tensor, bits: int) -> numpy.ndarray:
    """A row's integers as one little-endian stream of bits in 32-bit words."""
    values = integers.flatten(-2).to(torch.uint8).cpu().numpy()
    stream = numpy.unpackbits(values[..., None], axis=-1, count=bits, bitorder="little")
    return numpy.packbits(stream.reshape(*values.shape[:-1], -1), axis=-1, bitorder="little").view(numpy.uint32)


def unpack(words: numpy.ndarray, scales: Tensor, biases: Tensor, bits: int) -> Tensor:
    stream = numpy.unpackbits(words.view(numpy.uint8), axis=-1, bitorder="little")
    values = numpy.packbits(stream.reshape(*words.shape[:-1], -1, bits), axis=-1, bitorder="little")[..., 0]
    groups = torch.from_numpy(values.astype(numpy.float32)).unflatten(-1, (-1, GROUP))
    return (groups * scales.float()[..., None] + biases.float()[..., None]).flatten(-2)
