"""The `msa` command. Every command is a frozen dataclass of options and a function `run`.

Commands are imported only when they are called, so that `msa explain` works where torch,
scikit-learn or Hypothesis are not installed.
"""

from __future__ import annotations

import importlib
import sys

HELP = """\
usage: msa COMMAND [options]

MiniMax Sparse Attention from math to metal.

commands:
  explain             a 12-token example through every form of the lowering
  verify              rules R1-R21 on this machine's backends, or on a function of yours
  demo                a trained model answers questions about pictures hidden in a long text
  ask                 the same for your own text and pictures of digits
  demo digits         attention as a classifier of real images: dense, MSA, window, random
  train               a small multimodal MiniMax-M3 learns to find pictures in long documents
  convert             a Hugging Face model gains an index branch, which --warmup trains
  convert FOLDER      a dense model of msa train gains index branches, which msa train then trains
  findings            what the paper found by leaving things out, found again by the tiny model
  findings run        the trainings behind it: twelve rows, three seeds
  bench prefill       correctness, then speed on a GPU: selection, attention, dense baselines
  bench train         the same for a training step: forward, backward, alignment loss
  bench decode        the same for a step of generation over a paged cache
  bench integrations  torch operators, and Hugging Face's MiniMax-M3 on four attentions
  bench plots         the figures of a results file, without a GPU

`msa COMMAND --help` shows the options of a command.
"""

COMMANDS = {
    "explain": ("msa.explain", "ExplainOptions"),
    "verify": ("msa.conformance.report", "VerifyOptions"),
    "demo": ("msa.model.demo", "DemoOptions"),
    "ask": ("msa.model.ask", "AskOptions"),
    "demo digits": ("msa.demo.digits", "DigitsOptions"),
    "train": ("msa.model.train", "TrainOptions"),
    "convert": ("msa.integrations.convert_run", "ConvertOptions"),
    "convert FOLDER": ("msa.model.convert", "FolderOptions"),
    "findings": ("msa.model.findings", "FindingsOptions"),
    "findings run": ("msa.model.findings_run", "RunOptions"),
    "bench prefill": ("benchmarks.prefill", "PrefillOptions"),
    "bench train": ("benchmarks.train", "TrainOptions"),
    "bench decode": ("benchmarks.decode", "DecodeOptions"),
    "bench integrations": ("benchmarks.integrations", "IntegrationsOptions"),
    "bench plots": ("benchmarks.plots", "PlotsOptions"),
}
"""The module that runs each command, and the name of its options there."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; its exit code is the return value."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments in ([], ["-h"], ["--help"]):
        print(HELP, end="")
        return 0
    name = next((n for n in (" ".join(arguments[:2]), arguments[0]) if n in COMMANDS), None)
    if name is None:
        print(f"{HELP}\nmsa: no such command: {' '.join(arguments)}", file=sys.stderr)
        return 2
    words = arguments[len(name.split()) :]
    if name == "convert" and words and not words[0].startswith("-"):
        name, words = "convert FOLDER", ["--folder", *words]
    try:
        import tyro

        if name == "ask":
            from msa.model import checks_ask

            checks_ask.check_words(words)
        module, options = COMMANDS[name]
        command = importlib.import_module(module)
        return command.run(tyro.cli(getattr(command, options), prog=f"msa {name}", args=words))
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "benchmarks":
            print("msa: msa bench runs from a checkout: pip install -e '.[all]'", file=sys.stderr)
            return 2
        print(
            f"msa: this command needs {error.name}; pip install 'msa-stack[all]' brings everything",
            file=sys.stderr,
        )
        return 2
    except ValueError as error:
        print(f"msa: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
