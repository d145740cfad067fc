"""Writes and reads the model directory in MLX's format, with the tensor names of the real MiniMax-M2 checkpoint."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import affine
import chat
from network import Dimensions, Network


def stem(name: str) -> str:
    """The checkpoint's module name: what MLX appends `.weight`, `.scales` and `.biases` to."""
    return name.removesuffix(".weight")


def save(network: Network, folder: Path) -> None:
    """Quantises the weights and writes model.safetensors and the two configuration files."""
    tensors = {}
    for name, tensor in list(network.named_parameters()) + list(network.named_buffers()):
        bits = affine.bits_of(name)
        if bits is None:
            wide = name.endswith("e_score_correction_bias")
            tensors[name] = tensor.detach().to(torch.float32 if wide else torch.bfloat16).cpu().contiguous()
            continue
        integers, scale, bias = affine.quantize(tensor.detach(), bits)
        tensors[f"{stem(name)}.weight"] = torch.from_numpy(affine.pack(integers, bits))
        tensors[f"{stem(name)}.scales"] = scale.squeeze(-1).bfloat16().cpu().contiguous()
        tensors[f"{stem(name)}.biases"] = bias.squeeze(-1).bfloat16().cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config(network.dims), indent=2) + "\n")
    generation = {"bos_token_id": 0, "eos_token_id": 2, "do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 40}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    shown = {"bos_token": chat.BEGIN, "eos_token": chat.END, "pad_token": chat.END, "model_max_length": network.dims.max_position_embeddings,
             "clean_up_tokenization_spaces": False, "add_bos_token": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(shown, indent=2) + "\n")


def config(dims: Dimensions) -> dict:
    quantization = {"group_size": affine.GROUP, "bits": 5, "mode": "affine"}
    for layer in range(dims.num_hidden_layers):
        quantization[f"model.layers.{layer}.block_sparse_moe.gate"] = {"group_size": affine.GROUP, "bits": 8}
    return {"architectures": ["MiniMaxM2ForCausalLM"], "model_type": "minimax_m2", "hidden_act": "silu", "scoring_func": "sigmoid",
            "use_qk_norm": True, "use_routing_bias": True, "tie_word_embeddings": False, "attention_dropout": 0.0, "shared_intermediate_size": 0,
            "bos_token_id": 0, "eos_token_id": 2, "torch_dtype": "bfloat16"} | dims.as_config() | {
            "quantization": quantization, "quantization_config": quantization}


def load(folder: Path) -> Network:
    """The quantised checkpoint, with its weights as plain f32 matrices."""
    settings = json.loads((folder / "config.json").read_text())
    network = Network(Dimensions(**{key: settings[key] for key in Dimensions().as_config()}))
    tensors = load_file(folder / "model.safetensors")
    with torch.no_grad():
        for name, target in list(network.named_parameters()) + list(network.named_buffers()):
            bits = affine.bits_of(name)
            module = stem(name)
            value = tensors[name] if bits is None else affine.unpack(
                tensors[f"{module}.weight"].numpy(), tensors[f"{module}.scales"], tensors[f"{module}.biases"], bits)
            target.copy_(value)
    return network.eval()
