"""`msa convert`: a model of Hugging Face gains an index branch, which is warmed up and measured."""

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
"""The most bytes of a text."""


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
    """Convert, measure, warm up, measure again, save; a table of recalls.

    Raises:
        TypeError, ValueError: options out of range, a model or a text that cannot be read, a model
            that cannot be converted, a file that cannot be written.
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
    """Numbers in range, and a file that can be written, before anything is loaded."""
    checks.check_count("warmup", options.warmup, 0)
    checks.check_count("length", options.length, 1)
    checks.check_positive("learning_rate", options.learning_rate)
    checks.check_seed("seed", options.seed)
    files.check_apart("save", options.save, text=options.text)
    files.check_target("save", options.save)


def load(what: str, name: str, **options: Any) -> Any:
    """A model or a tokenizer of transformers.

    Raises:
        ValueError: none is found under this name, or it cannot be loaded, with the first line of
            the library's reason.
    """
    import transformers

    try:
        return getattr(transformers, what).from_pretrained(name, **options)
    except Exception as error:  # whatever the library makes of a name or of files: no model is here
        reason = f"{type(error).__name__} {error}".strip().splitlines()[0]
        raise ValueError(
            f"model must be a folder or a name that {what}.from_pretrained can load, got {name!r}: "
            f"{reason}"
        ) from error


def read_text(options: ConvertOptions) -> bytes:
    """The bytes of the text, which are UTF-8 unless they are the tokens.

    Raises:
        ValueError: a file that cannot be read, or is no such text.
    """
    text = files.read_bytes("text", options.text, MOST_TEXT)
    if options.tokens == "model":
        try:
            text.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"text must be UTF-8, got {options.text}: {error}") from None
    return text


def read_tokens(options: ConvertOptions, text: bytes, model: Any) -> Tensor:
    """The text as the model's tokens, or as bytes."""
    import torch

    from msa.integrations import messages

    if options.tokens == "bytes":
        messages.check_bytes(model.config.vocab_size)
        ids = list(text)
    else:
        ids = load("AutoTokenizer", options.model)(text.decode()).input_ids
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
