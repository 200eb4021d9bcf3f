"""The `msa` command. Every command is a frozen dataclass of options and a function `run`.

Commands are imported only when they are called, so that `msa explain` works where torch,
scikit-learn or Hypothesis are not installed.
"""

from __future__ import annotations

import sys

HELP = """\
usage: msa COMMAND [options]

MiniMax Sparse Attention from math to metal.

commands:
  explain             a 12-token example through every form of the lowering
  verify              rules R1-R20 on this machine's backends, or on a function of yours
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


def main(arguments: list[str] | None = None) -> int:
    """Run one command; its exit code is the return value."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments in ([], ["-h"], ["--help"]):
        print(HELP, end="")
        return 0
    try:
        import tyro

        match arguments:
            case ["explain", *rest]:
                from msa import explain

                return explain.run(tyro.cli(explain.ExplainOptions, prog="msa explain", args=rest))
            case ["verify", *rest]:
                from msa.conformance import report

                return report.run(tyro.cli(report.VerifyOptions, prog="msa verify", args=rest))
            case ["demo", "digits", *rest]:
                from msa.demo import digits

                return digits.run(tyro.cli(digits.DigitsOptions, prog="msa demo digits", args=rest))
            case ["demo", *rest]:
                from msa.model import demo

                return demo.run(tyro.cli(demo.DemoOptions, prog="msa demo", args=rest))
            case ["ask", *rest]:
                from msa.model import ask, checks_ask

                checks_ask.check_words(rest)
                return ask.run(tyro.cli(ask.AskOptions, prog="msa ask", args=rest))
            case ["train", *rest]:
                from msa.model import train

                return train.run(tyro.cli(train.TrainOptions, prog="msa train", args=rest))
            case ["convert", folder, *rest] if not folder.startswith("-"):
                from msa.model import convert

                words = ["--folder", folder, *rest]
                return convert.run(tyro.cli(convert.FolderOptions, prog="msa convert", args=words))
            case ["convert", *rest]:
                from msa.integrations import convert_run

                options = tyro.cli(convert_run.ConvertOptions, prog="msa convert", args=rest)
                return convert_run.run(options)
            case ["findings", "run", *rest]:
                from msa.model import findings, findings_run

                options = tyro.cli(findings.RunOptions, prog="msa findings run", args=rest)
                return findings_run.run(options)
            case ["findings", *rest]:
                from msa.model import findings

                options = tyro.cli(findings.FindingsOptions, prog="msa findings", args=rest)
                return findings.run(options)
            case ["bench", "prefill", *rest]:
                from benchmarks import prefill

                options = tyro.cli(prefill.PrefillOptions, prog="msa bench prefill", args=rest)
                return prefill.run(options)
            case ["bench", "train", *rest]:
                from benchmarks import train

                return train.run(tyro.cli(train.TrainOptions, prog="msa bench train", args=rest))
            case ["bench", "decode", *rest]:
                from benchmarks import decode

                return decode.run(
                    tyro.cli(decode.DecodeOptions, prog="msa bench decode", args=rest)
                )
            case ["bench", "integrations", *rest]:
                from benchmarks import integrations

                options = tyro.cli(
                    integrations.IntegrationsOptions, prog="msa bench integrations", args=rest
                )
                return integrations.run(options)
            case ["bench", "plots", *rest]:
                from benchmarks import plots

                return plots.run(tyro.cli(plots.PlotsOptions, prog="msa bench plots", args=rest))
            case _:
                print(f"{HELP}\nmsa: no such command: {' '.join(arguments)}", file=sys.stderr)
                return 2
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
