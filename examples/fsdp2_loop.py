"""A loop on FSDP2, torchtitan style: sharded from the meta device, checkpointed and compiled by block, in bfloat16.

    torchrun --nproc-per-node 2 examples/fsdp2_loop.py [STEPS]    # and again, to go on from the last checkpoint

It measures, keeps the best checkpoint (of torch.distributed.checkpoint) and resumes, on GPUs or on CPUs alike. Every
rank makes every call; rank 0 writes the files of the run.
"""

import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedTokenizerFast

import ib_callback as ib
from ib_callback.probe import builtin_text

LENGTH, DIM, HEADS, BLOCKS = 64, 64, 4, 3


class Block(nn.Module):
    """States [B, S, DIM] → states."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(DIM), nn.RMSNorm(DIM)
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM, bias=False), nn.Linear(DIM, DIM, bias=False)
        self.up, self.down = nn.Linear(DIM, 4 * DIM, bias=False), nn.Linear(4 * DIM, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Attention, then the feed-forward part."""
        parts = self.qkv(self.attention_norm(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.silu(self.up(self.ffn_norm(x))))


class Transformer(nn.Module):
    """Tokens [B, S] → logits [B, S, vocabulary]."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.tok_embeddings, self.positions = nn.Embedding(vocabulary, DIM), nn.Embedding(LENGTH, DIM)
        self.layers = nn.ModuleDict({str(number): Block() for number in range(BLOCKS)})
        self.norm, self.output = nn.RMSNorm(DIM), nn.Linear(DIM, vocabulary, bias=False)

    def init_weights(self) -> None:
        """Of the real parameters, after those on the meta device."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.RMSNorm):
                module.reset_parameters()

    def forward(self, tokens: Tensor) -> Tensor:
        """Embeddings, blocks, norm and head."""
        x = self.tok_embeddings(tokens) + self.positions.weight[: tokens.shape[1]]
        for layer in self.layers.values():
            x = layer(x)
        return self.output(self.norm(x))


def parallelize(model: Transformer, device: str) -> Transformer:
    mesh = init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("dp_shard",))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for number, block in model.layers.items():
        block = checkpoint_wrapper(block)
        block.compile(backend="inductor" if device == "cuda" else "aot_eager")
        model.layers[number] = fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def main(steps: int, out: Path) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank = dist.get_rank()
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=builtin_text.default_tokenizer())
    data = torch.tensor([i for ids in tokenizer(builtin_text.split()[0][:500])["input_ids"] for i in ids])
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Transformer(len(tokenizer))
    model = parallelize(model, device)
    model.to_empty(device=device)
    model.init_weights()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

    first, saved = 0, sorted(out.glob("step-*"))
    if saved:
        weights, moments = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=saved[-1])
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
        first = int(saved[-1].name.removeprefix("step-"))
    meter = ib.Meter(
        ib.Probe.builtin(tokenizer, num_sequences=64, max_length=LENGTH),
        layers=[*(f"layers.{number}" for number in range(BLOCKS - 1)), "norm"],  # blocks, the last behind the norm
        forward=lambda model, tokens, mask: model(tokens),  # padding comes last, where no token sees it
    )
    generator = torch.Generator().manual_seed(1000 * first + rank)  # each rank has batches of its own
    with ib.Run(meter, output_dir=out, every_n_steps=20, select="loss", select_from=0) as run:
        for step in range(first, steps + 1):
            stop = run.step(model, step)
            if step % 20 == 0 and step > first:
                path = out / f"step-{step:06}"
                weights, moments = get_state_dict(model, optimizer)
                dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=path)
                run.saved(step, path)
                for old in out.glob("step-*"):
                    if rank == 0 and old != path and not run.keeps(old):
                        shutil.rmtree(old)
            if stop or step == steps:
                break
            rows = torch.randint(len(data) - LENGTH, (8,), generator=generator)
            tokens = torch.stack([data[i : i + LENGTH + 1] for i in rows]).to(device)
            logits = model(tokens[:, :-1])
            F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
    if rank == 0:
        print(run.trajectory.table(), "The best checkpoint:", run.selected, sep="\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200, Path("ib_example"))
