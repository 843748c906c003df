"""The `torch.compile` backend: lower the linear layers of Dynamo's graph, then Inductor."""

from __future__ import annotations

import pickle
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from tqdm import tqdm

from micromix_compile import _torch_compat as compat
from micromix_compile.allocation import uniform_plan
from micromix_compile.errors import (
    GradientError,
    MicroMixError,
    NoPlanWarning,
    OptionError,
    PlanMismatchError,
    StrictError,
)
from micromix_compile.explain import GraphReport, LayerReport, record
from micromix_compile.ops import EMULATED, blackwell_kernel, kernel_name, refuse_weight_only
from micromix_compile.packing import (
    AUTO,
    KERNELS,
    OrderedBias,
    PlacedWeight,
    format_code,
    placed_weight,
    refuse_released,
)
from micromix_compile.passes.contiguous_cats import contiguous_cats
from micromix_compile.passes.find_linears import Linear, find_linears
from micromix_compile.passes.fold_order import Folds, fold_orders
from micromix_compile.passes.lower_linears import Lowering, lower_linears, unsupported
from micromix_compile.passes.specialise_floats import specialise_floats
from micromix_compile.plan import (
    DIGEST,
    STRUCTURE,
    LayerPlan,
    LayerShape,
    ModelPlan,
    attached,
    load_plan,
)
from micromix_compile.recipe import Recipe
from micromix_compile.regions import Placed, Region, Slot

_OPTIONS = (
    "plan, recipe, strict, release_weights, kernel, mode, inductor, and every setting of Inductor"
)


@dataclass(frozen=True)
class Options:
    """What `torch.compile(model, backend="micromix", options={...})` takes.

    Attributes:
        plan: a ModelPlan, or the path of a saved one; without it, the plan attached to the model.
        recipe: for a model without a plan: a Recipe that needs no calibration (one format for all).
        strict: raise StrictError where a layer is not lowered for another reason than the recipe's.
        release_weights: free the float storage of each weight once it is packed.
        kernel: "auto", the device's own kernel, or "mx_emulated", the Blackwell kernel in software on an older GPU:
            slow, for its numbers. It runs only where it is asked for.
        mode: as in `torch.compile(mode=...)`, which refuses to be given beside options.
        inductor: False runs the lowered graph as it is, without Inductor: quick to compile, for evaluation.
        settings: every other option: settings of Inductor, as for its own backend.
    """

    plan: ModelPlan | None = None
    recipe: Recipe | None = None
    strict: bool = False
    release_weights: bool = False
    kernel: str = AUTO
    mode: str = "default"
    inductor: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None, mode: str | None) -> Options:
        """Check the options of one `torch.compile` call. Raises OptionError."""
        given = dict(options or {})
        own = {
            name: given.pop(name)
            for name in list(given)
            if name in cls.__annotations__ and name != "settings"
        }
        for name in given:
            if not compat.is_inductor_option(name):
                raise OptionError(option=name, reason="is not known", valid=_OPTIONS)
        if isinstance(own.get("plan"), str) or hasattr(own.get("plan"), "__fspath__"):
            own["plan"] = load_plan(own["plan"])
        if mode is not None:
            own["mode"] = mode
        kinds = {
            "plan": (ModelPlan, type(None)),
            "recipe": (Recipe, type(None)),
            "strict": bool,
            "release_weights": bool,
            "kernel": str,
            "mode": str,
            "inductor": bool,
        }
        for name, value in own.items():
            if not isinstance(value, kinds[name]):
                raise OptionError(option=name, reason=f"cannot be {value!r}", valid=_OPTIONS)
        if own.get("kernel", AUTO) not in KERNELS:
            reason = f"cannot be {own['kernel']!r}; the kernels are {', '.join(KERNELS)}"
            raise OptionError(option="kernel", reason=reason, valid=_OPTIONS)
        if own.get("plan") is not None and own.get("recipe") is not None:
            raise OptionError(
                option="recipe", reason="cannot be given beside a plan", valid=_OPTIONS
            )
        try:
            compat.inductor_mode_options(own.get("mode", "default"))
        except ValueError as error:
            raise OptionError(
                option="mode", reason=f"cannot be used: {error}", valid=_OPTIONS
            ) from None
        return cls(**own, settings=given)


