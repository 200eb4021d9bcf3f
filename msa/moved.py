"""Old import paths of modules and names that have moved work for one release, with a warning.

After `import msa.model.records`, the old module looks each name up in `msa.training.documents`, so
that the old and the new path give the same objects. To move a module, add a line to MOVED. To move
a name out of a module that stays, add a line to MOVED_NAMES; the module ends with
`__getattr__ = moved.names_of(__name__)`.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

LIKE = "msa.conformance.foreign.like"
KERNELS = "msa.triton_impl"
MOVED: dict[str, str] = {
    # msa.model is the architecture; training has its own package
    "msa.model.records": "msa.training.documents",
    "msa.model.prose": "msa.training.prose",
    "msa.model.presets": "msa.training.presets",
    "msa.model.trainer": "msa.training.trainer",
    "msa.model.ranks": "msa.training.ranks",
    "msa.model.evaluate": "msa.training.evaluate",
    "msa.model.evaluate:read": "msa.training.evaluate:read_documents",
    "msa.model.interrupts": "msa.training.interrupts",
    "msa.model.interrupts:deaf": "msa.training.interrupts:ignored",
    "msa.model.study": "msa.training.layer_stats",
    "msa.model.study:Study": "msa.training.layer_stats:LayerStats",
    "msa.model.study:study": "msa.training.layer_stats:measure_layers",
    "msa.model.train": "msa.training.train",
    "msa.model.train:Twin": "msa.training.options:Twin",
    "msa.model.train:read_model": "msa.training.options:read_model",
    "msa.model.convert": "msa.training.convert_dense",
    "msa.model.convert:FolderOptions": "msa.training.convert_dense:ConvertDenseOptions",
    # the ablations
    "msa.model.findings": "msa.ablations.tables",
    "msa.model.findings:Row": "msa.ablations.rows:Row",
    "msa.model.findings:RESULTS": "msa.ablations.results:RESULTS",
    "msa.model.findings:RunOptions": "msa.ablations.run:RunOptions",
    "msa.model.findings:by": "msa.ablations.results:readings_by",
    "msa.model.findings:told": "msa.ablations.tables:mean_of",
    "msa.model.findings_run": "msa.ablations.run",
    "msa.model.findings_run:judge": "msa.ablations.readings:measure_answers",
    "msa.model.findings_run:judge_index": "msa.ablations.readings:measure_index",
    "msa.model.findings_run:seen_as": "msa.ablations.readings:attending",
    "msa.model.findings_run:under": "msa.ablations.readings:with_config",
    "msa.model.findings_run:unseen": "msa.ablations.readings:unseen",
    # the demos
    "msa.model.demo": "msa.demo.demo",
    "msa.model.ask": "msa.demo.ask",
    "msa.model.answers": "msa.demo.answers",
    "msa.model.pictures": "msa.demo.pictures",
    "msa.model.figure": "msa.demo.figure",
    "msa.model.page": "msa.demo.demo_html",
    "msa.model.shown": "msa.demo.questions",
    "msa.model.shown:Question": "msa.demo.questions:DemoQuestion",
    "msa.model.shown:Shown": "msa.demo.questions:Comparison",
    "msa.model.shown:read": "msa.demo.questions:compare",
    "msa.model.shown:ReadingOptions": "msa.demo.options:ReadingOptions",
    "msa.model.shown:check_files": "msa.demo.options:check_files",
    "msa.model.shown:load_model": "msa.demo.options:load_model",
    "msa.model.shown:tell": "msa.demo.present:present",
    "msa.model.shown:table": "msa.demo.present:table_of",
    "msa.model.shown:summary": "msa.demo.present:summary",
    "msa.model.shown:half_blocks": "msa.demo.present:half_blocks",
    "msa.demo.experiment": "msa.demo.digits.experiment",
    "msa.demo.features": "msa.demo.digits.features",
    "msa.demo.gallery": "msa.demo.digits.gallery",
    "msa.demo.poster": "msa.demo.digits.poster",
    "msa.demo.report": "msa.demo.digits.tables",
    "msa.demo.stream": "msa.demo.digits.stream",
    # the conformance kit
    "msa.conformance.adapters": "msa.conformance.foreign.arguments",
    "msa.conformance.adapters:msa_attention": "msa.conformance.foreign.like_msa:msa_attention",
    **{
        f"msa.conformance.adapters:{name}_{kind}": f"{LIKE}_{name}:{name}_{kind}"
        for name in ("msa", "transformers", "vllm", "official")
        for kind in ("select", "sparse_attention")
    },
    "msa.conformance.bad_input_table": "msa.conformance.bad_input.collect",
    "msa.conformance.calls": "msa.conformance.run_stage",
    "msa.conformance.calls:judge": "msa.conformance.run_stage:compare_output",
    "msa.conformance.conventions": "msa.conformance.foreign.conventions",
    "msa.conformance.conventions:Call": "msa.conformance.foreign.signature:Signature",
    "msa.conformance.conventions:Convention": "msa.conformance.foreign.signature:Convention",
    "msa.conformance.conventions:Kind": "msa.conformance.foreign.signature:FunctionKind",
    "msa.conformance.messages": "msa.conformance.foreign.bad_target",
    "msa.conformance.messages:find": "msa.conformance.foreign.bad_target:find_target",
    "msa.conformance.packing": "msa.conformance.foreign.pages_and_rows",
    "msa.conformance.report": "msa.conformance.verify_run",
    "msa.conformance.report:Result": "msa.conformance.results:Result",
    "msa.conformance.report:try_one": "msa.conformance.results:try_one",
    "msa.conformance.target": "msa.conformance.foreign.target",
    "msa.conformance.targets": "msa.conformance.own_targets",
    "msa.conformance.trial": "msa.conformance.search",
    "msa.conformance.properties_places": "msa.conformance.properties.places_strides",
    **{
        f"msa.conformance.properties_{theme}": f"msa.conformance.properties.{theme}"
        for theme in (
            "alignment",
            "attention",
            "behaviour",
            "index",
            "lowering",
            "not_finite",
            "options",
            "selection",
            "sequences",
            "sizes",
            "training",
        )
    },
    # kernels and torch stages named for what they hold
    "msa.torch_impl.verdicts": "msa.torch_impl.alignment_tiles",
    "msa.torch_impl.verdicts:Verdict": "msa.torch_impl.alignment_tiles:TileLoss",
    "msa.torch_impl.verdicts:dense_verdicts": "msa.torch_impl.alignment_tiles:dense_losses",
    "msa.torch_impl.verdicts:sparse_verdicts": "msa.torch_impl.alignment_tiles:sparse_losses",
    "msa.torch_impl.rows": "msa.torch_impl.key_blocks",
    "msa.torch_impl.items": "msa.torch_impl.item_batches",
    "msa.torch_impl.lowering": "msa.torch_impl.scheduled_tiles",
    "msa.torch_impl.divergence": "msa.torch_impl.index_loss",
    "msa.triton_impl.student": "msa.triton_impl.index_loss",
    "msa.triton_impl.tile_edges": "msa.triton_impl.tile_reverse_index",
    "msa.triton_impl.early": "msa.triton_impl.dependent_launch",
    "msa.triton_impl.early:wait_for_others": "msa.triton_impl.dependent_launch:wait_for_previous",
    "msa.triton_impl.early:early_launch": "msa.triton_impl.dependent_launch:dependent_launch",
    "msa.triton_impl.tiles": "msa.triton_impl.launch",
    **{
        f"{KERNELS}.tiles:{name}": f"{KERNELS}.{new}:{name}"
        for new, names in {
            "bits": ("count_bits",),
            "tables": ("query_table", "block_table", "tile_table", "to_device"),
            "topk": (
                "ABOVE_BITS",
                "NO_BLOCK",
                "NO_SCORE",
                "keep_best",
                "key_score",
                "score_key",
                "store_selection",
                "threshold_of",
            ),
            "tile_verbs": (
                "FAST",
                "LN2",
                "LOG2E",
                "LOWEST",
                "along",
                "edge_rows",
                "fast_log",
                "load_keys",
            ),
        }.items()
        for name in names
    },
    # checks
    "msa.checks_cache": "msa.cache_checks",
}
"""Old path to new path. An entry "old.module" moves a whole module. An entry "old.module:name" says
where one name of that module is now, if it has a new name or if it left the other names."""

MOVED_NAMES: dict[str, str] = {
    "msa.conformance.bad_input:try_bad_input": "msa.conformance.bad_input.run:try_bad_input",
    "msa.conformance.properties:all_properties":
        "msa.conformance.properties.collect:all_properties",
    "msa.explain:ExplainOptions": "msa.explain_print:ExplainOptions",
    "msa.explain:run": "msa.explain_print:run",
    "msa.explain:to_plain": "msa.explain_print:to_plain",
    "msa.model.attention:Call": "msa.model.attention:LayerCall",
}  # fmt: skip
"""Old place to new place of names whose old module still exists."""


def find(path: str) -> Any:
    """The object at a path "module:name"."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def names_of(module: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module whose names of MOVED_NAMES are elsewhere now.

    >>> names_of("msa.explain")("nothing")
    Traceback (most recent call last):
    AttributeError: module 'msa.explain' has no attribute 'nothing'
    """

    def look_up(name: str) -> Any:
        new = MOVED_NAMES.get(f"{module}:{name}")
        if new is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        message = f"{module}.{name} has moved: import {new.replace(':', '.')}"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return find(new)

    return look_up


class Finder(MetaPathFinder, Loader):
    """Finds and loads the old paths. Python asks it after its own finders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A spec for the modules of MOVED, None for all other modules."""
        return ModuleSpec(fullname, self, is_package=True) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Warn, then let the old module look up its names in the new one.

        Raises:
            ModuleNotFoundError: the new module needs a library that is not installed.
        """
        old = module.__name__
        message = f"{old} has moved: import {MOVED[old]}"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        new = importlib.import_module(MOVED[old])
        places = {
            path.partition(":")[2]: MOVED[path] for path in MOVED if path.startswith(f"{old}:")
        }
        public = getattr(new, "__all__", [name for name in vars(new) if not name.startswith("_")])
        names = sorted({*public, *places})

        def look_up(name: str) -> Any:
            return find(places.get(name, f"{MOVED[old]}:{name}"))

        module.__dict__.update(__getattr__=look_up, __dir__=lambda: names, __all__=names)


def install() -> None:
    """Install the finder. A second call changes nothing."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.append(Finder())
