"""The `msa` command. Every command is a module with a frozen dataclass of options and `run`.

A command is imported only when it is called, so that `msa explain` works where torch,
scikit-learn or Hypothesis are not installed.
"""

from __future__ import annotations

import dis
import importlib
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from types import TracebackType

HELP = """\
usage: msa COMMAND [options]

MiniMax Sparse Attention from math to metal.

commands:
  doctor              show versions, devices, and which parts of msa run on this machine
  explain             print a 12-token example in every form of the lowering
  verify              test rules R1-R21 on the backends here, or on a function of yours
  demo                let a trained model answer questions about pictures in a long text
  ask                 ask the same model about your own text and pictures of digits
  demo digits         classify real images by attention: dense, MSA, window and random
  train               train a small multimodal MiniMax-M3 to find pictures in long documents
  convert             add an index branch to a Hugging Face model; --warmup trains it
  convert FOLDER      add index branches to a dense model of msa train, to train them there
  findings            show the ablations of the paper, repeated with the tiny model
  findings run        run the trainings of these ablations: twelve rows, three seeds
  exercise            check the code that you wrote for a chapter's exercise
  bench prefill       check, then time on a GPU: selection, attention and dense baselines
  bench train         check and time a training step: forward, backward and alignment loss
  bench decode        check and time a step of generation over a paged cache
  bench serving       check and time vLLM's and SGLang's sparse layers with and without plug-ins
  bench integrations  time torch operators, and Hugging Face's MiniMax-M3 on four attentions
  bench parallel      time one layer on several GPUs, started by torchrun
  bench plots         draw the figures of a results file, without a GPU

`msa COMMAND --help` shows the options of a command, `msa --version` the version.
"""

COMMANDS = {
    "explain": ("msa.explain_print", "ExplainOptions", "torch"),
    "verify": ("msa.conformance.verify_run", "VerifyOptions", "verify"),
    "demo": ("msa.demo.demo", "DemoOptions", "model,demo"),
    "ask": ("msa.demo.ask", "AskOptions", "model,demo"),
    "demo digits": ("msa.demo.digits", "DigitsOptions", "demo"),
    "train": ("msa.training.train", "TrainOptions", "model,demo"),
    "convert": ("msa.integrations.convert_run", "ConvertOptions", "transformers"),
    "convert FOLDER": ("msa.training.convert_dense", "ConvertDenseOptions", "model,demo"),
    "findings": ("msa.ablations.tables", "FindingsOptions", "model,demo"),
    "findings run": ("msa.ablations.run", "RunOptions", "model,demo"),
    "exercise": ("exercises.run", "ExerciseOptions", "all"),
    "bench prefill": ("benchmarks.prefill", "PrefillOptions", "all"),
    "bench train": ("benchmarks.train", "TrainOptions", "all"),
    "bench decode": ("benchmarks.decode", "DecodeOptions", "all"),
    "bench serving": ("benchmarks.serving", "ServingOptions", "all"),
    "bench integrations": ("benchmarks.integrations", "IntegrationsOptions", "all"),
    "bench parallel": ("benchmarks.parallel", "ParallelOptions", "all"),
    "bench plots": ("benchmarks.plots", "PlotsOptions", "all"),
    "doctor": ("msa.doctor", "DoctorOptions", "torch"),
}
"""The module that runs each command, the name of its options there, and the extras it needs."""
CHECKOUT = ("benchmarks", "exercises", "docs")
"""Packages that a checkout has, and an installed wheel has not."""
REFUSED, INTERRUPTED, CLOSED = 2, 130, 141
"""Exit codes for input that is refused, for Ctrl-C, and for an output that its reader closed."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; its exit code is the return value."""
    words = sys.argv[1:] if arguments is None else arguments
    return guarded(lambda: run(words))


def run(arguments: list[str]) -> int:
    """Find the command and call it with its options."""
    if arguments in ([], ["-h"], ["--help"]):
        print(HELP, end="")
        return 0
    if arguments == ["--version"]:
        from importlib.metadata import version

        print(f"msa-stack {version('msa-stack')}")
        return 0
    name = next((n for n in (" ".join(arguments[:2]), arguments[0]) if n in COMMANDS), None)
    if name is None:
        return say(no_such_command(arguments), REFUSED)
    words = arguments[len(name.split()) :]
    if name == "convert" and words and not words[0].startswith("-"):
        name, words = "convert FOLDER", ["--folder", *words]
    module, options, _ = COMMANDS[name]

    def call() -> int:
        import tyro

        command = importlib.import_module(module)
        check_words(words, getattr(command, options))
        return command.run(tyro.cli(getattr(command, options), prog=f"msa {name}", args=words))

    return supplied(name, call)


