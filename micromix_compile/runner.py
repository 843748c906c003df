"""A lowered graph and what runs it: the packed weights of each call, then Inductor's code."""

from __future__ import annotations

import pickle
from typing import Any

import torch
from torch import fx

from micromix_compile import _torch_compat as compat
from micromix_compile.errors import ExportError, StrictError
from micromix_compile.explain import GraphReport
from micromix_compile.options import Options
from micromix_compile.passes.fold_order import Folds
from micromix_compile.passes.lower_linears import Lowering, lower_linears
from micromix_compile.passes.specialise_floats import specialise_floats
from micromix_compile.quantized_linear import refuse_tangents
from micromix_compile.regions import Region, region_of

_OPERATORS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket, torch._ops.HigherOrderOperator)


class Runner(compat.serializable_callable()):
    """A graph to run, and how the arguments of Dynamo's graph become its own.

    `kept` are the positions of the arguments that are passed on; packed tensors follow them. `region` knows how
    to make these from the float weights among the arguments. `quantises`: whether a layer is lowered.
    """

    def __init__(self, gm: fx.GraphModule, inputs: list[Any], report: GraphReport) -> None:
        self.gm = gm
        self.inputs = inputs
        self.report = report
        self.kept = list(range(len(inputs)))
        self.region = Region()
        self.quantises = False

    def lower(self, lowerings: list[Lowering], folds: Folds, options: Options) -> None:
        """Rewrite the graph, with the packed weights as new inputs in place of the float ones."""
        graph = self.gm.graph
        placeholders = list(graph.find_nodes(op="placeholder"))
        values = list(self.inputs)
        constants = specialise_floats(graph, self.inputs, compat.guard_value)
        packed: list[torch.Tensor] = []
        last = placeholders[-1] if placeholders else next(iter(graph.nodes)).prev

        def add_constant(name: str, tensor: torch.Tensor) -> fx.Node:
            nonlocal last
            with graph.inserting_after(last):
                last = graph.placeholder(f"micromix_{name}")
            last.target = last.name  # which is unique
            last.meta["example_value"] = compat.static_fake(tensor)
            compat.mark_static_input(last)
            packed.append(tensor)
            self.inputs.append(last.meta["example_value"])
            return last

        for quantised in lower_linears(graph, lowerings, add_constant):
            products = [[lowering.name for lowering in product] for product in quantised.products]
            self.report.add_products(quantised.number, products)
            orders = {
                x.linear.quantised.order for p in quantised.products for x in p if not x.weight
            }
            # Equal orders here are no reason that those of an equal part are equal.
            if len(orders) > 1:
                for order in orders:
                    compat.guard_identity(order)

        self.quantises = True
        self.region = region_of(lowerings, folds, options, placeholders, values, packed)
        # A weight or a float that nothing reads any more is no input of the lowered graph.
        floats = {*self.region.positions, *map(placeholders.index, constants)}
        unread = {i for i in floats if not placeholders[i].users}
        self.kept = [i for i in self.kept if i not in unread]
        self.inputs = [value for i, value in enumerate(self.inputs) if i not in unread]
        for i in unread:
            graph.erase_node(placeholders[i])
        graph.lint()
        self.gm.recompile()

    def compile(self, options: Options) -> None:
        self.run = self.gm.forward
        if options.inductor:
            self._compile_with_inductor(options)
        # Nothing of the compilation stays alive with the compiled function: not the fake tensors, not the graph.
        del self.gm, self.inputs

    def _compile_with_inductor(self, options: Options) -> None:
        from micromix_compile.passes.manager import counted, pass_manager  # imports Inductor

        settings = {
            **_defaults(self.gm.graph),
            "post_grad_custom_pre_pass": pass_manager(),
            **options.inductor_settings,
        }
        self.run, fused, missed = counted(lambda: compat.inductor(self.gm, self.inputs, settings))
        self.report.add_fusions(fused)
        if options.strict and missed:
            layers = [
                f"{', '.join(self.report.readers[quantise])}: {what} comes before, in a form that no pattern matches"
                for quantise, what in missed.items()
            ]
            raise StrictError(layers=layers, released=self._released())

    def _released(self) -> str:
        if not any(row.released for row in self.report.layers):
            return ""
        return (
            " Float weights were released by then (release_weights=True); before the model runs or is compiled again, "
            "micromix.restore(model, checkpoint) brings them back."
        )

    @classmethod
    def serialize_compile_artifacts(cls, runner: Runner) -> bytes:
        """For torch's `save_compiled_function`, whose files are pickles. Float weights are packed again when loaded."""
        region = runner.region
        if None in region.kinds:
            reason = (
                "a weight of its graph is no argument of it, so it would have to be in the file"
            )
            raise ExportError(reason=reason, mend="Make a package with micromix.export")
        return pickle.dumps(
            (compat.serialized(runner.run), runner.kept, region.slots, region.kinds)
        )

    @classmethod
    def deserialize_compile_artifacts(cls, data: bytes) -> Runner:
        run, kept, slots, kinds = pickle.loads(data)
        result = cls(fx.GraphModule({}, fx.Graph()), [], GraphReport())
        result.run, result.kept = compat.deserialized(run), kept
        result.region = Region(slots, kinds, shared=bool(slots))  # nothing is packed yet
        result.quantises = True
        return result

    def __call__(self, *arguments: Any) -> Any:
        if self.quantises:
            refuse_tangents(arguments)
        packed = self.region.tensors(arguments, self.report)
        return self.run(*[arguments[i] for i in self.kept], *packed)


def _defaults(graph: fx.Graph) -> dict[str, Any]:
    """Inductor's settings where they differ from its own defaults."""
    # The C++ wrapper, where it is asked for, is compiled apart from the kernels: as one file with them it is optimised
    # as they are, which takes minutes for a model of 30 layers.
    settings: dict[str, Any] = {"cpp_wrapper_build_separate": True}
    # Checks of sizes and strides find operators whose fake results are not like their real ones, at a twentieth of a
    # token's time. Those of torch and of this package are tested; Dynamo guards the inputs.
    operators = [node.target for node in graph.nodes if isinstance(node.target, _OPERATORS)]
    if all(str(operator).startswith(("aten.", "micromix.")) for operator in operators):
        settings["size_asserts"] = False
    return settings