def micromix(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend behind `torch.compile(model, backend="micromix")`; see Options for what it takes."""
    try:
        return _compile(gm, example_inputs, Options.parse(options, mode))
    except MicroMixError as error:
        raise compat.raised_through_dynamo(error) from error.__cause__


def _compile(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options
) -> Callable[..., Any]:
    gm = compat.copy_graph_module(gm)
    if contiguous_cats(gm.graph):
        gm.recompile()
    report = GraphReport()
    linears = find_linears(gm, example_inputs)
    if any(linear.reason is None for linear in linears):
        _check_inference(gm, example_inputs)
    chosen = _choose(linears, options, report)
    folds = fold_orders(gm.graph, {linear: plan for linear, _, plan, _ in chosen})
    lowerings = _pack(gm, example_inputs, chosen, folds, options)
    runner = _Runner(gm, list(example_inputs), report)
    _guard_plans(linears, options)
    if lowerings:
        _lower(runner, lowerings, folds, options)
    runner.compile(options)
    record(report, [linear.parameter for linear in linears if linear.parameter is not None])
    return runner


def _choose(
    linears: list[Linear], options: Options, report: GraphReport
) -> list[tuple[Linear, str, LayerPlan, LayerReport]]:
    """Decide for each layer whether and how it is lowered, and write that down."""
    chosen: list[tuple[Linear, str, LayerPlan, LayerReport]] = []
    refused: list[str] = []
    planless = 0
    for linear in linears:
        plan, name, reason, by_choice = None, linear.name, unsupported(linear), False
        if linear.quantised is not None:
            plan = _own_plan(linear, options)
        elif reason is None:
            model_plan, name = _plan_of(linear, options)
            recipe = options.recipe or Recipe(format="mxfp8")
            if model_plan is not None:
                recipe = Recipe.from_dict(model_plan.recipe)  # an empty one skips the output head
            shape = LayerShape(linear.out_features, linear.in_features, linear.transposed)
            by_choice = recipe.skips(name)
            if model_plan is not None and name in model_plan:
                plan = _checked(model_plan, name, shape)
            elif by_choice:
                reason = "the recipe skips it"
            elif model_plan is None:
                plan = uniform_plan({name: shape}, recipe)[name]
                planless += 1
            else:
                reason = _missing(model_plan, name)
        row = LayerReport(name, linear.in_features, linear.out_features, reason=reason or "")
        row.bytes_before = 0 if linear.parameter is None else linear.parameter.nbytes
        report.layers.append(row)
        if plan is not None:
            chosen.append((linear, name, plan, row))
        elif not by_choice:
            refused.append(f"{name}: {reason}")
    if options.plan is not None and refused and not chosen:
        raise PlanMismatchError(differences=refused)
    if options.strict and refused:
        raise StrictError(layers=refused)
    if planless and options.recipe is None:
        warnings.warn(NoPlanWarning(layers=planless), stacklevel=2)
    return chosen


def _own_plan(linear: Linear, options: Options) -> LayerPlan:
    """The plan that a layer was quantised by before, which no option can change."""
    plan, name = linear.quantised.plan, linear.name
    if options.recipe is not None:
        reason = f"cannot be given: {name} is quantised already"
        raise OptionError(
            option="recipe",
            reason=reason,
            valid="those of a quantised model: strict, mode, inductor, and settings of Inductor",
        )
    if options.plan is not None and name in options.plan:
        other = options.plan[name]
        same = all(
            getattr(other, what) == getattr(plan, what)
            for what in ("layout", "weights", "activations")
        )
        if not same or not _same_order(other.order, plan.order):
            raise PlanMismatchError(
                differences=[f"{name}: the model is quantised already, by another plan"]
            )
    return plan


def _same_order(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


def _plan_of(linear: Linear, options: Options) -> tuple[ModelPlan | None, str]:
    """The plan a layer belongs to, and its name there.

    A plan attached to the model knows the layer by its parameter. A plan given as an option knows names only:
    those of the graph, or, where a part of the model is compiled, the one name that ends in the graph's.
    """
    name, plan = linear.name, options.plan
    if plan is None and options.recipe is None:
        plan, marked = attached(linear.parameter) or (None, None)
        return plan, marked or name
    if plan is not None and name not in plan:
        ends = [known for known in plan if known.endswith("." + name)]
        name = ends[0] if len(ends) == 1 else name
    return plan, name


def _missing(plan: ModelPlan, name: str) -> str:
    ends = sum(known.endswith("." + name) for known in plan)
    if ends < 2:
        return f"the plan has no layer {name}"
    return f"{ends} layers of the plan end in {name}; plan.attach(model) tells them apart"


def _checked(plan: ModelPlan, name: str, shape: LayerShape) -> LayerPlan:
    if plan.shapes[name] != shape:
        difference = f"{name}: the plan has {plan.shapes[name]}, the model {shape}"
        raise PlanMismatchError(differences=[difference])
    return plan[name]


def _pack(
    gm: fx.GraphModule, example_inputs: Sequence[Any], chosen, folds: Folds, options: Options
) -> list[Lowering]:
    """Pack the weights, each once; with `release_weights`, free each float weight as soon as it is packed."""
    lowerings = []
    value = dict(zip(gm.graph.find_nodes(op="placeholder"), example_inputs))
    uses = Counter(linear.weight for linear, *_ in chosen)
    names = {linear: name for linear, name, *_ in chosen}
    for linear, name, plan, row in tqdm(
        chosen, "packing weights", delay=2, leave=False, disable=None
    ):
        rows = folds.rows.get(linear)
        _check_kernel(options.kernel, linear)
        if plan.weight_only:
            refuse_weight_only(linear.parameter.device)
        weight = None
        if linear.quantised is None:
            model_plan, known = _plan_of(linear, options)
            rounded = None if model_plan is None else model_plan.rounded.get(known)
            weight = placed_weight(
                name, linear.parameter, plan, linear.transposed, rows, options.kernel, rounded
            )
        bias = None
        if rows is not None and linear.bias is not None:
            bias = OrderedBias(value[linear.bias], rows)
        order = None if linear in folds.into else plan.order
        if order is not None:
            order = order.to(linear.parameter.device)
        lowerings.append(Lowering(name, linear, plan, weight, order, bias))
        row.gathered = folds.unfolded.get(linear, "")
        row.folded_into = [names[producer] for producer in folds.into.get(linear, ())]
        uses[linear.weight] -= 1
        if options.release_weights and weight is not None and not uses[linear.weight]:
            row.released = _release(linear, chosen, weight)
        layout = plan.weight_layout
        row.k4, row.k6, row.k8, row.format6 = (
            plan.layout.k4,
            plan.layout.k6,
            plan.layout.k8,
            plan.layout.format6,
        )
        row.activations = plan.activations
        placed = linear.parameter if weight is None else weight.buffer
        row.bits, row.bytes_after = layout.total_bits, placed.nbytes
        row.kernel = kernel_name(linear.parameter.device, format_code(plan, options.kernel))
    refuse_released()
    return lowerings


def _check_kernel(kernel: str, linear: Linear) -> None:
    """Refuse a kernel that was asked for by name where it cannot run."""
    device = linear.parameter.device
    if kernel == AUTO:
        return
    if linear.quantised is not None:
        reason = f"{linear.name} is quantised already, and placed for the device's own kernel"
    elif not blackwell_kernel(device, EMULATED):
        reason = (
            f"{linear.name} is on {device}, and that kernel needs a CUDA device of compute capability 8.0 or newer, "
            "and the CUDA kernels (`make cuda` builds them)"
        )
    else:
        return
    raise OptionError(option="kernel", reason=f"cannot be {kernel!r}: {reason}", valid=_OPTIONS)


def _release(linear: Linear, chosen, weight: PlacedWeight) -> bool:
    """Free a float weight, unless something else in the graph or in memory needs its storage."""
    lowered = sum(other.weight is linear.weight for other, *_ in chosen)
    storage = linear.parameter.untyped_storage()
    alone = len(linear.weight.users) == lowered and storage.nbytes() == linear.parameter.nbytes
    if not weight.released and alone:
        weight.release(linear.parameter)
    return weight.released


def _check_inference(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    if torch.is_grad_enabled():
        for node, value in zip(gm.graph.find_nodes(op="placeholder"), example_inputs):
            if isinstance(value, torch.Tensor) and value.requires_grad:
                raise GradientError(reason=f"gradients are enabled and {node.name} requires them")
    for node in gm.graph.nodes:
        if node.target in (torch.nn.functional.dropout, torch.dropout):
            training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
            if training is True:
                raise GradientError(reason="the model is in training mode (its dropout is on)")


def _guard_plans(linears: list[Linear], options: Options) -> None:
    """Another plan attached to the layers, or none any more, is another compilation where it is another structure."""
    if options.plan is None and options.recipe is None:
        for linear in linears:
            if linear.parameter is not None and linear.quantised is None:
                compat.guard_attribute(linear.weight, linear.parameter, STRUCTURE)


class _Runner(compat.serializable_callable()):
    """A graph to run, and how the arguments of Dynamo's graph become its own.

    `kept` are the positions of the arguments that are passed on; packed tensors follow them. `region` knows how
    to make these from the float weights among the arguments.
    """

    def __init__(self, gm: fx.GraphModule, inputs: list[Any], report: GraphReport) -> None:
        self.gm = gm
        self.inputs = inputs
        self.report = report
        self.kept = list(range(len(inputs)))
        self.region = Region()

    def compile(self, options: Options) -> None:
        self.run = self.gm.forward
        if options.inductor:
            settings = {**compat.inductor_mode_options(options.mode), **options.settings}
            self._compile_with_inductor(settings, options.strict)
        # Nothing of the compilation stays alive with the compiled function: not the fake tensors, not the graph.
        del self.gm, self.inputs

    def _compile_with_inductor(self, settings: dict[str, Any], strict: bool) -> None:
        from micromix_compile.passes.manager import counted, pass_manager  # imports Inductor

        settings = {"post_grad_custom_pre_pass": pass_manager(), **settings}
        self.run, fused, missed = counted(lambda: compat.inductor(self.gm, self.inputs, settings))
        self.report.add_fusions(fused)
        if strict and missed:
            layers = [
                f"{', '.join(self.report.readers[quantise])}: {what} comes before, in a form that no pattern matches"
                for quantise, what in missed.items()
            ]
            raise StrictError(layers=layers)

    @classmethod
    def serialize_compile_artifacts(cls, runner: _Runner) -> bytes:
        """For torch's `save_compiled_function`, whose files are pickles. Float weights are packed again when loaded."""
        region = runner.region
        return pickle.dumps(
            (compat.serialized(runner.run), runner.kept, region.slots, region.kinds)
        )

    @classmethod
    def deserialize_compile_artifacts(cls, data: bytes) -> _Runner:
        run, kept, slots, kinds = pickle.loads(data)
        result = cls(fx.GraphModule({}, fx.Graph()), [], GraphReport())
        result.run, result.kept = compat.deserialized(run), kept
        result.region = Region(slots, kinds, shared=bool(slots))  # nothing is packed yet
        return result

    def __call__(self, *arguments: Any) -> Any:
        packed = self.region.tensors(arguments, self.report)
        return self.run(*[arguments[i] for i in self.kept], *packed)


def _lower(runner: _Runner, lowerings: list[Lowering], folds: Folds, options: Options) -> None:
    """Rewrite the runner's graph, with the packed weights as new inputs in place of the float ones."""
    graph = runner.gm.graph
    placeholders = list(graph.find_nodes(op="placeholder"))
    position = {node: i for i, node in enumerate(placeholders)}
    values = list(runner.inputs)
    constants = specialise_floats(graph, runner.inputs, compat.guard_value)
    packed: list[torch.Tensor] = []
    last = placeholders[-1] if placeholders else next(iter(graph.nodes)).prev

    def add_constant(name: str, tensor: torch.Tensor) -> fx.Node:
        nonlocal last
        with graph.inserting_after(last):
            last = graph.placeholder(f"micromix_{name}")
        last.meta["example_value"] = compat.static_fake(tensor)
        compat.mark_static_input(last)
        packed.append(tensor)
        runner.inputs.append(last.meta["example_value"])
        return last

    for quantised in lower_linears(graph, lowerings, add_constant):
        products = [[lowering.name for lowering in product] for product in quantised.products]
        runner.report.add_products(quantised.number, products)
        orders = {x.linear.quantised.order for p in quantised.products for x in p if not x.weight}
        if len(orders) > 1:  # equal orders here are no reason that those of an equal part are equal
            for order in orders:
                compat.guard_identity(order)

    floats = _region(runner, lowerings, folds, options, position, values, packed)
    # A weight or a float that nothing reads any more is no input of the lowered graph.
    floats |= dict.fromkeys(constants)
    unread = {i for i, node in enumerate(placeholders) if node in floats and not node.users}
    runner.kept = [i for i in runner.kept if i not in unread]
    runner.inputs = [value for i, value in enumerate(runner.inputs) if i not in unread]
    for i in unread:
        graph.erase_node(placeholders[i])
    graph.lint()
    runner.gm.recompile()


def _region(
    runner: _Runner,
    lowerings: list[Lowering],
    folds: Folds,
    options: Options,
    position: Mapping[fx.Node, int],
    values: list[Any],
    packed: list[torch.Tensor],
) -> dict[fx.Node, None]:
    """Give the runner its region, and the graph the guards that it needs; returns the float parameters' nodes."""
    own = [x for x in lowerings if x.weight is not None and x.linear.weight in position]
    number = {lowering.linear: i for i, lowering in enumerate(own)}
    slots = [
        Slot(
            lowering.name,
            lowering.plan,
            lowering.linear.transposed,
            position[lowering.linear.weight],
            None if lowering.bias is None else position[lowering.linear.bias],
            number.get(folds.consumers.get(lowering.linear)),
            lowering.weight.released,
            lowering.weight.kernel,
            lowering.weight.rounded,
        )
        for lowering in own
    ]
    kinds: dict[int, tuple[str, int]] = {}  # by the packed tensor's identity
    for i, lowering in enumerate(own):
        kinds.setdefault(id(lowering.weight.buffer), ("weight", i))
        if lowering.bias is not None:
            kinds.setdefault(id(lowering.bias.buffer), ("bias", i))
        if lowering.order is not None:
            kinds.setdefault(id(lowering.order), ("order", i))
    found = [kinds.get(id(tensor)) for tensor in packed]
    nodes = [lowering.linear.weight for lowering in own]
    nodes += [lowering.linear.bias for lowering in own if lowering.bias is not None]
    held = [lowering.weight for lowering in own]
    held += [lowering.bias for lowering in own if lowering.bias is not None]
    # A plan given as an option knows layers by name, which a call does not bring; the addresses of a
    # CUDA graph's tensors are fixed.
    shared = bool(own) and options.plan is None and None not in found
    shared = shared and not _uses_cuda_graphs(options)
    follows = options.plan is None and options.recipe is None
    for node in nodes if not shared else ():
        compat.guard_identity(node)
        if follows:
            compat.guard_attribute(node, values[position[node]], DIGEST)
    first = Placed([weakref.ref(values[position[node]]) for node in nodes], held, packed)
    runner.region = Region(slots, found, first, shared, follows)
    return dict.fromkeys(nodes)


def _uses_cuda_graphs(options: Options) -> bool:
    settings = {**compat.inductor_mode_options(options.mode), **options.settings}
    return bool(settings.get("triton.cudagraphs"))