def no_such_command(arguments: Sequence[str]) -> str:
    """The message about a command that does not exist, or that lacks its second word.

    >>> no_such_command(["bench"])[:61]
    'no such command: bench; behind bench must be prefill, train, '
    >>> no_such_command(["nothing"])
    'no such command: nothing; msa --help lists all commands'
    """
    first = arguments[0]
    seconds = [name.partition(" ")[2] for name in COMMANDS if name.startswith(f"{first} ")]
    if not seconds:
        return f"no such command: {shlex.quote(first)}; msa --help lists all commands"
    choice = f"{', '.join(seconds[:-1])} or {seconds[-1]}"
    return f"no such command: {shlex.join(arguments[:2])}; behind {first} must be {choice}"


def supplied(name: str, call: Callable[[], int]) -> int:
    """Return what the call returns.

    Raises:
        ValueError: the command needs a library that is not installed; names its extra.
    """
    try:
        return call()
    except ModuleNotFoundError as error:
        folder = (error.name or "").split(".")[0]
        if folder in CHECKOUT:
            raise ValueError(
                f"msa {name} runs from a checkout, which has the folder {folder}; there "
                "pip install -e '.[all]' brings what it needs"
            ) from None
        extras = COMMANDS[name][-1]
        raise ValueError(
            f"msa {name} needs {error.name}; pip install 'msa-stack[{extras}]' brings it"
        ) from None


def check_words(words: Sequence[str], options: type) -> None:
    """Check that an option of several values is given once, with its values behind it.

    tyro would let a second one replace the first.

    Raises:
        ValueError: the option is given twice, or no value follows it.

    >>> from msa.explain_print import ExplainOptions
    >>> check_words(["--backend", "torch", "--backend", "reference"], ExplainOptions)
    """
    for field in fields(options):
        option = f"--{field.name.replace('_', '-')}"
        if not str(field.type).startswith("tuple["):
            continue
        places = [i for i, word in enumerate(words) if word.split("=")[0] == option]
        if len(places) > 1:
            raise ValueError(f"{option} must be given once, its values behind it, got it again")
        for place in places:
            behind = words[place + 1] if place + 1 < len(words) else "--"
            if words[place] == option and behind.startswith("--"):
                raise ValueError(f"{option} must have at least one value behind it, got none")


# -- what goes wrong ------------------------------------------------------------------------------
def guarded(call: Callable[[], int]) -> int:
    """The exit code of a command; for an error that a user can correct, one sentence on stderr.

    These are errors of the operating system (OSError), refusals by the checks of this package, and
    Ctrl-C. Any other exception is a bug of this package, and its traceback is shown.
    """
    try:
        code = call()
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        drop_output()
        return CLOSED
    except KeyboardInterrupt as error:
        return say(str(error) or "stopped by Ctrl-C", INTERRUPTED)
    except OSError as error:
        drop_output()
        where = f"{error.filename}: " if error.filename is not None else ""
        return say(f"{where}{error.strerror or error}", REFUSED)
    except (ValueError, TypeError) as error:
        if not is_refusal(error.__traceback__):
            raise
        return say(str(error), REFUSED)


def is_refusal(trace: TracebackType | None) -> bool:
    """Whether an exception comes from a `raise` statement of this package, not from a bug.

    >>> from msa import MSAConfig
    >>> def refusal(call):
    ...     try:
    ...         call()
    ...     except (TypeError, ValueError) as error:
    ...         return is_refusal(error.__traceback__)
    >>> refusal(lambda: MSAConfig(block_size=0)), refusal(lambda: 1 + None)
    (True, False)
    """
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    spec = trace.tb_frame.f_globals.get("__spec__")  # its name stays where python -m runs a module
    package = getattr(spec, "name", "").split(".")[0]
    instruction = trace.tb_frame.f_code.co_code[trace.tb_lasti]
    return package in ("msa", *CHECKOUT) and dis.opname[instruction] == "RAISE_VARARGS"


def say(sentence: str, code: int) -> int:
    """Print one line on the error stream; return the exit code.

    Line breaks and other characters that are not printable, such as those in a path, are escaped.
    """
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in sentence)
    with suppress(OSError):
        print(f"msa: {line}", file=sys.stderr, flush=True)
    return code


def drop_output() -> None:
    """Discard what is still to be printed; else Python would try to print it at exit, and fail."""
    with suppress(OSError, ValueError, AttributeError):
        try:
            sys.stdout.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
