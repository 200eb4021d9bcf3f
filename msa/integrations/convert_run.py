"""`msa convert`: a model of Hugging Face gains an index branch, which is warmed up and measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from msa.recall import Recall


@dataclass(frozen=True)
class ConvertOptions:
    """Give a Llama, Mistral, Qwen2 or Qwen3 an index branch, train that alone, say how good it is.

    The model's own weights are neither changed nor written.
    """

    model: str
    """A folder or a name, as AutoModelForCausalLM.from_pretrained takes it."""
    text: Path
    """What to train and to measure on, UTF-8."""
    tokens: Literal["model", "bytes"] = "model"
    """How the text is read: by the model's own tokenizer, or byte by byte."""
    warmup: int = 0
    """Steps of training; 0 measures the projections as they were drawn."""
    length: int = 4096
    """Tokens that a step reads; the last so many of the text are what is measured on."""
    layers: tuple[int, ...] | None = None
    """Which layers; all but the first by default."""
    block_size: int = 128
    """Tokens in a key block."""
    top_k: int = 16
    """Blocks kept per query and group."""
    index_dim: int | None = None
    """Size of an index head; the model's own head size by default."""
    learning_rate: float = 1e-3
    """Of AdamW."""
    seed: int = 0
    """Draws the projections."""
    save: Path | None = None
    """Where to write the projections (safetensors); `load_index` reads them."""


def run(options: ConvertOptions) -> int:
    """Convert, measure, warm up, measure again, save; a table of recalls."""
    import torch
    from rich.console import Console
    from transformers import AutoModelForCausalLM

    from msa.config import MSAConfig
    from msa.integrations import convert, index_file, messages

    console = Console()
    torch.manual_seed(options.seed)
    model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto").eval()
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    config = MSAConfig(options.block_size, options.top_k)
    convert.convert(model, config, options.layers, options.index_dim)
    ids, n = read_tokens(options, model), options.length
    messages.check_text(ids.numel(), 2 * n if options.warmup else n)
    pieces, held_out = ids[:-n].split(n), ids[None, -n:]
    pieces = [piece for piece in pieces if len(piece) == n]
    recalls = [convert.measure_recall(model, held_out)]
    if options.warmup:
        batches = (pieces[step % len(pieces)][None] for step in range(options.warmup))
        steps = convert.warm_up(model, batches, options.learning_rate)
        for step, losses in enumerate(steps):
            mean = sum(losses.values()) / len(losses)
            if step % max(1, options.warmup // 10) == 0 or step == options.warmup - 1:
                console.print(f"step {step + 1}: KL {mean:.4f}, mean of {len(losses)} layers")
        recalls.append(convert.measure_recall(model, held_out))
    show(recalls, console)
    if options.save is not None:
        index_file.save_index(model, options.save)
        console.print(f"The index branch lies in {options.save}.")
    return 0


def read_tokens(options: ConvertOptions, model: Any) -> Tensor:
    """The text as the model's tokens, or as bytes."""
    import torch
    from transformers import AutoTokenizer

    from msa.integrations import messages

    if options.tokens == "bytes":
        messages.check_bytes(model.config.vocab_size)
        ids = list(options.text.read_bytes())
    else:
        tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
        ids = tokenizer(options.text.read_text(encoding="utf-8")).input_ids
    return torch.tensor(ids, device=model.device)


def show(recalls: list[dict[int, Recall]], console: Any) -> None:
    """One row for each layer: before training, and after it if there was any."""
    from rich import box
    from rich.table import Table

    title = "Of the blocks that dense attention likes best: found, and the share of its weight"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    whens = ("as drawn", "warmed up")[: len(recalls)]
    columns = ("layer", *(f"{what}, {when}" for when in whens for what in ("blocks", "score")))
    for column in columns:
        table.add_column(column, justify="right")
    for layer in recalls[0]:
        found = (recall[layer] for recall in recalls)
        cells = (f"{share:.1%}" for recall in found for share in (recall.blocks, recall.score))
        table.add_row(str(layer), *cells)
    console.print(table)
    console.print(f"{recalls[0][layer].queries} queries and groups see more than k blocks.")
