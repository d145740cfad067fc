"""Trains the demo model and writes the quantised checkpoint: python demo/train.py --out demo/model --device cuda"""

import argparse
import multiprocessing
import random
import time
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

import affine
import checkpoint
from dialogues import dialogue
from network import Dimensions, Network


def rows(tokenizer: Tokenizer, rng: random.Random, length: int):
    """Endless rows of whole dialogues, the last one cut off, with a mask of what is to be learnt."""
    tokens, learnt = [], []
    while True:
        pieces = [dialogue(rng) for _ in range(64)]
        texts = [text for pieces_of_one in pieces for text, _ in pieces_of_one]
        encoded = iter(tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        for pieces_of_one in pieces:
            for _, trained in pieces_of_one:
                ids = next(encoded).ids
                tokens += ids
                learnt += [trained] * len(ids)
            if len(tokens) > length:
                yield numpy.array(tokens[:length + 1], numpy.int16), numpy.array(learnt[:length + 1], bool)
                tokens, learnt = [], []


def worker(queue, tokenizer_path: str, seed: int, count: int, length: int) -> None:
    source = rows(Tokenizer.from_file(tokenizer_path), random.Random(seed), length)
    while True:
        made = [next(source) for _ in range(count)]
        queue.put((numpy.stack([row for row, _ in made]), numpy.stack([mask for _, mask in made])))


class Batches:
    """Worker processes in a fixed turn, so that the order of the text depends on the seed alone."""

    def __init__(self, arguments):
        each = arguments.rows // arguments.workers
        self.queues = [multiprocessing.Queue(8) for _ in range(arguments.workers)]
        self.processes = [multiprocessing.Process(target=worker, daemon=True, args=(
            queue, str(arguments.out / "tokenizer.json"), arguments.seed * 1000 + place, each, arguments.length))
            for place, queue in enumerate(self.queues)]
        for process in self.processes:
            process.start()

    def next(self, device):
        parts = [queue.get() for queue in self.queues]
        tokens, learnt = (torch.from_numpy(numpy.concatenate(side)) for side in zip(*parts))
        if device == "cuda":
            tokens, learnt = tokens.pin_memory(), learnt.pin_memory()
        return tokens.to(device, non_blocking=True).long(), learnt.to(device, non_blocking=True)

    def stop(self):
        for process in self.processes:
            process.terminate()


class Masters:
    """The f32 weights that the optimiser moves. The network computes with copies of them, rounded to the checkpoint's
    values once `rounding` is on; gradients pass straight through the rounding."""

    def __init__(self, network: Network, rate: float):
        self.pairs = [(name, copy, copy.detach().clone().requires_grad_()) for name, copy in network.named_parameters()]
        matrices = [master for _, _, master in self.pairs if master.dim() > 1]
        others = [master for _, _, master in self.pairs if master.dim() == 1]
        fused = matrices[0].is_cuda
        self.optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
                                           lr=rate, betas=(0.9, 0.95), eps=1e-10, fused=fused)
        self.round = torch.compile(affine.rounded) if fused else affine.rounded

    def step(self, rate: float, rounding: str) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for _, copy, master in self.pairs:
            master.grad, copy.grad = copy.grad, None
        torch.nn.utils.clip_grad_norm_([master for _, _, master in self.pairs], 1.0)
        self.optimizer.step()
        self.copy(rounding)

    @torch.no_grad()
    def copy(self, rounding: str) -> None:
        if rounding == "off":
            torch._foreach_copy_([copy for _, copy, _ in self.pairs], [master for _, _, master in self.pairs])
            return
        for bits in (5, 8, None):  # All groups of 64 of one width at once.
            chosen = [(copy, master) for name, copy, master in self.pairs if affine.bits_of(name) == bits]
            values = [master for _, master in chosen]
            if bits:
                groups = self.round(torch.cat([master.view(-1, affine.GROUP) for master in values]), bits)
                values = [part.view_as(master) for part, master in zip(groups.split([m.numel() // affine.GROUP for m in values]), values)]
            torch._foreach_copy_([copy for copy, _ in chosen], values)


def rate_at(progress: float, arguments) -> float:
    """Share of the run that is over → learning rate: a short warm-up, a plateau, a fall to nothing."""
    if progress < arguments.warm_up:
        return arguments.rate * progress / arguments.warm_up
    if progress < arguments.plateau:
        return arguments.rate
    return arguments.rate * (1 - (progress - arguments.plateau) / (1 - arguments.plateau))


def train(arguments) -> Network:
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    network = (checkpoint.load(arguments.start) if arguments.start else Network(Dimensions())).to(arguments.device)
    masters, batches = Masters(network, arguments.rate), Batches(arguments)
    biases = [layer.block_sparse_moe.e_score_correction_bias for layer in network.model.layers]
    positions = torch.arange(arguments.length, device=arguments.device).expand(arguments.rows, -1)

    def loss_of(logits, tokens, learnt):
        losses = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        wanted = learnt[:, 1:].flatten().float()
        return (losses * wanted).sum() / wanted.sum()

    if arguments.device == "cuda":  # Layer by layer: one compilation serves all six.
        loss_of = torch.compile(loss_of)
        for layer in network.model.layers:
            layer.compile()
    begun, said, steps = time.time(), 0.0, 0
    while True:
        progress = (time.time() - begun) / arguments.seconds if arguments.seconds else steps / arguments.steps
        if progress >= 1:
            break
        rate = rate_at(progress, arguments)
        tokens, learnt = batches.next(arguments.device)
        with torch.autocast(arguments.device, torch.bfloat16, enabled=arguments.device == "cuda"):
            logits, loads = network(tokens[:, :-1], positions)
        loss = loss_of(logits, tokens, learnt)
        loss.backward()
        masters.step(rate, "on" if progress > arguments.rounding_from else "off")
        with torch.no_grad():  # Experts with less than their share become easier to choose.
            for bias, load in zip(biases, loads):
                bias += arguments.balance * min(1.0, 4 * rate / arguments.rate) * (load.mean() - load).sign()
        steps += 1
        if steps == 1 or time.time() - said > 10:
            said, share = time.time(), loads / loads.sum(-1, keepdim=True)
            print(f"{said - begun:6.0f} s  step {steps:5d}  loss {loss.item():.4f}  rate {rate:.5f}  experts {share.min().item():.3f} to {share.max().item():.3f}", flush=True)
    masters.copy("off")  # The checkpoint quantises the masters itself.
    batches.stop()
    print(f"{steps} steps, {steps * arguments.rows * arguments.length / 1e6:.0f} M tokens, {time.time() - begun:.0f} s", flush=True)
    return network


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "model", help="holds tokenizer.json; the checkpoint goes there")
    parser.add_argument("--start", type=Path, help="a checkpoint to go on from")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--seconds", type=float, default=0, help="train for a time instead of for a number of steps")
    parser.add_argument("--rows", type=int, default=32, help="a multiple of --workers")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--warm-up", type=float, default=0.02)
    parser.add_argument("--plateau", type=float, default=0.4)
    parser.add_argument("--rounding-from", type=float, default=0.5)
    parser.add_argument("--balance", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    checkpoint.save(train(options), options.out)
