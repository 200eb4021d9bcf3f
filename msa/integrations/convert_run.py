"""The command `msa convert`: add an index branch to a Hugging Face model, train and measure it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from msa import checks, files

if TYPE_CHECKING:
    from torch import Tensor

    from msa.recall import Recall

MOST_TEXT = 2**30
"""The largest text, in bytes."""


@dataclass(frozen=True)
class ConvertOptions:
    """Add an index branch to a Llama, Mistral, Qwen2 or Qwen3, train it, and measure its recall.

    The model's own weights are not changed and not written.
    """

    model: str
    """Folder or name of the model, for AutoModelForCausalLM.from_pretrained."""
    text: Path
    """Text file (UTF-8) for training and measuring."""
    tokens: Literal["model", "bytes"] = "model"
    """How the text becomes tokens: by the model's tokenizer, or one token per byte."""
    warmup: int = 0
    """Number of training steps. 0 only measures the random projections."""
    length: int = 4096
    """Number of tokens in a training step. The last piece of this length is for measuring."""
    layers: tuple[int, ...] | None = None
    """Numbers of the layers to convert. By default all but the first."""
    block_size: int = 128
    """Number of tokens in a key block."""
    top_k: int = 16
    """Number of blocks that a query and group keeps."""
    index_dim: int | None = None
    """Size of an index head. By default the head size of the model."""
    learning_rate: float = 1e-3
    """Learning rate of AdamW."""
    seed: int = 0
    """Seed for drawing the projections."""
    save: Path | None = None
    """File to write the projections to (safetensors). `load_index` reads it."""


def run(options: ConvertOptions) -> int:
    """Convert, measure, train, measure again, save, and print a table of recalls.

    Raises:
        TypeError, ValueError: an option is out of range, the model or the text cannot be read, the
            model cannot be converted, or the file cannot be written.
    """
    import torch
    from rich.console import Console

    from msa.config import MSAConfig
    from msa.integrations import convert, index_file, messages

    check(options)
    console, config = Console(), MSAConfig(options.block_size, options.top_k)
    text = read_text(options)
    torch.manual_seed(options.seed)
    model = load("AutoModelForCausalLM", options.model, dtype="auto").eval()
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    convert.convert(model, config, options.layers, options.index_dim)
    ids, n = read_tokens(options, text, model), options.length
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
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / "index.safetensors"
            index_file.save_index(model, made)
            files.write(options.save, made.read_bytes())
        console.print(f"The index branch lies in {options.save}.", markup=False, soft_wrap=True)
    return 0


def check(options: ConvertOptions) -> None:
    """Check the ranges of numbers and that the file can be written, before anything is loaded."""
    checks.check_count("warmup", options.warmup, 0)
    checks.check_count("length", options.length, 1)
    checks.check_positive("learning_rate", options.learning_rate)
    checks.check_seed("seed", options.seed)
    files.check_apart("save", options.save, text=options.text)
    files.check_target("save", options.save)


def load(what: str, name: str, **options: Any) -> Any:
    """Load a model or a tokenizer of transformers.

    Raises:
        ValueError: it is not found or cannot be loaded. The message has the first line of the
            library's error.
    """
    import transformers

    try:
        return getattr(transformers, what).from_pretrained(name, **options)
    except Exception as error:  # any error of the library means that there is no model
        reason = f"{type(error).__name__} {error}".strip().splitlines()[0]
        raise ValueError(
            f"model must be a folder or a name that {what}.from_pretrained can load, got {name!r}: "
            f"{reason}"
        ) from error


def read_text(options: ConvertOptions) -> bytes:
    """The bytes of the text. They must be UTF-8 if a tokenizer reads them.

    Raises:
        ValueError: the file cannot be read, or is not UTF-8.
    """
    text = files.read_bytes("text", options.text, MOST_TEXT)
    if options.tokens == "model":
        try:
            text.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"text must be UTF-8, got {options.text}: {error}") from None
    return text


def read_tokens(options: ConvertOptions, text: bytes, model: Any) -> Tensor:
    """The text as tokens of the model, or as bytes."""
    import torch

    from msa.integrations import messages

    if options.tokens == "bytes":
        messages.check_bytes(model.config.vocab_size)
        ids = list(text)
    else:
        ids = load("AutoTokenizer", options.model)(text.decode()).input_ids
    return torch.tensor(ids, device=model.device)


def show(recalls: list[dict[int, Recall]], console: Any) -> None:
    """Print one row per layer: the recall before training, and after it if there was any."""
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
